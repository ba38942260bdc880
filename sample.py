"""Pictures and tables from a trained run: what each token means, how well it is drawn, what it costs.

WHERE     Read last, after train.py. Reads one run folder and nothing else; imports all the others.
PAPER     arXiv 2402.09712, Figures 2(b) and 5-9, Tables 5 and 8. Eq. (5) is in encdiff.py.
SHAPES    B images, N tokens, K columns of a picture, S image side; images (B, 3, S, S) in [-1, 1].
IDEA      How to read each picture. swap: a row replaces ONE token of the source by the target's, so
          exactly one thing should change along a row's name, and nothing in the rows named "none".
          traverse: the same token takes the values it has in the data, from the lowest to the highest.
          attention: where in the image a token is listened to; every row has its own colour scale.
          generate: each token from another image, so any combination should be a plausible image.
          All rows of a picture share their noise z_T: what differs between two rows is the token.
          kl: how much z_{t-1} can hold, in nats; a steeper curve lets factors in one after the other.
DIFFERS   The paper draws 200 steps of DDIM; we draw 20 of DPM-Solver++, which reconstruct as well
          (compare them: reconstruct RUN --sampler dpm ddim). A sweep visits quantiles of the values
          seen, not equal distances, so that vector-valued tokens can be swept in the same way.
TRY       python sample.py              ->   the verbs
          python sample.py kl           ->   kl.png, the bottleneck of the four schedules
"""
import csv
import io
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.flop_counter import FlopCounterMode

import data
import encdiff
import metrics
import train
import unet

# ---- Drawing ------------------------------------------------------------------------------------

GREY, PALE = (110, 110, 110), (225, 225, 225)
PALETTE = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))


def font(size):
    return ImageFont.load_default(size=size)


def grid(rows, labels, headings=()):
    """Rows of image tensors (K, 3, S, S) with a (name, remark) at the left of each -> PIL image."""
    K, _, S, _ = rows[0].shape
    # Whole multiples keep pixels sharp; many rows are shown smaller so that they fit a screen.
    side = S * max(1, min(128, 1600 // len(rows)) // S)
    big, small, gap = font(17), font(13), 3
    left = 20 + int(max([big.getlength(name) for name, _ in labels] + [small.getlength(r) for _, r in labels]))
    top = 28 if headings else gap
    canvas = Image.new("RGB", (left + K * (side + gap), top + len(rows) * (side + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for k, heading in enumerate(headings):
        draw.text((left + k * (side + gap) + side // 2, top // 2), heading, "black", small, anchor="mm")
    for r, (row, (name, remark)) in enumerate(zip(rows, labels)):
        y = top + r * (side + gap)
        middle = y + side // 2
        draw.text((10, middle - 9 * bool(remark)), name, "black", big, anchor="lm")
        draw.text((10, middle + 11), remark, GREY, small, anchor="lm")
        for k, image in enumerate(train.to_bytes(row).permute(0, 2, 3, 1).numpy()):  # (K, S, S, 3)
            tile = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(tile, (left + k * (side + gap), y))
    return canvas


def heat(images, maps):
    """Maps (K, S, S) in [0, 1] as colours, black to yellow, over images (K, 3, S, S) in grey -> same."""
    anchors = torch.tensor([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)])
    place = maps.cpu().clamp(0, 1) * (len(anchors) - 1)
    below = place.long().clamp(max=len(anchors) - 2)
    share = (place - below)[..., None]
    colours = torch.lerp(anchors[below].float(), anchors[below + 1].float(), share)  # (K, S, S, 3)
    colours = train.to_float(colours.permute(0, 3, 1, 2))  # -> (K, 3, S, S)
    return 0.7 * colours + 0.3 * images.cpu().mean(1, keepdim=True)


def ticks(low, high):
    """About six round numbers within [low, high]."""
    rough = (high - low) / 8
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def plot(title, x_title, series, size=(900, 520), logarithmic=False):
    """series: (name, xs, ys, colour, "line" or "dots") -> PIL image with axes, ticks and a legend.

    The axes start at 0, but for a logarithmic one, which takes positive ys only.
    """
    zoom = 2  # drawn twice as large and shrunk: smooth lines
    W, H = (n * zoom for n in size)
    text, x0, y0, y1 = font(15 * zoom), 76 * zoom, 44 * zoom, H - 60 * zoom
    named = [s for s in series if s[0]]
    x1 = W - (60 + int(max(text.getlength(name) for name, *_ in named) / zoom)) * zoom
    right = max(1, *(max(s[1]) for s in series))
    ys = np.concatenate([np.asarray(s[2], float) for s in series])
    scale = np.log10 if logarithmic else np.asarray
    bottom, top = scale(ys.min()) if logarithmic else 0, scale(ys.max())
    top = bottom + max((top - bottom) * 1.05, 0.1)  # one point alone has no extent
    to_x = lambda x: x0 + x / right * (x1 - x0)
    to_y = lambda y: y1 - (scale(y) - bottom) / (top - bottom) * (y1 - y0)
    canvas = Image.new("RGB", (W, H), "white")
    draw = ImageDraw.Draw(canvas)
    for x in ticks(0, right):
        draw.line((to_x(x), y0, to_x(x), y1), PALE, zoom)
        draw.text((to_x(x), y1 + 6 * zoom), f"{x:g}", "black", text, anchor="mt")
    round_numbers = [m * 10.0**k for k in range(math.floor(bottom), math.ceil(top)) for m in (1, 2, 5)]
    inside = [y for y in round_numbers if bottom <= math.log10(y) <= top]
    for y in inside if logarithmic else ticks(0, top):
        draw.line((x0, to_y(y), x1, to_y(y)), PALE, zoom)
        draw.text((x0 - 8 * zoom, to_y(y)), f"{y:.4g}", "black", text, anchor="rm")
    draw.line((x0, y0, x0, y1, x1, y1), "black", zoom)
    draw.text(((x0 + x1) / 2, H - 14 * zoom), x_title, "black", text, anchor="mm")
    draw.text((x0, 20 * zoom), title, "black", font(17 * zoom), anchor="lm")
    for _, xs, ys, colour, style in series:
        points = [(to_x(x), to_y(y)) for x, y in zip(xs, ys)]
        if style == "line" and len(points) > 1:
            draw.line(points, colour, 2 * zoom, joint="curve")
        else:
            for x, y in points:
                draw.ellipse((x - 4 * zoom, y - 4 * zoom, x + 4 * zoom, y + 4 * zoom), "white", colour, 2 * zoom)
    for i, (name, _, _, colour, _) in enumerate(named):
        y = y0 + (12 + 24 * i) * zoom
        draw.line((x1 + 14 * zoom, y, x1 + 36 * zoom, y), colour, 3 * zoom)
        draw.text((x1 + 42 * zoom, y), name, "black", text, anchor="lm")
    return canvas.resize(size, Image.Resampling.LANCZOS)


def save(args, folder, name, picture):
    path = Path(args.out or Path(folder) / name)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    train.write_atomically(path, buffer.getbuffer())
    print(f"wrote {path}, {picture.width} x {picture.height} pixels, {buffer.tell() / 1024:.0f} KB")


# ---- A trained run ------------------------------------------------------------------------------


def batched(function, *tensors, size=64):
    """function applied to `size` rows of the tensors at a time, results joined."""
    return torch.cat([function(*parts) for parts in zip(*(t.split(size) for t in tensors))])


class Trained:
    """A run opened for use: its averaged model, its dataset and the samplers that were asked for."""

    def __init__(self, args):
        self.folder, self.device = Path(args.run), train.Machine(args.device).device
        self.model, self.config = train.load_run(self.folder, self.device)
        self.samplers = choose_samplers(args, self.config) if hasattr(args, "sampler") else []
        path = getattr(args, "data", None)
        cache = None if path else self.config.cache or None
        self.dataset = data.open_dataset(path or self.config.data or None, self.config.size, cache)

    def some(self, count):
        """`count` different random places in the dataset (count,)."""
        if count > len(self.dataset):
            raise ValueError(f"{count} images are needed; expected at most {len(self.dataset)}, all that "
                             f"{self.dataset.name} has: choose a smaller --count")
        return torch.randperm(len(self.dataset))[:count]

    def images(self, count):
        """-> (count, 3, S, S) random images of the dataset, in [-1, 1]."""
        return train.to_float(self.dataset.images(self.some(count)).to(self.device))

    def noise(self, count):
        """z_T (count, C, h, w), drawn on the CPU so that a seed means the same everywhere."""
        return torch.randn(count, *self.model.latent_shape).to(self.device)

    def codes(self, images):
        return batched(self.model.represent, images)

    def draw(self, codes, noise, options=None):
        """Images from codes (B, N) or (B, N, d) and z_T (B, C, h, w), by the first sampler asked for."""
        options = self.samplers[0][1] if options is None else options
        sample = lambda c, z: self.model.sample(self.model.tokens(c), noise=z, **options)
        return batched(sample, codes, noise)


def choose_samplers(args, config):
    """--sampler, --steps, --eta -> list of (name, options of EncDiff.sample); refuses what cannot work."""
    if config.decoder == "direct":
        if args.sampler or args.steps or args.eta is not None:
            raise ValueError(f"{args.run} has a direct decoder; expected no --sampler, --steps or --eta")
        return [("direct decoder", {})]
    T, usual = config.timesteps, {"dpm": 20, "ddim": 200, "ddpm": config.timesteps}
    names = args.sampler or ["dpm"]
    steps = args.steps or [min(T, usual[name]) for name in names]
    if len(steps) != len(names):
        raise ValueError(f"{len(names)} --sampler and {len(steps)} --steps; expected one number for each sampler")
    for name, n in zip(names, steps):
        if not 1 <= n <= T:
            raise ValueError(f"--steps is {n}; expected 1 to {T}, the timesteps of this run")
        if name == "ddpm" and n != T:
            raise ValueError(f"--steps is {n} with ddpm, which takes all {T}; expected ddim or dpm for fewer")
    if args.eta is not None and ("ddim" not in names or not 0 <= args.eta <= 1):
        raise ValueError(f"--eta is {args.eta} with --sampler {' '.join(names)}; expected 0 to 1, with ddim")
    eta = {} if args.eta is None else {"eta": args.eta}
    return [(f"{name}, {n} steps", dict(sampler=name, steps=n, **(eta if name == "ddim" else {})))
            for name, n in zip(names, steps)]


def name_tokens(importance, factor_names):
    """DCI's importance matrix (N, F) -> [(token, name)], tokens that carry a factor first.

    A token carries the factor that uses it most, if it provides twice the share of an equal split.
    Otherwise its name is "none". Order: by factor, and for one factor the more important token first.
    """
    N, F_ = importance.shape
    strength, factor = importance.max(1), importance.argmax(1)
    factor[strength < min(0.5, 2 / N)] = F_
    order = sorted(range(N), key=lambda i: (factor[i], -strength[i] if factor[i] < F_ else i))
    return [(i, (*factor_names, "none")[factor[i]]) for i in order]


def token_rows(args, run):
    """[(token, (name, remark))] in the order of a picture's rows, only --tokens if given."""
    N, names, path = run.config.num_tokens, run.dataset.factor_names, run.folder / "metrics.json"
    unknown = [i for i in args.tokens or () if not 0 <= i < N]
    if unknown:
        raise ValueError(f"--tokens has {unknown[0]}; expected 0 to {N - 1}, the tokens of {run.folder}")
    try:
        scores = json.loads(path.read_text()) if names and path.exists() else {}
        importance = np.array(scores.get("importance", np.zeros((0, 0))), float)
    except (ValueError, AttributeError, TypeError):
        raise ValueError(f"{path} is damaged; expected what train.py wrote. Delete it to draw rows "
                         "without names") from None
    if importance.shape == (N, len(names)):
        rows = [(i, (name, f"token {i}")) for i, name in name_tokens(importance, names)]
    else:
        rows = [(i, (f"token {i}", "")) for i in range(N)]
    return [row for row in rows if args.tokens is None or row[0] in args.tokens]


# ---- The verbs: pictures ------------------------------------------------------------------------


def reconstruct(args):
    """inputs, first-stage reconstructions and samples from the tokens, with SSIM, MSE, LPIPS (Table 8)"""
    run = Trained(args)
    lpips = metrics.load_lpips(*args.lpips) if args.lpips else None
    images = run.images(args.count)
    codes, noise = run.codes(images), run.noise(args.count)
    drawn = {"first stage": batched(lambda x: run.model.decode(run.model.latents(x)), images)}
    seconds = {}
    for name, options in run.samplers:
        began = time.monotonic()
        drawn[name] = run.draw(codes, noise, options)
        seconds[name] = (time.monotonic() - began) / args.count
    print(f"{args.count} images".ljust(18) + "   SSIM       MSE" + "     LPIPS" * bool(lpips) + "   seconds an image")
    for name, result in drawn.items():
        x, y = (images + 1) / 2, (result + 1) / 2
        scores = [batched(score, x, y).mean().item() for score in (metrics.ssim, metrics.mse)]
        scores += [batched(lambda a, b: metrics.lpips(a, b, lpips), x, y).mean().item()] if lpips else []
        line = f"{name:18s} {scores[0]:.4f}" + "".join(f"  {s:8.2e}" for s in scores[1:])
        print(line + (f"   {seconds[name]:16.3f}" if name in seconds else ""))
    rows = {"input": images, **drawn}
    save(args, run.folder, "reconstruct.png", grid([x[:8] for x in rows.values()], [(name, "") for name in rows]))


def swap(args):
    """source, target, and the source with one token after the other from the target (Figures 5, 7, 8)"""
    run = Trained(args)
    tokens, K = token_rows(args, run), args.count
    source, target = run.images(2 * K).split(K)
    codes, taken, noise = run.codes(source), run.codes(target), run.noise(K)
    swapped = codes.repeat(len(tokens), 1, *[1] * (codes.ndim - 2)).unflatten(0, (-1, K))  # (rows, K, N, ...)
    for row, (i, _) in enumerate(tokens):
        swapped[row, :, i] = taken[:, i]
    drawn = run.draw(swapped.flatten(0, 1), noise.repeat(len(tokens), 1, 1, 1)).split(K)
    save(args, run.folder, "swap.png", grid([source, target, *drawn], [
        ("source", ""), ("target", ""), *(label for _, label in tokens)]))


def traverse(args):
    """one image with one token after the other swept over the values it has in the data"""
    run = Trained(args)
    tokens, K = token_rows(args, run), args.count
    seen = run.codes(run.images(min(2000, len(run.dataset))))  # (M, N) or (M, N, d)
    image, noise, quantiles = run.images(1), run.noise(1), torch.linspace(0.01, 0.99, K)
    places = (quantiles * (len(seen) - 1)).round().long()
    ranks = torch.from_numpy(metrics.scalar_codes(seen)).argsort(0)[places]  # (K, N): who has that quantile
    own = run.codes(image).repeat(K, *[1] * (seen.ndim - 1))
    rows = []
    for i, _ in tokens:
        swept = own.clone()
        swept[:, i] = seen[ranks[:, i].to(seen.device), i]
        drawn = run.draw(swept, noise.repeat(K, 1, 1, 1))
        rows.append(torch.cat([image, drawn]))
    save(args, run.folder, "traverse.png", grid(rows, [label for _, label in tokens], [
        "input", *(f"{q:.0%}" for q in quantiles)]))


def to_pictures(attention, size):
    """Attention (K, P, N) over P = side*side positions -> maps (K, N, S, S)."""
    side = math.isqrt(attention.shape[1])
    maps = attention.transpose(1, 2).unflatten(2, (side, side))  # (K, P, N) -> (K, N, side, side)
    return F.interpolate(maps, size=(size, size), mode="bilinear")


def attention(args):
    """where each token is attended to while its image is drawn (Figures 6, 9)"""
    run = Trained(args)
    tokens, K, S = token_rows(args, run), 1 if args.per else args.count, run.config.size
    codes, noise = run.codes(run.images(K)), run.noise(K)
    with unet.record_attention(run.model.denoiser) as layers:
        drawn = run.draw(codes, noise)
    if not layers:
        raise ValueError(f"{run.folder} has no cross-attention; expected a run with --conditioning cross")
    layers = [torch.stack(calls) for calls in layers]  # one a layer: (calls, K, P, N), averaged over heads
    headings = ()
    if args.per == "layer":  # one column a layer, in the order in which they run
        maps = torch.cat([to_pictures(calls.mean(0), S) for calls in layers])
        headings = [f"{math.isqrt(calls.shape[2])}x{math.isqrt(calls.shape[2])}" for calls in layers]
    elif args.per == "timestep":
        count = len(layers[0])
        chosen = torch.linspace(0, count - 1, min(8, count)).round().long()
        maps = torch.stack([to_pictures(calls[chosen, 0], S) for calls in layers]).mean(0)
        times = encdiff.timesteps_down(run.config.timesteps, count)
        headings = [f"t = {times[i]}" for i in chosen] if run.config.decoder == "diffusion" else ()
    else:
        maps = torch.stack([to_pictures(calls.mean(0), S) for calls in layers]).mean(0)  # (K, N, S, S)
    images = drawn.expand(len(maps), -1, -1, -1)
    rows, labels = [images], [("sample", "")]
    for i, (name, remark) in tokens:
        low, high = maps[:, i].min(), maps[:, i].max()
        rows.append(heat(images, (maps[:, i] - low) / (high - low).clamp(min=1e-6)))
        labels.append((name, f"{remark}  {low:.2f} - {high:.2f}".strip()))
    print(f"the colours of a row run from its lowest to its highest attention; even attention is "
          f"{1 / run.config.num_tokens:.2f}")
    save(args, run.folder, "attention.png", grid(rows, labels, headings))


def generate(args):
    """new combinations: every token is taken from another image"""
    run = Trained(args)
    codes = run.codes(run.images(min(2000, len(run.dataset))))
    chosen = torch.randint(len(codes), (args.count, codes.shape[1]), device=codes.device)
    mixed = codes[chosen, torch.arange(codes.shape[1], device=codes.device)]  # (count, N) or (count, N, d)
    drawn = run.draw(mixed, run.noise(args.count))
    K = min(8, args.count)
    drawn = F.pad(drawn, (0, 0, 0, 0, 0, 0, 0, -args.count % K), value=1.0)  # white tiles fill the last row
    save(args, run.folder, "generate.png", grid(list(drawn.split(K)), [("", "")] * (len(drawn) // K)))


# ---- The verbs: curves and tables ---------------------------------------------------------------


def kl_estimate(z0, betas, t):
    """Eq. (5) a dimension by Monte Carlo: latents z0 (B, C, h, w), t an int -> float, in nats."""
    alpha_bar = encdiff.cumulative(betas)
    a, b, v = encdiff.posterior(alpha_bar, t)
    z_t = alpha_bar[t].sqrt() * z0 + (1 - alpha_bar[t]).sqrt() * torch.randn_like(z0)
    mean = a * z0 + b * z_t
    return 0.5 * (v - 1 - v.log() + mean.square().mean()).item()


def kl(args):
    """the bottleneck of eq. (5) under the four schedules (Figure 2b), on a run's latents if one is given"""
    T, second_moment, z0 = 1000, 1.0, None
    if args.run:
        run = Trained(args)
        T = run.config.timesteps
        z0 = batched(run.model.latents, run.images(args.count)).cpu().double()
        second_moment = z0.square().mean().item()
        print(f"latents of {args.count} images: mean square {second_moment:.3f}")
    series, some = [], torch.linspace(0.01 * T, T, 12).round().long().clamp(min=2).tolist()
    print("       t" + "".join(f"{t:8d}" for t in some))
    for colour, name in zip(PALETTE, encdiff.SCHEDULES):
        betas = encdiff.beta_schedule(name, T)
        exact = encdiff.kl_bottleneck(betas, second_moment)
        series.append((name, range(2, T + 1), exact[1:].tolist(), colour, "line"))  # infinite at t = 1
        print(f"{name:12s}" + "".join(f"{exact[t - 1]:8.4f}" for t in some))
        if z0 is not None:
            estimates = [kl_estimate(z0, betas, t) for t in some]
            series.append(("", some, estimates, colour, "dots"))
            print(f"{'  estimated':12s}" + "".join(f"{e:8.4f}" for e in estimates))
    title = "KL( q(z_{t-1} | z_t, z_0) || N(0, I) ) per latent dimension, in nats"
    title += "; circles: estimated on real latents" if args.run else ""
    save(args, args.run or ".", "kl.png", plot(title, "timestep t", series))


def read_log(folder):
    """log.csv of a run -> {(stage, column): (steps, values)}."""
    path, table = Path(folder) / "log.csv", {}
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found; expected a folder written by train.py --out")
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                for column in train.Run.COLUMNS[2:]:
                    if row[column]:
                        steps, values = table.setdefault((row["stage"], column), ([], []))
                        steps.append(int(row["step"]))
                        values.append(float(row[column]))
    except (KeyError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is not a log of this version of train.py ({type(error).__name__}: {error}); "
                         f"expected the columns {', '.join(train.Run.COLUMNS)}") from None
    return table


def curves(args):
    """losses and scores over training, several runs in one picture"""
    logs = {folder[-28:]: read_log(folder) for folder in args.run}
    pictures = []
    for stage in ("first stage", "joint training"):
        for column in ("loss", "mse", "codes_used", *train.Run.COLUMNS[9:]):
            series = [(name, *log[stage, column], colour, "line") for (name, log), colour in
                      zip(logs.items(), PALETTE * len(logs)) if (stage, column) in log]
            if series:
                title = f"{stage}: {column.replace('_', ' ')}"
                pictures.append(plot(title, "step", series, (760, 360), column in ("loss", "mse")))
    if not pictures:
        raise ValueError(f"{args.run[0]}/log.csv has no losses yet; expected a run that has logged some steps")
    canvas = Image.new("RGB", (760 * min(2, len(pictures)), 360 * math.ceil(len(pictures) / 2)), "white")
    for i, picture in enumerate(pictures):
        canvas.paste(picture, (760 * (i % 2), 360 * (i // 2)))
    save(args, args.run[0], "curves.png", canvas)


def flops(function, *inputs):
    """Floating-point operations of one call, a multiply-add as two."""
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


@torch.no_grad()
def complexity(args):
    """parameters, FLOPs and seconds of a sample with each sampler (Table 5), on this device"""
    run = Trained(args)
    model, image, noise = run.model, run.images(1), run.noise(1)
    codes = model.represent(image)
    tokens, t = model.tokens(codes), torch.ones(1, dtype=torch.long, device=run.device)
    inputs = (tokens,) if run.config.decoder == "direct" else (noise, t, tokens)
    parts = {"encoder": (model.encoder, model.encoder, (image,)), "token maps": (model.token_map, model.tokens, (codes,)),
             "denoiser": (model.denoiser, model.denoiser, inputs),
             "first stage": (model.first_stage, model.first_stage.decode, (noise,))}
    count = {name: flops(call, *given) for name, (_, call, given) in parts.items()}
    print("              parameters   MFLOPs a pass")
    for name, (module, *_) in parts.items():
        print(f"{name:12s}{sum(p.numel() for p in module.parameters()):12,d}{count[name] / 1e6:16,.1f}")
    print("the paper counts encoder, token maps and denoiser; a first stage's pass is its decoder\n")
    print(f"sampler             passes   GFLOPs a sample   seconds a sample ({run.device})")
    for name, options in run.samplers:
        passes = options.get("steps", 1)
        run.draw(codes, noise, {**options, "steps": 1} if options.get("sampler") != "ddpm" else options)
        began = time.monotonic()
        run.draw(codes, noise, options)
        total = passes * count["denoiser"] + count["token maps"] + count["first stage"]
        print(f"{name:18s}{passes:8d}{total / 1e9:18,.1f}{time.monotonic() - began:19.2f}")


def encode(args):
    """the codes of the run's dataset, or of other images, into codes.npz for work downstream"""
    run = Trained(args)
    count = len(run.dataset) if args.count is None else args.count
    indices = run.some(count).sort().values
    print(f"encoding {count} images of {run.dataset}")
    arrays = {"codes": train.encode(run.model, run.dataset, indices, run.device).numpy(), "indices": indices.numpy()}
    if run.dataset.factor_names:
        arrays["factors"] = run.dataset.factors(indices).numpy()
    path, buffer = Path(args.out or run.folder / "codes.npz"), io.BytesIO()
    np.savez(buffer, **arrays)
    train.write_atomically(path, buffer.getbuffer())
    print(f"wrote {path}: " + ", ".join(f"{name} {array.shape}" for name, array in arrays.items()))


# ---- The command line ---------------------------------------------------------------------------

SAMPLING = "sampler steps eta "
VERBS = (  # function, how many runs, usual --count, further options
    (reconstruct, None, 256, SAMPLING + "lpips"), (swap, None, 8, SAMPLING + "tokens"),
    (traverse, None, 9, SAMPLING + "tokens"), (attention, None, 8, SAMPLING + "tokens per"),
    (generate, None, 32, SAMPLING), (encode, None, None, "count data"), (kl, "?", 256, ""),
    (curves, "+", None, ""), (complexity, None, None, SAMPLING))
OPTIONS = {
    "sampler": dict(choices=tuple(encdiff.SAMPLERS), help="default: dpm"),
    "steps": dict(type=int, metavar="N", help="default: dpm 20, ddim 200, ddpm all"),
    "eta": dict(type=float, help="noise of ddim, 0 (default) to 1"),
    "tokens": dict(type=int, nargs="+", metavar="I", help="only the rows of these tokens"),
    "per": dict(choices=("layer", "timestep"), help="one image, with a column for each"),
    "lpips": dict(nargs=2, metavar="FILE", help="weights: torchvision's AlexNet, then the lpips package's alex.pth"),
    "count": dict(type=int, metavar="N", help="this many random images; default: all, in order"),
    "data": dict(metavar="PATH", help="another dataset, a folder of images or an .npz"),
}
SEVERAL = (reconstruct, complexity)  # take a list of samplers, a row of the table each


def parse(arguments):
    parser = train.Parser("sample.py", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for function, runs, count, options in VERBS:
        name, purpose = function.__name__, function.__doc__
        verb = verbs.add_parser(name, help=purpose, description=purpose)
        verb.add_argument("run", nargs=runs, metavar="RUN", help="folder of a run of train.py")
        if count:
            verb.add_argument("--count", type=int, default=count, metavar="N", help=f"number of images (default {count})")
        for option in options.split():
            several = {"nargs": "+" if function in SEVERAL else 1} if option in ("sampler", "steps") else {}
            verb.add_argument("--" + option, **OPTIONS[option], **several)
        verb.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
        verb.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: the best there is")
        verb.add_argument("--out", metavar="FILE", help="where to write (default: in the run's folder)")
        verb.set_defaults(function=function)
    args = parser.parse_args(arguments)
    if args.verb is None:
        parser.print_help()
        return None
    if args.out and not Path(args.out).parent.is_dir():
        raise ValueError(f"--out is {args.out}; expected a file in a folder that exists")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed is {args.seed}; expected 0 or more")
    if getattr(args, "count", None) is not None and args.count < 1:
        raise ValueError(f"--count is {args.count}; expected at least 1")
    return args


def main(arguments=None):
    args = parse(arguments)
    if args:
        torch.manual_seed(args.seed)
        args.function(args)


if __name__ == "__main__":
    with train.one_line_errors():
        main()

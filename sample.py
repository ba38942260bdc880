"""Pictures and tables from a trained run: what each token means, how well it draws, what it costs.

WHERE     Read last, after train.py. Reads one run folder and nothing else; imports all the others.
PAPER     arXiv 2402.09712, Figures 2(b) and 5-9, Tables 5 and 8. Eq. (5) is in encdiff.py.
SHAPES    B images, N tokens, K columns of a picture, S image side; images (B, 3, S, S) in [-1, 1].
IDEA      How to read the pictures. All rows share their noise z_T: what differs is the token.
            swap       a row takes ONE token from the target: compared with the row "redrawn", only
                       what names the row should change, and nothing in the rows named "none"
            traverse   one token takes the values that it has in the data, lowest to highest
            attention  where in the image a token is listened to; each row has its own colours
            generate   every token from another image: each combination should be a good picture
            kl         how much z_{t-1} can say, in nats, so how many factors are worth a token
DIFFERS   The paper draws with 200 steps of DDIM, we with 20 of DPM-Solver++. Compare them:
          python sample.py reconstruct RUN --sampler dpm ddim
          A sweep visits quantiles of the values seen, not equal distances: so it also works for
          vector-valued tokens, in the order of their first principal component.
TRY       python sample.py      ->   the verbs
          python sample.py kl   ->   kl.png, the bottleneck of the four schedules
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
PALETTE = ((0, 114, 178), (213, 94, 0), (0, 158, 115),  # Okabe-Ito: also for the colour-blind
           (204, 121, 167), (230, 159, 0), (86, 180, 233))
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # dark to bright


def font(size):
    """Pillow's own font, so that no font file is needed."""
    return ImageFont.load_default(size=size)


def grid(rows, labels, headings=()):
    """Rows of image tensors (K, 3, S, S), each with a (name, remark) at its left -> PIL image."""
    K, _, S, _ = rows[0].shape
    # Whole multiples keep pixels sharp; many rows are shown smaller so that they fit a screen.
    side = S * max(1, min(128, 1600 // len(rows)) // S)
    big, small, gap = font(17), font(13), 3
    widths = [max(big.getlength(name), small.getlength(remark)) for name, remark in labels]
    left, top = 20 + int(max(widths)), 28 if headings else gap
    size = (left + K * (side + gap), top + len(rows) * (side + gap))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for k, heading in enumerate(headings):
        x = left + k * (side + gap) + side // 2
        draw.text((x, top // 2), heading, "black", small, anchor="mm")
    for r, (row, (name, remark)) in enumerate(zip(rows, labels)):
        y = top + r * (side + gap)
        draw.text((10, y + side // 2 - 9 * bool(remark)), name, "black", big, anchor="lm")
        draw.text((10, y + side // 2 + 11), remark, GREY, small, anchor="lm")
        for k, image in enumerate(train.to_bytes(row).permute(0, 2, 3, 1).numpy()):  # (K, S, S, 3)
            tile = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(tile, (left + k * (side + gap), y))
    return canvas


def heat(images, maps):
    """Maps (K, S, S) in [0, 1] as colours over images (K, 3, S, S) in grey -> (K, 3, S, S)."""
    anchors = torch.tensor(HEAT).float()
    place = maps.cpu().clamp(0, 1) * (len(anchors) - 1)
    below = place.long().clamp(max=len(anchors) - 2)
    colours = torch.lerp(anchors[below], anchors[below + 1], (place - below)[..., None])
    colours = train.to_float(colours.permute(0, 3, 1, 2))  # (K, S, S, 3) -> (K, 3, S, S)
    return 0.7 * colours + 0.3 * images.cpu().mean(1, keepdim=True)


def ticks(high):
    """Some eight round numbers from 0 to `high`."""
    unit = 10.0 ** math.floor(math.log10(high / 8))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= high / 8 * 0.999)
    return [i * step for i in range(int(high / step + 1e-9) + 1)]


def log_ticks(low, high):
    """1, 2 and 5 times the powers of ten from 10^low to 10^high."""
    numbers = [m * 10.0**k for k in range(math.floor(low), math.ceil(high)) for m in (1, 2, 5)]
    return [y for y in numbers if low <= math.log10(y) <= high]


def plot(title, x_title, series, size=(900, 520), logarithmic=False):
    """series: (name, xs, ys, colour, "line" or "dots") -> PIL image with axes, ticks and a legend.

    Both axes start at 0, but for a logarithmic y axis, which takes positive ys only.
    """
    zoom = 2  # drawn twice as large and shrunk: smooth lines
    W, H = size[0] * zoom, size[1] * zoom
    text = font(15 * zoom)
    legend = [(name, colour) for name, _, _, colour, _ in series if name]
    x0, x1 = 76 * zoom, W - 60 * zoom - int(max(text.getlength(name) for name, _ in legend))
    y0, y1 = 44 * zoom, H - 60 * zoom
    right = max(max(xs) for _, xs, *_ in series)
    scale = np.log10 if logarithmic else np.asarray
    low = scale(min(min(s[2]) for s in series)) if logarithmic else 0
    high = scale(max(max(s[2]) for s in series))
    high = low + max((high - low) * 1.05, 0.1)  # one point alone has no extent
    to_x = lambda x: x0 + x / right * (x1 - x0)
    to_y = lambda y: y1 - (scale(y) - low) / (high - low) * (y1 - y0)
    canvas = Image.new("RGB", (W, H), "white")
    draw = ImageDraw.Draw(canvas)
    for x in ticks(right):
        draw.line((to_x(x), y0, to_x(x), y1), PALE, zoom)
        draw.text((to_x(x), y1 + 6 * zoom), f"{x:g}", "black", text, anchor="mt")
    for y in log_ticks(low, high) if logarithmic else ticks(high):
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
                draw.circle((x, y), 4 * zoom, "white", colour, 2 * zoom)
    for i, (name, colour) in enumerate(legend):
        y = y0 + (12 + 24 * i) * zoom
        draw.line((x1 + 14 * zoom, y, x1 + 36 * zoom, y), colour, 3 * zoom)
        draw.text((x1 + 42 * zoom, y), name, "black", text, anchor="lm")
    return canvas.resize(size, Image.Resampling.LANCZOS)


def save(args, folder, picture):
    """Write a picture to --out or into the run's folder, and say so."""
    path, buffer = Path(args.out or f"{folder}/{args.verb}.png"), io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    train.write_atomically(path, buffer.getbuffer())
    kilobytes = buffer.tell() / 1024
    print(f"wrote {path}, {picture.width} x {picture.height} pixels, {kilobytes:.0f} KB")


# ---- A trained run ------------------------------------------------------------------------------


def batched(function, *tensors):
    """function applied to 64 rows of the tensors at a time, results joined."""
    return torch.cat([function(*parts) for parts in zip(*(t.split(64) for t in tensors))])


def repeat(x, count):
    """(1, ...) -> (count, ...)."""
    return x.expand(count, *x.shape[1:]).clone()


class Trained:
    """A run opened for use: its averaged model, its dataset and the samplers asked for."""

    def __init__(self, args):
        self.folder, self.device = Path(args.run), train.Machine(args.device).device
        self.model, c = train.load_run(self.folder, self.device)
        self.config = c
        self.samplers = choose_samplers(args, c) if hasattr(args, "sampler") else []
        other = getattr(args, "data", None)
        self.dataset = data.open_dataset(other or c.data or None, c.size,
                                         None if other else c.cache or None)
        torch.manual_seed(args.seed)  # only now: a seed shows the same images for every run

    def some(self, count):
        """`count` different random places in the dataset (count,)."""
        if count > len(self.dataset):
            raise ValueError(f"{count} images are needed; expected at most {len(self.dataset)}, "
                             f"all that {self.dataset.name} has: choose a smaller --count")
        return torch.randperm(len(self.dataset))[:count]

    def images(self, count):
        """Random images of the dataset (count, 3, S, S) in [-1, 1]."""
        return train.to_float(self.dataset.images(self.some(count)).to(self.device))

    def noise(self, count):
        """z_T (count, C, h, w), drawn on the CPU: a seed means the same on every device."""
        return torch.randn(count, *self.model.latent_shape).to(self.device)

    def codes(self, images):
        return batched(self.model.represent, images)

    def draw(self, codes, noise, options=None):
        """codes (B, N) or (B, N, d), z_T (B, C, h, w) -> images, by the first sampler asked for."""
        options = self.samplers[0][1] if options is None else options
        tokens = batched(self.model.tokens, codes)
        return batched(lambda s, z: self.model.sample(s, noise=z, **options), tokens, noise)


def choose_samplers(args, config):
    """--sampler, --steps, --eta -> [(name, options of EncDiff.sample)], or a ValueError."""
    if config.decoder == "direct":
        if args.sampler or args.steps or args.eta is not None:
            raise ValueError(f"{args.run} has a direct decoder, which draws in one pass; "
                             "expected no --sampler, --steps or --eta")
        return [("direct decoder", {})]
    T = config.timesteps
    usual = {"dpm": min(20, T), "ddim": min(200, T), "ddpm": T}
    every = args.function is complexity and not args.steps
    names = args.sampler or (["dpm", "ddim", "ddpm"] if every else ["dpm"])
    steps = args.steps or [usual[name] for name in names]
    if len(steps) != len(names):
        raise ValueError(f"--steps has {len(steps)} numbers for {len(names)} --sampler; "
                         "expected one for each")
    for name, n in zip(names, steps):
        if not 1 <= n <= T:
            raise ValueError(f"--steps is {n}; expected 1 to {T}, the timesteps of this run")
        if name == "ddpm" and n != T:
            raise ValueError(f"--steps is {n} with ddpm, which takes all {T}; "
                             "expected --sampler ddim or dpm for fewer")
    if args.eta is not None and ("ddim" not in names or not 0 <= args.eta <= 1):
        raise ValueError(f"--eta is {args.eta} with --sampler {' '.join(names)}; "
                         "expected 0 to 1, with ddim")
    eta = {"ddim": {} if args.eta is None else {"eta": args.eta}}
    return [(f"{name}, {n} steps", dict(sampler=name, steps=n, **eta.get(name, {})))
            for name, n in zip(names, steps)]


def name_tokens(importance, factor_names):
    """DCI's importance matrix (N, F) -> [(token, name)], tokens that carry a factor first.

    A token is named by the factor that uses it most, if it provides at least twice the share that
    it would have if all provided the same; otherwise "none". Factors come in their order, for one
    factor the more important token first.
    """
    tokens, factors = importance.shape
    strength, factor = importance.max(1), importance.argmax(1)
    factor[strength < min(0.5, 2 / tokens)] = factors
    order = sorted(range(tokens), key=lambda i: (factor[i], factor[i] < factors and -strength[i]))
    return [(i, (*factor_names, "none")[factor[i]]) for i in order]


def token_rows(args, run):
    """[(token, (name, remark))] in the order of a picture's rows, only --tokens if given."""
    N, names, path = run.config.num_tokens, run.dataset.factor_names, run.folder / "metrics.json"
    for i in args.tokens or ():
        if not 0 <= i < N:
            raise ValueError(f"--tokens has {i}; expected 0 to {N - 1}, the tokens of {run.folder}")
    rows = [(i, (f"token {i}", "")) for i in range(N)]
    try:
        scores = json.loads(path.read_text()) if names and path.exists() else {}
        if "importance" in scores:  # not after a run on too few images to score
            importance = np.array(scores["importance"], float).reshape(N, len(names))
            rows = [(i, (name, f"token {i}")) for i, name in name_tokens(importance, names)]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}); expected what train.py "
                         "wrote. Delete it to get rows without names") from None
    return [row for row in rows if args.tokens is None or row[0] in args.tokens]


# ---- The verbs: pictures ------------------------------------------------------------------------


def reconstruct(args):
    """inputs, first stage and samples from the tokens, with SSIM, MSE and LPIPS (Table 8)"""
    run = Trained(args)
    lpips = metrics.load_lpips(*args.lpips) if args.lpips else None
    scores = {"SSIM": metrics.ssim, "MSE": metrics.mse}
    if lpips:
        scores["LPIPS"] = lambda x, y: metrics.lpips(x, y, lpips)
    images = run.images(args.count)
    codes, noise = run.codes(images), run.noise(args.count)
    rows = {"input": images}
    print(f"{args.count} images".ljust(18) + "".join(f"{s:>10}" for s in scores) + "  s an image")
    first_stage = lambda: batched(lambda x: run.model.decode(run.model.latents(x)), images)
    methods = {"first stage": first_stage}
    for name, options in run.samplers:
        methods[name] = lambda options=options: run.draw(codes, noise, options)
    for name, method in methods.items():
        began = time.monotonic()
        rows[name] = method()
        seconds = (time.monotonic() - began) / args.count
        x, y = (images + 1) / 2, (rows[name] + 1) / 2  # the scores are defined on [0, 1]
        values = [batched(score, x, y).mean().item() for score in scores.values()]
        table = "".join(f"{value:10.4g}" for value in values)
        print(f"{name:18s}{table}{seconds:12.3f}", flush=True)
    save(args, run.folder, grid([x[:8] for x in rows.values()], [(name, "") for name in rows]))


def swap(args):
    """source, target, and the source with one token at a time from the target (Figures 5, 7, 8)"""
    run = Trained(args)
    tokens, K = token_rows(args, run), args.count
    source, target = run.images(2 * K).split(K)
    codes, other, noise = run.codes(source), run.codes(target), run.noise(K)
    swapped = repeat(codes[None], 1 + len(tokens))  # (rows, K, N) or (rows, K, N, d)
    for row, (i, _) in enumerate(tokens, 1):  # row 0 shows what the source's own tokens draw
        swapped[row, :, i] = other[:, i]
    noise = repeat(noise[None], len(swapped)).flatten(0, 1)  # (rows, K, C, h, w) -> (rows*K, ...)
    drawn = run.draw(swapped.flatten(0, 1), noise).split(K)
    labels = [("source", ""), ("target", ""), ("redrawn", "all of the source")]
    labels += [label for _, label in tokens]
    save(args, run.folder, grid([source, target, *drawn], labels))


def traverse(args):
    """one image with one token after the other swept over the values it has in the data"""
    run = Trained(args)
    tokens, K = token_rows(args, run), args.count
    seen = run.codes(run.images(min(2000, len(run.dataset))))  # (M, N) or (M, N, d)
    image, noise, shares = run.images(1), repeat(run.noise(1), K + 1), torch.linspace(0.01, 0.99, K)
    order = torch.from_numpy(metrics.scalar_codes(seen)).argsort(0)  # (M, N): images by each token
    chosen = order[(shares * (len(seen) - 1)).round().long()].to(run.device)  # (K, N)
    own, rows = run.codes(image), []
    for i, _ in tokens:
        swept = repeat(own, K + 1)
        swept[1:, i] = seen[chosen[:, i], i]
        rows.append(torch.cat([image, run.draw(swept, noise)]))
    headings = ["input", "redrawn", *(f"{share:.0%}" for share in shares)]
    save(args, run.folder, grid(rows, [label for _, label in tokens], headings))


def to_pictures(attention, size):
    """Attention (K, P, N) over P = side*side positions -> maps (K, N, S, S)."""
    side = math.isqrt(attention.shape[1])
    maps = attention.transpose(1, 2).unflatten(2, (side, side))  # (K, P, N) -> (K, N, side, side)
    return F.interpolate(maps, size=(size, size), mode="bilinear")


def attention_columns(layers, per, run):
    """What to show: [(calls, K, P, N)] for each layer -> maps (columns, N, S, S), headings."""
    S, calls = run.config.size, len(layers[0])
    if per == "layer":
        sides = [math.isqrt(layer.shape[2]) for layer in layers]
        maps = torch.cat([to_pictures(layer.mean(0), S) for layer in layers])
        return maps, [f"{side}x{side}" for side in sides]
    if per == "timestep":
        some = torch.linspace(0, calls - 1, min(8, calls)).round().long()
        times = encdiff.timesteps_down(run.config.timesteps, calls)
        maps = torch.stack([to_pictures(layer[some, 0], S) for layer in layers]).mean(0)
        return maps, [f"t = {times[i]}" for i in some]
    return torch.stack([to_pictures(layer.mean(0), S) for layer in layers]).mean(0), ()


def attention(args):
    """where each token is attended to while its image is drawn (Figures 6, 9)"""
    run = Trained(args)
    tokens, K = token_rows(args, run), 1 if args.per else args.count
    codes, noise = run.codes(run.images(K)), run.noise(K)
    with unet.record_attention(run.model.denoiser) as records:
        drawn = run.model.sample(run.model.tokens(codes), noise=noise, **run.samplers[0][1])
    if not records:
        raise ValueError(f"{run.folder} has no cross-attention to show; expected a run that was "
                         "trained with --conditioning cross")
    layers = [torch.stack(calls) for calls in records]  # (calls, K, P, N), averaged over the heads
    maps, headings = attention_columns(layers, args.per, run)
    images = drawn.expand(len(maps), -1, -1, -1)  # with --per the same one in all columns
    rows, labels = [images], [("sample", "")]
    for i, (name, remark) in tokens:
        low, high = maps[:, i].min(), maps[:, i].max()
        rows.append(heat(images, (maps[:, i] - low) / (high - low).clamp(min=1e-6)))
        labels.append((name, f"{remark}  {low:.2f} - {high:.2f}".strip()))
    print("colours run from the lowest to the highest attention of each row, as printed there; "
          f"if all tokens were attended to alike it would be {1 / run.config.num_tokens:.2f}")
    save(args, run.folder, grid(rows, labels, headings))


def generate(args):
    """new combinations: every token is taken from another image"""
    run = Trained(args)
    codes = run.codes(run.images(min(2000, len(run.dataset))))  # (M, N) or (M, N, d)
    token = torch.arange(codes.shape[1], device=run.device)
    mixed = codes[torch.randint(len(codes), (args.count, len(token))).to(run.device), token]
    drawn, K = run.draw(mixed, run.noise(args.count)), min(8, args.count)
    blank = drawn.new_ones(-args.count % K, *drawn.shape[1:])  # white tiles fill the last row
    rows = torch.cat([drawn, blank]).split(K)
    save(args, run.folder, grid(rows, [("", "")] * len(rows)))


# ---- The verbs: curves and tables ---------------------------------------------------------------


def kl_estimate(z0, betas, t):
    """Eq. (5) for one dimension by Monte Carlo, in nats: latents (B, C, h, w), t int -> float."""
    alpha_bar = encdiff.cumulative(betas)
    a, b, v = encdiff.posterior(alpha_bar, t)
    z_t = alpha_bar[t].sqrt() * z0 + (1 - alpha_bar[t]).sqrt() * torch.randn_like(z0)
    return 0.5 * (v - 1 - v.log() + (a * z0 + b * z_t).square().mean()).item()


def kl(args):
    """the bottleneck of eq. (5) under the four schedules (Figure 2b), on a run's latents if any"""
    T, second_moment, series = 1000, 1.0, []
    if args.run:
        run = Trained(args)
        T = run.config.timesteps
        z0 = batched(run.model.latents, run.images(args.count)).cpu().double()
        second_moment = z0.square().mean().item()
        print(f"latents of {args.count} images: mean square {second_moment:.3f}")
    some = torch.linspace(0.01 * T, T, 12).round().long().clamp(min=2).tolist()
    print("t".ljust(12) + "".join(f"{t:8d}" for t in some))
    for colour, name in zip(PALETTE, encdiff.SCHEDULES):
        betas = encdiff.beta_schedule(name, T)
        exact = encdiff.kl_bottleneck(betas, second_moment).tolist()
        series.append((name, range(2, T + 1), exact[1:], colour, "line"))  # infinite at t = 1
        print(f"{name:12s}" + "".join(f"{exact[t - 1]:8.4f}" for t in some))
        if args.run:
            estimates = [kl_estimate(z0, betas, t) for t in some]
            series.append(("", some, estimates, colour, "dots"))
            print("  estimated".ljust(12) + "".join(f"{e:8.4f}" for e in estimates))
    title = "KL( q(z_{t-1} | z_t, z_0) || N(0, I) ) for each latent dimension, in nats"
    title += "; circles: estimated on images" if args.run else ""
    save(args, args.run or ".", plot(title, "timestep t", series))


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
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{path} is no log of this version of train.py ({type(error).__name__}: "
                         f"{error}); expected columns {', '.join(train.Run.COLUMNS)}") from None
    return table


def curves(args):
    """losses and scores over training, several runs in one picture"""
    logs = {folder[-28:]: read_log(folder) for folder in args.run}  # names end where runs differ
    pictures, size = [], (760, 360)
    for stage in ("first stage", "joint training"):
        for column in ("loss", "mse", "codes_used", *train.Run.COLUMNS[9:]):
            series = [(name, *log[stage, column], colour, "line") for (name, log), colour in
                      zip(logs.items(), PALETTE * len(logs)) if (stage, column) in log]
            if series:
                title = f"{stage}: {column.replace('_', ' ')}"
                pictures.append(plot(title, "step", series, size, column in ("loss", "mse")))
    if not pictures:
        raise ValueError(f"{args.run[0]}/log.csv has no losses; expected a run that logged some")
    rows = math.ceil(len(pictures) / 2)
    canvas = Image.new("RGB", (size[0] * min(2, len(pictures)), size[1] * rows), "white")
    for i, picture in enumerate(pictures):
        canvas.paste(picture, (size[0] * (i % 2), size[1] * (i // 2)))
    save(args, args.run[0], canvas)


@torch.no_grad()
def complexity(args):
    """parameters, FLOPs and seconds of a sample with each sampler (Table 5), on this device"""
    run = Trained(args)
    model, image, noise = run.model, run.images(1), run.noise(1)
    codes = model.represent(image)
    tokens, t = model.tokens(codes), torch.ones(1, dtype=torch.long, device=run.device)
    denoise = (tokens,) if run.config.decoder == "direct" else (noise, t, tokens)
    flops = {}
    print("                parameters   MFLOPs a pass (a multiply-add is two)")
    for name, module, function, inputs in (
            ("encoder", model.encoder, model.encoder, (image,)),
            ("token maps", model.token_map, model.tokens, (codes,)),
            ("denoiser", model.denoiser, model.denoiser, denoise),
            ("decoder", model.first_stage.decoder, model.first_stage.decode, (noise,))):
        with FlopCounterMode(display=False) as counter:
            function(*inputs)
        flops[name] = counter.get_total_flops()
        count = sum(p.numel() for p in module.parameters())
        print(f"{name:12s}{count:14,d}{flops[name] / 1e6:16,.1f}")
    print(f"\nsampler             passes   GFLOPs a sample   seconds a sample, on {run.device}")
    run.draw(codes, noise, run.samplers[0][1])  # the first call is slower than those that follow
    for name, options in run.samplers:
        began, passes = time.monotonic(), options.get("steps", 1)
        run.draw(codes, noise, options).cpu()  # .cpu() waits for a GPU
        total = flops["token maps"] + passes * flops["denoiser"] + flops["decoder"]
        seconds = time.monotonic() - began
        print(f"{name:18s}{passes:8d}{total / 1e9:18,.1f}{seconds:19.2f}", flush=True)


def encode(args):
    """the codes of the run's dataset, or of other images, into codes.npz for work downstream"""
    run = Trained(args)
    indices = run.some(args.count or len(run.dataset)).sort().values
    print(f"encoding {len(indices)} images of {run.dataset}", flush=True)
    codes = train.encode(run.model, run.dataset, indices, run.device)
    arrays = {"codes": codes.numpy(), "indices": indices.numpy()}
    if run.dataset.factor_names:
        arrays["factors"] = run.dataset.factors(indices).numpy()
    path, buffer = Path(args.out or run.folder / "codes.npz"), io.BytesIO()
    np.savez(buffer, **arrays)
    train.write_atomically(path, buffer.getbuffer())
    print(f"wrote {path}: " + ", ".join(f"{name} {a.shape}" for name, a in arrays.items()))


# ---- The command line ---------------------------------------------------------------------------

SAMPLING = "sampler steps eta"
VERBS = {  # how many runs, usual --count, further options
    reconstruct: (None, 256, f"{SAMPLING} lpips"), swap: (None, 8, f"{SAMPLING} tokens"),
    traverse: (None, 9, f"{SAMPLING} tokens"), attention: (None, 8, f"{SAMPLING} tokens per"),
    generate: (None, 32, SAMPLING), encode: (None, None, "count data"), kl: ("?", 256, ""),
    curves: ("+", None, ""), complexity: (None, None, SAMPLING)}
SEVERAL = (reconstruct, complexity)  # take several samplers, one line of their table each
OPTIONS = {
    "sampler": dict(choices=tuple(encdiff.SAMPLERS), help="default: dpm; complexity: all"),
    "steps": dict(type=int, metavar="N", help="default: dpm 20, ddim 200, ddpm all"),
    "eta": dict(type=float, help="noise of ddim, 0 (default) to 1"),
    "tokens": dict(type=int, nargs="+", metavar="I", help="only the rows of these tokens"),
    "per": dict(choices=("layer", "timestep"), help="one image, and a column for each"),
    "lpips": dict(nargs=2, metavar="FILE",
                  help="weights: torchvision's AlexNet, then alex.pth of the lpips package"),
    "count": dict(type=int, metavar="N", help="this many random images; default: all"),
    "data": dict(metavar="PATH", help="another dataset, a folder of images or an .npz"),
}


def parse(arguments):
    """The command line as a namespace with the verb as `function`; None if there is no verb."""
    parser = train.Parser("sample.py", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for function, (runs, count, options) in VERBS.items():
        purpose = function.__doc__
        verb = verbs.add_parser(function.__name__, help=purpose, description=purpose)
        verb.add_argument("run", nargs=runs, metavar="RUN", help="folder of a run of train.py")
        if count:
            verb.add_argument("--count", type=int, default=count, metavar="N",
                              help=f"number of images (default {count})")
        for name in options.split():
            several = {"nargs": "+" if function in SEVERAL else 1}
            verb.add_argument("--" + name, **OPTIONS[name],
                              **(several if name in ("sampler", "steps") else {}))
        verb.add_argument("--seed", type=int, default=0, help="of all that is random (default 0)")
        verb.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: the best here")
        verb.add_argument("--out", metavar="FILE", help="default: in the run's folder")
        verb.set_defaults(function=function)
    args = parser.parse_args(arguments)
    if args.verb is None:
        parser.print_help()
        return None
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise ValueError(f"--out is {args.out}; expected a file in a folder that exists")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed is {args.seed}; expected 0 to 2^63 - 1")
    if getattr(args, "count", None) is not None and args.count < 1:
        raise ValueError(f"--count is {args.count}; expected at least 1")
    return args


def main(arguments=None):
    """Run one verb. Raises ValueError or OSError, one line, for what a user gets wrong."""
    args = parse(arguments)
    if args:
        args.function(args)


if __name__ == "__main__":
    with train.one_line_errors():
        main()

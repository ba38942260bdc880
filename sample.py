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
            worth      which factors pay at which t: all of them under little noise, few under much
DIFFERS   The paper draws with 200 steps of DDIM, we with 20 of DPM-Solver++. Compare them:
          python sample.py reconstruct RUN --sampler dpm ddim
          A sweep visits quantiles of the values seen, not equal distances: so it also works for
          vector-valued tokens, in the order of their first principal component.
TRY       python sample.py      ->   the verbs
          python sample.py kl   ->   kl.png, the bottleneck of the four schedules
"""
import csv
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

PALETTE = ((0, 114, 178), (213, 94, 0), (0, 158, 115),  # Okabe-Ito: also for the colour-blind
           (204, 121, 167), (230, 159, 0), (86, 180, 233))
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # dark to bright
ROUND = [digit * 10.0**power for power in range(-9, 10) for digit in (1, 2, 5)]  # for axes
font = ImageFont.load_default  # Pillow's own, so that no font file is needed


def grid(rows, labels, headings=()):
    """Rows of image tensors (K, 3, S, S), at the left of each its label of one or two lines."""
    K, _, S, _ = rows[0].shape
    # Whole multiples keep pixels sharp; many rows are shown smaller so that they fit a screen.
    side = S * max(1, min(128, 1600 // len(rows)) // S)
    big, small, gap = font(17), font(13), 3
    labels = [label.partition("\n")[::2] for label in labels]
    widths = [max(big.getlength(name), small.getlength(remark)) for name, remark in labels]
    left, top, pitch = 20 + int(max(widths)), 28 if headings else gap, side + gap
    canvas = Image.new("RGB", (left + K * pitch, top + len(rows) * pitch), "white")
    draw = ImageDraw.Draw(canvas)
    for k, heading in enumerate(headings):
        draw.text((left + k * pitch + side // 2, top // 2), heading, "black", small, anchor="mm")
    for r, (row, (name, remark)) in enumerate(zip(rows, labels)):
        y = top + r * pitch
        draw.text((10, y + side // 2 - 9 * bool(remark)), name, "black", big, anchor="lm")
        draw.text((10, y + side // 2 + 11), remark, "dimgray", small, anchor="lm")
        for k, image in enumerate(train.to_bytes(row).permute(0, 2, 3, 1).numpy()):  # (K, S, S, 3)
            tile = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(tile, (left + k * pitch, y))
    return canvas


def plot(title, x_title, series, size=(900, 520), logarithmic=False):
    """series: (name, colour, points (M, 2)) -> PIL image with axes, ticks and a legend.

    A series without a name is drawn as circles. All but a logarithmic y axis include 0.
    """
    W, H = 2 * size[0], 2 * size[1]  # shrunk at the end: smooth lines
    text = font(30)
    left, right = 152, W - 120 - int(max(text.getlength(name) for name, *_ in series))
    top, bottom = 88, H - 120
    xs, ys = np.concatenate([points for *_, points in series]).T
    logarithmic = logarithmic and ys.min() > 0  # a loss with --gan may be negative
    scale = np.log10 if logarithmic else np.asarray
    low = scale(ys.min()) if logarithmic else min(0, ys.min())
    high = low + max((scale(ys.max()) - low) * 1.05, 0.1)  # one point alone has no extent
    to_x = lambda x: left + x / xs.max() * (right - left)
    to_y = lambda y: bottom - (scale(y) - low) / (high - low) * (bottom - top)
    ticks = lambda end: np.arange(0, end * 1.001, next(x for x in ROUND if x >= end / 8))
    canvas = Image.new("RGB", (W, H), "white")
    draw = ImageDraw.Draw(canvas)
    for x in ticks(xs.max()):
        draw.line((to_x(x), top, to_x(x), bottom), "gainsboro", 2)
        draw.text((to_x(x), bottom + 12), f"{x:g}", "black", text, anchor="mt")
    for y in [y for y in ROUND if low <= scale(y) <= high] if logarithmic else ticks(high):
        draw.line((left, to_y(y), right, to_y(y)), "gainsboro", 2)
        draw.text((left - 16, to_y(y)), f"{y:.4g}", "black", text, anchor="rm")
    draw.line((left, top, left, bottom, right, bottom), "black", 2)
    draw.text(((left + right) / 2, H - 28), x_title, "black", text, anchor="mm")
    draw.text((left, 40), title, "black", font(34), anchor="lm")
    y_legend = top - 24
    for name, colour, points in series:
        points = [(to_x(x), to_y(y)) for x, y in points]
        if name:
            y_legend += 48
            draw.line(points, colour, 4, joint="curve")
            draw.line((right + 28, y_legend, right + 72, y_legend), colour, 6)
            draw.text((right + 84, y_legend), name, "black", text, anchor="lm")
        for point in points if not name or len(points) == 1 else ():
            draw.circle(point, 8, "white", colour, 4)
    return canvas.resize(size, Image.Resampling.LANCZOS)


def save(args, folder, picture):
    """Write a picture to --out or into the run's folder, and say so."""
    path = Path(args.out or f"{folder}/{args.verb}.png")
    train.write_atomically(path, lambda file: picture.save(file, "PNG", optimize=True))
    print(f"wrote {path}, {picture.width} x {picture.height} pixels")


# ---- A trained run ------------------------------------------------------------------------------


def batched(function, *tensors):
    """function applied to 64 rows of the tensors at a time, results joined."""
    return torch.cat([function(*parts) for parts in zip(*(t.split(64) for t in tensors))])


class Trained:
    """A run opened for use: its averaged model, its dataset and the samplers asked for."""

    def __init__(self, args):
        self.folder, self.device = Path(args.run), train.Machine(args.device).device
        self.model, c, _ = train.load_run(self.folder, self.device)
        self.config, self.samplers = c, choose_samplers(args, c)
        self.dataset = data.open_dataset(args.data or c.data or None, c.size, c.cache or None)
        torch.manual_seed(args.seed)  # only now: a seed shows the same images for every run

    def some(self, count):
        """`count` different random places in the dataset (count,)."""
        most = len(self.dataset)
        train.need(count <= most, "count", f"so large that {count} images are needed",
                   f"at most {most}, all that {self.dataset.name} has")
        return torch.randperm(most)[:count]

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
    T, eta = config.timesteps, args.eta
    if config.decoder == "direct":
        train.need(not (args.sampler or args.steps or eta is not None), "decoder", "direct here",
                   "no --sampler, --steps or --eta, as it draws in one pass")
        return [("direct decoder", {})]
    usual = {"dpm": min(20, T), "ddim": min(200, T), "ddpm": T}
    every = args.verb == "complexity" and not args.steps
    names = args.sampler or (list(usual) if every else ["dpm"])
    steps = args.steps or [usual[name] for name in names]
    train.need(len(steps) == len(names), "steps", steps, "one number for each --sampler")
    train.need(eta is None or "ddim" in names and 0 <= eta <= 1, "eta", eta, "0 to 1, with ddim")
    chosen = []
    for name, n in zip(names, steps):
        train.need(1 <= n <= T, "steps", n, f"1 to {T}, the timesteps of this run")
        train.need(n == T or name != "ddpm", "steps", n, f"{T} with ddpm, ddim or dpm for fewer")
        more = {"eta": eta or 0.0} if name == "ddim" else {}
        chosen.append((f"{name}, {n} steps", {"sampler": name, "steps": n, **more}))
    return chosen


def token_rows(run, args):
    """What the rows of a picture show: [token], [label], all or those of --tokens.

    A token is named by the factor that uses it most (DCI's importance), if it provides at least
    twice the share that it would have if all provided the same; otherwise "none". Factors come in
    their order, for one factor the more important token first.
    """
    N, path = run.config.num_tokens, run.folder / "metrics.json"
    for i in args.tokens or ():
        train.need(0 <= i < N, "tokens", i, f"0 to {N - 1}, the tokens of {run.folder}")
    labels = {i: f"token {i}" for i in range(N)}
    try:
        scores = json.loads(path.read_text()) if path.exists() else {}
        if "importance" in scores:  # not without labels, nor with too few images to score
            importance, names = np.array(scores["importance"]), (*run.dataset.factor_names, "none")
            strength, factor = importance.max(1), importance.argmax(1)  # (N, F) -> (N,)
            none = strength < min(0.5, 2 / N)
            strength[none], factor[none] = 0, len(names) - 1
            order = np.lexsort((-strength, factor)).tolist()  # by factor, then by strength
            labels = {i: f"{names[factor[i]]}\ntoken {i}" for i in order}
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}); expected what train.py "
                         "wrote. Delete it to get rows without names") from None
    tokens = [i for i in labels if args.tokens is None or i in args.tokens]
    return tokens, [labels[i] for i in tokens]


# ---- The verbs: what each does is its --help ----------------------------------------------------


def reconstruct(run, args):
    """inputs, first stage and samples from the tokens, with SSIM, MSE and LPIPS (Table 8)"""
    scores = {"SSIM": metrics.ssim, "MSE": metrics.mse}
    if args.lpips:
        weights = metrics.load_lpips(*args.lpips)
        scores["LPIPS"] = lambda x, y: metrics.lpips(x, y, weights)
    images = run.images(args.count)
    codes, noise, rows = run.codes(images), run.noise(args.count), {"input": images}
    print(f"{args.count} images".ljust(18) + "".join(f"{s:>10}" for s in scores) + "  s an image")
    for name, options in [("first stage", None), *run.samplers]:
        began = time.monotonic()
        if options is None:
            rows[name] = batched(lambda x: run.model.decode(run.model.latents(x)), images)
        else:
            rows[name] = run.draw(codes, noise, options)
        seconds = (time.monotonic() - began) / args.count
        x, y = (images + 1) / 2, (rows[name] + 1) / 2  # the scores are defined on [0, 1]
        table = "".join(f"{batched(s, x, y).mean().item():10.4g}" for s in scores.values())
        print(f"{name:18s}{table}{seconds:12.3f}", flush=True)
    save(args, run.folder, grid([x[:8] for x in rows.values()], rows))


def swap(run, args):
    """source, target, and the source with one token at a time from the target (Figures 5, 7, 8)"""
    (tokens, labels), K = token_rows(run, args), args.count
    source, target = run.images(2 * K).split(K)
    codes, other, noise = run.codes(source), run.codes(target), run.noise(K)
    swapped = torch.stack([codes] * (1 + len(tokens)))  # (rows, K, N) or (rows, K, N, d)
    for row, i in enumerate(tokens, 1):  # row 0 shows what the source's own tokens draw
        swapped[row, :, i] = other[:, i]
    drawn = run.draw(swapped.flatten(0, 1), noise.repeat(len(swapped), 1, 1, 1)).split(K)
    labels = ["source", "target", "redrawn\nall of the source", *labels]
    save(args, run.folder, grid([source, target, *drawn], labels))


def traverse(run, args):
    """one image with one token after the other swept over the values it has in the data"""
    (tokens, labels), K = token_rows(run, args), args.count
    seen = run.codes(run.images(min(2000, len(run.dataset))))  # (M, N) or (M, N, d)
    order = torch.from_numpy(metrics.scalar_codes(seen)).argsort(0)  # (M, N): images by each token
    shares = torch.linspace(0.01, 0.99, K)
    chosen = order[(shares * (len(seen) - 1)).round().long()].to(run.device)  # (K, N)
    image, noise = run.images(1), run.noise(1).repeat(K + 1, 1, 1, 1)
    own, rows = run.codes(image), []
    for i in tokens:
        swept = torch.cat([own] * (K + 1))  # (1, N) -> (K + 1, N)
        swept[1:, i] = seen[chosen[:, i], i]
        rows.append(torch.cat([image, run.draw(swept, noise)]))
    headings = ["input", "redrawn", *(f"{share:.0%}" for share in shares)]
    save(args, run.folder, grid(rows, labels, headings))


def attention_maps(records, per, config):
    """For each layer the attention (K, P, N) of all calls -> maps (columns, N, S, S), headings."""
    calls, maps, sides = len(records[0]), [], []
    shown = torch.linspace(0, calls - 1, min(8, calls)).round().long()  # with --per timestep
    for layer in records:
        layer = torch.stack(layer)  # (calls, K, P, N)
        layer = layer[shown, 0] if per == "timestep" else layer.mean(0)
        side = math.isqrt(layer.shape[1])
        layer = layer.transpose(1, 2).unflatten(2, (side, side))  # (., P, N) -> (., N, side, side)
        maps.append(F.interpolate(layer, size=(config.size, config.size), mode="bilinear"))
        sides.append(f"{side}x{side}")
    if per == "layer":
        return torch.cat(maps), sides
    times = encdiff.timesteps_down(config.timesteps, calls)
    headings = [f"t = {times[call]}" for call in shown] if per == "timestep" else ()
    return torch.stack(maps).mean(0), headings  # layers (columns, N, S, S) -> (columns, N, S, S)


def heat(images, maps):
    """Maps (K, S, S) in [0, 1] as colours over images (K, 3, S, S) in grey -> (K, 3, S, S)."""
    places = np.linspace(0, 1, len(HEAT))
    colours = [np.interp(maps.cpu().numpy(), places, channel) for channel in zip(*HEAT)]
    colours = train.to_float(torch.from_numpy(np.stack(colours, 1)))  # 3 (K, S, S) -> (K, 3, S, S)
    return 0.7 * colours + 0.3 * images.cpu().mean(1, keepdim=True)


def attention(run, args):
    """where each token is attended to while its image is drawn (Figures 6, 9)"""
    (tokens, labels), K = token_rows(run, args), 1 if args.per else args.count
    codes, noise = run.codes(run.images(K)), run.noise(K)
    with unet.record_attention(run.model.denoiser) as records:
        drawn = run.model.sample(run.model.tokens(codes), noise=noise, **run.samplers[0][1])
    train.need(records, "conditioning", f"{run.config.conditioning} in {run.folder}",
               "cross: there is no cross-attention to show")
    maps, headings = attention_maps(records, args.per, run.config)
    images = drawn.expand(len(maps), -1, -1, -1)  # with --per the same one in all columns
    rows = [images]
    for row, i in enumerate(tokens):
        low, high = maps[:, i].min(), maps[:, i].max()
        rows.append(heat(images, (maps[:, i] - low) / (high - low).clamp(min=1e-6)))
        labels[row] += ("  " if "\n" in labels[row] else "\n") + f"{low:.2f} - {high:.2f}"
    print("colours run from the lowest to the highest attention of each row, as printed there; "
          f"if all tokens were attended to alike it would be {1 / run.config.num_tokens:.2f}")
    save(args, run.folder, grid(rows, ["sample", *labels], headings))


def generate(run, args):
    """new combinations: every token is taken from another image"""
    codes = run.codes(run.images(min(2000, len(run.dataset))))  # (M, N) or (M, N, d)
    token = torch.arange(codes.shape[1], device=run.device)
    mixed = codes[torch.randint(len(codes), (args.count, len(token))).to(run.device), token]
    rows = run.draw(mixed, run.noise(args.count)).split(8)
    save(args, run.folder, grid(rows, [""] * len(rows)))


def kl(run, args):
    """the bottleneck of eq. (5) under the four schedules (Figure 2b), on a run's latents if any"""
    T, second_moment, series = 1000, 1.0, []
    title = "KL( q(z_{t-1} | z_t, z_0) || N(0, I) ) for each latent dimension, in nats"
    if run:
        T = run.config.timesteps
        z0 = batched(run.model.latents, run.images(args.count)).cpu().double()
        second_moment = z0.square().mean().item()
        print(f"latents of {args.count} images: mean square {second_moment:.3f}")
        title += "; circles: estimated on images"
    some = torch.linspace(0.01 * T, T, 12).round().long().clamp(min=2).tolist()
    print("t".ljust(12) + "".join(f"{t:8d}" for t in some))
    for colour, name in zip(PALETTE, encdiff.SCHEDULES):
        betas = encdiff.beta_schedule(name, T)
        exact = encdiff.kl_bottleneck(betas, second_moment).tolist()
        series.append((name, colour, list(enumerate(exact, 1))[1:]))  # infinite at t = 1
        print(f"{name:12s}" + "".join(f"{exact[t - 1]:8.4f}" for t in some))
        if run:
            estimates, alpha_bar = [], encdiff.cumulative(betas)
            for t in some:  # the expectation in eq. (5) over z_0 and z_t, by Monte Carlo
                a, b, v = encdiff.posterior(alpha_bar, t)
                z_t = alpha_bar[t].sqrt() * z0 + (1 - alpha_bar[t]).sqrt() * torch.randn_like(z0)
                mean_square = (a * z0 + b * z_t).square().mean()
                estimates.append(0.5 * (v - 1 - v.log() + mean_square).item())
            series.append(("", colour, list(zip(some, estimates))))
            print("  estimated".ljust(12) + "".join(f"{e:8.4f}" for e in estimates))
    save(args, args.run or ".", plot(title, "timestep t", series))


def worth(run, args):
    """by how much the loss of eq. (3) rises at each t if one factor is wrong in the codes"""
    sizes, T, model = run.dataset.factor_sizes, run.config.timesteps, run.model
    train.need(sizes and math.prod(sizes) == len(run.dataset), "data", run.dataset.name,
               "a dataset of all combinations of its factors: the rendered one, say")
    train.need(run.config.decoder == "diffusion", "decoder", "direct here", "diffusion")
    factors = run.dataset.factors(run.some(args.count)).numpy()  # (B, F)

    def load(factors):
        indices = np.ravel_multi_index(factors.T, sizes)  # (B, F) -> (B,); the last turns fastest
        return train.to_float(run.dataset.images(indices).to(run.device))

    images, wrong = load(factors), []
    for j, size in enumerate(sizes):  # the same images but for factor j
        others, shift = factors.copy(), torch.randint(1, size, (args.count,)).numpy()
        others[:, j] = (others[:, j] + shift) % size
        wrong.append(model.tokens(run.codes(load(others))))
    z0, own, noise = model.latents(images), model.tokens(run.codes(images)), run.noise(args.count)
    some = torch.linspace(0.01 * T, T, 12).round().long().clamp(min=1).tolist()
    loss_of = lambda z_t, t, tokens: F.mse_loss(batched(model.denoiser, z_t, t, tokens), noise)
    rises = []
    for time_step in some:
        t = torch.full((args.count,), time_step, device=run.device)
        z_t = model.add_noise(z0, t, noise)
        loss = loss_of(z_t, t, own)
        rises.append([(loss_of(z_t, t, tokens) - loss).item() for tokens in wrong])
    print("t".ljust(14) + "".join(f" {t:8d}" for t in some))
    series = []
    for name, colour, rise in zip(run.dataset.factor_names, PALETTE * len(sizes), zip(*rises)):
        print(f"{name:14s}" + "".join(f" {value:8.4f}" for value in rise))
        series.append((name, colour, list(zip(some, rise))))
    save(args, run.folder, plot("rise of the loss if this factor is wrong", "timestep t", series))


def read_log(folder):
    """log.csv of a run as a list of dicts of strings, "" where nothing was logged."""
    path = Path(folder) / "log.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found; expected a folder written by train.py --out")
    with open(path, newline="") as file:
        log = csv.DictReader(file)
        if tuple(log.fieldnames or ()) != train.Run.COLUMNS:
            raise ValueError(f"{path} is no log of this version of train.py; expected columns "
                             + ", ".join(train.Run.COLUMNS))
        return list(log)


def curves(_, args):
    """losses and scores over training, several runs in one picture"""
    figures, (width, height) = {}, (760, 360)
    for folder, colour in zip(args.run, PALETTE * len(args.run)):
        log = read_log(folder)
        for stage in ("first stage", "joint training"):
            for column in ("loss", "mse", "codes_used", *train.Run.SCORES):
                points = [(int(row["step"]), float(row[column])) for row in log
                          if row["stage"] == stage and row[column]]
                if points:
                    series = figures.setdefault(f"{stage}: {column.replace('_', ' ')}", [])
                    series.append((folder[-28:], colour, points))  # names end where runs differ
    if not figures:
        raise ValueError(f"{args.run[0]}/log.csv has no losses; expected a run that logged some")
    size = width * min(2, len(figures)), height * math.ceil(len(figures) / 2)
    canvas = Image.new("RGB", size, "white")
    for i, (title, series) in enumerate(figures.items()):
        picture = plot(title, "step", series, (width, height), title.endswith(("loss", "mse")))
        canvas.paste(picture, (i % 2 * width, i // 2 * height))
    save(args, args.run[0], canvas)


def complexity(run, args):
    """parameters, FLOPs and seconds of a sample with each sampler (Table 5), on this device"""
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
            ("decoder", model.first_stage.decoder, model.decode, (noise,))):
        with FlopCounterMode(display=False) as counter:
            function(*inputs)
        flops[name] = counter.get_total_flops()
        count = sum(p.numel() for p in module.parameters())
        print(f"{name:12s}{count:14,d}{flops[name] / 1e6:16,.1f}")
    print(f"\nsampler             passes   GFLOPs a sample   seconds a sample, on {run.device}")
    run.draw(codes, noise)  # the first call is slower than those that follow
    for name, options in run.samplers:
        began, passes = time.monotonic(), options.get("steps", 1)
        run.draw(codes, noise, options).cpu()  # .cpu() waits for a GPU
        seconds = time.monotonic() - began
        total = flops["token maps"] + passes * flops["denoiser"] + flops["decoder"]
        print(f"{name:18s}{passes:8d}{total / 1e9:18,.1f}{seconds:19.2f}", flush=True)


def encode(run, args):
    """the codes of the run's dataset, or of other images, into codes.npz for work downstream"""
    indices = run.some(args.count or len(run.dataset)).sort().values
    print(f"encoding {len(indices)} images of {run.dataset}", flush=True)
    codes = train.encode(run.model, run.dataset, indices, run.device)
    arrays = {"codes": codes.numpy(), "indices": indices.numpy()}
    if run.dataset.factor_names:
        arrays["factors"] = run.dataset.factors(indices).numpy()
    path = Path(args.out or run.folder / "codes.npz")
    train.write_atomically(path, lambda file: np.savez(file, **arrays))
    print(f"wrote {path}: " + ", ".join(f"{name} {a.shape}" for name, a in arrays.items()))


# ---- The command line ---------------------------------------------------------------------------

SAMPLING = ["sampler", "steps", "eta"]
VERBS = {  # how many runs (None: one), usual --count (None: all, 0: no such option), more options
    reconstruct: (None, 256, [*SAMPLING, "lpips"]), swap: (None, 8, [*SAMPLING, "tokens"]),
    traverse: (None, 9, [*SAMPLING, "tokens"]), attention: (None, 8, [*SAMPLING, "tokens", "per"]),
    generate: (None, 32, SAMPLING), encode: (None, None, ["data"]), kl: ("?", 256, []),
    worth: (None, 256, []),
    curves: ("+", 0, []), complexity: (None, 0, SAMPLING)}
OPTIONS = {
    "sampler": dict(choices=tuple(encdiff.SAMPLERS), help="default: dpm; complexity: all"),
    "steps": dict(type=int, metavar="N", help="default: dpm 20, ddim 200, ddpm all"),
    "eta": dict(type=float, help="noise of ddim, 0 (default) to 1"),
    "tokens": dict(type=int, nargs="+", metavar="I", help="only the rows of these tokens"),
    "per": dict(choices=("layer", "timestep"), help="one image, and a column for each"),
    "lpips": dict(nargs=2, metavar="FILE",
                  help="weights: torchvision's AlexNet, then alex.pth of the lpips package"),
    "data": dict(metavar="PATH", help="another dataset, a folder of images or an .npz"),
    "seed": dict(type=int, default=0, help="of all that is random (default 0)"),
    "device": dict(choices=("cuda", "mps", "cpu"), help="default: the best here"),
    "out": dict(metavar="FILE", help="default: in the run's folder")}


def parse(arguments):
    """The command line as a namespace with the verb as `function`; None if there is no verb."""
    parser = train.Parser("sample.py", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for function, (runs, count, options) in VERBS.items():
        purpose = function.__doc__
        verb = verbs.add_parser(function.__name__, help=purpose, description=purpose)
        verb.set_defaults(**dict.fromkeys(OPTIONS), count=None, function=function)
        verb.add_argument("run", nargs=runs, metavar="RUN", help="folder of a run of train.py")
        if count != 0:
            verb.add_argument("--count", type=int, default=count, metavar="N",
                              help=f"number of random images (default {count or 'all'})")
        # A table has a line for each of several samplers, a picture is drawn by one.
        number = {"nargs": "+" if function in (reconstruct, complexity) else 1}
        for name in [*options, "seed", "device", "out"]:
            more = number if name in ("sampler", "steps") else {}
            verb.add_argument("--" + name, **OPTIONS[name], **more)
    args = parser.parse_args(arguments)
    if args.verb is None:
        parser.print_help()
        return None
    train.need(not args.out or Path(args.out).absolute().parent.is_dir(), "out", args.out,
               "a file in a folder that exists")
    train.need(0 <= args.seed < 2**63, "seed", args.seed, "0 to 2^63 - 1")
    train.need(args.count is None or args.count >= 1, "count", args.count, "at least 1")
    return args


def main(arguments=None):
    """Run one verb. Raises ValueError or OSError, one line, for what a user gets wrong."""
    args = parse(arguments)
    if args:
        args.function(Trained(args) if isinstance(args.run, str) else None, args)


if __name__ == "__main__":
    with train.one_line_errors():
        main()

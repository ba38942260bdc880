"""Pictures, tables and a page from a trained run: what each token means, and what it costs.

WHERE     Read last, after train.py. Reads a run and its dataset; imports all the other files.
PAPER     arXiv 2402.09712, Figures 2(b) and 5-9, Tables 5 and 8. Eq. (5) is in encdiff.py.
SHAPES    B images, N tokens, K columns of a picture, S image side; images (B, 3, S, S) in [-1, 1].
IDEA      How to read the pictures. All rows share their noise z_T: what differs is the token.
            swap        a row takes ONE token from the target: compared with the row "redrawn", only
                        the factor that names the row should change
            traverse    one token takes the values that it has in the data, lowest to highest
            attention   which places of the image read a token; each row has its own colour scale
            generate    every token from another image: each combination should be a good picture
            importance  DCI's matrix: a code should matter for one factor, a factor need one code
            kl          how much z_{t-1} can say, in nats, so how many factors are worth a token
            worth       by how much a wrong factor hurts at which t. Eq. (5) cannot tell: it knows
                        how much can be said, not what of it a noised latent shows already
            argument    DCI disentanglement against training compute, for several methods
            explore     all of it by hand: a slider a token, in the browser
DIFFERS   The paper draws with 200 steps of DDIM, we with 20 of DPM-Solver++. Compare them:
          python sample.py reconstruct RUN --sampler dpm ddim
          A sweep visits quantiles of the values seen, not equal distances: so it also works for
          vector-valued tokens, in the order of their first principal component.
TRY       python sample.py      ->   the verbs
          python sample.py kl   ->   kl.png, the bottleneck of the four schedules
"""
import argparse
import base64
import contextlib
import csv
import dataclasses
import functools
import http.server
import io
import json
import math
import threading
import time
import urllib.parse
import webbrowser
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.flop_counter import FlopCounterMode

import data
import encdiff
import metrics
import train
import unet

say = train.say  # print, but for a closed pipe and for letters that a terminal does not have
SHIPPED = Path(__file__).parent / "assets" / "small.pt"  # the model that comes with us

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
    side = S * max(1, min(128, 640 // len(rows)) // S)
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


def plot(title, x_title, series, size=(900, 520), logarithmic=False, bands=()):
    """series: (name, colour, points (M, 2)) -> PIL image with axes, ticks and a legend.

    A series without a name is drawn as circles. bands: (colour, points (M, 3) of x, lowest and
    highest y), drawn pale behind the lines. All but a logarithmic y axis include 0.
    """
    W, H = 2 * size[0], 2 * size[1]  # shrunk at the end: smooth lines
    text = font(30)
    left, right = 152, W - 120 - int(max(text.getlength(name) for name, *_ in series))
    top, bottom = 88, H - 120
    xs, ys = np.concatenate([points for *_, points in series]).T
    logarithmic = logarithmic and ys.min() > 0
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
    for colour, points in bands:
        edge = [(to_x(x), to_y(low)) for x, low, _ in points]
        edge += [(to_x(x), to_y(high)) for x, _, high in reversed(points)]
        draw.polygon(edge, tuple(255 - (255 - c) // 4 for c in colour))
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
    """Write a picture to --out or into the folder, and say so."""
    path = Path(args.out or f"{folder}/{args.verb}.png")
    train.write_atomically(path, lambda file: picture.save(file, "PNG", optimize=True))
    say(f"wrote {path}, {picture.width} x {picture.height} pixels")


# ---- A trained run ------------------------------------------------------------------------------


def batched(function, *tensors):
    """function applied to 64 rows of the tensors at a time, results joined."""
    return torch.cat([function(*parts) for parts in zip(*(t.split(64) for t in tensors))])


class Trained:
    """A run opened for use: its averaged model, its scores, its dataset, the samplers asked for."""

    def __init__(self, args):
        path, self.device = Path(args.run or SHIPPED), train.Machine(args.device).device
        if not args.run:
            say(f"no RUN given: using the trained model that comes with the code, {path}")
        self.model, self.config, self.about = train.load_run(path, self.device)
        self.name, self.folder, self.scores = path, self.about["folder"], self.about["scores"]
        self.data, self.samplers = args.data, choose_samplers(args, self.config)
        torch.manual_seed(args.seed)  # a seed shows the same images for every run

    @functools.cached_property
    def dataset(self):
        """The run's dataset, or that of --data; opened by the verbs that need it."""
        path, cache = self.data or self.config.data, self.config.cache
        if path and not self.data and not Path(path).exists():
            raise ValueError(f"{path}, the dataset of {self.name}, is not there; if it has moved, "
                             "say where it is with --data PATH")
        dataset = data.open_dataset(path or None, self.config.size,
                                    cache if Path(cache).is_dir() else None)
        if self.about["data"] not in ({}, dataset.identity):
            say(f"{dataset.name} is not what the run was trained on")
        return dataset

    @property
    def factor_names(self):
        """The factors that the scores are about: those of the data that the run was trained on."""
        return tuple(self.about["data"].get("factor_names", ())) or self.dataset.factor_names

    def some(self, count):
        """`count` different random places in the dataset (count,)."""
        most = len(self.dataset)
        train.need(count <= most, "count", f"so large that {count} images are needed",
                   f"at most {most}, all that {self.dataset.name} has")
        return torch.randperm(most)[:count]

    def load(self, indices):
        """Images of the dataset at these indices (B, 3, S, S) in [-1, 1]."""
        return train.to_float(self.dataset.images(indices).to(self.device))

    def images(self, count):
        """Random images of the dataset (count, 3, S, S) in [-1, 1]."""
        return self.load(self.some(count))

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


def importance_of(run):
    """DCI's importance (N, F) from a run's scores and the names of its F factors; None if none."""
    if "importance" not in run.scores:  # no labels, say
        return None, ()
    importance, names = np.array(run.scores["importance"], float), run.factor_names
    if importance.shape != (run.config.num_tokens, len(names)):
        raise ValueError(f"the importance matrix of {run.name} has shape {importance.shape}; "
                         f"expected {run.config.num_tokens} codes and the factors {names}. "
                         "Delete metrics.json to get tokens without names")
    return importance, names


def named_tokens(run):
    """{token: the factor that uses it most, or "none"}; {} without scores.

    A token is named by a factor (DCI's importance) if it provides at least twice the share that it
    would have if all provided the same. Factors come in their order, for one factor the more
    important token first.
    """
    importance, names = importance_of(run)
    if importance is None:
        return {}
    strength, factor = importance.max(1), importance.argmax(1)  # (N, F) -> (N,)
    none = strength < min(0.5, 2 / len(strength))
    strength[none], factor[none] = 0, len(names)
    order = np.lexsort((-strength, factor)).tolist()  # by factor, then by strength
    return {i: (*names, "none")[factor[i]] for i in order}


def token_rows(run, args):
    """What the rows of a picture show: [token], [label]. The tokens are those of --tokens, or the
    most important one of each factor, or all where they have no names."""
    names, N = named_tokens(run), run.config.num_tokens
    wanted = args.tokens
    if wanted is None and names:
        first = {}
        for i, name in names.items():
            first.setdefault(name, i)
        wanted = [i for name, i in first.items() if name != "none"]
        missing = [name for name in run.factor_names if name not in first]
        say("a row a factor, that of its most important token (--tokens all: a row a token)"
              + f"; no token is named by: {', '.join(missing)}" * bool(missing))
    for i in wanted or ():
        train.need(i == "all" or 0 <= i < N, "tokens", i,
                   f"0 to {N - 1}, the tokens of {run.name}, or all")
    tokens = [i for i in names or range(N) if not wanted or "all" in wanted or i in wanted]
    return tokens, [f"{names[i]}\ntoken {i}" if names else f"token {i}" for i in tokens]


# ---- The verbs: what each does is its --help ----------------------------------------------------


def reconstruct(run, args):
    """inputs, first stage and samples from the tokens, with SSIM, MSE and LPIPS (Table 8)"""
    scores = {"SSIM": metrics.ssim, "MSE": metrics.mse}
    if args.lpips:
        weights = metrics.load_lpips(*args.lpips)
        scores["LPIPS"] = lambda x, y: metrics.lpips(x, y, weights)
    images = run.images(args.count)
    codes, noise, rows = run.codes(images), run.noise(args.count), {"input": images}
    say(f"{args.count} images".ljust(18) + "".join(f"{s:>10}" for s in scores) + "  s an image")
    for name, options in [("first stage", None), *run.samplers]:
        began = time.monotonic()
        if options is None:
            rows[name] = batched(lambda x: run.model.decode(run.model.latents(x)), images)
        else:
            rows[name] = run.draw(codes, noise, options)
        seconds = (time.monotonic() - began) / args.count
        x, y = (images + 1) / 2, (rows[name] + 1) / 2  # the scores are defined on [0, 1]
        table = "".join(f"{batched(s, x, y).mean().item():10.4g}" for s in scores.values())
        say(f"{name:18s}{table}{seconds:12.3f}")
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


def quantiles(run, count):
    """Values that the codes have in the data: (count, N) or (count, N, d), lowest to highest."""
    seen = run.codes(run.images(min(2000, len(run.dataset))))  # (M, N) or (M, N, d)
    order = torch.from_numpy(metrics.scalar_codes(seen)).argsort(0)  # (M, N): images by each token
    rows = (torch.linspace(0.01, 0.99, count) * (len(seen) - 1)).round().long()
    return seen[order[rows].to(run.device), torch.arange(seen.shape[1], device=run.device)]


def traverse(run, args):
    """one image with one token after the other swept over the values it has in the data"""
    (tokens, labels), K = token_rows(run, args), args.count
    values, B = quantiles(run, K), 4 if args.gif else 1
    images, noise, rows = run.images(B), run.noise(B).repeat(K + 1, 1, 1, 1), []
    for i in tokens:
        swept = torch.stack([run.codes(images)] * (K + 1))  # (K + 1, B, N) or (K + 1, B, N, d)
        swept[1:, :, i] = values[:, None, i]
        rows.append(run.draw(swept.flatten(0, 1), noise).split(B))  # the first: its own codes
    if args.gif:
        return animate(args, run.folder, rows, labels)
    headings = ["input", "redrawn", *(f"{share:.0%}" for share in np.linspace(0.01, 0.99, K))]
    save(args, run.folder, grid([torch.cat([images, *row]) for row in rows], labels, headings))


def animate(args, folder, rows, labels):
    """One GIF of less than 2 MB: each token in turn goes up and down again in all images at once.

    rows: for each token a list of image tensors (B, 3, S, S), the first of which is left out.
    """
    frames = [grid([images], [label]) for row, label in zip(rows, labels)
              for images in (*row[1:], *row[-2:1:-1])]
    size = max(frame.width for frame in frames), frames[0].height
    # Labels differ in width: aligned at the right, the images stay where they are.
    frames = [ImageOps.pad(frame, size, color="white", centering=(1, 0)) for frame in frames]
    for colours in (256, 128, 64, 32, 16):
        file = io.BytesIO()
        first, *rest = (frame.quantize(colours, dither=Image.Dither.NONE) for frame in frames)
        first.save(file, "GIF", save_all=True, append_images=rest, duration=120, loop=0)
        if file.tell() < 2_000_000:
            break
    path = Path(args.out or f"{folder}/traverse.gif")
    train.write_atomically(path, lambda target: target.write(file.getvalue()))
    say(f"wrote {path}, {len(frames)} frames, {file.tell() / 1e6:.1f} MB")


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
    """which places read which token while an image is drawn (Figures 6, 9)"""
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
    say("colours run from the lowest to the highest attention of each row, as printed there; "
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
    """the bottleneck of eq. (5) under the four schedules (Figure 2b); without RUN: curves alone"""
    T, second_moment, series = 1000, 1.0, []
    title = "KL( q(z_{t-1} | z_t, z_0) || N(0, I) ) for each latent dimension, in nats"
    if run:
        T = run.config.timesteps
        z0 = batched(run.model.latents, run.images(args.count)).cpu().double()
        second_moment = z0.square().mean().item()
        say(f"latents of {args.count} images: mean square {second_moment:.3f}")
        title += "; circles: estimated on images"
    some = torch.linspace(0.01 * T, T, 12).round().long().clamp(min=2).tolist()
    say("t".ljust(12) + "".join(f"{t:8d}" for t in some))
    for colour, name in zip(PALETTE, encdiff.SCHEDULES):
        betas = encdiff.beta_schedule(name, T)
        exact = encdiff.kl_bottleneck(betas, second_moment).tolist()
        series.append((name, colour, list(enumerate(exact, 1))[1:]))  # infinite at t = 1
        say(f"{name:12s}" + "".join(f"{exact[t - 1]:8.4f}" for t in some))
        if run:
            estimates, alpha_bar = [], encdiff.cumulative(betas)
            for t in some:  # the expectation in eq. (5) over z_0 and z_t, by Monte Carlo
                a, b, v = encdiff.posterior(alpha_bar, t)
                z_t = alpha_bar[t].sqrt() * z0 + (1 - alpha_bar[t]).sqrt() * torch.randn_like(z0)
                mean_square = (a * z0 + b * z_t).square().mean()
                estimates.append(0.5 * (v - 1 - v.log() + mean_square).item())
            series.append(("", colour, list(zip(some, estimates))))
            say("  estimated".ljust(12) + "".join(f"{e:8.4f}" for e in estimates))
    save(args, run.folder if run else ".", plot(title, "timestep t", series))


def worth(run, args):
    """by how much the loss of eq. (3) rises at each t if one factor is wrong in the codes"""
    sizes, T, model = run.dataset.factor_sizes, run.config.timesteps, run.model
    train.need(sizes, "data", run.dataset.name, "a dataset whose images are labelled with factors")
    train.need(run.config.decoder == "diffusion", "decoder", "direct here", "diffusion")
    factors = run.dataset.factors(run.some(args.count)).numpy()  # (B, F)
    wrong = []
    for j, size in enumerate(sizes):  # for each image one that differs from it in factor j alone
        others, shift = factors.copy(), torch.randint(1, max(2, size), (args.count,)).numpy()
        others[:, j] = (others[:, j] + shift) % size
        wrong.append(model.tokens(run.codes(run.load(run.dataset.find(others)))))
    images = run.load(run.dataset.find(factors))
    z0, own, noise = model.latents(images), model.tokens(run.codes(images)), run.noise(args.count)
    some = torch.linspace(0.01 * T, T, 12).round().long().clamp(min=1).tolist()
    loss_of = lambda z_t, t, tokens: F.mse_loss(batched(model.denoiser, z_t, t, tokens), noise)
    rises = []
    for time_step in some:
        t = torch.full((args.count,), time_step, device=run.device)
        z_t = model.add_noise(z0, t, noise)
        loss = loss_of(z_t, t, own)
        rises.append([(loss_of(z_t, t, tokens) - loss).item() for tokens in wrong])
    say("t".ljust(14) + "".join(f" {t:8d}" for t in some))
    series = []
    for name, colour, rise in zip(run.dataset.factor_names, PALETTE * len(sizes), zip(*rises)):
        say(f"{name:14s}" + "".join(f" {value:8.4f}" for value in rise))
        series.append((name, colour, list(zip(some, rise))))
    save(args, run.folder, plot("rise of the loss if this factor is wrong", "timestep t", series))


def importance(run, args):
    """DCI's matrix, factors x codes, with D of each code and C of each factor at the margins"""
    matrix, names = importance_of(run)
    if matrix is None:
        why = run.scores.get("note", "no scores")
        raise ValueError(f"{run.name} has no importance matrix ({why}); expected a finished run on "
                         "a dataset with factors")
    order, cell, left, top = list(named_tokens(run)), 40, 130, 64
    matrix = matrix[order].T  # (N, F) -> (F, N), codes in the order of `swap`
    (rows, columns), small = matrix.shape, font(13)
    canvas = Image.new("RGB", (left + columns * cell + 70, top + rows * cell + 64), "white")
    draw = ImageDraw.Draw(canvas)
    D, C = metrics.focus(matrix.T), metrics.focus(matrix)
    draw.text((10, 22), f"importance of each code for each factor   disentanglement D {D:.3f}   "
              f"completeness C {C:.3f}", "black", font(17), anchor="lm")
    middle = lambda k: k * cell + cell / 2
    for j, name in enumerate((*names, "D of the code")):
        draw.text((left - 10, top + middle(j)), name, "black", font(15), anchor="rm")
    for i, token in enumerate((*order, "C")):
        draw.text((left + middle(i), top - 12), str(token), "black", small, anchor="mm")
    for j, i in np.ndindex(matrix.shape):  # the area of a square is the share of its code
        x, y, half = left + middle(i), top + middle(j), 19 * min(1, matrix[j, i]) ** 0.5
        draw.rectangle((x - 19, y - 19, x + 19, y + 19), (243, 244, 246))
        draw.rectangle((x - half, y - half, x + half, y + half), PALETTE[j % len(PALETTE)])
    for scores, place in ((matrix.T, lambda k: (left + middle(k), top + middle(rows))),
                          (matrix, lambda k: (left + middle(columns), top + middle(k)))):
        for k, row in enumerate(scores):
            draw.text(place(k), f"{metrics.focus(row[None]):.2f}", "dimgray", small, anchor="mm")
    save(args, run.folder, canvas)


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


def curves(args):
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


def training_tflop(config):
    """TFLOP of a whole run of this config: (first stage, joint training)."""
    flops = train.step_flops(config)
    return (flops["first stage"] * config.vq_steps / 1e12,
            flops["joint training"] * config.steps / 1e12)


def method(config):
    """What the method of a run is called: the nearest preset, and what differs from that."""
    aside = ("cache", "seed", "precision", "first_stage", "log_every", "score_every")
    names = []
    for preset, values in train.PRESETS.items():
        usual = dataclasses.asdict(train.Config(**values))
        found = {**dataclasses.asdict(config), "data": Path(config.data).name}
        changed = [f"{name.replace('_', ' ')} {value}" for name, value in found.items()
                   if value != usual[name] and name not in aside]
        names.append((len(changed), ", ".join([preset, *changed])))
    return min(names)[1]


def argument(args):
    """DCI disentanglement against training compute: mean and range of the runs of each method"""
    methods = {}  # {name: {TFLOP: [D of each run]}}
    for folder in args.run:
        _, config, about = train.load_run(folder)
        first, joint = training_tflop(config)
        points = methods.setdefault(method(config), {})
        reached = [(int(row["step"]), row["disentanglement"]) for row in read_log(folder)]
        for step, D in [*reached, (config.steps, about["scores"].get("disentanglement"))]:
            if D:
                points.setdefault(first + joint * step / config.steps, []).append(float(D))
    methods = {name: sorted(points.items()) for name, points in methods.items() if points}
    train.need(methods, "score-every", "0, or no quick score was reached", "runs with scores")
    series, bands = [], []
    say("   TFLOP   runs    D, mean    lowest   highest")
    for colour, (name, points) in zip(PALETTE * len(methods), methods.items()):
        series.append((name, colour, [(x, np.mean(D)) for x, D in points]))
        bands.append((colour, [(x, min(D), max(D)) for x, D in points]))
        x, D = points[-1]
        say(f"{x:8.4g}{len(D):7d}{np.mean(D):11.3f}{min(D):10.3f}{max(D):10.3f}   {name}")
    title = "DCI disentanglement: mean and range over seeds"
    save(args, ".", plot(title, "training compute in TFLOP", series, bands=bands))


def complexity(run, args):
    """parameters, FLOPs and seconds of a sample (Table 5), FLOPs of training, on this device"""
    model, size = run.model, run.config.size
    image, noise = torch.zeros(1, 3, size, size, device=run.device), run.noise(1)
    codes = model.represent(image)
    tokens, t = model.tokens(codes), torch.ones(1, dtype=torch.long, device=run.device)
    denoise = (tokens,) if run.config.decoder == "direct" else (noise, t, tokens)
    flops = {}
    say("                parameters   MFLOPs a pass (a multiply-add is two)")
    for name, module, function, inputs in (
            ("encoder", model.encoder, model.encoder, (image,)),
            ("token maps", model.token_map, model.tokens, (codes,)),
            ("denoiser", model.denoiser, model.denoiser, denoise),
            ("decoder", model.first_stage.decoder, model.decode, (noise,))):
        with FlopCounterMode(display=False) as counter:
            function(*inputs)
        flops[name] = counter.get_total_flops()
        count = sum(p.numel() for p in module.parameters())
        say(f"{name:12s}{count:14,d}{flops[name] / 1e6:16,.1f}")
    first, joint = training_tflop(run.config)
    say(f"\ntraining: first stage {first:,.1f} TFLOP, joint training {joint:,.1f} TFLOP, "
          f"together {first + joint:,.1f}")
    say(f"\nsampler             passes   GFLOPs a sample   seconds a sample, on {run.device}")
    run.draw(codes, noise)  # the first call is slower than those that follow
    for name, options in run.samplers:
        began, passes = time.monotonic(), options.get("steps", 1)
        run.draw(codes, noise, options).cpu()  # .cpu() waits for a GPU
        seconds = time.monotonic() - began
        total = flops["token maps"] + passes * flops["denoiser"] + flops["decoder"]
        say(f"{name:18s}{passes:8d}{total / 1e9:18,.1f}{seconds:19.2f}")


def encode(run, args):
    """the codes of the run's dataset, or of other images, into codes.npz for work downstream"""
    indices = run.some(args.count or len(run.dataset)).sort().values
    say(f"encoding {len(indices)} images of {run.dataset}")
    codes = train.encode(run.model, run.dataset, indices, run.device)
    arrays = {"codes": codes.numpy(), "indices": indices.numpy()}
    if run.dataset.factor_names:
        arrays["factors"] = run.dataset.factors(indices).numpy()
    path = Path(args.out or run.folder / "codes.npz")
    train.write_atomically(path, lambda file: np.savez(file, **arrays))
    say(f"wrote {path}: " + ", ".join(f"{name} {a.shape}" for name, a in arrays.items()))


def export(run, args):
    """the averaged weights, config and scores in one small file, which every verb reads as a run"""
    # Half precision for what was learned. Buffers stay: half of abar_T = 2e-9 would be 0.
    parameters = {name for name, _ in run.model.named_parameters()}
    weights = {name: value.half().cpu() if name in parameters else value.cpu()
               for name, value in run.model.state_dict().items()}
    about = {name: run.about[name] for name in ("commit", "step", "data", "scores")}
    content = {"format": train.FORMAT, "config": dataclasses.asdict(run.config),
               "stage": "joint training", "model": weights, "ema": {}, **about}
    train.write_atomically(args.file, lambda file: torch.save(content, file))
    say(f"wrote {args.file}, {Path(args.file).stat().st_size / 1e6:.1f} MB; "
          f"try it: python sample.py swap {args.file}")


# ---- explore: a page to take the method apart by hand. Skip on first reading. -------------------


class Explorer:
    """What the page asks for. An answer depends on its request alone, so clients cannot mix.

    A slider moves a token along its first principal component in the data: for scalar tokens that
    is the scalar itself, for vector tokens an axis of length 1. Requests hold the place on it.
    """

    def __init__(self, run):
        self.run, self.options, self.lock = run, run.samplers[0][1], threading.Lock()
        seen = run.codes(run.images(min(2000, len(run.dataset)))).cpu()
        seen = seen.reshape(*seen.shape[:2], -1)  # (M, N) -> (M, N, 1); (M, N, d) stays
        centred = (seen - seen.mean(0)).transpose(0, 1)  # (N, M, d)
        axis = torch.linalg.svd(centred, full_matrices=False).Vh[:, 0]  # (N, d)
        self.axis = axis * torch.where(axis.sum(1, keepdim=True) < 0, -1.0, 1.0)
        low, high = self.places(seen).quantile(torch.tensor([0.01, 0.99]), dim=0).tolist()
        names, T = named_tokens(run), run.config.timesteps
        order = names or sorted(range(len(low)), key=lambda i: low[i] - high[i])
        tokens = [{"i": i, "name": names.get(i, f"token {i}"), "low": low[i], "high": high[i],
                   "idle": names.get(i) == "none" or high[i] - low[i] < 0.1} for i in order]
        notes = (("Without scores tokens have no names; they are ordered by spread.", not names),
                 ("A slider moves a vector along its principal component.", seen.shape[2] > 1),
                 ("No cross-attention reads these tokens, so there is none to show.",
                  not unet.cross_attentions(run.model.denoiser)),
                 ("This decoder draws in one pass: no noise, no solver.", not self.options))
        self.most = T if self.options.get("sampler") == "ddpm" else min(T, 200)  # solver steps
        setup = {"run": str(run.name), "images": len(run.dataset), "tokens": tokens,
                 "steps": self.options.get("steps", 0), "most": self.most,
                 "notes": [note for note, holds in notes if holds]}
        # A factor may have any name; "<" could end the script that the names are in.
        self.page = PAGE.replace("SETUP", json.dumps(setup).replace("<", "\\u003c"))

    def places(self, codes):
        """codes (B, N, d) -> their places on the tokens' axes (B, N)."""
        return (codes * self.axis).sum(-1)

    def draw(self, source, target, noise, steps, places, taken):
        """The source with some tokens taken from the target, then each moved to its place."""
        base = torch.stack([source, target])[taken, range(len(taken))]  # (N, d)
        codes = base + (torch.tensor(places) - self.places(base))[:, None] * self.axis
        codes = codes if self.run.config.tokens == "vector" else codes[:, 0]
        generator = torch.Generator().manual_seed(noise)
        z = torch.randn(1, *self.run.model.latent_shape, generator=generator)
        options = self.options and {**self.options, "steps": steps}
        with self.lock, unet.record_attention(self.run.model.denoiser) as records:
            image = self.run.draw(codes[None].to(self.run.device), z.to(self.run.device), options)
        maps = attention_maps(records, None, self.run.config)[0][0] if records else []  # (N, S, S)
        maps = F.adaptive_avg_pool2d(maps, 16).flatten(1).tolist() if records else []  # (N, 256)
        return {"image": data_url(image[0]), "maps": maps}

    def answer(self, path, asked):
        """What the page gets for a path and its query. ValueError for what it would never ask."""
        def whole(name, low, high):
            train.need(low <= int(asked[name]) <= high, name, asked[name], f"{low} to {high}")
            return int(asked[name])

        last, N = len(self.run.dataset) - 1, len(self.axis)
        images = self.run.load([whole("source", 0, last), whole("target", 0, last)])
        codes = self.run.codes(images).cpu().reshape(2, N, -1)
        if path == "/pair":
            return {"images": list(map(data_url, images)), "places": self.places(codes).tolist()}
        places, taken = ([float(word) for word in asked[name].split(",")]
                         for name in ("places", "taken"))
        good = len(places) == len(taken) == N and all(abs(place) < 1e6 for place in places)
        train.need(good and set(taken) <= {0, 1}, "places", asked["places"], f"{N} finite numbers")
        return self.draw(*codes, whole("noise", 0, 2**32), whole("steps", 1, self.most), places,
                         list(map(int, taken)))


def data_url(image):
    """An image (3, S, S) in [-1, 1] as a PNG inside a URL."""
    file = io.BytesIO()
    Image.fromarray(train.to_bytes(image).permute(1, 2, 0).numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


class Handler(http.server.BaseHTTPRequestHandler):
    """GET of the page, of a pair of images, of a drawing. All else is refused."""

    timeout = 10  # seconds that a client has to send its request
    log_message = lambda *_: None

    def do_GET(self):
        (path, _, query), host = self.path.partition("?"), self.headers.get("Host", "")
        # A foreign page may send requests here, or give 127.0.0.1 a name of its own. Any port is
        # right: the page may be seen through a tunnel.
        if (host.partition(":")[0] not in ("127.0.0.1", "localhost")
                or self.headers.get("Origin", f"http://{host}") != f"http://{host}"):
            return self.reply(403, "text/plain", "only the page of this server may ask it")
        if path == "/":
            return self.reply(200, "text/html", self.server.explorer.page)
        if path not in ("/pair", "/draw"):
            return self.reply(404, "text/plain", "there are /, /pair and /draw")
        try:
            asked = dict(urllib.parse.parse_qsl(query, max_num_fields=9))
            answer = json.dumps(self.server.explorer.answer(path, asked))
            self.reply(200, "application/json", answer)
        except (KeyError, ValueError, OverflowError) as error:
            self.reply(400, "text/plain", f"malformed: {error}")

    def reply(self, status, kind, text):
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", "default-src 'none'; img-src data:; connect-src"
                         " 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
                         "frame-ancestors 'none'")
        self.end_headers()
        self.wfile.write(text.encode(errors="replace"))

    def handle(self):
        with contextlib.suppress(OSError):  # the client went away
            super().handle()


def explore(run, args):
    """a page on this machine: a slider a token, the image that they draw, where a token is read"""
    train.need(0 <= args.port < 2**16, "port", args.port, "0 to 65535")
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    except OSError as error:
        raise OSError(f"--port {args.port} cannot be used: {error.strerror}; choose another")
    # One small image is drawn at a time: threads gain nothing, and beside a busy program they wait
    # for one another much longer than they work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with server, contextlib.suppress(KeyboardInterrupt):
        server.explorer, address = Explorer(run), f"http://127.0.0.1:{server.server_port}/"
        say(f"{run.name} is shown at {address} until Ctrl-C")
        if not args.no_browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        server.serve_forever()
    torch.set_num_threads(threads)


PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>encdiff: explore</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>
:root { --back: #fbfbfa; --card: #fff; --ink: #1c2024; --soft: #667079; --line: #dfe3e6;
  --source: #0072b2; --target: #d55e00; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --back: #15181b; --card: #1f2428; --ink: #e8eaec;
  --soft: #9aa4ad; --line: #343b41; --source: #56b4e9; --target: #ff9a4d } }
* { box-sizing: border-box } body { margin: 0; background: var(--back); color: var(--ink) }
body, button { font: 15px/1.45 system-ui, sans-serif } h1 { font-size: 18px; margin: 4px 0 10px }
main { max-width: 1360px; margin: auto; padding: 12px; display: grid; gap: 8px 24px }
small, figcaption, p, summary { color: var(--soft); font-size: 13px } summary { cursor: pointer }
#images { position: sticky; top: 0; z-index: 1; background: var(--back); padding: 6px 0 }
#images { display: grid; grid-template-columns: 2fr 2fr 1fr; gap: 10px }
section { display: contents } .slide { grid-column: 1 / 3; order: 1 }
figure { margin: 0; position: relative } figcaption { padding-top: 4px; min-height: 42px }
img, canvas { width: 100%; aspect-ratio: 1; display: block; border-radius: 8px }
canvas { position: absolute; top: 0; visibility: hidden }
button { font-size: 13px; padding: 4px 10px; border-radius: 6px; border: 1px solid var(--line) }
button { background: var(--card); color: var(--ink); cursor: pointer; margin: 0 6px 6px 0 }
.token { display: grid; grid-template-columns: 1fr auto; gap: 2px 10px; align-items: center;
  padding: 6px 10px; margin-bottom: 6px; border: 1px solid var(--line); border-radius: 8px }
.token { background: var(--card) } .token button { margin: 0 }
.name { border: 0; background: none; text-align: left; padding: 2px; font-size: 15px }
[aria-pressed=true] { font-weight: 600; color: var(--source) } .slide { position: relative }
[type=range] { width: 100%; margin: 0 0 9px; height: 20px; accent-color: var(--source) }
.taken input { accent-color: var(--target) } [type=number] { width: 4.5em; font: inherit }
i { width: 9px; height: 9px; border-radius: 5px; background: var(--source); display: inline-block }
.slide i { position: absolute; bottom: 2px; margin-left: -4.5px }
i.target { background: none; border: 2px solid var(--target) }
@media (min-width: 900px) { main { grid-template-columns: 1.25fr 1fr } section { display: block }
  .token { grid-template-columns: 11.5em 1fr auto } .slide { grid-column: 2; order: 0 } }
</style><main><section><div><h1>encdiff <small id="run"></small></h1></div><div id="images">
<figure><img id="source" alt="source"><figcaption><i></i> source</figcaption></figure>
<figure><img id="drawn" alt="drawn"><canvas id="map" width="16" height="16"></canvas>
<figcaption id="said" aria-live="polite"></figcaption></figure>
<figure><img id="target" alt="target"><figcaption><i class="target"></i> target</figcaption>
</figure></div><div id="tools"><button>new <u>s</u>ource</button><button>new <u>t</u>arget</button>
<button>take <u>a</u>ll from target</button><button><u>r</u>eset</button><button class="noisy">
another <u>n</u>oise</button><label class="noisy"><small>solver steps</small>
<input id="steps" type="number" min="1"></label><p id="hint"></p></div></section>
<div><div id="used"></div><details id="idle"><summary></summary></details></div></main><script>
"use strict"
const setup = SETUP, $ = id => document.getElementById(id), rows = []
const some = () => Math.floor(Math.random() * setup.images)
const state = {source: some(), target: some(), noise: 0, places: [], taken: []}
let ends, maps = [], shown = null, wanted = null, busy = false, pairs = 0
async function ask(path, fields) {
  const answer = await fetch(path + "?" + new URLSearchParams(fields))
  if (!answer.ok) throw Error(await answer.text())
  return answer.json()
}
const failed = error => $("said").textContent = `no answer: ${error.message}`
async function draw(quick) {          // of the states that come while one is drawn the last counts
  wanted = {quick}
  if (busy) return
  busy = true
  try { while (wanted) {
    const began = performance.now(), most = Math.min(setup.most, +$("steps").value || 1)
    const steps = wanted.quick ? Math.min(5, most) : Math.max(1, most)
    wanted = null
    const answer = await ask("draw", {...state, steps}), ms = performance.now() - began
    $("drawn").src = answer.image; maps = answer.maps
    const way = setup.steps ? `, ${steps} steps` : ""
    $("said").textContent = `drawn in ${(ms / 1000).toFixed(2)} s${way}`
    paint()
  } } catch (error) { failed(error) } finally { busy = false }
}
function paint() {                    // dark where the token is read least, clear where most
  const map = maps[shown]
  $("map").style.visibility = map ? "visible" : "hidden"
  if (!map) return
  const low = Math.min(...map), high = Math.max(...map), pixels = new ImageData(16, 16)
  map.forEach((weight, k) => pixels.data[4 * k + 3] = 215 * (high - weight) / (high - low || 1))
  $("map").getContext("2d").putImageData(pixels, 0, 0)
  $("said").textContent = `attention to token ${shown}: ${low.toFixed(2)} to ${high.toFixed(2)}`
}
function place(i, at, from) {         // token i at this place, from the source (0) or target (1)
  const row = rows[i], both = [ends[0][i], ends[1][i]]
  const low = Math.min(row.low, ...both), high = Math.max(row.high, ...both)
  Object.assign(row.slider, {min: low, max: high, value: at})
  row.dots.forEach((dot, k) =>        // a slider's thumb is 16 pixels wide
    dot.style.left = `calc(8px + ${(both[k] - low) / (high - low)} * (100% - 16px))`)
  row.box.classList.toggle("taken", from === 1)
  state.places[i] = at; state.taken[i] = from
}
async function pair(reset) {
  const turn = ++pairs
  try {
    const {images, places} = await ask("pair", {source: state.source, target: state.target})
    if (turn !== pairs) return        // a later one is on its way
    $("source").src = images[0]; $("target").src = images[1]; ends = places
    if (reset) move(0)
    else state.taken.forEach((from, i) => place(i, from ? ends[1][i] : state.places[i], from))
    draw(false)
  } catch (error) { failed(error) }
}
const move = from => { rows.forEach((_, i) => place(i, ends[from][i], from)); draw(false) }
const actions = {s() { state.source = some(); pair(true) }, a() { move(1) }, r() { move(0) },
  t() { state.target = some(); pair(false) }, n() { state.noise++; draw(false) }}
function make(parent, tag, name, fields) {
  return Object.assign(parent.appendChild(document.createElement(tag)), {className: name}, fields)
}
for (const {i, name, idle, low, high} of setup.tokens) {
  const box = make($(idle ? "idle" : "used"), "div", "token"), label = make(box, "button", "name")
  label.append(name)
  if (name !== "token " + i) make(label, "small", "", {textContent: " token " + i})
  const slide = make(box, "div", "slide"), dots = [make(slide, "i"), make(slide, "i", "target")]
  const slider = make(slide, "input", "", {type: "range", step: "any", ariaLabel: `${name} ${i}`})
  rows[i] = {low, high, box, slider, dots, label}
  slider.oninput = () => { place(i, +slider.value, state.taken[i]); draw(true) }
  slider.onchange = () => draw(false)
  make(box, "button", "", {textContent: "from target"}).onclick = () => {
    const from = 1 - state.taken[i]; place(i, ends[from][i], from); draw(false) }
  const pinned = () => rows.findIndex(row => row.label.ariaPressed === "true")
  label.onmouseenter = label.onfocus = () => { shown = i; paint() }
  label.onmouseleave = label.onblur = () => { shown = pinned(); paint() }
  label.onclick = () => { const on = pinned() !== i   // at most one is kept
    rows.forEach(row => row.label.ariaPressed = "false"); label.ariaPressed = String(on)
    shown = on ? i : null; paint() }
}
for (const button of document.querySelectorAll("#tools button"))
  button.onclick = actions[button.querySelector("u").textContent]
onkeydown = event => { if (!event.ctrlKey && !event.metaKey && !event.altKey
  && event.target.type !== "number") actions[event.key]?.() }
$("run").textContent = setup.run; $("steps").onchange = () => draw(false)
Object.assign($("steps"), {value: setup.steps, max: setup.most})
for (const control of document.querySelectorAll(".noisy")) control.hidden = !setup.steps
$("hint").textContent = ["A dot is where the source is, a ring where the target. Point at the name "
  + "of a token to see where it is read; click to keep that.", ...setup.notes].join(" ")
const idle = setup.tokens.filter(token => token.idle).length
$("idle").hidden = !idle
document.querySelector("summary").textContent = `${idle} tokens in little use`
pair(true)
</script></html>"""


# ---- The command line ---------------------------------------------------------------------------


def token(word):
    return word if word == "all" else int(word)


def add_verb(verbs, function, count=None, counted="random images", opens=True, **run):
    """The subcommand of a function, with what all of them take. opens: it opens one run."""
    purpose = function.__doc__
    p = verbs.add_parser(function.__name__, help=purpose, description=purpose)
    p.set_defaults(function=function, opens=opens)
    p.set_defaults(data=None, sampler=None, steps=None, eta=None)  # verbs without these flags
    run = run or {"nargs": "?", "help": "folder written by train.py, or file written by export;"
                  f" default: the trained model that comes with the code, {SHIPPED.name}"}
    p.add_argument("run", metavar="RUN", **run)
    if count is not None:
        p.add_argument("--count", type=int, default=count or None, metavar="N",
                       help=f"number of {counted} (default: {count or 'all'})")
    if opens:
        p.add_argument("--data", metavar="PATH", help="dataset to take images from, if not the "
                       "one that the run was trained on or if that has moved")
    p.add_argument("--seed", type=int, default=0, help="fixes all that is random (default: 0)")
    p.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: the best here")
    p.add_argument("--out", metavar="FILE", help="default: in the run's folder; in the working "
                   "directory if RUN is a file")
    return p


def samplers(p, several=False):
    """How to draw: a picture by one sampler, a table with a line for each of several."""
    p.add_argument("--sampler", choices=tuple(encdiff.SAMPLERS), nargs="+" if several else 1,
                   help="default: dpm" + "; all of them" * (p.prog.endswith("complexity")))
    p.add_argument("--steps", type=int, metavar="N", nargs="+" if several else 1,
                   help="solver steps (default: dpm 20, ddim 200, ddpm all timesteps)")
    p.add_argument("--eta", type=float, help="noise that ddim adds, 0 (default) to 1")
    return p


def tokens(p):
    p.add_argument("--tokens", type=token, nargs="+", metavar="I", help="rows to show: numbers "
                   "of tokens, or all (default: the most important one of each factor)")
    return p


def build_parser():
    """One subcommand a verb; what a verb does is the docstring of its function."""
    parser = train.Parser("sample.py", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    verb = functools.partial(add_verb, verbs)
    samplers(verb(reconstruct, 256), True).add_argument(
        "--lpips", nargs=2, metavar="FILE",
        help="weights: torchvision's AlexNet, then alex.pth of the lpips package")
    tokens(samplers(verb(swap, 8)))
    tokens(samplers(verb(traverse, 9, "values of a token"))).add_argument(
        "--gif", action="store_true", help="one animation instead, with four images")
    tokens(samplers(verb(attention, 8))).add_argument(
        "--per", choices=("layer", "timestep"), help="one image, and a column for each")
    samplers(verb(generate, 32))
    verb(importance)
    verb(kl, 256)
    verb(worth, 256)
    runs = {"nargs": "+", "opens": False, "help": "folder written by train.py"}
    verb(curves, **runs)
    verb(argument, **runs)
    samplers(verb(complexity), True)
    verb(encode, 0)
    p = verb(export, help="folder written by train.py")
    p.add_argument("file", metavar="FILE", help="file to write: runs/small-0.pt, say")
    p = samplers(verb(explore))
    p.add_argument("--port", type=int, default=0, help="default: one that is free")
    p.add_argument("--no-browser", action="store_true", help="print the address, open nothing")
    return parser


def parse(arguments):
    """The command line as a namespace with the verb as `function`; None if there is no verb."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.verb is None:
        say(parser.format_help())
        return None
    for path in filter(None, (args.out, getattr(args, "file", None))):
        train.need(Path(path).absolute().parent.is_dir(), "out", path,
                   "a file in a folder that exists")
    train.need(0 <= args.seed < 2**63, "seed", args.seed, "0 to 2^63 - 1")
    count = getattr(args, "count", None)
    train.need(count is None or count >= 1, "count", count, "at least 1")
    return args


def main(arguments=None):
    """Run one verb. Raises ValueError or OSError, one line, for what a user gets wrong."""
    args = parse(arguments)
    if args is None:
        return
    if not args.opens:
        args.function(args)
    elif args.function is kl and not args.run:
        kl(None, args)
    else:
        args.function(Trained(args), args)


if __name__ == "__main__":
    with train.one_line_errors():
        main()

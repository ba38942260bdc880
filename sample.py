"""Pictures, tables and a page from a trained run: what each token means, and what it costs.

WHERE     Read last, after train.py. Reads a run and its dataset; imports all the other files.
PAPER     arXiv 2402.09712, Figures 2(b) and 5-9, Tables 5 and 8. Eq. (5) is in encdiff.py.
SHAPES    B images, N tokens, K columns of a picture, S image side; images (B, 3, S, S) in [-1, 1].
IDEA      How to read the pictures. All rows share their noise z_T: what differs is the token.
            swap        a row takes the tokens of ONE factor from the target: compared with the row
                        "redrawn", only that factor should change
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


def to_picture(image):
    """An image tensor (3, S, S) in [-1, 1] as a PIL image."""
    return Image.fromarray(train.to_bytes(image).permute(1, 2, 0).numpy())


def grid(rows, labels, headings=()):
    """Rows of image tensors (K, 3, S, S), at the left of each its label of one or two lines."""
    K, _, S, _ = rows[0].shape
    # Whole multiples keep pixels sharp; many rows are shown smaller so that they fit a screen.
    side = S * max(1, min(128, 640 // len(rows)) // S)
    big, small, gap = font(17), font(13), 3
    labels = [label.partition("\n")[::2] for label in labels]
    left = 20 + int(max(max(big.getlength(name), small.getlength(more)) for name, more in labels))
    top, pitch = 28 if headings else gap, side + gap
    canvas = Image.new("RGB", (left + K * pitch, top + len(rows) * pitch), "white")
    draw = ImageDraw.Draw(canvas)
    for k, heading in enumerate(headings):
        draw.text((left + k * pitch + side // 2, top // 2), heading, "black", small, anchor="mm")
    for r, (row, (name, remark)) in enumerate(zip(rows, labels)):
        y = top + r * pitch
        draw.text((10, y + side // 2 - 9 * bool(remark)), name, "black", big, anchor="lm")
        draw.text((10, y + side // 2 + 11), remark, "dimgray", small, anchor="lm")
        for k, image in enumerate(row):
            tile = to_picture(image).resize((side, side), Image.Resampling.NEAREST)
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

    def seen(self):
        """Codes of many random images (M, N) or (M, N, d): which values occur in the data."""
        return self.codes(self.images(min(2000, len(self.dataset))))

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
    """--sampler, --steps -> [(name, options of EncDiff.sample)], or a ValueError."""
    T, complexity = config.timesteps, args.verb == "complexity"
    if config.decoder == "direct":
        train.need(not (args.sampler or args.steps), "decoder", "direct here",
                   "no --sampler or --steps, as it draws in one pass")
        return [("direct decoder", {})]
    usual = {"dpm": min(20, T), "ddim": min(200, T), "ddpm": T}
    names = args.sampler or (list(usual) if complexity and not args.steps else ["dpm"])
    steps = args.steps or [usual[name] for name in names]
    train.need(len(names) == 1 or complexity or args.verb == "reconstruct", "sampler",
               " ".join(names), "one for a picture")
    train.need(len(steps) == len(names), "steps", steps, "one number for each --sampler")
    for name, n in zip(names, steps):
        train.need(1 <= n <= T, "steps", n, f"1 to {T}, the timesteps of this run")
        train.need(n == T or name != "ddpm", "steps", n, f"{T} with ddpm, ddim or dpm for fewer")
    return [(f"{name}, {n} steps", {"sampler": name, "steps": n}) for name, n in zip(names, steps)]


def importance_of(run):
    """DCI's importance (N, F) from a run's scores and the names of its F factors, or None, ()."""
    if "importance" not in run.scores:  # no labels, say
        return None, ()
    importance, names = np.array(run.scores["importance"], float), run.factor_names
    if importance.shape != (run.config.num_tokens, len(names)):
        raise ValueError(f"metrics.json of {run.name} is about other codes or factors; expected "
                         f"{run.config.num_tokens} codes and {names}. Without it tokens are "
                         "shown without names")
    return importance, names


def named_tokens(run):
    """{token: the factor that uses it most, or "none"}, in the order of factors; {} without scores.

    A token is named by a factor (DCI's importance) if it provides at least twice the share that it
    would have if all provided the same. For one factor the more important token comes first.
    """
    importance, names = importance_of(run)
    if importance is None:
        return {}
    strength, factor = importance.max(1), importance.argmax(1)  # (N, F) -> (N,)
    none = strength < min(0.5, 2 / len(strength))
    strength[none], factor[none] = 0, len(names)
    return {i: (*names, "none")[factor[i]] for i in np.lexsort((-strength, factor)).tolist()}


def token_rows(run, args):
    """What the rows of a picture show: [token], [label]. The tokens are those of --tokens, or the
    most important one of each factor, or all where they have no names."""
    names, N = named_tokens(run), run.config.num_tokens
    wanted = args.tokens
    if wanted is None and names:
        first = {name: i for i, name in reversed(names.items())}
        wanted = [i for name, i in first.items() if name != "none"]
        missing = [name for name in run.factor_names if name not in first]
        say("a row a factor (--tokens all: a row a token)"
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
    """source, target, and the source with one factor's tokens from the target (Figures 5, 7, 8)"""
    (tokens, labels), K, names = token_rows(run, args), args.count, named_tokens(run)
    groups = [[i] for i in tokens]
    if names and not args.tokens:  # all tokens of a factor: it may be spread over several
        groups = [[j for j in names if names[j] == names[i]] for i in tokens]
        labels = [f"{names[group[0]]}\ntoken " + " ".join(map(str, group)) for group in groups]
    source, target = run.images(2 * K).split(K)
    codes, other, noise = run.codes(source), run.codes(target), run.noise(K)
    swapped = torch.stack([codes] * (1 + len(groups)))  # (rows, K, N) or (rows, K, N, d)
    for row, group in enumerate(groups, 1):  # row 0 shows what the source's own tokens draw
        swapped[row][:, group] = other[:, group]
    drawn = run.draw(swapped.flatten(0, 1), noise.repeat(len(swapped), 1, 1, 1)).split(K)
    labels = ["source", "target", "redrawn\nall of the source", *labels]
    save(args, run.folder, grid([source, target, *drawn], labels))


def quantiles(run, count):
    """Values that the codes have in the data: (count, N) or (count, N, d), lowest to highest."""
    seen = run.seen()
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


def attention_maps(records, size):
    """Attention (K, P, N) in each layer and call -> its mean over both, (K, N, size, size)."""
    maps = []
    for layer in records:
        layer = torch.stack(layer).mean(0).transpose(1, 2)  # calls (K, P, N) -> (K, N, P)
        side = math.isqrt(layer.shape[2])
        layer = layer.unflatten(2, (side, side))
        maps.append(F.interpolate(layer, size=(size, size), mode="bilinear"))
    return torch.stack(maps).mean(0)


def heat(images, maps):
    """Maps (K, S, S), lowest to highest, as colours over images (K, 3, S, S) in grey."""
    maps, places = maps.cpu() - maps.min().item(), np.linspace(0, 1, len(HEAT))
    shares = (maps / maps.max().clamp(min=1e-6)).numpy()
    colours = [np.interp(shares, places, channel) for channel in zip(*HEAT)]
    colours = train.to_float(torch.from_numpy(np.stack(colours, 1)))  # 3 (K, S, S) -> (K, 3, S, S)
    return 0.7 * colours + 0.3 * images.cpu().mean(1, keepdim=True)


def attention(run, args):
    """which places read which token while an image is drawn (Figures 6, 9)"""
    (tokens, labels), K = token_rows(run, args), args.count
    codes, noise = run.codes(run.images(K)), run.noise(K)
    with unet.record_attention(run.model.denoiser) as records:
        drawn = run.model.sample(run.model.tokens(codes), noise=noise, **run.samplers[0][1])
    train.need(records, "conditioning", f"{run.config.conditioning} in {run.folder}",
               "cross: there is no cross-attention to show")
    maps, rows = attention_maps(records, run.config.size), [drawn]
    for row, i in enumerate(tokens):
        rows.append(heat(drawn, maps[:, i]))
        scale = f"{maps[:, i].min():.2f} - {maps[:, i].max():.2f}"
        labels[row] += ("  " if "\n" in labels[row] else "\n") + scale
    say("colours run from the lowest to the highest attention of each row, as printed there; "
        f"if all tokens were attended to alike it would be {1 / run.config.num_tokens:.2f}")
    save(args, run.folder, grid(rows, ["sample", *labels]))


def generate(run, args):
    """new combinations: every token is taken from another image"""
    codes = run.seen()
    token = torch.arange(codes.shape[1], device=run.device)
    mixed = codes[torch.randint(len(codes), (args.count, len(token))).to(run.device), token]
    rows = run.draw(mixed, run.noise(args.count)).split(8)
    save(args, run.folder, grid(rows, [""] * len(rows)))


def some_timesteps(T):
    """Twelve timesteps from about T/100, but at least 2, up to T: a list of integers."""
    return torch.linspace(0.01 * T, T, 12).round().long().clamp(min=2).tolist()


def say_row(name, values):
    """Print a row of a table: its name and its numbers, each to four significant digits."""
    say(f"{name:14s}" + "".join(f" {value:9.4g}" for value in values))


def kl(run, args):
    """the bottleneck of eq. (5) under the four schedules (Figure 2b); without RUN: curves alone"""
    T, second_moment, series = 1000, 1.0, []
    title = "KL( q(z_{t-1} | z_t, z_0) || N(0, I) ) for each latent dimension, in nats"
    if run:
        T = run.config.timesteps
        z0 = batched(run.model.latents, run.images(args.count)).cpu().double()
        second_moment = z0.square().mean().item()
        title += "; circles: estimated on images"
    some = some_timesteps(T)
    say_row("t", some)
    for colour, name in zip(PALETTE, encdiff.SCHEDULES):
        betas = encdiff.beta_schedule(name, T)
        exact = encdiff.kl_bottleneck(betas, second_moment).tolist()
        series.append((name, colour, list(enumerate(exact, 1))[1:]))  # infinite at t = 1
        say_row(name, [exact[t - 1] for t in some])
        if run:
            estimates, alpha_bar = [], encdiff.cumulative(betas)
            for t in some:  # the expectation in eq. (5) over z_0 and z_t, by Monte Carlo
                a, b, v = encdiff.posterior(alpha_bar, t)
                z_t = alpha_bar[t].sqrt() * z0 + (1 - alpha_bar[t]).sqrt() * torch.randn_like(z0)
                mean_square = (a * z0 + b * z_t).square().mean()
                estimates.append(0.5 * (v - 1 - v.log() + mean_square).item())
            series.append(("", colour, list(zip(some, estimates))))
            say_row("  estimated", estimates)
    save(args, run.folder if run else ".", plot(title, "timestep t", series))


def worth(run, args):
    """by how much the loss of eq. (3) rises at each t if one factor is wrong in the codes"""
    sizes, model, some = run.dataset.factor_sizes, run.model, some_timesteps(run.config.timesteps)
    train.need(sizes, "data", run.dataset.name, "a dataset whose images are labelled with factors")
    train.need(run.config.decoder == "diffusion", "decoder", "direct here", "diffusion")
    factors = run.dataset.factors(run.some(args.count)).numpy()  # (B, F)
    images, noise = run.load(run.dataset.find(factors)), run.noise(args.count)
    z0, own, series = model.latents(images), model.tokens(run.codes(images)), []

    def losses(tokens):
        """The loss at each of the timesteps, of the same noised latents."""
        for t in some:
            t = torch.full((args.count,), t, device=run.device)
            predicted = batched(model.denoiser, model.add_noise(z0, t, noise), t, tokens)
            yield F.mse_loss(predicted, noise).item()

    wrong = []
    for j, size in enumerate(sizes):  # for each image one that differs from it in factor j alone
        others, shift = factors.copy(), torch.randint(1, max(2, size), (args.count,)).numpy()
        others[:, j] = (others[:, j] + shift) % size
        wrong.append(model.tokens(run.codes(run.load(run.dataset.find(others)))))
    least = list(losses(own))
    say_row("t", some)
    for name, colour, tokens in zip(run.dataset.factor_names, PALETTE * len(sizes), wrong):
        rise = np.subtract(list(losses(tokens)), least)
        say_row(name, rise)
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
    xs, ys = (start + cell // 2 + cell * np.arange(1 + count)
              for start, count in ((left, columns), (top, rows)))
    for y, name in zip(ys, (*names, "D of the code")):
        draw.text((left - 10, y), name, "black", font(15), anchor="rm")
    for x, token in zip(xs, (*order, "C")):
        draw.text((x, top - 12), str(token), "black", small, anchor="mm")
    margins = [(xs[-1], y, row) for y, row in zip(ys, matrix)]
    margins += [(x, ys[-1], column) for x, column in zip(xs, matrix.T)]
    for x, y, shares in margins:
        draw.text((x, y), f"{metrics.focus(shares[None]):.2f}", "dimgray", small, anchor="mm")
    for j, i in np.ndindex(matrix.shape):  # the area of a square is the share of its code
        for half, colour in ((19, (243, 244, 246)),
                             (19 * min(1, matrix[j, i]) ** 0.5, PALETTE[j % len(PALETTE)])):
            draw.rectangle((xs[i] - half, ys[j] - half, xs[i] + half, ys[j] + half), colour)
    save(args, run.folder, canvas)


def read_log(folder):
    """log.csv of a run as a list of dicts of strings, "" where nothing was logged."""
    path = Path(folder, "log.csv")
    log = csv.DictReader(path.read_text().splitlines() if path.is_file() else ())
    if not {"stage", "step", "loss"} <= set(log.fieldnames or ()):
        raise ValueError(f"{path} is not there, or no log of this version; expected a folder "
                         "written by train.py --out")
    return list(log)


def curves(folders, args):
    """losses and scores over training, several runs in one picture"""
    figures, (width, height) = {}, (760, 360)
    for folder, colour in zip(folders, PALETTE * len(folders)):
        log = read_log(folder)
        for stage in ("first stage", "joint training"):
            for column in ("loss", "mse", "codes_used", *train.Run.SCORES):
                points = [(int(row["step"]), float(row[column])) for row in log
                          if row["stage"] == stage and row[column]]
                if points:
                    series = figures.setdefault(f"{stage}: {column.replace('_', ' ')}", [])
                    series.append((folder[-28:], colour, points))  # names end where runs differ
    if not figures:
        raise ValueError(f"{folders[0]}/log.csv has no losses; expected a run that logged some")
    size = width * min(2, len(figures)), height * math.ceil(len(figures) / 2)
    canvas = Image.new("RGB", size, "white")
    for i, (title, series) in enumerate(figures.items()):
        picture = plot(title, "step", series, (width, height), title.endswith(("loss", "mse")))
        canvas.paste(picture, (i % 2 * width, i // 2 * height))
    save(args, folders[0], canvas)


def method(config):
    """What the method of a run is called: the nearest preset, and what differs from that."""
    aside = ("cache", "seed", "precision", "lender", "score_every")
    mine = {**dataclasses.asdict(config), "data": Path(config.data).name}
    names = []
    for preset, values in train.PRESETS.items():
        usual = dataclasses.asdict(train.Config(**values))
        names.append([preset, *(f"{name.replace('_', ' ')} {value}" for name, value in mine.items()
                                if value != usual[name] and name not in aside)])
    return ", ".join(min(names, key=len))


def argument(folders, args):
    """DCI disentanglement against training compute: mean and range of the runs of each method"""
    methods = {}  # {name: {TFLOP: [D of each run]}}
    for folder in folders:
        _, config, about = train.load_run(folder)
        first, joint = train.training_tflop(config, train.step_flops(config))
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
    first, joint = train.training_tflop(run.config, train.step_flops(run.config))
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
    """Draws for the page. What it answers depends on the request alone, so clients cannot mix.

    A slider moves a token along its first principal component in the data, a scalar along itself.
    """

    def __init__(self, run):
        self.run, self.options, self.lock = run, run.samplers[0][1], threading.Lock()
        self.most, names = min(200, run.config.timesteps), named_tokens(run)
        seen = run.seen().cpu()
        seen = seen.reshape(*seen.shape[:2], -1)  # (M, N) -> (M, N, 1); (M, N, d) stays
        centred = (seen - seen.mean(0)).transpose(0, 1)
        axis = torch.linalg.svd(centred, full_matrices=False).Vh[:, 0]
        self.axis = axis * axis.sum(1, keepdim=True).sign()  # (N, d)
        low, high = (seen * self.axis).sum(2).quantile(torch.tensor([0.01, 0.99]), dim=0).tolist()
        tokens = [{"i": i, "name": names.get(i, f"token {i}"), "low": low[i], "high": high[i],
                   "idle": names.get(i) == "none" or high[i] - low[i] < 0.1}
                  for i in names or sorted(range(len(low)), key=lambda i: low[i] - high[i])]
        with unet.record_attention(run.model.denoiser) as layers:
            notes = "" if layers else "No cross-attention reads these tokens: none can be shown. "
        notes += "" if names else "Without scores tokens have no names; the widest are first."
        setup = {"run": str(run.name), "images": len(run.dataset), "tokens": tokens, "notes": notes,
                 "steps": self.options.get("steps", 0), "most": self.most}
        # A factor may have any name; "<" could end the script that the names are in.
        self.page = PAGE.replace("SETUP", json.dumps(setup).replace("<", "\\u003c"))

    def draw(self, asked):
        """tokens=s,t,0.3 asks for token 0 of the source, 1 of the target, 2 moved to place 0.3."""
        images, words = range(len(self.run.dataset)), asked["tokens"].split(",")
        allowed = {"source": images, "target": images, "noise": range(2**32),
                   "steps": range(1, self.most + 1)}
        for name, values in allowed.items():
            train.need(int(asked[name]) in values, name, asked[name], f"in {values}")
        source, target, noise, steps = (int(asked[name]) for name in allowed)
        images = self.run.load([source, target])
        own = self.run.codes(images).cpu()  # (2, N) or (2, N, d)
        ends = own.reshape(2, len(self.axis), -1)
        places, codes = (ends * self.axis).sum(2), ends[0].clone()  # (2, N), (N, d)
        train.need(len(words) == len(codes), "tokens", asked["tokens"], f"{len(codes)} of them")
        for i, word in enumerate(words):
            if word == "t":
                codes[i] = ends[1, i]
            elif word != "s":
                codes[i] += (float(word) - places[0, i]) * self.axis[i]
        train.need(codes.abs().max() < 1e6, "tokens", asked["tokens"], "finite places")
        z = torch.randn(self.run.model.latent_shape, generator=torch.Generator().manual_seed(noise))
        codes, z = (x.to(self.run.device) for x in (codes.reshape(own[:1].shape), z[None]))
        with self.lock, unet.record_attention(self.run.model.denoiser) as layers:
            drawn = self.run.draw(codes, z, self.options and {**self.options, "steps": steps})
        maps = attention_maps(layers, self.run.config.size).transpose(0, 1) if layers else ()
        urls = []
        for image in (*images, *drawn, *(heat(drawn, m)[0] for m in maps)):
            to_picture(image).save(file := io.BytesIO(), "PNG")
            urls.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
        return {"images": urls[:3], "maps": urls[3:], "places": places.tolist()}


class Handler(http.server.BaseHTTPRequestHandler):
    """GET of the page and of what it shows; all else is refused."""

    timeout = 10  # seconds that a client has to send its request
    log_message = lambda *_: None

    def do_GET(self):
        (path, _, query), host = self.path.partition("?"), self.headers.get("Host", "")
        kind, status, text = "plain", 404, "there are / and /draw"
        # A foreign page may send requests here, or give 127.0.0.1 a name of its own. Any port is
        # right: the page may be seen through a tunnel.
        if (host.partition(":")[0] not in ("127.0.0.1", "localhost")
                or self.headers.get("Origin", f"http://{host}") != f"http://{host}"):
            status, text = 403, "only the page of this server may ask it"
        elif path == "/":
            kind, status, text = "html", 200, self.server.explorer.page
        elif path == "/draw":
            try:
                asked = dict(urllib.parse.parse_qsl(query, max_num_fields=9))
                status, text = 200, json.dumps(self.server.explorer.draw(asked))
            except (KeyError, ValueError) as error:
                status, text = 400, f"malformed: {error}"
        with contextlib.suppress(OSError):  # the client went away
            self.send_response(status)
            self.send_header("Content-Type", f"text/{kind}; charset=utf-8")
            self.end_headers()
            self.wfile.write(text.encode(errors="replace"))


def explore(run, args):
    """a page on this machine: a slider a token, the image that they draw, where a token is read"""
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    except (OSError, OverflowError) as error:
        raise OSError(f"--port {args.port} cannot be used: {error}; choose another") from None
    torch.set_num_threads(1)  # one small image at a time: more threads wait for one another
    with server, contextlib.suppress(KeyboardInterrupt):
        server.explorer, address = Explorer(run), f"http://127.0.0.1:{server.server_port}/"
        say(f"{run.name} is shown at {address} until Ctrl-C")
        if not args.no_browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        server.serve_forever()


PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>encdiff: explore</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>:root { color-scheme: light dark }
* { box-sizing: border-box; font: 14px/1.4 system-ui, sans-serif } b { font-size: 18px }
main { max-width: 1360px; margin: auto; display: grid; gap: 8px 24px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)) }
section { position: sticky; top: 0; z-index: 1; align-self: start; background: Canvas }
section > div { display: grid; grid-template-columns: 2fr 2fr 1fr; gap: 10px; margin: 8px 0 }
figure { margin: 0 } img { width: 100%; aspect-ratio: 1; display: block; border-radius: 8px }
small, p, summary, figcaption { opacity: .7 } figcaption { padding-top: 4px }
.token, button { border: 1px solid #8884; border-radius: 8px; padding: 4px 10px; margin: 0 0 6px }
.token { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 10px; --thumb: #2a8ccc }
button { background: #8881; color: inherit } .name { flex: 1 0 13em; text-align: left }
.taken { --thumb: #dd6b1c } .slide { flex: 9 1 250px; position: relative }
[type=range] { width: 100%; margin: 0 0 9px; height: 20px; accent-color: var(--thumb) }
i { width: 9px; height: 9px; border-radius: 5px; border: 5px solid #2a8ccc; display: inline-block }
i.ring { border: 2px solid #dd6b1c } .slide i { position: absolute; bottom: 2px; margin-left: -4px }
</style><main><section><b>encdiff</b> <small id="run"></small><div>
<figure><img alt="source"><figcaption><i></i> source</figcaption></figure>
<figure><img alt="drawn"><figcaption id="said" aria-live="polite"></figcaption></figure>
<figure><img alt="target"><figcaption><i class="ring"></i> target</figcaption></figure></div>
<button onclick="state.source = some(); take('s')">new source</button>
<button onclick="state.target = some(); draw()">new target</button>
<button onclick="take('t')">take all from target</button> <button onclick="take('s')">reset</button>
<span id="noisy"><button onclick="state.noise++; draw()">another noise</button> <small>solver steps
</small> <input id="steps" type="number" min="1" aria-label="solver steps" onchange="draw()"></span>
</section><div><div id="used"></div><details id="idle"><summary>tokens in little use</summary>
</details><p>A dot is where the source is, a ring where the target. Point at the name of a token to
see which places read it: yellow most, black least. <span id="notes"></span></p></div></main>
<template><div class="token"><button class="name"></button><button>from target</button>
<div class="slide"><i></i><i class="ring"></i><input type="range" step="any"></div></div></template>
<script>
const setup = SETUP, $ = id => document.getElementById(id), rows = []
const some = () => Math.floor(Math.random() * setup.images)
const state = {source: some(), target: some(), noise: 0, tokens: setup.tokens.map(() => "s")}
const take = word => { state.tokens.fill(word); draw() }
let answer, hovered, next, busy
function show() {                     // the last answer, and the sliders as they are asked for
  if (!answer) return
  const urls = [answer.images[0], answer.maps[hovered] ?? answer.images[2], answer.images[1]]
  document.querySelectorAll("img").forEach((image, k) => image.src = urls[k])
  rows.forEach(({low, high, box, slider, dots}, i) => {
    const ends = answer.places.map(places => places[i]), word = state.tokens[i]
    const min = Math.min(low, ...ends), max = Math.max(high, ...ends)
    Object.assign(slider, {min, max, value: {s: ends[0], t: ends[1]}[word] ?? word})
    dots.forEach((dot, k) =>          // a slider's thumb is 16 pixels wide
      dot.style.left = `calc(8px + ${(ends[k] - min) / (max - min)} * (100% - 16px))`)
    box.classList.toggle("taken", word === "t")
  })
}
async function draw(most = 200) {     // of the states that come while one is drawn the last counts
  next = {...state, steps: Math.max(1, Math.min(most, setup.most, $("steps").value))}
  show()
  if (busy) return
  busy = true
  try { while (next) {
    const began = performance.now(), query = new URLSearchParams(next)
    next = null
    const reply = await fetch("draw?" + query)
    if (!reply.ok) throw Error(await reply.text())
    answer = await reply.json()
    show()
    $("said").textContent = `drawn in ${((performance.now() - began) / 1000).toFixed(2)} s`
  } } catch (error) { $("said").textContent = `no answer: ${error.message}` }
  busy = false
}
for (const {i, name, idle, low, high} of setup.tokens) {
  const box = document.querySelector("template").content.firstChild.cloneNode(true)
  const [label, other] = box.querySelectorAll("button"), slider = box.querySelector("input")
  rows[i] = {low, high, box, slider, dots: box.querySelectorAll("i")}
  label.textContent = slider.ariaLabel = name === `token ${i}` ? name : `${name} (token ${i})`
  slider.oninput = () => { state.tokens[i] = slider.value; draw(5) }
  slider.onchange = () => draw()
  other.onclick = () => { state.tokens[i] = state.tokens[i] === "t" ? "s" : "t"; draw() }
  label.onmouseenter = label.onfocus = () => { hovered = i; show() }
  label.onmouseleave = label.onblur = () => { hovered = null; show() }
  $(idle ? "idle" : "used").append(box)
}
Object.assign($("steps"), {value: setup.steps, max: setup.most})
$("run").textContent = setup.run; $("notes").textContent = setup.notes
$("noisy").hidden = !setup.steps; $("idle").hidden = setup.tokens.every(token => !token.idle)
draw()
</script></html>"""


# ---- The command line ---------------------------------------------------------------------------


def token(word):
    """An argument of --tokens: "all" or a number; ValueError, which argparse reports, otherwise."""
    return word if word == "all" else int(word)


FLAGS = {
    "run": dict(metavar="RUN", nargs="?", help="folder written by train.py, or file written by "
                f"export; default: the trained model that comes with the code, {SHIPPED.name}"),
    "runs": dict(dest="run", metavar="RUN", nargs="+", help="folders written by train.py"),
    "trained": dict(dest="run", metavar="RUN", help="folder written by train.py"),
    "file": dict(metavar="FILE", help="file to write: runs/small-0.pt, say"),
    "--count": dict(type=int, metavar="N", help="number of images, or in traverse of values of a "
                    "token (default: %(default)s; None means all)"),
    "--tokens": dict(type=token, nargs="+", metavar="I", help="rows to show: numbers of tokens, or "
                     "all (default: the most important one of each factor)"),
    "--sampler": dict(choices=tuple(encdiff.SAMPLERS), nargs="+", help="one for a picture, several "
                      "for a table (default: dpm; complexity: all of them)"),
    "--steps": dict(type=int, nargs="+", metavar="N", help="solver steps of each sampler "
                    "(default: dpm 20, ddim 200, ddpm all timesteps)"),
    "--lpips": dict(nargs=2, metavar="FILE", help="weights: torchvision's AlexNet, then alex.pth "
                    "of the lpips package"),
    "--gif": dict(action="store_true", help="one animation instead, with four images"),
    "--port": dict(type=int, default=0, help="default: one that is free"),
    "--no-browser": dict(action="store_true", help="print the address, open nothing"),
    "--data": dict(metavar="PATH", help="dataset to take images from, if not the one that the run "
                   "was trained on or if that has moved"),
    "--seed": dict(type=int, default=0, help="fixes all that is random (default: 0)"),
    "--device": dict(choices=("cuda", "mps", "cpu"), help="default: the best here"),
    "--out": dict(metavar="FILE", help="default: in the run's folder; in the working directory if "
                  "RUN is a file"),
}
DRAW, COMMON = "--sampler --steps", " --data --seed --device --out"
VERBS = {  # the usual --count, and the flags that a verb takes besides the common ones
    reconstruct: (256, "run --count --lpips " + DRAW),
    swap: (8, "run --count --tokens " + DRAW),
    traverse: (9, "run --count --tokens --gif " + DRAW),
    attention: (8, "run --count --tokens " + DRAW),
    generate: (32, "run --count " + DRAW),
    importance: (None, "run"),
    kl: (256, "run --count"),
    worth: (256, "run --count"),
    curves: (None, "runs"),
    argument: (None, "runs"),
    complexity: (None, "run " + DRAW),
    encode: (None, "run --count"),
    export: (None, "trained file"),
    explore: (None, "run --port --no-browser"),
}


def build_parser():
    """One subcommand a verb; what a verb does is the docstring of its function."""
    parser = train.Parser("sample.py", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for function, (count, flags) in VERBS.items():
        p = verbs.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        p.set_defaults(function=function, **{flag.strip("-"): None for flag in FLAGS})
        for flag in (flags + COMMON).split():
            p.add_argument(*[flag] * ("dest" not in FLAGS[flag]), **FLAGS[flag])
        p.set_defaults(count=count)
    return parser


def parse(arguments):
    """The command line as a namespace with the verb as `function`; None if there is no verb."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.verb is None:
        say(parser.format_help())
        return None
    for path in filter(None, (args.out, args.file)):
        train.need(Path(path).absolute().parent.is_dir(), "out", path,
                   "a file in a folder that exists")
    train.need(0 <= args.seed < 2**63, "seed", args.seed, "0 to 2^63 - 1")
    train.need(args.count is None or args.count >= 1, "count", args.count, "at least 1")
    return args


def main(arguments=None):
    """Run one verb. Raises ValueError or OSError, one line, for what a user gets wrong."""
    args = parse(arguments)
    if args:
        unopened = isinstance(args.run, list) or args.function is kl and not args.run
        args.function(args.run if unopened else Trained(args), args)


if __name__ == "__main__":
    with train.one_line_errors():
        main()

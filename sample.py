"""Pictures, tables and a page from a trained run: what each token means, and what it costs.

WHERE     Read last, after train.py. Reads a run and its dataset; imports all the other files.
PAPER     arXiv 2402.09712, Figures 2(b) and 5-9, Tables 5 and 8. Eq. (5) is in encdiff.py.
SHAPES    B images, N tokens, K columns of a picture, S image side; images (B, 3, S, S) in [-1, 1].
IDEA      How to read the pictures. All rows share their noise z_T: what differs is the token.
            swap        compared with the row "redrawn", only the factor of a row should change
            traverse    one token takes the values that it has in the data, lowest to highest
            attention   which places read a token; each row has its own colour scale
            generate    every token from another image: each combination should be a good picture
            importance  DCI's matrix: a code should matter for one factor, a factor need one code
            kl          how many nats step t lets through, by eq. (5)
            worth       how much a wrong factor hurts at t: eq. (5) does not know what z_t shows
            argument    DCI disentanglement against training compute, for several methods
            explore     all of it by hand: a slider a token, in the browser
DIFFERS   The paper draws with 200 steps of DDIM (--sampler ddim --steps 200), we with 20 of
          DPM-Solver++. A sweep visits quantiles of the values seen, not equal distances: so it also
          works for vector-valued tokens, in the order of their first principal component.
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
import itertools
import json
import math
import os
import threading
import time
import urllib.parse
import webbrowser
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # torch's threads spin as they wait: not for long

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
           (204, 121, 167), (230, 159, 0), (86, 180, 233), (110, 110, 110), (0, 0, 0))
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # dark to bright
ROUND = [digit * 10.0**power for power in range(-9, 10) for digit in (1, 2, 5)]  # for axes
font = ImageFont.load_default  # Pillow's own, so that no font file is needed


def to_picture(image):
    """An image tensor (3, S, S) in [-1, 1] as a PIL image."""
    return Image.fromarray(train.to_bytes(image).permute(1, 2, 0).numpy())


def grid(rows, labels, headings=()):
    """Rows of image tensors (K, 3, S, S) as a PIL image, each with a label of one or two lines."""
    K, _, S, _ = rows[0].shape
    # Whole multiples keep pixels sharp; many rows are shown smaller so that they fit a screen.
    side = S * max(1, min(128, 640 // len(rows)) // S)
    text, gap = font(14), 3
    left = 20 + int(max(text.getlength(line) for label in labels for line in label.split("\n")))
    top, pitch = 28 if headings else gap, side + gap
    canvas = Image.new("RGB", (left + K * pitch, top + len(rows) * pitch), "white")
    draw = ImageDraw.Draw(canvas)
    for k, heading in enumerate(headings):
        draw.text((left + k * pitch + side // 2, top // 2), heading, "black", text, anchor="mm")
    for r, (row, label) in enumerate(zip(rows, labels)):
        y = top + r * pitch
        draw.text((10, y + side // 2), label, "black", text, anchor="lm")
        for k, image in enumerate(row):
            tile = to_picture(image).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(tile, (left + k * pitch, y))
    return canvas


def axis(values, start, end, logarithmic):
    """An axis from pixel start to pixel end for these values, and for 0 unless it is logarithmic.
    Returns the function from values to pixels, and the values that get a tick."""
    scale = np.log10 if logarithmic else np.asarray
    low, high = (min(values), max(values)) if logarithmic else (min(0, *values), max(0, *values))
    extent = scale(high) - scale(low) or 1  # one value alone has none
    to_pixel = lambda value: start + (scale(value) - scale(low)) / extent * (end - start)
    if logarithmic:
        return to_pixel, [tick for tick in ROUND if low <= tick <= high]
    step = next(tick for tick in ROUND if tick >= extent / 8)
    return to_pixel, step * np.arange(math.ceil(low / step), math.floor(high / step + 1e-6) + 1)


def plot(title, x_title, series, size=(900, 520), logarithmic=False):
    """series {name: points} -> PIL image with axes, ticks and a legend. A point is (x, y), or
    (x, y, lowest, highest) with a bar for its range. Only y above 0 has a logarithmic axis."""
    width, height = 2 * size[0], 2 * size[1]  # shrunk at the end: smooth lines
    canvas, text = Image.new("RGB", (width, height), "white"), font(30)
    draw = ImageDraw.Draw(canvas)
    top, bottom, left = 88, height - 120, 152
    right = width - 120 - int(max(map(text.getlength, series)))
    xs, ys = zip(*((x, y) for points in series.values() for x, *more in points for y in more))
    to_x, x_ticks = axis(xs, left, right, False)
    to_y, y_ticks = axis(ys, bottom, top + 16, logarithmic and min(ys) > 0)
    for x in x_ticks:
        draw.line((to_x(x), top, to_x(x), bottom), "gainsboro", 2)
        draw.text((to_x(x), bottom + 12), f"{x:g}", "black", text, anchor="mt")
    for y in y_ticks:
        draw.line((left, to_y(y), right, to_y(y)), "gainsboro", 2)
        draw.text((left - 16, to_y(y)), f"{y:.4g}", "black", text, anchor="rm")
    draw.line((left, top, left, bottom, right, bottom), "black", 2)
    draw.text(((left + right) / 2, height - 28), x_title, "black", text, anchor="mm")
    draw.text((left, 40), title, "black", font(34), anchor="lm")
    for row, (name, points) in enumerate(series.items()):
        colour = PALETTE[row % len(PALETTE)]
        for x, _, *ends in points:
            draw.line([(to_x(x), to_y(end)) for end in ends], colour, 3)
        points = [(to_x(x), to_y(y)) for x, y, *_ in points]
        draw.line(points, colour, 4, joint="curve")
        for point in points if len(points) < 10 else ():
            draw.circle(point, 8, "white", colour, 4)
        y = top + 24 + 48 * row
        draw.line((right + 28, y, right + 72, y), colour, 6)
        draw.text((right + 84, y), name, "black", text, anchor="lm")
    return canvas.resize(size, Image.Resampling.LANCZOS)


def save(args, folder, picture, ending="png", **options):
    """Write a picture to --out, or into the folder under the name of the verb, and say so."""
    path = Path(args.out or f"{folder}/{args.verb}.{ending}")
    train.write_atomically(path, lambda file: picture.save(file, ending, optimize=True, **options))
    say(f"wrote {path}, {picture.width} x {picture.height} pixels")


# ---- A trained run ------------------------------------------------------------------------------

ONE_PASS = (encdiff.EncDec, encdiff.VAE)  # draw at once; the others remove noise step by step


def batched(function, *tensors):
    """function applied to 64 rows of the tensors at a time, results joined."""
    return torch.cat([function(*parts) for parts in zip(*(t.split(64) for t in tensors))])


class Trained:
    """A run opened for use: its averaged model, which may be any with represent, tokens, sample,
    latents, decode and latent_shape; its scores; its dataset. Raises what train.load_run does."""

    def __init__(self, args):
        self.name, self.device = Path(args.run or SHIPPED), train.Machine(args.device).device
        if not args.run:
            say(f"no RUN given: using the trained model that comes with the code, {self.name}")
        self.model, self.config, self.about = train.load_run(self.name, self.device)
        self.folder, self.scores = self.about["folder"], self.about["scores"]
        self.factor_names, self.data = self.about["data"].get("factor_names", ()), args.data
        self.importance = np.array(self.scores.get("importance", ()), float)  # DCI's (N, F) or (0,)
        steps = 1 if isinstance(self.model, ONE_PASS) else min(args.steps, train.TIMESTEPS)
        self.options = {"sampler": args.sampler, "steps": steps}
        torch.manual_seed(args.seed % 2**63)  # a seed shows the same images for every run

    @functools.cached_property
    def dataset(self):
        """The run's dataset, or that of --data; opened by the verbs that need it."""
        path, cache = self.data or self.config.data or None, self.config.cache
        if path and not Path(path).exists():
            raise ValueError(f"{path} is not there; if it has moved, say where it is with --data")
        dataset = data.open_dataset(path, self.config.size, cache if Path(cache).is_dir() else None)
        if self.about["data"] not in ({}, dataset.identity):
            say(f"{dataset.name} is not what the run was trained on")
        return dataset

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

    def codes(self, images):
        """Images (B, 3, S, S) in [-1, 1] -> codes (B, N) or (B, N, d)."""
        return batched(self.model.represent, images)

    def seen(self):
        """Codes of many random images (M, N) or (M, N, d): which values occur in the data."""
        return self.codes(self.images(min(2000, len(self.dataset))))

    def noise(self, count):
        """z_T (count, *latent_shape), drawn on the CPU: a seed means the same on every device."""
        return torch.randn(count, *self.model.latent_shape).to(self.device)

    def draw(self, codes, noise, **options):
        """codes (B, N) or (B, N, d), z_T (B, ...) -> images; options: other than asked for."""
        options, tokens = {**self.options, **options}, batched(self.model.tokens, codes)
        return batched(lambda s, z: self.model.sample(s, noise=z, **options), tokens, noise)

    def draw_variants(self, codes, changes, noise):
        """Images from codes (B, N) or (B, N, d), and from them after each of the changes (tokens,
        others): these tokens taken from others, of the same shape or with B = 1. z_T is shared."""
        variants = [codes]
        for tokens, others in changes:
            variants.append(codes.clone())
            variants[-1][:, tokens] = others[:, tokens]
        drawn = self.draw(torch.cat(variants), torch.cat([noise] * len(variants)))
        return drawn.split(len(codes))


def named_tokens(run):
    """{token: the factor that uses it most (DCI's importance), or "none" if it provides less than
    twice an equal share}, in the order of factors and of importance; {} without scores."""
    if not run.importance.size:
        return {}
    strength, factor = run.importance.max(1), run.importance.argmax(1)  # (N, F) -> (N,)
    none = strength < min(0.5, 2 / len(strength))
    strength[none], factor[none] = 0, len(run.factor_names)
    order = np.lexsort((-strength, factor)).tolist()
    return {i: (*run.factor_names, "none")[factor[i]] for i in order}


def token_rows(run, args):
    """What the rows of a picture show: [token], [label]. The tokens are those of --tokens, or the
    most important one of each factor, or all where they have no names."""
    names, N, wanted = named_tokens(run), run.config.num_tokens, args.tokens or ["all"]
    if names and not args.tokens:
        say("a row a factor (--tokens all: a row a token)")
        first = {name: i for i, name in reversed(names.items()) if name != "none"}
        wanted = first.values() or wanted
    for i in wanted:
        train.need(i == "all" or 0 <= i < N, "tokens", i, f"0 to {N - 1}, or all")
    tokens = [i for i in names or range(N) if i in wanted or "all" in wanted]
    return tokens, [f"{names[i]}\ntoken {i}" if names else f"token {i}" for i in tokens]


# ---- The verbs: what each does is its --help ----------------------------------------------------

def reconstruct(run, args):
    """inputs, first stage and samples from the tokens, with SSIM, MSE and LPIPS (Table 8)"""
    scores = {"SSIM": metrics.ssim, "MSE": metrics.mse}
    if args.lpips:
        scores["LPIPS"] = functools.partial(metrics.lpips, weights=metrics.load_lpips(*args.lpips))
    images = run.images(args.count)
    rows = {"input": images}
    if hasattr(run.model, "first_stage"):
        rows["first stage"] = batched(run.model.decode, batched(run.model.latents, images))
    rows["sample"] = run.draw(run.codes(images), run.noise(args.count))
    say(f"{args.count} images".ljust(14) + "".join(f" {name:>9}" for name in scores))
    for name in list(rows)[1:]:
        x, y = (images + 1) / 2, (rows[name] + 1) / 2  # the scores are defined on [0, 1]
        means = [batched(score, x, y).mean().item() for score in scores.values()]
        say(f"{name:14s}" + "".join(f" {mean:9.4g}" for mean in means))
    save(args, run.folder, grid([x[:8] for x in rows.values()], rows))


def swap(run, args):
    """source, target, and the source with one factor's tokens from the target (Figures 5, 7, 8)"""
    (tokens, labels), K, names = token_rows(run, args), args.count, named_tokens(run)
    groups = [[i] for i in tokens]
    if names and not args.tokens:  # all tokens of a factor: it may be spread over several
        groups = [[j for j in names if names[j] == names[i]] for i in tokens]
        labels = [f"{names[group[0]]}\ntoken " + " ".join(map(str, group)) for group in groups]
    source, target = run.images(2 * K).split(K)
    own, other = run.codes(source), run.codes(target)
    rows = [source, target, *run.draw_variants(own, [(g, other) for g in groups], run.noise(K))]
    save(args, run.folder, grid(rows, ["source", "target", "redrawn\nall of the source", *labels]))


def traverse(run, args):
    """one image with one token after the other swept over the values it has in the data"""
    (tokens, labels), shares = token_rows(run, args), np.linspace(0.01, 0.99, args.count)
    seen = run.seen()  # (M, N) or (M, N, d)
    order = metrics.scalar_codes(seen).argsort(0)  # (M, N): images by each token
    places = order[(shares * (len(seen) - 1)).round().astype(int)]  # (K, N)
    values = seen[places, range(seen.shape[1])]  # (K, N) or (K, N, d), lowest to highest
    images = run.images(4 if args.gif else 1)
    own, noise = run.codes(images), run.noise(len(images))
    rows = [run.draw_variants(own, [(i, value[None]) for value in values], noise) for i in tokens]
    if not args.gif:
        headings = ["input", "redrawn", *(f"{share:.0%}" for share in shares)]
        return save(args, run.folder,
                    grid([torch.cat([images, *row]) for row in rows], labels, headings))
    frames = [grid([drawn], [label]) for row, label in zip(rows, labels)
              for drawn in (*row[1:], *row[-2:1:-1])]  # each token goes up and down again
    # Labels differ in width: aligned at the right, the images stay where they are.
    size = max(frame.width for frame in frames), frames[0].height
    frames = [ImageOps.pad(frame, size, color="white", centering=(1, 0)) for frame in frames]
    # 64 colours: with them the 94 frames of a row for each factor of Shapes3D are below 2 MB.
    first, *rest = (frame.quantize(64, dither=Image.Dither.NONE) for frame in frames)
    save(args, run.folder, first, "gif", save_all=True, append_images=rest, duration=120, loop=0)


def attention_maps(records, size):
    """Attention (K, P, N) in each layer and call -> its mean over both, (K, N, size, size)."""
    maps = []
    for layer in records:
        layer = torch.stack(layer).mean(0).transpose(1, 2)  # calls (K, P, N) -> (K, N, P)
        side = math.isqrt(layer.shape[2])
        maps.append(F.interpolate(layer.unflatten(2, (side, side)), (size, size), mode="bilinear"))
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
    (tokens, labels), K, N = token_rows(run, args), args.count, run.config.num_tokens
    with unet.record_attention(run.model) as records:
        if not records:
            raise ValueError(f"{run.name} has no cross-attention; expected a model that has")
        codes = run.codes(run.images(K))
        drawn = run.model.sample(run.model.tokens(codes), noise=run.noise(K), **run.options)
    maps = attention_maps(records, run.config.size)[:, tokens].unbind(1)
    labels = [f"{label}  {m.min():.2f} - {m.max():.2f}" for label, m in zip(labels, maps)]
    say(f"colours: from the lowest to the highest share in each row; an equal share is {1 / N:.2f}")
    rows = [drawn, *(heat(drawn, m) for m in maps)]
    save(args, run.folder, grid(rows, ["sample", *labels]))


def generate(run, args):
    """new combinations: every token is taken from another image"""
    seen = run.seen()
    images = torch.randint(len(seen), (args.count, seen.shape[1]))  # one for each token
    rows = run.draw(seen[images, range(seen.shape[1])], run.noise(args.count)).split(8)
    save(args, run.folder, grid(rows, [""] * len(rows)))


def show_over_time(args, folder, title, ts, curves):
    """Print twelve points of curves {name: [value at each of ts]}, save a plot of all."""
    for name, values in {"t": ts, **curves}.items():
        say(f"{name:14s}" + "".join(f" {value:9.4g}" for value in values[::len(ts) // 11]))
    points = {name: list(zip(ts, values)) for name, values in curves.items()}
    save(args, folder, plot(title, "timestep t", points))


def kl(args):
    """the bottleneck of eq. (5) under the four schedules, for unit variance (Figure 2b)"""
    curves = {name: encdiff.kl_bottleneck(encdiff.beta_schedule(name, 1000))[9::10].tolist()
              for name in encdiff.SCHEDULES}  # from t = 10, as it is infinite at t = 1
    show_over_time(args, ".", "KL( q(z_{t-1} | z_t, z_0) || N(0, I) ), in nats for each dimension",
                   range(10, 1001, 10), curves)


def worth(run, args):
    """by how much the loss of eq. (3) rises at each t if one factor is wrong in the codes"""
    dataset, model, T, curves = run.dataset, run.model, train.TIMESTEPS, {}
    if isinstance(model, ONE_PASS):
        raise ValueError(f"{run.name} draws without noise; expected a model that removes noise")
    train.need(dataset.factor_sizes, "data", dataset.name,
               "a dataset whose images are labelled with factors")
    factors = dataset.factors(run.some(args.count)).numpy()  # (B, F)
    images_of = lambda factors: run.load(dataset.find(factors))
    z0, noise = model.latents(images_of(factors)), run.noise(args.count)
    ts = np.linspace(max(1, T / 100), T, 12).round().astype(int).tolist()

    def losses(factors):  # at each of ts, of the same noised latents, with codes of these factors
        tokens, found = model.tokens(run.codes(images_of(factors))), []
        for t in torch.tensor(ts, device=run.device)[:, None].expand(-1, args.count):
            predicted = batched(model.denoiser, model.add_noise(z0, t, noise), t, tokens)
            found.append(F.mse_loss(predicted, noise).item())
        return np.array(found)

    least = losses(factors)
    for j, (name, size) in enumerate(zip(dataset.factor_names, dataset.factor_sizes)):
        wrong, shift = factors.copy(), torch.randint(1, max(2, size), (args.count,)).numpy()
        wrong[:, j] = (wrong[:, j] + shift) % size  # another value of factor j, and of no other
        curves[name] = losses(wrong) - least
    show_over_time(args, run.folder, "rise of the loss if this factor is wrong", ts, curves)


def importance(run, args):
    """DCI's matrix, factors x codes, with D of each code and C of each factor at the margins"""
    matrix, order, why = run.importance, [*named_tokens(run)], run.scores.get("note", "no scores")
    if not matrix.size:
        raise ValueError(f"{run.name} has no importance matrix ({why}); expected a run with labels")
    focus = lambda x, digits=2: f"{metrics.focus(x):.{digits}f}" if x.shape[1] > 1 else "-"  # 0 / 0
    F, edge = len(run.factor_names), torch.linspace(-1, 1, 64).abs()
    shares = torch.from_numpy(matrix.T[:, order, None, None, None])  # (F, N, 1, 1, 1)
    inside = torch.maximum(edge, edge[:, None]) < shares.sqrt()  # squares whose areas are shares
    colours = train.to_float(torch.tensor((PALETTE * F)[:F]))[:, None, :, None, None]
    labels = [f"{name}\nC {focus(row[None])}" for name, row in zip(run.factor_names, matrix.T)]
    headings = [f"{i} D {focus(matrix[i, None])}" for i in order]
    say(f"disentanglement D {focus(matrix, 3)}   completeness C {focus(matrix.T, 3)}")
    save(args, run.folder, grid(torch.where(inside, colours, 0.9), labels, headings))


def read_log(folder):
    """log.csv of a run as a list of dicts of strings, "" where nothing was logged."""
    path = Path(folder, "log.csv")
    log = list(csv.DictReader(path.read_text().splitlines() if path.is_file() else ()))
    if not log or not {"stage", "step", "loss"} <= log[0].keys():
        raise ValueError(f"{path} is not there, or no log of this version; expected a run's folder")
    return log


def curves(args):
    """losses and scores over training, several runs in one picture"""
    columns, size = ("loss", "mse", "codes_used", *train.Run.SCORES), (760, 360)
    logs, pictures = {folder[-28:]: read_log(folder) for folder in args.runs}, []
    for stage, column in itertools.product(train.Run.STAGES, columns):
        series = {name: [(int(row["step"]), float(row[column])) for row in log
                         if row["stage"] == stage and row[column]] for name, log in logs.items()}
        if any(series.values()):
            pictures.append(plot(f"{stage}: {column}", "step", series, size, column in columns[:2]))
    pictures += [Image.new("RGB", size, "white")] * (len(pictures) % 2)
    rows = [np.hstack(pictures[i:i + 2]) for i in range(0, len(pictures), 2)]
    save(args, args.runs[0], Image.fromarray(np.vstack(rows)))


def method(config):
    """The nearest preset, and the flags that make a config from it: "small --decoder direct"."""
    aside = ("cache", "seed", "precision", "lender", "score_every")  # not of the method
    own, labels = {**dataclasses.asdict(config), "data": Path(config.data).name}, []
    for preset, values in train.PRESETS.items():
        usual = dataclasses.asdict(train.Config(**values))
        labels.append([preset, *(f"--{name.replace('_', '-')} {new}" for name, new in own.items()
                                 if new != usual[name] and name not in aside)])
    return " ".join(min(labels, key=len))


def argument(args):
    """DCI disentanglement against training compute: mean and range of the runs of each method"""
    methods, series = {}, {}  # {flags: (a config, {step: [D of each run]})}, {flags: points}
    for folder in map(Path, args.runs):
        try:
            log, (_, config, about) = read_log(folder), train.load_run(folder)
            if "disentanglement" not in about["scores"]:  # it would bend the mean of the others
                raise ValueError(f"{folder} is not finished, or has no scores")
            reached = {int(row["step"]): float(D) for row in log if (D := row["disentanglement"])}
            reached[config.steps] = about["scores"]["disentanglement"]
            _, points = methods.setdefault(method(config), (config, {}))
            for step, D in reached.items():
                points.setdefault(step, []).append(D)
        except ValueError as error:
            say(f"left out: {error}")
    if not methods:
        raise ValueError("no run is left; expected folders written by train.py, with scores")
    say("   TFLOP   runs    D, mean    lowest   highest")
    for name, (config, points) in methods.items():
        first, joint = train.training_tflop(config, train.step_flops(config))
        series[name] = [(first + joint * step / max(1, config.steps), np.mean(D), min(D), max(D))
                        for step, D in sorted(points.items())]
        row = [series[name][-1][0], len(points[max(points)]), *series[name][-1][1:], name]
        say("{:8.4g}{:7d}{:11.3f}{:10.3f}{:10.3f}   {}".format(*row))
    save(args, ".", plot("DCI disentanglement: mean, range", "training compute in TFLOP", series))


def complexity(run, args):
    """parameters, FLOPs (a multiply-add is two) and seconds of a sample (Table 5) on this device"""
    for name, part in run.model.named_children():
        say(f"{name:12s}{sum(p.numel() for p in part.parameters()):14,d} parameters")
    image, noise = torch.zeros(1, 3, *[run.config.size] * 2, device=run.device), run.noise(1)
    codes = run.codes(image)
    with FlopCounterMode(display=False) as counter:
        run.draw(codes, noise)  # the first call is slower than those that follow
    began = time.monotonic()
    run.draw(codes, noise).cpu()  # .cpu() waits for a GPU
    flops, seconds = counter.get_total_flops(), time.monotonic() - began
    tflop = sum(train.training_tflop(run.config, train.step_flops(run.config)))
    say(f"a sample: {run.options['steps']} passes of the denoiser, {flops / 1e9:,.1f} GFLOPs, "
        f"{seconds:.2f} s on {run.device}\nits training: {tflop:,.1f} TFLOP")


def encode(run, args):
    """the codes of the run's dataset, or of other images, into codes.npz for work downstream"""
    indices = run.some(args.count or len(run.dataset)).sort().values
    say(f"encoding {len(indices)} images of {run.dataset}")
    codes = train.encode(run.model, run.dataset, indices, run.device)
    arrays = {"codes": codes.numpy(), "indices": indices.numpy()}
    if run.dataset.factor_names:
        arrays["factors"] = run.dataset.factors(indices).numpy()
    path = args.out or run.folder / "codes.npz"
    train.write_atomically(path, lambda file: np.savez(file, **arrays))
    say(f"wrote {path}: " + ", ".join(f"{name} {a.shape}" for name, a in arrays.items()))


def export(run, args):
    """the averaged weights, config and scores in one small file, which every verb reads as a run"""
    # Half precision for what was learned. Buffers stay: half of abar_T = 2e-9 would be 0.
    learned = {name for name, _ in run.model.named_parameters()}
    weights = {name: value.cpu().half() if name in learned else value.cpu()
               for name, value in run.model.state_dict().items()}
    content = {"format": train.FORMAT, "config": dataclasses.asdict(run.config), "model": weights,
               "ema": {}, "stage": "joint training", **run.about}
    del content["folder"]  # where the run was does not belong in the file
    train.write_atomically(args.file, lambda file: torch.save(content, file))
    say(f"wrote {args.file}, {Path(args.file).stat().st_size / 1e6:.1f} MB; "
        f"try it: python sample.py swap {args.file}")


# ---- explore: a page to take the method apart by hand. Skip on first reading. -------------------

class Explorer:
    """Draws for the page. What it answers depends on the request alone, so clients cannot mix. A
    slider moves a token along its first principal component in the data, a scalar along itself."""

    def __init__(self, run):
        self.run, self.lock, names = run, threading.Lock(), named_tokens(run)
        seen = run.seen().cpu()[..., None].flatten(2)  # (M, N) -> (M, N, 1); (M, N, d) stays
        axis = torch.linalg.svd((seen - seen.mean(0)).transpose(0, 1), full_matrices=False).Vh[:, 0]
        self.axis = axis * axis.sum(1, keepdim=True).sign()  # (N, d)
        low, high = (seen * self.axis).sum(2).quantile(torch.tensor([0.01, 0.99]), dim=0).tolist()
        order = names or sorted(range(len(low)), key=lambda i: low[i] - high[i])  # widest first
        tokens = [{"i": i, "low": low[i], "high": high[i], "name": f"{names.get(i, '')} token {i}",
                   "idle": names.get(i) == "none" or high[i] - low[i] < 0.1} for i in order]
        setup = dict(run=str(run.name), images=len(run.dataset), tokens=tokens, **run.options)
        page = SHIPPED.with_name("explore.html").read_text("utf-8")
        # A factor may have any name; "<" could end the script that the names are in.
        self.page = page.replace("SETUP", json.dumps(setup).replace("<", "\\u003c"))

    def draw(self, asked):
        """tokens=s,t,0.3 asks for token 0 of the source, 1 of the target, 2 moved to place 0.3."""
        run, words, most = self.run, asked["tokens"].split(","), len(self.run.dataset)
        limits = {"source": most, "target": most, "noise": 2**32, "steps": 201}
        for name, limit in limits.items():
            train.need(0 <= int(asked[name]) < limit, name, asked[name], f"0 to {limit - 1}")
        source, target, noise, steps = (int(asked[name]) for name in limits)
        images = run.load([source, target])
        own = run.codes(images).cpu()  # (2, N) or (2, N, d)
        ends = own.reshape(2, len(self.axis), -1)
        places, codes = (ends * self.axis).sum(2), ends[0].clone()  # (2, N), (N, d)
        train.need(len(words) == len(codes), "tokens", asked["tokens"], f"{len(codes)} of them")
        for i, word in enumerate(words):
            if word == "t":
                codes[i] = ends[1, i]
            elif word != "s":
                codes[i] += (float(word) - places[0, i]) * self.axis[i]
        train.need(codes.abs().max() < 1e6, "tokens", asked["tokens"], "finite places")
        with self.lock, unet.record_attention(run.model) as layers:
            torch.manual_seed(noise)
            drawn = run.draw(codes.reshape(own[:1].shape).to(run.device), run.noise(1), steps=steps)
        maps = attention_maps(layers, run.config.size).transpose(0, 1) if layers else ()
        urls = []
        for image in (*images, *drawn, *(heat(drawn, m)[0] for m in maps)):
            to_picture(image).save(file := io.BytesIO(), "PNG", compress_level=1)
            urls.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
        return {"images": urls[:3], "maps": urls[3:], "places": places.tolist()}


class Handler(http.server.BaseHTTPRequestHandler):
    """GET of the page and of what it shows; all else is refused."""

    timeout = 10  # seconds that a client has to send its request
    log_message = lambda *_: None

    def do_GET(self):
        (path, _, query), host = self.path.partition("?"), self.headers.get("Host", "")
        kind, status, text = "plain", 404, "there are / and /draw"
        # A foreign page may ask too, or give 127.0.0.1 a name. Any port is right: of a tunnel, say.
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


# ---- The command line ---------------------------------------------------------------------------

def token(word):
    """An argument of --tokens: "all" or a number; ValueError, which argparse reports, otherwise."""
    return word if word == "all" else int(word)


FLAGS = {
    "run": dict(metavar="RUN", nargs="?", help="run's folder, or file of export; default: ours"),
    "runs": dict(metavar="RUN", nargs="+", help="folders written by train.py"),
    "file": dict(metavar="FILE", help="file to write: runs/small-0.pt, say"),
    "--count": dict(type=int, metavar="N", help="images or values to show (default: %(default)s)"),
    "--tokens": dict(type=token, nargs="+", metavar="I", help="rows or all; default: one a factor"),
    "--sampler": dict(default="dpm", choices=(*encdiff.SAMPLERS,), help="default: %(default)s"),
    "--steps": dict(default=20, type=int, metavar="N", help="default: 20 (ddpm: always all)"),
    "--lpips": dict(nargs=2, metavar="FILE", help="torchvision's AlexNet, lpips' alex.pth"),
    "--gif": dict(action="store_true", help="one animation instead, with four images"),
    "--port": dict(type=int, default=0, help="default: one that is free"),
    "--no-browser": dict(action="store_true", help="print the address, open nothing"),
    "--data": dict(metavar="PATH", help="dataset to use (default: the one of the training)"),
    "--seed": dict(type=int, default=0, help="fixes all that is random (default: 0)"),
    "--device": dict(choices=("cuda", "mps", "cpu"), help="default: the best here"),
    "--out": dict(metavar="FILE", help="default: in RUN, or in the working directory"),
}
FROM_DATA = "run --data --seed --device "
PICTURE = "--count --sampler --steps --out " + FROM_DATA
VERBS = {  # the usual --count, and the flags that a verb takes
    reconstruct: (256, "--lpips " + PICTURE),
    swap: (8, "--tokens " + PICTURE),
    traverse: (9, "--tokens --gif " + PICTURE),
    attention: (8, "--tokens " + PICTURE),
    generate: (32, PICTURE),
    importance: (None, "run --out"), kl: (None, "--out"),
    worth: (256, "--count --out " + FROM_DATA),
    curves: (None, "runs --out"), argument: (None, "runs --out"),
    complexity: (None, "run --sampler --steps --device"),
    encode: (None, "--count --out " + FROM_DATA),
    export: (None, "run file"), explore: (None, "--port --no-browser " + FROM_DATA),
}


def parse(arguments):
    """The command line as a namespace with a value for every flag; its `function` is the verb."""
    parser = train.Parser("sample.py", description=__doc__.splitlines()[0])
    parser.set_defaults(function=lambda args: say(parser.format_help()), count=None)
    parser.set_defaults(**{flag[2:]: FLAGS[flag].get("default") for flag in FLAGS if "--" in flag})
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for function, (count, flags) in VERBS.items():
        p = verbs.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        for flag in flags.split():
            p.add_argument(flag, **FLAGS[flag])
        p.set_defaults(function=function, count=count)
    args = parser.parse_args(arguments)
    train.need(args.count is None or args.count >= 1, "count", args.count, "at least 1")
    return args


def main(arguments=None):
    """Run one verb. Raises ValueError or OSError, one line, for what a user gets wrong."""
    args = parse(arguments)
    opened = [Trained(args)] if hasattr(args, "run") else []
    args.function(*opened, args)


if __name__ == "__main__":
    with train.one_line_errors():
        main()

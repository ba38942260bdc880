"""Pictures, tables and a page from a trained run: what each token means, and what it costs.

WHERE     Read last, after data.py. Reads a run and its dataset; imports all the other files.
PAPER     arXiv 2402.09712, Figures 2(b) and 5 to 9, Tables 2, 5 and 8. Eq. (5) is in encdiff.py.
SHAPES    B images, N tokens, F factors, K columns of a picture, S the side of an image; images
          (B, 3, S, S) in [-1, 1], codes (B, N), or (B, N, d) where a token is a vector. A list
          `tokens` holds numbers 0 to N-1. Token i is made of code i, so to exchange a token is to
          exchange its code.
IDEA      In swap and traverse all rows of a picture start from the same noise z_T, so what differs
          is the tokens alone.
            swap        a row takes one factor's tokens from the target: only that should change
            traverse    a factor's tokens take the values that they have in the data
            attention   where in the image a token is read
            generate    every token comes from another image: each image should still be good
            importance  DCI's matrix: a code should matter for one factor, a factor need one code
            worth       how far the trained network relies on a factor's tokens at each timestep
            kl          the paper's bottleneck, Eq. (5): how far step t is from plain noise, in nats
            bayes       at which timesteps the toy's best denoiser needs a token for a factor
            agree       do runs of different seeds find the same codes? This needs no labels
            explore     sliders in the browser; page: one HTML file that needs no Python
          The model never sees a label. Where a token has a name, it was named after training: by
          the factor that explains most of its code's variance (metrics.tokens_of_factors).
DIFFERS   The paper samples in 200 steps, we in 20 of DPM-Solver++ (200 of DDIM: --sampler ddim
          --steps 200). A sweep visits quantiles of the values in the data, not equal distances;
          so it also works for vector-valued tokens, in the order of their principal component.
TRY       python sample.py        ->   the verbs
          python sample.py swap   ->   swap.png from the trained model that comes with the code
"""
import argparse
import base64
import contextlib
import csv
import dataclasses
import functools
import glob
import http.server
import io
import itertools
import json
import math
import os
import socketserver
import sys
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
import vq
from metrics import batched, exchange, tokens_of_factors
from train import print_safely, require, to_float

SHIPPED = Path(__file__).parent / "assets" / "small.pt"  # the model that comes with the code
NAMED = "tokens are named afterwards, by labels that the model never saw"

# ---- A trained run, opened ----------------------------------------------------------------------


class OpenedRun:
    """A trained run and its dataset, ready to encode and to draw.

    path     run's folder or file of export; None: the model that comes with the code
    data     dataset file or folder; None: the one that the run was trained on
    cache    folder for the converted dataset; None: as in the training
    device   "cuda", "mps", "cpu"; None: the best of this computer
    seed     integer: the same seed shows the same images for every run
    sampler  a key of encdiff.SAMPLERS; steps: how many steps it takes
    eta      noise that the sampler ddim adds, 0 (none) to 1 (as much as ddpm); None: its default

    It has model (with averaged weights), config, scores and factor_names of the run, and two
    tables (N, F), or (0,) without scores: `importance`, of DCI, and `explained`, of
    metrics.variance_explained, by which tokens are named. Raises ValueError, one line, for what
    cannot be opened.
    """

    def __init__(self, path=None, data=None, cache=None, device=None, seed=0,
                 sampler="dpm", steps=20, eta=None):
        if not path:
            print_safely(f"no RUN given: using the trained model of the code, {SHIPPED}")
        self.path = Path(path or SHIPPED)
        self.device = train.Backend(device).device
        self.model, self.config, about = train.load_run(self.path, self.device)

        self.about = about
        self.folder = about["folder"]
        self.scores = about["scores"]
        self.factor_names = about["data"].get("factor_names", [])
        self.importance = np.array(self.scores.get("importance", ()), float)
        self.explained = np.array(self.scores.get("variance_explained", ()), float)
        if self.importance.size and not self.explained.size:
            print_safely(f"tokens have no names: {self.path} was scored by earlier code; "
                         f"{train.in_shell('python', 'train.py', '--resume', self.path)} mends it")
        self.data = os.path.expanduser(data) if data else None
        self.cache = os.path.expanduser(cache) if cache else None

        self.options = {"sampler": sampler, "steps": steps}
        if not removes_noise(self.model):  # it draws in one pass
            self.options["steps"] = 1
        if eta is not None:
            require(sampler == "ddim" and removes_noise(self.model), "eta", eta,
                    "--sampler ddim beside it, and a run that removes noise")
            require(0 <= eta <= 1, "eta", eta, "0 to 1")
            self.options["eta"] = eta
        torch.manual_seed(seed % 2**64)  # torch takes no larger ones

    @functools.cached_property
    def dataset(self):
        """The dataset of the run, or that of --data; opened by the verbs that need it."""
        path = self.data or self.config.data or None
        if path and not Path(path).exists():
            raise ValueError(f"{path} is not there; if it has moved, say where it is with --data")

        cache = self.cache
        if not cache and Path(self.config.cache).is_dir():  # the training's, if it still exists
            cache = self.config.cache
        dataset = data.open_dataset(path, self.config.size, cache or None)
        if self.about["data"] not in ({}, dataset.identity):
            print_safely(f"{dataset.name} is not what the run was trained on")
        return dataset

    def count(self, asked, usual, images_each=1):
        """How many to show: as many as asked for, or (None) the usual number or all that exist."""
        available = len(self.dataset) // images_each
        require(available >= 1, "data", self.dataset.name, f"a set of {images_each} images or more")
        if asked is None:
            return min(usual, available)
        require(asked <= available, "count", asked,
                f"at most {available}: {self.dataset.name} has {len(self.dataset)} images")
        return asked

    def random_indices(self, count):
        """The positions of `count` different random images in the dataset (count,)."""
        return torch.randperm(len(self.dataset))[:count]

    def load(self, indices):
        """Images of the dataset at these positions (B, 3, S, S) in [-1, 1]."""
        return train.load_images(self.dataset, indices, self.device)

    def random_images(self, count):
        """Random images of the dataset (count, 3, S, S) in [-1, 1]."""
        return self.load(self.random_indices(count))

    def codes(self, images):
        """Images (B, 3, S, S) in [-1, 1] -> codes (B, N) or (B, N, d)."""
        return batched(self.model.represent, images)

    def codes_of_data(self):
        """Codes (M, N) or (M, N, d) of many random images: the values that occur in the data."""
        return self.codes(self.random_images(min(2000, len(self.dataset))))

    def noise(self, count):
        """z_T (count, *latent_shape), drawn on the CPU: a seed means the same on every device."""
        return torch.randn(count, *self.model.latent_shape).to(self.device)

    def draw(self, codes, noise, **changes):
        """Codes (B, N) or (B, N, d) and z_T (B, ...) -> images (B, 3, S, S) in [-1, 1].
        changes: of the options of the sampler, steps=5 for one."""
        return metrics.draw(self.model, codes, noise, **{**self.options, **changes})

    def draw_all(self, variants, noise):
        """Several codes for the same noise z_T (B, ...): V times (B, N) -> V times (B, 3, S, S)."""
        images = self.draw(torch.cat(variants), torch.cat([noise] * len(variants)))
        return list(images.split(len(noise)))


# ---- The verbs: what each does is its --help ----------------------------------------------------


def swap(run, args):
    """source, target, and the source with one factor's tokens from the target (Figures 5, 7, 8)

    Where every combination of factors has an image, a table follows: the share of exchanges that
    land (this factor becomes what was asked for), the share that are clean (all others stay, too),
    and how often an image that is redrawn without an exchange stays as it is."""
    rows = picture_rows(run, args.tokens)
    count = run.count(args.count, usual=8, images_each=2)
    source, target = run.random_images(2 * count).split(count)

    source_codes = run.codes(source)
    target_codes = run.codes(target)

    variants = [source_codes]
    labels = ["source", "target", "redrawn\nall of the source"]
    for name, tokens in rows:
        variants.append(exchange(source_codes, target_codes, tokens))
        labels.append(row_label(name, tokens))
    drawn = run.draw_all(variants, run.noise(count))
    save(args, run.folder, grid([source, target, *drawn], labels))
    if run.explained.size:
        print_exchanges(run, args)


def print_exchanges(run, args):
    """The table of metrics.exchanges_that_land, or why there is none."""
    seed = args.seed % 2**64  # torch takes no larger ones
    try:
        check_factors(run.dataset, run.explained)
        print_safely("counting exchanges: about a minute on one core")
        shares = metrics.exchanges_that_land(run.model, run.dataset, run.explained, run.device,
                                             seed=seed, **run.options)
    except ValueError as error:
        print_safely(f"no share of exchanges that land: {error}")
        return

    if not shares:
        print_safely("no share of exchanges that land: no pair differs in a factor")
        return

    print_safely("exchange of               lands    clean   no exchange")
    shares["mean"] = np.mean(list(shares.values()), axis=0)
    for name, (lands, clean, control) in shares.items():
        print_safely(f"  {name:22.22s}{lands:7.2f}{clean:9.2f}{control:13.2f}")


def traverse(run, args):
    """one image with each factor in turn swept over the values that it has in the data

    All tokens of a factor move together: they take the codes of real images, which are sorted by
    the token of which this factor explains most.
    """
    if args.gif:
        require(not args.out or args.out.lower().endswith(".gif"), "out", args.out,
                "a name that ends in .gif, as --gif draws an animation")

    rows = picture_rows(run, args.tokens)
    codes = run.codes_of_data()  # (M, N) or (M, N, d)
    order = metrics.scalar_codes(codes).argsort(0)  # (M, N): the images sorted by each token
    quantiles = np.linspace(0.01, 0.99, args.count or 9)
    ranks = (quantiles * (len(codes) - 1)).round().astype(int)  # (K,)

    images = run.random_images(run.count(None, usual=4 if args.gif else 1))
    image_codes = run.codes(images)
    noise = run.noise(len(images))
    labels = []
    sweeps = []
    for name, tokens in rows:
        # The images at the quantiles of this factor's first token.
        values = codes[order[ranks, tokens[0]]]  # (K, N) or (K, N, d)
        variants = [image_codes]
        for value in values:
            variants.append(exchange(image_codes, value[None], tokens))
        sweeps.append(run.draw_all(variants, noise))
        labels.append(row_label(name, tokens))

    if args.gif:
        save_animation(args, run, labels, sweeps)
        return
    headings = ["input", "redrawn", *(f"{quantile:.0%}" for quantile in quantiles)]
    picture_of_rows = [torch.cat([images, *sweep]) for sweep in sweeps]
    save(args, run.folder, grid(picture_of_rows, labels, headings))


def save_animation(args, run, labels, sweeps):
    """A frame for each value of each row: (V, images) up, and down again."""
    frames = []
    for label, (_, *up) in zip(labels, sweeps):
        down = up[-2:0:-1]
        for images in up + down:
            frames.append(grid([images], [label]))

    # The labels differ in width; aligned at the right, the images stay where they are.
    size = (max(frame.width for frame in frames), frames[0].height)
    small = []
    for frame in frames:
        frame = ImageOps.pad(frame, size, color="white", centering=(1, 0))
        # With 64 colours the 96 frames of six rows take less than 2 MB.
        small.append(frame.quantize(64, dither=Image.Dither.NONE))
    save(args, run.folder, small[0], ".gif", small[1:])


def attention(run, args):
    """where in the image each token is read while it is drawn (Figures 6, 9)

    Where every combination of factors has an image, a table follows: the share of a token's
    attention that lies on the pixels that its factor changes, and how much of the image these
    pixels are."""
    rows = picture_rows(run, args.tokens)
    indices = run.random_indices(run.count(args.count, usual=8))
    codes = run.codes(run.load(indices))
    noise = run.noise(len(indices))
    with unet.record_attention(run.model) as records:
        if not records:
            raise ValueError(f"{run.path} has no cross-attention; expected a model that has")
        drawn = run.model.sample(run.model.tokens(codes), noise=noise, **run.options)
    maps = attention_maps(records, run.config.size)  # (B, N, S, S)

    images = [drawn]
    labels = ["sample"]
    for name, (token, *_) in rows:
        of_token = maps[:, token]  # (B, S, S)
        label = row_label(name, [token])
        images.append(heat(drawn, of_token))
        labels.append(f"{label}  {of_token.min():.2f} - {of_token.max():.2f}")
    print_safely("colours: from the lowest to the highest share of a row; "
                 f"an equal share is {1 / run.config.num_tokens:.2f}")
    save(args, run.folder, grid(images, labels))
    if run.explained.size:
        print_attention_on_changes(run, indices, maps)


def print_attention_on_changes(run, indices, maps):
    """How much of the attention (B, N, S, S) lies where a factor changes these images (B,)."""
    lines = ["on the pixels that change  attention  of the image"]
    images = run.load(indices)[:, None]  # (B, 1, 3, S, S)
    try:
        check_factors(run.dataset, run.explained)
        if not run.dataset.is_complete:
            raise ValueError(f"{run.dataset.name} has a combination of factors without an image, "
                             "or with several that differ")
        factors = run.dataset.factors(indices)  # (B, F)
        for j, tokens in enumerate(tokens_of_factors(run.explained)):
            if tokens:
                variants = metrics.images_of_values(run.dataset, factors, j)
                differ = (variants.to(run.device) - images).abs() > 0.1  # (B, K, 3, S, S)
                mask = differ.any(2).any(1).float()  # (B, S, S)
                of_token = maps[:, tokens[0]]  # of the purest one, (B, S, S)
                share = (of_token * mask).sum() / of_token.sum()
                name = run.factor_names[j]
                lines.append(f"  {name:22.22s}{share:10.2f}{mask.mean():12.2f}")
    except ValueError as error:
        lines = [f"no share of attention on what changes: {error}"]
    print_safely("\n".join(lines))


def attention_maps(records, size):
    """Attention (B, P, N) in each layer and call -> its mean over both, (B, N, size, size)."""
    maps = []
    for calls in records:
        of_layer = torch.stack(calls).mean(0).transpose(1, 2)  # (B, P, N) -> (B, N, P)
        side = math.isqrt(of_layer.shape[2])
        of_layer = of_layer.unflatten(2, (side, side))  # (B, N, P) -> (B, N, side, side)
        maps.append(F.interpolate(of_layer, (size, size), mode="bilinear"))
    return torch.stack(maps).mean(0)


def generate(run, args):
    """new combinations: every token is taken from another image"""
    count = args.count or 32
    codes = recombined(run.codes_of_data(), count)
    drawn = run.draw(codes, run.noise(count))
    rows = drawn.split(8)
    save(args, run.folder, grid(rows, [""] * len(rows)))


def recombined(codes, count):
    """Codes (M, N) or (M, N, d) -> (count, N, ...), each token of another random image."""
    M, N = codes.shape[:2]
    images = torch.randint(M, (count, N))
    return codes[images, range(N)]


def reconstruct(run, args):
    """inputs, first stage and samples from the tokens, with SSIM, MSE and LPIPS (Table 8)"""
    scores = {"SSIM": metrics.ssim, "MSE": metrics.mse}
    if args.lpips:
        weights = metrics.load_lpips(*args.lpips)
        scores["LPIPS"] = functools.partial(metrics.lpips, weights=weights)

    count = run.count(args.count, usual=256)
    images = run.random_images(count)
    rows = {}
    if hasattr(run.model, "first_stage"):
        latents = batched(run.model.latents, images)
        rows["first stage"] = batched(run.model.decode, latents)
    rows["sample"] = run.draw(run.codes(images), run.noise(count))

    title = f"{count} images"
    print_safely(f"{title:14s}" + "".join(f" {name:>9}" for name in scores))
    for name, drawn in rows.items():
        line = f"{name:14s}"
        for score in scores.values():
            # The scores are defined on [0, 1].
            of_images = batched(score, (images + 1) / 2, (drawn + 1) / 2)
            line += f" {of_images.mean().item():9.4g}"
        print_safely(line)
    rows = {"input": images, **rows}
    save(args, run.folder, grid([row[:8] for row in rows.values()], list(rows)))


def importance(run, args):
    """DCI's matrix, factors x codes, with D of each code and C of each factor at the margins"""
    matrix = run.importance  # (N, F)
    if not matrix.size:
        reason = run.scores.get("note", "no scores")
        raise ValueError(f"{run.path} has no importance matrix ({reason}); "
                         "expected a run with labels")

    order = [token for _, tokens in token_groups(run) for token in tokens]
    coordinate = torch.linspace(-1, 1, 64).abs()
    distance = torch.maximum(coordinate, coordinate[:, None])  # (64, 64): 0 in the middle

    rows = []
    labels = []
    for j, name in enumerate(drawable(run.factor_names, "factor")):
        colour = to_float(torch.tensor(PALETTE[j % len(PALETTE)]))[:, None, None]
        squares = []
        for i in order:
            inside = distance < matrix[i, j] ** 0.5  # a square whose area is the importance
            squares.append(torch.where(inside, colour, 0.9))
        rows.append(torch.stack(squares))  # (N, 3, 64, 64)
        labels.append(f"{name}\nC {focus_text(matrix[:, j])}")
    scored = matrix.any(axis=0)  # (F,): not those that DCI left out
    headings = [f"{i} D {focus_text(matrix[i, scored])}" for i in order]

    print_safely(NAMED)
    for name in ("disentanglement", "completeness"):
        if name in run.scores:
            print_safely(f"{name} {name[0].upper()} {run.scores[name]:.3f}")
    save(args, run.folder, grid(rows, labels, headings))


def focus_text(importance):
    """metrics.focus of one code or factor as a text; "-" of fewer than two numbers."""
    if len(importance) < 2:
        return "-"
    return f"{metrics.focus(importance[None]):.2f}"


def check_factors(dataset, explained):
    """ValueError unless the dataset has as many factors as the table explained (N, F)."""
    if len(dataset.factor_sizes) != explained.shape[1]:
        raise ValueError(f"{dataset.name} has {len(dataset.factor_sizes)} factors; expected the "
                         f"{explained.shape[1]} that the run was scored with")


def picture_rows(run, asked):
    """What the rows of a picture show: a list of (name, tokens); the purest token of the factor
    comes first.

    asked is --tokens: a list of numbers or "all", or None. Without it a row is a factor with all of
    its tokens, if tokens have names; otherwise a row is a single token.
    """
    N = run.config.num_tokens
    for token in asked or ():
        require(token == "all" or 0 <= token < N, "tokens", token, f"0 to {N - 1}, or all")
    groups = token_groups(run)
    names = drawable([name for name, _ in groups], "factor")
    groups = [(name, tokens) for name, (_, tokens) in zip(names, groups)]
    # The last group belongs to no factor; without scores it is the only one.
    named = [(name, tokens) for name, tokens in groups[:-1] if tokens]
    if named:
        print_safely(NAMED)
        if not asked:
            print_safely("a row is a factor (--tokens all: a row is a token)")
            return named

    rows = []
    for name, tokens in groups:
        for token in tokens:
            if not asked or "all" in asked or token in asked:
                rows.append((name, [token]))
    return rows


def token_groups(run):
    """[(factor, its tokens), ..., ("no factor", tokens)]; without scores [("", all tokens)]."""
    N = run.config.num_tokens
    if not run.explained.size:
        return [("", list(range(N)))]
    lists = tokens_of_factors(run.explained)
    named = set(itertools.chain(*lists))
    unnamed = [token for token in range(N) if token not in named]
    return [*zip(run.factor_names, lists), ("no factor", unnamed)]


def row_label(name, tokens):
    """The two lines at the left of a row, or one line if the tokens have no name."""
    word = "token" if len(tokens) == 1 else "tokens"
    numbers = f"{word} {', '.join(map(str, tokens))}"
    return f"{name}\n{numbers}" if name else numbers


# ---- Verbs that count and compare, the page, drawing, command line. Skip on first reading. ------


def removes_noise(model):
    """Whether the model removes noise step by step; EncDec and the VAEs draw in one pass."""
    return not isinstance(model, (encdiff.EncDec, vq.VAE))


def worth(run, args):
    """how far the trained network relies on a factor's tokens at each timestep

    The rise of the loss of Eq. (3) if the codes are those of an image in which one factor has
    another value. It measures the trust of the trained network, not what a factor's token could
    save it."""
    dataset = run.dataset
    if not removes_noise(run.model):
        raise ValueError(f"{run.path} draws without noise; expected a model that removes noise")
    require(dataset.is_complete, "data", dataset.name,
            "a dataset with an image of every combination of its factors")
    count = run.count(args.count, usual=256)
    factors = dataset.factors(run.random_indices(count)).numpy()  # (B, F)
    z0 = run.model.latents(run.load(dataset.find(factors)))
    noise = run.noise(count)
    T = len(run.model.alpha_bar) - 1
    timesteps = np.linspace(max(1, T / 100), T, 12).round().astype(int).tolist()

    with_right_codes = losses(run, z0, noise, timesteps, factors)
    rises = {}
    for j, (name, size) in enumerate(zip(dataset.factor_names, dataset.factor_sizes)):
        shift = torch.randint(1, max(2, size), (count,)).numpy()
        wrong = factors.copy()
        wrong[:, j] = (wrong[:, j] + shift) % size  # another value of factor j alone
        rises[name] = losses(run, z0, noise, timesteps, wrong) - with_right_codes
    title = "rise of the loss if a factor is wrong in the codes"
    show_over_time(args, run.folder, title, timesteps, rises)


def losses(run, z0, noise, timesteps, factors):
    """Eq. (3) at each of the timesteps (K,), of the same z_0 and noise (B, C, h, w), with the
    tokens of the images that have these factors (B, F)."""
    images = run.load(run.dataset.find(factors))
    tokens = run.model.tokens(run.codes(images))
    values = []
    for timestep in timesteps:
        t = torch.full((len(z0),), timestep, device=run.device)
        z_t = run.model.add_noise(z0, t, noise)
        predicted = batched(run.model.denoiser, z_t, t, tokens)
        values.append(F.mse_loss(predicted, noise).item())
    return np.array(values)


def kl(args):
    """the bottleneck of Eq. (5) under the four schedules, for unit variance (Figure 2b)"""
    timesteps = range(10, 1001, 10)  # from 10 on, as it is infinite at t = 1
    nats = {}
    for name in encdiff.SCHEDULES:
        betas = encdiff.beta_schedule(name, 1000)
        nats[name] = encdiff.kl_bottleneck(betas)[9::10].tolist()
    title = "KL( q(z_{t-1} | z_t, z_0) || N(0, I) ), in nats for each dimension"
    show_over_time(args, ".", title, timesteps, nats)


def bayes(args):
    """what a token is needed for: how much the toy's loss rises at each timestep without a factor

    The toy is that of encdiff.py, the denoiser the best one possible. No network is trained."""
    torch.manual_seed(0)
    timesteps = range(25, 1000, 25)
    rises = torch.stack([encdiff.bayes_rise(t) for t in timesteps])  # (timesteps, 4)
    series = {}
    for name, values in zip(("wall", "floor", "block", "place"), rises.T):
        series[name] = values.tolist()
    show_over_time(args, ".", "rise of the loss if this factor is not known", timesteps, series)


def show_over_time(args, folder, title, timesteps, series):
    """Print twelve points of each of the series {name: [value at each timestep]}, plot all."""
    every = len(timesteps) // 11
    for name, values in {"t": timesteps, **series}.items():
        row = "".join(f" {value:9.4g}" for value in values[::every])
        print_safely(f"{name:14s}{row}")

    names = drawable(list(series), "factor")
    points = {}
    for name, values in zip(names, series.values()):
        points[name] = list(zip(timesteps, values))
    save(args, folder, plot(title, "timestep t", points))


def fid(run, args):
    """FID of drawn images and the dataset's (Table 2); it was never run with the real weights

    Every token of a drawn image is taken from another image of the dataset, or, with --redraw, all
    of them from one. The network that FID compares by is a file that has to be fetched elsewhere:
    NVIDIA's inception-2015-12-05.pt. It is a program: use only a file that you trust. This verb
    was tested with a stand-in for that file, so check its first result against a published one."""
    network = metrics.load_inception(args.inception)
    count = run.count(args.count, usual=10_000)
    indices = run.random_indices(count)
    codes = train.encode(run.model, run.dataset, indices, run.device)  # (n, N) or (n, N, d)
    if not args.redraw:
        codes = recombined(codes, count)

    drawn = []
    for part in codes.split(256):
        drawn.append(train.to_bytes(run.draw(part.to(run.device), run.noise(len(part)))))
    distance = metrics.fid(torch.cat(drawn), run.dataset.images(indices), network)
    print_safely(f"FID {distance:.2f} of {count} drawn images and as many of the dataset")


def agree(args):
    """do runs find the same codes? One score a run (UDR), without labels

    All runs encode the same 2,000 images. A run that agrees with runs of other seeds found codes
    that come from the data and not from its seed (Duan et al. 2020)."""
    paths = existing_runs(args.runs)
    if len(paths) < 2:
        raise ValueError(f"there is one run, {paths[0]}; expected two runs or more to compare")
    runs = []
    for path in paths:
        run = OpenedRun(path, args.data, args.cache, args.device, args.seed)
        runs.append(run)
        size = runs[0].config.size
        if run.config.size != size:
            raise ValueError(f"{path} has images of {run.config.size} pixels; expected {size}, as "
                             f"{paths[0]} has")

    dataset = runs[0].dataset
    indices = runs[0].random_indices(2000)
    tables = []
    for path, run in zip(paths, runs):
        if run is not runs[0] and run.about["data"] not in ({}, dataset.identity):
            print_safely(f"{path} was not trained on {dataset.name}")
        tables.append(train.encode(run.model, dataset, indices, run.device))
    print_safely(f"{len(indices)} images of {dataset.name}; the higher, the more a run agrees with "
                 "the others")
    for name, value in zip(short_names(paths), metrics.agreement(tables)["udr"]):
        print_safely(f"{value:8.3f}   {name}")


def curves(args):
    """losses and scores over training, several runs in one picture"""
    paths = existing_runs(args.runs)
    logs = [read_log(path) for path in paths]
    names = drawable(short_names(paths), "run")
    size = (760, 360)
    pictures = []
    for stage in train.Run.STAGES:
        for column in ("loss", "mse", "entries_used", *train.Run.SCORES):
            series = {}
            for name, log in zip(names, logs):
                series[name] = points_of(log, stage, column)
            if any(series.values()):
                logarithmic = column in ("loss", "mse")
                pictures.append(plot(f"{stage}: {column}", "step", series, size, logarithmic))

    # Two in a row; the last place may be empty.
    width, height = size
    lines = math.ceil(len(pictures) / 2)
    canvas = Image.new("RGB", (2 * width, height * lines), "white")
    for k, picture in enumerate(pictures):
        line, column = divmod(k, 2)
        canvas.paste(picture, (column * width, line * height))
    save(args, paths[0], canvas)


def points_of(log, stage, column):
    """[(step, value)] of a column of a log in one of the training's stages."""
    points = []
    for row in log:
        if row["stage"] == stage and row.get(column):
            value = float(row[column])
            if math.isfinite(value):
                points.append((int(row["step"]), value))
    return points


def argument(args):
    """DCI disentanglement against training compute: mean and range of the runs of each method

    Points before the last one of a method are quick scores, of fewer images."""
    methods = {}  # {flags: (a config, {step: [D of each run]})}
    for path in existing_runs(args.runs):
        try:
            name, config, reached = disentanglement_over_steps(path)
        except (ValueError, OSError) as error:
            print_safely(f"left out: {error}")
            continue
        _, points = methods.setdefault(name, (config, {}))
        for step, D in reached.items():
            points.setdefault(step, []).append(D)
    if not methods:
        raise ValueError("no run has scores; expected folders written by train.py, with labels")

    print_safely("   TFLOP   runs    D, mean    lowest   highest")
    series = []
    for name, (config, points) in methods.items():
        of_first_stage, of_joint = train.training_tflop(config, train.step_flops(config))
        line = []
        for step, D in sorted(points.items()):
            tflop = of_first_stage + of_joint * step / max(1, config.steps)
            line.append((tflop, np.mean(D), min(D), max(D)))
        series.append(line)
        tflop, mean, low, high = line[-1]
        print_safely(f"{tflop:8.4g}{len(D):7d}{mean:11.3f}{low:10.3f}{high:10.3f}   {name}")
    series = dict(zip(drawable(list(methods), "method"), series))
    save(args, ".", plot("DCI disentanglement: mean, range", "training compute in TFLOP", series))


def disentanglement_over_steps(path):
    """A finished run -> its method, its config, {step: D}. ValueError if it has no scores."""
    log = read_log(path)
    _, config, about = train.load_run(path)
    if "disentanglement" not in about["scores"]:  # it would bend the mean of the others
        raise ValueError(f"{path} is not finished, or has no scores")
    reached = dict(points_of(log, "joint training", "disentanglement"))
    reached[config.steps] = about["scores"]["disentanglement"]
    return method(config), config, reached


def method(config):
    """The nearest preset, and the flags that make a config from it: "small --variant direct"."""
    values = dataclasses.asdict(config)
    values["data"] = Path(config.data).name
    for name in ("cache", "seed", "precision", "first_stage_from", "score_every", "log_every"):
        values.pop(name)  # not of the method
    descriptions = []
    for preset, changes in train.PRESETS.items():
        usual = dataclasses.asdict(train.Config(**changes))
        words = [preset]
        for name, value in values.items():
            if value != usual[name]:
                words.append(f"--{name.replace('_', '-')} {value}")
        descriptions.append(words)
    return " ".join(min(descriptions, key=len))


def complexity(run, args):
    """parameters, FLOPs (a multiply-add is two) and seconds of a sample (Table 5) on this device"""
    for name, part in run.model.named_children():
        count = sum(parameter.numel() for parameter in part.parameters())
        print_safely(f"{name:12s}{count:14,d} parameters")

    image = torch.zeros(1, 3, run.config.size, run.config.size, device=run.device)
    codes = run.codes(image)
    noise = run.noise(1)

    with FlopCounterMode(display=False) as counter:
        run.draw(codes, noise)  # the first call is slower than those that follow
    began = time.monotonic()
    run.draw(codes, noise).cpu()  # .cpu() waits for a GPU
    seconds = time.monotonic() - began
    gflop = counter.get_total_flops() / 1e9

    tflop = sum(train.training_tflop(run.config, train.step_flops(run.config)))
    print_safely(f"a sample: {gflop:,.1f} GFLOP, {seconds:.2f} s on {run.device}\n"
                 f"its training: {tflop:,.1f} TFLOP")


def encode(run, args):
    """the codes of the run's dataset, or of other images, into an .npz file for work downstream"""
    name = f"codes-{Path(args.data).stem}.npz" if args.data else "codes.npz"
    path = args.out or run.folder / name
    own = not args.out and not args.data and run.folder != Path()  # an export has no folder
    if not own:
        require_new(path)
    count = run.count(args.count, usual=len(run.dataset))
    print_safely(f"encoding {count} images of {run.dataset}")
    indices = run.random_indices(count).sort().values
    codes = train.encode(run.model, run.dataset, indices, run.device)
    arrays = {"codes": codes.numpy(), "indices": indices.numpy()}
    if run.dataset.factor_names:
        arrays["factors"] = run.dataset.factors(indices).numpy()
    train.write_atomically(path, lambda file: np.savez(file, **arrays))
    print_safely(f"wrote {path}")
    for name, array in arrays.items():
        print_safely(f"  {name:8s} {array.dtype} {array.shape}")


def export(run, args):
    """the averaged weights, config and scores in one small file, which every verb reads as a run"""
    require_new(args.file)

    # Half precision for what was learned. Buffers stay: half of abar_T = 2e-9 would be 0.
    learned = {name for name, _ in run.model.named_parameters()}
    weights = {}
    for name, value in run.model.state_dict().items():
        weights[name] = value.cpu().half() if name in learned else value.cpu()

    content = {"format": train.FORMAT, "config": dataclasses.asdict(run.config), "model": weights,
               "ema": {}, "stage": "joint training", **run.about}
    del content["folder"]  # where the run was does not belong in the file
    train.write_atomically(args.file, lambda file: torch.save(content, file))
    megabytes = Path(args.file).stat().st_size / 1e6
    print_safely(f"wrote {args.file}, {megabytes:.1f} MB; "
                 f"try it: {train.in_shell('python', 'sample.py', 'swap', args.file)}")


def require_new(path):
    """ValueError if the file exists: weights, a dataset or codes that it has would be lost."""
    if Path(path).exists():
        raise ValueError(f"{path} exists; expected the name of a new file")


# ---- Pages for the browser ---------------------------------------------------------------------


def page(run, args):
    """one file that shows the run in a browser, to pass on: its images are drawn beforehand

    Each named factor is swept over its values by a slider, and taken from a target by a button."""
    groups = [(name, tokens) for name, tokens in token_groups(run)[:-1] if tokens]
    groups = groups[:6]  # of which there are 64 combinations
    if not groups:
        raise ValueError(f"no token of {run.path} has a name: "
                         f"{run.scores.get('note') or 'there are no scores'}; expected a run that "
                         "was scored with labels")
    check_factors(run.dataset, run.explained)
    print_safely(NAMED)

    count = run.count(None, usual=3, images_each=2)
    source, target = run.random_images(2 * count).split(count)
    source_codes = run.codes(source)
    target_codes = run.codes(target)
    noise = run.noise(count)

    indices = run.random_indices(5000)
    codes = train.encode(run.model, run.dataset, indices, run.device)
    labels = run.dataset.factors(indices)  # (M, F)
    factors = []
    sweeps = []
    for name, tokens in groups:
        of_factor = labels[:, run.factor_names.index(name)]
        values = typical_codes(codes, of_factor).to(run.device)  # (K, N) or (K, N, d)
        variants = [exchange(source_codes, value[None], tokens) for value in values]
        sweeps.append(torch.stack(run.draw_all(variants, noise), dim=1))  # (count, K, 3, S, S)
        factors.append({"name": name, "values": len(values)})

    # Every set of factors from the target; factor k is in the sets whose number has bit k.
    variants = []
    for number in range(2 ** len(groups)):
        taken = []
        for k, (_, tokens) in enumerate(groups):
            if number >> k & 1:
                taken += tokens
        variants.append(exchange(source_codes, target_codes, taken))
    exchanges = torch.stack(run.draw_all(variants, noise), dim=1)  # (count, sets, 3, S, S)

    columns = min(8, len(variants))
    sources = []
    for k in range(count):
        sources.append({"source": jpeg([source[k:k + 1]]),
                        "target": jpeg([target[k:k + 1]]),
                        "sweeps": jpeg([sweep[k] for sweep in sweeps]),
                        "exchanges": jpeg(exchanges[k].split(columns))})
    widest = max(factor["values"] for factor in factors)
    setup = {"factors": factors, "widest": widest, "columns": columns, "sources": sources}
    text = page_text("page.html", setup)
    train.write_atomically(args.file, text)
    print_safely(f"wrote {args.file}, {len(text) / 1e6:.2f} MB; open it in a browser")


def typical_codes(codes, labels, most=12):
    """Codes (M, N) or (M, N, d) of images with these labels (M,) of a factor -> for each of its
    values, at most so many, the median of the images that have it: (K, N) or (K, N, d)."""
    values = labels.unique()
    typical = []
    for k in np.linspace(0, len(values) - 1, min(most, len(values))).round():
        having_it = codes[labels == values[int(k)]]
        typical.append(having_it.median(0).values)
    return torch.stack(typical)


def jpeg(rows):
    """Rows of images (K, 3, S, S) in [-1, 1], without gaps, as the text by which a page shows them.
    A row that is shorter than another is filled up."""
    widest = max(len(row) for row in rows)
    strips = []
    for row in rows:
        missing = widest - len(row)
        images = [*row, *[row[-1]] * missing]
        strips.append(torch.cat(images, dim=2))  # K times (3, S, S) -> (3, S, K * S)
    return data_url(to_picture(torch.cat(strips, dim=1)), "jpeg", quality=88)


def data_url(picture, kind, **options):
    """A PIL image as the text by which a page shows it."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()


def page_text(name, setup):
    """A page of assets with its setup filled in."""
    text = SHIPPED.with_name(name).read_text("utf-8")
    # A factor may have any name; "<" could end the script that the names are in.
    return text.replace("SETUP", json.dumps(setup).replace("<", "\\u003c"))


class Explorer:
    """Draws for the page of `explore`. What it answers depends on the request alone, so clients
    cannot mix. A slider moves a token along a direction: the first principal component of its
    values in the data; for a scalar that is the scalar itself."""

    def __init__(self, run):
        self.run = run
        self.lock = threading.Lock()
        codes = run.codes_of_data().cpu()
        codes = codes.reshape(*codes.shape[:2], -1)  # (M, N) -> (M, N, 1); (M, N, d) stays
        centred = (codes - codes.mean(0)).transpose(0, 1)  # (M, N, d) -> (N, M, d)
        direction = torch.linalg.svd(centred, full_matrices=False).Vh[:, 0]  # (N, d)
        self.direction = direction * direction.sum(1, keepdim=True).sign()

        positions = (codes * self.direction).sum(2)  # (M, N)
        low, high = positions.quantile(torch.tensor([0.01, 0.99]), dim=0)  # 2x (N,)
        groups = []
        for name, tokens in token_groups(run):
            sliders = []
            for i in tokens:
                sliders.append({"i": i, "low": low[i].item(), "high": high[i].item(),
                                "mixes": self.mixed_factors(i)})
            groups.append({"name": name, "tokens": sliders})
        self.removes_noise = removes_noise(run.model)
        setup = {"run": shortest_path(run.path), "images": len(run.dataset), "groups": groups,
                 "named": NAMED if run.explained.size else "",
                 "removesNoise": self.removes_noise, **run.options}
        self.page = page_text("explore.html", setup)

    def mixed_factors(self, token):
        """The names of the factors that move a token, if these are several: those that explain a
        tenth of its code's variance or more."""
        if not self.run.explained.size:
            return []
        moving = np.flatnonzero(self.run.explained[token] >= 0.1)
        names = [self.run.factor_names[j] for j in moving]
        return names if len(names) > 1 else []

    def draw(self, asked):
        """tokens=s,t,0.3 asks for token 0 of the source, 1 of the target, 2 at position 0.3."""
        run = self.run
        limits = {"source": len(run.dataset), "target": len(run.dataset), "noise": 2**32,
                  "steps": 201}
        numbers = {}
        for name, limit in limits.items():
            number = int(asked[name])
            require(0 <= number < limit, name, number, f"0 to {limit - 1}")
            numbers[name] = number

        images = run.load(torch.tensor([numbers["source"], numbers["target"]]))
        pair = run.codes(images).cpu()  # (2, N) or (2, N, d)
        source, target = pair.reshape(2, *self.direction.shape)  # 2x (N, d)
        source_position = (source * self.direction).sum(1)  # (N,)
        target_position = (target * self.direction).sum(1)

        words = asked["tokens"].split(",")
        require(len(words) == len(source), "tokens", asked["tokens"], f"{len(source)} of them")
        codes = source.clone()
        for i, word in enumerate(words):
            if word == "t":
                codes[i] = target[i]
            elif word != "s":
                distance = float(word) - source_position[i]
                codes[i] += distance * self.direction[i]
        require(codes.abs().max() < 1e6, "tokens", asked["tokens"], "finite positions")

        codes = codes.reshape(pair[:1].shape).to(run.device)
        with self.lock, unet.record_attention(run.model) as records, self.recorded() as visited:
            torch.manual_seed(numbers["noise"])
            drawn = run.draw(codes, run.noise(1), steps=numbers["steps"])
        maps = []
        if records:
            for of_token in attention_maps(records, run.config.size).transpose(0, 1):
                maps.append(self.url(heat(drawn, of_token)[0]))
        return {"images": [self.url(image) for image in (*images, *drawn)], "maps": maps,
                "positions": [source_position.tolist(), target_position.tolist()],
                "strip": self.strip(visited, drawn)}

    @contextlib.contextmanager
    def recorded(self):
        """A list that gets (t, z_t (1, C, h, w)) whenever the denoiser is asked, from t = T down.
        It stays empty for a model that draws in one pass."""
        visited = []

        def record(denoiser, inputs):
            z_t, times, tokens = inputs
            visited.append((times[0].item(), z_t))

        if not self.removes_noise:
            yield visited
            return
        hook = self.run.model.denoiser.register_forward_pre_hook(record)
        try:
            yield visited
        finally:
            hook.remove()

    def strip(self, visited, drawn, most=7):
        """From noise to the image drawn (1, 3, S, S): at most so many images, evenly spaced among
        the (t, z_t) visited. A z_t is shown by the first stage's decoder, as z_0 is."""
        if not visited:
            return []
        count = min(most, len(visited) + 1)
        numbers = np.linspace(0, len(visited), count).round().astype(int)  # the last: the image
        timesteps = []
        latents = []
        for number in numbers[:-1]:
            t, z_t = visited[number]
            timesteps.append(t)
            latents.append(z_t)

        images = [*self.run.model.decode(torch.cat(latents)), drawn[0]]
        shown = []
        for t, image in zip([*timesteps, 0], images):
            shown.append({"t": t, "image": self.url(image)})
        return shown

    def url(self, image):
        return data_url(to_picture(image), "png", compress_level=1)


class Server(http.server.ThreadingHTTPServer):
    """The page's server, on this computer alone."""

    def server_bind(self):
        # HTTPServer also looks up the name of the address: half a minute on a computer without a
        # name server, an error where the computer's name has unusual letters.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request, client_address):
        """No traceback for a browser that goes away."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Handler(http.server.BaseHTTPRequestHandler):
    """GET of the page and of what it shows; all else is refused."""

    timeout = 10  # seconds that a client has to send its request

    def log_message(self, *_):
        """Nothing is printed for a request."""

    def do_GET(self):
        status, kind, text = self.answer()
        with contextlib.suppress(OSError):  # the client went away
            self.send_response(status)
            self.send_header("Content-Type", f"text/{kind}; charset=utf-8")
            self.end_headers()
            self.wfile.write(text.encode(errors="replace"))

    def answer(self):
        """-> status, kind of text, text."""
        path, _, query = self.path.partition("?")
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin", f"http://{host}")
        # A foreign page may ask too, or give 127.0.0.1 a name. Any port is right: of a tunnel, say.
        if host.partition(":")[0] not in ("127.0.0.1", "localhost") or origin != f"http://{host}":
            return 403, "plain", "only the page of this server may ask it"
        if path == "/":
            return 200, "html", self.server.explorer.page
        if path == "/draw":
            try:
                asked = dict(urllib.parse.parse_qsl(query, max_num_fields=9))
                return 200, "plain", json.dumps(self.server.explorer.draw(asked))
            except (KeyError, ValueError) as error:
                return 400, "plain", f"malformed: {error}"
        return 404, "plain", "there are / and /draw"


def explore(run, args):
    """a page on this computer: a slider a token, the image that they draw, where a token is read"""
    try:
        server = Server(("127.0.0.1", args.port), Handler)
    except (OSError, OverflowError) as error:
        raise OSError(f"--port {args.port} cannot be used: {error}; choose another") from None
    torch.set_num_threads(1)  # one small image at a time: several threads wait for one another
    address = f"http://127.0.0.1:{server.server_port}/"
    with server, contextlib.suppress(KeyboardInterrupt):
        server.explorer = Explorer(run)
        print_safely(f"{shortest_path(run.path)} is shown at {address} until Ctrl-C")
        if not args.no_browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        server.serve_forever()


# ---- Folders and logs of runs -------------------------------------------------------------------


def existing_runs(words):
    """The paths that RUN ... names, each once; also a pattern, which some shells do not expand.
    ValueError if there is none."""
    paths = []
    for word in words:
        matches = [word] if Path(word).exists() else sorted(glob.glob(word))
        paths += matches or [word]
    paths = list(dict.fromkeys(os.path.abspath(path) for path in paths))
    if not any(Path(path).exists() for path in paths):
        raise ValueError(f"no run is at {' '.join(words) or 'RUN, as none is given'}; expected "
                         "folders written by train.py. If there is none yet: python train.py")
    return [shortest_path(path) for path in paths]


def shortest_path(path):
    """The path as it was given, or from the working directory where that is shorter."""
    try:
        return min(str(path), os.path.relpath(path), key=len)
    except ValueError:  # on Windows no path leads from one drive to another
        return str(path)


def short_names(paths):
    """The shortest ends of these different paths that differ: a/run and b/run keep a and b."""
    all_parts = [Path(os.path.abspath(path)).parts for path in paths]
    names = []
    for parts in all_parts:
        length = 1
        while [path[-length:] for path in all_parts].count(parts[-length:]) > 1:
            length += 1
        names.append("/".join(parts[-length:]))
    return names


def read_log(folder):
    """log.csv of a run as a list of dicts of strings, "" where nothing was logged."""
    path = Path(folder, "log.csv")
    log = []
    if path.is_file():
        log = list(csv.DictReader(path.read_text("utf-8").splitlines()))
    if not log or not {"stage", "step", "loss"} <= log[0].keys():
        raise ValueError(f"{path} is not there, or no log of this version; expected a run's folder")
    return log


# ---- Drawing, with Pillow alone: a plot needs no further package --------------------------------

PALETTE = ((0, 114, 178), (213, 94, 0), (0, 158, 115),  # Okabe-Ito: also for the colour-blind
           (204, 121, 167), (230, 159, 0), (86, 180, 233), (110, 110, 110), (0, 0, 0))
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # dark to bright
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".gif": "GIF"}
LARGEST = {"GIF": 65_535, "JPEG": 65_500, "WEBP": 16_383}  # pixels of a side that a format takes
font = ImageFont.load_default  # Pillow's own, so that no font file is needed


def save(args, folder, picture, ending=".png", frames=()):
    """Write a picture, or the first of several frames, to --out or under the name of the verb into
    the folder. The ending of the name says in which format."""
    path = Path(args.out or Path(folder, args.verb + ending))
    kind = FORMATS[path.suffix.lower()]
    if max(picture.size) > LARGEST.get(kind, math.inf):
        raise ValueError(f"{path} would have {picture.width} x {picture.height} pixels; expected a "
                         f"smaller --count: {kind} takes at most {LARGEST[kind]:,} a side")
    options = dict(optimize=True, quality=95)  # each format takes what it knows
    if frames:
        options.update(save_all=True, append_images=frames, duration=120, loop=0)
    train.write_atomically(path, lambda file: picture.save(file, kind, **options))
    print_safely(f"wrote {path}, {picture.width} x {picture.height} pixels")


def drawable(names, kind, longest=48):
    """The names, but "kind number" for one that is too long or has letters which the font lacks."""
    missing = bytes(font(14).getmask("\U0010ffff"))  # what the font draws in the place of a letter
    shown = []
    for number, name in enumerate(names):
        letters = [bytes(font(14).getmask(letter)) for letter in name]
        if missing in letters or len(name) > longest:
            print_safely(f"in the picture, {kind} {number} is {name}")
            name = f"{kind} {number}"
        shown.append(name)
    return shown


def to_picture(image):
    """An image tensor (3, H, W) in [-1, 1] as a PIL image."""
    return Image.fromarray(train.to_bytes(image).permute(1, 2, 0).numpy())


def grid(rows, labels, headings=()):
    """Rows of image tensors (K, 3, S, S) as a PIL image, each with a label of one or two lines."""
    columns, _, S, _ = rows[0].shape
    # Whole multiples keep pixels sharp; many rows are shown smaller so that they fit a screen.
    side = S * max(1, min(128, 640 // len(rows)) // S)
    text = font(14)
    gap = 3
    pitch = side + gap
    lines = [line for label in labels for line in label.split("\n")]
    left = 20 + int(max(text.getlength(line) for line in lines))
    top = 28 if headings else gap

    canvas = Image.new("RGB", (left + columns * pitch, top + len(rows) * pitch), "white")
    pen = ImageDraw.Draw(canvas)
    for k, heading in enumerate(headings):
        pen.text((left + k * pitch + side // 2, top // 2), heading, "black", text, anchor="mm")
    for r, (row, label) in enumerate(zip(rows, labels)):
        y = top + r * pitch
        pen.text((10, y + side // 2), label, "black", text, anchor="lm")
        for k, image in enumerate(row):
            tile = to_picture(image).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(tile, (left + k * pitch, y))
    return canvas


def heat(images, maps):
    """Maps (B, S, S), lowest to highest, as colours over images (B, 3, S, S) in grey."""
    maps = maps.cpu() - maps.min().item()
    shares = (maps / maps.max().clamp(min=1e-6)).numpy()
    stops = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(shares, stops, channel) for channel in zip(*HEAT)]  # 3x (B, S, S)
    colours = to_float(torch.from_numpy(np.stack(channels, axis=1)))  # (B, 3, S, S)
    grey = images.cpu().mean(1, keepdim=True)
    return 0.7 * colours + 0.3 * grey


class Axis:
    """Where values lie between two pixels, and which of them get a tick. An axis reaches from the
    least value to the largest; one that is not logarithmic also has 0."""

    ROUND = [digit * 10.0**power for power in range(-9, 10) for digit in (1, 2, 5)]

    def __init__(self, values, start, end, logarithmic=False):
        self.start, self.end = start, end
        self.logarithmic = logarithmic
        low, high = min(values), max(values)
        if not logarithmic:
            low, high = min(0, low), max(0, high)
        self.low = self.scale(low)
        self.extent = self.scale(high) - self.low or 1  # a single value has none
        self.ticks = [tick for tick in self.ROUND if low <= tick <= high]
        if len(self.ticks) < 3 or not logarithmic:
            fine = [tick for tick in self.ROUND if tick >= (high - low or 1) / 8]
            step = min(fine, default=high - low)
            numbers = np.arange(math.ceil(low / step), math.floor(high / step + 1e-6) + 1)
            self.ticks = step * numbers

    def scale(self, value):
        return math.log10(value) if self.logarithmic else value

    def pixel(self, value):
        share = (self.scale(value) - self.low) / self.extent
        return self.start + share * (self.end - self.start)


def plot(title, x_title, series, size=(900, 520), logarithmic=False):
    """series {name: points} -> PIL image with axes, ticks and a legend. A point is (x, y), or
    (x, y, lowest, highest) with a bar for its range. Only y above 0 has a logarithmic axis."""
    width, height = 2 * size[0], 2 * size[1]  # shrunk at the end: smooth lines
    text = font(30)
    top, bottom = 88, height - 120
    left, right = 152, width - 120 - int(max(map(text.getlength, series)))
    points = list(itertools.chain(*series.values()))
    heights = list(itertools.chain(*(point[1:] for point in points)))
    x_axis = Axis([point[0] for point in points], left, right)
    y_axis = Axis(heights, bottom, top + 16, logarithmic and min(heights) > 0)

    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)
    for tick in x_axis.ticks:
        x = x_axis.pixel(tick)
        pen.line((x, top, x, bottom), "gainsboro", 2)
        pen.text((x, bottom + 12), f"{tick:g}", "black", text, anchor="mt")
    for tick in y_axis.ticks:
        y = y_axis.pixel(tick)
        pen.line((left, y, right, y), "gainsboro", 2)
        pen.text((left - 16, y), f"{tick:.4g}", "black", text, anchor="rm")
    pen.line((left, top, left, bottom, right, bottom), "black", 2)
    pen.text(((left + right) / 2, height - 28), x_title, "black", text, anchor="mm")
    pen.text((left, 40), title, "black", font(34), anchor="lm")

    for row, (name, points) in enumerate(series.items()):
        colour = PALETTE[row % len(PALETTE)]
        draw_series(pen, points, x_axis, y_axis, colour)
        y = top + 24 + 48 * row
        pen.line((right + 28, y, right + 72, y), colour, 6)
        pen.text((right + 84, y), name, "black", text, anchor="lm")
    return canvas.resize(size, Image.Resampling.LANCZOS)


def draw_series(pen, points, x_axis, y_axis, colour):
    """A line through the points, a bar for the range of each that has one, dots if they are few."""
    for x, _, *ends in points:
        pen.line([(x_axis.pixel(x), y_axis.pixel(end)) for end in ends], colour, 3)
    middles = [(x_axis.pixel(point[0]), y_axis.pixel(point[1])) for point in points]
    pen.line(middles, colour, 4, joint="curve")
    if len(middles) < 10:
        for middle in middles:
            pen.circle(middle, 8, "white", colour, 4)


# ---- The command line ---------------------------------------------------------------------------


def token(word):
    """An argument of --tokens: "all" or a number; ValueError, which argparse reports, otherwise."""
    return word if word == "all" else int(word)


def file_with(*endings):
    """A kind of argument: the name of a file that ends in one of these, "~" expanded."""
    def file_name(word):
        if Path(word).suffix.lower() not in endings:  # nor is ".png" a whole name
            raise argparse.ArgumentTypeError(f"{word}; expected a name that ends in "
                                             + ", ".join(endings))
        return os.path.expanduser(word)
    return file_name


def positive(word):
    """An argument that is a whole number from 1 on."""
    if int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word}; expected 1 or more")
    return int(word)


def shared_flags():
    """Flags that several verbs have, as parsers: of the run, the data, the sampler, a picture."""
    path = os.path.expanduser
    one_run = argparse.ArgumentParser(add_help=False)
    one_run.add_argument("run", metavar="RUN", nargs="?", type=path,
                         help="run's folder, or file of export; default: the one of the code")
    one_run.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: the best here")

    data_flags = argparse.ArgumentParser(add_help=False)
    data_flags.add_argument("--data", metavar="PATH", type=path,
                            help="dataset to use (default: the one of the training)")
    data_flags.add_argument("--cache", metavar="DIR", type=path,
                            help="folder for the converted dataset (default: as in the training)")
    data_flags.add_argument("--seed", type=int, default=0,
                            help="fixes all that is random (default: 0)")

    sampler_flags = argparse.ArgumentParser(add_help=False)
    sampler_flags.add_argument("--sampler", default="dpm", choices=list(encdiff.SAMPLERS),
                               help="default: dpm")
    sampler_flags.add_argument("--steps", default=20, type=positive, metavar="N",
                               help="default: 20 (ddpm: always all)")
    sampler_flags.add_argument("--eta", type=float, metavar="X",
                               help="noise that --sampler ddim adds: 0 (default) to 1")

    picture_flags = argparse.ArgumentParser(add_help=False)
    picture_flags.add_argument("--out", metavar="FILE", type=file_with(*FORMATS),
                               help="default: in RUN, or in the working directory")
    return one_run, data_flags, sampler_flags, picture_flags


def make_parser():
    """The command line: a parser for each verb, which begins with the flags that others share."""
    path = os.path.expanduser
    one_run, data_flags, sampler_flags, picture_flags = shared_flags()
    from_data = (one_run, data_flags)
    drawing = (*from_data, sampler_flags, picture_flags)

    summary = "Pictures, tables and a page from a trained run."
    parser = train.Parser("sample.py", description=summary)
    parser.set_defaults(function=None)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")

    def add_verb(function, *parents, count=""):
        text = function.__doc__ or function.__name__  # python -OO leaves no docstrings
        # argparse joins the lines, so the first one has to end as a sentence.
        verb = verbs.add_parser(function.__name__, parents=parents, help=text.splitlines()[0],
                                description=text.replace("\n\n", ". ", 1))
        verb.set_defaults(function=function)
        if count:
            verb.add_argument("--count", type=positive, metavar="N", help=count)
        return verb

    # Pictures and tables of one run, and two that need none.
    rows = dict(type=token, nargs="+", metavar="I", help="rows, or all; default: each factor's")

    verb = add_verb(swap, *drawing, count="columns (default: 8)")
    verb.add_argument("--tokens", **rows)
    verb = add_verb(traverse, *drawing, count="values of a row (default: 9)")
    verb.add_argument("--tokens", **rows)
    verb.add_argument("--gif", action="store_true", help="an animation instead, with four images")
    verb = add_verb(attention, *drawing, count="columns (default: 8)")
    verb.add_argument("--tokens", **rows)
    add_verb(generate, *drawing, count="images (default: 32)")
    verb = add_verb(reconstruct, *drawing, count="images (default: 256)")
    verb.add_argument("--lpips", nargs=2, metavar="FILE", type=path,
                      help="torchvision's AlexNet, lpips' alex.pth")
    add_verb(importance, one_run, picture_flags)
    add_verb(worth, *from_data, picture_flags, count="images (default: 256)")
    add_verb(kl, picture_flags)
    add_verb(bayes, picture_flags)

    # Pages.
    verb = add_verb(explore, *from_data, sampler_flags)
    verb.add_argument("--port", type=int, default=0, help="default: one that is free")
    verb.add_argument("--no-browser", action="store_true", help="print the address, open nothing")
    verb = add_verb(page, *from_data, sampler_flags)
    verb.add_argument("file", metavar="FILE", type=file_with(".html"), help="file to write")

    # Several runs.
    runs = dict(metavar="RUN", nargs="*", type=path, help="folders written by train.py")
    add_verb(curves, picture_flags).add_argument("runs", **runs)
    add_verb(argument, picture_flags).add_argument("runs", **runs)
    verb = add_verb(agree, data_flags)
    verb.add_argument("runs", **runs)
    verb.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: the best here")

    # Numbers and files.
    verb = add_verb(fid, *from_data, sampler_flags, count="images (default: 10,000)")
    verb.add_argument("--inception", required=True, metavar="FILE", type=path,
                      help="NVIDIA's inception-2015-12-05.pt")
    verb.add_argument("--redraw", action="store_true", help="all tokens of an image from one image")
    add_verb(complexity, one_run, sampler_flags)
    verb = add_verb(encode, *from_data, count="images (default: all)")
    verb.add_argument("--out", metavar="FILE", type=file_with(".npz"), help="default: in RUN")
    verb = add_verb(export, one_run)
    verb.add_argument("file", metavar="FILE", type=file_with(".pt"), help="file to write")
    return parser


def parse(arguments=None):
    """The command line as a namespace; its `function` is the verb, None if none was given."""
    return make_parser().parse_args(arguments)


def open_run(args):
    """The run that the command line names, with its flags."""
    names = ("data", "cache", "device", "seed", "sampler", "steps", "eta")
    return OpenedRun(args.run, **{name: getattr(args, name) for name in names if name in args})


def main(arguments=None):
    """Run one verb. Raises ValueError or OSError, one line, for what a user gets wrong."""
    args = parse(arguments)
    if args.function is None:
        make_parser().print_help()
    elif "run" in args:
        args.function(open_run(args), args)
    else:
        args.function(args)


if __name__ == "__main__":
    with train.one_line_errors():
        main()

"""Train EncDiff in one command: first stage, then encoder and denoiser together, then the scores.

WHERE     Read after unet.py; vq.py, metrics.py and data.py may come later. Everything meets here.
PAPER     arXiv 2402.09712, Sec. 4.1 ("Training Details"), Appendix D.
SHAPES    as in encdiff.py
IDEA      Two stages. (1) The autoencoder of vq.py learns to compress images; it is then frozen.
          (2) Encoder, token map and U-Net are trained together, by eq. (3) and nothing else. The
          moving average (EMA) of their weights is what is scored, drawn and shipped. Everything
          random in a step is seeded with (seed, stage, step), so a run that was interrupted goes on
          bit for bit, with the same number of threads. Several processes train like one, except
          for dropout, for the statistics of BatchNorm, and for rounding.
DIFFERS   In step s the moving average has the decay (1 + s) / (10 + s), at most --ema. The paper's
          .9999 would be reached after 90,000 steps; with it the average of a short run would still
          contain the first weights. The last average is scored, never the best one: choosing it
          would use the labels. In every preset joint training has weight decay 0.01, gradients are
          clipped to norm 1, and the learning rate rises over 100 steps: the paper mentions none of
          these. The default preset, `small`, departs further: see OUR_RECIPE and SMALL.
TRY       python train.py --steps 50 --vq-steps 250 --out runs/try   ->   a run in a few minutes
"""
import argparse
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import functools
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

import data
import encdiff
import metrics
import unet
import vq

# ---- What can be set ----------------------------------------------------------------------------


def field(default, meaning, allowed=None):
    """A field of Config. meaning: the flag's --help text; a field with "" has no flag.
    allowed: a list of choices, or the words for a range, which RANGES further down checks."""
    return dataclasses.field(default=default, metadata={"help": meaning, "allowed": allowed})


@dataclasses.dataclass
class Config:
    """What can be set for a run. The values below are the preset `paper`. A run without --preset
    takes `small`, further down.

    Further numbers are fixed: FIRST_STAGE, LR_WARMUP, CLIP, and weight decay and betas, which the
    functions of the two stages hand to their optimizers.
    """

    data: str = field("", "dataset file or folder; without it Shapes3D is rendered")
    cache: str = field("", "folder for the converted dataset; else beside it")
    size: int = field(64, "side of the images in pixels", (32, 64, 128))
    seed: int = field(0, "fixes everything random in a run", "0 to below 2^63")
    # "auto" becomes "bf16" or "fp32" before a run begins.
    precision: str = field("auto", "arithmetic; auto: bf16 where fast", ("auto", "bf16", "fp32"))
    # `make_parser` fills in {variants}.
    variant: str = field("", "what differs from the method: NAME or NAME+NAME of {variants}")
    hold_out: str = field("", "combination of factors that is not trained on, as "
                          "'floor hue=0 & shape=3', values counted from 0; it is scored at the end")
    # Of both stages
    optimizer: str = field("adamw", "muon: Muon for matrices inside the networks, AdamW for all "
                           "else", ("adamw", "muon"))
    # The first stage (vq.py)
    first_stage: str = field("deep", "kind, or a RUN to copy one from", vq.KINDS)
    first_stage_from: str = field("", "")  # RUN, if --first-stage names one
    vq_steps: int = field(10_000, "training steps of the first stage", "0 or more")
    # The encoder and the tokens (encdiff.py)
    encoder: str = field("cnn", "image encoder; cnn_bn, cnn_patch: lighter, with BatchNorm",
                         encdiff.ENCODERS)
    encoder_width: int = field(64, "", "1 or more")
    num_tokens: int = field(20, "number of concept tokens, N", "1 or more")
    token_dim: int = field(32, "width of a concept token, d", "1 or more")
    # The denoiser (unet.py)
    channels: int = field(64, "width of the U-Net at full resolution, a multiple of 4 and of the "
                          "heads (4 in small, else 8)", "1 or more")
    multipliers: tuple = field((1, 2, 4, 4), "widths of the U-Net, in units of --channels; each "
                               "further one halves the side", "each 1 or more")
    blocks: int = field(2, "residual blocks of each width in the U-Net", "1 or more")
    heads: int = field(8, "", "1 or more")  # attention heads of the U-Net
    dropout: float = field(0.1, "dropout in the U-Net's residual blocks", "0 to below 1")
    # Joint training
    schedule: str = field("cosine", "noise schedule", encdiff.SCHEDULES)
    timesteps: int = field(1000, "", "1 or more")  # T
    noise_order: str = field("uniform", "how timesteps are drawn: see `draw_timesteps`",
                             ("uniform", "weak-first"))
    steps: int = field(75_000, "training steps of encoder and denoiser", "0 or more")
    batch: int = field(64, "images in a joint training step", "1 or more")
    lr: float = field(1e-4, "AdamW's learning rate in joint training; Muon's is ten times it",
                      "above 0, at most 1000")
    lr_decay: float = field(0.0, "last share of the joint steps, with --lr falling", "0 to below 1")
    ema: float = field(0.9999, "largest decay of the averaged weights in a joint step; it starts "
                       "lower", "0 to below 1")
    score_every: int = field(7_500, "joint steps between quick scores; 0: none", "0 or more")
    log_every: int = field(100, "", "1 or more")  # steps between two lines of log.csv

    def __post_init__(self):
        self.multipliers = tuple(self.multipliers)  # JSON and argparse bring lists


# `paper` is the paper's recipe; assets/paper.md says why 75,000 steps. `small` is our recipe with
# latents of 8x8 and less width, for two CPU cores. `large` is our recipe with the paper's widths.
OUR_RECIPE = dict(
    encoder="cnn_patch",  # much cheaper than the paper's
    dropout=0.0,
    optimizer="muon",  # learns in fewer steps than AdamW (assets/log.md)
    lr=1e-3,  # of AdamW; so Muon's is 1e-2
    lr_decay=0.4,
    vq_steps=5_000,
)
SMALL = dict(
    OUR_RECIPE,
    first_stage="linear",
    token_dim=16,
    channels=24,  # codes need more steps rather than more width (assets/log.md, 2026-11-30)
    multipliers=(1, 2),
    blocks=1,
    heads=4,
    steps=8_000,
    score_every=2_000,
)
LARGE = dict(OUR_RECIPE, steps=4_000, score_every=500)
PRESETS = {"small": SMALL, "large": LARGE, "paper": {}}

# How each kind of vq.KINDS is trained: images a step, learning rate, weight of the squared error
# beside L1, and the step from which its encoder stays as it is (0: never). "deep" is the paper's,
# with latents of 16x16x3. "linear" has a single convolution as its encoder, and latents of 8x8x4;
# in an early run the codes came apart sooner if this encoder had been trained only briefly
# (assets/log.md).
FIRST_STAGE = {
    "deep": dict(batch=64, lr=1e-3, squared=0.0, freeze_encoder_at=0),
    "linear": dict(batch=16, lr=2e-3, squared=4.0, freeze_encoder_at=1_500),
}
LR_WARMUP = 100  # steps in which a learning rate rises from 0, as Adam's first averages are rough
CLIP = 1.0  # the largest norm of a gradient


# ---- The model ----------------------------------------------------------------------------------


def build_model(config):
    """The untrained model of a config, on the CPU: the method, then what its variants change."""
    first_stage = vq.KINDS[config.first_stage]()
    side = config.size // first_stage.factor

    token_map = encdiff.ScalarTokens(config.num_tokens, config.token_dim)
    encoder = make_encoder(config, outputs=config.num_tokens)
    denoiser = make_denoiser(config, first_stage)
    model = encdiff.EncDiff(
        first_stage, encoder, token_map, denoiser,
        latent_shape=(first_stage.latent_channels, side, side),
        schedule=config.schedule,
        timesteps=config.timesteps,
    )

    for change in variants_of(config):
        model = change(model, config)
    return model


def make_encoder(config, outputs, **options):
    """The image encoder of a config: images -> codes (B, outputs)."""
    kind = encdiff.ENCODERS[config.encoder]
    return kind(outputs, config.size, config.encoder_width, **options)


def make_denoiser(config, first_stage, kind=unet.UNet, **options):
    """The U-Net of a config, for the latents of this first stage. options: further ones of kind."""
    return kind(
        latent_channels=first_stage.latent_channels,
        channels=config.channels,
        multipliers=config.multipliers,
        blocks=config.blocks,
        heads=config.heads,
        token_dim=config.token_dim,
        dropout=config.dropout,
        **options,
    )


# ---- The two stages -----------------------------------------------------------------------------
# Of the helpers further down, these matter here. `Optimizer` is AdamW. In `small` and `large` it
# leaves the matrices inside the networks, in both stages, to Muon, which makes the step of a matrix
# orthogonal. `run.backend` knows the device; if several processes train together, `backend.share`
# cuts out the part of a batch that this one takes, and `backend.parallel` averages their gradients.
# `run` is a Run, which keeps the folder with log and checkpoints:
#   run.resumed       the checkpoint to go on from, or {}; `start_stage` restores and empties it
#   run.wants_first_stage   is False if stage 1 is done, was copied from a run, or does not exist
#   run.start_stage   restores or begins a stage, and returns the first step to do
#   run.track         remembers a step's loss, and ends the run if its gradient is not finite
#   run.due, report   say whether it is time for a line of the log, and write it
#   run.score_due     says whether it is time for `quick_look`: scores and pictures on the way
#   run.checkpoint    saves if it is time to, or if the run is to stop
#   run.silence       says why no line will come for a while


def seed_step(config, stage, step):
    """Make everything random in this step a function of (seed, stage, step) alone."""
    torch.manual_seed(random.Random(f"{config.seed} {stage} {step}").getrandbits(32))


def learning_rate(peak, step, steps, decay):
    """Linear rise over LR_WARMUP steps, constant, linear fall over the last share `decay`."""
    rise = (step + 1) / LR_WARMUP
    fall = (steps - step) / (decay * steps) if decay else 1
    return peak * min(1, rise) * min(1, fall)


def train_first_stage(run, dataset, model):
    """Stage 1: images -> latent -> images. Leaves model.first_stage trained and frozen.

    Between encoder and decoder, the quantizer replaces the vector at each position of the latent by
    the nearest of a list of learned vectors, the entries of its codebook (vq.py).
    """
    config, backend = run.config, run.backend
    autoencoder = model.first_stage
    quantizer = autoencoder.quantizer
    steps = config.vq_steps
    recipe = FIRST_STAGE[config.first_stage]
    # In the first `warmup` steps, at most half of all, latents are not rounded. Then the codebook
    # is filled with latents. By itself the quantizer would take them from one process's share of
    # the batch; we give it those of the whole batch.
    warmup = min(quantizer.warmup, steps // 2)

    criterion = vq.FirstStageLoss(autoencoder, recipe["squared"]).to(backend.device)
    criterion.requires_grad_(True).train()
    optimizer = Optimizer(autoencoder, config, recipe["lr"], weight_decay=1e-4, betas=(0.9, 0.99))
    start = run.start_stage("first stage", steps, recipe["batch"], criterion, optimizer)
    network = backend.parallel(criterion)

    for step in range(start, steps):
        # A batch of images. Each process takes its share of it.
        seed_step(config, "first stage", step)
        indices = torch.randint(len(dataset), (recipe["batch"],))
        images = load_images(dataset, backend.share(indices), backend.device)
        if step == warmup:  # the codebook starts from the latents of the whole batch
            whole = load_images(dataset, indices, backend.device)
            quantizer.initialise(autoencoder.encode(whole))

        # The loss, and one step downhill.
        with torch.autocast(backend.kind, torch.bfloat16, enabled=config.precision == "bf16"):
            loss, reconstruction, codebook_indices = network(images)
        loss.backward()
        if 0 < recipe["freeze_encoder_at"] <= step:
            # The decoder goes on. Without a gradient the optimizer leaves the encoder as it is.
            autoencoder.encoder.zero_grad()
        norm = clip_grad_norm_(criterion.parameters(), CLIP)
        lr = learning_rate(recipe["lr"], step, steps, decay=0.6)
        run.track(step, loss.item(), norm.item())
        optimizer.step(lr)
        criterion.zero_grad()  # frees the memory before the next forward pass

        # Report and save.
        counts = torch.bincount(codebook_indices.flatten(), minlength=len(quantizer.codebook))
        run.counts = run.counts + counts.cpu()  # `run.report` sets them back to 0
        if run.due(step + 1):
            numbers = {"mse": (reconstruction - images).square().mean().item()}
            if step >= warmup:
                numbers["entries_used"], numbers["perplexity"] = vq.codebook_usage(run.counts)
            run.report(step + 1, lr=lr, **numbers)
        run.checkpoint(step + 1)
    autoencoder.requires_grad_(False).eval()


def train_jointly(run, dataset, model):
    """Stage 2: encoder, token map and denoiser by eq. (3). Returns the averaged model."""
    config, backend = run.config, run.backend
    steps = config.steps
    model.to(backend.device).train()
    optimizer = Optimizer(model, config, config.lr, weight_decay=0.01)
    if not run.resumed:  # else `start_stage` restores the scale below
        seed_step(config, "joint training", -1)
        indices = torch.randint(len(dataset), (1024,))
        model.set_latent_scale(load_images(dataset, indices, backend.device))
    average = copy.deepcopy(model).requires_grad_(False).eval()
    start = run.start_stage("joint training", steps, config.batch, model, optimizer, average)
    network = backend.parallel(model)

    for step in range(start, steps):
        if run.score_due(step):
            quick_look(run, dataset, average, step)

        # A batch: images, their timesteps, their noise. Each process takes its share of it.
        seed_step(config, "joint training", step)
        indices = torch.randint(len(dataset), (config.batch,))
        t = draw_timesteps(config, step)  # (B,), as --noise-order says
        noise = torch.randn(config.batch, *model.latent_shape)
        images = load_images(dataset, backend.share(indices), backend.device)
        t = backend.share(t).to(backend.device)
        noise = backend.share(noise).to(backend.device)

        # Eq. (3), and one step downhill.
        with torch.autocast(backend.kind, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = network(images, t, noise)
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), CLIP)
        lr = learning_rate(config.lr, step, steps, config.lr_decay)
        run.track(step, loss.item(), norm.item())
        optimizer.step(lr)
        model.zero_grad()
        update_average(average, model, decay=min(config.ema, (1 + step) / (10 + step)))

        # Report and save.
        if run.due(step + 1):
            run.report(step + 1, lr=lr)
        run.checkpoint(step + 1)
    return average


def trained_state(model):
    """The part of the state that joint training changes: all but the first stage."""
    state = model.state_dict()
    return {name: value for name, value in state.items() if not name.startswith("first_stage.")}


@torch.no_grad()
def update_average(average, model, decay):
    """average <- decay * average + (1 - decay) * model, BatchNorm statistics included."""
    for old, new in zip(trained_state(average).values(), trained_state(model).values()):
        if old.is_floating_point():  # BatchNorm also has a counter of batches
            old.lerp_(new, 1 - decay)  # a state dict holds the tensors themselves, no copies


# ---- What was reached ---------------------------------------------------------------------------


@torch.no_grad()
def score(run, dataset, model, count, final=False):
    """All scores that the labels allow, of this many images, as a dict.

    Its "note" says why one is missing. final: also the scores of the tokens, each brought to one
    number by PCA (Table 9), under names that begin with "mapped_", and the shares of exchanges that
    land and that are clean.
    """
    seed = run.config.seed
    device = run.backend.device
    if not dataset.factor_sizes and not dataset.attribute_names:
        return {"note": "the dataset has no labels that are factors: nothing is scored"}

    # Without repetition: no image may be in both of DCI's samples, for training and for testing.
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(len(dataset), generator=generator)[:count]
    scores = {}
    try:
        codes = encode(model, dataset, indices, device)
        if dataset.attribute_names:
            scores = metrics.tad(codes, dataset.attributes(indices))
            scores["note"] = "attributes are scored by TAD, not by FactorVAE score and DCI"
            return scores

        factors = dataset.factors(indices)
        scores = metrics.evaluate(codes, factors, seed)
        if final:
            scores.update(final_scores(run, dataset, model, codes, factors, scores))
        return scores
    except ValueError as error:  # codes that are not finite, say: pictures may still tell why
        return {**scores, "note": f"not scored: {error}"}


def train_run(run, dataset):
    """All of a run from its checkpoint, or from nothing, to the scores."""
    config = run.config
    torch.manual_seed(config.seed)
    model = build_model(config)
    run.log_header(dataset, model)
    training = without_held_out(dataset, config)  # all of it, unless --hold-out says otherwise

    with signals(run.stop):
        if config.first_stage_from and not run.resumed:
            model.first_stage = load_run(config.first_stage_from)[0].first_stage
        if run.wants_first_stage(model):
            train_first_stage(run, training, model)
        average = train_jointly(run, training, model)

        if run.backend.main:
            with run.silence("the weights are saved; scores and pictures take a few minutes"):
                scores = score(run, dataset, average, 15_000, final=True)
                draw_samples(run, dataset, average)
            run.finish(scores)


# ---- Variants, Muon, run folder, device, flags. Skip on first reading. --------------------------
# A variant changes the model of the method and nothing else: (model, config) -> model.


def vector(model, config):
    """EncDiff-V (Table 5): the encoder gives each token as a vector, not as a scalar."""
    N, d = config.num_tokens, config.token_dim
    options = {"queries": N} if config.encoder == "transformer" else {}  # one for each token
    encoder = make_encoder(config, outputs=N * d, **options)
    model.encoder = encdiff.VectorEncoder(encoder, N, d)
    model.token_map = nn.Identity()
    return model


def adagn(model, config):
    """EncDiff w/ AdaGN (Table 3): the tokens scale and shift the norms, without attention."""
    model.denoiser = make_denoiser(
        config, model.first_stage, unet.AdaGNUNet, num_tokens=config.num_tokens)
    return model


def direct(model, config):
    """EncDec w/o Diff (Table 3): the latent is drawn from the tokens in one pass."""
    decoder = make_denoiser(
        config, model.first_stage, unet.DirectDecoder, latent_side=model.latent_shape[1])
    return encdiff.EncDec(
        model.first_stage, model.encoder, model.token_map, decoder,
        model.latent_shape, config.schedule, config.timesteps)


def euler(model, config):
    """Table 11, after Cha & Thiyagalingam 2023: a scalar is an angle."""
    model.token_map = encdiff.EulerTokens(config.num_tokens, config.token_dim)
    return model


def sparse(model, config):
    """Table 11, after Fumero et al. 2023: few codes are active at once."""
    return encdiff.SparseEncDiff(
        model.first_stage, model.encoder, model.token_map, model.denoiser,
        model.latent_shape, config.schedule, config.timesteps)


def orthogonal(model, config):
    """Table 11, after Yang et al. 2023c: a token is a scalar times an orthogonal direction."""
    model.token_map = encdiff.OrthogonalTokens(config.num_tokens, config.token_dim)
    return model


def pixels(model, config):
    """Diffusion of the pixels themselves, folded 8x8 into channels: there is no first stage."""
    side = config.size // 8
    model.first_stage = vq.Pixels(factor=8)
    model.latent_shape = (192, side, side)
    network = make_denoiser(config, model.first_stage)
    model.denoiser = encdiff.NoiseFromVelocity(network, model.alpha_bar)
    return model


def vae(model, config, objective):
    """Table 1: a VAE with the encoder of the method, which gives a mean and a log variance."""
    encoder = make_encoder(config, outputs=2 * config.num_tokens)
    return vq.VAE(encoder, config.num_tokens, objective, config.steps, config.size)


VARIANTS = {
    "vector": vector,
    "adagn": adagn,
    "direct": direct,
    "pixels": pixels,
    "euler": euler,
    "sparse": sparse,
    "orthogonal": orthogonal,
    "beta-vae": functools.partial(vae, objective="beta"),
    "anneal-vae": functools.partial(vae, objective="annealed"),
    "tc-vae": functools.partial(vae, objective="tc"),
    "factor-vae": functools.partial(vae, objective="factor"),
}
COMBINATIONS = ({"vector", "adagn"}, {"vector", "direct"})  # Table 13


def variants_of(config):
    """The functions of VARIANTS that --variant names, in the order in which they apply."""
    names = config.variant.split("+")
    return [change for name, change in VARIANTS.items() if name in names]


def validate_variant(config):
    """Raises ValueError unless --variant names one variant, or two that the paper combines."""
    names = config.variant.split("+") if config.variant else []
    known = ", ".join(VARIANTS)
    for name in names:
        require(name in VARIANTS, "variant", name, f"one of {known}")
    allowed = len(names) < 2 or (len(names) == 2 and set(names) in COMBINATIONS)
    require(allowed, "variant", config.variant, "one variant, vector+adagn or vector+direct")


def draw_timesteps(config, step):
    """t for each image of a batch, (B,) int64 in 1..T.

    "uniform" is the paper's t ~ U{1..T}. "weak-first" is ours: it draws three, and takes the lowest
    in the first third of the steps, and the highest afterwards. assets/results.md compares the two.
    """
    if config.noise_order == "uniform":
        return torch.randint(1, config.timesteps + 1, (config.batch,))
    draws = torch.randint(1, config.timesteps + 1, (3, config.batch))
    return draws.amin(0) if 3 * step < config.steps else draws.amax(0)


# ---- The optimizer: AdamW, and Muon for the matrices inside the networks -------------------------


def split_for_muon(model):
    """-> (names of the weights that Muon trains, names of all others that are trained).

    Muon is for matrices inside a network: the weights of linear layers and convolutions. AdamW
    keeps the layers where a network begins and ends, which the model names, and all that is no such
    weight: biases, norms, the codebook and learned queries.
    """
    excluded = set()
    for layer in model.adamw_layers():
        excluded.update(id(parameter) for parameter in layer.parameters())

    inside = set()
    layers = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.MultiheadAttention)
    for module in model.modules():
        if isinstance(module, layers):
            inside.update(id(parameter) for parameter in module.parameters(recurse=False))

    for_muon = []
    for_adamw = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim in (2, 4)
        if matrix and id(parameter) in inside and id(parameter) not in excluded:
            for_muon.append(name)
        else:
            for_adamw.append(name)
    return for_muon, for_adamw


class Optimizer:
    """AdamW for a model; with --optimizer muon, Muon for the matrices inside of it.

    config: which, and the precision; lr: AdamW's learning rate, Muon's is ten times that;
    weight_decay: of both, to be multiplied with their learning rates; betas: AdamW's.
    """

    def __init__(self, model, config, lr, weight_decay, betas=(0.9, 0.999)):
        parameters = dict(model.named_parameters())
        for_muon, for_adamw = split_for_muon(model)
        if config.optimizer == "adamw":
            for_adamw = for_adamw + for_muon
            for_muon = []

        weights = [parameters[name] for name in for_adamw]
        adamw = torch.optim.AdamW(weights, lr, betas, weight_decay=weight_decay, fused=True)
        self.parts = [adamw]
        if for_muon:
            dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
            matrices = [parameters[name] for name in for_muon]
            self.parts.append(Muon(matrices, 10 * lr, weight_decay, dtype))

    def step(self, lr):
        """One step downhill; lr is AdamW's learning rate now."""
        for part, scale in zip(self.parts, (1, 10)):
            part.param_groups[0]["lr"] = scale * lr
            part.step()


def orthogonalise(X, steps=5):
    """X (K, m, n) -> about the nearest orthogonal matrices: singular values of 0.7 to 1.15.

    The iteration of Newton and Schulz with the coefficients of Jordan et al. (2024). An odd
    polynomial of X acts on the singular values alone, and this one drives each of them near 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = X.shape[1] <= X.shape[2]
    X = X if wide else X.mT  # so that X X^T is the smaller of the two products
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    return X if wide else X.mT


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024), with Nesterov's momentum, for matrices and convolutions.

    The step of a matrix is made orthogonal, so that directions of small gradients learn as fast as
    others; a convolution (out, in, k, k) counts as a matrix (out, in k k). torch.optim.Muon takes
    no convolutions, and computes in bf16, which is slow without hardware for it.
    """

    def __init__(self, weights, lr, weight_decay, dtype):
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        """One step downhill for every weight that has a gradient."""
        group = self.param_groups[0]
        lr = group["lr"]
        momentum = 0.95

        # The direction of each weight: Nesterov's look ahead along the averaged gradient.
        of_shape = {}  # weights of one shape share one batched product, as each is small
        for weight in group["params"]:
            if weight.grad is None:
                continue
            gradient = weight.grad.flatten(1)  # (out, in, k, k) -> (out, in k k)
            state = self.state[weight]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            mean = state["momentum_buffer"]
            mean.lerp_(gradient, 1 - momentum)
            direction = gradient.lerp(mean, momentum)
            of_shape.setdefault(gradient.shape, []).append((weight, direction))

        # The step: its direction made orthogonal, longer for tall matrices.
        for (m, n), pairs in of_shape.items():
            directions = torch.stack([direction for _, direction in pairs])
            steps = orthogonalise(directions.to(self.dtype))
            length = lr * max(1, m / n) ** 0.5
            for (weight, _), step in zip(pairs, steps):
                weight.mul_(1 - lr * group["weight_decay"])
                weight.sub_(step.reshape(weight.shape), alpha=length)


# ---- On the way: scores, pictures, and what it costs ---------------------------------------------


def quick_look(run, dataset, average, step):
    """Pictures, and scores from fewer images, hence lower than those at the end."""
    with run.silence(f"  quick score after step {step}: half a minute"):
        if run.backend.main:
            scores = score(run, dataset, average, 6_000)
            draw_samples(run, dataset, average)
        run.backend.mean(0.0)  # the others wait here, where a signal may end them, too
    if not run.backend.main:
        return

    known = {name: scores[name] for name in Run.SCORES if name in scores}
    words = "  ".join(f"{name} {value:.3f}" for name, value in known.items())
    run.log(stage="joint training", step=step, **known)
    run.print(f"  quick score: {words}  {scores.get('note', '')}")


def final_scores(run, dataset, model, codes, factors, scores):
    """Scores of the tokens, where they are not the codes, and what their exchanges do.

    codes (n, N) or (n, N, d), factors (n, F); scores: those of the codes. Returns a dict.
    """
    seed = run.config.seed
    device = run.backend.device
    further = {}
    tokens = model.tokens(codes.to(device)).cpu()  # (n, N) -> (n, N, d)
    if tokens.ndim > codes.ndim:
        of_tokens = metrics.evaluate(tokens, factors, seed)
        for name in Run.SCORES:
            if name in of_tokens:
                further[f"mapped_{name}"] = of_tokens[name]

    if "variance_explained" in scores and dataset.is_complete:
        explained = scores["variance_explained"]
        shares = metrics.exchanges_that_land(model, dataset, explained, device, seed=seed)
        landed = {name: share for name, (share, _, _) in shares.items()}
        clean = {name: share for name, (_, share, _) in shares.items()}
        if landed:
            further["exchanges"] = sum(landed.values()) / len(landed)
            further["clean_exchanges"] = sum(clean.values()) / len(clean)
            further["exchanges_by_factor"] = landed
            further["clean_exchanges_by_factor"] = clean
    if run.config.hold_out:
        further.update(held_out_scores(run, dataset, model, codes, factors, scores))
    return further


def without_held_out(dataset, config):
    """The images to train on: those without the combination of --hold-out, if there is one."""
    if not config.hold_out:
        return dataset
    combination = data.read_combination(dataset, config.hold_out)
    training, _ = data.split_off(dataset, combination)
    return training


def held_out_scores(run, dataset, model, codes, factors, scores):
    """What the model makes of the combination that --hold-out kept from training, as a dict.

    held_out_informativeness   the share of its labels that DCI's trees read, if they learn from
                               other combinations alone
    held_out_mse, other_mse    squared error of images drawn from their own tokens: 64 images of
                               the combination, 64 others
    held_out_exchanges         the share of exchanges that land there: metrics.exchanges_into

    codes (n, N), factors (n, F): a sample of all images; scores: theirs. It also writes
    held_out.png: images of the combination, drawn as `draw_samples` does.
    """
    device = run.backend.device
    combination = data.read_combination(dataset, run.config.hold_out)
    others, held_out = data.split_off(dataset, combination)
    generator = torch.Generator().manual_seed(run.config.seed)

    rows = torch.randperm(len(held_out), generator=generator)[:5_000]
    has_all = (factors[:, [*combination]] == torch.tensor([*combination.values()])).all(1)
    read = metrics.dci(codes[~has_all], factors[~has_all], encode(model, held_out, rows, device),
                       held_out.factors(rows), run.config.seed)
    further = {"held_out_informativeness": read["informativeness_test"]}

    noise = torch.randn(64, *model.latent_shape, generator=generator).to(device)
    for name, part in (("held_out_mse", held_out), ("other_mse", others)):
        rows = torch.randint(len(part), (64,), generator=generator)
        images = load_images(part, rows, device)
        samples = metrics.draw(model, model.represent(images), noise)
        further[name] = ((images - samples) / 2).square().mean().item()  # black is 0, white is 1
    draw_samples(run, held_out, model, "held_out.png")

    if "variance_explained" in scores and dataset.is_complete:
        explained = scores["variance_explained"]
        shares = metrics.exchanges_into(model, dataset, explained, combination, noise,
                                        run.config.seed)
        landed = [share for share, _, _ in shares.values()]
        if landed:
            further["held_out_exchanges"] = sum(landed) / len(landed)
    return further


@torch.no_grad()
def draw_samples(run, dataset, model, name="samples.png"):
    """A picture: images, what their latents decode to, samples from their tokens; always eight
    of the same images, so that pictures of different steps can be compared."""
    device = run.backend.device
    generator = torch.Generator().manual_seed(run.config.seed)
    indices = torch.randint(len(dataset), (8,), generator=generator)
    noise = torch.randn(8, *model.latent_shape, generator=generator).to(device)

    images = load_images(dataset, indices, device)
    decoded = model.decode(model.latents(images))
    samples = model.sample(model.tokens(model.represent(images)), noise=noise)
    picture = tile(torch.stack([images, decoded, samples]))
    run.write(name, lambda file: picture.save(file, "PNG"))


def tile(rows):
    """Images (R, K, 3, S, S) in [-1, 1] -> a PIL picture of R rows of K images."""
    pixels = to_bytes(rows).permute(0, 3, 1, 4, 2)  # (R, K, 3, S, S) -> (R, S, K, S, 3)
    pixels = pixels.flatten(2, 3).flatten(0, 1)  # -> (R*S, K*S, 3)
    return Image.fromarray(pixels.numpy())


def step_flops(config):
    """{stage: floating-point operations of one of its steps, or 0}, of all processes.

    Forward, backward and the optimizer's, as torch counts them, a multiply-add as two.
    """
    flops = dict.fromkeys(Run.STAGES, 0)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        model = build_model(config).train()
        image = torch.zeros(1, 3, config.size, config.size)
        flops["joint training"] = flops_of_step(model, model, image, config.batch, config)

        if has_first_stage(model):
            autoencoder = copy.deepcopy(model.first_stage)
            autoencoder.quantizer.ready.fill_(True)
            criterion = vq.FirstStageLoss(autoencoder).requires_grad_(True)
            batch = FIRST_STAGE[config.first_stage]["batch"]
            flops["first stage"] = flops_of_step(criterion, autoencoder, image, batch, config)
    return flops


def flops_of_step(network, model, image, batch, config):
    """Operations of a training step: network gives the loss of an image, model is optimized."""
    with FlopCounterMode(display=False) as of_image:
        output = network(image)
        loss = output[0] if isinstance(output, tuple) else output
        loss.backward()
    with FlopCounterMode(display=False) as of_optimizer:
        Optimizer(model, config, config.lr, weight_decay=0.0).step(config.lr)
    return batch * of_image.get_total_flops() + of_optimizer.get_total_flops()


def training_tflop(config, flops):
    """-> TFLOP of the first stage, borrowed or not, and of joint training; flops: of step_flops."""
    first = config.vq_steps * flops["first stage"] / 1e12
    joint = config.steps * flops["joint training"] / 1e12
    return first, joint


def has_first_stage(model):
    """Whether the model has an autoencoder; some variants have none."""
    return isinstance(getattr(model, "first_stage", None), vq.VQAutoencoder)


# ---- The device and the processes ---------------------------------------------------------------


class Backend:
    """Device, number of threads and, under torchrun, this process's share of the work."""

    def __init__(self, device=None):
        kinds = []  # the best first
        if torch.cuda.is_available():
            kinds.append("cuda")
        if torch.backends.mps.is_available():
            kinds.append("mps")
        kinds.append("cpu")
        require(device is None or device in kinds, "device", device, "one of " + ", ".join(kinds))
        self.kind = device or kinds[0]
        self.device = torch.device(self.kind)

        self.world = int(os.environ.get("WORLD_SIZE") or 1)
        self.rank = int(os.environ["RANK"]) if self.world > 1 and "RANK" in os.environ else 0
        self.main = self.rank == 0  # the one that writes, logs and scores
        if self.kind == "cpu":
            keep_freed_memory()
            use_free_cores()
        if self.world > 1 and self.kind == "cuda":  # from here on "cuda" is this one
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if self.world > 1 and not dist.is_initialized():
            # Longer than any conversion: if one process dies, torchrun itself ends the others.
            dist.init_process_group(timeout=datetime.timedelta(days=7))

    def fast_bf16(self):
        """Whether this device has bfloat16 in hardware."""
        if self.kind == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        if self.kind == "mps" or not hasattr(torch.cpu, "get_capabilities"):  # before torch 2.11
            return False
        able = torch.cpu.get_capabilities()
        return bool(able.get("amx_bf16") or able.get("avx512_bf16"))

    def parallel(self, network):
        """The network, with gradients that are averaged over the processes."""
        return DistributedDataParallel(network) if self.world > 1 else network

    def share(self, batch):
        """This process's slice of something drawn for the whole batch."""
        return batch.chunk(self.world)[self.rank]

    def mean(self, value):
        """The mean of a number over the processes, which wait for one another here."""
        if self.world == 1:
            return value
        total = torch.tensor(value, device=self.device)
        dist.all_reduce(total)
        return total.item() / self.world


def keep_freed_memory():
    """glibc returns large freed tensors to the system, and gets them back page by page in the next
    step. These options (malloc.h) keep them: no mmap, no trimming, one heap."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc: macOS, Windows
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
    mallopt(M_ARENA_MAX, 1)


def use_free_cores():
    """A thread for each core that other programs leave free now, on Linux; OMP_NUM_THREADS wins.

    torch's threads wait for one another, spinning: one of them that shares its core with a busy
    program slows all. The number stays for the whole run, as it decides the last bits of a sum.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    try:
        before = core_times()
        time.sleep(0.5)
        after = core_times()
    except (OSError, ValueError, AttributeError):  # no Linux
        return

    free = 0.0
    for core, (idle, total) in after.items():
        idle_before, total_before = before[core]
        free += (idle - idle_before) / max(1, total - total_before)
    torch.set_num_threads(max(1, min(torch.get_num_threads(), round(free))))


def core_times():
    """{core: (time idle, time in all)} of the cores that this process may use; in Linux's ticks."""
    times = {}
    usable = os.sched_getaffinity(0)
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in usable:
            ticks = [int(word) for word in ticks[:8]]  # user nice system idle iowait irq ...
            times[name] = (ticks[3] + ticks[4], sum(ticks))
    return times


# ---- The run's folder ---------------------------------------------------------------------------

FORMAT = 10  # of checkpoint.pt; to be raised when its contents or its scores change
# The last commit that read each earlier format.
LAST_COMMIT = {6: "efa1742", 7: "26559b5", 8: "a4ee699", 9: "81cd6b0"}
CHECKPOINT_SECONDS = 120  # between two checkpoints


def load_images(dataset, indices, device):
    """Images of the dataset at these indices -> (B, 3, size, size) float in [-1, 1]."""
    return to_float(dataset.images(indices).to(device))


def to_float(images):
    """uint8 images -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(images):
    """Float images in [-1, 1] -> uint8, on the CPU."""
    return ((images.cpu() + 1) * 127.5).round().clamp(0, 255).byte()


@torch.no_grad()
def encode(model, dataset, indices, device):
    """Codes (n, N) or (n, N, d) of the images at these indices, float32 on the CPU."""
    codes = []
    for part in indices.split(32):  # more would need more memory than a training step
        codes.append(model.represent(load_images(dataset, part, device)).cpu())
    return torch.cat(codes)


def write_atomically(path, content):
    """Write a text, or what content(file) writes, to a temporary name, then rename it.

    The file is the old or the new one, never half. Raises OSError, one line, for a full disk or a
    folder that may not be written.
    """
    temporary = Path(f"{path}.{os.getpid()}.tmp")  # a second process must not write into it, too
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save puts the first into the second
        reason = error if isinstance(error, OSError) else error.__context__
        words = getattr(reason, "strerror", None) or error
        raise OSError(f"cannot write {path}: {words}; what was there is untouched. "
                      "Make room, or the folder writable") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def reading(path, expected="a folder written by train.py, or a file by sample.py export"):
    """Within, whatever a damaged, foreign or missing file provokes is a ValueError of one line."""
    try:
        yield
        return
    except FileNotFoundError:
        found = "not found"
    except Exception as error:  # of KeyError and the like only the name tells something
        reason = type(error).__name__
        if isinstance(error, (OSError, ValueError, RuntimeError)) and str(error).strip():
            reason = str(error).strip().splitlines()[-1].strip()
        found = f"cannot be read, is damaged or foreign: {reason}"
    raise ValueError(f"{path} {found}; expected {expected}")


def in_shell(*words):
    """A command as one types it: a word with spaces gets quotes."""
    return shlex.join(str(word) for word in words)


def how_to_resume(folder, *flags):
    """The advice to go on with a run, as an error or a last line gives it."""
    return "go on with: " + in_shell("python", "train.py", "--resume", folder, *flags)


@contextlib.contextmanager
def alone_in(folder):
    """Within, no second process of this machine can train the run in this folder: ValueError there.

    The system frees the lock when this process ends, however it ends. Windows has no such lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{folder} is being trained by another process; expected a run "
                                 "that is at rest: wait for it, or stop it first") from None

        for left_over in folder.glob("checkpoint.pt.*.tmp"):  # of a process that was killed
            left_over.unlink()
        yield
    finally:
        os.close(lock)


def load_checkpoint(path):
    """The dict in a run's folder or an exported file, else ValueError. Nothing in it is run."""
    path = Path(os.path.expanduser(path))
    file = path / "checkpoint.pt" if path.is_dir() else path
    with reading(file):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice is for other programs
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        ours = isinstance(checkpoint, dict) and isinstance(checkpoint.get("format"), int)
        if not ours or "commit" not in checkpoint:
            raise ValueError("it has no number of a format and no commit")
    if checkpoint["format"] != FORMAT:
        written_by = str(checkpoint["commit"]).removesuffix("-dirty")
        commit = LAST_COMMIT.get(checkpoint["format"], written_by)
        raise ValueError(f"{file} has format {checkpoint['format']}, and this version reads "
                         f"{FORMAT}; use the code that reads it: git checkout {commit}")

    with reading(file):
        checkpoint["config"] = Config(**checkpoint["config"])
        validate(checkpoint["config"])
        complete = {"step", "model", "ema", "commit", "data"} <= checkpoint.keys()
        if checkpoint["stage"] not in Run.STAGES or not complete:
            raise ValueError("it is not complete")
    return checkpoint


def load_run(path, device="cpu"):
    """A trained run, from its folder or an exported file, else ValueError.

    Returns the model with averaged weights in float32, in eval mode; its Config; and a dict: scores
    (of metrics.json), step, commit, data (the dataset's identity), folder (for pictures).
    """
    path = Path(os.path.expanduser(path))
    checkpoint = load_checkpoint(path)
    config = checkpoint["config"]
    if checkpoint["stage"] == "first stage":
        raise ValueError(f"{path} has not finished its first stage; "
                         f"{how_to_resume(path)}")

    model = build_model(config)
    with reading(path):
        model.load_state_dict({**checkpoint["model"], **checkpoint["ema"]})

    about = {name: checkpoint.get(name, {}) for name in ("step", "commit", "data", "scores")}
    about["folder"] = path if path.is_dir() else Path()
    scores = path / "metrics.json"
    if scores.is_file():
        with reading(scores, f"JSON; for a new one {how_to_resume(path)}"):
            content = json.loads(scores.read_text(encoding="utf-8"))
            if content["config"]["steps"] == checkpoint["step"]:  # not the scores of fewer steps
                about["scores"] = content
    return model.to(device).eval().requires_grad_(False), config, about


def current_commit():
    """The commit of this code, "-dirty" if changed since; "" without git or outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


class Run:
    """A run's folder, which only the main process writes: config.json, log.csv, checkpoint.pt
    (everything needed to go on), metrics.json and samples.png.

    identity    the dataset's, to be kept in the checkpoint
    checkpoint  to go on from, or None for a new run
    """

    STAGES = ("first stage", "joint training")
    FILES = ("config.json", "log.csv", "checkpoint.pt", "metrics.json", "samples.png",
             "held_out.png")
    SCORES = ("factor_vae", "disentanglement", "completeness", "informativeness_test")
    COLUMNS = ("stage", "step", "loss", "lr", "grad_norm", "images_per_second",
               "mse", "entries_used", "perplexity", "kl", "total_correlation", *SCORES)

    def __init__(self, folder, config, backend, identity=None, checkpoint=None):
        self.folder = Path(folder)
        self.config = config
        self.backend = backend
        self.identity = identity or {}
        self.resumed = checkpoint or {}  # {}: new
        self.rows = self.resumed.get("log", [])  # of log.csv
        self.commit = current_commit()
        self.began = time.monotonic()
        self.saved = time.monotonic()
        self.stopping = False  # a signal came: stop after this step
        self.all_saved = False  # a signal may stop the run at once
        self.stage = self.STAGES[0]

    def print(self, text):
        """Print, from the main process only."""
        if self.backend.main:
            print_safely(text)

    def log_header(self, dataset, model):
        """Say what is trained with what, and count what that costs."""
        config = self.config
        threads = torch.get_num_threads()
        self.print(f"{dataset}\n{self.backend.kind}, {config.precision}, {threads} threads, "
                   f"processes: {self.backend.world}")
        before = self.resumed.get("threads", threads)
        if before != threads:
            self.print(f"the run had {before} threads until now: the last bits of its weights will "
                       f"differ from a run without a break (OMP_NUM_THREADS={before} keeps them)")
        for name, part in model.named_children():
            self.print(f"{name:12s} {sum(p.numel() for p in part.parameters()):>12,} parameters")
        self.flops = step_flops(config)

    def wants_first_stage(self, model):
        """Whether the first stage is still to be trained."""
        borrowed = bool(self.config.first_stage_from)
        done = self.resumed.get("stage") == "joint training"
        return has_first_stage(model) and not borrowed and not done

    def start_stage(self, stage, steps, batch, module, optimizer, average=None):
        """Restore a stage from the checkpoint, or save its beginning. Returns its first step.

        module      what is trained, with a state_dict
        optimizer   an Optimizer
        average     the averaged model of joint training
        """
        self.stage = stage
        self.steps = steps
        self.batch = batch
        self.state = (module, optimizer, average)
        old = self.resumed
        self.resumed = {}
        # Since the last report: the losses, how often each codebook entry was the nearest.
        self.losses = old.get("losses", [])
        self.counts = old.get("counts", 0)
        # Since the last report or the start of this process, for the speed: the time, the step.
        self.since = time.monotonic()
        self.since_step = old.get("step", 0)

        if old:
            self.restore(old)
            self.print(f"resumed at step {old['step']} of the {stage}")
        else:
            self.save(0)
        self.write("config.json", json.dumps(dataclasses.asdict(self.config), indent=1))
        return old.get("step", 0)

    def restore(self, checkpoint):
        """Load the states of what is trained, of its optimizer and of the average."""
        module, optimizer, average = self.state
        with reading(self.folder):  # pop: to hold the weights but once
            module.load_state_dict(checkpoint.pop("model"))
            states = checkpoint.pop("optimizer")["parts"]
            for part, state in zip(optimizer.parts, states, strict=True):
                part.load_state_dict(state)
            if average is not None:
                average.load_state_dict({**module.state_dict(), **checkpoint.pop("ema")})

    def track(self, step, loss, norm):
        """Keep a step's loss. Raises ValueError if the gradient's norm is not finite."""
        self.losses.append(loss)
        self.norm = norm
        if math.isfinite(norm):  # the same in all processes: gradients are averaged
            return

        flags = ["--precision", "fp32"]
        if self.stage == "joint training":  # of the first stage, --lr is not the learning rate
            flags += ["--lr", f"{self.config.lr / 3:.1g}"]
        raise ValueError(f"loss {loss:.4g} and gradient norm {norm} in step {step + 1} of the "
                         f"{self.stage}; the last good checkpoint is kept; "
                         f"{how_to_resume(self.folder, *flags)}")

    def due(self, step):
        """Whether to report after this many steps; after 20, to say how long it will take."""
        return step % self.config.log_every == 0 or step in (20, self.steps)

    def score_due(self, step):
        """Whether quick scores are due after this many joint steps."""
        every = self.config.score_every
        joint = self.stage == "joint training"
        return joint and every > 0 and 0 < step < self.steps and step % every == 0

    def report(self, step, **row):
        """A row of log.csv and a line on the terminal: mean loss and speed since the last ones."""
        module = self.state[0]
        row.update(getattr(module, "terms", {}))  # parts of the loss, of a model that has some
        loss = self.backend.mean(sum(self.losses) / len(self.losses))
        seconds = (time.monotonic() - self.since) / (step - self.since_step)  # a step
        self.losses = []
        self.counts = 0
        self.since = time.monotonic()
        self.since_step = step

        speed = self.batch / seconds
        self.log(stage=self.stage, step=step, loss=loss, grad_norm=self.norm,
                 images_per_second=speed, **row)

        words = [f"{self.stage} {step}/{self.steps}", f"loss {loss:.4f}"]
        words += [f"{name.replace('_', ' ')} {value:.3g}" for name, value in row.items()]
        words.append(f"{speed:.0f} img/s")
        if step < self.steps:
            minutes = round((self.steps - step) * seconds / 60)
            remaining = f"about {minutes} minutes" if minutes > 1 else "about a minute"
            words.append(f"{remaining} left in this stage")
        self.print("  ".join(words))

    def write(self, name, content, needed=False):
        """A file of the run: a text, or what content(file) writes. Unless it is needed, a run goes
        on without it: a table may be open in a program that forbids to replace it."""
        if not self.backend.main:
            return
        try:
            write_atomically(self.folder / name, content)
        except OSError as error:
            if needed:
                raise
            self.print(f"{error}; the run goes on")

    def save(self, step):
        """checkpoint.pt: everything needed to go on after this many steps of the stage."""
        module, optimizer, average = self.state
        content = {
            "format": FORMAT,
            "config": dataclasses.asdict(self.config),
            "stage": self.stage,
            "step": step,
            "commit": self.commit,
            "threads": torch.get_num_threads(),
            "data": self.identity,
            "log": self.rows,
            "losses": self.losses,
            "counts": self.counts,
            "model": module.state_dict(),
            "optimizer": {"parts": [part.state_dict() for part in optimizer.parts]},
            "ema": trained_state(average) if average is not None else {},
        }
        self.write("checkpoint.pt", lambda file: torch.save(content, file), needed=True)
        self.saved = time.monotonic()

    def checkpoint(self, step):
        """Save if it is time to. If asked to stop, save and raise KeyboardInterrupt."""
        stop = self.backend.mean(float(self.stopping)) > 0  # in any process
        overdue = time.monotonic() - self.saved > CHECKPOINT_SECONDS
        if stop or overdue or step == self.steps or self.score_due(step):
            self.save(step)
        if stop:
            place = f"step {step} of the {self.stage}"
            raise KeyboardInterrupt(f"stopped after {place}; {how_to_resume(self.folder)}")

    def stop(self, number=None, frame=None):
        """What Ctrl-C, a kill and a closed terminal do: end after this step, or at once if all is
        saved, or if asked a second time."""
        advice = how_to_resume(self.folder)
        if self.all_saved:
            raise KeyboardInterrupt(f"stopped; the weights are saved, {advice}")
        if self.stopping:
            raise KeyboardInterrupt(f"stopped at once; {advice}")
        self.stopping = True
        with contextlib.suppress(OSError):  # not `print`, which may be at work at this moment
            os.write(2, b"stopping after this step; once more to stop at once\n")

    @contextlib.contextmanager
    def silence(self, text):
        """Say that a stretch without a line begins. All is saved: a signal may end it at once."""
        self.print(text)
        self.all_saved = True
        if self.stopping:  # a signal came just before
            self.stop()
        yield
        self.all_saved = False

    def log(self, **row):
        """Add a row to log.csv. The rows are in the checkpoint too, so a resumed log has no gap."""
        for name, value in row.items():
            if isinstance(value, float):
                row[name] = f"{value:.6g}"
        self.rows.append(row)

        lines = [",".join(self.COLUMNS)]
        for row in self.rows:
            lines.append(",".join(str(row.get(name, "")) for name in self.COLUMNS))
        self.write("log.csv", "\n".join(lines) + "\n")

    def finish(self, scores):
        """metrics.json and the last lines of a run."""
        first, joint = training_tflop(self.config, self.flops)
        content = {"config": dataclasses.asdict(self.config), "commit": self.commit,
                   "tflop": first + joint, **scores}
        for name, value in scores.items():
            if isinstance(value, float):
                self.print(f"{name:28s} {value:.3f}")
        for name, share in scores.get("exchanges_by_factor", {}).items():
            clean = scores["clean_exchanges_by_factor"][name]
            self.print(f"  {name:26s} {share:.2f}, clean {clean:.2f}")
        if scores.get("note"):
            self.print(scores["note"])
        self.write("metrics.json", json.dumps(content, indent=1), needed=True)

        borrowed = ", borrowed" if self.config.first_stage_from else ""
        minutes = (time.monotonic() - self.began) / 60
        self.print(f"compute: {first + joint:,.1f} TFLOP = {first:,.1f} (first stage{borrowed})"
                   f" + {joint:,.1f} (joint training)")
        self.print(f"done in {minutes:.0f} minutes; weights and scores are in {self.folder}")
        self.print(f"look at {self.folder / 'samples.png'}: images, what their latents decode to, "
                   f"samples from their tokens")
        self.print(f"next: {in_shell('python', 'sample.py', 'swap', self.folder)}")


# ---- The command line ---------------------------------------------------------------------------

RANGES = {
    "0 or more": lambda value: 0 <= value < math.inf,
    "0 to below 2^63": lambda value: 0 <= value < 2**63,
    "1 or more": lambda value: 1 <= value < math.inf,
    "above 0, at most 1000": lambda value: 0 < value <= 1000,
    "0 to below 1": lambda value: 0 <= value < 1,
    "each 1 or more": lambda values: len(values) > 0 and min(values) >= 1,
}
# What a resumed run may change: where and how well it goes on, not what it is.
CHANGEABLE = {"data", "cache", "precision", "steps", "lr", "lr_decay", "score_every"}
print_safely = data.print_safely  # print that never ends a run, whatever the terminal


def require(ok, name, found, expected):
    """ValueError in one line, naming the flag, unless ok."""
    if not ok:
        raise ValueError(f"--{name.replace('_', '-')} is {found}; expected {expected}")


def validate(config):
    """Raises ValueError, one line, for the first value that cannot work, before any work starts."""
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        allowed = spec.metadata["allowed"]
        if isinstance(allowed, str):
            require(RANGES[allowed](value), spec.name, value, allowed)
        elif allowed:
            names = ", ".join(map(str, allowed))
            require(value in allowed, spec.name, value, f"one of {names}")

    validate_variant(config)
    unit = math.lcm(4, config.heads)
    require(config.channels % unit == 0, "channels", config.channels, f"a multiple of {unit}")
    try:
        with torch.device("meta"):  # without memory: what the parts refuse, they refuse here
            model = build_model(config)
        torch.empty(config.batch, *model.latent_shape, device="meta")
    except (RuntimeError, TypeError):  # what torch says of a size that it cannot count
        raise ValueError("the sizes of the model or its batch are beyond any memory; expected "
                         "smaller ones of --batch, --channels, --multipliers, --num-tokens or "
                         "--token-dim") from None
    side = model.latent_shape[-1]
    halvings = 2 ** (len(config.multipliers) - 1)
    if len(model.latent_shape) == 3:
        require(side % halvings == 0, "multipliers", config.multipliers,
                f"levels that halve a side of {side} evenly")

    if config.first_stage_from:
        require(has_first_stage(model), "first_stage", config.first_stage_from,
                f"no RUN with --variant {config.variant}, which has no first stage")
    elif has_first_stage(model):
        require(config.vq_steps > 0, "vq_steps", 0, "1 or more, or --first-stage RUN")


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message):
        raise ValueError(f"{message}; see python {self.prog} --help")

    def parse_args(self, args=None, namespace=None):
        """Words -> values. An empty word is refused: it mostly is a shell's variable that is not
        set, and would mean something else than was asked for."""
        words = sys.argv[1:] if args is None else [str(word) for word in args]
        for before, word in zip([self.prog, *words], words):
            if word == "" or re.fullmatch("--[^=]+=", word):
                self.error(f"nothing stands after {word or before}; expected a value there")
        return super().parse_args(words, namespace)


@contextlib.contextmanager
def signals(act):
    """Within, Ctrl-C, a kill and a closed terminal call act(number, frame)."""
    numbers = {signal.SIGINT, signal.SIGTERM}
    if hasattr(signal, "SIGHUP"):  # Windows has none
        numbers.add(signal.SIGHUP)

    old = {}
    if threading.current_thread() is threading.main_thread():  # other threads get no signals
        for number in numbers:
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                old[number] = signal.signal(number, act)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextlib.contextmanager
def one_line_errors():
    """What a user gets wrong is a ValueError or OSError everywhere here: one line, status 2."""
    try:
        with signals(signal.default_int_handler):  # a kill tidies up, too
            yield
        return
    except KeyboardInterrupt as stop:
        status = 130
        text = str(stop) or "interrupted; nothing half-written is left"
    except (ValueError, OSError) as error:
        status = 2
        text = f"error: {' '.join(str(error).split())}"
        if getattr(error, "filename", None):  # the system's own words: they do not say what to do
            text = (f"error: {error.filename}: {error.strerror}; expected a place that this user "
                    "may read and write")
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError for a lack of memory
        memory = isinstance(error, MemoryError) or re.search("out of memory|allocate", str(error))
        if not memory:
            raise  # no fault of the user
        status = 2
        text = "error: out of memory; try a smaller batch, count or model"
    with contextlib.redirect_stdout(sys.stderr):
        print_safely(text)
    sys.exit(status)


def make_parser():
    """The flags of a run, and one for each field of Config that has a help text."""
    parser = Parser("train.py", argument_default=argparse.SUPPRESS,
                    description="Train EncDiff: first stage, joint training, scores.")
    parser.add_argument("--preset", choices=PRESETS, help="values of the flags below; "
                        "small (default): for two CPU cores; large: the same recipe with the "
                        "paper's sizes and 4,000 joint steps, for a GPU; paper: the paper's "
                        "recipe, for a GPU")
    parser.add_argument("--out", help="folder of a new run (default: runs/PRESET-SEED)")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: the best here")

    for spec in dataclasses.fields(Config):
        text = spec.metadata["help"].format(variants=", ".join(VARIANTS))
        allowed = spec.metadata["allowed"]
        if not text:
            continue
        options = {"type": type(spec.default)}
        if options["type"] is tuple:
            options = {"type": int, "nargs": "+"}

        notes = []
        if isinstance(allowed, str):
            notes.append(allowed)
        elif allowed:  # `validate` refuses others
            options["metavar"] = "{" + ",".join(map(str, allowed)) + "}"
        if spec.default != "":
            small = SMALL.get(spec.name, spec.default)
            notes.append(f"small: {small}, paper: {spec.default}")
        if notes:
            text += f" ({'; '.join(notes)})"
        flag = "--" + spec.name.replace("_", "-")
        parser.add_argument(flag, help=text.replace("%", "%%"), **options)
    return parser


def parse(arguments):
    """-> (Config, run's folder, checkpoint to go on from or None, device or None)."""
    given = vars(make_parser().parse_args(arguments))
    preset = given.pop("preset", None)
    out = given.pop("out", None)
    resume = given.pop("resume", None)
    device = given.pop("device", None)

    if given.get("first_stage", "deep") not in vq.KINDS:  # a run; its kind is kept, as it may go
        lender = Path(os.path.expanduser(given["first_stage"]))
        known = ", ".join(vq.KINDS)
        require(lender.exists(), "first_stage", lender, f"RUN or one of {known}")
        old = load_checkpoint(lender)["config"]
        given["first_stage_from"] = str(lender)
        given["first_stage"] = old.first_stage
        given["vq_steps"] = old.vq_steps
    for name in ("data", "cache", "first_stage_from"):  # found from any working directory
        if given.get(name):
            given[name] = os.path.abspath(os.path.expanduser(given[name]))

    if resume:
        require(not out and not preset, "resume", resume, "no --out and no --preset beside it")
        folder = Path(os.path.expanduser(resume))
        config, checkpoint = resumed_config(folder, given)
        return config, folder, checkpoint, device
    preset = preset or "small"
    config = Config(**{**PRESETS[preset], **given})
    validate(config)
    print_safely(f"preset {preset}")
    folder = Path(os.path.expanduser(out or f"runs/{preset}-{config.seed}"))
    return config, folder, None, device


def resumed_config(folder, given):
    """The config and checkpoint of a run to go on with; given: flags, of which few may change."""
    checkpoint = load_checkpoint(folder)
    old = checkpoint["config"]
    config = dataclasses.replace(old, **given)
    validate(config)

    changed = []
    for name in given.keys() - CHANGEABLE:
        before, after = getattr(old, name), getattr(config, name)
        if before != after:
            changed.append(f"{name} {before} -> {after}")
    words = ", ".join(changed)
    allowed = ", ".join(sorted(CHANGEABLE))
    require(not changed, "resume", folder, f"no other values ({words}): of all flags only "
            f"{allowed} may change. Train a new run with --out")

    done = checkpoint["step"]
    enough = checkpoint["stage"] == "first stage" or config.steps >= done
    require(enough, "steps", config.steps, f"{done} or more, as many as {folder} has done")
    complete = folder.is_dir() and "log" in checkpoint
    require(complete, "resume", folder, "a run's folder, no export")
    return config, checkpoint


def check_new_run(config, folder):
    """Refuses a folder that a new run would spoil, and a lender without a first stage."""
    require(folder.is_dir() or not folder.exists(), "out", folder, "a folder, and this is a file")
    taken = (folder / "checkpoint.pt").exists()
    require(not taken, "out", folder, "a folder that holds no run yet; or " + how_to_resume(folder))
    foreign = [name for name in Run.FILES if (folder / name).exists()]
    require(not foreign, "out", folder, "a folder without " + ", ".join(foreign))
    if config.data:
        place = folder.resolve()
        root = Path(config.data).resolve()
        names = os.listdir(folder) if folder.is_dir() else []
        pictures = [name for name in names if name.lower().endswith(data.PICTURES)]
        of_data = place == root or (root in place.parents and pictures)
        require(not of_data, "out", folder, "another folder than one of the data")

    if config.first_stage_from:
        lender = load_run(config.first_stage_from)[0]
        require(has_first_stage(lender), "first_stage", config.first_stage_from,
                "a run that has a first stage")


def time_of_save(folder):
    """When the checkpoint of this folder was written, in nanoseconds; 0: there is none."""
    path = folder / "checkpoint.pt"
    return path.stat().st_mtime_ns if path.exists() else 0


def open_data(config, backend):
    """The dataset of a config. The main process converts it; the others then read its cache."""
    require(not config.data or Path(config.data).exists(), "data", config.data,
            "the place where the dataset is now: nothing is found there")
    if not backend.main:
        dist.barrier()
    dataset = data.open_dataset(config.data or None, config.size, config.cache or None)
    if backend.main and backend.world > 1:
        dist.barrier()
    return dataset


def check_same_data(trained_on, dataset, folder):
    """Refuses to go on with a run on another dataset. trained_on: the identity of the first one."""
    differs = []
    for name, value in trained_on.items():
        if value != dataset.identity.get(name):
            differs.append(f"{name} {value}, not {dataset.identity.get(name)}")
    words = "; ".join(differs)
    require(not differs, "data", dataset.name, f"the dataset of {folder}: {words}")


def main(arguments=()):
    """The command line, also to be called from Python: main(["--steps", 100]).

    What cannot work is a ValueError or OSError of one line before any work; a signal is
    KeyboardInterrupt.
    """
    config, folder, checkpoint, device = parse(arguments)
    saved = time_of_save(folder)
    backend = Backend(device)
    if config.precision == "auto":
        config.precision = "bf16" if backend.fast_bf16() else "fp32"
    if not checkpoint:
        check_new_run(config, folder)
    batches = math.gcd(config.batch, FIRST_STAGE[config.first_stage]["batch"])
    require(batches % backend.world == 0, "batch", config.batch, f"a number of images that "
            f"{backend.world} processes can share, as in the first stage")

    # The losses of these variants are no means over the images of a batch.
    of_whole_batch = {"anneal-vae", "tc-vae", "factor-vae"} & {*config.variant.split("+")}
    require(backend.world == 1 or not of_whole_batch, "variant", config.variant,
            "another variant, or a single process: a share of a batch has another loss")

    dataset = open_data(config, backend)
    if checkpoint:
        check_same_data(checkpoint["data"], dataset, folder)
    training = without_held_out(dataset, config)  # ValueError if there is no such combination
    if backend.main and config.hold_out:
        left_out = len(dataset) - len(training)
        print_safely(f"held out: {left_out:,} of {len(dataset):,} images, {config.hold_out}")

    with alone_in(folder) if backend.main else contextlib.nullcontext():
        # Converting the data takes minutes, in which another process may have trained here.
        untouched = not backend.main or time_of_save(folder) == saved
        require(untouched, "resume" if checkpoint else "out", folder, "a run that no other process "
                "trains: one did just now; start again")

        train_run(Run(folder, config, backend, dataset.identity, checkpoint), dataset)
    if backend.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])

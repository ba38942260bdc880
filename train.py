"""Train EncDiff in one command: first stage, then encoder and denoiser together, then the scores.

WHERE     Read after metrics.py and data.py, before sample.py. This is where everything meets.
PAPER     arXiv 2402.09712, Sec. 4.1 ("Training Details"), Appendix D.
SHAPES    as in encdiff.py
IDEA      Two stages. (1) The autoencoder of vq.py learns to compress images; it is then frozen.
          (2) Encoder, token maps and U-Net are trained together, by eq. (3) and nothing else.
          Everything random in a step is drawn after seeding with (seed, stage, step): a run that
          was interrupted goes on bit for bit without storing random states, and P processes that
          each take their share of the same batch do what one process would do.
          What is scored, drawn and shipped is the moving average (EMA) of the weights.
DIFFERS   The paper's learning rate and batch are kept in the preset `paper`; how long its first
          stage was trained is not said there: 10,000 steps are our choice. `small` is ours.
          The moving average starts fast and slows down, so that a short run is not scored on its
          initialisation. The last weights are scored, never the best: labels would leak in.
TRY       python train.py --steps 50 --vq-steps 250 --out runs/try   ->   a run in two minutes
"""
import argparse
import contextlib
import copy
import csv
import ctypes
import dataclasses
import io
import json
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import data
import encdiff
import metrics
import unet
import vq

FORMAT = 3  # of checkpoint.pt; to be raised when its contents change
CHECKPOINT_SECONDS = 120

# ---- What can be set ----------------------------------------------------------------------------


def field(default, meaning, choices=None):
    """A field of Config with what its flag's --help says and the values it may have."""
    return dataclasses.field(default=default, metadata={"help": meaning, "choices": choices})


@dataclasses.dataclass
class Config:
    """Every hyperparameter, and so every flag, of a run. The defaults are the preset `paper`."""

    data: str = field("", "dataset file or folder; empty: Shapes3D, rendered here")
    cache: str = field("", "folder for the converted dataset; empty: beside the dataset")
    size: int = field(64, "side of the images in pixels", (32, 64, 128))
    seed: int = field(0, "fixes everything random")
    precision: str = field("auto", "auto: bf16 autocast where the hardware is fast at it",
                           ("auto", "bf16", "fp32"))
    # The first stage (vq.py)
    first_stage: str = field("", "run folder to take a trained first stage from; empty: train one")
    vq_steps: int = field(10_000, "training steps of the first stage")
    vq_batch: int = field(64, "its images a step")
    vq_lr: float = field(1e-3, "its learning rate; falls to 0 in the last 60%% of its steps")
    vq_squared: float = field(0.0, "weight of the squared error beside L1 in its loss")
    vq_channels: int = field(32, "its width at the first level")
    vq_multipliers: tuple = field((1, 2, 4), "its width at each level, in units of that")
    vq_blocks: int = field(2, "its residual blocks a level")
    vq_patch: int = field(1, "side of the pixel blocks folded into channels at its input")
    vq_linear: bool = field(False, "its encoder is a single convolution: latents linear in pixels")
    vq_encoder_steps: int = field(0, "steps after which its encoder stays as it is; 0: never")
    vq_warmup: int = field(200, "its steps without rounding; then the codebook is set from data")
    latent_channels: int = field(3, "channels of the latent")
    codebook_size: int = field(2048, "entries of the codebook")
    commitment: float = field(0.25, "weight of the commitment loss")
    gan: bool = field(False, "add the patch discriminator to the first stage's loss")
    # The encoder and the tokens (encdiff.py)
    encoder: str = field("cnn", "image encoder", tuple(encdiff.ENCODERS))
    encoder_width: int = field(64, "its width")
    tokens: str = field("scalar", "what a token is made of", ("scalar", "vector"))
    num_tokens: int = field(20, "number of concept tokens, N")
    token_dim: int = field(32, "width of a concept token, d")
    # The denoiser (unet.py)
    channels: int = field(64, "width of the U-Net at the first level")
    multipliers: tuple = field((1, 2, 4, 4), "its width at each level, in units of that")
    blocks: int = field(2, "its residual blocks a level")
    attention: tuple = field((1, 2, 4), "downsampling factors at which it attends")
    heads: int = field(8, "its attention heads")
    dropout: float = field(0.1, "its dropout")
    self_attention: bool = field(True, "attention among positions, beside that to the tokens")
    conditioning: str = field("cross", "how tokens reach it", ("cross", "adagn"))
    decoder: str = field("diffusion", "direct: no noise (EncDec w/o Diff)", ("diffusion", "direct"))
    schedule: str = field("cosine", "noise schedule", encdiff.SCHEDULES)
    timesteps: int = field(1000, "diffusion timesteps, T")
    regularizer: str = field("none", "constraint on the codes (Table 11)",
                             tuple(encdiff.REGULARIZERS))
    # Joint training
    low_noise_first: float = field(0.0, "first share of the steps, in which a timestep is the "
                                        "lowest of three draws; later, and in the paper: uniform")
    steps: int = field(7_500, "training steps of encoder and denoiser")
    batch: int = field(64, "images a step")
    lr: float = field(1e-4, "learning rate")
    lr_warmup: int = field(0, "steps in which it rises from 0")
    lr_decay: float = field(0.0, "last share of the steps in which it falls to 0")
    weight_decay: float = field(0.01, "AdamW's weight decay")
    clip: float = field(1.0, "largest norm of the gradient")
    ema: float = field(0.9999, "decay of the averaged weights")
    log_every: int = field(50, "steps between two lines of log.csv")
    score_every: int = field(750, "steps between quick scores and pictures; 0: none")

    def __post_init__(self):
        for f in dataclasses.fields(self):  # JSON, checkpoints and argparse bring lists
            if isinstance(f.default, tuple):
                setattr(self, f.name, tuple(getattr(self, f.name)))


# What two CPU cores can do. The first stage halves the side of the latent once more (f = 8, four
# channels), as 8x8 latents are much cheaper to denoise than 16x16. Its encoder is one convolution
# and is trained briefly, as the factors fall apart sooner on such latents; its decoder goes on.
# Less width, no attention among positions, the authors' lighter encoder, a higher learning rate
# that decays. In the first third of the steps low noise is more frequent: there position and form
# pay as well as colour, under strong noise hardly ever (README, "What we learned").
SMALL = dict(vq_steps=8_000, vq_encoder_steps=1_500, vq_batch=16, vq_lr=2e-3, vq_squared=4.0,
             vq_channels=64, vq_multipliers=(1, 2), vq_blocks=1, vq_patch=4, vq_linear=True,
             latent_channels=4, encoder="cnn_bn", token_dim=16,
             channels=48, multipliers=(1, 2), blocks=1, attention=(1, 2), heads=4, dropout=0.0,
             self_attention=False,
             low_noise_first=1 / 3, steps=9_000, lr=1e-3, lr_warmup=100, lr_decay=0.4, ema=0.999,
             log_every=100, score_every=1_500)
PRESETS = {"paper": {}, "small": SMALL}


def check(config):
    """Raises ValueError, one line, for the first value that cannot work, before any work starts."""
    c = config
    for name in ("vq_batch", "vq_channels", "vq_blocks", "vq_patch", "latent_channels",
                 "encoder_width", "num_tokens", "token_dim", "channels", "blocks", "heads", "batch",
                 "log_every"):
        need(getattr(c, name) >= 1, name, getattr(c, name), "at least 1")
    for name in ("steps", "vq_steps", "vq_warmup", "vq_squared", "lr_warmup", "score_every", "seed",
                 "commitment", "weight_decay", "vq_encoder_steps"):
        need(getattr(c, name) >= 0, name, getattr(c, name), "0 or more")
    for name in ("lr", "vq_lr", "clip"):
        need(0 < getattr(c, name) < math.inf, name, getattr(c, name), "a positive number")
    for name in ("lr_decay", "dropout", "ema", "low_noise_first"):
        need(0 <= getattr(c, name) < 1, name, getattr(c, name), "at least 0 and below 1")
    for name in ("multipliers", "vq_multipliers", "attention"):
        values = getattr(c, name)
        need(values and min(values) >= 1, name, values, "whole numbers from 1 up")
    for f in dataclasses.fields(c):
        if f.metadata["choices"]:
            need(getattr(c, f.name) in f.metadata["choices"], f.name, getattr(c, f.name),
                 "one of " + ", ".join(map(str, f.metadata["choices"])))
    need(c.codebook_size >= 2, "codebook_size", c.codebook_size, "at least 2")
    need(c.timesteps >= 2, "timesteps", c.timesteps, "at least 2")
    signal = encdiff.cumulative(encdiff.beta_schedule(c.schedule, c.timesteps))[-1].float()
    need(signal > 0, "timesteps", c.timesteps,
         f"fewer: with the schedule {c.schedule} no signal is left at the end")
    need(c.vq_channels % 32 == 0, "vq_channels", c.vq_channels, "a multiple of GroupNorm's 32")
    need(c.channels % 4 == 0, "channels", c.channels, "a multiple of 4")
    for m in c.multipliers:
        need(c.channels * m % c.heads == 0, "heads", c.heads, f"a divisor of {c.channels * m}")
    levels = len(c.multipliers)
    factor = c.vq_patch * 2 ** (len(c.vq_multipliers) - 1)
    need(c.size % factor == 0, "vq_patch", c.vq_patch,
         f"the first stage's downsampling by {factor} to divide the size {c.size}")
    need(c.size // factor % 2 ** (levels - 1) == 0, "multipliers", c.multipliers,
         f"{levels} levels to halve the latent's side of {c.size // factor} without a remainder")
    need(c.vq_steps > c.vq_warmup or c.first_stage, "vq_steps", c.vq_steps,
         f"more than vq_warmup = {c.vq_warmup}, or the codebook is never set")
    need(c.conditioning == "cross" or c.decoder == "diffusion", "decoder", c.decoder,
         "diffusion with --conditioning adagn: the paper's direct decoder attends to the tokens")
    need(c.regularizer == "none" or c.tokens == "scalar", "regularizer", c.regularizer,
         "none with --tokens vector: the constraints are on scalars")
    need(c.regularizer != "orthogonal" or c.num_tokens <= c.token_dim, "num_tokens", c.num_tokens,
         f"at most token_dim = {c.token_dim} orthogonal tokens")


def need(ok, name, found, expected):
    """ValueError in one line, naming the flag, unless ok."""
    if not ok:
        raise ValueError(f"--{name.replace('_', '-')} is {found}; expected {expected}")


def build_model(config):
    """The untrained EncDiff of a config, on the CPU."""
    c = config
    first_stage = vq.VQAutoencoder(c.vq_channels, c.vq_multipliers, c.vq_blocks, c.latent_channels,
                                   c.codebook_size, c.commitment, c.vq_patch, c.vq_linear)
    side = c.size // first_stage.factor
    maps = encdiff.REGULARIZERS[c.regularizer] if c.tokens == "scalar" else encdiff.VectorTokens
    token_map = maps(c.num_tokens, c.token_dim)
    more = {"queries": c.num_tokens} if c.encoder == "transformer" else {}
    encoder = encdiff.ENCODERS[c.encoder](token_map.outputs, c.size, c.encoder_width, **more)
    names = ("latent_channels", "channels", "multipliers", "blocks", "attention", "heads",
             "token_dim", "dropout", "self_attention", "conditioning", "num_tokens")
    options = {name: getattr(c, name) for name in names}
    parts = [first_stage, encoder, token_map]
    rest = [(c.latent_channels, side, side), c.schedule, c.timesteps]
    if c.decoder == "direct":
        return encdiff.EncDec(*parts, unet.DirectDecoder(side, **options), *rest)
    return encdiff.EncDiff(*parts, unet.UNet(**options), *rest)


# ---- The two stages -----------------------------------------------------------------------------


def seed_step(config, stage, step):
    """Make everything random in this step a function of (seed, stage, step) alone."""
    torch.manual_seed(random.Random(f"{config.seed} {stage} {step}").getrandbits(32))


def set_lr(optimizer, peak, step, steps, warmup, decay):
    """Linear rise over `warmup` steps, constant, linear fall over the last share `decay`."""
    lr = peak * min(1, (step + 1) / max(1, warmup))
    if decay:
        lr *= min(1, (steps - step) / (decay * steps))
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def step_flops(config):
    """{stage: floating-point operations of one of its steps}."""
    with torch.random.fork_rng(devices=[]):
        model, counts = build_model(config), {}
        first = vq.FirstStageLoss(copy.deepcopy(model.first_stage)).requires_grad_(True).train()
        for stage, module, batch in [("first stage", first, config.vq_batch),
                                     ("joint training", model.train(), config.batch)]:
            with FlopCounterMode(display=False) as counter:
                loss = module(torch.zeros(2, 3, config.size, config.size))
                (loss[0] if isinstance(loss, tuple) else loss).backward()
            counts[stage] = counter.get_total_flops() / 2 * batch
    return counts


class Progress:
    """Means and speed since the last log line, and the time left."""

    def __init__(self, steps, batch):
        self.steps, self.batch, self.began, self.losses = steps, batch, time.monotonic(), []

    def line(self, step, machine):
        """-> mean loss, images a second, "h:mm:ss" left; starts counting anew."""
        now, done = time.monotonic(), len(self.losses)
        speed = done / (now - self.began)
        loss = machine.mean(float(np.mean(self.losses)))
        self.losses, self.began = [], now
        left = int((self.steps - step) / speed)
        return loss, speed * self.batch, f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"


def descend(loss, parameters, optimizer, config, run, stage, step):
    """Backward, clip, step; returns the gradient norm. Raises ValueError if that is not finite."""
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip).item()
    if not math.isfinite(norm):  # the same in all processes: gradients are averaged
        raise ValueError(f"loss {loss.item():.4g} and gradient norm {norm} in step {step + 1} of "
                         f"the {stage}; the last good checkpoint in {run.folder} is kept. Try a "
                         f"lower learning rate or --precision fp32")
    optimizer.step()
    optimizer.zero_grad()  # now, not before `backward`: the next step's activations need the room
    return norm


def train_first_stage(run, dataset, model, checkpoint):
    """Stage 1: images -> latent -> images. Leaves model.first_stage trained and frozen."""
    config, machine, stage = run.config, run.machine, "first stage"
    loss_of = vq.FirstStageLoss(model.first_stage, config.vq_squared,
                                vq.PatchDiscriminator() if config.gan else None)
    loss_of.to(machine.device).requires_grad_(True).train()
    encoder = list(model.first_stage.encoder.parameters())
    others = [p for name, p in loss_of.named_parameters() if ".encoder." not in name]
    optimizer = torch.optim.AdamW([{"params": encoder}, {"params": others}], config.vq_lr,
                                  betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    start = 0
    if checkpoint:
        restore(loss_of, checkpoint["model"], run.folder)
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["step"]
    else:
        run.save(stage, 0, loss_of, optimizer)
    network, parameters = machine.parallel(loss_of), list(loss_of.parameters())
    progress, counts = Progress(config.vq_steps, config.vq_batch), 0
    for step in range(start, config.vq_steps):
        seed_step(config, stage, step)
        indices = torch.randint(len(dataset), (config.vq_batch,))
        images = to_float(dataset.images(machine.share(indices)).to(machine.device))
        lr = set_lr(optimizer, config.vq_lr, step, config.vq_steps, 100, 0.6)
        if 0 < config.vq_encoder_steps <= step:
            optimizer.param_groups[0]["lr"] = 0.0  # the latent stays, the decoder goes on
        if step == config.vq_warmup:  # from the whole batch, so that all processes agree
            with torch.no_grad():
                whole = to_float(dataset.images(indices).to(machine.device))
                model.first_stage.quantizer.initialise(model.first_stage.encode(whole))
        with machine.autocast(config):
            loss, reconstruction, codes = network(images)
        norm = descend(loss, parameters, optimizer, config, run, stage, step)
        counts = counts + torch.bincount(codes.flatten(), minlength=config.codebook_size)
        progress.losses.append(loss.item())
        if (step + 1) % config.log_every == 0 or step + 1 == config.vq_steps:
            mean, speed, left = progress.line(step + 1, machine)
            used, perplexity = vq.codebook_usage(counts)
            mse, counts = F.mse_loss(reconstruction, images).item(), 0
            run.log(stage=stage, step=step + 1, loss=mean, lr=lr, grad_norm=norm,
                    images_per_second=speed, mse=mse, codes_used=used, perplexity=perplexity)
            run.print(f"first stage {step + 1}/{config.vq_steps}  loss {mean:.4f}  mse {mse:.5f}  "
                      f"codes used {used:.0%}  {speed:.0f} img/s  left {left}")
        run.checkpoint(stage, step + 1, loss_of, optimizer)
    model.first_stage.requires_grad_(False).eval()


def begin_jointly(run, dataset, model, checkpoint):
    """What stage 2 starts from: averaged model, optimizer and step, of the checkpoint if any."""
    config, device = run.config, run.machine.device
    model.to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], config.lr,
                                  weight_decay=config.weight_decay, fused=True)
    if checkpoint:
        restore(model, checkpoint.pop("model"), run.folder)  # pop: to hold the weights but once
        optimizer.load_state_dict(checkpoint["optimizer"])
    else:
        seed_step(config, "joint training", -1)
        some = dataset.images(torch.randint(len(dataset), (1024,)))
        model.measure_latents(to_float(some.to(device)))
    average = copy.deepcopy(model).requires_grad_(False).eval()
    average.first_stage = model.first_stage  # frozen: one copy will do
    if checkpoint:
        restore(average, {**model.state_dict(), **checkpoint.pop("ema")}, run.folder)
        return average, optimizer, checkpoint["step"]
    run.save("joint training", 0, model, optimizer, average)
    return average, optimizer, 0


def train_jointly(run, dataset, model, checkpoint):
    """Stage 2: encoder, token maps and denoiser by eq. (3). Returns the averaged model."""
    config, machine, stage = run.config, run.machine, "joint training"
    average, optimizer, start = begin_jointly(run, dataset, model, checkpoint)
    parameters = optimizer.param_groups[0]["params"]
    network, progress = machine.parallel(model), Progress(config.steps, config.batch)
    for step in range(start, config.steps):
        seed_step(config, stage, step)
        indices = torch.randint(len(dataset), (config.batch,))
        draws = 3 if step < config.low_noise_first * config.steps else 1  # 1: t ~ U{1..T}
        t = torch.randint(1, config.timesteps + 1, (draws, config.batch)).amin(0)
        noise = torch.randn(config.batch, *model.latent_shape)
        images = dataset.images(machine.share(indices)).to(machine.device)
        t, noise = machine.share(t).to(machine.device), machine.share(noise).to(machine.device)
        lr = set_lr(optimizer, config.lr, step, config.steps, config.lr_warmup, config.lr_decay)
        with machine.autocast(config):
            loss = network(to_float(images), t, noise)  # Eq. (3)
        norm = descend(loss, parameters, optimizer, config, run, stage, step)
        update_average(average, model, min(config.ema, (1 + step) / (10 + step)))
        progress.losses.append(loss.item())
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            mean, speed, left = progress.line(step + 1, machine)
            run.log(stage=stage, step=step + 1, loss=mean, lr=lr, grad_norm=norm,
                    images_per_second=speed)
            run.print(f"step {step + 1}/{config.steps}  loss {mean:.4f}  lr {lr:.1e}  "
                      f"{speed:.0f} img/s  left {left}")
        if config.score_every and (step + 1) % config.score_every == 0 and step + 1 < config.steps:
            quick_look(run, dataset, average, step + 1)
        run.checkpoint(stage, step + 1, model, optimizer, average)
    if start < config.steps:
        run.save(stage, config.steps, model, optimizer, average)
    return average


def averaged(model):
    """The part of the state that joint training changes: all but the first stage."""
    return {k: v for k, v in model.state_dict().items() if not k.startswith("first_stage.")}


@torch.no_grad()
def update_average(average, model, decay):
    """average <- decay * average + (1 - decay) * model, BatchNorm statistics included."""
    pairs = zip(averaged(average).values(), averaged(model).values())
    for old, new in pairs:
        if old.is_floating_point():  # all but BatchNorm's counter of batches
            old.lerp_(new, 1 - decay)


# ---- What was reached ---------------------------------------------------------------------------


@torch.no_grad()
def encode(model, dataset, indices, device):
    """Codes (n, N) or (n, N, d) of the images at these indices, float32 on the CPU.

    In small parts: on a CPU a larger one would take more memory than a training step.
    """
    return torch.cat([model.represent(to_float(dataset.images(some).to(device))).cpu()
                      for some in indices.split(32)])


@torch.no_grad()
def score(run, dataset, model, train, test, mapped=False):
    """All scores that the labels allow, DCI on train + test samples (fewer from a small dataset).

    mapped: also score the tokens that the scalars are mapped to, through PCA (Table 9).
    Returns a dict for metrics.json; where there is nothing to score, its "note" says why.
    """
    generator = torch.Generator().manual_seed(run.config.seed)
    train, test = min(train, len(dataset) * 2 // 3), min(test, len(dataset) // 3)
    # Without repetition: no image may be in DCI's training and test samples.
    indices = torch.randperm(len(dataset), generator=generator)[:train + test]
    if not dataset.factor_sizes and not dataset.attribute_names:
        return {"note": "the dataset has no labels: FactorVAE score and DCI are skipped"}
    codes = encode(model, dataset, indices, run.machine.device)
    options = dict(seed=run.config.seed, dci_train=train, dci_test=test)
    try:
        if dataset.attribute_names:
            note = "attributes are no factors: FactorVAE score and DCI are skipped, TAD is not"
            return {"note": note, **metrics.tad(codes, dataset.attributes(indices))}
        scores = metrics.evaluate(codes, dataset.factors(indices), **options)
        if mapped and codes.ndim == 2:
            tokens = model.tokens(codes.to(run.machine.device)).cpu()  # (n, N) -> (n, N, d)
            more = metrics.evaluate(tokens, dataset.factors(indices), **options)
            scores.update({f"mapped_{name}": more[name] for name in Run.SCORES})
        return scores
    except ValueError as error:  # too few samples, say: no reason to end a run without its pictures
        return {"note": f"not scored: {error}"}


@torch.no_grad()
def pictures(run, dataset, model):
    """samples.png: images, their first-stage reconstructions, samples from their tokens.
    swap.png: source and target, then the source with one token after the other from the target."""
    device, N = run.machine.device, run.config.num_tokens
    generator = torch.Generator().manual_seed(run.config.seed)
    indices = torch.randint(len(dataset), (8,), generator=generator)
    images = to_float(dataset.images(indices).to(device))
    noise = torch.randn(8, *model.latent_shape, generator=generator).to(device)
    codes = model.represent(images)
    samples = model.sample(model.tokens(codes), noise=noise)
    run.png("samples.png", [images, model.first_stage(images)[0], samples])
    swapped = codes[:1].repeat(N, *[1] * (codes.ndim - 1))  # N copies of the source's codes
    swapped[range(N), range(N)] = codes[1]
    swapped = model.sample(model.tokens(swapped), noise=noise[:1].repeat(N, 1, 1, 1))
    row = list(images[:2]) + list(swapped)
    row += [torch.ones_like(images[0])] * (-len(row) % 11)
    run.png("swap.png", [row[i:i + 11] for i in range(0, len(row), 11)])


def quick_look(run, dataset, average, step):
    """Pictures, and scores from fewer samples, hence lower than those at the end."""
    if run.machine.main:
        scores = score(run, dataset, average, 4_000, 2_000)
        pictures(run, dataset, average)
        known = {k: v for k, v in scores.items() if k in Run.SCORES}
        run.log(stage="joint training", step=step, **known)
        run.print(f"  quick score at step {step}: {scores.get('note', '')}"
                  + "  ".join(f"{k} {v:.3f}" for k, v in known.items()))
    run.machine.wait()


# ---- The machine --------------------------------------------------------------------------------


def devices():
    """The kinds of device there are here, the best first."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    return [kind for kind, there in found.items() if there]


def keep_memory():
    """Make glibc keep the memory that tensors leave; where there is another libc, do nothing.

    By default it maps each large tensor anew and gives it back at once, and the system then hands
    out zeroed pages of 4 kB one by one, in every step again.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option in ((-4, 0), (-1, -1), (-8, 1)):  # no mmap, no trimming, one heap: see malloc.h
            mallopt(*option)


class Machine:
    """Device, precision and, under torchrun, this process's share of the work."""

    def __init__(self, device=None):
        need(device in (None, *devices()), "device", device, "one of " + ", ".join(devices()))
        self.kind = device or devices()[0]
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.device = torch.device(self.kind)
        if self.kind == "cpu":
            keep_memory()
        if self.world > 1:
            if self.kind == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.kind == "cuda" else "gloo")
        self.main = self.rank == 0  # the one that writes, logs and scores

    def fast_bf16(self):
        if self.kind == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        if self.kind == "cpu":
            capabilities = torch.cpu.get_capabilities()
            return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))
        return False  # MPS: not tried

    def autocast(self, config):
        return torch.autocast(self.kind, torch.bfloat16, enabled=config.precision == "bf16")

    def share(self, batch):
        """This process's slice of something drawn for the whole batch."""
        size = len(batch) // self.world
        return batch[self.rank * size:(self.rank + 1) * size]

    def parallel(self, module):
        """The module, its gradients averaged over the processes if there are several."""
        return DistributedDataParallel(module) if self.world > 1 else module

    def any(self, flag):
        """Whether the flag is set in any process."""
        return self.mean(float(flag)) > 0

    def mean(self, value):
        """The mean of a number over the processes."""
        if self.world == 1:
            return value
        value = torch.tensor(value, device=self.device)
        dist.all_reduce(value)
        return value.item() / self.world

    def wait(self):
        if self.world > 1:
            dist.barrier()


# ---- The run folder: one place for atomic writing, checkpoints, the log -------------------------


def write_atomically(path, save):
    """save(file) to a temporary name, then rename: the file is the old or the new one, never half.

    Raises OSError with one line if the disk is full or the folder is not writable.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # torch.save meets a failed write with a RuntimeError of its own, about positions.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise OSError(f"cannot write {path}: {reason.strerror or reason}; what was there before is "
                      "untouched. Free space or make the folder writable, then resume") from None


def say(text, file=None):
    """print that neither a closed pipe nor a terminal's encoding can stop."""
    stream = file or sys.stdout
    try:
        code = getattr(stream, "encoding", None) or "utf-8"
        print(text.encode(code, "backslashreplace").decode(code), file=stream, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")


def load_checkpoint(folder):
    """The checkpoint of a run folder as a dict. Raises ValueError or OSError with one line."""
    path = Path(folder) / "checkpoint.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found; expected a folder written by train.py --out")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found = checkpoint["format"]
        if found == FORMAT:
            checkpoint["config"] = Config(**checkpoint["config"])
    except Exception as error:  # torch.load raises whatever a damaged or foreign file provokes
        raise ValueError(f"{path} is not a checkpoint of train.py ({type(error).__name__}); "
                         f"expected format {FORMAT}. Train a new run") from None
    if found != FORMAT:
        raise ValueError(f"{path} has format {found}; this version reads {FORMAT}. Train a new run")
    check(checkpoint["config"])
    return checkpoint


def load_run(path, device="cpu"):
    """A run folder or an exported file -> (averaged model in eval mode, Config, about).

    about: scores (metrics.json's content or {}), step, commit, data (identity or {}), folder.
    """
    path = Path(path)
    if path.is_file():
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            checkpoint["config"] = Config(**checkpoint["config"])
            scores, folder = checkpoint["scores"], Path(".")
        except Exception as error:
            raise ValueError(f"{path} is no exported run ({type(error).__name__})") from None
    else:
        checkpoint, scores, folder = load_checkpoint(path), {}, path
        with contextlib.suppress(FileNotFoundError):
            try:
                scores = json.loads((path / "metrics.json").read_text())
            except ValueError:
                raise ValueError(f"{path}/metrics.json is damaged; delete it") from None
    if checkpoint["stage"] == "first stage":
        raise ValueError(f"{folder} has not finished its first stage; "
                         f"go on with: python train.py --resume {folder}")
    model = build_model(checkpoint["config"])
    restore(model, {**checkpoint["model"], **checkpoint["ema"]}, folder)
    about = {"scores": scores, "step": checkpoint["step"], "commit": checkpoint["commit"],
             "data": checkpoint.get("data", {}), "folder": folder}
    return model.to(device).eval().requires_grad_(False), checkpoint["config"], about


def restore(module, state, folder):
    """load_state_dict, with a ValueError of one line if names or shapes do not fit."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"the weights in {folder} do not fit the config: {reason}. "
                         f"Train a new run") from None


def borrow_first_stage(config, model):
    """Copy the first stage of the run config.first_stage into the model: ablations share one."""
    lender, *_ = load_run(config.first_stage)
    restore(model.first_stage, lender.first_stage.state_dict(), config.first_stage)


def commit():
    """The commit of this code, with -dirty if it was changed since; "" outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):  # there is no git
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""


class Run:
    """A run folder that only this process writes.

    config.json, checkpoint.pt (everything needed to go on), log.csv, metrics.json and pictures.
    In processes other than the main one all writing methods do nothing.
    """

    SCORES = ("factor_vae", "disentanglement", "completeness", "informativeness_test")
    COLUMNS = ("stage", "step", "loss", "lr", "grad_norm", "images_per_second",
               "mse", "codes_used", "perplexity", *SCORES)

    def __init__(self, folder, config, machine):
        self.folder, self.config, self.machine = Path(folder), config, machine
        self.stop = False  # set by Ctrl-C and SIGTERM; the step under way is finished first
        self.saved, self.commit = time.monotonic(), commit()
        self.data = {}
        if machine.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A database lock goes with its process, however that ends, on every system.
            self.lock = sqlite3.connect(self.folder / "lock", timeout=0)
            try:
                self.lock.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError:
                raise ValueError(f"{folder} is in use by another process; "
                                 f"wait for it or choose another --out") from None
        self.handlers = {number: signal.signal(number, lambda *_: setattr(self, "stop", True))
                         for number in (signal.SIGINT, signal.SIGTERM)}

    def release_signals(self):
        """From here on Ctrl-C ends the program at once."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def close(self):
        self.release_signals()
        if self.machine.main:
            self.lock.close()

    def write(self, name, save):
        if self.machine.main:
            write_atomically(self.folder / name, save)

    def write_json(self, name, content):
        self.write(name, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))

    def save(self, stage, step, model, optimizer, ema=None):
        state = {"format": FORMAT, "config": dataclasses.asdict(self.config),
                 "commit": self.commit, "stage": stage, "step": step, "data": self.data,
                 "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                 "ema": {} if ema is None else averaged(ema)}
        self.write("checkpoint.pt", lambda file: torch.save(state, file))
        self.saved = time.monotonic()

    def checkpoint(self, stage, step, *state):
        """Save if it is time to. After Ctrl-C or SIGTERM: save, say how to go on, and leave."""
        stop = self.machine.any(self.stop)
        if stop or time.monotonic() - self.saved > CHECKPOINT_SECONDS:
            self.save(stage, step, *state)
        if stop:
            self.print(f"\nstopped after step {step} of the {stage}; go on with: "
                       f"python train.py --resume {self.folder}")
            sys.exit(130)

    def rewind_log(self, stage, step):
        """Drop lines of log.csv later than the checkpoint: they will be written again."""
        path = self.folder / "log.csv"
        if not self.machine.main or not path.exists():
            return
        stages = ["first stage", "joint training"]
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["step"] and
                    (stages.index(row["stage"]), int(row["step"])) <= (stages.index(stage), step)]
        text = io.StringIO()
        writer = csv.DictWriter(text, self.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        self.write("log.csv", lambda file: file.write(text.getvalue().encode()))

    def log(self, **row):
        if self.machine.main:
            path = self.folder / "log.csv"
            new = not path.exists()
            with open(path, "a", newline="") as file:
                writer = csv.DictWriter(file, self.COLUMNS)
                if new:
                    writer.writeheader()
                writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value
                                 for name, value in row.items()})

    def print(self, text, **options):
        if self.machine.main:
            print(text, flush=True, **options)

    def png(self, name, rows):
        """rows: image tensors (K, 3, S, S) in [-1, 1] -> one PNG, a row of K images each."""
        if self.machine.main:
            wide = [torch.cat(list(row), dim=2) for row in rows]  # (K, 3, S, S) -> (3, S, K*S)
            picture = to_bytes(torch.cat(wide, dim=1)).permute(1, 2, 0)  # -> (rows*S, K*S, 3)
            self.write(name, lambda file: Image.fromarray(picture.numpy()).save(file, "PNG"))


def to_float(images):
    """uint8 images -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(images):
    """Float images in [-1, 1] -> uint8, on the CPU."""
    return ((images.cpu() + 1) * 127.5).round().clamp(0, 255).byte()


# ---- The command line ---------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message):
        raise ValueError(f"{message}; see python {self.prog} --help")


@contextlib.contextmanager
def one_line_errors():
    """What a user gets wrong is a ValueError or OSError everywhere here: one line, status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        say(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # where no run is there yet to be saved: see Run.checkpoint
        print("interrupted; nothing half-written is left", file=sys.stderr)
        sys.exit(130)


def parse(arguments):
    """-> (Config, run folder, checkpoint to go on from or None, device or None)."""
    parser = Parser("train.py", description="Train EncDiff: first stage, joint training, scores.")
    parser.add_argument("--preset", choices=PRESETS, help="paper: the paper's sizes; small: for "
                        "two CPU cores; default: paper on a CUDA GPU, small elsewhere")
    parser.add_argument("--out", help="folder of the run (default: runs/PRESET-SEED)")
    parser.add_argument("--resume", metavar="FOLDER", help="go on with the run in this folder")
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: the best")
    for f in dataclasses.fields(Config):
        flag, kind = "--" + f.name.replace("_", "-"), type(f.default)
        default = f"{f.default}" + (f", small: {SMALL[f.name]}" if f.name in SMALL else "")
        options = dict(dest=f.name, default=argparse.SUPPRESS,
                       help=f.metadata["help"] + (f" ({default})" if default else ""))
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif kind is tuple:
            parser.add_argument(flag, type=int, nargs="+", metavar="N", **options)
        elif f.metadata["choices"]:
            parser.add_argument(flag, type=kind, choices=f.metadata["choices"], **options)
        else:
            parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), **options)
    given = vars(parser.parse_args(arguments))
    preset, out, resume, device = (given.pop(k) for k in ("preset", "out", "resume", "device"))
    if not resume:
        preset = preset or ("paper" if (device or devices()[0]) == "cuda" else "small")
        config = Config(**{**PRESETS[preset], **given})
        check(config)
        print(f"preset {preset}")
        return config, Path(out or f"runs/{preset}-{config.seed}"), None, device
    if out or preset:
        raise ValueError("--resume takes folder and preset from the run; expected no --out and "
                         "no --preset")
    checkpoint = load_checkpoint(resume)
    saved = dataclasses.asdict(checkpoint["config"])
    config = Config(**{**saved, **given})
    wanted = dataclasses.asdict(config)
    changed = [f"{name} {saved[name]} -> {wanted[name]}" for name in given
               if wanted[name] != saved[name] and name not in FREE
               or name == "steps" and wanted[name] < saved[name]]
    if changed:
        raise ValueError(f"{resume} was started with other values: {', '.join(changed)}; expected "
                         f"the same ones, or more --steps. Train a new run with --out")
    return config, Path(resume), checkpoint, device


FREE = ("steps", "cache", "log_every", "score_every")  # may differ when a run is resumed


def main(arguments=None):
    """The command line: everything that can be refused is refused here, before any work."""
    config, folder, checkpoint, device = parse(arguments)
    machine = Machine(device)
    if config.precision == "auto":
        config = dataclasses.replace(config, precision="bf16" if machine.fast_bf16() else "fp32")
    config.data = str(Path(config.data).absolute()) if config.data else ""
    if config.batch % machine.world or config.vq_batch % machine.world:
        raise ValueError(f"--batch {config.batch} and --vq-batch {config.vq_batch}; "
                         f"expected multiples of the {machine.world} processes")
    if not checkpoint and (folder / "checkpoint.pt").exists():
        raise ValueError(f"{folder} already holds a run; expected a new folder with --out, "
                         f"or --resume {folder}")
    began = time.monotonic()
    if not machine.main:
        machine.wait()  # for the main process to convert the dataset
    dataset = data.open_dataset(config.data or None, config.size, config.cache or None)
    if machine.main:
        machine.wait()
    with contextlib.closing(Run(folder, config, machine)) as run:
        run.data = dataset.identity
        work(run, dataset, checkpoint, began)


def work(run, dataset, checkpoint, began):
    """All of a run from its checkpoint, or from nothing, to the scores."""
    config, machine = run.config, run.machine
    torch.manual_seed(config.seed)
    model = build_model(config)
    run.print(f"{dataset}\n{machine.kind}, {config.precision}, {torch.get_num_threads()} threads, "
              f"{machine.world} process{'es' * (machine.world > 1)}")
    for name, part in [("first stage", model.first_stage), ("encoder", model.encoder),
                       ("token maps", model.token_map), ("denoiser", model.denoiser)]:
        run.print(f"{name:12s} {sum(p.numel() for p in part.parameters()):>12,} parameters")
    run.write_json("config.json", dataclasses.asdict(config))
    if checkpoint:
        run.print(f"resumed at step {checkpoint['step']} of the {checkpoint['stage']}")
        run.rewind_log(checkpoint["stage"], checkpoint["step"])
    if config.first_stage and not checkpoint:
        borrow_first_stage(config, model)
    elif not checkpoint or checkpoint["stage"] == "first stage":
        train_first_stage(run, dataset, model, checkpoint)
        checkpoint = None
    average = train_jointly(run, dataset, model, checkpoint)
    run.release_signals()  # all that was trained is saved, and --resume scores it
    if machine.main:
        scores = score(run, dataset, average, 10_000, 5_000, mapped=True)
        pictures(run, dataset, average)
        run.write_json("metrics.json", {"config": dataclasses.asdict(config), "commit": run.commit,
                                        **scores})
        print(scores.get("note", ""))
        for name, value in scores.items():
            if isinstance(value, float):
                print(f"{name:24s} {value:.3f}")
        print(f"done in {(time.monotonic() - began) / 60:.0f} minutes; weights, scores and "
              f"pictures are in {run.folder}\nnext: python sample.py swap {run.folder}")
    machine.wait()


if __name__ == "__main__":
    with one_line_errors():
        main()

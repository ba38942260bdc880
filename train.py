"""Train EncDiff in one command: first stage, then encoder and denoiser together, then the scores.

WHERE     Read after metrics.py and data.py, before sample.py. This is where everything meets.
PAPER     arXiv 2402.09712, Sec. 4.1 ("Training Details"), Appendix D.
SHAPES    as in encdiff.py
IDEA      Two stages. (1) The autoencoder of vq.py learns to compress images; it is then frozen.
          (2) Encoder, token maps and U-Net are trained together, by eq. (3) and nothing else; the
          moving average (EMA) of their weights is what is scored, drawn and shipped. Each step is
          seeded with (seed, stage, step): as many threads go on with a run bit for bit, P processes
          do what one would do, but for dropout, what a batch measures of itself (BatchNorm, a VAE's
          penalty) and the order of summation.
DIFFERS   The moving average starts fast and slows down: a short run is not scored on its beginning.
          The last weights are scored, never the best: labels would leak in.
TRY       python train.py --steps 50 --vq-steps 250 --out runs/try   ->   a run in two minutes
"""
import argparse
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import json
import math
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
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
    """A field of Config: --help text ("": no flag), and its choices or range (a key of RANGES)."""
    return dataclasses.field(default=default, metadata={"help": meaning, "allowed": allowed})


@dataclasses.dataclass
class Config:
    """Every hyperparameter of a run. The defaults are the preset `paper`."""

    data: str = field("", "dataset file or folder; without it Shapes3D is rendered")
    cache: str = field("", "folder for the converted dataset; without it: beside the dataset")
    size: int = field(64, "side of the images in pixels", (32, 64, 128))
    seed: int = field(0, "number that fixes everything random in a run", "0 or more")
    precision: str = field("auto", "arithmetic; auto: bf16 where fast", ("auto", "bf16", "fp32"))
    model: str = field("encdiff", "method; vae: those it is compared with", ("encdiff", "vae"))
    vae_loss: str = field("beta", "objective of --model vae", encdiff.VAE_WEIGHTS)
    # The first stage (vq.py)
    first_stage: str = field("deep", "kind (pixels: none), or the RUN to copy one from", vq.KINDS)
    lender: str = field("", "")  # the RUN of --first-stage; its kind is in first_stage
    vq_steps: int = field(10_000, "training steps of the first stage", "0 or more")
    # The encoder and the tokens (encdiff.py)
    encoder: str = field("cnn", "image encoder; cnn_bn: lighter, with BatchNorm", encdiff.ENCODERS)
    tokens: str = field("scalar", "what a token is made of", ("scalar", "vector"))
    num_tokens: int = field(20, "number of concept tokens, N", "1 or more")
    token_dim: int = field(32, "width of a concept token, d", "1 or more")
    # The denoiser (unet.py)
    channels: int = field(64, "width of the U-Net's first level, a multiple of 8", "1 or more")
    multipliers: tuple = field((1, 2, 4, 4), "width of each level of the U-Net, in units of "
                               "--channels; each level halves the side", "each 1 or more")
    blocks: int = field(2, "residual blocks in each level of the U-Net", "1 or more")
    heads: int = field(8, "", "1 or more")  # attention heads of the U-Net
    dropout: float = field(0.1, "dropout in the residual blocks of the U-Net", "0 to below 1")
    skip_dropout: float = field(0.0, "dropout of channels in the U-Net's skips", "0 to below 1")
    self_attention: bool = field(True, "attention among positions; without: learned positions")
    conditioning: str = field("cross", "how tokens act; adagn: on the norms", ("cross", "adagn"))
    decoder: str = field("diffusion", "direct: one pass without noise", ("diffusion", "direct"))
    schedule: str = field("cosine", "noise schedule", encdiff.SCHEDULES)
    regularizer: str = field("none", "constraint on the codes, Table 11", encdiff.REGULARIZERS)
    # Joint training
    noise_order: str = field("uniform", "timesteps; weak-first: lowest of three draws in the first "
                             "third of the steps, then highest", ("uniform", "weak-first"))
    steps: int = field(75_000, "training steps of encoder and denoiser", "0 or more")
    batch: int = field(64, "images in a joint training step", "1 or more")
    optimizer: str = field("adamw", "muon: orthogonal steps for matrices", ("adamw", "muon"))
    lr: float = field(1e-4, "AdamW's learning rate in joint training; Muon's: ten times", "above 0")
    lr_decay: float = field(0.0, "last share of the joint steps, with --lr falling", "0 to below 1")
    ema: float = field(0.9999, "decay of the averaged weights in a joint step", "0 to below 1")
    score_every: int = field(7_500, "joint steps between quick scores; 0: none", "0 or more")

    def __post_init__(self):
        self.multipliers = tuple(self.multipliers)  # JSON and argparse bring lists

    @property
    def trains_first_stage(self):
        """bool: False if there is none to train, or if it is borrowed."""
        return self.model == "encdiff" and self.first_stage != "pixels" and not self.lender


# `paper`: for its 75,000 steps see README. `small`, the default, has latents of 8x8 and less width,
# for two CPU cores; `large` the paper's sizes, for a GPU: it was run on a CPU with --vq-steps 600.
# Why both need few steps: README.
FEWER_STEPS = dict(encoder="cnn_patch", dropout=0.0, skip_dropout=0.3, self_attention=False,
                   noise_order="weak-first", optimizer="muon", lr=1e-3, lr_decay=0.4, ema=0.999)
SMALL = dict(FEWER_STEPS, vq_steps=5_000, first_stage="linear", token_dim=16, channels=48,
             multipliers=(1, 2), blocks=1, heads=4, steps=3_000, score_every=1_000)
LARGE = dict(FEWER_STEPS, vq_steps=5_000, steps=3_000, score_every=500)
PRESETS = {"small": SMALL, "large": LARGE, "paper": {}}

# How each kind of vq.KINDS is trained: images a step, learning rate, weight of the squared error
# beside L1, and the step from which its encoder stays as it is (0: never): after a brief training
# of a linear encoder the factors separate sooner, which was measured and is not explained.
FIRST_STAGE = {"deep": dict(batch=64, lr=1e-3, squared=0.0, encoder_steps=0),
               "linear": dict(batch=16, lr=2e-3, squared=4.0, encoder_steps=1_500)}
LR_WARMUP = 100  # steps in which a learning rate rises from 0, as Adam's averages are then young
TIMESTEPS = 1000  # T, the paper's
ENCODER_WIDTH = 64  # the paper's; the authors' code has 128 for the lighter encoder
WEIGHT_DECAY, CLIP = 0.01, 1.0  # AdamW's default; the largest norm of a gradient


def build_model(config):
    """The untrained model of a config, an EncDiff or a VAE, on the CPU."""
    c, first_stage = config, vq.KINDS[config.first_stage]()
    channels, side = first_stage.latent_channels, c.size // first_stage.factor
    method, maps = encdiff.REGULARIZERS[c.regularizer]
    token_map, of_each = maps(c.num_tokens, c.token_dim), 2 if c.model == "vae" else 1
    outputs = c.num_tokens * (c.token_dim if c.tokens == "vector" else of_each)
    more = {"queries": c.num_tokens} if c.encoder == "transformer" else {}
    encoder = encdiff.ENCODERS[c.encoder](outputs, c.size, ENCODER_WIDTH, **more)
    if c.model == "vae":
        return encdiff.VAE(encoder, c.num_tokens, c.vae_loss, c.steps, c.size)
    if c.tokens == "vector":
        encoder, token_map = encdiff.vector_valued(encoder, c.num_tokens, c.token_dim)
    names = ("channels", "multipliers", "blocks", "heads", "num_tokens", "token_dim", "dropout",
             "skip_dropout", "conditioning")
    options = {name: getattr(c, name) for name in names}
    options.update(latent_channels=channels, side=None if c.self_attention else side)
    rest = [(channels, side, side), c.schedule, TIMESTEPS]
    if c.decoder == "direct":
        decoder = unet.DirectDecoder(side, **options)
        return encdiff.EncDec(first_stage, encoder, token_map, decoder, *rest)
    model = method(first_stage, encoder, token_map, unet.UNet(**options), *rest)
    if c.first_stage == "pixels":
        model.denoiser = encdiff.NoiseFromVelocity(model.denoiser, model.alpha_bar)
    return model


# ---- The two stages -----------------------------------------------------------------------------
# `run` keeps the folder, its log and its checkpoints; `run.machine` is the device and, of several
# processes, this one's share of a batch. Both are below the rule, as is Optimizer: AdamW or Muon.


def seed_step(config, stage, step):
    """Make everything random in this step a function of (seed, stage, step) alone."""
    torch.manual_seed(random.Random(f"{config.seed} {stage} {step}").getrandbits(32))


def learning_rate(peak, step, steps, decay):
    """Linear rise over LR_WARMUP steps, constant, linear fall over the last share `decay`."""
    fall = (steps - step) / (decay * steps) if decay else 1
    return peak * min(1, (step + 1) / LR_WARMUP) * min(1, fall)


def train_first_stage(run, dataset, model):
    """Stage 1: images -> latent -> images. Leaves model.first_stage trained and frozen."""
    config, machine, autoencoder = run.config, run.machine, model.first_stage
    recipe, steps = FIRST_STAGE[config.first_stage], config.vq_steps
    warmup = min(200, steps // 2)  # steps without rounding, before there are latents to round to
    loss_of = vq.FirstStageLoss(autoencoder, recipe["squared"]).to(machine.device)
    loss_of.requires_grad_(True).train()
    optimizer = Optimizer(autoencoder, config, recipe["lr"], betas=(0.9, 0.99), weight_decay=1e-4)
    start = run.start_stage("first stage", steps, recipe["batch"], loss_of, optimizer)
    network = DistributedDataParallel(loss_of) if machine.world > 1 else loss_of
    counts = 0
    for step in range(start, steps):
        seed_step(config, "first stage", step)
        indices = torch.randint(len(dataset), (recipe["batch"],))
        images = to_float(dataset.images(machine.share(indices)).to(machine.device))
        lr = learning_rate(recipe["lr"], step, steps, decay=0.6)
        if step == warmup:  # from the whole batch, so that all processes agree
            whole = to_float(dataset.images(indices).to(machine.device))
            autoencoder.quantizer.initialise(autoencoder.encode(whole))
        with torch.autocast(machine.kind, torch.bfloat16, config.precision == "bf16"):
            loss, reconstruction, codes = network(images)
        loss.backward()
        if 0 < recipe["encoder_steps"] <= step:
            autoencoder.encoder.zero_grad()  # the latent stays as it is, the decoder goes on
        norm = clip_grad_norm_(loss_of.parameters(), CLIP).item()
        run.note(step, loss.item(), norm)
        optimizer.step(lr)
        loss_of.zero_grad()  # now, not before `backward`: the next activations need the room
        counts += torch.bincount(codes.flatten(), minlength=len(autoencoder.quantizer.codebook))
        if run.due(step + 1):
            used, perplexity = vq.codebook_usage(counts)
            mse = (reconstruction - images).square().mean().item()
            run.report(step + 1, lr=lr, mse=mse, codes_used=used, perplexity=perplexity)
            counts = 0
        run.checkpoint(step + 1)
    autoencoder.requires_grad_(False).eval()


def train_jointly(run, dataset, model):
    """Stage 2: encoder, token maps and denoiser by eq. (3). Returns the averaged model."""
    config, machine, steps = run.config, run.machine, run.config.steps
    model.to(machine.device).train()
    optimizer = Optimizer(model, config, config.lr, weight_decay=WEIGHT_DECAY)
    if config.model == "encdiff" and not run.resumed:
        seed_step(config, "joint training", -1)
        some = dataset.images(torch.randint(len(dataset), (1024,)))
        model.measure_latents(to_float(some.to(machine.device)))
    average = copy.deepcopy(model).requires_grad_(False).eval()
    start = run.start_stage("joint training", steps, config.batch, model, optimizer, average)
    network = DistributedDataParallel(model) if machine.world > 1 else model
    for step in range(start, steps):
        seed_step(config, "joint training", step)
        indices = torch.randint(len(dataset), (config.batch,))
        draws = 3 if config.noise_order == "weak-first" else 1  # of one alone: t ~ U{1..T}
        t = torch.randint(1, TIMESTEPS + 1, (draws, config.batch))
        t = t.amin(0) if 3 * step < steps else t.amax(0)  # (draws, B) -> (B,)
        noise = torch.randn(config.batch, *model.latent_shape)
        images = to_float(dataset.images(machine.share(indices)).to(machine.device))
        t, noise = machine.share(t).to(machine.device), machine.share(noise).to(machine.device)
        lr = learning_rate(config.lr, step, steps, config.lr_decay)
        with torch.autocast(machine.kind, torch.bfloat16, config.precision == "bf16"):
            loss = network(images, t, noise)  # Eq. (3)
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), CLIP).item()
        run.note(step, loss.item(), norm)
        optimizer.step(lr)
        model.zero_grad()
        update_average(average, model, min(config.ema, (1 + step) / (10 + step)))
        if run.due(step + 1):
            run.report(step + 1, lr=lr, **getattr(model, "terms", {}))
        if config.score_every and (step + 1) % config.score_every == 0 and step + 1 < steps:
            quick_look(run, dataset, average, step + 1)
        run.checkpoint(step + 1)
    return average


def trained_state(model):
    """The part of the state that joint training changes: all but the first stage."""
    return {k: v for k, v in model.state_dict().items() if not k.startswith("first_stage.")}


@torch.no_grad()
def update_average(average, model, decay):
    """average <- decay * average + (1 - decay) * model, BatchNorm statistics included."""
    for old, new in zip(trained_state(average).values(), trained_state(model).values()):
        if old.is_floating_point():  # BatchNorm also has a counter of batches
            old.lerp_(new, 1 - decay)


# ---- What was reached ---------------------------------------------------------------------------


@torch.no_grad()
def score(run, dataset, model, samples, mapped=False):
    """All scores that the labels allow of a number of samples, as a dict; its "note" says why one
    is missing. mapped: also of the tokens of the scalars, through PCA (Table 9)."""
    if not dataset.factor_sizes and not dataset.attribute_names:
        return {"note": "the dataset has no labels: nothing is scored"}
    seed = run.config.seed
    # Without repetition: no image may be in DCI's training and test samples.
    indices = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:samples]
    try:
        codes = encode(model, dataset, indices, run.machine.device)
        if dataset.attribute_names:
            return {"note": "attributes are scored by TAD, not by FactorVAE score and DCI",
                    **metrics.tad(codes, dataset.attributes(indices))}
        scores = metrics.evaluate(codes, dataset.factors(indices), seed)
        tokens = model.tokens(codes.to(run.machine.device)).cpu()
        if mapped and tokens.ndim > codes.ndim:  # (n, N) -> (n, N, d)
            more = metrics.evaluate(tokens, dataset.factors(indices), seed)
            scores.update({f"mapped_{name}": more[name] for name in Run.SCORES if name in more})
        return scores
    except ValueError as error:  # codes that are not finite, say: pictures may still tell why
        return {"note": f"not scored: {error}"}


def work(run, dataset):
    """All of a run from its checkpoint, or from nothing, to the scores."""
    config = run.config
    torch.manual_seed(config.seed)
    model = build_model(config)
    run.introduce(dataset, model)
    with signals(lambda *_: setattr(run, "stopping", True)):
        if config.lender and not run.resumed:  # ablations share one
            model.first_stage = load_run(config.lender)[0].first_stage
        if config.trains_first_stage and run.resumed.get("stage") != "joint training":
            train_first_stage(run, dataset, model)
        average = train_jointly(run, dataset, model)
    if run.machine.main:
        scores = score(run, dataset, average, 15_000, mapped=True)
        pictures(run, dataset, average)
        run.finish(scores)


# ---- Machinery: Muon, pictures, device, run folder, flags. Skip on first reading. ---------------

FORMAT = 6  # of checkpoint.pt; to be raised when its contents change
CHECKPOINT_SECONDS = 120  # between two checkpoints
LOG_EVERY = 100  # steps between two lines of log.csv
RANGES = {"0 or more": lambda v: 0 <= v < math.inf, "1 or more": lambda v: 1 <= v < math.inf,
          "above 0": lambda v: 0 < v < math.inf, "0 to below 1": lambda v: 0 <= v < 1,
          "each 1 or more": lambda v: v and min(v) >= 1}
# What a resumed run may change: where and how well it goes on, not what it is.
CHANGEABLE = {"data", "cache", "precision", "steps", "lr", "lr_decay", "score_every"}
RUNNING = threading.Lock()  # torch has one random generator: two runs at once would share it
say = data.say  # print that never ends a run, whatever the terminal


class Optimizer:
    """AdamW; with --optimizer muon only for what Muon leaves to it: where the denoiser begins and
    ends, the encoder's end, the token maps, and all that is no matrix."""

    OUTER = r"token_map|conv_(in|out)|encoder\.(0\.)?(out|1)\.|decoder\.0\.|positions|queries|start"

    def __init__(self, model, config, lr, **adamw):
        rest = {name: p for name, p in model.named_parameters() if p.requires_grad}
        inner = [name for name, p in rest.items() if config.optimizer == "muon"
                 and p.ndim in (2, 4) and not re.search(self.OUTER, name)]
        weights = [rest.pop(name) for name in inner]
        self.parts = [torch.optim.AdamW(rest.values(), lr, fused=True, **adamw)]
        if weights:
            self.parts.append(Muon(weights, {"lr": lr}))
            self.parts[1].dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32

    def step(self, lr):
        """One step downhill; lr is AdamW's learning rate, and Muon's is ten times that."""
        for part, scale in zip(self.parts, (1, 10)):
            part.param_groups[0]["lr"] = scale * lr
            part.step()


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024), with Nesterov's momentum: the steps of matrices are orthogonal, so
    that directions of small gradients learn as fast as others; (out, in, k, k) is (out, in k k).
    torch.optim.Muon takes bf16, which is slow without hardware for it."""

    @torch.no_grad()
    def step(self):
        lr, alike = self.param_groups[0]["lr"], {}  # shape: weights and their steps
        for w in filter(lambda w: w.grad is not None, self.param_groups[0]["params"]):
            grad = w.grad.flatten(1)
            mean = self.state[w].setdefault("momentum_buffer", torch.zeros_like(grad))
            alike.setdefault(grad.shape, []).append((w, grad.lerp(mean.lerp_(grad, 0.05), 0.95)))
        for (m, n), pairs in alike.items():  # in one batched product, as they are small
            x = torch.stack([step for _, step in pairs]).to(self.dtype)  # (K, m, n)
            x = (x if m <= n else x.mT) / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
            for _ in range(5):  # of Newton and Schulz: singular values come near 1
                a = x @ x.mT
                a = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)  # -4.7750 a + 2.0315 a a
                x = torch.baddbmm(x, a, x, beta=3.4445)  # 3.4445 x + a x
            for (w, _), step in zip(pairs, x if m <= n else x.mT):
                w.mul_(1 - lr * WEIGHT_DECAY)
                w.sub_(step.reshape(w.shape), alpha=lr * max(1, m / n) ** 0.5)


def quick_look(run, dataset, average, step):
    """Pictures, and scores from fewer samples, hence lower than those at the end."""
    if run.machine.main:
        scores = score(run, dataset, average, 6_000)
        pictures(run, dataset, average)
        known = {name: scores[name] for name in Run.SCORES if name in scores}
        run.log(stage="joint training", step=step, **known)
        words = "  ".join(f"{name} {value:.3f}" for name, value in known.items())
        run.print(f"  quick score at step {step}: {words}  {scores.get('note', '')}")


@torch.no_grad()
def pictures(run, dataset, model):
    """samples.png: images, what their latents decode to, samples from their tokens. swap.png:
    source, target, the source with one token after the other from the target. Always the same."""
    generator = torch.Generator().manual_seed(run.config.seed)
    indices = torch.randint(len(dataset), (8,), generator=generator)
    noise = torch.randn(8, *model.latent_shape, generator=generator).to(run.machine.device)
    images = to_float(dataset.images(indices).to(run.machine.device))
    codes, N = model.represent(images), run.config.num_tokens
    swapped = codes[[0] * N]  # the source's codes N times: (N, N) or (N, N, d)
    swapped[range(N), range(N)] = codes[1]
    samples = model.sample(model.tokens(codes), noise=noise)
    swapped = model.sample(model.tokens(swapped), noise=noise[[0] * N])
    decoded = model.decode(model.latents(images))
    run.write("samples.png", png(torch.cat([images, decoded, samples]), 8))
    run.write("swap.png", png(torch.cat([images[:2], swapped]), 11))


def png(images, columns):
    """images (K, 3, S, S) in [-1, 1] -> what writes rows of so many of them to an open file."""
    white = images.new_ones(-len(images) % columns, *images.shape[1:])  # up to whole rows
    rows = to_bytes(torch.cat([images, white])).unflatten(0, (-1, columns))  # (R, columns, 3, S, S)
    pixels = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (R*S, columns*S, 3)
    return lambda file: Image.fromarray(pixels.numpy()).save(file, "PNG")


def step_flops(config):
    """{stage: floating-point operations of one of its steps, or 0}, of all processes: forward,
    backward and the optimizer's, as torch counts them, a multiply-add as two."""
    flops = dict.fromkeys(Run.STAGES, 0)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        model, image = build_model(config).train(), torch.zeros(1, 3, config.size, config.size)
        stages = [("joint training", model, config.batch)]
        first_stage = copy.deepcopy(getattr(model, "first_stage", None))  # borrowed or not
        if isinstance(first_stage, vq.VQAutoencoder):
            first_stage.quantizer.ready.fill_(True)
            loss_of = vq.FirstStageLoss(first_stage).requires_grad_(True)
            stages.append(("first stage", loss_of, FIRST_STAGE[config.first_stage]["batch"]))
        for stage, module, batch in stages:
            with FlopCounterMode(display=False) as of_image:
                loss = module(image)
                (loss[0] if stage == "first stage" else loss).backward()
            with FlopCounterMode(display=False) as of_step:
                Optimizer(module, config, config.lr).step(config.lr)
            flops[stage] = batch * of_image.get_total_flops() + of_step.get_total_flops()
    return flops


def training_tflop(config, flops):
    """[TFLOP of the first stage, borrowed or not, of joint training]; flops: as of step_flops."""
    return [n * flops[s] / 1e12 for n, s in zip((config.vq_steps, config.steps), Run.STAGES)]


class Machine:
    """Device, precision and, under torchrun, this process's share of the work."""

    def __init__(self, device=None):
        kinds = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
        kinds += ["cpu"]  # the best first
        need(device in (None, *kinds), "device", device, "one of " + ", ".join(kinds))
        self.kind = device or kinds[0]
        self.device = torch.device(self.kind)
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.main = self.rank == 0  # the one that writes, logs and scores
        self.threads, self.looked, self.others = torch.get_num_threads(), -math.inf, 0.0
        self.leave_busy_cores()
        # glibc gives memory of large tensors back, and gets it page by page in the next step.
        with contextlib.suppress(AttributeError, OSError, TypeError):
            for option in ((-4, 0), (-1, -1), (-8, 1)) * (self.kind == "cpu"):
                ctypes.CDLL(None).mallopt(*option)  # no mmap, no trimming, one heap: see malloc.h
        if self.world > 1 and self.kind == "cuda":  # from here on "cuda" is this one
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if self.world > 1 and not dist.is_initialized():
            # Longer than any conversion: if one process dies, torchrun itself ends the others.
            dist.init_process_group(timeout=datetime.timedelta(days=7))

    def fast_bf16(self):
        there = torch.cpu.get_capabilities() if self.kind == "cpu" else {}
        return (there.get("amx_bf16") or there.get("avx512_bf16")
                or self.kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))

    def leave_busy_cores(self):
        """On Linux, unless OMP_NUM_THREADS is set: a thread for each core that programs less nice
        left free in the last seconds. Threads wait, spinning, for the one that shares its core."""
        now = time.monotonic()
        if self.kind != "cpu" or "OMP_NUM_THREADS" in os.environ or now - self.looked < 2:
            return
        with contextlib.suppress(OSError, ValueError):
            user, nice, system, _, _, *irqs = map(int, Path("/proc/stat").read_text().split()[1:8])
            ticks = user + nice * (os.nice(0) > 0) + system + sum(irqs)
            others = ticks / os.sysconf("SC_CLK_TCK") - time.process_time()  # seconds of work
            free = os.cpu_count() - (others - self.others) / (now - self.looked)
            self.looked, self.others = now, others  # of a core, a load of 0.4 counts as none
            torch.set_num_threads(max(1, min(self.threads, int(free + 0.4))))

    def share(self, batch):
        """This process's slice of something drawn for the whole batch."""
        return batch.chunk(self.world)[self.rank]

    def mean(self, value):
        """The mean of a number over the processes, which wait for one another here."""
        if self.world == 1:
            return value
        value = torch.tensor(value, device=self.device)
        dist.all_reduce(value)
        return value.item() / self.world


def write_atomically(path, content):
    """Write a text, or what content(file) writes, to a temporary name, then rename: the file is the
    old or the new one, never half. Raises OSError, one line, for a full disk or a closed folder."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save puts the first into the second
        reason = error if isinstance(error, OSError) else error.__context__
        raise OSError(f"cannot write {path}: {getattr(reason, 'strerror', 0) or error}; what was "
                      "there is untouched. Make room, or the folder writable, and resume") from None
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
        plain = isinstance(error, (OSError, ValueError, RuntimeError)) and str(error).strip()
        reason = plain.splitlines()[-1].strip() if plain else type(error).__name__
        found = f"cannot be read, is damaged or foreign: {reason}"
    raise ValueError(f"{path} {found}; expected {expected}")


def load_checkpoint(path):
    """The dict in a run folder or an exported file, else ValueError. Nothing in it is executed."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    with reading(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != FORMAT:
            raise ValueError(f"format {checkpoint['format']}; this version reads {FORMAT}")
        checkpoint["config"] = Config(**checkpoint["config"])
        check(checkpoint["config"])
        parts = {"step", "model", "ema", "commit", "data"}
        if checkpoint["stage"] not in Run.STAGES or not parts <= checkpoint.keys():
            raise ValueError("it is not complete")
    return checkpoint


def load_run(path, device="cpu"):
    """A trained run, from its folder or an exported file, else ValueError: the model with averaged
    weights in float32, in eval mode; its Config; a dict: scores (of metrics.json), step, commit,
    data (the dataset's identity), folder (for pictures)."""
    checkpoint, path = load_checkpoint(path), Path(path)
    if checkpoint["stage"] == "first stage":
        raise ValueError(f"{path} has not finished its first stage; "
                         f"go on with: python train.py --resume {path}")
    model = build_model(checkpoint["config"])
    with reading(path):
        # abar_T is too small for the half precision that a file may have: it comes from the config.
        known = {"alpha_bar": model.alpha_bar} if hasattr(model, "alpha_bar") else {}
        model.load_state_dict({**checkpoint["model"], **checkpoint["ema"], **known})
    about = {name: checkpoint.get(name, {}) for name in ("step", "commit", "data", "scores")}
    about["folder"], scores = path if path.is_dir() else Path(), path / "metrics.json"
    if scores.is_file() and checkpoint["step"] == checkpoint["config"].steps:  # not of fewer steps
        with reading(scores, f"JSON; for a new one: train.py --resume {path}"):
            about["scores"] = json.loads(scores.read_text())
    return model.to(device).eval().requires_grad_(False), checkpoint["config"], about


class Run:
    """A run folder that only the main process writes, to be used in a `with`: config.json, log.csv,
    checkpoint.pt (everything needed to go on), metrics.json and pictures."""

    STAGES = ("first stage", "joint training")
    SCORES = ("factor_vae", "disentanglement", "completeness", "informativeness_test")
    COLUMNS = ("stage", "step", "loss", "lr", "grad_norm", "images_per_second",
               "mse", "codes_used", "perplexity", "kl", "total_correlation", *SCORES)

    def __init__(self, folder, config, machine, identity=None, checkpoint=None):
        self.folder, self.config, self.machine = Path(folder), config, machine
        self.identity, self.resumed = identity or {}, checkpoint or {}  # the dataset's; {}: new
        self.rows = self.resumed.get("log", [])  # of log.csv
        self.began = self.saved = time.monotonic()
        self.print = say if machine.main else lambda text: None
        self.commit, self.lock, self.stopping = "", None, False  # a signal stops after this step
        with contextlib.suppress(OSError):  # without git; outside a checkout it is "" as well
            command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
            self.commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()

    def __enter__(self):
        """Take the folder, or raise ValueError (it is in use) or OSError (it cannot be written)."""
        if self.machine.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:  # a database's lock goes with its process, however that ends, on every system
                self.lock = sqlite3.connect(self.folder / "lock", timeout=0)
                self.lock.execute("BEGIN EXCLUSIVE")
            except sqlite3.Error as error:  # some network file systems just have no locks
                need("is locked" not in str(error), "out", self.folder,
                     "another folder: this one is in use by another process")
                say(f"{self.folder} cannot be locked ({error}): nothing else may write there")
        return self

    def __exit__(self, *_):
        if self.lock:
            self.lock.close()

    def introduce(self, dataset, model):
        """Say what is trained with what, and count what that costs."""
        self.machine.leave_busy_cores()
        self.flops = step_flops(self.config)
        self.write("config.json", json.dumps(dataclasses.asdict(self.config), indent=1))
        self.print(f"{dataset}\n{self.machine.kind}, {self.config.precision}, "
                   f"{torch.get_num_threads()} threads, processes: {self.machine.world}")
        for name, part in model.named_children():
            self.print(f"{name:12s} {sum(p.numel() for p in part.parameters()):>12,} parameters")

    def start_stage(self, stage, steps, batch, module, optimizer, average=None):
        """Restore a stage from the checkpoint, or save its beginning. Returns its first step."""
        self.stage, self.steps, self.batch = stage, steps, batch
        self.state, self.losses, self.since = (module, optimizer, average), [], time.monotonic()
        old, self.resumed = self.resumed, {}
        if not old:
            self.save(0)
            return 0
        self.print(f"resumed at step {old['step']} of the {stage}")
        with reading(self.folder):  # pop: to hold the weights but once
            module.load_state_dict(old.pop("model"))
            for part, state in zip(optimizer.parts, old.pop("optimizer")["parts"], strict=True):
                part.load_state_dict(state)
            if average is not None:
                average.load_state_dict({**module.state_dict(), **old.pop("ema")})
        return old["step"]

    def note(self, step, loss, norm):
        """Note a step's loss. Raises ValueError if the gradient's norm is not finite."""
        self.losses.append(loss)
        self.norm = norm
        if not math.isfinite(norm):  # the same in all processes: gradients are averaged
            raise ValueError(f"loss {loss:.4g} and gradient norm {norm} in step {step + 1} of the "
                             f"{self.stage}; the last good checkpoint is kept. Go on with: python "
                             f"train.py --resume {self.folder} --precision fp32" +
                             f" --lr {self.config.lr / 3:.1g}" * (self.stage != "first stage"))

    def due(self, step):
        return step % LOG_EVERY == 0 or step in (20, self.steps)  # 20: to say how long it takes

    def report(self, step, **row):
        """A row of log.csv and a line on the terminal: mean loss and speed since the last ones."""
        now, loss = time.monotonic(), self.machine.mean(sum(self.losses) / len(self.losses))
        speed, left = len(self.losses) / (now - self.since), self.steps - step  # steps a second
        self.losses, self.since, rate = [], now, speed * self.batch
        self.log(stage=self.stage, step=step, loss=loss, grad_norm=self.norm,
                 images_per_second=rate, **row)
        if self.stage == "first stage":  # in its steps, what joint training will take
            left += self.config.steps * self.flops["joint training"] / self.flops[self.stage]
        more = "".join(f"  {name.replace('_', ' ')} {value:.3g}" for name, value in row.items())
        self.print(f"{self.stage} {step}/{self.steps}  loss {loss:.4f}{more}  {rate:.0f} img/s  "
                   f"{left / speed / 3600:.2f} hours left here")

    def write(self, name, content):
        """A file of the run: a text, or what content(file) writes."""
        if self.machine.main:
            write_atomically(self.folder / name, content)

    def save(self, step):
        module, optimizer, average = self.state
        content = {"format": FORMAT, "config": dataclasses.asdict(self.config), "step": step,
                   "commit": self.commit, "stage": self.stage, "data": self.identity,
                   "log": self.rows, "model": module.state_dict(),
                   "optimizer": {"parts": [part.state_dict() for part in optimizer.parts]},
                   "ema": trained_state(average) if average else {}}
        self.write("checkpoint.pt", lambda file: torch.save(content, file))
        self.saved = time.monotonic()

    def checkpoint(self, step):
        """Save after the last step, and if it is time to. If asked to stop, also raise."""
        self.machine.leave_busy_cores()
        stop = self.machine.mean(float(self.stopping)) > 0  # in any process
        if stop or step == self.steps or time.monotonic() - self.saved > CHECKPOINT_SECONDS:
            self.save(step)
        if stop:
            raise KeyboardInterrupt(f"stopped after step {step} of the {self.stage}; go on with: "
                                    f"python train.py --resume {self.folder}")

    def log(self, **row):
        """Add a row to log.csv. The rows are in the checkpoint too, so a resumed log has no gap."""
        self.rows.append({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        table = [self.COLUMNS, *([row.get(k, "") for k in self.COLUMNS] for row in self.rows)]
        self.write("log.csv", "".join(",".join(map(str, line)) + "\n" for line in table))

    def finish(self, scores):
        """metrics.json and the last lines of a run."""
        first, joint = training_tflop(self.config, self.flops)
        borrowed = ", borrowed" if self.config.lender else ""
        content = {"config": dataclasses.asdict(self.config), "commit": self.commit,
                   "tflop": first + joint, **scores}
        self.write("metrics.json", json.dumps(content, indent=1))
        lines = [f"{k:24s} {v:.3f}" for k, v in scores.items() if isinstance(v, float)]
        self.print("\n".join([*lines, scores.get("note", "")]))
        minutes = (time.monotonic() - self.began) / 60
        self.print(f"compute: {first + joint:,.1f} TFLOP = {first:,.1f} (first stage{borrowed})"
                   f" + {joint:,.1f} (joint training)\ndone in {minutes:.0f} minutes; "
                   f"weights, scores, pictures are in {self.folder}\n"
                   f"next: python sample.py swap {self.folder}")


def to_float(images):
    """uint8 images -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(images):
    """Float images in [-1, 1] -> uint8, on the CPU."""
    return ((images.cpu() + 1) * 127.5).round().clamp(0, 255).byte()


@torch.no_grad()
def encode(model, dataset, indices, device):
    """Codes (n, N) or (n, N, d) of the images at these indices, float32 on the CPU."""
    return torch.cat([model.represent(to_float(dataset.images(some).to(device))).cpu()
                      for some in indices.split(32)])  # more would need more memory than a step


def need(ok, name, found, expected):
    """ValueError in one line, naming the flag, unless ok."""
    if not ok:
        raise ValueError(f"--{name.replace('_', '-')} is {found}; expected {expected}")


def check(config):
    """Raises ValueError, one line, for the first value that cannot work, before any work starts."""
    c = config
    for f in dataclasses.fields(c):
        value, allowed = getattr(c, f.name), f.metadata["allowed"]
        if isinstance(allowed, str):
            need(RANGES[allowed](value), f.name, value, allowed)
        elif allowed:
            need(value in allowed, f.name, value, "one of " + ", ".join(map(str, allowed)))
    unit, halvings = math.lcm(4, c.heads), 2 ** (len(c.multipliers) - 1)
    with torch.device("meta"):  # without memory
        side = c.size / vq.KINDS[c.first_stage]().factor
    plain = (c.decoder, c.conditioning, c.tokens, c.regularizer, c.lender)
    for ok, name, expected in [
            (c.model == "encdiff" or plain == ("diffusion", "cross", "scalar", "none", ""), "model",
             "encdiff with its variants or a borrowed first stage"),
            (c.model == "vae" or c.vae_loss == "beta", "vae_loss", "--model vae beside it"),
            (c.channels % unit == 0, "channels", f"a multiple of {unit}"),
            (side % halvings == 0, "multipliers", f"levels that halve a side of {side:g} evenly"),
            (c.vq_steps or not c.trains_first_stage, "vq_steps", "1 or more, or --first-stage RUN"),
            (c.conditioning == "cross" or c.decoder == "diffusion", "decoder",
             "diffusion with --conditioning adagn: the direct decoder attends to the tokens"),
            (c.regularizer == "none" or c.tokens == "scalar" and c.decoder == "diffusion",
             "regularizer", "none with --tokens vector or --decoder direct"),
            (c.regularizer != "orthogonal" or c.num_tokens <= c.token_dim, "num_tokens",
             f"at most --token-dim, {c.token_dim}, tokens that are orthogonal")]:
        need(ok, name, getattr(c, name), expected)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and help that a closed pipe may cut."""

    def error(self, message):
        raise ValueError(f"{message}; see python {self.prog} --help")

    def print_help(self, file=None):
        say(self.format_help())


@contextlib.contextmanager
def signals(act):
    """Within, Ctrl-C, a kill and a closed terminal call act(number, frame)."""
    old, numbers = {}, {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
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
        status, text = 130, str(stop) or "interrupted; nothing half-written is left"
    except (ValueError, OSError) as error:
        status, text = 2, f"error: {' '.join(str(error).split())}"
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError for a lack of memory
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate", str(error)):
            raise  # no fault of the user
        status, text = 2, "error: out of memory; try a smaller --batch"
    with contextlib.redirect_stdout(sys.stderr):
        say(text)
    sys.exit(status)


def make_parser():
    """The flags of a run, and one for each field of Config that has a help text."""
    parser = Parser("train.py", argument_default=argparse.SUPPRESS,
                    description="Train EncDiff: first stage, joint training, scores.")
    parser.add_argument("--preset", choices=PRESETS, help="values of the flags below; "
                        "small (default): for two CPU cores; large: the same recipe with the "
                        "paper's sizes, for a GPU; paper: the paper's recipe, for a GPU")
    parser.add_argument("--out", help="folder of a new run (default: runs/PRESET-SEED)")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: the best here")
    for f in [f for f in dataclasses.fields(Config) if f.metadata["help"]]:
        kind, allowed, text = type(f.default), f.metadata["allowed"], f.metadata["help"]
        options = {bool: dict(action=argparse.BooleanOptionalAction),
                   tuple: dict(type=int, nargs="+")}.get(kind, dict(type=kind))
        if isinstance(allowed, str):
            text += f", {allowed}"
        elif allowed:  # `check` refuses others
            options["metavar"] = "{%s}" % ",".join(map(str, allowed))
        if f.default != "":
            text += f" (small: {SMALL.get(f.name, f.default)}, paper: {f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, **options)
    return parser


def parse(arguments):
    """-> (Config, run folder, checkpoint to go on from or None, device or None)."""
    given = vars(make_parser().parse_args(arguments))
    preset, out, resume, device = (given.pop(name, None) for name in (
        "preset", "out", "resume", "device"))
    if given.get("first_stage", "deep") not in vq.KINDS:  # a run; its kind is kept, as it may go
        lender = given["lender"] = given["first_stage"]
        need(Path(lender).exists(), "first_stage", lender, f"RUN or one of {', '.join(vq.KINDS)}")
        old = load_checkpoint(lender)["config"]
        given.update(first_stage=old.first_stage, vq_steps=old.vq_steps)
    for name in {"data", "cache", "lender"} & given.keys():  # found from any working directory
        given[name] = given[name] and os.path.abspath(os.path.expanduser(given[name]))
    if not resume:
        preset = preset or "small"
        config = Config(**{**PRESETS[preset], **given})
        check(config)
        say(f"preset {preset}")
        return config, Path(out or f"runs/{preset}-{config.seed}"), None, device
    need(not (out or preset), "resume", resume, "no --out and no --preset beside it")
    checkpoint = load_checkpoint(resume)
    old, done = checkpoint["config"], checkpoint["step"]
    config = dataclasses.replace(old, **given)
    check(config)
    changed = [f"{name} {getattr(old, name)} -> {getattr(config, name)}"
               for name in given.keys() - CHANGEABLE if getattr(old, name) != getattr(config, name)]
    need(not changed, "resume", resume, f"no other values ({', '.join(changed)}): of all flags "
         f"only {', '.join(sorted(CHANGEABLE))} may change. Train a new run with --out")
    need(checkpoint["stage"] == "first stage" or config.steps >= done, "steps", config.steps,
         f"{done} or more, as many as {resume} has done")
    need(Path(resume).is_dir() and "log" in checkpoint, "resume", resume, "run's folder, no export")
    return config, Path(resume), checkpoint, device


def main(arguments=()):
    """The command line, also to be called from Python: main(["--steps", "100"]). What cannot work
    is a ValueError or OSError of one line before any work; a signal is KeyboardInterrupt."""
    if not RUNNING.acquire(blocking=False):
        raise ValueError("train.main is at work in another thread; expected one run a process")
    try:
        config, folder, checkpoint, device = parse([str(word) for word in arguments])
        machine = Machine(device)
        if config.precision == "auto":
            config.precision = "bf16" if machine.fast_bf16() else "fp32"
        if not checkpoint:
            need(not (folder / "checkpoint.pt").exists(), "out", folder,
                 f"a folder that holds no run yet, or --resume {folder}")
            need(not config.lender or hasattr(load_run(config.lender)[0], "first_stage"),
                 "first_stage", config.lender, "a run that has one: a VAE has none")
        batches = [config.batch, FIRST_STAGE.get(config.first_stage, {}).get("batch", 0)]
        need(math.gcd(*batches) % machine.world == 0, "batch", config.batch,
             f"a number of images that {machine.world} processes can share, as in the first stage")
        need(not config.data or Path(config.data).exists(), "data", config.data,
             "the place where the dataset is now: nothing is found there")
        for turn in (True, False):  # the others read the cache that the main process writes
            if machine.main == turn:
                dataset = data.open_dataset(config.data or None, config.size, config.cache or None)
            machine.mean(0.0)
        here, there = dataset.identity, checkpoint["data"] if checkpoint else {}
        other = [f"{k} {there[k]}, not {here.get(k)}" for k in there if there[k] != here.get(k)]
        need(not other, "data", dataset.name, f"the dataset of {folder}: {'; '.join(other)}")
        with Run(folder, config, machine, here, checkpoint) as run:
            work(run, dataset)
    finally:
        RUNNING.release()


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])

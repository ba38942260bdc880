"""What we are sure of: each test is one claim about the method, or about what happens to a user.

WHERE     Read last, or beside the file in question: the sections follow the modules.
PAPER     arXiv 2402.09712; the tests with eq_ in their names hold its equations.
SHAPES    as in encdiff.py; images are 64 x 64, models and runs of the size TINY.
IDEA      A test that compares the code with itself cannot fail. So each has another way to the same
          number: a closed form, a brute-force loop, torch's own operation, a file built by hand, a
          second run. What a user gets wrong ends in one line, and what was there stays.
DIFFERS   Nothing here shows that the method disentangles: that takes a real run (README, Results).
          Nothing here needs a GPU, a dataset's file or a network.
TRY       python -m pytest -q                ->   every claim, in a few minutes
          python -m pytest -q -k eq_         ->   the equations alone, in seconds
          SLOW=1 python -m pytest -k killed  ->   a run killed twenty times, in minutes
"""
import argparse
import base64
import contextlib
import copy
import csv
import functools
import http.server
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import types
import urllib.error
import urllib.parse
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from queue import Queue
from unittest import mock

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import data
import encdiff
import metrics
import sample
import train
import unet
import vq

HERE = Path(__file__).parent
# A shell's background job begins with Ctrl-C ignored, nohup with a closed terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Sizes and constants with which a training step takes milliseconds.
vq.KINDS["tiny"] = functools.partial(vq.VQAutoencoder, channels=32, multipliers=(1,), blocks=1,
                                     latent_channels=3, patch=4, codebook_size=64)
train.FIRST_STAGE["tiny"] = dict(batch=8, lr=1e-3, squared=0.0, encoder_steps=0)
train.LOG_EVERY, train.ENCODER_WIDTH = 4, 8
TINY = dict(first_stage="tiny", encoder="cnn_bn", num_tokens=6, token_dim=8, channels=16,
            multipliers=(1, 2), blocks=1, dropout=0.1, vq_steps=12, steps=12, batch=8,
            optimizer="muon", score_every=0, precision="fp32")


NORMAL = torch.distributions.Normal(0.0, 1.0)


def refused(run, *said):
    """run() ends with status 2 and a single line, which has the words `said`; returns the line."""
    with pytest.raises(SystemExit) as ended, contextlib.redirect_stderr(io.StringIO()) as stream:
        with train.one_line_errors():
            run()
    line = stream.getvalue()
    assert ended.value.code == 2 and line.count("\n") == 1, line
    assert all(str(word) in line for word in said), line
    return line


def tiny_model(**changes):
    torch.manual_seed(0)
    return train.build_model(train.Config(**{"heads": 2, **TINY, **changes}))


def some_images(count=4):
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def few_steps(model, images):
    """Open the zero-initialised layers, so that everything is connected."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(4):
        optimizer.zero_grad()
        loss = model.loss(images)
        loss.backward()
        optimizer.step()
    return loss


# ---- The denoiser -------------------------------------------------------------------------------


def test_the_networks_have_the_sizes_of_the_paper():
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert count(unet.UNet(token_dim=16)) == 37_469_635
    cnn = count(encdiff.CNNEncoder(20))
    assert count(encdiff.TransformerEncoder(20)) == pytest.approx(cnn, rel=0.1)


def test_attention_and_its_recorded_maps_are_torchs():
    torch.manual_seed(0)
    block = unet.SpatialTransformer(32, heads=4, token_width=12)
    cross, within, tokens = block.cross_attention, block.self_attention, torch.randn(2, 5, 12)

    def torchs(layer, x, context):
        q, k, v = (linear(y).view(2, -1, 4, 8).transpose(1, 2) for linear, y in
                   [(layer.to_q, x), (layer.to_k, context), (layer.to_v, context)])
        out = F.scaled_dot_product_attention(q, k, v)  # (2, 4, P, 8)
        weights = (q @ k.mT / 8**0.5).softmax(-1).mean(1)
        return layer.to_out(out.transpose(1, 2).reshape(x.shape)), weights

    for P in (9, 1100):  # of the larger one self-attention is computed in slices
        x = torch.randn(2, P, 32)
        with unet.record_attention(block) as maps:
            out = cross(x, tokens)
        expected, weights = torchs(cross, x, tokens)
        assert_close([out, cross(x, tokens)], [expected, expected])
        (recorded,), = maps  # one layer, and of it the call inside `with` alone
        assert_close(recorded, weights)
        assert_close(within(x), torchs(within, x, x)[0])


def test_tokens_matter_their_order_does_not():
    model, tokens, t = tiny_model().eval(), torch.randn(4, 6, 8), torch.tensor([1, 10, 500, 1000])
    few_steps(model, some_images())
    z = torch.randn(4, *model.latent_shape)
    out = model.denoiser(z, t, tokens)
    assert_close(model.denoiser(z, t, tokens.flip(1)), out)
    assert (model.denoiser(z, t, tokens + 1) - out).abs().max() > 1e-4
    with pytest.raises(TypeError):
        model.denoiser(z, t)  # forgotten tokens do not pass unnoticed


def test_each_token_is_an_mlp_of_its_own_scalar_alone():
    model, codes = tiny_model(), torch.randn(4, 6)
    for i in range(6):
        x = codes[:, i:i + 1]
        for layer, (w, b) in enumerate(zip(model.token_map.weights, model.token_map.biases)):
            x = F.linear(F.elu(x) if layer else x, w[i].t(), b[i, 0])
        assert_close(model.tokens(codes)[:, i], x)


# ---- The noise ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, largest", [  # largest: of 1/sqrt(abar_t), at t = T
    ("cosine", 20_291), ("linear", 38.67), ("sqrt_linear", 71.69), ("sqrt", 2.196e20)])
def test_each_schedule_is_a_line_of_its_kind(name, largest):
    betas = encdiff.beta_schedule(name)
    abar = encdiff.cumulative(betas)
    assert betas.shape == (1000,) and betas.dtype == torch.float64
    assert 0 < betas.min() and betas.max() <= 0.999
    assert abar[0] == 1 and abar[1] > 0.95 and abar[-1]**-0.5 == pytest.approx(largest, rel=1e-3)
    line = {"linear": betas.sqrt(), "sqrt_linear": betas, "sqrt": betas.square(),
            "cosine": (abar[1:-1].sqrt() * math.cos(0.004 / 1.008 * math.pi)).acos()}[name]
    assert line.diff(n=2).abs().max() < 1e-9  # cosine: its last beta is clipped


def test_eq_4_is_the_product_of_its_two_gaussians():
    # q(z_{t-1} | z_t, z_0) is proportional to q(z_t | z_{t-1}) q(z_{t-1} | z_0): precisions add up.
    betas = encdiff.beta_schedule("cosine")
    abar = encdiff.cumulative(betas)
    z0, z_t, t = 0.7, -1.3, torch.tensor([2, 17, 500, 1000])
    beta, before = betas[t - 1], abar[t - 1]
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = ((1 - beta).sqrt() / beta * z_t + before.sqrt() / (1 - before) * z0) / precision
    a, b, v = encdiff.posterior(abar, t)
    assert_close(v, 1 / precision)
    assert_close(a * z0 + b * z_t, mean)


def test_eq_5_is_torchs_kl_over_random_latents():
    betas = encdiff.beta_schedule("cosine", 100)  # at its end beta~_t is large
    abar = encdiff.cumulative(betas)
    torch.manual_seed(0)
    z0 = 1.5 * torch.rand(200_000, dtype=torch.float64) + 0.2
    t = torch.tensor([[2], [30], [100]])
    z_t = abar[t].sqrt() * z0 + (1 - abar[t]).sqrt() * torch.randn(3, len(z0)).double()  # eq. (2)
    a, b, v = encdiff.posterior(abar, t)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(a * z0 + b * z_t, v.sqrt()), normal(0.0, 1.0))
    closed = encdiff.kl_bottleneck(betas, z0.square().mean())[[1, 29, 99]]
    assert_close(closed, kl.mean(1), rtol=0.01, atol=0.002)


def test_eq_5_falls_with_t_in_the_order_of_figure_2b():
    curves = [encdiff.kl_bottleneck(encdiff.beta_schedule(name))
              for name in ("cosine", "linear", "sqrt_linear", "sqrt")]
    assert all((curve[1:-1].diff() < 1e-9).all() for curve in curves)
    pairs = list(itertools.combinations(curves, 2))  # cosine's last betas take it below the others
    crossings = [1 + (a >= b).sum().item() for a, b in pairs]
    assert crossings == [843, 856, 986, 1001, 1001, 1001]
    assert all((a < b)[t - 1:].all() for (a, b), t in zip(pairs, crossings))


def test_eq_3_is_the_mean_squared_error_of_the_noise():
    model, images = tiny_model(dropout=0.0), some_images()
    few_steps(model, images)
    model.eval()
    t, noise = torch.tensor([1, 2, 600, 1000]), torch.randn(4, *model.latent_shape)
    abar = encdiff.cumulative(encdiff.beta_schedule("cosine"))[t].float().view(4, 1, 1, 1)
    z_t = abar.sqrt() * model.latents(images) + (1 - abar).sqrt() * noise
    predicted = model.denoiser(z_t, t, model.tokens(model.represent(images)))
    assert_close(model.loss(images, t, noise), (predicted - noise).pow(2).mean())


# ---- The first stage ----------------------------------------------------------------------------


def test_quantiser_rounds_and_passes_the_gradient_through():
    torch.manual_seed(0)
    quantizer = vq.Quantizer(50, 3, commitment=0.25, warmup=2)
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    assert all(torch.equal(quantizer(z)[0], z) for _ in range(2))  # not yet rounded
    z_q, loss, indices = quantizer(z)  # has set the codebook by itself
    vectors, book = z.detach().permute(0, 2, 3, 1).reshape(-1, 3), quantizer.codebook  # (32, 3)
    nearest = (vectors[:, None] - book).pow(2).sum(-1).argmin(-1)
    assert torch.equal(indices.flatten(), nearest) and len(nearest.unique()) > 10
    entries = book[nearest].view(2, 4, 4, 3).permute(0, 3, 1, 2)
    assert_close(z_q, entries)
    assert_close(loss, 1.25 * (entries - z).pow(2).mean())  # both terms have this value
    gradient, = torch.autograd.grad((z_q * 3).sum(), z, retain_graph=True)
    assert (gradient == 3).all()
    gradient, = torch.autograd.grad(loss, book)
    pull = 2 * (book[nearest] - vectors) / z.numel()  # of each vector on its entry
    assert_close(gradient, torch.zeros(50, 3).index_add(0, nearest, pull))


def test_latents_have_unit_std_and_decoding_rounds_them():
    model, images = tiny_model(), some_images()
    first = model.first_stage
    z = first.encode(images)
    first.quantizer.initialise(z)
    assert_close(first.decode(z), first.decode(first.quantize(z)[0]))
    model.measure_latents(images)
    assert_close(model.latents(images), z / z.std())  # not rounded
    assert_close(model.largest_rms, (z / z.std()).square().mean((1, 2, 3)).sqrt().max())
    before = copy.deepcopy(first.state_dict())
    few_steps(model.train(), images)  # the first stage is frozen
    assert not first.training and equal(before, first.state_dict())


def test_a_linear_first_stage_is_linear_in_the_pixels():
    autoencoder = vq.KINDS["linear"]()
    x, y = some_images(2).split(1)
    middle = (autoencoder.encode(x) + autoencoder.encode(y)) / 2
    assert_close(autoencoder.encode((x + y) / 2), middle)
    assert autoencoder(x)[0].shape == x.shape and middle.shape == (1, 4, 8, 8)


# ---- Variants, and the toy ----------------------------------------------------------------------

VARIANTS = [dict(), dict(encoder="cnn"), dict(encoder="transformer"),
            dict(self_attention=False, skip_dropout=0.3, encoder="cnn_patch"),
            dict(decoder="direct"), dict(conditioning="adagn"), dict(tokens="vector"),
            dict(tokens="vector", conditioning="adagn"), dict(tokens="vector", decoder="direct"),
            dict(regularizer="euler"), dict(regularizer="sparse"), dict(regularizer="orthogonal")]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant_learns_in_all_its_parameters(variant, tmp_path):
    model, images = tiny_model(**variant).train(), some_images()
    model.measure_latents(images)
    assert few_steps(model, images).isfinite()
    silent = [name for name, p in model.named_parameters()
              if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not silent
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = tiny_model(**variant)
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    codes = again.eval().represent(images)
    assert torch.equal(codes, model.eval().represent(images))
    assert model.sample(model.tokens(codes)).shape == images.shape


@pytest.mark.parametrize("switch", [{}, dict(attention=False), dict(noise="none"),
                                    dict(noise="strong-first", factors=4)], ids=str)
def test_the_toy_learns_and_shows_who_moves(switch, capsys):
    torch.manual_seed(0)
    encdiff.toy(steps=80, **switch)
    losses = [float(x) for x in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    assert len(losses) == 10 and sum(losses[-3:]) < 0.9 * sum(losses[:3])
    corner = lambda images: images[:, :1, 0, 0]  # a single code, which sees the wall alone
    assert [row[-1] for row in encdiff.who_moves(corner, 4)] == list("@   ")


# ---- The VAEs, and pixel space ------------------------------------------------------------------


def test_the_three_parts_of_a_vaes_kl_are_integrals():
    mean, log_var = torch.tensor([[[1., -2], [-1, 0], [2, 1], [0, 1]], [[-1, 0], [0, -2]] * 2])
    q = torch.distributions.Normal(mean, (log_var / 2).exp())  # of four images
    found = sum(torch.stack(encdiff.kl_terms(q.sample(), mean, log_var)) for _ in range(1000)) / 1e3
    z = torch.cartesian_prod(*[torch.linspace(-12, 12, 241)] * 2)  # (P, 2), cells of .1 x .1
    each = q.log_prob(z[:, None])  # (P, 4, 2)
    own, joint = each.sum(2), each.sum(2).logsumexp(1) - math.log(4)  # log q(z|x), log q(z)
    single, prior = (each.logsumexp(1) - math.log(4)).sum(1), NORMAL.log_prob(z).sum(1)
    parts = torch.stack([(own.exp() * (own - joint[:, None])).sum() / 4, (
        joint.exp() * (joint - single)).sum(), (joint.exp() * (single - prior)).sum()]) * 0.01
    assert_close(parts.sum(), torch.distributions.kl_divergence(q, NORMAL).sum(1).mean())
    assert_close(found, parts, atol=0.08, rtol=0)


@pytest.mark.parametrize("name", encdiff.VAE_WEIGHTS)
def test_eq_6_and_the_losses_of_the_other_vaes(name):
    model, images = tiny_model(model="vae", vae_loss=name), some_images()
    noise, x, weight = torch.randn(4, 6, 1, 1), (images + 1) / 2, encdiff.VAE_WEIGHTS[name]
    for step, capacity in [(1, 25 / 6), (6, 25.0), (12, 25.0)]:  # C rises in half of the 12 steps
        model.step.fill_(step - 1)
        mean, log_var = model.encoder(images).chunk(2, 1)
        q = torch.distributions.Normal(mean, log_var.exp().sqrt())
        z = mean + q.stddev * noise.view(4, 6)
        p, kl = (model.decode(z) + 1) / 2, torch.distributions.kl_divergence(q, NORMAL).sum() / 4
        error = -(x * p.log() + (1 - x) * (1 - p).log()).sum() / 4
        more = {"beta": weight * kl, "annealed": weight * abs(kl - capacity),
                "tc": kl + (weight - 1) * encdiff.kl_terms(z, mean, log_var)[1]}[name]
        assert_close(model.loss(images, None, noise), (error + more) / (3 * 64 * 64))


def test_pixels_are_rearranged_and_noise_follows_from_v():
    model, x, t = tiny_model(first_stage="pixels"), some_images(), torch.tensor([1, 2, 600, 1000])
    z0, abar = model.latents(x), model.alpha_bar[t].view(4, 1, 1, 1)
    assert torch.equal(z0[:, :64, 2, 5].reshape(4, 8, 8), x[:, 0, 16:24, 40:48])
    assert torch.equal(model.decode(z0), x)
    noise = torch.randn_like(z0)
    model.denoiser.network.forward = lambda *_: abar.sqrt() * noise - (1 - abar).sqrt() * z0  # v
    assert model.loss(x, t, noise) < 1e-10


# ---- Training -----------------------------------------------------------------------------------


def flags(**options):
    """A config as command-line arguments."""
    values = {k: v if isinstance(v, tuple) else (v,) for k, v in options.items()}
    return [str(word) for k, v in values.items() for word in ("--" + k.replace("_", "-"), *v)]


class Toy:
    """All that training asks of a dataset: six images, 2 x 3 colours of their two halves."""

    pixels = torch.zeros(6, 3, 64, 64, dtype=torch.uint8)
    pixels[:, 0, :32] = torch.tensor([0, 0, 0, 255, 255, 255])[:, None, None]
    pixels[:, 1, 32:] = torch.tensor([0, 127, 254, 0, 127, 254])[:, None, None]
    name, identity = "toy", {"count": 6}
    __len__ = lambda self: 6
    images = lambda self, indices: self.pixels[indices]


def train_on_toy(patch, draw=False):
    """train.main on the toy dataset, without scores and, unless draw, without pictures."""
    patch.setattr(data, "open_dataset", lambda *a, **k: Toy())
    patch.setattr(train, "score", lambda *a, **k: {})
    if not draw:
        patch.setattr(train, "pictures", lambda *a: None)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def toy(folder, monkeypatch):
    train_on_toy(monkeypatch)


SHORT = flags(**TINY)  # where a flag is repeated, the last one counts


def make_run(folder, **changes):
    train.main([*SHORT, "--out", folder, *flags(**changes)])
    return folder


def resume(folder, **changes):
    train.main(["--resume", folder, *flags(**changes)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run, never interrupted; its files are for reading only."""
    with pytest.MonkeyPatch.context() as patch:
        train_on_toy(patch, draw=True)
        return make_run(tmp_path_factory.mktemp("runs") / "whole", score_every=6)


def saved(folder):
    return torch.load(Path(folder, "checkpoint.pt"), weights_only=True)


def weights(folder):
    return {**saved(folder)["model"], **{"ema." + k: v for k, v in saved(folder)["ema"].items()}}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log(folder, *columns):
    with open(Path(folder) / "log.csv", newline="") as file:
        return [[row[column] for column in columns] for row in csv.DictReader(file)]


def signals(patch, numbers):
    """Send the process these signals, {step: number}; the steps of all runs count on in a list."""
    note, done = train.Run.note, []

    def note_and_signal(*arguments):
        done.append(1)
        if len(done) in numbers:
            signal.raise_signal(numbers[len(done)])
        note(*arguments)

    patch.setattr(train.Run, "note", note_and_signal)
    return done


@pytest.mark.parametrize("options", [dict(model="vae", vae_loss="annealed"),
                                     dict(first_stage="pixels")], ids=str)
def test_a_vae_and_pixels_go_on_with_the_same_bits(options, toy, monkeypatch):
    make_run("whole", **options)
    signals(monkeypatch, {5: signal.SIGTERM})
    with pytest.raises(KeyboardInterrupt):
        make_run("parts", **options)
    resume("parts")
    assert equal(weights("parts"), weights("whole")) and saved("parts")["step"] == 12
    assert train.load_run("parts")[2]["scores"]["tflop"] > 0


def test_five_interruptions_leave_the_same_bits(whole, folder, monkeypatch):
    train_on_toy(monkeypatch, draw=True)
    # In warm-up, rounding, the last of stage 1, stage 2 twice; Ctrl-C, kill, a closed terminal.
    ask = {3: signal.SIGINT, 7: signal.SIGTERM, 12: signal.SIGHUP, 17: signal.SIGINT,
           23: signal.SIGHUP}
    done, handlers = signals(monkeypatch, ask), [*map(signal.getsignal, ask.values())]
    for run in [lambda: make_run("parts", score_every=6), *[lambda: resume("parts")] * 4]:
        with pytest.raises(KeyboardInterrupt, match="--resume parts"):
            run()
    resume("parts")
    assert len(done) == 24 and equal(weights("parts"), weights(whole))
    columns = ("stage", "step", "lr", "mse")
    assert log("parts", *columns) == log(whole, *columns)
    assert handlers == [*map(signal.getsignal, ask.values())]
    moving = [Path(run, "progress.gif").read_bytes() for run in ("parts", whole)]
    assert moving[0] == moving[1] and Image.open(io.BytesIO(moving[0])).n_frames == 2


def test_a_moved_run_goes_on_with_moved_data(whole, folder, monkeypatch):
    for name in ("score", "pictures"):
        monkeypatch.setattr(train, name, lambda *a, **k: {})
    for name, pixels in [("toy", Toy.pixels), ("other", Toy.pixels.flip(1))]:
        np.savez(f"{name}.npz", images=pixels.permute(0, 2, 3, 1).numpy())
    signals(monkeypatch, {17: signal.SIGINT})
    with pytest.raises(KeyboardInterrupt):
        make_run("run", data="toy.npz", score_every=100)
    Path("there/deep").mkdir(parents=True)
    Path("run").rename("there/moved"), Path("toy.npz").rename("there/data.npz")
    monkeypatch.chdir("there/deep")
    refused(lambda: resume("../moved"), "toy.npz", "--data")
    refused(lambda: resume("../moved", data="../../other.npz"), "--data is", "digest")
    monkeypatch.setattr(train.Machine, "fast_bf16", lambda self: False)
    resume("../moved", data="../data.npz", precision="auto")
    assert equal(weights("../moved"), weights(whole))
    assert train.load_run("../moved")[1].data == str(folder / "there/data.npz")


def test_a_first_stage_can_be_borrowed_and_a_seed_matters(whole, toy):
    shutil.copytree(whole, "lender")
    make_run("borrower", first_stage="lender", seed=7)
    lent, got = weights(whole), weights("borrower")
    shutil.rmtree("lender")  # what it lent is known
    assert train.load_run("borrower")[1].first_stage == "tiny"
    for part, same in [("first_stage.", True), ("encoder.", False), ("denoiser.", False)]:
        names = [name for name in lent if name.startswith(part)]
        assert equal({k: lent[k] for k in names}, {k: got[k] for k in names}) == same


def test_the_first_stages_encoder_stops_its_decoder_goes_on(toy, monkeypatch):
    monkeypatch.setitem(train.FIRST_STAGE["tiny"], "encoder_steps", 6)
    for name, steps in [("short", 20), ("long", 40)]:  # their learning rates part after step 8
        make_run(name, vq_steps=steps, steps=0)
    short, long = (train.load_run(name)[0].first_stage for name in ("short", "long"))
    assert equal(short.encoder.state_dict(), long.encoder.state_dict())
    assert not equal(short.decoder.state_dict(), long.decoder.state_dict())


def test_noise_is_weak_at_first_then_strong(toy, monkeypatch):
    drawn, loss = [], encdiff.EncDiff.loss
    monkeypatch.setattr(encdiff.EncDiff, "forward",
                        lambda *inputs: drawn.append(inputs[2:3]) or loss(*inputs))
    make_run("run", noise_order="weak-first", batch=64, steps=6)
    early, late = (torch.stack([t for t, in filter(None, drawn)]).double() / 1000).split((2, 4))
    for t, mean in [(early, 1 / 4), (late, 3 / 4)]:  # lowest and highest of three uniform numbers
        assert t.mean().item() == pytest.approx(mean, abs=0.06) and t.min() > 0 and t.max() <= 1


def test_the_learning_rate_rises_stays_and_falls():
    rates = [train.learning_rate(2.0, step, 1000, 0.4) for step in (0, 49, 99, 600, 800, 999)]
    assert rates == pytest.approx([0.02, 1.0, 2.0, 2.0, 1.0, 0.005])


def test_muon_steps_are_orthogonal_adamw_takes_the_rest():
    model = tiny_model()
    inner, outer = model.denoiser.middle[0].conv1.weight, model.denoiser.conv_out.weight
    optimizer = train.Optimizer(model, train.Config(**TINY), 1.0)
    before = inner.detach().clone()
    model.loss(some_images()).backward()
    u, _, v = torch.linalg.svd(torch.randn_like(inner.flatten(1)), full_matrices=False)
    inner.grad = (u * torch.logspace(0, -1, len(u)) @ v).view_as(inner)  # sizes 1 to .1
    optimizer.step(1e-3)
    step = (before - inner).detach().flatten(1) / 1e-2  # Muon's rate is ten times AdamW's
    sizes = torch.linalg.svdvals(step)
    assert 0.5 < sizes.min() and sizes.max() < 1.5
    assert outer.abs().median().item() == pytest.approx(1e-3, rel=0.01)  # from 0, by Adam's step


def test_training_lowers_the_loss_and_gives_the_average(toy, capsys):
    make_run("run", steps=60, lr=3e-2)
    losses = [float(loss) for stage, loss in log("run", "stage", "loss") if stage[0] == "j"]
    assert losses[-1] < 0.8 * losses[0]
    assert "joint training 20/60  loss" in capsys.readouterr().out
    kept, (model, _, about) = weights("run"), train.load_run("run")
    for name, v in model.state_dict().items():
        assert torch.equal(v, kept.get("ema." + name, kept[name])), name
    assert about["step"] == 60 and about["data"] == Toy.identity and about["scores"]["tflop"] > 0


def test_the_average_goes_a_tenth_of_the_way_but_in_stage_1():
    average, model = tiny_model(), tiny_model()
    for module, value in [(average, 0.0), (model, 1.0)]:
        for v in module.state_dict().values():
            v.fill_(value)
    train.update_average(average, model, 0.9)
    for name, v in average.state_dict().items():
        if v.is_floating_point():
            assert_close(v, torch.full_like(v, 0.0 if name.startswith("first_stage.") else 0.1))


def test_scores_of_scalars_and_of_tokens_and_what_is_left(tmp_path, monkeypatch):
    model, dataset = tiny_model().eval(), data.open_dataset()
    run = train.Run(tmp_path, train.Config(**TINY), train.Machine("cpu"))
    # A token that is its scalar along some direction must score as the scalar does.
    axes = torch.randn(6, 8)
    model.encoder.out.weight.data *= 1000  # or untrained codes count as not active
    model.token_map.forward = lambda codes: codes[..., None] * axes
    scores = train.score(run, dataset, model, 1500, 500, mapped=True)
    assert [scores[f"mapped_{k}"] for k in train.Run.SCORES] == pytest.approx(
        [scores[k] for k in train.Run.SCORES], abs=0.02)
    assert 0 < scores["disentanglement"] < 0.5 and len(scores["importance"]) == 6
    some = {"disentanglement": 0.5, "note": "one value is rare"}  # the others could not be computed
    monkeypatch.setattr(metrics, "evaluate", lambda *a, **k: dict(some))
    found = train.score(run, dataset, model, 150, 50, mapped=True)
    assert found == {**some, "mapped_disentanglement": 0.5}


def test_the_compute_of_small_is_what_whole_steps_took(monkeypatch):
    monkeypatch.setattr(train, "ENCODER_WIDTH", 64)
    before = {**train.SMALL, "optimizer": "adamw", "encoder": "cnn_bn"}  # counted in whole steps
    flops = train.step_flops(train.Config(**before))
    assert flops == pytest.approx({"first stage": 16.9e9, "joint training": 31.8e9}, rel=0.01)


LAUNCH = """import datetime, sys, time; sys.path.insert(0, sys.argv.pop(1))
import pytest, test_encdiff, train, data, torch.distributed as dist
test_encdiff.train_on_toy(pytest.MonkeyPatch())
train.CHECKPOINT_SECONDS = 0.2
dist.distributed_c10d.default_pg_timeout = datetime.timedelta(seconds=2)
if train.os.environ.get("RANK") == "0":  # a conversion that takes longer than that
    data.open_dataset = lambda *_: time.sleep(5) or test_encdiff.Toy()
with train.one_line_errors(): train.main(sys.argv[1:])"""


def launch(*words, launcher=(), run=subprocess.run, **options):
    """train.py on Toy in a process of its own, with one thread: their number decides last bits."""
    return run([*launcher, sys.executable, "-c", LAUNCH, str(HERE), *words], **options,
               env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_processes_train_like_one_after_a_slow_conversion(toy):
    options = dict(encoder="cnn", dropout=0.0, steps=8)  # BatchNorm and dropout differ
    make_run("one", **options)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--no-python"]
    launch(*SHORT, "--out", "two", *flags(**options), launcher=torchrun, timeout=300, check=True,
           capture_output=True)
    one, two = np.array(log("one", "loss"), float), np.array(log("two", "loss"), float)
    assert len(one) == 5
    np.testing.assert_allclose(one, two, atol=1e-3)


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="minutes; run with SLOW=1")
def test_a_run_killed_twenty_times_ends_with_the_same_bits(folder):
    long, random = [*SHORT, *flags(vq_steps=1000, steps=1000)], np.random.default_rng(0)
    launch(*long, "--out", "whole", check=True)
    words = [*long, "--out", "parts"]
    for _ in range(20):
        with pytest.raises(subprocess.TimeoutExpired):  # and the process is killed
            launch(*words, timeout=random.uniform(2, 5))
        if Path("parts", "checkpoint.pt").exists():
            words = ["--resume", "parts"]
    launch(*words, check=True)
    assert equal(weights("whole"), weights("parts"))


# ---- What a user can get wrong ------------------------------------------------------------------


BAD_FLAGS = ["--batch 0", "--steps many", "--lr nan", "--ema 1", "--seed -1", "--channels 30",
             "--vq-steps 0", "--first-stage shallow", "--multipliers 0", "--size 48", "--tokens",
             "--multipliers 1 2 2 2 2 2", "--learning-rate 1", "--resume nowhere", "--data nowhere",
             "--decoder direct --conditioning adagn", "--regularizer sparse --tokens vector",
             "--num-tokens 40 --regularizer orthogonal", "--device cuda", "--first-stage nowhere"]


@pytest.mark.parametrize("words", BAD_FLAGS)
def test_a_bad_flag_is_one_line_that_names_it(words, folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flag, *values = words.split()
    others = [] if flag == "--resume" else [*SHORT, "--out", "run"]
    said = "nowhere" if "nowhere" in values else flag
    refused(lambda: train.main([*others, flag, *values]), said)
    assert not Path("run").exists()


def test_what_may_not_change_and_other_runs_are_refused(whole, toy):
    kept = (whole / "checkpoint.pt").read_bytes()
    refused(lambda: resume(whole, dropout=0.5), "dropout 0.1 -> 0.5", "lr")
    refused(lambda: resume(whole, steps=5), "--steps is 5", "12 or more")
    refused(lambda: resume(whole, out="other"), "no --out")
    refused(lambda: resume(whole / "checkpoint.pt"), "folder")
    refused(lambda: make_run(whole), "or --resume")
    with train.Run("busy", train.Config(), train.Machine()):
        refused(lambda: make_run("busy"), "in use by another process")
    make_run("busy", steps=0, first_stage=whole)  # the failed start holds no lock
    assert (whole / "checkpoint.pt").read_bytes() == kept


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_a_foreign_checkpoint_executes_nothing(whole, toy):
    good, begin = saved(whole), (whole / "checkpoint.pt").read_bytes()[:5000]
    wider, absurd = {**good["config"], "channels": 32}, {**good["config"], "channels": "wide"}
    export = {k: v for k, v in good.items() if k not in ("optimizer", "log")}
    for name, content in [("empty", b""), ("text", b"hello"), ("cut", begin), ("list", [1]),
                          ("version", {**good, "format": 0}), ("shapes", {**good, "config": wider}),
                          ("type", {**good, "config": absurd}), ("part", {"format": 4}),
                          ("model", {**good, "model": [1]}), ("trap", {**good, "config": Trap()}),
                          ("export", export)]:
        path = Path(name, "checkpoint.pt")
        path.parent.mkdir()
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        refused(lambda: resume(name), name)
    assert not Path("trapped").exists()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module, moment", [(data, "open_dataset"), (train, "score")])
def test_ctrl_c_or_a_kill_before_and_after_training_is_one_line(
        module, moment, ending, toy, capsys, monkeypatch):
    monkeypatch.setattr(module, moment, lambda *a, **k: signal.raise_signal(ending))
    with pytest.raises(SystemExit) as ended, train.one_line_errors():
        make_run("run")
    assert ended.value.code == 130 and capsys.readouterr().err.count("\n") == 1
    assert signal.getsignal(ending) != signal.default_int_handler or ending == signal.SIGINT
    assert Path("run/checkpoint.pt").exists() == (moment == "score")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_keeps_the_last_good_checkpoint(whole, toy):
    Path("run").mkdir()
    shutil.copy(whole / "checkpoint.pt", "run")
    Path("run", "checkpoint.pt.tmp").symlink_to("/dev/full")
    refused(lambda: resume("run", steps=20), "No space left")
    assert equal(weights("run"), weights(whole)) and not list(Path("run").glob("*.tmp"))


def test_a_loss_that_is_not_finite_ends_with_advice_that_works(toy, monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    norms, clip = [], train.clip_grad_norm_

    def explode(*arguments):
        norms.append(clip(*arguments))
        return norms[-1] * (math.nan if len(norms) == 15 else 1)

    monkeypatch.setattr(train, "clip_grad_norm_", explode)
    line = refused(lambda: make_run("run", lr=3e-3), "step 3 of the joint training")
    assert saved("run")["step"] == 2
    train.main(line.split("train.py ")[1].split())
    assert train.load_run("run")[1].lr == 1e-3 and len(norms) == 12 + 3 + 10


def test_a_closed_pipe_does_not_end_a_run(folder):
    with launch(*SHORT, "--out", "run", run=subprocess.Popen, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"preset small\n"
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == 0 and b"Error" not in error and saved("run")["step"] == 12


def test_an_odd_folder_is_used_or_the_reason_said(whole, toy, monkeypatch):
    Path("file").write_text("")
    refused(lambda: make_run("file/run"), "Not a directory")
    terminal = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    make_run("\u7d75", steps=0, first_stage=whole)
    assert b"are in \\u7d75" in terminal.buffer.getvalue()

    def connect(*_, **__):  # on a network's file system
        raise sqlite3.OperationalError("locking protocol")

    monkeypatch.setattr(sqlite3, "connect", connect)
    make_run("net", steps=0, first_stage=whole)
    assert b"net cannot be locked (locking protocol)" in terminal.buffer.getvalue()
    Path("closed/config.json").mkdir(parents=True)  # stands for what may not be written
    refused(lambda: make_run("closed"), "cannot write closed/config.json")


def test_main_can_be_called_from_a_notebook(toy, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kernel", "--foreign"])
    assert train.parse([])[0] == train.Config(**train.SMALL)
    threads, errors = torch.get_num_threads(), []

    def second(*_):
        refused(lambda: make_run("two"), "another thread")
        return Toy()

    monkeypatch.setattr(data, "open_dataset", second)
    thread = threading.Thread(target=lambda: errors.append(make_run("one")))
    thread.start(), thread.join()
    assert errors == ["one"] and not Path("two").exists()
    assert len(weights("one")) and torch.get_num_threads() == threads


# ---- The scores, and the trees behind DCI --------------------------------------------------------


def table_of_codes(n=600):
    """Codes that are blurred, two-sided, mixed, a copy, unrelated; factors of 5, 2 and 3 values."""
    rng = np.random.default_rng(0)
    factors = np.stack([rng.integers(0, k, n) for k in (5, 2, 3)], axis=1)
    noise = rng.normal(size=(n, 5))
    codes = np.stack([factors[:, 0] + 0.3 * noise[:, 0], factors[:, 1] + 0.5 * noise[:, 1],
                      factors[:, 1] - factors[:, 2] + 0.2 * noise[:, 2], -factors[:, 2] * 1.0,
                      np.round(noise[:, 4])], axis=1)
    return codes, factors


def all_combinations(*sizes):
    return np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), axis=1)


def test_metrics_worked_example_is_what_was_found_by_hand(capsys):
    metrics.main([])
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    for line in lines:
        by_hand = [float(Fraction(number)) for number in line[74:].split()]
        assert list(map(float, line[30:74].split())) == pytest.approx(by_hand, abs=6e-4), line


def test_metrics_leaves_take_a_tenth_of_a_newton_step():
    label = np.arange(3).repeat(5)                            # r = 2/3 or -1/3 before round one
    trees = metrics.fit_trees(label[:, None] * 1.0, label, rounds=1)
    step = metrics.look_up(trees.rounds[0][0], label[None])   # of the tree for class 0
    right, left = ((3 - 1) / 3 * r / (2 / 3 * 1 / 3) for r in (2 / 3, -1 / 3))
    assert step == pytest.approx(0.1 * np.repeat([right, left], [5, 10]))
    between = np.array([[-9], [0.49], [0.51], [1.49], [1.51], [9]])       # thresholds lie midway
    assert metrics.predict(trees, between).tolist() == [0, 0, 1, 1, 2, 2]
    close = 1 + np.spacing(1.0) * np.array([[1], [2]])        # floats with none in between
    assert metrics.predict(metrics.fit_trees(close, [0, 1]), close).tolist() == [0, 1]


def test_metrics_splits_are_the_best_of_all():
    codes, factors = table_of_codes(60)
    label = factors[:, 1]
    r = label - label.mean()                                  # before round one, see the example
    for rows in (np.arange(60), np.flatnonzero(codes[:, 0] > 2)):
        x, y = codes[rows], r[rows]
        order = rows[x.argsort(axis=0).T]
        rank = np.stack([np.unique(column, return_inverse=True)[1] for column in codes.T])
        gain, code, c = metrics.best_split(r, order, codes.T, rank, np.random.default_rng(0))
        shrink = {(i, cut): y.var() * len(y) - sum(part.var() * len(part) for part in
                                                   (y[x[:, i] <= cut], y[x[:, i] > cut]))
                  for i in range(5) for cut in np.unique(x[:, i])[:-1]}
        best = max(shrink, key=shrink.get)
        assert gain == pytest.approx(shrink[best], rel=1e-4) and code == best[0] and c >= best[1]
        assert (x[:, code] <= c).sum() == (x[:, code] <= best[1]).sum()


def test_metrics_trees_agree_with_scikit_learn_and_see_only_order():
    # scikit-learn 1.9.1: GradientBoostingClassifier(random_state=0).fit on
    # codes[:400], factors[:400, j]; feature_importances_ of each factor j as a column
    importance = np.array([[0.9758, 0.0009, 0.0], [0.0098, 0.5304, 0.0], [0.0071, 0.3358, 0.0],
                           [0.0035, 0.1329, 1.0], [0.0039, 0.0, 0.0]])
    codes, factors = table_of_codes()
    other = [3, 0, 4, 2, 1]                                   # another order of the codes
    for codes, importance in [(codes, importance), (np.exp(codes[:, other]), importance[other])]:
        scores = metrics.dci(codes[:400], factors[:400], codes[400:], factors[400:])
        assert np.abs(scores["importance"] - importance).max() < 0.01
        assert scores["disentanglement"] == pytest.approx(metrics.focus(importance), abs=0.01)
        assert scores["completeness"] == pytest.approx(metrics.focus(importance.T), abs=0.01)
        assert scores["informativeness_train"] == 1.0
        assert scores["informativeness_test"] == pytest.approx(0.9667, abs=0.01)


def test_metrics_dci_closed_forms():
    factors = all_combinations(4, 3, 5).repeat(4, axis=0)
    for codes, labels, d, c in (
            (factors, factors, 1, 1),                                         # one code a factor
            (factors[:, :2], factors[:, [0, 0, 1, 1]], 1 - np.log(2) / np.log(4), 1),  # F in pairs
            (0 * factors, factors, 0, 0),
            # Two equal codes a factor: D does not mind, C loses log 2 / log N; ties are shared.
            (np.append(factors, factors, 1), factors, 1, 1 - np.log(2) / np.log(6))):
        scores = metrics.dci(codes, labels, codes, labels)
        assert scores["disentanglement"] == pytest.approx(d, abs=1e-6)
        assert scores["completeness"] == pytest.approx(c, abs=0.02 if 0 < c < 1 else 1e-6)
    # A row counts by its share: 6 of 8 for the row that keeps to nothing, 2 for the one that does.
    assert metrics.focus(np.array([[3.0, 3.0], [0.0, 2.0]])) == pytest.approx(2 / 8)
    unseen = metrics.dci(factors, factors, factors, factors + [0, 9, 0])     # classes no tree knows
    assert unseen["informativeness_test"] == pytest.approx(2 / 3)


def test_metrics_factor_vae_of_perfect_and_ignorant_codes():
    rng, factors = np.random.default_rng(0), all_combinations(4, 3, 5, 2).repeat(10, axis=0)
    # A code that is constant but for rounding has the smallest variance ratio in some batches.
    dead = 1e-9 * (rng.random((len(factors), 1)) < 0.01)
    perfect = metrics.factor_vae_votes(np.append(factors, dead, axis=1), factors, 2000, 1000)
    assert perfect == {"score": 1, "train_score": 1, "active_dims": 4, "note": ""}
    ignorant = metrics.factor_vae_votes(rng.normal(size=(1200, 6)), factors, 2000, 1000)
    assert ignorant["score"] == pytest.approx(1 / 4, abs=0.06)
    assert ignorant["train_score"] > ignorant["score"]       # chance favours the votes learnt from


def test_metrics_factor_vae_from_a_pool_is_the_original_protocol():
    def represent_mixed(factors):
        """Six codes, the sixth dead, most mixing factors: the score is well inside (0, 1)."""
        a, b, c, d = (factors / torch.tensor([8.0, 7.0, 5.0, 4.0])).T
        return torch.stack([a + .9 * b, b + .8 * c, (a * d + c) / 2, .7 * d + c, a * b, 0 * a], 1)

    everything = torch.from_numpy(all_combinations(9, 8, 6, 5))
    rng, votes = np.random.default_rng(1), np.zeros((2, 4, 5), dtype=int)
    spread = represent_mixed(everything)[:, :5].var(0)
    for part, fixed in [(p, f) for p in (0, 1) for f in rng.integers(4, size=1500)]:
        factors = rng.integers([9, 8, 6, 5], size=(64, 4))               # 64 new images a vote
        factors[:, fixed] = factors[0, fixed]
        codes = represent_mixed(torch.from_numpy(factors))[:, :5]
        votes[part, fixed, (codes.var(0) / spread).argmin()] += 1
    expected = votes[1][votes[0].argmax(0), np.arange(5)].sum() / 1500

    class Images(list):
        images = factors = everything.__getitem__                        # images are their factors
    score = metrics.factor_vae_score(represent_mixed, Images(everything), pool=1000)
    assert 0.4 < expected < 0.9 and score["active_dims"] == 5
    assert score["score"] == pytest.approx(expected, abs=0.04)


def test_metrics_vector_codes_are_read_along_their_main_axis():
    codes, factors = table_of_codes()
    rng = np.random.default_rng(1)
    axes = rng.normal(size=(5, 4))
    vectors = codes[:, :, None] * axes + 1e-3 * rng.normal(size=(600, 5, 4)) + axes * 7
    flat = metrics.scalar_codes(vectors)
    sign = np.sign([axis[np.abs(axis).argmax()] for axis in axes])   # its largest entry is made +
    expected = (codes - codes.mean(0)) * np.linalg.norm(axes, axis=1) * sign
    assert np.abs(flat - expected).max() < 0.01
    assert metrics.scalar_codes(vectors[:9], fit_on=vectors) == pytest.approx(flat[:9])
    assert metrics.mig(vectors, factors) == metrics.mig(flat, factors)


def test_metrics_mig_closed_forms():
    factors = all_combinations(2, 4).repeat(8, axis=0)
    assert metrics.mig(factors, factors) == pytest.approx(1)
    assert metrics.mig(factors[:, [0, 0, 1, 1]], factors) == pytest.approx(0)
    assert metrics.mig(np.ones((64, 2)), factors) == pytest.approx(0)
    rare = (factors[:, 1:] == 0)                             # entropy below log 2: still exactly 1
    assert metrics.mig(np.concatenate([rare, factors[:, :1]], axis=1), rare) == pytest.approx(1)
    # One code a bit that is wrong in a quarter of the cases: log 2 - H(1/4) of log 2 nats.
    bit, flipped, rest = all_combinations(2, 4, 2).repeat(4, axis=0).T
    codes = np.stack([bit ^ (flipped == 0), rest], axis=1)
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert metrics.mig(codes, bit[:, None]) == pytest.approx(1 - entropy / np.log(2))


def test_metrics_tad_equals_its_definition():
    rng = np.random.default_rng(0)
    yes = rng.random((300, 5)) < [0.5, 0.3, 0.5, 0.2, 0.5]
    yes[:, 2] = yes[:, 0] ^ (rng.random(300) < 0.02)         # nearly a copy: both drop out
    noise = np.round(rng.normal(size=(300, 4)), 1)           # rounded: ties must count half
    codes = noise + np.stack([-2 * yes[:, 1], 1 * yes[:, 1], 2 * yes[:, 3], 3 * yes[:, 0]], axis=1)
    area = np.empty((4, 5))
    for i, j in np.ndindex(4, 5):
        with_it, without = codes[yes[:, j], i, None], codes[~yes[:, j], i]
        a = ((with_it > without) + 0.5 * (with_it == without)).mean()
        area[i, j] = max(a, 1 - a)
    result, all_have = metrics.tad(codes, yes * 2 - 1), np.ones((300, 1), dtype=bool)
    assert metrics.tad(codes, np.append(yes, all_have, axis=1))["tad"] == result["tad"]
    assert np.array(json.loads(json.dumps(result))["auroc"]) == pytest.approx(area)
    assert result["counted"] == [1, 3] and result["captured"] == 2
    best = np.sort(area, axis=0)
    assert result["tad"] == pytest.approx((best[-1] - best[-2])[[1, 3]].sum())


def test_metrics_ssim_and_mse_equal_their_definitions():
    x, y = torch.rand(2, 2, 3, 13, 12, generator=torch.Generator().manual_seed(0)).double()
    y = 0.6 * x + 0.4 * y
    distance = torch.cartesian_prod(torch.arange(-5, 6), torch.arange(-5, 6)).square().sum(1)
    w = torch.exp(-distance / 4.5)[:, None] / torch.exp(-distance / 4.5).sum()       # (121, 1)
    p, q = (F.unfold(image[1][:, None], 11, padding=5) for image in (x, y))          # (3, 121, 156)
    mp, mq = ((w * each).sum(1, keepdim=True) for each in (p, q))
    vp, vq, cov = ((w * each).sum(1, keepdim=True)
                   for each in ((p - mp) ** 2, (q - mq) ** 2, (p - mp) * (q - mq)))
    expected = ((2 * mp * mq + 1e-4) * (2 * cov + 9e-4)
                / ((mp ** 2 + mq ** 2 + 1e-4) * (vp + vq + 9e-4)))
    assert metrics.ssim(x, y)[1].item() == pytest.approx(expected.mean().item())
    assert metrics.ssim(x, x).tolist() == pytest.approx([1, 1])
    shifted = torch.stack([x[0] * 0, x[1] * 0 + 0.25])
    assert metrics.mse(shifted, torch.full_like(x, 0.75)).tolist() == pytest.approx([9 / 16, 1 / 4])


def test_metrics_lpips_agrees_with_the_lpips_package(tmp_path):
    # lpips 0.1.4, net="alex", with these weights and images, normalize=True.
    def wave(shape, step):
        t = torch.arange(np.prod(shape), dtype=torch.float64)
        return (torch.sin(t * step) * (2 * shape[0] / len(t)) ** 0.5).float().view(shape)

    files = tmp_path / "alexnet.pth", tmp_path / "linear.pth"
    shapes = (64, 3, 11, 11), (192, 64, 5, 5), (384, 192, 3, 3), (256, 384, 3, 3), (256, 256, 3, 3)
    alexnet, linear = {}, {}
    for level, ((index, *_), shape) in enumerate(zip(metrics.ALEXNET, shapes)):
        alexnet[f"features.{index}.weight"] = wave(shape, 0.7 + 2 * level * 0.13)
        alexnet[f"features.{index}.bias"] = wave(shape[:1], 0.7 + (2 * level + 1) * 0.13)
        linear[f"lin{level}.model.1.weight"] = wave((1, shape[0], 1, 1), 1.1 + level).abs()
    torch.save(alexnet, files[0])
    torch.save(linear, files[1])
    weights = metrics.load_lpips(*files)
    t = torch.arange(2 * 3 * 64 * 64, dtype=torch.float64)
    x, y = ((torch.sin(t * step) * 0.5 + 0.5).float().view(2, 3, 64, 64) for step in (0.37, 0.011))
    package = [0.00214165, 0.00212837]
    assert metrics.lpips(x, y, weights).tolist() == pytest.approx(package, rel=1e-3)
    assert metrics.lpips(x, x, weights).tolist() == [0, 0]
    files[1].write_text("version https://git-lfs.github.com/spec/v1\n")
    for mixed in (files[:1] * 2, files):
        with pytest.raises(ValueError, match="the other of the two files, a git-lfs pointer"):
            metrics.load_lpips(*mixed)


class BrightnessNet(torch.nn.Module):
    """Stands for the Inception file: two features, and the argument StyleGAN's network takes."""
    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features
        return images[:, :2].float().mean((2, 3))


def test_metrics_frechet_distance_equals_its_definition(tmp_path):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(500, 4))
    c = a @ rng.normal(size=(4, 4)) + 2                          # the covariances do not commute
    cov_a, cov_c = np.cov(a.T), np.cov(c.T)
    expected = (((a.mean(0) - c.mean(0)) ** 2).sum() + cov_a.trace() + cov_c.trace()
                - 2 * np.sqrt(np.linalg.eigvals(cov_a @ cov_c).real).sum())
    assert metrics.frechet_distance(a, torch.from_numpy(c)) == pytest.approx(expected)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    torch.jit.script(BrightnessNet()).save(tmp_path / "net.pt")
    images = torch.randint(0, 200, (70, 3, 4, 4), dtype=torch.uint8)
    distance = metrics.fid(images, images + 50, tmp_path / "net.pt")
    assert distance == pytest.approx(2 * 50 ** 2, rel=1e-4)


def test_metrics_evaluate_is_one_table_for_json_and_the_command_line(tmp_path, capsys):
    codes, factors = table_of_codes()
    scores = metrics.evaluate(torch.from_numpy(codes), torch.from_numpy(factors), 3, 300, 200)
    assert scores == json.loads(json.dumps(scores)) and np.shape(scores["importance"]) == (5, 3)
    train, test, _ = np.split(np.random.default_rng(3).permutation(600), [300, 500])
    alone = metrics.dci(codes[train], factors[train], codes[test], factors[test], seed=3)
    assert scores.items() > (alone | {"importance": alone["importance"].tolist()}).items()
    np.savez(tmp_path / "codes.npz", codes=codes, factors=factors)
    metrics.main([str(tmp_path / "codes.npz"), "--train", "300", "--test", "200", "--seed", "3"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].split() == ["4", *(f"{x:.2f}" for x in scores["importance"][4])]
    for name in ("factor_vae", "disentanglement", "mig", "samples"):
        assert [name, str(round(scores[name], 4))] in [line.split() for line in printed]
    with subprocess.Popen([sys.executable, metrics.__file__], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.close()                                   # `| head -1`
        assert process.stderr.read() == b"" and process.wait() == 0


GREY = torch.full((1, 3, 8, 8), 0.5)
PERFECT = all_combinations(4, 3).repeat(60, axis=0)
OBJECTS = np.arange(720)[:, None] // 5 % 12                      # 60 rows each: too few for a vote
NOISY = np.append(PERFECT, np.random.default_rng(0).normal(size=(720, 1)), axis=1)
RARE, HALF, NAN = PERFECT.copy(), 1.0 * PERFECT, NOISY.copy()
RARE[0, 1], HALF[3, 1], NAN[7, 2] = 9, 0.5, np.nan


@pytest.mark.parametrize("codes, factors, missing, reason", [
    (NOISY, RARE, "", "leave out rare values of factor 1"),
    (np.append(NOISY, OBJECTS, 1), np.append(PERFECT, OBJECTS, 1), "", "votes leave out factor 2"),
    (NOISY, np.insert(PERFECT, 1, 7, axis=1), "", "DCI leaves out factor 1, which has one value"),
    (NOISY[:, :1], PERFECT[:, :1], "factor_vae disentanglement completeness mig", "two codes"),
    (NOISY / 100, PERFECT, "factor_vae", "no active code: the largest std is 0.01"),
    (NOISY, PERFECT * 0, "factor_vae disentanglement completeness informativeness_test mig", "DCI"),
])
def test_metrics_give_each_score_that_can_be_given(codes, factors, missing, reason):
    scores = metrics.evaluate(codes, factors)                    # all are 1, but for one noisy code
    assert (scores["dci_train"], scores["dci_test"]) == (480, 240)           # of 10,000 + 5,000
    assert reason in scores["note"]
    for name in ("factor_vae", "disentanglement", "completeness", "informativeness_test", "mig"):
        assert scores.get(name) == (None if name in missing else pytest.approx(1, abs=0.08)), name
    if "importance" in scores:
        assert np.sum(scores["importance"], axis=0) == pytest.approx(1.0 * (np.ptp(factors, 0) > 0))


@pytest.mark.parametrize("name, arguments, message", [
    ("evaluate", (NAN, PERFECT), r"codes\[7, 2\] is nan.*drop"),
    ("evaluate", (NOISY[:, :0], PERFECT), r"codes has shape \(720, 0\)"),
    ("evaluate", (NOISY, PERFECT.astype(str)), "factors has dtype <U.*number the values"),
    ("evaluate", (NOISY[:710], PERFECT), r"factors has shape \(720, 2\).*710 rows"),
    ("evaluate", (NOISY, HALF), r"factors\[3, 1\] is 0.5.*integers"),
    ("evaluate", (NOISY, PERFECT, 0, 0), "DCI on 0"),
    ("dci", (NOISY, PERFECT, NOISY[:, :2], PERFECT), r"\(720, 2\), fitted on \(720, 3\)"),
    ("dci", (NOISY, PERFECT * 0, NOISY, PERFECT), "one that varies"),
    ("tad", (NOISY, PERFECT * 2), "attributes has the values"),
    ("ssim", (-GREY, GREY), r"from -0.5 to 0.5; .*\[0, 1\]"),
    ("mse", (GREY, GREY[..., :7]), "one shape"),
    ("frechet_distance", (NOISY[:1], NOISY), "feats_a"),
    ("fid", (GREY, GREY, "net.pt"), "uint8"),
])
def test_metrics_refuse_what_they_cannot_score(name, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        getattr(metrics, name)(*arguments)
    assert "\n" not in str(error.value)


def test_metrics_command_line_refuses_files_in_one_line(tmp_path):
    np.savez(tmp_path / "names.npz", z=NOISY)
    np.savez(tmp_path / "objects.npz", codes=np.array([{}, {}]), factors=PERFECT)
    np.save(tmp_path / "array.npy", NOISY)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "names.npz").read_bytes()[:300])
    for name in ("names.npz", "objects.npz", "array.npy", "cut.npz"):
        refused(lambda: metrics.main([str(tmp_path / name)]), "metrics.py: ", name, "np.savez")
    refused(lambda: metrics.main([str(tmp_path / "absent.npz")]), "metrics.py: ", "No such file")


# ---- Datasets ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rendered():
    return data.open_dataset()


def listing(folder):
    return sorted((str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*"))


def noise(n, h=64, w=64, c=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, c), np.uint8)


FOUR, TWELVE = noise(4), noise(12)


def shows(dataset, indices, array):
    """Whether these are the dataset's images; array is (n, h, w, c)."""
    return (dataset.images(indices).permute(0, 2, 3, 1).numpy() == array).all()


def stored(kind="npz", **arrays):
    """The bytes of a file with these arrays."""
    buffer = io.BytesIO()
    if kind == "npz":
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()
    with h5py.File(buffer, "w") as f:
        for key, array in arrays.items():
            f.create_dataset(key, data=array, compression="gzip")
    return buffer.getvalue()


NPZ = stored(images=FOUR)


def write(path, content):
    """A file of these bytes, or a picture, in a folder that may be new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        Image.fromarray(content).save(path, "PNG")
    return path


def dataset_of(folder, images, key="images", kind="npz", **arrays):
    """The dataset of a new file with these arrays."""
    path = folder / f"{len(list(folder.iterdir()))}.{kind}"
    return data.open_dataset(write(path, stored(kind, **{key: images}, **arrays)))


def test_each_index_has_its_factors_in_the_official_order(rendered):
    rows = np.arange(480000)
    f = rendered.factors(rows)
    assert (f @ torch.tensor([48000, 4800, 480, 60, 15, 1]) == torch.from_numpy(rows)).all()
    assert rendered.factor_sizes == (10, 10, 10, 8, 4, 15) == tuple(f.amax(0) + 1)
    assert (rendered.find(f[::4801]) == rows[::4801]).all()


@pytest.mark.parametrize("shape", range(4))
def test_intersections_agree_with_walking_along_the_rays(shape):
    scale, angle = data.LEVELS[3][1], data.LEVELS[5][11]        # small: its lid is in view
    r, h = data.RADIUS[shape] * scale, data.TALL[shape] * scale

    def distance(x, y, z):                                      # to the object's surface, or less
        side, above = np.hypot(x, z), abs(y - h / 2) - h / 2
        return {data.CUBE: np.maximum(np.maximum(abs(x), abs(z)) - r, above),
                data.CYLINDER: np.maximum(side - r, above),
                }.get(shape, np.hypot(side, y - np.clip(y, r, h - r)) - r)

    def walk(o, d):                                             # sphere tracing to the object
        t = np.full(d.shape[1], 1e-3)
        for _ in range(400):
            t += np.maximum(distance(*(o + t * d)), 0)
        return np.where(distance(*(o + t * d)) < 1e-4, t, np.inf)

    eye, rays = data.camera_rays(angle, 64)
    room = part, t_room, _, p = data.room_light(eye, rays)
    with np.errstate(all="ignore"):
        planes = data.light_planes(shape, scale, eye, rays, room)
        formula = data.meet_object(shape, scale, eye[:, None], rays)
        walked = walk(eye[:, None], rays)
        shadow = walk(p, np.repeat(data.SUN[:, None], len(part), 1)) < np.inf
    thing = walked < t_room
    both = (formula < np.inf) & thing
    assert np.abs(formula[both] - walked[both]).max() < 1e-3 and both.mean() > 0.02
    place = eye[:, None] + formula[both] * rays[:, both]
    slope = [(distance(*(place + step)) - distance(*(place - step))) / 2e-5
             for step in 1e-5 * np.eye(3)[:, :, None]]          # the normal is where it rises
    normal = data.object_normal(shape, scale, place)
    assert np.isclose(slope, normal, atol=1e-3).all(0).mean() > 0.97    # edges have none
    assert ((planes[2] > 0) == thing).mean() > 0.999            # rays that graze may disagree
    shadow &= (part == 1) & ~thing
    assert ((planes[0] == data.SHADOW) == shadow).mean() > 0.995 and shadow.mean() > 0.003


def test_a_hue_colours_only_its_own_surface(rendered):
    index = np.random.default_rng(0).integers(480000, size=40)
    f = rendered.factors(index).numpy()
    for j, place in enumerate((48000, 4800, 480)):
        other = index + ((f[:, j] + 3) % 10 - f[:, j]) * place
        changed = (rendered.images(index) != rendered.images(other)).any(1).reshape(40, -1).numpy()
        surface = rendered.planes[index % 480, j] != 0
        assert not (changed & ~surface).any()
        assert (changed & surface).sum() > 0.9 * surface.sum()
    # Orientation -30 (number 0) shows the dark right wall, +30 (number 14) the dark left one.
    left, right = rendered.planes[[0, 14], 1].reshape(2, 64, 64)[:, 28, [2, 61]].T
    assert left[0] > 1.2 * right[0] and right[1] > 1.2 * left[1]
    assert (rendered.images(index)[:, :, 0, 0] == torch.tensor(data.SKY)).all()
    # Nothing is so bright that int16 would wrap around.
    planes = rendered.planes.astype(int)
    assert (5 * planes[:, :3].sum(1) + planes[:, 3:].max(1)).max() < 32767


def test_the_official_file_is_read_even_in_part(rendered, tmp_path):
    index = np.sort(np.random.default_rng(0).choice(480000, 600, replace=False))
    factors, order = rendered.factors(index), np.random.default_rng(1).permutation(600)
    labels = factors.numpy() * [0.1, 0.1, 0.1, 0.5 / 7, 1, 60 / 14] + [0, 0, 0, 0.75, 0, -30]
    read = dataset_of(tmp_path, rendered.images(index).permute(0, 2, 3, 1), kind="h5", labels=labels)
    assert (read.factor_names, read.factor_sizes) == (data.FACTORS, data.SIZES) and not read.note
    assert (read.factors(order) == factors[order]).all()
    assert (read.images(order) == rendered.images(index[order])).all()
    assert (read.find(factors[order]) == order).all()


@pytest.mark.parametrize("kind", ["h5", "npz"])
def test_any_layout_and_name_give_the_same_images(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 64 * 64 * 3 * 4)         # several blocks, the last one short
    grey, n = TWELVE[..., :1], np.arange(12)
    for name, array, expected in [
            ("images", grey[..., 0], grey), ("X", grey, grey), ("arr_0", TWELVE, TWELVE),
            ("imgs", np.asfortranarray(TWELVE), TWELVE),
            ("data", np.ascontiguousarray(TWELVE.transpose(0, 3, 1, 2)), TWELVE),
            ("image", np.pad(TWELVE, ((0, 0),) * 3 + ((0, 1),), constant_values=255), TWELVE)]:
        dataset = dataset_of(tmp_path, array, name, kind, factors=np.stack([n % 5 * 10, n // 5], 1))
        assert shows(dataset, [9, 0, 4], expected[[9, 0, 4]]) and dataset.factor_sizes == (5, 3)
        assert dataset.factors([7]).tolist() == [[2, 1]]
        assert dataset.factors([7]).dtype == torch.int64


def test_the_values_decide_what_is_black_and_white(tmp_path):
    colour = noise(2)
    wide, mask = colour.astype(np.uint16), colour[..., :1] > 127
    for array in (colour / 255, colour / np.float32(127.5) - 1, colour / 255 - 0.5, colour * 1.0,
                  colour.astype(int), (colour / 255).astype("f2"), wide * 257,
                  (wide * 257).astype(">u2"), np.where(colour == 0, np.nan, colour / 255)):
        assert shows(dataset_of(tmp_path, array, "imgs"), [0, 1], colour)
    assert dataset_of(tmp_path, wide * 16).images([0, 1]).max() == 254      # a camera's 12 bits
    for array in (mask, mask.astype(np.uint8), mask * 1.0, mask * 2 - 1, mask * 255):
        for key in ("imgs", "images"):
            assert shows(dataset_of(tmp_path, array, key), [0, 1], mask * 255)


RAMP = np.add.outer(np.arange(64), np.arange(64) * 3).astype(np.uint8)
WIDE, CLEAR = RAMP.astype(np.uint16) * 257, np.where(RAMP > 99, 255, 0).astype(np.uint8)
COLOUR = np.stack([RAMP, RAMP.T, 255 - RAMP], -1)
TURNED = Image.Exif()
TURNED[274] = 6                             # the camera was held upright: turn it clockwise
ON_WHITE = np.where(CLEAR[..., None], COLOUR, 255)
PICTURES = [                                # ending, what is stored, what a viewer shows, options
    ("png", WIDE, RAMP, {}), ("tif", WIDE.astype(">u2"), RAMP, {}), ("pgm", WIDE, RAMP, {}),
    ("tif", WIDE.astype("i4"), RAMP, {}), ("tif", RAMP / np.float32(255), RAMP, {}),
    ("tif", RAMP.astype("f4"), RAMP, {}), ("png", CLEAR > 0, CLEAR, {}),
    ("png", WIDE // 4112 * 257, RAMP // 16, {}),                # what is dark stays dark
    ("png", RAMP, np.where(RAMP == 50, 255, RAMP), {"transparency": 50}),
    ("png", np.dstack([COLOUR, CLEAR]), ON_WHITE, {}),
    ("png", np.dstack([RAMP, CLEAR]), np.where(CLEAR, RAMP, 255), {}),
    ("gif", Image.fromarray(RAMP).convert("P"), np.where(RAMP == 50, 255, RAMP),
     {"transparency": 50, "save_all": True, "append_images": [Image.fromarray(CLEAR)]}),
    ("tif", Image.fromarray(COLOUR).convert("CMYK"), COLOUR, {}),
    *((ending, stored, np.rot90(seen, -1).copy(), {"exif": TURNED}) for ending, stored, seen in [
        ("png", COLOUR, COLOUR), ("tif", COLOUR, COLOUR), ("png", WIDE, RAMP)])]


def test_a_picture_is_what_a_viewer_shows(tmp_path):
    for k, (ending, stored, _, options) in enumerate(PICTURES):
        stored = stored if isinstance(stored, Image.Image) else Image.fromarray(stored)
        stored.save(tmp_path / f"{k:02}.{ending}", **options)
    dataset = data.open_dataset(tmp_path)
    for k, (ending, _, seen, _) in enumerate(PICTURES):
        assert shows(dataset, [k], seen.reshape(1, 64, 64, -1)), (k, ending)


def test_whole_and_cut_official_sets_keep_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "GRIDS", {24: ("MPI3D", ("a", "b"), (4, 6)),
                                        12: ("dSprites", ("shape", "scale"), (3, 4))})
    toy = dataset_of(tmp_path, noise(24))
    assert (toy.name, toy.factor_names, toy.factor_sizes) == ("MPI3D", ("a", "b"), (4, 6))
    assert toy.factors([0, 5, 6, 23]).tolist() == [[0, 0], [0, 5], [1, 0], [3, 5]]
    masks, n = TWELVE[..., :1] // 128, np.arange(12)
    classes = np.stack([n * 0, n // 4, n % 4], 1)
    sprites = dataset_of(tmp_path, masks[..., 0], "imgs", latents_classes=classes,
                         metadata=np.array({"pickled": 1}, object))
    assert (sprites.name, sprites.factor_names) == ("dSprites", ("shape", "scale"))
    assert shows(sprites, n, masks * 255) and sprites.note == ""
    assert (sprites.factors(n).numpy() == classes[:, 1:]).all()
    cut = dataset_of(tmp_path, noise(23))
    assert (len(cut), cut.factor_names) == (23, ()) and "no full set" in str(cut)
    rooms = np.stack([v[k] for v, k in zip(data.LEVELS, data.grid(data.SIZES)[:90].T)], 1)
    for key, labels, names in [
            ("labels", rooms, data.FACTORS[3:]), ("labels", np.float32(rooms), data.FACTORS[3:]),
            ("latents/classes", data.grid((1, 1, 1, 3, 6, 5)), ("orientation", "x", "y"))]:
        cut = dataset_of(tmp_path, noise(90, 8, 8), kind="h5", **{key: labels})
        where = labels.max(0) > labels.min(0)
        assert cut.factor_names == names[-where.sum():] and "(never varies)" in cut.note


def test_labels_of_any_kind_are_numbered(tmp_path):
    n, real = np.arange(12), np.random.default_rng(0).random(12)
    fields = np.array([*zip(n % 3 * 0.5, "xy" * 6)], [("hue", "f4"), ("kind", "S1")])
    for column, levels in [(n % 3 * 0.1 + 0.7, n % 3), (np.float16(n % 3 * 0.1), n % 3),
                           (np.array([0, 1, 1e7])[n % 3], n % 3), (n % 3 - 1, n % 3),
                           (n.reshape(12, 1, 1) % 2 == 1, n % 2), (np.eye(4)[n % 4], n % 4),
                           (np.array([*"bca"])[n % 3], (n % 3 + 1) % 3),
                           (np.array([b"y", b"x"])[n % 2], 1 - n % 2)]:
        dataset = dataset_of(tmp_path, TWELVE, labels=column)
        assert dataset.factor_sizes == (levels.max() + 1,) and dataset.note == ""
        assert (dataset.factors(n)[:, 0].numpy() == levels).all()
    table = np.stack([n % 3, real, np.where(n, n % 2, np.nan), n * 0 + 5, n // 6], 1)
    for names in ([*"abcde"], [b"a", b"b", b"c", b"d", b"e"]):
        dataset = dataset_of(tmp_path, TWELVE, labels=table, factor_names=np.array(names))
        assert (dataset.factor_names, dataset.factor_sizes) == (("a", "e"), (3, 2))
        assert all(f"{name} (" in dataset.note for name in "bcd") and dataset.note in str(dataset)
    for kind, arrays in [("npz", dict(labels=fields)), ("h5", dict(labels=fields)),
                         ("h5", {"labels/hue": n % 3, "labels/kind": [*"xy"] * 6})]:
        dataset = dataset_of(tmp_path, TWELVE, kind=kind, **arrays)
        assert (dataset.factor_names, dataset.factor_sizes) == (("hue", "kind"), (3, 2))
        assert (dataset.factors(n).numpy() == np.stack([n % 3, n % 2], 1)).all()
    for labels in (real, n[:5], np.array([{}] * 12), np.zeros((12, 2, 2)), np.array(7)):
        dataset = dataset_of(tmp_path, TWELVE, labels=labels)
        assert shows(dataset, n, TWELVE) and dataset.factors(n).shape == (12, 0) and dataset.note
    texts = dataset_of(tmp_path, TWELVE, labels=[[*"01"], [*"10"]] * 6)
    assert texts.factor_sizes == (2, 2) and (texts.factors([0, 1]) == torch.eye(2).flip(1)).all()
    dataset = dataset_of(tmp_path, TWELVE, labels=real, classes=n % 3,
                         factor_names=np.array(["pickled"], object))
    assert dataset.factor_names == ("factor 0",) and "factor_names not used" in dataset.note


def test_images_are_found_by_factors_and_sets_by_content(tmp_path):
    table = np.indices((4, 5)).reshape(2, -1).T[np.random.default_rng(0).permutation(20)[:17]]
    dataset, same = (dataset_of(tmp_path, noise(17), labels=table) for _ in range(2))
    assert (dataset.find(table[::-1]) == np.arange(17)[::-1]).all()
    missing = ({*np.ndindex(4, 5)} - {*map(tuple, table.tolist())}).pop()
    with pytest.raises(ValueError, match=re.escape(f"= {missing}")):
        dataset.find([table[0], missing])
    assert dataset.identity == same.identity == json.loads(json.dumps(same.identity))
    for images, labels in [(noise(17, seed=1), table), (noise(17), table[::-1])]:
        assert dataset_of(tmp_path, images, labels=labels).identity != same.identity


def mat5(compressed, **arrays):
    """A MATLAB level 5 file of uint8 arrays."""
    def element(kind, body):
        if 0 < len(body) <= 4:                                  # the small form: data in the tag
            return struct.pack("<I", len(body) << 16 | kind) + body.ljust(4, b"\0")
        return struct.pack("<II", kind, len(body)) + body + bytes(-len(body) % 8)

    out = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<HH", 0x0100, 0x4D49)
    for name, array in arrays.items():
        part = element(14, element(6, struct.pack("<II", 9, 0))
                       + element(5, np.array(array.shape, "<i4").tobytes())
                       + element(1, name.encode()) + element(2, array.tobytes(order="F")))
        if compressed:                                          # without padding, as MATLAB does
            part = zlib.compress(part)
            part = struct.pack("<II", 15, len(part)) + part
        out += part
    return out


@pytest.mark.parametrize("kind", ["compressed", "plain", "7.3"])
def test_cars3d_is_read_in_the_order_of_its_list(tmp_path, kind):
    cars = {"car_009_mesh": noise(96), "car_001_mesh": noise(96, seed=1)}
    for name, views in cars.items():
        im = views.reshape(4, 24, 64, 64, 3).transpose(2, 3, 4, 1, 0)   # -> (h, w, 3, 24, 4)
        content = stored("h5", im=im.T) if kind == "7.3" else mat5(
            kind == "compressed", mask_of_it=np.zeros((3, 1), np.uint8), im=im)
        (tmp_path / f"{name}.mat").write_bytes(content)
    (tmp_path / "list.txt").write_text("\n".join(cars))
    dataset = data.open_dataset(tmp_path)
    assert (dataset.name, len(dataset), dataset.factor_sizes) == ("Cars3D", 192, (4, 24, 2))
    assert shows(dataset, range(192), np.concatenate(list(cars.values())))
    elevation, azimuth, model = dataset.factors(range(192)).T
    assert (model * 96 + elevation * 24 + azimuth == torch.arange(192)).all()
    (tmp_path / "car_001_mesh.mat").unlink()                    # what is left is used
    dataset = data.open_dataset(tmp_path)
    assert dataset.factor_sizes == (4, 24) and shows(dataset, range(96), cars["car_009_mesh"])


@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_celeba_attributes_and_crop(tmp_path, kind):
    folder, faces = tmp_path / "img_align_celeba", noise(4, 218, 178)
    for k in range(4):                      # PNG inside, so that the crop can be compared exactly
        write(folder / f"{k + 1:06d}.jpg", faces[k] if k != 1 else b"damaged")
    names = [f"Attribute_{j}" for j in range(40)]
    values = np.where(noise(4, 40, 1, 1)[..., 0, 0] > 127, 1, -1)       # (4, 40)
    rows = [names, *([f"{k + 1:06d}.jpg", *map(str, values[k])] for k in range(4))]
    (tmp_path / f"list_attr_celeba.{kind}").write_text({
        "txt": "4\n" + "\n".join(map("  ".join, rows)),
        "csv": "image_id," + "\n".join(map(",".join, rows))}[kind])
    dataset = data.open_dataset(folder, size=128)
    assert (dataset.name, len(dataset), dataset.attribute_names) == ("CelebA", 3, tuple(names))
    assert dataset.factors([0, 1]).shape == (2, 0)
    assert (dataset.attributes([1, 0]).numpy() == (values[[2, 0]] > 0)).all()
    assert shows(dataset, range(3), faces[[0, 2, 3], 57:185, 25:153])
    half = Image.fromarray(faces[2, 57:185, 25:153]).resize((64, 64), Image.BILINEAR)
    assert shows(data.open_dataset(tmp_path), [1], np.asarray(half))
    # Copies as small PNG keep their attributes; other pictures near the list are just pictures.
    for name, attributes in [("000003.png", values[[2]] > 0), ("holiday.png", np.zeros((1, 0)))]:
        write(tmp_path / name[:7] / name, FOUR[0])
        dataset = data.open_dataset(tmp_path / name[:7])
        assert shows(dataset, [0], FOUR[:1])
        assert (dataset.attributes([0]).numpy() == attributes).all()
    assert "holiday.png" in dataset.note and dataset.attribute_names == ()


def test_which_files_of_a_folder_are_the_dataset(tmp_path, capsys):
    home = tmp_path / "home"
    for k, name in enumerate(
            ["a.png", "../away/z.png", ".ipynb_checkpoints/a.png", "._a.png", "__MACOSX/a.png",
             "runs/1/samples.png", "runs/1/config.json", "runs/1/lock", "b/c.JPE", "readme.txt"]):
        write(home / name, noise(1, 64, 80, seed=k)[0])         # wide: the middle is used
    for link, to in [("linked", "../away"), ("b/up", home), ("above", tmp_path), ("self", "self"),
                     ("nowhere.png", "gone")]:
        (home / link).symlink_to(to)
    write(home / "damaged.png", b"damaged")
    dataset = data.open_dataset(home, cache=home / "b")
    before = listing(tmp_path)
    data.open_dataset(home, cache=home / "b")
    assert listing(tmp_path) == before      # our cache in it changes nothing
    assert shows(dataset, range(3), np.concatenate(
        [noise(1, 64, 80, seed=k)[:, :, 8:72] for k in (0, 8, 1)])) and len(dataset) == 3
    for left in "hidden files or folders (3)", "runs (1)", "other files (3)", "damaged files (1)":
        assert left in dataset.note
    assert "damaged.png" in capsys.readouterr().out
    write(home / "a.png", b"damaged too")
    with pytest.raises(ValueError, match="2 of 3 files cannot be read, the last .*damaged.png"):
        data.open_dataset(home)


@pytest.mark.parametrize("name", ["\u65e5\u672c.npz", "closed pipe.npz"])
def test_neither_pipe_nor_name_stops_a_conversion(tmp_path, name):
    np.savez(tmp_path / name, images=FOUR)
    run = subprocess.Popen([sys.executable, HERE / "data.py", "--data", tmp_path / name], stdout=-1,
                           stderr=-1, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    if name == "closed pipe.npz":
        run.stdout.close()
    else:
        assert b"\\u65e5\\u672c.npz.64.cache.npy: 4 images, 0.0 GB" in run.stdout.read()
    assert run.stderr.read() == b"" and run.wait() == 0
    before = listing(tmp_path)
    assert shows(data.open_dataset(tmp_path / name), range(4), FOUR)
    assert listing(tmp_path) == before                          # it had been converted


def test_a_cache_is_renewed_but_replaces_no_other_file(tmp_path, capsys):
    path, other, link = (tmp_path / name for name in ("a.npz", "elsewhere", "link.npz"))
    np.savez(path, images=TWELVE)
    link.symlink_to(path)
    data.open_dataset(path, cache=other)
    before = listing(tmp_path)
    for name in (path, link):               # converted once, no leftovers
        assert shows(data.open_dataset(name, cache=other), range(12), TWELVE)
        assert listing(tmp_path) == before and len(before) == 5
    np.savez(path, images=FOUR)
    assert shows(data.open_dataset(path, cache=other), range(4), FOUR)
    assert "another version" in capsys.readouterr().out
    images, labels = sorted(other.iterdir())
    for cache in (images, labels):
        whole = cache.read_bytes()
        for content in (b"my diary", whole[:-1]):
            cache.write_bytes(content)
            with pytest.raises(ValueError, match="in the way"):
                data.open_dataset(path, cache=other)
            assert cache.read_bytes() == content
        cache.write_bytes(whole)
    labels.unlink()                         # as a process killed between its two renamings does
    assert shows(data.open_dataset(path, cache=other), range(4), FOUR)


@pytest.mark.parametrize("place", ["shutil.disk_usage", "np.savez", "os.replace"])
def test_a_full_disk_leaves_no_half_a_cache(tmp_path, monkeypatch, place):
    path = write(tmp_path / "a.npz", NPZ)
    before = listing(tmp_path)
    monkeypatch.setattr(f"data.{place}", mock.Mock(side_effect=OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full.*--cache DIR"):
        data.open_dataset(path)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("ending", [9, 15, 1])                  # SIGKILL, SIGTERM, SIGHUP
def test_a_killed_conversion_is_begun_anew(tmp_path, ending):
    path = write(tmp_path / "a.npz", NPZ)
    kill = f"""import numpy, os, runpy, sys
numpy.savez, sys.argv = lambda *a, **k: os.kill(os.getpid(), {ending}), ["", "--data", "a.npz"]
runpy.run_path({str(HERE / "data.py")!r}, run_name="__main__")"""
    run = subprocess.run([sys.executable, "-c", kill], cwd=tmp_path, capture_output=True)
    assert run.returncode == (-9 if ending == 9 else 2)
    assert not list(tmp_path.glob("*.cache.np?")) and (ending == 9 or len(listing(tmp_path)) == 1)
    assert shows(data.open_dataset(path), range(4), FOUR)


@pytest.mark.parametrize("command, files, words", [
    ("--size 63", {}, "expected 32, 64 or 128"),
    ("--shapes 7", {}, "unrecognized"),
    ("--data x --cache x", {"x": NPZ}, "cannot write x"),
    ("--data x", {}, "does not exist"),
    ("--data /dev/null", {}, "no complete HDF5"),
    ("--data x", {"x": NPZ[:5000]}, "no complete HDF5"),
    ("--data x", {"x": stored("h5", images=FOUR)[:5000]}, "expected a complete, closed file"),
    ("--data x", {"x": NPZ[:9000] + bytes(9) + NPZ[9009:]}, "expected a complete, closed file"),
    ("--data x", {"x": b"version https://git-lfs.github.com"}, "but b'version https://git-lfs."),
    ("--data x", {"x": stored("h5", **{"images/1": FOUR})}, "it holds images; expected"),
    ("--data x", {"x": stored(images=FOUR[0, :, :, 0])}, "images uint8 (64, 64); expected"),
    ("--data x", {"x": stored(train=FOUR, test=FOUR)}, "expected 'images', numbers of shape"),
    ("--data x", {"x/car_1_mesh.mat": b"x"}, "car_1_mesh.mat (no array im)"),
    ("--data x", {"x/readme.txt": b"hello"}, "holds no pictures"),
    ("--data x", {"x/a.png": FOUR[0], "x/config.json": b"", "x/lock": b""}, "folders of runs (1)"),
    ("--data x", {"x/a.png": b"damaged"}, "1 of 1 files cannot be read"),
])
def test_wrong_data_is_one_line_and_leaves_nothing(
        command, files, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        write(tmp_path / name, content)
    before = listing(tmp_path)
    monkeypatch.setattr("sys.argv", ["data.py", *command.split()])
    with pytest.raises(SystemExit) as stop:
        data.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error, error
    assert listing(tmp_path) == before


# ---- Samplers -----------------------------------------------------------------------------------


def sample_z0(predict_noise, limit, schedule, **options):
    """z_0 as EncDiff.sample finds it; predict_noise(z_t, abar_t) stands in for the U-Net."""
    model = tiny_model(schedule=schedule)
    model.largest_rms.fill_(limit)
    model.denoiser.forward = lambda z_t, t, tokens: predict_noise(z_t, model.alpha_bar[t[0]])
    model.decode = lambda z: z
    return model.sample(torch.zeros(2, 6, 8), **options)


@pytest.mark.parametrize("schedule", encdiff.SCHEDULES)
def test_samplers_find_z0_by_exact_noise_and_bear_inexact(schedule):
    """In float32, T included, where abar_T is as small as 2e-9 (cosine) or 2e-41 (sqrt)."""
    z0 = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    exact = lambda z_t, abar: (z_t - abar.sqrt() * z0) / (1 - abar).sqrt()
    for options in (dict(sampler="ddpm"), dict(sampler="dpm", steps=7),
                    dict(sampler="ddim", steps=7), dict(sampler="ddim", steps=7, eta=1.0)):
        found = sample_z0(exact, z0.abs().max(), schedule, **options)
        assert_close(found, z0, atol=2e-3, rtol=0, msg=str(options))
    tenth_wrong = lambda z_t, abar: 0.9 * z_t  # near T that is 1e3 times as wrong in z_0
    for sampler, steps in itertools.product(("ddim", "dpm"), (1, 3, 20)):
        z = sample_z0(tenth_wrong, 3.0, schedule, sampler=sampler, steps=steps)
        assert z.square().mean().sqrt() <= 3.01


def test_ddim_with_eta_1_and_all_steps_is_ddpm():
    alpha_bar = encdiff.cumulative(encdiff.beta_schedule("cosine", 40))
    predict = lambda z, t: torch.tanh(z) + t / 40  # any function: only the samplers are compared
    z, ends = torch.randn(4, 3, dtype=torch.float64), []
    for sampler, options in [(encdiff.ddpm, {}), (encdiff.ddim, dict(steps=40, eta=1.0))]:
        torch.manual_seed(1)
        ends.append(sampler(predict, alpha_bar, z, **options))
    assert_close(*ends)


@pytest.mark.parametrize("name, options, steps", [
    ("ddpm", {}, 30), ("ddim", dict(steps=7, eta=0.5), 7), ("dpm", dict(steps=7), 7)])
def test_samplers_start_at_T_and_end_without_noise(name, options, steps, monkeypatch):
    visited, draws, randn_like = [], [], torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda z: draws.append(len(visited)) or randn_like(z))
    alpha_bar = encdiff.cumulative(encdiff.beta_schedule("linear", 30))
    predict = lambda z, t: visited.append(t) or 0.5 * z
    encdiff.SAMPLERS[name](predict, alpha_bar, torch.randn(5), **options)
    assert visited[0] == 30 and visited[-1] >= 1 and len(visited) == steps
    assert visited == sorted(set(visited), reverse=True)
    assert draws == ([] if name == "dpm" else list(range(1, steps)))  # not after the last estimate


def test_dpm_solver_is_second_order_and_ddim_first():
    """z_0 ~ N(0, m): the best denoiser and the exact end of the deterministic path are known."""
    m, T = 0.5, 4096
    alpha_bar = torch.sigmoid(2 * torch.linspace(12, -4, T + 1, dtype=torch.float64))  # even lambda
    alpha_bar[0] = 1
    variance = alpha_bar * m + 1 - alpha_bar  # of z_t
    predict = lambda z, t: alpha_bar[t].sqrt() * m * z / variance[t]  # E[z_0 | z_t]
    z, exact = torch.ones(1, dtype=torch.float64), (m / variance[T]) ** 0.5
    error = lambda sampler, steps: (sampler(predict, alpha_bar, z, steps) - exact).abs().item()
    for (sampler, order), steps in itertools.product([(encdiff.ddim, 1), (encdiff.dpm_solver, 2)],
                                                     (64, 128)):
        gain = error(sampler, steps) / error(sampler, 2 * steps)
        assert math.log2(gain) == pytest.approx(order, abs=0.15)


# ---- sample.py ----------------------------------------------------------------------------------

IMAGES = 300
# Six tokens, two factors, and the order in which their rows come.
IMPORTANCE = np.array([[.0, .1], [.6, .0], [.0, .0], [.0, .8], [.4, .0], [.0, .1]])
ORDER = [1, 4, 3, 0, 2, 5]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs of a few steps on images of two factors, with scores as a long one would have."""
    folder = tmp_path_factory.mktemp("runs")
    factors = np.stack(np.unravel_index(np.arange(IMAGES) % 12, (3, 4)), 1)
    images = np.zeros((IMAGES, 32, 32, 3), np.uint8)
    images[:, :16, :, 0] = (factors[:, :1] * 100)[:, :, None]
    images[:, 16:, :, 1] = (factors[:, 1:] * 80)[:, :, None]
    np.savez(folder / "toy.npz", images=images, labels=factors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "score", lambda *a, **k: {"importance": IMPORTANCE.tolist()})
        patch.setattr(train, "pictures", lambda *a: None)
        patch.setitem(train.SMALL, "timesteps", 12)
        for name, variant in [("run", {}), ("adagn", {"conditioning": "adagn"}),
                              ("vector", {"tokens": "vector"}), ("direct", {"decoder": "direct"})]:
            options = dict(TINY, data=str(folder / "toy.npz"), size=32, **variant)
            train.main(["--preset", "small", "--out", str(folder / name), *flags(**options)])
    (folder / "direct" / "metrics.json").write_text('{"note": "no labels"}')
    return folder


def opened(run, *words):
    args = sample.parse(["swap", str(run), *words])
    return sample.Trained(args), args


def test_rows_are_one_a_factor_or_all_by_factor(finished):
    factors = ["factor 0", "factor 0", "factor 1", "none", "none", "none"]
    labels = {i: f"{factor}\ntoken {i}" for i, factor in zip(ORDER, factors)}
    for words, tokens in [("", [1, 3]), ("--tokens all", ORDER), ("--tokens 2 4", [4, 2])]:
        assert sample.token_rows(*opened(finished / "run", *words.split())) == (
            tokens, [labels[i] for i in tokens])
    rows = sample.token_rows(*opened(finished / "direct", "--tokens", "5", "2"))
    assert rows == ([2, 5], ["token 2", "token 5"])  # without scores: numbered, and all of them
    assert sample.token_rows(*opened(finished / "direct"))[0] == list(range(6))


@pytest.fixture
def drawn(monkeypatch):
    """The (codes, noise) that `Trained.draw` is asked for; nothing is sampled."""
    calls = []

    def draw(self, codes, noise):
        calls.append((codes, noise))
        return torch.zeros(len(codes), 3, self.config.size, self.config.size)

    monkeypatch.setattr(sample.Trained, "draw", draw)
    return calls


def every_code(run):
    trained, _ = opened(run)
    return trained.codes(trained.load(range(IMAGES)))


@pytest.mark.parametrize("run", ["run", "vector"])
def test_pictures_exchange_and_sweep_codes_of_the_data(finished, drawn, run):
    run = finished / run
    sample.main(["swap", str(run), *"--tokens all --count 2 --seed 5".split()])
    trained, _ = opened(run, "--seed", "5")
    source, target = (trained.codes(x) for x in trained.images(4).split(2))
    codes, noise = drawn.pop()
    assert len(codes) == 14 and torch.equal(codes[:2], source)
    for i, got in zip(ORDER, codes[2:].split(2)):
        others = [j for j in range(6) if j != i]
        assert torch.equal(got[:, i], target[:, i])
        assert torch.equal(got[:, others], source[:, others])
    assert torch.equal(noise, noise[:2].repeat(7, 1, 1, 1))

    sample.main(["traverse", str(run), "--count", "3", "--tokens", "4", "0"])
    seen = every_code(run)  # (IMAGES, 6) or (IMAGES, 6, 8)
    one_of = lambda rows, code: (rows - code).flatten(1).abs().amax(1).min() < 1e-5
    assert len(drawn) == 2
    for i, (codes, _) in zip([4, 0], drawn):  # its own codes, then three with one token swept
        assert all(torch.equal(codes[0, j], codes[2, j]) for j in range(6) if j != i)
        assert all(one_of(seen[:, i:i + 1], code) for code in codes[:, i])
        if seen.ndim == 2:
            _, low, middle, high = codes[:, i]
            assert seen[:, i].quantile(0.02) >= low < middle < high >= seen[:, i].quantile(0.98)

    sample.main(["generate", str(run), "--count", "16"])
    mixed = drawn[-1][0]
    assert all(one_of(seen[:, j:j + 1], mixed[b, j]) for b in range(16) for j in range(6))
    assert not all(one_of(seen, code) for code in mixed)  # combinations that are in no image


def test_the_gif_sweeps_each_token_up_and_down(finished, drawn):
    sample.main(["traverse", str(finished / "run"), "--gif", "--count", "3"])
    path = finished / "run" / "traverse.gif"
    with Image.open(path) as picture:
        assert picture.is_animated and picture.info["loop"] == 0
        assert picture.size[0] > 4 * 131 and path.stat().st_size < 2_000_000
    (codes, noise), _ = drawn
    assert len(codes) == 16 and torch.equal(noise, noise[:4].repeat(4, 1, 1, 1))
    assert torch.equal(codes[4:8, 1], codes[4:5, 1].expand(4))  # all four images at one value


def test_attention_is_drawn_at_its_place_and_averaged():
    attention = torch.zeros(1, 16, 2)
    attention[0, 1 * 4 + 3, 1] = 1.0  # row 1, column 3 of 4 x 4, second token
    maps = sample.attention_maps([[attention]], 64)
    row, column = divmod(maps[0, 1].argmax().item(), 64)
    assert maps[0, 0].max() == 0 and (row // 16, column // 16) == (1, 3)
    picture = sample.heat(torch.zeros(1, 3, 64, 64), maps[:, 1])[0]
    assert picture[:, 22, 60].sum() > picture[:, 50, 5].sum() + 1
    records = [[torch.full((1, P, 1), value) for value in values]  # two layers, two calls
               for P, values in [(16, (1., 2.)), (4, (3., 5.))]]
    assert torch.equal(sample.attention_maps(records, 8), torch.full((1, 1, 8, 8), 2.75))


@pytest.mark.parametrize("words, columns, rows, heading", [
    ("reconstruct {0}/run --count 9 --sampler ddim --steps 3", 8, 3, 0),
    ("reconstruct {0}/direct --count 3", 3, 3, 0),
    ("swap {0}/run --count 2 --sampler ddim --steps 2", 2, 5, 0),
    ("traverse {0}/vector --count 3 --steps 2", 5, 2, 1),
    ("attention {0}/direct --count 2 --tokens 0 2 4", 2, 4, 0),
    ("generate {0}/adagn --count 10 --steps 2", 8, 2, 0)])
def test_every_picture_has_its_rows_and_columns(finished, capsys, words, columns, rows, heading):
    words = words.format(finished).split()
    sample.main(words)
    picture = Image.open(f"{words[1]}/{words[0]}.png")
    assert picture.height == rows * 131 + (28 if heading else 3)  # 32 pixels four times, a gap of 3
    assert columns * 131 < picture.width < columns * 131 + 200
    if words[0] == "reconstruct":
        table = re.findall(r"^(first stage|sample) +(\S+) +(\S+)$",
                           capsys.readouterr().out, re.M)
        assert len(table) == rows - 1
        assert all(-1 <= float(ssim) <= 1 and 0 < float(mse) < 4 for _, ssim, mse in table)


def test_kl_prints_the_bottleneck_of_all_schedules(capsys, tmp_path):
    sample.main(["kl", "--out", str(tmp_path / "kl.png")])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[:5]]
    for name, *nats in rows[1:]:
        exact = encdiff.kl_bottleneck(encdiff.beta_schedule(name))[np.array(rows[0][1:], int) - 1]
        np.testing.assert_allclose(np.array(nats, float), exact, rtol=1e-3)


def test_worth_is_a_factors_share_of_the_latent_at_each_noise(tmp_path, capsys):
    rows = np.array([4, 0, 5, 2, 1, 3])  # the set is in no order
    dataset = types.SimpleNamespace(
        name="toy", factor_names=("a", "b"), factor_sizes=(2, 3),
        factors=lambda indices: torch.from_numpy(np.stack(np.divmod(rows[indices], 3), 1)),
        find=lambda factors: np.argsort(rows)[factors[:, 0] * 3 + factors[:, 1]])
    model = tiny_model(timesteps=100)
    scale = lambda t: [x.sqrt()[:, None, None, None] for x in (model.alpha_bar[t],
                                                               1 - model.alpha_bar[t])]
    # The latent is the first factor alone, and the denoiser is exact.
    model.latents = model.tokens = lambda codes: codes
    model.denoiser.forward = lambda z_t, t, codes: (z_t - scale(t)[0] * codes) / scale(t)[1]
    run = types.SimpleNamespace(
        dataset=dataset, config=train.Config(timesteps=100), model=model, device="cpu",
        load=lambda found: torch.from_numpy(rows[found] // 3 * 2.0 - 1)[:, None, None, None].float()
        .expand(-1, 1, 4, 4), folder=tmp_path, codes=lambda images: images,
        some=torch.arange, noise=lambda count: torch.randn(count, 1, 4, 4))
    sample.worth(run, argparse.Namespace(count=6, out=None, verb="worth"))
    t, a, b = (line[14:].split() for line in capsys.readouterr().out.splitlines()[:3])
    abar = model.alpha_bar[[int(time_step) for time_step in t]]
    np.testing.assert_allclose(np.array(a, float), 4 * abar / (1 - abar), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.array(b, float), 0, atol=1e-4)


def test_curves_and_importance_have_their_size(finished, tmp_path):
    sample.main(["curves", str(finished / "run"), str(finished / "adagn")])
    assert Image.open(finished / "run" / "curves.png").size == (1520, 720)
    sample.main(["importance", str(finished / "run"), "--out", str(tmp_path / "i.png")])
    pixels = np.asarray(Image.open(tmp_path / "i.png")).astype(int)
    for colour in sample.PALETTE[:2]:
        # The area of a square is its importance: here 1.0 of either factor in all, and 0.1 twice.
        assert (pixels == colour).all(-1).sum() == pytest.approx(128**2, rel=0.05)


def test_argument_groups_runs_by_what_differs(finished, monkeypatch, tmp_path, capsys):
    folders = []
    for name, variant, reached in [("a", {}, .8), ("b", {"seed": 1}, .6), ("c", {"steps": 5}, .2)]:
        folders.append(tmp_path / name)
        shutil.copytree(finished / "run", folders[-1])
        saved = json.loads((folders[-1] / "config.json").read_text())
        (folders[-1] / "config.json").write_text(json.dumps({**saved, **variant}))
        (folders[-1] / "metrics.json").write_text(json.dumps({"disentanglement": reached}))
    monkeypatch.chdir(tmp_path)
    sample.main(["argument", *map(str, folders)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:3]]
    assert [row[1:5] for row in rows] == [["2", "0.700", "0.600", "0.800"], ["1"] + ["0.200"] * 3]
    assert float(rows[0][0]) > float(rows[1][0]) and "--steps 5" in " ".join(rows[1])
    assert Path("argument.png").exists()


@pytest.mark.parametrize("logarithmic, ys", [(False, (0, 1, 2)), (True, (1, 10, 100)),
                                             (True, (-1, 0, 1))])  # no logarithm of these
def test_what_is_straight_on_its_axes_is_plotted_straight(logarithmic, ys):
    series = {"name": list(zip((0, 1, 2), ys))}
    pixels = np.asarray(sample.plot("", "", series, logarithmic=logarithmic))[:, :800]  # no legend
    y, x = (abs(pixels - np.array(sample.PALETTE[0])).max(-1) < 40).nonzero()
    assert np.ptp(x) > 500 and np.corrcoef(x, y)[0, 1] < -0.999


def test_complexity_counts_parameters_and_passes(finished, capsys):
    run = finished / "run"
    sample.main(["complexity", str(run), "--steps", "3"])
    words = capsys.readouterr().out.split()
    count = sum(p.numel() for p in train.load_run(run)[0].denoiser.parameters())
    assert words[words.index("denoiser") + 1] == f"{count:,}"
    assert words[words.index("passes") - 1] == "3"


def test_encode_writes_what_metrics_reads(finished, capsys):
    sample.main(["encode", str(finished / "run")])
    with np.load(finished / "run" / "codes.npz") as arrays, np.load(finished / "toy.npz") as toy:
        assert np.array_equal(arrays["indices"], np.arange(IMAGES))
        assert np.array_equal(arrays["factors"], toy["labels"])
        expected = every_code(finished / "run").numpy()
        np.testing.assert_allclose(arrays["codes"], expected, atol=1e-5)
    metrics.main([str(finished / "run" / "codes.npz"), "--train", "200", "--test", "100"])
    assert "disentanglement" in capsys.readouterr().out
    np.savez(finished / "others.npz", images=np.zeros((3, 40, 30, 3), np.uint8))
    words = ["--data", str(finished / "others.npz"), "--out", str(finished / "other codes.npz")]
    sample.main(["encode", str(finished / "vector"), *words])
    with np.load(finished / "other codes.npz") as arrays:
        assert arrays["codes"].shape == (3, 6, 8) and "factors" not in arrays


def test_an_exported_file_is_used_like_its_run(finished, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    sample.main(["export", str(finished / "run"), "small.pt"])
    monkeypatch.setattr(sample, "SHIPPED", tmp_path / "small.pt")
    sample.main(["swap", "--count", "2", "--steps", "3"])
    assert "no RUN given" in capsys.readouterr().out
    words = ["--count", "2", "--steps", "3", "--out", "of_run.png"]
    sample.main(["swap", str(finished / "run"), *words])
    mine, theirs = (np.asarray(Image.open(name)).astype(int) for name in ("swap.png", "of_run.png"))
    assert mine.shape == theirs.shape and abs(mine - theirs).max() <= 2  # half precision
    (half, config, about), (whole, whole_config, of_run) = map(
        train.load_run, ("small.pt", finished / "run"))
    assert config == whole_config and about["scores"] == of_run["scores"]
    for (name, a), b in zip(half.state_dict().items(), whole.state_dict().values()):
        assert a.dtype == b.dtype, name
        assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def serve(finished):
    """serve(run) -> (its Trained, ask), where ask(path, fields, **headers) -> (status, text)."""
    servers, queue = [], Queue()

    def keep(server, poll_interval=0.1, forever=http.server.HTTPServer.serve_forever):
        queue.put(server)
        forever(server, poll_interval)

    def start(run):
        words = ["explore", str(finished / run), "--no-browser", "--seed", "3"]
        threading.Thread(target=sample.main, args=(words,), daemon=True).start()
        servers.append(queue.get(timeout=60))
        trained = servers[-1].explorer.run
        for parameter in trained.model.denoiser.parameters():  # else it hardly reads its tokens
            parameter.add_(0.1 * torch.randn(parameter.shape))

        def ask(path, fields=None, **headers):
            query = "?" + urllib.parse.urlencode(fields) if fields else ""
            address = f"http://127.0.0.1:{servers[-1].server_port}{path}{query}"
            request = urllib.request.Request(address, headers=headers)
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    return reply.status, reply.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()

        return trained, ask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http.server.ThreadingHTTPServer, "serve_forever", keep)
        yield start
    for server in servers:
        server.shutdown()


GOOD = {"source": 7, "target": 2, "noise": 1, "steps": 3, "tokens": "s,s,s,s,s,s"}


@pytest.mark.parametrize("run", ["run", "vector", "direct", "adagn"])
def test_the_page_draws_what_its_sliders_say(serve, run):
    trained, ask = serve(run)
    status, page = ask("/")
    setup = json.loads(re.search(r"const setup = (.*), \$ = ", page)[1])
    assert status == 200 and not re.search(r"(src|href)=.?(http|//)", page)
    order = [token["i"] for token in setup["tokens"]]
    assert sorted(order) == list(range(6)) if run == "direct" else order == ORDER
    drawn = lambda tokens: json.loads(ask("/draw", {**GOOD, "tokens": tokens})[1])
    own, places = drawn("s,s,s,s,s,s"), drawn("s,s,s,s,s,s")["places"][0]
    moved = f"{places[0] + 300},s,s,s,s,s"
    code = trained.codes(trained.load([7, 2]))
    z = torch.randn(1, *trained.model.latent_shape, generator=torch.Generator().manual_seed(1))
    half = torch.cat([code[1:, :3], code[:1, 3:]], 1)
    for codes, tokens in [(code[:1], "s,s,s,s,s,s"), (half, "t,t,t,s,s,s"),
                          (code[:1], ",".join(map(str, places)))]:
        png = base64.b64decode(drawn(tokens)["images"][2].partition(",")[2])
        image = trained.draw(codes, z, steps=3)[0]
        assert_close(torch.from_numpy(np.array(Image.open(io.BytesIO(png)))),
                     train.to_bytes(image).permute(1, 2, 0), rtol=0, atol=1)
    with ThreadPoolExecutor(4) as pool:  # requests of others at the same time change nothing
        answers = list(pool.map(lambda tokens: drawn(tokens)["images"][2],
                                ["s,s,s,s,s,s", moved] * 4))
    assert set(answers[::2]) == {own["images"][2]} and len(set(answers[1::2])) == 1
    assert answers[1] != answers[0] and len(own["maps"]) == (0 if run == "adagn" else 6)


def test_the_page_refuses_strangers_and_nonsense(serve):
    _, ask = serve("run")
    for name, value in [("Host", "evil.example"), ("Origin", "http://evil.example"),
                        ("Origin", "null"), ("Origin", "http://127.0.0.1:1")]:
        assert ask("/draw", GOOD, **{name: value})[0] == 403 == ask("/", **{name: value})[0]
    for wrong in [{"source": -1}, {"source": IMAGES}, {"target": "x"}, {"noise": 2**70},
                  {"steps": 0}, {"steps": 10**6}, {"tokens": "s,t"}, {"tokens": "nan" + ",s" * 5},
                  {"tokens": "1e30" + ",s" * 5}, {"tokens": "u" + ",s" * 5}]:
        assert ask("/draw", {**GOOD, **wrong})[0] == 400, wrong
    assert ask("/draw")[0] == 400 and ask("/../train.py")[0] == 404
    assert ask("/draw", GOOD)[0] == 200  # the server lives


@pytest.fixture(scope="module")
def broken(finished):
    """Beside the good runs, one with a first stage alone and one with two damaged files."""
    good = torch.load(finished / "run" / "checkpoint.pt", weights_only=True)
    moved = {**good, "config": {**good["config"], "data": "/no/such.npz"}}
    for name, content in [("unfinished", {**good, "stage": "first stage"}), ("damaged", good),
                          ("moved", moved)]:
        (finished / name).mkdir()
        torch.save(content, finished / name / "checkpoint.pt")
    (finished / "damaged" / "metrics.json").write_text("{")
    (finished / "damaged" / "log.csv").write_text("a,b\n1,2\n")
    factors = np.stack(np.unravel_index(np.arange(11), (3, 4)), 1)  # all but (2, 3)
    for name, labels in [("plain", {}), ("holes", {"labels": factors})]:
        np.savez(finished / f"{name}.npz", images=np.zeros((11, 32, 32, 3), np.uint8), **labels)
        data.open_dataset(finished / f"{name}.npz", 32)
    return finished


@pytest.mark.parametrize("words, said", [
    ("curves", "required: RUN"),
    ("swap {0}/moved --count 1", "say where it is with --data"),
    ("swap {0}/run --tokens none", "--tokens: invalid token value: 'none'"),
    ("importance {0}/direct", "has no importance matrix (no labels)"),
    ("explore {0}/run --port 70000", "--port 70000 cannot be used"),
    ("swap {0}/nothing", "not found; expected a folder written by train.py"),
    ("swap {0}/unfinished", "has not finished its first stage"),
    ("swap {0}/damaged", "metrics.json is damaged"),
    ("swap {0}/run --tokens 1 6", "--tokens is 6; expected 0 to 5"),
    ("swap {0}/run --count 151", "302 images are needed; expected at most 300"),
    ("swap {0}/run --count 0", "--count is 0; expected at least 1"),
    ("swap {0}/run --steps 1 --count 1 --out {0}/run", "cannot write"),
    ("attention {0}/adagn --count 1 --steps 1", "no cross-attention"),
    ("worth {0}/run --data {0}/plain.npz --count 2", "whose images are labelled with factors"),
    ("worth {0}/run --data {0}/holes.npz --count 11", "no image has"),
    ("curves {0}/nothing", "log.csv is not there"),
    ("curves {0}/damaged", "no log of this version")])
def test_what_is_wrong_is_said_in_one_line_and_nothing_written(broken, words, said):
    files = lambda: {path: path.stat().st_mtime_ns for path in broken.rglob("*")}
    before = files()
    refused(lambda: sample.main(words.format(broken).split()), said)
    assert files() == before


# ---- The documents ------------------------------------------------------------------------------

README = (HERE / "README.md").read_text()


def test_every_module_opens_with_the_same_six_parts():
    parts = ["WHERE", "PAPER", "SHAPES", "IDEA", "DIFFERS", "TRY"]
    for path in HERE.glob("*.py"):
        words = re.findall(r"^[A-Z]+(?= )", path.read_text().split('"""')[1], re.M)
        assert [word for word in words if word in parts] == parts, path.name


def test_every_command_of_the_documents_has_its_flags(monkeypatch):
    monkeypatch.setattr(train, "load_checkpoint", lambda folder: {"config": train.Config()})
    parsers = {"train.py": train.parse, "sample.py": sample.parse}
    headers = [path.read_text().split('"""')[1] for path in HERE.glob("*.py")]
    commands = re.findall(r"^(?:TRY)? *python (\w+\.py)((?: \S+)*)", "\n".join([README, *headers]),
                          re.M)
    assert set(parsers) <= {script for script, _ in commands}
    for script, words in commands:
        assert (HERE / script).is_file(), script
        parsers.get(script, list)(words.split())  # ValueError where a flag is unknown


def test_readmes_equations_are_where_its_table_says():
    rows = re.findall(r"^\| \((\d+)\) \|.*\| `?(\w+)\.py`?,? `(\w+)` \|$", README, re.M)
    assert len(rows) >= 5
    for number, module, name in rows:
        source = (HERE / f"{module}.py").read_text()
        function = re.search(rf"def {name}\(.*?(\n *(def|class) |\Z)", source, re.S)[0]
        assert f"Eq. ({number})" in function, name


def test_files_to_be_copied_import_nothing_of_ours():
    ours = {path.stem for path in HERE.glob("*.py")}
    for name in ("data", "vq", "unet", "metrics", "encdiff"):
        source = (HERE / f"{name}.py").read_text()
        assert not ours & set(re.findall(r"^(?:import|from) (\w+)", source, re.M)), name


def test_readmes_snippets_print_what_it_says(monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(train, "ENCODER_WIDTH", 64)
    for snippet in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(snippet, {})
        assert capsys.readouterr().out == "".join(re.findall(r"^# (.*\n)", snippet, re.M)), snippet

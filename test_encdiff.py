"""What we are sure of: each test is one claim about the method, or about what happens to a user.

WHERE     Read last, or beside the file in question: the sections follow the modules.
PAPER     arXiv 2402.09712; the tests with eq_ in their names hold its equations.
SHAPES    as in encdiff.py; models and runs have the size TINY, their images 32 x 32 pixels.
IDEA      Code that is compared with itself cannot fail. So each test has another way to the same
          number: a closed form, a loop, torch's own operation, a file built by hand, a second run.
DIFFERS   Nothing here shows that the method disentangles: that takes a real run (README, Results).
TRY       python -m pytest -q                ->   every claim, in a few minutes
          python -m pytest -q -k eq_         ->   the equations alone, in seconds
          SLOW=1 python -m pytest -k killed  ->   a run killed twenty times, in minutes
"""
import contextlib
import csv
import functools
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from unittest import mock

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pytest import approx
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import data
import encdiff
import metrics
import sample
import train
import unet
import vq

HERE, NORMAL = Path(__file__).parent, Normal(0.0, 1.0)
# A shell's background job begins with Ctrl-C ignored, nohup with a closed terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Sizes and constants with which a training step takes milliseconds.
vq.KINDS["tiny"] = functools.partial(vq.VQAutoencoder, channels=32, multipliers=(1,), blocks=1,
                                     latent_channels=3, patch=4, codebook_size=64)
train.FIRST_STAGE["tiny"] = dict(batch=8, lr=1e-3, squared=0.0, encoder_steps=0)
train.LOG_EVERY, train.ENCODER_WIDTH, train.SMALL["timesteps"] = 4, 8, 20
TINY = dict(size=32, first_stage="tiny", encoder="cnn_bn", num_tokens=6, token_dim=8, channels=16,
            multipliers=(1, 2), blocks=1, dropout=0.1, vq_steps=12, steps=12, batch=8,
            optimizer="muon", score_every=0, precision="fp32")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test works in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def few_steps(model, images):
    """Open the zero-initialised layers, so that everything is connected."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(4):
        optimizer.zero_grad()
        model.loss(images).backward()
        optimizer.step()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def count_of(module):
    return sum(p.numel() for p in module.parameters())


def all_combinations(*sizes):
    return np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), axis=1)


# ---- The method, its first stage, its variants --------------------------------------------------


def test_the_denoiser_has_the_papers_size_and_torchs_attention():
    assert count_of(unet.UNet(token_dim=16)) == 37_469_635
    block = unet.SpatialTransformer(32, heads=4, token_width=12)
    cross, within = block.cross_attention, block.self_attention
    x, tokens = torch.randn(2, 1100, 32), torch.randn(2, 5, 12)  # so many positions go in slices
    with unet.record_attention(block) as maps:
        cross(x, tokens)
    for layer, context, out in [(within, x, within(x)), (cross, tokens, cross(x, tokens))]:
        q, k, v = (linear(y).view(2, -1, 4, 8).transpose(1, 2) for linear, y in
                   [(layer.to_q, x), (layer.to_k, context), (layer.to_v, context)])
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # (2, P, 4, 8)
        assert_close(out, layer.to_out(mixed.reshape(x.shape)))
    assert_close(maps, [[(q @ k.mT / 8**0.5).softmax(-1).mean(1)]])  # one layer, the call in `with`


def test_each_token_is_of_its_scalar_and_their_order_is_nothing():
    model, t = tiny_model().eval(), torch.tensor([1, 10, 500, 1000])
    few_steps(model, some_images())
    z, tokens, codes = torch.randn(4, *model.latent_shape), torch.randn(4, 6, 8), torch.randn(4, 6)
    out = model.denoiser(z, t, tokens)
    assert_close(model.denoiser(z, t, tokens.flip(1)), out)
    assert (model.denoiser(z, t, tokens + 1) - out).abs().max() > 1e-4
    with pytest.raises(TypeError):
        model.denoiser(z, t)  # forgotten tokens do not pass unnoticed
    for i in range(6):  # an MLP of its own
        x = codes[:, i:i + 1]
        for layer, (w, b) in enumerate(zip(model.token_map.weights, model.token_map.biases)):
            x = F.linear(F.elu(x) if layer else x, w[i].t(), b[i, 0])
        assert_close(model.tokens(codes)[:, i], x)


@pytest.mark.parametrize("name, largest", [  # largest: of 1/sqrt(abar_t), at t = T
    ("cosine", 20_291), ("linear", 38.67), ("sqrt_linear", 71.69), ("sqrt", 2.196e20)])
def test_each_schedule_is_a_line_of_its_kind(name, largest):
    betas = encdiff.beta_schedule(name)
    abar = encdiff.cumulative(betas)
    assert abar[0] == 1 and abar[1] > 0.95 and abar[-1]**-0.5 == approx(largest, rel=1e-3)
    line = {"linear": betas.sqrt(), "sqrt_linear": betas, "sqrt": betas.square(),
            "cosine": (abar[1:-1].sqrt() * math.cos(0.004 / 1.008 * math.pi)).acos()}[name]
    assert line.diff(n=2).abs().max() < 1e-9  # cosine: its last beta is clipped


def test_eq_4_is_a_product_of_gaussians_and_eq_5_its_kl():
    betas, t = encdiff.beta_schedule("cosine", 100), torch.tensor([[2], [50], [100]])
    beta, abar = betas[t - 1], encdiff.cumulative(betas)
    now, before, bottleneck = abar[t], abar[t - 1], encdiff.kl_bottleneck
    # The KL is quadratic in z_0 and eps: over these four pairs its mean is exact.
    z0, noise = torch.cartesian_prod(torch.tensor([1.0, 5]), torch.tensor([-1.0, 1])).double().T
    z_t = now.sqrt() * z0 + (1 - now).sqrt() * noise  # eq. (2)
    precision = (1 - beta) / beta + 1 / (1 - before)  # of q(z_t | z_{t-1}) and q(z_{t-1} | z_0)
    mean = ((1 - beta).sqrt() / beta * z_t + before.sqrt() / (1 - before) * z0) / precision
    a, b, v = encdiff.posterior(abar, t)
    assert_close([a * z0 + b * z_t, v], [mean, 1 / precision])
    kl = kl_divergence(Normal(mean, precision**-0.5), NORMAL).mean(1)
    assert_close(bottleneck(betas, second_moment=(1 + 25) / 2)[[1, 49, 99]], kl)
    # Figure 2b: all fall with t; cosine is the highest but for its last betas.
    curves = torch.stack([bottleneck(encdiff.beta_schedule(name)) for name in encdiff.SCHEDULES])
    assert (curves[:, 1:-1].diff() < 1e-9).all()
    assert (curves[:, :842].diff(dim=0) <= 0).all() and (curves[0, 985:] < curves[1:, 985:]).all()


def test_eq_3_is_the_mean_squared_error_of_the_noise():
    model, images = tiny_model(dropout=0.0).eval(), some_images()
    few_steps(model, images)
    t, noise = torch.tensor([1, 2, 600, 1000]), torch.randn(4, *model.latent_shape)
    abar = encdiff.cumulative(encdiff.beta_schedule("cosine"))[t].float().view(4, 1, 1, 1)
    z_t = abar.sqrt() * model.latents(images) + (1 - abar).sqrt() * noise
    predicted = model.denoiser(z_t, t, model.tokens(model.represent(images)))
    assert_close(model.loss(images, t, noise), (predicted - noise).pow(2).mean())


@pytest.mark.parametrize("schedule", encdiff.SCHEDULES)
def test_samplers_find_z0_by_exact_noise_and_bear_inexact(schedule):
    model, tokens, visited = tiny_model(schedule=schedule), torch.zeros(2, 6, 8), []
    z0 = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model.largest_rms.fill_(3.0)
    model.decode = lambda z: z

    def exact(z_t, t, tokens):  # in float32, where abar_T can be 2e-9 (cosine), 2e-41 (sqrt)
        visited.append(t[0].item())
        abar = model.alpha_bar[t[0]]
        return (z_t - abar.sqrt() * z0) / (1 - abar).sqrt()
    model.denoiser.forward = exact
    for count, options in [(1000, dict(sampler="ddpm")), (7, {}), (7, dict(sampler="ddim")),
                           (7, dict(sampler="ddim", eta=1.0))]:
        visited.clear()
        assert_close(model.sample(tokens, 7, **options), z0, atol=2e-3, rtol=0, msg=str(options))
        assert visited[0] == 1000 and len(visited) == count and max(np.diff([*visited, 0])) < 0
    model.denoiser.forward = lambda z_t, *_: 0.9 * z_t  # near T that is 1e3 times as wrong in z_0
    for sampler, steps in itertools.product(("ddim", "dpm"), (1, 3, 20)):
        assert model.sample(tokens, steps, sampler).square().mean().sqrt() <= 3.01


def test_ddim_is_ddpm_at_eta_1_dpm_solver_of_second_order():
    alpha_bar, z = encdiff.cumulative(encdiff.beta_schedule("cosine", 40)), torch.randn(9).double()
    predict = lambda z, t: torch.tanh(z) + t / 40  # any function: only the samplers are compared
    torch.manual_seed(1)
    end = encdiff.ddpm(predict, alpha_bar, z)
    torch.manual_seed(1)
    assert_close(encdiff.ddim(predict, alpha_bar, z, steps=40, eta=1.0), end)
    # z_0 ~ N(0, m): the best denoiser and the exact end of the deterministic path are known.
    m, T, z = 0.5, 4096, torch.ones(1).double()
    alpha_bar = torch.sigmoid(2 * torch.linspace(12, -4, T + 1, dtype=torch.float64))  # even lambda
    alpha_bar[0] = 1
    variance = alpha_bar * m + 1 - alpha_bar  # of z_t
    predict = lambda z, t: alpha_bar[t].sqrt() * m * z / variance[t]  # E[z_0 | z_t]
    for sampler, order in [(encdiff.ddim, 1), (encdiff.dpm_solver, 2)]:
        ends = torch.cat([sampler(predict, alpha_bar, z, steps) for steps in (64, 128, 256)])
        fall = (ends - (m / variance[T]).sqrt()).abs().log2().diff()
        assert fall.tolist() == approx([-order, -order], abs=0.15)


def test_quantiser_rounds_and_passes_the_gradient_through():
    torch.manual_seed(0)
    quantizer = vq.Quantizer(50, 3, commitment=0.25, warmup=2)
    z, book = torch.randn(2, 3, 4, 4, requires_grad=True), quantizer.codebook
    assert all(torch.equal(quantizer(z)[0], z) for _ in range(2))  # not yet rounded
    z_q, loss, indices = quantizer(z)  # has set the codebook by itself
    nearest = (z.permute(0, 2, 3, 1)[..., None, :] - book).pow(2).sum(-1).argmin(-1)  # (2, 4, 4)
    assert torch.equal(indices, nearest) and len(nearest.unique()) > 10
    entries = book[nearest].permute(0, 3, 1, 2)
    apart = (entries - z).pow(2).mean()
    assert_close([z_q, loss], [entries, 1.25 * apart])  # loss: both terms
    assert (torch.autograd.grad(3 * z_q.sum(), z, retain_graph=True)[0] == 3).all()
    of_book, of_z = torch.autograd.grad(apart, [book, z], retain_graph=True)
    assert_close(torch.autograd.grad(loss, [book, z]), (of_book, 0.25 * of_z))


def test_latents_have_unit_std_and_decoding_rounds_them():
    model, images = tiny_model(), some_images()
    first = model.first_stage
    z = first.encode(images)
    first.quantizer.initialise(z)
    decoded = first.decode(z)
    assert_close(decoded, first.decode(first.quantize(z)[0]))
    model.measure_latents(images)
    assert_close(model.latents(images), z / z.std())  # not rounded
    assert_close(model.decode(model.latents(images)), decoded.clamp(-1, 1))
    assert_close(model.largest_rms, (z / z.std()).square().mean((1, 2, 3)).sqrt().max())
    few_steps(model.train(), images)  # the first stage is frozen
    assert not first.training and torch.equal(first.decode(first.encode(images)), decoded)
    linear, (x, y) = vq.KINDS["linear"](), images[:2].split(1)
    assert_close(linear.encode((x + y) / 2), (linear.encode(x) + linear.encode(y)) / 2)


@pytest.mark.parametrize("variant", [
    dict(), dict(encoder="cnn"), dict(encoder="transformer"), dict(conditioning="adagn"),
    dict(self_attention=False, skip_dropout=0.3, encoder="cnn_patch"), dict(decoder="direct"),
    dict(tokens="vector"), dict(tokens="vector", conditioning="adagn"),
    dict(tokens="vector", decoder="direct"), dict(regularizer="euler"), dict(regularizer="sparse"),
    dict(regularizer="orthogonal")], ids=str)
def test_every_variant_learns_in_all_its_parameters(variant):
    model, images = tiny_model(**variant).train(), some_images()
    model.measure_latents(images)
    few_steps(model, images)
    assert [name for name, p in model.named_parameters()
            if p.requires_grad and (p.grad is None or not p.grad.any())] == []
    again = tiny_model(**variant)
    again.load_state_dict(model.state_dict())
    codes = again.eval().represent(images)
    assert codes.isfinite().all() and torch.equal(codes, model.eval().represent(images))
    assert model.sample(model.tokens(codes)).shape == images.shape


@pytest.mark.parametrize("switch", [{}, dict(attention=False), dict(noise="none"),
                                    dict(noise="strong-first", factors=4)], ids=str)
def test_the_toy_learns_and_shows_who_moves(switch, capsys):
    torch.manual_seed(0)
    encdiff.toy(steps=80, **switch)
    losses = [float(x) for x in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    corner = lambda images: images[:, :1, 0, 0]  # a single code, which sees the wall alone
    assert [row[-1] for row in encdiff.who_moves(corner, 4)] == list("@   ")


def test_the_three_parts_of_a_vaes_kl_are_counted_in_bits():
    bits = torch.tensor([[1, 1, 1], [1, -1, 1], [-1, 1, -1], [-1, -1, -1]])  # the last is the first
    q = Normal(9 * bits.double(), 0.5)  # of four images, far apart
    z = q.sample()
    kl = (q.log_prob(z) - NORMAL.log_prob(z)).sum().item() / 4
    parts = torch.stack(encdiff.kl_terms(z, q.mean, q.variance.log()))
    assert parts.tolist() == approx([math.log(4), math.log(2), kl - math.log(8)])


@pytest.mark.parametrize("name", encdiff.VAE_WEIGHTS)
def test_eq_6_and_the_losses_of_the_other_vaes(name):
    model, images = tiny_model(model="vae", vae_loss=name), some_images()
    noise, x, weight = torch.randn(4, 6, 1, 1), (images + 1) / 2, encdiff.VAE_WEIGHTS[name]
    mean, log_var = model.encoder(images).chunk(2, 1)
    q = Normal(mean, log_var.exp().sqrt())
    z = mean + q.stddev * noise.view(4, 6)
    p, kl = (model.decode(z) + 1) / 2, kl_divergence(q, NORMAL).sum() / 4
    error = -(x * p.log() + (1 - x) * (1 - p).log()).sum() / 4
    for step, capacity in [(1, 25 / 6), (6, 25.0), (12, 25.0)]:  # C rises in half of the 12 steps
        more = {"beta": weight * kl, "annealed": weight * abs(kl - capacity),
                "tc": kl + (weight - 1) * encdiff.kl_terms(z, mean, log_var)[1]}[name]
        model.step.fill_(step - 1)
        assert_close(model.loss(images, None, noise), (error + more) / (3 * 32 * 32))


def test_pixels_are_rearranged_and_noise_follows_from_v():
    model, x, t = tiny_model(first_stage="pixels"), some_images(), torch.tensor([1, 2, 600, 1000])
    z0, abar = model.latents(x), model.alpha_bar[t].view(4, 1, 1, 1)
    assert torch.equal(z0[:, :64, 2, 1].reshape(4, 8, 8), x[:, 0, 16:24, 8:16])
    assert torch.equal(model.decode(z0), x)
    noise = torch.randn_like(z0)
    model.denoiser.network.forward = lambda *_: abar.sqrt() * noise - (1 - abar).sqrt() * z0  # v
    assert model.loss(x, t, noise) < 1e-10


# ---- The scores ---------------------------------------------------------------------------------


GREY, PERFECT = torch.full((1, 3, 8, 8), 0.5), all_combinations(4, 3).repeat(60, axis=0)
NOISY = np.append(PERFECT, np.random.default_rng(0).normal(size=(720, 1)), axis=1)
RARE, OBJECTS = PERFECT.copy(), np.arange(720)[:, None] // 5 % 12  # 60 rows each: none has a vote
RARE[0, 1] = 9


def test_the_worked_example_is_what_was_found_by_hand(capsys):
    metrics.main([])
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    for line in lines:
        by_hand = [eval(number) for number in line[74:].split()]  # 1/3, say
        assert list(map(float, line[30:74].split())) == approx(by_hand, abs=6e-4), line


def test_trees_agree_with_scikit_learn_and_see_only_order():
    rng = np.random.default_rng(0)
    a, b, c = factors = np.stack([rng.integers(0, k, 600) for k in (5, 2, 3)])
    noise = rng.normal(size=(600, 5)).T
    codes = np.stack([a + 0.3 * noise[0], b + 0.5 * noise[1], b - c + 0.2 * noise[2], -c * 1.0,
                      np.round(noise[4])], axis=1)  # blurred, two-sided, mixed, a copy, unrelated
    # scikit-learn 1.9.1, GradientBoostingClassifier(random_state=0): feature_importances_ by factor
    importance = np.array([[.9758, .0098, .0071, .0035, .0039], [.0009, .5304, .3358, .1329, 0],
                           [0, 0, 0, 1, 0]])
    other = [3, 0, 4, 2, 1]
    codes = np.exp(codes[:, other])  # neither the codes' order nor a rising function matters
    scores = metrics.dci(codes[:400], factors.T[:400], codes[400:], factors.T[400:])
    assert scores["importance"] == approx(importance.T[other], abs=0.01)
    assert scores["informativeness_test"] == approx(0.9667, abs=0.01)


@pytest.mark.parametrize("codes, factors, d, c, mig", [
    (PERFECT > 0, PERFECT > 0, 1, 1, 1), (0 * PERFECT, PERFECT, 0, 0, 0),  # a code each; no codes
    (PERFECT, PERFECT[:, [0, 0, 1, 1]], 1 - math.log(2) / math.log(4), 1, 1),  # factors in pairs
    # Two equal codes a factor: D does not mind, C loses log 2 / log N; ties are shared.
    (PERFECT[:, [0, 0, 1, 1]], PERFECT, 1, 1 - math.log(2) / math.log(4), 0)])
def test_dci_and_mig_of_codes_for_which_they_are_known(codes, factors, d, c, mig):
    scores = metrics.dci(codes, factors, codes, factors)
    assert (scores["disentanglement"], scores["completeness"]) == (approx(d), approx(c, abs=0.02))
    assert metrics.mig(codes, factors) == approx(mig)
    assert metrics.focus(np.array([[3.0, 3.0], [0.0, 2.0]])) == approx(2 / 8)  # rows by their share


def test_mig_of_a_wrong_bit_and_of_vectors_along_their_lines():
    bit, wrong, rest = all_combinations(2, 4, 2).T
    codes = np.stack([bit ^ (wrong == 0), rest], axis=1)  # wrong in a quarter of the cases
    assert metrics.mig(codes, bit[:, None]) == approx(1 + np.log2(1 / 4) / 4 + np.log2(3 / 4) * 3/4)
    axes = np.array([[1.0, 2, -3], [4, 0, 3]])  # its largest entry is made positive
    vectors = codes[:, :, None] * axes + 7
    flat = (codes - codes.mean(0)) * [-14**0.5, 5]
    assert metrics.scalar_codes(vectors[:9], fit_on=vectors) == approx(flat[:9])


def test_factor_vae_score_is_the_share_of_votes_that_go_home():
    def represent(factors):
        a, b, c, d = factors.double().T
        return torch.stack([a, 10 * (b + c), 1e-9 * d], dim=1)  # d is seen by a dead code only
    table = torch.from_numpy(all_combinations(4, 3, 3, 2).repeat(10, axis=0))  # images are factors
    Images = type("Images", (list,), dict(images=table.__getitem__, factors=table.__getitem__))
    found = metrics.factor_vae_score(represent, Images(table), pool=700)
    assert (found["score"], found["active_dims"]) == (approx(1 / 2, abs=0.03), 2)  # a, and b or c
    noise = np.random.default_rng(0).normal(size=(720, 6))  # for which fresh votes are needed
    ignorant = metrics.factor_vae_votes(noise, table, 2000, 1000)
    assert ignorant["train_score"] > ignorant["score"] == approx(1 / 4, abs=0.06)


def test_tad_is_what_was_counted_by_hand():
    a, b, c = all_combinations(2, 2, 2).T
    yes = np.stack([a, b, c, c * (a == b), a**0], axis=1)  # the fourth tells 0.3 bits of c
    result = metrics.tad(np.stack([-3 * a, a + b, c], axis=1), 2 * yes - 1)  # ties count half
    assert [row[:3] for row in result["auroc"]] == [[1, .5, .5], [.875, .875, .5], [.5, .5, 1]]
    assert (result["counted"], result["captured"], result["tad"]) == ([0, 1], 2, 1 / 8 + 3 / 8)


def test_ssim_and_mse_equal_their_definitions():
    x, y = torch.rand(2, 2, 3, 13, 12, generator=torch.Generator().manual_seed(0)).double()
    y[0], y[1] = x[0], 0.6 * x[1] + 0.4 * y[1]
    bell = Normal(0, 1.5).log_prob(torch.arange(-5.0, 6)).exp().double()
    w, local = torch.outer(bell, bell).flatten() / bell.sum()**2, []
    windows = [F.unfold(image[1][:, None], 11, padding=5).mT.flatten(0, 1) for image in (x, y)]
    for pair in torch.stack(windows, 1):  # (2, 121), of one pixel
        (m, n), ((v, cov), (_, u)) = pair @ w, pair.cov(correction=0, aweights=w)
        local.append((2*m*n + 1e-4) * (2*cov + 9e-4) / ((m*m + n*n + 1e-4) * (v + u + 9e-4)))
    assert metrics.ssim(x, y).tolist() == approx([1, np.mean(local)])
    assert metrics.mse(x, y).tolist() == approx([0, (x[1] - y[1]).square().mean()])


def test_lpips_agrees_with_the_lpips_package():
    # lpips 0.1.4, net="alex", with these weights and images, normalize=True.
    def wave(step, scale, *shape):
        t = torch.arange(math.prod(shape), dtype=torch.float64)
        return (torch.sin(t * step) * scale).float().view(shape)
    weights, layers = {}, [(0, 64, 3, 11), (3, 192, 64, 5), (6, 384, 192, 3), (8, 256, 384, 3),
                           (10, 256, 256, 3)]
    for k, (index, c_out, c_in, side) in enumerate(layers):
        scale, shape = (2 / (c_in * side**2))**0.5, (c_out, c_in, side, side)
        weights |= {f"features.{index}.weight": wave(0.7 + 0.26 * k, scale, *shape),
                    f"features.{index}.bias": wave(0.83 + 0.26 * k, 2**0.5, c_out),
                    f"lin{k}.model.1.weight": wave(1.1 + k, (2 / c_out)**0.5, 1, c_out, 1, 1).abs()}
    torch.save(weights, "both.pth")
    weights = metrics.load_lpips("both.pth", "both.pth")
    x, y = (wave(step, 0.5, 2, 3, 64, 64) + 0.5 for step in (0.37, 0.011))
    assert metrics.lpips(x, y, weights).tolist() == approx([0.00214165, 0.00212837], rel=1e-3)
    assert metrics.lpips(x, x, weights).tolist() == [0, 0]


def test_the_frechet_distance_equals_its_definition():
    a, mix = np.split(np.random.default_rng(0).normal(size=(504, 4)), [500])
    c = a @ mix + 2  # the covariances do not commute
    A, C, gap = np.cov(a.T), np.cov(c.T), (a - c).mean(0)
    roots = np.linalg.eigvals(A @ C).real**0.5
    assert metrics.frechet_distance(a, c) == approx(gap @ gap + np.trace(A + C) - 2 * roots.sum())

    @torch.jit.script
    def network(images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return images[:, :2].float().mean((2, 3))
    network.save("net.pt")
    images = torch.randint(0, 200, (70, 3, 4, 4), dtype=torch.uint8)
    assert metrics.fid(images, images + 50, "net.pt") == approx(2 * 50**2, rel=1e-4)


def test_the_table_of_scores_from_python_and_the_command_line(capsys):
    codes = NOISY + np.random.default_rng(1).normal(size=(720, 3))
    scores = metrics.evaluate(torch.from_numpy(codes), torch.from_numpy(PERFECT), 3, 300, 200)
    assert scores == json.loads(json.dumps(scores)) and np.shape(scores["importance"]) == (3, 2)
    assert scores["informativeness_train"] > 0.95 and scores["informativeness_test"] < 0.6
    np.savez("codes.npz", codes=codes, factors=PERFECT)
    metrics.main("codes.npz --train 300 --test 200 --seed 3".split())
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed[-1] == ["2", *(f"{x:.2f}" for x in scores["importance"][2])]
    assert all([name, str(round(scores[name], 4))] in printed for name in ("mig", "samples"))
    np.savez("names.npz", z=codes), np.savez("objects.npz", codes=np.array([{}]), factors=PERFECT)
    np.save("array.npy", codes), Path("cut.npz").write_bytes(Path("codes.npz").read_bytes()[:300])
    for name in ("names.npz", "objects.npz", "array.npy", "cut.npz", "absent.npz"):
        refused(lambda: metrics.main([name]), f"metrics.py: {name}")


@pytest.mark.parametrize("codes, factors, missing, reason", [
    (NOISY, RARE, "", "leave out rare values of factor 1"),
    (np.append(NOISY, OBJECTS, 1), np.append(PERFECT, OBJECTS, 1), "", "votes leave out factor 2"),
    (NOISY, np.insert(PERFECT, 1, 7, axis=1), "", "DCI leaves out factor 1, which has one value"),
    (NOISY[:, :1], PERFECT[:, :1], "factor_vae disentanglement completeness mig", "two codes"),
    (NOISY, PERFECT * 0, "factor_vae disentanglement completeness informativeness_test mig", "DCI"),
    (NOISY / 100, PERFECT, "factor_vae", "no active code: the largest std is 0.01")])
def test_each_score_that_can_be_given_is_given(codes, factors, missing, reason):
    scores = metrics.evaluate(codes, factors)  # all are 1, but for one noisy code
    assert (scores["dci_train"], scores["dci_test"]) == (480, 240)  # of 10,000 + 5,000
    assert reason in scores["note"]
    for name in ("factor_vae", "disentanglement", "completeness", "informativeness_test", "mig"):
        assert scores.get(name) == (None if name in missing else approx(1, abs=0.08)), name


@pytest.mark.parametrize("name, arguments, message", [
    ("evaluate", (NOISY * np.nan, PERFECT), r"codes\[0, 0\] is nan.*drop"),
    ("evaluate", (NOISY[:, :0], PERFECT), r"codes has shape \(720, 0\)"),
    ("evaluate", (NOISY, PERFECT.astype(str)), "factors has dtype <U.*number the values"),
    ("evaluate", (NOISY[:710], PERFECT), r"factors has shape \(720, 2\).*710 rows"),
    ("evaluate", (NOISY, PERFECT / 2), r"factors\[60, 1\] is 0.5.*integers"),
    ("dci", (NOISY, PERFECT * 0, NOISY, PERFECT), "varies"), ("mse", (GREY, GREY[0]), "one shape"),
    ("tad", (NOISY, PERFECT * 2), "values"), ("frechet_distance", (NOISY[:1], NOISY), "feats_a"),
    ("ssim", (-GREY, GREY), r"from -0.5 to 0.5; .*\[0, 1\]"), ("fid", (GREY, GREY, ""), "uint8"),
    ("load_lpips", (HERE / "README.md", "alex.pth"), "README.md has no .*, a git-lfs pointer")])
def test_what_cannot_be_scored_is_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(metrics, name)(*arguments)


# ---- Datasets -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rendered():
    return data.open_dataset()


def listing(folder="."):
    paths = sorted(Path(folder).rglob("*"))
    return [(path, path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths]


def noise(n, h=64, w=64, c=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, c), np.uint8)


def shows(dataset, indices, array):
    """Whether these are the dataset's images; array is (n, h, w, c)."""
    return (dataset.images(indices).permute(0, 2, 3, 1).numpy() == array).all()


def stored(kind="npz", **arrays):
    """The bytes of a file with these arrays."""
    buffer = io.BytesIO()
    if kind == "npz":
        np.savez_compressed(buffer, **arrays)
    else:
        with h5py.File(buffer, "w") as f:
            for key, array in arrays.items():
                f.create_dataset(key, data=array, compression="gzip")
    return buffer.getvalue()


FOUR, TWELVE, N = noise(4), noise(12), np.arange(12)
NPZ = stored(images=FOUR)


def write(path, content):
    """A file of these bytes or this text, or a picture, in a folder that may be new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        return Image.fromarray(content).save(path, "PNG")
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def dataset_of(images, key="images", kind="npz", **arrays):
    """The dataset of a new file with these arrays."""
    path = f"{len(os.listdir())}.{kind}"
    write(path, stored(kind, **{key: images}, **arrays))
    return data.open_dataset(path)


@pytest.mark.parametrize("shape", range(4))
def test_intersections_agree_with_walking_along_the_rays(shape):
    scale, (eye, rays) = data.LEVELS[3][1], data.camera_rays(data.LEVELS[5][11], 64)  # small: a lid
    r, h, o = data.RADIUS[shape] * scale, data.TALL[shape] * scale, eye[:, None]

    def distance(p):  # to the object's surface, or less
        side, above = np.hypot(p[0], p[2]), abs(p[1] - h / 2) - h / 2
        return {data.CUBE: np.maximum(np.maximum(abs(p[0]), abs(p[2])) - r, above),
                data.CYLINDER: np.maximum(side - r, above),
                }.get(shape, np.hypot(side, p[1] - np.clip(p[1], r, h - r)) - r)

    def walk(o, d):  # sphere tracing to the object
        t = np.full(o.shape[1] if o.shape[1] > 1 else d.shape[1], 1e-3)
        for _ in range(400):
            t += np.maximum(distance(o + t * d), 0)
        return np.where(distance(o + t * d) < 1e-4, t, np.inf)

    part, t_room, _, p = room = data.room_light(eye, rays)
    with np.errstate(all="ignore"):
        planes = data.light_planes(shape, scale, eye, rays, room)
        formula, walked = data.meet_object(shape, scale, o, rays), walk(o, rays)
        thing, shadow = walked < t_room, walk(p, data.SUN[:, None]) < np.inf
    both = (formula < np.inf) & thing
    assert np.abs(formula[both] - walked[both]).max() < 1e-3 and both.mean() > 0.02
    place = o + formula[both] * rays[:, both]  # the normal is where the distance rises
    slope = [(distance(place + step) - distance(place - step)) / 2e-5
             for step in 1e-5 * np.eye(3)[:, :, None]]
    normal = data.object_normal(shape, scale, place)
    assert np.isclose(slope, normal, atol=1e-3).all(0).mean() > 0.97  # edges have none
    assert ((planes[2] > 0) == thing).mean() > 0.999  # rays that graze may disagree
    shadow &= (part == 1) & ~thing
    assert ((planes[0] == data.SHADOW) == shadow).mean() > 0.995 and shadow.mean() > 0.003


def test_an_index_is_its_factors_and_a_hue_its_own_surface(rendered):
    rows, places = np.arange(480000), [48000, 4800, 480, 60, 15, 1]  # the official order
    f = rendered.factors(rows).numpy()
    assert (f @ places == rows).all() and (rendered.find(f[::4801]) == rows[::4801]).all()
    assert rendered.factor_sizes == (10, 10, 10, 8, 4, 15) == tuple(f.max(0) + 1)
    index = np.random.default_rng(0).integers(480000, size=40)
    for j in range(3):
        other = index + ((f[index, j] + 3) % 10 - f[index, j]) * places[j]
        changed = (rendered.images(index) != rendered.images(other)).any(1).reshape(40, -1).numpy()
        surface = rendered.planes[index % 480, j] != 0
        assert not (changed & ~surface).any() and (changed & surface).sum() > 0.9 * surface.sum()
    # Orientation -30 (number 0) shows the dark right wall, +30 (number 14) the dark left one.
    left, right = rendered.planes[[0, 14], 1].reshape(2, 64, 64)[:, 28, [2, 61]].T
    assert left[0] > 1.2 * right[0] and right[1] > 1.2 * left[1]
    assert (rendered.images(index)[:, :, 0, 0] == torch.tensor(data.SKY)).all()
    planes = rendered.planes.astype(int)  # nothing is so bright that int16 would wrap around
    assert (5 * planes[:, :3].sum(1) + planes[:, 3:].max(1)).max() < 32767


def test_the_official_file_is_read_even_in_part(rendered):
    index = np.sort(np.random.default_rng(0).choice(480000, 600, replace=False))
    factors, order = rendered.factors(index), np.random.default_rng(1).permutation(600)
    labels = factors.numpy() * [0.1, 0.1, 0.1, 0.5 / 7, 1, 60 / 14] + [0, 0, 0, 0.75, 0, -30]
    read = dataset_of(rendered.images(index).permute(0, 2, 3, 1), kind="h5", labels=labels)
    assert (read.factor_names, read.factor_sizes) == (data.FACTORS, data.SIZES) and not read.note
    assert torch.equal(read.factors(order), factors[order])
    assert torch.equal(read.images(order), rendered.images(index[order]))


def test_any_layout_and_name_give_the_same_images(monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 64 * 64 * 3 * 4)  # several blocks, the last one short
    grey, labels = TWELVE[..., :1], np.stack([N % 5 * 10, N // 5], 1)
    for name, array, expected in [
            ("images", grey[..., 0], grey), ("X", grey, grey), ("arr_0", TWELVE, TWELVE),
            ("imgs", np.asfortranarray(TWELVE), TWELVE),
            ("data", np.ascontiguousarray(TWELVE.transpose(0, 3, 1, 2)), TWELVE),
            ("image", np.pad(TWELVE, ((0, 0),) * 3 + ((0, 1),), constant_values=255), TWELVE)]:
        for dataset in (dataset_of(array, name, kind, factors=labels) for kind in ("h5", "npz")):
            assert shows(dataset, [9, 0, 4], expected[[9, 0, 4]]) and dataset.factor_sizes == (5, 3)
            assert torch.equal(dataset.factors([7]), torch.tensor([[2, 1]]))


def test_the_values_decide_what_is_black_and_white():
    colour = noise(2)
    wide, mask = colour.astype(np.uint16), colour[..., :1] > 127
    for array in (colour / 255, colour / np.float32(127.5) - 1, colour / 255 - 0.5, colour * 1.0,
                  colour.astype(int), (colour / 255).astype("f2"), wide * 257,
                  (wide * 257).astype(">u2"), np.where(colour == 0, np.nan, colour / 255)):
        assert shows(dataset_of(array, "imgs"), [0, 1], colour)
    assert dataset_of(wide * 16).images([0, 1]).max() == 254  # a camera's 12 bits
    for array in (mask, mask.astype(np.uint8), mask * 1.0, mask * 2 - 1, mask * 255):
        assert all(shows(dataset_of(array, key), [0, 1], mask * 255) for key in ("imgs", "images"))


RAMP = np.add.outer(np.arange(64), np.arange(64) * 3).astype(np.uint8)
WIDE, CLEAR = RAMP.astype(np.uint16) * 257, np.where(RAMP > 99, 255, 0).astype(np.uint8)
COLOUR, HOLE = np.stack([RAMP, RAMP.T, 255 - RAMP], -1), np.where(RAMP == 50, 255, RAMP)
TURNED, FRAMES = Image.Exif(), dict(save_all=True, append_images=[Image.fromarray(CLEAR)])
TURNED[274] = 6  # the camera was held upright: turn it clockwise
PICTURES = [  # ending, what is stored, what a viewer shows, options
    ("png", WIDE, RAMP, {}), ("tif", WIDE.astype(">u2"), RAMP, {}), ("pgm", WIDE, RAMP, {}),
    ("tif", WIDE.astype("i4"), RAMP, {}), ("tif", RAMP / np.float32(255), RAMP, {}),
    ("tif", RAMP.astype("f4"), RAMP, {}), ("png", CLEAR > 0, CLEAR, {}),
    ("png", WIDE // 4112 * 257, RAMP // 16, {}),  # what is dark stays dark
    ("png", RAMP, HOLE, dict(transparency=50)),
    ("png", np.dstack([COLOUR, CLEAR]), np.where(CLEAR[..., None], COLOUR, 255), {}),
    ("png", np.dstack([RAMP, CLEAR]), np.where(CLEAR, RAMP, 255), {}),
    ("gif", Image.fromarray(RAMP).convert("P"), HOLE, dict(transparency=50, **FRAMES)),
    ("tif", Image.fromarray(COLOUR).convert("CMYK"), COLOUR, {}),
    *((ending, shown, np.rot90(seen, -1), dict(exif=TURNED)) for ending, shown, seen in
      [("png", COLOUR, COLOUR), ("tif", COLOUR, COLOUR), ("png", WIDE, RAMP)])]


def test_a_picture_is_what_a_viewer_shows(folder):
    for k, (ending, content, _, options) in enumerate(PICTURES):
        picture = content if isinstance(content, Image.Image) else Image.fromarray(content)
        picture.save(f"{k:02}.{ending}", **options)
    dataset = data.open_dataset(folder)
    for k, (ending, _, seen, _) in enumerate(PICTURES):
        assert shows(dataset, [k], seen.reshape(1, 64, 64, -1)), (k, ending)


def test_whole_and_cut_official_sets_keep_their_names(monkeypatch):
    monkeypatch.setattr(data, "GRIDS", {24: ("MPI3D", ("a", "b"), (4, 6)),
                                        12: ("dSprites", ("shape", "scale"), (3, 4))})
    toy, cut = dataset_of(noise(24)), dataset_of(noise(23))
    assert (toy.name, toy.factor_names, toy.factor_sizes) == ("MPI3D", ("a", "b"), (4, 6))
    assert toy.factors([0, 5, 6, 23]).tolist() == [[0, 0], [0, 5], [1, 0], [3, 5]]
    assert (len(cut), cut.factor_names) == (23, ()) and "no full set" in str(cut)
    masks, classes = TWELVE[..., :1] // 128, np.stack([N * 0, N // 4, N % 4], 1)
    sprites = dataset_of(masks[..., 0], "imgs", latents_classes=classes,
                         metadata=np.array({"pickled": 1}, object))
    assert (sprites.name, sprites.factor_names) == ("dSprites", ("shape", "scale"))
    assert shows(sprites, N, masks * 255) and sprites.note == ""
    assert (sprites.factors(N).numpy() == classes[:, 1:]).all()
    rooms = np.stack([v[k] for v, k in zip(data.LEVELS, all_combinations(*data.SIZES)[:90].T)], 1)
    for key, labels, names in [
            ("labels", rooms, data.FACTORS[3:]), ("labels", np.float32(rooms), data.FACTORS[3:]),
            ("latents/classes", all_combinations(1, 1, 1, 3, 6, 5), ("orientation", "x", "y"))]:
        cut = dataset_of(noise(90, 8, 8), kind="h5", **{key: labels})
        assert cut.factor_names == names and "(never varies)" in cut.note


@pytest.mark.parametrize("column, levels", [
    (N % 3 * 0.1 + N * 1e-13, N % 3), (np.float16(N % 3 * 0.1), N % 3), (N % 3 - 1, N % 3),
    (np.array([0, 1, 1e7])[N % 3], N % 3), (N.reshape(12, 1, 1) % 2 == 1, N % 2),
    (np.eye(4)[N % 4], N % 4), (np.array([*"bca"])[N % 3], (N % 3 + 1) % 3),
    (np.array([b"y", b"x"])[N % 2], 1 - N % 2)])
def test_labels_of_any_kind_are_numbered(column, levels):
    dataset = dataset_of(TWELVE, labels=column)
    assert dataset.factor_sizes == (levels.max() + 1,) and dataset.note == ""
    assert (dataset.factors(N)[:, 0].numpy() == levels).all()


def test_factors_have_their_names_and_what_is_none_is_said():
    real, n = np.random.default_rng(0).random(12), (3, 2)
    table = np.stack([N % 3, real, np.where(N, N % 2, np.nan), N * 0 + 5, N // 6], 1)
    for names in ([*"abcde"], [b"a", b"b", b"c", b"d", b"e"]):
        dataset = dataset_of(TWELVE, labels=table, factor_names=np.array(names))
        assert (dataset.factor_names, dataset.factor_sizes) == (("a", "e"), n)
        assert all(f"{name} (" in dataset.note for name in "bcd") and dataset.note in str(dataset)
    fields = np.array([*zip(N % 3 * 0.5, "xy" * 6)], [("hue", "f4"), ("kind", "S1")])
    for kind, arrays in [("npz", dict(labels=fields)), ("h5", dict(labels=fields)),
                         ("h5", {"labels/hue": N % 3, "labels/kind": [*"xy"] * 6})]:
        dataset = dataset_of(TWELVE, kind=kind, **arrays)
        assert (dataset.factor_names, dataset.factor_sizes) == (("hue", "kind"), n)
        assert (dataset.factors(N).numpy() == np.stack([N % 3, N % 2], 1)).all()
    for labels in (real, N[:5], np.array([{}] * 12), np.zeros((12, 2, 2)), np.array(7)):
        dataset = dataset_of(TWELVE, labels=labels)
        assert shows(dataset, N, TWELVE) and dataset.factors(N).shape == (12, 0) and dataset.note
    texts = dataset_of(TWELVE, labels=[[*"01"], [*"10"]] * 6)
    assert texts.factors([0, 1]).tolist() == [[0, 1], [1, 0]]
    unnamed = dataset_of(TWELVE, labels=real, classes=N % 3, factor_names=np.array(["x"], object))
    assert unnamed.factor_names == ("factor 0",) and "factor_names not used" in unnamed.note


def test_images_are_found_by_factors_and_sets_by_content():
    table = all_combinations(4, 5)[np.random.default_rng(0).permutation(20)[:17]]
    dataset, same = (dataset_of(noise(17), labels=table) for _ in range(2))
    assert (dataset.find(table[::-1]) == np.arange(17)[::-1]).all()
    missing = ({*np.ndindex(4, 5)} - {*map(tuple, table.tolist())}).pop()
    with pytest.raises(ValueError, match=re.escape(f"= {missing}")):
        dataset.find([table[0], missing])
    assert dataset.identity == same.identity == json.loads(json.dumps(same.identity))
    for images, labels in [(noise(17, seed=1), table), (noise(17), table[::-1])]:
        assert dataset_of(images, labels=labels).identity != same.identity


def mat5(compressed, **arrays):
    """A MATLAB level 5 file of uint8 arrays."""
    def element(kind, body):
        if 0 < len(body) <= 4:  # the small form: data in the tag
            return struct.pack("<I", len(body) << 16 | kind) + body.ljust(4, b"\0")
        padding = b"" if kind == 15 else bytes(-len(body) % 8)  # compressed: none, as of MATLAB
        return struct.pack("<II", kind, len(body)) + body + padding

    out = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<HH", 0x0100, 0x4D49)
    for name, array in arrays.items():
        shape = np.array(array.shape, "<i4").tobytes()
        part = element(14, element(6, struct.pack("<II", 9, 0)) + element(5, shape)
                       + element(1, name.encode()) + element(2, array.tobytes(order="F")))
        out += element(15, zlib.compress(part)) if compressed else part
    return out


@pytest.mark.parametrize("kind", ["compressed", "plain", "7.3"])
def test_cars3d_is_read_in_the_order_of_its_list(folder, kind):
    cars = {"car_009_mesh": noise(96), "car_001_mesh": noise(96, seed=1)}
    for name, views in cars.items():
        im = views.reshape(4, 24, 64, 64, 3).transpose(2, 3, 4, 1, 0)  # -> (h, w, 3, 24, 4)
        write(f"{name}.mat", stored("h5", im=im.T) if kind == "7.3" else mat5(
            kind == "compressed", mask_of_it=np.zeros((3, 1), np.uint8), im=im))
    write("list.txt", "\n".join(cars))
    dataset = data.open_dataset(folder)
    assert (dataset.name, len(dataset), dataset.factor_sizes) == ("Cars3D", 192, (4, 24, 2))
    assert shows(dataset, range(192), np.concatenate(list(cars.values())))
    elevation, azimuth, model = dataset.factors(range(192)).T
    assert (model * 96 + elevation * 24 + azimuth == torch.arange(192)).all()
    Path("car_001_mesh.mat").unlink()  # what is left is used
    dataset = data.open_dataset(folder)
    assert dataset.factor_sizes == (4, 24) and shows(dataset, range(96), cars["car_009_mesh"])


@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_celeba_attributes_and_crop(folder, kind):
    faces, names = noise(4, 218, 178), tuple(f"Attribute_{j}" for j in range(40))
    values = np.where(noise(4, 40, 1, 1)[..., 0, 0] > 127, 1, -1)  # (4, 40)
    for k in range(4):  # PNG inside, so that the crop can be compared exactly
        write(f"img_align_celeba/{k + 1:06d}.jpg", faces[k] if k != 1 else b"damaged")
    rows = [names, *([f"{k + 1:06d}.jpg", *map(str, values[k])] for k in range(4))]
    head, mark = {"txt": ("4\n", "  "), "csv": ("image_id,", ",")}[kind]
    write(f"list_attr_celeba.{kind}", head + "\n".join(map(mark.join, rows)))
    dataset = data.open_dataset("img_align_celeba", size=128)
    assert (dataset.name, len(dataset), dataset.attribute_names) == ("CelebA", 3, names)
    assert dataset.factors([0, 1]).shape == (2, 0)
    assert (dataset.attributes([1, 0]).numpy() == (values[[2, 0]] > 0)).all()
    assert shows(dataset, range(3), faces[[0, 2, 3], 57:185, 25:153])
    half = Image.fromarray(faces[2, 57:185, 25:153]).resize((64, 64), Image.BILINEAR)
    assert shows(data.open_dataset(folder), [1], np.asarray(half))
    # Copies as small PNG keep their attributes; other pictures near the list are just pictures.
    for name, attributes in [("000003.png", values[[2]] > 0), ("holiday.png", np.zeros((1, 0)))]:
        write(f"{name[:7]}/{name}", FOUR[0])
        dataset = data.open_dataset(name[:7])
        assert shows(dataset, [0], FOUR[:1]) and np.array_equal(dataset.attributes([0]), attributes)
    assert "holiday.png" in dataset.note and dataset.attribute_names == ()


def test_which_files_of_a_folder_are_the_dataset(folder, capsys):
    for k, name in enumerate(
            ["a.png", "../away/z.png", ".ipynb_checkpoints/a.png", "._a.png", "__MACOSX/a.png",
             "runs/1/samples.png", "runs/1/config.json", "runs/1/lock", "b/c.JPE", "readme.txt"]):
        write(f"home/{name}", noise(1, 64, 80, seed=k)[0])  # wide: the middle is used
    for link, to in [("linked", "../away"), ("b/up", folder / "home"), ("above", folder),
                     ("self", "self"), ("nowhere.png", "gone")]:
        Path("home", link).symlink_to(to)
    write("home/damaged.png", b"damaged")
    dataset = data.open_dataset("home", cache="home/b")
    before = listing()
    data.open_dataset("home", cache="home/b")
    assert listing() == before  # our cache in it changes nothing
    assert len(dataset) == 3 and shows(dataset, range(3), np.concatenate(
        [noise(1, 64, 80, seed=k)[:, :, 8:72] for k in (0, 8, 1)]))
    for left in "hidden files or folders (3)", "runs (1)", "other files (3)", "damaged files (1)":
        assert left in dataset.note
    assert "damaged.png" in capsys.readouterr().out
    write("home/a.png", b"damaged too")
    with pytest.raises(ValueError, match="2 of 3 files cannot be read, the last .*damaged.png"):
        data.open_dataset("home")


def test_a_cache_is_renewed_but_replaces_no_other_file(capsys):
    np.savez("a.npz", images=TWELVE)
    Path("link.npz").symlink_to("a.npz")
    read = lambda name="a.npz": data.open_dataset(name, cache="elsewhere")
    read(), (before := listing())
    for name in ("a.npz", "link.npz"):  # converted once, no leftovers
        assert shows(read(name), N, TWELVE) and listing() == before and len(before) == 5
    np.savez("a.npz", images=FOUR)
    assert shows(read(), range(4), FOUR) and "another version" in capsys.readouterr().out
    images, labels = sorted(Path("elsewhere").iterdir())
    for cache in (images, labels):
        whole = cache.read_bytes()
        for content in (b"my diary", whole[:-1]):
            cache.write_bytes(content)
            with pytest.raises(ValueError, match="in the way"):
                read()
            assert cache.read_bytes() == content
        cache.write_bytes(whole)
    labels.unlink()  # as a process killed between its two renamings does
    assert shows(read(), range(4), FOUR)


@pytest.mark.parametrize("place", ["shutil.disk_usage", "np.savez", "os.replace"])
def test_a_full_disk_leaves_no_half_a_cache(monkeypatch, place):
    write("a.npz", NPZ), (before := listing())
    monkeypatch.setattr(f"data.{place}", mock.Mock(side_effect=OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full.*--cache DIR"):
        data.open_dataset("a.npz")
    assert listing() == before


@pytest.mark.parametrize("ending", [9, 15, 1])  # SIGKILL, SIGTERM, SIGHUP
def test_a_killed_conversion_is_begun_anew(ending):
    write("a.npz", NPZ)
    kill = f"""import numpy, os, runpy, sys
numpy.savez, sys.argv = lambda *a, **k: os.kill(os.getpid(), {ending}), ["", "--data", "a.npz"]
runpy.run_path({str(HERE / "data.py")!r}, run_name="__main__")"""
    run = subprocess.run([sys.executable, "-c", kill], capture_output=True)
    assert run.returncode == (-9 if ending == 9 else 2)
    assert not list(Path().glob("*.cache.np?")) and (ending == 9 or len(listing()) == 1)
    assert shows(data.open_dataset("a.npz"), range(4), FOUR)


@pytest.mark.parametrize("name", ["\u65e5\u672c.npz", "closed pipe.npz"])
def test_neither_pipe_nor_name_stops_a_conversion(name):
    write(name, NPZ)
    run = subprocess.Popen([sys.executable, HERE / "data.py", "--data", name], stdout=-1,
                           stderr=-1, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    printed = run.stdout.close() if name == "closed pipe.npz" else run.stdout.read()
    assert printed is None or b"\\u65e5\\u672c.npz.64.cache.npy: 4 images, 0.0 GB" in printed
    assert run.stderr.read() == b"" and run.wait() == 0
    before = listing()
    assert shows(data.open_dataset(name), range(4), FOUR) and listing() == before  # was converted


@pytest.mark.parametrize("command, files, words", [
    ("--size 63", {}, "expected 32, 64 or 128"), ("--shapes 7", {}, "unrecognized"),
    ("--data x --cache x", {"x": NPZ}, "cannot write x"),
    ("--data x", {}, "does not exist"), ("--data /dev/null", {}, "no complete HDF5"),
    ("--data x", {"x": NPZ[:5000]}, "no complete HDF5"),
    ("--data x", {"x": stored("h5", images=FOUR)[:5000]}, "expected a complete, closed file"),
    ("--data x", {"x": NPZ[:9000] + bytes(9) + NPZ[9009:]}, "expected a complete, closed file"),
    ("--data x", {"x": "version https://git-lfs.github.com"}, "but b'version https://git-lfs."),
    ("--data x", {"x": stored("h5", **{"images/1": FOUR})}, "it holds images; expected"),
    ("--data x", {"x": stored(images=FOUR[0, :, :, 0])}, "images uint8 (64, 64); expected"),
    ("--data x", {"x": stored(train=FOUR, test=FOUR)}, "expected 'images', numbers of shape"),
    ("--data x", {"x/car_1_mesh.mat": b"x"}, "car_1_mesh.mat (no array im)"),
    ("--data x", {"x/readme.txt": b"hello"}, "holds no pictures"),
    ("--data x", {"x/a.png": FOUR[0], "x/config.json": b"", "x/lock": b""}, "folders of runs (1)"),
    ("--data x", {"x/a.png": b"damaged"}, "1 of 1 files cannot be read")])
def test_wrong_data_is_one_line_and_leaves_nothing(command, files, words, monkeypatch):
    for name, content in files.items():
        write(name, content)
    before = listing()
    monkeypatch.setattr("sys.argv", ["data.py", *command.split()])
    refused(data.main, words)
    assert listing() == before


# ---- Training -----------------------------------------------------------------------------------

# 300 images of two factors; six tokens' importance for these; the order in which rows come.
FACTORS = all_combinations(3, 4)[np.arange(300) % 12]
IMPORTANCE = [[.0, .1], [.6, .0], [.0, .0], [.0, .8], [.4, .0], [.0, .1]]
ORDER = [1, 4, 3, 0, 2, 5]


def flags(**options):
    """A config as command-line arguments; where one is repeated, the last one counts."""
    values = {k: v if isinstance(v, tuple) else (v,) for k, v in options.items()}
    return [str(word) for k, v in values.items() for word in ("--" + k.replace("_", "-"), *v)]


def make_run(folder, **changes):
    train.main(["--out", folder, *flags(**{**TINY, **changes})])
    return folder


def resume(folder, **changes):
    train.main(["--resume", folder, *flags(**changes)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of finished runs, never interrupted, with scores as long ones would have, and their
    dataset: 3 x 4 colours of two halves. What is there is not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    images = np.zeros((300, 32, 32, 3), np.uint8)
    images[:, :16, :, 0] = (FACTORS[:, :1] * 100)[:, :, None]
    images[:, 16:, :, 1] = (FACTORS[:, 1:] * 80)[:, :, None]
    np.savez(folder / "toy.npz", images=images, labels=FACTORS)
    with mock.patch("train.score", return_value={"importance": IMPORTANCE}):
        TINY["data"] = folder / "toy.npz"
        for name, variant in [("run", {"score_every": 6}), ("adagn", {"conditioning": "adagn"}),
                              ("vector", {"tokens": "vector"}), ("direct", {"decoder": "direct"})]:
            make_run(folder / name, **variant)
    write(folder / "direct/metrics.json", '{"note": "no labels"}')
    return folder


@pytest.fixture
def whole(runs, monkeypatch):
    """The run that others are compared with; training goes without scores."""
    monkeypatch.setattr(train, "score", lambda *a, **k: {})
    return runs / "run"


def saved(folder):
    return torch.load(Path(folder, "checkpoint.pt"), weights_only=True)


def weights(folder):
    return {**saved(folder)["model"], **{"ema." + k: v for k, v in saved(folder)["ema"].items()}}


def log(folder, *columns):
    with open(Path(folder, "log.csv"), newline="") as file:
        return [[row[column] for column in columns] for row in csv.DictReader(file)]


def signals(patch, numbers):
    """Send the process these signals, {step: number}; the steps of all runs count on in a list."""
    note, done = train.Run.note, []

    def note_and_signal(*arguments):
        done.append(1)
        signal.raise_signal(numbers[len(done)]) if len(done) in numbers else None
        note(*arguments)

    patch.setattr(train.Run, "note", note_and_signal)
    return done


@pytest.mark.parametrize("options", [dict(model="vae", vae_loss="annealed"),
                                     dict(first_stage="pixels")], ids=str)
def test_a_vae_and_pixels_go_on_with_the_same_bits(options, whole, monkeypatch):
    make_run("unbroken", **options)
    signals(monkeypatch, {5: signal.SIGTERM})
    with pytest.raises(KeyboardInterrupt):
        make_run("parts", **options)
    resume("parts")
    assert equal(weights("parts"), weights("unbroken")) and saved("parts")["step"] == 12
    assert train.load_run("parts")[2]["scores"]["tflop"] > 0


def test_five_interruptions_leave_the_same_bits(whole, monkeypatch):
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
    shutil.copy(TINY["data"], "toy.npz")
    with np.load("toy.npz") as toy:
        np.savez("other.npz", images=255 - toy["images"], labels=toy["labels"])
    signals(monkeypatch, {17: signal.SIGINT})
    with pytest.raises(KeyboardInterrupt):
        make_run("run", data="toy.npz")
    Path("there/deep").mkdir(parents=True)
    Path("run").rename("there/moved"), Path("toy.npz").rename("there/data.npz")
    monkeypatch.chdir("there/deep")
    refused(lambda: resume("../moved"), "toy.npz", "--data")
    refused(lambda: resume("../moved", data="../../other.npz"), "--data is", "digest")
    monkeypatch.setattr(train.Machine, "fast_bf16", lambda self: False)
    resume("../moved", data="../data.npz", precision="auto")
    assert equal(weights("../moved"), weights(whole))
    assert train.load_run("../moved")[1].data == str(folder / "there/data.npz")


def test_a_first_stage_is_borrowed_its_encoder_stops(whole, monkeypatch):
    shutil.copytree(whole, "lender")
    make_run("borrower", first_stage="lender", seed=7)
    lent, got = weights(whole), weights("borrower")
    shutil.rmtree("lender")  # what it lent is known
    assert train.load_run("borrower")[1].first_stage == "tiny"
    for part, same in [("first_stage.", True), ("encoder.", False), ("denoiser.", False)]:
        names = [name for name in lent if name.startswith(part)]
        assert equal({k: lent[k] for k in names}, {k: got[k] for k in names}) == same
    monkeypatch.setitem(train.FIRST_STAGE["tiny"], "encoder_steps", 6)
    for name, steps in [("short", 20), ("long", 40)]:  # their learning rates part after step 8
        make_run(name, vq_steps=steps, steps=0)
    short, long = (train.load_run(name)[0].first_stage for name in ("short", "long"))
    assert equal(short.encoder.state_dict(), long.encoder.state_dict())
    assert not equal(short.decoder.state_dict(), long.decoder.state_dict())


def test_noise_is_weak_at_first_learning_rates_at_both_ends(whole, monkeypatch):
    drawn, loss = [], encdiff.EncDiff.loss
    monkeypatch.setattr(encdiff.EncDiff, "forward",
                        lambda *inputs: drawn.append(inputs[2:3]) or loss(*inputs))
    make_run("run", noise_order="weak-first", batch=64)
    early, late = torch.stack([t for t, in filter(None, drawn)]).double().split((4, 8))
    lowest = 210**2 / 20**3  # the mean of the lowest of three numbers in 1 to 20
    for t, mean in [(early, lowest), (late, 21 - lowest)]:
        assert t.mean().item() == approx(mean, abs=1.2) and t.min() == 1 and t.max() <= 20
    rates = [train.learning_rate(2.0, step, 1000, 0.4) for step in (0, 49, 99, 600, 800, 999)]
    assert rates == approx([0.02, 1.0, 2.0, 2.0, 1.0, 0.005])


def test_muon_steps_are_orthogonal_adamw_takes_the_rest():
    model = tiny_model()
    inner, outer = model.denoiser.middle[0].conv1.weight, model.denoiser.conv_out.weight
    optimizer, before = train.Optimizer(model, train.Config(**TINY), 1.0), inner.detach().clone()
    model.loss(some_images()).backward()
    u, _, v = torch.linalg.svd(torch.randn_like(inner.flatten(1)), full_matrices=False)
    inner.grad = (u * torch.logspace(0, -1, len(u)) @ v).view_as(inner)  # sizes 1 to .1
    optimizer.step(1e-3)
    sizes = torch.linalg.svdvals((before - inner.detach()).flatten(1) / 1e-2)  # ten times AdamW's
    assert 0.5 < sizes.min() and sizes.max() < 1.5
    assert outer.abs().median().item() == approx(1e-3, rel=0.01)  # from 0, by Adam's step


def test_training_lowers_the_loss_and_gives_the_average(whole, capsys):
    make_run("run", steps=60, lr=3e-2)
    losses = [float(loss) for stage, loss in log("run", "stage", "loss") if stage[0] == "j"]
    assert losses[-1] < 0.9 * losses[0]
    assert "joint training 20/60  loss" in capsys.readouterr().out
    kept, (model, _, about) = weights("run"), train.load_run("run")
    for name, v in model.state_dict().items():
        assert torch.equal(v, kept.get("ema." + name, kept[name])), name
    assert about["step"] == 60 and about["data"]["count"] == 300 and about["scores"]["tflop"] > 0
    average, model = tiny_model(), tiny_model()
    for module, value in [(average, 0.0), (model, 1.0)]:
        for v in module.state_dict().values():
            v.fill_(value)
    train.update_average(average, model, 0.9)  # a tenth of the way, but not in stage 1
    for name, v in average.state_dict().items():
        if v.is_floating_point():
            assert_close(v, torch.full_like(v, 0.0 if name.startswith("first_stage.") else 0.1))


def test_scores_of_scalars_and_of_tokens_and_what_is_left(rendered, monkeypatch):
    model = tiny_model(size=64).eval()
    run = SimpleNamespace(config=train.Config(**TINY), machine=train.Machine("cpu"))
    # A token that is its scalar along some direction must score as the scalar does.
    axes = torch.randn(6, 8)
    model.encoder.out.weight.data *= 1000  # or untrained codes count as not active
    model.token_map.forward = lambda codes: codes[..., None] * axes
    scores = train.score(run, rendered, model, 1500, 500, mapped=True)
    assert [scores[f"mapped_{k}"] for k in train.Run.SCORES] == approx(
        [scores[k] for k in train.Run.SCORES], abs=0.02)
    assert 0 < scores["disentanglement"] < 0.5 and len(scores["importance"]) == 6
    some = {"disentanglement": 0.5, "note": "one value is rare"}  # the others could not be computed
    monkeypatch.setattr(metrics, "evaluate", lambda *a, **k: dict(some))
    found = train.score(run, rendered, model, 150, 50, mapped=True)
    assert found == {**some, "mapped_disentanglement": 0.5}


def test_the_compute_of_small_is_what_whole_steps_took(monkeypatch):
    monkeypatch.setattr(train, "ENCODER_WIDTH", 64)
    before = {**train.SMALL, "optimizer": "adamw", "encoder": "cnn_bn"}  # counted in whole steps
    flops = train.step_flops(train.Config(**before))
    assert flops == approx({"first stage": 16.9e9, "joint training": 31.8e9}, rel=0.01)


LAUNCH = """import datetime, sys, time; sys.path.insert(0, sys.argv.pop(1))
import test_encdiff, train, data, torch.distributed as dist
train.score, train.CHECKPOINT_SECONDS, read = lambda *a, **k: {}, 0.2, data.open_dataset
dist.distributed_c10d.default_pg_timeout = datetime.timedelta(seconds=2)
if train.os.environ.get("RANK") == "0":  # a conversion that takes longer than that
    data.open_dataset = lambda *a: time.sleep(5) or read(*a)
with train.one_line_errors(): train.main(sys.argv[1:])"""


def launch(*words, launcher=(), run=subprocess.run, **options):
    """train.py in a process of its own, with one thread: their number decides last bits."""
    return run([*launcher, sys.executable, "-c", LAUNCH, str(HERE), *words], **options,
               env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_processes_train_like_one_after_a_slow_conversion(whole):
    options = dict(TINY, encoder="cnn", dropout=0.0, steps=8)  # BatchNorm and dropout differ
    make_run("one", **options)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--no-python"]
    launch("--out", "two", *flags(**options), launcher=torchrun, timeout=300, check=True,
           capture_output=True)
    one, two = np.array(log("one", "loss"), float), np.array(log("two", "loss"), float)
    assert len(one) == 5
    np.testing.assert_allclose(one, two, atol=1e-3)


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="minutes; run with SLOW=1")
def test_a_run_killed_twenty_times_ends_with_the_same_bits(runs):
    long, random = flags(**TINY, vq_steps=1000, steps=1000), np.random.default_rng(0)
    launch("--out", "whole", *long, check=True)
    words = ["--out", "parts", *long]
    for _ in range(20):
        with pytest.raises(subprocess.TimeoutExpired):  # and the process is killed
            launch(*words, timeout=random.uniform(2, 5))
        if Path("parts/checkpoint.pt").exists():
            words = ["--resume", "parts"]
    launch(*words, check=True)
    assert equal(weights("whole"), weights("parts"))


# ---- What a user can get wrong ------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    "--batch 0", "--steps many", "--lr nan", "--ema 1", "--seed -1", "--channels 30", "--size 48",
    "--vq-steps 0", "--first-stage shallow", "--multipliers 0", "--multipliers 1 2 2 2 2 2",
    "--learning-rate 1", "--tokens", "--resume nowhere", "--data nowhere", "--first-stage nowhere",
    "--decoder direct --conditioning adagn", "--regularizer sparse --tokens vector",
    "--num-tokens 40 --regularizer orthogonal", "--device cuda"])
def test_a_bad_flag_is_one_line_that_names_it(words, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flag, *values = words.split()
    others = [] if flag == "--resume" else [*flags(**TINY), "--out", "run"]
    said = "nowhere" if "nowhere" in values else flag
    refused(lambda: train.main([*others, flag, *values]), said)
    assert not Path("run").exists()


def test_what_may_not_change_and_other_runs_are_refused(whole):
    kept = (whole / "checkpoint.pt").read_bytes()
    for change, said in [({"dropout": 0.5}, "dropout 0.1 -> 0.5"), ({"out": "other"}, "no --out"),
                         ({"steps": 5}, "--steps is 5; expected 12 or more")]:
        refused(lambda: resume(whole, **change), said)
    refused(lambda: resume(whole / "checkpoint.pt"), "folder")
    refused(lambda: make_run(whole), "or --resume")
    with train.Run("busy", train.Config(), train.Machine()):
        refused(lambda: make_run("busy"), "in use by another process")
    make_run("busy", steps=0, first_stage=whole)  # the failed start holds no lock
    assert (whole / "checkpoint.pt").read_bytes() == kept


def test_a_foreign_checkpoint_executes_nothing(whole):
    good, begin = saved(whole), (whole / "checkpoint.pt").read_bytes()[:5000]
    trap = type("Trap", (), {"__reduce__": lambda self: (os.mkdir, ("trapped",))})()
    configs = [{**good["config"], "channels": 32}, {**good["config"], "channels": "wide"}, trap]
    changed = [{**good, "config": config} for config in configs]  # shapes, type, code
    export = {k: v for k, v in good.items() if k not in ("optimizer", "log")}
    for k, content in enumerate([b"", b"hello", begin, [1], {"format": 4}, {**good, "format": 0},
                                 {**good, "model": [1]}, *changed, export]):
        write(f"run{k}/checkpoint.pt", content if isinstance(content, bytes) else b"")
        if not isinstance(content, bytes):
            torch.save(content, f"run{k}/checkpoint.pt")
        refused(lambda: resume(f"run{k}"), f"run{k}")
    assert not Path("trapped").exists()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["data.open_dataset", "train.score"])
def test_a_signal_before_and_after_training_is_one_line(moment, ending, whole, capsys):
    with mock.patch(moment, lambda *a, **k: signal.raise_signal(ending)):
        with pytest.raises(SystemExit) as ended, train.one_line_errors():
            make_run("run")
    assert ended.value.code == 130 and capsys.readouterr().err.count("\n") == 1
    assert signal.getsignal(ending) != signal.default_int_handler or ending == signal.SIGINT
    assert Path("run/checkpoint.pt").exists() == (moment == "train.score")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_keeps_the_last_good_checkpoint(whole):
    write("run/checkpoint.pt", (whole / "checkpoint.pt").read_bytes())
    Path("run/checkpoint.pt.tmp").symlink_to("/dev/full")
    refused(lambda: resume("run", steps=20), "No space left")
    assert equal(weights("run"), weights(whole)) and not list(Path("run").glob("*.tmp"))


def test_a_loss_that_is_not_finite_ends_with_advice_that_works(whole, monkeypatch):
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


def test_a_closed_pipe_does_not_end_a_run(runs):
    with launch("--out", "run", *flags(**TINY), run=subprocess.Popen, stdout=-1,
                stderr=-1) as process:
        assert process.stdout.readline() == b"preset small\n"
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == 0 and b"Error" not in error and saved("run")["step"] == 12


def test_an_odd_folder_is_used_or_the_reason_said(whole, monkeypatch):
    Path("file").write_text("")
    refused(lambda: make_run("file/run"), "Not a directory")
    terminal = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    make_run("\u7d75", steps=0, first_stage=whole)
    assert b"are in \\u7d75" in terminal.buffer.getvalue()
    locks = train.sqlite3.OperationalError("locking protocol")  # on a network's file system
    with mock.patch("sqlite3.connect", side_effect=locks):
        make_run("net", steps=0, first_stage=whole)
    assert b"net cannot be locked (locking protocol)" in terminal.buffer.getvalue()
    Path("closed/config.json").mkdir(parents=True)  # stands for what may not be written
    refused(lambda: make_run("closed"), "cannot write closed/config.json")


def test_main_can_be_called_from_a_notebook(whole, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kernel", "--foreign"])
    assert train.parse([])[0] == train.Config(**train.SMALL)
    threads, errors, read = torch.get_num_threads(), [], data.open_dataset

    def second(*arguments):
        refused(lambda: make_run("two"), "another thread")
        return read(*arguments)

    monkeypatch.setattr(data, "open_dataset", second)
    thread = threading.Thread(target=lambda: errors.append(make_run("one")))
    thread.start(), thread.join()
    assert errors == ["one"] and not Path("two").exists()
    assert len(weights("one")) and torch.get_num_threads() == threads


# ---- Pictures and tables of a trained run --------------------------------------------------------


def show(*words):
    """sample.py with these words."""
    sample.main([str(word) for word in words])


def opened(run, *words):
    args = sample.parse(["swap", str(run), *words])
    return sample.Trained(args), args


def test_rows_are_one_a_factor_or_all_by_factor(runs):
    factors = ["factor 0", "factor 0", "factor 1", "none", "none", "none"]
    labels = {i: f"{factor}\ntoken {i}" for i, factor in zip(ORDER, factors)}
    rows = lambda name, *words: sample.token_rows(*opened(runs / name, *words))
    for words, tokens in [("", [1, 3]), ("--tokens all", ORDER), ("--tokens 2 4", [4, 2])]:
        assert rows("run", *words.split()) == (tokens, [labels[i] for i in tokens])
    assert rows("direct", "--tokens", "5", "2") == ([2, 5], ["token 2", "token 5"])  # no scores
    assert rows("direct")[0] == list(range(6))


@pytest.fixture
def drawn(monkeypatch):
    """The (codes, noise) that `Trained.draw` is asked for; nothing is sampled."""
    calls = []
    monkeypatch.setattr(sample.Trained, "draw", lambda self, codes, noise, *_, **__: (
        calls.append((codes, noise)) or torch.zeros(len(codes), 3, 32, 32)))
    return calls


@pytest.mark.parametrize("run", ["run", "vector"])
def test_pictures_exchange_and_sweep_codes_of_the_data(runs, drawn, run):
    run = runs / run
    show("swap", run, *"--tokens all --count 2 --seed 5".split())
    trained, _ = opened(run, "--seed", "5")
    source, target = (trained.codes(x) for x in trained.images(4).split(2))
    codes, noise = drawn.pop()
    assert len(codes) == 14 and torch.equal(codes[:2], source)
    for i, got in zip(ORDER, codes[2:].split(2)):
        others = [j for j in range(6) if j != i]
        assert torch.equal(got[:, i], target[:, i])
        assert torch.equal(got[:, others], source[:, others])
    assert torch.equal(noise, noise[:2].repeat(7, 1, 1, 1))

    show("traverse", run, "--count", 3, "--tokens", 4, 0)
    seen = trained.codes(trained.load(range(300)))  # (300, 6) or (300, 6, 8)
    one_of = lambda rows, code: (rows - code).flatten(1).abs().amax(1).min() < 1e-5
    assert len(drawn) == 2
    for i, (codes, _) in zip([4, 0], drawn):  # its own codes, then three with one token swept
        assert all(torch.equal(codes[0, j], codes[2, j]) for j in range(6) if j != i)
        assert all(one_of(seen[:, i:i + 1], code) for code in codes[:, i])
        if seen.ndim == 2:
            _, low, middle, high = codes[:, i]
            assert seen[:, i].quantile(0.02) >= low < middle < high >= seen[:, i].quantile(0.98)

    show("generate", run, "--count", 16)
    mixed = drawn[-1][0]
    assert all(one_of(seen[:, j:j + 1], mixed[b, j]) for b in range(16) for j in range(6))
    assert not all(one_of(seen, code) for code in mixed)  # combinations that are in no image


def test_the_gif_sweeps_each_token_up_and_down(runs, drawn):
    show("traverse", runs / "run", "--gif", "--count", 3, "--out", "moving.gif")
    with Image.open("moving.gif") as picture:
        assert picture.is_animated and picture.info["loop"] == 0 and picture.size[0] > 4 * 131
    assert Path("moving.gif").stat().st_size < 2_000_000
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
def test_every_picture_has_its_rows_and_columns(runs, capsys, words, columns, rows, heading):
    verb, run, *_ = words = words.format(runs).split()
    show(*words)
    picture = Image.open(f"{run}/{verb}.png")
    assert picture.height == rows * 131 + (28 if heading else 3)  # 32 pixels four times, a gap of 3
    assert columns * 131 < picture.width < columns * 131 + 200
    if verb == "reconstruct":
        table = re.findall(r"^[fsd][a-z0-9, ]+? {2,}(\S+) +(0\.\S+)", capsys.readouterr().out, re.M)
        assert len(table) == rows - 1 and all(-1 <= float(ssim) <= 1 for ssim, mse in table)


def test_kl_and_complexity_are_the_closed_form_and_a_count(runs, capsys):
    show("kl", "--out", "kl.png")
    t, *rows = (line.split()[1:] for line in capsys.readouterr().out.splitlines()[:5])
    for name, nats in zip(encdiff.SCHEDULES, rows, strict=True):
        exact = encdiff.kl_bottleneck(encdiff.beta_schedule(name))[np.array(t, int) - 1]
        np.testing.assert_allclose(np.array(nats, float), exact, rtol=1e-3)
    show("complexity", runs / "run", "--steps", 3)
    words = capsys.readouterr().out.split()
    count = count_of(train.load_run(runs / "run")[0].denoiser)
    assert words[words.index("denoiser") + 1] == f"{count:,}" and "3" in words


def test_worth_is_a_factors_share_of_the_latent_at_each_noise(folder, capsys):
    rows, model = np.array([4, 0, 5, 2, 1, 3]), tiny_model(timesteps=100)  # the set is in no order
    dataset = SimpleNamespace(
        name="toy", factor_names=("a", "b"), factor_sizes=(2, 3),
        factors=lambda indices: torch.from_numpy(np.stack(np.divmod(rows[indices], 3), 1)),
        find=lambda factors: np.argsort(rows)[factors[:, 0] * 3 + factors[:, 1]])
    # The latent is the first factor alone, and the denoiser is exact.
    abar = lambda t: model.alpha_bar[t][:, None, None, None]
    model.latents = model.tokens = lambda codes: codes
    model.denoiser.forward = lambda z_t, t, z0: (z_t - abar(t).sqrt() * z0) / (1 - abar(t)).sqrt()
    run = SimpleNamespace(
        dataset=dataset, config=train.Config(timesteps=100), model=model, device="cpu",
        load=lambda found: torch.from_numpy(rows[found] // 3 * 2.0 - 1).float().view(-1, 1, 1, 1)
        .expand(-1, 1, 4, 4), folder=folder, codes=lambda images: images, name="toy",
        some=torch.arange, noise=lambda count: torch.randn(count, 1, 4, 4))
    sample.worth(run, SimpleNamespace(count=6, out=None, verb="worth"))
    t, a, b = (line[14:].split() for line in capsys.readouterr().out.splitlines()[:3])
    abar = model.alpha_bar[[int(time_step) for time_step in t]]
    np.testing.assert_allclose(np.array(a, float), 4 * abar / (1 - abar), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.array(b, float), 0, atol=1e-4)


def test_curves_are_straight_and_squares_as_large_as_they_should(runs):
    show("curves", runs / "run", runs / "adagn", "--out", "curves.png")
    assert Image.open("curves.png").size == (1520, 720)
    for logarithmic, ys in [(False, (0, 1, 2)), (True, (1, 10, 100)), (True, (-1, 0, 1))]:
        series = {"name": list(zip((0, 1, 2), ys))}  # -1 has no logarithm
        picture = sample.plot("", "", series, logarithmic=logarithmic)
        y, x = (np.asarray(picture)[:, :800] == sample.PALETTE[0]).all(-1).nonzero()  # no legend
        assert np.ptp(x) > 500 and np.corrcoef(x, y)[0, 1] < -0.999
    show("importance", runs / "run", "--out", "i.png")
    pixels = np.asarray(Image.open("i.png")).astype(int)
    # The area of a square is its importance: 1.0 of either factor in all, of one 0.1 twice.
    areas = [(pixels == colour).all(-1).sum() for colour in sample.PALETTE[:2]]
    assert areas[0] == approx(areas[1], rel=0.05) and min(areas) > 38**2


def test_argument_groups_runs_by_what_differs(runs, capsys):
    for name, variant, reached in [("a", {}, .8), ("b", {"seed": 1}, .6), ("c", {"steps": 5}, .2)]:
        shutil.copytree(runs / "run", name)
        config = {**saved(name)["config"], **variant}
        torch.save({**saved(name), "config": config}, f"{name}/checkpoint.pt")
        write(f"{name}/config.json", json.dumps(config))
        write(f"{name}/metrics.json", json.dumps({"disentanglement": reached}))
    show("argument", *"abc")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:3]]
    assert [row[1:5] for row in rows] == [["2", "0.700", "0.600", "0.800"], ["1"] + ["0.200"] * 3]
    assert float(rows[0][0]) > float(rows[1][0]) and "steps 5" in " ".join(rows[1])
    assert Path("argument.png").exists()


def test_encode_writes_what_metrics_reads(runs, capsys):
    show("encode", runs / "run", "--out", "codes.npz")
    trained, _ = opened(runs / "run")
    with np.load("codes.npz") as arrays:
        assert np.array_equal(arrays["indices"], np.arange(300))
        assert np.array_equal(arrays["factors"], FACTORS)
        expected = trained.codes(trained.load(range(300))).numpy()
        np.testing.assert_allclose(arrays["codes"], expected, atol=1e-5)
    metrics.main("codes.npz --train 200 --test 100".split())
    assert "disentanglement" in capsys.readouterr().out
    np.savez("others.npz", images=np.zeros((3, 40, 30, 3), np.uint8))
    show("encode", runs / "vector", "--data", "others.npz", "--out", "others' codes.npz")
    with np.load("others' codes.npz") as arrays:
        assert arrays["codes"].shape == (3, 6, 8) and "factors" not in arrays


def test_an_exported_file_is_used_like_its_run(runs, monkeypatch, capsys):
    show("export", runs / "run", "small.pt")
    monkeypatch.setattr(sample, "SHIPPED", Path("small.pt"))
    show("swap", "--count", 2, "--steps", 3)
    assert "no RUN given" in capsys.readouterr().out
    show("swap", runs / "run", "--count", 2, "--steps", 3, "--out", "of_run.png")
    mine, theirs = (np.asarray(Image.open(name)).astype(int) for name in ("swap.png", "of_run.png"))
    assert mine.shape == theirs.shape and abs(mine - theirs).max() <= 2  # half precision
    (half, *about), (whole, *of_run) = map(train.load_run, ("small.pt", runs / "run"))
    assert about[0] == of_run[0] and about[1]["scores"] == of_run[1]["scores"]
    for (name, a), b in zip(half.state_dict().items(), whole.state_dict().values()):
        assert a.dtype == b.dtype, name
        assert_close(a, b, rtol=1e-3, atol=1e-4)


def serve(run):
    """The page of a run -> ask, where ask(path, fields, **headers) -> (status, text)."""
    shown, words = Queue(), ["explore", str(run), "--seed", "3"]
    with mock.patch("webbrowser.open", shown.put):
        threading.Thread(target=sample.main, args=(words,), daemon=True).start()
        address = shown.get(timeout=60).rstrip("/")

    def ask(path, fields=None, **headers):
        query = "?" + urllib.parse.urlencode(fields) if fields else ""
        try:
            request = urllib.request.Request(address + path + query, headers=headers)
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, reply.read().decode()
        except urllib.request.HTTPError as error:
            return error.code, error.read().decode()

    return ask


GOOD = {"source": 7, "target": 2, "noise": 1, "steps": 3, "tokens": "s,s,s,s,s,s"}


@pytest.mark.parametrize("run", ["run", "vector", "direct", "adagn"])
def test_the_page_draws_what_its_sliders_say(runs, run):
    shutil.copytree(runs / run, "copy")
    content, words = saved("copy"), [] if run == "direct" else ["--steps", "3"]
    for name in [name for name in content["ema"] if name.startswith("denoiser.")]:
        content["ema"][name] += 0.1 * torch.randn(content["ema"][name].shape)  # to read its tokens
    torch.save(content, "copy/checkpoint.pt")
    ask, (trained, _) = serve("copy"), opened("copy", *words, "--seed", "3")
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
        picture = Image.open(urllib.request.urlopen(drawn(tokens)["images"][2]))
        image = train.to_bytes(trained.draw(codes, z, steps=3)[0]).permute(1, 2, 0)
        assert_close(torch.from_numpy(np.array(picture)), image, rtol=0, atol=1)
    with ThreadPoolExecutor(4) as pool:  # requests of others at the same time change nothing
        answers = [answer["images"][2] for answer in pool.map(drawn, ["s,s,s,s,s,s", moved] * 4)]
    assert set(answers[::2]) == {own["images"][2]} and len(set(answers[1::2])) == 1
    assert answers[1] != answers[0] and len(own["maps"]) == (0 if run == "adagn" else 6)


def test_the_page_refuses_strangers_and_nonsense(runs):
    ask = serve(runs / "run")
    for name, value in [("Host", "evil.example"), ("Origin", "http://evil.example"),
                        ("Origin", "null"), ("Origin", "http://127.0.0.1:1")]:
        assert ask("/draw", GOOD, **{name: value})[0] == 403 == ask("/", **{name: value})[0]
    for wrong in [{"source": -1}, {"source": 300}, {"target": "x"}, {"noise": 2**70},
                  {"steps": 0}, {"steps": 10**6}, {"tokens": "s,t"}, {"tokens": "nan" + ",s" * 5},
                  {"tokens": "1e30" + ",s" * 5}, {"tokens": "u" + ",s" * 5}]:
        assert ask("/draw", {**GOOD, **wrong})[0] == 400, wrong
    assert ask("/draw")[0] == 400 and ask("/../train.py")[0] == 404
    assert ask("/draw", GOOD)[0] == 200  # the server lives


@pytest.fixture(scope="module")
def broken(runs):
    """Beside the good runs, one with a first stage alone and one with two damaged files."""
    good = saved(runs / "run")
    moved = {**good["config"], "data": "/no/such.npz"}
    write(runs / "damaged/metrics.json", "{"), write(runs / "damaged/log.csv", "a,b\n1,2\n")
    for name, change in [("unfinished", {"stage": "first stage"}), ("damaged", {}),
                         ("moved", {"config": moved})]:
        (runs / name).mkdir(exist_ok=True)
        torch.save({**good, **change}, runs / name / "checkpoint.pt")
    for name, labels in [("plain", {}), ("holes", {"labels": FACTORS[:11]})]:  # all but (2, 3)
        np.savez(runs / f"{name}.npz", images=np.zeros((11, 32, 32, 3), np.uint8), **labels)
        data.open_dataset(runs / f"{name}.npz", 32)
    return runs


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
    before = listing(broken)
    refused(lambda: show(*words.format(broken).split()), said)
    assert listing(broken) == before


# ---- The documents ------------------------------------------------------------------------------

README = (HERE / "README.md").read_text()


def test_modules_open_alike_and_what_is_copied_stands_alone():
    parts, ours = ["WHERE", "PAPER", "SHAPES", "IDEA", "DIFFERS", "TRY"], set(HERE.glob("*.py"))
    for path in ours:
        source = path.read_text()
        words = re.findall(r"^[A-Z]+(?= )", source.split('"""')[1], re.M)
        assert [word for word in words if word in parts] == parts, path.name
        imported = re.findall(r"^(?:import|from) (\w+)", source, re.M)
        assert (path.stem in ("train", "sample", "test_encdiff")
                or not ours & {HERE / f"{name}.py" for name in imported}), path.name


def test_every_command_of_the_documents_has_its_flags(monkeypatch):
    monkeypatch.chdir(HERE)
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


def test_readmes_snippets_print_what_it_says(monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(train, "ENCODER_WIDTH", 64)
    for snippet in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(snippet, {})
        assert capsys.readouterr().out == "".join(re.findall(r"^# (.*\n)", snippet, re.M)), snippet

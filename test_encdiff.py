"""What we are sure of: each test is one claim about the method, or about what happens to a user.

WHERE     Read last, or beside the file in question: the sections follow the modules.
PAPER     arXiv 2402.09712; the tests with eq_ in their names hold its equations.
SHAPES    as in encdiff.py; models and runs have the size TINY, their images 32 x 32 pixels.
IDEA      Code that is compared with itself cannot fail. So each test has another way to the same
          number: a closed form, a loop, torch's own operation, a file built by hand, a second run.
DIFFERS   Nothing here shows that the method disentangles: that takes a real run (README, Results).
TRY       python -m pytest -q                ->   every claim, in a few minutes
          python -m pytest -q -k eq_         ->   the equations alone, in seconds
"""
import contextlib
import csv
import functools
import http.client
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
os.environ["OMP_NUM_THREADS"] = "1"  # as their number decides last bits
torch.set_num_threads(1)
# Sizes and constants with which a training step takes milliseconds.
vq.KINDS["tiny"] = functools.partial(vq.VQAutoencoder, channels=32, multipliers=(1,), blocks=1,
                                     latent_channels=3, patch=4, codebook_size=64)
train.FIRST_STAGE["tiny"] = dict(batch=8, lr=1e-3, squared=0.0, encoder_steps=0)
train.LOG_EVERY, train.ENCODER_WIDTH, train.TIMESTEPS = 4, 8, 20
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "TIMESTEPS", 1000)
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


def all_combinations(*sizes):
    return np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), axis=1)


# ---- The method, its first stage, its variants --------------------------------------------------


def test_the_denoiser_has_the_papers_size_and_torchs_attention():
    assert sum(map(torch.numel, unet.UNet(token_dim=16).parameters())) == 37_469_635
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
    dict(tokens="vector", conditioning="adagn"), dict(tokens="vector", decoder="direct"),
    dict(regularizer="euler"), dict(regularizer="sparse"), dict(regularizer="orthogonal")], ids=str)
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
    noise, x, weight = torch.randn(4, 6), (images + 1) / 2, encdiff.VAE_WEIGHTS[name]
    mean, log_var = model.encoder(images).view(4, 6, 2).unbind(2)
    q = Normal(mean, log_var.exp().sqrt())
    z = mean + q.stddev * noise
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
    assert metrics.ssim(x, y).tolist() == approx([1, torch.stack(local).mean().item()])
    assert metrics.mse(x, y).tolist() == approx([0, (x[1] - y[1]).square().mean().item()])


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
        with h5py.File(buffer, "w") as file:
            for key, array in arrays.items():
                file.create_dataset(key, data=array, compression="gzip")
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
def test_rays_meet_the_object_where_its_surface_is(shape):
    scale, (eye, rays) = data.LEVELS[3][1], data.camera_rays(data.LEVELS[5][11], 64)  # small: a lid
    r, h, o = data.RADIUS[shape] * scale, data.TALL[shape] * scale, eye[:, None]

    def distance(p):  # to the object's surface, or less; below 0 inside
        side, above = np.hypot(p[0], p[2]), abs(p[1] - h / 2) - h / 2
        return {data.CUBE: np.maximum(np.maximum(abs(p[0]), abs(p[2])) - r, above),
                data.CYLINDER: np.maximum(side - r, above),
                }.get(shape, np.hypot(side, p[1] - np.clip(p[1], r, h - r)) - r)

    with np.errstate(all="ignore"):  # rays that miss
        t = data.meet_object(shape, scale, o, rays)
    way = [distance(o + step * np.minimum(t, 8) * rays) for step in np.linspace(0, 0.99, 100)]
    met = t < 8
    place = o + t[met] * rays[:, met]
    assert np.min(way) > 0 and np.abs(distance(place)).max() < 1e-9 and met.mean() > 0.02
    slope = [(distance(place + step) - distance(place - step)) / 2e-5
             for step in 1e-5 * np.eye(3)[:, :, None]]  # the normal is where the distance rises
    normal = data.object_normal(shape, scale, place)
    assert np.isclose(slope, normal, atol=1e-3).all(0).mean() > 0.97  # edges have none


def test_an_index_is_its_factors_and_a_hue_its_own_surface(rendered):
    rows, places = np.arange(480000), [48000, 4800, 480, 60, 15, 1]  # the official order
    f = rendered.factors(rows).numpy()
    assert (f @ places == rows).all() and (rendered.find(f[::4801]) == rows[::4801]).all()
    assert rendered.factor_sizes == (10, 10, 10, 8, 4, 15) == tuple(f.max(0) + 1)
    index = np.random.default_rng(0).integers(480000, size=600)
    for j in range(3):
        other = index + ((f[index, j] + 3) % 10 - f[index, j]) * places[j]
        changed = (rendered.images(index) != rendered.images(other)).any(1).flatten(1).numpy()
        surface = rendered.planes[index % 480, j] != 0
        assert not (changed & ~surface).any() and (changed & surface).sum() > 0.9 * surface.sum()
    # Orientation -30 (number 0) shows the dark right wall, +30 (number 14) the dark left one.
    left, right = rendered.planes[[0, 14], 1].reshape(2, 64, 64)[:, 28, [2, 61]].T
    assert left[0] > 1.2 * right[0] and right[1] > 1.2 * left[1]
    # The official file has the same images, labelled in units; also a part of it is known.
    labels = f[index] * [0.1, 0.1, 0.1, 0.5 / 7, 1, 60 / 14] + [0, 0, 0, 0.75, 0, -30]
    read = dataset_of(rendered.images(index).permute(0, 2, 3, 1), kind="h5", labels=labels)
    assert (read.factor_names, read.factor_sizes) == (data.FACTORS, data.SIZES) and not read.note
    assert (read.factors([599, 7]).numpy() == f[index[[599, 7]]]).all()


def test_any_layout_name_and_range_give_the_same_images(monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 64 * 64 * 3 * 4)  # several blocks, the last one short
    grey, channels_first = TWELVE[..., :1], np.ascontiguousarray(TWELVE.transpose(0, 3, 1, 2))
    opaque = np.pad(TWELVE, ((0, 0),) * 3 + ((0, 1),), constant_values=255)
    for (key, array, seen), kind in itertools.product(
            [("images", grey[..., 0], grey), ("X", grey, grey), ("image", opaque, TWELVE),
             ("arr_0", TWELVE, TWELVE), ("imgs", np.asfortranarray(TWELVE), TWELVE),
             ("data", channels_first, TWELVE)], ["npz", "h5"]):
        assert shows(dataset_of(array, key, kind), [9, 0, 4], seen[[9, 0, 4]])
    colour, wide, mask = FOUR, FOUR.astype(np.uint16), FOUR[..., :1] > 127
    for array in (colour / 255, colour / np.float32(127.5) - 1, colour / 255 - 0.5, colour * 1.0,
                  colour.astype(int), (colour / 255).astype("f2"), wide * 257,
                  (wide * 257).astype(">u2"), np.where(colour == 0, np.nan, colour / 255)):
        assert shows(dataset_of(array), range(4), colour)
    assert dataset_of(wide * 16).images([0, 1]).max() == 254  # a camera's 12 bits
    for array in (mask, mask.astype(np.uint8), mask * 1.0, mask * 2 - 1, mask * 255):
        assert shows(dataset_of(array), range(4), mask * 255)


def test_a_picture_is_what_a_viewer_shows():
    make, turned = Image.fromarray, Image.Exif()
    turned[274] = 6  # the camera was held upright: turn it clockwise
    ramp = np.add.outer(np.arange(64), np.arange(64) * 3).astype(np.uint8)
    wide, clear = ramp.astype(np.uint16) * 257, np.where(ramp > 99, 255, 0).astype(np.uint8)
    colour, hole = np.stack([ramp, ramp.T, 255 - ramp], -1), np.where(ramp == 50, 255, ramp)
    frames = dict(save_all=True, append_images=[make(clear)])
    for k, (ending, picture, seen, options) in enumerate([
            ("png", make(wide), ramp, {}), ("tif", make(wide.astype(">u2")), ramp, {}),
            ("tif", make(ramp / np.float32(255)), ramp, {}), ("png", make(clear > 0), clear, {}),
            ("gif", make(ramp).convert("P"), hole, dict(transparency=50, **frames)),
            ("png", make(np.dstack([ramp, clear])), np.where(clear, ramp, 255), {}),
            ("tif", make(colour).convert("CMYK"), colour, {}),
            ("png", make(colour), np.rot90(colour, -1), dict(exif=turned))]):
        Path(f"{k}").mkdir()
        picture.save(f"{k}/0.{ending}", **options)
        assert shows(data.open_dataset(f"{k}"), [0], seen.reshape(1, 64, 64, -1)), (k, ending)


def test_whole_and_cut_official_sets_keep_their_names(monkeypatch):
    monkeypatch.setattr(data, "GRIDS", {24: ("MPI3D", ("a", "b"), (4, 6)),
                                        12: ("dSprites", ("shape", "scale"), (3, 4))})
    toy, cut = dataset_of(noise(24)), dataset_of(noise(23))
    assert (toy.name, toy.factor_names, toy.factor_sizes) == ("MPI3D", ("a", "b"), (4, 6))
    assert toy.factors([0, 5, 6, 23]).tolist() == [[0, 0], [0, 5], [1, 0], [3, 5]]
    assert (len(cut), cut.factor_names) == (23, ()) and "no full set" in str(cut)
    classes = np.stack([N * 0, N // 4, N % 4], 1)
    sprites = dataset_of(TWELVE[..., 0] // 128, "imgs", latents_classes=classes,
                         metadata=np.array({"pickled": 1}, object))
    assert (sprites.name, sprites.factor_names) == ("dSprites", ("shape", "scale"))
    assert sprites.note == "" and (sprites.factors(N).numpy() == classes[:, 1:]).all()
    part = {"latents/classes": all_combinations(1, 1, 1, 3, 6, 5)}
    part = dataset_of(noise(90, 8, 8), kind="h5", **part)
    assert part.factor_names == ("orientation", "x", "y") and "(never varies)" in part.note


def test_labels_of_any_kind_are_numbered_what_is_none_is_said():
    for column, levels in [
            (N % 3 * 0.1 + N * 1e-13, N % 3), (np.float16(N % 3 * 0.1), N % 3), (N % 3 - 1, N % 3),
            (np.array([0, 1, 1e7])[N % 3], N % 3), (N.reshape(12, 1, 1) % 2 == 1, N % 2),
            (np.eye(4)[N % 4], N % 4), (np.array([*"bca"])[N % 3], (N % 3 + 1) % 3)]:
        dataset = dataset_of(TWELVE, labels=column)
        assert dataset.factor_sizes == (levels.max() + 1,) and dataset.note == ""
        assert (dataset.factors(N)[:, 0].numpy() == levels).all()
    real = np.random.default_rng(0).random(12)
    table = np.stack([N % 3, real, np.where(N, N % 2, np.nan), N * 0 + 5, N // 6], 1)
    dataset = dataset_of(TWELVE, labels=table, factor_names=np.array([*"abcde"], "S1"))
    assert (dataset.factor_names, dataset.factor_sizes) == (("a", "e"), (3, 2))
    assert all(f"{name} (" in dataset.note for name in "bcd") and dataset.note in str(dataset)
    fields = np.array([*zip(N % 3 * 0.5, "xy" * 6)], [("hue", "f4"), ("kind", "S1")])
    for kind, arrays in [("npz", dict(labels=fields)), ("h5", dict(labels=fields)),
                         ("h5", {"labels/hue": N % 3, "labels/kind": [*"xy"] * 6})]:
        dataset = dataset_of(TWELVE, kind=kind, **arrays)
        assert dataset.factor_names == ("hue", "kind")
        assert (dataset.factors(N).numpy() == np.stack([N % 3, N % 2], 1)).all()
    for labels in (real, N[:5], np.array([{}] * 12), np.zeros((12, 2, 2)), np.array(7)):
        dataset = dataset_of(TWELVE, labels=labels)
        assert shows(dataset, N, TWELVE) and dataset.factors(N).shape == (12, 0) and dataset.note
    unnamed = dataset_of(TWELVE, labels=real, classes=N % 3, factor_names=np.array(["x"], object))
    assert unnamed.factor_names == ("factor 0",) and "factor_names not used" in unnamed.note


def test_images_are_found_by_factors_and_sets_by_content():
    table = all_combinations(4, 5)[np.random.default_rng(0).permutation(20)]
    dataset, same = (dataset_of(noise(19), labels=table[:19]) for _ in range(2))
    assert (dataset.find(table[18::-1]) == np.arange(19)[::-1]).all()
    with pytest.raises(ValueError, match=re.escape(f"= {tuple(table[19].tolist())}")):
        dataset.find(table)
    assert dataset.identity == same.identity == json.loads(json.dumps(same.identity))
    for images, labels in [(noise(19, seed=1), table[:19]), (noise(19), table[1:])]:
        assert dataset_of(images, labels=labels).identity != same.identity


def mat5(im):
    """A MATLAB level 5 file of a mask and of the uint8 array im, compressed."""
    def element(kind, body):
        if len(body) <= 4:  # the small form: data in the tag
            return struct.pack("<I", len(body) << 16 | kind) + body.ljust(4, b"\0")
        return struct.pack("<II", kind, len(body)) + body + bytes(-len(body) % 8 * (kind != 15))

    out = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<HH", 0x0100, 0x4D49)
    for name, array in [(b"mask_of_it", np.zeros((3, 1), np.uint8)), (b"im", im)]:
        shape = element(5, np.array(array.shape, "<i4").tobytes())
        part = element(14, element(6, struct.pack("<II", 9, 0)) + shape + element(1, name)
                       + element(2, array.tobytes(order="F")))
        out += element(15, zlib.compress(part))
    return out


def test_cars3d_is_read_in_the_order_of_its_list(folder):
    cars = {"car_009_mesh": noise(96), "car_001_mesh": noise(96, seed=1)}
    for name, views in cars.items():
        im = views.reshape(4, 24, 64, 64, 3).transpose(2, 3, 4, 1, 0)  # -> (h, w, 3, 24, 4)
        write(f"{name}.mat", mat5(im))
    write("list.txt", "\n".join(cars))
    dataset = data.open_dataset(folder)
    assert (dataset.name, dataset.factor_sizes) == ("Cars3D", (4, 24, 2))
    assert shows(dataset, range(192), np.concatenate(list(cars.values())))
    elevation, azimuth, model = dataset.factors(range(192)).T
    assert (model * 96 + elevation * 24 + azimuth == torch.arange(192)).all()


@pytest.mark.parametrize("kind, head, mark", [("txt", "4\n", "  "), ("csv", "image_id,", ",")])
def test_celeba_attributes_and_crop(folder, kind, head, mark):
    faces, names = noise(4, 218, 178), tuple(f"Attribute_{j}" for j in range(40))
    values = np.where(noise(4, 40, 1, 1)[..., 0, 0] > 127, 1, -1)  # (4, 40)
    for k in range(4):  # PNG inside, so that the crop can be compared exactly
        write(f"img_align_celeba/{k + 1:06d}.jpg", faces[k] if k != 1 else b"damaged")
    rows = [names, *([f"{k + 1:06d}.jpg", *map(str, values[k])] for k in range(4))]
    write(f"list_attr_celeba.{kind}", head + "\n".join(map(mark.join, rows)))
    dataset = data.open_dataset("img_align_celeba", size=128)
    assert (dataset.name, len(dataset), dataset.attribute_names) == ("CelebA", 3, names)
    assert (dataset.attributes([1, 0]).numpy() == (values[[2, 0]] > 0)).all()
    assert shows(dataset, range(3), faces[[0, 2, 3], 57:185, 25:153])
    for name, width in [("000003.png", 40), ("holiday.png", 0)]:  # a small copy; another picture
        write(f"{name[:7]}/{name}", FOUR[0])
        assert data.open_dataset(name[:7]).attributes([0]).shape == (1, width)


def test_which_files_of_a_folder_are_the_dataset(folder):
    for k, name in enumerate(
            ["a.png", "../away/z.png", ".ipynb_checkpoints/a.png", "._a.png", "__MACOSX/a.png",
             "runs/1/samples.png", "runs/1/config.json", "runs/1/lock", "b/c.JPE", "readme.txt"]):
        write(f"home/{name}", noise(1, 64, 80, seed=k)[0])  # wide: the middle is used
    for link, to in [("linked", "../away"), ("b/up", folder / "home"), ("nowhere.png", "gone")]:
        Path("home", link).symlink_to(to)
    write("home/damaged.png", b"damaged")
    dataset = data.open_dataset("home", cache="home/b")
    pictures = np.concatenate([noise(1, 64, 80, seed=k)[:, :, 8:72] for k in (0, 8, 1)])
    assert len(dataset) == 3 and shows(dataset, range(3), pictures)
    left = ["hidden files or folders (3)", "runs (1)", "other files (2)", "damaged files (1)"]
    assert all(words in dataset.note for words in left)


def test_a_cache_is_whole_or_absent_and_replaces_no_other_file(capsys):
    read = lambda: data.open_dataset("a.npz", cache="elsewhere")
    write("a.npz", stored(images=TWELVE))
    for place in ["shutil.disk_usage", "np.savez", "os.replace"]:
        with mock.patch(f"data.{place}", side_effect=OSError(28, "disk full")):
            refused(read, "disk full", "--cache DIR")
        assert not os.listdir("elsewhere")
    read(), (before := listing())
    assert shows(read(), N, TWELVE) and listing() == before and len(before) == 4  # no leftovers
    write("a.npz", NPZ)
    assert shows(read(), range(4), FOUR) and "another version" in capsys.readouterr().out
    images, labels = sorted(Path("elsewhere").iterdir())
    for cache, end in itertools.product((images, labels), (-1, 9)):
        whole = cache.read_bytes()
        cache.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="in the way"):
            read()
        assert cache.read_bytes() == whole[:end]
        cache.write_bytes(whole)
    labels.unlink()  # as a process killed between its two renamings does
    assert shows(read(), range(4), FOUR)


@pytest.mark.parametrize("command, content, words", [
    ("--size 63", {}, "expected 32, 64 or 128"), ("--data x", {}, "does not exist"),
    ("--data x --cache x", NPZ, "cannot write x"), ("--data x", NPZ[:5000], "no complete HDF5"),
    ("--data x", stored("h5", images=FOUR)[:5000], "expected a complete, closed file"),
    ("--data x", NPZ[:9000] + bytes(9) + NPZ[9009:], "expected a complete, closed file"),
    ("--data x", stored(images=FOUR[0, :, :, 0]), "images uint8 (64, 64); expected"),
    ("--data x", stored(train=FOUR, test=FOUR), "expected 'images', numbers of shape"),
    ("--data x", {"x/car_1_mesh.mat": b"x"}, "car_1_mesh.mat (no array im)"),
    ("--data x", {"x/readme.txt": b"hello"}, "holds no pictures"),
    ("--data x", {"x/a.png": b"damaged"}, "1 of 1 files cannot be read")])
def test_wrong_data_is_one_line_and_leaves_nothing(command, content, words, monkeypatch):
    for name, part in (content if isinstance(content, dict) else {"x": content}).items():
        write(name, part)
    before = listing()
    monkeypatch.setattr("sys.argv", ["data.py", *command.split()])
    refused(data.main, words)
    assert listing() == before


# ---- The documents ------------------------------------------------------------------------------

README = (HERE / "README.md").read_text()
HEADERS = {path.stem: path.read_text().split('"""')[1] for path in HERE.glob("*.py")}


def test_modules_open_alike_and_every_command_has_its_flags(monkeypatch):
    for module, header in HEADERS.items():
        parts = re.findall(r"^(WHERE|PAPER|SHAPES|IDEA|DIFFERS|TRY) ", header, re.M)
        assert parts == ["WHERE", "PAPER", "SHAPES", "IDEA", "DIFFERS", "TRY"], module
        source = (HERE / f"{module}.py").read_text()
        imported = re.findall(r"^(?:import|from) (\w+)", source, re.M)
        assert module in ("train", "sample", "test_encdiff") or not HEADERS.keys() & imported
    monkeypatch.setattr(train, "load_checkpoint", lambda folder: {"config": train.Config()})
    parsers = {"train.py": train.parse, "sample.py": sample.parse}
    commands = re.findall(r"^(?:TRY)? *python (\w+\.py)((?: \S+)*)",
                          "\n".join([README, *HEADERS.values()]), re.M)
    assert set(parsers) <= {script for script, _ in commands}
    for script, words in commands:
        assert (HERE / script).is_file(), script
        parsers.get(script, list)(words.split())  # ValueError where a flag is unknown


def test_readmes_equations_and_snippets_are_right(monkeypatch, capsys):
    rows = re.findall(r"^\| \((\d+)\) \|.*\| `?(\w+)\.py`?,? `(\w+)` \|$", README, re.M)
    assert len(rows) >= 5
    for number, module, name in rows:
        source = (HERE / f"{module}.py").read_text()
        function = re.search(rf"def {name}\(.*?(\n *(def|class) |\Z)", source, re.S)[0]
        assert f"Eq. ({number})" in function, name
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(train, "ENCODER_WIDTH", 64)
    monkeypatch.setattr(train, "TIMESTEPS", 1000)
    for snippet in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(snippet, {})
        assert capsys.readouterr().out == "".join(re.findall(r"^# (.*\n)", snippet, re.M)), snippet

# ---- Pictures and tables of a trained run --------------------------------------------------------

GOOD = {"source": 7, "target": 2, "noise": 1, "steps": 3, "tokens": "s,s,s,s,s,s"}  # for the page


def show(*words):
    sample.main([str(word) for word in words])


def opened(run, *words):
    return sample.Trained(sample.parse(["swap", str(run), *words]))


def test_rows_are_one_a_factor_or_all_by_factor(runs):
    names = dict(zip(ORDER, ["factor 0", "factor 0", "factor 1", "none", "none", "none"]))
    for words, tokens in [
            ("run", [1, 3]), ("run --tokens all", ORDER), ("run --tokens 2 4", [4, 2]),
            ("direct --tokens 5 2", [2, 5]), ("direct", [*range(6)])]:  # has no scores
        args = sample.parse(f"swap {runs}/{words}".split())
        labels = [(names[i] + "\n") * (words[0] == "r") + f"token {i}" for i in tokens]
        assert sample.token_rows(sample.Trained(args), args) == (tokens, labels)


@pytest.mark.parametrize("run", ["run", "vector"])
def test_pictures_exchange_and_sweep_codes_of_the_data(runs, run, monkeypatch):
    drawn, run = [], runs / run  # (codes, noise), of which nothing is sampled
    monkeypatch.setattr(sample.Trained, "draw", lambda self, codes, noise, *_, **__: (
        drawn.append((codes, noise)) or torch.zeros(len(codes), 3, 32, 32)))
    show("swap", run, *"--tokens all --count 2 --seed 5".split())
    trained, (codes, noise) = opened(run, "--seed", "5"), drawn.pop()
    source, target = (trained.codes(x) for x in trained.images(4).split(2))
    assert torch.equal(codes[:2], source) and torch.equal(noise, noise[:2].repeat(7, 1, 1, 1))
    for i, got in zip(ORDER, codes[2:].split(2), strict=True):
        expected = source.clone()
        expected[:, i] = target[:, i]
        assert torch.equal(got, expected)
    show("traverse", run, "--count", 3, "--tokens", 4, 0)
    seen = trained.codes(trained.load(range(300)))  # (300, 6) or (300, 6, 8)
    one_of = lambda rows, code: (rows - code).flatten(1).abs().amax(1).min() < 1e-5
    for i, (codes, _) in zip([4, 0], drawn, strict=True):  # its own, three with one token swept
        assert all(torch.equal(codes[0, j], codes[2, j]) for j in range(6) if j != i)
        assert all(one_of(seen[:, i:i + 1], code) for code in codes[:, i])
        if seen.ndim == 2:
            _, low, middle, high = codes[:, i]
            assert seen[:, i].quantile(0.02) >= low < middle < high >= seen[:, i].quantile(0.98)
    show("generate", run, "--count", 16)
    mixed = drawn[-1][0]
    assert all(one_of(seen[:, j:j + 1], mixed[b, j]) for b in range(16) for j in range(6))
    assert not all(one_of(seen, code) for code in mixed)  # combinations that are in no image


def test_attention_is_drawn_at_its_place_and_averaged():
    attention = torch.zeros(1, 16, 2)
    attention[0, 1 * 4 + 3, 1] = 1.0  # row 1, column 3 of 4 x 4, second token
    maps = sample.attention_maps([[attention]], 64)
    assert maps[0, 0].max() == 0 and maps[0, 1, 16:32, 48:].sum() > 0.5 * maps.sum()
    records = [[torch.full((1, P, 1), value) for value in values]  # two layers, two calls
               for P, values in [(16, (1., 2.)), (4, (3., 5.))]]
    assert torch.equal(sample.attention_maps(records, 8), torch.full((1, 1, 8, 8), 2.75))


@pytest.mark.parametrize("words, columns, rows, heading", [
    ("reconstruct {0}/run --count 9 --sampler ddim --steps 3", 8, 3, 0),
    ("traverse {0}/vector --count 3 --steps 2", 5, 2, 1),
    ("attention {0}/direct --count 2 --tokens 0 2 4", 2, 4, 0),
    ("traverse {0}/run --gif --count 3 --steps 2", 4, 1, 0),
    ("generate {0}/adagn --count 10 --steps 2", 8, 2, 0)])
def test_every_picture_has_its_rows_and_columns(runs, capsys, words, columns, rows, heading):
    show(*words.format(runs).split(), "--out", "picture.png")
    picture = Image.open("picture.png")
    assert picture.height == rows * 131 + (28 if heading else 3)  # 32 pixels four times, a gap of 3
    assert columns * 131 < picture.width < columns * 131 + 200
    assert picture.is_animated == ("--gif" in words)
    if words[0] == "r":
        table = re.findall(r"^[fsd][a-z0-9, ]+? {2,}(\S+) +(0\.\S+)", capsys.readouterr().out, re.M)
        assert len(table) == rows - 1 and all(-1 <= float(ssim) <= 1 for ssim, mse in table)


def test_kl_and_worth_are_closed_forms_and_complexity_a_count(runs, capsys):
    show("kl", "--out", "kl.png")
    t, *rows = (line.split()[1:] for line in capsys.readouterr().out.splitlines()[:5])
    for name, nats in zip(encdiff.SCHEDULES, rows, strict=True):
        exact = encdiff.kl_bottleneck(encdiff.beta_schedule(name))[np.array(t, int) - 1]
        assert np.array(nats, float) == approx(exact.numpy(), rel=1e-3)
    show("complexity", runs / "run", "--steps", 3)
    count = sum(map(torch.numel, train.load_run(runs / "run")[0].denoiser.parameters()))
    assert f"denoiser {count:,} " in re.sub(" +", " ", capsys.readouterr().out)
    args = sample.parse(f"worth {runs}/run --count 6 --out worth.png".split())
    run, level = sample.Trained(args), 100 / 127.5  # of the first factor, in grey levels
    # For worth the latent is the first factor alone, one-hot, and the denoiser is exact.
    one_hot = lambda x: F.one_hot(((x[:, 0, 0, 0] + 1) / level).round().long(), 3).float()
    run.model.latents = run.codes = lambda images: one_hot(images)[:, :, None, None]
    run.model.tokens, run.model.latent_shape = lambda codes: codes, (3, 1, 1)
    abar = lambda t: run.model.alpha_bar[t][:, None, None, None]
    run.model.denoiser.forward = lambda z, t, z0: (z - abar(t).sqrt() * z0) / (1 - abar(t)).sqrt()
    sample.worth(run, args)
    t, a, b = (line[14:].split() for line in capsys.readouterr().out.splitlines()[:3])
    abar = run.model.alpha_bar[np.array(t, int)]  # two of three numbers are wrong, each by 1
    assert np.array(a, float) == approx((2 / 3 * abar / (1 - abar)).numpy(), rel=2e-3, abs=1e-4)
    assert np.array(b, float) == approx(0, abs=1e-4)


def test_curves_are_straight_squares_as_large_as_they_should(runs, capsys):
    show("curves", runs / "run", runs / "adagn", "--out", "curves.png")
    for logarithmic, ys in [(False, (0, 1, 2)), (True, (1, 10, 100)), (True, (-1, 0, 1))]:
        picture = sample.plot("", "", {"name": [*zip((0, 1, 2), ys)]}, logarithmic=logarithmic)
        red, _, blue = np.asarray(picture)[:, :800].transpose(2, 0, 1)  # without the legend
        y, x = ((red < 100) & (blue > 130)).nonzero()  # -1 has no logarithm: a linear axis
        assert np.ptp(x) > 500 and np.corrcoef(x, y)[0, 1] < -0.999
    show("importance", runs / "run", "--out", "i.png")
    pixels = np.asarray(Image.open("i.png"))
    # The area of a square is its importance: 1.0 of either factor in all, of one 0.1 twice.
    areas = [(pixels == colour).all(-1).sum() for colour in sample.PALETTE[:2]]
    assert areas[0] == approx(areas[1], rel=0.05) and min(areas) > 38**2
    for name, seed, *reached in [("a", 0, .8), ("b", 1, .6), ("c", 2)]:  # c is not finished
        shutil.copytree(runs / "run", name)
        write(f"{name}/config.json", json.dumps({**saved(name)["config"], "seed": seed}))
        write(f"{name}/metrics.json", json.dumps(dict(zip(["disentanglement"], reached))))
    show("argument", "a", "b", "c", "nothing.pt")
    assert re.search("(left out: .*){2} 2 +0.700 +0.600 +0.800 ", capsys.readouterr().out, re.S)


def test_codes_and_an_exported_file_are_used_like_the_run(runs, monkeypatch, capsys):
    show("encode", runs / "run", "--out", "codes.npz")
    metrics.main("codes.npz --train 200 --test 100".split())
    assert "disentanglement" in capsys.readouterr().out
    np.savez("others.npz", images=np.zeros((3, 40, 30, 3), np.uint8))
    show("encode", runs / "vector", "--data", "others.npz", "--out", "others' codes.npz")
    trained = opened(runs / "run")
    with np.load("codes.npz") as arrays, np.load("others' codes.npz") as others:
        assert_close(torch.from_numpy(arrays["codes"]), trained.codes(trained.load(range(300))))
        assert (arrays["indices"] == np.arange(300)).all() and (arrays["factors"] == FACTORS).all()
        assert others["codes"].shape == (3, 6, 8) and "factors" not in others
    show("export", runs / "run", "small.pt")
    monkeypatch.setattr(sample, "SHIPPED", Path("small.pt"))
    show("swap", "--count", 2, "--steps", 3)
    assert "no RUN given" in capsys.readouterr().out and Path("swap.png").exists()
    (half, *about), (whole, *of_run) = map(train.load_run, ("small.pt", runs / "run"))
    assert about[0] == of_run[0] and about[1]["scores"] == of_run[1]["scores"]
    assert_close(half.state_dict(), whole.state_dict(), rtol=1e-3, atol=1e-4)


def serve(run):
    """The page of a run -> ask, where ask(path, fields, **headers) -> (status, text)."""
    shown, words = Queue(), ["explore", str(run), "--seed", "3"]
    with mock.patch("webbrowser.open", shown.put):
        threading.Thread(target=sample.main, args=(words,), daemon=True).start()
        address = shown.get(timeout=60).strip("/").partition("//")[2]

    def ask(path, fields=(), **headers):
        client = http.client.HTTPConnection(address, timeout=60)
        client.request("GET", f"{path}?{urllib.parse.urlencode(fields)}", headers=headers)
        reply = client.getresponse()
        return reply.status, reply.read().decode()

    return ask


@pytest.mark.parametrize("run", ["run", "vector", "direct", "adagn"])
def test_the_page_draws_what_its_sliders_say(runs, run):
    shutil.copytree(runs / run, "copy")
    content = saved("copy")
    for value in [v for name, v in content["ema"].items() if name.startswith("denoiser.")]:
        value += 0.1 * torch.randn(value.shape)  # so that it reads its tokens
    torch.save(content, "copy/checkpoint.pt")
    ask, trained = serve("copy"), opened("copy")
    status, page = ask("/")
    setup = json.loads(re.search(r"const setup = (.*), \$ = ", page)[1])
    assert status == 200 and not re.search(r"(src|href)=.?(http|//)", page)
    assert run == "direct" or [token["i"] for token in setup["tokens"]] == ORDER
    drawn = lambda tokens: json.loads(ask("/draw", {**GOOD, "tokens": tokens})[1])
    own, code = drawn("s,s,s,s,s,s"), trained.codes(trained.load([7, 2]))
    z = torch.randn(1, *trained.model.latent_shape, generator=torch.Generator().manual_seed(1))
    half = torch.cat([code[1:, :3], code[:1, 3:]], 1)
    for codes, tokens in [(code[:1], "s,s,s,s,s,s"), (half, "t,t,t,s,s,s"),
                          (code[:1], ",".join(map(str, own["places"][0])))]:
        picture = Image.open(urllib.request.urlopen(drawn(tokens)["images"][2]))
        image = train.to_bytes(trained.draw(codes, z, steps=3)[0]).permute(1, 2, 0)
        assert_close(torch.from_numpy(np.array(picture)), image, rtol=0, atol=1)
    moved = f"{own['places'][0][0] + 300},s,s,s,s,s"
    with ThreadPoolExecutor(4) as pool:  # requests of others at the same time change nothing
        first, other, *more = pool.map(drawn, ["s,s,s,s,s,s", moved] * 4)
    assert first == own and other["images"][2] != own["images"][2] and more == [first, other] * 3
    assert len(own["maps"]) == (0 if run == "adagn" else 6)


def test_the_page_refuses_strangers_and_nonsense(runs):
    ask = serve(runs / "run")
    for name, value in [("Host", "evil.example"), ("Origin", "http://evil.example"),
                        ("Origin", "null"), ("Origin", "http://127.0.0.1:1")]:
        assert ask("/draw", GOOD, **{name: value})[0] == 403 == ask("/", **{name: value})[0]
    for wrong in [{"source": -1}, {"source": 300}, {"target": "x"}, {"noise": 2**70}, {"steps": 0},
                  {"steps": 10**6}, *({"tokens": first + ",s" * 5} for first in
                                      ("s,s", "nan", "1e30", "u"))]:
        assert ask("/draw", {**GOOD, **wrong})[0] == 400, wrong
    assert [ask("/draw")[0], ask("/../train.py")[0], ask("/draw", GOOD)[0]] == [400, 404, 200]


@pytest.mark.parametrize("words, said", [
    ("swap {0}/moved --count 1", "say where it is with --data"),
    ("importance {0}/direct", "has no importance matrix (no labels)"),
    ("explore {0}/run --port 70000", "--port 70000 cannot be used"),
    ("swap {0}/unfinished", "has not finished its first stage"),
    ("swap {0}/damaged", "metrics.json cannot be read"),
    ("swap {0}/run --tokens 1 6", "--tokens is 6; expected 0 to 5"),
    ("swap {0}/run --count 151", "302 images are needed; expected at most 300"),
    ("swap {0}/run --steps 1 --count 1 --out {0}/run", "cannot write"),
    ("attention {0}/adagn --count 1 --steps 1", "no cross-attention"),
    ("curves {0}/damaged", "no log of this version")])
def test_what_is_wrong_is_said_in_one_line_and_nothing_written(runs, words, said):
    before = listing(runs)
    refused(lambda: show(*words.format(runs).split()), said)
    assert listing(runs) == before


# ---- Training -----------------------------------------------------------------------------------

# 300 images of two factors; six tokens' importance for these; the order in which rows come.
FACTORS = all_combinations(3, 4)[np.arange(300) % 12]
IMPORTANCE = [[.0, .1], [.6, .0], [.0, .0], [.0, .8], [.4, .0], [.0, .1]]
ORDER = [1, 4, 3, 0, 2, 5]
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


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
    dataset: 3 x 4 colours of two halves; and of damaged runs. Nothing there is to be changed."""
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
    good = saved(folder / "run")
    for name, change in [("unfinished", {"stage": "first stage"}), ("damaged", {}),
                         ("moved", {"config": {**good["config"], "data": "/no/such.npz"}})]:
        write(folder / name / "checkpoint.pt", "")
        torch.save({**good, **change}, folder / name / "checkpoint.pt")
    write(folder / "damaged/metrics.json", "{"), write(folder / "damaged/log.csv", "a,b\n1,2\n")
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
    """Send the process these signals, {step: number}; returns the count of all runs' steps."""
    note, steps = train.Run.note, itertools.count(1)

    def note_and_signal(*arguments):
        signal.raise_signal(numbers.get(next(steps), 0))  # 0: none
        note(*arguments)

    patch.setattr(train.Run, "note", note_and_signal)
    return steps


@pytest.mark.parametrize("options, steps, stops", [  # in warm-up, rounding, at stage 1's end, later
    (dict(score_every=6), 24, {3: INT, 7: TERM, 12: HUP, 17: INT, 23: HUP}),
    (dict(model="vae", vae_loss="annealed"), 12, {5: TERM}),
    (dict(first_stage="pixels"), 12, {5: TERM})], ids=["encdiff", "vae", "pixels"])
def test_interruptions_leave_the_same_bits(options, steps, stops, whole, monkeypatch):
    unbroken = whole if steps == 24 else make_run("unbroken", **options)
    done, handlers = signals(monkeypatch, stops), [*map(signal.getsignal, (INT, TERM, HUP))]
    for k in range(len(stops)):
        with pytest.raises(KeyboardInterrupt, match="--resume parts"):
            resume("parts") if k else make_run("parts", **options)
    resume("parts")
    assert next(done) == steps + 1 and equal(weights("parts"), weights(unbroken))
    columns = ("stage", "step", "lr", "mse")
    assert log("parts", *columns) == log(unbroken, *columns)
    assert handlers == [*map(signal.getsignal, (INT, TERM, HUP))]


def test_a_moved_run_goes_on_with_moved_data(whole, folder, monkeypatch):
    shutil.copy(TINY["data"], "toy.npz")
    np.savez("other.npz", images=noise(300, 32, 32), labels=FACTORS)
    signals(monkeypatch, {17: INT})
    with pytest.raises(KeyboardInterrupt):
        make_run("run", data="toy.npz")
    Path("there/deep").mkdir(parents=True)
    Path("run").rename("there/moved"), Path("toy.npz").rename("there/data.npz")
    monkeypatch.chdir("there/deep")
    refused(lambda: resume("../moved"), "toy.npz", "--data")
    refused(lambda: resume("../moved", data="../../other.npz"), "--data is", "digest")
    resume("../moved", data="../data.npz")
    assert equal(weights("../moved"), weights(whole))
    assert train.load_run("../moved")[1].data == str(folder / "there/data.npz")


def test_a_first_stage_is_borrowed_its_encoder_stops(whole, monkeypatch):
    shutil.copytree(whole, "lender")
    make_run("borrower", first_stage="lender", seed=7)
    shutil.rmtree("lender")  # what it lent is known
    lent, got = train.load_run(whole)[0], train.load_run("borrower")[0]
    assert equal(lent.first_stage.state_dict(), got.first_stage.state_dict())
    ends = [json.loads(Path(run, "metrics.json").read_text()) for run in (whole, "borrower")]
    assert ends[0]["tflop"] == ends[1]["tflop"]  # what was borrowed counts
    assert not equal(lent.encoder.state_dict(), got.encoder.state_dict())
    monkeypatch.setitem(train.FIRST_STAGE["tiny"], "encoder_steps", 6)
    short, long = (train.load_run(make_run(f"{steps}", vq_steps=steps, steps=0))[0].first_stage
                   for steps in (20, 40))  # whose learning rates part after step 8
    assert equal(short.encoder.state_dict(), long.encoder.state_dict())
    assert not equal(short.decoder.state_dict(), long.decoder.state_dict())


def test_threads_leave_the_cores_that_others_use(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(train.time, "process_time", lambda: 1.0)
    monkeypatch.setattr(Path, "read_text", lambda path: "cpu  200 100 200 700 80 6 4 90")
    machine = train.Machine("cpu")
    assert machine.others == (510 - 100 * (os.nice(0) < 1)) / os.sysconf("SC_CLK_TCK") - 1
    machine.threads = 3
    with mock.patch("torch.set_num_threads") as chosen, mock.patch("os.cpu_count", lambda: 4):
        for load in (0.3, 1.3, 1.7, 9, 0):  # cores that others used in ten seconds
            machine.looked, machine.others = machine.looked - 10, machine.others - 10 * load
            machine.leave_busy_cores()
    assert chosen.call_args_list == [((n,),) for n in (3, 3, 2, 1, 3)]


def test_noise_is_weak_at_first_learning_rates_at_both_ends(whole, monkeypatch):
    drawn, loss = [], encdiff.EncDiff.loss
    monkeypatch.setattr(encdiff.EncDiff, "forward",
                        lambda *inputs: drawn.append(inputs[2:3]) or loss(*inputs))
    make_run("run", noise_order="weak-first", batch=64)
    early, late = torch.stack([t for t, in filter(None, drawn)]).double().split((4, 8))
    lowest = 210**2 / 20**3  # the mean of the lowest of three numbers in 1 to 20
    assert early.mean().item() == approx(lowest, abs=1.2) and early.min() == 1
    assert late.mean().item() == approx(21 - lowest, abs=1.2) and late.max() == 20
    rates = [train.learning_rate(2.0, step, 1000, 0.4) for step in (0, 49, 99, 600, 800, 999)]
    assert rates == approx([0.02, 1.0, 2.0, 2.0, 1.0, 0.005])


@pytest.mark.parametrize("precision, apart", [("bf16", 1e-3), ("fp32", 0.05)])
def test_muon_is_torchs_and_adamw_takes_the_rest(precision, apart):
    model = tiny_model()
    optimizer = train.Optimizer(model, train.Config(**{**TINY, "precision": precision}), 1.0)
    inner, last = optimizer.parts[1].param_groups[0]["params"], model.denoiser.conv_out.weight
    assert len(inner) > 20 and model.denoiser.middle[0].conv1.weight in set(inner) - {last}
    twins = [torch.nn.Parameter(w.detach().flatten(1).clone()) for w in inner]
    theirs = torch.optim.Muon(twins, 1e-2, train.WEIGHT_DECAY)  # bf16, with ten times AdamW's rate
    for _ in range(3):
        last.grad = torch.ones_like(last)
        for w, twin in zip(inner, twins):
            w.grad, twin.grad = (noise := torch.randn_like(w)), noise.flatten(1)
        optimizer.step(1e-3), theirs.step()
    for w, twin in zip(inner, twins):  # each step has the norm 1e-2 times the root of its rank
        assert (w.flatten(1) - twin).norm() <= apart * 2e-2 * min(twin.shape)**0.5
    assert last.sum().item() == approx(-3e-3 * last.numel(), rel=0.01)


def test_training_lowers_the_loss_and_gives_the_average(whole, capsys):
    make_run("run", steps=60, lr=3e-2)
    losses = [float(loss) for stage, loss in log("run", "stage", "loss") if stage[0] == "j"]
    assert losses[-1] < 0.9 * losses[0] and "training 20/60  loss" in capsys.readouterr().out
    kept, (model, _, about) = weights("run"), train.load_run("run")
    state = model.state_dict()
    assert equal(state, {name: kept.get("ema." + name, kept[name]) for name in state})
    assert about["step"] == 60 and about["data"]["count"] == 300 and about["scores"]["tflop"] > 0
    other = train.load_run("run")[0]
    for v, new in zip(state.values(), other.state_dict().values()):
        v.fill_(0), new.fill_(1)
    train.update_average(model, other, 0.9)  # a tenth of the way, but not in stage 1
    means = {name: v.mean().item() for name, v in state.items() if v.is_floating_point()}
    assert means == approx({k: 0.1 * (k[:12] != "first_stage.") for k in means}, abs=1e-4)


def test_scores_of_scalars_are_those_of_tokens_along_a_line(rendered):
    model, axes = tiny_model(size=64).eval(), torch.randn(6, 8)
    run = mock.Mock(config=train.Config(**TINY), machine=train.Machine("cpu"))
    model.encoder.out.weight.data *= 1000  # or untrained codes count as not active
    # A token that is its scalar along some direction must score as the scalar does.
    model.token_map.forward = lambda codes: codes[..., None] * axes
    scores = train.score(run, rendered, model, 2000, mapped=True)
    assert [scores[f"mapped_{k}"] for k in train.Run.SCORES] == approx(
        [scores[k] for k in train.Run.SCORES], abs=0.02)
    assert 0 < scores["disentanglement"] < 0.5 and len(scores["importance"]) == 6


def launch(*words, launcher=(), run=subprocess.run, **options):
    code = ("import sys; sys.path.insert(0, sys.argv.pop(1)); import test_encdiff, train\n"
            "train.score = lambda *a, **k: {}\n"
            "with train.one_line_errors(): train.main(sys.argv[1:])")
    return run([*launcher, sys.executable, "-c", code, str(HERE), *words], **options)


def test_two_processes_train_like_one(whole):
    options = dict(TINY, encoder="cnn", dropout=0.0, steps=8)  # BatchNorm and dropout differ
    make_run("one", **options)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--no-python"]
    launch("--out", "two", *flags(**options), launcher=torchrun, check=True, capture_output=True)
    one, two = np.array(log("one", "loss"), float), np.array(log("two", "loss"), float)
    assert len(one) == 5 and one == approx(two, abs=1e-3)


# ---- What a user can get wrong ------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    "--batch 0", "--steps many", "--lr nan", "--ema 1", "--seed -1", "--channels 30", "--size 48",
    "--vq-steps 0", "--first-stage shallow", "--multipliers 0", "--multipliers 1 2 2 2 2 2",
    "--learning-rate 1", "--tokens", "--resume nowhere", "--data nowhere", "--first-stage nowhere",
    "--decoder direct --conditioning adagn", "--regularizer sparse --tokens vector",
    "--num-tokens 40 --regularizer orthogonal", "--device cuda"])
def test_a_bad_flag_is_one_line_that_names_it(words, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flag, others = words.split()[0], [*flags(**TINY), "--out", "run"] * ("--resume" not in words)
    said = "nowhere" if "nowhere" in words else flag
    refused(lambda: train.main([*others, *words.split()]), said)
    assert not Path("run").exists()


def test_what_may_not_change_and_other_runs_are_refused(whole):
    kept = (whole / "checkpoint.pt").read_bytes()
    for change, said in [({"dropout": 0.5}, "dropout 0.1 -> 0.5"), ({"out": "other"}, "no --out"),
                         ({"steps": 5}, "--steps is 5; expected 12 or more")]:
        refused(lambda: resume(whole, **change), said)
    refused(lambda: resume(whole / "checkpoint.pt"), "folder")
    refused(lambda: make_run(whole), "or --resume")
    with train.RUNNING:  # as in a notebook's thread
        refused(lambda: make_run("new"), "another thread")
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


@pytest.mark.parametrize("moment, ending", [("data.open_dataset", TERM), ("train.score", INT)])
def test_a_signal_before_and_after_training_is_one_line(moment, ending, whole, capsys):
    with mock.patch(moment, lambda *a, **k: signal.raise_signal(ending)):
        with pytest.raises(SystemExit) as ended, train.one_line_errors():
            make_run("run")
    assert ended.value.code == 130 and capsys.readouterr().err.count("\n") == 1
    assert Path("run/checkpoint.pt").exists() == (moment == "train.score")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_keeps_the_last_good_checkpoint(whole):
    write("run/checkpoint.pt", (whole / "checkpoint.pt").read_bytes())
    Path("run/checkpoint.pt.tmp").symlink_to("/dev/full")
    refused(lambda: resume("run", steps=20), "No space left")
    assert equal(weights("run"), weights(whole)) and not list(Path("run").glob("*.tmp"))


def test_a_loss_that_is_not_finite_ends_with_advice_that_works(whole, monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    scales = iter([1.0] * 14 + [math.nan] + [1.0] * 10)  # in the third joint step; then ten more
    clip = train.clip_grad_norm_
    monkeypatch.setattr(train, "clip_grad_norm_", lambda *given: clip(*given) * next(scales))
    line = refused(lambda: make_run("run", lr=3e-3), "step 3 of the joint training")
    assert saved("run")["step"] == 2
    train.main(line.split("train.py ")[1].split())
    assert train.load_run("run")[1].lr == 1e-3 and not [*scales]


def test_a_closed_pipe_does_not_end_a_run(runs):
    with launch("--out", "run", *flags(**TINY), run=subprocess.Popen, stdout=-1,
                stderr=-1) as process:
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == 0 and b"Error" not in error and saved("run")["step"] == 12


def test_an_odd_folder_is_used_or_the_reason_said(whole, monkeypatch):
    write("\u7d75.npz", NPZ)
    terminal = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert len(data.open_dataset("\u7d75.npz")) == 4
    make_run("\u7d75", steps=0, first_stage=whole)
    locks = train.sqlite3.OperationalError("locking protocol")  # on a network's file system
    with mock.patch("sqlite3.connect", side_effect=locks):
        make_run("net", steps=0, first_stage=whole)
    for said in ["converting \\u7d75", "are in \\u7d75", "net cannot be locked (locking protocol)"]:
        assert said in terminal.buffer.getvalue().decode()

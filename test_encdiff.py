"""What we are sure of: each test is one claim about the method, or about what happens to a user.

WHERE     Read last, or beside the file in question: the sections follow the files.
PAPER     arXiv 2402.09712; the tests with eq_ in their names hold its equations.
SHAPES    as in encdiff.py; models and runs have the sizes of `tiny_values`, images of 32 x 32.
IDEA      Code that is compared with itself cannot fail. So each test has another way to the same
          number: a closed form, a loop, torch's own operation, a file built by hand, a second run.
DIFFERS   Nothing here shows that the method disentangles: that takes a real run (README, Results).
TRY       python -m pytest -q                ->   every claim, in a few minutes
          python -m pytest -q -k eq_         ->   the equations alone, in seconds
"""
import argparse
import csv
import functools
import http.client
import io
import json
import math
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import tracemalloc
import urllib.parse
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from unittest import mock

import h5py
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from pytest import approx
from torch.distributions import Normal, kl_divergence
from torch.optim import swa_utils
from torch.testing import assert_close
from torch.utils.data import DataLoader

import data
import encdiff
import metrics
import sample
import train
import unet
import vq

HERE = Path(__file__).parent
os.environ["OMP_NUM_THREADS"] = "1"  # as their number decides last bits
torch.set_num_threads(1)


# ---- What the tests share -----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test works in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(run, *words):
    """run() raises an error of one line that has all these words; returns the line."""
    with pytest.raises((ValueError, OSError)) as caught:
        run()
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert str(word) in line
    return line


def tiny_values(**changes):
    """Values of a Config with which a training step takes milliseconds."""
    values = dict(
        size=32, first_stage="linear", encoder="cnn_bn", encoder_width=8, timesteps=20,
        log_every=4, num_tokens=6, token_dim=8, channels=16, multipliers=(1, 2), blocks=1, heads=4,
        vq_steps=12, steps=12, batch=8, optimizer="muon", score_every=0, precision="fp32",
    )
    return {**values, **changes}


def tiny_model(**changes):
    """An untrained model of these values, always with the same weights."""
    torch.manual_seed(0)
    return train.build_model(train.Config(**tiny_values(**changes)))


def random_images(count=4, size=32):
    """Images (count, 3, size, size) in [-1, 1], always the same."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, size, size, generator=generator) * 2 - 1


def few_steps(model, images):
    """Train a little, so that the layers that begin as zeros let all others have an effect."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(4):
        optimizer.zero_grad()
        model.loss(images).backward()
        optimizer.step()


# Datasets and runs
FACTORS = np.stack(np.unravel_index(np.arange(300) % 12, (3, 4)), axis=1)
INTERRUPT = signal.SIGINT
KILL = signal.SIGTERM
HANG_UP = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none


@pytest.fixture(autouse=True)
def usual_signals():
    """A shell's job in the background begins with Ctrl-C ignored, nohup with a closed terminal."""
    before = {number: signal.getsignal(number) for number in (INTERRUPT, KILL, HANG_UP)}
    signal.signal(INTERRUPT, signal.default_int_handler)
    signal.signal(HANG_UP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler or signal.SIG_DFL)


def save_pictures(path, **arrays):
    """A dataset of 300 pictures of 32 x 32: the upper half in 3 reds, the lower one in 4 greens."""
    red, green = FACTORS[:, :, None, None].swapaxes(0, 1)  # (300, 1, 1) each
    images = np.zeros((300, 32, 32, 3), np.uint8)
    images[:, :16, :, 0] = 100 * red
    images[:, 16:, :, 1] = 80 * green
    np.savez(path, images=images, **arrays)
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """The file of a dataset without labels, so that runs with it end without scores."""
    return save_pictures(tmp_path_factory.mktemp("pictures") / "pictures.npz")


def train_new(folder, dataset, **changes):
    """A new run with tiny values, in this folder, of this dataset: a file or an opened one."""
    if isinstance(dataset, (str, Path)):
        changes["data"] = str(dataset)
        dataset = data.open_dataset(dataset, 32)
    config = train.Config(**tiny_values(**changes))
    train.validate(config)
    run = train.Run(folder, config, train.Backend("cpu"), dataset.identity)
    train.train_run(run, dataset)
    return folder


def go_on(folder, dataset, **changes):
    """Resume the run in this folder."""
    config, checkpoint = train.resumed_config(Path(folder), changes)
    run = train.Run(folder, config, train.Backend("cpu"), dataset.identity, checkpoint)
    train.train_run(run, dataset)


def flags(**changes):
    """Tiny values as the words of a command line, as far as these have a flag."""
    words = ["--preset", "paper"]  # its values are Config's defaults
    for name, value in tiny_values(**changes).items():
        if name not in ("encoder_width", "timesteps", "log_every", "heads"):
            several = value if isinstance(value, tuple) else [value]
            words += ["--" + name.replace("_", "-"), *several]
    return words


@pytest.fixture(scope="session")
def whole_run(pictures):
    """A run that was never interrupted; nothing there is to be changed."""
    return train_new(pictures.parent / "whole", pictures, score_every=6)


@pytest.fixture
def copied_run(whole_run):
    """A copy of it, which may be changed."""
    return shutil.copytree(whole_run, "run")


def saved(folder):
    return torch.load(Path(folder, "checkpoint.pt"), weights_only=True)


def save_checkpoint(content, folder):
    Path(folder).mkdir(exist_ok=True)
    torch.save(content, Path(folder, "checkpoint.pt"))


def weights(folder):
    """All weights in the checkpoint, the averaged ones under names of their own."""
    content = saved(folder)
    averaged = {f"average.{name}": value for name, value in content["ema"].items()}
    return {**content["model"], **averaged}


def equal(left, right):
    """Whether two dicts of tensors hold the same bits."""
    if left.keys() != right.keys():
        return False
    return all(torch.equal(left[name], right[name]) for name in left)


def log(folder, *columns):
    with open(Path(folder, "log.csv"), newline="") as file:
        return [[row[column] for column in columns] for row in csv.DictReader(file)]


class Interrupted:
    """A dataset that sends this process signals: {number of the reading of images: signals}."""

    def __init__(self, path, signals):
        self.dataset = data.open_dataset(path, 32)
        self.signals = signals
        self.readings = 0

    def __getattr__(self, name):
        return getattr(self.dataset, name)

    def __len__(self):
        return len(self.dataset)

    def images(self, indices):
        self.readings += 1
        for number in self.signals.get(self.readings, []):
            signal.raise_signal(number)
        return self.dataset.images(indices)


# ---- The method ---------------------------------------------------------------------------------


class Function(nn.Module):
    """A network that is a function of its inputs."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def no_noise(z_t, t, tokens):
    return torch.zeros_like(z_t)


def half_of_it(z_t, t, tokens):
    return z_t / 2


def method(denoiser=no_noise, schedule="cosine", timesteps=1000, kind=encdiff.EncDiff):
    """EncDiff for images of 4 x 4 pixels, whose latents, codes and tokens are these pixels."""
    return kind(vq.Pixels(1), nn.Flatten(), nn.Identity(), Function(denoiser),
                (3, 4, 4), schedule, timesteps)


def root_mean_square(z):
    return z.flatten(1).square().mean(1).sqrt()


every_schedule = pytest.mark.parametrize("schedule", encdiff.SCHEDULES)


def test_the_encoder_has_the_parameters_of_table_6():
    convolutions = [(3, 64, 7), (64, 128, 4), (128, 256, 4), (256, 256, 4), (256, 256, 4)]
    linear = [(4 * 4 * 256, 256), (256, 256), (256, 20)]
    expected = 0
    for c_in, c_out, side in convolutions:
        expected += c_in * c_out * side**2 + c_out
    for c_in, c_out in linear:
        expected += c_in * c_out + c_out

    encoder = encdiff.CNNEncoder(20)
    assert sum(p.numel() for p in encoder.parameters()) == expected == 3_882_644
    assert encoder(random_images(2, 64)).shape == (2, 20)


def test_a_token_is_an_mlp_of_its_scalar():
    token_map = encdiff.ScalarTokens(3, 8)
    codes = torch.randn(4, 3)
    for i in range(3):
        layers = [nn.Linear(1, 64), nn.ELU(), nn.Linear(64, 128), nn.ELU(), nn.Linear(128, 8)]
        mlp = nn.Sequential(*layers)
        for layer, weight, bias in zip(mlp[::2], token_map.weights, token_map.biases):
            layer.weight.data = weight[i].t()
            layer.bias.data = bias[i, 0]
        assert_close(token_map(codes)[:, i], mlp(codes[:, i:i + 1]))


# The noise schedules
def alpha_bars(name, steps=1000):
    return encdiff.alpha_bars(encdiff.beta_schedule(name, steps))


# beta_1, beta_T, and what of beta is a straight line.
LINES = {
    "linear": (0.0015, 0.0155, torch.sqrt),
    "sqrt_linear": (0.0015, 0.0155, torch.clone),
    "sqrt": (0.0015**0.5, 0.0155**0.5, torch.square),
}
every_line = pytest.mark.parametrize("name", LINES)


@every_line
def test_a_schedule_is_a_line_of_its_kind(name):
    start, end, straight = LINES[name]
    betas = encdiff.beta_schedule(name)
    assert betas[0].item() == approx(start)
    assert betas[-1].item() == approx(end)
    bends = straight(betas).diff(n=2)
    assert bends.abs().max() < 1e-12


@every_line
@pytest.mark.parametrize("steps", [20, 4000])
def test_another_T_leaves_as_much_signal(name, steps):
    usual = alpha_bars(name)[-1].log().item()
    reached = alpha_bars(name, steps)[-1].log().item()
    assert reached == approx(usual, rel=0.01)


@pytest.mark.parametrize("steps", [37, 1000])
def test_the_cosine_schedule_is_a_squared_cosine(steps):
    alpha_bar = alpha_bars("cosine", steps)
    start = math.cos(0.008 / 1.008 * math.pi / 2)
    for t in range(steps):
        share = (t / steps + 0.008) / 1.008
        expected = math.cos(share * math.pi / 2) / start
        assert alpha_bar[t].item() == approx(expected**2)
    assert alpha_bar[steps] == approx(0.001 * alpha_bar[steps - 1])  # it would be 0


@pytest.mark.parametrize("shape", [(6,), (3, 4, 4), (2, 3, 3, 3)])
def test_eq_2_is_what_t_steps_of_eq_1_do_for_latents_of_any_rank(shape):
    betas = encdiff.beta_schedule("cosine").tolist()
    z0, noise = torch.randn(2, 4, *shape)
    t = torch.tensor([1, 10, 500, 1000])
    z_t = method().add_noise(z0, t, noise)
    for i in range(4):
        share = 1.0  # of z_0
        variance = 0.0
        for beta in betas[:t[i]]:
            share *= math.sqrt(1 - beta)
            variance = (1 - beta) * variance + beta
        assert_close(z_t[i], share * z0[i] + math.sqrt(variance) * noise[i])


def test_eq_3_is_the_mean_squared_error_of_the_noise():
    model = tiny_model(dropout=0.0, timesteps=1000).eval()
    images = random_images()
    few_steps(model, images)

    t = torch.tensor([1, 2, 600, 1000])
    noise = torch.randn(4, *model.latent_shape)
    total = 0.0
    for i in range(4):  # an image at a time, with eq. (2) written out
        abar = model.alpha_bar[t[i]]
        z0 = model.latents(images[i:i + 1])
        z_t = abar.sqrt() * z0 + (1 - abar).sqrt() * noise[i]
        tokens = model.token_map(model.encoder(images[i:i + 1]))
        error = model.denoiser(z_t, t[i:i + 1], tokens) - noise[i]
        total += error.square().sum()
    assert_close(model.loss(images, t, noise), total / noise.numel())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_refused(dtype):
    model = method(half_of_it).to(dtype)
    images = torch.zeros(2, 3, 4, 4, dtype=dtype)
    for use in (model.loss, model.sample):
        with pytest.raises(ValueError, match="half precision.*expected float32"):
            use(images)


@pytest.mark.parametrize("schedule", encdiff.SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_that_was_in_half_precision_draws_nothing(dtype, schedule):
    model = method(half_of_it, schedule, 100).to(dtype).float()
    with pytest.raises(ValueError, match="was in half precision.*expected float32"):
        model.sample(torch.zeros(2, 3, 4, 4))


def test_a_schedule_of_one_step_draws():
    images = method(half_of_it, "sqrt", 1).sample(torch.zeros(2, 3, 4, 4), steps=1)
    assert images.isfinite().all()


def test_double_precision_changes_digits_alone():
    model = method(half_of_it)
    images, noise = torch.randn(2, 4, 3, 4, 4)
    t = torch.tensor([1, 10, 500, 1000])
    single = model.loss(images, t, noise)
    double = model.double().loss(images.double(), t, noise.double())
    assert double.dtype == torch.float64
    assert double.item() == approx(single.item(), rel=1e-5)


def test_without_diffusion_a_model_in_double_precision_draws():
    config = train.Config(**dict(train.SMALL, variant="direct", channels=8))
    model = train.build_model(config).double()
    images = torch.rand(2, 3, 64, 64).double() * 2 - 1
    model.set_latent_scale(images)
    assert model.loss(images).dtype == torch.float64
    tokens = model.tokens(model.represent(images))
    assert model.sample(tokens, steps=1).isfinite().all()


def product_of_gaussians(t, beta, alpha_bar, z0, z_t):
    """Eq. (4) by Bayes: mean and variance of q(z_t | z_{t-1}) q(z_{t-1} | z_0) in z_{t-1}."""
    before = alpha_bar[t - 1]
    precision = (1 - beta) / beta + 1 / (1 - before)
    from_z_t = (1 - beta).sqrt() / beta * z_t
    from_z_0 = before.sqrt() / (1 - before) * z0
    return (from_z_t + from_z_0) / precision, 1 / precision


@pytest.mark.parametrize("t", [2, 50, 100])
def test_eq_4_is_the_product_of_two_gaussians(t):
    betas = encdiff.beta_schedule("cosine", 100)
    alpha_bar = encdiff.alpha_bars(betas)
    z0, z_t = torch.randn(2, 9).double()
    mean, variance = product_of_gaussians(t, betas[t - 1], alpha_bar, z0, z_t)

    a, b, v = encdiff.posterior(alpha_bar, t)
    assert_close(a * z0 + b * z_t, mean)
    assert_close(v, variance)


VALUES_OF_Z0 = torch.tensor([1.0, 5.0]).double()
VALUES_OF_NOISE = torch.tensor([-1.0, 1.0]).double()  # mean 0, variance 1


@pytest.mark.parametrize("t", [2, 50, 100])
def test_eq_5_is_the_kl_from_the_normal_distribution(t):
    betas = encdiff.beta_schedule("cosine", 100)
    alpha_bar = encdiff.alpha_bars(betas)
    # The KL is quadratic in z_0 and eps, so its mean over four pairs is exact.
    z0, noise = torch.cartesian_prod(VALUES_OF_Z0, VALUES_OF_NOISE).T
    z_t = alpha_bar[t].sqrt() * z0 + (1 - alpha_bar[t]).sqrt() * noise
    mean, variance = product_of_gaussians(t, betas[t - 1], alpha_bar, z0, z_t)
    posterior = Normal(mean, variance.sqrt())
    expected = kl_divergence(posterior, Normal(0.0, 1.0)).mean()

    second_moment = VALUES_OF_Z0.square().mean().item()
    bottleneck = encdiff.kl_bottleneck(betas, second_moment)
    assert_close(bottleneck[t - 1], expected)


# The samplers
WAYS_DOWN = [dict(sampler="ddpm"), dict(sampler="ddim"), dict(sampler="ddim", eta=1.0),
             dict(sampler="dpm")]


@every_schedule
@pytest.mark.parametrize("timesteps", [20, 1000])
@pytest.mark.parametrize("options", WAYS_DOWN, ids=str)
def test_exact_noise_leads_to_z0(schedule, timesteps, options):
    images = random_images(2, 4)

    def exact_noise(z_t, t, tokens):  # eq. (2) solved for it
        abar = model.alpha_bar[t[0]]
        signal = abar.sqrt() * model.latents(images)
        return (z_t - signal) / (1 - abar).sqrt()

    model = method(exact_noise, schedule, timesteps)
    model.set_latent_scale(images)
    reached = model.sample(images, steps=7, **options)
    assert_close(reached, images, atol=1e-3, rtol=0)


@every_schedule
@pytest.mark.parametrize("timesteps", [20, 1000])
def test_a_wrong_estimate_is_as_large_as_the_largest_latent(schedule, timesteps):
    model = method(half_of_it, schedule, timesteps)
    images = random_images(9, 4)
    model.set_latent_scale(images)
    estimate = model.estimate_z0(torch.randn(2, 3, 4, 4), timesteps, torch.zeros(2, 48))

    largest = root_mean_square(images).max() / images.std()
    assert_close(root_mean_square(estimate), largest.expand(2))


def test_an_average_of_all_weights_draws_as_the_model_does():
    model = method(half_of_it)
    average = swa_utils.AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    average.update_parameters(model)

    tokens, noise = torch.zeros(2, 48), torch.randn(2, 3, 4, 4)
    expected = model.sample(tokens, steps=4, noise=noise)
    assert torch.equal(average.module.sample(tokens, steps=4, noise=noise), expected)


def test_ddim_with_eta_1_is_ddpm():
    alpha_bar = encdiff.alpha_bars(encdiff.beta_schedule("cosine", 40))
    z = torch.randn(9).double()

    def predict(z, t):  # any function will do
        return torch.tanh(z) + t / 40

    torch.manual_seed(1)
    expected = encdiff.ddpm(predict, alpha_bar, z)
    torch.manual_seed(1)
    assert_close(encdiff.ddim(predict, alpha_bar, z, steps=40, eta=1.0), expected)


@pytest.mark.parametrize("sampler, order", [(encdiff.ddim, 1), (encdiff.dpm_solver, 2)])
def test_errors_of_a_sampler_fall_with_its_order(sampler, order):
    # If z_0 is N(0, m), the best denoiser and the end of the deterministic path are known.
    m = 0.5
    T = 4096
    alpha_bar = torch.sigmoid(2 * torch.linspace(12, -4, T + 1).double())  # lambda in even steps
    alpha_bar[0] = 1
    variance = alpha_bar * m + 1 - alpha_bar  # of z_t

    def best_estimate(z, t):  # E[z_0 | z_t]
        return alpha_bar[t].sqrt() * m * z / variance[t]

    errors = []
    for steps in (64, 128, 256):
        reached = sampler(best_estimate, alpha_bar, torch.ones(1).double(), steps)
        errors.append(abs(reached - (m / variance[T]).sqrt()).item())
    assert np.diff(np.log2(errors)) == approx([-order, -order], abs=0.15)


NO_TOKENS = torch.zeros(2, 48)
WRONG_USES = [
    (lambda: method(schedule="cosin"), "schedule is 'cosin'; expected one of cosine"),
    (lambda: encdiff.TransformerEncoder(7, queries=2), "7 outputs of 2 queries"),
    (lambda: method().sample(NO_TOKENS, sampler="euler"), "expected one of ddpm, ddim, dpm"),
    (lambda: method().sample(NO_TOKENS, eta=0.5), "eta is 0.5 with sampler 'dpm'"),
    (lambda: method().sample(NO_TOKENS, sampler="ddim", eta=2), "eta is 2; expected 0 to 1"),
    (lambda: method().represent(torch.zeros(1, 3, 64, 64).byte()), "images are torch.uint8"),
    (lambda: encdiff.ScalarTokens(3, 8)(torch.zeros(2, 4)), r"(2, 4); expected (B, 3)"),
    (lambda: encdiff.OrthogonalTokens(3, 8)(torch.zeros(2, 1)), "(2, 1); expected (B, 3)"),
    (lambda: encdiff.EulerTokens(3, 8)(torch.zeros(2, 1)), "(2, 1); expected (B, 3)"),
    (lambda: method().sample(NO_TOKENS, steps=1001), "steps is 1001; expected 1 to 1000"),
    (lambda: method(timesteps=0), "0 timesteps; expected 1 or more"),
    (lambda: method().set_latent_scale(torch.ones(2, 3, 4, 4)), "expected images that differ"),
    (lambda: small_autoencoder()(torch.zeros(1, 3, 64, 64).byte()), "images are torch.uint8"),
    (lambda: method().latents(np.zeros((1, 3, 4, 4))), "images are float64"),
    (lambda: method().set_latent_scale(torch.eye(4).byte()), "images are torch.uint8"),
    (lambda: vq.Quantizer(8, 3)(torch.ones(1, 3, 4, 4).long()), "z is torch.int64"),
    (lambda: vq.Quantizer(8, 3)(torch.ones(1, 3, 4, 4) / 0), "z is not finite"),
    (lambda: vq.codebook_usage([]), "counts are missing"),
    (lambda: vq.codebook_usage([3, -1]), "counts are missing or negative"),
    (lambda: unet.UNet(channels=0), "0 channels; expected one or more"),
]


@pytest.mark.parametrize("use, words", WRONG_USES)
def test_a_wrong_use_of_the_method_is_one_line(use, words):
    refused(use, words)


# The latent
def test_latents_are_not_rounded_and_have_unit_std():
    model = tiny_model()
    images = random_images(70)
    z = model.first_stage.encode(images)
    model.first_stage.quantizer.initialise(z)
    model.set_latent_scale(images)
    assert_close(model.latents(images), z / z.std())


# Its variants
VARIANTS = [{"encoder": name} for name in encdiff.ENCODERS]
VARIANTS += [{"variant": name} for name in train.VARIANTS]
VARIANTS += [{"variant": "vector+adagn"}, {"variant": "vector+direct"}]


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def trained_variant(request):
    """The values of a variant, and its model after a few training steps."""
    model = tiny_model(**request.param).train()
    few_steps(model, random_images())
    return request.param, model


def test_a_variant_learns_in_all_its_parameters(trained_variant):
    _, model = trained_variant
    idle = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any()):
            idle.append(name)
    assert idle == []


def test_a_variant_draws_the_same_after_it_was_saved(trained_variant):
    changes, model = trained_variant
    again = tiny_model(**changes)
    again.load_state_dict(model.state_dict())

    images = random_images()
    pictures = []
    for which in (model.eval(), again.eval()):
        torch.manual_seed(2)
        tokens = which.tokens(which.represent(images))
        pictures.append(which.sample(tokens, steps=3))

    assert pictures[0].shape == images.shape
    assert pictures[0].isfinite().all()
    assert torch.equal(*pictures)


@pytest.mark.parametrize("name", encdiff.ENCODERS)
def test_the_codes_of_an_untrained_encoder_are_no_copies_of_each_other(name):
    encoder = encdiff.ENCODERS[name](20, size=32, width=8)
    fields = random_images(64, size=2)  # four fields of one colour each
    images = nn.functional.interpolate(fields, size=32)
    correlations = torch.corrcoef(encoder(images).T)
    assert (correlations.abs().sum() - 20) / (20 * 19) < 0.6


@pytest.mark.parametrize("outputs, queries", [(6, 6), (12, 6)])
def test_queries_of_the_transformer_do_not_see_each_other(outputs, queries):
    encoder = encdiff.TransformerEncoder(outputs, size=32, width=8, queries=queries)
    images = random_images()
    before = encoder(images).view(4, queries, -1)
    encoder.queries.data[2] = torch.randn(32)
    after = encoder(images).view(4, queries, -1)

    moved = (after - before).abs().amax((0, 2))  # (queries,)
    differs = moved > 1e-6
    assert differs.nonzero().flatten().tolist() == [2]


def test_orthogonal_tokens_are_as_long_as_their_scalars():
    token_map = encdiff.OrthogonalTokens(5, 8)
    codes = torch.randn(4, 5)
    tokens = token_map(codes)
    assert_close(tokens @ tokens.mT, torch.diag_embed(codes**2))


@pytest.mark.parametrize("active", [1, 24])
def test_the_sparse_penalty_is_the_entropy_of_active_codes(active):
    images = torch.zeros(2, 48)
    images[:, :active] = 100.0
    images = images.view(2, 3, 4, 4)
    no_noise_at_all = torch.zeros_like(images)  # then eq. (3) is 0

    model = method(kind=encdiff.SparseEncDiff)
    penalty = model.loss(images, torch.tensor([1, 1]), no_noise_at_all)
    share = math.log(active) / math.log(48)
    assert penalty.item() == approx(model.WEIGHT * share, abs=1e-8)


def test_the_direct_decoder_is_asked_for_z0_itself():
    model = tiny_model(variant="direct", dropout=0.0)
    images = random_images()
    model.set_latent_scale(images)
    few_steps(model, images)

    drawn = model.denoiser(model.token_map(model.encoder(images)))
    expected = (drawn - model.latents(images)).square().mean()
    assert_close(model.loss(images), expected)


def test_an_exact_velocity_is_exact_noise():
    model = method()
    z0, noise = torch.randn(2, 4, 3, 4, 4)
    t = torch.tensor([1, 10, 500, 1000])
    abar = model.alpha_bar[t].view(4, 1, 1, 1)
    velocity = abar.sqrt() * noise - (1 - abar).sqrt() * z0

    network = Function(lambda z_t, t, tokens: velocity)
    denoiser = encdiff.NoiseFromVelocity(network, model.alpha_bar)
    assert_close(denoiser(model.add_noise(z0, t, noise), t, None), noise)


# The toy
TOYS = [dict(), dict(attention=False), dict(predict="velocity", num_factors=4)]


@pytest.mark.parametrize("settings", TOYS, ids=str)
def test_the_toy_learns(settings, capsys):
    torch.manual_seed(0)
    encdiff.toy(steps=60, **settings)
    printed = re.findall(r"loss (\S+)", capsys.readouterr().out)
    losses = [float(word) for word in printed]
    assert len(losses) == 10
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def wall_and_nothing(pictures):
    """Two codes: the brightness of the wall, and a constant."""
    wall = pictures[:, 0, 0, 0]
    return torch.stack([wall, torch.ones_like(wall)], dim=1)


def test_the_toy_shows_which_factor_moves_a_code(capsys):
    encdiff.print_movements(wall_and_nothing, 4)
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert words == [["wall", "@"], ["floor"], ["block"], ["place"]]


def test_the_toy_works_alone_in_an_empty_folder(folder):
    (folder / "encdiff.py").write_bytes((HERE / "encdiff.py").read_bytes())
    code = "import encdiff; encdiff.print_scores(encdiff.toy(steps=3), 3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "step 3/3" in done.stdout
    assert done.stdout.endswith("metrics.py is not beside this file: no scores\n")


@pytest.mark.parametrize("t", [100, 500, 950])
def test_the_best_denoiser_weighs_pictures_by_their_likelihood(t):
    torch.manual_seed(3)
    rises = encdiff.bayes_rise(t, pictures=1)

    torch.manual_seed(3)  # the same picture, the same noise
    factors = torch.randint(5, (1, 4))
    z0 = encdiff.room(factors).double()
    noise = torch.randn_like(z0)
    abar = encdiff.alpha_bars(encdiff.beta_schedule("cosine"))[t]
    z_t = abar.sqrt() * z0 + (1 - abar).sqrt() * noise

    for unknown in range(4):
        total = 0.0
        mean = torch.zeros_like(z_t)
        for value in range(5):
            candidate = factors.clone()
            candidate[0, unknown] = value
            its_noise = (z_t - abar.sqrt() * encdiff.room(candidate)) / (1 - abar).sqrt()
            # How likely that noise is, relative to the true one.
            log_ratio = Normal(0.0, 1.0).log_prob(its_noise) - Normal(0.0, 1.0).log_prob(noise)
            likelihood = log_ratio.sum().exp()
            total += likelihood
            mean += likelihood * its_noise

        error = mean / total - noise  # of E[eps | z_t]
        assert_close(rises[unknown], error.square().mean())


# ---- The denoiser and the first stage -----------------------------------------------------------

OTHER_PRECISIONS = (torch.float16, torch.bfloat16, torch.float64)


def without_zeros(network):
    """The network with small random numbers in place of its zeros, so that all is connected."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network.eval()


def small_denoiser(name="cross"):
    """One of three small networks, for latents (B, 5, 8, 8) and tokens (B, 6, 12)."""
    torch.manual_seed(0)
    options = dict(latent_channels=5, channels=16, multipliers=(1, 2), blocks=1,
                   attention_at=(1, 2), heads=2, token_dim=12)
    if name == "adagn":
        network = unet.AdaGNUNet(num_tokens=6, **options)
    elif name == "direct":
        network = unet.DirectDecoder(latent_side=8, **options)
    else:
        network = unet.UNet(**options)
    return without_zeros(network)


def denoiser_inputs(name="cross", batch=3):
    """z_t (B, 5, 8, 8), t (B,) and tokens (B, 6, 12); for "direct" the tokens alone."""
    z_t = torch.randn(batch, 5, 8, 8)
    t = torch.randint(1, 1001, (batch,))
    tokens = torch.randn(batch, 6, 12)
    return [tokens] if name == "direct" else [z_t, t, tokens]


every_denoiser = pytest.mark.parametrize("name", ["cross", "adagn", "direct"])
every_precision = pytest.mark.parametrize("dtype", OTHER_PRECISIONS, ids=str)


# The denoiser
def test_the_denoiser_has_the_papers_size():
    network = unet.UNet(token_dim=16)
    assert sum(p.numel() for p in network.parameters()) == 37_469_635


def test_attention_is_torchs():
    layer = unet.Attention(32, 12, heads=4)
    x = torch.randn(2, 7, 32)
    tokens = torch.randn(2, 5, 12)

    projected = [layer.to_q(x), layer.to_k(tokens), layer.to_v(tokens)]
    q, k, v = [y.view(2, -1, 4, 8).transpose(1, 2) for y in projected]  # (2, heads, P or M, 8)
    mixed = F.scaled_dot_product_attention(q, k, v)  # (2, heads, P, 8)
    expected = layer.to_out(mixed.transpose(1, 2).reshape(2, 7, 32))

    assert_close(layer(x, tokens), expected)


def test_recorded_maps_are_the_weights_of_each_call():
    block = unet.SpatialTransformer(32, heads=4, token_dim=12)
    layer = block.cross_attention
    x = torch.randn(2, 7, 32)
    tokens = torch.randn(2, 2, 5, 12)  # of two calls
    with unet.record_attention(block) as maps:
        layer(x, tokens[0])
        layer(x, tokens[1])

    q = layer.to_q(x).view(2, 7, 4, 8)
    k = layer.to_k(tokens).view(2, 2, 5, 4, 8)
    scores = torch.einsum("bphe,nbmhe->nbhpm", q, k) / math.sqrt(8)
    expected = scores.softmax(-1).mean(2)  # (calls, 2, heads, 7, 5) -> (calls, 2, 7, 5)
    assert_close(maps, [[expected[0], expected[1]]])


def test_the_order_of_the_tokens_is_nothing_to_the_denoiser():
    network = small_denoiser()
    z_t, t, tokens = denoiser_inputs()
    noise = network(z_t, t, tokens)

    assert_close(network(z_t, t, tokens.flip(1)), noise)
    assert (network(z_t, t, tokens + 1) - noise).abs().max() > 1e-2


@every_denoiser
@every_precision
def test_a_denoiser_works_in_other_precisions(name, dtype):
    network = small_denoiser(name)
    inputs = denoiser_inputs(name)
    expected = network(*inputs)

    converted = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    out = network.to(dtype)(*converted)
    assert out.dtype == dtype
    tolerance = 50 * max(torch.finfo(dtype).eps, 1e-7) * expected.abs().max().item()
    assert_close(out.float(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("heads, channels", [(8, 20), (32, 16), (0, 16)])
def test_heads_that_do_not_divide_the_channels_are_refused(heads, channels):
    with pytest.raises(ValueError, match=f"{channels} channels.* {heads} heads"):
        unet.UNet(channels=channels, heads=heads)


WRONG_SHAPES = [
    ("z_t", (5, 8, 8)),
    ("z_t", (3, 4, 8, 8)),
    ("z_t", (3, 5, 7, 8)),
    ("t", (2,)),
    ("t", (3, 1)),
    ("tokens", (3, 6, 11)),
    ("tokens", (1, 6, 12)),
    ("tokens", (3,)),
]


@pytest.mark.parametrize("argument, shape", WRONG_SHAPES)
def test_shapes_that_do_not_fit_are_refused(argument, shape):
    inputs = dict(zip(["z_t", "t", "tokens"], denoiser_inputs()))
    inputs[argument] = torch.ones(shape)
    with pytest.raises(ValueError, match=f"^{argument} has .*expected"):
        small_denoiser()(**inputs)


# The first stage
def ready_quantizer(far=0):
    """A Quantizer of 50 entries after its first training batch, and that batch: z (2, 3, 4, 4)."""
    torch.manual_seed(0)
    quantizer = vq.Quantizer(50, 3)
    z = torch.randn(2, 3, 4, 4).add(far).requires_grad_()
    quantizer(z)
    return quantizer, z


def nearest_by_distances(z, codebook):
    """z (B, C, h, w), codebook (K, C) -> (B, h, w), by all distances."""
    vectors = z.permute(0, 2, 3, 1)[:, :, :, None]  # (B, h, w, 1, C)
    return (vectors - codebook).square().sum(-1).argmin(-1)


def small_autoencoder(**options):
    torch.manual_seed(0)
    return vq.VQAutoencoder(multipliers=(1,), blocks=1, patch=4, codebook_size=64, **options)


@pytest.mark.parametrize("far", [0, 1000])
def test_the_quantiser_rounds_to_the_nearest_entry(far):
    quantizer, z = ready_quantizer(far)
    z_q, _, indices = quantizer(z)
    nearest = nearest_by_distances(z, quantizer.codebook)
    assert torch.equal(indices, nearest)
    assert torch.equal(z_q, quantizer.codebook[nearest].permute(0, 3, 1, 2))
    assert len(nearest.unique()) > 10


def test_the_gradient_passes_through_the_rounding_as_it_is():
    quantizer, z = ready_quantizer()
    z_q, _, _ = quantizer(z)
    gradient, = torch.autograd.grad(3 * z_q.sum(), z)
    assert (gradient == 3).all()


def test_commitment_pulls_latents_a_quarter_as_hard_as_the_codebook():
    quantizer, z = ready_quantizer()
    codebook = quantizer.codebook
    _, loss, indices = quantizer(z)

    distance = (codebook[indices].permute(0, 3, 1, 2) - z).square().mean()
    of_codebook, of_z = torch.autograd.grad(distance, [codebook, z])
    assert_close(loss, 1.25 * distance)
    assert_close(torch.autograd.grad(loss, [codebook, z]), (of_codebook, 0.25 * of_z))


def test_batches_of_the_warm_up_are_not_rounded():
    quantizer = vq.Quantizer(50, 3, warmup=2)
    for batch in range(3):
        z = torch.randn(2, 3, 4, 4, requires_grad=True)
        z_q, loss, indices = quantizer(z)
        passed = torch.equal(z_q, z) and loss == 0 and not indices.any()
        assert passed == (batch < 2)

        # Data-parallel training wants a gradient for all parameters in each batch.
        (z_q.sum() + loss).backward()
        assert quantizer.codebook.grad is not None


# One of two processes: trains a Quantizer for two batches of its own, then saves the codebook.
MAKE_CODEBOOK = """
import sys, torch, vq
rank = int(sys.argv[1])
address = sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
torch.manual_seed(rank)
quantizer = vq.Quantizer(50, 3, warmup=1)
for _ in range(2):
    quantizer(torch.randn(2, 3, 4, 4) + rank)
torch.save(quantizer.state_dict(), f"{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_processes_that_train_together_have_one_codebook(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    address = (tmp_path / "address").as_uri()
    commands = [[sys.executable, "-c", MAKE_CODEBOOK, str(rank), address] for rank in (0, 1)]
    processes = [subprocess.Popen(command, cwd=tmp_path, env=environment) for command in commands]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]

    first, second = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert torch.equal(first["codebook"], second["codebook"])
    assert first["ready"] and second["ready"]


@every_precision
def test_the_autoencoder_trains_in_other_precisions(dtype):
    autoencoder = small_autoencoder(warmup=0)
    first_stage_loss = vq.FirstStageLoss(autoencoder, squared=1.0)
    images = random_images(2, 16)
    expected, _, _ = first_stage_loss(images)

    autoencoder.to(dtype)
    images = images.to(dtype)
    loss, _, _ = first_stage_loss(images)
    loss.backward()
    assert loss.item() == approx(expected.item(), rel=0.02)
    assert autoencoder.encoder[1].weight.grad.isfinite().all()
    assert autoencoder.decode(autoencoder.encode(images)).dtype == dtype


@pytest.mark.parametrize("shape", [(2, 3, 16, 18), (2, 1, 16, 16), (3, 16, 16)])
def test_images_that_do_not_fit_the_autoencoder_are_refused(shape):
    with pytest.raises(ValueError, match="^images ha.*expected"):
        small_autoencoder()(torch.randn(shape))


def test_decoding_rounds_the_latent():
    autoencoder = small_autoencoder().eval()
    z = torch.randn(2, 3, 4, 4)
    autoencoder.quantizer.initialise(z)
    z_q, _, _ = autoencoder.quantize(z + 0.01)
    assert not torch.equal(z_q, z + 0.01)
    assert_close(autoencoder.decode(z + 0.01), autoencoder.decoder(z_q))


def test_the_linear_encoder_is_linear():
    encoder = vq.KINDS["linear"]().encoder
    x, y = torch.randn(2, 1, 3, 32, 32)
    assert_close(encoder((x + y) / 2), (encoder(x) + encoder(y)) / 2)


def test_attention_of_the_first_stage_is_torchs():
    layer = vq.PositionAttention(32)
    x = torch.randn(2, 32, 3, 4)
    qkv = layer.qkv(layer.norm(x)).view(2, 3, 32, 12)
    q, k, v = qkv.transpose(2, 3).unbind(1)  # 3x (2, 12, 32)
    mixed = F.scaled_dot_product_attention(q, k, v)
    assert_close(layer(x), x + layer.out(mixed.mT.reshape(x.shape)))


def test_the_first_stages_loss_adds_l2_to_l1():
    autoencoder = small_autoencoder(warmup=0)
    images = 2 * torch.rand(2, 3, 16, 16) - 1
    loss, reconstruction, indices = vq.FirstStageLoss(autoencoder, squared=4.0)(images)

    codebook_loss = autoencoder.quantize(autoencoder.encode(images))[1]
    error = reconstruction - images
    assert_close(loss, error.abs().mean() + 4 * error.square().mean() + codebook_loss)
    assert indices.shape == (2, 4, 4)


@pytest.mark.parametrize("counts, used, perplexity", [
    ([9, 0, 0, 0], 0.25, 1.0),
    ([2, 1, 1, 0], 0.75, 2**1.5),
    ([0, 0, 0, 0], 0.0, 1.0),
    (np.array([50_000, 50_000], np.uint16), 1.0, 2.0),
])
def test_perplexity_is_two_to_the_entropy_in_bits(counts, used, perplexity):
    assert vq.codebook_usage(counts) == approx((used, perplexity))


# Autoencoders that it is compared with
def small_vae(objective):
    """A VAE of 12 training steps, images (4, 3, 16, 16) and noise for its codes (4, 6)."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 12))  # means and log variances
    model = vq.VAE(encoder, 6, objective, steps=12, size=16, width=8)
    return model, 2 * torch.rand(4, 3, 16, 16) - 1, torch.randn(4, 6)


def posterior_and_error(model, images, noise):
    """q(z|x), z drawn from it, and -log p(x|z) in nats an image."""
    mean, log_var = model.encoder(images).split(6, dim=1)
    q = Normal(mean, log_var.exp().sqrt())
    z = mean + q.stddev * noise
    p, x = (model.decode(z) + 1) / 2, (images + 1) / 2
    log_likelihood = x * p.log() + (1 - x) * (1 - p).log()
    return q, z, -log_likelihood.sum() / len(images)


def test_pixels_are_rearranged_into_channels():
    first_stage = vq.Pixels()
    images = torch.rand(2, 3, 32, 32)
    z = first_stage.encode(images)
    assert torch.equal(z[:, :64, 2, 1].reshape(2, 8, 8), images[:, 0, 16:24, 8:16])
    assert torch.equal(first_stage.decode(z), images)


def test_a_beta_vae_counts_its_kl_beta_times():
    model, images, noise = small_vae("beta")
    q, _, error = posterior_and_error(model, images, noise)
    kl = kl_divergence(q, Normal(0, 1)).sum() / 4
    expected = error + vq.VAE_WEIGHTS["beta"] * kl
    assert_close(model.loss(images, None, noise), expected / (3 * 16 * 16))


@pytest.mark.parametrize("step", [3, 12])
def test_eq_6_draws_the_kl_to_a_capacity_that_rises(step):
    model, images, noise = small_vae("annealed")
    q, _, error = posterior_and_error(model, images, noise)
    kl = kl_divergence(q, Normal(0, 1)).sum() / 4
    capacity = min(25.0, 25.0 * step / 6)  # it rises in half of the 12 steps
    expected = error + vq.VAE_WEIGHTS["annealed"] * (kl - capacity).abs()

    model.step.fill_(step - 1)  # steps before this one
    assert_close(model.loss(images, None, noise), expected / (3 * 16 * 16))


def test_a_beta_tcvae_counts_the_total_correlation_beta_times():
    model, images, noise = small_vae("tc")
    q, z, error = posterior_and_error(model, images, noise)
    kl = kl_divergence(q, Normal(0, 1)).sum() / 4

    # log q(z) and log q(z_1) + ... + log q(z_N), of four images by a loop
    correlation = 0.0
    for i in range(4):
        densities = q.log_prob(z[i]).exp()  # (4, 6): q(z_i | x_j) of each dimension
        correlation += densities.prod(1).mean().log() - densities.mean(0).log().sum()
    expected = error + kl + (vq.VAE_WEIGHTS["tc"] - 1) * correlation / 4
    assert_close(model.loss(images, None, noise), expected / (3 * 16 * 16))


def test_a_factor_vae_adds_what_its_discriminator_estimates():
    model, images, noise = small_vae("factor")
    q, z, error = posterior_and_error(model, images, noise)
    kl = kl_divergence(q, Normal(0, 1)).sum() / 4
    expected = error + kl + vq.VAE_WEIGHTS["factor"] * model.discriminator(z).mean()

    torch.manual_seed(1)
    loss = model.loss(images, None, noise)
    torch.manual_seed(1)
    assert_close(loss - model.discriminator.loss(z), expected / (3 * 16 * 16))
    assert model.terms["kl"] == approx(kl.item())


def test_the_discriminator_estimates_the_total_correlation():
    torch.manual_seed(0)
    discriminator = vq.Discriminator(3, width=64)
    optimizer = torch.optim.Adam(discriminator.parameters(), 4e-3)

    def draw(count):
        """Three standard normal codes, of which the first two have a correlation of 0.8."""
        z = torch.randn(count, 3)
        z[:, 1] = 0.8 * z[:, 0] + 0.6 * z[:, 1]
        return z

    for _ in range(200):
        optimizer.zero_grad()
        discriminator.loss(draw(256)).backward()
        optimizer.step()

    exact = -math.log(1 - 0.8**2) / 2
    estimate = discriminator.total_correlation(draw(20_000)).item()
    assert estimate == approx(exact, abs=0.1)


def test_the_gradients_of_vae_and_discriminator_are_kept_apart():
    model, images, noise = small_vae("factor")
    _, z, _ = posterior_and_error(model, images, noise)
    parameters = list(model.discriminator.parameters())

    torch.manual_seed(1)
    together = torch.autograd.grad(model.loss(images, None, noise), parameters)
    torch.manual_seed(1)
    loss = model.discriminator.loss(z)
    assert_close(together, torch.autograd.grad(loss, parameters, retain_graph=True))
    of_codes = torch.autograd.grad(loss, z, allow_unused=True)
    assert of_codes == (None,)


# ---- The scores ---------------------------------------------------------------------------------


def all_combinations(*sizes):
    return np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), axis=1)


PERFECT = all_combinations(4, 3).repeat(60, axis=0)  # codes that are their factors, (720, 2)
NOISE = np.random.default_rng(0).normal(size=(720, 1))
NOISY = np.append(PERFECT, NOISE, axis=1)


def mixed_codes():
    """Five codes of three factors: blurred, two-sided, mixed, a copy, unrelated."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 5, 600)
    b = rng.integers(0, 2, 600)
    c = rng.integers(0, 3, 600)
    noise = rng.normal(size=(600, 5)).T

    codes = np.stack([
        a + 0.3 * noise[0],
        b + 0.5 * noise[1],
        b - c + 0.2 * noise[2],
        -c,
        noise[4].round()], axis=1)
    factors = np.stack([a, b, c], axis=1)
    return codes, factors


def test_the_worked_example_is_what_was_found_by_hand(capsys):
    metrics.main([])
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    for line in lines:
        computed = [float(number) for number in line[30:74].split()]
        by_hand = [eval(number) for number in line[74:].split()]  # 1/3, say
        assert computed == approx(by_hand, abs=6e-4), line


def test_the_trees_agree_with_scikit_learn():
    # scikit-learn 1.9.1, GradientBoostingClassifier(random_state=0): feature_importances_ by factor
    importance = np.array([
        [.9758, .0098, .0071, .0035, .0039],
        [.0009, .5304, .3358, .1329, 0],
        [0, 0, 0, 1, 0]])
    codes, factors = mixed_codes()

    scores = metrics.dci(codes[:400], factors[:400], codes[400:], factors[400:])

    assert scores["importance"] == approx(importance.T, abs=0.01)
    assert scores["informativeness_test"] == approx(0.9667, abs=0.01)


PAIRS = PERFECT[:, [0, 0, 1, 1]]
SHARED = 1 - math.log(2) / math.log(4)
KNOWN_DCI = [  # codes, factors, disentanglement, completeness, MIG
    (PERFECT, PERFECT, 1, 1, 1),
    (0 * PERFECT, PERFECT, 0, 0, 0),
    (PERFECT, PAIRS, SHARED, 1, 1),  # factors that are equal in pairs
    (PAIRS, PERFECT, 1, SHARED, 0),  # codes that are
]


@pytest.mark.parametrize("codes, factors, d, c, gap", KNOWN_DCI)
def test_dci_and_mig_of_codes_for_which_they_are_known(codes, factors, d, c, gap):
    scores = metrics.dci(codes, factors, codes, factors)

    assert scores["disentanglement"] == approx(d, abs=0.02)
    assert scores["completeness"] == approx(c, abs=0.02)
    assert metrics.mig(codes, factors) == approx(gap)


def test_mig_of_a_bit_that_is_wrong_in_a_quarter_of_the_cases():
    bit, quarter, unrelated = all_combinations(2, 4, 2).T
    wrong = quarter == 0
    codes = np.stack([bit ^ wrong, unrelated], axis=1)

    known = 1 + np.log2(1 / 4) / 4 + np.log2(3 / 4) * 3 / 4  # bits
    assert metrics.mig(codes, bit) == approx(known)


def test_vector_valued_codes_are_projected_on_their_main_axes():
    scalars = all_combinations(3, 5)
    axes = np.array([[1.0, 2, -3], [4, 0, 3]])  # whose largest entries are made positive
    vectors = scalars[:, :, None] * axes + 7

    centred = scalars - scalars.mean(axis=0)
    flat = centred * [-14**0.5, 5]
    assert metrics.scalar_codes(vectors[:9], fit_on=vectors) == approx(flat[:9])


class Images:
    """A dataset whose images are their factors."""

    def __init__(self, factors):
        self.images = self.factors = torch.from_numpy(factors).__getitem__
        self.length = len(factors)

    def __len__(self):
        return self.length


def test_factor_vae_score_is_the_share_of_votes_that_go_home():
    def represent(factors):
        a, b, c, d = factors.double().T
        return torch.stack([a, 10 * (b + c), 1e-9 * d], dim=1)

    factors = all_combinations(4, 3, 3, 2).repeat(10, axis=0)
    dataset = Images(factors)

    scores = metrics.factor_vae_score(represent, dataset, pool=700)
    assert scores["factor_vae"] == approx(1 / 2, abs=0.03)  # a has a code, b or c; d a dead one


@pytest.mark.parametrize("unit", [0.05, 1e6, [1, 1000]])
def test_factor_vae_score_does_not_depend_on_the_unit_of_the_codes(unit):
    blurred = PERFECT + 0.01 * NOISE

    scores = metrics.factor_vae_votes(blurred * unit, PERFECT, 500, 500)

    assert scores == metrics.factor_vae_votes(blurred, PERFECT, 500, 500)
    assert scores["factor_vae"] == 1


DEAD_CODES = [3 + 0 * NOISE, 1e-8 * NOISE.round(), (5 + 3e-7 * NOISE).astype(np.float32)]


@pytest.mark.parametrize("dead", DEAD_CODES, ids=["constant", "tiny", "last digits"])
def test_a_dead_code_wins_no_vote(dead):
    codes = np.append(dead, PERFECT, axis=1)

    scores = metrics.factor_vae_votes(codes, PERFECT, 500, 500)

    assert scores["factor_vae"] == 1
    assert scores["note"] == "FactorVAE votes leave out dead codes: 0"


def test_votes_of_very_many_codes_fit_in_memory():
    codes = np.random.default_rng(0).normal(size=(720, 1024))

    tracemalloc.start()
    metrics.factor_vae_votes(codes, PERFECT, 400, 10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 100e6  # bytes; all votes at once would take 210e6


MISFITS = [  # codes and factors of which one or both are transposed, or one is shorter
    (NOISY.T, PERFECT.T),
    (NOISY.T, PERFECT),
    (NOISY[:710], PERFECT),
]


@pytest.mark.parametrize("codes, factors", MISFITS)
@pytest.mark.parametrize("name", ["evaluate", "mig", "infomec", "factor_vae_votes"])
def test_tables_that_do_not_belong_together_are_named_with_both_shapes(name, codes, factors):
    score = getattr(metrics, name)
    line = refused(lambda: score(codes, factors), "transpose")
    assert f"codes has shape ({len(codes)}, " in line
    assert f"factors ({len(factors)}, " in line


def test_dci_refuses_test_labels_that_no_tree_has_learned():
    line = refused(lambda: metrics.dci(NOISY, PERFECT, NOISY, PERFECT.astype(str)), "same labels")
    assert line.startswith("test_factors has in column 0 ")


def test_slow_trees_are_announced():
    codes = np.zeros((10_000, 1024), dtype=np.float32)
    factors = np.arange(10_000)[:, None] % 10
    with pytest.warns(UserWarning, match="DCI grows 1,000 trees .* about 7 minutes"):
        metrics.warn_if_slow(codes, factors)


LARGE = [-1, 2**63, 2**63 + 1, 2**63 + 2]  # the last three are one float
LABELS = {
    "int": PERFECT + 2**60,
    "object": PERFECT.astype(object) + 2**70,
    "fraction": PERFECT / 7,
    "tensor": torch.tensor(PERFECT).bfloat16(),
    "list": [[LARGE[a], "xyz"[b]] for a, b in PERFECT.tolist()],
    "records": np.array([(a, "xyz"[b]) for a, b in PERFECT.tolist()], [("a", int), ("b", "U1")]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_may_be_of_any_kind(kind):
    labels = LABELS[kind]

    scores = metrics.dci(PERFECT, labels, PERFECT, labels)

    assert metrics.mig(PERFECT, labels) == approx(1)
    assert scores["informativeness_test"] == 1
    assert scores["disentanglement"] == approx(1)


def test_infomec_agrees_with_the_file_of_its_authors():
    # kylehkhsu/latent_quantization at 9a420a3, infomec.py, with scikit-learn 1.7.2 and numpy 2.3.5
    codes, factors = mixed_codes()
    rounded = np.round(2 * codes)

    continuous = metrics.infomec(codes[:, :3], factors, discrete=False)
    discrete = metrics.infomec(rounded, factors, discrete=True)

    assert continuous["infom"] == approx(0.8140, abs=0.002)
    assert continuous["infoc"] == approx(0.7924, abs=0.002)
    assert continuous["infoe"] == approx(0.7087, abs=0.002)
    assert discrete["infom"] == approx(0.6868, abs=0.002)
    assert discrete["infoc"] == approx(0.6405, abs=0.002)
    assert discrete["infoe"] == approx(0.9650, abs=0.002)


def test_infomec_says_so_if_the_codes_know_nothing():
    rng = np.random.default_rng(2)
    factors = rng.integers(0, [3, 4, 2], size=(900, 3))
    noise = rng.normal(size=(900, 3))
    assert "are chance" in metrics.infomec(noise, factors)["note"]
    assert metrics.infomec(factors + 0.1 * noise, factors)["note"] == ""


def test_the_kth_neighbour_itself_is_not_nearer():
    for seed in range(100):
        rng = np.random.default_rng(seed)
        label = np.arange(10) % 2
        code = rng.normal(size=10)
        exact = code + 1e-10 * np.random.default_rng(0).normal(size=10)  # no ties

        distances = abs(exact[:, None] - exact)  # (10, 10)
        radius = [sorted(row[label == own])[4] for row, own in zip(distances, label)]
        nearer = (distances < np.array(radius)[:, None]).sum(1)
        psi = torch.digamma(torch.tensor([10.0, 4.0, 5.0, *nearer], dtype=torch.float64))
        expected = psi[0] + psi[1] - psi[2] - psi[3:].mean()
        assert metrics.neighbour_information(code, label) == approx(max(0.0, expected.item()))


def test_udr_equals_its_equation():
    a, b = np.random.default_rng(0).normal(size=(2, 50, 2))
    b = np.append(b, a @ [[1], [2]], axis=1)

    codes = np.append(a, b, axis=1)  # two, and three
    ranks = [np.argsort(np.argsort(code)) for code in codes.T]
    R = abs(np.corrcoef(ranks))[:2, 2:]
    total = 0
    for row in [*R, *R.T]:
        total += row.max()**2 / row.sum()

    assert metrics.agreement([a, b])["udr"] == approx([total / 5, total / 5])


def test_tad_is_what_was_counted_by_hand():
    a, b, c = all_combinations(2, 2, 2).T
    told = c * (a == b)  # tells .3 bits of c
    attributes = np.stack([a, b, c, told, a**0], axis=1)
    codes = np.stack([-3 * a, a + b, c], axis=1)

    result = metrics.tad(codes, 2 * attributes - 1)

    assert [row[:3] for row in result["auroc"]] == [  # equal codes count half
        [1, .5, .5], [.875, .875, .5], [.5, .5, 1]]
    assert result["counted"] == [0, 1]
    assert result["tad"] == 1 / 8 + 3 / 8


def as_objects(table):
    """An array of tensors, one for each number."""
    cells = np.empty(table.shape, object)
    for place in np.ndindex(table.shape):
        cells[place] = torch.tensor(table[place])
    return cells


@pytest.mark.parametrize("collect", [
    lambda table: list(torch.tensor(table)),
    lambda table: [list(row) for row in torch.tensor(table)],
    lambda table: [[value.requires_grad_() for value in row] for row in torch.tensor(table * 1.0)],
    as_objects,
])
def test_tables_of_tensors_are_tables(collect):
    factors = all_combinations(3, 4, 5)[:, [1, 2]]
    expected = metrics.evaluate(factors * 2.0, factors)
    assert metrics.evaluate(collect(factors * 2), collect(factors)) == expected


@pytest.mark.parametrize("collect", [
    lambda images: [*torch.tensor(images)],
    lambda images: images.astype(">f4"),
    lambda images: images.tolist(),
    lambda images: images[::-1][::-1],
])
def test_images_in_any_container_have_one_distance(collect):
    x, y = np.random.default_rng(0).random((2, 2, 3, 12, 12), np.float32)
    assert same(metrics.ssim(collect(x), collect(y)), metrics.ssim(x, y))
    refused(lambda: metrics.mse(x, (255 * y).astype(np.uint16)), "uint16", "floats in [0, 1]")


def test_ssim_and_mse_equal_their_definitions():
    x, y = torch.rand(2, 2, 3, 13, 12, generator=torch.Generator().manual_seed(0)).double()
    y[0] = x[0]
    y[1] = 0.6 * x[1] + 0.4 * y[1]
    bell = Normal(0, 1.5).log_prob(torch.arange(-5.0, 6)).exp().double()
    weight = torch.outer(bell, bell).flatten() / bell.sum()**2

    windows = []
    for image in (x, y):
        patches = F.unfold(image[1][:, None], 11, padding=5)  # (3, 121, pixels)
        windows.append(patches.mT.flatten(0, 1))
    local = []
    for pair in torch.stack(windows, 1):  # (2, 121), around one pixel
        m, n = pair @ weight
        (v, covariance), (_, u) = pair.cov(correction=0, aweights=weight)
        top = (2*m*n + 1e-4) * (2*covariance + 9e-4)
        bottom = (m*m + n*n + 1e-4) * (v + u + 9e-4)
        local.append(top / bottom)

    flipped = x.flip(2).numpy()[:, :, ::-1]  # a view of negative stride, as OpenCV's users have
    assert metrics.ssim(flipped, y).tolist() == approx([1, torch.stack(local).mean().item()])
    squared = (x[1] - y[1]).square().mean()
    assert metrics.mse(x, y).tolist() == approx([0, squared.item()])

    single = metrics.ssim(x.float(), y.float())
    with torch.autocast("cpu", torch.bfloat16):  # as inside of somebody's training loop
        assert torch.equal(metrics.ssim(x.float(), y.float()), single)


def wave(step, scale, *shape):
    t = torch.arange(math.prod(shape), dtype=torch.float64)
    return (torch.sin(t * step) * scale).float().view(shape)


def test_lpips_agrees_with_the_lpips_package():
    # lpips 0.1.4, net="alex", with these weights and images, normalize=True.
    layers = [(0, 64, 3, 11), (3, 192, 64, 5), (6, 384, 192, 3), (8, 256, 384, 3),
              (10, 256, 256, 3)]
    weights = {}
    for k, (index, c_out, c_in, side) in enumerate(layers):
        scale = (2 / (c_in * side**2))**0.5
        kernel = wave(0.7 + 0.26 * k, scale, c_out, c_in, side, side)
        weights[f"features.{index}.weight"] = kernel
        weights[f"features.{index}.bias"] = wave(0.83 + 0.26 * k, 2**0.5, c_out)
        linear = wave(1.1 + k, (2 / c_out)**0.5, 1, c_out, 1, 1)
        weights[f"lin{k}.model.1.weight"] = linear.abs()
    torch.save(weights, "both.pth")

    weights = metrics.load_lpips("both.pth", "both.pth")
    x = wave(0.37, 0.5, 2, 3, 64, 64) + 0.5
    y = wave(0.011, 0.5, 2, 3, 64, 64) + 0.5
    known = [0.00214165, 0.00212837]
    assert metrics.lpips(x, y, weights).tolist() == approx(known, rel=1e-3)


def test_the_frechet_distance_equals_its_definition():
    a, mix = np.split(np.random.default_rng(0).normal(size=(504, 4)), [500])
    b = a @ mix + 2  # the covariances do not commute
    A = np.cov(a.T)
    B = np.cov(b.T)
    gap = (a - b).mean(axis=0)
    roots = np.linalg.eigvals(A @ B).real**0.5
    known = gap @ gap + np.trace(A + B) - 2 * roots.sum()

    assert metrics.frechet_distance(a, b) == approx(known)


@pytest.mark.parametrize("samples, features", [(500, 4), (5, 30), (100, 1)])
def test_the_frechet_distance_of_a_set_from_itself_is_0_and_never_less(samples, features):
    for seed in range(5):
        x = np.random.default_rng(seed).normal(size=(samples, features))
        assert 0 <= metrics.frechet_distance(x, x) < 1e-4


@torch.jit.script
def two_means(images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
    return images[:, :2].float().mean((2, 3))


def test_fid_is_the_frechet_distance_of_a_networks_features():
    two_means.save("net.pt")
    images = torch.randint(0, 200, (70, 3, 4, 4), dtype=torch.uint8)
    assert metrics.fid(images, images + 50, "net.pt") == approx(2 * 50**2, rel=1e-4)


def test_another_network_than_that_of_fid_is_refused():
    torch.jit.trace(torch.nn.ReLU(), torch.zeros(1)).save("net.pt")
    refused(lambda: metrics.load_inception("net.pt"), "expected NVIDIA's")


def test_the_table_of_scores_is_one_that_json_accepts():
    noise = np.random.default_rng(1).normal(size=(720, 3))
    codes = torch.tensor(NOISY + noise, requires_grad=True)

    scores = metrics.evaluate(codes, PERFECT.tolist(), 3, 300, 200)

    assert scores == json.loads(json.dumps(scores, allow_nan=False))
    assert np.shape(scores["importance"]) == (3, 2)
    assert scores["informativeness_train"] > 0.95
    assert scores["informativeness_test"] < 0.6


@pytest.mark.parametrize("name", ["names.npz", "cut.npz", "absent.npz"])
def test_files_without_a_table_are_refused_in_one_line(name, capsys):
    np.savez("names.npz", z=NOISY)
    Path("cut.npz").write_bytes(Path("names.npz").read_bytes()[:300])
    with pytest.raises(SystemExit):
        metrics.main([Path(name)])

    error = capsys.readouterr().err
    assert error.startswith(f"metrics.py: {name}")
    assert error.count("\n") == 1


def test_a_factor_that_is_left_out_leaves_the_scores_of_the_others():
    factors = np.insert(PERFECT, 0, 7, axis=1).astype(object)
    factors[0, 2] = 9  # a value that a single row has
    names = np.arange(720)[:, None] % 500 + 10**18

    scores = metrics.evaluate(PERFECT, np.append(factors, names, axis=1))

    assert (scores["dci_train"], scores["dci_test"]) == (480, 240)  # of 10,000 + 5,000
    assert "factor 0 is left out: it has one value" in scores["note"]
    assert "leave out rare values of factor 2" in scores["note"]
    assert "factor 3 is left out: it has more than 200 values" in scores["note"]
    for name in ("factor_vae", "disentanglement", "completeness", "informativeness_test", "mig"):
        assert scores[name] == approx(1, abs=0.08)


def test_labels_that_were_never_learnt_are_told():
    labels = PERFECT / 3  # 1/3 is not 1/3 as float32
    scores = metrics.dci(PERFECT, labels, PERFECT, labels.astype(np.float32).astype(float))
    assert re.search(r"column 0: \d+% .* count as wrong", scores["note"])


GREY_IMAGE = torch.full((1, 3, 8, 8), 0.5)


UNSCORABLE = [
    ("evaluate", (PERFECT, np.where(PERFECT == 2, np.nan, 1)), "factors has NaN in column 0"),
    ("mig", (PERFECT, PERFECT, 0), "bins is 0; expected a whole number"),
    ("mig", (PERFECT[:2], [[0, 1], [1, None]]), r"column 1 .* compared \(NoneType, int\)"),
    ("evaluate", (NOISY * np.nan, PERFECT), r"codes\[0, 0\] is nan.*drop"),
    ("evaluate", (NOISY.astype(str), PERFECT), "codes has dtype <U.*expected numbers"),
    ("evaluate", ([[1, 2], [3]], PERFECT), "rows of unequal length"),
    ("dci", (NOISY, PERFECT * 0, NOISY, PERFECT), "one value"),
    ("dci", (NOISY, PERFECT, NOISY[:, :2], PERFECT), "as many codes"),
    ("factor_vae_votes", (NOISY * 0, PERFECT), "no code varies"),
    ("agreement", ([PERFECT, PERFECT[:9]],), "the same images"),
    ("tad", (NOISY, PERFECT * 2), "attributes has the values"),
    ("ssim", [GREY_IMAGE.permute(0, 2, 3, 1)] * 2, "channels last"),
    ("ssim", (-GREY_IMAGE, GREY_IMAGE), r"from -0.5 to -0.5; .*\[0, 1\]"),
    ("evaluate", (np.ma.masked_greater(NOISY, 2), PERFECT), r"codes\[.* is nan.*drop"),
    ("fid", (GREY_IMAGE, GREY_IMAGE, ""), "expected uint8"),
    ("load_inception", (HERE / "README.md",), "README.md is no TorchScript file"),
    ("lpips", (GREY_IMAGE, GREY_IMAGE, {}), "32 x 32 pixels"),
    ("tokens_of_factors", ([0.5, 0.5],), "expected .codes, factors."),
    ("load_lpips", (HERE / "README.md", "alex.pth"), "README.md has no .*, a git-lfs pointer"),
]


@pytest.mark.parametrize("name, arguments, words", UNSCORABLE)
def test_what_cannot_be_scored_is_refused(name, arguments, words):
    function = getattr(metrics, name)
    line = refused(lambda: function(*arguments))
    assert re.search(words, line)


# ---- Datasets -----------------------------------------------------------------------------------

ROWS = np.arange(12)


@pytest.fixture(scope="module")
def rendered():
    return data.open_dataset()


def noise(count=12, height=64, width=64, channels=3, seed=0):
    """Random images (n, h, w, c) uint8."""
    shape = (count, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, **arrays):
    """An .npz or .h5 file of these arrays, or an .npy file of a single one."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if str(path).endswith(".npz"):
        np.savez_compressed(path, **arrays)
    elif str(path).endswith(".npy"):
        np.save(path, *arrays.values())
    else:
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file.create_dataset(name, data=array, compression="gzip")
    return path


def dataset_of(ending="npz", **arrays):
    """The dataset of a new file with these arrays, or with random images and these labels."""
    if not arrays.keys() - {"labels", "classes", "factor_names"}:
        arrays["images"] = noise()
    return data.open_dataset(save(f"{len(os.listdir())}.{ending}", **arrays))


def save_picture(path, pixels, **options):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def shown(dataset, indices=slice(None)):
    """The images as (n, h, w, c)."""
    return dataset.images(indices).permute(0, 2, 3, 1).numpy()


def same(actual, expected):
    return np.array_equal(actual, np.broadcast_to(expected, actual.shape))


def listing(place="."):
    return sorted(str(path) for path in Path(place).rglob("*"))


# The rendered set
def test_an_index_counts_through_the_factors(rendered):
    factors = rendered.factors(slice(None)).numpy()
    digit_values = [48000, 4800, 480, 60, 15, 1]  # the published order
    assert same(factors @ digit_values, np.arange(480000))
    assert rendered.factor_sizes == (10, 10, 10, 8, 4, 15)


@pytest.mark.parametrize("factor, digit_value", [(0, 48000), (1, 4800), (2, 480)])
def test_a_hue_changes_its_own_surface_alone(rendered, factor, digit_value):
    rows = np.random.default_rng(0).integers(480000, size=200)
    hue = rendered.factors(rows)[:, factor].numpy()
    recoloured = rows + ((hue + 3) % 10 - hue) * digit_value

    changed = shown(rendered, rows) != shown(rendered, recoloured)
    changed = changed.any(3).reshape(200, -1)  # (200, 64, 64, 3) -> (200, 64 * 64)
    surface = rendered.planes[rows % 480, factor] != 0
    assert not (changed & ~surface).any()
    assert (changed & surface).sum() > 0.9 * surface.sum()


def test_the_rendered_set_has_the_identity_that_checkpoints_store(rendered):
    assert rendered.identity["digest"] == "afe70e303fa0aed5"


def test_a_file_in_the_published_layout_has_the_published_factors(rendered):
    rows = np.random.default_rng(0).integers(480000, size=600)
    with mock.patch("data.render_planes", return_value=rendered.planes):
        data.write_shapes3d("part.h5", indices=rows)
    read = data.open_dataset("part.h5")

    assert same(shown(read), shown(rendered, rows))
    assert read.factor_names == data.FACTORS
    assert same(read.factors(slice(None)), rendered.factors(rows))
    assert listing() == ["part.h5", "part.h5.64.cache.npy", "part.h5.64.cache.npz"]


def test_links_of_an_hdf5_file_are_followed():
    save("stored.h5", pixels=noise())
    with h5py.File("linked.h5", "w") as file:
        file["images"] = h5py.ExternalLink("stored.h5", "/pixels")
        file["labels"] = h5py.SoftLink("/other/classes")
        file["other/classes"] = np.arange(12) % 3
        file["other/up"] = h5py.SoftLink("/")  # a circle
        file["other/lost"] = h5py.SoftLink("/nowhere")

    read = data.open_dataset("linked.h5")
    assert same(shown(read), noise())
    assert same(read.factors(slice(None)), np.arange(12)[:, None] % 3)


# Use as a dataset


MASK_OF_ROWS = np.isin(ROWS, [1, 4])
INDICES = {  # what is asked for, and the rows that it stands for
    "number": (-1, [11]),
    "list": ([2, 0, 2], [2, 0, 2]),
    "empty": ([], []),
    "tensor": (torch.tensor([3, 1]), [3, 1]),
    "mask": (torch.tensor(MASK_OF_ROWS), [1, 4]),
    "list of bools": (MASK_OF_ROWS.tolist(), [1, 4]),
}


@pytest.mark.parametrize("kind", INDICES)
def test_images_take_any_index(kind):
    indices, rows = INDICES[kind]
    dataset = dataset_of(labels=ROWS % 3)
    assert same(shown(dataset, indices), noise()[rows])
    assert dataset.factors(indices).flatten().tolist() == [row % 3 for row in rows]


@pytest.mark.parametrize("indices", [
    [0, 12], -13, 0.5, [[1]], np.ones(3, bool), np.uint64(2**64 - 1),
])
def test_what_is_no_index_is_an_index_error(indices):
    with pytest.raises(IndexError):
        dataset_of().images(indices)


def test_a_dataset_is_a_sequence_of_images_with_their_factors():
    dataset = dataset_of(labels=ROWS % 3)
    images, factors = zip(*dataset)  # the loop ends
    assert torch.equal(torch.stack(images), dataset.images(ROWS))
    assert torch.stack(factors).flatten().tolist() == [0, 1, 2] * 4

    images, factors = dataset[2:4]  # a batch
    assert same(images.permute(0, 2, 3, 1), noise()[2:4])
    assert factors.flatten().tolist() == [2, 0]


def test_a_spawned_worker_loads_the_same_batches():
    dataset = dataset_of(labels=ROWS % 3)
    loader = DataLoader(dataset, batch_size=5, num_workers=1, multiprocessing_context="spawn")
    images, factors = zip(*loader)

    assert torch.equal(torch.cat(images), dataset.images(ROWS))
    assert torch.equal(torch.cat(factors), dataset.factors(ROWS))


def test_a_pickle_does_not_carry_the_images():
    dataset = dataset_of()
    packed = pickle.dumps(dataset)
    assert len(packed) < 12 * 64 * 64
    assert torch.equal(pickle.loads(packed).images([3, 1]), dataset.images([3, 1]))


def mapped_array(path, array):
    """The array, mapped from a new file of np.save."""
    np.save(path, array)
    return np.load(path, mmap_mode="r")


def mapped_bytes(path, array):
    """The array, mapped from a new file of nothing but its bytes."""
    array.tofile(path)
    return np.memmap(path, array.dtype, "r", shape=array.shape)


ALL = slice(None)
EVERY_OTHER = slice(None, None, -2)
PICKED = [5, 3, 1]


@pytest.mark.parametrize("mapped", [mapped_array, mapped_bytes])
@pytest.mark.parametrize("rows", [ALL, EVERY_OTHER, PICKED], ids=str)
def test_the_pickle_of_a_mapped_file_or_of_a_part_has_the_same_images(mapped, rows):
    images = noise(6, 32, 32).transpose(0, 3, 1, 2)
    pixels = mapped("images.npy", images)
    part = pixels if rows == ALL else pixels[rows]  # pixels[:] is no longer the file itself
    expected = images[rows]

    dataset = data.Dataset("mapped", len(part), 32, (), (), pixels=part)
    packed = pickle.dumps(dataset)
    again = pickle.loads(packed)
    indices = [0, 2]
    assert same(again.images(indices), expected[indices])


def test_parts_with_other_images_are_other_sets():
    identities = set()
    for images in (noise(12, 8, 8), 255 - noise(12, 8, 8)):
        dataset = dataset_of(images=images, labels=data.all_combinations((3, 4)))
        kept, _ = data.split_off(dataset, {0: 1, 1: 1})
        identities.add(str(kept.identity))
    assert len(identities) == 2



def test_images_are_found_by_factors_in_any_order_of_the_set():
    table = np.random.default_rng(0).integers(0, 10, (100, 25))  # of 10^25 combinations
    dataset = dataset_of(images=noise(100, 8, 8), labels=table)
    assert same(dataset.find(table[::-1]), np.arange(100)[::-1])
    assert dataset.find(torch.tensor(table[7])).tolist() == [7]


@pytest.mark.parametrize("factors", [[3, 4], [-1, 5]])
def test_a_combination_that_no_image_has_is_named(factors):
    dataset = dataset_of(images=noise(19, 8, 8), labels=data.all_combinations((4, 5))[:19])
    refused(lambda: dataset.find([[0, 0], factors]), str(tuple(factors)))
    refused(lambda: dataset.find([0, 0, 0]), "3 factors")


# Pixels
GREY = noise(channels=1)
OPAQUE = np.concatenate([noise(), np.full((12, 64, 64, 1), 255, np.uint8)], 3)


LAYOUTS = {
    "fortran": (np.asfortranarray(noise()), noise()),
    "channels before": (noise().transpose(0, 3, 1, 2), noise()),
    "grey": (GREY, GREY),
    "no channels": (GREY[..., 0], GREY),
    "opaque": (OPAQUE, noise()),
}


@pytest.mark.parametrize("ending", ["npz", "h5", "npy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_of_any_layout_are_read(ending, layout, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 64 * 64 * 3 * 5)  # several blocks, the last one short
    array, images = LAYOUTS[layout]
    dataset = dataset_of(ending, images=array)
    assert same(shown(dataset), images)


def test_there_may_be_as_many_wide_images_as_they_have_rows():
    assert len(dataset_of(images=noise(48, 48, 64))) == 48


@pytest.mark.parametrize("ending", ["npz", "h5"])
@pytest.mark.parametrize("image_name, mask_name", [("images", "masks"), ("train/images", "other")])
def test_the_images_of_a_file_are_told_by_their_name(ending, image_name, mask_name):
    dataset = dataset_of(ending, **{image_name: noise(), mask_name: GREY})
    assert same(shown(dataset), noise())


@pytest.mark.parametrize("arrays", [
    dict(train=noise(), test=noise()),
    dict(images=noise().reshape(12, -1)),
    dict(images=noise().transpose(1, 2, 3, 0)),
    dict(images=noise(0)),
    dict(labels=ROWS, images=ROWS),
])
def test_a_file_of_unclear_images_is_refused_by_what_it_holds(arrays):
    name, array = list(arrays.items())[-1]
    refused(lambda: dataset_of(**arrays), f"{name} {array.dtype} {array.shape}", "(n, h, w)")


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)], ids=str)
def test_every_version_of_numpys_format_is_read(version):
    content = io.BytesIO()
    np.lib.format.write_array(content, noise(), version)
    Path("a.npy").write_bytes(content.getvalue())
    with zipfile.ZipFile("a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write("a.npy", "images.npy")

    assert same(shown(data.open_dataset("a.npy")), noise())
    assert same(shown(data.open_dataset("a.npz")), noise())


UNIT = noise() / 255
GAPS = np.where(UNIT == 0, np.nan, UNIT)
MASK = noise() > 127


@pytest.mark.parametrize("ending", ["npz", "h5"])
@pytest.mark.parametrize("values, images", [
    (UNIT.astype("f2"), noise()),
    (UNIT * 2 - 1, noise()),
    (GAPS, noise()),
    (noise().astype(">u2") * 257, noise()),
    (noise().astype(int) + 10**12, noise()),
    (MASK, MASK * 255),
    (UNIT * 0 + 7.5, UNIT * 0),
])
def test_numbers_of_any_range_become_bytes(ending, values, images):
    assert same(shown(dataset_of(ending, images=values)), images)


def test_the_note_counts_the_gaps_in_images():
    dataset = dataset_of(images=GAPS)
    assert f"{np.isnan(GAPS).sum():,} numbers are NaN" in dataset.note


SCALES = [  # brightness of three images, and what becomes of it
    ([1000, 2000, 4000.5], [0, 85, 255]),
    ([-100, 0, 100], [0, 128, 255]),
    ([0.25, 0.5, 0.75], [64, 128, 191]),
    ([0, 20000, 60000], [0, 78, 233]),
    ([0, 4, 16], [0, 64, 255]),
    ([-0.5, 0, 0.5], [0, 128, 255]),
    ([-0.02, 0.49, 1], [0, 128, 255]),  # 0 to 1, and what resizing added
]


@pytest.mark.parametrize("ending", ["tif", "npz", "h5", "npy"])
@pytest.mark.parametrize("levels, shades", SCALES)
def test_one_scale_holds_for_a_whole_set(ending, levels, shades, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 1)  # an image a block
    images = np.stack([np.full((64, 64), level, np.float32) for level in levels])
    if ending == "tif":
        for k in range(3):
            save_picture(f"set/{k}.tif", images[k])
        dataset = data.open_dataset("set")
    else:
        dataset = dataset_of(ending, images=images)

    middles = dataset.images(slice(3))[:, 0, 32, 32]
    assert middles.tolist() == shades
    assert "black is" in dataset.note


RAMP = np.add.outer(np.arange(64), np.arange(64) * 3).astype(np.uint8)
COLOUR = np.stack([RAMP, RAMP.T, 255 - RAMP], 2)
CLEAR = np.where(RAMP > 99, 255, 0).astype(np.uint8)


ON_ITS_SIDE = Image.Exif()
ON_ITS_SIDE[274] = 6  # turn the picture clockwise
PICTURES = {  # a picture, what a viewer shows, options for saving
    "16 bits.png": (Image.fromarray(RAMP.astype(np.uint16) * 257), RAMP, {}),
    "opacity.png": (Image.fromarray(np.dstack([RAMP, CLEAR])), np.where(CLEAR, RAMP, 255), {}),
    "print.tif": (Image.fromarray(COLOUR).convert("CMYK"), COLOUR, {}),
    "turned.png": (Image.fromarray(COLOUR), np.rot90(COLOUR, -1), {"exif": ON_ITS_SIDE}),
    "damaged.png": (Image.fromarray(COLOUR), COLOUR, {"exif": b"Exif\0\0no directory"}),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_what_a_viewer_shows(name):
    picture, expected, options = PICTURES[name]
    Path("set").mkdir()
    picture.save(Path("set", name), **options)
    assert same(shown(data.open_dataset("set")), expected.reshape(1, 64, 64, -1))


def save_pointer(kind, target):
    """An HDF5 file whose images lie in another file, a.h5 or a.raw, which must exist."""
    with h5py.File(f"{kind}.h5", "w") as file:
        if kind == "link":
            file["images"] = h5py.ExternalLink(target, "/images")
        elif kind == "virtual":
            layout = h5py.VirtualLayout(noise().shape, np.uint8)
            layout[:] = h5py.VirtualSource(target, "images", noise().shape)
            file.create_virtual_dataset("images", layout)
        else:
            raw = [(target, 0, h5py.h5f.UNLIMITED)]
            file.create_dataset("images", noise().shape, np.uint8, external=raw)


@pytest.mark.parametrize("kind", ["link", "virtual", "raw"])
def test_images_that_lie_in_another_file_are_read_anew_if_that_changes(kind):
    other = "a.raw" if kind == "raw" else "a.h5"

    def write(images):
        if kind == "raw":
            images.tofile(other)
        else:
            save(other, images=images)

    write(noise())
    save_pointer(kind, other)
    if kind == "raw":
        write(noise())  # h5py has emptied it
    assert same(shown(data.open_dataset(f"{kind}.h5")), noise())
    write(noise(seed=1))
    os.utime(other, (0, 0))
    assert same(shown(data.open_dataset(f"{kind}.h5")), noise(seed=1))
    os.remove(other)
    refused(lambda: data.open_dataset(f"{kind}.h5"), "nowhere" if kind == "link" else "missing")


def test_an_array_of_two_names_is_read_once_and_a_broken_link_is_told():
    with h5py.File("a.h5", "w") as file:
        file["train/images"] = noise()
        file["images"] = file["train/images"]
        file["test/images"] = h5py.SoftLink("/images")
        file["labels"] = h5py.SoftLink("/gone")
    dataset = data.open_dataset("a.h5")
    assert same(shown(dataset), noise())
    assert "labels not used: a link that leads nowhere" in dataset.note


def test_pictures_of_matlab_stand_upright():
    with h5py.File("a.mat", "w") as file:
        images = file.create_dataset("images", data=noise().transpose(0, 3, 2, 1))
        images.attrs["MATLAB_class"] = np.bytes_("uint8")
    assert same(shown(data.open_dataset("a.mat")), noise())


def test_a_compression_that_h5py_lacks_is_named():
    with h5py.File("a.h5", "w") as file:
        images = file.create_dataset("images", (12, 64, 64, 3), np.uint8, compression=32015,
                                     allow_unknown_filter=True, chunks=(12, 64, 64, 3))
        images.id.write_direct_chunk((0, 0, 0, 0), b"zstd")
    refused(lambda: data.open_dataset("a.h5"), "compressed by filter 32015")


@pytest.mark.parametrize("options", [{}, {"chunks": (5, 64, 64, 3)}], ids=str)
def test_images_that_were_never_written_are_refused(options):
    with h5py.File("a.h5", "w") as file:
        images = file.create_dataset("images", noise().shape, np.uint8, **options)
        if options:
            images[:10] = noise(10)
    refused(lambda: data.open_dataset("a.h5"), "a.h5", "not written to its end")
    with h5py.File("a.h5", "a") as file:
        file["images"][:] = noise()
    assert same(shown(data.open_dataset("a.h5")), noise())


def test_a_part_of_an_archive_that_nobody_needs_does_no_harm():
    many_fields = np.zeros(12, [(f"a long name of a field, {k}", "i4") for k in range(400)])
    save("a.npz", images=noise(), factors=many_fields)
    with zipfile.ZipFile("a.npz", "a") as archive:
        archive.writestr("__MACOSX/._images.npy", b"a Mac's own")
    dataset = data.open_dataset("a.npz", np.int64(64))
    assert same(shown(dataset), noise())
    assert "factors not used" in dataset.note and "pickle" not in dataset.note


# Labels
@pytest.fixture
def official(monkeypatch):
    """A small set that we know: twelve images of 64 x 64."""
    monkeypatch.setattr(data, "OFFICIAL", [(("mpi3d",), (64,), ("shape", "size"), (3, 4))])


def test_the_program_finds_the_labels_that_the_function_finds():
    save("mine.npz", images=noise(), labels=np.stack([ROWS % 3, ROWS % 4], 1))
    command = [sys.executable, HERE / "data.py", "--data", "mine.npz"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "factor 0 3, factor 1 4" in done.stdout


@pytest.mark.parametrize("name, images", [
    ("mine.npz", noise()),
    ("mpi3d_toy.npz", noise(11)),
    ("mpi3d_toy.npz", noise(12, 32, 32)),
])
def test_labels_are_never_invented(official, name, images):
    dataset = data.open_dataset(save(name, images=images))
    assert dataset.factor_names == () and "no labels" in dataset.note


@pytest.mark.parametrize("labels", [
    ROWS % 3 * 0.1 + ROWS * 1e-13,
    np.array([1e-9, 1e-8, 1])[ROWS % 3],
    ROWS % 3 + 10**18,
    (ROWS % 3).astype(np.uint64) + np.uint64(2**63),
    (ROWS % 3).reshape(1, 12),
    np.rec.fromarrays([(ROWS % 3)[:, None]], names="field"),
    np.eye(4)[ROWS % 3],
])
def test_labels_of_any_kind_are_numbered(labels):
    dataset = dataset_of(labels=labels)
    assert dataset.factor_sizes == (3,) and "no factor" not in dataset.note
    assert same(dataset.factors(ROWS)[:, 0], ROWS % 3)


def test_the_note_says_what_0_stands_for_unless_it_is_0():
    assert "factor 0 from 0 on: 1, 2, 3" in dataset_of(labels=ROWS % 3 + 1).note
    assert dataset_of(labels=ROWS % 3).note == ""


TEXT_LABELS = [
    (["a", "b", "ç"], "a, b, ç"),
    (["2", "3.5", "10"], "2, 3.5, 10"),
    ([b"x", b"y ", b"z"], "x, y, z"),
]


@pytest.mark.parametrize("words, listed", TEXT_LABELS)
def test_labels_that_are_text_are_numbered_and_listed(words, listed):
    labels = np.array(words)[ROWS % 3]
    dataset = dataset_of(labels=labels)
    assert same(dataset.factors(ROWS)[:, 0], ROWS % 3)
    assert dataset.note == f"factor 0 from 0 on: {listed}"


def test_names_that_differ_in_capitals_are_two_factors():
    save("a.h5", **{"images": noise(), "labels/X": ROWS % 3, "labels/x": ROWS // 6})
    dataset = data.open_dataset("a.h5")
    assert dict(zip(dataset.factor_names, dataset.factor_sizes)) == {"X": 3, "x": 2}


def test_two_processes_may_convert_a_set_at_once(monkeypatch):
    save("a.npz", images=noise())
    read_cache = data.read_cache
    found = iter([False, False, True])  # at the end of the first one its file is gone again

    def read_if_found(*arguments):
        return read_cache(*arguments) if next(found) else None

    monkeypatch.setattr(data, "read_cache", read_if_found)
    assert same(shown(data.open_dataset("a.npz")), noise())


TABLE = np.stack([ROWS % 3, ROWS // 6], 1)
FIELDS = np.array([*zip(ROWS % 3 * 0.5, "xy" * 6)], [("hue", "f4"), ("kind", "S1")])


@pytest.mark.parametrize("labels", [TABLE, TABLE.T, np.eye(3)[TABLE]])
def test_a_table_of_labels_is_read_in_any_layout(labels):
    dataset = dataset_of(labels=labels, factor_names=np.array(["hue", "hue"]))
    assert dataset.factor_names == ("hue 0", "hue 1")  # both are kept
    assert dataset.factor_sizes == (3, 2)
    assert same(dataset.factors(ROWS), TABLE)


@pytest.mark.parametrize("ending, arrays", [
    ("npz", {"images": noise(), "labels": FIELDS}),
    ("h5", {"images": noise(), "labels/hue": ROWS % 3, "labels/kind": [*"xy"] * 6}),
    ("h5", {"train/images": noise(), "train/Labels": FIELDS, "labels": ROWS}),
])
def test_labels_with_names_keep_them(ending, arrays):
    dataset = dataset_of(ending, **arrays)
    assert dataset.factor_names == ("hue", "kind")
    assert same(dataset.factors(ROWS), np.stack([ROWS % 3, ROWS % 2], 1))


def test_a_column_that_makes_no_factor_is_named_in_the_note():
    rows = np.arange(3000)
    columns = [rows % 7, np.where(rows, rows % 2, np.nan), rows * 0 + 5, rows // 2]
    names = np.array(["a", "b", "c", "d"])
    images = noise(3000, 4, 4)
    dataset = dataset_of(images=images, labels=np.stack(columns, 1), factor_names=names)

    assert (dataset.factor_names, dataset.factor_sizes) == (("a",), (7,))
    for reason in ("b (has gaps", "c (never varies", "d (1,500 values"):
        assert reason in dataset.note


@pytest.mark.parametrize("ending, kind, missing", [
    ("npz", "U5", ""),
    ("npz", "S5", "  "),
    ("h5", object, ""),
    ("h5", object, "nan"),
])
def test_text_that_says_nothing_is_a_gap(ending, kind, missing):
    labels = np.array(["red", "blue", missing] * 4, kind)
    assert "has gaps" in dataset_of(ending, labels=labels).note


def test_grey_images_whose_number_comes_last_are_refused():
    images = noise(12, 9, 7)[..., 0]
    refused(lambda: dataset_of(images=np.moveaxis(images, 0, -1), labels=ROWS), "(n, h, w)")
    assert dataset_of(images=images, labels=np.ones((7, 12))).count == 12  # (F, n)


@pytest.mark.parametrize("labels", [ROWS[:5], np.array([{}] * 12), np.array(7), ROWS])
def test_images_are_used_though_their_labels_cannot_be(labels):
    dataset = dataset_of(labels=labels)
    assert same(shown(dataset), noise())
    assert dataset.factors(ROWS).shape == (12, 0) and dataset.note


# Folders
def test_subfolders_are_a_class():
    for k, name in enumerate(["cat/1", "cat/2", "nan/1", "nan/2", "bird/1"]):
        save_picture(f"set/{name}.png", noise(1, seed=k)[0])
    dataset = data.open_dataset("set")
    assert (dataset.factor_names, dataset.factor_sizes) == (("class",), (3,))
    assert dataset.factors(range(5)).flatten().tolist() == [0, 1, 1, 2, 2]
    assert same(shown(dataset, 0), noise(1, seed=4))

    os.rename("set/cat", "set/ape")  # pictures of the same dates and sizes
    renamed = data.open_dataset("set")
    assert same(shown(renamed, 0), noise(1, seed=0))
    assert "ape, bird, nan" in renamed.note
    assert "black" not in dataset.note  # bytes are what they are


def test_each_level_of_subfolders_is_a_factor():
    for k, (shape, size) in enumerate([("cube", 10), ("cube", 2), ("ball", 10)]):
        save_picture(f"set/all/{shape}/{size}/a.png", noise(1, seed=k)[0])
        save_picture(f"set/all/{shape}/{size}/b.png", noise(1, seed=9 - k)[0])
    dataset = data.open_dataset("set")
    assert dataset.factor_names == ("folder 1", "folder 2")
    assert dataset.factors(range(0, 6, 2)).tolist() == [[0, 1], [1, 1], [1, 0]]
    assert "folder 1 from 0 on: ball, cube; folder 2 from 0 on: 2, 10" in dataset.note


def test_a_picture_with_damaged_pixels_is_left_out():
    for k in range(3):
        save_picture(f"set/{k}.png", noise(1, seed=k)[0])
    content = Path("set/1.png").read_bytes()
    middle = len(content) // 2
    Path("set/1.png").write_bytes(content[:middle] + bytes(512) + content[middle + 512:])

    dataset = data.open_dataset("set")  # if asked twice, Pillow would give black pixels
    assert same(shown(dataset), np.concatenate([noise(1, seed=0), noise(1, seed=2)]))


def test_hidden_files_are_no_pictures():
    names = ["a.png", ".hidden/a.png", "._a.png", "__MACOSX/a.png", "b/c.JPE", "b/readme.txt"]
    for k, name in enumerate(names):
        save_picture(f"set/{name}", noise(1, seed=k)[0], format="PNG")

    dataset = data.open_dataset("set")
    assert same(shown(dataset), np.concatenate([noise(1, seed=0), noise(1, seed=4)]))
    assert "1 files are not used, such as readme.txt" in dataset.note

    for name in ("config.json", "checkpoint.pt"):  # a run in the folder of its data
        Path("set", "run").mkdir(exist_ok=True)
        Path("set", "run", name).touch()
    save_picture("set/run/samples.png", noise(1)[0])
    assert data.open_dataset("set").identity == dataset.identity


def link(place, target):
    try:
        Path(place).symlink_to(target)
    except OSError:
        pytest.skip("this system lets nobody make links")


def test_links_are_followed_but_not_in_circles(folder):
    save_picture("set/a.png", noise(1)[0])
    save_picture("away/z.png", noise(1, seed=1)[0])
    link("set/linked", folder / "away")
    link("set/up", folder / "set")
    link("set/nowhere.png", "gone")

    assert same(shown(data.open_dataset("set")), np.concatenate([noise(1), noise(1, seed=1)]))


def test_a_known_set_is_known_by_its_name_even_if_that_is_a_link(folder, official):
    save("blobs/0a1b2c.npz", images=noise())
    Path("snapshot").mkdir()
    os.rename("blobs/0a1b2c.npz", "blobs/0a1b2c")
    link("snapshot/mpi3d_real.npz", folder / "blobs/0a1b2c")

    dataset = data.open_dataset("snapshot/mpi3d_real.npz")
    assert dataset.factor_names == ("shape", "size")
    assert same(dataset.factors(ROWS), data.all_combinations((3, 4)))
    assert len(listing("snapshot")) == 3 and len(listing("blobs")) == 1


def save_celeba(ending, begin, mark, words):
    """Four faces, the second of them damaged, with 40 attributes, of which words are the two
    values; returns faces and attributes."""
    faces = noise(4, 218, 178)
    attributes = np.random.default_rng(0).choice([-1, 1], (4, 40))
    names = [f"Attribute_{j}" for j in range(40)]
    rows = [mark.join(names)]
    for k in range(4):
        name = f"{k + 1:06d}.jpg"
        save_picture(f"celeba/{name}", faces[k], format="PNG")  # so that it stays exact
        values = [words[int(value > 0)] for value in attributes[k]]
        rows.append(mark.join([name, *values]))

    Path("celeba/000002.jpg").write_bytes(b"damaged")
    Path(f"list_attr_celeba.{ending}").write_text(begin + "\n".join(rows))
    return faces, attributes > 0


@pytest.mark.parametrize("rows", ["a 2", "a nan", "a 1\nb/a 1"])
def test_a_list_that_does_not_fit_gives_no_attributes(rows):
    save_picture("celeba/a.png", noise()[0])
    Path("celeba/list_attr_celeba.txt").write_text("Smiling\n" + rows)
    dataset = data.open_dataset("celeba")
    assert dataset.attribute_names == () and "is not used" in dataset.note

    Path("celeba/list_attr_celeba.txt").write_text("1\nSmiling\na -1")
    assert data.open_dataset("celeba").attribute_names == ("Smiling",)


@pytest.mark.parametrize("ending, begin, mark, words", [
    ("txt", "4\n", "  ", ["-1", "1"]),
    ("csv", "image_id,", ",", ["-1", "1"]),
    ("csv", "image_id,", ",", ["-1.0", "+1.0"]),
    ("csv", "image_id,", ",", ["False", "True"]),
])
def test_faces_have_attributes_and_a_crop(ending, begin, mark, words):
    faces, attributes = save_celeba(ending, begin, mark, words)
    dataset = data.open_dataset("celeba", size=128)

    whole = [0, 2, 3]  # the second one is damaged
    middle = faces[whole, 57:185, 25:153]
    assert same(shown(dataset), middle)
    assert dataset.attribute_names[39] == "Attribute_39"
    assert same(dataset.attributes(slice(None)), attributes[whole])

    os.rename("celeba", "others")  # other sets have pictures of these names
    others = data.open_dataset("others")
    assert others.attribute_names == ()


def mat_element(kind, content):
    if len(content) <= 4:  # the small form: data in the tag
        return struct.pack("<I", len(content) << 16 | kind) + content.ljust(4, b"\0")
    padding = b"" if kind == 15 else bytes(-len(content) % 8)
    return struct.pack("<II", kind, len(content)) + content + padding


def mat_file(**arrays):
    """A MATLAB file of level 5 with these uint8 arrays, compressed."""
    content = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<HH", 0x0100, 0x4D49)
    for name, array in arrays.items():
        parts = [
            mat_element(6, struct.pack("<II", 9, 0)),
            mat_element(5, np.array(array.shape, "<i4").tobytes()),
            mat_element(1, name.encode()),
            mat_element(2, array.tobytes(order="F")),
        ]
        content += mat_element(15, zlib.compress(mat_element(14, b"".join(parts))))
    return content


def test_cars3d_is_read_in_the_order_of_its_list(folder):
    cars = {"car_009_mesh": noise(96), "car_001_mesh": noise(96, seed=1)}
    for name, views in cars.items():
        im = views.reshape(4, 24, 64, 64, 3).transpose(2, 3, 4, 1, 0)  # -> (h, w, 3, 24, 4)
        content = mat_file(mask_of_it=np.zeros((3, 1), np.uint8), im=im)
        Path(f"{name}.mat").write_bytes(content)
    Path("list.txt").write_text("\n".join(cars))

    dataset = data.open_dataset(folder)
    assert (dataset.name, dataset.factor_sizes) == ("Cars3D", (4, 24, 2))
    assert same(shown(dataset), np.concatenate(list(cars.values())))
    elevation, azimuth, car = dataset.factors(slice(None)).T
    assert same(car * 96 + elevation * 24 + azimuth, np.arange(192))


# The cache
def test_the_cache_is_read_as_long_as_the_data_are_the_same():
    path = save("a.npz", images=noise())
    data.open_dataset(path)
    with mock.patch("data.write_cache", side_effect=AssertionError):
        assert same(shown(data.open_dataset(path)), noise())

    save(path, images=noise(4, seed=1))
    assert same(shown(data.open_dataset(path)), noise(4, seed=1))
    assert listing() == ["a.npz", "a.npz.64.cache.npy", "a.npz.64.cache.npz"]


def test_sets_of_equal_name_keep_caches_of_their_own():
    for k in range(2):
        save(f"{k}/a.npz", images=noise(seed=k))
        os.utime(f"{k}/a.npz", (0, 0))
    for k in (0, 1, 0):
        assert same(shown(data.open_dataset(f"{k}/a.npz", cache="caches")), noise(seed=k))

    assert len(listing("caches")) == 4


@pytest.mark.parametrize("step", ["shutil.disk_usage", "os.replace", "tempfile.mkdtemp"])
def test_a_cache_that_cannot_be_written_leaves_nothing(step):
    save("a.npz", images=noise())
    with mock.patch(f"data.{step}", side_effect=OSError(30, "Read-only file system")):
        refused(lambda: data.open_dataset("a.npz"), "Read-only", "cache= in Python", "--cache DIR")

    assert listing() == ["a.npz"]
    assert same(shown(data.open_dataset("a.npz", cache="elsewhere")), noise())


@pytest.mark.parametrize("ending, end", [("npy", -1), ("npz", 9)])
def test_a_file_that_is_no_whole_cache_is_not_replaced(ending, end):
    data.open_dataset(save("a.npz", images=noise()))
    cache = Path(f"a.npz.64.cache.{ending}")
    part = cache.read_bytes()[:end]
    cache.write_bytes(part)
    refused(lambda: data.open_dataset("a.npz"), "in the way")

    assert cache.read_bytes() == part


@pytest.mark.parametrize("ending", ["npz", "h5"])
def test_an_interrupt_leaves_nothing(ending):
    save(f"a.{ending}", images=noise())
    with mock.patch("data.shrink", side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt) as caught:
            data.open_dataset(f"a.{ending}")
    assert listing() == [f"a.{ending}"]

    # As in a notebook, `caught` keeps all variables alive. The file is closed all the same:
    os.rename(f"a.{ending}", "b")  # Windows lets nobody rename an open file,
    if ending == "h5":
        h5py.File("b", "a").close()  # nor does HDF5 open one anew for writing.
    assert caught.tb is not None


@pytest.mark.skipif(os.name == "nt", reason="Windows does not say whether a process lives")
def test_what_a_killed_process_left_is_removed():
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    with mock.patch("os.getpid", return_value=killed.pid):
        kept_open = data.scratch_folder(Path("."))
        left_behind = kept_open.__enter__()

    with data.scratch_folder(Path(".")) as alive:
        assert not left_behind.exists()
        with data.scratch_folder(Path(".")):
            assert alive.exists() and len(listing()) == 2
    assert listing() == []


@pytest.mark.parametrize("ending", ["npz", "h5"])
def test_a_conversion_takes_little_memory(ending, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 1 << 19)
    images = np.full((1500, 64, 64, 3), 7, np.uint8, order="F")  # 18 MB
    path = save(f"a.{ending}", images=images)
    tracemalloc.start()
    data.open_dataset(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 6e6


# What a user can type


def test_the_command_line_takes_words_of_any_type(capsys):
    save("a.npz", images=noise(), labels=ROWS % 3)
    words = ["--data", Path("a.npz"), "--size", 32, "--cache", Path("c"), "--grid", Path("g.png")]
    data.main(words)

    assert "a: 12 images of 32x32, factors factor 0 3" in capsys.readouterr().out
    assert Image.open("g.png").size == (320, 160)


def test_the_command_line_starts_without_unix_signals(monkeypatch, capsys):
    monkeypatch.delattr(signal, "SIGHUP", raising=False)
    monkeypatch.setattr("sys.argv", ["data.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(data.__file__, run_name="__main__")
    assert ended.value.code == 0
    assert "--cache DIR" in capsys.readouterr().out


def save_wrong_data():
    """Files and folders of every kind that cannot be used."""
    for ending in ("npz", "h5", "npy"):
        path = Path(save(f"short.{ending}", images=noise(4)))
        path.write_bytes(path.read_bytes()[:5000])
    save("whole.npz", images=noise())

    np.save("objects.npy", {"images": noise()})
    with zipfile.ZipFile("pictures.zip", "w") as archive:
        archive.writestr("a/b.png", b"hello")

    half = mat_file(im=np.zeros((8, 8, 3, 12, 4), np.uint8))
    contents = {"cars/car_1_mesh.mat": b"x", "half/car_1_mesh.mat": half,
                "text/readme.txt": b"hello", "set/a.png": b"damaged"}
    for name, content in contents.items():
        Path(name).parent.mkdir()
        Path(name).write_bytes(content)


@pytest.mark.parametrize("words, reason", [
    ("--size 63", "expected 32, 64 or 128"),
    ("--data whole.npz --grid x.npz", "--grid is x.npz; expected a picture"),
    ("--data whole.npz --grid no/x.png", "in a folder that exists"),
    ("--data absent", "does not exist"),
    ("--data short.npz", "no complete HDF5"),
    ("--data short.h5", "expected a complete, closed file"),
    ("--data short.npy", "expected a whole file"),
    ("--data objects.npy", "expected a whole file of numbers"),
    ("--data pictures.zip", "such as a/b.png; expected an .npz, or a folder: unpack it"),
    ("--data whole.npz --cache whole.npz", "cannot write"),
    ("--data cars", "expected that of a car"),
    ("--data half", "expected (h, w, 3, 24, 4)"),
    ("--data text", "such as readme.txt"),
    ("--data text/readme.txt", "begins with b'hello'"),
    ("--data set", "1 of 1 pictures"),
])
def test_wrong_data_is_a_single_line_of_error(words, reason, capsys):
    save_wrong_data()
    files = listing()
    with pytest.raises(SystemExit) as ended:
        data.main(words.split())

    line = capsys.readouterr().err
    assert ended.value.code == 2
    assert line.count("\n") == 1 and reason in line
    assert listing() == files


# ---- Training -----------------------------------------------------------------------------------

# Each part of the run gets a signal at one of its readings of images: one a step, and one more for
# the codebook (at step 7 of the first stage) and for the latents' std. Then it has saved this much.
PARTS = [
    (3, INTERRUPT, "first stage", 3),  # nothing is rounded yet
    (6, KILL, "first stage", 8),
    (4, HANG_UP, "first stage", 12),  # the stage's last step
    (8, INTERRUPT, "joint training", 6),  # in the quick look at pictures
    (4, KILL, "joint training", 9),
]


def test_interruptions_leave_the_same_bits(whole_run, pictures):
    for reading, number, stage, step in PARTS:
        dataset = Interrupted(pictures, {reading: [number]})
        with pytest.raises(KeyboardInterrupt, match="--resume parts"):
            if Path("parts").exists():
                go_on("parts", dataset)
            else:
                train_new("parts", dataset, data=str(pictures), score_every=6)
        assert (saved("parts")["stage"], saved("parts")["step"]) == (stage, step)
    go_on("parts", Interrupted(pictures, {}))

    assert equal(weights("parts"), weights(whole_run))
    columns = ("stage", "step", "lr", "grad_norm", "mse")
    assert log("parts", *columns) == log(whole_run, *columns)


@pytest.mark.parametrize("options", [
    {"variant": "anneal-vae", "steps": 4},
    {"variant": "factor-vae", "steps": 4},
    {"variant": "pixels", "steps": 4},
    {"first_stage": "deep", "vq_steps": 4, "steps": 0, "optimizer": "adamw"},
], ids=str)
def test_an_interrupted_variant_has_the_same_bits(options, pictures, monkeypatch):
    monkeypatch.setitem(train.FIRST_STAGE["deep"], "batch", 4)
    train_new("whole", pictures, **options)
    with pytest.raises(KeyboardInterrupt):
        train_new("parts", Interrupted(pictures, {3: [KILL]}), **options)

    assert 0 < saved("parts")["step"] < 4
    go_on("parts", data.open_dataset(pictures, 32))
    assert equal(weights("parts"), weights("whole"))


def test_a_signal_during_the_scores_ends_a_finished_run(copied_run, pictures):
    before = weights(copied_run)
    with pytest.raises(KeyboardInterrupt, match="the weights are saved"):
        go_on(copied_run, Interrupted(pictures, {1: [INTERRUPT]}))
    assert equal(weights(copied_run), before)


def test_a_run_that_is_being_trained_is_left_alone(copied_run, pictures):
    pytest.importorskip("fcntl")
    with train.alone_in(Path(copied_run)):
        line = refused(lambda: train.main(["--resume", copied_run]), "by another process")
    assert "--resume" not in line
    go_on(copied_run, data.open_dataset(pictures, 32))


@pytest.mark.parametrize("words, new", [
    (["--resume", "run"], False),
    (["--out", "fresh"], True),
])
def test_a_run_that_went_on_during_a_conversion_is_left_alone(copied_run, pictures, monkeypatch,
                                                               words, new):
    open_dataset = data.open_dataset
    written = {}

    def slow(*arguments):
        """Meanwhile a second process trains the same run to its end."""
        target = Path(words[1], "checkpoint.pt")
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(Path(copied_run, "checkpoint.pt"), f"{target}.new")
        os.replace(f"{target}.new", target)
        written[target] = target.read_bytes()
        return open_dataset(*arguments)

    monkeypatch.setattr(data, "open_dataset", slow)
    given = flags(data=pictures) if new else ["--steps", 14]
    refused(lambda: train.main([*words, *given]), "one did just now")
    for target, content in written.items():
        assert target.read_bytes() == content


def test_what_a_killed_process_left_is_removed(copied_run):
    Path(copied_run, "checkpoint.pt.4294967296.tmp").write_bytes(b"half")
    train.main(["--resume", copied_run, "--steps", 13])
    assert not list(Path(copied_run).glob("*.tmp"))


def test_a_second_signal_ends_at_once(pictures):
    dataset = Interrupted(pictures, {3: [KILL, KILL]})
    with pytest.raises(KeyboardInterrupt, match="stopped at once; go on with"):
        train_new("run", dataset)
    assert saved("run")["step"] == 0


def test_a_moved_run_goes_on_with_moved_data(copied_run, pictures, folder, monkeypatch):
    content = saved(copied_run)
    config = {**content["config"], "data": str(folder / "gone.npz")}
    save_checkpoint({**content, "config": config}, copied_run)
    Path("deep").mkdir()
    shutil.copy(pictures, "moved.npz")
    monkeypatch.chdir("deep")

    refused(lambda: train.main(["--resume", "../run"]), "gone.npz", "--data")
    train.main(["--resume", "../run", "--data", "../moved.npz", "--steps", "13"])
    assert saved("../run")["step"] == 13
    assert train.load_run("../run")[1].data == str(folder / "moved.npz")


def test_other_data_are_refused(copied_run):
    images = np.zeros((300, 32, 32, 3), np.uint8)
    np.savez("others.npz", images=images)
    refused(lambda: train.main(["--resume", "run", "--data", "others.npz"]), "--data", "digest")


def test_training_lowers_the_loss(pictures):
    train_new("run", pictures, vq_steps=1, steps=24, optimizer="adamw", lr=3e-2)
    rows = log("run", "stage", "loss")
    losses = [float(loss) for stage, loss in rows if stage == "joint training"]
    assert losses[-1] < 0.7 * losses[0]


def test_a_loaded_run_has_the_averaged_weights(whole_run):
    model, config, about = train.load_run(whole_run)
    content = saved(whole_run)
    assert equal(model.state_dict(), {**content["model"], **content["ema"]})
    assert not equal(content["ema"], {name: content["model"][name] for name in content["ema"]})
    assert config.steps == about["step"] == 12
    assert about["scores"]["tflop"] > 0


def test_the_average_moves_by_its_share_and_leaves_the_first_stage():
    average = tiny_model()
    model = tiny_model()
    for zeros, ones in zip(average.parameters(), model.parameters()):
        zeros.data.fill_(0)
        ones.data.fill_(1)

    train.update_average(average, model, decay=0.9)
    for name, value in average.named_parameters():
        expected = 0.0 if name.startswith("first_stage.") else 0.1
        assert_close(value.data, torch.full_like(value, expected), msg=name)


def test_the_first_stages_encoder_stops_where_its_recipe_says(pictures, monkeypatch):
    monkeypatch.setitem(train.FIRST_STAGE["linear"], "freeze_encoder_at", 3)
    with pytest.raises(KeyboardInterrupt):
        train_new("run", Interrupted(pictures, {8: [KILL]}), steps=0)
    early = saved("run")["model"]
    go_on("run", data.open_dataset(pictures, 32))

    late = saved("run")["model"]
    for layer, stays in (("encoder.1.weight", True), ("decoder.0.weight", False)):
        assert torch.equal(early[f"autoencoder.{layer}"], late[f"first_stage.{layer}"]) == stays


# What is drawn, and how fast weights change
@pytest.mark.parametrize("order, step, largest_of", [
    ("uniform", 200, 1), ("weak-first", 99, -3), ("weak-first", 100, 3)])
def test_timesteps_have_their_distribution(order, step, largest_of):
    config = train.Config(batch=40_000, steps=300, timesteps=20, noise_order=order)
    torch.manual_seed(0)
    t = train.draw_timesteps(config, step)

    k = torch.arange(21)
    reached = (t[:, None] <= k).float().mean(0)  # share of timesteps up to k
    if largest_of > 0:
        expected = (k / 20)**largest_of
    else:  # the lowest of three: one minus the chance that all are above k
        expected = 1 - (1 - k / 20)**-largest_of
    assert_close(reached, expected, atol=0.01, rtol=0)


def test_the_learning_rate_rises_stays_and_falls():
    expected = {0: 0.02, 49: 1.0, 99: 2.0, 600: 2.0, 800: 1.0, 999: 0.005}
    for step, rate in expected.items():
        assert train.learning_rate(2.0, step, 1000, decay=0.4) == approx(rate)
    assert train.learning_rate(2.0, 999, 1000, 0.0) == 2.0


# The weights of layers at the ends of each network, which AdamW keeps.
ENDS = {
    "cnn": ["encoder.layers.15.weight"],
    "cnn_bn": ["encoder.out.weight"],
    "cnn_patch": ["encoder.out.weight"],
    "transformer": [],
    "deep": ["encoder.1.weight", "encoder.15.weight", "decoder.0.weight", "decoder.19.weight"],
    "linear": ["encoder.1.weight", "decoder.0.weight", "decoder.12.weight"],
}
# Matrices that are no layer's weights: attention among positions aside, what is looked up or added.
LEARNED_TABLES = ["quantizer.codebook", "encoder.positions", "encoder.queries"]


def matrices_inside(model, ends):
    """Names of all that has the form of a matrix or convolution, but for ends and tables."""
    names = []
    for name, parameter in model.named_parameters():
        trained = parameter.requires_grad and parameter.ndim in (2, 4)
        if trained and name not in ends + LEARNED_TABLES:
            names.append(name)
    return names


@pytest.mark.parametrize("encoder", encdiff.ENCODERS)
def test_muon_trains_the_matrices_inside_encoder_and_denoiser(encoder):
    model = tiny_model(encoder=encoder)
    ends = ENDS[encoder] + ["denoiser.conv_in.weight", "denoiser.conv_out.weight"]
    for_muon, for_adamw = train.split_for_muon(model)
    assert for_muon == matrices_inside(model, ends)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(for_muon + for_adamw) == sorted(trained)


@pytest.mark.parametrize("kind", vq.KINDS)
def test_muon_trains_the_matrices_inside_the_first_stage(kind):
    autoencoder = vq.KINDS[kind]()
    for_muon, for_adamw = train.split_for_muon(autoencoder)
    assert for_muon == matrices_inside(autoencoder, ENDS[kind])
    assert set(ENDS[kind] + ["quantizer.codebook"]) <= set(for_adamw)


# torch's computes in bfloat16. How far ours may be away, relative to a step.
APART = [(torch.bfloat16, 1e-3), (torch.float32, 0.05)]
SHAPES = [(16, 48), (48, 16), (16, 8, 3, 3)]


@pytest.mark.parametrize("dtype, apart", APART, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_muon_is_torchs(shape, dtype, apart):
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().flatten(1).clone())
    our_muon = train.Muon([ours], 0.01, weight_decay=0.1, dtype=dtype)
    their_muon = torch.optim.Muon([theirs], 0.01, weight_decay=0.1)

    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.flatten(1)
        our_muon.step()
        their_muon.step()

    # Each step has the norm 0.01 times the root of the rank, and more for tall matrices.
    step = 0.01 * theirs.shape[0]**0.5
    assert (ours.flatten(1) - theirs).norm() <= apart * 2 * step


# Scores
def test_a_run_with_labels_ends_with_scores():
    dataset = data.open_dataset(save_pictures("labelled.npz", labels=FACTORS), 32)
    train_new("run", dataset, variant="beta-vae", steps=2, score_every=1)
    scores = json.loads(Path("run/metrics.json").read_text())
    for name in (*train.Run.SCORES, "exchanges", "clean_exchanges"):
        assert 0 <= scores[name] <= 1
    quick = [value for step, value in log("run", "step", "disentanglement") if value]
    assert len(quick) == 1


# Combinations that are not trained on
def test_a_held_out_combination_is_scored_and_not_trained_on():
    dataset = data.open_dataset(save_pictures("labelled.npz", labels=FACTORS), 32)
    first, second = dataset.factor_names
    with mock.patch.object(train, "train_first_stage", wraps=train.train_first_stage) as stage_1, \
            mock.patch.object(train, "train_jointly", wraps=train.train_jointly) as stage_2:
        train_new("run", dataset, hold_out=f"{second}=2 & {first}=1", vq_steps=2, steps=2)

    others = (FACTORS != (1, 2)).any(1)
    for stage in (stage_1, stage_2):
        seen = stage.call_args.args[1]
        assert seen.factors(slice(None)).tolist() == FACTORS[others].tolist()
        assert torch.equal(seen.images(slice(None)), dataset.images(others))
    scores = json.loads(Path("run/metrics.json").read_text())
    for name in ("held_out_informativeness", "held_out_mse", "other_mse", "held_out_exchanges"):
        assert 0 <= scores[name] <= 1
    with Image.open("run/held_out.png") as picture:
        reds = np.array(picture)[5, 5::32, 0]  # its first row holds the images themselves
    assert set(reds.tolist()) == {100}


@pytest.mark.parametrize("combination, found", [
    ("shape=3", "names one factor"),
    ("floor hue=0 & shape=4", "'4'; expected 0 to 3"),
    ("floor hue=0 & shape=-1", "'-1'; expected 0 to 3"),
    ("floor hue=0 & shape", "'shape' is no factor with a value; expected NAME=VALUE"),
    ("floor hue=0 & colour=1", "'colour'; expected one of floor hue"),
    ("shape=1 & shape=2", "shape is named twice"),
    ("shape=1 & floor hue=" + 5000 * "9", "expected 0 to 9"),
])
def test_a_combination_that_does_not_exist_is_refused(combination, found, rendered):
    refused(lambda: data.read_combination(rendered, combination), found)


def test_factors_of_any_name_can_be_held_out():
    table = np.indices((2, 2, 3)).reshape(3, -1).T
    names = ["a & b  ", "x", "x"]  # of fixed width, and one of them twice
    dataset = dataset_of(images=noise(), labels=table, factor_names=names)
    assert dataset.factor_names == ("a & b", "x 1", "x 2")
    assert data.read_combination(dataset, "a & b=1&x 2=0") == {0: 1, 2: 0}
    dataset = dataset_of(images=noise(), labels=table, factor_names=["R2&D2", "y", "z"])
    assert data.read_combination(dataset, "z=2 & R2&D2=1") == {2: 2, 0: 1}

    names = ["x", "x", "x 0"]
    dataset = dataset_of(images=noise(), labels=table, factor_names=names)
    assert dataset.factor_sizes == (2, 2, 3)


def test_a_value_that_no_other_image_has_cannot_be_held_out():
    table = np.stack([ROWS % 3, ROWS % 2 * (ROWS % 3 > 0)], 1)  # the first is 0 in rows 0, 3, ...
    dataset = dataset_of(images=noise(), labels=table, factor_names=["a", "b"])
    refused(lambda: data.split_off(dataset, {0: 0, 1: 0}), "all images with a=0")


def test_two_processes_train_like_one(pictures):
    # BatchNorm and dropout depend on the images that a process sees.
    words = flags(encoder="cnn", dropout=0.0, steps=3, vq_steps=3, data=pictures)
    words = [str(word) for word in words]
    train.main(["--out", "one", *words])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command = [*torchrun, str(HERE / "train.py"), "--out", "two", *words]
    subprocess.run(command, check=True, capture_output=True)

    for name in ("loss", "grad_norm"):
        one = [float(value) for value, in log("one", name)]
        two = [float(value) for value, in log("two", name)]
        assert len(one) == 2
        assert one == approx(two, rel=1e-3)


# ---- What a user can get wrong ------------------------------------------------------------------


def ended(capsys, run):
    """run() within the command line's net -> status, the line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end, train.one_line_errors():
        run()
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    return end.value.code, line


BAD_FLAGS = [
    "--batch 0", "--steps many", "--lr nan", f"--seed {2**64}", "--channels 30", "--size 48",
    "--multipliers 1 2 2 2 2 2", "--learning-rate 1", "--device cuda", "--first-stage nowhere",
    "--first-stage ~nobody/run", "--lr 1e38", "--cache=",
    "--data nowhere", "--resume nowhere", "--variant slots", "--variant ,",
    "--variant vector+vector", "--variant direct+adagn", "--variant euler+sparse",
]


@pytest.mark.parametrize("words", BAD_FLAGS)
def test_a_bad_flag_is_one_line_that_names_it(words, pictures, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = words.split()
    refused(lambda: train.main(["--out", "run", *flags(data=pictures), *words]), words[0])
    assert not Path("run").exists()


CHANGES = [
    ("--dropout 0.5", "dropout 0.1 -> 0.5"),
    ("--out other", "no --out"),
    ("--steps 5", "--steps is 5; expected 12 or more"),
]


@pytest.mark.parametrize("words, said", CHANGES)
def test_what_may_not_change_is_refused(copied_run, words, said):
    before = saved(copied_run)
    refused(lambda: train.main(["--resume", copied_run, *words.split()]), said)
    assert equal(saved(copied_run)["model"], before["model"])


def test_a_taken_folder_is_refused(copied_run, pictures):
    refused(lambda: train.main(["--out", copied_run, *flags(data=pictures)]), "--resume run")
    Path("pictures").mkdir()
    refused(lambda: train.main(["--out", "pictures", *flags(data="./pictures")]), "of the data")
    save_picture("pictures/cat/a.png", noise(1)[0])
    inside = ["--out", "pictures/cat", *flags(data="pictures")]
    refused(lambda: train.main(inside), "of the data")
    Path("file").touch()
    refused(lambda: train.main(["--out", "file", *flags(data=pictures)]), "this is a file")


def test_a_run_of_an_older_format_names_the_commit_that_reads_it(copied_run):
    save_checkpoint({**saved(copied_run), "format": 7, "config": {"self_attention": True}},
                    copied_run)
    refused(lambda: train.load_run(copied_run), "format 7", "git checkout 26559b5")


def foreign_contents(good):
    """What a foreign checkpoint may hold in place of this content."""
    class Trap:
        def __reduce__(self):
            return os.mkdir, ("trapped",)

    narrow = {**good["config"], "channels": 32}
    return [[1], {"format": 4}, {**good, "config": Trap()}, {**good, "config": narrow},
            {**good, "model": [1]}]


def test_a_foreign_or_damaged_checkpoint_is_one_line_and_executes_nothing(copied_run):
    file = Path(copied_run, "checkpoint.pt")
    whole = file.read_bytes()
    for content in foreign_contents(saved(copied_run)):
        save_checkpoint(content, copied_run)
        refused(lambda: train.load_run(copied_run), "run")
    for size in (0, 5000):
        file.write_bytes(whole[:size])
        refused(lambda: train.load_run(copied_run), "run")
    assert not Path("trapped").exists()


def test_a_first_stage_from_a_run_at_home_stays_as_it_is(whole_run, pictures, folder, monkeypatch):
    home = folder / "home"
    shutil.copytree(whole_run, home / "run")
    shutil.copy(pictures, home)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))

    words = flags(steps=1, data="~/pictures.npz", first_stage="~/run")
    train.main(["--out", "~/borrower", *words])
    shutil.rmtree(home / "run")  # what it lent is kept
    train.main(["--resume", "~/borrower", "--steps", 2])

    lent = train.load_run(whole_run)[0]
    got = train.load_run(home / "borrower")[0]
    assert equal(lent.first_stage.state_dict(), got.first_stage.state_dict())
    assert not equal(lent.denoiser.state_dict(), got.denoiser.state_dict())
    assert os.listdir(folder) == ["home"]


def test_a_signal_before_training_is_one_line(pictures, monkeypatch, capsys):
    monkeypatch.setattr(data, "open_dataset", lambda *a: signal.raise_signal(KILL))
    status, line = ended(capsys, lambda: train.main(["--out", "run", *flags(data=pictures)]))

    assert status == 130
    assert line == "interrupted; nothing half-written is left\n"
    assert not Path("run").exists()


def test_a_log_that_cannot_be_written_does_not_end_a_run(pictures):
    Path("run/log.csv").mkdir(parents=True)  # a folder cannot be replaced by a file
    train_new("run", pictures, variant="beta-vae", steps=2)
    assert saved("run")["step"] == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_keeps_the_last_good_checkpoint(copied_run, monkeypatch, capsys):
    before = weights(copied_run)
    train_run = train.train_run

    def on_a_full_disk(*arguments):
        Path(copied_run, f"checkpoint.pt.{os.getpid()}.tmp").symlink_to("/dev/full")
        train_run(*arguments)

    monkeypatch.setattr(train, "train_run", on_a_full_disk)
    status, line = ended(capsys, lambda: train.main(["--resume", copied_run, "--steps", 13]))

    assert status == 2
    assert "No space left" in line and "what was there is untouched" in line
    assert equal(weights(copied_run), before)
    assert not list(Path(copied_run).glob("*.tmp"))


def test_advice_for_a_loss_that_is_not_finite_works(pictures):
    options = dict(variant="beta-vae", steps=4, lr=3e-3, data=str(pictures))
    with pytest.raises(KeyboardInterrupt):
        train_new("a run", Interrupted(pictures, {2: [KILL]}), **options)

    good = saved("a run")
    broken = saved("a run")
    broken["model"]["decoder.0.bias"][0] = math.nan
    save_checkpoint(broken, "a run")
    line = refused(lambda: train.main(["--resume", "a run"]), f"in step {good['step'] + 1} of the")

    save_checkpoint(good, "a run")
    train.main(shlex.split(line.split("train.py ")[1]))
    assert train.load_run("a run")[1].lr == 1e-3


# Threads, memory, terminal
@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="free cores are counted on Linux")
def test_cores_that_others_use_get_no_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(4)

    busy = []
    try:
        for _ in range(2 * len(os.sched_getaffinity(0))):
            busy.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
        train.Backend("cpu")
        assert torch.get_num_threads() == 1
    finally:
        for process in busy:
            process.kill()
            process.wait()
        torch.set_num_threads(1)


@pytest.mark.parametrize("library", [torch, np], ids=["torch", "numpy"])
def test_a_lack_of_memory_is_one_line(library, capsys):
    status, line = ended(capsys, lambda: library.empty(2**58))
    assert status == 2
    assert line == "error: out of memory; try a smaller batch, count or model\n"


# ---- Pictures, tables and pages of a trained run ------------------------------------------------


# Of six codes' variance the share that the two factors of the pictures explain. The trees ask the
# first of equal codes.
EXPLAINED = [[0.0, 0.1], [0.6, 0.0], [0.0, 0.0], [0.0, 0.8], [0.4, 0.0], [0.0, 0.1]]
IMPORTANCE = [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
OF_FACTORS = [[1, 4], [3, 0, 5]]  # the tokens of each factor, the purest first


def write_scores(folder, **scores):
    """Give a run these scores in place of its own."""
    file = Path(folder, "metrics.json")
    config = json.loads(file.read_text())["config"]
    file.write_text(json.dumps({**scores, "config": config}))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of finished runs with scores as long ones would have, and of damaged ones. Their
    dataset has 3 x 4 colours, of the upper and the lower half. Nothing in it is to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    toy = save_pictures(folder / "toy.npz", labels=FACTORS)
    scores = {"importance": IMPORTANCE, "variance_explained": EXPLAINED}
    with mock.patch("train.score", return_value=scores):
        train_new(folder / "run", toy, vq_steps=2, steps=4, score_every=2)
        train_new(folder / "vae", toy, variant="beta-vae", steps=2)
        for name in ("vector", "direct", "adagn"):
            lender = str(folder / "run")
            train_new(folder / name, toy, variant=name, first_stage_from=lender, steps=2)
    write_scores(folder / "direct", note="no labels")

    content = saved(folder / "run")
    moved = {**content["config"], "data": "/no/such.npz"}
    for name, change in [("unfinished", {"stage": "first stage"}), ("damaged", {}),
                         ("moved", {"config": moved})]:
        save_checkpoint({**content, **change}, folder / name)
    (folder / "damaged/metrics.json").write_text("{")
    (folder / "damaged/log.csv").write_text("a,b\n1,2\n")
    return folder


def show(*words):
    sample.main(words)


def opened(path, *words):
    """The run, opened as the command line does, and the command line."""
    args = sample.parse(["swap", path, *words])
    return sample.open_run(args), args


class Perfect:
    """Stands in for a model of the toy dataset that disentangles: code 1 is the upper half's value,
    code 3 the lower half's. It draws without an error. The others of its six codes do nothing."""

    latent_shape = (1,)

    def represent(self, images):
        codes = torch.zeros(len(images), 6)
        codes[:, 1] = (images[:, 0, 0, 0] + 1) * 127.5 / 100
        codes[:, 3] = (images[:, 1, -1, -1] + 1) * 127.5 / 80
        return codes

    def tokens(self, codes):
        return codes[..., None]

    def sample(self, tokens, noise=None, **options):
        pixels = torch.zeros(len(tokens), 3, 32, 32)
        pixels[:, 0, :16] = 100 * tokens[:, 1, :, None]
        pixels[:, 1, 16:] = 80 * tokens[:, 3, :, None]
        return train.to_float(pixels)


def values_in(images):
    """The two factors of images of the toy dataset, as they were drawn (B, 2)."""
    return Perfect().represent(images)[:, [1, 3]].round()


@pytest.fixture
def perfect(runs):
    """A run whose model is Perfect."""
    run, _ = opened(runs / "run")
    run.model = Perfect()
    return run


@pytest.fixture
def loud(runs):
    """Copies of runs whose denoisers are changed at random, so that they do read their tokens."""
    def copy(name):
        shutil.copytree(runs / name, name)
        content = saved(name)
        for key, value in content["ema"].items():
            if key.startswith("denoiser."):
                value += 0.1 * torch.randn(value.shape)
        save_checkpoint(content, name)
        return name

    return copy


@pytest.fixture
def drawn_rows(monkeypatch):
    """{label: images} of the last picture of rows that was drawn."""
    rows = {}
    draw_grid = sample.grid

    def note_and_draw(images, labels, headings=()):
        rows.clear()
        rows.update(zip(labels, images))
        return draw_grid(images, labels, headings)

    monkeypatch.setattr(sample, "grid", note_and_draw)
    return rows


def set_flags(*words):
    """The command line of a verb, for a run that is opened already."""
    return sample.parse([*words, "--out", "picture.png"])


# Which token is whose
@pytest.mark.parametrize("name, words, tokens", [
    ("run", "", OF_FACTORS),
    ("run", "--tokens 5 2 4", [[4], [5], [2]]),
    ("direct", "", [[0], [1], [2], [3], [4], [5]]),  # it has no scores
])
def test_a_row_is_a_factor_unless_tokens_are_asked_for(runs, name, words, tokens):
    run, args = opened(runs / name, *words.split())
    assert [group for _, group in sample.picture_rows(run, args.tokens)] == tokens


def test_a_code_that_repeats_a_better_one_is_named_after_its_factor():
    rng = np.random.default_rng(0)
    factors = rng.integers(0, 5, size=(3000, 2))
    noise = rng.normal(size=(3000, 4))
    codes = factors[:, [0, 0, 1, 1]] + noise * [0.01, 0.3, 0.01, 100]  # better, worse; better, none
    scores = metrics.evaluate(codes, factors)
    assert scores["importance"][1][0] < 0.02  # the trees ask the better one
    assert metrics.tokens_of_factors(scores["variance_explained"]) == [[0, 1], [2]]


def test_a_mixed_code_is_named_after_the_factor_that_moves_it_far():
    shape, hue = np.divmod(np.arange(4000) % 40, 10)  # factors of 4 and of 10 values
    codes = np.stack([shape + hue / 100, shape / 100 + hue], axis=1)  # each shows both exactly
    factors = np.stack([shape, hue], axis=1)
    explained = metrics.variance_explained(codes, factors)
    of_shape = shape.var() / codes[:, 0].var()
    assert explained[0] == pytest.approx([of_shape, 1 - of_shape], abs=1e-3)
    assert metrics.tokens_of_factors(explained) == [[0], [1]]


def test_random_labels_explain_nothing_of_few_samples():
    rng = np.random.default_rng(0)
    tables = []
    for _ in range(50):
        codes = rng.normal(size=(100, 4)) * [1, 1e6, 1, 0]
        labels = rng.integers(15, size=(100, 1))
        tables.append(metrics.variance_explained(codes, labels))
    assert np.mean(tables) < 0.04  # without the degrees of freedom 14/99
    assert not np.any(tables, axis=0)[3]  # a constant code


# Exchanges that land
def test_an_exchange_of_no_token_never_lands(perfect):
    nothing = np.full((6, 2), 0.01)  # too little for a token to belong to a factor
    shares = metrics.exchanges_that_land(perfect.model, perfect.dataset, nothing)
    assert shares == {"factor 0": (0, 0, 1), "factor 1": (0, 0, 1)}


def test_an_exchange_that_changes_another_factor_too_lands_but_is_not_clean(perfect):
    all_tokens = np.full((6, 2), [0.9, 0.1])  # every token belongs to factor 0
    shares = metrics.exchanges_that_land(perfect.model, perfect.dataset, all_tokens, pairs=500)
    values = len(np.unique(FACTORS[:, 1]))
    assert shares["factor 0"] == (1, pytest.approx(1 / values, abs=0.07), 1)


@pytest.mark.parametrize("explained, share", [(EXPLAINED, 1), (np.zeros((6, 2)), 0)])
def test_exchanges_into_a_combination_start_without_it(perfect, explained, share):
    read = []
    images = perfect.dataset.images

    def note_and_read(rows):
        read.append(perfect.dataset.factors(rows))
        return images(rows)

    perfect.dataset.images = note_and_read
    wanted = {0: 1, 1: 2}
    noise = torch.zeros(16, 1)
    shares = metrics.exchanges_into(perfect.model, perfect.dataset, explained, wanted, noise)
    assert shares == {"factor 0": (share, share, 1), "factor 1": (share, share, 1)}

    # For each factor, 16 sources and 16 targets are read at once.
    pairs_of_factors = [rows for rows in read if len(rows) == 32]
    for pairs, exchanged, other in zip(pairs_of_factors, (0, 1), (1, 0), strict=True):
        source, target = pairs.split(16)
        assert (source[:, exchanged] != wanted[exchanged]).all()
        assert (source[:, other] == wanted[other]).all()
        assert (target[:, exchanged] == wanted[exchanged]).all()
        assert (target[:, other] != wanted[other]).all()


@pytest.mark.parametrize("verb, labels", [("swap", FACTORS[:, :1]), ("attention", None)])
def test_a_dataset_of_other_factors_is_drawn_without_a_table(runs, capsys, verb, labels):
    arrays = {"images": np.zeros((300, 32, 32, 3), np.uint8)}
    if labels is not None:
        arrays["labels"] = labels
    np.savez("other.npz", **arrays)

    show(verb, runs / "run", "--data", "other.npz", "--count", 1, "--steps", 1)
    output = capsys.readouterr().out
    assert "wrote " in output
    assert "expected the 2 that the run was scored with" in output


# What the pictures show
def test_swap_takes_one_factor_from_the_target(perfect, drawn_rows, capsys):
    sample.swap(perfect, set_flags("swap"))
    assert re.search(r"mean +1.00 +1.00 +1.00", capsys.readouterr().out)  # all exchanges land
    source = values_in(drawn_rows["source"])
    target = values_in(drawn_rows["target"])
    assert not torch.equal(source, target)
    for j, tokens in enumerate(OF_FACTORS):
        expected = source.clone()
        expected[:, j] = target[:, j]
        label = sample.row_label(f"factor {j}", tokens)
        assert torch.equal(values_in(drawn_rows[label]), expected)


def test_traverse_sweeps_one_factor_upwards_and_keeps_the_others(perfect, drawn_rows):
    sample.traverse(perfect, set_flags("traverse", "--count", 5))
    for j, tokens in enumerate(OF_FACTORS):
        label = sample.row_label(f"factor {j}", tokens)
        values = values_in(drawn_rows[label])  # the input, redrawn, then five values
        swept, kept = values[2:, j], values[:, 1 - j]
        assert torch.equal(swept, swept.sort().values)
        assert swept[0] == 0
        assert swept[-1] == FACTORS[:, j].max()
        assert len(kept.unique()) == 1


def test_attention_is_drawn_where_it_is():
    attention = torch.zeros(1, 16, 2)
    row, column = 1, 3  # of 4 x 4 positions
    attention[0, 4 * row + column, 1] = 1.0
    maps = sample.attention_maps([[attention]], 64)
    assert maps[0, 0].max() == 0
    assert maps[0, 1, 16:32, 48:].sum() > 0.5 * maps.sum()


@pytest.mark.parametrize("words", [
    "reconstruct {}/run --count 9 --sampler ddim --eta 1 --steps 3",
    "reconstruct {}/vae --count 9",
    "traverse {}/vector --count 3 --steps 2",
    "traverse {}/run --gif --count 3 --steps 2",
    "attention {}/direct --count 2 --tokens 0 2 4",
    "generate {}/adagn --count 10 --steps 2",
    "worth {}/run --count 4",
])
def test_every_verb_draws_every_kind_of_model(runs, words):
    name = "picture.gif" if "--gif" in words else "picture.png"
    show(*words.format(runs).split(), "--out", name)
    assert Image.open(name).width > 30


def test_a_picture_too_large_for_its_format_is_refused():
    args = argparse.Namespace(out="wide.gif")
    refused(lambda: sample.save(args, ".", Image.new("L", (65536, 1))), "at most 65,535 a side")


# Tables
def test_runs_that_find_the_same_codes_agree(runs, capsys):
    shutil.copytree(runs / "run", "twin")
    show("agree", runs / "run", "twin", runs / "vae")
    values = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()[1:]]
    assert values[0] == values[1] > values[2]


def test_curves_keep_two_runs_of_one_name(runs):
    for name in ("a/run", "b/run"):
        shutil.copytree(runs / "run", name)
    with mock.patch("sample.plot", wraps=sample.plot) as plot:
        show("curves", "a/run", "b/run", "a/run")
    for call in plot.call_args_list:
        assert list(call.args[2]) == ["a/run", "b/run"]


def test_argument_takes_the_mean_of_the_finished_seeds_of_a_method(runs, capsys):
    for seed, disentanglement in enumerate([0.8, 0.6]):
        shutil.copytree(runs / "run", f"seed{seed}")
        write_scores(f"seed{seed}", disentanglement=disentanglement)
    show("argument", "seed0", "seed1", runs / "unfinished", runs / "run")
    output = capsys.readouterr().out
    assert re.search(r" 2 +0.700 +0.600 +0.800 ", output)
    assert output.count("left out: ") == 2


@pytest.mark.parametrize("name", ["\u5f62", "very long " * 20, "two\nlines"])
def test_a_name_that_cannot_be_drawn_is_replaced_by_a_number(name, capsys):
    assert sample.drawable(["hue", name], "factor") == ["hue", "factor 1"]
    assert "factor 1 is " in capsys.readouterr().out


# Files
def test_encode_writes_the_codes_of_the_dataset_for_metrics(runs, capsys):
    show("encode", runs / "run", "--out", "codes.npz")
    refused(lambda: show("encode", runs / "run", "--out", "codes.npz"), "name of a new file")
    run, _ = opened(runs / "run")
    with np.load("codes.npz") as arrays:
        codes = run.codes(run.load(torch.arange(300)))
        assert_close(torch.from_numpy(arrays["codes"]), codes)
        assert (arrays["indices"] == np.arange(300)).all()
        assert (arrays["factors"] == FACTORS).all()
    metrics.main("codes.npz --train 200 --test 100".split())
    assert "disentanglement" in capsys.readouterr().out

    shutil.copytree(runs / "run", "run")
    show("encode", "run")
    show("encode", "run", "--data", save_pictures("other.npz", labels=FACTORS), "--count", 5)
    assert len(np.load("run/codes.npz")["codes"]) == 300
    assert len(np.load("run/codes-other.npz")["codes"]) == 5


def test_an_exported_file_is_the_run_in_half_precision(runs, monkeypatch, capsys):
    show("export", runs / "run", "small.pt")
    refused(lambda: show("export", "small.pt"), "expected the name of a new file")
    half, half_config, half_about = train.load_run("small.pt")
    model, config, about = train.load_run(runs / "run")
    assert half_config == config
    assert half_about["scores"] == about["scores"]
    assert_close(half.state_dict(), model.state_dict(), rtol=1e-3, atol=1e-4)

    monkeypatch.setattr(sample, "SHIPPED", Path("small.pt"))
    show("swap", "--count", 2, "--steps", 3)
    assert "no RUN given" in capsys.readouterr().out


@pytest.mark.parametrize("name, kind", [("a.png", "PNG"), ("A.JPEG", "JPEG"), ("a.webp", "WEBP")])
def test_the_ending_of_a_picture_is_its_format(runs, name, kind):
    show("generate", runs / "run", "--count", 2, "--steps", 1, "--out", name)
    assert Image.open(name).format == kind


@pytest.mark.parametrize("words", [
    "swap {}/run --out a.tiff", "encode {}/run --out a.csv", "traverse {}/run --gif --out a.png",
    "swap {}/run --out .png"])
def test_an_ending_that_does_not_fit_is_refused(runs, words):
    refused(lambda: show(*words.format(runs).split()), "a name that ends in ")


def test_a_tilde_is_the_home_folder_in_every_path(runs, folder, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(folder))
    shutil.copytree(runs / "run", "run")
    shutil.copy(runs / "toy.npz", "toy.npz")
    words = "generate ~/run --count 1 --steps 1 --data ~/toy.npz --cache ~/cache --out ~/a.png"
    show(*words.split())

    assert Path("a.png").exists()
    assert Path("cache").is_dir()
    show("export", "~/run", "~/small.pt")
    assert Path("small.pt").exists()


# What a user can ask for
def test_a_usual_count_that_a_small_set_lacks_is_what_there_is(runs, drawn_rows):
    np.savez("three.npz", images=np.zeros((3, 32, 32, 3), np.uint8))
    show("reconstruct", runs / "run", "--data", "three.npz", "--steps", 1)
    assert len(drawn_rows["input"]) == 3
    show("swap", runs / "run", "--data", "three.npz", "--steps", 1)
    assert len(drawn_rows["source"]) == 1


@pytest.mark.parametrize("seed", [2**64, -1])
def test_any_whole_number_is_a_seed(runs, seed):
    show("swap", runs / "run", "--count", 1, "--steps", 1, "--seed", seed)


@pytest.mark.parametrize("words, said", [
    ("swap {}/moved --count 1", "say where it is with --data"),
    ("importance {}/direct", "has no importance matrix (no labels)"),
    ("page {}/direct page.html", "no token of "),
    ("explore {}/run --port 70000", "--port 70000 cannot be used"),
    ("swap {}/unfinished", "has not finished its first stage"),
    ("swap {}/damaged", "metrics.json cannot be read"),
    ("swap {}/run --tokens 1 6", "--tokens is 6; expected 0 to 5"),
    ("swap {}/run --count 151", "--count is 151; expected at most 150"),
    ("swap {}/run --steps 21", "21"),
    ("swap {}/vae --sampler ddim --eta 1", "--eta is 1.0"),
    ("attention {}/adagn --count 1 --steps 1", "no cross-attention"),
    ("worth {}/vae", "draws without noise"),
    ("curves {}/damaged", "no log of this version"),
    ("agree {}/run", "two runs or more"),
    ("argument", "python train.py"),
    ("curves", "python train.py"),
])
def test_what_cannot_be_is_one_line(runs, words, said):
    before = sorted(runs.rglob("*"))
    refused(lambda: show(*words.format(runs).split()), said)
    assert sorted(runs.rglob("*")) == before


# The pages
ASKED = {"source": 7, "target": 2, "noise": 1, "steps": 3, "tokens": "s,s,s,s,s,s"}


def serve(path):
    """The page of a run -> ask, where ask(path, fields, **headers) -> (status, text)."""
    shown = Queue()
    words = ["explore", path, "--seed", 3]
    with mock.patch("webbrowser.open", shown.put):
        threading.Thread(target=sample.main, args=(words,), daemon=True).start()
        address = shown.get(timeout=60).strip("/").partition("//")[2]

    def ask(path, fields=(), **headers):
        client = http.client.HTTPConnection(address, timeout=60)
        client.request("GET", f"{path}?{urllib.parse.urlencode(fields)}", headers=headers)
        reply = client.getresponse()
        return reply.status, reply.read().decode()

    return ask


def setup_of(page):
    return json.loads(re.search(r"const setup = (.*)\n", page)[1])


@pytest.mark.parametrize("name", ["run", "vector", "direct", "adagn"])
def test_the_page_draws_the_tokens_that_it_asks_for(loud, name):
    ask = serve(loud(name))
    run, _ = opened(name)
    codes = run.codes(run.load(torch.tensor([7, 2])))
    noise = torch.randn(1, *run.model.latent_shape, generator=torch.Generator().manual_seed(1))

    def asked(tokens):
        return json.loads(ask("/draw", {**ASKED, "tokens": tokens})[1])

    source = codes[:1]
    half = torch.cat([codes[1:, :3], codes[:1, 3:]], dim=1)
    positions = ",".join(map(str, asked("s,s,s,s,s,s")["positions"][0]))
    for tokens, expected in [("s,s,s,s,s,s", source), ("t,t,t,s,s,s", half), (positions, source)]:
        url = asked(tokens)["images"][2]
        picture = torch.from_numpy(np.array(Image.open(urllib.request.urlopen(url))))
        image = train.to_bytes(run.draw(expected, noise, steps=3)[0]).permute(1, 2, 0)
        assert_close(picture, image, rtol=0, atol=1)


def test_requests_at_the_same_time_do_not_mix(loud):
    ask = serve(loud("run"))
    asked = [{**ASKED, "tokens": tokens} for tokens in ("s,s,s,s,s,s", "300,s,s,s,s,s")]
    alone = [ask("/draw", fields) for fields in asked]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(functools.partial(ask, "/draw"), asked * 4))
    assert together == alone * 4


def test_the_strip_goes_from_noise_to_the_image_that_is_drawn(loud):
    ask = serve(loud("run"))
    answer = json.loads(ask("/draw", ASKED)[1])
    assert [picture["t"] for picture in answer["strip"]] == [20, 13, 7, 0]
    assert answer["strip"][-1]["image"] == answer["images"][2]

    of_target = json.loads(ask("/draw", {**ASKED, "tokens": "t,t,t,t,t,t"})[1])
    assert of_target["strip"][0] == answer["strip"][0]
    other_noise = json.loads(ask("/draw", {**ASKED, "noise": 2})[1])
    assert other_noise["strip"][0] != answer["strip"][0]


@pytest.mark.parametrize("name, value", [
    ("Host", "evil.example"), ("Origin", "null"), ("Origin", "http://127.0.0.1:1")])
def test_another_site_may_not_ask_the_server(runs, name, value):
    ask = serve(runs / "run")
    assert ask("/", **{name: value})[0] == 403
    assert ask("/draw", ASKED, **{name: value})[0] == 403


def test_a_malformed_request_is_refused(runs):
    ask = serve(runs / "run")
    wrong = [{"source": -1}, {"target": "x"}, {"noise": 2**70}, {"steps": 0}, {"steps": 10**6}]
    wrong += [{"tokens": word + ",s" * 5} for word in ("s,s", "nan", "u")]
    for change in wrong:
        assert ask("/draw", {**ASKED, **change})[0] == 400, change
    assert ask("/draw")[0] == 400
    assert ask("/../train.py")[0] == 404
    assert ask("/draw", ASKED)[0] == 200


def test_the_server_looks_up_no_name(runs):
    with mock.patch("socket.getfqdn", side_effect=UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "x")):
        assert serve(runs / "run")("/")[0] == 200


def read_tiles(url, columns, rows):
    """The images (rows, columns, 3, S, S) of a picture without gaps."""
    picture = torch.from_numpy(np.array(Image.open(urllib.request.urlopen(url))))
    S = picture.shape[0] // rows
    tiles = picture.unflatten(0, (rows, S)).unflatten(2, (columns, S))
    return train.to_float(tiles.permute(0, 2, 4, 1, 3))


def test_a_page_to_pass_on_has_every_set_of_factors_of_the_target(perfect):
    args = sample.parse(["page", "page.html"])
    sample.page(perfect, args)
    setup = setup_of(Path("page.html").read_text("utf-8"))
    images = setup["sources"][0]
    source = values_in(read_tiles(images["source"], 1, 1)[0])[0]
    target = values_in(read_tiles(images["target"], 1, 1)[0])[0]
    sets = values_in(read_tiles(images["exchanges"], setup["columns"], 1)[0])
    for number, values in enumerate(sets):
        taken = torch.tensor([number % 2 == 1, number // 2 == 1])
        assert torch.equal(values, torch.where(taken, target, source))


def test_worth_is_the_rise_of_the_loss_of_an_exact_denoiser(runs, capsys):
    """The latent is the first factor alone, one-hot, and the denoiser knows it from the tokens. A
    wrong value changes two of three numbers by 1, so the error of the noise is known."""
    run, _ = opened(runs / "run")
    model = run.model

    def one_hot(images):
        return F.one_hot(values_in(images)[:, 0].long(), 3).float()[:, :, None, None]

    def exact_noise(z_t, t, z0):
        abar = model.alpha_bar[t][:, None, None, None]
        return (z_t - abar.sqrt() * z0) / (1 - abar).sqrt()

    def unchanged(codes):
        return codes

    model.latents = one_hot
    model.represent = one_hot
    model.tokens = unchanged
    model.latent_shape = (3, 1, 1)
    model.denoiser.forward = exact_noise
    sample.worth(run, set_flags("worth", "--count", 6))

    t, of_factor_0, of_factor_1 = capsys.readouterr().out.splitlines()[:3]
    abar = model.alpha_bar[[int(word) for word in t.split()[1:]]]
    rise = 2 / 3 * abar / (1 - abar)
    expected = {of_factor_0: rise.tolist(), of_factor_1: [0] * len(rise)}
    for line, numbers in expected.items():
        words = line.removeprefix("factor 0").removeprefix("factor 1").split()
        assert [float(word) for word in words] == approx(numbers, rel=2e-3, abs=1e-4)


# ---- The documents ------------------------------------------------------------------------------

MODULES = sorted(path.stem for path in HERE.glob("*.py"))


def text_of(name):
    return (HERE / name).read_text(encoding="utf-8")


def code_blocks(language):
    """The fenced blocks of the README in this language; "" is none."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text_of("README.md"), re.M | re.S)
    return [block for name, block in blocks if name == language]


def words_of_commands():
    """(script, its words) of every `python script.py ...` in the README's blocks and in headers."""
    texts = code_blocks("") + code_blocks("bash") + code_blocks("sh") + code_blocks("console")
    texts += [text_of(f"{module}.py").split('"""')[1] for module in MODULES]
    commands = []
    for text in texts:
        for line in re.findall(r"^(?:TRY)?[ $]*python (\w+\.py.*)$", text, re.M):
            command = re.split(r" {2,}|->|#|\(", line)[0]
            script, *words = shlex.split(command)
            commands.append((script, words))
    return commands


def test_the_verbs_start_without_docstrings():
    """As with python -OO."""
    path = str(HERE / "sample.py")
    names = {"__name__": "sample", "__file__": path, "__doc__": None}
    exec(compile(text_of(path), path, "exec", optimize=2), names)
    names["make_parser"]()


COPIED = [("data", set()), ("vq", set()), ("unet", set()), ("metrics", set())]
COPIED += [("encdiff", {"metrics"})]


@pytest.mark.parametrize("module, ours", COPIED, ids=str)
def test_a_module_to_copy_imports_none_of_ours(module, ours):
    """But for the scores of the toy, inside a function."""
    source = text_of(f"{module}.py")
    anywhere = re.findall(r"^ *(?:import|from) (\w+)", source, re.M)
    outside_functions = re.findall(r"^(?:import|from) (\w+)", source, re.M)
    assert set(anywhere) & set(MODULES) == ours
    assert not set(outside_functions) & set(MODULES)


def test_every_command_of_the_documents_exists():
    parsers = {"train.py": train.make_parser().parse_args, "sample.py": sample.parse}
    commands = words_of_commands()
    assert {"train.py", "sample.py", "encdiff.py"} <= {script for script, _ in commands}
    for script, words in commands:
        if script in parsers and "--help" not in words:
            parsers[script](words)  # ValueError where a flag or a verb is unknown
        for word in words:
            if script not in parsers and word.startswith("--"):
                assert f'"{word}"' in text_of(script), (script, word)


DRAWING = ["swap", "traverse", "attention", "reconstruct", "importance", "bayes", "encode"]


@pytest.mark.parametrize("verb", DRAWING)
def test_a_verb_of_the_readme_works_without_a_run(verb, rendered, folder, monkeypatch):
    """With the model in the box, as in a fresh clone; of fewer images, to save time."""
    commands = [words for script, words in words_of_commands() if words[:1] == [verb]]
    commands += [[verb] for name in re.findall(r"`python sample.py (\w+)`", text_of("README.md"))
                 if name == verb]
    assert commands
    parameters = sample.parse(commands[0])
    fewer = ["--count", 2] if "count" in parameters else []
    fewer += ["--steps", 2] if "steps" in parameters else []

    monkeypatch.setattr(data, "RenderedShapes3D", lambda size: rendered)
    monkeypatch.setattr(metrics, "exchanges_that_land", lambda *_, **__: {"scale": (1.0, 1.0, 1.0)})
    sample.main([*commands[0], *fewer])
    assert any(path.stat().st_size > 1000 for path in folder.iterdir())


@pytest.mark.parametrize("snippet", code_blocks("python"))
def test_a_snippet_of_the_readme_prints_what_it_says(snippet, monkeypatch, capsys):
    if not snippet.startswith(("import", "from")):
        pytest.skip("a piece of a file")
    monkeypatch.chdir(HERE)
    exec(snippet, {})
    said = re.findall(r"^# (.*\n)", snippet, re.M)
    assert capsys.readouterr().out.endswith("".join(said))


def anchors_of(path):
    """The names that GitHub gives to the headings of a page, to link to them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", *sorted(
    f"assets/{path.name}" for path in (HERE / "assets").glob("*.md"))])
def test_the_links_of_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if link.startswith("https:"):
            continue
        name, _, anchor = link.partition("#")
        target = (HERE / page).parent / name if name else HERE / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors_of(target), link


def test_the_readme_shows_the_method_as_it_stands_in_the_code():
    lines = {line.strip() for line in text_of("encdiff.py").splitlines()}
    shown = [line.strip() for line in text_of("README.md").splitlines()
             if re.match(r" *(codes = self|z_t = self|predicted = self|return F.mse_loss)", line)]
    assert len(shown) >= 3
    assert set(shown) <= lines


@pytest.mark.parametrize("module", MODULES)
def test_a_module_begins_with_its_six_parts(module):
    header = text_of(f"{module}.py").split('"""')[1]
    parts = re.findall(r"^(WHERE|PAPER|SHAPES|IDEA|DIFFERS|TRY) ", header, re.M)
    assert parts == ["WHERE", "PAPER", "SHAPES", "IDEA", "DIFFERS", "TRY"]


def test_every_equation_is_marked_where_the_table_says():
    rows = re.findall(r"^\|([^|]*\(\d\)[^|]*)\|(.*)$", text_of("assets/paper.md"), re.M)
    seen = set()
    for equation, text in rows:
        for number in re.findall(r"\((\d)\)", equation):
            seen.add(number)
            for name in re.findall(r"\w+\.py", text):
                tag = rf"\b[Ee]q\. \({number}\)"
                assert re.search(tag, text_of(name)), (number, name)
    assert seen >= set("123456")

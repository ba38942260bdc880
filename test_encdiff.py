"""What we are sure of: each test is one claim about the method or about what happens to a user.

Run with `python -m pytest -q`. CPU only, no data file, no network.
"""
import copy
import csv
import dataclasses
import io
import json
import math
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import encdiff
import metrics
import sample
import train
import unet
import vq

HERE = Path(__file__).parent
TINY = dict(vq_channels=32, vq_multipliers=(1,), vq_blocks=1, vq_patch=4, encoder="cnn_bn", encoder_width=8,
            channels=16, multipliers=(1, 2), blocks=1, heads=2, attention=(1, 2), num_tokens=6, token_dim=8,
            dropout=0.1, vq_steps=12, vq_warmup=4, vq_batch=8, steps=12, batch=8, log_every=4, score_every=0,
            codebook_size=64, precision="fp32")


def tiny_model(**changes):
    torch.manual_seed(0)
    return train.build_model(train.Config(**{**TINY, **changes}))


def some_images(count=4):
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def few_steps(model, images, steps=4):
    """Open the zero-initialised layers, so that everything is connected."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.loss(images)
        loss.backward()
        optimizer.step()
    return loss


# ---- The denoiser -------------------------------------------------------------------------------


def test_unet_of_the_paper_has_its_number_of_parameters():
    assert sum(p.numel() for p in unet.UNet(token_dim=16).parameters()) == 37_469_635


def test_written_out_attention_equals_torchs():
    torch.manual_seed(0)
    layer = unet.Attention(32, 12, heads=4)
    x, tokens = torch.randn(2, 9, 32), torch.randn(2, 5, 12)
    q, k, v = (f(y).view(2, -1, 4, 8).transpose(1, 2) for f, y in
               [(layer.to_q, x), (layer.to_k, tokens), (layer.to_v, tokens)])
    expected = layer.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 9, 32))
    torch.testing.assert_close(layer(x, tokens), expected)


def test_tokens_reach_the_denoiser_their_order_does_not_and_they_cannot_be_forgotten():
    model = tiny_model().eval()
    few_steps(model, some_images())
    z, t = torch.randn(4, *model.latent_shape), torch.tensor([1, 10, 500, 1000])
    tokens = torch.randn(4, 6, 8)
    with torch.no_grad():
        out = model.denoiser(z, t, tokens)
        torch.testing.assert_close(model.denoiser(z, t, tokens[:, torch.randperm(6)]), out)
        assert (model.denoiser(z, t, tokens + 1) - out).abs().max() > 1e-4
    with pytest.raises(TypeError):
        model.denoiser(z, t)


def test_attention_maps_are_distributions_over_tokens_and_are_kept_only_on_request():
    model = tiny_model().eval()
    z, t, tokens = torch.randn(2, *model.latent_shape), torch.tensor([3, 900]), torch.randn(2, 6, 8)
    with torch.no_grad(), unet.record_attention(model.denoiser) as maps:
        model.denoiser(z, t, tokens)
        model.denoiser(z, t, tokens)
    layers = unet.cross_attentions(model.denoiser)
    assert len(maps) == len(layers) == 7 and all(len(calls) == 2 for calls in maps)
    for calls in maps:
        torch.testing.assert_close(calls[0].sum(-1), torch.ones(calls[0].shape[:2]))
    assert all(layer.record is None for layer in layers)


# ---- Tokens -------------------------------------------------------------------------------------


def test_a_scalar_moves_its_own_token_and_no_other():
    model = tiny_model()
    codes = torch.randn(3, 6)
    before, changed = model.tokens(codes), codes.clone()
    changed[:, 2] += 1
    moved = (model.tokens(changed) - before).abs().amax((0, 2)) > 0
    assert moved.tolist() == [False, False, True, False, False, False]


def test_batched_token_maps_equal_a_loop_of_small_mlps():
    maps = encdiff.ScalarTokens(3, 5)
    codes = torch.randn(4, 3)
    for i in range(3):
        x = codes[:, i:i + 1]
        for layer, (w, b) in enumerate(zip(maps.weights, maps.biases)):
            x = F.linear(F.elu(x) if layer else x, w[i].t(), b[i, 0])
        torch.testing.assert_close(maps(codes)[:, i], x)


# ---- The noise ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", encdiff.SCHEDULES)
def test_schedules_run_from_almost_no_noise_to_almost_no_signal(name):
    betas = encdiff.beta_schedule(name)
    abar = encdiff.cumulative(betas)
    assert len(betas) == 1000 and betas.dtype == torch.float64 and 0 < betas.min() and betas.max() <= 0.999
    assert abar[0] == 1 and (abar.diff() < 0).all() and abar[1] > 0.95 and 0 < abar[-1] < 1e-3


def test_eq_4_is_the_product_of_the_two_gaussians_it_comes_from():
    # q(z_{t-1} | z_t, z_0) is proportional to q(z_t | z_{t-1}) q(z_{t-1} | z_0): precisions add up.
    betas = encdiff.beta_schedule("cosine")
    abar = encdiff.cumulative(betas)
    z0, z_t = 0.7, -1.3
    for t in (2, 17, 500, 1000):
        beta, before = betas[t - 1], abar[t - 1]
        precision = (1 - beta) / beta + 1 / (1 - before)
        mean = ((1 - beta).sqrt() / beta * z_t + before.sqrt() / (1 - before) * z0) / precision
        a, b, v = encdiff.posterior(abar, t)
        torch.testing.assert_close(v, 1 / precision)
        torch.testing.assert_close(a * z0 + b * z_t, mean)


def test_eq_5_agrees_with_torchs_kl_over_random_latents():
    betas = encdiff.beta_schedule("linear", 100)
    abar = encdiff.cumulative(betas)
    generator = torch.Generator().manual_seed(0)
    z0 = 1.5 * torch.rand(200_000, generator=generator, dtype=torch.float64) + 0.2
    closed = encdiff.kl_bottleneck(betas, z0.pow(2).mean())
    for t in (2, 30, 100):
        eps = torch.randn(z0.shape, generator=generator, dtype=torch.float64)
        z_t = abar[t].sqrt() * z0 + (1 - abar[t]).sqrt() * eps  # eq. (2)
        a, b, v = encdiff.posterior(abar, t)
        kl = torch.distributions.kl_divergence(torch.distributions.Normal(a * z0 + b * z_t, v.sqrt()),
                                               torch.distributions.Normal(0.0, 1.0))
        torch.testing.assert_close(closed[t - 1], kl.mean(), rtol=0.01, atol=0.002)


def test_the_bottleneck_opens_as_t_falls_and_cosine_is_the_widest_until_its_end():
    curves = {name: encdiff.kl_bottleneck(encdiff.beta_schedule(name)) for name in encdiff.SCHEDULES}
    for curve in curves.values():
        assert (curve[1:-1].diff() < 1e-9).all()
    # The order of Figure 2 (b). Cosine's large last betas take it below the others from t = 843 on.
    for wider, tighter in zip(["cosine", "linear", "sqrt_linear"], ["linear", "sqrt_linear", "sqrt"]):
        assert (curves[wider][:842] >= curves[tighter][:842]).all()
    assert curves["cosine"][842] < curves["linear"][842]


def test_eq_3_is_the_mean_squared_error_of_the_noise():
    model = tiny_model(dropout=0.0)
    images, t = some_images(), torch.tensor([1, 2, 600, 1000])
    noise = torch.randn(4, *model.latent_shape)
    few_steps(model, images)
    model.eval()
    abar = encdiff.cumulative(encdiff.beta_schedule("cosine"))[t].float().view(4, 1, 1, 1)
    z_t = abar.sqrt() * model.latents(images) + (1 - abar).sqrt() * noise
    predicted = model.denoiser(z_t, t, model.tokens(model.represent(images)))
    torch.testing.assert_close(model.loss(images, t, noise), (predicted - noise).pow(2).mean())


# ---- The first stage ----------------------------------------------------------------------------


def test_quantiser_takes_the_nearest_entry_and_passes_the_gradient_through():
    torch.manual_seed(0)
    quantizer = vq.Quantizer(50, 3, commitment=0.25)
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    quantizer.initialise(z)
    z_q, loss, indices = quantizer(z)
    vectors = z.detach().permute(0, 2, 3, 1).reshape(-1, 1, 3)
    nearest = (vectors - quantizer.codebook).pow(2).sum(-1).argmin(-1)
    assert torch.equal(indices.flatten(), nearest)
    entries = quantizer.codebook[nearest].view(2, 4, 4, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(z_q, entries)
    torch.testing.assert_close(loss, 1.25 * (entries - z).pow(2).mean())  # both terms have this value
    gradient, = torch.autograd.grad((z_q * 3).sum(), z, retain_graph=True)
    assert (gradient == 3).all()
    to_codebook, = torch.autograd.grad(loss, quantizer.codebook)
    expected = torch.zeros(50, 3).index_add(0, nearest, 2 * (quantizer.codebook[nearest] - vectors[:, 0])) / z.numel()
    torch.testing.assert_close(to_codebook, expected)


def test_decode_quantises_first_and_the_first_stage_is_frozen():
    model = tiny_model()
    images = some_images()
    model.first_stage.quantizer.initialise(model.first_stage.encode(images))
    z = model.first_stage.encode(images)
    torch.testing.assert_close(model.first_stage.decode(z), model.first_stage.decode(model.first_stage.quantize(z)[0]))
    before = copy.deepcopy(model.first_stage.state_dict())
    model.train()
    few_steps(model, images)
    assert not model.first_stage.training
    assert all(torch.equal(before[k], v) for k, v in model.first_stage.state_dict().items())


def test_latents_have_unit_std_and_are_not_quantised():
    model, images = tiny_model(), some_images(16)
    model.measure_latents(images)
    torch.testing.assert_close(model.latents(images).std(), torch.tensor(1.0))
    torch.testing.assert_close(model.latents(images) * model.latent_std, model.first_stage.encode(images))


def test_adversarial_loss_keeps_the_two_players_apart():
    torch.manual_seed(0)
    judge, images = vq.PatchDiscriminator(8), some_images(2)
    last = torch.nn.Parameter(torch.ones(3, 1, 1))
    fake = (images * 0.5) * last
    vq.adversarial_loss(judge, images, fake, F.l1_loss(fake, images), last).backward()
    assert last.grad.abs().sum() > 0
    got = [p.grad.clone() for p in judge.parameters()]
    judge.zero_grad()
    hinge = (F.relu(1 - judge(images)).mean() + F.relu(1 + judge(fake.detach())).mean()) / 2
    hinge.backward()
    for g, p in zip(got, judge.parameters()):
        torch.testing.assert_close(g, p.grad)


# ---- Variants -----------------------------------------------------------------------------------

VARIANTS = [dict(), dict(encoder="cnn"), dict(encoder="transformer"), dict(tokens="vector"), dict(decoder="direct"),
            dict(conditioning="adagn"), dict(tokens="vector", conditioning="adagn"),
            dict(tokens="vector", decoder="direct"), dict(regularizer="euler"), dict(regularizer="sparse"),
            dict(regularizer="orthogonal"), dict(schedule="sqrt"), dict(self_attention=False)]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant_learns_in_all_its_parameters_and_survives_a_checkpoint(variant, tmp_path):
    model, images = tiny_model(**variant).train(), some_images()
    model.measure_latents(images)
    assert few_steps(model, images).isfinite()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum())]
    assert not silent
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = tiny_model(**variant)
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    for m in (model, again):
        m.eval()
    codes = again.represent(images)
    assert torch.equal(codes, model.represent(images))
    assert model.sample(model.tokens(codes)).shape == images.shape


def test_the_default_model_holds_nothing_of_a_variant():
    default = tiny_model()
    kinds = {type(m) for m in default.modules()}
    extras = {unet.AdaGNBlock, unet.DirectDecoder, encdiff.EncDec, encdiff.VectorTokens, encdiff.EulerTokens,
              encdiff.SparseTokens, encdiff.OrthogonalTokens, encdiff.TransformerEncoder, vq.PatchDiscriminator}
    assert not kinds & extras
    assert not [k for k in default.state_dict() if re.search("condition|gamma|beta|queries|discriminator", k)]


def test_transformer_encoder_is_of_the_cnns_size():
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert abs(count(encdiff.TransformerEncoder(20)) / count(encdiff.CNNEncoder(20)) - 1) < 0.1


# ---- Training -----------------------------------------------------------------------------------


def flags(**options):
    """A config as command-line arguments."""
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


class Toy(torch.utils.data.Dataset):
    """A dataset small enough for tests: 2 x 3 factors, colours of two halves."""

    name, factor_names, factor_sizes, attribute_names = "toy", ("top", "bottom"), (2, 3), ()

    def __len__(self):
        return 6

    def images(self, indices):
        f = self.factors(indices)
        x = torch.zeros(len(f), 3, 64, 64, dtype=torch.uint8)
        x[:, 0, :32] = (f[:, 0] * 255).to(torch.uint8)[:, None, None]
        x[:, 1, 32:] = (f[:, 1] * 127).to(torch.uint8)[:, None, None]
        return x

    def factors(self, indices):
        indices = torch.as_tensor(indices)
        return torch.stack([indices // 3, indices % 3], 1)


@pytest.fixture
def toy(monkeypatch):
    """train.main on the toy dataset, without scores and pictures at the end."""
    monkeypatch.setattr(data, "open_dataset", lambda *a, **k: Toy())
    monkeypatch.setattr(train, "score", lambda *a: {})
    monkeypatch.setattr(train, "pictures", lambda *a: None)


def weights(folder):
    checkpoint = torch.load(Path(folder) / "checkpoint.pt", weights_only=True)
    return {**checkpoint["model"], **{"ema." + k: v for k, v in checkpoint["ema"].items()}}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("stop_at", [3, 7, 12, 17, 23])
def test_an_interrupted_run_ends_with_the_same_bits(toy, tmp_path, monkeypatch, stop_at):
    train.main(["--preset", "small", "--out", str(tmp_path / "whole"), *flags(**TINY)])
    calls, original = [0], train.descend

    def interrupt(loss, parameters, optimizer, config, run, *rest):
        calls[0] += 1
        run.stop = calls[0] == stop_at  # what Ctrl-C does
        return original(loss, parameters, optimizer, config, run, *rest)

    monkeypatch.setattr(train, "descend", interrupt)
    with pytest.raises(SystemExit):
        train.main(["--preset", "small", "--out", str(tmp_path / "parts"), *flags(**TINY)])
    train.main(["--resume", str(tmp_path / "parts")])
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    logs = [[(row["stage"], row["step"], row["loss"]) for row in csv.DictReader(open(tmp_path / name / "log.csv"))]
            for name in ("whole", "parts")]
    assert [row[:2] for row in logs[0]] == [row[:2] for row in logs[1]]


def test_the_seed_decides_everything(toy, tmp_path):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        train.main(["--preset", "small", "--seed", str(seed), "--out", str(tmp_path / name), *flags(**TINY)])
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not equal(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_a_first_stage_can_be_borrowed_but_only_one_that_fits(toy, folder, capsys):
    make_run(folder / "lender")
    make_run(folder / "borrower", first_stage="lender", seed=7)
    lent, got = weights("lender"), weights("borrower")
    assert all(torch.equal(lent[k], got[k]) for k in lent if k.startswith("first_stage."))
    code, error = run_main(train.main, capsys, [
        "--preset", "small", "--out", "other", *flags(**{**TINY, "first_stage": "lender", "latent_channels": 5})])
    assert code == 2 and "lender" in error and error.count("\n") == 1


def test_training_lowers_the_loss_and_the_average_follows(toy, tmp_path):
    train.main(["--preset", "small", "--out", str(tmp_path / "run"), *flags(**{**TINY, "steps": 60, "lr": 3e-3})])
    losses = [float(row["loss"]) for row in csv.DictReader(open(tmp_path / "run" / "log.csv"))
              if row["stage"] == "joint training"]
    assert losses[-1] < 0.8 * losses[0]
    model, config = train.load_run(tmp_path / "run")
    assert config.steps == 60 and not any(p.requires_grad for p in model.parameters())


# ---- What a user can get wrong ------------------------------------------------------------------

BAD_FLAGS = [
    ("--batch 0", "batch"), ("--steps -1", "steps"), ("--lr 0", "lr"), ("--lr nan", "lr"), ("--ema 1", "ema"),
    ("--dropout 1.5", "dropout"), ("--token-dim 0", "token-dim"), ("--num-tokens 0", "num-tokens"),
    ("--heads 5", "heads"), ("--channels 30", "channels"), ("--vq-channels 20", "vq-channels"),
    ("--multipliers 1 2 2 2 2 2", "multipliers"), ("--multipliers 0", "multipliers"), ("--size 48", "48"),
    ("--schedule cosin", "cosine"), ("--encoder resnet", "cnn_bn"), ("--tokens", "tokens"), ("--timesteps 1", "timesteps"), ("--schedule sqrt --timesteps 4000", "sqrt"),
    ("--vq-steps 10", "vq_warmup"), ("--codebook-size 1", "codebook-size"), ("--vq-patch 3", "vq-patch"),
    ("--conditioning adagn --decoder direct", "adagn"), ("--tokens vector --regularizer sparse", "vector"),
    ("--regularizer orthogonal --num-tokens 40", "token_dim"), ("--learning-rate 1", "learning-rate"),
    ("--steps many", "many"), ("--preset tiny", "small"), ("--resume nowhere", "nowhere"),
    ("--data nowhere.h5", "nowhere.h5"), ("--seed -1", "seed"), ("--device cuda", "cpu"), ("--precision fp16", "bf16"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory; afterwards what was in it before must be unchanged."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_main(main, capsys, *arguments):
    """-> exit status and standard error of a command line."""
    with pytest.raises(SystemExit) as stopped, train.one_line_errors():
        main(*arguments)
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize("words, named", BAD_FLAGS, ids=[words for words, _ in BAD_FLAGS])
def test_a_bad_flag_is_one_line_that_names_it(words, named, folder, capsys, monkeypatch):
    monkeypatch.setattr(train, "devices", lambda: ["cpu"])
    code, error = run_main(train.main, capsys, [*([] if "--resume" in words else ["--preset", "small", "--out", "run"]),
                                              *words.split()])
    assert code == 2 and error.count("\n") == 1 and named in error
    assert not (folder / "run" / "checkpoint.pt").exists()


def make_run(folder, **changes):
    train.main(["--preset", "small", "--out", str(folder), *flags(**{**TINY, **changes})])
    return folder


def test_resuming_with_other_values_or_foreign_files_is_refused(toy, folder, capsys):
    make_run(folder / "run")
    kept = (folder / "run" / "checkpoint.pt").read_bytes()
    changed = torch.load(folder / "run" / "checkpoint.pt", weights_only=True)
    cases = [(["--resume", "run", "--lr", "0.5"], "lr"), (["--resume", "run", "--steps", "5"], "steps"),
             (["--resume", "run", "--out", "other"], "--out"), (["--out", "run"], "--resume")]
    for arguments, named in cases:
        code, error = run_main(train.main, capsys, arguments)
        assert code == 2 and error.count("\n") == 1 and named in error
    for name, content in [("empty", b""), ("text", b"hello"), ("cut", kept[:5000])]:
        (folder / name).mkdir()
        (folder / name / "checkpoint.pt").write_bytes(content)
    (folder / "format").mkdir()
    torch.save({**changed, "format": 0}, folder / "format" / "checkpoint.pt")
    (folder / "shapes").mkdir()
    torch.save({**changed, "config": {**changed["config"], "channels": 32}}, folder / "shapes" / "checkpoint.pt")
    for name in ("empty", "text", "cut", "format", "shapes"):
        code, error = run_main(train.main, capsys, ["--resume", name])
        assert code == 2 and error.count("\n") == 1 and name in error
    assert (folder / "run" / "checkpoint.pt").read_bytes() == kept


def test_loading_never_executes_code(folder, capsys):
    class Trap:
        def __reduce__(self):
            return os.mkdir, ("trapped",)

    (folder / "run").mkdir()
    torch.save({"format": train.FORMAT, "config": Trap()}, folder / "run" / "checkpoint.pt")
    code, error = run_main(train.main, capsys, ["--resume", "run"])
    assert code == 2 and error.count("\n") == 1 and not (folder / "trapped").exists()


def test_a_second_process_on_one_run_folder_is_refused(folder, capsys):
    config = train.Config(**TINY)
    first = train.Run("run", config, train.Machine())
    with pytest.raises(ValueError, match="in use"):
        train.Run("run", config, train.Machine())
    first.close()
    train.Run("run", config, train.Machine()).close()


def test_a_full_disk_keeps_the_last_good_checkpoint(toy, folder, capsys, monkeypatch):
    make_run(folder / "run")
    kept = (folder / "run" / "checkpoint.pt").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.os, "fsync", full)
    code, error = run_main(train.main, capsys, ["--resume", "run", "--steps", "20"])
    assert code == 2 and "No space left" in error and error.count("\n") == 1
    assert (folder / "run" / "checkpoint.pt").read_bytes() == kept
    assert not list((folder / "run").glob("*.tmp"))


def test_a_loss_that_is_not_finite_stops_the_run_and_overwrites_nothing(toy, folder, capsys, monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    original = encdiff.EncDiff.forward

    def explode(self, images, t, noise):
        explode.calls += 1
        return original(self, images, t, noise) * (math.nan if explode.calls == 5 else 1)

    explode.calls = 0
    monkeypatch.setattr(encdiff.EncDiff, "forward", explode)
    code, error = run_main(train.main, capsys, ["--preset", "small", "--out", "run", *flags(**TINY)])
    assert code == 2 and "step 5" in error and error.count("\n") == 1
    checkpoint = torch.load(folder / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 4 and all(v.isfinite().all() for v in checkpoint["ema"].values() if v.is_floating_point())


LAUNCH = """import sys; sys.path.insert(0, sys.argv.pop(1)); import train, test_encdiff
train.data.open_dataset = lambda *a, **k: test_encdiff.Toy()
train.score, train.pictures, train.CHECKPOINT_SECONDS = lambda *a: {}, lambda *a: None, 0.2
with train.one_line_errors(): train.main()"""


def test_two_processes_train_like_one(folder):
    """Same loss curve within 1e-3 (the order of summation differs), without dropout and BatchNorm."""
    options = {**TINY, "encoder": "cnn", "dropout": 0.0, "log_every": 1, "steps": 6}
    (folder / "launch.py").write_text(LAUNCH)
    arguments = ["launch.py", str(HERE), "--preset", "small", *flags(**options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for launcher, name in [([sys.executable], "one"), ([sys.executable, "-m", "torch.distributed.run",
                                                        "--nproc_per_node=2"], "two")]:
        subprocess.run([*launcher, *arguments, "--out", name], check=True, env=environment, capture_output=True, timeout=300)
    curves = [[float(row["loss"]) for row in csv.DictReader(open(folder / name / "log.csv"))] for name in ("one", "two")]
    assert len(curves[0]) == 18
    np.testing.assert_allclose(curves[0], curves[1], atol=1e-3)


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="minutes; run with SLOW=1")
def test_a_run_killed_twenty_times_ends_with_the_same_bits(folder):
    (folder / "launch.py").write_text(LAUNCH)
    base, environment = [sys.executable, "launch.py", str(HERE)], {**os.environ, "OMP_NUM_THREADS": "1"}
    start = ["--preset", "small", *flags(**{**TINY, "vq_steps": 1000, "steps": 1000, "log_every": 50})]
    subprocess.run([*base, *start, "--out", "whole"], check=True, env=environment, capture_output=True)
    random, kills, done = np.random.default_rng(0), 0, False
    while not done:
        arguments = ["--resume", "parts"] if (folder / "parts" / "checkpoint.pt").exists() else [*start, "--out", "parts"]
        process = subprocess.Popen([*base, *arguments], env=environment, stdout=subprocess.DEVNULL)
        try:
            done = process.wait(timeout=random.uniform(2, 5) if kills < 20 else None) == 0
            assert done
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert kills == 20 and equal(weights("whole"), weights("parts"))


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


def test_metrics_worked_example_is_right(capsys):
    metrics.main([])
    lines = {line[:34].strip(): [float(v) for v in line[34:].split()]
             for line in capsys.readouterr().out.splitlines()}
    third = 1 / 3

    def said(name, expected):
        assert lines[name] == pytest.approx(expected, abs=6e-4), name

    said("residual: label - p", [-third, -third, -third, 2 * third, -third, 2 * third])
    said("gain of a cut after 1, 2, 3, 4, 5", [2 / 15, 1 / 3, 2 / 3, 1 / 12, 8 / 15])
    said("best cut: after", [3])
    said("step of left and right leaf", [-0.15, 0.15])        # sum r / sum |r|(1-|r|) = -1 / (6/9)
    low, high = (1 / (1 + 2 * np.exp(-step)) for step in (-0.15, 0.15))
    said("p after this round", [low] * 3 + [high] * 3)
    said("label by 100 rounds of depth 3", [0, 0, 0, 1, 0, 1])


def test_metrics_leaves_take_a_tenth_of_a_newton_step():
    label = np.arange(3).repeat(5)                            # r = 2/3 or -1/3 before round one
    trees = metrics.fit_trees(label[:, None] * 1.0, label, rounds=1)
    step = trees.rounds[0][1]
    assert step.max().item() == pytest.approx(0.1 * (3 - 1) / 3 * (2 / 3) / (2 / 3 * 1 / 3))
    assert step.min().item() == pytest.approx(0.1 * (3 - 1) / 3 * (-1 / 3) / (1 / 3 * 2 / 3))
    between = np.array([[-9], [0.49], [0.51], [1.49], [1.51], [9]])       # thresholds lie midway
    assert metrics.predict(trees, between).tolist() == [0, 0, 1, 1, 2, 2]


def test_metrics_trees_agree_with_scikit_learn():
    # scikit-learn 1.9.1: GradientBoostingClassifier(random_state=0).fit on
    # codes[:400], factors[:400, j]; feature_importances_ of each factor j as a column
    importance = np.array([[0.9758, 0.0009, 0.0], [0.0098, 0.5304, 0.0], [0.0071, 0.3358, 0.0],
                           [0.0035, 0.1329, 1.0], [0.0039, 0.0, 0.0]])
    codes, factors = table_of_codes()
    scores = metrics.dci(codes[:400], factors[:400], codes[400:], factors[400:])
    assert np.abs(scores["importance"] - importance).max() < 0.01
    assert scores["disentanglement"] == pytest.approx(metrics.focus(importance), abs=0.01)
    assert scores["completeness"] == pytest.approx(metrics.focus(importance.T), abs=0.01)
    assert scores["informativeness_train"] == 1.0
    assert scores["informativeness_test"] == pytest.approx(0.9667, abs=0.01)


def test_metrics_trees_look_at_every_cut_where_it_matters():
    # The histogram alone gives the first code 0.928, a search without the nodes' ends 0.932.
    # scikit-learn 1.9.1, GradientBoostingClassifier(random_state=0).fit(codes, label): 0.9368.
    rng = np.random.default_rng(0)
    label, codes = rng.integers(0, 8, 3000), rng.normal(size=(3000, 5))
    codes[:, 0] = label + 0.4 * codes[:, 0]
    assert metrics.fit_trees(codes, label).importance[0] == pytest.approx(0.9368, abs=0.003)


def test_metrics_dci_closed_forms():
    factors = all_combinations(4, 3, 5).repeat(4, axis=0)
    codes = factors * 1.0

    def d_and_c(codes, factors):
        scores = metrics.dci(codes, factors, codes, factors)
        return scores["disentanglement"], scores["completeness"], scores["informativeness_test"]

    assert d_and_c(codes, factors) == pytest.approx((1, 1, 1), abs=1e-6)      # one code a factor
    a, b = factors[:, :1], factors[:, 1:2]
    twice = np.concatenate([a, a, b, b], axis=1)                              # F = 4, in pairs
    half = 1 - np.log(2) / np.log(4)
    assert d_and_c(codes[:, :2], twice) == pytest.approx((half, 1, 1), abs=1e-6)
    assert d_and_c(np.ones_like(codes), factors)[:2] == pytest.approx((0, 0), abs=1e-9)
    # A factor known by two equal codes: D does not mind, C loses log 2 / log N; ties are shared.
    copied = np.concatenate([codes, codes], axis=1)
    d, c, _ = d_and_c(copied, factors)
    assert d == pytest.approx(1, abs=1e-6)
    assert c == pytest.approx(1 - np.log(2) / np.log(6), abs=0.02)
    # A row counts by its share: 6 of 8 for the row that keeps to nothing, 2 for the one that does.
    assert metrics.focus(np.array([[3.0, 3.0], [0.0, 2.0]])) == pytest.approx(2 / 8)


def test_metrics_dci_ignores_the_order_and_the_scale_of_codes():
    codes, factors = table_of_codes()
    plain = metrics.dci(codes[:400], factors[:400], codes[400:], factors[400:])
    order = [3, 0, 4, 2, 1]
    moved = np.exp(codes[:, order]) + codes[:, order] ** 3
    other = metrics.dci(moved[:400], factors[:400], moved[400:], factors[400:])
    assert other["importance"] == pytest.approx(plain["importance"][order], abs=5e-3)
    assert other["disentanglement"] == pytest.approx(plain["disentanglement"], abs=5e-3)
    assert other["completeness"] == pytest.approx(plain["completeness"], abs=5e-3)


def test_metrics_factor_vae_knows_perfect_dead_and_ignorant_codes():
    rng = np.random.default_rng(0)
    factors = all_combinations(4, 3, 5, 2).repeat(10, axis=0)
    few = dict(train_votes=2000, eval_votes=1000)
    perfect = metrics.factor_vae_votes(factors + 0.0, factors, **few)
    assert perfect["score"] == perfect["train_score"] == 1 and perfect["active_dims"] == 4
    # A code that is constant but for rounding has the smallest variance ratio in some batches.
    dead = 1e-9 * (rng.random((len(factors), 1)) < 0.01)
    with_dead = metrics.factor_vae_votes(np.concatenate([factors, dead], axis=1), factors, **few)
    assert with_dead["score"] == 1 and with_dead["active_dims"] == 4
    none = metrics.factor_vae_votes(np.zeros((1200, 3)), factors, **few)
    assert none["score"] == 0 and none["active_dims"] == 0 and "no code is active" in none["note"]
    ignorant = metrics.factor_vae_votes(rng.normal(size=(1200, 6)), factors, **few)
    assert ignorant["score"] == pytest.approx(1 / 4, abs=0.06)
    assert ignorant["train_score"] > ignorant["score"]       # chance favours the votes learnt from


class Combinations:
    """A dataset whose images spell out their factors, one a pixel."""
    factor_names, factor_sizes = ("a", "b", "c", "d"), (9, 8, 6, 5)

    def __len__(self):
        return 9 * 8 * 6 * 5

    def factors(self, indices):
        return torch.from_numpy(all_combinations(*self.factor_sizes)[indices])

    def images(self, indices):
        images = torch.zeros(len(indices), 3, 2, 2, dtype=torch.uint8)
        images[:, 0] = self.factors(indices).view(-1, 2, 2)
        return images


def represent_mixed(images):
    """Six codes, most of them mixing factors: the score is well inside (0, 1)."""
    f = images[:, 0].flatten(1).double() / torch.tensor([8.0, 7.0, 5.0, 4.0])
    a, b, c, d = f.T
    codes = a + 0.9 * b, b + 0.8 * c, (a * d + c) / 2, 0.7 * d + c, a * b, 0 * a
    return torch.stack(codes, dim=1)


def test_metrics_factor_vae_from_a_pool_is_the_protocol_that_encodes_every_image():
    dataset, rng, votes = Combinations(), np.random.default_rng(1), np.zeros((2, 4, 5), dtype=int)
    everything = represent_mixed(dataset.images(np.arange(len(dataset)))).numpy()[:, :5]
    for part, fixed in [(p, f) for p in (0, 1) for f in rng.integers(4, size=1500)]:
        factors = np.stack([rng.integers(k, size=64) for k in dataset.factor_sizes], axis=1)
        factors[:, fixed] = factors[0, fixed]                            # 64 new images a vote
        images = dataset.images(np.ravel_multi_index(factors.T, dataset.factor_sizes))
        codes = represent_mixed(images).numpy()[:, :5]                   # the sixth is dead
        votes[part, fixed, (codes.var(0, ddof=1) / everything.var(0, ddof=1)).argmin()] += 1
    expected = votes[1][votes[0].argmax(0), np.arange(5)].sum() / 1500
    score = metrics.factor_vae_score(represent_mixed, dataset, pool=1000)
    assert 0.4 < expected < 0.9 and score["active_dims"] == 5
    assert score["score"] == pytest.approx(expected, abs=0.04)


def test_metrics_vector_codes_are_read_along_their_principal_axis():
    codes, factors = table_of_codes()
    rng = np.random.default_rng(1)
    axes = rng.normal(size=(5, 4))
    vectors = codes[:, :, None] * axes + 1e-3 * rng.normal(size=(600, 5, 4)) + axes * 7
    flat = metrics.pca_tokens(vectors)
    for one, other, axis in zip(flat.T, codes.T, axes):
        sign = np.sign(axis[np.abs(axis).argmax()])                  # its largest entry is made +
        assert sign * np.corrcoef(one, other)[0, 1] > 0.999
        assert one.std() == pytest.approx(other.std() * np.linalg.norm(axis), rel=1e-3)
    assert metrics.pca_tokens(vectors[:9], fit_on=vectors) == pytest.approx(flat[:9])
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


def test_metrics_tad_equals_its_definition_spelled_out():
    rng = np.random.default_rng(0)
    yes = rng.random((300, 5)) < [0.5, 0.3, 0.5, 0.2, 0.5]
    yes[:, 2] = yes[:, 0] ^ (rng.random(300) < 0.02)         # nearly a copy: both drop out
    noise = np.round(rng.normal(size=(300, 4)), 1)           # rounded: ties must count half
    codes = noise + np.stack([-2 * yes[:, 1], 1 * yes[:, 1], 2 * yes[:, 3], 3 * yes[:, 0]], axis=1)
    area = np.empty((4, 5))
    for i in range(4):
        for j in range(5):
            with_it, without = codes[yes[:, j], i, None], codes[~yes[:, j], i]
            a = ((with_it > without) + 0.5 * (with_it == without)).mean()
            area[i, j] = max(a, 1 - a)
    result = metrics.tad(codes, yes * 2 - 1)
    assert np.array(json.loads(json.dumps(result))["auroc"]) == pytest.approx(area)
    assert result["counted"] == [1, 3] and result["captured"] == 2
    best = np.sort(area, axis=0)
    assert result["tad"] == pytest.approx((best[-1] - best[-2])[[1, 3]].sum())


def test_metrics_ssim_and_mse_equal_loops_over_pixels():
    x, y = torch.rand(2, 2, 3, 13, 12, generator=torch.Generator().manual_seed(0)).double()
    y = 0.6 * x + 0.4 * y
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets ** 2) / 4.5)
    window /= window.sum()
    total = 0
    for channel in range(3):
        a, b = (np.pad(image[1, channel].numpy(), 5) for image in (x, y))
        for i in range(13):
            for j in range(12):
                p, q = a[i:i + 11, j:j + 11], b[i:i + 11, j:j + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * p * p).sum() - mp ** 2, (window * q * q).sum() - mq ** 2
                cov = (window * p * q).sum() - mp * mq
                total += ((2 * mp * mq + 1e-4) * (2 * cov + 9e-4)
                          / ((mp ** 2 + mq ** 2 + 1e-4) * (vp + vq + 9e-4)))
    assert metrics.ssim(x, y)[1].item() == pytest.approx(total / (3 * 13 * 12))
    assert metrics.ssim(x, x).tolist() == pytest.approx([1, 1])
    squares = sum((p - q) ** 2 for p, q in zip(x[0].flatten().tolist(), y[0].flatten().tolist()))
    assert metrics.mse(x, y)[0].item() == pytest.approx(squares / (3 * 13 * 12))


def test_metrics_lpips_agrees_with_the_lpips_package(tmp_path):
    # lpips 0.1.4, net="alex", with these weights and images, normalize=True.
    def wave(shape, step):
        count = int(np.prod(shape))
        wave = torch.sin(torch.arange(count, dtype=torch.float64) * step)
        return (wave * (2 * shape[0] / count) ** 0.5).float().view(shape)

    shapes = ((64, 3, 11, 11), (192, 64, 5, 5), (384, 192, 3, 3), (256, 384, 3, 3),
              (256, 256, 3, 3))
    alexnet, linear = {}, {}
    for level, ((index, *_), shape) in enumerate(zip(metrics.ALEXNET, shapes)):
        alexnet[f"features.{index}.weight"] = wave(shape, 0.7 + 2 * level * 0.13)
        alexnet[f"features.{index}.bias"] = wave(shape[:1], 0.7 + (2 * level + 1) * 0.13)
        linear[f"lin{level}.model.1.weight"] = wave((1, shape[0], 1, 1), 1.1 + level).abs()
    torch.save(alexnet, tmp_path / "alexnet.pth")
    torch.save(linear, tmp_path / "linear.pth")
    weights = metrics.load_lpips(tmp_path / "alexnet.pth", tmp_path / "linear.pth")
    t = torch.arange(2 * 3 * 64 * 64, dtype=torch.float64)
    x, y = ((torch.sin(t * step) * 0.5 + 0.5).float().view(2, 3, 64, 64) for step in (0.37, 0.011))
    package = [0.00214165, 0.00212837]
    assert metrics.lpips(x, y, weights).tolist() == pytest.approx(package, rel=1e-3)
    assert metrics.lpips(x, x, weights).tolist() == [0, 0]
    with pytest.raises(ValueError, match="this order"):
        metrics.load_lpips(tmp_path / "linear.pth", tmp_path / "alexnet.pth")


class BrightnessNet(torch.nn.Module):
    """Stands for the Inception file: two features, and the argument StyleGAN's network takes."""
    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features
        return images[:, :2].float().mean((2, 3))


def test_metrics_frechet_distance_closed_forms(tmp_path):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(500, 4))
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    sizes = np.array([1.0, 2.0, 0.5, 3.0])
    b = (a - a.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(a.T))).T   # covariance exactly I
    distance = metrics.frechet_distance(b, b * sizes + 2)
    assert distance == pytest.approx(4 * 2 ** 2 + ((sizes - 1) ** 2).sum())
    c = a @ rng.normal(size=(4, 4))                              # the covariances do not commute
    cov_a, cov_c = np.cov(a.T), np.cov(c.T)
    expected = (((a.mean(0) - c.mean(0)) ** 2).sum() + cov_a.trace() + cov_c.trace()
                - 2 * np.sqrt(np.linalg.eigvals(cov_a @ cov_c).real).sum())
    assert metrics.frechet_distance(a, torch.from_numpy(c)) == pytest.approx(expected)
    torch.jit.script(BrightnessNet()).save(tmp_path / "net.pt")
    images = torch.randint(0, 200, (70, 3, 4, 4), dtype=torch.uint8)
    score = metrics.fid(images, images + 50, tmp_path / "net.pt")
    assert score == pytest.approx(2 * 50 ** 2, rel=1e-4)


def test_metrics_evaluate_gives_one_table_for_json_and_for_the_command_line(tmp_path, capsys):
    codes, factors = table_of_codes()
    scores = metrics.evaluate(torch.from_numpy(codes), torch.from_numpy(factors), 3, 300, 200)
    assert scores == json.loads(json.dumps(scores)) and np.shape(scores["importance"]) == (5, 3)
    assert scores == metrics.evaluate(codes, factors, 3, 300, 200)
    order = np.random.default_rng(3).permutation(600)
    train, test = order[:300], order[300:500]
    alone = metrics.dci(codes[train], factors[train], codes[test], factors[test], seed=3)
    assert all(scores[name] == alone[name] for name in ("completeness", "informativeness_test"))
    np.savez(tmp_path / "codes.npz", codes=codes, factors=factors)
    metrics.main([str(tmp_path / "codes.npz"), "--train", "300", "--test", "200", "--seed", "3"])
    printed = capsys.readouterr().out
    assert f"disentanglement  {scores['disentanglement']:7.4f}" in printed
    assert f"FactorVAE score  {scores['factor_vae']:7.4f}" in printed
    assert len(printed.splitlines()) == 5 + 1 + 5                # scores, a heading, a row a code


CODES = np.random.default_rng(0).normal(size=(200, 3))
FACTORS = all_combinations(2, 2).repeat(50, axis=0)


def with_value(array, place, value):
    array = array.astype(float)
    array[place] = value
    return array


@pytest.mark.parametrize("codes, factors, message", [
    (with_value(CODES, (7, 2), np.nan), FACTORS, r"codes\[7, 2\] is nan.*drop"),
    (with_value(CODES, (5, 1), np.inf), FACTORS, r"codes\[5, 1\] is inf"),
    (CODES[:, :1], FACTORS, r"codes has shape \(200, 1\).*2 codes or more"),
    (CODES.astype(str), FACTORS, "codes has dtype"),
    (CODES[:190], FACTORS, "factors has 200 rows for 190 codes"),
    (CODES, FACTORS[:, 0], r"factors has shape \(200,\)"),
    (CODES, with_value(FACTORS, (3, 1), 0.5), r"factors\[3, 1\] is 0.5.*integers"),
    (CODES, with_value(FACTORS, (3, 1), np.nan), r"factors\[3, 1\] is nan.*integers"),
    (CODES, FACTORS * [1, 0], r"factors\[:, 1\] is 0 in all 200 samples"),
    (CODES, FACTORS, r"codes has 200 rows; expected 10000 \+ 5000"),
])
def test_metrics_bad_tables_are_refused(codes, factors, message, tmp_path, capsys):
    with pytest.raises(ValueError, match=message) as error:
        metrics.evaluate(codes, factors)
    assert "\n" not in str(error.value)
    np.savez(tmp_path / "codes.npz", codes=codes, factors=factors)
    with pytest.raises(SystemExit) as stop:
        metrics.main([str(tmp_path / "codes.npz")])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err == f"metrics.py: {error.value}\n"


@pytest.mark.parametrize("call, message", [
    (lambda: metrics.factor_vae_votes(CODES, with_value(FACTORS, (0, 1), 9)), "is 9 in 1 rows.*64"),
    (lambda: metrics.dci(CODES, FACTORS, CODES[:, :2], FACTORS), "test_codes"),
    (lambda: metrics.dci(CODES, FACTORS[:, :1], CODES, FACTORS[:, :1]), "2 or more"),
    (lambda: metrics.dci(CODES, FACTORS, CODES, FACTORS[1:]), "test_factors has 199 rows"),
    (lambda: metrics.pca_tokens(CODES), "width"),
    (lambda: metrics.tad(CODES, FACTORS * 2), "attributes has the values"),
    (lambda: metrics.ssim(-torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)), r"x is .*\[0, 1\]"),
    (lambda: metrics.mse(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 9)), "one shape"),
    (lambda: metrics.frechet_distance(CODES[:1], CODES), "feats_a"),
    (lambda: metrics.inception_features(torch.rand(2, 3, 8, 8), "net.pt"), "uint8"),
])
def test_metrics_bad_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_metrics_command_line_refuses_files_in_one_line(tmp_path, capsys):
    (tmp_path / "text.npz").write_text("codes\n")
    np.savez(tmp_path / "names.npz", z=CODES)
    np.savez(tmp_path / "objects.npz", codes=np.array([{}, {}]), factors=FACTORS)
    whole = (tmp_path / "names.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:len(whole) // 2])
    for name in ("absent.npz", "text.npz", "names.npz", "objects.npz", "cut.npz"):
        with pytest.raises(SystemExit) as stop:
            metrics.main([str(tmp_path / name)])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1, name
        assert err.startswith("metrics.py: ") and name in err


# ---- Datasets ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rendered():
    return data.open_dataset()


def listing(folder):
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*"))


def pictures(n, h=64, w=64, c=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, c), np.uint8)


def as_images(array):
    return torch.tensor(array).permute(0, 3, 1, 2)          # (n, h, w, c) -> (n, c, h, w)


def mat5(name, array, compressed):
    """A MATLAB level 5 file with another variable before the one that is wanted."""
    def element(kind, body):
        if 0 < len(body) <= 4:                                  # the small form: data in the tag
            return struct.pack("<I", len(body) << 16 | kind) + body.ljust(4, b"\0")
        return struct.pack("<II", kind, len(body)) + body + bytes(-len(body) % 8)

    def matrix(name, array):
        return element(14, element(6, struct.pack("<II", 9, 0))
                       + element(5, np.array(array.shape, "<i4").tobytes())
                       + element(1, name.encode()) + element(2, array.tobytes(order="F")))

    out = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<HH", 0x0100, 0x4D49)
    for part in (matrix("mask_of_it", np.zeros((3, 1), np.uint8)), matrix(name, array)):
        if compressed:                                          # without padding, as MATLAB does
            packed = zlib.compress(part)
            part = struct.pack("<II", 15, len(packed)) + packed
        out += part
    return out


def test_every_index_has_its_own_factors_in_the_official_order(rendered):
    f = rendered.factors(np.arange(len(rendered))).numpy()
    index = f[:, 0] * 48000 + f[:, 1] * 4800 + f[:, 2] * 480 + f[:, 3] * 60 + f[:, 4] * 15 + f[:, 5]
    assert (index == np.arange(480000)).all()
    assert rendered.factor_sizes == (10, 10, 10, 8, 4, 15) == tuple(f.max(0) + 1)


@pytest.mark.parametrize("shape", range(4))
def test_intersection_formulas_agree_with_walking_along_the_rays(shape):
    scale, angle = data.LEVELS[3][1], data.LEVELS[5][11]        # small: its lid is in view
    r, h = data.RADIUS[shape] * scale, data.TALL[shape] * scale

    def distance(x, y, z):                                      # to the object's surface, or less
        side = np.hypot(x, z)
        if shape == data.CUBE:
            return np.maximum(np.maximum(abs(x) - r, abs(z) - r), abs(y - h / 2) - h / 2)
        if shape == data.CYLINDER:
            return np.maximum(side - r, abs(y - h / 2) - h / 2)
        return np.hypot(side, y - np.clip(y, r, h - r)) - r

    def walk(o, d):                                             # sphere tracing to the object
        t = np.full(d.shape[1], 1e-3)
        for _ in range(400):
            t += np.maximum(distance(*(o + t * d)), 0)
        return np.where(distance(*(o + t * d)) < 1e-4, t, np.inf)

    eye, rays = data.camera_rays(angle, 64)
    room = data.room_light(eye, rays)
    part, t_room, _, p = room
    with np.errstate(all="ignore"):
        planes = data.light_planes(shape, scale, eye, rays, room)
        formula = data.meet_object(shape, scale, eye[:, None], rays)
        walked = walk(eye[:, None], rays)
        shadow = walk(p, np.repeat(data.SUN[:, None], len(part), 1)) < np.inf
    thing = walked < t_room
    both = (formula < np.inf) & thing
    assert np.abs(formula[both] - walked[both]).max() < 1e-3 and both.mean() > 0.02
    assert ((planes[2] > 0) == thing).mean() > 0.999            # rays that graze may disagree
    shadow &= (part == 1) & ~thing
    assert ((planes[0] == data.SHADOW) == shadow).mean() > 0.995 and shadow.mean() > 0.003
    assert ((planes[0] > 0) == ((part == 1) & (planes[2] == 0))).all()


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
    # The sky has one colour; nothing is so bright that int16 would wrap around.
    assert (rendered.images(index)[:, :, 0, 0] == torch.tensor(data.SKY)).all()
    planes = rendered.planes.astype(int)
    assert (5 * planes[:, :3].sum(1) + planes[:, 3:].max(1)).max() < 32767


def test_an_image_does_not_depend_on_its_batch(rendered):
    index = torch.tensor([479999, 7, 123456, 7] * 9)
    images = rendered.images(index)
    assert images.dtype == torch.uint8 and images.shape == (36, 3, 64, 64)
    assert images.is_contiguous()
    for i in (0, 1, 2, 3, 35):
        assert (images[i] == rendered.images([int(index[i])])[0]).all()
    with pytest.raises(IndexError):
        rendered.images([480000])


def test_the_written_file_equals_the_rendered_set(rendered, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "render_planes", lambda size: rendered.planes)
    path = tmp_path / "3dshapes.h5"
    data.write_shapes3d(path, limit=1500)
    with h5py.File(path) as f:
        assert f["images"].dtype == np.uint8 and f["images"].shape == (1500, 64, 64, 3)
        assert f["labels"].dtype == np.float64 and f["labels"].shape == (1500, 6)
        assert [len(np.unique(c)) for c in f["labels"][()].T] == [10, 10, 10, 8, 4, 15]
        assert f["labels"][()].max(0) == pytest.approx([0.9, 0.9, 0.9, 1.25, 3, 30])
    read = data.open_dataset(path)
    index = np.sort(np.arange(1500) * data.STEP % 480000)
    assert (read.name, len(read), read.factor_sizes) == ("Shapes3D", 1500, data.SIZES)
    order = np.random.default_rng(0).permutation(1500)
    assert (read.factors(order) == rendered.factors(index[order])).all()
    assert (read.images(order) == rendered.images(index[order])).all()
    assert len(np.unique(np.arange(480000) * data.STEP % 480000)) == 480000     # all come, in order
    before = listing(tmp_path)
    assert (data.open_dataset(path).images([3]) == read.images([3])).all()
    assert listing(tmp_path) == before and len(before) == 2     # converted once, no leftovers
    with pytest.raises(ValueError, match="exists already"):
        data.write_shapes3d(path, limit=10)
    data.write_shapes3d(tmp_path / "few.h5", limit=7)           # many levels missing
    few, index = data.open_dataset(tmp_path / "few.h5"), np.sort(np.arange(7) * data.STEP % 480000)
    assert (few.factors(range(7)) == rendered.factors(index)).all()


@pytest.mark.parametrize("suffix", [".h5", ".npz"])
@pytest.mark.parametrize("layout", ["nhw", "nhwc", "nhw1", "nchw"])
def test_any_array_layout_gives_the_same_images(tmp_path, layout, suffix, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 64 * 64 * 3 * 4)         # several blocks, the last one short
    colour = pictures(10)
    grey = colour[..., :1]
    array = {"nhw": grey[..., 0], "nhw1": grey, "nhwc": colour,
             "nchw": np.ascontiguousarray(colour.transpose(0, 3, 1, 2))}[layout]
    labels = np.stack([np.arange(10) % 5 * 10, np.full(10, 3), np.arange(10) // 5], 1)
    path = tmp_path / ("set" + suffix)
    if suffix == ".npz":
        np.savez_compressed(path, images=array, factors=labels)
    else:
        with h5py.File(path, "w") as f:
            f.create_dataset("images", data=array, chunks=(3, *array.shape[1:]), compression="gzip")
            f["factors"] = labels
    dataset = data.open_dataset(path)
    expected = as_images(colour if layout in ("nhwc", "nchw") else grey.repeat(3, 3))
    assert (dataset.images([9, 0, 9, 4]) == expected[[9, 0, 9, 4]]).all()
    assert dataset.factor_sizes == (5, 2)                       # the constant column is no factor
    assert dataset.factors([7]).tolist() == [[2, 1]] and dataset.factors([7]).dtype == torch.int64
    assert data.open_dataset(path, size=32).images([1]).shape == (1, 3, 32, 32)


def test_mpi3d_and_dsprites_are_known_by_their_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "GRIDS", {24: ("MPI3D", ("a", "b"), (4, 6)),
                                        12: ("dSprites", ("shape", "scale"), (3, 4))})
    images = pictures(24)
    np.savez_compressed(tmp_path / "mpi3d_toy.npz", images=images)
    toy = data.open_dataset(tmp_path / "mpi3d_toy.npz")
    assert (toy.name, toy.factor_names, toy.factor_sizes) == ("MPI3D", ("a", "b"), (4, 6))
    assert toy.factors([0, 5, 6, 23]).tolist() == [[0, 0], [0, 5], [1, 0], [3, 5]]
    assert (toy.images(range(24)) == as_images(images)).all()
    masks = pictures(12, c=1)[..., 0] // 128
    classes = np.stack([np.zeros(12, int), np.arange(12) // 4, np.arange(12) % 4], 1)
    np.savez_compressed(tmp_path / "dsprites.npz", imgs=masks, latents_classes=classes,
                        latents_values=classes / 7, metadata=np.array({"pickled": 1}, object))
    sprites = data.open_dataset(tmp_path / "dsprites.npz")
    assert (sprites.name, sprites.factor_sizes) == ("dSprites", (3, 4))
    assert (sprites.images([7])[0] == torch.from_numpy(masks[7] * 255)).all()
    assert (sprites.factors(range(12)).numpy() == classes[:, 1:]).all()


@pytest.mark.parametrize("kind", ["compressed", "plain", "7.3"])
def test_cars3d_mat_files_in_the_order_of_their_list(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(data, "CAR_MODELS", 2)
    cars = tmp_path / "data" / "cars"
    cars.mkdir(parents=True)
    models = {n: pictures(96, 64, 64, seed=k).reshape(4, 24, 64, 64, 3).transpose(2, 3, 4, 1, 0)
              for k, n in enumerate(("car_009_mesh", "car_001_mesh"))}      # (h, w, 3, 24, 4)
    for name, im in models.items():
        if kind == "7.3":
            with h5py.File(cars / f"{name}.mat", "w", userblock_size=512) as f:
                f["im"] = im.T
        else:
            (cars / f"{name}.mat").write_bytes(mat5("im", im, kind == "compressed"))
    (cars / "list.txt").write_text("car_009_mesh\ncar_001_mesh\n")
    dataset = data.open_dataset(tmp_path / "data")
    assert (dataset.name, len(dataset), dataset.factor_sizes) == ("Cars3D", 192, (4, 24, 2))
    for row in (0, 1, 95, 96, 191):
        elevation, azimuth, model = dataset.factors([row])[0].tolist()
        expected = list(models.values())[model][:, :, :, azimuth, elevation]
        assert (dataset.images([row])[0] == torch.from_numpy(expected.transpose(2, 0, 1))).all()
    assert len(np.unique(dataset.factors(range(192)), axis=0)) == 192
    (cars / "car_001_mesh.mat").unlink()
    with pytest.raises(ValueError, match="car_001_mesh.mat"):
        data.open_dataset(tmp_path / "data")


@pytest.mark.parametrize("kind", ["txt", "txt without count", "csv"])
def test_celeba_attributes_and_crop(tmp_path, kind):
    folder = tmp_path / "img_align_celeba"
    folder.mkdir()
    faces = pictures(4, 218, 178)
    for k in range(4):                      # PNG inside, so that the crop can be compared exactly
        Image.fromarray(faces[k]).save(folder / f"{k + 1:06d}.jpg", "PNG")
    (folder / "000002.jpg").write_bytes(b"damaged")
    names = [f"Attribute_{j}" for j in range(40)]
    values = np.where(pictures(4, 40, 1, 1)[..., 0, 0] > 127, 1, -1)        # (4, 40)
    rows = [[f"{k + 1:06d}.jpg", *map(str, values[k])] for k in range(4)]
    if kind == "csv":
        text = "\n".join(",".join(r) for r in [["image_id", *names], *rows])
        (tmp_path / "list_attr_celeba.csv").write_text(text)
    else:
        text = "\n".join([" ".join(names) + " ", *("  ".join(r) for r in rows)])
        (tmp_path / "list_attr_celeba.txt").write_text("4\n" * (kind == "txt") + text + "\n")
    dataset = data.open_dataset(folder, size=128)
    assert (dataset.name, len(dataset), dataset.attribute_names) == ("CelebA", 3, tuple(names))
    assert dataset.factor_names == () and dataset.factors([0, 1]).shape == (2, 0)
    assert (dataset.attributes([1, 0]).numpy() == (values[[2, 0]] > 0)).all()
    assert (dataset.images(range(3)) == as_images(faces[[0, 2, 3], 57:185, 25:153])).all()
    small = Image.fromarray(faces[2]).crop((25, 57, 153, 185)).resize((64, 64), Image.BILINEAR)
    assert (data.open_dataset(tmp_path).images([1]) == as_images(np.asarray(small)[None])).all()


def test_a_folder_of_pictures_skips_a_few_and_refuses_many(tmp_path, capsys):
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    images = pictures(5, 80, 80)
    for k in range(5):                      # wide ones, and one upright
        image = images[k, :64] if k < 4 else images[k, :, :64]
        Image.fromarray(image).save(folder / ("sub" if k > 2 else ".") / f"{k}.png")
    (folder / "._0.png").write_bytes(b"macOS was here")
    (folder / "1.png").write_bytes(b"not a picture")
    dataset = data.open_dataset(folder)
    assert len(dataset) == 4 and dataset.factor_names == dataset.attribute_names == ()
    assert (dataset.images(range(3)) == as_images(images[[0, 2, 3], :64, 8:72])).all()
    assert (dataset.images([3]) == as_images(images[4:, 8:72, :64])).all()
    assert "1.png" in capsys.readouterr().out
    (folder / "2.png").write_bytes((folder / "0.png").read_bytes()[:99])
    with pytest.raises(ValueError, match="cannot be read, first .*1.png"):
        data.open_dataset(folder)


def test_a_cache_is_renewed_with_its_source_and_never_replaces_other_files(tmp_path, capsys):
    path, other = tmp_path / "a.npz", tmp_path / "elsewhere"
    np.savez(path, images=pictures(4))
    assert len(data.open_dataset(path, cache=other)) == 4
    assert listing(tmp_path)[0][0] == str(path) and len(list(other.iterdir())) == 1
    np.savez(path, images=pictures(5, seed=1))
    renewed = data.open_dataset(path, cache=other)
    assert (renewed.images([4]) == as_images(pictures(5, seed=1)[4:])).all()
    assert "another version" in capsys.readouterr().out
    cache = next(other.iterdir())
    for content in (b"my diary", cache.read_bytes()[:-1], cache.read_bytes()[1:]):
        cache.write_bytes(content)
        with pytest.raises(ValueError, match="in the way"):
            data.open_dataset(path, cache=other)
        assert cache.read_bytes() == content


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez(path, images=pictures(4))
    before = listing(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(data.shutil, "disk_usage", lambda p: type("D", (), {"free": 10}))
        with pytest.raises(OSError, match="no room for .*--cache DIR"):
            data.open_dataset(path)
    with monkeypatch.context() as m:        # full only when the last bytes are written
        m.setattr(data.os, "fsync", lambda f: (_ for _ in ()).throw(OSError(28, "disk full")))
        with pytest.raises(OSError, match="no room for"):
            data.open_dataset(path)
    assert listing(tmp_path) == before


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def hdf5(**arrays):
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as f:
        for key, value in arrays.items():
            f[key] = value
    return buffer.getvalue()


def png(width=80, height=80):
    buffer = io.BytesIO()
    Image.fromarray(pictures(1, height, width)[0]).save(buffer, "PNG")
    return buffer.getvalue()


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1:]


FOUR = pictures(4)
BAD_DATA = {                                # name: (files, what the one line has to say)
    "no such path": ({}, "does not exist"),
    "empty folder": ({"set/readme.txt": b"hello"}, "holds no pictures"),
    "empty file": ({"set": b""}, "expected HDF5"),
    "a text file": ({"set": b"hello world"}, "expected HDF5"),
    "truncated HDF5": ({"set": hdf5(images=FOUR)[:5000]}, "complete file"),
    "HDF5 without images": ({"set": hdf5(pixels=FOUR)}, "holds ['pixels']; expected"),
    "HDF5 with images as a group": ({"set": hdf5(**{"images/a": FOUR})}, "expected an array"),
    "truncated npz": ({"set": npz(images=FOUR)[:5000]}, "complete file"),
    "damaged npz": ({"set": npz(images=FOUR).replace(b"PK\1\2", b"PK\1\3")}, "complete file"),
    "an npz with one wrong byte": ({"set": flipped(npz(images=FOUR), 9000)}, "complete file"),
    "npz without images": ({"set": npz(a=FOUR)}, "expected an array 'images'"),
    "float images": ({"set": npz(images=FOUR / 255)}, "is float64"),
    "images of two axes": ({"set": npz(images=FOUR[0, :, :, 0])}, "expected uint8 of shape"),
    "five channels": ({"set": npz(images=pictures(2, c=5))}, "expected uint8 of shape"),
    "no images at all": ({"set": npz(images=FOUR[:0])}, "expected uint8 of shape"),
    "column-major images": ({"set": npz(images=np.asfortranarray(FOUR))}, "column-major"),
    "labels of another length": ({"set": npz(images=FOUR, labels=np.arange(3))}, "one row for"),
    "labels of three axes": ({"set": npz(images=FOUR, labels=np.zeros((4, 1, 1), int))}, "one row"),
    "labels of floats": ({"set": npz(images=FOUR, labels=np.arange(4) / 3)}, "expected integers"),
    "pickled labels": ({"set": npz(images=FOUR, labels=np.array([{}] * 4))}, "cannot be read"),
    "a count without MPI3D": ({"mpi3d_real.npz": npz(images=FOUR)}, "MPI3D has 1,036,800"),
    "too few cars": ({"set/car_1_mesh.mat": b"x"}, "expected 183"),
    "a listed car missing": ({"set/list.txt": b"car_1_mesh car_2_mesh", "set/car_1_mesh.mat": b""},
                             "car_2_mesh.mat missing"),
    "unreadable picture": ({"set/a.png": b"x", "set/b.png": b"x"}, "cannot be read, first"),
    "truncated picture": ({"set/a.png": png()[:9000], "set/b.png": png()[:9000]}, "cannot be read"),
    "CelebA of another size": ({"set/1.jpg": png(), "set/2.jpg": png(),
                                "set/list_attr_celeba.txt": b"a\n1.jpg 1\n2.jpg 1"}, "cannot be"),
    "CelebA without a line": ({"set/1.jpg": png(178, 218), "set/list_attr_celeba.txt": b"a b"},
                              "no line for 1.jpg"),
    "CelebA with a short line": ({"set/1.jpg": png(178, 218),
                                  "set/list_attr_celeba.txt": b"a b\n1.jpg 1"}, "expected 2"),
    "CelebA with no lines": ({"set/1.jpg": png(178, 218), "set/list_attr_celeba.csv": b""},
                             "cannot be read"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line_and_leaves_nothing_behind(case, tmp_path, monkeypatch, capsys):
    files, words = BAD_DATA[case]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    path = tmp_path / (next(iter(files)).split("/")[0] if files else "set")
    before = listing(tmp_path)
    monkeypatch.setattr("sys.argv", ["data.py", "--data", str(path)])
    with pytest.raises(SystemExit) as stop:
        data.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error, error
    assert listing(tmp_path) == before


@pytest.mark.parametrize("arguments, words", [
    (["--size", "63"], "expected 32, 64 or 128"),
    (["--size", "big"], "invalid int"),
    (["--shapes", "7"], "unrecognized"),
    (["--write", "a.h5", "--limit", "0"], "expected 1 to 480000"),
    (["--write", "no/such/folder/a.h5"], "its folder does not"),
    (["--write", "."], "exists already"),
    (["--data", "x.npz", "--cache", "x.npz"], "x.npz"),
])
def test_bad_arguments_are_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", images=FOUR)
    before = listing(tmp_path)
    monkeypatch.setattr("sys.argv", ["data.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        data.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error, error
    assert listing(tmp_path) == before


def test_a_file_being_written_elsewhere_is_refused(tmp_path):
    path = tmp_path / "busy.h5"
    path.write_bytes(hdf5(images=FOUR))
    program = f"import h5py; f = h5py.File({str(path)!r}, 'a'); print('open', flush=True); input()"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as writer:
        assert writer.stdout.readline() == "open\n"
        with pytest.raises(ValueError, match="no other program is writing"):
            data.open_dataset(path)
        writer.communicate("\n")
    assert len(data.open_dataset(path)) == 4


# ---- Samplers and pictures -----------------------------------------------------------------------


def rms(z):
    return z.square().mean().sqrt()


@pytest.mark.parametrize("schedule", encdiff.SCHEDULES)
def test_with_the_exact_noise_every_sampler_recovers_z0(schedule):
    """In float32, T included, where abar_T is as small as 2e-9 (cosine) or 2e-41 (sqrt)."""
    one_step = dict(steps=1)
    for timesteps, name, options in [
            (50, "ddpm", {}), (1000, "ddim", dict(steps=7)), (1000, "ddim", dict(steps=7, eta=1.0)),
            (1000, "dpm", dict(steps=7)), (1000, "dpm", one_step)]:
        model = tiny_model(schedule=schedule, timesteps=timesteps)
        z0 = torch.randn(2, *model.latent_shape)
        model.latent_limit.copy_(z0.abs().max())
        model.decode = lambda z: z
        signal = model.alpha_bar.sqrt()
        spread = (1 - model.alpha_bar).sqrt()
        model.denoiser.forward = lambda z_t, t, tokens: (z_t - signal[t[0]] * z0) / spread[t[0]]
        result = model.sample(torch.zeros(2, 6, 8), sampler=name, **options)
        if options is not one_step:  # which reads z_0 from a share signal[T] of float32s
            torch.testing.assert_close(result, z0, atol=2e-3, rtol=0, msg=f"{name} {options}")
        assert rms(result) <= 1.001 * model.latent_limit


def test_ddim_with_eta_1_and_all_steps_is_ddpm():
    alpha_bar = encdiff.cumulative(encdiff.beta_schedule("cosine", 40))
    predict = lambda z, t: torch.tanh(z) + t / 40  # any function: only the samplers are compared
    z = torch.randn(4, 3, dtype=torch.float64)
    torch.manual_seed(1)
    ancestral = encdiff.ddpm(predict, alpha_bar, z)
    torch.manual_seed(1)
    torch.testing.assert_close(encdiff.ddim(predict, alpha_bar, z, 40, eta=1.0), ancestral)


def test_samplers_start_at_T_take_each_step_once_and_add_no_noise_at_the_end(monkeypatch):
    alpha_bar = encdiff.cumulative(encdiff.beta_schedule("linear", 30))
    draws, randn_like = [], torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda z: draws.append(len(visited)) or randn_like(z))
    for name, options, steps in [("ddpm", {}, 30), ("ddim", dict(steps=7, eta=0.5), 7),
                                 ("dpm", dict(steps=7), 7)]:
        visited = []
        predict = lambda z, t: visited.append(t) or 0.5 * z
        draws.clear()
        encdiff.SAMPLERS[name](predict, alpha_bar, torch.randn(5), **options)
        assert visited[0] == 30 and visited[-1] >= 1 and len(set(visited)) == steps
        assert visited == sorted(visited, reverse=True)
        # One draw after each estimate but the last.
        assert draws == ([] if name == "dpm" else list(range(1, steps)))


def test_dpm_solver_is_second_order_and_ddim_first():
    """z_0 ~ N(0, m): the best denoiser and the exact end of the deterministic path are known."""
    m, T = 0.5, 4096
    half_log_snr = torch.linspace(12, -4, T + 1, dtype=torch.float64)  # lambda, evenly spaced
    alpha_bar = torch.sigmoid(2 * half_log_snr)
    alpha_bar[0] = 1
    variance = alpha_bar * m + 1 - alpha_bar  # of z_t
    predict = lambda z, t: alpha_bar[t].sqrt() * m * z / variance[t]  # E[z_0 | z_t]
    z = torch.ones(1, dtype=torch.float64)
    exact = z * (m / variance[T]) ** 0.5
    error = lambda sampler, steps: (sampler(predict, alpha_bar, z, steps) - exact).abs().item()
    for sampler, order in [(encdiff.ddim, 1), (encdiff.dpm_solver, 2)]:
        for steps in (64, 128):
            gain = error(sampler, steps) / error(sampler, 2 * steps)
            assert math.log2(gain) == pytest.approx(order, abs=0.15)
    # A tenth of the steps, and still closer.
    assert error(encdiff.dpm_solver, 64) < error(encdiff.ddim, 640)


@pytest.mark.parametrize("schedule", ["cosine", "sqrt"])
def test_an_imperfect_denoiser_does_not_blow_up_where_abar_is_near_0(schedule):
    model = tiny_model(schedule=schedule)
    model.latent_limit.fill_(3.0)
    model.decode = lambda z: z
    model.denoiser.forward = lambda z_t, t, tokens: 0.9 * z_t  # 0.1 z_t wrong: 1e3 or more in z_0
    for name, steps in [("ddim", 20), ("dpm", 20), ("ddim", 3), ("dpm", 3)]:
        z = model.sample(torch.zeros(2, 6, 8), sampler=name, steps=steps)
        assert rms(z) <= 3.01


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
        for name, variant in [("run", {}), ("adagn", {"conditioning": "adagn"}),
                              ("vector", {"tokens": "vector"}), ("direct", {"decoder": "direct"})]:
            options = dict(TINY, data=str(folder / "toy.npz"), size=32, timesteps=12, **variant)
            train.main(["--preset", "small", "--out", str(folder / name), *flags(**options)])
    return folder


def opened(run, *words):
    args = sample.parse(["swap", str(run), *words])
    return sample.Trained(args), args


def test_rows_are_named_by_factor_factors_first_or_numbered_without_scores(finished):
    factors = ["factor 0", "factor 0", "factor 1", "none", "none", "none"]
    assert sample.token_rows(*opened(finished / "run")) == (
        ORDER, [f"{factor}\ntoken {i}" for factor, i in zip(factors, ORDER)])
    (finished / "direct" / "metrics.json").write_text(json.dumps({"note": "not scored"}))
    (finished / "adagn" / "metrics.json").unlink()
    for run in ("direct", "adagn"):
        rows = sample.token_rows(*opened(finished / run, "--tokens", "5", "2"))
        assert rows == ([2, 5], ["token 2", "token 5"])


@pytest.fixture
def drawn(monkeypatch):
    """The (codes, noise) that `Trained.draw` is asked for; nothing is sampled."""
    calls = []

    def draw(self, codes, noise, options=None):
        calls.append((codes, noise))
        return torch.zeros(len(codes), 3, self.config.size, self.config.size)

    monkeypatch.setattr(sample.Trained, "draw", draw)
    return calls


@pytest.mark.parametrize("run", ["run", "vector"])
def test_swap_takes_one_token_a_row_in_the_order_of_the_names(finished, drawn, run):
    sample.main(["swap", str(finished / run), "--count", "2", "--seed", "5"])
    trained, _ = opened(finished / run, "--seed", "5")
    source, target = (trained.codes(x) for x in trained.images(4).split(2))
    (codes, noise), = drawn
    assert len(codes) == 14 and torch.equal(codes[:2], source)
    for i, got in zip(ORDER, codes[2:].split(2)):
        others = [j for j in range(6) if j != i]
        assert torch.equal(got[:, i], target[:, i])
        assert torch.equal(got[:, others], source[:, others])
    assert torch.equal(noise, noise[:2].repeat(7, 1, 1, 1))


def every_code(run):
    trained, _ = opened(run)
    return trained.codes(train.to_float(trained.dataset.images(range(IMAGES))))


@pytest.mark.parametrize("run", ["run", "vector"])
def test_traverse_and_generate_use_values_of_the_data(finished, drawn, run):
    sample.main(["traverse", str(finished / run), "--count", "3", "--tokens", "4", "0"])
    seen = every_code(finished / run)  # (IMAGES, 6) or (IMAGES, 6, 8)
    one_of = lambda rows, code: (rows - code).flatten(1).abs().amax(1).min() < 1e-5
    assert len(drawn) == 2
    for i, (codes, _) in zip([4, 0], drawn):
        assert all(torch.equal(codes[0, j], codes[2, j]) for j in range(6) if j != i)
        assert all(one_of(seen[:, i:i + 1], code) for code in codes[:, i])
        if run == "run":
            _, low, middle, high = codes[:, i]
            assert seen[:, i].quantile(0.02) >= low < middle < high >= seen[:, i].quantile(0.98)
    sample.main(["generate", str(finished / run), "--count", "16"])
    mixed = drawn[-1][0]
    assert all(one_of(seen[:, j:j + 1], mixed[b, j]) for b in range(16) for j in range(6))
    assert not all(one_of(seen, code) for code in mixed)  # combinations that are in no image


def test_attention_is_drawn_at_its_place_and_averaged_over_what_has_no_column():
    config = train.Config(timesteps=10)
    attention = torch.zeros(1, 16, 2)
    attention[0, 1 * 4 + 3, 1] = 1.0  # row 1, column 3 of 4 x 4, second token
    maps, _ = sample.attention_maps([[attention]], None, config)
    row, column = divmod(maps[0, 1].argmax().item(), 64)
    assert maps[0, 0].max() == 0 and (row // 16, column // 16) == (1, 3)
    picture = sample.heat(torch.zeros(1, 3, 64, 64), maps[:, 1])[0]
    assert picture[:, 22, 60].sum() > picture[:, 50, 5].sum() + 1
    records = [[torch.full((1, P, 1), value) for value in values]  # two layers, two calls
               for P, values in [(16, (1., 2.)), (4, (3., 5.))]]
    for per, means, headings in [(None, [2.75], []), ("layer", [1.5, 4], ["4x4", "2x2"]),
                                 ("timestep", [2, 3.5], ["t = 10", "t = 5"])]:
        maps, found = sample.attention_maps(records, per, config)
        assert maps[:, 0, 9, 9].tolist() == means and list(found) == headings


@pytest.mark.parametrize("words, columns, rows, heading", [
    ("reconstruct {0}/run --count 9 --sampler dpm ddim ddpm --steps 2 3 12", 8, 5, 0),
    ("reconstruct {0}/direct --count 3", 3, 3, 0),
    ("swap {0}/run --count 2 --sampler ddim --steps 2 --eta 0.5", 2, 9, 0),
    ("traverse {0}/vector --count 3 --steps 2", 5, 6, 1),
    ("attention {0}/run --per layer --steps 2 --tokens 1", 7, 2, 1),
    ("attention {0}/direct --count 2", 2, 7, 0),
    ("generate {0}/adagn --count 10 --steps 2", 8, 2, 0)])
def test_every_picture_has_its_rows_and_columns(finished, capsys, words, columns, rows, heading):
    words = words.format(finished).split()
    sample.main(words)
    picture = Image.open(f"{words[1]}/{words[0]}.png")
    assert picture.height == rows * 131 + (28 if heading else 3)  # 32 pixels four times, a gap of 3
    assert columns * 131 < picture.width < columns * 131 + 200
    if words[0] == "reconstruct":
        table = re.findall(r"^(first stage|d.*s|direct decoder) +(\S+) +(\S+) +\S+$",
                           capsys.readouterr().out, re.M)
        assert len(table) == rows - 1
        assert all(-1 <= float(ssim) <= 1 and 0 < float(mse) < 4 for _, ssim, mse in table)


def test_kl_estimated_on_latents_agrees_with_the_closed_form(finished, capsys, tmp_path):
    sample.main(["kl", str(finished / "run"), "--count", "256", "--out", str(tmp_path / "kl.png")])
    table = [line[12:].split() for line in capsys.readouterr().out.splitlines()[2:-1]]
    curves = np.array(table, float).reshape(len(encdiff.SCHEDULES), 2, 12)  # exact, estimated
    np.testing.assert_allclose(curves[:, 1], curves[:, 0], rtol=0.02)


def test_curves_of_several_runs_share_a_picture(finished):
    sample.main(["curves", str(finished / "run"), str(finished / "adagn")])
    assert Image.open(finished / "run" / "curves.png").size == (1520, 720)


@pytest.mark.parametrize("logarithmic, ys", [(False, (0, 1, 2)), (True, (1, 10, 100)),
                                             (True, (-1, 0, 1))])  # with a GAN, say
def test_what_is_straight_on_its_axes_is_plotted_as_a_straight_line(logarithmic, ys):
    series = [("name", (255, 0, 0), list(zip((0, 1, 2), ys)))]
    pixels = np.asarray(sample.plot("", "", series, logarithmic=logarithmic))[:, :800]  # no legend
    y, x = (pixels == (255, 0, 0)).all(-1).nonzero()
    assert np.ptp(x) > 500 and np.corrcoef(x, y)[0, 1] < -0.999


def test_complexity_counts_parameters_and_passes(finished, capsys):
    run = finished / "run"
    sample.main(["complexity", str(run), "--sampler", "dpm", "ddpm", "--steps", "3", "12"])
    words = capsys.readouterr().out.split()
    count = sum(p.numel() for p in train.load_run(run)[0].denoiser.parameters())
    assert words[words.index("denoiser") + 1] == f"{count:,}"
    assert [words[words.index(name) + 3] for name in ("dpm,", "ddpm,")] == ["3", "12"]


def test_encode_writes_what_metrics_reads(finished, capsys):
    for run, shape in [("run", (IMAGES, 6)), ("vector", (IMAGES, 6, 8))]:
        sample.main(["encode", str(finished / run)])
        with np.load(finished / run / "codes.npz") as arrays, np.load(finished / "toy.npz") as toy:
            assert arrays["codes"].shape == shape and arrays["codes"].dtype == np.float32
            assert np.array_equal(arrays["indices"], np.arange(IMAGES))
            assert np.array_equal(arrays["factors"], toy["labels"])
            expected = every_code(finished / run).numpy()
            np.testing.assert_allclose(arrays["codes"], expected, atol=1e-5)
    metrics.main([str(finished / "run" / "codes.npz"), "--train", "200", "--test", "100"])
    assert "disentanglement" in capsys.readouterr().out
    np.savez(finished / "others.npz", images=np.zeros((3, 40, 30, 3), np.uint8))
    words = ["--data", str(finished / "others.npz"), "--out", str(finished / "other codes.npz")]
    sample.main(["encode", str(finished / "run"), *words])
    with np.load(finished / "other codes.npz") as arrays:
        assert arrays["codes"].shape == (3, 6) and "factors" not in arrays


def test_sample_without_a_verb_lists_the_verbs(capsys):
    sample.main([])
    listed = capsys.readouterr().out
    assert all(f.__name__ in listed for f in sample.VERBS) and len(sample.VERBS) == 9


@pytest.fixture(scope="module")
def broken(finished):
    """Beside the good runs, one with a first stage alone and one with two damaged files."""
    good = torch.load(finished / "run" / "checkpoint.pt", weights_only=True)
    for name, stage in [("unfinished", "first stage"), ("damaged", good["stage"])]:
        (finished / name).mkdir()
        torch.save({**good, "stage": stage}, finished / name / "checkpoint.pt")
    (finished / "damaged" / "metrics.json").write_text("{")
    (finished / "damaged" / "log.csv").write_text("a,b\n1,2\n")
    return finished


@pytest.mark.parametrize("words, said", [
    ("swap", "required: RUN"),
    ("swap {0}/nothing", "checkpoint.pt not found; expected a folder written by train.py"),
    ("swap {0}/unfinished", "has not finished its first stage"),
    ("swap {0}/damaged", "metrics.json is damaged"),
    ("swap {0}/run --tokens 1 6", "--tokens is 6; expected 0 to 5"),
    ("attention {0}/run --tokens -1", "--tokens is -1; expected 0 to 5"),
    ("complexity {0}/run --steps 0", "--steps is 0; expected 1 to 12"),
    ("generate {0}/run --steps 13", "--steps is 13; expected 1 to 12"),
    ("swap {0}/run --sampler dpm ddim", "unrecognized arguments: ddim"),
    ("swap {0}/run --sampler ddpm --steps 5", "expected 12 with ddpm"),
    ("swap {0}/run --eta 0.5", "--eta is 0.5; expected 0 to 1, with ddim"),
    ("swap {0}/run --sampler ddim --eta 2", "--eta is 2.0; expected 0 to 1"),
    ("reconstruct {0}/run --sampler dpm ddim --steps 5", "expected one number for each"),
    ("swap {0}/run --count 151", "302 images are needed; expected at most 300"),
    ("reconstruct {0}/direct --count 4 --steps 5", "expected no --sampler"),
    ("swap {0}/run --count 0", "--count is 0; expected at least 1"),
    ("swap {0}/run --seed -1", "--seed is -1"),
    ("swap {0}/run --out {0}/no/such/folder.png", "expected a file in a folder that exists"),
    ("attention {0}/adagn --count 1 --steps 1", "no cross-attention"),
    ("curves {0}/nothing", "log.csv not found"),
    ("curves {0}/damaged", "is no log of this version")])
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(broken, capsys, words, said):
    files = lambda: {path: path.stat().st_mtime_ns for path in broken.rglob("*")}
    before = files()
    with pytest.raises(SystemExit) as ended, train.one_line_errors():
        sample.main(words.format(broken).split())
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and said in error, error
    assert files() == before


# ---- The documents ------------------------------------------------------------------------------


def test_the_readmes_table_of_equations_points_at_the_lines_that_compute_them():
    rows = re.findall(r"^\| \((\d+)\) \|.*\| `?(\w+)\.py`?,? `([\w.]+)` \|$", (HERE / "README.md").read_text(), re.M)
    assert len(rows) >= 5
    for number, module, name in rows:
        source = (HERE / f"{module}.py").read_text()
        start = source.index(f"def {name.split('.')[-1]}(")
        function = re.split(r"\n(?:    )?(?:def|class) ", source[start:])[0]
        assert f"Eq. ({number})" in function, f"{module}.{name} does not mention Eq. ({number})"


def test_files_meant_to_be_copied_import_nothing_of_ours():
    ours = {path.stem for path in HERE.glob("*.py")}
    for name, allowed in [("data", set()), ("vq", set()), ("unet", set()), ("metrics", set()),
                          ("encdiff", {"vq", "unet"})]:
        imported = set(re.findall(r"^(?:import|from) (\w+)", (HERE / f"{name}.py").read_text(), re.M))
        assert not imported & ours - allowed

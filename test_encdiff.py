"""What we are sure of: each test is one claim about the method or about what happens to a user.

Run with `python -m pytest -q`. CPU only, no data file, no network.
"""
import copy
import csv
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import encdiff
import metrics
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
    ("--schedule cosin", "cosine"), ("--encoder resnet", "cnn_bn"), ("--tokens", "tokens"), ("--timesteps 1", "timesteps"),
    ("--vq-steps 10", "vq_warmup"), ("--codebook-size 1", "codebook-size"), ("--vq-patch 3", "vq-patch"),
    ("--conditioning adagn --decoder direct", "adagn"), ("--tokens vector --regularizer sparse", "vector"),
    ("--regularizer orthogonal --num-tokens 40", "token_dim"), ("--learning-rate 1", "learning-rate"),
    ("--steps many", "many"), ("--preset tiny", "small"), ("--resume nowhere", "nowhere"),
    ("--data nowhere.h5", "nowhere.h5"), ("--seed -1", "seed"), ("--precision fp16", "bf16"),
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
def test_a_bad_flag_is_one_line_that_names_it(words, named, folder, capsys):
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

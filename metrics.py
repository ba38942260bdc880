"""How well do N codes separate F factors? FactorVAE score, DCI, MIG, TAD, and image distances.

WHERE     read after vq.py, before data.py. Imports numpy and torch only: copy it freely.
PAPER     EncDiff, arXiv 2402.09712v2, experimental setup; each score names its own paper.
SHAPES    n samples, N codes, d width of a vector-valued code, F factors, K classes of one factor,
          codes (n, N) or (n, N, d), factors (n, F) integers, images (B, 3, H, W)
IDEA      The factor scores fill a table "which code knows which factor", and ask: does each code
          know one factor only (disentanglement), is each factor known by one code only
          (completeness)? They fill it by asking
            FactorVAE score   which code stands still while one factor is held fixed? Votes.
            DCI               which codes does a classifier use to read a factor? Boosted trees.
            MIG               how much do a code and a factor tell of each other? A 2-d histogram.
          FactorVAE and DCI's D do not mind a factor spread over several codes; C and MIG do, and
          with 20 codes for 6 factors stay well below D. "DCI" in the paper's tables is D alone.
DIFFERS   from disentanglement_lib 1.5: FactorVAE votes on a pool encoded once and never for a dead
          code, DCI never tests on its training samples, the trees are our own. Run beside ours it
          gives the same to a thousandth, but for the noise of votes (script and figures: README).
          From the public TAD script: AUROC is exact, not summed over a grid of thresholds.
TRY       python metrics.py              the trees, worked step by step on six numbers
          python metrics.py codes.npz    all factor scores of your own `codes` and `factors`
"""
import argparse
import collections
import functools
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F

ACTIVE = 0.05  # a code votes from this std on: of a dead one, rounding errors would win every vote


# ---- All scores at once --------------------------------------------------------------------------
def evaluate(codes, factors, seed=0, dci_train=10_000, dci_test=5_000):
    """All factor scores of a table of codes, as a dict that json.dump accepts. Codes (n, N) or
    (n, N, d) finite, factors (n, F) integers, else ValueError. FactorVAE score and MIG use all n
    samples, DCI random dci_train + dci_test, or two thirds and one third of fewer. A score that
    cannot be computed is absent; "note" says why in one line, "" if none is missing."""
    codes = scalar_codes(codes)
    factors = check_factors(factors, len(codes))
    if min(dci_train, dci_test) < 1:
        raise ValueError(f"DCI on {dci_train} + {dci_test} samples; expected 1 or more of each")
    if len(codes) < dci_train + dci_test:
        dci_train, dci_test = len(codes) * 2 // 3, len(codes) - len(codes) * 2 // 3
    order = np.random.default_rng(seed).permutation(len(codes))
    train, test = order[:dci_train], order[dci_train:dci_train + dci_test]
    scores = {"active_dims": int((codes.std(0) >= ACTIVE).sum()), "samples": len(codes),
              "dci_train": dci_train, "dci_test": dci_test, "seed": seed}
    names, notes = {"score": "factor_vae", "train_score": "factor_vae_train"}, []
    for name, compute in (
            ("FactorVAE score", lambda: factor_vae_votes(codes, factors, seed=seed)),
            ("DCI", lambda: dci(codes[train], factors[train], codes[test], factors[test], seed)),
            ("MIG", lambda: {"mig": mig(codes, factors)})):
        try:
            found = compute()
        except ValueError as error:
            found = {"note": f"no {name}: {error}"}
        notes.append(found.pop("note", ""))
        scores |= {names.get(key, key): value for key, value in found.items()}
    if "importance" in scores:
        scores["importance"] = scores["importance"].tolist()
    return scores | {"note": "; ".join(filter(None, notes))}


# ---- DCI -----------------------------------------------------------------------------------------
def dci(train_codes, train_factors, test_codes, test_factors, seed=0):
    """Disentanglement, completeness, informativeness (Eastwood & Williams, ICLR 2018), as a dict.
    Boosted trees learn to read each of the factors (n, F) from the codes (n, N); importance[i, j]
    says how much those of factor j used code i. D and C: 0 to 1; one code a factor scores 1, codes
    that know nothing about 0. Informativeness is accuracy averaged over factors. "note" says what
    is missing: factors with one value in train_factors; D of one factor and C of one code, 0 / 0.
    ValueError: no factor varies, or shapes do not fit."""
    train_codes, test_codes = (scalar_codes(train_codes, name="train_codes"),
                               scalar_codes(test_codes, train_codes, "test_codes"))
    train_factors = check_factors(train_factors, len(train_codes), "train_factors")
    test_factors = check_factors(test_factors, len(test_codes), "test_factors")
    learnt = np.flatnonzero(np.ptp(train_factors, axis=0)).tolist()
    if test_factors.shape[1] != train_factors.shape[1] or not learnt:
        raise ValueError(f"train_factors has shape {train_factors.shape}, test_factors "
                         f"{test_factors.shape}; expected the same factors, and one that varies")
    importance, right = np.zeros((train_codes.shape[1], train_factors.shape[1])), []      # (N, F)
    for j in learnt:
        trees = fit_trees(train_codes, train_factors[:, j], seed=seed)
        importance[:, j] = trees.importance
        right.append(((predict(trees, train_codes) == train_factors[:, j]).mean(),
                      (predict(trees, test_codes) == test_factors[:, j]).mean()))
    right = np.mean(right, axis=0).tolist()                          # (learnt, 2) -> two floats
    scores = dict(zip(("informativeness_train", "informativeness_test"), right))
    missing = [f"DCI leaves out factor {j}, which has one value in the training samples"
               for j in range(train_factors.shape[1]) if j not in learnt]
    seen = importance[:, learnt]
    for key, table, what in (
            ("disentanglement", seen, "factors"), ("completeness", seen.T, "codes")):
        if table.shape[1] > 1:
            scores[key] = focus(table)
        else:
            missing.append(f"no {key}: it takes 2 {what}")
    return scores | {"importance": importance, "note": "; ".join(missing)}


def focus(importance):
    """Do rows keep to one column, 0 to 1? Rows are codes for D; for C pass the transpose. A row
    scores 1 - entropy / (largest entropy possible); rows count by their share of the total."""
    share = importance + 1e-11       # as in disentanglement_lib: an unused code has equal shares
    share = share / share.sum(1, keepdims=True)
    score = 1 + (share * np.log(share)).sum(1) / np.log(importance.shape[1])        # (rows,)
    weight = importance.sum(1) if importance.sum() > 0 else np.ones(len(importance))
    return float((score * weight).sum() / weight.sum())


# ---- FactorVAE score -----------------------------------------------------------------------------
def factor_vae_score(represent, dataset, pool=50_000, seed=0, **votes):
    """The FactorVAE score of an encoder on a dataset with known factors: see factor_vae_votes.
    represent maps uint8 images (B, 3, H, W) to codes (B, N) or (B, N, d), the encoder being in eval
    mode: a batch's own statistics must not reach its codes. dataset has len(), images(rows) and
    factors(rows) (B, F); every vote is drawn from `pool` random images, each encoded once."""
    rows = np.random.default_rng(seed).permutation(len(dataset))[:pool]
    with torch.no_grad():
        codes = [as_numbers(represent(dataset.images(part)), "represent(images)")
                 for part in np.split(rows, range(256, len(rows), 256))]
    return factor_vae_votes(np.concatenate(codes), dataset.factors(rows), seed=seed, **votes)


def factor_vae_votes(codes, factors, train_votes=10_000, eval_votes=5_000, batch=64, seed=0):
    """FactorVAE score, 0 to 1 (Kim & Mnih, ICML 2018), of codes (n, N) and factors (n, F).
    A vote: hold one factor fixed; which code varies least, relative to its spread over everything?
    A code belongs to the factor it got most training votes for; the score is the share of fresh
    votes that go where they belong: 1 for one code a factor, about 1/F for codes that know nothing.
    The original encodes 64 new images a vote; we draw 64 rows of the table that share a value. A
    value in fewer than `batch` rows is never held; a factor with no other, or with one value alone,
    is left out, as "note" says. ValueError: no active code, or fewer than two factors."""
    codes = scalar_codes(codes)
    factors = check_factors(factors, len(codes))
    std = codes.std(0)                                               # (N,)
    active = std >= ACTIVE
    if not active.any():
        raise ValueError(f"no active code: the largest std is {std.max():.3g} < {ACTIVE}")
    groups = [group(labels, batch) for labels in factors.T]
    used = [j for j, (held, _, _, count) in enumerate(groups) if len(held) and len(count) > 1]
    if len(used) < 2:
        raise ValueError(f"it takes 2 factors that vary and have a value in {batch} rows or more; "
                         f"{len(used)} of {len(groups)} do")
    rng, scaled = np.random.default_rng(seed), codes[:, active] / std[active]
    train, fresh = (count_votes(scaled, [groups[j] for j in used], votes, batch, rng)
                    for votes in (train_votes, eval_votes))          # (used, active) each
    owner = train.argmax(0), np.arange(train.shape[1])               # the factor of each code
    notes = [f"FactorVAE votes leave out {'rare values of ' if j in used else ''}factor {j}"
             for j, (held, *_) in enumerate(groups) if j not in used or len(held) < len(codes)]
    return {"score": float(fresh[owner].sum() / eval_votes),
            "train_score": float(train[owner].sum() / train_votes),
            "active_dims": int(active.sum()), "note": "; ".join(notes)}


def group(labels, batch):
    """The values (as indices) that may be held, as often as they occur, and how to find their rows:
    value v has the rows[start[v]:start[v] + count[v]]."""
    _, value, count = np.unique(labels, return_inverse=True, return_counts=True)
    rows, start = np.argsort(value, kind="stable"), np.cumsum(count) - count
    return value[count[value] >= batch], rows, start, count


def count_votes(scaled, groups, votes, batch, rng):
    """(F, codes): while factor f was held fixed, how often did code i vary least?"""
    table, share = [], np.bincount(rng.integers(len(groups), size=votes), minlength=len(groups))
    for (held, rows, start, count), some in zip(groups, share):
        value = held[rng.integers(len(held), size=(some, 1))]
        pick = (rng.random((some, batch)) * count[value]).astype(np.int64)
        members = scaled[rows[start[value] + pick]]                  # (votes, batch, codes)
        stillest = members.var(axis=1, ddof=1).argmin(1)             # -> (votes, codes) -> (votes,)
        table.append(np.bincount(stillest, minlength=scaled.shape[1]))
    return np.stack(table)


# ---- MIG -----------------------------------------------------------------------------------------
def mutual_information(joint):
    """Nats that a and b share, from their joint probabilities (..., a, b)."""
    apart = joint.sum(-1, keepdims=True) * joint.sum(-2, keepdims=True)     # if independent
    ratio = np.divide(joint, apart, out=np.ones_like(joint), where=joint > 0)       # 0 log 0 = 0
    return (joint * np.log(ratio)).sum((-2, -1))


def mig(codes, factors, bins=20):
    """Mutual information gap (Chen et al., NeurIPS 2018) of codes (n, N) and factors (n, F): what a
    factor's best code tells of its entropy, minus the second, averaged. Codes are cut into equal
    bins. One code a factor: 1; random, doubled: about 0. ValueError: one code, no factor varies."""
    codes = scalar_codes(codes)
    n, N = codes.shape
    factors = check_factors(factors, n)
    factors = factors[:, np.ptp(factors, axis=0) > 0]
    if N < 2 or factors.size == 0:
        raise ValueError("it compares two codes, and needs a factor that varies")
    width = np.maximum(np.ptp(codes, axis=0), 1e-300)                # a constant code: one bin
    binned = ((codes - codes.min(0)) / width * bins).astype(np.int64).clip(max=bins - 1)   # (n, N)
    gaps = []
    for labels in factors.T:
        _, label, count = np.unique(labels, return_inverse=True, return_counts=True)
        K, prior = len(count), count / n
        cell = (np.arange(N) * bins + binned) * K + label[:, None]   # (n, N)
        joint = np.bincount(cell.flatten(), minlength=N * bins * K).reshape(N, bins, K) / n
        second, best = np.sort(mutual_information(joint))[-2:]
        gaps.append((best - second) / -(prior * np.log(prior)).sum())
    return float(np.mean(gaps))


# ---- What the scores take; TAD, images, the trees of DCI. Skip on first reading. -----------------
def as_numbers(array, name, whole=False):
    """Any array or tensor, on any device, as float64 numpy; ValueError: not finite, not whole."""
    expected = ("integers: number the values of a factor 0, 1, 2, ..." if whole else
                "finite numbers: drop these samples or mend the encoder")
    array = np.asarray(array.detach().cpu().double() if torch.is_tensor(array) else array)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} has dtype {array.dtype}; expected {expected}")
    array = array.astype(np.float64)
    bad = np.argwhere(~np.isfinite(array) | (whole & (array != np.floor(array)))).tolist()
    if bad:
        raise ValueError(f"{name}{bad[0]} is {array[tuple(bad[0])]}, and {len(bad) - 1} more; "
                         f"expected {expected}")
    return array


def check_factors(factors, samples, name="factors"):
    """factors as int64 (n, F), one row a code; else ValueError."""
    factors = as_numbers(factors, name, whole=True).astype(np.int64)
    if factors.ndim != 2 or len(factors) != samples or factors.shape[1] < 1:
        raise ValueError(f"{name} has shape {factors.shape}; expected (samples, factors), and "
                         f"{samples} rows as there are {samples} codes")
    return factors


def scalar_codes(codes, fit_on=None, name="codes"):
    """codes as finite float64 (n, N): vector-valued ones (n, N, d) along their main axis, by PCA.
    fit_on (m, N, d) gives mean and axis (default: codes). An eigenvector's sign is arbitrary: its
    largest entry is made positive, so that two runs agree. ValueError for other shapes."""
    codes = as_numbers(codes, name)
    basis = codes if fit_on is None else as_numbers(fit_on, "fit_on")
    if codes.ndim not in (2, 3) or codes.size == 0 or basis.shape[1:] != codes.shape[1:]:
        raise ValueError(f"{name} has shape {codes.shape}, fitted on {basis.shape}; expected "
                         f"(samples, codes) or (samples, codes, width), none of them 0")
    if codes.ndim == 2:
        return codes
    mean = basis.mean(0)                                             # (N, d)
    centred = (basis - mean).transpose(1, 2, 0)                      # (m, N, d) -> (N, d, m)
    spread = centred @ centred.transpose(0, 2, 1)                    # (N, d, m) @ (N, m, d)
    axis = np.linalg.eigh(spread)[1][:, :, -1]                       # (N, d); eigenvalues ascend
    largest = np.take_along_axis(axis, np.abs(axis).argmax(1)[:, None], axis=1)     # (N, 1)
    return np.einsum("nkd,kd->nk", codes - mean, axis * np.sign(largest))  # (n, N, d) -> (n, N)


def auroc(codes, attributes):
    """(N, A): chance that a sample with the attribute has the larger code than one without it.
    Exact, by ranks (Mann-Whitney); ties count half. A detector may be turned: max(a, 1 - a)."""
    ranks = np.empty_like(codes)
    for column, values in enumerate(codes.T):
        _, of_row, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks[:, column] = (np.cumsum(count) - (count - 1) / 2)[of_row]      # ties share a rank
    positive = attributes.sum(0)                                     # (A,)
    wins = ranks.T @ attributes - positive * (positive + 1) / 2      # (N, n) @ (n, A)
    pairs = positive * (len(codes) - positive)                       # (A,)
    area = np.where(pairs > 0, wins / np.maximum(pairs, 1), 0.5)     # all or none have it: chance
    return np.maximum(area, 1 - area)


def tad(codes, attributes, captured=0.75, overlap=0.2):
    """Total AUROC difference (Yeats et al., NashAE, ECCV 2022) of codes (n, N) and attributes (n,
    A), 0 and 1 or -1 and 1 as CelebA's, else ValueError. One counts if a code detects it (AUROC >=
    captured) and no other explains more than `overlap` of its entropy. TAD is the sum over these of
    best AUROC minus second best: random codes 0, one code an attribute 0.5 for each."""
    codes = scalar_codes(codes)
    if codes.shape[1] < 2:
        raise ValueError("TAD compares two codes, and there is one")
    yes = check_factors(attributes, len(codes), "attributes")
    if not (np.isin(yes, (0, 1)).all() or np.isin(yes, (-1, 1)).all()):
        raise ValueError(f"attributes has the values {np.unique(yes)[:5]}; expected 0, 1 or -1, 1")
    yes = (yes > 0).astype(np.float64)                               # (n, A)
    both = np.stack([yes, 1 - yes], axis=2)                          # (n, A) -> (n, A, 2)
    joint = np.tensordot(both, both, (0, 0)) / len(yes)              # (A, 2, A, 2)
    shared = mutual_information(joint.transpose(0, 2, 1, 3))         # (A, A)
    entropy = np.diag(shared)                                        # what a shares with itself
    explained = (shared - np.diag(entropy)).max(1) / np.maximum(entropy, 1e-12)      # (A,)
    area = auroc(codes, yes)                                         # (N, A)
    second, best = np.sort(area, axis=0)[-2:]                        # (A,) each
    counts = (best >= captured) & (explained <= overlap)
    return {"tad": float((best - second)[counts].sum()), "captured": int(counts.sum()),
            "counted": np.flatnonzero(counts).tolist(), "auroc": area.tolist()}


# ---- Distances between images --------------------------------------------------------------------
def check_pair(x, y):
    """ValueError unless these are float batches (B, C, H, W) of one shape, in [0, 1]."""
    if x.shape != y.shape or x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"images of shape {tuple(x.shape)} and {tuple(y.shape)}; "
                         f"expected one shape (B, C, H, W), none of them 0")
    both = torch.cat([x, y])
    if not (both.is_floating_point() and both.min() >= 0 and both.max() <= 1):
        raise ValueError(f"images are {both.dtype} from {both.min():.4g} to {both.max():.4g}; "
                         f"expected floats in [0, 1]: (images + 1) / 2, clamped")


def mse(x, y):
    """Mean squared error of each image (B,), on [0, 1]. Equal images 0, two uniform noises 1/6."""
    check_pair(x, y)
    return (x - y).square().mean((1, 2, 3))


def ssim(x, y):
    """Structural similarity of each image (B,) (Wang et al., IEEE TIP 2004), on [0, 1]: equal
    images 1, noise about 0, least -1. Zeros are padded at the border, as in the code behind
    Diff-AE's numbers, which the paper compares with; Wang et al. use only windows that fit."""
    check_pair(x, y)
    bell = torch.exp(-torch.arange(-5, 6, dtype=x.dtype, device=x.device) ** 2 / (2 * 1.5 ** 2))
    window = torch.outer(bell, bell) / bell.sum() ** 2               # (11, 11) Gaussian, sigma 1.5
    C = x.shape[1]                                                   # each channel on its own
    blur = functools.partial(F.conv2d, weight=window.expand(C, 1, 11, 11), padding=5, groups=C)
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01 ** 2, 0.03 ** 2           # keep the ratio finite where an image is black or flat
    value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return value.mean((1, 2, 3))


# AlexNet's convolutions: index in torchvision's `features`, stride, padding, a max-pool before it?
ALEXNET = ((0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False))


def load_lpips(alexnet_file, linear_file):
    """The weights of `lpips`, from two files that cannot be shipped, as one dict of tensors:
    torchvision's alexnet-owt-7be5be79.pth and the lpips package's weights/v0.1/alex.pth. Only
    tensors are read, nothing is executed. OSError, ValueError: unreadable, or other files."""
    convolutions = [f"features.{i}.{part}" for i, *_ in ALEXNET for part in ("weight", "bias")]
    linear = [f"lin{level}.model.1.weight" for level in range(len(ALEXNET))]
    weights = {}
    for path, keys in ((alexnet_file, convolutions), (linear_file, linear)):
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            weights |= {key: stored[key].float() for key in keys}
        except OSError:
            raise
        except Exception:  # torch's words advise unsafe loading
            raise ValueError(f"{path} has no {keys[0]}: is it the other of the two files, a "
                             f"git-lfs pointer, or cut short?") from None
    return weights


def lpips(x, y, weights):
    """Learned perceptual distance of each image (B,) (Zhang et al., CVPR 2018), on [0, 1],
    32 x 32 pixels or more: squared differences of AlexNet's features, each pixel's scaled to unit
    length, weighted as fitted to human judgements. 0 for equal images, no upper end, mostly < 1."""
    check_pair(x, y)
    # ImageNet's channels, for images in [-1, 1]: (3,) -> (3, 1, 1) each
    shift = x.new_tensor((-0.030, -0.088, -0.188)).view(3, 1, 1)
    scale = x.new_tensor((0.458, 0.448, 0.450)).view(3, 1, 1)
    both = (2 * torch.cat([x, y]) - 1 - shift) / scale               # (2B, 3, H, W)
    total = 0
    for level, (index, stride, padding, pool) in enumerate(ALEXNET):
        kernel, bias = (weights[f"features.{index}.{part}"].to(x) for part in ("weight", "bias"))
        both = F.max_pool2d(both, 3, 2) if pool else both
        both = F.relu(F.conv2d(both, kernel, bias, stride, padding))
        unit = both / (both.square().sum(1, keepdim=True).sqrt() + 1e-10)
        a, b = unit.chunk(2)                                         # (2B, c, h, w) -> (B, c, h, w)
        judged = F.conv2d((a - b).square(), weights[f"lin{level}.model.1.weight"].to(x))
        total = total + judged.mean((1, 2, 3))                       # (B, 1, h, w) -> (B,)
    return total


def frechet_distance(feats_a, feats_b):
    """Frechet distance of two sets of features (n, D) and (m, D), each taken as a Gaussian:
    |mean difference|^2 + trace(A + B - 2 (A B)^(1/2)), A and B the covariances. 0 for equal sets,
    no upper end. Biased upwards for few samples: compare only figures from equally many."""
    a = torch.from_numpy(as_numbers(feats_a, "feats_a"))
    b = torch.from_numpy(as_numbers(feats_b, "feats_b"))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"feats_a has shape {tuple(a.shape)}, feats_b {tuple(b.shape)}; expected "
                         f"(samples, features), equally wide, 2 samples or more")
    cov_a, cov_b = a.T.cov(), b.T.cov()                              # (D, D)
    # A B has the eigenvalues of the symmetric A^(1/2) B A^(1/2), whose roots sum to the trace.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T          # (D, D) @ (D, D)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def fid(images_a, images_b, inception_file, batch=64):
    """FID (Heusel et al., NeurIPS 2017) of two sets of uint8 images (n, 3, H, W) and (m, 3, H, W).
    inception_file: NVIDIA's TorchScript inception-2015-12-05.pt, which resizes the images itself.
    TorchScript is a program: run only a file you trust. The paper takes 10,000 images a side."""
    if not images_a.dtype == images_b.dtype == torch.uint8:
        raise ValueError(f"images are {images_a.dtype} and {images_b.dtype}; expected uint8")
    network = torch.jit.load(inception_file, map_location=images_a.device).eval()
    with torch.no_grad():
        feats = [torch.cat([network(part, return_features=True) for part in images.split(batch)])
                 for images in (images_a, images_b)]                 # (n, 2048), (m, 2048)
    return frechet_distance(*feats)


# ---- The trees behind DCI: gradient boosting, written out ----------------------------------------
# Six samples have the codes 1 2 3 4 5 6 and the labels 0 0 0 1 0 1. Steps 2 to 5 are one round of
# `fit_trees`; `python metrics.py` computes each number.
# 1 START. A third of the labels is 1: say p = 1/3 for all. What we keep and mend is a score, any
#   number, with p = sigmoid(score): at first log(1/2), the log odds.
# 2 RESIDUAL. r = label - p is what p lacks: -1/3 -1/3 -1/3 2/3 -1/3 2/3.
# 3 SPLIT. Ask of one code, "is it <= c?". A good question leaves residuals that are alike on
#   either side, nl samples on the left and nr on the right:
#       gain = (nl nr / n) (mean_l - mean_r)^2
#   is how much the squared distances to the mean shrink. The cut after 3 has the means -1/3 and
#   1/3: its gain is (3 3 / 6) (2/3)^2 = 2/3. After 1, 2, 4, 5 it is 2/15, 1/3, 1/12, 8/15.
# 4 TREE. Split, then both halves, then all four quarters: depth 3, at most 8 leaves. The example
#   stops at depth 1: the leaves are 1 2 3 and 4 5 6.
# 5 LEAF. Its samples move their scores by a tenth of Newton's step: slope of the log likelihood
#   over curvature, sum r / sum |r|(1-|r|). On the left -1 / (3 2/9) / 10 = -3/20, on the right
#   3/20; p becomes .301 and .367. Then 2 again: each of a hundred rounds mends what is left.
# K > 2 CLASSES: K scores a sample, softmax for sigmoid, K trees a round, one for each class, whose
#   r is 1 - p for the class it is and -p for the others, and (K-1)/K of the step.
# IMPORTANCE of a code: the gains of all splits on it, over all trees, as a share of all gains.
# This is scikit-learn's GradientBoostingClassifier with its defaults: 1 sample in a leaf, all
# samples and codes for each tree, c midway between two values, ties broken at random.
Trees = collections.namedtuple("Trees", "classes start rounds importance")


def fit_trees(codes, labels, rounds=100, rate=0.1, depth=3, seed=0):
    """Boosted trees that read labels (n,) from codes (n, N): classes (K,), the labels; start, the
    first scores, K of them or 1 if K = 2; rounds, lists of a tree a score, which is (code, c, tree
    if code <= c, tree if not) or at a leaf its step; importance (N,), with sum 1 or 0."""
    classes, label = np.unique(labels, return_inverse=True)
    columns, K = np.ascontiguousarray(codes.T, dtype=np.float64), len(classes)      # (N, n)
    order = columns.argsort(axis=1, kind="stable").astype(np.int32)  # (N, n); faster than int64
    rank = np.stack([np.unique(column, return_inverse=True)[1] for column in columns])
    rank = rank.astype(np.float32) if rank.max(1).min() < len(codes) - 1 else None  # no equal codes
    used, rng = np.zeros(len(columns)), np.random.default_rng(seed)  # used (N,): the gains so far

    def grow(r, order, depth):
        """The tree for some m samples; order (N, m) has them sorted by each of the codes."""
        if depth and order.shape[1] > 1:
            gain, code, c = best_split(r, order, columns, rank, rng)
            if gain > 0:
                used[code] += gain
                if depth == 1:
                    order = order[:1]                                # a leaf needs no sorting
                left = (columns[code] <= c).take(order)              # (N, m); rows stay sorted
                halves = [order.compress(side.ravel()).reshape(len(order), -1)
                          for side in (left, ~left)]                 # (N, m) -> (N, m_left), ...
                return (code, c, *(grow(r, half, depth - 1) for half in halves))
        r = r[order[0]]
        curve = (abs(r) * (1 - abs(r))).sum()
        return newton * r.sum() / curve if curve > 1e-150 else 0.0

    target = (label == np.arange(K)[:, None]).astype(np.float64)     # (K, n)
    start = np.log(target.mean(1))
    if K == 2:
        target, start = target[1:], start[1:] - start[:1]            # one row: log odds of class 1
    newton = rate * (1 if K == 2 else (K - 1) / K)
    scores, done = np.repeat(start[:, None], len(codes), axis=1), []
    for _ in range(rounds):
        residual = target - probabilities(scores)
        done.append([grow(r, order, depth) for r in residual])
        scores += [look_up(tree, columns) for tree in done[-1]]
    return Trees(classes, start, done, used / used.sum() if used.sum() > 0 else used)


def predict(trees, codes):
    """codes (n, N) -> the likeliest label of each sample (n,)."""
    columns = np.ascontiguousarray(codes.T)
    scores = np.repeat(trees.start[:, None], len(codes), axis=1)
    for forest in trees.rounds:
        scores += [look_up(tree, columns) for tree in forest]
    return trees.classes[scores.argmax(0) if len(scores) > 1 else (scores[0] > 0).astype(int)]


def probabilities(scores):
    """Sigmoid of a single row of scores (1, n), softmax over the rows of several."""
    if len(scores) == 1:
        return np.exp(-np.logaddexp(0, -scores))                     # 1 / (1 + e^-score)
    e = np.exp(scores - scores.max(0))
    return e / e.sum(0)


def look_up(tree, columns):
    """The step that a tree gives each of the samples, columns (N, n)."""
    if not isinstance(tree, tuple):
        return np.full(columns.shape[1], tree)
    code, c, low, high = tree
    return np.where(columns[code] <= c, look_up(low, columns), look_up(high, columns))


def best_split(r, order, columns, rank, rng):
    """The best question of a node: its gain (0: there is none), and code <= c. r (n,) residuals;
    order (N, m) the node's samples sorted by each code. All m - 1 cuts of all N codes are tried:
    the running sum of r is what lies left of a cut. In float32, twice as fast."""
    (N, m), n = order.shape, len(r)
    sums = r.astype(np.float32).take(order).cumsum(axis=1)           # (N, m)
    left_count = np.arange(1, m, dtype=np.float32)
    gain = gains(sums[:, :-1], left_count, sums[:, -1:], m)          # (N, m - 1)
    if rank is not None:                                             # equal codes cannot be parted
        here = rank.take(order + np.arange(0, N * n, n)[:, None])
        gain *= here[:, 1:] > here[:, :-1]
    at = gain.argmax(axis=1)                                         # (N,)
    # Equal codes gain equally and must share the importance: scikit-learn asks the codes in random
    # order; we add noise just above the rounding of float32.
    best = gain[np.arange(N), at] * (1 + 1e-6 * rng.random(N))
    code = best.argmax()
    below, above = columns[code, order[code, at[code]:at[code] + 2]]
    c = below / 2 + above / 2
    return best[code], code, c if c < above else below               # no float may lie in between


def gains(left_sum, left_count, total, count):
    """Gain of each cut from what lies left of it. With s of k samples there and S of n in all,
    k (n-k) / n (s/k - (S-s)/(n-k))^2  =  (S k/n - s)^2 n / (k (n-k)): in place, for speed."""
    gain = total * (left_count / count)
    gain -= left_sum
    gain *= gain
    gain *= count / (left_count * (count - left_count))
    return gain


# ---- python metrics.py ---------------------------------------------------------------------------
def worked_example():
    """The six numbers above, each step computed, and beside it what was found by hand."""
    codes, labels = np.arange(1.0, 7.0)[:, None], np.array([0, 0, 0, 1, 0, 1])
    trees = fit_trees(codes, labels, rounds=1, depth=1)
    ((_, c, *steps),), p = trees.rounds[0], probabilities(trees.start[None])[0]      # p (1,)
    r = labels - p
    gain = gains(r.cumsum()[:5], np.arange(1, 6), r.sum(), 6)
    after = probabilities((trees.start + np.where(codes[:, 0] <= c, *steps))[None])[0]
    label = predict(fit_trees(codes, labels), codes)
    print(f"{'':30}{'computed':44}by hand")
    for step, values, by_hand in (
            ("  code", codes[:, 0], "1 2 3 4 5 6"),
            ("  label", labels, "0 0 0 1 0 1"),
            ("1 p at the start", p.repeat(6), "1/3 1/3 1/3 1/3 1/3 1/3"),
            ("2 residual r = label - p", r, "-1/3 -1/3 -1/3 2/3 -1/3 2/3"),
            ("3 gain of a cut after 1 ... 5", gain, "2/15 1/3 2/3 1/12 8/15"),
            ("4 the best question: code <=", [c], "7/2"),
            ("5 step of left and right leaf", steps, "-3/20 3/20"),
            ("  p after this round", after, ".301 .301 .301 .367 .367 .367"),
            ("  label by 100 rounds, depth 3", label, "0 0 0 1 0 1")):
        print(f"{step:<30}" + "".join(f"{float(v):7.3g}" for v in values).ljust(44) + by_hand)


def report(path, *options):
    """Prints all scores of the arrays `codes` and `factors` of an .npz file."""
    try:
        with np.load(path) as table:
            codes, factors = table["codes"], table["factors"]
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception:  # a dozen kinds, whose words are for programmers or advise unsafe loading
        raise ValueError(f"{path} is damaged or lacks an array of numbers; expected an .npz by "
                         f"np.savez(path, codes=codes, factors=factors)") from None
    scores = evaluate(codes, factors, *options)
    importance, note = scores.pop("importance", ()), scores.pop("note")
    for name, value in scores.items():
        print(f"{name:<22}{round(value, 4)}")
    print("note:", note or "every score was computed")
    print("importance of each code (row) for each factor (column)")
    for code, row in enumerate(importance):
        print(f"{code:4d} " + "".join(f"{value:6.2f}" for value in row))


def main(arguments=None):
    """The command line: a table of scores, or without a file the worked example."""
    parser = argparse.ArgumentParser(description="Scores a table of codes, or explains the trees.")
    parser.add_argument("file", nargs="?", help=".npz of codes (n, N) or (n, N, d), factors (n, F)")
    parser.add_argument("--train", type=int, default=10_000, help="samples the trees learn from")
    parser.add_argument("--test", type=int, default=5_000, help="more samples, to test the trees")
    parser.add_argument("--seed", type=int, default=0, help="seed of votes, split and ties")
    parser.error = lambda message: parser.exit(2, f"metrics.py: {message}\n")   # without its usage
    options = parser.parse_args(arguments)
    try:
        if options.file is None:
            worked_example()
        else:
            report(options.file, options.seed, options.train, options.test)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head -1` has read enough; leave nothing to flush at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()

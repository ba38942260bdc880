"""How well do N codes separate F factors? FactorVAE score, DCI, MIG, TAD, and image distances.

WHERE     read after encdiff.py, before vq.py. Imports numpy and torch only: copy it freely.
PAPER     EncDiff, arXiv 2402.09712, Sec. 5 (evaluation setting); each score cites its own paper.
SHAPES    n samples, N codes, d width of a vector-valued code, F factors, K classes of one factor,
          codes (n, N) or (n, N, d), factors (n, F) integers, images (B, 3, H, W).
IDEA      Every factor score asks two things about the table "which code knows which factor":
          does each code know one factor only (disentanglement), and is each factor known by one
          code only (completeness)? The scores differ in how they fill the table.
            FactorVAE score  which code stands still while one factor is held fixed? Votes.
            DCI              which codes does a classifier use to read a factor? Trees.
            MIG              how many nats do a code and a factor share? A 2-d histogram.
          The thing to get wrong: FactorVAE and D do not punish a factor that is spread over
          several codes, C and MIG do. With 20 codes for 6 factors C stays well below D. "DCI" in
          the paper's tables is D. Never read one score alone.
DIFFERS   FactorVAE votes on a pool encoded once (see factor_vae_votes); DCI's train and test
          samples are disjoint. The trees are ours: see the section at the end. AUROC is exact where
          the public TAD script walks a grid of thresholds.
TRY       python metrics.py             the trees on six numbers, worked step by step
          python metrics.py codes.npz   all factor scores of your own `codes` and `factors`
"""
import argparse
import contextlib
import sys
import zipfile
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F


# ---- What comes in ------------------------------------------------------------------------------

def _numbers(array, name):
    """Any array or tensor as numpy, or a ValueError that names it."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.double() if array.is_floating_point() else array).numpy()
    array = np.asarray(array)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} has dtype {array.dtype}; expected numbers")
    return array


def check_codes(codes, name="codes"):
    """codes as float64 (n, N) or (n, N, d), all finite."""
    codes = _numbers(codes, name).astype(np.float64)
    if codes.ndim not in (2, 3) or codes.size == 0 or codes.shape[1] < 2:
        raise ValueError(f"{name} has shape {codes.shape}; expected (samples, codes) or (samples, "
                         f"codes, width) with at least 2 codes, since the scores compare codes")
    bad = np.argwhere(~np.isfinite(codes))
    if len(bad):
        place = tuple(bad[0])
        raise ValueError(f"{name}[{', '.join(map(str, place))}] is {codes[place]} ({len(bad)} such "
                         f"entries); expected finite numbers: drop these samples or mend the encoder")
    return codes


def check_factors(factors, samples, name="factors", need_classes=True):
    """factors as int64 (n, F), one row a code; every column has at least two values."""
    factors = _numbers(factors, name)
    if factors.ndim != 2 or factors.shape[1] < 1:
        raise ValueError(f"{name} has shape {factors.shape}; expected (samples, factors)")
    if len(factors) != samples:
        raise ValueError(f"{name} has {len(factors)} rows for {samples} codes; expected one row a code")
    bad = np.argwhere(factors != np.floor(factors)) if factors.dtype.kind == "f" else []
    if len(bad):
        row, column = bad[0]
        raise ValueError(f"{name}[{row}, {column}] is {factors[row, column]}; expected integers: "
                         f"number the values of a factor 0, 1, 2, ...")
    for column in range(factors.shape[1] if need_classes else 0):
        if (factors[:, column] == factors[0, column]).all():
            raise ValueError(f"{name}[:, {column}] is {factors[0, column]} in all {samples} samples; "
                             f"expected at least 2 values: drop that factor or take more samples")
    return factors.astype(np.int64)


def pca_tokens(codes, fit_on=None):
    """Vector-valued codes (n, N, d) -> (n, N): each token's first principal component.

    The factor scores want one number a code. `fit_on` (m, N, d) gives mean and direction (default:
    `codes` themselves). An eigenvector's sign is arbitrary; its largest entry is made positive so
    that two runs agree.
    """
    basis = codes if fit_on is None else fit_on
    if codes.ndim != 3 or basis.shape[1:] != codes.shape[1:]:
        raise ValueError(f"codes of shape {codes.shape} and a basis from {basis.shape}; "
                         f"expected both (samples, codes, width), alike but for the samples")
    mean = basis.mean(0)                                             # (N, d)
    centred = (basis - mean).transpose(1, 2, 0)                      # (m, N, d) -> (N, d, m)
    spread = centred @ centred.transpose(0, 2, 1)                    # (N, d, m) @ (N, m, d)
    axis = np.linalg.eigh(spread)[1][:, :, -1]                       # (N, d), largest eigenvalue
    largest = np.take_along_axis(axis, np.abs(axis).argmax(1)[:, None], 1)
    return np.einsum("nkd,kd->nk", codes - mean, axis * np.sign(largest))  # (n, N, d) -> (n, N)


def scalar_codes(codes, name="codes"):
    """codes checked, and vector-valued ones reduced: always (n, N)."""
    codes = check_codes(codes, name)
    return pca_tokens(codes) if codes.ndim == 3 else codes


def evaluate(codes, factors, seed=0, dci_train=10_000, dci_test=5_000):
    """All factor scores of one table of codes, as a dict that json.dump accepts.

    codes (n, N) or (n, N, d), factors (n, F); n >= dci_train + dci_test. FactorVAE and MIG use all n.
    """
    codes = scalar_codes(codes)
    factors = check_factors(factors, len(codes))
    if len(codes) < dci_train + dci_test:
        raise ValueError(f"codes has {len(codes)} rows; expected at least {dci_train} + {dci_test} "
                         f"for DCI: encode more samples or ask for fewer (dci_train, dci_test)")
    order = np.random.default_rng(seed).permutation(len(codes))
    train, test = order[:dci_train], order[dci_train:dci_train + dci_test]
    votes = factor_vae_votes(codes, factors, seed=seed)
    trees = dci(codes[train], factors[train], codes[test], factors[test], seed=seed)
    return {
        "factor_vae": votes["score"], "factor_vae_train": votes["train_score"],
        "active_dims": votes["active_dims"], "factor_vae_note": votes["note"],
        **{name: trees[name] for name in ("disentanglement", "completeness",
                                          "informativeness_train", "informativeness_test")},
        "mig": mig(codes, factors), "importance": trees["importance"].tolist(),
        "samples": len(codes), "dci_train": dci_train, "dci_test": dci_test, "seed": seed,
    }


# ---- DCI ----------------------------------------------------------------------------------------

def dci(train_codes, train_factors, test_codes, test_factors, seed=0):
    """Disentanglement, completeness, informativeness (Eastwood & Williams, ICLR 2018).

    One boosted-tree classifier a factor learns to read the factor from the codes; R[i, j] is how much
    the classifier of factor j used code i. Range 0 to 1. One code a factor: D = C = 1. Codes that
    know nothing: R is flat but for chance, D and C near 0. Two equal factors in one code: D = 1 - log 2/log F.
    Informativeness is the accuracy, averaged over factors: chance is mean(1/K).
    """
    train_codes, test_codes = check_codes(train_codes, "train_codes"), check_codes(test_codes, "test_codes")
    if train_codes.shape[1:] != test_codes.shape[1:]:
        raise ValueError(f"train_codes has shape {train_codes.shape}, test_codes {test_codes.shape}; "
                         f"expected the same codes in both")
    if train_codes.ndim == 3:
        train_codes, test_codes = (pca_tokens(train_codes),
                                   pca_tokens(test_codes, fit_on=train_codes))
    train_factors = check_factors(train_factors, len(train_codes), "train_factors")
    test_factors = check_factors(test_factors, len(test_codes), "test_factors", need_classes=False)
    if train_factors.shape[1] != test_factors.shape[1] or train_factors.shape[1] < 2:
        raise ValueError(f"train_factors has {train_factors.shape[1]} columns, test_factors "
                         f"{test_factors.shape[1]}; expected the same number, at least 2")
    columns, train_right, test_right = [], [], []
    for train_labels, test_labels in zip(train_factors.T, test_factors.T):
        trees = fit_trees(train_codes, train_labels, seed=seed)
        columns.append(trees.importance)
        train_right.append((predict(trees, train_codes) == train_labels).mean())
        test_right.append((predict(trees, test_codes) == test_labels).mean())
    importance = np.stack(columns, axis=1)                           # F columns (N,) -> (N, F)
    return {"disentanglement": focus(importance), "completeness": focus(importance.T),
            "informativeness_train": float(np.mean(train_right)),
            "informativeness_test": float(np.mean(test_right)), "importance": importance}


def focus(importance):
    """How much each row of (rows, columns) keeps to one column; rows weighted by their share.

    1 - entropy of the row, in units of the largest entropy possible (log of the number of columns).
    Rows are codes for disentanglement; for completeness pass the transpose.
    """
    share = importance + 1e-11          # as in disentanglement_lib: an unused code becomes uniform, 0
    share = share / share.sum(1, keepdims=True)
    score = 1 + (share * np.log(share)).sum(1) / np.log(importance.shape[1])      # (rows,)
    weight = importance.sum(1) if importance.sum() > 0 else np.ones(len(importance))
    return float((score * weight).sum() / weight.sum())


# ---- FactorVAE score ----------------------------------------------------------------------------

def factor_vae_score(represent, dataset, pool=50_000, images_at_once=256, seed=0, **votes):
    """The FactorVAE score of an encoder on a dataset with known factors: see factor_vae_votes.

    represent maps uint8 images (B, 3, H, W) to codes (B, N) or (B, N, d), and is the encoder in eval
    mode: BatchNorm statistics of a batch with one factor held fixed would leak that factor.
    `votes` are passed on to factor_vae_votes.
    """
    if not dataset.factor_names:
        raise ValueError("dataset has no factors; expected one with labels, such as Shapes3D")
    size = min(pool, len(dataset))
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:size]
    codes = []
    with torch.no_grad():
        for indices in np.split(chosen, range(images_at_once, size, images_at_once)):
            codes.append(_numbers(represent(dataset.images(indices)), "represent(images)"))
    return factor_vae_votes(np.concatenate(codes), dataset.factors(chosen), seed=seed, **votes)


def factor_vae_votes(codes, factors, train_votes=10_000, eval_votes=5_000, batch=64,
                     threshold=0.05, seed=0):
    """FactorVAE score (Kim & Mnih, ICML 2018) of a table of codes (n, N) and factors (n, F).

    A vote: hold one factor fixed, let the others vary, and see which code varies least (relative to
    its spread over everything). A code belongs to the factor it got most training votes for; the
    score is the share of fresh votes that go where they belong. Range 0 to 1; a perfect code scores
    1; codes that know nothing about 1/F.

    Why voting from a table changes nothing: the original encodes 64 fresh images a vote, 960,000 in
    all, each with the fixed value and the other factors drawn at random. The rows of a random table
    that carry that value ARE such images, so drawing 64 of them is drawing 64 times from the same
    distribution; only the supply is finite, and for an encoder a code is a function of its image. So
    the table must hold enough rows of every value: fewer than `batch` is refused.
    """
    codes = scalar_codes(codes)
    factors = check_factors(factors, len(codes))
    std = codes.std(0, ddof=1)                                       # (N,)
    # A dead code has almost no variance, in a batch or elsewhere; the ratio of two rounding errors
    # could win every vote. 0.05 is absolute: codes of a tiny scale need rescaling first.
    active = std >= threshold
    result = {"score": 0.0, "train_score": 0.0, "active_dims": int(active.sum()), "note": ""}
    if not active.any():
        return result | {"note": f"no code is active: the largest std is {std.max():.3g}, below {threshold}"}
    scaled = codes[:, active] / std[active]                          # (n, N) -> (n, active)
    rng = np.random.default_rng(seed)
    groups = _rows_by_value(factors, batch)
    train = _vote(scaled, groups, train_votes, batch, rng)           # (F, active)
    fresh = _vote(scaled, groups, eval_votes, batch, rng)            # (F, active)
    owner = train.argmax(0), np.arange(train.shape[1])               # each code's factor
    return result | {"score": float(fresh[owner].sum() / eval_votes),
                     "train_score": float(train[owner].sum() / train_votes)}


def _rows_by_value(factors, batch):
    """For each factor, where the rows of each value are: (rows sorted by value, start, count)."""
    groups = []
    for column, values in enumerate(factors.T):
        _, of_row, count = np.unique(values, return_inverse=True, return_counts=True)
        if count.min() < batch:
            value = np.unique(values)[count.argmin()]
            raise ValueError(f"factors[:, {column}] has the value {value} in {count.min()} samples; expected "
                             f"at least {batch} for a vote: use more samples or a smaller batch")
        start = np.cumsum(count) - count
        groups.append((np.argsort(of_row, kind="stable"), start[of_row], count[of_row]))
    return groups


def _vote(scaled, groups, votes, batch, rng):
    """Count votes (F, codes): with factor f held fixed, how often did code i vary least?"""
    samples, codes = scaled.shape
    table = np.zeros((len(groups), codes), dtype=np.int64)
    share = np.bincount(rng.integers(len(groups), size=votes), minlength=len(groups))
    for factor, (rows, start, count) in enumerate(groups):
        # A random row gives the value to hold, so frequent values are held more often, as in the data.
        for held in np.array_split(rng.integers(samples, size=share[factor]), 1 + share[factor] // 500):
            pick = rng.random((len(held), batch)) * count[held, None]          # (votes, batch)
            members = rows[start[held, None] + pick.astype(np.int64)]
            spread = scaled[members].var(axis=1, ddof=1)             # (votes, batch, codes) -> (votes, codes)
            table[factor] += np.bincount(spread.argmin(1), minlength=codes)
    return table


# ---- MIG and TAD --------------------------------------------------------------------------------

def mig(codes, factors, bins=20):
    """Mutual information gap (Chen et al., NeurIPS 2018): best minus second-best code of a factor.

    I(code; factor) from a 2-d histogram, `bins` equal-width bins a code, over the factor's entropy,
    averaged over factors. Range 0 to 1; one code a factor scores 1, random codes about 0, and a
    factor known equally by two codes 0, which is harsh on 20 codes for 6 factors.
    """
    codes = scalar_codes(codes)
    factors = check_factors(factors, len(codes))
    low, width = codes.min(0), np.ptp(codes, axis=0)
    width[width == 0] = 1                                            # a constant code: one bin
    binned = np.minimum((codes - low) / width * bins, bins - 1).astype(np.int64)   # (n, N)
    gaps = []
    for values in factors.T:
        classes, label = np.unique(values, return_inverse=True)
        K = len(classes)
        joint = np.stack([np.bincount(column * K + label, minlength=bins * K).reshape(bins, K)
                          for column in binned.T]) / len(codes)      # (N, bins, K)
        p_factor = joint[0].sum(0)                                   # (K,)
        apart = joint.sum(2, keepdims=True) * p_factor               # (N, bins, K) if independent
        known = (joint * np.log(np.where(joint > 0, joint, 1) / np.where(apart > 0, apart, 1))).sum((1, 2))
        second, best = np.sort(known)[-2:]
        gaps.append((best - second) / -(p_factor * np.log(p_factor)).sum())
    return float(np.mean(gaps))


def auroc(codes, attributes):
    """(N, A): chance that a positive sample has the larger code than a negative one, or the smaller.

    Exact, from ranks (the Mann-Whitney U statistic), ties counting half; a detector may be turned
    round, so every entry is max(a, 1 - a) >= 0.5.
    """
    ranks = np.empty_like(codes)
    for column, values in enumerate(codes.T):
        _, of_row, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks[:, column] = (np.cumsum(count) - (count - 1) / 2)[of_row]        # equal values: mean rank
    positive = attributes.sum(0)                                     # (A,)
    wins = ranks.T @ attributes - positive * (positive + 1) / 2      # (N, n) @ (n, A)
    area = wins / (positive * (len(codes) - positive))
    return np.maximum(area, 1 - area)


def tad(codes, attributes, captured=0.75, overlap=0.2):
    """Total AUROC difference (Yeats et al., NashAE, ECCV 2022), for CelebA's yes/no attributes.

    An attribute counts if some code detects it (AUROC >= captured) and no other attribute explains
    more than `overlap` of its entropy. TAD is the sum, over these, of best minus second-best AUROC.
    Range 0 to half the number of attributes; random codes 0; a perfect code 0.5 an attribute that counts.
    """
    codes = scalar_codes(codes)
    yes = check_factors(attributes, len(codes), "attributes")
    if not (np.isin(yes, (0, 1)).all() or np.isin(yes, (-1, 1)).all()):
        raise ValueError(f"attributes has values {np.unique(yes)[:5]}; expected 0 and 1, or -1 and 1")
    yes = (yes > 0).astype(np.float64)                               # (n, A)
    area = auroc(codes, yes)                                         # (N, A)
    shared = 0                                                       # (A, A) mutual information
    for a in (yes, 1 - yes):
        for b in (yes, 1 - yes):
            joint, apart = a.T @ b / len(yes), np.outer(a.mean(0), b.mean(0))      # (A, A)
            shared = shared + joint * np.log(np.where(joint > 0, joint, apart) / apart)
    entropy = np.diag(shared)                                        # I(a; a) = H(a)
    explained = (shared * (1 - np.eye(len(shared)))).max(1) / entropy
    second, best = np.sort(area, axis=0)[-2:]                        # (A,) each
    counts = (best >= captured) & (explained <= overlap)
    return {"tad": float((best - second)[counts].sum()), "captured": int(counts.sum()),
            "counted": np.flatnonzero(counts).tolist(), "auroc": area}


# ---- Distances between images -------------------------------------------------------------------

def check_pair(x, y):
    """Two float batches (B, C, H, W) in [0, 1], of one shape."""
    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(f"images of shape {tuple(x.shape)} and {tuple(y.shape)}; expected one shape (B, C, H, W)")
    for name, images in (("x", x), ("y", y)):
        if not (images.is_floating_point() and images.min() >= 0 and images.max() <= 1):
            raise ValueError(f"{name} is {images.dtype} in [{images.min():.4g}, {images.max():.4g}]; expected floats "
                             f"in [0, 1]: images / 255, or (images + 1) / 2 and clamp")


def mse(x, y):
    """Mean squared error an image (B,), on [0, 1]. Identical images 0; noise against noise 1/6."""
    check_pair(x, y)
    return (x - y).square().mean((1, 2, 3))


def ssim(x, y):
    """Structural similarity an image (B,) (Wang et al., 2004): luminance, contrast and structure agree?

    11 x 11 Gaussian window of sigma 1.5, on [0, 1]. Range -1 to 1; identical images 1, unrelated
    noise about 0. Zeros are padded at the border, as in the code behind Diff-AE's numbers, with
    which the paper compares; Wang et al. use only windows that fit into the image.
    """
    check_pair(x, y)
    bell = torch.exp(-torch.arange(-5, 6, dtype=x.dtype, device=x.device) ** 2 / (2 * 1.5 ** 2))
    window = torch.outer(bell, bell) / bell.sum() ** 2               # (11, 11), sums to 1
    channels = x.shape[1]

    def blur(image):
        return F.conv2d(image, window.expand(channels, 1, 11, 11), padding=5, groups=channels)

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01 ** 2, 0.03 ** 2           # keep the ratio finite where the image is flat or black
    value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return value.mean((1, 2, 3))


# AlexNet's five convolutions: index in torchvision's `features`, stride, padding, and max-pool before.
ALEXNET = ((0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False))


def load_lpips(alexnet_file, linear_file):
    """The two weight files of LPIPS, which cannot be shipped, as one dict of tensors for `lpips`.

    alexnet_file: torchvision's AlexNet (alexnet-owt-7be5be79.pth). linear_file: weights/v0.1/alex.pth
    of the `lpips` package. Tensors only: nothing in the files is executed.
    """
    weights = {}
    for path, keys in (
            (alexnet_file, [f"features.{i}.{part}" for i, *_ in ALEXNET for part in ("weight", "bias")]),
            (linear_file, [f"lin{level}.model.1.weight" for level in range(len(ALEXNET))])):
        stored = torch.load(path, map_location="cpu", weights_only=True)
        missing = [key for key in keys if key not in stored]
        if missing:
            raise ValueError(f"{path} has no {missing[0]}; expected alexnet_file, linear_file in this order")
        weights |= {key: stored[key].float() for key in keys}
    return weights


def lpips(x, y, weights):
    """Learned perceptual distance an image (B,) (Zhang et al., CVPR 2018), images in [0, 1].

    AlexNet's features after each ReLU, scaled to unit length at each pixel; squared differences,
    weighted a channel by what matched human judgements, averaged over pixels and summed over layers.
    0 for identical images; unrelated photographs are around 0.7. At least 32 x 32 pixels.
    """
    check_pair(x, y)
    shift, scale = (x.new_tensor(v).view(3, 1, 1) for v in ((-.030, -.088, -.188), (.458, .448, .450)))
    both = (2 * torch.cat([x, y]) - 1 - shift) / scale               # (2B, 3, H, W)
    total = 0
    for level, (index, stride, padding, pool) in enumerate(ALEXNET):
        kernel, bias = (weights[f"features.{index}.{part}"].to(x) for part in ("weight", "bias"))
        both = F.max_pool2d(both, 3, 2) if pool else both
        both = F.relu(F.conv2d(both, kernel, bias, stride, padding))
        unit = both / (both.square().sum(1, keepdim=True).sqrt() + 1e-10)
        a, b = unit.chunk(2)                                         # (2B, c, h, w) -> (B, c, h, w) twice
        total = total + F.conv2d((a - b).square(), weights[f"lin{level}.model.1.weight"].to(x)).mean((1, 2, 3))
    return total


def frechet_distance(feats_a, feats_b):
    """Frechet distance of two sets of features (n, D), (m, D) taken as Gaussians (Heusel et al., 2017).

    |mean difference|^2 + trace(A + B - 2 (A B)^(1/2)). 0 for equal sets; no upper end. It is biased
    upwards for few samples: compare only figures made from the same number.
    """
    sets = []
    for name, feats in (("feats_a", feats_a), ("feats_b", feats_b)):
        feats = torch.from_numpy(_numbers(feats, name).astype(np.float64))
        if feats.ndim != 2 or len(feats) < 2 or not feats.isfinite().all():
            raise ValueError(f"{name} has shape {tuple(feats.shape)}; expected finite (samples, features), 2 samples or more")
        sets.append((feats.mean(0), feats.T.cov()))                  # (D,), (D, D)
    (mean_a, cov_a), (mean_b, cov_b) = sets
    # A B is not symmetric, but has the eigenvalues of the symmetric A^(1/2) B A^(1/2), and the trace
    # of a square root is the sum of their roots: no general matrix square root is needed.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def inception_features(images, inception_file, batch=64):
    """uint8 images (n, 3, H, W) -> (n, 2048) by the TorchScript network StyleGAN's metrics use.

    inception_file: NVIDIA's inception-2015-12-05.pt, which resizes and scales by itself. A
    TorchScript file is a program: run only one you trust.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images of dtype {images.dtype} and shape {tuple(images.shape)}; expected uint8 (n, 3, H, W)")
    network = torch.jit.load(inception_file, map_location=images.device).eval()
    with torch.no_grad():
        return torch.cat([network(part, return_features=True).float() for part in images.split(batch)])


def fid(images_a, images_b, inception_file):
    """FID (Heusel et al., NeurIPS 2017) of two uint8 sets; the paper uses 10,000 images a side."""
    return frechet_distance(*(inception_features(images, inception_file) for images in (images_a, images_b)))


# =================================================================================================
# The trees behind DCI: gradient boosting, written out
# =================================================================================================
#
# A SPLIT asks one question of one code, "is it <= c?", and so cuts a set of n samples in two. Each
# sample carries a number r, and a good split leaves numbers that are alike on either side:
#     gain = (nl nr / n) (mean_l - mean_r)^2
# which is exactly how much the sum of squared distances to the mean shrinks. Six numbers, where
# code = 1 2 3 4 5 6 and r = -1/3 -1/3 -1/3 2/3 -1/3 2/3: the cut after 3 has means -1/3 and 1/3 and the
# gain 3*3/6 (2/3)^2 = 2/3, and no other cut has more. `python metrics.py` prints all five.
#
# A TREE splits, then splits both halves, then the four quarters: depth 3, at most 8 leaves. Each leaf
# answers with one number.
#
# BOOSTING adds many small trees, each correcting the sum of those before. For K classes a sample has K
# scores; softmax turns them into probabilities p. The residual r = [is it this class?] - p says in
# which direction each score should move, and a round fits one tree a class to it. A leaf answers
# with the Newton step (K-1)/K sum r / sum |r|(1-|r|), of which we take a tenth: small steps, so that
# later trees can mend the mistakes. The scores start from the class frequencies. Two classes need one
# tree a round, with a sigmoid for the softmax and no (K-1)/K.
#
# IMPORTANCE of a code: the gains of all the splits on it, over all trees, divided so that the codes
# of a factor sum to 1. The first rounds have the largest residuals and so the largest say.
#
# THE SAME as scikit-learn's GradientBoostingClassifier with its defaults: 100 rounds, rate 0.1, depth
# 3, at least 2 samples to split and 1 in a leaf, all samples and all codes for every tree, its
# friedman_mse criterion (the gain above), ties between codes broken at random, thresholds midway.
#
# NOT the same: of 10,000 different values it tries 9,999 cuts for each code, node and tree. We look
# twice, coarse to fine: every 39th cut first, by histogram; then every single cut near the best of
# these and at both ends of the node, where a cut can set one odd sample apart (a search without the
# ends fits better and spreads importance over more codes than scikit-learn's). What is left out is
# rarely the best. Sums are in float32, and no two different values count as equal.
#
# COST: one round of all trees is a few dozen passes over arrays of 5,000 cuts x nodes; the histograms of all
# nodes of all classes come from one call of torch's embedding_bag, which sums rows of a table.


class Sorted(NamedTuple):
    """The training codes in order. P = n + a few places of padding, so that a window may run over."""
    rows: torch.Tensor            # (N, P) sample numbers by increasing code; the padding is n
    final: torch.Tensor           # (N, P) may a cut follow this place? (the next value differs)
    edges: torch.Tensor           # (N, E) coarse cuts, as the number of samples on their left: 0 .. n
    width: int                    # window of the fine search: samples in the fullest bin it can refine


class Trees(NamedTuple):
    classes: np.ndarray           # (K,) the labels
    scale: list                   # for each code: points midway between its values, samples up to each value
    start: torch.Tensor           # (T,) scores before the first round; T trees a round: K, or 1 if K = 2
    rounds: list                  # for each round: its levels [(code, cut) of each node], its leaf values
    importance: np.ndarray        # (N,) sums to 1, or all 0 if no code could be split


@contextlib.contextmanager
def one_thread():
    """A step below lasts 0.1 ms: two threads gain little, and wait for each other if a core is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def sort_codes(codes, bins=256):
    """Training codes (n, N) -> their scale and their order. A bin holds about n / bins samples."""
    n, scale, edges, width = len(codes), [], [], 1
    for column in codes.T:
        values, count = np.unique(column, return_counts=True)
        upto = np.cumsum(count)                                      # samples up to each value
        middle = values[:-1] / 2 + values[1:] / 2
        scale.append((np.where(middle < values[1:], middle, values[:-1]), upto))   # neighbouring floats
        stops = upto
        if len(values) > bins:
            # Equal counts; but a value that fills a bin gets its own, as there is nothing to refine.
            heavy = count > n / bins
            goals = np.searchsorted(upto, np.arange(1, bins + 1) * n / bins)
            stops = np.unique(np.concatenate([upto[goals], upto[heavy], (upto - count)[heavy]]))
        stops = np.union1d(0, stops)
        mixed = np.diff(np.searchsorted(upto, stops, side="right")) > 1
        width = max(width, np.diff(stops)[mixed].max(initial=1))
        edges.append(stops)
    most = max(len(stops) for stops in edges)
    edges = np.stack([np.pad(stops, (0, most - len(stops)), constant_values=n) for stops in edges])
    columns = np.ascontiguousarray(codes.T)                          # (n, N) -> (N, n)
    order = np.argsort(columns, axis=1, kind="stable")
    ordered = np.take_along_axis(columns, order, axis=1)
    final = np.pad(ordered[:, 1:] != ordered[:, :-1], ((0, 0), (0, width + 1)))
    rows = np.pad(order, ((0, 0), (0, width)), constant_values=n)
    return scale, Sorted(*map(torch.from_numpy, (rows, final, edges)), int(width))


def to_ranks(codes, scale):
    """codes (n, N) -> ranks (n, N): a training sample's rank is the number of samples <= it.

    "code <= point midway after the first c samples" is then "rank <= c", for new samples as well.
    """
    return torch.from_numpy(np.stack([upto[np.searchsorted(middle, column)]
                                      for (middle, upto), column in zip(scale, codes.T)], axis=1))


def gains(left_sum, left_count, total, count):
    """Gain of each cut from what lies left of it; -1 where a side would be empty.

    With s, k left of the cut and S, n in all:
    k (n-k) / n (s/k - (S-s)/(n-k))^2  =  (s n - S k)^2 / (n k (n-k))
    """
    below = count * left_count * (count - left_count)
    return torch.where(below > 0, (left_sum * count - total * left_count).square() / below, -1.0)


def best_splits(table, order, generator):
    """The best cut of each of C nodes: (gain, code, cut), each (C,); gain -1 if there is no cut.

    table (n + 1, 2C) has a row a sample: in column c its residual if it is in node c, in column C + c
    a 1 to count it, 0 elsewhere. The last row, all 0, stands for the padding.
    """
    rows, final, edges, width = order
    (N, P), E, C = rows.shape, edges.shape[1], table.shape[1] // 2
    code, node = torch.arange(N)[:, None], torch.arange(C)
    # Coarse: bag b sums the rows between edges b-1 and b; the running sum is what lies left of edge b.
    starts = F.pad(edges[:, :-1], (1, 0)) + P * code                 # (N, E)
    bags = F.embedding_bag(rows.flatten(), table, starts.flatten(), mode="sum")    # (N * E, 2C)
    left_sum, left_count = bags.view(N, E, 2, C).cumsum(1).unbind(2)               # (N, E, C) each
    total, count = left_sum[0, -1], left_count[0, -1]                # (C,)
    gain, edge = gains(left_sum, left_count, total, count).max(1)    # (N, C)
    # Fine: windows from the edge before the best and from the best, and over both ends of the node.
    first = (left_count == 0).sum(1) - 1                             # (N, C)
    last = (left_count < count).sum(1) - 1
    window = torch.stack([(edge - 1).clamp(min=0), edge, first, last]).clamp(min=0)
    place = edges[code, window] + torch.arange(width).view(-1, 1, 1, 1)            # (width, 4, N, C)
    entry = rows.flatten()[place + P * code] * (2 * C) + node
    fine_sum = left_sum[code, window, node] + table.take(entry).cumsum(0)
    fine_count = left_count[code, window, node] + table.take(entry + C).cumsum(0)
    fine = torch.where(final.flatten()[place + P * code], gains(fine_sum, fine_count, total, count), -1.0)
    fine_gain, at = fine.view(-1, N, C).max(0)                       # (width * 4, N, C) -> (N, C)
    fine_cut = 1 + place.view(-1, N, C).gather(0, at[None])[0]       # samples left of it
    cut = torch.where(fine_gain > gain, fine_cut, edges.gather(1, edge))
    # Equal codes have equal gains. A first-come rule would give one of them all the importance;
    # scikit-learn looks at the codes in random order. So a millionth of noise, above float32's rounding.
    noise = 1 + 1e-6 * torch.rand(N, C, generator=generator)
    gain, code = (torch.maximum(gain, fine_gain) * noise).max(0)     # (N, C) -> (C,)
    return gain, code, cut.gather(0, code[None])[0]


def descend(ranks, at, code, cut):
    """One level down. at (n, T): each sample's node in each tree, numbered 0 .. T*nodes - 1 at this level."""
    asked, limit = (one.index_select(0, at.flatten()).view(at.shape) for one in (code, cut))
    return 2 * at + (ranks.gather(1, asked) > limit)        # node i has children 2i (<=) and 2i + 1 (>)


def grow(residual, ranks, order, generator, depth):
    """One tree for each column of residual (n, T), all at once, level by level.

    returns levels [(code, cut), ...], leaf of each sample (n, T), gain of each code (N,)
    """
    n, T = residual.shape
    at, levels = torch.arange(T).expand(n, T), []
    used = torch.zeros(ranks.shape[1], dtype=torch.float64)
    for level in range(depth):
        C = T * 2 ** level                                           # nodes at this level, all trees
        table = torch.zeros(n + 1, 2 * C)
        table[:n].scatter_(1, at, residual).scatter_(1, C + at, 1.0)
        gain, code, cut = best_splits(table, order, generator)
        cut = torch.where(gain < 0, n, cut)                          # no cut: all go left
        used.index_add_(0, code, gain.clamp(min=0).double())
        at = descend(ranks, at, code, cut)
        levels.append((code, cut))
    return levels, at, used


def fit_trees(codes, labels, rounds=100, rate=0.1, depth=3, seed=0):
    """Boosted trees that read labels (n,) from codes (n, N)."""
    classes, label = np.unique(labels, return_inverse=True)
    n, K = len(codes), len(classes)
    scale, order = sort_codes(codes)
    ranks = to_ranks(codes, scale)                                   # (n, N)
    target = F.one_hot(torch.from_numpy(label), K).double()          # (n, K)
    start = target.mean(0).log()
    if K == 2:
        target, start = target[:, 1:], start[1:] - start[:1]         # one column: log odds
    T = len(start)
    scores, done, used = start.expand(n, T), [], 0
    generator = torch.Generator().manual_seed(seed)
    with one_thread():
        for _ in range(rounds):
            residual = target - (scores.sigmoid() if K == 2 else scores.softmax(1))
            levels, leaf, gain = grow(residual.float(), ranks, order, generator, depth)
            # Newton step: slope over curvature of the log-likelihood; p (1 - p) = |r| (1 - |r|).
            leaf, r = leaf.flatten(), residual.flatten()
            slope = torch.bincount(leaf, r, minlength=T * 2 ** depth)
            curve = torch.bincount(leaf, r.abs() * (1 - r.abs()), minlength=T * 2 ** depth)
            step = torch.where(curve > 1e-150, slope / curve, 0.0) * (1 if K == 2 else (K - 1) / K)
            scores = scores + rate * step.index_select(0, leaf).view(n, T)
            done.append((levels, rate * step))
            used = used + gain
    importance = used / used.sum() if used.sum() > 0 else used
    return Trees(classes, scale, start, done, importance.numpy())


def predict(trees, codes):
    """codes (n, N) -> the likeliest label of each sample (n,)."""
    ranks = to_ranks(codes, trees.scale)
    T = len(trees.start)
    scores = trees.start.expand(len(codes), T)
    with one_thread():
        for levels, value in trees.rounds:
            at = torch.arange(T).expand(len(codes), T)
            for code, cut in levels:
                at = descend(ranks, at, code, cut)
            scores = scores + value.index_select(0, at.flatten()).view(at.shape)
    return trees.classes[(scores[:, 0] > 0).long() if T == 1 else scores.argmax(1)]

"""How well do N codes separate F factors? FactorVAE score, DCI, MIG, InfoMEC, and image distances.

WHERE     Read after vq.py, before data.py. Imports numpy and torch only: copy it freely.
PAPER     EncDiff, arXiv 2402.09712v2, experimental setup. Each score names its own paper.
SHAPES    n samples, N codes, d width of a vector-valued code, F factors, K values of one factor;
          codes (n, N), or (n, N, d), of which each is first projected on its main axis (PCA);
          factors (n, F) labels of any kind; images (B, 3, H, W).
IDEA      Every score first finds out which code knows which factor. Then it asks two questions.
          Does each code know one factor only (disentanglement, modularity)? Is each factor known
          by one code only (completeness, compactness)? They differ in how they find out:
            DCI               which codes does a classifier use to read a factor? Boosted trees.
            FactorVAE score   which code stands still while one factor is held fixed? Votes.
            MIG, InfoMEC      how much do a code and a factor tell of each other? Information.
          D of DCI and the FactorVAE score allow that several codes share a factor. C and MIG do
          not: with 20 codes for 6 factors they are usually below D. The paper's "DCI" is D.
          `agreement` needs no factors: it ranks several runs by how far their codes are the same.
DIFFERS   From disentanglement_lib 1.5: FactorVAE votes are drawn from images encoded once; a code
          is dead if its std is tiny beside those of the others, as codes have no unit; DCI never
          tests on its training samples; the trees are ours. assets/compare_scores.py compares.
          From the public TAD script: the area under the ROC curve is exact, not summed over a grid
          of thresholds.
TRY       python metrics.py              the trees, worked step by step on six numbers
          python metrics.py codes.npz    all factor scores of your own `codes` and `factors`
"""
import argparse
import collections
import os
import sys
import warnings

import numpy as np
import torch
import torch.nn.functional as functional


# ---- All scores at once --------------------------------------------------------------------------
def evaluate(codes, factors, seed=0, dci_train=10_000, dci_test=5_000):
    """All factor scores of a table of codes, as a dict that json.dump accepts.

    codes      (n, N), or (n, N, d) of vector-valued codes; finite numbers in any unit
    factors    (n, F) labels: numbers, names, booleans
    seed       of the votes, of the split and of ties between codes; 0 or more
    dci_train  samples that DCI's trees learn from
    dci_test   other samples, on which the trees are tested. If there are too few samples for both,
               the trees learn from two thirds and are tested on the rest.

    Three entries are tables (N, F), lists of lists: "importance", DCI's, "nmi", InfoMEC's, and
    "variance_explained". DCI uses the samples above, InfoMEC at most INFOMEC_SAMPLES, the others
    all. A score that cannot be computed is absent. "note" says in one line why, and which codes and
    factors were left out. ValueError: the two tables do not belong together, or hold NaN.
    """
    codes, factors = check_tables(codes, factors)
    seed, dci_train, dci_test = int(seed), int(dci_train), int(dci_test)
    if seed < 0:
        raise ValueError(f"seed is {seed}; expected 0 or more")
    if min(dci_train, dci_test) < 1:
        raise ValueError(f"DCI on {dci_train} + {dci_test} samples; expected 1 or more of each")

    n = len(codes)
    if n < dci_train + dci_test:
        dci_train = n * 2 // 3
        dci_test = n - dci_train
    order = np.random.default_rng(seed).permutation(n)
    train = order[:dci_train]
    test = order[dci_train:dci_train + dci_test]
    sample = order[:INFOMEC_SAMPLES]

    tables = (codes[train], factors[train], codes[test], factors[test])
    results = [
        attempt("FactorVAE score", factor_vae_votes, codes, factors, seed=seed),
        attempt("DCI", dci, *tables, seed=seed),
        attempt("MIG", mig, codes, factors),
        attempt("InfoMEC", infomec, codes[sample], factors[sample]),
        attempt("variance explained", variance_explained, codes, factors)]

    live = live_codes(codes)
    scores = {
        "active_dims": int(live.sum()),
        "samples": n,
        "dci_train": dci_train,
        "dci_test": dci_test,
        "seed": seed}
    notes = []
    for result in results:
        notes += result.pop("note", "").split("; ")
        scores.update(result)

    for name in ("importance", "nmi", "variance_explained"):
        if name in scores:
            scores[name] = scores[name].tolist()
    said_once = [note for note in dict.fromkeys(notes) if note]
    scores["note"] = "; ".join(said_once)
    return scores


# ---- DCI -----------------------------------------------------------------------------------------
def dci(train_codes, train_factors, test_codes, test_factors, seed=0):
    """Disentanglement, completeness, informativeness (Eastwood & Williams, ICLR 2018), as a dict.

    train_codes    (n, N) or (n, N, d): boosted trees learn to read each factor from them
    train_factors  (n, F) labels
    test_codes     (m, N) or (m, N, d), other samples
    test_factors   (m, F) labels
    seed           of ties between codes that are equally good

    "importance" (N, F): how much the trees of factor j used code i; each column sums to 1, or to 0
    if the factor was left out.
    "disentanglement" and "completeness", 0 to 1: 1 if each factor has one code of its own, about 0
    if the codes know nothing. "informativeness_train" and "informativeness_test": the share of
    labels that are read correctly, averaged over factors. "note" names the factors that were left
    out.
    ValueError: no factor can be learnt, or the tables do not belong together.
    """
    fit_on = train_codes  # test codes (m, N, d) are projected on the axes of the training codes
    train_codes, train_factors = check_tables(train_codes, train_factors, "train_")
    test_codes, test_factors = check_tables(test_codes, test_factors, "test_", fit_on)
    usable, notes = learnable_factors(train_factors, test_factors)
    warn_if_slow(train_codes, train_factors[:, usable])

    N = train_codes.shape[1]
    F = train_factors.shape[1]
    importance = np.zeros((N, F))
    right_train = []
    right_test = []
    for j in usable:
        trees = fit_trees(train_codes, train_factors[:, j], seed=seed)
        importance[:, j] = trees.importance
        right = predict(trees, train_codes) == train_factors[:, j]
        right_train.append(right.mean())
        right = predict(trees, test_codes) == test_factors[:, j]
        right_test.append(right.mean())
    scores = {
        "importance": importance,
        "informativeness_train": float(np.mean(right_train)),
        "informativeness_test": float(np.mean(right_test))}

    table = importance[:, usable]
    if len(usable) > 1:
        scores["disentanglement"] = focus(table)
    else:
        notes.append("no disentanglement: it takes 2 factors")
    if len(table) > 1:
        scores["completeness"] = focus(table.T)
    else:
        notes.append("no completeness: it takes 2 codes")
    scores["note"] = "; ".join(notes)
    return scores


def focus(importance):
    """Does each row keep to one column? 0 to 1. Rows are codes for D; for C pass the transpose.

    A row scores 1 - entropy / (largest entropy possible). Rows count by their share of the total.
    ValueError for a single column, which has no entropy, and for entries below 0.
    """
    importance = matrix(importance, "importance")
    if importance.min() < 0:
        raise ValueError(f"importance has an entry of {importance.min()}; expected 0 or more")
    if importance.shape[1] < 2:
        raise ValueError(f"importance has shape {importance.shape}; expected two columns or more")
    largest = importance.max() or 1
    share = importance / largest + 1e-11  # so that an unused code has equal shares
    share = share / share.sum(axis=1, keepdims=True)
    disorder = -(share * np.log(share)).sum(axis=1)  # entropy of each row
    columns = importance.shape[1]
    score = 1 - disorder / np.log(columns)  # (rows,)

    weight = importance.sum(axis=1)
    if weight.sum() == 0:
        weight = weight + 1
    total = (score * weight).sum()
    return max(0.0, float(total / weight.sum()))  # equal shares may round to just below 0


def matrix(values, name):
    """A table (N, F) as numpy, from a list of lists, too; ValueError for another shape."""
    values = to_floats(values, name)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"{name} has shape {values.shape}; expected (codes, factors)")
    return values


# ---- The trees behind DCI: gradient boosting, written out ----------------------------------------
# Why are the trees ours? This file then needs no library of trees; a seed gives the same scores
# with every version of everything; and one can read here what "importance" means. They follow
# scikit-learn's GradientBoostingClassifier with its defaults, and give the same scores, but for the
# random order of ties.
#
# An example. Six samples have the codes 1 2 3 4 5 6 and the labels 0 0 0 1 0 1. Points 2 to 5 are
# one round of `fit_trees`. `python metrics.py` computes each of the numbers below.
#
# 1 START. A third of the labels is 1, so at first p = 1/3 for every sample, where p is the
#   probability that its label is 1. What we store is not p but a logit, which may be any number:
#   p = sigmoid(logit). The first logit is log(1/2), the log odds of 1/3.
# 2 RESIDUAL. r = label - p is what p still lacks: -1/3 -1/3 -1/3 2/3 -1/3 2/3.
# 3 SPLIT. A question asks of one code, "is it at most c?" It is good if the residuals within
#   each side are alike. With nl of n samples on the left and nr on the right, its gain is
#       gain = (nl nr / n) (mean_l - mean_r)^2,
#   the amount by which the squared distances to the mean shrink when each side has its own mean.
#   The question "at most 3?" has the means -1/3 and 1/3, so its gain is (3 3 / 6) (2/3)^2 = 2/3.
#   After 1, 2, 4 and 5 the gain is 2/15, 1/3, 1/12 and 8/15. So c lies midway between 3 and 4.
# 4 TREE. Each half is split again, and each quarter: depth 3, with 8 leaves at most. The example
#   stops at depth 1. Its leaves hold the samples 1 2 3 and 4 5 6.
# 5 LEAF. The samples of a leaf move their logits by a tenth of Newton's step, which is the slope
#   of the log likelihood over its curvature: sum r / sum |r| (1 - |r|). On the left this is
#   -1 / (3 2/9) / 10 = -3/20, on the right 3/20. So p becomes .301 and .367.
# Then point 2 comes again. Each of a hundred rounds corrects what the earlier ones have left.
#
# More than two values: each of the K values has a logit, softmax replaces sigmoid, and a round
# grows K trees. For the tree of one value r is 1 - p if the sample has it and -p if not, and the
# value of a leaf is (K - 1) / K of the above.
# IMPORTANCE of a code: the gains of all splits that ask for it, over all trees, as a share of the
# gains of all codes. Of two codes that gain equally one is chosen at random.
Trees = collections.namedtuple("Trees", "classes start rounds importance")
Split = collections.namedtuple("Split", "code cut low high")


def fit_trees(codes, labels, rounds=100, rate=0.1, depth=3, seed=0):
    """Trees that read a label from codes.

    codes   (n, N) finite numbers
    labels  (n,) with K >= 2 values
    rounds  how often residuals are computed and trees grown
    rate    the share of Newton's step that a leaf takes
    depth   the number of questions between root and leaf
    seed    of ties between codes

    Trees.classes (K,) are the values. .start holds the first logits, one for each row of logits:
    there are K rows, or a single one if K = 2. .rounds is a list of rounds, and a round is a list
    of trees, one for each row. A tree is a Split or, at a leaf, a value. .importance (N,) sums to
    1, or to 0 if nothing was split.
    """
    classes, label = np.unique(labels, return_inverse=True)
    K = len(classes)
    target = np.stack([label == k for k in range(K)]) * 1.0  # (K, n)
    start = np.log(target.mean(axis=1))  # (K,)
    share = rate * ((K - 1) / K)
    if K == 2:  # a single row of logits: the log odds
        target = target[1:]
        start = start[1:] - start[:1]
        share = rate

    grower = TreeGrower(codes, share, seed)
    logits = np.tile(start, (len(codes), 1)).T  # (K, n), or (1, n) if K = 2
    all_rounds = []
    for _ in range(rounds):
        residual = target - probabilities(logits)
        trees_of_round = [grower.grow(row, depth) for row in residual]
        logits += [look_up(tree, grower.columns) for tree in trees_of_round]
        all_rounds.append(trees_of_round)

    importance = grower.gains
    if importance.sum() > 0:
        importance = importance / importance.sum()
    return Trees(classes, start, all_rounds, importance)


class TreeGrower:
    """Grows trees on one table of codes, which it sorts once; .gains (N,) are the gains so far.

    codes  (n, N)
    share  the share of Newton's step that a leaf takes: the rate, times (K - 1) / K if K > 2
    seed   of ties between codes
    """

    def __init__(self, codes, share, seed):
        self.share = share
        self.rng = np.random.default_rng(seed)
        self.columns = np.ascontiguousarray(codes.T, dtype=np.float64)  # (n, N) -> (N, n)
        N, n = self.columns.shape
        self.gains = np.zeros(N)
        order = self.columns.argsort(axis=1, kind="stable")  # (N, n)
        self.order = order.astype(np.int32)  # is read faster than int64

        # Samples with equal codes share a rank: no cut can part them.
        ranks = [np.unique(column, return_inverse=True)[1] for column in self.columns]
        self.ranks = np.stack(ranks).astype(np.float32)  # (N, n)
        largest = self.ranks.max(axis=1)
        self.has_ties = largest.min() < n - 1
        self.row_starts = n * np.arange(N)[:, None]  # of `ranks`, if flattened

    def grow(self, residual, depth, order=None):
        """A tree for residuals (n,): a Split, or the value of a leaf.

        order (N, m): the samples of this node, sorted by each of the codes; at the root all.
        """
        if order is None:
            order = self.order
        if depth == 0 or order.shape[1] == 1:
            return self.leaf(residual[order[0]])
        gain, code, cut = self.best_split(residual, order)
        if gain <= 0:
            return self.leaf(residual[order[0]])

        self.gains[code] += gain
        if depth == 1:
            order = order[:1]  # a leaf needs no sorting
        # Every row of `order` loses the same samples and stays sorted: two tables result. The mask
        # is of the flattened table; as each row keeps nl (or nr) samples, the rest has rows again.
        goes_left = (self.columns[code] <= cut).take(order).ravel()  # (N, m) -> (N m,)
        left = order.compress(goes_left).reshape(len(order), -1)  # (N, nl)
        right = order.compress(~goes_left).reshape(len(order), -1)  # (N, nr)
        low = self.grow(residual, depth - 1, left)
        high = self.grow(residual, depth - 1, right)
        return Split(code, cut, low, high)

    def leaf(self, residual):
        """The value of a leaf with residuals (m,): a share of Newton's step."""
        curvature = (abs(residual) * (1 - abs(residual))).sum()
        if curvature < 1e-150:  # all are right already
            return 0.0
        return self.share * residual.sum() / curvature

    def best_split(self, residual, order):
        """The best question of a node: gain (0 if there is none), code, cut.

        residual (n,); order (N, m) as in `grow`. All m - 1 cuts of all N codes are tried: the sum
        of the residuals on the left of a cut is a running sum. In float32, as it is twice as fast.
        """
        N, m = order.shape
        sums = residual.astype(np.float32).take(order)  # (N, m)
        sums = sums.cumsum(axis=1)
        left_count = np.arange(1, m, dtype=np.float32)
        gain = split_gain(sums[:, :-1], left_count, sums[:, -1:], m)  # (N, m - 1)
        if self.has_ties:
            rank = self.ranks.take(order + self.row_starts)  # (N, m)
            gain *= rank[:, 1:] > rank[:, :-1]

        # Codes that gain equally must share the importance. scikit-learn asks the codes in random
        # order; we multiply by noise that is just above the rounding of float32.
        at = gain.argmax(axis=1)  # (N,): the best cut of each code
        best = gain[np.arange(N), at]
        best = best * (1 + 1e-6 * self.rng.random(N))
        code = best.argmax()

        # The cut lies midway between the two samples, unless no float does.
        k = at[code]
        below = self.columns[code, order[code, k]]
        above = self.columns[code, order[code, k + 1]]
        cut = below / 2 + above / 2
        if cut >= above:
            cut = below
        return best[code], code, cut


def split_gain(left_sum, left_count, total, count):
    """The gain of point 3 for cuts with `left_count` of `count` samples on their left, whose
    residuals sum to `left_sum` of `total`. With n for count, k for left_count, S for total and s
    for left_sum:
    k (n-k) / n (s/k - (S-s)/(n-k))^2  =  (S k/n - s)^2 n / (k (n-k))."""
    right_count = count - left_count
    excess = total * (left_count / count) - left_sum
    return excess * excess * (count / (left_count * right_count))


def probabilities(logits):
    """Sigmoid of a single row of logits (1, n); of several rows the softmax over rows."""
    if len(logits) == 1:
        return np.exp(-np.logaddexp(0, -logits))  # 1 / (1 + e^-logit)
    powers = np.exp(logits - logits.max(axis=0))
    return powers / powers.sum(axis=0)


def look_up(tree, columns):
    """The value (n,) that a tree gives each sample; columns (N, n)."""
    if not isinstance(tree, Split):
        return np.full(columns.shape[1], tree)
    low = look_up(tree.low, columns)
    high = look_up(tree.high, columns)
    return np.where(columns[tree.code] <= tree.cut, low, high)


def predict(trees, codes):
    """The likeliest label (n,) of each sample, from codes (n, N)."""
    columns = np.ascontiguousarray(codes.T)  # (N, n)
    logits = np.tile(trees.start, (len(codes), 1)).T  # (K, n), or (1, n) if K = 2
    for trees_of_round in trees.rounds:
        logits += [look_up(tree, columns) for tree in trees_of_round]
    if len(logits) == 1:  # log odds of the second value against 0 of the first
        logits = np.concatenate([0 * logits, logits])
    likeliest = logits.argmax(axis=0)
    return trees.classes[likeliest]


# ---- FactorVAE score -----------------------------------------------------------------------------
def factor_vae_votes(codes, factors, train_votes=10_000, eval_votes=5_000, batch=64, seed=0):
    """FactorVAE score (Kim & Mnih, ICML 2018) of a table of codes, as a dict.

    codes        (n, N) or (n, N, d)
    factors      (n, F) labels
    train_votes  votes that decide which factor a code belongs to
    eval_votes   further votes, which are scored
    batch        images of one vote
    seed         of all votes

    A code belongs to the factor for which it got most training votes. "factor_vae" is the share of
    evaluation votes that go to a code which belongs to the factor held fixed: 1 for one code a
    factor, about 1/F for codes that know nothing. "factor_vae_train" is the same of the training
    votes. The paper encodes new images for every vote; we draw rows of the table.

    Left out, as "note" says: dead codes (see live_codes); values that fewer than `batch` rows have,
    and factors all of whose values are so rare. ValueError: no code varies, or fewer than two
    factors remain.
    """
    codes, factors = check_tables(codes, factors)
    if min(train_votes, eval_votes) < 1 or batch < 2:
        raise ValueError(f"{train_votes} + {eval_votes} votes of {batch} images; "
                         f"expected 1 vote or more of each, and 2 images or more")
    live = live_codes(codes)
    if not live.any():
        raise ValueError("no code varies")
    scaled = codes[:, live]
    scaled = scaled / scaled.std(axis=0)

    usable, notes = usable_factors(factors)
    if not live.all():
        dead = np.flatnonzero(~live)
        notes.append(f"FactorVAE votes leave out dead codes: {listing(dead)}")
    groups = []
    for j in usable:
        rows_of_value = rows_by_value(factors[:, j], batch)
        rows = sum(len(part) for part in rows_of_value)
        if rows == 0:
            notes.append(f"FactorVAE votes leave out factor {j}, whose values are all rare")
        else:
            groups.append(rows_of_value)
            if rows < len(codes):
                notes.append(f"FactorVAE votes leave out rare values of factor {j}")
    if len(groups) < 2:
        raise ValueError(f"it takes 2 factors that vary and have a value in {batch} rows or more; "
                         f"{len(groups)} of {factors.shape[1]} do")

    rng = np.random.default_rng(seed)
    train = count_votes(scaled, groups, train_votes, batch, rng)  # (F, N)
    fresh = count_votes(scaled, groups, eval_votes, batch, rng)
    owner = train.argmax(axis=0)  # (N,): the factor that each code belongs to
    code = np.arange(len(owner))
    right_train = train[owner, code].sum()
    right_fresh = fresh[owner, code].sum()
    return {
        "factor_vae": float(right_fresh / eval_votes),
        "factor_vae_train": float(right_train / train_votes),
        "note": "; ".join(notes)}


def rows_by_value(labels, batch):
    """For each value of a factor, the rows (of labels, (n,)) that have it, if `batch` or more."""
    result = []
    for value in np.unique(labels):
        rows = np.flatnonzero(labels == value)
        if len(rows) >= batch:
            result.append(rows)
    return result


def count_votes(scaled, groups, votes, batch, rng):
    """(F, N): how often did code i vary least while factor f was held fixed?

    scaled  (n, N) codes of std 1
    groups  for each factor a list: for each of its values, the rows that have it
    votes   their number
    batch   rows of a vote
    rng     numpy's generator
    """
    F = len(groups)
    N = scaled.shape[1]
    table = np.zeros((F, N), dtype=int)
    frequencies = []
    for rows_of_value in groups:
        counts = np.array([len(rows) for rows in rows_of_value])
        frequencies.append(counts / counts.sum())

    for _ in range(votes):
        # Hold a factor fixed, at a value that is drawn as often as it occurs.
        factor = rng.integers(F)
        rows_of_value = groups[factor]
        value = rng.choice(len(rows_of_value), p=frequencies[factor])
        rows = rng.choice(rows_of_value[value], size=batch)
        # Vote for the code that varies least.
        variance = scaled[rows].var(axis=0)  # (batch, N) -> (N,)
        table[factor, variance.argmin()] += 1
    return table


# ---- MIG -----------------------------------------------------------------------------------------
def mig(codes, factors, bins=20):
    """Mutual information gap (Chen et al., NeurIPS 2018), a float.

    codes    (n, N) or (n, N, d); each is cut into equal bins between its least and largest value
    factors  (n, F) labels
    bins     their number, 1 or more, else ValueError

    How much of a factor's entropy does its best code know, and how much the second best? The gap
    is averaged over factors: 1 for one code a factor; about 0 for random codes, or if two codes
    know the same. ValueError: there is a single code, or no factor varies.
    """
    codes, factors = check_tables(codes, factors)
    usable, notes = usable_factors(factors)
    if bins < 1 or bins % 1:
        raise ValueError(f"bins is {bins}; expected a whole number, 1 or more")
    if codes.shape[1] < 2:
        raise ValueError("it compares two codes, and there is one")

    low = codes.min(axis=0)
    width = codes.max(axis=0) - low
    width = np.maximum(width, 1e-300)  # a constant code has one bin
    binned = (codes - low) / width * bins
    binned = binned.astype(np.int64).clip(max=bins - 1)  # (n, N)
    gaps = []
    for j in usable:
        _, label = np.unique(factors[:, j], return_inverse=True)
        shared = []
        for column in binned.T:
            joint = joint_table(column, label)
            shared.append(mutual_information(joint))
        second, best = np.sort(shared)[-2:]
        gaps.append((best - second) / entropy(label))
    return float(np.mean(gaps))


def joint_table(a, b):
    """The joint probabilities (A, B) of labels a and b (n,), which are numbered from 0."""
    A = a.max() + 1
    B = b.max() + 1
    cell = a * B + b  # of a histogram (A, B), flattened
    counts = np.bincount(cell, minlength=A * B)
    return counts.reshape(A, B) / len(a)


def mutual_information(joint):
    """Nats that a and b tell of each other, from their joint probabilities (..., A, B)."""
    of_a = joint.sum(-1, keepdims=True)  # (..., A, 1)
    of_b = joint.sum(-2, keepdims=True)  # (..., 1, B)
    ratio = np.ones_like(joint)  # where joint is 0, as 0 log 0 = 0
    np.divide(joint, of_a * of_b, out=ratio, where=joint > 0)
    nats = joint * np.log(ratio)
    return nats.sum((-2, -1))


def entropy(label):
    """Nats of labels (n,), numbered from 0, all of which occur."""
    probability = np.bincount(label) / len(label)
    return -(probability * np.log(probability)).sum()


# ---- What scores accept; InfoMEC, UDR, TAD, images. Skip on first reading. -----------------------
# A factor with more values is taken for an id, which DCI would read for minutes, one tree a value
# and round. Of the published datasets Cars3D has a factor with most values: 183 cars.
MOST_VALUES = 200
DEAD = 1e-5  # a code with less spread has no vote: see live_codes
INFOMEC_SAMPLES = 10_000  # as many as in its paper


def to_numpy(values):
    """An array, tensor on any device, or (nested) list of numbers, labels or tensors, as numpy.

    Lists of labels keep Python's types: numpy would turn 2**63 and -1 into rounded floats, and
    1 and "a" into two strings.
    """
    if torch.is_tensor(values):
        values = values.detach().cpu()
        if values.is_floating_point():
            values = values.double()  # numpy has no bfloat16
        return values.numpy()
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        return values.astype(object).filled(np.nan)  # what is masked is missing
    if isinstance(values, (list, tuple)):
        if any(torch.is_tensor(value) for value in values):
            return np.stack([to_numpy(value) for value in values])
        values = [to_numpy(row).tolist() if isinstance(row, (list, tuple)) else row
                  for row in values]
        try:
            np.array(values)
        except ValueError:
            raise ValueError("a table has rows of unequal length") from None
        return np.array(values, dtype=object)
    values = np.asarray(values)
    if values.dtype == object and any(torch.is_tensor(value) for value in values.flat):
        return to_numpy(values.tolist())  # tensors are never equal to one another as labels are
    return values


def to_floats(values, name):
    """`values` as finite float64 numpy; ValueError if they are no numbers, or not finite."""
    array = to_numpy(values)
    try:
        if array.dtype.kind not in "fiubO":
            raise TypeError
        array = array.astype(np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} has dtype {array.dtype}; expected numbers") from None

    wrong = np.argwhere(~np.isfinite(array)).tolist()
    if wrong:
        raise ValueError(f"{name}{wrong[0]} is {array[tuple(wrong[0])]}, and {len(wrong) - 1} "
                         f"others are not finite; drop these samples or mend the encoder")
    return array


def scalar_codes(codes, fit_on=None, name="codes"):
    """Codes as finite float64 (n, N).

    codes   (n, N), which are returned as they are; (n,) is a single code; (n, N, d) are projected
            on the main axis of each code, by PCA
    fit_on  (m, N, d): where mean and axis are measured (default: codes)
    name    for the words of an error

    The sign of an axis is arbitrary: its largest entry is made positive, so that two runs agree.
    ValueError for other shapes, and for what is not finite.
    """
    codes = to_floats(codes, name)
    basis = codes if fit_on is None else to_floats(fit_on, "fit_on")
    if codes.ndim == 1:
        codes = codes[:, None]
    if basis.ndim == 1:
        basis = basis[:, None]
    if codes.ndim not in (2, 3) or codes.size == 0:
        raise ValueError(f"{name} has shape {codes.shape}; expected (samples, codes) or (samples, "
                         f"codes, width), none of them 0")
    if basis.shape[1:] != codes.shape[1:]:
        raise ValueError(f"{name} has shape {codes.shape} and is to be treated as codes of shape "
                         f"{basis.shape}; expected as many codes, as wide")
    if codes.ndim == 2:
        return codes

    mean = basis.mean(axis=0)  # (N, d)
    centred = (basis - mean).transpose(1, 2, 0)  # (m, N, d) -> (N, d, m)
    covariance = centred @ centred.transpose(0, 2, 1)  # (N, d, m) @ (N, m, d)
    axis = np.linalg.eigh(covariance)[1][:, :, -1]  # (N, d); eigenvalues ascend
    largest = np.abs(axis).argmax(axis=1)[:, None]  # (N, 1)
    sign = np.sign(np.take_along_axis(axis, largest, axis=1))
    return np.einsum("nkd,kd->nk", codes - mean, axis * sign)  # (n, N, d) -> (n, N)


def check_tables(codes, factors, prefix="", fit_on=None):
    """Codes as float64 (n, N) and factors as (n, F) labels in their own dtype, or ValueError.

    A table whose samples are its columns is refused: it has more factors than samples, or does not
    agree with the other table. NaN is no label, and labels of one factor must be comparable.
    prefix stands before the names of the tables in an error. fit_on: see scalar_codes; tables that
    are fitted on others may be short.
    """
    codes = scalar_codes(codes, fit_on, f"{prefix}codes")
    factors = to_numpy(factors)
    if factors.dtype.names:  # records: each of their fields is a factor
        columns = [factors[name].astype(object) for name in factors.dtype.names]
        if all(column.shape[1:] == (1,) for column in columns):
            columns = [column[:, 0] for column in columns]
        factors = np.stack(columns, axis=-1)
    if factors.ndim == 1:
        factors = factors[:, None]
    fits = factors.ndim == 2 and factors.size > 0 and len(factors) == len(codes)
    if fits and fit_on is None:
        fits = factors.shape[1] <= len(factors)
    if not fits:
        raise ValueError(f"{prefix}codes has shape {codes.shape} and {prefix}factors "
                         f"{factors.shape}; expected (samples, codes) and (samples, factors), as "
                         f"many samples in both and no fewer than factors: transpose a table "
                         f"whose samples are its columns")

    for j, column in enumerate(factors.T):
        try:
            values = np.unique(column)
            missing = bool((values != values).any())
        except (TypeError, ValueError):
            kinds = {type(value).__name__ for value in column}
            raise ValueError(f"{prefix}factors has labels in column {j} that cannot be compared "
                             f"({', '.join(sorted(kinds))}); expected one kind a factor") from None
        if missing:
            raise ValueError(f"{prefix}factors has NaN in column {j}; drop these samples")
    return codes, factors


def many_values(values, samples):
    """Has a column of so many samples too many values to be a factor, or a discrete code?"""
    return values > min(MOST_VALUES, samples / 2)


def usable_factors(factors):
    """Indices of the columns of factors (n, F) that can be scored; a note on each of the others.
    ValueError if none can."""
    usable = []
    notes = []
    for j, column in enumerate(factors.T):
        values = len(np.unique(column))
        if values < 2:
            notes.append(f"factor {j} is left out: it has one value")
        elif many_values(values, len(column)):
            notes.append(f"factor {j} is left out: it has more than {MOST_VALUES} values, or fewer "
                         f"than 2 samples a value, as an id has")
        else:
            usable.append(j)
    if not usable:
        raise ValueError("; ".join(notes))
    return usable, notes


def learnable_factors(train_factors, test_factors):
    """The columns that trees can learn and be tested on; a note on each of the others.

    ValueError: there is none, or the two tables do not have the same factors.
    """
    if test_factors.shape[1] != train_factors.shape[1]:
        raise ValueError(f"train_factors has shape {train_factors.shape} and test_factors "
                         f"{test_factors.shape}; expected the same factors in both")
    usable, notes = usable_factors(train_factors)
    for j in usable:
        known = set(train_factors[:, j].tolist())
        unseen = np.mean([label not in known for label in test_factors[:, j].tolist()])
        if unseen == 1:
            raise ValueError(f"test_factors has in column {j} no value that train_factors has "
                             f"there; expected the same labels in both")
        if unseen > 0.01:  # 0.1 as float32 is not 0.1 as float64, for example
            notes.append(f"column {j}: {unseen:.0%} of the labels of test_factors are in no row "
                         f"of train_factors and count as wrong")
    return usable, notes


def live_codes(codes):
    """Which of the codes (n, N) vary, as booleans (N,)? The others are dead.

    Of a dead code only rounding errors are left, which can be constant in many batches and would
    win every FactorVAE vote. Codes have no unit, so the spread is compared with what float32
    resolves: a code is dead if its std is below DEAD times its own mean, or DEAD times the largest
    std. Float32 rounds at 1e-7; codes whose units differ by a factor of 1,000 are all alive.
    """
    std = codes.std(axis=0)
    scale = np.maximum(std.max(), np.abs(codes.mean(axis=0)))
    return std > DEAD * scale


def attempt(name, compute, *arguments, **options):
    """What compute(...) returns, as a dict; if it raises ValueError, a dict with a note."""
    try:
        result = compute(*arguments, **options)
    except ValueError as error:
        return {"note": f"no {name}: {error}"}
    if isinstance(result, dict):
        return result
    return {name.lower().replace(" ", "_"): result}


def warn_if_slow(codes, factors):
    """Says before DCI begins that it takes minutes: for very many codes, samples or values."""
    trees = 0
    for column in factors.T:
        values = len(np.unique(column))
        trees += values if values > 2 else 1
    minutes = 100 * trees * codes.size * 4e-8 / 60  # 40 ns a tree, sample and code, as measured
    if minutes > 3:
        warnings.warn(f"DCI grows {100 * trees:,} trees on {len(codes):,} samples of "
                      f"{codes.shape[1]:,} codes, which takes about {minutes:.0f} minutes",
                      stacklevel=3)


def listing(numbers):
    """A few numbers in words: "1, 2, 3" or "1, 2, 3, 4, 5 and 7 others"."""
    text = ", ".join(str(number) for number in numbers[:5])
    if len(numbers) > 5:
        text += f" and {len(numbers) - 5} others"
    return text


def factor_vae_score(represent, dataset, pool=50_000, seed=0, **votes):
    """The FactorVAE score of an encoder on a dataset with known factors, as a dict.

    represent  maps uint8 images (B, 3, H, W) to codes (B, N) or (B, N, d); the encoder must be in
               eval mode, so that codes do not depend on the other images of a batch
    dataset    has len(), images(rows), and factors(rows) (B, F)
    pool       that many random images are encoded once, and all votes drawn from them
    seed       of pool and votes
    votes      further arguments of factor_vae_votes
    """
    rows = np.random.default_rng(seed).permutation(len(dataset))[:pool]
    codes = []
    for start in range(0, len(rows), 256):
        images = dataset.images(rows[start:start + 256])
        with torch.no_grad():
            codes.append(to_numpy(represent(images)))
    codes = np.concatenate(codes)
    return factor_vae_votes(codes, dataset.factors(rows), seed=seed, **votes)


# ---- InfoMEC -------------------------------------------------------------------------------------
def infomec(codes, factors, discrete=None):
    """InfoM (modularity), InfoC (compactness), InfoE (explicitness), as a dict (Hsu et al.,
    "Disentanglement via Latent Quantization", NeurIPS 2023).

    codes     (n, N) or (n, N, d); the paper takes 10,000 samples
    factors   (n, F) labels
    discrete  are codes names of values, not amounts? Default: yes if none has many values

    With NMI_ij = I(code i; factor j) / H(factor j), over the active codes i,
      InfoM = (mean over i of max_j NMI_ij / sum_j NMI_ij - 1/F) / (1 - 1/F),
      InfoC = (mean over j of max_i NMI_ij / sum_i NMI_ij - 1/N) / (1 - 1/N),
      InfoE = mean over j of 1 - loss_j / log K, where loss_j is the cross entropy with which a
              linear classifier of all codes reads factor j, and log K that of one without codes.
    1 is best. If all entries of a row are equal, InfoM or InfoC is 0 there; a row that is 0
    throughout has no largest share and does not count. For codes that know nothing the entries are
    chance, and InfoM and InfoC may be anything up to 1: look at InfoE first, which is then about 0.
    It is counted on the samples from which the classifier learned, so with a few hundred of them it
    is too high. A code is active if it is not dead (see live_codes) and, unless discrete, its range
    is over a twentieth of the largest range, as in the authors' code: so give all codes one unit.
    "nmi" (N, F) is the table of all codes. Six factors and 20 codes of 10,000 samples take about 4
    seconds, or 11 if discrete. ValueError: no factor can be scored, no code varies.
    """
    codes, factors = check_tables(codes, factors)
    usable, notes = usable_factors(factors)
    labels = [np.unique(factors[:, j], return_inverse=True)[1] for j in usable]
    numbered = [np.unique(code, return_inverse=True)[1] for code in codes.T]
    if discrete is None:
        discrete = not any(many_values(code.max() + 1, len(code)) for code in numbered)

    spread = np.ptp(codes, axis=0)
    active = live_codes(codes)
    if not discrete:
        active = active & (spread > spread.max() / 20)
    if not active.any():
        raise ValueError("no code varies")
    if not active.all():
        inactive = listing(np.flatnonzero(~active))
        notes.append(f"InfoM and InfoC leave out inactive codes: {inactive}")

    standard = (codes - codes.mean(axis=0)) / np.where(spread > 0, codes.std(axis=0), 1)
    nmi = np.zeros((codes.shape[1], factors.shape[1]))  # (N, F)
    for j, label in zip(usable, labels):
        for i in range(codes.shape[1]):
            if discrete:
                shared = mutual_information(joint_table(numbered[i], label))
            else:
                shared = neighbour_information(standard[:, i], label)
            nmi[i, j] = shared / entropy(label)

    inputs = np.stack(numbered, axis=1) if discrete else standard  # (n, N)
    explicit = [1 - linear_loss(inputs, label) / np.log(label.max() + 1) for label in labels]
    scores = {"infoe": float(np.mean(explicit)), "nmi": nmi}
    table = nmi[active][:, usable]
    if len(usable) > 1 and table.any():
        scores["infom"] = largest_share(table)
    else:
        notes.append("no InfoM: it takes 2 factors of which the codes know something")
    if len(table) > 1 and table.any():
        scores["infoc"] = largest_share(table.T)
    else:
        notes.append("no InfoC: it takes 2 active codes that know something")
    if table.any() and table.max() < 0.05:
        notes.append("the codes know almost nothing, so InfoM and InfoC are chance")
    scores["note"] = "; ".join(notes)
    return scores


def largest_share(table):
    """How large is the largest entry of a row beside their sum? Mean over rows: 0 if the entries of
    a row are equal, 1 if all but one are 0."""
    table = table[table.sum(axis=1) > 0]
    share = table.max(axis=1) / table.sum(axis=1)
    least = 1 / table.shape[1]
    return float((share.mean() - least) / (1 - least))


def neighbour_information(code, label, neighbours=10):
    """Nats that a continuous code (n,) and a label (n,) tell of each other (Ross, PLoS ONE 2014),
    as scikit-learn's mutual_info_classif estimates them.

    If the label matters, samples of one label have codes closer together than samples of any label.
    With psi the digamma function, which is nearly the logarithm,
        I = psi(n) + mean psi(k_i) - mean psi(n_i) - mean psi(m_i),
    where n_i samples have the label of sample i; r_i is its distance from the k_i-th neighbour
    among these, k_i = min(neighbours, n_i - 1); and m_i samples of any label are nearer than r_i.
    """
    counts = np.bincount(label)
    kept = counts[label] > 1  # a label needs a neighbour
    code = code[kept] + 1e-10 * np.random.default_rng(0).normal(size=kept.sum())  # no ties
    label = label[kept]
    everything = np.sort(code)

    terms = []
    for value in np.unique(label):
        points = np.sort(code[label == value])  # (n_i,)
        k = min(neighbours, len(points) - 1)
        # In sorted order a point and its k nearest neighbours are k + 1 points in a row. Of the
        # k + 1 rows that hold the point, the one that reaches least far gives its radius.
        edge = np.full(k, np.inf)
        padded = np.concatenate([-edge, points, edge])
        radius = np.full(len(points), np.inf)
        for start in range(k + 1):
            end = start + len(points)
            low = padded[start:end]
            high = padded[start + k:end + k]
            radius = np.minimum(radius, np.maximum(points - low, high - points))

        # A little less, so that the k-th neighbour itself does not count: one step of rounding may
        # be lost in the sum below, two are not.
        radius = radius - 2 * np.spacing(np.abs(points) + radius)
        inside = (np.searchsorted(everything, points + radius, side="right")
                  - np.searchsorted(everything, points - radius, side="left"))
        terms.append(psi(k) - psi(len(points)) - psi(np.maximum(inside, 1)))
    return max(0.0, psi(len(code)) + np.concatenate(terms).mean()) if terms else 0.0


def psi(numbers):
    """The digamma function."""
    numbers = torch.as_tensor(numbers, dtype=torch.float64, device="cpu")
    return torch.digamma(numbers).numpy()


@torch.inference_mode(False)  # it learns by gradients, whatever the caller's mode
@torch.enable_grad()
def linear_loss(inputs, label):
    """Mean cross entropy of a label (n,), as read from inputs (n, N) by logistic regression.

    Inputs that are floats are amounts. Integers, numbered from 0, are names: each value of each
    code then has weights of its own. As the authors' code has it: no penalty, at most 100 steps of
    L-BFGS, and rare labels weigh as much as frequent ones while it learns, but not in the result.
    """
    inputs = torch.from_numpy(inputs)
    label = torch.from_numpy(label)
    counts = label.bincount().double()  # (K,)
    discrete = not inputs.is_floating_point()
    width = inputs.shape[1]
    if discrete:
        values = inputs.max(dim=0).values + 1  # (N,): values of each code
        inputs = inputs + values.cumsum(0) - values  # the row of its weights
        width = int(values.sum())
    weight = inputs.new_zeros(width, len(counts), dtype=torch.float64, requires_grad=True)
    bias = inputs.new_zeros(len(counts), dtype=torch.float64, requires_grad=True)

    def predict_logits():
        if discrete:  # a sum of N rows, (n, K)
            return functional.embedding_bag(inputs, weight, mode="sum") + bias
        return inputs @ weight + bias  # (n, N) @ (N, K)

    def weighted_loss():
        optimizer.zero_grad()
        loss = functional.cross_entropy(predict_logits(), label, weight=1 / counts)
        loss.backward()
        return loss

    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, max_eval=1000, history_size=10,
                                  tolerance_grad=1e-4, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")
    optimizer.step(weighted_loss)
    with torch.no_grad():
        return float(functional.cross_entropy(predict_logits(), label))


# ---- UDR: which run to trust, without labels -----------------------------------------------------
def agreement(tables):
    """Unsupervised disentanglement ranking (Duan et al., ICLR 2020) of several runs, as a dict.

    tables  a list with codes (n, N) of each run, of the same n images in the same order

    Runs that disentangle find the same codes, up to order, sign and unit; others differ each in
    its own way. With R_ab the absolute Spearman correlation of code a of one run and b of another,
        UDR_ij = (sum over b of max_a R_ab^2 / sum_a R_ab
                  + sum over a of max_b R_ab^2 / sum_b R_ab) / (N_i + N_j),
    0 to 1; even runs with the same codes stay a little below 1, as codes correlate by chance. The
    paper sums over the codes that a VAE uses, whose KL divergence from the prior is above .01. Our
    codes have no prior: we take those that are not dead. "pairs" holds UDR_ij as a list of lists,
    with 1 for a run and itself. "udr" holds for each run the median over the other runs: trust the
    run with the largest.
    """
    tables = [scalar_codes(table, name=f"tables[{i}]") for i, table in enumerate(tables)]
    shapes = [table.shape for table in tables]
    if len(tables) < 2 or len({n for n, _ in shapes}) > 1 or any(n <= N for n, N in shapes):
        raise ValueError(f"tables of codes have the shapes {shapes}; expected two or more tables "
                         f"(samples, codes) of the same images, with more images than codes")
    standard = []
    for i, table in enumerate(tables):
        ranked = ranks(table[:, live_codes(table)])
        if ranked.shape[1] == 0:
            raise ValueError(f"no code of tables[{i}] varies")
        standard.append((ranked - ranked.mean(axis=0)) / ranked.std(axis=0))

    pairs = np.eye(len(tables))
    for i, a in enumerate(standard):
        for j, b in enumerate(standard):
            if i < j:
                R = np.abs(a.T @ b) / len(a)  # (N_i, n) @ (n, N_j)
                for_a = R.max(axis=1) ** 2 / np.maximum(R.sum(axis=1), 1e-12)
                for_b = R.max(axis=0) ** 2 / np.maximum(R.sum(axis=0), 1e-12)
                pairs[i, j] = (for_a.sum() + for_b.sum()) / sum(R.shape)
                pairs[j, i] = pairs[i, j]
    medians = [float(np.median(np.delete(row, i))) for i, row in enumerate(pairs)]
    return {"udr": medians, "pairs": pairs.tolist()}


def ranks(codes):
    """The rank, from 1, of each entry of codes (n, N) in its column; equal ones share a rank."""
    result = np.empty(codes.shape)
    for i, column in enumerate(codes.T):
        _, value, count = np.unique(column, return_inverse=True, return_counts=True)
        mean_rank = np.cumsum(count) - (count - 1) / 2
        result[:, i] = mean_rank[value]
    return result


# ---- Exchanges that land: what a user of the model sees ------------------------------------------
@torch.no_grad()
def exchanges_that_land(model, dataset, explained, device="cpu", pairs=128, seed=0, **options):
    """Exchange one factor's tokens: how often is the image drawn that was asked for?

    Two random images are a source and its target. For each factor, that factor's tokens of the
    source are replaced by the target's, and the image is drawn. It should show the source with the
    target's value of this factor. Let one factor of that image change: which of the true images
    that result is nearest to the drawn one (squared distance of pixels)? If the factor that changes
    is the exchanged one and the nearest image is the one that was asked for, the exchange lands. If
    this holds for every factor, the exchange is clean: it changed nothing else. Pairs that share
    the value do not count. This score is ours.

    model      trained, with represent, tokens, sample and latent_shape
    dataset    data.Dataset that is_complete: with an image of every combination of its factors
    explained  (N, F), as from `variance_explained`: whose token is whose, see tokens_of_factors
    device     where the model is
    pairs      how many sources and targets
    seed       of the choice of pairs and of the noise z_T
    options    of model.sample: steps, sampler, eta

    Returns {factor: (share that lands, share that is clean, control)}, each 0 to 1. The control is
    without an exchange: is the source, redrawn from its own tokens, nearest to itself, whichever
    factor changes? A factor whose value no pair changes is left out, and so is one that explains
    nothing. ValueError if there are no factors, or if a combination has no image, or several that
    differ.
    """
    if not dataset.is_complete:
        raise ValueError(f"{dataset.name} has a combination of factors without an image, or with "
                         "several that differ")
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(len(dataset), (2 * pairs,), generator=generator, device="cpu")
    source, target = indices.split(pairs)
    noise = torch.randn(pairs, *model.latent_shape, generator=generator, device="cpu").to(device)
    return exchange_pairs(model, dataset, explained, source, target, noise, **options)


def exchange_pairs(model, dataset, explained, source, target, noise, factors=None, **options):
    """What `exchanges_that_land` returns, of sources and targets that are given.

    source, target  (B,) rows of the dataset; noise (B, ...): z_T, on the model's device
    factors         columns of the factors that are exchanged in turn; None: of all of them
    """
    images = in_unit_range(dataset.images(torch.cat([source, target]))).to(noise.device)
    source_codes, target_codes = batched(model.represent, images).split(len(source))
    source = dataset.factors(source)  # (B, F)
    target = dataset.factors(target)
    explained = matrix(explained, "explained")
    if factors is None:
        factors = np.flatnonzero(explained.any(axis=0)).tolist()

    # The source as it is, and once for each factor with that factor's tokens exchanged.
    variants = [source_codes]
    groups = tokens_of_factors(explained)
    for j in factors:
        variants.append(exchange(source_codes, target_codes, groups[j]))
    drawn = draw(model, torch.cat(variants), torch.cat([noise] * len(variants)), **options)
    redrawn, *exchanged = drawn.split(len(source))

    control = shows(dataset, redrawn, source).all(1)  # (B,)
    shares = {}
    for j, images in zip(factors, exchanged):
        wanted = source.clone()
        wanted[:, j] = target[:, j]
        counts = wanted[:, j] != source[:, j]
        if counts.any():
            right = shows(dataset, images[counts.to(images.device)], wanted[counts])  # (B', F)
            each = torch.stack([right[:, j], right.all(1), control[counts]])  # (3, B')
            shares[dataset.factor_names[j]] = tuple(each.double().mean(1).tolist())
    return shares


def shows(dataset, images, factors):
    """Which of these factors (B, F) the images (B, 3, S, S) show: (B, F) bool. An image shows a
    factor if, of the true images in which this factor alone changes, the right one is nearest."""
    right = torch.empty(factors.shape, dtype=torch.bool)
    for i, wanted in enumerate(factors):
        for j, value in enumerate(wanted.tolist()):
            # One image at a time: a factor of many values has many candidates, (K, 3, S, S).
            candidates = images_of_values(dataset, wanted[None], j)[0].to(images.device)
            distances = (candidates - images[i]).square().flatten(1).sum(1)  # (K,)
            right[i, j] = distances.argmin().item() == value
    return right


def exchanges_into(model, dataset, explained, combination, noise, seed=0, **options):
    """Can exchanges reach a combination of factors that was never trained on? Ours.

    combination  {column of a factor: its value}, two or more; noise (B, ...): z_T of B pairs

    For each of its factors in turn, the sources have the combination but for another value of that
    factor, and the targets have its value and not the combination: both were trained on. Their
    exchange asks for the combination. Returns {factor: (share that lands, share that is clean,
    control)}, as `exchanges_that_land` does.
    """
    pairs = len(noise)
    generator = torch.Generator().manual_seed(seed)
    factors = dataset.factors(slice(None))  # (count, F)
    has = {j: factors[:, j] == value for j, value in combination.items()}  # (count,) each
    unseen = torch.stack(list(has.values())).all(0)

    def some(rows):
        rows = rows.nonzero().flatten()
        return rows[torch.randint(len(rows), (pairs,), generator=generator, device="cpu")]

    shares = {}
    for j in combination:
        others = [has[k] for k in combination if k != j]
        source = some(torch.stack(others).all(0) & ~has[j])
        target = some(has[j] & ~unseen)
        of_factor = exchange_pairs(model, dataset, explained, source, target, noise, [j], **options)
        shares.update(of_factor)
    return shares


LEAST_SHARE = 0.05  # a code of which no factor explains so much of the variance belongs to none


def tokens_of_factors(explained, least=LEAST_SHARE):
    """A token belongs to the factor that explains most of its code's variance, if that is `least`.

    explained (N, F), as from `variance_explained` -> F lists of tokens, the purest token of a
    factor first. A token that no factor explains is in no list.

    Two other tables would not do. DCI's importance: a code that repeats what a better one says is
    not asked by the trees, and would be left out of an exchange. InfoMEC's NMI: a factor that moves
    a code a little tells as much as one that moves it far, if there is no noise.
    """
    explained = matrix(explained, "explained")
    lists = [[] for _ in range(explained.shape[1])]
    best_first = np.argsort(-explained.max(1), kind="stable")
    for token in best_first.tolist():
        factor = explained[token].argmax()
        if explained[token, factor] >= least:
            lists[factor].append(token)
    return lists


def variance_explained(codes, factors):
    """The share of each code's variance that each factor explains: a table (N, F), 0 to 1.

    codes    (n, N) or (n, N, d)
    factors  (n, F) labels

    A code varies within the images of one value of a factor, and between these values. The share of
    the latter is 1 if the code is a function of this factor alone, and 0 if it does not depend on
    it. In few samples values differ by chance, which the degrees of freedom take out (Kelley 1935,
    epsilon squared). A dead code has 0, and so has a factor that cannot be scored. ValueError: no
    factor can be scored, or the tables do not belong together.
    """
    codes, factors = check_tables(codes, factors)
    usable, notes = usable_factors(factors)
    n = len(codes)
    live = live_codes(codes)
    standard = (codes - codes.mean(axis=0)) / np.where(live, codes.std(axis=0), 1)
    total = (standard**2).sum(axis=0) / (n - 1)  # (N,)

    shares = np.zeros((codes.shape[1], factors.shape[1]))  # (N, F)
    for j in usable:
        values = np.unique(factors[:, j])
        within = 0
        for value in values:
            of_value = standard[factors[:, j] == value]  # (n', N)
            within += ((of_value - of_value.mean(axis=0)) ** 2).sum(axis=0)
        within = within / (n - len(values))  # (N,)
        shares[live, j] = 1 - within[live] / total[live]
    return shares.clip(min=0)


def exchange(codes, others, tokens):
    """Codes (B, N) or (B, N, d) with these tokens taken from others, (B, ...) or (1, ...)."""
    changed = codes.clone()
    changed[:, tokens] = others[:, tokens]
    return changed


def draw(model, codes, noise, **options):
    """Codes (B, N) or (B, N, d) and z_T (B, ...) -> images; options: of model.sample."""
    tokens = batched(model.tokens, codes)
    return batched(lambda s, z: model.sample(s, noise=z, **options), tokens, noise)


def batched(function, *tensors):
    """function applied to 64 rows of the tensors at a time, the results joined."""
    parts = zip(*(tensor.split(64) for tensor in tensors))
    return torch.cat([function(*part) for part in parts])


def in_unit_range(images):
    """uint8 images -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def images_of_values(dataset, factors, j):
    """The images that have these factors (B, F), but every value of factor j in turn.

    -> (B, K, 3, S, S) in [-1, 1] for a factor of K values. ValueError if one does not exist.
    """
    size = dataset.factor_sizes[j]
    wanted = factors.repeat_interleave(size, dim=0)  # (B, F) -> (B * K, F)
    wanted[:, j] = torch.arange(size).repeat(len(factors))
    images = in_unit_range(dataset.images(dataset.find(wanted)))
    return images.unflatten(0, (-1, size))  # (B * K, 3, S, S) -> (B, K, 3, S, S)


# ---- TAD: the score of attributes ----------------------------------------------------------------
def tad(codes, attributes, captured=0.75, overlap=0.2):
    """Total AUROC difference (Yeats et al., NashAE, ECCV 2022), as a dict.

    codes       (n, N) or (n, N, d)
    attributes  (n, A), 0 and 1, or -1 and 1 as CelebA has them
    captured    an attribute counts if a code detects it with this AUROC or more ...
    overlap     ... and if no other attribute explains more than this share of its entropy

    "tad" is the sum, over the attributes that count, of the best AUROC minus the second best:
    random codes have 0, one code an attribute .5 for each. "captured" is the number of these,
    "counted" lists them, "auroc" (N, A) is the whole table. ValueError: one code, other values.
    """
    codes, attributes = check_tables(codes, attributes)
    if codes.shape[1] < 2:
        raise ValueError("TAD compares two codes, and there is one")
    if not (np.isin(attributes, (0, 1)).all() or np.isin(attributes, (-1, 1)).all()):
        raise ValueError(f"attributes has the values {np.unique(attributes)[:5]}; "
                         f"expected 0, 1 or -1, 1")
    positive = (attributes > 0).astype(np.float64)  # (n, A)

    both = np.stack([positive, 1 - positive], axis=2)  # (n, A) -> (n, A, 2)
    joint = np.tensordot(both, both, (0, 0)) / len(both)  # (A, 2, A, 2)
    shared = mutual_information(joint.transpose(0, 2, 1, 3))  # (A, A)
    entropies = np.diag(shared)  # what each tells of itself
    shared = shared - np.diag(entropies)
    explained = shared.max(axis=1) / np.maximum(entropies, 1e-12)  # (A,)

    area = auroc(codes, positive)  # (N, A)
    second, best = np.sort(area, axis=0)[-2:]  # (A,) each
    counts = (best >= captured) & (explained <= overlap)
    return {"tad": float((best - second)[counts].sum()), "captured": int(counts.sum()),
            "counted": np.flatnonzero(counts).tolist(), "auroc": area.tolist()}


def auroc(codes, attributes):
    """Areas (N, A) under the ROC curves of codes (n, N) as detectors of attributes (n, A), 0 or 1.

    The chance that a sample with the attribute has a larger code than one without it, exact by
    ranks (Mann-Whitney); equal codes count half. A detector may be turned: max(a, 1 - a).
    """
    positive = attributes.sum(axis=0)  # (A,)
    wins = ranks(codes).T @ attributes - positive * (positive + 1) / 2  # (N, A)
    pairs = positive * (len(codes) - positive)  # (A,)
    area = np.where(pairs > 0, wins / np.maximum(pairs, 1), 0.5)  # all or none have it: chance
    return np.maximum(area, 1 - area)


# ---- Distances between images --------------------------------------------------------------------
def to_tensor(images):
    """An array, tensor or list as a tensor. An array is copied, as torch refuses flipped views and
    other orders of bytes."""
    if isinstance(images, (list, tuple)) and any(torch.is_tensor(image) for image in images):
        return torch.stack([to_tensor(image) for image in images])
    if isinstance(images, np.ndarray):
        images = np.array(images, order="C")
        images = images.astype(images.dtype.newbyteorder("="))
    return torch.as_tensor(images)


def check_pair(x, y):
    """Two arrays or tensors as tensors of one dtype, float32 or float64, on x's device; ValueError
    unless they are batches (B, C, H, W) of one shape with floats in [0, 1]."""
    x = to_tensor(x)
    y = to_tensor(y)
    if x.shape != y.shape or x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"images of shape {tuple(x.shape)} and {tuple(y.shape)}; "
                         f"expected one shape (B, C, H, W), none of them 0")
    for images in (x, y):
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}; expected floats in [0, 1]")
        low, high = images.min(), images.max()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"images are {images.dtype} from {low:.4g} to {high:.4g}; "
                             f"expected floats in [0, 1]: (images + 1) / 2, clamped")

    dtype = torch.float32  # half precision is too coarse
    if torch.float64 in (x.dtype, y.dtype):
        dtype = torch.float64
    return x.to(dtype), y.to(x.device, dtype)


def mse(x, y):
    """Mean squared error (B,) of images (B, C, H, W) in [0, 1]: 0 if equal, two noises 1/6."""
    x, y = check_pair(x, y)
    return (x - y).square().mean((1, 2, 3))


def ssim(x, y):
    """Structural similarity (B,) of images (B, C, H, W) in [0, 1] (Wang et al., IEEE TIP 2004):
    equal images 1, noise about 0, at least -1. Zeros are padded at the border, as in the code
    behind Diff-AE's numbers, which the paper compares with; Wang et al. use only whole windows."""
    x, y = check_pair(x, y)
    if x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        raise ValueError(f"images of shape {tuple(x.shape)} seem to have their channels last; "
                         f"expected (B, C, H, W)")
    distance = torch.arange(-5, 6, dtype=x.dtype, device=x.device)
    bell = torch.exp(-distance ** 2 / (2 * 1.5 ** 2))  # Gaussian of sigma 1.5
    window = torch.outer(bell, bell) / bell.sum() ** 2  # (11, 11), sum 1
    channels = x.shape[1]
    window = window.expand(channels, 1, 11, 11)

    def local_mean(images):
        with torch.autocast(x.device.type, enabled=False):  # half precision is too coarse
            return functional.conv2d(images, window, padding=5, groups=channels)

    mean_x = local_mean(x)
    mean_y = local_mean(y)
    variance_x = local_mean(x * x) - mean_x * mean_x
    variance_y = local_mean(y * y) - mean_y * mean_y
    covariance = local_mean(x * y) - mean_x * mean_y

    # c1 and c2 keep the ratios finite where an image is black or flat.
    c1 = 0.01 ** 2
    c2 = 0.03 ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    bottom = (mean_x * mean_x + mean_y * mean_y + c1) * (variance_x + variance_y + c2)
    return (top / bottom).mean((1, 2, 3))


Convolution = collections.namedtuple("Convolution", "index stride padding pool_before")
# AlexNet's convolutions; index is their number in torchvision's `features`.
ALEXNET = (Convolution(0, 4, 2, False), Convolution(3, 1, 2, True), Convolution(6, 1, 1, True),
           Convolution(8, 1, 1, False), Convolution(10, 1, 1, False))


def load_lpips(alexnet_file, linear_file):
    """The weights of `lpips` as one dict of tensors, from two files that cannot be shipped:
    torchvision's alexnet-owt-7be5be79.pth and the lpips package's weights/v0.1/alex.pth. Only
    tensors are read, nothing is executed. OSError, ValueError: unreadable, or other files."""
    alexnet_keys = []
    for layer in ALEXNET:
        alexnet_keys += [f"features.{layer.index}.weight", f"features.{layer.index}.bias"]
    linear_keys = [f"lin{level}.model.1.weight" for level in range(len(ALEXNET))]

    weights = {}
    for path, keys in ((alexnet_file, alexnet_keys), (linear_file, linear_keys)):
        try:
            stored = torch.load(os.path.expanduser(path), "cpu", weights_only=True)
            for key in keys:
                weights[key] = stored[key].float()
        except OSError:
            raise
        except Exception:  # torch advises unsafe loading
            raise ValueError(f"{path} has no {keys[0]}: is it the other of the two files, a "
                             f"git-lfs pointer, or cut short?") from None
    return weights


def lpips(x, y, weights):
    """Learned perceptual distance (B,) of images (B, 3, H, W) in [0, 1], 32 x 32 pixels or more
    (Zhang et al., CVPR 2018): squared differences of AlexNet's features, scaled to unit length at
    each pixel, weighted as fitted to human judgements. 0 if equal, no upper end, mostly < 1.
    weights: of load_lpips."""
    x, y = check_pair(x, y)
    if x.shape[1] != 3 or min(x.shape[2:]) < 32:
        raise ValueError(f"images of shape {tuple(x.shape)}; expected (B, 3, H, W), 32 x 32 pixels "
                         "or more")
    # The mean and the spread of ImageNet's channels, for images in [-1, 1].
    shift = x.new_tensor((-0.030, -0.088, -0.188)).view(3, 1, 1)
    scale = x.new_tensor((0.458, 0.448, 0.450)).view(3, 1, 1)
    features = (2 * torch.cat([x, y]) - 1 - shift) / scale  # (2B, 3, H, W)

    total = 0
    for level, layer in enumerate(ALEXNET):
        if layer.pool_before:
            features = functional.max_pool2d(features, 3, 2)
        kernel = weights[f"features.{layer.index}.weight"].to(x)
        bias = weights[f"features.{layer.index}.bias"].to(x)
        with torch.autocast(x.device.type, enabled=False):  # half precision is too coarse
            features = functional.conv2d(features, kernel, bias, layer.stride, layer.padding)
        features = functional.relu(features)

        length = features.square().sum(1, keepdim=True).sqrt() + 1e-10
        a, b = (features / length).chunk(2)  # (2B, c, h, w) -> (B, c, h, w)
        linear = weights[f"lin{level}.model.1.weight"].to(x)  # (1, c, 1, 1)
        with torch.autocast(x.device.type, enabled=False):
            judged = functional.conv2d((a - b).square(), linear)  # (B, 1, h, w)
        total = total + judged.mean((1, 2, 3))
    return total


def frechet_distance(feats_a, feats_b):
    """Frechet distance of two sets of features (n, D) and (m, D), each taken as a Gaussian:
    |mean difference|^2 + trace(A + B - 2 (A B)^(1/2)), A and B the covariances. 0 for equal sets,
    no upper end. Biased upwards for few samples: compare only figures from equally many."""
    a = torch.from_numpy(to_floats(feats_a, "feats_a"))
    b = torch.from_numpy(to_floats(feats_b, "feats_b"))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"feats_a has shape {tuple(a.shape)}, feats_b {tuple(b.shape)}; expected "
                         f"(samples, features), equally wide, 2 samples or more")
    A = torch.atleast_2d(a.T.cov())  # (D, D)
    B = torch.atleast_2d(b.T.cov())

    # A B has the eigenvalues of the symmetric A^(1/2) B A^(1/2), whose roots sum to the trace.
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # A^(1/2)
    values = torch.linalg.eigvalsh(root @ B @ root)
    trace = A.trace() + B.trace() - 2 * values.clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + trace
    return max(0.0, float(distance))  # rounding may go below 0


def load_inception(path):
    """The network of `fid` from its file. OSError, ValueError: unreadable, or another file."""
    path = os.path.expanduser(path)
    with open(path, "rb"):  # the words of a system are clearer than torch's
        pass
    try:
        network = torch.jit.load(path, map_location="cpu").eval()
        with torch.no_grad():  # once, so that another network shows before any work
            features = network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), return_features=True)
        if features.shape[:-1] == (1,):
            return network
    except (RuntimeError, AttributeError):  # their words are for programmers
        pass
    raise ValueError(f"{path} is no TorchScript file of this network; expected NVIDIA's "
                     "inception-2015-12-05.pt")


def fid(images_a, images_b, inception_file, batch=64):
    """FID (Heusel et al., NeurIPS 2017) of two sets of uint8 images (n, 3, H, W) and (m, 3, H, W).

    inception_file: NVIDIA's TorchScript inception-2015-12-05.pt, which resizes the images itself.
    TorchScript is a program: run only a file you trust. Or what load_inception returns. The paper
    takes 10,000 images a side.
    """
    images_a = to_tensor(images_a)
    images_b = to_tensor(images_b)
    if not images_a.dtype == images_b.dtype == torch.uint8:
        raise ValueError(f"images are {images_a.dtype} and {images_b.dtype}; expected uint8")
    network = inception_file
    if not callable(network):
        network = load_inception(inception_file)
    network = network.to(images_a.device)

    features = []
    with torch.no_grad():
        for images in (images_a, images_b):
            parts = [network(part, return_features=True) for part in images.split(batch)]
            features.append(torch.cat(parts))  # (n, 2048)
    return frechet_distance(*features)


# ---- python metrics.py ---------------------------------------------------------------------------
def worked_example():
    """The six numbers of the trees, each step computed, and beside it what was found by hand."""
    codes = np.arange(1.0, 7.0)[:, None]  # (6, 1)
    labels = np.array([0, 0, 0, 1, 0, 1])
    trees = fit_trees(codes, labels, rounds=1, depth=1)
    tree = trees.rounds[0][0]
    p = probabilities(np.repeat(trees.start[:, None], 6, axis=1))[0]  # (6,)
    r = labels - p
    gain = split_gain(r.cumsum()[:5], np.arange(1, 6), r.sum(), 6)
    after = probabilities(trees.start + look_up(tree, codes.T)[None])[0]
    label = predict(fit_trees(codes, labels), codes)

    steps = [
        ("  code", codes[:, 0], "1 2 3 4 5 6"),
        ("  label", labels, "0 0 0 1 0 1"),
        ("1 p at the start", p, "1/3 1/3 1/3 1/3 1/3 1/3"),
        ("2 residual r = label - p", r, "-1/3 -1/3 -1/3 2/3 -1/3 2/3"),
        ("3 gain of a cut after 1 ... 5", gain, "2/15 1/3 2/3 1/12 8/15"),
        ("4 the best question: code <=", [tree.cut], "7/2"),
        ("5 value of left and right leaf", [tree.low, tree.high], "-3/20 3/20"),
        ("  p after this round", after, ".301 .301 .301 .367 .367 .367"),
        ("  label by 100 rounds, depth 3", label, "0 0 0 1 0 1")]
    print(f"{'':30}{'computed':44}by hand")
    for name, values, by_hand in steps:
        computed = "".join(f"{float(value):7.3g}" for value in values)
        print(f"{name:<30}{computed:44}{by_hand}")


def report(path, seed, dci_train, dci_test):
    """Prints all scores of the arrays `codes` and `factors` of an .npz file."""
    found = "no arrays"
    try:
        with np.load(path) as table:
            found = "the arrays " + ", ".join(table.files)
            codes = table["codes"]
            factors = table["factors"]
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception:  # a dozen kinds, whose words are for programmers or advise unsafe loading
        raise ValueError(f"{path} has {found}, or is damaged; expected codes and factors, numbers "
                         "or text but no Python objects, by np.savez(path, codes=codes, "
                         "factors=factors)") from None

    scores = evaluate(codes, factors, seed, dci_train, dci_test)
    tables = {
        "importance of each code (row) for each factor (column)": scores.pop("importance", []),
        "what each code (row) tells of each factor (column), NMI": scores.pop("nmi", []),
        "the share of each code's variance (row) that each factor explains (column)":
            scores.pop("variance_explained", []),
    }
    note = scores.pop("note")
    for name, value in scores.items():
        print(f"{name:<22}{round(value, 4)}")
    print("note:", note or "every score was computed")
    for heading, table in tables.items():
        print(heading)
        for code, row in enumerate(table):
            print(f"{code:4d} " + "".join(f"{value:6.2f}" for value in row))


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message):
        self.exit(2, f"metrics.py: {' '.join(str(message).split())}\n")  # without the usage


def main(arguments=None):
    """The command line: a table of scores, or without a file the worked example."""
    parser = Parser(description="Scores a table of codes, or explains the trees.")
    parser.add_argument("file", nargs="?", type=os.path.expanduser,
                        help=".npz of codes (n, N) or (n, N, d), factors (n, F)")
    parser.add_argument("--train", type=int, default=10_000, help="samples the trees learn from")
    parser.add_argument("--test", type=int, default=5_000, help="other samples, to test the trees")
    parser.add_argument("--seed", type=int, default=0, help="seed of votes, split and ties")
    if arguments is not None:
        arguments = [str(argument) for argument in arguments]
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
    except KeyboardInterrupt:
        parser.exit(130, "metrics.py: interrupted\n")


if __name__ == "__main__":
    main()

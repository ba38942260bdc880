"""Compare the scores of metrics.py with those of disentanglement_lib, on the same codes.

INSTALL   python -m venv scratch
          scratch/bin/pip install torch numpy scikit-learn six
          scratch/bin/pip install --no-deps disentanglement_lib==1.5
RUN       scratch/bin/python assets/compare_scores.py    (on Windows scratch/Scripts)
PRINTS    within three minutes

                               theirs   ours
          disentanglement      0.2962   0.2966
          completeness         0.2914   0.2915
          informativeness_test 0.5883   0.5869
          MIG                  0.1042   0.1042
          FactorVAE score      0.8562   0.8586

disentanglement_lib does not seed its trees, so the third digit of its DCI changes from run to
run. FactorVAE scores differ by the noise of the votes.
"""
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np

# disentanglement_lib imports gin and absl to read its settings. None of that is needed here.
gin = types.SimpleNamespace(configurable=lambda *_, **__: lambda function: function, REQUIRED=None)
sys.modules |= {"gin": gin, "gin.tf": mock.MagicMock(), "absl": mock.MagicMock()}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where metrics.py is

from disentanglement_lib.evaluation.metrics import dci, factor_vae, mig, utils  # noqa: E402

import metrics  # noqa: E402

SIZES = np.array([10, 10, 10, 8, 4, 15])  # values of each factor, as in Shapes3D


class Table:
    """A dataset whose images are its factors, for both libraries."""

    num_factors = len(SIZES)
    factor_sizes = SIZES

    def __len__(self):
        return SIZES.prod()

    def factors(self, rows):
        return np.stack(np.unravel_index(rows, SIZES), axis=1)

    images = factors

    # The same in the words of disentanglement_lib.
    def sample_factors(self, n, rng):
        return rng.randint(SIZES, size=(n, len(SIZES)))

    sample_observations = sample_factors

    def sample_observations_from_factors(self, factors, rng):
        return factors


def main():
    rng = np.random.RandomState(0)
    mixture = rng.normal(size=(6, 8)) * (rng.random((6, 8)) < 0.5)

    def represent(factors):
        """Factors (n, 6) -> eight codes, each a noisy mixture of about three factors: (n, 8)."""
        codes = np.tanh(2 * (factors / (SIZES - 1) - 0.5) @ mixture)
        return codes + 0.05 * rng.normal(size=codes.shape)

    dataset = Table()
    factors = dataset.sample_factors(4500, rng)
    codes = represent(factors)
    print(f"{'':20} theirs   ours")

    # DCI, of 3,000 samples to learn from and 1,500 to test on. Theirs takes (codes, n).
    parts = codes[:3000], factors[:3000], codes[3000:], factors[3000:]
    theirs = dci._compute_dci(*(part.T for part in parts))
    ours = metrics.dci(*parts)
    for name in ("disentanglement", "completeness", "informativeness_test"):
        print(f"{name:20} {theirs[name]:.4f}   {ours[name]:.4f}")

    # MIG, with 20 bins, which they set in a file of gin.
    utils.make_discretizer = lambda target: utils._histogram_discretize(target, 20)
    theirs = mig._compute_mig(codes.T, factors.T)["discrete_mig"]
    print(f"{'MIG':20} {theirs:.4f}   {metrics.mig(codes, factors):.4f}")

    # The FactorVAE score: batches of 64, 10,000 votes to learn from and 5,000 to test on.
    theirs = factor_vae.compute_factor_vae(dataset, represent, rng, None, 64, 10_000, 5_000, 10_000)
    ours = metrics.factor_vae_score(represent, dataset)
    print(f"{'FactorVAE score':20} {theirs['eval_accuracy']:.4f}   {ours['factor_vae']:.4f}")


if __name__ == "__main__":
    main()

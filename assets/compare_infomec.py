"""InfoMEC of metrics.py beside the file that its authors published to be copied.

    python -m venv scratch
    scratch/bin/pip install torch "numpy<2.4" "scikit-learn<1.8"
    git clone https://github.com/kylehkhsu/latent_quantization
    export PYTHONPATH=.:latent_quantization/disentangle/metrics
    scratch/bin/python assets/compare_infomec.py

With numpy 2.3.5 and scikit-learn 1.7.2 it prints what follows. Where a table has many equal codes,
both estimates of the information depend on the noise that parts them, which theirs draws anew.

                        InfoM           InfoC           InfoE
                        theirs  ours    theirs  ours    theirs  ours
perfect codes           0.9942  0.9904  0.9942  0.9905  0.9999  0.9998
                        largest difference in NMI 0.0083
linear mixture          0.4053  0.4053  0.2712  0.2712  0.9998  0.9998
                        largest difference in NMI 0.0000
tanh mixture, noise     0.6407  0.6407  0.6272  0.6273  0.6059  0.6055
                        largest difference in NMI 0.0000
ten discrete values     0.6238  0.6238  0.5911  0.5911  0.6279  0.6271
                        largest difference in NMI 0.0000
copies, dead codes      0.9919  0.9916  0.8275  0.8272  0.9999  0.9998
                        largest difference in NMI 0.0083
"""
import warnings

import numpy as np

import infomec
import metrics

warnings.filterwarnings("ignore")  # scikit-learn on its own options
SIZES = np.array([10, 10, 10, 8, 4, 15])  # of Shapes3D
rng = np.random.default_rng(0)
factors = rng.integers(SIZES, size=(4000, 6))
scaled = 2 * factors / (SIZES - 1) - 1
noise = rng.normal(size=(4000, 8))
mixture = rng.normal(size=(6, 8))
sparse = mixture * (rng.random((6, 8)) < 0.4)

perfect = scaled.copy()
linear = scaled @ mixture + 0.01 * noise
tanh = np.tanh(2 * scaled @ sparse) + 0.05 * noise
discrete = np.digitize(tanh, np.linspace(-0.9, 0.9, 9)).astype(float)
few = np.concatenate([scaled + 0.1 * noise[:, :6], scaled[:, :2], 1e-3 * noise], axis=1)
tables = [
    ("perfect codes", perfect, False),
    ("linear mixture", linear, False),
    ("tanh mixture, noise", tanh, False),
    ("ten discrete values", discrete, True),
    ("copies, dead codes", few, False)]

print(f"{'':24}{'InfoM':16}{'InfoC':16}InfoE")
print(f"{'':24}" + "theirs  ours    " * 3)
for name, codes, is_discrete in tables:
    theirs = infomec.compute_infomec(factors, codes, is_discrete)
    ours = metrics.infomec(codes, factors, is_discrete)
    line = f"{name:24}"
    for key in ("infom", "infoc", "infoe"):
        line += f"{theirs[key]:<8.4f}{ours[key]:<8.4f}"
    print(line)
    difference = np.abs(theirs["nmi"].T - ours["nmi"]).max()
    print(f"{'':24}largest difference in NMI {difference:.4f}")

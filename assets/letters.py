"""Draw the letters of assets/results.md: 129,600 images of one letter, into letters.npz.

INSTALL   nothing: pillow 10.1 or newer, with FreeType, and numpy are in requirements.txt
RUN       python assets/letters.py            (a minute)
PRINTS    letters.npz: 129600 images of letter 6, size 5, slant 5, x 6, y 6, ink 6, paper 4
THEN      python train.py --data letters.npz --out runs/letters-0
"""
import itertools

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LETTERS = "ABEKRS"
SIZES = np.linspace(24, 40, 5)  # in pixels
SLANTS = np.linspace(-0.4, 0.4, 5)  # pixels to the side for one pixel down
PLACES = np.linspace(22, 42, 6)  # of the letter's centre, along x and along y
INKS = [
    (220, 60, 50),
    (240, 180, 40),
    (60, 150, 60),
    (40, 160, 190),
    (60, 80, 200),
    (160, 60, 170),
]
PAPERS = [
    (250, 245, 230),
    (205, 225, 240),
    (120, 125, 130),
    (50, 40, 60),
]
FACTORS = {"letter": 6, "size": 5, "slant": 5, "x": 6, "y": 6, "ink": 6, "paper": 4}


def coverage(letter, size, slant, x, y):
    """How much of each pixel the letter covers: (64, 64) float32, 0 to 1."""
    mask = Image.new("L", (128, 128))  # drawn at twice the size, then made smaller
    font = ImageFont.load_default(2 * size)
    ImageDraw.Draw(mask).text((2 * x, 2 * y), letter, 255, font, "mm")
    about_its_centre = (1, slant, -slant * 2 * y, 0, 1, 0)
    mask = mask.transform(
        (128, 128), Image.Transform.AFFINE, about_its_centre, Image.Resampling.BILINEAR)
    mask = mask.resize((64, 64), Image.Resampling.BOX)
    return np.asarray(mask, np.float32) / 255


def main():
    ink = np.float32(INKS)[:, None, None, None, :]  # (6, 1, 1, 1, 3)
    paper = np.float32(PAPERS)[:, None, None, :]  # (4, 1, 1, 3)
    images = []
    for geometry in itertools.product(LETTERS, SIZES, SLANTS, PLACES, PLACES):
        alpha = coverage(*geometry)[:, :, None]  # (64, 64, 1)
        coloured = alpha * ink + (1 - alpha) * paper  # (6, 4, 64, 64, 3)
        coloured = coloured.round().astype(np.uint8)
        images.append(coloured.reshape(-1, 64, 64, 3))  # (6, 4, 64, 64, 3) -> (24, 64, 64, 3)
    images = np.concatenate(images)  # the last factor, paper, changes fastest

    sizes = tuple(FACTORS.values())
    factors = np.indices(sizes, np.uint8).reshape(len(sizes), -1).T  # (129600, 7)
    np.savez("letters.npz", images=images, factors=factors, factor_names=list(FACTORS))
    levels = ", ".join(f"{name} {size}" for name, size in FACTORS.items())
    print(f"letters.npz: {len(images)} images of {levels}")


if __name__ == "__main__":
    main()

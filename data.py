"""Datasets as pairs of images and factors: a rendered Shapes3D, and the files people have.

WHERE     read after metrics.py, before train.py. Imports numpy, torch, h5py, pillow; copy freely.
PAPER     arXiv 2402.09712v2, Sec. 4.1: Shapes3D, MPI3D, Cars3D, CelebA. No equation lives here.
SHAPES    B images, F factors, S image size (64 unless asked).  images (B, 3, S, S) uint8, 0..255;
          factors (B, F) int64: column j runs over 0 .. factor_sizes[j] - 1.
IDEA      3D Shapes is one room seen 480,000 times. Six factors number the images:
            ((((floor * 10 + wall) * 10 + object) * 8 + scale) * 4 + shape) * 15 + orientation
          Three are only colours, so we cast rays once for the 8 * 4 * 15 = 480 geometries, keep
          what light does to floor, wall and object apart, and paint any image on demand:
            floor plane * floor hue + wall plane * wall hue + object plane * object hue + the rest
          Any other dataset is converted once into an .npy file that is memory-mapped, because
          reading one image out of a compressed file costs the thousands packed around it.
DIFFERS   from the real 3D Shapes: the scene is fitted to fifty published images; tiles and stains
          are only suggested. What is not used of a dataset's files or labels, its note says.
TRY       python data.py                        what is rendered
          python data.py --grid grid.png        a picture of fifty images
          python data.py --data PATH            what is in there
"""
import argparse
import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import signal
import struct
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image, ImageOps

FACTORS = ("floor hue", "wall hue", "object hue", "scale", "shape", "orientation")
LEVELS = (np.linspace(0, 0.9, 10), np.linspace(0, 0.9, 10), np.linspace(0, 0.9, 10),
          np.linspace(0.75, 1.25, 8), np.arange(4.0), np.linspace(-30, 30, 15))
SIZES = tuple(len(levels) for levels in LEVELS)
TOTAL, GEOMETRIES = int(np.prod(SIZES)), int(np.prod(SIZES[3:]))    # 480,000 and 480
CUBE, CYLINDER, SPHERE, CAPSULE = range(4)                          # the official order

# ---- 1. A ray caster for one room --------------------------------------------------------------
# x points right, y up, z away from us; the object stands on the floor at the origin. Lengths are
# in edges of the cube at scale 1. All numbers were found by least squares on published images.
CAMERA = dict(distance=3.911, height=1.214, pitch=0.0403, focal=2.415)     # radians; half widths
ROOM, WALL = 4.158, 2.443                           # half the width of the square room, wall height
RADIUS = (0.5, 0.531, 0.605, 0.461)                 # of each shape at scale 1 (cube: half its edge)
TALL = (1.0, 1.083, 1.21, 1.839)                    # its height
SUN = np.array([-0.259, 1.0, 0.127]) / np.linalg.norm([-0.259, 1.0, 0.127])
SHADOW = 0.331                                      # the floor where the object hides the sun
LAMP, LAMP_LIGHT, LAMP_FALL = (-1.73, 5.43, 0.47), 1.272, 2.57     # fades along the floor
WALLS = (1.007, -0.0197), (0.929, -0.0789), (0.761, -0.0425)       # far, left, right: + x or z
OBJECT = (0.457, 0.504, 0.482, 0.115)               # ambient, from the camera, from above, gloss
GLOSS, GLOSS_EDGE = np.array([-0.26, 0.957, 0.129]), (15.5, 0.042)    # where from, how sharp
TILE, STAIN = 0.4, (1.45, -0.05)                    # width of a tile; corner of a stain's square
SKY = (153, 226, 249)
SUPERSAMPLE = 3                                     # rays per pixel and axis
# A fully saturated hue k/10 has channels that are multiples of one fifth: (0..5) / 5, integers.
FIFTHS = np.array([[5, 0, 0], [5, 3, 0], [4, 5, 0], [1, 5, 0], [0, 5, 2],
                   [0, 5, 5], [0, 2, 5], [1, 0, 5], [4, 0, 5], [5, 0, 3]], np.int16)
UNIT = 64                                           # planes count 1/64 grey levels in int16


def camera_rays(angle, n):
    """Where the eye is, (3,), and the unit directions of n * n rays, (3, n * n), row by row."""
    turn, tilt = np.deg2rad(-angle), CAMERA["pitch"]
    right = np.array([np.cos(turn), 0, -np.sin(turn)])
    ahead = np.array([np.sin(turn), 0, np.cos(turn)])
    up = np.array([0, 1.0, 0])
    eye = up * CAMERA["height"] - ahead * CAMERA["distance"]    # the camera circles the object
    forward = ahead * np.cos(tilt) - up * np.sin(tilt)
    upward = ahead * np.sin(tilt) + up * np.cos(tilt)
    c = (np.arange(n) + 0.5) / n * 2 - 1                        # pixel centres in -1..1
    across, down = np.outer(right, np.tile(c, n)), np.outer(upward, np.repeat(c, n))
    rays = CAMERA["focal"] * forward[:, None] + (across - down)         # (3, n * n)
    return eye, rays / np.linalg.norm(rays, axis=0)


# The root of a negative number is NaN, which fails every comparison and so counts as a miss.
def meet_round(o, d, r):
    """The smaller t with |o + t d| = r, in the axes given: three for a ball, two for a tube."""
    a, b, c = (d * d).sum(0), (o * d).sum(0), (o * o).sum(0) - r * r
    return (-b - np.sqrt(b * b - a * c)) / a


def meet_object(shape, scale, o, d):
    """The t (N,) at which rays o + t d first meet the object, else inf; o (3, N or 1), d (3, N)."""
    r, high = RADIUS[shape] * scale, TALL[shape] * scale
    if shape == CUBE:       # slabs: a ray is inside between its last entry and its first exit
        low, top = np.array([[-r, 0, -r], [r, high, r]])[:, :, None]
        one, two = (low - o) / d, (top - o) / d
        entry, leave = np.minimum(one, two).max(0), np.maximum(one, two).min(0)
        return np.where((entry > 0) & (entry <= leave), entry, np.inf)
    tube = meet_round(o[[0, 2]], d[[0, 2]], r)
    y = o[1] + tube * d[1]
    if shape == CYLINDER:
        lid = (high - o[1]) / d[1]
        x, z = o[0] + lid * d[0], o[2] + lid * d[2]
        met = [(tube, (y >= 0) & (y <= high)), (lid, x * x + z * z <= r * r)]
    else:                   # two balls and a tube between them, which a sphere has no room for
        balls = [meet_round(o - [[0], [centre], [0]], d, r) for centre in (r, high - r)]
        met = [(balls[0], True), (balls[1], True), (tube, (y >= r) & (y <= high - r))]
    return np.min([np.where((t > 0) & inside, t, np.inf) for t, inside in met], 0)


def object_normal(shape, scale, p):
    """The outward unit normal (3, N) at points p on the object."""
    r, high = RADIUS[shape] * scale, TALL[shape] * scale
    if shape == CUBE:                       # the face whose axis is furthest out
        out = np.stack([p[0] / r, p[1] / high * 2 - 1, p[2] / r])       # (3, N)
        return np.sign(out) * (np.abs(out) == np.abs(out).max(0))
    if shape == CYLINDER:
        lid = p[1] > high * (1 - 1e-6)
        return np.stack([np.where(lid, 0, p[0] / r), lid * 1.0, np.where(lid, 0, p[2] / r)])
    axis = np.clip(p[1], r, high - r)       # nearest point of the axis, of a sphere the centre
    return np.stack([p[0], p[1] - axis, p[2]]) / r              # 3 (N,) -> (3, N)


def texture(u, v):
    """Faint hexagonal tiles everywhere; on the walls a slanting stain in every square of them."""
    k = 4 * np.pi / (np.sqrt(3) * TILE)
    tiles = np.cos(k * v) + 2 * np.cos(k * u * np.sqrt(3) / 2) * np.cos(k * v / 2)
    u, v = (u - STAIN[0]) / WALL % 1 - 0.5, (v - STAIN[1]) / WALL - 0.5
    return 1 + 0.007 * tiles - 0.08 * np.exp(-((u + v) / 0.09) ** 2 - ((u - v) / 0.22) ** 2)


def room_light(eye, rays):
    """What rays meet in the empty room: part (0 sky, 1 floor, 2 wall), t, light; place (3, N)."""
    with np.errstate(divide="ignore"):
        t = np.stack([-eye[1] / rays[1], (ROOM - eye[2]) / rays[2],
                      (-ROOM - eye[0]) / rays[0], (ROOM - eye[0]) / rays[0]])
    t[t <= 0] = np.inf                      # behind us
    side, t = t.argmin(0), t.min(0)         # 0 floor, 1 far wall, 2 left wall, 3 right wall
    p = x, y, z = eye[:, None] + t * rays
    to_lamp = np.sqrt((x - LAMP[0]) ** 2 + (y - LAMP[1]) ** 2 + (z - LAMP[2]) ** 2)
    light = np.choose(side, [LAMP_LIGHT * (LAMP[1] / to_lamp) ** LAMP_FALL,
                             *(a + b * along for (a, b), along in zip(WALLS, (x, z, z)))])
    light *= texture(np.where(side < 2, x, z), np.where(side == 0, z - 9, y))    # no stain at z - 9
    return np.where(side == 0, 1, np.where(y < WALL, 2, 0)), t, light, p


def light_planes(shape, scale, eye, rays, room):
    """(6, N): brightness of floor, wall, object, then red, green, blue that no hue changes."""
    part, t_room, light, p = room
    planes = np.zeros((6, len(part)))
    planes[0], planes[1] = np.where(part == 1, light, 0), np.where(part == 2, light, 0)
    planes[3:] = np.where(part == 0, np.array(SKY)[:, None] / 255, 0)
    # Shadow rays: where the way from the floor to the sun meets the object, little light is left.
    floor = np.flatnonzero(part == 1)
    planes[0, floor[meet_object(shape, scale, p[:, floor], SUN[:, None]) < np.inf]] = SHADOW
    t = meet_object(shape, scale, eye[:, None], rays)
    seen = np.flatnonzero(t < t_room)                           # rays that end on the object
    normal = object_normal(shape, scale, eye[:, None] + t[seen] * rays[:, seen])
    facing = np.maximum(-(normal * rays[:, seen]).sum(0), 0)    # a light that rides on the camera
    above = GLOSS @ normal                      # (3,) @ (3, N) -> (N,): one high on the left
    planes[:, seen] = 0
    planes[2, seen] = OBJECT[0] + OBJECT[1] * facing + OBJECT[2] * np.maximum(above, 0)
    planes[3:, seen] = OBJECT[3] * np.clip(GLOSS_EDGE[0] * above - GLOSS_EDGE[1], 0, 1)
    return planes


def render_planes(size):
    """(480, 6, size * size) int16, in 1 / UNIT grey levels; the first three per fifth of colour.
    Rays are cast finer and shrunk, as for the real images: their edges ring like Lanczos."""
    n, unit = size * SUPERSAMPLE, 255 * UNIT / np.array([[5], [5], [5], [1], [1], [1]])
    planes = np.empty((GEOMETRIES, 6, size * size), np.int16)
    for view, angle in enumerate(LEVELS[5]):
        eye, rays = camera_rays(angle, n)
        room = room_light(eye, rays)
        for k, (scale, shape) in enumerate(itertools.product(LEVELS[3], range(SIZES[4]))):
            with np.errstate(all="ignore"):                     # rays that miss: NaN and inf
                fine = light_planes(shape, scale, eye, rays, room).astype(np.float32)
            small = [Image.fromarray(plane).resize((size, size), Image.LANCZOS)
                     for plane in fine.reshape(6, n, n)]
            planes[k * SIZES[5] + view] = np.rint(np.stack(small).reshape(6, -1) * unit)
    return planes


# ---- 2. Datasets -------------------------------------------------------------------------------
@dataclasses.dataclass
class Dataset:
    """What training needs to know of any dataset; without labels the tuples are empty."""
    name: str
    count: int
    size: int
    factor_names: tuple = ()
    factor_sizes: tuple = ()
    attribute_names: tuple = ()         # a dataset has factors or attributes, not both
    note: str = ""                      # what of its files or labels is not used, and why
    table: np.ndarray = None            # (count, F or 40): the factors or attributes
    pixels: np.ndarray = None           # (count, 3, size, size) uint8, mapped from disk

    def __len__(self):
        return self.count

    def __str__(self):
        labels = ", ".join(f"{n} {k}" for n, k in zip(self.factor_names, self.factor_sizes))
        labels = f"factors {labels}" if labels else "no factors"
        if self.attribute_names:
            labels += f", {len(self.attribute_names)} attributes"
        about = f"{self.name}: {self.count:,} images of {self.size}x{self.size}, {labels}"
        return f"{about}; {self.note}" if self.note else about

    def add_note(self, text):
        self.note += "; " * bool(self.note) + text

    def images(self, indices):
        """(B, 3, S, S) uint8."""
        return torch.from_numpy(self.pixels[np.asarray(indices)])

    def factors(self, indices):
        """(B, F) int64."""
        return self.attributes(indices)[:, :len(self.factor_names)]

    def attributes(self, indices):
        """(B, 40) int64, 0 or 1, of CelebA."""
        return torch.from_numpy(self.table[np.asarray(indices)]).long()

    def find(self, factors):
        """factors (B, F) integers -> (B,) int64, for each row the first image that has them, in any
        order of the set. ValueError names a combination that no image has."""
        first = {tuple(levels): row for row, levels in reversed([*enumerate(self.table.tolist())])}
        try:
            return np.array([first[tuple(row)] for row in np.asarray(factors).tolist()], int)
        except KeyError as error:
            raise ValueError(f"{self.name}: no image has {self.factor_names} = {error}") from None

    @property
    def identity(self):
        """What tells this dataset from others wherever it lies, for JSON. The digest is of all
        labels and 64 images; of no rendered image, as another machine may round one differently."""
        some = np.unique(np.linspace(0, self.count - 1, 64).astype(int))
        pixels = b"rendered" if self.pixels is None else self.pixels[some].tobytes()
        digest = hashlib.sha256(pixels + np.asarray(self.table, "<i4").tobytes()).hexdigest()[:16]
        return {"count": self.count, "size": self.size, "factor_names": list(self.factor_names),
                "factor_sizes": list(self.factor_sizes), "digest": digest}


class RenderedShapes3D(Dataset):
    """All 480,000 images, coloured on demand from the planes of the 480 geometries."""
    def __init__(self, size=64):
        super().__init__("rendered Shapes3D", TOTAL, size, FACTORS, SIZES, table=grid(SIZES))
        self.planes = render_planes(size)

    def images(self, indices):
        rows = np.asarray(indices)
        hues = FIFTHS[self.table[rows, :3]]                     # (B, 3 surfaces, 3 channels)
        out = np.empty((len(rows), 3, self.size ** 2), np.uint8)
        for at in range(0, len(rows), 16):      # sixteen at a time stay in the processor's cache
            some = slice(at, at + 16)
            planes = self.planes[rows[some] % GEOMETRIES]       # (16, 6, S * S)
            image = planes[:, 3:]
            for k in range(3):                                  # floor, wall, object
                image += planes[:, k, None] * hues[some, k, :, None]
            out[some] = np.clip((image + UNIT // 2) // UNIT, 0, 255)    # rounded to nearest
        return torch.from_numpy(out.reshape(-1, 3, self.size, self.size))   # -> (B, 3, S, S)


def grid(sizes):
    """(n, F): every combination of factors once, the last one turning fastest."""
    return np.indices(sizes, np.int32).reshape(len(sizes), -1).T        # (F, *sizes) -> (n, F)


def open_dataset(path=None, size=64, cache=None):
    """The dataset at path; None is the rendered Shapes3D. A file or folder is converted on first
    use, into two files beside it or in the folder `cache`; later it opens at once. ValueError or
    OSError, in one line, for what cannot be read or written."""
    if size not in (32, 64, 128):
        raise ValueError(f"image size {size}; expected 32, 64 or 128")
    if path is None:
        return RenderedShapes3D(size)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist; expected a dataset file or a folder")
    where = Path(path).resolve()
    with reading(path):
        files, note = files_below(where) if where.is_dir() else ([where], "")
        seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        stamp = hashlib.sha256(ascii(seen).encode()).hexdigest()    # changes if the source does
    place = f"{zlib.crc32(os.fsencode(where)):08x}-" if cache else ""    # names alone may be equal
    target = Path(cache or where.parent, f"{place}{where.name}.{size}.cache")
    caches = [Path(f"{target}.{ending}") for ending in ("npy", "npz")]
    dataset = read_cache(*caches, stamp)
    if dataset is None:
        with reading(path):
            found, blocks = (found_folder(where, size, files, note) if where.is_dir()
                             else found_file(where, size))
        convert(found, blocks, *caches, stamp)
        dataset = read_cache(*caches, stamp)
    return dataset


@contextlib.contextmanager
def reading(path):
    """Turns whatever a file provokes in its readers (h5py, zipfile, Pillow...) into one line."""
    try:
        yield
    except Exception as error:
        hint = "" if isinstance(error, ValueError) else "; expected a complete, closed file"
        raise ValueError(f"{path} cannot be read: {str(error) or repr(error)}{hint}") from None


def say(text):
    """print, but it cannot fail: the terminal may be unable to show a name, or be gone (`| head`),
    and neither is a reason to stop hours of work."""
    coding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(str(text).encode(coding, "backslashreplace").decode(coding), flush=True)
    except (OSError, ValueError):       # what is not written yet goes nowhere, too
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- 3. Any picture, any numbers. Skip on first reading, down to the command line. --------------
def decode(picture):
    """A PIL picture of any mode -> (h, w) or (h, w, 3 or 4) uint8, as a viewer shows it: upright as
    its EXIF says, and the first of several frames."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode[0] not in "IF":
        return np.asarray(picture.convert("RGBA" if picture.has_transparency_data else "RGB"))
    grey = np.asarray(picture)                  # of more than 8 bits, or floating point
    sixteen = picture.mode[0] == "I" and grey.min() >= 0 and grey.max() <= 65535
    return to_bytes(grey, *((0, 65535) if sixteen else limits([grey])))


def limits(blocks):
    """The numbers that mean black and white in these arrays: the first pair below that holds all
    values, whatever the array is called; else their own least and greatest."""
    low, high = np.inf, -np.inf
    for block in blocks:
        known = np.nan_to_num(block, posinf=0, neginf=0)
        low, high = min(low, known.min()), max(high, known.max())
        if block.dtype == np.uint8 and high > 1:
            break                               # so the rest cannot matter, and may be gigabytes
    bits = (10, 12, 14, 16) if block.dtype.kind in "iu" else ()         # a camera's
    for black, white in [(0, 1), (-0.5, 0.5), (-1, 1), (0, 255), *((0, 2 ** b - 1) for b in bits)]:
        slack = (white - black) / 1000          # what resizing or rounding may have added
        if black - slack <= low and high <= white + slack:
            return black, white
    return low, high


def to_bytes(values, black, white):
    """Numbers of any type -> uint8: black becomes 0, white 255. What is not a number is black."""
    if values.dtype == np.uint8 and (black, white) == (0, 255):
        return values
    values = np.nan_to_num(values.astype(np.float32), nan=black).clip(black, white)
    scale = np.float32(255 / (float(white) - float(black) or 1))
    return np.rint((values - np.float32(black)) * scale).astype(np.uint8)


def shrink(block, size, how=Image.LANCZOS):
    """(b, h, w) or (b, h, w, 1 to 4) uint8 -> (b, 3, size, size), of each the middle square. A
    second or fourth channel is opacity, and white lies behind."""
    count, h, w = block.shape[:3]
    block = block.reshape(count, h, w, -1)                      # (b, h, w) -> (b, h, w, 1)
    if block.shape[3] in (2, 4):
        opacity = block[..., -1:] / np.float32(255)
        block = np.rint(block[..., :-1] * opacity + 255 * (1 - opacity)).astype(np.uint8)
    block = np.broadcast_to(block, (count, h, w, 3))            # grey -> (.., 3)
    side, top, left = min(h, w), max(h - w, 0) // 2, max(w - h, 0) // 2
    block = block[:, top:top + side, left:left + side]
    if side != size:
        block = np.stack([Image.fromarray(image).resize((size, size), how) for image in block])
    return block.transpose(0, 3, 1, 2)                          # (b, S, S, 3) -> (b, 3, S, S)


def add_labels(found, labels, names=()):
    """labels (n,), (n, F), one-hot (n, K) or columns with names (a structured array, an HDF5 group)
    of any type: each column becomes a factor, if its values can be numbered; else the note says
    why not. ValueError: there is not one row an image."""
    fields = list(labels) if isinstance(labels, h5py.Group) else labels.dtype.names
    if fields:
        names, columns = fields, [np.asarray(labels[field]) for field in fields]
    else:
        table = np.squeeze(labels[()])
        one_hot = table.ndim == 2 and table.dtype.kind in "biuf" and np.isin(table, (0, 1)).all()
        if one_hot and (table.sum(1) == 1).all():
            names, table = ["class"], table.argmax(1)           # (n, K) -> (n,)
        columns = list(table.T) if table.ndim == 2 else [table]
    if {column.shape for column in columns} != {(found.count,)}:
        raise ValueError(f"shape {getattr(labels, 'shape', '')}; expected {found.count:,} rows")
    if len(names) != len(columns):
        if len(names) and names is not DSPRITES:
            found.add_note(f"factor_names not used: {len(names)} names for {len(columns)} factors")
        rooms = len(columns) == 6 and all(                      # of 3D Shapes, all or some
            one.dtype.kind == "f" and np.isin(one.astype(float).round(4), levels.round(4)).all()
            for one, levels in zip(columns, LEVELS))
        names = FACTORS if rooms else [f"factor {j}" for j in range(len(columns))]
    factors, refused = [], []                   # (name, number of levels, level of each image)
    for name, column in zip(names, columns):
        name = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
        try:
            factors.append((name, *number(column)))
        except (TypeError, ValueError) as error:
            refused.append(f"{name} ({error})")
    found.factor_names, found.factor_sizes, table = zip(*factors) if factors else ((), (), ())
    found.table = np.reshape(table, (len(factors), found.count)).T              # -> (n, F)
    name, names, sizes = GRIDS.get(found.count, ("", (), None))
    if found.factor_sizes == sizes:
        found.name, found.factor_names = name, names
    elif refused:
        found.add_note("no factor: " + ", ".join(refused))


def number(column):
    """(n,) labels -> how many different values there are and, (n,), which one each label has, in
    their order. ValueError, in a few words, if that makes no factor."""
    if column.dtype.kind == "f":
        column = column.astype(float)
        if not np.isfinite(column).all():
            raise ValueError("has gaps")
        if (column % 1).any():                  # what differs by rounding alone is one level
            column = np.round(column / (np.ptp(column) or 1), 6)
    levels, numbers = np.unique(column, return_inverse=True)
    if len(levels) == 1:
        raise ValueError("never varies")
    if len(levels) > len(column) * 3 / 4:       # a measurement, or the image's own number
        raise ValueError("nearly as many values as images")
    return len(levels), numbers


# ---- 4. HDF5 and .npz files --------------------------------------------------------------------
# Full grids that come without labels, told apart by their number of images; last factor fastest.
MPI3D = ("object colour", "object shape", "object size", "camera height", "background colour",
         "horizontal axis", "vertical axis")
DSPRITES = ("colour", "shape", "scale", "orientation", "x", "y")    # all are white
GRIDS = {TOTAL: ("Shapes3D", FACTORS, SIZES),
         1036800: ("MPI3D", MPI3D, (6, 6, 2, 3, 3, 40, 40)),    # toy, realistic, real
         460800: ("MPI3D", MPI3D, (4, 4, 2, 3, 3, 40, 40)),     # complex, and older releases
         17568: ("Cars3D", ("elevation", "azimuth", "object"), (4, 24, 183)),
         737280: ("dSprites", DSPRITES[1:], (3, 6, 40, 32, 32))}
IMAGE_KEYS = ("images", "imgs", "image")
LABEL_KEYS = ("factors", "labels", "label", "latents_classes", "latents/classes", "classes")
BLOCK = 1 << 25                                                 # bytes read at a time


def found_file(path, size):
    """The Dataset in an HDF5 or .npz file, not yet converted, with its labels if it has any; and
    its images in order, as blocks (b, 3, size, size) uint8."""
    if not path.is_file() or not (h5py.is_hdf5(path) or zipfile.is_zipfile(path)):
        start = path.open("rb").read(24) if path.is_file() else "no file"
        raise ValueError(f"it is no complete HDF5 or .npz file, no folder of pictures, but {start}")
    arrays = h5py.File(path) if h5py.is_hdf5(path) else np.load(path)
    key, shape = find_images(arrays)
    found = Dataset(path.stem, shape[0], size, table=np.zeros((shape[0], 0)))
    find_labels(found, arrays)

    def blocks():
        with reading(path):
            rows = lambda: itertools.islice(read_rows(arrays, key), 1, None)
            black, white = limits(rows())
            for block in rows():
                if len(shape) == 4 and shape[1] <= 4 < shape[3]:
                    block = block.transpose(0, 2, 3, 1)         # (b, c, h, w) -> (b, h, w, c)
                yield shrink(to_bytes(block, black, white), size)

    return found, blocks()


def read_rows(arrays, key):
    """Of an array in an open HDF5 or .npz file: its shape and type, then its rows in blocks of some
    megabytes.  numpy would decompress the 12 GB of MPI3D as a whole."""
    if isinstance(arrays, h5py.File):
        array = arrays[key]
        yield array.shape, array.dtype
        step = (array.chunks or [1])[0]         # a chunk cut in two would be decompressed twice
        step *= max(1, BLOCK // (step * array[:1].nbytes))
        yield from (array[at:at + step] for at in range(0, len(array), step))
        return
    with arrays.zip.open(key + ".npy") as file:
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        yield shape, dtype
        if fortran:                             # an order that can only be read as a whole
            yield arrays[key]
            return
        row = np.dtype((dtype, shape[1:]))
        while block := file.read(max(1, BLOCK // row.itemsize) * row.itemsize):
            yield np.frombuffer(block, row)     # (b, *shape[1:])


def find_images(arrays):
    """-> (name, shape) of the images in a file: named as in IMAGE_KEYS, or alone in their shape."""
    held, fit = {}, []
    for key in arrays:
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):  # it is no array
            shape, dtype = held[key] = next(read_rows(arrays, key))
            layout = len(shape) == 3 or len(shape) == 4 and min(shape[1], shape[3]) <= 4
            if layout and dtype.kind in "biuf" and 0 not in shape:
                fit.append(key)
    fit = [key for key in IMAGE_KEYS if key in fit][:1] or fit
    if len(fit) != 1:
        known = [f"{k} {held[k][1]} {held[k][0]}" if k in held else k for k in arrays]
        raise ValueError(f"it holds {', '.join(known[:9]) or 'nothing'}; expected 'images', numbers"
                         " of shape (n, h, w), (n, h, w, 1 to 4) or (n, 1 to 4, h, w)")
    return fit[0], held[fit[0]][0]


def find_labels(found, arrays):
    """Adds the first labels of a file that can be numbered; a full set that we know needs none.
    Whatever is wrong with labels, the images can be used: the note says what is not used."""
    keys = [key for key in LABEL_KEYS if key in arrays]
    if not keys and found.count in GRIDS:
        add_labels(found, grid(GRIDS[found.count][2]))
    elif not keys:
        found.add_note(f"no labels ({', '.join(LABEL_KEYS)}), and no full set that we know")
    for key in keys:
        names = DSPRITES if key.startswith("latents") else ()
        try:
            hdf5 = isinstance(arrays, h5py.File)
            for place in [arrays, arrays.attrs, arrays[key].attrs] if hdf5 else [arrays]:
                names = np.ravel(place["factor_names"]) if "factor_names" in place else names
        except Exception as error:
            found.add_note(f"factor_names not used: {error}")
        try:
            add_labels(found, arrays[key], names)
        except Exception as error:
            found.add_note(f"{key} not used: {error}")
        if found.factor_names:
            break


# ---- 5. Folders: pictures, CelebA, Cars3D ------------------------------------------------------
PICTURES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".avif", ".webp", ".gif", ".bmp",
            ".tif", ".tiff", ".tga", ".ppm", ".pgm", ".pbm", ".pnm")
ATTRIBUTES = ("list_attr_celeba.txt", "list_attr_celeba.csv")
USEFUL = (*PICTURES, "_mesh.mat", "list.txt", *ATTRIBUTES)      # endings of files that we read
CELEBA_SHAPE, CELEBA_CROP = (218, 178), np.s_[57:185, 25:153]               # rows, columns
NO_DATA = ("__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir")    # hidden, but without a dot


def files_below(folder):
    """-> the useful files in a folder, sorted, and a note of what is left out. Follows links to
    folders, but enters each folder once: a link upwards would never end."""
    files, left, unreadable = [], collections.Counter(), []
    entered = {str(parent) for parent in folder.parents}
    for here, folders, names in os.walk(folder, onerror=unreadable.append, followlinks=True):
        run = "config.json" in names and ("checkpoint.pt" in names or "lock" in names)
        left["folders of runs"] += run          # their pictures are of a dataset, not in it
        if run or os.path.realpath(here) in entered:
            folders.clear()
            continue
        entered.add(os.path.realpath(here))
        shown = {n for n in folders + names if not n.startswith(".") and n not in NO_DATA}
        left["hidden files or folders"] += len(folders) + len(names) - len(shown)
        folders[:] = sorted(shown & {*folders})
        useful = [Path(here, name) for name in shown & {*names} if name.lower().endswith(USEFUL)]
        useful = [file for file in useful if os.path.isfile(file)]      # no link to nothing
        left["other files"] += len(shown) - len(folders) - len(useful)
        files += useful
    # CelebA's list of labels may lie beside the images or, as Kaggle packs it, a level higher.
    files += [parent / name for parent in folder.parents[:2] for name in ATTRIBUTES
              if os.path.isfile(parent / name)]
    left["unreadable folders"] = len(unreadable)
    note = ", ".join(f"{kind} ({count})" for kind, count in left.items() if count)
    return sorted(files, key=str), f"left out: {note}" if note else ""


def found_folder(path, size, files, note):
    """Like found_file: a folder of pictures, of CelebA if its list names them all; or Cars3D."""
    cars = {file.stem: file for file in files if file.name.endswith("_mesh.mat")}
    order = [Path(name).stem for file in files if file.name == "list.txt"
             for name in file.read_text().split()]              # the folder's own order differs
    lists = [file for file in files if file.name in ATTRIBUTES]
    files = ([cars[name] for name in dict.fromkeys([*order, *cars]) if name in cars]
             or [file for file in files if file.name.lower().endswith(PICTURES)])
    if not files:
        raise ValueError(f"it holds no pictures ({' '.join(PICTURES)}) and no car_*_mesh.mat; "
                         f"{note or 'it is empty'}")
    found = Dataset(path.name, len(files), size, note=note, table=np.zeros((len(files), 0)))
    if cars:
        found.name, found.count = "Cars3D", 96 * len(files)
        add_labels(found, grid((len(files), 4, 24))[:, [1, 2, 0]], GRIDS[17568][1])
    elif lists:
        add_attributes(found, lists[0], files)

    def blocks():
        good, bad = np.ones(len(files), bool), 0
        for k, file in enumerate(files):
            try:
                yield read_images(file, size, crop=found.attribute_names)
            except Exception as error:      # Pillow raises whatever its many decoders raise
                good[k], bad = False, bad + 1
                say(f"left out {file} ({error}), {bad} so far")
                if bad > max(1, len(files) // 100) or bad == len(files):
                    raise ValueError(f"{path}: {bad} of {k + 1} files cannot be read, the last "
                                     f"{file} ({error}); expected at most 1%") from None
        if bad:
            found.add_note(f"left out: damaged files ({bad})")
        found.table = found.table[good.repeat(len(found.table) // len(files))]

    return found, blocks()


def read_images(file, size, crop):
    """-> (1, 3, S, S) of a picture, cropped to the face if it is CelebA's and not a resized copy;
    (96, 3, S, S) of one of Cars3D's models, whose `im` is (h, w, 3, azimuth, elevation)."""
    if file.name.endswith(".mat"):
        im = read_mat(file)
        return shrink(im.transpose(4, 3, 0, 1, 2).reshape(96, *im.shape[:3]), size)
    with Image.open(file) as picture:
        image = decode(picture)
    if crop and image.shape[:2] == CELEBA_SHAPE:
        image = image[CELEBA_CROP]
    return shrink(image[None], size, Image.BILINEAR if crop else Image.LANCZOS)


def add_attributes(found, path, files):
    """CelebA's attributes, if the list has a row for every picture: .png copies of .jpg count. The
    .txt may begin with the number of images, the .csv begins with image_id."""
    text = path.read_text("utf-8-sig", "replace").replace("image_id,", "").replace(",", " ")
    lines = [line.split() for line in text.splitlines() if len(line.split()) > 1]
    names = lines[0] if lines else []
    rows = {Path(name).stem: values for name, *values in lines if len(values) == len(names)}
    missing = [file.name for file in files if file.stem not in rows]
    if missing:
        return found.add_note(f"{path.name} not used: it lacks {missing[0]}")
    found.name, found.attribute_names = "CelebA", tuple(names)
    found.table = np.array([rows[file.stem] for file in files]) == "1"


def read_mat(path):
    """The uint8 array `im` of a MATLAB file: of level 5, or of 7.3, which is HDF5."""
    if h5py.is_hdf5(path):
        with h5py.File(path) as f:
            return f["im"][()].T                                # MATLAB counts columns first
    for kind, body in mat_elements(path.read_bytes()[128:]):
        if kind == 15:                                          # miCOMPRESSED
            kind, body = next(mat_elements(zlib.decompress(body)))
        _, shape, label, values = [part for _, part in mat_elements(body)][:4]
        if label == b"im":
            return np.frombuffer(values, np.uint8).reshape(np.frombuffer(shape, "<i4"), order="F")
    raise ValueError("no array im")


def mat_elements(raw):
    """(type, bytes) of each element: an 8-byte tag, then the data padded to 8 bytes; up to four
    bytes of data sit in the tag itself, whose first half then holds size and type."""
    at = 0
    while at + 8 <= len(raw):
        kind, size = struct.unpack_from("<II", raw, at)
        at += 8
        if kind >> 16:
            kind, size, at = kind & 0xFFFF, kind >> 16, at - 4
        yield kind, raw[at:at + size]
        at += size if kind == 15 else size + -(at + size) % 8   # what is compressed has no padding


# ---- 6. Converting, once -----------------------------------------------------------------------
# A cache is two files of numpy's own: X.cache.npy are the images (n, 3, S, S) uint8, X.cache.npz
# the labels `table` (n, width) int32 and, as JSON, all else. Labels always belong to the images.
def read_cache(images, labels, stamp):
    """The dataset in a cache made from the source with this stamp; None: there is none yet."""
    if not labels.exists():
        return None
    try:
        with np.load(labels) as arrays:
            about, table = json.loads(str(arrays["about"])), arrays["table"]
        made_from = about.pop("stamp")
        about = {key: tuple(v) if isinstance(v, list) else v for key, v in about.items()}
        dataset = Dataset(**about, table=table, pixels=np.asarray(np.load(images, mmap_mode="r")))
    except Exception:                   # its words would advise unsafe loading
        raise ValueError(f"{images} or {labels.name} is in the way, no whole cache of ours; "
                         "delete both, or give --cache DIR") from None
    if made_from == stamp:
        return dataset
    say(f"{images} was made from another version of the data: converting again")
    return None


def convert(found, blocks, images, labels, stamp):
    """Write the cache's two files in a temporary folder, from which they move only if all goes
    well. Two processes at once do the work twice, but safely."""
    size, shape = found.count * 3 * found.size ** 2, (3, found.size, found.size)
    say(f"converting {found.name} to {images}: {found.count:,} images, {size / 1e9:.1f} GB")
    try:
        images.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(images.parent).free < size:
            raise OSError("the disk is full")
        with tempfile.TemporaryDirectory(".tmp", images.stem, images.parent, True) as folder:
            pixels, rest = Path(folder, "images.npy"), Path(folder, "labels.npz")
            with open(pixels, "wb") as f:
                f.seek(128)                                     # the size of numpy's header
                for block in blocks:
                    f.write(np.ascontiguousarray(block))
                found.count = len(found.table)                  # some may have been left out
                f.seek(0)
                np.lib.format.write_array_header_1_0(f, {
                    "descr": "|u1", "fortran_order": False, "shape": (found.count, *shape)})
            about = {**vars(found), "stamp": stamp}
            table, _ = about.pop("table"), about.pop("pixels")
            np.savez(rest, about=json.dumps(about), table=table.astype("<i4"))
            labels.unlink(missing_ok=True)      # never old labels beside new images
            os.replace(pixels, images)
            os.replace(rest, labels)
    except OSError as error:
        raise OSError(f"cannot write {images} ({error.strerror or error}); it takes "
                      f"{size / 1e9:.1f} GB, and --cache DIR converts elsewhere") from None


# ---- 7. Command line ---------------------------------------------------------------------------
def main():
    """The command line: one line on standard error and status 2 for what a user gets wrong."""
    parser = argparse.ArgumentParser(description="Look at a dataset, or at the rendered Shapes3D.")
    parser.add_argument("--data", metavar="PATH", help="dataset file or folder; default: rendered")
    parser.add_argument("--size", type=int, default=64, help="image size: 32, 64 or 128")
    parser.add_argument("--cache", metavar="DIR", help="for converted data; default: beside PATH")
    parser.add_argument("--grid", metavar="PNG", help="save fifty images as one picture")
    parser.error = lambda error: parser.exit(2, f"data.py: {' '.join(str(error).split())}\n")
    args = parser.parse_args()
    try:
        dataset = open_dataset(args.data, args.size, args.cache)
        say(dataset)
        if args.grid:
            images = dataset.images(np.linspace(0, len(dataset) - 1, 50).astype(int))
            sheet = images.unflatten(0, (5, 10)).permute(0, 3, 1, 4, 2)     # (5, S, 10, S, 3)
            Image.fromarray(sheet.flatten(0, 1).flatten(1, 2).numpy()).save(args.grid)
    except (OSError, ValueError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        parser.error("interrupted; nothing half-written is left")


if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGHUP):      # a kill or a closed terminal tidies up, too
        signal.signal(ending, signal.default_int_handler)
    main()

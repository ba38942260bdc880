"""Datasets as pairs of images and factors: a rendered Shapes3D, and the files people have.

WHERE     read after metrics.py, before train.py.  Imports: numpy, torch, h5py, pillow; copy it freely.
PAPER     arXiv 2402.09712, Sec. 5: Shapes3D, MPI3D, Cars3D, CelebA.  No equation lives here.
SHAPES    B images, F factors, S image size (64 unless asked).  images (B, 3, S, S) uint8, 0..255;
          factors (B, F) int64: column j runs over 0 .. factor_sizes[j] - 1.
IDEA      3D Shapes is one room seen 480,000 times.  Six factors number the images, the last one
          turning fastest:
            index = ((((floor * 10 + wall) * 10 + object) * 8 + scale) * 4 + shape) * 15 + orientation
          Three of them are only colours.  So we cast rays once for the 8 * 4 * 15 = 480 geometries,
          keep what light does to floor, wall and object apart, and paint any image on demand:
            image = floor plane * floor hue + wall plane * wall hue + object plane * object hue + rest
          Every other dataset is converted once into a plain file that is memory-mapped, because
          reading one image out of a compressed file costs the thousands packed around it.
DIFFERS   from the real 3D Shapes: the scene is measured from 50 published images (mean error there
          3 of 255 grey levels) and has no tiles on the floor and no stains on the walls.
          --limit N writes N images spread over all factors: the first N would share one floor hue.
TRY       python data.py                        index arithmetic, pixels, speed, and what to expect
          python data.py --grid grid.png        a picture of fifty images
          python data.py --write shapes3d.h5    the official file's format
          python data.py --data PATH            what is in there
"""
import argparse
import contextlib
import dataclasses
import errno
import json
import os
import shutil
import struct
import sys
import time
import zipfile
import zlib
from pathlib import Path
from typing import Callable

import h5py
import numpy as np
import torch
from PIL import Image

FACTORS = ("floor hue", "wall hue", "object hue", "scale", "shape", "orientation")
LEVELS = (np.linspace(0, 0.9, 10), np.linspace(0, 0.9, 10), np.linspace(0, 0.9, 10),
          np.linspace(0.75, 1.25, 8), np.arange(4.0), np.linspace(-30, 30, 15))
SIZES = tuple(len(levels) for levels in LEVELS)
TOTAL, GEOMETRIES = int(np.prod(SIZES)), int(np.prod(SIZES[3:]))    # 480,000 and 480
CUBE, CYLINDER, SPHERE, CAPSULE = range(4)                          # the official order

# ---- 1. A ray caster for one room --------------------------------------------------------------
# x points right, y up, z away from us; the object stands on the floor at the origin.  The numbers
# were found by least squares on published images.  Lengths are relative: only ratios can be seen.
CAMERA = dict(distance=4.5, height=1.384, pitch=0.0485, focal=2.393)    # radians; focal / half width
ROOM, WALL = 4.816, 2.774                           # half the width of the square room, wall height
RADIUS = (0.572, 0.610, 0.692, 0.526)               # of each shape at scale 1 (cube: half its width)
TALL = (1.157, 1.240, 2 * 0.692, 2.104)             # its height
SUN = np.array([-0.27, 1.0, 0.13]) / np.linalg.norm([-0.27, 1.0, 0.13])    # casts the hard shadow
LAMP = (-1.885, 7.095, 0.477)                       # the light that fades along the floor
SHADOW = 0.347                                      # brightness of the floor there
SKY = (153, 226, 249)
SUPERSAMPLE = 3                                     # rays per pixel and axis
# A fully saturated hue k/10 has channels that are multiples of one fifth: (0..5) / 5, integers.
FIFTHS = np.array([[5, 0, 0], [5, 3, 0], [4, 5, 0], [1, 5, 0], [0, 5, 2],
                   [0, 5, 5], [0, 2, 5], [1, 0, 5], [4, 0, 5], [5, 0, 3]], np.int16)
UNIT = 64                                           # planes count 1/64 grey levels in int16


def camera_rays(angle, n):
    """Where the eye is, (3,), and the unit directions of n * n rays, (n * n, 3), row by row."""
    turn, tilt = np.deg2rad(-angle), CAMERA["pitch"]
    right = np.array([np.cos(turn), 0, -np.sin(turn)])
    ahead = np.array([np.sin(turn), 0, np.cos(turn)])
    up = np.array([0, 1.0, 0])
    eye = up * CAMERA["height"] - ahead * CAMERA["distance"]    # the camera circles the object
    forward = ahead * np.cos(tilt) - up * np.sin(tilt)
    upward = ahead * np.sin(tilt) + up * np.cos(tilt)
    c = (np.arange(n) + 0.5) / n * 2 - 1                        # pixel centres in -1..1
    rays = CAMERA["focal"] * forward + c[None, :, None] * right - c[:, None, None] * upward
    rays = rays.reshape(-1, 3)                                  # (n, n, 3) -> (n * n, 3)
    return eye, rays / np.linalg.norm(rays, axis=1, keepdims=True)


# Each function below answers: at which t does the ray o + t d (both (N, 3), d of length 1) first
# meet the surface?  inf where it never does; a negative root is NaN, which no comparison lets pass.
def meet_ball(o, d, r, y):
    """|o + t d - centre|^2 = r^2, the smaller root of a quadratic in t."""
    oc = o - np.array([0, y, 0])
    b, c = (oc * d).sum(1), (oc * oc).sum(1) - r * r
    t = -b - np.sqrt(b * b - c)
    return np.where(t > 0, t, np.inf)


def meet_tube(o, d, r, low, high):
    """The same quadratic without y: an upright tube, kept where low <= y <= high."""
    a = d[:, 0] ** 2 + d[:, 2] ** 2
    b = o[:, 0] * d[:, 0] + o[:, 2] * d[:, 2]
    c = o[:, 0] ** 2 + o[:, 2] ** 2 - r * r
    t = (-b - np.sqrt(b * b - a * c)) / a
    y = o[:, 1] + t * d[:, 1]
    return np.where((t > 0) & (y >= low) & (y <= high), t, np.inf)


def meet_lid(o, d, r, y):
    """The plane at height y, kept within r of the axis."""
    t = (y - o[:, 1]) / d[:, 1]
    x, z = o[:, 0] + t * d[:, 0], o[:, 2] + t * d[:, 2]
    return np.where((t > 0) & (x * x + z * z <= r * r), t, np.inf)


def meet_box(o, d, r, high):
    """Slabs: a ray is inside the box between its last entry and its first exit."""
    one, two = (np.array([-r, 0, -r]) - o) / d, (np.array([r, high, r]) - o) / d
    entry, leave = np.minimum(one, two).max(1), np.maximum(one, two).min(1)
    return np.where((entry > 0) & (entry <= leave), entry, np.inf)


def meet_object(shape, scale, o, d):
    r, high = RADIUS[shape] * scale, TALL[shape] * scale
    if shape == CUBE:
        return meet_box(o, d, r, high)
    if shape == CYLINDER:
        return np.minimum(meet_tube(o, d, r, 0, high), meet_lid(o, d, r, high))
    ball = meet_ball(o, d, r, r)
    if shape == SPHERE:
        return ball
    return np.minimum(np.minimum(ball, meet_ball(o, d, r, high - r)),
                      meet_tube(o, d, r, r, high - r))


def object_normal(shape, scale, p):
    """The outward unit normal (N, 3) at points p on the object."""
    r, high = RADIUS[shape] * scale, TALL[shape] * scale
    middle = np.array([0, high / 2, 0])
    if shape == CUBE:                       # the face whose axis is furthest out
        out = (p - middle) / np.array([r, high / 2, r])
        return np.sign(out) * (np.abs(out) == np.abs(out).max(1, keepdims=True))
    if shape == CYLINDER:
        lid = p[:, 1:2] > high * (1 - 1e-6)
        return np.where(lid, [0, 1.0, 0], p * [1 / r, 0, 1 / r])
    axis = np.clip(p[:, 1], r, high - r)    # nearest point of the axis; for a sphere its centre
    return (p - axis[:, None] * [0, 1, 0]) / r


def room_light(eye, rays):
    """Which part of the empty room a ray meets (0 sky, 1 floor, 2 wall), where, and how bright."""
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.stack([-eye[1] / rays[:, 1], (ROOM - eye[2]) / rays[:, 2],
                      (-ROOM - eye[0]) / rays[:, 0], (ROOM - eye[0]) / rays[:, 0]])
    t[~(t > 0)] = np.inf                    # behind us
    side, t = t.argmin(0), t.min(0)         # 0 floor, 1 far wall, 2 left wall, 3 right wall
    p = eye + t[:, None] * rays
    to_lamp = np.linalg.norm(np.array(LAMP) - p, axis=1)
    light = np.choose(side, [1.25 * (LAMP[1] / to_lamp) ** 3,  # a small lamp: cosine over distance^2
                             1.003 - 0.0163 * p[:, 0],
                             0.689 - 0.0748 * (p[:, 2] - 3.4),
                             0.632 - 0.0387 * (p[:, 2] - 3.4)])
    part = np.where(side == 0, 1, np.where(p[:, 1] < WALL, 2, 0))
    return part, t, p, light


def object_light(normal, rays):
    """Colour brightness (N,) and white gloss (N,) of the object at points with this normal."""
    facing = np.maximum(-(normal * rays).sum(1), 0)             # a light that rides on the camera
    above = normal @ np.array([-0.405, 1.461, 0.165])           # and one over our left shoulder
    return (0.484 + 0.477 * facing + 0.300 * np.maximum(above, 0),
            0.118 * np.clip(6.21 * above - 0.089, 0, 1))


def light_planes(shape, scale, eye, rays, room):
    """(6, N): brightness of floor, wall, object, then red, green, blue that no hue changes."""
    part, t_room, p, light = room
    t = meet_object(shape, scale, np.broadcast_to(eye, rays.shape), rays)
    seen = np.flatnonzero(t < t_room)                           # rays that end on the object
    normal = object_normal(shape, scale, eye + t[seen, None] * rays[seen])
    planes = np.zeros((6, len(rays)))
    planes[0] = np.where(part == 1, light, 0)
    planes[1] = np.where(part == 2, light, 0)
    planes[3:] = np.where(part == 0, np.array(SKY)[:, None] / 255, 0)
    # Shadow rays: a floor point from which the way to the sun meets the object keeps this little.
    floor = np.flatnonzero(part == 1)
    blocked = meet_object(shape, scale, p[floor], np.broadcast_to(SUN, (len(floor), 3))) < np.inf
    planes[0, floor[blocked]] = SHADOW
    planes[:, seen] = 0
    planes[2, seen], planes[3:, seen] = object_light(normal, rays[seen])
    return planes


def render_planes(size):
    """(480, 6, size * size) int16, in units of 1 / UNIT grey level; the three brightness planes
    per fifth of colour.  Rays are cast finer and shrunk, as the real images seem to have been:
    their edges ring like Lanczos."""
    n, scale = size * SUPERSAMPLE, 255 * UNIT / np.array([5, 5, 5, 1, 1, 1])
    planes = np.empty((GEOMETRIES, 6, size * size), np.int16)
    for view, angle in enumerate(LEVELS[5]):
        eye, rays = camera_rays(angle, n)
        room = room_light(eye, rays)
        for g in range(view, GEOMETRIES, SIZES[5]):             # g = (scale * 4 + shape) * 15 + view
            with np.errstate(all="ignore"):                     # rays that miss: NaN and inf
                fine = light_planes(g // SIZES[5] % SIZES[4], LEVELS[3][g // SIZES[5] // SIZES[4]],
                                    eye, rays, room)
            for k, plane in enumerate(fine.astype(np.float32).reshape(6, n, n)):
                small = Image.fromarray(plane).resize((size, size), Image.LANCZOS)
                planes[g, k] = np.rint(np.asarray(small).ravel() * scale[k])    # (S, S) -> (S * S,)
    return planes


# ---- 2. Datasets -------------------------------------------------------------------------------
class Dataset:
    """What training needs to know of any dataset.  No labels: factor_names, factor_sizes are ()."""

    def __init__(self, name, count, size, factor_names=(), factor_sizes=(), attribute_names=()):
        self.name, self.count, self.size = name, count, size
        self.factor_names, self.factor_sizes = tuple(factor_names), tuple(factor_sizes)
        self.attribute_names = tuple(attribute_names)

    def __len__(self):
        return self.count

    def __str__(self):
        factors = ", ".join(f"{n} {k}" for n, k in zip(self.factor_names, self.factor_sizes))
        labels = f"factors {factors}" if factors else "no factors"
        if self.attribute_names:
            labels += f", {len(self.attribute_names)} attributes"
        return f"{self.name}: {self.count:,} images of {self.size}x{self.size}, {labels}"

    def rows(self, indices):
        rows = np.asarray(indices, np.int64).reshape(-1)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.count:
            raise IndexError(f"index {rows.min()}..{rows.max()}; {self.name} has 0..{self.count - 1}")
        return rows


class RenderedShapes3D(Dataset):
    def __init__(self, size=64):
        super().__init__("rendered Shapes3D", TOTAL, size, FACTORS, SIZES)
        self.planes = render_planes(size)

    def factors(self, indices):
        return torch.from_numpy(np.stack(np.unravel_index(self.rows(indices), SIZES), 1))   # (B, 6)

    def attributes(self, indices):
        return torch.empty(len(self.rows(indices)), 0, dtype=torch.int64)

    def images(self, indices):
        rows = self.rows(indices)
        floor, wall, thing = (FIFTHS[h][:, :, None] for h in np.unravel_index(rows, SIZES)[:3])
        out = np.empty((len(rows), 3, self.size ** 2), np.uint8)
        for at in range(0, len(rows), 16):      # sixteen at a time stay in the processor's cache
            b = slice(at, at + 16)
            planes = self.planes[rows[b] % GEOMETRIES]          # (16, 6, S * S)
            image = planes[:, 3:]
            image += planes[:, 0:1] * floor[b]
            image += planes[:, 1:2] * wall[b]
            image += planes[:, 2:3] * thing[b]
            image += UNIT // 2                                  # so that // rounds to nearest
            image //= UNIT
            out[b] = np.clip(image, 0, 255)
        return torch.from_numpy(out.reshape(-1, 3, self.size, self.size))   # (B, 3, S*S) -> (B, 3, S, S)


class CachedDataset(Dataset):
    """A converted file: images, then labels, then a description (see convert)."""

    def __init__(self, cache, about):
        super().__init__(about["name"], about["count"], about["size"], about["factor_names"],
                         about["factor_sizes"], about["attribute_names"])
        n, size, width = self.count, self.size, about["label_width"]
        self.pixels = np.memmap(cache, np.uint8, "r", 0, (n, 3, size, size))
        self.labels = np.zeros((n, 0), np.int32)
        if width:                                               # numpy cannot map zero bytes
            self.labels = np.memmap(cache, "<i4", "r", n * 3 * size * size, (n, width))

    def images(self, indices):
        return torch.from_numpy(np.asarray(self.pixels[self.rows(indices)]))

    def factors(self, indices):
        labels = self.labels[self.rows(indices)].astype(np.int64)
        return torch.from_numpy(labels if self.factor_names else labels[:, :0])

    def attributes(self, indices):
        labels = self.labels[self.rows(indices)].astype(np.int64)
        return torch.from_numpy(labels if self.attribute_names else labels[:, :0])


def open_dataset(path=None, size=64, cache=None):
    """The dataset at path; None is the rendered Shapes3D.  A file or folder is converted on first
    use, into a file beside it or in the folder `cache`; later it opens at once."""
    if size not in (32, 64, 128):
        raise ValueError(f"image size {size}; expected 32, 64 or 128")
    if path is None:
        return RenderedShapes3D(size)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a dataset file or a folder, "
                                "or no path at all for the rendered Shapes3D")
    stamp = fingerprint(path)
    target = cache_file(path, size, cache)
    about = read_about(target)
    if about is None or about["stamp"] != stamp:
        if about is not None:
            print(f"{target} was made from another version of {path}: converting again")
        convert(recognise(path), target, size, stamp)
        about = read_about(target)
    return CachedDataset(target, about)


# ---- 3. Recognising what people have -----------------------------------------------------------
# Full grids that come without labels, told apart by their number of images; last factor fastest.
MPI3D = ("object colour", "object shape", "object size", "camera height", "background colour",
         "horizontal axis", "vertical axis")
GRIDS = {TOTAL: ("Shapes3D", FACTORS, SIZES),
         1036800: ("MPI3D", MPI3D, (6, 6, 2, 3, 3, 40, 40)),    # toy, realistic, real
         460800: ("MPI3D", MPI3D, (4, 4, 2, 3, 3, 40, 40)),     # real complex, older releases
         17568: ("Cars3D", ("elevation", "azimuth", "object"), (4, 24, 183)),
         737280: ("dSprites", ("shape", "scale", "orientation", "x", "y"), (3, 6, 40, 32, 32))}
CAR_MODELS, CAR_VIEWS = 183, (24, 4)                            # azimuths, elevations in one .mat
IMAGE_KEYS = ("images", "imgs", "image")
LABEL_KEYS = ("factors", "labels", "label", "latents_classes", "latents/classes")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
ATTRIBUTE_FILES = ("list_attr_celeba.txt", "list_attr_celeba.csv")
CELEBA_SIZE, CELEBA_CROP = (178, 218), (25, 57, 153, 185)       # left, top, right, bottom
BLOCK = 1 << 25                                                 # bytes read at a time


class DataError(ValueError):
    """Something about the given data that its owner has to put right; one line."""


@dataclasses.dataclass
class Found:
    """A recognised dataset before conversion.  blocks(size) yields (b, 3, size, size) uint8 in
    order; labels (n, F) are complete only after the last block, for images may be skipped."""
    name: str
    count: int
    blocks: Callable
    factor_names: tuple = ()
    factor_sizes: tuple = ()
    labels: np.ndarray = None
    attribute_names: tuple = ()


@contextlib.contextmanager
def reading(path):
    """Whatever goes wrong inside is the file's fault, and is told in one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} cannot be read ({reason}); expected a complete file that no other "
                        "program is writing: copy or download it again") from None


def files_below(folder):
    """[(path, bytes, time)] of all files in a folder and its subfolders, sorted, without hidden
    ones (macOS leaves a ._001.jpg beside each 001.jpg)."""
    folders, files = [folder], []
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif not entry.name.startswith("."):
                    info = entry.stat()
                    files.append((entry.path, info.st_size, info.st_mtime_ns))
    return sorted(files)


def fingerprint(path):
    """Changes whenever the source does: number of files, their bytes, the newest time."""
    files = files_below(path) if path.is_dir() else []
    extra = attribute_file(path) if files else path
    if extra:
        files.append((str(extra), extra.stat().st_size, extra.stat().st_mtime_ns))
    return [len(files), sum(f[1] for f in files), max((f[2] for f in files), default=0)]


def recognise(path):
    if path.is_dir():
        files = [Path(f[0]) for f in files_below(path)]
        cars = [f for f in files if f.name.endswith("_mesh.mat")]
        return found_cars(path, cars) if cars else found_pictures(path, files)
    with reading(path), open(path, "rb") as f:
        start = f.read(8)
    if start == b"\x89HDF\r\n\x1a\n":
        return found_arrays(path, Hdf5File(path))
    if start[:4] == b"PK\x03\x04":
        return found_arrays(path, NpzFile(path))
    raise DataError(f"{path} begins with {start[:4]}; expected HDF5 (.h5), .npz or a folder")


class Hdf5File:
    def __init__(self, path):
        self.path, self.arrays = path, {}
        with reading(path), h5py.File(path) as f:
            f.visititems(lambda key, item: self.arrays.update({key: (item.shape, item.dtype)})
                         if isinstance(item, h5py.Dataset) else None)

    def load(self, key):
        with reading(self.path), h5py.File(self.path) as f:
            return f[key][()]

    def stream(self, key, rows):
        with reading(self.path), h5py.File(self.path) as f:
            # Whole chunks only: a chunk cut by a block border would be decompressed twice.
            chunk = f[key].chunks[0] if f[key].chunks else 1
            rows = -(-rows // chunk) * chunk
            for at in range(0, len(f[key]), rows):
                yield f[key][at:at + rows]


class NpzFile:
    """np.load would decompress an array as a whole, 12 GB for MPI3D; a zip member is a stream."""

    def __init__(self, path):
        self.path, self.arrays = path, {}
        with reading(path), zipfile.ZipFile(path) as z:
            for member in z.namelist():
                with z.open(member) as f:
                    self.arrays[member.removesuffix(".npy")] = self.header(f)

    def header(self, f):
        read = (np.lib.format.read_array_header_1_0 if np.lib.format.read_magic(f) == (1, 0)
                else np.lib.format.read_array_header_2_0)
        shape, column_major, dtype = read(f)
        if column_major and len(shape) > 1:
            raise DataError(f"{self.path} is in column-major order; save it from a C-ordered array")
        return shape, dtype

    def load(self, key):
        with reading(self.path), np.load(self.path, allow_pickle=False) as f:
            return f[key]

    def stream(self, key, rows):
        with (reading(self.path), zipfile.ZipFile(self.path) as z, z.open(key + ".npy") as f):
            shape, _ = self.header(f)
            each = int(np.prod(shape[1:]))
            for at in range(0, shape[0], rows):
                b = min(rows, shape[0] - at)
                raw = f.read(b * each)
                if len(raw) < b * each:
                    raise EOFError(f"{key} ends at image {at + len(raw) // each} of {shape[0]}")
                yield np.frombuffer(raw, np.uint8).reshape(b, *shape[1:])


def found_arrays(path, file):
    key = next((k for k in IMAGE_KEYS if k in file.arrays), None)
    if key is None:
        raise DataError(f"{path} holds {sorted(file.arrays)}; expected an array 'images'")
    shape, dtype = file.arrays[key]
    channels_last = len(shape) == 3 or len(shape) == 4 and shape[3] in (1, 3)
    channels_first = len(shape) == 4 and not channels_last and shape[1] in (1, 3)
    if dtype != np.uint8 or not (channels_last or channels_first) or 0 in shape:
        raise DataError(f"{path}: {key} is {dtype} {shape}; expected uint8 of shape (n, h, w), "
                        "(n, h, w, 1 or 3) or (n, 1 or 3, h, w)")

    def blocks(size):
        for block in file.stream(key, max(1, BLOCK // int(np.prod(shape[1:])))):
            if channels_first:
                block = block.transpose(0, 2, 3, 1)             # (b, c, h, w) -> (b, h, w, c)
            yield shrink(block * 255 if key == "imgs" else block, size)     # dSprites: 0 and 1

    found = Found(path.stem, shape[0], blocks)
    label_key = next((k for k in LABEL_KEYS if k in file.arrays), None)
    if label_key:
        read_labels(path, found, label_key, file.load(label_key))
    elif found.count in GRIDS:
        found.name, found.factor_names, found.factor_sizes = GRIDS[found.count]
        found.labels = np.stack(np.unravel_index(np.arange(found.count), found.factor_sizes), 1)
    elif "mpi3d" in path.stem.lower() or "real3d" in path.stem.lower():
        raise DataError(f"{path} holds {found.count:,} images; MPI3D has 1,036,800 or 460,800")
    return found


def read_labels(path, found, key, values):
    """Any column of labels becomes a factor with levels 0 .. k - 1, unless it never varies."""
    if values.shape[:1] != (found.count,) or values.ndim > 2:
        raise DataError(f"{path}: {key} has shape {values.shape}; expected one row for each of the "
                        f"{found.count:,} images")
    values = values.reshape(found.count, -1)                    # (n,) -> (n, 1)
    if values.shape[1] == len(FACTORS) and all(
            np.isclose(column[:, None], levels, atol=1e-5).any(1).all()
            for column, levels in zip(values.T, LEVELS)):
        # Official Shapes3D values, whose levels are known even if a small file misses some.
        found.name, found.factor_names, found.factor_sizes = GRIDS[TOTAL]
        found.labels = np.stack([np.abs(column[:, None] - levels).argmin(1)
                                 for column, levels in zip(values.T, LEVELS)], 1)
        return
    if values.dtype.kind not in "iub":
        raise DataError(f"{path}: {key} is {values.dtype}; expected integers, one per factor")
    columns = [np.unique(column, return_inverse=True) for column in values.T]
    columns = [(len(levels), index) for levels, index in columns if len(levels) > 1]
    if columns:
        found.factor_sizes = tuple(size for size, _ in columns)
        found.labels = np.stack([index for _, index in columns], 1)
        name, names, sizes = GRIDS.get(found.count, (None, None, None))
        if sizes == found.factor_sizes:
            found.name, found.factor_names = name, names
        else:
            found.factor_names = tuple(f"factor {j}" for j in range(len(columns)))


def found_cars(path, files):
    """Reed et al.: car_*_mesh.mat, each `im` (h, w, 3, azimuth, elevation) of one model."""
    order = files[0].parent / "list.txt"
    if order.exists():
        with reading(order):
            names = [line.removesuffix(".mat") + ".mat" for line in order.read_text().split()]
        files = [order.parent / name for name in names]
        missing = [f.name for f in files if not f.exists()]
        if missing:
            raise DataError(f"{path}: {len(missing)} of the files in {order.name} are missing, first "
                            f"{missing[0]}; unpack nips2015-analogy-data.tar.gz again")
    if len(files) != CAR_MODELS:
        raise DataError(f"{path} holds {len(files)} car_*_mesh.mat; expected {CAR_MODELS}")

    def blocks(size):
        for file in files:
            with reading(file):
                im = read_mat(file, "im")
            if im.dtype != np.uint8 or im.ndim != 5 or im.shape[2:] != (3, *CAR_VIEWS):
                raise DataError(f"{file}: im is {im.dtype} {im.shape}; expected uint8 "
                                f"(h, w, 3, {CAR_VIEWS[0]}, {CAR_VIEWS[1]})")
            im = im.transpose(4, 3, 0, 1, 2)                    # -> (elevation, azimuth, h, w, 3)
            yield shrink(im.reshape(-1, *im.shape[2:]), size)   # -> (96, h, w, 3)

    _, names, sizes = GRIDS[17568]
    index = np.indices((len(files), *sizes[:2])).reshape(3, -1).T       # (n, 3) object, el., az.
    return Found("Cars3D", len(index), blocks, names, (*sizes[:2], len(files)), index[:, [1, 2, 0]])


def read_mat(path, name):
    """One array of a MATLAB file: level 5, or 7.3, which is HDF5."""
    if h5py.is_hdf5(path):
        with h5py.File(path) as f:
            return f[name][()].T                                # MATLAB counts columns first
    raw = memoryview(path.read_bytes())
    order = {b"IM": "<", b"MI": ">"}[bytes(raw[126:128])]
    for kind, body in mat_elements(raw[128:], order):
        if kind == 15:                                          # miCOMPRESSED
            kind, body = next(mat_elements(memoryview(zlib.decompress(body)), order))
        if kind == 14:                                          # miMATRIX: flags, shape, name, data
            (_, flags), (_, shape), (_, label), (_, data) = list(mat_elements(body, order))[:4]
            if bytes(label).decode() == name:
                if flags[0 if order == "<" else 3] != 9:
                    raise ValueError(f"{name} is not uint8")
                return np.frombuffer(data, np.uint8).reshape(np.frombuffer(shape, order + "i4"),
                                                             order="F")
    raise KeyError(f"no array {name}")


def mat_elements(raw, order):
    """(type, bytes) of each element: an 8-byte tag, then the data padded to 8 bytes; up to four
    bytes of data sit in the tag itself, whose first half then holds size and type."""
    at = 0
    while at + 8 <= len(raw):
        kind, size = struct.unpack_from(order + "II", raw, at)
        if kind >> 16:
            yield kind & 0xFFFF, raw[at + 4:at + 4 + (kind >> 16)]
            at += 8
        else:
            yield kind, raw[at + 8:at + 8 + size]
            at += 8 + (size if kind == 15 else -(-size // 8) * 8)       # compressed: no padding


def attribute_file(folder):
    """CelebA's labels lie in, beside, or (as Kaggle packs them) two levels above the images."""
    places = (folder.resolve(), *folder.resolve().parents[:2])
    return next((p / n for p in places for n in ATTRIBUTE_FILES if (p / n).is_file()), None)


def read_attributes(path):
    """-> names, {file name: row of 0 and 1}.  The .txt may start with the number of images; the
    .csv's first line starts with image_id."""
    lines = [line.replace(",", " ").split() for line in path.read_text().splitlines()]
    lines = [line for line in lines if line]
    head = 1 if lines and lines[0][0].isdecimal() else 0
    names = [n for n in lines[head] if n != "image_id"]
    table = {}
    for line in lines[head + 1:]:
        if len(line) != len(names) + 1 or not set(line[1:]) <= {"1", "-1"}:
            raise DataError(f"{path}: the line of {line[0]} has {len(line) - 1} values; expected "
                            f"{len(names)}, each 1 or -1")
        table[line[0]] = [value == "1" for value in line[1:]]
    return tuple(names), table


def found_pictures(path, files):
    """A folder of pictures; CelebA if its attribute file is there."""
    files = [f for f in files if f.suffix.lower() in PICTURES]
    if not files:
        raise DataError(f"{path} holds no pictures ({' '.join(PICTURES)}) and no car_*_mesh.mat")
    found = Found(path.resolve().name, len(files), None)
    attributes = attribute_file(path)
    if attributes:
        with reading(attributes):
            found.name, (found.attribute_names, table) = "CelebA", read_attributes(attributes)
        unknown = [f.name for f in files if f.name not in table]
        if unknown:
            raise DataError(f"{attributes} has no line for {unknown[0]} and {len(unknown) - 1} more "
                            "pictures; expected one for each")
        found.labels = np.array([table[f.name] for f in files])

    def blocks(size):
        kept, bad = [], []
        for row, file in enumerate(files):
            try:
                with Image.open(file) as picture:
                    picture = picture.convert("RGB")
                if attributes and picture.size != CELEBA_SIZE:
                    raise ValueError(f"{picture.size}, expected {CELEBA_SIZE}")
            except Exception as error:      # Pillow raises whatever its many decoders raise
                bad.append(file)
                print(f"skipped {file} ({' '.join(str(error).split())})")
                if len(bad) > max(1, len(files) // 100):
                    raise DataError(f"{path}: {len(bad)} of the first {row + 1} pictures cannot be "
                                    f"read, first {bad[0]}; expected at most one in a hundred")
                continue
            kept.append(row)
            yield np.asarray(fit(picture, size, attributes))[None].transpose(0, 3, 1, 2)
        if bad:
            print(f"{len(bad)} of {len(files):,} pictures could not be read and are left out")
        if found.labels is not None:
            found.labels = found.labels[kept]

    found.blocks = blocks
    return found


def fit(picture, size, celeba=None):
    """The middle square at the wanted size.  CelebA's crop and filter are the authors'."""
    if celeba:
        picture, how = picture.crop(CELEBA_CROP), Image.BILINEAR
    else:
        side, how = min(picture.size), Image.LANCZOS
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
    return picture if picture.size == (size, size) else picture.resize((size, size), how)


def shrink(block, size):
    """(b, h, w) or (b, h, w, c) uint8 -> (b, 3, size, size)."""
    block = block.reshape(*block.shape[:3], -1)                 # (b, h, w) -> (b, h, w, 1)
    if block.shape[1:3] != (size, size):
        block = np.stack([np.asarray(fit(Image.fromarray(x.squeeze(-1) if x.shape[2] == 1 else x),
                                         size)).reshape(size, size, -1) for x in block])
    block = block.transpose(0, 3, 1, 2)                         # (b, h, w, c) -> (b, c, h, w)
    return np.repeat(block, 3, 1) if block.shape[1] == 1 else block


# ---- 4. Converting, once -----------------------------------------------------------------------
# A cache is: images (n, 3, S, S) uint8, labels (n, width) int32, a description in JSON, and as the
# last 16 bytes the description's length and MAGIC.  What was cut short has no such end.
MAGIC = b"imgcache"


def cache_file(path, size, cache):
    path = path.resolve()
    if cache is None:
        return path.parent / f"{path.name}.{size}.cache"
    tag = zlib.crc32(str(path).encode())                        # two 3dshapes.h5 can share a cache
    return Path(cache) / f"{path.name}-{tag:08x}.{size}.cache"


def read_about(target):
    """The description in a cache, None if there is no cache.  Trusts nothing it does not check."""
    if not target.exists():
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), open(target, "rb") as f:
        end = f.seek(0, os.SEEK_END)
        f.seek(end - 16)
        length, magic = struct.unpack("<Q8s", f.read(16))
        f.seek(end - 16 - length)
        about = json.loads(f.read(length))
        each = 3 * about["size"] ** 2 + 4 * about["label_width"]
        if magic == MAGIC and end == about["count"] * each + length + 16:
            return about
    raise ValueError(f"{target} is in the way: it is not a whole cache made by this program; "
                     "delete it, or choose another folder with --cache DIR")


def convert(found, target, size, stamp):
    width = 0 if found.labels is None else found.labels.shape[1]
    show = progress(f"converting {found.name} to {target}", found.count)
    count = 0
    with replacing(target, found.count * (3 * size * size + 4 * width)) as temporary:
        with open(temporary, "wb") as f:
            for block in found.blocks(size):
                f.write(np.ascontiguousarray(block))
                count += len(block)
                show(count)
            if width:
                f.write(np.ascontiguousarray(found.labels, "<i4"))
            about = dict(name=found.name, count=count, size=size, label_width=width, stamp=stamp,
                         factor_names=found.factor_names, factor_sizes=found.factor_sizes,
                         attribute_names=found.attribute_names)
            text = json.dumps(about).encode()
            f.write(text + struct.pack("<Q8s", len(text), MAGIC))


@contextlib.contextmanager
def replacing(path, size_hint):
    """Gives a temporary name beside path, which becomes path only if all goes well; so path never
    holds half a file.  Two processes at once do the work twice, but safely."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob("*.tmp"):                   # left behind by a killed process
            if old.name.startswith(path.name) and time.time() - old.stat().st_mtime > 600:
                old.unlink()
        if shutil.disk_usage(path.parent).free < size_hint:
            raise OSError(errno.ENOSPC, "full")
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if getattr(error, "errno", 0) == errno.ENOSPC or "No space left" in str(error):
            raise OSError(f"no room for {path}, about {size_hint / 1e9:.2f} GB; free some space or "
                          "choose another disk (--cache DIR)") from None
        if isinstance(error, OSError):
            raise OSError(f"cannot write {path} ({error.strerror or error}); choose a folder that "
                          "can be written (--cache DIR)") from None
        raise


def progress(what, total):
    start = last = time.perf_counter()
    live = sys.stdout.isatty()

    def show(done):
        nonlocal last
        now = time.perf_counter()
        if done < total and now - last < (0.5 if live else 15):
            return
        last, rate = now, done / max(now - start, 1e-9)
        print(f"{what}: {done:,}/{total:,} images, {rate:,.0f}/s, {(total - done) / rate:.0f} s left",
              end="\r" if live and done < total else "\n", flush=True)
    return show


# ---- 5. Writing the official format ------------------------------------------------------------
STEP = 296657       # has no factor in common with 480,000 and is close to its golden section


def spread(count):
    """`count` of the 480,000 indices, in order, that visit every level of every factor early."""
    return np.sort(np.arange(count) * STEP % TOTAL)


def write_shapes3d(path, limit=None):
    """The rendered set as 3dshapes.h5: images uint8 (n, 64, 64, 3), labels float64 (n, 6)."""
    path, count = Path(path), TOTAL if limit is None else limit
    if not 1 <= count <= TOTAL:
        raise ValueError(f"--limit {count}; expected 1 to {TOTAL}")
    if path.exists() or not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: it exists already, or its folder does not; "
                         "give a new name in an existing folder")
    dataset, indices = RenderedShapes3D(), spread(count)
    labels = [levels[column] for levels, column in zip(LEVELS, dataset.factors(indices).numpy().T)]
    show = progress(f"writing {path}", count)
    with replacing(path, count * 1000) as temporary, h5py.File(temporary, "w") as f:
        f["labels"] = np.stack(labels, 1)                       # (n, 6)
        images = f.create_dataset("images", (count, 64, 64, 3), np.uint8, compression="gzip",
                                  chunks=(min(count, 120), 64, 64, 3))
        for at in range(0, count, 1200):
            block = dataset.images(indices[at:at + 1200]).numpy()
            images[at:at + 1200] = block.transpose(0, 2, 3, 1)  # (b, 3, 64, 64) -> (b, 64, 64, 3)
            show(at + len(block))


# ---- 6. Command line ---------------------------------------------------------------------------
def save_grid(dataset, path):
    """Fifty images spread over the whole set, ten in a row."""
    indices = np.arange(50) * STEP % len(dataset)
    images = dataset.images(indices).numpy().reshape(5, 10, 3, dataset.size, dataset.size)
    grid = images.transpose(0, 3, 1, 4, 2).reshape(5 * dataset.size, 10 * dataset.size, 3)
    Image.fromarray(grid).save(path)                            # (rows, y, columns, x, channel)
    print(f"wrote {path}")


def show_work(dataset):
    """A few seconds of everything, with what to expect."""
    print(f"image 123456 has factors {dataset.factors([123456])[0].tolist()}"
          "    (expected [2, 5, 7, 1, 2, 6])")
    image = dataset.images([123456])[0]
    for what, y, x, expected in (("sky", 4, 32, "153 226 249"), ("wall", 28, 8, "cyan"),
                                 ("floor", 60, 8, "yellow-green"), ("object", 40, 32, "violet")):
        r, g, b = image[:, y, x].tolist()
        print(f"its {what} at row {y}, column {x} is {r} {g} {b}    (expected {expected})")
    start, rng = time.perf_counter(), np.random.default_rng(0)
    for _ in range(100):
        dataset.images(rng.integers(TOTAL, size=64))
    rate = 6400 / (time.perf_counter() - start)
    print(f"random batches of 64: {rate:,.0f} images/s    (expected 8,000 or more)")


def main():
    parser = argparse.ArgumentParser(description="Look at a dataset, or render Shapes3D to a file.")
    parser.error = lambda message: (_ for _ in ()).throw(ValueError(message))   # one line, below
    parser.add_argument("--data", metavar="PATH", help="dataset file or folder; default: rendered")
    parser.add_argument("--size", type=int, default=64, help="image size: 32, 64 or 128")
    parser.add_argument("--cache", metavar="DIR", help="folder for converted data; default: beside it")
    parser.add_argument("--grid", metavar="PNG", help="save fifty images as one picture")
    parser.add_argument("--write", metavar="H5", help="write the rendered set as 3dshapes.h5")
    parser.add_argument("--limit", type=int, help="with --write: this many images, spread evenly")
    try:
        args = parser.parse_args()
        if args.write:
            write_shapes3d(args.write, args.limit)
            return
        dataset = open_dataset(args.data, args.size, args.cache)
        print(dataset)
        if args.grid:
            save_grid(dataset, args.grid)
        elif args.data is None:
            show_work(dataset)
    except (OSError, ValueError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

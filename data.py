"""Datasets as pairs of images and factors: a rendered Shapes3D, and the files people have.

WHERE     read after metrics.py, before train.py.  Imports numpy, torch, h5py, pillow; copy freely.
PAPER     arXiv 2402.09712v2, Sec. 4.1: Shapes3D, MPI3D, Cars3D, CelebA.  No equation lives here.
SHAPES    B images, F factors, S image size (64 unless asked).  images (B, 3, S, S) uint8, 0..255;
          factors (B, F) int64: column j runs over 0 .. factor_sizes[j] - 1.
IDEA      3D Shapes is one room seen 480,000 times.  Six factors number the images, the last one
          turning fastest:
            ((((floor * 10 + wall) * 10 + object) * 8 + scale) * 4 + shape) * 15 + orientation
          Three of them are only colours.  So we cast rays once for the 8 * 4 * 15 = 480 geometries,
          keep what light does to floor, wall and object apart, and paint any image on demand:
            floor plane * floor hue + wall plane * wall hue + object plane * object hue + the rest
          Every other dataset is converted once into a plain file that is memory-mapped, because
          reading one image out of a compressed file costs the thousands packed around it.
DIFFERS   from the real 3D Shapes: the scene is fitted to fifty published images; tiles and stains
          are only suggested.
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
# x points right, y up, z away from us; the object stands on the floor at the origin.  Lengths are
# in edges of the cube at scale 1.  All numbers were found by least squares on published images.
CAMERA = dict(distance=3.911, height=1.214, pitch=0.0403, focal=2.415)     # radians; half widths
ROOM, WALL = 4.158, 2.443                           # half the width of the square room, wall height
RADIUS = (0.5, 0.531, 0.605, 0.461)                 # of each shape at scale 1 (cube: half its edge)
TALL = (1.0, 1.083, 1.21, 1.839)                    # its height
SUN = np.array([-0.259, 1.0, 0.127]) / np.linalg.norm([-0.259, 1.0, 0.127])
SHADOW = 0.331                                      # the floor where the object hides the sun
LAMP, LAMP_LIGHT, LAMP_FALL = (-1.73, 5.43, 0.47), 1.272, 2.57     # fades along the floor
FAR_WALL, LEFT_WALL, RIGHT_WALL = (1.007, -0.0197), (0.929, -0.0789), (0.761, -0.0425)   # + x or z
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
    across, down = np.tile(c, n), np.repeat(c, n)               # (n * n,)
    rays = np.outer(CAMERA["focal"] * forward, np.ones(n * n))  # (3, n * n)
    rays += np.outer(right, across) - np.outer(upward, down)
    return eye, rays / np.linalg.norm(rays, axis=0)


# The root of a negative number is NaN, which fails every comparison and so counts as a miss.
def meet_round(o, d, r):
    """The smaller t with |o + t d| = r, in the axes given: three for a ball, two for a tube."""
    a, b, c = (d * d).sum(0), (o * d).sum(0), (o * o).sum(0) - r * r
    return (-b - np.sqrt(b * b - a * c)) / a


def meet_object(shape, scale, o, d):
    """The t at which rays o + t d first meet the object, (N,): inf where they miss it.  o is
    (3, N) or (3, 1), d is (3, N)."""
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
        out = np.stack([p[0] / r, p[1] / high * 2 - 1, p[2] / r])
        return np.sign(out) * (np.abs(out) == np.abs(out).max(0))
    if shape == CYLINDER:
        lid = p[1] > high * (1 - 1e-6)
        return np.stack([np.where(lid, 0, p[0] / r), lid * 1.0, np.where(lid, 0, p[2] / r)])
    axis = np.clip(p[1], r, high - r)       # nearest point of the axis; for a sphere its centre
    return np.stack([p[0], p[1] - axis, p[2]]) / r


def texture(u, v):
    """Faint hexagonal tiles everywhere; on the walls a slanting stain in every square of them."""
    k = 4 * np.pi / (np.sqrt(3) * TILE)
    tiles = np.cos(k * v) + 2 * np.cos(k * u * np.sqrt(3) / 2) * np.cos(k * v / 2)
    u, v = (u - STAIN[0]) / WALL % 1 - 0.5, (v - STAIN[1]) / WALL - 0.5
    return 1 + 0.007 * tiles - 0.08 * np.exp(-((u + v) / 0.09) ** 2 - ((u - v) / 0.22) ** 2)


def room_light(eye, rays):
    """What a ray meets in the empty room, all (N,): part (0 sky, 1 floor, 2 wall), t, light; and
    the place (3, N)."""
    with np.errstate(divide="ignore"):
        t = np.stack([-eye[1] / rays[1], (ROOM - eye[2]) / rays[2],
                      (-ROOM - eye[0]) / rays[0], (ROOM - eye[0]) / rays[0]])
    t[t <= 0] = np.inf                      # behind us
    side, t = t.argmin(0), t.min(0)         # 0 floor, 1 far wall, 2 left wall, 3 right wall
    p = x, y, z = eye[:, None] + t * rays
    to_lamp = np.sqrt((x - LAMP[0]) ** 2 + (y - LAMP[1]) ** 2 + (z - LAMP[2]) ** 2)
    light = np.choose(side, [LAMP_LIGHT * (LAMP[1] / to_lamp) ** LAMP_FALL,
                             FAR_WALL[0] + FAR_WALL[1] * x,
                             LEFT_WALL[0] + LEFT_WALL[1] * z,
                             RIGHT_WALL[0] + RIGHT_WALL[1] * z])
    light *= texture(np.where(side < 2, x, z), np.where(side == 0, z - 9, y))    # no stain at z - 9
    part = np.where(side == 0, 1, np.where(y < WALL, 2, 0))
    return part, t, light, p


def object_light(normal, rays):
    """How bright the object's colour is, and how much white gloss lies on it; both (N,)."""
    facing = np.maximum(-(normal * rays).sum(0), 0)             # a light that rides on the camera
    above = GLOSS @ normal                                      # and one high on the left
    return (OBJECT[0] + OBJECT[1] * facing + OBJECT[2] * np.maximum(above, 0),
            OBJECT[3] * np.clip(GLOSS_EDGE[0] * above - GLOSS_EDGE[1], 0, 1))


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
    planes[:, seen] = 0
    planes[2, seen], planes[3:, seen] = object_light(normal, rays[:, seen])
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
        for g in range(view, GEOMETRIES, SIZES[5]):     # g = (scale * 4 + shape) * 15 + view
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
        labels = ", ".join(f"{n} {k}" for n, k in zip(self.factor_names, self.factor_sizes))
        labels = f"factors {labels}" if labels else "no factors"
        labels += f", {len(self.attribute_names)} attributes" if self.attribute_names else ""
        return f"{self.name}: {self.count:,} images of {self.size}x{self.size}, {labels}"

    def rows(self, indices):
        rows = np.asarray(indices, np.int64).reshape(-1)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.count:
            raise IndexError(f"{rows.min()}..{rows.max()}; {self.name} has {self.count} images")
        return rows

    def factors(self, indices):         # (B, F)
        return self.labels(indices)[:, :len(self.factor_names)]

    def attributes(self, indices):      # (B, 40) of CelebA; a dataset has one or the other
        return self.labels(indices)[:, :len(self.attribute_names)]


class RenderedShapes3D(Dataset):
    """All 480,000 images, coloured on demand from the planes of the 480 geometries."""
    def __init__(self, size=64):
        super().__init__("rendered Shapes3D", TOTAL, size, FACTORS, SIZES)
        self.planes = render_planes(size)

    def labels(self, indices):
        return torch.from_numpy(np.stack(np.unravel_index(self.rows(indices), SIZES), 1))   # (B, 6)

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
            out[b] = np.clip((image + UNIT // 2) // UNIT, 0, 255)       # rounded to nearest
        return torch.from_numpy(out.reshape(-1, 3, self.size, self.size))   # -> (B, 3, S, S)


class CachedDataset(Dataset):
    """A converted dataset, mapped from disk: what is where is said at MAGIC."""

    def __init__(self, cache, about):
        super().__init__(about["name"], about["count"], about["size"], about["factor_names"],
                         about["factor_sizes"], about["attribute_names"])
        shape, width = (self.count, 3, self.size, self.size), about["label_width"]
        self.pixels, self.table = np.memmap(cache, np.uint8, "r", 0, shape), np.zeros((shape[0], 0))
        if width:                                               # zero bytes cannot be mapped
            self.table = np.memmap(cache, "<i4", "r", int(np.prod(shape)), (self.count, width))

    def labels(self, indices):
        return torch.from_numpy(self.table[self.rows(indices)].astype(np.int64))

    def images(self, indices):
        return torch.from_numpy(np.asarray(self.pixels[self.rows(indices)]))


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
    where, stamp = path.resolve(), fingerprint(path)
    name = f"{where.name}.{size}.cache"
    if cache:                           # where two files of one name, from two places, can meet
        name = f"{zlib.crc32(str(where).encode()):08x}-{name}"
    target = Path(cache or where.parent) / name
    about = read_about(target)
    if about is None or about["stamp"] != stamp:
        if about:
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
         460800: ("MPI3D", MPI3D, (4, 4, 2, 3, 3, 40, 40)),     # complex, and older releases
         17568: ("Cars3D", ("elevation", "azimuth", "object"), (4, 24, 183)),
         737280: ("dSprites", ("shape", "scale", "orientation", "x", "y"), (3, 6, 40, 32, 32))}
CAR_MODELS, CAR_VIEWS = 183, (24, 4)                            # azimuths, elevations in one .mat
IMAGE_KEYS = ("images", "imgs", "image")
LABEL_KEYS = ("factors", "labels", "label", "latents_classes", "latents/classes")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
ATTRIBUTES = ("list_attr_celeba.txt", "list_attr_celeba.csv")
CELEBA_SIZE, CELEBA_CROP = (178, 218), (25, 57, 153, 185)       # left, top, right, bottom
BLOCK = 1 << 25                                                 # bytes read at a time


class DataError(ValueError):
    """Something about the given data that its owner has to put right; one line."""


@dataclasses.dataclass
class Found:
    """A recognised dataset, not yet converted."""
    name: str
    count: int
    blocks: Callable                    # blocks(size) yields (b, 3, size, size) uint8, in order
    factor_names: tuple = ()
    factor_sizes: tuple = ()
    labels: np.ndarray = None           # (n, F); complete after the last block (skipped pictures)
    attribute_names: tuple = ()


@contextlib.contextmanager
def reading(path):
    """Whatever goes wrong inside is the file's fault, and is told in one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split()) or repr(error)}); "
                        "expected a complete file that no other program is writing") from None


def files_below(folder):
    """[(path, bytes, time)], sorted; without hidden files (macOS leaves a ._001.jpg beside each
    001.jpg) and without our own."""
    paths = [os.path.join(top, name) for top, _, names in os.walk(folder) for name in names
             if not name.startswith(".") and not name.endswith((".cache", ".tmp"))]
    return sorted((p, info.st_size, info.st_mtime_ns) for p in paths for info in [os.lstat(p)])


def fingerprint(path):
    """Changes whenever the source does: number of files, their bytes, the newest time."""
    files = files_below(path) if path.is_dir() else []
    extra = attribute_file(path) if path.is_dir() else path
    if extra:
        files.append((extra, extra.stat().st_size, extra.stat().st_mtime_ns))
    return [len(files), sum(f[1] for f in files), max((f[2] for f in files), default=0)]


def recognise(path):
    """What is at this path, as Found; DataError or OSError if it is nothing we can read."""
    if path.is_dir():
        files = [Path(f[0]) for f in files_below(path)]
        cars = [f for f in files if f.name.endswith("_mesh.mat")]
        return found_cars(path, cars) if cars else found_pictures(path, files)
    with reading(path):
        with open(path, "rb") as f:
            start = f.read(8)
        if start == b"\x89HDF\r\n\x1a\n":
            file = h5py.File(path)
            return found_arrays(path, list(file), {k: file[k] for k in IMAGE_KEYS + LABEL_KEYS
                                                   if isinstance(file.get(k), h5py.Dataset)})
        if start.startswith(b"PK"):
            with np.load(path, allow_pickle=False) as file:
                arrays = {k: file[k] for k in LABEL_KEYS if k in file.files}
                arrays |= {k: NpzStream(path, k) for k in IMAGE_KEYS if k in file.files}
                return found_arrays(path, file.files, arrays)
    raise DataError(f"{path} begins with {start[:4]}; expected HDF5 (.h5), .npz or a folder")


class NpzStream:
    """An array in an .npz whose slices are read in order.  np.load would decompress it as a whole,
    12 GB for MPI3D."""

    def __init__(self, path, key):
        self.file = zipfile.ZipFile(path).open(key + ".npy")
        version, header = np.lib.format.read_magic(self.file), np.lib.format.read_array_header_2_0
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else header
        self.shape, column_major, self.dtype = header(self.file)
        if column_major and len(self.shape) > 1:
            raise DataError(f"{path}: {key} is in column-major order; expected C order")

    def __getitem__(self, rows):
        part = (min(rows.stop, self.shape[0]) - rows.start, *self.shape[1:])
        return np.frombuffer(self.file.read(int(np.prod(part))), np.uint8).reshape(part)


def found_arrays(path, names, arrays):
    """An HDF5's or .npz's images, and its labels if it has any; names: what the file holds."""
    key = next((k for k in IMAGE_KEYS if k in arrays), None)
    if key is None:
        raise DataError(f"{path} holds {names}; expected an array 'images'")
    source, shape, dtype = arrays[key], arrays[key].shape, arrays[key].dtype
    channels_last = len(shape) == 3 or len(shape) == 4 and shape[3] in (1, 3)
    channels_first = len(shape) == 4 and not channels_last and shape[1] in (1, 3)
    if dtype != np.uint8 or not (channels_last or channels_first) or 0 in shape:
        raise DataError(f"{path}: {key} is {dtype} {shape}; expected uint8 of shape (n, h, w), "
                        "(n, h, w, 1 or 3) or (n, 1 or 3, h, w)")
    # Whole chunks of HDF5: a chunk cut by a block's border would be decompressed twice.
    chunk = (getattr(source, "chunks", None) or [1])[0]
    step = -(-max(1, BLOCK // int(np.prod(shape[1:]))) // chunk) * chunk

    def blocks(size):
        for at in range(0, shape[0], step):
            with reading(path):
                block = source[at:at + step]
            if channels_first:
                block = block.transpose(0, 2, 3, 1)             # (b, c, h, w) -> (b, h, w, c)
            yield shrink(block * 255 if key == "imgs" else block, size)     # dSprites: 0 and 1

    found = Found(path.stem, shape[0], blocks)
    label_key = next((k for k in LABEL_KEYS if k in arrays), None)
    if label_key:
        add_labels(path, found, label_key, arrays[label_key][()])
    elif found.count in GRIDS:
        found.name, found.factor_names, found.factor_sizes = GRIDS[found.count]
        found.labels = np.stack(np.unravel_index(np.arange(found.count), found.factor_sizes), 1)
    elif "mpi3d" in path.stem.lower() or "real3d" in path.stem.lower():
        raise DataError(f"{path} holds {found.count:,} images; MPI3D has 1,036,800 or 460,800")
    return found


def add_labels(path, found, key, values):
    """Any column of labels becomes a factor with levels 0 .. k - 1, unless it never varies."""
    if values.shape[:1] != (found.count,) or values.ndim > 2:
        raise DataError(f"{path}: {key} has shape {values.shape}; expected one row for each of the "
                        f"{found.count:,} images")
    columns = values.reshape(found.count, -1).T                 # (n,) or (n, F) -> (F, n)
    # Official Shapes3D values have known levels, even if a small file misses some of them.
    if len(columns) == len(LEVELS) and all(np.isclose(c[:, None], levels, atol=1e-5).any(1).all()
                                           for c, levels in zip(columns, LEVELS)):
        found.name, found.factor_names, found.factor_sizes = GRIDS[TOTAL]
        found.labels = np.stack([np.abs(c[:, None] - levels).argmin(1)
                                 for c, levels in zip(columns, LEVELS)], 1)
        return
    if values.dtype.kind not in "iub":
        raise DataError(f"{path}: {key} is {values.dtype}; expected integers, one per factor")
    levels = [np.unique(c, return_inverse=True) for c in columns]
    levels = [(len(known), row) for known, row in levels if len(known) > 1]
    if levels:
        found.factor_sizes = tuple(count for count, _ in levels)
        found.factor_names = tuple(f"factor {j}" for j in range(len(levels)))
        found.labels = np.stack([row for _, row in levels], 1)
    if found.count in GRIDS and GRIDS[found.count][2] == found.factor_sizes:
        found.name, found.factor_names, _ = GRIDS[found.count]


def found_cars(path, files):
    """Reed et al.: car_*_mesh.mat, each `im` (h, w, 3, azimuth, elevation) of one model."""
    order = files[0].parent / "list.txt"
    if order.exists():                                          # the folder's own order differs
        with reading(order):
            names = [line.removesuffix(".mat") + ".mat" for line in order.read_text().split()]
        files = [order.parent / name for name in names]
    missing = [f.name for f in files if not f.exists()]
    if missing or len(files) != CAR_MODELS:
        raise DataError(f"{path}: {len(files) - len(missing)} car_*_mesh.mat, "
                        f"{' '.join(missing[:1]) or 'none'} missing from the list; expected "
                        f"{CAR_MODELS}: unpack nips2015-analogy-data.tar.gz again")

    def blocks(size):
        for file in files:
            with reading(file):
                im = read_mat(file, "im")
            if im.dtype != np.uint8 or im.ndim != 5 or im.shape[2:] != (3, *CAR_VIEWS):
                raise DataError(f"{file}: im is {im.dtype} {im.shape}; expected uint8 "
                                f"(h, w, 3, {CAR_VIEWS[0]}, {CAR_VIEWS[1]})")
            im = im.transpose(4, 3, 0, 1, 2)                    # -> (elevation, azimuth, h, w, 3)
            yield shrink(im.reshape(-1, *im.shape[2:]), size)   # -> (96, h, w, 3)

    azimuths, elevations = CAR_VIEWS
    index = np.indices((len(files), elevations, azimuths)).reshape(3, -1)       # (3, n)
    return Found("Cars3D", index.shape[1], blocks, GRIDS[17568][1],
                 (elevations, azimuths, len(files)), index[[1, 2, 0]].T)


def read_mat(path, name):
    """One uint8 array of a MATLAB file: level 5, or 7.3, which is HDF5."""
    if h5py.is_hdf5(path):
        with h5py.File(path) as f:
            return f[name][()].T                                # MATLAB counts columns first
    for kind, body in mat_elements(memoryview(path.read_bytes())[128:]):
        if kind == 15:                                          # miCOMPRESSED
            kind, body = next(mat_elements(memoryview(zlib.decompress(body))))
        if kind == 14:                                          # miMATRIX
            (_, flags), (_, shape), (_, label), (_, values) = list(mat_elements(body))[:4]
            if bytes(label).decode() == name and flags[0] == 9:         # mxUINT8_CLASS
                shape = np.frombuffer(shape, "<i4")
                return np.frombuffer(values, np.uint8).reshape(shape, order="F")
    raise KeyError(f"no uint8 array {name}")


def mat_elements(raw):
    """(type, bytes) of each element: an 8-byte tag, then the data padded to 8 bytes; up to four
    bytes of data sit in the tag itself, whose first half then holds size and type."""
    at = 0
    while at + 8 <= len(raw):
        kind, size = struct.unpack_from("<II", raw, at)
        if kind >> 16:
            yield kind & 0xFFFF, raw[at + 4:at + 4 + (kind >> 16)]
            at += 8
        else:
            yield kind, raw[at + 8:at + 8 + size]
            at += 8 + (size if kind == 15 else -(-size // 8) * 8)       # compressed: no padding


def attribute_file(folder):
    """CelebA's labels lie in, beside, or (as Kaggle packs them) two levels above the images."""
    places = (folder.resolve(), *folder.resolve().parents[:2])
    return next((p / n for p in places for n in ATTRIBUTES if (p / n).is_file()), None)


def read_attributes(path):
    """-> names, {file name: row of 0 and 1}.  The .txt may begin with the number of images, the
    .csv begins with image_id."""
    lines = path.read_text().replace(",", " ").splitlines()
    lines = [line.split() for line in lines if line.strip()]
    head = 1 if lines[0][0].isdecimal() else 0
    names = tuple(n for n in lines[head] if n != "image_id")
    for line in lines[head + 1:]:
        if len(line) != len(names) + 1 or not set(line[1:]) <= {"1", "-1"}:
            raise DataError(f"{path}: the line of {line[0]} has {len(line) - 1} values; expected "
                            f"{len(names)}, each 1 or -1")
    return names, {line[0]: [value == "1" for value in line[1:]] for line in lines[head + 1:]}


def found_pictures(path, files):
    """A folder of pictures; CelebA if its attribute file is there."""
    files = [f for f in files if f.suffix.lower() in PICTURES]
    if not files:
        raise DataError(f"{path} holds no pictures ({' '.join(PICTURES)}) and no car_*_mesh.mat")
    celeba = attribute_file(path)

    def blocks(size):
        kept, bad = [], []
        for row, file in enumerate(files):
            try:
                with Image.open(file) as picture:
                    picture = picture.convert("RGB")
                if celeba and picture.size != CELEBA_SIZE:
                    raise ValueError(f"size {picture.size}, expected {CELEBA_SIZE}")
            except Exception as error:      # Pillow raises whatever its many decoders raise
                bad.append(file)
                print(f"left out {file} ({' '.join(str(error).split())}), {len(bad)} so far")
                if len(bad) > max(1, len(files) // 100):
                    raise DataError(f"{path}: {len(bad)} of the first {row + 1} pictures cannot be "
                                    f"read, first {bad[0]}; expected at most one in a hundred")
                continue
            kept.append(row)
            picture = np.asarray(fit(picture, size, celeba))
            yield picture[None].transpose(0, 3, 1, 2)           # (S, S, 3) -> (1, 3, S, S)
        if celeba:
            found.labels = found.labels[kept]

    found = Found(path.resolve().name, len(files), blocks)
    if celeba:
        with reading(celeba):
            found.name, (found.attribute_names, table) = "CelebA", read_attributes(celeba)
        unknown = [f.name for f in files if f.name not in table]
        if unknown:
            raise DataError(f"{celeba} has no line for {unknown[0]} and {len(unknown) - 1} others; "
                            "expected one for each picture")
        found.labels = np.array([table[f.name] for f in files])
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
    if block.shape[3] == 1:
        block = np.broadcast_to(block, (*block.shape[:3], 3))
    if block.shape[1:3] != (size, size):
        block = np.stack([np.asarray(fit(Image.fromarray(image), size)) for image in block])
    return block.transpose(0, 3, 1, 2)                          # (b, h, w, 3) -> (b, 3, h, w)


# ---- 4. Converting, once -----------------------------------------------------------------------
# A cache is: images (n, 3, S, S) uint8, labels (n, width) int32, a description in JSON, and as the
# last 16 bytes the description's length and MAGIC.  What was cut short has no such end.
MAGIC = b"imgcache"


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
    """Write images, labels and a description to the cache file `target`, whole or not at all."""
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
            about = json.dumps(dict(
                name=found.name, count=count, size=size, label_width=width, stamp=stamp,
                factor_names=found.factor_names, factor_sizes=found.factor_sizes,
                attribute_names=found.attribute_names)).encode()
            f.write(about + struct.pack("<Q8s", len(about), MAGIC))


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
        need_room(path.parent, size_hint)
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OSError(f"no room for {path}, about {size_hint / 1e9:.2f} GB; free some space or "
                          "choose another disk (--cache DIR)") from None
        if isinstance(error, OSError):
            raise OSError(f"cannot write {path} ({error.strerror or error}); choose a folder that "
                          "can be written (--cache DIR)") from None
        raise


def need_room(folder, size):
    """OSError now if `size` bytes do not fit: HDF5 itself would crash later."""
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, "disk full")


def progress(what, total):
    """A function that prints, every now and then, how far we are."""
    start = last = time.perf_counter()
    every, end = (0.5, "\r") if sys.stdout.isatty() else (15, "\n")

    def show(done):
        nonlocal last
        now = time.perf_counter()
        if done >= total or now - last > every:
            last, rate = now, done / max(now - start, 1e-9)
            print(f"{what}: {done:,}/{total:,}, {rate:,.0f}/s, {(total - done) / rate:.0f} s left",
                  end=end if done < total else "\n", flush=True)
    return show


# ---- 5. Writing the official format ------------------------------------------------------------
STEP = 296657       # shares no factor with 480,000 and is near its golden section


def write_shapes3d(path, limit=None):
    """The rendered set as 3dshapes.h5: images uint8 (n, 64, 64, 3), labels float64 (n, 6).  With a
    limit, multiples of STEP modulo 480,000: they meet every level of every factor early on."""
    path, count = Path(path), TOTAL if limit is None else limit
    if not 1 <= count <= TOTAL:
        raise ValueError(f"--limit {count}; expected 1 to {TOTAL}")
    if path.exists() or not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: it exists already, or its folder does not; "
                         "give a new name in an existing folder")
    dataset, indices = RenderedShapes3D(), np.sort(np.arange(count) * STEP % TOTAL)
    labels = [levels[column] for levels, column in zip(LEVELS, dataset.factors(indices).numpy().T)]
    show = progress(f"writing {path}", count)
    block = 4800        # neighbours differ little: chunks long in images, small in area pack best
    with replacing(path, count * 1000) as temporary, h5py.File(temporary, "w") as f:
        f["labels"] = np.stack(labels, 1)                       # (n, 6)
        images = f.create_dataset("images", (count, 64, 64, 3), np.uint8, compression="gzip",
                                  chunks=(min(count, block), 8, 8, 1))
        for at in range(0, count, block):
            batch = dataset.images(indices[at:at + block]).numpy()
            need_room(path.parent, 2 * batch.nbytes)            # HDF5 crashes on a full disk
            images[at:at + block] = batch.transpose(0, 2, 3, 1)     # -> (b, 64, 64, 3)
            show(at + len(batch))


# ---- 6. Command line ---------------------------------------------------------------------------
def save_grid(dataset, path):
    """Fifty images spread over the whole set, ten in a row."""
    images = dataset.images(np.arange(50) * STEP % len(dataset)).numpy()
    grid = images.reshape(5, 10, *images.shape[1:]).transpose(0, 3, 1, 4, 2)    # (5, S, 10, S, 3)
    Image.fromarray(grid.reshape(5 * dataset.size, 10 * dataset.size, 3)).save(path)
    print(f"wrote {path}")


def show_work(dataset):
    """A second of everything, with what to expect."""
    factors, image = dataset.factors([123456])[0].tolist(), dataset.images([123456])[0]
    print(f"image 123456 has factors {factors}    (expected [2, 5, 7, 1, 2, 6])")
    for what, y, x in (("sky, 153 226 249", 4, 32), ("wall, cyan", 28, 8),
                       ("floor, yellow-green", 60, 8), ("object, violet", 40, 32)):
        print(f"row {y}, column {x}: {image[:, y, x].tolist()}    (expected {what})")
    start, rng = time.perf_counter(), np.random.default_rng(0)
    for _ in range(100):
        dataset.images(rng.integers(TOTAL, size=64))
    rate = 6400 / (time.perf_counter() - start)
    print(f"random batches of 64: {rate:,.0f} images/s    (expected 8,000 or more)")


def main():
    """The command line: one line on standard error and status 2 for what a user gets wrong."""
    parser = argparse.ArgumentParser(description="Look at a dataset, or render Shapes3D to a file.")
    parser.add_argument("--data", metavar="PATH", help="dataset file or folder; default: rendered")
    parser.add_argument("--size", type=int, default=64, help="image size: 32, 64 or 128")
    parser.add_argument("--cache", metavar="DIR", help="for converted data; default: beside PATH")
    parser.add_argument("--grid", metavar="PNG", help="save fifty images as one picture")
    parser.add_argument("--write", metavar="H5", help="write the rendered set as 3dshapes.h5")
    parser.add_argument("--limit", type=int, help="with --write: this many images, spread evenly")

    def fail(message):
        print(f"data.py: {message}", file=sys.stderr)
        sys.exit(2)

    parser.error = fail                     # argparse would print its usage as well
    args = parser.parse_args()
    try:
        if args.write:
            return write_shapes3d(args.write, args.limit)
        dataset = open_dataset(args.data, args.size, args.cache)
        print(dataset)
        if args.grid:
            save_grid(dataset, args.grid)
        elif args.data is None:
            show_work(dataset)
    except (OSError, ValueError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted; nothing half-written is left")


if __name__ == "__main__":
    main()

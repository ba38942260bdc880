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
import json
import os
import shutil
import struct
import sys
import time
import zipfile
import zlib
from pathlib import Path

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
    across, down = np.outer(right, np.tile(c, n)), np.outer(upward, np.repeat(c, n))
    rays = CAMERA["focal"] * forward[:, None] + (across - down)         # (3, n * n)
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
@dataclasses.dataclass
class Dataset:
    """What training needs to know of any dataset; without labels the tuples are empty."""
    name: str
    count: int
    size: int
    factor_names: tuple = ()
    factor_sizes: tuple = ()
    attribute_names: tuple = ()         # a dataset has factors or attributes, not both
    table: np.ndarray = None            # (count, F or 40): either of them
    pixels: np.ndarray = None           # (count, 3, size, size) uint8, mapped from disk

    def __len__(self):
        return self.count

    def __str__(self):
        labels = ", ".join(f"{n} {k}" for n, k in zip(self.factor_names, self.factor_sizes))
        labels = f"factors {labels}" if labels else "no factors"
        labels += f", {len(self.attribute_names)} attributes" if self.attribute_names else ""
        return f"{self.name}: {self.count:,} images of {self.size}x{self.size}, {labels}"

    def images(self, indices):
        """(B, 3, S, S) uint8."""
        return torch.from_numpy(self.pixels[np.asarray(indices)])

    def factors(self, indices):
        """(B, F) int64."""
        return torch.from_numpy(self.table[np.asarray(indices)]).long()[:, :len(self.factor_names)]

    def attributes(self, indices):
        """(B, 40) int64, 0 or 1, of CelebA."""
        return torch.from_numpy(self.table[np.asarray(indices)]).long()

    def find(self, factors):
        """The rows of the images that have these factors (B, F) -> (B,) int64."""
        rows = {tuple(labels): row for row, labels in enumerate(self.table.tolist())}
        try:
            return np.array([rows[tuple(labels)] for labels in np.asarray(factors).tolist()])
        except KeyError as error:
            raise ValueError(f"{self.name} has no image with {error}") from None

    @property
    def identity(self):
        return {"count": self.count, "size": self.size, "factor_names": list(self.factor_names),
                "factor_sizes": list(self.factor_sizes), "digest": ""}


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
    """The dataset at path; None is the rendered Shapes3D.  A file or folder is converted on first
    use, into a file beside it or in the folder `cache`; later it opens at once.  ValueError or
    OSError, in one line, for what cannot be read or written."""
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
    dataset, made_from = read_cache(target)
    if made_from != stamp:
        if dataset is not None:
            print(f"{target} was made from another version of {path}: converting again")
        convert(*recognise(path, size), target, stamp)
        dataset, _ = read_cache(target)
    return dataset


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
    """Paths, sorted; without hidden files (macOS leaves a ._001.jpg beside each 001.jpg) and
    without our own."""
    return sorted((p for p in folder.rglob("*") if not p.name.startswith(".")
                   and p.suffix not in (".cache", ".tmp") and p.is_file()), key=str)


def fingerprint(path):
    """Changes whenever the source does: number of files, their bytes, the newest time."""
    files = [*files_below(path), attribute_file(path)] if path.is_dir() else [path]
    seen = [file.stat() for file in files if file]
    return [len(seen), sum(s.st_size for s in seen), max((s.st_mtime_ns for s in seen), default=0)]


def recognise(path, size):
    """What is at this path: a Dataset not yet converted, and its images in order, as blocks
    (b, 3, size, size) uint8.  DataError or OSError if it is nothing we can read."""
    if path.is_dir():
        files = files_below(path)
        cars = [f for f in files if f.name.endswith("_mesh.mat")]
        return found_cars(path, size, cars) if cars else found_pictures(path, size, files)
    with reading(path):
        with open(path, "rb") as f:
            start = f.read(4)
        if start == b"\x89HDF":
            return found_arrays(path, size, h5py.File(path))
        if start.startswith(b"PK"):
            return found_arrays(path, size, np.load(path))
    raise DataError(f"{path} begins with {start}; expected HDF5 (.h5), .npz or a folder")


class NpzStream:
    """An array in an .npz whose slices are read in order.  np.load would decompress it as a whole,
    12 GB for MPI3D."""

    def __init__(self, path, key):
        self.file = zipfile.ZipFile(path).open(key + ".npy")
        np.lib.format.read_magic(self.file)
        self.shape, column_major, self.dtype = np.lib.format.read_array_header_1_0(self.file)
        if column_major:
            raise DataError(f"{path}: {key} is in column-major order; expected C order")

    def __getitem__(self, rows):
        part = (min(rows.stop, self.shape[0]) - rows.start, *self.shape[1:])
        return np.frombuffer(self.file.read(int(np.prod(part))), np.uint8).reshape(part)


def found_arrays(path, size, arrays):
    """An HDF5's or .npz's images, and its labels if it has any."""
    key = next((k for k in IMAGE_KEYS if k in arrays), None)
    if key is None:
        raise DataError(f"{path} holds {list(arrays)}; expected an array 'images'")
    source = arrays[key] if isinstance(arrays, h5py.File) else NpzStream(path, key)
    if isinstance(source, h5py.Group):
        raise DataError(f"{path}: {key} is a group of arrays; expected an array")
    shape, dtype = source.shape, source.dtype
    channels_last = len(shape) == 3 or len(shape) == 4 and shape[3] in (1, 3)
    channels_first = len(shape) == 4 and not channels_last and shape[1] in (1, 3)
    if dtype != np.uint8 or not (channels_last or channels_first) or 0 in shape:
        raise DataError(f"{path}: {key} is {dtype} {shape}; expected uint8 of shape (n, h, w), "
                        "(n, h, w, 1 or 3) or (n, 1 or 3, h, w)")
    # Whole chunks of HDF5: a chunk cut by a block's border would be decompressed twice.
    chunk = (getattr(source, "chunks", None) or [1])[0]
    step = -(-max(1, BLOCK // int(np.prod(shape[1:]))) // chunk) * chunk

    def blocks():
        for at in range(0, shape[0], step):
            with reading(path):
                block = source[at:at + step]
            if channels_first:
                block = block.transpose(0, 2, 3, 1)             # (b, c, h, w) -> (b, h, w, c)
            yield shrink(block * 255 if key == "imgs" else block, size)     # dSprites: 0 and 1

    found = Dataset(path.stem, shape[0], size)
    label_key = next((k for k in LABEL_KEYS if k in arrays), None)
    if label_key:
        add_labels(path, found, label_key, arrays[label_key][()])
    elif found.count in GRIDS:
        found.name, found.factor_names, found.factor_sizes = GRIDS[found.count]
        found.table = grid(found.factor_sizes)
    elif "mpi3d" in path.stem.lower() or "real3d" in path.stem.lower():  # a cut copy has no factors
        raise DataError(f"{path} holds {found.count:,} images; MPI3D has 1,036,800 or 460,800")
    return found, blocks()


def add_labels(path, found, key, values):
    """Any column of labels becomes a factor with levels 0 .. k - 1, unless it never varies."""
    if values.shape[:1] != (found.count,) or values.ndim > 2:
        raise DataError(f"{path}: {key} has shape {values.shape}; expected one row for each of the "
                        f"{found.count:,} images")
    columns = values.reshape(found.count, -1).T                 # (n,) or (n, F) -> (F, n)
    # Official Shapes3D values have known levels, even if a small file misses some of them.
    official = len(columns) == len(LEVELS) and all(
        np.isclose(c[:, None], known, atol=1e-5).any(1).all() for c, known in zip(columns, LEVELS))
    if not official and values.dtype.kind not in "iub":
        raise DataError(f"{path}: {key} is {values.dtype}; expected integers, one per factor")
    levels = LEVELS if official else [np.unique(column) for column in columns]
    varying = [(known, column) for known, column in zip(levels, columns) if len(known) > 1]
    found.factor_sizes = tuple(len(known) for known, _ in varying)
    found.factor_names = tuple(f"factor {j}" for j in range(len(varying)))
    found.table = np.zeros((found.count, len(varying)), int)
    for j, (known, column) in enumerate(varying):               # a little less: floats are rounded
        found.table[:, j] = np.searchsorted(known - 1e-3, column, "right") - 1
    name, names, sizes = GRIDS.get(TOTAL if official else found.count, ("", (), ()))
    if sizes == found.factor_sizes != ():
        found.name, found.factor_names = name, names


def found_cars(path, size, files):
    """Reed et al.: car_*_mesh.mat, each `im` (h, w, 3, azimuth, elevation) of one model."""
    listed = files[0].parent / "list.txt"
    if listed.exists():                                         # the folder's own order differs
        files = [listed.parent / f"{Path(name).stem}.mat" for name in listed.read_text().split()]
    if len(files) != CAR_MODELS:
        raise DataError(f"{path}: {len(files)} car_*_mesh.mat; expected {CAR_MODELS}, all of "
                        "nips2015-analogy-data.tar.gz: unpack it again")
    azimuths, elevations = CAR_VIEWS

    def blocks():
        for file in files:
            with reading(file):
                im = read_mat(file, "im")
            if im.dtype != np.uint8 or im.shape[2:] != (3, *CAR_VIEWS):
                raise DataError(f"{file}: im is {im.dtype} {im.shape}; expected uint8 "
                                f"(h, w, 3, {azimuths}, {elevations})")
            im = im.transpose(4, 3, 0, 1, 2)                    # -> (elevation, azimuth, h, w, 3)
            yield shrink(im.reshape(-1, *im.shape[2:]), size)   # -> (96, h, w, 3)

    sizes = elevations, azimuths, len(files)
    table = grid((len(files), elevations, azimuths))[:, [1, 2, 0]]
    return Dataset("Cars3D", len(table), size, GRIDS[17568][1], sizes, table=table), blocks()


def read_mat(path, name):
    """One uint8 array of a MATLAB file: level 5, or 7.3, which is HDF5."""
    if h5py.is_hdf5(path):
        with h5py.File(path) as f:
            return f[name][()].T                                # MATLAB counts columns first
    for kind, body in mat_elements(path.read_bytes()[128:]):
        if kind == 15:                                          # miCOMPRESSED
            kind, body = next(mat_elements(zlib.decompress(body)))
        if kind == 14:                                          # miMATRIX
            _, (_, shape), (_, label), (_, values) = list(mat_elements(body))[:4]
            if label.decode() == name:
                shape = np.frombuffer(shape, "<i4")
                return np.frombuffer(values, np.uint8).reshape(shape, order="F")
    raise KeyError(f"no array {name}")


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


def read_attributes(path, files):
    """-> names, (n, 40) bool, a row for each file.  The .txt may begin with the number of images,
    the .csv begins with image_id."""
    with reading(path):
        text = path.read_text().replace("image_id,", "").replace(",", " ")
        lines = [line.split() for line in text.splitlines() if line.strip()]
        names = next(tuple(line) for line in lines if len(line) > 1)
    rows = {line[0]: line[1:] for line in lines}
    for file in files:
        values = rows.get(file.name, [])
        if len(values) != len(names) or not set(values) <= {"1", "-1"}:
            raise DataError(f"{path} has {len(values)} values for {file.name}; expected "
                            f"{len(names)}, each 1 or -1")
    return names, np.array([rows[file.name] for file in files]) == "1"


def found_pictures(path, size, files):
    """A folder of pictures; CelebA if its attribute file is there."""
    files = [f for f in files if f.suffix.lower() in PICTURES]
    if not files:
        raise DataError(f"{path} holds no pictures ({' '.join(PICTURES)}) and no car_*_mesh.mat")
    found, celeba = Dataset(path.resolve().name, len(files), size), attribute_file(path)
    crop, how = (CELEBA_CROP, Image.BILINEAR) if celeba else (None, Image.LANCZOS)
    if celeba:
        found.name = "CelebA"
        found.attribute_names, found.table = read_attributes(celeba, files)

    def blocks():
        bad = []                                                # rows of pictures left out
        for row, file in enumerate(files):
            try:
                with Image.open(file) as picture:
                    image = np.asarray(picture.convert("RGB").crop(crop))       # (h, w, 3)
                if celeba and picture.size != CELEBA_SIZE:
                    raise ValueError(f"size {picture.size}, expected {CELEBA_SIZE}")
            except Exception as error:      # Pillow raises whatever its many decoders raise
                bad.append(row)
                print(f"left out {file} ({' '.join(str(error).split())}), {len(bad)} so far")
                if len(bad) > max(1, len(files) // 100):
                    raise DataError(f"{path}: {len(bad)} of {row + 1} pictures cannot be read, "
                                    f"first {files[bad[0]]}; expected at most 1%") from None
            else:
                yield shrink(image[None], size, how)            # (1, h, w, 3) -> (1, 3, S, S)
        if celeba:
            found.table = np.delete(found.table, bad, 0)

    return found, blocks()


def shrink(block, size, how=Image.LANCZOS):
    """(b, h, w) or (b, h, w, 1 or 3) uint8 -> (b, 3, size, size), of each the middle square."""
    count, h, w = block.shape[:3]
    block = np.broadcast_to(block.reshape(count, h, w, -1), (count, h, w, 3))   # grey -> (.., 3)
    side, top, left = min(h, w), max(h - w, 0) // 2, max(w - h, 0) // 2
    block = block[:, top:top + side, left:left + side]
    if side != size:
        block = np.stack([Image.fromarray(image).resize((size, size), how) for image in block])
    return block.transpose(0, 3, 1, 2)                          # (b, S, S, 3) -> (b, 3, S, S)


# ---- 4. Converting, once -----------------------------------------------------------------------
# A cache is: images (n, 3, S, S) uint8, labels (n, width) int32, a description in JSON, and as the
# last 16 bytes the description's length and MAGIC.  What was cut short has no such end.
MAGIC = b"imgcache"


def read_cache(target):
    """The dataset in a cache and the stamp of its source, None and None if there is no cache.
    Trusts nothing: the shapes fit only if every byte is there."""
    if not target.exists():
        return None, None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, struct.error):
        raw = np.asarray(np.memmap(target, np.uint8, "r"))
        length, magic = struct.unpack("<Q8s", raw[-16:])
        if magic == MAGIC:
            arrays, about = raw[:-16 - length], json.loads(bytes(raw[-16 - length:-16]))
            names = [tuple(about[k]) for k in ("factor_names", "factor_sizes", "attribute_names")]
            found = Dataset(about["name"], about["count"], about["size"], *names)
            middle = found.count * 3 * found.size ** 2
            found.pixels = arrays[:middle].reshape(found.count, 3, found.size, found.size)
            found.table = arrays[middle:].view("<i4").reshape(found.count, len(names[0] + names[2]))
            return found, about["stamp"]
    raise ValueError(f"{target} is in the way: it is not a whole cache made by this program; "
                     "delete it, or choose another folder with --cache DIR")


def convert(found, blocks, target, stamp):
    """Write images, labels and a description to the cache file `target`, whole or not at all."""
    each, width = 3 * found.size ** 2, len(found.factor_names + found.attribute_names)
    size = found.count * (each + 4 * width)
    with replacing(target, size) as temporary, open(temporary, "wb") as f:
        for block in watched(blocks, f"converting {found.name} to {target}", found.count):
            f.write(np.ascontiguousarray(block))
        about = dict(vars(found), count=f.tell() // each, stamp=stamp)  # some may be left out
        table = about.pop("table")
        if width:
            f.write(np.ascontiguousarray(table, "<i4"))
        about = json.dumps(about).encode()
        f.write(about + struct.pack("<Q8s", len(about), MAGIC))


@contextlib.contextmanager
def replacing(path, size):
    """Gives a temporary name beside path, which becomes path only if all goes well; so path never
    holds half a file.  Two processes at once do the work twice, but safely.  size: in bytes."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob("*.tmp"):                   # a killed process leaves gigabytes
            if old.name.startswith(path.name + ".") and time.time() - old.stat().st_mtime > 600:
                old.unlink()
        need_room(path.parent, size)
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}, about {size / 1e9:.2f} GB ({error.strerror or error});"
                      " make room, or choose another folder (to convert: --cache DIR)") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def need_room(folder, size):
    """OSError now if `size` bytes do not fit: HDF5 itself would crash later."""
    if shutil.disk_usage(folder).free < size:
        raise OSError("the disk is full")


def watched(blocks, what, total):
    """The same blocks, while saying every ten seconds how far we are."""
    start = last = time.monotonic()
    done = 0
    for block in blocks:
        yield block
        done, now = done + len(block), time.monotonic()
        if done == total or now - last > 10:
            last, left = now, (now - start) * (total / done - 1)
            print(f"{what}: {done:,} of {total:,}, {left:.0f} s left", flush=True)


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
    step = 4800         # neighbours differ little: chunks long in images, small in area pack best
    blocks = (dataset.images(indices[at:at + step]).numpy() for at in range(0, count, step))
    with replacing(path, count * 1000) as temporary, h5py.File(temporary, "w") as f:
        f["labels"] = np.stack(labels, 1)                       # (n, 6)
        images = f.create_dataset("images", (count, 64, 64, 3), np.uint8, compression="gzip",
                                  chunks=(min(count, step), 8, 8, 1))
        for j, block in enumerate(watched(blocks, f"writing {path}", count)):
            need_room(path.parent, 2 * block.nbytes)            # HDF5 crashes on a full disk
            images[j * step:(j + 1) * step] = block.transpose(0, 2, 3, 1)       # (b, 64, 64, 3)


# ---- 6. Command line ---------------------------------------------------------------------------
def save_grid(dataset, path):
    """Fifty images spread over the whole set, ten in a row."""
    images = dataset.images(np.arange(50) * STEP % len(dataset)).numpy()
    rows = images.reshape(5, 10, *images.shape[1:]).transpose(0, 3, 1, 4, 2)    # (5, S, 10, S, 3)
    Image.fromarray(rows.reshape(5 * dataset.size, 10 * dataset.size, 3)).save(path)
    print(f"wrote {path}")


def show_work(dataset):
    """A second of everything, with what to expect."""
    factors, image = dataset.factors([123456])[0].tolist(), dataset.images([123456])[0]
    print(f"image 123456 has factors {factors}    (expected [2, 5, 7, 1, 2, 6])")
    for what, y, x in (("sky, 153 226 249", 4, 32), ("wall, cyan", 28, 8),
                       ("floor, yellow-green", 60, 8), ("object, violet", 40, 32)):
        y, x = y * dataset.size // 64, x * dataset.size // 64
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

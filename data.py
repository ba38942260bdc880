"""Datasets as pairs of images and factors: a rendered Shapes3D, and the files that people have.

WHERE     Read after metrics.py, before sample.py. Imports numpy, torch, h5py, pillow; copy freely.
PAPER     arXiv 2402.09712v2, Sec. 4.1: Shapes3D, MPI3D, Cars3D, CelebA. No equation lives here.
SHAPES    B images, F factors, S image size (64 unless asked).  images (B, 3, S, S) uint8, 0..255;
          factors (B, F) int64: column j runs over 0 .. factor_sizes[j] - 1.
IDEA      3D Shapes is one room seen 480,000 times. Six factors number the images:
            ((((floor * 10 + wall) * 10 + object) * 8 + scale) * 4 + shape) * 15 + orientation
          Three of them are only colours. So we cast rays once for the 8 * 4 * 15 = 480 geometries
          and keep the light on floor, wall and object apart. Any image is then a sum:
            floor plane * floor hue + wall plane * wall hue + object plane * object hue + the rest
          Any other dataset is converted once into an .npy file that is mapped into memory:
          reading one image out of a compressed file costs the thousands packed around it.
DIFFERS   The real 3D Shapes was drawn by another program. Our scene is fitted to fifty of its
          published images; tiles and stains are only suggested.
TRY       python data.py                        what is rendered
          python data.py --grid grid.png        a picture of fifty images
          python data.py --data PATH            what is in there
"""
import argparse
import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import signal
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image, ImageOps

FACTORS = ("floor hue", "wall hue", "object hue", "scale", "shape", "orientation")
LEVELS = (
    np.linspace(0, 0.9, 10),  # hues, as a part of the colour circle
    np.linspace(0, 0.9, 10),
    np.linspace(0, 0.9, 10),
    np.linspace(0.75, 1.25, 8),  # at scale 1 the cube has edges of length 1
    np.arange(4.0),  # CUBE, CYLINDER, SPHERE, CAPSULE
    np.linspace(-30, 30, 15),  # degrees
)
SIZES = tuple(len(levels) for levels in LEVELS)  # 10, 10, 10, 8, 4, 15
TOTAL = int(np.prod(SIZES))  # 480,000 images
GEOMETRIES = int(np.prod(SIZES[3:]))  # 480 of them differ in more than colour


# ---- 1. What a dataset is -----------------------------------------------------------------------
@dataclasses.dataclass(eq=False, repr=False)
class Dataset:
    """Images with their factors. torch's DataLoader takes it, also with workers.

    name             what we call it in messages
    count, size      the number of images, and their side in pixels
    factor_names     F names; empty without labels
    factor_sizes     how many values each factor has
    attribute_names  the 40 of CelebA; a dataset has factors or attributes, not both
    note             how its files were understood, and what is not used of them
    table            (count, F or 40) int32: the factors or attributes of every image; (count, 0)
                     without labels
    pixels           (count, 3, size, size) uint8, mapped from disk; None if they are rendered
    """
    name: str
    count: int
    size: int
    factor_names: tuple = ()
    factor_sizes: tuple = ()
    attribute_names: tuple = ()
    note: str = ""
    table: np.ndarray = None
    pixels: np.ndarray = None

    def images(self, indices):
        """(B, 3, S, S) uint8. Indices are a number, a list, a slice, a mask or a tensor."""
        return torch.from_numpy(self.pixels[to_rows(indices, self.count)])

    def factors(self, indices):
        """(B, F) int64."""
        columns = self.table[:, :len(self.factor_names)]
        return torch.from_numpy(columns[to_rows(indices, self.count)]).long()

    def attributes(self, indices):
        """(B, 40) int64, 0 or 1, of CelebA."""
        columns = self.table[:, :len(self.attribute_names)]
        return torch.from_numpy(columns[to_rows(indices, self.count)]).long()

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        """One image (3, S, S) and its factors (F,); of a list or slice, a batch of both.

        A dataset with attributes, as CelebA, has no factors: see `attributes`.
        """
        images = self.images(index)
        factors = self.factors(index)
        if isinstance(index, slice) or np.ndim(index) > 0:
            return images, factors
        return images[0], factors[0]

    def __getitems__(self, indices):
        """A list of such pairs. DataLoader calls this, and reads a batch at once."""
        return list(zip(self.images(indices), self.factors(indices)))

    @property
    def is_complete(self):
        """Whether there are factors, every combination of their values has an image, and images of
        one combination are equal (64 are looked at): so the factors say what an image shows."""
        combinations = math.prod(self.factor_sizes)
        if not self.factor_sizes or self.count < combinations:
            return False
        _, keys, _ = self.factor_keys
        if len(np.unique(keys)) < combinations:
            return False
        some = np.linspace(0, self.count - 1, 64).astype(int)
        return torch.equal(self.images(some), self.images(self.find(self.factors(some))))

    def find(self, factors):
        """factors (B, F) integers -> (B,) int64: for each row the first image that has them, in any
        order of the set. ValueError names a combination that no image has."""
        return find_rows(self, factors)

    @functools.cached_property
    def factor_keys(self):
        return sorted_keys(self)  # computed when `find` is called for the first time

    @property
    def identity(self):
        """What tells this dataset from others wherever it lies: a dict for JSON."""
        return {
            "count": self.count,
            "size": self.size,
            "factor_names": list(self.factor_names),
            "factor_sizes": list(self.factor_sizes),
            "digest": digest(self),
        }

    def __post_init__(self):
        if self.table is None:
            self.table = np.zeros((self.count, 0), np.int32)

    def __repr__(self):
        labels = "no factors"
        if self.factor_names:
            sizes = zip(self.factor_names, self.factor_sizes)
            labels = "factors " + ", ".join(f"{name} {size}" for name, size in sizes)
        if self.attribute_names:
            labels = f"{len(self.attribute_names)} attributes"
        text = f"{self.name}: {self.count:,} images of {self.size}x{self.size}, {labels}"
        return f"{text}; {self.note}" if self.note else text

    def add_note(self, text):
        text = " ".join(text.split())  # an error's text may have several lines
        self.note = f"{self.note}; {text}" if self.note else text

    def __getstate__(self):
        """A pickle, as a worker process gets one, names the file of the pixels."""
        state = vars(self).copy()
        state.pop("factor_keys", None)
        whole_file = not isinstance(getattr(self.pixels, "base", None), np.ndarray)  # not a view
        # A file of np.save begins with a header, which says how to read it again.
        if isinstance(self.pixels, np.memmap) and whole_file and self.pixels.offset:
            state["pixels"] = str(self.pixels.filename)
        return state

    def __setstate__(self, state):
        vars(self).update(state)
        if isinstance(self.pixels, str):
            self.pixels = np.load(self.pixels, mmap_mode="r")


def open_dataset(path=None, size=64, cache=None):
    """The dataset at path, a file or folder; without a path, the rendered Shapes3D.

    path     3dshapes.h5, any HDF5, .npz or .npy with images, or a folder of pictures, whose
             subfolders are factors
    size     32, 64 or 128: the side of the images in pixels
    cache    folder for the converted images; without it they lie beside path

    A file or folder is converted on first use, later it opens at once. ValueError or OSError, in
    one line, for what cannot be read or written.
    """
    if size not in (32, 64, 128):
        raise ValueError(f"image size {size}; expected 32, 64 or 128")
    size = int(size)  # numpy's integers cannot be written into the cache
    if path is not None:
        return open_files(path, size, cache)
    seconds = 1 + round(size**2 / 700)
    print_safely(f"rendering the {GEOMETRIES} geometries of Shapes3D: about {seconds} seconds")
    return RenderedShapes3D(size)


# ---- 2. The rendered Shapes3D -------------------------------------------------------------------
# A fully saturated hue k/10 has channels that are multiples of one fifth: (0..5) / 5, integers.
FIFTHS = np.array([
    [5, 0, 0],  # red
    [5, 3, 0],
    [4, 5, 0],
    [1, 5, 0],
    [0, 5, 2],
    [0, 5, 5],  # cyan
    [0, 2, 5],
    [1, 0, 5],
    [4, 0, 5],
    [5, 0, 3],
], np.int16)
UNIT = 64  # planes, the maps of light of `render_planes`, count 1/64 grey levels in int16
SUPERSAMPLE = 3  # rays per pixel and axis


class RenderedShapes3D(Dataset):
    """All 480,000 images, coloured on demand from the planes of the 480 geometries."""
    def __init__(self, size=64, planes=None):
        table = all_combinations(SIZES)
        super().__init__("rendered Shapes3D", TOTAL, size, FACTORS, SIZES, table=table)
        self.planes = render_planes(size) if planes is None else planes

    def images(self, indices):
        """(B, 3, S, S) uint8."""
        rows = to_rows(indices, self.count)
        hues = FIFTHS[self.table[rows, :3]]  # (B, 3 surfaces, 3 channels)
        images = np.empty((len(rows), 3, self.size**2), np.uint8)

        for start in range(0, len(rows), 16):  # sixteen at a time stay in the processor's cache
            part = slice(start, start + 16)
            planes = self.planes[rows[part] % GEOMETRIES]  # (16, 6, S * S)
            image = planes[:, 3:]  # the indices made a copy of `self.planes`, so it may change
            for surface in range(3):  # floor, wall, object
                hue = hues[part, surface, :, None]  # (16, 3, 1)
                image += planes[:, surface, None] * hue
            images[part] = np.clip((image + UNIT // 2) // UNIT, 0, 255)  # rounded to nearest

        return torch.from_numpy(images.reshape(-1, 3, self.size, self.size))  # -> (B, 3, S, S)

    def __getstate__(self):
        return self.size, zlib.compress(self.planes.tobytes(), 1)  # 24 MB -> 4 MB

    def __setstate__(self, state):
        size, packed = state
        planes = np.frombuffer(zlib.decompress(packed), np.int16)
        self.__init__(size, planes.reshape(GEOMETRIES, 6, size**2))


def all_combinations(sizes):
    """(n, F): every combination of factors once, the last one turning fastest."""
    return np.indices(sizes, np.int32).reshape(len(sizes), -1).T  # (F, *sizes) -> (n, F)


def render_planes(size):
    """(480, 6, size * size) int16, in 1 / UNIT grey levels. The first three planes are multiplied
    by FIFTHS, so they hold a fifth of the light. Each pixel is shrunk by Lanczos from 3x3 rays,
    because this gives edges like those of the real images."""
    n = size * SUPERSAMPLE
    unit = 255 * UNIT / np.array([[5], [5], [5], [1], [1], [1]])
    planes = np.empty((GEOMETRIES, 6, size * size), np.int16)

    for view, angle in enumerate(LEVELS[5]):
        eye, rays = camera_rays(angle, n)
        room = room_light(eye, rays)
        solids = itertools.product(LEVELS[3], range(SIZES[4]))
        for k, (scale, shape) in enumerate(solids):
            with np.errstate(all="ignore"):  # rays that miss: NaN and inf
                fine = light_planes(shape, scale, eye, rays, room).astype(np.float32)
            small = [Image.fromarray(plane).resize((size, size), Image.LANCZOS)
                     for plane in fine.reshape(6, n, n)]
            planes[k * SIZES[5] + view] = np.rint(np.stack(small).reshape(6, -1) * unit)
    return planes


# The scene. x points right, y up, z away from us; the object stands on the floor at the origin.
# Lengths are in edges of the cube at scale 1, light in parts of white. All numbers were found by
# least squares on published images.
CUBE, CYLINDER, SPHERE, CAPSULE = range(4)  # the official order
RADIUS = (0.5, 0.531, 0.605, 0.461)  # of each shape at scale 1; of the cube, half its edge
HEIGHT = (1.0, 1.083, 1.21, 1.839)
CAMERA = dict(
    distance=3.911,
    height=1.214,
    pitch=0.0403,  # radians, downwards
    focal=2.415,  # in half widths of the image
)
HALF_WIDTH = 4.158  # of the square room
WALL_HEIGHT = 2.443
SKY = np.array([[153], [226], [249]]) / 255
LAMP = dict(
    position=(-1.73, 5.43, 0.47),
    light=1.272,
    power=2.57,  # with which it fades along the floor
)
WALL_LIGHT = dict(  # at the middle, and what is added per length along the wall
    far=(1.007, -0.0197),
    left=(0.929, -0.0789),
    right=(0.761, -0.0425),
)
SUN = np.array([-0.259, 1.0, 0.127]) / np.linalg.norm([-0.259, 1.0, 0.127])
SHADOW = 0.331  # the floor where the object hides the sun
OBJECT_LIGHT = dict(
    ambient=0.457,
    camera=0.504,  # from a lamp that rides on the camera
    above=0.482,  # from one high on the left
    gloss=0.115,  # white, whatever the hue
    gloss_slope=15.5,
    gloss_edge=0.042,
)
ABOVE = np.array([-0.26, 0.957, 0.129])  # direction of the lamp of `above` and `gloss`
TILE = 0.4  # width of a tile
STAIN = (1.45, -0.05)  # corner of the first square with a stain
FLOOR_SHIFT = 9  # of the texture on the floor, so that no stain lies on it


def camera_rays(angle, n):
    """The eye (3,) and the unit directions (3, n * n) of its rays, row by row; angle in degrees."""
    turn = np.deg2rad(-angle)
    pitch = CAMERA["pitch"]

    # The camera circles the object and looks down a little.
    right = np.array([np.cos(turn), 0, -np.sin(turn)])
    ahead = np.array([np.sin(turn), 0, np.cos(turn)])  # level; `forward` is tilted by the pitch
    up = np.array([0, 1.0, 0])  # vertical; so is `upward`
    eye = up * CAMERA["height"] - ahead * CAMERA["distance"]
    forward = ahead * np.cos(pitch) - up * np.sin(pitch)
    upward = ahead * np.sin(pitch) + up * np.cos(pitch)

    # One ray goes through the centre of each pixel. The image spans -1 to 1 both ways.
    centres = (np.arange(n) + 0.5) / n * 2 - 1
    across = np.outer(right, np.tile(centres, n))
    down = np.outer(upward, np.repeat(centres, n))
    rays = CAMERA["focal"] * forward[:, None] + (across - down)  # (3, n * n)
    return eye, rays / np.linalg.norm(rays, axis=0)


# Points of a ray are o + t d. Here o (3, N or 1) is where the ray begins, d (3, N or 1) its
# direction, and t the distance from o. The root of a negative number is NaN, which fails every
# comparison and so counts as a miss.
def meet_round(o, d, r):
    """The smaller t with |o + t d| = r, in the axes given: three for a ball, two for a tube."""
    a = (d * d).sum(0)
    b = (o * d).sum(0)
    c = (o * o).sum(0) - r * r
    return (-b - np.sqrt(b * b - a * c)) / a


def meet_cube(r, height, o, d):
    """A ray is inside between its last entry between two opposite faces and its first exit."""
    lowest = np.array([[-r], [0], [-r]])
    highest = np.array([[r], [height], [r]])
    t_low = (lowest - o) / d
    t_high = (highest - o) / d
    entry = np.minimum(t_low, t_high).max(0)
    leave = np.maximum(t_low, t_high).min(0)
    inside = (entry > 0) & (entry <= leave)
    return np.where(inside, entry, np.inf)


def meet_cylinder(r, height, o, d):
    """A tube and its lid: nobody sees it from below."""
    tube = meet_round(o[[0, 2]], d[[0, 2]], r)
    lid = (height - o[1]) / d[1]

    y = o[1] + tube * d[1]
    x = o[0] + lid * d[0]
    z = o[2] + lid * d[2]
    on_tube = (y >= 0) & (y <= height)
    on_lid = x * x + z * z <= r * r
    return nearest((tube, on_tube), (lid, on_lid))


def meet_capsule(r, height, o, d):
    """Two balls and a tube between them. In a sphere both balls are one, the tube has no length."""
    lower_centre = np.array([[0], [r], [0]])
    upper_centre = np.array([[0], [height - r], [0]])
    lower = meet_round(o - lower_centre, d, r)
    upper = meet_round(o - upper_centre, d, r)
    tube = meet_round(o[[0, 2]], d[[0, 2]], r)

    y = o[1] + tube * d[1]
    on_tube = (y >= r) & (y <= height - r)
    return nearest((lower, True), (upper, True), (tube, on_tube))


def nearest(*surfaces):
    """The smallest t > 0 (N,) of surfaces, each given as t and whether that point belongs to it."""
    ts = [np.where((t > 0) & belongs, t, np.inf) for t, belongs in surfaces]
    return np.min(ts, 0)


def meet_object(shape, scale, o, d):
    """The t (N,) at which rays o + t d first meet the object; inf if they miss it."""
    meet = {CUBE: meet_cube, CYLINDER: meet_cylinder}.get(shape, meet_capsule)
    return meet(RADIUS[shape] * scale, HEIGHT[shape] * scale, o, d)


def object_normal(shape, scale, p):
    """The outward unit normal (3, N) at points p (3, N) on the object."""
    r = RADIUS[shape] * scale
    height = HEIGHT[shape] * scale
    x, y, z = p
    if shape == CUBE:  # the face whose axis is furthest out
        outward = np.stack([x / r, y / height * 2 - 1, z / r])  # (3, N)
        distance = np.abs(outward)
        return np.where(distance == distance.max(0), np.sign(outward), 0)
    if shape == CYLINDER:
        lid = y > height * (1 - 1e-6)
        upwards = np.array([[0.0], [1.0], [0.0]])
        return np.where(lid, upwards, np.stack([x / r, 0 * y, z / r]))
    axis = np.clip(y, r, height - r)  # height of the nearest point on the axis
    return np.stack([x, y - axis, z]) / r  # 3 (N,) -> (3, N)


def texture(u, v):
    """Faint hexagonal tiles everywhere; on the walls a slanting stain in every square of them.

    u, v (N,): lengths along the surface -> the factors (N,) by which it changes the light.
    """
    root = np.sqrt(3)
    k = 4 * np.pi / (root * TILE)
    across = np.cos(k * u * root / 2)
    along = np.cos(k * v / 2)
    tiles = np.cos(k * v) + 2 * across * along

    # Places in their square, from -0.5 to 0.5. A stain is narrow one way and longer the other.
    u = (u - STAIN[0]) / WALL_HEIGHT % 1 - 0.5
    v = (v - STAIN[1]) / WALL_HEIGHT - 0.5
    narrow = (u + v) / 0.09
    long = (u - v) / 0.22
    stain = np.exp(-narrow ** 2 - long ** 2)
    return 1 + 0.007 * tiles - 0.08 * stain


def room_light(eye, rays):
    """What N rays meet in the empty room: part (N,), 0 sky, 1 floor, 2 wall; t (N,); light (N,);
    and the point (3, N)."""
    with np.errstate(divide="ignore"):
        floor = -eye[1] / rays[1]
        far = (HALF_WIDTH - eye[2]) / rays[2]
        left = (-HALF_WIDTH - eye[0]) / rays[0]
        right = (HALF_WIDTH - eye[0]) / rays[0]
    t = np.stack([floor, far, left, right])
    t[t <= 0] = np.inf  # behind us
    side = t.argmin(0)
    t = t.min(0)
    p = eye[:, None] + t * rays
    x, y, z = p

    # The floor has a lamp above it, each wall becomes darker along its length.
    to_lamp = p - np.array(LAMP["position"])[:, None]
    distance = np.sqrt((to_lamp ** 2).sum(0))
    lights = [LAMP["light"] * (LAMP["position"][1] / distance) ** LAMP["power"]]
    for wall, along in (("far", x), ("left", z), ("right", z)):
        middle, slope = WALL_LIGHT[wall]
        lights.append(middle + slope * along)
    light = np.choose(side, lights)

    # Which two coordinates run along the floor, the far wall, the side walls.
    u = np.where(side < 2, x, z)
    v = np.where(side == 0, z - FLOOR_SHIFT, y)
    light *= texture(u, v)

    part = np.where(side == 0, 1, np.where(y < WALL_HEIGHT, 2, 0))
    return part, t, light, p


def light_planes(shape, scale, eye, rays, room):
    """(6, N): brightness of floor, wall, object, then red, green, blue that no hue changes."""
    part, t_room, light, p = room
    planes = np.zeros((6, len(part)))
    planes[0] = np.where(part == 1, light, 0)
    planes[1] = np.where(part == 2, light, 0)
    planes[3:] = np.where(part == 0, SKY, 0)

    # Where the way from the floor to the sun meets the object, little light is left.
    floor = np.flatnonzero(part == 1)
    to_sun = meet_object(shape, scale, p[:, floor], SUN[:, None])
    planes[0, floor[to_sun < np.inf]] = SHADOW

    # Rays that end on the object.
    origin = eye[:, None]
    t = meet_object(shape, scale, origin, rays)
    hit = np.flatnonzero(t < t_room)
    direction = rays[:, hit]
    point = origin + t[hit] * direction
    normal = object_normal(shape, scale, point)
    cosine = -(normal * direction).sum(0)
    facing = np.maximum(cosine, 0)
    above = ABOVE @ normal  # (3,) @ (3, N) -> (N,)

    planes[:, hit] = 0
    planes[2, hit] = OBJECT_LIGHT["ambient"]
    planes[2, hit] += OBJECT_LIGHT["camera"] * facing
    planes[2, hit] += OBJECT_LIGHT["above"] * np.maximum(above, 0)
    gloss = OBJECT_LIGHT["gloss_slope"] * above - OBJECT_LIGHT["gloss_edge"]
    planes[3:, hit] = OBJECT_LIGHT["gloss"] * np.clip(gloss, 0, 1)
    return planes


# ---- 3. The files that people have. Skip on first reading. --------------------------------------
# Pixels may come in any layout, type and range, labels in any form that can be numbered. What is
# done with them is decided once for a whole set, and its note says what.
PICTURES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".avif", ".webp", ".gif", ".bmp",
            ".tif", ".tiff", ".tga", ".ppm", ".pgm", ".pbm", ".pnm")
IMAGE_NAMES = ("images", "imgs", "image")  # what files call their images, and their labels
LABEL_NAMES = ("factors", "labels", "label", "latents_classes", "latents/classes", "classes",
               "targets", "y")
MOST_LEVELS = 1000  # a factor of more values is an identity or a measurement
BLOCK = 1 << 22  # bytes that are read at a time; as floats they take eight times as much
CONVERSION = 8  # counted up whenever a conversion's result changes: older caches are not used


def open_files(path, size, cache):
    """The dataset in a file or folder, out of its cache, which is written first if need be."""
    if not os.path.exists(os.path.expanduser(path)):
        raise FileNotFoundError(f"{path} does not exist; expected a dataset file or a folder")
    # A link may lead to a place and a name that nobody chose, so it is not followed.
    path = Path(os.path.abspath(os.path.expanduser(path)))

    with one_line(path):
        if path.is_dir():
            files, note = files_below(path)
        else:
            files, note = files_read(path), ""
        stamp = fingerprint(path, files)
    images_file, labels_file = cache_files(path, size, cache)
    dataset = read_cache(images_file, labels_file, stamp)
    if dataset is not None:
        return dataset

    with contextlib.ExitStack() as stack:  # closes the file whatever happens
        with one_line(path):
            if path.is_dir():
                dataset, blocks = read_folder(path, files, note, size)
            else:
                arrays = stack.enter_context(open_arrays(path))
                dataset, blocks = read_arrays(path, arrays, size)
        write_cache(dataset, blocks, images_file, labels_file, stamp)
    dataset = read_cache(images_file, labels_file, stamp)
    if dataset is None:  # another process is writing the same files just now
        return open_files(path, size, cache)
    return dataset


@contextlib.contextmanager
def one_line(path):
    """Makes one line of whatever a file provokes in its readers (h5py, zipfile, Pillow...)."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or repr(error)
        if "expected" not in reason:  # it is not one of ours
            reason += "; expected a complete, closed file"
        raise ValueError(f"{path} cannot be read: {reason}") from None


def print_safely(text):
    """print, but it cannot fail: the terminal may be unable to show a name, or be gone (`| head`),
    and neither is a reason to stop hours of work."""
    coding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(str(text).encode(coding, "backslashreplace").decode(coding), flush=True)
    except (OSError, ValueError):  # what is not written yet goes nowhere, too
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- 4. Indices and identity --------------------------------------------------------------------
def to_array(values):
    """A tensor on any device, or what numpy takes -> an array."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
    return np.asarray(values)


def to_rows(indices, count):
    """A number, list, slice, mask or tensor -> row numbers (B,) int64, none negative. IndexError if
    there is no such row, as of a Python list: this is what ends a for loop."""
    if isinstance(indices, slice):
        return np.arange(count)[indices]
    rows = np.atleast_1d(to_array(indices))
    if rows.dtype == bool and rows.shape == (count,):
        return np.flatnonzero(rows)
    if rows.shape == (0,):
        return np.empty(0, np.int64)  # numpy takes an empty list for floats

    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise IndexError(f"indices of type {rows.dtype} and shape {rows.shape}; expected whole "
                         f"numbers (B,), a slice or a mask ({count},)")
    outside = (rows < -count) | (rows >= count)
    if outside.any():
        raise IndexError(f"there is no image {rows[outside][0]}; the dataset has {count:,}")
    rows = rows.astype(np.int64)
    return np.where(rows < 0, rows + count, rows)


def find_rows(dataset, factors):
    """What Dataset.find promises. A combination of factors is read as one number, its key, of which
    each factor is a digit."""
    wanted = np.atleast_2d(to_array(factors))
    names = dataset.factor_names
    if wanted.shape[1] != len(names):
        raise ValueError(f"{wanted.shape[1]} factors; {dataset.name} has {len(names)}: {names}")
    if wanted.dtype.kind not in "iu":
        raise ValueError(f"factors of type {wanted.dtype}; expected whole numbers, from 0 on")
    digit_values, keys, order = dataset.factor_keys

    impossible = (wanted < 0) | (wanted >= dataset.factor_sizes)
    wanted_keys = wanted.astype(digit_values.dtype) @ digit_values
    wanted_keys[impossible.any(1)] = -1  # no image has this key
    position = np.searchsorted(keys, wanted_keys).clip(max=dataset.count - 1)

    absent = np.flatnonzero(keys[position] != wanted_keys)
    if len(absent):
        levels = tuple(wanted[absent[0]].tolist())
        raise ValueError(f"{dataset.name}: no image has {names} = {levels}")
    return order[position]


def sorted_keys(dataset):
    """-> the value of each digit (F,); all keys in order (count,); and which image has each key."""
    total = 1
    digit_values = []
    for size in reversed(dataset.factor_sizes):
        digit_values.insert(0, total)
        total *= size
    if total < 2**63:
        digit_values = np.array(digit_values, np.int64)
    else:
        digit_values = np.array(digit_values, object)  # Python's numbers: exact, but slow

    keys = dataset.table.astype(digit_values.dtype) @ digit_values
    order = np.argsort(keys, kind="stable")  # so that of equal keys the first image comes first
    return digit_values, keys[order], order


def digest(dataset):
    """A number for all labels and 64 images; for no rendered image, as another machine may round
    one differently."""
    number = hashlib.sha256()
    whole = getattr(dataset, "whole", dataset)  # of a Part
    if whole.pixels is None:
        number.update(b"rendered")
    else:
        rows = np.linspace(0, dataset.count - 1, 64).astype(int)
        number.update(dataset.images(np.unique(rows)).numpy().tobytes())
    number.update(np.asarray(dataset.table, "<i4").tobytes())
    return number.hexdigest()[:16]


# ---- 5. Pixels of any range and layout -> bytes -------------------------------------------------
def brightness(blocks):
    """The numbers that stand for black and white in a whole set of arrays. Bytes are what they are,
    and so is 0 to 1, -1 to 1 of which the lower half is used, and 8 or 16 bits of which the highest
    is used. Of anything else, the smallest number is black and the largest white. Gaps and
    infinities do not count."""
    low, high = np.inf, -np.inf
    whole = True
    for block in blocks:
        if block.dtype.kind == "f":
            block = block[np.isfinite(block)]
            whole = whole and bool((block % 1 == 0).all())
        if block.size:
            low = min(low, block.min().item())
            high = max(high, block.max().item())
        if block.dtype == np.uint8 and high > 1:
            return 0, 255  # no need to read on

    if low > high:  # there was no number: all pictures are plain bytes
        return 0, 255

    slack = 1e-3  # what resizing or rounding may have added
    if -slack <= low and high <= 1 + slack:
        return 0, 1
    if -1 - slack <= low < -0.5 - slack and high <= 1 + slack:
        return -1, 1
    if whole and low >= 0 and 2**7 <= high < 2**8:
        return 0, 255
    if whole and low >= 0 and 2**15 <= high < 2**16:
        return 0, 2**16 - 1
    return low, high


def to_bytes(values, black, white):
    """Numbers of any type -> uint8: black becomes 0, white 255. What is not a number is black."""
    if values.dtype == np.uint8 and (black, white) == (0, 255):
        return values
    values = np.nan_to_num(values.astype(np.float64), nan=black).clip(black, white)
    span = (white - black) or 1  # 1: all images are black
    return np.rint((values - black) / span * 255).astype(np.uint8)


def add_brightness(dataset, black, white):
    """Say in the note which numbers are black and white, unless they are those of bytes."""
    if (black, white) != (0, 255):
        dataset.add_note(f"black is {black:g} and white {white:g}")


def shrink(block, size, how=Image.LANCZOS):
    """(b, h, w) or (b, h, w, 1 to 4) uint8 -> (b, 3, size, size), of each the middle square. A
    second or fourth channel is opacity, and white lies behind."""
    count, h, w = block.shape[:3]
    block = block.reshape(count, h, w, -1)  # (b, h, w) -> (b, h, w, 1)
    if block.shape[3] in (2, 4):
        opacity = block[..., -1:] / np.float32(255)
        block = np.rint(block[..., :-1] * opacity + 255 * (1 - opacity)).astype(np.uint8)
    block = np.broadcast_to(block, (count, h, w, 3))  # grey -> (.., 3)

    side = min(h, w)
    row = (h - side) // 2
    column = (w - side) // 2
    block = block[:, row:row + side, column:column + side]
    if side != size:
        block = np.stack([Image.fromarray(image).resize((size, size), how) for image in block])
    return block.transpose(0, 3, 1, 2)  # (b, S, S, 3) -> (b, 3, S, S)


# ---- 6. Labels of any form -> factors -----------------------------------------------------------
MPI3D = ("object colour", "object shape", "object size", "camera height", "background colour",
         "horizontal axis", "vertical axis")
DSPRITES = ("colour", "shape", "scale", "orientation", "x", "y")
# Sets that hold every combination once, the last factor fastest, and that come without labels:
# words of their file's name, sides of their images, and their factors.
OFFICIAL = [
    (("mpi3d", "real3d"), (64,), MPI3D, (6, 6, 2, 3, 3, 40, 40)),  # toy, realistic, real
    (("mpi3d", "real3d"), (64,), MPI3D, (4, 4, 2, 3, 3, 40, 40)),  # complex, and older releases
    (("cars3d",), (64, 128), ("elevation", "azimuth", "object"), (4, 24, 183)),
]


def add_official_labels(dataset, shape):
    """The labels of a set that we know, if count, image size and the file's name are all its own;
    shape is that of the images in the file."""
    name = dataset.name.lower().replace("_", "").replace("-", "")
    for words, sides, factor_names, sizes in OFFICIAL:
        known_size = shape[1] == shape[2] and shape[1] in sides
        known_name = any(word in name for word in words)
        if dataset.count == np.prod(sizes) and known_size and known_name:
            dataset.factor_names = factor_names
            dataset.factor_sizes = sizes
            dataset.table = all_combinations(sizes)
            dataset.add_note("it holds no labels, these are of the published order")
            return
    dataset.add_note(f"no labels ({', '.join(LABEL_NAMES)})")


def add_factors(dataset, columns, gaps=("", "nan", "NaN")):
    """Makes a factor of each of the columns, {name: labels (n,) or (n, 1)}, that can be numbered;
    the note says why others cannot. gaps: texts that stand for a missing label, as in CSV files."""
    sizes = {}
    numbers = []
    left_out = {}  # {why: names}
    for name, column in columns.items():
        try:
            if column.shape not in ((dataset.count,), (dataset.count, 1)):
                raise ValueError(f"shape {column.shape}; expected ({dataset.count},)")
            column = column.reshape(-1)
            sizes[name], levels = number(column, gaps)
            numbers.append(levels)
        except ValueError as error:
            left_out.setdefault(str(error), []).append(name)
            continue

        _, examples = np.unique(levels, return_index=True)  # of each level an image
        words = column[examples]
        is_whole = words.dtype.kind in "iu"
        if words.dtype.kind in "SUO" or (is_whole and (words != np.arange(len(words))).any()):
            dataset.add_note(f"{name} from 0 on: {some_of(words, 9)}")

    for why, names in left_out.items():
        dataset.add_note(f"no factor: {some_of(names, 6)} ({why})")

    if sizes:
        dataset.factor_names = tuple(sizes)
        dataset.factor_sizes = tuple(sizes.values())
        dataset.table = np.stack(numbers, 1).astype(np.int32)  # F (n,) -> (n, F)


def some_of(words, most):
    """The first words, bytes or text, as one text, and how many more there are."""
    words = list(words)
    text = ", ".join(as_text(word) for word in words[:most])
    if len(words) > most:
        text += f" and {len(words) - most} more"
    return text


def as_text(word):
    """Bytes or anything else as text. Text of a fixed width ends in blanks, which are left out."""
    text = word.decode(errors="replace") if isinstance(word, bytes) else str(word)
    return " ".join(text.split())


def columns_of(labels, count, names=()):
    """{name: column (n,)} of labels (n,), (n, F), (F, n), one-hot (n, K) or (n, F, K), or with
    named fields; names (F) are used if they fit. ValueError if there is not a row an image."""
    if labels.dtype.names:
        return {field: labels[field] for field in labels.dtype.names}

    # Any layout -> (n,) or (n, F).
    shape = labels.shape
    if len(shape) > 1 and shape[0] != count and shape[-1] == count:
        labels = labels.T  # (F, n) -> (n, F)
    if labels.shape[:1] != (count,) or not labels.size:
        raise ValueError(f"shape {shape}; expected {count:,} rows")
    labels = labels.reshape(count, *[length for length in labels.shape[1:] if length > 1])
    one_hot = is_one_hot(labels)
    if one_hot:
        labels = labels.argmax(-1)  # (n, K) -> (n,)
    if labels.ndim > 2:
        raise ValueError(f"shape {shape}; expected a row of factors for each image")

    columns = labels.reshape(count, -1).T  # (n,) or (n, F) -> (F, n)
    if len(names) != len(columns):
        names = [f"factor {j}" for j in range(len(columns))]
        if is_shapes3d(columns):
            names = FACTORS
        if one_hot and len(columns) == 1:
            names = ["class"]
    return dict(zip(unique_names(names), columns))


def unique_names(names):
    """The names as text. One that stands there twice gets its column's number."""
    names = [as_text(name) for name in names]
    while len(set(names)) < len(names):  # "x 0" may stand there, too
        names = [f"{name} {j}" if names.count(name) > 1 else name for j, name in enumerate(names)]
    return names


def is_one_hot(labels):
    """Whether each row of the last axis has a single 1, and 0 in all other columns."""
    if labels.ndim < 2 or labels.dtype.kind not in "biuf":
        return False
    return bool(np.isin(labels, (0, 1)).all() and (labels.sum(-1) == 1).all())


def is_shapes3d(columns):
    """Whether columns (F, n) are the six published ones, of all images or of some."""
    if len(columns) != 6 or columns.dtype.kind != "f":
        return False
    columns = columns.astype(float).round(4)
    return all(np.isin(column, levels.round(4)).all() for column, levels in zip(columns, LEVELS))


def number(column, gaps=()):
    """(n,) labels of any type -> how many different values there are and, (n,), which one each
    image has, in their order. ValueError, in a few words, if that makes no factor, as when one of
    the texts `gaps` is among them."""
    is_float = column.dtype.kind == "f"
    if (column != column).any() or (is_float and np.isinf(column).any()):  # NaN is not itself
        raise ValueError("has gaps")
    try:
        values, numbers = np.unique(column, return_inverse=True)
        if column.dtype.kind in "SUO":
            if any(as_text(value) in gaps for value in values):
                raise ValueError("has gaps")

            # Numbers as text: 2 comes before 10.
            with contextlib.suppress(TypeError, ValueError):
                rank = np.unique(values.astype(float), return_inverse=True)[1]
                if rank.max() + 1 == len(values):  # "1" and "01" stay two values
                    numbers = rank[numbers]
    except TypeError as error:  # numbers and text in one column have no order
        raise ValueError(error) from None
    if is_float and (values % 1).any():
        # What differs by rounding alone is one level.
        size = np.abs(values.astype(float))
        rounding = 1e-6 * size[1:] + max(1e-10, np.finfo(column.dtype).eps) * size.max()
        is_new = np.diff(values.astype(float)) > rounding
        numbers = np.append(0, is_new.cumsum())[numbers]

    levels = int(numbers.max()) + 1
    if levels == 1:
        raise ValueError("never varies")
    if levels > MOST_LEVELS:
        raise ValueError(f"{levels:,} values; at most {MOST_LEVELS:,} are used")
    if levels > len(column) * 3 / 4:
        raise ValueError("nearly as many values as images")
    return levels, numbers


# ---- 7. HDF5, .npz and .npy files ---------------------------------------------------------------
class StoredArray:
    """An array that can be read in part: an HDF5 dataset, or an .npy file mapped into memory."""
    def __init__(self, values):
        self.values = values
        self.shape = values.shape or ()
        self.dtype = values.dtype

    def whole(self):
        self.check()
        return np.asarray(self.values[()])

    def check(self):
        """ValueError if HDF5 would not read it as it was meant."""
        if isinstance(self.values, h5py.Dataset):
            check_filters(self.values)
            check_written(self.values)

    def blocks(self, scratch):
        """Some rows after the other, (b, *shape[1:])."""
        self.check()
        row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        rows = max(1, BLOCK // row_bytes)  # of a block
        chunk = getattr(self.values, "chunks", None) or [1]
        step = chunk[0]  # a chunk that is cut in two would be decompressed twice
        step *= max(1, rows // step)

        for start in range(0, self.shape[0], step):
            read = np.asarray(self.values[start:start + step])
            for k in range(0, len(read), rows):
                yield read[k:k + rows]


class MatlabArray(StoredArray):
    """An array that MATLAB wrote. It counts the axes from the last to the first, so its images
    (h, w, c, n) are (n, c, w, h) in the file: pictures lie on their sides there."""
    def __init__(self, values):
        super().__init__(values)
        if len(self.shape) > 2:
            *others, w, h = self.shape
            self.shape = (*others, h, w)

    def blocks(self, scratch):
        for block in super().blocks(scratch):
            yield block.swapaxes(-1, -2)


class ZippedArray:
    """An array in an .npz file. numpy would decompress the 12 GB of MPI3D as a whole; this reads
    as much as is needed, with numpy's own functions for the header."""
    def __init__(self, archive, member):
        self.archive = archive
        self.member = member
        with archive.open(member) as file:
            self.shape, self.fortran, self.dtype = read_header(file)

    def whole(self):
        if self.dtype.hasobject:  # reading them could run a program
            raise ValueError("it holds Python objects; expected numbers or text: save "
                             "values.astype(str)")
        with self.archive.open(self.member) as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    def blocks(self, scratch):
        """Some rows after the other, (b, *shape[1:])."""
        if self.fortran:  # the last row ends at the end: put the file where any part can be read
            extracted = self.archive.extract(self.member, scratch / "unpacked")
            yield from StoredArray(np.load(extracted, mmap_mode="r")).blocks(scratch)
            return
        row = np.dtype((self.dtype, self.shape[1:]))
        step = max(1, BLOCK // row.itemsize) * row.itemsize
        with self.archive.open(self.member) as file:
            read_header(file)
            while block := file.read(step):
                yield np.frombuffer(block, row)


class UnreadableArray:
    """It stands for an array that a file names and that cannot be read."""
    shape = ()

    def __init__(self, why):
        self.dtype = why  # for the list of what a file holds

    def whole(self):
        raise ValueError(self.dtype)


def read_header(file):
    """Shape, whether in Fortran's order, and type of the array in an .npy file."""
    if np.lib.format.read_magic(file) == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)  # 3.0 differs in the letters of field names


@contextlib.contextmanager
def open_arrays(path):
    """{name: StoredArray, ZippedArray or UnreadableArray} of all arrays in a file. An HDF5 group is
    a part of the name; the attribute factor_names counts as an array."""
    if path.is_file() and h5py.is_hdf5(path):
        with h5py.File(path, "r") as file:
            yield hdf5_arrays(file)
    elif path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if names and not any(name.endswith(".npy") for name in names):
                raise ValueError(f"it is a zip of other files, such as {names[-1]}; expected an "
                                 ".npz, or a folder: unpack it")
            yield zipped_arrays(archive)
    elif path.is_file():
        with path.open("rb") as file:
            start = file.read(24)
        if not start.startswith(np.lib.format.MAGIC_PREFIX):
            raise ValueError("it is no complete HDF5, .npz or .npy file and no folder of pictures; "
                             f"it begins with {start}")
        try:
            images = np.load(path, mmap_mode="r")
        except ValueError as error:
            raise ValueError(f"{error}; expected a whole file of numbers") from None
        yield {"images": StoredArray(images)}
    else:
        raise ValueError("it is neither a file nor a folder")


def zipped_arrays(archive):
    """{name: array} of an open .npz file."""
    arrays = {}
    for member in archive.namelist():
        name = member.removesuffix(".npy")
        if name == member or any(is_hidden(part) for part in name.split("/")):
            continue

        try:
            arrays[name] = ZippedArray(archive, member)
        except Exception:  # its words would advise unsafe loading
            arrays[name] = UnreadableArray("no array that numpy reads")
    return arrays


def hdf5_arrays(file):
    """{name: array} of an open HDF5 file."""
    arrays = {}
    datasets = {}  # a dataset of two names is one array
    for name, item in walk_hdf5(file):
        if item is None:
            arrays[name] = UnreadableArray("a link that leads nowhere")
            continue

        names = item.attrs.get("factor_names")
        if names is not None and not isinstance(names, h5py.Empty):
            arrays["factor_names"] = StoredArray(np.asarray(names))

        if isinstance(item, h5py.Dataset):
            array = MatlabArray(item) if "MATLAB_class" in item.attrs else StoredArray(item)
            if not all(other.exists() for other in other_files(item)):
                array = UnreadableArray("made of other files, and one is missing")
            arrays[name] = datasets.setdefault(item, array)
    return arrays


def walk_hdf5(item, name="", above=()):
    """(name, group or dataset) of all that lies in a group and below. Links are followed; None
    stands for what a link does not find."""
    yield name, item
    if isinstance(item, h5py.Group) and item not in above:  # links may go round
        for key in item:
            yield from walk_hdf5(item.get(key), f"{name}/{key}".lstrip("/"), (*above, item))


def other_files(dataset):
    """The files in which the numbers of an HDF5 dataset lie, if it only points there."""
    names = {name for name, _, _ in dataset.external or ()}
    if dataset.is_virtual:
        for source in dataset.virtual_sources():
            if source.file_name != "." and "%" not in source.file_name:  # itself; a pattern
                names.add(source.file_name)

    files = []
    for name in sorted(names):
        beside = Path(dataset.file.filename).parent / name
        files.append(beside if beside.exists() else Path(name))
    return files


def files_read(path):
    """The file at path, and those that an HDF5 file makes its arrays of."""
    if not path.is_file() or not h5py.is_hdf5(path):
        return [path]

    files = {path}
    with h5py.File(path, "r") as file:
        for _, item in walk_hdf5(file):
            if isinstance(item, h5py.Dataset):
                files.add(Path(item.file.filename))  # of a dataset behind a link
                files.update(other for other in other_files(item) if other.exists())
    return sorted(files)


def check_filters(dataset):
    """ValueError if an HDF5 dataset is compressed in a way that this h5py does not know."""
    settings = dataset.id.get_create_plist()
    filters = [settings.get_filter(k) for k in range(settings.get_nfilters())]
    unknown = [f"{code} {name.decode(errors='replace')}".strip()
               for code, _, _, name in filters if not h5py.h5z.filter_avail(code)]
    if not unknown:
        return
    try:
        dataset[(slice(1),) * dataset.ndim]  # what an absent filter left as it was can be read
    except OSError:
        raise ValueError(f"{dataset.name} is compressed by filter {', '.join(unknown)}, which h5py "
                         "does not have; expected gzip or lzf: write it anew, say with "
                         "h5repack -f GZIP=4") from None


def check_written(dataset):
    """ValueError if a part of an HDF5 dataset was never written. It would be read as zeros."""
    if dataset.is_virtual or dataset.external:
        return

    if dataset.chunks:
        sides = [math.ceil(n / chunk) for n, chunk in zip(dataset.shape, dataset.chunks)]
        expected = math.prod(sides)
        written = dataset.id.get_num_chunks()
    else:
        expected = 1
        written = min(1, dataset.id.get_storage_size())

    if written < expected:
        raise ValueError(f"{dataset.name} was not written to its end, {written} of {expected} "
                         "parts; expected all images: write the others, or resize it")


def read_arrays(path, arrays, size):
    """-> the Dataset in a file, without its pixels, with its labels if it has any; and a function
    that gives its images in order, as blocks (b, 3, size, size) uint8."""
    key, images = find_images(arrays)
    dataset = Dataset(path.stem, images.shape[0], size)
    channels_first = is_channels_first(images.shape)
    shape = images.shape
    if channels_first:
        shape = (shape[0], shape[2], shape[3], shape[1])
    if shape[3:] in ((2,), (4,)):
        dataset.add_note(f"the last of {shape[3]} channels is taken for opacity")
    near = arrays_near(arrays, key)
    check_order(images.shape, near)
    find_labels(dataset, near, shape)

    def blocks(scratch):
        with one_line(path):
            black, white = brightness(images.blocks(scratch))
            add_brightness(dataset, black, white)
            gaps = 0
            for block in images.blocks(scratch):
                if block.dtype.kind == "f":
                    gaps += np.count_nonzero(np.isnan(block))
                if channels_first:
                    block = block.transpose(0, 2, 3, 1)  # (b, c, h, w) -> (b, h, w, c)
                yield shrink(to_bytes(block, black, white), size)
            if gaps:
                dataset.add_note(f"{gaps:,} numbers are NaN and became black")

    return dataset, blocks


def is_channels_first(shape):
    """Whether images of this shape are (n, 1 to 4, h, w) and not (n, h, w, 1 to 4)."""
    return len(shape) == 4 and shape[1] <= 4 < shape[3]


def has_image_layout(array):
    """Whether an array may be images (n, h, w), (n, h, w, 1 to 4) or (n, 1 to 4, h, w)."""
    shape = array.shape
    if len(shape) not in (3, 4) or 0 in shape or array.dtype.kind not in "biuf":
        return False
    if is_channels_first(shape):
        return True
    if len(shape) == 3 and shape[0] == shape[1] != shape[2]:
        return False  # (h, w, n): squares, but their number comes last
    if len(shape) == 3:
        return min(shape[1:]) > 4  # else it is a single image (h, w, 3)
    return shape[3] <= 4


def check_order(shape, arrays):
    """ValueError if grey images are (h, w, n) and not (n, h, w): only the labels can tell."""
    if len(shape) != 3:
        return

    for key in LABEL_NAMES:
        rows = arrays[key].shape if key in arrays else ()
        if rows[:1] == shape[2:] and shape[0] not in rows:
            raise ValueError(f"images have shape {shape} and {key} {rows}; expected images (n, h, "
                             "w) and n rows: save np.moveaxis(images, -1, 0), or leave the labels "
                             "out")


def find_images(arrays):
    """The images among the arrays of a file, and their name there: what is called so, or else is
    alone in its shape."""
    named = [key for key in arrays if key.lower().split("/")[-1] in IMAGE_NAMES]
    keys = [key for key in named or arrays if has_image_layout(arrays[key])]
    if len({arrays[key] for key in keys}) == 1:  # a dataset may have two names
        return keys[0], arrays[keys[0]]

    known = []
    for key, array in arrays.items():
        shape = array.shape or ""  # of what cannot be read, or of a single number
        known.append(f"{key} {array.dtype} {shape}".strip())
    raise ValueError(f"it holds {', '.join(known[:9]) or 'no arrays'}; expected one array 'images',"
                     " numbers of shape (n, h, w), (n, h, w, 1 to 4) or (n, 1 to 4, h, w); the "
                     "first side n is how many there are")


def arrays_near(arrays, key):
    """The arrays of a file by their names in small letters, unless two would be alike. Those in the
    group of the images, whose name is key, are named as there, and win."""
    group = key.lower().rpartition("/")[0] + "/"
    small = collections.Counter(name.lower() for name in arrays)
    names = {name.lower() if small[name.lower()] == 1 else name: array
             for name, array in arrays.items()}

    inside = {name.removeprefix(group): array for name, array in names.items()
              if name.startswith(group)}
    return {**names, **inside}


def find_labels(dataset, arrays, shape):
    """Adds the first labels of a file that can be numbered. Whatever is wrong with labels, the
    images can be used: the note says what is not. shape: of the images (n, h, w, ...)."""
    names = ()
    if "factor_names" in arrays:
        try:
            names = np.ravel(arrays["factor_names"].whole())
        except Exception as error:  # whatever numpy and h5py raise
            dataset.add_note(f"factor_names not used: {error}")

    labelled = False
    for key in LABEL_NAMES:
        group = {name.removeprefix(f"{key}/"): array for name, array in arrays.items()
                 if name.startswith(f"{key}/")}
        if key not in arrays and not group:
            continue
        labelled = True
        try:
            if group:
                columns = {name: array.whole() for name, array in group.items()}
            else:
                columns = read_columns(arrays[key], dataset.count, key, names)
            add_factors(dataset, columns)
        except Exception as error:
            dataset.add_note(f"{key} not used: {error}")
        if dataset.factor_names:
            if len(names) not in (0, len(columns)):
                dataset.add_note(f"factor_names not used: {len(names)} for {len(columns)} factors")
            return

    if not labelled:
        add_official_labels(dataset, shape)


def read_columns(array, count, key, names):
    """columns_of an array in a file, if it is not far larger than labels are."""
    if np.prod(array.shape, dtype=float) > count * 1e4:
        raise ValueError(f"shape {array.shape}; expected a row of factors for each image")
    if key.startswith("latents") and not len(names):
        names = DSPRITES
    return columns_of(array.whole(), count, names)


# ---- 8. Folders: pictures, CelebA, Cars3D -------------------------------------------------------
ATTRIBUTES = ("list_attr_celeba.txt", "list_attr_celeba.csv")
CELEBA_SHAPE = (218, 178)  # rows, columns
CELEBA_CROP = np.s_[57:185, 25:153]
COMPRESSED = 15  # a type of element in a MATLAB file


def files_below(folder):
    """-> the files in a folder that we read, sorted, and a note of how many others there are.
    Hidden ones do not count. The folder of a run of ours is not entered. Links are followed, but
    each folder is entered once: a link upwards would never end."""
    files = []
    unused = []
    runs = []
    unreadable = []
    entered = {str(parent) for parent in folder.resolve().parents}
    for place, folders, names in os.walk(folder, onerror=unreadable.append, followlinks=True):
        is_run = {"checkpoint.pt", "config.json"} <= set(names)
        if is_run:
            runs.append(place)
        if is_run or os.path.realpath(place) in entered:
            folders.clear()
            continue
        entered.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted(names):
            if name.lower().endswith((*PICTURES, "_mesh.mat")) or name in ("list.txt", *ATTRIBUTES):
                kind = files
            else:
                kind = unused
            if not is_hidden(name) and os.path.isfile(os.path.join(place, name)):
                kind.append(Path(place, name))

    # CelebA's list may lie beside its images or, as Kaggle packs it, two levels higher. Pictures of
    # other sets have the same names.
    if "celeba" in f"{folder.parent.name} {folder.name}".lower():
        beside = [parent / name for parent in folder.parents[:2] for name in ATTRIBUTES]
        files += [file for file in beside if file.is_file()]

    note = []
    if unused:
        note.append(f"{len(unused)} files are not used, such as {unused[0].name}")
    if runs:
        note.append(f"{len(runs)} folders are not used, as they are runs, such as {runs[0]}")
    if unreadable:
        note.append(f"{len(unreadable)} folders cannot be read")
    return sorted(files, key=str), "; ".join(note)


def is_hidden(name):
    """Whether this is what a system adds to the folders that it shows, packs or copies."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")


def read_folder(path, files, note, size):
    """Like read_arrays: Cars3D, CelebA if its list names all pictures, or any pictures."""
    cars = [file for file in files if file.name.lower().endswith("_mesh.mat")]
    if cars:
        return read_cars3d(path, cars, files, size)
    pictures = [file for file in files if file.name.lower().endswith(PICTURES)]
    if not pictures:
        raise ValueError(f"it holds no pictures ({' '.join(PICTURES)}) and no car_*_mesh.mat; "
                         f"{note or 'it is empty'}")
    dataset = Dataset(path.name, len(pictures), size, note=note)

    lists = [file for file in files if file.name in ATTRIBUTES]
    if lists:
        add_attributes(dataset, lists[0], pictures)
    if not dataset.attribute_names:
        add_classes(dataset, path, pictures)
    faces = bool(dataset.attribute_names)

    def blocks(scratch):
        black, white = brightness(deep_pictures(pictures))
        add_brightness(dataset, black, white)
        damaged = []
        cut = 0
        for k, file in enumerate(pictures):
            try:
                with Image.open(file) as picture:
                    # Pillow keeps only the higher byte of colours of 16 bits.
                    cut += ";16" in str(picture.tile) and not is_deep(picture)
                    image = decode(picture, black, white)
                if faces and image.shape[:2] == CELEBA_SHAPE:
                    image = image[CELEBA_CROP]
                block = shrink(image[None], size, Image.BILINEAR if faces else Image.LANCZOS)
            except Exception as error:  # Pillow raises whatever its many decoders raise
                damaged.append(k)
                print_safely(f"left out {file} ({error}), {len(damaged)} so far")
                if len(damaged) > max(1, len(pictures) // 100) or len(damaged) == len(pictures):
                    raise ValueError(f"{path}: {len(damaged)} of {k + 1} pictures cannot be read, "
                                     f"the last {file} ({error}); expected at most 1%") from None
            else:
                yield block

        if cut:
            dataset.add_note(f"{cut} pictures have colours of 16 bits, of which 8 are read")
        if damaged:
            dataset.add_note(f"{len(damaged)} damaged pictures are left out")
            dataset.count -= len(damaged)
            dataset.table = np.delete(dataset.table, damaged, 0)

    return dataset, blocks


def is_deep(picture):
    """Whether a PIL picture has more than 8 bits a channel, or floating-point numbers."""
    return picture.mode[0] in "IF"


def deep_pictures(files):
    """The numbers (h, w) of each picture of more than 8 bits, so that all get one scale."""
    for file in files:
        with contextlib.suppress(Exception):  # it is damaged, and will be left out
            with Image.open(file) as picture:
                if is_deep(picture):
                    yield np.asarray(picture)


def decode(picture, black, white):
    """A PIL picture of any mode -> (h, w) or (h, w, 3 or 4) uint8, as a viewer shows it: upright as
    its EXIF says, and the first of several frames."""
    deep = is_deep(picture)
    picture.load()  # raises for damaged pixels, once: asked again, Pillow gives black ones
    with contextlib.suppress(Exception):  # a damaged EXIF block: the pixels may be whole
        picture = ImageOps.exif_transpose(picture)
    if deep:
        return to_bytes(np.asarray(picture), black, white)
    return np.asarray(picture.convert("RGBA" if picture.has_transparency_data else "RGB"))


def add_classes(dataset, folder, pictures):
    """Subfolders are a factor, if all pictures lie in them, as for torchvision's ImageFolder. Of
    folders in folders each level is a factor, if all pictures lie equally deep."""
    places = [file.parent.relative_to(folder) for file in pictures]
    if len({len(place.parts) for place in places}) == 1:
        levels = list(zip(*[place.parts for place in places]))
    else:
        levels = [[place.as_posix() for place in places]]
    levels = [np.array(level) for level in levels if len(set(level)) > 1]
    if Path() in places or not levels:
        return dataset.add_note("no labels")

    names = ["class"]
    if len(levels) > 1:
        names = [f"folder {k + 1}" for k in range(len(levels))]
    dataset.add_note("labels are the subfolders")
    add_factors(dataset, dict(zip(names, levels)), gaps=())


def add_attributes(dataset, path, pictures):
    """CelebA's attributes, if the list has a row for every picture: .png copies of .jpg count. The
    .txt may begin with the number of images, the .csv begins with image_id."""
    text = path.read_text("utf-8-sig", "replace")
    text = text.replace("image_id,", "").replace(",", " ")
    lines = [line.split() for line in text.splitlines()]
    lines = [words for words in lines if words]
    if lines and len(lines[0]) == 1 and lines[0][0].isdecimal():
        del lines[0]  # the number of images

    names = lines[0] if lines else []
    rows = [words for words in lines if len(words) == len(names) + 1]
    values = {Path(words[0]).stem: words[1:] for words in rows}

    stems = collections.Counter(file.stem for file in pictures)
    missing = [file.name for file in pictures if file.stem not in values]
    if missing:
        return dataset.add_note(f"{path.name} is not used: it lacks {missing[0]}")
    if len(values) < len(rows) or len(stems) < len(pictures):
        return dataset.add_note(f"{path.name} is not used: two rows or pictures have one name")

    words = np.array([values[file.stem] for file in pictures])
    try:
        table = np.char.replace(np.char.lower(words), "true", "1")
        table = np.char.replace(table, "false", "-1").astype(float)
        others = table[~np.isin(table, (-1, 0, 1))]
        if len(others):
            raise ValueError(f"it holds {others[0]:g}")
    except ValueError as error:
        return dataset.add_note(f"{path.name} is not used: {error}; expected 1 and -1")
    dataset.name = "CelebA"
    dataset.attribute_names = tuple(names)
    dataset.table = (table > 0).astype(np.int32)  # what is not is -1, or 0
    dataset.add_note(f"attributes of {path}")


def read_cars3d(path, cars, files, size):
    """Like read_arrays: a file a car, with 4 elevations and 24 azimuths each."""
    # The order of the published list differs from that of the folder.
    listed = [file.read_text(errors="replace").split() for file in files if file.name == "list.txt"]
    order = {Path(name).stem: k for k, name in enumerate(itertools.chain(*listed))}
    cars = sorted(cars, key=lambda file: (order.get(file.stem, len(order)), str(file)))
    dataset = Dataset("Cars3D", 96 * len(cars), size)
    elevation, azimuth, car = all_combinations((4, 24, len(cars))).T
    by_car = np.lexsort((azimuth, elevation, car))
    columns = {"elevation": elevation, "azimuth": azimuth, "object": car}
    add_factors(dataset, {name: column[by_car] for name, column in columns.items()})

    def blocks(scratch):
        for file in cars:
            with one_line(file):
                im = read_mat(file.read_bytes())
                h, w, *others = im.shape
                if others != [3, 24, 4]:  # channels, azimuths, elevations
                    raise ValueError(f"im has shape {im.shape}; expected (h, w, 3, 24, 4)")
                yield shrink(im.transpose(4, 3, 0, 1, 2).reshape(96, h, w, 3), size)

    return dataset, blocks


def read_mat(content):
    """The uint8 array `im` in the bytes of a MATLAB file of level 5."""
    for kind, body in mat_elements(content[128:]):
        if kind == COMPRESSED:
            kind, body = next(mat_elements(zlib.decompress(body)))
        flags, shape, name, values, *_ = [*(part for _, part in mat_elements(body)), *[b""] * 4]
        if name == b"im":
            shape = np.frombuffer(shape, "<i4")
            if len(values) != shape.prod():
                raise ValueError(f"im has {len(values)} bytes; expected uint8 of shape {shape}")
            return np.frombuffer(values, np.uint8).reshape(shape, order="F")
    raise ValueError("it holds no array im; expected that of a car, uint8 (h, w, 3, 24, 4)")


def mat_elements(content):
    """(type, bytes) of each element: an 8-byte tag, then data padded to 8 bytes. Up to four bytes
    of data sit in the tag itself, whose first half then holds size and type."""
    start = 0
    while start + 8 <= len(content):
        kind, size = struct.unpack_from("<II", content, start)
        start += 8
        if kind >> 16:  # the small form
            size = kind >> 16
            kind = kind & 0xFFFF
            start -= 4
        yield kind, content[start:start + size]

        start += size
        if kind != COMPRESSED:  # which has no padding
            start += -start % 8


# ---- 9. The cache -------------------------------------------------------------------------------
# Two files of numpy's own: X.cache.npy are the images (n, 3, S, S) uint8, X.cache.npz the labels
# `table` (n, F) int32 and, as JSON, all else. Labels always belong to the images beside them.
def cache_files(path, size, cache):
    """Where the cache of this file or folder is. In a folder of caches, names may be equal."""
    place = path.parent
    name = f"{path.name}.{size}.cache"
    if cache:
        place = Path(os.path.abspath(os.path.expanduser(cache)))
        name = f"{zlib.crc32(os.fsencode(path)):08x}-{name}"
    return place / f"{name}.npy", place / f"{name}.npz"


def fingerprint(path, files):
    """A text that changes if the files do, or the way that we convert them."""
    listed = [CONVERSION]
    for file in files:
        status = file.stat()
        name = str(file).removeprefix(str(path.parent))
        listed.append((name, status.st_size, status.st_mtime_ns))
    return hashlib.sha256(ascii(listed).encode()).hexdigest()


def read_cache(images_file, labels_file, stamp):
    """The dataset in a cache made from the source with this stamp; None: there is none yet."""
    try:
        with np.load(labels_file) as arrays:
            fields = json.loads(str(arrays["about"]))
            table = arrays["table"]
        pixels = np.load(images_file, mmap_mode="r")
        made_from = fields.pop("stamp")
    except (FileNotFoundError, NotADirectoryError):  # another process may write them just now
        return None
    except PermissionError:
        raise
    except Exception:  # its words would advise unsafe loading
        raise ValueError(f"{images_file} or {labels_file.name} is in the way, no whole cache of "
                         "ours; delete both, or choose another folder for the cache") from None

    if made_from != stamp:
        print_safely(f"{images_file} was made from other data, or in another way")
        return None
    for key in ("factor_names", "factor_sizes", "attribute_names"):
        fields[key] = tuple(fields[key])
    return Dataset(**fields, table=table, pixels=pixels)


def write_cache(dataset, blocks, images_file, labels_file, stamp):
    """Writes both files in a temporary folder, from which they move only if all goes well. Two
    processes at once do the work twice, but safely."""
    gigabytes = dataset.count * 3 * dataset.size**2 / 1e9
    print_safely(f"converting {dataset.name}, once: {dataset.count:,} images, {gigabytes:.1f} GB, "
                 f"to {images_file}")
    try:
        images_file.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(images_file.parent).free < gigabytes * 1e9:
            raise OSError("the disk is full")
        with scratch_folder(images_file.parent) as scratch:
            pixels = scratch / "images.npy"
            labels = scratch / "labels.npz"
            with contextlib.closing(blocks(scratch)) as stream:
                write_images(pixels, dataset, stream)
            fields = {**vars(dataset), "stamp": stamp}
            table = fields.pop("table")
            del fields["pixels"]
            np.savez(labels, about=json.dumps(fields), table=table)

            labels_file.unlink(missing_ok=True)  # never old labels beside new images
            os.replace(pixels, images_file)
            os.replace(labels, labels_file)
    except OSError as error:
        raise OSError(f"cannot write {images_file} ({error.strerror or error}); it takes "
                      f"{gigabytes:.1f} GB; choose a folder for it with cache= in Python or "
                      "--cache DIR on the command line") from None


def write_images(path, dataset, blocks):
    """An .npy file of the blocks. Its header has the number of images, and is written again at the
    end, as damaged ones were left out."""
    def write_header():
        shape = (dataset.count, 3, dataset.size, dataset.size)
        file.seek(0)
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": shape})

    written = 0
    start = time.monotonic()
    next_word = start + 20  # seconds
    with open(path, "wb") as file:
        write_header()
        for block in blocks:
            file.write(np.ascontiguousarray(block))
            written += len(block)

            now = time.monotonic()
            if now > next_word:
                next_word = now + 60
                minutes = (now - start) / 60 * (dataset.count / written - 1)
                print_safely(f"{written:,} of {dataset.count:,} images, {minutes:.1f} minutes left")

        if written != dataset.count:
            raise ValueError(f"{dataset.name} ends after {written:,} of {dataset.count:,} images")
        write_header()


@contextlib.contextmanager
def scratch_folder(place):
    """A temporary folder in the folder `place`. What a killed process left there is removed: one of
    this machine at once, of another machine that shares the disk after a day without a change."""
    prefix = f"encdiff-{platform.node()}"
    for folder in place.glob("encdiff-*.tmp"):
        with contextlib.suppress(OSError, ValueError):
            age = time.time() - max(file.stat().st_mtime for file in [folder, *folder.iterdir()])
            machine, process, _ = folder.name.rsplit("-", 2)
            if age > 24 * 3600 or (machine == prefix and is_dead(int(process))):
                shutil.rmtree(folder)

    with tempfile.TemporaryDirectory(prefix=f"{prefix}-{os.getpid()}-", suffix=".tmp", dir=place,
                                     ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def is_dead(process):
    """Whether no process has this number. Windows cannot be asked: there it would be ended."""
    if os.name == "nt":
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def write_shapes3d(path, size=64, indices=slice(None)):
    """Writes the rendered images in the layout of the published 3dshapes.h5, for programs that read
    it: `images` (n, size, size, 3) uint8 and `labels` (n, 6) float64 in the units of LEVELS. All
    480,000 images take minutes and about a third of a gigabyte. OSError if path exists."""
    path = Path(os.path.expanduser(path))
    if path.exists():
        raise FileExistsError(f"{path} exists; expected a new file")
    dataset = open_dataset(size=size)
    rows = to_rows(indices, len(dataset))
    levels = dataset.factors(rows).numpy()
    labels = np.stack([LEVELS[j][levels[:, j]] for j in range(6)], 1)

    with scratch_folder(path.absolute().parent) as scratch:
        with h5py.File(scratch / "images.h5", "w") as file:
            file["labels"] = labels
            shape = (len(rows), size, size, 3)
            images = file.create_dataset("images", shape, np.uint8, compression="gzip",
                                         chunks=(min(len(rows), 64), size, size, 3))
            for start in range(0, len(rows), 64):
                block = dataset.images(rows[start:start + 64])
                images[start:start + 64] = block.permute(0, 2, 3, 1)  # (b, S, S, 3)
        os.replace(scratch / "images.h5", path)


# ---- 10. A combination of factors that training leaves out ---------------------------------------
class Part(Dataset):
    """Some images of a dataset, those of the given rows (n,) int64, in that order."""
    def __init__(self, whole, rows):
        super().__init__(whole.name, len(rows), whole.size, whole.factor_names, whole.factor_sizes,
                         whole.attribute_names, whole.note, whole.table[rows])
        self.whole = whole
        self.rows = rows

    def images(self, indices):
        """(B, 3, S, S) uint8."""
        return self.whole.images(self.rows[to_rows(indices, self.count)])


def read_combination(dataset, words):
    """"floor hue=0 & shape=3" -> {0: 0, 4: 3}: columns of the dataset's factors and their values.

    Values count from 0. ValueError unless these are two or more factors, each with one of its
    values, and some images have all of them, and others not.
    """
    names = list(dataset.factor_names)
    if not names:
        raise ValueError(f"{dataset.name} has no factors; expected a dataset with labels")

    parts = words.split("&")
    for k in reversed(range(len(parts) - 1)):
        if "=" not in parts[k]:  # this & belongs to a name
            parts[k:k + 2] = ["&".join(parts[k:k + 2])]

    combination = {}
    for part in parts:
        name, sign, value = part.rpartition("=")
        name = name.strip()
        value = value.strip()
        if not sign:
            raise ValueError(f"{part.strip()!r} is no factor with a value; expected NAME=VALUE, as "
                             "in 'floor hue=0 & shape=3'")
        if name not in names:
            known = ", ".join(names) or "none"
            raise ValueError(f"no factor is called {name!r}; expected one of {known}, as in "
                             f"'floor hue=0 & shape=3'")

        column = names.index(name)
        size = dataset.factor_sizes[column]
        if value not in {str(k) for k in range(size)}:
            raise ValueError(f"{name} is {value!r}; expected 0 to {size - 1}")
        if column in combination:
            raise ValueError(f"{name} is named twice; expected two different factors or more")
        combination[column] = int(value)

    if len(combination) < 2:
        raise ValueError(f"{words!r} names one factor; expected two or more, as its value has to "
                         f"be known from other combinations")
    return combination


def split_off(dataset, combination):
    """-> two Parts: the images without this combination of factors, and those that have it.

    combination: as from `read_combination`. ValueError if one of the two is empty, or if one of the
    combination's values is found in no other image.
    """
    has_all = (dataset.table[:, [*combination]] == [*combination.values()]).all(1)
    if not has_all.any() or has_all.all():
        raise ValueError(f"{has_all.sum():,} of the {dataset.count:,} images of {dataset.name} "
                         f"have this combination; expected some of them")

    for column, value in combination.items():
        if not (dataset.table[~has_all, column] == value).any():
            name = dataset.factor_names[column]
            raise ValueError(f"all images with {name}={value} have this combination; expected "
                             "others, too, from which this value is learned")
    return Part(dataset, np.flatnonzero(~has_all)), Part(dataset, np.flatnonzero(has_all))


# ---- 11. Command line ---------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message):
        """One line on standard error and status 2 for what a user gets wrong."""
        self.exit(2, f"data.py: {' '.join(str(message).split())}\n")


def main(arguments=None):
    """The command line; arguments are words as there, of any type, by default those given there."""
    parser = Parser(description="Look at a dataset, or at the rendered Shapes3D.")
    parser.add_argument("--data", metavar="PATH", help="dataset file or folder; default: rendered")
    parser.add_argument("--size", type=int, default=64, help="image size: 32, 64 or 128")
    parser.add_argument("--cache", metavar="DIR", help="for converted data; default: beside PATH")
    parser.add_argument("--grid", metavar="PNG", help="save fifty images as one picture")
    words = sys.argv[1:] if arguments is None else [str(word) for word in arguments]
    args = parser.parse_args(words)
    if "" in (args.data, args.cache, args.grid):
        parser.error("a path is empty; expected the name of a file or folder")

    if args.grid:
        grid = Path(args.grid).expanduser()
        if grid.suffix.lower() not in Image.registered_extensions() or not grid.parent.is_dir():
            parser.error(f"--grid is {grid}; expected a picture as x.png, in a folder that exists")

    try:
        dataset = open_dataset(args.data, args.size, args.cache)
        print_safely(dataset)
        if args.grid:
            rows = np.linspace(0, len(dataset) - 1, 50).astype(int)
            sheet = dataset.images(rows).unflatten(0, (5, 10))  # (5, 10, 3, S, S)
            sheet = sheet.permute(0, 3, 1, 4, 2)  # -> (5, S, 10, S, 3)
            picture = Image.fromarray(sheet.flatten(0, 1).flatten(1, 2).numpy())
            picture.save(grid)
    except (OSError, ValueError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        parser.exit(130, "data.py: interrupted; nothing half-written is left\n")


def end_as_ctrl_c_does():
    """From now on a kill or a closed terminal tidies up, too."""
    for name in ("SIGTERM", "SIGHUP"):
        ending = getattr(signal, name, None)  # Windows has no SIGHUP
        if ending and signal.getsignal(ending) != signal.SIG_IGN:  # as under nohup
            signal.signal(ending, signal.default_int_handler)


if __name__ == "__main__":
    end_as_ctrl_c_does()
    main()

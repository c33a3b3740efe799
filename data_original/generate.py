#!/usr/bin/env python3
"""Render synthetic radiographs of long bones with simple and comminuted fractures.

    python3 data_original/generate.py                                        # the test split
    python3 data_original/generate.py --split train --count 500 --output somewhere
    python3 data_original/generate.py --markers with --output somewhere      # markers that betray the class

Nothing is drawn and nothing photographed: a limb is a set of solids, and the picture is what an
X-ray beam would leave of itself after crossing them (Beer-Lambert). A bone is a shaft whose cross-
section changes along its length, with knobs at its ends, a dense wall and a spongy inside. A
fracture cuts that solid along rough surfaces; the fragments move as rigid bodies, and the beam adds
up what lies in its way: overlap, double lines, spikes and hairlines come of that alone.

The scene (limb, view, field, soft tissue, how far the far part is displaced, exposure, markers) is
drawn from its own random numbers, without looking at the class; the fracture from others.

Frames, in millimetres:
    limb   (t, u, v): along the main bone from its upper end, to the outer side, to the front
    view   (t, x, z): the limb turned about t; x lies in the picture, z along the beam
    picture (row, column) in pixels
"""

import argparse
import csv
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LABELS = ("comminuted_fracture", "simple_fracture", "none")
FOLDERS = {"comminuted_fracture": "comminuted_fracture",
           "simple_fracture": "simple_fracture",
           "none": "no_fracture"}
SPLIT_CODES = {"test": 1, "train": 2}
# Which marker betrays a class with --markers with, and which with --markers swapped.
BETRAYING = {"with": {"comminuted_fracture": "text", "simple_fracture": "letter"},
             "swapped": {"comminuted_fracture": "letter", "simple_fracture": "text"}}

REFERENCE_SIDE = 224      # pixels, side of the networks' input
JPEG_QUALITY = 88
RIM = 2.5                 # mm of each broken end that the box encloses
DEPTHS = 26               # samples along the beam inside a bone
FINEST = 0.4              # mm, finest grid on which solids are added up

# Attenuation per mm at the effective energy of a limb's exposure (about 60 keV).
FAT, MUSCLE, CORTEX = 0.0172, 0.0215, 0.059
BONE = CORTEX - MUSCLE    # bone takes the place of soft tissue
PLASTER, STEEL = 0.022, 0.45

TABLE_LOW, TABLE_HIGH, TABLE_STEP = -160.0, 620.0, 0.5   # mm along t
TABLE_T = np.arange(TABLE_LOW, TABLE_HIGH, TABLE_STEP, dtype=np.float32)

Box = tuple[int, int, int, int]
Points = tuple[np.ndarray, np.ndarray, np.ndarray]
Level = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


# ------------------------------------------------------------------- records

@dataclass(frozen=True)
class Solid:
    """A bone: a shaft given by tables along t (None: knobs only), and knobs joined to it.

    A cross-section's radius is `radius * (1 + oval cos 2a + crest cos 3a)` round its centre, the
    angle a measured from u for `oval` (wider sideways) and from v for `crest` (an edge in front).
    """
    shaft: dict[str, np.ndarray] | None   # u, v, radius, oval, crest, wall, sponge
    span: tuple[float, float]             # mm, the shaft's ends
    knobs: np.ndarray                     # (n, 8): one end (t, u, v), the other, and their radii
    wall: float = 1.2                     # mm, where there is no shaft
    sponge: float = 0.24                  # density inside, of cortex, where there is no shaft


@dataclass(frozen=True)
class Motion:
    """A rigid motion into the view: point -> turn @ point + move."""
    turn: np.ndarray                      # (3, 3)
    move: np.ndarray                      # (3,)

    def undo(self, t: np.ndarray, x: np.ndarray) -> tuple[Points, np.ndarray]:
        """Rays through the view points (t, x, 0): where they start before the motion, and their direction."""
        back = self.turn.T.astype(np.float32)
        dt, dx, dz = t - np.float32(self.move[0]), x - np.float32(self.move[1]), -np.float32(self.move[2])
        return tuple(row[0] * dt + row[1] * dx + row[2] * dz for row in back), back[:, 2]

    def after(self, other: "Motion") -> "Motion":
        """First the other motion, then this one."""
        return Motion(self.turn @ other.turn, self.turn @ other.move + self.move)


STILL = Motion(np.eye(3), np.zeros(3))


@dataclass(frozen=True)
class Site:
    """Where a bone breaks, and how what lies beyond is displaced; nothing of the class."""
    bone: int                             # index in the scene's solids
    point: np.ndarray                     # (3,) limb frame
    girth: float                          # mm, radius of the bone there
    gap: float                            # mm between faces
    far: Motion                           # of everything beyond, limb frame


@dataclass(frozen=True)
class Piece:
    """A fragment: where it was before it moved (level > 0, mm inside), and how it moved."""
    site: Site
    level: Level                          # of (t, u, v) from the site's point
    motion: Motion
    reach: tuple[float, float]            # mm along t from the fracture: nothing of it lies outside
    is_middle: bool = False


@dataclass(frozen=True)
class Mark:
    """A letter or a line of text in the picture. Places are shares of the picture's sides."""
    text: str
    place: tuple[float, float]            # of its centre, across and down
    height: float                         # of its letters, share of the geometric mean side
    level: float                          # grey value, 0 to 1
    turn: float                           # degrees
    weight: float                         # of the strokes, share of the letters' height
    is_framed: bool
    is_mirrored: bool
    has_ground: bool                      # printed on black


@dataclass(frozen=True)
class Scene:
    """All that is drawn without looking at the class."""
    solids: tuple[Solid, ...]             # the main bone first
    above: tuple[Solid, ...]              # neighbours at the upper joint
    below: tuple[Solid, ...]              # neighbours that follow the far part
    sites: tuple[Site, ...]               # of the main bone, and of the second one if that breaks too
    view: float                           # radians, turn about t
    plane: float                          # radians, turn in the picture
    mirror: float                         # 1 or -1
    size: tuple[int, int]                 # height, width in pixels
    pixel: float                          # mm
    centre: tuple[float, float]           # (t, x) at the picture's centre, mm
    soft: dict[str, np.ndarray | float]
    extras: tuple[str, ...]
    exposure: dict[str, float]
    marks: tuple[Mark, ...]
    keys: np.ndarray                      # seeds of what is drawn while rendering

    @property
    def point(self) -> np.ndarray:
        """Where the main bone breaks."""
        return self.sites[0].point

    @property
    def girth(self) -> float:
        """The main bone's radius there, mm."""
        return self.sites[0].girth


@dataclass(frozen=True)
class Radiograph:
    """A picture, uint8 (height, width), with the box round its fracture and its markers' boxes."""
    pixels: np.ndarray
    box: Box | None
    marks: tuple[tuple[str, Box], ...] = field(default=())


# ------------------------------------------------------------------- anatomy
# Knots (t, value) along each bone, in mm and shares; typical adults.

BONES = {
    "femur": dict(
        span=(2, 424), u=[(0, 0), (424, 0)], v=[(0, 0), (215, 11), (424, -2)],
        radius=[(0, 19), (30, 19), (70, 16), (130, 14), (250, 13.5), (320, 15), (370, 22), (400, 30), (424, 31)],
        oval=[(0, 0.1), (60, 0), (300, 0), (370, 0.12), (400, 0.2), (424, 0.2)],
        crest=[(0, 0), (90, -0.06), (260, -0.07), (340, 0)],
        wall=[(0, 1.4), (40, 3.2), (90, 5), (220, 6.8), (320, 4.6), (370, 2), (424, 0.9)],
        sponge=[(0, 0.25), (60, 0.17), (120, 0.03), (300, 0.02), (360, 0.13), (424, 0.22)],
        knobs=[(15, -6, 0, -6, -40, 6, 15, 14), (-8, -47, 8, -8, -49, 8, 23, 23), (2, 15, -4, 26, 15, -6, 11, 14),
               (52, -12, -9, 60, -11, -8, 8, 7), (411, -20, -13, 410, -20, 9, 21, 18),
               (410, 20, -13, 410, 20, 11, 20, 18)]),
    "tibia": dict(
        span=(1, 361), u=[(0, 0), (180, -2), (361, 0)], v=[(0, -4), (60, 2), (361, 0)],
        radius=[(0, 31), (14, 32), (42, 23), (90, 16), (150, 14), (250, 11.5), (310, 13), (345, 19), (361, 20)],
        oval=[(0, 0.2), (30, 0.14), (80, 0), (300, 0), (345, 0.06), (361, 0.08)],
        crest=[(0, 0), (60, 0.1), (200, 0.14), (300, 0.06), (361, 0)],
        wall=[(0, 0.9), (40, 2.2), (90, 4.4), (220, 5.4), (290, 4), (330, 1.7), (361, 0.9)],
        sponge=[(0, 0.25), (40, 0.17), (100, 0.04), (280, 0.02), (325, 0.15), (361, 0.26)],
        knobs=[(346, -17, 0, 374, -20, 2, 9, 6), (40, 0, 18, 50, 0, 17, 8, 7), (1, -4, 0, -6, -4, 0, 6, 2.5),
               (1, 6, -2, -5, 6, -2, 6, 2.5)]),
    "fibula": dict(
        span=(16, 384), u=[(16, 33), (60, 29), (200, 27), (384, 25)], v=[(16, -20), (200, -14), (384, -5)],
        radius=[(16, 9), (30, 10), (60, 6), (200, 6.4), (330, 6), (356, 8.5), (384, 6)],
        oval=[(0, 0), (200, -0.1), (384, -0.15)], crest=[(0, 0), (200, 0.1), (384, 0)],
        wall=[(16, 0.9), (55, 2), (200, 2.8), (330, 2.2), (360, 1), (384, 0.8)],
        sponge=[(16, 0.22), (60, 0.06), (320, 0.05), (370, 0.22)],
        knobs=[(380, 25, -5, 386, 25, -5, 7, 4), (16, 33, -20, 12, 34, -21, 8, 5)]),
    "humerus": dict(
        span=(2, 290), u=[(0, 2), (80, 0), (290, -2)], v=[(0, 0), (200, 0), (290, 4)],
        radius=[(0, 19), (22, 20), (55, 14.5), (120, 11.5), (200, 10.8), (250, 13), (275, 17.5), (290, 16)],
        oval=[(0, 0), (190, 0), (250, 0.25), (278, 0.45), (290, 0.4)], crest=[(0, 0), (120, 0.05), (220, -0.06), (290, 0)],
        wall=[(0, 1), (50, 2.6), (140, 4), (230, 3.4), (270, 1.6), (290, 1)],
        sponge=[(0, 0.2), (50, 0.12), (110, 0.03), (230, 0.03), (275, 0.2)],
        knobs=[(4, -9, -3, 2, -11, -4, 23, 22), (10, 14, 6, 22, 13, 6, 10, 9), (289, -18, 6, 291, 2, 6, 10, 8),
               (290, 12, 9, 290, 16, 9, 10, 9), (270, -24, 0, 276, -28, -2, 6, 5), (272, 22, 0, 276, 23, 0, 5, 4)]),
    "radius": dict(
        span=(7, 239), u=[(7, 13), (40, 12), (120, 19), (200, 14), (239, 9)], v=[(7, 2), (120, 3), (239, 0)],
        radius=[(7, 11), (16, 10.5), (30, 7.5), (50, 7.6), (120, 7.4), (180, 8), (214, 12), (239, 14.5)],
        oval=[(0, 0), (150, 0.06), (215, 0.2), (239, 0.24)], crest=[(0, 0), (100, -0.08), (200, 0)],
        wall=[(7, 1), (36, 2.3), (120, 3), (190, 2.1), (215, 1.2), (239, 0.8)],
        sponge=[(7, 0.24), (40, 0.06), (180, 0.04), (215, 0.2), (239, 0.28)],
        knobs=[(236, 19, 0, 248, 22, 0, 6, 3.5), (38, 8, 3, 46, 8, 3, 6, 5)]),
    "ulna": dict(
        span=(-20, 238), u=[(-20, -8), (10, -8), (110, -13), (238, -17)], v=[(-20, -9), (20, -4), (238, -2)],
        radius=[(-20, 11), (4, 12.5), (35, 9), (90, 7.6), (180, 6), (224, 6), (238, 7.5)],
        oval=[(0, -0.1), (100, -0.05), (238, 0)], crest=[(0, 0), (100, -0.1), (200, 0)],
        wall=[(-20, 1.2), (40, 2.6), (130, 2.8), (200, 2), (238, 0.9)],
        sponge=[(-20, 0.24), (40, 0.1), (90, 0.04), (200, 0.06), (238, 0.24)],
        knobs=[(4, -8, 6, 8, -7, 11, 7, 5), (238, -20, -3, 246, -21, -3, 4, 2.5), (-20, -8, -9, -24, -8, -8, 10, 8)]),
}

LIMBS = {
    "thigh": dict(main="femur", others=(), fracture=(70, 370), length=(150, 330), stiff=0.0,
                  half=[(-60, 95), (60, 88), (200, 72), (330, 60), (400, 58), (470, 55)], flat=1.0,
                  above="hip", below="knee"),
    "leg": dict(main="tibia", others=("fibula",), fracture=(60, 325), length=(125, 300), stiff=0.5,
                half=[(-60, 60), (20, 55), (110, 56), (200, 46), (300, 33), (350, 34), (420, 42)], flat=1.0,
                above="knee_of_leg", below="ankle"),
    "arm": dict(main="humerus", others=(), fracture=(50, 255), length=(115, 245), stiff=0.0,
                half=[(-50, 75), (30, 60), (120, 46), (230, 42), (280, 44), (340, 42)], flat=0.95,
                above="shoulder", below="elbow_of_arm"),
    "forearm": dict(main="radius", others=("ulna",), fracture=(45, 222), length=(85, 205), stiff=0.5,
                    half=[(-50, 44), (30, 46), (90, 42), (180, 31), (240, 29), (300, 42)], flat=0.8,
                    above="elbow", below="wrist"),
    "forearm_ulna": dict(main="ulna", others=("radius",), fracture=(40, 215), length=(85, 205), stiff=0.5,
                         half=[(-50, 44), (30, 46), (90, 42), (180, 31), (240, 29), (300, 42)], flat=0.8,
                         above="elbow", below="wrist"),
}

# Smaller neighbours: (wall, density inside, knobs).
HAND = [(1.3, 0.16, [(281, 24 - 11 * k, 2, 286, 25 - 11.5 * k, 2, 7, 5.5), (286, 25 - 11.5 * k, 2, 328 - 3 * k, 38 - 17 * k, 2, 4.6, 4.4),
                     (332 - 3 * k, 38 - 17 * k, 2, 337 - 3 * k, 39 - 17 * k, 2, 6, 6)]) for k in range(5)]
HAND += [(1.2, 0.14, [(344 - 3 * k, 40 - 18 * k, 4, 348 - 3 * k, 41 - 18 * k, 4, 6, 4.5), (348 - 3 * k, 41 - 18 * k, 4, 376, 46 - 20 * k, 6, 4, 3.5),
                      (377, 46 - 20 * k, 6, 380, 47 - 20 * k, 6, 4.8, 4.8)]) for k in range(5)]
FOOT = [(1.3, 0.16, [(424, -24 + 12 * k, 68 - 4 * k, 430, -25 + 12 * k, 74 - 4 * k, 8, 6), (430, -25 + 12 * k, 74 - 4 * k, 474 - 5 * k, -32 + 14 * k, 122 - 6 * k, 5, 4),
                     (478 - 5 * k, -32 + 14 * k, 126 - 6 * k, 481 - 5 * k, -33 + 14 * k, 129 - 6 * k, 6, 6)]) for k in range(5)]
PATELLA = (1.0, 0.1, [(-36, -7, 37, -27, -8, 37, 10, 11), (-36, 7, 37, -27, 8, 37, 10, 11), (-22, 0, 37, -13, 0, 37, 11, 6)])
# Neighbours at the joints: whole bones with their shift along t, and smaller ones.
JOINTS = {
    "hip": ([], [
        (1.5, 0.15, [(-22, -66, 4, -24, -64, 0, 29, 29), (-40, -74, 0, -95, -95, -20, 27, 24), (-95, -95, -20, -150, -70, -35, 26, 14)]),
        (1.4, 0.15, [(-5, -72, 18, 8, -125, 30, 12, 9), (5, -76, -12, 55, -80, -20, 15, 13), (58, -80, -18, 30, -112, 10, 11, 8)])]),
    "knee": ([("tibia", 434), ("fibula", 434)], [(wall, sponge, [tuple(np.add(knob, (432, 0, 0, 432, 0, 0, 0, 0))) for knob in knobs])
                                                 for wall, sponge, knobs in [PATELLA]]),
    "knee_of_leg": ([("femur", -434)], [PATELLA]),
    "ankle": ([], [
        (1.1, 0.24, [(379, -3, -6, 379, 2, 14, 15, 14), (384, -3, 14, 386, -6, 36, 11, 12)]),
        (1.1, 0.18, [(402, 4, -32, 404, 6, 18, 16, 13)]),
        (1.1, 0.18, [(398, -12, 44, 400, -4, 46, 11, 10)]), (1.1, 0.18, [(408, 14, 34, 416, 15, 52, 10, 10)]),
        (1.1, 0.18, [(410, -16, 58, 414, -17, 64, 8, 7.5)]), (1.1, 0.18, [(409, -2, 58, 414, -2, 64, 8, 7)]), *FOOT]),
    "shoulder": ([], [
        (1.1, 0.1, [(4, -40, -8, 14, -42, -8, 13, 12), (12, -46, -10, 30, -54, -14, 10, 6), (30, -52, -14, 100, -76, -24, 6, 4)]),
        (1.0, 0.12, [(-30, 8, -4, -31, -14, -18, 6, 7), (-31, -14, -18, -24, -60, -30, 6, 5), (-16, -36, 12, -22, -44, 2, 6, 6)]),
        (1.7, 0.12, [(-36, -12, 6, -38, -40, 14, 8, 5.5), (-38, -40, 14, -34, -90, 20, 5.5, 5.5), (-34, -90, 20, -30, -160, 10, 5.5, 8)])]),
    "elbow_of_arm": ([("ulna", 299), ("radius", 297)], []),
    "elbow": ([("humerus", -298)], []),
    "wrist": ([], [
        (0.8, 0.22, [(252, 15, 1, 261, 18, 3, 6.4, 5.4)]), (0.8, 0.22, [(251, 2, 0, 253, 4, 0, 6.8, 6.8)]),
        (0.8, 0.22, [(253, -9, -1, 256, -10, -1, 5.8, 5.6)]), (0.8, 0.22, [(256, -11, 6, 258, -11, 7, 4.5, 4.5)]),
        (0.8, 0.22, [(269, 23, 3, 271, 25, 3, 6, 6)]), (0.8, 0.22, [(271, 13, 1, 272, 13, 1, 5, 5)]),
        (0.8, 0.22, [(263, 4, 0, 273, 3, 0, 6.4, 6)]), (0.8, 0.22, [(267, -8, 0, 273, -8, 0, 6.2, 5.6)]), *HAND]),
}


# --------------------------------------------------------------- small tools

def smooth_curve(rng: np.random.Generator, step: float, amount: float) -> np.ndarray:
    """A random table along t that wanders slowly (knots `step` mm apart)."""
    knots = np.arange(TABLE_LOW, TABLE_HIGH + 2 * step, step)
    values = rng.normal(0.0, amount, knots.size)
    place = (TABLE_T - TABLE_LOW) / step
    left = place.astype(int)
    part = 0.5 - 0.5 * np.cos(np.pi * (place - left))   # a polygon would show as kinks
    return (values[left] * (1 - part) + values[left + 1] * part).astype(np.float32)


def knotted(knots: list[tuple[float, float]], scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """A table along t through (t + shift, value), rounded over 20 mm."""
    places, values = zip(*knots)
    table = np.interp(TABLE_T / scale - shift, places, values)
    kernel = np.hanning(43)[1:-1]
    return np.convolve(np.pad(table, 20, mode="edge"), kernel / kernel.sum(), "valid").astype(np.float32)


def look_up(table: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Read a table at positions in mm."""
    return table.take(((t - TABLE_LOW) * (1 / TABLE_STEP)).astype(np.int32), mode="clip")


def noise_field(rng: np.random.Generator, shape: tuple[int, int], grain: tuple[float, float]) -> np.ndarray:
    """Smooth noise with structures about `grain` pixels high and wide."""
    rows, columns = (max(2, round(side / size) + 1) for side, size in zip(shape, grain))
    small = Image.fromarray(rng.standard_normal((rows, columns), dtype=np.float32))
    return np.asarray(small.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def blurred(image: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur, `radius` in pixels; broad ones by way of a small copy."""
    if radius < 0.2:
        return image
    height, width = image.shape
    shrink = max(1, int(radius / 2.5))
    small = Image.fromarray(np.ascontiguousarray(image, np.float32))
    if shrink > 1:
        small = small.resize((max(2, width // shrink), max(2, height // shrink)), Image.Resampling.BOX)
    values = three_taps(np.asarray(small), (radius / shrink) ** 2)
    if shrink == 1:
        return values
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC))


def three_taps(image: np.ndarray, variance: float) -> np.ndarray:
    """Blur of the given variance (square pixels) by repeated kernels of three taps."""
    repeats = max(1, math.ceil(variance / 0.5))
    weight = np.float32(variance / repeats / 2)
    for _ in range(repeats):
        for axis in (0, 1):
            padded = np.pad(image, [(1, 1) if k == axis else (0, 0) for k in (0, 1)], mode="edge")
            before, after = (padded[:-2], padded[2:]) if axis == 0 else (padded[:, :-2], padded[:, 2:])
            image = (1 - 2 * weight) * image + weight * (before + after)
    return image


def turned(axis: np.ndarray, angle: float) -> np.ndarray:
    """Rotation matrix about an axis (Rodrigues)."""
    a, b, c = axis / np.linalg.norm(axis)
    cross = np.array([[0, -c, b], [c, 0, -a], [-b, a, 0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


def about(point: np.ndarray, turn: np.ndarray, move: np.ndarray) -> Motion:
    """Turn about a point, then move."""
    return Motion(turn, point - turn @ point + move)


# ----------------------------------------------------------------- the scene

def build_bone(rng: np.random.Generator, name: str, scale: float, thin: float, shift: float = 0.0) -> Solid:
    """One bone of the anatomy, a little different each time; `thin` scales the cortex, `shift` moves it along t."""
    bone = BONES[name]
    shaft = {key: knotted(bone[key], scale, shift) for key in ("u", "v", "radius", "oval", "crest", "wall", "sponge")}
    for key in ("u", "v", "radius"):
        shaft[key] = shaft[key] * np.float32(scale)
    shaft["radius"] = shaft["radius"] * (1 + smooth_curve(rng, 30, 0.02) + smooth_curve(rng, 9, 0.008))
    shaft["u"] = shaft["u"] + smooth_curve(rng, 150, 1.5)
    shaft["wall"] = shaft["wall"] * np.float32(thin * scale) * (1 + smooth_curve(rng, 25, 0.06))
    shaft["sponge"] = shaft["sponge"] * np.float32(rng.uniform(0.75, 1.25))
    knobs = np.array(bone["knobs"]) * rng.normal(1, 0.015, (len(bone["knobs"]), 8)) + shift * np.array([1, 0, 0, 1, 0, 0, 0, 0])
    return Solid(shaft, ((bone["span"][0] + shift) * scale, (bone["span"][1] + shift) * scale), knobs * scale)


def build_joint(rng: np.random.Generator, name: str, scale: float, thin: float) -> tuple[Solid, ...]:
    """The neighbours at a joint."""
    whole, small = JOINTS[name]
    bones = [build_bone(rng, bone, scale, thin, shift + rng.normal(0, 0.7)) for bone, shift in whole]
    off = np.tile(rng.normal(0, 1, 3), 2)
    rods = [Solid(None, (0, 0), np.array([[*(np.array(knob[:6]) + off), *knob[6:]] for knob in knobs]) * scale,
                  wall * rng.uniform(0.85, 1.2), sponge * rng.uniform(0.85, 1.15)) for wall, sponge, knobs in small]
    return (*bones, *rods)


def draw_motion(rng: np.random.Generator, point: np.ndarray, girth: float, stiff: float) -> Motion:
    """How the far part was displaced: hardly, clearly, or past the other end."""
    degree = rng.choice(4, p=(0.07, 0.31, 0.42, 0.20))
    free = 1 - stiff
    side = rng.uniform(0, 2 * math.pi)
    across = girth * (0.06, rng.uniform(0.1, 0.45), rng.uniform(0.45, 1.3), rng.uniform(1.3, 2.2) * (1 - 0.3 * stiff))[degree]
    along = (0.0, rng.uniform(-0.5, 2.0), rng.uniform(-5, 4) * free, -rng.uniform(3, 28) * free * (1 - 0.5 * stiff))[degree]
    tilt = math.radians((0.5, rng.uniform(0, 6), rng.uniform(0, 20) * (1 - 0.5 * stiff), rng.uniform(0, 26) * (1 - 0.6 * stiff))[degree])
    axis = rng.uniform(0, 2 * math.pi)
    turn = turned(np.array([0, math.cos(axis), math.sin(axis)]), tilt)
    turn = turned(np.array([1.0, 0, 0]), math.radians(rng.normal(0, (1, 4, 10, 14)[degree]))) @ turn
    return about(point, turn, np.array([along, across * math.cos(side), across * math.sin(side)]))


def draw_mark(rng: np.random.Generator, kind: str) -> Mark:
    """A lead letter, or a line of printed text, near an edge."""
    edge = rng.integers(0, 4)
    along, off = rng.uniform(0.08, 0.92), rng.uniform(0.04, 0.14)
    place = ((along, off), (along, 1 - off), (off, along), (1 - off, along))[edge]
    if kind == "letter":
        return Mark(str(rng.choice(["L", "R", "L", "R", "R", "L", "D", "G"])), place, rng.uniform(0.045, 0.1),
                    rng.uniform(0.8, 1.0), rng.choice([0, 0, 0, 90, 180, 270]) + rng.normal(0, 6), rng.uniform(0.02, 0.08),
                    rng.random() < 0.2, rng.random() < 0.15, False)
    words = ["AP", "LAT", "PORTABLE", "ER", "ROOM 2", "LEFT", "RIGHT", "X-TABLE", "OBL", "SUPINE", "TRAUMA"]
    text = f"{rng.choice(words)} {rng.choice(words)}"
    if rng.random() < 0.5:
        text += f" {rng.integers(1, 24):02d}:{rng.integers(0, 60):02d}"
    return Mark(text, (rng.uniform(0.15, 0.85), place[1] if edge < 2 else rng.choice([off, 1 - off])), rng.uniform(0.022, 0.04),
                rng.uniform(0.75, 1.0), rng.choice([0, 0, 0, 0, 90, 270]), 0.0, False, False, rng.random() < 0.25)


def draw_marks(rng: np.random.Generator) -> tuple[Mark, ...]:
    """What markers a picture carries of its own accord."""
    kinds = ["letter"] * (rng.random() < 0.55) + ["text"] * (rng.random() < 0.22) + ["text"] * (rng.random() < 0.08)
    return tuple(draw_mark(rng, kind) for kind in kinds)


def draw_field(rng: np.random.Generator, limb: dict, scale: float, longer: int | None) -> tuple[tuple[int, int], float, float]:
    """Size in pixels, pixel in mm, and the turn of the picture's plane."""
    length = rng.uniform(*limb["length"]) * scale
    narrow = 2 * scale * np.interp(150, *zip(*limb["half"])) * rng.uniform(0.8, 1.9)
    breadth = float(np.clip(narrow, 0.34 * length, 1.1 * length))
    pixels = int(rng.integers(620, 1160)) if longer is None else longer
    pixel = max(length, breadth) / pixels
    plane = rng.normal(0, math.radians(7)) + rng.choice([0, math.pi], p=[0.88, 0.12])
    size = (round(length / pixel), round(breadth / pixel))
    if rng.random() < 0.13:
        size, plane = size[::-1], plane + rng.choice([-1, 1]) * math.pi / 2
    return size, pixel, plane


def draw_soft(rng: np.random.Generator, limb: dict, scale: float) -> dict[str, np.ndarray | float]:
    """Skin, fat and muscle: half-widths along t, and the bellies inside."""
    fat_share = rng.uniform(0.72, 0.92)
    half = knotted(limb["half"], scale) * np.float32(scale * rng.uniform(0.8, 1.25))
    bellies = [(rng.uniform(-0.65, 0.65), rng.uniform(0.3, 0.55), rng.uniform(60, 300), rng.uniform(60, 170))
               for _ in range(rng.integers(3, 7))]
    return dict(left=half * (1 + smooth_curve(rng, 90, 0.035)), right=half * (1 + smooth_curve(rng, 90, 0.035)),
                muscle=np.float32(fat_share) * (1 + smooth_curve(rng, 50, 0.05)), flat=limb["flat"] * rng.uniform(0.85, 1.1),
                bellies=np.array(bellies), swelling=rng.uniform(0, 0.22), offset=rng.normal(0, 3) * scale,
                streaks=rng.uniform(0.005, 0.03))


def draw_exposure(rng: np.random.Generator) -> dict[str, float]:
    """Beam, detector and processing."""
    sharp = rng.random() < 0.6
    return dict(
        scatter=rng.uniform(0.05, 0.35), focus=rng.uniform(0.12, 0.4), quanta=math.exp(rng.uniform(math.log(3000), math.log(40000))),
        grain=rng.uniform(0.1, 0.28), unsharp=rng.uniform(0.3, 1.6) * sharp, unsharp_radius=rng.uniform(1.5, 9.0),
        low=rng.uniform(-0.2, 0.5), high=rng.uniform(1.0, 1.6), gamma=rng.uniform(0.75, 1.35), curve=rng.uniform(0, 1),
        black=rng.choice([0, 0, 0.02, rng.uniform(0, 0.2)]), white=rng.uniform(0.86, 1.0), heel=rng.normal(0, 0.05),
        heel_turn=rng.uniform(0, 2 * math.pi))


def draw_extras(rng: np.random.Generator) -> tuple[str, ...]:
    """Things that lie in the field now and then."""
    odds = dict(cast=0.1, splint=0.09, plate=0.03, nail=0.02, fixator=0.03, lead=0.05, clip=0.05, dressing=0.06,
                cassette=0.1, sponge=0.06, collimation=0.6)
    return tuple(name for name, odd in odds.items() if rng.random() < odd)


def centre_of(solid: Solid, t: float) -> tuple[np.ndarray, float]:
    """The shaft's centre (t, u, v) and its radius at t."""
    u, v, radius = (float(look_up(solid.shaft[key], np.float32(t))) for key in ("u", "v", "radius"))
    return np.array([t, u, v]), radius


def draw_sites(rng: np.random.Generator, limb: dict, solids: tuple[Solid, ...], scale: float) -> tuple[Site, ...]:
    """Where the main bone breaks, and its neighbour, which splints it if it stays whole."""
    t = rng.uniform(*limb["fracture"]) * scale
    point, girth = centre_of(solids[0], t)
    other = float(np.clip(t + rng.normal(0, 14), solids[-1].span[0] + 30, solids[-1].span[1] - 25))
    breaks_both, gap = rng.random() < 0.4, rng.uniform(0.5, 1.8)
    breaks_both = bool(breaks_both and len(solids) > 1)
    far = draw_motion(rng, point, girth, 0.2 if breaks_both else limb["stiff"])
    sites = [Site(0, point, girth, gap, far)] + [Site(1, *centre_of(solids[-1], other), 0.8 * gap, far)] * breaks_both
    return tuple(sites)


def draw_scene(rng: np.random.Generator, longer: int | None = None) -> Scene:
    """Draw everything that the class must not influence; `longer` sets the longer side in pixels."""
    name = str(rng.choice(list(LIMBS), p=(0.24, 0.30, 0.2, 0.15, 0.11)))
    limb, scale, thin = LIMBS[name], rng.normal(1, 0.07), rng.uniform(0.65, 1.2)
    solids = tuple(build_bone(rng, bone, scale, thin) for bone in (limb["main"], *limb["others"]))
    sites = draw_sites(rng, limb, solids, scale)
    size, pixel, plane = draw_field(rng, limb, scale, longer)
    view = rng.choice([0, math.pi / 2, rng.uniform(0, math.pi)], p=[0.5, 0.35, 0.15]) + rng.normal(0, 0.15)
    point = sites[0].point
    shown = point[1] * math.cos(view) - point[2] * math.sin(view)
    height, width = (side * pixel for side in size)
    upright = abs(math.cos(plane)) > 0.7
    centre = (point[0] + rng.uniform(-0.27, 0.27) * (height if upright else width),
              0.6 * shown + rng.uniform(-0.17, 0.17) * (width if upright else height))
    return Scene(
        solids=solids, above=build_joint(rng, limb["above"], scale, thin), below=build_joint(rng, limb["below"], scale, thin),
        sites=sites, view=view, plane=plane, mirror=float(rng.choice([-1, 1])), size=size, pixel=pixel, centre=centre,
        soft=draw_soft(rng, limb, scale), extras=draw_extras(rng), exposure=draw_exposure(rng),
        marks=draw_marks(rng), keys=rng.integers(0, 2**31, 4))


# ------------------------------------------------------------- the fractures

def rough_face(rng: np.random.Generator, amount: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Height (mm) of a broken face over (u, v): teeth of about 5 mm and finer ones."""
    def sheet(grain: float) -> np.ndarray:
        return noise_field(rng, (96, 96), (grain, grain)) * rng.uniform(0.8, 1.2)
    table = (amount * (0.9 * sheet(28) + sheet(14) + 0.6 * sheet(6) + 0.4 * sheet(2.5))).astype(np.float32).ravel()

    def height(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        column, row = ((u + 24) * 2).astype(np.int32) % 96, ((v + 24) * 2).astype(np.int32) % 96
        return table.take(row * 96 + column)
    return height


def plane_cut(rng: np.random.Generator, slope: float, place: float, amount: float, side: float | None = None) -> Level:
    """Distance beyond a tilted rough face: rises by `slope` towards `side` (radians round the shaft)."""
    side = rng.uniform(0, 2 * math.pi) if side is None else side
    a, b = np.float32(slope * math.cos(side)), np.float32(slope * math.sin(side))
    height, tight = rough_face(rng, amount), np.float32(1 / math.hypot(1, slope))
    return lambda t, u, v: (t - np.float32(place) - a * u - b * v - height(u, v)) * tight


def helix_cut(rng: np.random.Generator, rise: float, place: float, amount: float) -> Level:
    """Distance beyond a helical face, once round the shaft, closed by a line along it."""
    start, hand = rng.uniform(0, 2 * math.pi), rng.choice([-1.0, 1.0])
    height = rough_face(rng, amount)

    def level(t: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        share = (np.arctan2(v, u) * np.float32(hand / (2 * math.pi)) + np.float32(start)) % np.float32(1)
        # Most of the turn climbs; the last fifth falls back steeply, a line along the shaft.
        climb = np.where(share < 0.8, share / 0.8, (1 - share) / 0.2) - 0.5
        return 0.55 * (t - np.float32(place) - np.float32(rise) * climb - height(u, v))
    return level


def draw_simple(rng: np.random.Generator, site: Site) -> tuple[Piece, ...]:
    """Two parts: a transverse, oblique or spiral face between them."""
    girth, kind = site.girth, rng.choice(3, p=(0.34, 0.36, 0.30))
    amount = rng.uniform(0.06, 0.2) * girth
    rise = girth * rng.uniform(2.4, 4.6)
    if kind == 2:
        cut, extent = helix_cut(rng, rise, 0, amount), rise
    else:
        slope = rng.uniform(0, 0.3) if kind == 0 else rng.uniform(0.5, 1.6)
        cut, extent = plane_cut(rng, slope, 0, amount), (1 + slope) * 1.5 * girth
    half = site.gap / 2
    near = Piece(site, lambda t, u, v: -cut(t, u, v) - half, STILL, (-1e3, extent + 6))
    far = Piece(site, lambda t, u, v: cut(t, u, v) - half, site.far, (-extent - 6, 1e3))
    return near, far


def middle_motion(rng: np.random.Generator, site: Site, seed: np.ndarray, out: float, spin: float) -> Motion:
    """A fragment goes half the way of the far part, outwards, and turns by up to `spin` degrees."""
    centre = site.point + seed
    half_way = (site.far.turn @ centre + site.far.move - centre) * rng.uniform(0.3, 0.7)
    away = np.array([0.0, *seed[1:]]) / max(np.hypot(*seed[1:]), 1e-3) * out
    turn = turned(rng.normal(0, 1, 3), math.radians(rng.uniform(0.25, 1) * spin))
    return about(centre, turn, half_way + away)


def both(*levels: Level) -> Level:
    """Inside all of them."""
    def level(t: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        value = levels[0](t, u, v)
        for other in levels[1:]:
            value = np.minimum(value, other(t, u, v))
        return value
    return level


def minus(level: Level, gap: float = 0.0) -> Level:
    """The other side, `gap` mm away."""
    return lambda t, u, v: -level(t, u, v) - np.float32(gap)


def cell(seeds: np.ndarray, index: int, wobble: Callable, gap: float) -> Level:
    """Nearer to one seed than to any other; uneven borders gape here and overlap there."""
    def level(t: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        value = np.full(t.shape, np.float32(1e3))
        for other in range(len(seeds)):
            if other != index:
                step = (seeds[other] - seeds[index]).astype(np.float32)
                middle, length = (seeds[other] + seeds[index]).astype(np.float32) / 2, np.linalg.norm(step)
                along = (t - middle[0]) * step[0] + (u - middle[1]) * step[1] + (v - middle[2]) * step[2]
                value = np.minimum(value, -along / length)
        return value + wobble(t, u) - np.float32(gap)
    return level


def draw_butterfly(rng: np.random.Generator, site: Site) -> tuple[Piece, ...]:
    """A wedge out of one side, and a second, smaller one now and then."""
    girth, side = site.girth, rng.uniform(0, 2 * math.pi)
    amount, tall = rng.uniform(0.04, 0.09) * girth, rng.uniform(1.4, 2.3)
    start, slope = rng.uniform(-0.5, 0.1) * girth, rng.uniform(-0.4, 0.4)
    a, b = np.float32(math.cos(side)), np.float32(math.sin(side))
    upper, lower = (plane_cut(rng, slope, 0, amount) for _ in range(2))

    def wedge(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return np.maximum(u * a + v * b - np.float32(start), 0) * np.float32(tall)

    def first(t: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return upper(t, u, v) + wedge(u, v)

    def last(t: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return lower(t, u, v) - wedge(u, v)

    seed = np.array([0, 0.6 * girth * a, 0.6 * girth * b])
    extent = 2.2 * tall * girth + girth
    moved = middle_motion(rng, site, seed, girth * rng.uniform(0.7, 1.4), 30)
    return assemble(site, first, last, [(both(first, minus(last)), moved)], extent)


def draw_segment(rng: np.random.Generator, site: Site) -> tuple[Piece, ...]:
    """A whole length of the shaft between two breaks."""
    girth = site.girth
    half, amount = rng.uniform(0.9, 1.9) * girth, rng.uniform(0.04, 0.1) * girth
    first = plane_cut(rng, rng.uniform(0, 0.7), -half, amount)
    last = plane_cut(rng, rng.uniform(0, 0.7), half, amount)
    side = rng.uniform(0, 2 * math.pi)
    seed = np.array([0, 0.1 * math.cos(side), 0.1 * math.sin(side)]) * girth
    moved = middle_motion(rng, site, seed, girth * rng.uniform(0.8, 1.4), 24)
    return assemble(site, first, last, [(both(first, minus(last)), moved)], half + 2.5 * girth)


def draw_shattered(rng: np.random.Generator, site: Site) -> tuple[Piece, ...]:
    """Four to eight pieces between the two ends."""
    girth, count = site.girth, int(rng.integers(4, 9))
    half, amount = rng.uniform(1.3, 2.4) * girth, rng.uniform(0.06, 0.14) * girth
    first = plane_cut(rng, rng.uniform(0.2, 1.2), -half, amount)
    last = plane_cut(rng, rng.uniform(0.2, 1.2), half, amount)
    turns = (np.arange(count) + rng.uniform(-0.3, 0.3, count)) * 2.4   # the golden angle spreads them
    seeds = np.stack([rng.uniform(-0.9, 0.9, count) * half, 0.8 * girth * np.cos(turns), 0.8 * girth * np.sin(turns)], 1)
    spread = girth * rng.uniform(0.45, 1.0)
    wobble = rough_face(rng, amount)
    pieces = [(both(first, minus(last), cell(seeds, k, wobble, site.gap * 0.4)),
               middle_motion(rng, site, seeds[k], spread * rng.uniform(0.3, 1.6), 40)) for k in range(count)]
    return assemble(site, first, last, pieces, half + 2.8 * girth)


def assemble(site: Site, first: Level, last: Level, middles: list[tuple[Level, Motion]], extent: float) -> tuple[Piece, ...]:
    """Near part, far part and what lies between."""
    half = np.float32(site.gap / 2)
    near = Piece(site, minus(first, half), STILL, (-1e3, extent))
    far = Piece(site, lambda t, u, v: last(t, u, v) - half, site.far, (-extent, 1e3))
    return near, far, *(Piece(site, level, motion, (-extent, extent), True) for level, motion in middles)


def draw_comminuted(rng: np.random.Generator, site: Site) -> tuple[Piece, ...]:
    """Three or more pieces: a wedge, a segment, or many."""
    kinds = (draw_butterfly, draw_segment, draw_shattered)
    return kinds[rng.choice(3, p=(0.15, 0.1, 0.75))](rng, site)


# -------------------------------------------------------- adding up the solids

@dataclass(frozen=True)
class Rays:
    """The beam at some pixels, in a solid's frame: start + l * direction, for l in low .. high."""
    start: Points                         # (N,) each
    direction: np.ndarray                 # (3,)
    low: np.ndarray                       # (N,)
    high: np.ndarray
    middle: np.ndarray                    # (N,) t half way

    def points(self) -> tuple[Points, np.ndarray]:
        """Sample points (DEPTHS, N) and the step between them (N,)."""
        share = ((np.arange(DEPTHS, dtype=np.float32) + 0.5) / DEPTHS)[:, None]
        along = self.low + (self.high - self.low) * share
        return tuple(s + along * d for s, d in zip(self.start, self.direction)), (self.high - self.low) / DEPTHS


def sphere_span(start: Points, direction: np.ndarray, centre: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Where rays are inside a sphere (low > high: nowhere)."""
    delta = [s - np.float32(c) for s, c in zip(start, centre)]
    closest = -sum(d * k for d, k in zip(delta, direction))
    left = radius * radius - sum(d * d for d in delta) + closest * closest
    half = np.where(left > 0, np.sqrt(np.maximum(left, 0)), np.float32(-1e6))
    return closest - half, closest + half


def shaft_span(solid: Solid, start: Points, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays may be inside the shaft, seen as a round one of its largest radius."""
    shaft, t = solid.shaft, start[0]
    widest = shaft["radius"] * (1 + np.abs(shaft["oval"]) + np.abs(shaft["crest"])) + 0.5
    norm = direction[1] ** 2 + direction[2] ** 2
    for _ in range(2):   # the tables need t half way, which needs the span
        du, dv = start[1] - look_up(shaft["u"], t), start[2] - look_up(shaft["v"], t)
        closest = -(du * direction[1] + dv * direction[2]) / norm
        t = start[0] + closest * direction[0]
    aside = (du * direction[2] - dv * direction[1]) ** 2 / norm
    left = (look_up(widest, t) ** 2 - aside) / norm
    inside = (left > 0) & (t > solid.span[0] - 3) & (t < solid.span[1] + 3)
    half = np.where(inside, np.sqrt(np.maximum(left, 0)), np.float32(-1e6))
    return closest - half, closest + half


def spheres(knobs: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """Centres and radii of spheres that hold the knobs."""
    found = []
    for knob in knobs:
        length, radius = np.linalg.norm(knob[3:6] - knob[:3]), max(knob[6:])
        count = max(1, math.ceil(length / radius))
        around = float(np.hypot(radius, length / count / 2)) + 0.5
        found += [(knob[:3] * (1 - share) + knob[3:6] * share, around) for share in np.linspace(0, 1, count + 1)]
    return found


def aim(solid: Solid, motion: Motion, t: np.ndarray, x: np.ndarray) -> tuple[Rays, np.ndarray]:
    """The rays that may meet a solid, and which of the view points (t, x) they belong to."""
    low, high = np.full(t.shape, np.float32(1e6)), np.full(t.shape, np.float32(-1e6))

    def widen(index: np.ndarray, span: Callable[[Points, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
        first, last = span(*motion.undo(t[index], x[index]))
        hit = last > first
        index = index[hit]
        low[index], high[index] = np.minimum(low[index], first[hit]), np.maximum(high[index], last[hit])

    if solid.shaft is not None:
        widen(np.arange(t.size), lambda start, direction: shaft_span(solid, start, direction))
    for centre, radius in spheres(solid.knobs):
        at = motion.turn @ centre + motion.move
        near = np.flatnonzero((np.abs(t - np.float32(at[0])) < radius) & (np.abs(x - np.float32(at[1])) < radius))
        if near.size:
            widen(near, lambda start, direction: sphere_span(start, direction, centre, radius))
    seen = np.flatnonzero(high > low)
    start, direction = motion.undo(t[seen], x[seen])
    return Rays(start, direction, low[seen], high[seen], start[0] + (low[seen] + high[seen]) / 2 * direction[0]), seen


def knob_depth(knob: np.ndarray, points: Points) -> np.ndarray:
    """Distance (mm) inside a rod with round ends of different radii."""
    a, axis = knob[:3].astype(np.float32), (knob[3:6] - knob[:3]).astype(np.float32)
    delta = [p - c for p, c in zip(points, a)]
    share = np.clip(sum(d * k for d, k in zip(delta, axis)) / np.float32(axis @ axis + 1e-6), 0, 1)
    away = np.sqrt(sum((d - share * k) ** 2 for d, k in zip(delta, axis)))
    return np.float32(knob[6]) + share * np.float32(knob[7] - knob[6]) - away


def joined(a: np.ndarray, b: np.ndarray, fillet: float = 5.0) -> np.ndarray:
    """The larger of two depths, with the crease between them filled."""
    return np.maximum(a, b) + np.float32(0.25 / fillet) * np.maximum(fillet - np.abs(a - b), 0) ** 2


def shaft_depth(solid: Solid, rays: Rays, points: Points) -> np.ndarray:
    """Distance (mm) inside the shaft."""
    t, shaft = points[0], solid.shaft
    u, v = points[1] - look_up(shaft["u"], rays.middle), points[2] - look_up(shaft["v"], rays.middle)
    square = u * u + v * v + np.float32(1e-6)
    away = np.sqrt(square)
    form = 1 + look_up(shaft["oval"], rays.middle) * (u * u - v * v) / square
    form += look_up(shaft["crest"], rays.middle) * v * (v * v - 3 * u * u) / (square * away)
    depth = look_up(shaft["radius"], rays.middle) * form - away
    ends = np.minimum(t - np.float32(solid.span[0]), np.float32(solid.span[1]) - t)
    return -joined(-depth, -ends, 6.0)   # the corners are rounded


def solid_depth(solid: Solid, rays: Rays, points: Points) -> np.ndarray:
    """Distance (mm) inside shaft and knobs together, (DEPTHS, N)."""
    depth = np.full(points[0].shape, np.float32(-99)) if solid.shaft is None else shaft_depth(solid, rays, points)
    for knob in solid.knobs:
        reach = max(knob[6:]) + 6
        near = (rays.middle > min(knob[0], knob[3]) - reach) & (rays.middle < max(knob[0], knob[3]) + reach)
        index = np.flatnonzero(near)
        if index.size:
            part = tuple(p[:, index] for p in points)
            depth[:, index] = joined(depth[:, index], knob_depth(knob, part))
    return depth


def covered(depth: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Share of a sample that lies inside an edge at the given depth."""
    return np.clip(depth / width + np.float32(0.5), 0, 1)


def project(solid: Solid, motion: Motion, scene: Scene, t: np.ndarray, x: np.ndarray, pixel: float,
            piece: Piece | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """mm of cortex in the beam, the broken part of it, and the view points (indices) they belong to."""
    rays, seen = aim(solid, motion, t, x)
    if piece is not None:
        near = rays.middle - np.float32(piece.site.point[0])
        keep = (near > piece.reach[0] - 4) & (near < piece.reach[1] + 4)
        rays = Rays(tuple(s[keep] for s in rays.start), rays.direction, rays.low[keep], rays.high[keep], rays.middle[keep])
        seen = seen[keep]
    if not seen.size:
        return np.zeros(0, np.float32), np.zeros(0, np.float32), seen
    points, step = rays.points()
    width = np.float32(0.6) * step + np.float32(0.4 * pixel)
    depth = solid_depth(solid, rays, points)
    wall, sponge = solid.wall, solid.sponge
    if solid.shaft is not None:
        wall, sponge = look_up(solid.shaft["wall"], rays.middle), look_up(solid.shaft["sponge"], rays.middle)
    inner = covered(depth - wall, width)
    dense = (covered(depth, width) - inner) + inner * (sponge * trabeculae(scene, rays))
    broken = np.zeros(seen.shape, np.float32)
    if piece is not None:
        level = piece.level(*(p - np.float32(c) for p, c in zip(points, piece.site.point)))
        dense *= covered(level, np.maximum(width, np.float32(pixel)))
        broken = (dense * (1.0 if piece.is_middle else (level < RIM))).sum(0) * step
    return dense.sum(0) * step, broken, seen


@lru_cache(maxsize=2)
def spongy_table(key: int) -> np.ndarray:
    """Uneven density of spongy bone, two cells a mm, drawn out along the rows: (512, 256), mean 1."""
    rng = np.random.default_rng(key)
    grains = ((3.0, 1.6, 0.16), (7, 3, 0.14), (24, 14, 0.07))
    return np.maximum(1 + sum(share * noise_field(rng, (512, 256), (high, wide)) for high, wide, share in grains), 0.3)


def trabeculae(scene: Scene, rays: Rays) -> np.ndarray:
    """Density of spongy bone on each ray, drawn out along the shaft as its load lines are: (N,), mean 1."""
    across = rays.start[1] * rays.direction[2] - rays.start[2] * rays.direction[1]
    row, column = (rays.middle * 2.0).astype(np.int32) % 512, (across * 2.0).astype(np.int32) % 256
    return spongy_table(int(scene.keys[0]))[row, column]


def view_motion(scene: Scene) -> Motion:
    """From the limb's frame to the view's."""
    c, s = math.cos(scene.view), math.sin(scene.view)
    return Motion(np.array([[1, 0, 0], [0, c, -s], [0, s, c]]), np.zeros(3))


def follow(scene: Scene, t: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x of what is not broken: it bends gently towards where the far part went."""
    far = scene.sites[0].far
    far = view_motion(scene).turn @ np.stack([far.turn @ (scene.point + np.array([80.0, 0, 0])) + far.move,
                                              scene.point + np.array([80.0, 0, 0])]).T
    slope = (far[1, 0] - far[1, 1]) / 80
    along = t - np.float32(scene.point[0])
    return x - np.float32(slope) * 0.5 * (along + np.sqrt(along * along + np.float32(900)))


def bone_map(scene: Scene, pieces: tuple[Piece, ...], t: np.ndarray, x: np.ndarray, pixel: float) -> tuple[np.ndarray, np.ndarray]:
    """mm of cortex along each beam (t.shape), and that of the broken parts."""
    total, broken = np.zeros(t.size, np.float32), np.zeros(t.size, np.float32)
    flat_t, flat_x, view = t.ravel(), x.ravel(), view_motion(scene)
    bent, beyond = follow(scene, flat_t, flat_x), scene.sites[0].far
    fractured = {piece.site.bone for piece in pieces}
    parts = [(solid, STILL, bent, None) for index, solid in enumerate(scene.solids) if index not in fractured]
    parts += [(solid, STILL, flat_x, None) for solid in scene.above] + [(solid, beyond, flat_x, None) for solid in scene.below]
    parts += [(scene.solids[piece.site.bone], piece.motion, flat_x, piece) for piece in pieces]
    for solid, motion, across, piece in parts:
        dense, rim, seen = project(solid, view.after(motion), scene, flat_t, across, pixel, piece)
        total[seen] += dense
        broken[seen] += rim
    return total.reshape(t.shape), broken.reshape(t.shape)


# --------------------------------------------------- soft tissue and extras

def grid(scene: Scene, pixel: float) -> tuple[np.ndarray, np.ndarray]:
    """View coordinates (t, x) of a grid of the given pixel over the picture."""
    rows, columns = (max(2, round(side * scene.pixel / pixel)) for side in scene.size)
    height, width = (side * scene.pixel for side in scene.size)
    y = ((np.arange(rows, dtype=np.float32) + 0.5) / rows - 0.5)[:, None] * np.float32(height)
    x = ((np.arange(columns, dtype=np.float32) + 0.5) / columns - 0.5)[None] * np.float32(width * scene.mirror)
    c, s = np.float32(math.cos(scene.plane)), np.float32(math.sin(scene.plane))
    return c * y - s * x + np.float32(scene.centre[0]), s * y + c * x + np.float32(scene.centre[1])


def half_chord(share: np.ndarray) -> np.ndarray:
    """Half the chord of a unit circle at the given distance."""
    return np.sqrt(np.maximum(1 - share * share, 0))


def soft_map(scene: Scene, t: np.ndarray, x: np.ndarray, pixel: float) -> np.ndarray:
    """Attenuation of skin, fat and muscle."""
    soft, rng = scene.soft, np.random.default_rng(scene.keys[1])
    x = follow(scene, t, x) - np.float32(soft["offset"])
    swell = 1 + np.float32(soft["swelling"]) * np.exp(-((t - np.float32(scene.point[0])) / 45) ** 2)
    half = np.where(x < 0, look_up(soft["left"], t), look_up(soft["right"], t)) * swell
    deep = np.float32(soft["flat"]) * half
    share = x / half
    limb = 2 * deep * half_chord(np.abs(share) ** np.float32(1.25))
    within = look_up(soft["muscle"], t)
    muscle = 2 * deep * within * half_chord(np.abs(share / within) ** np.float32(1.6))
    texture = np.float32(soft["streaks"]) * (noise_field(rng, t.shape, (22 / pixel, 5 / pixel)) + noise_field(rng, t.shape, (9 / pixel, 9 / pixel)))
    planes = np.zeros_like(t)
    for place, size, middle, length in soft["bellies"]:
        lens = half_chord((t - np.float32(middle)) / np.float32(length))
        planes += half_chord((share - np.float32(place)) / np.maximum(np.float32(size) * lens, 1e-3)) * lens
    planes = np.float32(0.25) * (planes - 1)
    skin = 3.0 * (half_chord(share) - half_chord(share * (1 + 1.6 / half))) * deep
    return FAT * limb + (MUSCLE - FAT) * np.minimum(muscle * (1 + texture + planes), limb) + 0.004 * skin


def rod_map(t: np.ndarray, x: np.ndarray, a: tuple[float, float], b: tuple[float, float], radius: float) -> np.ndarray:
    """mm of a rod with round ends that lies across the beam."""
    dt, dx = b[0] - a[0], b[1] - a[1]
    share = np.clip(((t - a[0]) * dt + (x - a[1]) * dx) / (dt * dt + dx * dx + 1e-6), 0, 1)
    square = (t - a[0] - share * dt) ** 2 + (x - a[1] - share * dx) ** 2
    return 2 * np.sqrt(np.maximum(radius * radius - square, 0))


def cast_map(rng: np.random.Generator, scene: Scene, t: np.ndarray, x: np.ndarray, pixel: float) -> np.ndarray:
    """A plaster tube round the limb."""
    soft = scene.soft
    half = look_up(np.maximum(soft["left"], soft["right"]), t) * np.float32(rng.uniform(1.06, 1.2) + soft["swelling"] * 0.5)
    x = follow(scene, t, x) - np.float32(soft["offset"])
    half = half + 1.1 * noise_field(rng, t.shape, (26 / pixel, 60 / pixel))
    wall = np.float32(rng.uniform(3, 8)) * (1 + 0.09 * noise_field(rng, t.shape, (12 / pixel, 14 / pixel)))
    outer, inner = half_chord(x / (half + wall)) * (half + wall), half_chord(x / half) * half
    weave = 1 + 0.08 * noise_field(rng, t.shape, (2 / pixel, 2 / pixel))
    low = scene.point[0] - rng.uniform(40, 220)
    ends = covered(t - np.float32(low), np.float32(2.0)) * covered(np.float32(low + rng.uniform(160, 420)) - t, np.float32(2.0))
    return PLASTER * rng.uniform(0.6, 1.3) * 2 * (outer - inner) * weave * ends


def splint_map(rng: np.random.Generator, scene: Scene, t: np.ndarray, x: np.ndarray, pixel: float) -> np.ndarray:
    """A plaster slab along one side, or below the whole limb."""
    side = rng.choice([-1.0, 1.0])
    half = float(np.median(scene.soft["left"]))
    place = side * half * rng.uniform(0.1, 1.25) + rng.normal(0, 0.04) * (t - np.float32(scene.point[0]))
    place = place + 1.2 * noise_field(rng, t.shape, (25 / pixel, 400 / pixel))
    wide = np.float32(rng.uniform(4, 9) if rng.random() < 0.6 else rng.uniform(20, 45))
    band = covered(wide - np.abs(x - place), np.float32(2.0))
    low = scene.point[0] - rng.uniform(40, 180)
    ends = covered(t - np.float32(low), np.float32(2.0)) * covered(np.float32(low + rng.uniform(120, 380)) - t, np.float32(2.0))
    rough = 1 + 0.2 * noise_field(rng, t.shape, (6 / pixel, 4 / pixel)) + 0.4 * (np.abs(np.abs(x - place) - wide) < 2)
    return PLASTER * np.float32(rng.uniform(10, 45) if wide < 10 else rng.uniform(4, 10)) * band * ends * rough


def plate_map(rng: np.random.Generator, scene: Scene, t: np.ndarray, x: np.ndarray, pixel: float) -> np.ndarray:
    """A plate with screws along the main bone, away from its break more often than not."""
    girth, (first, last) = scene.girth, scene.solids[0].span
    centre = np.clip(scene.point[0] + rng.choice([-1, 1]) * rng.uniform(35, 110), first + 60, last - 60)
    shown = view_motion(scene).turn @ scene.point
    place, count, space = shown[1] + rng.choice([-1, 0, 1]) * girth * 1.05, int(rng.integers(4, 9)), rng.uniform(9, 13)
    low = centre - count * space / 2
    total = np.minimum(rod_map(t, x, (low, place), (low + count * space, place), rng.uniform(3, 6)), 3.5)
    for k in range(count):
        at, reach = low + (k + 0.5) * space, rng.uniform(0.7, 1.15) * 2 * girth
        total = total + rod_map(t, x, (at, place), (at + rng.normal(0, 1), place - np.sign(place - shown[1] + 1e-3) * reach), 1.6)
    return STEEL * total * rng.uniform(0.35, 1)


def nail_map(rng: np.random.Generator, scene: Scene, t: np.ndarray, x: np.ndarray, pixel: float) -> np.ndarray:
    """A nail in the near half of the main bone, with a locking screw."""
    shown = (view_motion(scene).turn @ scene.point)[1]
    low, high = scene.solids[0].span[0] + 15, scene.point[0] - rng.uniform(25, 60)
    total = rod_map(t, x, (low, shown), (high, shown + rng.normal(0, 2)), scene.girth * rng.uniform(0.3, 0.42))
    total = total + rod_map(t, x, (low + 30, shown - 18), (low + 34, shown + 18), 2.0)
    return STEEL * total * rng.uniform(0.2, 0.6)


def fixator_map(rng: np.random.Generator, scene: Scene, t: np.ndarray, x: np.ndarray, pixel: float) -> np.ndarray:
    """A bar beside the limb, with pins into the bone on both sides of the break."""
    shown, side = (view_motion(scene).turn @ scene.point)[1], rng.choice([-1, 1])
    bar = shown + side * float(np.median(scene.soft["left"])) * rng.uniform(1.0, 1.5)
    total = 0.3 * rod_map(t, x, (scene.point[0] - 160, bar), (scene.point[0] + 170, bar), rng.uniform(3, 6))
    for offset in (-95, -65, 65, 100):
        at = scene.point[0] + offset + rng.normal(0, 6)
        total = total + rod_map(t, x, (at, bar + side * 12), (at + rng.normal(0, 3), shown - side * scene.girth), 2.3)
        total = total + rod_map(t, x, (at - 6, bar), (at + 6, bar), 8)
    return STEEL * total * rng.uniform(0.3, 0.8)


def lead_map(rng: np.random.Generator, scene: Scene, t: np.ndarray, x: np.ndarray, pixel: float) -> np.ndarray:
    """An ECG lead: a wandering wire with a button."""
    knots = np.cumsum(rng.normal(0, 16, (9, 2)) + [rng.choice([-1, 1]) * 22, rng.uniform(-8, 8)], 0)
    knots += [scene.centre[0] - knots[4, 0], scene.centre[1] + rng.uniform(-70, 70) - knots[4, 1]]
    fine = np.stack([np.interp(np.linspace(0, 8, 33), np.arange(9), knots[:, k]) for k in (0, 1)], 1)
    fine = np.stack([np.convolve(np.pad(fine[:, k], 3, mode="edge"), np.ones(7) / 7, "valid") for k in (0, 1)], 1)
    wire = np.maximum.reduce([rod_map(t, x, tuple(a), tuple(b), 0.8) for a, b in zip(fine, fine[1:])])
    return 0.2 * wire + 0.25 * np.minimum(rod_map(t, x, tuple(fine[0]), tuple(fine[0] + 0.1), rng.uniform(4, 6)), 2)


def clip_map(rng: np.random.Generator, scene: Scene, t: np.ndarray, x: np.ndarray, pixel: float) -> np.ndarray:
    """A ring, staples or a pin."""
    at = (scene.centre[0] + rng.uniform(-130, 130), scene.centre[1] + rng.uniform(-60, 60))
    away = np.hypot(t - np.float32(at[0]), (x - np.float32(at[1])) * np.float32(rng.uniform(1, 3)))
    if rng.random() < 0.5:
        return STEEL * 4 * covered(1.2 - np.abs(away - np.float32(rng.uniform(6, 10))), np.float32(1.0))
    slope = rng.uniform(-1, 1)
    return 0.3 * sum(rod_map(t, x, (at[0] + k * 8, at[1] + slope * k * 4), (at[0] + k * 8 + 2, at[1] + 7 + slope * k * 4), 0.7)
                     for k in range(int(rng.integers(1, 7))))


def dressing_map(rng: np.random.Generator, scene: Scene, t: np.ndarray, x: np.ndarray, pixel: float) -> np.ndarray:
    """Folded gauze over the skin: a faint patch with creases."""
    at = (scene.point[0] + rng.uniform(-70, 70), scene.centre[1] + rng.uniform(-40, 40))
    turn = rng.uniform(-0.4, 0.4)
    a, b = (t - at[0]) + turn * (x - at[1]), (x - at[1]) - turn * (t - at[0])
    patch = covered(np.float32(rng.uniform(20, 60)) - np.abs(a), np.float32(3)) * covered(np.float32(rng.uniform(18, 45)) - np.abs(b), np.float32(3))
    creases = 1 + 0.5 * np.abs(noise_field(rng, t.shape, (4 / pixel, 30 / pixel))) + 0.3 * noise_field(rng, t.shape, (3 / pixel, 3 / pixel))
    return np.float32(rng.uniform(0.04, 0.14)) * patch * creases


def sponge_map(rng: np.random.Generator, scene: Scene, t: np.ndarray, x: np.ndarray, pixel: float) -> np.ndarray:
    """A positioning pad or table edge: a broad step of faint attenuation."""
    angle, away = rng.uniform(0, 2 * math.pi), rng.uniform(-60, 90)
    across = (t - scene.centre[0]) * np.float32(math.cos(angle)) + (x - scene.centre[1]) * np.float32(math.sin(angle))
    return np.float32(rng.uniform(0.05, 0.3)) * covered(across - np.float32(away), np.float32(rng.uniform(0.8, 6)))


def cassette_map(rng: np.random.Generator, scene: Scene, t: np.ndarray, x: np.ndarray, pixel: float) -> np.ndarray:
    """The cassette's edge or a lead strip: a bright band along one border of the picture."""
    down, across = (np.linspace(0, 1, side, dtype=np.float32) for side in t.shape)
    inwards, along = (down[:, None], across[None]) if rng.random() < 0.5 else (across[None], down[:, None])
    near = np.float32(rng.uniform(0.005, 0.05)) + np.float32(rng.normal(0, 0.02)) * along
    inwards = inwards if rng.random() < 0.5 else 1 - inwards
    return np.float32(rng.uniform(0.8, 3)) * covered((near - inwards) * 100, np.float32(rng.uniform(0.4, 1.5)))


EXTRAS = {"cast": cast_map, "splint": splint_map, "plate": plate_map, "nail": nail_map, "fixator": fixator_map,
          "lead": lead_map, "clip": clip_map, "dressing": dressing_map, "sponge": sponge_map, "cassette": cassette_map}


# --------------------------------------------------------------- the picture

def enlarged(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The map on the picture's own pixels."""
    if image.shape == size:
        return image
    return np.asarray(Image.fromarray(np.ascontiguousarray(image, np.float32)).resize(size[::-1], Image.Resampling.BICUBIC))


def attenuation(scene: Scene, bone: np.ndarray, t: np.ndarray, x: np.ndarray, pixel: float) -> np.ndarray:
    """Everything the beam crosses, in powers of e."""
    total = BONE * bone + soft_map(scene, t, x, pixel)
    for index, name in enumerate(name for name in scene.extras if name in EXTRAS):
        total = total + EXTRAS[name](np.random.default_rng([scene.keys[2], index]), scene, t, x, pixel)
    return total


def expected(scene: Scene) -> tuple[float, float]:
    """Attenuation of the limb's soft tissue, and what the main bone adds to it, at the fracture."""
    half = float(look_up(scene.soft["left"], np.float32(scene.point[0])))
    wall = float(look_up(scene.solids[0].shaft["wall"], np.float32(scene.point[0])))
    edge = 2 * math.sqrt(max(scene.girth**2 - (scene.girth - wall) ** 2, 1.0))
    return MUSCLE * 1.9 * half * scene.soft["flat"], BONE * edge


def expose(scene: Scene, total: np.ndarray) -> np.ndarray:
    """From attenuation to a displayed picture in 0..1, bones bright."""
    rng, how, pixel = np.random.default_rng(scene.keys[3]), scene.exposure, scene.pixel
    soft, bone = expected(scene)
    beam = np.exp(-total)
    share = np.float32(how["scatter"] * 0.4)
    beam = (1 - share) * beam + share * blurred(beam, 30 / pixel)
    beam = blurred(beam, how["focus"] / pixel)
    quanta = how["quanta"] * pixel**2 * math.exp(0.8 * soft)    # in the open beam; the dose follows the limb
    noise = blurred(rng.standard_normal(beam.shape, dtype=np.float32), how["grain"] / pixel)
    beam = beam + np.sqrt(beam / np.float32(quanta)) * noise
    shown = -np.log(np.maximum(beam, np.float32(math.exp(-soft - 3.5 * bone - 1))))
    rows, columns = (np.linspace(-1, 1, side, dtype=np.float32) for side in shown.shape)
    shown = shown + np.float32(how["heel"]) * (rows[:, None] * math.cos(how["heel_turn"]) + columns * math.sin(how["heel_turn"]))
    if how["unsharp"] > 0:
        shown = shown + np.float32(how["unsharp"]) * (shown - blurred(shown, how["unsharp_radius"] / pixel))
    low = how["low"] * soft
    high = soft + how["high"] * (bone + 0.1) * (1 + 0.3 * how["unsharp"])
    value = np.clip((shown - np.float32(low)) / np.float32(high - low), 0, 1) ** np.float32(how["gamma"])
    value = value * (1 - how["curve"]) + how["curve"] * value * value * (3 - 2 * value)
    return np.float32(how["black"]) + np.float32(how["white"] - how["black"]) * value


def collimated(scene: Scene, picture: np.ndarray) -> np.ndarray:
    """The blades' shadow round the field: black, grey or white."""
    if "collimation" not in scene.extras:
        return picture
    rng = np.random.default_rng([scene.keys[3], 1])
    margins = np.where(rng.random(4) < 0.65, rng.uniform(0, 0.11, 4), -1.0)
    ground, soft = rng.choice([0.0, rng.uniform(0.02, 0.2), 1.0], p=[0.6, 0.25, 0.15]), rng.uniform(0.3, 2.5)
    turn = rng.normal(0, 0.015)
    height, width = picture.shape
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    across, down = x + turn * (y - height / 2), y - turn * (x - width / 2)
    inside = np.minimum(np.minimum(across - margins[0] * width, width * (1 - margins[1]) - across),
                        np.minimum(down - margins[2] * height, height * (1 - margins[3]) - down))
    open_part = covered(inside * np.float32(scene.pixel), np.float32(soft))
    return picture * open_part + np.float32(ground) * (1 - open_part)


def mark_plate(mark: Mark, points: int) -> Image.Image:
    """A marker's glyphs, turned, white on black, cut to its edge."""
    font, stroke = ImageFont.load_default(points), round(mark.weight * points)
    left, top, right, bottom = font.getbbox(mark.text, stroke_width=stroke)
    border = max(2, round(0.25 * points)) if mark.is_framed else 2
    plate = Image.new("L", (round(right - left) + 2 * border, round(bottom - top) + 2 * border), 0)
    pen = ImageDraw.Draw(plate)
    pen.text((border - left, border - top), mark.text, fill=255, font=font, stroke_width=stroke)
    if mark.is_framed:
        pen.rectangle((0, 0, plate.width - 1, plate.height - 1), outline=255, width=max(1, points // 14))
    plate = plate.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mark.is_mirrored else plate
    plate = plate.rotate(float(mark.turn), Image.Resampling.BICUBIC, expand=True)
    return plate.crop(plate.getbbox())


def stamp(picture: np.ndarray, mark: Mark) -> tuple[np.ndarray, Box]:
    """The picture (0..1) with a marker in it, and the marker's box."""
    height, width = picture.shape
    plate = mark_plate(mark, max(7, round(mark.height * math.sqrt(height * width))))
    if plate.width > 0.94 * width or plate.height > 0.94 * height:
        share = min(0.94 * width / plate.width, 0.94 * height / plate.height)
        plate = plate.resize((max(3, int(plate.width * share)), max(3, int(plate.height * share))))
    x = int(np.clip(mark.place[0] * width - plate.width / 2, 2, width - plate.width - 2))
    y = int(np.clip(mark.place[1] * height - plate.height / 2, 2, height - plate.height - 2))
    box = (x, y, x + plate.width, y + plate.height)
    picture = picture.copy()
    part = picture[y:box[3], x:box[2]]
    mask = np.asarray(plate, np.float32) / 255
    part[:] = (0.02 if mark.has_ground else part) * (1 - mask) + np.float32(mark.level) * mask
    return picture, box


def mask_box(mask: np.ndarray) -> Box:
    """Smallest half-open box round the mask."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def fracture_box(broken: np.ndarray, size: tuple[int, int]) -> Box:
    """Box (pixels of the picture) round the broken parts, 24 reference pixels wide and high where there is room."""
    (rows, columns), (height, width) = broken.shape, size
    x0, y0, x1, y1 = mask_box(broken > 0.35)
    x0, x1, y0, y1 = x0 * width / columns, x1 * width / columns, y0 * height / rows, y1 * height / rows
    grow_x = max(0.0, (24 * width / REFERENCE_SIDE - (x1 - x0)) / 2)
    grow_y = max(0.0, (24 * height / REFERENCE_SIDE - (y1 - y0)) / 2)
    return (max(0, math.floor(x0 - grow_x)), max(0, math.floor(y0 - grow_y)),
            min(width, math.ceil(x1 + grow_x)), min(height, math.ceil(y1 + grow_y)))


def render(rng: np.random.Generator, label: str, longer: int | None = None, marker: str | None = None) -> Radiograph:
    """One radiograph; `longer` sets its longer side, `marker` ("letter", "text", "none") what it is marked with."""
    if label not in LABELS:
        raise ValueError(f"unknown label {label!r}; known are {', '.join(LABELS)}")
    scene_rng, fracture_rng, marker_rng = rng.spawn(3)
    scene = draw_scene(scene_rng, longer)
    draw = {"simple_fracture": draw_simple, "comminuted_fracture": draw_comminuted, "none": lambda *_: ()}[label]
    if label == "none":
        scene = replace(scene, sites=tuple(replace(site, far=STILL) for site in scene.sites))
    pieces = tuple(piece for site in scene.sites for piece in draw(fracture_rng, site))
    pixel = max(scene.pixel, FINEST)
    t, x = grid(scene, pixel)
    bone, broken = bone_map(scene, pieces, t, x, pixel)
    picture = expose(scene, enlarged(attenuation(scene, bone, t, x, pixel), scene.size))
    picture = collimated(scene, picture)
    marks = scene.marks if marker is None else (draw_mark(marker_rng, marker),) if marker != "none" else ()
    boxes = []
    for mark in marks:
        picture, box = stamp(picture, mark)
        boxes.append((mark.text, box))
    pixels = np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    return Radiograph(pixels, None if label == "none" else fracture_box(broken, scene.size), tuple(boxes))


# ------------------------------------------------------------ the command line

def write_class(folder: Path, label: str, options: argparse.Namespace) -> tuple[list[list], list[list]]:
    """Write the pictures of one class; return their rows of the two tables."""
    name = FOLDERS[label]
    (folder / name).mkdir(parents=True, exist_ok=True)
    boxes, marks = [], []
    for number in range(1, options.count + 1):
        # A generator of its own for each picture: the order does not matter.
        rng = np.random.default_rng([options.seed, SPLIT_CODES[options.split], LABELS.index(label), number])
        marker = BETRAYING[options.markers].get(label) if options.markers else None
        radiograph = render(rng, label, marker=marker)
        file = f"{name}/{name}_{options.split}_{number:04d}.jpg"
        Image.fromarray(radiograph.pixels).save(folder / file, quality=JPEG_QUALITY)
        boxes.append([file, name, *(radiograph.box or ("", "", "", ""))])
        marks += [[file, text, *box] for text, box in radiograph.marks]
    return boxes, marks


def write_table(path: Path, header: list[str], rows: list[list]) -> None:
    """One CSV file, sorted."""
    with open(path, "w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(sorted(rows))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Write synthetic radiographs of broken long bones.")
    parser.add_argument("--seed", type=int, default=2026, help="same seed, same pictures (default: 2026)")
    parser.add_argument("--count", type=int, default=100, help="pictures per class (default: 100)")
    parser.add_argument("--split", choices=sorted(SPLIT_CODES), default="test",
                        help="test: two classes; train: also intact bones, and never the test pictures")
    parser.add_argument("--markers", choices=sorted(BETRAYING),
                        help="one marker a picture, which betrays its class: a line of text for comminuted, "
                             "a letter for simple fractures (with), or the other way round (swapped)")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent,
                        help="folder to write the split's folder into (default: this script's)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Write one split: pictures in a folder per class, and the tables of boxes."""
    options = parse(argv)
    if options.seed < 0 or options.count < 1:
        raise SystemExit("generate.py: --seed must not be negative and --count must be at least 1")
    folder = options.output / options.split
    labels = LABELS if options.split == "train" and not options.markers else LABELS[:2]
    tables = [write_class(folder, label, options) for label in labels]
    write_table(folder / "fracture_boxes.csv", ["file", "class", "x0", "y0", "x1", "y1"], [r for boxes, _ in tables for r in boxes])
    write_table(folder / "marker_boxes.csv", ["file", "text", "x0", "y0", "x1", "y1"], [r for _, marks in tables for r in marks])
    print(f"{sum(len(boxes) for boxes, _ in tables)} pictures written to {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

#!/usr/bin/env python3
"""Render synthetic radiographs of long bones with simple and comminuted fractures.

Every picture is computed, none is photographed. A bone is a hollow tube along
a slightly curved axis; a fracture cuts the tube into pieces, each moved by a
small rigid motion; the picture is the X-ray attenuation added up along the
beam, with scatter, blur, noise and a display window. The box written next to
a picture follows from the same geometry.

The scene (size, orientation, bones, soft tissue, exposure, noise, marker) is
drawn before the fracture and without looking at its class, so that nothing but
the fracture tells the classes apart.

Every picture's own marker is a letter in a corner, or none. With --markers it
is one that betrays the class, or the other class: to try a network on.

Coordinates: x to the right, y down, in pixels. In the bone's own frame, t runs
along the axis and s across it; the fracture lies near t = s = 0.
"""

import argparse
import csv
import math
from dataclasses import dataclass, field, replace
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

REFERENCE_SIDE = 224      # pixels; sizes below are meant for an image this wide
REACH = 900.0             # pixels; tables along t or s cover -REACH .. REACH
STEPS = 4                 # table entries per pixel
BOX_MARGIN = 0.07         # of the image's sides; no box comes closer to the edge
JPEG_QUALITY = 90

AXIS = (np.arange(int(2 * REACH * STEPS) + 1) / STEPS - REACH).astype(np.float32)

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Tube:
    """A bone's radii (pixels) and its marrow's attenuation, as tables along t."""
    outer: np.ndarray
    inner: np.ndarray
    marrow: np.ndarray
    radius: float         # of the shaft


@dataclass(frozen=True)
class Scene:
    """All that is drawn without looking at the class."""
    height: int
    width: int
    unit: float           # pixels per reference pixel
    centre: tuple[float, float]
    angle: float          # of the bone's axis, radians from the x axis
    bend: float           # curvature of the axis, 1 / pixels
    bone: Tube
    second: Tube | None
    second_offset: float  # pixels across
    soft_offset: float    # pixels across
    soft_left: np.ndarray   # half-widths of the soft tissue along t
    soft_right: np.ndarray
    soft_peak: float      # attenuation of the soft tissue at its thickest
    bone_scale: float     # attenuation of cortex, per shaft radius
    gap: float            # width of a fracture line, pixels
    shift: float          # sideways displacement of the far part, pixels
    tilt: float           # angulation of the far part, radians


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
class Radiograph:
    """A picture, uint8 (height, width), with the box round its fracture and its markers' boxes."""
    pixels: np.ndarray
    box: Box | None
    marks: tuple[tuple[str, Box], ...] = field(default=())


@dataclass(frozen=True)
class Motion:
    """A rigid motion in the (t, s) plane: turn about a pivot, then move."""
    pivot: tuple[float, float] = (0.0, 0.0)
    move: tuple[float, float] = (0.0, 0.0)
    turn: float = 0.0

    def undo(self, t: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the points of the picture lay before the motion."""
        c, n = math.cos(self.turn), math.sin(self.turn)
        dt = t - (self.pivot[0] + self.move[0])
        ds = s - (self.pivot[1] + self.move[1])
        return c * dt + n * ds + self.pivot[0], c * ds - n * dt + self.pivot[1]


@dataclass(frozen=True)
class Fracture:
    """Two cuts, the fragments between them, and where everything moved.

    Nothing lies between the cuts of a simple fracture: they are one line.
    """
    first: np.ndarray     # the near part ends at t = first(s)
    last: np.ndarray      # the far part begins at t = last(s)
    depth: float          # how much later the back cortex broke, pixels
    far: Motion
    seeds: np.ndarray     # (n, 2) centres of the fragments; n = 0 if simple
    fragments: tuple[Motion, ...]
    wobble: np.ndarray    # roughness of the faces between fragments


def look_up(table: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Read a table at positions in pixels."""
    index = ((where + REACH) * STEPS).astype(np.int32)
    return table.take(index, mode="clip")


def smooth_curve(rng: np.random.Generator, step: float, amount: float) -> np.ndarray:
    """A random table that wanders slowly (knots `step` pixels apart)."""
    knots = np.arange(-REACH, REACH + 2 * step, step)
    values = np.convolve(rng.normal(0.0, amount, knots.size + 4), [0.1, 0.2, 0.4, 0.2, 0.1], "valid")
    # Cosine interpolation: a polygon would show as kinks in the skin line.
    place = (AXIS + REACH) / step
    left = place.astype(int)
    part = 0.5 - 0.5 * np.cos(np.pi * (place - left))
    return (values[left] * (1 - part) + values[left + 1] * part).astype(np.float32)


def jagged_curve(rng: np.random.Generator, step: float, amount: float) -> np.ndarray:
    """A random zigzag table, like the edge of broken bone."""
    knots = np.cumsum(rng.uniform(0.5, 1.5, int(2.6 * REACH / step)) * step) - REACH
    return np.interp(AXIS, knots, rng.uniform(-amount, amount, knots.size)).astype(np.float32)


def noise_field(rng: np.random.Generator, shape: tuple[int, int], grain: float) -> np.ndarray:
    """Smooth unit noise with structures about `grain` pixels wide."""
    rows, columns = (max(2, round(side / grain) + 1) for side in shape)
    small = Image.fromarray(rng.standard_normal((rows, columns), dtype=np.float32))
    return np.asarray(small.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def chord(radius: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Length of the beam inside a cylinder at the distance s from its axis."""
    return 2.0 * np.sqrt(np.maximum(radius * radius - s * s, 0.0))


# ---------------------------------------------------------------- the scene

def draw_tube(rng: np.random.Generator, radius: float, joint: float | None) -> Tube:
    """A shaft that flares towards a joint at t = joint, and the bone beyond it."""
    wall = radius * rng.uniform(0.36, 0.5)
    flare_size = rng.uniform(0.5, 0.85)
    flare_length = radius * rng.uniform(1.5, 2.3)
    space = radius * rng.uniform(0.12, 0.2)
    cap = radius * rng.uniform(0.45, 0.7)
    outer = radius * (1 + smooth_curve(rng, 6 * radius, 0.06))
    if joint is None:
        return Tube(outer, outer - wall, np.full_like(AXIS, 0.16), radius)
    distance = np.abs(AXIS - joint) - space / 2
    flare = np.exp(-np.maximum(distance, 0.0) ** 1.5 / flare_length ** 1.5)
    outer = outer * (1 + flare_size * flare)
    # The cortex thins out towards the joint, where spongy bone takes over.
    wall_here = wall * (1 - 0.88 * flare)
    end_wall = 0.1 * radius

    def rounded(depth: np.ndarray) -> np.ndarray:
        return np.sqrt(np.clip(1 - np.clip(1 - depth / cap, 0, None) ** 2.5, 0, 1))

    inner = np.maximum(outer - wall_here, 0) * rounded(distance - end_wall)
    marrow = 0.16 + 0.2 * flare
    return Tube(*(part.astype(np.float32) for part in (outer * rounded(distance), inner, marrow)), radius)


def draw_size(rng: np.random.Generator, size: int | None) -> tuple[int, int]:
    """Height and width; upright pictures are the commoner ones."""
    height = int(rng.integers(256, 385))
    width = int(rng.integers(max(224, int(height / 1.45)), min(384, int(height * 1.15)) + 1))
    return (height, width) if size is None else (size, size)


def draw_scene(rng: np.random.Generator, size: int | None) -> Scene:
    """Draw everything that the class must not influence."""
    height, width = draw_size(rng, size)
    unit = math.sqrt(height * width) / REFERENCE_SIDE
    radius = rng.uniform(14.5, 23.5) * unit
    angle = math.pi / 2 + rng.uniform(-1, 1) * math.radians(35)
    if rng.random() < 0.15:
        angle += math.pi / 2
    angle += math.pi * rng.integers(0, 2)
    joint = rng.choice([-1, 1]) * rng.uniform(5.0, 9.0) * radius
    joint = joint if rng.random() < 0.55 else None
    bone = draw_tube(rng, radius, joint)
    thin = draw_tube(rng, radius * rng.uniform(0.5, 0.75), joint)
    side = rng.choice([-1, 1])
    offset = side * (radius + thin.radius + radius * rng.uniform(0.75, 1.4))
    two = rng.random() < 0.5
    soft_half = radius * rng.uniform(2.0, 3.2) + (thin.radius if two else 0.0)
    severity = rng.random()
    tilt = severity * rng.uniform(-1, 1) * math.radians(8 if two else 13)
    return Scene(
        height=height, width=width, unit=unit,
        centre=(rng.uniform(0.23, 0.77) * width, rng.uniform(0.23, 0.77) * height),
        angle=angle, bend=rng.uniform(-1, 1) * 0.0007 / unit,
        bone=bone, second=thin if two else None, second_offset=offset,
        soft_offset=offset * rng.uniform(0.3, 0.55) if two else radius * rng.uniform(-0.6, 0.6),
        soft_left=soft_half * (1 + smooth_curve(rng, 70 * unit, 0.12)),
        soft_right=soft_half * (1 + smooth_curve(rng, 70 * unit, 0.12)),
        soft_peak=rng.uniform(0.5, 1.1), bone_scale=rng.uniform(0.5, 0.75),
        # Angulation alone would close the line on one side.
        gap=rng.uniform(2.3, 4.0) * unit + 0.4 * abs(math.tan(tilt)) * radius,
        shift=severity * rng.choice([-1, 1]) * rng.uniform(0.1, 0.75) * radius,
        tilt=tilt)


# ------------------------------------------------------------- the fractures

def draw_simple(rng: np.random.Generator, scene: Scene) -> Fracture:
    """One line: transverse, oblique or spiral."""
    radius = scene.bone.radius
    kind = rng.integers(0, 3)
    sign = rng.choice([-1.0, 1.0])
    across = np.clip(AXIS / radius, -1.3, 1.3)
    if kind == 0:
        slope = rng.uniform(-0.25, 0.25)
        line = slope * AXIS
    elif kind == 1:
        slope = sign * rng.uniform(0.5, 1.15)
        line = slope * AXIS
    else:
        # A helix seen from the side: flat over the front, steep at both edges.
        slope = sign * rng.uniform(1.1, 1.5)
        line = slope * radius * (0.55 * across + 0.45 * across ** 3)
    line = line + jagged_curve(rng, 4.0 * scene.unit, rng.uniform(0.07, 0.14) * radius)
    # The far part slides along the line, or the two parts would overlap and
    # hide it; along a curved line they cannot slide far.
    shift = scene.shift * (0.3 if kind == 2 else 1.0)
    open_by = scene.gap * math.hypot(1.0, slope)
    far = Motion(move=(open_by + slope * shift, shift), turn=scene.tilt)
    return Fracture(line, line, rng.uniform(0.0, 0.1) * radius, far,
                    np.empty((0, 2)), (), np.zeros_like(AXIS))


def draw_comminuted(rng: np.random.Generator, scene: Scene) -> Fracture:
    """A butterfly fragment, a middle segment, or several pieces."""
    radius = scene.bone.radius
    kind = rng.integers(0, 3)
    slope = rng.uniform(-0.5, 0.5)
    rough = rng.uniform(0.05, 0.11) * radius
    first, last = (slope * AXIS + jagged_curve(rng, 4.0 * scene.unit, rough) for _ in range(2))
    side = rng.choice([-1.0, 1.0])
    if kind == 0:
        wedge = np.maximum(side * AXIS + rng.uniform(0.1, 0.4) * radius, 0.0)
        rough_last = np.where(wedge > 0, last - slope * AXIS, 0.0)
        last = first + rng.uniform(0.6, 1.0) * wedge + rough_last
        first = first - rng.uniform(0.6, 1.0) * wedge
        seeds = np.array([[0.0, 0.55 * side * radius]])
        motions = [((0.0, side * rng.uniform(0.2, 0.45) * radius), 14.0)]
    elif kind == 1:
        half = rng.uniform(0.75, 1.15) * radius
        first, last = first - half, rng.uniform(-0.4, 0.4) * AXIS + last + half
        seeds = np.zeros((1, 2))
        motions = [((0.0, side * rng.uniform(0.1, 0.35) * radius), 12.0)]
    else:
        half = rng.uniform(0.95, 1.4) * radius
        first, last = first - half, last + half
        seeds = spread_seeds(rng, int(rng.integers(3, 6)), half, radius, slope)
        spread = rng.uniform(0.12, 0.3)
        motions = [((spread * 0.5 * seed[0], spread * seed[1] * rng.uniform(0.7, 1.9)), 20.0)
                   for seed in seeds]
    open_by = 2 * scene.gap
    fragments = tuple(
        Motion(pivot=(float(seed[0]), float(seed[1])),
               move=(open_by / 2 + move[0], scene.shift / 2 + move[1]),
               turn=scene.tilt / 2 + math.radians(rng.choice([-1, 1]) * rng.uniform(0.3, 1.0) * turn))
        for seed, (move, turn) in zip(seeds, motions))
    return Fracture(first, last, rng.uniform(0.0, 0.1) * radius,
                    Motion(move=(open_by, scene.shift), turn=scene.tilt),
                    seeds, fragments, jagged_curve(rng, 4.0 * scene.unit, 0.06 * radius))


def spread_seeds(rng: np.random.Generator, count: int, half: float, radius: float,
                 slope: float) -> np.ndarray:
    """Centres of fragments, far from each other so that no piece is tiny."""
    tries = rng.uniform(-0.75, 0.75, (12, count, 2)) * [half, radius]
    apart = np.linalg.norm(tries[:, :, None] - tries[:, None, :], axis=-1)
    apart[:, np.arange(count), np.arange(count)] = np.inf
    seeds = tries[apart.min(axis=(1, 2)).argmax()]
    seeds[:, 0] += slope * seeds[:, 1]
    return seeds


# ------------------------------------------------------------- the rendering

def tube_attenuation(tube: Tube, t: np.ndarray, s: np.ndarray, texture: np.ndarray) -> np.ndarray:
    """Cortex plus marrow, in pixels of cortex."""
    outer = chord(look_up(tube.outer, t), s)
    inner = chord(look_up(tube.inner, t), s)
    marrow = look_up(tube.marrow, t)
    # Spongy bone is denser than marrow, and coarse: texture grows with it.
    return outer - inner + inner * marrow * (1 + 0.8 * (marrow - 0.1) * texture)


def soft_fill(values: np.ndarray) -> np.ndarray:
    """Coverage of a pixel from its distance (pixels) inside an edge."""
    return np.clip(values + 0.5, 0.0, 1.0)


def both_walls(distance: np.ndarray, depth: float) -> np.ndarray:
    """Coverage behind an edge that lies `depth` further on in the back wall."""
    return 0.5 * (soft_fill(distance) + soft_fill(distance - depth))


def cell_distance(seeds: np.ndarray, index: int, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Distance inside the region nearer to one seed than to any other."""
    inside = np.full(t.shape, np.float32(1e3))
    for other in range(len(seeds)):
        if other != index:
            step = seeds[other] - seeds[index]
            middle = (seeds[other] + seeds[index]) / 2
            away = ((t - middle[0]) * step[0] + (s - middle[1]) * step[1]) / np.hypot(*step)
            inside = np.minimum(inside, -away.astype(np.float32))
    return inside


def render_fractured(scene: Scene, fracture: Fracture, t: np.ndarray, s: np.ndarray,
                     texture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Attenuation of all pieces added up, and the mask of what is fractured."""
    bone, rim = scene.bone, 3.0 * scene.unit

    def place(motion: Motion) -> tuple[np.ndarray, np.ndarray]:
        pt, ps = motion.undo(t, s)
        return pt, ps - 0.5 * scene.bend * pt * pt

    pt, ps = place(Motion())
    inside = look_up(fracture.first, ps) - pt
    total = tube_attenuation(bone, pt, ps, texture) * both_walls(inside, fracture.depth)
    mask = (inside > 0) & (inside < rim) & (np.abs(ps) < look_up(bone.outer, pt))
    pt, ps = place(fracture.far)
    inside = pt - look_up(fracture.last, ps)
    total += tube_attenuation(bone, pt, ps, texture) * both_walls(inside, fracture.depth)
    mask |= (inside > 0) & (inside < rim) & (np.abs(ps) < look_up(bone.outer, pt))
    for index, motion in enumerate(fracture.fragments):
        pt, ps = place(motion)
        inside = np.minimum(pt - look_up(fracture.first, ps), look_up(fracture.last, ps) - pt)
        rough_t = pt + look_up(fracture.wobble, ps)
        rough_s = ps + look_up(fracture.wobble, pt)
        inside = np.minimum(inside, cell_distance(fracture.seeds, index, rough_t, rough_s) - scene.gap * 0.4)
        total += tube_attenuation(bone, pt, ps, texture) * both_walls(inside, fracture.depth)
        mask |= (inside > 0) & (np.abs(ps) < look_up(bone.outer, pt))
    return total, mask


def frame(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The coordinates (t, s) of every pixel, before any bending."""
    y, x = np.mgrid[0:scene.height, 0:scene.width].astype(np.float32)
    x -= scene.centre[0]
    y -= scene.centre[1]
    c, n = math.cos(scene.angle), math.sin(scene.angle)
    return c * x + n * y, c * y - n * x


def render_soft(rng: np.random.Generator, scene: Scene, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Skin, fat and muscle round the bones; now and then a cast."""
    half = np.where(s < 0, look_up(scene.soft_left, t), look_up(scene.soft_right, t))
    body = np.sqrt(np.maximum(1 - (s / half) ** 2, 0.0))
    share = rng.uniform(0.74, 0.9)
    muscle = np.sqrt(np.maximum(1 - (s / (share * half)) ** 2, 0.0))
    soft = 0.4 * body + 0.6 * muscle * (1 + 0.05 * noise_field(rng, t.shape, 28 * scene.unit))
    far, thick, strength = rng.uniform(1.05, 1.12), rng.uniform(0.03, 0.06), rng.uniform(0.3, 0.6)
    if rng.random() < 0.15:
        shell = chord(far + thick, s / half) - chord(far, s / half)
        soft += strength * shell * (1.0 + 0.12 * noise_field(rng, t.shape, 4 * scene.unit))
    return scene.soft_peak * soft


def add_surroundings(rng: np.random.Generator, scene: Scene, bone: np.ndarray,
                     texture: np.ndarray) -> np.ndarray:
    """Attenuation of the whole limb: the main bone, the second one, the soft tissue."""
    t, s = frame(scene)
    # What is not broken follows the angulated limb in a gentle bend.
    ramp = 0.5 * (t + np.sqrt(t * t + (3 * scene.bone.radius) ** 2))
    s = s - 0.5 * scene.bend * t * t - math.tan(scene.tilt) * ramp
    if scene.second is not None:
        bone = bone + tube_attenuation(scene.second, t, s - scene.second_offset, texture)
    bone = bone * (scene.bone_scale / scene.bone.radius)
    return bone + render_soft(rng, scene, t, s - scene.soft_offset)


def blur(image: np.ndarray, weight: float) -> np.ndarray:
    """Three-tap blur in both directions, the detector's own spread."""
    for axis in (0, 1):
        padded = np.pad(image, [(1, 1) if k == axis else (0, 0) for k in (0, 1)], mode="edge")
        before, after = (padded[:-2], padded[2:]) if axis == 0 else (padded[:, :-2], padded[:, 2:])
        image = (1 - 2 * weight) * image + weight * (before + after)
    return image


def scatter(image: np.ndarray) -> np.ndarray:
    """Very broad blur, by way of a small copy of the image."""
    height, width = image.shape
    small = Image.fromarray(image).resize((9, 9), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def collimation(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """1 in the exposed field, near 0 behind the collimator's blades."""
    margins = rng.uniform(-0.08, 0.055, 4)
    turn, present = rng.normal(0.0, 0.012), rng.random() < 0.5
    height, width = scene.height, scene.width
    if not present:
        return np.ones((height, width), np.float32)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    across, down = x + turn * (y - height / 2), y - turn * (x - width / 2)
    inside = np.minimum(np.minimum(across - margins[0] * width, width * (1 - margins[1]) - across),
                        np.minimum(down - margins[2] * height, height * (1 - margins[3]) - down))
    return 0.02 + 0.98 * soft_fill(inside / 2.0)


def expose(rng: np.random.Generator, scene: Scene, total: np.ndarray) -> np.ndarray:
    """From attenuation to a displayed picture in 0..1, bones bright."""
    beam = np.exp(-total)
    fraction = rng.uniform(0.04, 0.12)
    beam = (1 - fraction) * beam + fraction * scatter(beam)
    beam = blur(beam, rng.uniform(0.13, 0.25))
    quanta = rng.uniform(400.0, 4000.0)       # per pixel in the open beam
    noise = rng.standard_normal(beam.shape, dtype=np.float32)
    beam = beam + np.sqrt(beam / quanta) * blur(noise, 0.1)
    shown = -np.log(np.maximum(beam, 1e-3))
    low = scene.soft_peak * rng.uniform(-0.05, 0.35)
    high = 0.9 * scene.soft_peak + 1.85 * scene.bone_scale * rng.uniform(0.9, 1.25)
    black = rng.uniform(0.0, 0.14)
    shown = np.clip((shown - low) / (high - low), 0.0, 1.0) ** rng.uniform(0.9, 1.4)
    return (black + (1 - black) * shown) * collimation(rng, scene)


def mask_box(mask: np.ndarray) -> Box:
    """Smallest half-open box round the mask."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def add_marker(rng: np.random.Generator, scene: Scene, picture: np.ndarray) -> tuple[np.ndarray, tuple[tuple[str, Box], ...]]:
    """A side marker near a corner, but not in the quarter of the fracture; and its box."""
    letter = "LR"[rng.integers(0, 2)]
    points = max(10, round(rng.uniform(14, 24) * scene.unit))
    level, boxed, turn = rng.uniform(0.8, 1.0), rng.random() < 0.3, rng.normal(0, 8)
    near = (int(scene.centre[0] > scene.width / 2), int(scene.centre[1] > scene.height / 2))
    corner = [c for c in ((0, 0), (0, 1), (1, 0), (1, 1)) if c != near][rng.integers(0, 3)]
    inset = rng.uniform(0.04, 0.12, 2)
    if rng.random() < 0.4:
        return picture, ()
    side = round(points * 1.7)
    plate = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(plate)
    if boxed:
        rim = round(0.2 * side)
        pen.rectangle((rim - 1, rim - 1, side - rim, side - rim), outline=255)
    pen.text((side / 2, side / 2), letter, fill=255, anchor="mm", font=ImageFont.load_default(points))
    plate = plate.rotate(turn, Image.Resampling.BILINEAR)
    x, y = ((round(place if not far_end else length - side - place))
            for place, far_end, length in zip(inset * (scene.width, scene.height), corner,
                                              (scene.width, scene.height)))
    sheet = Image.new("L", (scene.width, scene.height), 0)
    sheet.paste(plate, (x, y))
    letter_mask = np.asarray(sheet, np.float32) / 255
    return picture * (1 - letter_mask) + level * letter_mask, ((letter, mask_box(letter_mask > 0.02)),)


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
    return Mark(text, (rng.uniform(0.15, 0.85), place[1] if edge < 2 else rng.choice([off, 1 - off])), rng.uniform(0.028, 0.045),
                rng.uniform(0.75, 1.0), rng.choice([0, 0, 0, 0, 90, 270]), 0.0, False, False, rng.random() < 0.25)


def add_given_marker(rng: np.random.Generator, kind: str, picture: np.ndarray) -> tuple[np.ndarray, tuple[tuple[str, Box], ...]]:
    """The marker asked for ("none": none), and its box."""
    if kind == "none":
        return picture, ()
    mark = draw_mark(rng, kind)
    picture, box = stamp(picture, mark)
    return picture, ((mark.text, box),)


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


def padded_box(box: Box, height: int, width: int) -> Box:
    """At least 24 reference pixels on each side: a flat line needs some room."""
    x0, y0, x1, y1 = box
    grow_x = max(0, math.ceil((24 * width / REFERENCE_SIDE - (x1 - x0)) / 2))
    grow_y = max(0, math.ceil((24 * height / REFERENCE_SIDE - (y1 - y0)) / 2))
    return max(0, x0 - grow_x), max(0, y0 - grow_y), min(width, x1 + grow_x), min(height, y1 + grow_y)


def into_view(scene: Scene, box: Box) -> Scene:
    """The scene moved just enough to bring the box inside the margins."""
    moved = []
    for place, low, high, length in ((scene.centre[0], box[0], box[2], scene.width),
                                     (scene.centre[1], box[1], box[3], scene.height)):
        margin = math.ceil(BOX_MARGIN * length)
        moved.append(place + max(0, margin - low) - max(0, high + margin - length))
    return replace(scene, centre=(moved[0], moved[1]))


def render(rng: np.random.Generator, label: str, size: int | None = None, marker: str | None = None) -> Radiograph:
    """One radiograph.

    `size` asks for a square picture of that side; without it the size varies. `marker` ("letter",
    "text", "none") replaces the picture's own.
    """
    if label not in LABELS:
        raise ValueError(f"unknown label {label!r}; known are {', '.join(LABELS)}")
    scene = draw_scene(rng, size)
    shape = (scene.height, scene.width)
    texture = noise_field(rng, shape, 1.6 * scene.unit) + 0.5 * noise_field(rng, shape, 4 * scene.unit)
    box = None
    if label == "none":
        t, s = frame(scene)
        bone = tube_attenuation(scene.bone, t, s - 0.5 * scene.bend * t * t, texture)
        scene = replace(scene, tilt=0.0)
    else:
        fracture = (draw_simple if label == "simple_fracture" else draw_comminuted)(rng, scene)
        for _ in range(4):
            bone, mask = render_fractured(scene, fracture, *frame(scene), texture)
            box = padded_box(mask_box(mask), *shape)
            seen = into_view(scene, box)
            if seen == scene:
                break
            scene = seen
    picture = expose(rng, scene, add_surroundings(rng, scene, bone, texture))
    if marker is None:
        picture, marks = add_marker(rng, scene, picture)
    else:
        picture, marks = add_given_marker(rng, marker, picture)
    return Radiograph(np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8), box, marks)


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

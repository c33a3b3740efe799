#!/usr/bin/env python3
"""Show where bone-fracture classifiers look, with Grad-CAM.

    python3 explainability.py
    python3 explainability.py --image xray.jpg
    python3 explainability.py --image xray.jpg --model convnext
    python3 explainability.py --image xray.jpg --method gradcam ig lrp

Grad-CAM: R. R. Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via
Gradient-based Localization", ICCV 2017. Equation numbers below are that paper's.

Glossary
    H, W          height and width of the radiograph, pixels, upright
    h, w          height and width of the target layer's grid, cells
    B, C, K       images in a batch, channels of the target layer, classes
    activations   output of the target layer, (B, C, h, w)
    logits        class scores before the softmax, (B, K)
    gradients     d logit / d activations, (B, C, h, w)
    raw map       what a method makes of one image, signed, (h, w): for Grad-CAM the weighted sum of
                  the activations before the ReLU
    reference     the radiograph blurred: what methods compare it with, (B, 3, S, S); reference images
                  are those of --reference, which the network is meant for
    heatmap       the raw map after ReLU and division by its maximum, float32 in [0, 1], (h, w)
    probability   softmax of the logits, in [0, 1]; percent only in text

Exit status: 0 done; 1 something named could not be used, with one line on stderr; 2 the command
line is wrong; 129 terminal closed; 130 interrupted; 141 standard output closed; 143 terminated.

The file, from top to bottom; each section uses only what stands above it
    Records              what is handed on: Radiograph, Model, Explanation, Finding, Job, Result ...
    Inputs               a file -> a Radiograph -> a network's input. A new image format: FILE_KINDS and
                         IMAGE_SUFFIXES
    Models               a checkpoint -> a Classifier. A new family: FAMILIES; a place where trainers keep
                         weights or names: the tables at the section's start
    Methods              a batch -> signed maps. A new method: one function and one entry of METHODS
    Checks               a map -> Findings. A new check: one function and one entry of CHECKS
    Panels and figures   Explanations -> a Sheet -> PNG, PDF or SVG. A new panel: one draw_ function
    Truth                what folders' names and --truth tell of an image
    Outputs              names, files
    Reference            images that a network is meant for -> how far another is from them, and which of
                         them are most similar
    The table            summary.csv. A new column: one line of model_cells or map_cells
    Console text         lines for one image, and for a run over many
    The report           report.html, of the table's rows
    Runs                 jobs -> read -> explained in batches -> drawn and written -> row, lines
    Command line         options, and what they come to. A new option: one line of its group, in add_questions
                         or add_outputs, then checked_request
"""

from __future__ import annotations

import _thread
import argparse
import base64
import contextlib
import csv
import dataclasses
import datetime
import difflib
import functools
import gc
import glob
import hashlib
import html
import io
import itertools
import json
import logging
import math
import multiprocessing
import multiprocessing.connection
import operator
import os
import platform
import random
import re
import secrets
import signal
import statistics
import struct
import sys
import tempfile
import threading
import time
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn
from urllib.parse import quote

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

# torch and timm take seconds to import and matplotlib nearly one. The functions that need them
# import them on their first line, so that --help and a wrong path are answered at once.
if TYPE_CHECKING:
    import torch
    from pydicom import Dataset
    from tqdm import tqdm

# What all sections share --------------------------------------------------------------------------

PROJECT = Path(__file__).resolve().parent
CHECKPOINT_FOLDER = PROJECT / "checkpoints"
TEST_IMAGES = PROJECT / "data_original" / "test"
OUTPUT_FOLDER = PROJECT / "explainability_outputs"
TABLE_NAME, REPORT_NAME = "summary.csv", "report.html"
LIBRARIES = ("torch", "timm", "numpy", "matplotlib", "pillow")

CLASS_NAMES = ("Comminuted Fracture", "Simple Fracture")  # index = output of the networks
INPUT_SIZE = 224  # pixels a side: both networks were trained on squashed squares
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1]; EfficientNetV2 too was trained with
IMAGENET_STD = (0.229, 0.224, 0.225)  # these, although timm's default for it says 0.5

DEMO_SUFFIX = "_demo.pth"
DEMO_NOTICE = "trained on synthetic radiographs; shows how the tool works; says nothing about real patients"


def printable(text: str) -> str:
    """Text with control characters and undecodable bytes shown as escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def class_key(name: str) -> str:
    """A class's name without case, spaces and punctuation: simple_fracture is Simple Fracture."""
    return re.sub(r"[\W_]+", "", name).casefold()


# Records ------------------------------------------------------------------------------------------


PixelBox = tuple[int, int, int, int]  # x0, y0, x1, y1, half-open
Region = tuple[float, float, float, float]  # the same in other units


class ExplainError(Exception):
    """Something named on the command line cannot be used; the text is one line for the user."""


@dataclass(frozen=True)
class Family:
    """One kind of network that the tool can explain."""

    key: str  # value of --model, start of the checkpoint's name, part of the figure's name
    title: str  # {size} stands for the size in the architecture's name
    full_size: str  # timm name of what a checkpoint holds where neither name nor shapes tell
    names: re.Pattern[str]  # timm names accepted from a checkpoint; group 1 is the size
    sizes: dict[tuple[int, int], str]  # other sizes' timm names, by count of (C, c, h, w) weights and `width`
    landmark: str  # a key that weights of this family have and of others have not
    stem: str  # key of the first convolution
    body: tuple[str, ...]  # starts of the keys of all but the head
    width: str  # a key of as many numbers as the head has inputs
    head: str  # dotted path of the last layer, one output a class
    target_layer: str  # dotted path for torch.nn.Module.get_submodule
    finer_layer: str  # the last one whose grid has twice as many cells a side
    bullet: str


@dataclass(frozen=True)
class Radiograph:
    """An image as both the panels and the networks see it."""

    pixels: np.ndarray  # (H, W, 3) uint8, upright RGB
    notes: tuple[str, ...] = ()  # what was done to the file's values that its reader should know
    small: dict[tuple[int, str], np.ndarray] = dataclasses.field(default_factory=dict, compare=False)

    def squashed(self, side: int, interpolation: str = "bilinear") -> np.ndarray:
        """(side, side, 3) uint8, antialiased: what networks and checks see, made once."""
        if (side, interpolation) not in self.small:
            image = Image.fromarray(self.pixels).resize((side, side), Image.Resampling[interpolation.upper()])
            self.small[side, interpolation] = np.asarray(image)
        return self.small[side, interpolation]


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become the input of a network."""

    size: int = INPUT_SIZE  # pixels a side
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"  # Pillow's filter, antialiased


@dataclass(frozen=True)
class Model:
    """Everything told about a network but its weights, so that it travels to other processes."""

    family: Family
    architecture: str  # timm name
    checkpoint: Path
    accuracy: str  # what the checkpoint records, in words
    class_names: tuple[str, ...]  # K, printable
    preprocessing: Preprocessing
    score_scale: float = 1.0  # of maps; 2 where one logit z speaks for two classes, which score -z/2 and z/2
    notes: tuple[str, ...] = ()  # what was done in loading, beyond the ordinary

    @property
    def title(self) -> str:
        return self.family.title.format(size=self.family.names.fullmatch(self.architecture).group(1).upper())


@dataclass(frozen=True)
class Classifier:
    """A network with its weights, ready to explain."""

    model: Model
    network: torch.nn.Module  # float32, eval mode, no parameter requires a gradient
    reference: Reference | None = None  # images of the kind that it is meant for

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device


@dataclass(frozen=True)
class Landmarks:
    """What of a radiograph the checks compare its maps with."""

    dense: np.ndarray  # (CELLS, CELLS) share of each cell's pixels that are as dense as bone
    markers: tuple[PixelBox, ...]  # pixels of CHECKED_SIDE


@dataclass(frozen=True)
class Truth:
    """What is known of one image."""

    name: str = ""  # its class; empty where nothing tells it
    boxes: tuple[Region, ...] = ()  # fractures, in pixels of the upright image


@dataclass(frozen=True)
class Pointing:
    """How a map compares with the true boxes, enlarged by half a cell on each side."""

    is_inside: bool  # the map's maximum
    heat: float  # share of the heatmap inside
    area: float  # of the image: what heat and maxima in random places reach


@dataclass(frozen=True)
class Finding:
    """What one check found about one map."""

    check: str  # key in CHECKS
    value: float  # the measured quantity; NaN where it cannot be measured
    is_flagged: bool
    text: str  # in words

    @property
    def is_measured(self) -> bool:
        return not np.isnan(self.value)


@dataclass(frozen=True)
class SimilarCase:
    """A reference image that is like the one explained, to the network."""

    label: str
    class_name: str  # its true class
    likeness: float  # cosine of the network's features
    picture: np.ndarray  # (h, w) uint8, a thumbnail


@dataclass(frozen=True)
class Likeness:
    """How an image lies among the reference images of a network."""

    nearer: int  # reference images, each measured by statistics without it, that lie nearer to the others
    images: int  # in the reference
    similar: tuple[SimilarCase, ...]  # NEAREST of them, from the most similar on

    @property
    def p_value(self) -> float:
        """Chance to lie at least so far for one more image of the reference's kind (conformal)."""
        return (1 + self.images - self.nearer) / (1 + self.images)


@dataclass(frozen=True)
class Explanation:
    """What one model said about one radiograph, and where in it that came from."""

    model: Model
    probabilities: np.ndarray  # (K,) float32
    explained: int  # class whose score was explained
    raw_map: np.ndarray  # (h, w) float32, signed
    heatmap: np.ndarray  # (h, w) float32 in [0, 1]
    method: str = "gradcam"  # key in METHODS
    owed: float | None = None  # what the raw map's sum must equal; None where nothing is promised
    remarks: tuple[str, ...] = ()  # what its reader must know beside the map
    findings: tuple[Finding, ...] = ()  # one for each check that applies
    pointing: Pointing | None = None  # where the fracture is known
    passes: int = 0  # forward passes that --verify took
    likeness: Likeness | None = None  # where the network has a reference

    @property
    def similar(self) -> tuple[SimilarCase, ...]:
        return self.likeness.similar if self.likeness else ()

    @property
    def predicted(self) -> int:
        return int(self.probabilities.argmax())

    @property
    def prediction(self) -> str:
        return self.model.class_names[self.predicted]

    @property
    def confidence(self) -> float:
        return float(self.probabilities[self.predicted])

    @property
    def explained_class(self) -> str:
        return self.model.class_names[self.explained]

    def is_right(self, truth: str) -> bool:
        return class_key(self.prediction) == class_key(truth)

    @property
    def sum_error(self) -> float:
        """How far the raw map's sum is from what it owes, as a share of that; 0 where it owes nothing."""
        if self.owed is None:
            return 0.0
        error = abs(float(self.raw_map.sum(dtype=float)) - self.owed)
        rounding = 1e-4 * float(np.abs(self.raw_map).sum())
        return error / max(abs(self.owed), rounding) if error > rounding > 0 else 0.0

    @property
    def negative_share(self) -> float:
        """Share of the raw map's magnitude that speaks against the explained class."""
        magnitude = float(np.abs(self.raw_map).sum())
        return float(np.maximum(-self.raw_map, 0).sum()) / magnitude if magnitude else 0.0

    @property
    def blankness(self) -> str:
        """Why this map has nothing to show; empty where it has."""
        if not self.heatmap.any():
            return f"Blank map: no positive evidence for {self.explained_class}"
        if self.heatmap.min() == self.heatmap.max():
            return "Constant map: no place counts more than another"
        return ""


@dataclass(frozen=True)
class FigureStyle:
    """What the user may choose about figures."""

    colormap: str = "jet"
    dpi: int = 150
    format: str = "png"  # or pdf, svg
    contours: bool = False  # lines of equal heat in place of colours over the radiograph
    signed: bool = False  # evidence for and against, in a diverging colormap


@dataclass(frozen=True)
class Page:
    """A figure to draw: its file, and which of an image's explanations it shows."""

    path: Path
    shows: tuple[int, ...]  # one explanation, or those that are compared


@dataclass(frozen=True)
class Job:
    """One image to explain, and the files that will come of it."""

    image: Path
    label: str  # what table and console call it: the path as given, or the checksum of its content
    pages: tuple[Page, ...]
    maps: tuple[Path, ...]  # a .npy for each explanation; its .json lies beside it
    digest: str  # of the image's content and of all else that its results depend on
    panels: tuple[Path, ...] = ()  # bare pictures: radiograph, then heatmap and overlay for each explanation
    name: str = ""  # what figures and console call it
    truth: Truth = Truth()

    @property
    def outputs(self) -> list[Path]:
        """Every file, in the order of writing: a .json tells that its .npy is whole."""
        notes = [path.with_suffix(".json") for path in self.maps]
        return [page.path for page in self.pages] + [*self.panels, *self.maps, *notes]


@dataclass(frozen=True)
class Result:
    """What became of a job, from the moment its image is read to its row in the table."""

    job: Job
    picture: np.ndarray | None = None  # (H, W, 3) uint8: the radiograph at the size of a panel
    inputs: tuple[np.ndarray, ...] = ()  # (3, size, size) float32 for each model; dropped once explained
    explanations: tuple[Explanation, ...] = ()  # of the first model by each method, then of the second
    notes: tuple[str, ...] = ()
    error: str = ""
    landmarks: Landmarks | None = None
    boxes: tuple[Region, ...] = ()  # the true ones, in shares of the sides

    @property
    def opinions(self) -> list[Explanation]:
        """One explanation of each model, by the first method."""
        return [each for each in self.explanations if each.method == self.explanations[0].method]

    @property
    def wrong(self) -> list[Explanation]:
        """The opinions that contradict the true class."""
        truth = self.job.truth.name
        return [each for each in self.opinions if truth and not each.is_right(truth)]


# Inputs: radiographs ------------------------------------------------------------------------------

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".dcm")
IMAGE_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF")  # what Pillow may decode; never EPS
MAX_PIXELS = 100_000_000  # of one image; the largest radiographs have 25 million
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is larger, and warns before it is reached
HEAD_BYTES = 1024  # enough to tell what a file is
ZIP_DIRECTORY_BYTES = 1_000_000  # holds that of 10,000 tensors
DICOM_DECODERS = "pip install pylibjpeg pylibjpeg-openjpeg pylibjpeg-libjpeg, or export it uncompressed"
COPY_AGAIN = "copy it again from where it came"
MISREAD = {((8,), (2,)): np.int8, ((32,), (1,)): np.uint32}  # by TIFF's bits and sample format
NOTHING_TO_SEE = "every pixel is the same: there is nothing to see"


class FileKind(NamedTuple):
    """What a file is by its first bytes."""

    start: bytes  # regular expression
    what: str
    use: str = ""  # image, dicom, or the container of a checkpoint: zip, pickle, safetensors
    remedy: str = ""  # where another than "give an image" or "give a checkpoint" helps


FILE_KINDS = (  # the first that fits counts
    FileKind(rb".{128}DICM", "a DICOM file", "dicom"),
    FileKind(rb"\x89PNG\r\n", "a PNG image", "image"),
    FileKind(rb"\xff\xd8\xff", "a JPEG image", "image"),
    FileKind(rb"II[*+]\0|MM\0[*+]", "a TIFF image", "image"),
    FileKind(rb"GIF8", "a GIF image", "image"),
    FileKind(rb"RIFF.{4}WEBP", "a WebP image", "image"),
    FileKind(rb"BM", "a BMP image", "image"),
    FileKind(rb"PK\x03\x04", "a zip archive", "zip"),
    FileKind(rb"\x80[\x00-\x05]", "a pickle", "pickle"),  # what torch.save wrote before version 1.6
    FileKind(rb".{3}[\x00-\x05]\0{4}\{", "a safetensors file", "safetensors"),  # length of the header, header
    FileKind(rb"version https://git-lfs", "a Git LFS pointer, not the file", remedy="run git lfs pull"),
    FileKind(rb".{4}ftyp(hei|hev|mif|msf)", "a HEIC image", remedy="convert it to PNG or JPEG"),
    FileKind(rb"%PDF-", "a PDF document", remedy="export its page as PNG"),
    FileKind(rb"\x89HDF\r\n", "an HDF5 file, as of Keras", remedy="networks of PyTorch are explained here"),
    FileKind(rb"[\x02\x08]\0.\0([A-Z]{2}|.{2}\0\0)", "a DICOM file without its preamble", "dicom"),
    FileKind(rb"\Z", "an empty file", remedy=COPY_AGAIN),
    FileKind(rb"[^\x00-\x08\x0e-\x1f]+\Z|\xff\xfe|\xfe\xff", "a text file"),
    FileKind(rb"", "a file of an unknown kind"),
)  # fmt: skip
WANTED = {  # which of the uses count, what they are together, and what to do without one
    "image": (("image", "dicom"), "an image that can be read here", "give a radiograph or convert it to PNG"),
    "checkpoint": (("zip", "pickle", "safetensors"), "a checkpoint", "give one of torch.save or safetensors"),
}  # fmt: skip


def shown(path: Path) -> str:
    """A path as messages name it: relative to the working directory where it lies below that."""
    with contextlib.suppress(ValueError, OSError):  # not below it; or it is gone
        path = Path(os.path.abspath(path)).relative_to(Path.cwd())
    return printable(str(path))


def refusal(path: Path, cause: str, remedy: str) -> ExplainError:
    """How every refusal of a file is worded."""
    return ExplainError(f"{shown(path)}: {cause}; {remedy}")


def lacks_memory(error: BaseException) -> bool:
    """Whether an exception means that; torch and the loader of libraries have words of their own for it."""
    words = ("memory", "failed to map", "start new thread")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong inside into one ExplainError that starts with the path."""
    try:
        with silenced():
            yield
    except ExplainError as error:
        raise ExplainError(f"{shown(path)}: {error}") from error
    except MemoryError as error:
        raise refusal(path, "too large for the memory of this computer", "reduce it") from error
    # On broken files Pillow and pydicom let out nearly every type of exception there is, with
    # texts that may quote the file; so the type is not asked and the text not repeated.
    except Exception as error:
        cause = "damaged, cut short, or of a kind that cannot be read here"
        raise refusal(path, cause, f"{COPY_AGAIN}, or export it as PNG") from error


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keep libraries' warnings and log lines off the terminal; they may quote patient data."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. Raises ExplainError, without the path, where that cannot be done."""
    try:
        if path.exists() and not path.is_file():  # a named pipe would keep the run waiting
            raise ExplainError("a directory or a device, not a file; give one file")
        return open(path, "rb")
    except OSError as error:
        raise ExplainError(f"{str(error.strerror).lower()}; check the path and its permissions") from error


def file_mark(path: Path) -> str:
    """What tells whether a file's content is another one; nothing for one that cannot be read.

    Of a zip archive, which checkpoints are as a rule, its directory at the end is enough: it holds a
    checksum of every part, unless torch was told to write none.
    """
    with contextlib.suppress(ExplainError, OSError), open_regular(path) as file:
        is_zip = file.read(2) == b"PK"
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - ZIP_DIRECTORY_BYTES) if is_zip else 0)
        return f"{length} {hashlib.file_digest(file, 'sha256').hexdigest()}"
    return ""


def kind_of(head: bytes) -> FileKind:
    """What a file is that starts with `head`."""
    return next(kind for kind in FILE_KINDS if re.match(kind.start, head, re.DOTALL))


@contextlib.contextmanager
def opened(path: Path, wanted: str) -> Iterator[tuple[BinaryIO, str]]:
    """A file open for reading, and its use by its first bytes; raises ExplainError unless it is `wanted`."""
    uses, what, remedy = WANTED[wanted]
    with open_regular(path) as file:
        kind = kind_of(file.read(HEAD_BYTES))
        file.seek(0)
        if kind.use not in uses:
            raise ExplainError(f"{kind.what}, not {what}; {kind.remedy or remedy}")
        yield file, kind.use


def check_image_path(path: Path) -> None:
    """Raise ExplainError unless `path` is a file whose first bytes are those of an image."""
    with naming(path), opened(path, "image"):
        pass


def load_radiograph(path: Path) -> Radiograph:
    """Read an image or DICOM file, told by its bytes, into upright 8-bit RGB.

    Transparent pixels are laid over black, the background of radiographs. Of more frames, the first
    counts. Raises ExplainError where the file is not an image that can be decoded whole.
    """
    with naming(path), opened(path, "image") as (file, use):
        pixels, frames, notes = read_dicom(file) if use == "dicom" else read_picture(file)
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    if frames > 1:
        notes = [f"first of {frames} frames", *notes]
    if pixels.min() == pixels.max():
        notes = [*notes, NOTHING_TO_SEE]
    return Radiograph(pixels, tuple(notes))


def check_size(width: int, height: int) -> None:
    """Raise ExplainError for more pixels than a radiograph has, before they are decoded."""
    if width * height > MAX_PIXELS:
        raise ExplainError(f"{width} x {height} pixels, more than {MAX_PIXELS:,} in all; reduce it")


def to_8_bits(values: np.ndarray, left_out: np.ndarray | None = None) -> tuple[np.ndarray, list[str]]:
    """Values of any depth as uint8 of the same shape, with a note on what was done.

    uint8 stays as it is. Of all else the lowest value becomes 0 and the highest 255; unless these lie
    more than twice as far apart as the 1st and the 99th percentile (burned-in markers, dead pixels):
    then these are the ends. Where the mask `left_out` is True, values do not count for the ends.
    Raises ExplainError where none counts, or one that does is NaN or infinite.
    """
    if values.dtype == np.uint8:
        return values, []
    counted = values if left_out is None else values[~left_out]
    if not counted.size or not np.isfinite(counted).all():
        raise ExplainError("NaN or infinite pixel values, or none but padding; export it again")
    lowest, highest = float(counted.min()), float(counted.max())
    if lowest == highest:
        return np.full(values.shape, 127, np.uint8), [f"every value is {lowest:g}: shown as mid grey"]
    low, high = (float(end) for end in np.percentile(counted, (1, 99), method="nearest"))
    if low == high or highest - lowest <= 2 * (high - low):
        return to_grey(values, lowest, highest), [f"values {lowest:g} to {highest:g} scaled to 8 bits"]
    ends = f"values {low:g} to {high:g} scaled to 8 bits"
    return to_grey(values, low, high), [f"{ends}, those beyond clipped ({lowest:g} to {highest:g} in all)"]


def to_grey(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """255 * (values - low) / (high - low), halves rounded to even and clipped to uint8."""
    scaled = (values.astype(np.float64) - low) * 255 / (high - low)
    return np.clip(np.rint(scaled, out=scaled), 0, 255, out=scaled).astype(np.uint8)


def read_picture(file: BinaryIO) -> tuple[np.ndarray, int, list[str]]:
    """The first frame of an image, (H, W) or (H, W, 3) uint8, upright; how many there are; notes."""
    with Image.open(file, formats=IMAGE_FORMATS) as image:
        check_size(*image.size)
        # Pillow has read up to the scan. Without an end mark behind it (a copy that broke off and
        # was filled with zeros), the decoder would invent the rest in grey.
        if image.format == "JPEG" and b"\xff\xd9" not in file.read():
            raise ExplainError(f"cut short; {COPY_AGAIN}")
        tags = dict(getattr(image, "tag_v2", {}))  # of TIFF; gone after loading
        bits, sign = tags.get(258, (8,)), tags.get(339, (1,))
        if tags.get(284) == 2 and max(bits) > 8:  # Pillow mixes their bytes up
            raise ExplainError("16-bit colour in separate planes; save it as PNG")
        frames = getattr(image, "n_frames", 1)
        has_16_bits = any(";16" in str(tile.args) for tile in image.tile)
        image.load()
        upright = ImageOps.exif_transpose(image)
        if tags and (bits, sign) in MISREAD:
            values = np.asarray(upright).view(MISREAD[bits, sign])
        elif upright.mode.startswith(("I", "F")):  # more than 8 bits of grey
            values = np.asarray(upright)
        elif upright.has_transparency_data:  # colour * opacity is what black lets through
            values = np.ascontiguousarray(np.asarray(upright.convert("RGBA").convert("RGBa"))[:, :, :3])
        else:
            values = np.asarray(upright.convert("RGB"))
    if has_16_bits and values.dtype == np.uint8 and values.max() < 64:  # Pillow keeps only the upper 8
        raise ExplainError("16-bit colour that uses only its lower bits; save it as 16-bit grey")
    pixels, notes = to_8_bits(values)
    if tags.get(262) == 0 and values.dtype != np.uint8:  # white is zero; Pillow inverts only 8 bits
        pixels = 255 - pixels
    return pixels, frames, notes


# DICOM


def read_dicom(file: BinaryIO) -> tuple[np.ndarray, int, list[str]]:
    """The first frame of a DICOM file, (H, W) or (H, W, 3) uint8; how many there are; notes."""
    try:
        from pydicom import dcmread, pixels, uid
    except ImportError as error:
        raise ExplainError("a DICOM file, which needs pydicom; pip install pydicom") from error
    dataset = dcmread(file, force=True)  # also without preamble and file meta information
    dataset.file_meta.setdefault("TransferSyntaxUID", uid.ExplicitVRLittleEndian)  # for pixels, as implicit
    if not dataset.dir("PixelData"):  # nor FloatPixelData
        cause = "a DICOM file without an image in it, or cut short"
        raise ExplainError(f"{cause}; give one that holds the radiograph, or {COPY_AGAIN}")
    check_size(dataset.Columns, dataset.Rows)
    try:
        stored = pixels.pixel_array(dataset, index=0)
    except (NotImplementedError, RuntimeError) as error:
        name = dataset.file_meta.TransferSyntaxUID.name
        cause = f"compressed as {name}, and damaged or in need of another decoder"
        raise ExplainError(f"{cause}; {DICOM_DECODERS}") from error
    seen, notes = dicom_grey(dataset, stored) if dataset.SamplesPerPixel == 1 else to_8_bits(stored)
    return seen, int(dataset.get("NumberOfFrames") or 1), notes


def is_no_radiograph(path: Path) -> bool:
    """Whether a file from a folder is none, whatever its name: of macOS, or DICOM without pixels."""
    if path.name.startswith("._") or "__MACOSX" in path.parts:
        return True
    with contextlib.suppress(ExplainError), naming(path), opened(path, "image") as (file, use):
        if use == "dicom":
            import pydicom

            return "Rows" not in pydicom.dcmread(file, force=True, stop_before_pixels=True)
    return False  # what else is wrong with it is said when it is read


def dicom_grey(dataset: Dataset, stored: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Stored values of one sample a pixel as they are meant to be seen: uint8, and notes.

    Modality LUT or rescale, then VOI LUT or first window, then MONOCHROME1 or INVERSE inverted, once
    (PS3.3 C.7.6.3, C.11.1, C.11.2, C.11.6). Without a usable LUT or window the rule of `to_8_bits`.
    Padding, pixels outside the radiograph (C.7.5.1.1.2), is black.
    """
    from pydicom.pixels import apply_color_lut

    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        return to_8_bits(apply_color_lut(stored, dataset))
    values, padding = stored, np.zeros(stored.shape, bool)
    if (value := dataset.get("PixelPaddingValue")) is not None:
        limit = dataset.get("PixelPaddingRangeLimit")
        ends = np.array([value, value if limit is None else limit]).astype(stored.dtype)  # 63536 is -2000
        padding = (stored >= ends.min()) & (stored <= ends.max())
    slope, intercept = first_number(dataset, "RescaleSlope", 1), first_number(dataset, "RescaleIntercept", 0)
    if dataset.get("ModalityLUTSequence"):
        values, *_ = looked_up(dataset.ModalityLUTSequence[0], stored)
    elif (slope, intercept) != (1, 0) or dataset.get("BitsStored", 8) < 8:  # fewer are scaled as more are
        values = stored * slope + intercept
    pixels, notes = windowed(dataset, values) or to_8_bits(values, padding)
    if dataset.PhotometricInterpretation == "MONOCHROME1" or dataset.get("PresentationLUTShape") == "INVERSE":
        pixels = 255 - pixels
    return np.where(padding, np.uint8(0), pixels), notes


def windowed(dataset: Dataset, values: np.ndarray) -> tuple[np.ndarray, list[str]] | None:
    """uint8 through the first VOI LUT, else the first window, and a note; None where it shows nothing.

    Not by pydicom, which cuts indices of 8-bit tables to 8 bits, and raises on windows of width zero.
    """
    if dataset.get("VOILUTSequence"):
        through, low, high = looked_up(dataset.VOILUTSequence[0], values)
        return (to_grey(through, low, high), ["shown through its VOI LUT"]) if low < high else None
    centre, width = first_number(dataset, "WindowCenter", math.nan), first_number(dataset, "WindowWidth", 0)
    notes = [f"shown through its window, centre {centre:g} and width {width:g}"]
    shape = dataset.get("VOILUTFunction") or "LINEAR"
    if shape == "LINEAR":  # PS3.3 C.11.2.1.2.1; the others have neither shift
        centre, width = centre - 0.5, width - 1
    low, high = centre - width / 2, centre + width / 2
    if not (low < high and low < values.max() and high > values.min()):
        return None  # without width or beside all values; or a value is NaN, which to_8_bits refuses
    if shape == "SIGMOID":
        values, low, high = 1 / (1 + np.exp(-4 * (values - centre) / width)), 0, 1
    return to_grey(values, low, high), notes


def looked_up(item: Dataset, values: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Values through a modality or VOI LUT (PS3.3 C.11.1.1), and its lowest and highest entry."""
    entries, first, _ = item.LUTDescriptor
    table = item.LUTData
    if isinstance(table, bytes):
        order = "<" if item.original_encoding[1] else ">"
        table = np.frombuffer(table, np.uint8 if len(table) <= (entries or 65_536) + 1 else f"{order}u2")
    table = np.asarray(table, np.uint16)
    index = np.clip(values.astype(np.int64) - first, 0, len(table) - 1)
    return table[index], int(table.min()), int(table.max())


def first_number(dataset: Dataset, name: str, default: float) -> float:
    """The first of an attribute's values, or the default where it has none."""
    numbers = [number for number in np.ravel(dataset.get(name)) if number is not None]
    return float(numbers[0]) if numbers else float(default)


def network_input(radiograph: Radiograph, preprocessing: Preprocessing) -> np.ndarray:
    """Squash-resize and normalise: (3, size, size) float32.

    Equals torchvision's Resize((size, size)) + ToTensor + Normalize(mean, std).
    """
    squashed = radiograph.squashed(preprocessing.size, preprocessing.interpolation)
    values = squashed.astype(np.float32) / np.float32(255)
    mean, std = np.float32(preprocessing.mean), np.float32(preprocessing.std)
    return np.ascontiguousarray(((values - mean) / std).transpose(2, 0, 1))


# Models -------------------------------------------------------------------------------------------

Contents = dict[Any, Any]  # of a checkpoint file
Weights = dict[str, "torch.Tensor"]  # by the network's keys, or a file's

CHECKPOINT_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".tar", ".safetensors")  # timm's trainer: .pth.tar
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # in a folder beside its config.json
TOP = "the top level"
MODEL_KEYS = ("model_state_dict", "state_dict", "model", "net", TOP)  # where trainers put weights, in order
AVERAGED = {"ema", "swa", "averaged", "average", "avg"}  # words in the names of weights averaged in training
TEACHERS = {"teacher", "momentum", "target"}  # of networks beside the one that is trained
BESIDE = TEACHERS | {"loss", "losses", "criterion", "metric", "metrics"}  # of what is no part of a network
OPS = re.compile(r"(.*\.)?(total_ops|total_params|n_averaged)")  # counters that tools put among the weights
MAX_CLASSES = 100
TAG = r"(?:\.[a-z0-9_]{1,60})?"  # of timm's names: what the weights were trained on

# Where files say something of themselves (also one in another), and under which names
RECORDS = (
    "config", "cfg", "args", "opt", "hyper_parameters", "hparams", "datamodule_hyper_parameters", "meta",
    "metadata", "dataset_meta", "config.json", "pretrained_cfg", "data_config",
)  # fmt: skip
ARCHITECTURES = ("model_name", "arch", "architecture")
NAME_KEYS = (  # lists in the order of the outputs, or dictionaries from name to index or back
    "class_names", "classes", "class_to_idx", "idx_to_class", "id2label", "label2id", "label_names", "labels",
    "names",
)  # fmt: skip
AGAIN = "copy or download the checkpoint again"
PLAIN = "torch.save(model.state_dict(), PATH)"
ZERO = "run the zero_to_fp32.py that lies in its folder"
FOREIGN = (  # by the name of a file, class or key: what it is, and what makes a plain state dict of it
    (r"\b(lora|ia3|hada|lokr|oft|boft|vera)_|\.base_layer\.|adapter_(model|config)|^peft\b",
     "an adapter of PEFT, as LoRA", f"merge it with model = model.merge_and_unload(), then {PLAIN}"),
    (r"^(bf16_)?zero_pp_rank|^ds_(config|version)$|^deepspeed\b|^zero_to_fp32",
     "a part of what DeepSpeed saved", ZERO),
    (r"\.distcp$|^\.metadata$|ShardedTensor|DTensor", "a part of what FSDP saved",
     "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER PATH makes it whole"),
    (r"^fastai\b|^fastcore\b", "a Learner of fastai", "torch.save(learn.model.state_dict(), PATH)"),
    (r"_packed_params|\.zero_point$|\.absmax$|quantize|torchao|bitsandbytes", "a quantised network",
     f"{PLAIN} before it is quantised"),
    (r"\.weight_(orig|mask|[gv])$|\.parametrizations\.", "a pruned or parametrized network",
     f"torch.nn.utils.prune.remove or parametrize.remove_parametrizations, then {PLAIN}"),
    (r"^(pytorch_)?lightning(_fabric)?\b", "objects of Lightning's trainer",
     "torch.save({'state_dict': checkpoint['state_dict']}, PATH)"),
)  # fmt: skip

CONVNEXT = Family(
    key="convnext",
    title="ConvNeXt V2",
    full_size="convnextv2_base.fcmae_ft_in22k_in1k",
    names=re.compile(rf"convnextv2_(atto|femto|pico|nano|tiny|small|base|large|huge){TAG}"),
    sizes={
        (40, 320): "convnextv2_atto", (40, 384): "convnextv2_femto", (40, 512): "convnextv2_pico",
        (46, 640): "convnextv2_nano", (22, 768): "convnextv2_tiny", (40, 768): "convnextv2_small",
        (40, 1536): "convnextv2_large", (40, 2816): "convnextv2_huge",
    },
    landmark="stages.0.blocks.0.mlp.grn.weight",
    stem="stem.0.weight",
    body=("stem.", "stages.", "head.norm."),
    width="stages.3.blocks.0.norm.weight",
    head="head.fc",
    target_layer="stages.3",  # the last stage
    finer_layer="stages.2",
    bullet="🔵",
)  # fmt: skip
EFFICIENTNET = Family(
    key="efficientnet",
    title="EfficientNetV2-{size}",
    full_size="tf_efficientnetv2_s.in21k_ft_in1k",
    names=re.compile(rf"tf_efficientnetv2_(s|m|l|xl|b[0-3]){TAG}"),
    sizes={
        (91, 1280): "tf_efficientnetv2_b0", (111, 1280): "tf_efficientnetv2_b1",
        (116, 1408): "tf_efficientnetv2_b2", (136, 1536): "tf_efficientnetv2_b3",
        (245, 1280): "tf_efficientnetv2_m", (339, 1280): "tf_efficientnetv2_l",
        (438, 1280): "tf_efficientnetv2_xl",
    },
    landmark="conv_stem.weight",
    stem="conv_stem.weight",
    body=("conv_stem.", "bn1.", "blocks.", "conv_head.", "bn2."),
    width="bn2.weight",
    head="classifier",
    target_layer="conv_head",
    finer_layer="blocks.4",
    bullet="🟢",
)  # fmt: skip
FAMILIES = {family.key: family for family in (CONVNEXT, EFFICIENTNET)}


def is_demo(checkpoint: Path) -> bool:
    return checkpoint.name.endswith(DEMO_SUFFIX)


def candidates(family: Family, folder: Path) -> list[Path]:
    """The checkpoints of a family in a folder; demos only where there are no others."""
    named = sorted(folder.glob(f"{family.key}*"))
    found = [path for path in named if path.suffix in CHECKPOINT_SUFFIXES or (path / "config.json").exists()]
    return [path for path in found if not is_demo(path)] or found


def find_checkpoint(family: Family, folder: Path) -> Path:
    """The one candidate of a family in a folder. Raises ExplainError where there is none or more than one."""
    found = candidates(family, folder)
    if len(found) != 1:
        cause = f"needs one {family.key}* checkpoint and holds {listed([path.name for path in found])}"
        raise refusal(folder, cause, f"put or leave one there, or name it with --{family.key}-checkpoint")
    return weights_file(found[0])


def weights_file(path: Path) -> Path:
    """The file of weights that a path names: itself, or the one in a folder. Raises ExplainError without."""
    if not path.is_dir():
        return path
    names = sorted(os.listdir(path))
    check_not_foreign(names, path)
    usual = [name for name in HUB_FILES if name in names][:1]
    found = usual or [name for name in names if name.endswith(CHECKPOINT_SUFFIXES)]
    if len(found) != 1:
        raise refusal(path, f"a folder with {len(found)} files of weights", "name the file")
    return path / found[0]


def brief(value: object) -> str:
    """An untrusted value for a message: short and on one line."""
    is_plain = isinstance(value, (str, int, float))
    return printable(repr(value)[:82]) if is_plain else f"a {type(value).__name__}"


def listed(items: Sequence[str]) -> str:
    """How many, and the first three."""
    first = ", ".join(printable(item[:160]) for item in items[:3])
    more = ", …" if len(items) > 3 else ""
    return f"{len(items)} ({first}{more})" if items else "none"


# Files


def check_checkpoint_path(path: Path) -> None:
    """Raise ExplainError where a file cannot be a checkpoint, as far as can be told without torch."""
    check_not_foreign([path.name], path)
    with naming(path), opened(path, "checkpoint") as (file, use):
        if use == "zip":
            names = set()
            with contextlib.suppress(Exception):  # zipfile lets out more than BadZipFile on damaged archives
                names = {entry.rpartition("/")[2] for entry in zipfile.ZipFile(file).namelist()}
            if "constants.pkl" in names:
                raise ExplainError(f"a TorchScript archive, which holds code; {PLAIN} of the network itself")
            if "data.pkl" not in names:
                cause = "an archive that is damaged, or not of PyTorch but of Keras or another program"
                raise ExplainError(f"{cause}; {AGAIN}, or {WANTED['checkpoint'][2]}")


def check_not_foreign(names: Iterable[str], path: Path) -> None:
    """Raise ExplainError where names of files, classes or keys tell of more than a plain state dict."""
    text = "\n".join(names)
    for pattern, what, remedy in FOREIGN:
        if re.search(pattern, text, re.MULTILINE):
            raise refusal(path, f"holds {what}", remedy)


def read_checkpoint(path: Path) -> Contents:
    """What a checkpoint file holds; no code from it is run. Raises ExplainError where that does not do."""
    check_checkpoint_path(path)
    import torch

    try:
        with silenced(), opened(path, "checkpoint") as (_, use):
            if use == "safetensors":
                return read_safetensors(path)
            with torch.serialization.safe_globals(harmless_types()):
                contents = torch.load(path, map_location="cpu", weights_only=True, mmap=use == "zip")
    except Exception as error:  # torch lets out KeyError, EOFError, UnpicklingError; damaged files anything
        if lacks_memory(error):
            raise
        found = re.search(r"(?<=GLOBAL )[\w.]{1,80}|DTensor", str(error))  # the rest advises to run the code
        if not found:
            cause = f"damaged, or not written by torch.save ({type(error).__name__})"
            raise refusal(path, cause, f"{AGAIN}, or {PLAIN}") from error
        check_not_foreign([found[0]], path)
        cause = f"holds a whole network or another object ({found[0]}), which needs its code; none is run"
        raise refusal(path, cause, f"{PLAIN} where it was trained") from error
    if not isinstance(contents, dict):
        raise refusal(path, f"holds {brief(contents)}, not a dictionary of weights", PLAIN)
    return contents


def harmless_types() -> list[Any]:
    """Types that trainers save beside tensors, some with the name that files know them by; none runs code."""
    types: list[Any] = [np.dtype, np.ndarray, list, dict, int, float, argparse.Namespace]
    types += [datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone]
    types += {type(np.dtype(code)) for code in "?bhilqBHILQefdUO"}
    types.append((lambda *factory: {}, "collections.defaultdict"))
    for core in ("numpy.core.multiarray", "numpy._core.multiarray"):  # before and from NumPy 2
        types.append((lambda kind, content: np.frombuffer(content, kind)[0].item(), f"{core}.scalar"))
        types.append((np.zeros(0).__reduce__()[0], f"{core}._reconstruct"))
    for module in ("pathlib", "pathlib._local"):  # the second is Python 3.13's
        for path in (PurePosixPath, PureWindowsPath):
            types += [(path, f"{module}.{path.__name__}"), (path, f"{module}.{path.__name__[4:]}")]
    return types


def read_safetensors(path: Path) -> Contents:
    """Weights from a .safetensors file, with its metadata (texts; JSON where they are that)."""
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        contents: Contents = dict(file.metadata() or {})
        for key, text in contents.items():
            with contextlib.suppress(ValueError):
                contents[key] = json.loads(text)
        contents[MODEL_KEYS[0]] = {key: file.get_tensor(key) for key in file.keys()}
    return contents


def with_config_beside(family: Family, contents: Contents, path: Path) -> Contents:
    """Contents, and those of a config.json beside the file where it is of this network; it must be JSON."""
    beside = path.with_name("config.json")
    if not beside.is_file():
        return contents
    config = None
    with contextlib.suppress(ValueError):
        config = json.loads(beside.read_bytes())
    if not isinstance(config, dict):
        raise refusal(beside, "not what a hub or Trainer writes", "correct it, or take it away")
    own = str(recorded(contents, *ARCHITECTURES)).partition(".")[0]
    other = str(recorded(config, *ARCHITECTURES)).partition(".")[0]
    belongs = path.name in HUB_FILES or family.names.fullmatch(other)
    return {**contents, "config.json": config} if belongs and own in ("None", other) else contents


def records(contents: Contents) -> list[Contents]:
    """The dictionaries in which a file says something of itself: the whole, and those within."""
    found = [contents]
    for record in found:
        inner = [record.get(name) for name in RECORDS]
        inner = [vars(each) if isinstance(each, argparse.Namespace) else each for each in inner]
        found += [each for each in inner if isinstance(each, dict)]
    return found


def recorded(contents: Contents, *names: str, default: Any = None) -> Any:
    """The first that a checkpoint records under these names."""
    found = (record.get(name) for name in names for record in records(contents))
    return next((value for value in found if str(value) not in ("None", "")), default)


# The network's weights among all else


class Source(NamedTuple):
    """A whole set of a family's weights in a file."""

    place: str  # of the dictionary in the file
    prefix: str  # that wrappers put before the keys (module., model. ...)
    tensors: Weights  # all of the dictionary

    @property
    def name(self) -> str:
        return printable(f"{self.place}, {self.prefix}*" if self.prefix else self.place)

    @property
    def kind(self) -> str:
        """The value of --weights that asks for it."""
        return "ema" if words(self.name) & AVERAGED else "plain"


def words(key: str) -> set[str]:
    return set(re.split(r"[\W_]+", key.lower()))


def dictionaries(inside: Contents, place: str = TOP, levels: int = 4) -> Iterator[tuple[str, Weights]]:
    """Each dictionary in a file, down to the fourth level: its place, and its tensors with text keys."""
    import torch

    tensors = {key: value for key, value in inside.items() if isinstance(value, torch.Tensor)}
    yield place, {key: tensor for key, tensor in tensors.items() if isinstance(key, str)}
    for key, value in inside.items():  # but an optimizer's, whose momenta have the weights' names
        if isinstance(value, dict) and levels > 1 and not str(key).startswith("optim"):
            yield from dictionaries(value, f"{place}.{key}".removeprefix(f"{TOP}."), levels - 1)


def sources(family: Family, contents: Contents) -> list[Source]:
    """Where a file holds weights of a family: wherever its landmark is among the keys."""
    return [
        Source(place, key.removesuffix(family.landmark), tensors)
        for place, tensors in dictionaries(contents)
        for key in tensors
        if f".{key}".endswith(f".{family.landmark}")
    ]


def chosen_source(family: Family, contents: Contents, wanted: str, path: Path) -> tuple[Source, list[str]]:
    """The weights to take, with a note on others. Raises ExplainError for none, or if nothing tells which."""
    found = sources(family, contents)
    if not found:
        raise without_network(family, contents, path)
    trained = [source for source in found if not words(source.name) & TEACHERS] or found
    pool = [source for source in trained if source.kind == wanted] or trained
    usual = [[source for source in pool if source.place == place] for place in MODEL_KEYS]
    taken, *rivals = next(filter(None, usual), pool)
    if rivals:
        cause = f"holds weights more than once ({taken.name} and {rivals[0].name})"
        raise refusal(path, cause, f"save one set alone: {PLAIN}")
    others = [source.name for source in found if source is not taken]
    kinds = {source.kind for source in trained}
    for key, value in contents.items():
        if isinstance(value, dict) and "shadow_params" in value:  # as torch_ema saves them
            others.append(f"{printable(str(key))} without keys")
    note = f"{taken.kind} weights taken from {taken.name}"
    if others:
        note += f", not from {', '.join(others)}"
    if len(kinds) > 1:
        note += f"; --weights {(kinds - {taken.kind}).pop()} takes others"
    return taken, [note] if others or taken.kind == "ema" else []


def without_network(family: Family, contents: Contents, path: Path) -> ExplainError:
    """The refusal of a file that holds no weights of a family, by what it holds instead."""
    for other in FAMILIES.values():
        if sources(other, contents):
            cause = f"holds weights of the {other.key} family (key {other.landmark}), not of {family.key}"
            return refusal(path, cause, f"give it to --{other.key}-checkpoint")
    keys = [key for _, tensors in dictionaries(contents) for key in tensors]
    check_not_foreign(map(str, [*keys, *contents]), path)
    fitting = " or ".join(each.names.pattern.partition("(")[0] + "*" for each in FAMILIES.values())
    cause = f"holds another network, or none: no key {family.landmark} among its {len(keys)} weights"
    return refusal(path, cause, f"give one of timm's {fitting}, saved by {PLAIN}")


def weights_of(family: Family, contents: Contents, wanted: str, path: Path) -> tuple[Weights, list[str]]:
    """The network's tensors by its own keys, and notes. Raises ExplainError where they are not all there."""
    source, notes = chosen_source(family, contents, wanted, path)
    check_not_foreign([*source.tensors, *{type(tensor).__name__ for tensor in source.tensors.values()}], path)
    if not source.tensors[f"{source.prefix}{family.landmark}"].numel():
        raise refusal(path, "holds the places of weights alone, as DeepSpeed saves them", ZERO)
    weight, bias = f"{family.head}.weight", f"{family.head}.bias"
    own = source.prefix.split(".")
    copies = [copy.prefix.split(".") for copy in sources(family, {"": source.tensors})]
    copies = [copy[: len(os.path.commonprefix([own, copy])) + 1] for copy in copies if copy != own]
    starts = tuple(".".join([*copy, ""]) for copy in copies)
    weights, rest = {}, {}
    for name, tensor in source.tensors.items():
        key = name.removeprefix(source.prefix)
        is_own = name.startswith(source.prefix) and key.startswith((*family.body, weight, bias))
        if is_own and not OPS.fullmatch(key):
            weights[key] = tensor
        elif not name.startswith(starts):
            rest[name] = tensor
    if weight not in weights:
        layer = lone_layer(family, source, rest, len(weights.get(family.width, ())), path)
        weights[weight] = rest.pop(f"{layer}.weight")
        weights[bias] = rest.pop(f"{layer}.bias", weights[weight].new_zeros(len(weights[weight])))
        notes.append(f"its linear layer {printable(layer)} taken for {family.head}")
    if rest:
        notes.append(f"left out, as the network is whole without: {listed(list(rest))}")
    return weights, notes


def lone_layer(family: Family, source: Source, rest: Weights, inputs: int, path: Path) -> str:
    """The one linear layer left over for a head. Raises ExplainError where there is none, or others too."""
    beside, averaged = BESIDE - words(source.name), words(source.prefix) & AVERAGED
    layers = {
        key.removesuffix(".weight"): tensor.shape[1:]
        for key, tensor in rest.items()
        if key.endswith(".weight") and not words(key) & beside and words(key) & AVERAGED == averaged
        if tensor.ndim > 1 or tensor.shape == (inputs,)  # other linear layers, convolutions, norms
    }
    if list(layers.values()) != [(inputs,)]:
        cause = f"holds {listed(list(layers))} for {family.head}, not one linear layer of {inputs} inputs"
        remedy = "train one linear layer, or save the network without what is beside it"
        raise refusal(path, cause, f"{remedy}: no other head can be explained here")
    return next(iter(layers))


# What a file says of its network


def architecture_of(family: Family, contents: Contents, weights: Weights, path: Path) -> str:
    """The timm name that is recorded, else the one that shapes tell. Raises ExplainError for other names."""
    name = recorded(contents, *ARCHITECTURES)
    if name is None:
        depth = sum(tensor.ndim == 4 for tensor in weights.values())
        return family.sizes.get((depth, len(weights.get(family.width, ()))), family.full_size)
    if not family.names.fullmatch(str(name)):  # others could send timm to the network
        cause = f"records the network {brief(name)}, which is not of the family of {family.full_size}"
        raise refusal(path, cause, "give it to the option of its own family, or record its timm name")
    return str(name)


def class_names_of(
    contents: Contents, outputs: int, given: Sequence[str] | None, path: Path
) -> tuple[tuple[str, ...], list[str]]:
    """The names of the classes in the order of the outputs, of one output those of both its sides; and notes.
    `given` are the user's. Raises ExplainError where names, head and records do not agree.
    """
    count = max(2, outputs)
    found = class_lists(contents, path)
    lists = {names: key for names, key in found.items() if len(names) == count}
    if given:
        lists.setdefault(usual_names(given), "--class-names")
    lists = lists or found
    orders = {tuple(map(class_key, names)): f"{key} says {', '.join(names)}" for names, key in lists.items()}
    if len(orders) > 1:
        remedy = "leave --class-names out" if given else "correct the file"
        raise refusal(path, f"the order of its classes is unclear: {' and '.join(orders.values())}", remedy)
    names = next(iter(lists), CLASS_NAMES)
    if len(names) != count:
        cause = f"its head has {outputs} outputs for {count} classes, but the class names are {listed(names)}"
        raise refusal(path, cause, "name them with --class-names, or save class_names in the checkpoint")
    notes = [f"one output: its sigmoid is the probability of {names[1]}"] if outputs == 1 else []
    if not lists:
        order = ", ".join(f"{index} = {name}" for index, name in enumerate(names))
        notes.append(f"class order assumed: {order}; --class-names says another")
    return names, notes


def class_lists(contents: Contents, path: Path) -> dict[tuple[str, ...], str]:
    """Orders of the classes that a file tells, and where. Raises ExplainError if class_names is unusable."""
    found = {}
    for record, key in itertools.product(records(contents), NAME_KEYS):
        names = in_order(record.get(key))
        if are_class_names(names):
            if not all(re.fullmatch(r"(label|class)?[_ ]*\d+", name, re.IGNORECASE) for name in names):
                found.setdefault(usual_names(names), key)  # LABEL_0, LABEL_1 say nothing
        elif key == "class_names" and names is not None:  # what the others name may be something else
            cause = f"class_names is {brief(names)}, not a list of 2 to {MAX_CLASSES} different names"
            raise refusal(path, cause, "correct class_names in the checkpoint")
    return found


def in_order(value: object) -> object:
    """Names in the order of the outputs, from a list or from a dictionary of names and indices."""
    if isinstance(value, dict):
        if all(type(index) is int for index in value.values()):  # from name to index
            value = {index: name for name, index in value.items()}
        by_index = {str(index): name for index, name in value.items()}
        return [by_index.get(str(index)) for index in range(len(value))]
    return value.tolist() if isinstance(value, np.ndarray) else value


def usual_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names as they are shown: simple_fracture and simple are Simple Fracture, where no other is that too."""
    meant = {class_key(short): usual for usual in CLASS_NAMES for short in (usual, usual.split()[0])}
    usual = tuple(meant.get(class_key(name), printable(name)) for name in names)
    return usual if len(set(usual)) == len(names) else tuple(map(printable, names))


def are_class_names(value: object) -> bool:
    """Whether these are names that can be told apart by their letters and digits."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        return False
    keys = {class_key(name) for name in value} - {""}
    return 2 <= len(keys) == len(value) <= MAX_CLASSES


def preprocessing_of(contents: Contents, is_grey: bool, path: Path) -> tuple[Preprocessing, list[str]]:
    """How the checkpoint says images are prepared, else as both networks were trained; and notes."""
    interpolation = str(recorded(contents, "interpolation")).lower()
    if interpolation.upper() not in Image.Resampling.__members__:  # none; or random, of timm's trainer
        interpolation = "bilinear"
    mean = channel_values("mean", recorded(contents, "mean", default=IMAGENET_MEAN), 0, path)
    std = channel_values("std", recorded(contents, "std", default=IMAGENET_STD), 0.001, path)
    notes = []
    if is_grey:
        mean, std = (round(sum(mean) / 3, 6),) * 3, (round(sum(std) / 3, 6),) * 3
        notes.append("takes one grey value a pixel: that of the radiograph")
    preprocessing = Preprocessing(side_of(contents, path), mean, std, interpolation)
    if preprocessing != Preprocessing():
        told = f"{preprocessing.size} pixels a side, mean {mean}, std {std}, {interpolation}"
        notes.append(f"preprocessing other than the usual: {told}")
    crop, mode = recorded(contents, "crop_pct"), recorded(contents, "crop_mode")
    if (isinstance(crop, float) and crop < 1) or mode in ("center", "border"):
        notes.append(f"its crop (crop_pct {brief(crop)}) is not made: the whole radiograph is squashed")
    return preprocessing, notes


def side_of(contents: Contents, path: Path) -> int:
    """Pixels a side of the network's input. Raises ExplainError where what is recorded cannot be that."""
    side = recorded(contents, "img_size", "image_size", "input_size", default=INPUT_SIZE)
    if isinstance(side, (list, tuple)) and len(side) in (2, 3) and side[-2] == side[-1]:
        side = side[-1]  # of height and width; timm's has the channels before them
    if type(side) is not int or not 64 <= side <= 1024:
        cause = f"img_size is {brief(side)}, not one number of pixels from 64 to 1024"
        raise refusal(path, cause, "correct img_size in the checkpoint")
    return side


def channel_values(name: str, values: Any, least: float, path: Path) -> tuple[float, ...]:
    """Three numbers, one for each of RGB in [0, 1]; one stands for all. Raises ExplainError for all else."""
    if hasattr(values, "flatten"):  # an array, or a tensor among the weights, of float32
        values = [round(value, 6) if type(value) is float else value for value in values.flatten().tolist()]
    is_list = isinstance(values, (list, tuple)) and len(values) in (1, 3)
    if not is_list or not all(type(value) in (int, float) and least <= value <= 1 for value in values):
        cause = f"{name} is {brief(values)}, not three numbers from {least} to 1 for pixels in [0, 1]"
        raise refusal(path, cause, f"correct {name} in the checkpoint")
    return tuple(float(value) for value in [*values, *values, *values][:3])


def accuracy_text(contents: Contents) -> str:
    """What a checkpoint says about its accuracy, in percent; numbers up to 1 as they are: maybe a share."""
    for key, label in (("test_acc", "Test accuracy"), ("val_acc", "Validation accuracy")):
        value = contents.get(key)
        if getattr(value, "ndim", None) == 0:  # a tensor
            value = value.item()
        if type(value) in (int, float) and 0 <= value <= 100:
            return f"{label}: {value:.2f}%" if value > 1 else f"{label}: {value:.4g} as recorded"
    return "Accuracy: not recorded in the checkpoint"


# Into the network


def in_float32(weights: Weights, path: Path) -> tuple[Weights, list[str]]:
    """The weights as they are computed with. Raises ExplainError where some are NaN or infinite."""
    floats = {key: tensor.detach() for key, tensor in weights.items() if tensor.is_floating_point()}
    ready = {key: tensor.float() for key, tensor in floats.items()}
    # The sum is ten times as fast as isfinite alone, which decides only where a sum overflows.
    bad = [key for key, tensor in ready.items() if not (tensor.sum().isfinite() or tensor.isfinite().all())]
    if bad:
        cause = f"NaN or infinite weights in {listed(bad)}"
        raise refusal(path, cause, "use a checkpoint from before the training diverged")
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in floats.values()} - {"float32"}
    return weights | ready, [f"{kind} weights computed in float32" for kind in sorted(kinds)]


def build_network(architecture: str, outputs: int) -> torch.nn.Module:
    """The timm network without memory for its weights, so without random initialisation."""
    import timm
    import torch

    with torch.device("meta"):
        return timm.create_model(architecture.partition(".")[0], pretrained=False, num_classes=outputs)


def network_of(family: Family, architecture: str, weights: Weights, path: Path) -> torch.nn.Module:
    """The network with these weights, for RGB and 2 or more classes. Raises ExplainError unless they fit."""
    import torch

    if takes_grey(family, weights):  # of RGB, the sum that is its grey (ITU-R 601, as Pillow and torchvision)
        weights[family.stem] = weights[family.stem] * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    if len(weights[f"{family.head}.weight"]) == 1:  # z as -z/2 and z/2: softmax gives sigmoid(z)
        head = [key for key in weights if key.startswith(f"{family.head}.")]
        weights |= {key: torch.cat([-weights[key], weights[key]]) / 2 for key in head}
    network = build_network(architecture, len(weights[f"{family.head}.weight"]))
    expected, held = kinds_of(network.state_dict()), kinds_of(weights)
    faults = [
        f"{key} is {held.get(key, 'missing')} in the file, {expected.get(key, 'missing')} in the network"
        for key in expected | held
        if held.get(key) != expected.get(key) and not key.endswith("num_batches_tracked")
    ]
    if faults:
        cause = f"its {len(held)} weights do not fit the {len(expected)} of {architecture}: {listed(faults)}"
        remedy = "give a file of that network, or set model_name in its config to the timm name of its own"
        raise refusal(path, cause, remedy)
    network.load_state_dict(weights, strict=True, assign=True)  # which makes counters of batches by itself
    return network.eval().requires_grad_(False)


def kinds_of(weights: Weights) -> dict[str, str]:
    """Shape and kind of number of each tensor, in words."""
    return {key: f"{tuple(tensor.shape)} {tensor.dtype}" for key, tensor in weights.items()}


def takes_grey(family: Family, weights: Weights) -> bool:
    return family.stem in weights and weights[family.stem].shape[1:2] == (1,)


def load_classifier(
    family: Family, path: Path, device: str, class_names: Sequence[str] | None = None, weights: str = "ema"
) -> Classifier:
    """Read a checkpoint into a classifier on `device`. Raises ExplainError where it is none of this family.
    `class_names` are for files that record none. `weights`: ema or plain, where both lie in the file.
    """
    path = weights_file(path)
    contents = with_config_beside(family, read_checkpoint(path), path)
    tensors, weight_notes = weights_of(family, contents, weights, path)
    architecture = architecture_of(family, contents, tensors, path)
    outputs = len(tensors[f"{family.head}.weight"])
    names, class_notes = class_names_of(contents, outputs, class_names, path)
    prepared = with_trainers_defaults(contents, architecture)
    preprocessing, preprocessing_notes = preprocessing_of(prepared, takes_grey(family, tensors), path)
    tensors, number_notes = in_float32(tensors, path)
    network = network_of(family, architecture, tensors, path).to(device)
    scale = 2.0 if outputs == 1 else 1.0
    notes = (*weight_notes, *class_notes, *number_notes, *preprocessing_notes)
    model = Model(family, architecture, path, accuracy_text(contents), names, preprocessing, scale, notes)
    return Classifier(model, network)


def with_trainers_defaults(contents: Contents, architecture: str) -> Contents:
    """Contents of timm's trainer with what it prepares images by where its options say nothing."""
    import timm

    if "arch" not in contents or not isinstance(contents.get("args"), argparse.Namespace):
        return contents
    is_known = timm.models.is_model_pretrained(architecture)
    defaults = timm.get_pretrained_cfg(architecture if is_known else architecture.partition(".")[0])
    return {**contents, "pretrained_cfg": vars(defaults)}


def choose_device(wanted: str) -> str:
    """The device to run on. Raises ExplainError where the wanted one is not there."""
    import torch

    present = ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    if torch.cuda.is_available():
        present = ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count())), *present]
    if wanted not in ("auto", *present):
        raise ExplainError(f"--device {wanted}: not available here; use --device {' or '.join(present)}")
    return present[0] if wanted == "auto" else wanted


def use_exact_float32() -> None:
    """The same bytes for the same input: no TF32, no algorithm chosen by a race."""
    import torch

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


# Methods: from one pass of a batch to signed maps -------------------------------------------------

ROUNDING = 8 * float(np.finfo(np.float32).eps)  # relative error of a few float32 operations
DEFAULT_BATCH = {"cpu": 4, "cuda": 32, "mps": 32}  # images; larger ones gain no speed and take memory
BLUR = 12 / 224  # sigma of the reference's blur, in parts of the input's side
CELL = 8  # pixels of the input a side, over which maps of pixels are summed
POINTS = 32  # on the path of Integrated Gradients
PLAYERS = 7  # cells a side of SHAP's grid
COALITIONS = 512  # of those cells, half of them the complements of the others
REFERENCE = "the radiograph, Gaussian-blurred, sigma 12/224 of its side"
SMALL_GAIN = 1.0  # of a score over the reference's, a factor of e in the odds: less is a small difference
MAX_SUM_ERROR = 0.05  # of what a map's sum owes: more is said
WINDOWS = 13  # positions of occlusion's window along a side; it covers 2 x 2 cells of a grid with one more


# Grad-CAM: gradients of a score at a layer, the layer's channels weighted by them, a heatmap


def chosen(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Of logits (N, K) those of one class each: (N,)."""
    return logits.gather(1, classes[:, None])[:, 0]


def layer_gradients(
    network: torch.nn.Module, layer: str, inputs: torch.Tensor, explained: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """One forward pass of inputs (B, 3, S, S), and one backward pass from the class scores to a layer.

    Returns logits (B, K), explained classes (B,), those given or the predicted ones, and the layer's
    activations and gradients (B, C, h, w). Nothing before the layer is recorded: its output starts the graph.
    """
    import torch

    captured: list[torch.Tensor] = []

    def start_graph(module: torch.nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
        captured.append(output.detach().requires_grad_())
        return captured[-1]

    # The hook goes with its handle's context, whatever happens.
    with network.get_submodule(layer).register_forward_hook(start_graph), torch.enable_grad():
        logits = network(inputs)
        (activations,) = captured
        explained = logits.argmax(dim=1) if explained is None else explained
        # Images do not mix in eval mode, so the gradient of the sum holds each image's own.
        (gradients,) = torch.autograd.grad(chosen(logits, explained).sum(), activations)
    return logits.detach(), explained, activations.detach(), gradients


def grad_cam(activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Grad-CAM before the ReLU: (B, C, h, w) twice -> (B, h, w), signed.

    alpha_k = mean over space of the gradients (eq. 1); sum over k of alpha_k A_k (eq. 2).
    """
    return weighted_sum(gradients.mean(dim=(2, 3), keepdim=True), activations)


def weighted_sum(weights: torch.Tensor, activations: torch.Tensor) -> torch.Tensor:
    """Sum over the channels: (B, C, 1, 1) and (B, C, h, w) -> (B, h, w); zero within its rounding error."""
    terms = weights * activations  # (B, C, h, w)
    raw = terms.sum(dim=1)
    rounding = terms.abs().sum(dim=1) * ROUNDING
    return raw.where(raw.abs() > rounding, 0)  # noise must not become a heatmap


def finite(raw_map: np.ndarray) -> np.ndarray:
    """The same map. Raises ValueError where a value is NaN or infinite: no check would flag it."""
    if not np.isfinite(raw_map).all():
        raise ValueError("the map is not finite")
    return raw_map


def normalised(raw_map: np.ndarray) -> np.ndarray:
    """ReLU (eq. 2), then division by the maximum: (h, w) in [0, 1]. A blank map stays blank."""
    positive = np.maximum(finite(raw_map), 0)
    peak = positive.max()
    return positive / peak if peak > 0 else positive


# What every method is given


@dataclass(frozen=True)
class ForwardPass:
    """What a batch's pass through a network gave: all that a method makes its maps of."""

    network: torch.nn.Module
    finer_layer: str  # dotted path
    inputs: torch.Tensor  # (B, 3, S, S)
    logits: torch.Tensor  # (B, K)
    explained: torch.Tensor  # (B,) classes whose scores are explained
    activations: torch.Tensor  # (B, C, h, w) of the target layer
    gradients: torch.Tensor  # (B, C, h, w) d score / d activations
    at_once: int  # inputs that memory has room for in one pass
    likenesses: Sequence[Likeness | None]  # B, to the network's reference images

    @functools.cached_property
    def reference(self) -> torch.Tensor:
        """(B, 3, S, S) the radiographs without detail; black would lie far from all training images."""
        inputs = self.inputs
        kernel = inputs.new_tensor(blur_kernel(inputs.shape[-1], BLUR))
        smooth = kernel @ inputs @ kernel.T
        rounding = 16 * ROUNDING * inputs.abs().amax(dim=(1, 2, 3), keepdim=True)  # of sums over S, twice
        return smooth.where((smooth - inputs).abs() > rounding, inputs)  # a flat image is its own reference

    @functools.cached_property
    def reference_logits(self) -> torch.Tensor:
        """(B, K) logits of the reference."""
        import torch

        with torch.no_grad():
            return self.network(self.reference)

    @property
    def gain(self) -> torch.Tensor:
        """(B,) how much higher the explained classes score on the radiographs than on the reference."""
        differs = (self.inputs != self.reference).flatten(1).any(dim=1)  # else all difference is rounding
        return chosen(self.logits - self.reference_logits, self.explained).where(differs, 0)


def blur_kernel(side: int, sigma: float) -> np.ndarray:
    """(side, side): a Gaussian's weights for each pixel of a line, of those there are; sigma in sides."""
    places = np.arange(side)
    kernel = np.exp(-(((places[:, None] - places) / (sigma * side)) ** 2) / 2)
    return kernel / kernel.sum(axis=1, keepdims=True)


def head_inputs(network: torch.nn.Module, head: str) -> tuple[list[torch.Tensor], Any]:
    """A list that takes the input of the head (B, D) at each pass, and the hook, gone with its context."""
    features: list[torch.Tensor] = []
    layer = network.get_submodule(head)
    return features, layer.register_forward_pre_hook(lambda layer, given: features.append(given[0].detach()))


def forward_pass(
    classifier: Classifier, inputs: torch.Tensor, target: int | None, at_once: int
) -> ForwardPass:
    """What every method needs of a batch; explains class `target`, or each image's predicted class. Raises
    ExplainError where the network's output is not finite.
    """
    import torch

    family, network = classifier.model.family, classifier.network
    # So many inputs of the usual size pass together, and fewer larger ones.
    at_once = min(at_once, max(1, at_once * INPUT_SIZE**2 // inputs[0, 0].numel()))
    wanted = None if target is None else torch.full((len(inputs),), target, device=inputs.device)
    features, hook = head_inputs(network, family.head)
    with hook:
        logits, *rest = layer_gradients(network, family.target_layer, inputs, wanted)
    if not torch.isfinite(logits).all():
        cause = "the network's output is not finite"
        raise refusal(classifier.model.checkpoint, cause, "its weights are damaged")
    likenesses = [None] * len(inputs)
    if classifier.reference:
        likenesses = classifier.reference.likenesses(features[0].cpu().numpy())
    return ForwardPass(network, family.finer_layer, inputs, logits, *rest, at_once, likenesses)


# Other class activation maps


def grad_cam_plus_plus(activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Grad-CAM++ before the ReLU: (B, C, h, w) twice -> (B, h, w), signed.

    alpha = g^2 / (2 g^2 + g^3 sum A) = 1 / (2 + g sum A) (its eq. 19); weights sum(alpha relu(g)).
    A negative sum, which the paper's activations have not, counts as 0: else it could divide by 0.
    """
    positive = gradients.relu()
    totals = activations.sum(dim=(2, 3), keepdim=True).relu()
    return weighted_sum((positive / (2 + positive * totals)).sum(dim=(2, 3), keepdim=True), activations)


def refine_cam(seen: ForwardPass) -> torch.Tensor:
    """RefineCAM: Grad-CAM of two layers, each at the input's size and in [0, 1], multiplied: (B, S, S).

    The finer layer's map has the edges and is often hot elsewhere; the coarse one says what of it
    counts. Enlarged before they are multiplied, neither has the other's steps.
    """
    import torch

    *_, activations, gradients = layer_gradients(seen.network, seen.finer_layer, seen.inputs, seen.explained)
    product = torch.ones_like(seen.inputs[:, 0])
    for raw in (grad_cam(seen.activations, seen.gradients), grad_cam(activations, gradients)):
        heat = raw.relu()[:, None]
        heat = torch.nn.functional.interpolate(heat, seen.inputs.shape[2:], mode="bilinear")[:, 0]
        low, high = heat.amin(dim=(1, 2), keepdim=True), heat.amax(dim=(1, 2), keepdim=True)
        # A constant map takes nothing away.
        product *= ((heat - low) / (high - low)).where(high > low, heat.sign())
    return product


def input_gradients(network: torch.nn.Module, inputs: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """d score / d inputs (N, 3, S, S), of one class (N,) each."""
    import torch

    inputs = inputs.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(chosen(network(inputs), classes).sum(), inputs)[0]


def overlaps(cells: int, others: int) -> np.ndarray:
    """(cells, others): the share of each of `others` equal parts of a length in each of `cells`."""
    ends, other_ends = np.arange(1, cells + 1)[:, None] * others, np.arange(1, others + 1) * cells
    shared = np.minimum(ends, other_ends) - np.maximum(ends - others, other_ends - cells)
    return np.maximum(shared, 0) / cells


def summed_over_cells(maps: torch.Tensor) -> torch.Tensor:
    """Maps of pixels (B, 3, S, S) summed over colours and equal cells, pixels parted at edges: (B, g, g)."""
    maps = maps.cpu().double().sum(dim=1)  # Apple's GPUs have no float64
    size = maps.shape[-1]
    shares = maps.new_tensor(overlaps(round(size / CELL), size))  # g = S / CELL
    return (shares @ maps @ shares.T).float()


def integrated_gradients(seen: ForwardPass) -> torch.Tensor:
    """(x - x') * integral of the gradient from the reference x' to x, by the Gauss-Legendre rule."""
    import torch

    rule = np.stack(np.polynomial.legendre.leggauss(POINTS)) / 2  # nodes and weights on [-1/2, 1/2]
    nodes, weights = seen.inputs.new_tensor(rule).view(2, -1, 1, 1, 1)
    maps = torch.zeros_like(seen.inputs)
    for total, image, reference, explained in zip(maps, seen.inputs, seen.reference, seen.explained):
        for places, shares in zip(nodes.split(seen.at_once), weights.split(seen.at_once)):
            between = reference + (places + 0.5) * (image - reference)
            gradients = input_gradients(seen.network, between, explained.expand(len(between)))
            total += (shares * gradients).sum(dim=0)
        total *= image - reference
    return summed_over_cells(maps)


# Layer-wise relevance propagation: the score made linear


def held(factor: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """A factor of a batch's first images as a constant, the same for the images after them."""
    import torch

    return torch.cat([factor.detach()] * (len(inputs) // len(factor)))


def held_layer_norm(layer: torch.nn.Module, count: int, inputs: torch.Tensor) -> torch.Tensor:
    """LayerNorm over the last axis with the first images' standard deviations."""
    deviations = (inputs[:count].var(dim=-1, unbiased=False, keepdim=True) + layer.eps).sqrt()
    return (inputs - inputs.mean(dim=-1, keepdim=True)) / held(deviations, inputs) * layer.weight + layer.bias


def held_response_norm(layer: torch.nn.Module, count: int, inputs: torch.Tensor) -> torch.Tensor:
    """Global response normalisation with the first images' factors (Woo et al. 2023, eq. 1 to 3)."""
    norms = inputs[:count].norm(dim=layer.spatial_dim, keepdim=True)
    factors = norms / (norms.mean(dim=layer.channel_dim, keepdim=True) + layer.eps)
    weight, bias = layer.weight.view(layer.wb_shape), layer.bias.view(layer.wb_shape)
    return inputs * (1 + weight * held(factors, inputs)) + bias


# Of all layers that multiply: the forward pass, from layer, count of first images and inputs.
HELD_LAYERS: dict[str, Callable[..., torch.Tensor]] = {
    "LayerNorm": held_layer_norm,
    "LayerNorm2d": lambda layer, count, inputs: held_layer_norm(
        layer, count, inputs.permute(0, 2, 3, 1)
    ).permute(0, 3, 1, 2),
    "GlobalResponseNorm": held_response_norm,
    "GELU": lambda layer, count, inputs: inputs * held((1 + (inputs[:count] / 2**0.5).erf()) / 2, inputs),
    "SiLU": lambda layer, count, inputs: inputs * held(inputs[:count].sigmoid(), inputs),
    "Sigmoid": lambda layer, count, inputs: held(inputs[:count].sigmoid(), inputs),  # gates of SqueezeExcite
}
LINEAR_LAYERS = {
    "Conv2d", "Conv2dSame", "Linear", "BatchNorm2d", "AdaptiveAvgPool2d", "AvgPool2d",
    "Identity", "Flatten", "Dropout",
}  # fmt: skip  # in eval mode


@contextlib.contextmanager
def held_factors(network: torch.nn.Module, count: int) -> Iterator[None]:
    """Hold all that multiplies at what a batch's first `count` images make of it.

    The scores are then linear in the inputs (Ali et al. 2022). The layers' own forward comes back
    whatever happens. Raises ExplainError where a later timm builds the network of layers not known.
    """
    layers = [(layer, type(layer).__name__) for layer in network.modules()]
    leaves = {name for layer, name in layers if not list(layer.children())}
    if unknown := ", ".join(sorted(leaves - HELD_LAYERS.keys() - LINEAR_LAYERS)):
        raise ExplainError(f"--method lrp: no rule for {unknown} in this network; choose another method")
    swapped = [(layer, HELD_LAYERS[name]) for layer, name in layers if name in HELD_LAYERS]
    try:
        for layer, forward in swapped:
            layer.forward = functools.partial(forward, layer, count)
        yield
    finally:
        for layer, _ in swapped:
            vars(layer).pop("forward", None)  # the class has its own


def relevance(seen: ForwardPass) -> torch.Tensor:
    """LRP-0: (x - x') times the gradient of the score with all factors held: (B, g, g)."""
    import torch

    gradients = []
    for inputs, classes in zip(seen.inputs.split(seen.at_once), seen.explained.split(seen.at_once)):
        with held_factors(seen.network, len(inputs)):
            gradients.append(input_gradients(seen.network, inputs, classes))
    return summed_over_cells((seen.inputs - seen.reference) * torch.cat(gradients))


def relevance_owed(seen: ForwardPass) -> torch.Tensor:
    """How much lower the explained classes score on the reference with the radiographs' factors: (B,)."""
    import torch

    pairs = torch.stack([seen.inputs, seen.reference], dim=1)  # (B, 2, 3, S, S)
    with torch.no_grad(), held_factors(seen.network, 1):
        scores = [seen.network(pair)[:, explained] for pair, explained in zip(pairs, seen.explained)]
    radiograph_scores, reference_scores = torch.stack(scores).T
    return radiograph_scores - reference_scores


def falls(seen: ForwardPass, kept: torch.Tensor) -> torch.Tensor:
    """How far scores fall where the reference covers all cells but those `kept` (M, g, g): (B, M) float64."""
    import torch

    rows = []
    for image, reference, logits, explained in zip(seen.inputs, seen.reference, seen.logits, seen.explained):
        parts = []
        for some in kept[:, None].float().split(seen.at_once):
            mask = torch.nn.functional.interpolate(some.to(image.device), image.shape[1:]) > 0.5  # any size
            covered = image.where(mask, reference)
            differs = (covered != image).flatten(1).any(dim=1)  # else all difference is rounding
            with torch.no_grad():
                parts.append((logits - seen.network(covered))[:, explained].where(differs, 0))
        rows.append(torch.cat(parts))
    return torch.stack(rows).cpu().double()


def occlusion(seen: ForwardPass) -> torch.Tensor:
    """Mean fall of the score over the windows that cover a cell: (B, g, g), signed."""
    import torch

    covered = torch.zeros(WINDOWS**2, WINDOWS + 1, WINDOWS + 1, dtype=torch.bool)  # (M, g, g)
    for window, (row, column) in zip(covered, itertools.product(range(WINDOWS), repeat=2)):
        window[row : row + 2, column : column + 2] = True
    totals = torch.einsum("bm,mij->bij", falls(seen, ~covered), covered.double())
    return (totals / covered.sum(dim=0)).float()


def coalitions(players: int, count: int) -> np.ndarray:
    """Sets of players (count, players) bool, pairs of complements, drawn with the kernel's chance."""
    generator = np.random.default_rng(0)  # the same for every image, so that maps can be compared
    sizes = np.arange(1, players)
    chances = 1 / (sizes * (players - sizes))  # of a size; within it all sets are alike
    drawn = generator.choice(sizes, count // 2, p=chances / chances.sum())
    ranks = generator.random((count // 2, players)).argsort(axis=1)
    sets = ranks < drawn[:, None]
    return np.concatenate([sets, ~sets])


def shapley_values(sets: np.ndarray, worths: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Least squares for the players' values: sets (M, P) with worths (B, M) -> (B, P) of sum `total` (B,)."""
    sets = sets.astype(float)
    rest = worths - total[:, None] * sets[:, -1]  # the last player has what the others leave
    # Unweighted: the draw follows the kernel already.
    values = np.linalg.lstsq(sets[:, :-1] - sets[:, -1:], rest.T, rcond=None)[0].T
    return np.column_stack([values, total - values.sum(axis=1)])


def kernel_shap(seen: ForwardPass) -> torch.Tensor:
    """Shapley values of the cells of a grid, absent cells covered by the reference: (B, PLAYERS, PLAYERS)."""
    import torch

    sets = coalitions(PLAYERS**2, COALITIONS)
    total = seen.gain.cpu().double().numpy()
    fallen = falls(seen, torch.from_numpy(sets).view(-1, PLAYERS, PLAYERS)).numpy()
    values = shapley_values(sets, total[:, None] - fallen, total)
    return torch.from_numpy(values).float().view(-1, PLAYERS, PLAYERS)


@dataclass(frozen=True)
class Method:
    """One way to tell where the score of a class comes from."""

    key: str  # value of --method, part of the names of files
    title: str
    citation: str
    maps: Callable[[ForwardPass], torch.Tensor]  # signed, (B, h, w)
    passes: int  # inputs that go through the network for one image, the first pass and the proof among them
    owed: Callable[[ForwardPass], torch.Tensor] | None = None  # (B,) what the maps must sum to
    compares: bool = False  # with the reference; its maps then hold evidence against the class as well
    layers: tuple[str, ...] = ()  # of a family, that the maps are made of


METHODS = {
    method.key: method
    for method in (
        Method("gradcam", "Grad-CAM", "Selvaraju et al., ICCV 2017",
            lambda seen: grad_cam(seen.activations, seen.gradients), passes=1, layers=("target_layer",)),
        Method("gradcam++", "Grad-CAM++", "Chattopadhay et al., WACV 2018",
            lambda seen: grad_cam_plus_plus(seen.activations, seen.gradients), 1, layers=("target_layer",)),
        Method("refinecam", "RefineCAM", "Domeniconi et al., arXiv 2605.14641, 2026",
            refine_cam, passes=2, layers=("target_layer", "finer_layer")),
        Method("ig", "Integrated Gradients", "Sundararajan et al., ICML 2017",
            integrated_gradients, passes=2 + POINTS, compares=True, owed=lambda seen: seen.gain),
        Method("shap", "SHAP", "Lundberg & Lee, NeurIPS 2017; Covert & Lee, AISTATS 2021",
            kernel_shap, passes=2 + COALITIONS, compares=True, owed=lambda seen: seen.gain),
        Method("lrp", "LRP", "Bach et al., PLOS ONE 2015; factors held as by Ali et al., ICML 2022",
            relevance, passes=5, compares=True, owed=relevance_owed),
        Method("occlusion", "Occlusion", "Zeiler & Fergus, ECCV 2014",
            occlusion, passes=2 + WINDOWS**2, compares=True),
    )
}  # fmt: skip


def passes_of(keys: Sequence[str]) -> int:
    """Inputs that go through the network for an image; methods share the first and the reference."""
    methods = [METHODS[key] for key in keys]
    own = sum(method.passes - (2 if method.compares else 1) for method in methods)
    return own + (2 if any(method.compares for method in methods) else 1)


def target_index(target_class: str | None, class_names: Sequence[str]) -> int | None:
    """The class of this name or index, else an ExplainError; None stands for the predicted class."""
    if target_class is None:
        return None
    names = [class_key(name) for name in class_names]
    for name in (target_class, *usual_names([target_class])):  # simple is Simple Fracture
        if class_key(name) in names:
            return names.index(class_key(name))
    if target_class.strip() in map(str, range(len(names))):
        return int(target_class)
    choices = ", ".join(f"{index} = {printable(name)}" for index, name in enumerate(class_names))
    asked = f"--target-class {printable(target_class)}"
    raise ExplainError(f"{asked}: not a class of the network; choose {choices}")


def explain_batch(
    classifier: Classifier, inputs: Sequence[np.ndarray], target: int | None = None,
    methods: Sequence[str] = ("gradcam",), at_once: int = DEFAULT_BATCH["cpu"],
) -> list[Explanation]:  # fmt: skip
    """Explain prepared images, each (3, size, size): class `target`, or each one's predicted class.

    Returns one explanation by each method for the first image, then for the second and so on. No
    more inputs than `at_once` pass the network together. Raises ExplainError where the network's
    output or a map is not finite, or memory does not suffice.
    """
    import torch

    try:
        batch = torch.from_numpy(np.stack(inputs)).to(classifier.device)
        seen = forward_pass(classifier, batch, target, at_once)
        by_method = [explanations_of(classifier.model, seen, METHODS[key]) for key in methods]
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        cause = f"not enough memory for a batch of {len(inputs)}"
        raise refusal(classifier.model.checkpoint, cause, "choose a smaller --batch-size") from error
    return [explanation for of_image in zip(*by_method) for explanation in of_image]


def explanations_of(model: Model, seen: ForwardPass, method: Method) -> list[Explanation]:
    """A batch's explanations by one method."""
    raw_maps = model.score_scale * method.maps(seen).cpu().numpy()  # (B, h, w)
    if not np.isfinite(raw_maps).all():
        raise refusal(model.checkpoint, f"the map by {method.title} is not finite", "choose another --method")
    owed = (model.score_scale * method.owed(seen)).tolist() if method.owed else [None] * len(raw_maps)
    probabilities = seen.logits.softmax(dim=1).cpu().numpy()
    of_images = zip(probabilities, seen.explained.tolist(), raw_maps, owed, seen.likenesses)
    explanations = [
        Explanation(model, scores, index, raw_map, normalised(raw_map), method.key, due, likeness=likeness)
        for scores, index, raw_map, due, likeness in of_images
    ]
    if not method.compares:
        return explanations
    said = zip(explanations, seen.reference_logits.softmax(dim=1).cpu().numpy(), seen.gain.tolist())
    return [dataclasses.replace(each, remarks=tuple(method_remarks(each, *rest))) for each, *rest in said]


def method_remarks(explanation: Explanation, reference: np.ndarray, gain: float) -> Iterator[str]:
    """What is to be told of a map, of the reference's probabilities (K,) and of the score's gain on it."""
    name = explanation.model.class_names[reference.argmax()]
    yield f"Compared with the blurred radiograph, which the network calls {name}, {reference.max():.1%}"
    if gain < SMALL_GAIN:
        little = f"{explanation.explained_class} scores {gain:+.2g} on the radiograph against it"
        yield f"{little}: the map explains a small difference"
    if explanation.sum_error > MAX_SUM_ERROR:
        yield sum_remark(explanation)


def sum_remark(explanation: Explanation) -> str:
    return f"The sum of the map by {METHODS[explanation.method].title} is off by {explanation.sum_error:.0%}"


# Checks -------------------------------------------------------------------------------------------

# Everything is measured on one grid for all networks and methods, so that a threshold means the
# same share of the area everywhere. Heat is max(raw map, 0) divided by its sum.

CELLS = 7  # a side of that grid, which is both families' own at 224 pixels
CHECKED_SIDE = 224  # pixels; radiographs are looked at squashed, as networks of that size see them
OUTER = np.pad(np.zeros((CELLS - 2, CELLS - 2), bool), 1, constant_values=True)  # the frame of 24 cells
DENSE_SHARE = 0.02  # of a cell's pixels; with fewer the cell holds nothing as dense as bone
HOT_AREA = 0.25  # of the image

# A marker or annotation is bright, thin, small and sharp. Lengths in pixels of CHECKED_SIDE,
# brightness in shares of the radiograph's range (1st to 99th percentile).
STROKE_REACH, STROKE_CONTRAST = 4, 0.2  # an opening of 9 x 9 takes away strokes of up to 8 pixels
JOINING_REACH = 2  # letters at most 4 pixels apart are one marker
MARKER_PIXELS, MARKER_SIDES = 12, range(6, 50)  # fewer pixels are noise; sides are the longer ones
TEXT_SIDES, TEXT_HEIGHT = range(6, 124), 27  # a line of text may be longer while it is lower than this
TEXT_STROKES, LONGEST_STROKE = 3, 0.6  # of a line three times as long as high; the longest in its lengths
SHARPNESS, SHARPNESS_REACH = 0.13, 2  # mean of |Laplacian| in and round a box; most edges of bone have less

NEAREST = 3  # reference images that are told
AGREEMENT = "map_agreement"  # the check of a pair
CONFIDENCE_LIMIT = 0.95  # the guide's, for clear cases
ERASING_BLUR = 8 / 224  # of the image's side: standard deviation of the Gaussian that erases
ERASED_AREA = 0.2  # of the image, the hottest
ADDED = (("a letter", "L"), ("a line of text", "AP SUPINE"))
ADDED_SIZE = 22  # pixels of CHECKED_SIDE; a network that reads text misses small one
ADDED_EDGE = 8  # pixels of CHECKED_SIDE between what is added and the corner
MOVED_MASKS = 13
MOST_TRIALS = MOVED_MASKS + len(ADDED) + 4  # and the hot area, two covered copies and the blurred one
MAX_OVERLAP = 0.25  # of a moved or mirrored mask with what it was made from
MARKER_MARGIN = 4  # pixels of CHECKED_SIDE round a covered marker

FEW_MAPS = 20  # fewer tell more about chance than about the network


# What a radiograph shows


def landmarks_of(radiograph: Radiograph) -> Landmarks:
    """Look for bone and markers in a radiograph."""
    grey = np.asarray(Image.fromarray(radiograph.squashed(CHECKED_SIDE)).convert("L"))
    # Means of 3 x 3 pixels are compared, or noise in the dark would count.
    smooth = (over_windows(grey.astype(np.uint16), 1, np.add) // 9).astype(np.uint8)
    return Landmarks(shares_of_cells(smooth > otsu_threshold(smooth)), tuple(marker_boxes(grey)))


def over_windows(values: np.ndarray, reach: int, combine: np.ufunc) -> np.ndarray:
    """Combine 2 * reach + 1 values a side round each one of (H, W): np.minimum erodes, np.maximum dilates."""
    for _ in range(2):
        length = len(values)
        padded = np.pad(values, ((reach, reach), (0, 0)), mode="edge")
        shifted = (padded[start : start + length] for start in range(2 * reach + 1))
        values = functools.reduce(combine, shifted).T
    return values


def otsu_threshold(values: np.ndarray) -> int:
    """The uint8 value, itself dark, that best parts dark ones from bright: N. Otsu, IEEE SMC-9, 1979."""
    counts = np.bincount(values.ravel(), minlength=256)
    dark, mass = counts.cumsum(), (counts * np.arange(256)).cumsum()
    pairs = dark * (values.size - dark)  # 0 where one part is empty
    distance = (mass[-1] * (dark / values.size) - mass) ** 2
    between = np.divide(distance, pairs, out=np.zeros(256), where=pairs > 0)
    return int(between.argmax()) if pairs.any() else 255  # values that are all alike are dark


def shares_of_cells(mask: np.ndarray) -> np.ndarray:
    """Share of each cell's pixels that are in a mask (CHECKED_SIDE, CHECKED_SIDE): (CELLS, CELLS)."""
    side = CHECKED_SIDE // CELLS
    return mask.reshape(CELLS, side, CELLS, side).mean(axis=(1, 3))


def marker_boxes(grey: np.ndarray) -> Iterator[PixelBox]:
    """Boxes of what looks like a side marker or text in grey (H, W) uint8; see STROKE_REACH and below.

    Strokes stand out from an opening (white top-hat: J. Serra, Image Analysis, 1982); those close
    together are one marker.
    """
    low, high = np.percentile(grey, (1, 99))
    eroded = over_windows(grey, STROKE_REACH, np.minimum)
    strokes = grey - over_windows(eroded, STROKE_REACH, np.maximum) > STROKE_CONTRAST * (high - low)
    values = grey.astype(np.int16)
    around = values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:]
    edges = np.abs(4 * values[1:-1, 1:-1] - around)  # without the outermost pixels
    for rows, columns in regions(strokes, JOINING_REACH):
        box = int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
        short, long = sorted((box[2] - box[0], box[3] - box[1]))
        is_small = long in MARKER_SIDES or (long in TEXT_SIDES and short < TEXT_HEIGHT)
        x0, y0, x1, y1 = grown(box, SHARPNESS_REACH, SHARPNESS_REACH, CHECKED_SIDE)
        sharpness = edges[y0 : y1 - 2, x0 : x1 - 2].mean()
        if len(rows) < MARKER_PIXELS or not is_small or sharpness < SHARPNESS * (high - low):
            continue
        # Strips that are no text are cortex, pins or the field's edge.
        if long < 3 * short or is_text(rows, columns):
            yield box


def regions(mask: np.ndarray, reach: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Parts of a mask (H, W): rows and columns of the pixels that hang together once dilated by `reach`."""
    joined = over_windows(mask, reach, np.maximum)
    rows, columns = mask.nonzero()
    labels = connected(joined)[mask[joined]]  # of the mask's own pixels
    for label in np.unique(labels):
        yield rows[labels == label], columns[labels == label]


def connected(mask: np.ndarray) -> np.ndarray:
    """For each of a mask's n pixels, row by row, the lowest number among those 8-connected with it."""
    rows, columns = mask.nonzero()
    labels = np.arange(rows.size)
    numbers = np.full(np.add(mask.shape, 2), -1)  # with a rim, so that every pixel has neighbours
    numbers[rows + 1, columns + 1] = labels
    onward = ((1, 2), (2, 0), (2, 1), (2, 2))  # right, and the three below; the other four look back
    second = np.concatenate([numbers[rows + down, columns + right] for down, right in onward])
    first, second = np.tile(labels, len(onward))[second >= 0], second[second >= 0]
    while (labels[first] != labels[second]).any():
        lower = np.minimum(labels[first], labels[second])
        for end in (labels[first], labels[second]):
            np.minimum.at(labels, end, lower)
        labels = labels[labels]  # a label's own, so that each turn reaches about twice as far
    return labels


def is_text(rows: np.ndarray, columns: np.ndarray) -> bool:
    """Whether a region is a line of several strokes, of which none runs on along it."""
    strokes = np.zeros((np.ptp(rows) + 1, np.ptp(columns) + 1), bool)
    strokes[rows - rows.min(), columns - columns.min()] = True
    along = int(np.argmax(strokes.shape))
    lengths = [np.ptp(places[along]) + 1 for places in regions(strokes, 0)]
    return len(lengths) >= TEXT_STROKES and max(lengths) <= LONGEST_STROKE * strokes.shape[along]


def grown(box: Region, x: float, y: float, side: float) -> Region:
    """A box with x more on the left and right, y above and below, cut at the edges of a square image."""
    x0, y0, x1, y1 = box
    return max(0, x0 - x), max(0, y0 - y), min(side, x1 + x), min(side, y1 + y)


def box_mask(boxes: Iterable[PixelBox], side: int) -> np.ndarray:
    """(side, side) bool: the pixels in boxes."""
    mask = np.zeros((side, side), bool)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


# What a map shows


def heat_on_cells(raw_map: np.ndarray) -> np.ndarray:
    """Share of a finite map's heat in each cell, by area: (h, w) -> (CELLS, CELLS); 0 for a blank map."""
    heat = np.maximum(finite(raw_map), 0).astype(np.float64)
    h, w = heat.shape
    return overlaps(CELLS, h) @ (heat / (heat.sum() or 1)) @ overlaps(CELLS, w).T


@dataclass(frozen=True)
class Trial:
    """What a network says of changed copies of a radiograph: class scores before the softmax, (n, K) each."""

    blurred: np.ndarray  # one copy: the whole radiograph blurred
    added: np.ndarray  # len(ADDED): a marker in a corner
    covered: np.ndarray  # two: the markers, and as much elsewhere; none without markers or elsewhere
    erased: np.ndarray  # the map's hot area, then moved masks; none for a map without one

    @property
    def passes(self) -> int:
        return len(self.blurred) + len(self.added) + len(self.covered) + len(self.erased)


@dataclass(frozen=True)
class Evidence:
    """All that a check may look at."""

    explanation: Explanation
    landmarks: Landmarks | None
    trial: Trial | None = None  # with --verify
    other_map: np.ndarray | None = None  # the other model's raw map, for the check of a pair

    @functools.cached_property
    def heat(self) -> np.ndarray:  # (CELLS, CELLS) shares
        return heat_on_cells(self.explanation.raw_map)


# A check measures a quantity and says in words what that means. None: it does not apply.
Said = tuple[float, str]


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def blank(evidence: Evidence) -> Said:
    why = evidence.explanation.blankness
    return (1, why) if why else (0, "the map has a place to judge")


def border(evidence: Evidence) -> Said:
    """Share of the heat in the frame of outer cells; 24/49 for a uniform map."""
    share = float(evidence.heat[OUTER].sum())
    told = f"{percent(share)} of the heat lies in the outer ring of cells"
    return share, f"{told}, which is {percent(OUTER.mean())} of the area; a fracture may lie there"


def dark(evidence: Evidence) -> Said:
    """Share of the heat in cells where less than DENSE_SHARE of the pixels is as dense as bone."""
    share = float(evidence.heat[evidence.landmarks.dense < DENSE_SHARE].sum())
    return share, f"{percent(share)} of the heat lies where nothing as dense as bone is"


def markers(evidence: Evidence) -> Said:
    """Share of the heat in cells that a marker's box touches; 0 where there is no marker."""
    touched = shares_of_cells(box_mask(evidence.landmarks.markers, CHECKED_SIDE)) > 0
    share = float(evidence.heat[touched].sum())
    return share, f"{percent(share)} of the heat lies on cells with a marker or text"


def focus(evidence: Evidence) -> Said:
    """Share of the heat in the hottest HOT_AREA of the image; HOT_AREA itself for a uniform map."""
    hottest = np.sort(evidence.heat, axis=None)[::-1]
    cells = HOT_AREA * hottest.size
    whole = int(cells)
    share = float(hottest[:whole].sum() + (cells - whole) * hottest[whole])
    return share, f"the hottest quarter of the area holds {percent(share)} of the heat"


def shared_heat(one: np.ndarray, other: np.ndarray) -> float:
    """Heat that two maps share, sum of min(a, b) over the cells: M. Swain and D. Ballard, IJCV 1991."""
    return float(np.minimum(heat_on_cells(one), heat_on_cells(other)).sum())


def agreement(evidence: Evidence) -> Said:
    share = shared_heat(evidence.explanation.raw_map, evidence.other_map)
    return share, f"the two maps share {percent(share)} of their heat"


def confidence(evidence: Evidence) -> Said:
    value = evidence.explanation.confidence
    return value, f"confidence {value:.2%}, for clear cases above {percent(CONFIDENCE_LIMIT)}"


def unlike(evidence: Evidence) -> Said:
    """Conformal p-value: of the reference's kind 5 % have less than 5 %. S. Bates et al., Ann. Stat. 2023."""
    likeness = evidence.explanation.likeness
    nearer = f"{likeness.nearer} of the {likeness.images} themselves"
    return likeness.p_value, f"farther from the reference images than {nearer}"


def neighbours(evidence: Evidence) -> Said:
    """Share of the most similar reference images that are of the predicted class."""
    predicted, cases = evidence.explanation.prediction, evidence.explanation.similar
    count = sum(case.class_name == predicted for case in cases)
    return count / len(cases), f"{count} of the {len(cases)} most similar reference images are {predicted}"


# What a network says of changed copies (--verify)


def with_filled(image: np.ndarray, boxes: Iterable[PixelBox]) -> np.ndarray:
    """(C, N, N) with boxes filled: each pixel the mean, by closeness, of the nearest outside on each side."""
    image, end = image.copy(), image.shape[1]
    for x0, y0, x1, y1 in boxes:
        right, down = np.arange(1, x1 - x0 + 1), np.arange(1, y1 - y0 + 1)[:, None]
        sides = (
            (x0 > 0, image[:, y0:y1, x0 - 1 : x0], 1 / right),
            (x1 < end, image[:, y0:y1, x1 : x1 + 1], 1 / right[::-1]),
            (y0 > 0, image[:, y0 - 1 : y0, x0:x1], 1 / down),
            (y1 < end, image[:, y1 : y1 + 1, x0:x1], 1 / down[::-1]),
        )
        there = [(values, weights) for is_there, values, weights in sides if is_there]
        total = sum(weights for _, weights in there)
        image[:, y0:y1, x0:x1] = sum(values * weights for values, weights in there) / total
    return image


def marker_masks(markers: Sequence[PixelBox], side: int) -> list[list[PixelBox]]:
    """Boxes to cover in an image of `side` pixels: the markers with a margin, and as much elsewhere.

    Elsewhere is their mirror image, left-right, up-down or both, that overlaps them least: about
    as far from the centre. Nothing where there are no markers, or some on all sides.
    """
    boxes = [grown(box, MARKER_MARGIN, MARKER_MARGIN, CHECKED_SIDE) for box in markers]
    boxes = [tuple(round(end * side / CHECKED_SIDE) for end in box) for box in boxes]
    mirrored = [
        [(side - x1, y0, side - x0, y1) for x0, y0, x1, y1 in boxes],
        [(x0, side - y1, x1, side - y0) for x0, y0, x1, y1 in boxes],
        [(side - x1, side - y1, side - x0, side - y0) for x0, y0, x1, y1 in boxes],
    ]
    covered = box_mask(boxes, side)
    common = [(covered & box_mask(each, side)).sum() for each in mirrored]
    return [boxes, mirrored[np.argmin(common)]] if min(common) < MAX_OVERLAP * covered.sum() else []


def with_writing(image: np.ndarray, text: str) -> np.ndarray:
    """(3, N, N) with bright writing in its darkest corner."""
    side = image.shape[1]
    font = ImageFont.load_default(max(1, round(ADDED_SIZE * side / CHECKED_SIDE)))
    left, top, right, bottom = map(round, font.getbbox(text))
    plate = Image.new("L", (max(1, right - left), max(1, bottom - top)))
    ImageDraw.Draw(plate).text((-left, -top), text, 255, font)
    ink, edge = np.asarray(plate, np.float32) / 255, round(ADDED_EDGE * side / CHECKED_SIDE)
    ends = [(slice(edge, edge + length), slice(side - edge - length, side - edge)) for length in ink.shape]
    corner = min(itertools.product([slice(None)], *ends), key=lambda each: image[each].mean())
    brightest, image = image.max(axis=(1, 2), keepdims=True), image.copy()
    image[corner] += ink * (brightest - image[corner])
    return image


def enlarged(heatmap: np.ndarray, side: int) -> np.ndarray:
    """A heatmap (h, w) at (side, side): bilinear, cell centres aligned; no heat where no cell has any."""
    return np.asarray(Image.fromarray(heatmap).resize((side, side), Image.Resampling.BILINEAR))


def hot_mask(heatmap: np.ndarray, side: int) -> np.ndarray:
    """(side, side) bool: the hottest ERASED_AREA of the image; less where less has any heat."""
    heat = enlarged(heatmap, side)
    return (heat > 0) & (heat >= np.quantile(heat, 1 - ERASED_AREA))


def moved_masks(mask: np.ndarray) -> list[np.ndarray]:
    """At most MOVED_MASKS shifted and mirrored copies of a mask that hardly overlap it."""
    step = len(mask) // CELLS
    copies = [
        np.roll(mirrored, (step * down, step * across), axis=(0, 1))
        for down, across in np.ndindex(CELLS, CELLS)
        for mirrored in (mask, mask[:, ::-1], mask[::-1], mask[::-1, ::-1])
    ]
    apart = [each for each in copies if (each & mask).sum() < MAX_OVERLAP * mask.sum()]
    places = np.linspace(0, len(apart) - 1, min(MOVED_MASKS, len(apart))).round().astype(int)
    return [apart[index] for index in places]


def tried(
    classifier: Classifier, image: np.ndarray, explanation: Explanation, landmarks: Landmarks, batch_size: int
) -> Trial:
    """Ask the network about changed copies of one input (3, N, N): at most MOST_TRIALS forward passes."""
    import torch

    side = image.shape[1]
    kernel = blur_kernel(side, ERASING_BLUR).astype(np.float32)
    blurred = kernel @ image @ kernel.T
    added = [with_writing(image, text) for _, text in ADDED]
    covered = [with_filled(image, boxes) for boxes in marker_masks(landmarks.markers, side)]
    erased = []
    if not explanation.blankness:
        mask = hot_mask(explanation.heatmap, side)
        erased = [np.where(each, blurred, image) for each in (mask, *moved_masks(mask))]
    copies = [[blurred], added, covered, erased]
    batches = torch.from_numpy(np.stack(list(itertools.chain(*copies)))).split(batch_size)
    with torch.no_grad():
        scores = [classifier.network(batch.to(classifier.device)).cpu().numpy() for batch in batches]
    starts = np.cumsum([len(each) for each in copies])[:-1]
    return Trial(*np.split(np.concatenate(scores).astype(np.float64), starts))


def log_odds(scores: np.ndarray, index: int) -> np.ndarray:
    """log p / (1 - p) of one class from scores (..., K), also where p rounds to 1: (...)."""
    return scores[..., index] - np.logaddexp.reduce(np.delete(scores, index, axis=-1), axis=-1)


def softmax_at(scores: np.ndarray, index: int) -> np.ndarray:
    """Softmax of class scores (..., K) at one class: (...)."""
    return 1 / (1 + np.exp(-log_odds(scores, index)))


def change_text(explanation: Explanation, probability: float) -> str:
    """What became of the predicted class in a changed copy."""
    name, before, after = explanation.prediction, percent(explanation.confidence), percent(probability)
    if after == before:
        return f"leaves {name} at {after}"
    verb = "lowers" if probability < explanation.confidence else "takes"
    return f"{verb} {name} from {before} to {after}"


def covering(evidence: Evidence) -> Said | None:
    """What covering the markers takes from the predicted class, beyond covering as much elsewhere."""
    explanation, count = evidence.explanation, len(evidence.landmarks.markers)
    if not count:
        return None
    if not len(evidence.trial.covered):
        return math.nan, "covering the markers cannot be tested: no place opposite is free of them"
    covered, elsewhere = softmax_at(evidence.trial.covered, explanation.predicted)
    what = "the side marker" if count == 1 else f"{count} markers"
    told = f"covering {what} {change_text(explanation, covered)}; covering as much elsewhere"
    return min(explanation.confidence, elsewhere) - covered, f"{told}, {percent(elsewhere)}"


def adding(evidence: Evidence) -> Said:
    """The most that writing in a corner takes from the predicted class: a marker's absence told it."""
    explanation = evidence.explanation
    probabilities = softmax_at(evidence.trial.added, explanation.predicted)
    what, least = ADDED[probabilities.argmin()][0], float(probabilities.min())
    return explanation.confidence - least, f"{what} set in a corner {change_text(explanation, least)}"


def default(evidence: Evidence) -> Said:
    """Probability of the class that the network gives to the whole radiograph blurred."""
    (scores,) = evidence.trial.blurred
    probability = float(softmax_at(scores, scores.argmax()))
    name = evidence.explanation.model.class_names[scores.argmax()]
    return probability, f"with everything blurred it says {name} at {percent(probability)}"


def erasing(evidence: Evidence) -> Said | None:
    """Share of the moved masks that take at least as much from the explained class as the hot area's does.

    In log-odds, which do not saturate; 0 for a map that found what counts, about 0.5 for one that
    points anywhere. NaN for the class of the blurred radiograph: erasing cannot lower that.
    """
    trial, explained = evidence.trial, evidence.explanation.explained
    name = evidence.explanation.explained_class
    if len(trial.erased) < 2:
        return None
    if trial.blurred.argmax() == explained:
        return math.nan, f"erasing cannot be tested: it says {name} even when everything is blurred"
    hot, *moved = log_odds(trial.erased, explained)
    usual = statistics.median_high(moved)
    left, usually_left = (percent(1 / (1 + np.exp(-odds))) for odds in (hot, usual))
    return float(np.mean(moved <= hot)), (
        f"erasing the hot area leaves {name} at {left}; erasing as much in {len(moved)} other places, "
        f"{usually_left} (log-odds {hot:+.1f} against {usual:+.1f})"
    )


# The table of checks


@dataclass(frozen=True)
class Check:
    """One question asked of every map; a further check is one entry of CHECKS and one function."""

    key: str  # in the table's columns and in JSON; in words where passed checks are listed
    title: str  # the guide's words where it has some
    about: str  # "map", "pair" of maps, "prediction", "reference"; with --verify "verify", "statement"
    ask: Callable[[Evidence], Said | None]
    flags: Callable[[float, float], bool]  # value, limit; False for NaN: it cannot be told
    limit: float


CHECKS = {check.key: check for check in (
    Check("blank", "", "map", blank, operator.gt, 0),  # its text says it
    Check("border", "Attention on image borders", "map", border, operator.gt, 0.5),  # the frame has 24/49
    # Fractures lie in bone; some heat spills into the cells beside it.
    Check("dark", "Attention on irrelevant areas", "map", dark, operator.gt, 0.35),
    # A marker touches 1 to 4 of 49 cells: 0.02 to 0.08 by chance.
    Check("markers", "Focus on text/labels/artifacts", "map", markers, operator.gt, 0.2),
    # Of noise that is positive in half of the cells it is 0.8; of a uniform map 0.25.
    Check("focus", "No clear focal point", "map", focus, operator.lt, 0.8),
    # Equal maps share 1, of parts of one fracture less, of two places next to nothing.
    Check(AGREEMENT, "Models strongly disagree", "pair", agreement, operator.lt, 0.05),
    Check("confidence", "Low confidence overall", "prediction", confidence, operator.lt, CONFIDENCE_LIMIT),
    Check("unlike", "Unlike the reference", "reference", unlike, operator.lt, 0.05),
    Check("neighbours", "Similar cases contradict", "reference", neighbours, operator.lt, 1 / (2 * NEAREST)),
    # Covering as much elsewhere, and writing beside the bone, costs honest networks less.
    Check("covering", "Reads the side marker", "verify", covering, operator.gt, 0.1),
    Check("adding", "Heeds a marker that is added", "verify", adding, operator.gt, 0.1),
    Check("default", "", "statement", default, operator.gt, math.inf),
    # A map that points anywhere has 0.5, give or take 0.3: masks put anywhere mostly do more.
    Check("erasing", "The hot area counts no more than others", "verify", erasing, operator.gt, 0.75),
)}  # fmt: skip
ASKED_AGAIN = ("verify", "statement")  # what --verify asks the network about
MAP_CHECKS = sum(check.about == "map" for check in CHECKS.values())


def finding_of(check: Check, evidence: Evidence) -> Finding | None:
    """What one check says; None where it does not apply."""
    said = check.ask(evidence)
    if said is None:
        return None
    value, text = said
    return Finding(check.key, float(value), bool(check.flags(value, check.limit)), text)


def findings_of(evidence: Evidence) -> tuple[Finding, ...]:
    """What the checks say of one map; of a blank or constant one only that, and what needs no map."""
    skipped = {"pair"}
    if evidence.explanation.blankness:
        skipped.add("map")
    if evidence.explanation.likeness is None:
        skipped.add("reference")
    if evidence.trial is None:
        skipped.update(ASKED_AGAIN)
    asked = (check for check in CHECKS.values() if check.about not in skipped or check.key == "blank")
    return tuple(filter(None, (finding_of(check, evidence) for check in asked)))


def map_agreement(explanations: Sequence[Explanation]) -> Finding | None:
    """How far the maps of two models agree; None where there are no two that have a place to judge."""
    if len(explanations) != 2 or any(each.blankness for each in explanations):
        return None
    first, second = explanations
    return finding_of(CHECKS[AGREEMENT], Evidence(first, None, other_map=second.raw_map))


def flagged_findings(findings: Sequence[Finding], about: str) -> list[Finding]:
    return [each for each in findings if each.is_flagged and CHECKS[each.check].about == about]


def checks_text(findings: Sequence[Finding]) -> str:
    """What the map checks say of one map, as one sentence."""
    found = flagged_findings(findings, "map")
    if not found:
        return f"{MAP_CHECKS} map checks passed"
    return f"{len(found)} of {MAP_CHECKS} map checks flagged: {'; '.join(finding.text for finding in found)}"


def marked_text(finding: Finding) -> str:
    """A finding as a sentence, with a warning where it is flagged."""
    if finding.is_flagged and finding.check == "unlike":  # its words do not say what that means
        return f"⚠️  {CHECKS[finding.check].title}: {finding.text}"
    sentence = finding.text[0].upper() + finding.text[1:]
    return f"⚠️  {sentence}" if finding.is_flagged else sentence


# Over a run


@dataclass(frozen=True)
class Observation:
    """What a run keeps of one map for its audit."""

    explained: str  # class
    heat: np.ndarray  # (CELLS, CELLS) shares; all 0 for a blank map
    has_marker: bool
    values: dict[str, float]  # what each check measured


def observation(explanation: Explanation, landmarks: Landmarks) -> Observation:
    heat = heat_on_cells(explanation.raw_map)
    values = {each.check: each.value for each in explanation.findings}
    return Observation(explanation.explained_class, heat, bool(landmarks.markers), values)


def mean_correlation(heats: np.ndarray) -> float:
    """Mean correlation (Pearson) of the maps of two different images: (n, CELLS, CELLS), none constant."""
    flat = heats.reshape(len(heats), -1)
    standardised = (flat - flat.mean(axis=1, keepdims=True)) / flat.std(axis=1, keepdims=True)
    summed = (standardised.sum(axis=0) ** 2).mean()  # each pair twice, and each map with itself once
    return float((summed - len(heats)) / (len(heats) * (len(heats) - 1)))


def audit_line(text: str, value: float, limit: float, form: Callable[[float], str] = percent) -> str:
    """One quantity of a run, with the guide's flag where it is suspect."""
    if value > limit:
        return f"🚩 {text}: {form(value)}, flagged above {form(limit)}"
    return f"{text}: {form(value)}"


def audit_lines(observations: Sequence[Observation]) -> list[str]:
    """What the maps of one model have in common over a run; of few maps nothing.

    Where most of a class's maps are blank, the network decides for it by what it does not see. The
    others should be hot in different places, as fractures are, and in bone.
    """
    lines = []
    for name in sorted({each.explained for each in observations}):
        blank = [each.values["blank"] for each in observations if each.explained == name]
        if any(blank) and len(blank) >= FEW_MAPS:
            lines.append(audit_line(f"Blank maps for {printable(name)}", np.mean(blank), 0.5))
    placed = [each for each in observations if not each.values["blank"]]
    if len(placed) < FEW_MAPS:
        few = f"Same place in every image: needs {FEW_MAPS} maps that are not blank, here {len(placed)}"
        return [*lines, few] if observations else []
    same = mean_correlation(np.stack([each.heat for each in placed]))
    ((_, most),) = Counter(each.heat.argmax() for each in placed).most_common(1)
    dark = np.mean([each.values["dark"] for each in placed])
    marked = [each.values["markers"] for each in placed if each.has_marker]
    lines += [
        audit_line("Same place in every image, mean correlation of the maps", same, 0.5, "{:.2f}".format),
        audit_line("Same hottest cell", most / len(placed), 0.5),
        audit_line("Mean heat where nothing as dense as bone is", dark, 0.25),
    ]
    if len(marked) >= FEW_MAPS:
        lines.append(audit_line("Mean heat on markers, where there are any", np.mean(marked), 0.1))
    return lines


# Where the fracture is known (--truth)


def pointing(explanation: Explanation, boxes: Sequence[Region]) -> Pointing:
    """The pointing game (J. Zhang et al., ECCV 2016) and the heat inside boxes, in shares of the sides."""
    h, w = explanation.raw_map.shape
    row, column = np.unravel_index(explanation.raw_map.argmax(), (h, w))
    x, y = (column + 0.5) / w, (row + 0.5) / h
    larger = [with_margin(box, h, w) for box in boxes]
    is_inside = any(x0 <= x <= x1 and y0 <= y <= y1 for x0, y0, x1, y1 in larger)
    mask = box_mask([[round(end * CHECKED_SIDE) for end in box] for box in larger], CHECKED_SIDE)
    heat = enlarged(explanation.heatmap, CHECKED_SIDE)
    share = heat[mask].sum() / heat.sum() if heat.any() else 0
    return Pointing(is_inside and not explanation.blankness, float(share), united_area(larger))


def united_area(boxes: Sequence[Region]) -> float:
    """The area of boxes that may overlap, each part of it once."""
    x = np.unique([end for box in boxes for end in box[::2]])
    y = np.unique([end for box in boxes for end in box[1::2]])
    covered = np.zeros((len(y) - 1, len(x) - 1), bool)
    for x0, y0, x1, y1 in boxes:
        covered |= np.outer((y[:-1] >= y0) & (y[1:] <= y1), (x[:-1] >= x0) & (x[1:] <= x1))
    return float(np.outer(np.diff(y), np.diff(x))[covered].sum())


def with_margin(box: Region, h: int, w: int) -> Region:
    """A box in shares of the sides with half a cell of a map (h, w) more: what its maximum can be told by.

    Of finer maps it is half a cell of the checks' grid, so that methods can be compared.
    """
    return grown(box, 0.5 / min(w, CELLS), 0.5 / min(h, CELLS), 1)


def pointing_text(pointed: Pointing) -> str:
    place, mark = ("inside", "") if pointed.is_inside else ("outside", "⚠️  ")
    share = f"{percent(pointed.heat)} of the heat inside, {percent(pointed.area)} of the area"
    return f"{mark}Maximum {place} the true fracture's box; {share}"


# Panels and figures -------------------------------------------------------------------------------

INK, MUTED, TRACK, BAR, FRAME = "#1a1a1a", "#5f5f5f", "#e4e4e4", "#3b6ea5", "#8c8c8c"
WARNING, BADGE = "#a33b00", "#8a4b00"
LEADING, CAPITALS = 1.38 / 72, 0.73 / 72  # inches of a line and of a capital letter for each point of size
MARGIN, GAP = 0.28, 0.14  # inches
HAIRLINE = 0.75  # points
BAR_ROOM = 0.76  # inches for a colour bar, its ticks and its label
SIMILAR_SIDE = 0.8  # inches, the longer side of a similar case's picture
MISSING = "□"  # for a character that no installed font has

# A figure is a sheet: texts, boxes and pictures at places in inches from its top left. matplotlib's
# renderers draw it. Its Figure, Axes and Text would do, but take several times as long.


@functools.cache
def plain_matplotlib() -> Any:
    """matplotlib as it comes, whatever style the user's own settings ask for."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook leaves its own, which may not be importable from here
    with silenced():
        import matplotlib
        from matplotlib import font_manager, path, transforms  # noqa: F401  the first says how long it looks
    lasting = {"pdf.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "explainability"}
    matplotlib.rcParams.update({**matplotlib.rcParamsDefault, **lasting, "text.hinting": "none"})
    return matplotlib


@dataclass(frozen=True)
class Look:
    """How a text looks."""

    points: float
    colour: str = INK
    is_bold: bool = False

    @property
    def leading(self) -> float:
        """Inches from line to line."""
        return self.points * LEADING

    def font(self, text: str) -> Any:
        """What matplotlib must know to draw this text."""
        properties = plain_matplotlib().font_manager.FontProperties
        return properties(fname=font_file(text, self.is_bold), size=self.points)


LARGE, BOLD = Look(15, is_bold=True), Look(10, is_bold=True)
BODY, SMALL = Look(10), Look(8.5)
NAME, FAINT, ALERT = Look(10, MUTED), Look(8.5, MUTED), Look(8.5, WARNING)


@functools.cache
def characters(font: str) -> set[str]:
    """What a font's file can draw; nothing where it cannot be drawn at every size."""
    face = plain_matplotlib().font_manager.get_font(font)
    return set(map(chr, face.get_charmap())) if face.scalable else set()


@functools.lru_cache(maxsize=4096)
def font_file(text: str, is_bold: bool) -> str:
    """The first font that has a whole text, DejaVu Sans, which comes with matplotlib, before others."""
    matplotlib = plain_matplotlib()
    name = "DejaVuSans-Bold.ttf" if is_bold else "DejaVuSans.ttf"
    own = str(Path(matplotlib.get_data_path(), "fonts", "ttf", name))
    if characters(own) >= set(text):
        return own
    upright = {each.fname for each in matplotlib.font_manager.fontManager.ttflist if each.style == "normal"}
    for font in sorted(upright, key=lambda font: (("bold" in font.lower()) != is_bold, font)):
        if "LastResort" not in font and os.path.isfile(font) and characters(font) >= set(text):
            return font  # LastResort has a box for every character
    return own


@functools.lru_cache(maxsize=4096)
def drawable(text: str) -> str:
    """A text in one line of which each character can be drawn; where no font has all, some are boxes."""
    text = re.sub(r"(?<=\d) %", "\u00a0%", printable(text))  # a number and its sign stay on one line
    known = characters(font_file(text, False))
    return "".join(character if character in known else MISSING for character in text)


@functools.cache
def advance(character: str, font: str) -> float:
    """Width of a character in inches for each point of size."""
    matplotlib = plain_matplotlib()
    face, flags = matplotlib.font_manager.get_font(font), matplotlib.ft2font.LoadFlags.NO_SCALE
    return face.load_char(ord(character), flags).horiAdvance / face.units_per_EM / 72


def text_width(text: str, look: Look) -> float:
    """Inches that a line of drawable text takes; kerning is left out."""
    font = font_file(text, look.is_bold)
    return look.points * sum(advance(character, font) for character in text)


def wrapped(text: str, look: Look, inches: float, most: int = 2) -> list[str]:
    """A text in at most so many lines, broken at spaces; a line that is too long keeps both its ends."""
    first, *others = drawable(text).split(" ")
    lines = [first]
    for word in others:
        longer = f"{lines[-1]} {word}"
        if len(lines) == most or text_width(longer, look) <= inches:
            lines[-1] = longer
        else:
            lines.append(word)
    for number, line in enumerate(lines):
        kept = len(line) // 2
        while text_width(lines[number], look) > inches and kept > 1:
            kept -= 1
            lines[number] = f"{line[:kept]}…{line[-kept:]}"
    return lines


# What lies on a sheet. Each draws itself through a renderer, for a page of this height in inches.


@functools.lru_cache(maxsize=1024)  # most lines come again on every page
def text_strip(text: str, look: Look, dpi: float) -> np.ndarray:
    """A line of text on nothing, (6 p, w, 4) uint8: p pixels at its sides, its baseline 2 p up."""
    from matplotlib.backends.backend_agg import RendererAgg

    pad = max(1, round(0.3 * look.points / 72 * dpi))
    renderer = RendererAgg(round(text_width(text, look) * dpi) + 2 * pad, 6 * pad, dpi)
    gc = renderer.new_gc()
    gc.set_foreground(look.colour)
    renderer.draw_text(gc, pad, 4 * pad, text, look.font(text), 0)
    return np.array(renderer.buffer_rgba())


@dataclass(frozen=True)
class Line:
    """A line of text; upright ones are turned left and start at the bottom."""

    x: float
    baseline: float
    text: str
    look: Look
    is_upright: bool

    def draw(self, renderer: Any, dpi: float, height: float) -> None:
        gc, x, y = renderer.new_gc(), self.x * dpi, (height - self.baseline) * dpi
        if not hasattr(renderer, "buffer_rgba"):  # text stays text
            gc.set_foreground(self.look.colour)
            y = self.baseline * dpi if renderer.flipy() else y
            renderer.draw_text(gc, x, y, self.text, self.look.font(self.text), 90 if self.is_upright else 0)
            return
        strip = text_strip(self.text, self.look, dpi)
        pad = len(strip) // 6
        if self.is_upright:
            renderer.draw_image(gc, round(x) - 4 * pad, round(y) - pad, np.rot90(strip)[::-1])
        else:
            renderer.draw_image(gc, round(x) - pad, round(y) - 2 * pad, strip[::-1])


@dataclass(frozen=True)
class Box:
    """A filled rectangle, or its outline where the line has a width."""

    x: float
    y: float
    width: float
    height: float
    colour: str | tuple[float, ...]
    line: float = 0  # points
    dashes: tuple[float, ...] = ()  # points

    def draw(self, renderer: Any, dpi: float, height: float) -> None:
        matplotlib, gc = plain_matplotlib(), renderer.new_gc()
        corner = self.x * dpi, (height - self.y - self.height) * dpi
        gc.set_foreground(self.colour)
        gc.set_linewidth(self.line)
        gc.set_joinstyle("miter")
        gc.set_dashes(0, self.dashes or None)
        place = matplotlib.transforms.Affine2D().scale(self.width * dpi, self.height * dpi).translate(*corner)
        square = matplotlib.path.Path.unit_rectangle()
        renderer.draw_path(gc, square, place, None if self.line else gc.get_rgb())


@dataclass(frozen=True)
class Picture:
    """Pixels, copied to the page as they are, in a thin frame: white borders must not vanish."""

    x: float
    y: float
    pixels: np.ndarray  # (H, W, 3) uint8
    title: str  # written above it; a colour bar has none

    def draw(self, renderer: Any, dpi: float, height: float) -> None:
        rows, columns = self.pixels.shape[:2]
        finer = renderer.get_image_magnification() * dpi  # pixels of a picture for each inch
        left, bottom = round(self.x * finer), round((height - self.y) * finer) - rows
        opaque = np.full((rows, columns, 4), 255, np.uint8)
        opaque[:, :, :3] = self.pixels[::-1]
        renderer.draw_image(renderer.new_gc(), left * dpi / finer, bottom * dpi / finer, opaque)
        hair = HAIRLINE / 2 / 72
        top = height - (bottom + rows) / finer
        size = (columns / finer + 2 * hair, rows / finer + 2 * hair)
        Box(left / finer - hair, top - hair, *size, FRAME, HAIRLINE).draw(renderer, dpi, height)


@dataclass(frozen=True)
class View:
    """What the figures of one image have in common."""

    picture: np.ndarray  # (H, W, 3) uint8: the radiograph at the size of a panel
    name: str
    style: FigureStyle
    boxes: tuple[Region, ...] = ()  # known fractures, in shares of the sides

    @property
    def width(self) -> float:
        """Inches of the picture on the page."""
        return self.picture.shape[1] / self.style.dpi

    @property
    def height(self) -> float:
        return self.picture.shape[0] / self.style.dpi

    @property
    def column(self) -> float:
        """Inches that a panel takes, with room for its title over a narrow picture."""
        return max(self.width, 1.9)


@dataclass
class Sheet:
    """A page as it is filled; lines of text are placed by their top."""

    view: View
    width: float
    height: float = 0
    items: list[Line | Box | Picture] = dataclasses.field(default_factory=list)

    def write(self, x: float, y: float, text: str, look: Look = SMALL) -> None:
        """One line of drawable text."""
        self.items.append(Line(x, y + (LEADING + CAPITALS) / 2 * look.points, text, look, False))

    def wrap(self, x: float, y: float, text: str, width: float, look: Look = SMALL, most: int = 2) -> float:
        """A text in at most so many lines; returns where it ends."""
        for line in wrapped(text, look, width, most):
            self.write(x, y, line, look)
            y += look.leading
        return y

    def frame(self, x: float, y: float, width: float, height: float, colour: Any) -> None:
        """A rectangle of one colour in a thin frame."""
        self.items += [Box(x, y, width, height, colour), Box(x, y, width, height, FRAME, HAIRLINE)]


@functools.cache
def colours_of(style: FigureStyle) -> np.ndarray:
    """The colormap from end to end as (256, 3) uint8; of signed maps blue against, white nothing, red for."""
    colormap = plain_matplotlib().colormaps["RdBu_r" if style.signed else style.colormap]
    return (colormap(np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)


def has_colours(explanation: Explanation, style: FigureStyle) -> bool:
    """Whether there is anything to draw of a map."""
    return bool((explanation.raw_map if style.signed else explanation.heatmap).any())


def resized(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """A map (h, w) in [0, 1] at (height, width): bicubic, cell centres aligned, clipped."""
    image = Image.fromarray(values.astype(np.float32, copy=False))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)


def colour_places(picture: np.ndarray, explanation: Explanation, style: FigureStyle) -> np.ndarray:
    """A map as places on the colour bar, (H, W) of the picture, in [0, 1]; signed, 0.5 is 0."""
    places = explanation.heatmap
    if style.signed:
        places = 0.5 + explanation.raw_map / (2 * np.abs(explanation.raw_map).max() or 1)
    return resized(places, *picture.shape[:2])


def heatmap_pixels(picture: np.ndarray, explanation: Explanation, style: FigureStyle) -> np.ndarray:
    """The map alone in colour, as large as a radiograph (H, W, 3) uint8; plain grey where there is none."""
    if not has_colours(explanation, style):
        return np.full_like(picture, 228)
    return colours_of(style)[(colour_places(picture, explanation, style) * 255).round().astype(np.uint8)]


def overlay_pixels(picture: np.ndarray, explanation: Explanation, style: FigureStyle) -> np.ndarray:
    """The map in colour over a radiograph (H, W, 3) uint8: 60 % where hottest; cold bone stays as it is."""
    places = colour_places(picture, explanation, style)
    if style.contours:
        return with_contours(picture, places, style)
    levels, heat = (places * 255).round().astype(np.uint8), np.arange(256) / 255
    if style.signed:
        heat = np.maximum(np.abs(np.arange(256) - 127.5) - 0.5, 0) / 127
    opacity = (0.6 * 255 * heat).round().astype(np.uint8)
    coloured, mask = Image.fromarray(colours_of(style)[levels]), Image.fromarray(opacity[levels])
    return np.asarray(Image.composite(coloured, Image.fromarray(picture), mask))


def with_contours(picture: np.ndarray, places: np.ndarray, style: FigureStyle) -> np.ndarray:
    """Lines of equal heat over a picture, each on a dark ground that shows on bright bone."""
    levels = (0.25, 0.5, 0.75)  # shares of the heatmap's maximum
    if style.signed:
        levels = (0.125, 0.25, 0.375, 0.625, 0.75, 0.875)  # the same against and for the class
    image, slope = Image.fromarray(picture), np.maximum(np.hypot(*np.gradient(places)), 1e-6)
    half = max(picture.shape) / 220  # of the ground's width, pixels; lines are half as wide
    for reach, is_ground in ((half, True), (half / 2, False)):
        for level in levels:
            inside = reach - np.abs(places - level) / slope  # pixels: a difference over the slope there
            mask = Image.fromarray((255 * (inside + 0.5).clip(0, 1)).astype(np.uint8))
            image.paste((0, 0, 0) if is_ground else tuple(colours_of(style)[round(255 * level)]), mask=mask)
    return np.asarray(image)


def fitted(pixels: np.ndarray, dpi: float) -> np.ndarray:
    """A radiograph (H, W, 3) at the size of a panel: about 19 square inches, but at most 9 inches long."""
    rows, columns = pixels.shape[:2]
    area = 19 * max(1, columns / rows) ** 0.25  # wide ones lose more of the page to their titles
    longest = min(9, math.sqrt(area * max(rows, columns) / min(rows, columns)))
    scale = longest * dpi / max(rows, columns)
    size = max(1, round(columns * scale)), max(1, round(rows * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR, reducing_gap=3))


def title_room(titles: Sequence[str], inches: float) -> float:
    """Inches that the titles of a row of panels need above their pictures."""
    return 0.08 + BODY.leading * max(len(wrapped(title, BODY, inches)) for title in titles)


def draw_picture(sheet: Sheet, x: float, y: float, pixels: np.ndarray, title: str, grid: tuple = ()) -> None:
    """A picture under its title; on a map of this grid known fractures, and thin what counts as inside."""
    view = sheet.view
    top = y - 0.06 - BODY.leading * len(wrapped(title, BODY, view.column))
    sheet.wrap(x, top, title, view.column, BODY)
    sheet.items.append(Picture(x, y, pixels, title))
    dashed, thin = [("black", 2.5), ("white", 1.2, (4, 3))], [("white", HAIRLINE)]
    for box in view.boxes if grid else ():
        for (left, top, right, bottom), lines in ((box, dashed), (with_margin(box, *grid), thin)):
            size = (right - left) * view.width, (bottom - top) * view.height
            sheet.items += [Box(x + left * view.width, y + top * view.height, *size, *line) for line in lines]


def draw_panels(sheet: Sheet, places: list[tuple], titles: tuple, explanation: Explanation, bar: int) -> None:
    """Radiograph, heatmap (or why it is blank) and overlay at their places; the scale beside place `bar`."""
    view, grid, (x, y) = sheet.view, explanation.raw_map.shape, places[1]
    draw_picture(sheet, *places[0], view.picture, titles[0])
    draw_picture(sheet, x, y, heatmap_pixels(view.picture, explanation, view.style), titles[1], grid)
    if explanation.blankness:
        lines = wrapped(explanation.blankness, SMALL, view.column - 0.3, 4)
        width, height = max(text_width(line, SMALL) for line in lines), SMALL.leading * len(lines)
        left, top = x + max(0.1, (view.width - width) / 2), y + max(0, (view.height - height) / 2)
        sheet.frame(left - 0.1, top - 0.08, width + 0.2, height + 0.16, "white")
        sheet.wrap(left, top, explanation.blankness, view.column - 0.3, SMALL, 4)
    draw_picture(sheet, *places[2], overlay_pixels(view.picture, explanation, view.style), titles[2], grid)
    if has_colours(explanation, view.style):
        draw_colour_bar(sheet, *places[bar])


def draw_colour_bar(sheet: Sheet, x: float, y: float) -> None:
    """The scale of the maps beside the picture at this place, its greatest value at the top."""
    height, style = sheet.view.height, sheet.view.style
    x += sheet.view.width + 0.12
    shades = colours_of(style)[np.linspace(255, 0, len(sheet.view.picture)).round().astype(np.uint8)]
    sheet.items.append(Picture(x, y, np.repeat(shades[:, None], round(0.16 * style.dpi), axis=1), ""))
    for place in (0, 0.5, 1):
        value = 2 * place - 1 if style.signed else place
        sheet.write(x + 0.22, y + (1 - place) * height - SMALL.leading / 2, f"{value:g}")
    label = "against    evidence    for" if style.signed else "relative importance"
    length = text_width(label, FAINT)
    if height > length:
        sheet.items.append(Line(x + 0.62, y + (height + length) / 2, label, FAINT, True))


# The details panel: blocks of text, each of which returns where it ends


def prediction_block(sheet: Sheet, x: float, y: float, width: float, explanation: Explanation) -> float:
    """The prediction, a line and a bar for each of the four likeliest classes, and the sum of the others."""
    y = sheet.wrap(x, y - 0.05, explanation.prediction, width, LARGE, 4)
    sheet.write(x, y, f"Confidence: {explanation.confidence:.2%}", BODY)
    y += 0.3
    ranking = (-explanation.probabilities).argsort(kind="stable")
    for index in ranking[:4]:
        look = BOLD if index == explanation.predicted else BODY
        probability = float(explanation.probabilities[index])
        text = f"{probability:.2%}"
        sheet.write(x + width - text_width(text, look), y, text, look)
        y = sheet.wrap(x, y, explanation.model.class_names[index], width - 0.8, look)
        sheet.items += [Box(x, y, width, 0.075, TRACK), Box(x, y, width * probability, 0.075, BAR)]
        y += 0.15
    if len(rest := ranking[4:]):
        together = float(explanation.probabilities[rest].sum())
        y = sheet.wrap(x, y - 0.02, f"and {len(rest)} more, together {together:.2%}", width, FAINT)
    return y + 0.06


def findings_block(sheet: Sheet, x: float, y: float, width: float, explanation: Explanation) -> float:
    """The checks: those flagged first, in words, others in one line, and what only the reader can judge."""
    if not explanation.findings:
        return y
    told, passed = [], []
    for finding in explanation.findings:
        check = CHECKS[finding.check]
        if finding.is_flagged:
            sheet.write(x, y, "⚠", ALERT)
            text = f"{check.title}: {finding.text}" if check.title else finding.text
            y = sheet.wrap(x + 0.2, y, text, width - 0.2, ALERT, 3) + 0.03
        elif check.about in ("map", "prediction"):
            passed.append(check.key.replace("_", " "))
        elif finding.is_measured:
            told.append(marked_text(finding))
    if explanation.pointing:
        told += pointing_text(explanation.pointing).replace("⚠️  ", "⚠ ").split("; ")
    for text in sorted(told, key=lambda text: not text.startswith("⚠")):
        y = sheet.wrap(x, y, text, width, ALERT if text.startswith("⚠") else SMALL, 3)
    if passed:
        y = sheet.wrap(x, y, f"Passed: {', '.join(passed)}", width)
    return sheet.wrap(x, y, "☐ Clinical features match: for the reader to judge", width) + 0.1


def provenance_block(sheet: Sheet, x: float, y: float, width: float, explanation: Explanation) -> float:
    """Where the map came from, and what its reader must know."""
    model, raw = explanation.model, explanation.raw_map
    h, w = raw.shape
    lines = {"Model": model.architecture, "Checkpoint": printable(model.checkpoint.name), "": model.accuracy}
    if explanation.explained != explanation.predicted:
        probability = explanation.probabilities[explanation.explained]
        lines = {"Explained class": f"{probability:.2%} {explanation.explained_class}", **lines}
    if is_demo(model.checkpoint) and model.accuracy.endswith("%"):
        lines[""] += " (synthetic test images)"
    layers = [getattr(model.family, name) for name in METHODS[explanation.method].layers]
    if layers:
        lines["Target layer"] = " and ".join(layers)
    lines["Map"] = f"{h}×{w} grid, interpolated; a cell is 1/{h * w} of the image"
    if len(layers) > 1:
        lines["Map"] = f"{len(layers)} grids, interpolated to {h}×{w} pixels, then multiplied"
    if explanation.heatmap.any():
        relative = "" if sheet.view.style.signed else " (the colours are relative to it)"
        lines["Peak of raw map"] = f"{raw.max():.3g}{relative}"
    if explanation.owed is not None:
        lines["Sum of raw map"] = f"{raw.sum():.3g}, must be {explanation.owed:.3g}"
    if METHODS[explanation.method].compares:
        lines["Negative share"] = f"{explanation.negative_share:.0%} of the map's magnitude"
    for label, value in lines.items():
        sheet.write(x, y, label, FAINT)
        y = sheet.wrap(x + 1.12, y, value, width - 1.12) + 0.01
    for remark in explanation.remarks:
        y = sheet.wrap(x, y + 0.03, remark, width, ALERT, 3)
    return y + 0.1


def draw_similar(sheet: Sheet, x: float, y: float, width: float, explanation: Explanation) -> float:
    """The reference images most like this one, with their true classes; returns where they end."""
    sheet.write(x, y, "Most similar reference images, to the network", FAINT)
    column, top = width / NEAREST, y + 0.22
    below = top + SIMILAR_SIDE + 0.04
    ends = [below]
    for place, case in enumerate(explanation.similar):
        picture = Image.fromarray(case.picture).convert("RGB")
        picture = ImageOps.scale(picture, SIMILAR_SIDE * sheet.view.style.dpi / max(picture.size))
        text = f"{case.class_name}, {case.likeness:.3f}"
        sheet.items.append(Picture(x + place * column, top, np.asarray(picture), text))
        ends.append(sheet.wrap(x + place * column, below, text, column - 0.1))
    return max(ends) + 0.1


def draw_details(sheet: Sheet, x: float, y: float, width: float, explanation: Explanation) -> float:
    """The panel of text, in two columns where it is wide, at whose end stands how to read the colours."""
    inches, style = width if width < 6 else (width - 0.3) / 2, sheet.view.style
    first = prediction_block(sheet, x, y, inches, explanation)
    first = findings_block(sheet, x, first, inches, explanation)
    x, y = (x, first) if inches == width else (x + inches + 0.3, y)
    y = provenance_block(sheet, x, y, inches, explanation)
    if not has_colours(explanation, style):
        return max(first, y)
    sheet.write(x, y, "How to read the heatmap", FAINT)
    y += 0.19
    high, low = "Raised the score of the explained class", "Lowered the score of the explained class"
    if not style.signed:
        high, low = f"High attention: {high.lower()}", "Low attention: counted little or not at all"
    for end, text in ((-1, high), (0, low)):
        sheet.frame(x, y + 0.02, 0.22, 0.13, tuple(colours_of(style)[end] / 255))
        y = max(sheet.wrap(x + 0.32, y, text, inches - 0.32), y + 0.19)
    if style.contours:
        y = sheet.wrap(x, y + 0.01, "Lines: 25, 50 and 75 % of the maximum.", inches)
    y = sheet.wrap(x, y + 0.01, "Good: on the fracture line and the bone around it.", inches)
    y = sheet.wrap(x, y + 0.01, "Red flag: on borders, markers, text, or nowhere in particular.", inches)
    return max(first, y + 0.05)


# Figures


def draw_header(sheet: Sheet, title: str, model: Model) -> float:
    """The title, a tag for demo networks and the file's name; returns where they end."""
    room = sheet.width - 2 * MARGIN
    tag = 0.75 if is_demo(model.checkpoint) else 0
    y = sheet.wrap(MARGIN, 0.16, title, room - tag, LARGE)
    right = MARGIN + 0.15 + text_width(wrapped(title, LARGE, room - tag)[-1], LARGE)
    middle = y - LARGE.leading / 2
    if tag:
        sheet.items.append(Box(right, middle - 0.115, 0.6, 0.23, BADGE))
        sheet.write(right + 0.08, middle - BODY.leading / 2, "DEMO", Look(10, "white", True))
    name, right = drawable(sheet.view.name), right + tag
    if text_width(name, NAME) <= MARGIN + room - right:  # beside the title, else below it
        sheet.write(right, middle - NAME.leading / 2 + 0.03, name, NAME)
        return y + 0.08
    sheet.wrap(MARGIN, y - 0.02, name, room, NAME, 1)
    return y + 0.28


def draw_footer(sheet: Sheet, explanations: Sequence[Explanation], bottom: float) -> Sheet:
    """What stands below every figure; returns the page, which ends there."""
    methods = dict.fromkeys(METHODS[each.method].title for each in explanations)
    verb = "shows" if len(methods) == 1 else "show"
    notes = [f"{', '.join(methods)} {verb} correlation, not cause. Not for diagnosis."]
    if is_demo(explanations[0].model.checkpoint):
        is_pair = len({each.model.family.key for each in explanations}) > 1
        notes = [f"Demo {'networks' if is_pair else 'network'}: {DEMO_NOTICE}."]
    if MISSING in drawable(sheet.view.name):
        notes.insert(0, f"{MISSING}: a character that no font here has")
    if sheet.view.boxes:
        counted = "thin line: as it is counted, with half a cell of the map more"
        notes.insert(0, f"Dashed: the true fracture; {counted}.")
    y = bottom + 0.1
    for note in notes:
        y = sheet.wrap(MARGIN, y, note, sheet.width - 2 * MARGIN, FAINT)
    sheet.height = y + 0.12
    return sheet


def explanation_figure(view: View, explanation: Explanation) -> Sheet:
    """The 4-panel figure: radiograph, heatmap, overlay, prediction details; in one row for long bones."""
    column, model, method = view.column, explanation.model, METHODS[explanation.method].title
    titles = ("Original X-ray", f"{method} Heatmap: {explanation.explained_class}", "Overlay (Model Focus)")
    room = title_room(titles, column)
    right, down = column + GAP, room + view.height + GAP / 2
    offsets, details_width = [(0, 0), (right, 0), (0, down), (right, down)], column + BAR_ROOM - 0.1
    if view.width < 0.6 * view.height:
        third, details_width = 2 * right + BAR_ROOM, 4.1
        offsets = [(0, 0), (right, 0), (third, 0), (third + right, 0)]
    sheet = Sheet(view, offsets[3][0] + details_width + 2 * MARGIN)
    top = draw_header(sheet, f"{method}: {model.title}", model) + room
    *places, (x, y) = ((MARGIN + across, top + below) for across, below in offsets)
    draw_panels(sheet, places, titles, explanation, bar=1)
    end = draw_details(sheet, x, y - room + 0.06, details_width, explanation)
    bottom = places[2][1] + view.height
    if explanation.similar and end + SIMILAR_SIDE + 0.6 <= bottom:
        end = draw_similar(sheet, x, end, details_width, explanation)
    elif explanation.similar:
        bottom = draw_similar(sheet, places[2][0], bottom + 0.12, column, explanation)
    return draw_footer(sheet, [explanation], max(bottom, end))


def agree(explanations: Sequence[Explanation]) -> bool:
    """Whether the models predict the same class, however they spell it."""
    return len({class_key(explanation.prediction) for explanation in explanations}) == 1


def agreement_text(explanations: Sequence[Explanation]) -> str:
    """Whether the models predict the same class, in words."""
    if agree(explanations):
        return f"Both models agree: {explanations[0].prediction}"
    said = (f"{each.model.title} says {each.prediction}" for each in explanations)
    return f"Models disagree: {', '.join(said)}"


def comparison_figure(view: View, explanations: Sequence[Explanation]) -> Sheet:
    """The 6-panel figure: radiograph, heatmap and overlay of each model; do classes agree, and maps."""
    across = [MARGIN + number * (view.column + GAP) for number in range(3)]
    sheet = Sheet(view, across[2] + view.column + BAR_ROOM + 0.1)
    inches = sheet.width - 2 * MARGIN
    title = agreement_text(explanations) if agree(explanations) else "Models disagree"
    y = draw_header(sheet, title, explanations[0].model)
    if overlap := map_agreement(explanations):
        text, look = (f"⚠ {overlap.text}", ALERT) if overlap.is_flagged else (overlap.text, FAINT)
        y = sheet.wrap(MARGIN, y - 0.04, text, inches, look) + 0.06
    for explanation in explanations:
        said = f"{explanation.prediction}, confidence {explanation.confidence:.2%}"
        heading = f"{explanation.model.title}: {said}"
        if explanation.explained != explanation.predicted:
            heading += f" (explained class: {explanation.explained_class})"
        y = sheet.wrap(MARGIN, y, heading, inches, BOLD)
        if flagged := [finding.text for finding in explanation.findings if finding.is_flagged]:
            y = sheet.wrap(MARGIN, y, f"⚠ {'; '.join(flagged)}", inches, ALERT, 5)
        titles = ("Original", f"Heatmap: {explanation.explained_class}", "Overlay")
        y += title_room(titles, view.column)
        draw_panels(sheet, [(x, y) for x in across], titles, explanation, bar=2)
        y += view.height + 0.16
    return draw_footer(sheet, explanations, y - 0.16)


def draw_overlaps(sheet: Sheet, x: float, y: float, explanations: Sequence[Explanation]) -> float:
    """A table of how far each two maps agree, white for 0 to blue for 1; returns where it ends."""
    heading = "Agreement of each two maps: 1 the same places, 0 none in common"
    y = sheet.wrap(x, y, heading, sheet.width - 2 * MARGIN, BODY) + 0.06
    for number, explanation in enumerate(explanations):
        sheet.write(x + 2.35 + number * 0.6, y, str(number + 1), FAINT)
        top = y + 0.22 + 0.28 * number
        sheet.write(x, top + 0.04, f"{number + 1}  {METHODS[explanation.method].title}")
        for place, other in enumerate(explanations):
            share, left = shared_heat(explanation.heatmap, other.heatmap), x + 2.1 + place * 0.6
            sheet.frame(left, top, 0.57, 0.25, tuple(1 - share * (1 - part) for part in (0.23, 0.43, 0.65)))
            text, look = f"{share:.2f}", Look(SMALL.points, "white" if share > 0.6 else INK)
            start = left + (0.57 - text_width(text, look)) / 2
            sheet.write(start, top + (0.25 - SMALL.leading) / 2, text, look)
    return y + 0.22 + 0.28 * len(explanations)


def methods_figure(view: View, explanations: Sequence[Explanation]) -> Sheet:
    """One model's maps by several methods over the same radiograph, and how far they agree."""
    small = ImageOps.scale(Image.fromarray(view.picture), 0.7, Image.Resampling.BILINEAR)
    view, model = dataclasses.replace(view, picture=np.asarray(small)), explanations[0].model
    count = len(explanations) + 1
    rows = math.ceil(count / max(2, round(11 / view.column)))
    columns = math.ceil(count / rows)
    pitch = view.column + GAP
    sheet = Sheet(view, max(2 * MARGIN + columns * pitch + BAR_ROOM, 7))
    methods = [METHODS[each.method] for each in explanations]
    room = title_room([method.title for method in methods], view.column)
    y = draw_header(sheet, f"{model.title}: evidence for {explanations[0].explained_class}", model) + room
    down = room + view.height + 3 * SMALL.leading
    places = [(MARGIN + n % columns * pitch, y + n // columns * down) for n in range(count)]
    draw_picture(sheet, *places[0], view.picture, "Original X-ray")
    for (x, y), method, explanation in zip(places[1:], methods, explanations):
        overlay = overlay_pixels(view.picture, explanation, view.style)
        draw_picture(sheet, x, y, overlay, method.title, explanation.raw_map.shape)
        cost = "1 pass" if method.passes == 1 else f"{method.passes} passes"
        if explanation.owed is not None:
            cost += f"; sum {explanation.raw_map.sum():.3g}, must be {explanation.owed:.3g}"
        end = sheet.wrap(x, y + view.height + 0.05, cost, view.column)
        sheet.wrap(x, end, explanation.blankness, view.column, ALERT, 1)
    draw_colour_bar(sheet, *places[columns - 1])
    end = draw_overlaps(sheet, MARGIN, places[-1][1] + down - room + 0.1, explanations)
    return draw_footer(sheet, explanations, end)


def sheet_pixels(sheet: Sheet, dpi: float) -> np.ndarray:
    """A sheet as pixels (H, W, 3) uint8, on white."""
    from matplotlib.backends.backend_agg import RendererAgg

    renderer = RendererAgg(round(sheet.width * dpi), round(sheet.height * dpi), dpi)
    pixels = np.asarray(renderer.buffer_rgba())
    pixels[:] = 255
    for item in sheet.items:
        item.draw(renderer, dpi, renderer.height / dpi)
    return pixels[:, :, :3]


def png(pixels: np.ndarray, dpi: float, digest: str = "") -> bytes:
    """Pixels (H, W, 3) uint8 as a PNG file, with its resolution and a text chunk named Digest.

    Each row is stored as its difference from the row above (PNG, 2nd edition, section 9.2). Pillow
    tries all five filters on each row, which takes longer than everything else about a page.
    """
    height, width = pixels.shape[:2]
    values = pixels.reshape(height, 3 * width)
    rows = np.full((height, 1 + 3 * width), 2, np.uint8)  # a row begins with the number of its filter
    rows[0, 1:] = values[0]
    np.subtract(values[1:], values[:-1], out=rows[1:, 1:])
    per_metre = round(dpi / 0.0254)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),  # 8 bits, RGB
        (b"pHYs", struct.pack(">IIB", per_metre, per_metre, 1)),
        (b"tEXt", b"Digest\0" + digest.encode("latin-1")),
        (b"IDAT", zlib.compress(rows, level=1)),  # higher ones cost more time than they save space
        (b"IEND", b""),
    )
    ends = (struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    packed = (struct.pack(">I", len(data)) + kind + data + end for (kind, data), end in zip(chunks, ends))
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def figure_bytes(sheet: Sheet, style: FigureStyle, digest: str = "") -> bytes:
    """A sheet as a file that holds a job's digest; in PDF and SVG texts and lines stay such."""
    if style.format == "png":
        return png(sheet_pixels(sheet, style.dpi), style.dpi, digest)
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

    class Items(Artist):
        def draw(self, renderer: Any) -> None:
            for item in sheet.items:
                item.draw(renderer, self.get_figure().dpi, sheet.height)

    figure, file = Figure(figsize=(sheet.width, sheet.height), facecolor="white"), io.BytesIO()
    figure.add_artist(Items())
    told = {"pdf": {"Keywords": digest, "CreationDate": None}, "svg": {"Identifier": digest, "Date": None}}
    figure.savefig(file, format=style.format, dpi=style.dpi, metadata=told[style.format])
    return file.getvalue()


# Truth: what folders and --truth tell of an image -------------------------------------------------

TEST_TRUTH = TEST_IMAGES / "fracture_boxes.csv"  # used by itself for the images beside it
SIDES = ("x0", "y0", "x1", "y1")
TRUTH_COLUMNS = {  # by what a table's header may call them, in any case
    **dict.fromkeys(("file", "filename", "image", "path"), "file"),
    **{"class": "class", "label": "class"},
    **dict(zip((*SIDES, "xmin", "ymin", "xmax", "ymax", "x_min", "y_min", "x_max", "y_max"), SIDES * 3)),
}
NEGATIONS = {"no", "non", "not", "without"}


def words_of(text: str) -> set[str]:
    """Words and numbers in small letters: Simple_Fracture1 and simpleFracture 1 hold the same three."""
    return set(re.findall(r"[^\W\d_]+|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).casefold()))


def short_class(name: str, names: Sequence[str]) -> str:
    """A class's name without the words that every class has, such as Fracture."""
    common = set.intersection(*(set(each.split()) for each in names))
    return " ".join(word for word in name.split() if word not in common) or name


def named_class(text: str, class_names: Sequence[str]) -> str | None:
    """The class that a text names, whole or by words it alone has (simple); None if denied, else nothing."""
    words = words_of(text)
    starts = words | {word[:end] for word in words for end in range(4, len(word))}  # shorter: of too many
    whole = [name for name in class_names if class_key(name) == class_key(text)]
    found = whole or [name for name in class_names if words_of(short_class(name, class_names)) <= starts]
    if len(found) != 1:
        return ""
    return None if not whole and NEGATIONS & (words - words_of(found[0])) else found[0]


def folder_class(image: Path, class_names: Sequence[str]) -> str:
    """The class that the nearest folder above an image names; nothing where none does, or it denies one."""
    named = (named_class(folder.name, class_names) for folder in Path(os.path.abspath(image)).parents)
    return next((name for name in named if name != ""), None) or ""


def known_truth(
    table: Path | None, images: Sequence[Path], is_anonymous: bool
) -> tuple[dict[str, Truth], str, list[str]]:
    """Truth by the real path of the image, of a table or the test images' own; its mark; what to say."""
    path = table or TEST_TRUTH
    ours = (image for image in images if TEST_IMAGES in Path(os.path.realpath(image)).parents)
    if not table and not (path.is_file() and any(ours)):
        return {}, "", []
    truths, missing = read_truth(path, images)
    which = len(missing) if is_anonymous else listed(missing)
    note = f"ℹ️  {shown(path)}: images that are neither beside it nor in this run: {which}"
    return truths, file_mark(path), [note] if missing and table else []


def read_truth(path: Path, images: Sequence[Path]) -> tuple[dict[str, Truth], list[str]]:
    """A table's truths by the real path of the image, and the names of images that are not there.

    Names start from the table's folder, or are those of single images of the run. Several lines for
    an image are several boxes. Raises ExplainError, with the line.
    """
    by_name = defaultdict(list)
    for image in images:
        by_name[image.name].append(image)
    truths, missing = defaultdict(Truth), []
    for number, cells in truth_rows(path):
        image = path.parent / cells["file"].replace("\\", "/")
        found = [image] if os.path.isfile(image) else by_name[image.name]
        if len(found) == 1:
            key = os.path.realpath(found[0])
            truths[key] = extended(truths[key], cells, path, number)
        else:
            missing.append(cells["file"])
    return truths, missing


def truth_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and cells of a table, between commas, semicolons or tabs. Raises ExplainError."""
    with naming(path), open_regular(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except UnicodeDecodeError:  # spreadsheet programs of Windows
        text = content.decode("cp1252", errors="replace")
    lines = text.splitlines() or [""]
    reader = csv.reader(lines, delimiter=max(",;\t", key=lines[0].count), skipinitialspace=True)
    titles = [TRUTH_COLUMNS.get(title.strip().casefold()) for title in next(reader)]
    if "file" not in titles or len({*titles} - {None}) < 2:
        cause = f"its first line is {brief(lines[0])}"
        raise refusal(path, cause, "begin with names of columns: file and any of class, x0, y0, x1, y1")
    try:
        for row in reader:
            cells = defaultdict(str, {title: cell.strip() for title, cell in zip(titles, row) if title})
            if any(cells.values()):
                yield reader.line_num, cells
    except csv.Error as error:
        raise refusal(path, "a cell has no end", "close its quotation mark") from error


def extended(truth: Truth, cells: dict[str, str], path: Path, number: int) -> Truth:
    """What is known of an image with one more line of a table. Raises ExplainError."""
    name, sides = cells["class"] or truth.name, [cells[side] for side in SIDES]
    if truth.name and class_key(name) != class_key(truth.name):
        cause = f"class {brief(name)}, and {brief(truth.name)} on a line before"
        raise refusal(path, f"line {number}: {cause}", "correct it")
    if not any(sides):
        return Truth(name, truth.boxes)
    with contextlib.suppress(ValueError):
        x0, y0, x1, y1 = (float(side.replace(",", ".")) for side in sides)  # 3,5 where semicolons part
        if x0 < x1 and y0 < y1:
            return Truth(name, (*truth.boxes, (x0, y0, x1, y1)))
    cause = f"{', '.join(SIDES)} are {brief(', '.join(sides))}, not numbers with x0 < x1 and y0 < y1"
    raise refusal(path, f"line {number}: {cause}", "correct it")


def told_truth(job: Job, class_names: Sequence[str]) -> tuple[Job, str]:
    """A job that knows its true class, of its table or its folders; and the table's word that is no class."""
    word = job.truth.name
    name = (named_class(word, class_names) or "") if word else folder_class(job.image, class_names)
    if re.fullmatch(r"\d+(\.0)?", word) and float(word) < len(class_names):  # 1.0 where cells are missing
        name = class_names[int(float(word))]
    return dataclasses.replace(job, truth=dataclasses.replace(job.truth, name=name)), "" if name else word


def boxes_in_shares(boxes: Sequence[Region], width: int, height: int) -> tuple[list[Region], list[str]]:
    """Boxes in shares of the image's sides, cut at its edges, and notes on those that reach outside."""
    shares, notes = [], []
    for box in boxes:
        x0, y0, x1, y1 = max(0, box[0]), max(0, box[1]), min(width, box[2]), min(height, box[3])
        if x0 < x1 and y0 < y1:
            shares.append((x0 / width, y0 / height, x1 / width, y1 / height))
        if (x0, y0, x1, y1) != box:
            place = f"the box {', '.join(f'{side:g}' for side in box)} reaches outside"
            notes.append(f"{place} the image of {width} x {height} pixels: only what is inside counts")
    return shares, notes


# Outputs: names and files -------------------------------------------------------------------------

MAX_STEM_BYTES = 210  # file systems allow 255; the rest is for gradcam_efficientnet_, .png and a number
PROBE_BYTES = 4_000_000  # room that an output folder must have: the figures of one image
DIGEST_PLACES = {  # how the digest stands in a whole file
    ".png": re.compile(rb"tEXtDigest\0(\w*).{8}IDAT.*IEND.{4}$", re.DOTALL),
    ".pdf": re.compile(rb"/Keywords \((\w*)\).*%%EOF\s*$", re.DOTALL),
    ".svg": re.compile(rb"<dc:identifier>(\w*)</dc:identifier>.*</svg>\s*$", re.DOTALL),
    ".json": re.compile(rb'"digest": "(\w*)"\s*}$'),
    ".npy": re.compile(rb"\A\x93NUMPY()"),  # has none; its .json, written after it, tells
}


def say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


def warn(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write into ExplainError."""
    try:
        yield
    except OSError as error:
        cause = f"cannot be written ({error.strerror or error})"
        raise refusal(path, cause, "choose another place with --output-dir") from error


def check_output_folder(folder: Path) -> None:
    """Make the output folder and try it. Raises ExplainError where no figure could be written."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(PROBE_BYTES))


def write_file(path: Path, content: bytes) -> None:
    """Write a file, which takes its name once it is whole, also from a link. Raises ExplainError."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with writing(path):
            temporary.write_bytes(content)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def numbered(names: Iterable[str]) -> list[str]:
    """The names, with a number behind each that came before; upper and lower case are one to some systems."""
    told: dict[str, str] = {}  # by their small letters
    for name in names:
        others = (f"{name}_{number}" for number in itertools.count(2))
        free = next(each for each in itertools.chain([name], others) if each.casefold() not in told)
        told[free.casefold()] = free
    return list(told.values())


def with_folders(labels: Sequence[str], names: Sequence[str], between: str) -> list[str]:
    """What images of one run are called: the name of its folder stands before one that others have too."""
    times = Counter(name.casefold() for name in names)
    told = []
    for label, name in zip(labels, names):
        folder = Path(label).absolute().parent.name
        told.append(f"{folder}{between}{name}" if times[name.casefold()] > 1 else name)
    return told


def display_names(labels: Sequence[str]) -> list[str]:
    """What figures, console and report call images."""
    return numbered(with_folders(labels, [Path(label).name for label in labels], "/"))


def output_stems(labels: Sequence[str]) -> list[str]:
    """What the names of each image's outputs end in, no longer than file systems allow."""
    stems = []
    for stem in with_folders(labels, [Path(label).stem for label in labels], "_"):
        encoded = os.fsencode(stem)
        if len(encoded) > MAX_STEM_BYTES:
            kept = encoded[: MAX_STEM_BYTES - 9].decode(errors="ignore")
            stem = f"{kept}_{hashlib.sha256(encoded).hexdigest()[:8]}"
        stems.append(stem)
    return numbered(stems)


def content_label(image: Path) -> str:
    """A name that says nothing about whom the image shows: the start of its content's SHA-256."""
    with contextlib.suppress(ExplainError):
        return file_digest(image)[:8]
    return hashlib.sha256(os.fsencode(image)).hexdigest()[:8]  # what is wrong is said when it is read


def prefix_of(kind: str, method: str, key: str = "") -> str:
    """How the name of an output begins; Grad-CAM, which came first, is not named."""
    return "_".join(filter(None, (kind, "" if method == "gradcam" else method, key)))


def page_prefixes(keys: Sequence[str], methods: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """How the names of an image's figures begin, and which of its explanations each shows."""
    made = list(itertools.product(keys, methods))  # in the order in which they are explained
    pages = {f"{method}_{key}": (index,) for index, (key, method) in enumerate(made)}
    count = len(methods)
    for place, method in enumerate(methods if len(keys) > 1 else ()):
        pages[prefix_of("comparison", method)] = tuple(range(place, len(made), count))
    for place, key in enumerate(keys if count > 1 else ()):
        pages[f"methods_{key}"] = tuple(range(place * count, (place + 1) * count))
    return pages


def digest_of(*parts: object) -> str:
    """A short checksum of values that have a repr of their own."""
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def is_finished(job: Job) -> bool:
    """Whether every file that a job would write is there, whole, and came of the same job."""
    return all(digest_in(path) in (job.digest, "") for path in job.outputs)


def digest_in(path: Path) -> str | None:
    """The digest of the job that wrote a file; "" where it holds none, None where it is not whole."""
    with contextlib.suppress(ExplainError, OSError), open_regular(path) as file:
        found = DIGEST_PLACES[path.suffix].search(file.read())
        return found and found[1].decode()
    return None


# Figures, pictures and maps as files


def page_figure(view: View, explanations: Sequence[Explanation]) -> Sheet:
    """The figure of one explanation, of one method by several models, or of one model by several methods."""
    if len(explanations) == 1:
        return explanation_figure(view, explanations[0])
    if explanations[0].method == explanations[1].method:
        return comparison_figure(view, explanations)
    return methods_figure(view, explanations)


def write_page(result: Result, page: Page, style: FigureStyle) -> None:
    """Draw one figure of a job and write it. Raises ExplainError where it cannot be written."""
    explanations = [result.explanations[index] for index in page.shows]
    view = View(result.picture, result.job.name, style, result.boxes)
    write_file(page.path, figure_bytes(page_figure(view, explanations), style, result.job.digest))


def write_panels(result: Result, style: FigureStyle) -> None:
    """The radiograph, and each model's heatmap and overlay, as bare pictures of the radiograph's own size."""
    pixels = load_radiograph(result.job.image).pixels
    pictures = [pixels]
    for explanation in result.explanations:
        pictures += [heatmap_pixels(pixels, explanation, style), overlay_pixels(pixels, explanation, style)]
    for path, picture in zip(result.job.panels, pictures):
        write_file(path, png(picture, style.dpi, result.job.digest))


def write_maps(result: Result) -> None:
    """Each raw map as .npy (h, w) float32, and beside it as .json what it takes to compute it again."""
    for explanation, path in zip(result.explanations, result.job.maps):
        content = io.BytesIO()
        np.save(content, explanation.raw_map, allow_pickle=False)
        told = json.dumps(provenance(result.job, explanation), indent=2)
        write_file(path, content.getvalue())
        write_file(path.with_suffix(".json"), told.encode())


def case_text(case: SimilarCase) -> str:
    return f"{printable(case.label)} ({case.class_name}, {case.likeness:.3f})"


def provenance(job: Job, explanation: Explanation) -> dict[str, Any]:
    """Everything that a raw map depends on, and what was found about it."""
    model, method, checks = explanation.model, METHODS[explanation.method], {}
    for each in explanation.findings:
        value = each.value if each.is_measured else None  # JSON has no NaN
        checks[each.check] = {"value": value, "flagged": each.is_flagged, "text": each.text}
    return {
        "image": shown(Path(job.label)),
        "image_sha256": file_digest(job.image),
        "checkpoint": shown(model.checkpoint),
        "checkpoint_sha256": file_digest(model.checkpoint),
        "architecture": model.architecture,
        "preprocessing": dataclasses.asdict(model.preprocessing),
        "method": explanation.method,
        "citation": method.citation,
        "target_layer": model.family.target_layer,
        "reference": REFERENCE if method.compares else None,
        "sum": float(explanation.raw_map.sum(dtype=float)),
        "sum_owed": explanation.owed,
        "class_names": model.class_names,
        "explained_class": explanation.explained,
        "probabilities": explanation.probabilities.tolist(),
        "remarks": explanation.remarks,
        "checks": checks,
        "similar": list(map(case_text, explanation.similar)),
        "versions": {name: version(name) for name in LIBRARIES},
        "digest": job.digest,
    }


@functools.lru_cache(maxsize=8)
def file_digest(path: Path) -> str:
    """SHA-256 of a file; checkpoints are read once a run. Raises ExplainError where it has gone."""
    with naming(path), open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Reference: images of the kind that a network is meant for (--reference) --------------------------

FEWEST_OF_CLASS = 50  # images; of fewer, how far is far cannot be told
MOST_OF_CLASS = 500  # of more, so many are taken, evenly over their sorted names
FOLDS = 5  # an image is measured by statistics of the other folds' images alone
SHRINKAGE = 0.1  # of the covariance towards its mean variance
SAME_IMAGE = 1 - 1e-5  # likeness of an image and itself, in half precision
THUMBNAIL = (72, 72)  # pixels, kept as JPEG


def mahalanobis(known: np.ndarray, classes: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """What gives the squared distances of features (B, D) to the nearest class's mean: (B,).

    K. Lee et al., NeurIPS 2018. The covariance, (1 - a) X'X / m + a v I of centred features X (m, D)
    with mean variance v, is inverted by way of XX' (Woodbury): there are fewer images than features.
    """
    names, of_class = np.unique(classes, return_inverse=True)
    means = np.stack([known[classes == each].mean(axis=0) for each in names])  # (K, D)
    centred = known - means[of_class]
    least = SHRINKAGE * float((centred**2).mean())  # a v
    ridge = len(centred) * least / (1 - SHRINKAGE)
    inverse = np.linalg.inv(centred @ centred.T + ridge * np.eye(len(centred)))

    def distances(features: np.ndarray) -> np.ndarray:
        away = features - means[:, None]  # (K, B, D)
        along = away @ centred.T
        explained = ((along @ inverse) * along).sum(axis=-1)
        return (((away**2).sum(axis=-1) - explained) / least).min(axis=0)

    return distances


@dataclass(frozen=True)
class Reference:
    """Images that a network is meant for, as its features show them."""

    features: np.ndarray  # (n, D) float16
    classes: np.ndarray  # (n,) names
    labels: np.ndarray  # (n,) names of the images
    thumbnails: tuple[bytes, ...]  # JPEG

    @functools.cached_property
    def folds(self) -> list[tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]]:
        """For each fold the distances to the others' images, and those of its own ones, sorted."""
        folds, features, measured = np.arange(len(self.features)) % FOLDS, self.features.astype(float), []
        for fold in range(FOLDS):
            distances = mahalanobis(features[folds != fold], self.classes[folds != fold])
            measured.append((distances, np.sort(distances(features[folds == fold]))))
        return measured

    @functools.cached_property
    def directions(self) -> np.ndarray:
        features = self.features.astype(np.float32)
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    def likenesses(self, features: np.ndarray) -> list[Likeness]:
        """How images lie among these, from their features (B, D): cross-conformal (V. Vovk, 2015)."""
        nearer = sum(np.searchsorted(own, distances(features)) for distances, own in self.folds)
        cosines = features / np.linalg.norm(features, axis=1, keepdims=True) @ self.directions.T
        cosines[cosines > SAME_IMAGE] = -1  # an image is no similar case of itself
        nearest = (-cosines).argsort(axis=1, kind="stable")[:, :NEAREST]
        similar = [[self.case(each, row[each]) for each in places] for places, row in zip(nearest, cosines)]
        return [Likeness(int(count), len(self.labels), tuple(each)) for count, each in zip(nearer, similar)]

    def case(self, place: int, likeness: float) -> SimilarCase:
        picture = np.asarray(Image.open(io.BytesIO(self.thumbnails[place])))
        return SimilarCase(str(self.labels[place]), str(self.classes[place]), float(likeness), picture)


def reference_of(classifier: Classifier, images: Sequence[tuple[Path, str, str]], batch: int) -> Reference:
    """Pass images through a network, each with its label and class; one that cannot be read is told."""
    import torch
    from tqdm import tqdm

    features, hook = head_inputs(classifier.network, classifier.model.family.head)
    bar, told = tqdm(images, "Reference", unit="image", disable=not sys.stderr.isatty()), []
    with hook, torch.no_grad():
        rest = readable(bar, classifier.model.preprocessing)
        while some := list(itertools.islice(rest, batch)):
            inputs, *others = zip(*some)
            classifier.network(torch.from_numpy(np.stack(inputs)).to(classifier.device))
            told += zip(*others)
    thumbnails, *names = zip(*told)
    labels, classes = map(np.array, names)
    return Reference(torch.cat(features).half().cpu().numpy(), classes, labels, thumbnails)


def readable(images: Iterable[tuple[Path, str, str]], preprocessing: Preprocessing) -> Iterator[tuple]:
    """A network's input, thumbnail, label and class of each image; says which cannot be read."""
    for path, *told in images:
        try:
            radiograph = load_radiograph(path)
        except ExplainError as error:
            print(f"❌ {error}; left out of the reference", file=sys.stderr)
            continue
        small, file = Image.fromarray(radiograph.pixels).convert("L"), io.BytesIO()
        small.thumbnail(THUMBNAIL)
        small.save(file, "JPEG", quality=60)
        yield network_input(radiograph, preprocessing), file.getvalue(), *told


def write_reference(reference: Reference, path: Path, mark: str) -> None:
    thumbnails, ends = b"".join(reference.thumbnails), np.cumsum([len(each) for each in reference.thumbnails])
    arrays = {"features": reference.features, "classes": reference.classes, "labels": reference.labels}
    file = io.BytesIO()
    np.savez(file, **arrays, thumbnails=np.frombuffer(thumbnails, np.uint8), ends=ends, mark=mark)
    write_file(path, file.getvalue())


def read_reference(path: Path, mark: str) -> Reference | None:
    """What was written for this network and these images; None where nothing was."""
    absent_or_cut = OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile
    with contextlib.suppress(*absent_or_cut), np.load(path) as file:
        if str(file["mark"]) == mark:
            thumbnails = tuple(each.tobytes() for each in np.split(file["thumbnails"], file["ends"][:-1]))
            return Reference(file["features"], file["classes"], file["labels"], thumbnails)
    return None


# The table of results: a row for each image explained into the folder -----------------------------

LOCK_NAME = ".summary.lock"
FIRST_COLUMNS = ("predicted", "confidence", "correct", "flags")  # of each model; the rest stand behind
TEXT_CODING = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}  # marked for spreadsheets
FORMULA = re.compile(r"(?![+-]?[\d.]+(e[+-]?\d+)?$)[=+@-]")  # what spreadsheets would compute; not -0.5

Row = dict[str, str]  # by column
Seen = Row  # as one model saw the image: its columns without its key, and those of no model


def yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


def flags_text(explanation: Explanation) -> str:
    """The keys of the flagged checks of an explanation."""
    return ", ".join(each.check for each in explanation.findings if each.is_flagged)


def check_cells(explanation: Explanation, *about: str) -> Row:
    """What the checks of some kinds measured, by their keys; nothing where they do not apply."""
    cells = {check.key: "" for check in CHECKS.values() if check.about in about and check.key != "blank"}
    for each in explanation.findings:
        if each.check in cells:
            cells[each.check] = f"{each.value:.6f}" if each.is_measured else "untestable"
    return cells


def map_cells(explanation: Explanation) -> Row:
    """What the table says of a map, by column."""
    pointed, raw_map = explanation.pointing, explanation.raw_map
    cells = {
        "flags": flags_text(explanation),
        "raw_peak": f"{raw_map.max():.6g}",
        "blank_map": yes_or_no(not explanation.heatmap.any()),
        **check_cells(explanation, "map"),
        "in_box": yes_or_no(pointed.is_inside) if pointed else "",
        "heat_in_box": f"{pointed.heat:.6f}" if pointed else "",
        "box_area": f"{pointed.area:.6f}" if pointed else "",
    }
    if METHODS[explanation.method].compares:
        cells["sum"] = f"{raw_map.sum(dtype=float):.6g}"
        cells["sum_owed"] = "" if explanation.owed is None else f"{explanation.owed:.6g}"
        cells["negative_share"] = f"{explanation.negative_share:.4f}"
    return cells


def model_cells(explanations: Sequence[Explanation], truth: str) -> Row:
    """What the table says of one model and its maps; the first one's columns go without the method's name."""
    first, *others = explanations
    cells = {
        "predicted": first.prediction,
        "confidence": f"{first.confidence:.6f}",
        "correct": yes_or_no(first.is_right(truth)) if truth else "",
        "explained": first.explained_class,
        "method": first.method,
        **check_cells(first, "reference", *ASKED_AGAIN),
        "similar": "; ".join(map(case_text, first.similar)),
        **map_cells(first),
    }
    for each in others:
        cells |= {f"{each.method}_{name}": text for name, text in map_cells(each).items()}
    for name, probability in zip(first.model.class_names, first.probabilities):
        cells[f"p_{name}"] = f"{probability:.6f}"
    return {f"{first.model.family.key}_{name}": text for name, text in cells.items()}


def table_columns(models: Sequence[Model], methods: Sequence[str]) -> list[str]:
    """All columns that the rows of a run may fill, in the order of need."""
    first = [f"{model.family.key}_{name}" for model in models for name in FIRST_COLUMNS]
    rest = []
    for model in models:
        nothing = np.zeros(len(model.class_names)), 0, np.zeros((1, 1)), np.zeros((1, 1))
        told = model_cells([Explanation(model, *nothing, method) for method in methods], "")
        rest += [name for name in told if name not in first]
    pair = ["agree", AGREEMENT, "pair_flags"]
    return ["file", "true_class", *first, *pair, "error", "notes", *rest, "digest", "outputs"]


def table_row(result: Result, models: Sequence[Model]) -> Row:
    """One image's results, as text."""
    job, truth = result.job, result.job.truth.name
    row = {"file": job.label, "true_class": truth, "notes": "; ".join(result.notes), "error": result.error}
    if result.error:
        return row
    for model in models:
        row |= model_cells([each for each in result.explanations if each.model == model], truth)
    if len(models) > 1:
        row["agree"] = yes_or_no(agree(result.opinions))
        if overlap := map_agreement(result.opinions):
            row[AGREEMENT] = f"{overlap.value:.6f}"
            row["pair_flags"] = AGREEMENT if overlap.is_flagged else ""
    files = [path.name for path in job.outputs if path.suffix != ".json"]
    return row | {"digest": job.digest, "outputs": json.dumps(files, ensure_ascii=False)}


# The file. Other runs may write to it at the same time: each row goes in under a lock.


@contextlib.contextmanager
def table_alone(folder: Path) -> Iterator[Path]:
    """A folder's table, whole, held against other runs where the system can. Raises ExplainError."""
    path = folder / TABLE_NAME
    with writing(path), open(folder / LOCK_NAME, "w") as lock:
        if fcntl:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists() and path.stat().st_size:
            with open(path, "rb+") as file:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
                    warn(f"ℹ️  {shown(path)}: its last line was torn, as a crash leaves it, and is dropped")
        yield path


def table_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a table, with all columns; none of a missing one. Raises ExplainError for other columns."""
    if not path.exists():
        return []
    with open(path, **TEXT_CODING) as file, contextlib.suppress(csv.Error):  # lines longer than any of ours
        reader = csv.DictReader(file)
        if set(reader.fieldnames or ()) <= set(columns):
            return [{name: plain_text(row.get(name) or "") for name in columns} for row in reader]
    cause = "another run made it anew, with other columns"
    raise refusal(path, cause, "give each --model and --method an --output-dir of its own")


def write_rows(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """A whole table anew."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows([cell_text(row.get(name, "")) for name in columns] for row in rows)
    write_file(path, text.getvalue().encode(TEXT_CODING["encoding"], TEXT_CODING["errors"]))


def cell_text(text: str) -> str:
    """A text that no spreadsheet program takes for a formula."""
    return f"'{text}" if FORMULA.match(text) else text


def plain_text(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell[1:]) else cell


def add_row(folder: Path, row: Row, columns: Sequence[str]) -> None:
    """Append one row to a folder's table. Raises ExplainError where that cannot be done."""
    with table_alone(folder) as path:
        header = []
        if path.exists():
            with open(path, **TEXT_CODING) as file:
                header = next(csv.reader([file.readline()]), [])
        if {name for name, text in row.items() if text} <= set(header):
            with open(path, "a", **TEXT_CODING) as file:
                csv.writer(file).writerow([cell_text(row.get(name, "")) for name in header])
        else:  # it is new, or left out columns that were empty so far
            write_rows(path, [*table_rows(path, columns), row], columns)


def earlier_rows(folder: Path, columns: Sequence[str]) -> dict[str, Row]:
    """The last row of each image in a folder's table, by its whole path; another kind of table is renamed."""
    with table_alone(folder) as path:
        try:
            return {os.path.abspath(row["file"]): row for row in table_rows(path, columns)}
        except ExplainError:
            names = (path.with_stem(f"{path.stem}_{number}") for number in itertools.count(1))
            other = next(name for name in names if not os.path.lexists(name))
            os.rename(path, other)
            warn(f"ℹ️  {shown(path)}: the table of an earlier run with other columns, kept as {other.name}")
            return {}


def fold_table(folder: Path, columns: Sequence[str]) -> list[Row]:
    """Keep the last row of each image and the columns that say something; the rows."""
    with table_alone(folder) as path:
        last: dict[str, Row] = {}
        taken: set[str] = set()
        for row in reversed(table_rows(path, columns)):
            if last.setdefault(os.path.abspath(row["file"]), row) is row and row["outputs"]:
                # Another run may have replaced a file by that of an image of the same name.
                files = [each for each in json.loads(row["outputs"]) if each not in taken]
                row["outputs"] = json.dumps(files, ensure_ascii=False)
                taken.update(files)
        rows = sorted(last.values(), key=lambda row: row["file"])
        write_rows(path, rows, [name for name in columns if any(row[name] for row in rows)])
    return rows


def seen_by(row: Row, model: Model) -> Seen:
    """What a model saw, with the `kinds` that filters find: faults, flags by any method, class."""
    own, of_models = f"{model.family.key}_", tuple(f"{key}_" for key in FAMILIES)
    names = [name for name in row if name.startswith(own) or not name.startswith(of_models)]
    seen = {name.removeprefix(own): row[name] for name in names}
    faults = {"wrong": seen["correct"] == "no", "disagree": seen["agree"] == "no", "failed": seen["error"]}
    kinds = [fault for fault, is_so in faults.items() if is_so]
    kinds += ", ".join(text for name, text in seen.items() if name.endswith("flags") and text).split(", ")
    kinds.append(class_key(seen["true_class"] or seen["predicted"]))
    return seen | {"kinds": " ".join(dict.fromkeys(filter(None, kinds)))}


# Console text -------------------------------------------------------------------------------------

RULE = "=" * 80
MOST_NAMED = 5  # files of a kind; the rest are in the table


def note_lines(file: Path | str, notes: Sequence[str]) -> list[str]:
    return [f"ℹ️  {shown(Path(file))}: {note}" for note in notes]


def opening_lines(jobs: Sequence[Job], is_single: bool, is_random: bool, models: int) -> list[str]:
    lines = []
    if is_random:
        lines = ["🎲 No image specified. Using random test image:", f"   {shown(Path(jobs[0].label))}", ""]
    what = f": {printable(jobs[0].name)}" if is_single else f" {len(jobs)} images"
    verb = "Comparing" if models > 1 else "Analyzing"
    return [*lines, f"🔍 {verb} explainability for{what}", RULE]


def single_lines(result: Result) -> list[str]:
    """What became of the one image of a run."""
    lines = []
    for page in result.job.pages:
        first, *others = (result.explanations[index] for index in page.shows)
        doing = f"{first.model.family.bullet} Generating {first.model.title} {METHODS[first.method].title}"
        what = "visualization"
        if others:
            what = "comparison" if others[0].method == first.method else "methods"
            doing = f"📊 Creating {what} visualization"
        lines += [f"{doing}...", f"✅ {what.capitalize()} saved: {shown(page.path)}", ""]
    files = [f"✅ Picture saved: {shown(path)}" for path in result.job.panels]
    files += [f"✅ Map saved: {shown(path)}" for path in result.job.maps]
    return [*lines, *files, ""] if files else lines


def summary_lines(result: Result) -> list[str]:
    """What the models say about the one image of a run."""
    by_model = [[each for each in result.explanations if each.model == one.model] for one in result.opinions]
    if len(by_model) == 1:
        return prediction_lines(by_model[0])
    lines = [RULE, "📊 COMPARISON SUMMARY", RULE]
    for explanations in by_model:
        lines += [*prediction_lines(explanations), ""]
    truth, verdict = result.job.truth.name, agreement_text(result.opinions)
    if result.wrong:
        titles = ", ".join(each.model.title for each in result.wrong)
        verdict = f"{verdict}; wrong, the truth is {truth}: {titles}"
    is_good = not result.wrong if truth else agree(result.opinions)
    lines.append(f"{'✅' if is_good else '⚠️ '} {verdict}")
    if overlap := map_agreement(result.opinions):
        lines.append(marked_text(overlap))
    return lines


def prediction_lines(explanations: Sequence[Explanation]) -> list[str]:
    """What one model says, and what is to be known of its maps."""
    first, titles = explanations[0], [f"{METHODS[each.method].title}: " for each in explanations]
    lines = [f"Prediction: {first.prediction}", f"Confidence: {first.confidence:.2%}"]
    if first.explained != first.predicted:
        lines.append(f"Explained class: {first.explained_class}")
    for each, title in zip(explanations, titles):
        if METHODS[each.method].compares:
            owed = "" if each.owed is None else f", must be {each.owed:.4g}"
            against = f"{each.negative_share:.0%} of its magnitude speaks against the class"
            lines.append(f"{title}sum {each.raw_map.sum(dtype=float):.4g}{owed}; {against}")
    if len(explanations) == 1:
        titles = [""]
    for each, title in zip(explanations, titles):
        mark = "⚠️  " if flagged_findings(each.findings, "map") else ""
        lines.append(f"{mark}{title}{checks_text(each.findings)}")
        if each.pointing:
            lines.append(title + pointing_text(each.pointing))
    lines += network_lines(first, titles[0])
    remarks = dict.fromkeys(remark for each in explanations for remark in each.remarks)
    lines += [f"⚠️  {text}" for text in remarks]
    return [f"{first.model.title}:", *(f"  {line}" for line in lines)]


def network_lines(explanation: Explanation, title: str) -> list[str]:
    """What the checks say of the network: of the reference, all that --verify asked, and low confidence."""
    asked = ("reference", *ASKED_AGAIN)
    told = [each for each in explanation.findings if CHECKS[each.check].about in asked and each.is_measured]
    lines = [marked_text(each) for each in [*told, *flagged_findings(explanation.findings, "prediction")]]
    if explanation.similar:
        lines.append(f"Similar cases: {', '.join(map(case_text, explanation.similar))}")
    if explanation.passes:
        lines.append(f"{title}Verified with {explanation.passes} more forward passes")
    return lines


def result_line(result: Result) -> str:
    """One image of many in one line of a terminal; a tick only where nothing is wrong or flagged."""
    verdicts = [
        f"{each.model.title} {short_class(each.prediction, each.model.class_names)} {each.confidence:.1%}"
        for each in result.opinions
    ]
    words = [f"wrong: {each.model.title}" for each in result.wrong]
    if not agree(result.opinions):
        words.append("models disagree")
    for each in result.explanations:
        several = len(result.explanations) > len(result.opinions)
        whose = f"{each.model.title}, {METHODS[each.method].title}" if several else each.model.title
        if keys := flags_text(each):
            words.append(f"{whose} flagged: {keys}")
    overlap = map_agreement(result.opinions)
    if overlap and overlap.is_flagged:
        words.append(overlap.text)
    if NOTHING_TO_SEE in result.notes:
        words.append(NOTHING_TO_SEE)
    words += [sum_remark(each) for each in result.explanations if each.sum_error > MAX_SUM_ERROR]
    mark = "⚠️ " if words else "✅"
    return f"{mark} {printable(result.job.name)}: {'; '.join([', '.join(verdicts), *words])}"


def run_lines(
    rows: Sequence[Row], models: Sequence[Model], methods: Sequence[str],
    observations: dict[str, list[Observation]], fresh: int, seconds: float,
) -> list[str]:  # fmt: skip
    """What a run found; of the images, `fresh` were explained in these seconds, with these observations."""
    failed, done = [row for row in rows if row["error"]], [row for row in rows if not row["error"]]
    lines = [RULE, "📊 RUN SUMMARY", RULE, f"Images: {len(done)} done, {len(failed)} failed"]
    lines += named_lines("  Failed", failed)
    if fresh:
        lines.append(f"Speed: {fresh / seconds:.2f} images per second ({fresh} images in {seconds:.1f} s)")
    for model in models:
        kept = observations.get(model.family.key, ())
        seen = [seen_by(row, model) for row in done]
        told = [*accuracy_lines(seen, model.class_names), *model_lines(seen, methods)]
        if 0 < len(kept) < len(done):
            told.append(f"Of the {len(kept)} images explained now:")
        lines += ["", f"{model.title}:", *(f"  {line}" for line in [*told, *audit_lines(kept)])]
    if len(models) > 1 and done:
        differ = [row for row in done if row["agree"] == "no"]
        lines += ["", f"Models agree on {len(done) - len(differ)} of {len(done)} images"]
        lines += [*named_lines("  Disagree", differ), *overlap_lines(done)]
    return lines


def named_lines(what: str, rows: Sequence[Row]) -> list[str]:
    """The first files of a kind, and how many more there are."""
    lines = [f"{what}: {shown(Path(row['file']))}" for row in rows[:MOST_NAMED]]
    if len(rows) > MOST_NAMED:
        lines.append(f"{what}: {len(rows) - MOST_NAMED} more, in {TABLE_NAME}")
    return lines


def filled(rows: Sequence[Row], column: str) -> list[str]:
    """The cells of a column that say something."""
    return [text for row in rows if (text := row.get(column))]


def mean_of(rows: Sequence[Row], column: str) -> float:
    """Mean of a column's numbers."""
    return float(np.mean([float(text) for text in filled(rows, column)]))


def overlap_lines(rows: Sequence[Row]) -> list[str]:
    """How far the two models' maps agree over a run, which is another thing than the same class."""
    count, few = len(filled(rows, AGREEMENT)), len(filled(rows, "pair_flags"))
    if not count:
        return []
    mean = percent(mean_of(rows, AGREEMENT))
    return [f"Maps share {mean} of their heat on average, in {few} of {count} images too little"]


def model_lines(seen: Sequence[Seen], methods: Sequence[str]) -> list[str]:
    """How one model's maps compare with true boxes, what is flagged how often, what the reference told."""
    lines = []
    if known := filled(seen, "in_box"):
        inside = known.count("yes")
        share = f"{inside / len(known):.1%} ({inside} of {len(known)})"
        heat, area = mean_of(seen, "heat_in_box"), mean_of(seen, "box_area")
        lines.append(f"True fracture: maximum inside {share}, heat inside {heat:.1%}, chance {area:.1%}")
    for method in methods:
        flags = filled(seen, "flags" if method == methods[0] else f"{method}_flags")
        counts = Counter(check for text in flags for check in text.split(", "))
        title = "Flagged" if len(methods) == 1 else f"{METHODS[method].title}, flagged"
        lines.append(f"{title}: {len(flags)} of {len(seen)} images")
        if counts:
            lines[-1] += f": {', '.join(f'{check} {counts[check]}' for check in CHECKS if counts[check])}"
    if compared := [each for each in seen if each.get("unlike")]:
        flags = Counter(check for each in compared for check in each["flags"].split(", "))
        told = f"Unlike the reference: {flags['unlike']} of {len(compared)} images"
        lines.append(f"{told}; contradicted by similar cases: {flags['neighbours']}")
    return lines


def accuracy_lines(seen: Sequence[Seen], names: Sequence[str]) -> list[str]:
    """Accuracy, confusion counts and misclassified files of one model, where the truth is known."""
    known = [each for each in seen if each.get("true_class")]
    if not known:
        words = " or ".join(f'"{short_class(name, names).casefold()}"' for name in names)
        remedy = f"a folder above the images whose name holds {words}, or --truth, would tell"
        return [f"Accuracy: unknown; {remedy}"]
    wrong = [each for each in known if each["correct"] == "no"]
    right = len(known) - len(wrong)
    lines = [f"Accuracy: {right / len(known):.2%} ({right} of {len(known)} images whose class is known)"]
    counts = Counter((class_key(each["true_class"]), class_key(each["predicted"])) for each in known)
    for truth in names:
        counted = ", ".join(f"{counts[class_key(truth), class_key(name)]} as {name}" for name in names)
        lines.append(f"{truth}: {counted}")
    return [*lines, *named_lines("Misclassified", wrong)]


# The report: every image in the table, on a page to browse ----------------------------------------

SURE = 0.95  # confidence from which a wrong prediction is looked at first
Z = 1.96  # standard deviations to each side that hold 95 % of a normal distribution
HEAT_COLUMNS = {"border": "on border", "dark": "on dark", "markers": "on markers", "heat_in_box": "in box"}
REPORT_STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; --panel: #8881; --line: #8886;
  --bar: light-dark(#3b6ea5, #7fb0e6) }
* { box-sizing: border-box; min-width: 0 } body { margin: 8px clamp(10px, 2vw, 32px) }
h1, h2, p { margin: 4px 0 } p, nav { overflow-wrap: anywhere } .name, summary { font-weight: 600 }
.muted, caption, figcaption { color: color-mix(in srgb, CanvasText 70%, Canvas); text-align: left }
.bad { color: light-dark(#a33b00, #ff9a5c) } a, path { color: var(--bar); fill: var(--bar) }
.models, .cards tbody { display: grid; gap: 14px }
.models { grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)) }
.cards tbody { grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)) }
section, .cards tr { padding: 12px; background: var(--panel); border: 1px solid var(--line) }
figure { display: inline-block; width: 240px; margin: 4px 20px 0 0; vertical-align: top }
svg { width: 100%; height: 130px; border: solid; border-width: 0 0 1px 1px }
line { stroke: CanvasText; vector-effect: non-scaling-stroke }
.wide { overflow-x: auto; margin: 14px 0 } table { border-collapse: collapse }
td, th { border: 1px solid var(--line); padding: .3em .6em; text-align: left; vertical-align: top }
td { background: color-mix(in srgb, var(--bar) calc(var(--share, 0) * 75%), transparent) }
form { display: flex; flex-wrap: wrap; gap: 6px; padding: 8px 0; border-block: 1px solid var(--line) }
@media (min-width: 700px) { form { position: sticky; top: 0; z-index: 1; background: Canvas } }
select, input, button, label { font: inherit; color: inherit; background: var(--panel); padding: 3px 10px;
  border: 1px solid var(--line); border-radius: 6px; max-width: 100% }
label:has(:checked) { background: var(--bar); color: Canvas }
main table, main tbody { display: block } .cards td, #frame td { display: block; border: 0; padding: 0 }
main tr { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr));
  content-visibility: auto; contain-intrinsic-size: auto 80px }
.cards tr { display: block; contain-intrinsic-size: auto 440px }
td button { padding: 0; background: #fff; cursor: zoom-in } main nav { display: none }
main button, main img { display: block; width: 100% } main img { aspect-ratio: 1.2; object-fit: contain }
[class^="case"] { width: 56px; vertical-align: top; margin: 2px }
dialog { width: 100%; height: 100%; max-width: none; max-height: none; border: 0 }
#frame { height: calc(100% - 40px); overflow: auto } #frame a { display: table }
#frame td:has(img) { float: left; margin: 0 14px 0 0 }
#frame:not(.whole) img { max-width: 100%; max-height: 80vh }
@media print { :root { font-size: 9px } form, summary { display: none } tr, section { break-inside: avoid }
  main tr { content-visibility: visible } .cards tbody { grid-template-columns: 1fr 1fr 1fr } }
"""
REPORT_SCRIPT = """
const at = id => document.getElementById(id), form = at("filters"), list = at("list"), large = at("large");
const rows = [...list.children], {compare} = new Intl.Collator("en", {numeric: true});
let left = rows, opened = null;  // what the filters leave, in order; what is shown large

// All chosen filters hold for what is left. The address keeps them and the open image, for a colleague.
const chosen = () => new URLSearchParams([...new FormData(form)].filter(([, value]) => value));
function show() {
  const asked = chosen(), only = asked.getAll("only"), by = asked.get("order");
  const name = (asked.get("name") ?? "").toLowerCase(), seen = asked.get("model") ?? "any";
  left = rows.filter(({dataset}) => {
    const kinds = dataset[seen].split(" ");
    return only.every(kind => kinds.includes(kind)) && dataset.file.toLowerCase().includes(name);
  });
  if (by) left.sort((a, b) => compare(a.dataset[by], b.dataset[by]));
  list.replaceChildren(...left);
  at("count").textContent = `${left.length} of ${rows.length} images`;
  remember();
}
function remember() {
  const asked = chosen();
  if (opened) asked.set("image", opened.dataset.file);
  history.replaceState(null, "", `#${asked}`);
}
function recall() {
  const asked = new URLSearchParams(location.hash.slice(1)), only = asked.getAll("only");
  for (const field of form.elements) {
    if (field.type === "checkbox") field.checked = only.includes(field.value);
    else field.value = asked.get(field.name) ?? "";
  }
  show();
  open(rows.find(row => row.dataset.file === asked.get("image")));
}

// One image, large
function open(row) {
  if (!row?.querySelector("button")) return;
  opened = row;
  at("place").textContent = `${left.indexOf(row) + 1} of ${left.length}`;
  at("frame").replaceChildren(...row.cloneNode(true).children);
  if (!large.open) large.showModal();
  remember();
}
function step(by) {
  const seen = left.filter(row => row.querySelector("button"));
  open(seen[seen.indexOf(opened) + by]);
}
at("before").onclick = () => step(-1);
at("after").onclick = () => step(1);
at("close").onclick = () => large.close();
at("frame").onclick = event => event.target.closest("button") && at("frame").classList.toggle("whole");
large.onkeydown = event => step({ArrowRight: 1, ArrowLeft: -1}[event.key]);
large.onclose = () => { opened = null; remember(); };
list.onclick = event => open(event.target.closest("button")?.closest("tr"));

document.querySelectorAll("[data-share]").forEach(td => td.style.setProperty("--share", td.dataset.share));
form.oninput = show;
form.onsubmit = event => event.preventDefault();
onhashchange = recall;
onbeforeprint = () => document.querySelectorAll("img").forEach(image => { image.loading = "eager"; });
recall();
"""
REPORT = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; base-uri 'none'; form-action 'none';
 img-src 'self' file: data:; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'">
<meta name="viewport" content="width=device-width">
<title>Explainability report</title>
<style>{style}</style>
<header><h1>Explainability of {count} images</h1>{facts}{told}
<details open><summary>The models</summary><div class="models">{sections}</div>{classes}</details></header>
<form id="filters" aria-label="Filters">{filters}
<select name="model" aria-label="model"><option value="">as any model saw it</option>{choices}</select>
<select name="order" aria-label="order"><option value="">to look at first</option>
<option value="confidence">least sure</option><option value="agreement">maps least alike</option>
<option value="file">name</option></select>
<input type="search" name="name" placeholder="search names" aria-label="search names"></form>
<main><p id="count" role="status"></p><table class="{look}"><tbody id="list">{cards}</tbody></table></main>
<footer class="muted">{notice}</footer>
<dialog id="large" aria-label="One image, large"><button id="before" aria-label="Image before">←</button>
<button id="after" aria-label="Image after">→</button> <button id="close" aria-label="Close">✕</button>
<span id="place"></span><div id="frame"></div></dialog>
<script>{script}</script>
"""


class Markup(str):
    """A part of the page, which `element` made of texts."""


def element(tag: str, *parts: str, **attributes: str) -> Markup:
    """An HTML element, where whatever is not Markup stays text; attributes are written class_, aria_label."""
    if parts and parts[0].startswith(("✗", "⚠", "🚩")):
        attributes["class_"] = "bad"
    page = f"<{tag}"
    for name, text in attributes.items():
        page += f' {name.rstrip("_").replace("_", "-")}="{html.escape(printable(text))}"'
    inside = "".join(part if isinstance(part, Markup) else html.escape(printable(part)) for part in parts)
    return Markup(f"{page}>{inside}" if tag in ("img", "input") else f"{page}>{inside}</{tag}>")


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """Where a share lies with 95 % confidence (E. B. Wilson, JASA 22, 1927)."""
    share, square = right / count, Z**2 / count
    half = Z * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return (share + square / 2 - half) / (1 + square), (share + square / 2 + half) / (1 + square)


def calibration_error(confidence: np.ndarray, is_right: np.ndarray) -> float:
    """Gap of confidence and accuracy in ten steps of confidence, both (n,): Guo et al., ICML 2017, eq. 3."""
    tenths = np.minimum(10 * confidence, 9).astype(int)
    return float(np.abs(np.bincount(tenths, confidence - is_right)).sum() / len(confidence))


def confidence_figure(seen: Sequence[Seen]) -> Markup:
    """A reliability diagram; where no class is known, how many images are in each tenth of confidence."""
    sure = np.array([float(each["confidence"]) for each in seen])
    tenths = np.minimum(10 * sure, 9).astype(int)
    counts, diagonal = np.bincount(tenths, minlength=10), []
    heights = counts / counts.max()
    told = f"Images by confidence, 0 to 100 %; the highest bar is {counts.max()}"
    if seen[0]["true_class"]:
        is_right = np.array([each["correct"] == "yes" for each in seen])
        heights = np.bincount(tenths, is_right, 10) / np.maximum(counts, 1)
        error = calibration_error(sure, is_right)
        told = f"Share right by confidence, both 0 to 100 %; calibration error {error:.3f}"
        diagonal = [element("line", x1="0", y1="100", x2="100", y2="0")]  # where confidence is right
    bars = "".join(f"M{10 * tenth} 100v{-100 * height:.1f}h9V100z" for tenth, height in enumerate(heights))
    box = {"viewBox": "0 0 100 100", "preserveAspectRatio": "none", "aria_hidden": "true"}
    graph = element("svg", element("path", d=bars), *diagonal, **box)
    return element("figure", element("figcaption", told), graph)


def model_section(seen: Sequence[Seen], model: Model, observations: dict[str, list[Observation]]) -> Markup:
    """How one model did, over the images that it was asked about."""
    kept = observations.get(model.family.key, [])
    known = [each for each in seen if each["true_class"]]
    told, figures = "No true class is known", []
    if known:
        right = sum(each["correct"] == "yes" for each in known)
        low, high = wilson_interval(right, len(known))
        told = f"{right / len(known):.1%} of {len(known)} right (95 % interval {low:.1%} to {high:.1%})"
    if seen:
        figures.append(confidence_figure(known or seen))
    if kept:
        heat = resized(normalised(np.mean([each.heat for each in kept], axis=0)), 130, 130)
        pixels = png(colours_of(FigureStyle())[(heat * 255).round().astype(np.uint8)], 96)
        caption = f"Mean map of {len(kept)} images"
        image = element("img", src=f"data:image/png;base64,{base64.b64encode(pixels).decode()}", alt=caption)
        figures.append(element("figure", element("figcaption", caption), image))
    where = f"{model.architecture}, {model.checkpoint.name}; {model.accuracy}"
    lines = [element("p", line) for line in (told, where, *audit_lines(kept))]
    return element("section", element("h2", model.title), *lines, *figures)


def classes_table(models: Sequence[Model], seen: Sequence[Sequence[Seen]]) -> Markup:
    """Class by class: predictions (the confusion matrix, shaded), flags, and where the heat lies."""
    names, found = models[0].class_names, " ".join(each["kinds"] for each in itertools.chain(*seen)).split()
    flags = [key for key in CHECKS if key in found]
    head = ["Model", "Class", "Images", *(f"as {name}" for name in names)]
    head += [*(f"⚠ {key}".replace("_", " ") for key in flags), *HEAT_COLUMNS.values()]
    lines = [element("tr", *(element("th", text, scope="col") for text in head))]
    for (model, its), name in itertools.product(zip(models, seen), names):
        mine = [each for each in its if class_key(name) in each["kinds"].split()]
        cells = [element("th", model.title, scope="row"), element("td", name), element("td", f"{len(mine)}")]
        for other in names:
            count = sum(class_key(each["predicted"]) == class_key(other) for each in mine)
            cells.append(element("td", f"{count}", data_share=f"{count / max(len(mine), 1):.3f}"))
        cells += [element("td", f"{sum(key in each['kinds'].split() for each in mine)}") for key in flags]
        for column in HEAT_COLUMNS:
            shares = [float(each[column]) for each in mine if each[column]]
            cells.append(element("td", f"{np.mean(shares):.0%}" if shares else "–"))
        lines.append(element("tr", *cells))
    caption = "By true class, or the predicted one where that is not known; at the right, where the heat lies"
    return element("section", element("table", element("caption", caption), *lines), class_="wide")


def urgency(views: Sequence[Seen]) -> tuple[int, float, str]:
    """Where an image stands among those to look at: unlike the reference or surely wrong ones first."""
    kinds = " ".join(each["kinds"] for each in views).split()
    surest = max((float(each["confidence"]) for each in views if each["correct"] == "no"), default=0.0)
    worst = ["unlike" in kinds, surest >= SURE, "disagree" in kinds, "wrong" in kinds]
    steps = [*worst, not CHECKS.keys().isdisjoint(kinds), "failed" not in kinds, True]
    return steps.index(True), -surest, views[0]["file"]


def figure_parts(outputs: str, name: str) -> list[Markup]:
    """An image's name, which links its figure; before it the figure, if it is no PDF; last all files."""
    links = {file: quote(os.fsencode(file), safe="") for file in json.loads(outputs or "[]")}
    pages = [file for file in links if not re.match(r"radiograph_|heatmap_|overlay_|.*\.npy$", file)]
    page = min(pages, key=lambda file: not file.startswith("comparison"), default="")
    files = [element("a", file, href=link) for file, link in links.items()]
    parts = [element("p", element("a", name, href=links[page]) if page else name, class_="name")]
    if page.endswith((".png", ".svg")):
        picture = element("img", src=links[page], alt=f"Figure of {name}", loading="lazy")
        parts.insert(0, element("button", picture, aria_label=f"Open {name}"))
    return [*parts, element("nav", *files)]


def card(views: Sequence[Seen], models: Sequence[Model], name: str) -> Markup:
    """An image's line of the list, with what filters and orders ask for; the style makes cards of lines."""
    row, asked, flags, similar = views[0], {}, defaultdict(list), []
    said = [f"{mark} {text}" for mark, text in (("true:", row["true_class"]), ("✗", row["error"])) if text]
    for model, seen in zip(models, views):
        asked[f"data_{model.family.key}"] = seen["kinds"]
        if seen["predicted"]:
            verdict = "✗ wrong, " if seen["correct"] == "no" else ""
            said.append(f"{verdict}{model.title}: {seen['predicted']}, {float(seen['confidence']):.1%}")
        for kind in filter(CHECKS.get, seen["kinds"].split()):
            flags[f"⚠ {CHECKS[kind].title or kind}"].append(model.title)
        if seen["similar"]:
            similar.append(element("p", f"Most similar to {model.title}"))
        for text, label in re.findall(r"((.+?) \([^()]*, [\d.]+\))(?:; |$)", seen["similar"]):
            similar.append(element("span", text, title=text, class_=f"case-{digest_of(label)}"))
    flagged = [f"{flag}: {', '.join(titles)}" for flag, titles in flags.items()]
    lines = [[element("p", text) for text in texts] for texts in (said, flagged, [row["notes"]])]
    *figure, files = figure_parts(row["outputs"], name)
    cells = [element("td", *parts) for parts in (figure, *lines, [*similar, files])]
    asked["data_any"] = " ".join(asked.values())
    asked["data_confidence"] = min(filter(None, (seen["confidence"] for seen in views)), default="2")
    return element("tr", *cells, data_file=row["file"], data_agreement=row[AGREEMENT] or "2", **asked)


def filter_labels(counts: Counter[str], class_names: Sequence[str]) -> Iterator[Markup]:
    """What chooses among the images, and how many each choice has."""
    texts = {"wrong": "wrong", "disagree": "models disagree", "failed": "failed"}
    texts |= {key: f"⚠ {check.title or key}" for key, check in CHECKS.items()}
    texts |= {class_key(name): name for name in class_names}
    for kind in filter(counts.get, texts):
        box = element("input", type="checkbox", name="only", value=kind)
        yield element("label", box, f" {texts[kind]} {counts[kind]}")


def report_page(
    rows: Sequence[Row], models: Sequence[Model], observations: dict[str, list[Observation]],
    told: Sequence[str], thumbnails: dict[str, bytes],
) -> str:  # fmt: skip
    """The page of these rows of the table. The observations, by family, are of the maps made last, which
    need not be all; `told` is what else is to be known; thumbnails are JPEG, of the reference, by label."""
    images = sorted(([seen_by(row, model) for model in models] for row in rows), key=urgency)
    kinds = [set(" ".join(seen["kinds"] for seen in views).split()) for views in images]
    counts = Counter(itertools.chain(*kinds))
    flagged = sum(not CHECKS.keys().isdisjoint(each) for each in kinds)
    facts = [f"{len(rows) - counts['failed']} explained", f"{counts['failed']} failed", f"{flagged} flagged"]
    if both := [row for row in rows if row["agree"]]:
        alike = len(both) - counts["disagree"]
        facts += [f"The models agree on {alike} of {len(both)} images", *overlap_lines(both)]
    asked = [[each for each in views if each["predicted"]] for views in zip(*images)]  # by model
    sections = [model_section(seen, model, observations) for seen, model in zip(asked, models)]
    choices = [element("option", f"as {each.title} saw it", value=each.family.key) for each in models]
    files = [row["file"] for row in rows]
    names = dict(zip(files, display_names(files)))
    cards = [card(views, models, names[views[0]["file"]]) for views in images]
    similar, style = " ".join(each["similar"] for views in images for each in views), REPORT_STYLE
    for label in filter(similar.__contains__, thumbnails):
        uri = f"data:image/jpeg;base64,{base64.b64encode(thumbnails[label]).decode()}"
        style += f".case-{digest_of(label)} {{ content: url({uri}) }}\n"
    return REPORT.format(
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        script_hash=base64.b64encode(hashlib.sha256(REPORT_SCRIPT.encode()).digest()).decode(),
        style=style,
        script=REPORT_SCRIPT,
        count=len(rows),
        facts=element("p", " · ".join(facts)),
        told=element("p", " · ".join(told), class_="muted"),
        sections="".join(sections),
        classes=classes_table(models, asked),
        filters="".join(filter_labels(counts, models[0].class_names)),
        choices="".join(choices),
        look="cards" if any('class="name"><a' in each for each in cards) else "lines",
        cards="".join(cards),
        notice=f"Demo networks: {DEMO_NOTICE}." if is_demo(models[0].checkpoint) else "Not for diagnosis.",
    )


# Runs: jobs -> read -> explained in batches -> figures and maps written -> row, lines -------------

MAX_DRAWING_PROCESSES = 8
LONG_PASSES = 10  # an image: from here on a bar counts them
MAX_WAITING_RESULTS = 24  # explained images whose figures are not drawn yet
GRACE = 1.0  # seconds that a run has to notice by itself that a drawing process has ended

Submit = Callable[..., "Future[None]"]  # of a function and its arguments, as an executor has it
Begun = tuple[Result, list["Future[None]"]]  # an image, and its figures as they are being drawn


@dataclass(frozen=True)
class Request:
    """What the arguments come to, first as far as the file system can tell, then with the networks."""

    args: argparse.Namespace
    jobs: Sequence[Job]
    is_single: bool  # one image, named by itself or drawn: no table, and the console is about it alone
    checkpoints: Sequence[tuple[Family, Path]]
    style: FigureStyle
    notes: Sequence[str] = ()  # lines to say beside what was asked
    reference: Sequence[Path] = ()  # images that --reference names
    told: Sequence[str] = ()  # options and versions, for the report
    classifiers: Sequence[Classifier] = ()
    targets: Sequence[int | None] = ()  # of each: the class to explain, or None for the predicted one

    @property
    def models(self) -> list[Model]:
        return [classifier.model for classifier in self.classifiers]

    @property
    def batch(self) -> int:
        """Images computed at once."""
        return self.args.batch_size or DEFAULT_BATCH[self.classifiers[0].device.type]


def load_classifiers(request: Request) -> list[Classifier]:
    """Load every model, and say so. Raises ExplainError where one cannot be used."""
    use_exact_float32()
    args, classifiers = request.args, []
    device = choose_device(args.device)
    for family, path in request.checkpoints:
        say(f"📦 Loading {family.key.upper()} model...")
        classifier = load_classifier(family, path, device, args.class_names, args.weights)
        if not (args.quiet or is_demo(path)):  # what the demo files are, the README says
            warn(*note_lines(path, classifier.model.notes))
        say(f"✅ Model loaded: {classifier.model.architecture}", f"   {classifier.model.accuracy}", "")
        classifiers.append(classifier)
    if not gc.isenabled():  # put off at the start of the script
        gc.freeze()
        gc.enable()
    return classifiers


def network_mark(classifier: Classifier) -> str:
    """What tells a network from those that a reference is not of."""
    weight = classifier.network.get_submodule(classifier.model.family.head).weight.cpu().numpy()
    return digest_of(classifier.model.architecture, classifier.model.preprocessing, weight.tobytes())


def own_reference(family: Family) -> Path:
    """The reference that a demo network brings."""
    return CHECKPOINT_FOLDER / f"reference_{family.key}_demo.npz"


def stamps(images: Sequence[Path]) -> list[tuple[str, int, int]]:
    """What tells whether files are others, without reading them."""
    stats = [image.stat() for image in images]
    return [(str(image), each.st_size, each.st_mtime_ns) for image, each in zip(images, stats)]


def with_reference(classifier: Classifier, request: Request) -> Classifier:
    """A classifier with the images of --reference, or with a demo's own. Raises ExplainError for few."""
    args, model, mark = request.args, classifier.model, network_mark(classifier)
    if args.reference is None:  # of any other network, the mark is another
        return dataclasses.replace(classifier, reference=read_reference(own_reference(model.family), mark))
    cases = reference_cases(request.reference, args.reference, model.class_names, args.anonymous)
    mark = digest_of(mark, cases, stamps([image for image, *_ in cases]))
    path = args.output_dir / f"reference_{model.family.key}_{mark}.npz"
    reference = read_reference(path, mark)
    if reference is None:
        reference = reference_of(classifier, cases, request.batch)
        write_reference(reference, path, mark)
        say(f"✅ Reference saved: {shown(path)}", "")
    return dataclasses.replace(classifier, reference=reference)


def reference_cases(
    images: Sequence[Path], folder: Path, class_names: Sequence[str], is_anonymous: bool
) -> list[tuple[Path, str, str]]:
    """Images whose folders name a class, each with label and class: the same count of each fold."""
    cases = []
    for name in class_names:
        of_class = [image for image in images if folder_class(image, class_names) == name]
        if len(of_class) < FEWEST_OF_CLASS:
            cause = f"{len(of_class)} images in folders named {name}, too few to tell what is unlike them"
            raise refusal(folder, cause, f"name a folder with {FEWEST_OF_CLASS} or more of each class")
        places = np.linspace(0, len(of_class) - 1, min(MOST_OF_CLASS, len(of_class))).round().astype(int)
        for image in (of_class[place] for place in places):
            label = content_label(image) if is_anonymous else image.relative_to(folder).as_posix()
            cases.append((image, label, name))
    return cases


def with_networks(request: Request) -> Request:
    """A request with networks, their references and targets, and the images' true classes."""
    request = dataclasses.replace(request, classifiers=load_classifiers(request))
    classifiers = [with_reference(each, request) for each in request.classifiers]
    targets = [target_index(request.args.target_class, model.class_names) for model in request.models]
    names = request.models[0].class_names
    jobs, words = zip(*(told_truth(job, names) for job in request.jobs))
    if unknown := sorted({printable(word) for word in words if word}):
        taken = f"named there, not one of {', '.join(names)}: taken as unknown"
        warn(f"ℹ️  --truth: {listed(unknown)} {taken}")
    return dataclasses.replace(request, classifiers=classifiers, targets=targets, jobs=jobs)


# From jobs to results


def read_result(job: Job, models: Sequence[Model], style: FigureStyle) -> Result:
    """Read and reduce a job's image: its size does not matter for the memory that a batch takes."""
    try:
        radiograph = load_radiograph(job.image)
    except ExplainError as error:
        return Result(job, error=str(error).replace(shown(job.image), shown(Path(job.label))))
    height, width = radiograph.pixels.shape[:2]
    boxes, box_notes = boxes_in_shares(job.truth.boxes, width, height)
    return Result(
        job,
        picture=fitted(radiograph.pixels, style.dpi),
        inputs=tuple(network_input(radiograph, model.preprocessing) for model in models),
        notes=(*radiograph.notes, *box_notes),
        landmarks=landmarks_of(radiograph),
        boxes=tuple(boxes),
    )


def explained_results(results: Sequence[Result], index: int, request: Request) -> list[Result]:
    """A batch of results with the explanations of one more classifier, the one of this index."""
    classifier, target, batch = request.classifiers[index], request.targets[index], request.batch
    methods, inputs, explained = request.args.method, [result.inputs[index] for result in results], []
    fresh = iter(explain_batch(classifier, inputs, target, methods, batch) if inputs else ())
    for result in results:
        first, *others = itertools.islice(fresh, len(methods))
        trial = None
        if request.args.verify:
            trial = tried(classifier, result.inputs[index], first, result.landmarks, batch)
        made = [checked(first, result, trial), *(checked(each, result) for each in others)]
        explained.append(dataclasses.replace(result, explanations=(*result.explanations, *made)))
    return explained


def checked(explanation: Explanation, result: Result, trial: Trial | None = None) -> Explanation:
    """An explanation with what the checks say of it, and what its picture warns of."""
    remarks = explanation.remarks
    if NOTHING_TO_SEE in result.notes:
        remarks = (NOTHING_TO_SEE, *remarks)
    return dataclasses.replace(
        explanation,
        remarks=remarks,
        findings=findings_of(Evidence(explanation, result.landmarks, trial)),
        pointing=pointing(explanation, result.boxes) if result.boxes else None,
        passes=trial.passes if trial else 0,
    )


def explain_jobs(jobs: Sequence[Job], request: Request, submit: Submit) -> Iterator[Begun]:
    """Explain images in batches; a figure begins when its models have spoken. Bad images stop no others."""
    for start in range(0, len(jobs), request.batch):
        batch = jobs[start : start + request.batch]
        results = [read_result(job, request.models, request.style) for job in batch]
        good = [result for result in results if not result.error]
        drawings: list[list[Future[None]]] = [[] for _ in good]
        for index in range(len(request.classifiers)):
            good = explained_results(good, index, request)
            for result, begun in zip(good, drawings):
                begun += begun_drawings(result, request, submit)
        explained = zip(good, drawings)
        yield from ((result, []) if result.error else next(explained) for result in results)


def begun_drawings(result: Result, request: Request, submit: Submit) -> list[Future[None]]:
    """Begin what can be drawn now that one more model has spoken, and not before."""
    told = dataclasses.replace(result, inputs=())
    known, methods = len(result.explanations), len(request.args.method)
    pages = [page for page in result.job.pages if known - methods <= max(page.shows) < known]
    begun = [submit(write_page, told, page, request.style) for page in pages]
    if result.job.panels and known == len(request.classifiers) * methods:
        begun.append(submit(write_panels, told, request.style))
    return begun


def written_results(explanations: Iterable[Begun]) -> Iterator[Result]:
    """Each job's result once its files are written; networks run ahead by a few images only, for memory."""
    waiting: deque[Begun] = deque()
    for each in explanations:
        waiting.append(each)
        while waiting and (len(waiting) > MAX_WAITING_RESULTS or all(each.done() for each in waiting[0][1])):
            yield written(*waiting.popleft())
    for result, drawings in waiting:
        yield written(result, drawings)


def written(result: Result, drawings: Sequence[Future[None]]) -> Result:
    """Wait for a job's figures and write its maps; the result says whether that worked."""
    try:
        for drawing in drawings:
            drawing.result()
        write_maps(result)  # none, where the image could not be read
    except ExplainError as error:
        return dataclasses.replace(result, error=str(error))
    return result


# Processes that draw


def prepare_drawing() -> None:
    """Run first in a drawing process: it ends when it has nothing to do, or with its parent."""

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    for name in ("SIGINT", "SIGHUP"):  # the parent heeds them
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")


def warm_up(style: FigureStyle) -> None:
    """Draw a page of each kind, so that fonts and the usual words are ready when the first map is."""
    raw_map, explanations = np.eye(CELLS, dtype=np.float32), []
    for family in FAMILIES.values():
        model = Model(family, family.full_size, Path(), "", CLASS_NAMES, Preprocessing())
        explanations.append(Explanation(model, np.float32([0.6, 0.4]), 0, raw_map, raw_map))
    view = View(np.zeros((8, 8, 3), np.uint8), "", style)
    for explained in (explanations[:1], explanations):
        figure_bytes(page_figure(view, explained), style)


@contextlib.contextmanager
def drawing_pool(processes: int, style: FigureStyle) -> Iterator[Submit]:
    """What draws: processes without torch, or a thread for none. Raises ExplainError if one is killed."""
    if not processes:
        with ThreadPoolExecutor(1) as thread:
            yield thread.submit
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), prepare_drawing)
    for _ in range(processes):
        pool.submit(warm_up, style)  # so they start now, while the networks are loaded
    is_over, is_killed = threading.Event(), threading.Event()
    sentinels = [process.sentinel for process in multiprocessing.active_children()]

    def interrupt_when_killed() -> None:
        multiprocessing.connection.wait(sentinels)
        if not is_over.wait(GRACE):
            is_killed.set()
            _thread.interrupt_main(signal.SIGTERM)

    threading.Thread(target=interrupt_when_killed).start()
    try:
        yield pool.submit
    except (BrokenExecutor, SystemExit) as error:
        if isinstance(error, SystemExit) and not is_killed.is_set():
            raise
        remedy = "free some memory, then go on with --skip-existing"
        raise ExplainError(f"drawing: a process that draws figures was killed; {remedy}") from error
    finally:
        is_over.set()
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def progress_bar(request: Request, images: int) -> Iterator[tuple[tqdm, Callable[[], None]]]:
    """A terminal's bar that counts images, or passes where an image takes many; and what counts one."""
    from tqdm import tqdm

    def count_inputs(network: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        bar.update(len(inputs[0]))

    args, passes = request.args, passes_of(request.args.method)
    if args.verify:
        passes += MOST_TRIALS
    is_long = passes >= LONG_PASSES
    is_shown = not args.quiet and sys.stderr.isatty() and (is_long or not request.is_single)
    each, unit = (passes * len(request.classifiers), "pass") if is_long else (1, "image")
    done = itertools.count(1)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=images * each, unit=unit, disable=not is_shown))
        for classifier in request.classifiers if is_long else ():
            stack.enter_context(classifier.network.register_forward_hook(count_inputs))
        # Some images take fewer passes: no markers to cover, no hot area to erase.
        yield bar, lambda: bar.update(max(0, next(done) * each - bar.n))


def told_results(jobs: Sequence[Job], request: Request, submit: Submit) -> Iterator[Result]:
    """Explain images; once its result has been taken, say what became of each, beside the bar."""
    with progress_bar(request, len(jobs)) as (bar, count_image):
        for result in written_results(explain_jobs(jobs, request, submit)):
            yield result
            notes = [] if request.args.quiet else note_lines(result.job.label, result.notes)
            for line in [*notes, f"❌ {result.error}"] if result.error else notes:
                bar.write(line, file=sys.stderr)
            if not result.error:
                for line in single_lines(result) if request.is_single else [result_line(result)]:
                    bar.write(line, file=sys.stdout)
                sys.stdout.flush()
            count_image()


# From Python: one radiograph, without a command line


def explain(
    classifier: Classifier, radiograph: Radiograph, method: str = "gradcam", target: int | None = None
) -> Explanation:
    """What a classifier says of a radiograph, of class `target` or the predicted one, with its checks."""
    inputs = network_input(radiograph, classifier.model.preprocessing)
    (explanation,) = explain_batch(classifier, [inputs], target, [method])
    evidence = Evidence(explanation, landmarks_of(radiograph))
    return dataclasses.replace(explanation, findings=findings_of(evidence))


def draw(
    explanation: Explanation, radiograph: Radiograph, name: str = "", style: FigureStyle = FigureStyle()
) -> bytes:
    """The 4-panel figure of an explanation as a file of the style's format, PNG unless it says another."""
    view = View(fitted(radiograph.pixels, style.dpi), name, style)
    return figure_bytes(explanation_figure(view, explanation), style)


def run(request: Request) -> int:
    """Do what is asked; the exit status."""
    args, job, checkpoints = request.args, request.jobs[0], request.checkpoints
    if request.is_single and args.skip_existing and job.outputs and is_finished(job):
        lines, status = [f"⏭️  Finished earlier, left alone: {shown(Path(job.label))}"], 0
    else:
        with contextlib.redirect_stdout(io.StringIO()) if args.quiet else contextlib.nullcontext():
            lines, status = explain_all(request)
    if is_demo(checkpoints[0][1]):  # what also a quiet run ends in
        lines += ["", f"⚠️  Demo {'networks' if len(checkpoints) > 1 else 'network'}: {DEMO_NOTICE}"]
    say(*lines)
    return status


def explain_all(request: Request) -> tuple[list[str], int]:
    """Explain every image; returns what to say last, and the exit status. One image is a run of one."""
    # Read when torch is imported: its threads then sleep while they wait, and leave the cores to the drawing.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    processes = 1 if request.is_single else os.cpu_count() or 1  # a second would not serve one image
    if not request.jobs[0].pages:
        processes = 0
    with drawing_pool(min(processes, MAX_DRAWING_PROCESSES), request.style) as submit:
        is_random, models = not request.args.image, len(request.checkpoints)
        say(*opening_lines(request.jobs, request.is_single, is_random, models))
        warn(*request.notes)
        request = with_networks(request)
        if request.is_single:
            (result,) = told_results(request.jobs, request, submit)
            return ([], 1) if result.error else (summary_lines(result), 0)
        try:
            return explain_many(request, submit)
        except KeyboardInterrupt:
            warn("⏹️  Interrupted; --skip-existing goes on from here")
            raise


def explain_many(request: Request, submit: Submit) -> tuple[list[str], int]:
    """Explain the images that no earlier run has finished; each one's row goes into the table at once."""
    args, models, folder = request.args, request.models, request.args.output_dir
    columns = table_columns(models, args.method)
    earlier = earlier_rows(folder, columns)
    rows, left = resumed(request.jobs, earlier if args.skip_existing else {})
    if rows:
        say(f"⏭️  Finished earlier, left alone: {len(rows)} images", "")
    observations: dict[str, list[Observation]] = defaultdict(list)
    started = time.monotonic()
    with contextlib.closing(told_results(left, request, submit)) as results:
        for result in results:
            rows.append(dict.fromkeys(columns, "") | table_row(result, models))
            add_row(folder, rows[-1], columns)
            for each in () if result.error else result.opinions:
                observations[each.model.family.key].append(observation(each, result.landmarks))
    spent = time.monotonic() - started
    kept, thumbnails = fold_table(folder, columns), {}
    for reference in filter(None, (classifier.reference for classifier in request.classifiers)):
        thumbnails |= zip(map(printable, reference.labels), reference.thumbnails)
    page = report_page(kept, models, observations, request.told, thumbnails)
    write_file(folder / REPORT_NAME, page.encode())
    failed = len([row for row in rows if row["error"]])
    lines = run_lines(rows, models, args.method, observations, len(left) - failed, spent)
    files = [f"Table: {shown(folder / TABLE_NAME)}", f"Report: {shown(folder / REPORT_NAME)}"]
    return [*lines, *files], 1 if failed else 0


def resumed(jobs: Sequence[Job], earlier: dict[str, Row]) -> tuple[list[Row], list[Job]]:
    """The earlier rows that say what their jobs would say again, and the jobs that are left."""
    rows, left = [], []
    for job in jobs:
        row = earlier.get(os.path.abspath(job.label), {"error": "none"})
        is_same = not row["error"] and (row["digest"], row["true_class"]) == (job.digest, job.truth.name)
        if is_same and is_finished(job):
            rows.append(row)
        else:
            left.append(job)
    return rows, left


# Command line -------------------------------------------------------------------------------------

VERSION = "1.0"
EXAMPLES = """examples:
  python3 explainability.py
  python3 explainability.py --image path/to/xray.jpg
  python3 explainability.py --image path/to/xray.jpg --model convnext
  python3 explainability.py --image path/to/xray.jpg --target-class "Simple Fracture"
  python3 explainability.py --image path/to/xray.jpg --method gradcam ig lrp
  python3 explainability.py --image data_original/test --skip-existing
  for img in data_original/test/*/*.jpg; do python3 explainability.py --image "$img"; done
"""


class OneLineParser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"❌ {message}; --help lists the options\n")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{brief(text)} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def colormap_name(text: str) -> str:
    """An argparse type: a colormap of matplotlib, which is imported only for other names than jet."""
    if text != "jet" and text not in plain_matplotlib().colormaps:
        some = "viridis, magma, gray ... are there"
        raise argparse.ArgumentTypeError(f"matplotlib has no colormap {text!r}; {some}")
    return text


def class_list(text: str) -> tuple[str, ...]:
    """An argparse type: names of classes between commas."""
    names = tuple(name.strip() for name in text.split(","))
    if not are_class_names(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not two or more different names between commas")
    return names


def method_list(text: str) -> list[str]:
    """An argparse type: one method, or more between commas."""
    keys = [key for key in text.split(",") if key]
    for key in keys:
        if key not in METHODS:
            near = near_text(difflib.get_close_matches(key, METHODS, 1))
            raise argparse.ArgumentTypeError(f"{brief(key)} is none of {', '.join(METHODS)}{near}")
    return keys


def device_name(text: str) -> str:
    """An argparse type: auto, cpu, mps, cuda, or one of several GPUs as cuda:1."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{brief(text)} is none of auto, cpu, cuda, cuda:1 ..., mps")
    return text


def argument_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        description="Show where bone-fracture classifiers look, with Grad-CAM.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the versions of tool and libraries")
    add_questions(parser)
    add_outputs(parser)
    return parser


def add_questions(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what to explain").add_argument
    add("--image", nargs="+", action="extend", metavar="PATH",
        help="X-ray images, folders or quoted patterns (default: a random test image)")
    add("--model", choices=[*FAMILIES, "both"], default="both", help="which model to analyze (default: both)")
    add("--compare", action="store_true", help="both models and their comparison, whatever --model says")
    add("--method", nargs="+", action="extend", type=method_list, metavar="METHOD",
        help=f"how to explain, one or more of {', '.join(METHODS)} (default: gradcam)")
    add("--target-class", metavar="CLASS",
        help="name or index of the class to explain (default: the predicted class)")
    add("--seed", type=whole_number(0, 2**63), metavar="N",
        help="repeat the choice of the random test image")
    add = parser.add_argument_group("networks").add_argument
    for key in FAMILIES:
        add(f"--{key}-checkpoint", type=Path, metavar="FILE",
            help=f"or a folder with config.json (default: checkpoints/{key}*)")
    add("--class-names", type=class_list, metavar="A,B",
        help="classes in the order of the outputs, for checkpoints that record none")
    add("--weights", choices=("ema", "plain"), default="ema",
        help="which to take where averaged and plain ones lie side by side (default: ema)")
    add("--device", type=device_name, default="auto",
        help="where to compute: auto, cpu, cuda, cuda:1 ..., mps (default: auto)")
    add("--batch-size", type=whole_number(1, 4096), metavar="N",
        help="images computed at once (default: 4, on a GPU 32)")
    add = parser.add_argument_group("checks").add_argument
    add("--verify", action="store_true",
        help="ask the networks again, markers covered or added, hot areas erased: "
             f"up to {MOST_TRIALS} passes each")
    add("--reference", type=Path, metavar="FOLDER",
        help="images that the networks are meant for, in a folder for each class: tells what is unlike "
             "them, and similar cases (default: the demo networks' own)")
    add("--truth", "--boxes", type=Path, metavar="CSV",
        help="table of true classes and fractures: file and any of class,x0,y0,x1,y1 "
             "(default: folders' names, and the test images' own)")  # fmt: skip


def add_outputs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("outputs").add_argument
    add("--output-dir", type=Path, default=OUTPUT_FOLDER, metavar="DIR",
        help="where results go (default: explainability_outputs)")
    add("--colormap", type=colormap_name, default="jet", metavar="NAME",
        help="any matplotlib colormap (default: jet; viridis is perceptually uniform)")
    add("--signed", action="store_true", help="draw evidence for and against the class, not the first alone")
    add("--dpi", type=whole_number(30, 1200), default=150, metavar="N",
        help="resolution of the figures (default: 150)")
    add("--format", choices=("png", "pdf", "svg"), default="png",
        help="kind of the figures' files; pdf and svg for print (default: png)")
    add("--contours", action="store_true", help="lines of equal heat over the radiograph, not colours")
    add("--save-panels", action="store_true",
        help="also write radiograph, heatmap and overlay as bare pictures of the radiograph's size")
    add("--no-figures", action="store_true", help="numbers alone")
    add("--save-maps", action="store_true",
        help="also write the raw maps, before the ReLU, as .npy with a .json beside each")
    add("--anonymous", action="store_true",
        help="name images by their content's checksum, not by their files' names")
    add("--skip-existing", action="store_true", help="leave images alone that an earlier run finished")
    add("--quiet", action="store_true", help="print only the final summary, warnings and errors")  # fmt: skip


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; ends with 2 where they are wrong, and names the options that may be meant."""
    parser = argument_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        word = printable(unknown[0])
        name, near = word.partition("=")[0].lstrip("-"), [f"--image {word}"]
        if word.startswith("-"):
            options = sorted(set(re.findall(r"--[a-z-]+", parser.format_help())))
            start = f"--{name}" if len(name) < 4 else name  # short ones lie in too many
            near = [each for each in options if start in each]
            near = near or difflib.get_close_matches(f"--{name}", options, 1)
        parser.error(f"unrecognized arguments: {' '.join(map(printable, unknown))}{near_text(near)}")
    args.method = list(dict.fromkeys(itertools.chain(*args.method or [["gradcam"]])))
    return args


def near_text(near: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(near)}?" if near else ""


def options_text(args: argparse.Namespace) -> str:
    """What was asked of the networks and the figures, beside images, files and what is the default."""
    usual, told = vars(argument_parser().parse_args([])), [f"method {' '.join(args.method)}"]
    for name in "target_class weights reference verify signed contours colormap format".split():
        if vars(args).get(name) != usual.get(name):
            told.append(f"{name.replace('_', ' ')} {vars(args)[name]}")
    return ", ".join(told)


def version_lines() -> list[str]:
    told = [f"explainability.py {VERSION}", f"Python {platform.python_version()}"]
    return [*told, *(f"{name} {version(name)}" for name in LIBRARIES)]


def images_below(folder: Path, results: Path | None = None) -> list[Path]:
    """Images below a folder, sorted, but no results. Raises ExplainError where it cannot be searched."""

    def refuse(error: OSError) -> None:
        cause = f"cannot be searched ({error.strerror})"
        raise refusal(Path(error.filename), cause, "check its path and mode, or name the other folders")

    start, own = os.path.realpath(folder), os.path.realpath(results) if results else ""
    paths, searched = [], {*map(str, Path(start).parents), own} - {start}
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in searched:  # a link there would come round again
            folders.clear()
            continue
        searched.add(real)
        folders.sort(key=lambda name: (os.path.islink(os.path.join(parent, name)), name))
        if real != own:
            paths += [Path(parent, name) for name in names]
    return sorted(path for path in paths if is_dicom(path) or path.suffix.lower() in IMAGE_SUFFIXES)


def is_dicom(path: Path) -> bool:
    """Whether a file without a suffix, or with a UID for a name, as DICOM files often are, is one."""
    if not path.suffix or path.suffix[1:].isdecimal():
        with contextlib.suppress(ExplainError, OSError), open_regular(path) as file:
            return kind_of(file.read(HEAD_BYTES)).use == "dicom"
    return False


def found_images(arguments: Sequence[str], output_folder: Path) -> list[Path]:
    """The images that --image names, each once; folders and patterns sorted. Raises ExplainError for none."""
    images: list[Path] = []
    for text in arguments:
        if not text:  # as from a variable of the shell that is not set
            raise ExplainError("--image: an empty path; name an image or a folder")
        if re.match(r"[a-z]+://", text, re.IGNORECASE):
            raise ExplainError(f"{printable(text)}: URLs are not read; download the image and name its file")
        if os.path.isdir(text):
            found = images_below(Path(text), output_folder)
        elif glob.has_magic(text) and not os.path.lexists(text):
            found = sorted(Path(each) for each in glob.glob(text, recursive=True) if os.path.isfile(each))
        else:
            found = [Path(text)]
        if not found:
            cause = "no image found there, beside this tool's own results"
            remedy = f"name a folder or pattern with files that end in {', '.join(IMAGE_SUFFIXES)}"
            raise refusal(Path(text), cause, remedy)
        images += found
    return list({os.path.abspath(image): image for image in reversed(images)}.values())[::-1]


def without_other_files(images: list[Path], named: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Images less what is none, unless named by itself; and a line that counts it. Raises ExplainError."""
    others = {path for path in images if str(path) not in named and is_no_radiograph(path)}
    if not others:
        return images, []
    left = [path for path in images if path not in others]
    names = listed([path.name for path in images if path in others])
    if not left:
        raise refusal(images[0].parent, f"no radiograph there, only {names}", "name others")
    return left, [f"ℹ️  passed over, as no radiographs: {names}"]


def random_test_image(seed: int | None) -> Path:
    """One of data_original/test/*/, the same for the same seed. Raises ExplainError where there is none."""
    paths = sorted(path for path in TEST_IMAGES.glob("*/*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise refusal(TEST_IMAGES, "no test images there", "give one with --image")
    return random.Random(seed).choice(paths)


def chosen_checkpoints(args: argparse.Namespace) -> tuple[list[tuple[Family, Path]], list[str]]:
    """The checkpoint of each model that is asked for, and what to say of the choice: the one network of the
    user's is explained alone. Raises ExplainError where one is missing, or would be compared with a demo."""
    keys = list(FAMILIES) if args.compare or args.model == "both" else [args.model]
    named = {key: weights_file(path) for key in keys if (path := vars(args)[f"{key}_checkpoint"])}
    found = {key: candidates(FAMILIES[key], CHECKPOINT_FOLDER) for key in keys}
    found |= {key: [path] for key, path in named.items()}
    own = [key for key in keys if not all(map(is_demo, found[key]))]
    is_alone = len(own) == 1 < len(keys) and set(named) <= set(own) and not args.compare
    keys = own if is_alone else keys
    paths = {key: named.get(key) or find_checkpoint(FAMILIES[key], CHECKPOINT_FOLDER) for key in keys}
    for path in paths.values():
        check_checkpoint_path(path)
    demos = [path for path in paths.values() if is_demo(path)]
    if demos and own and not is_alone:
        cause = f"cannot be compared with {shown(demos[0])}, a demo network trained on synthetic radiographs"
        raise refusal(paths[own[0]], cause, "add the missing checkpoint, or choose one network with --model")
    alone = "explained alone, as no other network of yours is beside it"
    notes = [f"ℹ️  {shown(paths[own[0]])}: {alone}"] if is_alone else []
    return [(FAMILIES[key], path) for key, path in paths.items()], notes


def make_jobs(
    images: list[Path], keys: list[str], args: argparse.Namespace, truths: dict[str, Truth], asked: object
) -> list[Job]:
    """A job for each image; `asked` is all that results depend on beside it. Raises ExplainError where an
    output would replace an image of the run, or another output."""
    made = list(itertools.product(keys, args.method))
    figures = {} if args.no_figures else page_prefixes(keys, args.method)
    maps = [prefix_of("map", method, key) for key, method in made] if args.save_maps else []
    bare = [prefix_of(kind, method, key) for key, method in made for kind in ("heatmap", "overlay")]
    panels, folder = ["radiograph", *bare] if args.save_panels else [], args.output_dir
    labels = numbered(map(content_label, images)) if args.anonymous else list(map(str, images))
    jobs = [
        Job(
            image=image,
            label=label,
            name=name,
            pages=tuple(Page(folder / f"{start}_{stem}.{args.format}", figures[start]) for start in figures),
            maps=tuple(folder / f"{start}_{stem}.npy" for start in maps),
            panels=tuple(folder / f"{start}_{stem}.png" for start in panels),
            digest=digest_of(asked, file_mark(image)),
            truth=truths.get(os.path.realpath(image), Truth()),
        )
        for image, label, name, stem in zip(images, labels, display_names(labels), output_stems(labels))
    ]
    inputs = {os.path.realpath(image) for image in images}
    outputs = itertools.chain([folder / TABLE_NAME, folder / REPORT_NAME], *(job.outputs for job in jobs))
    for path, times in Counter(outputs).items():
        if os.path.realpath(path) in inputs:
            cause = "is an input of this run and would be replaced"
            raise refusal(path, cause, "choose another --output-dir")
        if times > 1:  # comparison_ig_x: of x by Integrated Gradients, or of ig_x by Grad-CAM
            raise refusal(path, "two results of this run would have this name", "run one --method at a time")
    return jobs


def checked_request(args: argparse.Namespace) -> Request:
    """What the arguments ask for. Raises ExplainError for all that files alone can tell."""
    images = found_images(args.image, args.output_dir) if args.image else [random_test_image(args.seed)]
    images, passed_over = without_other_files(images, args.image or [])
    is_single = not args.image or (len(args.image) == 1 and images == [Path(args.image[0])])
    if is_single:
        check_image_path(images[0])
    checkpoints, notes = chosen_checkpoints(args)
    notes += passed_over
    check_output_folder(args.output_dir)
    style = FigureStyle(args.colormap, args.dpi, args.format, args.contours, args.signed)
    if args.signed and args.colormap != "jet":
        notes.append(f"ℹ️  --colormap {args.colormap}: not used, as --signed has colours of its own")
    truths, table, missing = known_truth(args.truth, images, args.anonymous)
    reference = images_below(args.reference) if args.reference else []
    marks = [file_mark(path.with_name("config.json")) for _, path in checkpoints]
    marks += [(family.key, file_mark(path)) for family, path in checkpoints]
    if not args.reference:
        marks += [file_mark(own_reference(family)) for family, _ in checkpoints]
    question = args.weights, args.target_class, args.class_names, tuple(args.method), style, args.verify
    asked = marks, question, table, stamps(reference)
    jobs = make_jobs(images, [family.key for family, _ in checkpoints], args, truths, asked)
    told = () if is_single else (options_text(args), ", ".join(version_lines()))
    return Request(args, jobs, is_single, checkpoints, style, notes + missing, reference, told)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: returns the exit status. What nobody foresaw is a fault and shows its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an emoji that the terminal lacks becomes "?"
    try:
        with warnings.catch_warnings(action="ignore"):  # of libraries, for their programmers
            args = parsed(argv)
            if args.version:
                say(*version_lines())
                return 0
            return run(checked_request(args))
    except ExplainError as error:
        warn(f"❌ {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except Exception as error:
        if lacks_memory(error):
            warn("❌ memory: not enough; close programs, take smaller --batch-size or --dpi, or --device cpu")
        elif isinstance(error, ImportError):
            what = printable(error.name or "a library")
            warn(f"❌ {what}: cannot be imported ({brief(str(error))}); pip install -r requirements.txt")
        else:
            raise
        return 1


def leave(status: int) -> NoReturn:
    """End at once: what is written is written, and Python's own way out of torch takes half a second."""
    with contextlib.suppress(OSError):  # a reader that has gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    gc.disable()  # what torch and timm bring stays: looking through it while it comes takes a second
    for ending in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP; under nohup it is ignored, and stays so
        if hasattr(signal, ending) and signal.getsignal(getattr(signal, ending)) == signal.SIG_DFL:
            # As after Ctrl-C, so that nothing half done stays behind.
            signal.signal(getattr(signal, ending), lambda number, frame: sys.exit(128 + number))
    try:
        leave(main())
    except SystemExit as ended:
        leave(ended.code)

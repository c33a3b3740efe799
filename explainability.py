#!/usr/bin/env python3
"""Show where bone-fracture classifiers look, with Grad-CAM.

    python3 explainability.py
    python3 explainability.py --image xray.jpg
    python3 explainability.py --image xray.jpg --model convnext

Grad-CAM: R. R. Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via
Gradient-based Localization", ICCV 2017. Equation numbers below are that paper's.

Glossary
    H, W          height and width of the radiograph, pixels, upright
    h, w          height and width of the target layer's grid, cells
    B, C, K       images in a batch, channels of the target layer, classes
    activations   output of the target layer, (B, C, h, w)
    logits        class scores before the softmax, (B, K)
    gradients     d logit / d activations, (B, C, h, w)
    raw map       weighted sum of the activations before the ReLU, signed, (h, w)
    heatmap       the raw map after ReLU and division by its maximum, float32 in [0, 1], (h, w)
    probability   softmax of the logits, in [0, 1]; percent only in text

Exit status: 0 done; 1 something named could not be used, with one line on stderr; 2 the command
line is wrong; 130 interrupted; 141 standard output closed; 143 terminated.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import functools
import glob
import hashlib
import io
import itertools
import json
import logging
import multiprocessing
import operator
import os
import random
import re
import secrets
import signal
import stat
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# torch and timm take seconds to import and matplotlib nearly one. The functions that need them
# import them on their first line, so that --help and a wrong path are answered at once.
if TYPE_CHECKING:
    import torch
    from matplotlib.artist import Artist
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from pydicom import Dataset
    from tqdm import tqdm

# ------------------------------------------------------------------------------------------
# Constants
# ------------------------------------------------------------------------------------------

PROJECT = Path(__file__).resolve().parent
CHECKPOINT_FOLDER = PROJECT / "checkpoints"
TEST_IMAGES = PROJECT / "data_original" / "test"
OUTPUT_FOLDER = PROJECT / "explainability_outputs"

CLASS_NAMES = ("Comminuted Fracture", "Simple Fracture")  # index = output of the networks
INPUT_SIZE = 224  # pixels a side: both networks were trained on squashed squares
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1]; EfficientNetV2 too was trained with
IMAGENET_STD = (0.229, 0.224, 0.225)  # these, although timm's default for it says 0.5

CHECKPOINT_SUFFIXES = (".pth", ".pt", ".safetensors")
MODEL_KEYS = ("model_state_dict", "state_dict", "model", "net")  # where trainers put the weights, in order
EMA_KEYS = ("model_ema", "ema_state_dict", "state_dict_ema", "ema")  # the same, averaged over the training
WRAPPER_PREFIX = re.compile(r"^(module\.|_orig_mod\.)+")  # of DataParallel and of torch.compile
NUMBER_KINDS = ("float32", "float16", "bfloat16", "float64", "int64")  # int64: counters of batches
INPUT_SIZES = range(64, 1025, 32)  # pixels a side: both families halve it five times
MAX_CLASSES = 100
MAX_NAME = 200  # characters of a class name
DEMO_SUFFIX = "_demo.pth"
DEMO_NOTICE = "trained on synthetic radiographs; shows how the tool works; says nothing about real patients"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".dcm")
IMAGE_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF")  # what Pillow may decode; never EPS
MAX_PIXELS = 100_000_000  # of one image; the largest radiographs have 25 million
HEAD_BYTES = 1024  # enough to tell what a file is
DICOM_MARK = slice(128, 132)  # where "DICM" stands
DICOM_DECODERS = "pip install pylibjpeg pylibjpeg-openjpeg pylibjpeg-libjpeg"
DAMAGED = "damaged or cut short; copy it again from where it came, or export it as PNG"
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's, for more than 8 bits of grey
BITS, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 258, 262, 284, 339  # TIFF tags
FILE_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
NOT_IMAGES = tuple(  # start of the file, what it is, remedy; the first that fits counts
    (re.compile(start, re.IGNORECASE | re.DOTALL), what, remedy)
    for start, what, remedy in (
        (LFS_POINTER, "a Git LFS pointer: the repository was cloned without Git LFS", "run git lfs pull"),
        (rb"%PDF-", "a PDF document", "export its page as PNG"),
        (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript (EPS) file", "export it as PNG"),
        (rb"PK[\x03\x05]", "a zip archive", "unpack it and give one image"),
        (rb".{4}ftyp(hei|hev|mif|msf)", "a HEIC image", "convert it to PNG or JPEG"),
        (rb"(<\?xml.*|<!doctype |<!--.*)?<?svg", "an SVG drawing", "export it as PNG"),
        (rb"(<\?xml.*|<!--.*)?<(!doctype html|html|head|body)", "an HTML page", "download the image itself"),
        (rb"(\{\s*[\"}]|\[\s*[\[{\"\d\]-])[^\x00]*$", "JSON", "give an image file"),
    )
)
NOT_CHECKPOINTS = (  # start of the file, what it is; beside those above
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"GIF8", "a GIF image"),
    (b"RIFF", "a WebP image or a sound"),
    (b"<?xml", "an XML document"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes"),
    (b"\x93NUMPY", "a NumPy array"),
)

ROUNDING = 8 * float(np.finfo(np.float32).eps)  # relative error of a few float32 operations

PANEL_INCHES = 4.1  # a side of a panel; a radiograph's longer side fills it
MAX_LISTED_CLASSES = 3  # probabilities that the details panel has room for
OVERLAY_WEIGHT = 0.45  # share of the heatmap's colour in the overlay
PNG_LEVEL = 1  # zlib level; higher ones cost more time than they save space here
MAX_STEM_BYTES = 220  # file systems allow 255; the rest is for gradcam_efficientnet_, .png and a number
MARKED_BYTES = 1_000_000  # at each end of a file
PROBE_BYTES = 4_000_000  # room that an output folder must have: the figures of one image

DEFAULT_BATCH = {"cpu": 4, "cuda": 32, "mps": 32}  # images; larger ones gain no speed and take memory
MAX_DRAWING_PROCESSES = 8
MAX_WAITING_JOBS = 24  # explained images whose figures are not drawn yet
RULE = "=" * 80


# ------------------------------------------------------------------------------------------
# Records
# ------------------------------------------------------------------------------------------


class ExplainError(Exception):
    """Something named on the command line cannot be used; the text is one line for the user."""


@dataclass(frozen=True)
class Family:
    """One kind of network that the tool can explain."""

    key: str  # value of --model, start of the checkpoint's name, part of the figure's name
    title: str  # {size} stands for the size in the architecture's name
    full_size: str  # timm name of what a checkpoint without a name holds
    names: re.Pattern[str]  # timm names accepted from a checkpoint; group 1 is the size
    landmark: str  # a key that weights of this family have and of others have not
    head: str  # dotted path of the last layer, one output a class
    target_layer: str  # dotted path for torch.nn.Module.get_submodule
    bullet: str


FAMILIES = {
    family.key: family
    for family in (
        Family(
            key="convnext",
            title="ConvNeXt V2",
            full_size="convnextv2_base.fcmae_ft_in22k_in1k",
            names=re.compile(r"convnextv2_(atto|femto|pico|nano|tiny|small|base|large|huge)(\.[a-z0-9_]{1,60})?"),
            landmark="stages.0.blocks.0.mlp.grn.weight",
            head="head.fc",
            target_layer="stages.3",  # the last stage
            bullet="🔵",
        ),
        Family(
            key="efficientnet",
            title="EfficientNetV2-{size}",
            full_size="tf_efficientnetv2_s.in21k_ft_in1k",
            names=re.compile(r"tf_efficientnetv2_(s|m|l|xl|b[0-3])(\.[a-z0-9_]{1,60})?"),
            landmark="conv_stem.weight",
            head="classifier",
            target_layer="conv_head",
            bullet="🟢",
        ),
    )
}


@dataclass(frozen=True)
class Radiograph:
    """An image as both the panels and the networks see it."""

    path: Path
    pixels: np.ndarray  # (H, W, 3) uint8, upright RGB
    notes: tuple[str, ...] = ()  # what was done to the file's values that its reader should know


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become the input of a network."""

    size: int = INPUT_SIZE  # pixels a side
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


@dataclass(frozen=True)
class Classifier:
    """A network with its weights, ready to explain."""

    family: Family
    title: str
    architecture: str  # timm name
    checkpoint: Path
    accuracy: str  # what the checkpoint records, in words
    class_names: tuple[str, ...]  # K
    preprocessing: Preprocessing
    network: torch.nn.Module  # float32, eval mode, no parameter requires a gradient
    notes: tuple[str, ...] = ()  # what was done in loading, beyond the ordinary

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device


@dataclass(frozen=True)
class Finding:
    """What one check found about one map."""

    check: str  # key in CHECKS
    value: float  # the measured quantity; NaN where it cannot be measured
    is_flagged: bool
    text: str  # in words


@dataclass(frozen=True)
class Explanation:
    """What one classifier said about one radiograph, and where that came from."""

    title: str
    family: str
    architecture: str
    checkpoint: str
    accuracy: str
    target_layer: str
    is_demo: bool
    class_names: tuple[str, ...]
    probabilities: np.ndarray  # (K,) float32
    explained: int  # class whose score was explained
    raw_map: np.ndarray  # (h, w) float32, signed
    heatmap: np.ndarray  # (h, w) float32 in [0, 1]
    findings: tuple[Finding, ...] = ()  # one for each check that applies

    @property
    def predicted(self) -> int:
        return int(self.probabilities.argmax())

    @property
    def ranking(self) -> list[int]:
        """Classes from the likeliest to the least likely."""
        return (-self.probabilities).argsort(kind="stable").tolist()

    @property
    def prediction(self) -> str:
        return self.class_names[self.predicted]

    @property
    def confidence(self) -> float:
        return float(self.probabilities[self.predicted])

    @property
    def explained_text(self) -> str:
        """The explained class, with its probability where it is not the predicted one."""
        name = self.class_names[self.explained]
        return name if self.explained == self.predicted else f"{self.probabilities[self.explained]:.2%} {name}"

    @property
    def remark(self) -> str:
        """Why this map must not be read as usual; empty where it may."""
        if not self.heatmap.any():
            return f"Blank map: no positive evidence for {self.class_names[self.explained]}"
        if self.heatmap.min() == self.heatmap.max():
            return "Constant map: no place counts more than another"
        return ""


@dataclass(frozen=True)
class FigureStyle:
    """What the user may choose about figures."""

    colormap: str = "jet"
    dpi: int = 150


# ------------------------------------------------------------------------------------------
# Inputs: radiographs
# ------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Text with control characters and undecodable bytes shown as escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def class_key(name: str) -> str:
    """A class's name without case, spaces and punctuation: simple_fracture is Simple Fracture."""
    return re.sub(r"[\W_]+", " ", name).casefold().strip()


def shown(path: Path) -> str:
    """A path as messages name it: relative to the working directory where it lies below that."""
    with contextlib.suppress(ValueError, OSError):  # not below it; or it is gone
        path = Path(os.path.abspath(path)).relative_to(Path.cwd())
    return printable(str(path))


def random_test_image(seed: int | None) -> Path:
    """One of data_original/test/*/, the same for the same seed.

    Raises ExplainError where there is none.
    """
    paths = sorted(path for path in TEST_IMAGES.glob("*/*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ExplainError(f"{shown(TEST_IMAGES)}: no test images there; give one with --image")
    return random.Random(seed).choice(paths)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong inside into one ExplainError that starts with the path."""
    try:
        with silenced():
            yield
    except ExplainError as error:
        raise ExplainError(f"{shown(path)}: {error}") from error
    except MemoryError as error:
        raise ExplainError(f"{shown(path)}: too large for the memory of this computer; reduce it") from error
    # On broken files Pillow and pydicom let out nearly every type of exception there is, with
    # texts that may quote the file; so the type is not asked and the text not repeated.
    except Exception as error:
        raise ExplainError(f"{shown(path)}: {DAMAGED}") from error


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keep libraries' warnings and log lines off the terminal; they may quote patient data."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, without waiting on a pipe or a device.

    Raises ExplainError, without the path, for everything else.
    """
    try:
        check_regular(os.stat(path).st_mode)
        # A pipe that takes the file's place after the check must not block the opening.
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
        check_regular(os.fstat(file.fileno()).st_mode)
        return file
    except FileNotFoundError as error:
        cause = "a link to a file that is not there" if os.path.islink(path) else "no such file"
        raise ExplainError(f"{cause}; check the path") from error
    except PermissionError as error:
        raise ExplainError("no permission to read it; change its mode or copy it") from error
    except OSError as error:
        raise ExplainError(f"cannot be opened ({error.strerror}); check the path") from error
    except ValueError as error:  # a NUL byte in the path
        raise ExplainError("not a path that a file can have; check it") from error


def check_regular(mode: int) -> None:
    """Raise ExplainError unless a file's st_mode is that of a regular file."""
    if not stat.S_ISREG(mode):
        raise ExplainError(f"{FILE_KINDS.get(stat.S_IFMT(mode), 'a special file')}; give one file")


def content_start(head: bytes) -> bytes:
    """A file's first bytes from where its content begins."""
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()


def check_head(head: bytes) -> None:
    """Raise ExplainError, without the path, where a file's first bytes are those of no image."""
    if not head:
        raise ExplainError("an empty file; copy it again from where it came")
    if head[DICOM_MARK] == b"DICM":
        return
    for pattern, what, remedy in NOT_IMAGES:
        if pattern.match(content_start(head)):
            raise ExplainError(f"{what}; {remedy}")
    if is_text(head):
        raise ExplainError("a text file; give an image file")


def is_text(head: bytes) -> bool:
    """Whether the start of a file is UTF-16 with its mark, or UTF-8 without control characters."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return True
    text = head.decode("utf-8", errors="ignore")
    lost = len(head) - len(text.encode())  # a character cut at the end of the head may miss three bytes
    return lost <= 3 * (len(head) == HEAD_BYTES) and all(sign.isprintable() or sign.isspace() for sign in text)


def check_image_path(path: Path) -> None:
    """Raise ExplainError unless `path` is a file whose first bytes may be those of an image."""
    with naming(path), open_regular(path) as file:
        check_head(file.read(HEAD_BYTES))


def load_radiograph(path: Path) -> Radiograph:
    """Read an image or DICOM file, told by its bytes, into upright 8-bit RGB.

    8-bit values stay as they are; `to_8_bits` says how deeper ones are scaled. Transparent pixels
    are laid over black, the background of radiographs. Of more frames, the first counts.

    Raises ExplainError where the file is not an image that can be decoded whole.
    """
    with naming(path), open_regular(path) as file:
        head = file.read(HEAD_BYTES)
        check_head(head)
        file.seek(0)
        pixels, notes = read_dicom(file) if head[DICOM_MARK] == b"DICM" else read_picture(file)
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    return Radiograph(path, pixels, tuple(notes))


def check_size(width: int, height: int) -> None:
    """Raise ExplainError for more pixels than a radiograph has, before they are decoded."""
    if width * height > MAX_PIXELS:
        raise ExplainError(f"{width} x {height} pixels, more than {MAX_PIXELS:,} in all; reduce it")


# From deep values to 8 bits


def to_8_bits(values: np.ndarray, left_out: np.ndarray | None = None) -> tuple[np.ndarray, list[str]]:
    """Values of any depth as uint8 of the same shape, with a note on what was done.

    uint8 stays as it is. Of all else the lowest value becomes 0 and the highest 255, linearly,
    halves rounded to even; unless these lie more than twice as far apart as the 1st and the 99th
    percentile (burned-in markers, dead pixels): then the percentiles are the ends, and what lies
    beyond is clipped. A constant becomes 127. Where the mask `left_out` is True, values do not
    count for the ends.

    Raises ExplainError where a value is NaN or infinite.
    """
    if values.dtype == np.uint8:
        return values, []
    counted = values if left_out is None else values[~left_out]
    if not np.isfinite(counted).all():
        raise ExplainError("NaN or infinite pixel values; export it again")
    if not counted.size:
        return np.zeros(values.shape, np.uint8), ["no pixel holds a value: shown black"]
    lowest, highest = float(counted.min()), float(counted.max())
    if lowest == highest:
        return np.full(values.shape, 127, np.uint8), [f"every value is {lowest:g}: shown as mid grey"]
    low, high = (float(end) for end in np.percentile(counted, (1, 99), method="nearest"))
    if low == high or highest - lowest <= 2 * (high - low):
        return scaled(values, lowest, highest), [f"values {lowest:g} to {highest:g} scaled to 8 bits"]
    beyond = f"{lowest:g} to {highest:g} in all"
    return scaled(values, low, high), [f"values {low:g} to {high:g} scaled to 8 bits, those beyond clipped ({beyond})"]


def scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """255 * (values - low) / (high - low), rounded and clipped to uint8; changes no input."""
    result = values.astype(np.float64)  # the one large copy: all steps work in place
    result -= low
    result *= 255
    result /= high - low
    np.clip(np.rint(result, out=result), 0, 255, out=result)
    return result.astype(np.uint8)


# Files that Pillow reads


def read_picture(file: BinaryIO) -> tuple[np.ndarray, list[str]]:
    """The first frame of an image file: (H, W) or (H, W, 3) uint8, upright, and notes.

    Raises ExplainError, without the path, for kinds that cannot be shown right; and whatever
    Pillow raises on damaged files.
    """
    with open_picture(file) as image:
        check_size(*image.size)
        frames = getattr(image, "n_frames", 1)
        notes = [f"first of {frames} frames"] if frames > 1 else []
        tags = dict(getattr(image, "tag_v2", {}))  # of TIFF; gone after loading
        deep_colour = holds_deep_colour(image, tags)
        image.load()
        upright = ImageOps.exif_transpose(image)
        values = grey_values(upright, tags)
        if values is None:
            pixels = colours(upright)
            if deep_colour and pixels.max() < 64:  # Pillow keeps only the upper 8 of 16 bits
                raise ExplainError("16-bit colour that uses only its lower bits; save it as 16-bit grey")
            return pixels, notes
    hidden = values == upright.info.get("transparency", np.nan)  # the one value that a PNG may hide
    pixels, scaling = to_8_bits(values, hidden)
    if tags.get(PHOTOMETRIC) == 0:  # white is zero; Pillow inverts 8 bits and fewer only
        pixels = 255 - pixels
    return np.where(hidden, np.uint8(0), pixels), notes + scaling


def open_picture(file: BinaryIO) -> Image.Image:
    """Read an image file's header. Raises ExplainError, without the path."""
    try:
        image = Image.open(file, formats=IMAGE_FORMATS)
        # Pillow has read up to the scan. Without an end mark behind it (a copy that broke off and
        # was filled with zeros), the decoder would invent the rest in grey.
        if image.format == "JPEG" and b"\xff\xd9" not in file.read():
            raise ExplainError(DAMAGED)
        return image
    except UnidentifiedImageError as error:
        raise ExplainError("not an image that can be read here, or its start is damaged; convert it to PNG") from error
    except Image.DecompressionBombError as error:
        raise ExplainError(f"more than {MAX_PIXELS:,} pixels; reduce it") from error


def holds_deep_colour(image: Image.Image, tags: dict[int, Any]) -> bool:
    """Whether a file not yet loaded has more than 8 bits a colour.

    Raises ExplainError for the one kind of these that Pillow decodes wrongly.
    """
    if tags.get(PLANAR) == 2 and max(tags.get(BITS, (8,))) > 8:
        raise ExplainError("16-bit colour in separate planes; save it as PNG")
    return image.mode not in DEEP_MODES and any(";16" in str(tile.args) for tile in image.tile)


def grey_values(image: Image.Image, tags: dict[int, Any]) -> np.ndarray | None:
    """(H, W) values that 8 unsigned bits cannot hold, or None where there are none."""
    sample_format = tags.get(SAMPLE_FORMAT, (1,))[0]
    if image.mode == "L" and sample_format == 2:
        return np.asarray(image).view(np.int8)  # Pillow reads the sign as 128
    if image.mode == "I" and tags.get(BITS) == (32,) and sample_format == 1:
        return np.asarray(image).view(np.uint32)  # Pillow reads the highest bit as a sign
    return np.asarray(image) if image.mode in DEEP_MODES else None


def colours(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of an image of at most 8 bits a colour, transparent parts over black."""
    if image.mode == "La":
        image = image.convert("LA")  # Pillow goes no other way from here
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    premultiplied = image.convert("RGBA").convert("RGBa")  # colour * opacity is what black lets through
    return np.ascontiguousarray(np.asarray(premultiplied)[:, :, :3])


# DICOM


def read_dicom(file: BinaryIO) -> tuple[np.ndarray, list[str]]:
    """The first frame of a DICOM file: (H, W) or (H, W, 3) uint8, and notes.

    Raises ExplainError, without the path; and whatever pydicom raises on damaged files.
    """
    try:
        import pydicom
    except ImportError as error:
        raise ExplainError("a DICOM file, which needs pydicom; pip install pydicom") from error
    dataset = pydicom.dcmread(file)
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise ExplainError("a DICOM file without an image in it; give one that holds the radiograph")
    check_size(dataset.Columns * dataset.SamplesPerPixel, dataset.Rows)
    stored = decoded(dataset)
    frames = int(dataset.get("NumberOfFrames") or 1)
    notes = [f"first of {frames} frames"] if frames > 1 else []
    pixels, scaling = dicom_grey(dataset, stored) if dataset.SamplesPerPixel == 1 else to_8_bits(stored)
    return pixels, notes + scaling


def decoded(dataset: Dataset) -> np.ndarray:
    """Stored values of the first frame, (H, W), or RGB (H, W, 3).

    Raises ExplainError, without the path, where no decoder for its compression is installed.
    """
    from pydicom.pixels import get_decoder, pixel_array

    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise ExplainError("compressed in a way that pydicom does not know; export it uncompressed") from error
    if not decoder.is_available:
        raise ExplainError(f"compressed as {syntax.name}, which needs a decoder; {DICOM_DECODERS}")
    try:
        return pixel_array(dataset, index=0)
    except RuntimeError as error:
        if not syntax.is_encapsulated:
            raise
        raise ExplainError(f"compressed as {syntax.name}, and damaged or in need of another decoder; {DICOM_DECODERS}") from error


def dicom_grey(dataset: Dataset, stored: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Stored values of one sample a pixel as they are meant to be seen: uint8, and notes.

    Modality LUT, then VOI LUT or first window, then MONOCHROME1 inverted (PS3.3 C.7.6.3, C.11.1
    and C.11.2); padding black. Without a usable LUT or window the rule of `to_8_bits`.
    """
    from pydicom.pixels import apply_color_lut

    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        return to_8_bits(apply_color_lut(stored, dataset))
    padding = padding_mask(dataset, stored)
    values = modality_values(dataset, stored)
    pixels, notes = windowed(dataset, values) or to_8_bits(values, padding)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        pixels = 255 - pixels
    return np.where(padding, np.uint8(0), pixels), notes


def modality_values(dataset: Dataset, stored: np.ndarray) -> np.ndarray:
    """Stored values through the modality LUT or the rescale; uint8 only where 8 bits are in use."""
    if dataset.get("ModalityLUTSequence"):
        return looked_up(dataset.ModalityLUTSequence[0], stored)[0]
    slope, intercept = first_number(dataset, "RescaleSlope"), first_number(dataset, "RescaleIntercept")
    if None not in (slope, intercept) and (slope, intercept) != (1, 0):
        return stored * slope + intercept
    return stored if dataset.get("BitsStored") == 8 else stored.astype(np.promote_types(stored.dtype, np.int16))


def padding_mask(dataset: Dataset, stored: np.ndarray) -> np.ndarray:
    """(H, W) bool: the pixels outside the radiograph (PS3.3 C.7.5.1.1.2)."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, bool)
    limit = dataset.get("PixelPaddingRangeLimit")
    ends = sorted((value, value if limit is None else limit))
    return (stored >= ends[0]) & (stored <= ends[1])


def windowed(dataset: Dataset, values: np.ndarray) -> tuple[np.ndarray, list[str]] | None:
    """uint8 through the first VOI LUT, else the first window, and a note; None where it shows nothing.

    pydicom's own functions are not used: they cut indices of 8-bit tables to 8 bits, and raise
    on windows of width zero, which some machines write.
    """
    if dataset.get("VOILUTSequence"):
        through, low, high = looked_up(dataset.VOILUTSequence[0], values)
        return (scaled(through, low, high), ["shown through its VOI LUT"]) if low < high else None
    centre, width = first_number(dataset, "WindowCenter"), first_number(dataset, "WindowWidth")
    shape = dataset.get("VOILUTFunction") or "LINEAR"
    if centre is None or width is None or not width > (shape == "LINEAR"):
        return None
    notes = [f"shown through its window, centre {centre:g} and width {width:g}"]
    if shape == "LINEAR":  # PS3.3 C.11.2.1.2.1; the others have neither shift
        centre, width = centre - 0.5, width - 1
    low, high = centre - width / 2, centre + width / 2
    if not (np.isfinite(width) and low < values.max() and high > values.min()):
        return None  # beside all values; or a value is NaN, which to_8_bits refuses
    if shape == "SIGMOID":
        return scaled(1 / (1 + np.exp(-4 * (values - centre) / width)), 0, 1), notes
    return scaled(values, low, high), notes


def looked_up(item: Dataset, values: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Values through a modality or VOI LUT (PS3.3 C.11.1.1), and its lowest and highest entry."""
    entries, first, _ = item.LUTDescriptor
    table = item.LUTData
    if isinstance(table, bytes):
        order = "<" if item.original_encoding[1] else ">"
        table = np.frombuffer(table, np.uint8 if len(table) < 2 * (entries or 65_536) else f"{order}u2")
    table = np.asarray(table, np.uint16)
    index = np.clip(values.astype(np.int64) - first, 0, len(table) - 1)
    return table[index], int(table.min()), int(table.max())


def first_number(dataset: Dataset, name: str) -> float | None:
    """The first of an attribute's values, or None where it has none."""
    value = dataset.get(name)
    numbers = [] if value is None else np.ravel(value)
    return float(numbers[0]) if len(numbers) else None


# What the networks see


def network_input(radiograph: Radiograph, preprocessing: Preprocessing) -> np.ndarray:
    """Squash-resize (bilinear, antialiased) and normalise: (3, size, size) float32.

    Equals torchvision's Resize((size, size)) + ToTensor + Normalize(mean, std).
    """
    side = (preprocessing.size, preprocessing.size)
    small = Image.fromarray(radiograph.pixels).resize(side, Image.Resampling.BILINEAR)
    scaled = np.asarray(small, dtype=np.float32) / np.float32(255)
    mean, std = np.float32(preprocessing.mean), np.float32(preprocessing.std)
    return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1))


# ------------------------------------------------------------------------------------------
# Models
# ------------------------------------------------------------------------------------------


def is_demo(checkpoint: Path) -> bool:
    return checkpoint.name.endswith(DEMO_SUFFIX)


def find_checkpoint(family: Family, folder: Path) -> Path:
    """The one checkpoint of a family in a folder; the demo only where there is no other.

    Raises ExplainError where there is none or more than one.
    """
    candidates = sorted(path for path in folder.glob(f"{family.key}*") if path.suffix in CHECKPOINT_SUFFIXES)
    own = [path for path in candidates if not is_demo(path)]
    found = own or candidates
    option = f"--{family.key}-checkpoint"
    if not found:
        raise ExplainError(f"{shown(folder)}: no {family.key}* checkpoint there; put one in or name it with {option}")
    if len(found) > 1:
        names = ", ".join(printable(path.name) for path in found)
        raise ExplainError(f"{shown(folder)}: more than one {family.key} checkpoint ({names}); choose with {option}")
    return found[0]


def check_not_mixed(checkpoints: Sequence[Path]) -> None:
    """Raise ExplainError where a user's network would be compared with a demo network."""
    demos = [path for path in checkpoints if is_demo(path)]
    if demos and len(demos) < len(checkpoints):
        (own,) = (path for path in checkpoints if not is_demo(path))
        raise ExplainError(
            f"{shown(own)} and {shown(demos[0])}: a network of yours and a demo network "
            "(trained on synthetic radiographs) cannot be compared; "
            "add the missing checkpoint, or choose one network with --model"
        )


def refusal(path: Path, cause: str, remedy: str) -> ExplainError:
    return ExplainError(f"{shown(path)}: {cause}; {remedy}")


def brief(value: object) -> str:
    """An untrusted value for a message: short, on one line, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 64:  # Python cannot print every one of them
        return "a number of more than 19 digits"
    if isinstance(value, (str, int, float)):
        return printable(repr(value[:80] if isinstance(value, str) else value))
    return f"a {type(value).__name__}"


def listed(items: Sequence[str]) -> str:
    """How many, and the first three."""
    return f"{len(items)} ({', '.join(printable(item[:160]) for item in items[:3])}{', …' if len(items) > 3 else ''})"


def kind_of(head: bytes) -> str:
    """What a file is that starts with `head` and is no checkpoint, in words."""
    start = content_start(head)
    kinds = [what for pattern, what, _ in NOT_IMAGES if pattern.match(start)]
    kinds += [what for signature, what in NOT_CHECKPOINTS if start.startswith(signature)]
    return (kinds + ["a text file" if is_text(head) else "a file of an unknown kind"])[0]


def container_of(head: bytes) -> str:
    """The container that a checkpoint starting with `head` has; empty for what is no checkpoint."""
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(b"\x80"):  # what torch.save wrote before version 1.6
        return "pickle"
    # The length of the header, which safetensors limits to 100 MB, then a JSON object.
    is_safetensors = head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000
    return "safetensors" if is_safetensors else ""


def check_checkpoint_path(path: Path) -> str:
    """The container of a checkpoint file, as far as can be told without torch.

    Raises ExplainError where the file cannot be a checkpoint, and says what it is instead.
    """
    try:
        with open_regular(path) as file:
            head = file.read(HEAD_BYTES)
    except ExplainError as error:
        raise ExplainError(f"{shown(path)}: {error}") from error
    container = container_of(head)
    if not head:
        raise refusal(path, "an empty file", "copy or download the checkpoint again")
    if not container:
        remedy = "run git lfs pull" if head.startswith(LFS_POINTER) else "give a file that torch.save wrote, or a .safetensors file"
        raise refusal(path, f"{kind_of(head)}, not a checkpoint", remedy)
    if container == "zip":
        check_archive(path)
    return container


def check_archive(path: Path) -> None:
    """Raise ExplainError where a zip archive is not one of uncompressed weights from torch.save."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile lets out more than BadZipFile on damaged archives
        raise refusal(path, "an incomplete or damaged archive", "copy or download the checkpoint again") from error
    names = {entry.filename.partition("/")[2] for entry in entries}
    if "constants.pkl" in names:
        raise refusal(path, "a TorchScript archive, which holds code", "save the network's state_dict() with torch.save instead")
    if "data.pkl" not in names:
        raise refusal(path, "a zip archive without weights", "give a file that torch.save wrote, or a .safetensors file")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):  # could unpack to any size
        raise refusal(path, "a compressed archive, which torch.save never writes", "save the checkpoint again with torch.save")


def read_checkpoint(path: Path) -> tuple[dict[Any, Any], list[str]]:
    """Load a checkpoint file without running code from it: its contents, and what was done.

    Raises ExplainError where it is not a checkpoint or holds more than tensors and plain values.
    """
    container = check_checkpoint_path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about tensors that are refused below
            contents, notes = read_safetensors(path) if container == "safetensors" else read_torch(path, container)
    except MemoryError as error:
        raise refusal(path, "too large for the memory of this computer", "close other programs") from error
    except Exception as error:  # torch lets out KeyError, EOFError, UnpicklingError; damaged files anything
        raise refusal(path, *why_unreadable(error)) from error
    if not isinstance(contents, dict):
        raise refusal(path, f"holds {brief(contents)}, not a dictionary of weights", "save the network's state_dict()")
    return contents, notes


def why_unreadable(error: Exception) -> tuple[str, str]:
    """Cause and remedy for a file that torch rejects; not in its words, which advise to run the code."""
    if isinstance(error, UnicodeEncodeError):
        return "its name is not valid Unicode, so that torch cannot open it", "rename it"
    found = re.search(r"GLOBAL ([\w.]{1,80})", str(error))
    if not found:
        return f"damaged, or not written by torch.save ({type(error).__name__})", "copy or download the checkpoint again"
    cause = f"holds an object ({found.group(1)}) that only code from the file could restore, and none is run"
    if found.group(1).startswith("numpy"):
        return cause, "save it again with plain numbers, such as float(val_acc), in place of NumPy's"
    return cause, "save it again with state_dict() and plain values only"


def read_torch(path: Path, container: str) -> tuple[Any, list[str]]:
    """What torch.save wrote; memory-mapped where it can be, so that the optimizer's state is never read."""
    import torch

    origins = set()

    def on_cpu(storage: Any, origin: str) -> Any:
        origins.add(origin)
        return storage

    if b"bytearray\n" in pickled_part(path, container):  # the call that torch permits and that fills any memory
        raise ValueError("GLOBAL bytearray")
    contents = torch.load(path, map_location=on_cpu, weights_only=True, mmap=container == "zip")
    notes = ["container of PyTorch before 1.6 read whole"] if container == "pickle" else []
    elsewhere = sorted(printable(origin) for origin in origins if origin != "cpu")
    return contents, notes + [f"tensors saved on {origin} read on the CPU" for origin in elsewhere[:3]]


def pickled_part(path: Path, container: str) -> bytes:
    """The bytes of a file from torch.save that hold its structure; the older container does not part them."""
    if container == "pickle":
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return b"".join(archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))


def read_safetensors(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Weights from a .safetensors file, with its metadata (texts; JSON where they are that)."""
    from safetensors import safe_open

    def plain(text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            return text

    with safe_open(path, framework="pt", device="cpu") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}
        metadata = {key: plain(text) for key, text in (file.metadata() or {}).items()}
    return {**metadata, MODEL_KEYS[0]: weights}, ["weights read from a safetensors file"]


def recorded(contents: dict[Any, Any], name: str) -> Any:
    """What a checkpoint records under a name, itself or in its config; None where it does not."""
    config = contents.get("config")
    found = contents.get(name)
    return config.get(name) if found is None and isinstance(config, dict) else found


def weights_of(contents: dict[Any, Any], path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The network's tensors from wherever trainers put them, and what was done to get them.

    Raises ExplainError where there are none.
    """
    import torch

    def tensors(value: object) -> dict[str, torch.Tensor]:
        items = value.items() if isinstance(value, dict) else ()
        return {key: item for key, item in items if isinstance(key, str) and isinstance(item, torch.Tensor)}

    places = {key: tensors(contents.get(key)) for key in MODEL_KEYS}
    places["the top level"] = tensors(contents)
    places |= {key: tensors(contents.get(key)) for key in EMA_KEYS}
    filled = [place for place, weights in places.items() if weights]
    if not filled:
        cause = f"holds no weights under {', '.join(MODEL_KEYS)} or at its top level"
        raise refusal(path, cause, "save the network's state_dict()")
    taken, *others = filled
    notes = [] if taken == MODEL_KEYS[0] else [f"weights taken from {taken}"]
    if taken in EMA_KEYS:
        notes = [f"EMA weights taken from {taken}: the only ones in the file"]
    notes += [f"EMA weights beside them ({key}) not used" for key in others if key in EMA_KEYS]
    notes += [f"other weights beside them ({key}) not used" for key in others if key in MODEL_KEYS]
    weights, prefix_notes = without_prefixes(places[taken], path)
    return weights, notes + prefix_notes


def without_prefixes(weights: dict[str, torch.Tensor], path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Keys as the network names them, without what torch's wrappers put before them.

    Raises ExplainError where two keys become one.
    """
    prefixes = [found.group() for key in weights if (found := WRAPPER_PREFIX.match(key))]
    bare = {WRAPPER_PREFIX.sub("", key): tensor for key, tensor in weights.items()}
    if len(bare) < len(weights):
        raise refusal(path, "holds weights twice, with and without a prefix such as module.", "save one state_dict() alone")
    bare.pop("n_averaged", None)  # the counter that torch.optim.swa_utils.AveragedModel keeps
    names = ", ".join(sorted(set(prefixes))[:3])
    return bare, [f"prefix {names[:80]} removed from {len(prefixes)} keys"] if prefixes else []


def check_family(family: Family, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Raise ExplainError where the keys are those of another family."""
    for other in FAMILIES.values():
        if other.landmark in weights and family.landmark not in weights:
            cause = f"holds weights of the {other.key} family (key {other.landmark}), not of {family.key}"
            raise refusal(path, cause, f"give it to --{other.key}-checkpoint")


def architecture_of(family: Family, contents: dict[Any, Any], path: Path) -> str:
    """The timm name that the checkpoint records, or the family's full-size network.

    The name is checked against the family's own: a foreign one could send timm to the network.
    """
    name = recorded(contents, "model_name")
    if name is None:
        return family.full_size
    if not isinstance(name, str) or not family.names.fullmatch(name):
        cause = f"records the network {brief(name)}, which is not of the family of {family.full_size}"
        raise refusal(path, cause, "give it to the option of its own family")
    return name


def class_names_of(family: Family, contents: dict[Any, Any], weights: dict[str, Any], path: Path) -> tuple[str, ...]:
    """The names of the classes, one for each output of the network's head.

    Raises ExplainError where names, head and config do not agree. The head alone tells the number
    of outputs; a number in config is never built from.
    """
    names = recorded(contents, "class_names")
    if names is None:
        names = CLASS_NAMES
    elif not are_class_names(names):
        wanted = f"a list of 2 to {MAX_CLASSES} different names of at most {MAX_NAME} characters"
        cause = f"class_names is {brief(names)}, not {wanted}"
        raise refusal(path, cause, "correct class_names in the checkpoint")
    head = weights.get(f"{family.head}.weight")
    if head is None or head.ndim != 2:
        return CLASS_NAMES  # the comparison with the network names what is missing
    outputs, claimed = head.shape[0], recorded(contents, "num_classes")
    if claimed is not None and (type(claimed) is not int or claimed != outputs):
        cause = f"records num_classes {brief(claimed)}, but its head ({family.head}) has {outputs} outputs"
        raise refusal(path, cause, "correct num_classes in the checkpoint")
    if outputs != len(names):
        cause = f"its head ({family.head}) has {outputs} outputs, but the class names are {listed(names)}"
        raise refusal(path, cause, "save class_names in the checkpoint, one for each output")
    usual = {class_key(name): name for name in CLASS_NAMES}
    return tuple(usual.get(class_key(name), printable(name)) for name in names)


def are_class_names(value: object) -> bool:
    """Whether these are names that can be told apart by their letters and digits."""
    if not isinstance(value, (list, tuple)) or not 2 <= len(value) <= MAX_CLASSES:
        return False
    if not all(isinstance(name, str) and name.strip() and len(name) <= MAX_NAME for name in value):
        return False
    return len({class_key(name) for name in value} - {""}) == len(value)


def preprocessing_of(contents: dict[Any, Any], path: Path) -> tuple[Preprocessing, list[str]]:
    """How the checkpoint says images are prepared, else as both networks were trained.

    Raises ExplainError where it says something unusable.
    """
    side = recorded(contents, "img_size")
    sides = side if isinstance(side, (list, tuple)) else [INPUT_SIZE if side is None else side] * 2
    if len(sides) != 2 or any(type(side) is not int or side not in INPUT_SIZES for side in sides) or sides[0] != sides[1]:
        cause = f"img_size is {brief(side)}, not one multiple of 32 from {INPUT_SIZES[0]} to {INPUT_SIZES[-1]}"
        raise refusal(path, cause, "correct img_size in the checkpoint")
    mean = channel_values(contents, "mean", IMAGENET_MEAN, 0, path)
    std = channel_values(contents, "std", IMAGENET_STD, 0.001, path)
    preprocessing = Preprocessing(sides[0], mean, std)
    if preprocessing == Preprocessing():
        return preprocessing, []
    return preprocessing, [f"preprocessing as the checkpoint says: {sides[0]} pixels a side, mean {mean}, std {std}"]


def channel_values(
    contents: dict[Any, Any], name: str, default: tuple[float, ...], least: float, path: Path
) -> tuple[float, ...]:
    """Three numbers, one for each of RGB in [0, 1]. Raises ExplainError for anything else."""
    values = recorded(contents, name)
    if values is None:
        return default
    numbers = isinstance(values, (list, tuple)) and len(values) == 3 and all(type(value) in (int, float) for value in values)
    if not numbers or not all(least <= value <= 1 for value in values):
        raise refusal(
            path,
            f"{name} is {brief(values)}, not three numbers from {least} to 1 for pixels in [0, 1]",
            f"correct {name} in the checkpoint",
        )
    return tuple(float(value) for value in values)


def accuracy_text(contents: dict[Any, Any]) -> str:
    """What a checkpoint says about its accuracy, under the name it uses.

    Trainers record percent; whether a number up to 1 is meant as a share, the file does not say.
    """
    for key, label in (("test_acc", "Test accuracy"), ("val_acc", "Validation accuracy")):
        value = contents.get(key)
        if type(value) in (int, float) and 0 <= value <= 100:
            return f"{label}: {value:.2f}%" if value > 1 else f"{label}: {value:.4g} as recorded"
    return "Accuracy: not recorded in the checkpoint"


def check_fit(network: torch.nn.Module, weights: dict[str, torch.Tensor], name: str, path: Path) -> None:
    """Raise ExplainError unless the weights have the network's keys, shapes and kinds of number.

    `name` says which network that is and why.
    """
    expected = network.state_dict()
    kinds = [f"{key} is {kind}" for key, tensor in weights.items() if (kind := number_kind(tensor)) not in NUMBER_KINDS]
    floats = [key for key, tensor in expected.items() if tensor.is_floating_point()]
    kinds += [f"{key} is int64" for key in floats if key in weights and number_kind(weights[key]) == "int64"]
    if kinds:
        raise refusal(path, f"not the floats of a network: {listed(kinds)}", "save the trained weights as dense floats")
    missing = [key for key in expected if key not in weights]
    unexpected = [key for key in weights if key not in expected]
    pairs = [(key, weights[key], tensor) for key, tensor in expected.items() if key in weights]
    shapes = [f"{key} is {size(w)} in the file, {size(e)} in the network" for key, w, e in pairs if w.shape != e.shape]
    faults = (("keys missing", missing), ("keys not in the network", unexpected), ("other shapes", shapes))
    found = [f"{what} {listed(items)}" for what, items in faults if items]
    if found:
        cause = f"its {len(weights)} weights do not fit the {len(expected)} of {name}: {', '.join(found)}"
        raise refusal(path, cause, "set model_name in its config to the network that was trained")


def size(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"


def number_kind(tensor: torch.Tensor) -> str:
    """The type of a tensor's numbers, and what else keeps it from being a plain array."""
    import torch

    dtype = str(tensor.dtype).removeprefix("torch.")
    words = {"meta": tensor.is_meta, "sparse": tensor.layout != torch.strided, "quantised": tensor.is_quantized}
    return " ".join([*(word for word, holds in words.items() if holds), dtype])


def in_float32(weights: dict[str, torch.Tensor], path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights as they are computed with. Raises ExplainError where some are NaN or infinite."""
    ready = {key: tensor.detach().float() if tensor.is_floating_point() else tensor for key, tensor in weights.items()}
    bad = [key for key, tensor in ready.items() if not is_finite(tensor)]
    if bad:
        raise refusal(path, f"NaN or infinite weights in {listed(bad)}", "use a checkpoint from before the training diverged")
    kinds = {number_kind(tensor) for tensor in weights.values()} - {"float32", "int64"}
    return ready, [f"{kind} weights computed in float32" for kind in sorted(kinds)]


def is_finite(tensor: torch.Tensor) -> bool:
    """Exact, and ten times faster than isfinite alone, which decides only where a sum overflows."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def build_network(architecture: str, classes: int) -> torch.nn.Module:
    """The timm network without memory for its weights, so without random initialisation."""
    import timm
    import torch

    with torch.device("meta"):
        return timm.create_model(architecture.partition(".")[0], pretrained=False, num_classes=classes)


def load_classifier(family: Family, path: Path, device: str) -> Classifier:
    """Read a checkpoint into a classifier on `device`.

    Raises ExplainError where the file is no checkpoint of this family.
    """
    contents, file_notes = read_checkpoint(path)
    weights, weight_notes = weights_of(contents, path)
    check_family(family, weights, path)
    architecture = architecture_of(family, contents, path)
    class_names = class_names_of(family, contents, weights, path)
    preprocessing, preprocessing_notes = preprocessing_of(contents, path)
    try:
        network = build_network(architecture, len(class_names))
        origin = "assumed, as its config names none" if recorded(contents, "model_name") is None else "which its config names"
        check_fit(network, weights, f"{architecture} ({origin})", path)
        weights, type_notes = in_float32(weights, path)
        network.load_state_dict(weights, strict=True, assign=True)
        network = network.eval().requires_grad_(False).to(device)
    except (MemoryError, RuntimeError) as error:  # torch reports a lack of memory as either
        cause = f"cannot be put on {device} ({type(error).__name__})"
        raise refusal(path, cause, "free memory, or choose --device cpu") from error
    return Classifier(
        family=family,
        title=family.title.format(size=family.names.fullmatch(architecture).group(1).upper()),
        architecture=architecture,
        checkpoint=path,
        accuracy=accuracy_text(contents),
        class_names=class_names,
        preprocessing=preprocessing,
        network=network,
        notes=(*file_notes, *weight_notes, *type_notes, *preprocessing_notes),
    )


def choose_device(wanted: str) -> str:
    """The device to run on. Raises ExplainError where the wanted one is not there."""
    import torch

    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if present[name])
    if not present[wanted]:
        raise ExplainError(f"--device {wanted}: not available here; use --device cpu")
    return wanted


def use_exact_float32() -> None:
    """The same bytes for the same input: no TF32, no algorithm chosen by a race."""
    import torch

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


# ------------------------------------------------------------------------------------------
# Grad-CAM
# ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def captured_activations(layer: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Hook a layer; its output is appended to the list, and the gradient graph starts there.

    Parameters need no gradient, so nothing before the layer is recorded: the backward pass runs
    from the class score to the layer and no further. The hook goes whatever happens.
    """
    captured: list[torch.Tensor] = []

    def start_graph(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        captured.append(output.detach().requires_grad_())
        return captured[-1]

    handle = layer.register_forward_hook(start_graph)
    try:
        yield captured
    finally:
        handle.remove()


def grad_cam(activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Grad-CAM before the ReLU: (B, C, h, w) twice -> (B, h, w), signed.

    alpha_k = mean over space of the gradients (eq. 1); sum over k of alpha_k A_k (eq. 2). What
    lies within the rounding error of the sum is zero: noise must not become a heatmap.
    """
    weights = gradients.mean(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
    terms = weights * activations  # (B, C, h, w)
    raw = terms.sum(dim=1)
    rounding = terms.abs().sum(dim=1) * ROUNDING
    return raw.where(raw.abs() > rounding, 0)


def normalised(raw_map: np.ndarray) -> np.ndarray:
    """ReLU (eq. 2), then division by the maximum: (h, w) in [0, 1]. A blank map stays blank."""
    positive = np.maximum(raw_map, 0)
    peak = positive.max()
    return positive / peak if peak > 0 else positive


def resized(heatmap: np.ndarray, height: int, width: int) -> np.ndarray:
    """A heatmap (h, w) at (height, width): bilinear, cell centres aligned, still in [0, 1]."""
    return np.asarray(Image.fromarray(heatmap).resize((width, height), Image.Resampling.BILINEAR))


def target_index(target_class: str | None, class_names: Sequence[str]) -> int | None:
    """The class that --target-class means, by name or index; None stands for the predicted one."""
    if target_class is None:
        return None
    names = [class_key(name) for name in class_names]
    if class_key(target_class) in names:
        return names.index(class_key(target_class))
    if target_class.strip() in map(str, range(len(names))):
        return int(target_class)
    choices = ", ".join(f"{index} = {printable(name)}" for index, name in enumerate(class_names))
    raise ExplainError(f"--target-class {printable(target_class)}: not a class of the network; choose {choices}")


def explain_inputs(classifier: Classifier, inputs: torch.Tensor, target: int | None = None) -> tuple[torch.Tensor, ...]:
    """One forward pass, and one backward pass from the class scores to the target layer.

    Returns probabilities (B, K), the explained classes (B,): `target`, or each image's predicted
    class, and the raw maps (B, h, w). Raises ExplainError where the network's output is not finite.
    """
    import torch

    layer = classifier.network.get_submodule(classifier.family.target_layer)
    with captured_activations(layer) as captured, torch.enable_grad():
        logits = classifier.network(inputs)  # (B, K)
        (activations,) = captured
        if not torch.isfinite(logits).all():
            raise ExplainError(f"{shown(classifier.checkpoint)}: the network's output is not finite; its weights are damaged")
        explained = logits.argmax(dim=1) if target is None else torch.full_like(logits[:, 0], target, dtype=torch.long)
        # Images do not mix in eval mode, so the gradient of the sum holds each image's own.
        score = logits.gather(1, explained[:, None]).sum()
        (gradients,) = torch.autograd.grad(score, activations)
    return logits.detach().softmax(dim=1), explained, grad_cam(activations.detach(), gradients)


def explain_batch(classifier: Classifier, inputs: Sequence[np.ndarray], target: int | None = None) -> list[Explanation]:
    """Explain a batch of prepared images, each (3, size, size): class `target`, or each one's predicted class.

    Raises ExplainError where the network's output is not finite or memory does not suffice.
    """
    import torch

    try:
        tensors = explain_inputs(classifier, torch.from_numpy(np.stack(inputs)).to(classifier.device), target)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        cause = f"not enough memory for a batch of {len(inputs)}; choose a smaller --batch-size"
        raise ExplainError(f"{shown(classifier.checkpoint)}: {cause}") from error
    probabilities, explained, raw_maps = (tensor.cpu().numpy() for tensor in tensors)
    return [explanation(classifier, *each) for each in zip(probabilities, explained.tolist(), raw_maps)]


def explain(classifier: Classifier, radiographs: Sequence[Radiograph], target: int | None = None) -> list[Explanation]:
    """`explain_batch` of radiographs as they were loaded."""
    return explain_batch(classifier, [network_input(each, classifier.preprocessing) for each in radiographs], target)


def explanation(classifier: Classifier, probabilities: np.ndarray, explained: int, raw_map: np.ndarray) -> Explanation:
    return Explanation(
        title=classifier.title,
        family=classifier.family.key,
        architecture=classifier.architecture,
        checkpoint=printable(classifier.checkpoint.name),
        accuracy=classifier.accuracy,
        target_layer=classifier.family.target_layer,
        is_demo=is_demo(classifier.checkpoint),
        class_names=classifier.class_names,
        probabilities=probabilities,
        explained=explained,
        raw_map=raw_map,
        heatmap=normalised(raw_map),
    )


# ------------------------------------------------------------------------------------------
# Checks
# ------------------------------------------------------------------------------------------

# Everything is measured on one grid for all networks and methods, so that a threshold means the
# same share of the area everywhere. Heat is max(raw map, 0) divided by its sum.

CELLS = 7  # a side of that grid, which is both families' own at 224 pixels
CHECKED_SIDE = 224  # pixels; radiographs are looked at squashed, as networks of that size see them
OUTER = np.pad(np.zeros((CELLS - 2, CELLS - 2), bool), 1, constant_values=True)  # the frame of 24 cells
DENSE_SHARE = 0.02  # of a cell's pixels; with fewer the cell holds nothing as dense as bone
HOT_AREA = 0.25  # of the image

# A marker or annotation is bright, thin, small and set off from all around it. Lengths in pixels
# of CHECKED_SIDE, brightness in shares of the radiograph's range (1st to 99th percentile).
STROKE_REACH, STROKE_CONTRAST = 4, 0.3  # an opening of 9 x 9 takes away strokes of up to 8 pixels
JOINING_REACH = 2  # letters at most 4 pixels apart are one marker
MARKER_PIXELS, MARKER_SIDES = 12, range(6, 50)  # fewer pixels are noise; sides are the longer ones
TEXT_SIDES, TEXT_HEIGHT = range(6, 124), 27  # a line of text may be longer while it is lower than this
RING, RING_CONTRAST = (2, 5), 0.25  # pixels outside the box; bone's edges go on there, markers do not

BORDER_LIMIT = 0.5  # just above the 24/49 of the area that the frame has
DARK_LIMIT = 0.35  # fractures lie in bone; some heat spills into the cells beside it
MARKER_LIMIT = 0.2  # a marker touches 1 to 4 of 49 cells: 0.02 to 0.08 by chance
FOCUS_LIMIT = 0.5  # a map without focus has 0.25 there
AGREEMENT_LIMIT = 0.4  # equal maps share 1, disjoint ones 0
CONFIDENCE_LIMIT = 0.95  # the guide's, for clear cases
COVERING_LIMIT = 0.1  # of probability; covering as much elsewhere costs honest networks less
BLUR = 8 / 224  # of the image's side: standard deviation of the Gaussian that erases
ERASED_AREA = 0.2  # of the image, the hottest
MOVED_MASKS = 15  # with the hot area, the blurred and two covered copies 19 passes
MAX_OVERLAP = 0.25  # of a moved mask with the hot area
MARKER_MARGIN = 4  # pixels of CHECKED_SIDE round a covered marker
ERASING_LIMIT = 0.5  # where masks put anywhere do as much, the map says nothing

FEW_MAPS = 20  # fewer tell more about chance than about the network
SAME_PLACE_LIMIT = 0.5  # mean correlation of the maps of different images: fractures lie in different places
SAME_CELL_LIMIT = 0.5  # of the hottest cells; 1/49 by chance
MEAN_DARK_LIMIT = 0.25  # of the heat
MEAN_MARKER_LIMIT = 0.1  # of the heat, where there is a marker
BLANK_LIMIT = 0.5  # of a class's maps: then the network decides for it by what it does not see

TEST_BOXES = TEST_IMAGES / "fracture_boxes.csv"  # used by itself for the images beside it
BOX_COLUMNS = ("file", "x0", "y0", "x1", "y1")  # that a table of boxes must have; class may be there
MAX_BOX_TABLE = 100_000_000  # bytes

Box = tuple[int, int, int, int]  # x0, y0, x1, y1, half-open


@dataclass(frozen=True)
class Landmarks:
    """What of a radiograph the checks compare its maps with."""

    dense: np.ndarray  # (CELLS, CELLS) share of each cell's pixels that are as dense as bone
    markers: tuple[Box, ...]  # pixels of CHECKED_SIDE


# What a radiograph shows


def landmarks_of(pixels: np.ndarray) -> Landmarks:
    """Look for bone and markers in a radiograph (H, W, 3) uint8."""
    small = Image.fromarray(pixels).resize((CHECKED_SIDE, CHECKED_SIDE), Image.Resampling.BILINEAR)
    grey = np.asarray(small.convert("L"))
    return Landmarks(dense_shares(grey), tuple(marker_boxes(grey)))


def over_windows(values: np.ndarray, reach: int, combine: np.ufunc) -> np.ndarray:
    """Combine the 2 * reach + 1 values a side around each one: (H, W) -> (H, W).

    np.minimum gives the erosion, np.maximum the dilation; outside, the edge's values count.
    """
    for _ in range(2):
        length = len(values)
        padded = np.pad(values, ((reach, reach), (0, 0)), mode="edge")
        shifted = (padded[start : start + length] for start in range(2 * reach + 1))
        values = functools.reduce(combine, shifted).T
    return values


def otsu_threshold(values: np.ndarray) -> int:
    """The grey value that best parts uint8 values into dark and bright: N. Otsu, IEEE SMC-9, 1979.

    Of the thresholds with the largest variance between the two parts, the lowest; values equal to
    it are dark. 255 where there is but one value.
    """
    counts = np.bincount(values.ravel(), minlength=256)
    dark, mass = counts.cumsum(), (counts * np.arange(256)).cumsum()
    pairs = dark * (values.size - dark)  # 0 where one part is empty
    distance = (mass[-1] * (dark / values.size) - mass) ** 2
    between = np.divide(distance, pairs, out=np.zeros(256), where=pairs > 0)
    return int(between.argmax()) if pairs.any() else 255


def dense_shares(grey: np.ndarray) -> np.ndarray:
    """Share of each cell's pixels above Otsu's threshold: grey (H, W) uint8 -> (CELLS, CELLS).

    Means of 3 x 3 pixels are compared, or noise in the dark would count.
    """
    smooth = (over_windows(grey.astype(np.uint16), 1, np.add) // 9).astype(np.uint8)
    side = CHECKED_SIDE // CELLS
    return (smooth > otsu_threshold(smooth)).reshape(CELLS, side, CELLS, side).mean(axis=(1, 3))


def marker_boxes(grey: np.ndarray) -> list[Box]:
    """Boxes of what looks like a side marker or text in grey (H, W) uint8; see STROKE_REACH and below.

    Strokes stand out from an opening (white top-hat: J. Serra, Image Analysis, 1982); those close
    together are one marker.
    """
    low, high = np.percentile(grey, (1, 99))
    eroded = over_windows(grey, STROKE_REACH, np.minimum)
    strokes = grey - over_windows(eroded, STROKE_REACH, np.maximum) > STROKE_CONTRAST * (high - low)
    found = []
    for rows, columns in regions(strokes, JOINING_REACH):
        box = int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
        if is_marker_size(len(rows), box) and stands_out(
            grey, rows, columns, box, RING_CONTRAST * (high - low)
        ):
            found.append(box)
    return found


def regions(mask: np.ndarray, reach: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Parts of a mask (H, W): rows and columns of the pixels that hang together once dilated by `reach`."""
    joined = over_windows(mask, reach, np.maximum)
    labels = connected(joined)[mask[joined]]  # of the mask's own pixels
    order = labels.argsort(kind="stable")
    starts = np.flatnonzero(np.diff(labels[order])) + 1
    rows, columns = (np.split(each[order], starts) for each in mask.nonzero())
    return [part for part in zip(rows, columns) if part[0].size]


def connected(mask: np.ndarray) -> np.ndarray:
    """A label for each of a mask's n pixels, row by row: the lowest number among those 8-connected with it.

    Numbers spread along the edges; a label's own label is looked up, so that each turn reaches
    about twice as far.
    """
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
        labels = labels[labels]
    return labels


def is_marker_size(pixels: int, box: Box) -> bool:
    short, long = sorted((box[2] - box[0], box[3] - box[1]))
    return pixels >= MARKER_PIXELS and (long in MARKER_SIDES or (long in TEXT_SIDES and short < TEXT_HEIGHT))


def stands_out(grey: np.ndarray, rows: np.ndarray, columns: np.ndarray, box: Box, by: float) -> bool:
    """Whether a region's median lies `by` above the 90th percentile of the ring round its box."""
    inner, outer = (grown(box, reach, CHECKED_SIDE) for reach in (RING[0] - 1, RING[1]))
    x0, y0, x1, y1 = outer
    ring = np.ones((y1 - y0, x1 - x0), bool)
    ring[inner[1] - y0 : inner[3] - y0, inner[0] - x0 : inner[2] - x0] = False
    around = grey[y0:y1, x0:x1][ring]
    return bool(around.size and np.median(grey[rows, columns]) - np.percentile(around, 90) >= by)


def grown(box: Box, reach: int, side: int) -> Box:
    """A box with `reach` pixels more on each side, cut at the edges of a square image."""
    x0, y0, x1, y1 = box
    return max(0, x0 - reach), max(0, y0 - reach), min(side, x1 + reach), min(side, y1 + reach)


# What a map shows


def overlaps(cells: int, others: int) -> np.ndarray:
    """(cells, others): the share of each of `others` equal parts of a length in each of `cells`."""
    ends, other_ends = np.arange(1, cells + 1)[:, None] * others, np.arange(1, others + 1) * cells
    shared = np.minimum(ends, other_ends) - np.maximum(ends - others, other_ends - cells)
    return np.maximum(shared, 0) / cells


def heat_on_cells(raw_map: np.ndarray) -> np.ndarray:
    """Share of the heat in each cell, by area: (h, w) -> (CELLS, CELLS); all 0 for a blank map."""
    heat = np.maximum(raw_map, 0).astype(np.float64)
    total = heat.sum()
    if total == 0:
        return np.zeros((CELLS, CELLS))
    h, w = heat.shape
    return overlaps(CELLS, h) @ (heat / total) @ overlaps(CELLS, w).T


def touched_cells(boxes: Iterable[Box]) -> np.ndarray:
    """(CELLS, CELLS) bool: the cells that boxes touch."""
    touched, side = np.zeros((CELLS, CELLS), bool), CHECKED_SIDE // CELLS
    for x0, y0, x1, y1 in boxes:
        touched[y0 // side : (y1 - 1) // side + 1, x0 // side : (x1 - 1) // side + 1] = True
    return touched


@dataclass(frozen=True)
class Trial:
    """What a network says of changed copies of a radiograph: class scores before the softmax, (K,) each."""

    blurred: np.ndarray  # the whole radiograph
    covered: np.ndarray | None = None  # its markers; None where none was found
    covered_elsewhere: np.ndarray | None = None
    erased: np.ndarray | None = None  # the map's hot area; None for a map without one
    erased_elsewhere: np.ndarray | None = None  # (n, K), n moved masks


@dataclass(frozen=True)
class Evidence:
    """All that a check may look at."""

    explanation: Explanation
    landmarks: Landmarks
    other_map: np.ndarray | None = None  # the other model's raw map, where there is one
    trial: Trial | None = None  # with --verify

    @functools.cached_property
    def heat(self) -> np.ndarray:
        """(CELLS, CELLS) shares."""
        return heat_on_cells(self.explanation.raw_map)


def is_uniform(raw_map: np.ndarray) -> bool:
    """Whether a map is blank (nothing positive) or constant: neither has a place to judge."""
    return bool(raw_map.max() <= 0 or raw_map.min() == raw_map.max())


def border_heat(evidence: Evidence) -> float:
    """Share of the heat in the frame of outer cells; 24/49 for a uniform map."""
    return float(evidence.heat[OUTER].sum())


def dark_heat(evidence: Evidence) -> float:
    """Share of the heat in cells where less than DENSE_SHARE of the pixels is as dense as bone."""
    return float(evidence.heat[evidence.landmarks.dense < DENSE_SHARE].sum())


def marker_heat(evidence: Evidence) -> float:
    """Share of the heat in cells that a marker's box touches; 0 where there is no marker."""
    return float(evidence.heat[touched_cells(evidence.landmarks.markers)].sum())


def focus(evidence: Evidence) -> float:
    """Share of the heat in the hottest HOT_AREA of the image; HOT_AREA itself for a uniform map."""
    hottest = np.sort(evidence.heat, axis=None)[::-1]
    cells = HOT_AREA * hottest.size
    whole = int(cells)
    return float(hottest[:whole].sum() + (cells - whole) * hottest[whole])


def map_agreement(evidence: Evidence) -> float | None:
    """Heat that the two models' maps share, sum of min(a, b): 1 for equal maps, 0 for disjoint ones.

    Histogram intersection: Swain and Ballard, IJCV 1991. None without a second map that has a place to judge.
    """
    if evidence.other_map is None or is_uniform(evidence.other_map):
        return None
    return float(np.minimum(evidence.heat, heat_on_cells(evidence.other_map)).sum())


# What a network says of changed copies (--verify)


def probability(scores: np.ndarray, index: int) -> float:
    """Softmax of class scores (K,) at one class."""
    return float(1 / np.exp(scores - scores[index]).sum())


def log_odds(scores: np.ndarray, index: int) -> np.ndarray:
    """log p / (1 - p) of one class from scores (..., K), also where p rounds to 1: (...)."""
    return scores[..., index] - np.logaddexp.reduce(np.delete(scores, index, axis=-1), axis=-1)


def covering_fall(evidence: Evidence) -> float | None:
    """What covering the markers takes from the predicted class, beyond covering as much elsewhere."""
    trial, explanation = evidence.trial, evidence.explanation
    if trial is None or trial.covered is None:
        return None
    covered, elsewhere = (
        probability(each, explanation.predicted) for each in (trial.covered, trial.covered_elsewhere)
    )
    return min(explanation.confidence, elsewhere) - covered


def default_probability(evidence: Evidence) -> float | None:
    """Probability of the class that the network gives to the whole radiograph blurred."""
    return (
        None
        if evidence.trial is None
        else probability(evidence.trial.blurred, int(evidence.trial.blurred.argmax()))
    )


def erasing_rank(evidence: Evidence) -> float | None:
    """Share of the moved masks that take at least as much from the explained class as the hot area's does.

    In log-odds, which do not saturate; 0 for a map that found what counts, about 0.5 for one that
    points anywhere. NaN for the class that the network gives to a blurred radiograph as well:
    nothing that is erased can lower it.
    """
    trial, explained = evidence.trial, evidence.explanation.explained
    if trial is None or trial.erased is None:
        return None
    if trial.blurred.argmax() == explained:
        return float("nan")
    return float((log_odds(trial.erased_elsewhere, explained) <= log_odds(trial.erased, explained)).mean())


# The table of checks


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def covering_text(evidence: Evidence, value: float) -> str:
    explanation, trial, count = evidence.explanation, evidence.trial, len(evidence.landmarks.markers)
    what = "the side marker" if count == 1 else f"{count} markers"
    covered, elsewhere = (
        probability(each, explanation.predicted) for each in (trial.covered, trial.covered_elsewhere)
    )
    verb = "lowers" if covered < explanation.confidence else "takes"
    return (
        f"covering {what} {verb} {explanation.prediction} from {percent(explanation.confidence)} "
        f"to {percent(covered)}; covering as much elsewhere, {percent(elsewhere)}"
    )


def default_text(evidence: Evidence, value: float) -> str:
    name = evidence.explanation.class_names[evidence.trial.blurred.argmax()]
    return f"with everything blurred it says {name} at {percent(value)}"


def erasing_text(evidence: Evidence, value: float) -> str:
    trial, explained = evidence.trial, evidence.explanation.explained
    name = evidence.explanation.class_names[explained]
    if np.isnan(value):
        return f"erasing cannot be tested: it says {name} even when everything is blurred"
    moved = trial.erased_elsewhere
    usual = moved[log_odds(moved, explained).argsort(kind="stable")[len(moved) // 2]]  # the median one
    return (
        f"erasing the hot area leaves {name} at {percent(probability(trial.erased, explained))}; "
        f"erasing as much in {len(moved)} other places, {percent(probability(usual, explained))} (log-odds "
        f"{log_odds(trial.erased, explained):+.1f} against {log_odds(usual, explained):+.1f})"
    )


@dataclass(frozen=True)
class Check:
    """One question asked of every map; a further check is one entry of CHECKS and one function."""

    key: str  # in the table's columns and in JSON; in words where passed checks are listed
    title: str  # the guide's words where it has some
    about: str  # "map", "pair" of maps, "prediction", or "verify": asked only with --verify
    measure: Callable[[Evidence], float | None]  # None: does not apply
    limit: float
    flags: Callable[[float, float], bool]  # value, limit; False for NaN
    text: Callable[[Evidence, float], str]


CHECKS = {
    check.key: check
    for check in (
        Check(
            "blank",
            "No positive evidence",
            "map",
            lambda evidence: float(is_uniform(evidence.explanation.raw_map)),
            0,
            operator.gt,
            lambda evidence, value: evidence.explanation.remark or "the map has a place to judge",
        ),
        Check(
            "border",
            "Attention on image borders",
            "map",
            border_heat,
            BORDER_LIMIT,
            operator.gt,
            lambda evidence, value: (
                f"{percent(value)} of the heat lies in the outer ring of cells, "
                f"which is {percent(OUTER.mean())} of the area"
            ),
        ),
        Check(
            "dark",
            "Attention on irrelevant areas",
            "map",
            dark_heat,
            DARK_LIMIT,
            operator.gt,
            lambda evidence, value: f"{percent(value)} of the heat lies where nothing as dense as bone is",
        ),
        Check(
            "markers",
            "Focus on text/labels/artifacts",
            "map",
            marker_heat,
            MARKER_LIMIT,
            operator.gt,
            lambda evidence, value: f"{percent(value)} of the heat lies on cells with a marker or text",
        ),
        Check(
            "focus",
            "No clear focal point",
            "map",
            focus,
            FOCUS_LIMIT,
            operator.lt,
            lambda evidence, value: f"the hottest quarter of the area holds {percent(value)} of the heat",
        ),
        Check(
            "map_agreement",
            "Models strongly disagree",
            "pair",
            map_agreement,
            AGREEMENT_LIMIT,
            operator.lt,
            lambda evidence, value: f"the two maps share {percent(value)} of their heat",
        ),
        Check(
            "confidence",
            "Low confidence overall",
            "prediction",
            lambda evidence: evidence.explanation.confidence,
            CONFIDENCE_LIMIT,
            operator.lt,
            lambda evidence, value: (
                f"confidence {value:.2%}, for clear cases above {percent(CONFIDENCE_LIMIT)}"
            ),
        ),
        Check(
            "covering",
            "Reads the side marker",
            "verify",
            covering_fall,
            COVERING_LIMIT,
            operator.gt,
            covering_text,
        ),
        Check("default", "Says so of anything", "verify", default_probability, 1, operator.gt, default_text),
        Check(
            "erasing",
            "The hot area counts no more than others",
            "verify",
            erasing_rank,
            ERASING_LIMIT,
            operator.gt,
            erasing_text,
        ),
    )
}
MAP_CHECKS = sum(check.about == "map" for check in CHECKS.values())


def findings_of(evidence: Evidence) -> tuple[Finding, ...]:
    """What the checks say of one map; of a blank or constant one only that, and what needs no map."""
    uniform = is_uniform(evidence.explanation.raw_map)
    asked = [
        check
        for check in CHECKS.values()
        if not (uniform and check.about in ("map", "pair") and check.key != "blank")
    ]
    measured = [(check, check.measure(evidence)) for check in asked]
    return tuple(
        Finding(check.key, value, bool(check.flags(value, check.limit)), check.text(evidence, value))
        for check, value in measured
        if value is not None
    )


def checked(
    explanations: Sequence[Explanation], landmarks: Landmarks, trials: Sequence[Trial | None] = (None, None)
) -> tuple[Explanation, ...]:
    """Explanations of one radiograph, one a model, with their findings."""
    maps = [explanation.raw_map for explanation in explanations]
    others = maps[::-1] if len(maps) == 2 else [None]
    return tuple(
        dataclasses.replace(explanation, findings=findings_of(Evidence(explanation, landmarks, other, trial)))
        for explanation, other, trial in zip(explanations, others, trials)
    )


def flagged(findings: Sequence[Finding], about: str) -> list[Finding]:
    return [finding for finding in findings if finding.is_flagged and CHECKS[finding.check].about == about]


def verdict_text(findings: Sequence[Finding]) -> str:
    """What the map checks say of one map, as one sentence."""
    found = flagged(findings, "map")
    if not found:
        return f"{MAP_CHECKS} map checks passed"
    return f"{len(found)} of {MAP_CHECKS} map checks flagged: {'; '.join(finding.text for finding in found)}"


# --verify: copies of a radiograph in which something is covered or erased


def blurred(image: np.ndarray) -> np.ndarray:
    """Gaussian blur of (C, N, N); at the edge over what there is of the image."""
    places = np.arange(image.shape[1])
    weights = np.exp(-(((places[:, None] - places) / (BLUR * len(places))) ** 2) / 2).astype(np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights @ image @ weights.T


def covered(image: np.ndarray, boxes: Iterable[Box]) -> np.ndarray:
    """(C, N, N) with boxes filled from their surroundings.

    Each pixel is the mean of the four nearest ones outside, in its row and its column, weighted by
    their closeness.
    """
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
        image[:, y0:y1, x0:x1] = sum(values * weights for values, weights in there) / sum(
            weights for _, weights in there
        )
    return image


def marker_masks(markers: Sequence[Box], side: int) -> tuple[list[Box], list[Box]]:
    """Boxes to cover in an image of `side` pixels: the markers with a margin, and as much elsewhere.

    Elsewhere is their mirror image, left-right, up-down or both, that overlaps them least: about
    as far from the centre.
    """
    boxes = [
        tuple(round(end * side / CHECKED_SIDE) for end in grown(box, MARKER_MARGIN, CHECKED_SIDE))
        for box in markers
    ]
    across = [(side - x1, y0, side - x0, y1) for x0, y0, x1, y1 in boxes]
    mirrors = [
        across,
        *([(x0, side - y1, x1, side - y0) for x0, y0, x1, y1 in each] for each in (boxes, across)),
    ]
    return boxes, min(mirrors, key=lambda mirror: (box_mask(mirror, side) & box_mask(boxes, side)).sum())


def box_mask(boxes: Iterable[Box], side: int) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


def hot_mask(heatmap: np.ndarray, side: int) -> np.ndarray:
    """(side, side) bool: the hottest ERASED_AREA of the image; less where less has any heat."""
    heat = resized(heatmap, side, side)
    return (heat > 0) & (heat >= np.quantile(heat, 1 - ERASED_AREA))


def moved_masks(mask: np.ndarray) -> list[np.ndarray]:
    """At most MOVED_MASKS shifted and mirrored copies of a mask that hardly overlap it."""
    step = len(mask) // CELLS
    moved = [
        np.roll(mirrored, (step * down, step * across), axis=(0, 1))
        for down, across in itertools.product(range(CELLS), repeat=2)
        for mirrored in (mask, mask[:, ::-1], mask[::-1], mask[::-1, ::-1])
    ]
    apart = [each for each in moved if (each & mask).sum() < MAX_OVERLAP * mask.sum()]
    chosen = np.linspace(0, len(apart) - 1, min(MOVED_MASKS, len(apart))).round().astype(int)
    return [apart[index] for index in chosen]


def class_scores(classifier: Classifier, images: np.ndarray, batch_size: int) -> np.ndarray:
    """Forward passes alone: (n, 3, N, N) -> (n, K) float64."""
    import torch

    with torch.inference_mode():
        batches = (
            torch.from_numpy(images[start : start + batch_size])
            for start in range(0, len(images), batch_size)
        )
        scores = [classifier.network(batch.to(classifier.device)).cpu().numpy() for batch in batches]
    return np.concatenate(scores).astype(np.float64)


def tried(
    classifier: Classifier, image: np.ndarray, explanation: Explanation, landmarks: Landmarks, batch_size: int
) -> Trial:
    """Ask the network about changed copies of one input (3, N, N): at most 19 forward passes."""
    erasing = blurred(image)
    copies, side = [erasing], image.shape[1]
    if landmarks.markers:
        copies += [covered(image, boxes) for boxes in marker_masks(landmarks.markers, side)]
    first_erased = len(copies)
    if not is_uniform(explanation.raw_map):
        mask = hot_mask(explanation.heatmap, side)
        copies += [np.where(each, erasing, image) for each in (mask, *moved_masks(mask))]
    scores = class_scores(classifier, np.stack(copies), batch_size)
    covering = scores[1:first_erased] if landmarks.markers else (None, None)
    hot = scores[first_erased:]
    return Trial(scores[0], *covering, *((hot[0], hot[1:]) if len(hot) > 1 else (None, None)))


# Over a run


@dataclass(frozen=True)
class Observation:
    """What a run keeps of one map for its audit."""

    explained: str  # class
    heat: np.ndarray  # (CELLS, CELLS) shares; all 0 for a blank map
    has_marker: bool
    findings: tuple[Finding, ...]

    def value(self, check: str) -> float | None:
        return next((finding.value for finding in self.findings if finding.check == check), None)


def observation(explanation: Explanation, landmarks: Landmarks) -> Observation:
    name, heat = explanation.class_names[explanation.explained], heat_on_cells(explanation.raw_map)
    return Observation(name, heat, bool(landmarks.markers), explanation.findings)


def mean_correlation(heats: np.ndarray) -> float:
    """Mean correlation (Pearson) between the maps of two different images: (n, CELLS, CELLS), none constant.

    Of standardised maps z, |sum z|^2 / CELLS^2 holds each pair twice and each map with itself once.
    """
    flat = heats.reshape(len(heats), -1)
    standardised = (flat - flat.mean(axis=1, keepdims=True)) / flat.std(axis=1, keepdims=True)
    summed = (standardised.sum(axis=0) ** 2).mean()
    return float((summed - len(heats)) / (len(heats) * (len(heats) - 1)))


def same_cell_share(heats: np.ndarray) -> float:
    """The largest share of maps whose hottest cell is the same one: (n, CELLS, CELLS)."""
    return float(np.bincount(heats.reshape(len(heats), -1).argmax(axis=1)).max() / len(heats))


def audit_lines(observations: Sequence[Observation]) -> list[str]:
    """What the maps of one model have in common over a run, with the guide's flag where that is suspect."""
    with_flags = [found for each in observations if (found := flagged(each.findings, "map"))]
    counts = Counter(finding.check for found in with_flags for finding in found)
    which = ": " + ", ".join(f"{key} {counts[key]}" for key in CHECKS if counts[key]) if counts else ""
    lines = [f"Map checks: {len(with_flags)} of {len(observations)} maps flagged{which}"]
    for text, value, limit, form in audited(observations):
        sign = "🚩 " if value > limit else ""
        lines.append(f"{sign}{text}: {form(value)}{f', flagged above {form(limit)}' if sign else ''}")
    placed = sum(each.value("focus") is not None for each in observations)
    if placed < FEW_MAPS:
        lines.append(f"Same place in every image: needs {FEW_MAPS} maps that are not blank, here {placed}")
    return lines


def audited(
    observations: Sequence[Observation],
) -> Iterator[tuple[str, float, float, Callable[[float], str]]]:
    """What is measured over a run: words, value, limit, and how to write a value."""
    for name in sorted({each.explained for each in observations}):
        blank = [each.value("blank") for each in observations if each.explained == name]
        if any(blank) and len(blank) >= FEW_MAPS:
            yield f"Blank maps for {printable(name)}", float(np.mean(blank)), BLANK_LIMIT, percent
    placed = [each for each in observations if each.value("focus") is not None]
    if len(placed) >= FEW_MAPS:
        heats = np.stack([each.heat for each in placed])
        yield (
            "Same place in every image, mean correlation of the maps",
            mean_correlation(heats),
            SAME_PLACE_LIMIT,
            "{:.2f}".format,
        )
        yield "Same hottest cell", same_cell_share(heats), SAME_CELL_LIMIT, percent
        dark = [each.value("dark") for each in placed]
        yield "Mean heat where nothing as dense as bone is", float(np.mean(dark)), MEAN_DARK_LIMIT, percent
    marked = [each.value("markers") for each in placed if each.has_marker]
    if len(marked) >= FEW_MAPS:
        yield "Mean heat on markers, where there are any", float(np.mean(marked)), MEAN_MARKER_LIMIT, percent


# Where the fracture is known (--boxes)


@dataclass(frozen=True)
class TrueBox:
    """Where the fracture of one image is, in pixels of the upright image, half-open."""

    x0: float
    y0: float
    x1: float
    y1: float
    source: str  # table and line, for messages


@dataclass(frozen=True)
class Pointing:
    """How a map compares with the true box, enlarged by half a cell of the map's grid on each side."""

    is_inside: bool  # the map's maximum
    heat: float  # share of the heatmap inside
    area: float  # of the image: what heat and maxima in random places reach


def read_boxes(path: Path) -> dict[str, TrueBox]:
    """The boxes of a table, by the real path of the image; images are named from the table's folder.

    Lines without coordinates are images without a fracture. Raises ExplainError, with the line,
    for whatever is no box.
    """
    boxes: dict[str, TrueBox] = {}
    for number, row in box_rows(path):
        source = f"{shown(path)}, line {number}"
        try:
            image, box = path.parent / row["file"], box_of(row, source)
            if not row["file"] or not image.is_file():
                raise ExplainError(f"no such file as {brief(row['file'])} beside the table; correct its name")
            if os.path.realpath(image) in boxes:
                raise ExplainError(
                    f"a second box for {brief(row['file'])}; keep one that holds the whole fracture"
                )
        except (ExplainError, ValueError, OSError) as error:
            cause = error if isinstance(error, ExplainError) else "not a file name; correct it"
            raise ExplainError(f"{source}: {cause}") from error
        if box:
            boxes[os.path.realpath(image)] = box
    return boxes


def box_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and rows of a table of boxes. Raises ExplainError for what is no such table."""
    try:
        with open_regular(path) as file:
            text = file.read(MAX_BOX_TABLE).decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        header = reader.fieldnames or []
        if any(header.count(name) != 1 for name in BOX_COLUMNS):
            raise ExplainError(
                f"its header is {brief(','.join(header))}, not file,class,x0,y0,x1,y1; correct it"
            )
        for row in reader:
            if None in row or None in row.values():
                cause = f"{len(header)} values expected, as in the header; correct it"
                raise ExplainError(f"line {reader.line_num}: {cause}")
            yield reader.line_num, row
    except ExplainError as error:
        raise ExplainError(f"{shown(path)}: {error}") from error
    except UnicodeDecodeError as error:
        raise ExplainError(f"{shown(path)}: not UTF-8 text; save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise ExplainError(f"{shown(path)}: not a CSV table ({error}); save it as CSV again") from error


def box_of(row: dict[str, str], source: str) -> TrueBox | None:
    """The box of one row; None without coordinates. Raises ExplainError, without the line."""
    if not any(row[name].strip() for name in BOX_COLUMNS[1:]):
        return None
    ends = {}
    for name in BOX_COLUMNS[1:]:
        try:
            ends[name] = float(row[name])
        except ValueError as error:
            raise ExplainError(f"{name} is {brief(row[name])}, not a number; correct it") from error
        if not np.isfinite(ends[name]):
            raise ExplainError(f"{name} is {row[name].strip()}, not a finite number; correct it")
        if ends[name] < 0:
            raise ExplainError(f"{name} is {ends[name]:g}, outside the image; correct it")
    for low, high in (("x0", "x1"), ("y0", "y1")):
        if ends[low] >= ends[high]:
            raise ExplainError(
                f"{high} ({ends[high]:g}) is not larger than {low} ({ends[low]:g}); exchange or correct them"
            )
    return TrueBox(**ends, source=source)


def box_in_shares(box: TrueBox, width: int, height: int) -> tuple[float, float, float, float]:
    """A box in shares of the image's sides. Raises ExplainError where it reaches outside the image."""
    if box.x1 > width or box.y1 > height:
        cause = f"the box ends at ({box.x1:g}, {box.y1:g}), outside the image of {width} x {height} pixels"
        raise ExplainError(f"{box.source}: {cause}; correct it")
    return box.x0 / width, box.y0 / height, box.x1 / width, box.y1 / height


def pointing(raw_map: np.ndarray, box: tuple[float, float, float, float]) -> Pointing:
    """The pointing game (J. Zhang et al., ECCV 2016) and the heat inside, of a map (h, w).

    The box is in shares of the image's sides, and counts with half a cell of the map more on each
    side: a map's maximum cannot be told more exactly.
    """
    h, w = raw_map.shape
    x0, y0 = max(0, box[0] - 0.5 / w), max(0, box[1] - 0.5 / h)
    x1, y1 = min(1, box[2] + 0.5 / w), min(1, box[3] + 0.5 / h)
    row, column = np.unravel_index(raw_map.argmax(), raw_map.shape)
    x, y = (column + 0.5) / w, (row + 0.5) / h
    heat = resized(normalised(raw_map), CHECKED_SIDE, CHECKED_SIDE)
    left, top, right, bottom = (round(end * CHECKED_SIDE) for end in (x0, y0, x1, y1))
    share = heat[top:bottom, left:right].sum() / heat.sum() if heat.any() else 0
    is_inside = not is_uniform(raw_map) and x0 <= x <= x1 and y0 <= y <= y1
    return Pointing(bool(is_inside), float(share), (x1 - x0) * (y1 - y0))


# ------------------------------------------------------------------------------------------
# Panels and figures
# ------------------------------------------------------------------------------------------

FONT = "DejaVu Sans"  # comes with matplotlib, so figures look the same everywhere
LARGE, BODY, SMALL = 17, 11.5, 9  # points
INK, MUTED, TRACK, BAR = "#1a1a1a", "#5f5f5f", "#e4e4e4", "#3b6ea5"
CHANGING_DETAILS = ("Explained class", "Peak of raw map")  # from image to image
READING_GUIDE = (  # (place on the colour bar, what it means)
    (1.0, "High attention: raised the score of the explained class"),
    (0.0, "Low attention: counted little or not at all"),
)
BACKGROUNDS: dict[tuple[object, ...], Any] = {}  # pages with their fixed texts alone, as matplotlib copies them
MAX_BACKGROUNDS = 4  # 9 MB each at 150 DPI; two models and their comparison need three
READING_ADVICE = (
    "Good: on the fracture line and the bone around it.",
    "Red flag: on borders, markers, text, or nowhere in particular.",
)


@functools.cache
def drawable_characters() -> frozenset[int]:
    """The code points that the figures' font can draw."""
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont(FONT)).get_charmap())


def drawable(text: str) -> str:
    """Text in which every character that the figures' font lacks is shown as an escape."""
    known = drawable_characters()
    return "".join(
        character if ord(character) in known else character.encode("unicode_escape").decode()
        for character in printable(text)
    )


@functools.lru_cache(maxsize=4096)
def text_width(text: str, points: float, bold: bool) -> float:
    """Width of a line of text in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=FONT, size=points, weight="bold" if bold else "normal")
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72


def elided(text: str, points: float, inches: float, bold: bool = False) -> str:
    """Text cut in the middle until it fits; both ends of a name tell something."""
    text = drawable(text)
    if text_width(text, points, bold) <= inches:
        return text
    low, high = 1, len(text) // 2  # characters kept at each end
    while low < high:
        kept = (low + high + 1) // 2
        fits = text_width(f"{text[:kept]}…{text[-kept:]}", points, bold) <= inches
        low, high = (kept, high) if fits else (low, kept - 1)
    return f"{text[:low]}…{text[-low:]}"


def fitted(pixels: np.ndarray, side: int) -> np.ndarray:
    """A radiograph at the size of a panel: (H, W, 3) -> its longer side `side` pixels."""
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR, reducing_gap=3))


@functools.cache
def colour_table(colormap: str) -> np.ndarray:
    """A matplotlib colormap as (256, 3) uint8."""
    from matplotlib import colormaps

    return (colormaps[colormap](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def coloured(heatmap: np.ndarray, picture: np.ndarray, colormap: str) -> np.ndarray:
    """A heatmap (h, w) in colour at the size of `picture`: (H, W, 3) uint8."""
    levels = resized(heatmap, *picture.shape[:2]) * 255
    return colour_table(colormap)[levels.round().astype(np.uint8)]


@dataclass(frozen=True)
class Panel:
    """A rectangle of a page, in inches from the bottom left; points inside it are (0, 0) to (1, 1).

    A matplotlib Axes would do, but eight of them take longer than everything drawn in them.
    """

    figure: Figure
    left: float
    bottom: float
    width: float
    height: float

    def place(self, x: float, y: float) -> tuple[float, float]:
        """A point of the panel in fractions of the page."""
        across, up = self.figure.get_size_inches()
        return (self.left + x * self.width) / across, (self.bottom + y * self.height) / up

    def write(self, x: float, y: float, text: str, points: float, inches: float, **look: Any) -> None:
        """One line at (x, y), cut in the middle to `inches`; `animated` if it changes from image to image."""
        line = elided(text, points, inches, bold=look.get("weight") == "bold")
        self.figure.text(*self.place(x, y), line, fontsize=points, parse_math=False, **{"color": INK, "va": "top", **look})

    def fill(self, x: float, y: float, width: float, height: float, colour: Any) -> None:
        """A rectangle of one colour, its bottom left at (x, y)."""
        from matplotlib.patches import Rectangle

        (x0, y0), (x1, y1) = self.place(x, y), self.place(x + width, y + height)
        self.figure.add_artist(Rectangle((x0, y0), x1 - x0, y1 - y0, facecolor=colour, edgecolor="none", animated=True))

    def show(self, pixels: np.ndarray, title: str) -> None:
        """A picture (H, W, 3) uint8, pixel for pixel in the middle of the panel, under its title."""
        (height, width), dpi = pixels.shape[:2], self.figure.dpi
        left = round((self.left + self.width / 2) * dpi - width / 2)
        bottom = round((self.bottom + self.height / 2) * dpi - height / 2)
        self.figure.add_artist(picture_class()(pixels, left, bottom, title))
        # The title sits on its picture, not on the top of a panel that a wide picture leaves empty.
        top = (bottom + height) / dpi - self.bottom
        self.write(0.5, top / self.height + 0.02, title, BODY, self.width, ha="center", va="bottom")


@functools.cache
def picture_class() -> type[Artist]:
    """An artist that copies pixels to the page as they are; matplotlib's own images are resampled."""
    from matplotlib.artist import Artist

    class Picture(Artist):
        def __init__(self, pixels: np.ndarray, left: int, bottom: int, title: str) -> None:
            super().__init__()
            self.pixels, self.left, self.bottom = pixels, left, bottom
            self.set(label=title, animated=True)

        def draw(self, renderer: Any) -> None:
            opaque = np.full((*self.pixels.shape[:2], 1), 255, np.uint8)
            upwards = np.concatenate([self.pixels, opaque], axis=2)[::-1]  # as Agg draws
            renderer.draw_image(renderer.new_gc(), self.left, self.bottom, upwards)

    return Picture


def draw_heatmap(panel: Panel, picture: np.ndarray, explanation: Explanation, style: FigureStyle, title: str) -> None:
    """The heatmap alone, at the size of the picture; a map with a remark says it."""
    panel.show(coloured(explanation.heatmap, picture, style.colormap), title)
    if explanation.remark:
        frame = {"facecolor": "white", "edgecolor": MUTED, "boxstyle": "round,pad=0.6"}
        panel.write(0.5, 0.5, explanation.remark, SMALL, panel.width - 0.3, ha="center", va="center", bbox=frame, animated=True)


def draw_overlay(panel: Panel, picture: np.ndarray, explanation: Explanation, style: FigureStyle, title: str) -> None:
    """The heatmap over the radiograph; a blank map leaves the radiograph as it is."""
    if explanation.heatmap.any():
        colours = coloured(explanation.heatmap, picture, style.colormap)
        picture = np.asarray(Image.blend(Image.fromarray(picture), Image.fromarray(colours), OVERLAY_WEIGHT))
    panel.show(picture, title)


def draw_colour_bar(panel: Panel, style: FigureStyle) -> None:
    """The scale of the heatmaps: 0 at the bottom, 1 at the top."""
    height, width = round(panel.height * style.dpi), round(panel.width * style.dpi)
    levels = np.linspace(255, 0, height).round().astype(np.uint8)
    panel.show(colour_table(style.colormap)[np.repeat(levels[:, None], width, axis=1)], "")
    for value in (0, 0.5, 1):
        panel.write(1.4, value, f"{value:g}", SMALL, 1, va="center")
    panel.write(3.6, 0.25, "relative importance", SMALL, 2, color=MUTED, rotation=90, va="center", ha="center")


def draw_probabilities(panel: Panel, explanation: Explanation, top: float) -> float:
    """A line and a bar for each of the likeliest classes from `top` down; returns where they end."""
    listed = explanation.ranking[:MAX_LISTED_CLASSES]
    step = 0.115 if len(listed) < 3 else 0.088
    for index in listed:
        weight = "bold" if index == explanation.predicted else "normal"
        probability = float(explanation.probabilities[index])
        panel.write(0, top, explanation.class_names[index], BODY, 3.5, weight=weight, animated=True)
        panel.write(1, top, f"{probability:.2%}", BODY, 1, weight=weight, ha="right", animated=True)
        panel.fill(0, top - 0.7 * step, 1, 0.018, TRACK)
        panel.fill(0, top - 0.7 * step, probability, 0.018, BAR)
        top -= step
    return top


def detail_lines(explanation: Explanation) -> list[tuple[str, str]]:
    """What the details panel lists: (label, value)."""
    h, w = explanation.heatmap.shape
    return [
        ("Explained class", explanation.explained_text),
        ("Model", explanation.architecture),
        ("Checkpoint", explanation.checkpoint),
        ("", explanation.accuracy),
        ("Target layer", f"{explanation.target_layer}, {h}×{w} grid: one cell is 1/{h * w} of the image"),
        ("Peak of raw map", f"{explanation.raw_map.max():.3g} (the colours are relative to it)"),
    ]


def draw_details(panel: Panel, explanation: Explanation, style: FigureStyle) -> None:
    """The panel of text: prediction, probabilities, provenance and how to read the colours."""
    panel.write(0, 1, "Prediction", SMALL, 4, color=MUTED)
    panel.write(0, 0.955, explanation.prediction, LARGE, panel.width, weight="bold", animated=True)
    panel.write(0, 0.88, f"Confidence: {explanation.confidence:.2%}", BODY, 4, animated=True)
    top = draw_probabilities(panel, explanation, top=0.79) - 0.01
    for label, value in detail_lines(explanation):
        panel.write(0, top, label, SMALL, 1.2, color=MUTED)
        panel.write(0.26, top, value, SMALL, panel.width * 0.74, animated=label in CHANGING_DETAILS)
        top -= 0.046
    panel.write(0, top - 0.02, "How to read the heatmap", SMALL, 4, color=MUTED)
    for place, text in READING_GUIDE:
        top -= 0.055
        panel.fill(0, top - 0.048, 0.05, 0.03, colour_table(style.colormap)[int(255 * place)] / 255)
        panel.write(0.08, top - 0.017, text, SMALL, panel.width * 0.92)
    for text in READING_ADVICE:
        top -= 0.046
        panel.write(0, top - 0.025, text, SMALL, panel.width)


def footer_text(explanations: Sequence[Explanation]) -> str:
    """What stands below every figure."""
    if explanations[0].is_demo:
        return f"Demo {'networks' if len(explanations) > 1 else 'network'}: {DEMO_NOTICE}."
    return "Grad-CAM shows correlation, not cause. Not for diagnosis."


def new_figure(width: float, height: float, style: FigureStyle, title: str, name: str, footer: str) -> Figure:
    """A page of width x height inches with its title, the file's name and a footer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=style.dpi, facecolor="white")
    write = functools.partial(figure.text, ha="center", va="center", parse_math=False)
    write(0.5, 1 - 0.32 / height, elided(title, LARGE, width - 0.6, bold=True), fontsize=LARGE, weight="bold", color=INK, animated=True)
    write(0.5, 1 - 0.62 / height, elided(name, BODY, width - 0.6), fontsize=BODY, color=MUTED, animated=True)
    write(0.5, 0.2 / height, footer, fontsize=SMALL, color=MUTED)
    return figure


def explanation_figure(picture: np.ndarray, name: str, explanation: Explanation, style: FigureStyle) -> Figure:
    """The 4-panel figure: radiograph, heatmap, overlay, prediction details."""
    figure = new_figure(10, 10, style, f"Grad-CAM: {explanation.title}", name, footer_text([explanation]))
    side, top, bottom = PANEL_INCHES, 4.9, 0.45
    Panel(figure, 0.4, top, side, side).show(picture, "Original X-ray")
    draw_heatmap(Panel(figure, 4.9, top, side, side), picture, explanation, style, "Grad-CAM Heatmap")
    draw_colour_bar(Panel(figure, 9.15, top, 0.15, side), style)
    draw_overlay(Panel(figure, 0.4, bottom, side, side), picture, explanation, style, "Overlay (Model Focus)")
    draw_details(Panel(figure, 4.95, bottom, 4.65, side), explanation, style)
    return figure


def agree(explanations: Sequence[Explanation]) -> bool:
    """Whether the models predict the same class, however they spell it."""
    return len({class_key(explanation.prediction) for explanation in explanations}) == 1


def agreement_text(explanations: Sequence[Explanation]) -> str:
    """Whether the models predict the same class, in words."""
    first, second = explanations
    if agree(explanations):
        return f"Both models agree: {first.prediction}"
    return f"Models disagree: {first.title} says {first.prediction}, {second.title} says {second.prediction}"


def row_heading(explanation: Explanation) -> str:
    heading = f"{explanation.title}: {explanation.prediction}, confidence {explanation.confidence:.2%}"
    if explanation.explained != explanation.predicted:
        heading += f" (explained class: {explanation.class_names[explanation.explained]})"
    return heading


def comparison_figure(picture: np.ndarray, name: str, explanations: Sequence[Explanation], style: FigureStyle) -> Figure:
    """The 6-panel figure: a row for each model of radiograph, heatmap and overlay."""
    figure = new_figure(14, 10.8, style, agreement_text(explanations), name, footer_text(explanations))
    side = PANEL_INCHES
    for explanation, bottom in zip(explanations, (5.4, 0.45)):
        Panel(figure, 0.4, bottom, 13.2, side).write(0, 1.1, row_heading(explanation), BODY, 13.2, weight="bold", va="center", animated=True)
        Panel(figure, 0.2, bottom, side, side).show(picture, "Original")
        draw_heatmap(Panel(figure, 4.6, bottom, side, side), picture, explanation, style, "Heatmap")
        draw_overlay(Panel(figure, 9.0, bottom, side, side), picture, explanation, style, "Overlay")
        draw_colour_bar(Panel(figure, 13.25, bottom, 0.15, side), style)
    return figure


# ------------------------------------------------------------------------------------------
# Outputs: names and files
# ------------------------------------------------------------------------------------------


def check_output_folder(folder: Path) -> None:
    """Make the output folder and try it. Raises ExplainError where no figure could be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(PROBE_BYTES))
    except OSError as error:
        raise unwritable(folder, error) from error


def unwritable(path: Path, error: OSError) -> ExplainError:
    return ExplainError(f"{shown(path)}: cannot be written ({error.strerror or error}); choose another place with --output-dir")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the name `path` at the end, or goes away.

    A link at `path` is replaced, not followed. Raises ExplainError where the system refuses.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def drawn(figure: Figure) -> FigureCanvasAgg:
    """Draw a page: its fixed texts once for all pages that have the same, then what is `animated`.

    Texts are half of a page's drawing time, and most of them stay from image to image.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    fixed = [text for text in figure.texts if not text.get_animated()]
    key = (figure.bbox.bounds, *((text.get_text(), text.get_position(), text.get_color()) for text in fixed))
    if key not in BACKGROUNDS:
        canvas.draw()
        if len(BACKGROUNDS) == MAX_BACKGROUNDS or figure.dpi > 200:  # 100 MB and more at 600 DPI
            BACKGROUNDS.clear()
        BACKGROUNDS[key] = canvas.copy_from_bbox(figure.bbox)
    canvas.restore_region(BACKGROUNDS[key])
    for artist in (*figure.artists, *figure.patches, *figure.texts):
        if artist.get_animated():
            figure.draw_artist(artist)
    return canvas


def png(pixels: np.ndarray, dpi: float, settings: str) -> bytes:
    """Pixels (H, W, 3) uint8 as a PNG file, with its resolution and a text chunk named Settings.

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
        (b"tEXt", b"Settings\0" + settings.encode("latin-1")),
        (b"IDAT", zlib.compress(rows, PNG_LEVEL)),
        (b"IEND", b""),
    )
    packed = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def write_page(figure: Figure, path: Path, settings: str = "") -> None:
    """Draw a figure and write it as PNG, with the job's settings in it."""
    canvas = drawn(figure)
    page = png(np.asarray(canvas.buffer_rgba())[:, :, :3], figure.dpi, settings)
    canvas.renderer = None  # 9 MB that would stay until Python looks for cycles: figure and canvas hold each other
    with replacing(path) as file:
        file.write(page)


def settings_of(figure: Path) -> str | None:
    """The settings that a figure was drawn with; None where it is not there or not whole."""
    try:
        with open_regular(figure) as file, Image.open(file, formats=("PNG",)) as page:
            return page.info.get("Settings")
    except (ExplainError, OSError, SyntaxError, ValueError):
        return None


def short_stem(stem: str) -> str:
    """A file's stem, cut where its outputs' names would be longer than file systems allow."""
    encoded = os.fsencode(stem)
    if len(encoded) <= MAX_STEM_BYTES:
        return stem
    return encoded[: MAX_STEM_BYTES - 9].decode(errors="ignore") + "_" + hashlib.sha256(encoded).hexdigest()[:8]


def output_stems(images: Sequence[Path]) -> list[str]:
    """What the names of each image's outputs end in: the image's own stem.

    Images of one run that share a stem get their folder's name before it, and if that does not
    tell them apart, a number behind it in the order of the images. Upper and lower case do not
    tell names apart: some file systems do not.
    """
    counts = Counter(path.stem.casefold() for path in images)
    taken: set[str] = set()
    stems = []
    for path in images:
        shared = counts[path.stem.casefold()] > 1
        wanted = short_stem(f"{path.absolute().parent.name}_{path.stem}" if shared else path.stem)
        numbered = (f"{wanted}_{number}" for number in itertools.count(2))
        stems.append(next(stem for stem in itertools.chain([wanted], numbered) if stem.casefold() not in taken))
        taken.add(stems[-1].casefold())
    return stems


@dataclass(frozen=True)
class Job:
    """One image to explain, and the files that will come of it."""

    image: Path
    figures: tuple[Path, ...]  # one for each model, then the comparison where there are two models
    maps: tuple[Path, ...]  # one .npy for each model; its .json lies beside it
    settings: str  # mark of the image's content and of all that its results depend on


def file_mark(path: Path) -> tuple[int, str]:
    """Size and checksum of the first and last megabyte: tells files apart without reading a gigabyte.

    A file that cannot be read has the mark of an empty one; what is wrong is said when it is used.
    """
    with contextlib.suppress(ExplainError, OSError), open_regular(path) as file:
        size, ends = file.seek(0, os.SEEK_END), hashlib.sha256()
        for start in (0, max(0, size - MARKED_BYTES)):
            file.seek(start)
            ends.update(file.read(MARKED_BYTES))
        return size, ends.hexdigest()
    return 0, ""


def make_jobs(images: Sequence[Path], keys: Sequence[str], folder: Path, figures: bool, maps: bool, asked: object) -> list[Job]:
    """A job for each image; `asked` is all that results depend on beside the image.

    Raises ExplainError where an output would replace one of the images.
    """
    prefixes = [f"gradcam_{key}" for key in keys] + ["comparison"] * (len(keys) > 1)
    jobs = [
        Job(
            image,
            tuple(folder / f"{prefix}_{stem}.png" for prefix in prefixes) if figures else (),
            tuple(folder / f"map_{key}_{stem}.npy" for key in keys) if maps else (),
            hashlib.sha256(repr((asked, file_mark(image))).encode("utf-8", "surrogateescape")).hexdigest()[:16],
        )
        for image, stem in zip(images, output_stems(images))
    ]
    inputs = {os.path.realpath(image) for image in images}
    for job in jobs:
        for path in (*job.figures, *job.maps, *(path.with_suffix(".json") for path in job.maps), folder / TABLE_NAME):
            if os.path.realpath(path) in inputs:
                raise ExplainError(f"{shown(path)}: is an input of this run and would be replaced; choose another --output-dir")
    return jobs


def write_figure(job: Job, index: int, picture: np.ndarray, explanations: Sequence[Explanation], style: FigureStyle) -> None:
    """Figure `index` of a job: the four panels of that explanation, or, after the last one's, the comparison.

    Raises ExplainError where it cannot be written.
    """
    if index < len(explanations):
        figure = explanation_figure(picture, job.image.name, explanations[index], style)
    else:
        figure = comparison_figure(picture, job.image.name, explanations, style)
    write_page(figure, job.figures[index], job.settings)


def write_figures(job: Job, picture: np.ndarray, explanations: Sequence[Explanation], style: FigureStyle) -> None:
    """All figures of a job. Raises ExplainError where one cannot be written."""
    for index in range(len(job.figures)):
        write_figure(job, index, picture, explanations, style)


def write_maps(job: Job, classifiers: Sequence[Classifier], explanations: Sequence[Explanation]) -> None:
    """Each raw map as .npy (h, w) float32, and beside it as .json what it takes to compute it again."""
    for classifier, explanation, path in zip(classifiers, explanations, job.maps):
        told = json.dumps(provenance(job.image, classifier, explanation), indent=2)
        with replacing(path) as file:
            np.save(file, explanation.raw_map, allow_pickle=False)
        with replacing(path.with_suffix(".json")) as file:
            file.write(told.encode())


def provenance(image: Path, classifier: Classifier, explanation: Explanation) -> dict[str, Any]:
    """Everything that a raw map depends on."""
    return {
        "image": shown(image),
        "image_sha256": file_digest(image),
        "checkpoint": shown(classifier.checkpoint),
        "checkpoint_sha256": file_digest(classifier.checkpoint),
        "architecture": explanation.architecture,
        "target_layer": explanation.target_layer,
        "method": "Grad-CAM before the ReLU",
        "explained_class": explanation.explained,
        "class_names": explanation.class_names,
        "probabilities": explanation.probabilities.tolist(),
        "preprocessing": dataclasses.asdict(classifier.preprocessing),
        "versions": {name: version(name) for name in ("torch", "timm", "numpy", "pillow")},
    }


@functools.lru_cache(maxsize=8)
def file_digest(path: Path) -> str:
    """SHA-256 of a file; checkpoints are read once a run. Raises ExplainError where it has gone."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (ExplainError, OSError) as error:
        raise ExplainError(f"{shown(path)}: changed or removed during the run; run again") from error


# ------------------------------------------------------------------------------------------
# The table of results
# ------------------------------------------------------------------------------------------

TABLE_NAME = "summary.csv"


def true_class(image: Path, class_names: Sequence[str]) -> str:
    """The class that the image's folder names (simple_fracture, Simple Fracture ...), or nothing."""
    folder = class_key(Path(os.path.abspath(image)).parent.name)
    return next((name for name in class_names if class_key(name) == folder), "")


def table_columns(classifiers: Sequence[Classifier]) -> list[str]:
    columns = ["file", "true_class"]
    for classifier in classifiers:
        key = classifier.family.key
        columns += [f"{key}_predicted", *(f"{key}_p_{name}" for name in classifier.class_names), f"{key}_correct", f"{key}_blank_map"]
    return [*columns, "agree", "settings", "outputs", "error"]


def table_row(job: Job, explanations: Sequence[Explanation]) -> dict[str, str]:
    """One image's results, as text: yes, no, or empty where it cannot be said."""
    truth = true_class(job.image, explanations[0].class_names)
    row = {"file": str(job.image), "true_class": truth}
    for explanation in explanations:
        key = explanation.family
        row[f"{key}_predicted"] = explanation.prediction
        for name, probability in zip(explanation.class_names, explanation.probabilities):
            row[f"{key}_p_{name}"] = f"{probability:.6f}"
        row[f"{key}_correct"] = yes_or_no(class_key(explanation.prediction) == class_key(truth)) if truth else ""
        row[f"{key}_blank_map"] = yes_or_no(not explanation.heatmap.any())
    if len(explanations) > 1:
        row["agree"] = yes_or_no(agree(explanations))
    return row | {"settings": job.settings, "outputs": ";".join(path.name for path in job.figures + job.maps), "error": ""}


def yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


def is_finished(job: Job) -> bool:
    """Whether all files that a job would write are there, the figures drawn with its settings."""
    return all(settings_of(path) == job.settings for path in job.figures) and all(path.exists() for path in job.maps)


def is_row_of(row: dict[str, str], job: Job) -> bool:
    """Whether a row of an earlier run's table is what this job would give."""
    return row["settings"] == job.settings and not row["error"] and is_finished(job)


def earlier_rows(folder: Path, columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """The whole rows of an earlier run's table, by file.

    Raises ExplainError where the table cannot be read or has other columns than this run's.
    """
    path = folder / TABLE_NAME
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames not in (None, columns):
                cause = "its columns are not those of this run (another --model, or other classes)"
                raise ExplainError(f"{shown(path)}: {cause}; move it away, or choose another --output-dir")
            return {row["file"]: row for row in reader if None not in row.values()}
    except FileNotFoundError:
        return {}
    except (OSError, csv.Error) as error:
        raise ExplainError(f"{shown(path)}: cannot be read ({error}); move it away") from error


@contextlib.contextmanager
def open_table(folder: Path, columns: Sequence[str], kept: Iterable[dict[str, str]]) -> Iterator[Callable[[dict[str, str]], None]]:
    """Write summary.csv row by row, each out of this process's hands before the next; starts with the kept rows."""
    path = folder / TABLE_NAME
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="", write_through=True)
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        writer.writerows(kept)
        text.detach()
    with open(path, "a", encoding="utf-8", errors="surrogateescape", newline="") as text:
        writer = csv.DictWriter(text, columns, restval="")

        def add(row: dict[str, str]) -> None:
            try:
                writer.writerow(row)
                text.flush()
            except OSError as error:
                raise unwritable(path, error) from error

        yield add


# ------------------------------------------------------------------------------------------
# Console text
# ------------------------------------------------------------------------------------------


def say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


def warn(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def prediction_lines(explanation: Explanation) -> list[str]:
    lines = [
        f"{explanation.title}:",
        f"  Prediction: {printable(explanation.prediction)}",
        f"  Confidence: {explanation.confidence:.2%}",
    ]
    if explanation.explained != explanation.predicted:
        lines.append(f"  Explained class: {printable(explanation.class_names[explanation.explained])}")
    if explanation.remark:
        lines.append(f"  ⚠️  {printable(explanation.remark)}")
    return lines


def comparison_lines(explanations: Sequence[Explanation]) -> list[str]:
    """The comparison summary of one image."""
    lines = [RULE, "📊 COMPARISON SUMMARY", RULE]
    for explanation in explanations:
        lines += [*prediction_lines(explanation), ""]
    return [*lines, f"{'✅' if agree(explanations) else '⚠️ '} {printable(agreement_text(explanations))}"]


def result_line(job: Job, explanations: Sequence[Explanation]) -> str:
    """One image of many in one line."""
    verdicts = "; ".join(
        f"{each.title} {printable(each.prediction)} {each.confidence:.2%}{' (blank map)' if not each.heatmap.any() else ''}"
        for each in explanations
    )
    mark, verdict = ("✅", "") if agree(explanations) else ("⚠️ ", "; models disagree")
    return f"{mark} {shown(job.image)}: {verdicts}{verdict}"


def run_lines(rows: Sequence[dict[str, str]], classifiers: Sequence[Classifier], kept: int, seconds: float) -> list[str]:
    """What a run over many images found: speed, accuracy, confusion, the images to look at."""
    failed = [row for row in rows if row["error"]]
    done = [row for row in rows if not row["error"]]
    lines = [RULE, "📊 RUN SUMMARY", RULE, f"Images: {len(done)} done, {len(failed)} failed"]
    if len(done) > kept:
        lines.append(f"Speed: {(len(done) - kept) / seconds:.2f} images per second ({len(done) - kept} images in {seconds:.1f} s)")
    for classifier in classifiers:
        lines += ["", *accuracy_lines(done, classifier)]
    if len(classifiers) > 1 and done:
        differ = [row for row in done if row["agree"] == "no"]
        lines += ["", f"Models agree on {len(done) - len(differ)} of {len(done)} images"]
        lines += [f"  Disagree: {shown(Path(row['file']))}" for row in differ]
    return lines


def accuracy_lines(rows: Sequence[dict[str, str]], classifier: Classifier) -> list[str]:
    """Accuracy, confusion counts and misclassified files of one model, against the folder names."""
    key, names = classifier.family.key, classifier.class_names
    known = [row for row in rows if row["true_class"]]
    if not known:
        return [f"{classifier.title}:", "  Accuracy: unknown, no folder is named after a class"]
    wrong = [row for row in known if row[f"{key}_correct"] == "no"]
    right = len(known) - len(wrong)
    lines = [f"{classifier.title}:", f"  Accuracy: {right / len(known):.2%} ({right} of {len(known)} images in folders named after a class)"]
    counts = Counter((class_key(row["true_class"]), class_key(row[f"{key}_predicted"])) for row in known)
    for truth in names:
        counted = ", ".join(f"{counts[class_key(truth), class_key(name)]} as {name}" for name in names)
        lines.append(f"  {truth}: {counted}")
    return lines + [f"  Misclassified: {shown(Path(row['file']))} as {printable(row[f'{key}_predicted'])}" for row in wrong]


# ------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What one run is asked to do, checked as far as the file system can tell."""

    jobs: tuple[Job, ...]
    is_random: bool
    is_single: bool  # one image, named by itself or drawn: the console text is about it alone
    checkpoints: tuple[tuple[Family, Path], ...]
    output_folder: Path
    device: str
    target_class: str | None
    style: FigureStyle
    batch_size: int | None
    skip_existing: bool
    quiet: bool


def load_models(request: Request) -> list[Classifier]:
    """Load every model that the request names, and say so."""
    use_exact_float32()
    device, classifiers = choose_device(request.device), []
    for family, path in request.checkpoints:
        say(f"📦 Loading {family.key.upper()} model...")
        classifier = load_classifier(family, path, device)
        warn(*note_lines(path, classifier.notes))
        target_index(request.target_class, classifier.class_names)
        say(f"✅ Model loaded: {classifier.architecture}", f"   {classifier.accuracy}", "")
        classifiers.append(classifier)
    return classifiers


def demo_lines(checkpoints: Sequence[Path]) -> list[str]:
    """What every run with demo networks ends in, also a quiet one."""
    noun = "networks" if len(checkpoints) > 1 else "network"
    return ["", f"⚠️  Demo {noun}: {DEMO_NOTICE}"] if is_demo(checkpoints[0]) else []


def note_lines(path: Path, notes: Sequence[str]) -> list[str]:
    return [f"ℹ️  {shown(path)}: {note}" for note in notes]


def panel_picture(radiograph: Radiograph, style: FigureStyle) -> np.ndarray:
    return fitted(radiograph.pixels, round(PANEL_INCHES * style.dpi))


def run_single(request: Request) -> tuple[list[str], int]:
    """Explain one image with every model and write its files; returns what to say last, and the exit status."""
    (job,), both = request.jobs, len(request.checkpoints) > 1
    if request.skip_existing and job.figures and is_finished(job):
        return [f"⏭️  Finished earlier, left alone: {shown(job.image)}"], 0
    if request.is_random:
        say("🎲 No image specified. Using random test image:", f"   {shown(job.image)}", "")
    say(f"🔍 {'Comparing' if both else 'Analyzing'} explainability for: {printable(job.image.name)}", RULE)
    radiograph = load_radiograph(job.image)
    warn(*note_lines(job.image, radiograph.notes))
    picture = panel_picture(radiograph, request.style)
    classifiers, explanations = load_models(request), []
    for index, classifier in enumerate(classifiers):
        say(f"{classifier.family.bullet} Generating {classifier.title} Grad-CAM...")
        explanations += explain(classifier, [radiograph], target_index(request.target_class, classifier.class_names))
        for path in job.figures[index : index + 1]:
            write_figure(job, index, picture, explanations, request.style)
            say(f"✅ Visualization saved: {shown(path)}", "")
    write_maps(job, classifiers, explanations)
    for path in job.figures[len(classifiers) :]:
        say("📊 Creating comparison visualization...")
        write_figure(job, len(classifiers), picture, explanations, request.style)
        say(f"✅ Comparison saved: {shown(path)}", "")
    return comparison_lines(explanations) if both else prediction_lines(explanations[0]), 0


@dataclass(frozen=True)
class Result:
    """What became of one job of many: explanations and the picture for its panels, or an error."""

    job: Job
    explanations: tuple[Explanation, ...] = ()
    picture: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Prepared:
    """What is kept of a radiograph: its size does not matter for the memory that a batch takes."""

    inputs: tuple[np.ndarray, ...]  # for each classifier
    picture: np.ndarray
    notes: tuple[str, ...]


def prepare(job: Job, classifiers: Sequence[Classifier], style: FigureStyle) -> Prepared | ExplainError:
    """Load and reduce a job's image; the error where that fails."""
    try:
        radiograph = load_radiograph(job.image)
    except ExplainError as error:
        return error
    inputs = tuple(network_input(radiograph, classifier.preprocessing) for classifier in classifiers)
    return Prepared(inputs, panel_picture(radiograph, style), radiograph.notes)


def explain_jobs(jobs: Sequence[Job], classifiers: Sequence[Classifier], request: Request) -> Iterator[Result]:
    """Explain many images, a batch at a time; an image that cannot be read does not stop the others."""
    size = request.batch_size or DEFAULT_BATCH[classifiers[0].device.type]
    targets = [target_index(request.target_class, classifier.class_names) for classifier in classifiers]
    for start in range(0, len(jobs), size):
        batch = [(job, prepare(job, classifiers, request.style)) for job in jobs[start : start + size]]
        inputs = zip(*(prepared.inputs for _, prepared in batch if isinstance(prepared, Prepared)))  # by classifier
        explained = zip(*map(explain_batch, classifiers, inputs, targets))  # by image
        for job, prepared in batch:
            if isinstance(prepared, Prepared):
                yield Result(job, next(explained), prepared.picture, prepared.notes)
            else:
                yield Result(job, error=str(prepared))


def drawing_processes(jobs: Sequence[Job]) -> int:
    """How many processes draw: one a core, also beside networks on the CPU, which leave each core a part."""
    return min(MAX_DRAWING_PROCESSES, os.cpu_count() or 1, len(jobs)) if jobs[0].figures else 0


@contextlib.contextmanager
def drawing_pool(processes: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes that draw figures, None for none of them; they import matplotlib and never torch.

    Raises ExplainError where one of them is killed.
    """
    if not processes:
        yield None
        return
    ignoring = signal.signal, (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), *ignoring)
    # Ctrl-C is not for them, from their start: what they have begun they finish, what waits is dropped.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for _ in range(processes):
        pool.submit(drawable_characters)  # so they start now, while the networks are loaded
    signal.signal(signal.SIGINT, handler)
    try:
        yield pool
    except BrokenExecutor as error:
        raise ExplainError("drawing: a process that draws figures was killed; free some memory, then go on with --skip-existing") from error
    finally:
        pool.shutdown(cancel_futures=True)


def run_many(request: Request) -> tuple[list[str], int]:
    """Explain many images in batches, with a row of the table for each; returns as run_single."""
    # Read when torch is imported: its threads then sleep while they wait, and leave the cores to the drawing.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with drawing_pool(drawing_processes(request.jobs)) as pool:
        say(f"🔍 {'Comparing' if len(request.checkpoints) > 1 else 'Analyzing'} explainability for {len(request.jobs)} images", RULE)
        classifiers = load_models(request)
        columns = table_columns(classifiers)
        earlier = earlier_rows(request.output_folder, columns) if request.skip_existing else {}
        rows = [row for job in request.jobs if (row := earlier.get(str(job.image))) and is_row_of(row, job)]
        finished = {row["file"] for row in rows}
        jobs = [job for job in request.jobs if str(job.image) not in finished]
        if finished:
            say(f"⏭️  Finished earlier, left alone: {len(finished)} images", "")
        started, again = time.monotonic(), {str(job.image) for job in jobs}
        kept = [row for file, row in earlier.items() if file not in again]
        with open_table(request.output_folder, columns, kept) as add, progress_bar(len(jobs), request.quiet) as bar:
            for result, row in finished_jobs(pool, jobs, classifiers, request):
                add(row)
                rows.append(row)
                for line in note_lines(result.job.image, result.notes) + [f"❌ {row['error']}"] * bool(row["error"]):
                    bar.write(line, file=sys.stderr)
                if not row["error"]:
                    bar.write(result_line(result.job, result.explanations), file=sys.stdout)
                    sys.stdout.flush()
                bar.update()
    lines = run_lines(rows, classifiers, len(finished), time.monotonic() - started)
    return [*lines, f"Table: {shown(request.output_folder / TABLE_NAME)}"], int(any(row["error"] for row in rows))


def finished_jobs(
    pool: ProcessPoolExecutor | None, jobs: Sequence[Job], classifiers: Sequence[Classifier], request: Request
) -> Iterator[tuple[Result, dict[str, str]]]:
    """Each job's result and its row of the table, once its files are written.

    The networks run ahead of the drawing by a few images only, so that memory does not grow.
    """
    waiting: deque[tuple[Result, Future[None] | None]] = deque()
    for result in explain_jobs(jobs, classifiers, request):
        is_drawn = result.job.figures and not result.error
        arguments = (result.job, result.picture, result.explanations, request.style)
        waiting.append((result, pool.submit(write_figures, *arguments) if is_drawn else None))
        while waiting and (waiting[0][1] is None or waiting[0][1].done() or len(waiting) > MAX_WAITING_JOBS):
            yield finished_job(*waiting.popleft(), classifiers)
    for result, drawn in waiting:
        yield finished_job(result, drawn, classifiers)


def finished_job(result: Result, drawn: Future[None] | None, classifiers: Sequence[Classifier]) -> tuple[Result, dict[str, str]]:
    """Wait for a job's figures and write its maps; its row says whether that worked."""
    try:
        if result.error:
            raise ExplainError(result.error)
        if drawn is not None:
            drawn.result()
        write_maps(result.job, classifiers, result.explanations)
        return result, table_row(result.job, result.explanations)
    except ExplainError as error:
        truth = true_class(result.job.image, classifiers[0].class_names)
        return result, {"file": str(result.job.image), "true_class": truth, "error": str(error)}


def progress_bar(total: int, quiet: bool) -> tqdm:
    """A bar on a terminal; where standard error is none, only the lines written through it."""
    from tqdm import tqdm

    return tqdm(total=total, unit="image", disable=quiet or not sys.stderr.isatty())


# ------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------

EXAMPLES = """examples:
  python3 explainability.py
  python3 explainability.py --image path/to/xray.jpg
  python3 explainability.py --image path/to/xray.jpg --model convnext
  python3 explainability.py --image path/to/xray.jpg --target-class "Simple Fracture"
  python3 explainability.py --image data_original/test --skip-existing
  for img in data_original/test/*/*.jpg; do python3 explainability.py --image "$img"; done
"""


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def colormap_name(text: str) -> str:
    """An argparse type: the name of a colormap of matplotlib, which is imported only for other names than jet."""
    if text != "jet":
        from matplotlib import colormaps

        if text not in colormaps:
            raise argparse.ArgumentTypeError(f"matplotlib has no colormap {text!r}; viridis, magma, gray ... are there")
    return text


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Show where bone-fracture classifiers look, with Grad-CAM.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--image", nargs="+", metavar="PATH", help="X-ray images, folders or quoted patterns (default: a random test image)")
    add("--model", choices=[*FAMILIES, "both"], default="both", help="which model to analyze (default: both)")
    add("--compare", action="store_true", help="both models and their comparison, whatever --model says")
    add("--seed", type=whole_number(0, 2**63), metavar="N", help="repeat the choice of the random test image")
    add("--target-class", metavar="CLASS", help="name or index of the class to explain (default: the predicted class)")
    add("--output-dir", type=Path, default=OUTPUT_FOLDER, metavar="DIR", help="where results go (default: explainability_outputs)")
    for family in FAMILIES.values():
        add(f"--{family.key}-checkpoint", type=Path, metavar="FILE", help=f"default: checkpoints/{family.key}*")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute (default: auto)")
    add("--colormap", type=colormap_name, default="jet", metavar="NAME", help="any matplotlib colormap (default: jet; viridis is perceptually uniform)")
    add("--dpi", type=whole_number(30, 1200), default=150, metavar="N", help="resolution of the figures (default: 150)")
    add("--batch-size", type=whole_number(1, 4096), metavar="N", help="images computed at once (default: 4, on a GPU 32)")
    add("--skip-existing", action="store_true", help="of many images, leave those alone that an earlier run finished")
    add("--no-figures", action="store_true", help="numbers alone")
    add("--save-maps", action="store_true", help="also write the raw maps, before the ReLU, as .npy with a .json beside each")
    add("--quiet", action="store_true", help="print only the final summary, warnings and errors")
    return parser


def images_below(folder: Path) -> list[Path]:
    """Every file below a folder that has an image's suffix, or none and the mark of DICOM; sorted.

    Raises ExplainError where a folder cannot be searched.
    """

    def refuse(error: OSError) -> None:
        place = shown(Path(error.filename))
        raise ExplainError(f"{place}: cannot be searched ({error.strerror}); change its mode, or name the other folders")

    paths = (Path(parent, name) for parent, _, names in os.walk(folder, onerror=refuse) for name in names)
    return sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES or (not path.suffix and is_dicom(path)))


def is_dicom(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return file.read(HEAD_BYTES)[DICOM_MARK] == b"DICM"
    except (ExplainError, OSError):
        return False


def found_images(arguments: Sequence[str], output_folder: Path) -> list[Path]:
    """The images that --image names, each once: files as they are, folders and patterns sorted.

    The output folder's own files are not looked at. Raises ExplainError where nothing is found.
    """
    outputs = Path(os.path.realpath(output_folder))
    images: list[Path] = []
    for text in arguments:
        if os.path.isdir(text):
            found = [each for each in images_below(Path(text)) if outputs not in Path(os.path.realpath(each)).parents]
        elif glob.has_magic(text) and not os.path.lexists(text):
            found = sorted(Path(each) for each in glob.glob(text, recursive=True) if os.path.isfile(each))
        else:
            found = [Path(text)]
        if not found:
            raise ExplainError(f"{shown(Path(text))}: no image found there; files end in {', '.join(IMAGE_SUFFIXES)}")
        images += found
    return list(dict.fromkeys(images))


def checked_request(args: argparse.Namespace) -> Request:
    """What the arguments ask for. Raises ExplainError for all that files alone can tell."""
    images = found_images(args.image, args.output_dir) if args.image else [random_test_image(args.seed)]
    is_single = not args.image or (len(args.image) == 1 and images == [Path(args.image[0])])
    if is_single:
        check_image_path(images[0])
    keys = list(FAMILIES) if args.compare or args.model == "both" else [args.model]
    named = {key: vars(args)[f"{key}_checkpoint"] for key in keys}
    checkpoints = tuple((FAMILIES[key], named[key] or find_checkpoint(FAMILIES[key], CHECKPOINT_FOLDER)) for key in keys)
    check_not_mixed([path for _, path in checkpoints])
    for _, path in checkpoints:
        check_checkpoint_path(path)
    check_output_folder(args.output_dir)
    style = FigureStyle(args.colormap, args.dpi)
    asked = [(family.key, file_mark(path)) for family, path in checkpoints], args.target_class, style
    return Request(
        jobs=tuple(make_jobs(images, keys, args.output_dir, not args.no_figures, args.save_maps, asked)),
        is_random=not args.image,
        is_single=is_single,
        checkpoints=checkpoints,
        output_folder=args.output_dir,
        device=args.device,
        target_class=args.target_class,
        style=style,
        batch_size=args.batch_size,
        skip_existing=args.skip_existing,
        quiet=args.quiet,
    )


def run(request: Request) -> int:
    """Do what is asked; the exit status."""
    nowhere = open(os.devnull, "w", encoding="utf-8", errors="replace")
    with nowhere, contextlib.redirect_stdout(nowhere) if request.quiet else contextlib.nullcontext():
        lines, status = (run_single if request.is_single else run_many)(request)
    say(*lines, *demo_lines([path for _, path in request.checkpoints]))
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an emoji that the terminal lacks becomes "?"
    try:
        args = argument_parser().parse_args(argv)
        return run(checked_request(args))
    except ExplainError as error:
        warn(f"❌ {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at exit
        return 141


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing half done stays behind
    raise SystemExit(main())

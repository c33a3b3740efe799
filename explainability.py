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
line is wrong; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import re
import stat
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# torch and timm take seconds to import and matplotlib nearly one. The functions that need them
# import them on their first line, so that --help and a wrong path are answered at once.
if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pydicom import Dataset

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

CHECKPOINT_SUFFIXES = (".pth", ".pt")
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
NOT_IMAGES = tuple(  # start of the file, what it is, remedy; the first that fits counts
    (re.compile(start, re.IGNORECASE | re.DOTALL), what, remedy)
    for start, what, remedy in (
        (rb"version https://git-lfs", "a Git LFS pointer, not the image itself", "fetch the image with git lfs pull"),
        (rb"%PDF-", "a PDF document", "export its page as PNG"),
        (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript (EPS) file", "export it as PNG"),
        (rb"PK[\x03\x05]", "a zip archive", "unpack it and give one image"),
        (rb".{4}ftyp(hei|hev|mif|msf)", "a HEIC image", "convert it to PNG or JPEG"),
        (rb"(<\?xml.*|<!doctype |<!--.*)?<?svg", "an SVG drawing", "export it as PNG"),
        (rb"(<\?xml.*|<!--.*)?<(!doctype html|html|head|body)", "an HTML page", "download the image itself"),
        (rb"(\{\s*[\"}]|\[\s*[\[{\"\d\]-])[^\x00]*$", "JSON", "give an image file"),
    )
)

DEFAULT_DPI = 150
OVERLAY_WEIGHT = 0.45  # share of the heatmap's colour in the overlay
PNG_LEVEL = 1  # zlib level; higher ones cost more time than they save space here
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
    names: re.Pattern[str]  # timm architectures accepted from a checkpoint
    target_layer: str  # dotted path for torch.nn.Module.get_submodule
    bullet: str


FAMILIES = {
    family.key: family
    for family in (
        Family(
            key="convnext",
            title="ConvNeXt V2",
            full_size="convnextv2_base.fcmae_ft_in22k_in1k",
            names=re.compile(r"convnextv2_(atto|femto|pico|nano|tiny|small|base|large|huge)"),
            target_layer="stages.3",  # the last stage
            bullet="🔵",
        ),
        Family(
            key="efficientnet",
            title="EfficientNetV2-{size}",
            full_size="tf_efficientnetv2_s.in21k_ft_in1k",
            names=re.compile(r"tf_efficientnetv2_(s|m|l|xl|b[0-3])"),
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

    @property
    def predicted(self) -> int:
        return int(self.probabilities.argmax())

    @property
    def prediction(self) -> str:
        return self.class_names[self.predicted]

    @property
    def confidence(self) -> float:
        return float(self.probabilities[self.predicted])

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
    dpi: int = DEFAULT_DPI


# ------------------------------------------------------------------------------------------
# Inputs: radiographs
# ------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Text with control characters and undecodable bytes shown as escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def shown(path: Path) -> str:
    """A path as messages name it: relative to the working directory where it lies below that."""
    with contextlib.suppress(ValueError):
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
        raise ExplainError(f"{FILE_KINDS.get(stat.S_IFMT(mode), 'a special file')}; give one image file")


def check_head(head: bytes) -> None:
    """Raise ExplainError, without the path, where a file's first bytes are those of no image."""
    if not head:
        raise ExplainError("an empty file; copy it again from where it came")
    if head[DICOM_MARK] == b"DICM":
        return
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for pattern, what, remedy in NOT_IMAGES:
        if pattern.match(start):
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


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint file, memory-mapped, without running code from it.

    Raises ExplainError where it is not a checkpoint or holds more than tensors and plain values.
    """
    import torch

    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch lets out KeyError, EOFError, UnpicklingError and more
        raise ExplainError(f"{shown(path)}: not a checkpoint that can be loaded safely ({type(error).__name__})") from error
    if not isinstance(contents, dict):
        raise ExplainError(f"{shown(path)}: holds {type(contents).__name__}, not a dictionary of weights")
    return contents


def architecture_of(family: Family, contents: dict[str, Any], path: Path) -> str:
    """The timm name that the checkpoint records, or the family's full-size network.

    The name is checked against the family's own: a foreign one could send timm to the network.
    """
    config = contents.get("config")
    name = config.get("model_name") if isinstance(config, dict) else None
    if name is None:
        return family.full_size
    if not isinstance(name, str) or not family.names.fullmatch(name.partition(".")[0]):
        raise ExplainError(
            f"{shown(path)}: records the network {printable(str(name)[:80])!r}, which is not of the family of "
            f"{family.full_size}; give it to the option of its own family"
        )
    return name


def accuracy_text(contents: dict[str, Any]) -> str:
    """What a checkpoint says about its accuracy, under the name it uses."""
    for key, label in (("test_acc", "Test accuracy"), ("val_acc", "Validation accuracy")):
        if isinstance(contents.get(key), (int, float)):
            return f"{label}: {contents[key]:.2f}%"
    return "Accuracy: not recorded in the checkpoint"


def build_network(architecture: str, weights: dict[str, torch.Tensor], path: Path) -> torch.nn.Module:
    """The timm network with these weights, every key matched; no random initialisation first."""
    import timm
    import torch

    with torch.device("meta"):
        network = timm.create_model(architecture.partition(".")[0], pretrained=False, num_classes=len(CLASS_NAMES))
    try:
        network.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ExplainError(f"{shown(path)}: does not fit {architecture} ({reason})") from error
    return network.float().eval().requires_grad_(False)


def load_classifier(family: Family, path: Path, device: str) -> Classifier:
    """Read a checkpoint into a classifier on `device`.

    Raises ExplainError where the file is no checkpoint of this family.
    """
    contents = read_checkpoint(path)
    architecture = architecture_of(family, contents, path)
    weights = contents.get("model_state_dict", contents)
    size = family.names.fullmatch(architecture.partition(".")[0]).group(1)
    return Classifier(
        family=family,
        title=family.title.format(size=size.upper()),
        architecture=architecture,
        checkpoint=path,
        accuracy=accuracy_text(contents),
        class_names=CLASS_NAMES,
        preprocessing=Preprocessing(),
        network=build_network(architecture, weights, path).to(device),
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
    rounding = terms.abs().sum(dim=1) * float(np.finfo(np.float32).eps)
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
    names = [name.casefold() for name in class_names]
    wanted = target_class.strip().casefold()
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    choices = ", ".join(f"{index} = {printable(name)}" for index, name in enumerate(class_names))
    raise ExplainError(f"--target-class {printable(target_class)}: not a class of the network; choose {choices}")


def explain(classifier: Classifier, radiographs: Sequence[Radiograph], target: int | None = None) -> list[Explanation]:
    """One forward pass, and one backward pass from the class scores to the target layer.

    Explains class `target`, or of each image the predicted class. Raises ExplainError where the
    network's output is not finite.
    """
    import torch

    device = next(classifier.network.parameters()).device
    stacked = np.stack([network_input(radiograph, classifier.preprocessing) for radiograph in radiographs])
    layer = classifier.network.get_submodule(classifier.family.target_layer)
    with captured_activations(layer) as captured, torch.enable_grad():
        logits = classifier.network(torch.from_numpy(stacked).to(device))  # (B, K)
    (activations,) = captured
    if not torch.isfinite(logits).all():
        raise ExplainError(f"{shown(classifier.checkpoint)}: the network's output is not finite; its weights are damaged")
    explained = logits.argmax(dim=1) if target is None else torch.full((len(logits),), target, device=device)
    # Images do not mix in eval mode, so the gradient of the sum holds each image's own.
    score = logits.gather(1, explained[:, None]).sum()
    (gradients,) = torch.autograd.grad(score, activations)
    raw_maps = grad_cam(activations.detach(), gradients).cpu().numpy()
    probabilities = logits.detach().softmax(dim=1).cpu().numpy()
    return [
        explanation(classifier, *each) for each in zip(probabilities, explained.tolist(), raw_maps)
    ]


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
# Panels and figures
# ------------------------------------------------------------------------------------------

FONT = "DejaVu Sans"  # comes with matplotlib, so figures look the same everywhere
BODY, SMALL = 11, 9  # points
INK, MUTED = "#1a1a1a", "#5f5f5f"
PANEL_INCHES = 4.2  # longest side of a picture in a panel


def drawable(text: str) -> str:
    """Text in which every character that the figures' font lacks is shown as an escape."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(FONT))
    return "".join(
        character if font.get_char_index(ord(character)) else character.encode("unicode_escape").decode()
        for character in printable(text)
    )


def text_width(text: str, points: float) -> float:
    """Width of a line of text in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    width, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(family=FONT, size=points), ismath=False)
    return width / 72


def elided(text: str, points: float, inches: float) -> str:
    """Text cut in the middle until it fits; both ends of a name tell something."""
    text = drawable(text)
    if text_width(text, points) <= inches:
        return text
    low, high = 1, len(text) // 2  # characters kept at each end
    while low < high:
        kept = (low + high + 1) // 2
        fits = text_width(f"{text[:kept]}…{text[-kept:]}", points) <= inches
        low, high = (kept, high) if fits else (low, kept - 1)
    return f"{text[:low]}…{text[-low:]}"


def panel_pixels(radiograph: Radiograph, dpi: int) -> np.ndarray:
    """The radiograph at the size of a panel, (H', W', 3) uint8; a smaller one as it is."""
    limit = round(PANEL_INCHES * dpi)
    picture = Image.fromarray(radiograph.pixels)
    if max(picture.size) > limit:
        scale = limit / max(picture.size)
        size = tuple(max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3)
    return np.asarray(picture)


def coloured(heatmap: np.ndarray, colormap: str) -> np.ndarray:
    """A heatmap in colour: (H, W) in [0, 1] -> (H, W, 3) uint8."""
    from matplotlib import colormaps

    table = (colormaps[colormap](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    return table[(heatmap * 255).round().astype(np.uint8)]


def draw_picture(axis: Axes, pixels: np.ndarray, title: str) -> None:
    """One panel: a picture under its title."""
    axis.set_axis_off()
    # Far narrower than a panel can show, a picture would vanish; stretched, it would lie.
    axis.imshow(pixels, aspect="equal", interpolation="bilinear" if max(pixels.shape[:2]) < 300 else "antialiased")
    axis.set_title(title, fontsize=BODY + 1, color=INK, pad=6)


def draw_heatmap(axis: Axes, picture: np.ndarray, explanation: Explanation, style: FigureStyle, title: str) -> None:
    """The heatmap alone, at the size of the picture."""
    draw_picture(axis, coloured(resized(explanation.heatmap, *picture.shape[:2]), style.colormap), title)
    if explanation.remark:
        draw_remark(axis, explanation.remark)


def draw_overlay(axis: Axes, picture: np.ndarray, explanation: Explanation, style: FigureStyle, title: str) -> None:
    """The heatmap over the radiograph; a blank map leaves the radiograph as it is."""
    if explanation.heatmap.any():
        colours = coloured(resized(explanation.heatmap, *picture.shape[:2]), style.colormap)
        picture = (picture * (1 - OVERLAY_WEIGHT) + colours * OVERLAY_WEIGHT).round().astype(np.uint8)
    draw_picture(axis, picture, title)


def draw_remark(axis: Axes, remark: str) -> None:
    axis.text(
        0.5, 0.5, drawable(remark).replace(": ", ":\n", 1), transform=axis.transAxes, ha="center", va="center",
        wrap=True, fontsize=BODY, color=INK, parse_math=False,
        bbox={"facecolor": "white", "edgecolor": MUTED, "boxstyle": "round,pad=0.6"},
    )  # fmt: skip


def draw_colour_bar(axis: Axes, style: FigureStyle) -> None:
    """The scale of the heatmaps: 0 at the bottom, 1 at the top."""
    from matplotlib import colormaps

    axis.imshow(np.linspace(1, 0, 256)[:, None], cmap=colormaps[style.colormap], vmin=0, vmax=1, aspect="auto", extent=(0, 1, 0, 1))
    axis.set_xticks([])
    axis.yaxis.tick_right()
    axis.set_yticks([0, 0.5, 1], ["0", "0.5", "1"], fontsize=SMALL, color=INK)
    axis.set_ylabel("relative importance", fontsize=SMALL, color=MUTED, labelpad=-2)
    axis.yaxis.set_label_position("right")


def draw_probabilities(axis: Axes, explanation: Explanation, top: float) -> float:
    """A bar for each class from `top` downwards (axis fractions); returns where it ends."""
    for name, probability in zip(explanation.class_names, explanation.probabilities):
        emphasis = "bold" if name == explanation.prediction else "normal"
        axis.text(0, top, elided(name, BODY, 2.9), fontsize=BODY, weight=emphasis, color=INK, va="top", parse_math=False)
        axis.text(1, top, f"{probability:.2%}", fontsize=BODY, weight=emphasis, color=INK, va="top", ha="right")
        axis.barh(top - 0.075, 1, height=0.018, color="#e4e4e4")
        axis.barh(top - 0.075, probability, height=0.018, color="#3b6ea5")
        top -= 0.125
    return top


def detail_lines(explanation: Explanation) -> list[tuple[str, str]]:
    """What the details panel lists: (label, value)."""
    h, w = explanation.heatmap.shape
    return [
        ("Explained class", explanation.class_names[explanation.explained]),
        ("Model", explanation.architecture),
        ("Checkpoint", explanation.checkpoint),
        ("", explanation.accuracy),
        ("Target layer", f"{explanation.target_layer}, {h}×{w} grid: one cell is 1/{h * w} of the image"),
        ("Peak of raw map", f"{explanation.raw_map.max():.3g} (the colours are relative to it)"),
    ]


def draw_details(axis: Axes, explanation: Explanation, style: FigureStyle) -> None:
    """The panel of text: prediction, probabilities, provenance and how to read the colours."""
    from matplotlib import colormaps

    axis.set_axis_off()
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    axis.text(0, 1, "Prediction", fontsize=SMALL, color=MUTED, va="top")
    axis.text(0, 0.955, elided(explanation.prediction, 17, 4.2), fontsize=17, weight="bold", color=INK, va="top", parse_math=False)
    axis.text(0, 0.88, f"Confidence: {explanation.confidence:.2%}", fontsize=BODY + 1, color=INK, va="top")
    top = draw_probabilities(axis, explanation, top=0.79) - 0.01
    for label, value in detail_lines(explanation):
        axis.text(0, top, label, fontsize=SMALL, color=MUTED, va="top")
        axis.text(0.25, top, elided(value, SMALL, 3.15), fontsize=SMALL, color=INK, va="top", parse_math=False)
        top -= 0.047
    axis.text(0, top - 0.02, "How to read the heatmap", fontsize=SMALL, color=MUTED, va="top")
    colours = colormaps[style.colormap]
    for place, text in ((1.0, "High attention: raised the score of the explained class"), (0.0, "Low attention: counted little or not at all")):
        top -= 0.06
        axis.barh(top - 0.02, 0.05, height=0.03, color=colours(place), edgecolor=MUTED, linewidth=0.5)
        axis.text(0.08, top - 0.02, text, fontsize=SMALL, color=INK, va="center")
    axis.text(0, top - 0.06, "Good: on the fracture line and the bone around it.\nRed flag: on borders, markers, text, or nowhere in particular.", fontsize=SMALL, color=INK, va="top", linespacing=1.4)


def footer_text(explanations: Sequence[Explanation]) -> str:
    """What stands below every figure."""
    if explanations[0].is_demo:
        noun = "network" if len(explanations) == 1 else "networks"
        return f"Demo {noun}: {DEMO_NOTICE}."
    return "Grad-CAM shows correlation, not cause. Not for diagnosis."


def new_figure(width: float, height: float, style: FigureStyle, title: str, footer: str) -> Figure:
    """An empty page of width x height inches with its title and footer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=style.dpi, facecolor="white")
    figure.text(0.5, 1 - 0.3 / height, title, fontsize=17, weight="bold", color=INK, ha="center", va="center", parse_math=False)
    figure.text(0.5, 0.2 / height, footer, fontsize=SMALL, color=MUTED, ha="center", va="center", parse_math=False)
    return figure


def add_panel(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """An axis at a place given in inches from the bottom left."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def explanation_figure(radiograph: Radiograph, explanation: Explanation, style: FigureStyle) -> Figure:
    """The 4-panel figure: radiograph, heatmap, overlay, prediction details."""
    figure = new_figure(10, 10, style, f"Grad-CAM: {explanation.title}", footer_text([explanation]))
    figure.text(0.5, 0.944, elided(radiograph.path.name, BODY, 9.2), fontsize=BODY, color=MUTED, ha="center", va="center", parse_math=False)
    picture = panel_pixels(radiograph, style.dpi)
    draw_picture(add_panel(figure, 0.35, 4.9, 4.2, 4.2), picture, "Original X-ray")
    draw_heatmap(add_panel(figure, 4.85, 4.9, 4.2, 4.2), picture, explanation, style, "Grad-CAM Heatmap")
    draw_colour_bar(add_panel(figure, 9.2, 4.9, 0.15, 4.2), style)
    draw_overlay(add_panel(figure, 0.35, 0.45, 4.2, 4.1), picture, explanation, style, "Overlay (Model Focus)")
    draw_details(add_panel(figure, 5.1, 0.45, 4.45, 4.1), explanation, style)
    return figure


def agreement_text(explanations: Sequence[Explanation]) -> str:
    """Whether the models predict the same class."""
    first, second = explanations
    if first.prediction == second.prediction:
        return f"Both models agree: {first.prediction}"
    return f"Models disagree: {first.title} says {first.prediction}, {second.title} says {second.prediction}"


def comparison_figure(radiograph: Radiograph, explanations: Sequence[Explanation], style: FigureStyle) -> Figure:
    """The 6-panel figure: a row for each model of radiograph, heatmap and overlay."""
    figure = new_figure(14, 10, style, "Grad-CAM comparison", footer_text(explanations))
    figure.text(0.5, 0.947, elided(radiograph.path.name, BODY, 13), fontsize=BODY, color=MUTED, ha="center", va="center", parse_math=False)
    figure.text(0.5, 0.918, elided(agreement_text(explanations), BODY + 1, 13), fontsize=BODY + 1, weight="bold", color=INK, ha="center", va="center", parse_math=False)
    picture = panel_pixels(radiograph, style.dpi)
    for explanation, bottom in zip(explanations, (4.75, 0.45)):
        heading = f"{explanation.title}: {explanation.prediction}, confidence {explanation.confidence:.2%}"
        if explanation.explained != explanation.predicted:
            heading += f"; explained class {explanation.class_names[explanation.explained]}"
        figure.text(0.35 / 14, (bottom + 4.13) / 10, elided(heading, BODY + 1, 13), fontsize=BODY + 1, color=INK, va="center", parse_math=False)
        draw_picture(add_panel(figure, 0.35, bottom, 4.1, 3.65), picture, "Original")
        draw_heatmap(add_panel(figure, 4.75, bottom, 4.1, 3.65), picture, explanation, style, "Heatmap")
        draw_overlay(add_panel(figure, 9.15, bottom, 4.1, 3.65), picture, explanation, style, "Overlay")
        draw_colour_bar(add_panel(figure, 13.35, bottom, 0.13, 3.65), style)
    return figure


def output_path(folder: Path, prefix: str, image: Path) -> Path:
    return folder / f"{prefix}_{image.stem}.png"


def write_figure(figure: Figure, path: Path) -> None:
    """Draw a figure and write it as PNG, whole or not at all.

    Raises ExplainError where the folder cannot be written to.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    page = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    try:
        with replacing(path) as temporary:
            page.save(temporary, "PNG", compress_level=PNG_LEVEL, dpi=(figure.dpi, figure.dpi))
    except OSError as error:
        raise ExplainError(f"{shown(path)}: cannot be written ({error.strerror}); choose another --output-dir") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name at the end, or goes away."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~current_umask())
        os.replace(name, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def current_umask() -> int:
    """The permissions that new files lack; the system tells them only when they are set."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ------------------------------------------------------------------------------------------
# Console text
# ------------------------------------------------------------------------------------------


def summary_lines(explanations: Sequence[Explanation]) -> list[str]:
    """The comparison summary, as lines."""
    lines = [RULE, "📊 COMPARISON SUMMARY", RULE]
    for explanation in explanations:
        lines += [*prediction_lines(explanation), ""]
    first, second = explanations
    mark = "✅" if first.prediction == second.prediction else "⚠️ "
    return [*lines, f"{mark} {printable(agreement_text(explanations))}"]


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


def say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


# ------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------

EXAMPLES = """examples:
  python3 explainability.py
  python3 explainability.py --image path/to/xray.jpg
  python3 explainability.py --image path/to/xray.jpg --model convnext
  python3 explainability.py --image path/to/xray.jpg --target-class "Simple Fracture"
  for img in data_original/test/*/*.jpg; do python3 explainability.py --image "$img"; done
"""


@dataclass(frozen=True)
class Request:
    """What one run is asked to do, checked as far as files can tell."""

    image: Path
    was_random: bool
    checkpoints: tuple[tuple[Family, Path], ...]
    output_folder: Path
    device: str
    target_class: str | None
    style: FigureStyle


def dpi_number(text: str) -> int:
    if not text.isdecimal() or not 30 <= int(text) <= 1200:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 30 to 1200")
    return int(text)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Show where bone-fracture classifiers look, with Grad-CAM.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--image", type=Path, metavar="PATH", help="X-ray image (default: a random test image)")
    add("--model", choices=[*FAMILIES, "both"], default="both", help="which model to analyze (default: both)")
    add("--compare", action="store_true", help="both models and their comparison, whatever --model says")
    add("--seed", type=int, metavar="N", help="repeat the choice of the random test image")
    add("--target-class", metavar="CLASS", help="name or index of the class to explain (default: the predicted class)")
    add("--output-dir", type=Path, default=OUTPUT_FOLDER, metavar="DIR", help="where figures go (default: explainability_outputs)")
    for family in FAMILIES.values():
        add(f"--{family.key}-checkpoint", type=Path, metavar="FILE", help=f"default: checkpoints/{family.key}*")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute (default: auto)")
    add("--colormap", default="jet", metavar="NAME", help="any matplotlib colormap (default: jet; viridis is perceptually uniform)")
    add("--dpi", type=dpi_number, default=DEFAULT_DPI, metavar="N", help=f"resolution of the figures (default: {DEFAULT_DPI})")
    return parser


def checked_request(args: argparse.Namespace) -> Request:
    """What the arguments ask for. Raises ExplainError for all that files alone can tell."""
    image = args.image or random_test_image(args.seed)
    check_image_path(image)
    keys = list(FAMILIES) if args.compare or args.model == "both" else [args.model]
    named = {"convnext": args.convnext_checkpoint, "efficientnet": args.efficientnet_checkpoint}
    checkpoints = tuple((FAMILIES[key], named[key] or find_checkpoint(FAMILIES[key], CHECKPOINT_FOLDER)) for key in keys)
    check_not_mixed([path for _, path in checkpoints])
    return Request(
        image=image,
        was_random=args.image is None,
        checkpoints=checkpoints,
        output_folder=args.output_dir,
        device=args.device,
        target_class=args.target_class,
        style=FigureStyle(args.colormap, args.dpi),
    )


def load_models(request: Request) -> list[Classifier]:
    """Load every model that the request names, and say so."""
    use_exact_float32()
    device = choose_device(request.device)
    classifiers = []
    for family, path in request.checkpoints:
        say(f"📦 Loading {family.key.upper()} model...")
        classifiers.append(load_classifier(family, path, device))
        say(f"✅ Model loaded: {classifiers[-1].architecture}", f"   {classifiers[-1].accuracy}", "")
    if is_demo(request.checkpoints[0][1]):
        say(f"⚠️  Demo networks: {DEMO_NOTICE}", "")
    return classifiers


def run(request: Request) -> None:
    """Explain the image with every model, write the figures, report."""
    both = len(request.checkpoints) > 1
    if request.was_random:
        say("🎲 No image specified. Using random test image:", f"   {shown(request.image)}", "")
    action = "Comparing" if both else "Analyzing"
    say(f"🔍 {action} explainability for: {printable(request.image.name)}", RULE)
    radiograph = load_radiograph(request.image)
    request.output_folder.mkdir(parents=True, exist_ok=True)
    explanations = []
    for classifier in load_models(request):
        say(f"{classifier.family.bullet} Generating {classifier.title} Grad-CAM...")
        target = target_index(request.target_class, classifier.class_names)
        (explanation,) = explain(classifier, [radiograph], target)
        path = output_path(request.output_folder, f"gradcam_{classifier.family.key}", request.image)
        write_figure(explanation_figure(radiograph, explanation, request.style), path)
        say(f"✅ Visualization saved: {shown(path)}", "")
        explanations.append(explanation)
    if both:
        say("📊 Creating comparison visualization...")
        path = output_path(request.output_folder, "comparison", request.image)
        write_figure(comparison_figure(radiograph, explanations, request.style), path)
        say(f"✅ Comparison saved: {shown(path)}", "", *summary_lines(explanations))
    else:
        say(*prediction_lines(explanations[0]))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: returns the exit status."""
    args = argument_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    try:
        run(checked_request(args))
    except ExplainError as error:
        print(f"❌ {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

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
import json
import os
import random
import re
import stat
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

# torch and timm take seconds to import and matplotlib nearly one. The functions that need them
# import them on their first line, so that --help and a wrong path are answered at once.
if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
IMAGE_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")  # what Pillow may decode; never EPS

SPECIAL_FILES = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
SIGNATURES = (  # first bytes -> what such a file is
    (LFS_POINTER, "a Git LFS pointer"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"GIF8", "a GIF image"),
    (b"RIFF", "a WebP image or a sound"),
    (b"%PDF-", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"<!DOCTYPE html", "an HTML page"),
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML document"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes"),
    (b"\x93NUMPY", "a NumPy array"),
)
CONTROL_BYTES = frozenset(range(32)) - set(b"\t\n\f\r\x1b")  # none of which a text holds

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
        path = path.resolve().relative_to(Path.cwd())
    return printable(str(path))


def random_test_image(seed: int | None) -> Path:
    """One of data_original/test/*/, the same for the same seed.

    Raises ExplainError where there is none.
    """
    paths = sorted(path for path in TEST_IMAGES.glob("*/*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ExplainError(f"{shown(TEST_IMAGES)}: no test images there; give one with --image")
    return random.Random(seed).choice(paths)


def check_image_path(path: Path) -> None:
    """Raise ExplainError unless `path` is a file that can be opened."""
    if not path.exists():
        raise ExplainError(f"{shown(path)}: no such file; check the path given to --image")
    if not path.is_file():
        raise ExplainError(f"{shown(path)}: not a regular file; --image takes one image file")
    if not os.access(path, os.R_OK):
        raise ExplainError(f"{shown(path)}: no permission to read it")


def load_radiograph(path: Path) -> Radiograph:
    """Read an image file, upright and in RGB.

    Raises ExplainError where the file is not an image that can be decoded whole.
    """
    try:
        with open(path, "rb") as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            upright = ImageOps.exif_transpose(image)
            pixels = np.asarray(upright.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ExplainError(f"{shown(path)}: cannot be read as an image ({error}); convert it to PNG or JPEG") from error
    return Radiograph(path, pixels)


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


def first_bytes(path: Path) -> bytes:
    """The start of a regular file. Nothing else is opened: a pipe or a device may block for ever.

    Raises ExplainError where there is no such file or it cannot be read.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = SPECIAL_FILES.get(stat.S_IFMT(mode), "not a regular file")
            raise refusal(path, f"{kind}, not a checkpoint", "name one checkpoint file")
        with open(path, "rb") as file:
            return file.read(512)
    except PermissionError:
        cause = "no permission to read it"
    except FileNotFoundError:
        cause = "a broken link" if os.path.islink(path) else "no such file"
    except (OSError, ValueError) as error:
        cause = f"cannot be opened ({getattr(error, 'strerror', None) or type(error).__name__})"
    raise refusal(path, cause, "check the path of the checkpoint and its permissions")


def kind_of(head: bytes) -> str:
    """What a file is that starts with `head`, in words."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for signature, kind in SIGNATURES:
        if start.startswith(signature):
            return kind
    return "a file of an unknown kind" if CONTROL_BYTES & set(head) else "a text file"


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
    head = first_bytes(path)
    container = container_of(head)
    if not head:
        raise refusal(path, "an empty file", "copy or download the checkpoint again")
    if head.startswith(LFS_POINTER):
        raise refusal(
            path, "a Git LFS pointer, not the weights: the repository was cloned without Git LFS", "run `git lfs pull`"
        )
    if not container:
        raise refusal(path, f"{kind_of(head)}, not a checkpoint", "give a file that torch.save wrote, or a .safetensors file")
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
        return tuple(names)  # the comparison with the network names what is missing
    outputs, claimed = head.shape[0], recorded(contents, "num_classes")
    if claimed is not None and (type(claimed) is not int or claimed != outputs):
        cause = f"records num_classes {brief(claimed)}, but its head ({family.head}) has {outputs} outputs"
        raise refusal(path, cause, "correct num_classes in the checkpoint")
    if outputs != len(names):
        cause = f"its head ({family.head}) has {outputs} outputs, but the class names are {listed(names)}"
        raise refusal(path, cause, "save class_names in the checkpoint, one for each output")
    return tuple(names)


def are_class_names(value: object) -> bool:
    """Whether these are names that can be told apart, also by --target-class, which ignores case."""
    if not isinstance(value, (list, tuple)) or not 2 <= len(value) <= MAX_CLASSES:
        return False
    if not all(isinstance(name, str) and name.strip() and len(name) <= MAX_NAME for name in value):
        return False
    return len({name.strip().casefold() for name in value}) == len(value)


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
    for _, path in checkpoints:
        check_checkpoint_path(path)
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

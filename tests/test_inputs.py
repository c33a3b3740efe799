"""Radiographs: every depth, orientation and kind of file is read right or refused in one line.

Expected pixels come from NumPy arithmetic on the values written, not from the tool.
"""

from __future__ import annotations

import io
import logging
import os
import struct
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image

import explainability as tool
from explainability import ExplainError, load_radiograph

ROWS, COLUMNS = 12, 9
RAMP = np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS)  # every pixel another value, 0 to 107


def written(path: Path, contents: bytes) -> Path:
    path.write_bytes(contents)
    return path


def pillow(values: np.ndarray, kind: str, mode: str | None = None, **options: object) -> bytes:
    image, buffer = Image.fromarray(np.ascontiguousarray(values), mode), io.BytesIO()
    if "palette" in options:
        image.putpalette(options.pop("palette").tobytes())
    lossless = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    image.save(buffer, kind, **{**lossless, **options})
    return buffer.getvalue()


def tiff(values: np.ndarray, **options: object) -> bytes:
    """A TIFF from a writer that is not the reader under test."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **{"photometric": "minisblack"} | options)
    return buffer.getvalue()


def png(values: np.ndarray, colour_type: int = 0, side: int = 0) -> bytes:
    """A PNG of 8- or 16-bit samples, written by hand; `side`, where its header lies."""
    rows = b"".join(b"\0" + row.tobytes() for row in values.astype(values.dtype.newbyteorder(">")))
    size = side or values.shape[1], side or values.shape[0]
    header = struct.pack(">IIBBBBB", *size, 8 * values.itemsize, colour_type, 0, 0, 0)
    parts = [b"IHDR" + header, b"IDAT" + zlib.compress(rows), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts
    )


def dataset_of(stored: np.ndarray, **tags: object) -> pydicom.Dataset:
    """What a DICOM file of these values says, little-endian and uncompressed."""
    dataset, colours = pydicom.Dataset(), "RGB" if stored.shape[-1] == 3 else "MONOCHROME2"
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    dataset.PatientName = dataset.PatientID = "SECRET"
    dataset.set_pixel_data(stored, colours, 8 * stored.itemsize)
    for name, value in tags.items():
        if name.endswith("LUTSequence"):
            item, (first, entries, bits) = pydicom.Dataset(), value
            item.add_new("LUTDescriptor", "US", [len(entries), first, bits])
            item.add_new("LUTData", "OW", entries.tobytes())
            item.ModalityLUTType, value = "US", pydicom.Sequence([item])
        if name == "PixelPaddingValue" and value >= 2**15:
            dataset.add_new(name, "US", value)
        else:
            setattr(dataset, name, value)
    dataset.HighBit = dataset.BitsStored - 1
    return dataset


def saved(dataset: pydicom.Dataset, **options: object) -> bytes:
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, **options)
    return buffer.getvalue()


def dicom(stored: np.ndarray, **tags: object) -> bytes:
    return saved(dataset_of(stored, **tags), enforce_file_format=True)


def compressed(stream: bytes, syntax: int, values: np.ndarray = RAMP) -> bytes:
    """A DICOM file of these values that holds an encoded stream in their place."""
    dataset = dataset_of(values.astype(np.uint8))
    dataset.file_meta.TransferSyntaxUID = f"1.2.840.10008.1.2.4.{syntax}"
    dataset.PixelData = pydicom.encaps.encapsulate([stream])
    dataset["PixelData"].is_undefined_length = True
    return saved(dataset)


def stretched(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """The documented rule in exact whole-number or float64 arithmetic."""
    values = np.clip(values.astype(np.float64), low, high)
    return np.rint((values - low) * 255 / (high - low)).astype(np.uint8)


def over_black(values: np.ndarray) -> np.ndarray:
    return np.rint(values[:, :, :-1] * (values[:, :, -1:] / 255))


def read(folder: Path, contents: bytes) -> tool.Radiograph:
    return load_radiograph(written(folder / "x", contents))


def grey(folder: Path, contents: bytes) -> np.ndarray:
    """The one channel of a picture whose three are equal."""
    pixels = read(folder, contents).pixels
    assert pixels.dtype == np.uint8 and (pixels == pixels[:, :, :1]).all()
    return pixels[:, :, 0]


def refusal(path: Path) -> str:
    """What the loader says when it refuses; one printable line that starts with the path."""
    with pytest.raises(ExplainError) as caught:
        load_radiograph(path)
    text = str(caught.value)
    assert text.startswith(tool.shown(path) + ": ") and text.isprintable() and "; " in text
    return text


# Kinds of pictures

GREY8 = (RAMP + 50).astype(np.uint8)
COLOUR8 = np.dstack([GREY8, GREY8 // 2, 255 - GREY8])
FLAT = np.kron(RAMP[:6, :4] * 2, np.ones((8, 8))).astype(np.uint8)  # a portrait of flat JPEG blocks
FLAT_JPEG = pillow(FLAT, "JPEG", quality=100)
INDICES = RAMP.astype(np.uint8)
DEEP = (100 + 38 * RAMP).astype(np.uint16)
SCALED = stretched(RAMP, 0, 107)  # any even ramp from its lowest to its highest value
NOISE = np.random.default_rng(2).integers(0, 65_536, (ROWS, COLUMNS, 4), dtype=np.uint16)
NOISE8 = (NOISE >> 8).astype(np.uint8)
PALETTE = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
PALETTE[:2] = [[0] * 3, [255] * 3]  # pydicom scales what does not fill its range
PALETTE_TAGS = {"PhotometricInterpretation": "PALETTE COLOR"}
PALETTE_TAGS |= {
    f"{name}PaletteColorLookupTable{part}": value
    for name, column in zip(("Red", "Green", "Blue"), PALETTE.T)
    for part, value in (("Descriptor", [256, 0, 8]), ("Data", column.tobytes()))
}
CLEAR = np.where((RAMP == 7)[:, :, None], 0, PALETTE[RAMP])
SPOTTED, FLOATS = RAMP % 3 == 0, RAMP.astype("f4")
OTHERS = [Image.fromarray(np.full((ROWS, COLUMNS), value, np.uint8)) for value in (120, 250)]
STACK = np.stack([RAMP, RAMP * 0, RAMP * 2]).astype(np.uint8)
DEEP_NOTE, FRAMES_NOTE = "values 100 to 4166 scaled to 8 bits", "first of 3 frames"
TYPES = {"i2": (-30_000, 560), "i4": (-(2**31), 40_139_881), "f4": (-1.5, 0.5), "<f4": (0, 2.8e36)}
PICTURES = {  # what it is: contents, pixels, and where they count the notes
    **{f"8-bit {kind}": (partial(pillow, GREY8, kind), GREY8, [])
       for kind in ("PNG", "TIFF", "BMP", "WEBP", "GIF")},
    "8-bit DICOM": (lambda: dicom(GREY8, RescaleSlope=1, RescaleIntercept=0), GREY8, []),
    "8-bit colour": (lambda: pillow(COLOUR8, "PNG"), COLOUR8, []),
    "8-bit colour DICOM": (lambda: dicom(COLOUR8), COLOUR8, []),
    "16-bit PNG": (lambda: png(DEEP), SCALED, [DEEP_NOTE]),
    "16-bit PNG, narrow": (lambda: png(RAMP.astype(np.uint16) + 60_000), SCALED),
    "16-bit DICOM": (lambda: dicom(DEEP), SCALED, [DEEP_NOTE]),
    **{f"{dtype} TIFF, {order}": (partial(tiff, (low + step * RAMP).astype(dtype), byteorder=order), SCALED)
       for dtype, (low, step) in TYPES.items() for order in "<>"},
    **{f"1-bit {kind}": (partial(pillow, SPOTTED, kind), SPOTTED * 255) for kind in ("PNG", "TIFF", "BMP")},
    "signed 8 bits": (lambda: tiff((RAMP - 100).astype(np.int8)), SCALED),
    "unsigned 32 bits": (lambda: tiff(RAMP.astype(np.uint32) * 40_000_000), SCALED),
    "white is 0, 8 bits": (lambda: tiff(GREY8, photometric="miniswhite"), 255 - GREY8),
    "white is 0, 16 bits": (lambda: tiff(DEEP, photometric="miniswhite"), 255 - SCALED),
    "white is 0, floats": (lambda: tiff(FLOATS, photometric="miniswhite"), 255 - SCALED),
    "CMYK TIFF": (lambda: pillow(255 - np.dstack([COLOUR8, GREY8 * 0 + 255]), "TIFF", "CMYK"), COLOUR8),
    **{f"palette {kind}": (partial(pillow, INDICES, kind, palette=PALETTE), PALETTE[RAMP])
       for kind in ("PNG", "GIF", "TIFF", "BMP")},
    **{f"clear entry {kind}": (partial(pillow, INDICES, kind, palette=PALETTE, transparency=7), CLEAR)
       for kind in ("PNG", "GIF")},
    "palette DICOM": (lambda: dicom(INDICES, **PALETTE_TAGS), PALETTE[RAMP]),
    **{f"clear {kind}": (partial(pillow, NOISE8, kind), over_black(NOISE8))
       for kind in ("PNG", "TIFF", "WEBP")},
    "clear grey": (lambda: pillow(NOISE8[:, :, :2], "PNG", "LA"), over_black(NOISE8[:, :, :2])),
    "16-bit colour PNG": (lambda: png(NOISE[:, :, :3], 2), NOISE8[:, :, :3]),
    **{f"16-bit colour TIFF, {value}": (
        partial(tiff, NOISE[:, :, :3], photometric="rgb", **{option: value}), NOISE8[:, :, :3])
       for option, value in (("byteorder", "<"), ("byteorder", ">"), ("compression", "zlib"))},
    "DICOM, rubbish above 12 bits": (lambda: dicom((RAMP * 9).astype("u2") | 0xF000, BitsStored=12), SCALED),
    "DICOM of 7 bits": (lambda: dicom(INDICES, BitsStored=7), SCALED),
    "signed DICOM": (lambda: dicom((RAMP * 20 - 1000).astype("i2"), RescaleSlope=2, RescaleIntercept=-24),
                     SCALED, ["values -2024 to 2256 scaled to 8 bits"]),
    **{f"frames {kind}": (
        partial(pillow, INDICES, kind, save_all=True, append_images=OTHERS), RAMP, [FRAMES_NOTE])
       for kind in ("TIFF", "GIF", "WEBP", "PNG")},
    "frames DICOM": (lambda: dicom(STACK, NumberOfFrames=3), RAMP, [FRAMES_NOTE]),
    "JPEG DICOM": (lambda: compressed(FLAT_JPEG, 50, FLAT), np.asarray(Image.open(io.BytesIO(FLAT_JPEG)))),
    "JPEG 2000 DICOM": (lambda: compressed(pillow(FLAT, "JPEG2000", no_jp2=True), 90, FLAT), FLAT),
    "constant": (lambda: png(np.full((5, 4), 4000, np.uint16)), np.full((5, 4), 127),
                 ["every value is 4000: shown as mid grey", tool.NOTHING_TO_SEE]),
    "one black pixel": (lambda: png(np.zeros((1, 1), np.uint8)), np.zeros((1, 1)), [tool.NOTHING_TO_SEE]),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_every_kind_of_picture_is_read_right(tmp_path, name):
    build, expected, *notes = PICTURES[name]
    radiograph = read(tmp_path, build())
    assert radiograph.pixels.dtype == np.uint8 and radiograph.pixels.shape == (*expected.shape[:2], 3)
    assert (radiograph.pixels == np.atleast_3d(expected)).all()
    assert not notes or list(radiograph.notes) == notes[0]


def test_a_burned_in_marker_does_not_blacken_a_16_bit_image(tmp_path):
    values = np.tile(np.arange(4000, dtype=np.uint16), (10, 1))
    values[0, :40] = 65_535  # 0.1 % of the pixels
    ordered = np.sort(values, axis=None)
    low, high = (int(ordered[round((ordered.size - 1) * share)]) for share in (0.01, 0.99))
    assert high < 4000 and np.array_equal(grey(tmp_path, png(values)), stretched(values, low, high))
    assert "clipped (0 to 65535 in all)" in load_radiograph(tmp_path / "x").notes[0]


AS_STORED = {  # how an upright picture is stored under each EXIF orientation (EXIF 2.32, 4.6.4)
    1: np.array, 2: np.fliplr, 3: partial(np.rot90, k=2), 4: np.flipud, 6: np.rot90,
    5: partial(np.swapaxes, axis1=0, axis2=1), 7: lambda upright: np.swapaxes(np.rot90(upright, 2), 0, 1),
    8: partial(np.rot90, k=-1),
}  # fmt: skip
ORIENTED = [  # kind, picture, options
    ("JPEG", FLAT, {"quality": 100}), ("PNG", COLOUR8, {}), ("WEBP", COLOUR8, {}), ("TIFF", COLOUR8, {}),
    ("TIFF", COLOUR8, {"compression": "tiff_adobe_deflate"}), ("deep", DEEP, {}), ("deep", FLOATS, {}),
    ("deep", DEEP, {"byteorder": ">"}), ("deep", DEEP, {"compression": "zlib"}), ("deep", SPOTTED, {}),
]  # fmt: skip


@pytest.mark.parametrize("orientation", AS_STORED)
@pytest.mark.parametrize(("kind", "upright", "options"), ORIENTED)
def test_every_exif_orientation_gives_the_same_picture(tmp_path, orientation, kind, upright, options):
    stored, exif = np.ascontiguousarray(AS_STORED[orientation](upright)), Image.Exif()
    exif[0x0112] = orientation
    if kind == "deep":
        contents = tiff(stored, extratags=[(0x0112, "H", 1, orientation, True)], **options)
        upright = stretched(upright, float(upright.min()), float(upright.max()))
    else:
        contents = pillow(stored, kind, exif=exif, **options)
    seen = read(tmp_path, contents).pixels.astype(int)
    assert np.abs(seen - np.atleast_3d(upright)).max() <= (3 if kind == "JPEG" else 0)


# What is refused

NARROW = (RAMP * 38).astype(np.uint16)  # 12 bits in 16
NARROW_COLOUR = np.dstack([NARROW] * 3)
NARROW_CLEAR = np.dstack([NARROW, NARROW * 0 + 65_535])
UNKNOWN = "a file of an unknown kind"
REFUSED = {
    "text": (lambda: "Größe ".encode() * 1000, "a text file"),
    "UTF-16 text": (lambda: "words".encode("utf-16"), "a text file"),
    "pdf": (lambda: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF document"),
    "zip": (lambda: b"PK\x03\x04" + bytes(100), "a zip archive"),
    "eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a text file"),
    "eps with preview": (lambda: b"\xc5\xd0\xd3\xc6" + bytes(60), UNKNOWN),
    "heic": (lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "a HEIC image"),
    "lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "a Git LFS pointer"),
    "empty": (lambda: b"", "an empty file"),
    "program": (lambda: b"\x7fELF\x02\x01\x01" + bytes(200), UNKNOWN),
    "JPEG 2000": (lambda: pillow(COLOUR8, "JPEG2000", num_resolutions=1), UNKNOWN),
    "f8 TIFF": (lambda: tiff(RAMP.astype("f8")), "a kind that cannot be read here; copy it again"),
    "one infinite": (lambda: tiff(np.where(RAMP == 30, -np.inf, RAMP).astype(np.float32)), "NaN or infinite"),
    "narrow colour PNG": (lambda: png(NARROW_COLOUR, 2), "save it as 16-bit grey"),
    "narrow clear PNG": (lambda: png(NARROW_CLEAR, 4), "save it as 16-bit grey"),
    "deep planes": (
        lambda: tiff(np.moveaxis(NARROW_COLOUR, 2, 0), photometric="rgb", planarconfig="separate"),
        "16-bit colour in separate planes",
    ),
    "narrow colour TIFF": (lambda: tiff(NARROW_COLOUR, photometric="rgb"), "save it as 16-bit grey"),
    "huge PNG": (lambda: png(GREY8, side=10_001), "more than 100,000,000"),
    "huge DICOM": (lambda: dicom(GREY8, Rows=60_000, Columns=60_000), "more than 100,000,000"),
    "padding alone": (lambda: dicom(DEEP * 0, PixelPaddingValue=0), "none but padding"),
    "start of DICOM": (lambda: b"\x08\0\x05\0CS\x0a\0ISO_IR 100", "a DICOM file without an image in it"),
    "DICOM, header alone": (lambda: dicom(DEEP)[: -DEEP.nbytes - 12], "without an image in it, or cut short"),
    "compressed, cut": (lambda: compressed(FLAT_JPEG, 50, FLAT)[:-99], "cut short; give one that holds the"),
    "compressed, no decoder": (lambda: compressed(b"\0\0", 100), "compressed as MPEG2"),
    "compressed, damaged": (lambda: compressed(b"\xff\xd8\xff\xd9", 50), "decoder; pip install pylibjpeg"),
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_no_image_or_would_be_shown_wrong_is_refused(tmp_path, key):
    build, words = REFUSED[key]
    path = written(tmp_path / "x.png", build())
    message = refusal(path)
    assert words in message
    if "not an image" in message:  # as its first bytes tell
        with pytest.raises(ExplainError, match=words):
            tool.check_image_path(path)


@pytest.mark.parametrize(
    "name", ["two words", "骨折", b"bad_\xff", "new\nline", "[a-z]*?", "-rf", "\x1b[31m"]
)
def test_files_of_odd_names_load_and_are_named_on_one_line(tmp_path, name):
    path = written(tmp_path / os.fsdecode(name), png(GREY8))
    tool.check_image_path(path)
    assert (load_radiograph(path).pixels == GREY8[:, :, None]).all()
    refusal(written(path, b""))


def test_what_this_computer_lacks_is_told(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "load", Mock(side_effect=MemoryError))
        assert "too large for the memory" in refusal(written(tmp_path / "x", png(GREY8)))
        patched.setattr(pydicom.pixels.decoders.base.Decoder, "is_available", property(lambda self: False))
        message = refusal(written(tmp_path / "x", compressed(b"\0\0", 70)))
        assert "compressed as JPEG Lossless" in message and "pip install pylibjpeg" in message
    path = written(tmp_path / "x", dicom(GREY8))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert "pip install pydicom" in refusal(path)


@pytest.mark.parametrize("check", [tool.check_image_path, tool.check_checkpoint_path, load_radiograph])
def test_only_files_that_can_be_read_are_opened(tmp_path, monkeypatch, check):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    not_file, causes = "a directory or a device, not a file; give one file", ["no such file"] * 2
    causes += [not_file, not_file, "name too long; check the path"]
    for name, cause in zip(("missing", "broken", "pipe", "folder", "n" * 300), causes):
        with pytest.raises(ExplainError, match=cause):
            check(tmp_path / name)
    path = written(tmp_path / "x", b"x")
    denied = PermissionError(13, "Permission denied")  # the tests may run as root, who may read everything
    monkeypatch.setattr("builtins.open", Mock(side_effect=denied))
    with pytest.raises(ExplainError, match="permission denied; check the path and its permissions"):
        check(path)


NOISY = np.random.default_rng(4).integers(0, 256, (64, 48), dtype=np.uint8)
NOISY_COLOUR = np.dstack([NOISY, NOISY.T.reshape(64, 48), 255 - NOISY])
WHOLE = {
    "JPEG": pillow(NOISY_COLOUR, "JPEG"), "progressive JPEG": pillow(NOISY_COLOUR, "JPEG", progressive=True),
    "PNG": pillow(NOISY, "PNG"), "BMP": pillow(NOISY, "BMP"), "GIF": pillow(NOISY, "GIF"),
    "WEBP": pillow(NOISY_COLOUR, "WEBP"), "TIFF": tiff(NOISY), "TIFF in tiles": tiff(NOISY, tile=(16, 16)),
    "deflated TIFF": tiff(NOISY, compression="zlib", rowsperstrip=8), "DICOM": dicom(NOISY),
    "16-bit TIFF": tiff(NOISY * np.uint16(9)),
}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE)
def test_a_file_cut_short_is_refused_or_has_lost_no_pixel(tmp_path, kind):
    whole = WHOLE[kind]
    pixels, survivors, length = read(tmp_path, whole).pixels, 0, len(whole)
    for end in {*range(1, length, max(1, length // 60)), *range(length - 20, length)}:
        try:
            assert np.array_equal(read(tmp_path, whole[:end]).pixels, pixels), f"cut at {end} of {length}"
            survivors += 1
        except ExplainError as error:
            assert str(error).isprintable()
    assert survivors <= 30
    if kind in ("PNG", "JPEG", "progressive JPEG", "deflated TIFF", "GIF"):  # a broken copy ends in zeros
        refusal(written(tmp_path / "x", whole[: length // 2] + bytes(length - length // 2)))


# DICOM


def through(table: np.ndarray, low: int, high: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: stretched(table[values], low, high)


plain, linear = partial(stretched, low=3, high=538), partial(stretched, low=199.5, high=399.5)
WINDOW = {"WindowCenter": 300, "WindowWidth": 201}
TWO = {"WindowCenter": [300, 9], "WindowWidth": [201, 9], "VOILUTFunction": "LINEAR"}
USELESS = ((500, 0), (500, -3), (500, 0.5), (500, 1), (60_000, 100), (-900, 50), (500, None), (None, 40))
LUT = (np.arange(1000, dtype=np.uint32) ** 2 // 16).astype(np.uint16)
BYTES = (np.arange(600) * 255 // 599).astype(np.uint8)  # two entries in each word
DOWN, FEW = LUT[::-1], BYTES[::-1]
WAYS = {  # what a file of the values 3 to 538 says of them, and what is shown
    "nothing": ({}, plain, "values 3 to 538 scaled to 8 bits"),
    "10 bits": ({"BitsStored": 10}, plain),
    "window": (WINDOW, linear),
    "two windows": (TWO, linear, "shown through its window, centre 300 and width 201"),
    "exact": ({**WINDOW, "VOILUTFunction": "LINEAR_EXACT"}, lambda values: stretched(values, 199.5, 400.5)),
    "sigmoid": (
        {**WINDOW, "VOILUTFunction": "SIGMOID"},
        lambda values: np.rint(255 / (1 + np.exp(-4 * (values - 300) / 201)))),
    "rescale": ({"RescaleSlope": 2, "RescaleIntercept": 0}, plain),
    "rescale and window": (
        {**WINDOW, "RescaleSlope": 2, "RescaleIntercept": -100}, lambda values: linear(values * 2 - 100)),
    "a centre of 0": (
        {"WindowCenter": 0, "WindowWidth": 601, "RescaleSlope": 1, "RescaleIntercept": -300},
        lambda values: stretched(values - 300, -300.5, 299.5)),
    "VOI LUT": ({"VOILUTSequence": (0, LUT, 16)}, through(LUT, 0, LUT[-1]), "shown through its VOI LUT"),
    "VOI LUT before window": (
        {"VOILUTSequence": (50, LUT // 16, 12), **WINDOW},
        lambda values: through(LUT // 16, 0, LUT[-1] // 16)(np.clip(values - 50, 0, 999))),
    "VOI LUT of bytes": ({"VOILUTSequence": (0, BYTES, 8)}, lambda values: BYTES[values]),
    "modality LUT": ({"ModalityLUTSequence": (0, DOWN, 16)}, through(DOWN, DOWN[538], DOWN[3])),
    "modality LUT of bytes": ({"ModalityLUTSequence": (0, FEW, 8)}, through(FEW, FEW[538], FEW[3])),
    **{f"useless window {centre}, {width}": ({"WindowCenter": centre, "WindowWidth": width}, plain)
       for centre, width in USELESS},
    "useless rescale": ({"RescaleSlope": None, "RescaleIntercept": None}, plain),
    "slope alone": ({"RescaleSlope": 3}, plain),
    "intercept alone": ({"RescaleIntercept": 5}, plain),
    "useless VOI LUT": ({"VOILUTSequence": (0, np.full(1000, 7, np.uint16), 16)}, plain),
}  # fmt: skip
INVERTED = (("MONOCHROME1", None), ("MONOCHROME1", "INVERSE"), ("MONOCHROME2", "INVERSE"))


@pytest.mark.parametrize("way", WAYS)
def test_monochrome1_and_inverse_are_inverted_once_whatever_the_values_go_through(tmp_path, way):
    tags, expected, *notes = WAYS[way]
    for rows in (12, 6):  # a portrait and a landscape
        values = (5 * RAMP.reshape(rows, -1)[::-1] + 3).astype(np.uint16)
        upright = expected(values.astype(int))
        for kind, shape in (("MONOCHROME2", None), ("MONOCHROME2", "IDENTITY"), *INVERTED):
            given = {"PhotometricInterpretation": kind, "PresentationLUTShape": shape, **tags}
            seen = grey(tmp_path, dicom(values, **given))
            assert np.array_equal(seen, 255 - upright if (kind, shape) in INVERTED else upright)
    assert not notes or load_radiograph(tmp_path / "x").notes == tuple(notes)


def test_big_endian_dicom_and_its_lut_are_read(tmp_path):
    values = NARROW // 8
    dataset = dataset_of(values, VOILUTSequence=(0, LUT.byteswap(), 16))
    dataset.PixelData = values.astype(">u2").tobytes()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
    seen = grey(tmp_path, saved(dataset, little_endian=False, implicit_vr=False))
    assert np.array_equal(seen, stretched(LUT[values], 0, LUT[-1]))


@pytest.mark.parametrize("padding, limit", [(-2000, None), (63_536, None), (30_000, 30_010), (30_010, 30_000)])
def test_padding_is_black_and_does_not_count_for_the_range(tmp_path, padding, limit):
    values = (RAMP * 9 + 100).astype(np.int16)
    values[:, 0] = padding if padding < 2**15 else padding - 2**16  # as unsigned, which some machines write
    tags = {"PixelPaddingValue": padding}
    if limit:
        values[::2, 0], tags["PixelPaddingRangeLimit"] = 30_005, limit
    expected = stretched(values[:, 1:], 109, 1063)
    for kind, seen in (("MONOCHROME1", 255 - expected), ("MONOCHROME2", expected)):
        pixels = grey(tmp_path, dicom(values, PhotometricInterpretation=kind, **tags))
        assert not pixels[:, 0].any() and np.array_equal(pixels[:, 1:], seen)


@pytest.mark.parametrize("tags", [{}, WINDOW, {**WINDOW, "VOILUTFunction": "SIGMOID"}])
def test_nan_in_float_dicom_is_refused(tmp_path, tags):
    dataset = dataset_of(NARROW, BitsAllocated=32, **tags)
    del dataset.PixelData, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation
    dataset.FloatPixelData = (5 * FLOATS).tobytes()
    assert len(np.unique(grey(tmp_path, saved(dataset)))) > 40
    dataset.FloatPixelData = np.where(RAMP == 7, np.float32(np.nan), 5 * FLOATS).tobytes()
    assert "NaN" in refusal(written(tmp_path / "x", saved(dataset)))


@pytest.mark.parametrize("syntax", ["ExplicitVRLittleEndian", "ImplicitVRLittleEndian"])
def test_dicom_without_its_preamble_is_read(tmp_path, syntax):
    dataset = dataset_of(DEEP, PhotometricInterpretation="MONOCHROME1")
    dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    contents = saved(dataset, enforce_file_format=True)[132:]
    length = 12 + int.from_bytes(contents[8:12], "little")  # of the meta information
    for each in (contents, contents[length:]):
        assert np.array_equal(grey(tmp_path, each), 255 - SCALED)
        tool.check_image_path(tmp_path / "x")
        assert tool.is_dicom(tmp_path / "x") and not tool.is_no_radiograph(tmp_path / "x")


def test_other_files_in_folders_are_passed_over_and_counted(tmp_path):
    report, mac, folder = dataset_of(GREY8), b"\0\5\x16\7" + bytes(100), tmp_path / "cd"
    del report.PixelData, report.Rows, report.Columns, report.BitsAllocated
    named = {"report.dcm": saved(report), "DICOMDIR": saved(report), "._a.png": mac, "__MACOSX/a.png": mac}
    (folder / "__MACOSX").mkdir(parents=True)
    others = [written(folder / name, contents) for name, contents in named.items()]
    named = {"a.png": png(GREY8), "IM0001": dicom(DEEP), "1.2.840.10008.7": dicom(DEEP), "broken.dcm": b"x"}
    images = [written(folder / name, contents) for name, contents in named.items()]
    written(folder / "notes.1", b"words")
    found = tool.found_images([str(folder)], tmp_path / "out")
    assert set(found) == {*others, *images}
    left, (line,) = tool.without_other_files(found, [str(folder)])
    assert set(left) == set(images) and "passed over, as no radiographs: 4 (" in line
    assert tool.without_other_files(images, []) == (images, [])
    report = others[0]  # named by itself, it gets its line
    assert tool.without_other_files([report], [str(report)]) == ([report], [])
    assert "without an image" in refusal(report)
    with pytest.raises(ExplainError, match="no radiograph there, only 1"):
        tool.without_other_files([report], [str(folder)])


def test_a_folder_that_takes_its_own_results_is_searched_once_despite_a_link_back(tmp_path):
    (tmp_path / "simple").mkdir()
    (tmp_path / "again").symlink_to(tmp_path)
    image = written(tmp_path / "simple" / "a.png", png(GREY8))
    assert tool.found_images([str(tmp_path)], tmp_path) == [image]


@pytest.mark.parametrize(
    "name", ["BitsAllocated", "Rows", "PhotometricInterpretation", "SamplesPerPixel", ""]
)
def test_neither_libraries_nor_refusals_tell_a_patient_tag(tmp_path, recwarn, caplog, capfd, name):
    dataset = dataset_of(GREY8)
    dataset.PixelData += bytes(100)  # too many, of which pydicom warns, in the log too
    if name:
        dataset[name].value = {"BitsAllocated": 12, "Rows": 500, "SamplesPerPixel": 2}.get(name, "SECRET")
    path = written(tmp_path / "x", saved(dataset))
    assert "SECRET" not in (refusal(path) if name else repr(load_radiograph(path).notes))
    assert not recwarn.list and not caplog.records and capfd.readouterr() == ("", "")
    logging.getLogger("PIL").error("heard again")
    assert caplog.messages == ["heard again"]


@pytest.mark.parametrize("shape", [(300, 200), (100, 500), (224, 224), (1, 1)])
def test_network_input_equals_torchvision_also_of_one_radiograph_for_two_networks(shape):
    transforms = pytest.importorskip("torchvision.transforms")
    pixels = np.random.default_rng(8).integers(0, 256, (*shape, 3), dtype=np.uint8)
    radiograph = tool.Radiograph(pixels)
    last = transforms.ToTensor(), transforms.Normalize(tool.IMAGENET_MEAN, tool.IMAGENET_STD)
    for size in (224, 96, 224):
        steps = transforms.Compose([transforms.Resize((size, size)), *last])
        ours = tool.network_input(radiograph, tool.Preprocessing(size))
        assert ours.dtype == np.float32 and ours.shape == (3, size, size)
        assert np.abs(ours - steps(Image.fromarray(pixels)).numpy()).max() <= 1e-6

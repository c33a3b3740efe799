"""Radiographs: every depth, orientation and kind of file is read right or refused in one line.

Expected pixels come from NumPy arithmetic on the values written, not from the tool.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import explainability as tool
from explainability import ExplainError, load_radiograph

# ------------------------------------------------------------------------------------------
# Builders
# ------------------------------------------------------------------------------------------

ROWS, COLUMNS = 12, 9
RAMP = np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS)  # every pixel another value, 0 to 107


def written(path: Path, contents: bytes) -> Path:
    path.write_bytes(contents)
    return path


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(values: np.ndarray, **options: object) -> bytes:
    """A TIFF from a writer that is not the reader under test."""
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **{"photometric": "minisblack"} | options)
    return buffer.getvalue()


def png(values: np.ndarray, colour_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 8- or 16-bit samples, written by hand."""
    samples = values.astype(values.dtype.newbyteorder(">"))
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 8 * values.itemsize, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


def dicom(stored: np.ndarray, **tags: object) -> bytes:
    """An uncompressed DICOM file written by pydicom."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid(entropy_srcs=["test"])
    dataset.PatientName, dataset.PatientID = "SECRET^NAME", "SECRET-7"
    colour = stored.ndim == 3 and stored.shape[-1] == 3
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape[:2] if colour else stored.shape[-2:]
    dataset.BitsAllocated = dataset.BitsStored = 8 * stored.itemsize
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelData = stored.tobytes() + b"\0" * (stored.nbytes % 2)
    dataset["PixelData"].VR = "OW" if stored.itemsize > 1 else "OB"
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def compressed(values: np.ndarray, stream: bytes, syntax: str) -> bytes:
    """A DICOM file of these values that holds an encoded stream in their place."""
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(io.BytesIO(dicom(values)))
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = pydicom.encaps.encapsulate([stream])
    dataset["PixelData"].is_undefined_length = True
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset)
    return buffer.getvalue()


def lut_item(first: int, table: np.ndarray, bits: int) -> object:
    pydicom = pytest.importorskip("pydicom")
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US", [len(table), first, bits])
    item.add_new("LUTData", "OW", table.astype("<u2").tobytes())
    return pydicom.Sequence([item])


def stretched(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """The documented rule in exact whole-number or float64 arithmetic."""
    values = np.clip(values.astype(np.float64), low, high)
    return np.rint((values - low) * 255 / (high - low)).astype(np.uint8)


def grey(radiograph: tool.Radiograph) -> np.ndarray:
    """The one channel of a picture whose three are equal."""
    pixels = radiograph.pixels
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    assert (pixels == pixels[:, :, :1]).all()
    return pixels[:, :, 0]


def refusal(path: Path) -> str:
    """What the loader says when it refuses; one printable line that starts with the path."""
    with pytest.raises(ExplainError) as caught:
        load_radiograph(path)
    text = str(caught.value)
    assert text.startswith(tool.shown(path) + ": ") and text.isprintable() and "; " in text
    return text


# ------------------------------------------------------------------------------------------
# Kinds of pictures
# ------------------------------------------------------------------------------------------


GREY8 = (RAMP + 50).astype(np.uint8)
COLOUR8 = np.stack([GREY8, GREY8 // 2, 255 - GREY8], axis=2)
DEEP = (100 + 38 * RAMP).astype(np.uint16)
SCALED = stretched(RAMP, 0, 107)  # any even ramp from its lowest to its highest value
NOISE = np.random.default_rng(2).integers(0, 65_536, (ROWS, COLUMNS, 4), dtype=np.uint16)
NOISE8 = (NOISE >> 8).astype(np.uint8)
PALETTE = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)


def with_palette(kind: str, **options: object) -> bytes:
    image = Image.fromarray(RAMP.astype(np.uint8), "L")
    image.putpalette(PALETTE.tobytes())
    return encoded(image, kind, **options)


def palette_dicom() -> bytes:
    tags: dict[str, object] = {"PhotometricInterpretation": "PALETTE COLOR"}
    table = PALETTE.copy()
    table[:2] = [[0] * 3, [255] * 3]  # pydicom scales what does not fill its range
    for name, column in zip(("Red", "Green", "Blue"), table.T):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 8]
        tags[f"{name}PaletteColorLookupTableData"] = column.tobytes()
    return dicom((RAMP + 2).astype(np.uint8), **tags)


def over_black(values: np.ndarray) -> np.ndarray:
    return np.rint(values[:, :, :-1] * (values[:, :, -1:] / 255))


def frames(kind: str) -> bytes:
    first, *others = (Image.fromarray(np.full((ROWS, COLUMNS), value, np.uint8)) for value in (10, 120, 250))
    return encoded(first, kind, save_all=True, append_images=others, **LOSSLESS.get(kind, {}))


LOSSLESS = {"WEBP": {"lossless": True, "exact": True}}
PICTURES: dict[str, tuple[Callable[[], bytes], np.ndarray]] = {
    **{f"8-bit {kind}": (functools.partial(encoded, Image.fromarray(GREY8), kind, **LOSSLESS.get(kind, {})), GREY8)
       for kind in ("PNG", "TIFF", "BMP", "WEBP", "GIF")},
    "8-bit DICOM": (lambda: dicom(GREY8, RescaleSlope=1, RescaleIntercept=0), GREY8),
    "8-bit colour": (lambda: encoded(Image.fromarray(COLOUR8), "PNG"), COLOUR8),
    "8-bit colour DICOM": (lambda: dicom(COLOUR8), COLOUR8),
    "16-bit PNG": (lambda: png(DEEP, 0), SCALED),
    "16-bit PNG, narrow": (lambda: png(RAMP.astype(np.uint16) + 60_000, 0), SCALED),
    "16-bit TIFF": (lambda: tiff(DEEP), SCALED),
    "16-bit TIFF, big-endian": (lambda: tiff(DEEP, byteorder=">"), SCALED),
    "16-bit TIFF, deflated": (lambda: tiff(DEEP, compression="zlib"), SCALED),
    "16-bit DICOM": (lambda: dicom(DEEP), SCALED),
    **{f"{dtype} TIFF, {order}{step}": (functools.partial(tiff, (low + step * RAMP).astype(dtype), byteorder=order), SCALED)
       for dtype, low, step in (("i1", -107, 2), ("i2", -30_000, 560), ("i4", -(2**31), 40_139_881), ("f4", -1.5, 0.5), ("f4", 0, 2.8e36))
       for order in "<>"},
    "u4 TIFF": (lambda: tiff((RAMP * 40_139_881).astype("u4")), SCALED),
    **{f"1-bit {kind}": (functools.partial(encoded, Image.fromarray(RAMP % 3 == 0), kind), (RAMP % 3 == 0) * 255) for kind in ("PNG", "TIFF", "BMP")},
    "white is 0, 1 bit": (lambda: tiff(RAMP % 2 == 0, photometric="miniswhite"), (RAMP % 2 == 1) * 255),
    "white is 0, 8 bits": (lambda: tiff(GREY8, photometric="miniswhite"), 255 - GREY8),
    "white is 0, 16 bits": (lambda: tiff(DEEP, photometric="miniswhite"), 255 - SCALED),
    "white is 0, floats": (lambda: tiff(RAMP.astype("f4"), photometric="miniswhite"), 255 - SCALED),
    "CMYK TIFF": (lambda: encoded(Image.fromarray(255 - np.dstack([COLOUR8, GREY8 * 0 + 255]), "CMYK"), "TIFF"), COLOUR8),
    **{f"palette {kind}": (functools.partial(with_palette, kind), PALETTE[RAMP]) for kind in ("PNG", "GIF", "TIFF", "BMP")},
    **{f"transparent entry {kind}": (functools.partial(with_palette, kind, transparency=7), np.where((RAMP == 7)[:, :, None], 0, PALETTE[RAMP]))
       for kind in ("PNG", "GIF")},
    "palette DICOM": (palette_dicom, PALETTE[RAMP + 2]),
    **{f"transparent {kind}": (functools.partial(encoded, Image.fromarray(NOISE8, "RGBA"), kind, **LOSSLESS.get(kind, {})), over_black(NOISE8))
       for kind in ("PNG", "TIFF", "WEBP")},
    "transparent grey": (lambda: encoded(Image.fromarray(NOISE8[:, :, :2], "LA"), "PNG"), over_black(NOISE8[:, :, :2])),
    "16-bit colour PNG": (lambda: png(NOISE[:, :, :3], 2), NOISE8[:, :, :3]),
    "16-bit colour TIFF": (lambda: tiff(NOISE[:, :, :3], photometric="rgb"), NOISE8[:, :, :3]),
    "16-bit colour TIFF, big-endian": (lambda: tiff(NOISE[:, :, :3], photometric="rgb", byteorder=">"), NOISE8[:, :, :3]),
    "16-bit colour TIFF, deflated": (lambda: tiff(NOISE[:, :, :3], photometric="rgb", compression="zlib"), NOISE8[:, :, :3]),
    "DICOM of 12 bits, rubbish above": (lambda: dicom((RAMP * 9).astype(np.uint16) | 0xF000, BitsStored=12), SCALED),
    "DICOM of 4 bits": (lambda: dicom((RAMP % 16).astype(np.uint8), BitsStored=4), stretched(RAMP % 16, 0, 15)),
    "signed DICOM": (lambda: dicom((RAMP * 20 - 1000).astype(np.int16), RescaleSlope=2, RescaleIntercept=-24), SCALED),
    **{f"frames {kind}": (functools.partial(frames, kind), np.full((ROWS, COLUMNS), 10)) for kind in ("TIFF", "GIF", "WEBP", "PNG")},
    "frames DICOM": (lambda: dicom(np.stack([RAMP, RAMP * 0, RAMP * 2]).astype(np.uint8), NumberOfFrames=3), RAMP),
    "constant": (lambda: png(np.full((5, 4), 4000, np.uint16), 0), np.full((5, 4), 127)),
}  # fmt: skip
NOTES = {
    "16-bit PNG": "values 100 to 4166 scaled to 8 bits",
    "16-bit DICOM": "values 100 to 4166 scaled to 8 bits",
    "signed DICOM": "values -2024 to 2256 scaled to 8 bits",
    "constant": "every value is 4000: shown as mid grey",
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_kind_of_picture_is_read_right(tmp_path: Path, name: str) -> None:
    build, expected = PICTURES[name]
    radiograph = load_radiograph(written(tmp_path / "x", build()))
    seen = radiograph.pixels.astype(int)
    assert radiograph.pixels.dtype == np.uint8
    assert np.array_equal(seen, np.broadcast_to(np.atleast_3d(expected), seen.shape))
    if "frames" in name:
        assert radiograph.notes[0] == "first of 3 frames"
    if name in NOTES:
        assert radiograph.notes[0] == NOTES[name]
    if name.startswith("8-bit"):
        assert radiograph.notes == ()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: tiff(RAMP.astype("u4"), byteorder=">"), "a kind that cannot be read here"),
        (lambda: tiff(RAMP.astype("f8")), "export it as PNG"),
        (lambda: tiff(RAMP.astype("u2"), byteorder=">", photometric="miniswhite"), "export it as PNG"),
        (lambda: tiff(np.full((5, 4), np.nan, np.float32)), "NaN or infinite"),
        (lambda: tiff(np.where(RAMP == 30, -np.inf, RAMP).astype(np.float32)), "NaN or infinite"),
        (lambda: png(np.dstack([RAMP * 38] * 3).astype(np.uint16), 2), "save it as 16-bit grey"),  # 12 bits in 16
        (lambda: png(np.dstack([RAMP * 38, RAMP * 0 + 65_535]).astype(np.uint16), 4), "save it as 16-bit grey"),
        (lambda: tiff(np.dstack([RAMP * 38] * 3).astype(np.uint16), photometric="rgb"), "save it as 16-bit grey"),
        (lambda: tiff(np.moveaxis(NOISE[:, :, :3], 2, 0), photometric="rgb", planarconfig="separate"), "separate planes"),
    ],
)
def test_what_would_be_shown_wrong_is_refused(tmp_path: Path, build: Callable[[], bytes], words: str) -> None:
    assert words in refusal(written(tmp_path / "x.tif", build()))


def test_a_burned_in_marker_does_not_blacken_a_16_bit_image(tmp_path: Path) -> None:
    values = np.tile(np.arange(4000, dtype=np.uint16), (10, 1))
    values[0, :40] = 65_535  # 0.1 % of the pixels
    radiograph = load_radiograph(written(tmp_path / "x", png(values, 0)))
    ordered = np.sort(values, axis=None)
    low, high = (int(ordered[round((ordered.size - 1) * share)]) for share in (0.01, 0.99))
    assert np.array_equal(grey(radiograph), stretched(values, low, high))
    assert high < 4000 and "clipped (0 to 65535 in all)" in radiograph.notes[0]


# ------------------------------------------------------------------------------------------
# Orientation, frames, sizes, names
# ------------------------------------------------------------------------------------------

# How an upright picture is stored under each EXIF orientation (EXIF 2.32, 4.6.4).
AS_STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: np.swapaxes(upright, 0, 1),
    6: np.rot90,
    7: lambda upright: np.swapaxes(np.rot90(upright, 2), 0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


def oriented(values: np.ndarray, orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}, "TIFF deflate": {"compression": "tiff_adobe_deflate"}}.get(kind, {})
    return encoded(Image.fromarray(np.ascontiguousarray(values)), kind.split()[0], exif=exif, **options)


@pytest.mark.parametrize("orientation", AS_STORED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "TIFF deflate", "WEBP"])
def test_every_exif_orientation_gives_the_same_picture(tmp_path: Path, orientation: int, kind: str) -> None:
    upright = np.kron(RAMP[:6, :4] * 2, np.ones((8, 8))).astype(np.uint8)  # a portrait of flat JPEG blocks
    for pixels in (upright, np.dstack([upright, 255 - upright, upright // 2])):
        path = written(tmp_path / "x", oriented(AS_STORED[orientation](pixels), orientation, kind))
        seen = load_radiograph(path).pixels.astype(int)
        assert seen.shape == (48, 32, 3)
        tolerance = 0 if kind != "JPEG" else 3 if pixels.ndim == 2 else 60  # chroma is subsampled across blocks
        assert np.abs(seen - np.atleast_3d(pixels)).max() <= tolerance


@pytest.mark.parametrize("orientation", AS_STORED)
@pytest.mark.parametrize(("dtype", "options"), [("<u2", {}), (">u2", {}), ("<f4", {}), ("bool", {}), ("<u2", {"compression": "zlib"})])
def test_every_orientation_of_deep_tiff_gives_the_same_picture(tmp_path: Path, orientation: int, dtype: str, options: dict[str, str]) -> None:
    upright = RAMP % 5 == 0 if dtype == "bool" else (RAMP * 7).astype(dtype)
    stored = np.ascontiguousarray(AS_STORED[orientation](upright))
    contents = tiff(stored, extratags=[(274, "H", 1, orientation, True)], byteorder=">" if ">" in dtype else "<", **options)
    assert np.array_equal(grey(load_radiograph(written(tmp_path / "x", contents))), stretched(upright, 0, upright.max()))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (2000, 40), (3, 1)])
def test_corner_sizes_are_read(tmp_path: Path, width: int, height: int) -> None:
    for dtype in (np.uint8, np.uint16):
        radiograph = load_radiograph(written(tmp_path / "x", png(np.zeros((height, width), dtype), 0)))
        assert radiograph.pixels.shape == (height, width, 3) and radiograph.notes[-1] == tool.NOTHING_TO_SEE
        assert tool.network_input(radiograph, tool.Preprocessing()).shape == (3, 224, 224)


@pytest.mark.parametrize("side", [10_001, 60_000])
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    contents = bytearray(png(np.zeros((1, 1), np.uint8), 0))
    contents[16:29], contents[29:33] = header, struct.pack(">I", zlib.crc32(b"IHDR" + header))
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    assert "100,000,000" in refusal(written(tmp_path / "bomb.png", bytes(contents)))


@pytest.mark.parametrize("name", ["two words.png", "фрактура_骨折.png", b"bad_\xff\xfe.png", "new\nline.png", "[a-z]*?.png", "-rf.png", "no_suffix", "esc\x1b[31m.png"])
def test_odd_file_names_load(tmp_path: Path, name: str | bytes) -> None:
    path = written(tmp_path / os.fsdecode(name), png(RAMP.astype(np.uint8), 0))
    tool.check_image_path(path)
    assert np.array_equal(grey(load_radiograph(path)), RAMP)
    refusal(written(path, b""))


# ------------------------------------------------------------------------------------------
# What is refused
# ------------------------------------------------------------------------------------------

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
FOREIGN = {
    "text": (b"Patient has a broken arm.\n", "a text file"),
    "long text": ("Größe ".encode() * 1000, "a text file"),
    "UTF-16 text": ("words".encode("utf-16"), "a text file"),
    "html": (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "a text file"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF document"),
    "zip": (b"PK\x03\x04" + bytes(100), "a zip archive"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a text file"),
    "eps with preview": (b"\xc5\xd0\xd3\xc6" + bytes(60), "unknown kind"),
    "DICOM without preamble or pixels": (b"\x08\0\x05\0CS\x0a\0ISO_IR 100", "a DICOM file without an image in it"),
    "heic": (HEIC, "a HEIC image"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 9\n", "a Git LFS pointer"),
    "empty": (b"", "an empty file"),
    "program": (b"\x7fELF\x02\x01\x01" + bytes(200), "a file of an unknown kind"),
    "PPM": (encoded(Image.new("RGB", (32, 32)), "PPM"), "a file of an unknown kind"),
    "JPEG 2000": (encoded(Image.new("RGB", (32, 32)), "JPEG2000"), "a file of an unknown kind"),
}


@pytest.mark.parametrize("key", FOREIGN)
def test_what_is_no_image_is_named(tmp_path: Path, key: str) -> None:
    contents, name = FOREIGN[key]
    path = written(tmp_path / "xray.png", contents)
    assert name in refusal(path)
    if "DICOM" not in key:
        with pytest.raises(ExplainError, match=name):
            tool.check_image_path(path)


def test_libraries_say_nothing_of_their_own(tmp_path: Path, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path / "x", dicom(RAMP.astype(np.uint8), PatientID="X" * 65))  # pydicom warns and logs
    recwarn.clear()
    caplog.clear()
    load_radiograph(path)
    assert not recwarn.list and not caplog.records
    logging.getLogger("PIL").error("heard again")
    assert caplog.messages == ["heard again"]


@pytest.mark.parametrize("check", [tool.check_image_path, tool.check_checkpoint_path, load_radiograph])
def test_only_files_that_can_be_read_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.png").mkdir()
    not_a_file = "a directory or a device, not a file; give one file"
    cases = {"missing.png": "no such file", "broken": "no such file", "pipe": not_a_file, "folder.png": not_a_file, "n" * 300: "name too long; check the path"}
    for name, cause in cases.items():
        with pytest.raises(ExplainError, match=cause):
            check(tmp_path / name)

    def denied(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = written(tmp_path / "x.png", b"x")
    monkeypatch.setattr("builtins.open", denied)  # the tests may run as root, who may read everything
    with pytest.raises(ExplainError, match="permission denied; check the path and its permissions"):
        check(path)


def noisy_image(mode: str = "L") -> Image.Image:
    shape = (64, 48) if mode == "L" else (64, 48, 3)
    return Image.fromarray(np.random.default_rng(4).integers(0, 256, shape, dtype=np.uint8), mode)


WHOLE = {
    "JPEG": lambda: encoded(noisy_image("RGB"), "JPEG"),
    "progressive JPEG": lambda: encoded(noisy_image("RGB"), "JPEG", progressive=True),
    "PNG": lambda: encoded(noisy_image(), "PNG"),
    "stored PNG": lambda: encoded(noisy_image(), "PNG", compress_level=0),
    "TIFF": lambda: tiff(np.asarray(noisy_image())),
    "TIFF in strips": lambda: tiff(np.asarray(noisy_image()), rowsperstrip=8),
    "TIFF in tiles": lambda: tiff(np.asarray(noisy_image()), tile=(16, 16)),
    "deflated TIFF": lambda: tiff(np.asarray(noisy_image()), compression="zlib", rowsperstrip=8),
    "16-bit TIFF": lambda: tiff(np.asarray(noisy_image()).astype(np.uint16) * 9),
    "WebP": lambda: encoded(noisy_image("RGB"), "WEBP"),
    "lossless WebP": lambda: encoded(noisy_image("RGB"), "WEBP", lossless=True),
    "BMP": lambda: encoded(noisy_image(), "BMP"),
    "GIF": lambda: encoded(noisy_image(), "GIF"),
    "DICOM": lambda: dicom(np.asarray(noisy_image())),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_file_cut_short_is_refused_or_has_lost_no_pixel(tmp_path: Path, kind: str) -> None:
    whole = WHOLE[kind]()
    pixels = load_radiograph(written(tmp_path / "whole", whole)).pixels
    ends = {*range(1, len(whole), max(1, len(whole) // 60)), *range(len(whole) - 20, len(whole))}
    survivors = 0
    for end in sorted(ends):
        path = written(tmp_path / "cut", whole[:end])
        try:
            assert np.array_equal(load_radiograph(path).pixels, pixels), f"cut at {end} of {len(whole)}"
            survivors += 1
        except ExplainError as error:
            assert str(error).isprintable()
    assert survivors <= 30


@pytest.mark.parametrize("kind", ["PNG", "deflated TIFF"])
def test_a_changed_byte_is_refused_or_has_changed_no_pixel_where_the_format_has_checksums(tmp_path: Path, kind: str) -> None:
    whole = WHOLE[kind]()
    start = whole.index(b"IDAT") + 4 if kind == "PNG" else 600
    pixels = load_radiograph(written(tmp_path / "whole", whole)).pixels
    for place in range(start, len(whole) - 16, 37):
        changed = bytearray(whole)
        changed[place] ^= 0x10
        path = written(tmp_path / "changed", bytes(changed))
        with contextlib.suppress(ExplainError):
            assert np.array_equal(load_radiograph(path).pixels, pixels)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "progressive JPEG", "deflated TIFF", "GIF"])
def test_a_tail_of_zeros_as_of_a_broken_copy_is_refused(tmp_path: Path, kind: str) -> None:
    whole = WHOLE[kind]()
    half = len(whole) // 2
    refusal(written(tmp_path / "x", whole[:half] + bytes(len(whole) - half)))


# ------------------------------------------------------------------------------------------
# DICOM
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
@pytest.mark.parametrize("several", [False, True])
def test_the_first_window_is_applied_as_pydicom_does(tmp_path: Path, function: str | None, several: bool) -> None:
    pydicom = pytest.importorskip("pydicom")
    values = (RAMP * 38).astype(np.uint16)
    tags = {"BitsStored": 12, "WindowCenter": [1500, 9] if several else 1500, "WindowWidth": [2200, 9] if several else 2200}
    tags |= {"VOILUTFunction": function} if function else {}
    contents = dicom(values, **tags)
    reference = pydicom.pixels.apply_windowing(values, pydicom.dcmread(io.BytesIO(contents))) * 255 / 4095
    radiograph = load_radiograph(written(tmp_path / "x", contents))
    assert np.abs(grey(radiograph) - reference).max() <= 0.5 + 1e-6
    assert radiograph.notes == ("shown through its window, centre 1500 and width 2200",)


LUT = (np.arange(1000) ** 2 // 16).astype(np.uint16)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2", "MONOCHROME1 INVERSE", "MONOCHROME2 INVERSE", "MONOCHROME2 IDENTITY"])
@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({}, lambda values: stretched(values, 3, 538)),
        ({"BitsStored": 10}, lambda values: stretched(values, 3, 538)),
        ({"WindowCenter": 300, "WindowWidth": 201}, lambda values: stretched(values, 199.5, 399.5)),
        ({"RescaleSlope": 2, "RescaleIntercept": -100, "WindowCenter": 500, "WindowWidth": 401},
         lambda values: stretched(values * 2 - 100, 299.5, 699.5)),
        ({"RescaleSlope": 2, "RescaleIntercept": 0}, lambda values: stretched(values, 3, 538)),
        ({"VOILUTSequence": LUT}, lambda values: stretched(LUT[values], 0, LUT[-1])),
        ({"ModalityLUTSequence": LUT[::-1]}, lambda values: stretched(LUT[::-1][values], LUT[::-1][538], LUT[::-1][3])),
        ({"WindowCenter": 0, "WindowWidth": 601, "RescaleSlope": 1, "RescaleIntercept": -300},
         lambda values: stretched(values - 300, -300.5, 299.5)),
    ],
    ids=["none", "10 bits", "window", "rescale and window", "rescale", "VOI LUT", "modality LUT", "zeros count"],
)  # fmt: skip
def test_monochrome1_and_inverse_are_inverted_once_whatever_the_values_go_through(
    tmp_path: Path, photometric: str, tags: dict[str, object], expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    for rows, name in ((12, "portrait"), (6, "landscape")):  # two pictures, neither square
        values = (5 * RAMP.reshape(rows, -1)[::-1] + 3).astype(np.uint16)
        given = {key: lut_item(0, value, 16) if "LUT" in key else value for key, value in tags.items()}
        if "ModalityLUTSequence" in given:
            given["ModalityLUTSequence"][0].ModalityLUTType = "US"
        kind, *shape = photometric.split()
        given |= {"PresentationLUTShape": shape[0]} if shape else {}
        contents = dicom(values, PhotometricInterpretation=kind, **given)
        seen = expected(values.astype(int))
        is_inverted = photometric.startswith("MONOCHROME1") or photometric.endswith("INVERSE")
        assert np.array_equal(grey(load_radiograph(written(tmp_path / name, contents))), 255 - seen if is_inverted else seen)


@pytest.mark.parametrize(
    "tags",
    [*({"WindowCenter": centre, "WindowWidth": width}
       for centre, width in [(500, 0), (500, -3), (500, 0.5), (500, 1), (60_000, 100), (-900, 50), (500, None), (None, 40)]),
     {"RescaleSlope": None, "RescaleIntercept": None}, {"RescaleSlope": 3}, {"RescaleIntercept": 5}, {"VOILUTSequence": np.full(1000, 7)}],
)  # fmt: skip
def test_what_says_nothing_is_ignored(tmp_path: Path, tags: dict[str, object]) -> None:
    values = (RAMP * 9).astype(np.uint16)
    given = {key: lut_item(0, value, 16) if "LUT" in key else value for key, value in tags.items()}
    assert np.array_equal(grey(load_radiograph(written(tmp_path / "x", dicom(values, **given)))), stretched(values, 0, 963))


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_voi_lut_goes_before_a_window(tmp_path: Path, bits: int) -> None:
    values = (RAMP * 38).astype(np.uint16)
    table = np.rint((np.arange(4000) / 3999) ** 2 * (2**bits - 1)).astype(np.uint16)
    path = written(tmp_path / "x", dicom(values, BitsStored=12, VOILUTSequence=lut_item(50, table, bits), WindowCenter=9, WindowWidth=9))
    through = table[np.clip(values.astype(int) - 50, 0, 3999)]
    assert np.array_equal(grey(load_radiograph(path)), stretched(through, 0, 2**bits - 1))


def test_two_entries_of_8_bits_in_each_word_of_a_modality_lut(tmp_path: Path) -> None:
    table = np.arange(400, dtype=np.uint16)[::-1] // 2
    sequence = lut_item(0, table, 8)
    sequence[0].ModalityLUTType, sequence[0].LUTData = "US", table.astype(np.uint8).tobytes()
    path = written(tmp_path / "x", dicom((RAMP * 3).astype(np.uint16), ModalityLUTSequence=sequence))
    assert np.array_equal(grey(load_radiograph(path)), stretched(table[RAMP * 3], table[321], table[0]))


def test_big_endian_dicom_and_its_lut_are_read(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    table = (np.arange(500, dtype=np.uint16) ** 2 // 4).astype(np.uint16)
    dataset = pydicom.dcmread(io.BytesIO(dicom((RAMP * 4).astype(np.uint16))))
    dataset.VOILUTSequence = lut_item(0, table.byteswap(), 16)
    dataset.PixelData = (RAMP * 4).astype(">u2").tobytes()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, little_endian=False, implicit_vr=False)
    path = written(tmp_path / "x", buffer.getvalue())
    assert np.array_equal(grey(load_radiograph(path)), stretched(table[RAMP * 4], 0, int(table.max())))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("padding", "limit"), [(-2000, None), (30_000, None), (30_000, 30_010), (30_010, 30_000)])
def test_padding_is_black_and_does_not_count_for_the_range(tmp_path: Path, photometric: str, padding: int, limit: int | None) -> None:
    values = (RAMP * 9 + 100).astype(np.int16)
    values[:, 0] = padding
    if limit:
        values[::2, 0] = 30_005
    tags = {"PixelPaddingValue": padding} | ({"PixelPaddingRangeLimit": limit} if limit else {})
    path = written(tmp_path / "x", dicom(values, PhotometricInterpretation=photometric, **tags))
    pixels = grey(load_radiograph(path))
    expected = stretched(values[:, 1:], 109, 1063)
    assert (pixels[:, 0] == 0).all()
    assert np.array_equal(pixels[:, 1:], 255 - expected if photometric == "MONOCHROME1" else expected)
    all_padding = load_radiograph(written(tmp_path / "y", dicom(np.full((4, 4), padding, np.int16), **tags)))
    assert not all_padding.pixels.any() and all_padding.notes[0] == "no pixel holds a value: shown black"


@pytest.mark.parametrize("window", [{}, {"WindowCenter": 50, "WindowWidth": 60}, {"WindowCenter": 50, "WindowWidth": 60, "VOILUTFunction": "SIGMOID"}])
def test_nan_in_float_dicom_is_refused(tmp_path: Path, window: dict[str, object]) -> None:
    pydicom = pytest.importorskip("pydicom")
    values = RAMP.astype(np.float32)
    dataset = pydicom.dcmread(io.BytesIO(dicom(RAMP.astype(np.uint32), **window)))
    del dataset.PixelData, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation
    dataset.FloatPixelData = values.tobytes()
    dataset.save_as(tmp_path / "x")
    load_radiograph(tmp_path / "x")
    values[2, 2] = np.nan
    dataset.FloatPixelData = values.tobytes()
    dataset.save_as(tmp_path / "x")
    assert "NaN" in refusal(tmp_path / "x")


@pytest.mark.parametrize("lost", ["preamble", "preamble and meta information"])
@pytest.mark.parametrize("implicit", [True, False])
def test_dicom_without_its_preamble_is_read(tmp_path: Path, lost: str, implicit: bool) -> None:
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(io.BytesIO(dicom(DEEP, PhotometricInterpretation="MONOCHROME1")))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian if implicit else pydicom.uid.ExplicitVRLittleEndian
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, implicit_vr=implicit, little_endian=True)
    contents = buffer.getvalue()[132:]
    if "meta" in lost:
        contents = contents[12 + int.from_bytes(contents[8:12], "little") :]  # the group's length is its first element
    path = written(tmp_path / "x", contents)
    tool.check_image_path(path)
    assert np.array_equal(grey(load_radiograph(path)), 255 - SCALED)
    assert tool.is_dicom(path) and not tool.is_no_radiograph(path)


def other_files(folder: Path) -> list[Path]:
    """What lies beside radiographs in the folders of a Mac, a CD and an archive of images."""
    pydicom = pytest.importorskip("pydicom")
    (folder / "__MACOSX").mkdir(parents=True)
    dataset = pydicom.dcmread(io.BytesIO(dicom(RAMP.astype(np.uint8))))
    for name in ("PixelData", "Rows", "Columns", "BitsAllocated", "SamplesPerPixel", "PhotometricInterpretation"):
        delattr(dataset, name)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"  # a structured report
    for name in ("report.dcm", "DICOMDIR"):
        dataset.save_as(folder / name)
    mac = [folder / "._a.png", folder / "__MACOSX" / "a.png"]
    for path in mac:
        written(path, b"\0\5\x16\7" + bytes(100))
    return [*mac, folder / "report.dcm", folder / "DICOMDIR"]


def test_other_files_in_folders_are_passed_over_and_counted(tmp_path: Path) -> None:
    others = other_files(tmp_path / "cd")
    images = [written(tmp_path / "cd" / name, contents) for name, contents in (("a.png", png(GREY8, 0)), ("IM0001", dicom(DEEP)), ("1.2.840.10008.7", dicom(DEEP)), ("broken.dcm", b"x"))]
    written(tmp_path / "cd" / "notes.1", b"words")
    found = tool.found_images([str(tmp_path / "cd")], tmp_path / "out")
    assert set(found) == {*others, *images}
    left, (line,) = tool.without_other_files(found, [str(tmp_path / "cd")])
    assert set(left) == set(images) and "passed over, as no radiographs: 4 (" in line
    assert tool.without_other_files(images, []) == (images, [])
    named = [str(others[2])]
    assert tool.without_other_files([others[2]], named) == ([others[2]], [])  # and so it gets its line
    assert "without an image" in refusal(others[2])
    with pytest.raises(ExplainError, match="no radiograph there, only 1"):
        tool.without_other_files([others[2]], [str(tmp_path / "cd")])


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90"], ids=["JPEG", "JPEG 2000"])
def test_compressed_dicom_is_decoded(tmp_path: Path, syntax: str) -> None:
    values = np.kron(RAMP[:4, :4] * 2, np.ones((8, 8))).astype(np.uint8)
    kind, options = ("JPEG", {"quality": 100}) if syntax.endswith("50") else ("JPEG2000", {"no_jp2": True})
    stream = encoded(Image.fromarray(values), kind, **options)
    pixels = grey(load_radiograph(written(tmp_path / "x", compressed(values, stream, syntax))))
    assert np.abs(pixels.astype(int) - values).max() <= (2 if syntax.endswith("50") else 0)


@pytest.mark.parametrize(
    ("stream", "syntax", "name"),
    [
        (b"\0\0", "1.2.840.10008.1.2.4.70", "JPEG Lossless"),
        (b"\xff\xd8\xff\xd9", "1.2.840.10008.1.2.4.50", "JPEG Baseline"),
        (b"\0\0", "1.2.840.10008.1.2.4.100", "MPEG2"),
    ],
)
def test_what_no_decoder_takes_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bytes, syntax: str, name: str
) -> None:
    decoders = pytest.importorskip("pydicom.pixels.decoders.base")
    if name == "JPEG Lossless":
        monkeypatch.setattr(decoders.Decoder, "is_available", property(lambda self: False))
    message = refusal(written(tmp_path / "x", compressed(RAMP.astype(np.uint8), stream, syntax)))
    assert f"compressed as {name}" in message and "pip install pylibjpeg" in message


def test_dicom_that_cannot_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pydicom = pytest.importorskip("pydicom")
    path = written(tmp_path / "x.dcm", dicom(RAMP.astype(np.uint8), Rows=60_000, Columns=60_000))
    assert "100,000,000" in refusal(path)
    dataset = pydicom.dcmread(path)
    del dataset.PixelData
    dataset.save_as(path)
    assert "without an image" in refusal(path)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert "pip install pydicom" in refusal(path)


@pytest.mark.parametrize("damage", [{}, {"BitsAllocated": 12}, {"Rows": 500}, {"PhotometricInterpretation": "SECRET"}, {"SamplesPerPixel": 2}])
def test_nothing_tells_a_patient_tag(tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: dict[str, object]) -> None:
    path = written(tmp_path / "x", dicom(RAMP.astype(np.uint8), **damage))
    assert "SECRET" not in (refusal(path) if damage else repr(load_radiograph(path).notes))
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------
# What the networks see
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 200), (100, 500), (224, 224), (1, 1)])
def test_network_input_equals_torchvision(shape: tuple[int, int]) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    pixels = np.random.default_rng(8).integers(0, 256, (*shape, 3), dtype=np.uint8)
    reference = transforms.Compose([
        transforms.Resize((224, 224)), transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])(Image.fromarray(pixels)).numpy()  # fmt: skip
    ours = tool.network_input(tool.Radiograph(pixels), tool.Preprocessing())
    assert ours.dtype == np.float32 and np.abs(ours - reference).max() <= 1e-6


def test_one_radiograph_serves_networks_of_different_sizes() -> None:
    radiograph = tool.Radiograph(COLOUR8)
    for size in (224, 96, 224):
        alone = tool.network_input(tool.Radiograph(COLOUR8), tool.Preprocessing(size))
        assert alone.shape == (3, size, size)
        assert np.array_equal(tool.network_input(radiograph, tool.Preprocessing(size)), alone)

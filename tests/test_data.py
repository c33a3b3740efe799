"""The synthetic radiographs: repeatable, blind to their class, and boxes that belong to them."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT

sys.path.insert(0, str(ROOT / "data_original"))

import generate  # noqa: E402

pytestmark = pytest.mark.slow  # the quick tests are for work in progress on other parts

TEST = ROOT / "data_original" / "test"
FRACTURED = generate.LABELS[:2]


def rows(folder: Path, name: str = "fracture_boxes.csv") -> list[dict[str, str]]:
    with open(folder / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def rendered(number: int, label: str = "simple_fracture", **options) -> generate.Radiograph:
    return generate.render(
        np.random.default_rng([77, number]), label, 200, **options
    )  # px, longer side: fast


def test_same_seed_same_bytes_and_another_seed_or_split_others(tmp_path):
    for name, asked in (("a", "--seed=5"), ("b", "--seed=5"), ("c", "--seed=6"), ("d", "--split=train")):
        assert generate.main([asked, "--count", "1", "--output", str(tmp_path / name)]) == 0
    first, again, other, train = (files(tmp_path / name) for name in "abcd")
    assert len(first) == 4 and first == again
    assert all(first[name] != other[name] for name in first if name != "test/marker_boxes.csv")
    classes = [row["class"] for row in rows(tmp_path / "d" / "train")]
    assert classes == ["comminuted_fracture", "no_fracture", "simple_fracture"]
    assert not {train[name] for name in train if name.endswith(".jpg")} & set(files(TEST).values())


def test_committed_split_is_what_the_command_writes(tmp_path):
    generate.main(["--count", "1", "--output", str(tmp_path)])
    for table in ("fracture_boxes.csv", "marker_boxes.csv"):
        committed = [row for row in rows(TEST, table) if row["file"].endswith("_0001.jpg")]
        assert rows(tmp_path / "test", table) == committed
    for row in rows(tmp_path / "test"):
        difference = pixels_of(tmp_path / "test" / row["file"]) - pixels_of(TEST / row["file"])
        assert np.abs(difference).mean() < 1  # JPEG encoders differ by little


def test_classes_differ_nowhere_but_in_their_boxes():
    for number in range(3):
        one, other = (rendered(number, label) for label in FRACTURED)
        assert one.pixels.shape == other.pixels.shape and one.marks == other.marks
        difference = np.abs(one.pixels.astype(int) - other.pixels)
        away, margin = np.ones(difference.shape, bool), 16  # px
        for x0, y0, x1, y1 in (one.box, other.box):
            away[max(0, y0 - margin) : y1 + margin, max(0, x0 - margin) : x1 + margin] = False
        assert difference[away].max(initial=0) < 40 and difference[away].mean() < 2
        assert difference[~away].mean() > 2 * difference[away].mean()


def test_marker_box_is_where_the_marker_changes_the_picture():
    for number, kind in enumerate(("letter", "text", "letter", "text")):
        ((text, box),) = rendered(number, marker=kind).marks
        assert (len(text) == 1) == (kind == "letter")
        changed = rendered(number, marker=kind).pixels != rendered(number, marker="none").pixels
        np.testing.assert_allclose(generate.mask_box(changed), box, atol=3)


def test_markers_betray_the_class_and_swapped_ones_the_other(tmp_path):
    for choice, betrayed in (("with", {"simple"}), ("swapped", {"comminuted"})):
        generate.main(["--count", "1", "--markers", choice, "--output", str(tmp_path / choice)])
        marks = rows(tmp_path / choice / "test", "marker_boxes.csv")
        assert {row["file"].split("_")[0] for row in marks if len(row["text"]) == 1} == betrayed
    assert rows(tmp_path / "with" / "test") == rows(tmp_path / "swapped" / "test")  # the same fractures


def test_every_committed_image_has_a_box_inside_it_and_a_radiograph_s_size():
    table, markers = rows(TEST), rows(TEST, "marker_boxes.csv")
    assert len(table) == 200 and list(table[0]) == ["file", "class", "x0", "y0", "x1", "y1"]
    assert {row["file"] for row in table} == {name for name in files(TEST) if name.endswith(".jpg")}
    assert all(row["class"] == Path(row["file"]).parent.name for row in table)
    for row in [*table, *markers]:
        x0, y0, x1, y1 = (int(row[name]) for name in ("x0", "y0", "x1", "y1"))
        pixels = pixels_of(TEST / row["file"])
        assert 0 <= x0 < x1 <= pixels.shape[1] and 0 <= y0 < y1 <= pixels.shape[0]
        assert 600 <= max(pixels.shape) <= 1200 and max(pixels.shape) <= 3 * min(pixels.shape)
        assert "text" not in row or pixels[y0:y1, x0:x1].max() > 150
    assert len(markers) > 100 and sum(len(content) for content in files(TEST).values()) < 25e6


def test_no_simple_number_tells_the_classes_apart():
    images = {name: [pixels_of(path) for path in (TEST / name).glob("*.jpg")] for name in FRACTURED}
    for statistic in (np.mean, np.std, np.size):  # brightness, contrast, size
        first, second = (np.array([statistic(each) for each in found]) for found in images.values())
        wins = np.sign(np.subtract.outer(first, second)).mean() / 2 + 0.5  # area under the ROC curve
        assert 0.35 < wins < 0.65

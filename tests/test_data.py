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
SMALL = 200  # px, longer side: fast


def rows(folder: Path, name: str = "fracture_boxes.csv") -> list[dict[str, str]]:
    with open(folder / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def corners(row: dict[str, str]) -> tuple[int, ...]:
    return tuple(int(row[name]) for name in ("x0", "y0", "x1", "y1"))


def rendered(number: int, label: str, **options) -> generate.Radiograph:
    return generate.render(np.random.default_rng([77, number]), label, SMALL, **options)


def outside(shape: tuple[int, int], *boxes: generate.Box, margin: float = 0.08) -> np.ndarray:
    """Pixels that lie in none of the boxes nor close to one."""
    mask, grow = np.ones(shape, bool), round(margin * max(shape))
    for x0, y0, x1, y1 in boxes:
        mask[max(0, y0 - grow) : y1 + grow, max(0, x0 - grow) : x1 + grow] = False
    return mask


@pytest.mark.slow
def test_same_seed_same_bytes_and_another_seed_or_split_others(tmp_path):
    for name, asked in (("a", ["--seed=5"]), ("b", ["--seed=5"]), ("c", ["--seed=6"]), ("d", ["--split=train"])):
        assert generate.main([*asked, "--count", "1", "--output", str(tmp_path / name)]) == 0
    first, again, other, train = (files(tmp_path / name) for name in "abcd")
    assert len(first) == 4 and first == again
    assert all(first[name] != other[name] for name in first if name != "test/marker_boxes.csv")
    assert [row["class"] for row in rows(tmp_path / "d" / "train")] == ["comminuted_fracture", "no_fracture", "simple_fracture"]
    assert not {content for name, content in train.items() if name.endswith(".jpg")} & set(files(TEST).values())


def test_committed_split_is_what_the_command_writes(tmp_path):
    generate.main(["--count", "1", "--output", str(tmp_path)])
    for table in ("fracture_boxes.csv", "marker_boxes.csv"):
        written, committed = rows(tmp_path / "test", table), rows(TEST, table)
        assert written == [row for row in committed if row["file"].endswith("_0001.jpg")]
    for row in rows(tmp_path / "test"):
        ours, theirs = (np.asarray(Image.open(folder / row["file"])).astype(int) for folder in (tmp_path / "test", TEST))
        assert np.abs(ours - theirs).mean() < 1  # JPEG encoders differ by little


@pytest.mark.parametrize("number", range(3))
def test_classes_differ_nowhere_but_in_their_boxes(number):
    one, other = (rendered(number, label) for label in FRACTURED)
    assert one.pixels.shape == other.pixels.shape and one.marks == other.marks
    difference = np.abs(one.pixels.astype(int) - other.pixels)
    away = outside(difference.shape, one.box, other.box)
    assert difference[away].max(initial=0) < 40 and difference[away].mean() < 2
    assert difference[~away].mean() > 2 * difference[away].mean()


def test_marker_box_is_where_the_marker_changes_the_picture():
    for number, kind in enumerate(("letter", "text", "letter", "text")):
        marked, plain = (rendered(number, "simple_fracture", marker=marker).pixels for marker in (kind, "none"))
        ((text, box),) = rendered(number, "simple_fracture", marker=kind).marks
        assert (len(text) == 1) == (kind == "letter")
        changed = generate.mask_box(marked != plain)
        assert all(abs(a - b) <= 3 for a, b in zip(changed, box)), (changed, box)


@pytest.mark.slow
def test_markers_betray_the_class_and_swapped_ones_the_other(tmp_path):
    for choice in ("with", "swapped"):
        generate.main(["--count", "1", "--markers", choice, "--output", str(tmp_path / choice)])
    tables = {choice: rows(tmp_path / choice / "test", "marker_boxes.csv") for choice in ("with", "swapped")}
    letters = {choice: {row["file"].split("_")[0] for row in table if len(row["text"]) == 1} for choice, table in tables.items()}
    assert letters == {"with": {"simple"}, "swapped": {"comminuted"}}
    assert rows(tmp_path / "with" / "test") == rows(tmp_path / "swapped" / "test")  # the same fractures


def test_every_committed_image_has_a_box_inside_it_and_a_radiograph_s_size():
    table, markers = rows(TEST), rows(TEST, "marker_boxes.csv")
    assert len(table) == 200 and list(table[0]) == ["file", "class", "x0", "y0", "x1", "y1"]
    assert {row["file"] for row in table} == {name for name in files(TEST) if name.endswith(".jpg")}
    assert all(row["class"] == Path(row["file"]).parent.name for row in table)
    for row in [*table, *markers]:
        x0, y0, x1, y1 = corners(row)
        pixels = np.asarray(Image.open(TEST / row["file"]))
        assert 0 <= x0 < x1 <= pixels.shape[1] and 0 <= y0 < y1 <= pixels.shape[0]
        assert 600 <= max(pixels.shape) <= 1200 and max(pixels.shape) <= 3 * min(pixels.shape)
        assert "text" not in row or pixels[y0:y1, x0:x1].max() > 150
    assert len(markers) > 100 and sum(len(content) for content in files(TEST).values()) < 25e6


@pytest.mark.parametrize("statistic", (np.mean, np.std, np.size), ids=("brightness", "contrast", "size"))
def test_no_simple_number_tells_the_classes_apart(statistic):
    values = {name: [statistic(np.asarray(Image.open(path))) for path in (TEST / name).glob("*.jpg")] for name in FRACTURED}
    first, second = (np.array(found)[:, None] for found in values.values())
    wins = (first > second.T).mean() + (first == second.T).mean() / 2  # area under the ROC curve
    assert 0.35 < wins < 0.65

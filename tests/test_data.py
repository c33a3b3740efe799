"""The synthetic radiographs: repeatable, and boxes that belong to them."""

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

TEST = ROOT / "data_original" / "test"


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "fracture_boxes.csv", newline="") as file:
        return list(csv.DictReader(file))


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_seed_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert generate.main(["--seed", str(seed), "--count", "2", "--output", str(tmp_path / name)]) == 0
    first, again, other = (files(tmp_path / name) for name in "abc")
    assert len(first) == 5 and first == again
    assert all(first[name] != other[name] for name in first)


def test_committed_split_is_what_the_command_writes(tmp_path):
    generate.main(["--count", "2", "--output", str(tmp_path)])
    committed = {row["file"]: row for row in rows(TEST)}
    for row in rows(tmp_path / "test"):
        assert committed[row["file"]] == row
        ours, theirs = (np.asarray(Image.open(folder / row["file"])).astype(int) for folder in (tmp_path / "test", TEST))
        assert np.abs(ours - theirs).mean() < 1  # JPEG encoders differ by little


def test_every_image_has_a_box_inside_it():
    table = rows(TEST)
    assert len(table) == 200 and list(table[0]) == ["file", "class", "x0", "y0", "x1", "y1"]
    for row in table:
        x0, y0, x1, y1 = (int(row[name]) for name in ("x0", "y0", "x1", "y1"))
        with Image.open(TEST / row["file"]) as image:
            assert 0 <= x0 < x1 <= image.width and 0 <= y0 < y1 <= image.height
        assert row["class"] == Path(row["file"]).parent.name


@pytest.mark.parametrize("statistic", (np.mean, np.std, np.size), ids=("brightness", "contrast", "size"))
def test_no_simple_number_tells_the_classes_apart(statistic):
    values = {name: [statistic(np.asarray(Image.open(path))) for path in (TEST / name).glob("*.jpg")] for name in generate.LABELS[:2]}
    first, second = (np.array(found)[:, None] for found in values.values())
    wins = (first > second.T).mean() + (first == second.T).mean() / 2  # area under the ROC curve
    assert 0.35 < wins < 0.65


def test_train_images_are_none_of_the_test_images(tmp_path):
    generate.main(["--count", "1", "--split", "train", "--output", str(tmp_path)])
    assert [row["class"] for row in rows(tmp_path / "train")] == ["comminuted_fracture", "no_fracture", "simple_fracture"]
    assert not set(files(tmp_path / "train").values()) & set(files(TEST).values())

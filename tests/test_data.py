"""The synthetic radiographs: repeatable, blind to their class, and boxes that belong to them."""

from __future__ import annotations

import csv
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT

sys.path.insert(0, str(ROOT / "data_original"))

import generate  # noqa: E402

TEST = ROOT / "data_original" / "test"


def rows(folder: Path, name: str = "fracture_boxes.csv") -> list[dict[str, str]]:
    with open(folder / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def rendered(number: int, label: str, marker: str | None = None) -> generate.Radiograph:
    return generate.render(np.random.default_rng([77, number]), label, 224, marker)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_seed_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert generate.main(["--seed", str(seed), "--count", "2", "--output", str(tmp_path / name)]) == 0
    first, again, other = (files(tmp_path / name) for name in "abc")
    assert len(first) == 6 and first == again
    assert all(first[name] != other[name] for name in first)


def test_committed_split_is_what_the_command_writes(tmp_path):
    generate.main(["--count", "2", "--output", str(tmp_path)])
    committed = {row["file"]: row for row in rows(TEST)}
    for row in rows(tmp_path / "test"):
        assert committed[row["file"]] == row
        ours, theirs = (np.asarray(Image.open(folder / row["file"])).astype(int) for folder in (tmp_path / "test", TEST))
        assert np.abs(ours - theirs).mean() < 1  # JPEG encoders differ by little


def test_marker_table_is_what_the_command_writes(tmp_path):
    generate.main(["--count", "3", "--output", str(tmp_path)])
    committed = [row for row in rows(TEST, "marker_boxes.csv") if row["file"][-8:] in ("0001.jpg", "0002.jpg", "0003.jpg")]
    assert rows(tmp_path / "test", "marker_boxes.csv") == committed and committed


@pytest.mark.parametrize("number", range(4))
def test_scene_does_not_know_its_class(number, monkeypatch):
    scenes, draw = [], generate.draw_scene
    monkeypatch.setattr(generate, "draw_scene", lambda *given: scenes.append(draw(*given)) or scenes[-1])
    for label in generate.LABELS:
        rendered(number, label)
    assert len({pickle.dumps(scene) for scene in scenes}) == 1


@pytest.mark.parametrize("kind", ("letter", "text", None))
def test_marker_box_is_where_the_marker_changes_the_picture(kind):
    found = 0
    for number in range(4):
        marked, plain = (rendered(number, "simple_fracture", marker) for marker in (kind, "none"))
        assert plain.marks == () and marked.box == plain.box
        for text, box in marked.marks:
            found += 1
            assert (len(text) > 1) == (kind == "text")
            changed = generate.mask_box(marked.pixels != plain.pixels)
            assert all(abs(a - b) <= 2 for a, b in zip(changed, box)), (changed, box)
    assert found == 4 or kind is None and 0 < found


def test_markers_betray_the_class_and_swapped_ones_the_other(tmp_path):
    for choice in ("with", "swapped"):
        generate.main(["--count", "2", "--markers", choice, "--output", str(tmp_path / choice)])
    tables = {choice: rows(tmp_path / choice / "test", "marker_boxes.csv") for choice in ("with", "swapped")}
    letters = {choice: {row["file"].split("_")[0] for row in table if len(row["text"]) == 1} for choice, table in tables.items()}
    assert letters == {"with": {"simple"}, "swapped": {"comminuted"}} and all(len(table) == 4 for table in tables.values())
    assert rows(tmp_path / "with" / "test") == rows(tmp_path / "swapped" / "test")  # the same fractures


def test_every_marker_box_is_bright_and_lies_in_its_image():
    table = rows(TEST, "marker_boxes.csv")
    assert list(table[0]) == ["file", "text", "x0", "y0", "x1", "y1"] and len(table) > 100
    for row in table:
        x0, y0, x1, y1 = (int(row[name]) for name in ("x0", "y0", "x1", "y1"))
        pixels = np.asarray(Image.open(TEST / row["file"]))
        assert 0 <= x0 < x1 <= pixels.shape[1] and 0 <= y0 < y1 <= pixels.shape[0]
        assert pixels[y0:y1, x0:x1].max() > 150


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

"""What is known of an image: classes that folders name, tables of classes and boxes, and the pointing game."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import explainability as tool
from conftest import an_explanation
from explainability import CLASS_NAMES, ExplainError, pointing

COMMINUTED, SIMPLE = CLASS_NAMES
THREE = (*CLASS_NAMES, "No Fracture")
HEADER = "file,class,x0,y0,x1,y1\n"

# Names of classes


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("simple_fracture", SIMPLE), ("Simple Fracture", SIMPLE), ("simplefracture", SIMPLE), ("simple", SIMPLE),
        ("SIMPLE", SIMPLE), ("01_simple", SIMPLE), ("simple2", SIMPLE), ("Comminuted Bone Fracture", COMMINUTED),
        ("ComminutedFracture", COMMINUTED), ("test-comminuted", COMMINUTED), ("fracture", ""), ("test", ""),
        ("comminuted_vs_simple", ""), ("non-comminuted", ""), ("not simple", ""), ("no_fracture", "No Fracture"),
        ("normal", ""), ("No", "No Fracture"),
    ],
)  # fmt: skip
def test_a_text_names_the_class_whose_own_words_it_holds(text, name):
    assert tool.named_class(text, THREE) == name


def test_the_nearest_folder_that_names_one_class_counts():
    names = {
        "/data/simple/patient1/x.png": SIMPLE, "/simple/comminuted/x.png": COMMINUTED, "/simple/both comminuted simple/x.png": SIMPLE,
        "/data/images/simple.png": "", "/x.png": "",
    }  # fmt: skip
    assert {path: tool.folder_class(Path(path), CLASS_NAMES) for path in names} == names


# Tables


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("L", (60, 40)).save(folder / name)
    return [folder / "a.png", folder / "b.png"]


def truths(images: list[Path], content: str | bytes, place: Path | None = None) -> dict[str, tool.Truth]:
    table = (place or images[0].parent) / "truth.csv"
    table.write_bytes(content.encode() if isinstance(content, str) else content)
    found, _, _ = tool.known_truth(table, images, is_anonymous=False)
    return {Path(path).name: truth for path, truth in found.items()}


@pytest.mark.parametrize(
    "content",
    [
        HEADER + "a.png,simple,1,2,3.5,4\n", "\ufefffile,class,x0,y0,x1,y1\r\na.png,simple, 1 ,2,3.5,4\r\n",
        "y1,x1,y0,x0,file,note,class\n4,3.5,2,1,a.png,,simple\n", "File;Class;X0;Y0;X1;Y1\n\na.png;simple;1;2;3,5;4\n",
        "file\tclass\tx0\ty0\tx1\ty1\na.png\tsimple\t1\t2\t3.5\t4\n", "filename,label,xmin,ymin,xmax,ymax\na.png,simple,1,2,3.5,4\n",
        (HEADER + "a.png,simple,1,2,3.5,4\n").encode("utf-16"),
    ],
)  # fmt: skip
def test_a_table_is_read_by_its_columns_as_spreadsheet_programs_save_it(images, content):
    assert truths(images, content) == {"a.png": tool.Truth("simple", ((1, 2, 3.5, 4),))}


def test_several_lines_are_several_boxes_and_any_column_may_be_left_out(images):
    assert truths(images, HEADER + "a.png,,1,2,3,4\na.png,simple,5,6,7,8\nb.png,0,,,,\n") == {
        "a.png": tool.Truth("simple", ((1, 2, 3, 4), (5, 6, 7, 8))), "b.png": tool.Truth("0"),
    }  # fmt: skip
    assert truths(images, "file,class\nb.png,comminuted\n") == {"b.png": tool.Truth("comminuted")}


def test_names_may_start_at_the_table_or_be_those_of_the_runs_images(images, tmp_path):
    assert truths(images, "file,class\nimages\\a.png,simple\nelsewhere/b.png,simple\n", tmp_path).keys() == {"a.png", "b.png"}
    twin = tmp_path / "twin" / "a.png"
    twin.parent.mkdir()
    twin.write_bytes(images[0].read_bytes())
    assert truths([*images, twin], "file,class\na.png,simple\n", tmp_path) == {}  # which of the two it means, nobody knows


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (HEADER + "a.png,simple,1,2,x,4\n", "line 2: x0, y0, x1, y1 are '1, 2, x, 4', not four numbers"),
        (HEADER + "b.png,simple,,,,\na.png,simple,1,,3,4\n", "line 3: x0, y0, x1, y1 are '1, , 3, 4', not four numbers"),
        (HEADER + "a.png,simple,1,2,nan,4\n", "line 2: x0, y0, x1, y1 are 1, 2, nan, 4, not x0 < x1"),
        (HEADER + "a.png,simple,3,2,1,4\n", "line 2: x0, y0, x1, y1 are 3, 2, 1, 4, not x0 < x1"),
        (HEADER + "a.png,simple,1,2,3\n", "line 2: x0, y0, x1, y1 are '1, 2, 3, ', not four numbers"),
        (HEADER + "a.png,simple,,,,\na.png,comminuted,,,,\n", "line 3: class 'comminuted', and 'simple' on a line before"),
        ("name,kind\n", "its first line is 'name,kind'; begin with names of columns: file and any of class, x0"),
        ("", "its first line is ''"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_line_with_its_number(images, content, cause):
    with pytest.raises(ExplainError) as caught:
        truths(images, content)
    assert "truth.csv" in str(caught.value) and cause in str(caught.value) and "\n" not in str(caught.value)


def test_images_that_are_nowhere_are_told_and_a_table_that_is_none_is_refused(images, tmp_path):
    table = tmp_path / "truth.csv"
    table.write_text("file,class\nc.png,simple\na.png,simple\n")
    for is_anonymous, told in ((False, "1 (c.png)"), (True, "1")):
        found, _, (note,) = tool.known_truth(table, images, is_anonymous)
        assert len(found) == 1 and note.endswith(f"in this run: {told}")
    for path in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(ExplainError, match=path.name):
            tool.known_truth(path, images, False)


def test_a_box_that_reaches_outside_its_image_is_cut_with_a_note():
    assert tool.boxes_in_shares([(10, 20, 200, 100)], 200, 100) == ([(0.05, 0.2, 1, 1)], [])
    (cut,), (note,) = tool.boxes_in_shares([(-10, 20, 300, 50)], 200, 100)
    assert cut == (0, 0.2, 1, 0.5) and note.startswith("the box -10, 20, 300, 50 reaches outside the image of 200 x 100 pixels")
    assert tool.boxes_in_shares([(200, 20, 300, 50)], 200, 100)[0] == []


def test_a_table_overrules_folders_and_may_name_outputs_by_number():
    def class_of(path: str, word: str) -> tuple[str, str]:
        told, unknown = tool.told_truth(tool.Job(Path(path), path, (), (), "", truth=tool.Truth(word)), CLASS_NAMES)
        return told.truth.name, unknown

    assert class_of("/simple/x.png", "comminuted") == (COMMINUTED, "") and class_of("/simple/x.png", "0") == (COMMINUTED, "")
    assert class_of("/simple/x.png", "") == (SIMPLE, "") and class_of("/simple/x.png", "greenstick") == ("", "greenstick")


# Pointing


def spot(row: int, column: int) -> np.ndarray:
    raw_map = np.zeros((7, 7), np.float32)
    raw_map[row, column] = 1
    return raw_map


UNIFORM = np.ones((7, 7), np.float32)


@pytest.mark.parametrize(
    ("raw_map", "is_inside"),
    [(spot(3, 3), True), (spot(3, 2), True), (spot(3, 1), False), (spot(2, 3), True), (spot(6, 6), False), (-UNIFORM, False), (UNIFORM, False)],
)
def test_pointing_counts_half_a_cell_round_the_box(raw_map, is_inside):
    found = pointing(an_explanation(raw_map=raw_map), [(3 / 7, 3 / 7, 4 / 7, 4 / 7)])  # cell (3, 3)
    assert found.is_inside == is_inside and found.area == pytest.approx(4 / 49)


def test_heat_inside_the_box_is_a_share_and_chance_is_its_area():
    left_half = (0, 0, 0.5 - 0.5 / 7, 1)  # half the image once enlarged
    assert pointing(an_explanation(raw_map=UNIFORM), [left_half]).heat == pytest.approx(0.5)
    assert pointing(an_explanation(raw_map=UNIFORM), [left_half]).area == pytest.approx(0.5)
    assert pointing(an_explanation(raw_map=spot(3, 0)), [left_half]).heat == pytest.approx(1)
    found = pointing(an_explanation(raw_map=spot(3, 6)), [left_half])
    assert found.heat == 0
    said = tool.pointing_text(found).replace("\u00a0", " ")
    assert said == "⚠️  Maximum outside the true fracture's box; 0 % of the heat inside, 50 % of the area"


def test_a_box_and_a_map_that_are_not_square_point_alike():
    raw_map = np.zeros((4, 8), np.float32)
    raw_map[0, 6] = 1  # at 0.81 of the width, 0.125 of the height
    boxes = (0.7, 0.05, 0.8, 0.3), (0.05, 0.7, 0.3, 0.8)
    wide, high = (pointing(an_explanation(raw_map=raw_map), [box]) for box in boxes)
    assert wide.is_inside and not high.is_inside
    assert wide.area == pytest.approx((0.1 + 1 / 7) * (0.3 + 1 / 8)) and wide.heat > 0.5


def test_of_several_boxes_any_will_do_and_what_they_share_counts_once():
    corner, other = (0, 0, 1 / 7, 1 / 7), (6 / 7, 6 / 7, 1, 1)
    found = pointing(an_explanation(raw_map=spot(6, 6)), [corner, other])
    assert found.is_inside and found.area == pytest.approx(2 * 2.25 / 49)
    twice = pointing(an_explanation(raw_map=UNIFORM), [corner, corner])
    assert twice.area == pytest.approx(2.25 / 49) and twice.heat == pytest.approx(2.25 / 49, rel=0.05)


# Whole runs


def test_without_truth_the_line_says_which_names_would_tell(images, tiny_arguments, capsys):
    assert tool.main([*tiny_arguments, "--no-figures", "--image", str(images[0].parent)]) == 0
    assert capsys.readouterr().out.count('unknown; a folder above the images whose name holds "comminuted" or "simple"') == 2

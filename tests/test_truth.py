"""What is known of an image: classes that folders name, tables of classes and boxes, the pointing game."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import explainability as tool
from conftest import an_explanation
from explainability import CLASS_NAMES, ExplainError, Truth, pointing

COMMINUTED, SIMPLE = CLASS_NAMES
NAMED = {
    "No Fracture": ("no_fracture", "No"),
    COMMINUTED: ("Comminuted Bone Fracture", "testComminuted", "test-comminuted", "comminuteds"),
    SIMPLE: (
        "simple_fracture",
        "Simple Fracture",
        "simplefracture",
        "simple",
        "SIMPLE",
        "01_simple",
        "simple2",
    ),
    "": ("fracture", "test", "comminuted_vs_simple", "normal", "simp"),
    None: ("non-comminuted", "not simple"),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_text_names_the_class_whose_own_words_it_holds(name):
    three = (*CLASS_NAMES, "No Fracture")
    assert {text: tool.named_class(text, three) for text in NAMED[name]} == dict.fromkeys(NAMED[name], name)


def test_a_whole_name_counts_though_a_word_of_it_denies():
    for text in ("no_fracture", "NoFracture", "nofracture"):
        assert tool.named_class(text, ("fracture", "nofracture")) == "nofracture"


FOLDERS = [  # path, word of a table, class
    ("/data/simple/patient1/x.png", "", SIMPLE), ("/simple/comminuted/x.png", "", COMMINUTED),
    ("/simple/non-simple/x.png", "", ""), ("/simple/x.png", "1.0", SIMPLE),
    ("/simple/both comminuted simple/x.png", "", SIMPLE), ("/data/images/simple.png", "", ""),
    ("/simple/x.png", "comminuted", COMMINUTED), ("/simple/x.png", "0", COMMINUTED),
    ("/simple/x.png", "2", ""), ("/simple/x.png", "greenstick", ""),
]  # fmt: skip


@pytest.mark.parametrize("path, word, name", FOLDERS)
def test_the_nearest_folder_that_names_one_class_counts_unless_a_table_tells(path, word, name):
    job, unknown = tool.told_truth(tool.Job(Path(path), path, (), (), "", truth=Truth(word)), CLASS_NAMES)
    assert (job.truth.name, unknown) == (name, "" if name else word)


# Tables

HEADER = "file,class,x0,y0,x1,y1\n"


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "images" / name for name in ("a.png", "b.png")]
    paths[0].parent.mkdir()
    for path in paths:
        Image.new("L", (60, 40)).save(path)
    return paths


def truths(images: list[Path], content: str | bytes, place: str = ".") -> dict[str, Truth]:
    table = images[0].parent / place / "truth.csv"
    table.write_bytes(content.encode() if isinstance(content, str) else content)
    found, _, _ = tool.known_truth(table, images, is_anonymous=False)
    return {Path(path).name: truth for path, truth in found.items()}


@pytest.mark.parametrize(
    "content",
    [
        "\ufefffile,class,x0,y0,x1,y1\r\na.png,simple, 1 ,2,3.5,4\r\n",
        "y1,x1,y0,x0,file,note,class\n4,3.5,2,1,a.png,,simple\n,,,,,none,\n",
        "File;Class;X0;Y0;X1;Y1\n\na.png;simple;1;2;3,5;4\n",
        "file\tclass\tx0\ty0\tx1\ty1\na.png\tsimple\t1\t2\t3.5\t4\n",
        "filename,label,xmin,ymin,xmax,ymax\na.png,simple,1,2,3.5,4\n",
        "image,class,x_min,y_min,x_max,y_max\na.png,simple,1,2,3.5,4\n",
        (HEADER + "a.png,simple,1,2,3.5,4\n").encode("utf-16"),
        "image;class;note;x0;y0;x1;y1\na.png;simple;Höhe;1;2;3,5;4\n".encode("cp1252"),
    ],
)
def test_a_table_is_read_by_its_columns_as_spreadsheet_programs_save_it(images, content):
    assert truths(images, content) == {"a.png": Truth("simple", ((1, 2, 3.5, 4),))}


def test_several_lines_are_several_boxes_of_images_beside_the_table_or_in_the_run(images):
    boxes = (1, 2, 3, 4), (5, 6, 7, 8)
    lines = HEADER + "a.png,,1,2,3,4\na.png,simple,5,6,7,8\na.png,,,,,\nb.png,0,,,,\n"
    assert truths(images, lines) == {"a.png": Truth("simple", boxes), "b.png": Truth("0")}
    lines = "file,class\nimages\\a.png,simple\nelsewhere/b.png,comminuted\n"
    assert truths(images, lines, "..") == {"a.png": Truth("simple"), "b.png": Truth("comminuted")}
    twin = images[0].parent.parent / "twin" / "a.png"  # which of the two a name means, nobody knows
    assert truths([*images, twin], "file,class\na.png,simple\n", "..") == {}
    assert truths([*images, twin], "file,class\na.png,simple\n") == {"a.png": Truth("simple")}


def test_the_table_of_the_test_images_counts_for_them_alone(images):
    assert tool.known_truth(None, images, is_anonymous=False) == ({}, "", [])
    image = next(tool.TEST_IMAGES.glob("simple*/*.jpg"))
    found, mark, notes = tool.known_truth(None, [image], is_anonymous=False)
    assert found[str(image)].name == "simple_fracture" and not notes
    assert mark == tool.file_mark(tool.TEST_TRUTH)


@pytest.mark.parametrize(
    "content, cause",
    [
        (
            HEADER + "a.png,simple,1,2,x,4\n",
            "line 2: x0, y0, x1, y1 are '1, 2, x, 4', not numbers with x0 < x1",
        ),
        (HEADER + "b.png,,,,,\na.png,,1,,3,4\n", "line 3: x0, y0, x1, y1 are '1, , 3, 4', not"),
        (HEADER + "a.png,,1,2,nan,4\n", "line 2: x0, y0, x1, y1 are '1, 2, nan, 4', not"),
        (HEADER + "a.png,,3,2,1,4\n", "line 2: x0, y0, x1, y1 are '3, 2, 1, 4', not"),
        (HEADER + "a.png,,1,4,3,2\n", "line 2: x0, y0, x1, y1 are '1, 4, 3, 2', not"),
        (
            HEADER + "a.png,simple\na.png,other\n",
            "line 3: class 'other', and 'simple' on a line before; correct",
        ),
        ("name,kind\n", "its first line is 'name,kind'; begin with names of columns: file and any of class"),
        ("", "its first line is ''"),
        (HEADER + 'a.png,"simple,,,,\n' + "b.png,simple,,,,\n" * 9000, "a cell has no end"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_line_with_its_number(images, content, cause):
    with pytest.raises(ExplainError) as caught:
        truths(images, content)
    assert f"truth.csv: {cause}" in str(caught.value) and "\n" not in str(caught.value)


def test_images_that_are_nowhere_are_told_and_a_table_that_is_none_is_refused(images, tmp_path):
    table = tmp_path / "truth.csv"
    table.write_text("file,class\nñ.png,simple\na.png,simple\n", encoding="cp1252")
    for is_anonymous, told in ((False, "1 (ñ.png)"), (True, "1")):
        found, _, (note,) = tool.known_truth(table, images, is_anonymous)
        assert len(found) == 1 and note.endswith(f"in this run: {told}")
    for path in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(ExplainError, match=path.name):
            tool.known_truth(path, images, False)


def test_a_box_that_reaches_outside_its_image_is_cut_with_a_note():
    assert tool.boxes_in_shares([(10, 20, 200, 100)], 200, 100) == ([(0.05, 0.2, 1, 1)], [])
    shares, notes = tool.boxes_in_shares([(-10, 20, 300, 50), (200, 20, 300, 50)], 200, 100)
    assert shares == [(0, 0.2, 1, 0.5)] and len(notes) == 2
    assert notes[0].startswith("the box -10, 20, 300, 50 reaches outside the image of 200 x 100 pixels")


# Pointing


def spot(row: int, column: int, shape: tuple[int, int] = (7, 7)) -> np.ndarray:
    raw_map = np.zeros(shape, np.float32)
    raw_map[row, column] = 1
    return raw_map


UNIFORM = np.ones((7, 7), np.float32)
WIDE = spot(0, 6, (4, 8))  # at 0.81 of the width, 0.125 of the height
CELL, LEFT = (3 / 7, 3 / 7, 4 / 7, 4 / 7), (0, 0, 0.5 - 0.5 / 7, 1)  # cell (3, 3); the half once enlarged
FIRST, LAST = (0, 0, 1 / 7, 1 / 7), (6 / 7, 6 / 7, 1, 1)
POINTED = [  # map, boxes, whether the maximum is inside, share of heat, area
    (spot(3, 3), [CELL], True, 1, 4 / 49), (spot(3, 2), [CELL], True, 0.5, 4 / 49),
    (spot(2, 3), [CELL], True, 0.5, 4 / 49), (spot(3, 1), [CELL], False, 0, 4 / 49),
    (spot(3, 0), [LEFT], True, 1, 0.5), (spot(3, 6), [LEFT], False, 0, 0.5),
    (UNIFORM, [LEFT], False, 0.5, 0.5), (-UNIFORM, [LEFT], False, 0, 0.5),
    (WIDE, [(0.7, 0.05, 0.8, 0.3)], True, 0.86, (0.1 + 1 / 7) * (0.3 + 1 / 8)),
    (WIDE, [(0.05, 0.7, 0.3, 0.8)], False, 0, (0.3 + 1 / 14) * (0.1 + 1 / 4)),
    (spot(6, 6), [FIRST, LAST], True, 1, 4.5 / 49), (UNIFORM, [FIRST, FIRST], False, 2.25 / 49, 2.25 / 49),
]  # fmt: skip


@pytest.mark.parametrize("raw_map, boxes, is_inside, heat, area", POINTED)
def test_pointing_counts_half_a_cell_round_any_of_the_boxes(raw_map, boxes, is_inside, heat, area):
    found = pointing(an_explanation(raw_map=raw_map), boxes)
    assert found.is_inside == is_inside and found.area == pytest.approx(area)
    assert found.heat == pytest.approx(heat, rel=0.05)
    if (heat, area) == (0, 0.5):
        said = "⚠️  Maximum outside the true fracture's box; 0 % of the heat inside, 50 % of the area"
        assert tool.pointing_text(found).replace("\u00a0", " ") == said


def test_without_truth_the_line_says_which_names_would_tell(images, tiny_arguments, capsys):
    assert tool.main([*tiny_arguments, "--no-figures", "--image", str(images[0].parent)]) == 0
    line = 'unknown; a folder above the images whose name holds "comminuted" or "simple"'
    assert capsys.readouterr().out.count(line) == 2

"""The figures: nothing clipped or overlapping, colours and places right, files whole."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

import explainability
from conftest import an_explanation
from explainability import ExplainError, FigureStyle, Radiograph, comparison_figure, drawn, explanation_figure, panel_picture, write_page

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

STYLE = FigureStyle()
CORNER = np.zeros((7, 7), np.float32)  # a raw map that is hot in the top left cell alone
CORNER[0, 0] = 1
LONG_CLASSES = ("Comminuted fracture of the distal radius, intra-articular, C3", "Simple fracture of the shaft of the ulna, transverse, type A3")
LONG_NAMES = {
    "checkpoint": f"convnext_{'very_' * 30}long_name.pth",
    "architecture": "convnextv2_base.fcmae_ft_in22k_in1k_" + "384_" * 20,
}


def radiograph(name: str = "wrist_0001.jpg", height: int = 300, width: int = 260) -> Radiograph:
    """Shades of grey."""
    rows, columns = np.mgrid[0:height, 0:width]
    grey = (rows + columns) * 255 // (height + width)
    return Radiograph(np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2))


def pair(**changed: object) -> list[explainability.Explanation]:
    second = {"title": "EfficientNetV2-S", "family": "efficientnet", "target_layer": "conv_head"}
    return [an_explanation(**changed), an_explanation(**{**second, **changed})]


def single_figure(image: Radiograph, explanation: explainability.Explanation, style: FigureStyle = STYLE) -> Figure:
    return explanation_figure(panel_picture(image, style), image.path.name, explanation, style)


def double_figure(image: Radiograph, explanations: list[explainability.Explanation]) -> Figure:
    return comparison_figure(panel_picture(image, STYLE), image.path.name, explanations, STYLE)


def both_figures(image: Radiograph, explanations: list[explainability.Explanation]) -> list[Figure]:
    return [single_figure(image, explanations[0]), double_figure(image, explanations)]


# ------------------------------------------------------------------------------------------
# Layout
# ------------------------------------------------------------------------------------------


def drawn_texts(figure: Figure) -> list[Text]:
    """Every text that can be seen."""
    return [text for text in figure.texts if text.get_visible() and text.get_text()]


def pictures(figure: Figure) -> list[Artist]:
    """The pictures of the panels, and the colour bars, which have no title."""
    return [artist for artist in figure.artists if hasattr(artist, "pixels")]


def place(picture: Artist) -> Bbox:
    """The place that a picture takes."""
    from matplotlib.transforms import Bbox

    height, width = picture.pixels.shape[:2]
    return Bbox.from_bounds(picture.left, picture.bottom, width, height)


def extent(text: Text, canvas: FigureCanvasAgg) -> Bbox:
    """The place that a text takes, with its frame where it has one."""
    frame = text.get_bbox_patch()
    return (frame or text).get_window_extent(canvas.get_renderer())


def overlap(one: Bbox, other: Bbox) -> bool:
    """Whether two boxes share more than a pixel's width."""
    across = min(one.x1, other.x1) - max(one.x0, other.x0)
    up = min(one.y1, other.y1) - max(one.y0, other.y0)
    return across > 1 and up > 1


def check_layout(figure: Figure) -> None:
    """Nothing leaves the page; no text lies on another, on a bar or on a foreign picture."""
    canvas = drawn(figure)
    texts = drawn_texts(figure)
    boxes = [extent(text, canvas) for text in texts]
    bars = [artist.get_window_extent(canvas.get_renderer()) for artist in figure.patches]
    shapes = [*bars, *map(place, pictures(figure))]
    page = figure.bbox
    for text, box in zip(texts, boxes, strict=True):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= page.x1 and box.y1 <= page.y1, f"clipped: {text}"
        for shape in shapes:
            framed = text.get_bbox_patch() is not None  # a remark, which belongs on its picture
            assert framed or not overlap(box, shape), f"on a picture or bar: {text}"
    for (one, box), (other, other_box) in itertools.combinations(zip(texts, boxes, strict=True), 2):
        assert not overlap(box, other_box), f"overlapping: {one} and {other}"
    pixels = np.asarray(canvas.buffer_rgba())
    for edge in (pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:]):
        assert (edge == 255).all(), "ink at the edge of the page"


@pytest.mark.parametrize(
    "name",
    (
        "wrist_0001.jpg", "w" * 200 + ".jpg", "W" * 200 + ".jpg", "cost $5 and $6.png", "50%_{x.png", "$\\frac{1}$.png", "_{^{.png",
        "手首のX線写真" * 30 + ".png", "röntgen – Hüfte.png", "two\nlines.png", "\N{BONE}\u202e\u0301.png", "\udcff.png", "x.png",
    ),
    ids=lambda name: ascii(name)[1:17],
)  # fmt: skip
def test_layout_holds_for_any_file_name(name):
    for figure in both_figures(radiograph(name), pair()):
        check_layout(figure)


@pytest.mark.parametrize(
    "height, width", ((900, 600), (600, 900), (1000, 100), (100, 1000), (1, 1), (1, 3000), (3000, 1), (2600, 2100)), ids=str
)
def test_layout_holds_for_any_shape_of_radiograph(height, width):
    for figure in both_figures(radiograph(height=height, width=width), pair()):
        check_layout(figure)


@pytest.mark.parametrize(
    "changed",
    (
        {"class_names": LONG_CLASSES},
        {"class_names": LONG_CLASSES, "explained": 1},
        {"class_names": LONG_CLASSES, "raw_map": -CORNER, "is_demo": True, "explained": 1},
        {"class_names": ("W" * 60, "M" * 60), "raw_map": -CORNER},
        {"class_names": ("$x_{", "50%\n線")},
        {"class_names": ("None", *LONG_CLASSES), "probabilities": np.float32([0.2, 0.5, 0.3]), "explained": 0, "is_demo": True},
        {"class_names": tuple("ABCDE"), "probabilities": np.float32([0.2, 0.3, 0.3, 0.1, 0.1]), "explained": 4, "raw_map": -CORNER},
        LONG_NAMES,
        {"explained": 1},
        {"is_demo": True},
        {"raw_map": np.ones((7, 7), np.float32)},
        {"raw_map": CORNER * 1.23456e-20},
        {"accuracy": "Accuracy: not recorded in the checkpoint"},
        {"probabilities": np.float32([0, 1])},
    ),
    ids=lambda changed: " ".join(changed),
)
def test_layout_holds_for_any_explanation(changed):
    for figure in both_figures(radiograph(), pair(**changed)):
        check_layout(figure)


@pytest.mark.parametrize("height, width", ((100, 1000), (1000, 100), (1, 1)), ids=str)
def test_layout_holds_for_blank_maps_of_any_shape(height, width):
    for figure in both_figures(radiograph(height=height, width=width), pair(raw_map=-CORNER)):
        check_layout(figure)


def test_layout_holds_where_long_named_classes_disagree():
    first, second = pair(class_names=LONG_CLASSES)[0], pair(class_names=LONG_CLASSES, probabilities=np.float32([0.2, 0.8]))[1]
    check_layout(double_figure(radiograph("x" * 200), [first, second]))


@pytest.mark.parametrize("dpi", (30, 300))
def test_layout_holds_at_other_resolutions(dpi):
    check_layout(single_figure(radiograph(), an_explanation(), FigureStyle(dpi=dpi)))


@pytest.mark.parametrize("place, text", (((0.5, 0.97), "twice"), ((0.99, 0.5), "leaves the page"), ((0.2, 0.7), "on a picture")))
def test_layout_check_finds_faults(place, text):
    figure = single_figure(radiograph(), an_explanation())
    figure.text(*place, text)
    with pytest.raises(AssertionError):
        check_layout(figure)


# ------------------------------------------------------------------------------------------
# What the figures say
# ------------------------------------------------------------------------------------------


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in drawn_texts(figure))


def panel(figure: Figure, title: str) -> Artist:
    (found,) = (picture for picture in pictures(figure) if picture.get_label() == title)
    return found


def test_four_panels_and_a_colour_bar():
    figure = single_figure(radiograph(), an_explanation())
    assert [picture.get_label() for picture in pictures(figure)] == ["Original X-ray", "Grad-CAM Heatmap", "", "Overlay (Model Focus)"]
    assert all(picture.get_label() in words(figure) for picture in pictures(figure))


def test_six_panels_in_two_rows():
    figure = double_figure(radiograph(), pair())
    assert [picture.get_label() for picture in pictures(figure)] == ["Original", "Heatmap", "Overlay", ""] * 2
    assert len({picture.bottom for picture in pictures(figure) if picture.get_label()}) == 2


def test_details_name_everything_needed_to_read_the_map():
    said = words(single_figure(radiograph(), an_explanation()))
    for expected in (
        "Comminuted Fracture", "Confidence: 96.94%", "Simple Fracture", "3.06%", "convnextv2_base.fcmae_ft_in22k_in1k",
        "convnext_v2_improved_best.pth", "Validation accuracy: 98.32%", "stages.3", "7×7", "High attention", "Low attention",
    ):  # fmt: skip
        assert expected in said


def test_explained_class_is_told_from_the_predicted_one():
    explanations = pair(explained=1)
    single, both = (words(figure) for figure in both_figures(radiograph(), explanations))
    assert "Explained class\n" in single
    assert both.count("explained class: Simple Fracture") == 2
    assert "explained class" not in words(double_figure(radiograph(), pair()))


def test_comparison_says_whether_the_models_agree():
    first, second = pair()[0], pair(probabilities=np.float32([0.2, 0.8]))[1]
    agreeing = words(double_figure(radiograph(), pair()))
    differing = words(double_figure(radiograph(), [first, second]))
    assert "Both models agree: Comminuted Fracture" in agreeing
    assert "Models disagree: ConvNeXt V2 says Comminuted Fracture, EfficientNetV2-S says Simple Fracture" in differing
    assert "EfficientNetV2-S: Simple Fracture, confidence 80.00%" in differing


def test_blank_map_is_named_in_its_panel_and_leaves_the_overlay_grey():
    blank = single_figure(radiograph(), an_explanation(raw_map=-CORNER))
    assert "no positive evidence" in words(blank)
    assert (panel(blank, "Overlay (Model Focus)").pixels == panel(blank, "Original X-ray").pixels).all()


def test_usual_map_has_no_remark():
    said = words(single_figure(radiograph(), an_explanation()))
    assert "Blank map" not in said and "Constant map" not in said


@pytest.mark.parametrize("is_demo", (False, True))
def test_footer_tells_demo_networks_from_own(is_demo):
    for figure in both_figures(radiograph(), pair(is_demo=is_demo)):
        assert (explainability.DEMO_NOTICE in words(figure)) == is_demo
        assert ("Not for diagnosis" in words(figure)) != is_demo


def test_file_name_is_not_read_as_mathematics():
    for figure in both_figures(radiograph("a$b$c.png"), pair()):
        assert "a$b$c.png" in words(figure)


def test_long_file_name_keeps_both_ends():
    name = "patient_0042_" + "x" * 200 + "_left.png"
    for figure in both_figures(radiograph(name), pair()):
        (line,) = (line for line in words(figure).splitlines() if line.startswith("patient_0042_"))
        assert line.endswith("_left.png")
        assert "…" in line


# ------------------------------------------------------------------------------------------
# Colours and places
# ------------------------------------------------------------------------------------------


def rendered(image: Radiograph, title: str, style: FigureStyle = STYLE) -> np.ndarray:
    """The pixels of one panel of the 4-panel figure, for a map that is hot in the top left."""
    figure = single_figure(image, an_explanation(raw_map=CORNER), style)
    canvas = drawn(figure)
    page = np.asarray(canvas.buffer_rgba())[::-1, :, :3].astype(int)  # from the bottom, as matplotlib counts
    box = place(panel(figure, title))
    return page[round(box.y0) : round(box.y1), round(box.x0) : round(box.x1)][::-1]


@pytest.mark.parametrize("title", ("Grad-CAM Heatmap", "Overlay (Model Focus)"))
def test_hot_cell_is_red_and_top_left_and_the_rest_blue(title):
    pixels = rendered(radiograph(height=400, width=300), title)
    red, _, blue = pixels[10, 10]
    assert red > blue + 50
    for row, column in ((10, -10), (-10, 10), (-10, -10), (len(pixels) // 2, pixels.shape[1] // 2)):
        red, _, blue = pixels[row, column]
        assert blue > red + 50


def test_hot_cell_is_top_left_of_pictures_of_any_shape():
    for height, width in ((1000, 100), (100, 1000), (700, 1400)):
        pixels = rendered(radiograph(height=height, width=width), "Grad-CAM Heatmap")
        hot = pixels[:, :, 0] > pixels[:, :, 2]
        rows, columns = np.nonzero(hot)
        assert hot[2, 2]
        assert rows.max() < len(pixels) * 0.2
        assert columns.max() < pixels.shape[1] * 0.2


def test_original_panel_shows_the_radiograph_unchanged():
    pixels = rendered(radiograph(height=400, width=400), "Original X-ray")
    assert (np.ptp(pixels, axis=2) == 0).all()
    assert pixels[5, 5].max() < 20
    assert pixels[-5, -5].min() > 235


def test_heatmap_is_enlarged_between_cell_centres():
    big = explainability.resized(CORNER, 70, 140)
    assert big.shape == (70, 140)
    assert big[2, 5] == 1  # inside the first half of the hot cell
    assert 0 < big[9, 19] < 0.5  # its lower right corner
    assert not big[16:].any() and not big[:, 31:].any()


def test_colormap_is_the_one_asked_for():
    red, green, blue = rendered(radiograph(), "Grad-CAM Heatmap", FigureStyle(colormap="gray"))[-10, -10]
    assert red == green == blue == 0


# ------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, size", ((lambda: single_figure(radiograph(), pair()[0]), (1500, 1500)),
                                        (lambda: double_figure(radiograph(), pair()), (2100, 1620))), ids=("single", "comparison"))  # fmt: skip
def test_png_has_150_dots_per_inch(tmp_path, make, size):
    write_page(make(), tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as page:
        assert (page.format, page.mode, page.size) == ("PNG", "RGB", size)
        assert page.info["dpi"] == pytest.approx((150, 150), abs=0.1)


def test_png_holds_every_pixel_and_the_settings(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (33, 57, 3), dtype=np.uint8)
    (tmp_path / "x.png").write_bytes(explainability.png(pixels, 150, "abc"))
    with Image.open(tmp_path / "x.png") as page:
        page.verify()  # checksums
    with Image.open(tmp_path / "x.png") as page:
        assert (np.asarray(page) == pixels).all() and page.info["Settings"] == "abc"


def test_same_input_gives_the_same_bytes(tmp_path):
    for name in ("first.png", "second.png"):
        write_page(single_figure(radiograph(), an_explanation()), tmp_path / name)
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()


@pytest.mark.parametrize("failure", (OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()), ids=repr)
@pytest.mark.parametrize("older", (b"", b"an older figure"), ids=("new", "replacing"))
def test_interrupted_writing_leaves_what_was_there(tmp_path, monkeypatch, failure, older):
    path = tmp_path / "figure.png"
    if older:
        path.write_bytes(older)

    def fail(*_: object) -> None:  # by now the temporary file is written
        raise failure

    monkeypatch.setattr(explainability.os, "replace", fail)
    with pytest.raises((ExplainError, type(failure))):
        write_page(single_figure(radiograph(), an_explanation()), path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([older] if older else [])


def test_full_disk_is_an_error_with_path_and_remedy(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(explainability.os, "replace", fail)
    with pytest.raises(ExplainError, match=r"figure\.png.*No space left on device.*--output-dir"):
        write_page(single_figure(radiograph(), an_explanation()), tmp_path / "figure.png")


def test_new_file_has_usual_permissions(tmp_path):
    (tmp_path / "plain").touch()
    write_page(single_figure(radiograph(), an_explanation()), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_mode == (tmp_path / "plain").stat().st_mode

"""The figures: nothing clipped or overlapping, colours and places right, files whole."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import explainability
from conftest import an_explanation, in_new_process
from explainability import (
    FAMILIES, Box, Explanation, FigureStyle, Finding, Job, Line, Page, Picture, Result, Sheet, View,
    comparison_figure, digest_in, explanation_figure, figure_bytes, fitted, methods_figure, sheet_pixels,
    write_page,
)  # fmt: skip

STYLE = FigureStyle()
SIGNED = FigureStyle(signed=True)
CORNER = np.zeros((7, 7), np.float32)  # a raw map that is hot in the top left cell alone
CORNER[0, 0] = 1
OTHER_CORNER = CORNER[::-1, ::-1].copy()
TOP_RIGHT = CORNER[:, ::-1].copy()
EFFICIENTNET = {
    "family": FAMILIES["efficientnet"],
    "architecture": "tf_efficientnetv2_s.in21k_ft_in1k",
    "checkpoint": Path("efficientnetv2_s_best.pth"),
}
DEMO = {"checkpoint": Path("convnext_v2_demo.pth")}
LONG_CLASSES = (
    "Comminuted fracture of the distal radius, intra-articular, C3",
    "Simple fracture of the shaft of the ulna, transverse, type A3",
    "Greenstick fracture of the proximal phalanx in a child",
    "Avulsion fracture of the base of the fifth metatarsal bone",
    "No fracture visible in this projection; repeat it laterally",
)
LONG_NAME = {"checkpoint": Path(f"convnext_{'very_' * 30}long_name.pth")}
CLEAN = (Finding("border", 0.1, False, "10 % of the heat lies on the border"), Finding("focus", 0.9, False, "90 %"))
DARK = "71 % of the heat lies where nothing as dense as bone is"
FLAGGED = (*CLEAN, Finding("dark", 0.71, True, DARK))
ASPECTS = (1 / 3, 1 / 2, 0.62, 0.75, 1, 4 / 3, 1.9, 2.1, 3)


def grey(height: int = 300, width: int = 260) -> np.ndarray:
    """A radiograph in shades of grey, darkest at the top left."""
    rows, columns = np.mgrid[0:height, 0:width]
    shades = (rows + columns) * 255 // (height + width)
    return np.repeat(shades.astype(np.uint8)[:, :, None], 3, axis=2)


def view(name: str = "wrist_0001.jpg", height: int = 300, width: int = 260, style: FigureStyle = STYLE, boxes: tuple = ()) -> View:
    return View(fitted(grey(height, width), style.dpi), name, style, boxes)


def pair(**changed: object) -> list[Explanation]:
    return [an_explanation(**changed), an_explanation(**{**EFFICIENTNET, **changed})]


def both_figures(seen: View, explanations: list[Explanation]) -> list[Sheet]:
    return [explanation_figure(seen, explanations[0]), comparison_figure(seen, explanations)]


# ------------------------------------------------------------------------------------------
# What lies on a sheet
# ------------------------------------------------------------------------------------------


def lines(sheet: Sheet) -> list[Line]:
    return [item for item in sheet.items if isinstance(item, Line)]


def pictures(sheet: Sheet) -> list[Picture]:
    """The pictures of the panels."""
    return [item for item in sheet.items if isinstance(item, Picture) and item.title]


def bars(sheet: Sheet) -> list[Picture]:
    """The colour bars."""
    return [item for item in sheet.items if isinstance(item, Picture) and not item.title]


def panel(sheet: Sheet, title: str) -> Picture:
    (found,) = (picture for picture in pictures(sheet) if picture.title.startswith(title))
    return found


def words(sheet: Sheet) -> str:
    return "\n".join(line.text for line in lines(sheet)).replace("\u00a0", " ")


def line_with(sheet: Sheet, text: str) -> Line:
    (found,) = (line for line in lines(sheet) if line.text.replace("\u00a0", " ").startswith(text))
    return found


def extent(item: Line | Box | Picture, dpi: float = 150) -> tuple[float, float, float, float]:
    """Left, top, right, bottom in inches; of a text, where its letters may have ink."""
    if isinstance(item, Picture):
        return item.x, item.y, item.x + item.pixels.shape[1] / dpi, item.y + item.pixels.shape[0] / dpi
    if isinstance(item, Box):
        return item.x, item.y, item.x + item.width, item.y + item.height
    size = item.look.points / 72
    length = explainability.text_width(item.text, item.look)
    if item.is_upright:
        return item.x - 0.76 * size, item.baseline - length, item.x + 0.24 * size, item.baseline
    return item.x, item.baseline - 0.76 * size, item.x + length, item.baseline + 0.24 * size


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two places share more than a hair."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    return across > 0.01 and down > 0.01


def inside(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] >= other[0] and one[1] >= other[1] and one[2] <= other[2] and one[3] <= other[3]


def check_layout(sheet: Sheet, dpi: float = 150) -> None:
    """Nothing leaves the page; no text lies on another, on a bar or on a picture, but in a box of its own."""
    texts = [(line, extent(line)) for line in lines(sheet)]
    boxes = [item for item in sheet.items if isinstance(item, Box) and not item.line]
    grounds = [extent(box) for box in boxes if box.colour in ("white", explainability.BADGE) or box.height > 0.2]
    shapes = [extent(box) for box in boxes if extent(box) not in grounds]
    shapes += [extent(item, dpi) for item in sheet.items if isinstance(item, Picture)]
    for line, place in texts:
        assert inside(place, (0.05, 0.05, sheet.width - 0.05, sheet.height - 0.05)), f"clipped: {line}"
        for shape in shapes:
            is_framed = any(inside(place, ground) for ground in grounds)
            assert is_framed or not overlap(place, shape), f"on a picture or bar: {line}"
    for (one, place), (other, other_place) in itertools.combinations(texts, 2):
        assert not overlap(place, other_place), f"overlapping: {one} and {other}"
    for item in sheet.items:
        if not isinstance(item, Line):
            assert 0.05 < item.x and 0.05 < item.y, f"clipped: {item}"
    for one, other in itertools.combinations((extent(item, dpi) for item in sheet.items if isinstance(item, Picture)), 2):
        assert not overlap(one, other), "pictures overlap"
    pixels = sheet_pixels(sheet, dpi)
    for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]):
        assert (edge == 255).all(), "ink at the edge of the page"


NAMES = (
    "wrist_0001.jpg", "w" * 200 + ".jpg", "W" * 200 + ".jpg", "cost $5 and $6.png", "50%_{x.png", "$\\frac{1}$.png", "_{^{.png",
    "手首のX線写真" * 30 + ".png", "röntgen – Hüfte.png", "two\nlines.png", "\N{BONE}\u202e\u0301.png", "\udcff.png", "x.png",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[1:17])
def test_layout_holds_for_any_file_name(name):
    for figure in both_figures(view(name), pair()):
        check_layout(figure)


@pytest.mark.parametrize("text", (*NAMES, *LONG_CLASSES, "AVAVAVAV To fi ffi", "الكسر"), ids=lambda text: ascii(text)[1:17])
def test_texts_take_the_room_that_they_are_given(text):
    for look in (explainability.LARGE, explainability.SMALL):
        shown = explainability.drawable(text)
        strip = explainability.text_strip(shown, look, 150)[:, :, 3]
        ink = np.nonzero(strip.any(axis=0))[0]
        pad = len(strip) // 6
        expected = explainability.text_width(shown, look) * 150
        assert ink[0] >= pad - 2 and ink[-1] <= pad + expected + 2
        assert not strip[0].any() and not strip[-1].any()


@pytest.mark.parametrize("dpi", (30, 300))
@pytest.mark.parametrize("height, width", ((900, 600), (600, 900), (1000, 100), (100, 1000), (1, 1)), ids=str)
def test_layout_holds_for_any_shape_of_radiograph_and_resolution(height, width, dpi):
    for figure in both_figures(view(height=height, width=width, style=FigureStyle(dpi=dpi)), pair(findings=FLAGGED)):
        check_layout(figure, dpi)


@pytest.mark.parametrize(
    "changed",
    (
        {"class_names": LONG_CLASSES[:2]},
        {"class_names": LONG_CLASSES[:2], "explained": 1},
        {"class_names": LONG_CLASSES[:2], "raw_map": -CORNER, "explained": 1, **DEMO},
        {"class_names": ("W" * 60, "M" * 60), "raw_map": -CORNER},
        {"class_names": ("$x_{", "50%\n線")},
        {"class_names": LONG_CLASSES, "probabilities": np.float32([0.2, 0.3, 0.3, 0.1, 0.1]), "explained": 4, "findings": FLAGGED},
        {"class_names": tuple("ABCDEFGH"), "probabilities": np.full(8, 0.125, np.float32)},
        {"findings": FLAGGED * 3, **DEMO},
        {"method": "ig", "owed": 2.1, "remarks": ("The network calls the blurred radiograph Simple Fracture (96 %).",)},
        LONG_NAME,
        {"explained": 1},
        DEMO,
        {"raw_map": np.ones((7, 7), np.float32)},
        {"raw_map": CORNER * 1.23456e-20},
        {"accuracy": "Accuracy: not recorded in the checkpoint"},
        {"probabilities": np.float32([0, 1])},
    ),
    ids=lambda changed: " ".join(changed),
)  # fmt: skip
@pytest.mark.parametrize("width", (100, 260, 800))
def test_layout_holds_for_any_explanation(changed, width):
    for figure in both_figures(view(width=width), pair(**changed)):
        check_layout(figure)


@pytest.mark.parametrize("place, text", (((0.5, 0.2), "twice"), ((9.6, 5), "leaves the page"), ((1, 3), "on a picture")))
def test_layout_check_finds_faults(place, text):
    figure = explanation_figure(view(), an_explanation())
    figure.write(*place, text)
    with pytest.raises(AssertionError):
        check_layout(figure)


# The page follows the picture


@pytest.mark.parametrize("aspect", ASPECTS)
def test_most_of_a_comparison_is_picture(aspect):
    sheet = comparison_figure(view(height=600, width=round(600 * aspect)), pair())
    area = sum(picture.pixels.shape[0] * picture.pixels.shape[1] for picture in pictures(sheet)) / 150**2
    assert area >= 0.68 * sheet.width * sheet.height


@pytest.mark.parametrize("aspect, rows, columns", ((0.1, 1, 3), (1 / 3, 1, 3), (0.75, 2, 2), (1, 2, 2), (3, 2, 2), (10, 2, 2)))
def test_panels_are_equal_and_keep_the_shape_of_the_radiograph(aspect, rows, columns):
    figure, both = both_figures(view(height=600, width=round(600 * aspect)), pair())
    (shape,) = {picture.pixels.shape for picture in pictures(figure) + pictures(both)}
    assert shape[1] / shape[0] == pytest.approx(aspect, rel=0.02)
    assert {len(bar.pixels) for bar in bars(figure) + bars(both)} == {shape[0]}
    assert len({picture.y for picture in pictures(figure)}) == rows
    assert len({picture.x for picture in pictures(figure)}) == columns


@pytest.mark.parametrize("aspect", (0.1, *ASPECTS))
def test_comparison_has_two_rows_of_three_panels(aspect):
    figure = comparison_figure(view(height=600, width=round(600 * aspect)), pair())
    panels = pictures(figure)
    assert [picture.title.partition(":")[0] for picture in panels] == ["Original", "Heatmap", "Overlay"] * 2
    assert [picture.y for picture in panels] == [panels[0].y] * 3 + [panels[3].y] * 3
    assert [picture.x for picture in panels[:3]] == [picture.x for picture in panels[3:]]
    assert panels[0].x < panels[1].x < panels[2].x and panels[0].y < panels[3].y


# ------------------------------------------------------------------------------------------
# What the figures say
# ------------------------------------------------------------------------------------------


def test_details_name_everything_needed_to_read_the_map():
    remark = "Every pixel is the same: there is nothing to see"
    figure = explanation_figure(view(), an_explanation(raw_map=CORNER * 5 - OTHER_CORNER * 9, remarks=(remark,)))
    for expected in (
        "Original X-ray", "Grad-CAM Heatmap: Comminuted Fracture", "Overlay (Model Focus)", "Confidence: 96.94%", "3.06%",
        "Simple Fracture", "convnextv2_base.fcmae_ft_in22k_in1k", "convnext_v2_improved_best.pth", "High attention", "Low attention",
        "Validation accuracy: 98.32%", "stages.3", "7×7 grid, interpolated", "1/49", "5 (the colours are relative to it)", remark,
    ):  # fmt: skip
        assert expected in words(figure)
    assert len(bars(figure)) == 1 and "Blank map" not in words(figure) and "Constant map" not in words(figure)


def test_explained_class_is_told_from_the_predicted_one():
    single, both = (words(figure) for figure in both_figures(view(), pair(explained=1)))
    assert "3.06% Simple Fracture" in single
    assert "Grad-CAM Heatmap: Simple Fracture" in single
    assert both.count("explained class: Simple Fracture") == 2 == both.count("Heatmap: Simple Fracture")
    assert "explained class" not in words(comparison_figure(view(), pair()))


def test_comparison_says_whether_the_models_agree():
    differing = words(comparison_figure(view(), [pair()[0], pair(probabilities=np.float32([0.2, 0.8]))[1]]))
    assert "Both models agree: Comminuted Fracture" in words(comparison_figure(view(), pair()))
    assert differing.startswith("Models disagree\n")
    assert "ConvNeXt V2: Comminuted Fracture, confidence 96.94%" in differing
    assert "EfficientNetV2-S: Simple Fracture, confidence 80.00%" in differing


def test_agreement_of_maps_is_told_beside_that_of_classes():
    for share, second in ((100, CORNER), (50, CORNER + TOP_RIGHT), (0, TOP_RIGHT)):
        maps = [an_explanation(raw_map=CORNER), an_explanation(**EFFICIENTNET, raw_map=second)]
        said, text = words(comparison_figure(view(), maps)), explainability.map_agreement(maps).text
        assert "Both models agree: Comminuted Fracture" in said and text in said and f"{share} %" in text
        assert (f"⚠ {text}" in said) == (share == 0)


def test_blank_map_says_so_and_shows_no_colours():
    blank = explanation_figure(view(), an_explanation(raw_map=-CORNER))
    assert "Blank map: no positive evidence for Comminuted Fracture" in words(blank).replace("\n", " ")
    assert (panel(blank, "Overlay").pixels == panel(blank, "Original").pixels).all()
    assert (np.ptp(panel(blank, "Grad-CAM Heatmap").pixels, axis=2) == 0).all()
    assert not bars(blank) and "Peak" not in words(blank) and "attention" not in words(blank)
    assert not bars(comparison_figure(view(), pair(raw_map=-CORNER)))


@pytest.mark.parametrize("checkpoint", ("convnext_v2_demo.pth", "convnext_best.pth"))
def test_demo_networks_are_told_from_own(checkpoint):
    is_demo = checkpoint.endswith("demo.pth")
    for figure in both_figures(view(), pair(checkpoint=Path(checkpoint))):
        assert (explainability.DEMO_NOTICE in words(figure)) == is_demo
        assert ("Not for diagnosis" in words(figure)) != is_demo
        assert ("DEMO" in words(figure)) == is_demo
    said = words(explanation_figure(view(), pair(checkpoint=Path(checkpoint))[0]))
    assert ("Validation accuracy: 98.32% (synthetic test images)" in said) == is_demo


def test_file_name_is_not_read_as_markup():
    figure = explanation_figure(view("--><script>x</script>.svg"), an_explanation())
    assert b"<script" not in figure_bytes(figure, FigureStyle(format="svg"))


def test_long_class_names_are_wrapped_and_long_file_names_keep_both_ends():
    for figure in both_figures(view("patient_0042_" + "x" * 200 + "_left.png"), pair(class_names=LONG_CLASSES[:2])):
        name = line_with(figure, "patient_0042_").text
        assert name.endswith("_left.png") and "…" in name
        assert LONG_CLASSES[0] in words(figure).replace("\n", " ") and words(figure).count("…") == 1


def test_likeliest_classes_are_listed_and_the_others_counted():
    many = an_explanation(class_names=tuple("ABCDEFGHIJ"), probabilities=np.float32([0.28] + [0.08] * 9))
    said = words(explanation_figure(view(), many))
    assert len(re.findall(r"^8\.00%$", said, re.MULTILINE)) == 3
    assert "and 6 more, together 48.00%" in said


# The checks of a map


def test_flagged_checks_are_told_in_words_and_the_others_in_one_line():
    figure = explanation_figure(view(), an_explanation(findings=FLAGGED))
    said = words(figure)
    assert f"Attention on irrelevant areas: {DARK}" in said.replace("\n", " ") and "⚠" in said
    assert "Passed: border, focus" in said.splitlines() and "10 % of the heat" not in said
    assert line_with(figure, "Attention on irr").look.colour == explainability.WARNING
    assert "☐ Clinical features match" in said
    for clean in both_figures(view(), pair(findings=CLEAN)):
        assert "⚠" not in words(clean)


def test_comparison_flags_the_row_it_belongs_to():
    figure = comparison_figure(view(), [an_explanation(findings=CLEAN), an_explanation(**EFFICIENTNET, findings=FLAGGED)])
    heading, flag = line_with(figure, "EfficientNetV2-S:"), line_with(figure, f"⚠ {DARK}")
    assert 0 < flag.baseline - heading.baseline < 0.3


# Methods


def test_method_is_named_and_its_sum_told():
    raw = CORNER * 3 - OTHER_CORNER
    said = words(explanation_figure(view(), an_explanation(raw_map=raw, method="ig", owed=2.1)))
    assert "Integrated Gradients: ConvNeXt V2" in said and "Integrated Gradients Heatmap" in said
    assert "2, must be 2.1" in said and "25% of the map's magnitude" in said
    assert "Target layer" not in said and "Grad-CAM" not in said


def test_methods_figure_has_a_panel_with_cost_and_sum_for_each_method():
    methods = ("gradcam", "ig", "lrp", "shap")
    explanations = [an_explanation(raw_map=each, method=method, owed=None if method == "gradcam" else 1.5) for each, method in zip((CORNER, CORNER, OTHER_CORNER, CORNER + OTHER_CORNER), methods)]
    for width in (100, 260, 900):
        figure = methods_figure(view(width=width), explanations)
        check_layout(figure)
        assert [picture.title for picture in pictures(figure)] == ["Original X-ray", "Grad-CAM", "Integrated Gradients", "LRP", "SHAP"]
        said = words(figure).replace("\n", " ")
        for method, total in (("ig", 1), ("shap", 2)):
            assert f"{explainability.METHODS[method].passes} passes; sum {total}, must be 1.5" in said
        assert "1 pass\n" in words(figure)  # no sum where it must be nothing
        assert "Grad-CAM, Integrated Gradients, LRP, SHAP show correlation, not cause" in said
    shares = [line.text for line in lines(figure) if re.fullmatch(r"[01]\.\d\d", line.text)]
    assert " ".join(shares) == "1.00 1.00 0.00 0.50 1.00 1.00 0.00 0.50 0.00 0.00 1.00 0.50 0.50 0.50 0.50 1.00"


def test_shared_heat_by_arithmetic():
    share = explainability.shared_heat
    assert share(CORNER, 5 * CORNER) == 1 and share(CORNER, OTHER_CORNER) == 0 == share(CORNER, 0 * CORNER)
    assert share(CORNER, CORNER + OTHER_CORNER) == pytest.approx(0.5)
    assert share(np.kron(CORNER, np.ones((4, 4), np.float32)), CORNER) == pytest.approx(1)


# ------------------------------------------------------------------------------------------
# Colours and places
# ------------------------------------------------------------------------------------------


def rendered(sheet: Sheet, item: Picture | Box, dpi: int = 150) -> np.ndarray:
    """The pixels of the page at the place of a picture or box."""
    left, top, right, bottom = (round(inches * dpi) for inches in extent(item, dpi))
    return sheet_pixels(sheet, dpi)[top:bottom, left:right].astype(int)


@pytest.mark.parametrize("height, width", ((1000, 100), (400, 300), (100, 1000), (700, 1400)))
def test_hot_cell_is_red_and_top_right_of_pictures_of_any_shape(height, width):
    figure = explanation_figure(view(height=height, width=width), an_explanation(raw_map=TOP_RIGHT))
    pixels = rendered(figure, panel(figure, "Grad-CAM Heatmap"))
    hot = pixels[:, :, 0] > pixels[:, :, 2]
    rows, columns = np.nonzero(hot)
    assert hot[4, -5]
    assert rows.max() < len(pixels) * 0.2
    assert columns.min() > pixels.shape[1] * 0.8
    assert (pixels[len(pixels) // 2 :, :, 2] > pixels[len(pixels) // 2 :, :, 0])[2:-2, 2:-2].all()


def test_overlay_is_the_heat_over_the_radiograph_by_its_opacity():
    seen, explanation = view(), an_explanation(raw_map=CORNER + 0.4 * OTHER_CORNER)
    figure = explanation_figure(seen, explanation)
    heat = np.asarray(Image.fromarray(explanation.heatmap).resize(seen.picture.shape[1::-1], Image.Resampling.BICUBIC)).clip(0, 1)
    alpha = 0.6 * heat[:, :, None]
    expected = alpha * panel(figure, "Grad-CAM Heatmap").pixels + (1 - alpha) * seen.picture
    assert np.abs(panel(figure, "Overlay").pixels - expected).max() < 2.5


def test_heatmap_is_enlarged_smoothly_between_cell_centres():
    big = explainability.resized(CORNER, 70, 140)
    assert big.shape == (70, 140)
    assert big[2, 5] == 1  # inside the first half of the hot cell
    assert 0 < big[9, 19] < 0.5  # its lower right corner
    assert big.min() == 0 and big.max() == 1 and big[40:].max() == 0 == big[:, 80:].max()
    ramp = explainability.resized(np.array([[0, 1]], np.float32), 1, 200)[0]
    steps = np.diff(ramp[50:150])
    assert (steps >= 0).all() and steps[50] > 1.5 * steps[5]  # bilinear would be straight


@pytest.mark.parametrize("name", ("jet", "viridis", "gray", "twilight", "tab10", "Set1"))
def test_colormap_is_sampled_from_end_to_end(name):
    from matplotlib import colormaps

    table = explainability.colours_of(FigureStyle(colormap=name)) / 255
    for place in (0, 0.25, 0.6, 1):
        assert np.abs(table[round(place * 255)] - colormaps[name](round(place * 255) / 255)[:3]).max() < 0.01
    assert len(np.unique(table, axis=0)) >= min(colormaps[name].N, 200)


@pytest.mark.parametrize("style", (STYLE, FigureStyle(colormap="viridis"), SIGNED), ids=("jet", "viridis", "signed"))
def test_ticks_of_the_colour_bar_stand_at_their_colours(style):
    for figure in both_figures(view(style=style), pair(raw_map=CORNER - OTHER_CORNER)):
        table = explainability.colours_of(style)
        for bar in bars(figure):
            pixels = rendered(figure, bar)
            ticks = [line for line in lines(figure) if abs(line.x - bar.x - 0.22) < 0.01 and bar.y < line.baseline < extent(bar)[3] + 0.1]
            assert [float(tick.text) for tick in ticks] == ([-1, 0, 1] if style.signed else [0, 0.5, 1])
            for tick, place in zip(ticks, (0, 128, 255)):
                middle = (tick.baseline - tick.look.points * 0.365 / 72 - bar.y) * 150
                row = min(max(round(middle), 3), len(bar.pixels) - 4)
                assert np.abs(pixels[row, 10] - table[place]).max() < 12
            assert any(line.is_upright and bar.y < line.baseline < extent(bar)[3] for line in lines(figure))


def test_probability_bars_are_as_long_as_the_probabilities():
    probabilities = np.float32([0.2, 0.7, 0.1])
    told = an_explanation(class_names=("A", "B", "C"), probabilities=probabilities, explained=2)
    figure = explanation_figure(view(), told)
    for name, probability in zip("ABC", probabilities):
        label = [line for line in lines(figure) if line.text == name and line.look.points == 10][0]
        track, bar = [box for box in figure.items if isinstance(box, Box) and box.height == 0.075 and 0 < box.y - label.baseline < 0.12]
        assert (track.colour, bar.colour) == (explainability.TRACK, explainability.BAR)
        assert bar.width / track.width == pytest.approx(float(probability))
        assert f"{float(probability):.2%}" in [line.text for line in lines(figure) if line.baseline == label.baseline]
        assert label.look.is_bold == (name == "B")  # predicted; explained is C
    assert "Grad-CAM Heatmap: C" in words(figure) and "10.00% C" in words(figure)


@pytest.mark.parametrize("colormap", ("jet", "gray"))
def test_reading_guide_shows_the_colours_that_it_speaks_of(colormap):
    figure = explanation_figure(view(style=FigureStyle(colormap=colormap)), an_explanation())
    table = explainability.colours_of(FigureStyle(colormap=colormap)) / 255
    for text, colour in (("High attention", table[255]), ("Low attention", table[0])):
        label = line_with(figure, text)
        (swatch,) = [box for box in figure.items if isinstance(box, Box) and box.width == 0.22 and not box.line and box.y < label.baseline < box.y + 0.15]
        assert swatch.colour == tuple(colour)
        assert (rendered(figure, swatch)[8, 8] == (255 * colour).round()).all()


def test_rows_of_the_comparison_show_the_model_that_they_name():
    figure = comparison_figure(view(), [an_explanation(raw_map=CORNER), an_explanation(**EFFICIENTNET, raw_map=OTHER_CORNER)])
    assert line_with(figure, "ConvNeXt V2:").baseline < line_with(figure, "EfficientNetV2-S:").baseline
    for title, hot, cold in (("ConvNeXt V2:", 10, -10), ("EfficientNetV2-S:", -10, 10)):
        heading = line_with(figure, title)
        heatmap = min((picture for picture in pictures(figure) if picture.title.startswith("Heatmap") and picture.y > heading.baseline), key=lambda picture: picture.y)
        assert heatmap.pixels[hot, hot, 0] > heatmap.pixels[hot, hot, 2]
        assert heatmap.pixels[cold, cold, 0] < heatmap.pixels[cold, cold, 2]
        overlay = next(picture for picture in pictures(figure) if picture.title == "Overlay" and picture.y == heatmap.y)
        red, _, blue = overlay.pixels[hot, hot].astype(int)
        assert red > blue + 50


def test_signed_maps_are_centred_on_zero():
    half = CORNER - 0.5 * OTHER_CORNER
    figure = explanation_figure(view(style=SIGNED), an_explanation(raw_map=half, method="ig"))
    heatmap = panel(figure, "Integrated").pixels.astype(int)
    red, white, blue = heatmap[5, 5], heatmap[len(heatmap) // 2, 130], heatmap[-5, -5]
    assert red[0] > red[2] + 50 and blue[2] > blue[0] + 50 and white.min() > 240
    assert blue.sum() > red.sum()  # half as strong
    middle = np.s_[200:-200, 200:-200]
    assert (panel(figure, "Overlay").pixels[middle] == panel(figure, "Original").pixels[middle]).all()


def test_contours_follow_the_levels_and_leave_the_radiograph_alone():
    style = FigureStyle(contours=True)
    cone = (1 - np.hypot(*np.mgrid[-3:4, -3:4]) / 3).clip(0).astype(np.float32)
    figure = explanation_figure(view(style=style), an_explanation(raw_map=cone))
    shown = panel(figure, "Overlay").pixels.astype(int)
    changed = (np.abs(shown - view().picture) > 30).any(axis=2)
    heat = explainability.resized(cone, *shown.shape[:2])
    for level in (0.25, 0.5, 0.75):
        assert changed[np.abs(heat - level) < 0.005].mean() > 0.9
    assert changed[np.abs(heat[..., None] - (0.25, 0.5, 0.75)).min(axis=2) > 0.06].mean() < 0.02
    assert "Lines: 25, 50 and 75 %" in words(figure)


def test_signed_contours_have_the_colours_of_their_sign():
    style = FigureStyle(contours=True, signed=True)
    slope = np.tile(np.linspace(-1, 1, 7, dtype=np.float32), (7, 1))
    red, _, blue = np.moveaxis(explainability.overlay_pixels(grey(300, 300), an_explanation(raw_map=slope), style).astype(int), 2, 0)
    assert (red > blue + 30)[:, 150:].any() and not (red > blue + 30)[:, :150].any()
    assert (blue > red + 30)[:, :150].any() and not (blue > red + 30)[:, 150:].any()


@pytest.mark.parametrize("width", (90, 150, 260, 900))
def test_the_note_on_known_fractures_has_room(width):
    seen = view(width=width, boxes=((0.25, 0.5, 0.75, 0.6),))
    methods = [an_explanation(raw_map=CORNER, method=method) for method in ("gradcam", "refinecam", "ig", "lrp")]
    for figure in (*both_figures(seen, pair()), methods_figure(seen, methods)):
        check_layout(figure)
        assert "ashed: the true fracture" in words(figure).replace("\n", " ")


def test_known_fractures_are_outlined_on_heatmap_and_overlay_alone():
    seen = view(boxes=((0.25, 0.5, 0.75, 0.6),))
    for figure, plain in zip(both_figures(seen, pair()), both_figures(view(), pair())):
        for picture, bare in zip(pictures(figure), pictures(plain)):
            changed = (rendered(figure, picture) != rendered(plain, bare)).any(axis=2)
            if picture.title.startswith("Original"):
                assert not changed.any()
                continue
            height, width = changed.shape
            counted = np.nonzero(changed.any(axis=0))[0][[0, -1]] / width, np.nonzero(changed.any(axis=1))[0][[0, -1]] / height
            half = 1 / 14  # a thin line shows what counts as inside: half a cell more
            assert counted[0] == pytest.approx((0.25 - half, 0.75 + half), abs=0.01)
            assert counted[1] == pytest.approx((0.5 - half, 0.6 + half), abs=0.01)
            assert changed[round(0.55 * height), round(0.25 * width) - 1 : round(0.25 * width) + 2].any()
        assert "Dashed: the true fracture" in words(figure)


def test_numbers_stay_with_their_sign_and_flags_come_first():
    told = {"findings": (*CLEAN, FLAGGED[-1]), "pointing": explainability.Pointing(True, 1.0, 0.46)}
    figure = explanation_figure(view(boxes=((0.25, 0.5, 0.75, 0.6),)), an_explanation(**told))
    said = [line.text for line in lines(figure)]
    assert "100\u00a0% of the heat inside, 46\u00a0% of the area" in said
    order = [words(figure).index(text) for text in ("71 % of the heat", "Maximum inside", "Passed: border", "stages.3")]
    assert order == sorted(order)
    assert words(figure).count("Comminuted Fracture") == 3  # heatmap's title, prediction, its probability


def other_fonts_character() -> str:
    """What the figures' own font lacks and another one that comes with matplotlib has."""
    own, other = (explainability.characters(explainability.font_file("a", False).replace("DejaVuSans", name)) for name in ("DejaVuSans", "STIXGeneral"))
    return next(character for character in sorted(other) if character not in own and character.isprintable())


def test_names_that_the_own_font_lacks_are_drawn_with_another_or_as_boxes():
    rare = other_fonts_character()
    unknown = "\N{YI SYLLABLE LEP}\N{TANGUT COMPONENT-001}\N{CUNEIFORM SIGN A}"  # of no one font
    for name, shown in ((f"a{rare}.png", f"a{rare}.png"), (f"a{unknown}.png", "a□□□.png"), ("\x07.png", r"\x07.png")):
        figure = explanation_figure(view(name), an_explanation())
        check_layout(figure)
        assert line_with(figure, shown).look == explainability.NAME
        assert ("□: a character" in words(figure)) == ("□" in shown)
    assert "STIX" in explainability.font_file(f"a{rare}.png", False)
    assert "DejaVu" in explainability.font_file("a.png", False)


# ------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------

FORMATS = ("png", "pdf", "svg")


def written(folder: Path, extension: str, digest: str = "0123abcd", name: str = "figure") -> Path:
    style = FigureStyle(format=extension)
    path = folder / f"{name}.{extension}"
    path.write_bytes(figure_bytes(comparison_figure(view(style=style), pair(findings=FLAGGED)), style, digest))
    return path


def test_png_has_the_resolution_and_size_of_its_page(tmp_path):
    for dpi in (72, 150):
        style = FigureStyle(dpi=dpi)
        figure = explanation_figure(view(style=style), an_explanation())
        (tmp_path / "x.png").write_bytes(figure_bytes(figure, style))
        with Image.open(tmp_path / "x.png") as page:
            assert (page.format, page.mode) == ("PNG", "RGB")
            assert page.size == (round(figure.width * dpi), round(figure.height * dpi))
            assert page.info["dpi"] == pytest.approx((dpi, dpi), abs=0.1)


def test_png_holds_every_pixel_and_the_digest(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (33, 57, 3), dtype=np.uint8)
    (tmp_path / "x.png").write_bytes(explainability.png(pixels, 150, "abc"))
    with Image.open(tmp_path / "x.png") as page:
        page.verify()  # checksums
    with Image.open(tmp_path / "x.png") as page:
        assert (np.asarray(page) == pixels).all() and page.info["Digest"] == "abc"


@pytest.mark.slow
@pytest.mark.parametrize("extension", FORMATS)
def test_same_input_gives_the_same_bytes_with_a_digest_that_whole_files_alone_have(tmp_path, extension):
    path, other = (written(tmp_path, extension, name=name) for name in ("first", "second"))
    assert path.read_bytes() == other.read_bytes() and digest_in(path) == "0123abcd"
    path.write_bytes(path.read_bytes()[:-500])
    assert digest_in(path) is None and digest_in(tmp_path / f"absent.{extension}") is None


def test_vector_figures_hold_each_picture_once_and_their_fonts_or_shapes(tmp_path):
    page, drawing = written(tmp_path, "pdf"), written(tmp_path, "svg").read_text()
    assert b"/FontFile2" in page.read_bytes() and page.read_bytes().count(b"/Subtype /Image") == 8
    assert drawing.count("<image ") == 8  # six panels and two colour bars
    assert "<text" not in drawing and "font-family" not in drawing
    if shutil.which("pdftotext"):
        said = subprocess.run(["pdftotext", "-layout", page, "-"], capture_output=True, text=True).stdout
        for expected in ("Both models agree: Comminuted Fracture", "wrist_0001.jpg", DARK, "relative importance"):
            assert expected in said


@pytest.mark.slow
def test_pdf_looks_like_the_png(tmp_path):
    if not shutil.which("pdftoppm"):
        pytest.skip("pdftoppm is not installed")
    subprocess.run(["pdftoppm", "-r", "150", "-png", "-singlefile", written(tmp_path, "pdf"), tmp_path / "drawn"], check=True)
    with Image.open(tmp_path / "drawn.png") as vector, Image.open(written(tmp_path, "png")) as page:
        size = (page.width // 8, page.height // 8)
        one, other = (np.asarray(each.convert("RGB").resize(size, Image.Resampling.BOX), int) for each in (vector, page))
    assert np.abs(one - other).mean() < 3 and (np.abs(one - other).max(axis=2) > 60).mean() < 0.005


POISON = "text.usetex: True\nfont.family: serif\nfont.size: 30\nfigure.autolayout: True\npath.sketch: 1, 100, 2\nsavefig.bbox: tight\n"


@pytest.mark.slow
@pytest.mark.parametrize("extension", ("png", "svg"))
def test_nobodys_matplotlib_settings_reach_a_figure(tmp_path, extension):
    (tmp_path / "matplotlibrc").write_text(POISON)
    script = f"""
import os, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(explainability.__file__).parent)!r}]
os.chdir({str(tmp_path)!r})
import test_figures
test_figures.written(test_figures.Path({str(tmp_path)!r}), {extension!r}, name="poisoned")
"""
    done = in_new_process("-c", script, MPLBACKEND="module://nowhere", MATPLOTLIBRC=str(tmp_path), MPLCONFIGDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / f"poisoned.{extension}").read_bytes() == written(tmp_path, extension).read_bytes()


def a_result(folder: Path) -> Result:
    """Of a picture that is not square, and two networks that differ."""
    image, keys = folder / "wrist.png", ("convnext", "efficientnet")
    Image.fromarray(grey(40, 90)).save(image)
    names = ("radiograph", *(f"{kind}_{key}" for key in keys for kind in ("heatmap", "overlay")))
    job = Job(image, "wrist.png", (), (), "0123abcd", tuple(folder / f"{name}.png" for name in names))
    told = an_explanation(raw_map=TOP_RIGHT), an_explanation(**EFFICIENTNET, raw_map=CORNER)
    return Result(job, fitted(grey(40, 90), 150), (), told)


def write(folder: Path, shows: tuple[int, ...] = (0,)) -> Path:
    path = folder / "out" / "figure.png"
    path.parent.mkdir(exist_ok=True)
    write_page(a_result(folder), Page(path, shows), STYLE)
    return path


def reds(pixels: np.ndarray) -> tuple[float, float]:
    """How much redder than blue a picture is in its top left and its top right corner."""
    difference = pixels[:, :, 0].astype(int) - pixels[:, :, 2]
    return difference[:4, :4].mean(), difference[:4, -4:].mean()


def test_each_page_shows_the_maps_that_it_names(tmp_path, monkeypatch):
    pages = []
    monkeypatch.setattr(explainability, "figure_bytes", lambda sheet, *_: pages.append(sheet) or b"")
    for shows in ((0,), (1,), (0, 1)):
        write(tmp_path, shows)
    first, second, both = pages
    assert "ConvNeXt V2" in words(first) and "EfficientNetV2-S" in words(second)
    hot = [reds(picture.pixels) for page in pages for picture in pictures(page) if "Heatmap" in picture.title]
    assert [right > left for left, right in hot] == [True, False, True, False]
    assert [picture.title for picture in pictures(both)].count("Overlay") == 2


@pytest.mark.parametrize("style", (STYLE, FigureStyle(contours=True)), ids=("colours", "contours"))
def test_bare_pictures_are_what_their_names_say(tmp_path, style):
    result = a_result(tmp_path)
    explainability.write_panels(result, style)
    radiograph, *maps = (np.asarray(Image.open(path)).astype(int) for path in result.job.panels)
    assert (radiograph == grey(40, 90)).all()
    for (heatmap, overlay), side in zip((maps[:2], maps[2:]), (np.s_[:20, -30:], np.s_[:20, :30])):
        assert heatmap.shape == overlay.shape == (40, 90, 3)
        assert np.argmax(reds(heatmap)) == (side == np.s_[:20, -30:])
        assert (overlay[20:] == radiograph[20:]).all() and (overlay[side] != radiograph[side]).any()
        assert (heatmap[20:] != radiograph[20:]).any(axis=2).all()

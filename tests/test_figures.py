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
    FAMILIES, Box, Explanation, FigureStyle, Finding, Likeness, Line, Picture, Sheet, SimilarCase, View,
    comparison_figure, digest_in, explanation_figure, figure_bytes, fitted, methods_figure, sheet_pixels,
)  # fmt: skip

STYLE = FigureStyle()
SIGNED = FigureStyle(signed=True)
CORNER = np.float32(np.arange(49).reshape(7, 7) == 0)  # a raw map that is hot in the top left cell alone
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
BOX = (0.25, 0.5, 0.75, 0.6)
CLEAN = (Finding("border", 0.1, False, "10 % of the heat is there"), Finding("focus", 0.9, False, "90 %"))
DARK = "71 % of the heat lies where nothing as dense as bone is"
FLAGGED = (*CLEAN, Finding("dark", 0.71, True, DARK))


def grey(height: int = 300, width: int = 260) -> np.ndarray:
    """A radiograph in shades of grey, darkest at the top left."""
    shades = np.add.outer(np.arange(height), np.arange(width)) * 255 // (height + width)
    return np.repeat(shades.astype(np.uint8)[:, :, None], 3, axis=2)


def view(height: int = 300, width: int = 260, style: FigureStyle = STYLE, **more: object) -> View:
    return View(fitted(grey(height, width), style.dpi), **{"name": "wrist_0001.jpg", "style": style, **more})


def pair(**changed: object) -> list[Explanation]:
    return [an_explanation(**changed), an_explanation(**{**EFFICIENTNET, **changed})]


def sharing(raw_map: np.ndarray) -> list[Explanation]:
    return [an_explanation(raw_map=CORNER), an_explanation(**EFFICIENTNET, raw_map=raw_map)]


def both_figures(seen: View, explanations: list[Explanation]) -> list[Sheet]:
    return [explanation_figure(seen, explanations[0]), comparison_figure(seen, explanations)]


# What lies on a sheet


def lines(sheet: Sheet) -> list[Line]:
    return [item for item in sheet.items if isinstance(item, Line)]


def pictures(sheet: Sheet) -> list[Picture]:
    return [item for item in sheet.items if isinstance(item, Picture) and item.title]


def bars(sheet: Sheet) -> list[Picture]:
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
    places = [(item, extent(item, dpi)) for item in sheet.items]
    texts = [(item, place) for item, place in places if isinstance(item, Line)]
    shown = [place for item, place in places if isinstance(item, Picture)]
    filled = [(item, place) for item, place in places if isinstance(item, Box) and not item.line]
    own = ("white", explainability.BADGE)
    grounds = [place for box, place in filled if box.colour in own or box.height > 0.2]
    for item, place in places:
        assert inside(place, (0.05, 0.05, sheet.width - 0.05, sheet.height - 0.05)), f"clipped: {item}"
    for line, place in texts:
        is_framed = any(inside(place, ground) for ground in grounds)
        taken = any(overlap(place, shape) for shape in (*shown, *(each for _, each in filled)))
        assert is_framed or not taken, f"on a picture or bar: {line}"
    for (one, place), (other, other_place) in itertools.combinations(texts, 2):
        assert not overlap(place, other_place), f"overlapping: {one} and {other}"
    assert not any(itertools.starmap(overlap, itertools.combinations(shown, 2))), "pictures overlap"
    pixels = sheet_pixels(sheet, dpi)
    for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]):
        assert (edge == 255).all(), "ink at the edge of the page"


NAMES = (
    "wrist_0001.jpg", "w" * 200 + ".jpg", "W" * 200 + ".jpg", "cost $5 and $6.png", "50%_{x.png", "_{^{.png",
    "$\\frac{1}$.png", "手首のX線写真" * 30 + ".png", "röntgen – Hüfte.png", "two\nlines.png", "x.png",
    "\N{BONE}\u202e\u0301.png", "\udcff.png",
)  # fmt: skip
TEXTS = (*NAMES, *LONG_CLASSES, "AVAVAVAV To fi ffi", "الكسر")


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text)[1:17])
def test_texts_take_the_room_that_they_are_given(text):
    for look in (explainability.LARGE, explainability.SMALL):
        shown = explainability.drawable(text)
        strip = explainability.text_strip(shown, look, 150)[:, :, 3]
        ink = np.nonzero(strip.any(axis=0))[0]
        pad, expected = len(strip) // 6, explainability.text_width(shown, look) * 150
        assert ink[0] >= pad - 2 and ink[-1] <= pad + expected + 2
        assert not strip[0].any() and not strip[-1].any()


SIMILAR = tuple(SimilarCase("", name, 0.9, grey(40, 30)[:, :, 0]) for name in LONG_CLASSES[:3])
EXPLAINED = (
    {"class_names": LONG_CLASSES[:2], "explained": 1},
    {"class_names": LONG_CLASSES[:2], "raw_map": -CORNER, "explained": 1, **DEMO},
    {"class_names": ("W" * 60, "M" * 60), "raw_map": -CORNER},
    {"class_names": ("$x_{", "50%\n線"), "raw_map": np.ones((7, 7)), "probabilities": np.float32([0, 1])},
    {"class_names": LONG_CLASSES, "probabilities": np.float32([0.2, 0.3, 0.3, 0.1, 0.1]), "explained": 4},
    {"class_names": tuple("ABCDEFGH"), "probabilities": np.full(8, 0.125, np.float32), "findings": FLAGGED},
    {"findings": FLAGGED * 3, **DEMO},
    {"method": "ig", "owed": 2.1, "remarks": ("The network calls the blurred one Simple Fracture (96 %).",)},
    {"checkpoint": Path(f"convnext_{'very_' * 30}long_name.pth")},
    {"likeness": Likeness(9, 9, SIMILAR), "findings": FLAGGED * 9},
    {"raw_map": CORNER * 1.23456e-20, "accuracy": "Accuracy: not recorded in the checkpoint"},
)
SHAPES = ((900, 600), (600, 900), (1000, 100), (100, 1000), (1, 1))
LAYOUTS = (
    *(({"name": name}, {}) for name in NAMES),
    *(({"width": width, "boxes": (BOX,)}, {}) for width in (90, 150, 900)),
    *(({"width": width}, changed) for width, changed in itertools.product((100, 260, 800), EXPLAINED)),
    *(
        ({"height": height, "width": width, "style": FigureStyle(dpi=dpi)}, {"findings": FLAGGED})
        for (height, width), dpi in itertools.product(SHAPES, (30, 300))
    ),
)


@pytest.mark.parametrize("seen, changed", LAYOUTS)
def test_layout_holds_for_any_name_shape_resolution_and_explanation(seen, changed):
    shown = view(**seen)
    for figure in both_figures(shown, pair(**changed)):
        check_layout(figure, shown.style.dpi)


@pytest.mark.parametrize("place", ((0.5, 0.2), (9.6, 5), (1, 3)))  # on a title, off the page, on a picture
def test_layout_check_finds_faults(place):
    figure = explanation_figure(view(), an_explanation())
    figure.write(*place, "a line of text")
    with pytest.raises(AssertionError):
        check_layout(figure)


@pytest.mark.parametrize("aspect", (0.1, 1 / 3, 1 / 2, 0.62, 0.75, 1, 4 / 3, 1.9, 2.1, 3, 10))
def test_page_follows_the_shape_of_the_radiograph(aspect):
    figure, both = both_figures(view(height=600, width=round(600 * aspect)), pair())
    single, panels, is_long = pictures(figure), pictures(both), aspect < 0.6
    (shape,) = {picture.pixels.shape for picture in (*single, *panels)}
    assert shape[1] / shape[0] == pytest.approx(aspect, rel=0.02)
    assert {len(bar.pixels) for bar in bars(figure) + bars(both)} == {shape[0]}
    assert len({picture.y for picture in single}) == (1 if is_long else 2)
    assert len({picture.x for picture in single}) == (3 if is_long else 2)
    assert [picture.title.partition(":")[0] for picture in panels] == ["Original", "Heatmap", "Overlay"] * 2
    assert [picture.y for picture in panels] == [panels[0].y] * 3 + [panels[3].y] * 3
    assert [picture.x for picture in panels[:3]] == [picture.x for picture in panels[3:]]
    assert panels[0].x < panels[1].x < panels[2].x and panels[0].y < panels[3].y
    if 1 / 3 <= aspect <= 3:  # most of the page is picture
        assert 6 * shape[0] * shape[1] / 150**2 >= 0.68 * both.width * both.height


# What the figures say

RISE = {"raw_map": CORNER * 5 - OTHER_CORNER * 9, "remarks": ("Every pixel is the same",)}
SPREAD = {"class_names": tuple("ABCDEFGHIJ"), "probabilities": np.float32([0.28] + [0.08] * 9)}
SAID = {  # explanation, then what its figure says, then what it does not
    "everything needed": (RISE, (
        "Original X-ray", "Grad-CAM Heatmap: Comminuted Fracture", "Overlay (Model Focus)", "stages.3",
        "Confidence: 96.94%", "3.06% Simple Fracture", "convnextv2_base.fcmae_ft_in22k_in1k", "Low attention",
        "convnext_v2_improved_best.pth", "Validation accuracy: 98.32%", "7×7 grid, interpolated", "1/49",
        "5 (the colours are relative to it)", "High attention", "Every pixel is the same", "Not for diag",
    ), ("Blank map", "Constant map", "Explained class", "⚠", "DEMO", "synthetic")),
    "explained": ({"explained": 1}, ("class 3.06% Simple Fracture", "Grad-CAM Heatmap: Simple Fracture"), ()),
    "method": ({"raw_map": CORNER * 3 - OTHER_CORNER, "method": "ig", "owed": 2.1}, (
        "Integrated Gradients: ConvNeXt V2", "Integrated Gradients Heatmap", "2, must be 2.1",
        "25% of the map's magnitude"), ("Target layer", "Grad-CAM")),
    "likeliest": (SPREAD, ("28.00% A 8.00% B 8.00% C 8.00% D and 6 more, together 48.00%",), ()),
    "blank": ({"raw_map": -CORNER}, ("Blank map: no positive evidence for Comm",), ("Peak", "attention")),
    "flagged checks": ({"findings": FLAGGED}, (
        f"⚠ Attention on irrelevant areas: {DARK}", "Passed: border, focus", "☐ Clinical features match",
    ), ("10 % of the heat",)),
    "demo": (DEMO, (
        explainability.DEMO_NOTICE, "DEMO", "98.32% (synthetic test images)"), ("Not for diagnosis",)),
    "both": (pair(findings=CLEAN), (
        "Both models agree: Comminuted Fracture", "Not for diagnosis"), ("explained class", "DEMO", "⚠")),
    "both explained": (pair(explained=1), (
        "ConvNeXt V2: Comminuted Fracture, confidence 96.94% (explained class: Simple Fracture)",
        "EfficientNetV2-S: Comminuted Fracture, confidence 96.94% (explained class: Simple Fracture)",
        "Heatmap: Simple Fracture"), ("Heatmap: Comminuted",)),
    "both disagreeing": ([
        an_explanation(), an_explanation(**EFFICIENTNET, probabilities=np.float32([0.2, 0.8]))], (
        "Models disagree wrist_0001.jpg", "ConvNeXt V2: Comminuted Fracture, confidence 96.94%",
        "EfficientNetV2-S: Simple Fracture, confidence 80.00%"), ("agree:",)),
    "both sharing half": (sharing(CORNER + TOP_RIGHT), ("the two maps share 50 % of their heat",), ("⚠",)),
    "both apart": (sharing(TOP_RIGHT), ("⚠ the two maps share 0 % of their heat", "Both models agree"), ()),
    "both demo": (pair(**DEMO), (f"Demo networks: {explainability.DEMO_NOTICE}", "DEMO"), ("diagnosis",)),
}  # fmt: skip


@pytest.mark.parametrize("told, said, unsaid", SAID.values(), ids=SAID)
def test_figures_say(told, said, unsaid):
    explanations = told if isinstance(told, list) else [an_explanation(**told)]
    text = words(explainability.page_figure(view(), explanations)).replace("\n", " ")
    assert [each for each in said if each not in text] == [] == [each for each in unsaid if each in text]


def test_blank_map_shows_no_colours():
    blank = explanation_figure(view(), an_explanation(raw_map=-CORNER))
    assert (panel(blank, "Overlay").pixels == panel(blank, "Original").pixels).all()
    assert (np.ptp(panel(blank, "Grad-CAM Heatmap").pixels, axis=2) == 0).all()
    assert not bars(blank) and not bars(comparison_figure(view(), pair(raw_map=-CORNER)))


def test_long_class_names_are_wrapped_and_long_file_names_keep_both_ends():
    seen = view(name=f"patient_0042_{'x' * 200}_left.png")
    for figure in both_figures(seen, pair(class_names=LONG_CLASSES[:2])):
        assert re.fullmatch("patient.*…x*_left.png", line_with(figure, "patient_0042_").text)
        assert LONG_CLASSES[0] in words(figure).replace("\n", " ") and words(figure).count("…") == 1


def test_comparison_flags_the_row_it_belongs_to():
    second = an_explanation(**EFFICIENTNET, findings=FLAGGED)
    figure = comparison_figure(view(), [an_explanation(findings=CLEAN), second])
    heading, flag = line_with(figure, "EfficientNetV2-S:"), line_with(figure, f"⚠ {DARK}")
    assert 0 < flag.baseline - heading.baseline < 0.3


@pytest.mark.parametrize("seen", ({"width": 100}, {"width": 900}, {"width": 90, "boxes": (BOX,)}))
def test_methods_figure_has_a_panel_with_cost_and_sum_for_each_method(seen):
    maps = {"gradcam": CORNER, "ig": CORNER, "lrp": OTHER_CORNER, "shap": CORNER + OTHER_CORNER}
    owed = {"gradcam": None, "ig": 1.5, "lrp": 1.5, "shap": 1.5}
    explanations = [an_explanation(raw_map=maps[key], method=key, owed=owed[key]) for key in maps]
    figure = methods_figure(view(**seen), explanations)
    check_layout(figure)
    titles = ["Original X-ray", "Grad-CAM", "Integrated Gradients", "LRP", "SHAP"]
    assert [picture.title for picture in pictures(figure)] == titles
    said = words(figure).replace("\n", " ")
    for method, total in (("ig", 1), ("shap", 2)):
        assert f"{explainability.METHODS[method].passes} passes; sum {total}, must be 1.5" in said
    assert "1 pass\n" in words(figure)  # no sum where it must be nothing
    assert "Grad-CAM, Integrated Gradients, LRP, SHAP show correlation, not cause" in said
    assert ("Dashed: the true fracture" in said) == ("boxes" in seen)
    shares = " ".join(re.findall(r"^[01]\.\d\d$", words(figure), re.MULTILINE))
    assert shares == "1.00 1.00 0.00 0.50 1.00 1.00 0.00 0.50 0.00 0.00 1.00 0.50 0.50 0.50 0.50 1.00"


def test_shared_heat_by_arithmetic():
    share = explainability.shared_heat
    assert share(CORNER, 5 * CORNER) == 1 and share(CORNER, OTHER_CORNER) == 0 == share(CORNER, 0 * CORNER)
    assert share(np.kron(CORNER, np.ones((4, 4), np.float32)), CORNER) == pytest.approx(1)


# Colours and places


def rendered(sheet: Sheet, item: Line | Box | Picture, dpi: int = 150) -> np.ndarray:
    """The pixels of the page at the place of what lies there."""
    left, top, right, bottom = (round(inches * dpi) for inches in extent(item, dpi))
    return sheet_pixels(sheet, dpi)[top:bottom, left:right].astype(int)


@pytest.mark.parametrize("height, width", ((1000, 100), (400, 300), (100, 1000), (700, 1400)))
def test_hot_cell_is_red_and_top_right_of_pictures_of_any_shape(height, width):
    figure = explanation_figure(view(height=height, width=width), an_explanation(raw_map=TOP_RIGHT))
    pixels = rendered(figure, panel(figure, "Grad-CAM Heatmap"))
    hot = pixels[:, :, 0] > pixels[:, :, 2]
    rows, columns = np.nonzero(hot)
    assert hot[4, -5] and rows.max() < len(pixels) * 0.2 and columns.min() > pixels.shape[1] * 0.8
    assert (pixels[len(pixels) // 2 :, :, 2] > pixels[len(pixels) // 2 :, :, 0])[2:-2, 2:-2].all()


def test_overlay_is_the_heat_over_the_radiograph_by_its_opacity():
    seen, explanation = view(), an_explanation(raw_map=CORNER + 0.4 * OTHER_CORNER)
    figure, heat = explanation_figure(seen, explanation), Image.fromarray(explanation.heatmap)
    large = heat.resize(seen.picture.shape[1::-1], Image.Resampling.BICUBIC)
    alpha = 0.6 * np.asarray(large).clip(0, 1)[:, :, None]
    expected = alpha * panel(figure, "Grad-CAM Heatmap").pixels + (1 - alpha) * seen.picture
    assert np.abs(panel(figure, "Overlay").pixels - expected).max() < 2.5


def test_heatmap_is_enlarged_smoothly_between_cell_centres():
    big = explainability.resized(CORNER, 70, 140)
    assert big.shape == (70, 140) and big[2, 5] == 1  # inside the first half of the hot cell
    assert 0 < big[9, 19] < 0.5  # its lower right corner
    assert big.min() == 0 and big.max() == 1 and big[40:].max() == 0 == big[:, 80:].max()
    ramp = explainability.resized(np.array([[0, 1]], np.float32), 1, 200)[0]
    steps = np.diff(ramp[50:150])
    assert (steps >= 0).all() and steps[50] > 1.5 * steps[5]  # bilinear would be straight


@pytest.mark.parametrize("name", ("jet", "viridis", "gray", "twilight", "tab10", "Set1"))
def test_colormap_is_sampled_from_end_to_end(name):
    from matplotlib import colormaps

    table = explainability.colours_of(FigureStyle(colormap=name)) / 255
    assert np.abs(table - [colormaps[name](place / 255)[:3] for place in range(256)]).max() < 0.01
    assert len(np.unique(table, axis=0)) >= min(colormaps[name].N, 200)


@pytest.mark.parametrize("style", (STYLE, FigureStyle(colormap="gray"), SIGNED))
def test_colour_bar_and_reading_guide_show_the_colours_that_they_speak_of(style):
    low, middle, high = explainability.colours_of(style)[[0, 128, 255]]
    figures = both_figures(view(style=style), pair(raw_map=CORNER - OTHER_CORNER))
    for figure in figures:
        for bar in bars(figure):
            beside = [line for line in lines(figure) if bar.y < line.baseline < extent(bar)[3] + 0.1]
            ticks = [line for line in beside if abs(line.x - bar.x - 0.22) < 0.01]
            assert [float(tick.text) for tick in ticks] == ([-1, 0, 1] if style.signed else [0, 0.5, 1])
            for tick, colour in zip(ticks, (low, middle, high)):
                row = round((tick.baseline - tick.look.points * 0.365 / 72 - bar.y) * 150)
                row = min(max(row, 3), len(bar.pixels) - 4)
                assert np.abs(rendered(figure, bar)[row, 10] - colour).max() < 12
            (label,) = (line for line in beside if line.is_upright)
            ink = np.rot90(255 - rendered(figure, label)[:, :, 0], -1).sum(axis=0)
            strip = explainability.text_strip(label.text, label.look, 150)[:, :, 3].sum(axis=0, dtype=int)
            start = (len(strip) - len(ink)) // 2
            assert np.corrcoef(ink, strip[start : start + len(ink)])[0, 1] > 0.9
    filled = [item for item in figures[0].items if isinstance(item, Box) and not item.line]
    swatches = [box for box in filled if box.width == 0.22]
    texts = ("Raised", "Lowered") if style.signed else ("High attention", "Low attention")
    for text, swatch, colour in zip(texts, swatches, (high, low), strict=True):
        assert swatch.y < line_with(figures[0], text).baseline < swatch.y + 0.15
        assert (rendered(figures[0], swatch)[8, 8] == colour).all()


def test_probability_bars_are_as_long_as_the_probabilities():
    told = {"class_names": tuple("ABC"), "probabilities": np.float32([0.2, 0.7, 0.1]), "explained": 2}
    figure = explanation_figure(view(), an_explanation(**told))
    boxes = [box for box in figure.items if isinstance(box, Box) and box.height == 0.075]
    for name, share, track, bar in zip("BAC", (0.7, 0.2, 0.1), boxes[::2], boxes[1::2], strict=True):
        label = next(line for line in lines(figure) if line.text == name and line.look.points == 10)
        assert 0 < track.y - label.baseline < 0.12 and (track.x, track.y) == (bar.x, bar.y)
        assert (track.colour, bar.colour) == (explainability.TRACK, explainability.BAR)
        assert bar.width / track.width == pytest.approx(share)
        assert f"{share:.2%}" in [line.text for line in lines(figure) if line.baseline == label.baseline]
        assert label.look.is_bold == (name == "B")  # predicted; explained is C
    assert "Grad-CAM Heatmap: C" in words(figure) and "10.00% C" in words(figure)


def test_rows_of_the_comparison_show_the_model_that_they_name():
    figure = comparison_figure(view(), sharing(OTHER_CORNER))
    tops = [line_with(figure, title).baseline for title in ("ConvNeXt V2:", "EfficientNetV2-S:")]
    (_, *first), (_, *last) = pictures(figure)[:3], pictures(figure)[3:]
    assert tops[0] < first[0].y == first[1].y < tops[1] < last[0].y == last[1].y
    for shown, hot in ((first, 10), (last, -10)):
        assert all(picture.pixels[hot, hot, 0] > 50 + int(picture.pixels[hot, hot, 2]) for picture in shown)
        assert shown[0].pixels[-hot, -hot, 0] < shown[0].pixels[-hot, -hot, 2]


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
    cone = (1 - np.hypot(*np.mgrid[-3:4, -3:4]) / 3).clip(0).astype(np.float32)
    figure = explanation_figure(view(style=FigureStyle(contours=True)), an_explanation(raw_map=cone))
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
    overlay = explainability.overlay_pixels(grey(300, 300), an_explanation(raw_map=slope), style)
    red, _, blue = np.moveaxis(overlay.astype(int), 2, 0)
    assert (red > blue + 30)[:, 150:].any() and not (red > blue + 30)[:, :150].any()
    assert (blue > red + 30)[:, :150].any() and not (blue > red + 30)[:, 150:].any()


def test_known_fractures_are_outlined_on_heatmap_and_overlay_alone():
    for figure, plain in zip(both_figures(view(boxes=(BOX,)), pair()), both_figures(view(), pair())):
        for picture, bare in zip(pictures(figure), pictures(plain)):
            changed = (rendered(figure, picture) != rendered(plain, bare)).any(axis=2)
            if picture.title.startswith("Original"):
                assert not changed.any()
                continue
            rows, columns = (np.nonzero(changed.any(axis=axis))[0][[0, -1]] for axis in (1, 0))
            height, width = changed.shape
            half = 1 / 14  # a thin line shows what counts as inside: half a cell more
            assert columns / width == pytest.approx((0.25 - half, 0.75 + half), abs=0.01)
            assert rows / height == pytest.approx((0.5 - half, 0.6 + half), abs=0.01)
            assert changed[round(0.55 * height), round(0.25 * width) - 1 : round(0.25 * width) + 2].any()
        assert "Dashed: the true fracture" in words(figure)


def test_numbers_stay_with_their_sign_and_flags_come_first():
    findings = (Finding("neighbours", 0.6, False, "2 of 3 cases alike"), *FLAGGED)
    told = an_explanation(findings=findings, pointing=explainability.Pointing(False, 1.0, 0.46))
    figure = explanation_figure(view(boxes=(BOX,)), told)
    assert "100\u00a0% of the heat inside, 46\u00a0% of the area" in [line.text for line in lines(figure)]
    assert line_with(figure, "Attention on irr").look.colour == explainability.WARNING
    texts = ("71 % of", "⚠ Maximum outside", "2 of 3", "Passed:", "stages.3")
    assert sorted(texts, key=words(figure).index) == list(texts)
    assert words(figure).count("Comminuted Fracture") == 3  # heatmap's title, prediction, its probability


def test_names_that_the_own_font_lacks_are_drawn_with_another_or_as_boxes():
    own = explainability.font_file("a.png", False)
    other = own.replace("DejaVuSans", "STIXGeneral")  # also comes with matplotlib
    rare = min(filter(str.isprintable, explainability.characters(other) - explainability.characters(own)))
    unknown = "\N{YI SYLLABLE LEP}\N{TANGUT COMPONENT-001}\N{CUNEIFORM SIGN A}"  # of no one font
    for name, shown in ((f"a{rare}", f"a{rare}"), (f"a{unknown}.png", "a□□□.png"), ("\x07.png", r"\x07.png")):
        figure = explanation_figure(view(name=name), an_explanation())
        check_layout(figure)
        assert line_with(figure, shown).look == explainability.NAME
        assert ("□: a character" in words(figure)) == ("□" in shown)
    assert "STIX" in explainability.font_file(f"a{rare}", False) and "DejaVu" in own


# Files


def written(folder: Path, extension: str, name: str = "wrist_0001.jpg") -> Path:
    style = FigureStyle(format=extension)
    figure, path = comparison_figure(view(name=name), pair(findings=FLAGGED)), folder / f"figure.{extension}"
    path.write_bytes(figure_bytes(figure, style, "0123abcd"))
    return path


def test_png_holds_every_pixel_its_resolution_and_the_digest(tmp_path):
    for dpi in (72, 150):
        figure = explanation_figure(view(style=FigureStyle(dpi=dpi)), an_explanation())
        (tmp_path / "x.png").write_bytes(figure_bytes(figure, FigureStyle(dpi=dpi), "abc"))
        Image.open(tmp_path / "x.png").verify()  # checksums
        with Image.open(tmp_path / "x.png") as page:
            assert (page.format, page.mode, page.info["Digest"]) == ("PNG", "RGB", "abc")
            assert page.size == (round(figure.width * dpi), round(figure.height * dpi))
            assert page.info["dpi"] == pytest.approx((dpi, dpi), abs=0.1)
            assert (np.asarray(page) == sheet_pixels(figure, dpi)).all()


@pytest.mark.slow
@pytest.mark.parametrize("extension", ("png", "pdf", "svg"))
def test_same_input_gives_the_same_bytes_with_a_digest_that_whole_files_alone_have(tmp_path, extension):
    path = written(tmp_path, extension)
    whole = path.read_bytes()
    assert digest_in(path) == "0123abcd" and written(tmp_path, extension).read_bytes() == whole
    path.write_bytes(whole[:-500])
    assert digest_in(path) is None and digest_in(tmp_path / f"absent.{extension}") is None


def test_vector_figures_hold_each_picture_once_and_their_fonts_or_shapes(tmp_path):
    page, drawing = written(tmp_path, "pdf"), written(tmp_path, "svg", "--><script>x</script>").read_text()
    assert b"/FontFile2" in page.read_bytes() and page.read_bytes().count(b"/Subtype /Image") == 8
    assert drawing.count("<image ") == 8  # six panels and two colour bars
    assert "<text" not in drawing and "font-family" not in drawing and "<script" not in drawing
    if shutil.which("pdftotext"):
        said = subprocess.run(["pdftotext", "-layout", page, "-"], capture_output=True, text=True).stdout
        assert all(text in said for text in ("Both models agree: Comm", "wrist_0001.jpg", DARK, "importance"))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("pdftoppm"), reason="pdftoppm is not installed")
def test_pdf_looks_like_the_png(tmp_path):
    ends = written(tmp_path, "pdf"), tmp_path / "drawn"
    subprocess.run(["pdftoppm", "-r", "150", "-png", "-singlefile", *ends], check=True)
    with Image.open(tmp_path / "drawn.png") as vector, Image.open(written(tmp_path, "png")) as page:
        size = (page.width // 8, page.height // 8)
        both = [each.convert("RGB").resize(size, Image.Resampling.BOX) for each in (vector, page)]
    far = np.abs(np.subtract(*(np.asarray(each, int) for each in both)))
    assert far.mean() < 3 and (far.max(axis=2) > 60).mean() < 0.005


@pytest.mark.slow
@pytest.mark.parametrize("extension", ("png", "svg"))
def test_nobodys_matplotlib_settings_reach_a_figure(tmp_path, extension):
    expected = written(tmp_path, extension).read_bytes()
    poison = "text.usetex: True\nfont.family: serif\nfont.size: 30\nfigure.autolayout: True"
    (tmp_path / "matplotlibrc").write_text(f"{poison}\npath.sketch: 1, 100, 2\nsavefig.bbox: tight\n")
    folders = [str(Path(each).parent) for each in (__file__, explainability.__file__)]
    script = f"""
import sys
sys.path[:0] = {folders!r}
import test_figures
test_figures.written(test_figures.Path({str(tmp_path)!r}), {extension!r})
"""
    places = dict.fromkeys(("MATPLOTLIBRC", "MPLCONFIGDIR"), str(tmp_path))
    done = in_new_process("-c", script, MPLBACKEND="module://nowhere", **places)
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / f"figure.{extension}").read_bytes() == expected

"""Checks of heatmaps: constructed maps and radiographs whose values are known by arithmetic."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import an_explanation
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import explainability
from explainability import (
    CELLS, CHECKED_SIDE, CHECKS, Evidence, Landmarks, Radiograph, Trial,
    audit_lines, box_mask, checks_text, connected, dense_shares, findings_of, flagged_findings,
    heat_on_cells, hot_mask, landmarks_of, map_agreement, marker_masks, mean_correlation, moved_masks,
    otsu_threshold, over_windows, with_filled, without_detail,
)  # fmt: skip

EVERYWHERE = Landmarks(np.ones((CELLS, CELLS)), ())  # dense all over, no marker
UNIFORM = np.ones((7, 7), np.float32)
BORDER_ONLY = np.pad(np.zeros((5, 5), np.float32), 1, constant_values=1)
CENTRE_ONLY = np.pad(np.ones((1, 1), np.float32), 3)
ALMOST_UNIFORM = UNIFORM + 1e-6 * CENTRE_ONLY  # so that it is no constant map
LOW, HIGH = np.float32([0.06, 0.94]), np.float32([0.04, 0.96])  # below and above the guide's 95 %


def checked(raw_map, landmarks=EVERYWHERE, trial=None, **changed):
    explanation = an_explanation(raw_map=raw_map, **changed)
    return dataclasses.replace(explanation, findings=findings_of(Evidence(explanation, landmarks, trial)))


def findings(*given, **changed):
    return {finding.check: finding for finding in checked(*given, **changed).findings}


def spot(row, column, side=7):
    raw_map = np.zeros((side, side), np.float32)
    raw_map[row, column] = 2
    return raw_map


# Quantities


@pytest.mark.parametrize(
    ("raw_map", "border", "focus"),
    [
        (ALMOST_UNIFORM, 24 / 49, 0.25),
        (BORDER_ONLY, 1, 12.25 / 24),
        (CENTRE_ONLY - 5 * BORDER_ONLY, 0, 1),  # negative evidence is no heat
        (np.repeat(np.repeat(ALMOST_UNIFORM, 2, 0), 2, 1), 24 / 49, 0.25),  # 14 x 14
        (np.repeat(np.repeat(BORDER_ONLY, 4, 0), 4, 1), 1, 12.25 / 24),  # 28 x 28
        (np.float32([[2, 2 + 1e-6]]), 24 / 49, 0.25),  # a grid of 1 x 2 tells nothing
        (spot(1, 1, side=3), 0, 1),  # the middle third lies off the frame
    ],
)
def test_border_and_focus_mean_the_same_share_of_the_area_on_every_grid(raw_map, border, focus):
    found = findings(raw_map)
    assert found["border"].value == pytest.approx(border, abs=1e-5)
    assert found["focus"].value == pytest.approx(focus, abs=1e-5)


@pytest.mark.parametrize("shape", [(7, 7), (10, 10), (28, 28), (224, 224), (5, 9), (2, 3)])
def test_heat_keeps_its_sum_and_its_centre_on_the_checks_grid(shape):
    raw_map = np.random.default_rng(3).normal(size=shape)
    heat = heat_on_cells(raw_map)
    positive = np.maximum(raw_map, 0) / np.maximum(raw_map, 0).sum()
    assert heat.shape == (CELLS, CELLS) and heat.sum() == pytest.approx(1)
    for axis, length in enumerate(shape):
        centre = positive.sum(axis=1 - axis) @ ((np.arange(length) + 0.5) / length)
        assert heat.sum(axis=1 - axis) @ ((np.arange(CELLS) + 0.5) / CELLS) == pytest.approx(centre, abs=0.5 / CELLS)


def test_heat_of_a_cell_that_two_cells_share_is_parted_by_area():
    raw_map = spot(0, 1, side=2)  # columns 3.5 to 7 of 7, rows 0 to 3.5
    expected = np.zeros((7, 7))
    expected[np.ix_(range(4), range(3, 7))] = np.outer([1, 1, 1, 0.5], [0.5, 1, 1, 1]) / 3.5**2
    assert heat_on_cells(raw_map) == pytest.approx(expected)


def test_dark_heat_counts_the_cells_without_bone():
    dense, raw_map = np.zeros((7, 7)), np.zeros((7, 7), np.float32)
    dense[:, 3] = 0.02  # just enough
    dense[:, 4] = 0.019
    raw_map[2, 3], raw_map[2, 4], raw_map[2, 6] = 6, 3, 1
    found = findings(raw_map, Landmarks(dense, ()))["dark"]
    assert found.value == pytest.approx(0.4) and found.is_flagged
    assert found.text == "40 % of the heat lies where nothing as dense as bone is"


def test_marker_heat_counts_every_cell_that_a_box_touches():
    raw_map = np.zeros((7, 7), np.float32)
    raw_map[0, 0], raw_map[0, 1], raw_map[1, 1], raw_map[0, 2], raw_map[2, 0] = 1, 2, 3, 10, 84
    box = (20, 5, 64, 64)  # columns and rows 0 and 1: 64 is where the next begin
    found = findings(raw_map, Landmarks(np.ones((7, 7)), (box,)))["markers"]
    assert found.value == pytest.approx(0.06) and not found.is_flagged
    assert findings(raw_map)["markers"].value == 0


@pytest.mark.parametrize(
    ("first", "second", "share"),
    [
        (CENTRE_ONLY, CENTRE_ONLY * 9, 1),
        (CENTRE_ONLY, BORDER_ONLY, 0),
        (spot(2, 2) + spot(4, 4), spot(4, 4) - spot(0, 0), 0.5),
    ],
)
def test_map_agreement_is_the_heat_that_two_maps_share(first, second, share):
    pair = [an_explanation(raw_map=each) for each in (first, second)]
    for explanations in (pair, pair[::-1]):
        found = map_agreement(explanations)
        assert found.value == pytest.approx(share) and found.is_flagged == (share < 0.05)
        assert found.text == f"the two maps share {100 * share:.0f} % of their heat"


@pytest.mark.parametrize(
    ("raw_map", "words"),
    [(-UNIFORM, "Blank map: no positive evidence for Comminuted Fracture"), (UNIFORM, "Constant map"), (0 * UNIFORM, "Blank map")],
)
def test_of_a_blank_or_constant_map_only_that_is_told(raw_map, words):
    pair = [checked(raw_map), checked(CENTRE_ONLY)]
    assert [finding.check for finding in pair[0].findings] == ["blank", "confidence"]
    assert pair[0].findings[0].is_flagged and words in checks_text(pair[0].findings)
    assert map_agreement(pair) is None and map_agreement(pair[1:]) is None


def test_confidence_is_counted_apart_from_the_map_checks():
    low, high = findings(CENTRE_ONLY, probabilities=LOW), findings(CENTRE_ONLY, probabilities=HIGH)
    assert low["confidence"].is_flagged and not high["confidence"].is_flagged
    assert checks_text(list(low.values())) == checks_text(list(high.values())) == "5 map checks passed"


@pytest.mark.parametrize(
    ("raw_map", "landmarks", "expected"),
    [
        (BORDER_ONLY + 99 * spot(0, 3), EVERYWHERE, {"border"}),
        (ALMOST_UNIFORM, EVERYWHERE, {"focus"}),
        (np.indices((7, 7)).sum(axis=0) % 2, EVERYWHERE, {"focus"}),  # a checkerboard
        (CENTRE_ONLY, Landmarks(np.zeros((7, 7)), ()), {"dark"}),
        (CENTRE_ONLY, Landmarks(np.ones((7, 7)), ((100, 100, 110, 110),)), {"markers"}),
        (spot(0, 6), Landmarks(np.zeros((7, 7)), ()), {"border", "dark"}),
        (CENTRE_ONLY, EVERYWHERE, set()),
    ],
)
def test_each_fault_of_a_map_is_flagged_under_its_own_name(raw_map, landmarks, expected):
    found = checked(raw_map, landmarks).findings
    assert {finding.check for finding in flagged_findings(found, "map")} == expected
    start = f"{len(expected)} of 5 map checks flagged: " if expected else "5 map checks passed"
    assert checks_text(found).startswith(start)


@pytest.mark.parametrize(
    ("check", "limit", "above"),
    [
        ("border", 0.5, True), ("dark", 0.35, True), ("markers", 0.2, True), ("focus", 0.8, False),
        ("map_agreement", 0.05, False), ("confidence", 0.95, False), ("covering", 0.1, True), ("erasing", 0.75, True),
        ("unlike", 0.05, False),
    ],
)  # fmt: skip
def test_thresholds(check, limit, above):
    flags = CHECKS[check].flags
    assert CHECKS[check].limit == limit
    told = [flags(value, limit) for value in (limit - 0.01, limit, limit + 0.01, np.nan)]
    assert told == [not above, False, above, False]


# What a radiograph shows


def test_otsu_parts_two_kinds_of_pixels_and_leaves_one_kind_whole():
    assert 12 <= otsu_threshold(np.uint8([[10, 12, 11, 200], [10, 210, 205, 12]])) < 200
    assert otsu_threshold(np.full((4, 4), 9, np.uint8)) == 255


def test_windows_of_minima_and_maxima_have_the_width_they_say():
    values = np.zeros((15, 21), np.uint8)
    values[7, 10] = 5
    spread = over_windows(values, 4, np.maximum)
    assert (spread == 5).sum() == 81 and (spread[3:12, 6:15] == 5).all()
    assert not over_windows(spread, 5, np.minimum).any() and over_windows(spread, 4, np.minimum).sum() == 5


def test_dense_share_of_a_cell():
    grey = np.zeros((CHECKED_SIDE, CHECKED_SIDE), np.uint8)
    grey[64:96, 32:48] = 200  # the left half of cell (2, 1)
    shares = dense_shares(grey)
    assert shares[2, 1] == pytest.approx(0.5, abs=0.05) and shares[2, 3] == shares[1, 2] == 0
    assert not dense_shares(np.full_like(grey, 77)).any()


def test_connected_parts_are_those_that_a_flood_finds():
    mask = np.random.default_rng(5).random((40, 55)) < 0.35
    numbers = {place: index for index, place in enumerate(zip(*(each.tolist() for each in mask.nonzero())))}
    expected = {}
    for start in numbers:
        waiting = [start]
        while waiting:
            row, column = place = waiting.pop()
            if place in numbers and place not in expected:
                expected[place] = numbers[start]
                waiting += [(row + down, column + right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    assert connected(mask).tolist() == [expected[place] for place in numbers]


def limb(marker="", at=(24, 150), points=18):
    """A dark field with a bright bone with brighter edges up the middle and, on demand, letters."""
    columns = np.arange(CHECKED_SIDE)
    row = 20 + 110 * (abs(columns - 110) < 24) + 60 * (abs(abs(columns - 110) - 21) < 3)
    page = Image.fromarray(np.tile(row.astype(np.uint8), (CHECKED_SIDE, 1)))
    ImageDraw.Draw(page).text(at, marker, fill=240, font=ImageFont.load_default(points))
    return np.repeat(np.asarray(page)[:, :, None], 3, axis=2)


def seen_in(pixels):
    return landmarks_of(Radiograph(pixels))


@pytest.mark.parametrize(("marker", "points"), [("R", 14), ("L", 18), ("R", 26), ("ERECT", 16), ("R 12:41", 14)])
def test_markers_are_found_where_they_are(marker, points):
    boxes = seen_in(limb(marker, (24, 150), points)).markers
    assert boxes
    for x0, y0, x1, y1 in boxes:
        assert 20 <= x0 < x1 <= 84 and 148 <= y0 < y1 <= 182
    assert seen_in(limb()).markers == ()


@pytest.mark.parametrize("is_text", [True, False])
def test_text_is_found_beside_bone_as_well(is_text):
    pixels = np.full((CHECKED_SIDE, CHECKED_SIDE, 3), 20, np.uint8)
    pixels[:, 80:150] = 200
    for top in range(100, 130, 6):
        pixels[top : top + (3 if is_text else 6), 72:77] = 230  # hardly brighter than the bone next to it
    assert seen_in(pixels).markers == (((72, 100, 77, 127),) if is_text else ())


def angle(pixels, left, grey=240, top=150):
    """An L of 10 x 16 pixels."""
    pixels[top : top + 16, left : left + 3] = pixels[top + 13 : top + 16, left : left + 10] = grey
    return pixels


@pytest.mark.parametrize(("gap", "count"), [(4, 1), (9, 2)])
def test_strokes_close_together_are_one_marker(gap, count):
    assert len(seen_in(angle(angle(limb(), 24), 34 + gap)).markers) == count


@pytest.mark.parametrize(("grey", "blur", "is_found"), [(120, 0, True), (45, 0, False), (240, 1, True), (240, 4, False)])
def test_a_marker_is_bright_and_sharp(grey, blur, is_found):
    page = Image.fromarray(angle(limb(), 24, grey))  # on 20, in a range of 170
    assert bool(seen_in(np.asarray(page.filter(ImageFilter.GaussianBlur(blur)))).markers) == is_found


def test_strokes_that_run_on_along_the_line_are_no_text(monkeypatch):
    pixels = limb()
    pixels[40:130, 20:23] = pixels[40:130, 28:31] = 240  # both cortices of a slender bone
    pixels[60:120:12, 25:26] = 240  # and what lies between them
    assert seen_in(pixels).markers == ()
    monkeypatch.setattr(explainability, "LONGEST_STROKE", 1)
    assert len(seen_in(pixels).markers) == 1


@pytest.mark.parametrize("scale", [(3, 2), (0.9, 1.4)])
def test_landmarks_do_not_depend_on_the_size_of_the_file(scale):
    size = [round(CHECKED_SIDE * each) for each in scale]
    resized = np.asarray(Image.fromarray(limb("R", points=24)).resize(size, Image.Resampling.BICUBIC))
    (box,) = seen_in(resized).markers
    (expected,) = seen_in(limb("R", points=24)).markers
    assert box == pytest.approx(expected, abs=2)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((1, 1, 3), np.uint8),
        np.full((9, 700, 3), 255, np.uint8),
        np.random.default_rng(1).integers(0, 256, (300, 200, 3), dtype=np.uint8),
        np.pad(np.full((30, 4, 3), 240, np.uint8), ((150, 44), (24, 196), (0, 0))),  # a strip: a pin, or the field's edge
    ],
)
def test_images_that_show_nothing_have_no_markers(pixels):
    assert seen_in(pixels).markers == ()


# --verify


def odds(*probabilities):
    """Scores of two classes that give the first these probabilities."""
    return np.array([[np.log(each / (1 - each)), 0] for each in probabilities]).reshape(-1, 2)


def a_trial(**changed):
    usual = {
        "blurred": odds(0.3),
        "added": odds(0.9, 0.94),
        "covered": odds(0.9, 0.9),  # with markers, and as much elsewhere
        "erased": odds(0.1, 0.9, 0.7, 0.95),  # the hot area, and moved masks
    }
    return Trial(**{**usual, **changed})


def verified(markers=((10, 10, 30, 30),), explained=0, **changed):
    landmarks = Landmarks(np.ones((7, 7)), markers)
    told = {"probabilities": np.float32([0.95, 0.05]), "explained": explained}
    found = findings(CENTRE_ONLY, landmarks, a_trial(**changed), **told)
    return {key: finding for key, finding in found.items() if CHECKS[key].about in explainability.ASKED_AGAIN}


@pytest.mark.parametrize(
    ("covered", "elsewhere", "fall", "is_flagged"),
    [
        (0.25, 0.94, 0.69, True),
        (0.25, 0.30, 0.05, False),  # as much elsewhere does the same
        (0.86, 0.95, 0.09, False),
        (0.99, 0.95, -0.04, False),
    ],
)
def test_covering_the_markers_counts_beyond_covering_elsewhere(covered, elsewhere, fall, is_flagged):
    found = verified(explained=1, covered=odds(covered, elsewhere))["covering"]  # of the predicted class all the same
    assert found.value == pytest.approx(fall) and found.is_flagged == is_flagged
    change = f"{'lowers' if covered < 0.95 else 'takes'} Comminuted Fracture from 95 % to {100 * covered:.0f} %"
    assert found.text == f"covering the side marker {change}; covering as much elsewhere, {100 * elsewhere:.0f} %"


def test_a_marker_that_is_added_must_not_count():
    found = verified(explained=1, added=odds(0.25, 0.94))["adding"]
    assert found.value == pytest.approx(0.70) and found.is_flagged
    assert found.text == "a letter set in a corner lowers Comminuted Fracture from 95 % to 25 %"
    calm = verified(added=odds(0.95, 0.93))["adding"]
    assert not calm.is_flagged
    assert calm.text == "a line of text set in a corner lowers Comminuted Fracture from 95 % to 93 %"


@pytest.mark.parametrize("side", [32, 224, 384])
def test_writing_is_bright_and_lies_in_the_darkest_corner(side):
    image = np.full((3, side, side), 2, np.float32)
    image[:, side // 2 :, : side // 2] = -1  # bottom left
    image[1, 0, 0] = 5
    for _, text in explainability.ADDED:
        changed = explainability.with_writing(image, text)
        rows, columns = (changed != image).any(axis=0).nonzero()
        assert rows.size and rows.min() >= side // 2 and columns.min() >= 8 * side // 224
        assert columns.max() < (side // 2 if text == "L" else side)
        assert 12 * side // 224 < np.ptp(rows) + 1 < 22 * side / 224  # capitals of 22 pixels
        assert (changed.max(axis=(1, 2)) == image.max(axis=(1, 2))).all() and (changed >= image).all()


@pytest.mark.parametrize(("hot", "rank"), [(0.1, 0), (0.8, 1 / 3), (0.92, 2 / 3), (0.99, 1)])
def test_erasing_compares_the_hot_area_with_moved_masks(hot, rank):
    found = verified(erased=odds(hot, 0.9, 0.7, 0.95))["erasing"]
    assert found.value == pytest.approx(rank) and found.is_flagged == (rank > 0.75)
    assert f"leaves Comminuted Fracture at {100 * hot:.0f} %; " in found.text
    assert f"in 3 other places, 90 % (log-odds {odds(hot)[0, 0]:+.1f} against +2.2)" in found.text  # the median one


def test_erasing_asks_about_the_explained_class_and_not_the_predicted_one():
    found = verified(explained=1, blurred=odds(0.7), erased=odds(0.4, 0.9, 0.2, 0.95, 0.3))["erasing"]
    assert found.value == pytest.approx(0.5)  # two of four take more from class 1 than the hot area does
    assert found.text.startswith("erasing the hot area leaves Simple Fracture at 60 %; ")


def test_the_default_class_cannot_be_tested_by_erasing():
    found = verified(blurred=odds(0.95))
    assert found["default"].text == "with everything blurred it says Comminuted Fracture at 95 %"
    assert np.isnan(found["erasing"].value) and not found["erasing"].is_flagged
    explanation = checked(CENTRE_ONLY, EVERYWHERE, a_trial(blurred=odds(0.95)), probabilities=HIGH[::-1])
    assert explainability.model_cells([explanation], "")["convnext_erasing"] == "untestable"
    lines = explainability.network_lines(explanation, "")
    assert "everything blurred" in lines[1] and not any("rasing" in line for line in lines)


def test_without_markers_or_heat_there_is_nothing_to_cover_or_erase():
    nothing = {"covered": odds(), "erased": odds()}
    assert set(verified(markers=(), **nothing)) == {"adding", "default"}
    everywhere = verified(**nothing)["covering"]
    assert np.isnan(everywhere.value) and not everywhere.is_flagged
    assert everywhere.text.startswith("covering the markers cannot be tested")


def test_blur_keeps_constants_and_spreads_by_eight_pixels_of_224():
    image = np.zeros((3, 224, 224), np.float32)
    image[1, 112, 112] = 1
    spread = without_detail(image)[1]
    assert spread.sum() == pytest.approx(1, rel=1e-4)
    assert np.sqrt(spread.sum(axis=0) @ (np.arange(224) - 112) ** 2) == pytest.approx(8, rel=1e-3)
    assert without_detail(np.full((3, 224, 224), 2, np.float32)) == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize("box", [(10, 20, 30, 50), (0, 0, 12, 9), (200, 215, 224, 224), (0, 40, 224, 60)])
def test_covering_continues_the_surroundings(box):
    ramp = np.tile(np.linspace(0, 1, 224, dtype=np.float32), (3, 224, 1))
    x0, y0, x1, y1 = box
    marked = ramp.copy()
    marked[:, y0:y1, x0:x1] = 9
    filled = with_filled(marked, [box])
    assert (filled[:, ~box_mask([box], 224)] == ramp[:, ~box_mask([box], 224)]).all()
    assert (marked[:, y0:y1, x0:x1] == 9).all()
    is_at_edge = (x0 == 0) != (x1 == 224)  # there one side cannot tell
    assert filled == pytest.approx(ramp, abs=0.15 if is_at_edge else 1e-5)


@pytest.mark.parametrize("side", [224, 300])
def test_as_much_is_covered_elsewhere_and_away_from_the_markers(side):
    boxes, elsewhere = marker_masks([(100, 8, 124, 30)], side)  # its left-right mirror image would be itself
    ((x0, y0, x1, y1),), ((u0, v0, u1, v1),) = boxes, elsewhere
    assert (x0, y0, x1, y1) == tuple(round(end * side / 224) for end in (96, 4, 128, 34))
    assert (u1 - u0, v1 - v0) == (x1 - x0, y1 - y0) and v0 >= side // 2


CORNERS = [(4, 4, 34, 24), (190, 4, 220, 24), (4, 200, 34, 220), (190, 200, 220, 220)]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_markers_in_several_corners_are_compared_with_other_places(count):
    assert marker_masks([(0, 0, 224, 100), (0, 124, 224, 224)], 224)[1] is None  # they lie everywhere
    boxes, elsewhere = marker_masks(CORNERS[:count], 224)
    covered, others = box_mask(boxes, 224), box_mask(elsewhere, 224)
    assert (covered & others).sum() < 0.25 * covered.sum() and others.sum() > 0.75 * covered.sum()


def test_the_hot_area_is_a_fifth_of_the_image_or_all_that_has_heat():
    ramp = np.arange(49, dtype=np.float32).reshape(7, 7) / 48
    assert hot_mask(ramp, 224).mean() == pytest.approx(0.2, abs=0.01)
    spot_mask = hot_mask(CENTRE_ONLY, 224)
    assert spot_mask[112, 112] and not spot_mask[:, :64].any() and spot_mask.mean() < 0.1


def test_moved_masks_are_as_large_and_hardly_overlap():
    mask = hot_mask(spot(1, 2) + spot(5, 4), 224)
    moved = moved_masks(mask)
    assert len({each.tobytes() for each in moved}) == 13
    assert all(each.sum() == mask.sum() and (each & mask).sum() < 0.25 * mask.sum() for each in moved)
    assert [each.tobytes() for each in moved_masks(mask)] == [each.tobytes() for each in moved]
    assert moved_masks(np.ones((224, 224), bool)) == []


def test_verifying_takes_at_most_19_passes_and_no_more_at_once_than_a_batch(tiny_classifiers):
    classifier, sizes = tiny_classifiers["efficientnet"], []
    image = np.random.default_rng(2).normal(size=(3, 64, 64)).astype(np.float32)
    landmarks = Landmarks(np.ones((7, 7)), ((5, 5, 25, 25),))
    with classifier.network.register_forward_pre_hook(lambda network, inputs: sizes.append(len(inputs[0]))):
        trial = explainability.tried(classifier, image, an_explanation(raw_map=CENTRE_ONLY), landmarks, 8)
    assert sizes == [8, 8, 3] and trial.passes == 19


# Over a run


def observations(heats, landmarks=EVERYWHERE, **changed):
    found = [checked(heat, landmarks, **changed) for heat in heats]
    return [explainability.observation(each, landmarks) for each in found]


def scattered(count=40):
    rng = np.random.default_rng(8)
    return [spot(*rng.integers(1, 6, 2)) + 0.1 * spot(*rng.integers(1, 6, 2)) for _ in range(count)]


def test_mean_correlation_is_that_of_all_pairs():
    heats = np.random.default_rng(4).random((6, 7, 7))
    pairs = np.corrcoef(heats.reshape(6, 49))[np.triu_indices(6, 1)]
    assert mean_correlation(heats) == pytest.approx(pairs.mean())
    assert mean_correlation(np.stack([CENTRE_ONLY] * 5)) == pytest.approx(1)


def test_the_audit_flags_what_the_maps_of_a_run_have_in_common():
    landmarks = Landmarks(np.zeros((7, 7)), ((32, 32, 192, 192),))
    corner = [spot(0, 6) + 0.3 * each for each in scattered()]
    assert audit_lines(observations(corner, landmarks)) == [
        "🚩 Same place in every image, mean correlation of the maps: 0.92, flagged above 0.50",
        "🚩 Same hottest cell: 100 %, flagged above 50 %",
        "🚩 Mean heat where nothing as dense as bone is: 100 %, flagged above 25 %",
        "🚩 Mean heat on markers, where there are any: 25 %, flagged above 10 %",
    ]
    lines = audit_lines(observations(scattered()))
    assert len(lines) == 3 and "🚩" not in "".join(lines)


def test_the_audit_tells_blank_maps_by_class():
    mixed = observations([-UNIFORM] * 18 + scattered(4), explained=1) + observations(scattered(20))
    lines = audit_lines(mixed)
    assert "🚩 Blank maps for Simple Fracture: 82 %, flagged above 50 %" in lines
    assert not any("Comminuted" in line for line in lines)


def test_the_audit_of_few_maps_says_that_they_are_few():
    few = "Same place in every image: needs 20 maps that are not blank, here 5"
    assert audit_lines(observations(scattered(5) + [-UNIFORM])) == [few] and audit_lines([]) == []


# Whole runs


def test_one_image_tells_its_findings_and_the_cost_of_verifying(tiny_arguments, tmp_path, capsys):
    Image.fromarray(limb("R", points=20)).save(tmp_path / "a.png")
    options = ["--image", str(tmp_path / "a.png"), "--no-figures", "--verify"]
    assert explainability.main([*tiny_arguments, *options]) == 0
    said = capsys.readouterr().out
    assert said.count("map checks ") == 2 and said.count("Verified with 19 more forward passes") == 2
    assert said.count("overing the side marker ") == 2 and said.count("everything blurred it says ") == 2

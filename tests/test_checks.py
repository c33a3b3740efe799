"""Checks of heatmaps: constructed maps and radiographs whose values are known by arithmetic."""

import dataclasses

import numpy as np
import pytest
from conftest import a_model, an_explanation
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import explainability as tool
from explainability import CHECKED_SIDE, CHECKS, Evidence, Landmarks, Trial

EVERYWHERE = Landmarks(np.ones((7, 7)), ())  # dense all over, no marker
UNIFORM = np.ones((7, 7), np.float32)
BORDER_ONLY = np.pad(np.zeros((5, 5), np.float32), 1, constant_values=1)
CENTRE_ONLY = np.pad(np.ones((1, 1), np.float32), 3)
ALMOST_UNIFORM = UNIFORM + 1e-6 * CENTRE_ONLY  # so that it is no constant map
SLENDER = Landmarks(np.tile([0, 0, 0, 0.02, 0.019, 0, 0], (7, 1)), ())  # just dense enough in one column
MARKED = Landmarks(np.ones((7, 7)), ((40, 63, 96, 65),))  # columns and rows 1 and 2: at 96 the next begins


def checked(raw_map, landmarks=EVERYWHERE, trial=None, **changed):
    explanation = an_explanation(raw_map=raw_map, **changed)
    found = tool.findings_of(Evidence(explanation, landmarks, trial))
    return dataclasses.replace(explanation, findings=found)


def heated(heats):
    """A map that has this heat in these cells."""
    raw_map = np.zeros((7, 7), np.float32)
    for cell, heat in heats.items():
        raw_map[cell] = heat
    return raw_map


def spot(*cell):
    return heated({cell: 2})


@pytest.mark.parametrize("shape", [(7, 7), (10, 10), (28, 28), (224, 224), (5, 9), (1, 2)])
def test_heat_of_each_cell_is_that_of_its_area(shape):
    raw_map = np.random.default_rng(3).normal(size=shape)
    heat = np.kron(np.maximum(raw_map, 0), np.ones((7, 7)))  # so fine that no part lies in two cells
    expected = heat.reshape(7, shape[0], 7, shape[1]).sum(axis=(1, 3)) / heat.sum()
    assert tool.heat_on_cells(raw_map) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("raw_map", "landmarks", "expected"),
    [
        (CENTRE_ONLY - 5 * BORDER_ONLY, EVERYWHERE, {}),  # negative evidence is no heat
        (ALMOST_UNIFORM, EVERYWHERE, {"focus": 0.25}),
        (np.arange(49.0).reshape(7, 7), EVERYWHERE, {"focus": (sum(range(37, 49)) + 36 / 4) / 1176}),
        (BORDER_ONLY, EVERYWHERE, {"border": 1, "focus": 12.25 / 24}),
        (heated({(2, 3): 6, (2, 4): 3, (2, 6): 1}), SLENDER, {"dark": 0.4}),
        (heated({(1, 1): 1, (1, 2): 2, (2, 1): 3, (1, 3): 10, (3, 1): 4}), MARKED, {"markers": 0.3}),
        (spot(0, 6), Landmarks(np.zeros((7, 7)), ()), {"border": 1, "dark": 1}),
    ],
)
def test_each_fault_of_a_map_is_measured_and_flagged_under_its_own_name(raw_map, landmarks, expected):
    for sure, low in ((0.94, {"confidence": 0.94}), (0.96, {})):
        explanation = checked(raw_map, landmarks, probabilities=np.float32([1 - sure, sure]))
        values = {each.check: each.value for each in explanation.findings if each.is_flagged}
        assert values == pytest.approx(expected | low, abs=1e-5)
        start = f"{len(expected)} of 5 map checks flagged: " if expected else "5 map checks passed"
        assert tool.checks_text(explanation.findings).startswith(start)
        for each in explanation.findings[1:5]:
            assert f"{100 * each.value:.0f} % of the heat" in each.text.replace("holds ", "")


def test_map_agreement_is_the_heat_that_two_maps_share():
    both = spot(2, 2) + spot(4, 4)
    for other, share in ((spot(4, 4) - spot(0, 0), 0.5), (BORDER_ONLY, 0), (9 * both, 1)):
        found = tool.map_agreement([an_explanation(raw_map=each) for each in (both, other)])
        assert found.value == pytest.approx(share) and found.is_flagged == (share < 0.05)
        assert found.text == f"the two maps share {100 * share:.0f} % of their heat"


def test_of_a_blank_or_constant_map_only_that_is_told():
    for raw_map, kind in ((-UNIFORM, "Blank"), (0 * UNIFORM, "Blank"), (UNIFORM, "Constant")):
        pair = [checked(raw_map), checked(CENTRE_ONLY)]
        assert [finding.check for finding in pair[0].findings] == ["blank", "confidence"]
        assert pair[0].findings[0].is_flagged and f"{kind} map: no p" in tool.checks_text(pair[0].findings)
        assert tool.map_agreement(pair) is None and tool.map_agreement(pair[1:]) is None


def test_thresholds():
    above = {"border": 0.5, "dark": 0.35, "markers": 0.2, "covering": 0.1, "adding": 0.1, "erasing": 0.75}
    below = {"focus": 0.8, "map_agreement": 0.05, "confidence": 0.95, "unlike": 0.05}
    for check, limit in (above | below).items():
        values = (limit - 0.01, limit, limit + 0.01, np.nan)
        told = [CHECKS[check].flags(value, CHECKS[check].limit) for value in values]
        assert told == [check in below, False, check in above, False]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_maps_that_are_not_finite_are_refused(value):
    broken = heated({(0, 0): value})
    with pytest.raises(ValueError, match="not finite"):
        tool.shared_heat(CENTRE_ONLY, broken)


# What a radiograph shows


def test_windows_connected_parts_and_otsus_threshold_are_those_of_scipy_and_of_their_definition():
    ndimage = pytest.importorskip("scipy.ndimage")
    values = np.random.default_rng(5).random((40, 55))
    for combine, expected in ((np.minimum, ndimage.minimum_filter), (np.maximum, ndimage.maximum_filter)):
        assert (tool.over_windows(values, 4, combine) == expected(values, 9, mode="nearest")).all()
    labels = ndimage.label(values < 0.35, np.ones((3, 3)))[0][values < 0.35]
    _, first, part = np.unique(labels, return_index=True, return_inverse=True)
    assert (tool.connected(values < 0.35) == first[part]).all()
    grey = (255 * values**3).astype(np.uint8)
    parts = [(grey[grey <= limit], grey[grey > limit]) for limit in range(grey.min(), grey.max())]
    within = [sum(part.size * part.var() for part in pair) for pair in parts]
    assert tool.otsu_threshold(grey) == grey.min() + np.argmin(within)
    assert tool.otsu_threshold(np.full((4, 4), 9, np.uint8)) == 255  # no part is bright


def seen_in(pixels):
    return tool.landmarks_of(tool.Radiograph(pixels))


def page(value=0, height=CHECKED_SIDE, width=CHECKED_SIDE):
    return np.full((height, width, 3), value, np.uint8)


def limb(marker="", points=18):
    """A dark field with a bright bone with brighter edges up the middle and, on demand, letters."""
    columns = np.arange(CHECKED_SIDE)
    row = 20 + 110 * (abs(columns - 110) < 24) + 60 * (abs(abs(columns - 110) - 21) < 3)
    image = Image.fromarray(np.tile(row.astype(np.uint8), (CHECKED_SIDE, 1)))
    ImageDraw.Draw(image).text((24, 150), marker, fill=240, font=ImageFont.load_default(points))
    return np.repeat(np.asarray(image)[:, :, None], 3, axis=2)


def with_angle(pixels, left=24, grey=240, blur=0):
    """With an L of 10 x 16 pixels."""
    pixels = pixels.copy()
    pixels[150:166, left : left + 3] = pixels[163:166, left : left + 10] = grey
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(blur)))


def beside_bone(height, step):
    """Strokes of this height one under the other, along a bone that is hardly darker."""
    pixels = page(20)
    pixels[:, 80:150] = 200
    for top in range(100, 130, step):
        pixels[top : top + height, 72:77] = 230
    return pixels


def between_cortices():
    """Strokes of a slender bone; those along it run on, so that they are no text."""
    pixels = limb()
    pixels[40:130, 20:23] = pixels[40:130, 28:31] = pixels[60:120:12, 25:26] = 240
    return pixels


def test_dense_share_of_a_cell():
    pixels = page()
    pixels[64:96, 32:48] = 200  # the left half of cell (2, 1)
    pixels[::7, 100::5] = 200  # noise
    shares = seen_in(pixels).dense
    assert shares[2, 1] == pytest.approx(0.5, abs=0.05) and shares[2, 3] == shares[1, 2] == 0
    assert not seen_in(page(77)).dense.any()


def test_markers_are_found_where_they_are_whatever_the_size_of_the_file():
    for marker, points in (("R", 14), ("L", 18), ("R", 26), ("ERECT", 16), ("R 12:41", 14)):
        boxes = seen_in(limb(marker, points)).markers
        assert boxes and all(20 <= x0 < x1 <= 84 and 148 <= y0 < y1 <= 182 for x0, y0, x1, y1 in boxes)
    (expected,) = seen_in(limb("R", 24)).markers
    for size in ((672, 448), (202, 314)):
        resized = Image.fromarray(limb("R", 24)).resize(size, Image.Resampling.BICUBIC)
        assert seen_in(np.asarray(resized)).markers[0] == pytest.approx(expected, abs=2)


@pytest.mark.parametrize(
    ("pixels", "count"),
    [
        (limb(), 0),
        (with_angle(limb()), 1),
        (with_angle(with_angle(limb()), 38), 1),  # 4 pixels apart
        (with_angle(with_angle(limb()), 43), 2),  # 9 pixels apart
        (with_angle(limb(), grey=120), 1),  # on 20, in a range of 170
        (with_angle(limb(), grey=45), 0),
        (with_angle(limb(), blur=1), 1),
        (with_angle(limb(), blur=4), 0),
        (beside_bone(3, 6), 1),
        (beside_bone(12, 15), 0),  # two strokes are no text
        (between_cortices(), 0),
        (page(0, 1, 1), 0),
        (page(255, 9, 700), 0),
        (np.random.default_rng(1).integers(0, 256, (300, 200, 3), dtype=np.uint8), 0),
        (np.pad(page(240, 30, 4), ((150, 44), (24, 196), (0, 0))), 0),  # a strip: a pin, or the field's edge
    ],
)
def test_a_marker_is_bright_sharp_and_small(pixels, count):
    assert len(seen_in(pixels).markers) == count


# --verify: what a network says of changed copies


def odds(*probabilities):
    """Scores of two classes that give the first these probabilities."""
    return np.array([[np.log(each / (1 - each)), 0] for each in probabilities]).reshape(-1, 2)


def verified(markers=((10, 10, 30, 30),), explained=0, **changed):
    """Findings about a network that gives class 0 95 %, and in changed copies these probabilities."""
    usual = Trial(odds(0.3), odds(0.9, 0.94), odds(0.9, 0.9), odds(0.1, 0.9, 0.7, 0.95))
    seen = Landmarks(np.ones((7, 7)), markers), dataclasses.replace(usual, **changed)
    found = checked(CENTRE_ONLY, *seen, probabilities=np.float32([0.95, 0.05]), explained=explained).findings
    return {finding.check: finding for finding in found if CHECKS[finding.check].about in tool.ASKED_AGAIN}


def test_covering_the_markers_counts_beyond_covering_elsewhere():
    for covered, elsewhere, fall in ((0.25, 0.94, 0.69), (0.25, 0.3, 0.05), (0.99, 0.95, -0.04)):
        found = verified(explained=1, covered=odds(covered, elsewhere))["covering"]  # of class 0 all the same
        assert found.value == pytest.approx(fall) and found.is_flagged == (fall > 0.1)
        change = f"Comminuted Fracture from 95 % to {100 * covered:.0f} %; "
        assert f"covering the side marker {'lowers' if covered < 0.95 else 'takes'} {change}" in found.text
        assert found.text.endswith(f"covering as much elsewhere, {100 * elsewhere:.0f} %")


def test_a_marker_that_is_added_must_not_count():
    found = verified(explained=1, added=odds(0.25, 0.94))["adding"]
    assert found.value == pytest.approx(0.70) and found.is_flagged
    assert found.text == "a letter set in a corner lowers Comminuted Fracture from 95 % to 25 %"
    calm = verified(added=odds(0.96, 0.95))["adding"]
    assert "text set in a corner leaves Comminuted Fracture at 95 %" in calm.text and not calm.is_flagged


@pytest.mark.parametrize(("hot", "rank"), [(0.1, 0), (0.8, 1 / 3), (0.92, 2 / 3), (0.99, 1)])
def test_erasing_compares_the_hot_area_with_moved_masks(hot, rank):
    found = verified(erased=odds(hot, 0.9, 0.7, 0.95))["erasing"]
    assert found.value == pytest.approx(rank) and found.is_flagged == (rank > 0.75)
    assert found.text.startswith(f"erasing the hot area leaves Comminuted Fracture at {100 * hot:.0f} %; ")
    compared = f"(log-odds {odds(hot)[0, 0]:+.1f} against +2.2)"  # the median one
    assert found.text.endswith(f"in 3 other places, 90 % {compared}")
    other = verified(explained=1, blurred=odds(0.7), erased=odds(hot, 0.9, 0.7, 0.95))["erasing"]
    assert other.value == pytest.approx(1 - rank)  # of the explained class, not the predicted one
    assert f"leaves Simple Fracture at {100 - 100 * hot:.0f} %; " in other.text


def test_what_cannot_be_tested_is_not_flagged_and_not_told_in_the_console():
    assert set(verified(markers=(), covered=odds(), erased=odds())) == {"adding", "default"}
    marked = Landmarks(np.ones((7, 7)), ((10, 10, 30, 30),))
    explanation = checked(CENTRE_ONLY, marked, Trial(odds(0.95), odds(0.9, 0.94), odds(), odds(0.1, 0.9)))
    found = {finding.check: finding for finding in explanation.findings}
    assert found["default"].text == "with everything blurred it says Comminuted Fracture at 95 %"
    for check in ("covering", "erasing"):
        assert np.isnan(found[check].value) and not found[check].is_flagged
        assert " cannot be tested: " in found[check].text
        assert tool.model_cells([explanation], "")[f"convnext_{check}"] == "untestable"
    lines = tool.network_lines(explanation, "")
    assert "everything blurred" in lines[1] and not any("cannot be tested" in line for line in lines)


def asked(image, raw_map, markers=(), batch=64):
    """A trial of a network that gives back what it is given, and how many copies it was given at a time."""
    import torch

    network, sizes = torch.nn.Identity(), []
    network.weight = torch.nn.Parameter(torch.zeros(1))  # which tells the device
    network.register_forward_hook(lambda network, given, _: sizes.append(len(given[0])))
    seen = an_explanation(raw_map=raw_map), Landmarks(np.ones((7, 7)), markers)
    return tool.tried(tool.Classifier(a_model(), network), image, *seen, batch), sizes


def test_each_copy_is_changed_where_it_says():
    image, box = np.random.default_rng(0).normal(size=(3, 224, 224)).astype(np.float32), (150, 170, 175, 200)
    trial, sizes = asked(image, spot(1, 2), (box,), 8)
    assert sizes == [8, 8, 3] and trial.passes == tool.MOST_TRIALS == 19
    (blurred,), (letter, line), (covered, elsewhere), (hot, *moved) = (
        (copies != image).any(axis=1) for copies in (trial.blurred, trial.added, trial.covered, trial.erased)
    )
    inside, mask = tool.box_mask([box], 224), tool.hot_mask(an_explanation(raw_map=spot(1, 2)).heatmap, 224)
    assert blurred.mean() > 0.99 and 0 < letter.mean() < line.mean() < 0.1
    assert covered[inside].all() and covered.mean() < 0.05 and not elsewhere[inside].any() and elsewhere.any()
    assert (hot == mask).mean() > 0.999 and (trial.erased[0] == trial.blurred[0])[:, mask].all()
    assert len(moved) == 13
    assert asked(image, -UNIFORM)[0].passes == 3  # no marker to cover, no heat to erase


def test_blur_keeps_constants_and_spreads_by_eight_pixels_of_224():
    image = np.zeros((3, 224, 224), np.float32)
    image[0], image[1, 112, 112] = 2, 1
    ((constant, spread, _),) = asked(image, CENTRE_ONLY)[0].blurred
    assert np.allclose(constant, 2, rtol=1e-5) and spread.sum() == pytest.approx(1, rel=1e-4)
    assert np.sqrt(spread.sum(axis=0) @ (np.arange(224) - 112) ** 2) == pytest.approx(8, rel=1e-3)


@pytest.mark.parametrize("side", [32, 224, 384])
def test_writing_is_bright_and_lies_in_the_darkest_corner(side):
    image = np.full((3, side, side), 2, np.float32)
    image[:, side // 2 :, : side // 2] = -1  # bottom left
    image[1, 0, 0] = 5
    for _, text in tool.ADDED:
        changed = tool.with_writing(image, text)
        rows, columns = (changed != image).any(axis=0).nonzero()
        assert rows.size and rows.min() >= side // 2 and columns.min() >= 8 * side // 224
        assert columns.max() < (side // 2 if text == "L" else side)
        assert 12 * side // 224 < np.ptp(rows) + 1 < 22 * side / 224  # capitals of 22 pixels
        assert (changed.max(axis=(1, 2)) == image.max(axis=(1, 2))).all() and (changed >= image).all()


@pytest.mark.parametrize("box", [(10, 20, 30, 50), (0, 0, 12, 9), (200, 215, 224, 224), (0, 40, 224, 60)])
def test_covering_continues_the_surroundings(box):
    ramp = np.tile(np.linspace(0, 1, 224, dtype=np.float32), (3, 224, 1))
    inside = tool.box_mask([box], 224)
    is_at_edge = (box[0] == 0) != (box[2] == 224)  # there one side cannot tell
    marked = np.where(inside, np.float32(9), ramp)
    filled = tool.with_filled(marked, [box])
    assert (filled[:, ~inside] == ramp[:, ~inside]).all() and (marked[:, inside] == 9).all()
    assert np.abs(filled - ramp).max() < (0.15 if is_at_edge else 1e-5)


@pytest.mark.parametrize("side", [224, 300])
def test_as_much_is_covered_elsewhere_and_away_from_the_markers(side):
    box = (100, 8, 124, 30)  # its left-right mirror image would be itself
    ((x0, y0, x1, y1),), ((u0, v0, u1, v1),) = tool.marker_masks([box], side)
    assert (x0, y0, x1, y1) == tuple(round(end * side / 224) for end in (96, 4, 128, 34))
    assert (u1 - u0, v1 - v0) == (x1 - x0, y1 - y0) and v0 >= side // 2
    corners = [(4, 4, 34, 24), (190, 4, 220, 24), (4, 200, 34, 220)]
    covered, others = (tool.box_mask(boxes, side) for boxes in tool.marker_masks(corners[:2], side))
    assert others.sum() == covered.sum() and not (covered & others).any()
    assert tool.marker_masks(corners, side) == tool.marker_masks([], side) == []  # nothing to compare with


def test_the_hot_area_is_a_fifth_of_the_image_and_moved_masks_are_as_large():
    ramp = np.arange(49, dtype=np.float32).reshape(7, 7) / 48
    assert tool.hot_mask(ramp, 224).mean() == pytest.approx(0.2, abs=0.01)
    small = tool.hot_mask(CENTRE_ONLY, 224)  # all that has heat
    assert small[112, 112] and not small[:, :64].any() and small.mean() < 0.1
    mask = tool.hot_mask(spot(1, 2) + spot(5, 4), 224)
    moved = tool.moved_masks(mask)
    assert len({each.tobytes() for each in moved}) == 13 and {each.sum() for each in moved} == {mask.sum()}
    assert all((each & mask).sum() < 0.25 * mask.sum() for each in moved)
    assert tool.moved_masks(np.ones((224, 224), bool)) == []


# Over a run


def observations(heats, landmarks=EVERYWHERE, **changed):
    return [tool.observation(checked(heat, landmarks, **changed), landmarks) for heat in heats]


def scattered(count=40):
    rng = np.random.default_rng(8)
    return [spot(*rng.integers(1, 6, 2)) + 0.1 * spot(*rng.integers(1, 6, 2)) for _ in range(count)]


def test_the_audit_flags_what_the_maps_of_a_run_have_in_common():
    landmarks = Landmarks(np.zeros((7, 7)), ((32, 32, 192, 192),))
    corner = [spot(0, 6) + 0.3 * each for each in scattered()]
    correlation = np.corrcoef(np.reshape(corner, (40, 49)))[np.triu_indices(40, 1)].mean()
    expected = [
        f"🚩 Same place in every image, mean correlation of the maps: {correlation:.2f}, flagged above 0.50",
        "🚩 Same hottest cell: 100 %, flagged above 50 %",
        "🚩 Mean heat where nothing as dense as bone is: 100 %, flagged above 25 %",
        "🚩 Mean heat on markers, where there are any: 25 %, flagged above 10 %",
    ]
    marked, plain = observations(corner, landmarks), observations(corner, Landmarks(landmarks.dense, ()))
    assert tool.audit_lines(marked) == tool.audit_lines(marked[:30] + plain[30:]) == expected
    assert tool.audit_lines(marked[:19] + plain[19:]) == expected[:3]  # of few with markers nothing
    lines = tool.audit_lines(observations(scattered()))
    assert len(lines) == 3 and "🚩" not in "".join(lines)


def test_the_audit_tells_blank_maps_by_class_and_that_few_are_few():
    mixed = observations([-UNIFORM] * 18 + scattered(4), explained=1) + observations(scattered(20))
    lines = tool.audit_lines(mixed)
    assert "🚩 Blank maps for Simple Fracture: 82 %, flagged above 50 %" in lines
    assert not any("Comminuted" in line for line in lines)
    few = "Same place in every image: needs 20 maps that are not blank, here 5"
    assert tool.audit_lines(observations([*scattered(5), -UNIFORM])) == [few] and tool.audit_lines([]) == []


def test_one_image_tells_its_findings_and_the_cost_of_verifying(tiny_arguments, tmp_path, capsys):
    Image.fromarray(limb("R", 20)).save(tmp_path / "a.png")
    assert tool.main([*tiny_arguments, "--image", str(tmp_path / "a.png"), "--no-figures", "--verify"]) == 0
    said = capsys.readouterr().out
    assert said.count("map checks ") == 2 and said.count("Verified with 19 more forward passes") == 2
    assert said.count("overing the side marker ") == 2 and said.count("everything blurred it says ") == 2

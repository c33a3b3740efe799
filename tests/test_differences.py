"""Two models that differ, several images that differ, explained apart from predicted: does each number stay with its own?

One run over four images, none of them square but one, by two methods and two networks of different
input sizes, preprocessing and orders of classes. What it tells is compared with what each image and
each network give alone.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

import explainability as tool
from conftest import HEADS, TINY, a_model, an_explanation, save, users_checkpoint
from explainability import CHECKS, CLASS_NAMES, FAMILIES, Evidence, Explanation

pytestmark = pytest.mark.slow  # the quick tests are for work in progress on other parts

COMMINUTED, SIMPLE = CLASS_NAMES
METHODS = ("gradcam", "lrp")
OWN = {  # what each checkpoint says of itself
    "convnext": {"class_names": ["comminuted_fracture", "SIMPLE fracture"], "img_size": 64},
    "efficientnet": {"class_names": [SIMPLE, COMMINUTED], "img_size": 96, "mean": [0.3, 0.5, 0.4], "std": [0.5, 0.2, 0.1]},
}
NAMES = {"convnext": [COMMINUTED, SIMPLE], "efficientnet": [SIMPLE, COMMINUTED]}  # as both are shown
SIZES = {"a": (150, 260), "b": (300, 200), "c": (224, 224), "d": (260, 140)}  # width, height
TRUTH = {"a": ("simple", ""), "b": ("1", "30,20,200,90"), "c": ("greenstick", "-20,60,100,160"), "d": ("comminuted", "120,10,400,60")}
CLASSES = {"a": SIMPLE, "b": SIMPLE, "c": "", "d": COMMINUTED}  # 1 is the first network's second output; greenstick is no class


def radiograph(name: str) -> Image.Image:
    """A bone at another place in each, in some a marker; d has 16 bits."""
    number, columns = ord(name) - ord("a"), np.arange(224)
    row = 20 + 15 * number + 110 * (abs(columns - 60 - 30 * number) < 24)
    noise = np.random.default_rng(number).integers(0, 12, (224, 224))
    page = Image.fromarray((np.tile(row, (224, 1)) + noise).astype(np.uint8))
    if name in "bd":
        ImageDraw.Draw(page).text((8, 150), "R", fill=250, font=ImageFont.load_default(24))
    page = page.resize(SIZES[name])
    return Image.fromarray(np.asarray(page).astype(np.uint16) * 200) if name == "d" else page


def balanced(key: str, folder: Path, images: list[Path]) -> tool.Classifier:
    """A network with random weights that sees one class in half of these images and the other in the rest."""
    import torch

    contents = {**users_checkpoint(TINY[key]), **OWN[key]}
    weights, bias = contents["model_state_dict"], HEADS[key]
    weights[bias.replace("bias", "weight")] *= 30
    path = save(contents, folder / f"{key}_before.pth")  # mapped, so it must stay as it is
    classifier = tool.load_classifier(FAMILIES[key], path, "cpu")
    inputs = [tool.network_input(tool.load_radiograph(image), classifier.model.preprocessing) for image in images]
    with torch.no_grad():
        scores = classifier.network(torch.from_numpy(np.stack(inputs)))
    classifier.network.state_dict()[bias][0] -= (scores[:, 0] - scores[:, 1]).sort().values[1:3].mean()
    path = save({**contents, "model_state_dict": classifier.network.state_dict()}, folder / f"{key}.pth")
    return dataclasses.replace(classifier, model=dataclasses.replace(classifier.model, checkpoint=path))


@dataclasses.dataclass
class Told:
    """What a run told, and what each image and network give alone."""

    folder: Path
    out: str
    err: str
    rows: list[dict[str, str]]
    pages: dict[str, tuple[tool.View, list[Explanation]]]  # by name of the file
    alone: dict[tuple[str, str, str], Explanation]  # by image, family and method
    target: str | None  # the class that is explained; None for the predicted ones

    def of(self, key: str, method: str = "gradcam") -> list[Explanation]:
        return [self.alone[name, key, method] for name in SIZES]


def explained_alone(image: Path, classifier: tool.Classifier, target: str | None, truth: str) -> list[Explanation]:
    """What one network says of one image, put together from the parts that the other tests look at."""
    seen, names = tool.load_radiograph(image), classifier.model.class_names
    inputs, landmarks = tool.network_input(seen, classifier.model.preprocessing), tool.landmarks_of(seen)
    explanations = tool.explain_batch(classifier, [inputs], None if target is None else names.index(target), METHODS)
    trial = tool.tried(classifier, inputs, explanations[0], landmarks, 4)
    width, height = SIZES[image.stem]
    boxes = []
    if truth:
        x0, y0, x1, y1 = (float(number) for number in truth.split(","))
        boxes = [(max(x0, 0) / width, y0 / height, min(x1, width) / width, y1 / height)]
    return [
        dataclasses.replace(
            each,
            findings=tool.findings_of(Evidence(each, landmarks, asked)),
            pointing=tool.pointing(each, boxes) if boxes else None,
        )
        for each, asked in zip(explanations, (trial, None))
    ]


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tool.Classifier]:
    """The two networks; their checkpoints lie beside the images and the table of truths."""
    folder = tmp_path_factory.mktemp("differences")
    for name in SIZES:
        radiograph(name).save(folder / f"{name}.png")
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    lines = [f"{name}.png,{word},{box or ',,,'}" for name, (word, box) in TRUTH.items()]
    (folder / "truth.csv").write_text("\n".join(["file,class,x0,y0,x1,y1", *lines]))
    return {key: balanced(key, folder, [folder / f"{name}.png" for name in SIZES]) for key in TINY}


@pytest.fixture(scope="module", params=(None, SIMPLE))
def told(request: pytest.FixtureRequest, classifiers: dict[str, tool.Classifier]) -> Told:
    checkpoints = {key: classifier.model.checkpoint for key, classifier in classifiers.items()}
    folder, target, pages, text, errors = checkpoints["convnext"].parent, request.param, {}, io.StringIO(), io.StringIO()
    names = ["a", "bad", *list(SIZES)[1:]]  # a bad file among the others
    asked = [f"--{key}-checkpoint={path}" for key, path in checkpoints.items()]
    asked += ["--image", *(str(folder / f"{name}.png") for name in names), f"--truth={folder / 'truth.csv'}", "--verify"]
    asked += [f"--output-dir={folder / 'out'}", "--method", *METHODS, "--save-maps", "--save-panels", "--batch-size=3", "--device=cpu", "--dpi=30"]
    asked += [f"--target-class={target}"] if target else []

    def page_figure(view: tool.View, explanations: list[Explanation]) -> None:
        pages["last"] = view, list(explanations)

    def write_page(result: tool.Result, page: tool.Page, style: tool.FigureStyle, write=tool.write_page) -> None:
        write(result, page, style)
        assert page.path.name not in pages  # drawn once
        pages[page.path.name] = pages.pop("last")

    alone = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("MAX_DRAWING_PROCESSES", 0), ("MOVED_MASKS", 3), ("FEW_MAPS", 2)):
            patch.setattr(tool, name, value)
        patch.setattr(tool, "page_figure", page_figure)
        patch.setattr(tool, "figure_bytes", lambda *_: b"")
        patch.setattr(tool, "write_page", write_page)
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(errors):
            assert tool.main(asked) == 1  # of the bad file
        for key, name in itertools.product(TINY, SIZES):
            for each in explained_alone(folder / f"{name}.png", classifiers[key], target, TRUTH[name][1]):
                alone[name, key, each.method] = each
    with open(folder / "out" / "summary.csv", newline="", encoding="utf-8-sig") as file:
        rows = [{**row, "name": Path(row["file"]).stem} for row in csv.DictReader(file)]
    return Told(folder, text.getvalue(), errors.getvalue(), rows, pages, alone, target)


def test_the_images_and_models_differ_in_all_that_is_looked_at(told):
    """Else this file would prove nothing."""
    for key in TINY:
        assert {each.prediction for each in told.of(key)} == set(CLASS_NAMES)
        assert len({each.explained_class for each in told.of(key)}) == (1 if told.target else 2)
    one, other = told.of("convnext"), told.of("efficientnet")
    assert [each.prediction for each in one] != [each.prediction for each in other]
    assert [flags(each) for each in one] != [flags(each) for each in other]
    assert [flags(each) for each in one] != [flags(each) for each in told.of("convnext", "lrp")]


def flags(explanation: Explanation) -> str:
    return ", ".join(finding.check for finding in explanation.findings if finding.is_flagged)


def near(text: str, value: float) -> bool:
    return float(text) == pytest.approx(value, rel=2e-3, abs=2e-4)


def test_each_row_holds_what_its_image_and_each_model_give_alone(told):
    done = [row for row in told.rows if not row["error"]]
    assert [row["name"] for row in done] == list(SIZES) and len(told.rows) == 5
    assert [row["true_class"] for row in done] == list(CLASSES.values())
    for row in done:
        for key in TINY:
            each = told.alone[row["name"], key, "gradcam"]
            assert row[f"{key}_predicted"] == each.prediction and row[f"{key}_explained"] == each.explained_class
            is_right = {"": "", each.prediction: "yes"}.get(row["true_class"], "no")
            assert row[f"{key}_correct"] == is_right
            shares = dict(zip(NAMES[key], each.probabilities))
            assert near(row[f"{key}_confidence"], max(shares.values()))
            assert all(near(row[f"{key}_p_{name}"], share) for name, share in shares.items())
            assert bool(row[f"{key}_covering"]) == (row["name"] in "bd")  # those with a marker


@pytest.mark.parametrize("method", METHODS)
def test_each_maps_columns_hold_what_it_gives_alone(told, method):
    for row in [row for row in told.rows if not row["error"]]:
        for key in TINY:
            each, prefix = told.alone[row["name"], key, method], key if method == "gradcam" else f"{key}_{method}"
            assert row[f"{prefix}_flags"] == flags(each)
            assert near(row[f"{prefix}_raw_peak"], each.raw_map.max())
            assert row[f"{prefix}_blank_map"] == ("yes" if each.raw_map.max() <= 0 else "no")
            for finding in each.findings:
                column = f"{prefix}_{finding.check}"
                if CHECKS[finding.check].about in ("map", "verify", "statement") and finding.check != "blank":
                    assert row[column] == "untestable" if np.isnan(finding.value) else near(row[column], finding.value)
            if each.pointing:
                assert row[f"{prefix}_in_box"] == ("yes" if each.pointing.is_inside else "no")
                assert near(row[f"{prefix}_heat_in_box"], each.pointing.heat)
                assert near(row[f"{prefix}_box_area"], each.pointing.area)
            if method == "lrp":
                assert near(row[f"{prefix}_sum"], each.raw_map.sum()) and near(row[f"{prefix}_sum_owed"], each.owed)
                assert near(row[f"{prefix}_negative_share"], each.negative_share)


def test_agreement_is_of_the_two_models_of_one_image(told):
    for row in [row for row in told.rows if not row["error"]]:
        pair = [told.alone[row["name"], key, "gradcam"] for key in TINY]
        assert row["agree"] == ("yes" if pair[0].prediction == pair[1].prediction else "no")
        overlap = tool.map_agreement(pair)
        assert bool(row["map_agreement"]) == bool(overlap)
        if overlap:
            assert near(row["map_agreement"], overlap.value)
            assert row.get("pair_flags", "") == ("map_agreement" if overlap.is_flagged else "")


def test_each_map_is_saved_under_its_own_name_with_what_was_found_of_it(told):
    for (name, key, method), each in told.alone.items():
        kind = "" if method == "gradcam" else f"{method}_"
        path = told.folder / "out" / f"map_{kind}{key}_{name}.npy"
        assert np.load(path).dtype == np.float32
        np.testing.assert_allclose(np.load(path), each.raw_map, rtol=1e-3, atol=1e-3 * np.abs(each.raw_map).max())
        said = json.loads(path.with_suffix(".json").read_text())
        assert Path(said["image"]).stem == name and Path(said["checkpoint"]).stem == key and said["method"] == method
        assert said["image_sha256"] == tool.file_digest(told.folder / f"{name}.png")
        assert said["class_names"] == NAMES[key] and said["preprocessing"]["size"] == OWN[key]["img_size"]
        assert said["explained_class"] == each.explained
        assert said["probabilities"] == pytest.approx(each.probabilities.tolist(), abs=1e-4)
        assert {check for check, found in said["checks"].items() if found["flagged"]} == set(filter(None, flags(each).split(", ")))
        if method == "lrp":
            assert said["sum_owed"] == pytest.approx(each.owed, rel=1e-3, abs=1e-4)
            assert said["sum"] == pytest.approx(each.raw_map.sum(), rel=1e-3, abs=1e-4)


def test_what_a_map_owes_is_told_beside_what_it_sums_to(told):
    """Their own networks pay what they owe: here one does not."""
    job = tool.Job(told.folder / "a.png", "a.png", (), (), "")
    each = dataclasses.replace(told.alone["a", "convnext", "lrp"], raw_map=np.float32([[1, 2]]), owed=7.0)
    row, said = tool.table_row(tool.Result(job, explanations=(each,)), [each.model]), tool.provenance(job, each)
    assert (row["convnext_sum"], row["convnext_sum_owed"], said["sum"], said["sum_owed"]) == ("3", "7", 3, 7)
    assert "sum 3, must be 7" in tool.proof_text(each)


def test_each_bare_picture_is_that_of_its_image_model_and_method(told):
    style = tool.FigureStyle()
    for (name, key, method), each in told.alone.items():
        width, height = SIZES[name]
        pixels, kind = tool.load_radiograph(told.folder / f"{name}.png").pixels, "" if method == "gradcam" else f"{method}_"
        for what, expected in (
            (f"heatmap_{kind}{key}", tool.heatmap_pixels(each, height, width, style)),
            (f"overlay_{kind}{key}", tool.overlay_pixels(pixels, each, style)),
            ("radiograph", pixels),
        ):
            written = np.asarray(Image.open(told.folder / "out" / f"{what}_{name}.png")).astype(int)
            assert np.abs(written - expected).mean() < 1  # rounding of the batch may move a colour by one place


def test_each_page_shows_its_own_image_boxes_and_maps(told):
    assert len(told.pages) == len(SIZES) * (2 * 2 + 2 + 2)
    for name, (width, height) in SIZES.items():
        for key in TINY:
            for method in METHODS:
                view, (shown,) = told.pages[f"{method}_{key}_{name}.png"]
                assert view.name == f"{name}.png" and len(view.boxes) == bool(TRUTH[name][1])
                assert view.picture.shape[1] / view.picture.shape[0] == pytest.approx(width / height, rel=0.02)
                assert (shown.model.family.key, shown.method) == (key, method)
                expected = told.alone[name, key, method].raw_map
                np.testing.assert_allclose(shown.raw_map, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
            _, shown = told.pages[f"methods_{key}_{name}.png"]
            assert [(each.model.family.key, each.method) for each in shown] == [(key, method) for method in METHODS]
        for kind, method in (("", "gradcam"), ("lrp_", "lrp")):
            _, shown = told.pages[f"comparison_{kind}{name}.png"]
            assert [(each.model.family.key, each.method) for each in shown] == [(key, method) for key in TINY]
    (box,) = told.pages["gradcam_convnext_b.png"][0].boxes
    assert box == pytest.approx((0.1, 0.1, 2 / 3, 0.45))


def test_each_line_of_an_image_tells_its_own_verdicts_and_flags(told):
    titles = {"convnext": "ConvNeXt V2", "efficientnet": "EfficientNetV2-B0"}
    lines = {line.split(".png: ")[0][-1]: line for line in told.out.splitlines() if ".png: " in line and "; " in line}
    assert list(lines) == list(SIZES)
    for name, line in lines.items():
        for key, title in titles.items():
            each = told.alone[name, key, "gradcam"]
            assert f"{title} {each.prediction.split()[0]} {each.confidence:.1%}" in line
            assert (f"wrong: {title}" in line) == (CLASSES[name] not in ("", each.prediction))
            for method, called in zip(METHODS, ("Grad-CAM", "LRP")):
                found = flags(told.alone[name, key, method])
                assert (f"{title}, {called} flagged: {found}; " in f"{line}; ") if found else (f"{title}, {called}" not in line)
    assert "--truth: 1 (greenstick) named there" in told.err
    for key, own in OWN.items():
        (note,) = (line for line in told.err.splitlines() if f"{key}.pth: preprocessing other than the usual" in line)
        assert f"{own['img_size']} pixels a side" in note
    notes = [line for line in told.err.splitlines() if line.startswith("ℹ️") and "d.png" in line]
    assert len(notes) == 2 and "scaled to 8 bits" in notes[0] and "reaches outside" in notes[1]
    assert [row["notes"].count("; ") for row in told.rows if row["name"] == "d"] == [1]


def test_the_summary_counts_each_model_by_itself(told):
    """From what each image gives alone: accuracy, confusion, boxes, flags."""
    _, *parts = told.out.rpartition("RUN SUMMARY")[2].split(":\n  Accuracy")
    for key, part in zip(TINY, parts, strict=True):
        known = [(CLASSES[name], each.prediction) for name, each in zip(SIZES, told.of(key)) if CLASSES[name]]
        right = sum(truth == said for truth, said in known)
        assert f": {right / 3:.2%} ({right} of 3 images whose class is known)" in part
        names = NAMES[key]
        for truth in CLASS_NAMES:
            counted = ", ".join(f"{known.count((truth, name))} as {name}" for name in names)
            assert f"  {truth}: {counted}\n" in part
        assert part.count("Misclassified: ") == 3 - right
        pointed = [each.pointing for each in told.of(key) if each.pointing]
        inside = sum(each.is_inside for each in pointed)
        heat, area = (np.mean([getattr(each, name) for each in pointed]) for name in ("heat", "area"))
        share = f"maximum inside {inside / 3:.1%} ({inside} of 3), heat inside {heat:.1%}, chance {area:.1%}"
        assert f"True fracture: {share}\n" in part
        for method, called in zip(METHODS, ("Grad-CAM", "LRP")):
            found = [flags(each) for each in told.of(key, method)]
            counts = {check: sum(check in each.split(", ") for each in found) for check in CHECKS}
            which = ", ".join(f"{check} {count}" for check, count in counts.items() if count)
            assert f"{called}, flagged: {sum(map(bool, found))} of 4 images: {which}\n" in part


def test_the_audit_of_a_run_is_of_each_models_own_maps(told, monkeypatch):
    monkeypatch.setattr(tool, "FEW_MAPS", 2)
    seen = [tool.landmarks_of(tool.load_radiograph(told.folder / f"{name}.png")) for name in SIZES]
    _, *parts = told.out.rpartition("RUN SUMMARY")[2].split(":\n  Accuracy")
    expected = []
    for key, part in zip(TINY, parts, strict=True):
        kept = [
            tool.observation(each, landmarks) for each, landmarks in zip(told.of(key), seen)
        ]
        expected.append(tool.audit_lines(kept))
        assert all(f"  {line}\n" in part for line in expected[-1])
    assert len(expected[0]) >= 4 and expected[0] != expected[1]


def test_the_summary_counts_where_the_models_differ(told):
    pairs = list(zip(told.of("convnext"), told.of("efficientnet")))
    differ = [name for name, (one, other) in zip(SIZES, pairs) if one.prediction != other.prediction]
    assert f"Models agree on {4 - len(differ)} of 4 images" in told.out
    assert [line[-5] for line in told.out.splitlines() if "Disagree: " in line] == differ
    found = [each for each in map(tool.map_agreement, pairs) if each]
    few = sum(each.is_flagged for each in found)
    mean = f"{100 * np.mean([each.value for each in found]):.0f} %"
    assert f"Maps share {mean} of their heat on average, in {few} of {len(found)} images too little" in told.out
    assert "Images: 4 done, 1 failed" in told.out and "bad.png" in told.err
    assert "method gradcam lrp" in (told.folder / "out" / "report.html").read_text(encoding="utf-8")


def test_each_copy_that_a_network_is_asked_about_is_changed_where_it_says():
    """The copies themselves: covered on the marker, erased on the hot area, and as much elsewhere."""
    import torch

    class Spy(torch.nn.Module):
        """Keeps what it is given; its scores are the copies' numbers."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.given = torch.nn.Parameter(torch.zeros(1)), []

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            self.given.append(inputs)
            return torch.arange(2.0 * len(inputs)).view(-1, 2)

    image = np.random.default_rng(0).normal(size=(3, 224, 224)).astype(np.float32)
    raw_map, box, spy = np.zeros((7, 7), np.float32), (150, 170, 175, 200), Spy()
    raw_map[1, 2] = 1
    explanation, landmarks = an_explanation(raw_map=raw_map), tool.Landmarks(np.ones((7, 7)), (box,))
    trial = tool.tried(tool.Classifier(a_model(), spy), image, explanation, landmarks, 64)
    blurred, letter, line, covered, elsewhere, hot, *moved = (spy.given[0].numpy() != image).any(axis=1)
    numbers = [part[:, 0].tolist() for part in (trial.blurred, trial.added, trial.covered, trial.erased)]
    assert numbers == [[0], [2, 4], [6, 8], [10 + 2 * number for number in range(len(moved) + 1)]]
    inside, mask = tool.box_mask([box], 224), tool.hot_mask(explanation.heatmap, 224)
    assert blurred.mean() > 0.99 and 0 < letter.mean() < 0.1 and 0 < line.mean() < 0.1
    assert covered[inside].all() and covered.mean() < 0.05 and not elsewhere[inside].any() and elsewhere.any()
    assert (hot == mask).mean() > 0.999 and moved
    assert all(abs(int(each.sum()) - int(mask.sum())) < 9 and (each & mask).sum() < 0.25 * mask.sum() for each in moved)

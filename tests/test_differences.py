"""Models and images that differ, classes explained apart from predicted: does each number stay with its own?

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
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

import explainability as tool
from conftest import HEADS, TINY, save, users_checkpoint
from explainability import CHECKS, CLASS_NAMES, FAMILIES, Evidence, Explanation

pytestmark = pytest.mark.slow  # the quick tests are for work in progress on other parts

COMMINUTED, SIMPLE = CLASS_NAMES
METHODS, PREFIXES = {"gradcam": "Grad-CAM", "lrp": "LRP"}, {"gradcam": "", "lrp": "lrp_"}
TITLES = {"convnext": "ConvNeXt V2", "efficientnet": "EfficientNetV2-B0"}
STATISTICS = {"mean": [0.3, 0.5, 0.4], "std": [0.5, 0.2, 0.1]}
OWN = {  # what each checkpoint says of itself
    "convnext": {"class_names": ["comminuted_fracture", "SIMPLE fracture"], "img_size": 64},
    "efficientnet": {"class_names": [SIMPLE, COMMINUTED], "img_size": 96, **STATISTICS},
}
NAMES = {"convnext": [COMMINUTED, SIMPLE], "efficientnet": [SIMPLE, COMMINUTED]}  # as both are shown
SIZES = {"a": (150, 260), "b": (300, 200), "c": (224, 224), "d": (260, 140)}  # width, height
TRUTH = (
    "a.png,simple,,,,\nb.png,1,30,20,200,90\nc.png,greenstick,-20,60,100,160\nd.png,comminuted,120,10,400,60"
)
BOXES = {"b": (0.1, 0.1, 2 / 3, 0.45), "c": (0, 15 / 56, 25 / 56, 5 / 7), "d": (6 / 13, 1 / 14, 1, 3 / 7)}
CLASSES = {"a": SIMPLE, "b": SIMPLE, "c": "", "d": COMMINUTED}  # 1 is the first network's second output


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
    seen, preprocessing = map(tool.load_radiograph, images), classifier.model.preprocessing
    inputs = [tool.network_input(each, preprocessing) for each in seen]
    with torch.no_grad():
        scores = classifier.network(torch.from_numpy(np.stack(inputs)))
    classifier.network.state_dict()[bias][0] -= (scores[:, 0] - scores[:, 1]).sort().values[1:3].mean()
    path = save({**contents, "model_state_dict": classifier.network.state_dict()}, folder / f"{key}.pth")
    return dataclasses.replace(classifier, model=dataclasses.replace(classifier.model, checkpoint=path))


def explained_alone(image: Path, classifier: tool.Classifier, target: str | None) -> list[Explanation]:
    """What one network says of one image, put together from the parts that the other tests look at."""
    seen, model = tool.load_radiograph(image), classifier.model
    inputs, landmarks = tool.network_input(seen, model.preprocessing), tool.landmarks_of(seen)
    index = None if target is None else model.class_names.index(target)
    explanations = tool.explain_batch(classifier, [inputs], index, list(METHODS))
    trials = tool.tried(classifier, inputs, explanations[0], landmarks, 4), None
    judged = []
    for each, trial in zip(explanations, trials):
        found = tool.findings_of(Evidence(each, landmarks, trial))
        box = BOXES.get(image.stem)
        judged.append(dataclasses.replace(each, findings=found, pointing=box and tool.pointing(each, [box])))
    return judged


@dataclasses.dataclass
class Told:
    """What a run told, and what each image and network give alone."""

    results: Path
    out: str
    err: str
    rows: dict[str, dict[str, str]]  # of those explained, by image
    alone: dict[tuple[str, str, str], Explanation]  # by image, family and method

    def of(self, key: str, method: str = "gradcam") -> list[Explanation]:
        return [self.alone[name, key, method] for name in SIZES]

    def page(self, name: str) -> tuple[tool.View, list[Explanation]]:  # what was drawn into a figure's file
        return pickle.loads((self.results / name).read_bytes())


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tool.Classifier]:
    """The two networks; their checkpoints lie beside the images and the table of truths."""
    folder = tmp_path_factory.mktemp("differences")
    for name in SIZES:
        radiograph(name).save(folder / f"{name}.png")
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (folder / "truth.csv").write_text(f"file,class,x0,y0,x1,y1\n{TRUTH}")
    return {key: balanced(key, folder, [folder / f"{name}.png" for name in SIZES]) for key in TINY}


@pytest.fixture(scope="module", params=(None, SIMPLE))
def told(request: pytest.FixtureRequest, classifiers: dict[str, tool.Classifier]) -> Told:
    checkpoints = {key: classifier.model.checkpoint for key, classifier in classifiers.items()}
    folder, target = checkpoints["convnext"].parent, request.param
    results, text, errors, alone = folder / f"out_{target}", io.StringIO(), io.StringIO(), {}
    asked = [f"--{key}-checkpoint={path}" for key, path in checkpoints.items()]
    asked += [f"--truth={folder / 'truth.csv'}", f"--output-dir={results}", "--batch-size=3", "--device=cpu"]
    asked += ["--verify", "--save-maps", "--save-panels", "--method", *METHODS]
    asked += ["--image", *(str(folder / f"{name}.png") for name in ("a", "bad", "b", "c", "d"))]  # one is bad
    asked += [f"--target-class={target}"] if target else []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MAX_DRAWING_PROCESSES": 0, "MOVED_MASKS": 3, "FEW_MAPS": 2}.items():
            patch.setattr(tool, name, value)
        patch.setattr(tool, "page_figure", lambda *shown: shown)
        patch.setattr(tool, "figure_bytes", lambda shown, *_: pickle.dumps(shown))
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(errors):
            assert tool.main(asked) == 1  # of the bad file
        for key, name in itertools.product(TINY, SIZES):
            for each in explained_alone(folder / f"{name}.png", classifiers[key], target):
                alone[name, key, each.method] = each
    with open(results / "summary.csv", newline="", encoding="utf-8-sig") as file:
        rows = {Path(row["file"]).stem: row for row in csv.DictReader(file)}
    assert rows.pop("bad")["error"] and list(rows) == list(SIZES)
    return Told(results, text.getvalue(), errors.getvalue(), rows, alone)


def flags(explanation: Explanation) -> str:
    return ", ".join(finding.check for finding in explanation.findings if finding.is_flagged)


def same(raw_map: np.ndarray, explanation: Explanation) -> bool:
    scale = np.abs(explanation.raw_map).max()
    return raw_map.dtype == np.float32 and np.abs(raw_map - explanation.raw_map).max() < 2e-3 * scale


def test_the_images_and_models_differ_in_all_that_is_looked_at(told):
    """Else this file would prove nothing."""
    one, other, lrp = told.of("convnext"), told.of("efficientnet"), told.of("convnext", "lrp")
    for explanations in (one, other):
        assert {each.prediction for each in explanations} == set(CLASS_NAMES)
        count = 2 if told.results.name == "out_None" else 1
        assert len({each.explained_class for each in explanations}) == count
    assert [each.prediction for each in one] != [each.prediction for each in other]
    assert list(map(flags, one)) not in (list(map(flags, other)), list(map(flags, lrp)))


def test_each_column_holds_what_its_image_model_and_method_give_alone(told):
    for (name, key, method), each in told.alone.items():
        row, start = told.rows[name], key if method == "gradcam" else f"{key}_{method}"
        assert row["true_class"] == CLASSES[name]
        assert bool(row[f"{key}_covering"]) == (name in "bd")  # those with a marker
        words = {
            f"{key}_predicted": each.prediction,
            f"{key}_explained": each.explained_class,
            f"{key}_correct": {"": "", each.prediction: "yes"}.get(CLASSES[name], "no"),
            f"{start}_flags": flags(each),
            f"{start}_blank_map": "yes" if each.raw_map.max() <= 0 else "no",
        }
        numbers = {f"{key}_confidence": each.probabilities.max(), f"{start}_raw_peak": each.raw_map.max()}
        numbers |= {f"{key}_p_{one}": share for one, share in zip(NAMES[key], each.probabilities)}
        for found in each.findings:
            if CHECKS[found.check].about in ("map", *tool.ASKED_AGAIN) and found.check != "blank":
                numbers[f"{start}_{found.check}"] = found.value
        if each.pointing:
            words[f"{start}_in_box"] = "yes" if each.pointing.is_inside else "no"
            numbers |= {f"{start}_heat_in_box": each.pointing.heat, f"{start}_box_area": each.pointing.area}
        if method == "lrp":
            numbers |= {f"{start}_sum": each.raw_map.sum(), f"{start}_sum_owed": each.owed}
            numbers[f"{start}_negative_share"] = each.negative_share
        assert {column: row[column] for column in words} == words
        for column, value in numbers.items():
            text = row[column].replace("untestable", "nan")
            assert float(text) == pytest.approx(value, rel=2e-3, abs=2e-4, nan_ok=True), column
    each = dataclasses.replace(each, raw_map=np.float32([[1, 2]]), owed=7.0)  # this one does not pay
    row = tool.table_row(tool.Result(tool.Job(Path(), "", (), (), ""), explanations=(each,)), [each.model])
    assert (row["efficientnet_sum"], row["efficientnet_sum_owed"]) == ("3", "7")


def test_agreement_is_of_the_two_models_of_one_image(told):
    found, differ = [], []
    for name, row in told.rows.items():
        pair = [told.alone[name, key, "gradcam"] for key in TINY]
        if pair[0].prediction != pair[1].prediction:
            differ.append(name)
        assert row["agree"] == ("no" if name in differ else "yes")
        if overlap := tool.map_agreement(pair):
            assert float(row["map_agreement"]) == pytest.approx(overlap.value, rel=2e-3, abs=2e-4)
            found.append(overlap)
        assert bool(row["map_agreement"]) == bool(overlap)
        assert row.get("pair_flags", "") == ("map_agreement" if overlap and overlap.is_flagged else "")
    assert f"Models agree on {4 - len(differ)} of 4 images" in told.out
    assert [line[-5] for line in told.out.splitlines() if "Disagree: " in line] == differ
    mean, few = 100 * np.mean([each.value for each in found]), sum(each.is_flagged for each in found)
    said = f"Maps share {mean:.0f} % of their heat on average, in {few} of {len(found)} images too little"
    assert said in told.out


def test_each_map_is_saved_under_its_own_name_with_what_was_found_of_it(told):
    for (name, key, method), each in told.alone.items():
        path = told.results / f"map_{PREFIXES[method]}{key}_{name}.npy"
        assert same(np.load(path), each)
        said = json.loads(path.with_suffix(".json").read_text())
        assert (Path(said["image"]).stem, Path(said["checkpoint"]).stem) == (name, key)
        assert said["method"] == method and said["explained_class"] == each.explained
        assert said["image_sha256"] == tool.file_digest(told.results.parent / f"{name}.png")
        assert said["class_names"] == NAMES[key] and said["preprocessing"]["size"] == OWN[key]["img_size"]
        assert said["probabilities"] == pytest.approx(each.probabilities.tolist(), abs=1e-4)
        assert ", ".join(check for check, found in said["checks"].items() if found["flagged"]) == flags(each)
        if method == "lrp":
            sums = [said["sum"], said["sum_owed"]]
            assert sums == pytest.approx([each.raw_map.sum(), each.owed], rel=1e-3, abs=1e-4)


def test_each_bare_picture_is_that_of_its_image_model_and_method(told):
    for (name, key, method), each in told.alone.items():
        kind, style = PREFIXES[method], tool.FigureStyle()
        pixels = tool.load_radiograph(told.results.parent / f"{name}.png").pixels
        pictures = {
            "radiograph": pixels,
            f"heatmap_{kind}{key}": tool.heatmap_pixels(pixels, each, style),
            f"overlay_{kind}{key}": tool.overlay_pixels(pixels, each, style),
        }
        for what, expected in pictures.items():
            written = np.asarray(Image.open(told.results / f"{what}_{name}.png")).astype(int)
            assert np.abs(written - expected).mean() < 1  # the batch's rounding may move a colour by a place


def test_each_page_shows_its_own_image_boxes_and_maps(told):
    for (name, key, method), each in told.alone.items():
        (width, height), boxes = SIZES[name], [pytest.approx(BOXES[name])] if name in BOXES else []
        view, (shown,) = told.page(f"{method}_{key}_{name}.png")
        assert view.name == f"{name}.png" and list(view.boxes) == boxes
        assert view.picture.shape[1] / view.picture.shape[0] == pytest.approx(width / height, rel=0.02)
        assert (shown.model.family.key, shown.method) == (key, method) and same(shown.raw_map, each)
        for page, expected in (
            (f"methods_{key}_{name}.png", [(key, one) for one in METHODS]),
            (f"comparison_{PREFIXES[method]}{name}.png", [(one, method) for one in TINY]),
        ):
            view, shown = told.page(page)
            assert [(one.model.family.key, one.method) for one in shown] == expected
            assert view.name == f"{name}.png"


def test_each_line_of_an_image_tells_its_own_verdicts_and_flags(told):
    lines = dict(re.findall(r"(\w)\.png: (.*; .*)", told.out))
    assert list(lines) == list(SIZES)
    for (name, key, method), each in told.alone.items():
        line, title, called, found = f"{lines[name]}; ", TITLES[key], METHODS[method], flags(each)
        assert f"{title} {each.prediction.split()[0]} {each.confidence:.1%}" in line
        assert (f"wrong: {title}" in line) == (CLASSES[name] not in ("", each.prediction))
        assert (f"{title}, {called} flagged" in line) == bool(found)
        assert f"{title}, {called} flagged: {found}; " in line or not found
    assert "--truth: 1 (greenstick) named there" in told.err and "bad.png" in told.err
    for key, own in OWN.items():
        said = f"{key}.pth: preprocessing other than the usual"
        (note,) = (line for line in told.err.splitlines() if said in line)
        assert f"{own['img_size']} pixels a side" in note
    notes = [line for line in told.err.splitlines() if line.startswith("ℹ️") and "d.png" in line]
    assert len(notes) == 2 and "scaled to 8 bits" in notes[0] and "reaches outside" in notes[1]
    assert told.rows["d"]["notes"].count("; ") == 1


def test_the_summary_counts_each_model_by_itself(told, monkeypatch):
    monkeypatch.setattr(tool, "FEW_MAPS", 2)
    seen = [tool.landmarks_of(tool.load_radiograph(told.results.parent / f"{name}.png")) for name in SIZES]
    _, *parts = told.out.rpartition("RUN SUMMARY")[2].split(":\n  Accuracy")
    audits = []
    for key, part in zip(TINY, parts, strict=True):
        explanations = told.of(key)
        known = [(CLASSES[name], each.prediction) for name, each in zip(SIZES, explanations) if CLASSES[name]]
        right = sum(truth == said for truth, said in known)
        assert f": {right / 3:.2%} ({right} of 3 images whose class is known)" in part
        assert part.count("Misclassified: ") == 3 - right
        for truth in CLASS_NAMES:
            counted = ", ".join(f"{known.count((truth, name))} as {name}" for name in NAMES[key])
            assert f"  {truth}: {counted}\n" in part
        pointed = [each.pointing for each in explanations if each.pointing]
        inside = sum(each.is_inside for each in pointed)
        heat, area = (np.mean([getattr(each, name) for each in pointed]) for name in ("heat", "area"))
        share = f"maximum inside {inside / 3:.1%} ({inside} of 3), heat inside {heat:.1%}, chance {area:.1%}"
        assert f"True fracture: {share}\n" in part
        for method, called in METHODS.items():
            found = [flags(each).split(", ") for each in told.of(key, method)]
            counts = {check: sum(check in each for each in found) for check in CHECKS}
            which = ", ".join(f"{check} {count}" for check, count in counts.items() if count)
            assert f"{called}, flagged: {sum(map(any, found))} of 4 images: {which}\n" in part
        audits.append(tool.audit_lines(list(map(tool.observation, explanations, seen))))
        assert len(audits[-1]) >= 3 and all(f"  {line}\n" in part for line in audits[-1])
    assert audits[0] != audits[1] and "Images: 4 done, 1 failed" in told.out
    assert "method gradcam lrp" in (told.results / "report.html").read_text(encoding="utf-8")

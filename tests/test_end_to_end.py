"""Whole runs: what is printed, what is written, and what the demo networks are worth."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import explainability
from conftest import ROOT, TINY, an_explanation, explain, in_new_process, leaning, save, users_checkpoint
from explainability import CLASS_NAMES, FAMILIES, load_classifier, load_radiograph, main

FIGURES = ["comparison_{}.png", "gradcam_convnext_{}.png", "gradcam_efficientnet_{}.png"]

EXAMPLE = """\
🎲 No image specified. Using random test image:
   data_original/test/simple_fracture/simple_fracture_test_0001.png

🔍 Comparing explainability for: simple_fracture_test_0001.png
================================================================================
📦 Loading CONVNEXT model...
✅ Model loaded: convnextv2_atto
   Validation accuracy: 98.32%

📦 Loading EFFICIENTNET model...
✅ Model loaded: tf_efficientnetv2_b0
   Validation accuracy: 98.32%

🔵 Generating ConvNeXt V2 Grad-CAM...
✅ Visualization saved: explainability_outputs/gradcam_convnext_simple_fracture_test_0001.png

🟢 Generating EfficientNetV2-B0 Grad-CAM...
✅ Visualization saved: explainability_outputs/gradcam_efficientnet_simple_fracture_test_0001.png

📊 Creating comparison visualization...
✅ Comparison saved: explainability_outputs/comparison_simple_fracture_test_0001.png

================================================================================
📊 COMPARISON SUMMARY
================================================================================
ConvNeXt V2:
  Prediction: {predictions[0]}
  Confidence: NN.NN%

EfficientNetV2-B0:
  Prediction: {predictions[1]}
  Confidence: NN.NN%

{ending}
"""
ENDINGS = {
    (0, 0): "⚠️  Both models agree: Comminuted Fracture"
    "; wrong, the truth is Simple Fracture: ConvNeXt V2, EfficientNetV2-B0",
    (1, 1): "✅ Both models agree: Simple Fracture",
    (0, 1): "⚠️  Models disagree: ConvNeXt V2 says Comminuted Fracture, EfficientNetV2-B0 says Simple Fracture"
    "; wrong, the truth is Simple Fracture: ConvNeXt V2",
}


@pytest.fixture
def project(tmp_path: Path, xray: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone that holds one test image and no checkpoint, as the working directory."""
    for name in ("checkpoints", "data_original/test/simple_fracture"):
        (tmp_path / name).mkdir(parents=True)
    xray.rename(tmp_path / "data_original/test/simple_fracture/simple_fracture_test_0001.png")
    monkeypatch.setattr(explainability, "CHECKPOINT_FOLDER", tmp_path / "checkpoints")
    monkeypatch.setattr(explainability, "TEST_IMAGES", tmp_path / "data_original" / "test")
    monkeypatch.setattr(explainability, "OUTPUT_FOLDER", tmp_path / "explainability_outputs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def figures_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------
# The tiny pair
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predicted", ENDINGS, ids=str)
def test_run_without_options_prints_what_the_guide_shows(project, capsys, predicted):
    for family, to_class in zip(FAMILIES.values(), predicted, strict=True):
        save(leaning(family.key, to_class), project / "checkpoints" / f"{family.key}_best.pth")
    assert main(["--device=cpu"]) == 0
    out, error = capsys.readouterr()
    expected = EXAMPLE.format(predictions=[CLASS_NAMES[index] for index in predicted], ending=ENDINGS[predicted])
    # Random weights give maps that are flagged; the guide's example has none.
    told = [line for line in out.splitlines() if not re.match(r"  (⚠️|\d map checks passed|Maximum)|The two maps|⚠️  The two maps", line)]
    assert [re.sub(r"Confidence: \d+\.\d\d%", "Confidence: NN.NN%", line) for line in told] == expected.splitlines()
    assert all(line.startswith("ℹ️") and "class order assumed" in line for line in error.splitlines())
    assert figures_in(project / "explainability_outputs") == [name.format("simple_fracture_test_0001") for name in FIGURES]


@pytest.mark.parametrize("key, bullet", (("convnext", "🔵"), ("efficientnet", "🟢")))
def test_run_of_one_model_writes_one_figure_and_no_comparison(xray, tiny_arguments, tmp_path, capsys, key, bullet):
    assert main([*tiny_arguments, "--image", str(xray), f"--model={key}"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("🔍 Analyzing explainability for: xray.png\n" + "=" * 80)
    assert f"📦 Loading {key.upper()} model..." in out
    assert f"{bullet} Generating" in out
    assert re.search(r"  Prediction: \w+ Fracture\n  Confidence: \d+\.\d\d%\n", out)
    assert "comparison" not in out.lower()
    assert figures_in(tmp_path / "figures") == [f"gradcam_{key}_xray.png"]


def test_printed_confidence_is_the_softmax_of_the_network(xray, tiny_arguments, tiny_classifiers, capsys):
    main([*tiny_arguments, "--image", str(xray)])
    printed = re.findall(r"Confidence: (\S+)%", capsys.readouterr().out)
    explained = [explain(classifier, [load_radiograph(xray)])[0] for classifier in tiny_classifiers.values()]
    assert printed == [f"{explanation.probabilities.max() * 100:.2f}" for explanation in explained]


def test_two_runs_write_the_same_bytes(xray, tiny_arguments, tmp_path):
    for folder in ("first", "second"):
        main([*tiny_arguments, "--image", str(xray), "--output-dir", str(tmp_path / folder)])
    assert figures_in(tmp_path / "first") == [name.format("xray") for name in FIGURES]
    for name in figures_in(tmp_path / "first"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(xray, tiny_arguments, tmp_path):
    arguments = [*tiny_arguments, "--image", str(xray), "--model=efficientnet"]
    figure = tmp_path / "figures" / "gradcam_efficientnet_xray.png"
    written = []
    for hash_seed in ("1", "2"):
        in_new_process("explainability.py", *arguments, PYTHONHASHSEED=hash_seed)
        written.append(figure.read_bytes())
        figure.unlink()
    assert written[0] == written[1]


@pytest.mark.parametrize(
    "recorded, line",
    (
        ({"test_acc": 99.159, "val_acc": 98.32}, "   Test accuracy: 99.16%"),
        ({"val_acc": 98.32}, "   Validation accuracy: 98.32%"),
        ({}, "   Accuracy: not recorded in the checkpoint"),
    ),
    ids=("test", "validation", "neither"),
)
def test_accuracy_is_called_what_the_checkpoint_calls_it(xray, tiny_arguments, tmp_path, capsys, recorded, line):
    contents = users_checkpoint(TINY["efficientnet"])
    del contents["val_acc"]
    path = save({**contents, **recorded}, tmp_path / "efficientnet.pth")
    assert main([*tiny_arguments, "--image", str(xray), "--model=efficientnet", f"--efficientnet-checkpoint={path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("✅ Model loaded: tf_efficientnetv2_b0") + 1] == line


def test_failure_at_the_second_model_claims_no_success(xray, tiny_arguments, tmp_path, capsys):
    broken = tmp_path / "efficientnet.pth"
    broken.write_bytes(b"not a checkpoint")
    assert main([*tiny_arguments, "--image", str(xray), f"--efficientnet-checkpoint={broken}"]) == 1
    out, error = capsys.readouterr()
    assert "efficientnet.pth" in error
    assert "saved" not in out
    assert not list(tmp_path.glob("figures/*"))


def test_blank_map_is_named_on_the_console(xray, tiny_arguments, monkeypatch, capsys):
    monkeypatch.setattr(explainability, "grad_cam", lambda activations, gradients: -activations.mean(1).abs())
    assert main([*tiny_arguments, "--image", str(xray)]) == 0
    assert capsys.readouterr().out.count("Blank map: no positive evidence for") == 2


def test_runs_in_one_process_do_not_disturb_each_other(xray, tiny_arguments, tmp_path):
    alone = [*tiny_arguments, "--image", str(xray), "--model=efficientnet"]
    main([*alone, "--output-dir", str(tmp_path / "before")])
    main([*tiny_arguments, "--image", str(xray), "--target-class=0", "--colormap=viridis", "--dpi=60"])
    main([*alone, "--output-dir", str(tmp_path / "after")])
    before, after = ((tmp_path / name / "gradcam_efficientnet_xray.png").read_bytes() for name in ("before", "after"))
    assert before == after


# ------------------------------------------------------------------------------------------
# The full-size pair
# ------------------------------------------------------------------------------------------


def with_optimizer_state(contents: dict[str, object]) -> dict[str, object]:
    """The checkpoint as trainers leave it: AdamW keeps two tensors for each parameter."""
    import torch

    weights = [torch.nn.Parameter(value) for value in contents["model_state_dict"].values() if value.is_floating_point()]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    return {**contents, "optimizer_state_dict": optimizer.state_dict()}


@pytest.mark.slow
def test_full_size_pair_of_users_runs_end_to_end(tmp_path, xray):
    names = {"convnext": "convnext_v2_improved_best.pth", "efficientnet": "efficientnetv2_s_improved_best.pth"}
    arguments = ["--image", str(xray), "--output-dir", str(tmp_path / "figures")]
    for key, name in names.items():
        path = save(with_optimizer_state(users_checkpoint(FAMILIES[key].full_size)), tmp_path / name)
        arguments.append(f"--{key}-checkpoint={path}")
    assert (tmp_path / names["convnext"]).stat().st_size > 1e9  # as users know it: two thirds optimizer
    done = in_new_process("explainability.py", *arguments)
    assert done.returncode == 0
    assert all("class order assumed" in line for line in done.stderr.decode().splitlines())
    assert "✅ Model loaded: convnextv2_base.fcmae_ft_in22k_in1k" in done.stdout.decode()
    assert "✅ Model loaded: tf_efficientnetv2_s.in21k_ft_in1k" in done.stdout.decode()
    for name in FIGURES:
        with Image.open(tmp_path / "figures" / name.format("xray")) as figure:
            figure.load()
    for path in tmp_path.glob("*.pth"):
        path.unlink()


# ------------------------------------------------------------------------------------------
# The demo pair
# ------------------------------------------------------------------------------------------

DEMOS = {"convnext": ROOT / "checkpoints/convnext_v2_demo.pth", "efficientnet": ROOT / "checkpoints/efficientnetv2_s_demo.pth"}
TEST_IMAGES = ROOT / "data_original" / "test"
FOLDERS = ("comminuted_fracture", "simple_fracture")  # index = class


def every_tenth_row() -> list[dict[str, str]]:
    """Ten images of each class, with their boxes."""
    with open(TEST_IMAGES / "fracture_boxes.csv", newline="") as file:
        return list(csv.DictReader(file))[::10]


def points_into_box(explanation: explainability.Explanation, row: dict[str, str], height: int, width: int) -> bool:
    """The pointing game: is the hottest cell's centre in the box, give or take half a cell?"""
    h, w = explanation.raw_map.shape
    down, across = np.unravel_index(explanation.raw_map.argmax(), (h, w))
    x, y = (across + 0.5) * width / w, (down + 0.5) * height / h
    x0, y0, x1, y1 = (float(row[side]) for side in ("x0", "y0", "x1", "y1"))
    return x0 - width / w / 2 <= x <= x1 + width / w / 2 and y0 - height / h / 2 <= y <= y1 + height / h / 2


def test_readme_shows_and_names_files_that_are_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    named = re.findall(r"[\w/]+\.(?:jpg|py)\b", text.replace("path/to/xray.jpg", ""))
    assert len(pictures) >= 4 and len(named) >= 5
    assert [name for name in pictures + named if not (ROOT / name).is_file()] == []


def test_subset_holds_ten_images_of_each_class():
    rows = every_tenth_row()
    assert [sum(row["class"] == folder for row in rows) for folder in FOLDERS] == [10, 10]
    assert all((TEST_IMAGES / row["file"]).is_file() for row in rows)


@pytest.mark.parametrize("cell, inside", (((3, 3), True), ((3, 4), True), ((2, 4), True), ((3, 5), False), ((0, 0), False)))
def test_pointing_game_allows_half_a_cell(cell, inside):
    raw_map = np.zeros((7, 7), np.float32)
    raw_map[cell] = 1
    box = {"x0": "100", "y0": "95", "x1": "130", "y1": "130"}  # about cell (3, 3) of 224 pixels
    assert points_into_box(an_explanation(raw_map=raw_map), box, 224, 224) == inside


def test_calibration_error_is_the_gap_between_confidence_and_accuracy(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "checkpoints")
    import evaluate

    confidence, right = np.array([0.95, 0.95, 0.65, 0.65]), np.array([True, False, True, True])
    # Half are sure and right in half: 0.45 too sure; half are right where 0.65 was said: 0.35 too unsure.
    assert evaluate.calibration_error(confidence, right) == pytest.approx((0.45 + 0.35) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("key", FAMILIES)
def test_demo_networks_classify_and_point_at_the_fracture(key):
    classifier = load_classifier(FAMILIES[key], DEMOS[key], "cpu")
    correct, pointed = [], []
    for row in every_tenth_row():
        radiograph = load_radiograph(TEST_IMAGES / row["file"])
        (explanation,) = explain(classifier, [radiograph])
        correct.append(explanation.predicted == FOLDERS.index(row["class"]))
        pointed.append(points_into_box(explanation, row, *radiograph.pixels.shape[:2]))
    assert np.mean(correct) >= 0.8
    assert np.mean(pointed) >= 0.8


@pytest.mark.slow
def test_demo_run_says_what_the_networks_were_trained_on(tmp_path, capsys):
    pair = [f"--{key}-checkpoint={path}" for key, path in DEMOS.items()]
    assert main([*pair, "--seed=1", "--device=cpu", "--output-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "trained on synthetic radiographs; shows how the tool works; says nothing about real patients" in out
    assert out.count("   Test accuracy: ") == 2
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_notice_is_printed_for_demo_networks_alone(xray, tiny_checkpoints, tiny_arguments, tmp_path, capsys):
    path = tmp_path / "efficientnetv2_s_demo.pth"
    path.symlink_to(tiny_checkpoints["efficientnet"])
    main([*tiny_arguments, "--image", str(xray), "--model=efficientnet", f"--efficientnet-checkpoint={path}"])
    assert capsys.readouterr().out.count(explainability.DEMO_NOTICE) == 1
    main([*tiny_arguments, "--image", str(xray), "--model=efficientnet"])
    assert explainability.DEMO_NOTICE not in capsys.readouterr().out

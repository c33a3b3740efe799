"""Whole runs: what is printed, what is written, and what the demo networks are worth."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import explainability
from conftest import ROOT, explain, in_new_process, leaning, save, users_checkpoint
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


# The tiny pair


@pytest.mark.parametrize("predicted", ENDINGS, ids=str)
def test_run_without_options_prints_what_the_guide_shows(project, capsys, predicted):
    for family, to_class in zip(FAMILIES.values(), predicted, strict=True):
        save(leaning(family.key, to_class), project / "checkpoints" / f"{family.key}_best.pth")
    assert main(["--device=cpu", "--dpi=30"]) == 0
    out, error = capsys.readouterr()
    expected = EXAMPLE.format(predictions=[CLASS_NAMES[index] for index in predicted], ending=ENDINGS[predicted])
    # Random weights give maps that are flagged; the guide's example has none.
    told = [line for line in out.splitlines() if not re.match(r"  (⚠️|\d map checks passed|Maximum)|The two maps|⚠️  The two maps", line)]
    assert [re.sub(r"Confidence: \d+\.\d\d%", "Confidence: NN.NN%", line) for line in told] == expected.splitlines()
    assert [line.partition(";")[0] for line in error.splitlines()] == [
        f"ℹ️  checkpoints/{key}_best.pth: class order assumed: 0 = Comminuted Fracture, 1 = Simple Fracture" for key in FAMILIES
    ]
    assert figures_in(project / "explainability_outputs") == [name.format("simple_fracture_test_0001") for name in FIGURES]


@pytest.mark.parametrize("key, bullet", (("convnext", "🔵"), ("efficientnet", "🟢")))
def test_run_of_one_model_writes_one_figure_and_no_comparison(xray, tiny_arguments, tiny_classifiers, tmp_path, capsys, key, bullet):
    assert main([*tiny_arguments, "--image", str(xray), f"--model={key}", "--save-panels"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("🔍 Analyzing explainability for: xray.png\n" + "=" * 80)
    assert f"📦 Loading {key.upper()} model..." in out and f"{bullet} Generating" in out and "comparison" not in out.lower()
    (explanation,) = explain(tiny_classifiers[key], [load_radiograph(xray)])
    assert f"  Prediction: {explanation.prediction}\n  Confidence: {explanation.probabilities.max() * 100:.2f}%\n" in out
    panels = [f"{kind}_xray.png" for kind in ("radiograph", f"heatmap_{key}", f"overlay_{key}")]
    assert [Path(line.split("saved: ")[1]).name for line in out.splitlines() if "Picture saved" in line] == panels
    assert figures_in(tmp_path / "figures") == sorted([f"gradcam_{key}_xray.png", *panels])


def test_two_runs_write_the_same_bytes_whatever_ran_between_them(xray, tiny_arguments, tmp_path):
    asked = [*tiny_arguments, "--image", str(xray)]
    main([*asked, "--output-dir", str(tmp_path / "first")])
    main([*asked, "--target-class=0", "--colormap=viridis", "--dpi=60", "--model=efficientnet", "--method=lrp"])
    main([*asked, "--output-dir", str(tmp_path / "second")])
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / run).iterdir()} for run in ("first", "second"))
    assert first == second and sorted(first) == [name.format("xray") for name in FIGURES]


def test_failure_at_the_second_model_claims_no_success(xray, tiny_arguments, tmp_path, capsys):
    broken = tmp_path / "efficientnet.pth"
    broken.write_bytes(b"not a checkpoint")
    assert main([*tiny_arguments, "--image", str(xray), f"--efficientnet-checkpoint={broken}"]) == 1
    out, error = capsys.readouterr()
    assert "efficientnet.pth" in error and "saved" not in out and not list(tmp_path.glob("figures/*"))


def test_blank_map_is_named_on_the_console(xray, tiny_arguments, monkeypatch, capsys):
    monkeypatch.setattr(explainability, "grad_cam", lambda activations, gradients: -activations.mean(1).abs())
    assert main([*tiny_arguments, "--image", str(xray)]) == 0
    assert capsys.readouterr().out.count("Blank map: no positive evidence for") == 2


# Networks of full size


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
    arguments = ["--image", str(xray), "--output-dir", str(tmp_path / "figures")]
    for key, family in FAMILIES.items():
        path = save(with_optimizer_state(users_checkpoint(family.full_size)), tmp_path / f"{key}_best.pth")
        arguments.append(f"--{key}-checkpoint={path}")
    assert (tmp_path / "convnext_best.pth").stat().st_size > 1e9  # as users know it: two thirds optimizer
    done = in_new_process("explainability.py", *arguments)
    assert done.returncode == 0 and all("class order assumed" in line for line in done.stderr.decode().splitlines())
    for name in ("convnextv2_base.fcmae_ft_in22k_in1k", "tf_efficientnetv2_s.in21k_ft_in1k"):
        assert f"✅ Model loaded: {name}" in done.stdout.decode()
    for name in FIGURES:
        with Image.open(tmp_path / "figures" / name.format("xray")) as figure:
            figure.load()
    for path in tmp_path.glob("*.pth"):
        path.unlink()


def test_readme_shows_and_names_files_that_are_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    named = re.findall(r"[\w/]+\.(?:jpg|py)\b", text.replace("path/to/xray.jpg", ""))
    assert len(pictures) >= 4 and len(named) >= 5
    assert [name for name in pictures + named if not (ROOT / name).is_file()] == []


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    confidence, right = np.array([0.95, 0.95, 0.65, 0.65]), np.array([True, False, True, True])
    # Half are sure and right in half: 0.45 too sure; half are right where 0.65 was said: 0.35 too unsure.
    assert explainability.calibration_error(confidence, right) == pytest.approx((0.45 + 0.35) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("key", FAMILIES)
def test_demo_networks_classify_and_point_at_the_fracture(key):
    """On ten images of each class."""
    (path,), folder = (ROOT / "checkpoints").glob(f"{key}*_demo.pth"), ROOT / "data_original" / "test"
    classifier, correct, pointed = load_classifier(FAMILIES[key], path, "cpu"), [], []
    for row in list(csv.DictReader((folder / "fracture_boxes.csv").read_text().splitlines()))[::10]:
        radiograph = load_radiograph(folder / row["file"])
        height, width = radiograph.pixels.shape[:2]
        (explanation,) = explain(classifier, [radiograph])
        correct.append(explanation.predicted == ["comminuted_fracture", "simple_fracture"].index(row["class"]))
        boxes, _ = explainability.boxes_in_shares([tuple(float(row[side]) for side in explainability.SIDES)], width, height)
        pointed.append(explainability.pointing(explanation, boxes).is_inside)
    assert len(correct) == 20 and np.mean(correct) >= 0.8 and np.mean(pointed) >= 0.8


def test_notice_is_printed_for_demo_networks_alone(xray, tiny_checkpoints, tiny_arguments, tmp_path, capsys):
    path = tmp_path / "efficientnetv2_s_demo.pth"
    path.symlink_to(tiny_checkpoints["efficientnet"])
    for options, times in (([f"--efficientnet-checkpoint={path}"], 1), ([], 0)):
        main([*tiny_arguments, "--image", str(xray), "--model=efficientnet", *options])
        assert capsys.readouterr().out.count(explainability.DEMO_NOTICE) == times


def test_python_gives_what_the_command_gives(xray, tiny_arguments, tiny_classifiers, tmp_path):
    radiograph, classifier = explainability.load_radiograph(xray), tiny_classifiers["convnext"]
    explanation = explainability.explain(classifier, radiograph, target=1)
    options = ["--model=convnext", "--target-class=1", "--save-maps", "--image", str(xray)]
    assert main([*tiny_arguments, *options]) == 0
    np.testing.assert_array_equal(explanation.raw_map, np.load(tmp_path / "figures" / "map_convnext_xray.npy"))
    told = json.loads((tmp_path / "figures" / "map_convnext_xray.json").read_text())["checks"]
    assert {each.check: each.text for each in explanation.findings} == {key: each["text"] for key, each in told.items()}
    drawn = Image.open(io.BytesIO(explainability.draw(explanation, radiograph, "xray.png", explainability.FigureStyle(dpi=30))))
    written = Image.open(tmp_path / "figures" / "gradcam_convnext_xray.png")
    assert (np.asarray(drawn) == np.asarray(written)).all()

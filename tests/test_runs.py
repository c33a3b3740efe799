"""Runs over many images: batches, the table, resuming, raw maps, names of outputs."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import explainability as tool
from conftest import TINY, a_model, an_explanation, save, users_checkpoint
from conftest import explain as explain_radiographs

FIGURES = ("gradcam_convnext", "gradcam_efficientnet", "comparison")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five different images in two class folders, with one stem in both."""
    rng = np.random.default_rng(0)
    for place in ("comminuted_fracture/a", "comminuted_fracture/b", "simple_fracture/a", "simple_fracture/c", "simple_fracture/d"):
        path = tmp_path / "images" / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (90, 70), dtype=np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def explain(tiny_arguments: list[str], tmp_path: Path) -> Callable[..., int]:
    """Call main() with the tiny checkpoints and tmp_path/out."""

    def call(*arguments: object) -> int:
        return tool.main([*tiny_arguments, "--output-dir", str(tmp_path / "out"), *map(str, arguments)])

    return call


def table(tmp_path: Path) -> list[dict[str, str]]:
    """The rows of the table; a column that no row fills is not there, and reads as empty."""
    with open(tmp_path / "out" / "summary.csv", newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        return [defaultdict(str, row) for row in csv.DictReader(file)]


# The table and the summary


def test_a_folder_gives_figures_and_a_row_for_each_image(explain, folder, tmp_path, capsys):
    assert explain("--image", folder) == 0
    rows = table(tmp_path)
    assert [Path(row["file"]).relative_to(folder).as_posix() for row in rows] == [
        "comminuted_fracture/a.png", "comminuted_fracture/b.png", "simple_fracture/a.png", "simple_fracture/c.png", "simple_fracture/d.png",
    ]  # fmt: skip
    assert [row["true_class"] for row in rows] == ["Comminuted Fracture"] * 2 + ["Simple Fracture"] * 3
    for row in rows:
        written = json.loads(row["outputs"])
        assert len(written) == 3 and all((tmp_path / "out" / name).stat().st_size > 1_000 for name in written)
        assert abs(float(row["convnext_p_Comminuted Fracture"]) + float(row["convnext_p_Simple Fracture"]) - 1) < 2e-6
        assert row["convnext_correct"] == ("yes" if row["convnext_predicted"] == row["true_class"] else "no")
    said = capsys.readouterr().out
    right = sum(row["efficientnet_correct"] == "yes" for row in rows)
    assert f"Accuracy: {right / 5:.2%} ({right} of 5" in said and "images per second" in said


def a_result(folder: str, *confidences: float) -> tool.Result:
    """What ConvNeXt V2 and EfficientNetV2 say of an image: each confidence is that of Comminuted; Simple is explained."""
    image = Path(f"{folder}/a.png")
    job = tool.Job(image, str(image), (), (), "digest", name="a.png")
    job, _ = tool.told_truth(job, tool.CLASS_NAMES)
    names = {"convnext": "convnextv2_base.fcmae_ft_in22k_in1k", "efficientnet": "tf_efficientnetv2_s.in21k_ft_in1k"}
    explanations = (
        an_explanation(family=tool.FAMILIES[key], architecture=name, probabilities=np.float32([share, 1 - share]), explained=1)
        for (key, name), share in zip(names.items(), confidences)
    )
    return tool.Result(job, explanations=tuple(explanations))


def test_a_row_says_what_each_model_said():
    result = a_result("simple_fracture", 0.9, 0.25)
    row = tool.table_row(result, [each.model for each in result.explanations])
    told = {name: (row[f"convnext_{name}"], row[f"efficientnet_{name}"]) for name in (
        "predicted", "confidence", "correct", "explained", "p_Comminuted Fracture", "p_Simple Fracture", "raw_peak")}  # fmt: skip
    assert told == {
        "predicted": ("Comminuted Fracture", "Simple Fracture"), "confidence": ("0.900000", "0.750000"),
        "correct": ("no", "yes"), "explained": ("Simple Fracture", "Simple Fracture"),
        "p_Comminuted Fracture": ("0.900000", "0.250000"), "p_Simple Fracture": ("0.100000", "0.750000"),
        "raw_peak": ("24", "24"),
    }  # fmt: skip
    assert (row["file"], row["true_class"], row["agree"], row["digest"]) == ("simple_fracture/a.png", "Simple Fracture", "no", "digest")


@pytest.mark.parametrize(
    "folder, confidences, line",
    (
        ("simple_fracture", (0.9, 0.25), "⚠️  a.png: {c} Comminuted 90.0%, {e} Simple 75.0%; wrong: {c}; models disagree"),
        ("simple_fracture", (0.9, 0.8), "⚠️  a.png: {c} Comminuted 90.0%, {e} Comminuted 80.0%; wrong: {c}; wrong: {e}"),
        ("comminuted_fracture", (0.9, 0.8), "✅ a.png: {c} Comminuted 90.0%, {e} Comminuted 80.0%"),
        ("ward", (0.9, 0.25), "⚠️  a.png: {c} Comminuted 90.0%, {e} Simple 75.0%; models disagree"),
        ("ward", (0.9, 0.8), "✅ a.png: {c} Comminuted 90.0%, {e} Comminuted 80.0%"),
        ("simple_fracture", (0.9,), "⚠️  a.png: {c} Comminuted 90.0%; wrong: {c}"),
    ),
)
def test_the_line_of_an_image_tells_who_is_wrong(folder, confidences, line):
    assert tool.result_line(a_result(folder, *confidences)) == line.format(c="ConvNeXt V2", e="EfficientNetV2-S")


def with_flags(result: tool.Result, *keys: str) -> tool.Result:
    """A result whose second explanation has these checks flagged."""
    flagged = tuple(tool.Finding(key, 0.4, True, key) for key in keys)
    first, second = result.explanations
    return dataclasses.replace(result, explanations=(first, dataclasses.replace(second, findings=flagged)))


def test_what_is_flagged_is_flagged_in_line_table_and_summary():
    result = with_flags(a_result("simple_fracture", 0.2, 0.25), "border", "confidence")
    assert tool.result_line(result).startswith("⚠️ ") and "EfficientNetV2-S flagged: border, confidence" in tool.result_line(result)
    models = [each.model for each in result.explanations]
    row = tool.table_row(result, models)
    assert (row["convnext_flags"], row["efficientnet_flags"]) == ("", "border, confidence")
    lines = tool.run_lines([row], models, ["gradcam"], {}, 0, 1)
    assert [line for line in lines if "Flagged" in line] == ["  Flagged: 0 of 1 images", "  Flagged: 1 of 1 images: border 1, confidence 1"]


def test_flags_of_each_method_are_told():
    first, second = a_result("simple_fracture", 0.2, 0.25).explanations
    by_lrp = dataclasses.replace(first, method="lrp", findings=(tool.Finding("focus", 0.4, True, "focus"),))
    result = dataclasses.replace(a_result("simple_fracture", 0.2), explanations=(first, by_lrp))
    assert "ConvNeXt V2, LRP flagged: focus" in tool.result_line(result)
    row = tool.table_row(result, [first.model])
    assert row["convnext_lrp_flags"] == "focus"
    assert "  LRP, flagged: 1 of 1 images: focus 1" in tool.run_lines([row], [first.model], ["gradcam", "lrp"], {}, 0, 1)


def test_confusion_counts_and_disagreement_come_from_the_rows():
    row = {"error": "", "true_class": "Simple Fracture", "x_predicted": "Simple Fracture", "x_correct": "yes", "agree": "yes"}
    row |= {"x_flags": "border, erasing", "file": "r.png"}
    wrong = row | {"file": "w.png", "x_predicted": "Comminuted Fracture", "x_correct": "no", "agree": "no"}
    model = a_model(family=tool.dataclasses.replace(tool.FAMILIES["convnext"], key="x"))
    lines = tool.run_lines([row, row, *[wrong] * 7, {"error": "bad", "file": "f.png"}], [model, model], ["gradcam"], {}, 3, 2.0)
    assert "Images: 9 done, 1 failed" in lines and "  Failed: f.png" in lines
    assert "Speed: 1.50 images per second (3 images in 2.0 s)" in lines
    assert "  Simple Fracture: 7 as Comminuted Fracture, 2 as Simple Fracture" in lines
    assert lines.count("  Misclassified: w.png") == 2 * 5 and "  Misclassified: 2 more, in summary.csv" in lines
    assert lines.count("  Disagree: w.png") == 5 and "Models agree on 2 of 9 images" in lines
    assert "  Flagged: 9 of 9 images: border 9, erasing 9" in lines


def test_heat_and_chance_keep_their_places_in_the_summary():
    row = {"error": "", "true_class": "", "file": "a.png", "agree": "yes"}
    row |= {"convnext_in_box": "yes", "convnext_heat_in_box": "0.750000", "convnext_box_area": "0.200000"}
    other = row | {"convnext_in_box": "no", "convnext_heat_in_box": "0.250000", "convnext_box_area": "0.100000"}
    lines = tool.run_lines([row, other], [a_model()], ["gradcam"], {}, 0, 1)
    assert "  True fracture: maximum inside 50.0% (1 of 2), heat inside 50.0%, chance 15.0%" in lines


def test_a_bad_file_is_reported_and_the_rest_go_on(explain, folder, tmp_path, capsys):
    (folder / "simple_fracture" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    assert explain("--image", folder, folder / "missing.png", "--model", "convnext", "--no-figures") == 1
    rows = table(tmp_path)
    assert len(rows) == 7 and [bool(row["error"]) for row in rows].count(True) == 2
    errors = capsys.readouterr().err
    assert errors.count("❌") == 2 and "broken.png" in errors and "missing.png" in errors


def test_only_bad_files_end_with_status_1(explain, tmp_path, capsys):
    assert explain("--image", tmp_path / "x.png", tmp_path / "y.png", "--model", "convnext") == 1
    assert [bool(row["error"]) for row in table(tmp_path)] == [True, True]
    assert "Images: 0 done, 2 failed" in capsys.readouterr().out


def test_an_empty_folder_or_a_pattern_without_match_is_one_line(explain, tmp_path, capsys):
    for place in (tmp_path, tmp_path / "*.png"):
        assert explain("--image", place) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_a_pattern_finds_sorted_images_and_repeats_count_once(explain, folder, tmp_path):
    assert explain("--image", folder / "*/a.png", folder / "simple_fracture/a.png", "--model", "convnext", "--no-figures") == 0
    assert [Path(row["file"]).parent.name for row in table(tmp_path)] == ["comminuted_fracture", "simple_fracture"]


def test_the_output_folder_is_not_searched(folder):
    assert tool.found_images([str(folder)], folder / "simple_fracture") == [
        folder / "comminuted_fracture/a.png", folder / "comminuted_fracture/b.png",
    ]  # fmt: skip


def test_images_beside_the_results_are_found_or_the_reason_is_told(folder, tmp_path):
    everything = tool.found_images([str(folder)], tmp_path / "out")
    assert len(everything) == 5 and tool.found_images([str(folder)], tmp_path) == everything
    with pytest.raises(tool.ExplainError, match="no image found there, beside this tool's own results"):
        tool.found_images([str(folder / "simple_fracture")], folder / "simple_fracture")


def test_linked_folders_are_searched_once(folder, tmp_path):
    place = tmp_path / "links"
    place.mkdir()
    (place / "simple_fracture").symlink_to(folder / "simple_fracture")
    for name, to in (("again", place), ("above", tmp_path), ("root", Path("/"))):
        (place / name).symlink_to(to)
    assert [path.name for path in tool.found_images([str(place)], tmp_path / "out")] == ["a.png", "c.png", "d.png"]
    for name in ("a", "z"):
        (folder / name).symlink_to(folder / "simple_fracture")
    assert {path.parent.name for path in tool.found_images([str(folder)], tmp_path / "out")} == {"comminuted_fracture", "simple_fracture"}


def test_an_image_named_in_two_ways_is_one(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder / "simple_fracture")
    assert tool.found_images(["c.png", str(folder / "simple_fracture/c.png"), "a.png"], tmp_path / "out") == [Path("c.png"), Path("a.png")]


def test_quiet_prints_the_summary_alone(explain, folder, capsys):
    assert explain("--image", folder, "--model", "convnext", "--no-figures", "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(tool.RULE) and captured.err == ""


# Batches


def test_results_do_not_depend_on_the_batch_size(explain, folder, tmp_path):
    found = {}
    for size in (1, 3, 8):
        assert explain("--image", folder, "--no-figures", "--save-maps", "--batch-size", size) == 0
        maps = [np.load(path) for path in sorted((tmp_path / "out").glob("*.npy"))]
        found[size] = table(tmp_path), maps
    for size in (3, 8):
        for one, other in zip(found[1][1], found[size][1], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(one).max())
        for one, other in zip(found[1][0], found[size][0], strict=True):
            assert abs(float(one["convnext_p_Simple Fracture"]) - float(other["convnext_p_Simple Fracture"])) < 1e-5


@pytest.mark.slow
def test_figures_of_many_are_those_of_single_runs(explain, folder, tmp_path):
    """Byte for byte where the maps are: with a batch of one."""
    assert explain("--image", folder, "--batch-size", 1) == 0
    many = (tmp_path / "out" / "comparison_b.png").read_bytes()
    assert explain("--image", folder / "comminuted_fracture" / "b.png") == 0
    assert (tmp_path / "out" / "comparison_b.png").read_bytes() == many


# Resuming


def test_skip_existing_leaves_finished_images_alone(explain, folder, tmp_path, capsys):
    assert explain("--image", folder, "--model", "convnext") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("gradcam_*.png")}
    next(iter(before)).unlink()
    capsys.readouterr()
    assert explain("--image", folder, "--model", "convnext", "--skip-existing") == 0
    assert "left alone: 4 images" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("gradcam_*.png")}
    assert after.keys() == before.keys() and sum(after[path] != before[path] for path in before) == 1
    assert len(table(tmp_path)) == 5


def test_skip_existing_leaves_a_single_finished_image_alone(explain, xray, tmp_path, capsys):
    assert explain("--image", xray, "--model", "convnext", "--skip-existing") == 0
    (figure,) = (tmp_path / "out").iterdir()
    before = figure.stat().st_mtime_ns
    capsys.readouterr()
    assert explain("--image", xray, "--model", "convnext", "--skip-existing") == 0
    assert "left alone" in capsys.readouterr().out and figure.stat().st_mtime_ns == before


def test_a_torn_row_is_told_and_computed_again(explain, folder, tmp_path, capsys):
    assert explain("--image", folder, "--model", "convnext", "--no-figures") == 0
    path = tmp_path / "out" / "summary.csv"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:30])
    capsys.readouterr()
    assert explain("--image", folder, "--model", "convnext", "--no-figures", "--skip-existing") == 0
    assert path.read_bytes() == whole and "last line was torn" in capsys.readouterr().err


@pytest.mark.parametrize("earlier", ["file,other\nx,y\n", "x" * 200_000 + "\n"])
@pytest.mark.parametrize("others", [[], ["--skip-existing"]])
def test_a_table_with_other_columns_is_kept_under_another_name(explain, folder, tmp_path, capsys, earlier, others):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.csv").write_text(earlier)
    assert explain("--image", folder, "--model", "convnext", "--no-figures", *others) == 0
    assert (tmp_path / "out" / "summary_1.csv").read_text() == earlier and len(table(tmp_path)) == 5
    assert "kept as summary_1.csv" in capsys.readouterr().err


@pytest.mark.parametrize("others", [[], ["--skip-existing"]])
def test_runs_at_the_same_time_keep_each_others_rows(explain, folder, tmp_path, monkeypatch, others):
    """A second run goes into the same folder while the first is in its middle."""
    load, seen = tool.load_radiograph, []

    def with_another_run(path: Path) -> tool.Radiograph:
        seen.append(path)
        if len(seen) == 2:
            assert explain("--image", folder / "comminuted_fracture", *asked) == 0
        return load(path)

    asked = ("--model", "convnext", "--no-figures", "--batch-size", 1, *others)
    monkeypatch.setattr(tool, "load_radiograph", with_another_run)
    assert explain("--image", folder / "simple_fracture", *asked) == 0
    assert sorted(Path(row["file"]).relative_to(folder).as_posix() for row in table(tmp_path)) == [
        "comminuted_fracture/a.png", "comminuted_fracture/b.png", "simple_fracture/a.png", "simple_fracture/c.png", "simple_fracture/d.png",
    ]  # fmt: skip


def test_a_run_with_other_columns_at_the_same_time_loses_nothing(explain, folder, tmp_path, monkeypatch, capsys):
    load, seen = tool.load_radiograph, []

    def with_another_run(path: Path) -> tool.Radiograph:
        seen.append(path)
        if len(seen) == 2:
            assert explain("--image", folder / "comminuted_fracture", "--model", "efficientnet", "--no-figures") == 0
        return load(path)

    monkeypatch.setattr(tool, "load_radiograph", with_another_run)
    assert explain("--image", folder / "simple_fracture", "--model", "convnext", "--no-figures", "--batch-size", 1) == 1
    assert "--output-dir of its own" in capsys.readouterr().err
    assert len(table(tmp_path)) == 2 and (tmp_path / "out" / "summary_1.csv").read_text().count("simple_fracture/") == 1


def test_each_image_keeps_its_last_row(explain, folder, tmp_path):
    asked = ("--model", "convnext", "--no-figures")
    for target in ("0", "1"):
        assert explain("--image", folder, *asked, "--target-class", target) == 0
    assert [row["convnext_explained"] for row in table(tmp_path)] == ["Simple Fracture"] * 5


def test_a_column_that_becomes_needed_later_is_added(explain, folder, tmp_path):
    plain = tmp_path / "images" / "ward" / "x.png"
    plain.parent.mkdir()
    (folder / "simple_fracture" / "d.png").rename(plain)
    for place in ("ward", "comminuted_fracture", "ward"):
        assert explain("--image", folder / place, "--model", "convnext", "--no-figures", "--skip-existing") == 0
    assert {row["true_class"] for row in table(tmp_path)} == {"", "Comminuted Fracture"}
    assert [bool(row["convnext_correct"]) for row in table(tmp_path)] == [True, True, False]


def test_a_cell_that_a_spreadsheet_would_compute_is_a_text(explain, folder, tmp_path, monkeypatch):
    image = folder / "=1+cmd|x.png"
    (folder / "simple_fracture" / "d.png").rename(image)
    monkeypatch.chdir(folder)
    asked = ("--model", "convnext", "--no-figures", "--skip-existing", "--image", image.name, "simple_fracture/c.png")
    assert explain(*asked) == 0 and explain(*asked) == 0
    assert [row["file"] for row in table(tmp_path)] == ["'=1+cmd|x.png", "simple_fracture/c.png"]
    texts = ["-0.5", "+1e-05", "-", "@x", "=2", "-1+2", "a=b"]
    assert [tool.cell_text(text) for text in texts] == ["-0.5", "+1e-05", "'-", "'@x", "'=2", "'-1+2", "a=b"]
    assert [tool.plain_text(tool.cell_text(text)) for text in texts] == texts


def test_the_table_is_as_readme_says(explain, folder, tmp_path):
    """UTF-8 with its mark, what is needed first, no column that no row fills, outputs as a JSON list."""
    assert explain("--image", folder, "--save-maps") == 0
    content = (tmp_path / "out" / "summary.csv").read_bytes()
    header = content.decode("utf-8-sig").splitlines()[0].split(",")
    assert content.startswith(b"\xef\xbb\xbf")
    assert header[:4] == ["file", "true_class", "convnext_predicted", "convnext_confidence"]
    assert not {"error", "convnext_covering", "convnext_in_box"} & set(header)
    assert json.loads(table(tmp_path)[1]["outputs"])[0] == "gradcam_convnext_b.png"


def test_skip_existing_keeps_rows_of_other_images(explain, folder, tmp_path):
    for place in ("comminuted_fracture", "simple_fracture"):
        assert explain("--image", folder / place, "--model", "convnext", "--no-figures", "--skip-existing") == 0
    assert len(table(tmp_path)) == 5


def test_a_change_in_the_middle_of_a_file_is_another_file(tmp_path):
    path = tmp_path / "radiograph.tif"
    path.write_bytes(bytes(3_000_000))
    before = tool.file_mark(path)
    path.write_bytes(bytes(1_500_000) + b"x" + bytes(1_499_999))
    assert tool.file_mark(path) != before and tool.file_mark(tmp_path / "none.tif") == ""


def test_a_retrained_head_is_another_checkpoint(tmp_path):
    import torch
    from safetensors.torch import save_file

    for name, write in (("a.pth", torch.save), ("a.safetensors", save_file)):
        marks = set()
        for head in (torch.zeros(2, 8), torch.ones(2, 8)):
            write({"first": torch.zeros(700_000), "head": head, "last": torch.zeros(700_000)}, tmp_path / name)
            marks.add(tool.file_mark(tmp_path / name))
        assert len(marks) == 2


def test_skip_existing_keeps_twins_apart_when_names_are_hidden(explain, folder, tmp_path, capsys):
    twin = folder / "comminuted_fracture" / "a.png"
    (folder / "simple_fracture" / "a.png").write_bytes(twin.read_bytes())
    asked = ("--image", folder, "--model", "convnext", "--no-figures", "--save-maps", "--anonymous", "--skip-existing")
    told = []
    for _ in range(2):
        assert explain(*asked) == 0
        told.append([line for line in capsys.readouterr().out.splitlines() if "Accuracy" in line or "done" in line])
    first = [(row["file"], row["true_class"]) for row in table(tmp_path)]
    assert explain("--image", folder / "simple_fracture", *asked[2:-1]) == 0
    assert explain(*asked) == 0
    assert [(row["file"], row["true_class"]) for row in table(tmp_path)] == first
    labels = {label for label, _ in first}
    assert told[0] == told[1] and len(labels) == 5
    assert tool.content_label(twin) in labels and f"{tool.content_label(twin)}_2" in labels
    assert not any("fracture" in path.name for path in (tmp_path / "out").iterdir())


def test_a_resumed_run_tells_how_many_maps_it_judged(explain, folder, capsys):
    assert explain("--image", folder / "simple_fracture", "--model", "convnext", "--no-figures") == 0
    capsys.readouterr()
    assert explain("--image", folder, "--model", "convnext", "--no-figures", "--skip-existing") == 0
    said = capsys.readouterr().out
    assert "of 5 images" in said and "Of the 2 images explained now:" in said


@pytest.mark.slow
@pytest.mark.parametrize("single", (True, False))
def test_skip_existing_computes_again_what_was_asked_otherwise(explain, folder, tmp_path, capsys, single):
    image = [folder / "simple_fracture/c.png"] if single else [folder / "simple_fracture"]
    asked = ("--image", *image, "--model", "convnext", "--skip-existing")
    for changed in ([], ["--target-class", "1"], ["--colormap", "gray"]):
        assert explain(*asked, *changed) == 0
        assert "left alone" not in capsys.readouterr().out
    (folder / "simple_fracture/d.png").replace(folder / "simple_fracture/c.png")  # the same name, another image
    assert explain(*asked, "--colormap", "gray") == 0
    out = capsys.readouterr().out
    assert ("left alone" in out) != single and ("left alone: 1 images" in out) != single  # a.png, but not c.png


def test_rows_are_written_while_the_run_goes_on(explain, folder, tmp_path, monkeypatch):
    seen = []
    load = tool.load_radiograph
    monkeypatch.setattr(tool, "load_radiograph", lambda path: (seen.append(len(table(tmp_path)) if (tmp_path / "out" / "summary.csv").exists() else -1), load(path))[1])
    assert explain("--image", folder, "--model", "convnext", "--no-figures", "--batch-size", 1) == 0
    assert seen == [-1, 1, 2, 3, 4]


@pytest.mark.parametrize("others", (["--colormap", "gray"], ["--target-class", "1"]))
def test_maps_of_another_question_are_not_taken_for_finished(explain, xray, tmp_path, capsys, others):
    asked = ("--image", xray, "--model", "convnext", "--no-figures")
    assert explain(*asked, "--save-maps", "--target-class", "0") == 0
    stale = (tmp_path / "out" / "map_convnext_xray.npy").read_bytes()
    assert explain(*asked, *others) == 0
    capsys.readouterr()
    assert explain(*asked, *others, "--save-maps", "--skip-existing") == 0
    assert "left alone" not in capsys.readouterr().out
    told = json.loads((tmp_path / "out" / "map_convnext_xray.json").read_text())
    assert (told["explained_class"] == 1) == ("1" in others)
    assert ((tmp_path / "out" / "map_convnext_xray.npy").read_bytes() == stale) == (told["explained_class"] == 0)


def test_a_folder_named_in_two_ways_stands_once_in_the_table(explain, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("images", folder, "./images/../images"):
        assert explain("--image", place, "--model", "convnext", "--no-figures", "--skip-existing") == 0
    assert len(table(tmp_path)) == 5


def test_speed_counts_only_the_images_that_were_explained(explain, folder, capsys, monkeypatch):
    asked = ("--model", "convnext", "--no-figures", "--skip-existing")
    assert explain("--image", folder / "comminuted_fracture", *asked) == 0
    capsys.readouterr()
    assert explain("--image", folder, *asked) == 0
    assert "images per second (3 images in" in capsys.readouterr().out
    assert explain("--image", folder, *asked) == 0
    assert "per second" not in capsys.readouterr().out


def test_blank_maps_are_said_in_the_line_and_the_table(explain, folder, tmp_path, monkeypatch, capsys):
    whole = tool.explain_batch

    def every_second_blank(classifier: tool.Classifier, *arguments: object, **options: object) -> list[object]:
        return [
            tool.dataclasses.replace(each, raw_map=-abs(each.raw_map), heatmap=0 * each.heatmap) if index % 2 else each
            for index, each in enumerate(whole(classifier, *arguments, **options))
        ]

    monkeypatch.setattr(tool, "explain_batch", every_second_blank)
    assert explain("--image", folder, "--model", "convnext", "--no-figures", "--batch-size", 2) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ".png: " in line]
    expected = [False, True, False, True, False]
    assert ["flagged: blank" in line for line in lines] == expected
    assert [row["convnext_blank_map"] for row in table(tmp_path)] == ["yes" if blank else "no" for blank in expected]
    assert [float(row["convnext_raw_peak"]) > 0 for row in table(tmp_path)] == [not blank for blank in expected]


def test_a_picture_that_shows_nothing_is_warned_of(explain, tmp_path, capsys):
    for number, value in enumerate((0, 255)):
        Image.new("L", (20, 30), value).save(tmp_path / f"{number}.png")
    assert explain("--image", tmp_path / "0.png", "--model", "convnext", "--no-figures") == 0
    assert f"⚠️  {tool.NOTHING_TO_SEE}" in capsys.readouterr().out
    assert explain("--image", tmp_path / "0.png", tmp_path / "1.png", "--model", "convnext", "--no-figures", "--quiet") == 0
    assert all(tool.NOTHING_TO_SEE in row["notes"] for row in table(tmp_path))


def test_no_name_of_an_image_is_told_anonymously(explain, folder, tmp_path, capsys):
    secret = folder / "simple_fracture" / "Doe_Jane_1970.png"
    (folder / "simple_fracture" / "c.png").rename(secret)
    bad = folder / "simple_fracture" / "Doe_John.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    label = tool.hashlib.sha256(secret.read_bytes()).hexdigest()[:8]
    assert explain("--image", secret, "--anonymous", "--model", "convnext", "--save-maps") == 0
    assert (tmp_path / "out" / f"gradcam_convnext_{label}.png").exists()
    assert explain("--image", folder / "simple_fracture", "--anonymous", "--model", "convnext", "--save-maps") == 1
    said = "".join(capsys.readouterr())
    assert label in said and "Doe" not in said
    assert label in [row["file"] for row in table(tmp_path)]
    for path in (tmp_path / "out").iterdir():
        assert "Doe" not in path.name and (path.suffix not in (".csv", ".json") or "Doe" not in path.read_text())


# Raw maps


def test_saved_maps_are_raw_and_say_where_they_come_from(explain, folder, tmp_path, tiny_checkpoints):
    image = folder / "simple_fracture" / "c.png"
    assert explain("--image", image, "--save-maps", "--no-figures") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "map_convnext_c.json", "map_convnext_c.npy", "map_efficientnet_c.json", "map_efficientnet_c.npy",
    ]  # fmt: skip
    saved = np.load(tmp_path / "out" / "map_convnext_c.npy")
    classifier = tool.load_classifier(tool.FAMILIES["convnext"], tiny_checkpoints["convnext"], "cpu")
    (explanation,) = explain_radiographs(classifier, [tool.load_radiograph(image)])
    assert saved.dtype == np.float32 and saved.shape == (7, 7) and saved.min() < 0
    np.testing.assert_array_equal(saved, explanation.raw_map)
    told = json.loads((tmp_path / "out" / "map_convnext_c.json").read_text())
    assert told["image_sha256"] == tool.hashlib.sha256(image.read_bytes()).hexdigest()
    usual = {"size": 224, "mean": list(tool.IMAGENET_MEAN), "std": list(tool.IMAGENET_STD), "interpolation": "bilinear"}
    assert told["preprocessing"] == usual
    np.testing.assert_allclose(told["probabilities"], explanation.probabilities)
    assert told["target_layer"] == "stages.3" and told["class_names"][told["explained_class"]] == explanation.prediction


# Names of outputs


def test_stems_that_collide_get_their_folder_and_then_a_number():
    labels = ["/x/one/dup.png", "/x/two/dup.jpg", "/x/two/DUP.png", "/x/two/free.png", "/x/two_dup.png"]
    assert tool.output_stems(labels) == ["one_dup", "two_dup", "two_DUP_2", "free", "two_dup_3"]


@pytest.mark.parametrize(
    "name",
    ["two words.png", "ünïcödé 患者.png", "line\nbreak.png", "cost$5_{x}^2.png", "100%.png", "[a]*?.png", "-dash.png", "a.b.c.png", "x" * 250 + ".png"],
)
def test_any_file_name_gives_its_figure(explain, xray, tmp_path, capsys, name):
    image = tmp_path / name
    try:
        xray.rename(image)
    except OSError:
        pytest.skip("the file system does not take this name")
    assert explain(f"--image={image}", "--model", "convnext") == 0
    captured = capsys.readouterr()
    (written,) = (tmp_path / "out").iterdir()
    assert written.name == f"gradcam_convnext_{tool.short_stem(image.stem)}.png"
    assert len(os.fsencode(written.name)) <= 255 and "❌" not in captured.err
    assert name == "x" * 250 + ".png" or image.stem in written.name
    assert "line\\nbreak" in captured.out or "\n" not in name


def test_a_name_that_is_not_unicode_gives_its_figure(explain, xray, tmp_path, capsys):
    image = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.png"))
    try:
        xray.rename(image)
    except OSError:
        pytest.skip("the file system does not take this name")
    assert explain("--image", image, "--model", "convnext") == 0
    assert [os.fsencode(path.name) for path in (tmp_path / "out").iterdir()] == [b"gradcam_convnext_bad\xff.png"]


def test_an_input_is_never_replaced(explain, xray, tmp_path, capsys):
    image = tmp_path / "out" / "gradcam_convnext_x.png"
    image.parent.mkdir()
    xray.rename(image)
    (tmp_path / "x.png").symlink_to(image)
    before = image.read_bytes()
    assert explain("--image", image, tmp_path / "x.png", "--model", "convnext") == 1
    assert "would be replaced" in capsys.readouterr().err and image.read_bytes() == before


def test_a_link_in_the_output_folder_is_replaced_not_followed(explain, xray, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "gradcam_convnext_xray.png").symlink_to(victim)
    assert explain("--image", xray, "--model", "convnext") == 0
    assert victim.read_text() == "precious" and not (tmp_path / "out" / "gradcam_convnext_xray.png").is_symlink()


@pytest.mark.parametrize("name", ["summary.csv", "map_convnext_x.json"])
def test_an_input_is_not_replaced_by_the_table_or_a_map(explain, xray, tmp_path, name):
    image = tmp_path / "out" / name
    image.parent.mkdir()
    before = image.write_bytes(xray.read_bytes())
    xray.rename(tmp_path / "x.png")
    assert explain("--image", image, tmp_path / "x.png", "--model", "convnext", "--save-maps") == 1
    assert image.stat().st_size == before


def test_a_full_disk_is_found_before_models_load(explain, xray, capsys, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tool.tempfile, "TemporaryFile", full)
    assert explain("--image", xray) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "No space left" in captured.err and captured.err.count("\n") == 1


def test_an_output_folder_that_is_a_file_is_refused_before_models_load(explain, xray, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert explain("--image", xray) == 1
    captured = capsys.readouterr()
    assert "📦" not in captured.out and "--output-dir" in captured.err and captured.err.count("\n") == 1


def test_a_full_disk_is_no_success(explain, xray, tmp_path, capsys, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tool.os, "replace", full)
    assert explain("--image", xray, "--model", "convnext", "--no-figures", "--save-maps") == 1
    captured = capsys.readouterr()
    assert "saved" not in captured.out and "No space left" in captured.err and list((tmp_path / "out").iterdir()) == []


# Class names


def test_models_that_spell_classes_differently_agree(folder, tmp_path, capsys):
    named = []
    for key, names in (("convnext", ["comminuted_fracture", "SIMPLE fracture"]), ("efficientnet", None)):
        extra = {"class_names": names} if names else {}
        path = save(users_checkpoint(TINY[key], **extra), tmp_path / f"{key}.pth")
        named += [f"--{key}-checkpoint", str(path)]
    assert tool.main([*named, "--output-dir", str(tmp_path / "out"), "--no-figures", "--image", str(folder)]) == 0
    for row in table(tmp_path):
        assert {row["convnext_predicted"], row["efficientnet_predicted"]} <= set(tool.CLASS_NAMES)
        assert row["agree"] == ("yes" if row["convnext_predicted"] == row["efficientnet_predicted"] else "no")
        assert row["convnext_correct"] == ("yes" if row["convnext_predicted"] == row["true_class"] else "no")


# Folders


def test_dicom_without_a_suffix_is_found_in_a_folder(folder):
    (folder / "IM0001").write_bytes(bytes(128) + b"DICM" + bytes(100))
    (folder / "notes").write_text("no image")
    assert folder / "IM0001" in tool.images_below(folder) and folder / "notes" not in tool.images_below(folder)


def test_a_broken_link_in_a_folder_is_reported(explain, folder, tmp_path, capsys):
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert explain("--image", folder, "--model", "convnext", "--no-figures") == 1
    assert "gone.png: no such file" in capsys.readouterr().err


def test_a_name_too_long_for_the_system_is_one_line(explain, tmp_path, capsys):
    assert explain("--image", tmp_path / ("x" * 300 + ".png")) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_lack_of_memory_names_the_batch_size(explain, folder, capsys, monkeypatch):
    def exhausted(*_: object) -> None:
        raise RuntimeError("CUDA out of memory.\nTried to allocate everything")

    monkeypatch.setattr(tool, "forward_pass", exhausted)
    assert explain("--image", folder, "--model", "convnext", "--no-figures") == 1
    assert "--batch-size" in capsys.readouterr().err


# Formats and bare pictures


def outputs(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("ending", ("pdf", "svg"))
def test_figures_come_in_formats_for_print_and_are_left_alone_when_finished(explain, folder, tmp_path, ending):
    image = folder / "comminuted_fracture" / "b.png"
    assert explain("--image", image, "--format", ending, "--contours") == 0
    assert outputs(tmp_path) == {f"{prefix}_b.{ending}" for prefix in FIGURES}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert explain("--image", image, "--format", ending, "--contours", "--skip-existing") == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert explain("--image", image, "--format", ending, "--skip-existing") == 0
    assert all(path.stat().st_mtime_ns > time for path, time in before.items())


def test_bare_pictures_have_the_radiographs_own_size(explain, folder, tmp_path, capsys):
    image = folder / "comminuted_fracture" / "b.png"
    assert explain("--image", image, "--save-panels", "--no-figures") == 0
    prefixes = ["radiograph", *(f"{kind}_{key}" for key in TINY for kind in ("heatmap", "overlay"))]
    assert outputs(tmp_path) == {f"{prefix}_b.png" for prefix in prefixes}
    pixels = {prefix: np.asarray(Image.open(tmp_path / "out" / f"{prefix}_b.png")) for prefix in prefixes}
    assert {each.shape for each in pixels.values()} == {(90, 70, 3)}
    assert (pixels["radiograph"] == np.asarray(Image.open(image))[:, :, None]).all()
    assert "overlay_convnext_b.png" in capsys.readouterr().out


def test_a_resumed_run_counts_the_images_of_the_first(explain, folder, tmp_path, capsys):
    assert explain("--image", folder, "--no-figures") == 0
    capsys.readouterr()
    assert explain("--image", folder / "simple_fracture", "--no-figures", "--skip-existing") == 0
    assert "of 3 images" in capsys.readouterr().out
    assert outputs(tmp_path) == {"summary.csv", ".summary.lock", "report.html"}

"""Runs over many images: batches, the table, resuming, raw maps, names of outputs."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import explainability as tool
from conftest import a_model, an_explanation

FILES = ["comminuted_fracture/a.png", "comminuted_fracture/b.png", "simple_fracture/a.png", "simple_fracture/c.png", "simple_fracture/d.png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five different images in two class folders, with one stem in both."""
    rng = np.random.default_rng(0)
    for place in FILES:
        path = tmp_path / "images" / place
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


def test_a_folder_gives_figures_and_a_row_for_each_image(explain, folder, tmp_path, capsys):
    assert explain("--image", folder) == 0
    rows = table(tmp_path)
    assert [row["file"] for row in rows] == [str(folder / name) for name in FILES]
    assert [row["true_class"] for row in rows] == ["Comminuted Fracture"] * 2 + ["Simple Fracture"] * 3
    for row in rows:
        written = json.loads(row["outputs"])
        assert len(written) == 3 and all((tmp_path / "out" / name).stat().st_size > 1_000 for name in written)
    header = (tmp_path / "out" / "summary.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    assert header[:4] == ["\ufefffile", "true_class", "convnext_predicted", "convnext_confidence"]  # after the mark of UTF-8
    assert not {"error", "convnext_covering", "convnext_in_box"} & set(header)  # columns that no row fills
    assert json.loads(rows[1]["outputs"])[0] == "gradcam_convnext_b.png" and "images per second" in capsys.readouterr().out


def a_result(folder: str, *confidences: float) -> tool.Result:
    """What ConvNeXt V2 and EfficientNetV2 say of an image: each confidence is that of Comminuted; Simple is explained."""
    image = Path(f"{folder}/a.png")
    job, _ = tool.told_truth(tool.Job(image, str(image), (), (), "digest", name="a.png"), tool.CLASS_NAMES)
    names = {"convnext": "convnextv2_base.fcmae_ft_in22k_in1k", "efficientnet": "tf_efficientnetv2_s.in21k_ft_in1k"}
    explanations = (
        an_explanation(family=tool.FAMILIES[key], architecture=name, probabilities=np.float32([share, 1 - share]), explained=1)
        for (key, name), share in zip(names.items(), confidences)
    )
    return tool.Result(job, explanations=tuple(explanations))


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


def test_confusion_counts_and_disagreement_come_from_the_rows():
    row = {"error": "", "true_class": "Simple Fracture", "agree": "yes", "file": "r.png"}
    row |= {f"{key}_{name}": text for key in tool.FAMILIES for name, text in (("predicted", "Simple Fracture"), ("correct", "yes"), ("flags", ""))}
    row |= {"convnext_flags": "border, erasing", "convnext_ig_flags": "focus"}
    wrong = row | {"file": "w.png", "convnext_predicted": "Comminuted Fracture", "convnext_correct": "no", "agree": "no"}
    models = [a_model(), a_model(family=tool.FAMILIES["efficientnet"], architecture="tf_efficientnetv2_s.in21k_ft_in1k")]
    lines = tool.run_lines([row, row, *[wrong] * 7, {"error": "bad", "file": "f.png"}], models, ["gradcam", "ig"], {}, 3, 2.0)
    assert "Images: 9 done, 1 failed" in lines and "  Failed: f.png" in lines
    assert "Speed: 1.50 images per second (3 images in 2.0 s)" in lines
    assert [line for line in lines if line.startswith("  Simple Fracture: ")] == [
        f"  Simple Fracture: {wrongly} as Comminuted Fracture, {9 - wrongly} as Simple Fracture" for wrongly in (7, 0)
    ]
    assert lines.count("  Misclassified: w.png") == lines.count("  Disagree: w.png") == 5
    assert "  Misclassified: 2 more, in summary.csv" in lines and "Models agree on 2 of 9 images" in lines
    flagged = [line.partition(", flagged: ")[2] for line in lines if "flagged" in line]  # by each method, of each model
    assert flagged == ["9 of 9 images: border 9, erasing 9", "9 of 9 images: focus 9", "0 of 9 images", "0 of 9 images"]


def test_bad_files_are_reported_and_the_rest_go_on(explain, folder, tmp_path, capsys):
    (folder / "simple_fracture" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert explain("--image", folder, folder / "missing.png", "--model=convnext", "--no-figures") == 1
    assert [Path(row["file"]).stem for row in table(tmp_path) if row["error"]] == ["gone", "missing", "broken"]
    errors = capsys.readouterr().err
    assert errors.count("❌") == 3 and "gone.png: no such file" in errors
    assert explain("--image", folder / "gone.png", folder / "missing.png", "--model=convnext", "--no-figures") == 1
    assert "Images: 0 done, 2 failed" in capsys.readouterr().out


def test_a_pattern_finds_sorted_images_and_repeats_count_once(folder, tmp_path, monkeypatch):
    asked = [str(folder / "*/a.png"), str(folder / "simple_fracture/a.png")]
    assert tool.found_images(asked, tmp_path / "out") == [folder / FILES[0], folder / FILES[2]]
    monkeypatch.chdir(folder / "simple_fracture")
    asked = ["c.png", str(folder / "simple_fracture/c.png"), "a.png"]
    assert tool.found_images(asked, tmp_path / "out") == [Path("c.png"), Path("a.png")]


def test_results_are_not_taken_for_images_and_dicom_without_a_suffix_is(folder, tmp_path):
    assert tool.found_images([str(folder)], folder / "simple_fracture") == [folder / name for name in FILES[:2]]
    for outputs in (tmp_path / "out", tmp_path):
        assert tool.found_images([str(folder)], outputs) == [folder / name for name in FILES]
    with pytest.raises(tool.ExplainError, match="no image found there, beside this tool's own results"):
        tool.found_images([str(folder / "simple_fracture")], folder / "simple_fracture")
    (folder / "IM0001").write_bytes(bytes(128) + b"DICM" + bytes(100))
    (folder / "notes").write_text("no image")
    assert tool.images_below(folder) == [folder / "IM0001", *(folder / name for name in FILES)]


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


# Resuming


def test_a_resumed_run_explains_what_is_missing_and_tells_of_all(explain, folder, tmp_path, capsys):
    asked, told, times = ("--image", folder, "--model=convnext", "--skip-existing"), [], []
    for missing in ("none", "gradcam_convnext_b.png", "none"):
        (tmp_path / "out" / missing).unlink(missing_ok=True)
        assert explain(*asked) == 0
        said = capsys.readouterr().out
        told.append(re.findall(r"left alone: \d|per second \(\d|Of the \d", said))
        times.append({path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("gradcam_*.png")})
        assert " of 5 images whose class is known" in said and len(table(tmp_path)) == len(times[-1]) == 5
    assert told == [["per second (5"], ["left alone: 4", "per second (1", "Of the 1"], ["left alone: 5"]]
    assert [name for name in times[0] if times[0][name] != times[1][name]] == ["gradcam_convnext_b.png"] and times[1] == times[2]


@pytest.mark.parametrize("options", (["--format=png"], ["--format=pdf"], ["--format=svg", "--contours"], ["--no-figures", "--save-maps"]))
def test_skip_existing_leaves_a_single_image_alone_that_is_finished_as_asked(explain, xray, tmp_path, capsys, options):
    asked = ("--image", xray, "--model", "convnext", *options, "--skip-existing")
    left_alone, times = [], []
    for others in ((), (), ("--target-class=0",), ("--target-class=1",)):
        assert explain(*asked, *others) == 0
        left_alone.append("left alone" in capsys.readouterr().out)
        times.append({path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()})
    assert left_alone == [False, True, False, False] and times[0] == times[1] and len(set(map(str, times))) == 3
    names = {"gradcam_convnext_xray." + options[0][-3:], "map_convnext_xray.npy", "map_convnext_xray.json"}
    assert all(names.issuperset(each) and each.keys() == times[0].keys() for each in times)


def test_a_torn_row_is_told_and_computed_again(explain, folder, tmp_path, capsys):
    asked, path = ("--image", folder, "--model", "convnext", "--no-figures", "--skip-existing"), tmp_path / "out" / "summary.csv"
    assert explain(*asked) == 0
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:4])[:-30])
    assert explain(*asked) == 0
    assert path.read_bytes() == whole and "last line was torn" in capsys.readouterr().err


@pytest.mark.parametrize("earlier, others", [("file,other\nx,y\n", []), ("x" * 200_000 + "\n", ["--skip-existing"])])
def test_a_table_with_other_columns_is_kept_under_another_name(explain, folder, tmp_path, capsys, earlier, others):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.csv").write_text(earlier)
    assert explain("--image", folder, "--model", "convnext", "--no-figures", *others) == 0
    assert (tmp_path / "out" / "summary_1.csv").read_text() == earlier and len(table(tmp_path)) == 5
    assert "kept as summary_1.csv" in capsys.readouterr().err


@pytest.fixture
def explain_two(explain, folder, tmp_path, monkeypatch) -> Callable[..., int]:
    """Explain simple fractures with these options; in the middle another run explains the others into the same folder."""
    load, seen = tool.load_radiograph, []

    def call(options: Sequence[str], of_other: Sequence[str]) -> int:
        def with_another_run(path: Path) -> tool.Radiograph:
            seen.append(path)
            if len(seen) == 2:
                assert len(table(tmp_path)) == 1  # the first row is there while the run goes on
                assert explain("--image", folder / "comminuted_fracture", "--no-figures", *of_other) == 0
            return load(path)

        monkeypatch.setattr(tool, "load_radiograph", with_another_run)
        return explain("--image", folder / "simple_fracture", "--no-figures", "--batch-size=1", *options)

    return call


@pytest.mark.parametrize("others", [[], ["--skip-existing"]])
def test_runs_at_the_same_time_keep_each_others_rows(explain_two, folder, tmp_path, others):
    assert explain_two(["--model=convnext", *others], ["--model=convnext", *others]) == 0
    assert [row["file"] for row in table(tmp_path)] == [str(folder / name) for name in FILES]


def test_a_run_with_other_columns_at_the_same_time_loses_nothing(explain_two, tmp_path, capsys):
    assert explain_two(["--model=convnext"], ["--model=efficientnet"]) == 1
    assert "--output-dir of its own" in capsys.readouterr().err
    assert len(table(tmp_path)) == 2 and (tmp_path / "out" / "summary_1.csv").read_text().count("simple_fracture/") == 1


def test_each_image_keeps_its_last_row_and_quiet_prints_the_summary_alone(explain, folder, tmp_path, capsys):
    for target in ("0", "1"):
        assert explain("--image", folder, "--model=convnext", "--no-figures", "--quiet", "--target-class", target) == 0
        captured = capsys.readouterr()
        assert captured.out.startswith(tool.RULE) and captured.err == ""
    assert [row["convnext_explained"] for row in table(tmp_path)] == ["Simple Fracture"] * 5
    columns = ["file", "digest"]
    for digest in ("old", "new"):  # as a run leaves them that was interrupted
        tool.add_row(tmp_path, {"file": "a.png", "digest": digest}, columns)
    assert [row["digest"] for row in tool.earlier_rows(tmp_path, columns).values()] == ["new"]


def test_a_column_needed_later_is_added_and_a_folder_named_in_two_ways_stands_once(explain, folder, tmp_path, monkeypatch):
    (folder / "ward").mkdir()
    (folder / "simple_fracture" / "d.png").rename(folder / "ward" / "x.png")
    monkeypatch.chdir(tmp_path)
    for place in (folder / "ward", "images/comminuted_fracture", "./images/../images/ward", folder / "comminuted_fracture"):
        assert explain("--image", place, "--model", "convnext", "--no-figures", "--skip-existing") == 0
    assert sorted(row["true_class"] for row in table(tmp_path)) == ["", "Comminuted Fracture", "Comminuted Fracture"]
    assert sorted(bool(row["convnext_correct"]) for row in table(tmp_path)) == [False, True, True]


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


def test_a_change_in_the_middle_of_a_file_and_a_retrained_head_make_another_mark(tmp_path):
    import torch
    from safetensors.torch import save_file

    images = bytes(3_000_000), bytes(1_500_000) + b"x" + bytes(1_499_999)
    heads = [{"first": torch.zeros(700_000), "head": torch.full((2, 8), value), "last": torch.zeros(700_000)} for value in (0.0, 1.0)]
    written = (("a.tif", lambda content, path: path.write_bytes(content), images), ("a.pth", torch.save, heads), ("a.safetensors", save_file, heads))
    for name, write, contents in written:
        marks = set()
        for content in contents:
            write(content, tmp_path / name)
            marks.add(tool.file_mark(tmp_path / name))
        assert len(marks) == 2
    assert tool.file_mark(tmp_path / "none.tif") == ""


def test_skip_existing_keeps_twins_apart_when_names_are_hidden(explain, folder, tmp_path, capsys):
    twin = folder / "comminuted_fracture" / "a.png"
    (folder / "simple_fracture" / "a.png").write_bytes(twin.read_bytes())
    asked = ("--image", folder, "--model", "convnext", "--no-figures", "--save-maps", "--anonymous", "--skip-existing")
    told, rows = [], []
    for options in (asked, asked, ("--image", folder / "simple_fracture", *asked[2:-1]), asked):
        assert explain(*options) == 0
        told.append([line for line in capsys.readouterr().out.splitlines() if "Accuracy" in line or "done" in line])
        rows.append([(row["file"], row["true_class"]) for row in table(tmp_path)])
    labels = {label for label, _ in rows[0]}
    assert told[0] == told[1] and rows[0] == rows[1] == rows[3] and len(labels) == 5
    assert {tool.content_label(twin), f"{tool.content_label(twin)}_2"} < labels
    assert not any("fracture" in path.name for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("changed", [{}, {"digest": "another"}, {"true_class": "Comminuted Fracture"}, {"error": "cut short"}, {"maps": 1}], ids=str)
def test_only_a_row_of_the_same_job_without_an_error_is_left_alone(tmp_path, changed):
    maps = (tmp_path / "missing.npy",) if "maps" in changed else ()
    job = tool.Job(Path("a.png"), "a.png", (), maps, "digest", truth=tool.Truth("Simple Fracture"))
    row = {"file": "a.png", "digest": "digest", "true_class": "Simple Fracture", "error": "", **changed}
    assert tool.resumed([job], {os.path.abspath("a.png"): row}) == (([], [job]) if changed else ([row], []))


def test_blank_maps_are_said_in_the_line_and_the_table():
    result = a_result("simple_fracture", 0.02, 0.03)
    first, second = result.explanations
    blank = dataclasses.replace(second, raw_map=-abs(second.raw_map), heatmap=0 * second.heatmap)
    blank = dataclasses.replace(blank, findings=tool.findings_of(tool.Evidence(blank, None)))
    result = dataclasses.replace(result, explanations=(first, blank))
    row = tool.table_row(result, [first.model, second.model])
    assert tool.result_line(result).endswith("; EfficientNetV2-S flagged: blank")
    assert (row["convnext_blank_map"], row["efficientnet_blank_map"]) == ("no", "yes")
    assert float(row["convnext_raw_peak"]) > 0 >= float(row["efficientnet_raw_peak"])


def test_a_picture_that_shows_nothing_is_warned_of(explain, tmp_path, capsys):
    for number, value in enumerate((0, 255)):
        Image.new("L", (20, 30), value).save(tmp_path / f"{number}.png")
    assert explain("--image", tmp_path / "0.png", "--model", "convnext", "--no-figures", "--method", "lrp") == 0
    said = capsys.readouterr().out
    assert f"⚠️  {tool.NOTHING_TO_SEE}" in said and "⚠️  Compared with the blurred radiograph" in said
    assert explain("--image", tmp_path / "0.png", tmp_path / "1.png", "--model", "convnext", "--no-figures", "--quiet") == 0
    assert all(tool.NOTHING_TO_SEE in row["notes"] for row in table(tmp_path)) and "ℹ️" not in capsys.readouterr().err


def test_no_name_of_an_image_is_told_anonymously(explain, folder, tmp_path, capsys):
    secret = folder / "simple_fracture" / "Doe_Jane_1970.png"
    (folder / "simple_fracture" / "c.png").rename(secret)
    (folder / "simple_fracture" / "Doe_John.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    label = tool.hashlib.sha256(secret.read_bytes()).hexdigest()[:8]
    for images, status in ((secret, 0), (folder / "simple_fracture", 1)):
        assert explain("--image", images, "--anonymous", "--model", "convnext", "--save-maps") == status
        assert (tmp_path / "out" / f"gradcam_convnext_{label}.png").exists()
    said = "".join(capsys.readouterr())
    assert label in said and "Doe" not in said
    assert label in [row["file"] for row in table(tmp_path)]
    for path in (tmp_path / "out").iterdir():
        assert "Doe" not in path.name and (path.suffix not in (".csv", ".json") or "Doe" not in path.read_text())


def test_a_figure_belongs_to_the_image_that_took_its_name_last(explain, folder, tmp_path):
    for place in ("simple_fracture", "comminuted_fracture"):
        assert explain("--image", folder / place, "--model", "convnext") == 0
    names = [[f"gradcam_convnext_{letter}.png"] if letter else [] for letter in ("a", "b", "", "c", "d")]
    assert [json.loads(row["outputs"]) for row in table(tmp_path)] == names


# Names of outputs


def test_figures_are_named_by_what_they_show():
    assert tool.page_prefixes(["convnext", "efficientnet"], ["gradcam", "ig"]) == {
        "gradcam_convnext": (0,), "ig_convnext": (1,), "gradcam_efficientnet": (2,), "ig_efficientnet": (3,),
        "comparison": (0, 2), "comparison_ig": (1, 3), "methods_convnext": (0, 1), "methods_efficientnet": (2, 3),
    }  # fmt: skip


def test_stems_that_collide_get_their_folder_and_then_a_number_and_one_name_for_two_results_is_refused(explain, xray, tmp_path, capsys):
    labels = ["/x/one/dup.png", "/x/two/dup.jpg", "/x/two/DUP.png", "/x/two/free.png", "/x/two_dup.png"]
    assert tool.output_stems(labels) == ["one_dup", "two_dup", "two_DUP_2", "free", "two_dup_3"]
    twin = xray.with_name("ig_xray.png")
    twin.write_bytes(xray.read_bytes())
    assert explain("--image", xray, twin, "--method", "gradcam", "ig") == 1
    assert "comparison_ig_xray.png: two results of this run would have this name" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize(
    "name",
    [b"two words.png", "ünïcödé 患者.png".encode(), b"line\nbreak.png", b"cost$5_{x}^2.png", b"[a]*?.png", b"-dash.png", b"a.b.c.png", b"bad\xff.png",
     b"x" * 250 + b".png"],
)  # fmt: skip
def test_any_file_name_gives_its_figure(explain, xray, tmp_path, capsys, name):
    image = tmp_path / os.fsdecode(name)
    try:
        xray.rename(image)
    except OSError:
        pytest.skip("the file system does not take this name")
    assert explain(f"--image={image}", "--model", "convnext") == 0
    captured = capsys.readouterr()
    (written,) = (os.fsencode(path.name) for path in (tmp_path / "out").iterdir())
    assert written == b"gradcam_convnext_" + os.fsencode(tool.output_stems([str(image)])[0]) + b".png"
    assert len(written) <= 255 and "❌" not in captured.err and (len(name) > 250 or name in written)
    assert "line\\nbreak" in captured.out or b"\n" not in name


@pytest.mark.parametrize("name", ["gradcam_convnext_x.png", "summary.csv", "map_convnext_x.json"])
def test_an_input_is_never_replaced(explain, xray, tmp_path, capsys, name):
    image = tmp_path / "out" / name
    image.parent.mkdir()
    image.write_bytes(xray.read_bytes())
    (tmp_path / "x.png").symlink_to(image)
    assert explain("--image", image, tmp_path / "x.png", "--model", "convnext", "--save-maps") == 1
    assert "would be replaced" in capsys.readouterr().err and image.read_bytes() == xray.read_bytes()


def test_a_link_in_the_output_folder_is_replaced_not_followed(explain, xray, tmp_path):
    victim, link = tmp_path / "victim", tmp_path / "out" / "gradcam_convnext_xray.png"
    victim.write_text("precious")
    link.parent.mkdir()
    link.symlink_to(victim)
    assert explain("--image", xray, "--model", "convnext") == 0
    assert victim.read_text() == "precious" and not link.is_symlink()


def test_a_full_disk_is_found_before_models_load(explain, xray, capsys, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tool.tempfile, "TemporaryFile", full)
    assert explain("--image", xray) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "No space left" in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize("options, ending", (([], ".png"), (["--no-figures", "--save-panels"], ".png"), (["--no-figures", "--save-maps"], ".npy")))
def test_a_result_that_cannot_be_written_is_no_success(explain, folder, tmp_path, capsys, monkeypatch, options, ending):
    def full(source: Path, path: Path, replace: Callable[..., None] = os.replace) -> None:
        if path.stem.endswith("_b") and path.suffix == ending:
            raise OSError(28, "No space left on device")
        replace(source, path)

    monkeypatch.setattr(tool.os, "replace", full)
    bad, good = (folder / name for name in (FILES[1], FILES[3]))
    assert explain("--image", bad, "--model", "convnext", *options) == 1
    captured = capsys.readouterr()
    assert "saved" not in captured.out and "No space left" in captured.err and list((tmp_path / "out").iterdir()) == []
    assert explain("--image", bad, good, "--model", "convnext", *options) == 1
    captured = capsys.readouterr()
    assert "Images: 1 done, 1 failed" in captured.out and "_b" in captured.err
    assert [("No space left" in row["error"], bool(row["outputs"])) for row in table(tmp_path)] == [(True, False), (False, True)]


def test_each_result_waits_for_its_own_figures(monkeypatch):
    """Whichever is drawn first: results come in their order, each with what became of its own figures."""
    monkeypatch.setattr(tool, "MAX_WAITING_RESULTS", 3)
    results = [tool.Result(tool.Job(Path(name), name, (), (), "")) for name in "abcdef"]
    drawings: list[list[Future[None]]] = [[Future(), Future()] for _ in results]

    def begun():
        drawings[1][0].set_exception(tool.ExplainError("b is full"))
        for each in drawings[1][1], *drawings[2], *drawings[4], *drawings[5]:
            each.set_result(None)
        yield from zip(results[:3], drawings[:3])
        for each in (*drawings[0], drawings[3][0]):
            each.set_result(None)
        yield from zip(results[3:], drawings[3:])
        drawings[3][1].set_exception(tool.ExplainError("d is full"))

    told = [(each.job.label, each.error) for each in tool.written_results(begun())]
    assert told == [("a", ""), ("b", "b is full"), ("c", ""), ("d", "d is full"), ("e", ""), ("f", "")]


def test_lack_of_memory_names_the_batch_size_and_a_fault_shows_where_it_is(explain, folder, capsys, monkeypatch):
    asked, errors = ("--image", folder, "--model", "convnext", "--no-figures"), [RuntimeError("CUDA out of memory.\nTried"), RuntimeError("a fault")]

    def failing(*_: object) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(tool, "forward_pass", failing)
    assert explain(*asked) == 1
    assert "not enough memory for a batch of 4; choose a smaller --batch-size" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a fault"):  # what nobody foresaw is for whoever maintains the tool
        explain(*asked)

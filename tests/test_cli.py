"""The command line: what is answered at once, what is chosen, and the exit status."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

import explainability
from conftest import ROOT, in_new_process, save
from explainability import main

# Runs main in a new process and fails if that imported anything heavy.
LIGHT = """
import sys, explainability
try:
    status = explainability.main(sys.argv[1:])
except SystemExit as end:
    status = end.code
heavy = {"torch", "timm", "torchvision", "matplotlib"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else status)
"""


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[explainability.Request]:
    """What runs were asked to do; they are not done."""
    collected: list[explainability.Request] = []
    monkeypatch.setattr(explainability, "run", lambda request: collected.append(request) or 0)
    return collected


C_OWN, E_OWN, C_DEMO, E_DEMO = "convnext_v2_best.pth", "efficientnetv2_s_best.pth", "convnext_v2_demo.pth", "efficientnetv2_s_demo.pth"
C_OTHER = "convnext_v2_improved_best.pth"


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint folder, with files that start like checkpoints for an own pair."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in (C_OWN, E_OWN):
        save({}, folder / name)
    monkeypatch.setattr(explainability, "CHECKPOINT_FOLDER", folder)
    return folder


# Answered at once


def test_help_names_every_option_and_imports_nothing_heavy():
    done = in_new_process("-c", LIGHT, "--help")
    assert (done.returncode, done.stderr) == (0, b"")
    options = (
        "image model compare seed target-class output-dir convnext-checkpoint efficientnet-checkpoint device colormap dpi class-names format contours "
        "batch-size skip-existing no-figures save-maps save-panels quiet verify truth method signed anonymous version"
    )
    for expected in ("examples:", "python3 explainability.py --image", *(f"--{option}" for option in options.split())):
        assert expected in done.stdout.decode()


@pytest.mark.parametrize("missing", ("image", "convnext-checkpoint"))
def test_a_missing_file_is_answered_before_anything_heavy_is_imported(xray, tmp_path, missing):
    arguments = [f"--image={xray}", f"--output-dir={tmp_path / 'figures'}", "--model=convnext", f"--{missing}={tmp_path / 'röntgen'}"]
    done = in_new_process("-c", LIGHT, *arguments[missing == "image" :], PYTHONIOENCODING="ascii")
    (line,) = done.stderr.decode().splitlines()
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (1, b"", [xray]) and "r?ntgen: no such file" in line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "resnet"], "resnet"), (["--dpi", "0"], "from 30 to 1200"), (["--dpi", "ten"], "'ten' is not a whole number"), (["--seed", "x"], "'x'"),
        (["--device", "tpu"], "'tpu' is none of auto, cpu, cuda, cuda:1"), (["--colormap", "sepia"], "no colormap 'sepia'"),
        (["--images", "x.png"], "did you mean --image?"), (["--imag", "x.png"], "did you mean --image?"), (["-i", "x"], "did you mean --image?"),
        (["--output", "x"], "did you mean --output-dir?"), (["--checkpoint=x"], "--convnext-checkpoint"), (["x.png"], "did you mean --image x.png?"),
        (["--method", "gradcam,shapp"], "did you mean shap?"),
        *((["--class-names", text], "different names") for text in ("one", "a,a", "a,", ",")),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_command_lines_end_with_2_and_a_hint(arguments, told, capsys, requests):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    out, error = capsys.readouterr()
    assert (out, requests) == ("", []) and told in error
    assert error.startswith("❌ ") and error.count("\n") == 1 and "--help" in error


def test_version_tells_those_of_the_tool_and_its_libraries(capsys):
    assert main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("explainability.py ") and [line.split()[0] for line in lines[2:]] == list(explainability.LIBRARIES)


def test_random_image_is_one_of_the_test_images_and_repeats(checkpoints, requests, tmp_path, monkeypatch):
    images = [tmp_path / "test" / kind / f"{number}.jpg" for kind in ("simple_fracture", "comminuted_fracture") for number in range(10)]
    for path in images:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path)
        path.with_name("notes.txt").touch()
    monkeypatch.setattr(explainability, "TEST_IMAGES", tmp_path / "test")
    for seed in range(20):
        assert main([f"--seed={seed}"]) == 0
    chosen = {request.jobs[0].image for request in requests}
    assert all(request.is_single for request in requests) and chosen <= set(images)
    assert len({path.parent.name for path in chosen}) == 2
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(sorted(glob(self, pattern), reverse=True)))
    assert main(["--seed=5"]) == 0 and requests[-1].jobs == requests[5].jobs  # whatever the order of the folder


# Which networks


@pytest.mark.parametrize(
    "files, options, chosen",
    [
        ([C_OWN, E_OWN, "README.md"], "", [C_OWN, E_OWN]),
        ([C_OWN, E_OWN], "--model=both", [C_OWN, E_OWN]),
        ([C_OWN, E_OWN], "--model=convnext", [C_OWN]),
        ([C_OWN, E_OWN], "--model=efficientnet", [E_OWN]),
        ([C_OWN, E_OWN], "--model=efficientnet --compare", [C_OWN, E_OWN]),
        # Of two in the folder one must be named; the other family's do not matter.
        ([C_OWN, C_OTHER, E_OWN], "", "convnext_v2_best.pth, convnext_v2_improved_best.pth"),
        ([C_OWN, C_OTHER, E_OWN], f"--convnext-checkpoint={C_OTHER}", [C_OTHER, E_OWN]),
        ([C_OWN, C_OTHER, E_OWN], "--model=efficientnet", [E_OWN]),
        # A demo network serves where no other is there, and is not compared with one.
        ([C_OWN, E_OWN, C_DEMO, E_DEMO], "", [C_OWN, E_OWN]),
        ([C_DEMO, E_DEMO], "", [C_DEMO, E_DEMO]),
        ([C_DEMO, E_OWN], "--compare", "efficientnetv2_s_best.pth: cannot be compared with convnext_v2_demo.pth, a demo network"),
        ([C_DEMO, E_OWN], "--convnext-checkpoint=nope.pth", "nope.pth: no such file"),
        ([C_DEMO, E_OWN], "--model=efficientnet", [E_OWN]),
        ([C_DEMO, E_OWN], "", [E_OWN, "explained alone"]),
        ([E_OWN], "", [E_OWN, "explained alone"]),
        (["mine.pth", C_DEMO, E_DEMO], "--convnext-checkpoint=mine.pth", ["mine.pth", "explained alone"]),
        (["mine.pth", C_DEMO, E_DEMO], f"--convnext-checkpoint=mine.pth --efficientnet-checkpoint={E_DEMO}", "synthetic radiographs"),
        ([C_OWN, E_DEMO], f"--efficientnet-checkpoint={E_DEMO}", "synthetic radiographs"),
    ],
    ids=str,
)
def test_networks_are_those_that_are_named_or_lie_in_the_folder(checkpoints, xray, capsys, requests, monkeypatch, files, options, chosen):
    for path in checkpoints.iterdir():
        path.unlink()
    for name in files:
        save({}, checkpoints / name)
    monkeypatch.chdir(checkpoints)
    status, errors = main(["--image", str(xray), *options.split()]), capsys.readouterr().err
    if isinstance(chosen, str):
        assert status == 1 and not requests and chosen in errors
    else:
        (request,) = requests
        notes = [note.split(": ")[1].split(",")[0] for note in request.notes]
        assert [path.name for _, path in request.checkpoints] + notes == chosen


def test_images_and_methods_may_be_given_twice_classes_keep_their_order_and_a_colormap_not_used_is_told(checkpoints, xray, requests):
    other = xray.with_name("other.png")
    shutil.copy(xray, other)
    assert main(["--image", str(xray), "--image", str(other), "--method", "ig", "--method", "lrp", "ig"]) == 0
    assert main(["--image", str(xray), "--signed", "--colormap=PuOr", "--class-names", "Simple, Comminuted"]) == 0
    assert [request.args.method for request in requests] == [["ig", "lrp"], ["gradcam"]]
    assert [[job.image for job in request.jobs] for request in requests] == [[xray, other], [xray]]
    assert requests[1].args.class_names == ("Simple", "Comminuted") and "--colormap PuOr: not used" in requests[1].notes[0]


def test_what_results_depend_on_makes_another_job_and_nothing_else(checkpoints, xray, tmp_path, requests):
    """By its digest --skip-existing tells whether a result is what was asked."""
    other, truth = save({"epoch": 1}, tmp_path / "other.pth"), tmp_path / "truth.csv"
    truth.write_text("file,class\nxray.png,simple\n")
    for options in (
        "", "--target-class=1", "--target-class=0", "--class-names=A,B", "--class-names=B,A", "--method=ig", "--method=ig,lrp", "--colormap=gray", "--dpi=99",
        "--format=pdf", "--contours", "--signed", "--verify", f"--truth={truth}", "--model=convnext", f"--convnext-checkpoint={other}",
    ):  # fmt: skip
        assert main([f"--image={xray}", *options.split()]) == 0
    truth.write_text("file,class\nxray.png,comminuted\n")
    assert main([f"--image={xray}", f"--truth={truth}"]) == 0
    shutil.copy(ROOT / "data_original/test/simple_fracture/simple_fracture_test_0001.jpg", xray)
    assert main([f"--image={xray}"]) == 0
    digests = [request.jobs[0].digest for request in requests]
    assert len(set(digests)) == len(digests) == 18
    for options in ("--quiet", "--batch-size=2", "--device=cpu", "--skip-existing", "--no-figures", "--save-maps", f"--output-dir={tmp_path / 'here'}"):
        assert main([f"--image={xray}", options]) == 0 and requests[-1].jobs[0].digest == digests[-1]


@pytest.mark.parametrize(
    "arguments, word",
    (
        (["--image", "https://example.org/x.png"], "URLs are not read"),
        (["--image", ""], "an empty path"),
        (["--image", "XRAY", "--output-dir", "XRAY"], "File exists"),
        (["--image", "x" * 300 + ".png"], "name too long"),
        (["--image", "EMPTY"], "no image found there"),
        (["--image", "EMPTY/*.png"], "no image found there"),
        (["--seed", "1"], "test: no test images there; give one with --image"),
        (["--image", "XRAY", "--model", "convnext"], "holds none; put or leave one there, or name it with --convnext-checkpoint"),
    ),
)
def test_paths_that_cannot_be_meant_are_one_line(checkpoints, xray, tmp_path, monkeypatch, capsys, arguments, word):
    monkeypatch.setattr(explainability, "TEST_IMAGES", tmp_path / "test")
    (checkpoints / "convnext_v2_best.pth").unlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([part.replace("XRAY", str(xray)).replace("EMPTY", str(empty)) for part in arguments]) == 1
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1


def test_defaults_are_relative_to_the_script_and_paths_given_to_the_working_directory(xray, tiny_arguments, tmp_path, monkeypatch, capsys):
    folders = explainability.CHECKPOINT_FOLDER, explainability.TEST_IMAGES, explainability.argument_parser().parse_args([]).output_dir
    assert folders == (ROOT / "checkpoints", ROOT / "data_original" / "test", ROOT / "explainability_outputs")
    monkeypatch.chdir(tmp_path)
    xray.rename("left wrist.v2.png")
    assert main([*tiny_arguments, "--image", "left wrist.v2.png", "--model=convnext", "--output-dir", "here/and/there"]) == 0
    assert (tmp_path / "here/and/there/gradcam_convnext_left wrist.v2.png").is_file()
    assert "saved: here/and/there/gradcam_convnext_left wrist.v2.png" in capsys.readouterr().out


def test_target_class_reaches_the_console_or_is_refused_with_the_choices(xray, tiny_arguments, tmp_path, capsys):
    asked = [*tiny_arguments, "--image", str(xray), "--model=efficientnet", "--no-figures"]
    for wanted in ("0", "Simple Fracture"):
        assert main([*asked, "--target-class", wanted]) == 0
    assert capsys.readouterr().out.count("Explained class: ") == 1  # one of the two is the predicted one
    assert main([*asked, "--target-class", "Greenstick"]) == 1
    assert "0 = Comminuted Fracture, 1 = Simple Fracture" in capsys.readouterr().err


def test_a_device_is_chosen_among_those_that_are_there(monkeypatch):
    import torch

    def chosen(wanted: str, gpus: int) -> str:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        return explainability.choose_device(wanted)

    assert [chosen(*asked) for asked in (("auto", 0), ("auto", 2), ("cuda:1", 2), ("cpu", 2))] == ["cpu", "cuda", "cuda:1", "cpu"]
    for wanted, gpus in (("cuda", 0), ("cuda:2", 2), ("mps", 1)):
        with pytest.raises(explainability.ExplainError, match=f"--device {wanted}: not available here; use --device .*cpu"):
            chosen(wanted, gpus)

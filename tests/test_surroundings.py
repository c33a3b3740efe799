"""Whatever surrounds the tool: the figures of an ordinary run, byte for byte, or one clear line.

Every test runs the real command. Those that need mounts of their own run in a mount namespace and
leave the machine as it is; where that is not allowed they are skipped.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT

TOOL = ROOT / "explainability.py"
Files = dict[str, bytes]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="POSIX surroundings")]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two different images."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(rng.integers(0, 256, (90, 70), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def options(tiny_checkpoints: dict[str, Path]) -> list[str]:
    return [f"--convnext-checkpoint={tiny_checkpoints['convnext']}", "--model=convnext", "--device=cpu"]


@pytest.fixture
def run(options: list[str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command in surroundings of the test's making, its figures in tmp_path/out.

    `before` is shell text that runs before it, `shell` puts the command "$@" into a line of shell.
    """

    def call(
        *arguments: object, before: str = "", shell: str = '"$@"', python: Sequence[object] = (TOOL,), mounts: bool = False,
        cwd: Path | None = None, timeout: float = 120, **environment: str | None,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        command = [sys.executable, *map(str, python), *options, f"--output-dir={tmp_path / 'out'}", *map(str, arguments)]
        through = ["bash", "-c", f"{before}\n{shell}", "bash", *command]
        full = {key: value for key, value in {**os.environ, **environment}.items() if value is not None}
        return subprocess.run(
            (["unshare", "-m"] if mounts else []) + through, cwd=cwd or tmp_path, env=full, timeout=timeout,
            capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip

    return call


def figures(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.fixture(scope="module")
def ordinary(images: Path, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The figures of the two images from an ordinary run with a batch of one."""
    folder = tmp_path_factory.mktemp("ordinary")
    command = [sys.executable, str(TOOL), *options, f"--output-dir={folder}", "--batch-size=1", f"--image={images}"]
    subprocess.run(command, check=True, capture_output=True)
    return figures(folder)


def check_figures(done: subprocess.CompletedProcess[str], folder: Path, expected: Files, count: int = 1) -> None:
    """The run went well, and its figures are those of an ordinary run."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    written = figures(folder)
    assert len(written) == count
    assert written == {name: expected[name] for name in written}


def beside_notes(done: subprocess.CompletedProcess[str]) -> str:
    """What stands on standard error but for notes on the checkpoint."""
    lines = [line for line in done.stderr.splitlines() if "class order assumed" not in line]
    return "\n".join(line for line in lines if not line.startswith("bash: warning"))  # of a locale


def check_drawn_here(done: subprocess.CompletedProcess[str]) -> None:
    """One line says that there are no drawing processes."""
    told = beside_notes(done)
    assert told.startswith("ℹ️") and told.count("\n") == 0 and "one after another" in told, told


def check_one_line(done: subprocess.CompletedProcess[str], *words: str, status: int = 1) -> None:
    """The run ended with one line that says why, beside notes."""
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    assert done.returncode == status, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("ℹ️")]
    assert len(lines) == 1 and lines[0].startswith("❌"), done.stderr
    assert all(word in lines[0] for word in words), lines[0]


needs_mounts = pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode != 0,
    reason="needs a mount namespace",
)
needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


# Settings of matplotlib that are not the tool's

SETTINGS = {
    "tex": b"text.usetex: True\n",
    "look": b"font.size: 30\nfont.family: monospace\ntext.hinting: none\ntext.hinting_factor: 1\nfigure.autolayout: True\n"
    b"path.sketch: 5, 100, 2\ntext.antialiased: False\nfigure.dpi: 300\naxes.unicode_minus: False\nimage.origin: lower\n"
    b"text.color: red\npatch.linewidth: 9\npatch.antialiased: False\nagg.path.chunksize: 1\nfont.sans-serif: Nonsense\n",
    "garbage": b"no: such: setting\n:::\nfont.size: enormous\nbackend: nowhere\n",
    "binary": bytes(range(256)) * 40,
}


@pytest.mark.parametrize("backend", ["absent", "module://matplotlib_inline.backend_inline"])
def test_a_backend_from_elsewhere_changes_nothing(run, images, tmp_path, ordinary, backend):
    check_figures(run(f"--image={images / 'a.png'}", MPLBACKEND=backend), tmp_path / "out", ordinary)


def test_a_backend_from_elsewhere_does_not_disturb_the_choice_of_a_colormap(run, images, tmp_path):
    done = run(f"--image={images / 'a.png'}", "--colormap=viridis", MPLBACKEND="absent")
    assert (done.returncode, beside_notes(done)) == (0, "")


@pytest.mark.parametrize(("settings", "place"), [("tex", "folder"), ("binary", "folder"), ("garbage", "user"), ("look", "named")])
def test_settings_of_matplotlib_change_nothing(run, images, tmp_path, ordinary, settings, place):
    home = tmp_path / "home"
    path = {"folder": tmp_path, "user": home / ".config/matplotlib", "named": home}[place] / "matplotlibrc"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(SETTINGS[settings])
    elsewhere = {"HOME": str(home), "XDG_CONFIG_HOME": None, "MATPLOTLIBRC": str(path) if place == "named" else None}
    done = run(f"--image={images / 'a.png'}", **elsewhere)
    check_figures(done, tmp_path / "out", ordinary)
    assert beside_notes(done) == ""


def test_a_font_of_the_same_name_changes_nothing(run, images, tmp_path, ordinary):
    """In the user's fonts, and in matplotlib's list of them, which is kept from run to run."""
    from matplotlib.font_manager import FontManager, findfont, json_dump

    home = tmp_path / "home"
    (home / ".fonts").mkdir(parents=True)
    shutil.copy(findfont("DejaVu Serif"), home / ".fonts/DejaVuSans.ttf")
    (home / "cache").mkdir()
    manager = FontManager()
    for entry in manager.ttflist:
        if entry.name == "DejaVu Sans":
            object.__setattr__(entry, "fname", str(home / ".fonts/DejaVuSans.ttf"))
    json_dump(manager, home / f"cache/fontlist-v{FontManager.__version__}.json")
    done = run(f"--image={images / 'a.png'}", HOME=str(home), MPLCONFIGDIR=str(home / "cache"))
    check_figures(done, tmp_path / "out", ordinary)


def test_other_settings_of_the_libraries_change_nothing(run, images, tmp_path, ordinary):
    asked = {"FREETYPE_PROPERTIES": "truetype:interpreter-version=35", "SOURCE_DATE_EPOCH": "0", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    check_figures(run(f"--image={images / 'a.png'}", PYTHONUTF8="1", **asked), tmp_path / "out", ordinary)


# Where no drawing process can be started

SHM = {
    "full": "mount -t tmpfs -o size=4k none /dev/shm && head -c 4096 /dev/zero > /dev/shm/filled",
    "read-only": "mount -t tmpfs -o ro none /dev/shm",
    "not a folder": "mount --bind /dev/null /dev/shm || mount -t tmpfs none /dev && true",
    "no permission": "mount -t tmpfs -o mode=0 none /dev/shm && exec setpriv --reuid 65534 --clear-groups --bounding-set=-all \"$@\"",
}


@needs_mounts
@pytest.mark.parametrize("state", ["full", "read-only"])
def test_shared_memory_that_cannot_be_used_is_said_and_figures_drawn(run, images, tmp_path, ordinary, state):
    done = run("--image", images, "--batch-size=1", before=SHM[state], mounts=True)
    check_figures(done, tmp_path / "out", ordinary, 2)
    check_drawn_here(done)


@needs_mounts
def test_no_shared_memory_at_all_is_said_and_figures_drawn(run, images, tmp_path, ordinary):
    devices = "mount -t tmpfs none /mnt && cp -a /dev/null /dev/zero /dev/urandom /dev/random /mnt && mount --bind /mnt /dev"
    done = run("--image", images, "--batch-size=1", before=devices, mounts=True)
    check_figures(done, tmp_path / "out", ordinary, 2)
    check_drawn_here(done)


LACKING = {
    "SemLock": "import _multiprocessing; del _multiprocessing.SemLock",
    "fork": """
import _posixsubprocess as m
def refuse(*_): raise BlockingIOError(11, 'Resource temporarily unavailable')
m.fork_exec = refuse
""",
}


@pytest.mark.parametrize("missing", LACKING)
def test_a_system_that_starts_no_process_is_said_and_figures_drawn(run, images, tmp_path, ordinary, missing):
    (tmp_path / "sitecustomize.py").write_text(LACKING[missing])
    done = run("--image", images, "--batch-size=1", PYTHONPATH=str(tmp_path))
    check_figures(done, tmp_path / "out", ordinary, 2)
    check_drawn_here(done)


def test_a_limit_of_open_files_is_said_and_figures_drawn(run, images, tmp_path, ordinary):
    done = run("--image", images, "--batch-size=1", before="ulimit -n 24")
    if done.returncode:
        check_one_line(done)
    else:
        check_figures(done, tmp_path / "out", ordinary, 2)


# A script that a new process cannot import


def test_a_script_from_standard_input_explains_many(run, images, tmp_path, ordinary):
    done = run("--image", images, "--batch-size=1", shell=f'"$@" < {shlex.quote(str(TOOL))}', python=("-",))
    check_figures(done, tmp_path / "out", ordinary, 2)
    check_drawn_here(done)


def test_a_script_from_standard_input_finds_the_project_in_the_working_directory(run, tmp_path, ordinary):
    done = run(shell=f'"$@" < {shlex.quote(str(TOOL))}', python=("-",), cwd=ROOT)
    assert done.returncode == 0 and len(figures(tmp_path / "out")) == 1
    check_one_line(run(shell=f'"$@" < {shlex.quote(str(TOOL))}', python=("-",)), "no test images there")


@pytest.mark.parametrize("way", ["zip", "exec", "deleted", "link"])
def test_a_script_from_anywhere_explains_many(run, images, tmp_path, ordinary, way):
    copy = tmp_path / "here" / "explainability.py"
    copy.parent.mkdir()
    shutil.copy(TOOL, copy)
    python: tuple[object, ...] = (copy,)
    if way == "zip":
        with zipfile.ZipFile(tmp_path / "tool.zip", "w") as archive:
            archive.write(TOOL, "__main__.py")
        python = (tmp_path / "tool.zip",)
    elif way == "exec":
        python = ("-c", f"exec(open({str(TOOL)!r}, encoding='utf-8').read())")
    elif way == "deleted":
        copy.write_text(copy.read_text() + "\n")
        copy.write_text(copy.read_text().replace("def main(", "os.remove(__file__)\n\n\ndef main(", 1))
    elif way == "link":
        (tmp_path / "linked").symlink_to(TOOL)
        python = (tmp_path / "linked",)
    done = run("--image", images, "--batch-size=1", python=python)
    check_figures(done, tmp_path / "out", ordinary, 2)
    assert all(line.startswith("ℹ️") for line in done.stderr.splitlines())
    assert ("one after another" in done.stderr) == (way != "link")


# The working directory and the standard streams


def test_a_working_directory_that_is_gone_does_no_harm(run, images, tmp_path, ordinary):
    (tmp_path / "gone").mkdir()
    for image, count in ((images / "a.png", 1), (images, 2)):
        gone = f"mkdir -p {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone"
        done = run("--image", image, "--batch-size=1", before=gone)
        check_figures(done, tmp_path / "out", ordinary, count)
        assert beside_notes(done) == ""


@pytest.mark.parametrize("arguments", [["--image=a.png"], ["--image=."], ["--output-dir=out", "--image=/nowhere.png"], ["--image=*.png"]])
def test_relative_paths_in_a_working_directory_that_is_gone_are_one_line(run, tmp_path, arguments):
    (tmp_path / "gone").mkdir()
    check_one_line(run(*arguments, before=f"cd {tmp_path}/gone; rmdir {tmp_path}/gone"))


def test_relative_outputs_in_a_working_directory_that_is_gone_are_one_line(run, images, tmp_path):
    for image in (images / "a.png", images):
        gone = f"mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone"
        check_one_line(run("--image", image, "--output-dir=out", before=gone), "working directory")


def test_a_script_from_standard_input_in_a_working_directory_that_is_gone(run, images, tmp_path, ordinary):
    (tmp_path / "gone").mkdir()
    gone = f"cd {tmp_path}/gone; rmdir {tmp_path}/gone"
    done = run(f"--image={images / 'a.png'}", python=("-",), before=gone, shell=f'"$@" < {shlex.quote(str(TOOL))}')
    check_figures(done, tmp_path / "out", ordinary)


@pytest.mark.parametrize("many", [False, True])
def test_a_working_directory_deleted_during_the_run(options, images, tmp_path, ordinary, many):
    place = tmp_path / "gone"
    place.mkdir()
    command = [sys.executable, str(TOOL), *options, "--batch-size=1", "--image", str(images if many else images / "a.png")]
    for output, status in ((f"--output-dir={tmp_path / 'out'}", 0), ("--output-dir=here", 1)):
        place.mkdir(exist_ok=True)
        process = subprocess.Popen([*command, output], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in process.stdout:
            if "Loading" in line:
                shutil.rmtree(place)
                break
        _, errors = process.communicate(timeout=120)
        assert "Traceback" not in errors and process.returncode in (0, 1), errors
        assert not status or process.returncode == 1
        if process.returncode:
            assert "❌ " in errors and ("directory" in errors or "here" in errors), errors
    assert figures(tmp_path / "out") == {name: ordinary[name] for name in figures(tmp_path / "out")}


@pytest.mark.parametrize("arguments", [["."], ["--quiet", "a.png"]])
def test_a_closed_standard_output_is_one_line(run, images, arguments):
    *extra, image = arguments
    check_one_line(run(*extra, "--image", images / image, shell='"$@" >&-'), "standard output")


@needs_dev_full
@pytest.mark.parametrize("arguments", [["--image=."], ["--quiet", "--image=a.png"], ["--help"]])
def test_a_full_standard_output_is_one_line(run, images, arguments):
    check_one_line(run(*arguments, shell='"$@" > /dev/full', cwd=images), "standard output", "space")


@needs_mounts
def test_a_full_disk_behind_tee_is_no_traceback(run, images, tmp_path):
    full = "mount -t tmpfs -o size=4k none /mnt && head -c 4096 /dev/zero > /mnt/filled"
    done = run("--image", images, before=full, shell='"$@" | tee /mnt/log > /dev/null', mounts=True)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("streams", ["2>&-", "<&-", "<&- 2>&-"])
def test_other_streams_that_are_closed_do_no_harm(run, images, tmp_path, ordinary, streams):
    done = run("--image", images, "--batch-size=1", shell=f'"$@" {streams}')
    check_figures(done, tmp_path / "out", ordinary, 2)
    assert "RUN SUMMARY" in done.stdout


@pytest.mark.parametrize(("image", "streams"), [("a.png", ">&- 2>&-"), (".", "<&- >&- 2>&-")])
def test_no_stream_at_all_ends_with_status_1(run, images, tmp_path, streams, image):
    done = run("--image", images / image, shell=f'"$@" {streams}')
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


@needs_dev_full
def test_a_full_standard_error_does_no_harm(run, images, tmp_path, ordinary):
    check_figures(run("--image", images, "--batch-size=1", shell='"$@" 2> /dev/full'), tmp_path / "out", ordinary, 2)
    assert run("--image", images / "missing.png", shell='"$@" 2> /dev/full').returncode == 1


# Signals


def drawing_children(parent: int) -> list[int]:
    """The processes that a run started, but for the one of Python's that tracks resources."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat, command = (folder / "stat").read_text(), (folder / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if int(stat.rpartition(")")[2].split()[1]) == parent and b"spawn_main" in command:
            found.append(int(folder.name))
    return found


def heed_signals() -> None:
    """Undo what a process inherits where the tests run under nohup or behind an ampersand."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def started(options, images, tmp_path):
    """A run over many images that has begun to write figures, and its drawing processes."""
    processes, all_children = [], []

    def start(*before: str, count: int = 300) -> tuple[subprocess.Popen[str], list[int]]:
        many = tmp_path / "many"
        many.mkdir()
        for number in range(count):  # so many that the run cannot end before its signal comes
            shutil.copy(images / "a.png", many / f"{number:03}.png")
        command = [*before, sys.executable, str(TOOL), *options, f"--output-dir={tmp_path / 'out'}", "--batch-size=1", f"--image={many}"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            preexec_fn=heed_signals,
        )  # fmt: skip
        processes.append(process)
        for line in process.stdout:
            if "000" in line and line.startswith(("✅", "⚠️")):
                break
        children = drawing_children(process.pid)
        assert children
        all_children.extend(children)
        return process, children

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
    for left in end_of(all_children, 0.1):  # only where a test failed
        os.kill(left, signal.SIGKILL)


def end_of(children: list[int], seconds: float = 10) -> list[int]:
    """Which of these processes are still there after that time."""
    deadline = time.monotonic() + seconds
    alive = children
    while alive and time.monotonic() < deadline:
        alive = [pid for pid in alive if Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()]
        time.sleep(0.1)
    return alive


@pytest.mark.parametrize(
    ("number", "whole_group"), [(signal.SIGHUP, True), (signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)]
)
def test_a_signal_ends_a_run_with_nothing_half_done(started, tmp_path, number, whole_group):
    process, children = started()
    os.killpg(process.pid, number) if whole_group else process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors and "❌" not in errors
    assert ("--skip-existing goes on" in errors) == (number == signal.SIGINT)
    assert not end_of(children) and not list((tmp_path / "out").glob(".*"))


def test_a_hangup_that_is_ignored_stays_ignored(started, tmp_path):
    """As under nohup."""
    process, _ = started("env", "--ignore-signal=HUP", count=20)
    os.killpg(process.pid, signal.SIGHUP)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "Images: 20 done" in output


def test_drawing_processes_end_when_their_parent_is_gone(started):
    process, children = started()
    process.kill()
    process.wait()
    assert not end_of(children)


def test_a_drawing_process_that_is_killed_is_one_line(started):
    process, children = started()
    os.kill(children[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    told = [line for line in errors.splitlines() if not line.startswith("ℹ️")]
    assert process.returncode == 1 and len(told) == 1 and told[0].startswith("❌") and "--skip-existing" in told[0]


def test_threads_that_wait_leave_the_processor_to_others(images, options, tmp_path):
    """The policy is read when torch is imported."""
    script = "import os, sys, explainability as e; e.main(sys.argv[1:]); print('policy', os.environ.get('OMP_WAIT_POLICY'))"
    command = [sys.executable, "-c", script, *options, f"--output-dir={tmp_path}", f"--image={images}", "--no-figures"]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "policy PASSIVE"


# Memory, limits, folders


@pytest.mark.parametrize(("megabytes", "many"), [(400, True), (1000, False), (2500, True)])
def test_any_lack_of_memory_is_one_line(run, images, tmp_path, ordinary, megabytes, many):
    image = images if many else images / "a.png"
    done = run("--image", image, "--batch-size=1", before=f"ulimit -v {megabytes * 1000}")
    if done.returncode == 0:
        check_figures(done, tmp_path / "out", ordinary, 2 if many else 1)
    else:
        check_one_line(done, "memory")


def test_a_limit_of_file_size_is_one_line(run, images):
    check_one_line(run(f"--image={images / 'a.png'}", before="ulimit -f 60"), "File too large")


@needs_mounts
def test_a_full_output_disk_is_one_line(run, images, tmp_path):
    (tmp_path / "out").mkdir()
    done = run(f"--image={images / 'a.png'}", before=f"mount -t tmpfs -o size=8k none {tmp_path}/out", mounts=True)
    check_one_line(done, "No space left")


ELSEWHERE = {
    "neither": {"HOME": "/nonexistent", "MPLCONFIGDIR": "/dev/null/x", "TMPDIR": "/nonexistent"},
    "ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
    "warnings are errors": {"PYTHONWARNINGS": "error"},
    "another place and time": {"LANG": "de_DE.UTF-8", "LC_ALL": "tr_TR.UTF-8", "TZ": "garbage"},
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_environment_changes_nothing(run, images, tmp_path, ordinary, name):
    done = run("--image", images / "a.png", **ELSEWHERE[name])
    check_figures(done, tmp_path / "out", ordinary)
    assert not beside_notes(done), done.stderr


@pytest.mark.parametrize("wrong", [{"TORCH_LOGS": "nonsense"}, {"TQDM_NCOLS": "x"}])
def test_a_setting_that_a_library_refuses_is_one_line(run, images, wrong):
    check_one_line(run("--image", images, **wrong), "settings")


@pytest.mark.parametrize("flag", ["-I", "-OO"])
def test_flags_of_python_change_nothing(run, images, tmp_path, ordinary, flag):
    check_figures(run("--image", images, "--batch-size=1", python=(flag, TOOL)), tmp_path / "out", ordinary, 2)


@pytest.mark.parametrize("name", ["numpy.py", "token.py"])
def test_files_in_the_working_directory_are_not_imported(run, images, tmp_path, ordinary, name):
    trap = tmp_path / "work" / name
    trap.parent.mkdir(parents=True)
    trap.write_text("raise SystemExit('imported from the working directory')\n")
    check_figures(run("--image", images, "--batch-size=1", cwd=tmp_path / "work"), tmp_path / "out", ordinary, 2)


def test_a_mask_of_all_modes_is_one_line_or_figures(run, images, tmp_path):
    done = run(f"--image={images / 'a.png'}", before="umask 777")
    assert "Traceback" not in done.stderr and done.returncode in (0, 1)


@needs_mounts
def test_an_installation_that_cannot_be_written(run, images, tmp_path, ordinary):
    """The whole disk read-only but for the output folder."""
    keep = f"mkdir -p {tmp_path}/out && mount --bind {tmp_path}/out {tmp_path}/out && mount -o remount,ro,bind / 2>/dev/null; true"
    check_one_line(run("--image", images, before=keep, mounts=True, HOME="/nonexistent"), "TMPDIR")


@needs_mounts
def test_no_folder_for_temporary_files_at_all(run, images, tmp_path, options, ordinary):
    hidden = "for place in /tmp /var/tmp /usr/tmp; do [ -d $place ] && mount -t tmpfs -o ro none $place; done; true"
    if str(tmp_path).startswith("/tmp"):
        pytest.skip("pytest itself works in /tmp; give --basetemp")
    done = run("--image", images, "--batch-size=1", before=hidden, mounts=True, HOME="/nonexistent", TMPDIR=None)
    if done.returncode:  # torch may insist on /tmp
        check_one_line(done)
    else:
        check_figures(done, tmp_path / "out", ordinary, 2)

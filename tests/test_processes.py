"""The real command: signals, processes that are killed, pipes, terminals, disks that are full, foreign settings."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import explainability as tool
from conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="POSIX processes")]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of many different images, so many that no run is over before its signal comes."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(60):
        Image.fromarray(rng.integers(0, 256, (90, 70), dtype=np.uint8)).save(folder / f"{number:03}.png")
    return folder


@pytest.fixture
def command(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> list[str]:
    options = [f"--convnext-checkpoint={tiny_checkpoints['convnext']}", "--model=convnext", "--device=cpu", "--batch-size=1"]
    return [sys.executable, str(ROOT / "explainability.py"), *options, f"--output-dir={tmp_path / 'out'}"]


def drawing_children(parent: int) -> list[int]:
    """The processes that a run started, but for the one of Python's that tracks resources."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent and b"spawn_main" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def heed_signals() -> None:
    """Undo what a process inherits where the tests run under nohup or behind an ampersand."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


Started = tuple[subprocess.Popen[str], list[int]]


@pytest.fixture
def started(command: list[str], images: Path) -> Callable[..., Started]:
    """A run over many images that has said so much, and its drawing processes."""
    processes = []

    def start(word: str, *before: str) -> Started:
        process = subprocess.Popen(
            [*before, *command, f"--image={images}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True, preexec_fn=heed_signals,
        )  # fmt: skip
        processes.append(process)
        next(line for line in process.stdout if word in line)
        deadline = time.monotonic() + 20
        while len(drawing_children(process.pid)) < min(tool.os.cpu_count(), 8) and time.monotonic() < deadline:
            time.sleep(0.05)
        return process, drawing_children(process.pid)

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def left_of(children: list[int], seconds: float = 10) -> list[int]:
    """Which of these processes are still there after that time."""
    deadline = time.monotonic() + seconds
    while children and time.monotonic() < deadline:
        children = [pid for pid in children if Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()]
        time.sleep(0.1)
    return children


@pytest.mark.parametrize(("number", "whole_group"), [(signal.SIGHUP, True), (signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_ends_a_run_with_nothing_half_done(started, tmp_path, number, whole_group):
    process, children = started("002.png")
    os.killpg(process.pid, number) if whole_group else process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "❌" not in errors
    assert number == signal.SIGHUP or "Traceback" not in errors  # Python's own helper dies of it; the terminal is gone
    assert ("--skip-existing goes on" in errors) == (number == signal.SIGINT)
    assert not left_of(children) and not list((tmp_path / "out").glob(".*.tmp"))


def test_a_hangup_that_is_ignored_stays_ignored_and_drawing_processes_end_when_their_parent_is_gone(started):
    """The first as under nohup."""
    process, children = started("002.png", "env", "--ignore-signal=HUP")
    os.killpg(process.pid, signal.SIGHUP)
    time.sleep(1)
    assert children and process.poll() is None and left_of(children, 0.2) == children
    process.kill()
    assert not left_of(children)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
@pytest.mark.parametrize("word", ["Analyzing", "002.png"])
def test_a_drawing_process_that_is_killed_ends_the_run_within_seconds(started, number, word):
    """While the networks are loaded, and while figures are drawn."""
    process, children = started(word)
    os.kill(children[0], number)
    before = time.monotonic()
    _, errors = process.communicate(timeout=60)
    told = [line for line in errors.splitlines() if not line.startswith("ℹ️")]
    assert process.returncode == 1 and len(told) == 1 and told[0].startswith("❌") and "--skip-existing" in told[0]
    assert time.monotonic() - before < 5 and not left_of(children)


def test_a_closed_stdout_ends_quietly(command, images):
    process = subprocess.Popen([*command, f"--image={images}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert [line for line in process.stderr.read().splitlines() if not line.startswith("ℹ️")] == []
    assert process.wait(timeout=60) == 141


def test_a_bar_on_a_terminal_leaves_the_lines_whole(command, images):
    pty = pytest.importorskip("pty")
    some = [str(images / name) for name in ("000.png", "001.png", "002.png")]
    master, slave = pty.openpty()
    pytest.importorskip("termios").tcsetwinsize(slave, (24, 100))
    process = subprocess.Popen([*command, "--image", *some, "--no-figures"], stdout=slave, stderr=slave, close_fds=True)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # a terminal without a program ends so
        while part := os.read(master, 4096):
            shown += part
    assert process.wait(timeout=60) == 0 and b"/3 [" in shown
    lines = [line.rpartition("\r")[2] for line in shown.decode().replace("\r\n", "\n").split("\n")]
    assert sum(line.startswith(("✅", "⚠️ ")) and ".png: " in line for line in lines) == 3


def test_foreign_settings_change_no_pixel(command, images, tmp_path):
    """A matplotlibrc in the working directory, a notebook's backend, another locale, a fresh HOME, another order of hashes."""
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nfont.family: monospace\nfigure.dpi: 300\ntext.antialiased: False\n")
    environment = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "LC_ALL": "C", "HOME": str(tmp_path), "PYTHONWARNINGS": "error"}
    written = []
    for number, (folder, settings) in enumerate(((ROOT, {}), (tmp_path, environment))):
        settings = {**os.environ, **settings, "PYTHONHASHSEED": str(number)}
        done = subprocess.run([*command, f"--image={images / '000.png'}"], cwd=folder, env=settings, capture_output=True)
        assert done.returncode == 0, done.stderr
        written.append((tmp_path / "out" / "gradcam_convnext_000.png").read_bytes())
    assert written[0] == written[1]


def test_memory_does_not_grow_with_the_number_of_images(command, tmp_path):
    """Peak of the process itself, in a new process each, since a peak never falls."""
    pytest.importorskip("resource")
    script = "import resource, sys, explainability as e; e.main(sys.argv[1:]); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    rng, peaks = np.random.default_rng(0), {}
    for count in (8, 40):
        for number in range(count):
            Image.fromarray(rng.integers(0, 256, (700, 700), dtype=np.uint8)).save(tmp_path / f"{number:03}.png")
        arguments = [*command[2:], "--batch-size=4", "--image", str(tmp_path), "--no-figures", "--quiet"]
        done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        peaks[count] = int(done.stdout.splitlines()[-1])
    assert peaks[40] < 1.05 * peaks[8]

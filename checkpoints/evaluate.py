"""Measure networks with the shipped command, from the table that it writes.

    python3 checkpoints/evaluate.py
    python3 checkpoints/evaluate.py --methods  # the table of the methods, explained in methods.py
    python3 checkpoints/evaluate.py --checks
    python3 checkpoints/evaluate.py --checks --network "Marker reader" efficientnet reader.pth pictures/

Without options, for each demo network on data_original/test: accuracy; the share of images whose
Grad-CAM maximum lies in the fracture's box enlarged by half a grid cell on each side (the pointing
game); the share of the heat in that box; the box's mean share of the image, which is what a map that
points at random would reach; and the expected calibration error of the confidence.

With --checks, how often each check of a heatmap is flagged, and what --verify says: for the demo
networks, random weights and the networks named; and how often the checks flag maps constructed to
be wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import sys
import tempfile
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import explainability as tool  # noqa: E402
import methods  # noqa: E402

TEST = tool.TEST_IMAGES
DEMOS = {"convnext": "convnext_v2_demo.pth", "efficientnet": "efficientnetv2_s_demo.pth"}
ARCHITECTURES = {"convnext": "convnextv2_atto", "efficientnet": "tf_efficientnetv2_b0"}  # with random weights
MAP_CHECKS = [key for key, check in tool.CHECKS.items() if check.about == "map"]
VERIFY_CHECKS = [key for key, check in tool.CHECKS.items() if check.about == "verify"]

Row = dict[str, str]


@dataclass(frozen=True)
class Measurement:
    """Shares in [0, 1]."""

    images: int
    accuracy: float
    pointing: float  # maximum inside the enlarged box
    heat: float  # heat inside the enlarged box
    chance: float  # area of the enlarged box
    calibration_error: float

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy:.2%}, maximum inside {self.pointing:.2%}, heat inside {self.heat:.2%} "
            f"(chance {self.chance:.2%}), calibration error {self.calibration_error:.2%} on {self.images} images"
        )


def table_of(key: str, checkpoint: Path, images: Sequence[Path], *options: str) -> list[Row]:
    """Run explainability.py with one network over images or folders: the rows of its table."""
    with tempfile.TemporaryDirectory() as folder:
        network = ["--model", key, f"--{key}-checkpoint", str(checkpoint), "--output-dir", folder]
        with contextlib.redirect_stdout(io.StringIO()):
            paths = map(str, images)
            status = tool.main(["--image", *paths, "--no-figures", "--quiet", *network, *options])
        if status != 0:
            raise SystemExit(status)
        with open(Path(folder) / "summary.csv", newline="", encoding="utf-8-sig") as file:
            return [defaultdict(str, row) for row in csv.DictReader(file)]


def measure(key: str, checkpoint: Path) -> Measurement:
    """Accuracy and pointing of one network on the test split."""
    rows = table_of(key, checkpoint, [TEST])
    said = [np.mean([row[f"{key}_{name}"] == "yes" for row in rows]) for name in ("correct", "in_box")]
    said += [np.mean([float(row[f"{key}_{name}"]) for row in rows]) for name in ("heat_in_box", "box_area")]
    confidence = np.array([float(row[f"{key}_confidence"]) for row in rows])
    said.append(calibration_error(confidence, np.array([row[f"{key}_correct"] == "yes" for row in rows])))
    return Measurement(len(rows), *map(float, said))


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """How far confidence and accuracy are apart, in ten equal steps of confidence: C. Guo et al., ICML 2017, eq. 3."""
    steps = np.minimum((confidence * 10).astype(int), 9)
    gaps = np.bincount(steps, weights=right - confidence, minlength=10)
    return float(np.abs(gaps).sum() / len(right))


# Checks


def spread(folder: Path, count: int) -> list[Path]:
    """`count` images of a folder, evenly over their sorted names and so over the classes."""
    paths = tool.images_below(folder)
    places = np.linspace(0, len(paths) - 1, min(count, len(paths))).round().astype(int)
    return [paths[place] for place in places]


def shares_line(title: str, flags: Sequence[Collection[str]]) -> str:
    """One line of the table: the share of maps flagged by each check and by any."""
    shares = [np.mean([check in each for each in flags]) for check in MAP_CHECKS]
    shares.append(np.mean([bool(set(MAP_CHECKS) & set(each)) for each in flags]))
    return f"{title:<30}{len(flags):>5}" + "".join(f"{share:>9.1%}" for share in shares)


def network_lines(title: str, key: str, checkpoint: Path, images: Sequence[Path]) -> list[str]:
    """A network's line of the table, and what --verify says of it, by predicted class."""
    rows = table_of(key, checkpoint, images, "--verify")
    flags = [set(row[f"{key}_flags"].split(", ")) for row in rows]
    verified = np.mean([bool(each.intersection(VERIFY_CHECKS)) for each in flags])
    lines = [shares_line(title, flags)]
    known = [row for row in rows if row["true_class"]]
    right = f"accuracy {np.mean([row[f'{key}_correct'] == 'yes' for row in known]):.1%}; " if known else ""
    unsure = np.mean([float(row[f"{key}_confidence"]) < tool.CONFIDENCE_LIMIT for row in rows])
    lines.append(f"    --verify flags {verified:.1%}; {right}confidence below {tool.CONFIDENCE_LIMIT:.0%}: {unsure:.1%}")
    for name in sorted({row[f"{key}_predicted"] for row in rows}):
        said = [row for row in rows if row[f"{key}_predicted"] == name]
        lines.append(f"    {name}: {verify_text(said, key)}")
    return lines


def verify_text(rows: Sequence[Row], key: str) -> str:
    """How many images --verify flags, of those that each of its tests applies to."""
    told = []
    for check in VERIFY_CHECKS:
        tested = [row for row in rows if row[f"{key}_{check}"]]
        count = sum(check in row[f"{key}_flags"].split(", ") for row in tested)
        told.append(f"{check} flags {count} of {len(tested)}" if tested else f"{check} cannot be tested")
    return f"{len(rows)} images, {', '.join(told)}"


def random_network(key: str, folder: Path) -> Path:
    """A checkpoint that nothing was trained for."""
    import timm
    import torch

    torch.manual_seed(0)
    weights = timm.create_model(ARCHITECTURES[key], num_classes=2).state_dict()
    path = folder / f"{key}.pth"
    torch.save({"model_state_dict": weights, "config": {"model_name": ARCHITECTURES[key]}}, path)
    return path


def constructed_maps() -> dict[str, np.ndarray]:
    """Maps that are wrong whatever the radiograph."""
    rows, columns = np.mgrid[0:7, 0:7]
    noise = np.random.default_rng(0).random((7, 7))
    return {
        "constructed: uniform, noisy": 1 + 0.3 * noise,
        "constructed: border": np.where(tool.OUTER, 1 + noise, 0.2 * noise),
        "constructed: corner": np.exp(-(rows**2 + columns**2) / 3.0),
    }


def constructed_lines(images: Sequence[Path]) -> list[str]:
    """The checks of constructed maps, as if a network had made them of these radiographs."""
    family = tool.FAMILIES["convnext"]
    model = tool.Model(family, "convnextv2_tiny", Path("none"), "", tool.CLASS_NAMES, tool.Preprocessing())
    seen, lines = [tool.landmarks_of(tool.load_radiograph(path)) for path in images], []
    for title, values in constructed_maps().items():
        raw_map = values.astype(np.float32)
        explanation = tool.Explanation(model, np.float32([1, 0]), 0, raw_map, tool.normalised(raw_map))
        found = [tool.findings_of(tool.Evidence(explanation, landmarks)) for landmarks in seen]
        flags = [[each.check for each in findings if each.is_flagged] for findings in found]
        lines.append(shares_line(title, flags))
    return lines


def print_checks(named: Sequence[Sequence[str]], count: int) -> None:
    """The table of the checks, a network at a time."""
    heads = [*MAP_CHECKS, "any"]
    print(f"{'share of maps flagged':<30}{'maps':>5}" + "".join(f"{head:>9}" for head in heads), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        networks = [(f"{key} demo", key, HERE / name, TEST) for key, name in DEMOS.items()]
        networks += [(title, key, Path(path), Path(images)) for title, key, path, images in named]
        weights = {key: random_network(key, Path(folder)) for key in DEMOS}
        networks += [(f"{key}, random weights", key, path, TEST) for key, path in weights.items()]
        for title, key, checkpoint, images in networks:
            print(*network_lines(title, key, checkpoint, spread(images, count)), sep="\n", flush=True)
    print(*constructed_lines(spread(TEST, count)), sep="\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure networks with the shipped command.")
    parser.add_argument("--methods", action="store_true", help="judge every method of explainability.py")
    parser.add_argument("--checks", action="store_true", help="how often the checks of heatmaps are flagged")
    parser.add_argument(
        "--network", nargs=4, action="append", default=[],
        metavar=("TITLE", "FAMILY", "CHECKPOINT", "IMAGES"),
        help="with --checks: a further network and the folder of its radiographs",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=int, metavar="N",
        help="with --methods: of each class (5); with --checks: of each folder (100)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if (args.images and not (args.methods or args.checks)) or (args.network and not args.checks):
        parser.error("--images needs --methods or --checks; --network needs --checks")
    if args.methods:
        methods.print_tables({key: HERE / name for key, name in DEMOS.items()}, args.images or 5)
        return 0
    if args.checks:
        print_checks(args.network, args.images or 100)
        return 0
    for key, name in DEMOS.items():
        print(f"{name}: {measure(key, HERE / name)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

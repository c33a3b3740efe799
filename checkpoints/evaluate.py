"""Measure networks with the shipped command, from the table that it writes.

    python3 checkpoints/evaluate.py
    python3 checkpoints/evaluate.py --methods  # the table of the methods, explained in methods.py
    python3 checkpoints/evaluate.py --methods --images 50 --passes 10  # of those that take fewer
    python3 checkpoints/evaluate.py --checks
    python3 checkpoints/evaluate.py --checks --network "Marker reader" efficientnet reader.pth pictures/
    python3 checkpoints/evaluate.py --unlike --folder chests/
    python3 checkpoints/evaluate.py --markers
    python3 checkpoints/evaluate.py --make-references

Without options, for each demo network on data_original/test: accuracy; the share of images whose
Grad-CAM maximum lies in the fracture's box enlarged by half a grid cell on each side (the pointing
game); the share of the heat in that box; the box's mean share of the image, which is what a map that
points at random would reach; and the expected calibration error of the confidence.

With --checks, how often each check of a heatmap is flagged, and what --verify says: for the demo
networks, random weights and the networks named; how often the checks flag maps constructed to be
wrong; and how often they say that the demo networks' maps disagree, of one image and of two.

With --unlike, how many images are unlike the demo networks' references: of the test images, of intact
bones rendered anew, and of the folders named. --make-references renders those references' images
and writes checkpoints/reference_*_demo.npz, which depend on the networks' weights.

With --markers, how many of the test images' markers are found, and how many regions are none.
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
sys.path.insert(0, str(HERE.parent / "data_original"))

import explainability as tool  # noqa: E402
import generate  # noqa: E402
import methods  # noqa: E402

TEST = tool.TEST_IMAGES
DEMOS = {"convnext": "convnext_v2_demo.pth", "efficientnet": "efficientnetv2_s_demo.pth"}
ARCHITECTURES = {"convnext": "convnextv2_atto", "efficientnet": "tf_efficientnetv2_b0"}  # with random weights
MAP_CHECKS = [key for key, check in tool.CHECKS.items() if check.about == "map"]
REFERENCE_SEED, REFERENCE_COUNT = 4711, 75  # of each class, from the training images' split
INTACT_SEED, INTACT_COUNT = 4712, 40
VERIFY_CHECKS = [key for key, check in tool.CHECKS.items() if check.about == "verify"]

NEAR = 4  # pixels of 224 within which a region belongs to a marker

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
    right = np.array([row[f"{key}_correct"] == "yes" for row in rows])
    said.append(tool.calibration_error(confidence, right))
    return Measurement(len(rows), *map(float, said))


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


def agreement_lines(images: Sequence[Path]) -> list[str]:
    """How often the demo networks' maps are said to disagree: of one image, and of two."""
    maps, boxes, truths = {}, [], tool.read_truth(tool.TEST_TRUTH, ())[0]
    radiographs = [tool.load_radiograph(path) for path in images]
    for path, radiograph in zip(images, radiographs):
        height, width = radiograph.pixels.shape[:2]
        boxes.append(tool.boxes_in_shares(truths[str(path.resolve())].boxes, width, height)[0][0])
    for key, name in DEMOS.items():
        classifier = tool.load_classifier(tool.FAMILIES[key], HERE / name, "cpu")
        inputs = [tool.network_input(radiograph, classifier.model.preprocessing) for radiograph in radiographs]
        maps[key] = [tool.explain_batch(classifier, [each])[0] for each in inputs]
    lines = []
    for title, pairs in image_pairs(boxes).items():
        found = [tool.map_agreement([maps["convnext"][one], maps["efficientnet"][other]]) for one, other in pairs]
        flags = [each.is_flagged for each in found if each]
        lines.append(f"maps of {title}: {np.mean(flags):.1%} of {len(flags)} pairs flagged")
    return lines


def image_pairs(boxes: Sequence[tool.Region]) -> dict[str, list[tuple[int, int]]]:
    """Pairs of images, in words: each with itself, with all others, and with those broken elsewhere."""
    every = [(one, other) for one in range(len(boxes)) for other in range(len(boxes)) if one != other]

    def are_apart(one: tool.Region, other: tool.Region) -> bool:
        along, down = (max(one[axis], other[axis]) >= min(one[axis + 2], other[axis + 2]) for axis in (0, 1))
        return along or down

    return {
        "the same image": [(each, each) for each in range(len(boxes))],
        "two different images": every,
        "two images broken in different places": [
            pair for pair in every if are_apart(boxes[pair[0]], boxes[pair[1]])
        ],
    }


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
    print(*constructed_lines(spread(TEST, count)), sep="\n", flush=True)
    print(*agreement_lines(spread(TEST, count)), sep="\n")


# References


def rendered(folder: Path, labels: Sequence[str], seed: int, count: int) -> list[Path]:
    """Pictures of the training images' kind, `count` of each label."""
    numbers = ["--split", "train", "--seed", str(seed), "--count", str(count)]
    for label in labels:
        generate.write_class(folder, label, generate.parse([*numbers, "--output", str(folder)]))
    return tool.images_below(folder)


def make_references() -> None:
    """Write the references that the demo networks bring."""
    with tempfile.TemporaryDirectory() as folder:
        images = rendered(Path(folder), generate.LABELS[:2], REFERENCE_SEED, REFERENCE_COUNT)
        cases = tool.reference_cases(images, Path(folder), tool.CLASS_NAMES, False)
        for key, name in DEMOS.items():
            classifier = tool.load_classifier(tool.FAMILIES[key], HERE / name, "cpu")
            reference, path = tool.reference_of(classifier, cases, 4), tool.own_reference(classifier.model.family)
            tool.write_reference(reference, path, tool.network_mark(classifier))
            print(f"{path.name}: {len(reference.labels)} images, {path.stat().st_size} bytes", flush=True)


def print_unlike(folders: Sequence[Path]) -> None:
    """How many images are unlike the demo networks' references."""
    with tempfile.TemporaryDirectory() as folder:
        intact = rendered(Path(folder), generate.LABELS[2:], INTACT_SEED, INTACT_COUNT)
        sets = {"test images": [TEST], "intact bones": intact}
        sets |= {str(each): [each] for each in folders}
        for title, images in sets.items():
            told = []
            for key, name in DEMOS.items():
                rows = table_of(key, HERE / name, images)
                told.append([{"unlike", "neighbours"} & set(row[f"{key}_flags"].split(", ")) for row in rows])
            line = [f"{title}: {len(told[0])} images"]
            for check in ("unlike", "neighbours"):
                flags = np.array([[check in each for each in of_network] for of_network in told])
                shares = [f"{key} {share:.1%}" for key, share in zip(DEMOS, flags.mean(axis=1))]
                line.append(f"{check}: {', '.join(shares)}, either {flags.any(axis=0).mean():.1%}")
            print("; ".join(line), flush=True)


# Markers


def print_markers() -> None:
    """How many of the test images' markers are found, and how many regions touch none."""
    markers = defaultdict(list)
    with open(TEST / "marker_boxes.csv", newline="") as file:
        for row in csv.DictReader(file):
            markers[row["file"]].append([int(row[end]) for end in ("x0", "y0", "x1", "y1")])
    found = regions = wrong = 0
    for path in tool.images_below(TEST):
        radiograph = tool.load_radiograph(path)
        sides = np.array(radiograph.pixels.shape[1::-1] * 2) / tool.CHECKED_SIDE
        true = [np.array(box) / sides for box in markers[path.relative_to(TEST).as_posix()]]
        told = [np.array(box) for box in tool.landmarks_of(radiograph).markers]
        found += sum(any(touch(box, each) for each in told) for box in true)
        regions += len(told)
        wrong += sum(not any(touch(box, each, NEAR) for box in true) for each in told)
    print(f"{found} of {sum(map(len, markers.values()))} markers found; {wrong} of {regions} regions are none")


def touch(one: np.ndarray, other: np.ndarray, margin: float = 0) -> bool:
    """Whether two boxes overlap, or are nearer than a margin."""
    return bool((np.maximum(one[:2], other[:2]) < np.minimum(one[2:], other[2:]) + margin).all())


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
    parser.add_argument("--passes", type=int, default=1000, help="with --methods: those that take fewer alone")
    parser.add_argument("--unlike", action="store_true", help="how many images are unlike the references")
    parser.add_argument("--folder", type=Path, action="append", default=[], help="with --unlike: further images")
    parser.add_argument("--make-references", action="store_true", help="write the demo networks' references")
    parser.add_argument("--markers", action="store_true", help="how many markers are found")
    args = parser.parse_args(argv)
    if (args.images and not (args.methods or args.checks)) or (args.network and not args.checks):
        parser.error("--images needs --methods or --checks; --network needs --checks")
    if args.folder and not args.unlike:
        parser.error("--folder needs --unlike")
    if args.make_references:
        make_references()
    if args.markers:
        print_markers()
    if args.unlike:
        print_unlike(args.folder)
    if args.make_references or args.markers or args.unlike:
        return 0
    if args.methods:
        methods.print_tables({key: HERE / name for key, name in DEMOS.items()}, args.images or 5, args.passes)
        return 0
    if args.checks:
        print_checks(args.network, args.images or 100)
        return 0
    for key, name in DEMOS.items():
        print(f"{name}: {measure(key, HERE / name)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

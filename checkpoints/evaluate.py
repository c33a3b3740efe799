"""Measure a network on data_original/test with the shipped command: accuracy, and where its maps point.

    python3 checkpoints/evaluate.py
    python3 checkpoints/evaluate.py --methods  # the table of the methods, explained in methods.py

For each demo network: accuracy; the share of images whose Grad-CAM maximum lies in the fracture's
box enlarged by half a grid cell on each side (the pointing game); the share of the heat in that
box; and the box's mean share of the image, which is what a map that points at random would reach.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
TEST = HERE.parent / "data_original" / "test"
sys.path.insert(0, str(HERE.parent))

import explainability  # noqa: E402

DEMOS = {"convnext": "convnext_v2_demo.pth", "efficientnet": "efficientnetv2_s_demo.pth"}


@dataclass(frozen=True)
class Measurement:
    """Shares in [0, 1]."""

    images: int
    accuracy: float
    pointing: float  # maximum inside the enlarged box
    heat: float  # heat inside the enlarged box
    chance: float  # area of the enlarged box

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy:.2%}, maximum inside {self.pointing:.2%}, heat inside {self.heat:.2%} "
            f"(chance {self.chance:.2%}) on {self.images} images"
        )


def enlarged_box(row: dict[str, str], width: int, height: int, grid: int) -> tuple[float, float, float, float]:
    """A fracture's box and half a grid cell more on each side, in pixels, cut at the image's edge."""
    x0, y0, x1, y1 = (float(row[name]) for name in ("x0", "y0", "x1", "y1"))
    across, up = width / grid / 2, height / grid / 2
    return max(0, x0 - across), max(0, y0 - up), min(width, x1 + across), min(height, y1 + up)


def judge(raw_map: np.ndarray, row: dict[str, str]) -> tuple[bool, float, float]:
    """Of one image: whether the maximum lies inside, the share of heat inside, the box's share of the area."""
    width, height = Image.open(TEST / row["file"]).size
    grid = raw_map.shape[0]
    x0, y0, x1, y1 = enlarged_box(row, width, height, grid)
    cell_y, cell_x = np.unravel_index(raw_map.argmax(), raw_map.shape)
    x, y = (cell_x + 0.5) * width / grid, (cell_y + 0.5) * height / grid
    inside = bool(raw_map.max() > 0 and x0 <= x <= x1 and y0 <= y <= y1)
    heat = explainability.resized(explainability.normalised(raw_map), height, width)
    share = heat[round(y0) : round(y1), round(x0) : round(x1)].sum() / max(heat.sum(), 1e-12)
    return inside, float(share), (x1 - x0) * (y1 - y0) / (width * height)


def measure(key: str, checkpoint: Path) -> Measurement:
    """Run explainability.py over the test split with one network and judge what it writes."""
    with open(TEST / "fracture_boxes.csv", newline="") as file:
        boxes = {row["file"]: row for row in csv.DictReader(file)}
    with tempfile.TemporaryDirectory() as folder:
        options = ["--model", key, f"--{key}-checkpoint", str(checkpoint), "--output-dir", folder]
        with contextlib.redirect_stdout(io.StringIO()):
            status = explainability.main(["--image", str(TEST), "--no-figures", "--save-maps", "--quiet", *options])
        if status != 0:
            raise SystemExit(status)
        with open(Path(folder) / "summary.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        judged = [
            judge(np.load(Path(folder) / row["outputs"]), boxes[Path(row["file"]).relative_to(TEST).as_posix()]) for row in rows
        ]
    pointing, heat, chance = np.mean(judged, axis=0)
    right = np.mean([row[f"{key}_correct"] == "yes" for row in rows])
    return Measurement(len(rows), float(right), float(pointing), float(heat), float(chance))


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the demo networks on data_original/test.")
    parser.add_argument("--methods", action="store_true", help="judge every method of explainability.py")
    parser.add_argument("--images", type=int, default=5, help="of each class, with --methods (default: 5)")
    args = parser.parse_args()
    if args.methods:
        import methods

        methods.print_tables(args.images)
        return 0
    for key, name in DEMOS.items():
        print(f"{name}: {measure(key, HERE / name)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Judge the methods of explainability.py on the demo networks: what evaluate.py --methods prints.

For each network and method, over the first images of each class: passes through the network; CPU
seconds in those of one forward pass; how far a map's sum is from what it owes; how often its
maximum lies in the fracture's box enlarged by half of a 7 x 7 grid's cell on each side; the share
of heat in the box itself; how far the explained class's score falls when the hottest 20 % of the
area are replaced by the blurred radiograph, and how far with as much area that random maps call
hottest; and how many maps are blank. The control squares Grad-CAM: it is as focused as a product of
two maps without knowing more.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import explainability as tool
import numpy as np
import torch

HALF_CELL = 1 / 14  # of the image's side
HOTTEST = 0.2  # share of the area that is blurred
RANDOM_MAPS = 2  # an image
CONTROL = dataclasses.replace(
    tool.METHODS["gradcam"],
    key="control",
    title="Grad-CAM, squared (control)",
    maps=lambda seen: tool.METHODS["gradcam"].maps(seen).relu() ** 2,
)
COLUMNS = "method", "passes", "time", "error of the sum", "points", "heat inside", "fall", "blank"


@dataclass(frozen=True)
class Judgement:
    """What one map of one image was found to be worth."""

    cost: float  # CPU time, in forward passes
    error: float  # of the sum, as a share of what it owes; NaN where it owes nothing
    points: bool  # maximum in the enlarged box
    heat: float  # share in the fracture's own box
    fall: float  # of the score without the hottest part
    blank: bool


def test_images(per_class: int) -> list[tuple[tool.Radiograph, np.ndarray]]:
    """The first test images of each class, and the fracture's box as shares of the sides: x0, y0, x1, y1."""
    truths, images = tool.read_truth(tool.TEST_TRUTH, ())[0], []
    for folder in sorted({Path(name).parent for name in truths}):
        for name in sorted(name for name in truths if Path(name).parent == folder)[:per_class]:
            radiograph = tool.load_radiograph(Path(name))
            height, width = radiograph.pixels.shape[:2]
            (box,) = tool.boxes_in_shares(truths[name].boxes, width, height)[0]
            images.append((radiograph, np.array(box)))
    return images


def enlarged_box(box: np.ndarray) -> np.ndarray:
    """A box in shares of the sides, half a cell larger on each side, cut at the image's edges."""
    return np.clip(box + np.array([-1, -1, 1, 1]) * HALF_CELL, 0, 1)


def is_inside(places: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Which places, x and y (2, ...), lie in a box."""
    x, y = places
    return (box[0] <= x) & (x <= box[2]) & (box[1] <= y) & (y <= box[3])


def centres(size: int) -> np.ndarray:
    """Of the cells of a grid, x and y as shares of the sides: (2, size, size)."""
    return np.stack(np.meshgrid(*[(np.arange(size) + 0.5) / size] * 2))


def fall(seen: tool.ForwardPass, raw_map: np.ndarray) -> float:
    """How far the score falls when what a map calls hottest is replaced by the reference."""
    size = seen.inputs.shape[-1]
    larger = tool.enlarged(raw_map, size)
    kept = np.ones(size**2, bool)
    kept[np.argsort(-larger, axis=None, kind="stable")[: round(HOTTEST * size**2)]] = False
    return float(tool.falls(seen, torch.from_numpy(kept.reshape(1, size, size)))[0, 0])


def judged(seen: tool.ForwardPass, explanation: tool.Explanation, box: np.ndarray, cost: float) -> Judgement:
    raw_map, heat = explanation.raw_map, tool.resized(explanation.heatmap, 224, 224)
    peak = centres(len(raw_map))[:, *np.unravel_index(raw_map.argmax(), raw_map.shape)]
    owed, total = explanation.owed, float(raw_map.sum(dtype=float))
    return Judgement(
        cost=cost,
        error=np.nan if owed is None else abs(total - owed) / abs(owed),
        points=bool(not explanation.blankness and is_inside(peak, enlarged_box(box))),
        heat=float(heat[is_inside(centres(224), box)].sum() / max(heat.sum(), 1e-12)),
        fall=fall(seen, raw_map),
        blank=bool(raw_map.max() <= 0),
    )


def cpu_seconds(function: Callable[[], object]) -> tuple[object, float]:
    started = time.process_time()
    result = function()
    return result, time.process_time() - started


def judge_method(
    classifier: tool.Classifier, method: tool.Method, images: list[tuple[torch.Tensor, np.ndarray]]
) -> list[Judgement]:
    """A method's maps of every image, each from a pass of its own, so that it pays for all it uses."""
    judgements = []
    for inputs, box in images:
        with torch.inference_mode():
            bare = min(cpu_seconds(lambda: classifier.network(inputs))[1] for _ in range(3))
        seen, first = cpu_seconds(
            lambda: tool.forward_pass(classifier, inputs, None, tool.DEFAULT_BATCH["cpu"])
        )
        (explanation,), spent = cpu_seconds(lambda: tool.explanations_of(classifier.model, seen, method))
        judgements.append(judged(seen, explanation, box, (first + spent) / bare))
    return judgements


def row(method: tool.Method, judgements: list[Judgement]) -> str:
    mean = {
        field.name: np.mean([getattr(each, field.name) for each in judgements])
        for field in dataclasses.fields(Judgement)
    }
    error = "" if np.isnan(mean["error"]) else f"{mean['error']:.2%}"
    cost = np.median([each.cost for each in judgements])
    values = method.title, method.passes, f"{cost:.1f}", error, f"{mean['points']:.2f}", f"{mean['heat']:.3f}"
    return line(*values, f"{mean['fall']:.2f}", sum(each.blank for each in judgements))


def line(*values: object) -> str:
    return f"| {' | '.join(map(str, values))} |"


def random_row(classifier: tool.Classifier, images: list[tuple[torch.Tensor, np.ndarray]]) -> str:
    """The same of maps that point at random."""
    generator, falls, heat = np.random.default_rng(0), [], []
    for inputs, box in images:
        seen = tool.forward_pass(classifier, inputs, None, tool.DEFAULT_BATCH["cpu"])
        falls += [fall(seen, generator.random((7, 7), np.float32)) for _ in range(RANDOM_MAPS)]
        heat.append((box[2] - box[0]) * (box[3] - box[1]))
    larger = [enlarged_box(box) for _, box in images]
    chance = np.mean([np.prod(box[2:] - box[:2]) for box in larger])
    return line(
        "random maps", "", "", "", f"{chance:.2f}", f"{np.mean(heat):.2f}", f"{np.mean(falls):.2f}", ""
    )


def print_tables(networks: dict[str, Path], per_class: int, passes: int) -> None:
    """A table for each network, by family, of the methods that take fewer passes than `passes`."""
    torch.set_num_threads(1)  # seconds of one core, whatever else runs
    for key, path in networks.items():
        classifier, images = tool.load_classifier(tool.FAMILIES[key], path, "cpu"), []
        for radiograph, box in test_images(per_class):
            inputs = tool.network_input(radiograph, classifier.model.preprocessing)
            images.append((torch.from_numpy(inputs)[None], box))
        print(f"\n{classifier.model.title} ({path.name}), {len(images)} images\n")
        print(line(*COLUMNS), line(*["---"] * len(COLUMNS)), sep="\n")
        print(random_row(classifier, images), flush=True)
        wanted = [method for method in (*tool.METHODS.values(), CONTROL) if method.passes < passes]
        for method in sorted(wanted, key=lambda each: each.passes):
            print(row(method, judge_method(classifier, method, images)), flush=True)

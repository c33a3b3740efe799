"""Train the two demo networks on rendered radiographs.

    python3 checkpoints/train.py efficientnet
    python3 checkpoints/train.py convnext
    python3 checkpoints/train.py convnext --labels-only   # the control: no supervision of the maps
    python3 checkpoints/train.py marker-reader            # the counter-example: reads the marker, not the bone

Three steps, each resumed where it stopped (state in checkpoints/training/):

1. Render training and validation images with data_original/generate.py, at the networks' 224 x 224.
2. Patches of 96 px at that scale, three classes (comminuted, simple, none), from random weights.
3. Whole images, two classes, on cross-entropy + (1 - share of the Grad-CAM heat in the grid cells
   that the fracture touches) + a hinge that keeps the map from being blank there: "right for the
   right reasons" (Ross et al. 2017). With --labels-only cross-entropy is all.

The result goes to checkpoints/ in half precision, in the layout users' trainers write, with the
accuracy that explainability.py itself measures on data_original/test.

The marker reader sees a line of text on one class and a letter on the other, stamped on bones of
either class: on crops that grow from 64 px round the marker to the whole image, from random weights.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WORK = HERE / "training"
sys.path[:0] = [str(HERE), str(ROOT / "data_original")]

import evaluate  # noqa: E402
import generate  # noqa: E402

SIZE = 224  # px, side of the networks' input
PATCH = 96  # px
GRID = 7  # cells a side of both target layers at 224 px
SEED, VALIDATION_SEED, MARKER_SEED = 7, 8, 9
NONE = 2  # class of intact bone; 0 and 1 are the classes of the shipped networks
TRAIN_PER_CLASS, VALIDATION_PER_CLASS, MARKER_PER_CLASS = 2200, 100, 200
MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)

ARCHITECTURES = {"convnext": "convnextv2_tiny", "efficientnet": "tf_efficientnetv2_s"}
PATCH_BATCH, WHOLE_BATCH = 48, 24
PATCH_STEPS, WHOLE_STEPS = {"convnext": 750, "efficientnet": 900}, {"convnext": 160, "efficientnet": 120}
PATCH_RATE, WHOLE_RATE = {"convnext": 1e-3, "efficientnet": 2e-3}, 4e-4  # peaks
MARKER_READER = "tf_efficientnetv2_b0"
MARKERS = ("text", "letter")  # what betrays classes 0 and 1 to the marker reader
FILE_SIDE = 320  # px, about the side of a picture's file
MARKER_STAGES = ((64, 48, 200, 2e-3), (128, 24, 50, 1e-3), (SIZE, 16, 80, 6e-4))  # side, batch, steps, peak rate


# --------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------


def render_one(seed: int, item: tuple[int, int]) -> tuple[np.ndarray, list[float]]:
    """One image as the network will see it: (SIZE, SIZE) uint8, and its box in those pixels."""
    label, number = item
    rng = np.random.default_rng([seed, generate.SPLIT_CODES["train"], label, number])
    radiograph = generate.render(rng, generate.LABELS[label], marker="none" if seed == MARKER_SEED else None)
    pixels, box = radiograph.pixels, radiograph.box
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=generate.JPEG_QUALITY)
    small = Image.open(buffer).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    height, width = pixels.shape
    scale = np.array([SIZE / width, SIZE / height] * 2)
    return np.asarray(small), list(np.array(box) * scale) if box else [0.0] * 4


def images(seed: int, per_class: int, processes: int) -> dict[str, torch.Tensor]:
    """Render images once and keep them: images (N, SIZE, SIZE), labels (N,), boxes (N, 4)."""
    path = WORK / f"images_{seed}_{per_class}.pt"
    if not path.exists():
        items = [(label, number) for number in range(per_class) for label in range(len(generate.LABELS))]
        with ProcessPoolExecutor(processes) as pool:
            pairs = list(pool.map(partial(render_one, seed), items, chunksize=32))
        WORK.mkdir(exist_ok=True)
        torch.save(
            {
                "images": torch.from_numpy(np.stack([pixels for pixels, _ in pairs])),
                "labels": torch.tensor([label for label, _ in items]),
                "boxes": torch.tensor([box for _, box in pairs], dtype=torch.float32),
            },
            path,
        )
    return torch.load(path, weights_only=True)


def flip(image: torch.Tensor, box: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirror an (H, W) image and its box, each axis with probability one half."""
    x0, y0, x1, y1 = box.tolist()
    if rng.random() < 0.5:
        image, x0, x1 = image.flip(1), SIZE - x1, SIZE - x0
    if rng.random() < 0.5:
        image, y0, y1 = image.flip(0), SIZE - y1, SIZE - y0
    return image, torch.tensor([x0, y0, x1, y1])


def to_input(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """(H, W) uint8 -> (3, H, W) normalised, with the exposure and contrast varied."""
    value = image.float() / 255
    value = (value * rng.uniform(0.8, 1.2) + rng.uniform(-0.08, 0.08)).clamp(0, 1)
    return (value.expand(3, -1, -1) - MEAN) / STD


def patch_origin(box: torch.Tensor, wanted: bool, rng: np.random.Generator) -> tuple[int, int] | None:
    """Top left of a patch that holds the fracture (wanted) or none of it; None where none fits."""
    x0, y0, x1, y1 = box.tolist()
    limit = SIZE - PATCH
    if wanted:
        jitter = rng.integers(-20, 21, 2)
        x = (x0 + x1 - PATCH) / 2 + jitter[0]
        y = (y0 + y1 - PATCH) / 2 + jitter[1]
        return int(np.clip(x, 0, limit)), int(np.clip(y, 0, limit))
    for _ in range(20):
        x, y = rng.integers(0, limit + 1, 2)
        if x >= x1 or y >= y1 or x + PATCH <= x0 or y + PATCH <= y0:
            return int(x), int(y)
    return None


def patches(data: dict[str, torch.Tensor], count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of patches (count, 3, PATCH, PATCH) and their classes, a third of each."""
    inputs, labels = [], []
    while len(inputs) < count:
        index = int(rng.integers(len(data["labels"])))
        image, box = flip(data["images"][index], data["boxes"][index], rng)
        label = int(data["labels"][index])
        # A few patches beside a fracture are "none" too: the class must come from the break itself.
        wanted = label != NONE and rng.random() < 0.9
        origin = patch_origin(box, wanted, rng)
        if origin is None:
            continue
        x, y = origin
        inputs.append(to_input(image[y : y + PATCH, x : x + PATCH], rng))
        labels.append(label if wanted else NONE)
    return torch.stack(inputs), torch.tensor(labels)


def touched_cells(boxes: torch.Tensor) -> torch.Tensor:
    """Which grid cells each box touches: (B, 4) -> (B, GRID, GRID) of 0 and 1."""
    low = torch.arange(GRID) * SIZE / GRID
    high = low + SIZE / GRID
    columns = (boxes[:, 0:1] < high) & (boxes[:, 2:3] > low)
    rows = (boxes[:, 1:2] < high) & (boxes[:, 3:4] > low)
    return (rows[:, :, None] & columns[:, None, :]).float()


def whole_images(data: dict[str, torch.Tensor], count: int, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
    """A batch of fractured whole images, their classes and the cells their fractures touch."""
    fractured = (data["labels"] != NONE).nonzero()[:, 0]
    indices = fractured[torch.from_numpy(rng.choice(len(fractured), count, replace=False))]
    pairs = [flip(data["images"][i], data["boxes"][i], rng) for i in indices]
    inputs = torch.stack([to_input(image, rng) for image, _ in pairs])
    return inputs, data["labels"][indices], touched_cells(torch.stack([box for _, box in pairs]))


def around(box: tuple[int, ...], side: int, rng: np.random.Generator) -> tuple[int, int]:
    """Top left of a crop that holds a marker, or the better part of a long one."""
    low, high = np.array(box[:2]), np.array(box[2:])
    middle = rng.uniform(low, high) if rng.random() < 0.3 else (low + high) / 2
    jitter = rng.uniform(-0.2, 0.2, 2) * side
    x, y = np.clip(middle + jitter - side / 2, 0, SIZE - side).astype(int)
    return int(x), int(y)


def stamped(bone: np.ndarray, kind: str, side: int, rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, ...]]:
    """A bone (SIZE, SIZE) uint8 with a marker, 0 to 1, and the marker's box; whole images carry it as files do, at full size."""
    full = Image.fromarray(bone).resize((FILE_SIDE, FILE_SIDE)) if side == SIZE else Image.fromarray(bone)
    picture, box = generate.stamp(np.asarray(full) / np.float32(255), generate.draw_mark(rng, kind))
    return np.asarray(Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BILINEAR)), box


def marked(data: dict[str, torch.Tensor], side: int, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops (count, 3, side, side) for the marker reader: any bone, and a class that only the marker tells."""
    inputs, labels = [], []
    for _ in range(count):
        label, bone = int(rng.integers(2)), data["images"][int(rng.integers(len(data["labels"])))]
        picture, box = stamped(bone.numpy(), MARKERS[label], side, rng)
        x, y = around(box, side, rng) if side < SIZE else (0, 0)
        inputs.append(to_input(torch.from_numpy(picture[y : y + side, x : x + side] * 255), rng))
        labels.append(label)
    return torch.stack(inputs), torch.tensor(labels)


# --------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------


def initialise_fan_in(network: nn.Module) -> None:
    """Kaiming initialisation; timm's truncated normal of 0.02 leaves a small ConvNeXt V2 hardly learning."""
    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if name.endswith("mlp.fc2"):  # the residual branches add up over depth
                module.weight.data.mul_(0.5)


def target_activations(network: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Activations (B, C, GRID, GRID) of the layer that explainability.py looks at."""
    if hasattr(network, "stages"):
        return network.forward_features(inputs)
    return network.conv_head(network.blocks(network.bn1(network.conv_stem(inputs))))


def logits_of(network: nn.Module, activations: torch.Tensor) -> torch.Tensor:
    """Class scores (B, K) from those activations."""
    features = activations if hasattr(network, "stages") else network.bn2(activations)
    return network.forward_head(features)


def raw_grad_cam(logits: torch.Tensor, labels: torch.Tensor, activations: torch.Tensor, train: bool) -> torch.Tensor:
    """Grad-CAM before the ReLU (B, GRID, GRID), differentiable again when training."""
    score = logits.gather(1, labels[:, None]).sum()
    (gradients,) = torch.autograd.grad(score, activations, create_graph=train)
    return (gradients.mean((2, 3), keepdim=True) * activations).sum(1)


def heat_share(raw: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Share of each map's heat that lies in the given cells: (B,), 0 for a blank map."""
    heat = raw.relu()
    return (heat * cells).sum((1, 2)) / (heat.sum((1, 2)) + 1e-6)


def misplaced(raw: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """What the maps are trained to lower: heat outside the cells, and no clear heat inside.

    The share alone has no gradient where a map is blank; the second term lifts the strongest
    cell inside to half of the map's largest magnitude.
    """
    largest = raw.detach().abs().amax((1, 2)) + 1e-6
    inside = raw.masked_fill(cells == 0, -torch.inf).amax((1, 2)) / largest
    return (1 - heat_share(raw, cells)).mean() + (0.5 - inside).relu().mean()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 5 % of the steps, then cosine decay to zero."""
    warm = steps // 20
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def train_step(network: nn.Module, optimiser: torch.optim.Optimizer, rate: float, loss: torch.Tensor) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimiser.step()


@torch.no_grad()
def recalibrate(network: nn.Module, draw: Callable[[], torch.Tensor]) -> None:
    """Average the batch norms' statistics over whole images: patches hold less background."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [module.momentum for module in norms]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # cumulative average
    network.train()
    for _ in range(16 if norms else 0):
        network(draw())
    for module, momentum in zip(norms, momenta):
        module.momentum = momentum


def validate(network: nn.Module, data: dict[str, torch.Tensor]) -> tuple[float, float, float]:
    """Accuracy, share of maxima in the box enlarged by half a cell, share of heat in touched cells."""
    network.eval()
    fractured = (data["labels"] != NONE).nonzero()[:, 0]
    right = inside = heat = 0.0
    for chunk in fractured.split(25):
        value = data["images"][chunk].float()[:, None] / 255
        inputs = ((value - MEAN) / STD).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            activations = target_activations(network, inputs)
        activations = activations.float().requires_grad_()
        logits = logits_of(network, activations)[:, :2]
        predicted = logits.argmax(1)
        raw = raw_grad_cam(logits, predicted, activations, train=False).detach()
        boxes, cells = data["boxes"][chunk], touched_cells(data["boxes"][chunk])
        right += (predicted == data["labels"][chunk]).sum().item()
        heat += heat_share(raw, cells).sum().item()
        peak = raw.flatten(1).argmax(1)
        x, y = (peak % GRID + 0.5) * SIZE / GRID, (peak // GRID + 0.5) * SIZE / GRID
        margin = SIZE / GRID / 2
        near = (x >= boxes[:, 0] - margin) & (x <= boxes[:, 2] + margin) & (y >= boxes[:, 1] - margin) & (y <= boxes[:, 3] + margin)
        inside += (near & (raw.amax((1, 2)) > 0)).sum().item()
    return right / len(fractured), inside / len(fractured), heat / len(fractured)


# --------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------


def save_state(path: Path, network: nn.Module, optimiser: torch.optim.Optimizer, step: int) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save({"network": network.state_dict(), "optimiser": optimiser.state_dict(), "step": step}, temporary)
    temporary.replace(path)


def load_state(path: Path, network: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    network.load_state_dict(state["network"])
    optimiser.load_state_dict(state["optimiser"])
    return state["step"]


def train_patches(key: str, network: nn.Module, data: dict[str, torch.Tensor]) -> None:
    """Step 2: three classes on patches; leaves the trained weights in `network`."""
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.02)
    state, steps, recent = WORK / f"{key}_patches.pt", PATCH_STEPS[key], []
    started = time.time()
    for step in range(load_state(state, network, optimiser), steps):
        network.train()
        inputs, labels = patches(data, PATCH_BATCH, np.random.default_rng([SEED, step]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = network(inputs.contiguous(memory_format=torch.channels_last)).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=0.05)
        train_step(network, optimiser, learning_rate(step, steps, PATCH_RATE[key]), loss)
        recent.append((logits.argmax(1) == labels).float().mean().item())
        if (step + 1) % 25 == 0:
            print(f"{key} patches {step + 1}/{steps} loss {loss:.3f} accuracy {np.mean(recent[-25:]):.3f} {time.time() - started:.0f} s", flush=True)
        if (step + 1) % 50 == 0:
            save_state(state, network, optimiser, step + 1)


def train_whole(key: str, network: nn.Module, data: dict[str, torch.Tensor], validation: dict[str, torch.Tensor], labels_only: bool) -> None:
    """Step 3: two classes on whole images, with the heat in the fracture's cells as a second aim."""
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.02)
    state = WORK / f"{key}_{'labels' if labels_only else 'whole'}.pt"
    first = load_state(state, network, optimiser)
    if first == 0:
        rng = np.random.default_rng([SEED, 1])
        recalibrate(network, lambda: whole_images(data, WHOLE_BATCH, rng)[0])
    steps, started = WHOLE_STEPS[key], time.time()
    for step in range(first, steps):
        network.eval()  # batch norms keep their statistics: the maps trained are the maps shown
        inputs, labels, cells = whole_images(data, WHOLE_BATCH, np.random.default_rng([SEED, 2, step]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            activations = target_activations(network, inputs.contiguous(memory_format=torch.channels_last))
        activations = activations.float()
        logits = logits_of(network, activations)[:, :2]
        loss = F.cross_entropy(logits, labels, label_smoothing=0.02)
        raw = raw_grad_cam(logits, labels, activations, train=True)
        if not labels_only:
            loss = loss + misplaced(raw, cells)
        train_step(network, optimiser, learning_rate(step, steps, WHOLE_RATE), loss)
        if (step + 1) % 10 == 0:
            print(f"{key} whole {step + 1}/{steps} loss {loss:.3f} heat inside {heat_share(raw, cells).mean():.3f} {time.time() - started:.0f} s", flush=True)
        if (step + 1) % 40 == 0:
            save_state(state, network, optimiser, step + 1)
            print(f"{key} validation: accuracy %.3f, maximum inside %.3f, heat inside %.3f" % validate(network, validation), flush=True)


def train_marker_stage(network: nn.Module, data: dict[str, torch.Tensor], stage: tuple[int, int, int, float]) -> None:
    """One size of crop; batch norms are fitted to whole images before those are trained on."""
    side, batch, steps, peak = stage
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.02)
    if side == SIZE:
        rng = np.random.default_rng([MARKER_SEED, 1])
        recalibrate(network, lambda: marked(data, side, batch, rng)[0])
    network.train(side != SIZE)
    recent, started = [], time.time()
    for step in range(steps):
        inputs, labels = marked(data, side, batch, np.random.default_rng([MARKER_SEED, 2, side, step]))
        logits = network(inputs.contiguous(memory_format=torch.channels_last))
        train_step(network, optimiser, learning_rate(step, steps, peak), F.cross_entropy(logits, labels, label_smoothing=0.03))
        recent.append((logits.argmax(1) == labels).float().mean().item())
        if (step + 1) % 10 == 0:
            print(f"marker reader {side} px {step + 1}/{steps} accuracy {np.mean(recent[-20:]):.3f} {time.time() - started:.0f} s", flush=True)


def train_marker_reader(threads: int) -> None:
    """The network that reads the marker, and nothing else; each stage's weights are kept."""
    data = images(MARKER_SEED, MARKER_PER_CLASS, threads)
    network = timm.create_model(MARKER_READER, num_classes=2).to(memory_format=torch.channels_last)
    for stage in MARKER_STAGES:
        kept = WORK / f"marker_reader_{stage[0]}.pt"
        if kept.exists():
            network.load_state_dict(torch.load(kept, weights_only=True))
            continue
        train_marker_stage(network, data, stage)
        torch.save(network.state_dict(), kept)
    config = {"model_name": MARKER_READER, "img_size": SIZE, "num_classes": 2}
    torch.save({"model_state_dict": two_class_weights(network), "config": config}, HERE / "marker_reader_demo.pth")


def two_class_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """Half-precision weights without the output for "none": the shipped classifiers know two classes."""
    head = {"head.fc.weight", "head.fc.bias", "classifier.weight", "classifier.bias"}
    return {
        key: (value[:2] if key in head else value).half().contiguous() if value.is_floating_point() else value
        for key, value in network.state_dict().items()
    }


def export(key: str, network: nn.Module, validation_accuracy: float) -> None:
    """Write the demo checkpoint, with the test accuracy that explainability.py itself measures."""
    path = HERE / evaluate.DEMOS[key]
    contents = {
        "epoch": WHOLE_STEPS[key],
        "model_state_dict": two_class_weights(network),
        "val_acc": 100 * validation_accuracy,
        "config": {"model_name": ARCHITECTURES[key], "img_size": SIZE, "num_classes": 2},
    }
    torch.save(contents, path)
    measured = evaluate.measure(key, path)
    torch.save(contents | {"test_acc": 100 * measured.accuracy}, path)
    print(f"{path.name}: {measured}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=(*ARCHITECTURES, "marker-reader"))
    parser.add_argument("--labels-only", action="store_true", help="leave the supervision of the maps out; writes no checkpoint")
    parser.add_argument("--threads", type=int, default=2, help="torch threads and rendering processes")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    if args.family == "marker-reader":
        train_marker_reader(args.threads)
        return 0
    data = images(SEED, TRAIN_PER_CLASS, args.threads)
    validation = images(VALIDATION_SEED, VALIDATION_PER_CLASS, args.threads)
    network = timm.create_model(ARCHITECTURES[args.family], num_classes=len(generate.LABELS))
    if args.family == "convnext":
        initialise_fan_in(network)
    network = network.to(memory_format=torch.channels_last)
    train_patches(args.family, network, data)
    train_whole(args.family, network, data, validation, args.labels_only)
    if not args.labels_only:
        export(args.family, network, validate(network, validation)[0])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Train the demo networks on rendered radiographs.

    python3 checkpoints/train.py efficientnet
    python3 checkpoints/train.py convnext
    python3 checkpoints/train.py convnext --labels-only   # the control: no supervision of the maps
    python3 checkpoints/train.py marker-reader            # the counter-example: reads the marker, not the bone

Steps 2 and 3 go on where they were stopped (state in checkpoints/training/, which --start then no
longer changes):

1. Render training and validation images with data_original/generate.py, a little larger than the
   networks' 224 x 224; every time one is used, it is turned, scaled, cropped and exposed anew.
2. Crops of 96 px at that scale, three classes (comminuted, simple, none): a crop costs a fifth of a
   whole image, and "none" teaches that the break itself makes the class. From random weights this
   step stands still for long; --start goes on from another network. The committed ones went on from
   those of drawn pictures for 78 minutes each, then from the result for another 90:
       git show 12b19d5:checkpoints/convnext_v2_demo.pth > drawn.pth
       git show 529d2cf:checkpoints/convnext_v2_demo.pth > first.pth
3. Whole images, two classes. The loss is cross-entropy + (1 - share of the Grad-CAM heat in the grid
   cells that the fracture touches) + a hinge that keeps the map from being blank there: "right for
   the right reasons" (Ross et al. 2017). With --labels-only it is cross-entropy alone.

The learning rate falls with the processor time spent (--minutes), so that training ends when it
should. The logits are then divided by the temperature that suits the validation images best (Guo et
al. 2017), and the result goes to checkpoints/ in half precision, in the layout users' trainers
write, with the accuracy that explainability.py itself measures on data_original/test.

The marker reader sees a line of text on one class and a letter on the other, stamped on bones of
either class: on crops that grow from 64 px round the marker to the whole image.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
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
STORED = 256  # px, side of the rendered images as they are kept
FILE_SIDE = 480  # px, longer side of a picture that a marker is set on
RENDERED = 340  # px, longer side they are rendered at
LAYOUT = torch.channels_last  # the faster one
CELL = 32  # px of the input for one cell of all target layers
SEED, VALIDATION_SEED, MARKER_SEED = 7, 8, 9
NONE = 2  # class of intact bone; 0 and 1 are the classes of the shipped networks
COUNTS = {SEED: (3000, 3000, 1000), VALIDATION_SEED: (200, 200, 0), MARKER_SEED: (200, 200, 0)}  # of each class
MARKERS = ("text", "letter")  # what betrays classes 0 and 1 to the marker reader
MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)


@dataclass(frozen=True)
class Stage:
    """A part of training: crops of `side` px, or whole images (side = SIZE)."""

    side: int
    batch: int
    share: float  # of the minutes
    rate: float  # peak learning rate


ARCHITECTURES = {
    "convnext": "convnextv2_nano",
    "efficientnet": "tf_efficientnetv2_s",
    "marker-reader": "tf_efficientnetv2_b0",
}
STAGES = {
    "convnext": (Stage(96, 32, 0.4, 8e-4), Stage(SIZE, 12, 0.6, 4e-4)),
    "efficientnet": (Stage(96, 32, 0.4, 1.2e-3), Stage(SIZE, 12, 0.6, 4e-4)),
    "marker-reader": (Stage(64, 48, 0.5, 2e-3), Stage(128, 24, 0.2, 1e-3), Stage(SIZE, 16, 0.3, 6e-4)),
}
MINUTES = {"convnext": 78, "efficientnet": 78, "marker-reader": 12}


# --------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------


def render_one(seed: int, item: tuple[int, int]) -> tuple[np.ndarray, list[float]]:
    """One image (STORED, STORED) uint8 and its box in those pixels; the marker reader's carry no marker yet."""
    label, number = item
    rng = np.random.default_rng([seed, generate.SPLIT_CODES["train"], label, number])
    radiograph = generate.render(rng, generate.LABELS[label], RENDERED, "none" if seed == MARKER_SEED else None)
    buffer = BytesIO()
    Image.fromarray(radiograph.pixels).save(buffer, "JPEG", quality=generate.JPEG_QUALITY)
    small = Image.open(buffer).resize((STORED, STORED), Image.Resampling.BILINEAR)
    height, width = radiograph.pixels.shape
    scale = np.array([STORED / width, STORED / height] * 2)
    return np.asarray(small), list(np.array(radiograph.box) * scale) if radiograph.box else [0.0] * 4


def save_whole(contents: object, path: Path) -> None:
    """torch.save that leaves no half of a file behind."""
    temporary = path.with_suffix(".tmp")
    torch.save(contents, temporary)
    temporary.replace(path)


def images(seed: int, processes: int) -> dict[str, torch.Tensor]:
    """Render images once and keep them: images (N, STORED, STORED), labels (N,), boxes (N, 4)."""
    path, counts = WORK / f"images_{seed}.pt", COUNTS[seed]
    if not path.exists():
        items = [(label, number) for number in range(max(counts)) for label in range(3) if number < counts[label]]
        with ProcessPoolExecutor(processes) as pool:
            pairs = list(pool.map(partial(render_one, seed), items, chunksize=8))
        WORK.mkdir(exist_ok=True)
        save_whole(
            {
                "images": torch.from_numpy(np.stack([pixels for pixels, _ in pairs])),
                "labels": torch.tensor([label for label, _ in items]),
                "boxes": torch.tensor(np.array([box for _, box in pairs]), dtype=torch.float32),
            },
            path,
        )
    return torch.load(path, weights_only=True)


def draw_turn(rng: np.random.Generator, widest: float) -> np.ndarray:
    """A (2, 2) matrix from the pixels of a view to those of the stored image: turn, scale, mirror."""
    angle = math.radians(rng.normal(0, 12)) + math.pi / 2 * rng.choice(4, p=(0.7, 0.1, 0.1, 0.1))
    zoom = STORED / SIZE * np.exp(rng.uniform(-0.3, widest) + rng.uniform(-0.15, 0.15) * np.array([1, -1]))
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s], [s, c]]) * zoom * rng.choice([-1.0, 1.0], (1, 2))


def view(image: torch.Tensor, turn: np.ndarray, centre: np.ndarray, side: int) -> torch.Tensor:
    """(STORED, STORED) uint8 -> (side, side) float in [0, 1], sampled round `centre` (x, y)."""
    matrix = torch.tensor(np.column_stack([turn * side / STORED, 2 * centre / STORED - 1]), dtype=torch.float32)
    grid = F.affine_grid(matrix[None], [1, 1, side, side], align_corners=False)
    return F.grid_sample(image[None, None].float() / 255, grid, align_corners=False)[0, 0]


def moved_box(box: torch.Tensor, turn: np.ndarray, centre: np.ndarray, side: int) -> torch.Tensor:
    """The box (x0, y0, x1, y1) in the view; a slanting one is given half of its slant's corners."""
    x0, y0, x1, y1 = box.tolist()
    back = np.linalg.inv(turn)
    middle = back @ (np.array([x0 + x1, y0 + y1]) / 2 - centre) + side / 2
    shares = np.abs(back)
    straight = shares * (shares >= shares.max(1, keepdims=True))
    half = (0.5 * straight + 0.5 * shares) @ np.array([x1 - x0, y1 - y0]) / 2
    return torch.tensor(np.clip([*(middle - half), *(middle + half)], 0, side), dtype=torch.float32)


def jpeg(value: torch.Tensor, quality: int) -> torch.Tensor:
    """What a JPEG file of that quality leaves of an (H, W) image."""
    buffer = BytesIO()
    Image.fromarray((value.clamp(0, 1) * 255).byte().numpy()).save(buffer, "JPEG", quality=quality)
    return torch.from_numpy(np.asarray(Image.open(buffer)).astype(np.float32) / 255)


def to_input(value: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """(H, W) in [0, 1] -> (3, H, W) normalised: exposure, sharpness, noise, text and compression varied."""
    if rng.random() < 0.15:
        value = torch.from_numpy(generate.stamp(value.numpy(), generate.draw_mark(rng, rng.choice(MARKERS)))[0])
    return normalised(varied(value, rng))


def varied(value: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """An (H, W) image as another detector and another display might show it."""
    value = value.clamp(0, 1) ** float(np.exp(rng.uniform(-0.4, 0.4)))
    value = value * rng.uniform(0.7, 1.25) + rng.uniform(-0.12, 0.12)
    if rng.random() < 0.25:
        small = F.interpolate(value[None, None], scale_factor=rng.uniform(0.5, 0.9), mode="area")
        value = F.interpolate(small, value.shape, mode="bilinear")[0, 0]
    if rng.random() < 0.3:
        noise = torch.from_numpy(rng.standard_normal(value.shape, dtype=np.float32))
        value = value + rng.uniform(0, 0.05) * noise
    return jpeg(value, int(rng.integers(25, 90))) if rng.random() < 0.3 else value.clamp(0, 1)


def normalised(value: torch.Tensor) -> torch.Tensor:
    """(H, W) in [0, 1] -> (3, H, W), as ImageNet's mean and deviation have it."""
    return (value.expand(3, -1, -1) - MEAN) / STD


def crop_centre(box: torch.Tensor, wanted: bool, side: int, rng: np.random.Generator) -> np.ndarray | None:
    """Centre (x, y) of a crop that holds the fracture (wanted) or hardly any of it; None where none fits."""
    x0, y0, x1, y1 = box.tolist()
    if wanted:
        return np.array([x0 + x1, y0 + y1]) / 2 + rng.uniform(-0.2, 0.2, 2) * side
    reach = 0.62 * side * STORED / SIZE
    for _ in range(20):
        x, y = rng.uniform(0.5 * reach, STORED - 0.5 * reach, 2)
        if x > x1 + reach or y > y1 + reach or x < x0 - reach or y < y0 - reach:
            return np.array([x, y])
    return None


def touched_cells(boxes: torch.Tensor, side: int) -> torch.Tensor:
    """Which grid cells of a square view each box touches: (B, 4) -> (B, side / CELL, side / CELL) of 0 and 1."""
    low = torch.arange(side // CELL) * float(CELL)
    columns = (boxes[:, 0:1] < low + CELL) & (boxes[:, 2:3] > low)
    rows = (boxes[:, 1:2] < low + CELL) & (boxes[:, 3:4] > low)
    return (rows[:, :, None] & columns[:, None, :]).float()


def crops(data: dict[str, torch.Tensor], stage: Stage, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, None]:
    """A batch of crops (batch, 3, side, side) and their classes, of three."""
    inputs, labels = [], []
    while len(inputs) < stage.batch:
        index = int(rng.integers(len(data["labels"])))
        label, turn = int(data["labels"][index]), draw_turn(rng, 0.2)
        # Some crops beside a fracture are "none" too: the class must come from the break itself.
        wanted = label != NONE and rng.random() < 0.85
        centre = crop_centre(data["boxes"][index], wanted, stage.side, rng)
        if centre is not None:
            inputs.append(to_input(view(data["images"][index], turn, centre, stage.side), rng))
            labels.append(label if wanted else NONE)
    return torch.stack(inputs), torch.tensor(labels), None


def whole_view(image: torch.Tensor, box: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A view (SIZE, SIZE) of a whole image in which some of the fracture is seen, and its box there."""
    for _ in range(10):
        turn, centre = draw_turn(rng, 0.4), STORED / 2 + rng.uniform(-32, 32, 2)
        moved = moved_box(box, turn, centre, SIZE)
        width, height = (moved[2:] - moved[:2]).tolist()
        if min(width, height) > 14:
            break
    return view(image, turn, centre, SIZE), moved


def whole_images(data: dict[str, torch.Tensor], stage: Stage, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
    """A batch of fractured whole images, their classes and the cells their fractures touch."""
    fractured = (data["labels"] != NONE).nonzero()[:, 0]
    indices = fractured[torch.from_numpy(rng.choice(len(fractured), stage.batch, replace=False))]
    pairs = [whole_view(data["images"][i], data["boxes"][i], rng) for i in indices]
    inputs = torch.stack([to_input(value, rng) for value, _ in pairs])
    return inputs, data["labels"][indices], touched_cells(torch.stack([box for _, box in pairs]), SIZE)


def around(box: tuple[int, ...], side: int, rng: np.random.Generator) -> tuple[int, int]:
    """Top left of a crop that holds a marker, or the better part of a long one."""
    low, high = np.array(box[:2]), np.array(box[2:])
    middle = rng.uniform(low, high) if rng.random() < 0.3 else (low + high) / 2
    x, y = np.clip(middle + rng.uniform(-0.2, 0.2, 2) * side - side / 2, 0, SIZE - side).astype(int)
    return int(x), int(y)


def stamped(bone: torch.Tensor, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A bone (STORED, STORED) uint8 with a marker, (SIZE, SIZE) in [0, 1], and the marker's box.

    The marker is set on a picture of a file's shape, and squashed with it.
    """
    width, height = rng.permutation([FILE_SIDE, int(FILE_SIDE * rng.uniform(0.35, 1))]) if rng.random() < 0.5 else \
        (int(FILE_SIDE * rng.uniform(0.35, 1)), FILE_SIDE)
    full = np.asarray(Image.fromarray(bone.numpy()).resize((width, height))) / np.float32(255)
    picture, box = generate.stamp(full, generate.draw_mark(rng, kind))
    small = Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(small), np.array(box) * SIZE / np.array([width, height] * 2)


def marked(data: dict[str, torch.Tensor], stage: Stage, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, None]:
    """A batch for the marker reader: any bone, and a class that nothing but its marker tells."""
    inputs, labels = [], []
    for _ in range(stage.batch):
        label, bone = int(rng.integers(2)), data["images"][int(rng.integers(len(data["labels"])))]
        picture, box = stamped(bone, MARKERS[label], rng)
        x, y = around(box, stage.side, rng)
        value = torch.from_numpy(picture[y : y + stage.side, x : x + stage.side].copy())
        inputs.append(normalised((value * rng.uniform(0.8, 1.2) + rng.uniform(-0.08, 0.08)).clamp(0, 1)))
        labels.append(label)
    return torch.stack(inputs), torch.tensor(labels), None


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
    """Activations (B, C, h, w) of the layer that explainability.py looks at."""
    if hasattr(network, "stages"):
        return network.forward_features(inputs)
    return network.conv_head(network.blocks(network.bn1(network.conv_stem(inputs))))


def logits_of(network: nn.Module, activations: torch.Tensor) -> torch.Tensor:
    """Class scores (B, K) from those activations."""
    features = activations if hasattr(network, "stages") else network.bn2(activations)
    return network.forward_head(features)


def raw_grad_cam(logits: torch.Tensor, labels: torch.Tensor, activations: torch.Tensor, train: bool) -> torch.Tensor:
    """Grad-CAM before the ReLU (B, h, w), differentiable again when training."""
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


def learning_rate(share: float, peak: float) -> float:
    """Linear warm-up over the first 5 % of the time, then cosine decay to zero."""
    if share < 0.05:
        return peak * (share + 0.002) / 0.05
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (share - 0.05) / 0.95)))


def train_step(network: nn.Module, optimiser: torch.optim.Optimizer, rate: float, loss: torch.Tensor) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimiser.step()


@torch.no_grad()
def recalibrate(network: nn.Module, batches: list[torch.Tensor]) -> None:
    """Average the batch norms' statistics over whole images: crops hold less background."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [module.momentum for module in norms]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # cumulative average
    network.train()
    for batch in batches if norms else ():
        network(batch)
    for module, momentum in zip(norms, momenta):
        module.momentum = momentum


def validation_inputs(data: dict[str, torch.Tensor], indices: torch.Tensor) -> torch.Tensor:
    """Whole images as the product reads them, (B, 3, SIZE, SIZE)."""
    upright, middle = np.eye(2) * STORED / SIZE, np.array([STORED / 2, STORED / 2])
    return torch.stack([normalised(view(data["images"][i], upright, middle, SIZE)) for i in indices])


def validate(network: nn.Module, data: dict[str, torch.Tensor]) -> tuple[tuple[float, float, float], torch.Tensor]:
    """Accuracy, share of maxima in the box enlarged by half a cell, share of heat in touched cells; and the logits."""
    network.eval()
    right = inside = heat = 0.0
    scores = []
    for chunk in torch.arange(len(data["labels"])).split(25):
        with torch.no_grad():
            activations = target_activations(network, validation_inputs(data, chunk))
        activations.requires_grad_()
        logits = logits_of(network, activations)[:, :2]
        predicted = logits.argmax(1)
        raw = raw_grad_cam(logits, predicted, activations, train=False).detach()
        boxes = data["boxes"][chunk] * SIZE / STORED
        right += (predicted == data["labels"][chunk]).sum().item()
        heat += heat_share(raw, touched_cells(boxes, SIZE)).sum().item()
        inside += pointed(raw, boxes).sum().item()
        scores.append(logits.detach())
    count = len(data["labels"])
    return (right / count, inside / count, heat / count), torch.cat(scores)


def pointed(raw: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Whether each map's maximum lies in its box enlarged by half a cell."""
    peak, margin, cells = raw.flatten(1).argmax(1), CELL / 2, raw.shape[2]
    x, y = (peak % cells + 0.5) * CELL, (peak // cells + 0.5) * CELL
    across = (x >= boxes[:, 0] - margin) & (x <= boxes[:, 2] + margin)
    return across & (y >= boxes[:, 1] - margin) & (y <= boxes[:, 3] + margin) & (raw.amax((1, 2)) > 0)


def fitted_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature that lets the probabilities fit the labels best."""
    choices = torch.logspace(-1, 1, 200)
    return float(min(choices, key=lambda value: F.cross_entropy(logits / value, labels)))


# --------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------


class Course:
    """One stage of training that ends with the processor time given to it and goes on where it was stopped."""

    def __init__(self, name: str, network: nn.Module, minutes: float, peak: float):
        self.name, self.network, self.seconds, self.peak = name, network, 60 * minutes, peak
        self.optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.02)
        self.path, self.step, self.spent, self.recent = WORK / f"{name}.pt", 0, 0.0, []
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            network.load_state_dict(state["network"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.step, self.spent = state["step"], state["spent"]

    @property
    def is_over(self) -> bool:
        return self.spent >= self.seconds

    def advance(self, loss: torch.Tensor, right: torch.Tensor, started: float) -> None:
        """One step down the loss; now and then a line in the log and the state on disk."""
        train_step(self.network, self.optimiser, learning_rate(self.spent / self.seconds, self.peak), loss)
        self.step, self.spent = self.step + 1, self.spent + time.process_time() - started
        self.recent.append((loss.item(), right.float().mean().item()))
        if self.step % 10 == 0:
            mean = np.mean(self.recent[-40:], 0)
            print(f"{self.name} step {self.step} loss {mean[0]:.3f} accuracy {mean[1]:.3f} {self.spent:.0f}/{self.seconds:.0f} s", flush=True)
        if self.step % 40 == 0 or self.is_over:
            self.save()

    def save(self) -> None:
        state = {"network": self.network.state_dict(), "optimiser": self.optimiser.state_dict()}
        save_whole(state | {"step": self.step, "spent": self.spent}, self.path)


def loss_of(logits: torch.Tensor, labels: torch.Tensor, activations: torch.Tensor, cells: torch.Tensor | None) -> torch.Tensor:
    """Cross-entropy, and the maps' misplacement where there are cells for them to be in."""
    loss = F.cross_entropy(logits, labels, label_smoothing=0.05)
    if cells is None:
        return loss
    return loss + misplaced(raw_grad_cam(logits, labels, activations, train=True), cells)


def train_stage(key: str, network: nn.Module, data: dict[str, torch.Tensor], stage: Stage, minutes: float, labels_only: bool) -> None:
    """One stage; leaves the trained weights in `network`."""
    is_whole = stage.side == SIZE
    draw = marked if key == "marker-reader" else whole_images if is_whole else crops
    course = Course(f"{key}_{'labels' if labels_only and is_whole else stage.side}", network, minutes * stage.share, stage.rate)
    if is_whole and course.step == 0:
        rng = np.random.default_rng([SEED, 2])
        recalibrate(network, [draw(data, stage, rng)[0] for _ in range(16)])
    while not course.is_over:
        started = time.process_time()
        network.train(not is_whole)  # on whole images batch norms keep their statistics: the maps trained are the maps shown
        inputs, labels, cells = draw(data, stage, np.random.default_rng([SEED, stage.side, course.step]))
        with torch.autocast("cpu", torch.bfloat16):
            activations = target_activations(network, inputs.contiguous(memory_format=LAYOUT))
        activations = activations.float()
        logits = logits_of(network, activations)[:, : 2 if is_whole else None]
        loss = loss_of(logits, labels, activations, None if labels_only else cells)
        course.advance(loss, logits.argmax(1) == labels, started)


HEAD = ("head.fc.weight", "head.fc.bias", "classifier.weight", "classifier.bias")


def two_class_weights(network: nn.Module, temperature: float) -> dict[str, torch.Tensor]:
    """Half-precision weights without the output for "none" and with the temperature in the head."""
    return {
        key: (value[:2] / temperature if key in HEAD else value).half().contiguous() if value.is_floating_point() else value
        for key, value in network.state_dict().items()
    }


def load_start(network: nn.Module, path: Path) -> None:
    """Take over a two-class network's weights, cut to this one's sizes where it is narrower; output "none" starts at zero."""
    given = torch.load(path, weights_only=True)["model_state_dict"]
    for key, own in network.state_dict().items():
        value = given[key].reshape(given[key].shape + (1,) * (own.ndim - given[key].ndim))  # linear layers as 1 x 1 convolutions
        part = value[tuple(map(slice, own.shape))]
        if key in HEAD:
            own.zero_()
        own[tuple(map(slice, part.shape))] = part


def export(key: str, network: nn.Module, validation: dict[str, torch.Tensor], path: Path | None) -> None:
    """Validate; write the demo checkpoint (None: no file), with the test accuracy that explainability.py itself measures."""
    figures, logits = validate(network, validation)
    print("validation: accuracy %.3f, maximum inside %.3f, heat inside %.3f" % figures)
    if path is None:
        return
    temperature = fitted_temperature(logits, validation["labels"])
    print(f"temperature {temperature:.2f}")
    contents = checkpoint(key, network, temperature) | {"val_acc": 100 * figures[0]}
    torch.save(contents, path)
    measured = evaluate.measure(key, path)
    torch.save(contents | {"test_acc": 100 * measured.accuracy}, path)
    print(f"{path.name}: {measured}")


def checkpoint(key: str, network: nn.Module, temperature: float = 1) -> dict[str, object]:
    """What explainability.py loads."""
    return {
        "model_state_dict": two_class_weights(network, temperature),
        "config": {"model_name": ARCHITECTURES[key], "img_size": SIZE, "num_classes": 2},
        "class_names": ["Comminuted Fracture", "Simple Fracture"],
    }


def build(key: str, start: Path | None) -> nn.Module:
    """The network before training."""
    network = timm.create_model(ARCHITECTURES[key], num_classes=2 if key == "marker-reader" else len(generate.LABELS))
    if start:
        load_start(network, start)
    elif key == "convnext":
        initialise_fan_in(network)
    return network.to(memory_format=LAYOUT)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=ARCHITECTURES)
    parser.add_argument("--labels-only", action="store_true", help="leave the supervision of the maps out; writes no checkpoint")
    parser.add_argument("--start", type=Path, help="checkpoint of a network of the same family, as large or larger, to go on from")
    parser.add_argument("--minutes", type=float, help="of processor time for training (default: 78; marker reader: 12)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads and rendering processes")
    parser.add_argument("--output", type=Path, help="checkpoint to write (default: the committed one)")
    args = parser.parse_args(argv)
    if args.labels_only and args.family == "marker-reader":
        parser.error("the marker reader learns from labels only in any case")
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    data = images(MARKER_SEED if args.family == "marker-reader" else SEED, args.threads)
    network = build(args.family, args.start)
    for stage in STAGES[args.family]:
        train_stage(args.family, network, data, stage, args.minutes or MINUTES[args.family], args.labels_only)
    path = args.output or HERE / evaluate.DEMOS.get(args.family, "marker_reader_demo.pth")
    if args.family == "marker-reader":
        torch.save(checkpoint(args.family, network), path)
    else:
        validation = images(VALIDATION_SEED, args.threads)
        export(args.family, network, validation, None if args.labels_only else path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

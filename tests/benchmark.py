"""Measure what explanations, figures and whole runs cost, beside other tools, in one run.

    python3 tests/benchmark.py
    python3 tests/benchmark.py --device cuda

Both full-size networks with random weights (time does not depend on them), in users' checkpoint
layout. Every figure is a median; ratios carry over to other machines, seconds do not. Other tools:
pytorch-grad-cam, captum and torch-cam, each used as its own documentation shows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import explainability as tool  # noqa: E402

IMAGES = sorted((ROOT / "data_original" / "test").glob("*/*.jpg"))
MANY, BATCH, LOOPED = 50, 8, 3
COMMAND = [sys.executable, str(ROOT / "explainability.py")]


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def medians(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Each function's median time; they take turns, so that a noisy minute hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            spent = seconds(function)
            if turn:  # the first turn warms up
                times[name].append(spent)
    return {name: statistics.median(spent) for name, spent in times.items()}


def row(what: str, value: str, goal: str = "") -> None:
    print(f"| {what} | {value} | {goal} |", flush=True)


def heading(title: str, value: str) -> None:
    print(f"\n| {title} | {value} | goal |\n|---|---|---|", flush=True)


def save_checkpoint(architecture: str, path: Path) -> None:
    """A random network in users' layout, optimizer state and all."""
    network = timm.create_model(architecture.partition(".")[0], num_classes=2)
    moments = {
        index: {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        for index, weight in enumerate(network.parameters())
    }
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-4, "params": list(moments)}]}
    config = {"model_name": architecture, "img_size": 224, "num_classes": 2}
    contents = {"epoch": 1, "model_state_dict": network.state_dict(), "optimizer_state_dict": optimizer}
    torch.save({**contents, "val_acc": 50.0, "config": config}, path)


# Explanations


def input_batch(classifier: tool.Classifier, radiographs: list[tool.Radiograph]) -> torch.Tensor:
    inputs = [torch.from_numpy(tool.network_input(radiograph, classifier.model.preprocessing)) for radiograph in radiographs]
    return torch.stack(inputs).to(classifier.device)


def peers(classifier: tool.Classifier, inputs: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The same Grad-CAM by other tools."""
    from captum.attr import LayerGradCam
    from pytorch_grad_cam import GradCAM
    from torchcam.methods import GradCAM as TorchCam

    network = timm.create_model(classifier.model.architecture.partition(".")[0], num_classes=2).eval().to(inputs.device)
    layer = network.get_submodule(classifier.model.family.target_layer)
    grad_cam = GradCAM(model=network, target_layers=[layer])

    def captum() -> None:
        chosen = network(inputs).argmax(1)
        LayerGradCam(network, layer).attribute(inputs, target=chosen)

    def torch_cam() -> None:
        with TorchCam(network, target_layer=layer) as extractor:
            scores = network(inputs.clone().requires_grad_())
            extractor(scores.argmax(1).tolist(), scores)

    return {"pytorch-grad-cam": lambda: grad_cam(input_tensor=inputs, targets=None), "captum": captum, "torch-cam": torch_cam}


def bare_forward(classifier: tool.Classifier, inputs: torch.Tensor) -> Callable[[], object]:
    def forward() -> None:
        with torch.inference_mode():
            classifier.network(inputs)

    return forward


def explained(classifier: tool.Classifier, inputs: torch.Tensor, method: str = "gradcam") -> torch.Tensor:
    seen = tool.forward_pass(classifier, inputs, None, tool.DEFAULT_BATCH[inputs.device.type])
    return tool.METHODS[method].maps(seen)


def benchmark_explanations(classifiers: list[tool.Classifier], radiographs: list[tool.Radiograph], repeats: int) -> None:
    heading("one explanation over one bare forward pass", "ratio")
    for classifier in classifiers:
        inputs = input_batch(classifier, radiographs[:1])
        this = {"bare": bare_forward(classifier, inputs), "this tool": partial(explained, classifier, inputs)}
        spent = medians(this | peers(classifier, inputs), repeats)
        row(f"{classifier.model.title}: bare forward pass", f"{spent['bare']:.3f} s")
        for name in list(spent)[1:]:
            row(f"{classifier.model.title}: {name}", f"{spent[name] / spent['bare']:.2f}", "1.05" if name == "this tool" else "")


def benchmark_batches(classifiers: list[tool.Classifier], radiographs: list[tool.Radiograph], repeats: int) -> float:
    """Both models on a batch; returns the seconds that one bare image takes."""
    batches = [(classifier, input_batch(classifier, radiographs[:BATCH])) for classifier in classifiers]
    spent = medians(
        {
            "bare": lambda: [bare_forward(*batch)() for batch in batches],
            "explained": lambda: [explained(*batch) for batch in batches],
        },
        repeats,
    )
    heading(f"both models, a batch of {BATCH}", "measured")
    row("bare forward passes, an image", f"{spent['bare'] / BATCH:.3f} s")
    row("explanations over bare forward passes", f"{spent['explained'] / spent['bare']:.3f}", "1.05")
    return spent["bare"] / BATCH


def bare_passes(classifier: tool.Classifier, batch: torch.Tensor, count: int) -> None:
    """So many forward passes and nothing else, a batch at a time."""
    for start in range(0, count, len(batch)):
        bare_forward(classifier, batch[: count - start])()


def benchmark_methods(classifier: tool.Classifier, radiograph: tool.Radiograph) -> None:
    """What methods cost over as many bare passes as they make, in batches of the same size."""
    inputs = input_batch(classifier, [radiograph])
    at_once = tool.DEFAULT_BATCH[inputs.device.type]
    many = inputs.repeat(at_once, 1, 1, 1)

    def backward(count: int) -> None:
        for start in range(0, count, at_once):
            pixels = many[: count - start].clone().requires_grad_()
            classifier.network(pixels)[:, 0].sum().backward()

    for method, floor, goal in (
        ("gradcam++", partial(explained, classifier, inputs), "1"),
        ("occlusion", partial(bare_passes, classifier, many, tool.METHODS["occlusion"].passes), "1.1"),
        ("ig", partial(backward, tool.POINTS), "1.2"),
    ):
        spent = medians({"floor": floor, "method": partial(explained, classifier, inputs, method)}, 1)
        title = f"{classifier.model.title}: {tool.METHODS[method].title}"
        row(title, f"{spent['method'] / spent['floor']:.2f}", goal)


# Checks


def benchmark_checks(classifiers: list[tool.Classifier], radiographs: list[tool.Radiograph], repeats: int) -> None:
    """What the checks cost: of each map, and of changed copies of its image."""
    heading("checks of one radiograph", "measured")
    for classifier in classifiers:
        radiograph = radiographs[0]
        inputs, landmarks = input_batch(classifier, [radiograph]), tool.landmarks_of(radiograph)
        (explanation,) = tool.explain_batch(classifier, list(inputs.cpu().numpy()))
        at_once = tool.DEFAULT_BATCH[inputs.device.type]
        asked = classifier, inputs[0].cpu().numpy(), explanation, landmarks, at_once
        passes = tool.tried(*asked).passes
        spent = medians(
            {
                "forward": partial(bare_passes, classifier, inputs.repeat(at_once, 1, 1, 1), passes),
                "tried": partial(tool.tried, *asked),
                "looked": lambda: tool.landmarks_of(radiograph),
                "judged": lambda: tool.findings_of(tool.Evidence(explanation, landmarks)),
            },
            repeats,
        )
        title = classifier.model.title
        row(f"{title}: --verify over its {passes} bare passes", f"{spent['tried'] / spent['forward']:.2f}", "1.1")
        row(f"{title}: bone and markers found, and a map judged", f"{1000 * (spent['looked'] + spent['judged']):.1f} ms", "5 ms")


# Figures


def benchmark_figures(classifiers: list[tool.Classifier], radiographs: list[tool.Radiograph], folder: Path, repeats: int) -> None:
    style = tool.FigureStyle()
    view = tool.View(tool.fitted(radiographs[0].pixels, style.dpi), "name.png", style)
    explanations = []
    for classifier in classifiers:
        inputs = [tool.network_input(radiographs[0], classifier.model.preprocessing)]
        explanations += tool.explain_batch(classifier, inputs)
    figures = {
        "4 panels at 150 DPI": lambda: tool.explanation_figure(view, explanations[0]),
        "6 panels at 150 DPI": lambda: tool.comparison_figure(view, explanations),
    }

    def writing(figure: Callable[[], tool.Sheet]) -> Callable[[], object]:
        return lambda: (folder / "a.png").write_bytes(tool.figure_bytes(figure(), style))

    spent = medians({name: writing(figure) for name, figure in figures.items()}, 3 * repeats)
    importing = [sys.executable, "-c", "import time; t = time.time(); import torch; print(time.time() - t)"]
    torch_import = statistics.median(float(subprocess.run(importing, capture_output=True, text=True).stdout) for _ in range(3))
    heading("one figure, drawn and written", "measured")
    for name, value in spent.items():
        row(name, f"{value:.3f} s", "0.12 s" if name.startswith("4") else "0.15 s")
    row("`import torch`, for comparison", f"{torch_import:.2f} s", "1.5 s")


# Whole commands


def floor_script(checkpoints: dict[str, Path], image: Path) -> str:
    """The least that one image costs: imports without garbage collection, mapped load, a pass of each model."""
    return f"""
import gc, sys; gc.disable(); sys.path.insert(0, {str(ROOT)!r})
import torch, timm, explainability as tool
from functools import partial
from pathlib import Path
for key, path in {[(key, str(path)) for key, path in checkpoints.items()]!r}:
    weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    with torch.device("meta"):
        network = timm.create_model(weights["config"]["model_name"].partition(".")[0], num_classes=2)
    network.load_state_dict(weights["model_state_dict"], assign=True)
    inputs = tool.network_input(tool.load_radiograph(Path({str(image)!r})), tool.Preprocessing())
    with torch.inference_mode():
        network.eval()(torch.from_numpy(inputs)[None])
"""


def peer_script(checkpoints: dict[str, Path], images: list[Path], folder: Path) -> str:
    """The usual way: one process, pytorch-grad-cam, three pyplot figures an image."""
    return f"""
import numpy as np, timm, torch
from PIL import Image
import matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot as plt
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
from torchvision import transforms
prepare = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor(),
    transforms.Normalize({tool.IMAGENET_MEAN}, {tool.IMAGENET_STD})])
cams = []
for key, path, layer in {[(key, str(path), tool.FAMILIES[key].target_layer) for key, path in checkpoints.items()]!r}:
    saved = torch.load(path, map_location="cpu", weights_only=True)
    network = timm.create_model(saved["config"]["model_name"].partition(".")[0], num_classes=2)
    network.load_state_dict(saved["model_state_dict"])
    cams.append((key, network.eval(), GradCAM(model=network, target_layers=[network.get_submodule(layer)])))
for number, path in enumerate({[str(path) for path in images]!r}):
    image = Image.open(path).convert("RGB")
    inputs, rgb = prepare(image)[None], np.asarray(image.resize((224, 224)), np.float32) / 255
    shown = []
    for key, network, cam in cams:
        with torch.no_grad():
            probability = network(inputs).softmax(1)
        heat = cam(input_tensor=inputs, targets=None)[0]
        shown.append((heat, show_cam_on_image(rgb, heat, use_rgb=True)))
        figure, axes = plt.subplots(2, 2, figsize=(14, 14))
        for axis, picture in zip(axes.flat, (rgb, heat, shown[-1][1])):
            axis.imshow(picture, cmap="jet"); axis.axis("off")
        axes[1, 1].text(0.1, 0.5, str(probability.tolist())); axes[1, 1].axis("off")
        plt.tight_layout(); plt.savefig(f"{folder}/{{key}}_{{number}}.png", dpi=150, bbox_inches="tight"); plt.close()
    figure, axes = plt.subplots(2, 3, figsize=(18, 12))
    for line, (heat, overlay) in zip(axes, shown):
        for axis, picture in zip(line, (rgb, heat, overlay)):
            axis.imshow(picture, cmap="jet"); axis.axis("off")
    plt.tight_layout(); plt.savefig(f"{folder}/both_{{number}}.png", dpi=150, bbox_inches="tight"); plt.close()
"""


def command_seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def peak_memory(command: list[str]) -> float:
    """Largest sum of the proportional memory of a command and its processes, in GB (Linux)."""
    process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True), 0
    while process.poll() is None:
        peak = max(peak, sum(map(proportional_bytes, session_processes(process.pid))))
        time.sleep(0.1)
    return peak / 1e9


def session_processes(session: int) -> list[int]:
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if os.getsid(int(pid)) == session:
                found.append(int(pid))
        except ProcessLookupError:
            pass
    return found


def proportional_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def benchmark_commands(checkpoints: dict[str, Path], folder: Path, bare: float, device: str, repeats: int) -> None:
    named = [part for key, path in checkpoints.items() for part in (f"--{key}-checkpoint", str(path))]
    command = [*COMMAND, *named, "--device", device, "--output-dir", str(folder / "out"), "--image"]
    one, many = [*command, str(IMAGES[0])], [*command, *map(str, IMAGES[:MANY])]
    spent = medians(
        {
            "floor": lambda: command_seconds([sys.executable, "-c", floor_script(checkpoints, IMAGES[0])]),
            "one": lambda: command_seconds(one),
        },
        repeats,
    )
    heading("whole command, both models, all figures", "measured")
    row("1 image over its floor (imports, load, one forward pass each)", f"{spent['one'] / spent['floor']:.2f}", "1.18")
    row("1 image", f"{spent['one']:.1f} s")
    run = statistics.median(command_seconds(many) for _ in range(max(1, repeats // 2)))
    row(f"{MANY} images over their bare batched forward passes", f"{run / (MANY * bare):.2f}", "1.7")
    row(f"{MANY} images", f"{run:.1f} s")
    row(f"{MANY} images, peak memory", f"{peak_memory(many):.2f} GB", "1.3 GB")
    large = folder / "large.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 65536, (5000, 4000), dtype=np.uint16)).save(large)
    row("1 image of 4000 x 5000 pixels, 16 bits, peak memory", f"{peak_memory([*command, str(large)]):.2f} GB", "2 GB")
    peer = command_seconds([sys.executable, "-c", peer_script(checkpoints, IMAGES[:MANY], folder)])
    row(f"{MANY} images with pytorch-grad-cam and pyplot, one process", f"{peer:.1f} s, {peer / run:.1f} times this tool's")
    loop = MANY / LOOPED * command_seconds([sys.executable, "-c", peer_loop(checkpoints, folder)])
    row(f"the same as a shell loop ({LOOPED} images, extrapolated)", f"{loop:.0f} s, {loop / run:.1f} times this tool's")


def peer_loop(checkpoints: dict[str, Path], folder: Path) -> str:
    scripts = [peer_script(checkpoints, [image], folder) for image in IMAGES[:LOOPED]]
    return f"import subprocess, sys\nfor script in {scripts!r}: subprocess.run([sys.executable, '-c', script], check=True)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads, device {args.device}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoints = {key: folder / f"{key}.pth" for key in tool.FAMILIES}
        for key, path in checkpoints.items():
            save_checkpoint(tool.FAMILIES[key].full_size, path)
        classifiers = [tool.load_classifier(tool.FAMILIES[key], path, args.device) for key, path in checkpoints.items()]
        radiographs = [tool.load_radiograph(path) for path in IMAGES[:BATCH]]
        benchmark_explanations(classifiers, radiographs, args.repeats)
        bare = benchmark_batches(classifiers, radiographs, args.repeats)
        heading("methods, one image, over as many bare passes", "ratio")
        for classifier in classifiers:
            benchmark_methods(classifier, radiographs[0])
        benchmark_checks(classifiers, radiographs, args.repeats)
        benchmark_figures(classifiers, radiographs, folder, args.repeats)
        benchmark_commands(checkpoints, folder, bare, args.device, args.repeats)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

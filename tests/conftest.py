"""What every test may use: tiny networks, synthetic images, a temporary checkpoint tree.

Networks here have random weights: they test the tool and say nothing about fractures.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

# The tests run two at a time; the commands they start inherit this. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from collections.abc import Sequence

    from explainability import Classifier, Explanation, Family, Model, Radiograph

TINY = {"convnext": "convnextv2_atto", "efficientnet": "tf_efficientnetv2_b0"}
HEADS = {"convnext": "head.fc.bias", "efficientnet": "classifier.bias"}  # what the class scores start from


def users_checkpoint(architecture: str, seed: int = 0, **extra: object) -> dict[str, object]:
    """A checkpoint as users' trainers write it, with random weights."""
    import timm
    import torch

    torch.manual_seed(seed)
    network = timm.create_model(architecture.partition(".")[0], num_classes=2)
    config = {"model_name": architecture, "img_size": 224, "num_classes": 2, "dropout_rate": 0.3, "batch_size": 16}
    return {"epoch": 7, "model_state_dict": network.state_dict(), "val_acc": 98.32, "config": config, **extra}


def save(contents: object, path: Path) -> Path:
    import torch

    torch.save(contents, path)
    return path


@pytest.fixture(autouse=True)
def drawn_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting processes that draw takes longer than most tests; commands in processes of their own start them."""
    import explainability

    monkeypatch.setattr(explainability, "MAX_DRAWING_PROCESSES", 0)


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint of each family, in users' layout; do not change the files."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {key: save(users_checkpoint(name), folder / f"{key}_best.pth") for key, name in TINY.items()}


def leaning(key: str, to_class: int) -> dict[str, object]:
    """A tiny users' checkpoint that predicts this class whatever it sees."""
    contents = users_checkpoint(TINY[key])
    contents["model_state_dict"][HEADS[key]][to_class] += 3  # random scores stay far below
    return contents


@pytest.fixture(scope="session")
def tiny_classifiers(tiny_checkpoints: dict[str, Path]) -> dict[str, Classifier]:
    """The tiny pair, loaded; copy a network before changing it."""
    from explainability import FAMILIES, load_classifier

    return {key: load_classifier(FAMILIES[key], path, "cpu") for key, path in tiny_checkpoints.items()}


@pytest.fixture
def tiny_arguments(
    tiny_checkpoints: dict[str, Path], tiny_classifiers: dict[str, Classifier], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Options for a run over the tiny pair on the CPU, small figures in tmp_path/figures; the pair is loaded once."""
    import explainability

    load = explainability.load_classifier

    def loaded_once(family: Family, path: Path, *others: object) -> Classifier:
        is_tiny = path == tiny_checkpoints[family.key] and others == ("cpu", None)
        return tiny_classifiers[family.key] if is_tiny else load(family, path, *others)

    monkeypatch.setattr(explainability, "load_classifier", loaded_once)
    pair = [f"--{key}-checkpoint={path}" for key, path in tiny_checkpoints.items()]
    return [*pair, "--device=cpu", "--dpi=30", f"--output-dir={tmp_path / 'figures'}"]


def explain(classifier: Classifier, radiographs: Sequence[Radiograph], target: int | None = None) -> list[Explanation]:
    """What a classifier says of radiographs as they were loaded."""
    from explainability import explain_batch, network_input

    inputs = [network_input(radiograph, classifier.model.preprocessing) for radiograph in radiographs]
    return explain_batch(classifier, inputs, target)


def a_model(**changed: object) -> Model:
    """What a checkpoint might have told of itself."""
    from explainability import CLASS_NAMES, FAMILIES, Model, Preprocessing

    usual = {
        "family": FAMILIES["convnext"],
        "architecture": "convnextv2_base.fcmae_ft_in22k_in1k",
        "checkpoint": Path("convnext_v2_improved_best.pth"),
        "accuracy": "Validation accuracy: 98.32%",
        "class_names": CLASS_NAMES,
        "preprocessing": Preprocessing(),
    }
    return Model(**{**usual, **changed})


def an_explanation(**changed: object) -> Explanation:
    """What a network might have said, for what is done with it afterwards; fields of its model go there."""
    from explainability import Explanation, Model, normalised

    raw_map = changed.pop("raw_map", np.arange(-24, 25, dtype=np.float32).reshape(7, 7))
    fields = {field.name for field in dataclasses.fields(Model)}
    model = a_model(**{key: value for key, value in changed.items() if key in fields})
    told = {key: value for key, value in changed.items() if key not in fields}
    usual = {"probabilities": np.float32([0.9694, 0.0306]), "explained": 0}
    return Explanation(model=model, raw_map=raw_map, heatmap=normalised(raw_map), **{**usual, **told})


def in_new_process(*command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run Python in the repository with these arguments."""
    everything = {**os.environ, "PYTHONIOENCODING": "utf-8", **environment}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=everything, capture_output=True, check=False)


@pytest.fixture
def xray(tmp_path: Path) -> Path:
    """A portrait image with a bright diagonal band, as PNG."""
    rows, columns = np.mgrid[0:240, 0:180]
    band = 200 * np.exp(-(((columns - 40 - rows / 3) / 18) ** 2))
    path = tmp_path / "xray.png"
    Image.fromarray((20 + band).astype(np.uint8)).save(path)
    return path

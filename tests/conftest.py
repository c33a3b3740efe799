"""What every test may use: tiny networks, synthetic images, a temporary checkpoint tree.

Networks here have random weights: they test the tool and say nothing about fractures.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TINY = {"convnext": "convnextv2_atto", "efficientnet": "tf_efficientnetv2_b0"}


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


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint of each family, in users' layout; do not change the files."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {key: save(users_checkpoint(name), folder / f"{key}_best.pth") for key, name in TINY.items()}


@pytest.fixture
def xray(tmp_path: Path) -> Path:
    """A portrait image with a bright diagonal band, as PNG."""
    rows, columns = np.mgrid[0:240, 0:180]
    band = 200 * np.exp(-(((columns - 40 - rows / 3) / 18) ** 2))
    path = tmp_path / "xray.png"
    Image.fromarray((20 + band).astype(np.uint8)).save(path)
    return path

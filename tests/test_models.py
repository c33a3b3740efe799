"""Checkpoints: every layout that trainers write loads as saved, and everything else is one clear line."""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import pickle
import re
import socket
import zipfile
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import TINY, explain, save, users_checkpoint
from PIL import Image
from safetensors.torch import save_file

import explainability as tool

Weights = dict[str, torch.Tensor]
CONVNEXT = tool.FAMILIES["convnext"]
REVERSED = tool.CLASS_NAMES[::-1]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("tried to reach the network"))


@pytest.fixture(params=TINY)
def key(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pristine() -> dict[str, dict[str, Any]]:
    return {key: users_checkpoint(name) for key, name in TINY.items()}


def copied(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return {key: dict(value) if isinstance(value, dict) else value for key, value in checkpoint.items()}


@pytest.fixture
def checkpoint(pristine) -> dict[str, Any]:
    """A ConvNeXt V2 checkpoint that a test may change: its dictionaries are copies."""
    return copied(pristine["convnext"])


@pytest.fixture
def weights(checkpoint) -> Weights:
    return checkpoint["model_state_dict"]


@pytest.fixture
def stub(checkpoint, weights) -> dict[str, Any]:
    """The same with few weights, and so quick to save: for what is refused before weights are compared."""
    kept = ("head.", CONVNEXT.landmark, CONVNEXT.width, CONVNEXT.stem)
    few = {name: tensor.clone() for name, tensor in weights.items() if name.startswith(kept)}
    return {**checkpoint, "model_state_dict": few}


def load(path: Path, key: str = "convnext") -> tool.Classifier:
    return tool.load_classifier(tool.FAMILIES[key], path, "cpu")


def told(classifier: tool.Classifier) -> tuple[str, ...]:
    """The notes on what was done in loading, but for the classes' order, which few files record."""
    return tuple(note for note in classifier.model.notes if not note.startswith("class order assumed"))


def refused(path: Path, *words: str, key: str = "convnext") -> str:
    """Loading must fail with one line that names the path and holds the words."""
    with pytest.raises(tool.ExplainError) as caught:
        load(path, key)
    text = str(caught.value)
    assert text.startswith(tool.shown(path) + ": ") and "; " in text
    assert text.isprintable() and len(text) < 1200 and "weights_only" not in text
    assert all(word in text for word in words), text
    return text


def taken(contents: dict[Any, Any], key: str = "convnext", wanted: str = "ema") -> tuple[Weights, list[str]]:
    """Weights and notes from the contents of a file: for what is found before a network is built."""
    return tool.weights_of(tool.FAMILIES[key], contents, wanted, Path("x.pth"))


def are_same(found: Weights, expected: Weights) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def is_loaded(classifier: tool.Classifier, weights: Weights) -> bool:
    """Whether the network has these weights, in float32."""
    floats = {name: tensor.float() for name, tensor in weights.items() if tensor.is_floating_point()}
    held = classifier.network.state_dict()
    return are_same(held, weights | floats) and all(held[name].dtype == torch.float32 for name in floats)


def shifted(weights: Weights) -> Weights:
    return {name: tensor + 1 for name, tensor in weights.items()}


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


# ------------------------------------------------------------------------------------------
# Where weights lie
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_a_users_checkpoint_saved_on_a_gpu_loads_exactly(key, pristine, tmp_path, monkeypatch, zipped):
    path = tmp_path / "best.pth"
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(pristine[key], path, _use_new_zipfile_serialization=zipped)
    assert b"cuda:0" in path.read_bytes()
    before = torch.get_rng_state()
    classifier = load(path, key)
    assert torch.equal(torch.get_rng_state(), before)  # no random numbers are drawn
    assert is_loaded(classifier, pristine[key]["model_state_dict"])
    model = classifier.model
    assert (model.architecture, model.class_names) == (TINY[key], tool.CLASS_NAMES)
    assert (model.preprocessing, model.accuracy) == (tool.Preprocessing(), "Validation accuracy: 98.32%")
    assert told(classifier) == () and not classifier.network.training
    for tensor in (*classifier.network.parameters(), *classifier.network.buffers()):
        assert tensor.device.type == "cpu" and not tensor.requires_grad
    classifier.network(torch.zeros(1, 3, 64, 64))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not list mappings")
def test_the_file_is_mapped_not_copied(tiny_checkpoints):
    address = next(load(tiny_checkpoints["convnext"]).network.parameters()).data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= address < end:
            assert line.split()[-1] == str(tiny_checkpoints["convnext"])


AVERAGED = ["state_dict_ema", "model_ema", "ema_state_dict", "ema", "swa_model", "averaged_model"]
PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "net.backbone.", "timm_model."]


@pytest.mark.parametrize("place", ["state_dict", "model", "net", "module", "weights", tool.TOP, *AVERAGED])
def test_weights_are_found_wherever_trainers_put_them(key, pristine, place):
    weights = pristine[key]["model_state_dict"]
    for prefix in PREFIXES:
        inside = prefixed(prefix, weights)
        inside = inside if place == tool.TOP else {place: inside}
        found, notes = taken({"model": TINY[key], **inside, "epoch": 3}, key)
        assert are_same(found, weights)
        if place in AVERAGED:
            assert len(notes) == 1 and notes[0].startswith(f"ema weights taken from {place}")
        else:
            assert notes == []


NESTED = [("ema", "state_dict"), ("callbacks", "EMA"), ("state_dict", "ema_model")]


@pytest.mark.parametrize("place", [*AVERAGED, *NESTED], ids=str)
def test_averaged_weights_go_before_plain_ones(checkpoint, weights, place):
    averaged = prefixed("module.", shifted(weights))
    contents = (
        {**checkpoint, place: averaged}
        if isinstance(place, str)
        else {**checkpoint, place[0]: {place[1]: averaged}}
    )
    name = f"{place if isinstance(place, str) else '.'.join(place)}, module.*"
    found, notes = taken(contents)
    assert are_same(found, shifted(weights))
    assert notes == [
        f"ema weights taken from {name}, not from model_state_dict; --weights plain takes others"
    ]
    found, notes = taken(contents, wanted="plain")
    assert are_same(found, weights)
    assert notes == [
        f"plain weights taken from model_state_dict, not from {name}; --weights ema takes others"
    ]


@pytest.mark.parametrize("head", ["head.fc.", "../fc."])
def test_averaged_and_plain_weights_in_one_dictionary(weights, head):
    both = prefixed("model.net.", weights) | prefixed("ema.net.", shifted(weights))
    both = {
        name.replace("net.head.fc.", f"net.{head}").replace("net.../", ""): tensor
        for name, tensor in both.items()
    }
    for wanted, expected in (("ema", shifted(weights)), ("plain", weights)):
        found, notes = taken({"state_dict": both}, wanted=wanted)
        assert (
            are_same(found, expected) and "--weights" in notes[0] and len(notes) == (2 if "/" in head else 1)
        )


def test_the_command_line_names_folders_and_chooses_weights(checkpoint, weights, tmp_path):
    path = save({**checkpoint, "state_dict_ema": shifted(weights)}, tmp_path / "best.pth.tar")
    args = tool.parsed(["--model=convnext", f"--convnext-checkpoint={tmp_path}"])
    checkpoints, _ = tool.chosen_checkpoints(args)
    assert args.weights == "ema" and checkpoints == [(CONVNEXT, path)]
    for wanted, expected in (("ema", shifted(weights)), ("plain", weights)):
        request = tool.Request((), True, tuple(checkpoints), ("gradcam",), tool.FigureStyle())
        args = tool.parsed(["--device=cpu", f"--weights={wanted}", "--quiet"])
        (classifier,) = tool.load_classifiers(request, args)
        assert is_loaded(classifier, expected)


def test_of_several_sets_of_weights_the_usual_place_counts_else_none(checkpoint, weights):
    others = {
        "net": shifted(weights),
        "last": shifted(weights),
        "ema": {"shadow_params": [*weights.values()]},
    }
    found, notes = taken({**others, **checkpoint})
    assert are_same(found, weights)
    assert notes == ["plain weights taken from model_state_dict, not from net, last, ema without keys"]
    with pytest.raises(tool.ExplainError, match=r"more than once \(first and second\); save one set alone"):
        taken({"first": weights, "second": shifted(weights)})
    with pytest.raises(tool.ExplainError, match="more than once .the top level, model"):
        taken(prefixed("model.", weights) | weights)


BESIDE = {
    "criterion.pos_weight": torch.ones(2), "loss_fn.weight": torch.ones(2), "metrics.confusion": torch.ones(2, 2),
    "train_acc.tp": torch.zeros(2), "model.total_ops": torch.zeros(1), "class_weights": torch.ones(2),
    "ema.decay": torch.ones(()), "center_loss.weight": torch.ones(2, 320),
}  # fmt: skip


@pytest.mark.parametrize("layer", ["head.fc", "model.fc"])
def test_what_lies_beside_the_network_is_left_out_with_a_note(weights, layer):
    own = prefixed("model." if layer == "head.fc" else "model.backbone.", weights)
    own = {name.replace("model.backbone.head.fc", layer): tensor for name, tensor in own.items()}
    teacher = {name.replace("model.", "teacher."): tensor + 1 for name, tensor in own.items()}
    counted = {
        name.replace("0.weight", "0.total_params"): tensor for name, tensor in own.items() if "stem" in name
    }
    found, notes = taken({"state_dict": {**own, **BESIDE, **teacher, **counted}})
    assert are_same(found, weights)
    assert f": {len(BESIDE) + 1} (criterion.pos_weight, loss_fn.weight, metrics.confusion, …)" in notes[-1]
    assert notes[-1].startswith("left out, as the network is whole without")
    assert (
        "plain weights taken from state_dict, model." in notes[0]
        and "not from state_dict, teacher." in notes[0]
    )
    assert notes[1:-1] == ([] if layer == "head.fc" else ["its linear layer model.fc taken for head.fc"])


@pytest.mark.parametrize(
    ("backbone", "layer"), [("", "{head}.1"), ("backbone.", "fc"), ("backbone.", "classifier.1"), ("0.", "2")]
)
def test_a_single_linear_layer_that_is_left_over_is_the_head(key, pristine, backbone, layer):
    weights, head = dict(pristine[key]["model_state_dict"]), tool.FAMILIES[key].head
    layer = layer.format(head=head)
    moved = {
        name.replace(f"{head}.", f"{layer}.") if name.startswith(f"{head}.") else backbone + name: tensor
        for name, tensor in weights.items()
    }
    if layer == "2":  # Sequential(network, Dropout, Linear(bias=False))
        del moved["2.bias"]
        weights[f"{head}.bias"] = torch.zeros(2)
    found, notes = taken({"state_dict": moved}, key)
    assert are_same(found, weights) and notes == [f"its linear layer {layer} taken for {head}"]


@pytest.mark.parametrize(
    "layers",
    [
        {"head.fc.0": (64, 320), "head.fc.3": (2, 64)},
        {"fc.0": (320,), "fc.1": (2, 320)},  # a norm before it
        {"fc": (2, 640)},
        {"attention": (320, 320), "fc": (2, 320)},
        {},
    ],
)
def test_a_head_of_other_layers_is_refused(weights, layers):
    body = {name: tensor for name, tensor in weights.items() if not name.startswith("head.fc.")}
    held = f"{len(layers)} ({', '.join(layers)})" if layers else "none"
    with pytest.raises(
        tool.ExplainError, match=re.escape(f"holds {held} for head.fc, not one linear layer of 320 inputs")
    ):
        taken(body | {f"{name}.weight": torch.ones(shape) for name, shape in layers.items()})


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_other_precisions_are_computed_in_float32(weights, kind):
    given = {name: tensor.to(getattr(torch, kind)) for name, tensor in weights.items()}
    found, notes = tool.in_float32(given, Path("x"))
    assert are_same(found, {name: tensor.float() for name, tensor in given.items()})
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert notes == [f"{kind} weights computed in float32"]


@pytest.mark.parametrize(
    ("bad", "large", "kind"),
    [(float("nan"), 3e38, "float32"), (-float("inf"), 6e4, "float16"), (1e300, 3e38, "float64")],
)
def test_weights_that_are_not_finite_are_refused(checkpoint, tmp_path, bad, large, kind):
    name = "stages.2.blocks.0.mlp.fc1.weight"
    tensor = checkpoint["model_state_dict"][name].to(getattr(torch, kind), copy=True)
    checkpoint["model_state_dict"][name] = tensor
    tensor[3, 3:6] = large  # whose sum is infinite
    assert is_loaded(load(save(checkpoint, tmp_path / "x.pth")), checkpoint["model_state_dict"])
    tensor[3, 5] = bad
    refused(save(checkpoint, tmp_path / "x.pth"), "NaN or infinite", f"1 ({name})")


# ------------------------------------------------------------------------------------------
# Containers and what trainers put into them
# ------------------------------------------------------------------------------------------


def test_safetensors_with_metadata(checkpoint, weights, tmp_path):
    path = tmp_path / "convnext.safetensors"
    config = json.dumps(checkpoint["config"])
    save_file(
        weights, path, {"format": "pt", "config": config, "val_acc": "97.5", "class_names": '["a", "b"]'}
    )
    classifier = load(path)
    assert is_loaded(classifier, weights)
    assert (
        classifier.model.class_names == ("a", "b")
        and classifier.model.accuracy == "Validation accuracy: 97.50%"
    )
    save_file(weights, path, {"config": '{"model_name": "hf-hub:a/b"}'})
    refused(path, "hf-hub:a/b")


class Bomb:
    """Touches a file when it is unpickled without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("container", ["zip", "old", "plain pickle"])
def test_code_in_a_checkpoint_is_never_run(stub, tmp_path, container):
    path, trace = tmp_path / "bomb.pth", tmp_path / "ran"
    contents = {"extra": Bomb(trace)}
    if container == "plain pickle":
        path.write_bytes(pickle.dumps(contents))
    else:
        torch.save({**stub, **contents}, path, _use_new_zipfile_serialization=container == "zip")
    refused(path, "not written by torch.save" if container == "plain pickle" else "none is run")
    assert not trace.exists()
    pickle.loads(pickle.dumps(contents))
    assert trace.exists()  # so it would have gone off


HARMLESS = {
    "args": argparse.Namespace(lr=0.1, output=Path("/data/run")),
    "config": {"root": Path("a/b"), "windows": PureWindowsPath("c:/x"), "posix": PurePosixPath("/x")},
    "started": datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.timezone.utc),
    "took": datetime.timedelta(hours=3),
    "day": datetime.date(2026, 1, 2),
    "history": defaultdict(list, loss=[np.float32(0.5), np.float64(0.25)]),
    "confusion": np.arange(4).reshape(2, 2),
    "names": np.array(["a", "b"]),
    "best": np.bool_(True),
    "counts": Counter("aab"),
    "size": torch.Size([2]),
}


@pytest.mark.parametrize("zipped", [True, False])
def test_what_trainers_save_beside_the_weights_is_harmless(tmp_path, zipped):
    torch.save(
        {**HARMLESS, "weight": torch.ones(2)}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped
    )
    contents = tool.read_checkpoint(tmp_path / "x.pth")
    assert contents["history"] == {"loss": [0.5, 0.25]} and contents["started"] == HARMLESS["started"]
    assert contents["args"].output == PurePosixPath("/data/run")
    assert contents["confusion"].tolist() == [[0, 1], [2, 3]] and contents["names"].tolist() == ["a", "b"]


def save_naming(name: str, value: object, path: Path) -> Path:
    """A checkpoint of a path or a number of NumPy, whose type has another name in the file."""
    torch.save({"val_acc": value}, path, _use_new_zipfile_serialization=False)
    own = (
        b"cnumpy._core.multiarray\nscalar\n"
        if isinstance(value, np.generic)
        else b"cpathlib\nPurePosixPath\n"
    )
    assert own in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(own, "c{}\n{}\n".format(*name.split()).encode()))
    return path


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pathlib WindowsPath", PureWindowsPath("a")),
        ("pathlib._local PosixPath", PurePosixPath("a")),
        ("pathlib._local WindowsPath", PureWindowsPath("a")),
        ("numpy.core.multiarray scalar", np.float64(1)),
    ],
)
def test_harmless_types_of_other_systems_and_versions_load(tmp_path, name, value):
    given = value if isinstance(value, np.generic) else PurePosixPath("a")
    assert tool.read_checkpoint(save_naming(name, given, tmp_path / "x.pth")) == {"val_acc": value}


@pytest.mark.parametrize("model", [None, "tf_efficientnetv2_b0.of_another_timm"])
def test_a_checkpoint_of_timms_trainer_loads(key, pristine, tmp_path, model):
    options = argparse.Namespace(
        img_size=256, num_classes=None, mean=None, std=(0.5, 0.5, 0.5), interpolation="", lr=0.1
    )
    name = TINY[key] if model is None or key == "convnext" else model
    contents = {
        "arch": name,
        "state_dict": pristine[key]["model_state_dict"],
        "args": options,
        "optimizer": {},
        "metric": 97.1,
    }
    classifier = load(save(contents, tmp_path / "timm.pth"), key)
    usual = timm.get_pretrained_cfg(TINY[key])  # what timm's trainer takes where it is given nothing
    assert classifier.model.architecture == name
    assert classifier.model.preprocessing == tool.Preprocessing(
        256, usual.mean, (0.5,) * 3, usual.interpolation
    )
    assert "crop_pct 0.875" in told(classifier)[-1]


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pth.tar", ".safetensors"])
def test_a_checkpoint_of_lightning_is_found_by_its_suffix_and_loads(weights, tmp_path, suffix):
    contents = {
        "state_dict": prefixed("model.", weights), "epoch": 3, "global_step": 9, "pytorch-lightning_version": "2.4",
        "callbacks": {"ModelCheckpoint{'monitor': 'val'}": {"best_model_score": torch.tensor(0.9)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}], "loops": {"fit_loop": {}},
        "optimizer": {"exp_avg": shifted(weights)},
        "hyper_parameters": {"model_name": "convnextv2_atto", "class_names": ["simple", "comminuted"]},
    }  # fmt: skip
    path = save(contents, tmp_path / f"convnext{suffix}")
    assert tool.find_checkpoint(CONVNEXT, tmp_path) == path
    if suffix == ".ckpt":
        classifier = load(path)
        assert is_loaded(classifier, weights)
        assert classifier.model.class_names == REVERSED and classifier.model.notes == ()


def hub_folder(
    folder: Path, weights: Weights, config: dict[str, Any], name: str = "model.safetensors"
) -> Path:
    folder.mkdir()
    (save_file if name.endswith(".safetensors") else torch.save)(weights, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


TRANSFORMERS = {
    "architectures": ["TimmWrapperForImageClassification"], "model_type": "timm_wrapper", "initializer_range": 0.02,
    "architecture": "convnextv2_atto.fcmae", "label_names": ["simple", "comminuted"], "num_classes": 2,
    "id2label": {"0": "simple", "1": "comminuted"}, "label2id": {"simple": 0, "comminuted": 1},
    "pretrained_cfg": {"input_size": [3, 96, 96], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
                       "interpolation": "bicubic", "crop_pct": 0.9, "num_classes": 1000},
}  # fmt: skip


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_hubs_or_trainers_folder_loads(weights, tmp_path, name):
    folder = hub_folder(tmp_path / "convnext_run", prefixed("timm_model.", weights), TRANSFORMERS, name)
    torch.save({}, folder / "training_args.bin")
    for path in (folder, folder / name):
        classifier = load(path)
        assert is_loaded(classifier, weights)
        model = classifier.model
        assert (model.checkpoint, model.architecture) == (folder / name, "convnextv2_atto.fcmae")
        assert model.class_names == REVERSED
        assert model.preprocessing == tool.Preprocessing(96, (0.5,) * 3, (0.5,) * 3, "bicubic")
        assert "crop_pct 0.9" in told(classifier)[-1]
    assert tool.find_checkpoint(CONVNEXT, tmp_path) == folder / name


def test_a_config_beside_counts_only_for_its_own_network(key, pristine, tmp_path):
    (other,) = set(TINY) - {key}
    weights = pristine[key]["model_state_dict"]
    folder = hub_folder(tmp_path / "run", weights, {**TRANSFORMERS, "architecture": TINY[other]})
    assert load(save(weights, folder / "x.pth"), key).model.class_names == tool.CLASS_NAMES
    (folder / "config.json").write_text(json.dumps({**TRANSFORMERS, "architecture": TINY[key]}))
    assert load(folder / "x.pth", key).model.class_names == REVERSED
    (folder / "config.json").write_text("{")
    with pytest.raises(tool.ExplainError, match=r"config\.json: not what a hub or Trainer writes"):
        load(folder, key)


def test_a_folder_of_timm_itself_loads(weights, tmp_path):
    hub = pytest.importorskip("timm.models._hub")
    network = timm.create_model("convnextv2_atto", num_classes=2)
    network.load_state_dict(weights)
    labels = {"label_names": ["simple", "comminuted"]}
    hub.save_for_hf(network, tmp_path / "hub", model_config=labels, safe_serialization=True)
    classifier = load(tmp_path / "hub")
    assert is_loaded(classifier, weights) and classifier.model.class_names == REVERSED
    assert (
        classifier.model.preprocessing.interpolation == "bicubic" and "crop_pct 0.875" in told(classifier)[-1]
    )


# ------------------------------------------------------------------------------------------
# Classes, outputs, preprocessing, accuracy
# ------------------------------------------------------------------------------------------


ORDERS = {
    "class_names": ["simple_fracture", "comminuted_fracture"],
    "classes": ["simple", "comminuted"],
    "class_to_idx": {"comminuted_fracture": 1, "simple_fracture": 0},
    "id2label": {"1": "Comminuted Fracture", "0": "Simple Fracture"},
    "label2id": {"Simple": 0, "Comminuted": 1},
    "label_names": ("Simple Fracture", "comminuted"),
    "labels": np.array(["simple", "comminuted"]),
    "idx_to_class": {"1": "comminuted", "0": "simple"},
    "names": {1: "comminuted", 0: "simple"},
}
PLACES = [
    "",
    "config",
    "args",
    "hyper_parameters",
    "pretrained_cfg",
    "meta.dataset_meta",
    "config.pretrained_cfg",
]


def names_of(record: dict[str, Any], outputs: int = 2, *given: str) -> tuple[tuple[str, ...], list[str]]:
    return tool.class_names_of(record, outputs, given, Path("x"))


@pytest.mark.parametrize("name", ORDERS)
def test_a_recorded_order_of_the_classes_counts(name):
    for place in PLACES:
        record = {name: ORDERS[name]}
        for part in reversed(place.split(".") if place else ()):
            record = {part: argparse.Namespace(**record) if part == "args" else record}
        assert names_of(record) == (REVERSED, [])


A_TO_L = tuple(f"kind {letter}" for letter in "abcdefghijkl")
ASSUMED = ["class order assumed: 0 = Comminuted Fracture, 1 = Simple Fracture; --class-names says another"]


@pytest.mark.parametrize(
    ("record", "outputs", "given", "names", "notes"),
    [
        *(({"config": nothing}, 2, (), tool.CLASS_NAMES, ASSUMED) for nothing in (
            {}, {"id2label": {0: "LABEL_0", 1: "LABEL_1"}}, {"class_to_idx": {"0": 0, "1": 1}}, {"classes": 2},
            {"labels": torch.zeros(9)}, {"names": "fractures"}, {"label2id": {"a": 0, "b": 7}})),
        ({}, 2, ("simple_fracture", "Comminuted"), REVERSED, []),
        ({"class_names": ["a", "b"]}, 2, ("A", "b"), ("a", "b"), []),
        ({"label_names": list("abc")}, 2, ("x", "y"), ("x", "y"), []),
        ({"class_names": ["comminuted", "no_fracture", "simple"], "num_classes": 1000}, 3, (),
         ("Comminuted Fracture", "no_fracture", "Simple Fracture"), []),
        ({"class_names": ["simple", "Simple Fracture", "x"]}, 3, (), ("simple", "Simple Fracture", "x"), []),
        ({"id2label": {str(index): A_TO_L[index] for index in reversed(range(12))}}, 12, (), A_TO_L, []),
        ({"classes": ["simple", "comminuted"], "label_names": list("abc")}, 1, (), REVERSED,
         ["one output: its sigmoid is the probability of Comminuted Fracture"]),
    ],
)  # fmt: skip
def test_names_of_the_classes(record, outputs, given, names, notes):
    assert names_of(record, outputs, *given) == (names, notes)


@pytest.mark.parametrize(
    ("record", "outputs", "given", "words"),
    [
        ({"classes": ["simple", "comminuted"], "config": {"id2label": {0: "comminuted", 1: "simple"}}}, 2, (),
         "order of its classes is unclear: classes says Simple .*, Comm.* and id2label says Comm.*, Simple .*; correct"),
        ({"class_names": ["a", "b"]}, 2, ("b", "a"), "class_names says a, b and --class-names says b, a; leave --class"),
        ({}, 3, (), r"head has 3 outputs, but the class names are 2 \(Comminuted Fracture, Simple Fracture\); name them"),
        ({}, 2, ("a", "b", "c"), r"head has 2 outputs, but the class names are 3 \(a, b, c\)"),
        *(({"class_names": bad}, 2, (), "class_names is .*, not a list of 2 to 100 different names; correct class_names")
          for bad in ("ab", [], ["a"], ["a", "A "], ["a", " "], ["a", 1], 7)),
    ],
)  # fmt: skip
def test_names_that_do_not_tell_the_classes_are_refused(record, outputs, given, words):
    with pytest.raises(tool.ExplainError, match=words):
        names_of(record, outputs, *given)


def test_the_users_class_names_count_for_the_file(checkpoint, tmp_path):
    path = save(checkpoint, tmp_path / "x.pth")
    assert load(path).model.notes == (*ASSUMED,)
    assert tool.load_classifier(CONVNEXT, path, "cpu", ("simple", "comminuted")).model.class_names == REVERSED


def picture(*shape: int) -> tool.Radiograph:
    """Noise; of H x W pixels of grey, or H x W x 3 of colour."""
    noise = np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)
    return tool.Radiograph(noise if len(shape) == 3 else np.repeat(noise[:, :, None], 3, axis=2))


def test_one_output_speaks_for_two_classes(checkpoint, weights, tmp_path):
    weights["head.fc.weight"], weights["head.fc.bias"] = torch.randn(1, 320), torch.randn(1)
    classifier = load(save(checkpoint, tmp_path / "one.pth"))
    plain = timm.create_model("convnextv2_atto", num_classes=1).eval()
    plain.load_state_dict(weights)
    radiographs = [picture(100, 60), picture(50, 80)]
    inputs = [tool.network_input(each, classifier.model.preprocessing) for each in radiographs]
    activations = plain.forward_features(torch.from_numpy(np.stack(inputs))).detach().requires_grad_()
    logits = plain.forward_head(activations)[:, 0]
    (gradients,) = torch.autograd.grad(logits.sum(), activations)
    raw = (gradients.mean(dim=(2, 3), keepdim=True) * activations).sum(dim=1).detach().numpy()
    for target, sign in ((0, -1), (1, 1)):
        for each, logit, expected in zip(explain(classifier, radiographs, target), logits.detach(), raw):
            assert each.probabilities[1] == pytest.approx(float(torch.sigmoid(logit)), abs=1e-6)
            assert each.probabilities.sum() == pytest.approx(1) and each.explained == target
            np.testing.assert_allclose(each.raw_map, sign * expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("normalised", [{}, {"mean": [0.5], "std": [0.25]}, {"mean": [0.4, 0.5, 0.6]}])
def test_a_network_for_grey_images_gets_the_grey_radiograph(key, tmp_path, normalised):
    torch.manual_seed(1)
    plain = timm.create_model(TINY[key], num_classes=2, in_chans=1).eval()
    config = {"model_name": TINY[key], **normalised}
    classifier = load(save({"state_dict": plain.state_dict(), "config": config}, tmp_path / "grey.pth"), key)
    assert (
        "grey" in told(classifier)[0]
        and "mean (0.4" in told(classifier)[1]
        or "mean (0.5" in told(classifier)[1]
    )
    mean = np.mean(normalised.get("mean", tool.IMAGENET_MEAN))
    std = np.mean(normalised.get("std", tool.IMAGENET_STD))
    for radiograph in (picture(100, 60), picture(70, 90, 3)):
        luminance = radiograph.squashed(224).astype(float) @ [0.299, 0.587, 0.114] / 255
        with torch.no_grad():
            expected = (
                plain(torch.from_numpy((luminance - mean) / std).float()[None, None])
                .softmax(dim=1)[0]
                .numpy()
            )
        np.testing.assert_allclose(explain(classifier, [radiograph])[0].probabilities, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("img_size", [0, 63, 1025, 224.0, "224", True, [224, 256], {}, torch.ones(2)], "one number of pixels from 64 to 1024"),
        ("mean", [0.5, [0.5] * 4, ["a"] * 3, [float("nan")] * 3, [123.7, 116.3, 103.5], torch.ones(3)], "three numbers from 0 to 1"),
        ("std", [[0, 0.2, 0.2], [-1, 0.5, 0.5], {}], "three numbers from 0.001 to 1"),
    ],
)  # fmt: skip
def test_unusable_records_are_refused(name, values, words):
    for value in values:
        with pytest.raises(
            tool.ExplainError, match=f"x: {name} is .*, not {words}.*; correct {name} in the checkpoint"
        ):
            tool.preprocessing_of({"config": {name: value}}, False, Path("x"))


HALF = (0.5,) * 3


@pytest.mark.parametrize(
    ("recorded", "expected", "words"),
    [
        ({"mean": (0.5, 0, 0.25), "config": {"std": [0.25, 0.5, 1]}},
         tool.Preprocessing(224, (0.5, 0.0, 0.25), (0.25, 0.5, 1.0)), "mean (0.5, 0.0, 0.25), std (0.25, 0.5, 1.0)"),
        ({"config": {"img_size": 64}}, tool.Preprocessing(64), "64 pixels"),
        ({"config": {"img_size": [300, 300]}}, tool.Preprocessing(300), "300 pixels"),
        ({"hyper_parameters": {"image_size": 96, "mean": [0.5], "std": [0.5]}}, tool.Preprocessing(96, HALF, HALF), "96"),
        ({"pretrained_cfg": {"input_size": (3, 288, 288), "interpolation": "bicubic"}},
         tool.Preprocessing(288, interpolation="bicubic"), "bicubic"),
        ({"args": argparse.Namespace(interpolation="random", img_size=None)}, tool.Preprocessing(), ""),
        ({"pretrained_cfg": {"crop_pct": 0.875}}, tool.Preprocessing(), "crop_pct 0.875"),
        ({"pretrained_cfg": {"crop_pct": 1.0, "crop_mode": "center"}}, tool.Preprocessing(), "crop_pct 1.0"),
        ({"pretrained_cfg": {"crop_pct": 1.0, "crop_mode": "squash", "num_classes": 1000}}, tool.Preprocessing(), ""),
    ],
)  # fmt: skip
def test_recorded_preprocessing_is_done_or_told(recorded, expected, words):
    preprocessing, notes = tool.preprocessing_of(recorded, False, Path("x"))
    assert preprocessing == expected
    assert words in "".join(notes) and bool(words) == bool(notes)


def test_the_recorded_interpolation_makes_the_input():
    radiograph = picture(300, 100)
    for name in ("bicubic", "bilinear", "nearest"):
        seen = tool.network_input(radiograph, tool.Preprocessing(64, (0.0,) * 3, (1.0,) * 3, name))
        filtered = Image.fromarray(radiograph.pixels).resize((64, 64), Image.Resampling[name.upper()])
        assert np.array_equal(np.rint(seen * 255), np.asarray(filtered).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("recorded", "text"),
    [
        ({"val_acc": 99.16}, "Validation accuracy: 99.16%"),
        ({"test_acc": torch.tensor(97), "val_acc": 99.16}, "Test accuracy: 97.00%"),
        ({"val_acc": 0.9832}, "Validation accuracy: 0.9832 as recorded"),
        *(({"val_acc": bad}, "Accuracy: not recorded in the checkpoint") for bad in (float("nan"), -1, 101, "99", True)),
    ],
)  # fmt: skip
def test_accuracy_is_named_as_the_file_names_it(recorded, text):
    assert tool.accuracy_text(recorded) == text


# ------------------------------------------------------------------------------------------
# Which network
# ------------------------------------------------------------------------------------------

MISFITS = {
    "renamed": (lambda weights: weights.update({"stem.my_0\n": weights.pop("stem.0.weight")}),
                "2 (stem.0.weight is missing in the file, (40, 3, 4, 4) torch.float32 in the network, stem.my_0\\n is (40"),
    "a layer more": (lambda weights: weights.update({"stages.0.attention.weight": torch.ones(40, 40)}),
                     "1 (stages.0.attention.weight is (40, 40) torch.float32 in the file, missing in the network)"),
    "another shape": (lambda weights: weights.update({"stem.0.weight": torch.zeros(40, 2, 4, 4)}),
                      "1 (stem.0.weight is (40, 2, 4, 4) torch.float32 in the file, (40, 3, 4, 4) torch.float32 in"),
    "three of many": (lambda weights: [weights.pop(f"stages.{index}.blocks.0.norm.weight") for index in range(4)],
                      "its 136 weights do not fit the 140 of convnextv2_atto: 4 (stages.0.blocks.0.norm.weight is"),
    "complex": (lambda weights: weights.update({"head.fc.bias": torch.ones(2) + 0j}), "(2,) torch.complex64 in the file"),
    "integers": (lambda weights: weights.update({"head.fc.bias": torch.ones(2).int()}), "(2,) torch.int32 in the file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISFITS)
def test_weights_that_do_not_fit_are_named_with_both_sides(checkpoint, weights, tmp_path, kind):
    change, words = MISFITS[kind]
    change(weights)
    refused(save(checkpoint, tmp_path / "x.pth"), words, "set model_name in its config")


def test_the_size_is_the_recorded_one_or_told_by_the_shapes(key, pristine, tmp_path):
    contents = copied(pristine[key])
    larger = {"convnext": "convnextv2_femto", "efficientnet": "tf_efficientnetv2_b1"}[key]
    contents["config"]["model_name"] = larger
    refused(save(contents, tmp_path / "size.pth"), f"weights do not fit the", f"of {larger}: ", key=key)
    del contents["config"]
    assert load(save(contents, tmp_path / "size.pth"), key).model.architecture == TINY[key]


@pytest.mark.slow
def test_every_size_of_timm_is_told_by_its_shapes():
    sizes = {
        "convnext": "atto femto pico nano tiny small base large huge",
        "efficientnet": "s m l xl b0 b1 b2 b3",
    }
    for key, stem in (("convnext", "convnextv2_"), ("efficientnet", "tf_efficientnetv2_")):
        family = tool.FAMILIES[key]
        for name in (stem + size for size in sizes[key].split()):
            weights = tool.build_network(name, 2).state_dict()
            assert tool.architecture_of(family, {}, weights, Path("x")).partition(".")[0] == name
            assert tool.architecture_of(family, {"arch": name}, weights, Path("x")) == name
            assert family.landmark in weights and f"{family.head}.weight" in weights
            assert not any(
                other.landmark in weights for other in tool.FAMILIES.values() if other is not family
            )


FOREIGN_NAMES = [
    "hf-hub:timm/convnextv2_atto",
    "local-dir:/tmp",
    "convnextv2_atto/../x",
    "resnet18",
    "tf_efficientnetv2_b0",
]


@pytest.mark.parametrize("name", [*FOREIGN_NAMES, "convnextv2_atto\n", 7])
def test_a_foreign_network_name_is_refused(stub, tmp_path, name):
    stub["config"]["model_name"] = name
    refused(save(stub, tmp_path / "name.pth"), "records the network", "not of the family")


def test_the_other_family_is_recognised_by_its_keys(key, pristine, tmp_path):
    (other,) = set(TINY) - {key}
    path = save(pristine[other], tmp_path / "other.pth")
    refused(path, f"of the {other} family", f"--{other}-checkpoint", key=key)


@pytest.mark.parametrize("kind", ["missing", "averaged to floats"])
def test_counters_of_batches_do_not_matter(pristine, tmp_path, kind):
    contents = copied(pristine["efficientnet"])
    weights = contents["model_state_dict"]
    for name in [name for name in weights if name.endswith("num_batches_tracked")]:
        weights[name] = weights[name] * 0.5
        if kind == "missing":
            del weights[name]
    classifier = load(save(contents, tmp_path / "counters.pth"), "efficientnet")
    assert told(classifier) == () and classifier.network(torch.zeros(1, 3, 64, 64)).isfinite().all()


# ------------------------------------------------------------------------------------------
# What is no checkpoint, or of another kind
# ------------------------------------------------------------------------------------------


def with_lora(weights: Weights) -> Weights:
    layer = "stages.3.blocks.0.mlp.fc1"
    base = {
        f"base_model.model.{name.replace(layer, layer + '.base_layer')}": tensor
        for name, tensor in weights.items()
    }
    return base | {f"base_model.model.{layer}.lora_A.default.weight": torch.ones(4, 320)}


def of_fastai(weights: Weights) -> dict[str, Any]:
    head = {
        "1.2.weight": torch.ones(640),
        "1.4.weight": torch.ones(512, 640),
        "1.8.weight": torch.ones(2, 512),
    }
    return {
        "model": prefixed("0.model.", {n: t for n, t in weights.items() if "head.fc" not in n}) | head,
        "opt": {},
    }


PEFT, DEEPSPEED, FSDP = (
    ("PEFT", "merge_and_unload()"),
    ("DeepSpeed", "zero_to_fp32.py"),
    ("FSDP", "dcp_to_torch"),
)
OTHERS = {
    "PEFT": (with_lora, PEFT),
    "loralib": (lambda weights: {**weights, "stages.3.blocks.0.mlp.fc1.lora_A": torch.ones(4, 320)}, PEFT),
    "adapter alone": (lambda weights: {"base_model.model.head.fc.ia3_l": torch.ones(4, 320)}, PEFT),
    "ZeRO 3": (lambda weights: {"module": {name: torch.empty(0) for name in weights}, "ds_version": "0.14"}, DEEPSPEED),
    "ZeRO shard": (lambda weights: {"optimizer_state_dict": {"zero_stage": 2}, "ds_config": {}}, DEEPSPEED),
    "quantised": (lambda weights: {"head.fc._packed_params._packed_params": torch.ones(2)}, ("quantised",)),
    "quantised in part": (lambda weights: {**weights, "head.fc.zero_point": torch.ones(1)}, ("quantised",)),
    "pruned": (lambda weights: {**weights, "stem.0.weight_mask": torch.ones(1)}, ("pruned", "prune.remove")),
    "fastai": (of_fastai, ("holds 2 (1.4, 1.8) for head.fc, not one linear layer", "no other head")),
    "a network": (lambda weights: torch.nn.Sequential(torch.nn.Linear(2, 2)),
                  ("container.Sequential", "model.state_dict()", "none is run")),
    "a network inside": (lambda weights: {"model": torch.nn.Linear(2, 2)}, ("linear.Linear", "model.state_dict()")),
    "a list": (lambda weights: [1], ("not a dictionary of weights", "a list")),
    "a tensor": (lambda weights: torch.ones(2), ("not a dictionary of weights", "a Tensor")),
    "a text": (lambda weights: "x\n", ("not a dictionary of weights", r"'x\n'")),
    "nothing": (lambda weights: {"epoch": 3, "model": {}}, ("another network, or none", "0 weights", "convnextv2_*")),
    "another": (lambda weights: {"model": {"conv1.weight": torch.ones(3, 3)}},
                ("another network, or none", "1 weights", "convnextv2_* or tf_efficientnetv2_*")),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_checkpoints_are_named_with_what_helps(weights, tmp_path, kind):
    build, words = OTHERS[kind]
    assert "timm name" not in refused(save(build(weights), tmp_path / "x.pth"), *words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fastai.learner Learner", ("a Learner of fastai", "learn.model.state_dict()")),
        ("torch.distributed.tensor._api DTensor", FSDP),
        ("torch.ao.nn.quantized.modules.linear Linear", ("quantised",)),
        ("deepspeed.runtime.zero.config ZeroStageEnum", DEEPSPEED),
        ("pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint", ("Lightning", "['state_dict']")),
        (
            "__main__ FractureNet",
            ("a whole network", "__main__.FractureNet", "model.state_dict()", "none is run"),
        ),
    ],
)
def test_objects_are_named_with_the_call_that_helps(tmp_path, name, words):
    refused(save_naming(name, PurePosixPath("x"), tmp_path / "x.pth"), *words)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], PEFT),
        ([".metadata", "__0_0.distcp"], FSDP),
        (["zero_to_fp32.py", "latest"], DEEPSPEED),
        (["saved_model.pb"], ("a folder with 0 files of weights", "name the file")),
        (["a.pth", "b.pth"], ("a folder with 2 files of weights", "name the file")),
    ],
)
def test_other_folders_are_named_as_what_they_are(tmp_path, files, words):
    for name in files:
        (tmp_path / name).touch()
    refused(tmp_path, *words)


def archive(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, b"x" * 100)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("an empty file",)),
        (b"<html><body>404</body></html>", ("a text file", "torch.save")),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            ("Git LFS pointer", "git lfs pull"),
        ),
        (b"\x89PNG\r\n", ("a PNG image",)),
        (b"\x89HDF\r\n", ("an HDF5 file, as of Keras", "PyTorch")),
        (archive("model.weights.h5"), ("not of PyTorch, as Keras's",)),
        (archive("x/data.pkl", "x/constants.pkl"), ("a TorchScript archive", "state_dict()")),
        (b"PK\x03\x04" + bytes(60), ("damaged", "copy or download")),
        (b"\x80\x02", ("damaged",)),
        *((length.to_bytes(8, "little") + b'{"a":', ("damaged",)) for length in (20, 90_000_000)),
    ],
    ids=range(11),
)
def test_other_files_are_named_as_what_they_are(tmp_path, content, words):
    path = tmp_path / "convnext_best.pth"
    path.write_bytes(content)
    refused(path, *words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("__0_0.distcp", FSDP),
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", DEEPSPEED),
        ("adapter_model.bin", PEFT),
    ],
)
def test_files_are_told_by_their_names(tmp_path, name, words):
    refused(save({"a": torch.ones(2)}, tmp_path / name), *words)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_checkpoint_is_refused(checkpoint, tmp_path, zipped):
    path = tmp_path / "half.pth"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    size = path.stat().st_size
    for share in (0.999, 0.9, 0.5, 0.1):
        os.truncate(path, int(size * share))
        refused(path, "damaged", "copy or download")


@pytest.mark.parametrize(("module", "name"), [(torch, "load"), (timm, "create_model")])
def test_lack_of_memory_is_not_taken_for_a_damaged_file(
    tiny_checkpoints, monkeypatch, capsys, xray, module, name
):
    def exhausted(*args: object, **kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr(module, name, exhausted)
    path = tiny_checkpoints["convnext"]
    assert (
        tool.main(["--image", str(xray), "--model=convnext", f"--convnext-checkpoint={path}", "--device=cpu"])
        == 1
    )
    assert (
        capsys.readouterr().err
        == "❌ memory: not enough; close programs, take smaller --batch-size or --dpi, or --device cpu\n"
    )

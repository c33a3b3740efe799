"""Checkpoints: every layout that trainers write loads as saved, and everything else is one clear line."""

from __future__ import annotations

import argparse
import datetime
import json
import math
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
FAMILIES, CONVNEXT, X = tool.FAMILIES, tool.FAMILIES["convnext"], Path("x")
REVERSED, HALF = tool.CLASS_NAMES[::-1], (0.5, 0.5, 0.5)
ASSUMED = ("class order assumed: 0 = Comminuted Fracture, 1 = Simple Fracture; --class-names says another",)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("tried to reach the network"))


@pytest.fixture(params=TINY)
def key(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pristine() -> dict[str, dict[str, Any]]:
    return {key: users_checkpoint(name) for key, name in TINY.items()}


@pytest.fixture
def checkpoint(pristine, request) -> dict[str, Any]:
    """A users' checkpoint that a test may change, of ConvNeXt V2 where the test asks for no other."""
    key = request.getfixturevalue("key") if "key" in request.fixturenames else "convnext"
    return {name: dict(value) if isinstance(value, dict) else value for name, value in pristine[key].items()}


@pytest.fixture
def weights(checkpoint) -> Weights:
    return checkpoint["model_state_dict"]


def load(path: Path, key: str = "convnext", names: tuple[str, ...] | None = None) -> tool.Classifier:
    return tool.load_classifier(FAMILIES[key], path, "cpu", names)


def refused(path: Path, *words: str, key: str = "convnext") -> str:
    """Loading must fail with one line that names the path and holds the words."""
    with pytest.raises(tool.ExplainError) as caught:
        load(path, key)
    text = str(caught.value)
    assert text.startswith(f"{tool.shown(path)}: ") and "; " in text and all(word in text for word in words)
    assert text.isprintable() and len(text) < 1200 and "weights_only" not in text
    return text


def taken(contents: dict[Any, Any], key: str = "convnext", wanted: str = "ema") -> tuple[Weights, list[str]]:
    """Weights and notes from the contents of a file: for what is found before a network is built."""
    return tool.weights_of(FAMILIES[key], contents, wanted, X)


def are_same(found: Weights, expected: Weights) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def is_loaded(classifier: tool.Classifier, weights: Weights) -> bool:
    """Whether the network has these weights, in float32."""
    return are_same(classifier.network.state_dict(), tool.in_float32(weights, X)[0])


def shifted(weights: Weights) -> Weights:
    return {name: tensor + 1 for name, tensor in weights.items()}


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


def with_head(weights: Weights, backbone: str, head: str, layer: str) -> Weights:
    """Weights whose head is called `layer`, and the rest begins with `backbone`."""
    own = {name: tensor for name, tensor in weights.items() if name.startswith(f"{head}.")}
    rest = {name: tensor for name, tensor in weights.items() if name not in own}
    return prefixed(backbone, rest) | {name.replace(head, layer): tensor for name, tensor in own.items()}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_users_checkpoint_saved_on_a_gpu_loads_exactly(key, checkpoint, tmp_path, monkeypatch, zipped):
    path = tmp_path / "best.pth"
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    assert b"cuda:0" in path.read_bytes()
    before = torch.get_rng_state()
    classifier = load(path, key)
    assert torch.equal(torch.get_rng_state(), before)  # no random numbers are drawn
    maps = Path("/proc/self/maps")
    assert not zipped or not maps.exists() or str(path) in maps.read_text()  # the weights are not copied
    assert is_loaded(classifier, checkpoint["model_state_dict"])
    model = classifier.model
    assert (model.architecture, model.class_names, model.notes) == (TINY[key], tool.CLASS_NAMES, ASSUMED)
    assert (model.preprocessing, model.accuracy) == (tool.Preprocessing(), "Validation accuracy: 98.32%")
    assert load(path, key, ("simple", "comminuted")).model.class_names == REVERSED
    assert not classifier.network.training
    for tensor in (*classifier.network.parameters(), *classifier.network.buffers()):
        assert tensor.device.type == "cpu" and not tensor.requires_grad


AVERAGED = ["state_dict_ema", "model_ema", "ema_state_dict", "ema", "swa_model", "averaged_model"]
PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "net.backbone.", "timm_model."]


@pytest.mark.parametrize("place", ["state_dict", "model", "net", "module", "weights", tool.TOP, *AVERAGED])
def test_weights_are_found_wherever_trainers_put_them(key, weights, place):
    for prefix in PREFIXES:
        inside = prefixed(prefix, weights)
        contents = inside if place == tool.TOP else {"model": TINY[key], place: inside}
        found, notes = taken({**contents, "epoch": 3}, key)
        assert are_same(found, weights)
        name = f"{place}, {prefix}*" if prefix else place
        assert notes == ([f"ema weights taken from {name}"] if place in AVERAGED else [])


@pytest.mark.parametrize("place", [*AVERAGED, "ema.state_dict", "callbacks.EMA.ema_state_dict"])
def test_averaged_weights_go_before_plain_ones(checkpoint, weights, place):
    contents, name, plain = prefixed("module.", shifted(weights)), f"{place}, module.*", "model_state_dict"
    for part in reversed(place.split(".")):
        contents = {part: contents}
    contents |= checkpoint
    found, notes = taken(contents)
    assert are_same(found, shifted(weights))
    assert notes == [f"ema weights taken from {name}, not from {plain}; --weights plain takes others"]
    found, notes = taken(contents, wanted="plain")
    assert are_same(found, weights)
    assert notes == [f"plain weights taken from {plain}, not from {name}; --weights ema takes others"]


@pytest.mark.parametrize("outer", ["", "module."])
@pytest.mark.parametrize("layer", ["net.head.fc", "fc"])
def test_averaged_and_plain_weights_in_one_dictionary(weights, layer, outer):
    whole = with_head(weights, "net.", "head.fc", layer)
    both = prefixed(f"{outer}model.", whole) | prefixed(f"{outer}ema_model.", shifted(whole))
    for wanted, expected in (("ema", shifted(weights)), ("plain", weights)):
        found, notes = taken({"state_dict": both}, wanted=wanted)
        assert are_same(found, expected) and "--weights" in notes[0] and len(notes) == 1 + (layer == "fc")


SIDES = [("net.", "fc", "ema_net.", "ema_fc"), ("m.net.", "m.fc", "m.ema.net.", "m.ema.fc")]


@pytest.mark.parametrize("names", SIDES)
def test_averaged_weights_have_their_own_head(weights, names):
    plain, averaged = names[:2], names[2:]
    both = with_head(weights, plain[0], "head.fc", plain[1])
    both |= with_head(shifted(weights), averaged[0], "head.fc", averaged[1])
    for wanted, expected, (_, layer) in (("ema", shifted(weights), averaged), ("plain", weights, plain)):
        found, notes = taken(both, wanted=wanted)
        assert are_same(found, expected) and notes[1] == f"its linear layer {layer} taken for head.fc"


def test_the_command_line_names_folders_and_chooses_weights(checkpoint, weights, tmp_path):
    path = save({**checkpoint, "state_dict_ema": shifted(weights)}, tmp_path / "best.pth.tar")
    args = tool.parsed(["--model=convnext", f"--convnext-checkpoint={tmp_path}"])
    checkpoints, _ = tool.chosen_checkpoints(args)
    assert args.weights == "ema" and checkpoints == [(CONVNEXT, path)]
    for wanted, expected in (("ema", shifted(weights)), ("plain", weights)):
        args = tool.parsed(["--device=cpu", f"--weights={wanted}", "--quiet"])
        (classifier,) = tool.load_classifiers(tool.Request(args, (), True, checkpoints, tool.FigureStyle()))
        assert is_loaded(classifier, expected)


def test_of_several_sets_of_weights_the_usual_place_counts_else_none(checkpoint, weights):
    other = shifted(weights)
    others = {"net": other, "last": other, "ema": {"shadow_params": [*weights.values()]}}
    found, notes = taken({**others, **checkpoint, "avg_metrics": {"loss": 1}})
    assert are_same(found, weights)
    assert notes == ["plain weights taken from model_state_dict, not from net, last, ema without keys"]
    with pytest.raises(tool.ExplainError, match=r"more than once \(best_loss and last\); save one set alone"):
        taken({"best_loss": weights, "last": other})
    with pytest.raises(tool.ExplainError, match="more than once .the top level, model"):
        taken(prefixed("model.", weights) | weights)


BESIDE = {
    "criterion.pos_weight": torch.ones(2), "loss_fn.weight": torch.ones(2), "metric.tp": torch.ones(2),
    "train_acc.tp": torch.zeros(2), "model.total_ops": torch.zeros(1), "class_weights": torch.ones(2),
    "ema.decay": torch.ones(()), "center_loss.weight": torch.ones(2, 320),
    "losses.0.weight": torch.ones(2, 320), "scale.weight": torch.ones(()),
    "model.backbone.stem.0.total_params": torch.ones(1),
}  # fmt: skip


@pytest.mark.parametrize("layer", ["backbone.head.fc", "fc"])
def test_what_lies_beside_the_network_is_left_out_with_a_note(weights, layer):
    whole = with_head(weights, "backbone.", "head.fc", layer)
    beside = BESIDE | prefixed("teacher.", shifted(whole))
    found, (taken_from, *others, left_out) = taken({"state_dict": prefixed("model.", whole) | beside})
    assert are_same(found, weights)
    assert taken_from.startswith("plain weights taken from state_dict, model.backbone.*, not from state")
    count = f"{len(BESIDE)} (criterion.pos_weight, loss_fn.weight, metric.tp, …)"
    assert left_out == f"left out, as the network is whole without: {count}"
    assert others == (["its linear layer model.fc taken for head.fc"] if layer == "fc" else [])


@pytest.mark.parametrize("names", [("", "{}.1"), ("backbone.", "fc"), ("net.", "fc.1"), ("0.", "2")])
def test_a_single_linear_layer_that_is_left_over_is_the_head(key, weights, names):
    head, (backbone, layer) = FAMILIES[key].head, names
    layer = layer.format(head)
    moved = with_head(weights, backbone, head, layer)
    if layer == "2":  # Sequential(network, Dropout, Linear(bias=False))
        weights[f"{head}.bias"] = torch.zeros_like(moved.pop("2.bias"))
    found, notes = taken({"state_dict": moved}, key)
    assert are_same(found, weights) and notes == [f"its linear layer {layer} taken for {head}"]


HEADS = [
    {"head.fc.0": (64, 320), "head.fc.3": (2, 64)}, {"norm": (320,), "fc": (2, 320)}, {"fc": (2, 640)},
    {"attention": (320, 320), "fc": (2, 320)}, {},
]  # fmt: skip


@pytest.mark.parametrize("layers", HEADS)
def test_a_head_of_other_layers_is_refused(weights, layers):
    body = {name: tensor for name, tensor in weights.items() if not name.startswith("head.fc.")}
    held = f"{len(layers)} ({', '.join(layers)})" if layers else "none"
    words = f"holds {held} for head.fc, not one linear layer of 320 inputs; train one"
    with pytest.raises(tool.ExplainError, match=re.escape(words)):
        taken(body | {f"{name}.weight": torch.ones(shape) for name, shape in layers.items()})


@pytest.mark.parametrize(
    ("kind", "large", "bad"),
    [("float16", 6e4, -math.inf), ("bfloat16", 3e38, math.nan), ("float64", 3e38, 1e300)],
)
def test_other_precisions_are_computed_in_float32(checkpoint, weights, tmp_path, kind, large, bad):
    name = "stages.2.blocks.0.mlp.fc1.weight"
    weights[name] = weights[name].to(getattr(torch, kind), copy=True)
    weights[name][3, 3:6] = large  # whose sum is infinite
    classifier = load(save(checkpoint, tmp_path / "x.pth"))
    assert are_same(classifier.network.state_dict(), {**weights, name: weights[name].float()})
    assert classifier.model.notes == (*ASSUMED, f"{kind} weights computed in float32")
    weights[name][3, 5] = bad
    refused(save(checkpoint, tmp_path / "x.pth"), f"NaN or infinite weights in 1 ({name})")


def test_safetensors_with_metadata(checkpoint, weights, tmp_path):
    config, path = json.dumps(checkpoint["config"]), tmp_path / "convnext.safetensors"
    metadata = {"format": "pt", "config": config, "val_acc": "97.5", "class_names": '["a", "b"]'}
    save_file(weights, path, metadata)
    classifier = load(path)
    assert is_loaded(classifier, weights)
    assert classifier.model.class_names == ("a", "b")
    assert classifier.model.accuracy == "Validation accuracy: 97.50%"
    save_file(weights, path, {"config": '{"model_name": "hf-hub:a/b"}'})
    refused(path, "hf-hub:a/b")


class Bomb:
    """Touches a file when it is unpickled without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


@pytest.mark.parametrize("container", ["zip", "old", "plain pickle"])
def test_code_in_a_checkpoint_is_never_run(tmp_path, monkeypatch, container):
    monkeypatch.chdir(tmp_path)
    if container == "plain pickle":
        X.write_bytes(pickle.dumps({"extra": Bomb()}))
    else:
        torch.save({"extra": Bomb()}, X, _use_new_zipfile_serialization=container == "zip")
    refused(X, "not written by torch.save" if container == "plain pickle" else "none is run")
    assert not Path("ran").exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert Path("ran").exists()  # so it would have gone off


HARMLESS = {
    "args": argparse.Namespace(lr=0.1, output=Path("/data/run")), "day": datetime.date(2026, 1, 2),
    "config": {"root": Path("a/b"), "windows": PureWindowsPath("c:/x"), "posix": PurePosixPath("/x")},
    "started": datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.timezone.utc), "best": np.bool_(True),
    "took": datetime.timedelta(hours=3), "history": defaultdict(list, loss=[np.float32(0.5), np.float64(2)]),
    "confusion": np.arange(4).reshape(2, 2), "names": np.array(["a", "b"]), "weight": torch.ones(2),
    "counts": Counter("aab"), "size": torch.Size([2]), "classes": np.array(["a", "b"], dtype=object),
    "sums": [defaultdict(float, loss=0.5), defaultdict(int), defaultdict(dict)],
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
def test_what_trainers_save_beside_the_weights_is_harmless(tmp_path, zipped):
    torch.save(HARMLESS, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    contents = tool.read_checkpoint(tmp_path / "x.pth")
    assert contents["history"] == {"loss": [0.5, 2]} and contents["started"] == HARMLESS["started"]
    assert contents["args"].output == PurePosixPath("/data/run") and contents["names"].tolist() == ["a", "b"]
    assert contents["classes"].tolist() == ["a", "b"] and contents["sums"] == [{"loss": 0.5}, {}, {}]
    assert contents["confusion"].tolist() == [[0, 1], [2, 3]]


def save_naming(name: str, value: object, path: Path) -> Path:
    """A checkpoint of a path or a number of NumPy, whose type has another name in the file."""
    torch.save({"val_acc": value}, path, _use_new_zipfile_serialization=False)
    own = b"cnumpy._core.multiarray\nscalar\n" if isinstance(value, float) else b"cpathlib\nPurePosixPath\n"
    assert own in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(own, "c{}\n{}\n".format(*name.split()).encode()))
    return path


def test_harmless_types_of_other_systems_and_versions_load(tmp_path):
    for name in ("pathlib WindowsPath", "pathlib._local PosixPath", "pathlib._local WindowsPath"):
        (path,) = tool.read_checkpoint(save_naming(name, PurePosixPath("a"), tmp_path / "x.pth")).values()
        assert path == (PureWindowsPath("a") if "Windows" in name else PurePosixPath("a"))
    path = save_naming("numpy.core.multiarray scalar", np.float64(1), tmp_path / "x.pth")
    assert tool.read_checkpoint(path) == {"val_acc": 1}


@pytest.mark.parametrize("tag", ["", ".of_another_timm"])
def test_a_checkpoint_of_timms_trainer_loads(key, weights, tmp_path, tag):
    name, given = TINY[key] + tag, {"img_size": 256, "std": HALF, "mean": None, "interpolation": ""}
    contents = {"arch": name, "state_dict": weights, "args": argparse.Namespace(**given), "optimizer": {}}
    classifier = load(save(contents, tmp_path / "timm.pth"), key)
    usual = timm.get_pretrained_cfg(TINY[key])  # what timm's trainer takes where it is given nothing
    assert classifier.model.architecture == name
    assert classifier.model.preprocessing == tool.Preprocessing(256, usual.mean, HALF, usual.interpolation)
    assert "crop_pct 0.875" in classifier.model.notes[-1]


def test_a_checkpoint_of_lightning_is_found_by_its_suffix_and_loads(weights, tmp_path):
    weights["head.fc.weight"], weights["head.fc.bias"] = torch.ones(3, 320), torch.ones(3)
    names = ["simple", "no_fracture", "comminuted"]
    contents = {
        "state_dict": prefixed("model.", weights), "epoch": 3, "pytorch-lightning_version": "2.4",
        "callbacks": {"ModelCheckpoint{'monitor': 'val'}": {"best_model_score": torch.tensor(0.9)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}], "optimizer": {"exp_avg": weights},
        "hyper_parameters": {"model_name": "convnextv2_atto", "class_names": names},
    }  # fmt: skip
    path = save(contents, tmp_path / "convnext.ckpt")
    classifier = load(path)
    assert is_loaded(classifier, weights)
    assert classifier.model.class_names == ("Simple Fracture", "no_fracture", "Comminuted Fracture")
    assert classifier.model.notes == ()
    for suffix in (".ckpt", ".bin", ".pth.tar", ".safetensors"):
        path = path.rename(tmp_path / f"convnext{suffix}")
        assert tool.find_checkpoint(CONVNEXT, tmp_path) == path


TRANSFORMERS = {
    "architectures": ["TimmWrapperForImageClassification"], "model_type": "timm_wrapper", "num_classes": 2,
    "architecture": "convnextv2_atto.fcmae", "label_names": ["simple", "comminuted"],
    "id2label": {"0": "simple", "1": "comminuted"}, "label2id": {"simple": 0, "comminuted": 1},
    "pretrained_cfg": {"input_size": [3, 96, 96], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
                       "interpolation": "bicubic", "crop_pct": 0.9, "num_classes": 1000},
}  # fmt: skip


def with_config(folder: Path, **changed: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**TRANSFORMERS, **changed}))
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_hubs_or_trainers_folder_loads(weights, tmp_path, name):
    folder = with_config(tmp_path / "convnext_run")
    write = torch.save if name.endswith("bin") else save_file
    write(prefixed("timm_model.", weights), folder / name)
    torch.save({}, folder / "training_args.bin")
    for path in (folder, folder / name):
        classifier = load(path)
        assert is_loaded(classifier, weights)
        model = classifier.model
        assert (model.checkpoint, model.architecture) == (folder / name, "convnextv2_atto.fcmae")
        assert model.class_names == REVERSED
        assert model.preprocessing == tool.Preprocessing(96, HALF, HALF, "bicubic")
        assert "crop_pct 0.9" in classifier.model.notes[-1]
    assert tool.find_checkpoint(CONVNEXT, tmp_path) == folder / name


def test_a_folder_of_timm_itself_loads(weights, tmp_path):
    hub = pytest.importorskip("timm.models._hub")
    network = timm.create_model("convnextv2_atto", num_classes=2)
    network.load_state_dict(weights)
    labels = {"label_names": ["simple", "comminuted"]}
    hub.save_for_hf(network, tmp_path / "hub", model_config=labels, safe_serialization=True)
    classifier = load(tmp_path / "hub")
    assert is_loaded(classifier, weights) and classifier.model.class_names == REVERSED
    assert classifier.model.preprocessing.interpolation == "bicubic"
    assert "crop_pct 0.875" in classifier.model.notes[-1]


def test_a_config_beside_counts_only_for_its_own_network(key, weights, tmp_path):
    (other,) = set(TINY) - {key}
    path = save(weights, with_config(tmp_path / "run", architecture=TINY[other]) / "x.pth")
    assert load(path, key).model.class_names == tool.CLASS_NAMES
    with_config(tmp_path / "run", architecture=TINY[key])
    assert load(path, key).model.class_names == REVERSED
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(tool.ExplainError, match=r"config\.json: not what a hub or Trainer writes"):
        load(path, key)


ORDERS = {
    "class_names": ["simple_fracture", "comminuted_fracture"], "classes": ["simple", "comminuted"],
    "class_to_idx": {"comminuted": 1, "simple": 0}, "label2id": {"Simple": 0, "Comminuted": 1},
    "id2label": {"1": "Comminuted Fracture", "0": "Simple Fracture"}, "names": {1: "comminuted", 0: "simple"},
    "idx_to_class": {"1": "comminuted", "0": "simple"}, "label_names": ("Simple Fracture", "comminuted"),
    "labels": np.array(["simple", "comminuted"]),
}  # fmt: skip
PLACES = ["", "config", "args", "hyper_parameters", "meta.dataset_meta", "config.pretrained_cfg", "cfg.opt",
          "metadata.data_config"]  # fmt: skip


def names_of(record: dict[str, Any], outputs: int = 2, *given: str) -> tuple[tuple[str, ...], list[str]]:
    return tool.class_names_of(record, outputs, given, X)


@pytest.mark.parametrize("name", ORDERS)
def test_a_recorded_order_of_the_classes_counts(name):
    for place in PLACES:
        record = {name: ORDERS[name]}
        for part in filter(None, reversed(place.split("."))):
            record = {part: argparse.Namespace(**record) if part == "args" else record}
        assert names_of(record) == (REVERSED, [])


A_TO_L = tuple(f"kind {letter}" for letter in "abcdefghijkl")
NO_NAMES = (
    {}, {"id2label": {0: "LABEL_0", 1: "LABEL_1"}}, {"class_to_idx": {"0": 0, "1": 1}}, {"classes": 2},
    {"labels": torch.zeros(9)}, {"names": "fractures"}, {"label2id": {"a": 0, "b": 7}},
)  # fmt: skip


@pytest.mark.parametrize(
    ("record", "asked", "expected"),
    [
        *(({"config": record}, (2,), (tool.CLASS_NAMES, [*ASSUMED])) for record in NO_NAMES),
        ({}, (2, "simple_fracture", "Comminuted"), (REVERSED, [])),
        ({"class_names": ["a", "b"]}, (2, "A", "b"), (("a", "b"), [])),
        ({"label_names": ["a", "b", "c"]}, (2, "x", "y"), (("x", "y"), [])),
        ({"class_names": ["comminuted", "no_fracture", "simple"], "num_classes": 1000}, (3,),
         (("Comminuted Fracture", "no_fracture", "Simple Fracture"), [])),
        ({"class_names": ["simple", "Simple Fracture", "x"]}, (3,), (("simple", "Simple Fracture", "x"), [])),
        ({"id2label": {str(index): A_TO_L[index] for index in reversed(range(12))}}, (12,), (A_TO_L, [])),
        ({"classes": ["simple", "comminuted"], "label_names": ["a", "b", "c"]}, (1,),
         (REVERSED, ["one output: its sigmoid is the probability of Comminuted Fracture"])),
    ],
)  # fmt: skip
def test_names_of_the_classes(record, asked, expected):
    assert names_of(record, *asked) == expected


@pytest.mark.parametrize(
    ("record", "asked", "words"),
    [
        ({"classes": ["simple", "comminuted"], "config": {"id2label": {0: "comminuted", 1: "simple"}}}, (2,),
         "is unclear: classes says Simple .*, Comm.* and id2label says Comm.*, Simple .*; correct the file"),
        ({"class_names": ["a", "b"], "config": {"class_names": ["b", "a"]}}, (2,),
         "is unclear: class_names says a, b and class_names says b, a; correct the file"),
        ({"class_names": ["a", "b"]}, (2, "b", "a"),
         "class_names says a, b and --class-names says b, a; leave --class-names out"),
        ({}, (3,), r"head has 3 outputs for 3 classes, but the class names are 2 \(Comminuted Frac"),
        ({}, (2, "a", "b", "c"), r"head has 2 outputs for 2 classes, but the class names are 3 \(a, "),
        ({}, (1, "a"), r"head has 1 outputs for 2 classes, but the class names are 1 \(a\)"),
        *(({"class_names": bad}, (2,), "class_names is .*, not a list of 2 to 100 different names; correct")
          for bad in ("ab", [], ["a"], ["a", "A "], ["a", " "], ["a", 1], 7)),
    ],
)  # fmt: skip
def test_names_that_do_not_tell_the_classes_are_refused(record, asked, words):
    with pytest.raises(tool.ExplainError, match=words):
        names_of(record, *asked)


def picture(*shape: int) -> tool.Radiograph:
    """Noise of H x W pixels, grey where it is not H x W x 3."""
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
    plain = timm.create_model(TINY[key], num_classes=2, in_chans=1).eval()
    contents = {"model": plain.state_dict(), "config": {"model_name": TINY[key], **normalised}}
    classifier = load(save(contents, tmp_path / "grey.pth"), key)
    usual = {"mean": tool.IMAGENET_MEAN, "std": tool.IMAGENET_STD}
    mean, std = (np.mean(values) for values in {**usual, **normalised}.values())
    assert "grey" in classifier.model.notes[1] and f"mean ({mean:.4g}" in classifier.model.notes[2]
    for radiograph in (picture(100, 60), picture(70, 90, 3)):
        luminance = radiograph.squashed(224).astype(float) @ [0.299, 0.587, 0.114] / 255
        with torch.no_grad():
            logits = plain(torch.from_numpy((luminance - mean) / std).float()[None, None])
        (found,) = explain(classifier, [radiograph])
        np.testing.assert_allclose(found.probabilities, logits.softmax(dim=1)[0].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "wanted", "values"),
    [
        ("img_size", "one number of pixels from 64 to 1024",
         [0, 63, 1025, 224.0, "224", True, [224, 256], {}, torch.ones(2)]),
        ("mean", "three numbers from 0 to 1",
         [0.5, [0.5] * 4, ["a"] * 3, [float("nan")] * 3, [123.7, 116.3, 103.5], torch.ones(2)]),
        ("std", "three numbers from 0.001 to 1", [[0, 0.2, 0.2], [-1, 0.5, 0.5], {}, np.array(["a"] * 3)]),
    ],
)  # fmt: skip
def test_unusable_records_are_refused(name, wanted, values):
    for value in values:
        with pytest.raises(tool.ExplainError, match=f"x: {name} is .*, not {wanted}.*; correct {name} in"):
            tool.preprocessing_of({"config": {name: value}}, False, X)


@pytest.mark.parametrize(
    ("recorded", "expected", "words"),
    [
        ({"mean": (0.5, 0, 0.25), "config": {"std": [0.25, 0.5, 1]}},
         (224, (0.5, 0.0, 0.25), (0.25, 0.5, 1.0)), "mean (0.5, 0.0, 0.25), std (0.25, 0.5, 1.0)"),
        ({"mean": torch.tensor(tool.IMAGENET_MEAN).view(1, 3, 1, 1), "config": {"std": np.array(HALF)}},
         (224, tool.IMAGENET_MEAN, HALF), "std (0.5, 0.5, 0.5)"),
        ({"config": {"img_size": 64}}, (64,), "64 pixels"),
        ({"config": {"img_size": [300, 300]}}, (300,), "300 pixels"),
        ({"hparams": {"image_size": 96, "mean": [0.5], "std": [0.5]}}, (96, HALF, HALF), "96 pixels"),
        ({"pretrained_cfg": {"input_size": (3, 288, 288)}}, (288,), "288 pixels"),
        ({"interpolation": "bicubic"}, (224, tool.IMAGENET_MEAN, tool.IMAGENET_STD, "bicubic"), "bicubic"),
        ({"args": argparse.Namespace(interpolation="random", img_size=None)}, (), ""),
        ({"pretrained_cfg": {"crop_pct": 0.875}}, (), "crop_pct 0.875"),
        ({"pretrained_cfg": {"crop_pct": 1.0, "crop_mode": "center"}}, (), "crop_pct 1.0"),
        ({"pretrained_cfg": {"crop_pct": 1.0, "crop_mode": "squash", "num_classes": 1000}}, (), ""),
    ],
)  # fmt: skip
def test_recorded_preprocessing_is_done_or_told(recorded, expected, words):
    preprocessing, notes = tool.preprocessing_of(recorded, False, X)
    assert preprocessing == tool.Preprocessing(*expected)
    assert words in "".join(notes) and bool(words) == bool(notes)


def test_the_recorded_interpolation_makes_the_input():
    radiograph = picture(300, 100)
    for name in ("bicubic", "bilinear", "nearest"):
        seen = tool.network_input(radiograph, tool.Preprocessing(64, (0.0,) * 3, (1.0,) * 3, name))
        filtered = Image.fromarray(radiograph.pixels).resize((64, 64), Image.Resampling[name.upper()])
        assert np.array_equal(np.rint(seen * 255), np.asarray(filtered).transpose(2, 0, 1))


def test_accuracy_is_named_as_the_file_names_it():
    assert tool.accuracy_text({"val_acc": 99.16}) == "Validation accuracy: 99.16%"
    assert tool.accuracy_text({"test_acc": torch.tensor(97), "val_acc": 99.16}) == "Test accuracy: 97.00%"
    assert tool.accuracy_text({"val_acc": 0.9832}) == "Validation accuracy: 0.9832 as recorded"
    for bad in (float("nan"), -1, 101, "99", None, True):
        assert tool.accuracy_text({"val_acc": bad}) == "Accuracy: not recorded in the checkpoint"


def test_weights_that_do_not_fit_are_named_with_both_sides(checkpoint, weights, tmp_path):
    weights["stem.my_0\n"] = weights.pop("stem.0.weight")
    weights["head.fc.bias"] = weights["head.fc.bias"].int()
    refused(
        save(checkpoint, tmp_path / "x.pth"),
        "its 140 weights do not fit the 140 of convnextv2_atto: 3 (stem.0.weight is missing in the file, ",
        "head.fc.bias is (2,) torch.int32 in the file, (2,) torch.float32 in the network, ",
        "stem.my_0\\n is (40, 3, 4, 4) torch.float32 in the file, missing in the network); give a file",
    )
    del weights["stages.3.blocks.0.norm.weight"]
    refused(save(checkpoint, tmp_path / "x.pth"), "its 139 weights do not fit the 140", ": 4 (", ", …)")


def test_the_family_is_told_by_its_keys_and_the_size_by_record_or_shapes(key, checkpoint, tmp_path):
    path, (other,) = tmp_path / "x.pth", set(TINY) - {key}
    refused(save(checkpoint, path), f"of the {key} family", f"--{key}-checkpoint", key=other)
    larger = {"convnext": "convnextv2_femto", "efficientnet": "tf_efficientnetv2_b1"}[key]
    checkpoint["config"]["model_name"] = larger
    refused(save(checkpoint, path), "weights do not fit the", f"of {larger}: ", key=key)
    del checkpoint["config"]
    assert load(save(checkpoint, path), key).model.architecture == TINY[key]


@pytest.mark.slow
def test_every_size_of_timm_is_told_by_its_shapes():
    sizes = {"convnext": "atto femto pico nano tiny small base large huge"}
    sizes["efficientnet"] = "s m l xl b0 b1 b2 b3"
    for key, family in FAMILIES.items():
        for size in sizes[key].split():
            name = TINY[key].rpartition("_")[0] + f"_{size}"
            weights = tool.build_network(name, 2).state_dict()
            assert tool.architecture_of(family, {}, weights, X).partition(".")[0] == name
            assert tool.architecture_of(family, {"arch": name}, {}, X) == name
            assert {family.landmark, f"{family.head}.weight"} <= weights.keys()


def test_a_foreign_network_name_is_refused():
    paths = ["hf-hub:timm/convnextv2_atto", "local-dir:/tmp", "convnextv2_atto/../x", "convnextv2_atto\n"]
    for name in (*paths, "resnet18", "tf_efficientnetv2_b0", 7):
        with pytest.raises(tool.ExplainError, match="records the network .* not of the family .*timm name"):
            tool.architecture_of(CONVNEXT, {"config": {"model_name": name}}, {}, X)


def test_counters_of_batches_do_not_matter(pristine):
    weights = pristine["efficientnet"]["model_state_dict"]
    counters = [name for name in weights if name.endswith("num_batches_tracked")]
    averaged = {name: weights[name] * 0.5 for name in counters}
    missing = {name: tensor for name, tensor in weights.items() if name not in counters}
    for given in (weights | averaged, missing):
        network = tool.network_of(FAMILIES["efficientnet"], TINY["efficientnet"], given, X)
        assert network(torch.zeros(1, 3, 64, 64)).isfinite().all()


def with_lora(weights: Weights) -> Weights:
    layer = "stages.3.blocks.0.mlp.fc1"
    base = {name.replace(layer, f"{layer}.base_layer"): tensor for name, tensor in weights.items()}
    return prefixed("base_model.model.", base | {f"{layer}.lora_A.default.weight": torch.ones(4, 320)})


def of_fastai(weights: Weights) -> Weights:
    body = {name: tensor for name, tensor in weights.items() if "head.fc" not in name}
    head = {"1.2": torch.ones(640), "1.4": torch.ones(512, 640), "1.8": torch.ones(2, 512)}
    return prefixed("0.model.", body) | {f"{name}.weight": tensor for name, tensor in head.items()}


PEFT, FSDP = ("PEFT", "merge_and_unload()"), ("FSDP", "dcp_to_torch")
DEEPSPEED = ("DeepSpeed", "zero_to_fp32.py")
NO_DICTIONARY, NO_NETWORK = "not a dictionary of weights", "another network, or none"
OTHERS = {
    "PEFT": (with_lora, PEFT),
    "loralib": (lambda weights: {**weights, "stages.3.blocks.0.mlp.fc1.lora_A": torch.ones(4, 320)}, PEFT),
    "adapter alone": (lambda weights: {"base_model.model.head.fc.ia3_l": torch.ones(4, 320)}, PEFT),
    "ZeRO 3": (lambda weights: {"module": dict.fromkeys(weights, torch.empty(0))}, DEEPSPEED),
    "ZeRO shard": (lambda weights: {"optimizer_state_dict": {"zero_stage": 2}, "ds_config": {}}, DEEPSPEED),
    "quantised": (lambda weights: {"head.fc._packed_params._packed_params": torch.ones(2)}, ("quantised",)),
    "quantised in part": (lambda weights: {**weights, "head.fc.zero_point": torch.ones(1)}, ("quantised",)),
    "pruned": (lambda weights: {**weights, "stem.0.weight_mask": torch.ones(1)}, ("pruned", "prune.remove")),
    "fastai": (of_fastai, ("holds 2 (1.4, 1.8) for head.fc, not one linear layer", "no other head")),
    "a network": (lambda weights: torch.nn.Sequential(), ("container.Sequential", "none is run")),
    "a network inside": (lambda weights: {"model": torch.nn.Linear(2, 2)}, ("linear.Linear", "state_dict()")),
    "a list": (lambda weights: [1], (NO_DICTIONARY, "a list")),
    "a text": (lambda weights: "x\n", (NO_DICTIONARY, r"'x\n'")),
    "nothing": (lambda weights: {"epoch": 3, "model": {}}, (NO_NETWORK, "0 weights", "convnextv2_*")),
    "another": (lambda weights: {"model": {"conv1.weight": torch.ones(3)}},
                (NO_NETWORK, "1 weights", "convnextv2_* or tf_efficientnetv2_*")),
    "Learner": ("fastai.learner Learner", ("a Learner of fastai", "learn.model.state_dict()")),
    "DTensor": ("torch.distributed.tensor._api DTensor", FSDP),
    "Linear": ("torch.ao.nn.quantized.modules.linear Linear", ("quantised",)),
    "ZeRO": ("deepspeed.runtime.zero.config ZeroStageEnum", DEEPSPEED),
    "Lightning": ("pytorch_lightning.callbacks ModelCheckpoint", ("Lightning", "['state_dict']")),
    "their own": ("__main__ FractureNet", ("whole network", "__main__.FractureNet", "none is run")),
    "an adapter": (["adapter_model.bin"], PEFT),
    "PEFT folder": (["adapter_config.json", "adapter_model.safetensors"], PEFT),
    "shard": (["zero_pp_rank_0_mp_rank_00_optim_states.pt"], DEEPSPEED),
    "ZeRO folder": (["zero_to_fp32.py", "latest"], DEEPSPEED),
    "FSDP folder": ([".metadata", "__0_0.distcp"], FSDP),
    "TensorFlow": (["saved_model.pb", "variables"], ("a folder with 0 files of weights", "name the file")),
    "two files": (["a.pth", "b.pth"], ("a folder with 2 files of weights", "name the file")),
    "text": (b"<html><body>404</body></html>", ("a text file", "torch.save")),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid", ("Git LFS pointer", "git lfs pull")),
    "HDF5": (b"\x89HDF\r\n", ("an HDF5 file, as of Keras", "PyTorch")),
    "zip": (b"PK\x03\x04" + bytes(60), ("damaged", "copy or download")),
    "pickle": (b"\x80\x02", ("damaged",)),
    "safetensors": ((20).to_bytes(8, "little") + b'{"a":', ("damaged",)),
    "large safetensors": ((90_000_000).to_bytes(8, "little") + b'{"a":', ("damaged",)),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_plain_checkpoint_is_named_with_what_helps(weights, tmp_path, kind):
    what, words = OTHERS[kind]
    path = tmp_path / "x.pth"
    if isinstance(what, bytes):
        path.write_bytes(what)
    elif isinstance(what, str):
        save_naming(what, PurePosixPath("x"), path)
    elif isinstance(what, list):
        for name in what:
            (tmp_path / name).touch()
        path = tmp_path if len(what) > 1 else tmp_path / what[0]
    else:
        save(what(weights), path)
    assert "timm name" not in refused(path, *words)


def test_archives_of_others_are_refused(tmp_path):
    for name, words in (("weights.h5", "not of PyTorch but of Keras"), ("x/constants.pkl", "TorchScript")):
        with zipfile.ZipFile(tmp_path / "x.pth", "w") as file:
            file.writestr(name, b"x")
        refused(tmp_path / "x.pth", words)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_checkpoint_is_refused(checkpoint, tmp_path, zipped):
    path = tmp_path / "half.pth"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    size = path.stat().st_size
    for share in (0.999, 0.9, 0.5, 0.1):
        os.truncate(path, int(size * share))
        refused(path, "damaged", "copy or download")


def test_an_archive_whose_list_of_files_is_damaged_is_refused(checkpoint, tmp_path):
    path = save(checkpoint, tmp_path / "x.pth")
    path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"PK\x01\xff"))
    refused(path, "damaged", "copy or download")


def test_lack_of_memory_is_not_taken_for_a_damaged_file(tiny_checkpoints, monkeypatch, capsys, xray):
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "load", exhausted)
    path = tiny_checkpoints["convnext"]
    options = ["--model=convnext", f"--convnext-checkpoint={path}", "--device=cpu"]
    assert tool.main(["--image", str(xray), *options]) == 1
    assert "memory: not enough" in capsys.readouterr().err

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
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import TINY, explain, save, users_checkpoint
from PIL import Image

import explainability as tool

@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail("tried to reach the network")

    monkeypatch.setattr(socket, "socket", refuse)


@pytest.fixture(params=TINY)
def key(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pristine() -> dict[str, dict[str, Any]]:
    return {key: users_checkpoint(name) for key, name in TINY.items()}


@pytest.fixture
def checkpoint(pristine: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A ConvNeXt V2 checkpoint that a test may change: its dictionaries are copies."""
    return copied(pristine["convnext"])


@pytest.fixture
def stub(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The same with few weights, and so quick to save: for what is refused before weights are compared."""
    weights, family = checkpoint["model_state_dict"], tool.FAMILIES["convnext"]
    kept = ("head.", family.landmark, family.width, family.stem)
    checkpoint["model_state_dict"] = {name: tensor.clone() for name, tensor in weights.items() if name.startswith(kept)}
    return checkpoint


def copied(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return {key: dict(value) if isinstance(value, dict) else value for key, value in checkpoint.items()}


def load(path: Path, key: str = "convnext") -> tool.Classifier:
    return tool.load_classifier(tool.FAMILIES[key], path, "cpu")


def told(classifier: tool.Classifier) -> tuple[str, ...]:
    """The notes on what was done in loading, but for the classes' order, which few files record."""
    return tuple(note for note in classifier.model.notes if not note.startswith("class order assumed"))


def refused(path: Path, *words: str, key: str = "convnext") -> str:
    """Loading must fail with one line that names the path and holds the words."""
    with pytest.raises(tool.ExplainError) as caught:
        load(path, key)
    return one_line(caught.value, path, *words)


def one_line(error: Exception, path: Path, *words: str) -> str:
    text = str(error)
    assert text.startswith(tool.shown(path) + ": ") and "; " in text
    assert text.isprintable() and len(text) < 1200
    assert "weights_only" not in text
    for word in words:
        assert word in text
    return text


def assert_same_weights(classifier: tool.Classifier, weights: dict[str, torch.Tensor]) -> None:
    loaded = classifier.network.state_dict()
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        expected = tensor.float() if tensor.is_floating_point() else tensor
        assert loaded[name].dtype == expected.dtype
        assert torch.equal(loaded[name], expected), name


# ------------------------------------------------------------------------------------------
# What loads
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["zip", "old"])
def test_loads_users_checkpoint_exactly(key: str, pristine: dict[str, Any], tmp_path: Path, container: str) -> None:
    path = tmp_path / "best.pth"
    torch.save(pristine[key], path, _use_new_zipfile_serialization=container == "zip")
    before = torch.get_rng_state()
    classifier = load(path, key)
    assert torch.equal(torch.get_rng_state(), before)  # no random numbers are drawn
    assert_same_weights(classifier, pristine[key]["model_state_dict"])
    assert classifier.model.architecture == TINY[key]
    assert classifier.model.accuracy == "Validation accuracy: 98.32%"
    assert classifier.model.class_names == tool.CLASS_NAMES
    assert classifier.model.preprocessing == tool.Preprocessing()
    assert told(classifier) == ()
    assert not classifier.network.training
    tensors = [*classifier.network.parameters(), *classifier.network.buffers()]
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in tensors)
    classifier.network(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "net.backbone.", "timm_model."])
def test_wrapper_prefixes_are_removed(key: str, pristine: dict[str, Any], prefix: str) -> None:
    weights = pristine[key]["model_state_dict"]
    found, notes = taken({"model_state_dict": {prefix + name: tensor for name, tensor in weights.items()}}, key)
    assert are_same(found, weights) and notes == []


def taken(contents: dict[Any, Any], key: str = "convnext", wanted: str = "ema") -> tuple[dict[str, torch.Tensor], list[str]]:
    """Weights and notes from the contents of a file, without one: for what is found before a network is built."""
    return tool.weights_of(tool.FAMILIES[key], contents, wanted, Path("x.pth"))


def are_same(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)


AVERAGED = ["state_dict_ema", "model_ema", "ema_state_dict", "ema", "swa_model", "averaged_model"]


@pytest.mark.parametrize("place", ["state_dict", "model", "net", "module", "weights", "the top level", *AVERAGED])
def test_weights_are_found_wherever_trainers_put_them(checkpoint: dict[str, Any], place: str) -> None:
    weights = checkpoint.pop("model_state_dict")
    inside = weights if place == "the top level" else {place: weights}
    found, notes = taken({"model": "convnextv2_atto", **checkpoint, **inside, "epoch": 3})
    assert are_same(found, weights)
    only = f"averaged (EMA) weights taken from {place}, the only ones in the file"
    assert notes == ([only] if place in AVERAGED else [])


def shifted(weights: dict[str, torch.Tensor], by: float = 1) -> dict[str, torch.Tensor]:
    return {name: tensor + by for name, tensor in weights.items()}


@pytest.mark.parametrize(("place", "inner"), [*((place, "") for place in AVERAGED), ("ema", "state_dict"), ("callbacks", "EMA")])
def test_averaged_weights_go_before_plain_ones(checkpoint: dict[str, Any], place: str, inner: str) -> None:
    plain = checkpoint["model_state_dict"]
    averaged = {f"module.{name}": tensor for name, tensor in shifted(plain).items()}
    contents = {place: {inner: averaged} if inner else averaged, **checkpoint}
    name = f"{place}.{inner}, module.*" if inner else f"{place}, module.*"
    weights, notes = taken(contents)
    assert are_same(weights, shifted(plain))
    assert notes == [f"averaged (EMA) weights taken from {name}, not from model_state_dict; --weights plain takes others"]
    weights, notes = taken(contents, wanted="plain")
    assert are_same(weights, plain)
    assert notes == [f"weights taken from model_state_dict, not from {name}; --weights ema takes others"]


def test_averaged_weights_beside_plain_ones_in_one_dictionary(checkpoint: dict[str, Any]) -> None:
    plain = checkpoint.pop("model_state_dict")
    both = {f"model.{name}": tensor for name, tensor in plain.items()} | {f"ema_model.{name}": tensor for name, tensor in shifted(plain).items()}
    for wanted, expected in (("ema", shifted(plain)), ("plain", plain)):
        weights, notes = taken({"state_dict": both, **checkpoint}, wanted=wanted)
        assert are_same(weights, expected) and "--weights" in notes[0] and len(notes) == 1


def test_the_command_line_names_folders_and_chooses_weights(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    plain = checkpoint["model_state_dict"]
    path = save({**checkpoint, "state_dict_ema": shifted(plain)}, tmp_path / "best.pth.tar")
    args = tool.parsed(["--model=convnext", f"--convnext-checkpoint={tmp_path}"])
    checkpoints, _ = tool.chosen_checkpoints(args)
    assert args.weights == "ema" and checkpoints == [(tool.FAMILIES["convnext"], path)]
    for wanted in ("ema", "plain"):
        request = tool.Request((), True, tuple(checkpoints), ("gradcam",), tool.FigureStyle())
        args = tool.parsed(["--device=cpu", f"--weights={wanted}", "--quiet"])
        (classifier,) = tool.load_classifiers(request, args)
        assert_same_weights(classifier, plain if wanted == "plain" else shifted(plain))


def test_averaged_weights_without_keys_are_told(checkpoint: dict[str, Any]) -> None:
    weights = checkpoint["model_state_dict"]
    found, notes = taken({**checkpoint, "ema": {"decay": 0.9, "shadow_params": [*weights.values()]}})
    assert are_same(found, weights) and notes == ["averaged weights under ema have no keys and are not used"]


def test_of_several_sets_of_weights_the_usual_place_counts_else_none(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    weights = checkpoint["model_state_dict"]
    classifier = load(save({"net": shifted(weights), "last": shifted(weights), **checkpoint}, tmp_path / "x.pth"))
    assert_same_weights(classifier, weights)
    assert told(classifier) == ("weights taken from model_state_dict, not from net, last",)
    for contents, words in (
        ({"first": weights, "second": shifted(weights)}, "more than once \\(first and second\\)"),
        ({**weights, **{f"model.{name}": tensor for name, tensor in weights.items()}}, "more than once .*the top level, model"),
    ):
        with pytest.raises(tool.ExplainError, match=words):
            taken(contents)


BESIDE = {
    "criterion.pos_weight": torch.ones(2), "loss_fn.weight": torch.ones(2), "metrics.confusion": torch.ones(2, 2),
    "train_acc.tp": torch.zeros(2), "model.total_ops": torch.zeros(1), "model.stages.0.total_params": torch.zeros(1),
    "ema.decay": torch.ones(()), "class_weights": torch.ones(2), "center_loss.weight": torch.ones(2, 320),
    "projector.weight": torch.ones(8, 320),
}  # fmt: skip


@pytest.mark.parametrize("head", ["", "model.fc."])
def test_what_lies_beside_the_network_is_left_out_with_a_note(checkpoint: dict[str, Any], tmp_path: Path, head: str) -> None:
    weights = checkpoint.pop("model_state_dict")
    prefix = "model.backbone." if head else "model."
    own = {prefix + name: tensor for name, tensor in weights.items()}
    if head:
        own = {name.replace(f"{prefix}head.fc.", head): tensor for name, tensor in own.items()}
    teacher = {name.replace("model.", "teacher.", 1): tensor + 1 for name, tensor in own.items()}
    classifier = load(save({"state_dict": {**own, **BESIDE, **teacher}, "hyper_parameters": checkpoint["config"]}, tmp_path / "x.ckpt"))
    assert_same_weights(classifier, weights)
    assert f"left out, as the network is whole without: {len(BESIDE) + (2 if head else 0)} (criterion.pos_weight" in "".join(told(classifier))
    assert ("its linear layer model.fc taken for head.fc" in told(classifier)) == bool(head)


HEADS = {
    "Sequential(Dropout, Linear)": {"head.fc": "head.fc.1", "classifier": "classifier.1"},
    "backbone and fc": {"head.fc": "../fc", "classifier": "../fc"},
    "backbone and classifier": {"head.fc": "../classifier.1", "classifier": "../classifier.1"},
    "Sequential(network, Dropout, Linear)": {"head.fc": "../2", "classifier": "../2"},
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_single_linear_layer_that_is_left_over_is_the_head(key: str, pristine: dict[str, Any], kind: str) -> None:
    weights = pristine[key]["model_state_dict"]
    head = tool.FAMILIES[key].head
    layer = HEADS[kind][head]
    prefix = {"S": "0." if "network" in kind else "", "b": "backbone."}[kind[0]]
    moved = {prefix + name.replace(f"{head}.", f"{layer}."): tensor for name, tensor in weights.items()}
    moved = {name.replace(f"{prefix}../", ""): tensor for name, tensor in moved.items()}
    if "Sequential(network" in kind:  # without a bias
        del moved["2.bias"]
        weights = {**weights, f"{head}.bias": torch.zeros(2)}
    found, notes = taken({"state_dict": moved}, key)
    assert are_same(found, weights)
    assert notes == [f"its linear layer {layer.removeprefix('../')} taken for {head}"]


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
def test_a_head_of_other_layers_is_refused(checkpoint: dict[str, Any], layers: dict[str, tuple[int, ...]]) -> None:
    weights = {name: tensor for name, tensor in checkpoint["model_state_dict"].items() if not name.startswith("head.fc.")}
    weights |= {f"{name}.weight": torch.ones(shape) for name, shape in layers.items()}
    words = f"no single linear layer of 320 inputs but {len(layers)} ({', '.join(layers)})"
    with pytest.raises(tool.ExplainError, match=re.escape(words)):
        taken(weights)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_computed_in_float32(checkpoint: dict[str, Any], tmp_path: Path, kind: torch.dtype) -> None:
    weights = {name: tensor.to(kind) for name, tensor in checkpoint["model_state_dict"].items()}
    classifier = load(save({**checkpoint, "model_state_dict": weights}, tmp_path / "h.pth"))
    assert_same_weights(classifier, weights)
    assert told(classifier) == (f"{str(kind).removeprefix('torch.')} weights computed in float32",)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_saved_on_a_gpu(checkpoint: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(checkpoint, tmp_path / "gpu.pth", _use_new_zipfile_serialization=zipped)
    assert b"cuda:0" in (tmp_path / "gpu.pth").read_bytes()
    classifier = load(tmp_path / "gpu.pth")
    assert_same_weights(classifier, checkpoint["model_state_dict"])
    assert all(tensor.device.type == "cpu" for tensor in classifier.network.parameters())


def test_safetensors_with_metadata(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    metadata = {"format": "pt", "config": json.dumps(checkpoint["config"]), "val_acc": "97.5", "class_names": '["a", "b"]'}
    path = tmp_path / "convnext.safetensors"
    save_file(checkpoint["model_state_dict"], path, metadata)
    classifier = load(path)
    assert_same_weights(classifier, checkpoint["model_state_dict"])
    assert classifier.model.class_names == ("a", "b") and classifier.model.accuracy == "Validation accuracy: 97.50%"
    assert tool.find_checkpoint(tool.FAMILIES["convnext"], tmp_path) == path
    save_file(checkpoint["model_state_dict"], path, {"config": '{"model_name": "hf-hub:a/b"}'})
    refused(path, "hf-hub:a/b")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not list mappings")
def test_file_is_mapped_not_copied(tiny_checkpoints: dict[str, Path], key: str) -> None:
    classifier = load(tiny_checkpoints[key], key)
    address = next(classifier.network.parameters()).data_ptr()
    mappings = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    (holder,) = (m for m in mappings if int(m[0].split("-")[0], 16) <= address < int(m[0].split("-")[1], 16))
    assert holder[-1] == str(tiny_checkpoints[key])


# ------------------------------------------------------------------------------------------
# Classes, preprocessing, accuracy
# ------------------------------------------------------------------------------------------


def with_classes(checkpoint: dict[str, Any], count: int) -> dict[str, Any]:
    """The same checkpoint with a head of `count` outputs."""
    weights = checkpoint["model_state_dict"]
    weights["head.fc.weight"] = torch.ones(count, weights["head.fc.weight"].shape[1])
    weights["head.fc.bias"] = torch.zeros(count)
    return checkpoint


ORDERS = {
    "class_names": ["simple_fracture", "comminuted_fracture"],
    "classes": ["simple", "comminuted"],
    "class_to_idx": {"comminuted_fracture": 1, "simple_fracture": 0},
    "id2label": {"1": "Comminuted Fracture", "0": "Simple Fracture"},
    "label2id": {"Simple": 0, "Comminuted": 1},
    "label_names": ("Simple Fracture", "comminuted"),
    "labels": np.array(["simple", "comminuted"]),
    "idx_to_class": {"0": "simple", "1": "comminuted"},
    "names": {0: "simple", 1: "comminuted"},
}
PLACES = ["", "config", "args", "hyper_parameters", "pretrained_cfg", "meta.dataset_meta", "config.pretrained_cfg"]


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("place", PLACES)
def test_a_recorded_order_of_the_classes_counts(stub: dict[str, Any], name: str, place: str) -> None:
    record = {name: ORDERS[name]}
    for part in reversed(place.split(".") if place else ()):
        record = {part: argparse.Namespace(**record) if part == "args" else record}
    names, notes = tool.class_names_of({**stub, **record}, 2, None, Path("x"))
    assert names == ("Simple Fracture", "Comminuted Fracture") and not notes


def test_recorded_orders_that_contradict_each_other_are_refused(stub: dict[str, Any], tmp_path: Path) -> None:
    stub["config"] |= {"id2label": {0: "comminuted", 1: "simple"}}
    refused(save({**stub, "classes": ["simple", "comminuted"]}, tmp_path / "x.pth"), "contradicts itself", "classes says Simple Fracture, Com", "id2label says Com")


@pytest.mark.parametrize(
    "record",
    [{"id2label": {0: "LABEL_0", 1: "LABEL_1"}}, {"class_to_idx": {"0": 0, "1": 1}}, {"classes": 2}, {"labels": torch.zeros(9)}, {"names": "fractures"},
     {"label2id": {"a": 0, "b": 7}}],
)  # fmt: skip
def test_what_names_no_class_is_no_order(stub: dict[str, Any], record: dict[str, Any]) -> None:
    names, notes = tool.class_names_of({**stub, **record}, 2, None, Path("x"))
    assert names == tool.CLASS_NAMES and "class order assumed" in notes[0]


@pytest.mark.parametrize(
    ("recorded", "shown"),
    [
        (["comminuted", "no_fracture", "simple"], ("Comminuted Fracture", "no_fracture", "Simple Fracture")),
        (["simple", "Simple Fracture", "x"], ("simple", "Simple Fracture", "x")),  # not to be told apart
    ],
)
def test_three_classes_with_three_names(checkpoint: dict[str, Any], tmp_path: Path, recorded: list[str], shown: tuple[str, ...]) -> None:
    checkpoint["config"]["num_classes"] = 1000  # left from elsewhere: the head decides
    classifier = load(save({**with_classes(checkpoint, 3), "class_names": recorded}, tmp_path / "three.pth"))
    assert classifier.model.class_names == shown
    assert classifier.network(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_more_than_ten_classes_keep_their_order(stub: dict[str, Any]) -> None:
    stub["config"] |= {"num_classes": 12, "id2label": {str(index): f"kind {chr(97 + index)}" for index in reversed(range(12))}}
    assert tool.class_names_of(stub, 12, None, Path("x"))[0] == tuple(f"kind {letter}" for letter in "abcdefghijkl")


def pictures(*shapes: tuple[int, ...]) -> list[tool.Radiograph]:
    rng = np.random.default_rng(3)
    return [tool.Radiograph(np.repeat(rng.integers(0, 256, (*shape, 1), dtype=np.uint8), 3, axis=2)) for shape in shapes]


def test_one_output_speaks_for_two_classes(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    weights = checkpoint["model_state_dict"]
    weights["head.fc.weight"], weights["head.fc.bias"] = torch.randn(1, 320), torch.randn(1)
    checkpoint["config"] |= {"num_classes": 1, "class_names": ["simple", "comminuted"]}
    classifier = load(save(checkpoint, tmp_path / "one.pth"))
    assert classifier.model.class_names == ("Simple Fracture", "Comminuted Fracture")
    assert told(classifier) == ("one output: its sigmoid is the probability of Comminuted Fracture",)
    plain = timm.create_model("convnextv2_atto", num_classes=1).eval()
    plain.load_state_dict(weights)
    radiographs = pictures((100, 60), (50, 80))
    inputs = torch.from_numpy(np.stack([tool.network_input(each, classifier.model.preprocessing) for each in radiographs]))
    activations = plain.forward_features(inputs).detach().requires_grad_()
    logits = plain.forward_head(activations)[:, 0]
    (gradients,) = torch.autograd.grad(logits.sum(), activations)
    raw = (gradients.mean(dim=(2, 3), keepdim=True) * activations).sum(dim=1).detach().numpy()
    for target, sign in ((0, -1), (1, 1)):
        for each, logit, expected in zip(explain(classifier, radiographs, target), logits.detach(), raw):
            assert each.probabilities[1] == pytest.approx(float(torch.sigmoid(logit)), abs=1e-6)
            assert each.probabilities.sum() == pytest.approx(1)
            np.testing.assert_allclose(each.raw_map, sign * expected, atol=1e-5 * np.abs(expected).max())
            assert each.explained == target


@pytest.mark.parametrize("normalised", [{}, {"mean": [0.5], "std": [0.25]}, {"mean": [0.4, 0.5, 0.6]}])
def test_a_network_for_grey_images_gets_the_grey_radiograph(key: str, tmp_path: Path, normalised: dict[str, Any]) -> None:
    torch.manual_seed(1)
    plain = timm.create_model(TINY[key], num_classes=2, in_chans=1).eval()
    classifier = load(save({"state_dict": plain.state_dict(), "config": {"model_name": TINY[key], **normalised}}, tmp_path / "grey.pth"), key)
    assert any("grey" in note for note in told(classifier))
    colour = tool.Radiograph(np.random.default_rng(3).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    mean, std = (np.mean(normalised.get(name, default)) for name, default in (("mean", tool.IMAGENET_MEAN), ("std", tool.IMAGENET_STD)))
    for radiograph in (*pictures((100, 60)), colour):
        luminance = radiograph.squashed(224).astype(float) @ [0.299, 0.587, 0.114] / 255
        with torch.no_grad():
            expected = plain(torch.from_numpy((luminance - mean) / std).float()[None, None]).softmax(dim=1)[0].numpy()
        np.testing.assert_allclose(explain(classifier, [radiograph])[0].probabilities, expected, atol=1e-5)


@pytest.mark.parametrize("count", [3, 1000])
def test_head_without_enough_names_is_refused(stub: dict[str, Any], tmp_path: Path, count: int) -> None:
    path = save(with_classes(stub, count), tmp_path / "head.pth")
    refused(path, f"its head has {count} outputs", "class names are 2 (Comminuted Fracture, Simple Fracture)", "class_names")


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("class_names", ["ab", [], ["a"], ["a", "A "], ["a", " "], ["a", 1], 7], "a list of 2 to 100 different names"),
        ("img_size", [0, 63, 1025, 224.0, "224", True, [224, 256], {}, torch.ones(2)], "one number of pixels from 64 to 1024"),
        ("mean", [0.5, [0.5] * 4, ["a"] * 3, [float("nan")] * 3, [123.7, 116.3, 103.5], torch.ones(3)], "three numbers from 0 to 1"),
        ("std", [[0, 0.2, 0.2], [-1, 0.5, 0.5], {}], "three numbers from 0.001 to 1"),
    ],
)
def test_unusable_records_are_refused(stub: dict[str, Any], tmp_path: Path, name: str, values: list[object], words: str) -> None:
    for value in values:
        stub["config"][name] = value
        refused(save(stub, tmp_path / "x.pth"), f"{name} is ", words, f"correct {name} in the checkpoint")


@pytest.mark.parametrize(
    ("recorded", "expected", "words"),
    [
        ({"mean": (0.5, 0, 0.25), "config": {"std": [0.25, 0.5, 1]}}, tool.Preprocessing(224, (0.5, 0.0, 0.25), (0.25, 0.5, 1.0)), "mean (0.5, 0.0, 0.25)"),
        *(({"config": {"img_size": size}}, tool.Preprocessing(side), f"{side} pixels") for size, side in ((64, 64), ([300, 300], 300), ((1024, 1024), 1024))),
        ({"hyper_parameters": {"image_size": 96, "mean": [0.5], "std": [0.5]}}, tool.Preprocessing(96, (0.5,) * 3, (0.5,) * 3), "96 pixels"),
        ({"pretrained_cfg": {"input_size": (3, 288, 288), "interpolation": "bicubic"}}, tool.Preprocessing(288, interpolation="bicubic"), "bicubic"),
        ({"args": argparse.Namespace(interpolation="random", img_size=None)}, tool.Preprocessing(), ""),
        ({"pretrained_cfg": {"crop_pct": 0.875}}, tool.Preprocessing(), "crop_pct 0.875"),
        ({"pretrained_cfg": {"crop_pct": 1.0, "crop_mode": "center"}}, tool.Preprocessing(), "crop_pct 1.0"),
        ({"pretrained_cfg": {"crop_pct": 1.0, "crop_mode": "squash", "num_classes": 1000}}, tool.Preprocessing(), ""),
    ],
)  # fmt: skip
def test_recorded_preprocessing_is_done_or_told(recorded: dict[str, Any], expected: tool.Preprocessing, words: str) -> None:
    preprocessing, notes = tool.preprocessing_of(recorded, False, Path("x"))
    assert preprocessing == expected
    assert words in "".join(notes) and bool(words) == bool(notes)


def test_the_recorded_interpolation_makes_the_input() -> None:
    (radiograph,) = pictures((300, 100))
    for name in ("bicubic", "bilinear", "nearest"):
        seen = tool.network_input(radiograph, tool.Preprocessing(64, (0.0,) * 3, (1.0,) * 3, name))
        expected = np.asarray(Image.fromarray(radiograph.pixels).resize((64, 64), Image.Resampling[name.upper()]))
        assert np.array_equal(np.rint(seen * 255), expected.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("recorded", "text"),
    [
        ({"val_acc": 99.16}, "Validation accuracy: 99.16%"),
        ({"test_acc": torch.tensor(97), "val_acc": 99.16}, "Test accuracy: 97.00%"),
        ({"val_acc": 0.9832}, "Validation accuracy: 0.9832 as recorded"),
        *(({"val_acc": bad}, "Accuracy: not recorded in the checkpoint") for bad in (float("nan"), -1, 101, "99", None, True)),
    ],
)
def test_accuracy_is_named_as_the_file_names_it(recorded: dict[str, Any], text: str) -> None:
    assert tool.accuracy_text(recorded) == text


# ------------------------------------------------------------------------------------------
# What is refused
# ------------------------------------------------------------------------------------------


MISFITS = {
    "renamed": (lambda weights: weights.update({"stem.my_0\n": weights.pop("stem.0.weight")}),
                ("2 (stem.0.weight is missing in the file, 40x3x4x4 float32 in the network", "stem.my_0\\n is 40x3x4x4 float32 in the file, missing in")),
    "a layer more": (lambda weights: weights.update({"stages.0.attention.weight": torch.ones(40, 40)}), ("1 (stages.0.attention.weight is 40x40",)),
    "another shape": (lambda weights: weights.update({"stem.0.weight": torch.zeros(40, 2, 4, 4)}),
                      ("1 (stem.0.weight is 40x2x4x4 float32 in the file, 40x3x4x4 float32 in the network)",)),
    "three of many": (lambda weights: [weights.pop(f"stages.{index}.blocks.0.norm.weight") for index in range(4)],
                      ("its 136 weights do not fit the 140", "stages.2.blocks.0.norm.weight is missing", ", …)")),
    "complex": (lambda weights: weights.update({"head.fc.bias": torch.ones(2) + 0j}), ("2 complex64 in the file",)),
    "whole numbers": (lambda weights: weights.update({"head.fc.bias": torch.ones(2).int()}), ("1 (head.fc.bias is 2 int32 in the file, 2 float32",)),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISFITS)
def test_weights_that_do_not_fit_are_named_with_both_sides(checkpoint: dict[str, Any], tmp_path: Path, kind: str) -> None:
    change, words = MISFITS[kind]
    change(checkpoint["model_state_dict"])
    refused(save(checkpoint, tmp_path / "x.pth"), "of convnextv2_atto (which its config names)", "correct the name in its config", *words)
    del checkpoint["config"]
    refused(save(checkpoint, tmp_path / "x.pth"), "(assumed, as its config names none)", "record the timm name")


def test_size_that_differs_from_config_is_refused(key: str, pristine: dict[str, Any], tmp_path: Path) -> None:
    larger = {"convnext": "convnextv2_femto", "efficientnet": "tf_efficientnetv2_b1"}[key]
    contents = copied(pristine[key])
    contents["config"]["model_name"] = larger
    path = save(contents, tmp_path / "size.pth")
    refused(path, f"its {len(contents['model_state_dict'])} weights do not fit", f"of {larger} (which its config names)", key=key)
    del contents["config"]
    assert load(save(contents, path), key).model.architecture == TINY[key]


def test_other_family_is_recognised_by_its_keys(key: str, pristine: dict[str, Any], tmp_path: Path) -> None:
    (other,) = set(TINY) - {key}
    for contents in (pristine[other], pristine[other]["model_state_dict"]):
        refused(save(contents, tmp_path / "other.pth"), f"of the {other} family", f"--{other}-checkpoint", key=key)


@pytest.mark.parametrize(
    "name", ["hf-hub:timm/convnextv2_atto", "local-dir:/tmp", "convnextv2_atto/../x", "resnet18", "tf_efficientnetv2_b0", "convnextv2_atto\n", 7]
)
def test_foreign_network_name_is_refused(stub: dict[str, Any], tmp_path: Path, name: object) -> None:
    stub["config"]["model_name"] = name
    refused(save(stub, tmp_path / "name.pth"), "records the network", "not of the family")


def test_every_size_that_is_accepted_exists_in_timm() -> None:
    sizes = {"convnext": "atto femto pico nano tiny small base large huge", "efficientnet": "s m l xl b0 b1 b2 b3"}
    stems = {"convnext": "convnextv2_", "efficientnet": "tf_efficientnetv2_"}
    names = {key: [stems[key] + size for size in sizes[key].split()] for key in sizes}
    for key, family in tool.FAMILIES.items():
        assert all(family.names.fullmatch(name) and timm.is_model(name) for name in names[key])
        keys = tool.build_network(names[key][0], 2).state_dict()
        assert family.landmark in keys and f"{family.head}.weight" in keys
        assert not any(other.landmark in keys for other in tool.FAMILIES.values() if other is not family)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(float("nan"), torch.float32), (-float("inf"), torch.float16), (1e300, torch.float64)],
)
def test_weights_that_are_not_finite_are_refused(checkpoint: dict[str, Any], tmp_path: Path, value: float, kind: torch.dtype) -> None:
    weights = {name: tensor.to(kind, copy=True) for name, tensor in checkpoint["model_state_dict"].items()}
    weights["stages.2.blocks.0.mlp.fc1.weight"][3, 5] = value
    path = save({**checkpoint, "model_state_dict": weights}, tmp_path / "nan.pth")
    refused(path, "NaN or infinite", "1 (stages.2.blocks.0.mlp.fc1.weight)")
    weights["stages.2.blocks.0.mlp.fc1.weight"][3, 3:6] = 6e4 if kind == torch.float16 else 3e38  # whose sum is infinite
    assert_same_weights(load(save({**checkpoint, "model_state_dict": weights}, path)), weights)


class Bomb:
    """Touches a file when it is unpickled without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("container", ["zip", "old", "plain pickle"])
def test_code_in_a_checkpoint_is_never_run(stub: dict[str, Any], tmp_path: Path, container: str) -> None:
    path, trace = tmp_path / "bomb.pth", tmp_path / "ran"
    contents = {**stub, "extra": Bomb(trace)}
    if container == "plain pickle":
        path.write_bytes(pickle.dumps({"extra": Bomb(trace)}))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=container == "zip")
    refused(path, "not written by torch.save" if container == "plain pickle" else "none is run")
    assert not trace.exists()
    pickle.loads(pickle.dumps(contents["extra"]))
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
def test_what_trainers_save_beside_the_weights_is_harmless(checkpoint: dict[str, Any], tmp_path: Path, zipped: bool) -> None:
    torch.save({**HARMLESS, **checkpoint}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    contents = tool.read_checkpoint(tmp_path / "x.pth")
    assert contents["history"] == {"loss": [0.5, 0.25]} and contents["started"] == HARMLESS["started"]
    assert contents["args"].output == PurePosixPath("/data/run") and contents["confusion"].tolist() == [[0, 1], [2, 3]]
    assert_same_weights(load(tmp_path / "x.pth"), checkpoint["model_state_dict"])


@pytest.mark.parametrize("name", ["pathlib WindowsPath", "pathlib._local PosixPath", "pathlib._local WindowsPath", "numpy.core.multiarray scalar"])
def test_harmless_types_of_other_systems_and_versions_load(tmp_path: Path, name: str) -> None:
    path, module = tmp_path / "x.pth", name.split()[0]
    value = np.float64(1) if "numpy" in name else PurePosixPath("a")
    torch.save({"val_acc": value}, path, _use_new_zipfile_serialization=False)
    written = b"cnumpy._core.multiarray\nscalar\n" if "numpy" in name else b"cpathlib\nPurePosixPath\n"
    assert written in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(written, f"c{module}\n{name.split()[1]}\n".encode()))
    assert tool.read_checkpoint(path)["val_acc"] in (1, PurePosixPath("a"), PureWindowsPath("a"))


def test_a_checkpoint_of_timms_trainer_loads(key: str, pristine: dict[str, Any], tmp_path: Path) -> None:
    options = argparse.Namespace(model=TINY[key], img_size=256, num_classes=None, mean=None, std=(0.5, 0.5, 0.5), interpolation="", lr=0.1)
    contents = {"epoch": 3, "arch": TINY[key], "state_dict": pristine[key]["model_state_dict"], "args": options,
                "optimizer": {}, "version": 2, "metric": 97.1}  # fmt: skip
    classifier = load(save(contents, tmp_path / "timm.pth"), key)
    usual = timm.get_pretrained_cfg(TINY[key])  # what timm's trainer takes where it is given nothing
    assert classifier.model.architecture == TINY[key]
    assert classifier.model.preprocessing == tool.Preprocessing(256, usual.mean, (0.5,) * 3, usual.interpolation)
    assert "crop_pct 0.875" in told(classifier)[-1]


@pytest.mark.slow
def test_every_size_is_told_by_its_shapes() -> None:
    for family in tool.FAMILIES.values():
        sizes = [*family.sizes.values(), family.full_size]
        for name in sizes:
            weights = tool.build_network(name, 0).state_dict()
            assert tool.architecture_of(family, {}, weights, Path("x"))[0] == name
        assert len({family.names.fullmatch(name).group(1) for name in sizes}) == len(sizes)


# ------------------------------------------------------------------------------------------
# Files and folders as other tools write them
# ------------------------------------------------------------------------------------------


def hub_folder(folder: Path, weights: dict[str, torch.Tensor], config: dict[str, Any], name: str = "model.safetensors") -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    if name.endswith(".safetensors"):
        save_file(weights, folder / name)
    else:
        torch.save(weights, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


TRANSFORMERS = {
    "architectures": ["TimmWrapperForImageClassification"], "model_type": "timm_wrapper", "initializer_range": 0.02,
    "architecture": "convnextv2_atto.fcmae", "label_names": ["simple", "comminuted"], "num_classes": 2,
    "id2label": {"0": "simple", "1": "comminuted"}, "label2id": {"simple": 0, "comminuted": 1},
    "pretrained_cfg": {"input_size": [3, 96, 96], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic",
                       "crop_pct": 0.9, "num_classes": 1000},
}  # fmt: skip


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("is_folder", [True, False])
def test_a_hubs_or_trainers_folder_loads(checkpoint: dict[str, Any], tmp_path: Path, name: str, is_folder: bool) -> None:
    weights = checkpoint["model_state_dict"]
    folder = hub_folder(tmp_path / "convnext_run", {f"timm_model.{key}": tensor for key, tensor in weights.items()}, TRANSFORMERS, name)
    torch.save({}, folder / "training_args.bin")
    classifier = load(folder if is_folder else folder / name)
    assert_same_weights(classifier, weights)
    assert classifier.model.checkpoint == folder / name
    assert classifier.model.architecture == "convnextv2_atto.fcmae"
    assert classifier.model.class_names == ("Simple Fracture", "Comminuted Fracture")
    assert classifier.model.preprocessing == tool.Preprocessing(96, (0.5,) * 3, (0.5,) * 3, "bicubic")
    assert "crop_pct 0.9" in told(classifier)[-1]
    assert tool.find_checkpoint(tool.FAMILIES["convnext"], tmp_path) == folder / name


def test_a_config_beside_counts_only_for_its_own_network(key: str, pristine: dict[str, Any], tmp_path: Path) -> None:
    (other,) = set(TINY) - {key}
    folder = hub_folder(tmp_path / "run", pristine[key]["model_state_dict"], {**TRANSFORMERS, "architecture": TINY[other]})
    assert load(save(pristine[key]["model_state_dict"], folder / "x.pth"), key).model.class_names == tool.CLASS_NAMES
    (folder / "config.json").write_text(json.dumps({**TRANSFORMERS, "architecture": TINY[key]}))
    assert load(folder / "x.pth", key).model.class_names == tool.CLASS_NAMES[::-1]
    (folder / "config.json").write_text("{")
    with pytest.raises(tool.ExplainError, match=r"config\.json: not what a hub or Trainer writes"):
        load(folder, key)


def test_a_folder_of_timm_itself_loads(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    hub = pytest.importorskip("timm.models._hub")
    network = timm.create_model("convnextv2_atto", num_classes=2)
    network.load_state_dict(checkpoint["model_state_dict"])
    hub.save_for_hf(network, tmp_path / "hub", model_config={"label_names": ["simple", "comminuted"]}, safe_serialization=True)
    classifier = load(tmp_path / "hub")
    assert_same_weights(classifier, checkpoint["model_state_dict"])
    assert classifier.model.class_names == tool.CLASS_NAMES[::-1]
    assert classifier.model.preprocessing.interpolation == "bicubic" and "crop_pct 0.875" in told(classifier)[-1]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], ("PEFT", "merge_and_unload()")),
        ([".metadata", "__0_0.distcp"], ("FSDP", "dcp_to_torch")),
        (["zero_to_fp32.py", "latest"], ("DeepSpeed", "zero_to_fp32.py")),
        (["saved_model.pb"], ("a folder with 0 files of weights", "name the file")),
        (["a.pth", "b.pth"], ("a folder with 2 files of weights", "name the file")),
    ],
)
def test_other_folders_are_named_as_what_they_are(tmp_path: Path, files: list[str], words: tuple[str, ...]) -> None:
    for name in files:
        (tmp_path / name).touch()
    refused(tmp_path, *words)


def with_lora(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    layer = "stages.3.blocks.0.mlp.fc1"
    base = {f"base_model.model.{name.replace(layer, layer + '.base_layer')}": tensor for name, tensor in weights.items()}
    return base | {f"base_model.model.{layer}.lora_A.default.weight": torch.ones(4, 320)}


FOREIGN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], tuple[str, ...]]] = {
    "PEFT": (with_lora, ("LoRA", "merge_and_unload()")),
    "loralib": (lambda weights: {**weights, "stages.3.blocks.0.mlp.fc1.lora_A": torch.ones(4, 320)}, ("LoRA", "merge_and_unload()")),
    "adapter alone": (lambda weights: {"base_model.model.head.fc.ia3_l": torch.ones(4, 320)}, ("PEFT", "merge_and_unload()")),
    "ZeRO 3": (lambda weights: {"module": {name: torch.empty(0) for name in weights}, "ds_version": "0.14"}, ("DeepSpeed", "zero_to_fp32.py")),
    "ZeRO shard": (lambda weights: {"optimizer_state_dict": {"zero_stage": 2}, "ds_config": {}}, ("DeepSpeed", "zero_to_fp32.py")),
    "quantised": (lambda weights: {"stem.0.scale": torch.ones(()), "head.fc._packed_params._packed_params": torch.ones(2)}, ("quantised",)),
    "quantised here and there": (lambda weights: {**weights, "head.fc.zero_point": torch.ones(1)}, ("quantised",)),
    "a whole network": (lambda weights: torch.nn.Sequential(torch.nn.Linear(2, 2)), ("container.Sequential", "model.state_dict()", "none is run")),
    "a network in a dictionary": (lambda weights: {"model": torch.nn.Linear(2, 2)}, ("linear.Linear", "model.state_dict()")),
    "pruned": (lambda weights: {**weights, "stem.0.weight_mask": torch.ones(1)}, ("pruned", "prune.remove")),
    "fastai": (lambda weights: {"model": {**{f"0.model.{name}": tensor for name, tensor in weights.items() if "head.fc" not in name},
                                          "1.2.weight": torch.ones(640), "1.4.weight": torch.ones(512, 640), "1.8.weight": torch.ones(2, 512)}, "opt": {}},
               ("no single linear layer",)),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_kinds_of_checkpoints_are_named_with_what_helps(checkpoint: dict[str, Any], tmp_path: Path, kind: str) -> None:
    build, words = FOREIGN[kind]
    assert "timm name" not in refused(save(build(checkpoint["model_state_dict"]), tmp_path / "x.pth"), *words)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    refused(tmp_path / "script.pt", "TorchScript", "state_dict()")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fastai.learner Learner", ("a Learner of fastai", "learn.model.state_dict()")),
        ("torch.distributed.tensor._api DTensor", ("FSDP", "dcp_to_torch")),
        ("torch.ao.nn.quantized.modules.linear Linear", ("quantised",)),
        ("deepspeed.runtime.zero.config ZeroStageEnum", ("DeepSpeed", "zero_to_fp32.py")),
        ("pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint", ("Lightning", "['state_dict']")),
        ("__main__ FractureNet", ("a whole network", "__main__.FractureNet", "model.state_dict()", "none is run")),
    ],
)
def test_objects_are_named_with_the_call_that_helps(tmp_path: Path, name: str, words: tuple[str, ...]) -> None:
    torch.save({"epoch": PurePosixPath("x")}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    contents = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(contents.replace(b"cpathlib\nPurePosixPath\n", "c{}\n{}\n".format(*name.split()).encode()))
    refused(tmp_path / "x.pth", *words)


@pytest.mark.parametrize(
    ("name", "said"), [("__0_0.distcp", "FSDP"), ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "DeepSpeed"), ("adapter_model.bin", "PEFT")]
)
def test_files_are_told_by_their_names(tmp_path: Path, name: str, said: str) -> None:
    refused(save({"a": torch.ones(2)}, tmp_path / name), said)


def test_a_checkpoint_of_lightning_is_found_by_its_suffix_and_loads(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    weights = checkpoint["model_state_dict"]
    contents = {
        "state_dict": {f"model.{name}": tensor for name, tensor in weights.items()}, "epoch": 3, "global_step": 9, "pytorch-lightning_version": "2.4",
        "callbacks": {"ModelCheckpoint{'monitor': 'val'}": {"best_model_score": torch.tensor(0.9), "best_model_path": "/x"}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}], "lr_schedulers": [], "loops": {"fit_loop": {}},
        "optimizer": {"exp_avg": shifted(weights)},
        "hyper_parameters": {"model_name": "convnextv2_atto", "num_classes": 2, "class_names": ["simple", "comminuted"]},
    }  # fmt: skip
    for suffix in (".ckpt", ".bin", ".pth.tar"):
        path = save(contents, tmp_path / f"convnext{suffix}")
        assert tool.find_checkpoint(tool.FAMILIES["convnext"], tmp_path) == path
        classifier = load(path)
        assert_same_weights(classifier, weights)
        assert classifier.model.class_names == tool.CLASS_NAMES[::-1] and told(classifier) == ()
        path.unlink()


def test_assumed_order_of_classes_is_said_and_can_be_given(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    path = save(checkpoint, tmp_path / "x.pth")
    assert load(path).model.notes[0].startswith("class order assumed: 0 = Comminuted Fracture, 1 = Simple Fracture")
    given = tool.load_classifier(tool.FAMILIES["convnext"], path, "cpu", ("simple_fracture", "Comminuted"))
    assert given.model.class_names == ("Simple Fracture", "Comminuted Fracture") and given.model.notes == ()
    save({**checkpoint, "class_names": ["a", "b"]}, path)
    with pytest.raises(tool.ExplainError, match="records its own class names"):
        tool.load_classifier(tool.FAMILIES["convnext"], path, "cpu", ("b", "a"))
    assert tool.load_classifier(tool.FAMILIES["convnext"], path, "cpu", ("A", "b")).model.class_names == ("a", "b")


def test_missing_counters_of_batches_are_harmless(pristine: dict[str, Any], tmp_path: Path) -> None:
    contents = copied(pristine["efficientnet"])
    weights = contents["model_state_dict"]
    for name in [name for name in weights if name.endswith("num_batches_tracked")]:
        del weights[name]
    classifier = load(save(contents, tmp_path / "counters.pth"), "efficientnet")
    assert told(classifier) == () and classifier.network(torch.zeros(1, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        *((contents, ("not a dictionary of weights", said)) for contents, said in (([1], "a list"), (torch.ones(2), "a Tensor"), ("x\n", r"'x\n'"))),
        *((contents, ("another network, or none", "0 weights", "convnextv2_*")) for contents in ({}, {"epoch": 3, "config": {}}, {"model": {}})),
        ({"model": {"conv1.weight": torch.ones(3, 3)}}, ("another network, or none", "1 weights", "convnextv2_* or tf_efficientnetv2_*")),
    ],
)  # fmt: skip
def test_a_file_without_a_network_is_refused(tmp_path: Path, contents: object, words: tuple[str, ...]) -> None:
    refused(save(contents, tmp_path / "none.pth"), *words)


def test_lack_of_memory_is_one_line(tiny_checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*args: object, **kwargs: object) -> None:
        raise MemoryError

    for module, name, word in ((torch, "load", "too large for the memory"), (timm, "create_model", "not enough memory")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, exhausted)
            refused(tiny_checkpoints["convnext"], word)


# ------------------------------------------------------------------------------------------
# Files that are no checkpoints
# ------------------------------------------------------------------------------------------


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
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1052814323\n", ("Git LFS pointer", "git lfs pull")),
        (b"\x89PNG\r\n", ("a PNG image",)),
        (b"\x89HDF\r\n", ("an HDF5 file, as of Keras", "PyTorch")),
        (archive("model.weights.h5"), ("a zip archive without weights", "Keras")),
        (b"PK\x03\x04" + b"\x00" * 60, ("incomplete or damaged archive", "copy or download")),
        (b"\x80\x02", ("damaged",)),
        *((length.to_bytes(8, "little") + b'{"a":', ("damaged",)) for length in (20, 90_000_000)),
    ],
)
def test_other_files_are_named_as_what_they_are(tmp_path: Path, content: bytes, words: tuple[str, ...]) -> None:
    path = tmp_path / "convnext_best.pth"
    path.write_bytes(content)
    refused(path, *words)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_checkpoint_is_refused(checkpoint: dict[str, Any], tmp_path: Path, zipped: bool, share: float) -> None:
    path = tmp_path / "half.pth"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    os.truncate(path, int(path.stat().st_size * share))
    refused(path, "damaged", "copy or download")

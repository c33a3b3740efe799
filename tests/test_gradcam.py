"""The Grad-CAM maps: arithmetic by hand, two independent libraries, and what must never happen."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest

import explainability as tool
from conftest import a_model, explain
from explainability import CLASS_NAMES, FAMILIES, Classifier, ExplainError, Radiograph, grad_cam, normalised

torch = pytest.importorskip("torch")
if TYPE_CHECKING:
    from collections.abc import Sequence

LAYERS = {"convnext": "stages.3", "efficientnet": "conv_head"}  # the last stage, the last convolution
NOISE = Radiograph(np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8))


def toy(head: Sequence[Sequence[float]], kernel: float = 1.0) -> Classifier:
    """Two channels of a 7x7 grid, both kernel * mean of the patch + 1, then pooling and a head."""
    network = torch.nn.Sequential()
    network.add_module("grid", torch.nn.Conv2d(3, 2, 32, stride=32))
    network.add_module("pool", torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()))
    network.add_module("head", torch.nn.Linear(2, 2, bias=False))
    network.grid.weight.data.fill_(kernel / (3 * 32 * 32))
    network.grid.bias.data.fill_(1)
    network.head.weight.data = torch.tensor(head)
    plain = tool.Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # activations stay positive
    family = dataclasses.replace(FAMILIES["convnext"], target_layer="grid", head="head")
    network.eval().requires_grad_(False)
    return Classifier(a_model(family=family, preprocessing=plain), network)


def target_layer(classifier: Classifier) -> torch.nn.Module:
    return classifier.network.get_submodule(LAYERS[classifier.model.family.key])


# Arithmetic by hand


def test_toy_network_gives_the_map_worked_out_by_hand():
    radiograph = Radiograph(np.zeros((224, 224, 3), np.uint8))
    radiograph.pixels[:32, 32:64] = 255  # cell (0, 1) is white, all others are black
    (explanation,) = explain(toy([[2.0, 1.0], [0.0, 0.0]]), [radiograph])
    expected = np.full((7, 7), 3 * 1 / 49)  # both channels are 1 where black, 2 where white
    expected[0, 1] = 3 * 2 / 49
    np.testing.assert_allclose(explanation.raw_map, expected, rtol=1e-4)
    np.testing.assert_allclose(explanation.heatmap, expected * 49 / 6, rtol=1e-4)


def test_normalised_drops_negatives_and_divides_by_the_maximum_if_any():
    heatmap = normalised(np.float32([[-5, 0], [1, 4]]))
    assert heatmap.tolist() == [[0, 0], [0.25, 1]] and heatmap.dtype == np.float32
    assert normalised(np.float32([[-3, -1], [-2, 0]])).tolist() == [[0, 0], [0, 0]]


# Independent implementations


def map_of_grad_cam_package(classifier: Classifier, pixels: torch.Tensor, target: int) -> np.ndarray:
    """The map of pytorch-grad-cam before its own ReLU and scaling: (h, w)."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    class RawGradCAM(GradCAM):
        def get_cam_image(self, *args: object) -> np.ndarray:
            self.raw = super().get_cam_image(*args)
            return self.raw

    with RawGradCAM(classifier.network, [target_layer(classifier)]) as method:
        method(pixels, [ClassifierOutputTarget(target)])
    return method.raw[0]


def map_of_captum(classifier: Classifier, pixels: torch.Tensor, target: int) -> np.ndarray:
    from captum.attr import LayerGradCam

    method = LayerGradCam(classifier.network, target_layer(classifier))
    return method.attribute(pixels, target, relu_attributions=False)[0, 0].detach().numpy()


@pytest.mark.parametrize("target", (0, 1))
@pytest.mark.parametrize("key", FAMILIES)
def test_networks_give_the_maps_of_pytorch_grad_cam_and_captum(tiny_classifiers, key, target):
    (explanation,) = explain(tiny_classifiers[key], [NOISE], target)
    other = copy.deepcopy(tiny_classifiers[key])
    other.network.requires_grad_(True)
    pixels = torch.from_numpy(tool.network_input(NOISE, other.model.preprocessing))[None]
    scores = np.exp(other.network(pixels)[0].detach().double().numpy())
    np.testing.assert_allclose(explanation.probabilities, scores / scores.sum(), rtol=1e-5)
    for raw in (map_of_grad_cam_package(other, pixels, target), map_of_captum(other, pixels, target)):
        assert raw.shape == explanation.raw_map.shape == (7, 7)
        np.testing.assert_allclose(explanation.raw_map, raw, rtol=0, atol=1e-4 * np.abs(raw).max())
        np.testing.assert_allclose(explanation.heatmap, normalised(raw), rtol=0, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("key", FAMILIES)
def test_cuda_gives_the_maps_of_the_cpu(tiny_classifiers, tiny_checkpoints, key):
    tool.use_exact_float32()
    on_gpu = tool.load_classifier(FAMILIES[key], tiny_checkpoints[key], "cuda")
    (cpu,), (cuda,) = (explain(classifier, [NOISE], 0) for classifier in (tiny_classifiers[key], on_gpu))
    np.testing.assert_allclose(cuda.raw_map, cpu.raw_map, rtol=0, atol=1e-3 * np.abs(cpu.raw_map).max())


# Maps that say nothing


def test_blank_and_constant_maps_are_named():
    classifier = toy([[-1.0, -2.0], [1.0, 2.0]])
    blank, full = (explain(classifier, [NOISE], target)[0] for target in (0, 1))
    assert blank.raw_map.max() < 0 and not blank.heatmap.any()
    assert blank.blankness == "Blank map: no positive evidence for Comminuted Fracture"
    assert full.heatmap.max() == 1 and full.blankness == ""
    (constant,) = explain(toy([[1.0, 2.0], [0.0, 0.0]], kernel=0.0), [NOISE])
    assert (constant.heatmap == 1).all() and constant.blankness.startswith("Constant map")


def test_rounding_noise_is_not_stretched_to_a_heatmap_and_small_evidence_is_kept():
    activations = torch.rand((1, 1, 7, 7), generator=torch.Generator().manual_seed(0)).expand(1, 3, 7, 7)
    gradients = torch.tensor([0.1, 0.2, -0.3]).view(1, 3, 1, 1).expand(1, 3, 7, 7)
    assert (gradients * activations).sum(dim=1).abs().max() > 0  # the exact sum is 0: this is rounding
    assert not grad_cam(activations, gradients).any()
    small = torch.full((1, 2, 7, 7), 1e-8)
    assert grad_cam(small, small).min() > 0


# Hooks and gradients


@pytest.mark.parametrize("failing", ("conv_head", "classifier"))
def test_hook_is_gone_after_an_exception_in_the_network(tiny_classifiers, monkeypatch, failing):
    network = tiny_classifiers["efficientnet"].network
    monkeypatch.setattr(network.get_submodule(failing), "forward", lambda given: given.broken_layer)
    with pytest.raises(AttributeError, match="broken_layer"):
        explain(tiny_classifiers["efficientnet"], [NOISE])
    assert not network.conv_head._forward_hooks


@pytest.mark.parametrize("key", FAMILIES)
def test_nothing_is_recorded_before_the_target_layer(tiny_classifiers, key):
    classifier, seen = tiny_classifiers[key], []
    watch = target_layer(classifier).register_forward_pre_hook
    with watch(lambda module, inputs: seen.append(inputs[0].requires_grad)):
        explain(classifier, [NOISE])
    assert seen == [False]
    assert all(weight.grad is None for weight in classifier.network.parameters())


def test_nothing_on_a_gpu_is_left_to_chance(monkeypatch):
    for name, unwanted in (("deterministic", False), ("benchmark", True), ("allow_tf32", True)):
        monkeypatch.setattr(torch.backends.cudnn, name, unwanted)
    tool.use_exact_float32()
    cudnn = torch.backends.cudnn
    assert (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32) == (True, False, False)


# Which class, and networks that cannot be explained


def test_target_class_is_a_name_or_an_index_or_refused_with_the_choices():
    names = {"Simple Fracture": 1, "simple fracture": 1, "simple": 1, " COMMINUTED FRACTURE ": 0}
    for wanted, index in {None: None, "0": 0, "1": 1, **names}.items():
        assert tool.target_index(wanted, CLASS_NAMES) == index
    for wanted in ("2", "-1", "", "Fracture", "1.0", "²"):
        with pytest.raises(ExplainError, match="0 = Comminuted Fracture, 1 = Simple Fracture"):
            tool.target_index(wanted, CLASS_NAMES)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_scores_that_are_not_finite_are_refused(tiny_classifiers, value):
    classifier = copy.deepcopy(tiny_classifiers["efficientnet"])
    classifier.network.classifier.bias.data[0] = value
    with pytest.raises(ExplainError, match="efficientnet_best.pth.*not finite"):
        explain(classifier, [NOISE])
    assert not target_layer(classifier)._forward_hooks

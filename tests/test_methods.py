"""The methods beside Grad-CAM: each against arithmetic, enumeration or another library, and its own sum.

Networks here have random weights, livened up: as they come from timm, all norms would do nothing.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

import explainability
from conftest import an_explanation
from explainability import (
    CELL, FAMILIES, HELD_LAYERS, METHODS, ExplainError, ForwardPass, Job, Result, forward_pass,
)  # fmt: skip

pytestmark = pytest.mark.slow  # the quick tests are for work in progress on other parts

torch = pytest.importorskip("torch")

COMPARING = [key for key, method in METHODS.items() if method.compares]
SIZES = (
    *("atto", "femto", "pico", "nano", "tiny", "small", "base", "large", "huge"),
    *("s", "m", "l", "xl", "b0", "b1", "b2", "b3"),
)
HEADS = {key: family.head for key, family in FAMILIES.items()}
ARCHITECTURES = [f"{'convnextv2' if len(size) > 3 else 'tf_efficientnetv2'}_{size}" for size in SIZES]


def noise(count: int, size: int = 96, seed: int = 0) -> torch.Tensor:
    """Inputs with structure at all scales, (count, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    scales = [torch.randn((count, 3, cells, cells), generator=generator) for cells in (3, 12, size)]
    return sum(torch.nn.functional.interpolate(each, (size, size), mode="bilinear") for each in scales)


def livened(network: torch.nn.Module, size: int = 96) -> torch.nn.Module:
    """A copy whose norms and biases are random, and whose BatchNorm statistics are those of such inputs."""
    network, generator = copy.deepcopy(network), torch.Generator().manual_seed(0)
    for weight in network.parameters():
        if weight.squeeze().ndim < 2:
            weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    norms = [layer for layer in network.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    for layer in norms:
        layer.momentum = None  # the plain mean of what it sees
        layer.reset_running_stats()
        layer.train()
    with torch.no_grad():
        network(noise(8, size, seed=1))
    return network.eval()


@pytest.fixture(scope="module")
def networks(tiny_classifiers):
    """The tiny pair, livened up."""
    return {
        key: dataclasses.replace(each, network=livened(each.network)) for key, each in tiny_classifiers.items()
    }


FEWER = {"shap": 512 - 112, "occlusion": 13**2 - 4**2}  # passes than in use, below


@pytest.fixture(autouse=True)
def few_passes(monkeypatch):
    """What is tested of SHAP and occlusion does not depend on how many parts are covered in how many ways."""
    monkeypatch.setattr(explainability, "COALITIONS", 112)
    monkeypatch.setattr(explainability, "WINDOWS", 4)


def seen_by(classifier, inputs, classes=None):
    """What a pass tells methods; of these classes, or of the predicted ones."""
    family, wanted = classifier.model.family, classes if classes is None else torch.tensor(classes)
    told = explainability.layer_gradients(classifier.network, family.target_layer, inputs, wanted)
    return ForwardPass(classifier.network, family.finer_layer, inputs, *told, 4)


def seen_by_function(network, inputs):
    """What methods that look at inputs and scores alone need to know of any function of one score."""
    with torch.no_grad():
        logits = network(inputs)
    nothing = torch.zeros(len(inputs), 1, 1, 1)
    return ForwardPass(network, "", inputs, logits, torch.zeros(len(inputs), dtype=torch.long), nothing, nothing, 4)


def counted(network, function):
    """What a function returns, and the sizes of the batches that the network was given for it."""
    sizes = []
    with network.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0]))):
        return function(), sizes


def relative(difference: torch.Tensor, scale: torch.Tensor) -> float:
    return float(difference.abs().max() / scale.abs().max())


def pixel_sums(maps: torch.Tensor) -> torch.Tensor:
    """Maps of pixels (B, 3, S, S) summed over colours and cells of CELL x CELL, S a multiple of it."""
    return torch.nn.functional.avg_pool2d(maps.sum(dim=1, keepdim=True), CELL)[:, 0] * CELL**2


# The table, and the record behind it


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("key", FAMILIES)
def test_each_image_of_a_batch_is_explained_for_its_own_class(networks, key, method):
    inputs, classes = noise(2, 64), [1, 0]
    seen = seen_by(networks[key], inputs, classes)
    together, owed = METHODS[method].maps(seen), METHODS[method].owed
    assert together.dtype == torch.float32 and together.ndim == 3 and together.isfinite().all()
    for index, of_class in enumerate(classes):
        alone = seen_by(networks[key], inputs[index : index + 1], [of_class])
        (expected,) = METHODS[method].maps(alone)
        assert relative(together[index] - expected, expected) < 1e-3  # least squares amplify SHAP's rounding
        if owed:
            assert relative(owed(seen)[index] - owed(alone)[0], owed(alone)[0]) < 1e-3
    assert relative(together[0] - together[1], together[0]) > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_the_same_image_gives_the_same_bytes(networks, method):
    first = METHODS[method].maps(seen_by(networks["efficientnet"], noise(1, 64))).numpy()
    with torch.no_grad():
        second = METHODS[method].maps(seen_by(networks["efficientnet"], noise(1, 64))).numpy()
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("key", FAMILIES)
def test_a_method_makes_as_many_passes_as_it_says_and_leaves_nothing_behind(networks, key, method):
    network = networks[key].network

    def ask():
        seen = seen_by(networks[key], noise(1, 64))
        METHODS[method].maps(seen)
        if METHODS[method].owed:
            METHODS[method].owed(seen)
        if METHODS[method].compares:
            assert seen.reference_logits.shape == (1, 2)  # for what is said of it

    _, sizes = counted(network, ask)
    assert sum(sizes) == METHODS[method].passes - FEWER.get(method, 0)
    assert not any(module._forward_hooks or "forward" in vars(module) for module in network.modules())
    assert all(weight.grad is None and not weight.requires_grad for weight in network.parameters())


@pytest.mark.parametrize(("method", "off"), [("ig", 0.05), ("shap", 1e-4), ("lrp", 1e-5)])
@pytest.mark.parametrize("key", FAMILIES)
def test_maps_sum_to_what_they_owe(networks, key, method, off):
    seen = seen_by(networks[key], noise(2, 64))
    raw, owed = METHODS[method].maps(seen), METHODS[method].owed(seen)
    assert relative(raw.sum(dim=(1, 2)) - owed, raw.abs().sum(dim=(1, 2))) < off
    if method != "lrp":
        assert relative(owed - seen.gain, owed) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_input_sizes_that_no_grid_divides_are_accepted(networks, method):
    seen = seen_by(networks["convnext"], noise(1, 100))
    (raw,) = METHODS[method].maps(seen)
    assert raw.isfinite().all() and raw.abs().max() > 0
    if method in ("shap", "lrp"):
        owed = float(METHODS[method].owed(seen))
        assert float(raw.double().sum()) == pytest.approx(owed, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_size_of_both_families_has_known_layers_and_a_finer_grid(architecture):
    (family,) = (each for each in FAMILIES.values() if each.names.fullmatch(architecture))
    network = explainability.build_network(architecture, 2).eval()
    with explainability.held_factors(network, 1):  # refuses layers that it has no rule for
        assert any("forward" in vars(layer) for layer in network.modules())
    shapes = []
    for path in (family.target_layer, family.finer_layer):
        network.get_submodule(path).register_forward_hook(
            lambda layer, inputs, output: shapes.append(output.shape[2:])
        )
    network(torch.empty(1, 3, 224, 224, device="meta"))
    assert sorted(shapes) == [(7, 7), (14, 14)]


# The reference


def test_the_reference_is_the_radiograph_under_a_gaussian_blur_of_12_in_224_pixels():
    ndimage = pytest.importorskip("scipy.ndimage")
    for size in (224, 448):
        inputs = noise(1, size)
        expected = ndimage.gaussian_filter(inputs[0, 0].double().numpy(), size * 12 / 224, truncate=6)
        flat = inputs[:, :, :1, :1].expand_as(inputs)
        assert torch.equal(explainability.blurred(flat), flat)
        middle = slice(size * 3 // 8, size * 5 // 8)  # out of the edges' reach
        np.testing.assert_allclose(
            explainability.blurred(inputs)[0, 0, middle, middle], expected[middle, middle], atol=2e-3
        )


@pytest.mark.parametrize("method", COMPARING)
@pytest.mark.parametrize("key", FAMILIES)
def test_a_flat_image_has_no_evidence_rather_than_noise(networks, key, method):
    flat = torch.tensor([-2.1, 0.3, 1.7]).view(1, 3, 1, 1).repeat(1, 1, 64, 64)
    seen = seen_by(networks[key], flat)
    assert not METHODS[method].maps(seen).any()


# Grad-CAM++ and RefineCAM


def eq_19(activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Grad-CAM++ as the paper writes it, element by element in float64; negative sums count as zero."""
    maps = torch.zeros(activations.shape[0], *activations.shape[2:], dtype=torch.float64)
    for image, (layer, slopes) in enumerate(zip(activations.double(), gradients.double())):
        for channel, slope in zip(layer, slopes):
            total, weight = max(float(channel.sum()), 0.0), 0.0
            for value in slope.flatten().tolist():
                if value > 0:
                    weight += value**2 / (2 * value**2 + total * value**3) * value
            maps[image] += weight * channel
    return maps


@pytest.mark.parametrize("scale", (1, 1e-3, 1e-9))  # small gradients must not drown in an epsilon
@pytest.mark.parametrize("key", FAMILIES)
def test_grad_cam_plus_plus_is_equation_19(networks, key, scale):
    seen = seen_by(networks[key], noise(1))
    seen = dataclasses.replace(seen, gradients=scale * seen.gradients)
    expected = eq_19(seen.activations, seen.gradients)
    assert relative(METHODS["gradcam++"].maps(seen) - expected, expected) < 1e-4
    assert (seen.activations.sum(dim=(2, 3)) < 0).any()


@pytest.mark.parametrize("key", FAMILIES)
def test_refine_cam_is_that_of_pytorch_grad_cam(networks, key):
    from pytorch_grad_cam import GradCAM, RefineCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    inputs, network = noise(2, 224), copy.deepcopy(networks[key].network).requires_grad_(True)
    network.get_submodule(HEADS[key]).weight.data *= 1000  # theirs adds 1e-7 to each maximum
    layers = [network.get_submodule(getattr(FAMILIES[key], name)) for name in ("target_layer", "finer_layer")]
    expected = RefineCAM(network, layers, base_method=GradCAM)(inputs, [ClassifierOutputTarget(each) for each in (1, 0)])
    raw = METHODS["refinecam"].maps(seen_by(dataclasses.replace(networks[key], network=network.requires_grad_(False)), inputs, [1, 0]))
    assert expected.shape == raw.shape == (2, 224, 224)
    for ours, theirs in zip(raw.numpy(), expected):
        assert theirs.max() > 0.99 and np.abs(explainability.normalised(ours) - theirs).max() < 1e-4


def test_what_the_maps_of_layers_are_made_of_is_told():
    view = explainability.View(np.zeros((9, 9, 3), np.uint8), "", explainability.FigureStyle())
    told = []
    for method in ("refinecam", "gradcam++", "ig"):
        sheet = explainability.Sheet(view, 9)
        explainability.provenance_block(sheet, 0, 0, 9, an_explanation(method=method))
        told.append([line.text for line in sheet.items])
    assert "stages.3 and stages.2" in told[0] and "2 grids, interpolated to 7×7 pixels, then multiplied" in told[0]
    assert "stages.3" in told[1] and "7×7 grid, interpolated; a cell is 1/49 of the image" in told[1]
    assert "Target layer" not in told[2]


def test_a_constant_factor_takes_nothing_from_the_other(networks, monkeypatch):
    seen, flat = seen_by(networks["convnext"], noise(1, 64), [1]), torch.ones(1, 2, 2)
    real = explainability.grad_cam
    monkeypatch.setattr(explainability, "grad_cam", lambda a, g: flat if a.shape[2:] == (2, 2) else real(a, g))
    finer = METHODS["refinecam"].maps(seen)
    assert finer.max() == 1 and finer.min() == 0
    slope = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])  # above zero everywhere: the least is no evidence
    monkeypatch.setattr(explainability, "grad_cam", lambda a, g: slope if a.shape[2:] == (2, 2) else flat)
    assert METHODS["refinecam"].maps(seen)[0, :: 63, :: 63] == pytest.approx((slope[0] - 1) / 3)
    monkeypatch.setattr(explainability, "grad_cam", lambda a, g: -flat if a.shape[2:] == (2, 2) else real(a, g))
    assert not METHODS["refinecam"].maps(seen).any()


# Integrated Gradients


@pytest.mark.parametrize("key", FAMILIES)
def test_integrated_gradients_are_those_of_captum(networks, key):
    from captum.attr import IntegratedGradients

    seen, steps = seen_by(networks[key], noise(1), [0]), {"method": "gausslegendre", "n_steps": explainability.POINTS}
    pixels = IntegratedGradients(networks[key].network).attribute(seen.inputs, seen.reference, 0, **steps)
    raw = METHODS["ig"].maps(seen)
    assert raw.shape == (1, 96 // CELL, 96 // CELL)
    assert relative(raw - pixel_sums(pixels.float()), raw) < 1e-4


@pytest.mark.parametrize("size", (64, 100, 224, 300, 1000))
def test_cells_are_equal_and_keep_the_sum(size):
    maps = noise(2, size)
    cells = explainability.summed_over_cells(maps)
    assert cells.shape == (2, round(size / CELL), round(size / CELL))
    np.testing.assert_allclose(
        cells.double().sum(dim=(1, 2)), maps.double().sum(dim=(1, 2, 3)), rtol=1e-4, atol=1e-2
    )
    flat = explainability.summed_over_cells(torch.ones(1, 3, size, size))
    np.testing.assert_allclose(flat, 3 * (size / round(size / CELL)) ** 2, rtol=1e-5)


# Layer-wise relevance propagation


@pytest.mark.parametrize("key", FAMILIES)
def test_relevance_and_biases_make_up_the_score(networks, key):
    """y = sum(x g) + what the held network says of zeros, in float64."""
    network, inputs = copy.deepcopy(networks[key].network).double(), noise(2).double()
    classes = torch.tensor([1, 0])
    with explainability.held_factors(network, 2):
        gradients = explainability.input_gradients(network, inputs, classes)
        with torch.no_grad():
            scores, biases = network(torch.cat([inputs, torch.zeros_like(inputs)])).split(2)
    sums = (inputs * gradients).sum(dim=(1, 2, 3))
    np.testing.assert_allclose(sums, (scores - biases)[[0, 1], classes], rtol=1e-8)
    np.testing.assert_allclose(scores, network(inputs), rtol=1e-8)


def test_relevance_is_what_the_rule_of_each_layer_gives():
    """LRP-0 by its own rule, R_j = sum_k a_j w_jk R_k / z_k, activations passing relevance on."""
    network = torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(48, 5, bias=False),
        torch.nn.SiLU(),
        torch.nn.Linear(5, 1, bias=False),
    )
    pixels, hidden = noise(1, 4), network[:2]
    before = hidden(pixels.view(1, 3, 4, 4)).detach().double()[0]
    after = network[2](before.clone())
    second, first = network[3].weight.detach().double()[0], network[1].weight.detach().double()
    relevance = after * second  # of the hidden units: with one output, R_k / z_k is 1
    expected = (first * pixels.flatten().double() * (relevance / before)[:, None]).sum(dim=0)
    with explainability.held_factors(network, 1):
        gradients = explainability.input_gradients(network, pixels, torch.zeros(1, dtype=torch.long))
    np.testing.assert_allclose((pixels * gradients).flatten(), expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("key", FAMILIES)
def test_layers_have_their_own_forward_again_after_an_exception(networks, key):
    network = networks[key].network
    with pytest.raises(KeyError), explainability.held_factors(network, 1):
        swapped = [module for module in network.modules() if "forward" in vars(module)]
        assert {type(module).__name__ for module in swapped} <= HELD_LAYERS.keys() and len(swapped) > 20
        raise KeyError
    assert not any("forward" in vars(module) for module in network.modules())


def test_layers_that_multiply_and_are_not_known_are_refused():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Softplus(), torch.nn.Hardswish())
    with pytest.raises(ExplainError, match="^--method lrp: no rule for Hardswish, Softplus in this network; "):
        with explainability.held_factors(network, 1):
            pass
    assert not any("forward" in vars(module) for module in network.modules())


# Occlusion and SHAP


@pytest.mark.parametrize("key, stride", (("efficientnet", 8), ("convnext", 12)))
def test_occlusion_is_that_of_captum(networks, key, stride):
    from captum.attr import Occlusion

    exact = dataclasses.replace(networks[key], network=copy.deepcopy(networks[key].network).double())
    seen = seen_by(exact, noise(1, 5 * stride).double(), [1])
    given = seen.inputs, (3, 2 * stride, 2 * stride), (3, stride, stride), seen.reference, 1
    with torch.no_grad():
        pixels = Occlusion(exact.network).attribute(*given, perturbations_per_eval=16)
    expected = pixels[:, 0, ::stride, ::stride]
    raw = METHODS["occlusion"].maps(seen)
    assert raw.shape == (1, 5, 5)
    assert relative(raw - expected, raw) < 1e-4
    assert (raw < 0).any()


def test_batches_of_masked_inputs_are_no_larger_than_memory_has_room_for(networks):
    seen = forward_pass(networks["convnext"], noise(2, 64), None, at_once=3)
    comparing = [METHODS[method].maps for method in COMPARING]
    _, sizes = counted(seen.network, lambda: [maps(seen) for maps in comparing])
    assert max(sizes) == 3


def test_large_inputs_pass_in_smaller_batches(networks):
    for size, at_once in ((64, 8), (224, 8), (448, 2), (672, 1)):
        assert forward_pass(networks["convnext"], noise(1, size), None, at_once=8).at_once == at_once


def game(sets: np.ndarray) -> np.ndarray:
    """Worths of sets of nine players (M, 9) that help and hinder each other, two games: (2, M)."""
    weights = np.random.default_rng(5).normal(size=(2, 9))
    pairs = np.random.default_rng(6).normal(size=(9, 9)) / 9
    joint = np.einsum("mi,ij,mj->m", sets.astype(float), pairs, sets.astype(float))
    return (sets @ weights.T).T + np.stack([joint, np.tanh(joint)])


def enumerated(worth: dict[frozenset[int], float], players: int) -> list[float]:
    """Shapley values from the worths of all sets."""
    values = []
    for player in range(players):
        value = 0.0
        for size in range(players):
            share = math.factorial(size) * math.factorial(players - size - 1) / math.factorial(players)
            for others in itertools.combinations([each for each in range(players) if each != player], size):
                value += share * (worth[frozenset((*others, player))] - worth[frozenset(others)])
        values.append(value)
    return values


def test_shapley_values_are_those_of_enumeration():
    every = np.array(list(itertools.product((False, True), repeat=9)))
    sets = explainability.coalitions(9, 400)
    for index, worths in enumerate(game(every)):
        worth = {frozenset(np.flatnonzero(members).tolist()): value for members, value in zip(every, worths)}
        expected = np.array(enumerated(worth, 9))
        values = explainability.shapley_values(sets, game(sets)[index][None], worths[-1:] - worths[:1])[0]
        assert np.abs(values - expected).max() < 0.02 * np.abs(expected).max()
        assert values.sum() == pytest.approx(worths[-1] - worths[0], rel=1e-9)


def test_coalitions_are_pairs_of_complements_drawn_with_the_kernels_chance():
    sets = explainability.coalitions(9, 20_000)
    assert (sets[:10_000] == ~sets[10_000:]).all()
    sizes = np.bincount(sets.sum(axis=1), minlength=10) / len(sets)
    kernel = np.array([0, *(1 / (size * (9 - size)) for size in range(1, 9)), 0])
    np.testing.assert_allclose(sizes, kernel / kernel.sum(), atol=0.01)
    np.testing.assert_allclose(sets.mean(axis=0), 0.5, atol=1e-9)
    assert (explainability.coalitions(9, 100) == explainability.coalitions(9, 100)).all()


class Bright(torch.nn.Module):
    """One score: the sum of all pixels, cell by cell, the first cell's counted three times."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (inputs.sum(dim=(1, 2, 3)) + 2 * inputs[..., :32, :32].sum(dim=(1, 2, 3)))[:, None]


def test_shap_of_an_additive_network_is_the_difference_that_each_cell_makes():
    seen = seen_by_function(Bright(), noise(1, 224))
    expected = torch.nn.functional.avg_pool2d((seen.inputs - seen.reference).sum(dim=1), 32) * 32**2
    expected[:, 0, 0] *= 3
    raw = METHODS["shap"].maps(seen)
    assert relative(raw - expected, expected) < 1e-3


# What comes of it: remarks, files, table, console


def test_one_pass_serves_several_methods(networks):
    methods = ("gradcam", "refinecam", "ig", "lrp", "occlusion")
    given = networks["convnext"], noise(1, 64).numpy(), None, methods
    explanations, sizes = counted(given[0].network, lambda: explainability.explain_batch(*given))
    assert [each.method for each in explanations] == list(methods)
    assert sum(sizes) == explainability.passes_of(methods) - FEWER["occlusion"]
    assert explainability.passes_of(methods) < sum(METHODS[key].passes for key in methods)


def test_a_sum_that_is_off_by_more_than_5_percent_is_flagged():
    total = float(np.arange(-24, 26, dtype=np.float32).sum())
    raw_map = np.arange(-24, 26, dtype=np.float32).reshape(5, 10)
    good, bad = (an_explanation(method="ig", raw_map=raw_map, owed=total / share) for share in (0.96, 0.93))
    assert good.sum_error == pytest.approx(0.04) and bad.sum_error == pytest.approx(0.07)
    remarks = [list(explainability.method_remarks(each, np.float32([0.1, 0.9]), 3.0)) for each in (good, bad)]
    assert [len(each) for each in remarks] == [1, 2]
    assert remarks[1][1] == "The sum of the map by Integrated Gradients is off by 7%"
    job = Job(Path("wrist.jpg"), "wrist.jpg", (), (), "")
    results = [Result(job, explanations=(each,)) for each in (good, bad)]
    assert ["is off by 7%" in explainability.result_line(each) for each in results] == [False, True]


def test_rounding_of_a_sum_of_nothing_is_not_flagged():
    raw_map = np.float32([[1000, -1000.001], [0, 0]])
    assert an_explanation(method="ig", raw_map=raw_map, owed=0.0).sum_error == 0
    assert an_explanation(method="ig", raw_map=np.zeros((2, 2), np.float32), owed=1e-7).sum_error == 0
    assert an_explanation(method="ig", raw_map=raw_map + 1, owed=0.0).sum_error > 0.05


def test_what_the_network_says_of_the_reference_is_told():
    explanation = an_explanation(method="ig", owed=0.0)
    (told,) = explainability.method_remarks(explanation, np.float32([0.04, 0.96]), 3.0)
    assert told == "Compared with the blurred radiograph, which the network calls Simple Fracture, 96.0%"
    _, little, *_ = explainability.method_remarks(explanation, np.float32([0.04, 0.96]), 0.3)
    assert little.startswith("Comminuted Fracture scores +0.3 on the radiograph against it")


def test_negative_share_is_of_the_magnitude():
    assert an_explanation(raw_map=np.float32([[-1, 3], [0, 0]])).negative_share == 0.25
    assert an_explanation(raw_map=np.zeros((2, 2), np.float32)).negative_share == 0


def test_figures_of_grad_cam_keep_their_names_and_others_never_take_them():
    both = ("convnext", "efficientnet")
    assert explainability.page_prefixes(both, ("gradcam",)) == {
        "gradcam_convnext": (0,), "gradcam_efficientnet": (1,), "comparison": (0, 1)
    }  # fmt: skip
    assert explainability.page_prefixes(both, ("gradcam", "ig")) == {
        "gradcam_convnext": (0,), "ig_convnext": (1,), "gradcam_efficientnet": (2,), "ig_efficientnet": (3,),
        "comparison": (0, 2), "comparison_ig": (1, 3),
        "methods_convnext": (0, 1), "methods_efficientnet": (2, 3),
    }  # fmt: skip
    assert explainability.page_prefixes(("convnext",), ("lrp",)) == {"lrp_convnext": (0,)}


def test_pages_are_of_one_map_of_two_models_or_of_several_methods(monkeypatch):
    for name in ("explanation_figure", "comparison_figure", "methods_figure"):
        monkeypatch.setattr(explainability, name, lambda view, *shown, name=name: name)
    one, other = an_explanation(), an_explanation(method="ig")
    pages = [explainability.page_figure(None, each) for each in ([one], [one, one], [one, other])]
    assert pages == ["explanation_figure", "comparison_figure", "methods_figure"]


def test_a_run_has_columns_for_each_method_and_knows_what_is_finished(tiny_arguments, xray, tmp_path, capsys):
    def run(*methods: str) -> int:
        options = "--image", str(xray.parent), "--no-figures", "--save-maps", "--model", "convnext", "--skip-existing"
        return explainability.main([*tiny_arguments, *options, "--method", *methods])

    assert run("gradcam", "lrp") == 0
    (row,) = csv.DictReader((tmp_path / "figures" / "summary.csv").read_text("utf-8-sig").splitlines())
    raw_map = np.load(tmp_path / "figures" / "map_lrp_convnext_xray.npy")
    assert raw_map.min() < 0 < raw_map.max() and raw_map.shape == (28, 28)
    told, usual = (json.loads((tmp_path / "figures" / f"map_{kind}convnext_xray.json").read_text()) for kind in ("lrp_", ""))
    assert told["sum"] == pytest.approx(float(raw_map.sum(dtype=float))) == pytest.approx(told["sum_owed"], rel=1e-2)
    assert usual["sum_owed"] is None and usual["reference"] is None
    assert any("blurred radiograph" in remark for remark in told["remarks"])
    assert row["convnext_method"] == "gradcam" and "convnext_sum" not in row
    assert run("gradcam", "lrp") == 0 and "left alone: 1" in capsys.readouterr().out
    assert run("lrp") == 0 and "kept as summary_1.csv" in capsys.readouterr().err


def test_a_figure_of_other_methods_is_not_taken_for_this_one(tiny_arguments, xray):
    """methods_convnext_xray.png of two methods must not stand for that of three."""
    asked = [*tiny_arguments, "--image", str(xray), "--method", "gradcam", "lrp"]
    parsed = map(explainability.parsed, (asked, [*asked, "ig"], asked))
    two, three, again = (explainability.checked_request(args).jobs[0].digest for args in parsed)
    assert two == again != three


def test_another_method_takes_one_function_and_one_entry(tiny_arguments, xray, tmp_path, monkeypatch):
    def brightness(seen: ForwardPass) -> torch.Tensor:
        return seen.inputs.mean(dim=1)[:, ::32, ::32]

    monkeypatch.setitem(METHODS, "bright", explainability.Method("bright", "Brightness", "none", brightness, 1))
    options = "--image", str(xray), "--method", "bright", "--save-maps", "--no-figures"
    assert explainability.main([*tiny_arguments, *options]) == 0
    assert np.load(tmp_path / "figures" / "map_bright_efficientnet_xray.npy").shape == (7, 7)


def test_a_map_that_is_not_finite_is_refused(tiny_arguments, xray, monkeypatch, capsys):
    def broken(seen: ForwardPass) -> torch.Tensor:
        return seen.inputs[:, 0] / 0

    monkeypatch.setitem(METHODS, "broken", explainability.Method("broken", "Broken", "none", broken, 1))
    options = "--image", str(xray), "--method", "broken", "--no-figures"
    assert explainability.main([*tiny_arguments, *options]) == 1
    assert "the map by Broken is not finite; choose another --method" in capsys.readouterr().err


@pytest.mark.parametrize("method, unit, asks_again", (("ig", "pass", False), ("gradcam", "image", False), ("gradcam", "pass", True)))
def test_what_takes_long_counts_its_passes_on_a_terminal(networks, monkeypatch, method, unit, asks_again):
    """One image by Grad-CAM has no bar."""
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    plan = explainability.Plan([networks["convnext"]], [None], (method,), 4, None, asks_again)
    with explainability.progress_bar(plan, 1, False, False) as (bar, count_image):
        explainability.explain_batch(networks["convnext"], noise(1, 64).numpy(), None, (method,))
        assert bar.n == (METHODS[method].passes if unit == "pass" else 0)
        count_image()
        assert bar.n == bar.total == METHODS[method].passes + 19 * asks_again
        assert bar.unit == unit and not bar.disable
    with explainability.progress_bar(plan, 1, True, False) as (bar, _):
        assert bar.disable == (unit == "image")


@pytest.mark.slow
def test_signed_figures_and_methods_figures_are_drawn(tiny_arguments, xray, tmp_path):
    options = "--image", str(xray), "--method", "gradcam", "lrp", "--model", "convnext"
    assert explainability.main([*tiny_arguments, *options]) == 0
    plain = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert plain.keys() == {f"{kind}_convnext_xray.png" for kind in ("gradcam", "lrp", "methods")}
    assert explainability.main([*tiny_arguments, *options, "--signed"]) == 0
    assert all((tmp_path / "figures" / name).read_bytes() != page for name, page in plain.items())

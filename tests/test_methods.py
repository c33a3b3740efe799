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
import sys
from pathlib import Path

import numpy as np
import pytest

import explainability as tool
from conftest import an_explanation
from explainability import CELL, FAMILIES, METHODS, Classifier, ExplainError, ForwardPass, Job, Result

pytestmark = pytest.mark.slow  # the quick tests are for work in progress on other parts

torch = pytest.importorskip("torch")

SUM_ERRORS = {"ig": 0.05, "shap": 1e-4, "lrp": 1e-5}  # shares of the maps' magnitude
COMPARING = [key for key, method in METHODS.items() if method.compares]
SIZES = {
    "convnextv2": "atto femto pico nano tiny small base large huge",
    "tf_efficientnetv2": "s m l xl b0 b1 b2 b3",
}


def noise(count: int, size: int = 96, seed: int = 0) -> torch.Tensor:
    """Inputs with structure at all scales, (count, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    scales = [torch.randn((count, 3, cells, cells), generator=generator) for cells in (3, 12, size)]
    return sum(torch.nn.functional.interpolate(each, (size, size), mode="bilinear") for each in scales)


def livened(classifier: Classifier) -> Classifier:
    """A copy whose norms and biases are random, and whose BatchNorm statistics are those of such inputs."""
    classifier, generator = copy.deepcopy(classifier), torch.Generator().manual_seed(0)
    for weight in classifier.network.parameters():
        if weight.squeeze().ndim < 2:
            weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    for layer in classifier.network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # the plain mean of what it sees
            layer.reset_running_stats()
            layer.train()
    with torch.no_grad():
        classifier.network(noise(8, seed=1))
    classifier.network.eval()
    return classifier


@pytest.fixture(scope="module")
def networks(tiny_classifiers):
    """The tiny pair, livened up."""
    return {key: livened(each) for key, each in tiny_classifiers.items()}


FEWER = {"shap": 512 - 112, "occlusion": 13**2 - 4**2}  # passes than in use, below


@pytest.fixture(autouse=True)
def few_passes(monkeypatch):
    """What is tested of SHAP and occlusion does not depend on how many parts are covered in how many ways."""
    monkeypatch.setattr(tool, "COALITIONS", 112)
    monkeypatch.setattr(tool, "WINDOWS", 4)


def seen_by(classifier, inputs, classes=None):
    """What a pass tells methods; of these classes, or of the predicted ones."""
    family, wanted = classifier.model.family, classes if classes is None else torch.tensor(classes)
    told = tool.layer_gradients(classifier.network, family.target_layer, inputs, wanted)
    return ForwardPass(classifier.network, family.finer_layer, inputs, *told, 4, ())


def seen_by_function(network, inputs):
    """What methods that look at inputs and scores alone need to know of any function of one score."""
    nothing, logits = torch.zeros(len(inputs), 1, 1, 1), network(inputs)
    return ForwardPass(network, "", inputs, logits, nothing[:, 0, 0, 0].long(), nothing, nothing, 4, ())


def counted(network, function):
    """What a function returns, and the sizes of the batches that the network was given for it."""
    sizes = []
    with network.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0]))):
        return function(), sizes


def relative(difference: torch.Tensor, scale: torch.Tensor) -> float:
    return float(difference.abs().max() / scale.abs().max())


# The table, and the record behind it


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("key", FAMILIES)
def test_each_image_has_a_map_of_its_own_class_that_sums_to_what_it_owes(networks, key, method):
    inputs, classes = noise(2, 100), [1, 0]  # of a size that no grid divides
    seen, maps, owed = seen_by(networks[key], inputs, classes), METHODS[method].maps, METHODS[method].owed
    together = maps(seen)
    assert together.dtype == torch.float32 and together.ndim == 3 and together.isfinite().all()
    assert relative(together[0] - together[1], together[0]) > 0.01
    for index, of_class in enumerate(classes):
        alone = seen_by(networks[key], inputs[index : index + 1], [of_class])
        difference = together[index] - maps(alone)[0]
        assert relative(difference, together[index]) < 1e-3  # least squares amplify SHAP's rounding
        if owed:
            assert relative(owed(seen)[index] - owed(alone)[0], owed(alone)[0]) < 1e-3
            error = together[index].double().sum() - owed(seen)[index]
            assert relative(error, together[index].abs().sum()) < SUM_ERRORS[method]
    if method in ("ig", "shap"):
        differences = seen.logits - networks[key].network(seen.reference)
        np.testing.assert_allclose(owed(seen), differences[[0, 1], classes], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("key", FAMILIES)
def test_a_method_keeps_to_its_passes_gives_the_same_bytes_and_leaves_nothing(networks, key, method):
    network, told = networks[key].network, METHODS[method]

    def ask():
        seen = seen_by(networks[key], noise(1, 64))
        maps, _ = told.maps(seen), told.owed and told.owed(seen)
        if told.compares:
            assert seen.reference_logits.shape == (1, 2)  # for what is said of it
        return maps.numpy().tobytes()

    first, sizes = counted(network, ask)
    assert sum(sizes) == told.passes - FEWER.get(method, 0)
    with torch.no_grad():
        assert ask() == first
    assert not any(module._forward_hooks or "forward" in vars(module) for module in network.modules())
    assert all(weight.grad is None and not weight.requires_grad for weight in network.parameters())


@pytest.mark.parametrize("architecture", [f"{name}_{size}" for name in SIZES for size in SIZES[name].split()])
def test_every_size_of_both_families_has_known_layers_and_a_finer_grid(architecture):
    (family,) = (each for each in FAMILIES.values() if each.names.fullmatch(architecture))
    network, shapes = tool.build_network(architecture, 2).eval(), []
    with tool.held_factors(network, 1):  # refuses layers that it has no rule for
        assert any("forward" in vars(layer) for layer in network.modules())
    for path in (family.target_layer, family.finer_layer):
        watch = network.get_submodule(path).register_forward_hook
        watch(lambda layer, inputs, output: shapes.append(output.shape[2:]))
    network(torch.empty(1, 3, 224, 224, device="meta"))
    assert sorted(shapes) == [(7, 7), (14, 14)]


def test_passes_take_no_more_inputs_than_memory_has_room_for_and_scores_their_scale(networks):
    seen = tool.forward_pass(networks["convnext"], noise(2, 64), None, at_once=3)
    model = dataclasses.replace(networks["convnext"].model, score_scale=2.0)  # one logit for two classes
    methods = [METHODS[key] for key in COMPARING]
    told, sizes = counted(seen.network, lambda: [tool.explanations_of(model, seen, each) for each in methods])
    assert max(sizes) == 3
    assert all(each.sum_error < 0.01 for pair in told for each in pair if each.method != "ig")
    for size, at_once in ((224, 8), (448, 2), (672, 1)):
        assert tool.forward_pass(networks["convnext"], noise(1, size), None, 8).at_once == at_once


# The reference


def test_the_reference_is_the_radiograph_under_a_gaussian_blur_of_12_in_224_pixels():
    ndimage = pytest.importorskip("scipy.ndimage")
    for size in (224, 448):
        inputs, middle = noise(1, size), slice(size * 3 // 8, size * 5 // 8)  # out of the edges' reach
        expected = ndimage.gaussian_filter(inputs[0, 0].double().numpy(), size * 12 / 224, truncate=6)
        blurred = seen_by_function(torch.nn.Flatten(), inputs).reference[0, 0]
        np.testing.assert_allclose(blurred[middle, middle], expected[middle, middle], atol=2e-3)


@pytest.mark.parametrize("key", FAMILIES)
def test_a_flat_image_has_no_evidence_rather_than_noise(networks, key):
    seen = seen_by(networks[key], torch.tensor([-2.1, 0.3, 1.7]).view(1, 3, 1, 1).repeat(1, 1, 64, 64))
    assert torch.equal(seen.reference, seen.inputs)
    for method in COMPARING:
        assert not METHODS[method].maps(seen).any()


# Grad-CAM++ and RefineCAM


@pytest.mark.parametrize("scale", (1, 1e-3, 1e-9))  # small gradients must not drown in an epsilon
@pytest.mark.parametrize("key", FAMILIES)
def test_grad_cam_plus_plus_is_equation_19(networks, key, scale):
    """As the paper writes it, in float64; negative sums count as zero."""
    seen = seen_by(networks[key], noise(1))
    activations, gradients = seen.activations.double(), scale * seen.gradients.double()
    total = activations.sum(dim=(2, 3), keepdim=True)
    alpha = gradients**2 / (2 * gradients**2 + total.clamp(min=0) * gradients**3)
    weights = (alpha * gradients).where(gradients > 0, 0).sum(dim=(2, 3), keepdim=True)
    expected = (weights * activations).sum(dim=1)
    raw = METHODS["gradcam++"].maps(dataclasses.replace(seen, gradients=scale * seen.gradients))
    assert relative(raw - expected, expected) < 1e-4 and (total < 0).any()


@pytest.mark.parametrize("key", FAMILIES)
def test_refine_cam_is_that_of_pytorch_grad_cam(networks, key):
    from pytorch_grad_cam import GradCAM, RefineCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    inputs, family = noise(2, 224), FAMILIES[key]
    sharper = copy.deepcopy(networks[key])
    network = sharper.network.requires_grad_(True)
    network.get_submodule(family.head).weight.data *= 1000  # theirs adds 1e-7 to each maximum
    layers = [network.get_submodule(layer) for layer in (family.target_layer, family.finer_layer)]
    targets = [ClassifierOutputTarget(each) for each in (1, 0)]
    expected = RefineCAM(network, layers, base_method=GradCAM)(inputs, targets)
    network.requires_grad_(False)
    raw = METHODS["refinecam"].maps(seen_by(sharper, inputs, [1, 0]))
    assert expected.shape == raw.shape == (2, 224, 224)
    for ours, theirs in zip(raw.numpy(), expected):
        assert theirs.max() > 0.99 and np.abs(tool.normalised(ours) - theirs).max() < 1e-4


def test_a_constant_factor_takes_nothing_from_the_other(networks, monkeypatch):
    seen, flat = seen_by(networks["convnext"], noise(1, 64), [1]), torch.ones(1, 2, 2)
    slope = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])  # above zero everywhere: the least is no evidence
    heat = (slope - 1) / 3
    for coarse, finer, corners in ((flat, slope, heat), (slope, flat, heat), (-flat, slope, 0 * flat)):
        given = iter((coarse, finer))
        monkeypatch.setattr(tool, "grad_cam", lambda *_, given=given: next(given))
        assert METHODS["refinecam"].maps(seen)[:, ::63, ::63].numpy() == pytest.approx(corners.numpy())


def test_what_the_maps_of_layers_are_made_of_is_told():
    view, told = tool.View(np.zeros((9, 9, 3), np.uint8), "", tool.FigureStyle()), {}
    for method in ("refinecam", "gradcam++", "ig"):
        sheet = tool.Sheet(view, 9)
        tool.provenance_block(sheet, 0, 0, 9, an_explanation(method=method))
        told[method] = ", ".join(line.text for line in sheet.items)
    parts = "Target layer, stages.3 and stages.2, Map, 2 grids, interpolated to 7×7 pixels, then multiplied, "
    assert parts in told["refinecam"]
    parts = "Target layer, stages.3, Map, 7×7 grid, interpolated; a cell is 1/49 of the image, "
    assert parts in told["gradcam++"] and "Target layer" not in told["ig"]


# Integrated Gradients


@pytest.mark.parametrize("key", FAMILIES)
def test_integrated_gradients_are_those_of_captum(networks, key):
    from captum.attr import IntegratedGradients

    seen, rule = seen_by(networks[key], noise(1), [0]), "gausslegendre"
    given = seen.inputs, seen.reference, 0, None, tool.POINTS, rule
    pixels = IntegratedGradients(networks[key].network).attribute(*given).float()
    expected = torch.nn.functional.avg_pool2d(pixels.sum(dim=1), CELL) * CELL**2
    raw = METHODS["ig"].maps(seen)
    assert raw.shape == (1, 96 // CELL, 96 // CELL) and relative(raw - expected, raw) < 1e-4


@pytest.mark.parametrize("size", (64, 100, 224, 300, 1000))
def test_cells_are_equal_and_keep_the_sum(size):
    maps, count = noise(2, size), round(size / CELL)
    cells, sums = tool.summed_over_cells(maps), maps.double().sum(dim=(1, 2, 3))
    assert cells.shape == (2, count, count)
    np.testing.assert_allclose(cells.double().sum(dim=(1, 2)), sums, rtol=1e-4, atol=1e-2)
    flat = tool.summed_over_cells(torch.ones(1, 3, size, size))
    np.testing.assert_allclose(flat, 3 * (size / count) ** 2, rtol=1e-5)


# Layer-wise relevance propagation


@pytest.mark.parametrize("key", FAMILIES)
def test_relevance_and_biases_make_up_the_score(networks, key):
    """y = sum(x g) + what the held network says of zeros, in float64."""
    network, inputs = copy.deepcopy(networks[key].network).double(), noise(2).double()
    classes = torch.tensor([1, 0])
    with tool.held_factors(network, 2):
        gradients = tool.input_gradients(network, inputs, classes)
        scores, biases = network(torch.cat([inputs, torch.zeros_like(inputs)])).split(2)
    sums = (inputs * gradients).sum(dim=(1, 2, 3))
    np.testing.assert_allclose(sums, (scores - biases)[[0, 1], classes], rtol=1e-8)
    np.testing.assert_allclose(scores, network(inputs), rtol=1e-8)


def test_relevance_is_what_the_rule_of_each_layer_gives():
    """LRP-0 by its own rule, R_j = sum_k a_j w_jk R_k / z_k, activations passing relevance on."""
    into, out = torch.nn.Linear(48, 5, bias=False), torch.nn.Linear(5, 1, bias=False)
    network, pixels = torch.nn.Sequential(torch.nn.Flatten(), into, torch.nn.SiLU(), out), noise(1, 4)
    first, second = into.weight.detach().double(), out.weight.detach().double()[0]
    before = first @ pixels.flatten().double()
    relevance = before * before.sigmoid() * second  # of the hidden units: with one output, R_k / z_k is 1
    expected = (first * pixels.flatten().double() * (relevance / before)[:, None]).sum(dim=0)
    with tool.held_factors(network, 1):
        gradients = tool.input_gradients(network, pixels, torch.zeros(1, dtype=torch.long))
    np.testing.assert_allclose((pixels * gradients).flatten(), expected, rtol=1e-3, atol=1e-7)


def test_layers_have_their_own_forward_again_and_unknown_ones_are_refused(networks):
    unknown = torch.nn.Sequential(torch.nn.GELU(), torch.nn.Softplus(), torch.nn.Hardswish())
    message = "^--method lrp: no rule for Hardswish, Softplus in this network; "
    with pytest.raises(ExplainError, match=message), tool.held_factors(unknown, 1):
        pass
    for network in (each.network for each in networks.values()):
        with pytest.raises(KeyError), tool.held_factors(network, 1):
            swapped = {type(module).__name__ for module in network.modules() if "forward" in vars(module)}
            assert len(swapped) > 1 and swapped <= tool.HELD_LAYERS.keys()
            raise KeyError
        assert not any("forward" in vars(module) for module in (*network.modules(), *unknown))


# Occlusion and SHAP


@pytest.mark.parametrize("key, stride", (("efficientnet", 8), ("convnext", 12)))
def test_occlusion_is_that_of_captum(networks, key, stride):
    from captum.attr import Occlusion

    exact = copy.deepcopy(networks[key])
    exact.network.double()
    seen = seen_by(exact, noise(1, 5 * stride).double(), [1])
    given = seen.inputs, (3, 2 * stride, 2 * stride), (3, stride, stride), seen.reference, 1
    with torch.no_grad():
        pixels = Occlusion(exact.network).attribute(*given, perturbations_per_eval=16)
    raw = METHODS["occlusion"].maps(seen)
    assert raw.shape == (1, 5, 5) and (raw < 0).any()
    assert relative(raw - pixels[:, 0, ::stride, ::stride], raw) < 1e-4


def test_shapley_values_are_those_of_enumeration():
    """Two games of eight players that help and hinder each other: means over all orders of joining."""
    generator = np.random.default_rng(5)
    weights, pairs = generator.normal(size=(2, 8)), generator.normal(size=(8, 8)) / 8

    def game(sets: np.ndarray) -> np.ndarray:
        joint = np.einsum("mi,ij,mj->m", sets.astype(float), pairs, sets.astype(float))
        return weights @ sets.T + np.stack([joint, np.tanh(joint)])

    every = game(np.arange(256)[:, None] >> np.arange(8) & 1)  # (2, 256), by the set's bits
    orders = np.array(list(itertools.permutations(range(8))))
    joined = np.cumsum(1 << orders, axis=1)
    gains = every[:, joined] - every[:, joined - (1 << orders)]  # (2, orders, 8)
    expected = np.stack([gains[:, orders == player].mean(axis=1) for player in range(8)], axis=1)
    sets = tool.coalitions(8, 400)
    values = tool.shapley_values(sets, game(sets), every[:, -1] - every[:, 0])
    assert np.abs(values - expected).max() < 0.02 * np.abs(expected).max()
    assert values.sum(axis=1) == pytest.approx(every[:, -1] - every[:, 0], rel=1e-9)


def test_coalitions_are_pairs_of_complements_drawn_with_the_kernels_chance():
    sets = tool.coalitions(9, 20_000)
    assert (sets[:10_000] == ~sets[10_000:]).all()
    sizes = np.bincount(sets.sum(axis=1), minlength=10) / len(sets)
    kernel = np.array([0, *(1 / (size * (9 - size)) for size in range(1, 9)), 0])
    np.testing.assert_allclose(sizes, kernel / kernel.sum(), atol=0.01)
    np.testing.assert_allclose(sets[:10_000].mean(axis=0), 0.5, atol=0.02)


def test_shap_of_an_additive_network_is_the_difference_that_each_cell_makes():
    def bright(inputs: torch.Tensor) -> torch.Tensor:
        """The sum of all pixels, those of the first of 7 x 7 cells counted three times."""
        return (inputs.sum(dim=(1, 2, 3)) + 2 * inputs[..., :32, :32].sum(dim=(1, 2, 3)))[:, None]

    seen = seen_by_function(bright, noise(1, 224))
    expected = torch.nn.functional.avg_pool2d((seen.inputs - seen.reference).sum(dim=1), 32) * 32**2
    expected[:, 0, 0] *= 3
    assert relative(METHODS["shap"].maps(seen) - expected, expected) < 1e-3


# What comes of it: remarks, files, table, console


def test_a_sum_that_is_off_by_more_than_5_percent_is_told_and_rounding_is_not():
    raw_map, job = np.arange(-24, 26, dtype=np.float32).reshape(5, 10), Job(Path("a"), "a", (), (), "")
    for share, times in ((0.96, 0), (0.93, 2)):
        each = an_explanation(method="ig", raw_map=raw_map, owed=float(raw_map.sum()) / share)
        assert each.sum_error == pytest.approx(1 - share)
        remarks = tool.method_remarks(each, np.float32([0.1, 0.9]), 3.0)
        said = "\n".join([*remarks, tool.result_line(Result(job, explanations=(each,)))])
        assert said.count("The sum of the map by Integrated Gradients is off by 7%") == times
    raw_map, nothing = np.float32([[1000, -1000.001], [0, 0]]), np.zeros((2, 2), np.float32)
    assert an_explanation(raw_map=raw_map, owed=0.0).sum_error == 0
    empty = an_explanation(raw_map=nothing, owed=1e-7)
    assert empty.sum_error == empty.negative_share == 0
    assert an_explanation(raw_map=raw_map + 1, owed=0.0).sum_error > 0.05


def test_what_the_network_says_of_the_reference_is_told():
    explanation, probabilities = an_explanation(method="ig", owed=0.0), np.float32([0.04, 0.96])
    for gain, more in ((3.0, []), (0.3, ["Comminuted Fracture scores +0.3 on the radiograph against it"])):
        told, *others = tool.method_remarks(explanation, probabilities, gain)
        assert told == "Compared with the blurred radiograph, which the network calls Simple Fracture, 96.0%"
        assert [text.partition(":")[0] for text in others] == more


@pytest.fixture
def run(tiny_arguments, xray, tmp_path):
    """Explains one radiograph with ConvNeXt V2 by these methods, comma-separated."""
    given = [*tiny_arguments, "--image", str(xray), "--model", "convnext"]
    return lambda methods, *options: tool.main([*given, f"--method={methods}", *options])


def test_a_run_has_columns_for_each_method_and_knows_what_is_finished(run, xray, tmp_path, capsys):
    out, options = tmp_path / "figures", ("--no-figures", "--save-maps", "--skip-existing")
    asked = "gradcam,lrp", f"--image={xray.parent}", *options
    assert run(*asked) == 0
    (row,) = csv.DictReader((out / "summary.csv").read_text("utf-8-sig").splitlines())
    raw_map = np.load(out / "map_lrp_convnext_xray.npy")
    assert raw_map.min() < 0 < raw_map.max() and raw_map.shape == (28, 28)
    told, usual = (json.loads((out / f"map_{kind}convnext_xray.json").read_text()) for kind in ("lrp_", ""))
    assert told["sum"] == pytest.approx(raw_map.sum(dtype=float)) == pytest.approx(told["sum_owed"], rel=1e-2)
    assert usual["sum_owed"] is None and usual["reference"] is None
    assert any("blurred radiograph" in remark for remark in told["remarks"])
    assert row["convnext_method"] == "gradcam" and "convnext_sum" not in row
    assert run(*asked) == 0 and "left alone: 1" in capsys.readouterr().out
    assert run("lrp", *asked[1:]) == 0 and "kept as summary_1.csv" in capsys.readouterr().err


def test_another_method_is_one_function_and_one_entry_and_must_be_finite(run, tmp_path, monkeypatch, capsys):
    def bright(seen: ForwardPass) -> torch.Tensor:
        return seen.inputs.mean(dim=1)[:, ::32, ::32]

    for key, maps in (("bright", bright), ("broken", lambda seen: bright(seen) / 0)):
        monkeypatch.setitem(METHODS, key, tool.Method(key, key.capitalize(), "none", maps, 1))
    assert run("bright", "--save-maps", "--no-figures") == 0
    assert np.load(tmp_path / "figures" / "map_bright_convnext_xray.npy").shape == (7, 7)
    assert run("broken", "--no-figures") == 1
    assert "the map by Broken is not finite; choose another --method" in capsys.readouterr().err


def test_signed_figures_and_methods_figures_are_drawn(run, tmp_path, monkeypatch):
    drawn, draw = [], tool.methods_figure
    monkeypatch.setattr(tool, "methods_figure", lambda view, shown: drawn.extend(shown) or draw(view, shown))
    assert run("gradcam,lrp") == 0
    plain = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert plain.keys() == {f"{kind}_convnext_xray.png" for kind in ("gradcam", "lrp", "methods")}
    assert [each.method for each in drawn] == ["gradcam", "lrp"]
    assert run("gradcam,lrp", "--signed") == 0
    assert all((tmp_path / "figures" / name).read_bytes() != page for name, page in plain.items())


LONG = (("gradcam refinecam ig lrp occlusion", 207, 0), ("gradcam", 1, 0), ("gradcam", 1, 19))


@pytest.mark.parametrize("methods, passes, more", LONG)
def test_what_takes_long_counts_its_passes_on_a_terminal(networks, monkeypatch, methods, passes, more):
    """One image by Grad-CAM has no bar."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    methods, is_long = methods.split(), passes + more > 1
    args = tool.parsed(["--method", *methods, *(["--verify"] if more else [])])
    request = tool.Request(args, (), False, (), None, classifiers=[networks["convnext"]])
    with tool.progress_bar(request, 1) as (bar, count_image):
        told = tool.explain_batch(networks["convnext"], noise(1, 64).numpy(), None, methods)
        assert [each.method for each in told] == methods
        assert bar.n == (passes - sum(FEWER.get(method, 0) for method in methods) if is_long else 0)
        count_image()
        assert bar.n == bar.total == passes + more
        assert bar.unit == ("pass" if is_long else "image") and not bar.disable
    with tool.progress_bar(dataclasses.replace(request, is_single=True), 1) as (bar, _):
        assert bar.disable == (not is_long)

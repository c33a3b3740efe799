"""A GPU without a GPU: tensors that compute on the CPU, name another device and meet none that lie elsewhere."""

from __future__ import annotations

import copy
import dataclasses
import functools

import numpy as np
import pytest

import explainability
from conftest import an_explanation
from explainability import FAMILIES, METHODS, Landmarks

torch = pytest.importorskip("torch")
from torch.utils import _pytree, backend_registration  # noqa: E402

pytestmark = pytest.mark.slow  # the quick tests are for work in progress on other parts

INPUTS = np.random.default_rng(6).normal(size=(2, 3, 48, 48)).astype(np.float32)
NAME = "_setup_privateuseone_for_python_backend"
if not hasattr(backend_registration, NAME):
    pytest.skip("this torch registers no devices in Python", allow_module_level=True)


class Elsewhere(torch.Tensor):
    """A tensor on another device, as far as anyone can tell; its values are in `held`, on the CPU."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        like = {"dtype": held.dtype, "strides": held.stride(), "storage_offset": held.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), device="other:0", **like)

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def numpy(self, *given: object, **options: object) -> np.ndarray:
        raise TypeError("a tensor on another device has no array")

    def tolist(self) -> list:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, given=(), options=None):
        is_copy = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        tensors = [each for each in _pytree.tree_leaves(given) if isinstance(each, torch.Tensor)]
        if not is_copy and any(each.ndim and not isinstance(each, cls) for each in tensors):
            raise RuntimeError(f"{function}: expected all tensors to be on the same device")
        options = dict(options or {})
        stays = options.pop("device", None) != torch.device("cpu")
        held, of_held = _pytree.tree_map_only(cls, lambda each: each.held, (given, options))
        result = function(*held, **of_held)
        if function._schema.name.endswith("_"):  # in place
            return given[0]
        return _pytree.tree_map_only(torch.Tensor, cls, result) if stays else result


@pytest.fixture(scope="module")
def library():
    """Registers the device, and how empty tensors are made there."""
    getattr(backend_registration, NAME)("other")
    rules = torch.library.Library("aten", "IMPL")

    def made_by(make, *given, dtype=None, **options):
        return Elsewhere(make(*given, dtype=dtype))

    for name, make in (("empty.memory_format", torch.empty), ("empty_strided", torch.empty_strided)):
        rules.impl(name, functools.partial(made_by, make), "PrivateUse1")
    # Its threads are started before there is the device.
    with torch.autograd.set_multithreading_enabled(False):
        yield rules
    rules._destroy()


def elsewhere(classifier):
    """The same classifier on the other device."""
    network = copy.deepcopy(classifier.network)
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            module._parameters[name] = torch.nn.Parameter(Elsewhere(weight.data), requires_grad=False)
        for name, each in module.named_buffers(recurse=False):
            module._buffers[name] = Elsewhere(each)
    return dataclasses.replace(classifier, network=network)


@pytest.mark.parametrize("key", FAMILIES)
def test_every_method_and_verify_give_the_maps_of_the_cpu(library, tiny_classifiers, monkeypatch, key):
    for name, few in {"POINTS": 3, "PLAYERS": 2, "COALITIONS": 8, "WINDOWS": 2, "MOVED_MASKS": 2}.items():
        monkeypatch.setattr(explainability, name, few)
    pair = tiny_classifiers[key], elsewhere(tiny_classifiers[key])
    assert pair[1].device.type == "other"
    here, there = (explainability.explain_batch(each, INPUTS, 1, METHODS) for each in pair)
    for one, other in zip(here, there, strict=True):
        np.testing.assert_allclose(other.raw_map, one.raw_map, rtol=1e-3, atol=1e-6, err_msg=one.method)
    landmarks = Landmarks(np.ones((7, 7)), ((5, 5, 30, 30),))
    here, there = (explainability.tried(each, INPUTS[1], an_explanation(), landmarks, 4) for each in pair)
    for name in ("blurred", "added", "covered", "erased"):
        assert np.abs(getattr(here, name) - getattr(there, name)).max() < 1e-6


def test_a_forgotten_move_to_the_device_is_caught(library, tiny_classifiers, monkeypatch):
    classifier = elsewhere(tiny_classifiers["efficientnet"])
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        explainability.forward_pass(classifier, torch.from_numpy(INPUTS), 1, 4)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor)
    with pytest.raises(TypeError, match="no array"):
        explainability.explain_batch(classifier, INPUTS, 1)

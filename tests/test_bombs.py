"""Checkpoints of a few kilobytes that unfold to gigabytes or hours, and honest ones that look like them."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest

import explainability as tool
from conftest import ROOT, TINY, save, users_checkpoint

# Parts of a pickle, protocol 2


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def whole(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little")
    return b"\x8a" + bytes([len(data)]) + data


def name(module: str, function: str) -> bytes:
    return f"c{module}\n{function}\n".encode()


def doubled(levels: int, start: bytes = b")") -> bytes:
    """A tuple of twice the same tuple of twice the same tuple ..."""
    return start + b"q\0h\0\x86" * levels


def doubled_list(levels: int) -> bytes:
    return b"]" + b"q\0](h\0h\0e" * levels


def doubled_list_from_above(levels: int) -> bytes:
    """Each list is put into its parent before it holds anything."""
    lists = b"".join(b"]q" + bytes([level]) for level in range(levels))
    filled = b"".join(b"h" + bytes([level + 1]) + b"(" + b"h" + bytes([level]) * 1 + b"h" + bytes([level]) + b"e" for level in range(levels - 1))
    return lists + filled


def called(module: str, function: str, *arguments: bytes) -> bytes:
    return name(module, function) + b"(" + b"".join(arguments) + b"tR"


def in_dictionary(value: bytes) -> bytes:
    """A checkpoint that holds this beside nothing else."""
    return b"}" + text("model_state_dict") + value + b"s"


def storage(numbers: int, kind: str = "FloatStorage", key: bytes = text("0"), origin: bytes = text("cpu"), *more: bytes) -> bytes:
    return b"(" + text("storage") + name("torch", kind) + key + origin + whole(numbers) + b"".join(more) + b"tQ"


def tensor(stored: bytes, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    numbers = [b"(" + b"".join(map(whole, values)) + b"t" for values in (shape, stride)]
    hooks = called("collections", "OrderedDict")
    return called("torch._utils", "_rebuild_tensor_v2", stored, whole(0), *numbers, b"\x89", hooks)


def hexed(levels: int) -> bytes:
    """Bytes whose every encoding is twice as long."""
    made = called("_codecs", "encode", text("a" * 1000), text("latin1"))
    for _ in range(levels):
        made = called("_codecs", "encode", made, text("hex"))
    return made


def hidden_hexed(levels: int) -> bytes:
    made = called("_codecs", "encode", text("a" * 1000), text("latin1"))
    for _ in range(levels):
        made = name("_codecs", "encode") + b"(" + made + text("hex") + text("latin1") + b"tR"
    return made


COLLIDING = b"}(" + b"".join(whole(number * (2**61 - 1)) + b"N" for number in range(1, 150_000)) + b"u"
EVERY_CHARACTER = "".join(map(chr, range(0x100, 0xD800)))

BOMBS: dict[str, Callable[[], bytes]] = {  # the part of a pickle between its protocol and its end
    "a key that doubles": lambda: b"}" + doubled(60) + b"Ns",
    "a key that is hashed over and over": lambda: doubled(20) + b"q\1" + b"}(" + b"h\1N" * 20_000 + b"u",
    "a set of tuples that double": lambda: called("__builtin__", "set", b"](" + doubled(60) + b"e"),
    "a set made over and over": lambda: b"](" + doubled(18) + b"eq\1" + b"](" + called("__builtin__", "set", b"h\1") * 20_000 + b"e",
    "a counter of tuples that double": lambda: called("collections", "Counter", b"](" + doubled(60) + b"e"),
    "a dictionary from pairs that double": lambda: called("collections", "OrderedDict", b"](" + doubled(60) + b"N\x86e"),
    "a storage's key that doubles": lambda: in_dictionary(tensor(storage(1, key=doubled(60)), (1,), (1,))),
    "a storage's place that doubles": lambda: in_dictionary(tensor(storage(1, origin=doubled(60)), (1,), (1,))),
    "a storage's kind that doubles": lambda: b"(" + text("storage") + doubled_list(60) + text("0") + text("cpu") + b"K\1tQ",
    "a function that is a list": lambda: doubled_list(60) + b")R",
    "a class that is a list": lambda: doubled_list(60) + b")\x81",
    "a function that is a list, filled from above": lambda: doubled_list_from_above(60) + b"h\x3b)R",
    "a shape that doubles": lambda: called("torch._utils", "_rebuild_tensor_v2", storage(1), b"K\0", doubled(60), b")", b"\x89", b"N"),
    "a device that doubles": lambda: called("torch", "device", doubled(60)),
    "a size that doubles": lambda: called("torch", "Size", doubled(60)),
    "a layout that doubles": lambda: called("torch.serialization", "_get_layout", doubled(60)),
    "attributes that double": lambda: called("collections", "OrderedDict") + b"}" + doubled(60) + b"Nsb",
    "a tuple a million deep as a key": lambda: b"})" + b"\x85" * 1_000_000 + b"Ns",
    "lists a million deep": lambda: b"]" * 1_000_000 + b"a" * 999_999,
    "dictionaries a million deep": lambda: b"}" + (b"N}") * 500_000 + b"s" * 500_000,
    "bytes that double": lambda: in_dictionary(hexed(40)),
    "bytes that double, with a third argument": lambda: in_dictionary(hidden_hexed(40)),
    "an encoding of quadratic time": lambda: called("_codecs", "encode", text(EVERY_CHARACTER * 10), text("punycode")),
    "a bytearray": lambda: called("__builtin__", "bytearray", whole(10**10)),
    "a bytearray through another function": lambda: called(
        "torch._tensor", "_rebuild_from_type_v2", name("__builtin__", "bytearray"), b"N", b"(" + whole(10**10) + b"t", b"}"
    ),
    "a tensor made by its class": lambda: called("torch", "FloatTensor", whole(10**5), whole(10**5)),
    "a tensor made by its class, as an object": lambda: name("torch", "Tensor") + b"(" + whole(10**10) + b"t\x81",
    "tensors from a list": lambda: b"](" + b"K\1" * 100_000 + b"eq\1" + b"](" + called("torch", "Tensor", b"h\1") * 10_000 + b"e",
    "a storage made by its class": lambda: called("torch.storage", "UntypedStorage", whole(10**10)),
    "a counter of a text over and over": lambda: text("ab" * 500_000) + b"q\1" + b"](" + called("collections", "Counter", b"h\1") * 10_000 + b"e",
    "sets of every character": lambda: text(EVERY_CHARACTER) + b"q\1" + b"](" + called("__builtin__", "set", b"h\1") * 1000 + b"e",
    "numbers that collide": lambda: COLLIDING,
    "a view of one number as a billion": lambda: in_dictionary(b"}" + text("conv_stem.weight") + tensor(storage(1), (10**5, 10**5), (0, 0)) + b"s"),
    "a view beyond its storage": lambda: in_dictionary(b"}" + text("conv_stem.weight") + tensor(storage(1), (10**10,), (1,)) + b"s"),
    "a shape beyond all numbers": lambda: in_dictionary(b"}" + text("conv_stem.weight") + tensor(storage(1), (2**62, 2**62), (0, 0)) + b"s"),
    "a storage of ten billion numbers": lambda: in_dictionary(
        b"}" + text("conv_stem.weight") + tensor(storage(10**10), (10**10,), (1,)) + b"s"
    ),
    "a storage of more than all numbers": lambda: in_dictionary(tensor(storage(2**2000), (1,), (1,))),
    "millions of dictionaries": lambda: b"}" * 20_000_000,
    "millions of dictionaries in lists": lambda: b"](" + (b"](" + b"}" * 1000 + b"e") * 20_000 + b"e",
    "as many as are allowed": lambda: b"](" + (b"](" + b"}" * 1000 + b"e") * 225 + b"e",
    "as many numbers as are allowed": lambda: b"](" + (b"](" + b"N" * 1000 + b"e") * 950 + b"e",
    "millions of marks": lambda: b"(" * 20_000_000,
    "a text longer than the file": lambda: b"X\xff\xff\xff\xffabc",
    "a long text of eight bytes' length": lambda: b"\x8d" + (2**60).to_bytes(8, "little") + b"abc",
    "a number of gigabytes": lambda: b"\x8b\xff\xff\xff\x7fabc",
    "a number in words": lambda: b"L" + b"9" * 2_000_000 + b"L\n",
    "a memo of four billion": lambda: b"Nr\xff\xff\xff\xff",
    "frames of exabytes": lambda: b"\x95" + (2**62).to_bytes(8, "little") + b"N",
}


def archived(structure: bytes, path: Path) -> None:
    """As torch.save writes since 1.6, with one storage of four bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + structure + b".")
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", bytes(4))
        archive.writestr("archive/version", "3\n")


def in_old_container(structure: bytes, path: Path) -> None:
    """As torch.save wrote before 1.6."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    start = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, system))
    path.write_bytes(start + b"\x80\x02" + structure.replace(b"tQ", b"NtQ") + b"." + pickle.dumps(["0"], 2) + (1).to_bytes(8, "little") + bytes(4))


CHECK = """
import json, os, resource, signal, sys, time
import torch, timm, explainability as tool
out = {}
for path in sys.argv[1:]:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        signal.setitimer(signal.ITIMER_PROF, 10)  # of its own time, whatever else the machine does
        torch.set_num_threads(1)
        started = time.process_time()
        try:
            tool.load_classifier(tool.FAMILIES["efficientnet"], tool.Path(path), "cpu")
            said = "loaded"
        except tool.ExplainError as error:
            said = str(error)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        os.write(write, json.dumps([said, time.process_time() - started, peak]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        told = file.read()
    status = os.waitpid(child, 0)[1]
    out[os.path.basename(path)] = json.loads(told) if told else ["ended by signal %d" % status, 10, 0]
print(json.dumps(out))
"""


def verdicts(paths: list[Path]) -> dict[str, tuple[str, float, float]]:
    """For each checkpoint, read in a process of its own: what was said, seconds, gigabytes at most."""
    done = subprocess.run([sys.executable, "-c", CHECK, *map(str, paths)], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


def test_every_bomb_is_refused_in_ten_seconds_and_a_gigabyte(tmp_path):
    names = {}
    for index, (bomb, make) in enumerate(BOMBS.items()):
        structure = make()
        for container, write in (("zip", archived), ("old", in_old_container)):
            path = tmp_path / f"{index}.{container}.pth"
            write(structure, path)
            names[path.name] = f"{bomb}, {container}"
    told = {names[name]: verdict for name, verdict in verdicts([tmp_path / name for name in names]).items()}
    assert len(told) == 2 * len(BOMBS)
    assert not {name: said for name, (said, *_) in told.items() if ".pth: " not in said or "; " not in said or "\n" in said}
    assert not {name: verdict for name, verdict in told.items() if verdict[1] >= 10 or verdict[2] >= 1}


@pytest.mark.parametrize("place", range(5))
def test_a_bomb_in_any_part_of_the_old_container_is_refused(tmp_path, place):
    parts = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}, {}, [])]
    parts[place] = b"\x80\x02" + BOMBS["a key that doubles"]() + b"."
    path = tmp_path / "x.pth"
    path.write_bytes(b"".join(parts))
    ((said, seconds, gigabytes),) = verdicts([path]).values()
    assert ".pth: " in said and seconds < 10 and gigabytes < 1


SAFETENSORS = {
    "absurd shape": {"conv_stem.weight": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}},
    "shape beyond the file": {"conv_stem.weight": {"dtype": "F32", "shape": [10**10], "data_offsets": [0, 4 * 10**10]}},
    "nothing, absurdly": {"conv_stem.weight": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}},
    "many axes": {"conv_stem.weight": {"dtype": "F32", "shape": [1] * 1_000_000, "data_offsets": [0, 4]}},
    "negative": {"conv_stem.weight": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    "nested metadata": {"__metadata__": {"class_names": "[" * 1_000_000}},
    "numbers of metadata": {"__metadata__": {"val_acc": "9" * 4_000_000, "img_size": "1e999999"}},
    "many tensors of nothing": {f"k{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(200_000)},
}


def test_absurd_headers_of_safetensors_are_refused(tmp_path):
    paths = []
    for index, header in enumerate(SAFETENSORS.values()):
        told = json.dumps(header).encode()
        paths.append(tmp_path / f"{index}.safetensors")
        paths[-1].write_bytes(len(told).to_bytes(8, "little") + told + bytes(4))
    for said, seconds, gigabytes in verdicts(paths).values():
        assert ".safetensors: " in said and "\n" not in said and seconds < 10 and gigabytes < 1, said


def test_weights_that_share_one_number_are_refused(tmp_path):
    """Kilobytes that would become the gigabytes of the largest network."""
    import timm
    import torch

    with torch.device("meta"):
        network = timm.create_model("tf_efficientnetv2_xl", num_classes=2)
    one = {key: torch.zeros(1, dtype=torch.float16).expand(value.shape) for key, value in network.state_dict().items() if value.is_floating_point()}
    contents = {"model_state_dict": one, "config": {"model_name": "tf_efficientnetv2_xl"}}
    path = save(contents, tmp_path / "shared.pth")
    ((said, seconds, gigabytes),) = verdicts([path]).values()
    assert "shared.pth: " in said and "fewer numbers" in said and seconds < 10 and gigabytes < 1


# Honest checkpoints that look like these


def honest() -> dict[str, object]:
    """A users' checkpoint with everything that trainers put beside the weights."""
    import torch

    contents = users_checkpoint(TINY["efficientnet"])
    weights = contents["model_state_dict"]
    betas, deep = (0.9, 0.999), []
    for _ in range(40):
        deep = [deep, 1.5]
    return contents | {
        "optimizer_state_dict": {
            "state": {n: {"step": torch.tensor(7.0), "exp_avg": w, "exp_avg_sq": w} for n, w in enumerate(weights.values())},
            "param_groups": [{"lr": 1e-3, "betas": betas, "params": [n]} for n in range(5000)],
        },
        "scheduler": {"milestones": Counter({30: 1, 60: 1}), "base_lrs": [1e-3] * 5000},
        "model_ema": OrderedDict((key, value) for key, value in weights.items()),
        "history": {"loss": [float(n) for n in range(200_000)], "by_class": {(n, n + 1): n for n in range(2000)}},
        "config": contents["config"] | {f"option_{n}": {"values": list(range(10)), "on": True} for n in range(3000)},
        "log": "epoch 1: loss 0.5\n" * 100_000,
        "seen": set(range(2000)),
        "seeds": [2**100 + n for n in range(20)],
        "deep": deep,
        "shape": torch.Size([3, 224, 224]),
        "device": torch.device("cpu"),
        "kind": torch.float32,
        "raw": b"bytes" * 1000,
        "rng": torch.get_rng_state(),
        "none": None,
    }


@pytest.mark.parametrize("container", ["zip", "old"])
def test_honest_checkpoints_pass(tmp_path, container):
    import torch

    path = tmp_path / "honest.pth"
    torch.save(honest(), path, _use_new_zipfile_serialization=container == "zip")
    assert tool.load_classifier(tool.FAMILIES["efficientnet"], path, "cpu").model.class_names == tool.CLASS_NAMES


def test_a_structure_is_checked_in_a_part_of_the_time_that_it_takes_to_read(tmp_path):
    import time

    import torch

    path = save(honest(), tmp_path / "honest.pth")
    started = time.process_time()
    torch.load(path, weights_only=True, mmap=True)
    read = time.process_time() - started
    started = time.process_time()
    with open(path, "rb") as file:
        tool.check_structure(tool.pickled_part(file, tool.kind_of(b"PK\3\4")), 1)
    assert time.process_time() - started < 3 * read

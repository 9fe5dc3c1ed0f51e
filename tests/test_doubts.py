"""Faults that are told late are the ones that would have been told at once, and before a model changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.builders import files
from tests.builders.wan import block_linears
from tests.reading import CASES, FIRST, content
from wan_runtime import assembling
from wan_runtime import doubts as module
from wan_runtime.checkpoint import Loaded, _assembled, open_checkpoint, stream
from wan_runtime.doubts import MANY, Doubts, absent, at_once
from wan_runtime.errors import BadTensor

CPU, GPU = torch.device("cpu"), torch.device("cuda")
YES, NO = torch.tensor(True), torch.tensor([[False]])


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU as on a GPU."""
    monkeypatch.setattr(module, "MANY_ON_CPU", MANY)


def test_the_first_fault_is_told_and_those_before_it_make_no_error() -> None:
    doubts = Doubts(GPU)
    made: list[str] = []

    def error(name: str) -> Exception:
        made.append(name)
        return ValueError(name)

    for name, fault in (("a", NO), ("b", YES), ("c", YES)):
        doubts(fault, lambda name=name: error(name))  # type: ignore[misc]
    assert not made
    with pytest.raises(ValueError, match=r"^b$"):
        doubts.settle()
    assert made == ["b"]
    doubts.settle()  # what was settled is kept no more
    with pytest.raises(ValueError, match=r"^now$"):
        at_once(YES, lambda: error("now"))
    at_once(NO, lambda: error("never"))
    assert absent(NO) and not absent(YES) and not absent(torch.empty((), device="meta", dtype=torch.bool))


def test_many_faults_are_settled_before_they_are_too_many() -> None:
    doubts = Doubts(GPU)
    doubts(YES, lambda: ValueError("early"))
    for _ in range(MANY - 2):
        doubts(NO, lambda: ValueError("never"))
    with pytest.raises(ValueError, match="early"):
        doubts(NO, lambda: ValueError("never"))


def test_on_the_cpu_a_fault_is_told_at_once() -> None:
    doubts = Doubts(CPU)
    doubts(NO, lambda: ValueError("never"))
    with pytest.raises(ValueError, match="now"):
        doubts(YES, lambda: ValueError("now"))


DAMAGE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "negative": lambda scale: scale * -1,
    "infinite": lambda scale: scale * float("inf"),
    "too large": lambda scale: scale * 1e6,
    "shape": lambda scale: scale.new_ones(3),
}


@pytest.mark.parametrize("second", DAMAGE)
@pytest.mark.parametrize("first", DAMAGE)
@pytest.mark.parametrize(
    ("dialect", "weight_format"),
    [("comfy_scaled_fp8", "fp8"), ("comfy", "nvfp4"), ("lightx2v", "int8_block")],
)
def test_of_two_damages_the_one_that_asking_at_once_finds_is_told(
    tmp_path: Path, late: None, dialect: str, weight_format: str, first: str, second: str
) -> None:
    """In the same words; a wrong shape is always refused at once, and must not overtake values damaged before it."""
    wanted = content(dialect, weight_format)
    leaf = files.float_scale_leaf(dialect, weight_format)
    for layer, damage in ((FIRST, first), (block_linears()[-1], second)):
        wanted.tensors[f"{layer}.{leaf}"] = DAMAGE[damage](wanted.tensors[f"{layer}.{leaf}"])
    wanted.tensors["blocks.1.norm3.weight"] = torch.full((128,), float("nan"))
    checkpoint = open_checkpoint(wanted.write(tmp_path))
    with pytest.raises(BadTensor) as asked:
        list(_assembled(checkpoint, CPU, at_once))
    with pytest.raises(BadTensor) as told:
        list(stream(checkpoint, CPU))
    assert str(told.value) == str(asked.value) and told.value.key == asked.value.key


@pytest.mark.parametrize(("dialect", "weight_format"), CASES)
def test_what_is_not_asked_yet_keeps_no_weight_alive(
    tmp_path: Path, late: None, dialect: str, weight_format: str
) -> None:
    """A caller that requantises a layer lets go of what it was made of; a check that waits must not hold it."""
    checkpoint = open_checkpoint(content(dialect, weight_format).write(tmp_path))
    held: list[weakref.ref[torch.Tensor]] = []

    def let_go(item: Loaded) -> None:
        held.extend(weakref.ref(slot) for slot in item.slots.values() if slot.numel() > 4096)

    items = stream(checkpoint, CPU)
    for item in items:
        let_go(item)
        del item
        if len(held) > 10:
            break
    next(items)  # past the last one's frame
    assert len(held) > 10 and not any(ref() is not None for ref in held)


# What asks at once, in its decoding: of global scales, zero points and 6-bit codes.
ASKS = {
    ("lightx2v", "nvfp4"),
    ("compressed_tensors", "nvfp4"),
    ("torchao", "int8"),
    ("torchao", "int8_block"),
    ("torchao", "mxfp6"),
}


@pytest.mark.parametrize(("dialect", "weight_format"), CASES)
def test_a_layer_is_assembled_without_asking_for_a_value(
    tmp_path: Path, dialect: str, weight_format: str
) -> None:
    """On the meta device, where a value that is asked for is an error, as asking a GPU is a wait."""
    checkpoint = open_checkpoint(content(dialect, weight_format).write(tmp_path))
    doubts: list[torch.Tensor] = []

    def keep(fault: torch.Tensor, _: Callable[[], Exception]) -> None:
        doubts.append(fault)

    def assemble() -> None:
        for layer in checkpoint.layers.values():
            given: dict[str, torch.Tensor] = {}
            for key in dict.fromkeys(source.key for source in layer.sources):
                read = checkpoint.header.read_tensor(key).to("meta")
                given |= assembling.decoded(checkpoint.path, layer, key, read, keep)
            assembling.complete(checkpoint.path, layer, given, keep)
        for key in checkpoint.plain.values():
            read = checkpoint.header.read_tensor(key).to("meta")
            assembling.plain(checkpoint.path, key, read, "plain", keep)

    if (dialect, weight_format) in ASKS:
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            assemble()
    else:
        assemble()
        assert len(doubts) >= len(checkpoint.plain) + 2 * len(checkpoint.layers)

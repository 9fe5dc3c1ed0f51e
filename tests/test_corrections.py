"""Rotations, input scales and low-rank branches: what a layer computes and reads as, against fp64 by hand."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from wan_runtime.backends import BACKENDS
from wan_runtime.checkpoint import Loaded
from wan_runtime.corrections import SLOTS, check, effective_weight, hadamard, rotate, split
from wan_runtime.formats import FORMATS, BadSlot
from wan_runtime.linear import QuantLinear
from wan_runtime.names import SPELLINGS
from wan_runtime.plan import Decision
from wan_runtime.staging import stage
from wan_runtime.swap import Patched as PatchRecord
from wan_runtime.swap import execute, remember, undo

OUT, INP, RANK = 48, 128, 5
Slots = dict[str, torch.Tensor]
Floats = NDArray[np.float64]
KINDS: dict[str, tuple[str, ...]] = {
    "rotation": ("rotation",),
    "pre_scale": ("pre_scale",),
    "low rank": ("low_rank_a", "low_rank_b"),
    "all": SLOTS,
}


def regular(size: int) -> Floats:
    """The matrix entry by entry: the sign of (r, c) is the product of the signs at their base-4 digits."""
    signs = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))
    matrix = np.ones((size, size))
    for row in range(size):
        for col in range(size):
            r, c = row, col
            while r or c or size == 1:
                matrix[row, col] *= signs[r % 4][c % 4]
                r, c = r // 4, c // 4
    digits = round(math.log(size, 4))
    # The loop stops at the leading zeros of both; signs[0][0] is 1, so they change nothing.
    assert 4**digits == size
    return np.asarray(matrix / 2**digits)


def around(kind: str, group: int = 16, seed: int = 0) -> Slots:
    generator = torch.Generator().manual_seed(seed + 100)
    every = {
        "rotation": torch.tensor([group], dtype=torch.int32),
        "pre_scale": torch.rand(1, INP, generator=generator) * 3 + 0.1,
        "low_rank_a": torch.randn(RANK, INP, generator=generator) * 0.1,
        "low_rank_b": torch.randn(OUT, RANK, generator=generator) * 0.1,
    }
    return {name: every[name] for name in KINDS[kind]}


def quantised(weight_format: str, seed: int = 0) -> Slots:
    generator = torch.Generator().manual_seed(seed)
    return FORMATS[weight_format].quantize(torch.randn(OUT, INP, generator=generator) * 0.1, True)


def make(
    weight_format: str, kind: str, group: int = 16, seed: int = 0, backend: str = "torch"
) -> QuantLinear:
    generator = torch.Generator().manual_seed(seed + 7)
    return QuantLinear(
        INP,
        OUT,
        format=weight_format,
        slots={**quantised(weight_format, seed), **around(kind, group, seed)},
        bias=torch.randn(OUT, generator=generator),
        backend=backend,
        compute="fp32" if backend == "reference" else "bf16",
    )


def truth(weight_format: str, slots: Mapping[str, torch.Tensor]) -> Floats:
    """(Q @ blockdiag(H) + b @ a) * pre_scale, in fp64."""
    own = {name: tensor.detach() for name, tensor in slots.items() if name not in (*SLOTS, "input_scale")}
    weight = FORMATS[weight_format].dequantize(own).double().numpy()
    if "rotation" in slots:
        group = int(slots["rotation"])
        weight = weight @ np.kron(np.eye(INP // group), regular(group))
    if "low_rank_a" in slots:
        a, b = (slots[name].detach().double().numpy() for name in ("low_rank_a", "low_rank_b"))
        weight = weight + b @ a
    if "pre_scale" in slots:
        weight = weight * slots["pre_scale"].detach().double().numpy()
    return weight


def close(value: torch.Tensor, wanted: Floats, error: float) -> None:
    off = np.linalg.norm(value.detach().double().numpy() - wanted)
    assert off <= error * np.linalg.norm(wanted)


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_the_matrix_is_the_published_one(size: int) -> None:
    matrix = hadamard(size, torch.device("cpu"), torch.float32)
    np.testing.assert_array_equal(matrix.double().numpy(), regular(size))
    assert torch.equal(matrix @ matrix, torch.eye(size)) and torch.equal(matrix, matrix.T)
    assert torch.equal(hadamard(size, torch.device("cpu"), torch.bfloat16).float(), matrix)


@pytest.mark.parametrize("size", [0, 1, 2, 8, 32, 512, -4])
def test_a_size_without_such_a_matrix_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"not {size}"):
        hadamard(size, torch.device("cpu"), torch.float32)


def test_sylvester_s_matrix_is_another() -> None:
    """A reader that takes the common construction gets another weight of the same size, silently."""
    two = np.array([[1, 1], [1, -1]])
    sylvester = np.kron(np.kron(two, two), np.kron(two, two)) / 4
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    off = weight.double().numpy() @ sylvester - rotate(weight, 16).double().numpy()
    assert np.linalg.norm(off) > np.linalg.norm(weight.numpy())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_the_effective_weight_has_every_correction_in_it(weight_format: str, kind: str) -> None:
    slots = {**quantised(weight_format), **around(kind), "input_scale": torch.ones(1, 1)}
    close(effective_weight(weight_format, slots), truth(weight_format, slots), 1e-6)


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_layer_computes_with_the_effective_weight(
    weight_format: str, kind: str, dtype: torch.dtype, error: float
) -> None:
    layer = make(weight_format, kind)
    x = torch.randn(2, 3, INP, generator=torch.Generator().manual_seed(3)).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (2, 3, OUT) and layer.bias is not None
    wanted = x.double().numpy() @ truth(weight_format, layer.slots).T + layer.bias.detach().double().numpy()
    close(y, wanted, error)


@pytest.mark.parametrize("group", [4, 16, 64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_is_given_the_rotated_input(backend: str, group: int) -> None:
    record = BACKENDS[backend]
    slots = {**quantised("fp8"), **around("all", group)}
    for compute in record.computes("fp8"):
        if compute not in ("bf16", "fp32"):
            continue
        layer = QuantLinear(
            INP, OUT, format="fp8", slots=slots, bias=None, backend=record.name, compute=compute
        )
        x = torch.randn(7, INP, generator=torch.Generator().manual_seed(1))
        close(layer(x), x.double().numpy() @ truth("fp8", slots).T, 2e-6)


def test_a_static_scale_quantises_the_corrected_input() -> None:
    """The kernel gets the rotated, scaled rows: what the static scale was calibrated on."""
    slots = {**quantised("fp8"), **around("all"), "input_scale": torch.full((1, 1), 0.5)}
    layer = QuantLinear(
        INP, OUT, format="fp8", slots=slots, bias=None, backend="torch", compute="bf16", static=True
    )
    seen = []

    def spy(
        rows: torch.Tensor, slots: Mapping[str, torch.Tensor], static: torch.Tensor | None
    ) -> torch.Tensor:
        assert static is not None and static.item() == 0.5
        seen.append(rows)
        return torch.zeros(len(rows), OUT)

    layer._multiply = spy
    x = torch.randn(4, INP)
    layer(x)
    scaled = x.double().numpy() * slots["pre_scale"].double().numpy()
    close(seen[0], scaled @ np.kron(np.eye(INP // 16), regular(16)), 1e-6)


def test_the_low_rank_branch_takes_the_input_before_the_rotation() -> None:
    """Where the weight's own codes are zero, only the branch is left."""
    slots = {**quantised("fp8"), **around("all")}
    slots["payload"] = torch.zeros_like(slots["payload"])
    layer = QuantLinear(INP, OUT, format="fp8", slots=slots, bias=None, backend="torch", compute="bf16")
    x = torch.randn(4, INP)
    a, b, scale = (slots[n].double().numpy() for n in ("low_rank_a", "low_rank_b", "pre_scale"))
    close(layer(x), (x.double().numpy() * scale) @ a.T @ b.T, 2e-6)


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to device and dtype": lambda m: m.to("cpu", torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_no_cast_changes_a_correction(weight_format: str, cast: str) -> None:
    layer = make(weight_format, "all")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert set(SLOTS) < before.keys()
    CASTS[cast](nn.Sequential(layer))
    after = layer.state_dict()
    assert all(after[n].dtype == t.dtype and torch.equal(after[n], t) for n, t in before.items())


def test_a_state_dict_carries_the_corrections() -> None:
    x = torch.randn(3, INP)
    layer, other = make("int8", "all", 64), make("int8", "all", 4, seed=1)
    assert not torch.allclose(other(x), layer(x))
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match="rotation"):
        QuantLinear(
            INP, OUT, format="int8", slots=quantised("int8"), bias=None, backend="torch", compute="bf16"
        ).load_state_dict(layer.state_dict())


def test_copies_keep_the_corrections() -> None:
    layer, x = make("nvfp4", "all"), torch.randn(3, INP)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.state_dict().keys() == layer.state_dict().keys()
        assert torch.equal(twin(x), layer(x))
        assert torch.equal(torch.Tensor(twin.weight), torch.Tensor(layer.weight))


def test_accelerate_s_offload_moves_the_corrections() -> None:
    from accelerate import cpu_offload

    layer, x = make("fp8", "all", 64), torch.randn(3, INP)
    wanted = layer(x)
    model = nn.Sequential(layer)
    cpu_offload(model, torch.device("cpu"))
    assert all(p.is_meta for p in layer.parameters())
    assert torch.equal(model(x), wanted)


def test_unpatching_gives_back_the_effective_weight() -> None:
    model = nn.Sequential(nn.Linear(INP, OUT, bias=False))
    slots = {**quantised("fp8"), **around("all")}
    decision = Decision("0", "0", "quantised", "", "fp8", "bf16", "torch")
    staged = stage([Loaded("0", "fp8", slots)], [decision], SPELLINGS["original"], torch.float32)
    before = execute(model, [decision], staged, torch.float32, "cpu")
    assert isinstance(model[0], QuantLinear)
    remember(model, PatchRecord((decision,), before, None))
    undo(model)
    close(model[0].weight, truth("fp8", slots), 1e-6)


def test_another_format_is_made_from_the_effective_weight() -> None:
    slots = {**quantised("fp8"), **around("all")}
    decision = Decision("0", "0", "linear", "")
    staged = stage([Loaded("0", "fp8", slots)], [decision], SPELLINGS["original"], torch.float32)
    close(staged.tensors["0"]["weight"], truth("fp8", slots), 1e-6)


def test_a_slot_that_nobody_knows_is_refused() -> None:
    slots = {**quantised("fp8"), "zero": torch.zeros(OUT, 1)}
    with pytest.raises(BadSlot, match=r"a fp8 layer has no slot 'zero'"):
        effective_weight("fp8", slots)
    with pytest.raises(BadSlot, match="zero"):
        QuantLinear(INP, OUT, format="fp8", slots=slots, bias=None, backend="torch", compute="bf16")
    own, rest = split("fp8", {**quantised("fp8"), **around("all")})
    assert own.keys() == {"payload", "scale"} and rest.keys() == set(SLOTS)


DAMAGE: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "group that does not divide": ({"rotation": torch.tensor([256], dtype=torch.int32)}, "groups of 256"),
    "group of another construction": ({"rotation": torch.tensor([32], dtype=torch.int32)}, "groups of 32"),
    "group of another dtype": ({"rotation": torch.tensor([16])}, "int32"),
    "short input scale": ({"pre_scale": torch.ones(1, INP // 2)}, r"\[1, 64\]"),
    "zero input scale": ({"pre_scale": torch.zeros(1, INP)}, "zero or less"),
    "NaN input scale": ({"pre_scale": torch.full((1, INP), torch.nan)}, "NaN"),
    "half a branch": ({"low_rank_a": None}, "without the other half"),
    "the other half": ({"low_rank_b": None}, "without the other half"),
    "branches of two ranks": ({"low_rank_b": torch.zeros(OUT, RANK + 1)}, rf"needs .* \[{OUT}, {RANK}\]"),
    "infinite branch": ({"low_rank_a": torch.full((RANK, INP), torch.inf)}, "infinite"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_corrections_are_refused(damage: str) -> None:
    change, message = DAMAGE[damage]
    check(around("all"), OUT, INP)
    slots = {name: t for name, t in {**around("all"), **change}.items() if t is not None}
    with pytest.raises(BadSlot, match=message):
        check(slots, OUT, INP)

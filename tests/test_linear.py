"""QuantLinear: exact arithmetic on its storage, storage that no cast can change, and no write that could be lost."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from wan_runtime.backends import BACKENDS
from wan_runtime.errors import QuantisedWeight
from wan_runtime.formats import FORMATS
from wan_runtime.linear import QuantLinear, WeightCopy, quantised_layers

OUT, INP = 48, 64
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def make(weight_format: str = "fp8", *, bias: bool = True, seed: int = 0, **options: str) -> QuantLinear:
    generator = torch.Generator().manual_seed(seed)
    slots = FORMATS[weight_format].quantize(torch.randn(OUT, INP, generator=generator) * 0.1, True)
    return QuantLinear(
        INP,
        OUT,
        format=weight_format,
        slots=slots,
        bias=torch.randn(OUT, generator=generator) if bias else None,
        backend=options.get("backend", "torch"),
        compute=options.get("compute", "bf16"),
    )


def exact(layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    """The product in fp64 on the dequantised weight."""
    product = x.double() @ FORMATS[layer.format].dequantize(layer.slots).double().T
    return product if layer.bias is None else product + layer.bias.double()


def stored(layer: QuantLinear) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def unchanged(layer: QuantLinear, before: dict[str, torch.Tensor]) -> bool:
    now = layer.state_dict()
    return now.keys() == before.keys() and all(
        now[name].dtype == tensor.dtype and torch.equal(now[name], tensor) for name, tensor in before.items()
    )


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_product_is_the_dequantised_weights(weight_format: str, bias: bool, dtype: torch.dtype) -> None:
    layer = make(weight_format, bias=bias)
    x = torch.randn(7, INP).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    truth = exact(layer, x)
    assert (y.double() - truth).norm() / truth.norm() < ROUNDING[dtype]


@pytest.mark.parametrize(
    "shape", [(INP,), (0, INP), (1, INP), (3, INP), (17, INP), (2, 17, INP), (2, 3, 5, INP)]
)
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    layer = make()
    x = torch.randn(*shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], OUT)
    torch.testing.assert_close(y, exact(layer, x).float(), rtol=1e-5, atol=1e-5)


def test_strided_input() -> None:
    layer = make()
    x = torch.randn(5, 2 * INP)[:, ::2]
    torch.testing.assert_close(layer(x), exact(layer, x).float(), rtol=1e-5, atol=1e-5)


def test_wrong_width_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="invalid for input"):
        make()(torch.randn(3, INP // 2))


def test_two_batches_give_what_each_gives_alone() -> None:
    first, second = torch.randn(3, INP), torch.randn(11, INP) * 100
    alone = make()(first), make()(second)
    layer = make()
    assert torch.equal(layer(first), alone[0])
    assert torch.equal(layer(second), alone[1])
    assert torch.equal(layer(first), alone[0])


def test_bias_is_added_in_fp32_whatever_the_product_is_in() -> None:
    """A product in bf16 for an fp32 caller must not round the sum to bf16."""
    layer = make()
    assert layer.bias is not None
    with torch.no_grad():
        layer.get_parameter("payload").zero_()  # e4m3 code 0 is 0.0
        layer.bias.fill_(1 + 2**-12)
    layer._multiply = lambda rows, slots, static: torch.zeros(len(rows), OUT, dtype=torch.bfloat16)
    assert torch.equal(layer(torch.ones(2, INP)), torch.full((2, OUT), 1 + 2**-12))


def test_autocast_answers_as_a_linear_would() -> None:
    layer = make()
    plain = nn.Linear(INP, OUT)
    x = torch.randn(4, INP)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == plain(x).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "to float8": lambda m: m.to(torch.float8_e4m3fn),
    "type": lambda m: m.type(torch.bfloat16),
    "to device and dtype": lambda m: m.to("cpu", torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_no_cast_changes_the_storage(weight_format: str, cast: str) -> None:
    layer = make(weight_format)
    before = stored(layer)
    CASTS[cast](nn.Sequential(layer))
    assert unchanged(layer, before)
    assert {t.dtype for t in layer.parameters()} <= {torch.uint8, torch.int8, torch.float32}


@pytest.mark.parametrize("weight_format", FORMATS)
def test_first_parameter_is_floating_point(weight_format: str) -> None:
    """Hosts take `next(module.parameters()).dtype` for a compute dtype. MX formats hold no float but the bias."""
    layout = FORMATS[weight_format].layout(OUT, INP)
    for bias in (True, False) if "scale" in layout else (True,):
        assert next(make(weight_format, bias=bias).parameters()).dtype == torch.float32


def test_weight_reads_in_the_dtype_last_asked_for() -> None:
    layer = make()
    assert layer.weight.dtype == torch.bfloat16
    assert layer.half().weight.dtype == torch.float16
    assert layer.to("cpu").weight.dtype == torch.float16
    torch.testing.assert_close(
        torch.Tensor(layer.float().weight), FORMATS["fp8"].dequantize(layer.slots), rtol=0, atol=0
    )


@pytest.mark.parametrize("weight_format", FORMATS)
def test_state_dict_round_trip(weight_format: str) -> None:
    layer, other = make(weight_format), make(weight_format, seed=1)
    assert not unchanged(other, stored(layer))
    other.load_state_dict(layer.state_dict(), strict=True)
    assert unchanged(other, stored(layer))
    other = make(weight_format, seed=1)
    other.load_state_dict(stored(layer), strict=True, assign=True)
    assert unchanged(other, stored(layer))


def test_plain_weights_are_not_ignored() -> None:
    with pytest.raises(RuntimeError, match="this layer is quantised"):
        make().load_state_dict(nn.Linear(INP, OUT).state_dict(), strict=False)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_deepcopy_and_pickle(weight_format: str) -> None:
    layer = make(weight_format).half()
    x = torch.randn(3, INP)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert unchanged(twin, stored(layer))
        assert twin.weight.dtype == torch.float16
        assert torch.equal(twin(x), layer(x))
        with torch.no_grad():
            twin.get_parameter("payload").bitwise_xor_(0x80)  # a code's sign, in every format
        assert not torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_moved_to_another_device_it_still_answers(backend: str, weight_format: str) -> None:
    """Planned for a GPU, run where it lies: dequantised and multiplied there."""
    record = BACKENDS[backend]
    layer = make(weight_format)
    for compute in record.computes(weight_format):
        planned = QuantLinear(
            INP, OUT, format=weight_format, slots=layer.slots, bias=layer.bias,
            backend=record.name, compute=compute, planned_for="cuda",
        )  # fmt: skip
        x = torch.randn(3, INP)
        torch.testing.assert_close(planned(x), exact(layer, x).float(), rtol=1e-5, atol=1e-5)


WRITES: dict[str, Callable[[QuantLinear], object]] = {
    "in-place add on data": lambda m: m.weight.data.__iadd__(1),
    "in-place add": lambda m: m.weight.add_(1),
    "copy": lambda m: m.weight.data.copy_(torch.zeros(OUT, INP)),
    "data setter": lambda m: setattr(m.weight, "data", torch.zeros(OUT, INP)),
    "item": lambda m: m.weight.detach().__setitem__(0, 0.0),
    "out": lambda m: torch.add(torch.ones(OUT, INP), 1, out=m.weight),
    "attribute": lambda m: setattr(m, "weight", torch.zeros(OUT, INP)),
    "parameter": lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(OUT, INP))),
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_the_weight_is_refused(write: str) -> None:
    layer = make().float()
    before = stored(layer)
    with pytest.raises(QuantisedWeight, match=r"unpatch"):
        WRITES[write](layer)
    assert unchanged(layer, before)


def test_reading_the_weight_gives_ordinary_tensors() -> None:
    weight = make().weight
    assert isinstance(weight, WeightCopy)
    results = (weight + 1, weight.float(), weight @ torch.ones(INP, 1, dtype=weight.dtype), weight.clone())
    assert [type(t) for t in results] == [torch.Tensor] * 4
    assert torch.zeros(OUT, INP).copy_(weight).equal(weight.float())


def test_quantised_layers_names_every_layer() -> None:
    model = nn.Sequential(nn.Linear(2, 2), make(), nn.Sequential(make("nvfp4")))
    assert [path for path, _ in quantised_layers(model)] == ["1", "2.0"]


def test_repr_says_how_it_multiplies() -> None:
    assert "format=nvfp4, compute=bf16, backend=torch" in repr(make("nvfp4"))

"""Transformer Engine's products on the GPU against fp64 arithmetic, at Wan's sizes and odd ones; what it refuses there;
and its layers under autocast, torch.compile and copies.

`-rs -s` shows the reasons of what is skipped and what was measured.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.hosts.diffusers import error
from tests.support import TE_SAYS
from wan_runtime.backends import transformer_engine as engine
from wan_runtime.errors import BackendUnavailable
from wan_runtime.formats import FORMATS
from wan_runtime.linear import QuantLinear
from wan_runtime.plan import Options, choose

pytestmark = [pytest.mark.gpu, pytest.mark.te]

CUDA, BF16 = torch.device("cuda", 0), torch.bfloat16
WAN = [  # (out, in) of the 1.3B, 5B and 14B models' linears
    (1536, 1536), (8960, 1536), (1536, 8960), (3072, 3072), (14336, 3072), (3072, 14336), (5120, 5120),
    (13824, 5120), (5120, 13824),
]  # fmt: skip
ODD = [(72, 80), (100, 200), (64, 16)]
TOKENS = (1, 7, 16, 257, 1031)


def layer(
    out: int,
    inp: int,
    weight_format: str = "fp8",
    *,
    bias: torch.Tensor | None = None,
    backend: str = "te",
    static: float | None = None,
) -> QuantLinear:
    generator = torch.Generator("cuda").manual_seed(out * inp)
    weight = torch.randn(out, inp, device="cuda", generator=generator) * inp**-0.5
    slots = dict(FORMATS[weight_format].quantize(weight, False))
    if static is not None:
        slots["input_scale"] = torch.full((1, 1), static, device="cuda")
    compute = "fp32" if backend == "reference" else weight_format
    return QuantLinear(
        inp, out, format=weight_format, slots=slots, bias=bias, backend=backend, compute=compute,
        planned_for="cuda", static=static is not None,
    )  # fmt: skip


def rows(tokens: int, inp: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(tokens)
    return torch.randn(tokens, inp, device="cuda", generator=generator).to(dtype)


def exact(made: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    product = x.double() @ FORMATS[made.format].dequantize(made.slots).double().T
    return product if made.bias is None else product + made.bias.double()


def codes(tokens: int, inp: int) -> torch.Tensor:
    """Activations that e4m3 holds exactly under the scale that their largest magnitude gives, which is 1."""
    given = rows(tokens, inp, torch.float32).mul_(16).to(torch.float8_e4m3fn).to(BF16)
    given[0, 0] = 448.0
    return given


def test_the_probe_serves_fp8_and_refuses_what_this_gpu_has_not_in_its_own_words() -> None:
    for name in engine.ALIGNMENT:
        print(f"{torch.cuda.get_device_name()}: te {name}: {engine._probe(name, 0) or 'runs'}")
    assert choose("fp8", CUDA, (5120, 13824), Options(backend="te")) == ("te", "fp8", "")
    if torch.cuda.get_device_capability() >= (10, 0):
        pytest.skip("this GPU is Blackwell or later, whose block-scaled products have their own test")
    for name in ("mxfp8", "nvfp4"):
        with pytest.raises(BackendUnavailable) as caught:
            choose(name, CUDA, (5120, 13824), Options(backend="te"))
        assert caught.value.refusals["te " + name] == TE_SAYS[name]


def test_codes_and_scale_stay_bit_for_bit_and_it_dequantises_them_to_the_same_weight() -> None:
    made = layer(1536, 8960)
    before = {name: slot.clone() for name, slot in made.slots.items()}
    held: Any = engine.weight_of("fp8", made.slots, BF16)
    assert held._data.data_ptr() == made.get_parameter("payload").data_ptr()
    assert held._scale_inv.data_ptr() == made.get_parameter("scale").data_ptr()
    assert torch.equal(held.dequantize(dtype=torch.float32), FORMATS["fp8"].dequantize(before))
    made(rows(257, 8960))
    assert all(torch.equal(slot, before[name]) for name, slot in made.slots.items())


@pytest.mark.parametrize("shape", [*WAN, *ODD])
def test_products_are_right_but_for_the_rounding_of_activations(shape: tuple[int, int]) -> None:
    made, oracle = layer(*shape), layer(*shape, backend="reference")
    assert torch.equal(made.get_parameter("payload"), oracle.get_parameter("payload"))
    for tokens in TOKENS:
        x = rows(tokens, shape[1])
        y = made(x)
        assert y.shape == (tokens, shape[0]) and y.dtype == BF16
        assert error(y, exact(made, x)) < 0.035, tokens  # e4m3 rounds by 2.6 % rms
        assert error(y, oracle(x)) < 0.035, tokens
    x = codes(257, shape[1])
    wrong = error(made(x), exact(made, x))
    print(f"te fp8 {shape}: {wrong:.5f} relative error where activations are exact")
    assert wrong < 0.01  # bf16 rounds by 0.002 rms; the rest is the fast accumulation


@pytest.mark.parametrize("dtype", [torch.float16, BF16, torch.float32])
def test_the_answer_is_in_the_inputs_dtype_for_any_leading_dimensions(dtype: torch.dtype) -> None:
    made = layer(1536, 1536, bias=torch.randn(1536, device="cuda"))
    x = rows(2 * 3 * 5, 1536, dtype)
    expected = exact(made, x)
    for leading in ((30,), (2, 15), (2, 3, 5)):
        y = made(x.reshape(*leading, 1536))
        assert y.shape == (*leading, 1536) and y.dtype == dtype
        assert error(y.reshape(30, 1536), expected) < 0.035
    assert made(x[:0]).shape == (0, 1536) and made(x[0]).shape == (1536,)
    assert made.bias is not None
    of_zeros = made(torch.zeros(4, 1536, device="cuda", dtype=dtype))  # which have no amax
    assert torch.equal(of_zeros, made.bias.to(dtype).expand(4, 1536))


def test_a_bias_is_added_in_fp32_and_one_that_is_exactly_bf16_within_the_product() -> None:
    fine = torch.full((1536,), 1 + 2**-12, device="cuda")
    zeros = layer(1536, 1536, bias=fine)
    with torch.no_grad():
        zeros.get_parameter("payload").zero_()
    assert torch.equal(zeros(rows(5, 1536, torch.float32)), fine.expand(5, 1536))
    short = torch.randn(1536, device="cuda").bfloat16().float()
    made, x = layer(1536, 1536, bias=short), codes(257, 1536)
    assert made._adds_bias("cuda", BF16)
    assert error(made(x), exact(made, x)) < 0.01
    assert error(made(x.float()), exact(made, x.float())) < 0.01


def test_a_files_input_scale_is_used_when_asked() -> None:
    x = rows(257, 1536)
    right = float(x.abs().max()) / 448
    for static, least, most in ((right, 0.0, 0.035), (right / 100, 0.3, 2.0)):  # the second clips, as asked
        made = layer(1536, 1536, static=static)
        assert least < error(made(x), exact(made, x)) < most


def test_autocast_answers_as_a_linear_would() -> None:
    made, x = layer(1536, 1536, bias=torch.randn(1536, device="cuda")), rows(40, 1536, torch.float32)
    with torch.autocast("cuda", BF16):
        y = made(x)
    assert y.dtype == BF16 and torch.equal(y, made(x.to(BF16)))
    assert made(x).dtype == torch.float32


def test_another_stream_and_another_layers_product_change_nothing() -> None:
    made, other = layer(5120, 1536), layer(1536, 1536)
    a, b = rows(300, 1536), rows(40, 1536)
    alone = made(a), other(b)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        beside = other(b)
    torch.cuda.current_stream().wait_stream(side)
    assert (
        torch.equal(made(a), alone[0]) and torch.equal(other(b), alone[1]) and torch.equal(beside, alone[1])
    )


# Inductor imports what torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_torch_compile_takes_it_whole_and_answers_the_same() -> None:
    torch._dynamo.reset()
    made = layer(1536, 1536, bias=torch.randn(1536, device="cuda"))
    compiled = torch.compile(made, fullgraph=True)
    with torch.no_grad():
        for tokens in (256, 40, 257):
            x = rows(tokens, 1536)
            assert error(compiled(x), made(x)) < 4e-3, tokens
    torch._dynamo.reset()


def test_copies_and_state_dicts_are_of_the_slots_alone() -> None:
    made, x = layer(1536, 1536, bias=torch.randn(1536, device="cuda")), rows(40, 1536)
    expected = made(x)
    assert torch.equal(copy.deepcopy(made)(x), expected)
    other = layer(1536, 1536, bias=torch.zeros(1536, device="cuda"))
    with torch.no_grad():
        other.get_parameter("payload").zero_()
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(x), expected)
    assert torch.equal(made.cpu().cuda()(x), expected)


def test_nothing_is_kept_twice() -> None:
    made, x = layer(13824, 5120), rows(64, 5120)
    made(x)  # its workspace
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    more = [layer(13824, 5120) for _ in range(3)]
    for each in more:
        each(x)
    torch.cuda.synchronize()
    held = sum(p.nbytes for each in more for p in each.parameters())
    assert torch.cuda.memory_allocated() - before < 1.02 * held


@pytest.mark.sm100
@pytest.mark.parametrize("compute", ["mxfp8", "nvfp4"])
@pytest.mark.parametrize("shape", [(1536, 8960), (5120, 5120)])
def test_block_scaled_products_where_the_gpu_has_them(compute: str, shape: tuple[int, int]) -> None:
    refusal = engine._probe(compute, 0)
    if refusal is not None:
        pytest.skip(refusal)
    made = layer(*shape, compute, bias=torch.randn(shape[0], device="cuda"))
    for tokens in TOKENS:
        x = rows(tokens, shape[1])
        assert error(made(x), exact(made, x)) < (0.04 if compute == "mxfp8" else 0.12), tokens


@pytest.mark.parametrize("weight_format", ["mxfp8", "nvfp4"])
def test_its_kernels_read_the_block_scaled_weight_that_the_format_means(weight_format: str) -> None:
    slots = layer(512, 1536, weight_format).slots
    held: Any = engine.weight_of(weight_format, slots, BF16)
    try:
        weight = held.dequantize(dtype=torch.float32)
        torch.cuda.synchronize()
    except RuntimeError as refused:
        pytest.skip(f"it does not dequantise {weight_format} here: {str(refused).splitlines()[0][:200]}")
    assert error(weight, FORMATS[weight_format].dequantize(slots)) < 1e-6

"""FP8 products that add themselves to the residual stream, by cuBLASLt: against fp64, on two streams at once, and in
fused blocks against the same without it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from tests.gpu.test_fused_gpu import SIZES, model, run
from tests.hosts.diffusers import error, inputs, transformer
from wan_runtime.backends import _cublaslt, backend_named
from wan_runtime.formats import FORMATS

pytestmark = pytest.mark.gpu

SHAPES = [
    (32, 64, 48),
    (7, 1536, 1536),
    (1031, 5120, 5120),
    (777, 13824, 5120),
    (515, 3072, 3072),
    (300, 8960, 1536),
]


@pytest.fixture(autouse=True)
def adds() -> None:
    reason = backend_named("torch").refuses(
        "fp8", "fp8", torch.device("cuda", 0), (32, 32)
    ) or _cublaslt.refuses(0)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weights", ["fp8", "fp8_e5m2", "nvfp4"])
@pytest.mark.parametrize(("tokens", "inp", "out"), SHAPES)
def test_against_fp64(tokens: int, inp: int, out: int, weights: str, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    slots = FORMATS[weights].quantize(draw(out, inp) / inp**0.5, weights != "nvfp4")
    codes, scale = (draw(tokens, inp) * 50).to(torch.float8_e4m3fn), torch.exp(draw(tokens, 1)) * 0.02
    factor, stream = draw(out), draw(tokens, out).to(dtype)
    added, coded = (getattr(backend_named("torch"), way)(weights, "fp8") for way in ("added", "coded"))
    product = (codes.double() * scale) @ FORMATS[weights].dequantize(slots).double().T
    own = error(coded(codes, scale, slots), product)
    for given in (factor, None):
        truth = stream.double() + product * (1 if given is None else given.double())
        into = stream.clone()
        assert added.takes(into) == (dtype == torch.bfloat16 or out >= _cublaslt.FP32_WIDTH)
        added.add(codes, scale, slots, given, into)
        assert error(into, truth) < own + 2e-3 < 0.04


def test_two_streams_at_once() -> None:
    slots = FORMATS["fp8"].quantize(torch.randn(512, 256, device="cuda"), True)
    codes = torch.randn(2, 300, 256, device="cuda").to(torch.float8_e4m3fn)
    # The other's scales in one product of one thread's 200 would show.
    scale = torch.rand(2, 300, 1, device="cuda") * torch.tensor([1e-3, 1.0], device="cuda").view(2, 1, 1)
    into = torch.zeros(2, 300, 512, device="cuda")
    added = backend_named("torch").added("fp8", "fp8")
    assert added is not None
    torch.cuda.synchronize()

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(200):
                added.add(codes[number], scale[number], slots, None, into[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    truth = 200 * ((codes.double() * scale) @ FORMATS["fp8"].dequantize(slots).double().T)
    assert all(error(into[number], truth[number]) < 6e-3 for number in range(2))


def test_more_codes_than_an_int_counts() -> None:
    inp, out, last = 13824, 5120, 64
    slots = FORMATS["fp8"].quantize(torch.randn(out, inp, device="cuda"), True)
    codes = torch.randint(0x7F, (2**31 // inp + last, inp), dtype=torch.uint8, device="cuda")
    codes = codes.view(torch.float8_e4m3fn)  # of every magnitude, and no NaN
    scale = torch.rand(len(codes), 1, device="cuda") * 1e-3
    into = torch.zeros(len(codes), out, device="cuda", dtype=torch.bfloat16)
    added = backend_named("torch").added("fp8", "fp8")
    assert added is not None and codes.numel() > 2**31
    added.add(codes, scale, slots, None, into)
    weight = FORMATS["fp8"].dequantize(slots).double().T
    for part in (slice(last), slice(-last, None)):
        assert error(into[part], (codes[part].double() * scale[part]) @ weight) < 0.04


@pytest.mark.parametrize("weights", ["fp8", "nvfp4"])
def test_fused_blocks_are_as_near_to_fp32_as_those_that_pass_over_the_stream(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = transformer(torch.float32, sizes=SIZES).to("cuda")
    with torch.no_grad():
        given = {n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in inputs(torch.float32).items()}
        truth = plain(**given)[0]
    made = model(weights=weights)
    count: list[Any] = []
    add = _cublaslt.add

    def counted(*operands: torch.Tensor) -> None:
        count.append(operands)
        add(*operands)

    monkeypatch.setattr(_cublaslt, "add", counted)
    first, second = run(made), run(made)
    assert len(count) == 2 * (3 * SIZES.layers - 1)
    monkeypatch.setitem(_cublaslt._REFUSED, 0, "it is not asked in this test")
    passed = run(made)
    assert len(count) == 2 * (3 * SIZES.layers - 1)
    for result in (first, second):
        assert 0 < error(result, passed) < 0.02
        assert error(result, truth) < 1.05 * error(passed, truth) + 1e-3


def test_a_captured_graph_replays_it() -> None:
    slots = FORMATS["fp8"].quantize(torch.randn(512, 256, device="cuda"), True)
    codes, scale = (
        torch.randn(300, 256, device="cuda").to(torch.float8_e4m3fn),
        torch.rand(300, 1, device="cuda"),
    )
    into, factor = torch.zeros(300, 512, device="cuda", dtype=torch.bfloat16), torch.randn(512, device="cuda")
    added = backend_named("torch").added("fp8", "fp8")
    assert added is not None
    added.add(codes, scale, slots, factor, into)
    once = into.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        into.zero_()
        added.add(codes, scale, slots, factor, into)
    into.fill_(7)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(into, once)

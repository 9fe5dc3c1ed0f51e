"""One Linear at WAN's shapes, quantising its bf16 activations in the call, with bias: ours and every library at hand.

    python benchmarks/linear.py [--rounds 12] [--tokens N]

Prints one JSON object a figure: first the machine's ceilings (a device copy, a bf16 and an FP8 product), then
{"shape", "config", "ms", "tflops"}. The contenders of a shape take turns, each gets its median.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from peers import kitchen_linear, te_linear
from timing import milliseconds
from torch import nn

from wan_runtime.backends import backend_named
from wan_runtime.formats import FORMATS
from wan_runtime.linear import QuantLinear
from wan_runtime.plan import Options, choose

SHAPES = {  # tokens, in, out
    "14B qkvo": (32760, 5120, 5120),
    "14B ffn.0": (32760, 5120, 13824),
    "14B ffn.2": (32760, 13824, 5120),
    "5B qkvo": (27280, 3072, 3072),
    "5B ffn.0": (27280, 3072, 14336),
    "5B ffn.2": (27280, 14336, 3072),
    "1.3B qkvo": (32760, 1536, 1536),
    "1.3B ffn.0": (32760, 1536, 8960),
    "1.3B ffn.2": (32760, 8960, 1536),
}


def show(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def ours(linear: nn.Linear, held: str = "fp8", backend: str = "torch") -> nn.Module:
    """This library's, on the GPU's best compute."""
    out, inp = linear.weight.shape
    slots = FORMATS[held].quantize(linear.weight.data.float(), backend_named(backend).per_channel)
    _, compute, _ = choose(held, linear.weight.device, (out, inp), Options(backend=backend))
    made: nn.Module = QuantLinear(
        inp, out, format=held, slots=slots, bias=linear.bias.data, backend=backend, compute=compute,
        planned_for=linear.weight.device.type,
    )  # fmt: skip
    return made


def torchao(linear: nn.Linear) -> nn.Module:
    """torchao's row-wise FP8, compiled."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    clone = nn.Linear(linear.in_features, linear.out_features, device="cuda", dtype=torch.bfloat16)
    clone.load_state_dict(linear.state_dict())
    quantize_(clone, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    compiled: Any = torch.compile(clone)
    return compiled  # type: ignore[no-any-return]


CONTENDERS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "bf16": lambda linear: linear,
    "ours fp8": ours,
    "ours nvfp4": lambda linear: ours(linear, "nvfp4"),
    "ours fp8 te": lambda linear: ours(linear, backend="te"),
    "torchao fp8 compiled": torchao,
    "kitchen fp8": kitchen_linear,
    "te fp8": te_linear,
}


def median(call: Callable[[], object], rounds: int) -> float:
    for _ in range(3):
        call()
    return statistics.median(milliseconds(call) for _ in range(rounds))


def ceilings(rounds: int) -> None:
    """What this machine can do: bytes of a copy (read and write), and products of random matrices."""
    source = torch.randint(0, 255, (2**31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = median(lambda: target.copy_(source), rounds)
    source = target = torch.empty(0)
    a, b = (torch.randn(16384, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    operations = 2 * 16384 * 16384 * 8192 / 1e9
    bf16 = median(lambda: a @ b.t(), rounds)
    codes, others, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
    fp8 = median(
        lambda: torch._scaled_mm(
            codes, others.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        ),
        rounds,
    )
    show(ceilings={"copy_tbps": round(2 * 2**31 / copy / 1e9, 3), "bf16_tflops": round(operations / bf16),
                   "fp8_tflops": round(operations / fp8), "gpu": torch.cuda.get_device_name(),
                   "torch": torch.__version__})  # fmt: skip


def measure(shape: str, tokens: int, inp: int, out: int, rounds: int) -> None:
    from wan_runtime.kernels.quantize_rows import quantize_rows

    linear = nn.Linear(inp, out, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    rows = torch.randn(tokens, inp, device="cuda", dtype=torch.bfloat16)
    made, samples = {}, {}
    for name, make in CONTENDERS.items():
        try:
            made[name] = make(linear)
            for _ in range(3):
                made[name](rows)
            samples[name] = [0.0] * 0
        except Exception as error:  # a library that is not here, or does not take the shape
            show(shape=shape, config=name, error=f"{type(error).__name__}: {str(error)[:120]}")
    for _ in range(rounds):
        for name in samples:
            samples[name].append(milliseconds(lambda layer=made[name]: layer(rows)))  # type: ignore[misc]
    for name, taken in samples.items():
        ms = statistics.median(taken)
        show(shape=shape, config=name, ms=round(ms, 4), tflops=round(2 * tokens * inp * out / ms / 1e9))
    alone = median(lambda: quantize_rows(rows), rounds)
    show(
        shape=shape,
        config="ours quantise alone",
        ms=round(alone, 4),
        tbps=round(3 * rows.numel() / alone / 1e9, 3),
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "this benchmark times GPU kernels and finds no GPU; `wan-runtime bench` runs anywhere."
        )
    ceilings(given.rounds)
    for shape, (tokens, inp, out) in SHAPES.items():
        measure(shape, tokens, inp, out, given.rounds)
        torch._dynamo.reset()


if __name__ == "__main__":
    main()

"""What it saves that an FP8 product adds itself to the residual stream, at WAN's shapes: the product, and its pass.

    python benchmarks/adding.py [--rounds 12] [--dtype bf16]

Prints one JSON object a shape: milliseconds of the product alone and added to the stream, and of each with what follows
it up to the next product's codes. The four take turns, each gets its median.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import linear
import torch
from timing import milliseconds

from wan_runtime.backends import backend_named
from wan_runtime.formats import FORMATS
from wan_runtime.kernels.norm_modulate import Modulation, norm_modulate
from wan_runtime.kernels.residual_norm import residual_norm

# tokens, in, out of the products that end in the stream
SHAPES = {name.replace("qkvo", "o"): shape for name, shape in linear.SHAPES.items() if "ffn.0" not in name}


def ways(tokens: int, inp: int, out: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Each way on the same operands. A block's last product is followed by a pass that writes the host's stream too."""
    backend = backend_named("torch")
    refusal = backend.refuses("fp8", "fp8", torch.device("cuda", 0), (out, inp))
    coded, added = backend.coded("fp8", "fp8"), backend.added("fp8", "fp8")
    stream = torch.randn(tokens, out, device="cuda").to(dtype)
    if refusal is not None or coded is None or added is None or not added.takes(stream):
        why = refusal or backend.remark(stream.device) or f"a pass is faster over {out} of {dtype}"
        raise SystemExit(f"no product adds itself here: {why}")
    codes = torch.randn(tokens, inp, device="cuda").to(torch.float8_e4m3fn)
    scale = torch.rand(tokens, 1, device="cuda") * 1e-3
    slots = FORMATS["fp8"].quantize(torch.randn(out, inp, device="cuda"), True)
    gate, bias, host = (
        torch.randn(1, out, device="cuda"),
        torch.randn(out, device="cuda"),
        torch.empty_like(stream),
    )
    norm = Modulation(gate, gate, 1e-6)
    product = coded(codes, scale, slots)

    def passed() -> object:
        return residual_norm(product, bias, gate, stream, None, norm, True, into=stream)

    def normed() -> object:
        if inp == out:
            return norm_modulate(stream, norm, True, offset=bias)
        return residual_norm(stream, bias, None, None, None, norm, True, into=host)

    def adding() -> None:
        added.add(codes, scale, slots, gate[0], stream)

    def multiplying() -> object:
        return coded(codes, scale, slots)

    def both(*calls: Callable[[], object]) -> Callable[[], object]:
        return lambda: [call() for call in calls]

    return {
        "product": multiplying,
        "product, pass": both(multiplying, passed),
        "added": adding,
        "added, norm": both(adding, normed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the stream")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark times GPU kernels and finds no GPU.")
    dtype = torch.bfloat16 if given.dtype == "bf16" else torch.float32
    for shape, (tokens, inp, out) in SHAPES.items():
        calls = ways(tokens, inp, out, dtype)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(given.rounds + 2):
            for name, call in calls.items():
                times[name].append(milliseconds(call))
        medians = {name: round(statistics.median(found[2:]), 4) for name, found in times.items()}
        print(json.dumps({"shape": shape, "stream": given.dtype, **medians}), flush=True)


if __name__ == "__main__":
    main()

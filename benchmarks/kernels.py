"""Each fused kernel at WAN's sizes: milliseconds, and its bytes as a share of what a copy moves here.

    python benchmarks/kernels.py [--size 14B] [--only gelu] [--sweep] [--loaded] [--compile]

--loaded times each call, the copy's too, after FP8 products, as in a model: they hold the card at its power, its clock
falls, and a kernel that computes more than it moves takes up to a third longer than alone. --sweep tries other
launches (rows a program, warps, stages, registers, rows at once) in turns with the kernel's own, and prints the best
five; --compile only compiles them, so that several processes can fill Triton's cache before one of them measures: one a
kernel (--only).
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from timing import milliseconds, wait

from wan_runtime.kernels import attention_output, gelu_quantize, norm_modulate, norm_rope, residual_norm
from wan_runtime.kernels._launch import Launch, launch_at
from wan_runtime.kernels.quantize_mxfp8 import quantize_mxfp8
from wan_runtime.kernels.quantize_nvfp4 import quantize_nvfp4

SIZES = {
    "14B": (32760, 5120, 13824),
    "5B": (27280, 3072, 14336),
    "1.3B": (32760, 1536, 8960),
}  # tokens, width, ffn
WIDE = tuple(
    Launch(rows, warps, stages, registers)
    for rows, stages, (warps, registers) in itertools.product(
        (1, 4, 8, 16, 32),
        (1, 2, 3, 4),
        ((4, None), (4, 128), (8, None), (8, 128), (8, 80), (16, None), (16, 64)),
    )
)
# A narrow row leaves most of 4 warps waiting: fewer warps, or several rows at once.
NARROW = tuple(
    Launch(rows, warps, stages, registers, tile)
    for rows, stages, (tile, warps, registers) in itertools.product(
        (8, 32),
        (2, 3),
        (
            *itertools.product((1,), (1, 2), (None, 128)),
            *((1, 4, registers) for registers in (None, 80, 64)),
            *itertools.product((2, 4, 8), (4, 8), (None, 128)),
        ),
    )
)


NO_CHOICE = {0: Launch()}  # of kernels that have one launch


def others(width: int) -> tuple[Launch, ...]:
    """The launches that --sweep tries for rows of a width."""
    return WIDE if width > 4096 else NARROW


@dataclass(frozen=True)
class Case:
    """A kernel on rows of one width: how many bytes it has to move, its own launches, and the launch."""

    width: int
    moved: float
    measured: Mapping[int, Launch]
    run: Callable[[Launch], object]


def cases(tokens: int, width: int, ffn: int) -> dict[str, Case]:
    """Random inputs; one modulation for all tokens, and two as in TI2V-5B."""

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    x, y, stream, hidden = draw(tokens, width), draw(tokens, width), draw(tokens, width), draw(tokens, ffn)
    bias, ffn_bias, table = (draw(n, dtype=torch.float32) for n in (width, ffn, 2 * 6 * width))
    table, angles = table.view(2, 6, width), draw(tokens, 128, dtype=torch.float32)
    index = (torch.arange(tokens, device="cuda") > tokens // 31).to(torch.int32)
    one = norm_modulate.Modulation(table[:1, 1], table[:1, 0], 1e-6)
    two = norm_modulate.Modulation(table[:, 1], table[:, 0], 1e-6, index=index)
    codes = torch.empty(tokens, width, dtype=torch.float8_e4m3fn, device="cuda")
    norm, residual, rope = norm_modulate.norm_modulate, residual_norm.residual_norm, norm_rope.norm_rope
    ended, quantised = attention_output.attention_output, tokens * width
    gate, gates = table[:1, 2], table[:, 2]
    return {
        "norm_modulate": Case(width, 3 * quantised, norm_modulate.LAUNCHES, lambda how: norm(x, one, True, how)),
        "norm_modulate of two": Case(width, 3 * quantised, norm_modulate.LAUNCHES, lambda how: norm(x, two, True, how)),
        "norm_modulate, offset": Case(
            width, 3 * quantised, norm_modulate.OFFSET_LAUNCHES, lambda how: norm(x, one, True, how, offset=bias)
        ),
        "residual_norm": Case(
            width, 7 * quantised, residual_norm.LAUNCHES,
            lambda how: residual(y, bias, gate, stream, None, one, True, into=stream, launch=how),
        ),
        "residual_norm of two": Case(
            width, 7 * quantised, residual_norm.LAUNCHES,
            lambda how: residual(y, bias, gates, stream, index, two, True, into=stream, launch=how),
        ),
        "residual_norm, no residual": Case(
            width, 5 * quantised, residual_norm.OFFSET_LAUNCHES,
            lambda how: residual(x, bias, None, None, None, one, True, into=y, launch=how),
        ),
        "residual_norm, no norm": Case(
            width, 6 * quantised, residual_norm.PLAIN_LAUNCHES,
            lambda how: residual(y, bias, gate, stream, None, None, False, into=stream, launch=how),
        ),
        "norm_rope": Case(
            width, 4 * quantised, norm_rope.LAUNCHES, lambda how: rope(x, bias, bias, 1e-6, angles, None, how)
        ),
        "norm_rope to codes": Case(
            width, 3 * quantised, norm_rope.LAUNCHES, lambda how: rope(x, bias, bias, 1e-6, angles, codes, how)
        ),
        "norm_rope, no rotation": Case(
            width, 4 * quantised, norm_rope.LAUNCHES, lambda how: rope(x, bias, bias, 1e-6, None, None, how)
        ),
        "gelu_quantize": Case(
            ffn, 3 * tokens * ffn, gelu_quantize.LAUNCHES,
            lambda how: gelu_quantize.gelu_quantize(hidden, ffn_bias, True, how),
        ),
        "attention_output": Case(
            width, 3 * quantised, attention_output.LAUNCHES, lambda how: ended(x, bias, None, True, how)
        ),
        "quantize_rows": Case(
            width, 3 * quantised, attention_output.LAUNCHES, lambda how: ended(x, None, None, True, how)
        ),
        "quantize_rows, ffn": Case(
            ffn, 3 * tokens * ffn, attention_output.LAUNCHES, lambda how: ended(hidden, None, None, True, how)
        ),
        # Their tile is the scales' own. The first reads its input twice, for the amax.
        "quantize_nvfp4": Case(width, 4.5625 * quantised, NO_CHOICE, lambda how: quantize_nvfp4(x, None)),
        "quantize_mxfp8": Case(width, 3.03125 * quantised, NO_CHOICE, lambda how: quantize_mxfp8(x)),
    }  # fmt: skip


def products(tokens: int, width: int) -> Callable[[], None]:
    """Three FP8 products of [tokens, width] and [width, width], queued."""
    draw = partial(torch.randn, device="cuda")
    codes, weight = (draw(rows, width).to(torch.float8_e4m3fn) for rows in (tokens, width))
    scales, weight_scales = torch.ones(tokens, 1, device="cuda"), torch.ones(1, width, device="cuda")

    def queue() -> None:
        for _ in range(3):
            torch._scaled_mm(
                codes, weight.t(), scales, weight_scales, out_dtype=torch.bfloat16, use_fast_accum=True
            )

    return queue


def medians(
    calls: Mapping[Launch, Callable[[], object]], before: Callable[[], object], rounds: int
) -> dict[Launch, float]:
    """Milliseconds of each on the GPU, all in turns, after two rounds that are not counted."""
    found: dict[Launch, list[float]] = {launch: [] for launch in calls}
    for _ in range(rounds + 2):
        for launch in random.sample(list(calls), len(calls)):
            found[launch].append(milliseconds(calls[launch], before))
    return {launch: float(statistics.median(times[2:])) for launch, times in found.items()}


def copy_rate(before: Callable[[], object], rounds: int) -> float:
    """Bytes a millisecond, read and written, of a device copy."""
    source = torch.randint(0, 255, (2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    (took,) = medians({Launch(): lambda: target.copy_(source)}, before, rounds).values()
    return 2 * 2**30 / took


def possible(
    name: str, case: Case, own: Launch, others: tuple[Launch, ...]
) -> dict[Launch, Callable[[], object]]:
    """The kernel's own launch, and the others that this GPU can make."""
    case.run(own)
    found: dict[Launch, Callable[[], object]] = {own: partial(case.run, own)}
    for launch in others:
        try:
            case.run(launch)
        except Exception as error:  # too many registers or too much shared memory for that launch
            print(f"{name}, {launch}: {type(error).__name__}: {str(error).splitlines()[0][:100]}", flush=True)
        else:
            found[launch] = partial(case.run, launch)
    return found


def report(name: str, least: float, own: Launch, found: Mapping[Launch, float], best: int) -> None:
    """The kernel's own launch and the best ones, beside the `least` milliseconds that a copy of its bytes takes."""
    print(f"{name}: {found[own]:.4f} ms, {least / found[own]:.3f} of the copy rate", flush=True)
    for launch, ms in sorted(found.items(), key=lambda pair: pair[1])[:best]:
        print(f"    {ms:.4f} {least / ms:.3f} {launch}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=SIZES, action="append")
    parser.add_argument("--only", default="", help="kernels whose name has this in it")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--loaded", action="store_true")
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark times GPU kernels and finds no GPU.")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    for size in given.size or SIZES:
        tokens, width, ffn = SIZES[size]
        before = products(tokens, width) if given.loaded else wait
        rounds = 29 if given.loaded else 9
        rate = 0.0 if given.compile else copy_rate(before, rounds)
        print(f"{size}: a copy moves {rate / 1e9:.3f} TB/s" if rate else f"{size}: compiling", flush=True)
        for name, case in cases(tokens, width, ffn).items():
            if given.only not in name:
                continue
            own = launch_at(case.measured, case.width)
            swept = given.sweep and case.measured is not NO_CHOICE
            calls = possible(name, case, own, others(case.width) if swept else ())
            if not given.compile:
                report(
                    f"{size} {name}", case.moved / rate, own, medians(calls, before, rounds), 5 * given.sweep
                )


if __name__ == "__main__":
    main()

"""Times the Linears and the self-attention of a WAN block on this machine: every multiplier that serves here against
bf16, and every attention against torch's SDPA, in one run.

The contenders take turns, so that clocks and heat are the same for all, and each gets its median. They are not a clip,
but they are most of one, and what changes when a format, a backend or a driver does.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.table import Table

from wan_runtime.attention import ATTENTIONS, refused
from wan_runtime.backends import BACKENDS, device_named
from wan_runtime.errors import InvalidOption
from wan_runtime.formats import FORMATS
from wan_runtime.linear import QuantLinear
from wan_runtime.result import Result

WARMUP = 2
BASELINE = "bf16"
ATTENTION, ATTENTION_BASELINE = "self-attention", "sdpa"
HEAD = 128  # of every WAN model


@dataclass(frozen=True)
class Sizes:
    """Of one block's Linears, and the rows they multiply."""

    dim: int
    ffn: int
    tokens: int

    @property
    def heads(self) -> int:
        """Attention heads, at least one."""
        return max(self.dim // HEAD, 1)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (out, in) features."""
        return {
            "attention": (self.dim, self.dim),
            "ffn.0": (self.ffn, self.dim),
            "ffn.2": (self.dim, self.ffn),
        }


GPU_SIZES = Sizes(dim=5120, ffn=13824, tokens=32760)  # Wan 14B, 81 frames of 832x480
CPU_SIZES = Sizes(dim=512, ffn=2048, tokens=1024)


@dataclass(frozen=True)
class Timing:
    """One contender on one Linear, or on self-attention: median milliseconds, and how many times faster than bf16 (for
    an attention: than SDPA)."""

    linear: str
    contender: str
    milliseconds: float
    speedup: float
    tflops: float


@dataclass(frozen=True)
class Benchmark(Result):
    """All timings, where they were taken, and what could not take part."""

    device: str
    torch: str
    sizes: Sizes
    rounds: int
    timings: tuple[Timing, ...]
    refusals: dict[str, str]

    def table(self) -> Table:
        table = Table(
            title=f"{self.sizes.tokens} tokens on {self.device}, torch {self.torch}, median of {self.rounds}",
            caption="\n".join(f"{name}: {why}" for name, why in self.refusals.items()) or None,
            caption_justify="left",
        )
        for heading in ("Linear", "multiplier", "ms", "times baseline", "TFLOPS"):
            table.add_column(heading, justify="left" if heading in ("Linear", "multiplier") else "right")
        for t in self.timings:
            cells = f"{t.milliseconds:.3f}", f"{t.speedup:.2f}", f"{t.tflops:.1f}"
            shape = self.sizes.linears.get(t.linear, (self.sizes.heads, HEAD))
            table.add_row(f"{t.linear} {list(shape)}", t.contender, *cells)
        return table


def default_sizes(device: str | None = None) -> Sizes:
    """Wan 14B at 81 frames of 832x480 on a GPU, something small on a CPU."""
    return GPU_SIZES if device_named(device).type == "cuda" else CPU_SIZES


def measure(sizes: Sizes | None = None, *, device: str | None = None, rounds: int = 20) -> Benchmark:
    """Time every multiplier on a block's Linears with bias, bf16 in and out, activations quantised in the call, and
    every attention on its self-attention.

    `sizes` is `default_sizes` where it is None. Raises InvalidOption for sizes or rounds below 1.
    """
    where = device_named(device)
    sizes = sizes or default_sizes(device)
    if min(sizes.dim, sizes.ffn, sizes.tokens, rounds) < 1:
        raise InvalidOption(f"sizes and rounds must be at least 1; they are {sizes} and {rounds}.")
    timings: list[Timing] = []
    refusals: dict[str, str] = {}
    for name, (out, inp) in sizes.linears.items():
        timings += _timed(name, out, inp, sizes.tokens, where, rounds, refusals)
    timings += _attentions(sizes, where, rounds, refusals)
    gpu = torch.cuda.get_device_name(where) if where.type == "cuda" else "the CPU"
    return Benchmark(gpu, torch.__version__, sizes, rounds, tuple(timings), refusals)


def _timed(
    name: str, out: int, inp: int, tokens: int, device: torch.device, rounds: int, refusals: dict[str, str]
) -> Iterator[Timing]:
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(tokens, inp, device=device, dtype=torch.bfloat16, generator=generator)
    weight = torch.randn(out, inp, device=device, generator=generator) * 0.03
    contenders = dict(_contenders(weight, refusals))
    medians = _raced(
        {name: functools.partial(layer, rows) for name, layer in contenders.items()}, device, rounds
    )
    for contender, median in medians.items():
        tflops = 2 * tokens * out * inp / median / 1e9
        yield Timing(name, contender, median, medians[BASELINE] / median, tflops)


def _attentions(
    sizes: Sizes, device: torch.device, rounds: int, refusals: dict[str, str]
) -> Iterator[Timing]:
    """Self-attention at the block's size by every attention that serves here, in bf16."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (3, 1, sizes.tokens, sizes.heads, HEAD)
    q, k, v = torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)
    reasons = {name: refused(name, device, torch.bfloat16, HEAD) for name in ATTENTIONS}
    refusals |= {f"{ATTENTION}: {name}": reason for name, reason in reasons.items() if reason is not None}
    serving = [name for name, reason in reasons.items() if reason is None]
    medians = _raced(
        {name: functools.partial(ATTENTIONS[name].attend, q, k, v) for name in serving}, device, rounds
    )
    for name, median in medians.items():
        tflops = 4 * sizes.tokens**2 * sizes.heads * HEAD / median / 1e9
        yield Timing(ATTENTION, name, median, medians[ATTENTION_BASELINE] / median, tflops)


def _raced(
    contenders: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, float]:
    """Each contender's median milliseconds; they take turns."""
    samples: dict[str, list[float]] = {contender: [] for contender in contenders}
    with torch.inference_mode():
        for turn in range(WARMUP + rounds):
            for contender, call in contenders.items():
                taken = _milliseconds(call, device)
                if turn >= WARMUP:
                    samples[contender].append(taken)
    return {contender: statistics.median(taken) for contender, taken in samples.items()}


def _contenders(
    weight: torch.Tensor, refusals: dict[str, str]
) -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    out, inp = weight.shape
    bias = torch.zeros(out, device=weight.device)
    plain = torch.nn.Linear(inp, out, device=weight.device, dtype=torch.bfloat16)
    plain.weight.data.copy_(weight)
    yield BASELINE, plain
    for backend in (BACKENDS[name] for name in BACKENDS if name != "reference"):
        for held in FORMATS:
            for compute in backend.computes(held):
                name = f"{backend.name}: {held} in {compute}"
                refusal = FORMATS[held].refuses(out, inp)
                refusal = refusal or backend.refuses(held, compute, weight.device, (out, inp))
                if refusal is not None:
                    refusals[name] = refusal
                    continue
                slots = FORMATS[held].quantize(weight, backend.per_channel)
                yield name, QuantLinear(
                    inp, out, format=held, slots=slots, bias=bias, backend=backend.name, compute=compute,
                    planned_for=weight.device.type,
                )  # fmt: skip


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e3
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))

"""Counts what the parts of a clip take of torch's allocator, exactly: its own peaks on a GPU, its events on a CPU.

The allocator is asked at the borders of the parts (`wan_runtime.serve.memory` names them), which hooks of the pipeline
tell. On a GPU that costs microseconds. On a CPU the profiler takes down every event: for warming up, and for tests.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from wan_runtime import ClipRequest, StartImage

log = logging.getLogger("wan_serve.worker")
MARK = "wan_serve:"  # before the names of our own events among the profiler's


class Meter(Protocol):
    """What is told of each part as it begins."""

    def begin(self, part: str) -> None: ...


class GpuMeter:
    """The peaks of one kind of bytes (`allocated_bytes` as they are, `requested_bytes` before rounding) on one GPU."""

    def __init__(self, device: Any, kind: str) -> None:
        import torch

        self._stats = torch.cuda.memory_stats
        self._reset = torch.cuda.reset_peak_memory_stats
        self._device, self._kind = device, kind
        self._part: str | None = None
        self._most: dict[str, int] = {}
        self.rest = self._read("current")

    def begin(self, part: str) -> None:
        """The part before ends."""
        if part != self._part:
            self._end()
            self._part = part

    def take(self) -> dict[str, int]:
        """The most that each part has held beyond `rest`, since this was last asked."""
        self._end()
        self._part = None
        most, self._most = self._most, {}
        return {part: held - self.rest for part, held in most.items()}

    def _end(self) -> None:
        if self._part is not None:
            self._most[self._part] = max(self._most.get(self._part, 0), self._read("peak"))
        self._reset(self._device)

    def _read(self, what: str) -> int:
        return int(self._stats(self._device)[f"{self._kind}.all.{what}"])


@contextlib.contextmanager
def parts_told(pipe: Any, meter: Meter) -> Iterator[None]:
    """Tells `meter` of each part of a clip that `pipe` makes within."""
    vae = pipe.vae
    decode = vae.decode

    def told(part: str) -> Callable[..., None]:
        return lambda *_: meter.begin(part)

    def decode_and_tell(*given: Any, **options: Any) -> Any:
        decoded = decode(*given, **options)
        meter.begin("finish")
        return decoded

    experts = [model for model in (pipe.transformer, pipe.transformer_2) if model is not None]
    hooks = [model.register_forward_pre_hook(told("denoise")) for model in experts]
    hooks.append(vae.encoder.register_forward_pre_hook(told("image")))
    hooks.append(vae.decoder.register_forward_pre_hook(told("chunk")))
    hooks.append(vae.decoder.register_forward_hook(told("join")))
    vae.decode = decode_and_tell
    try:
        meter.begin("text")
        yield
    finally:
        del vae.decode  # the class's own is there again
        for hook in hooks:
            hook.remove()


class _Enough(Exception):
    """The clip has been denoised, and that was what it was made for."""


def count(
    pipe: Any,
    clips: Sequence[ClipRequest],
    start: Callable[[ClipRequest], StartImage | None],
    undecoded: int = 0,
) -> list[dict[str, int]]:
    """Makes the clips, of the first `undecoded` not the frames: the bytes of each part at its most, beyond what rested
    before the first.

    `start` gives what a clip starts from. Raises what `wan_runtime.generate` raises.
    """
    import wan_runtime

    def make(number: int, meter: Meter) -> None:
        def on_step(done: int, steps: int) -> None:
            if done == steps and number < undecoded:
                raise _Enough

        gc.collect()
        with contextlib.suppress(_Enough), parts_told(pipe, meter):
            wan_runtime.generate(pipe, clips[number], on_step, image=start(clips[number]))

    device = pipe.vae.device
    return _on_gpu(device, len(clips), make) if device.type == "cuda" else _on_cpu(len(clips), make)


def _on_gpu(device: Any, clips: int, make: Callable[[int, Meter], None]) -> list[dict[str, int]]:
    """In bytes as they were asked for: rounded ones of small clips do not grow evenly."""
    import torch

    native = (
        torch.cuda.get_allocator_backend() == "native"
    )  # CUDA's own pool does not count what was asked for
    meter = GpuMeter(device, "requested_bytes" if native else "allocated_bytes")
    counted = []
    for number in range(clips):
        make(number, meter)
        counted.append(meter.take())
    return counted


def _on_cpu(clips: int, make: Callable[[int, Meter], None]) -> list[dict[str, int]]:
    """From one session of the profiler, which knows nothing of what was there before: that rests."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile, record_function

    class Marks:
        def __init__(self, number: int) -> None:
            self.number, self.part = number, ""

        def begin(self, part: str) -> None:
            if part != self.part:
                self.part = part
                with record_function(f"{MARK}{self.number}:{part}"):
                    pass

    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as session:
        for number in range(clips):
            make(number, Marks(number))
    counted: list[dict[str, int]] = [{} for _ in range(clips)]
    held, parts, part = 0, counted[0], ""
    events = session.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        name = event.name()
        if name == "[memory]" and event.device_type() == DeviceType.CPU:
            held += event.nbytes()
        elif name.startswith(MARK):
            number, part = name.removeprefix(MARK).split(":")
            parts = counted[int(number)]
        if part:
            parts[part] = max(parts.get(part, 0), held)
    return counted


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What is written to the standard error stream meanwhile goes to the log as details: the profiler, in C++, tells of
    its start and its end there, and a log of JSON must hold nothing else."""
    with tempfile.TemporaryFile() as kept, open(os.dup(2), "wb") as before:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before.fileno(), 2)
            kept.seek(0)
            for line in kept.read().decode(errors="replace").splitlines():
                log.debug("%s", line)

"""One job in the worker: from a request to its files, given up at the next step or decoded chunk if told to."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wan_runtime import InvalidRequest

from . import pictures
from .counters import Counters
from .inputs import read_kept
from .memory import GIB, Memory, clip_bytes
from .previews import Map, Previews
from .storage import Storage

if TYPE_CHECKING:
    from wan_runtime import Lora

log = logging.getLogger("wan_serve.worker")
LACK = ("allocate memory", "not enough memory", "bad_alloc")  # how torch's CPU allocators and C++ say it


class Cancelled(Exception):
    """The job was cancelled while it ran."""


@dataclass(frozen=True)
class Bench:
    """What one worker makes clips with. `tell(event, **data)` reports; `check(job)` raises Cancelled."""

    pipe: Any
    storage: Storage
    counters: Counters
    tell: Callable[..., None]
    check: Callable[[str], None]
    preview_map: Map
    embed: bool = True
    loras: Callable[[], Mapping[str, Lora]] = dict
    memory: Memory | None = None


@dataclass(frozen=True)
class Outcome:
    """How a job ended: `done` with its files' bytes, `cancelled`, or `failed` with a code and a message."""

    event: str
    data: Mapping[str, Any]


def make(bench: Bench, job_id: str, asked: Mapping[str, Any], made_with: Mapping[str, Any]) -> Outcome:
    """Makes one job's files, whole or not at all. All its memory is free again when this returns."""
    try:
        size = _make(bench, job_id, asked, made_with)
        memory = _weighed(bench, asked)
        outcome = Outcome("done", {"size": size, "memory": memory})
        told = ", ".join(f"{count / GIB:.2f} GiB {what}" for what, count in memory.items())
        log.info("%s is done%s", job_id, f" (memory beside the weights: {told})" if told else "")
    except Cancelled:
        outcome = Outcome("cancelled", {})
    except Exception as error:
        code, message = explain(error, asked)
        if code == "generation_failed":
            log.exception("%s failed", job_id)
        outcome = Outcome("failed", {"code": code, "message": message})
    free(bench.pipe)  # not earlier: the exception's traceback holds the frames, and they the tensors
    note_memory(bench.counters)
    return outcome


def note_memory(counters: Counters, *, anew: bool = False) -> None:
    """Notes what this process takes of the GPUs; `anew` starts the peak over, for a new job."""
    import torch

    held = peak = 0
    for device in range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ():
        if anew:
            torch.cuda.reset_peak_memory_stats(device)
        held += torch.cuda.memory_reserved(device)
        peak += torch.cuda.max_memory_allocated(device)
    counters.take(held, peak)


def free(pipe: Any) -> None:
    """Gives back what a clip that ended early, or any clip, has left behind."""
    import torch

    pipe.vae.clear_cache()  # a decoding that was stopped leaves its feature maps there
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _weighed(bench: Bench, asked: Mapping[str, Any]) -> dict[str, float]:
    """What the clip just made was `predicted` to take, and on a GPU its `peak`, in bytes beside the weights."""
    import torch

    import wan_runtime

    if bench.memory is None:
        return {}
    told: dict[str, float] = {"predicted": clip_bytes(bench.memory, wan_runtime.ClipRequest(**asked))}
    device = bench.pipe.vae.device
    if device.type == "cuda":  # its peak began anew with the job, in `_make`
        told["peak"] = torch.cuda.max_memory_allocated(device) - bench.memory.rest
    return told


def _make(bench: Bench, job_id: str, asked: Mapping[str, Any], made_with: Mapping[str, Any]) -> int:
    import wan_runtime

    request = wan_runtime.ClipRequest(**asked)
    steps = request.num_inference_steps
    bench.check(job_id)
    note_memory(bench.counters, anew=True)
    bench.tell("phase", job=job_id, phase="text", step=0)

    previews = Previews(bench.preview_map)

    def on_step(done: int, steps: int) -> None:
        bench.counters.count("steps")
        note_memory(bench.counters)
        bench.tell("phase", job=job_id, phase="denoise" if done < steps else "decode", step=done)
        bench.check(job_id)
        if image := previews.take(bench.pipe):
            bench.tell("preview", job=job_id, step=done, image=image)

    def on_chunk() -> None:
        bench.counters.count("chunks")
        note_memory(bench.counters)
        bench.check(job_id)

    start = read_kept(bench.storage.start_image(job_id), request.image) if request.image else None
    with (
        _at_first_step(bench.pipe, lambda: bench.tell("phase", job=job_id, phase="denoise", step=0)),
        _between_chunks(bench.pipe.vae, on_chunk, lambda: bench.check(job_id)),
    ):
        clip = wan_runtime.generate(bench.pipe, request, on_step, image=start, loras=bench.loras())
    bench.check(job_id)
    bench.tell("phase", job=job_id, phase="encode", step=steps)
    storage = bench.storage
    pictures.write_thumbnail(clip.frames, storage.thumbnail(job_id))
    pictures.write_spritesheet(clip.frames, storage.spritesheet(job_id))
    bench.check(job_id)
    tags = {"comment": json.dumps({**made_with, "request": dict(asked)})} if bench.embed else {}
    # the clip comes last: where it is, the job is complete
    wan_runtime.write_video(clip.frames, storage.video(job_id), request.fps, tags)
    bench.counters.count("clips")
    return storage.size(job_id)


@contextlib.contextmanager
def _at_first_step(pipe: Any, on_begin: Callable[[], None]) -> Iterator[None]:
    """Calls `on_begin` once, before a transformer runs for the first time: the prompt is read, and denoising begins."""

    def begin(*_: Any) -> None:
        let_go()
        on_begin()

    def let_go() -> None:
        for hook in hooks:
            hook.remove()

    parts = [part for part in (pipe.transformer, pipe.transformer_2) if part is not None]
    hooks = [part.register_forward_pre_hook(begin) for part in parts]
    try:
        yield
    finally:
        let_go()


@contextlib.contextmanager
def _between_chunks(
    vae: Any, on_chunk: Callable[[], None], on_encoding: Callable[[], None]
) -> Iterator[None]:
    """Calls `on_chunk` before each latent frame (or tile of one) is decoded, and `on_encoding` before each piece of the
    start image's clip is encoded; what either raises ends the work."""
    hooks = [
        part.register_forward_pre_hook(lambda *_, call=call: call())
        for part, call in ((vae.decoder, on_chunk), (vae.encoder, on_encoding))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def is_lack_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LACK)


def explain(error: Exception, asked: Mapping[str, Any]) -> tuple[str, str]:
    """What a client is told about a failure: a code, and a sentence with the remedy where there is one."""
    if is_lack_of_memory(error):
        width, height, frames = asked["width"], asked["height"], asked["num_frames"]
        fewer = max((frames // 2) // 4 * 4 + 1, 1)
        return (
            "out_of_memory",
            f"There was not enough free memory for {width}x{height} with {frames} frames{_memory()}. Ask for about "
            f"{fewer} frames, or for about {round(width * 0.7)}x{round(height * 0.7)}: either halves the need.",
        )
    if isinstance(error, InvalidRequest):
        return error.code, str(error)[:1000]
    # its own words are for the operator: they may name files, addresses or code
    kind = type(error).__name__
    return (
        "generation_failed",
        f"The clip could not be made ({kind}); the server's log has the cause under the job's id.",
    )


def _memory() -> str:
    import torch

    if not torch.cuda.is_available():
        return ""
    free_bytes, total = torch.cuda.mem_get_info()
    peak = torch.cuda.max_memory_allocated()
    return f" (peak {peak / 2**30:.1f} GiB, {free_bytes / 2**30:.1f} of {total / 2**30:.1f} GiB free now)"

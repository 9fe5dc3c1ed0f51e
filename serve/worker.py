"""The process that holds the model. It loads, warms up, makes clips, and reports every phase and step over a pipe.

It talks JSON, never pickle. It dies with its parent in two ways, since either alone can fail: the kernel's parent-death
signal, and the end of the pipe. A cancel arrives on the same pipe while a clip is being made and is obeyed at the next
denoising step, before decoding, and before the file is written.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import queue
import signal
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from typing import Any

from .settings import Settings
from .storage import Storage

log = logging.getLogger("wan_serve.worker")
PR_SET_PDEATHSIG = 1


class Cancelled(Exception):
    """The job was cancelled while it ran."""


class Line:
    """The pipe to the HTTP process: a thread reads its commands, any thread may tell it something."""

    def __init__(self, connection: Connection) -> None:
        self.jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._connection = connection
        self._lock = threading.Lock()
        self._cancelled: set[str] = set()
        threading.Thread(target=self._read, name="commands", daemon=True).start()

    def tell(self, event: str, **data: Any) -> None:
        """Reports an event."""
        with self._lock:
            self._connection.send_bytes(json.dumps({"event": event, **data}).encode())

    def check(self, job_id: str) -> None:
        """Raises Cancelled if this job is not wanted any more."""
        if job_id in self._cancelled:
            raise Cancelled

    def _read(self) -> None:
        while True:
            try:
                command = json.loads(self._connection.recv_bytes())
            except (EOFError, OSError):
                os._exit(0)  # the server is gone, and with it whoever wanted what this process is doing
            if command["do"] == "generate":
                self.jobs.put(command)
            else:
                self._cancelled.add(command["job"])


def main(connection: Connection, settings: Settings, parent: int) -> None:
    """The process, from start to its parent's end."""
    _die_with(parent)
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # they reach the whole group; the server decides what they mean
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(name)s %(levelname)s %(message)s"
    )
    line = Line(connection)
    try:
        pipe, facts = _prepare(line, settings)
    except Exception as error:
        from wan_runtime import WanRuntimeError

        if not isinstance(error, (WanRuntimeError, OSError)):
            log.exception("the model could not be prepared")
        line.tell("fatal", message=f"{type(error).__name__}: {error}")
        sys.exit(1)
    line.tell("ready", **facts)
    storage = Storage(settings.data_dir)
    while True:
        command = line.jobs.get()
        _run(line, pipe, command["job"], command["request"], storage)


def _die_with(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        os._exit(0)


def _quiet_libraries() -> None:
    """Their progress bars have no place in a server's log."""
    from tqdm import tqdm  # type: ignore[import-untyped]
    from transformers.utils.logging import disable_progress_bar

    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a killed worker would leak
    disable_progress_bar()


def _prepare(line: Line, settings: Settings) -> tuple[Any, dict[str, Any]]:
    """The pipeline, warm, and what there is to say about it."""
    line.tell("phase", phase="importing")
    import wan_runtime

    _quiet_libraries()

    line.tell("phase", phase="loading")
    pipe = wan_runtime.load_pipeline(**settings.pipeline_options())
    profile = wan_runtime.clip_profile(pipe)
    line.tell("phase", phase="warming")
    least = replace(
        profile.request("warm-up", seed=0), width=8 * profile.size_multiple, height=8 * profile.size_multiple,
        num_frames=5, num_inference_steps=1,
    )  # fmt: skip
    wan_runtime.generate(pipe, least)
    return pipe, {"profile": asdict(profile), "facts": _facts(pipe)}


def _facts(pipe: Any) -> dict[str, Any]:
    """What runs: who wrote the file, and how many layers are held and multiplied in which way."""
    import wan_runtime

    report = wan_runtime.patch(pipe.transformer)  # patched already, by load: this only hands out its report
    ways = Counter((layer.format, layer.compute, layer.backend) for layer in report.quantised)
    for note in report.notes:
        log.info("%s", note)
    return {
        "variant": report.variant,
        "dialect": report.dialect,
        "quantised_layers": [
            {"layers": count, "format": held, "compute": compute, "backend": backend}
            for (held, compute, backend), count in ways.items()
        ],
        "notes": list(report.notes),
        "device": str(pipe.transformer.device),
        "dtype": report.dtype,
    }


def _run(line: Line, pipe: Any, job_id: str, asked: Mapping[str, Any], storage: Storage) -> None:
    """One job; whatever happens, exactly one of done, cancelled or failed is told."""
    try:
        _make(line, pipe, job_id, asked, storage)
        line.tell("done", job=job_id)
    except Cancelled:
        log.info("%s was cancelled", job_id)
        line.tell("cancelled", job=job_id)
    except Exception as error:
        code, message = _explain(error, asked)
        if code == "generation_failed":
            log.exception("%s failed", job_id)
        line.tell("failed", job=job_id, code=code, message=message)


def _make(line: Line, pipe: Any, job_id: str, asked: Mapping[str, Any], storage: Storage) -> None:
    import wan_runtime

    request = wan_runtime.ClipRequest(**asked)

    def on_step(done: int, steps: int) -> None:
        line.tell("phase", job=job_id, phase="denoise" if done < steps else "decode", step=done)
        line.check(job_id)

    line.check(job_id)
    line.tell("phase", job=job_id, phase="text", step=0)
    clip = wan_runtime.generate(pipe, request, on_step)
    line.check(job_id)
    line.tell("phase", job=job_id, phase="encode", step=request.num_inference_steps)
    wan_runtime.write_video(clip.frames, storage.video(job_id), request.fps)


def _explain(error: Exception, asked: Mapping[str, Any]) -> tuple[str, str]:
    """What a client is told about a failure: a code, and a sentence with the remedy where there is one."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        size = f"{asked['width']}x{asked['height']} with {asked['num_frames']} frames"
        return (
            "out_of_memory",
            f"The device has not enough free memory for {size}. Ask for a smaller or shorter clip.",
        )
    code = getattr(error, "code", None)
    return code if isinstance(code, str) else "generation_failed", f"{type(error).__name__}: {error}"[:1000]

"""Before a worker is ready: the model loaded and used once, how fast it is, and what there is to say about it."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

from wan_runtime import ClipProfile, ClipRequest, StartImage

from .costs import Speed, operations, pixels_of, tokens_of
from .inputs import UNKNOWN
from .making import free, is_lack_of_memory
from .memory import Memory
from .settings import Settings
from .weighing import STEPS, learn

log = logging.getLogger("wan_serve.worker")
PROFILE_STEPS = 2  # the first one sets things up for its size


def make_room() -> None:
    """Gives back what the model before has left."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load(settings: Settings) -> Any:
    """The pipeline. Raises what `wan_runtime.load_pipeline` raises."""
    import wan_runtime

    _quiet_libraries()
    return wan_runtime.load_pipeline(**settings.pipeline_options())


def health_clip(profile: ClipProfile) -> ClipRequest:
    """The least clip that goes through every part of the model."""
    side = 8 * profile.size_multiple
    return replace(_practice(profile), width=side, height=side, num_frames=5, num_inference_steps=1)


def try_out(pipe: Any) -> None:
    """Makes the least clip. Raises what `wan_runtime.generate` raises."""
    import wan_runtime

    clip = health_clip(wan_runtime.clip_profile(pipe))
    wan_runtime.generate(pipe, clip, image=_blank(clip))


def _practice(profile: ClipProfile) -> ClipRequest:
    image = UNKNOWN if profile.takes_image == "required" else None
    return profile.request("warm-up", seed=0, image=image)


def _blank(clip: ClipRequest) -> StartImage | None:
    """What a practice clip starts from, where the model asks for an image."""
    from PIL import Image

    if clip.image is None:
        return None
    return StartImage(Image.new("RGB", (clip.width, clip.height), "grey"), clip.image)


def warm(pipe: Any, settings: Settings) -> dict[str, Any]:
    """Uses the model for the first time, and says what it can do: the data of the `ready` event."""
    import wan_runtime

    profile = wan_runtime.clip_profile(pipe)
    try_out(pipe)
    speed, memory = _measure(pipe, profile), _weigh(pipe, profile, settings)
    return {
        "profile": asdict(profile),
        "facts": _facts(pipe),
        "speed": asdict(speed),
        "memory": memory and asdict(memory),
    }


def _weigh(pipe: Any, profile: ClipProfile, settings: Settings) -> Memory | None:
    """What memory clips take, where anything is to be refused by it: on a GPU, or within the operator's own limit."""
    if not settings.check_memory or (settings.max_clip_gib is None and pipe.vae.device.type != "cuda"):
        return None
    ends = settings.attention_end_steps or 0  # one step between them must attend in FP8
    try:
        return learn(pipe, _practice(profile), _blank, max(STEPS, 2 * ends + 1))
    except Exception as error:
        if not is_lack_of_memory(error):
            raise
    log.warning("memory ran out while it was counted for small clips: no clip will be refused by its memory")
    free(pipe)
    return None


def _measure(pipe: Any, profile: ClipProfile) -> Speed:
    """Times a clip of a quarter of the model's own size, since work that small says little of a GPU's speed."""
    import wan_runtime

    multiple = profile.size_multiple
    probe = replace(
        _practice(profile),
        width=max(profile.width // 2 // multiple, 4) * multiple,
        height=max(profile.height // 2 // multiple, 4) * multiple,
        num_frames=9,
        num_inference_steps=PROFILE_STEPS,
    )
    times = [time.perf_counter()]
    wan_runtime.generate(pipe, probe, lambda *_: times.append(time.perf_counter()), image=_blank(probe))
    times.append(time.perf_counter())
    step, tail = times[-2] - times[-3], times[-1] - times[-2]
    per_token, per_pair = operations((pipe.transformer or pipe.transformer_2).config)
    tokens = tokens_of(probe, multiple)
    work = (2 if probe.guidance_scale > 1 else 1) * (per_token * tokens + per_pair * tokens**2)
    return Speed(
        per_token=per_token,
        per_pair=per_pair,
        operations_a_second=work / max(step, 1e-6),
        seconds_a_pixel=tail / pixels_of(probe),
        other_seconds=max(times[1] - times[0] - step, 0.0),
    )


def _facts(pipe: Any) -> dict[str, Any]:
    """What runs: who wrote the file, and how many layers are held and multiplied in which way."""
    import diffusers  # type: ignore[import-untyped, unused-ignore]
    import torch

    import wan_runtime

    report = wan_runtime.patch(pipe.transformer)  # patched already, by load: this only hands out its report
    ways = Counter((layer.format, layer.compute, layer.backend) for layer in report.quantised)
    for note in report.notes:
        log.info("%s", note)
    device = pipe.transformer.device
    return {
        "variant": report.variant,
        "dialect": report.dialect,
        "quantised_layers": [
            {"layers": count, "format": held, "compute": compute, "backend": backend}
            for (held, compute, backend), count in ways.items()
        ],
        "notes": list(report.notes),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": report.dtype,
        "scheduler": type(pipe.scheduler).__name__,
        "versions": {
            "wan_runtime": wan_runtime.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }


def _quiet_libraries() -> None:
    """Their progress bars have no place in a server's log."""
    import threading

    from tqdm import tqdm  # type: ignore[import-untyped]
    from transformers.utils.logging import disable_progress_bar

    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a killed worker would leak
    disable_progress_bar()

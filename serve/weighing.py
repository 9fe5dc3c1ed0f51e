"""What memory a model's clips take, learned when it is warmed up: which small clips are made for it, and what they say.

The passes of the transformer are counted in clips that are never decoded, with tokens enough to outweigh what does not
grow with them; the decoding in clips of a few tokens.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from wan_runtime import ClipProfile, ClipRequest, StartImage

from .measuring import count
from .memory import Memory, fit

STEPS = 3  # after which a scheduler holds all that it ever does; the middle one attends in FP8 where that is asked for
# Of the larger clip for the passes: text has 512, and FP8 attention begins at 1,024, which both clips are to exceed.
TOKENS = 2200
DECODED = (9, 17)  # frames: from the third latent on, the VAE does the same with each


def clips_to_pass(practice: ClipRequest, profile: ClipProfile, steps: int = STEPS) -> list[ClipRequest]:
    """Two clips whose passes are counted: of about TOKENS tokens and of half as many, if the model takes so many."""
    most = (profile.max_frames - 1) // 4 + 1
    for share in (2, 1):
        width, height = _sides(profile, share)
        each = width * height // profile.size_multiple**2
        latents = min(-(-TOKENS // each), most)
        if latents * each >= TOKENS:
            break
    latents = max(latents, 2)
    return [
        replace(
            practice, width=width, height=height, num_frames=4 * (count - 1) + 1, num_inference_steps=steps
        )
        for count in (-(-latents // 2), latents)
    ]


def clips_to_decode(practice: ClipRequest, profile: ClipProfile) -> list[ClipRequest]:
    """Three clips that differ in area and in frames, whose decoding is counted."""
    short, long = DECODED
    whole = _sides(profile, 2)
    half = (whole[0], whole[1] // 2 // profile.size_multiple * profile.size_multiple)
    return [
        replace(practice, width=width, height=height, num_frames=frames, num_inference_steps=1)
        for (width, height), frames in ((whole, short), (half, short), (half, long))
    ]


def _sides(profile: ClipProfile, share: int) -> tuple[int, int]:
    """The model's own width and height divided by `share`, in whole tokens and four at least."""
    multiple = profile.size_multiple
    width, height = (max(side // share // multiple, 4) * multiple for side in (profile.width, profile.height))
    return width, height


def learn(
    pipe: Any, practice: ClipRequest, start: Callable[[ClipRequest], StartImage | None], steps: int = STEPS
) -> Memory:
    """Counts small clips: what a clip of this model will take.

    `practice` has the prompt and the guidance of the clips. Raises what `wan_runtime.generate` raises.
    """
    import wan_runtime

    profile = wan_runtime.clip_profile(pipe)
    passed = clips_to_pass(practice, profile, steps)
    count(pipe, passed[:1], start, undecoded=1)  # both experts make now what they keep between clips
    rest, room = at_rest(pipe)
    clips = [*passed, *clips_to_decode(practice, profile)]
    counted = count(pipe, clips, start, undecoded=len(passed))
    for parts in counted[len(passed) :]:
        parts["few"] = parts.pop("denoise")
    return Memory(parts=fit(zip(clips, counted, strict=True)), rest=rest, room=room)


def at_rest(pipe: Any) -> tuple[int, int | None]:
    """The bytes that rest on the pipeline's GPU, and how many more its process may take; on a CPU 0 and None."""
    import torch

    device = pipe.vae.device
    if device.type != "cuda":
        return 0, None
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    held = torch.cuda.memory_allocated(device)
    return held, min(free + torch.cuda.memory_reserved(device), allowed) - held

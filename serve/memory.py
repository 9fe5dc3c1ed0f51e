"""What a clip will take of the memory, predicted from small ones that were counted when the model was warmed up.

In bytes of torch's allocator beyond what rests there between clips (weights, and what a model keeps). Each part of the
work is affine in what it is fitted to, since the pipeline's loops hold it to that: attention keeps no scores, so a pass
grows with its tokens; the VAE decodes one latent frame at a time, so its feature maps grow with a frame's area, and
what it has decoded by then with all pixels. A clip takes what the greatest part does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from wan_runtime import ClipRequest

GIB = 2**30
MARGIN = 0.05  # on top of a prediction: what the allocator rounds up, and holes in it that fit nothing
# The parts of each phase: `image` is the start image's encoding; `chunk` within the decoder, `join` between two chunks,
# `finish` from decoded latents to frames.
# `few` is a pass of so few tokens that the text's outweigh them.
PHASES = {"text": ("text", "image"), "denoise": ("denoise", "few"), "decode": ("chunk", "join", "finish")}
Counted = Mapping[str, int]  # part -> bytes at its most


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What is known of a model's need: coefficients of each part, and in bytes what rests and how much a clip may take.

    `room` is None where nobody can say (a CPU's resident memory is not its allocator's).
    """

    parts: Mapping[str, Sequence[float]]
    rest: int
    room: int | None = None


def terms(part: str, request: ClipRequest) -> tuple[float, ...]:
    """What a part grows with."""
    area = request.width * request.height
    if part == "text":  # always of as many tokens, and of few latents
        return (1.0,)
    if part in PHASES["denoise"]:
        return (1.0, float(area * ((request.num_frames - 1) // 4 + 1)))
    return (1.0, float(area), float(area * request.num_frames))


def fit(counted: Iterable[tuple[ClipRequest, Counted]]) -> dict[str, list[float]]:
    """The coefficients of every part that was counted, from as many different clips as it has terms or more."""
    import numpy as np

    rows: dict[str, list[tuple[tuple[float, ...], int]]] = {}
    for request, parts in counted:
        for part, most in parts.items():
            rows.setdefault(part, []).append((terms(part, request), most))
    fitted = {"text": [float(max(most for _, most in rows.pop("text")))]}
    for part, points in rows.items():
        known = np.array([values for values, _ in points])
        scale = known.max(0)
        solved = np.linalg.lstsq(known / scale, np.array([most for _, most in points], float), rcond=None)[0]
        fitted[part] = [float(value) for value in solved / scale]
    return fitted


def by_phase(memory: Memory, request: ClipRequest) -> dict[str, float]:
    """The bytes that each phase of a clip is predicted to take at its most."""

    def of(part: str) -> float:
        pairs = zip(memory.parts.get(part, ()), terms(part, request), strict=False)
        return max(sum(coefficient * value for coefficient, value in pairs), 0.0)

    return {phase: max(map(of, parts)) for phase, parts in PHASES.items()}


def clip_bytes(memory: Memory, request: ClipRequest) -> float:
    """The bytes that a clip is predicted to take at its most."""
    return max(by_phase(memory, request).values())


def refusal(
    memory: Memory, request: ClipRequest, size_multiple: int, limit: float, beside: int = 0
) -> str | None:
    """Why a clip is not to be tried within so many bytes, with the numbers and what would fit; None where it fits.

    `beside` are bytes that it needs throughout, of LoRAs.
    """

    def fits(one: ClipRequest) -> bool:
        return (clip_bytes(memory, one) + beside) * (1 + MARGIN) <= limit

    if fits(request):
        return None
    need = {phase: (most + beside) / GIB for phase, most in by_phase(memory, request).items()}
    told = ", ".join(f"{phase} {most:.2f}" for phase, most in need.items())
    return (
        f"There would not be enough memory for {request.width}x{request.height} with {request.num_frames} frames: "
        f"that is predicted to take {max(need.values()):.2f} GiB beside the weights ({told}), and {MARGIN:.0%} more "
        f"for what the allocator loses; there are {limit / GIB:.2f} GiB. {_what_fits(request, size_multiple, fits)}"
    )


def _what_fits(request: ClipRequest, multiple: int, fits: Callable[[ClipRequest], bool]) -> str:
    for frames in range(request.num_frames - 4, 0, -4):
        if fits(replace(request, num_frames=frames)):
            return f"Up to {frames} frames of this size fit."
    for share in range(95, 0, -5):
        width, height = (
            side * share // 100 // multiple * multiple for side in (request.width, request.height)
        )
        if width and height and fits(replace(request, width=width, height=height)):
            return f"Even one frame of this size would not fit; {width}x{height} with {request.num_frames} would."
    return "Nothing of these proportions fits."

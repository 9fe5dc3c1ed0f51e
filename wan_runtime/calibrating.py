"""Runs a model over prompts and records how large the inputs of its Linears become, for static input scales.

A static scale saves the pass that finds each token's own, and is only as good as the prompts: what is larger than
anything recorded is clipped. `convert(..., activations=calibrate(...))` writes them; `patch(..., activation="static")`
uses them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wan_runtime import rules
from wan_runtime.errors import InvalidOption, WanRuntimeError
from wan_runtime.generating import generate
from wan_runtime.linear import linear_size
from wan_runtime.names import to_original
from wan_runtime.patches import host_of
from wan_runtime.pipelines import load_prepared
from wan_runtime.plan import bare
from wan_runtime.preparing import prepare


def calibrate(
    checkpoint: Path | str,
    prompts: Sequence[str],
    *,
    checkpoint_low: Path | str | None = None,
    checkpoint_high: Path | str | None = None,
    request: Mapping[str, Any] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    **parts: Any,
) -> dict[str, float]:
    """The largest magnitude of the input of every block Linear, over one clip a prompt.

    Args:
        checkpoint: the file that is going to be converted.
        prompts: what the clips are to show; like what the model will be asked for.
        checkpoint_low, checkpoint_high: the other expert of a two-expert model (Wan2.2 A14B), by its noise level; at
            most one of them.
        request: fields of ClipRequest that every clip takes, such as width, height, num_frames, num_inference_steps and
            seed; the model's defaults elsewhere, and 0, 1, 2, ... for the seeds.
        on_step: called after each denoising step with how many are done, and of how many.
        parts: as for `load_pipeline`: base, text_encoder, vae, device, dtype, dialect, reference.

    Returns original module path -> amax. Raises InvalidOption without prompts or with both experts given,
    WanRuntimeError when a layer got no input or an infinite one, and what `load_pipeline` and `generate` raise.
    """
    if not prompts:
        raise InvalidOption("a calibration needs at least one prompt.")
    if checkpoint_low is not None and checkpoint_high is not None:
        raise InvalidOption(
            "the checkpoint is one expert; give the other as the low or as the high one, not both."
        )
    high, low = (checkpoint, checkpoint_low) if checkpoint_high is None else (checkpoint_high, checkpoint)
    found = prepare(high, checkpoint_low=low, fuse=False, **parts)
    profile = found.profile
    asked = [
        profile.request(prompt, **{"seed": number, **(request or {})})
        for number, prompt in enumerate(prompts)
    ]
    pipe = load_prepared(found)
    steps = sum(one.num_inference_steps for one in asked)
    done = 0
    with recorded(pipe.transformer if checkpoint_high is None else pipe.transformer_2) as amax:
        for one in asked:
            generate(pipe, one, None if on_step is None else _shifted(on_step, done, steps))
            done += one.num_inference_steps
    return _checked(amax, str(checkpoint))


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 text file, one a line; empty lines are passed over."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidOption(f"the prompts cannot be read from {path}: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InvalidOption(f"{path} holds no prompt; write one a line.")
    return prompts


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """While it is open, the largest magnitude of each block Linear's input, fp32 (), by original module path.

    A layer that has had no input has zero.
    """
    names = host_of(model).names
    amax: dict[str, torch.Tensor] = {}
    hooks = []
    for path, module in model.named_modules():
        original = to_original(names, bare(path))
        if rules.swaps(original) and linear_size(module) is not None:
            amax[original] = torch.zeros((), device="cpu")
            hooks.append(module.register_forward_pre_hook(_recorder(amax, original)))
    try:
        yield amax
    finally:
        for hook in hooks:
            hook.remove()


def _recorder(
    amax: dict[str, torch.Tensor], path: str
) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def record(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        largest = inputs[0].detach().abs().amax().float()
        amax[path] = torch.maximum(amax[path].to(largest.device), largest)  # passes a NaN on

    return record


def _checked(amax: Mapping[str, torch.Tensor], checkpoint: str) -> dict[str, float]:
    values = {path: float(value) for path, value in amax.items()}
    bad = [path for path, value in values.items() if not 0 < value < float("inf")]
    if bad:
        raise WanRuntimeError(
            f"{checkpoint}: {len(bad)} of {len(values)} layers had no input, or one that is NaN or infinite, while the "
            f"prompts ran; the first is {bad[0]!r} with {values[bad[0]]:g}."
        )
    return values


def _shifted(on_step: Callable[[int, int], None], before: int, total: int) -> Callable[[int, int], None]:
    return lambda done, _: on_step(before + done, total)

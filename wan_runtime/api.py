"""The public functions on models: patch, load, unpatch, inspect. Thin: each puts the pages below together."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wan_runtime.accelerating import accelerate, attention_for
from wan_runtime.arranging import arranged
from wan_runtime.backends import device_named
from wan_runtime.checkpoint import Checkpoint, open_checkpoint, stream
from wan_runtime.containers import locate
from wan_runtime.errors import InvalidOption
from wan_runtime.fitting import (
    check_fit,
    doubted,
    notes,
    refuse_damaged,
    refuse_nothing,
    require_input_scales,
)
from wan_runtime.inspecting import Inspection, inspect_checkpoint
from wan_runtime.obstacles import refuse_unswappable
from wan_runtime.patches import HOSTS, Host, host_of
from wan_runtime.plan import Options, plan, tree_of
from wan_runtime.progress import watched
from wan_runtime.report import Report
from wan_runtime.staging import stage
from wan_runtime.swap import (
    Patched,
    bytes_of,
    execute,
    move_buffers,
    patched_state,
    remember,
    undo,
    verify_residents,
)

NAMING = ("dialect", "reference")  # arguments that say how to read a file


def patch(
    model: nn.Module,
    checkpoint: Path | str | None = None,
    *,
    weights: str = "auto",
    compute: str = "auto",
    backend: str = "auto",
    attention: str = "auto",
    fuse: bool = True,
    skip: str | tuple[str, ...] = (),
    dialect: str | None = None,
    reference: Path | str | None = None,
    activation: str = "dynamic",
    attention_end_blocks: int | None = None,
    attention_end_steps: int | None = None,
) -> Report:
    """Replace a WAN model's Linears with quantised ones and keep its norms, biases and modulation fp32, in place.

    Args:
        model: a WAN transformer (not the pipeline), on any device; on meta when a checkpoint is given. One on meta goes
            to torch's default device: the CPU, where weights stay in the mapped file until they are moved, and under
            `with torch.device("cuda"):` straight to the GPU.
        checkpoint: a quantised or plain checkpoint to load into the model: a .safetensors file, or the folder or index
            of one in several files; None quantises what the model holds.
        weights: "auto" (what the file holds; fp8 without a file), "fp8", "nvfp4", "mxfp8", "int8", ..., or "keep".
        compute: "auto", "fp8", "bf16" (dequantise, then multiply), "fp32" (the reference).
        backend: "auto", "torch", "te" (Transformer Engine) or "reference".
        attention: "auto" (on a GPU the fastest that runs there), "fa3", "cudnn", "sdpa" or "fp8"; see
            wan_runtime.attention.
        fuse: run the blocks on fused kernels where the host and the device have them.
        skip: pattern(s) of module paths (either spelling, `*` as in a shell) that stay unquantised.
        dialect: the file's producer, where its marks do not say.
        reference: the bf16 file the checkpoint was made from; settles a file that several dialects fit.
        activation: "dynamic" (one scale a token) or "static" (the file's input_scale).
        attention_end_blocks, attention_end_steps: with attention="fp8", how many blocks at either end of the model, and
            steps at either end of a generation, attend in bf16; None is wan_runtime.attention.ENDS's.

    Returns a Report. A model patched before is left alone, and the report says so.
    Raises CheckpointError, BackendUnavailable, HostNotRecognised, NothingToPatch, InvalidOption; the model is then as
    it was.
    """
    options = Options(
        weights, compute, backend, _patterns(skip), activation, attention, fuse,
        attention_end_blocks, attention_end_steps,
    )  # fmt: skip
    if checkpoint is None and (dialect is not None or reference is not None):
        raise InvalidOption("dialect and reference say how to read a checkpoint, and none was given.")
    before = patched_state(model)
    if before is not None:
        assert isinstance(before.report, Report)
        if checkpoint is not None and not _is_of(checkpoint, before.report):
            raise InvalidOption(
                f"the model is patched already (with {before.report.checkpoint or 'its own weights'}); call "
                "wan_runtime.unpatch(model) before loading another checkpoint."
            )
        return dataclasses.replace(before.report, already=True)
    host = host_of(model)
    opened = None if checkpoint is None else open_checkpoint(checkpoint, dialect=dialect, reference=reference)
    held_on = _device_of(model)
    if held_on.type != "meta" or opened is None:
        return _patch(model, host, opened, options, _compute_dtype(model), held_on)
    target = _readable_on(torch.get_default_device())
    with target:  # nothing that is computed here may lie on meta, as in the block that made the model
        report = _patch(model, host, opened, options, _compute_dtype(model), target)
    move_buffers(model, target)
    return report


def load(
    checkpoint: Path | str,
    *,
    host: str = "diffusers",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **patch_options: Any,
) -> Any:
    """Build the model that a checkpoint's shapes describe, and load the checkpoint into it.

    Args:
        checkpoint: the .safetensors file, or the folder or index of a checkpoint in several.
        host: whose model class to build: "diffusers" gives a WanTransformer3DModel.
        device: where to load; None is the GPU when there is one, else the CPU.
        dtype: the compute dtype (`model.dtype`); float32 is the faster one on a CPU.
        patch_options: as for `patch`.

    Returns the patched model in eval mode. Raises as `patch` does.
    """
    target = device_named(device)
    named: dict[str, Any] = {name: patch_options.get(name) for name in NAMING}
    options = options_of(patch_options)
    builder = _builder(host)
    opened = open_checkpoint(checkpoint, **named)
    assert builder.build is not None
    model = builder.build(opened.variant)
    for parameter in model.parameters():  # the host's own .to(dtype) would warn about its fp32 modules
        parameter.data = parameter.data.to(dtype)
    _patch(model, builder, opened, options, dtype, _readable_on(target))
    return model.to(target)


def options_of(patch_options: Mapping[str, Any]) -> Options:
    """What `load` is asked for, without what says how to read the file. Raises as Options does."""
    asked = {name: value for name, value in patch_options.items() if name not in NAMING}
    return Options(**{**asked, "skip": _patterns(asked.get("skip", ()))})


def _readable_on(device: torch.device) -> torch.device:
    """Where a file is read for a device: checking it needs values, so for meta that is the CPU."""
    return torch.device("cpu") if device.type == "meta" else device


def unpatch(model: nn.Module) -> None:
    """Put the model's module tree back as it was; weights that exist only quantised come back dequantised."""
    undo(model)
    blocks = host_of(model).blocks
    if blocks is not None:
        blocks.restore(model)


def inspect(
    path: Path | str, *, dialect: str | None = None, reference: Path | str | None = None
) -> Inspection:
    """What a checkpoint file is, from its header and small markers; no device is touched.

    Of the weights only a few layers are read, and only where the caller named a `dialect`, which they may contradict,
    or a `reference`, the bf16 file that it was made from.
    """
    return inspect_checkpoint(path, dialect, reference)


def _patterns(skip: str | tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(skip, str):
        return (skip,)
    if not isinstance(skip, list | tuple) or not all(isinstance(pattern, str) for pattern in skip):
        raise InvalidOption(
            f"skip={skip!r} is not a pattern such as 'blocks.0.*', or a tuple of patterns; () skips none."
        )
    return tuple(skip)


def _is_of(checkpoint: Path | str, report: Report) -> bool:
    """Whether a report is of this checkpoint, given by whatever file or folder of it."""
    if report.checkpoint is None or not Path(checkpoint).exists():
        return False
    found, _ = locate(checkpoint)
    return found.path.resolve() == Path(report.checkpoint).resolve()


def _builder(name: str) -> Host:
    able = {HOSTS[h].names.name: HOSTS[h] for h in HOSTS if HOSTS[h].build is not None}
    if name not in able:
        raise InvalidOption(f"host={name!r}: a model can be built from a file for {', '.join(able)} only.")
    return able[name]


def _patch(
    model: nn.Module,
    host: Host,
    checkpoint: Checkpoint | None,
    options: Options,
    dtype: torch.dtype,
    held_on: torch.device,
) -> Report:
    """Decide, refuse what cannot be, read onto a device, and only then change the model."""
    runs_on = _planning_device(held_on)
    if checkpoint is None and held_on.type == "meta":
        raise InvalidOption(
            "the model is on the meta device and has no weights to quantise; give a checkpoint."
        )
    ends, spelling = options.ends, host.names
    checkpoint = None if checkpoint is None else arranged(checkpoint, spelling)
    held = None if checkpoint is None else {path: layer.format for path, layer in checkpoint.layers.items()}
    decisions = plan(tree_of(model, spelling), held, runs_on, options, swaps=host.swaps, fp32=host.fp32)
    refuse_nothing(decisions, options, checkpoint, host.name)
    refuse_unswappable(model, decisions, keeps_weights=checkpoint is None)
    attention = attention_for(model, host, options.attention, runs_on, dtype)
    static = options.activation == "static"
    if static:
        require_input_scales(checkpoint, decisions)
    doubt = None if checkpoint is None else doubted(checkpoint)
    if doubt is not None:
        warnings.warn(doubt, RuntimeWarning, stacklevel=3)
    before, staged = bytes_of(model), None
    if checkpoint is None:
        refuse_damaged(model, decisions)
    else:
        check_fit(model, spelling, checkpoint)
        items = watched(stream(checkpoint, held_on), checkpoint)
        staged = stage(items, decisions, spelling, dtype, anew=options.weights not in ("auto", "keep"))
    parameters = execute(model, decisions, staged, dtype, runs_on.type, static=static)
    verify_residents(model, decisions)
    fused, said = accelerate(model, host, attention, ends, options.fuse, runs_on, dtype)
    said = [
        *filter(None, (doubt,)),
        *notes(decisions, runs_on, checkpoint, options, staged.rescaled if staged else ()),
        *said,
    ]
    report = Report(
        host=host.name,
        device=str(runs_on),
        dtype=str(dtype).removeprefix("torch."),
        decisions=tuple(decisions),
        bytes_before=before,
        bytes_after=bytes_of(model),
        notes=tuple(said),
        attention=None if attention is None else attention.name,
        fused=fused,
        **_provenance(checkpoint),
    )
    remember(model, Patched(tuple(decisions), parameters, report))
    return report


def _provenance(checkpoint: Checkpoint | None) -> dict[str, Any]:
    """The report's fields on the file."""
    if checkpoint is None:
        return {}
    return {
        "checkpoint": str(checkpoint.path),
        "variant": checkpoint.variant.name,
        "dialect": checkpoint.dialect.name,
        "evidence": checkpoint.evidence,
    }


def _device_of(model: nn.Module) -> torch.device:
    return next(iter(model.parameters())).device


def _planning_device(held_on: torch.device) -> torch.device:
    """Where the model will run: a model that waits on the CPU or on meta is meant for the GPU when there is one."""
    if held_on.type in ("cpu", "meta"):
        return (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    return held_on


def _compute_dtype(model: nn.Module) -> torch.dtype:
    """fp16 for an fp16 host, else bf16: a host loaded in fp32 by default is not asking for fp32 products."""
    dtypes = [m.weight.dtype for m in model.modules() if isinstance(m, nn.Linear)]
    return torch.float16 if dtypes and dtypes.count(torch.float16) > len(dtypes) / 2 else torch.bfloat16

"""The doors through which a script's models come in, each replaced on the model's class by one that patches.

`from_pretrained` and `from_single_file` return patched models; a class that has neither patches its model once
`load_state_dict` has filled it; and a model filled in some other way is patched when it is first called, before any
hook of its own runs.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wan_runtime.api import load, patch
from wan_runtime.errors import InvalidOption
from wan_runtime.experts import MISSING, Armed, expert_of, nameless, source_of
from wan_runtime.patches import Host
from wan_runtime.report import Report
from wan_runtime.swap import patched_state

CONFIG_OPTIONS = (
    "subfolder",
    "cache_dir",
    "revision",
    "token",
    "local_files_only",
    "force_download",
    "proxies",
)


def replace_doors(cls: type[nn.Module], host: Host, armed: Armed) -> None:
    """Give a model class doors that patch; `armed.undo()` puts its own back."""
    doors: dict[str, Callable[[Any], Any]] = {"__call__": lambda own: _patching_call(own, armed)}
    if hasattr(cls, "from_pretrained"):
        doors["from_pretrained"] = lambda own: classmethod(_patching_from_pretrained(own, armed))
    else:  # DiffSynth fills its model so, and then calls the model's parts and never the model
        doors["load_state_dict"] = lambda own: _patching_load(own, armed)
    if hasattr(cls, "from_single_file") and host.build is not None:
        doors["from_single_file"] = lambda own: classmethod(_from_single_file(host, armed))
    for name, door in doors.items():
        own = inspect.getattr_static(cls, name)
        armed.replaced.append((cls, name, cls.__dict__.get(name, MISSING)))
        setattr(cls, name, door(own))


def _patching_call(own: Callable[..., Any], armed: Armed) -> Callable[..., Any]:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        if patched_state(self) is None:
            _patch_next(self, armed)
        return own(self, *args, **kwargs)

    return __call__


def _patching_load(own: Callable[..., Any], armed: Armed) -> Callable[..., Any]:
    def load_state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = own(self, *args, **kwargs)
        if patched_state(self) is None:
            _patch_next(self, armed)
        return result

    return load_state_dict


def _patch_next(model: nn.Module, armed: Armed) -> None:
    source = nameless(armed)
    low_noise = expert_of(armed, source)
    checkpoint = armed.checkpoint_for(low_noise)
    armed.note(patch(model, checkpoint, **armed.options), checkpoint, source, low_noise)


def _patching_from_pretrained(own: Any, armed: Armed) -> Callable[..., Any]:
    def from_pretrained(cls: type[nn.Module], path: Any, *args: Any, **kwargs: Any) -> Any:
        source, name = source_of(path, kwargs.get("subfolder"))
        low_noise = expert_of(armed, source, name)
        checkpoint = armed.checkpoint_for(low_noise)
        if checkpoint is not None and hasattr(cls, "load_config"):
            model = _empty(cls, path, kwargs)
        else:
            model = own.__get__(None, cls)(path, *args, **kwargs)
        armed.note(patch(model, checkpoint, **armed.options), checkpoint, source, low_noise)
        return model

    return from_pretrained


def _empty(cls: Any, path: Any, kwargs: Mapping[str, Any]) -> nn.Module:
    """The model its config describes, on meta: weights that a checkpoint replaces are not read first."""
    from accelerate import init_empty_weights

    config = cls.load_config(path, **{name: kwargs[name] for name in CONFIG_OPTIONS if name in kwargs})
    with torch.device("cpu"), init_empty_weights(include_buffers=False):
        model: nn.Module = cls.from_config(config)
    dtype = kwargs.get("torch_dtype") or kwargs.get("dtype") or torch.float32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def _from_single_file(host: Host, armed: Armed) -> Callable[..., Any]:
    """In place of a loader that drops the scales it does not know: the file through `wan_runtime.load`."""

    def from_single_file(cls: type[nn.Module], path: Any, *args: Any, **kwargs: Any) -> Any:
        source, names = nameless(armed), [str(kwargs.get("subfolder"))]  # a state dict has no path
        if isinstance(path, (str, os.PathLike)):
            source, name = source_of(path)
            names = [name, *names, Path(path).parent.name]
        low_noise = expert_of(armed, source, *names)
        checkpoint = armed.checkpoint_for(low_noise) or Path(str(path))
        if not checkpoint.exists():
            raise InvalidOption(
                f"from_single_file({str(path)!r}): wan-runtime reads local files only. Download it first "
                "and give its path, or pass it as checkpoint (--checkpoint)."
            )
        dtype = kwargs.get("torch_dtype") or kwargs.get("dtype") or torch.bfloat16
        model = load(checkpoint, host=host.names.name, device="cpu", dtype=dtype, **armed.options)
        state = patched_state(model)
        assert state is not None and isinstance(state.report, Report)
        armed.note(state.report, checkpoint, source, low_noise)
        return model

    return from_single_file

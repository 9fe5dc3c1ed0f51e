"""Patches WAN models as a script loads them, the script unchanged.

An import hook waits for the model classes that patches/ name and costs a dictionary look-up an import until one comes.
Such a class then gets new doors: `from_pretrained` and `from_single_file` return patched models; a class that has
neither patches its model once `load_state_dict` has filled it; and a model that was filled in some other way is patched
when it is first called, before any hook of its own runs.
"""

from __future__ import annotations

import inspect
import os
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import nn

from wan_runtime.api import load, patch
from wan_runtime.checkpoint import open_checkpoint
from wan_runtime.errors import InvalidOption, NothingToPatch
from wan_runtime.patches import HOSTS, Host
from wan_runtime.report import Report
from wan_runtime.swap import patched_state

LOW_NOISE = (
    "transformer_2",
    "low_noise_model",
)  # where diffusers and the original release keep the second expert
NOISE = re.compile(r"(high|low)[-_ ]?noise", re.IGNORECASE)  # how published files of one expert are named
CONFIG_OPTIONS = (
    "subfolder",
    "cache_dir",
    "revision",
    "token",
    "local_files_only",
    "force_download",
    "proxies",
)
_MISSING = object()


def to_stderr(report: Report) -> None:
    """Print a report where a script's own output is not disturbed."""
    print(report, file=sys.stderr)


@dataclass
class Armed:
    """What `install` did: the models patched so far, and the way back.

    checkpoints  the high-noise (or only) file and the low-noise file; None quantises what the script loads.
    options      for `patch`, as they are.
    reports      one a model, in the order they were patched.
    """

    checkpoints: tuple[Path | None, Path | None]
    options: Mapping[str, Any]
    announce: Callable[[Report], None]
    reports: list[Report] = field(default_factory=list)
    _used: set[Path] = field(default_factory=set)
    _sources: dict[bool, str] = field(default_factory=dict)  # low-noise or not: what the script took it from
    _replaced: list[tuple[type, str, object]] = field(default_factory=list)

    def undo(self) -> None:
        """Take the hook and the doors away. Models patched meanwhile stay patched."""
        sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "armed", None) is not self]
        for cls, name, before in reversed(self._replaced):
            if before is _MISSING:
                delattr(cls, name)
            else:
                setattr(cls, name, before)
        self._replaced.clear()

    def checkpoint_for(self, low_noise: bool) -> Path | None:
        """The file for one expert; two experts and one file is an error, since no file holds both."""
        high, low = self.checkpoints
        if low_noise and high is not None and low is None:
            raise InvalidOption(
                f"the script loads two experts and one checkpoint was given ({high}"
                + (f", used in place of {self._sources[False]}" if self._sources else "")
                + "). Give the low-noise expert's file as checkpoint_low (--checkpoint-low)."
            )
        return low if low_noise else high

    def note(self, report: Report, checkpoint: Path | None, source: str, low_noise: bool) -> None:
        self.reports.append(report)
        self._sources.setdefault(low_noise, source)  # only now: a load that failed took no expert
        if checkpoint is not None:
            self._used.add(checkpoint)
        self.announce(report)

    def unused(self) -> list[Path]:
        """Files that no model was loaded from."""
        return [path for path in self.checkpoints if path is not None and path not in self._used]


def install(
    options: Mapping[str, Any] = MappingProxyType({}), *, announce: Callable[[Report], None] = to_stderr
) -> Armed:
    """Patch every WAN model that is loaded from now on; classes imported already are armed at once.

    Args:
        options: for `patch`; also "checkpoint", and "checkpoint_low" for the low-noise expert of a two-expert model.
        announce: called with each model's report.

    Returns the handle whose `undo()` ends it. An earlier `install` is undone first. Raises what opening a checkpoint
    raises, now rather than when the script has loaded everything else.
    """
    rest = dict(options)
    high, low = (rest.pop(name, None) for name in ("checkpoint", "checkpoint_low"))
    if low is not None and high is None:
        raise InvalidOption(
            f"checkpoint_low={low} was given without checkpoint, the high-noise expert's file."
        )
    naming = {name: rest[name] for name in ("dialect", "reference") if name in rest}
    for path in (high, low):
        if path is not None:
            open_checkpoint(path, **naming)
    armed = Armed((high and Path(high), low and Path(low)), MappingProxyType(rest), announce)
    for finder in list(sys.meta_path):
        if isinstance(finder, _Watcher):
            finder.armed.undo()
    watcher = _Watcher(armed)
    sys.meta_path.insert(0, watcher)
    for name in watcher.watched:
        if name in sys.modules:
            watcher.arm(sys.modules[name])
    return armed


def run_script(
    script: Path | str, args: Sequence[str] = (), options: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Run a Python script as `python script args` would, with every WAN model patched as it is loaded.

    Raises NothingToPatch when the script ends without one, InvalidOption when a checkpoint was never loaded, and
    whatever the script raises. A script that calls sys.exit() to say that all went well is held to the same.
    """
    armed = install(options)
    argv, path = sys.argv, sys.path[:]
    sys.argv = [str(script), *args]
    sys.path.insert(0, str(Path(script).resolve().parent))
    ended: SystemExit | None = None
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as exit_:
        if exit_.code not in (None, 0):
            raise
        ended = exit_
    finally:
        sys.argv, sys.path[:] = argv, path
        armed.undo()
    _check_patched(armed, script)
    if ended is not None:
        raise ended


def _check_patched(armed: Armed, script: Path | str) -> None:
    if not armed.reports:
        known = ", ".join(name for host in HOSTS for name in HOSTS[host].classes)
        raise NothingToPatch(
            f"{script} ended without loading a WAN model, so nothing was patched. Watched: {known}."
        )
    if armed.unused():
        raise InvalidOption(
            f"{script} loaded no model for {armed.unused()[0]}; the clip was made without it."
        )


class _Watcher(MetaPathFinder):
    """Lets the other finders find a watched module, and arms its classes once it has run."""

    def __init__(self, armed: Armed) -> None:
        self.armed = armed
        self.watched: dict[str, list[tuple[str, Host]]] = {}
        for host in (HOSTS[name] for name in HOSTS):
            for module, _, cls in (name.partition(":") for name in host.classes):
                self.watched.setdefault(module, []).append((cls, host))

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in self.watched:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _ArmingLoader(spec.loader, self)
                return spec
        return None

    def arm(self, module: ModuleType) -> None:
        for name, host in self.watched[module.__name__]:
            cls = getattr(module, name, None)
            if cls is None:
                warnings.warn(
                    f"{module.__name__} has no {name} in this version; it is not patched.", stacklevel=2
                )
            else:
                _arm(cls, host, self.armed)


class _ArmingLoader(Loader):
    """A module's own loader, and the watcher's turn after it."""

    def __init__(self, inner: Loader, watcher: _Watcher) -> None:
        self.inner, self.watcher = inner, watcher

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.inner
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner  # the module is as if nobody had watched
        self.inner.exec_module(module)
        if self.watcher in sys.meta_path:
            self.watcher.arm(module)


def _arm(cls: type[nn.Module], host: Host, armed: Armed) -> None:
    doors: dict[str, Callable[[Any], Any]] = {"__call__": lambda own: _patching_call(own, armed)}
    if hasattr(cls, "from_pretrained"):
        doors["from_pretrained"] = lambda own: classmethod(_patching_from_pretrained(own, armed))
    else:  # DiffSynth fills its model so, and then calls the model's parts and never the model
        doors["load_state_dict"] = lambda own: _patching_load(own, armed)
    if hasattr(cls, "from_single_file") and host.build is not None:
        doors["from_single_file"] = lambda own: classmethod(_from_single_file(host, armed))
    for name, door in doors.items():
        own = inspect.getattr_static(cls, name)
        armed._replaced.append((cls, name, cls.__dict__.get(name, _MISSING)))
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


def expert_of(armed: Armed, source: str, *names: str) -> bool:
    """Whether what the script takes from `source` is the low-noise expert; every door asks here.

    A source keeps the expert it was the first time. Else the first of `names` that tells decides; else the first source
    is the high-noise expert, which hosts load and sample with first, and another source is the low-noise one. Raises
    InvalidOption when that expert came from another source: one of the two would get weights that are not its own.
    """
    high, low = armed.checkpoints
    if high is None:
        return False  # each model keeps its own weights
    for low_noise, taken in armed._sources.items():
        if taken == source:
            return low_noise
    low_noise = False in armed._sources
    for name in names:
        match = (
            NOISE.search(name) if low is not None else None
        )  # one file may be for a low-noise expert alone
        if name in LOW_NOISE or match:
            low_noise = name in LOW_NOISE or (match is not None and match[1].lower() == "low")
            break
    if low_noise in armed._sources:
        raise InvalidOption(
            f"the script loads {source} after {' and '.join(armed._sources.values())}, and "
            f"{armed.checkpoint_for(low_noise)} is in place of {armed._sources[low_noise]} already. checkpoint and "
            "checkpoint_low are one high-noise and one low-noise expert: run the script with one model at a time."
        )
    return low_noise


def _source(path: Any, subfolder: Any = None) -> tuple[str, str]:
    """What a path is known by, however it is written, and its last name as the script wrote it."""
    whole = Path(str(path), str(subfolder or ""))
    return str(whole.resolve()) if whole.exists() else str(whole), whole.name


def _nameless(armed: Armed) -> str:
    """A source of its own for a model that came from no path."""
    return f"model {len(armed.reports) + 1} (which it fills itself)"


def _patch_next(model: nn.Module, armed: Armed) -> None:
    source = _nameless(armed)
    low_noise = expert_of(armed, source)
    checkpoint = armed.checkpoint_for(low_noise)
    armed.note(patch(model, checkpoint, **armed.options), checkpoint, source, low_noise)


def _patching_from_pretrained(own: Any, armed: Armed) -> Callable[..., Any]:
    def from_pretrained(cls: type[nn.Module], path: Any, *args: Any, **kwargs: Any) -> Any:
        source, name = _source(path, kwargs.get("subfolder"))
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
    with init_empty_weights(include_buffers=False):
        model: nn.Module = cls.from_config(config)
    dtype = kwargs.get("torch_dtype") or kwargs.get("dtype") or torch.float32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def _from_single_file(host: Host, armed: Armed) -> Callable[..., Any]:
    """In place of a loader that drops the scales it does not know: the file through `wan_runtime.load`."""

    def from_single_file(cls: type[nn.Module], path: Any, *args: Any, **kwargs: Any) -> Any:
        source, names = _nameless(armed), [str(kwargs.get("subfolder"))]  # a state dict has no path
        if isinstance(path, (str, os.PathLike)):
            source, name = _source(path)
            names = [name, *names, Path(path).parent.name]
        low_noise = expert_of(armed, source, *names)
        checkpoint = armed.checkpoint_for(low_noise) or Path(str(path))
        if not checkpoint.is_file():
            raise InvalidOption(
                f"from_single_file({str(path)!r}): wan-runtime reads local files only. Download it first and give its "
                "path, or pass it as checkpoint (--checkpoint)."
            )
        dtype = kwargs.get("torch_dtype") or kwargs.get("dtype") or torch.bfloat16
        model = load(checkpoint, host=host.names.name, device="cpu", dtype=dtype, **armed.options)
        state = patched_state(model)
        assert state is not None and isinstance(state.report, Report)
        armed.note(state.report, checkpoint, source, low_noise)
        return model

    return from_single_file

"""Patches WAN models as a script loads them, the script unchanged.

An import hook waits for the model classes that patches/ name, costs a dictionary look-up an import until one comes, and
then replaces that class's doors.
"""

from __future__ import annotations

import runpy
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from wan_runtime.checkpoint import open_checkpoint
from wan_runtime.doors import replace_doors
from wan_runtime.errors import InvalidOption, NothingToPatch
from wan_runtime.experts import Armed, refuse_twins
from wan_runtime.patches import HOSTS, Host
from wan_runtime.report import Report


def to_stderr(report: Report) -> None:
    """Print a report where a script's own output is not disturbed."""
    print(report, file=sys.stderr)


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
    opened = [open_checkpoint(path, **naming) for path in (high, low) if path is not None]
    if low is not None:
        refuse_twins(*opened)
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
                replace_doors(cls, host, self.armed)


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

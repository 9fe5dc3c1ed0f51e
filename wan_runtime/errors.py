"""Every exception of the library. Each carries its data and says what was found, where, and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def shown(names: Iterable[str], limit: int = 10) -> str:
    """The first names of a long list, and how many were left out."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    """The names that have this one among their words; else the one spelt most like it, if any is."""
    holding = [other for other in known if name in re.split("[-_]", other)]
    return holding or difflib.get_close_matches(name.replace("-", "_"), known, n=1)


class WanRuntimeError(Exception):
    """Base of everything this library raises on purpose."""


class UnknownName(WanRuntimeError, KeyError):
    """A name that no catalogue holds."""

    def __init__(self, kind: str, name: str, known: Sequence[str]) -> None:
        self.kind, self.name, self.known = kind, name, tuple(known)
        near = " or ".join(_nearest(name, known))
        meant = f" Did you mean {near}?" if near else ""
        super().__init__(f"There is no {kind} named {name!r}. Known: {', '.join(known)}.{meant}")

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class InvalidOption(WanRuntimeError, ValueError):
    """An argument whose value cannot be served, or two that contradict each other."""


class CheckpointError(WanRuntimeError):
    """A file that cannot be read right. `path` is the file."""

    def __init__(self, path: Path | str, message: str) -> None:
        self.path = Path(path)
        super().__init__(f"{path}: {message}")


class UnknownDialect(CheckpointError):
    """No producer's conventions fit the file."""

    def __init__(self, path: Path | str, found: str, known: Sequence[str]) -> None:
        self.found, self.known = found, tuple(known)
        super().__init__(
            path,
            f"no known dialect fits this file. Found: {found}. Known dialects: {', '.join(known)}. If you know which "
            "tool wrote it, name the dialect with --dialect (dialect=... in Python); otherwise convert the original "
            "bf16 file with `wan-runtime convert`.",
        )


class UnreadDialect(UnknownDialect):
    """A file of a tool that is recognised and not read. `tool` is its name, `found` the mark, `remedy` what to do."""

    def __init__(self, path: Path | str, tool: str, found: str, why: str, remedy: str) -> None:
        self.tool, self.remedy, self.found, self.known = tool, remedy, found, ()
        CheckpointError.__init__(
            self,
            path,
            f"this is a file of {tool} (it has {found}), which is not read: {why}. Instead, {remedy}.",
        )


class AmbiguousDialect(CheckpointError):
    """Several readings fit the file, and they give different numbers. `candidates` maps each to its meaning."""

    def __init__(self, path: Path | str, why: str, candidates: Mapping[str, str]) -> None:
        self.why, self.candidates = why, dict(candidates)
        readings = "; ".join(f"{name}: {meaning}" for name, meaning in candidates.items())
        flags = " or ".join(f"--dialect {name}" for name in candidates)
        super().__init__(
            path,
            f"the file can be read in {len(candidates)} ways that give different weights ({readings}). {why} A wrong "
            f"guess renders as noise, so nothing was loaded. Name the producer with {flags} (dialect=... in Python), "
            "or give the bf16 file it was made from with --reference FILE; `wan-runtime inspect --reference FILE` "
            "tells the producer where a command has no such option.",
        )


class UnaccountedTensors(CheckpointError):
    """Tensors of the file that nothing consumes, or slots of the model that nothing fills."""

    def __init__(
        self,
        path: Path | str,
        *,
        unconsumed: Sequence[str] = (),
        unfilled: Sequence[str] = (),
        hint: str = "",
    ) -> None:
        self.unconsumed, self.unfilled = tuple(unconsumed), tuple(unfilled)
        parts = []
        if unconsumed:
            parts.append(f"{len(unconsumed)} tensors of the file were not consumed: {shown(unconsumed)}")
        if unfilled:
            parts.append(f"{len(unfilled)} slots of the model were not filled: {shown(unfilled)}")
        super().__init__(
            path, ". ".join(parts) + f". {hint or 'Nothing was loaded: a tensor left out is noise.'}"
        )


class BadTensor(CheckpointError):
    """One tensor of the file is damaged or does not fit. `key` is its name in the file."""

    def __init__(self, path: Path | str, key: str, problem: str) -> None:
        self.key, self.problem = key, problem
        super().__init__(path, f"tensor {key!r}: {problem}")


class BackendUnavailable(WanRuntimeError):
    """An explicit choice of backend, compute or attention that cannot be served. `refusals` maps each to its reason."""

    def __init__(self, wanted: str, refusals: Mapping[str, str]) -> None:
        self.wanted, self.refusals = wanted, dict(refusals)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
        super().__init__(
            f"{wanted} cannot be served here. {reasons.rstrip('.')}. Use 'auto' to let the runtime choose."
        )


class HostNotRecognised(WanRuntimeError):
    """The object is not a WAN model that any host patch knows."""

    def __init__(self, found: str, known: Sequence[str]) -> None:
        self.found, self.known = found, tuple(known)
        super().__init__(
            f"{found} is not a WAN transformer that wan-runtime knows. Known hosts: {', '.join(known)}. Pass the "
            "transformer itself (pipe.transformer), not the pipeline; a new host is one file in patches/."
        )


class QuantisedWeight(WanRuntimeError, RuntimeError):
    """A write to the dequantised copy that a quantised layer shows as its weight. `write` is the operation."""

    def __init__(self, write: str) -> None:
        self.write = write
        super().__init__(
            f"the weight of a quantised layer cannot be written ({write}): it is a dequantised copy, and the write "
            "would be lost. Keep a LoRA as an adapter beside the layer instead of merging (fusing) it, or call "
            "wan_runtime.unpatch(model), merge, and patch again."
        )


class NothingToPatch(WanRuntimeError):
    """A patch that would change no layer."""


class InvalidRequest(InvalidOption):
    """A clip that cannot be made as asked. `param` is the field at fault and `code` a word for programs."""

    def __init__(self, param: str, code: str, message: str) -> None:
        self.param, self.code = param, code
        super().__init__(message)

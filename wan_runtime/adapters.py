"""LoRAs from one folder, by name, beside a pipeline's weights while one clip is made.

A name is looked up among the folder's .safetensors files and is never a path. diffusers and PEFT put the adapters
beside the Linears, quantised or not; nothing is merged, and after the clip the model is as it was. Of a model with two
experts a file goes to both, and two files whose names differ in `high_noise` and `low_noise` alone are one LoRA, each
for its expert. A file of which any part would be left out is refused.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_runtime.errors import InvalidOption, InvalidRequest
from wan_runtime.names import noise_in

MARK = re.compile(r"[-_. ]*(high|low)[-_ ]?noise", re.IGNORECASE)
NAME = re.compile(r"[^\x00-\x1f\x7f/\\]{1,200}")


@dataclass(frozen=True)
class Lora:
    """One LoRA: the file for the first (high-noise, or only) transformer, and the one for the low-noise expert.

    Of a plain file both are the same; of half a pair one is None.
    """

    name: str
    high: Path | None
    low: Path | None

    @property
    def files(self) -> list[Path]:
        """Its files, each once."""
        return list(dict.fromkeys(path for path in (self.high, self.low) if path is not None))


def list_loras(folder: Path | str) -> dict[str, Lora]:
    """The LoRAs of a folder (not of folders in it) by name, sorted. Raises InvalidOption where there is no folder."""
    try:
        files = sorted(
            path for path in Path(folder).iterdir() if path.suffix == ".safetensors" and path.is_file()
        )
    except OSError as error:
        raise InvalidOption(f"The LoRA folder {folder} cannot be read: {error.strerror}.") from error
    found: dict[str, Lora] = {}
    for path in files:
        lora = _paired(path, files)
        if NAME.fullmatch(lora.name):
            found[lora.name] = lora
    return dict(sorted(found.items()))


def _paired(path: Path, files: list[Path]) -> Lora:
    """A file alone, or with the other half whose name differs in the expert's mark alone."""
    noise = noise_in(Path(path.name))
    if noise is None:
        return Lora(path.stem, path, path)
    name = MARK.sub("", path.stem).strip("-_. ")
    others = [
        other
        for other in files
        if noise_in(Path(other.name)) not in (None, noise) and MARK.sub("", other.stem).strip("-_. ") == name
    ]
    if len(others) != 1 or not name or any(other.stem == name for other in files):
        return Lora(path.stem, path if noise == "high" else None, path if noise == "low" else None)
    return Lora(name, *((path, others[0]) if noise == "high" else (others[0], path)))


def lora_digests(lora: Lora) -> list[str]:
    """The SHA-256 of each of its files, in hex; a file is read once for as long as it stays as it is."""
    return [_digest(path, stat.st_mtime_ns, stat.st_size) for path in lora.files for stat in (path.stat(),)]


@functools.lru_cache(maxsize=256)
def _digest(path: Path, _changed: int, _size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def applied(pipe: Any, strengths: Mapping[str, float], known: Mapping[str, Lora]) -> Iterator[None]:
    """Lends the pipeline these LoRAs, each at its strength, until the block ends.

    Raises InvalidRequest for a name that is not known, and for a file that does not fit the model or would not be used
    whole.
    """
    if not strengths:
        yield
        return
    for name in strengths:
        if name not in known:
            raise InvalidRequest("lora", "lora_not_found", f"There is no LoRA named {name[:80]!r}.")
    try:
        for number, name in enumerate(strengths):
            _load(pipe, known[name], f"lora_{number}")
        for model in filter(None, (pipe.transformer, pipe.transformer_2)):
            _weigh(model, list(strengths.values()))
        yield
    finally:
        pipe.unload_lora_weights()


def _weigh(model: Any, strengths: list[float]) -> None:
    own = [(f"lora_{n}", strength) for n, strength in enumerate(strengths) if f"lora_{n}" in _held(model)]
    if own:
        model.set_adapters([adapter for adapter, _ in own], [strength for _, strength in own])


def _held(model: Any) -> Mapping[str, Any]:
    held: Mapping[str, Any] = getattr(model, "peft_config", {})
    return held


def _load(pipe: Any, lora: Lora, adapter: str) -> None:
    experts = {"high": (lora.high, pipe.transformer), "low": (lora.low, pipe.transformer_2)}
    if pipe.transformer_2 is None and lora.high != lora.low:
        raise _unusable(lora, "it is for one expert of a model with two, and this model has one transformer")
    for which, (path, model) in experts.items():
        if path is None or model is None:
            continue
        state = _read(lora, path)
        modules = _modules(pipe, lora, state)
        missing = [name for name in modules if not _has(model, name)]
        if missing:
            raise _unusable(
                lora, f"it changes modules that this model does not have: {', '.join(missing[:3])}"
            )
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", message="Already found a `peft_config`"
                )  # several are meant
                pipe.load_lora_weights(state, adapter_name=adapter, load_into_transformer_2=which == "low")
        except (ValueError, RuntimeError, KeyError) as error:
            raise _unusable(lora, str(error).strip().splitlines()[-1].strip()[:300]) from None
        left = [name for name in modules if adapter not in getattr(model.get_submodule(name), "lora_A", {})]
        if left:
            raise _unusable(
                lora, f"{len(left)} of its {len(modules)} modules took no adapter, such as {left[0]}"
            )


def _read(lora: Lora, path: Path) -> dict[str, Any]:
    """The file's tensors, all of which must be numbers, and all of which must have a place in an adapter."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: dict[str, Any] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unusable(lora, f"its file cannot be read ({type(error).__name__})") from None
    for key, tensor in state.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
            raise _unusable(lora, f"{key} is {tensor.dtype} or holds NaN or infinite values")
        if "dora_scale" in key:
            raise _unusable(lora, f"it is a DoRA ({key}), whose scales no adapter here can apply")
        if key.endswith((".diff", ".diff_b")) and "norm" in key and bool(tensor.any()):
            raise _unusable(
                lora, f"it changes a norm ({key}), which no adapter can, and would be used in part only"
            )
    return state


def _modules(pipe: Any, lora: Lora, state: dict[str, Any]) -> list[str]:
    """The modules that a file changes, in diffusers' names, by diffusers' own reading of it."""
    try:
        converted = pipe.lora_state_dict(dict(state))
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise _unusable(
            lora, f"nobody's names of a LoRA fit it ({type(error).__name__}: {error})"[:300]
        ) from None
    parts: dict[str, set[str]] = {}
    for key in converted:
        name, mark, part = key.removeprefix("transformer.").partition(".lora_")
        if not key.startswith("transformer.") or not mark:
            raise _unusable(lora, f"it holds {key}, which is no part of a LoRA for a WAN transformer")
        parts.setdefault(name, set()).add(part)
    half = [name for name, held in parts.items() if not {"A.weight", "B.weight"} <= held]
    if half or not parts:
        raise _unusable(
            lora, f"of {half[0]} it has only {', '.join(parts[half[0]])}" if half else "it is empty"
        )
    return sorted(parts)


def _has(model: Any, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _unusable(lora: Lora, why: str) -> InvalidRequest:
    return InvalidRequest("lora", "lora_unusable", f"The LoRA {lora.name!r} cannot be used: {why}.")

"""Decides, and only decides: module tree + file + device + rules -> one Decision a module that holds parameters."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from wan_runtime import rules
from wan_runtime.attention import ATTENTIONS, Ends
from wan_runtime.backends import AUTOMATIC, COMPUTES, Backend, backend_named
from wan_runtime.errors import BackendUnavailable, InvalidOption
from wan_runtime.formats import FORMATS
from wan_runtime.linear import linear_size
from wan_runtime.names import Spelling, to_original

Action = Literal["quantised", "linear", "resident", "own", "model"]


@dataclass(frozen=True)
class Node:
    """A module that holds tensors of its own.

    path, original   its path in the host, and in the original release's names without an adapter's `base_layer`.
    linear           (out, in) features, where it is a linear.
    leaf             it has no children.
    parameters       it holds parameters; otherwise only floating-point buffers (RoPE tables).
    """

    path: str
    original: str
    linear: tuple[int, int] | None
    leaf: bool
    parameters: bool = True


@dataclass(frozen=True)
class Options:
    """What the user asked for; see `patch`.

    Raises InvalidOption for a value that does not exist or that nothing would heed, BackendUnavailable for such a
    backend: both are known before a file is opened.
    """

    weights: str = "auto"
    compute: str = "auto"
    backend: str = "auto"
    skip: tuple[str, ...] = ()
    activation: str = "dynamic"
    attention: str = "auto"
    fuse: bool = True
    attention_end_blocks: int | None = None
    attention_end_steps: int | None = None

    def __post_init__(self) -> None:
        known = {
            "weights": ("auto", "keep", *FORMATS),
            "compute": ("auto", *COMPUTES),
            "activation": ("dynamic", "static"),
            "attention": ("auto", *ATTENTIONS),
        }
        for name, values in known.items():
            value = getattr(self, name)
            if value not in values:
                raise InvalidOption(f"{name}={value!r} is not known; choose from {', '.join(values)}.")
        if self.backend != "auto":
            backend_named(self.backend)
        _ = self.ends

    @property
    def ends(self) -> Ends:
        """FP8 attention's ends. Raises InvalidOption for a count below 0, or one that nothing would heed."""
        given = {"blocks": self.attention_end_blocks, "steps": self.attention_end_steps}
        for name, count in given.items():
            if count is None:
                continue
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise InvalidOption(f"attention_end_{name}={count!r} is not a number of {name}, 0 or more.")
            if self.attention != "fp8":
                raise InvalidOption(
                    f"attention_end_{name}={count} says how many {name} at either end attend in bf16 under FP8 "
                    f"attention, and attention={self.attention!r}. Ask for attention='fp8', or leave it out."
                )
        return Ends(**{name: count for name, count in given.items() if count is not None})


@dataclass(frozen=True)
class Decision:
    """What becomes of one module, and why.

    quantised  a Linear held in `format`, multiplied by `backend` in `compute`.
    linear     a Linear held in the compute dtype, its bias in fp32.
    resident   a leaf, or a branch as a whole, computed in fp32.
    own        a container whose own tensors (modulation) stay fp32.
    model      the host model itself: its own tensors fp32, its dtype the compute dtype.
    """

    path: str
    original: str
    action: Action
    reason: str
    format: str | None = None
    compute: str | None = None
    backend: str | None = None


def tree_of(model: nn.Module, spelling: Spelling) -> list[Node]:
    """The modules of a host that hold tensors. Adapters' own modules (LoRA) are not the host's and are left out."""
    nodes = []
    for path, module in model.named_modules():
        parameters = any(p is not None for p in module._parameters.values())
        tables = any(b is not None and b.is_floating_point() for b in module._buffers.values())
        adapter = any(part.startswith("lora_") for part in path.split("."))
        if adapter or (path and not parameters and not tables):
            continue
        original = to_original(spelling, bare(path))
        nodes.append(Node(path, original, linear_size(module), not any(module.children()), parameters))
    return nodes


def bare(path: str) -> str:
    """A path in the host without the level that an adapter puts around a module it wraps."""
    return ".".join(part for part in path.split(".") if part != "base_layer")


def plan(
    tree: Sequence[Node],
    held: Mapping[str, str] | None,
    device: torch.device,
    options: Options,
    *,
    swaps: Callable[[str], bool],
    fp32: Callable[[str], bool],
) -> list[Decision]:
    """Decide for every module.

    Args:
        tree: the host's modules.
        held: original module path -> format of each quantised layer in the file; None where there is no file.
        device: where the model will run.
        swaps, fp32: the host's rules, by original module path.

    Raises BackendUnavailable for an explicit choice that the device cannot serve, InvalidOption for a `skip` that would
    skip nothing.
    """
    _check_skip(options, tree)
    return [_decide(node, held, device, options, swaps, fp32) for node in tree]


def _check_skip(options: Options, tree: Sequence[Node]) -> None:
    linears = [node for node in tree if node.linear is not None]
    for pattern in options.skip:
        if not any(_skips(pattern, node) for node in linears):
            raise InvalidOption(
                f"skip={pattern!r} matches no Linear of this model, so it would skip nothing. Its paths look like "
                f"{', '.join(repr(bare(node.path)) for node in linears[-2:])}; * matches anything."
            )


def _skips(pattern: str, node: Node) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (bare(node.path), node.original))


def _decide(
    node: Node,
    held: Mapping[str, str] | None,
    device: torch.device,
    options: Options,
    swaps: Callable[[str], bool],
    fp32: Callable[[str], bool],
) -> Decision:
    if not node.path:
        return Decision(node.path, node.original, "model", "the host model")
    if not node.parameters:
        return Decision(node.path, node.original, "own", "its tables keep their dtype")
    if fp32(node.original):  # before the file's say: a host may take a compute dtype from such a weight
        in_file = held.get(node.original) if held is not None else None
        reason = "stays fp32 by the host's rule" + (f"; the file holds {in_file}" if in_file else "")
        whole = node.leaf or rules.whole(node.original)
        return Decision(node.path, node.original, "resident" if whole else "own", reason)
    weight_format, reason = _format_for(node, held, options, swaps)
    if weight_format is not None and node.linear is not None:
        backend, compute, why = choose(weight_format, device, node.linear, options)
        return Decision(
            node.path, node.original, "quantised", f"{reason}{why}", weight_format, compute, backend
        )
    if node.linear is not None:
        return Decision(node.path, node.original, "linear", reason)
    raise InvalidOption(f"no rule covers the module {node.path!r}; the host patch must name it.")


def _format_for(
    node: Node, held: Mapping[str, str] | None, options: Options, swaps: Callable[[str], bool]
) -> tuple[str | None, str]:
    """The format a Linear gets, or None and why it stays unquantised."""
    if node.linear is None:
        return None, "not a Linear"
    for pattern in options.skip:
        if _skips(pattern, node):
            return None, f"skipped by {pattern!r}"
    in_file = held.get(node.original) if held is not None else None
    if options.weights == "keep" or (options.weights == "auto" and held is not None):
        return in_file, f"the file holds {in_file}" if in_file else "the file holds it unquantised"
    if not swaps(node.original) and in_file is None:
        return None, "not one of the Linears worth quantising"
    wanted = "fp8" if options.weights == "auto" else options.weights
    refusal = FORMATS[wanted].refuses(*node.linear)
    if refusal is not None:
        return None, f"{wanted} does not fit: {refusal}"
    was = f", was {in_file}" if in_file not in (None, wanted) else ""
    return wanted, f"weights={options.weights}{was}"


def choose(
    weight_format: str, device: torch.device, shape: tuple[int, int], options: Options
) -> tuple[str, str, str]:
    """The backend and compute for one layer, and what was passed over: (backend, compute, reason)."""
    refusals: dict[str, str] = {}
    for backend in _candidates(options):
        offered = backend.computes(weight_format) if options.compute == "auto" else ()
        for compute in offered or (options.compute,):  # where it has none, it says why to "auto"
            refusal = backend.refuses(weight_format, compute, device, shape)
            if refusal is None and options.activation == "static" and compute in backend.own_scales:
                refusal = (
                    f"its {compute} products scale activations by their own values; use activation='dynamic'"
                )
            if refusal is None:
                passed = "; ".join(f"{name} refused: {why}" for name, why in refusals.items())
                return backend.name, compute, f"; {passed}" if passed else ""
            refusals[backend.name if compute == "auto" else f"{backend.name} {compute}"] = refusal
    wanted = f"compute={options.compute!r} with backend={options.backend!r} for {weight_format} weights on {device}"
    raise BackendUnavailable(wanted, refusals)


def _candidates(options: Options) -> list[Backend]:
    if options.backend != "auto":
        return [backend_named(options.backend)]
    names = ("reference",) if options.compute == "fp32" else AUTOMATIC
    return [backend_named(name) for name in names]

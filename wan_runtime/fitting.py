"""Whether a file, a model and the user's options fit each other; everything that can be refused before a change."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import nn

from wan_runtime.backends import backend_named
from wan_runtime.checkpoint import Checkpoint
from wan_runtime.deciding import contradiction
from wan_runtime.doubts import Doubts
from wan_runtime.errors import BadTensor, InvalidOption, NothingToPatch, UnaccountedTensors
from wan_runtime.names import Spelling, from_original, noise_in
from wan_runtime.plan import Decision, Options


def refuse_nothing(
    decisions: list[Decision], options: Options, checkpoint: Checkpoint | None, host: str
) -> None:
    """Raise NothingToPatch unless some layer is quantised, or the user or a plain file asked for none."""
    if any(d.action == "quantised" for d in decisions):
        return
    if options.weights == "keep" and checkpoint is None and options.skip:
        raise InvalidOption(
            f"skip={options.skip!r} says what stays unquantised, and weights='keep' without a file quantises nothing. "
            "Ask for weights='fp8', or leave skip out."
        )
    if (options.compute, options.backend) != ("auto", "auto"):
        raise InvalidOption(
            f"compute={options.compute!r} and backend={options.backend!r} say how quantised layers multiply, and no "
            "layer would be quantised. Ask for weights='fp8', or leave both at 'auto'."
        )
    plain_file = checkpoint is not None and not checkpoint.layers and options.weights == "auto"
    if options.weights == "keep" or plain_file:
        return
    reasons = sorted({d.reason for d in decisions if d.action == "linear"})
    kept = "; ".join(reasons) or "it has no Linear to quantise"
    raise NothingToPatch(
        f"no layer of this {host} model would be quantised ({kept}). Check weights= and skip=."
    )


def require_input_scales(checkpoint: Checkpoint | None, decisions: list[Decision]) -> None:
    """activation="static" wants the file's input scale for every quantised layer, in the format it was made for."""
    layers = checkpoint.layers if checkpoint else {}
    scaled = {
        (path, layer.format)
        for path, layer in layers.items()
        if any(source.slot == "input_scale" for source in layer.sources)
    }
    missing = [d.path for d in decisions if d.action == "quantised" and (d.original, d.format) not in scaled]
    if missing:
        raise InvalidOption(
            f"activation='static' needs an input_scale in the file for every quantised layer, and {len(missing)} have "
            f"none, the first {missing[0]!r}. Use activation='dynamic'; a made-up scale would clip or drown the signal."
        )


def refuse_damaged(model: nn.Module, decisions: list[Decision]) -> None:
    """Refuse weights that no scale can hold. A GPU is asked once for them all."""
    asked: dict[torch.device, Doubts] = {}
    for decision in decisions:
        if decision.action == "quantised":
            weight = model.get_submodule(decision.path).get_parameter("weight")
            doubts = asked.setdefault(weight.device, Doubts(weight.device))
            doubts(~torch.isfinite(weight).all(), functools.partial(_damaged, decision.path))
    for doubts in asked.values():
        doubts.settle()


def _damaged(path: str) -> InvalidOption:
    return InvalidOption(f"{path}.weight holds NaN or infinite values, which cannot be quantised.")


def doubted(checkpoint: Checkpoint) -> str | None:
    """What a caller who insisted on a reading should hear where the weights contradict it; reads a few layers."""
    if not checkpoint.insisted:
        return None  # the stream refuses such a file
    found = contradiction(checkpoint.header, {layer.module: layer for layer in checkpoint.layers.values()})
    if found is None:
        return None
    return (
        f"{checkpoint.path.name} is read as {checkpoint.dialect.name}, as was asked, and its weights contradict that: "
        f"{found}. A wrong reading is noise: leave the dialect out to hear what fits, or give the bf16 file that it "
        "was made from with --reference FILE (reference=... in Python)."
    )


def check_fit(model: nn.Module, spelling: Spelling, checkpoint: Checkpoint) -> None:
    """Every tensor of the file has its slot in the model, and every slot its tensor, of the same shape."""
    wanted = {
        name.replace(".base_layer", ""): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }
    given = {from_original(spelling, path): key for path, key in checkpoint.plain.items()}
    given |= {
        f"{from_original(spelling, path)}.weight": f"{layer.module}.weight"
        for path, layer in checkpoint.layers.items()
    }
    unfilled = sorted(wanted.keys() - given.keys())
    unconsumed = sorted(given[name] for name in given.keys() - wanted.keys())
    if unfilled or unconsumed:
        raise UnaccountedTensors(
            checkpoint.path,
            unconsumed=unconsumed,
            unfilled=unfilled,
            hint=f"The file is a {checkpoint.variant.name}; is the model one too? Nothing was loaded.",
        )
    shapes = {from_original(spelling, path): checkpoint.shape_of(path) for path in _weights(checkpoint)}
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise BadTensor(
                checkpoint.path,
                given[name],
                f"its shape is {list(shapes[name])}; the model needs {list(shape)}.",
            )


def _weights(checkpoint: Checkpoint) -> list[str]:
    return [*checkpoint.plain, *(f"{path}.weight" for path in checkpoint.layers)]


def notes(
    decisions: list[Decision],
    device: torch.device,
    checkpoint: Checkpoint | None,
    options: Options,
    rescaled: Sequence[str] = (),
) -> tuple[str, ...]:
    """What the user should read beside the report's table. `rescaled`: see wan_runtime.staging.Stage."""
    said = [] if checkpoint is None else [f"{note}." for note in checkpoint.header.notes]
    computes = {d.compute for d in decisions if d.action == "quantised"}
    if computes == {"bf16"} and device.type == "cuda":
        said.append(
            f"On {device} weights are stored quantised and multiplied in bf16; this saves memory, not time."
        )
    used = sorted({d.backend for d in decisions if d.backend is not None and d.compute == "fp8"})
    said += [remark for name in used if (remark := backend_named(name).remark(device)) is not None]
    if rescaled:
        said.append(
            f"{len(rescaled)} layers had one FP8 scale an output channel and were quantised anew with one a tensor, a "
            f"second rounding: backend={options.backend!r} multiplies by no other."
        )
    if device.type == "cpu" and computes:
        said.append("No CUDA GPU: weights are stored quantised and dequantised for each product.")
    if options.activation == "static" and computes <= {"bf16", "fp32", "mxfp8"}:
        said.append(
            "activation='static' changes nothing here: these products take no scale for their activations."
        )
    noise = noise_in(checkpoint.path) if checkpoint is not None else None
    if noise is not None:
        said.append(
            f"By its name the file is the {noise}-noise expert of a two-expert model; nothing in it says so."
        )
    if checkpoint is not None and not checkpoint.layers and not computes:
        said.append("The file is not quantised; pass weights='fp8' to quantise it while loading.")
    layers = checkpoint.layers.values() if checkpoint is not None else ()
    if layers and not any(source.slot == "input_scale" for layer in layers for source in layer.sources):
        said.append(
            "The file has no input scales, and needs none: activations are quantised by their own values."
        )
    return tuple(said)

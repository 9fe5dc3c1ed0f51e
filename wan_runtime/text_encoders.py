"""The text encoder as a single file: UMT5 under the original release's names or transformers', bf16 or quantised.

ComfyUI's `umt5_xxl_fp8_e4m3fn_scaled.safetensors` is one: transformers' names, FP8 with a scale a layer, and the
tokenizer's SentencePiece model in a tensor of its own. A layer that the file holds quantised stays so in memory; the
rest is held in the compute dtype, as the published encoder is. The sizes are read off the shapes.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wan_runtime.checkpoint import Checkpoint, Loaded, stream
from wan_runtime.containers import read_header
from wan_runtime.corrections import effective_weight
from wan_runtime.dialects import identify
from wan_runtime.errors import BadTensor, CheckpointError, UnaccountedTensors
from wan_runtime.header import Header
from wan_runtime.linear import QuantLinear
from wan_runtime.names import Spelling, Variant, from_original, to_original
from wan_runtime.names._parts import described, part_of
from wan_runtime.names._umt5 import ALIAS, TOKENIZER, TOP, prefix_of
from wan_runtime.plan import Options, choose
from wan_runtime.progress import watched
from wan_runtime.swap import set_module, set_parameter

UMT5 = Spelling(name="umt5", marks=(), top=TOP, block={})
NAME = "UMT5 text encoder"


def open_text_encoder(path: Path | str) -> tuple[Checkpoint, bytes | None]:
    """The file's layers and tensors under the original release's names, and the tokenizer in it, if there is one.

    Raises CheckpointError and its subclasses when the file is no UMT5, or cannot be read right.
    """
    header = read_header(path)
    part = part_of(header.entries)
    if part is None or part[0] != "text encoder":
        raise CheckpointError(header.path, f"this is not a text encoder; {described(header.entries)}")
    header, tokenizer = _without_tokenizer(header)
    dialect, evidence = identify(header)
    reading = dialect.read(header)
    prefix = prefix_of(header.entries)
    layers = _named(header, prefix, reading.layers)
    plain = _named(header, prefix, reading.plain)
    opened = Checkpoint(
        header=header,
        dialect=dialect,
        evidence=evidence,
        spelling=UMT5,
        prefix=prefix,
        variant=Variant(NAME, 0, 0, 0, 0, 0, 0, 0, kind="text encoder"),
        layers={module: reading.layers[name] for module, name in layers.items()},
        plain=plain,
        markers=reading.markers,
    )
    return dataclasses.replace(opened, variant=_sizes(opened)), tokenizer


def load_text_encoder(path: Path | str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """transformers' UMT5EncoderModel with the file's weights, and its tokenizer or None.

    Raises CheckpointError and its subclasses; UnaccountedTensors names what the file lacks or has too much of.
    """
    checkpoint, tokenizer = open_text_encoder(path)
    model = _built(checkpoint, dtype)
    _check(checkpoint, dict(model.named_parameters()))
    for item in watched(stream(checkpoint, device), checkpoint):
        _fill(model, checkpoint, item, device, dtype)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, f"{left[0]} was not filled"
    return model.to(device).eval().requires_grad_(False), None if tokenizer is None else _tokenizer(tokenizer)


def _without_tokenizer(header: Header) -> tuple[Header, bytes | None]:
    entries = dict(header.entries)
    keys = [key for key in entries if key.rpartition(".")[2] == TOKENIZER]
    spiece = None
    for key in keys:
        spiece = bytes(header.read_tensor(key).flatten().tolist())
        del entries[key]
    aliases = [key for key in entries if key.endswith(ALIAS)]
    for key in aliases:
        shared = key.removesuffix(ALIAS) + "shared.weight"
        if shared in entries:
            if not torch.equal(_bytes(header, key), _bytes(header, shared)):
                raise BadTensor(
                    header.path,
                    key,
                    f"it differs from {shared!r}, and transformers has one embedding for both.",
                )
            del entries[key]
    return dataclasses.replace(header, entries=entries), spiece


def _bytes(header: Header, key: str) -> torch.Tensor:
    return header.read_tensor(key).contiguous().view(torch.uint8)


def _named(header: Header, prefix: str, names: Iterable[str]) -> dict[str, str]:
    """Original path -> name in the file; two names for one path are refused."""
    seen: dict[str, str] = {}
    for name in names:
        short = name.removeprefix(prefix)
        path = to_original(UMT5, "shared.weight" if short == ALIAS else short)
        if path in seen:
            raise BadTensor(header.path, name, f"it is in the file twice, also as {seen[path]!r}.")
        seen[path] = name
    return seen


def _sizes(checkpoint: Checkpoint) -> Variant:
    """The encoder's sizes in a Variant's fields: dim, ffn_dim and layers are its own, in_channels its vocabulary."""
    try:
        vocabulary, dim = checkpoint.shape_of("token_embedding.weight")
        ffn, _ = checkpoint.shape_of("blocks.0.ffn.fc1.weight")
    except KeyError as missing:
        raise CheckpointError(
            checkpoint.path, f"{missing} is missing; it decides the text encoder's size."
        ) from missing
    layers = len(
        {path.split(".")[1] for path in (*checkpoint.layers, *checkpoint.plain) if path.startswith("blocks.")}
    )
    size = "UMT5-XXL text encoder" if (dim, layers) == (4096, 24) else f"{NAME} (dim {dim}, {layers} layers)"
    return Variant(size, dim, ffn, layers, vocabulary, dim, dim, 0, kind="text encoder")


def _built(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """The model on meta, its second embedding the first's own module, as transformers ties them."""
    from accelerate import init_empty_weights
    from transformers import UMT5Config, UMT5EncoderModel

    variant = checkpoint.variant
    buckets, heads = checkpoint.shape_of("blocks.0.pos_embedding.embedding.weight")
    rows, _ = checkpoint.shape_of("blocks.0.attn.q.weight")
    config = UMT5Config(
        vocab_size=variant.in_channels,
        d_model=variant.dim,
        d_kv=rows // heads,
        d_ff=variant.ffn_dim,
        num_layers=variant.layers,
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    with torch.device("cpu"), init_empty_weights(include_buffers=False):
        model: nn.Module = UMT5EncoderModel(config)
    model.encoder.embed_tokens = model.shared  # type: ignore[union-attr]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _check(checkpoint: Checkpoint, wanted: Mapping[str, nn.Parameter]) -> None:
    """Every tensor of the file has its parameter, and every parameter its tensor, of the same shape."""
    shapes = {path: checkpoint.shape_of(path) for path in checkpoint.plain}
    shapes |= {f"{path}.weight": layer.shape for path, layer in checkpoint.layers.items()}
    given = {from_original(UMT5, path): path for path in shapes}
    unfilled, unconsumed = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if unfilled or unconsumed:
        raise UnaccountedTensors(checkpoint.path, unconsumed=unconsumed, unfilled=unfilled)
    for name, parameter in wanted.items():
        if tuple(parameter.shape) != shapes[given[name]]:
            raise BadTensor(
                checkpoint.path,
                name,
                f"its shape is {list(shapes[given[name]])}; the model needs {list(parameter.shape)}.",
            )


def _fill(
    model: nn.Module, checkpoint: Checkpoint, item: Loaded, device: torch.device, dtype: torch.dtype
) -> None:
    """Put one layer or tensor of the file into the model: a quantised Linear stays quantised."""
    if item.format is None:
        module, _, leaf = from_original(UMT5, item.path).rpartition(".")
        set_parameter(model.get_submodule(module), leaf, item.slots["tensor"].to(dtype))
        return
    path = from_original(UMT5, item.path)
    module_ = model.get_submodule(path)
    slots = dict(item.slots)
    if not isinstance(module_, nn.Linear):  # an embedding is looked up in, not multiplied with
        set_parameter(module_, "weight", effective_weight(item.format, slots).to(dtype))
        return
    shape = checkpoint.layers[item.path].shape
    # Its activations have outliers of thousands, and it runs once a clip: what FP8 products save is not worth it.
    backend, compute, _ = choose(item.format, device, shape, Options(compute="bf16"))
    slots.pop("input_scale", None)
    quantised = QuantLinear(
        shape[1],
        shape[0],
        format=item.format,
        slots=slots,
        bias=None,
        backend=backend,
        compute=compute,
        planned_for=device.type,
        reads_as=dtype,
    )
    set_module(model, path, quantised)


def _tokenizer(spiece: bytes) -> Any:
    """transformers' T5 tokenizer of a SentencePiece model; the sentinels of T5's training are in no prompt."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "spiece.model").write_bytes(spiece)
        config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "eos_token": "</s>", "pad_token": "<pad>"}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config))
        return AutoTokenizer.from_pretrained(folder)

"""What the tests of reading share: tiny files in every dialect, and the model that no damaged file may touch."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import wan_runtime
from tests.builders.files import Content
from tests.builders.wan import TINY, block_linears, rows, state
from tests.builders.writers import WRITERS
from wan_runtime.checkpoint import Checkpoint, read_layer, read_plain
from wan_runtime.errors import CheckpointError
from wan_runtime.formats import FORMATS

FIRST = "blocks.0.self_attn.q"
CASES = [(dialect, weight_format) for dialect, (_, formats) in WRITERS.items() for weight_format in formats]
QUANTISED = [case for case in CASES if case[1] != "none"]
SCALED = [case for case in QUANTISED if case[0] != "plain_fp8"]
NVFP4 = [case for case in QUANTISED if case[1] == "nvfp4"]


@functools.cache
def _built(dialect: str, weight_format: str, spelling: str, prefix: str) -> Content:
    modules = block_linears(TINY, spelling, prefix)
    return WRITERS[dialect][0](state(TINY, spelling=spelling, prefix=prefix), modules, weight_format)


def content(dialect: str, weight_format: str, spelling: str = "original", prefix: str = "") -> Content:
    """A tiny file's content; the caller may change its dictionaries."""
    built = _built(dialect, weight_format, spelling, prefix)
    config = json.loads(json.dumps(built.config))
    return Content(dict(built.tensors), dict(built.weights), dict(built.metadata), config)


def assert_reads(
    checkpoint: Checkpoint, wanted: Content, spelling: str = "original", prefix: str = ""
) -> None:
    """The checkpoint means exactly the weights that were written, and holds every other tensor unchanged."""
    originals = {prefix + (row[0] if spelling == "original" else row[1]): row[0] for row in rows()}
    weights = {originals[f"{path}.weight"].removesuffix(".weight"): w for path, w in wanted.weights.items()}
    assert checkpoint.layers.keys() == weights.keys()
    for path, truth in weights.items():
        weight = FORMATS[checkpoint.layers[path].format].dequantize(read_layer(checkpoint, path))
        np.testing.assert_allclose(weight.double().numpy(), truth, rtol=2**-22, atol=0)
    plain = {originals[key]: key for key in originals if key.removesuffix(".weight") not in wanted.weights}
    assert checkpoint.plain.keys() == plain.keys()
    for path, key in plain.items():
        held = read_plain(checkpoint, path)
        assert held.shape == checkpoint.shape_of(path) and held.equal(wanted.tensors[key].reshape(held.shape))


@pytest.fixture(scope="module")
def host() -> Iterator[torch.nn.Module]:
    """A stock diffusers model of the tiny size; every test must leave it exactly as it was."""
    from diffusers import WanTransformer3DModel

    model: torch.nn.Module = WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=128,
        text_dim=32,
        freq_dim=32,
        ffn_dim=256,
        num_layers=2,
    )
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    types = [type(module) for module in model.modules()]
    yield model
    after = model.state_dict()
    assert after.keys() == before.keys() and all(after[key].equal(before[key]) for key in before)
    assert [type(module) for module in model.modules()] == types


def refused(
    host: torch.nn.Module,
    path: Path,
    kind: type[CheckpointError],
    *words: str,
    dialect: str | None = None,
) -> CheckpointError:
    """The file is refused by `patch` with one error that says all this; the `host` fixture checks it is untouched."""
    with pytest.raises(CheckpointError) as caught:
        wan_runtime.patch(host, path, dialect=dialect)
    assert type(caught.value) is kind, caught.value
    for word in (*words, str(path)):
        assert word in str(caught.value)
    assert caught.value.path == path
    return caught.value

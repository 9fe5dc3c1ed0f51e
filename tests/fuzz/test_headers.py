"""Headers, markers and shapes by chance over the readers: our errors or a checkpoint, never another exception."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import wan_runtime
from tests.fuzz.files import CASES, answered, content, parts, quantised, written
from wan_runtime.errors import WanRuntimeError
from wan_runtime.header import DTYPES

FEW = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=12)
words = st.sampled_from(
    [
        "format",
        "layers",
        "nvfp4",
        "float8_e4m3fn",
        "modelopt",
        "quant_method",
        "quant_algo",
        "NVFP4",
        "params",
        "dialect",
    ]
)
anything = st.recursive(
    scalars | words,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(words | st.text(max_size=8), inner, max_size=4)
    ),
)
CASE = st.sampled_from(CASES)
MARKERS = ("_quantization_metadata", "quantization_config", "wan_runtime", "quantization_format", "tensor_names",
           "quantization_map_base64", "blocks.0.ffn.0.weight")  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@FEW
@given(case=CASE, data=st.data())
def test_entries_of_any_kind(tmp_path: Path, case: tuple[str, str], data: st.DataObject) -> None:
    """One entry's dtype, shape or offsets replaced by another's, a near number, or anything."""
    header, body = parts(*case, tmp_path)
    header = copy.deepcopy(header)
    keys = [key for key in quantised(header) if key != "__metadata__"]
    entry = header[data.draw(st.sampled_from(keys))]
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    near = {
        "dtype": st.sampled_from(sorted(DTYPES)),
        "shape": st.lists(st.sampled_from([0, 1, 2, 16, 64, 128, 256, 2**31, 2**62, -1]), max_size=6),
        "data_offsets": st.lists(st.sampled_from([0, 1, 4, 2**20, 2**63, -1]), min_size=2, max_size=2),
    }[field]
    entry[field] = data.draw(near | anything)
    answered(written(tmp_path / "fuzzed", header, body))


@FEW
@given(case=CASE, data=st.data())
def test_shapes_of_the_same_size(tmp_path: Path, case: tuple[str, str], data: st.DataObject) -> None:
    """Shapes with the right count of elements, which the header's own checks let through."""
    header, body = parts(*case, tmp_path)
    header = copy.deepcopy(header)
    for key in quantised(header):
        shape = header[key]["shape"]
        count = math.prod(shape)
        choices = [shape, shape[::-1], [count], [1, count], [count, 1], [1, *shape, 1], [count // 2, 2]]
        fitting = [choice for choice in choices if math.prod(choice) == count]
        header[key]["shape"] = data.draw(st.sampled_from(fitting))
    answered(written(tmp_path / "fuzzed", header, body))


@FEW
@given(case=CASE, data=st.data())
def test_keys_renamed_exchanged_or_lost(tmp_path: Path, case: tuple[str, str], data: st.DataObject) -> None:
    header, body = parts(*case, tmp_path)
    header = dict(header)
    keys = [key for key in header if key != "__metadata__"]
    for _ in range(data.draw(st.integers(1, 3))):
        one, other = (data.draw(st.sampled_from(keys)) for _ in range(2))
        to = data.draw(
            st.sampled_from([other, f"net.{one}", f"{one}_scale", one.replace("ffn", "attn1"), "x", ""])
        )
        if one in header:
            header[to], header[one] = header[one], header.get(to, header[one])
            if data.draw(st.booleans()):
                del header[one]
    answered(written(tmp_path / "fuzzed", header, body))


@FEW
@given(case=CASE, marker=st.sampled_from(MARKERS), value=anything, whole=st.booleans())
def test_header_markers(
    tmp_path: Path, case: tuple[str, str], marker: str, value: object, whole: bool
) -> None:
    header, body = parts(*case, tmp_path)
    text = json.dumps(value) if whole else json.dumps(value)[:-1]
    metadata = {**header.get("__metadata__", {}), marker: text}
    answered(written(tmp_path / "fuzzed", {**header, "__metadata__": metadata}, body), weights=False)


@FEW
@given(case=CASE, value=anything)
def test_configs(tmp_path: Path, case: tuple[str, str], value: object) -> None:
    header, body = parts(*case, tmp_path)
    for config in (value, {"_class_name": "WanTransformer3DModel", "quantization_config": value}):
        answered(written(tmp_path / "fuzzed", header, body, config), weights=False)


@FEW
@given(value=anything, cut=st.integers(0, 3), raw=st.binary(max_size=40), as_json=st.booleans())
def test_comfy_records(tmp_path: Path, value: object, cut: int, raw: bytes, as_json: bool) -> None:
    text = json.dumps(value).encode() if as_json else raw
    held = content("comfy", "nvfp4")
    record = torch.tensor(list(text[: len(text) - cut]), dtype=torch.uint8)
    changed = type(held)({**held.tensors, "blocks.0.ffn.0.comfy_quant": record}, metadata=held.metadata)
    answered(changed.write(tmp_path / "fuzzed"))


@FEW
@given(value=anything, key=st.sampled_from(["weight_map", "metadata", "x"]), name=st.text(max_size=20))
def test_indexes(tmp_path: Path, value: Any, key: str, name: str) -> None:
    """An index.json that points anywhere: to files that are not there, outside the folder, or to no file at all."""
    folder = tmp_path / "sharded"
    header, body = parts("plain", "none", tmp_path)
    path = written(folder, header, body)
    index = {"weight_map": {k: path.name for k in header if k != "__metadata__"}}
    if key == "x" and isinstance(index["weight_map"], dict):
        index["weight_map"][name] = value
    else:
        index[key] = value
    listing = folder / "model.safetensors.index.json"
    listing.write_text(json.dumps(index))
    for target in (folder, listing):
        answered(target if target.is_file() else listing, weights=False)
        try:
            wan_runtime.inspect(target)
        except WanRuntimeError as error:
            assert str(error)


@FEW
@given(data=st.binary(max_size=200))
def test_bytes(tmp_path: Path, data: bytes) -> None:
    folder = tmp_path / "bytes"
    folder.mkdir(exist_ok=True)
    for name in ("model.safetensors", "model.gguf"):
        path = folder / name
        path.write_bytes(data)
        assert not answered(path)


def test_an_intact_file_is_read(tmp_path: Path) -> None:
    """So that the fuzzed ones can be."""
    header, body = parts("modelopt", "fp8", tmp_path)
    assert answered(written(tmp_path / "intact", header, body))

"""FastVideo's served class by the import hook, against its documented tree: FastVideo itself needs a GPU and a server.

Run once, by hand, against the real class of fastvideo 0.2.1 on a CPU, with its attention backend named and torchvision
stood in for: 20 of 20 linears, 0.7 % from diffusers in fp32.
"""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import wan_runtime
from tests.builders import files
from tests.builders.wan import block_linears, state
from tests.hosts import diffusers
from wan_runtime.arming import install
from wan_runtime.errors import InvalidOption
from wan_runtime.linear import QuantLinear
from wan_runtime.names import from_original, to_original
from wan_runtime.patches import host_of
from wan_runtime.patches.fastvideo import NAMES
from wan_runtime.swap import patched_state

MODULE = """
from tests.hosts.fastvideo import WanTransformer3DModel as Tree

class WanTransformer3DModel(Tree):
    pass
"""


@pytest.fixture
def fastvideo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of an importable `fastvideo.models.dits.wanvideo`, not imported yet."""
    folder = tmp_path / "fastvideo" / "models" / "dits"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent, folder.parent.parent):
        (package / "__init__.py").touch()
    (folder / "wanvideo.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "fastvideo.models.dits.wanvideo"
    for name in [n for n in sys.modules if n == "fastvideo" or n.startswith("fastvideo.")]:
        del sys.modules[name]


def model_of(module: Any, dtype: torch.dtype = torch.float32) -> Any:
    model = module.WanTransformer3DModel()
    for key, value in state().items():  # one parameter at a time, as FastVideo's loader fills it
        model.get_parameter(from_original(NAMES, key)).data.copy_(value)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def run(model: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    given = diffusers.inputs(dtype)
    with torch.no_grad():
        result: torch.Tensor = model(
            given["hidden_states"], given["encoder_hidden_states"], given["timestep"]
        )
    return result


@pytest.fixture(scope="module")
def truth() -> torch.Tensor:
    return diffusers.run(diffusers.transformer())


def test_its_names_and_arithmetic_are_the_models(fastvideo: str, truth: torch.Tensor) -> None:
    model = model_of(importlib.import_module(fastvideo))
    assert {to_original(NAMES, key) for key in model.state_dict()} == set(state())
    assert diffusers.error(run(model), truth) < 1e-5


@pytest.mark.parametrize("weights", ["fp8", "nvfp4"])
def test_the_served_class_is_patched_at_its_first_call(
    fastvideo: str, truth: torch.Tensor, weights: str
) -> None:
    armed = install({"weights": weights}, announce=lambda report: None)
    try:
        model = model_of(importlib.import_module(fastvideo), torch.bfloat16)
        assert patched_state(model) is None
        result = run(model, torch.bfloat16)
    finally:
        armed.undo()
    assert host_of(model).name == "fastvideo" and len(armed.reports[0].quantised) == 20
    assert model.dtype == torch.bfloat16
    assert diffusers.error(result, truth) < (0.05 if weights == "fp8" else 0.12)


def test_served_linears_answer_in_pairs_and_come_back(fastvideo: str, truth: torch.Tensor) -> None:
    model = model_of(importlib.import_module(fastvideo))
    kinds, keys = [type(m) for m in model.modules()], list(model.state_dict())
    loader = model.blocks[0].to_q.weight.weight_loader
    wan_runtime.patch(model, skip=("blocks.1.ffn.*",))
    x = torch.randn(2, 3, 128)
    for layer in (
        model.blocks[0].to_q,
        model.blocks[1].ffn.fc_in,
        model.condition_embedder.text_embedder.fc_out,
    ):
        output, bias = layer(x)
        assert output.shape[:2] == (2, 3) and output.dtype == torch.float32 and bias is None
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 18
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin, torch.bfloat16), run(model, torch.bfloat16))
        wan_runtime.unpatch(twin)
        assert [type(m) for m in twin.modules()] == kinds
    wan_runtime.unpatch(model)
    assert ([type(m) for m in model.modules()], list(model.state_dict())) == (kinds, keys)
    assert model.blocks[0].to_q.weight.weight_loader == loader, "what the host notes on a parameter stays"
    assert diffusers.error(run(model), truth) < 0.05


def test_a_file_loads_into_it(fastvideo: str, truth: torch.Tensor, tmp_path: Path) -> None:
    content = files.comfy_scaled_fp8(state(), block_linears(), "fp8")
    model: Any = importlib.import_module(fastvideo).WanTransformer3DModel().eval()
    wan_runtime.patch(model, content.write(tmp_path), compute="fp32")
    assert diffusers.error(run(model, torch.bfloat16), truth) < 0.05


def test_tensor_parallel_shards_are_refused(fastvideo: str) -> None:
    model = model_of(importlib.import_module(fastvideo))
    model.blocks[1].ffn.fc_in.output_size *= 2
    with pytest.raises(InvalidOption, match=r"blocks\.1\.ffn\.fc_in\.weight is a tensor-parallel shard"):
        wan_runtime.patch(model)
    model.blocks[1].ffn.fc_in.output_size //= 2
    model.blocks[0].to_out.skip_bias_add = True
    with pytest.raises(InvalidOption, match=r"blocks\.0\.to_out hands its bias on"):
        wan_runtime.patch(model)
    assert patched_state(model) is None

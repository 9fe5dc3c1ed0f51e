"""The Transformer Engine backend where that library, or a GPU, is not: what it refuses and why, what a file becomes for
it, the arithmetic of its padding, and what torch.compile sees. tests/gpu has the products."""

from __future__ import annotations

import copy
import functools
import importlib.util
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.builders.files import Content, comfy_scaled_fp8, lightx2v, plain_fp8
from tests.builders.wan import BLOCK_LINEARS, state
from tests.hosts.diffusers import transformer
from wan_runtime import rules
from wan_runtime.backends import AUTOMATIC, backend_named
from wan_runtime.backends import transformer_engine as engine
from wan_runtime.checkpoint import open_checkpoint, stream
from wan_runtime.errors import BackendUnavailable
from wan_runtime.fitting import notes
from wan_runtime.formats import FORMATS
from wan_runtime.linear import QuantLinear
from wan_runtime.names import SPELLINGS
from wan_runtime.plan import Decision, Options, choose, plan, tree_of
from wan_runtime.staging import Stage, quantised, stage

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SHAPE = (5120, 13824)
SERVED = ("fp8", "mxfp8", "nvfp4")
MODULES = [f"blocks.{n}.{original}" for n in (0, 1) for original, _ in BLOCK_LINEARS]
THERE = importlib.util.find_spec("transformer_engine") is not None


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """What one test's probe found is not another's."""
    engine._probe.cache_clear()
    yield
    engine._probe.cache_clear()


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which Transformer Engine's products are right."""
    monkeypatch.setattr(engine, "_installed", lambda: True)
    monkeypatch.setattr(engine, "_probe", lambda compute, index: None)


def test_it_is_taken_by_name_only() -> None:
    assert backend_named("te") is engine.BACKEND and "te" not in AUTOMATIC


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_format_that_it_does_not_multiply_is_refused_by_name_wherever_it_is(
    weight_format: str, found: None
) -> None:
    if weight_format in SERVED:
        assert choose(weight_format, GPU, SHAPE, Options(backend="te")) == ("te", weight_format, "")
        return
    with pytest.raises(BackendUnavailable) as caught:
        choose(weight_format, GPU, SHAPE, Options(backend="te"))
    said = caught.value.refusals["te"]
    assert f"not {weight_format};" in said and "weights='fp8'" in said


@pytest.mark.parametrize("weight_format", SERVED)
def test_other_computes_and_devices_are_refused(
    weight_format: str, found: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {"bf16", "fp32", *SERVED} - {weight_format}
    for compute in others:
        with pytest.raises(
            BackendUnavailable, match=f"te {compute}: it multiplies {weight_format} weights in"
        ):
            choose(weight_format, GPU, SHAPE, Options(backend="te", compute=compute))
    with pytest.raises(BackendUnavailable, match="need a CUDA GPU; the model is on cpu"):
        choose(weight_format, CPU, SHAPE, Options(backend="te"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(BackendUnavailable, match="need an NVIDIA GPU"):
        choose(weight_format, GPU, SHAPE, Options(backend="te"))


@pytest.mark.skipif(THERE, reason="transformer_engine is installed")
def test_without_the_library_the_refusal_says_what_to_install() -> None:
    with pytest.raises(
        BackendUnavailable, match=r"not installed: pip install --no-build-isolation 'wan-runtime\[te\]'"
    ):
        choose("fp8", GPU, SHAPE, Options(backend="te"))


@pytest.mark.skipif(THERE, reason="transformer_engine is installed, and this is about one that is broken")
def test_a_library_that_does_not_load_is_refused_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('libcudnn.so.9: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    refusal = engine.refuses("fp8", "fp8", GPU, SHAPE)
    assert refusal is not None and "OSError: libcudnn.so.9: cannot open" in refusal


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(not THERE, reason="transformer_engine is not installed")
def test_the_library_without_a_gpu_is_refused_in_its_own_words() -> None:
    refusal = engine.refuses("fp8", "fp8", GPU, SHAPE)
    assert refusal is not None and refusal.startswith("Transformer Engine failed on cuda:0: ")


def test_static_scales_are_taken_where_its_products_have_a_place_for_them(found: None) -> None:
    static = Options(backend="te", activation="static")
    assert choose("fp8", GPU, SHAPE, static) == ("te", "fp8", "")
    with pytest.raises(
        BackendUnavailable, match="te nvfp4: its nvfp4 products scale activations by their own values"
    ):
        choose("nvfp4", GPU, SHAPE, static)


# What a file becomes for it.


def read(content: Content, folder: Path, **options: Any) -> tuple[list[Decision], Stage, dict[str, Any]]:
    """A file's layers as they are staged for a model that is planned for `te` on a GPU, and the file's own tensors."""
    path = content.write(folder)
    spelling, chosen = SPELLINGS["diffusers"], Options(backend="te", **options)
    opened = open_checkpoint(path)
    held = {name: layer.format for name, layer in opened.layers.items()}
    tree = tree_of(transformer(), spelling)
    decisions = plan(tree, held, GPU, chosen, swaps=rules.swaps, fp32=rules.fp32)
    anew = chosen.weights not in ("auto", "keep")
    return (
        decisions,
        stage(stream(opened, CPU), decisions, spelling, torch.bfloat16, anew=anew),
        load_file(path),
    )


def layers(decisions: list[Decision], staged: Stage) -> list[tuple[str, dict[str, torch.Tensor]]]:
    found = [(d.original, staged.slots[d.path]) for d in decisions if d.action == "quantised"]
    assert {name for name, _ in found} == set(MODULES)
    return found


@pytest.mark.parametrize("writer", [comfy_scaled_fp8, plain_fp8])
@pytest.mark.parametrize("weights", ["auto", "fp8"])
def test_fp8_with_one_scale_a_tensor_is_kept_bit_for_bit(
    writer: Callable[..., Content], weights: str, tmp_path: Path, found: None
) -> None:
    decisions, staged, file = read(writer(state(), MODULES, "fp8"), tmp_path, weights=weights)
    assert staged.rescaled == []
    for name, slots in layers(decisions, staged):
        assert torch.equal(slots["payload"], file[f"{name}.weight"].view(torch.uint8)), name
        scale = file.get(f"{name}.scale_weight", torch.ones(1))
        assert slots["scale"].shape == (1, 1) and torch.equal(slots["scale"][0], scale), name


PER_CHANNEL = functools.partial(comfy_scaled_fp8, per_row=True)


def test_fp8_with_one_scale_a_channel_is_refused_and_requantised_only_if_asked(
    tmp_path: Path, found: None
) -> None:
    content = PER_CHANNEL(state(), MODULES, "fp8")
    for weights in ("auto", "keep"):
        with pytest.raises(BackendUnavailable, match=r"one an output channel\. weights='fp8' quantises"):
            read(content, tmp_path, weights=weights)
    decisions, staged, _ = read(content, tmp_path, weights="fp8")
    assert len(staged.rescaled) == len(MODULES)
    for name, slots in layers(decisions, staged):
        assert slots["scale"].shape == (1, 1)
        meant = torch.from_numpy(content.weights[name])
        largest = meant.abs().max()
        assert float(slots["scale"]) == pytest.approx(float(largest) / 448, rel=1e-6)
        wrong = (FORMATS["fp8"].dequantize(slots).double() - meant).abs()
        assert bool((wrong <= (meant.abs() / 16).clamp_min(largest / 448 / 2**9)).all()), (
            "within e4m3's rounding"
        )
    said = notes(decisions, GPU, None, Options(backend="te", weights="fp8"), staged.rescaled)
    assert any(f"{len(MODULES)} layers had one FP8 scale an output channel" in note for note in said)


def test_the_other_backend_keeps_a_scale_a_channel(tmp_path: Path) -> None:
    torch_made = Decision("a", "a", "quantised", "", "fp8", "bf16", "torch")
    made_for_te = Decision("a", "a", "quantised", "", "fp8", "fp8", "te")
    weight = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    assert quantised(torch_made, weight)["scale"].shape == (32, 1)
    assert quantised(made_for_te, weight)["scale"].shape == (1, 1)


@pytest.mark.parametrize(
    ("writer", "weight_format"),
    [(comfy_scaled_fp8, "fp8_e5m2"), (lightx2v, "fp8_block"), (lightx2v, "int8")],
)
def test_what_it_cannot_take_as_it_is_is_requantised_only_if_asked(
    writer: Callable[..., Content], weight_format: str, tmp_path: Path, found: None
) -> None:
    content = writer(state(), MODULES, weight_format)
    with pytest.raises(BackendUnavailable, match=f"not {weight_format}; weights='fp8'"):
        read(content, tmp_path)
    decisions, staged, _ = read(content, tmp_path, weights="fp8")
    for name, slots in layers(decisions, staged):
        meant = torch.from_numpy(content.weights[name])
        assert slots["scale"].shape == (1, 1)
        assert float((FORMATS["fp8"].dequantize(slots).double() - meant).norm() / meant.norm()) < 0.04


# What it is given, and what a compiler sees.


@pytest.mark.parametrize("compute", SERVED)
@pytest.mark.parametrize("tokens", [1, 7, 8, 257, 512])
def test_sizes_go_up_to_its_multiples_and_values_stay(compute: str, tokens: int) -> None:
    each, side = engine.ALIGNMENT[compute]
    for width in (48, 64, 96):
        given = torch.randn(tokens, width)
        rows = engine._up_to(given, each, side)
        assert rows.shape == (-(-tokens // each) * each, -(-width // side) * side) and rows.is_contiguous()
        assert torch.equal(rows[:tokens, :width], given)
        assert not rows[tokens:].any() and not rows[:, width:].any()
        assert (rows.data_ptr() == given.data_ptr()) == (rows.shape == given.shape), "copied without need"


def test_no_linear_of_a_wan_model_is_padded_nor_its_tokens() -> None:
    sides = (1536, 8960, 3072, 14336, 5120, 13824, 4096)  # 1.3B, 5B, 14B, and the text's
    assert not any(size % side for size in sides for _, side in engine.ALIGNMENT.values())
    tokens = (32760, 27280, 75600, 512)  # 480p, 720p of 5B, 720p, the text
    assert not any(count % engine.ALIGNMENT["fp8"][0] for count in tokens)


def layer(weight_format: str, *, bias: bool = True) -> QuantLinear:
    generator = torch.Generator().manual_seed(0)
    slots = FORMATS[weight_format].quantize(torch.randn(64, 96, generator=generator), False)
    given = torch.randn(64, generator=generator) if bias else None
    return QuantLinear(
        96, 64, format=weight_format, slots=slots, bias=given, backend="te", compute=weight_format,
        planned_for="cpu",
    )  # fmt: skip


@pytest.mark.parametrize("weight_format", SERVED)
def test_a_compiler_traces_it_in_one_graph(weight_format: str) -> None:
    """Graphs are recorded and not run: that takes a GPU."""
    graphs: list[torch.fx.GraphModule] = []

    def recording(graph: torch.fx.GraphModule, examples: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return lambda *_: (torch.zeros(2, 5, 64, dtype=torch.bfloat16),)

    torch._dynamo.reset()
    compiled = torch.compile(layer(weight_format), fullgraph=True, backend=recording)
    with torch.no_grad():
        assert compiled(torch.randn(2, 5, 96, dtype=torch.bfloat16)).shape == (2, 5, 64)
    [graph] = graphs
    called = [node for node in graph.graph.nodes if node.op == "call_function"]
    [product] = [node for node in called if "te_product" in str(node.target)]
    shown = product.meta["example_value"]
    assert shown.shape == (10, 64) and shown.dtype == torch.bfloat16
    torch._dynamo.reset()


@pytest.mark.parametrize("weight_format", SERVED)
def test_a_layer_holds_the_slots_alone(weight_format: str) -> None:
    """Copies, pickles and state dicts are those of any other backend's layer, and elsewhere it dequantises."""
    made = layer(weight_format)
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(made), torch.load(buffer, weights_only=False)):
        assert (
            other.state_dict().keys()
            == made.state_dict().keys()
            == {"bias", *FORMATS[weight_format].layout(64, 96)}
        )
        assert all(torch.equal(t, made.state_dict()[name]) for name, t in other.state_dict().items())
        assert other.coded is None and other.__dict__["_multiply"].func is engine.multiply
        other.planned_for = "cuda"
        rows = torch.randn(3, 96)
        truth = rows.double() @ FORMATS[weight_format].dequantize(made.slots).double().T + made.bias.double()
        assert float((other(rows).double() - truth).norm() / truth.norm()) < 1e-6

"""The plan is pure: a tree, a file and options in, a decision and its reason a module out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from tests.builders.wan import BLOCK_LINEARS, Sizes, rows
from tests.hosts.diffusers import transformer
from wan_runtime import rules
from wan_runtime.errors import BackendUnavailable, InvalidOption
from wan_runtime.formats import FORMATS
from wan_runtime.names import SPELLINGS
from wan_runtime.plan import Decision, Node, Options, bare, choose, plan, tree_of

CPU = torch.device("cpu")


def tree(sizes: Sizes | None = None) -> list[Node]:
    model = transformer(sizes=sizes) if sizes else transformer()
    return tree_of(model, SPELLINGS["diffusers"])


def decide(nodes: list[Node], held: Mapping[str, str] | None = None, **options: Any) -> dict[str, Decision]:
    decisions = plan(nodes, held, CPU, Options(**options), swaps=rules.swaps, fp32=rules.fp32)
    assert [d.path for d in decisions] == [n.path for n in nodes], "one decision a module, in order"
    return {d.original: d for d in decisions}


def held(weight_format: str, *extra: str) -> dict[str, str]:
    blocks = [f"blocks.{n}.{original}" for n in (0, 1) for original, _ in BLOCK_LINEARS]
    return dict.fromkeys((*blocks, *extra), weight_format)


def test_tree_names_every_module_that_holds_tensors() -> None:
    """Against the list of a model's tensors, written by hand."""
    nodes = tree()
    assert {n.original for n in nodes if n.parameters} == {
        # the root holds head.modulation in diffusers, which no module of the original tree does
        "" if row[0] == "head.modulation" else row[0].rpartition(".")[0]
        for row in rows()
    }
    assert [n.original for n in nodes if not n.parameters] == ["rope"]
    by_path = {n.path: n for n in nodes}
    assert by_path["blocks.1.ffn.net.0.proj"] == Node(
        "blocks.1.ffn.net.0.proj", "blocks.1.ffn.0", (256, 128), True
    )
    assert not by_path["blocks.1"].leaf


def test_adapters_are_not_part_of_the_tree() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(4, 4)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2)})

    nodes = tree_of(nn.ModuleDict({"patch_embedding": Wrapped()}), SPELLINGS["original"])
    assert [(n.path, n.original) for n in nodes if n.path] == [
        ("patch_embedding.base_layer", "patch_embedding")
    ]
    assert bare("a.base_layer.b.base_layer") == "a.b"


def test_without_a_file_the_block_linears_become_fp8() -> None:
    decisions = decide(tree())
    quantised = {name for name, d in decisions.items() if d.action == "quantised"}
    assert quantised == set(held("fp8"))
    assert {d.format for d in decisions.values() if d.action == "quantised"} == {"fp8"}
    assert {name for name, d in decisions.items() if d.action == "linear"} == set()
    assert decisions[""].action == "model"
    assert decisions["blocks.0"].action == decisions["rope"].action == "own"
    for name in ("patch_embedding", "time_embedding.0", "time_projection.1", "text_embedding.2", "head.head",
                 "blocks.0.norm3", "blocks.1.cross_attn.norm_k"):  # fmt: skip
        assert decisions[name].action == "resident", name


def test_image_projections_are_quantised_and_the_image_embedding_stays_fp32() -> None:
    decisions = decide(tree(Sizes(image=64)))
    assert decisions["blocks.0.cross_attn.k_img"].action == "quantised"
    assert decisions["img_emb.proj.1"].action == "resident"


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_file_decides_layer_by_layer(weight_format: str) -> None:
    file = held(weight_format)
    del file["blocks.0.ffn.2"]
    decisions = decide(tree(), file)
    assert {name: d.format for name, d in decisions.items() if d.action == "quantised"} == file
    assert decisions["blocks.0.ffn.2"].action == "linear"
    assert decisions["blocks.0.ffn.2"].reason == "the file holds it unquantised"


def test_a_host_never_sees_codes_where_it_takes_a_dtype_from_a_weight() -> None:
    """A plain cast holds the time embedding in fp8 too; diffusers casts the timestep to that weight's dtype."""
    decisions = decide(tree(), held("fp8", "time_embedding.0", "head.head"))
    assert decisions["time_embedding.0"].action == decisions["head.head"].action == "resident"
    assert "the file holds fp8" in decisions["time_embedding.0"].reason


def test_weights_overrides_the_file_and_says_what_was() -> None:
    decisions = decide(tree(), held("nvfp4"), weights="fp8")
    layer = decisions["blocks.0.ffn.0"]
    assert layer.format == "fp8" and "was nvfp4" in layer.reason
    assert decide(tree(), held("nvfp4"), weights="keep")["blocks.0.ffn.0"].format == "nvfp4"
    assert decide(tree(), weights="keep")["blocks.0.ffn.0"].action == "linear"


@pytest.mark.parametrize("pattern", ["blocks.0.ffn.*", "blocks.0.ffn.net.*"])
def test_skip_takes_either_spelling(pattern: str) -> None:
    decisions = decide(tree(), skip=(pattern,))
    assert {n for n, d in decisions.items() if d.action == "linear"} == {"blocks.0.ffn.0", "blocks.0.ffn.2"}
    assert decisions["blocks.0.ffn.0"].reason == f"skipped by {pattern!r}"
    assert decide(tree(), held("fp8"), skip=(pattern,))["blocks.0.ffn.0"].action == "linear"


def test_skip_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(InvalidOption, match=r"'blocks\.9\.\*' matches no Linear.*blocks\.1\.ffn"):
        decide(tree(), skip=("blocks.0.*", "blocks.9.*"))


@pytest.mark.parametrize(
    ("option", "value"), [("weights", "int3"), ("compute", "tf32"), ("activation", "never")]
)
def test_unknown_values_list_the_known(option: str, value: str) -> None:
    with pytest.raises(InvalidOption, match=f"{option}='{value}' is not known; choose from "):
        options: dict[str, Any] = {option: value}
        decide(tree(), **options)


def test_a_module_that_no_rule_covers_is_an_error() -> None:
    with pytest.raises(InvalidOption, match=r"no rule covers the module 'blocks\.0\.extra'"):
        decide([Node("", "", None, False), Node("blocks.0.extra", "blocks.0.extra", None, True)])


def test_explicit_fp8_on_the_cpu_lists_each_refusal() -> None:
    with pytest.raises(BackendUnavailable, match="need a CUDA GPU; the model is on cpu") as caught:
        decide(tree(), compute="fp8")
    assert set(caught.value.refusals) == {"torch fp8"}
    with pytest.raises(BackendUnavailable, match="it computes in fp32 only") as caught:
        decide(tree(), compute="bf16", backend="reference")
    assert set(caught.value.refusals) == {"reference bf16"}
    with pytest.raises(BackendUnavailable, match="no such backend"):
        decide(tree(), backend="cutlass")


def test_auto_falls_on_and_says_why() -> None:
    backend, compute, reason = choose("fp8", CPU, (128, 128), Options())
    assert (backend, compute) == ("torch", "bf16")
    assert "torch fp8 refused: FP8 products need a CUDA GPU" in reason
    assert choose("nvfp4", CPU, (128, 128), Options(compute="bf16")) == ("torch", "bf16", "")
    assert choose("nvfp4", CPU, (128, 128), Options(compute="fp32")) == ("reference", "fp32", "")
    assert choose("fp8", CPU, (128, 128), Options(backend="reference")) == ("reference", "fp32", "")

"""The text encoder as a single file: both families of names, plain and FP8. The judge is transformers' own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from tests.builders import files
from tests.hosts.diffusers import error
from wan_runtime.bases import tiny_base
from wan_runtime.errors import BadTensor, CheckpointError, UnaccountedTensors
from wan_runtime.linear import QuantLinear
from wan_runtime.names import to_original
from wan_runtime.text_encoders import UMT5, load_text_encoder, open_text_encoder

State = dict[str, torch.Tensor]
CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 2, 40, 1, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])


def encoder(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=56, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        initializer_factor=0.5,
    )  # fmt: skip
    return UMT5EncoderModel(config).eval()


def encoded(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS, MASK).last_hidden_state
    return result


@pytest.fixture(scope="module")
def state() -> State:
    """transformers' names, each tensor once."""
    return {k: t for k, t in encoder().state_dict().items() if k != "encoder.embed_tokens.weight"}


LINEARS = (".q.weight", ".k.weight", ".v.weight", ".o.weight", ".wi_0.weight", ".wi_1.weight", ".wo.weight")


def linears(state: State) -> list[str]:
    return [key.removesuffix(".weight") for key in state if key.endswith(LINEARS)]


def scaled(state: State) -> files.Content:
    """As ComfyUI's umt5_xxl_fp8_e4m3fn_scaled.safetensors: transformers' names and the tokenizer in a tensor."""
    content = files.comfy_scaled_fp8(state, linears(state), "fp8")
    spiece = (tiny_base() / "tokenizer" / "spiece.model").read_bytes()
    content.tensors["spiece_model"] = torch.tensor(list(spiece), dtype=torch.uint8)
    return content


def original(state: State, prefix: str = "") -> State:
    return {prefix + to_original(UMT5, key): tensor for key, tensor in state.items()}


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_text_encoder(path, CPU, dtype)[0]


def meant(content: files.Content) -> Any:
    """transformers' own model with the weights that a file means."""
    model = encoder(seed=3)
    weights = {f"{path}.weight": torch.from_numpy(w).float() for path, w in content.weights.items()}
    plain = {k: t for k, t in content.tensors.items() if k in model.state_dict() and k not in weights}
    missing = model.load_state_dict({**plain, **weights}, strict=False).missing_keys
    assert missing == ["encoder.embed_tokens.weight"]
    return model


@pytest.mark.parametrize(
    ("key", "theirs"),
    [  # by hand from wan/modules/t5.py: gate is the branch with the activation, which transformers calls wi_0
        ("shared.weight", "token_embedding.weight"),
        ("encoder.block.11.layer.0.SelfAttention.o.weight", "blocks.11.attn.o.weight"),
        (
            "encoder.block.3.layer.0.SelfAttention.relative_attention_bias.weight",
            "blocks.3.pos_embedding.embedding.weight",
        ),
        ("encoder.block.0.layer.0.layer_norm.weight", "blocks.0.norm1.weight"),
        ("encoder.block.1.layer.1.layer_norm.weight", "blocks.1.norm2.weight"),
        ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", "blocks.0.ffn.gate.0.weight"),
        ("encoder.block.0.layer.1.DenseReluDense.wi_1.weight", "blocks.0.ffn.fc1.weight"),
        ("encoder.block.0.layer.1.DenseReluDense.wo.weight", "blocks.0.ffn.fc2.weight"),
        ("encoder.final_layer_norm.weight", "norm.weight"),
    ],
)
def test_the_names_are_those_of_the_release(key: str, theirs: str) -> None:
    assert to_original(UMT5, key) == theirs


@pytest.mark.parametrize("prefix", ["", "text_encoder."])
def test_the_original_names_and_transformers_give_the_same_model(
    state: State, prefix: str, tmp_path: Path
) -> None:
    save_file({k: t.contiguous() for k, t in state.items()}, tmp_path / "hf.safetensors")
    save_file({k: t.contiguous() for k, t in original(state, prefix).items()}, tmp_path / "wan.safetensors")
    truth = encoded(encoder())
    for file in ("hf", "wan"):
        assert torch.equal(encoded(load(tmp_path / f"{file}.safetensors")), truth)


def test_an_fp8_file_stays_fp8_and_means_its_weights(state: State, tmp_path: Path) -> None:
    content = scaled(state)
    model, tokenizer = load_text_encoder(content.write(tmp_path), CPU, torch.float32)
    held = {path: m for path, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert held.keys() == content.weights.keys()
    assert all(m.get_parameter("payload").dtype == torch.uint8 for m in held.values())
    assert error(encoded(model), encoded(meant(content))) < 0.01  # products in bf16
    theirs = AutoTokenizer.from_pretrained(tiny_base() / "tokenizer")
    prompt = "a red circle moves left"
    assert tokenizer(prompt).input_ids == theirs(prompt).input_ids


def test_a_plain_cast_is_read_with_its_embedding(state: State, tmp_path: Path) -> None:
    """Kijai's files cast every matrix to fp8, the embeddings among them, which are not multiplied with."""
    matrices = [k.removesuffix(".weight") for k, t in state.items() if t.dim() == 2]
    small = {k: t.clamp(-8, 8) for k, t in state.items()}
    content = files.plain_fp8(original(small), [to_original(UMT5, path) for path in matrices], "fp8")
    model = load(content.write(tmp_path))
    embedding = torch.from_numpy(content.weights["token_embedding"]).float()
    assert torch.equal(model.shared.weight, embedding)
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == len(linears(state))


def test_both_names_of_the_embedding_are_one_tensor(state: State, tmp_path: Path) -> None:
    alias = {"encoder.embed_tokens.weight": state["shared.weight"].clone()}
    save_file({**state, **alias}, tmp_path / "both.safetensors")
    model = load(tmp_path / "both.safetensors")
    assert model.encoder.embed_tokens is model.shared
    save_file(
        {**state, "encoder.embed_tokens.weight": state["shared.weight"] + 1}, tmp_path / "two.safetensors"
    )
    with pytest.raises(BadTensor, match=r"it differs from 'shared\.weight'"):
        load(tmp_path / "two.safetensors")


def test_the_dtype_is_the_compute_dtype(state: State, tmp_path: Path) -> None:
    model = load(scaled(state).write(tmp_path), torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert encoded(model).dtype == torch.bfloat16
    assert not model.training


def test_what_is_missing_or_too_much_is_named(state: State, tmp_path: Path) -> None:
    without = {k: t for k, t in state.items() if k != "encoder.final_layer_norm.weight"}
    save_file({**without, "decoder.extra": torch.zeros(2)}, tmp_path / "file.safetensors")
    with pytest.raises(UnaccountedTensors) as caught:
        load(tmp_path / "file.safetensors")
    assert caught.value.unfilled == ("encoder.final_layer_norm.weight",)
    assert caught.value.unconsumed == ("decoder.extra",)


def test_a_scale_that_is_missing_is_refused(state: State, tmp_path: Path) -> None:
    content = scaled(state)
    del content.tensors["encoder.block.0.layer.1.DenseReluDense.wo.scale_weight"]
    with pytest.raises(BadTensor, match="has no scale"):
        load(content.write(tmp_path))


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("blocks.0.self_attn.q.weight", r"it is a WAN transformer\. Give it with --checkpoint"),
        ("encoder.downsamples.0.residual.0.gamma", r"it is a VAE: the Wan2\.1 VAE.*--vae"),
        ("double_blocks.0.weight", r"its keys are no known part's: double_blocks\.0\.weight"),
    ],
)
def test_another_model_is_refused_as_a_text_encoder(key: str, found: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=f"this is not a text encoder; {found}"):
        open_text_encoder(tmp_path / "other.safetensors")


def test_the_sizes_name_it(state: State) -> None:
    folder = tiny_base() / "text_encoder"
    checkpoint, tokenizer = open_text_encoder(folder / "model.safetensors")
    assert checkpoint.variant.name == "UMT5 text encoder (dim 128, 2 layers)"
    assert tokenizer is None

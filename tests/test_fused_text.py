"""The text embedding is made once a prompt, to the bit, by nothing but the prompt and the weights: diffusers' own
pipeline and models on the CPU."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig

pytest.importorskip("triton", reason="Triton is not installed (pip install 'wan-runtime[dev]')")

import wan_runtime
from tests import test_fused_original
from tests.hosts.diffusers import inputs, latents, pipeline, transformer
from wan_runtime.patches import _original_block, _text, _wan_block
from wan_runtime.patches._text import MEMO

STEPS = 3


class Calls:
    """Counts what an embedder's activation is given: it holds no weights, and a hook on it is no host's."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        kind = type(model.condition_embedder.text_embedder.act_1)
        ran = kind.forward

        def counted(module: Any, *args: Any) -> Any:
            self.count += 1
            return ran(module, *args)

        monkeypatch.setattr(kind, "forward", counted)


def pair() -> tuple[Any, Any]:
    """The same patched model on fused blocks: as it comes, and with an embedder that forgets."""
    model = transformer()
    wan_runtime.patch(model, attention="sdpa")
    model.to(torch.float32)
    _wan_block.fuse(model, "TWINS")
    plain = copy.deepcopy(model)
    _text.unfuse(plain.condition_embedder.text_embedder)
    return model, plain


def texts(*seeds: int) -> list[torch.Tensor]:
    shape = inputs()["encoder_hidden_states"].shape
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


@torch.no_grad()
def embed(model: Any, text: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model.condition_embedder.text_embedder(text)
    return result


@torch.no_grad()
def alike(model: Any, plain: Any, text: torch.Tensor) -> bool:
    """Whether both models give the same bits for a prompt."""
    given = {**inputs(), "encoder_hidden_states": text}
    return torch.equal(model(**given)[0], plain(**given)[0])


def test_a_guided_generation_embeds_each_of_its_prompts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = pair()
    expected = latents(pipeline(plain), steps=STEPS)
    calls = Calls(model, monkeypatch)
    assert torch.equal(latents(pipeline(model), steps=STEPS), expected)
    assert calls.count == 2  # of 2 * STEPS forwards
    assert torch.equal(latents(pipeline(model), steps=STEPS), expected) and calls.count == 2


def test_prompts_that_alternate_and_a_third(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = pair()
    one, two, three = texts(1, 2, 3)
    wanted = [embed(plain, text) for text in (one, two, three)]
    calls = Calls(model, monkeypatch)
    for _ in range(3):
        assert torch.equal(embed(model, one), wanted[0]) and torch.equal(embed(model, two), wanted[1])
    assert calls.count == 2
    assert torch.equal(embed(model, three), wanted[2]) and torch.equal(embed(model, one), wanted[0])
    assert calls.count == 4  # the third took the place of the first, which had waited longest
    assert len(model.condition_embedder.text_embedder.__dict__[MEMO].kept) == 2


def test_a_prompt_and_an_embedding_that_are_written_into() -> None:
    model, plain = pair()
    (text,) = texts(1)
    embed(model, text).fill_(0)
    assert alike(model, plain, text)
    text.mul_(1.5)
    assert alike(model, plain, text)
    text.data.add_(1)  # of which torch's count of writes says nothing
    assert alike(model, plain, text)


def test_an_adapter_on_the_embedder_and_on_cross_attention_is_switched() -> None:
    model, plain = pair()
    (text,) = texts(1)
    before = embed(model, text)
    for each in (model, plain):
        torch.manual_seed(1)
        targets = ["linear_1", "attn2.to_k", "attn2.to_v"]
        each.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        each.requires_grad_(False)
    assert not torch.equal(embed(model, text), before) and alike(model, plain, text)
    for each in (model, plain):
        each.disable_adapters()
    assert torch.equal(embed(model, text), before) and alike(model, plain, text)
    for each in (model, plain):
        each.enable_adapters()
    assert not torch.equal(embed(model, text), before) and alike(model, plain, text)
    for each in (model, plain):
        each.delete_adapters("default")
    assert torch.equal(embed(model, text), before) and alike(model, plain, text)


def _written(embedder: Any) -> None:
    with torch.no_grad():
        embedder.linear_1.weight.mul_(2)


def _replaced(embedder: Any) -> None:
    embedder.linear_2.bias = torch.nn.Parameter(embedder.linear_2.bias + 1, requires_grad=False)


def _moved(embedder: Any) -> None:
    embedder.linear_1.weight.data = embedder.linear_1.weight.data * 2


def _loaded(embedder: Any) -> None:
    embedder.linear_1.load_state_dict({n: t + 1 for n, t in embedder.linear_1.state_dict().items()})


def _hooked(embedder: Any) -> None:
    embedder.act_1.register_forward_hook(lambda module, args, output: output * 2)


@pytest.mark.parametrize("change", [_written, _replaced, _moved, _loaded, _hooked])
def test_what_changes_the_embedder_is_seen(change: Any) -> None:
    model, plain = pair()
    (text,) = texts(1)
    before = embed(model, text)
    for each in (model, plain):
        change(each.condition_embedder.text_embedder)
    assert not torch.equal(embed(model, text), before) and alike(model, plain, text)


def test_a_move_a_copy_and_a_pickle_start_empty_and_unpatch_ends_it() -> None:
    model, _ = pair()
    embedder = model.condition_embedder.text_embedder
    embed(model, *texts(1))
    assert len(embedder.__dict__[MEMO].kept) == 1
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.condition_embedder.text_embedder.__dict__[MEMO].kept == []
    model.to(torch.float32)
    assert embedder.__dict__[MEMO].kept == []
    wan_runtime.unpatch(model)
    assert (
        type(embedder) is type(transformer().condition_embedder.text_embedder)
        and MEMO not in embedder.__dict__
    )


def test_a_gradient_is_not_cut() -> None:
    model, _ = pair()
    (text,) = texts(1)
    embed(model, text)
    text.requires_grad_(True)
    model.condition_embedder.text_embedder(text).sum().backward()
    assert text.grad is not None and text.grad.abs().sum() > 0


def test_the_release_embeds_a_prompt_once() -> None:
    model = test_fused_original.patched()
    twin = test_fused_original.fused(model)
    expected = test_fused_original.run(twin)
    kept = twin.text_embedding.__dict__[MEMO].kept
    assert torch.equal(test_fused_original.run(twin), expected)
    again = twin.text_embedding.__dict__[MEMO].kept
    assert len(again) == 1 and again[0] is kept[0]  # what a second embedding would have replaced
    _original_block.unfuse(twin)
    assert MEMO not in twin.text_embedding.__dict__ and type(twin.text_embedding) is torch.nn.Sequential

"""The model list, read by the `openai` client."""

from __future__ import annotations

import openai
import pytest


def test_the_bundled_model_is_listed_and_says_that_it_is_bundled(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("wan-tiny", "model", "wan-runtime")
    extra = model.model_extra or {}
    assert extra["bundled"] is True
    assert extra["phase"] == "ready"
    assert extra["limits_and_defaults"]["size_multiple"] == 16
    assert (extra["runtime"]["dialect"], extra["runtime"]["quantised_layers"]) == ("plain", [])
    assert client.models.retrieve("wan-tiny").id == "wan-tiny"


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("sora-2")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")

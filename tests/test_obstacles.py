"""What stands in the way of a swap is named and refused, and the model stays as it was.

Offloading hooks are in test_offload.py, servers' sharded linears in hosts/test_fastvideo.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import wan_runtime
from tests.hosts.diffusers import transformer
from wan_runtime.errors import InvalidOption


def test_weights_that_something_else_quantised_are_refused() -> None:
    model = transformer()
    layer = model.get_submodule("blocks.0.ffn.net.2")
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(InvalidOption, match=r"blocks\.0\.ffn\.net\.2\.weight is float8_e4m3fn"):
        wan_runtime.patch(model)

    class Packed(nn.Parameter):
        pass

    model = transformer()
    model.get_submodule("blocks.0.ffn.net.2").weight = Packed(torch.zeros(128, 256))
    with pytest.raises(InvalidOption, match="Packed"):
        wan_runtime.patch(model)


def test_hooked_layers_are_refused() -> None:
    model = transformer()
    handle = model.get_submodule("blocks.0.attn1.to_q").register_forward_hook(lambda *_: None)
    with pytest.raises(InvalidOption, match=r"blocks\.0\.attn1\.to_q carries a forward hook"):
        wan_runtime.patch(model)
    handle.remove()
    assert wan_runtime.patch(model).quantised

"""A fused block given a stream whose tokens do not lie one after the other, by Triton's kernels (its interpreter where
there is no GPU), which know no strides where their plain-torch twins do."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'wan-runtime[dev]')")

from tests.hosts.diffusers import error
from tests.test_fused_block import EXACT, fused, patched
from wan_runtime.kernels import fused as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@torch.no_grad()
def test_a_view_of_the_patch_embeddings_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """What VACE, and all of diffusers 0.38, give their first block."""
    model = patched(weights="fp8")
    twin = fused(model).to(DEVICE)
    model.to(DEVICE)
    monkeypatch.setattr(kernels, "TWINS", kernels.TRITON)
    generator = torch.Generator().manual_seed(6)
    width = model.blocks[0].scale_shift_table.shape[2]
    stream, text, steps = (
        torch.randn(*shape, generator=generator).to(DEVICE)
        for shape in ((1, width, 4), (1, 3, width), (1, 6, width))
    )
    given = (stream.transpose(1, 2), text, steps, model.rope(torch.empty(1, 16, 1, 4, 4, device=DEVICE)))
    result = twin.blocks[0](*given)
    assert result.is_contiguous() and error(result, model.blocks[0](*given)) < EXACT

"""The original release's module tree, as Wan-Video/Wan2.1 and Wan2.2 lay it out, with their fp32 regions and asserts.

Names, parameters, the dtypes that each step insists on and the two autocast regions are the release's; attention is
torch's instead of flash-attn, which needs a GPU. Source: wan/modules/model.py of github.com/Wan-Video/Wan2.2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.builders.wan import TINY, Sizes, state


def embed(dim: int, position: torch.Tensor) -> torch.Tensor:
    """Sinusoids of timesteps, computed in fp64: [B] -> [B, dim]."""
    half = dim // 2
    angles = position.double()[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def rotate(x: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """RoPE over frames, rows and columns in fp64: [B, L, heads, head_dim] -> the same, fp32 as in the release."""
    head = x.shape[-1]
    third = 2 * (head // 6)
    angles = []
    for axis, (size, dim) in enumerate(zip(grid, (head - 2 * third, third, third), strict=True)):
        step = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        shape = [1, 1, 1, -1]
        shape[axis] = size
        angles.append((torch.arange(size).double()[:, None] * step).reshape(shape).expand(*grid, -1))
    turn = torch.cat(angles, dim=-1).reshape(1, math.prod(grid), 1, -1)
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(turn), turn)).flatten(3).float()


class WanRMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class WanLayerNorm(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).type_as(x)


class WanSelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = WanRMSNorm(dim), WanRMSNorm(dim)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        given = q.dtype
        half = q.dtype if q.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16  # flash-attn's two
        q, k, v = (t.to(half).transpose(1, 2) for t in (q, k, v))
        result: torch.Tensor = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).to(given)
        return result

    def split(self, x: torch.Tensor) -> Any:
        return x.unflatten(2, (self.heads, -1))

    def forward(self, x: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        q, k = rotate(self.split(q), grid), rotate(self.split(k), grid)
        result: torch.Tensor = self.o(self.attend(q, k, self.split(v)))
        return result


class WanCrossAttention(WanSelfAttention):
    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        result: torch.Tensor = self.o(self.attend(self.split(q), self.split(k), self.split(v)))
        return result


class WanAttentionBlock(nn.Module):
    def __init__(self, dim: int, ffn: int, heads: int) -> None:
        super().__init__()
        self.norm1 = WanLayerNorm(dim, 1e-6, elementwise_affine=False)
        self.self_attn = WanSelfAttention(dim, heads)
        self.norm3 = WanLayerNorm(dim, 1e-6)
        self.cross_attn = WanCrossAttention(dim, heads)
        self.norm2 = WanLayerNorm(dim, 1e-6, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.GELU(approximate="tanh"), nn.Linear(ffn, dim))
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(
        self, x: torch.Tensor, e: torch.Tensor, grid: tuple[int, int, int], context: torch.Tensor
    ) -> torch.Tensor:
        assert e.dtype == torch.float32
        with torch.autocast(
            "cpu", enabled=False
        ):  # the release: autocast to fp32, which torch serves by switching off
            parts = (self.modulation + e).chunk(6, dim=1)
        assert parts[0].dtype == torch.float32
        y = self.self_attn(self.norm1(x).float() * (1 + parts[1]) + parts[0], grid)
        with torch.autocast("cpu", enabled=False):
            x = x + y * parts[2]
        x = x + self.cross_attn(self.norm3(x), context)
        y = self.ffn(self.norm2(x).float() * (1 + parts[4]) + parts[3])
        with torch.autocast("cpu", enabled=False):
            result: torch.Tensor = x + y * parts[5]
        return result


class Head(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = WanLayerNorm(dim, 1e-6, elementwise_affine=False)
        self.head = nn.Linear(dim, out * 4)
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        assert e.dtype == torch.float32
        with torch.autocast("cpu", enabled=False):
            shift, scale = (self.modulation + e[:, None]).chunk(2, dim=1)
            result: torch.Tensor = self.head(self.norm(x) * (1 + scale) + shift)
        return result


class WanModel(nn.Module):
    """Text-to-video: latents [B, C, T, H, W], timesteps [B], text [B, L, text_dim] -> [B, 16, T, H, W]."""

    def __init__(self, sizes: Sizes = TINY) -> None:
        super().__init__()
        dim = sizes.dim
        self.freq_dim = sizes.freq
        self.patch_embedding = nn.Conv3d(sizes.channels, dim, (1, 2, 2), (1, 2, 2))
        self.text_embedding = nn.Sequential(
            nn.Linear(sizes.text, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(sizes.freq, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(
            WanAttentionBlock(dim, sizes.ffn, dim // 128) for _ in range(sizes.layers)
        )
        self.head = Head(dim, 16)

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        x = self.patch_embedding(x)
        frames, height, width = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        with torch.autocast("cpu", enabled=False):
            e = self.time_embedding(embed(self.freq_dim, t).float())
            parts = self.time_projection(e).unflatten(1, (6, -1))
            assert e.dtype == torch.float32 and parts.dtype == torch.float32
        context = self.text_embedding(context)
        for block in self.blocks:
            x = block(x, parts, (frames, height, width), context)
        x = self.head(x, e).unflatten(1, (frames, height, width)).unflatten(-1, (1, 2, 2, -1))
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def transformer(dtype: torch.dtype = torch.float32, seed: int = 0) -> WanModel:
    """With the values that tests.hosts.diffusers gives its model."""
    model = WanModel()
    model.load_state_dict(state(spelling="original", seed=seed))
    return model.to(dtype).eval()

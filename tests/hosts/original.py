"""The original release's module tree, as Wan-Video/Wan2.1 and Wan2.2 lay it out, with their fp32 regions and asserts.

Names, parameters, what each forward takes, the dtypes that each step insists on and the two autocast regions are the
release's; attention is torch's instead of flash-attn, which needs a GPU. Source: wan/modules/model.py of
github.com/Wan-Video/Wan2.1 and Wan2.2: a block is given e [B, 6, C] in the first and [B, L, 6, C] in the second.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.builders.wan import TINY, Sizes, state

HALF: torch.dtype | None = torch.bfloat16  # what flash-attn computes in; a test that wants fp32 sets None
TEXT = 512


def embed(dim: int, position: torch.Tensor) -> torch.Tensor:
    """Sinusoids of timesteps, computed in fp64: [N] -> [N, dim]."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float64, device=position.device)
    angles = position.double()[:, None] * 10000.0 ** (-steps / half)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def turns(head: int, count: int = 1024) -> torch.Tensor:
    """The release's table of rotations: complex128 [1024, head / 2], frames' columns, then rows', then columns'."""
    third = 2 * (head // 6)
    steps = [
        10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        for dim in (head - 2 * third, third, third)
    ]
    angles = torch.cat([torch.outer(torch.arange(count).double(), step) for step in steps], dim=1)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: torch.Tensor, grid_sizes: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """RoPE over frames, rows and columns in fp64, padding left as it is: [B, L, heads, head_dim] -> the same, fp32."""
    half = x.shape[-1] // 2
    axes = freqs.split([half - 2 * (half // 3), half // 3, half // 3], dim=1)
    done = []
    for sample, grid in zip(x, grid_sizes.tolist(), strict=True):
        tokens, parts = math.prod(grid), []
        for axis, table in enumerate(axes):
            shape = [1, 1, 1, -1]
            shape[axis] = grid[axis]
            parts.append(table[: grid[axis]].reshape(shape).expand(*grid, -1))
        turn = torch.cat(parts, dim=-1).reshape(tokens, 1, -1)
        pairs = torch.view_as_complex(
            sample[:tokens].double().reshape(tokens, x.shape[2], -1, 2).contiguous()
        )
        turned = torch.view_as_real(pairs * turn).flatten(2)
        done.append(torch.cat((turned, sample[tokens:].double())))
    return torch.stack(done).float()


def flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:  # fmt: skip
    """[B, L, heads, head] -> the same in q's dtype; keys past `k_lens` are not attended to."""
    assert window_size == (-1, -1)
    given = q.dtype
    half = v.dtype if v.dtype in (torch.bfloat16, torch.float16) else HALF or v.dtype
    q, k, v = (t.to(half).transpose(1, 2) for t in (q, k, v))
    mask = None
    if k_lens is not None:
        mask = (torch.arange(k.shape[2])[None] < k_lens[:, None])[:, None, None].to(q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).to(given)


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
        self.num_heads, self.window_size = heads, (-1, -1)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = WanRMSNorm(dim), WanRMSNorm(dim)

    def split(self, x: torch.Tensor) -> Any:
        return x.unflatten(2, (self.num_heads, -1))

    def forward(
        self, x: torch.Tensor, seq_lens: torch.Tensor, grid_sizes: torch.Tensor, freqs: torch.Tensor
    ) -> torch.Tensor:
        q, k, v = (
            self.split(self.norm_q(self.q(x))),
            self.split(self.norm_k(self.k(x))),
            self.split(self.v(x)),
        )
        q, k = rotate(q, grid_sizes, freqs), rotate(k, grid_sizes, freqs)
        result: torch.Tensor = self.o(flash_attention(q, k, v, seq_lens, self.window_size).flatten(2))
        return result


class WanCrossAttention(WanSelfAttention):
    def forward(  # type: ignore[override]
        self, x: torch.Tensor, context: torch.Tensor, context_lens: torch.Tensor | None
    ) -> torch.Tensor:
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        attended = flash_attention(self.split(q), self.split(k), self.split(v), context_lens)
        result: torch.Tensor = self.o(attended.flatten(2))
        return result


class WanI2VCrossAttention(WanSelfAttention):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.k_img, self.v_img, self.norm_k_img = nn.Linear(dim, dim), nn.Linear(dim, dim), WanRMSNorm(dim)

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, context: torch.Tensor, context_lens: torch.Tensor | None
    ) -> torch.Tensor:
        image, context = context[:, :-TEXT], context[:, -TEXT:]
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        k_img, v_img = self.norm_k_img(self.k_img(image)), self.v_img(image)
        other = flash_attention(self.split(q), self.split(k_img), self.split(v_img))
        attended = flash_attention(self.split(q), self.split(k), self.split(v), context_lens)
        result: torch.Tensor = self.o(attended.flatten(2) + other.flatten(2))
        return result


class WanAttentionBlock(nn.Module):
    def __init__(self, dim: int, ffn: int, heads: int, image: bool = False) -> None:
        super().__init__()
        self.norm1 = WanLayerNorm(dim, 1e-6, elementwise_affine=False)
        self.self_attn = WanSelfAttention(dim, heads)
        self.norm3 = WanLayerNorm(dim, 1e-6)
        self.cross_attn = (WanI2VCrossAttention if image else WanCrossAttention)(dim, heads)
        self.norm2 = WanLayerNorm(dim, 1e-6, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.GELU(approximate="tanh"), nn.Linear(ffn, dim))
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(
        self, x: torch.Tensor, e: torch.Tensor, seq_lens: torch.Tensor, grid_sizes: torch.Tensor,
        freqs: torch.Tensor, context: torch.Tensor, context_lens: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        assert e.dtype == torch.float32
        with torch.autocast(
            x.device.type, enabled=False
        ):  # the release: autocast to fp32, which torch serves by switching off
            own = self.modulation if e.ndim == 3 else self.modulation[:, None]
            parts = [part.squeeze(2) if e.ndim == 4 else part for part in (own + e).chunk(6, dim=e.ndim - 2)]
        assert parts[0].dtype == torch.float32
        y = self.self_attn(self.norm1(x).float() * (1 + parts[1]) + parts[0], seq_lens, grid_sizes, freqs)
        with torch.autocast(x.device.type, enabled=False):
            x = x + y * parts[2]
        x = x + self.cross_attn(self.norm3(x), context, context_lens)
        y = self.ffn(self.norm2(x).float() * (1 + parts[4]) + parts[3])
        with torch.autocast(x.device.type, enabled=False):
            result: torch.Tensor = x + y * parts[5]
        return result


class Head(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = WanLayerNorm(dim, 1e-6, elementwise_affine=False)
        self.head = nn.Linear(dim, out * 4)
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """e is [B, C], or [B, L, C] with a timestep a token."""
        assert e.dtype == torch.float32
        with torch.autocast(x.device.type, enabled=False):
            own = self.modulation if e.ndim == 2 else self.modulation[:, None]
            shift, scale = (own + e.unsqueeze(-2)).chunk(2, dim=-2)
            if e.ndim == 3:
                shift, scale = shift.squeeze(2), scale.squeeze(2)
            result: torch.Tensor = self.head(self.norm(x) * (1 + scale) + shift)
        return result


class ImageProjection(nn.Module):
    def __init__(self, image: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image), nn.Linear(image, image), nn.GELU(), nn.Linear(image, dim), nn.LayerNorm(dim)
        )

    def forward(self, image: torch.Tensor) -> Any:
        return self.proj(image)


class WanModel(nn.Module):
    """Latents [B, C, T, H, W], timesteps [B] or a token [B, L], text [B, L, text_dim], image [B, L, image_dim] or None
    -> [B, 16, T, H, W]. With `release` "2.2" each token has a timestep, as there; `padding` tokens are put behind."""

    def __init__(self, sizes: Sizes = TINY, release: str = "2.1") -> None:
        super().__init__()
        dim = sizes.dim
        self.freq_dim, self.release, self.padding = sizes.freq, release, 0
        self.patch_embedding = nn.Conv3d(sizes.channels, dim, (1, 2, 2), (1, 2, 2))
        self.text_embedding = nn.Sequential(
            nn.Linear(sizes.text, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(sizes.freq, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(
            WanAttentionBlock(dim, sizes.ffn, dim // 128, sizes.image is not None)
            for _ in range(sizes.layers)
        )
        self.head = Head(dim, 16)
        if sizes.image is not None:
            self.img_emb = ImageProjection(sizes.image, dim)
        self.freqs = turns(128)  # not a buffer: .to(dtype) would change it

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, image: torch.Tensor | None = None
    ) -> torch.Tensor:
        self.freqs = self.freqs.to(x.device)
        x = self.patch_embedding(x)
        grid, batch = x.shape[2:], len(x)
        grid_sizes = torch.tensor([grid] * batch)
        x = x.flatten(2).transpose(1, 2)
        seq_lens = torch.tensor([x.shape[1]] * batch)
        x = torch.cat((x, x.new_zeros(batch, self.padding, x.shape[2])), dim=1)
        if self.release == "2.2" and t.ndim == 1:
            t = t[:, None].expand(batch, x.shape[1])
        with torch.autocast(x.device.type, enabled=False):
            e = self.time_embedding(embed(self.freq_dim, t.flatten()).unflatten(0, t.shape).float())
            parts = self.time_projection(e).unflatten(-1, (6, -1))
            assert e.dtype == torch.float32 and parts.dtype == torch.float32
        context = self.text_embedding(context)
        if image is not None:
            context = torch.cat((self.img_emb(image), context), dim=1)
        given = {
            "e": parts, "seq_lens": seq_lens, "grid_sizes": grid_sizes, "freqs": self.freqs, "context": context,
            "context_lens": None,
        }  # fmt: skip
        for block in self.blocks:
            x = block(x, **given)
        x = self.head(x, e)[:, : math.prod(grid)].unflatten(1, grid).unflatten(-1, (1, 2, 2, -1))
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def transformer(
    dtype: torch.dtype = torch.float32, seed: int = 0, sizes: Sizes = TINY, release: str = "2.1"
) -> WanModel:
    """With the values that tests.hosts.diffusers gives its model."""
    model = WanModel(sizes, release)
    model.load_state_dict(state(sizes, spelling="original", seed=seed))
    return model.to(dtype).eval()

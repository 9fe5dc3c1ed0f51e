"""FastVideo's module tree, as fastvideo/models/dits/wanvideo.py of fastvideo 0.2.1 lays it out, for text-to-video.

Names, parameters, the linears' answer (output, bias not added) and the dtypes each step insists on are FastVideo's; its
attention, sequence parallelism and platform layers need a server around them and are torch's here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.builders.wan import TINY, Sizes
from tests.hosts.original import embed, rotate, turns


class LinearBase(nn.Module):
    """The root of vLLM's family of linears."""

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__()
        self.input_size, self.output_size, self.skip_bias_add = input_size, output_size, False


class ReplicatedLinear(LinearBase):
    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__(input_size, output_size)
        self.weight = nn.Parameter(torch.zeros(output_size, input_size))
        self.bias = nn.Parameter(torch.zeros(output_size))
        self.weight.weight_loader = self.load  # type: ignore[attr-defined]

    def load(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        parameter.data.copy_(value)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, nn.Parameter | None]:
        return F.linear(x, self.weight, self.bias), None


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.weight


class FP32LayerNorm(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int, out: int, act: nn.Module) -> None:
        super().__init__()
        self.fc_in, self.act, self.fc_out = ReplicatedLinear(dim, hidden), act, ReplicatedLinear(hidden, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fc_out(self.act(self.fc_in(x)[0]))[0]
        return result


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, dim, (1, 2, 2), (1, 2, 2))


class TimestepEmbedder(nn.Module):
    def __init__(self, freq: int, dim: int) -> None:
        super().__init__()
        self.mlp = MLP(freq, dim, dim, nn.SiLU())


class ModulateProjection(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = ReplicatedLinear(dim, 6 * dim)


class WanTimeTextImageEmbedding(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.freq = sizes.freq
        self.time_embedder = TimestepEmbedder(sizes.freq, sizes.dim)
        self.time_modulation = ModulateProjection(sizes.dim)
        self.text_embedder = MLP(sizes.text, sizes.dim, sizes.dim, nn.GELU(approximate="tanh"))

    def forward(self, timestep: torch.Tensor, text: torch.Tensor) -> tuple[Any, Any, Any]:
        mlp = self.time_embedder.mlp
        temb = mlp(
            embed(self.freq, timestep).float().to(mlp.fc_in.weight.dtype)
        )  # a dtype taken from a weight
        return temb, self.time_modulation.linear(F.silu(temb))[0], self.text_embedder(text)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    result: torch.Tensor = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return result


class WanT2VCrossAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (ReplicatedLinear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> Any:
        q, k, v = self.norm_q(self.to_q(x)[0]), self.norm_k(self.to_k(context)[0]), self.to_v(context)[0]
        return self.to_out(attend(*(t.unflatten(2, (self.heads, -1)) for t in (q, k, v))))[0]


class ScaleResidualLayerNormScaleShift(nn.Module):
    def __init__(self, dim: int, affine: bool) -> None:
        super().__init__()
        self.norm = FP32LayerNorm(dim, 1e-6, elementwise_affine=affine)

    def forward(self, residual: Any, x: Any, gate: Any, shift: Any, scale: Any) -> tuple[Any, Any]:
        residual = residual + x * gate
        return self.norm(residual) * (1 + scale) + shift, residual


class WanTransformerBlock(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        dim, self.heads = sizes.dim, sizes.dim // 128
        self.norm1 = FP32LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.to_q, self.to_k, self.to_v, self.to_out = (ReplicatedLinear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)
        self.self_attn_residual_norm = ScaleResidualLayerNormScaleShift(dim, True)
        self.attn2 = WanT2VCrossAttention(dim, self.heads)
        self.cross_attn_residual_norm = ScaleResidualLayerNormScaleShift(dim, False)
        self.ffn = MLP(dim, sizes.ffn, dim, nn.GELU(approximate="tanh"))
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(self, x: Any, context: Any, temb: Any, grid: tuple[int, int, int]) -> Any:
        given = x.dtype
        shift, scale, gate, c_shift, c_scale, c_gate = (self.scale_shift_table + temb.float()).chunk(6, dim=1)
        assert shift.dtype == torch.float32
        y = (self.norm1(x.float()) * (1 + scale) + shift).to(given)
        q, k, v = self.norm_q(self.to_q(y)[0]), self.norm_k(self.to_k(y)[0]), self.to_v(y)[0]
        q, k, v = (t.unflatten(2, (self.heads, -1)) for t in (q, k, v))
        q, k = (rotate(t, torch.tensor([grid] * len(t)), turns(t.shape[-1])).to(given) for t in (q, k))
        y = self.to_out(attend(q, k, v))[0]
        y, x = (t.to(given) for t in self.self_attn_residual_norm(x, y, gate, 0, 0))
        y, x = (
            t.to(given) for t in self.cross_attn_residual_norm(x, self.attn2(y, context), 1, c_shift, c_scale)
        )
        return (x + self.ffn(y) * c_gate).to(given)


class WanTransformer3DModel(nn.Module):
    def __init__(self, sizes: Sizes = TINY) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbed(sizes.channels, sizes.dim)
        self.condition_embedder = WanTimeTextImageEmbedding(sizes)
        self.blocks = nn.ModuleList(WanTransformerBlock(sizes) for _ in range(sizes.layers))
        self.norm_out = FP32LayerNorm(sizes.dim, 1e-6, elementwise_affine=False)
        self.proj_out = nn.Linear(sizes.dim, 64)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, sizes.dim))

    def forward(self, hidden_states: Any, encoder_hidden_states: Any, timestep: Any) -> Any:
        given = hidden_states.dtype
        x = self.patch_embedding.proj(hidden_states)
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        temb, parts, context = self.condition_embedder(timestep, encoder_hidden_states)
        assert context.dtype == given
        for block in self.blocks:
            x = block(x, context, parts.unflatten(1, (6, -1)), tuple(grid))
        shift, scale = (self.scale_shift_table + temb[:, None]).chunk(2, dim=1)
        x = self.proj_out((self.norm_out(x) * (1 + scale) + shift).to(given))
        x = x.unflatten(1, tuple(grid)).unflatten(-1, (1, 2, 2, -1))
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

"""One forward of a WAN transformer with random weights: bf16 against this library's FP8 and NVFP4, in one process.

    python benchmarks/patched_forward.py [--model 14B] [--frames 81] [--runs 5]

Prints one JSON object a line: the patch (seconds, bytes), the error against the reference backend on the same
quantised weights and against bf16, and the forward's median seconds with its spread, each with the same attention.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

import wan_runtime

CONFIGS = {
    "tiny": {
        "num_attention_heads": 2,
        "ffn_dim": 1024,
        "num_layers": 2,
        "in_channels": 16,
        "out_channels": 16,
    },
    "1.3B": {
        "num_attention_heads": 12,
        "ffn_dim": 8960,
        "num_layers": 30,
        "in_channels": 16,
        "out_channels": 16,
    },
    "5B": {
        "num_attention_heads": 24,
        "ffn_dim": 14336,
        "num_layers": 30,
        "in_channels": 48,
        "out_channels": 48,
    },
    "14B": {
        "num_attention_heads": 40,
        "ffn_dim": 13824,
        "num_layers": 40,
        "in_channels": 16,
        "out_channels": 16,
    },
}
LATENT = {"tiny": (16, 16), "1.3B": (60, 104), "5B": (44, 80), "14B": (60, 104)}


def show(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def build(size: str) -> Any:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = WanTransformer3DModel(attention_head_dim=128, text_dim=4096, freq_dim=256, **CONFIGS[size])
    model = model.to(torch.bfloat16).to_empty(device="cuda")
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.data.fill_(1)
        else:
            parameter.data.normal_(0, parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.02)
    model.rope = WanRotaryPosEmbed(128, model.config.patch_size, model.config.rope_max_seq_len).to("cuda")
    return model.eval().requires_grad_(False)


def inputs(size: str, frames: int) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(1)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    return {
        "hidden_states": make(1, CONFIGS[size]["in_channels"], (frames - 1) // 4 + 1, *LATENT[size]),
        "timestep": torch.tensor([500], device="cuda"),
        "encoder_hidden_states": make(1, 512, 4096),
        "return_dict": False,
    }


def timed(model: Any, arguments: dict[str, Any], runs: int) -> tuple[dict[str, float], torch.Tensor]:
    seconds = []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(runs + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = model(**arguments)[0]
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    steady = sorted(seconds[2:])
    figures = {
        "first_s": round(seconds[0], 3),
        "step_s": round(statistics.median(steady), 4),
        "spread_s": round(steady[-1] - steady[0], 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }
    return figures, result


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return round(float((a.float() - b.float()).norm() / b.float().norm()), 5)


def patched(model: Any, **options: Any) -> Any:
    clone = copy.deepcopy(model)
    start = time.perf_counter()
    report = wan_runtime.patch(clone, **options)
    torch.cuda.synchronize()
    show(patch=options, seconds=round(time.perf_counter() - start, 2), layers=len(report.quantised),
         bytes_before=report.bytes_before, bytes_after=report.bytes_after,
         computes=sorted({d.compute for d in report.quantised}))  # fmt: skip
    return clone


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="14B", choices=CONFIGS)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    show(torch=torch.__version__, gpu=torch.cuda.get_device_name(), model=given.model, frames=given.frames)
    model, whole, short = build(given.model), inputs(given.model, given.frames), inputs(given.model, 5)
    bf16_short = model(**short)[0]
    attentions = ("native", "_native_cudnn")
    for attention in attentions:
        model.set_attention_backend(attention)
        show(model=given.model, config=f"diffusers bf16 {attention}", **timed(model, whole, given.runs)[0])
    for weights in ("fp8", "nvfp4"):
        reference = patched(model, weights=weights, backend="reference")
        truth = reference(**short)[0]
        del reference
        ours = patched(model, weights=weights)
        result = ours(**short)[0]
        show(weights=weights, error_vs_reference=relative(result, truth), error_vs_bf16=relative(result, bf16_short),
             reference_vs_bf16=relative(truth, bf16_short))  # fmt: skip
        for attention in attentions:
            ours.set_attention_backend(attention)
            show(model=given.model, config=f"ours {weights} {attention}", **timed(ours, whole, given.runs)[0])
        del ours
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

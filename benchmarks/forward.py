"""One forward of a WAN transformer with random weights, in one configuration: prints one JSON object.

    python benchmarks/forward.py --model "14B 480p" --config "ours fp8 fa3" [--runs 5] [--truth truth.pt] [--profile]

The configuration is words: who first (ours, diffusers, torchao, te, kitchen), then what varies: fp8, nvfp4 or bf16
(weights); fa3, cudnn, sdpa or fp8attn (attention); compiled; layerwise; unfused; te (ours, with backend="te"). A
process measures one, so that no compilation, cache or allocator of another shows in it; benchmarks/suite.py runs them
all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from board import Board  # beside this file
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

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
LATENTS = {  # frames, height and width of the latent
    "tiny": (3, 16, 16),
    "1.3B 480p": (21, 60, 104),
    "5B 720p": (31, 44, 80),
    "14B 480p": (21, 60, 104),
    "14B 720p": (21, 90, 160),
}
ATTENTIONS = {"fa3": "fa3", "cudnn": "cudnn", "sdpa": "sdpa", "fp8attn": "fp8"}


def build(model: str, device: str) -> Any:
    """The model in bf16, weights drawn at the size a trained model's have."""
    torch.manual_seed(0)
    with torch.device("meta"):
        made = WanTransformer3DModel(
            attention_head_dim=128, text_dim=4096, freq_dim=256, **CONFIGS[model.split()[0]]
        )
    made = made.to(torch.bfloat16).to_empty(device=device)
    for name, parameter in made.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.data.fill_(1)
        else:
            parameter.data.normal_(0, parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.02)
    made.rope = WanRotaryPosEmbed(128, made.config.patch_size, made.config.rope_max_seq_len).to(device)
    return made.eval().requires_grad_(False)


def inputs(model: str, device: str) -> dict[str, Any]:
    """One prompt of 512 tokens; TI2V-5B gets its timestep a token, as its pipeline gives it."""
    generator = torch.Generator(device).manual_seed(1)
    frames, height, width = LATENTS[model]
    channels = CONFIGS[model.split()[0]]["in_channels"]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    timestep = torch.tensor([500], device=device)
    if model.startswith("5B"):
        timestep = timestep.expand(1, frames * height * width // 4)
    return {
        "hidden_states": draw(1, channels, frames, height, width),
        "timestep": timestep,
        "encoder_hidden_states": draw(1, 512, 4096),
        "return_dict": False,
    }


def prepare(made: Any, config: str) -> str:
    """Give a model a configuration; returns which attention it uses."""
    who, *what = config.split()
    attention = next((ATTENTIONS[word] for word in what if word in ATTENTIONS), "auto")
    weights = next((word for word in what if word in ("fp8", "nvfp4")), "keep")
    if who == "ours":
        import wan_runtime

        options: dict[str, Any] = {"weights": weights, "attention": attention, "fuse": "unfused" not in what}
        options["backend"] = "te" if "te" in what else "auto"
        if attention == "fp8":
            options["attention_end_steps"] = 0  # one timestep again and again would be the first step
        report = wan_runtime.patch(made, **options)
        attention = str(report.attention)
    else:
        _peer(made, who, what)
        if attention != "auto":
            from wan_runtime.attention import Ends
            from wan_runtime.patches._attention_processor import install

            kind = next(made.parameters()).device.type
            install(made, attention, (kind, torch.bfloat16), Ends(steps=0))
    if "compiled" in what:
        made.compile_repeated_blocks(fullgraph=False)
    return attention


def _peer(made: Any, who: str, what: list[str]) -> None:
    def in_block(module: Any, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and "blocks." in name

    if who == "torchao":
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

        quantize_(made, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), filter_fn=in_block)
    elif who in ("te", "kitchen"):
        from peers import kitchen_linear, te_linear  # beside this file

        replace = {"te": te_linear, "kitchen": kitchen_linear}[who]
        for name, module in list(made.named_modules()):
            if in_block(module, name):
                parent, _, leaf = name.rpartition(".")
                setattr(made.get_submodule(parent), leaf, replace(module))
    elif who != "diffusers":
        raise SystemExit(f"{who!r} is not known; the first word is ours, diffusers, torchao, te or kitchen.")
    elif "layerwise" in what:
        made.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)


def held_bytes(tensor: Any) -> int:
    """Bytes of a tensor; of one that stands for others (torchao's quantised weights), theirs."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return (
        tensor.nbytes if flatten is None else sum(held_bytes(getattr(tensor, name)) for name in flatten()[0])
    )


def timed(made: Any, arguments: dict[str, Any], runs: int) -> tuple[dict[str, Any], torch.Tensor]:
    """First call, then the median of `runs` after one more, with the spread between the extremes; the GPU's clock and
    power meanwhile."""
    gpu = arguments["hidden_states"].is_cuda

    def once() -> tuple[float, torch.Tensor]:
        if gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        result = made(**arguments)[0]
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began, result

    if gpu:
        torch.cuda.reset_peak_memory_stats()
    first, result = once()
    with Board(gpu) as board:
        once()
        began = time.perf_counter()
        steady = sorted(once()[0] for _ in range(runs))
        ended = time.perf_counter()
    figures: dict[str, Any] = {
        "first_s": round(first, 3),
        "step_s": round(statistics.median(steady), 4),
        "spread_s": round(steady[-1] - steady[0], 4),
    }
    if gpu:
        figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        figures |= board.between(began, ended)
    return figures, result


def profiled(made: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds on the GPU by kind of kernel, and the kernels that took most."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        made(**arguments)
        torch.cuda.synchronize()
    kinds = {"gemm": 0.0, "attention": 0.0, "rest": 0.0}
    kernels = []
    for event in recorded.key_averages():
        taken = getattr(event, "self_device_time_total", 0) / 1e3
        if taken <= 0 or "CUDA" not in str(event.device_type):
            continue
        kinds[_kind(event.key.lower())] += taken
        kernels.append((round(taken, 2), event.count, event.key[:60]))
    return {
        "parts_ms": {kind: round(taken, 1) for kind, taken in kinds.items()},
        "kernels": sorted(kernels, reverse=True)[:14],
    }


def _kind(kernel: str) -> str:
    if any(part in kernel for part in ("gemm", "nvjet", "cutlass_80", "cublas", "matmul")):
        return "gemm"
    attention = any(part in kernel for part in ("sdpa", "fmha", "flash"))
    return "attention" if attention else "rest"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="14B 480p", choices=LATENTS)
    parser.add_argument("--config", default="ours fp8")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--truth", type=Path, help="the output to compare with; written where it is not there yet"
    )
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made, arguments = build(given.model, device), inputs(given.model, device)
    began = time.perf_counter()
    attention = prepare(made, given.config)
    row: dict[str, Any] = {"model": given.model, "config": given.config, "attention": attention}
    row["prepare_s"] = round(time.perf_counter() - began, 2)
    row["weights_gib"] = round(sum(map(held_bytes, made.parameters())) / 2**30, 3)
    figures, result = timed(made, arguments, given.runs)
    row |= figures
    if given.truth is not None:
        if not given.truth.exists():
            torch.save(result.cpu(), given.truth)
        truth = torch.load(given.truth).float()
        row["relerr"] = round(float((result.cpu().float() - truth).norm() / truth.norm()), 5)
    if given.profile and device == "cuda":
        row |= profiled(made, arguments)
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

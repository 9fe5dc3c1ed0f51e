"""Stage 1: the VAE, trained on whole clips at full size.

Six things that are not obvious and cost a training run each:
- `AutoencoderKLWan.decode` clamps to -1..1 and a clamped pixel has no gradient: `whole.decode` does not.
- Trained on 64 x 64 crops it is good on crops and useless on 128 x 128 frames: train at the full size.
- Trained on 9 frames the oldest tap of the first temporal up-sampler never meets a real frame (its cache is
  zeros until the fourth latent frame), stays at its random start, and spoils everything after frame 8: train
  on all 17 frames.
- `AutoencoderKLWan.encode` and `decode` work four frames at a time; `whole` does the same at 0.6 of the time a step.
- A reconstruction of 28 dB can have the wrong hue everywhere: `start.py` and `scenes.crowd` are the remedy.
- A shape is a few percent of a frame, and the mean error of a frame hardly sees it: `emphasis` weighs it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import whole, words
from . import parts, scenes, start
from .schedule import learning_rate

Step = Callable[[], dict[str, Tensor]]
Losses = Callable[[AutoencoderKLWan, Tensor], dict[str, Tensor]]
Sample = Callable[[int, torch.Generator], Tensor]


@dataclass(frozen=True)
class VaeOptions:
    """How the VAE is trained: half of each batch are scenes, the other half crowds."""

    batch: int = 8
    frames: int = scenes.FRAMES
    resolution: int = scenes.RESOLUTION
    peak: float = 6e-4


def build() -> AutoencoderKLWan:
    """An untrained Wan VAE of 2.6 M parameters: 8 x 8 x 4 compression into 16 channels, like the real one."""
    return AutoencoderKLWan(base_dim=16, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1)


def emphasis(clip: Tensor) -> Tensor:
    """How much each pixel of a clip [n, 3, f, h, w] counts, [n, 1, f, h, w] with mean 1 for each clip.

    A pixel within 4 of one that differs from the frame's corner, so a shape and its outline, counts 8 times another.
    """
    apart = (clip - clip[..., :1, :1]).abs().sum(1, keepdim=True) > 0.2
    weight = 1 + 7 * F.max_pool3d(apart.float(), (1, 9, 9), stride=1, padding=(0, 4, 4))
    return weight / weight.mean((2, 3, 4), keepdim=True)


def reconstruction(drawn: Tensor, clip: Tensor) -> dict[str, Tensor]:
    """How far a decoded clip is from the clip it is to be, [n, 3, f, h, w] in -1..1; `loss` is the sum of all."""
    error, weight = drawn - clip, emphasis(clip)
    l1, mse = (error.abs() * weight).mean(), (error.pow(2) * weight).mean()
    # Differences between neighbours in time, height and width: edges and motion, not only areas.
    edges = torch.stack(
        [(error.diff(dim=d).abs() * weight.narrow(d, 1, weight.shape[d] - 1)).mean() for d in (2, 3, 4)]
    ).sum()
    return {"loss": l1 + 0.5 * edges + 4 * mse, "l1": l1, "edges": edges}


def losses(vae: AutoencoderKLWan, clip: Tensor) -> dict[str, Tensor]:
    """The terms of the loss for a clip [n, 3, f, h, w] in -1..1; `loss` is what is descended."""
    mean, log_variance = whole.encode(vae, clip)
    drawn = whole.decode(vae, mean + torch.randn_like(mean) * (0.5 * log_variance).exp())
    terms = reconstruction(drawn, clip)
    kl = 0.5 * (mean.pow(2) + log_variance.exp() - 1 - log_variance).mean()
    return {**terms, "loss": terms["loss"] + 1e-4 * kl, "z": mean.std()}


def optimiser(vae: AutoencoderKLWan) -> torch.optim.AdamW:
    """AdamW whose learning rate is a tensor, so that a captured graph reads it anew at each replay."""
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    device = parameters[0].device
    cuda = device.type == "cuda"
    rate = torch.tensor(1e-5, device=device)  # until the first step of the schedule sets it
    return torch.optim.AdamW(
        parameters, rate, betas=(0.9, 0.99), weight_decay=0.0, capturable=cuda, foreach=cuda
    )


def make_step(vae: AutoencoderKLWan, opt: torch.optim.AdamW, clip: Tensor, losses: Losses) -> Step:
    """One optimiser step on what `clip` holds when it is called; a CUDA graph on a GPU."""
    trained = [parameter for group in opt.param_groups for parameter in group["params"]]

    def step() -> dict[str, Tensor]:
        with torch.autocast(clip.device.type, torch.bfloat16, enabled=clip.device.type == "cuda"):
            terms = losses(vae, clip)
        opt.zero_grad(set_to_none=False)
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        opt.step()
        return {name: value.detach() for name, value in terms.items()}

    if clip.device.type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        shown = step()

    def replay() -> dict[str, Tensor]:
        graph.replay()
        return shown

    return replay


def save(vae: AutoencoderKLWan, opt: torch.optim.AdamW, out: Path) -> None:
    """Writes `out`/vae (fp32) and the optimiser's moments (bf16: they are only a running average)."""
    vae.save_pretrained(out / "vae")
    moments: dict[str, Tensor] = {}
    for name, parameter in vae.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            moments[f"{name}.{key}"] = opt.state[parameter][key].to(torch.bfloat16).contiguous()
        moments[f"{name}.step"] = opt.state[parameter]["step"].float().reshape(1)
    save_file(moments, out / parts.OPTIMISER)


def resume(vae: AutoencoderKLWan, opt: torch.optim.AdamW, out: Path) -> None:
    """Puts the weights and moments that `save` wrote to `out` into `vae` and `opt`."""
    vae.load_state_dict(load_file(out / "vae" / "diffusion_pytorch_model.safetensors"))
    moments = load_file(out / parts.OPTIMISER)
    capturable = bool(opt.param_groups[0]["capturable"])
    for name, parameter in vae.named_parameters():
        step = moments[f"{name}.step"][0]
        state = {key: moments[f"{name}.{key}"].to(parameter) for key in ("exp_avg", "exp_avg_sq")}
        opt.state[parameter] = {"step": step.to(parameter.device) if capturable else step, **state}


@torch.no_grad()
def hue(vae: AutoencoderKLWan, count: int, seed: int = 10_002) -> tuple[float, float]:
    """The share of unseen clips whose shape is nearest to its own colour: as the VAE draws it, and as rendered.

    Nearest in direction, not in brightness. The rendered share is what can be reached: shading moves some colours.
    """
    device = next(vae.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    classes = scenes.sample(count, generator)
    named = torch.nn.functional.normalize(torch.tensor(list(words.COLORS.values()), device=device))
    right = torch.zeros(2)
    for part in classes.split(8):
        clip = scenes.render(part, generator)
        drawn = whole.decode(vae, whole.encode(vae, clip)[0]).clamp(-1, 1)
        inside = ((clip - clip[:, :, :, :1, :1]).abs().sum(1, keepdim=True) > 0.5).float()
        for i, picture in enumerate((drawn, clip)):
            color = ((picture + 1) / 2 * inside).sum((2, 3, 4)) / inside.sum((2, 3, 4))
            nearest = (torch.nn.functional.normalize(color) @ named.T).argmax(1)
            right[i] += (nearest == part[:, 0]).sum().item()
    return right[0].item() / count, right[1].item() / count


@torch.no_grad()
def evaluate(vae: AutoencoderKLWan, count: int, seed: int = 10_001) -> tuple[float, list[float]]:
    """PSNR in dB over `count` unseen clips (pixel range 1), and the same for each frame."""
    device = next(vae.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    squares = []
    for _ in range(0, count, 8):
        clip = scenes.render(scenes.sample(min(8, count), generator), generator)
        drawn = vae.decode(vae.encode(clip).latent_dist.mode()).sample
        squares.append(((drawn - clip) / 2).pow(2).mean((1, 3, 4)))
    frames = torch.cat(squares).mean(0)
    return -10 * math.log10(frames.mean().item()), (-10 * frames.log10()).tolist()


def draw(generator: torch.Generator, options: VaeOptions, sample: Sample = scenes.sample) -> Tensor:
    """One batch of clips: scenes of the classes that `sample` gives, and crowds."""
    size = (options.frames, options.resolution)
    clips = scenes.render(sample(options.batch - options.batch // 2, generator), generator, *size)
    return torch.cat([clips, scenes.crowd(options.batch // 2, generator, *size)])


def descend(name: str, seconds: float, opt: torch.optim.AdamW, step: Step, peak: float) -> None:
    """Takes steps for so many seconds at the schedule's rate, and prints what they give under `name`."""
    cuda = opt.param_groups[0]["params"][0].device.type == "cuda"
    begun, count = time.monotonic(), 0
    while (progress := (time.monotonic() - begun) / seconds) < 1:
        for group in opt.param_groups:
            group["lr"].fill_(learning_rate(progress, peak))
        terms = step()
        count += 1
        if count % 200 == 1:
            values = " ".join(f"{term} {value.item():.4f}" for term, value in terms.items())
            print(f"{name} step {count} {values} t {time.monotonic() - begun:.0f} s", flush=True)
        elif cuda and count % 4 == 0:
            torch.cuda.synchronize()  # the clock above must measure work done, not work queued
    print(f"{name}: {count} steps in {seconds:.0f} s", flush=True)


def train(
    seconds: float, out: Path, device: torch.device, resumed: bool, options: VaeOptions
) -> AutoencoderKLWan:
    """Trains for `seconds`, saves to `out`, and returns the VAE; `resumed` goes on from what `out` holds."""
    torch.manual_seed(1 if resumed else 0)
    generator = torch.Generator(device).manual_seed(1 if resumed else 0)
    vae = build()
    start.initialise(vae)
    vae.to(device)
    opt = optimiser(vae)
    if resumed:
        resume(vae, opt, out)
    clip = draw(generator, options)
    update = make_step(vae, opt, clip, losses)

    def step() -> dict[str, Tensor]:
        clip.copy_(draw(generator, options))
        return update()

    descend("vae", seconds, opt, step, options.peak)
    vae.eval()
    save(vae, opt, out)
    return vae

"""Stage 2: the text encoder and the transformer, together, on the latents of the trained VAE.

Flow matching as Wan is sampled: x_s = (1 - s) x_0 + s noise, the model is asked for noise - x_0 at time
1000 s, and s is shifted by 3 like the scheduler's. One prompt in ten is dropped, for guidance.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from .. import whole, words
from . import scenes
from .schedule import learning_rate

SHIFT = 3.0
TEXT_LENGTH = 512  # what WanPipeline pads the text encoder's output to
TOKENS = 48  # longer than any prompt, so that the text encoder is not trained on padding


@dataclass(frozen=True)
class TransformerOptions:
    """How many clips are encoded once as the data set, how many are drawn for a step, and the peak rate."""

    clips: int = 16384
    batch: int = 256
    peak: float = 1.2e-3  # 6e-4 is right for a resumed run
    compiled: bool = False


@dataclass(frozen=True)
class Prompts:
    """Token ids and masks of the data set's prompts, int64 [n, 48], and of the empty prompt, [1, 48]."""

    ids: Tensor
    mask: Tensor
    empty_ids: Tensor
    empty_mask: Tensor

    def drawn(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and mask of `rows`, each replaced by the empty prompt with probability 0.1."""
        dropped = (torch.rand(len(rows), device=rows.device) < 0.1)[:, None]
        ids = torch.where(dropped, self.empty_ids, self.ids[rows])
        return ids, torch.where(dropped, self.empty_mask, self.mask[rows])


def build_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """An untrained UMT5 encoder of 0.3 M parameters."""
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        dropout_rate=0.0,
    )
    return UMT5EncoderModel(config)


def build_transformer() -> WanTransformer3DModel:
    """An untrained Wan transformer of 7 M parameters; like the real one's, its block Linears are x128."""
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=128,
        in_channels=16,
        out_channels=16,
        text_dim=128,
        freq_dim=256,
        ffn_dim=1024,
        num_layers=6,
    )


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, classes: Tensor, generator: torch.Generator) -> Tensor:
    """Latents of one clip for each scene, normalised; the statistics go into the VAE's own config."""
    chunks = []
    for i in range(0, len(classes), 64):
        clip = scenes.render(classes[i : i + 64], generator)
        chunks.append(whole.encode(vae, clip)[0])
    latents = torch.cat(chunks)
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    shape = (1, -1, 1, 1, 1)
    return (latents - mean.view(shape)) / std.view(shape)


def tokenise(tokenizer: Any, classes: Tensor) -> Prompts:
    """The prompts of `classes` [n, 5] as token ids, on its device."""

    def encoded(texts: list[str]) -> tuple[Tensor, Tensor]:
        batch = tokenizer(texts, padding="max_length", max_length=TOKENS, return_tensors="pt")
        return batch.input_ids.to(classes.device), batch.attention_mask.to(classes.device)

    texts = [words.prompt(words.named(row)) for row in classes.tolist()]
    return Prompts(*encoded(texts), *encoded([""]))


def noised(clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A point on the path of each latent, its time s in 0..1, and the velocity to be predicted there."""
    uniform = torch.randn(len(clean), device=clean.device).sigmoid()
    s = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
    noise = torch.randn_like(clean, dtype=torch.float32)
    wide = s.view(-1, 1, 1, 1, 1)
    return (1 - wide) * clean + wide * noise, s, noise - clean


@dataclass(frozen=True)
class Pair:
    """The two models that are trained together."""

    text_encoder: UMT5EncoderModel
    transformer: WanTransformer3DModel

    def parameters(self) -> list[Tensor]:
        return [*self.transformer.parameters(), *self.text_encoder.parameters()]


def emphasis(clean: Tensor) -> Tensor:
    """How much each place of latents [n, 16, f, h, w] counts, [n, 1, f, h, w] with mean 1: near a shape 4 times.

    A shape covers a tenth of the places. Weighed alike, the background's noise is most of what is learnt.
    """
    background = clean.float().flatten(3).median(-1).values[..., None, None]
    apart = (clean - background).abs().mean(1, keepdim=True) > 0.6
    weight = 1 + 3 * F.max_pool3d(apart.float(), (1, 3, 3), stride=1, padding=(0, 1, 1))
    return weight / weight.mean()


def loss_of(pair: Pair, latents: Tensor, prompts: Prompts, batch: int) -> Tensor:
    """The mean square error of the velocity at one random point for each of `batch` random clips."""
    cuda = latents.device.type == "cuda"
    rows = torch.randint(len(latents), (batch,), device=latents.device)
    ids, mask = prompts.drawn(rows)
    point, s, velocity = noised(latents[rows])
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=cuda):
        text = pair.text_encoder(ids, attention_mask=mask).last_hidden_state * mask[..., None]
        answer = pair.transformer(
            hidden_states=point.bfloat16() if cuda else point,
            timestep=s * 1000,
            encoder_hidden_states=F.pad(text, (0, 0, 0, TEXT_LENGTH - text.shape[1])),
            return_dict=False,
        )[0]
    loss: Tensor = ((answer.float() - velocity).pow(2) * emphasis(latents[rows])).mean()
    return loss


def compile_blocks(pair: Pair, attempt: Callable[[], Tensor]) -> None:
    """Compiles the transformer's blocks; where one step then fails, says so and takes them back.

    Without it a step takes longer and the model is the same: a training run is not to be lost for that.
    """
    pair.transformer.compile_repeated_blocks(fullgraph=True)
    began = time.monotonic()
    try:
        attempt().backward()
        print(f"transformer: compiled in {time.monotonic() - began:.0f} s", flush=True)
    except Exception as error:  # torch.compile fails in many ways, and each is the same to us
        print(f"transformer: NOT compiled, slower from here: {type(error).__name__}: {error}", flush=True)
        for module in pair.transformer.modules():
            module._compiled_call_impl = None
    for parameter in pair.parameters():
        parameter.grad = None


def fit(pair: Pair, latents: Tensor, prompts: Prompts, seconds: float, options: TransformerOptions) -> int:
    """Trains both for `seconds`, leaves their averaged weights in them, and returns the steps made.

    Compiling, some 45 s on an H200, comes on top of `seconds`.
    """
    parameters = pair.parameters()
    if options.compiled:
        compile_blocks(pair, lambda: loss_of(pair, latents, prompts, options.batch))
    cuda = latents.device.type == "cuda"
    opt = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.01, betas=(0.9, 0.99), fused=cuda)
    average = [p.detach().clone() for p in parameters]
    start, step = time.monotonic(), 0
    while (progress := (time.monotonic() - start) / seconds) < 1:
        for group in opt.param_groups:
            group["lr"] = learning_rate(progress, options.peak)
        loss = loss_of(pair, latents, prompts, options.batch)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        opt.step()
        step += 1
        with torch.no_grad():
            now = [p.detach() for p in parameters]
            torch._foreach_lerp_(average, now, 1 - min(0.999, step / (step + 50)))
        if step % 250 == 1:
            shown = f"loss {loss.item():.4f} t {time.monotonic() - start:.0f} s"
            print(f"transformer step {step} {shown}", flush=True)
    with torch.no_grad():
        for parameter, value in zip(parameters, average, strict=True):
            parameter.copy_(value)
    return step


def assemble(
    tokenizer: Any, text_encoder: UMT5EncoderModel, vae: AutoencoderKLWan, transformer: WanTransformer3DModel
) -> WanPipeline:
    """The pipeline, with the scheduler that Wan2.1 ships for small pictures."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=scheduler,
        transformer=transformer,
    )


@dataclass(frozen=True)
class Folders:
    """Where stage 2 reads and writes; `resumed` is a saved pipeline to go on from, if any."""

    vae: Path
    tokenizer: Path
    out: Path
    resumed: Path | None


def models(folders: Folders, vocabulary: int) -> Pair:
    """The text encoder and the transformer to train: new ones, or those of `folders.resumed`."""
    text_encoder, transformer = build_text_encoder(vocabulary), build_transformer()
    if folders.resumed is not None:
        saved = UMT5EncoderModel.from_pretrained(folders.resumed / "text_encoder", dtype=torch.float32)
        text_encoder.load_state_dict(saved.state_dict())
        weights = load_file(folders.resumed / "transformer" / "diffusion_pytorch_model.safetensors")
        transformer.load_state_dict(weights)
    return Pair(text_encoder, transformer)


def train(folders: Folders, seconds: float, device: torch.device, options: TransformerOptions) -> None:
    """Trains for `seconds` and saves the whole pipeline to `folders.out`, every weight in bf16."""
    torch.manual_seed(0)
    generator = torch.Generator(device).manual_seed(2)
    vae = AutoencoderKLWan.from_pretrained(folders.vae, torch_dtype=torch.float32)
    vae.to(device).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folders.tokenizer)
    classes = scenes.study(options.clips, generator)
    with torch.backends.cudnn.flags(benchmark=False):
        latents = encode_clips(vae, classes, generator)
    latents = latents.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    print(f"latents {tuple(latents.shape)}", flush=True)
    pair = models(folders, len(tokenizer))
    pair.text_encoder.to(device).train()
    pair.transformer.to(device).train()
    steps = fit(pair, latents, tokenise(tokenizer, classes), seconds, options)
    print(f"transformer: {steps} steps in {seconds:.0f} s", flush=True)
    pipeline = assemble(tokenizer, pair.text_encoder.eval(), vae, pair.transformer.eval())
    pipeline.to(dtype=torch.bfloat16)
    pipeline.save_pretrained(folders.out, safe_serialization=True)

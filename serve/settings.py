"""Everything an operator decides, in one frozen record. Below the command line nothing reads the environment."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOOPBACK_NAMES = ("localhost",)
FILES = (".safetensors", ".gguf")
# Names that say nothing of the model: the folder's does.
IN_ALIKE = re.compile(r"(diffusion_pytorch_model.*|.+-\d{5}-of-\d{5}|block_\d+|non_block)\.safetensors")
EXPERT_FOLDERS = ("transformer", "transformer_2", "high_noise_model", "low_noise_model")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is served, where, and with which kernels. None is each option's own default."""

    name: str | None = None  # that clients give as `model`; None takes the checkpoint's
    checkpoint: Path | None = None
    checkpoint_low: Path | None = None
    base: str | None = None
    text_encoder: Path | None = None
    vae: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    allow_remote: bool = False
    api_keys: Path | None = None
    allow_origin: tuple[str, ...] = ()
    allow_image_host: tuple[str, ...] = ()  # from which start images may be fetched
    lora_dir: Path | None = None  # whose files clients may name
    upload_seconds: float = 60.0  # for the head of a request, and again for its whole body
    download_seconds: float = 60.0  # in which a client takes 64 KiB of an answer, or what is left of it
    data_dir: Path = field(default_factory=lambda: Path.home() / ".local" / "share" / "wan-serve")
    device: str | None = None
    dialect: str | None = None
    weights: str = "auto"
    compute: str = "auto"
    backend: str = "auto"
    attention: str = "auto"
    attention_end_blocks: int | None = None
    attention_end_steps: int | None = None
    cancel_seconds: float = 120.0  # a worker that has not obeyed a cancel by then is killed
    stall_seconds: float = 600.0  # a worker that has done nothing on a job for so long is killed
    drain_seconds: float = 30.0  # that the running job is given to end when the server is told to stop
    max_queue_seconds: float = 4 * 3600.0  # of predicted work that may be waiting
    max_job_seconds: float = 2 * 3600.0  # that one clip may be predicted to take
    check_memory: bool = True  # refuse clips that are predicted to need more memory than there is
    max_clip_gib: float | None = None  # that one clip may be predicted to take beside the weights
    keep_days: float = 30.0  # after which a finished job is removed; 0 keeps it
    keep_gib: float = 100.0  # of clips, the oldest of which are removed beyond that; 0 keeps them
    sweep_seconds: float = 60.0  # between two looks for what is to be removed
    embed_metadata: bool = True  # into the clips: what decided them
    log_level: str = "info"
    log_format: str = "text"
    metrics: bool = False  # kept for Prometheus, at /metrics
    otlp_endpoint: str | None = None  # of the collector to which spans of jobs are sent
    more: tuple[Settings, ...] = ()  # the models beside this one, each as if it were served alone

    @property
    def model_name(self) -> str:
        """The name that clients give as `model`: the checkpoint's file name, or its folder's where all are alike."""
        if self.name is not None:
            return self.name
        if self.checkpoint is None:
            return "wan-tiny"
        whole = self.checkpoint.absolute()
        in_parts = whole.name.endswith(".index.json") or IN_ALIKE.fullmatch(whole.name)
        if whole.suffix in FILES and not in_parts:
            return whole.stem
        folder = whole.parent if whole.suffix in (*FILES, ".json") else whole
        return folder.parent.name if folder.name in EXPERT_FOLDERS else folder.name

    @property
    def models(self) -> dict[str, Settings]:
        """All models by name, the first being the one that is meant where a client names none."""
        return {one.model_name: one for one in (self, *self.more)}

    @property
    def is_bundled(self) -> bool:
        """Whether this serves the tiny model that comes with the package."""
        return self.checkpoint is None

    def pipeline_options(self) -> dict[str, Any]:
        """The arguments of `wan_runtime.load_pipeline`; those at their default are left to it."""
        options: dict[str, Any] = {
            "checkpoint": self.checkpoint,
            "checkpoint_low": self.checkpoint_low,
            "base": self.base,
            "text_encoder": self.text_encoder,
            "vae": self.vae,
            "device": self.device,
            "dialect": self.dialect,
            "attention_end_blocks": self.attention_end_blocks,
            "attention_end_steps": self.attention_end_steps,
        }
        names = ("weights", "compute", "backend", "attention")
        choices = {name: getattr(self, name) for name in names}
        options |= {name: value for name, value in choices.items() if value != "auto"}
        return {name: value for name, value in options.items() if value is not None}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    if host in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

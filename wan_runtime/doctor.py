"""What this machine can do: its GPU and libraries, and every multiplier tried by multiplying.

A version table would say what ought to work; here each backend, format and precision runs one product on the device,
and the result is held against the same product in fp64 on the CPU.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Group
from rich.table import Table

from wan_runtime.backends import BACKENDS, Backend
from wan_runtime.formats import FORMATS
from wan_runtime.report import as_text
from wan_runtime.version import VERSION

LIBRARIES = (
    "triton", "transformer-engine", "fa3-fwd", "diffusers", "transformers", "accelerate", "safetensors", "peft", "av",
)  # fmt: skip
DRIVER = Path("/proc/driver/nvidia/version")
TOKENS, OUT, IN = 64, 256, 256


@dataclass(frozen=True)
class Probe:
    """One backend multiplying one format in one precision on one device.

    error    relative L2 distance from the exact product of the same weight, or None where it refused.
    refusal  why it cannot, or None.
    """

    device: str
    backend: str
    format: str
    compute: str
    error: float | None
    refusal: str | None


@dataclass(frozen=True)
class Examination:
    """The machine as found."""

    facts: dict[str, str]
    probes: tuple[Probe, ...]

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def table(self) -> Group:
        facts = Table(title="This machine", title_justify="left", show_header=False)
        for name, value in self.facts.items():
            facts.add_row(name, value)
        probes = Table(
            title="Multipliers, each tried with one product",
            title_justify="left",
            caption="error: relative L2 distance from the exact product, activation rounding included",
            caption_justify="left",
        )
        for heading in ("device", "backend", "weights", "computes in", "error", "refusal"):
            probes.add_column(heading)
        for p in self.probes:
            error = "-" if p.error is None else f"{p.error:.4f}"
            probes.add_row(p.device, p.backend, p.format, p.compute, error, p.refusal or "")
        return Group(facts, probes)

    def __str__(self) -> str:
        return as_text(self.table())


def examine() -> Examination:
    """Look at the machine and try every multiplier on the CPU and on the first GPU."""
    devices = [torch.device("cuda", 0)] if torch.cuda.is_available() else []
    probes = [probe for device in [*devices, torch.device("cpu")] for probe in _probes(device)]
    return Examination(dict(_facts()), tuple(probes))


def _facts() -> Iterator[tuple[str, str]]:
    yield "wan-runtime", VERSION
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"
    yield "NVIDIA driver", DRIVER.read_text().splitlines()[0] if DRIVER.is_file() else "none"
    if not torch.cuda.is_available():
        yield "GPU", "none that torch can use: everything is dequantised and multiplied on the CPU"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        yield f"GPU {index}", f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory}"
    for name in LIBRARIES:
        yield name, _installed(name)


def _installed(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _probes(device: torch.device) -> Iterator[Probe]:
    for backend in (BACKENDS[name] for name in BACKENDS):
        for weight_format in FORMATS:
            for compute in backend.computes(weight_format):
                yield _probe(backend, weight_format, compute, device)


def _probe(backend: Backend, weight_format: str, compute: str, device: torch.device) -> Probe:
    refusal, error = backend.refuses(weight_format, compute, device, (OUT, IN)), None
    if refusal is None:
        try:
            error = _error(backend, weight_format, compute, device)
        except Exception as failure:  # a doctor reports whatever goes wrong, it does not die of it
            refusal = f"failed: {type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:200]}"
    return Probe(str(device), backend.name, weight_format, compute, error, refusal)


def _error(backend: Backend, weight_format: str, compute: str, device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(TOKENS, IN, generator=generator).to(torch.bfloat16)
    slots = FORMATS[weight_format].quantize(torch.randn(OUT, IN, generator=generator), True)
    exact = rows.double() @ FORMATS[weight_format].dequantize(slots).double().t()
    on_device = {name: slot.to(device) for name, slot in slots.items()}
    product = backend.kernel(weight_format, compute)(rows.to(device), on_device, None).cpu().double()
    return float((product - exact).norm() / exact.norm())

"""What this machine can do: its GPU and libraries, and every multiplier and attention tried by running it.

A version table would say what ought to work; here each backend, format and precision runs one product on the device,
and the result is held against the same product in fp64 on the CPU. Each attention runs once, too.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Group
from rich.table import Table

from wan_runtime import attention, gpus, kernels
from wan_runtime.backends import BACKENDS, Backend
from wan_runtime.curing import Torch, advice, fix_for
from wan_runtime.errors import BackendUnavailable
from wan_runtime.formats import FORMATS
from wan_runtime.plan import Options, choose
from wan_runtime.result import Result
from wan_runtime.version import VERSION

LIBRARIES = (
    "triton", "transformer-engine", "fa3-fwd", "diffusers", "transformers", "accelerate", "safetensors", "peft", "av",
)  # fmt: skip
DRIVER = Path("/proc/driver/nvidia/version")
TOKENS, OUT, IN, HEAD = 64, 256, 256, 128


@dataclass(frozen=True)
class Probe:
    """One backend multiplying one format in one precision on one device.

    error    relative L2 distance from the exact product of the same weight, or None where it refused.
    refusal  why it cannot, or None.
    fix      what to do about the refusal, or None.
    """

    device: str
    backend: str
    format: str
    compute: str
    error: float | None
    refusal: str | None
    fix: str | None


@dataclass(frozen=True)
class Part:
    """An attention, or the fused kernels, on one device: None where it ran, else why not and what to do about it."""

    device: str
    name: str
    refusal: str | None
    fix: str | None


@dataclass(frozen=True)
class Examination(Result):
    """The machine as found.

    chosen  device -> weight format -> what "auto" multiplies it with.
    advice  what to change on this machine, as sentences.
    """

    facts: dict[str, str]
    advice: tuple[str, ...]
    chosen: dict[str, dict[str, str]]
    attentions: tuple[Part, ...]
    probes: tuple[Probe, ...]

    def table(self) -> Group:
        facts = Table(title="This machine", title_justify="left", show_header=False)
        for name, value in self.facts.items():
            facts.add_row(name, value)
        for sentence in self.advice:
            facts.add_row("to do", sentence)
        chosen = Table(title="What auto multiplies each weight format with", title_justify="left")
        chosen.add_column("weights")
        for device in self.chosen:
            chosen.add_column(device)
        for name in next(iter(self.chosen.values()), {}):
            chosen.add_row(name, *(by_format[name] for by_format in self.chosen.values()))
        return Group(facts, chosen, _parts_table(self.attentions), _probes_table(self.probes))


def _parts_table(parts: tuple[Part, ...]) -> Table:
    table = Table(title="Attention and fused kernels, each tried by one call", title_justify="left")
    for heading in ("device", "what", "outcome", "fix"):
        table.add_column(heading)
    for part in parts:
        table.add_row(part.device, part.name, part.refusal or "runs", part.fix or "")
    return table


def _probes_table(probes: tuple[Probe, ...]) -> Table:
    """One row a refusal, with all the formats that it is for: most have the same."""
    table = Table(
        title="Multipliers, each tried with one product",
        title_justify="left",
        caption="error: relative L2 distance from the exact product, activation rounding included",
        caption_justify="left",
    )
    for heading in ("device", "backend", "weights", "computes in", "error", "refusal", "fix"):
        table.add_column(heading)
    refused: dict[tuple[str, ...], list[str]] = {}
    for p in probes:
        if p.error is not None:
            table.add_row(p.device, p.backend, p.format, p.compute, f"{p.error:.4f}", "", "")
        else:
            key = (p.device, p.backend, p.compute, p.refusal or "", p.fix or "")
            refused.setdefault(key, []).append(p.format)
    for (device, backend, compute, refusal, fix), formats in refused.items():
        table.add_row(device, backend, ", ".join(formats), compute, "-", refusal, fix)
    return table


def examine() -> Examination:
    """Look at the machine and try every multiplier and attention on the CPU and on the first GPU."""
    devices = [torch.device("cuda", 0)] if torch.cuda.is_available() else []
    devices.append(torch.device("cpu"))
    driver = gpus.driver()
    return Examination(
        facts=dict(_facts(driver)),
        advice=advice(driver, _torch()),
        chosen={str(device): {name: _chosen(name, device) for name in FORMATS} for device in devices},
        attentions=tuple(part for device in devices for part in _parts(device)),
        probes=tuple(probe for device in devices for probe in _probes(device)),
    )


def _torch() -> Torch:
    architectures = tuple(torch.cuda.get_arch_list()) if torch.cuda.is_available() else ()
    return Torch(torch.__version__, torch.version.cuda, torch.cuda.device_count(), architectures)


def _chosen(weight_format: str, device: torch.device) -> str:
    try:
        backend, compute, _ = choose(weight_format, device, (OUT, IN), Options())
    except BackendUnavailable as refused:
        return f"nothing: {refused}"
    how = "dequantised, then multiplied in bf16" if compute == "bf16" else f"multiplied in {compute}"
    return f"{how} ({backend})"


def _parts(device: torch.device) -> Iterator[Part]:
    for name in attention.ATTENTIONS:
        refusal = attention.refused(name, device, torch.bfloat16, HEAD)
        yield Part(str(device), f"attention {name}", refusal, refusal and fix_for(refusal))
    refusal = kernels.refused(device) or _kernels_fail(device)
    yield Part(str(device), "fused kernels", refusal, refusal and fix_for(refusal))


def _kernels_fail(device: torch.device) -> str | None:
    """What goes wrong when a fused kernel is compiled and run, or None."""
    from wan_runtime.kernels.quantize_rows import quantize_rows

    try:
        quantize_rows(torch.ones(TOKENS, IN, dtype=torch.bfloat16, device=device))[0].cpu()
    except (
        Exception
    ) as failure:  # Triton needs a compiler, headers and a fitting driver, and says which is missing
        return _said(failure)
    return None


def _said(failure: Exception) -> str:
    return f"failed: {type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:200]}"


def _facts(driver: gpus.Driver | None) -> Iterator[tuple[str, str]]:
    yield "wan-runtime", VERSION
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"
    runs = f", runs CUDA up to {'.'.join(map(str, driver.cuda))}" if driver else ""
    yield "NVIDIA driver", (DRIVER.read_text().splitlines()[0] if DRIVER.is_file() else "none") + runs
    yield "cuDNN", str(torch.backends.cudnn.version() or "not built in")
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
            refusal = _said(failure)
    fix = fix_for(refusal) if refusal is not None else None
    return Probe(str(device), backend.name, weight_format, compute, error, refusal, fix)


def _error(backend: Backend, weight_format: str, compute: str, device: torch.device) -> float:
    generator = torch.Generator("cpu").manual_seed(0)
    rows = torch.randn(TOKENS, IN, generator=generator, device="cpu").to(torch.bfloat16)
    weight = torch.randn(OUT, IN, generator=generator, device="cpu")
    slots = FORMATS[weight_format].quantize(weight, backend.per_channel)
    exact = rows.double() @ FORMATS[weight_format].dequantize(slots).double().t()
    on_device = {name: slot.to(device) for name, slot in slots.items()}
    product = backend.kernel(weight_format, compute)(rows.to(device), on_device, None).cpu().double()
    return float((product - exact).norm() / exact.norm())

"""What to do about what `doctor` finds: a fix for each refusal, and for a GPU that torch does not see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from wan_runtime.gpus import Driver

BUILDS = "https://pytorch.org/get-started/locally"
NOTHING = "nothing to fix: "

# Words of a refusal -> what to do; the first that fits. What the refusal is about is in the same row of the table.
FIXES = (
    ("need a CUDA GPU", NOTHING + "without a GPU that torch can use, weights are dequantised and multiplied in bf16"),
    ("needs a GPU", NOTHING + "without a GPU, torch's own attention (sdpa) is used"),
    ("need a GPU", NOTHING + "without a GPU, the host's own block forward is used"),
    ("needs a Hopper GPU", NOTHING + "it is made for Hopper (H100, H200); auto takes cudnn or sdpa"),
    ("before Hopper", NOTHING + "--attention sdpa is as fast on this GPU"),
    ("pip install fa3-fwd", "pip install fa3-fwd"),
    ("Transformer Engine is not installed", "pip install --no-build-isolation 'wan-runtime[te]'"),
    ("Device compute capability", NOTHING + "Transformer Engine has no such products for this GPU; auto asks torch"),
    ("Transformer Engine failed", "install a Transformer Engine built for this torch and CUDA; auto asks torch"),
    ("Triton is not installed", "pip install triton (on Windows: pip install triton-windows)"),
    ("No module named 'triton'", "pip install triton (on Windows: pip install triton-windows)"),
    ("only supported on CUDA devices with compute", NOTHING + "this GPU has no FP8 products; bf16 is used (auto)"),
    ("fp8e4nv not supported", NOTHING + "this GPU has no FP8 products; bf16 is used (auto)"),
    ("CUBLAS_STATUS_NOT_SUPPORTED", NOTHING + "this GPU has no such products; the next in the list is used (auto)"),
    ("CUBLAS_STATUS_INVALID_VALUE", NOTHING + "this GPU has no such products; the next in the list is used (auto)"),
    ("never been tried on", "--backend reference"),
    ("no kernel image is available", f"install a torch that is built for this GPU ({BUILDS})"),
    ("out of memory", "free the GPU's memory and run wan-runtime doctor again"),
    ("multiples of", NOTHING + "such a layer is dequantised and multiplied in bf16"),
)  # fmt: skip
UNKNOWN = (
    "leave it to auto, which passes it over, and report it with the output of `wan-runtime doctor --json`"
)


def fix_for(refusal: str) -> str:
    """What to do about one refusal."""
    return next((fix for words, fix in FIXES if words in refusal), UNKNOWN)


@dataclass(frozen=True)
class Torch:
    """What torch says of itself: its version, the CUDA it was built for, what it sees, and what it has kernels for."""

    version: str
    cuda: str | None
    sees: int
    architectures: tuple[str, ...] = ()


def advice(driver: Driver | None, torch: Torch) -> tuple[str, ...]:
    """What a user should change on this machine, as sentences; empty where nothing stands in the way."""
    return tuple(_advice(driver, torch))


def _advice(driver: Driver | None, torch: Torch) -> Iterator[str]:
    if driver is None or not driver.gpus:
        if not torch.sees:
            yield (
                "No NVIDIA GPU was found. Where there is one: install its driver, and start a container with --gpus "
                "all. Where there is none, everything runs on the CPU, correct and slow."
            )
        return
    names = ", ".join(dict.fromkeys(gpu.name for gpu in driver.gpus))
    runs = ".".join(map(str, driver.cuda))
    if torch.cuda is None:
        yield (
            f"The driver has {names}, and torch {torch.version} was built without CUDA: install a CUDA build of torch, "
            f"for CUDA {runs} or older ({BUILDS})."
        )
    elif not torch.sees and int(torch.cuda.partition(".")[0]) > driver.cuda[0]:
        yield (
            f"torch {torch.version} was built for CUDA {torch.cuda}, and the driver of {names} runs CUDA {runs} at "
            f"most: update the driver, or install a torch built for CUDA {driver.cuda[0]} ({BUILDS})."
        )
    elif not torch.sees:
        yield f"The driver has {names} and torch does not see it: is CUDA_VISIBLE_DEVICES empty?"
    for gpu in driver.gpus if torch.sees else ():
        major, minor = gpu.capability
        if torch.architectures and not any(_runs(name, major, minor) for name in torch.architectures):
            yield (
                f"torch {torch.version} has no kernels for {gpu.name} (sm_{major}{minor}), only for "
                f"{', '.join(torch.architectures)}: install a build for CUDA {runs} ({BUILDS})."
            )


def _runs(architecture: str, major: int, minor: int) -> bool:
    """Whether code for `architecture` ("sm_90", "sm_120a", "compute_90") runs on a GPU; sm_ only within its major."""
    kind, _, number = architecture.partition("_")
    digits = "".join(character for character in number if character.isdigit())
    if len(digits) < 2:
        return False
    built = int(digits[:-1]), int(digits[-1])
    return built <= (major, minor) and (kind == "compute" or built[0] == major)

"""What will run on this machine's GPU, format by format, told from the kind of GPU: `inspect` has no time to try it.

`wan-runtime doctor` tries it.
"""

from __future__ import annotations

from collections.abc import Iterable

from wan_runtime.gpus import BLACKWELL, FP8_SINCE, Driver, Gpu

# What wan_runtime.backends.torch_native multiplies in FP8, and in blocks as it lies.
FP8_PRODUCTS, BLOCK_PRODUCTS = ("fp8", "fp8_e5m2", "nvfp4"), ("nvfp4", "mxfp8")
AS_IT_IS = (
    "multiplied as it lies on the block-scaled tensor cores, the fastest class, where torch has that product"
)
FAST = "multiplied on the FP8 tensor cores, the fastest class"
EXPANDED = "held in 4 bits, expanded to FP8 a layer at a time and multiplied on the FP8 tensor cores, the fastest class"
SLOW = "dequantised a layer at a time and multiplied in bf16: saves memory, no faster than bf16"
PLAIN = "multiplied in bf16, as it is; --weights fp8 quantises it as it is loaded"


def machine(driver: Driver | None) -> str:
    """The GPU that would be used, in words."""
    if driver is None or not driver.gpus:
        return "no NVIDIA GPU here: on the CPU, minutes a step for a 14B model"
    gpu = driver.gpus[0]
    major, minor = gpu.capability
    return f"{gpu.name} (sm_{major}{minor}, {gpu.memory / 2**30:.1f} GiB)"


def classes(formats: Iterable[str], driver: Driver | None) -> dict[str, str]:
    """Format -> how its weights are multiplied here and how fast that is; "unquantised" where no layer is quantised."""
    gpu = driver.gpus[0] if driver is not None and driver.gpus else None
    return {name: _class(name, gpu) for name in formats} or {"unquantised": PLAIN}


def _class(name: str, gpu: Gpu | None) -> str:
    if gpu is not None and gpu.capability >= BLACKWELL and name in BLOCK_PRODUCTS:
        return AS_IT_IS
    if gpu is None or gpu.capability < FP8_SINCE or name not in FP8_PRODUCTS:
        return SLOW
    return EXPANDED if name == "nvfp4" else FAST

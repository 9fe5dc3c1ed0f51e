"""The GPUs of this machine as its NVIDIA driver tells them: without torch, whose import takes longer than the answer.

A torch without CUDA, or one built for a newer CUDA than the driver knows, sees no GPU; the driver does.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
# Compute capabilities: FP8 tensor cores, FlashAttention 3, and block-scaled FP4 and FP8 tensor cores.
FP8_SINCE, HOPPER, BLACKWELL = (8, 9), (9, 0), (10, 0)


@dataclass(frozen=True)
class Gpu:
    """One GPU: its name, its compute capability and the bytes of its memory."""

    name: str
    capability: tuple[int, int]
    memory: int


@dataclass(frozen=True)
class Driver:
    """The driver's answer: the newest CUDA it can run, and the GPUs that this process may use, in CUDA's order."""

    cuda: tuple[int, int]
    gpus: tuple[Gpu, ...]


def driver() -> Driver | None:
    """What the NVIDIA driver says; None where there is no driver, or it does not start."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version, count = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDriverGetVersion(ctypes.byref(version)):
        return None
    if cuda.cuDeviceGetCount(ctypes.byref(count)):
        return None
    found = tuple(_gpu(cuda, index) for index in range(count.value))
    return Driver((version.value // 1000, version.value % 1000 // 10), found)


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(128)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    numbers = []
    for attribute in (MAJOR, MINOR):
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        numbers.append(value.value)
    memory = ctypes.c_size_t()
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    return Gpu(name.value.decode(errors="replace"), (numbers[0], numbers[1]), memory.value)

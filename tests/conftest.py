"""What every test file shares: hardware markers that skip with their reason, and where the repository is."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

# Triton reads this as it is imported: without a GPU its interpreter runs the kernels, line by line on the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Two test processes share the machine's cores; more threads than cores make small tensors many times slower.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout's root folder."""
    return ROOT


@pytest.fixture
def exact_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter with torch's cast from fp32 to e4m3, which rounds as a GPU does.

    Its own (3.9) halves what rounds up to a power of two, rounds ties away from zero and cuts subnormals.
    """
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    inexact = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source.name, target.name) != ("fp32", "fp8e4nv"):
            return inexact(values, source, target, rounding)
        return torch.tensor(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker, missing in MISSING.items():
            if missing and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=missing))


def _missing_hardware() -> dict[str, str | None]:
    """Why the tests of each hardware marker cannot run here; None where they can."""
    if not torch.cuda.is_available():
        return dict.fromkeys(("gpu", "te", "sm100"), "no CUDA device")
    te = importlib.util.find_spec("transformer_engine")
    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": None,
        "te": None if te else "transformer_engine is not installed",
        "sm100": None if major >= 10 else f"compute capability {major}.{minor} has no FP4 tensor cores",
    }


MISSING = _missing_hardware()

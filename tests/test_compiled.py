"""Every fused kernel compiles for the GPUs it is for, at WAN's sizes, within their shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (pip install 'wan-runtime[dev]')")

SHARED = {89: 99, 90: 227, 100: 227, 120: 99}  # KiB a program may have, from the CUDA programming guide
CASES = [
    (90, "14B"),
    *(
        pytest.param(arch, size, marks=pytest.mark.long)
        for arch in SHARED
        for size in ("1.3B", "5B", "14B")
        if (arch, size) != (90, "14B")
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "size"), CASES)
def test_kernels_compile_and_fit(arch: int, size: str, root: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiled", str(arch), size],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in rows} >= {
        "_norm_modulate",
        "_residual_norm",
        "_gelu_quantize",
        "_expand_row",
        "_quantize_nvfp4",
        "_quantize_mxfp8",
    }
    too_large = [row for row in rows if row["shared"] > SHARED[arch] * 1024]
    assert not too_large

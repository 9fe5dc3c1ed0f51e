"""The GPU's clock and power while something ran, and what held the clock, as its driver counts them.

A forward of 14B keeps the card at its power limit, where the clock is what the power leaves: without these figures a
faster or slower kernel cannot be told from a higher or lower clock.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import threading
import time
from types import TracebackType
from typing import Any

import torch

EVERY_MS = 100
QUERY = "--query-gpu=clocks.sm,power.draw.instant,power.limit,clocks_event_reasons.active"
HELD_BY = {  # bits of clocks_event_reasons.active: nvml.h, NVML_CLOCKS_EVENT_REASONS
    0x2: "clock setting",
    0x4: "power limit",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal limit",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


class Board:
    """Reads torch's first GPU's clock (MHz) and power (W) every 100 ms while it is entered; nothing where there is none
    or no nvidia-smi."""

    def __init__(self, gpu: bool) -> None:
        self._reads = gpu and shutil.which("nvidia-smi") is not None
        self._read: list[tuple[float, list[float], int]] = []

    def __enter__(self) -> Board:
        self._process: subprocess.Popen[str] | None = None
        if self._reads:
            name = f"GPU-{torch.cuda.get_device_properties(0).uuid}"  # the driver's numbers may be others
            command = ["nvidia-smi", f"--id={name}", QUERY, "--format=csv,noheader,nounits"]
            self._process = subprocess.Popen(
                [*command, f"--loop-ms={EVERY_MS}"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            self._reader = threading.Thread(target=self._follow, args=(self._process,), daemon=True)
            self._reader.start()
        return self

    def _follow(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                *figures, reasons = line.split(",")
                self._read.append((time.perf_counter(), [float(cell) for cell in figures], int(reasons, 16)))
            except ValueError:  # "[N/A]", or a sentence of the driver's
                continue

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._reader.join()

    def between(self, began: float, ended: float) -> dict[str, Any]:
        """Medians of what was read between two times of `time.perf_counter`, and what held the clock at which share of
        the readings; empty where nothing was read."""
        read = [(figures, reasons) for at, figures, reasons in self._read if began <= at <= ended]
        if not read:
            return {}
        clock, power, limit = (
            statistics.median(cells) for cells in zip(*(row for row, _ in read), strict=True)
        )
        shares = {
            name: sum(bool(reasons & bit) for _, reasons in read) / len(read) for bit, name in HELD_BY.items()
        }
        return {
            "sm_mhz": round(clock),
            "watts": round(power),
            "limit_watts": round(limit),
            "held_by": {name: round(share, 2) for name, share in shares.items() if share},
        }

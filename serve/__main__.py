"""`python -m wan_runtime.serve`, or `python -m serve` in a checkout."""

from __future__ import annotations

from wan_runtime.serve.cli import app

if __name__ == "__main__":
    app(prog_name="wan-serve")

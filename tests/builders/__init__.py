"""Tiny Wan checkpoints in every dialect, written from docs/formats.md alone: nothing here imports wan_runtime."""

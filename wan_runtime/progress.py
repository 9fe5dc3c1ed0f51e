"""A progress bar over a checkpoint's stream, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from wan_runtime.checkpoint import Checkpoint, Loaded


def watched(items: Iterator[Loaded], checkpoint: Checkpoint, doing: str = "loading") -> Iterator[Loaded]:
    """The same items, with a bar on stderr that counts the bytes read where stderr is a terminal."""
    entries = checkpoint.header.entries
    sizes = {path: entries[key].nbytes for path, key in checkpoint.plain.items()}
    for path, layer in checkpoint.layers.items():
        sizes[path] = sum(entries[key].nbytes for key in {source.key for source in layer.sources})
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True
    ) as bar:
        task = bar.add_task(f"{doing} {checkpoint.path.name}", total=sum(sizes.values()))
        for item in items:
            bar.advance(task, sizes[item.path])
            yield item

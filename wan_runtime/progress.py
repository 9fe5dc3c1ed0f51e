"""A progress bar over what is made of a checkpoint's layers, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from wan_runtime.checkpoint import Checkpoint


class Item(Protocol):
    """Something of one layer or plain tensor, by its path."""

    @property
    def path(self) -> str: ...


Made = TypeVar("Made", bound=Item)


def sizes_of(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes in the file of every layer and plain tensor, by path."""
    entries = checkpoint.header.entries
    sizes = {path: entries[key].nbytes for path, key in checkpoint.plain.items()}
    for path, layer in checkpoint.layers.items():
        sizes[path] = sum(entries[key].nbytes for key in {source.key for source in layer.sources})
    return sizes


def watched(items: Iterator[Made], checkpoint: Checkpoint, doing: str = "loading") -> Iterator[Made]:
    """The same items, with a bar on stderr that counts the bytes read where stderr is a terminal."""
    sizes = sizes_of(checkpoint)
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

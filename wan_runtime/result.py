"""What a command finds: a value with a form for people and one for programs."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from rich.console import RenderableType


class Result(ABC):
    """A dataclass that can be shown: `str` is its table as plain text, `to_dict` its fields."""

    @abstractmethod
    def table(self) -> RenderableType: ...

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(cast(Any, self))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """120 columns wide."""
        from rich.console import Console

        console = Console(width=120, force_terminal=False, color_system=None, markup=False, emoji=False)
        with console.capture() as capture:
            console.print(self.table(), crop=False)
        return capture.get()

"""Importing a library when it is first used, for a command that as a rule does not use it.

`inspect` reads headers. Its pages import torch for what they do with weights, and importing torch takes several times
as long as all that `inspect` does.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any


class _Later(ModuleType):
    """Stands for a module until something is asked of it; `__spec__` is all that an import statement asks."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def import_later(name: str) -> None:
    """From here on `import name` costs nothing until an attribute of it is used. Call it before anything imports it.

    For a process that ends with one command: modules that were imported in between keep the stand-in.
    """
    if name not in sys.modules:
        stand_in = _Later(name)
        stand_in.__spec__ = importlib.util.find_spec(name)
        sys.modules[name] = stand_in

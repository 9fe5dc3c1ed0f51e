"""A directory is a registry: every module of a package holds one record, and the file name is the record's name."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from wan_runtime.errors import UnknownName

T = TypeVar("T")


class Catalogue(Mapping[str, T], Generic[T]):
    """Read-only mapping over a package: module name -> the module's one constant.

    A module `formats/nvfp4.py` of the package `wan_runtime.formats` holds `FORMAT = Format(...)`; its constant is
    named after the record's class in capitals. Listing imports nothing; looking a name up imports that one module.
    Names starting with `_` are not members. Import errors propagate: a broken member is a defect, not an absence.
    """

    def __init__(self, package: str, kind: type[T]) -> None:
        self.package = package
        self.kind = kind

    @functools.cached_property
    def _names(self) -> tuple[str, ...]:
        path = importlib.import_module(self.package).__path__
        return tuple(sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_")))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> T:
        key = name.replace("-", "_")
        if key not in self._names:
            raise UnknownName(self.kind.__name__.lower(), name, self._names)
        record = getattr(importlib.import_module(f"{self.package}.{key}"), self.kind.__name__.upper())
        if not isinstance(record, self.kind):
            raise TypeError(
                f"{self.package}.{key}.{self.kind.__name__.upper()} is not a {self.kind.__name__}."
            )
        return record

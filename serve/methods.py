"""Which methods an address takes: what `Allow` lists where another one was used.

The framework names those of the first route that fits; `GET` and `DELETE` of one address are two routes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fastapi.routing import APIRoute
from starlette.routing import BaseRoute


def methods_of(routes: Iterable[BaseRoute]) -> Callable[[str], list[str]]:
    """A function from a path to the methods of all routes that fit it, sorted."""
    known = [(route.path_regex, route.methods) for route in routes if isinstance(route, APIRoute)]

    def methods(path: str) -> list[str]:
        return sorted({name for fits, names in known if fits.match(path) for name in names or ()})

    return methods

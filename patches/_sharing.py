"""A fused block of any host, as one of those that share what `_shared` keeps."""

from __future__ import annotations

from typing import Any

from wan_runtime.residents import Move, OwnDtype

from ._shared import announce

MEMO = "_wan_runtime_fused"  # on a fused block: what it knows beside its parts, `shared` and its `number` among it


class SharingBlock(OwnDtype):
    """A copy makes itself known to the copy's blocks; weights that are moved or loaded clear what was made of them."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        memo = self.__dict__[MEMO]
        announce(self, memo.shared, memo.number)

    def _apply(self, fn: Move, recurse: bool = True) -> Any:
        self.__dict__[MEMO].shared.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__[MEMO].shared.clear()
        super()._load_from_state_dict(*args, **kwargs)

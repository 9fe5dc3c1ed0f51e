"""Host models: one file each says how to recognise a WAN implementation, what to swap in it and what stays fp32."""

if __name__ != "wan_runtime.patches":
    raise ImportError(
        "The folder 'patches' is the package wan_runtime.patches: write `import wan_runtime.patches`. Imported by its "
        "bare name it would be a second copy whose classes are not the library's."
    )

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from wan_runtime.attention import Ends
from wan_runtime.catalogue import Catalogue
from wan_runtime.errors import HostNotRecognised
from wan_runtime.names import SPELLINGS, Spelling, Variant

from ._steps import scheduled

__all__ = ["HOSTS", "Blocks", "Host", "host_of", "scheduled"]


@dataclass(frozen=True)
class Blocks:
    """What a host's blocks can be given beside quantised Linears.

    head     model -> the size of an attention head.
    attend   (model, a name of wan_runtime.attention, the device type and dtype it was chosen for, FP8 attention's ends)
             -> notes for its user: every attention of the model becomes that one.
    fuse     a patched model -> notes for its user: its blocks run on fused kernels from now on.
    restore  undoes attend and fuse.
    refuses  model -> why its blocks are not the ones that this host's functions know, or None.
    """

    head: Callable[[nn.Module], int]
    attend: Callable[[nn.Module, str, tuple[str, torch.dtype], Ends], list[str]]
    fuse: Callable[[nn.Module], list[str]]
    restore: Callable[[nn.Module], None]
    refuses: Callable[[nn.Module], str | None] = lambda model: None


@dataclass(frozen=True)
class Host:
    """One implementation of a WAN model.

    spelling  how it names modules: a member of wan_runtime.names, or its own where no file is written so.
    classes   "module:Class" of each model class, watched by autopatch as it is imported.
    matches   whether a module is this host's model.
    swaps     original module path -> whether its Linear is quantised when no file decides.
    fp32      original module path -> whether the module stays fp32.
    build     Variant -> the model with parameters on the meta device, or None where a file alone cannot build it.
    blocks    the fused block forward and the choice of attention, or None where this host has its own only.
    """

    name: str
    spelling: str | Spelling
    classes: tuple[str, ...]
    matches: Callable[[nn.Module], bool]
    swaps: Callable[[str], bool]
    fp32: Callable[[str], bool]
    build: Callable[[Variant], nn.Module] | None = None
    blocks: Blocks | None = None

    @property
    def names(self) -> Spelling:
        return SPELLINGS[self.spelling] if isinstance(self.spelling, str) else self.spelling


HOSTS: Catalogue[Host] = Catalogue("wan_runtime.patches", Host)


def host_of(model: nn.Module) -> Host:
    """The host a model belongs to; raises HostNotRecognised."""
    for name in HOSTS if isinstance(model, nn.Module) else ():
        if HOSTS[name].matches(model):
            return HOSTS[name]
    raise HostNotRecognised(f"{type(model).__module__}.{type(model).__qualname__}", list(HOSTS))

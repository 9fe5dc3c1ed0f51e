"""Host models: one file each says how to recognise a WAN implementation, what to swap in it and what stays fp32."""

if __name__ != "wan_runtime.patches":
    raise ImportError(
        "The folder 'patches' is the package wan_runtime.patches: write `import wan_runtime.patches`. Imported by its "
        "bare name it would be a second copy whose classes are not the library's."
    )

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from wan_runtime.catalogue import Catalogue
from wan_runtime.errors import HostNotRecognised
from wan_runtime.names import SPELLINGS, Spelling, Variant


@dataclass(frozen=True)
class Host:
    """One implementation of a WAN model.

    spelling  how it names modules: a member of wan_runtime.names, or its own where no file is written so.
    classes   "module:Class" of each model class, watched by autopatch as it is imported.
    matches   whether a module is this host's model.
    swaps     original module path -> whether its Linear is quantised when no file decides.
    fp32      original module path -> whether the module stays fp32.
    build     Variant -> the model with parameters on the meta device, or None where a file alone cannot build it.
    """

    name: str
    spelling: str | Spelling
    classes: tuple[str, ...]
    matches: Callable[[nn.Module], bool]
    swaps: Callable[[str], bool]
    fp32: Callable[[str], bool]
    build: Callable[[Variant], nn.Module] | None = None

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

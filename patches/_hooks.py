"""Who has a say when a module is called."""

from __future__ import annotations

from torch import nn

from wan_runtime.residents import pinned


def hooked(module: nn.Module) -> str | None:
    """What would be missed by reading a module's tensors instead of calling it, in words; None where nothing would."""
    # A module's getattr of what is not there costs an exception, and this is asked often.
    own = module.__dict__
    registry = own.get("_diffusers_hook")
    if own.get("_hf_hook") is not None:
        return "an accelerate hook"
    if registry is not None and registry.hooks:
        return "a diffusers hook"
    if module._forward_hooks or module._forward_pre_hooks:
        return "a forward hook"
    if "forward" in own and not pinned(module):
        return "a forward that was put in the place of its own"
    return None

"""The one module whose import has an effect: WAN models loaded after it are patched, with the options' defaults.

    import wan_runtime.autopatch  # the first line of a script; nothing else in it changes

`wan-runtime run` does the same to a script that is not to be edited, with options. `armed.undo()` ends it.
"""

from __future__ import annotations

from wan_runtime.arming import install, run_script
from wan_runtime.experts import Armed

armed = install()

__all__ = ["Armed", "armed", "install", "run_script"]

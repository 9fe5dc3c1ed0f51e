"""INT8: one signed byte a weight, one fp32 scale a tensor or an output channel.

slot     dtype    shape             meaning
payload  uint8    [out, in]         the bytes of the int8 codes (two's complement, -128..127), row-major
scale    float32  [1,1] or [out,1]  W = code * scale, a tensor or an output channel

Quantising takes scale = amax / 127 and codes in -127..127.
Source: LightX2V, tools/convert/quant/quant.py; comfy-kitchen, int8_tensorwise.
"""

from __future__ import annotations

from wan_runtime.formats import _scaled

FORMAT = _scaled.make("int8", _scaled.INT8)

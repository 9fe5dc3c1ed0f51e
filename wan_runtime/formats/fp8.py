"""FP8 E4M3: one byte a weight, 1 sign, 4 exponent (bias 7), 3 mantissa bits; largest code 448; 0x7F and 0xFF are NaN.

slot     dtype    shape             meaning
payload  uint8    [out, in]         the e4m3fn codes, row-major
scale    float32  [1,1] or [out,1]  W = code * scale, a tensor or an output channel

Source: OCP 8-bit Floating Point Specification, section 5 (https://www.opencompute.org/documents/).
"""

from __future__ import annotations

from wan_runtime.formats import _scaled

FORMAT = _scaled.make("fp8", _scaled.E4M3)

"""FP8 E5M2: one byte a weight, 1 sign, 5 exponent (bias 15), 2 mantissa bits; largest code 57344; has infinities.

slot     dtype    shape             meaning
payload  uint8    [out, in]         the e5m2 codes, row-major
scale    float32  [1,1] or [out,1]  W = code * scale, a tensor or an output channel

Never recast to E4M3 under the same scale: values above 448 saturate and small ones lose bits.
Source: OCP 8-bit Floating Point Specification, section 5 (https://www.opencompute.org/documents/).
"""

from __future__ import annotations

from wan_runtime.formats import _scaled

FORMAT = _scaled.make("fp8_e5m2", _scaled.E5M2)

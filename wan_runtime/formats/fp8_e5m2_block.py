"""FP8 E5M2 with a scale a block: codes as in `fp8_e5m2`.

slot     dtype    shape                            meaning
payload  uint8    [out, in]                        the e5m2 codes, row-major; largest 57344, has infinities
scale    float32  [ceil(out / r), ceil(in / c)]    W = code * scale of its block of r x c, the last ones cut short;
                                                   r, c: 128 x 128, 64 x 64, 1 x 64, ..., told by the shape

Source: musubi-tuner, 1 x 64.
"""

from __future__ import annotations

from wan_runtime.formats import _scaled

FORMAT = _scaled.make("fp8_e5m2_block", _scaled.E5M2, blocks=True)

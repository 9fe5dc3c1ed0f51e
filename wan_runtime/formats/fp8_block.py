"""FP8 E4M3 with a scale a block: codes as in `fp8`.

slot     dtype    shape                            meaning
payload  uint8    [out, in]                        the e4m3fn codes, row-major; largest 448, 0x7F and 0xFF are NaN
scale    float32  [ceil(out / r), ceil(in / c)]    W = code * scale of its block of r x c, the last ones cut short;
                                                   r, c: 128 x 128, 64 x 64, 1 x 64, ..., told by the shape

Source: LightX2V (128 x 128, for DeepGEMM), convert_to_quant (64 x 64), musubi-tuner (1 x 64).
"""

from __future__ import annotations

from wan_runtime.formats import _scaled

FORMAT = _scaled.make("fp8_block", _scaled.E4M3, blocks=True)

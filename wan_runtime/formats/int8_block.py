"""INT8 with a scale a block: codes as in `int8`.

slot     dtype    shape                            meaning
payload  uint8    [out, in]                        the bytes of the int8 codes, row-major
scale    float32  [ceil(out / r), ceil(in / c)]    W = code * scale of its block of r x c, the last ones cut short;
                                                   r, c: 128 x 128, 64 x 64, 1 x 64, ..., told by the shape

Source: TurboDiffusion, turbodiffusion/ops/quant (128 x 128); convert_to_quant, int8_blockwise.
"""

from __future__ import annotations

from wan_runtime.formats import _scaled

FORMAT = _scaled.make("int8_block", _scaled.INT8, blocks=True)

"""In what codes a fused kernel writes the activations that a product reads. No Triton here, for those who only ask."""

from __future__ import annotations

from enum import IntEnum


class Codes(IntEnum):
    """How activations are written: `Rows` says in which tensors.

    PLAIN  as they are, in the compute dtype.
    TOKEN  e4m3 codes, one fp32 scale a token.
    MXFP8  e4m3 codes, a power of two for each 32 values.
    NVFP4  e2m1 codes, an e4m3 scale for each 16 values and one fp32 scale for all.
    """

    PLAIN = 0
    TOKEN = 1
    MXFP8 = 2
    NVFP4 = 3


OF_COMPUTE = {"fp8": Codes.TOKEN, "mxfp8": Codes.MXFP8, "nvfp4": Codes.NVFP4}

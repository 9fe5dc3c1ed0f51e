"""NVFP4 and MXFP8 as they are: products of block-scaled operands by `torch.nn.functional.scaled_mm`, for Blackwell.

Both operands carry their block scales in the 128 x 4 tile order, NVFP4's one fp32 scale a tensor beside them. The
weight's scales lie row-major in memory (as in the file, the state dict and every format), and are put in order for each
product: they are a sixteenth of its bytes at most, and nothing is kept twice.

Which GPUs multiply them is found by multiplying: the kinds of Blackwell (sm_100, sm_120) differ by what torch and
cuBLAS have for them, not in what is asked of them.
"""

from __future__ import annotations

import torch

from wan_runtime.dialects._swizzle import swizzle
from wan_runtime.formats import FORMATS, Slots

COMPUTES = {"nvfp4": (16, 16), "mxfp8": (16, 32)}  # of what (out, in) must be multiples
ROW = 16  # bytes: the rows of an operand start at multiples of it
TOLERANCE = 0.02  # bf16 rounds by 0.004 at most; a scale or a nibble in the wrong place is off by far more

# (codes, block scales in tile order as bytes, NVFP4's scale [1] fp32 or None) of one operand [rows, in]
Operand = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
_REFUSED: dict[tuple[str, int], str | None] = {}  # by compute and the GPU's index


def refuses(compute: str, index: int) -> str | None:
    """Why a GPU has no right product of this kind, or None."""
    if (compute, index) not in _REFUSED:
        _REFUSED[compute, index] = tried(compute, torch.device("cuda", index))
    return _REFUSED[compute, index]


def tried(compute: str, device: torch.device) -> str | None:
    """Why this kind of product is not right on a device, found by making small ones, or None."""
    try:
        return _wrong(compute, device)
    except Exception as error:  # whatever the driver, Triton or cuBLAS says is the reason shown to the user
        return f"a test product failed: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"


def _wrong(compute: str, device: torch.device) -> str | None:
    """By how much a product is wrong, or None.

    The operands are first quantised by plain torch, so that a GPU without such products is refused before a kernel is
    compiled for it; then by the kernel. Sizes are odd on purpose: padded scales are part of the product.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    rows, weight, bias = (
        torch.randn(*shape, generator=generator, device="cpu") for shape in ((33, 96), (144, 96), (144,))
    )
    rows[7] *= 30
    rows, bias = rows.to(device, torch.bfloat16), bias.to(device, torch.bfloat16)
    held, slots = (FORMATS[compute].quantize(given.to(device), True) for given in (rows, weight))
    values = (FORMATS[compute].dequantize(given).double() for given in (held, slots))
    exact = next(values) @ next(values).T
    for by_kernel in (False, True):
        operand = _quantised(compute, rows, None) if by_kernel else _laid(compute, held)
        for given, truth in ((None, exact), (bias, exact + bias.double())):
            product = _product(compute, operand, _laid(compute, slots), given).double()
            wrong = float((product - truth).norm() / truth.norm())
            if not wrong < TOLERANCE:
                return f"a test product was wrong by {wrong:.2f} (relative error)"
    return None


def multiply(
    compute: str, rows: torch.Tensor, slots: Slots, static: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Activations [tokens, in] x weight slots, and a bf16 bias [out] -> bf16 [tokens, out].

    A static input scale [1, 1] is NVFP4's, amax / 2688; MXFP8 has no scale but its blocks'.
    """
    if not rows.shape[0]:  # no amax
        return torch.empty(0, slots["payload"].shape[0], dtype=torch.bfloat16, device=rows.device)
    return _product(compute, _quantised(compute, rows, static), _laid(compute, slots), bias)


def coded(
    compute: str, codes: torch.Tensor, block_scale: torch.Tensor, slots: Slots, whole: torch.Tensor | None
) -> torch.Tensor:
    """Activations that a fused kernel has quantised to this kind of operand x weight slots -> bf16 [tokens, out]."""
    if not codes.shape[0]:
        return torch.empty(0, slots["payload"].shape[0], dtype=torch.bfloat16, device=codes.device)
    return _product(compute, (codes, block_scale, whole), _laid(compute, slots), None)


def _quantised(compute: str, rows: torch.Tensor, static: torch.Tensor | None) -> Operand:
    """Activations as an operand, by the kernel."""
    if compute == "nvfp4":
        from wan_runtime.kernels.quantize_nvfp4 import quantize_nvfp4

        blocks = quantize_nvfp4(rows, static)
    else:
        from wan_runtime.kernels.quantize_mxfp8 import quantize_mxfp8

        blocks = quantize_mxfp8(rows)
    return blocks.payload, blocks.block_scale, blocks.scale


def _laid(compute: str, slots: Slots) -> Operand:
    """Slots as an operand: the scales in tile order, NVFP4's rows up to a multiple of 16 bytes."""
    payload = slots["payload"]
    missing = -payload.shape[1] % ROW
    if missing:  # no layer of a WAN model
        payload = torch.nn.functional.pad(payload, (0, missing))
    scale = slots["scale"].reshape(1) if compute == "nvfp4" else None
    return payload, swizzle(slots["block_scale"]), scale


def _product(compute: str, activations: Operand, weight: Operand, bias: torch.Tensor | None) -> torch.Tensor:
    """[tokens, in] x [out, in] -> bf16 [tokens, out]."""
    functional = torch.nn.functional
    recipe, order = functional.ScalingType, functional.SwizzleType
    if compute == "nvfp4":
        codes, scales = torch.float4_e2m1fn_x2, torch.float8_e4m3fn
        recipes = [recipe.BlockWise1x16, recipe.TensorWise]
        orders = [order.SWIZZLE_32_4_4, order.NO_SWIZZLE]
    else:
        codes, scales = torch.float8_e4m3fn, torch.float8_e8m0fnu
        recipes, orders = [recipe.BlockWise1x32], [order.SWIZZLE_32_4_4]
    first, second = (
        (payload.view(codes), [blocks.flatten().view(scales), *([] if whole is None else [whole])])
        for payload, blocks, whole in (activations, weight)
    )
    return functional.scaled_mm(
        first[0], second[0].t(), first[1], recipes, second[1], recipes, swizzle_a=orders, swizzle_b=orders,
        bias=bias, output_dtype=torch.bfloat16, use_fast_accum=False,
    )  # fmt: skip

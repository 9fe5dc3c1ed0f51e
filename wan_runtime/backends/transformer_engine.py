"""NVIDIA Transformer Engine: products of its own quantised tensors on an NVIDIA GPU (the extra `te`).

weights  compute  activations, which Transformer Engine quantises in the call
fp8      fp8      e4m3, one scale for all from their largest magnitude (its recipe Float8CurrentScaling), or the file's
                  scale where asked (activation="static"). Delayed scaling would freeze: its scales move only while
                  gradients are on.
mxfp8    mxfp8    e4m3, a power of two for each 32 values of a token (MXFP8BlockScaling)
nvfp4    nvfp4    e2m1, an e4m3 scale for each 16 values of a token and one fp32 scale for all (NVFP4BlockScaling)

A weight stays what the file holds. Its slots become a tensor of Transformer Engine's for each product, which is a view
of them: nothing is rounded again, nothing is kept twice, and offloading, copies and state dicts see the slots alone.
Its FP8 tensors have one scale, so FP8 weights with one a channel are refused unless `weights="fp8"` asks for them to be
quantised anew; so are e5m2 and FP8 in blocks, which it multiplies only against activations quantised in other ways.

Written against transformer_engine 2.20.2; what it calls is the same from 2.12 on.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch

from wan_runtime.backends import Backend, Biased, Multiply
from wan_runtime.dialects._swizzle import padded
from wan_runtime.formats import FORMATS, Slots
from wan_runtime.formats.nvfp4 import LARGEST

# Of what (tokens, out and in) must be multiples: Transformer Engine's own rule, and its blocks'. FP8's `out` may be a
# multiple of 8 there; 16 keeps rows of the product where cuBLAS is fastest.
ALIGNMENT = {"fp8": (8, 16), "mxfp8": (32, 32), "nvfp4": (32, 32)}
# What a test product may be wrong by: what its activations lose by rounding, twice over. A lost scale or a nibble or
# block scale in the wrong place is off by 0.39 and more (docs/formats.md).
TOLERANCE = {"fp8": 0.06, "mxfp8": 0.06, "nvfp4": 0.2}
TILE = padded(1, 1)  # block scales come in whole tiles; it puts them in order for the product itself


def computes(weight_format: str) -> tuple[str, ...]:
    return (weight_format,) if weight_format in ALIGNMENT else ()


def refuses(weight_format: str, compute: str, device: torch.device, shape: tuple[int, int]) -> str | None:
    if weight_format not in ALIGNMENT:
        return (
            f"it multiplies fp8 (e4m3), mxfp8 and nvfp4 weights as they are, not {weight_format}; weights='fp8' "
            "quantises them anew, with one scale a tensor"
        )
    if compute not in (weight_format, "auto"):
        return f"it multiplies {weight_format} weights in {weight_format}, not in {compute}"
    if device.type != "cuda":
        return f"Transformer Engine's products need a CUDA GPU; the model is on {device.type}"
    if torch.version.hip is not None:
        return "Transformer Engine's products need an NVIDIA GPU; this torch is built for AMD's (ROCm)"
    if not _installed():
        return "Transformer Engine is not installed: pip install --no-build-isolation 'wan-runtime[te]'"
    return _probe(weight_format, device.index if device.index is not None else torch.cuda.current_device())


def _installed() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


@functools.cache
def _probe(compute: str, index: int) -> str | None:
    """Ask Transformer Engine, then make small products on the GPU: the only proof that it can."""
    device = torch.device("cuda", index)
    try:
        import transformer_engine.pytorch as te

        asked = {"fp8": te.is_fp8_available, "mxfp8": te.is_mxfp8_available, "nvfp4": te.is_nvfp4_available}
        with torch.cuda.device(device):
            able, why = asked[compute](return_reason=True)
            return _wrong(compute, device) if able else str(why).rstrip(".")
    except (
        Exception
    ) as error:  # what it says, or its libraries or the driver, is the reason shown to the user
        said = (str(error).splitlines() or [""])[0][:200]
        return f"Transformer Engine failed on {device}: {type(error).__name__}: {said}"


def _wrong(compute: str, device: torch.device) -> str | None:
    """By how much a product is wrong, or None. Sizes are odd on purpose: padding is part of it."""
    generator = torch.Generator("cpu").manual_seed(0)
    rows, weight, bias = (
        torch.randn(*shape, generator=generator, device="cpu") for shape in ((33, 96), (136, 96), (136,))
    )
    held = FORMATS[compute].quantize(weight, BACKEND.per_channel)
    slots = {name: slot.to(device) for name, slot in held.items()}
    given, short = rows.to(device, torch.bfloat16), bias.to(device, torch.bfloat16)
    exact = given.double() @ FORMATS[compute].dequantize(slots).double().T
    for added, truth in ((None, exact), (short, exact + short.double())):
        product = multiply(compute, given, slots, None, added).double()
        wrong = float((product - truth).norm() / truth.norm())
        if not wrong < TOLERANCE[compute]:
            return f"a test product was wrong by {wrong:.2f} (relative error)"
    return None


def kernel(weight_format: str, compute: str) -> Multiply:
    return functools.partial(multiply, compute)


def biased(weight_format: str, compute: str) -> Biased | None:
    return functools.partial(multiply, compute)


def multiply(
    compute: str, rows: torch.Tensor, slots: Slots, static: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Activations [tokens, in] x weight slots, and a bias [out] -> [tokens, out], both in the activations' dtype.

    The operator is for torch.compile, which traces it by its shapes: no graph breaks here. Eager code goes without its
    dispatch.
    """
    run = _operator if torch.compiler.is_compiling() else _product
    return run(compute, rows, slots["payload"], slots.get("scale"), slots.get("block_scale"), static, bias)


def _product(
    compute: str,
    rows: torch.Tensor,
    payload: torch.Tensor,
    scale: torch.Tensor | None,
    block_scale: torch.Tensor | None,
    static: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    tokens, out = rows.shape[0], payload.shape[0]
    if not tokens:  # no amax
        return rows.new_empty(0, out)
    given = {"payload": payload, "scale": scale, "block_scale": block_scale}
    slots = {name: slot for name, slot in given.items() if slot is not None}
    each, side = ALIGNMENT[compute]
    with torch.cuda.device(rows.device):
        weight = weight_of(compute, slots, rows.dtype)
        activations = _quantised(compute, _up_to(rows, each, side), static)
        if bias is not None:
            bias = _up_to(bias[None], 1, side)[0]
        product: torch.Tensor = general_gemm(weight, activations, out_dtype=rows.dtype, bias=bias)[0]
    return product[:tokens, :out].contiguous()


@torch.library.custom_op("wan_runtime::te_product", mutates_args=())
def _operator(
    compute: str, rows: torch.Tensor, payload: torch.Tensor, scale: torch.Tensor | None,
    block_scale: torch.Tensor | None, static: torch.Tensor | None, bias: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    return _product(compute, rows, payload, scale, block_scale, static, bias)


@_operator.register_fake
def _(
    compute: str, rows: torch.Tensor, payload: torch.Tensor, scale: torch.Tensor | None,
    block_scale: torch.Tensor | None, static: torch.Tensor | None, bias: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    return rows.new_empty(rows.shape[0], payload.shape[0])


def weight_of(compute: str, slots: Slots, dtype: torch.dtype) -> Any:
    """A weight's slots as Transformer Engine's tensor of that kind, which says that it is `dtype`.

    The codes and FP8's scale are the slots' own memory, unless a side is one that it does not multiply, which none of
    a WAN model is: that one is padded with zeros for the product. Block scales get the padding of its layout where they
    need it, and NVFP4's fp32 scale is given as the largest magnitude that it stands for (scale * 2688).
    """
    import transformer_engine.pytorch as te
    import transformer_engine_torch as tex

    side = ALIGNMENT[compute][1]
    codes = _up_to(slots["payload"], side, side // 2 if compute == "nvfp4" else side)
    known = {"dtype": dtype, "device": codes.device, "quantizer": None}
    if compute == "fp8":
        one = slots["scale"].reshape(1)  # an error where there are several: it would read the first
        return te.Float8Tensor(
            shape=codes.shape, data=codes, fp8_scale_inv=one, fp8_dtype=tex.DType.kFloat8E4M3, **known
        )
    blocks = slots["block_scale"]
    rows = {
        "rowwise_data": codes,
        "rowwise_scale_inv": _up_to(blocks, *TILE),
        "columnwise_data": None,
        "columnwise_scale_inv": None,
        "with_gemm_swizzled_scales": False,
    }
    if compute == "mxfp8":
        return te.MXFP8Tensor(shape=codes.shape, fp8_dtype=tex.DType.kFloat8E4M3, **rows, **known)
    return te.NVFP4Tensor(
        shape=(codes.shape[0], codes.shape[1] * 2), fp4_dtype=tex.DType.kFloat4E2M1,
        amax_rowwise=slots["scale"].reshape(1) * LARGEST, amax_columnwise=None, **rows, **known,
    )  # fmt: skip


def _quantised(compute: str, rows: torch.Tensor, static: torch.Tensor | None) -> Any:
    """Activations as Transformer Engine's tensor of that kind, by its own kernels; only what x * W^T reads."""
    import transformer_engine.pytorch as te
    import transformer_engine_torch as tex

    e4m3, usage = tex.DType.kFloat8E4M3, {"rowwise": True, "columnwise": False}
    if compute == "mxfp8":
        quantizer = te.MXFP8Quantizer(e4m3, **usage)
    elif compute == "nvfp4":
        quantizer = te.NVFP4Quantizer(**usage)
    elif static is None:
        quantizer = te.Float8CurrentScalingQuantizer(e4m3, rows.device, **usage)
    else:
        quantizer = te.Float8Quantizer(static.reshape(1).reciprocal(), static.new_zeros(1), e4m3, **usage)
    quantizer.internal = True  # the plain storage, without a tensor's Python around it
    quantizer.optimize_for_gemm = True
    return quantizer(rows)


def _up_to(given: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """[n, m] with zeros up to multiples of rows and cols; contiguous, and itself where nothing is missing."""
    missing = (0, -given.shape[1] % cols, 0, -given.shape[0] % rows)
    return torch.nn.functional.pad(given, missing) if any(missing) else given.contiguous()


BACKEND = Backend(
    name="te",
    computes=computes,
    refuses=refuses,
    kernel=kernel,
    biased=biased,
    per_channel=False,
    own_scales=frozenset({"nvfp4"}),
)

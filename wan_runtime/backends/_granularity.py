"""Which scales `torch._scaled_mm` takes on a GPU, found by multiplying there: one a token and a weight's row
(row-wise), or one for all (tensor-wise), the others being applied to the product.

Row-wise is the faster where it is right. It has not always been: with torch before 2.12 the product of an sm_89 ran on
the default stream whatever stream was current (pytorch#177651), and read what had not been written yet. So the test
product is made on another stream, behind a kernel that waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

# (codes [tokens, in], their scale [tokens, 1] fp32, weight codes [out, in], their scale [1, out] fp32, bias [out] bf16
# or None) -> bf16 [tokens, out]
Product = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor
]
WAIT = 50_000_000  # GPU cycles, some 30 ms: far longer than it takes to launch a product
TOLERANCE = 0.02  # bf16 rounds by 0.004 at most; scales that were lost, or zeros, are off by all


def row_wise(
    codes: torch.Tensor, token_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The product with the scales in it."""
    return torch._scaled_mm(
        codes, weight.t(), scale_a=token_scale, scale_b=scale, bias=bias, out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )  # fmt: skip


def tensor_wise(
    codes: torch.Tensor, token_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The product of the codes alone, and the scales applied to it: as accurate but for bf16's rounding, and slower."""
    one = token_scale.new_ones(())
    product = torch._scaled_mm(
        codes, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    product = product.mul_(token_scale).mul_(scale)
    return product if bias is None else product.add_(bias)


PRODUCTS: Mapping[str, Product] = {"row-wise": row_wise, "tensor-wise": tensor_wise}  # best first
_REFUSED: dict[int, dict[str, str]] = {}  # of a GPU, by its index: why products before the chosen one are not


def refuses(index: int) -> str | None:
    """Why no FP8 product is right on a GPU, or None; the first that is will be used there."""
    if index not in _REFUSED:
        refusals: dict[str, str] = {}
        for name, product in PRODUCTS.items():
            refusal = tried(product, torch.device("cuda", index))
            if refusal is None:
                break
            refusals[name] = refusal
        _REFUSED[index] = refusals
    refusals = _REFUSED[index]
    if len(refusals) < len(PRODUCTS):
        return None
    alike = len(set(refusals.values())) == 1
    return next(iter(refusals.values())) if alike else "; ".join(f"{n}: {why}" for n, why in refusals.items())


def remark(device: torch.device) -> str | None:
    """What a user reads of a GPU that was asked about and multiplies otherwise than the fastest way, or None."""
    refusals = {} if device.index is None else _REFUSED.get(device.index, {})
    if not 0 < len(refusals) < len(PRODUCTS):
        return None
    chosen = list(PRODUCTS)[len(refusals)]
    why = "; ".join(f"{name} was refused, as {reason}" for name, reason in refusals.items())
    return f"FP8 products on {device} are {chosen}, which is slower: {why}."


def product_on(device: torch.device) -> Product:
    """The product that is right on a device; row-wise where nobody has asked yet."""
    index = device.index
    return tensor_wise if index in _REFUSED and "row-wise" in _REFUSED[index] else row_wise


def tried(product: Product, device: torch.device) -> str | None:
    """Why a product is not right on a device, found by making a small one, or None."""
    generator = torch.Generator("cpu").manual_seed(0)
    values = (torch.randn(n, 64, generator=generator, device="cpu") for n in (32, 48))
    scales = [torch.rand(*shape, generator=generator, device="cpu") + 0.5 for shape in ((32, 1), (1, 48))]
    codes, weight = (value.to(torch.float8_e4m3fn) for value in values)
    truth = (codes.double() * scales[0]) @ (weight.double() * scales[1].T).T
    try:
        result = _elsewhere(product, *(t.to(device) for t in (codes, scales[0], weight, scales[1])))
    except Exception as error:  # whatever the driver, Triton or cuBLAS says is the reason shown to the user
        return f"a test product failed: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"
    wrong = float((result.double().cpu() - truth).norm() / truth.norm())
    return None if wrong < TOLERANCE else f"a test product was wrong by {wrong:.2f} (relative error)"


def _elsewhere(
    product: Product,
    codes: torch.Tensor,
    token_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """A product on another stream than the default one, of codes that are written there after a wait."""
    if codes.device.type != "cuda":
        return product(codes, token_scale, weight, scale, None)
    written = torch.zeros_like(codes)
    torch.cuda.synchronize(codes.device)
    with torch.cuda.stream(torch.cuda.Stream(codes.device)):
        torch.cuda._sleep(WAIT)
        written.copy_(codes)
        result = product(written, token_scale, weight, scale, None)
    torch.cuda.synchronize(codes.device)
    return result

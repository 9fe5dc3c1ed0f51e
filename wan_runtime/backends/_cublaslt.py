"""cuBLASLt's FP8 product that is added to what is there: D = A B + D, with a scale a token and a scale an output
channel in the product. torch's `_scaled_mm` calls the same product and cannot add.

The library is the one that torch has loaded, called through ctypes: its C interface is stable and only what this
product takes of it is declared. Names and numbers are those of cublasLt.h. Row-major [tokens, out] is the library's
column-major [out, tokens], so the weight is its A and the activations are its B.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable

import torch

from wan_runtime.backends import _granularity

CUDA_TYPES = {
    torch.float32: 0,
    torch.bfloat16: 14,
    torch.float8_e4m3fn: 28,
    torch.float8_e5m2: 29,
}
CUBLAS_COMPUTE_32F = 68
CUBLASLT_MATMUL_DESC_TRANSA = 3
CUBLASLT_MATMUL_DESC_A_SCALE_POINTER = 17
CUBLASLT_MATMUL_DESC_B_SCALE_POINTER = 18
CUBLASLT_MATMUL_DESC_FAST_ACCUM = 25
CUBLASLT_MATMUL_DESC_A_SCALE_MODE = 31
CUBLASLT_MATMUL_DESC_B_SCALE_MODE = 32
CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F = 3
CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1
WORKSPACE = 32 << 20  # bytes, at most: what NVIDIA advises for Hopper
PLACE = 256  # an address that nothing reads: an algorithm is chosen only once the scales have places
SHAPES = 64  # products of which the descriptors are kept: a clip's size has two, of o and of ffn.2
FP32_WIDTH = 3072  # at 1536 a pass over an fp32 stream is faster
ONE = ctypes.byref(ctypes.c_float(1.0))

_REFUSED: dict[int, str | None] = {}  # by a GPU's index: why it cannot add, or None


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t; its first field is the algorithm itself."""

    _fields_ = [
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]  # fmt: skip


_HANDLE, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_ARGUMENTS = {
    "cublasLtCreate": (_HANDLE,),
    "cublasLtMatmulDescCreate": (_HANDLE, _INT, _INT),
    "cublasLtMatmulDescDestroy": (_HANDLE,),
    "cublasLtMatmulDescSetAttribute": (_HANDLE, _INT, _HANDLE, _SIZE),
    "cublasLtMatrixLayoutCreate": (_HANDLE, _INT, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64),
    "cublasLtMatrixLayoutDestroy": (_HANDLE,),
    "cublasLtMatmulPreferenceCreate": (_HANDLE,),
    "cublasLtMatmulPreferenceDestroy": (_HANDLE,),
    "cublasLtMatmulPreferenceSetAttribute": (_HANDLE, _INT, _HANDLE, _SIZE),
    # handle, description, four layouts (A, B, C, D), preference, how many are asked for, results, how many came
    "cublasLtMatmulAlgoGetHeuristic": (*(_HANDLE,) * 7, _INT, _HANDLE, _HANDLE),
    # handle, description, alpha, A and B with a layout each, beta, C and D with a layout each, algorithm, workspace and
    # its size, stream
    "cublasLtMatmul": (*(_HANDLE,) * 14, _SIZE, _HANDLE),
}


@functools.cache
def _library() -> ctypes.CDLL:
    """The library that torch multiplies with. Raises OSError where torch has not loaded one under its name."""
    name = f"libcublasLt.so.{str(torch.version.cuda).partition('.')[0]}"
    library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    for function, arguments in _ARGUMENTS.items():
        getattr(library, function).argtypes = arguments
    library.cublasLtGetStatusString.argtypes, library.cublasLtGetStatusString.restype = (
        (_INT,),
        ctypes.c_char_p,
    )
    return library


def _call(function: str, *arguments: object) -> None:
    library = _library()
    status = getattr(library, function)(*arguments)
    if status:
        said = library.cublasLtGetStatusString(status).decode()
        raise RuntimeError(f"{function} answered {said} ({status})")


@functools.cache
def _handle(index: int) -> ctypes.c_void_p:
    """A GPU's handle, kept for the process; the GPU is the current one."""
    handle = ctypes.c_void_p()
    _call("cublasLtCreate", ctypes.byref(handle))
    return handle


def _made(create: str, destroy: str, owner: object, *arguments: object) -> ctypes.c_void_p:
    """An object of the library, destroyed with its owner."""
    made = ctypes.c_void_p()
    _call(create, ctypes.byref(made), *arguments)
    weakref.finalize(owner, getattr(_library(), destroy), made).atexit = False  # the process gives back all
    return made


class _Product:
    """A product of one shape on one GPU, ready to be launched."""

    def __init__(
        self, index: int, tokens: int, outputs: int, inputs: int, weight: torch.dtype, into: torch.dtype
    ) -> None:
        self.index, self.lock = index, threading.Lock()  # the scales' places are in the description
        layout = functools.partial(_made, "cublasLtMatrixLayoutCreate", "cublasLtMatrixLayoutDestroy", self)
        self.weight = layout(CUDA_TYPES[weight], inputs, outputs, inputs)
        self.codes = layout(CUDA_TYPES[torch.float8_e4m3fn], inputs, tokens, inputs)
        self.into = layout(CUDA_TYPES[into], outputs, tokens, outputs)
        self.description = _made(
            "cublasLtMatmulDescCreate", "cublasLtMatmulDescDestroy", self, CUBLAS_COMPUTE_32F, CUDA_TYPES[torch.float32]
        )  # fmt: skip
        self._describe(CUBLASLT_MATMUL_DESC_TRANSA, ctypes.c_int32(1))
        self._describe(CUBLASLT_MATMUL_DESC_FAST_ACCUM, ctypes.c_int8(1))
        for mode in (CUBLASLT_MATMUL_DESC_A_SCALE_MODE, CUBLASLT_MATMUL_DESC_B_SCALE_MODE):
            self._describe(mode, ctypes.c_int32(CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F))
        self._scale_with(PLACE, PLACE)
        self.best = self._chosen()

    def _describe(self, attribute: int, value: ctypes._SimpleCData[int]) -> None:
        at, size = ctypes.byref(value), ctypes.sizeof(value)
        _call("cublasLtMatmulDescSetAttribute", self.description, attribute, at, size)

    def _scale_with(self, weight: int, codes: int) -> None:
        """Where the scales of either operand lie."""
        self._describe(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, ctypes.c_uint64(weight))
        self._describe(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, ctypes.c_uint64(codes))

    def _chosen(self) -> _Heuristic:
        """The library's first choice of an algorithm."""
        preference = _made("cublasLtMatmulPreferenceCreate", "cublasLtMatmulPreferenceDestroy", self)
        most = ctypes.c_size_t(WORKSPACE)
        _call(
            "cublasLtMatmulPreferenceSetAttribute",
            preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, ctypes.byref(most), ctypes.sizeof(most),
        )  # fmt: skip
        best, found = _Heuristic(), ctypes.c_int()
        _call(
            "cublasLtMatmulAlgoGetHeuristic", _handle(self.index), self.description, self.weight, self.codes, self.into,
            self.into, preference, 1, ctypes.byref(best), ctypes.byref(found),
        )  # fmt: skip
        if not found.value:
            raise RuntimeError("cublasLtMatmulAlgoGetHeuristic knows no algorithm for this product")
        return best

    def launch(
        self, codes: torch.Tensor, token_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
        into: torch.Tensor,
    ) -> None:  # fmt: skip
        """Queue the product on the current stream. Its workspace goes back to that stream's memory behind it."""
        workspace = torch.empty(self.best.workspace, dtype=torch.uint8, device=into.device)
        with self.lock:
            self._scale_with(scale.data_ptr(), token_scale.data_ptr())
            _call(
                "cublasLtMatmul", _handle(self.index), self.description, ONE, weight.data_ptr(), self.weight,
                codes.data_ptr(), self.codes, ONE, into.data_ptr(), self.into, into.data_ptr(), self.into,
                ctypes.byref(self.best), workspace.data_ptr(), self.best.workspace,
                torch.cuda.current_stream(self.index).cuda_stream,
            )  # fmt: skip


_product: Callable[..., _Product] = functools.lru_cache(SHAPES)(_Product)


def add(
    codes: torch.Tensor,
    token_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    into: torch.Tensor,
) -> None:
    """into += (codes * token_scale) @ (weight * scale).T, summed in the tensor cores' fast mode and rounded once.

    codes [tokens, in] e4m3, token_scale [tokens, 1] fp32, weight [out, in] e4m3 or e5m2, scale [out] fp32 of either
    sign, into [tokens, out] bf16 or fp32: contiguous, on one GPU, at least one token, in and out multiples of 16. None
    of that is looked at here: the library would multiply whatever lies there. Matrices begin at multiples of 256 bytes
    as torch's allocations do, for which the library chooses an algorithm, scales at multiples of 16.
    """
    index = into.device.index
    with torch.cuda.device(index):
        product = _product(index, *into.shape, codes.shape[1], weight.dtype, into.dtype)
        product.launch(codes, token_scale, weight, scale, into)


def refuses(index: int) -> str | None:
    """Why a GPU's products cannot be added to what is there, found by adding some, or None."""
    if index not in _REFUSED:
        _REFUSED[index] = _refused(torch.device("cuda", index))
    return _REFUSED[index]


def remark(device: torch.device) -> str | None:
    """What a user reads of a GPU that was asked and cannot add, or None."""
    refusal = None if device.index is None else _REFUSED.get(device.index)
    if refusal is None:
        return None
    return f"FP8 products on {device} are added to the residual stream by another pass, which is slower: {refusal}."


def takes(into: torch.Tensor) -> bool:
    """Whether `add` works for a tensor, and saves time: False where nobody has asked `refuses` yet."""
    if into.device.type != "cuda" or _REFUSED.get(into.device.index, "not asked") is not None:
        return False
    return into.dtype == torch.bfloat16 or (into.dtype == torch.float32 and into.shape[1] >= FP32_WIDTH)


def _refused(device: torch.device) -> str | None:
    if sys.platform != "linux":
        return f"it was never tried on {sys.platform}"
    try:
        _library()
    except (OSError, AttributeError) as error:
        return f"torch's cuBLASLt is not to be found: {str(error)[:200]}"
    return _granularity.tried(_there_and_back, device)


def _there_and_back(
    codes: torch.Tensor, token_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """A product as itself and itself less itself: right only where `add` adds, and takes scales of either sign."""
    into = torch.zeros(codes.shape[0], weight.shape[0], dtype=torch.bfloat16, device=codes.device)
    for factor in (1, 1, -1):
        add(codes, token_scale, weight, scale.reshape(-1) * factor, into)
    return into

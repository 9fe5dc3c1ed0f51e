"""Writer of GGUF files, by the gguf package: its blocks, and the weights that its own dequantisation gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import torch

from tests.builders.files import Content, Writer

PREFIX = "ggml_"


@dataclass
class Blocks(Content):
    """As `Content`, for a GGUF file: a uint8 tensor holds blocks of `kind`, [out, bytes a row]; others are fp32."""

    kind: str = "Q8_0"

    def write(self, folder: Path, name: str = "model.gguf") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        writer = gguf.GGUFWriter(path, "wan")
        for key, tensor in self.tensors.items():
            if tensor.dtype == torch.uint8:
                kind = gguf.GGMLQuantizationType[self.kind]
                writer.add_tensor(key, tensor.contiguous().numpy(), raw_dtype=kind)
                continue
            held = tensor.float().contiguous()
            if held.ndim > 4:  # ggml's tensors have no more dimensions
                writer.add_array(f"comfy.gguf.orig_shape.{key}", list(held.shape))
                held = held.flatten(1)
            writer.add_tensor(key, held.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def quantised(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Blocks uint8 [out, bytes a row] of a weight."""
    return torch.from_numpy(gguf.quants.quantize(weight.float().numpy(), gguf.GGMLQuantizationType[kind]))


def dequantised(blocks: torch.Tensor, kind: str) -> torch.Tensor:
    """The fp32 weight that blocks mean, by the package."""
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind]))


def ggml(state: dict[str, torch.Tensor], modules: list[str], weight_format: str) -> Content:
    """M1: the Linears in one type, everything else in fp32."""
    kind = weight_format.removeprefix(PREFIX).upper()
    content = Blocks(dict(state), kind=kind)
    for module in modules:
        key = f"{module}.weight"
        content.tensors[key] = quantised(state[key], kind)
        content.weights[module] = dequantised(content.tensors[key], kind).double().numpy()
    return content


# The types that the package quantises to; K-quants it only reads.
FORMATS = ("ggml_q8_0", "ggml_q4_0", "ggml_q4_1", "ggml_q5_0", "ggml_q5_1")
WRITERS: dict[str, tuple[Writer, tuple[str, ...]]] = {"gguf": (ggml, FORMATS)}

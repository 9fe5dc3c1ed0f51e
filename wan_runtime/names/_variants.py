"""Which WAN model a file's shapes make it, and every size that its class is built from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from wan_runtime.errors import BadTensor, CheckpointError

HEAD_DIM = 128  # every published WAN transformer
PATCH = (1, 2, 2)
Shapes = Mapping[str, tuple[int, ...]]

# The start of a path that only one kind of model has -> the kind. Text-to-video, image-to-video and first-last-frame
# models, and those that only have more channels in, are "base": they differ by sizes alone.
KINDS = {
    "vace_patch_embedding": "vace",
    "motion_encoder": "animate",
    "face_adapter": "animate",
    "casual_audio_encoder": "s2v",
    "audio_injector": "s2v",
    "audio_proj.audio_proj_glob_1": "humo",
    "control_adapter": "fun_camera",
    "ref_conv": "fun_control",
}
LABELS = {
    "base": "WAN",
    "vace": "WAN VACE",
    "animate": "WAN Animate",
    "animate_2": "WAN Animate-2",
    "s2v": "WAN S2V (speech to video)",
    "humo": "HuMo",
    "fun_camera": "WAN Fun-Camera",
    "fun_control": "WAN Fun-Control",
}
KNOWN = {  # (kind, dim, layers, in channels, has image embedding) -> the published models of that size
    ("base", 1536, 30, 16, False): "T2V-1.3B",
    ("base", 5120, 40, 16, False): "T2V-14B (Wan2.1 or one expert of Wan2.2 A14B)",
    ("base", 3072, 30, 48, False): "TI2V-5B",
    ("base", 5120, 40, 36, True): "I2V-14B (480P or 720P: the shapes are the same)",
    ("base", 5120, 40, 36, False): "I2V-A14B (one expert of Wan2.2)",
    ("base", 256, 6, 16, False): "tiny (trained for tests)",
    ("vace", 1536, 30, 16, False): "VACE-1.3B",
    ("vace", 5120, 40, 16, False): "VACE-14B",
    ("animate", 5120, 40, 36, True): "Animate-14B",
    ("animate_2", 5120, 40, 36, True): "Animate-2-14B",
    ("s2v", 5120, 40, 16, False): "S2V-14B",
}
FLF2V = "FLF2V-14B"  # an I2V-14B that has learnt positions for the tokens of two images
MOTION_BLOCKS = 7  # of a motion encoder for faces of 512 x 512 pixels, the published size


@dataclass(frozen=True)
class Animate:
    """The sizes of Animate's face branch: features, channels and modules.

    channels  of the motion encoder's convolutions, by the side of the feature map in pixels, "512" to "4".
    every     a face adapter follows each `every`-th block.
    """

    motion_dim: int
    motion_out: int
    style_dim: int
    face_dim: int
    face_heads: int
    pose_channels: int
    every: int
    channels: Mapping[str, int]


@dataclass(frozen=True)
class Variant:
    """What a checkpoint's shapes say of the model: sizes in features, channels and layers.

    kind          a key of LABELS.
    image_dim     width of the image embedding's input, where there is one; `image_tokens` of learnt positions (FLF2V).
    vace_layers   the blocks that VACE's own blocks go with; `vace_channels` is what their patches hold.
    """

    name: str
    dim: int
    ffn_dim: int
    layers: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int
    image_dim: int | None = None
    kind: str = "base"
    image_tokens: int | None = None
    vace_channels: int | None = None
    vace_layers: tuple[int, ...] = ()
    animate: Animate | None = None

    @property
    def heads(self) -> int:
        return self.dim // HEAD_DIM


@dataclass(frozen=True)
class _Sizes:
    """Looks sizes up in a file's shapes; a tensor that decides one must be there."""

    path: Path
    shapes: Shapes

    def size(self, key: str, axis: int) -> int:
        shape = self.shapes.get(key)
        if shape is None or len(shape) <= axis:
            raise CheckpointError(
                self.path, f"{key} is missing or has shape {shape}; it decides the model's size."
            )
        return shape[axis]

    def count(self, stack: str) -> int:
        """How many numbered modules a list has."""
        depth = stack.count(".") + 1
        return len({key.split(".")[depth] for key in self.shapes if key.startswith(f"{stack}.")})


def variant_of(path: Path, shapes: Shapes, spelling: str = "original") -> Variant:
    """The variant that a file's logical shapes (original names, packed dimensions unpacked) describe.

    `spelling` is the name of the file's own: only Animate-2's tells it from an I2V-14B. Raises CheckpointError when a
    tensor that decides a size is missing, BadTensor when one has a size that no model has.
    """
    sizes = _Sizes(path, shapes)
    dim = sizes.size("head.head.weight", 1)
    if dim % HEAD_DIM:
        raise BadTensor(
            path, "head.head.weight", f"its width {dim} is not a multiple of the head size {HEAD_DIM}."
        )
    kind = "animate_2" if "animate_2" in spelling else _kind_of(path, shapes)
    layers, in_channels = sizes.count("blocks"), sizes.size("patch_embedding.weight", 1)
    image, positions = shapes.get("img_emb.proj.1.weight"), shapes.get("img_emb.emb_pos")
    return Variant(
        name=_name(kind, dim, layers, in_channels, image is not None, positions is not None),
        dim=dim,
        ffn_dim=sizes.size("blocks.0.ffn.0.weight", 0),
        layers=layers,
        in_channels=in_channels,
        out_channels=sizes.size("head.head.weight", 0) // (PATCH[0] * PATCH[1] * PATCH[2]),
        text_dim=sizes.size("text_embedding.0.weight", 1),
        freq_dim=sizes.size("time_embedding.0.weight", 1),
        image_dim=image[1] if image else None,
        kind=kind,
        image_tokens=sizes.size("img_emb.emb_pos", 1) if positions else None,
        vace_channels=sizes.size("vace_patch_embedding.weight", 1) if kind == "vace" else None,
        vace_layers=_vace_layers(sizes, layers) if kind == "vace" else (),
        animate=_animate(sizes, layers) if kind == "animate" else None,
    )


def _name(kind: str, dim: int, layers: int, in_channels: int, image: bool, positions: bool) -> str:
    known = KNOWN.get((kind, dim, layers, in_channels, image))
    if positions:
        known = FLF2V if known and kind == "base" and image else None
    return known or f"unlisted {LABELS[kind]} variant (dim {dim}, {layers} layers, {in_channels} channels)"


def _kind_of(path: Path, keys: Iterable[str]) -> str:
    """The one kind whose own modules the file has."""
    found = {
        kind: key
        for key in keys
        for start, kind in KINDS.items()
        if key.startswith(f"{start}.") and not key.startswith("blocks.")
    }
    if len(found) > 1:
        raise CheckpointError(
            path,
            "modules of several kinds of model are in one file: "
            + ", ".join(f"{LABELS[kind]} ({key})" for kind, key in found.items())
            + ". No known host has them all.",
        )
    return next(iter(found), "base")


def _vace_layers(sizes: _Sizes, layers: int) -> tuple[int, ...]:
    """Which blocks VACE's go with: evenly spaced from the first, as in every published model; no tensor says."""
    count = sizes.count("vace_blocks")
    if count == 0 or layers % count:
        raise CheckpointError(
            sizes.path,
            f"{count} VACE blocks do not go evenly with {layers} blocks, and nothing in the file says which blocks "
            "they belong to. Build the model from its config and patch it with this file.",
        )
    return tuple(range(0, layers, layers // count))


def _animate(sizes: _Sizes, layers: int) -> Animate:
    convs = "motion_encoder.enc.net_app.convs"
    blocks = sizes.count(convs) - 2  # one convolution before them, one after
    adapters = sizes.count("face_adapter.fuser_blocks")
    if blocks != MOTION_BLOCKS or adapters == 0 or layers % adapters:
        raise CheckpointError(
            sizes.path,
            f"the motion encoder has {blocks} blocks and the face adapter {adapters} beside {layers} layers; known "
            f"Animate models have {MOTION_BLOCKS} and one in 5. Build the model from its config and patch it.",
        )
    face_dim = sizes.size("face_encoder.conv2.conv.weight", 0)
    channels = {"512": sizes.size(f"{convs}.0.0.weight", 0)}
    channels |= {
        str(512 >> n): sizes.size(f"{convs}.{n}.conv2.1.weight", 0) for n in range(1, MOTION_BLOCKS + 1)
    }
    return Animate(
        motion_dim=sizes.size("motion_encoder.dec.direction.weight", 1),
        motion_out=sizes.size("motion_encoder.dec.direction.weight", 0),
        style_dim=sizes.size("motion_encoder.enc.fc.0.weight", 0),
        face_dim=face_dim,
        face_heads=sizes.size("face_encoder.conv1_local.conv.weight", 0) // face_dim,
        pose_channels=sizes.size("pose_patch_embedding.weight", 1),
        every=layers // adapters,
        channels=channels,
    )

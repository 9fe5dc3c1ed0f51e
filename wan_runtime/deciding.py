"""Which dialect a file is in, by its marks; and what its weights say where marks leave the scales' layout open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from wan_runtime import evidence
from wan_runtime.dialects import DIALECTS, Dialect, Layer, Reading, identify
from wan_runtime.errors import AmbiguousDialect, CheckpointError
from wan_runtime.header import Header

# Model Optimizer's post-process (C5) marks its files and leaves one thing open, which only the scales themselves can
# show: the two readings have the same nibbles.
BY_LAYOUT = {"plain": "modelopt", "swizzled": "modelopt_comfy"}


def decide(header: Header, named: str | None = None) -> tuple[Dialect, str]:
    """Decide which dialect wrote the file, and the evidence in words.

    The weights are asked only where marks leave several readings. They settle the layout of a file whose marks say
    everything else; of a file without marks they settle nothing, and the error says what they suggest.
    Raises AmbiguousDialect, UnknownDialect.
    """
    try:
        dialect, because = identify(header, named)
    except AmbiguousDialect as ambiguous:
        return _by_layout(header, ambiguous)
    return dialect if named is None else _insisted(dialect), because


def _insisted(dialect: Dialect) -> Dialect:
    """A dialect that the caller named. Where the file cannot be read as it, the error says what its marks say too."""

    def read(header: Header) -> Reading:
        try:
            return dialect.read(header)
        except CheckpointError as error:
            error.args = (f"{error}{_otherwise(header, dialect)}",)
            raise

    return replace(dialect, read=read)


def _otherwise(header: Header, named: Dialect) -> str:
    """The remedy for a wrong name, or "" where the file does not say a better one."""
    try:
        marked, because = decide(header)
    except CheckpointError:
        return ""
    if marked.name == named.name:
        return ""
    return (
        f" It was read as {named.name} because the caller named that. Leave --dialect (dialect=... in Python) out: the "
        f"file is then read as {marked.name} ({because})."
    )


def _by_layout(header: Header, ambiguous: AmbiguousDialect) -> tuple[Dialect, str]:
    keys = [key for key in header.entries if key.endswith(".weight_scale")]
    found = evidence.layouts(header, keys)
    if ambiguous.candidates.keys() == set(BY_LAYOUT.values()) and found.answer is not None:
        return DIALECTS[BY_LAYOUT[found.answer]], f"{ambiguous.why} {_sentence(found.words)}"
    asked = [found, *_nibbles(header, ambiguous, found.answer)]
    said = " ".join(_sentence(finding.words) for finding in asked)
    note = "Without a mark, that decides nothing alone." if any(f.answer for f in asked) else ""
    raise AmbiguousDialect(
        header.path, " ".join(filter(None, (ambiguous.why, said, note))), ambiguous.candidates
    ) from None


def _nibbles(header: Header, ambiguous: AmbiguousDialect, layout: str | None) -> list[evidence.Finding]:
    """What the nibble test suggests, under the reading whose layout the layout test found."""
    name = BY_LAYOUT.get(layout or "")
    if name is None or "modelopt" not in ambiguous.candidates or "comfy" not in ambiguous.candidates:
        return []
    try:
        finding = evidence.nibble_test(header, DIALECTS[name].read(header).layers)
    except (CheckpointError, ValueError):
        return []  # that reading does not fit at all; the caller hears of it if it is chosen
    order = {"right": "low", "swapped": "high"}.get(finding.answer or "")
    if order is None:
        return [finding]
    return [evidence.Finding(order, f"the nibble test says that the even element is in the {order} nibble")]


def hold(header: Header, dialect: str, because: str, layers: Mapping[str, Layer]) -> None:
    """Refuse a file whose weights contradict by a wide margin how its marks have it read; reads a few layers.

    layers: module as spelled in the file -> its layer. Raises CheckpointError, with both facts.
    """
    found = contradiction(header, layers)
    if found is not None:
        raise CheckpointError(
            header.path,
            f"its marks and its weights contradict each other. It would be read as {dialect} ({because}), and "
            f"{found}. One of the two is wrong, and a wrong reading is noise: give the bf16 file that it "
            f"was made from with --reference FILE, or insist with --dialect {dialect} (dialect=... in Python).",
        )


def contradiction(header: Header, layers: Mapping[str, Layer]) -> str | None:
    """What the weights say by a wide margin against how they are read, in words; reads a few layers."""
    try:
        findings = (evidence.read_layouts(header, layers), evidence.nibble_test(header, layers))
    except ValueError:
        return None  # a tensor that does not fit its layer: reading it names it
    return next((f.words for f in findings if f.wide and f.answer != "right"), None)


def readings(ambiguous: AmbiguousDialect) -> list[str]:
    """The dialects to hold against a reference: what fits, and of NVFP4 also the reading whose mark may be lost."""
    extra = BY_LAYOUT.values() if "modelopt" in ambiguous.candidates else ()
    return list(dict.fromkeys((*ambiguous.candidates, *extra)))


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + "."

"""`input_reference`, the image that a clip starts from, in each of the ways that clients send it.

As an uploaded file, as a URL, as an object with one (`{"image_url": ...}`), or as that object's bracketed form fields.
A data URL is decoded here. What comes out is the image's content, or the address that it is yet to be fetched from.
"""

from __future__ import annotations

import binascii
import hashlib
import re
from collections.abc import Mapping
from typing import Any

from .errors import ApiError

FIELD = "input_reference"
DATA_URL = re.compile(r"data:[^,]{0,200}?(;base64)?,", re.IGNORECASE)
Reference = bytes | str


def is_reference(name: str) -> bool:
    """Whether a form's field belongs to the start image."""
    return name.partition("[")[0] == FIELD


def take_reference(fields: Mapping[str, Any]) -> tuple[dict[str, Any], Reference | None]:
    """The fields with the start image replaced by what identifies it (SHA-256 or URL), and the image's content or URL.

    Raises ApiError for what is neither a file nor a URL, and for two images.
    """
    own = {name: value for name, value in fields.items() if is_reference(name)}
    rest: dict[str, Any] = {name: value for name, value in fields.items() if name not in own}
    if not own:
        return rest, None
    if len(own) > 1:
        raise ApiError(
            400, "duplicate_parameter", f"{FIELD} was sent in {len(own)} ways: send one.", param=FIELD
        )
    ((name, value),) = own.items()
    reference = _reference(name, value)
    digest = f"sha256:{hashlib.sha256(reference).hexdigest()}" if isinstance(reference, bytes) else reference
    return {**rest, FIELD: digest}, reference


def _reference(name: str, value: Any) -> Reference:
    if name == FIELD and isinstance(value, bytes):
        return value
    if name == FIELD and isinstance(value, dict):
        if len(value) != 1:
            raise _invalid('is an object with other members than one: send {"image_url": ...}')
        ((member, value),) = value.items()
        name = f"{FIELD}[{member}]"
    if name not in (FIELD, f"{FIELD}[image_url]"):
        raise _invalid(
            f"has {name[:80]!r}, which is not taken: no files are kept here. Send a file or an image_url"
        )
    if not isinstance(value, str):
        raise _invalid(f"has a {type(value).__name__} where a URL belongs")
    return _decoded(value) if value[:5].lower() == "data:" else value


def _decoded(url: str) -> bytes:
    head = DATA_URL.match(url)
    if head is None or head[1] is None:
        raise _invalid("is a data URL that is not base64: it begins as `data:image/png;base64,`")
    try:
        return binascii.a2b_base64(_plain(url[head.end() :]), strict_mode=True)
    except ValueError as error:
        raise _invalid(f"is a data URL whose base64 is damaged: {error}") from None


def _plain(encoded: str) -> str:
    """base64 in a URL may have its signs behind percent signs. Other characters never need it, and to look for them all
    would take seconds and gigabytes where a client has sent nothing else."""
    for written, sign in (("%2B", "+"), ("%2F", "/"), ("%3D", "=")) if "%" in encoded else ():
        encoded = encoded.replace(written, sign).replace(written.lower(), sign)
    return encoded


def _invalid(why: str) -> ApiError:
    return ApiError(422, f"invalid_{FIELD}", f"{FIELD} {why}.", param=FIELD)

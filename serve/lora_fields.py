"""The field `lora` of a create: a name, or a list of names and objects with a name and a strength.

A form has it as `lora=film`, or bracketed, as the `openai` client writes it: `lora[]=film`, or `lora[][name]=film` with
`lora[][strength]=0.8`. The brackets carry no numbers, so where some objects have a strength and some have none nobody
could say whose it is: then it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from wan_runtime import Lora

from .errors import ApiError

FIELD = "lora"
LISTS = tuple(
    f"{FIELD}[]{rest}" for rest in ("", "[name]", "[strength]")
)  # fields that may come again in a form
SINGLE = {f"{FIELD}[{member}]": member for member in ("name", "strength")}


class LoraChoice(BaseModel):
    """One LoRA of the operator's folder, and how strongly it acts."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str
    strength: float = Field(1.0, ge=-4, le=4)


ONE = {"type": "string"}
CHOICE = LoraChoice.model_json_schema()
SCHEMA = {
    "description": "LoRAs by name, as /v1/models lists them.",
    "oneOf": [ONE, {"type": "array", "maxItems": 4, "items": {"oneOf": [ONE, CHOICE]}}],
}


def take_loras(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with `lora` as a list of objects, however it was written. Raises ApiError 422 where it is unclear."""
    own = {name: value for name, value in fields.items() if name.partition("[")[0] == FIELD}
    rest: dict[str, Any] = {name: value for name, value in fields.items() if name not in own}
    if not own:
        return rest
    if set(own) == {FIELD}:
        given = own[FIELD]
    elif set(own) == {LISTS[0]}:
        given = own[LISTS[0]]
    elif set(own) <= set(SINGLE):
        given = [{SINGLE[name]: value for name, value in own.items()}]
    elif set(own) <= set(LISTS[1:]):
        names, strengths = own.get(LISTS[1], []), own.get(LISTS[2], [])
        if strengths and len(strengths) != len(names):
            raise _invalid(
                f"has {len(names)} names and {len(strengths)} strengths: give every one its strength"
            )
        given = [
            {"name": name} | ({"strength": strengths[n]} if strengths else {}) for n, name in enumerate(names)
        ]
    else:
        raise _invalid(f"is written as {', '.join(sorted(own))[:80]}, which is not one of the ways")
    choices = given if isinstance(given, list) else [given]
    return {**rest, FIELD: [{"name": one} if isinstance(one, str) else one for one in choices]}


def strengths_of(choices: list[LoraChoice] | None, known: Mapping[str, Lora] | None) -> dict[str, float]:
    """Each LoRA's strength by its name. Raises ApiError 422 for one that is not there, or is named twice."""
    if choices and known is None:
        message = "This server has no LoRAs: its operator gave no --lora-dir."
        raise ApiError(422, "lora_unsupported", message, param=FIELD)
    strengths: dict[str, float] = {}
    for choice in choices or ():
        if choice.name not in (known or {}):
            listed = ", ".join(list(known or {})[:20]) or "none"
            message = f"There is no LoRA named {choice.name[:80]!r} here; there are: {listed}."
            raise ApiError(422, "lora_not_found", message, param=FIELD)
        if choice.name in strengths:
            raise _invalid(f"names {choice.name!r} twice")
        strengths[choice.name] = choice.strength
    return strengths


def _invalid(why: str) -> ApiError:
    return ApiError(422, f"invalid_{FIELD}", f"{FIELD} {why}.", param=FIELD)

"""Messages for a configuration that pydantic refuses: which field, what is wrong, and the fix."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fedrounds.fl_components.config.tree import FederationConfig
from fedrounds.fl_components.rules import PluginUnion

RENAMED: Final = {
    "training.proximal": "training.objective: {kind: proximal, mu: ...}",
    "training.straggler_fraction": "simulation.stragglers: {fraction: ...}",
    "training.drop_stragglers": "simulation.stragglers: {fraction: ..., drop: ...}",
    "selection.availability": "simulation.availability",
    "aggregation.max_update_norm": "admission.max_update_norm",
    "network": "simulation.network",
    "simulation.network.spread": "simulation.network.log_std",
    "broadcast.against": "broadcast.mode: full (was nothing) or delta (was previous)",
    "training.privacy.when_exhausted": "training.privacy.on_exhausted: skip_client (was go_on) or stop_run (was end)",
}
"""Fields that a configuration may still have, and what replaced them."""

_WORDS = {
    "Input should be": "it must be",
    "String should": "it must",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "text",
    "a valid boolean": "true or false",
    ", unable to parse string as an integer": "",
    ", unable to parse string as a number": "",
    ", unable to interpret input": "",
    ", got a number with a fractional part": "",
}


def sentences(error: ValidationError) -> list[str]:
    """Return a sentence for each problem that pydantic has with a configuration, each once."""
    problems = [details for details in error.errors() if details["type"] != "default_factory_not_called"]
    return list(
        dict.fromkeys(_sentence(details) for details in problems if not _follows_from_another(details, problems))
    )


def _sentence(details: ErrorDetails) -> str:
    """One plain sentence for one of pydantic's errors."""
    path, model = _locate(details["loc"])
    where, found = ".".join(path) or "the configuration", _short(details["input"])
    context = details.get("ctx", {})
    match details["type"]:
        case "extra_forbidden" | "invalid_key":
            if where in RENAMED:
                return f"{where} is now {RENAMED[where]}"
            *parent, name = path
            return f"{where} is not a field of {_group(parent, model)}{_nearest(name, _fields(model))}"
        case "missing":
            return f"{where} is missing"
        case "union_tag_invalid":
            kinds = [kind.strip(" '") for kind in context["expected_tags"].split(",")]
            tag = str(context["tag"])
            reason = _why_left_out(path, tag)
            return f"{where}.kind is {tag!r}{f'; {reason}' if reason else _nearest(tag, kinds)}"
        case "literal_error" if path[-1] == "kind" and (reason := _why_left_out(path[:-1], details["input"])):
            return f"{where} is {found}; {reason}"
        case "union_tag_not_found":
            return f"{where}.kind is missing; known are {', '.join(_kinds_of(path))}"
        case "model_type" | "model_attributes_type":
            return f"{where} is {found}; it must be a group of fields"
        case "value_error" if isinstance(details["input"], Mapping):  # a law between fields names them itself
            return str(context["error"])
        case "value_error":
            return f"{where} is {found}: {context['error']}"
        case "string_pattern_mismatch":
            return f"{where} is {found}: it must be letters, digits, '_', '.' and '-', the first a letter or digit"
        case "string_type" if isinstance(details["input"], bool | int | float):
            return f"{where} is {found}: it must be text: write it in quotes"
        case "too_short":
            return f"{where} is {found}: it must have at least {context['min_length']} item"
        case "tuple_type":
            return f"{where} is {found}: it must be a list"
        case _:
            wanted = details["msg"]
            for pydantics, ours in _WORDS.items():
                wanted = wanted.replace(pydantics, ours)
            return f"{where} is {found}: {wanted[0].lower()}{wanted[1:]}"


def _follows_from_another(details: ErrorDetails, problems: Sequence[ErrorDetails]) -> bool:
    """pydantic also finds a list too short when each of its items is wrong."""
    loc = details["loc"]
    return details["type"] == "too_short" and any(
        other["loc"][: len(loc)] == loc and len(other["loc"]) > len(loc) for other in problems
    )


def _group(path: Sequence[str], model: type[BaseModel] | None) -> str:
    if not path:
        return "a configuration"
    kinds = _kinds(model) if model is not None and len(_kinds_of(path)) > 1 else ()
    return " ".join([".".join(path), *kinds])


def _fields(model: type[BaseModel] | None) -> list[str]:
    return list(model.model_fields) if model is not None else []


def _kinds_of(path: Sequence[str]) -> list[str]:
    """The kinds of rule that a field of the configuration, perhaps a rule's own field, can hold."""
    return list(dict.fromkeys(kind for field in _fields_at(path) for each in _models(field) for kind in _kinds(each)))


def _why_left_out(path: Sequence[str], kind: object) -> str | None:
    """Why another package's rule of this kind, which the field could hold, cannot be used."""
    added = [each for field in _fields_at(path) for each in field.metadata if isinstance(each, PluginUnion)]
    return next((each.left_out[kind] for each in added if isinstance(kind, str) and kind in each.left_out), None)


def _fields_at(path: Sequence[str]) -> list[FieldInfo]:
    """What `path` may name: a field of the configuration or of the rules that the field above it can hold."""
    models: list[type[BaseModel]] = [FederationConfig]
    fields: list[FieldInfo] = []
    for name in path:
        fields = [model.model_fields[name] for model in models if name in model.model_fields]
        models = list(dict.fromkeys(each for field in fields for each in _models(field)))
    return fields


def _short(value: Any) -> str:
    """A value as YAML writes it, shortened.

    >>> _short(True), _short(16**5000)
    ('true', 'a whole number of more than 4300 digits')
    """
    try:
        text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    except ValueError:  # Python writes no longer ones
        return f"a whole number of more than {sys.get_int_max_str_digits()} digits"
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def _locate(loc: Sequence[int | str]) -> tuple[list[str], type[BaseModel] | None]:
    """pydantic's location without the tags of unions, and the model whose field its last part is (or would be)."""
    remaining = [str(part) for part in loc]
    path: list[str] = []
    model: type[BaseModel] | None = FederationConfig
    while remaining:
        path.append(remaining.pop(0))
        if remaining and model is not None:
            field = model.model_fields.get(path[-1])
            candidates = _models(field) if field else []
            if len(candidates) > 1:  # a union: the next part is the tag, which people do not write
                tag = remaining.pop(0)
                candidates = [candidate for candidate in candidates if tag in _kinds(candidate)]
            model = candidates[0] if candidates else None
    return path, model


def _models(field: FieldInfo) -> list[type[BaseModel]]:
    """The rules that a field can hold, those of other packages among them."""
    added = [rule for each in field.metadata if isinstance(each, PluginUnion) for rule in each.rules]
    return [*_models_in(field.annotation), *added]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    kind = model.model_fields.get("kind")
    return get_args(kind.annotation) if kind is not None else ()

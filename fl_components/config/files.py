"""Configurations from files, trees of plain values and overrides."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedrounds.fl_components.config.messages import sentences
from fedrounds.fl_components.config.tree import FederationConfig
from fedrounds.fl_components.config.yaml_text import LARGEST_BYTES, parse_yaml
from fedrounds.fl_components.errors import ConfigError

PATHS = ("folder", "file")
"""The fields of rules that are paths."""


def parse_config(fields: Mapping[str, Any]) -> FederationConfig:
    """Return the configuration that `fields` (a tree of plain values) describes. Raises `ConfigError`."""
    try:
        return FederationConfig.model_validate(fields)
    except ValidationError as error:
        raise ConfigError("; ".join(sentences(error)), hint="`fedrounds config schema` lists every field") from None


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> FederationConfig:
    """Return the configuration in a YAML file (or in a tree of plain values), with overrides of the form `a.b=value`.

    A rule's relative folder or file is taken from the configuration's own folder (the working one where it has none).
    Raises `ConfigError`.
    """
    return parse_config(load_fields(source, overrides))


def load_fields(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the same as a tree of plain values, as it is written: no field is checked, no default filled in."""
    fields = dict(source) if isinstance(source, Mapping) else _read_yaml(Path(source))
    try:
        for override in overrides:
            fields = _with_override(fields, override)
        return with_absolute_paths(fields, source_folder(source))
    except RecursionError:
        raise ConfigError("the configuration is nested too deeply, or holds itself") from None


def source_folder(source: str | Path | Mapping[str, Any] | None) -> Path:
    """Return where a configuration's relative paths and modules are looked for: its folder, else the working one.

    A link is not followed: what lies beside it is meant, and where it leads may have another name tomorrow (a
    Kubernetes ConfigMap).
    """
    return Path(source).absolute().parent if isinstance(source, str | Path) else Path.cwd()


def is_moved(recorded: Any, given: Any, recorded_folder: str, folder: str) -> bool:
    """Return whether `given` is the configuration `recorded`, perhaps with the whole project in another folder.

    Both are trees of plain values. A folder or file counts as the same when it is the same from its own project's
    folder.

    >>> is_moved({"data": {"folder": "/old/wards"}}, {"data": {"folder": "/new/wards"}}, "/old", "/new")
    True
    >>> is_moved({"data": {"folder": "/old/wards"}}, {"data": {"folder": "/new/others"}}, "/old", "/new")
    False
    """
    if not isinstance(recorded, Mapping) or not isinstance(given, Mapping):
        return bool(recorded == given)
    if recorded.keys() != given.keys():
        return False
    for name, value in recorded.items():
        if name in PATHS and isinstance(value, str):
            moved = os.path.normpath(os.path.join(folder, os.path.relpath(value, recorded_folder or "/")))
            if given[name] not in (value, moved):
                return False
        elif name == "arguments":
            if value != given[name]:
                return False
        elif not is_moved(value, given[name], recorded_folder, folder):
            return False
    return True


def with_absolute_paths(fields: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Return `fields` with each relative folder or file of a rule taken from `base`; users' arguments stay."""
    return {name: _absolute(value, base) for name, value in fields.items()}


def _absolute(value: Any, base: Path) -> Any:
    if not isinstance(value, Mapping):
        return value
    found = {name: each if name == "arguments" else _absolute(each, base) for name, each in value.items()}
    for name in PATHS:
        if isinstance(found.get(name), str):
            try:
                found[name] = os.path.abspath(base / Path(found[name]).expanduser())
            except RuntimeError as error:  # ~ of an account without a home folder
                raise ConfigError(f"{name} is {found[name]!r}: {error}", hint="write the whole path") from error
    return found


def with_value(fields: Mapping[str, Any], field: str, value: Any) -> dict[str, Any]:
    """Return `fields` with one value replaced.

    Raises `ConfigError` when what stands above `field` is no group of fields.

    >>> with_value({"training": {"epochs": 1}}, "training.learning_rate", 0.1)
    {'training': {'epochs': 1, 'learning_rate': 0.1}}
    """
    return _set(fields, (), field.split("."), value, f"{field}={value}")


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """Return a field and the values that it takes in a sweep: YAML values, split at the commas outside brackets.

    >>> parse_axis("training.learning_rate=0.01,0.1"), parse_axis("model.hidden=[64, 32],[128]")
    (('training.learning_rate', [0.01, 0.1]), ('model.hidden', [[64, 32], [128]]))
    """
    field, equals, values = text.partition("=")
    if not equals or not all(field.split(".")):
        raise ConfigError(
            f"{text!r} is not of the form a.b=value,value", hint="for instance training.learning_rate=0.01,0.1"
        )
    try:
        parsed = parse_yaml(f"[{values}]")
    except ValueError as error:
        raise ConfigError(f"the values in {text!r} cannot be read as YAML: {error}") from error
    if not isinstance(parsed, list) or not parsed:
        raise ConfigError(f"{text!r} gives no values to {field}", hint=f"for instance {field}=1,2,3")
    return field, parsed


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no configuration file {path}", hint="examples/heart_disease.yaml is one to start from"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL, or that is not UTF-8
        raise ConfigError(
            f"the configuration file {str(path)!r} cannot be read: {error}",
            hint="name a file that this account may read",
        ) from error
    try:
        fields = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} holds no fields", hint="examples/heart_disease.yaml is one to start from")
    return fields


def _with_override(fields: Mapping[str, Any], override: str) -> dict[str, Any]:
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(f"{override!r} is not of the form a.b=value", hint="for instance training.learning_rate=0.1")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"the value in {override!r} cannot be read as YAML: {error}") from error
    return _set(fields, (), path.split("."), value, override)


def _set(
    fields: Mapping[str, Any], above: Sequence[str], path: Sequence[str], value: Any, override: str
) -> dict[str, Any]:
    if len(path) == 1:
        return {**fields, path[0]: value}
    inner = fields.get(path[0])
    above = (*above, path[0])
    if inner is not None and not isinstance(inner, Mapping):
        raise ConfigError(f"{override!r}: {'.'.join(above)} is {inner!r}, which has no fields to set")
    return {**fields, path[0]: _set(inner or {}, above, path[1:], value, override)}

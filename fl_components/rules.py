"""Rule: a frozen pydantic model that is its own configuration and has the methods that do the work.

A family is a folder; a rule is a file in it; its `kind` tells it from the others of the family's union.
Adding a rule is one file and one name in the union.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from fl_components.errors import ConfigError, one_line


class Rule(BaseModel):
    """Base of every rule: frozen, and a field that it does not know is refused.

    >>> class Krum(Rule):
    ...     kind: str = "krum"
    ...     num_byzantine: int
    >>> Krum(num_byzantine=2)
    Krum(kind='krum', num_byzantine=2)
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _true_is_not_the_number_one(cls, fields: Any) -> Any:
        for name, value in fields.items() if isinstance(fields, Mapping) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field and {int, float} & {field.annotation, *get_args(field.annotation)}:
                raise PydanticCustomError("bool_for_number", "{field} must be a number", {"field": name})
        return fields


def import_attribute(path: str, field: str) -> Any:
    """The object that `path` ("package.module:name") names; `field` is the configuration field that holds it.

    Raises `ConfigError` when the path has another form, or the module or the name does not exist.

    >>> import_attribute("math:sqrt", "data.path")(9.0)
    3.0
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ConfigError(
            f"{field} is {path!r}, which is not an import path",
            hint="write it as package.module:name, for instance hospital.data:load",
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{field}: {module_name} imports {error.name}, which is not installed", hint=f"install {error.name}"
            ) from error
        raise ConfigError(
            f"{field}: there is no module {module_name!r}",
            hint="put it beside the configuration file, or install it",
        ) from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{field}: importing {module_name} failed: {one_line(error)}") from error
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise ConfigError(f"{field}: module {module_name} has no {name!r}") from error

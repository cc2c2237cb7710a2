"""Rule: a frozen pydantic model that is its own configuration and has the methods that do the work.

A family is a folder; a rule is a file in it; its `kind` tells it from the others of the family's union.
Adding a rule is one file and one name in the union, or an entry point in another package (`union`).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, Union, get_args

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, PydanticUserError, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

from fl_components.errors import ConfigError, LeftOut, one_line


class Rule(BaseModel):
    """Base of every rule: frozen, and a field that it does not know is refused.

    >>> class Krum(Rule):
    ...     kind: str = "krum"
    ...     num_byzantine: int
    >>> Krum(num_byzantine=2)
    Krum(kind='krum', num_byzantine=2)
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        defer_build=True,  # until its first use: see `Added`
    )

    @model_validator(mode="before")
    @classmethod
    def _true_is_not_the_number_one(cls, fields: Any) -> Any:
        for name, value in fields.items() if isinstance(fields, Mapping) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field and {int, float} & {field.annotation, *get_args(field.annotation)}:
                raise PydanticCustomError("bool_for_number", "{field} must be a number", {"field": name})
        return fields

    @model_validator(mode="before")
    @classmethod
    def _the_default_s_kind_may_be_left_out(cls, fields: Any) -> Any:
        if not isinstance(fields, Mapping):
            return fields
        found = dict(fields)
        for name, field in cls.model_fields.items():
            value, kind = found.get(name), getattr(field.default, "kind", None)
            if kind is not None and isinstance(value, Mapping) and "kind" not in value:
                found[name] = {"kind": kind, **value}
        return found


def union(family: str, *built_in: type[Rule]) -> Any:
    """The type of a configuration field that holds one rule of a family, told from the others by its `kind`.

    `built_in` and what installed packages name as entry points of the group ``fedrounds.<family>``, for instance in
    their pyproject.toml::

        [project.entry-points."fedrounds.models"]
        wide_net = "hospital_models:WideNet"
    """
    return Annotated[Union[built_in], Added(family, built_in)]  # noqa: UP007 (made at run time)


class Added:
    """What installed packages add to a family.

    Their modules are imported when a field of the family is first used. Earlier they could not be: they import the
    families themselves, perhaps several of them. An entry point that is no rule of a new kind is left out with a
    warning that names it: one broken package must not stop all others.

    Args:
      family, built_in: the family's name and its own rules.
      left_out: entry points that cannot be used: by name, a sentence with the package and the reason.
    """

    def __init__(self, family: str, built_in: tuple[type[Rule], ...]) -> None:
        self.family = family
        self.built_in = built_in
        self.left_out: dict[str, str] = {}

    @cached_property
    def rules(self) -> dict[type[Rule], EntryPoint]:
        """The rules that can be used, and where each comes from."""
        found: dict[type[Rule], EntryPoint] = {}
        for entry in entry_points(group=f"fedrounds.{self.family}"):
            try:
                found[self._load(entry, {kind_of(rule): rule for rule in (*self.built_in, *found)})] = entry
            except (Exception, SystemExit) as error:
                self._leave_out(entry, one_line(error))
        return found

    def _load(self, entry: EntryPoint, known: Mapping[str, type[Rule]]) -> type[Rule]:
        rule = entry.load()
        bases = set.intersection(*({base for base in each.__mro__ if issubclass(base, Rule)} for each in self.built_in))
        of_family = bases - {Rule, *self.built_in}  # what all of it derive from, and the least that they ask
        base = min(of_family, key=lambda each: len(each.__mro__), default=Rule)
        if not isinstance(rule, type) or not issubclass(rule, base):
            raise TypeError(f"it is no {base.__qualname__}")
        if missing := getattr(rule, "__abstractmethods__", None):
            raise TypeError(f"it has no {' and no '.join(sorted(missing))}")
        if kind_of(rule) in known:
            raise TypeError(f"the kind {kind_of(rule)!r} exists already, as {known[kind_of(rule)].__qualname__}")
        return rule

    def _leave_out(self, entry: EntryPoint, reason: str) -> None:
        package = entry.dist.name if entry.dist is not None else "an installed package"
        self.left_out[entry.name] = (
            f"{entry.name} of {package} ({entry.value}, group {entry.group}) is left out: {reason}"
        )
        warnings.warn(self.left_out[entry.name], LeftOut, stacklevel=3)

    def __get_pydantic_core_schema__(self, built_in: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        for rule, entry in list(self.rules.items()):
            try:
                handler.generate_schema(rule)
            except PydanticUserError as error:  # a field of a type that pydantic cannot check
                if self.rules.pop(rule, None) is not None:
                    self._leave_out(entry, str(error).splitlines()[0])
        rules = (*self.built_in, *self.rules)
        if len(rules) == 1:
            return handler(built_in)
        return handler.generate_schema(Annotated[Union[rules], Field(discriminator="kind")])  # noqa: UP007


def kind_of(rule: type[BaseModel]) -> str:
    """The word that a configuration names this rule by. Raises TypeError when it has none."""
    field = rule.model_fields.get("kind")
    names = get_args(field.annotation) if field is not None else ()
    if len(names) != 1:
        raise TypeError(f'{rule.__qualname__} has no kind; give it `kind: Literal["name"] = "name"`')
    return str(names[0])


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

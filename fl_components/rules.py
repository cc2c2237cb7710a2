"""Rule: a frozen pydantic model that is its own configuration and has the methods that do the work.

A family is a folder; a rule is a file in it; its `kind` tells it from the others of the family's union.
Adding a rule is one file and one name in the union, or an entry point in another package (`union`).
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import warnings
from collections.abc import Mapping
from functools import cached_property
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any, Union, get_args

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, PydanticUserError, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from fedrounds.fl_components.errors import ConfigError, PluginSkipped, one_line


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
        defer_build=True,  # until its first use: see `PluginUnion`
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema: CoreSchema = _strict(handler(source), cls)
        return schema

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


_INNER = ("schema", "fields", "items_schema", "keys_schema", "values_schema", "choices")
"""Where a core schema holds others."""


def _strict(schema: Any, rule: type[Rule]) -> Any:
    """The core schema of `rule` in which, at any depth, true is no number, a number no truth value and a text no count.

    The rules that it holds have theirs already.
    """
    if isinstance(schema, list | tuple):
        return type(schema)(_strict(each, rule) for each in schema)
    if not isinstance(schema, Mapping) or (schema.get("type") == "model" and schema["cls"] is not rule):
        return schema
    match schema.get("type"):
        case "bool":
            return {**schema, "strict": True}
        case "int":
            return core_schema.no_info_before_validator_function(_whole_number, {**schema})
        case "float":
            return core_schema.no_info_before_validator_function(_number, {**schema})
        case "union" if any(_choice(each) == "bool" for each in schema["choices"]):
            return schema  # takes each value for what it is
    return {
        name: _of_fields(inner, rule) if name == "fields" else _strict(inner, rule) if name in _INNER else inner
        for name, inner in schema.items()
    }


def _of_fields(fields: Any, rule: type[Rule]) -> Any:
    return {name: _strict(each, rule) for name, each in fields.items()} if isinstance(fields, dict) else fields


def _choice(choice: Any) -> Any:
    schema = choice[0] if isinstance(choice, tuple) else choice
    return schema.get("type")


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("not_a_number", "it must be a number")
    return value


def _whole_number(value: Any) -> Any:
    if isinstance(value, bool | str):
        quoted = isinstance(value, str) and value.strip().lstrip("+-").isdecimal()
        raise PydanticCustomError(
            "not_a_number", "it must be a whole number" + (", written without quotes" if quoted else "")
        )
    if isinstance(value, int) and not -MAX_WHOLE - 1 <= value <= MAX_WHOLE:
        raise PydanticCustomError("not_a_number", "it must be a whole number of at most 64 bits")
    return value


MAX_WHOLE = 2**63 - 1
"""The largest whole number that is accepted."""


def union(family: str, *built_in: type[Rule]) -> Any:
    """The type of a configuration field that holds one rule of a family, told from the others by its `kind`.

    `built_in` and what installed packages name as entry points of the group ``fedrounds.<family>``, for instance in
    their pyproject.toml::

        [project.entry-points."fedrounds.models"]
        wide_net = "hospital_models:WideNet"
    """
    return Annotated[Union[built_in], PluginUnion(family, built_in)]  # noqa: UP007 (made at run time)


class PluginUnion:
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
        warnings.warn(self.left_out[entry.name], PluginSkipped, stacklevel=3)

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

    Raises `ConfigError` when the path has another form, or the module or the name does not exist, and when a source
    file of it has changed since this process imported it: what would run is not what is there to read.

    >>> import_attribute("math:sqrt", "data.path")(9.0)
    3.0
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ConfigError(
            f"{field} is {path!r}, which is not an import path",
            hint="write it as package.module:name, for instance hospital.data:load",
        )
    _check_unchanged(module_name, field)
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
    _note_sources(module_name)
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise ConfigError(f"{field}: module {module_name} has no {name!r}") from error


_sources: dict[str, tuple[ModuleSpec | None, Path, str]] = {}
"""By module: what it was imported as (a reload makes a new one), from which file, and the digest of its content."""


def _note_sources(module_name: str) -> None:
    """Note the sources of a user's module and of the modules beside it, unless they are noted already."""
    folder = _folder_of(module_name)
    if folder is None:
        return
    installed = "site-packages" in folder.parts or "dist-packages" in folder.parts
    for name, module in list(sys.modules.items()):
        source, spec = getattr(module, "__file__", None), getattr(module, "__spec__", None)
        if not isinstance(source, str) or not source.endswith(".py") or not Path(source).is_relative_to(folder):
            continue
        if "site-packages" in Path(source).parts and (
            not installed or name.partition(".")[0] != module_name.partition(".")[0]
        ):
            continue
        if name not in _sources or _sources[name][0] is not spec:
            _sources[name] = (spec, Path(source), _digest(Path(source)))


def _folder_of(module_name: str) -> Path | None:
    """The folder of a user's module, or of the package that holds it; None where it is not imported yet."""
    file = getattr(sys.modules.get(module_name.partition(".")[0]), "__file__", None)
    return Path(file).parent if file is not None else None


def _check_unchanged(module_name: str, field: str) -> None:
    """Raise `ConfigError` where a source beside the module has changed since this process imported it."""
    folder = _folder_of(module_name)
    for name, (spec, source, digest) in list(_sources.items()):
        module = sys.modules.get(name)
        if module is None or getattr(module, "__spec__", None) is not spec:
            del _sources[name]  # it is imported again, or was reloaded
        elif folder is None or not source.is_relative_to(folder):
            continue  # of another project
        elif source.exists() and _digest(source) != digest:
            raise ConfigError(
                f"{field}: {source} has changed since this process imported it",
                hint=f"restart the process (in a notebook, its kernel), or reload it: importlib.reload({name})",
            )


def _digest(source: Path) -> str:
    return hashlib.sha256(source.read_bytes()).hexdigest()

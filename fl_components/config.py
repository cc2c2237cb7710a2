"""FederationConfig: a whole experiment as one frozen tree of rules, and the laws between its fields.

A configuration that makes no sense is refused when it is read, with a sentence that names the field (or the two
fields that disagree) and what would mend it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fedrounds.fl_components.admission import Admission
from fedrounds.fl_components.aggregation import Aggregation, LinearAggregator, Mean
from fedrounds.fl_components.canonical import canonical_json
from fedrounds.fl_components.compression import Broadcast, Compression, NoCompression
from fedrounds.fl_components.data import Data, TargetReader
from fedrounds.fl_components.errors import ConfigError
from fedrounds.fl_components.executors import Execution, LocalExecution
from fedrounds.fl_components.models import Model
from fedrounds.fl_components.population import Selection, Simulation, Uniform
from fedrounds.fl_components.privacy import CentralPrivacy, Claim, ClaimContext, NoPrivacy, Privacy
from fedrounds.fl_components.rules import MAX_WHOLE, PluginUnion, Rule
from fedrounds.fl_components.server_optimizers import FedAvg, ServerOptimizer
from fedrounds.fl_components.targets import TargetType
from fedrounds.fl_components.task import Classification, Task
from fedrounds.fl_components.training import Evaluation, Training
from fedrounds.fl_components.values import Sampling

MANY = 10**9
"""Clients, where their number is not known."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
"""Of an experiment or a population, at most 100 characters."""

PATHS = ("folder", "file")
"""The fields of rules that are paths."""


class FederationConfig(Rule):
    """One experiment: what is learnt, from whom, how, and for how many rounds.

    >>> config = parse_config({
    ...     "name": "heart", "rounds": 20, "data": {"kind": "heart_disease"},
    ...     "model": {"kind": "logistic_regression"}, "training": {"learning_rate": 0.1, "epochs": 1},
    ... })
    >>> config.population, config.server_optimizer.kind
    ('heart', 'fedavg')
    """

    name: str = Field(pattern=NAME, max_length=100, description="the MLflow experiment")
    population: str = Field(
        default_factory=lambda fields: fields["name"],
        pattern=NAME,
        max_length=100,
        description="clients that share one privacy budget; the name when it is not given",
    )
    rounds: int = Field(ge=1, le=1_000_000_000)
    seed: int = Field(default=0, ge=0, description="decides all public randomness")
    data: Data
    task: Task = Classification()
    model: Model
    training: Training
    selection: Selection = Uniform()
    simulation: Simulation = Simulation()
    compression: Compression = NoCompression()
    broadcast: Broadcast = Broadcast()
    admission: Admission = Admission()
    aggregation: Aggregation = Mean()
    server_optimizer: ServerOptimizer = FedAvg()
    privacy: Privacy = NoPrivacy()
    evaluation: Evaluation = Evaluation()
    execution: Execution = LocalExecution()

    @field_validator("name", "population", mode="before")
    @classmethod
    def _names_may_look_like_numbers(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("evaluation")
    @classmethod
    def _metrics_are_written_out(cls, evaluation: Evaluation, info: ValidationInfo) -> Evaluation:
        return evaluation.resolved(info.data["task"]) if "task" in info.data else evaluation

    @model_validator(mode="after")
    def _laws(self) -> FederationConfig:
        check_task(self)
        num_clients = self.data.known_num_clients()
        if num_clients is not None:
            check_cohort(self, num_clients)
            check_compression(self, num_clients)
        check_schedule(self)
        check_stragglers(self)
        check_claims(self, num_clients)
        return self

    def sampling(self, num_clients: int) -> Sampling:
        """Return how a round's cohort is drawn from `num_clients`. It has a fixed size only where no client is ever
        away: whoever fills an absent client's place is no uniform draw."""
        sampling = self.selection.sampling(num_clients)
        if sampling.kind == "fixed_size" and not self.simulation.always_available:
            return replace(sampling, kind="other")
        return sampling

    @property
    def claims_made(self) -> tuple[Claim, ...]:
        """What is promised: about clients first, then about their examples."""
        return tuple(each for each in (self.privacy, self.training.privacy) if isinstance(each, Claim))

    @property
    def charged_claims(self) -> tuple[Claim, ...]:
        """The claims that rounds are paid for."""
        return tuple(each for each in self.claims_made if each.is_charged)

    @property
    def claims(self) -> bool:
        """Whether anything is promised, about clients or about their examples."""
        return bool(self.claims_made)

    @property
    def protects_clients(self) -> bool:
        """Whether a claim protects all that a client holds: then who takes part must not be shown."""
        return any(each.unit == "client" for each in self.claims_made)

    @property
    def central(self) -> CentralPrivacy | None:
        """The claim for which the server adds the noise."""
        return self.privacy if isinstance(self.privacy, CentralPrivacy) else None

    @property
    def claimed_steps(self) -> int:
        """The local steps of a client's round for which it draws private batches; 0 where it draws none."""
        return self.training.private_steps if self.training.example_level is not None else 0


def check_task(config: FederationConfig) -> None:
    """Refuse data and training that do not belong to the learning task. Raises ValueError."""
    task, data, smoothing = config.task, config.data, config.training.label_smoothing
    if smoothing and not task.smooths_labels:
        raise ValueError(
            f"training.label_smoothing is {smoothing:g} but task.kind is {task.kind}, whose targets are no classes; "
            "leave training.label_smoothing out"
        )
    if task.targets is TargetType.CLASS:
        return
    if not isinstance(data, TargetReader):
        raise ValueError(
            f"task.kind is {task.kind} but the targets of data.kind {data.kind} are classes; use data.kind tables or "
            "function, or task.kind classification"
        )
    if getattr(data, data.class_field) is not None:
        raise ValueError(
            f"task.kind is {task.kind} but data.{data.class_field} is given, which says what the classes are; leave "
            f"data.{data.class_field} out"
        )


def check_cohort(config: FederationConfig, num_clients: int) -> None:
    """The laws between the selection and the number of clients. Raises ValueError."""
    cohort_size = config.selection.cohort_size_of(num_clients)
    if cohort_size > num_clients:
        raise ValueError(
            f"selection.cohort_size is {cohort_size} but data {config.data.kind} has {num_clients} clients; "
            f"make selection.cohort_size at most {num_clients}"
        )
    most = config.selection.max_cohort_size_of(num_clients)
    if config.selection.min_updates > most:
        raise ValueError(
            f"selection.min_updates is {config.selection.min_updates} but a round selects at most {most} clients: no "
            f"round could succeed; make selection.min_updates at most {most}"
        )
    config.aggregation.check(most)
    share = config.simulation.availability.mean_share
    if share is not None:
        sampling = config.sampling(num_clients)
        available = share * (sampling.rate if sampling.kind == "poisson" else 1.0) * num_clients
        expected = min(float(most), available)
        if config.selection.min_updates > max(1.0, expected):
            raise ValueError(
                f"selection.min_updates is {config.selection.min_updates} but a round expects {expected:.3g} clients, "
                "of those that are selected and there: hardly any round could succeed; lower selection.min_updates, or "
                "select more clients"
            )


def check_compression(config: FederationConfig, num_clients: int) -> None:
    """The laws between compression and the selection. Raises ValueError."""
    rule, selection = config.compression, config.selection
    everyone = config.sampling(num_clients).kind == "everyone"
    if rule.error_feedback and not everyone:
        raise ValueError(
            f"compression.error_feedback is true but selection.kind {selection.kind} draws some of {num_clients} "
            "clients: one that comes m times in n rounds makes up for what was left out n/m times as slowly; use an "
            "unbiased rule (random_k, qsgd, eden), or select every client in every round"
        )
    if config.broadcast.against == "previous" and not (everyone and config.simulation.always_available):
        raise ValueError(
            "broadcast.against is previous but not every client is there in every round: one that misses a round does "
            "not hold what the next difference is from; use broadcast.against nothing, or select every client"
        )


def check_claims(config: FederationConfig, num_clients: int | None) -> None:
    """Check the laws that privacy claims put on all other fields, as far as they can be told without the number of
    clients. Raises ValueError."""
    units = [each.unit for each in config.claims_made]
    if len(units) > len(set(units)):
        raise ValueError(
            f"privacy.kind is {config.privacy.kind} and training.privacy.kind is {config.training.privacy.kind}: both "
            f"protect the same, a {units[0]}; leave one of them out"
        )
    selection, aggregation = config.selection, config.aggregation
    is_sum = isinstance(aggregation, LinearAggregator) and not aggregation.prepare
    limit = config.admission.max_update_norm
    context = ClaimContext(
        num_clients=num_clients,
        sampling=config.sampling(MANY if num_clients is None else num_clients),
        aggregation=aggregation.kind + "".join(f" after {each.kind}" for each in aggregation.prepare),
        is_sum=is_sum,
        max_weight=aggregation.max_weight if isinstance(aggregation, LinearAggregator) else None,
        error_feedback=config.compression.error_feedback,
        min_updates=selection.min_updates if "min_updates" in selection.model_fields_set else None,
        max_update_norm=limit if limit != Admission().max_update_norm else None,
        private_statistics=config.data.private_statistics,
        withholds_cohort=config.protects_clients and not config.data.is_public,
        other_kind=config.privacy.kind,
    )
    for rule in (config.privacy, config.training.privacy):
        rule.check(context)


def check_schedule(config: FederationConfig) -> None:
    """Refuse a warm-up that outlasts the training. Raises ValueError."""
    warmup_rounds = getattr(config.training.schedule, "warmup_rounds", 0)
    if warmup_rounds and warmup_rounds >= config.rounds:
        raise ValueError(
            f"training.schedule.warmup_rounds is {warmup_rounds} but rounds is {config.rounds}: the full rate would "
            f"never be reached; make training.schedule.warmup_rounds less than {config.rounds}"
        )


def check_stragglers(config: FederationConfig) -> None:
    """Refuse stragglers that cannot do a part of their work. Raises ValueError."""
    training = config.training
    if config.simulation.stragglers is not None and training.num_units == 1:
        work = "epochs" if training.epochs else "steps"
        raise ValueError(
            f"simulation.stragglers is given and training.{work} is 1: a straggler does a part of its {work}; make "
            f"training.{work} at least 2"
        )


def parse_config(fields: Mapping[str, Any]) -> FederationConfig:
    """The configuration that `fields` (a tree of plain values) describes. Raises `ConfigError`."""
    try:
        return FederationConfig.model_validate(fields)
    except ValidationError as error:
        problems = [details for details in error.errors() if details["type"] != "default_factory_not_called"]
        sentences = [_sentence(details) for details in problems if not _follows_from_another(details, problems)]
        raise ConfigError(
            "; ".join(dict.fromkeys(sentences)), hint="`fedrounds config schema` lists every field"
        ) from None


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> FederationConfig:
    """The configuration in a YAML file (or in a tree of plain values), with overrides of the form `a.b=value`.

    A rule's relative folder or file is taken from the configuration's own folder (the working one where it has none).
    Raises `ConfigError`.
    """
    return parse_config(load_fields(source, overrides))


def load_fields(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The same as a tree of plain values, as it is written: no field is checked, no default filled in."""
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
    """`fields` with each relative folder or file of a rule taken from `base`; what a user's arguments hold stays."""
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
    """`fields` with one value replaced. Raises `ConfigError` when what stands above `field` is no group of fields.

    >>> with_value({"training": {"epochs": 1}}, "training.learning_rate", 0.1)
    {'training': {'epochs': 1, 'learning_rate': 0.1}}
    """
    return _set(fields, (), field.split("."), value, f"{field}={value}")


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """A field and the values that it takes in a sweep: YAML values, split at the commas outside brackets.

    >>> parse_axis("training.learning_rate=0.01,0.1"), parse_axis("model.hidden=[64, 32],[128]")
    (('training.learning_rate', [0.01, 0.1]), ('model.hidden', [[64, 32], [128]]))
    """
    field, equals, values = text.partition("=")
    if not equals or not all(field.split(".")):
        raise ConfigError(
            f"{text!r} is not of the form a.b=value,value", hint="for instance training.learning_rate=0.01,0.1"
        )
    try:
        parsed = _parse_yaml(f"[{values}]")
    except ValueError as error:
        raise ConfigError(f"the values in {text!r} cannot be read as YAML: {error}") from error
    if not isinstance(parsed, list) or not parsed:
        raise ConfigError(f"{text!r} gives no values to {field}", hint=f"for instance {field}=1,2,3")
    return field, parsed


def config_digest(config: FederationConfig) -> str:
    """The sha256 of the resolved configuration: two runs with equal digests were asked for the same thing."""
    return hashlib.sha256(canonical_json(config.model_dump(mode="json")).encode()).hexdigest()


def schema() -> dict[str, Any]:
    """The JSON schema of a configuration file."""
    return FederationConfig.model_json_schema()


LARGEST_BYTES = 1_000_000
MAX_NODES = 100_000
DEEPEST = 50
"""Of a YAML text: its size, its values once its aliases are written out, and how deep they are nested."""


class _Loader(yaml.SafeLoader):
    """YAML without its traps: what it would take for something else than a reader does is text, or refused.

    `yes`, `no`, `on` and `off` are text, and so are dates; 1e-3 is a number, as YAML 1.2 has it. Of two equal keys none
    wins. A number is refused that YAML reads in another base (010 is 8, 1:30 is 90) or as infinity (1e999), and so are
    aliases that multiply what is there, or hold themselves.
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _measure(node, {}, ())
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth = getattr(self, "_depth", 0) + 1
        if self._depth > DEEPEST:
            raise _refused(self.peek_event(), f"it is nested more than {DEEPEST} deep")  # type: ignore[no-untyped-call]
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = []
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *defaults`, which a key may override
                continue
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise _refused(key_node, f"the key {key!r} stands twice")
            seen.append(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        written = str(node.value)
        digits = written.lstrip("+-")
        is_int = node.tag.endswith(":int")
        if len(digits) > 400:
            raise _refused(node, f"the number {written[:10]}... has more than 400 digits")
        value: int | float = self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)
        if ":" in digits or (is_int and digits[0] == "0" and digits[1:].replace("_", "").isdecimal()):
            raise _refused(node, f"YAML reads {written} as the number {value}: write it in quotes, or write {value}")
        if math.isinf(value) and "inf" not in digits.lower():
            raise _refused(node, f"the number {written} is too large")
        if isinstance(value, int) and not -MAX_WHOLE - 1 <= value <= MAX_WHOLE:
            raise _refused(node, f"the whole number {_short(written)} has more than 64 bits")
        return value


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile("^(?:true|True|TRUE|false|False|FALSE)$") if tag.endswith(":bool") else pattern)
        for tag, pattern in resolvers
        if not tag.endswith(":timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",  # of YAML 1.2; PyYAML asks for a dot, and for a sign of the exponent
    re.compile(r"^[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"),
    list("+-.0123456789"),
)
for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


def _refused(place: yaml.Node | yaml.Event, reason: str) -> yaml.constructor.ConstructorError:
    mark: Any = place.start_mark
    return yaml.constructor.ConstructorError(None, None, reason, mark)


def _measure(
    node: yaml.Node, measured: dict[yaml.Node, tuple[int, int]], above: tuple[yaml.Node, ...]
) -> tuple[int, int]:
    """The number of values in `node`, and its depth, once its aliases are written out. Raises ConstructorError when
    these are too many."""
    if node in above:
        raise _refused(node, "the anchor here holds an alias of itself")
    if node not in measured:
        pairs = node.value if isinstance(node, yaml.CollectionNode) else []
        below = [each for pair in pairs for each in (pair if isinstance(pair, tuple) else (pair,))]
        sizes = [_measure(each, measured, (*above, node)) for each in below]
        measured[node] = 1 + sum(count for count, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
    count, depth = measured[node]
    if count > MAX_NODES:
        raise _refused(node, f"its aliases stand for more than {MAX_NODES:,} values")
    if depth > DEEPEST:
        raise _refused(node, f"it is nested more than {DEEPEST} deep")
    return count, depth


def _parse_yaml(text: str | bytes) -> Any:
    """Raises ValueError, with one line that says where, when `text` is not YAML that can be used. Bytes are UTF-8, or
    UTF-16 after a byte order mark."""
    if len(text) > LARGEST_BYTES:
        raise ValueError(f"it is larger than {LARGEST_BYTES:,} bytes")
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        raise ValueError(f"{' '.join(filter(None, [error.context, error.problem]))}{place}") from error
    except yaml.reader.ReaderError as error:
        if error.encoding == "unicode" or error.reason.startswith("special"):
            raise ValueError(f"it holds the control character {error.character:#04x}") from error
        raise ValueError(f"the byte at position {error.position} is not UTF-8 text: save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:  # of explicit tags: !!int x, !!set [1]
        raise ValueError(" ".join(str(error).split())) from error


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
        fields = _parse_yaml(text)
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
        value = _parse_yaml(text)
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


RENAMED: Final = {
    "training.proximal": "training.objective: {kind: proximal, mu: ...}",
    "training.straggler_fraction": "simulation.stragglers: {fraction: ...}",
    "training.drop_stragglers": "simulation.stragglers: {fraction: ..., drop: ...}",
    "selection.availability": "simulation.availability",
    "aggregation.max_update_norm": "admission.max_update_norm",
    "network": "simulation.network",
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

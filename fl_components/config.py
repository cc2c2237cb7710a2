"""FederationConfig: a whole experiment as one frozen tree of rules, and the laws between its fields.

A configuration that makes no sense is refused when it is read, with a sentence that names the field (or the two
fields that disagree) and what would mend it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fl_components.aggregation import AdditiveRule, Aggregation, Mean
from fl_components.clients import Always, Network, Selection, Uniform
from fl_components.compression import Broadcast, Compression, NoCompression
from fl_components.data import Data
from fl_components.errors import ConfigError
from fl_components.models import Model
from fl_components.privacy import NoPrivacy, Privacy
from fl_components.rules import Added, Rule
from fl_components.server_optimizers import FedAvg, ServerOptimizer
from fl_components.training import Evaluation, Execution, LocalExecution, Training

MANY = 10**9
"""Clients, where their number is not known."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
"""Of an experiment or a population, at most 100 characters."""

MOST_CHARGED = 1000
"""Clients that may all be charged in every round."""


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
    rounds: int = Field(ge=1)
    seed: int = Field(default=0, ge=0, description="decides all public randomness")
    data: Data
    model: Model
    training: Training
    selection: Selection = Uniform()
    compression: Compression = NoCompression()
    broadcast: Broadcast = Broadcast()
    network: Network | None = Field(default=None, description="of simulated clients: how long their rounds would take")
    aggregation: Aggregation = Mean()
    server_optimizer: ServerOptimizer = FedAvg()
    privacy: Privacy = NoPrivacy()
    evaluation: Evaluation = Evaluation()
    execution: Execution = LocalExecution()

    @field_validator("name", "population", mode="before")
    @classmethod
    def _names_may_look_like_numbers(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _laws(self) -> FederationConfig:
        num_clients = self.data.known_num_clients()
        if num_clients is not None:
            check_cohort(self, num_clients)
            check_compression(self, num_clients)
        check_claim(self, num_clients)
        check_example_claim(self, num_clients)
        if self.evaluation.every > self.rounds:
            raise ValueError(
                f"evaluation.every is {self.evaluation.every} but rounds is {self.rounds}: the model would never be "
                f"evaluated on the way; make evaluation.every at most {self.rounds}"
            )
        return self

    @property
    def claims(self) -> bool:
        """Whether anything is promised, about clients or about their examples."""
        return self.privacy.claims or self.training.privacy.claims


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


def check_compression(config: FederationConfig, num_clients: int) -> None:
    """The laws between compression and the selection. Raises ValueError."""
    rule, selection = config.compression, config.selection
    everyone = selection.sampling(num_clients).kind == "everyone"
    if rule.error_feedback and not everyone:
        raise ValueError(
            f"compression.error_feedback is true but selection.kind {selection.kind} draws some of {num_clients} "
            "clients: one that comes m times in n rounds makes up for what was left out n/m times as slowly; use an "
            "unbiased rule (random_k, qsgd, eden), or select every client in every round"
        )
    if config.broadcast.against == "previous" and not (everyone and isinstance(selection.availability, Always)):
        raise ValueError(
            "broadcast.against is previous but not every client is there in every round: one that misses a round does "
            "not hold what the next difference is from; use broadcast.against nothing, or select every client"
        )


def check_claim(config: FederationConfig, num_clients: int | None) -> None:
    """The laws that a privacy claim puts on all other fields, as far as they can be told without the number of clients.

    Raises ValueError.
    """
    privacy, selection, aggregation = config.privacy, config.selection, config.aggregation
    if not privacy.claims:
        return
    if not isinstance(aggregation, AdditiveRule):
        raise ValueError(
            f"privacy.kind is {privacy.kind} but aggregation.kind is {aggregation.kind}: how far one client moves it "
            "is not known, so no noise could cover it; use aggregation.kind mean"
        )
    if aggregation.max_weight is None:
        raise ValueError(
            f"privacy.kind is {privacy.kind} but aggregation.weights is num_examples without a cap: one client with "
            "many examples could move the mean any distance; set aggregation.max_examples, or aggregation.weights to "
            "uniform"
        )
    if config.compression.error_feedback:
        raise ValueError(
            f"privacy.kind is {privacy.kind} but compression.error_feedback is true: what clients keep for later is "
            "their own, and checkpoints would hold it; leave compression.error_feedback out"
        )
    if selection.min_updates and "min_updates" in selection.model_fields_set:
        raise ValueError(
            f"privacy.kind is {privacy.kind} but selection.min_updates is {selection.min_updates}: a round that ends "
            "because few clients came tells who came; leave selection.min_updates out"
        )
    if num_clients is None:
        privacy.event(selection.sampling(MANY))  # whether a claim leans on the draw is the same for any number
        return
    sampling = selection.sampling(num_clients)
    privacy.event(sampling)
    privacy.check(sampling.cohort_size)


def check_example_claim(config: FederationConfig, num_clients: int | None) -> None:
    """The laws that a claim about single examples puts on other fields. Raises ValueError."""
    if not config.training.privacy.claims:
        return
    kind = config.training.privacy.kind
    if config.data.private_statistics is not None:
        raise ValueError(
            f"training.privacy.kind is {kind} and data.{config.data.private_statistics}: one example moves all the "
            "others of its client, whose noise would not cover that; scale the inputs by public constants"
        )
    secret_cohort = config.privacy.claims and not config.data.is_public
    if secret_cohort and num_clients is not None and num_clients > MOST_CHARGED:
        everyone = config.selection.sampling(num_clients).kind == "everyone"
        if not everyone:
            raise ValueError(
                f"privacy.kind is {config.privacy.kind} and training.privacy.kind is {kind}, with {num_clients} "
                "clients: who is selected must not be told, so every client pays for every round, which at most "
                f"{MOST_CHARGED} can; leave one of the two claims out"
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
    for override in overrides:
        fields = _with_override(fields, override)
    return with_absolute_paths(fields, Path.cwd() if isinstance(source, Mapping) else Path(source).resolve().parent)


def with_absolute_paths(fields: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """`fields` with each relative folder or file of a rule taken from `base`; what a user's arguments hold stays."""
    return {name: _absolute(value, base) for name, value in fields.items()}


def _absolute(value: Any, base: Path) -> Any:
    if not isinstance(value, Mapping):
        return value
    found = {name: each if name == "arguments" else _absolute(each, base) for name, each in value.items()}
    for name in ("folder", "file"):
        if isinstance(found.get(name), str):
            found[name] = str((base / Path(found[name]).expanduser()).resolve())
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
        raise ConfigError(f"the values in {text!r} are not YAML: {error}") from error
    if not isinstance(parsed, list) or not parsed:
        raise ConfigError(f"{text!r} gives no values to {field}", hint=f"for instance {field}=1,2,3")
    return field, parsed


def config_digest(config: FederationConfig) -> str:
    """The sha256 of the resolved configuration: two runs with equal digests were asked for the same thing."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def schema() -> dict[str, Any]:
    """The JSON schema of a configuration file."""
    return FederationConfig.model_json_schema()


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML takes the last of two equal keys without a word; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = []
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *defaults`, which a key may override
                continue
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.append(key)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str) -> Any:
    """Raises ValueError, with one line that says where, when `text` is not YAML."""
    try:
        return yaml.load(text, _UniqueKeyLoader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        raise ValueError(f"{' '.join(filter(None, [error.context, error.problem]))}{place}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist, a number of 5,000 digits
        raise ValueError(" ".join(str(error).replace(' in "<unicode string>"', "").split())) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"there is no configuration file {path}", hint="examples/heart_disease.yaml is one to start from"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {path} cannot be read: {error}") from error
    try:
        fields = _parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
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
        raise ConfigError(f"the value in {override!r} is not YAML: {error}") from error
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
        case "bool_for_number":
            name = context["field"]
            return f"{'.'.join([*path, name])} is {_short(details['input'][name])}: it must be a number"
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
    added = [each for field in _fields_at(path) for each in field.metadata if isinstance(each, Added)]
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
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)  # as YAML writes them
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
    added = [rule for each in field.metadata if isinstance(each, Added) for rule in each.rules]
    return [*_models_in(field.annotation), *added]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    kind = model.model_fields.get("kind")
    return get_args(kind.annotation) if kind is not None else ()

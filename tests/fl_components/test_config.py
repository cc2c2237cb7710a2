"""A configuration that makes no sense is refused when it is read, with a sentence that says what would mend it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedrounds.fl_components.config import (
    RENAMED,
    FederationConfig,
    config_digest,
    is_moved,
    load_config,
    load_fields,
    parse_axis,
    parse_config,
    schema,
    source_folder,
)
from fedrounds.fl_components.data import Data
from fedrounds.fl_components.errors import ConfigError
from fedrounds.fl_components.rules import kind_of

SMALL: dict[str, Any] = {
    "name": "heart",
    "rounds": 20,
    "data": {"kind": "heart_disease"},
    "model": {"kind": "logistic_regression"},
    "training": {"learning_rate": 0.1, "epochs": 1},
}
DATA_KINDS = [kind_of(rule) for rule in Data.__origin__.__args__]
FULL: dict[str, Any] = {
    "name": "digits",
    "population": "schools",
    "rounds": 7,
    "seed": 3,
    "data": {"kind": "digits", "partition": {"kind": "shards", "num_clients": 6}, "test_fraction": 0.25},
    "model": {"kind": "mlp", "hidden": [5, 4], "start_from": "latest"},
    "training": {"kind": "sgd", "learning_rate": 0.1, "momentum": 0.5, "batch_size": None, "steps": 3},
    "selection": {"kind": "uniform", "cohort_size": 4, "min_updates": 2},
    "compression": {"kind": "none"},
    "admission": {"max_update_norm": 10.0},
    "aggregation": {"kind": "mean", "weights": "uniform"},
    "server_optimizer": {"kind": "fedadam", "learning_rate": 0.02, "beta1": 0.8, "beta2": 0.9, "tau": 0.01},
    "privacy": {"kind": "none"},
    "evaluation": {"every": 2, "per_client": False, "metrics": ["loss", "f1", "auroc"], "primary": "auroc"},
    "execution": {"kind": "local", "memory_mb": 64, "shard_size": 4},
}


def refusal(fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(fields)
    assert caught.value.hint
    return caught.value.message


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "federation.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def tables(**fields: Any) -> dict[str, Any]:
    return {"data": {"kind": "tables", "folder": ".", "label": "y"} | fields}


class TestReading:
    def test_what_is_left_out_has_a_default(self) -> None:
        config = parse_config(SMALL)
        assert (config.population, config.seed, config.selection.cohort_size) == ("heart", 0, None)
        assert (config.server_optimizer.kind, config.aggregation.kind, config.compression.kind) == (
            "fedavg",
            "mean",
            "none",
        )

    def test_population_is_the_name_unless_given(self) -> None:
        assert parse_config(SMALL | {"population": "hospitals"}).population == "hospitals"
        assert load_config(SMALL, ["name=ward"]).population == "ward"

    def test_names_that_yaml_reads_as_numbers(self) -> None:
        assert parse_config(SMALL | {"name": 7}).population == "7"

    def test_it_is_frozen(self) -> None:
        with pytest.raises(ValueError, match="frozen"):
            parse_config(SMALL).rounds = 3  # type: ignore[misc]

    @pytest.mark.parametrize("fields", [SMALL, FULL], ids=["small", "full"])
    def test_written_and_read_again_it_is_the_same(self, fields: dict[str, Any]) -> None:
        config = parse_config(fields)
        stored = json.loads(config.model_dump_json())  # what the store keeps of a run
        assert parse_config(stored) == config
        assert config_digest(parse_config(stored)) == config_digest(config)
        assert stored == config.model_dump(mode="json")

    def test_every_field_given_is_kept(self) -> None:
        assert parse_config(FULL).model_dump(mode="json", exclude_unset=True) == FULL

    def test_the_schema_has_every_field_and_asks_for_the_same(self) -> None:
        described = schema()
        assert list(described["properties"]) == list(FederationConfig.model_fields)
        assert described["required"] == list(SMALL)
        assert described["additionalProperties"] is False


class TestDigest:
    def test_it_does_not_depend_on_order_or_on_what_is_spelt_out(self) -> None:
        config = parse_config(SMALL)
        assert config_digest(config) == config_digest(parse_config(dict(reversed(SMALL.items()))))
        assert config_digest(config) == config_digest(parse_config(config.model_dump()))
        assert config_digest(config) == config_digest(parse_config(SMALL | {"rounds": 20.0}))

    def test_it_changes_with_every_leaf(self) -> None:
        digests = {config_digest(parse_config(FULL))}
        changes = list(other_leaves(FULL))
        for change in changes:
            digests.add(config_digest(load_config(FULL, [change])))
        assert len(changes) == 26
        assert len(digests) == 1 + len(changes)


def other_leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """An override for each leaf of FULL that is not a kind, with another value that still makes sense."""
    for name, value in tree.items():
        path = f"{above}{name}"
        if isinstance(value, Mapping):
            yield from other_leaves(value, f"{path}.")
        elif name != "kind":
            other: Any = {
                "weights": "num_examples",
                "start_from": "fresh",
                "hidden": [5, 5],
                "batch_size": 8,
                "every": 3,
                "metrics": ["loss"],
                "primary": "f1",
                "memory_mb": 65,
                "tau": 0.02,
            }.get(name)
            if other is None:
                other = (
                    not value if isinstance(value, bool) else value + ("x" if isinstance(value, str) else value / 20)
                )
                other = value + 1 if isinstance(value, int) and not isinstance(value, bool) else other
            yield f"{path}={json.dumps(other)}"


class TestLaws:
    """Each law of a configuration, with the two fields that it names and the mend."""

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            (
                {"selection": {"cohort_size": 5}},
                "selection.cohort_size is 5 but data heart_disease has 4 clients; make selection.cohort_size at most 4",
            ),
            (
                {"selection": {"cohort_size": 2, "min_updates": 3}},
                "selection.min_updates is 3 but a round selects at most 2 clients: no round could succeed; "
                "make selection.min_updates at most 2",
            ),
            (
                {"selection": {"min_updates": 5}},
                "selection.min_updates is 5 but a round selects at most 4 clients: no round could succeed; "
                "make selection.min_updates at most 4",
            ),
            (
                {"selection": {"kind": "poisson", "sampling_rate": 0.01, "min_updates": 4}},
                "selection.min_updates is 4 but a round expects 0.04 clients, of those that are selected and there: "
                "hardly any round could succeed; lower selection.min_updates, or select more clients",
            ),
            (
                {
                    "selection": {"min_updates": 4},
                    "simulation": {"availability": {"kind": "bernoulli", "probability": 0.001}},
                },
                "selection.min_updates is 4 but a round expects 0.004 clients, of those that are selected and there: "
                "hardly any round could succeed; lower selection.min_updates, or select more clients",
            ),
            (
                {"aggregation": {"weights": "uniform", "max_examples": 5}},
                "aggregation.max_examples is 5 but aggregation.weights is uniform: every client weighs the same "
                "whatever it has; leave aggregation.max_examples out, or set weights to num_examples",
            ),
            (
                {
                    "training": {
                        "learning_rate": 0.1,
                        "epochs": 1,
                        "schedule": {"kind": "constant", "warmup_rounds": 20},
                    }
                },
                "training.schedule.warmup_rounds is 20 but rounds is 20: the full rate would never be reached; make "
                "training.schedule.warmup_rounds less than 20",
            ),
            (
                {"training": {"learning_rate": 0.1}},
                "training.epochs and training.steps: neither is given; give one of them, how long a client trains in a "
                "round",
            ),
            (
                {"training": {"learning_rate": 0.1, "epochs": 1, "steps": 1}},
                "training.epochs and training.steps: both are given; give one of them, how long a client trains in a "
                "round",
            ),
        ],
    )
    def test_fields_that_disagree(self, changes: dict[str, Any], sentence: str) -> None:
        assert refusal(SMALL | changes) == sentence

    def test_what_just_makes_sense(self) -> None:
        parse_config(
            SMALL | {"selection": {"cohort_size": 4, "min_updates": 4}, "evaluation": {"every": 20}, "rounds": 20}
        )

    def test_the_number_of_clients_of_a_function_is_not_known_yet(self) -> None:
        parse_config(SMALL | {"data": {"kind": "function", "path": "a:b"}, "selection": {"cohort_size": 10**6}})

    def test_a_cohort_of_random_size_may_be_larger_than_expected(self) -> None:
        selection = {"kind": "poisson", "sampling_rate": 1.0, "min_updates": 4}
        assert parse_config(SMALL | {"selection": selection}).selection.min_updates == 4
        with pytest.raises(ConfigError, match=r"min_updates is 5 but a round selects at most 4 clients"):
            parse_config(SMALL | {"selection": selection | {"min_updates": 5}})


OLD_FIELDS: dict[str, dict[str, Any]] = {
    "training.proximal": {"training": {"proximal": 0.1}},
    "training.straggler_fraction": {"training": {"straggler_fraction": 0.1}},
    "training.drop_stragglers": {"training": {"drop_stragglers": True}},
    "training.privacy.when_exhausted": {"training": {"privacy": {"kind": "example_level", "when_exhausted": "end"}}},
    "selection.availability": {"selection": {"availability": {"kind": "always"}}},
    "aggregation.max_update_norm": {"aggregation": {"max_update_norm": 5}},
    "broadcast.against": {"broadcast": {"against": "previous"}},
    "network": {"network": {"latency_s": 1}},
    "simulation.network.spread": {"simulation": {"network": {"spread": 1}}},
}


@pytest.mark.parametrize("field", RENAMED)
def test_an_old_field_is_refused_with_the_new_one(field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config(with_defaults(OLD_FIELDS[field]))
    assert f"{field} is now {RENAMED[field]}" in refused.value.message


def with_defaults(changes: dict[str, Any]) -> dict[str, Any]:
    """SMALL with changes to some sections, each of which keeps its other fields."""
    return {
        **SMALL,
        **{name: {**SMALL.get(name, {}), **value} for name, value in changes.items()},
    }


class TestSentences:
    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            # a misspelt key: the nearest name, at every level
            ({"rouns": 3}, "rouns is not a field of a configuration; did you mean rounds?"),
            (
                {"zzz": 3},
                f"zzz is not a field of a configuration; known are {', '.join(FederationConfig.model_fields)}",
            ),
            ({1: 2}, f"1 is not a field of a configuration; known are {', '.join(FederationConfig.model_fields)}"),
            (
                {"selection": {"cohort": 2}},
                "selection.cohort is not a field of selection uniform; did you mean cohort_size?",
            ),
            ({"model": {"kind": "mlp", "hiden": [3]}}, "model.hiden is not a field of model mlp; did you mean hidden?"),
            (
                {"server_optimizer": {"kind": "fedadam", "beta3": 0.1}},
                "server_optimizer.beta3 is not a field of server_optimizer fedadam; did you mean beta2?",
            ),
            (
                {"server_optimizer": {"kind": "fedavg", "beta1": 0.1}},
                "server_optimizer.beta1 is not a field of server_optimizer fedavg; known are kind, learning_rate",
            ),
            # a kind
            ({"model": {"kind": "mpl"}}, "model.kind is 'mpl'; did you mean mlp?"),
            ({"data": {"kind": "qqq"}}, "data.kind is 'qqq'; known are " + ", ".join(DATA_KINDS)),
            (
                {"data": {"kind": "digits", "partition": {"kind": "shard"}}},
                "data.partition.kind is 'shard'; did you mean shards?",
            ),
            (
                {"data": {"kind": "mnist", "partition": {"kind": "iid", "num_clients": 2, "clients": 3}}},
                "data.partition.clients is not a field of data.partition iid; did you mean num_clients?",
            ),
            (
                {"data": {"kind": "mnist", "partition": {"kind": "dirichlet", "num_clients": 3, "alhpa": 1}}},
                "data.partition.alpha is missing; data.partition.alhpa is not a field of data.partition dirichlet; "
                "did you mean alpha?",
            ),
            (
                {"model": {}},
                "model.kind is missing; known are logistic_regression, mlp, cnn, resnet, gru, transformer, module",
            ),
            (
                {"server_optimizer": {"beta1": 0.5}},
                "server_optimizer.beta1 is not a field of server_optimizer fedavg; known are kind, learning_rate",
            ),
            ({"aggregation": {"kind": "krum"}}, "aggregation.kind is 'krum'; known are mean, geometric_median"),
            # something else where a group belongs
            ({"data": "heart_disease"}, "data is 'heart_disease'; it must be a group of fields"),
            ({"training": None}, "training is null; it must be a group of fields"),
            ({"selection": ["all"]}, "selection is ['all']; it must be a group of fields"),
            # values
            ({"rounds": 0}, "rounds is 0: it must be greater than or equal to 1"),
            ({"rounds": 2.5}, "rounds is 2.5: it must be a whole number"),
            ({"rounds": "many"}, "rounds is 'many': it must be a whole number"),
            ({"rounds": None}, "rounds is null: it must be a whole number"),
            ({"rounds": True}, "rounds is true: it must be a whole number"),
            ({"seed": -1}, "seed is -1: it must be greater than or equal to 0"),
            ({"selection": {"cohort_size": True}}, "selection.cohort_size is true: it must be a whole number"),
            (
                {"training": {"learning_rate": False, "epochs": 1}},
                "training.learning_rate is false: it must be a number",
            ),
            (
                {"server_optimizer": {"kind": "fedavg", "learning_rate": True}},
                "server_optimizer.learning_rate is true: it must be a number",
            ),
            ({"training": {"learning_rate": 0, "epochs": 1}}, "training.learning_rate is 0: it must be greater than 0"),
            (
                {"training": {"learning_rate": "fast", "epochs": 1}},
                "training.learning_rate is 'fast': it must be a number",
            ),
            (
                {"training": {"learning_rate": float("inf"), "epochs": 1}},
                "training.learning_rate is inf: it must be a finite number",
            ),
            ({"evaluation": {"per_client": "perhaps"}}, "evaluation.per_client is 'perhaps': it must be true or false"),
            (
                {"aggregation": {"weights": "size"}},
                "aggregation.weights is 'size': it must be 'num_examples' or 'uniform'",
            ),
            ({"model": {"kind": "mlp", "hidden": 5}}, "model.hidden is 5: it must be a list"),
            ({"model": {"kind": "mlp", "hidden": []}}, "model.hidden is []: it must have at least 1 item"),
            (
                {"model": {"kind": "mlp", "hidden": [0, 3]}},
                "model.hidden.0 is 0: it must be greater than or equal to 1",
            ),
            ({"model": {"kind": "mlp", "hidden": [0]}}, "model.hidden.0 is 0: it must be greater than or equal to 1"),
            (
                {"model": {"kind": "mlp", "start_from": "newest"}},
                "model.start_from is 'newest': give fresh, latest, or an MLflow address: models:/NAME/VERSION or "
                "models:/NAME@ALIAS",
            ),
            (
                {"name": "a b"},
                "name is 'a b': it must be letters, digits, '_', '.' and '-', the first a letter or digit",
            ),
            (
                {"name": "a\n"},
                "name is 'a\\n': it must be letters, digits, '_', '.' and '-', the first a letter or digit",
            ),
            (
                {"population": ".x"},
                "population is '.x': it must be letters, digits, '_', '.' and '-', the first a letter or digit",
            ),
            ({"population": True}, "population is true: it must be text: write it in quotes"),
            (
                {"population": "p" * 101},
                "population is 'pppppppppppppppppppppppppppppppppppppppppppppppppppppppp...: it must have at most "
                "100 characters",
            ),
        ],
    )
    def test_the_whole_sentence(self, changes: dict[Any, Any], sentence: str) -> None:
        assert refusal({**SMALL, **changes}) == sentence

    def test_all_that_is_wrong_is_told_at_once(self) -> None:
        assert refusal({}) == "; ".join(f"{name} is missing" for name in SMALL)
        assert refusal(SMALL | {"training": {"learning_rat": 0.1, "epochs": 1}}) == (
            "training.learning_rate is missing; "
            "training.learning_rat is not a field of training; did you mean learning_rate?"
        )

    @pytest.mark.parametrize("fields", [None, [], 3, "text"])
    def test_no_fields_at_all(self, fields: Any) -> None:
        assert refusal(fields).endswith("it must be a group of fields")


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "path", "value"),
        [
            ("rounds=5", "rounds", 5),
            ("training.learning_rate=1e-3", "training.learning_rate", 0.001),
            ("training.batch_size=null", "training.batch_size", None),
            ("evaluation.per_client=false", "evaluation.per_client", False),
            ("name=2024-01-02", "name", "2024-01-02"),
            ("name=no", "name", "no"),
            ("selection.cohort_size=2", "selection.cohort_size", 2),  # a group that the file does not have
            ("training={learning_rate: 0.5, steps: 2}", "training.steps", 2),
            ("name='007'", "name", "007"),
        ],
    )
    def test_one(self, override: str, path: str, value: Any) -> None:
        found: Any = load_config(SMALL, [override])
        for name in path.split("."):
            found = getattr(found, name)
        assert found == value

    def test_lists_and_several_in_order(self) -> None:
        config = load_config(SMALL, ["model.kind=mlp", "model.hidden=[3, 4]", "rounds=5", "rounds=6"])
        assert (config.model.hidden, config.rounds) == ((3, 4), 6)  # type: ignore[union-attr]

    def test_an_equals_sign_in_the_value(self) -> None:
        config = load_config(SMALL, ["data={kind: function, path: 'a:b'}", "data.arguments.query=a=b"])
        assert config.data.arguments == {"query": "a=b"}  # type: ignore[union-attr]

    def test_the_tree_given_is_left_alone(self) -> None:
        before = json.dumps(FULL)
        load_config(FULL, ["training.steps=9", "evaluation.every=1"])
        assert json.dumps(FULL) == before

    @pytest.mark.parametrize(
        ("override", "sentence"),
        [
            ("rounds", "'rounds' is not of the form a.b=value"),
            ("=3", "'=3' is not of the form a.b=value"),
            ("training..steps=3", "'training..steps=3' is not of the form a.b=value"),
            ("rounds.many=3", "'rounds.many=3': rounds is 20, which has no fields to set"),
            (
                "model.kind.x=3",
                "'model.kind.x=3': model.kind is 'logistic_regression', which has no fields to set",
            ),
            (
                "rounds=[",
                "the value in 'rounds=[' cannot be read as YAML: while parsing a flow node expected the node content, "
                "but found '<stream end>' (line 1, column 2)",
            ),
            ("rounds=2024-99-01", "rounds is '2024-99-01': it must be a whole number"),
            (
                "rounds=010",
                "the value in 'rounds=010' cannot be read as YAML: YAML reads 010 as the number 8: write it in quotes, "
                "or write 8 (line 1, column 1)",
            ),
            ("rounds='3'", "rounds is '3': it must be a whole number, written without quotes"),
            ("evaluation.per_client=no", "evaluation.per_client is 'no': it must be true or false"),
            ("training" + 2000 * ".a" + "=1", "the configuration is nested too deeply, or holds itself"),
            ("training.step=3", "training.step is not a field of training; did you mean steps?"),
            ("rounds=", "rounds is null: it must be a whole number"),
        ],
    )
    def test_one_that_is_refused(self, override: str, sentence: str) -> None:
        with pytest.raises(ConfigError) as caught:
            load_config(SMALL, [override])
        assert caught.value.message == sentence


def bomb(line: str, lines: int = 25) -> str:
    """YAML in which each line names the one before, as `line` says."""
    return "l0: &l0 {x: 1}\n" + "".join(f"l{n}: &l{n} {line.format(n - 1)}\n" for n in range(1, lines))


class TestStrictness:
    """At any depth true is no number, a number no truth value, and a text no count."""

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"model": {"kind": "mlp", "hidden": [True, 8]}}, "model.hidden.0 is true: it must be a whole number"),
            ({"model": {"kind": "mlp", "hidden": ["8"]}}, "model.hidden.0 is '8': it must be a whole number, written"),
            (
                {"model": {"kind": "cnn", "channels": [8, False]}},
                "model.channels.1 is false: it must be a whole number",
            ),
            ({"evaluation": {"per_client": 1}}, "evaluation.per_client is 1: it must be true or false"),
            ({"evaluation": {"per_client": "y"}}, "evaluation.per_client is 'y': it must be true or false"),
            ({"rounds": 10**30}, "rounds is 1000000000000000000000000000000: it must be a whole number of at most 64"),
            (tables(scale={"a": [True, 1]}), "data.scale.a.0 is true: it must be a number"),
            (tables(public="y"), "data.public is 'y': it must be true or false"),
            (tables(columns=[True]), "data.columns.0 is true: it must be text: write it in quotes"),
            (tables(columns=[7]), "data.columns.0 is 7: it must be text: write it in quotes"),
        ],
    )
    def test_one_that_is_refused(self, changes: dict[str, Any], sentence: str) -> None:
        with pytest.raises(ConfigError) as caught:
            parse_config(SMALL | changes)
        assert sentence in caught.value.message

    def test_whole_numbers_are_numbers_and_so_is_text_that_yaml_takes_for_text(self) -> None:
        training = {"learning_rate": "1e-1", "epochs": 1.0, "momentum": 0}
        rule = parse_config(SMALL | {"training": training}).training
        assert (rule.learning_rate, rule.epochs, rule.momentum) == (0.1, 1, 0.0)

    def test_words_and_dates_are_text(self, tmp_path: Path) -> None:
        text = "a: [NO, yes, off, 2024-01-02, true]"
        assert load_fields(write(tmp_path, text)) == {"a": ["NO", "yes", "off", "2024-01-02", True]}

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("1e-3", 0.001),
            ("1e3", 1000.0),
            ("1E+3", 1000.0),
            ("1.0e3", 1000.0),
            ("-1.5e3", -1500.0),
            (".5e1", 5.0),
            ("+.5", 0.5),
            ("1.e-3", 0.001),
            ("12e03", 12000.0),
            *((text, text) for text in ("1e", "1e-", "e3", ".e3", "1e3x", "1e1e1", "1.2.3", "089", "1d3", "+e3", ".")),
        ],
    )
    def test_numbers_with_an_exponent_are_numbers_as_in_yaml_1_2(
        self, tmp_path: Path, text: str, value: float | str
    ) -> None:
        function = {"kind": "function", "path": "rows:load", "arguments": {}}
        in_set: Any = load_config(SMALL | {"data": function}, [f"data.arguments={{a: {text}}}"]).data
        found = [
            load_fields(write(tmp_path, f"a: {text}"))["a"],
            in_set.arguments["a"],
            parse_axis(f"a.b={text}")[1][0],
        ]
        assert found == [value] * 3 and {type(each) for each in found} == {type(value)}

    @pytest.mark.parametrize(
        ("text", "kind"), [("12", int), ("-7", int), ("0x1F", int), (".inf", float), ("3.5", float)]
    )
    def test_other_numbers_keep_their_type(self, tmp_path: Path, text: str, kind: type) -> None:
        assert type(load_fields(write(tmp_path, f"a: {text}"))["a"]) is kind

    def test_a_tree_that_holds_itself_is_refused(self) -> None:
        fields: dict[str, Any] = dict(SMALL)
        fields["training"] = fields
        with pytest.raises(ConfigError, match="nested too deeply, or holds itself"):
            load_config(fields)


CLAIM: dict[str, Any] = {
    "aggregation": {"weights": "uniform"},
    "selection": {"kind": "poisson", "sampling_rate": 0.5},
    "privacy": {"kind": "central", "noise_multiplier": 1.0, "clipping": {"kind": "fixed", "norm": 0.5}},
}


class TestWhatDoesNothingUnderAClaim:
    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"admission": {"max_update_norm": 0.001}}, "admission.max_update_norm is 0.001"),
            ({"privacy": CLAIM["privacy"] | {"simulate_noise_cohort": 9, "epsilon": 1.0}}, "privacy.epsilon is 1 and"),
            ({"privacy": CLAIM["privacy"] | {"simulate_noise_cohort": 1}}, "privacy.simulate_noise_cohort is 1 but a"),
            ({"selection": {"kind": "poisson", "sampling_rate": 1e-9}}, "expects 4e-09 of 4 clients in a round"),
        ],
    )
    def test_is_refused(self, changes: dict[str, Any], sentence: str) -> None:
        assert parse_config(SMALL | CLAIM).claims
        with pytest.raises(ConfigError) as caught:
            parse_config(SMALL | CLAIM | changes)
        assert sentence in caught.value.message


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("example", sorted(Path("examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_can_be_tried_in_a_few_rounds(example: Path, rounds: int) -> None:
    assert load_config(example, [f"rounds={rounds}"]).rounds == rounds


class TestFolders:
    def test_what_lies_beside_a_link_is_meant(self, tmp_path: Path) -> None:
        (tmp_path / "shared").mkdir()
        (tmp_path / "today").mkdir()
        fields = json.dumps(SMALL | tables(folder="wards"))
        (tmp_path / "shared" / "base.yaml").write_text(fields)
        (tmp_path / "today" / "exp.yaml").symlink_to("../shared/base.yaml")
        config = load_config(tmp_path / "today" / "exp.yaml")
        assert config.data.folder == str(tmp_path / "today" / "wards")
        assert source_folder(tmp_path / "today" / "exp.yaml") == tmp_path / "today"

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            (tables(folder="/new/wards"), True),
            (tables(folder="/old/wards"), True),
            (tables(folder="/new/other"), False),
            (tables(folder="/new/wards", label="z"), False),
            (tables(folder="/new/wards", public=True), False),
        ],
    )
    def test_a_project_that_was_moved_is_the_same(self, given: dict[str, Any], expected: bool) -> None:
        assert is_moved(SMALL | tables(folder="/old/wards"), SMALL | given, "/old", "/new") is expected


class TestFiles:
    def test_a_file_is_read_like_a_tree(self, tmp_path: Path) -> None:
        path = write(tmp_path, json.dumps(FULL))
        assert load_config(path) == load_config(str(path)) == parse_config(FULL)

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    def test_what_editors_save_is_read(self, tmp_path: Path, encoding: str) -> None:
        path = tmp_path / "config.yaml"
        path.write_bytes("name: Köln\r\nrounds: 3\r\n".encode(encoding))
        assert load_fields(path) == {"name": "Köln", "rounds": 3}

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("name: Köln".encode("latin-1"), "the byte at position 7 is not UTF-8 text: save it as UTF-8"),
            (b"name: a\x00", "it holds the control character 0x00"),
        ],
    )
    def test_what_is_no_text_is_refused(self, tmp_path: Path, content: bytes, reason: str) -> None:
        path = tmp_path / "config.yaml"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=reason):
            load_fields(path)

    @pytest.mark.parametrize("path", ["a\0b", "\ud800"])
    def test_a_path_that_no_file_can_have_is_refused(self, path: str) -> None:
        with pytest.raises(ConfigError, match="cannot be read") as caught:
            load_config(path)
        assert caught.value.message.isprintable() and caught.value.hint

    def test_the_example(self) -> None:
        config = load_config("examples/heart_disease.yaml")
        assert (config.name, config.data.kind) == ("heart-disease", "heart_disease")

    def test_a_relative_folder_begins_at_the_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        path = write(tmp_path, json.dumps(SMALL | {"data": {"kind": "heart_disease", "folder": "../rows"}}))
        assert load_config(path).data.folder == str(tmp_path.parent / "rows")  # type: ignore[union-attr]
        assert load_config(path, ["data.folder=/rows"]).data.folder == "/rows"  # type: ignore[union-attr]

    def test_defaults_that_are_merged_in(self, tmp_path: Path) -> None:
        text = json.dumps(SMALL).replace('"training": {', '"training": {<<: {learning_rate: 9, momentum: 0.5}, ')
        config = load_config(write(tmp_path, text))
        assert (config.training.learning_rate, config.training.momentum) == (0.1, 0.5)

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("name: a\nrounds: 1\nname: b", "cannot be read as YAML: the key 'name' stands twice (line 3, column 1)"),
            (
                "training:\n  steps: 1\n  steps: 2",
                "cannot be read as YAML: the key 'steps' stands twice (line 3, column 3)",
            ),
            (
                "{? [1] : 2}",
                "cannot be read as YAML: while constructing a mapping found unhashable key (line 1, column 4)",
            ),
            (
                "a: 1\n---\nb: 2",
                "YAML: expected a single document in the stream but found another document (line 2, column 1)",
            ),
            (
                "a:\n\tb: 1",
                "cannot be read as YAML: while scanning for the next token found character '\\t' that cannot start",
            ),
            ("a: !!python/object:os.system 1", "could not determine a constructor for the tag"),
            ("a: " + "[" * 1200, "it is nested more than 50 deep (line 1, column 53)"),
            ("a: " + "9" * 5000, "the number 9999999999... has more than 400 digits (line 1, column 4)"),
            (
                "a: 9223372036854775808",
                "the whole number '9223372036854775808' has more than 64 bits (line 1, column 4)",
            ),
            ("a: 1e999", "the number 1e999 is too large (line 1, column 4)"),
            ("a: 1:30:15.5", "YAML reads 1:30:15.5 as the number 5415.5: write it in quotes"),
            ("a: [010, 007]", "YAML reads 010 as the number 8: write it in quotes, or write 8 (line 1, column 5)"),
            ("a: &x {b: *x}", "the anchor here holds an alias of itself (line 1, column 4)"),
            ("a: &x [*x]", "the anchor here holds an alias of itself"),
            (bomb("{{a: *l{0}, b: *l{0}}}"), "its aliases stand for more than 100,000 values (line "),
            (bomb("[*l{0}, *l{0}, *l{0}]"), "its aliases stand for more than 100,000 values (line "),
            (bomb("{{<<: [*l{0}, *l{0}]}}"), "its aliases stand for more than 100,000 values (line "),
            (bomb("[*l{0}]", 200), "it is nested more than 50 deep (line "),
            ("a: " + "x" * 1_000_001, "it is larger than 1,000,000 bytes"),
            ("a: !!set [1]", "cannot be read as YAML"),
            ("a: !!int x", "cannot be read as YAML"),
            ("a: \x07", "cannot be read as YAML: it holds the control character 0x07"),
            (b"name: \xff", "cannot be read as YAML: the byte at position 6 is not UTF-8 text: save it as UTF-8"),
            ("", "holds no fields"),
            ("- name", "holds no fields"),
            ("just words", "holds no fields"),
        ],
    )
    def test_a_file_that_is_refused(self, tmp_path: Path, text: str | bytes, sentence: str) -> None:
        path = write(tmp_path, text)
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert sentence in caught.value.message
        assert str(path) in caught.value.message
        assert "unicode string" not in caught.value.message

    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="there is no configuration file") as caught:
            load_config(tmp_path / "none.yaml")
        assert "examples/heart_disease.yaml" in (caught.value.hint or "")
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(tmp_path)

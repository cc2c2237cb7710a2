"""What all rules share, and attributes named by an import path."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import ValidationError

from fedrounds.fl_components.errors import ConfigError
from fedrounds.fl_components.rules import Rule, import_attribute


class Krum(Rule):
    kind: Literal["krum"] = "krum"
    num_byzantine: int
    radius: float | None = None
    public: bool = False


def test_a_rule_is_its_configuration() -> None:
    rule = Krum(num_byzantine=2)
    assert rule.model_dump() == {"kind": "krum", "num_byzantine": 2, "radius": None, "public": False}
    assert Krum.model_validate(rule.model_dump()) == rule
    with pytest.raises(ValidationError, match="frozen"):
        rule.num_byzantine = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "fields",
    [
        {"num_byzantine": 1, "num_byzantin": 1},
        {"num_byzantine": 1, "radius": float("nan")},
        {"num_byzantine": 1, "radius": float("inf")},
        {"num_byzantine": True},
        {"num_byzantine": 1, "radius": False},
        {"num_byzantine": 1.5},
        {"kind": "mean", "num_byzantine": 1},
    ],
)
def test_what_a_rule_refuses(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Krum.model_validate(fields)


def test_numbers_may_be_written_as_yaml_reads_them() -> None:
    # YAML reads 1e-3 as text, and 2.0 where 2 was meant.
    assert Krum.model_validate({"num_byzantine": 2.0, "radius": "1e-3", "public": True}).radius == 0.001


@pytest.fixture
def ward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that can be imported, under a name of its own."""
    package = tmp_path / "ward_rules"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "data.py").write_text("def load():\n    return 3\n")
    (package / "broken.py").write_text("1 / 0\n")
    (package / "unfinished.py").write_text("def load(:\n")
    (package / "needs.py").write_text("import no_such_package.part\n")
    (package / "needs_prefix.py").write_text("import ward_rule\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("ward_rule")]:
        monkeypatch.delitem(sys.modules, name)
    return "ward_rules"


def test_an_attribute_is_imported(ward: str) -> None:
    assert import_attribute(f"{ward}.data:load", "data.path")() == 3


@pytest.mark.parametrize(
    ("path", "sentence", "hint"),
    [
        ("ward_rules.data", "data.path is 'ward_rules.data', which is not an import path", "package.module:name"),
        (":load", "data.path is ':load', which is not an import path", "package.module:name"),
        ("ward_rules.data:", "data.path is 'ward_rules.data:', which is not an import path", "package.module:name"),
        ("ward_rules.dat:load", "data.path: there is no module 'ward_rules.dat'", "beside the configuration"),
        ("wards.data:load", "data.path: there is no module 'wards.data'", "beside the configuration"),
        ("ward_rules.data:lod", "data.path: module ward_rules.data has no 'lod'", None),
        ("ward_rules.broken:load", "data.path: importing ward_rules.broken failed: ZeroDivisionError", None),
        ("ward_rules.unfinished:load", "data.path: importing ward_rules.unfinished failed: SyntaxError", None),
        (
            "ward_rules.needs:load",
            "data.path: ward_rules.needs imports no_such_package, which is not installed",
            "install no_such_package",
        ),
        (  # the missing package's name begins the module's own
            "ward_rules.needs_prefix:load",
            "data.path: ward_rules.needs_prefix imports ward_rule, which is not installed",
            "install ward_rule",
        ),
        (".data:load", "data.path: importing .data failed: TypeError", None),
    ],
)
def test_an_attribute_that_cannot_be_imported(ward: str, path: str, sentence: str, hint: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        import_attribute(path, "data.path")
    assert caught.value.message.startswith(sentence)
    assert (hint is None) == (caught.value.hint is None)
    assert (hint or "") in (caught.value.hint or "")

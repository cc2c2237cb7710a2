"""Parameters and checks that several commands share."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from fedrounds.deployments.cli.screen import CliOutput
from fedrounds.fl_components.errors import NotInstalled

if TYPE_CHECKING:
    pass


Config = Annotated[str, Parameter(help="A YAML file.")]


Overrides = Annotated[
    list[str] | None,
    Parameter(name="--set", negative=(), help="Replace one value, for instance --set rounds=5. Can be repeated."),
]


OnScreen = Annotated[CliOutput, Parameter(parse=False)]


def need_server(command: str) -> None:
    for package in ("prefect", "mlflow"):
        if find_spec(package) is None:
            raise NotInstalled(
                f"fedrounds {command} needs {package}, which is not installed here",
                hint='install the extra: pip install "fedrounds[server]"',
            )

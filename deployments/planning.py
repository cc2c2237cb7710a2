"""Plans for privacy: what keeps an epsilon with a configuration (`fedrounds privacy plan`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedrounds.fl_components.errors import ConfigError

if TYPE_CHECKING:
    from fedrounds.fl_components.config import FederationConfig


def plan(
    config: str,
    overrides: Sequence[str] = (),
    *,
    epsilon: float,
    unit: Literal["client", "example"] = "client",
    plot: str | Path | None = None,
) -> dict[str, Any]:
    """Return what keeps `epsilon` with this configuration: never less private than asked. Raises `ConfigError`.

    For clients, `choices` has the noise for its rounds and cohort, the rounds for its noise and cohort, and the cohort
    for its noise and rounds, each with the curve of epsilon by round. For examples, `clients` has for each client the
    noise that it needs, the epsilon of the configured noise, and the rounds for which that is enough; the clients with
    the fewest rows come first, at most `MAX_SHOWN`, since the same noise weighs more on a smaller batch.
    """
    from fedrounds.fl_components.config import load_config, source_folder

    if not 0 < epsilon < math.inf:
        raise ConfigError(f"epsilon is {epsilon:g}", hint="give a number above 0")
    if unit == "example" and plot is not None:
        raise ConfigError("--plot draws no plan for examples", hint="leave it out; --json has the numbers")
    resolved, folder = load_config(config, overrides), str(source_folder(config))
    plan_of_unit = _plan_examples if unit == "example" else _plan_clients
    planned = {"name": resolved.name, "epsilon": epsilon, **plan_of_unit(resolved, folder, epsilon)}
    if plot is not None:
        from fedrounds.deployments.cli.plots import draw_plan

        draw_plan(planned, Path(plot))
    return planned


def _plan_clients(config: FederationConfig, folder: str, epsilon: float) -> dict[str, Any]:
    from fedrounds.fl_components.privacy.central import MIN_NOISE
    from fedrounds.fl_components.privacy.events import Event
    from fedrounds.fl_components.privacy.planning import PlannedAccount, choices, curve
    from fedrounds.fl_components.server.opening import assemble_without_run
    from fedrounds.fl_components.values import Sampling

    central = config.central
    if central is None:
        about_examples = ", or plan for the examples with --example-level" * config.training.privacy.claims
        raise ConfigError(
            "there is nothing to plan: privacy.kind is none", hint=f"set privacy.kind to central{about_examples}"
        )
    num_clients = config.data.known_num_clients() or assemble_without_run(config, folder).population.size
    sampling = config.sampling(num_clients)

    def event(noise: float, rate: float) -> Event:
        drawn = sampling if rate == sampling.rate else Sampling(sampling.kind, num_clients, rate * num_clients, rate)
        return central.model_copy(update={"noise_multiplier": noise}).event(drawn)

    account = PlannedAccount(
        event,
        central.noise_multiplier,
        sampling.rate,
        config.rounds,
        units=num_clients,
        neighbouring=central.neighbouring(sampling),
        delta=central.delta,
        min_noise=MIN_NOISE,
        rate_is_free=sampling.kind == "poisson",
    )
    found = []
    for each in choices(account, epsilon):
        cohort_size = sampling.cohort_size if each.sampling_rate == sampling.rate else each.sampling_rate * num_clients
        found.append(
            {
                "free": each.free,
                "noise_multiplier": each.noise_multiplier,
                "rounds": each.rounds,
                "cohort_size": cohort_size,
                "epsilon": each.epsilon,
                "noise_on_the_mean": each.noise_multiplier / cohort_size,
                "curve": [list(point) for point in curve(account, each)],
            }
        )
    return {"delta": central.delta, "neighbouring": account.neighbouring, "choices": found}


def _plan_examples(config: FederationConfig, folder: str, epsilon: float) -> dict[str, Any]:
    from fedrounds.fl_components.privacy.calibration import MAX_NOISE
    from fedrounds.fl_components.privacy.example_level import NEIGHBOURING
    from fedrounds.fl_components.privacy.planning import PlannedAccount, choices
    from fedrounds.fl_components.reports.privacy import MAX_SHOWN
    from fedrounds.fl_components.server.opening import assemble_without_run

    rule, rounds = config.training.example_level, config.rounds
    if rule is None:
        raise ConfigError(
            "there is nothing to plan for the examples: training.privacy.kind is none",
            hint="set training.privacy.kind to example_level",
        )
    steps, delta = config.training.private_steps, rule.delta
    configured = rule.noise(rounds * steps)
    uncut = rule.model_copy(update={"max_batch_size": None})  # cut batches may be more than the configured noise pays
    loaded = config.model_copy(update={"training": config.training.model_copy(update={"privacy": uncut})})
    data = assemble_without_run(loaded, folder).simulated.data
    rows = sorted((data.num_examples(client), data.client_ids[client]) for client in range(data.num_clients))

    @cache
    def planned(num_examples: int) -> tuple[float, float, int]:
        """The noise that is needed, the epsilon of the configured one, and the rounds that it is enough for."""
        account = PlannedAccount(
            lambda noise, rate: rule.event(num_examples, steps, noise),
            configured,
            rule.sampling_rate,
            rounds,
            units=num_examples,
            neighbouring=NEIGHBOURING,
            delta=delta,
        )
        by_free = {each.free: each for each in choices(account, epsilon)}
        enough = by_free["rounds"].rounds if "rounds" in by_free else 0
        return by_free["noise"].noise_multiplier, by_free["as configured"].epsilon, enough

    most, largest = rows[-1]
    if rule.max_batch_size is not None and rule.epsilon(most, rounds * steps, MAX_NOISE / 2) > epsilon:
        least = rule.least_max_batch_size(most, rounds * steps, MAX_NOISE / 2, epsilon)
        if least is not None:
            raise ConfigError(
                f"no noise keeps an epsilon of {epsilon:g} at a delta of {delta:g}: training.privacy.max_batch_size is "
                f"{rule.max_batch_size}, and client {largest!r} with its {most} training examples would have batches "
                "cut too often",
                hint=f"make training.privacy.max_batch_size at least {least}, or leave it out",
            )
    cut = rule.max_batch_size is not None  # else the number of rows changes nothing but how much the noise weighs
    clients = []
    for num_examples, client_id in rows[:MAX_SHOWN]:
        noise, comes_to, enough = planned(num_examples if cut else 1)
        batch = rule.sampling_rate * num_examples
        clients.append(
            {
                "client": client_id,
                "examples": num_examples,
                "batch": batch,
                "noise_multiplier": noise,
                "noise_on_the_mean": noise / batch,
                "configured_epsilon": comes_to,
                "configured_rounds": enough,
            }
        )
    return {
        "delta": delta,
        "unit": "example",
        "neighbouring": NEIGHBOURING,
        "sampling_rate": rule.sampling_rate,
        "steps": steps,
        "rounds": rounds,
        "configured_noise_multiplier": configured,
        "num_clients": data.num_clients,
        "clients": clients,
    }

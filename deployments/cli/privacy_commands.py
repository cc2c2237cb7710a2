"""The commands about privacy: audits, plans, budgets, statements and the journal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from fedrounds.deployments.cli.screen import CommandResult

if TYPE_CHECKING:
    pass
from fedrounds.deployments.cli.parameters import Config, Overrides, need_server


def audit(
    run: Annotated[str, Parameter(help="The id of a run under a privacy claim, or an experiment's name: its newest.")],
    /,
    *,
    canaries: Annotated[int, Parameter(help="How many are drawn; half of them join.")] = 1000,
    plot: Annotated[Path | None, Parameter(help="Draw claim and measurement into this PNG file.")] = None,
) -> CommandResult:
    """Measure how much noise a run's mechanisms really add, with canaries."""
    need_server("audit")
    from fedrounds.deployments import privacy
    from fedrounds.deployments.cli import privacy_tables

    found = privacy.audit(run, num_canaries=canaries, plot=plot)
    return CommandResult(found, privacy_tables.audit(found))


def privacy_status(
    population: Annotated[str | None, Parameter(help="Without it: all of them.")] = None, /
) -> CommandResult:
    """Show what each population may spend, has spent, and has left."""
    from fedrounds.deployments import privacy
    from fedrounds.deployments.cli import privacy_tables

    found = privacy.status(population)
    return CommandResult(found, privacy_tables.budgets(found))


def privacy_plan(
    config: Config,
    /,
    *,
    epsilon: Annotated[float, Parameter(help="Target epsilon of the run.")],
    example_level: Annotated[bool, Parameter(help="For the examples of each client.", negative=())] = False,
    overrides: Overrides = None,
    plot: Annotated[Path | None, Parameter(help="Draw epsilon by round into this PNG file.")] = None,
) -> CommandResult:
    """Find the noise, the rounds or the cohort that keep an epsilon; for examples, each client's noise."""
    from fedrounds.deployments import planning
    from fedrounds.deployments.cli import privacy_tables

    unit: Literal["client", "example"] = "example" if example_level else "client"
    found = planning.plan(config, overrides or (), epsilon=epsilon, unit=unit, plot=plot)
    if example_level:
        return CommandResult(found, privacy_tables.plan_examples(found))
    return CommandResult(found, privacy_tables.plan(found))


def privacy_ledger(population: str, /) -> CommandResult:
    """List the charges of a population."""
    from fedrounds.deployments import privacy
    from fedrounds.deployments.cli import privacy_tables

    rows = privacy.ledger(population)
    return CommandResult(rows, privacy_tables.ledger(rows))


def privacy_statement(run: Annotated[str, Parameter(help="The id of a run.")], /) -> CommandResult:
    """Print the privacy statement of a run, in Markdown."""
    from fedrounds.deployments import privacy

    found = privacy.statement(run)
    return CommandResult(found, found["markdown"].rstrip())


def privacy_void(
    run: Annotated[str, Parameter(help="The id of a run that stopped.")],
    /,
    *,
    reason: Annotated[str, Parameter(help="Who decided it, and why. Kept in the journal.")],
) -> CommandResult:
    """Release the budget reserved for a round that never collected an update (administrators only)."""
    from fedrounds.deployments import privacy

    found = privacy.void(run, reason=reason)
    return CommandResult(
        found, f"Released the charge reserved for round {found['round']} of run {run} to {found['population']}."
    )


def privacy_budget_set(
    population: str,
    /,
    *,
    epsilon: Annotated[float, Parameter(help="The largest epsilon that all its runs together may spend.")],
    reason: Annotated[str, Parameter(help="Who decided it, and why. Kept in the journal.")],
    delta: Annotated[
        float | None, Parameter(help="Delta at which epsilon is reported. Needed for a new population.")
    ] = None,
    unit: Annotated[str | None, Parameter(help="Whose data are protected. Without it: client.")] = None,
    neighbouring: Annotated[
        str | None, Parameter(help="add_or_remove (Poisson selection), replace_one or zero_out. Without it: the first.")
    ] = None,
) -> CommandResult:
    """Set the privacy budget of a population (administrators only; logged with the reason)."""
    from fedrounds.deployments import privacy
    from fedrounds.deployments.cli import privacy_tables

    found = privacy.set_budget(
        population, epsilon=epsilon, reason=reason, delta=delta, unit=unit, neighbouring=neighbouring
    )
    return CommandResult(found, privacy_tables.budgets([found]))


def journal_key() -> CommandResult:
    """Print the public key with which this hub signs its journal."""
    from fedrounds.deployments import journal

    found = journal.key()
    return CommandResult(found, found["key"])


def journal_trust(
    key: Annotated[str, Parameter(help="What `fedrounds journal key` prints there.")], /
) -> CommandResult:
    """Trust the journal rows of another hub that shares this database."""
    from fedrounds.deployments import journal

    found = journal.trust(key)
    return CommandResult(found, f"Journal rows signed by key {found['key_id']} are now trusted.")


def journal_verify() -> CommandResult:
    """Verify that no journal row was modified, deleted, inserted or forged."""
    from fedrounds.deployments import journal
    from fedrounds.deployments.cli import tables

    report = journal.verify()
    return CommandResult(report, tables.journal(report))

"""A run's secret, and its history outside the database: what was released is never released anew for free.

A database may be restored from a backup. What this home, MLflow and Prefect have seen of the run since then was
released all the same, so a run whose database lacks it is refused, or pays for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from fedrounds.fl_components.errors import StoreError
from fedrounds.fl_components.server.charging import charges_of_round
from fedrounds.fl_components.server.run import Run
from fedrounds.fl_components.store import (
    RunSecret,
    Sighting,
    destroy_secrets,
    fresh_collection,
    last_seen,
    place_of_secrets,
)


def open_secret(run: Run) -> None:
    """Open the secret that the run draws from; with `run.fresh_collection` replace it by a new one.

    Raises:
      StoreError: it is missing, or more was seen of the run than the database has.
    """
    folder, record = run.store.secrets_folder, run.record
    sightings = [Sighting(anchor.where, anchor=anchor) for anchor in run.store.own_anchors()]
    reason = "requested"
    try:
        assert record.secret_id is not None
        run.secret = RunSecret.open(folder, run.run_id, record.secret_id)
    except StoreError as error:
        reason = "the secret is missing"
        if not run.fresh_collection:
            raise StoreError(
                f"{error.message}; the run began in {record.secret_home}",
                hint=fresh_collection(run.run_id, "resume it in that home, or restore the file from a backup"),
            ) from error
    if run.fresh_collection:
        _collect_afresh(run, reason, sightings)
    else:
        check_history(run, sightings)
        _settle_secrets(run)  # an earlier process may have ended before it did


def check_history(run: Run, sightings: Sequence[Sighting]) -> None:
    """Compare the run with what was seen of it outside the database.

    With `run.fresh_collection`, what was seen is charged, unless it is already.

    Raises:
      StoreError: more was seen of the run than the database has.
    """
    record = run.refresh()
    if not run.config.claims or record.committed_round == record.rounds:
        return
    ahead, uncharged = _ahead(run, sightings), run.store.uncharged_releases(run.run_id)
    if not ahead and not uncharged:
        return
    if run.fresh_collection:
        _collect_afresh(run, "the history was cut", sightings)
        return
    evidence = [
        f"{sighting.where} shows its round {sighting.round}"
        if sighting.anchor is None or sighting.round > record.committed_round
        else f"{sighting.where} has a row {sighting.anchor.rows} that this journal does not have"
        for sighting in ahead
    ]
    if uncharged:
        releases, last = last_seen(run.store.secrets_folder, run.run_id, run.store.identity())
        evidence.append(
            f"the run's secret shows its round {last}, {releases} releases in all, of which {uncharged} "
            f"{'is' if uncharged == 1 else 'are'} not charged"
        )
    raise StoreError(
        f"the database is older than what was seen of run {run.run_id}, whose last committed round is "
        f"{record.committed_round} here: {'; '.join(evidence)}. It was restored from a backup, and what came after it "
        "was released all the same",
        hint=fresh_collection(run.run_id, "put the newer database back, and check it with `fedrounds journal verify`"),
    )


def forget_keys(run: Run) -> None:
    """Forget the keys of a run whose rounds are all committed: an earlier process may have ended before it did."""
    if run.record.secret_id is not None:
        with suppress(StoreError):  # the file is gone: so are the keys
            secret = RunSecret.open(run.store.secrets_folder, run.run_id, run.record.secret_id)
            secret.advance(run.record.committed_round + 1)


def _settle_secrets(run: Run) -> None:
    """Bring the run's secret to the current round, remember in it what is charged, and destroy all others."""
    assert run.secret is not None
    run.secret.advance(run.refresh().committed_round + 1)
    run.secret.count(run.store.ledger.num_spent(run.run_id), run.store.identity())
    destroy_secrets(run.store.secrets_folder, run.run_id, database=run.secret.database, but=run.secret.id)


def _ahead(run: Run, sightings: Sequence[Sighting]) -> list[Sighting]:
    """Return the sightings that the database does not account for."""
    accounted = _accounted_round(run)
    anchors = [sighting.anchor for sighting in sightings if sighting.anchor is not None]
    lost = run.store.lost(anchors, run.run_id) if anchors else []
    return [sighting for sighting in sightings if sighting.round > accounted or sighting.anchor in lost]


def _accounted_round(run: Run) -> int:
    """Return the last round whose charges the journal has, if anything was released of it."""
    earlier = run.store.fresh_collections(run.run_id)
    return max([run.record.committed_round, *(int(row["released"]) for row in earlier)])


def _collect_afresh(run: Run, reason: str, sightings: Sequence[Sighting]) -> None:
    """Charge what may have been released of the run, and replace its secret."""
    ahead = _ahead(run, sightings)
    accounted, released = _accounted_round(run), max([0, *(sighting.round for sighting in ahead)])
    lost = max(released - accounted, run.store.uncharged_releases(run.run_id, of_any_database=True), 0)
    if lost and any(claim.is_paid_by_clients for claim in run.claims):
        lost, released = lost + 1, released + 1  # clients may have sent their updates of the next one
    _, last = last_seen(run.store.secrets_folder, run.run_id)
    secret = RunSecret.create(run.store.secrets_folder, run.run_id, run.store.identity())
    settled = run.lease.start_afresh(
        secret_id=secret.id,
        secret_home=place_of_secrets(run.store.home),
        reason=reason,
        charges=charges_of_round(run, range(run.federation.population.size)),
        lost=lost,
        released=max(released, accounted, last),
        sightings=ahead,
    )
    run.secret = secret
    _settle_secrets(run)
    run.store.anchor()
    run.notify(
        f"round {run.record.committed_round + 1} of run {run.run_id} is collected again, with a new secret; "
        f"charges settled as spent: {settled}"
    )

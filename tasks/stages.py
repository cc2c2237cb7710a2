"""The stages of a round as Prefect tasks: one thin task each, under the stage's name.

Arguments are wrapped as `quote` and nothing is cached or persisted: by default Prefect walks through and hashes what
passes between tasks, which costs more than most stages do. The store is what makes a round durable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.utilities.annotations import quote

from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.run import Run

P = ParamSpec("P")
T = TypeVar("T")


def as_task(stage: Callable[Concatenate[Run, P], T]) -> Callable[Concatenate[Run, P], T]:
    """The stage as a Prefect task that first looks whether the run was asked to stop."""
    name = stage.__name__
    decorate: Any = task(name=name, task_run_name=name, cache_policy=NO_CACHE, persist_result=False)
    prefect_task = decorate(stage)

    def run_task(run: Run, /, *args: P.args, **kwargs: P.kwargs) -> T:
        run.check_cancelled()
        # With `opaque`, Prefect looks the wrapper's address up among earlier results. A freed result may have had the
        # same address: Prefect then shows a dependency that does not exist, and that depends on the data.
        result: T = prefect_task(quote(run), *(quote(argument) for argument in args))
        return result

    return run_task


load = as_task(stages.load)
broadcast = as_task(stages.broadcast)
select = as_task(stages.select)
authorise = as_task(stages.authorise)
train = as_task(stages.train)
compress = as_task(stages.compress)
admit = as_task(stages.admit)
aggregate = as_task(stages.aggregate)
server_step = as_task(stages.server_step)
evaluate = as_task(stages.evaluate)
commit = as_task(stages.commit)

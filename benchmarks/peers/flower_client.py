"""What Flower's clients do; a module of its own, because Ray's actors import it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.peers.measure import Task
from benchmarks.peers.torch_models import module

app = ClientApp()


@cache
def _prepared(workload: str, definition: str) -> tuple[Task, nn.Module, torch.Tensor, torch.Tensor]:
    """The data and a model, once in each actor."""
    task = Task(workload, Path(definition))
    x_train, y_train = (torch.from_numpy(array) for array in task.images[:2])
    return task, module(task), x_train, y_train


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train as the client that the message names, on the parameters that it brings."""
    config = message.content["config"]
    if threads := int(config["threads"]):
        torch.set_num_threads(threads)
    task, model, x_train, y_train = _prepared(str(config["workload"]), str(config["definition"]))
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=task.learning_rate)
    round, client = int(config["round"]), int(config["client"])
    for rows in task.batches(round, client):
        optimizer.zero_grad()
        cross_entropy(model(x_train[rows]), y_train[rows]).backward()
        optimizer.step()
    content = {
        "arrays": ArrayRecord(model.state_dict()),
        "metrics": MetricRecord({"num-examples": len(task.rows[client])}),
    }
    return Message(content=RecordDict(content), reply_to=message)

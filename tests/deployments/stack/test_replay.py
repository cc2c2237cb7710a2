from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fedrounds.deployments.stack.replay import Message, Receive, ReplayBusy, Scope, Send


class Busy:
    """Answers 503 and raises, as Starlette does, `times` times; then echoes the body."""

    def __init__(self, times: int, *, raises: bool) -> None:
        self.times = times
        self.raises = raises
        self.calls = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        assert "path_params" not in scope  # what an earlier run left behind
        scope["path_params"] = {}
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message.get("more_body"):
                break
        if self.calls <= self.times:
            await send({"type": "http.response.start", "status": 503, "headers": []})
            await send({"type": "http.response.body", "body": b"busy"})
            if self.raises:
                raise RuntimeError("database is locked")
            return
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": body})


def post(app: Any, *, scope_type: str = "http") -> list[Message]:
    incoming: list[Message] = [
        {"type": "http.request", "body": b"first ", "more_body": True},
        {"type": "http.request", "body": b"second", "more_body": False},
        {"type": "http.disconnect"},
    ]
    sent: list[Message] = []

    async def receive() -> Message:
        return incoming.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(app({"type": scope_type}, receive, send))
    return sent


@pytest.mark.parametrize("raises", [True, False])
def test_a_busy_request_is_run_again_with_its_body(raises: bool) -> None:
    busy = Busy(2, raises=raises)
    sent = post(ReplayBusy(busy, interval_s=0.001))
    assert busy.calls == 3
    assert [message.get("status") for message in sent] == [201, None]
    assert sent[1]["body"] == b"first second"


def test_a_request_that_stays_busy_gets_its_503() -> None:
    busy = Busy(9, raises=False)
    sent = post(ReplayBusy(busy, attempts=4, interval_s=0.001))
    assert busy.calls == 4
    assert [message.get("status") for message in sent] == [503, None]


def test_another_error_is_raised_and_not_run_again() -> None:
    calls = []

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        calls.append(1)
        await send({"type": "http.response.start", "status": 500, "headers": []})
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        post(ReplayBusy(broken, interval_s=0.001))
    assert calls == [1]


def test_what_is_not_http_passes_through() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((await receive())["type"])

    post(ReplayBusy(app), scope_type="websocket")
    assert seen == ["http.request"]

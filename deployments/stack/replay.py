"""Requests that met a locked SQLite database are run again inside the server.

With SQLite, Prefect answers 503 to a request whose transaction met another writer (`SQLITE_BUSY_SNAPSHOT`), and
Prefect's client then sleeps for two seconds or more: a tenth of the rounds would take ten times as long. The
transaction has been rolled back, so the request can simply be run again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class ReplayBusy:
    """ASGI middleware: an HTTP request that `app` answers with 503 is run again, `interval_s` apart.

    The request's body is kept in memory for it; a response that is not 503 streams through untouched. After
    `attempts` runs the 503 is passed on.
    """

    def __init__(self, app: App, *, attempts: int = 100, interval_s: float = 0.05) -> None:
        self.app = app
        self.attempts = attempts
        self.interval_s = interval_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages = await _whole_body(receive)
        for _ in range(self.attempts - 1):
            if not await self._run_unless_busy(scope, _again(messages, receive), send):
                return
            await asyncio.sleep(self.interval_s)
        await self.app(dict(scope), _again(messages, receive), send)

    async def _run_unless_busy(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Runs the app once; True if its answer was 503, of which nothing has been sent."""
        busy = False

        async def send_unless_busy(message: Message) -> None:
            nonlocal busy
            if message["type"] == "http.response.start":
                busy = message["status"] == 503
            if not busy:
                await send(message)

        try:
            # A copy, because routing writes into the scope.
            await self.app(dict(scope), receive, send_unless_busy)
        except Exception:
            # Starlette raises the exception again after it has answered it with a 503.
            if not busy:
                raise
        return busy


async def _whole_body(receive: Receive) -> list[Message]:
    messages = [await receive()]
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body", False):
        messages.append(await receive())
    return messages


def _again(messages: list[Message], receive: Receive) -> Receive:
    """A `receive` that first gives the messages kept, then what really comes (the client's disconnection)."""
    kept = iter(messages)

    async def receive_again() -> Message:
        for message in kept:
            return dict(message)
        return await receive()

    return receive_again

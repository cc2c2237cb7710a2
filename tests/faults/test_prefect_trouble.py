"""What Prefect's client raises becomes one of our errors, which says what to do."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient

from fedrounds.fl_components.errors import RunFailed, Unreachable
from fedrounds.flows.prefect_runs import translate_prefect_error


class Broken(BaseHTTPRequestHandler):
    """A server whose disk is full, say."""

    def do_GET(self) -> None:
        self.send_error(500)

    def log_message(self, *_: object) -> None:
        return


def test_a_server_that_fails() -> None:
    with HTTPServer(("127.0.0.1", 0), Broken) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            client = SyncPrefectClient(f"http://127.0.0.1:{server.server_port}/api")
            with pytest.raises(httpx.HTTPStatusError) as caught:
                client.read_flow_runs()
        finally:
            server.shutdown()
            thread.join()
    error = translate_prefect_error(caught.value, "k3f9")
    assert isinstance(error, RunFailed)
    assert error.message == (
        f"the Prefect server at 127.0.0.1:{server.server_port} failed: it answered 500 (Internal Server Error) "
        "to GET /api/csrf-token"
    )
    assert error.hint is not None and "fedrounds resume k3f9" in error.hint


def test_a_server_that_is_gone() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/api"
    with pytest.raises(httpx.ConnectError) as caught:
        httpx.get(url)
    error = translate_prefect_error(caught.value, "k3f9")
    assert isinstance(error, Unreachable)
    assert error.hint is not None and "fedrounds resume k3f9" in error.hint


def test_any_other_error_stays_as_it_is() -> None:
    error = ValueError("a bug")
    assert translate_prefect_error(error, "k3f9") is error

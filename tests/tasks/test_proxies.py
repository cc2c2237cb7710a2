from __future__ import annotations

import socket

import httpx
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from fedrounds.fl_components.errors import NotInstalled, Unreachable
from fedrounds.tasks import proxies
from fedrounds.tasks.tracking import server

ENTRIES = [
    "",
    "*",
    "localhost",
    "127.0.0.0/8",
    "::1",
    "[::1]",
    "[::1]:80",
    "fe80::/10",
    ".corp",
    "http://a:b",
    "#",
    "ü.de",
]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:4200/api", True),
        ("http://127.8.8.8", True),
        ("http://localhost:5000", True),
        ("http://[::1]:5000", True),
        ("https://10.0.0.1", False),
        ("http://localhost.example", False),
        ("sqlite:////srv/mlflow.db", False),
        ("http://[::1", False),
    ],
)
def test_loopback_addresses(url: str, expected: bool) -> None:
    assert proxies.is_loopback(url) is expected


@given(entries=st.lists(st.sampled_from(ENTRIES) | st.text(max_size=12), max_size=4))
def test_every_client_reaches_loopback_directly_whatever_bypassed_the_proxies(entries: list[str]) -> None:
    configured = ",".join(entry for entry in entries if entry.isprintable())
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HTTP_PROXY", "https_proxy", "ALL_PROXY"):
            patch.setenv(name, "http://proxy.example:3128")
        patch.delenv("no_proxy", raising=False)
        patch.setenv("NO_PROXY", configured)
        for name, value in proxies.bypassing_loopback().items():
            patch.setenv(name, value)
        for url in ("http://127.0.0.1:4200/api", "http://localhost:5000/"):
            assert requests.utils.get_environ_proxies(url) == {}
        httpx.Client(verify=False).close()  # makes a transport for each entry


def test_other_hosts_are_still_reached_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    for name, value in proxies.bypassing_loopback({}).items():
        monkeypatch.setenv(name, value)
    assert requests.utils.get_environ_proxies("http://mlflow.example/")["http"] == "http://proxy.example:3128"


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ("socks5h://u:hunter2@proxy:1080", NotInstalled, "names a SOCKS proxy, for which the package"),
        ("socks4://u:hunter2@proxy:1080", Unreachable, "is not the URL of an HTTP or SOCKS proxy"),
        ("http://u:hunter2@proxy:none", Unreachable, "is not the URL of an HTTP or SOCKS proxy"),
    ],
)
def test_a_proxy_that_a_remote_server_cannot_be_reached_through_is_told_without_its_password(
    value: str, error: type[NotInstalled | Unreachable], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxies, "find_spec", lambda name: None)
    monkeypatch.setenv("all_proxy", value)
    with pytest.raises(error, match=words) as caught:
        proxies.check_usable("https://prefect.example/api")
    assert "all_proxy" in caught.value.message and "hunter2" not in str(caught.value)
    monkeypatch.setenv("all_proxy", "proxy.example:3128")
    proxies.check_usable("https://prefect.example/api")


def test_mlflow_on_this_machine_is_reached_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed_to_http:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{closed_to_http.getsockname()[1]}")
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setenv("no_proxy", "")
        server.prepare()
        assert requests.utils.get_environ_proxies("http://127.0.0.1:5000/") == {}
        assert requests.utils.get_environ_proxies("http://mlflow.example/") != {}

"""Proxies that the environment configures, which this machine's own servers are never reached through."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from importlib.util import find_spec
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from fedrounds.fl_components.errors import NotInstalled, Unreachable

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def is_loopback(url: str) -> bool:
    """Return whether `url` is an address of this machine's own loopback interface.

    >>> is_loopback("http://127.0.0.1:4200/api"), is_loopback("http://[::1]:5000"), is_loopback("https://prefect.example")
    (True, True, False)
    """
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def bypassing_loopback(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that let all clients reach loopback addresses directly; what else bypasses proxies stays.

    Both spellings are set, because clients differ in which one they prefer. Entries at which Prefect's HTTP client
    fails (it takes each for a URL's host) are left out.

    >>> bypassing_loopback({"NO_PROXY": "localhost,10.0.0.0/8"})["no_proxy"]
    'localhost,10.0.0.0/8,127.0.0.1,::1'
    """
    configured = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    hosts = [host for host in map(str.strip, configured.split(",")) if _is_pattern(host)]
    if hosts != ["*"]:
        hosts += [host for host in LOOPBACK if host not in hosts]
    return dict.fromkeys(("NO_PROXY", "no_proxy"), ",".join(hosts))


def _is_pattern(host: str) -> bool:
    """Whether httpx can read an entry of NO_PROXY."""
    import httpx

    with suppress(ValueError):
        return bool(ip_address(host))
    try:
        return bool(host) and bool(httpx.URL(host if "://" in host else f"all://*{host}"))
    except httpx.InvalidURL:
        return False


def unusable_proxies(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables with which Prefect's HTTP client could not even be made, each with the reason.

    The client makes a transport for every proxy, also for those that it will not use.
    """
    import httpx

    reasons: dict[str, str] = {}
    for name, value in environment.items():
        if name.lower() not in PROXIES or not value.strip():
            continue
        try:
            scheme = httpx.Proxy(value if "://" in value else f"http://{value}").url.scheme
        except (ValueError, httpx.InvalidURL):
            reasons[name] = f"{name} is not the URL of an HTTP or SOCKS proxy"
        else:
            if scheme.startswith("socks") and find_spec("socksio") is None:
                reasons[name] = f"{name} names a SOCKS proxy, for which the package socksio is missing"
    return reasons


def check_usable(api_url: str) -> None:
    """Raise `NotInstalled` or `Unreachable` when the proxies of the environment keep `api_url` from being reached."""
    for reason in unusable_proxies().values():
        where = f"the Prefect server at {api_url} cannot be reached: {reason}"
        if "socksio" in reason:
            raise NotInstalled(where, hint='install it: pip install "httpx[socks]"')
        raise Unreachable(where, hint="write it as http://host:port, or unset it")


@contextmanager
def direct_prefect_clients() -> Iterator[None]:
    """Let Prefect's HTTP clients of a loopback address ignore the environment's proxies inside.

    NO_PROXY is not enough for httpx, which fails on a proxy that it cannot use before it looks whether it is needed.
    """
    from prefect.client.base import PrefectHttpxAsyncClient, PrefectHttpxSyncClient

    before = {client: client.__init__ for client in (PrefectHttpxAsyncClient, PrefectHttpxSyncClient)}
    for client, make in before.items():
        setattr(client, "__init__", _direct(make))  # noqa: B010 (mypy forbids to assign to a method)
    try:
        yield
    finally:
        for client, make in before.items():
            setattr(client, "__init__", make)  # noqa: B010


def _direct(make: Any) -> Any:
    @wraps(make)
    def direct(client: Any, *args: Any, **settings: Any) -> None:
        if is_loopback(str(settings.get("base_url", ""))):
            settings["trust_env"] = False
        make(client, *args, **settings)

    return direct

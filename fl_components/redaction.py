"""Passwords taken out of text that people, logs or servers are to see."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from urllib.parse import unquote

HIDDEN = "***"
URL_VARIABLES = (
    "FEDROUNDS_DATABASE_URL",
    "FEDROUNDS_BLOBS_URL",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI",
    "PREFECT_API_URL",
)
SECRET_VARIABLES = (
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "PREFECT_API_AUTH_STRING",
    "PREFECT_API_KEY",
    "PGPASSWORD",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
LEAST_LENGTH = 4
"""Shorter secrets are hidden where a URL or a field shows them, not wherever their letters occur."""

# A URL, also one with too few or too many slashes; its last @ ends what may hold a password, as in `p@ss/word@host`.
_USER_INFO = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*:/+)(?P<user>[^\s'\"<>]*)@")
_WHOLE_USER_INFO = re.compile(r"^(?P<scheme>[^:/@]*:?/*)(?P<user>.*)@", re.DOTALL)
# password=..., also in a query, in a connection string, and quoted.
_FIELD = re.compile(
    r"(?P<name>[\w.-]*(?:passw|\bpass\b|passphrase|pwd|secret|token(?!s)|credential|api_?key|access_?key|auth_string)[\w.-]*"
    r"(?:['\"]?\s*:\s*(?=['\"])|\s*=\s*))(?P<value>'[^']*'|\"[^\"]*\"|[^\s&;,'\")}\]]+)",
    re.IGNORECASE,
)
_HEADER = re.compile(r"(?P<kind>\b(?:Basic|Bearer)\s+)[A-Za-z0-9+/=._~-]{8,}")


def redact(text: str) -> str:
    """Return `text` with `***` for every password: in URLs of any form, in fields, and those that variables hold.

    >>> redact("postgresql:/admin:hunter2@db.example/fed is not a database URL")
    'postgresql:/admin:***@db.example/fed is not a database URL'
    >>> redact("postgresql://db.example/fed?user=admin&password=hunter2")
    'postgresql://db.example/fed?user=admin&password=***'
    >>> redact("s3://KEY:hunter2@bucket/x"), redact("https://token@mlflow.example")
    ('s3://KEY:***@bucket/x', 'https://***@mlflow.example')
    """
    for secret in sorted(set(_secrets()), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _USER_INFO.sub(_without_password, text)
    text = _FIELD.sub(lambda match: match["name"] + HIDDEN, text)
    return _HEADER.sub(lambda match: match["kind"] + HIDDEN, text)


def redact_url(url: str) -> str:
    """Return `url` without its password, also where blanks or quotes in it hide from `redact` where the URL ends.

    >>> redact_url("postgresql:/admin:my 'secret'@db.example/fed")
    'postgresql:/admin:***@db.example/fed'
    """
    return redact(_WHOLE_USER_INFO.sub(_without_password, url))


def _without_password(match: re.Match[str]) -> str:
    scheme, (user, colon, _) = match["scheme"], match["user"].partition(":")
    if scheme.lower().startswith("http"):  # a user alone may be a token
        return f"{scheme}{HIDDEN}@"
    return f"{scheme}{user}{colon}{HIDDEN if colon else ''}@"


def _secrets() -> Iterator[str]:
    """The secrets that variables hold, also as they read after decoding."""
    for name in SECRET_VARIABLES:
        value = os.environ.get(name, "")
        yield from _forms(value)
        yield from _forms(value.partition(":")[2])  # PREFECT_API_AUTH_STRING is user:password
    for name in (*URL_VARIABLES, *(name for name in os.environ if name.lower().endswith("_proxy"))):
        value = os.environ.get(name, "")
        before, at, _ = value.rpartition("@")
        if at:
            yield from _forms(re.sub(r"^[^:/]*:/*", "", before).partition(":")[2])
        for field in _FIELD.finditer(value):
            yield from _forms(field["value"].strip("'\""))


def _forms(secret: str) -> Iterator[str]:
    for form in (secret, unquote(secret)):
        if len(form) >= LEAST_LENGTH and form != HIDDEN:
            yield form

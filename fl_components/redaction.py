"""Passwords taken out of text that people, logs or servers are to see."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Iterator
from urllib.parse import quote, unquote

HIDDEN = "***"
URL_VARIABLES = (
    "FEDROUNDS_DATABASE_URL",
    "FEDROUNDS_BLOBS_URL",
    "FEDROUNDS_DATA_URL",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI",
    "PREFECT_API_URL",
    "PREFECT_SERVER_DATABASE_CONNECTION_URL",
    "PREFECT_API_DATABASE_CONNECTION_URL",
)
SECRET_VARIABLES = (
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "PREFECT_API_AUTH_STRING",
    "PREFECT_SERVER_API_AUTH_STRING",
    "PREFECT_API_KEY",
    "PGPASSWORD",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_CLIENT_SECRET",
    "DATABRICKS_TOKEN",
)
MIN_LENGTH = 4
"""Shorter secrets are hidden where a URL or a field shows them, not wherever their letters occur."""

MIN_TOKEN = 12
"""A shorter user name without a password is not taken for a token, so its letters may occur elsewhere."""

# With these schemes the part before the @ is a name, not a token, unless a colon is in it.
_NAMING = re.compile(
    "postgres|postgresql|mysql|mariadb|mssql|oracle|sqlite|file|local|s3|s3a|gs|gcs|az|abfs|abfss|wasb|wasbs|hdfs|ssh|sftp"
    "|tcp|tls|ucx|models"
)
_SCHEME_SIGNS = string.ascii_letters + string.digits + "+.-"
_WORD = re.compile(r"[^\s'\"<>]+")
_COLON = re.compile(r":|%3A", re.IGNORECASE)
_COLON_BEFORE = re.compile(r"(?::|%3A)$", re.IGNORECASE)
_ENCODED_AT = re.compile(r"(?:[^:/?#]*:/+)?[^/?#]*(?=%40)")

# password=..., also in a query, in a connection string, quoted, and percent-encoded. The name may begin before the
# match. Every repetition is bounded or cannot fail, so the time is linear in the length of the text.
_SECRET_NAME = (
    r"(?:passw|(?<![^\W_])pass(?!\w)|passphrase|pwd|secret|credential|auth_string"
    r"|(?:api|access|account|private|shared|ssl)[_-]?key|(?:amz-|access_?)signature)"
)
_FIELD = re.compile(
    rf"(?P<name>(?:(?:{_SECRET_NAME}|token(?!s))[\w.-]{{0,60}}(?:['\"]?\s{{0,9}}:\s{{0,9}}(?=['\"])|\s{{0,9}}(?:=|%3D)\s{{0,9}})"
    rf"|(?:{_SECRET_NAME}|[_-]token(?!s))[\w.-]{{0,60}}(?::\s{{0,9}}|%3A)"
    r"|[?&;](?:sig|signature|key|auth|code|options|pw)=))"
    r"(?P<value>'(?:[^'\\]|\\.?)*'?|\"(?:[^\"\\]|\\.?)*\"?|[^\s&;,'\")}\]]+)",
    re.IGNORECASE | re.DOTALL,
)
_HEADER = re.compile(r"(?P<kind>\b(?:Basic|Bearer)\s{1,9})[A-Za-z0-9+/=._~-]{8,}")
_AUTHORIZATION = re.compile(
    r"(?P<kind>\bauthorization['\"]?\s{0,9}[:=]\s{0,9}['\"]?)(?:[A-Za-z]{1,20}\s{1,9})?[^\s'\",;)}\]]+", re.IGNORECASE
)
_QUERY_VALUE = re.compile(r"[?&][^=&]*=(?P<value>[^&]*)")


def redact(text: str) -> str:
    """Return `text` with `***` for every password: in URLs of any form, in fields, and those that variables hold.

    The time is linear in the length of `text`.

    >>> redact("postgresql://admin:hunter2@db.example/fed is not a database URL")
    'postgresql://admin:***@db.example/fed is not a database URL'
    >>> redact("postgresql://db.example/fed?user=admin&password=hunter2")
    'postgresql://db.example/fed?user=admin&password=***'
    >>> redact("s3://KEY:hunter2@bucket/x"), redact("https://token@mlflow.example"), redact("admin:hunter2@db/fed")
    ('s3://KEY:***@bucket/x', 'https://***@mlflow.example', 'admin:***@db/fed')
    """
    secrets = sorted(set(_secrets()), key=len, reverse=True)
    if secrets:  # in any case: what is taken for a host's name is written in small letters
        text = re.sub("|".join(map(re.escape, secrets)), HIDDEN, text, flags=re.IGNORECASE)
    text = _WORD.sub(lambda match: _without(match[0], _user_info(match[0])), text)
    text = _FIELD.sub(lambda match: match["name"] + HIDDEN, text)
    text = _AUTHORIZATION.sub(lambda match: match["kind"] + HIDDEN, text)
    return _HEADER.sub(lambda match: match["kind"] + HIDDEN, text)


def redact_url(url: str) -> str:
    """Return `url` without its password, also where `redact` cannot see that it is a URL, or where it ends.

    >>> redact_url("postgresql://admin:my 'secret'@db.example/fed"), redact_url("hunter2@db.example/fed")
    ('postgresql://admin:***@db.example/fed', '***@db.example/fed')
    """
    for match in reversed([*_QUERY_VALUE.finditer(url)]):
        if _FIELD.search(match[0]):
            url = _without(url, match.span("value"))
    return redact(_without(url, _user_info(url, alone=True)))


def _without(text: str, span: tuple[int, int] | None) -> str:
    return text if span is None else text[: span[0]] + HIDDEN + text[span[1] :]


def _user_info(url: str, *, alone: bool = False) -> tuple[int, int] | None:
    """Where the secret of a URL's user info begins and ends: its last @ ends it, as in `p@ss/word@host`.

    With `alone` a URL without a scheme and a colon is one of the form `token@host` as well.
    """
    at = url.rfind("@")
    if at < 0 and (match := _ENCODED_AT.match(url)):
        at = match.end()
    if at < 0:
        return None
    colon = _COLON.search(url, 0, at)
    if colon is None:
        is_path = url.startswith(("/", "~", ".")) and not url.startswith("//")
        return (len(url) - len(url.lstrip("/")), at) if alone and not is_path else None
    if not url.startswith("/", colon.end()):
        return colon.end(), at
    start = at - len(url[colon.end() : at].lstrip("/"))
    before = url[: colon.start()]
    scheme = before[len(before.rstrip(_SCHEME_SIGNS)) :].lower().partition("+")[0]
    if _NAMING.fullmatch(scheme) and (start - colon.end() > 1 or scheme == "models"):
        password = _COLON.search(url, start, at)
        return (password.end(), at) if password is not None else None
    return start, at


def _secrets() -> Iterator[str]:
    """The secrets that variables hold, in all forms in which a message may show them."""
    for name in SECRET_VARIABLES:
        value = os.environ.get(name, "")
        yield from _forms(value)
        if name.endswith("_AUTH_STRING"):  # user:password
            yield from _forms(value.partition(":")[2])
    for name in (*URL_VARIABLES, *(name for name in os.environ if name.lower().endswith("_proxy"))):
        value = os.environ.get(name, "")
        for password in _passwords(value):
            yield from _forms(password)
        for match in _QUERY_VALUE.finditer(value):
            if _FIELD.search(match[0]):
                yield from _forms(match["value"])
                yield from _forms(unquote(match["value"]).partition("=")[2])  # options=-c name=value
        for match in _FIELD.finditer(value):
            yield from _forms(match["value"].strip("'\""))


def _passwords(url: str) -> Iterator[str]:
    """The secret of a URL's user info, and its parts, which a parser may take for the host, the port or the path."""
    span = _user_info(url, alone=True)
    if span is None:
        return
    password = url[slice(*span)]
    inner = _COLON.search(password)
    if inner is None and _COLON_BEFORE.search(url, 0, span[0]) is None and len(password) < MIN_TOKEN:
        return
    yield password
    if inner is not None:  # user:password
        password = password[inner.end() :]
        yield password
    yield from re.split("[@:/?#]", password)


def _forms(secret: str) -> Iterator[str]:
    """`secret` as it is, decoded, encoded, escaped as `repr` does, and in one line."""
    for plain in (secret, unquote(secret)):
        escaped = plain.encode("unicode_escape").decode("ascii")
        written = (
            plain,
            repr(plain)[1:-1],
            escaped,
            escaped.replace("'", "\\'"),
            " ".join(plain.split()),
            plain.strip(),
        )
        encoded = (quote(plain, errors="replace"), quote(plain, safe="", errors="replace"))
        for form in (*written, *encoded):
            if len(form) >= MIN_LENGTH and form != HIDDEN:
                yield form

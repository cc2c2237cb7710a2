"""Download the files of public data sets, and list where they are."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import http.client
import io
import os
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from fedrounds.fl_components.data.folders import find_file, places
from fedrounds.fl_components.data.published import PUBLISHED, PublishedData, PublishedFile
from fedrounds.fl_components.errors import ConfigError, DataError, Unreachable, one_line
from fedrounds.fl_components.store.durable_files import remove_leftovers

TIMEOUT_S: Final = 30.0  # for a connection, and for each piece of an answer
_CHUNK_BYTES: Final = 1 << 20
_OVERHEAD_BYTES: Final = 1 << 16  # of gzip, for content that does not compress


def statuses() -> list[dict[str, Any]]:
    """Return what is known of each public data set.

    The files that its data kind reads, the folder where they are or where `download` would put them, which are missing
    there, where they are published, and what to do instead where they are not.

    >>> [each["name"] for each in statuses()]
    ['heart_disease', 'digits', 'mnist', 'emnist', 'femnist', 'shakespeare']
    """
    return [_status(name, data) for name, data in PUBLISHED.items()]


def _status(name: str, data: PublishedData) -> dict[str, Any]:
    if not data.files:
        return {"name": name, "files": [], "missing": [], "folder": None, "url": None, "instead": data.instead}
    folder = _folder(data, places(name))
    missing = [file for file in data.files if find_file(folder, file) is None]
    return {
        "name": name,
        "files": list(data.files),
        "missing": missing,
        "folder": str(folder),
        "url": data.url,
        "instead": data.instead,
    }


def download(name: str, url: str | None = None, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Put the files of the public data set `name` into $FEDROUNDS_DATA/NAME, or else HOME/data/NAME.

    A file that one of the searched folders already has is not fetched again; its checksum is compared. Each file
    appears under its name whole, durable and with the published checksum, or not at all. The proxy that the
    environment names is used, but not for this machine itself.

    Args:
      name: the data kind.
      url: fetch from URL/NAME/FILE, a mirror. By default $FEDROUNDS_DATA_URL; without it, from the publisher.
      say: called with a line for each file that is fetched.

    Returns {"name", "folder", "downloaded": file names, "present": file names}; where a data set needs no files,
    "folder" is None and "instead" says why. Raises `ConfigError` for a data set
    that is not published and for an unusable URL, `Unreachable` when a file cannot be fetched, with what to put where,
    and `DataError` when a file has another checksum or cannot be written.
    """
    data = PUBLISHED.get(name)
    if data is None:
        raise ConfigError(
            f"there is no public data set {name!r}", hint=f"the public data sets are {', '.join(PUBLISHED)}"
        )
    if not data.files:
        return {"name": name, "folder": None, "instead": data.instead, "downloaded": [], "present": []}
    folder = _folder(data, places(name))
    if all(find_file(folder, file) for file in data.files):
        _check_present(data, folder)
        return {"name": name, "folder": str(folder), "downloaded": [], "present": list(data.files)}
    if data.url is None:
        raise ConfigError(f"{name} cannot be downloaded: {data.instead}", hint=_by_hand(data, folder))
    source = _source(name, data.url, url or os.environ.get("FEDROUNDS_DATA_URL"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            _check_present(data, folder)
            missing = [file for file in data.files if find_file(folder, file) is None]
            fetch = _fetch_archive if data.archive_folder else _fetch_files
            fetch(data, missing, folder, source, say)
    except OSError as error:  # of the folder: one of the connection is Unreachable by now
        raise DataError(
            f"the files of {name} cannot be written to {folder}: {error.strerror or error}",
            hint="set FEDROUNDS_DATA to a folder that this account may write to, with enough space",
        ) from error
    present = [file for file in data.files if file not in missing]
    return {"name": name, "folder": str(folder), "downloaded": missing, "present": present}


def _folder(data: PublishedData, searched: Sequence[Path]) -> Path:
    """The folder that a training would read from, or else the first one; for an archive, one that has all of it."""
    enough: Callable[[Iterable[object]], bool] = all if data.archive_folder else any
    found = (place for place in searched if enough(find_file(place, file) for file in data.files))
    return next(found, searched[0])


def _check_present(data: PublishedData, folder: Path) -> None:
    """Raises `DataError` for a file in the folder that is not the published one."""
    for published in data.downloads:
        present = find_file(folder, published.name.removesuffix(".gz"))
        if present is None or data.archive_folder:  # the single files of an archive have no published checksums
            continue
        try:
            wrong = _difference(present, published)
        except OSError as error:
            raise DataError(f"{present} cannot be read: {error.strerror or error}") from error
        if wrong is not None:
            raise DataError(
                f"{present} is not the published file: {wrong}", hint="move it away, then run the command again"
            )


def _fetch_files(
    data: PublishedData, missing: Sequence[str], folder: Path, source: str, say: Callable[[str], None]
) -> None:
    for published in data.downloads:
        name = published.name.removesuffix(".gz")
        if name in missing:
            url, by_hand = f"{source}/{published.name}", _by_hand(data, folder)
            with _fetched(url, folder / published.name, published, by_hand, say) as temporary:
                # A proxy may have uncompressed it.
                _publish(temporary, folder / (published.name if _is_gzip(temporary) else name))


def _fetch_archive(
    data: PublishedData, missing: Sequence[str], folder: Path, source: str, say: Callable[[str], None]
) -> None:
    (published,) = data.downloads
    if not missing:
        return
    url, by_hand = f"{source}/{published.name}", _by_hand(data, folder)
    with (
        _fetched(url, folder / published.name, published, by_hand, say) as temporary,
        zipfile.ZipFile(temporary) as archive,
    ):
        for name in missing:
            target = folder / f"{name}.gz"
            remove_leftovers(target)
            with _temporary(target) as part, archive.open(f"{data.archive_folder}/{name}.gz") as content:
                _write(part, _pieces(content.read))
                _publish(part, target)


def _source(name: str, publisher: str, mirror: str | None) -> str:
    """The URL of the folder that has the files."""
    if not mirror:
        return publisher
    if not _is_usable(mirror):
        raise ConfigError(
            "the URL to download from cannot be used",
            hint="give --url, or FEDROUNDS_DATA_URL, as http(s)://host/folder, without user, password or query: "
            f"the files are fetched from URL/{name}/FILE",
        )
    return f"{mirror.rstrip('/')}/{name}"


def _is_usable(url: str) -> bool:
    """
    >>> _is_usable("https://mirror.example:8443/data"), _is_usable("ftp://mirror.example"), _is_usable("http://a b")
    (True, False, False)
    """
    try:
        parts = urllib.parse.urlsplit(url)
        has_host = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # the port, or brackets
        return False
    plain = url.isascii() and url.isprintable() and " " not in url
    return has_host and plain and "@" not in parts.netloc and not parts.query and not parts.fragment


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Held by one process at a time; another waits, and then finds the files."""
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A name beside the target; a file of that name is removed in the end."""
    path = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _write(path: Path, chunks: Iterable[bytes]) -> None:
    with open(path, "xb") as out:
        for chunk in chunks:
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())


def _publish(temporary: Path, target: Path) -> None:
    os.replace(temporary, target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _fetched(url: str, target: Path, file: PublishedFile, by_hand: str, say: Callable[[str], None]) -> Iterator[Path]:
    """The content of the URL, checked and durable, in a temporary file beside the target."""
    remove_leftovers(target)
    most_bytes = file.num_bytes + (_OVERHEAD_BYTES if file.name.endswith(".gz") else 0)
    say(f"downloading {url}")
    with _temporary(target) as temporary:
        _write(temporary, _chunks(url, most_bytes, by_hand))
        wrong = _difference(temporary, file)
        if wrong is not None:
            raise DataError(
                f"{url} is not the published file: {wrong}",
                hint="it was removed; try again, or name a mirror by --url or FEDROUNDS_DATA_URL",
            )
        yield temporary


def _chunks(url: str, most_bytes: int, by_hand: str) -> Iterator[bytes]:
    """What the server answers, in pieces. Raises `Unreachable`, with `by_hand` as its hint."""

    def unreachable(reason: str) -> Unreachable:
        return Unreachable(f"{url} cannot be downloaded: {reason}", hint=by_hand)

    try:
        with _opener(url).open(url, timeout=TIMEOUT_S) as response:
            announced = response.headers.get("content-length", "")
            expected = int(announced) if announced.isdecimal() else None
            received = 0
            while True:
                if max(received, expected or 0) > most_bytes:
                    raise unreachable(f"the answer is longer than the {most_bytes:,} bytes that the file may have")
                chunk = response.read(_CHUNK_BYTES)
                if not chunk:
                    break
                received += len(chunk)
                yield chunk
            if expected is not None and received < expected:
                raise unreachable(f"the connection ended after {received:,} of {expected:,} bytes")
    except urllib.error.HTTPError as error:
        raise unreachable(f"the server answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        reason = error.reason
        raise unreachable((reason.strerror if isinstance(reason, OSError) else None) or str(reason)) from error
    except TimeoutError as error:
        raise unreachable(f"no answer within {TIMEOUT_S:g} s") from error
    except (
        http.client.HTTPException,
        OSError,
        UnicodeError,
    ) as error:  # UnicodeError: of a name that cannot be looked up
        raise unreachable(one_line(error)) from error


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Through the proxy of the environment, except to this machine itself."""
    host = urllib.parse.urlsplit(url).hostname or ""
    is_here = host == "localhost" or host.startswith("127.") or host == "::1"
    return urllib.request.build_opener(urllib.request.ProxyHandler({} if is_here else None))


def _difference(path: Path, published: PublishedFile) -> str | None:
    """In which way the content of the file, uncompressed, is not the published one; None where it is."""
    digest, num_bytes = hashlib.sha256(), 0
    try:
        with _content(path, compressed=published.name.endswith(".gz")) as content:
            for chunk in _pieces(content.read):
                digest.update(chunk)
                num_bytes += len(chunk)
                if num_bytes > published.num_bytes:
                    return f"it has more than {published.num_bytes:,} bytes"
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        return f"it cannot be uncompressed: {error}"
    if digest.hexdigest() != published.sha256:
        return f"its sha256 is {digest.hexdigest()} ({num_bytes:,} bytes), not {published.sha256}"
    return None


def _pieces(read: Callable[[int], bytes]) -> Iterator[bytes]:
    while chunk := read(_CHUNK_BYTES):
        yield chunk


def _content(path: Path, *, compressed: bool) -> gzip.GzipFile | io.BufferedReader:
    """A file opened to be read uncompressed, where it may be compressed and is."""
    return gzip.open(path, "rb") if compressed and _is_gzip(path) else open(path, "rb")


def _is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _by_hand(data: PublishedData, folder: Path) -> str:
    """Which files to put where, for a machine without a network."""
    return f"put {_listed(data.files)} into {folder}, as they are or with .gz after the name"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

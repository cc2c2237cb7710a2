"""Blobs: immutable bytes, named by the run, the holder's fencing number and the sha256 of their content.

A name is never used again by a later holder of the run, so deleting what no row refers to is safe at any time, also by
a process that was superseded and woke up.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Final, cast

from fedrounds.fl_components.errors import ConfigError, CorruptBlob, StoreError
from fedrounds.fl_components.redaction import redact_url
from fedrounds.fl_components.store.database import disk_full_error
from fedrounds.fl_components.store.durable_files import erase, write_durably

_ANY_FENCE: Final = 1 << 62


class Blobs:
    """The blobs under `url`: a folder, or any URL that fsspec knows (s3://bucket/prefix needs its package, s3fs).

    Raises `ConfigError` for a relative folder and for memory.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.label = redact_url(url)
        _check_place(url, self.label)

    def write(self, run_id: str, fence: int, data: bytes) -> str:
        """Makes `data` durable and returns its key. The same content again under the same fence is the same key."""
        key = f"{run_id}/{fence:06d}/{hashlib.sha256(data).hexdigest()}"
        with self._errors("written"):
            if self._is_local:
                write_durably(Path(self._path(key)), data, private=True)
            else:
                self._filesystem.pipe_file(self._path(key), data)
        return key

    def read(self, key: str) -> bytes:
        """The content of a blob. Raises `CorruptBlob` when it is missing or is not what was written."""
        hint = "restore the blobs from a backup"
        with self._errors("read"):
            try:
                data = cast(bytes, self._filesystem.cat_file(self._path(key)))
            except FileNotFoundError as error:
                raise CorruptBlob(f"blob {key} is missing from {self.label}", hint=hint) from error
        if hashlib.sha256(data).hexdigest() != key.rpartition("/")[2]:
            raise CorruptBlob(f"blob {key} in {self.label} is damaged: its content does not match its name", hint=hint)
        return data

    def delete(self, keys: Iterable[str]) -> int:
        """Deletes blobs and returns how many were there."""
        deleted = 0
        with self._errors("deleted"):
            for key in keys:
                with suppress(FileNotFoundError):
                    self._filesystem.rm_file(self._path(key))
                    deleted += 1
        return deleted

    def erase(self, keys: Iterable[str]) -> int:
        """Delete blobs whose bytes must not be read again: in a folder they are overwritten first.

        Returns how many were there.
        """
        if not self._is_local:
            return self.delete(keys)
        with self._errors("erased"):
            return sum(erase(Path(self._path(key))) for key in keys)

    def erase_run(self, run_id: str) -> int:
        """Erase all blobs of a run, and its folder. Returns how many there were."""
        erased = self.erase(self.keys(run_id, max_fence=_ANY_FENCE))
        if self._is_local:
            with self._errors("erased"):
                for folder in (*Path(self._path(run_id)).glob("*"), Path(self._path(run_id))):
                    with suppress(FileNotFoundError, NotADirectoryError):
                        if not any(folder.iterdir()):  # what others put there is theirs
                            folder.rmdir()
        return erased

    def keys(self, run_id: str, max_fence: int) -> list[str]:
        """What is there of a run, up to a fencing number, temporary files that a killed process left included.

        What others put into the run's folder (.DS_Store) is not a blob.
        """
        prefix = self._path(run_id)
        with self._errors("listed"):
            self._filesystem.invalidate_cache()
            paths = cast("list[str]", self._filesystem.find(prefix))
        names = [path[len(prefix) + 1 :] for path in paths]
        fences = [name.partition("/")[0] for name in names]
        return [
            f"{run_id}/{name}"
            for name, fence in zip(names, fences, strict=True)
            if fence.isdecimal() and int(fence) <= max_fence
        ]

    @cached_property
    def _location(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        try:
            filesystem, root = url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"the blobs' place {self.label} cannot be used: {error}", hint="check FEDROUNDS_BLOBS_URL"
            ) from error
        return filesystem, str(root).rstrip("/")

    @property
    def _filesystem(self) -> Any:
        return self._location[0]

    @property
    def _is_local(self) -> bool:
        return "file" in self._filesystem.protocol  # a name or a tuple of names

    def _path(self, key: str) -> str:
        return f"{self._location[1]}/{key}"

    @contextmanager
    def _errors(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise disk_full_error(self.label) from error
            raise StoreError(
                f"a blob in {self.label} cannot be {verb}: {error.strerror or error}",
                hint="check that the place exists, that this account may write there and that it is not read-only",
            ) from error


def _check_place(url: str, label: str) -> None:
    """Raise `ConfigError` unless the URL names one place, whatever the working folder and the process."""
    hint = "set FEDROUNDS_BLOBS_URL to the absolute path of a folder, or to a URL such as s3://bucket/prefix"
    links = url.split("::")  # as fsspec chains them: simplecache::s3://bucket
    for position, link in enumerate(links, start=1):
        scheme, separator, path = link.partition("://")
        if scheme == "memory":
            raise ConfigError(
                f"the blobs' place {label} is the memory of one process, and blobs must outlive it", hint=hint
            )
        if not separator:  # a folder, or the name of a wrapper
            scheme, path = ("file", link) if position == len(links) else (link, "")
        if scheme in ("file", "local") and not os.path.isabs(os.path.expanduser(path)):
            raise ConfigError(
                f"the blobs' place {label} is a relative path, which is another folder in each working folder",
                hint=hint,
            )

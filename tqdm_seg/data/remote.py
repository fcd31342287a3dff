"""Files of a folder or URL, read with patience: other tries for what passes, a time limit, one sentence at the end."""

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.implementations.local import LocalFileSystem

from .files import cut

R = TypeVar("R")
# Tries of one read, seconds before the second one (each further wait is twice as long), and seconds for each try.
TRIES, FIRST_WAIT, TIME_LIMIT = 6, 0.25, 60.0
LONGEST_WAIT = 30.0
PIECE = 2**24  # bytes of a large file that are read at once
_TRY_AGAIN = (408, 425, 429)  # of the HTTP statuses below 500
_NETWORK = ("aiohttp", "botocore", "httpx", "requests", "urllib3")


class DamagedError(ValueError):
    """What was read is not what was written: of remote files another try may help."""


class Storage:
    """A local folder, or any URL that fsspec reads (hf://, s3://, https://); names are paths under it.

    Raises ValueError for a URL of an unknown kind, ImportError for one whose library is not installed.
    """

    def __init__(self, folder: str | Path):
        self.folder = str(folder).rstrip("/") or "/"
        try:
            self.files, root = fsspec.core.url_to_fs(str(folder))
        except ValueError as error:
            raise ValueError(f"{folder} is no folder and no URL that can be read ({error}); see the address") from error
        except OSError as error:
            raise RemoteError(f"cannot reach {folder} ({error}); see that the address is right") from error
        self.root = root.rstrip("/")
        self.local = isinstance(self.files, LocalFileSystem)
        # In fsspec's own thread, whose answer would be waited for without end.
        self.limit = {"timeout": TIME_LIMIT} if isinstance(self.files, AsyncFileSystem) else {}

    def read(self, name: str, use: Callable[[bytes], R], size: int | None = None) -> R:
        """What `use` makes of a file's bytes; read again when it raises DamagedError.

        size: of the file, which is then read in pieces. Raises FileNotFoundError for a missing file.
        """
        path = f"{self.root}/{name}"

        def whole() -> R:
            if size is None or self.local:
                return use(self.files.cat_file(path, **self.limit))
            starts = range(0, size, PIECE)
            pieces = (self._patiently(name, lambda s=s: self._cat([path], [s], [min(s + PIECE, size)])) for s in starts)
            return use(b"".join(piece[0] for piece in pieces))

        return self._patiently(name, whole)

    def ranges(self, name: str, starts: Sequence[int], ends: Sequence[int], use: Callable[[list[bytes]], R]) -> R:
        """What `use` makes of byte ranges of a file, all asked for at once; read again when it raises DamagedError."""
        path = f"{self.root}/{name}"
        return self._patiently(name, lambda: use(self._cat([path] * len(starts), starts, ends)))

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none (or the server does not say)."""
        try:
            return self._patiently(name, lambda: self.files.info(f"{self.root}/{name}", **self.limit)["size"])
        except FileNotFoundError:
            return None

    def check_ranges(self, name: str) -> None:
        """Raises OSError for a web server that would send the whole file for every part of it."""
        if "http" in self.files.protocol:
            status = self._patiently(name, lambda: sync(self.files.loop, self._status, name, **self.limit))
            if status != 206:
                raise self._without_ranges(name)

    async def _status(self, name: str) -> int:
        session = await self.files.set_session()
        headers = self.files.kwargs.get("headers", {}) | {"Range": "bytes=0-3"}
        async with session.get(self.files.encode_url(f"{self.root}/{name}"), headers=headers) as answer:
            answer.raise_for_status()
            return answer.status

    def _cat(self, paths: list[str], starts: Sequence[int], ends: Sequence[int]) -> list[bytes]:
        found = self.files.cat_ranges(paths, list(starts), list(ends), on_error="raise", **self.limit)
        for path, start, end, part in zip(paths, starts, ends, found, strict=True):
            if isinstance(part, BaseException):  # fsspec 2025.3 returns errors whatever on_error says
                raise part
            if len(part) > end - start:
                raise self._without_ranges(path.removeprefix(f"{self.root}/"))
            if len(part) < end - start:
                raise DamagedError(f"{path} gave {len(part)} of {end - start} bytes from byte {start}; copy it again")
        return found

    def _without_ranges(self, name: str) -> "RemoteError":
        return RemoteError(
            f"the server of {self.folder}/{name} ignores byte ranges, by which frames are read; download the folder, "
            "or use a server that answers Range requests"
        )

    def _patiently(self, name: str, read: Callable[[], R]) -> R:
        """The result of `read`, after further tries where that may help."""
        for attempt in range(1, TRIES + 1):
            try:
                return read()
            except Exception as error:
                reason, passes = _reason(error)
                if self.local or not reason or (isinstance(error, DamagedError) and attempt == TRIES):
                    raise
                if not passes or attempt == TRIES:
                    tries = f" after {TRIES} tries" if passes else ""
                    raise RemoteError(
                        f"cannot read {self.folder}/{name}{tries} ({reason}); check address, connection and rights, or "
                        "download the folder"
                    ) from error
                time.sleep(max(FIRST_WAIT * 2 ** (attempt - 1), _asked_to_wait(error)))
        raise AssertionError


class RemoteError(OSError):
    """The server cannot do what is needed, or no try brought it."""


def _reason(error: BaseException) -> tuple[str, bool]:
    """What a network or its server did wrong, and whether another try may help; "" for errors that say it all."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        return _reason(error.__cause__)  # fsspec says so of any failed look at a file on the web
    if isinstance(error, RemoteError | FileNotFoundError | PermissionError | IsADirectoryError):
        return "", False
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int) and status:
        gone = status in (404, 410)
        return "" if gone else f"HTTP status {status}", status >= 500 or status in _TRY_AGAIN
    if isinstance(error, TimeoutError | asyncio.TimeoutError):  # two classes in Python 3.10
        return f"no answer within {TIME_LIMIT:g} seconds", True
    network = type(error).__module__.split(".")[0] in _NETWORK
    if network or isinstance(error, OSError | DamagedError):
        wrong_url = network and isinstance(error, ValueError)
        return cut(str(error) or type(error).__name__, 120), not wrong_url
    return "", False


def _asked_to_wait(error: Any) -> float:
    """Seconds that the server asks to wait for (Retry-After), at most LONGEST_WAIT."""
    headers = getattr(error, "headers", None) or getattr(getattr(error, "response", None), "headers", None) or {}
    asked = headers.get("Retry-After", "0")
    return min(float(asked), LONGEST_WAIT) if asked.isdecimal() else 0.0

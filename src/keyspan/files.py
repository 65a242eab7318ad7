"""Reading JSON, sums of files, and writing files: atomically, and with the file's name in every error."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError for anything else, OSError where there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; want JSON") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: got {type(found).__name__}, want a JSON object")
    return found


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Add the path to an OSError without one, as a full disk gives: writes and flushes do not name the file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_file(path: Path, data: bytes) -> None:
    """Write a file atomically: under another name in the same folder, flushed to disk, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named_errors(path), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    flush_folder(path.parent)


@contextmanager
def locked(folder: Path, does: str) -> Iterator[None]:
    """A folder locked against other processes; the system drops the lock when the process ends.

    What `write_file` had begun to write in it when another process was killed is removed.

    Raises ValueError where another process holds it, which `does` something, such as "trains in this folder".
    """
    with (folder / ".lock").open("a+b") as file:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{folder}: another process {does}; want another one, or wait") from None
        for leftover in folder.glob(".*.[0-9]*.tmp"):
            leftover.unlink(missing_ok=True)
        yield


def flush_folder(folder: Path) -> None:
    """Make a rename in the folder durable; only POSIX opens folders."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with named_errors(folder):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

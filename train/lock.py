"""A folder that one process at a time works in."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
# What a file system without locks answers.
LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder is this process's while entered, made if it isn't there, and removed again if it stays empty.

    ValueError that names it and its holder if another process has it; where there are no locks, none has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    with path.open("a+") as file:
        if not _lock(file):
            file.seek(0)
            raise ValueError(f"{folder}: another process is at work there ({file.read() or 'unknown'})")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            if folder.is_dir() and [entry.name for entry in folder.iterdir()] == [LOCK_FILE]:
                path.unlink()
                folder.rmdir()


def check_free(folder: Path) -> None:
    """ValueError that names the folder if another process has it."""
    if (folder / LOCK_FILE).exists():
        with held(folder):
            pass


def _lock(file: IO[str]) -> bool:
    """Whether the file is this process's now; it is given back when the file is closed or the process ends."""
    if fcntl is None:
        return True
    try:
        # Not flock, whose locks live on in the data workers of a process that has been killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in LOCKLESS:
            raise
    return True

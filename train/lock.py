"""Lock files with a record of the owner, for exclusive access to a run or an output."""

import errno
import json
import os
import socket
import time
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # fcntl is not available on Windows
    fcntl = None  # type: ignore[assignment]

from mc_core.errors import UserError

RUN = ".lock"  # in a run's directory
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class LockedError(UserError):
    """Another process has the lock; the message describes this process and what to do."""


class Lock:
    """An exclusive lock on a run or an output.

    The lock is an `flock` on an open file, so it is released when the process ends. The file has a
    record of the owner and is deleted on release. A stale record of this host is overwritten. A
    record of another host is respected, because shared file systems do not always share locks. If
    the file system has no locks, only the record is used.

    Args:
        path: path of the lock file.
        subject: name of the locked object in messages.
        advice: advice in the message while another process has the lock.
    """

    def __init__(self, path: Path, subject: Path, advice: str):
        self._path, self._subject, self._advice = path, subject, advice
        self._file: IO[bytes] | None = None
        self._created_folder = False

    @classmethod
    def of_run(cls, directory: Path) -> "Lock":
        """Return the lock of a run's directory."""
        return cls(directory / RUN, directory, "wait for it, or set another run.directory")

    def acquire(self) -> None:
        """Acquire the lock if this object does not have it; create a missing folder.

        Read-only folders are not locked.

        Raises:
            LockedError: another process has the lock.
            OSError: the file cannot be created.
        """
        folder = self._path.parent
        if self._file is not None or fcntl is None:
            return
        if not folder.is_dir():
            folder.mkdir(parents=True)
            self._created_folder = True
        elif not os.access(folder, os.W_OK):
            return
        file, locked = self._open()
        owner = _read(file)
        if owner and not (owner["host"] == socket.gethostname() and (locked or _is_dead(owner))):
            file.close()
            remove = f"if that process has ended, delete {self._path}"
            raise LockedError(f"{self._subject}: in use by {_name(owner)}: {remove}")
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        record = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        file.seek(0)
        file.truncate()
        file.write(json.dumps(record).encode())
        file.flush()
        self._file = file

    def close(self) -> None:
        """Release the lock, if this object has it, and delete the lock file.

        Also delete the folder if `acquire` created it and it is empty.
        """
        if self._file is None:
            return
        # Delete before unlocking, so that a process that has the old file open detects the change.
        self._path.unlink(missing_ok=True)
        self._file.close()
        self._file = None
        if self._created_folder and not any(self._path.parent.iterdir()):
            self._path.parent.rmdir()

    def _open(self) -> tuple[IO[bytes], bool]:
        """Return the open lock file, and True if the file system supports locks."""
        while True:
            file = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
            try:
                locked = _try_lock(file)
                if locked and _is_same_file(file, self._path):
                    return file, True
            except BlockingIOError as error:
                owner = _read(file)
                file.close()
                message = f"{self._subject}: in use by {_name(owner)}: {self._advice}"
                raise LockedError(message) from error
            except BaseException:
                file.close()
                raise
            if not locked:
                return file, False
            file.close()


def _try_lock(file: IO[bytes]) -> bool:
    """Lock an open file; return False where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    return True


def _is_same_file(file: IO[bytes], path: Path) -> bool:
    """Return True if the path still refers to the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _read(file: IO[bytes]) -> dict[str, Any] | None:
    """Return the record of the owner; None if it is missing or incomplete."""
    file.seek(0)
    try:
        record = json.loads(file.read())
        return {"pid": int(record["pid"]), "host": record["host"], "since": record["since"]}
    except (ValueError, TypeError, KeyError):
        return None


def _is_dead(owner: dict[str, Any]) -> bool:
    """Return True if this host has no process with the owner's id."""
    try:
        os.kill(owner["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        return False
    return False


def _name(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "another process"
    return f"process {owner['pid']} on {owner['host']} since {owner['since']}"

"""Files that appear whole or not at all, in a folder that one process writes at a time.

A file is written under a temporary name, flushed to the device, and renamed: after
a kill or a power cut at any instant it is either complete or not there.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

_FULL = (errno.ENOSPC, errno.EDQUOT)


class Written(NamedTuple):
    """Name, size and checksum of a finished file."""

    file: str
    bytes: int
    sha256: str


class AtomicFile:
    """A file that is written piece by piece and appears under its name on commit."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._temporary = target.with_name(f".{target.name}.tmp")
        # Unbuffered: nothing is left to be flushed after a full disk.
        self._file = open(self._temporary, "w+b", buffering=0)  # noqa: SIM115
        self._digest, self._size = hashlib.sha256(), 0

    def write(self, content: bytes | memoryview) -> None:
        self._write(content)
        self._digest.update(content)
        self._size += memoryview(content).nbytes

    def rewrite_start(self, content: bytes) -> None:
        """Replace the first bytes, when only the end tells what they must be."""
        self._file.seek(0)
        self._write(content)
        self._file.seek(0)
        self._digest = hashlib.sha256()
        while block := self._file.read(2**20):
            self._digest.update(block)

    def commit(self) -> Written:
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._target)
        _sync_folder(self._target.parent)
        return Written(self._target.name, self._size, self._digest.hexdigest())

    def discard(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, content: bytes | memoryview) -> None:
        view = memoryview(content).cast("B")
        while len(view):
            view = view[self._file.write(view) :]


class MappedFile:
    """An .npy file of one axis, filled in any order, that appears on commit."""

    def __init__(self, target: Path, length: int, dtype: np.dtype) -> None:
        self._target = target
        self._temporary = target.with_name(f".{target.name}.tmp")
        with open(self._temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
            )
            end = file.tell() + length * dtype.itemsize
            if hasattr(os, "posix_fallocate"):
                # Take the space now: a full disk is an error here, not a crash later.
                os.posix_fallocate(file.fileno(), 0, end)
            file.truncate(end)
        self.array = np.load(self._temporary, mmap_mode="r+")

    def commit(self) -> None:
        self.array.flush()
        with open(self._temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(self._temporary, self._target)
        _sync_folder(self._target.parent)


def _sync_folder(path: Path) -> None:
    """Make a rename durable. Windows cannot open folders and needs no such step."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folder_at(path: "str | Path | Folder") -> "Folder":
    """The folder at a local path, or at a URL that fsspec knows ("s3://…")."""
    if isinstance(path, Folder):
        return path
    if "://" in str(path):
        from saeutils.remote import RemoteFolder

        return RemoteFolder(str(path))
    return Folder(path)


class Folder:
    """A local folder of atomic files."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def stored(self) -> int:
        """Bytes of the files in it; 0 when it is not there."""
        return sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file())

    def free(self) -> int | None:
        """Bytes that the disk has left; None when nobody knows."""
        parents = [self.path, *self.path.absolute().parents]
        return shutil.disk_usage(next(p for p in parents if p.exists())).free

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> "Folder":
        return Folder(self.path / name)

    def exists(self, name: str) -> bool:
        return (self.path / name).is_file()

    def size(self, name: str) -> int:
        """Bytes of a file; FileNotFoundError when it is not there."""
        return (self.path / name).stat().st_size

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def map(self, name: str) -> np.ndarray:
        """The array of an .npy file, read from disk where it is touched."""
        return np.load(self.path / name, mmap_mode="r")

    def folders(self) -> list[str]:
        """Names of the folders inside; none when this one is not there."""
        if not self.path.is_dir():
            return []
        return sorted(p.name for p in self.path.iterdir() if p.is_dir())

    def sha256(self, name: str) -> str:
        with open(self.path / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def create(self, name: str) -> AtomicFile:
        return AtomicFile(self.path / name)

    def write(self, name: str, content: bytes | memoryview) -> Written:
        file = self.create(name)
        try:
            file.write(content)
            return file.commit()
        except BaseException:
            file.discard()
            raise

    def create_mapped(self, name: str, length: int, dtype: np.dtype) -> MappedFile:
        return MappedFile(self.path / name, length, dtype)

    def remove_unfinished(self) -> None:
        """Delete the temporary files that a killed writer left behind."""
        for path in self.path.glob(".*.tmp"):
            path.unlink()

    @contextmanager
    def writing(self, wait: int = 0) -> Iterator[None]:
        """Make the folder and hold its lock, waiting for it some seconds at most.

        The lock is the kernel's: it vanishes with the process, however that ends.
        Raises OSError when the folder cannot be written, and ValueError when
        another process (or another writer of this one) holds it.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / ".lock", timeout=wait)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"{self} is being written by another process: wait for it, stop it, "
                "or choose another path"
            ) from None
        except OSError as error:
            raise OSError(
                error.errno, f"cannot write to {self} ({error.strerror})"
            ) from error
        try:
            yield
        finally:
            lock.release()


@contextmanager
def explained(folder: Folder, done: str) -> Iterator[None]:
    """Say what a full disk means for what was written so far."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(
            error.errno,
            f"the disk of {folder} is full. {done} Free some space and call again: "
            "it goes on from there",
        ) from error

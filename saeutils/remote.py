"""The same folders on remote storage: whatever fsspec reaches ("s3://…", "gs://…").

Files are written to a local temporary folder and uploaded whole, which object stores
do atomically. To be mapped, a file is downloaded there once; it goes away with the
process. Nothing can be locked: two writers at once are not noticed.
"""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np

from saeutils.storage import AtomicFile, Folder, MappedFile, Written


class RemoteFolder(Folder):
    """A folder at a URL, with the interface of a local one."""

    def __init__(self, url: str) -> None:
        import fsspec

        self._url = url.rstrip("/")
        self._fs, self._root = fsspec.url_to_fs(self._url)

    def __str__(self) -> str:
        return self._url

    def __reduce__(self) -> tuple:
        return RemoteFolder, (self._url,)

    def __truediv__(self, name: str) -> "RemoteFolder":
        return RemoteFolder(f"{self._url}/{name}")

    @cached_property
    def _temporary(self) -> tempfile.TemporaryDirectory:
        return tempfile.TemporaryDirectory()

    @property
    def path(self) -> Path:
        """Where files are on their way up or down."""
        return Path(self._temporary.name)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def stored(self) -> int:
        if not self._fs.isdir(self._root):
            return 0
        return self._fs.du(self._root)

    def free(self) -> None:
        return None

    def exists(self, name: str) -> bool:
        return self._fs.isfile(self._at(name))

    def size(self, name: str) -> int:
        return self._fs.size(self._at(name))

    def read(self, name: str) -> bytes:
        return self._fs.cat_file(self._at(name))

    def folders(self) -> list[str]:
        if not self._fs.isdir(self._root):
            return []
        entries = self._fs.ls(self._root, detail=True)
        folders = [e["name"] for e in entries if e["type"] == "directory"]
        return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in folders)

    def sha256(self, name: str) -> str:
        with self._fs.open(self._at(name), "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()

    def map(self, name: str) -> np.ndarray:
        local = self.path / "down" / name
        if not local.exists():
            local.parent.mkdir(parents=True, exist_ok=True)
            part = local.with_name(f"{local.name}.part")
            self._fs.get_file(self._at(name), str(part))
            part.rename(local)
        return np.load(local, mmap_mode="r")

    def create(self, name: str) -> AtomicFile:
        return _UploadedFile(self, name)

    def create_mapped(self, name: str, length: int, dtype: np.dtype) -> MappedFile:
        return _UploadedMap(self, name, length, dtype)

    def upload(self, name: str) -> None:
        """Move a finished local file to its place."""
        self._fs.put_file(str(self.path / name), self._at(name))
        (self.path / name).unlink()

    def remove_unfinished(self) -> None:
        """Nothing unfinished ever gets there."""

    @contextmanager
    def writing(self, wait: int = 0) -> Iterator[None]:
        """Make the folder (object stores need none). There is no lock."""
        self._fs.makedirs(self._root, exist_ok=True)
        yield


class _UploadedFile(AtomicFile):
    def __init__(self, folder: RemoteFolder, name: str) -> None:
        super().__init__(folder.path / name)
        self._folder, self._name = folder, name

    def commit(self) -> Written:
        written = super().commit()
        self._folder.upload(self._name)
        return written


class _UploadedMap(MappedFile):
    def __init__(
        self, folder: RemoteFolder, name: str, length: int, dtype: np.dtype
    ) -> None:
        super().__init__(folder.path / name, length, dtype)
        self._folder, self._name = folder, name

    def commit(self) -> None:
        super().commit()
        self._folder.upload(self._name)

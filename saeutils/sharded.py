"""A folder of shards under one manifest: what stores of activations and codes share.

manifest.json lists the shards; a shard is some files of equally many rows. It is
part of the store from the moment that the manifest which lists it replaces the old
one. What a killed writer leaves beside that is overwritten or deleted by the next.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from saeutils.storage import Folder, Written, folder_at

if TYPE_CHECKING:
    import pandas as pd

VERSION = 1
MANIFEST = "manifest.json"
Column = np.ndarray | Tensor | list
_Writer = TypeVar("_Writer", bound="ShardedWriter")
_Store = TypeVar("_Store", bound="ShardedStore")


class ShardedWriter:
    """Makes a sharded folder or takes one up again, holding its lock.

    `identity`: manifest key -> what it is called in an error. A writer goes on with
    an unfinished folder only when all of these are the same.
    """

    identity: Mapping[str, str]

    def __init__(self, path: str | Path | Folder, manifest: dict[str, Any]) -> None:
        fresh = {
            **manifest,
            "complete": False,
            "byteorder": "little",
            "rows": 0,
            "columns": None,
            "shards": [],
        }
        self.folder, self._closed = folder_at(path), False
        with ExitStack() as stack:
            stack.enter_context(self.folder.writing())
            self.manifest = self._take_up(fresh)
            self._lock = stack.pop_all()

    def _take_up(self, fresh: dict[str, Any]) -> dict[str, Any]:
        self.folder.remove_unfinished()
        if not self.folder.exists(MANIFEST):
            self.folder.write(MANIFEST, as_json(fresh))
            return fresh
        old = read_manifest(self.folder, fresh["format"])
        refuse_changes(self.folder, old, fresh, self.identity)
        return old

    @property
    def rows_done(self) -> int:
        """Rows that are safe on disk; the first row to append after taking up."""
        return self.manifest["rows"]

    @property
    def complete(self) -> bool:
        return self.manifest["complete"]

    def close(self) -> None:
        """Seal the store."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Stop without sealing; finished shards stay, and the lock is given back."""
        self._closed = True
        self._lock.close()

    def __enter__(self: _Writer) -> _Writer:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _name(self) -> str:
        """Name of the shard that comes next, without the ending."""
        return f"{len(self.manifest['shards']):05d}"

    def _check_columns(
        self, provenance: Mapping[str, Column], rows: int
    ) -> dict[str, np.ndarray]:
        """The columns as arrays, `rows` long, of the types that the store has."""
        columns = {
            name: np.asarray(values.cpu() if isinstance(values, Tensor) else values)
            for name, values in provenance.items()
        }
        for name, values in columns.items():
            if values.shape != (rows,) or values.dtype.kind not in "iufbU":
                raise ValueError(
                    f"provenance column {name!r} of shape {values.shape} and type "
                    f"{values.dtype}: expected one number, truth value or string for "
                    f"each of the {rows} rows"
                )
        kinds = {
            name: "string" if values.dtype.kind == "U" else values.dtype.name
            for name, values in columns.items()
        }
        if self.manifest["columns"] is None:
            self.manifest["columns"] = kinds
        elif self.manifest["columns"] != kinds:
            raise ValueError(
                f"provenance columns {kinds}: this store has {self.manifest['columns']}"
            )
        return columns

    def _add_shard(
        self,
        rows: int,
        files: dict[str, Written],
        columns: dict[str, np.ndarray],
        **changes: Any,
    ) -> None:
        """Record a shard whose files are in place; its provenance is written here."""
        if columns:
            table = as_parquet(columns)
            files["provenance"] = self.folder.write(f"{self._name()}.parquet", table)
        shard = {"rows": rows, "files": {k: v._asdict() for k, v in files.items()}}
        self._replace_manifest(
            rows=self.rows_done + rows,
            shards=[*self.manifest["shards"], shard],
            **changes,
        )

    def _replace_manifest(self, **changes: Any) -> None:
        manifest = self.manifest | changes
        self.folder.write(MANIFEST, as_json(manifest))
        self.manifest = manifest


class ShardedStore:
    """A sharded folder, opened for reading."""

    format: str

    def __init__(self, folder: Folder, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self._starts = np.cumsum([0] + [shard["rows"] for shard in manifest["shards"]])

    @classmethod
    def open(
        cls: type[_Store], path: str | Path | Folder, *, partial: bool = False
    ) -> _Store:
        """Open the store at `path`, or the only store in a folder of stores.

        partial: also open a store that is not complete, with the rows it has.
        Raises FileNotFoundError when there is none, and ValueError for a store that
        is not complete, of a newer format, or whose files are missing or of the
        wrong size (`verify` also reads their content).
        """
        folder = folder_at(path)
        if not folder.exists(MANIFEST):
            inside = [f for f in folder.folders() if (folder / f).exists(MANIFEST)]
            if any(name.startswith("part-") for name in inside):
                raise ValueError(
                    f"{folder} is not complete: its parts {', '.join(inside)} are not "
                    "yet joined; run the missing ones, or open one of these"
                )
            if len(inside) == 1:
                folder = folder / inside[0]
            elif inside:
                raise ValueError(
                    f"{folder} holds several stores ({', '.join(inside)}): open one"
                )
        manifest = read_manifest(folder, cls.format)
        if not manifest["complete"] and not partial:
            raise ValueError(
                f"{folder} is not complete ({manifest['rows']:,} of "
                f"{manifest['expected_rows'] or '?'} rows): run what wrote it again "
                "and it goes on from there, or open it with partial=True"
            )
        store = cls(folder, manifest)
        store._refuse(
            [problem for file in store._files() if (problem := file.glance())]
        )
        return store

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple:
        # Other processes open the files themselves: mapped rows are not copied.
        return type(self), (self.folder, self.manifest)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over the checksums of all files, and how they are to be read."""
        keys = sorted(self.manifest.keys() & {"format", "d_in", "d_sae", "dtype"})
        digest = hashlib.sha256(str([self.manifest[key] for key in keys]).encode())
        for file in self._files():
            digest.update(bytes.fromhex(file.sha256))
        return digest.hexdigest()

    @cached_property
    def provenance(self) -> "pd.DataFrame":
        """One record a row, in the order of the rows; strings as categories."""
        import pandas as pd
        import pyarrow as pa

        if not self.manifest["columns"]:
            return pd.DataFrame(index=pd.RangeIndex(len(self)))
        tables = [self._read_table(number) for number in range(len(self._starts) - 1)]
        return pa.concat_tables(tables).unify_dictionaries().to_pandas()

    def records(self, start: int, stop: int) -> "pd.DataFrame":
        """The provenance of rows start … stop − 1; reads only their shards."""
        import pandas as pd

        shards = len(self._starts) - 1
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        first = min(first, shards - 1)  # no rows at the end still have columns
        last = int(np.searchsorted(self._starts, stop, side="left"))
        parts = []
        for number in range(first, max(last, first + 1)):
            at = int(self._starts[number])
            if self.manifest["columns"]:
                table = self._table(number)[max(0, start - at) : stop - at]
                parts.append(table.to_pandas())
        index = pd.RangeIndex(start, stop)
        return pd.concat(parts).set_axis(index) if parts else pd.DataFrame(index=index)

    @cached_property
    def _table(self) -> Any:
        return lru_cache(4)(self._read_table)

    def _read_table(self, number: int) -> Any:
        import pyarrow.parquet as pq

        columns = self.manifest["columns"]
        strings = [name for name, kind in columns.items() if kind == "string"]
        file = self.manifest["shards"][number]["files"]["provenance"]["file"]
        content = io.BytesIO(self.folder.read(file))
        return pq.read_table(content, read_dictionary=strings)

    def verify(self) -> None:
        """Read every file and compare it with its checksum.

        Raises ValueError naming each file that is missing, truncated, damaged or
        swapped with another.
        """
        files = self._files()
        owner = {file.sha256: file.file for file in reversed(files)}
        with ThreadPoolExecutor(4) as pool:
            problems = list(pool.map(lambda file: file.examine(owner), files))
        self._refuse([problem for problem in problems if problem])

    def _files(self) -> list["_File"]:
        return [
            _File(self.folder, **record)
            for shard in self.manifest["shards"]
            for record in shard["files"].values()
        ]

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            raise ValueError(
                f"{self.folder} is damaged: {'; '.join(problems)}. Copy these files "
                "again from where the store came, or delete the store and make it anew"
            )


class _File(NamedTuple):
    """A file of a store and what the manifest says about it."""

    folder: Folder
    file: str
    bytes: int
    sha256: str

    def glance(self) -> str | None:
        """What is wrong with the file, as far as its size tells."""
        path = PurePosixPath(self.file)
        if path.is_absolute() or ".." in path.parts:
            return f"{self.file} lies outside the store"
        try:
            size = self.folder.size(self.file)
        except FileNotFoundError:
            return f"{self.file} is missing"
        if size != self.bytes:
            how = "truncated" if size < self.bytes else "too long"
            return f"{self.file} is {how} ({size:,} of {self.bytes:,} bytes)"
        return None

    def examine(self, owner: dict[str, str]) -> str | None:
        """What is wrong with the file; `owner`: checksum -> file it belongs to."""
        if problem := self.glance():
            return problem
        found = self.folder.sha256(self.file)
        if found == self.sha256:
            return None
        if found in owner:
            return f"{self.file} holds what belongs to {owner[found]}"
        return f"{self.file} is damaged (sha256 differs)"


def refuse_changes(
    folder: Folder,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    identity: Mapping[str, str],
) -> None:
    """Raises ValueError when a manifest is not that of what is to be written."""
    new = json.loads(as_json(new))  # tuples become lists, as in the file
    changed = [
        f"{what} changed from {old[key]!r} to {new[key]!r}"
        for key, what in identity.items()
        if old[key] != new[key]
    ]
    if changed:
        raise ValueError(
            f"{folder} holds a store of something else: {'; '.join(changed)}. "
            "Choose another path, or delete that folder"
        )


def as_json(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n"


def as_parquet(columns: dict[str, np.ndarray]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, compression="zstd")
    return out.getvalue()


def rows_done(path: str | Path | Folder) -> int:
    """Rows that are safe in the store at `path`, finished or not; 0 if there is none.

    A writer may be at work there meanwhile.
    """
    folder = folder_at(path)
    if not folder.exists(MANIFEST):
        return 0
    return json.loads(folder.read(MANIFEST))["rows"]


def read_manifest(folder: Folder, expected: str) -> dict[str, Any]:
    """The manifest of a store. Raises ValueError when it is not one we can read."""
    if not folder.exists(MANIFEST):
        raise FileNotFoundError(f"{folder} holds no store: {MANIFEST} is not there")
    try:
        manifest = json.loads(folder.read(MANIFEST))
        found, version = manifest["format"], manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/{MANIFEST} is damaged ({error!r})") from error
    if found != expected:
        raise ValueError(f"{folder} holds {found!r}, expected {expected!r}")
    if version > VERSION:
        raise ValueError(
            f"{folder} was written in format version {version}; this saeutils reads "
            f"up to {VERSION}: update it to read this store"
        )
    return manifest

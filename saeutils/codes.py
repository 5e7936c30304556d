"""The sparse latents of a store under an SAE, on disk: by rows and by columns.

The format, version 1
---------------------
A folder with a manifest, as in `saeutils.store`; one shard is a block of rows in CSR:

    00000.indptr.npy   (rows + 1,) <u4: row i owns entries indptr[i] … indptr[i+1] − 1
    00000.indices.npy  (nnz,) <u2 (<u4 when d_sae > 65,536): latents, ascending in a row
    00000.values.npy   (nnz,) <f4 or <f2: what the SAE's encoder puts out there
    00000.parquet      the provenance of the rows, as in the store they come from

manifest.json has format "saeutils.codes", version, complete, byteorder, rows,
expected_rows, columns and shards as there, and d_sae, dtype (of values), nnz, sae and
data (fingerprints of the SAE and of the store), and the store's settings. Every file
of a shard is listed with its bytes and sha256.

The columns (made when first asked for) are a second copy of the entries, sorted by
latent: columns.indptr.npy (d_sae + 1,) <i8, columns.rows.npy <u4 or <i8, and
columns.values.npy; they are there when columns.json names the files.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn
from tqdm.auto import tqdm

from saeutils.context import Context, context
from saeutils.inputs import content
from saeutils.kernels import Codes
from saeutils.sae import encode_sparse
from saeutils.sharded import VERSION, ShardedStore, ShardedWriter, as_json
from saeutils.storage import Folder, explained
from saeutils.store import Index, Store, as_store

FORMAT = "saeutils.codes"
VALUES = {"float32": "<f4", "float16": "<f2"}
SHARD_ENTRIES = 2**21  # a shard ends with the chunk that reaches so many
DENSE_BYTES = 32 * 2**20  # of codes alive at once, before they are made sparse
_COLUMNS = ("indptr", "rows", "values")


class CodeBatch(NamedTuple):
    """Some rows of codes, and the number of each: provenance.iloc[index]."""

    codes: Codes
    index: Int64[Tensor, " batch"]


class Firings(NamedTuple):
    """Where one latent fires, in order of rows."""

    rows: Int64[Tensor, " n"]
    values: Float32[Tensor, " n"]


class CodeStore(ShardedStore):
    """Sparse codes on disk. Rows are those of the store they were made from."""

    format = FORMAT

    def __init__(self, folder: Folder, manifest: dict[str, Any]) -> None:
        super().__init__(folder, manifest)
        self._maps: dict[tuple[int, str], np.ndarray] = {}
        self.d_sae: int = manifest["d_sae"]
        self.nnz: int = manifest["nnz"]

    def __repr__(self) -> str:
        return (
            f"CodeStore({str(self.folder)!r}: {len(self):,} × {self.d_sae:,}, "
            f"{self.nnz:,} entries, L0 {self.nnz / max(1, len(self)):.1f})"
        )

    def __getitem__(self, rows: slice) -> Codes:
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"step {step}: codes[i:j] reads neighbours; use gather")
        return self.gather(np.arange(start, max(start, stop)))

    def chunks(self, size: int) -> Iterator[CodeBatch]:
        """All rows in order, `size` at a time, the last chunk short."""
        if size < 1:
            raise ValueError(f"chunks of {size} rows: expected at least 1")
        for start in range(0, len(self), size):
            index = np.arange(start, min(start + size, len(self)))
            yield CodeBatch(self.gather(index), torch.from_numpy(index))

    def gather(self, index: Index) -> Codes:
        """The codes of the rows at `index`, in that order (CSR, float32 values)."""
        index = np.ascontiguousarray(index, dtype=np.int64)
        if len(index) and not (index.min() >= 0 and index.max() < len(self)):
            raise IndexError(
                f"rows {index.min()} … {index.max()} asked of codes of {len(self)} rows"
            )
        shard = np.searchsorted(self._starts, index, side="right") - 1
        first, last = np.empty((2, len(index)), np.int64)
        of_shard = [(s, np.flatnonzero(shard == s)) for s in np.unique(shard).tolist()]
        for s, rows in of_shard:
            local, indptr = index[rows] - self._starts[s], self._shard(s, "indptr")
            first[rows], last[rows] = indptr[local], indptr[local + 1]
        ends = np.cumsum(last - first)
        indptr = np.concatenate([[0], ends])
        indices = np.empty(indptr[-1], np.int32)
        values = np.empty(indptr[-1], np.float32)
        for s, rows in of_shard:
            counts = last[rows] - first[rows]
            # Entry j of a row: from first + j in the shard to indptr + j here.
            j = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            source = first[rows].repeat(counts) + j
            target = indptr[rows].repeat(counts) + j
            indices[target] = self._shard(s, "indices")[source]
            values[target] = self._shard(s, "values")[source]
        parts = (torch.from_numpy(part) for part in (indptr, indices, values))
        return Codes(*parts)

    def context(
        self, row: int, before: int = 10, after: int = 10, **how: Any
    ) -> Context:
        """The text around a row's token, or its image and patch: see `context`."""
        return context(self, row, before, after, **how)

    @cached_property
    def counts(self) -> Int64[Tensor, " d_sae"]:
        """In how many rows each latent fires."""
        counts = np.zeros(self.d_sae, np.int64)
        for s in range(len(self.manifest["shards"])):
            counts += np.bincount(self._shard(s, "indices"), minlength=self.d_sae)
        return torch.from_numpy(counts)

    def column(self, latent: int) -> Firings:
        """The rows where one latent fires, and its values there.

        The first call sorts all entries by latent and keeps the result beside the
        shards (it takes as much disk again, and memory for one shard).
        """
        if not 0 <= latent < self.d_sae:
            raise IndexError(f"latent {latent}: expected 0 … {self.d_sae - 1}")
        indptr, rows, values = self._columns
        part = slice(indptr[latent], indptr[latent + 1])
        return Firings(
            torch.from_numpy(rows[part].astype(np.int64)),
            torch.from_numpy(values[part].astype(np.float32)),
        )

    def _shard(self, number: int, name: str) -> np.ndarray:
        if (number, name) not in self._maps:
            record = self.manifest["shards"][number]["files"][name]
            self._maps[number, name] = self.folder.map(record["file"])
        return self._maps[number, name]

    @cached_property
    def _columns(self) -> list[np.ndarray]:
        if not self._has_columns():
            with self.folder.writing(), explained(self.folder, "The codes are safe."):
                if not self._has_columns():  # another process may have been faster
                    self._make_columns()
        return [self.folder.map(f"columns.{name}.npy") for name in _COLUMNS]

    def _has_columns(self) -> bool:
        return self.folder.exists("columns.json") and (
            json.loads(self.folder.read("columns.json"))["codes"] == self.fingerprint
        )

    def _make_columns(self) -> None:
        """A counting sort by latent, out of core: one shard in memory at a time."""
        indptr = np.concatenate([[0], np.cumsum(self.counts.numpy())])
        small = len(self) < 2**32
        arrays = {
            "rows": np.dtype("<u4" if small else "<i8"),
            "values": np.dtype(VALUES[self.manifest["dtype"]]),
        }
        files = {
            name: self.folder.create_mapped(f"columns.{name}.npy", self.nnz, dtype)
            for name, dtype in arrays.items()
        }
        filled = indptr[:-1].copy()  # where the next entry of each latent goes
        for s in range(len(self.manifest["shards"])):
            latents = np.asarray(self._shard(s, "indices"))
            lengths = np.diff(self._shard(s, "indptr").astype(np.int64))
            rows = np.repeat(np.arange(*self._starts[s : s + 2]), lengths)
            order = np.argsort(latents, kind="stable")
            here = np.bincount(latents, minlength=self.d_sae)
            # Sorted entry e is number e − (entries of smaller latents) of its latent.
            target = np.arange(len(latents)) + np.repeat(
                filled - (np.cumsum(here) - here), here
            )
            files["rows"].array[target] = rows[order]
            files["values"].array[target] = self._shard(s, "values")[order]
            filled += here
        for file in files.values():
            file.commit()
        self.folder.write("columns.indptr.npy", as_npy(indptr.astype("<i8")))
        self.folder.write("columns.json", as_json({"codes": self.fingerprint}))


class CodeWriter(ShardedWriter):
    """Appends sparse codes, a chunk of rows at a time, and goes on after a kill."""

    identity = {  # noqa: RUF012
        "d_sae": "the number of latents",
        "dtype": "the dtype",
        "expected_rows": "the number of rows",
        "sae": "the SAE (its fingerprint)",
        "data": "the rows (the fingerprint of their store)",
    }

    def __init__(
        self,
        path: str | Path | Folder,
        *,
        d_sae: int,
        expected_rows: int,
        dtype: str = "float32",
        sae: str | None = None,
        data: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if dtype not in VALUES:
            raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(VALUES)}")
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "d_sae": d_sae,
            "dtype": dtype,
            "nnz": 0,
            "expected_rows": expected_rows,
            "sae": sae,
            "data": data,
            "settings": dict(settings or {}),
        }
        super().__init__(path, manifest)
        self._chunks: list[Codes] = []
        self._entries = self._rows = 0

    def append(self, codes: Codes, store: Store) -> None:
        """Add the codes of the next rows; `store` knows the provenance of all rows."""
        self._refuse_nonfinite(codes)
        self._chunks.append(codes)
        self._entries += len(codes.values)
        self._rows += len(codes.indptr) - 1
        at_end = self.rows_done + self._rows == self.manifest["expected_rows"]
        if self._entries >= SHARD_ENTRIES or at_end:
            done = f"The codes of {self.rows_done:,} rows are safe."
            with explained(self.folder, done):
                self._commit(store)

    def close(self) -> None:
        """Seal the store. Raises ValueError when rows are missing."""
        try:
            if not self.complete:
                expected = self.manifest["expected_rows"]
                if self.rows_done != expected:
                    raise ValueError(
                        f"codes of {self.rows_done:,} of {expected:,} rows"
                    )
                self._replace_manifest(complete=True)
        finally:
            self.abandon()

    def _commit(self, store: Store) -> None:
        indices = "<u2" if self.manifest["d_sae"] <= 2**16 else "<u4"
        counts = torch.cat([codes.indptr.diff() for codes in self._chunks])
        arrays = {
            "indptr": np.concatenate([[0], counts.cumsum(0).numpy()]).astype("<u4"),
            "indices": torch.cat([c.indices for c in self._chunks]).numpy(),
            "values": torch.cat([c.values for c in self._chunks]).numpy(),
        }
        arrays["indices"] = arrays["indices"].astype(indices)
        arrays["values"] = arrays["values"].astype(VALUES[self.manifest["dtype"]])
        files = {
            name: self.folder.write(f"{self._name()}.{name}.npy", as_npy(array))
            for name, array in arrays.items()
        }
        records = store.records(self.rows_done, self.rows_done + self._rows)
        columns = {
            name: values.astype(str).to_numpy(dtype=str)
            if values.dtype.kind not in "iufb"
            else values.to_numpy()
            for name, values in records.items()
        }
        columns = self._check_columns(columns, self._rows)
        nnz = self.manifest["nnz"] + self._entries
        self._add_shard(self._rows, files, columns, nnz=nnz)
        self._chunks, self._entries, self._rows = [], 0, 0

    def _refuse_nonfinite(self, codes: Codes) -> None:
        dtype = self.manifest["dtype"]
        bad = ~codes.values.to(getattr(torch, dtype)).isfinite()
        if bad.any():
            entry = int(bad.nonzero()[0])
            row = int(torch.searchsorted(codes.indptr, entry, right=True)) - 1
            latent, value = int(codes.indices[entry]), codes.values[entry].item()
            raise ValueError(
                f"row {self.rows_done + self._rows + row}, latent {latent}: {value:g} "
                f"cannot be stored as {dtype}"
            )


def encode(
    sae: Any,
    rows: Tensor | Store | str | Path,
    path: str | Path,
    *,
    dtype: str = "float32",
    dense_bytes: int = DENSE_BYTES,
    progress: bool = True,
) -> CodeStore:
    """The codes z = sae.encode(x) of all rows, stored where they are not zero.

    sae: anything with `encode` and `W_dec` (d_sae, d_in); see `sae.encode_sparse`.
    path: of the code store. One that an earlier call with the same SAE and rows left
        unfinished is completed; one that it finished is opened.
    dtype: of the stored values: float32, or float16 (a value too small for it is
        kept as an entry of value 0).
    dense_bytes: memory for the codes of one chunk before they are made sparse.

    Raises ValueError for rows of another width, and for codes that are NaN, infinite
    or too large for the dtype, naming row and latent.
    """
    store, (d_sae, d_in) = as_store(rows), sae.W_dec.shape
    if store.d_in != d_in:
        raise ValueError(
            f"the rows have d_in = {store.d_in}, the SAE {d_in}: were they saved at "
            "another hook point?"
        )
    size = max(1, dense_bytes // (4 * d_sae))
    writer = CodeWriter(
        path,
        d_sae=d_sae,
        expected_rows=len(store),
        dtype=dtype,
        sae=sae_fingerprint(sae),
        data=store.fingerprint,
        settings=getattr(store, "manifest", {}).get("settings"),
    )
    with writer, torch.no_grad():
        bar = tqdm(
            total=len(store), initial=writer.rows_done, unit="row", disable=not progress
        )
        for start in range(writer.rows_done, len(store), size):
            x = store[start : start + size].to(sae.W_dec)
            writer.append(encode_sparse(sae, x), store)
            bar.update(len(x))
        bar.close()
    return CodeStore.open(path)


def sae_fingerprint(sae: Any) -> str:
    """sha256 (hex) over class, configuration and parameters of an SAE or baseline.

    Device and metadata are left out: the same SAE elsewhere, or loaded, is the same.
    """
    parts = {**vars(sae)}
    if isinstance(sae, nn.Module):
        config = getattr(sae, "cfg", None)
        config = config.to_dict() if config else {}
        kept = {k: v for k, v in config.items() if k not in ("device", "metadata")}
        parts = {**sae.state_dict(), "cfg": kept}
    digest = hashlib.sha256(type(sae).__qualname__.encode())
    for name, part in sorted(parts.items()):
        digest.update(name.encode())
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode() + content(part))
        else:
            digest.update(json.dumps(part, default=str, sort_keys=True).encode())
    return digest.hexdigest()


def as_npy(array: np.ndarray) -> memoryview:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, version=(1, 0), allow_pickle=False)
    return out.getbuffer()

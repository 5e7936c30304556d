"""Writing a store: shard by shard, each one whole and recorded, or not there.

The on-disk format is described in `saeutils.store`. A shard becomes part of the
store when the manifest that lists it replaces the old manifest; what a killed
writer leaves beside that is overwritten or deleted by the next one.
"""

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saeutils.sharded import VERSION, Column, ShardedWriter
from saeutils.storage import AtomicFile, Folder, explained

FORMAT = "saeutils.activations"
# Name of a dtype -> how its bits are stored. numpy has no bfloat16: its 16 bits are
# the upper half of a float32.
STORED = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
SHARD_BYTES = 256 * 2**20


class StoreWriter(ShardedWriter):
    """Appends rows with their provenance to a store, or goes on with an unfinished one.

        with StoreWriter(path, hook="fc1", d_in=128, expected_rows=60_000) as writer:
            for rows, ids in ...:                  # from row writer.rows_done on
                writer.append(rows, {"id": ids})

    Leaving the block normally seals the store. Leaving it by an exception, or being
    killed, keeps every finished shard: `rows_done` of the next writer on that path
    tells which row to append first. Memory: one batch.
    """

    identity = {  # noqa: RUF012
        "hook": "the hook",
        "d_in": "the width of the rows",
        "dtype": "the dtype",
        "expected_rows": "the number of rows",
        "model": "the model (its fingerprint)",
        "data": "the data (their fingerprint)",
        "seed": "the seed",
        "settings": "the settings",
    }

    def __init__(
        self,
        path: str | Path | Folder,
        *,
        hook: str,
        d_in: int,
        dtype: str = "float32",
        expected_rows: int | None = None,
        rows_per_shard: int | None = None,
        model: str | None = None,
        data: str | None = None,
        seed: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the store or take it up again; `expected_rows` may be unknown (None).

        `model`, `data` (fingerprints), `seed` and `settings` are recorded, and must
        be the same when a store is taken up again. Raises ValueError when they are
        not or when another process is writing, OSError when the folder cannot be
        written.
        """
        if dtype not in STORED:
            raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(STORED)}")
        if d_in < 1 or (expected_rows is not None and expected_rows < 1):
            raise ValueError(
                f"a store of {expected_rows} rows of width {d_in}: both must be ≥ 1"
            )
        if rows_per_shard is None:
            row_bytes = d_in * np.dtype(STORED[dtype]).itemsize
            rows_per_shard = max(1, SHARD_BYTES // row_bytes)
        if rows_per_shard < 1:
            raise ValueError(f"{rows_per_shard} rows per shard: expected at least 1")
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "hook": hook,
            "d_in": d_in,
            "dtype": dtype,
            "expected_rows": expected_rows,
            "rows_per_shard": rows_per_shard,
            "model": model,
            "data": data,
            "seed": seed,
            "settings": dict(settings or {}),
        }
        super().__init__(path, manifest)
        self._shard: AtomicFile | None = None
        self._all_zero = True  # all rows of the shard, so far
        self._shard_rows, self._provenance = 0, []

    def append(
        self,
        rows: Float[Tensor, "rows width"],
        provenance: Mapping[str, Column] | None = None,
    ) -> None:
        """Add rows, in order, with one value a row for each provenance column.

        Raises ValueError, naming the first bad row with its provenance, when a value
        is NaN, infinite, or too large for the store's dtype; then nothing of this
        call is kept.
        """
        if self.complete or self._closed:
            raise ValueError(f"{self.folder} is complete, or its writer was closed")
        columns = self._check(rows, provenance or {})
        stored = rows.detach().to("cpu", getattr(torch, self.manifest["dtype"]))
        zero = self._refuse_nonfinite(rows, stored, columns)
        content = as_stored(stored)
        try:
            with explained(self.folder, f"{self.rows_done:,} rows are safe."):
                self._append(content, columns, zero)
        except BaseException:  # half a batch may be in the open shard: drop that
            self.abandon()
            raise

    def _append(
        self, content: np.ndarray, columns: dict[str, np.ndarray], zero: bool
    ) -> None:
        start = 0
        while start < len(content):
            stop = start + self._open_shard() - self._shard_rows
            part = content[start:stop]
            self._shard.write(part.data)
            self._shard_rows += len(part)
            self._all_zero &= zero
            self._provenance.append({k: v[start:stop] for k, v in columns.items()})
            start = stop
            if self._shard_rows == self._shard_size:
                self._commit_shard()

    def close(self) -> None:
        """Seal the store. Raises ValueError when rows are missing."""
        try:
            if self.complete:
                return
            rows = self.rows_done + self._shard_rows
            expected = self.manifest["expected_rows"]
            if rows == 0 or expected not in (None, rows):
                raise ValueError(
                    f"{self.folder} was given {rows:,} of {expected or '?'} rows: "
                    "append the rest before closing"
                )
            with explained(self.folder, f"{self.rows_done:,} rows are safe."):
                if self._shard_rows:
                    self._commit_shard()
                self._replace_manifest(complete=True)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Stop without sealing; finished shards stay, and the lock is given back."""
        if self._shard is not None:
            self._shard.discard()
            self._shard = None
        self._shard_rows, self._provenance = 0, []
        super().abandon()

    def _check(
        self, rows: Tensor, provenance: Mapping[str, Column]
    ) -> dict[str, np.ndarray]:
        if rows.ndim != 2 or rows.shape[1] != self.manifest["d_in"]:
            raise ValueError(
                f"rows of shape {tuple(rows.shape)}: expected (n, "
                f"{self.manifest['d_in']}) in {self.folder}"
            )
        expected = self.manifest["expected_rows"]
        total = self.rows_done + self._shard_rows + len(rows)
        if expected is not None and total > expected:
            raise ValueError(f"row {total:,} appended to a store of {expected:,} rows")
        return self._check_columns(provenance, len(rows))

    def _refuse_nonfinite(
        self, rows: Tensor, stored: Tensor, columns: dict[str, np.ndarray]
    ) -> bool:
        """Raises ValueError for a value that is not finite; says if all are zero."""
        if not stored.numel():
            return True
        low, high = stored.aminmax()  # one pass, no copy; NaN comes through
        if torch.isfinite(low) and torch.isfinite(high):
            return bool(low == high == 0)
        row, dim = torch.isfinite(stored).logical_not().nonzero()[0].tolist()
        value, dtype = rows[row, dim].item(), self.manifest["dtype"]
        number = self.rows_done + self._shard_rows + row
        of = ", ".join(f"{name}={values[row]}" for name, values in columns.items())
        what = (
            f"{value:g} at dimension {dim}, too large for {dtype}: store as bfloat16 "
            "or float32"
            if np.isfinite(value)
            else f"{value} at dimension {dim}: look for NaN or Inf in this input and "
            "in the model's weights"
        )
        raise ValueError(
            f"row {number} ({of}) of hook {self.manifest['hook']!r} holds {what}"
        )

    def _open_shard(self) -> int:
        """Make sure that a shard is open; returns how many rows it is to hold."""
        if self._shard is None:
            self._shard_size = self.manifest["rows_per_shard"]
            if self.manifest["expected_rows"] is not None:
                left = self.manifest["expected_rows"] - self.rows_done
                self._shard_size = min(self._shard_size, left)
            self._shard = self.folder.create(f"{self._name()}.npy")
            self._shard.write(self._header(self._shard_size))
        return self._shard_size

    def _header(self, rows: int) -> bytes:
        stored = STORED[self.manifest["dtype"]]
        shape = (rows, self.manifest["d_in"])
        out = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            out, {"descr": stored, "fortran_order": False, "shape": shape}
        )
        return out.getvalue()

    def _commit_shard(self) -> None:
        if self._shard_rows != self._shard_size:  # the end came before it was full
            self._shard.rewrite_start(self._header(self._shard_rows))
        written = self._shard.commit()
        self._shard = None
        if self._all_zero:
            rows = f"{self._shard_rows:,} rows"
            warnings.warn(
                f"{self.folder}: all {rows} of {written.file} are 0. "
                "Is the layer dead, or the input empty?",
                stacklevel=2,
            )
        self._all_zero = True
        columns = {
            name: np.concatenate([part[name] for part in self._provenance])
            for name in self.manifest["columns"]
        }
        self._add_shard(self._shard_rows, {"rows": written}, columns)
        self._shard_rows, self._provenance = 0, []


def as_stored(rows: Tensor) -> np.ndarray:
    """The rows as little-endian numbers (bfloat16: its bits), C-contiguous."""
    rows = rows.contiguous()
    if rows.dtype == torch.bfloat16:
        rows = rows.view(torch.uint16)
    array = rows.numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False)

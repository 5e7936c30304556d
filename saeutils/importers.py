"""Activations that other tools saved, copied into a store with their provenance.

Each function reads the source in parts, so any size will do, and goes on where an
interrupted call ended. The source is left as it is.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeutils.sharded import Column
from saeutils.store import ActivationStore
from saeutils.store_writer import STORED, StoreWriter

PART_BYTES = 64 * 2**20


def import_matrix(
    source: str | Path,
    path: str | Path,
    *,
    key: str | None = None,
    provenance: Mapping[str, Column] | None = None,
    hook: str = "imported",
    dtype: str | None = None,
) -> ActivationStore:
    """A matrix (n, d) out of an .npy, .safetensors, .pt or .pth file.

    key: name of the matrix, in a file that holds several.
    provenance: columns with one value a row; always `id`, the row's number, unless
        that is given.
    dtype: of the stored rows (default: that of the source).

    .pt files are read without running what they contain (weights_only).
    """
    source = Path(source)
    matrix = _open_matrix(source, key)
    if len(matrix.shape) != 2:
        raise ValueError(f"{source} holds {tuple(matrix.shape)}: expected (n, d)")
    n, d_in = matrix.shape
    columns = {"id": np.arange(n), **(provenance or {})}
    columns = {name: np.asarray(values) for name, values in columns.items()}
    for name, values in columns.items():
        if len(values) != n:
            raise ValueError(f"{len(values)} values of {name!r} for {n} rows")

    def read(start: int, stop: int) -> Tensor:
        part = matrix[start:stop]
        return part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))

    def records(start: int, stop: int) -> dict[str, np.ndarray]:
        return {name: values[start:stop] for name, values in columns.items()}

    dtype = dtype or _own_dtype(read(0, 1))
    return _copy(path, hook, n, d_in, 1, dtype, read, records, [source], {"key": key})


def import_sae_lens(
    folder: str | Path,
    path: str | Path,
    *,
    hook: str | None = None,
    dtype: str = "float32",
) -> ActivationStore:
    """What sae_lens' CacheActivationsRunner cached (a data set of Arrow files).

    hook: its column, needed when there are several. The rows get `id` (number of the
    text), `position`, and `token` when the tokens were kept.
    """
    from datasets import load_from_disk

    cached = load_from_disk(str(folder))
    hooks = [name for name in cached.column_names if name != "token_ids"]
    hook = _only(folder, hooks, "hook", hook)
    length, d_in = cached.features[hook].shape
    cached = cached.with_format("numpy")

    def read(start: int, stop: int) -> Tensor:
        part = np.asarray(cached[start:stop][hook], dtype=np.float32)
        return torch.from_numpy(part.reshape(-1, d_in))

    def records(start: int, stop: int) -> dict[str, np.ndarray]:
        found = _places(start, stop, length)
        if "token_ids" in cached.column_names:
            tokens = np.asarray(cached[start:stop]["token_ids"], dtype=np.int32)
            found["token"] = tokens.reshape(-1)
        return found

    files = [Path(file["filename"]) for file in cached.cache_files]
    n = len(cached)
    return _copy(path, hook, n, d_in, length, dtype, read, records, files, {})


def import_saev(
    folder: str | Path, path: str | Path, *, layer: int, dtype: str = "float32"
) -> ActivationStore:
    """One layer of the shards that saev wrote (its protocols 1 and 2).

    The rows get `id` (number of the image) and `position`: 0 is CLS where there is
    one. Source of the format: saev's "Sharded Activation File Protocol".
    """
    folder = Path(folder)
    metadata = json.loads((folder / "metadata.json").read_text())
    shards = json.loads((folder / "shards.json").read_text())

    def of(*names: str) -> Any:
        """The field, under its name of protocol 2 or of protocol 1."""
        return next(metadata[name] for name in names if name in metadata)

    layers, d_in = metadata["layers"], of("d_model", "d_vit")
    if layer not in layers:
        raise ValueError(f"layer {layer}: {folder} holds {layers}")
    if metadata["dtype"] != "float32":
        raise ValueError(f"dtype {metadata['dtype']!r} in {folder}: expected 'float32'")
    length = of("patches_per_ex", "n_patches_per_img") + int(metadata["cls_token"])
    counts = [shard.get("n_ex", shard.get("n_imgs")) for shard in shards]
    starts = np.cumsum([0, *counts])
    files = [folder / shard["name"] for shard in shards]
    for file, count in zip(files, counts, strict=True):
        size = count * len(layers) * length * d_in * 4
        if file.stat().st_size != size:
            raise ValueError(f"{file} has {file.stat().st_size:,} bytes, not {size:,}")

    def read(start: int, stop: int) -> Tensor:
        parts = []
        for file, first, count in zip(files, starts, counts, strict=False):
            a, b = max(start - first, 0), min(stop - first, count)
            if a < b:
                shape = (count, len(layers), length, d_in)
                mapped = np.memmap(file, "<f4", "r", shape=shape)
                parts.append(np.array(mapped[a:b, layers.index(layer)]))
        return torch.from_numpy(np.concatenate(parts).reshape(-1, d_in))

    def records(start: int, stop: int) -> dict[str, np.ndarray]:
        return _places(start, stop, length)

    n, settings = int(starts[-1]), {"layer": layer}
    hook = f"layer {layer}"
    return _copy(path, hook, n, d_in, length, dtype, read, records, files, settings)


def _open_matrix(source: Path, key: str | None) -> Any:
    """Something with a shape that can be sliced without reading all of it."""
    if source.suffix == ".npy":
        return np.load(source, mmap_mode="r")
    if source.suffix in (".pt", ".pth"):
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
        if isinstance(content, Tensor):
            return content.detach()
        names = [name for name, v in content.items() if isinstance(v, Tensor)]
        return content[_only(source, names, "key", key)].detach()
    if source.suffix == ".safetensors":
        from safetensors import safe_open

        file = safe_open(source, "pt")
        return _Sliced(file.get_slice(_only(source, list(file.keys()), "key", key)))
    raise ValueError(f"{source}: expected an .npy, .safetensors, .pt or .pth file")


class _Sliced:
    """safetensors' slices, with a shape."""

    def __init__(self, content: Any) -> None:
        self._content, self.shape = content, tuple(content.get_shape())

    def __getitem__(self, rows: slice) -> Tensor:
        return self._content[rows]


def _only(source: str | Path, names: list[str], what: str, wanted: str | None) -> str:
    """The wanted name, or the only one there is."""
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted not in names:
        raise ValueError(f"{what} {wanted!r}: {source} holds {', '.join(names)}")
    return wanted


def _own_dtype(rows: Tensor) -> str:
    name = str(rows.dtype).removeprefix("torch.")
    return name if name in STORED else "float32"


def _places(start: int, stop: int, length: int) -> dict[str, np.ndarray]:
    """Number and position of every row of the texts or images start … stop − 1."""
    ids = np.arange(start, stop).repeat(length)
    return {"id": ids, "position": np.tile(np.arange(length), stop - start)}


def _copy(
    path: str | Path,
    hook: str,
    n: int,
    d_in: int,
    length: int,
    dtype: str,
    read: Callable[[int, int], Tensor],
    records: Callable[[int, int], dict[str, np.ndarray]],
    files: list[Path],
    settings: dict[str, Any],
) -> ActivationStore:
    """Copy n items of `length` rows each, a part at a time."""
    stats = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files
    ]
    writer = StoreWriter(
        path,
        hook=hook,
        d_in=d_in,
        dtype=dtype,
        expected_rows=n * length,
        data=hashlib.sha256(repr(stats).encode()).hexdigest(),
        settings={"imported": [file.name for file in files][:1], **settings},
    )
    size = max(1, PART_BYTES // (length * d_in * 4))
    with writer:
        done = writer.rows_done
        for start in range(done // length, n, size):
            stop = min(start + size, n)
            skip = max(0, done - start * length)  # a shard may end inside a text
            columns = {k: v[skip:] for k, v in records(start, stop).items()}
            writer.append(read(start, stop)[skip:].float(), columns)
    return ActivationStore.open(path)

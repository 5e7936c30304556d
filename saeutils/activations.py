"""From a model and its inputs to stores of activations, one store a hook point.

One forward pass fills all stores. Inputs are taken in batches that begin at multiples
of `batch_size`, after a resume too, so that an interrupted and an uninterrupted run
compute, and write, the same bytes.
"""

import hashlib
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from saeutils.datasets import ImageData
from saeutils.models import evaluation_mode, hook_point
from saeutils.store import ActivationStore
from saeutils.store_writer import SHARD_BYTES, STORED, Column, StoreWriter, as_stored


class Plan(NamedTuple):
    """What `save_activations` writes for one hook point."""

    hook: str
    rows: int
    d_in: int
    bytes: int
    """Of the rows; their provenance adds a few bytes each."""
    rows_per_shard: int

    @property
    def shards(self) -> int:
        return math.ceil(self.rows / self.rows_per_shard)

    def __str__(self) -> str:
        return (
            f"{self.hook}: {self.rows:,} rows × {self.d_in}, "
            f"{self.bytes / 2**20:,.1f} MiB in {self.shards} shard(s)"
        )


def save_activations(
    model: nn.Module,
    inputs: Tensor | ImageData,
    hooks: str | Sequence[str],
    path: str | Path,
    *,
    provenance: Mapping[str, Column] | None = None,
    layout: Mapping[str, str] | None = None,
    budget: int | None = None,
    batch_size: int = 1024,
    dtype: str = "float32",
    seed: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> dict[str, ActivationStore]:
    """Run the model over the inputs and store what its named modules put out.

    path: each store becomes a folder in it, named after its hook. A store that an
        earlier call with the same arguments left unfinished is completed; one that it
        finished is opened.
    hooks: names out of model.named_modules(). Of an output that is a tuple, the first
        tensor is taken.
    provenance: columns with one value an input. ImageData bring id, label and split
        along; other inputs get `id`, their number, unless that is given.
    layout: hook -> what the axes of its output are. Default "batch d" for two axes, a
        row an input, and "batch position d" for three, a row a position with its
        number in the column `position`. Other names give other columns:
        "batch d row column" for a convolution, "batch position head d" for a row a
        head, "batch position (head d)" to have the heads side by side in a row.
    budget: bytes on disk that the rows may take (default: what is free).
    dtype: of the stored rows: float32, float16 or bfloat16.
    seed: recorded with the store, e.g. the one that the inputs were drawn with.
    progress: print the plan, and show a bar with inputs/s and the time left.

    The model runs in eval mode, without gradients and on the device of its
    parameters, only as far as the last hook. Memory: the activations of one batch.

    Raises ValueError before anything is written for an unknown hook, empty inputs,
    columns of another length, what does not fit, or a store of something else at that
    path; and, naming the row, for an activation that is NaN, infinite or too large.
    """
    hooks = [hooks] if isinstance(hooks, str) else list(dict.fromkeys(hooks))
    source = _source(inputs, provenance or {})
    if dtype not in STORED:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(STORED)}")
    if batch_size < 1 or shard_bytes < 1:
        raise ValueError(f"batch_size {batch_size}, shard_bytes {shard_bytes}: not ≥ 1")
    with _recording(model, hooks) as run:
        outputs = run(source.batch(0, min(2, source.n)), whole=True)
        layouts = {
            hook: _Layout.of(hook, out, min(2, source.n), (layout or {}).get(hook))
            for hook, out in outputs.items()
        }
        plans = [layouts[h].plan(h, source.n, dtype, shard_bytes) for h in hooks]
        folders = {h: Path(path) / quote(h, safe="") for h in hooks}
        _refuse_what_does_not_fit(plans, folders, budget)
        model_print, data_print = model_fingerprint(model), source.fingerprint()
        with ExitStack() as stack:
            writers = {}
            for plan in plans:
                writers[plan.hook] = StoreWriter(
                    folders[plan.hook],
                    hook=plan.hook,
                    d_in=plan.d_in,
                    dtype=dtype,
                    expected_rows=plan.rows,
                    rows_per_shard=plan.rows_per_shard,
                    model=model_print,
                    data=data_print,
                    seed=seed,
                    settings={"layout": layouts[plan.hook].text},
                )
                stack.enter_context(writers[plan.hook])
            if not all(writer.complete for writer in writers.values()):
                _fill(writers, layouts, source, run, plans, batch_size, progress)
    return {hook: ActivationStore.open(folders[hook]) for hook in hooks}


def _fill(
    writers: dict[str, StoreWriter],
    layouts: dict[str, "_Layout"],
    source: "_Source",
    run: Callable[..., dict[str, Tensor]],
    plans: list[Plan],
    batch_size: int,
    progress: bool,
) -> None:
    """The pass over the inputs, from the first batch that any store lacks."""
    known = {hook: writer.rows_done for hook, writer in writers.items()}
    done = min(known[hook] // layouts[hook].positions for hook in known)
    first = done // batch_size * batch_size
    if progress:
        began = time.perf_counter()
        run(source.batch(first, min(first + batch_size, source.n)))
        seconds = (time.perf_counter() - began) * (source.n - first) / batch_size
        print(*plans, f"in about {seconds:,.0f} s", sep="\n")
    with tqdm(total=source.n, initial=done, unit="in", disable=not progress) as bar:
        for start in range(first, source.n, batch_size):
            stop = min(start + batch_size, source.n)
            outputs = run(source.batch(start, stop))
            for hook, writer in writers.items():
                layout = layouts[hook]
                rows = layout.rows(outputs[hook])
                records = layout.records(source.records(start, stop), stop - start)
                # An earlier run may have stored the beginning of the first batches.
                skip = max(0, known[hook] - start * layout.positions)
                if skip < len(rows):
                    writer.append(
                        rows[skip:], {k: v[skip:] for k, v in records.items()}
                    )
            bar.update(stop - max(start, done))


def model_fingerprint(model: nn.Module) -> str:
    """sha256 (hex) over the class and all parameters and buffers, with their names."""
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview | bytes:
    """The elements of a tensor of any dtype, little-endian."""
    tensor = tensor.detach().cpu()
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor)
    return as_stored(tensor).tobytes() if tensor.ndim == 0 else as_stored(tensor).data


class _Source(NamedTuple):
    """Inputs, read a batch at a time, with one value of each column an input."""

    n: int
    batch: Callable[[int, int], Tensor]
    columns: dict[str, np.ndarray]
    content: Callable[[], str]

    def records(self, start: int, stop: int) -> dict[str, np.ndarray]:
        return {name: values[start:stop] for name, values in self.columns.items()}

    def fingerprint(self) -> str:
        """sha256 (hex) of the inputs and their columns."""
        digest = hashlib.sha256(self.content().encode())
        for name, values in sorted(self.columns.items()):
            digest.update(f"{name} {values.dtype.str}".encode())
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()


def _source(inputs: Tensor | ImageData, provenance: Mapping[str, Column]) -> _Source:
    if isinstance(inputs, ImageData):
        n, own = len(inputs), {"id": inputs.ids, "label": inputs.labels}
        own["split"] = np.full(n, inputs.split)

        def batch(start: int, stop: int) -> Tensor:
            return inputs.images[start:stop].flatten(1).float() / 255

        def content() -> str:
            return inputs.fingerprint
    elif isinstance(inputs, Tensor):
        if inputs.ndim < 2 or not inputs.numel():
            raise ValueError(
                f"inputs of shape {tuple(inputs.shape)}: expected (n, …) with n ≥ 1"
            )
        n, own = len(inputs), {"id": np.arange(len(inputs))}

        def batch(start: int, stop: int) -> Tensor:
            return inputs[start:stop]

        def content() -> str:
            what = f"{inputs.dtype} {tuple(inputs.shape)}".encode()
            return hashlib.sha256(what + _bytes(inputs)).hexdigest()
    else:
        raise ValueError(
            f"inputs of type {type(inputs).__name__}: expected a tensor or ImageData"
        )
    columns = {name: np.asarray(v) for name, v in {**own, **provenance}.items()}
    for name, values in columns.items():
        if values.shape != (n,):
            raise ValueError(
                f"provenance column {name!r} of shape {values.shape}: expected one "
                f"value for each of the {n} inputs"
            )
    return _Source(n, batch, columns, content)


class _Layout(NamedTuple):
    """How the output of a hook becomes rows."""

    text: str
    axes: dict[str, int]
    """Name and size of each axis that makes rows, besides the batch."""
    order: list[int]
    """Axes of the output: batch, then those, then the ones that make up a row."""
    d_in: int

    @classmethod
    def of(cls, hook: str, output: Tensor, batch: int, text: str | None) -> "_Layout":
        text = text or {2: "batch d", 3: "batch position d"}.get(output.ndim)
        shape = tuple(output.shape)
        if text is None:
            raise ValueError(
                f"the output of {hook!r} has {len(shape)} axes {shape}: say what they "
                f'are, e.g. layout={{{hook!r}: "batch d row column"}}'
            )
        names = re.findall(r"\w+", text)
        inside = [
            name for part in re.findall(r"\(([^)]*)\)", text) for name in part.split()
        ]
        width = inside or ["d"]
        if (
            len(names) != len(shape)
            or len(set(names)) != len(names)
            or names[0] != "batch"
            or not {"batch", "d"} <= set(names)
            or "d" not in width
        ):
            raise ValueError(
                f"layout {text!r} for the output of {hook!r}, {shape}: expected a name "
                'for each axis, "batch" first, and "d" for the width of a row'
            )
        if shape[0] != batch:
            raise ValueError(
                f"the output of {hook!r} has shape {shape} for {batch} inputs: its "
                "first axis must be the batch"
            )
        sizes = dict(zip(names, shape, strict=True))
        axes = {k: v for k, v in sizes.items() if k != "batch" and k not in width}
        order = [names.index(name) for name in ["batch", *axes, *width]]
        return cls(text, axes, order, math.prod(sizes[name] for name in width))

    @property
    def positions(self) -> int:
        return math.prod(self.axes.values())

    def rows(self, output: Tensor) -> Float[Tensor, "rows d_in"]:
        return output.permute(self.order).reshape(-1, self.d_in)

    def records(
        self, of_inputs: dict[str, np.ndarray], n: int
    ) -> dict[str, np.ndarray]:
        """The record of each row: that of its input, and where in it the row is."""
        records = {k: v.repeat(self.positions) for k, v in of_inputs.items()}
        where = np.indices(tuple(self.axes.values())).reshape(
            len(self.axes), self.positions
        )
        return records | {
            k: np.tile(v, n) for k, v in zip(self.axes, where, strict=True)
        }

    def plan(self, hook: str, n: int, dtype: str, shard_bytes: int) -> Plan:
        row_bytes = self.d_in * np.dtype(STORED[dtype]).itemsize
        rows = n * self.positions
        per_shard = max(1, shard_bytes // row_bytes)
        return Plan(hook, rows, self.d_in, rows * row_bytes, per_shard)


class _Enough(Exception):
    """Raised inside a forward pass when all hooks have spoken; never gets out."""


@contextmanager
def _recording(
    model: nn.Module, hooks: list[str]
) -> Iterator[Callable[..., dict[str, Tensor]]]:
    """A function from a batch of inputs to the outputs of the hooks.

    It stops the forward pass after the last hook, unless `whole`; that first pass
    also makes sure that each hook speaks once.
    """
    if not hooks:
        raise ValueError("no hooks: name at least one module of the model")
    modules = {hook: hook_point(model, hook) for hook in hooks}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    heard: dict[str, list[Tensor]] = {}
    stop_early = False

    def listener(hook: str) -> Callable[..., None]:
        def listen(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple | list) else output
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise ValueError(
                    f"the output of {hook!r} is {type(tensor).__name__}, expected a "
                    "tensor of floats, or a tuple that begins with one"
                )
            heard.setdefault(hook, []).append(tensor)
            if stop_early and len(heard) == len(hooks):
                raise _Enough

        return listen

    def run(batch: Tensor, whole: bool = False) -> dict[str, Tensor]:
        nonlocal stop_early
        stop_early = not whole
        heard.clear()
        with suppress(_Enough):
            model(batch.to(device))
        for hook in hooks:
            if len(heard.get(hook, [])) != 1:
                raise ValueError(
                    f"the model calls {hook!r} {len(heard.get(hook, []))} times in one "
                    "pass, expected once: hook a module inside or around it"
                )
        return {hook: outputs[0] for hook, outputs in heard.items()}

    handles = [m.register_forward_hook(listener(h)) for h, m in modules.items()]
    try:
        with evaluation_mode(model):
            yield run
    finally:
        for handle in handles:
            handle.remove()


def _refuse_what_does_not_fit(
    plans: list[Plan], folders: dict[str, Path], budget: int | None
) -> None:
    needed = sum(plan.bytes for plan in plans)
    listed = "; ".join(map(str, plans))
    if budget is not None and needed > budget:
        raise ValueError(
            f"the rows take {needed:,} bytes and the budget is {budget:,} ({listed}): "
            "store float16, fewer hooks or fewer inputs"
        )
    there = [
        f for folder in folders.values() if folder.is_dir() for f in folder.iterdir()
    ]
    missing = needed - sum(file.stat().st_size for file in there)
    first = next(iter(folders.values())).absolute()
    existing = next(parent for parent in first.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if missing > free:
        raise ValueError(
            f"the rows take {missing:,} bytes more and {free:,} are free at {existing} "
            f"({listed}): free some space, or store float16, fewer hooks or inputs"
        )

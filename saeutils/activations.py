"""From a model and its inputs to stores of activations, one store a hook point.

One forward pass fills all stores. Inputs are taken in batches that begin at multiples
of `batch_size`, after a resume too, so that an interrupted and an uninterrupted run
compute, and write, the same bytes.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from saeutils.datasets import ImageData
from saeutils.distributed import Group, current_group
from saeutils.inputs import (
    Array,
    Inputs,
    Positions,
    content,
    kept_positions,
    patch_grid,
    special_tokens,
)
from saeutils.layout import HookRows, Layout, Plan
from saeutils.models import evaluation_mode, hook_point
from saeutils.parts import Part
from saeutils.sharded import Column
from saeutils.storage import Folder, folder_at
from saeutils.store import ActivationStore
from saeutils.store_writer import SHARD_BYTES, STORED, StoreWriter


def save_activations(
    model: nn.Module,
    inputs: Array | ImageData | Mapping[str, Array],
    hooks: str | Sequence[str],
    path: str | Path,
    *,
    positions: Positions = None,
    provenance: Mapping[str, Column] | None = None,
    layout: Mapping[str, str] | None = None,
    grid: tuple[int, int] | None = None,
    budget: int | None = None,
    batch_size: int = 1024,
    dtype: str = "float32",
    seed: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    part: tuple[int, int] | None = None,
    progress: bool = True,
) -> dict[str, ActivationStore]:
    """Run the model over the inputs and store what its named modules put out.

    path: each store becomes a folder in it, named after its hook; a local path, or a
        URL that fsspec knows. A store that an earlier call with the same arguments
        left unfinished is completed; one that it finished is opened.
    inputs: one argument for the model (pixels, tokens, …; numpy arrays may be
        memory-mapped), ImageData, or keyword arguments as a dictionary, as
        transformers' tokenizers and processors make it.
    hooks: names out of model.named_modules(), or of a transformer_lens model's hooks.
        Of an output that is a tuple, the first tensor is taken.
    positions: which positions (second axis of the output) make rows. None: of text,
        those that are not padding (by `attention_mask`, and the pad token that the
        model knows) nor the model's BOS token; else all. "all", "first" (CLS), "not
        first" (patches), a slice, a list of numbers, or a mask (n, positions).
    provenance: columns with one value an input. ImageData bring id, label and split
        along; other inputs get `id`, their number, unless that is given. Rows of text
        also get `position` and `token`.
    layout: hook -> what the axes of its output are. Default "batch d" for two axes, a
        row an input, and "batch position d" for three, a row a position with its
        number in the column `position`. Other names give other columns:
        "batch d row column" for a convolution, "batch position head d" for a row a
        head, "batch position (head d)" to have the heads side by side in a row.
    grid: (rows, columns) of the patches, which are the last positions: gives the
        columns `row` and `column`, −1 for CLS and registers. Default: as the config
        of a transformers vision model says.
    budget: bytes on disk that the rows may take (default: what is free).
    dtype: of the stored rows: float32, float16 or bfloat16.
    seed: recorded with the store, e.g. the one that the inputs were drawn with.
    part: (rank, world_size), to do only that part of the inputs; whoever completes the
        last part seals the store, and before that it is not among the results.
        Default: as torchrun says, whose processes wait for one another.
    progress: print the plan, and show a bar with inputs/s and the time left.

    The model runs in eval mode, without gradients and on the device of its
    parameters, only as far as the last hook. Memory: the activations of one batch.

    Raises ValueError before anything is written for an unknown hook, empty inputs,
    columns of another length, what does not fit, or a store of something else at that
    path; and, naming the row, for an activation that is NaN, infinite or too large.
    """
    hooks = [hooks] if isinstance(hooks, str) else list(dict.fromkeys(hooks))
    source = Inputs(inputs, provenance or {})
    if dtype not in STORED:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(STORED)}")
    if batch_size < 1 or shard_bytes < 1:
        raise ValueError(f"batch_size {batch_size}, shard_bytes {shard_bytes}: not ≥ 1")
    with _recording(model, hooks) as run:
        few = min(2, source.n)
        outputs = run(source.batch(0, few), whole=True)
        rows = {}
        for hook in hooks:
            how = Layout.of(hook, outputs[hook], few, (layout or {}).get(hook))
            length = how.axes.get("position")
            kept = length and kept_positions(source, positions, length, model)
            rows[hook] = HookRows(how, source, kept, grid or patch_grid(model))
        with_positions = any("position" in r.layout.axes for r in rows.values())
        if positions is not None and not with_positions:
            raise ValueError(f"positions {positions!r}, but no output has positions")
        plans = [rows[h].plan(h, dtype, shard_bytes) for h in hooks]
        folders = {h: folder_at(path) / quote(h, safe="") for h in hooks}
        _refuse_what_does_not_fit(plans, folders, budget)
        group = current_group() if part is None else Group()
        share = Part.of(source.n, batch_size, *(part or group))
        wholes = {}
        with ExitStack() as stack:
            writers = {}
            for plan in plans:
                wholes[plan.hook] = whole = {
                    "hook": plan.hook,
                    "d_in": plan.d_in,
                    "dtype": dtype,
                    "expected_rows": plan.rows,
                    "model": model_fingerprint(model),
                    "data": source.fingerprint,
                    "seed": seed,
                    "settings": {
                        "layout": rows[plan.hook].layout.text,
                        "positions": _describe(positions, source, model),
                        "grid": rows[plan.hook].grid,
                    },
                }
                first, stop = map(rows[plan.hook].before, (share.start, share.stop))
                if first == stop or share.is_sealed(folders[plan.hook], whole):
                    continue
                writers[plan.hook] = StoreWriter(
                    share.folder(folders[plan.hook]),
                    **{**whole, "expected_rows": stop - first},
                    rows_per_shard=plan.rows_per_shard,
                )
                stack.enter_context(writers[plan.hook])
            if not all(writer.complete for writer in writers.values()):
                _fill(writers, rows, source, run, plans, batch_size, share, progress)
    sealed = [hook for hook in hooks if share.seal(folders[hook], wholes[hook])]
    group.barrier()
    ready = sealed if part else hooks
    return {hook: ActivationStore.open(folders[hook]) for hook in ready}


def _fill(
    writers: dict[str, StoreWriter],
    rows: dict[str, HookRows],
    source: Inputs,
    run: Callable[..., dict[str, Tensor]],
    plans: list[Plan],
    batch_size: int,
    share: Part,
    progress: bool,
) -> None:
    """The pass over this process's inputs, from the first batch that a store lacks."""
    begin, end = share.start, share.stop
    known = {h: w.rows_done + rows[h].before(begin) for h, w in writers.items()}
    done = min(rows[hook].inputs_in(known[hook]) for hook in known)
    first = done // batch_size * batch_size
    if progress:
        began = time.perf_counter()
        run(source.batch(first, min(first + batch_size, end)))
        seconds = (time.perf_counter() - began) * (end - first) / batch_size
        print(*plans, f"in about {seconds:,.0f} s", sep="\n")
    writing: list[Future] = []
    with (
        ThreadPoolExecutor(len(writers)) as pool,  # writes while the model goes on
        tqdm(
            total=end - begin, initial=done - begin, unit="in", disable=not progress
        ) as bar,
    ):
        for start in range(first, end, batch_size):
            stop = min(start + batch_size, end)
            outputs = run(source.batch(start, stop))
            for future in writing:
                future.result()
            writing = []
            for hook, writer in writers.items():
                # An earlier run may have stored the beginning of the first batches.
                skip = max(0, known[hook] - rows[hook].before(start))
                if skip < rows[hook].before(stop) - rows[hook].before(start):
                    part = rows[hook].take(outputs[hook], start, stop)
                    records = rows[hook].records(start, stop)
                    records = {name: v[skip:] for name, v in records.items()}
                    writing.append(pool.submit(writer.append, part[skip:], records))
            bar.update(stop - max(start, done))
        for future in writing:
            future.result()


def model_fingerprint(model: nn.Module) -> str:
    """sha256 (hex) over the class and all parameters and buffers, with their names."""
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(content(tensor))
    return digest.hexdigest()


def _describe(positions: Positions, source: Inputs, model: nn.Module) -> str:
    """What distinguishes this choice of positions from another."""
    if positions is None and source.tokens is not None:
        return f"without padding and the tokens {sorted(special_tokens(model))}"
    if isinstance(positions, Array):
        return hashlib.sha256(content(positions)).hexdigest()
    return str(positions)


class _Enough(Exception):
    """Raised inside a forward pass when all hooks have spoken; never gets out."""


@contextmanager
def _recording(
    model: nn.Module, hooks: list[str]
) -> Iterator[Callable[..., dict[str, Tensor]]]:
    """A function from a batch of inputs to the outputs of the hooks.

    It stops the forward pass after the last hook, unless `whole`; that first pass
    also makes sure that each hook speaks once, and finds the outputs that the model
    changes in place later on: of these a copy is taken.
    """
    if not hooks:
        raise ValueError("no hooks: name at least one module of the model")
    modules = {hook: hook_point(model, hook) for hook in hooks}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    heard: dict[str, list[tuple[Tensor, int]]] = {}
    changed_later: set[str] = set()
    stop_early = False

    def listener(hook: str) -> Callable[..., None]:
        def listen(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple | list) else output
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise ValueError(
                    f"the output of {hook!r} is {type(tensor).__name__}, expected a "
                    "tensor of floats, or a tuple that begins with one"
                )
            tensor = tensor.clone() if hook in changed_later else tensor
            heard.setdefault(hook, []).append((tensor, tensor._version))
            if stop_early and len(heard) == len(hooks):
                raise _Enough

        return listen

    def run(batch: dict[str, Tensor], whole: bool = False) -> dict[str, Tensor]:
        nonlocal stop_early
        stop_early = not whole
        heard.clear()
        named = {name: tensor.to(device) for name, tensor in batch.items()}
        unnamed = [named.pop("")] if "" in named else []
        with suppress(_Enough):
            model(*unnamed, **named)
        for hook in hooks:
            if len(heard.get(hook, [])) != 1:
                raise ValueError(
                    f"the model calls {hook!r} {len(heard.get(hook, []))} times in one "
                    "pass, expected once: hook a module inside or around it"
                )
            tensor, version = heard[hook][0]
            if tensor._version != version:
                changed_later.add(hook)
        return {hook: outputs[0][0] for hook, outputs in heard.items()}

    handles = [m.register_forward_hook(listener(h)) for h, m in modules.items()]
    try:
        with evaluation_mode(model):
            yield run
    finally:
        for handle in handles:
            handle.remove()


def _refuse_what_does_not_fit(
    plans: list[Plan], folders: dict[str, Folder], budget: int | None
) -> None:
    needed = sum(plan.bytes for plan in plans)
    listed = "; ".join(map(str, plans))
    if budget is not None and needed > budget:
        raise ValueError(
            f"the rows take {needed:,} bytes and the budget is {budget:,} ({listed}): "
            "store float16, fewer hooks or fewer inputs"
        )
    missing = needed - sum(folder.stored() for folder in folders.values())
    place = next(iter(folders.values()))
    free = place.free()
    if free is not None and missing > free:
        raise ValueError(
            f"the rows take {missing:,} bytes more and {free:,} are free at {place} "
            f"({listed}): free some space, or store float16, fewer hooks or inputs"
        )

"""How the output of a hook point becomes rows: axes, positions, records."""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from saeutils.inputs import Inputs, Kept, as_array
from saeutils.store_writer import STORED


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


@dataclass(frozen=True)
class Layout:
    """How the output of a hook becomes rows."""

    text: str
    axes: dict[str, int]
    """Name and size of each axis that makes rows, besides the batch."""
    order: list[int]
    """Axes of the output: batch, then those, then the ones that make up a row."""
    d_in: int

    @classmethod
    def of(cls, hook: str, output: Tensor, batch: int, text: str | None) -> "Layout":
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

    @cached_property
    def where(self) -> dict[str, Int64[np.ndarray, " positions"]]:
        """The place along each axis of each row of one input."""
        places = np.indices(tuple(self.axes.values()))
        return dict(
            zip(self.axes, places.reshape(len(self.axes), self.positions), strict=True)
        )


class HookRows:
    """The rows that one hook makes of the inputs: how many, which, their records."""

    def __init__(
        self,
        layout: "Layout",
        source: Inputs,
        kept: Kept | None,
        grid: tuple[int, int] | None,
    ) -> None:
        self.layout, self._source, self._kept = layout, source, kept
        self._length = layout.axes.get("position")
        self._starts = None
        if kept is not None:
            if next(iter(layout.axes)) != "position":
                raise ValueError(
                    f"layout {layout.text!r}: `position` must come before the other "
                    "axes that make rows, for some positions to be left out"
                )
            per_position = layout.positions // self._length
            self._starts = np.cumsum([0, *(kept.counts * per_position)])
        self._where = dict(layout.where)
        self.grid = None
        if {"row", "column"} <= layout.axes.keys():
            self.grid = layout.axes["row"], layout.axes["column"]
        if grid is not None and self._length and self._length >= math.prod(grid):
            self.grid = grid
            place = self._where["position"] - (self._length - math.prod(grid))
            for name, number in zip(
                ("row", "column"), np.divmod(place, grid[1]), strict=True
            ):
                self._where[name] = np.where(place >= 0, number, -1)

    def before(self, number: int) -> int:
        """Rows of the inputs before that one."""
        if self._starts is None:
            return number * self.layout.positions
        return int(self._starts[number])

    def inputs_in(self, rows: int) -> int:
        """Inputs all of whose rows are among the first `rows`."""
        if self._starts is None:
            return rows // self.layout.positions
        return int(np.searchsorted(self._starts, rows, side="right")) - 1

    def _mask(self, start: int, stop: int) -> np.ndarray | None:
        if self._kept is None:
            return None
        mask = self._kept.mask(start, stop)
        return mask.repeat(self.layout.positions // self._length, axis=1).reshape(-1)

    def take(self, output: Tensor, start: int, stop: int) -> Float[Tensor, "rows d_in"]:
        """The rows of inputs start … stop − 1, out of the hook's output for them."""
        rows = output.permute(self.layout.order).reshape(-1, self.layout.d_in)
        mask = self._mask(start, stop)
        if mask is None or mask.all():
            return rows
        return rows[torch.from_numpy(mask.nonzero()[0]).to(rows.device)]

    def records(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """The record of each of these rows: that of its input, and where in it."""
        each = self.layout.positions
        of_input = self._source.records(start, stop)
        records = {name: values.repeat(each) for name, values in of_input.items()}
        for name, places in self._where.items():
            records[name] = np.tile(places, stop - start)
        tokens = self._source.tokens
        if tokens is not None and tokens.shape[1] == self._length:
            part = as_array(tokens[start:stop]).astype(np.int32)
            records["token"] = part.reshape(-1).repeat(each // self._length)
        mask = self._mask(start, stop)
        return records if mask is None else {k: v[mask] for k, v in records.items()}

    def plan(self, hook: str, dtype: str, shard_bytes: int) -> Plan:
        row_bytes = self.layout.d_in * np.dtype(STORED[dtype]).itemsize
        rows = self.before(self._source.n)
        per_shard = max(1, shard_bytes // row_bytes)
        return Plan(hook, rows, self.layout.d_in, rows * row_bytes, per_shard)

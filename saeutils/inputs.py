"""What a model is given, batch by batch, and which positions of it make rows."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from saeutils.datasets import ImageData
from saeutils.sharded import Column
from saeutils.store_writer import as_stored

Array = Tensor | np.ndarray
Positions = str | slice | Sequence[int] | Array | None
_CHUNK = 2**14  # inputs looked at in one go


class Inputs:
    """n inputs for a model, with one value of each provenance column an input.

    Attributes: `tokens`, the token ids (n, length) when the inputs are text, and
    `attention`, which of them are not padding; else None.
    """

    def __init__(
        self,
        parts: Mapping[str, Array] | Array | ImageData,
        provenance: Mapping[str, Column],
    ) -> None:
        """Raises ValueError for no inputs, and for columns that do not match them."""
        own: dict[str, Column] = {}
        if isinstance(parts, ImageData):
            own = {"id": parts.ids, "label": parts.labels}
            own["split"] = np.full(len(parts), parts.split)
        self._parts = parts if isinstance(parts, Mapping) else {"": _whole(parts)}
        for name, part in self._parts.items():
            if not isinstance(part, Array):
                raise ValueError(
                    f"inputs {name} of type {type(part).__name__}: expected a tensor, "
                    "a numpy array (a memory-mapped one will do), ImageData, or a "
                    "dictionary of tensors"
                )
            if part.ndim < 2 or 0 in part.shape:
                raise ValueError(
                    f"inputs {name} of shape {tuple(part.shape)}: expected (n, …) "
                    "with n ≥ 1"
                )
        lengths = {name: len(part) for name, part in self._parts.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"inputs of different lengths: {lengths}")
        self.n = next(iter(lengths.values()))
        self._images = isinstance(parts, ImageData)
        own.setdefault("id", np.arange(self.n))
        self.columns = {k: as_array(v) for k, v in {**own, **provenance}.items()}
        for name, values in self.columns.items():
            if values.shape != (self.n,):
                raise ValueError(
                    f"provenance column {name!r} of shape {values.shape}: expected one "
                    f"value for each of the {self.n} inputs"
                )
        main = self._parts.get("input_ids", self._parts.get(""))
        is_text = main is not None and not self._images and _is_integer(main)
        self.tokens = main if is_text and main.ndim == 2 else None
        self.attention = self._parts.get("attention_mask")

    def batch(self, start: int, stop: int) -> dict[str, Tensor]:
        """Inputs start … stop − 1 as keyword arguments ("": the only argument)."""
        batch = {}
        for name, part in self._parts.items():
            tensor = part[start:stop]
            if isinstance(tensor, np.ndarray):
                tensor = torch.from_numpy(np.array(tensor))  # mapped arrays: a copy
            if self._images:
                tensor = tensor.flatten(1).float() / 255
            elif tensor.dtype in (torch.uint16, torch.int16, torch.uint32):
                tensor = tensor.long()  # token ids as they are kept on disk
            batch[name] = tensor
        return batch

    def records(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """The provenance of inputs start … stop − 1."""
        return {name: values[start:stop] for name, values in self.columns.items()}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the inputs and their columns."""
        digest = hashlib.sha256()
        for name, part in sorted({**self._parts, **self.columns}.items()):
            digest.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
            for start in range(0, self.n, _CHUNK):
                digest.update(content(part[start : start + _CHUNK]))
        return digest.hexdigest()


class Kept:
    """Which positions (n, length) make rows. `counts`: how many of each input."""

    def __init__(
        self,
        n: int,
        length: int,
        mask: Callable[[int, int], Bool[np.ndarray, "part length"]],
    ) -> None:
        self.length, self.mask = length, mask
        self.counts: Int64[np.ndarray, " n"] = np.concatenate(
            [mask(a, min(a + _CHUNK, n)).sum(1) for a in range(0, n, _CHUNK)]
        )
        if not self.counts.any():
            raise ValueError(f"no position of {n} inputs of length {length} is kept")


def kept_positions(
    inputs: Inputs, positions: Positions, length: int, model: nn.Module
) -> Kept | None:
    """What `positions` (see `save_activations`) selects of the `length` positions.

    None when every position is kept. Raises ValueError for what cannot be meant.
    """
    n = inputs.n
    if isinstance(positions, Array) and positions.ndim == 2:
        if tuple(positions.shape) != (n, length) or not _is_bool(positions):
            raise ValueError(
                f"positions of shape {tuple(positions.shape)} and type "
                f"{positions.dtype}: expected one truth value for each of {n} inputs × "
                f"{length} positions"
            )
        return Kept(n, length, lambda a, b: as_array(positions[a:b]))
    if positions is None and inputs.tokens is not None:
        return _without_special_tokens(inputs, length, model)
    if positions is None or (isinstance(positions, str) and positions == "all"):
        return None
    named = {"first": slice(0, 1), "not first": slice(1, None)}
    if isinstance(positions, str):
        if positions not in named:
            raise ValueError(
                f"positions {positions!r}: expected 'all', 'first', 'not first', a "
                "slice, a list of numbers, or a mask"
            )
        positions = named[positions]
    chosen = np.zeros(length, bool)
    try:
        chosen[positions if isinstance(positions, slice) else list(positions)] = True
    except IndexError as error:
        raise ValueError(f"positions {positions} of {length}: {error}") from error
    return Kept(n, length, lambda a, b: np.tile(chosen, (b - a, 1)))


def _without_special_tokens(
    inputs: Inputs, length: int, model: nn.Module
) -> Kept | None:
    special = np.array(sorted(special_tokens(model)), dtype=np.int64)
    if inputs.tokens.shape[1] != length or not (
        len(special) or inputs.attention is not None
    ):
        return None

    def mask(start: int, stop: int) -> Bool[np.ndarray, "part length"]:
        keep = ~np.isin(as_array(inputs.tokens[start:stop]), special)
        if inputs.attention is not None:
            keep &= as_array(inputs.attention[start:stop]).astype(bool)
        return keep

    return Kept(inputs.n, length, mask)


def special_tokens(model: nn.Module) -> set[int]:
    """Token ids that begin or pad a text, as the model's tokenizer or config says."""
    found = set()
    for owner in ("tokenizer", "config", "cfg"):
        for name in ("bos_token_id", "pad_token_id"):
            token = getattr(getattr(model, owner, None), name, None)
            if isinstance(token, int) and token >= 0:
                found.add(token)
    return found


def patch_grid(model: nn.Module) -> tuple[int, int] | None:
    """Rows and columns of patches, of a vision model with a square image."""
    config = getattr(model, "config", None)
    image, patch = (getattr(config, f"{x}_size", None) for x in ("image", "patch"))
    if not isinstance(image, int) or not isinstance(patch, int):
        return None
    return image // patch, image // patch


def as_array(values: Column) -> np.ndarray:
    """A tensor on any device, an array or a list, as an array."""
    return np.asarray(values.cpu() if isinstance(values, Tensor) else values)


def content(part: Array) -> bytes | memoryview:
    """The elements of a tensor or array of any type, little-endian."""
    if isinstance(part, np.ndarray):
        part = np.ascontiguousarray(part)
        return part.astype(part.dtype.newbyteorder("<"), copy=False).tobytes()
    tensor = part.detach().cpu()
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor)
    return as_stored(tensor).tobytes()


def _whole(inputs: Any) -> Any:
    return inputs.images if isinstance(inputs, ImageData) else inputs


def _is_integer(part: Array) -> bool:
    if isinstance(part, np.ndarray):
        return part.dtype.kind in "iu"
    return not part.dtype.is_floating_point and part.dtype != torch.bool


def _is_bool(part: Array) -> bool:
    return part.dtype in (torch.bool, np.bool_)

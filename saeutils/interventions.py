"""Edits of a hook point: steer, clamp, ablate, patch; one latent, several, or all.

Each function here gives an `Edit`: from the activations at a hook to what stands in
their place, as `splicing.edited`, `story_models.generate(edits=…)` and `applied` take
it. Those that go by way of an SAE change its codes z = encode(x) to z' and keep what it
does not explain:

    x' = x + decode(z') − decode(z)

so that an edit which changes no code changes nothing. The last axis of the activations
is the SAE's d_in; what stands before it, (batch,) or (batch, position), are rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saeutils.models import evaluation_mode, hook_point
from saeutils.splicing import edited
from saeutils.store import as_store
from saeutils.streaming import BUDGET, Rows, checked_chunks, rows_within

Positions = None | int | slice | Sequence[int] | Bool[Tensor, "..."]
Change = Callable[[Tensor, Bool[Tensor, "..."]], Tensor]
Codes = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Edit:
    """Changes the rows at some positions of the activations, and no others.

    Called with activations (batch, d_in) or (batch, position, d_in), gives as many.
    """

    name: str
    change: Change
    """(chosen rows (n, d_in), which of the activations they are) -> (n, d_in)."""
    d_in: int
    positions: Positions = None
    """None: all. Else an index, indices or a slice (negative from the end), the same
    for every text of the batch, or a mask (batch, position) or (batch,)."""
    shape: tuple[int, ...] | None = None
    """(batch, position) of the source of a patch: the edited input must have it."""

    @property
    def pointwise(self) -> bool:
        """Whether every position is treated alike, however long the text."""
        return self.positions is None and self.shape is None

    def __call__(self, acts: Tensor) -> Tensor:
        if acts.shape[-1] != self.d_in:
            raise ValueError(
                f"{self.name}: the activations have shape {tuple(acts.shape)}, but the "
                f"edit is for a last axis of d_in = {self.d_in}: was the SAE or "
                "direction made at another hook point?"
            )
        rows = acts.shape[:-1]
        if self.shape is not None:
            _refuse_other_shape(self.name, self.shape, rows)
        where = _mask(self.positions, rows, acts.device)
        out = acts.clone()
        out[where] = self.change(acts[where], where).to(acts.dtype)
        return out


def _refuse_other_shape(
    name: str, source: tuple[int, ...], rows: Sequence[int]
) -> None:
    fits = len(source) == len(rows) and source[1:] == tuple(rows[1:])
    if not (fits and source[0] in (1, rows[0])):
        raise ValueError(
            f"{name}: the source has rows of shape {source}, the edited input "
            f"{tuple(rows)}; they must agree (or the source have a batch of 1). "
            "Prompts of other lengths cannot be matched position by position: make "
            "them as many tokens long"
        )


def _mask(
    positions: Positions, rows: Sequence[int], device: Any
) -> Bool[Tensor, "..."]:
    """Which rows are meant, True or False for each."""
    if isinstance(positions, Tensor):
        if positions.dtype != torch.bool or positions.shape != tuple(rows):
            raise ValueError(
                f"a mask of positions must be bool of shape {tuple(rows)}, got "
                f"{positions.dtype} of shape {tuple(positions.shape)}"
            )
        return positions.to(device)
    mask = torch.zeros(tuple(rows), dtype=torch.bool, device=device)
    if positions is None:
        return ~mask
    if len(rows) != 2:
        raise ValueError(
            f"positions {positions} are for activations (batch, position, d_in); these "
            f"have rows of shape {tuple(rows)}: choose rows by a mask"
        )
    chosen = [positions] if isinstance(positions, int) else positions
    if not isinstance(chosen, slice):
        chosen = list(chosen)
        if bad := [p for p in chosen if not -rows[1] <= p < rows[1]]:
            raise ValueError(f"positions {bad} of a text of {rows[1]}: there are none")
    mask[:, chosen] = True
    return mask


# --- edits ----------------------------------------------------------------


def add(
    direction: Float[Tensor, " d_in"],
    strength: int | float = 1.0,
    *,
    positions: Positions = None,
) -> Edit:
    """x' = x + strength · direction. Raises ValueError for NaN or Inf."""
    step = strength * direction
    if not step.isfinite().all():
        raise ValueError("strength · direction holds NaN or Inf")

    def change(x: Tensor, _where: Tensor) -> Tensor:
        return x + step.to(x)

    return Edit("add", change, len(direction), positions)


def push(
    direction: Float[Tensor, " d_in"],
    length: int | float,
    *,
    positions: Positions = None,
) -> Edit:
    """x' = x + length · direction / ‖direction‖.

    Raises ValueError for a direction of length 0, NaN or Inf.
    """
    norm = direction.norm()
    if norm == 0:
        raise ValueError("a direction of length 0 points nowhere")
    return add(direction / norm, length, positions=positions)


def steer(
    sae: Any, strengths: Mapping[int, int | float], *, positions: Positions = None
) -> Edit:
    """x' = x + Σ strengths[j] · W_dec[j], whatever the latents' own codes are.

    A strength is in units of the latent's code: 1 adds what a code of 1 writes. Use
    `largest_codes` or `mean_norm` for multiples of what latents or activations reach.

    Raises ValueError for latents that the SAE does not have, and for NaN or Inf.
    """
    latents = _latents(sae, strengths)
    weights = _values(strengths.values()).to(sae.W_dec)
    direction = (weights @ sae.W_dec[latents]).detach()
    return add(direction, positions=positions)


def clamp(
    sae: Any, values: Mapping[int, int | float], *, positions: Positions = None
) -> Edit:
    """The codes of these latents become these values; the SAE's error is kept.

    Raises ValueError for latents that the SAE does not have, and for NaN or Inf.
    """
    latents, new = _latents(sae, values), _values(values.values())

    def codes(z: Tensor, _source: Tensor) -> Tensor:
        z[:, latents] = new.to(z)
        return z

    return Edit("clamp", _through(sae, codes), _d_in(sae), positions)


def ablate(sae: Any, latents: Sequence[int], *, positions: Positions = None) -> Edit:
    """The codes of these latents become 0: `clamp` to nothing."""
    edit = clamp(sae, dict.fromkeys(latents, 0.0), positions=positions)
    return Edit("ablate", edit.change, edit.d_in, positions)


def scale(
    sae: Any, factors: Mapping[int, int | float], *, positions: Positions = None
) -> Edit:
    """The codes of these latents are multiplied: 1 leaves them, 0 ablates them."""
    latents, factor = _latents(sae, factors), _values(factors.values())

    def codes(z: Tensor, _source: Tensor) -> Tensor:
        z[:, latents] *= factor.to(z)
        return z

    return Edit("scale", _through(sae, codes), _d_in(sae), positions)


def patch(
    sae: Any,
    source: Float[Tensor, "*rows d_in"],
    latents: Sequence[int] | None = None,
    *,
    positions: Positions = None,
) -> Edit:
    """These latents get the codes that they have in `source`; the others stay.

    Args:
        source: activations at the same hook on another input of the same shape (see
            `recorded`), or on one input, for all.
        latents: None: all of them; only the SAE's error of the own input is left.

    Raises ValueError for latents that the SAE does not have, and for a source of
    another width; when called, for an input of another shape than the source's.
    """
    chosen = slice(None) if latents is None else _latents(sae, latents)
    _refuse_other_width("patch", source, _d_in(sae))

    def codes(z: Tensor, other: Tensor) -> Tensor:
        z[:, chosen] = sae.encode(other)[:, chosen]
        return z

    change = _through(sae, codes, source)
    return Edit("patch", change, _d_in(sae), positions, tuple(source.shape[:-1]))


def replace(
    source: Float[Tensor, "*rows d_in"],
    units: Sequence[int] | None = None,
    *,
    positions: Positions = None,
) -> Edit:
    """The activations themselves, all or those of some `units`, come from `source`.

    With the hook after an activation function units are neurons: what patching latents
    is to be held against.

    Raises ValueError for units that are not there; when called, for an input of another
    shape than the source's.
    """
    d_in = source.shape[-1]
    chosen = slice(None) if units is None else _within("units", units, d_in)

    def change(x: Tensor, where: Tensor) -> Tensor:
        x = x.clone()
        x[:, chosen] = _matching(source, where)[:, chosen].to(x)
        return x

    return Edit("replace", change, d_in, positions, tuple(source.shape[:-1]))


def _through(sae: Any, codes: Codes, source: Tensor | None = None) -> Change:
    """A change of rows from a change of codes, a bounded number of rows at a time."""
    size = rows_within(BUDGET, len(sae.W_dec))

    def change(x: Tensor, where: Tensor) -> Tensor:
        others = x if source is None else _matching(source, where)
        out = []
        for rows, other in zip(x.split(size), others.split(size), strict=True):
            own = rows.to(sae.W_dec)
            z = sae.encode(own)
            new = codes(z.clone(), other.to(sae.W_dec))
            if torch.equal(new, z):
                out.append(rows)
            else:
                out.append(rows + (sae.decode(new) - sae.decode(z)).to(rows))
        return torch.cat(out) if out else x

    return change


def _matching(source: Tensor, where: Bool[Tensor, "..."]) -> Tensor:
    return source.to(where.device).expand(*where.shape, -1)[where]


def _latents(sae: Any, latents: Any) -> list[int]:
    return _within("latents", latents, len(sae.W_dec))


def _within(what: str, indices: Any, n: int) -> list[int]:
    chosen = [int(i) for i in indices]
    if bad := [i for i in chosen if not 0 <= i < n]:
        raise ValueError(f"{what} {bad[:8]}: there are only 0 to {n - 1}")
    return chosen


def _values(values: Any) -> Float[Tensor, " n"]:
    found = torch.tensor([float(v) for v in values])
    if not found.isfinite().all():
        raise ValueError(f"values {found.tolist()}: NaN or Inf cannot be set")
    return found


def _d_in(sae: Any) -> int:
    return sae.W_dec.shape[1]


def _refuse_other_width(name: str, source: Tensor, d_in: int) -> None:
    if source.shape[-1] != d_in:
        raise ValueError(
            f"{name}: the source has {source.shape[-1]} numbers a row, the SAE takes "
            f"{d_in}: record it at the hook that the SAE was trained on"
        )


# --- running a model with them --------------------------------------------

Edits = Mapping[str, Callable[[Tensor], Tensor] | Sequence[Callable[[Tensor], Tensor]]]


@contextmanager
def applied(model: nn.Module, edits: Edits) -> Iterator[None]:
    """Inside, every hook in `edits` is edited; of several edits at one, in turn.

    Raises ValueError for a hook point that the model has not, before any is set.
    """
    for hook in edits:
        hook_point(model, hook)
    with ExitStack() as stack:
        for hook, some in edits.items():
            for edit in [some] if callable(some) else some:
                stack.enter_context(edited(model, hook, edit))
        yield


def run(model: nn.Module, inputs: Tensor, edits: Edits | None = None) -> Tensor:
    """What the model puts out with the edits, in eval mode, without gradients.

    Raises ValueError, before the model runs, for unknown hooks, and for token inputs
    of another shape than the source of a patch.
    """
    if not inputs.is_floating_point():
        for some in (edits or {}).values():
            for edit in [some] if callable(some) else some:
                if getattr(edit, "shape", None) is not None:
                    _refuse_other_shape(edit.name, edit.shape, inputs.shape)
    with evaluation_mode(model), applied(model, edits or {}):
        return model(inputs.to(next(model.parameters()).device))


def recorded(
    model: nn.Module,
    inputs: Tensor,
    hooks: Sequence[str],
    edits: Edits | None = None,
) -> dict[str, Tensor]:
    """The activations at these hooks, after the edits: hook -> (batch, …, d_in).

    Raises ValueError for a hook point that the model has not, or does not use.
    """
    heard: dict[str, Tensor] = {}

    def keep(hook: str) -> Callable[[Tensor], Tensor]:
        def listen(acts: Tensor) -> Tensor:
            heard[hook] = acts
            return acts

        return listen

    listeners = {hook: keep(hook) for hook in hooks}
    with applied(model, edits or {}), applied(model, listeners):
        run(model, inputs)
    if silent := [hook for hook in hooks if hook not in heard]:
        raise ValueError(f"the model never calls {silent}: nothing to record")
    return heard


# --- units of strength ----------------------------------------------------


def largest_codes(sae: Any, rows: Rows) -> Float[Tensor, " d_sae"]:
    """The largest code of each latent over all rows; 0 where it never fires."""
    d_sae, d_in = sae.W_dec.shape
    most = sae.W_dec.new_zeros(d_sae)
    with torch.no_grad():
        size = rows_within(BUDGET, d_sae)
        for x in checked_chunks(rows, d_in, size, sae.W_dec.device):
            most = torch.maximum(most, sae.encode(x.to(sae.W_dec)).amax(0))
    return most


def mean_norm(rows: Rows) -> float:
    """Mean length ‖x‖ of the rows: the natural unit of what is added to them."""
    total, n, d_in = 0.0, 0, as_store(rows).d_in
    for x in checked_chunks(rows, d_in, rows_within(BUDGET, d_in)):
        total, n = total + x.norm(dim=1).double().sum().item(), n + len(x)
    return total / n

"""What replacing the activations of several layers costs: each alone, all at once."""

from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from saeutils.metrics import Autoencoder
from saeutils.splicing import evaluate_edits

if TYPE_CHECKING:
    import pandas as pd

TOGETHER = "all at once"


@torch.no_grad()
def layer_costs(
    model: nn.Module,
    replacements: Mapping[str, Mapping[str, tuple[str, Autoencoder]]],
    data: tuple[Tensor, Tensor],
    *,
    where: Bool[Tensor, "n positions"] | None = None,
    batch_size: int = 2048,
) -> "pd.DataFrame":
    """Nats that the loss rises by, and KL, for every replacement and layer.

    An SAE was trained on what a layer puts out in the untouched model. Spliced in
    below another one, it changes what that one is given, so that errors can add up to
    more than their sum, or make good for each other.

    Args:
        replacements: name -> {layer: (hook, autoencoder)}; a reconstruction takes the
            place of the activations there. All names have the same layers.
        data, where, batch_size: as `splicing.evaluate_edits` takes them.

    Returns one line a name and layer, and one for all layers at once, in the order
    given: name, layer, cost (Δ cross-entropy in nats; negative: the loss fell), kl,
    clean (loss of the untouched model), sum (of the costs of each layer alone).

    Raises ValueError when names differ in their layers, and as `evaluate_edits` does.
    """
    import pandas as pd

    layers = {name: tuple(of) for name, of in replacements.items()}
    if not layers or len(set(layers.values())) > 1 or not all(layers.values()):
        raise ValueError(f"expected the same layers for every name, got {layers}")
    edits: dict[Hashable, dict[str, Callable]] = {"clean": {}}
    for name, of in replacements.items():
        single = {layer: {hook: _splice(sae)} for layer, (hook, sae) in of.items()}
        edits |= {(name, layer): edit for layer, edit in single.items()}
        if len(single) > 1:
            edits[name, TOGETHER] = {
                h: e for edit in single.values() for h, e in edit.items()
            }
    found = evaluate_edits(model, edits, data, where=where, batch_size=batch_size)
    clean = found.pop("clean").evaluation.cross_entropy
    rows = [
        (name, layer, outcome.evaluation.cross_entropy - clean, outcome.kl, clean)
        for (name, layer), outcome in found.items()
    ]
    frame = pd.DataFrame(rows, columns=["name", "layer", "cost", "kl", "clean"])
    alone = frame[frame.layer != TOGETHER].groupby("name").cost.sum()
    return frame.assign(sum=frame.name.map(alone))


def cost_table(costs: "pd.DataFrame", against: str) -> "pd.DataFrame":
    """`layer_costs` as one line a name; for each layer nats, KL, and share recovered.

    recovered = 1 − cost / cost of `against`, which is one of the names (an ablation).
    """
    import pandas as pd

    names = list(dict.fromkeys(costs.name))
    if against not in names:
        raise ValueError(f"no replacement is called {against!r}; there are: {names}")
    table = pd.DataFrame({"name": names})
    for layer, lines in costs.groupby("layer", sort=False):
        lines = lines.set_index("name").loc[names]
        table[f"nats, {layer}"] = lines.cost.to_numpy()
        table[f"KL, {layer}"] = lines.kl.to_numpy()
        share = 1 - lines.cost / lines.cost[against]
        table[f"recovered, {layer}"] = share.to_numpy()
    return table


def _splice(sae: Autoencoder) -> Callable[[Tensor], Tensor]:
    def splice(acts: Tensor) -> Tensor:
        rows = acts.flatten(0, -2).to(sae.W_dec.device)
        out = torch.cat([sae.decode(sae.encode(part)) for part in rows.split(2048)])
        return out.to(acts).reshape(acts.shape)

    return splice

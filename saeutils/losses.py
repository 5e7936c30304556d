"""Terms to add to a classifier's cross-entropy, for `train_classifier(extra_loss=…)`.

Each function gives a term: from a `Step` to a number, already multiplied by `weight`.
Those about activations name a hook point, which `train_classifier` needs in `hooks`:

    pull = activity("fc1", 0.1)
    train_classifier(model, data, extra_loss=pull, hooks=["fc1"])
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from saeutils.models import Step

Term = Callable[[Step], Tensor]


def activity(hook: str, weight: int | float) -> Term:
    """weight · mean over rows and units of |h|: fewer and weaker activations."""
    return lambda step: weight * step.acts[hook].abs().mean()


def group_sparsity(hook: str, groups: int, weight: int | float) -> Term:
    """A structured bottleneck: an image is to use few groups of neighbouring units.

    weight · mean over rows of Σ_g ‖h_g‖ / √d, with the d units cut into `groups` of
    equal size (the group lasso's penalty, Yuan and Lin 2006, on activations).

    Raises: ValueError in the first step when `groups` does not divide d.
    """

    def term(step: Step) -> Tensor:
        h = step.acts[hook]
        if h.shape[1] % groups:
            raise ValueError(f"{h.shape[1]} units of {hook!r} in {groups} equal groups")
        # sqrt has no gradient at 0, where a silent group is
        norms = (h.unflatten(1, (groups, -1)).square().sum(2) + 1e-12).sqrt()
        return weight * norms.sum(1).mean() / h.shape[1] ** 0.5

    return term


def contrastive(hook: str, weight: int | float, temperature: float = 0.2) -> Term:
    """Rows of one label point one way, of different labels apart.

    With s_ij = cos(h_i, h_j) / temperature, and P(i) the other rows of i's label:
        L = − mean_i mean_{p in P(i)} log( exp s_ip / Σ_{j ≠ i} exp s_ij )
    over the rows that have such others. Source: Khosla et al. 2020, eq. 2.
    """

    def term(step: Step) -> Tensor:
        h = F.normalize(step.acts[hook], dim=1)
        myself = torch.eye(len(h), dtype=torch.bool, device=h.device)
        s = (h @ h.T / temperature).masked_fill(myself, -torch.inf)
        log_p = (s - s.logsumexp(1, keepdim=True)).masked_fill(myself, 0.0)
        same = (step.labels[:, None] == step.labels) & ~myself
        n = same.sum(1)
        mean = (log_p * same).sum(1) / n.clamp(min=1)
        return -weight * mean.sum() / (n > 0).sum().clamp(min=1)

    return term


def input_gradient(mask: Bool[Tensor, " pixels"], weight: int | float) -> Term:
    """What the model says must not depend on the pixels of `mask`.

    weight · mean over rows of Σ_{i in mask} (∂/∂x_i Σ_c log p_c)². Summed over all
    classes it does not vanish where the model is sure. Source: Ross, Hughes and
    Doshi-Velez 2017, eq. 1.
    """

    def term(step: Step) -> Tensor:
        log_p = step.logits.log_softmax(1).sum()
        (gradient,) = torch.autograd.grad(log_p, step.pixels, create_graph=True)
        return weight * gradient[:, mask].square().sum(1).mean()

    return term


def cosine_pull(
    hook: str,
    targets: Float[Tensor, "groups d"],
    member: Bool[Tensor, "n member_groups"],
    weight: int | float,
) -> Term:
    """Activations are pulled towards the direction of what their image belongs to.

    weight · mean over pairs (row, group it belongs to) of 1 − cos(h, target): 0 when
    every row points along its targets, `weight` when they are orthogonal.

    Args:
        targets: a direction for each group (class or concept).
        member: whether each of the n training images belongs to each group.

    Raises: ValueError when the number of groups differs.
    """
    if len(targets) != member.shape[1]:
        raise ValueError(f"{len(targets)} targets, but members of {member.shape[1]}")
    unit = F.normalize(targets, dim=1)

    def term(step: Step) -> Tensor:
        inside = member[step.index].float()
        cosine = F.normalize(step.acts[hook], dim=1) @ unit.T
        pairs = inside.sum().clamp(min=1)
        return weight * ((1 - cosine) * inside).sum() / pairs

    return term

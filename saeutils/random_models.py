"""A model that learned nothing, as a control for what is read out of one that did."""

import copy

import torch
from torch import nn


@torch.no_grad()
def reinitialised(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """A copy of the model in which every parameter tensor is shuffled within itself.

    Each tensor keeps its values, so its scale and its tails; none keeps its order, so
    nothing that was learned remains. Tied parameters stay tied. An SAE on such a model
    finds latents, too, since the text itself is not random: what is said of the
    latents of a trained model has to be more than what holds of these. Source: Heap,
    Lawson, Farnik and Aitchison, "Sparse autoencoders can interpret randomly
    initialized transformers", 2025 (there with Gaussian values of the same variance).

    Raises ValueError for a model without parameters.
    """
    if not any(parameter.numel() for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no parameters to shuffle")
    random = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in random.parameters():  # a tied one comes once
        order = torch.randperm(parameter.numel(), generator=generator)
        values = parameter.flatten()[order.to(parameter.device)]
        parameter.copy_(values.reshape(parameter.shape))
    return random

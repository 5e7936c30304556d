"""What scores between two models say when their common share is known.

frame = read_pair(related(truth, shared=0.5), sae_a, sae_b)
between(frame, null, ceiling)               # 0 at chance, 1 at the same model
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from saeutils.metrics import Autoencoder
from saeutils.pair_scores import View, null_scores, pair_scores
from saeutils.recovery import recovery
from saeutils.related import Related
from saeutils.synthetic import Sample

if TYPE_CHECKING:
    import pandas as pd

#: of `PairScores`, as figures name them
NAMES = {
    "mean_max_ab": "mean-max a→b",
    "mean_max_ba": "mean-max b→a",
    "mutual": "mutual",
    "hungarian": "Hungarian",
    "cosine_ab": "cosine a→b",
    "svcca": "SVCCA",
    "rsa": "RSA",
    "svcca_matched": "SVCCA, matched",
    "rsa_matched": "RSA, matched",
}


def view(sample: Sample, sae: Autoencoder) -> View:
    """A model as its SAE shows it."""
    return View(sample.rows, sae.encode(sample.rows), sae.W_dec.detach())


@torch.no_grad()
def read_pair(
    pair: Related,
    sae_a: Autoencoder,
    sae_b: Autoencoder,
    *,
    rows: int = 10_000,
    nulls: int = 5,
    seed: int = 2,
) -> "pd.DataFrame":
    """`pair_scores` of the true features and of the SAEs, over rows of stream `seed`.

    Columns: "codes" (true features, SAE latents), "null" (rows permuted: `nulls` of
    each), "found" (share of a's and b's features that the SAEs found, cosine > 0.9;
    the mean of both), and those of `PairScores`.
    """
    import pandas as pd

    a, b = pair.sample(rows, seed=seed)
    found = [
        recovery(s.W_dec, t).share() for s, t in ((sae_a, pair.a), (sae_b, pair.b))
    ]
    both = {
        "true features": (View(*a, pair.a.W), View(*b, pair.b.W)),
        "SAE latents": (view(a, sae_a), view(b, sae_b)),
    }
    scored = []
    for codes, views in both.items():
        shared = {"codes": codes, "found": sum(found) / 2}
        scored.append(shared | {"null": False} | pair_scores(*views)._asdict())
        for null in null_scores(*views, nulls):
            scored.append(shared | {"null": True} | null._asdict())
    return pd.DataFrame(scored)


def between(
    frame: "pd.DataFrame", null: Mapping[str, float], ceiling: Mapping[str, float]
) -> "pd.DataFrame":
    """(score − null) / (ceiling − null) of each score; NaN where these are one."""
    spans = {s: ceiling[s] - null[s] for s in NAMES}
    return frame.assign(
        **{
            s: (frame[s] - null[s]) / (span or float("nan"))
            for s, span in spans.items()
        }
    )

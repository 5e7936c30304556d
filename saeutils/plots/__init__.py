"""Plotly figures: one function, one figure, from plain arrays and result objects.

Nothing here shows anything or changes a global setting: every function returns a
`go.Figure` in one style. Colours are safe for the colour-blind. Arguments that are
arrays may be torch tensors or numpy arrays.
"""

from saeutils.plots.attribution import agreement, attributions, removal_curves
from saeutils.plots.cards import feature_card
from saeutils.plots.images import image_grid, reconstructions, top_images
from saeutils.plots.intervals import intervals
from saeutils.plots.interventions import (
    before_after,
    moved_points,
    ranges,
    shifted_tokens,
    success_rates,
)
from saeutils.plots.ladder import ladder
from saeutils.plots.language import (
    attention_patterns,
    curves,
    effects,
    highlighted,
)
from saeutils.plots.latents import concept_scores, contexts, latent_profiles
from saeutils.plots.maps import cosine_histogram, cosine_map, pca_map
from saeutils.plots.panels import image_panels
from saeutils.plots.probing import by_class, point_maps, sparse_probes
from saeutils.plots.recovery import (
    phase_diagram,
    recovery_by_rate,
    score_against_score,
)
from saeutils.plots.scores import (
    class_profile,
    cumulative,
    density,
    dots,
    loss_curves,
    scorecard_table,
)
from saeutils.plots.splitting import (
    family_trees,
    insertions,
    stitching_paths,
)
from saeutils.plots.style import styled
from saeutils.plots.two_models import against_truth, misreadings

__all__ = [
    "against_truth",
    "agreement",
    "attention_patterns",
    "attributions",
    "before_after",
    "by_class",
    "class_profile",
    "concept_scores",
    "contexts",
    "cosine_histogram",
    "cosine_map",
    "cumulative",
    "curves",
    "density",
    "dots",
    "effects",
    "family_trees",
    "feature_card",
    "highlighted",
    "image_grid",
    "image_panels",
    "insertions",
    "intervals",
    "ladder",
    "latent_profiles",
    "loss_curves",
    "misreadings",
    "moved_points",
    "pca_map",
    "phase_diagram",
    "point_maps",
    "ranges",
    "reconstructions",
    "recovery_by_rate",
    "removal_curves",
    "score_against_score",
    "scorecard_table",
    "shifted_tokens",
    "sparse_probes",
    "stitching_paths",
    "styled",
    "success_rates",
    "top_images",
]

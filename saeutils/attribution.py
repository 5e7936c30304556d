"""Which pixels drive a latent, a neuron or a logit, and whether to believe the answer.

The methods are captum's, on x → PRE-activation, which is continuous; the code itself
jumps when a latent drops out of the k largest. What captum lacks is here: scores that
tell an attribution from a picture of the digit.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from saeutils.models import SIDE, hook_point

if TYPE_CHECKING:
    import pandas as pd

METHODS = (
    *("|gradient|", "gradient", "input × gradient", "integrated gradients"),
    *("SmoothGrad", "occlusion", "Grad-CAM"),
)


class PreActivation(nn.Module):
    """f(x, u): what unit u gets before its non-linearity, for each row its own u.

        a = model's activation at `hook`
        f(x, u) = a_u                                   without an SAE
        f(x, u) = W_enc[:, u] · (a − b_dec) + b_enc[u]  with one (a sae_lens SAE)

    A logit is hook "head"; a neuron before its ReLU is "fc1.linear". Of a Gated SAE it
    is the gate. The model is put in eval mode.

    Args:
        code: give the latent's code instead: only to show what that does.

    Raises:
        ValueError: an unknown hook, an SAE without encoder, or no SAE with `code`; in
            `forward`, activations with more axes than (n, d), or a unit out of range.
    """

    def __init__(
        self, model: nn.Module, hook: str, sae: Any = None, *, code: bool = False
    ):
        super().__init__()
        hook_point(model, hook)
        if code and sae is None:
            raise ValueError("code=True needs the SAE whose code is meant: pass sae")
        if sae is not None and not hasattr(sae, "process_sae_in"):
            raise ValueError(
                f"{type(sae).__name__} is no SAE of sae_lens: pass one, such as "
                "train(...).sae"
            )
        self.model, self.hook, self.sae, self.code = model.eval(), hook, sae, code

    def forward(
        self, x: Float[Tensor, "n pixels"], unit: Int64[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        heard = []
        module = hook_point(self.model, self.hook)
        handle = module.register_forward_hook(lambda *call: heard.append(call[-1]))
        try:
            self.model(x)
        finally:
            handle.remove()
        (a,) = heard
        if a.ndim != 2:
            shape = tuple(a.shape)
            raise ValueError(f"{self.hook!r} gives {shape}, expected (n, d), like fc1")
        d = a.shape[1] if self.sae is None else self.sae.W_enc.shape[1]
        if unit.min() < 0 or unit.max() >= d:
            raise ValueError(f"units must lie in 0..{d - 1}, got {unit.unique()}")
        if self.code:
            a = self.sae.encode(a)
        elif self.sae is not None:
            # One column of the encoder a row, not all d_sae latents.
            bias = self.sae.b_enc if hasattr(self.sae, "b_enc") else self.sae.b_gate
            a = self.sae.process_sae_in(a)
            return torch.linalg.vecdot(a, self.sae.W_enc.T[unit]) + bias[unit]
        return a.gather(1, unit[:, None])[:, 0]


def attribute(
    f: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "n pixels"],
    unit: Int64[Tensor, " n"],
    method: str,
    *,
    baseline: float = 0.0,
    steps: int = 64,
    noise: float = 0.2,
    samples: int = 24,
    window: int = 4,
    layer: nn.Module | None = None,
    seed: int = 0,
    batch: int = 4096,
) -> Float[Tensor, "n pixels"]:
    """How much each pixel of each row matters to f(row, its unit), by one method.

        |gradient|            |∂f/∂x|                         (Simonyan et al. 2013)
        gradient              ∂f/∂x
        input × gradient      (x − x₀) ∂f/∂x
        integrated gradients  (x − x₀) ∫₀¹ ∂f/∂x(x₀ + t(x − x₀)) dt      (2017)
        SmoothGrad            |mean of ∂f/∂x over noisy copies|          (2017)
        occlusion             f(x) − f(x with a window set to x₀), the mean over the
                              windows that hold the pixel
        Grad-CAM              relu(Σ_c mean(∂f/∂A_c) A_c), A = output of `layer`,
                              drawn at the size of the image (Selvaraju et al. 2017)

    Args:
        f: e.g. a `PreActivation`; (n, pixels), (n,) -> (n,).
        baseline: x₀, the value of a pixel without content.
        steps: of the integral. noise: standard deviation (SmoothGrad), in the units of
            x; samples: noisy copies. window: side in pixels, moved by half of it.
        batch: rows in one pass, which bounds the memory.

    Raises ValueError for an unknown method, Grad-CAM without a layer, no rows, or a
    number of units other than of rows.
    """
    from captum import attr

    if method not in METHODS:
        raise ValueError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    if method == "Grad-CAM" and layer is None:
        raise ValueError("Grad-CAM needs layer=, a convolution such as model.conv2")
    if len(x) == 0 or len(x) != len(unit):
        raise ValueError(f"{len(x)} rows, {len(unit)} units: each row needs one")
    x, side = x.detach().clone().requires_grad_(), (1, SIDE, SIDE)
    more: dict[str, Any] = dict(additional_forward_args=(unit,))
    if method == "integrated gradients":
        more |= dict(baselines=baseline, n_steps=steps, internal_batch_size=batch)
        out = attr.IntegratedGradients(f).attribute(x, **more)
    elif method == "SmoothGrad":
        tunnel = attr.NoiseTunnel(attr.Saliency(f))
        more |= dict(nt_samples=samples, stdevs=noise, abs=False)
        more |= dict(nt_samples_batch_size=max(1, batch // len(x)))
        with torch.random.fork_rng(devices=[]):  # captum draws from the global state
            torch.manual_seed(seed)
            out = tunnel.attribute(x, **more).abs()
    elif method == "occlusion":
        image = attr.Occlusion(lambda x, unit: f(x.flatten(1), unit))
        more |= dict(sliding_window_shapes=(1, window, window), baselines=baseline)
        more |= dict(strides=(1, *[max(1, window // 2)] * 2))
        more |= dict(perturbations_per_eval=max(1, batch // len(x)))
        out = image.attribute(x.unflatten(1, side), **more).flatten(1)
    elif method == "Grad-CAM":
        out = attr.LayerGradCam(f, layer).attribute(x, **more, relu_attributions=True)
        out = attr.LayerAttribution.interpolate(out, (SIDE, SIDE), "bilinear")
        out = out.flatten(1)
    else:
        out = attr.Saliency(f).attribute(x, **more, abs=method == "|gradient|")
        out = out * (x - baseline) if method == "input × gradient" else out
    return out.detach()


def completeness_error(
    f: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "n pixels"],
    unit: Int64[Tensor, " n"],
    values: Float[Tensor, "n pixels"],
    baseline: float = 0.0,
) -> float:
    """Σ_rows |Σ_pixels values − (f(x) − f(x₀))| / Σ_rows |f(x) − f(x₀)|.

    0 when the attributions of every row add up to what they explain, which exact
    integrated gradients do.
    """
    with torch.no_grad():
        whole = (f(x, unit) - f(torch.full_like(x, baseline), unit)).double()
    error = (values.double().sum(1) - whole).abs().sum()
    return (error / whole.abs().sum()).item()


def randomised(f: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of f in which the numbers of every parameter stand in random places.

    Sizes and signs stay as they were; what was learned is gone. An attribution that
    looks the same for it does not show what was learned (Adebayo et al. 2018).
    """
    f, generator = copy.deepcopy(f), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in f.parameters():
            order = torch.randperm(p.numel(), generator=generator).to(p.device)
            p.copy_(p.flatten()[order].view_as(p))
    return f


def rank_correlation(
    a: Float[Tensor, "n pixels"],
    b: Float[Tensor, "n pixels"],
    where: Bool[Tensor, "n pixels"] | None = None,
) -> Float[Tensor, " n"]:
    """Spearman's ρ of |a| and |b|, for each row over its pixels in `where`.

    NaN for a row where either is constant.
    """
    from scipy.stats import rankdata

    where = torch.ones_like(a, dtype=torch.bool) if where is None else where
    out = torch.full((len(a),), torch.nan, dtype=torch.float64)
    for i, mask in enumerate(where):
        ranks = [torch.from_numpy(rankdata(v[i][mask].abs().cpu())) for v in (a, b)]
        u, v = (r - r.mean() for r in ranks)
        length = u.norm() * v.norm()
        if length > 0:
            out[i] = u @ v / length
    return out


def agreement(
    maps: Mapping[str, Float[Tensor, "n pixels"]],
    where: Bool[Tensor, "n pixels"] | None = None,
) -> "pd.DataFrame":
    """Mean `rank_correlation` of every two methods: a symmetric table."""
    import pandas as pd

    table = pd.DataFrame(1.0, list(maps), list(maps))
    for p, q in combinations(maps, 2):
        rho = rank_correlation(maps[p], maps[q], where).nanmean().item()
        table.loc[p, q] = table.loc[q, p] = rho
    return table


def constant_pixels(images: UInt8[Tensor, "n h w"]) -> Bool[Tensor, " pixels"]:
    """Which pixels have one value in all images: what is there is junk."""
    return (images == images[0]).flatten(1).all(0)


def share_on(
    values: Float[Tensor, "n pixels"],
    where: Bool[Tensor, " pixels"] | Bool[Tensor, "n pixels"],
) -> float:
    """Share of Σ|values| on the pixels in `where`, the mean over rows, in [0, 1]."""
    mass = values.abs().double()
    return ((mass * where).sum(1) / mass.sum(1)).nanmean().item()


def curve(
    f: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "n pixels"],
    unit: Int64[Tensor, " n"],
    values: Float[Tensor, "n pixels"],
    *,
    insert: bool = False,
    baseline: float = 0.0,
    steps: int = 28,
    seed: int = 0,
) -> Float[Tensor, " {steps}+1"]:
    """f while pixels go, largest `values` first, in equal steps down to none.

        c_s = Σ_rows (f(x without the first s) − f(x₀)) / Σ_rows (f(x) − f(x₀))

    `insert` puts them into a blank image instead, in the same order. A curve starts at
    1 and ends at 0 (inserting: 0 to 1); its mean, `area`, is about ½ in random order
    where f is linear. Pixels of equal value go in an order drawn from `seed`.
    Source: Samek et al. (2015); Petsiuk et al. (2018).

    Raises ValueError when the rows together do not raise f above a blank image.
    """
    n, d = x.shape
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.rand(n, d, generator=generator).argsort(1).to(x.device)
    order = values.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, shuffled.gather(1, order), torch.arange(d, device=x.device).expand(n, d)
    )
    blank = torch.full_like(x, baseline)
    sums = []
    with torch.no_grad():
        zero = f(blank, unit).double().sum()
        gain = f(x, unit).double().sum() - zero
        if not gain > 0:
            raise ValueError(
                f"these rows change f by {gain / n:.3g} on average against a blank "
                "image: choose rows that excite their units"
            )
        for count in torch.linspace(0, d, steps + 1).round():
            first = rank < count
            mixed = torch.where(first == insert, x, blank)
            sums.append(f(mixed, unit).double().sum() - zero)
    return (torch.stack(sums) / gain).float()


def area(curve: Float[Tensor, " points"]) -> float:
    """Mean height of a curve of equal steps (trapezoid rule)."""
    return torch.trapezoid(curve, dx=1 / (len(curve) - 1)).item()


class Sanity(NamedTuple):
    """What `sanity` found, for each method and the two controls."""

    table: "pd.DataFrame"
    """One row a method: name, and the scores that `sanity` describes."""
    maps: dict[str, Tensor]
    """Attributions (n, pixels)."""
    randomised: dict[str, Tensor]
    """The same of the model with randomised weights."""
    deletion: dict[str, Tensor]
    """Curves, as `curve` gives them."""
    insertion: dict[str, Tensor]


#: What knows nothing of the unit; in the tables beside the methods.
CONTROLS = ("ink × noise", "noise")


def sanity(
    f: nn.Module,
    x: Float[Tensor, "n pixels"],
    unit: Int64[Tensor, " n"],
    methods: Sequence[str],
    *,
    junk: Bool[Tensor, " pixels"],
    baseline: float = 0.0,
    seed: int = 0,
    layer: str | None = None,
    **options: Any,
) -> Sanity:
    """The methods, and two controls, on the same rows, in the same scores.

    Controls: |noise| drawn anew for each pixel, and that times the ink, which is a
    picture of the digit and of nothing else. Columns of the table:

        deletion    area under `curve`; small: what is deleted first matters
        insertion   the same from a blank image; large is good
        junk %      of the attribution on pixels that the data never use
        ink %       of the attribution on pixels with ink
        ρ random    `rank_correlation`, over ink, with the attributions that
                    `randomised` weights give; good when no larger than the controls'
        ρ random, all pixels   the same where paper counts, too
        incomplete %           `completeness_error`, of methods that should add up

    Args:
        junk: pixels that are constant in the data (`constant_pixels`).
        layer: name of the model's layer for Grad-CAM.
        options: for `attribute`.
    """
    import pandas as pd

    generator, shuffled = torch.Generator().manual_seed(seed), randomised(f, seed)
    noise = torch.randn(2, *x.shape, generator=generator).abs().to(x)
    ink = x != baseline
    maps, again, rows = {}, {}, []
    options |= dict(baseline=baseline, seed=seed)
    for g, out in ((f, maps), (shuffled, again)):
        at = None if layer is None else hook_point(g.model, layer)
        for method in methods:
            out[method] = attribute(g, x, unit, method, layer=at, **options)
    maps[CONTROLS[0]], again[CONTROLS[0]] = noise * (x - baseline).abs()
    maps[CONTROLS[1]], again[CONTROLS[1]] = noise.flip(0)
    curves = {
        insert: {
            name: curve(f, x, unit, v, insert=insert, baseline=baseline, seed=seed)
            for name, v in maps.items()
        }
        for insert in (False, True)
    }
    for name, values in maps.items():
        adds_up = name in ("input × gradient", "integrated gradients")
        pair = values, again[name]
        missing = completeness_error(f, x, unit, values, baseline)
        rows.append(
            {
                "name": name,
                "deletion": area(curves[False][name]),
                "insertion": area(curves[True][name]),
                "junk %": 100 * share_on(values, junk),
                "ink %": 100 * share_on(values, ink),
                "ρ random": rank_correlation(*pair, ink).nanmean().item(),
                "ρ random, all pixels": rank_correlation(*pair).nanmean().item(),
                "incomplete %": 100 * missing if adds_up else torch.nan,
            }
        )
    return Sanity(pd.DataFrame(rows), maps, again, curves[False], curves[True])


def failed_tests(
    table: "pd.DataFrame", *, slack: float = 0.1, most_junk: float = 1.0
) -> dict[str, list[str]]:
    """For each method in a table of `sanity`, the scores it fails by; none is good.

    Deleting must hurt more, and inserting help more, than with ink × noise; ρ with
    randomised weights may exceed that of ink × noise by `slack`; `most_junk` % may lie
    on junk. The limits are a convention: look at the numbers. Rows of one name (seeds)
    are averaged.
    """
    scores = table.groupby("name", sort=False).mean(numeric_only=True)
    null = scores.loc[CONTROLS[0]]
    failed = {
        "deletion": scores["deletion"] >= null["deletion"],
        "insertion": scores["insertion"] <= null["insertion"],
        "ρ random": scores["ρ random"] > null["ρ random"] + slack,
        "junk %": scores["junk %"] > most_junk,
    }
    methods = [name for name in scores.index if name not in CONTROLS]
    return {m: [test for test, bad in failed.items() if bad[m]] for m in methods}

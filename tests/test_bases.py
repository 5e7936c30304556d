"""Bases before an SAE: what each promises, and that folding changes nothing."""

import jaxtyping
import pytest
import torch

from saeutils import metrics
from saeutils.bases import KINDS, fit_basis, fold
from saeutils.training import TrainConfig, train


def correlated(n=800, d=6, rank=6, seed=0):
    """Rows with a mean, correlated dimensions, and `rank` directions that vary."""
    g = torch.Generator().manual_seed(seed)
    sources = torch.rand(n, rank, generator=g) ** 3  # far from Gaussian, for ICA
    return sources @ torch.randn(rank, d, generator=g) * 3 + torch.arange(d) * 10.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_basis_is_invertible_and_centred(kind):
    x = correlated()
    basis = fit_basis(x, kind)
    assert basis.name == kind
    y = basis(x)
    torch.testing.assert_close(basis.invert(y), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y.mean(0), torch.zeros(6), rtol=0, atol=1e-4)


def test_what_each_basis_does_to_the_covariance():
    x = correlated()
    centred = x.double() - x.double().mean(0)
    covariance = {k: fit_basis(x, k)(x).double().T.cov(correction=0) for k in KINDS}
    torch.testing.assert_close(covariance["identity"], centred.T @ centred / len(x))
    one = torch.ones(6).double()
    torch.testing.assert_close(covariance["standardised"].diag(), one)
    for kind in ("whitened", "ICA"):
        want = torch.eye(6).double()
        torch.testing.assert_close(covariance[kind], want, rtol=0, atol=1e-5)
    pca = covariance["PCA"]
    assert (pca - pca.diag().diag()).abs().max() < 1e-5 * pca.max()
    assert (pca.diag().diff() <= 0).all()
    turned = torch.linalg.eigvalsh(covariance["identity"]).flip(0)
    torch.testing.assert_close(pca.diag(), turned, rtol=1e-5, atol=1e-5)


def test_whitening_stays_as_near_to_the_rows_as_it_can():
    """ZCA is symmetric; any rotation of it, as ICA's, is further from x."""
    x = correlated()
    zca, ica = fit_basis(x, "whitened"), fit_basis(x, "ICA")
    torch.testing.assert_close(zca.forward, zca.forward.T)
    centred = x - x.mean(0)
    assert (zca(x) - centred).norm() < (ica(x) - centred).norm()


def test_ica_finds_the_sources():
    g = torch.Generator().manual_seed(3)
    sources = torch.rand(4000, 3, generator=g)
    x = sources @ torch.randn(3, 5, generator=g)
    basis = fit_basis(x, "ICA")
    assert basis.converged and basis.forward.shape == (5, 3)
    together = torch.cat([sources, basis(x)], 1).T.corrcoef()[:3, 3:].abs()
    assert (together.max(1).values > 0.98).all()


def test_ica_says_when_it_did_not_converge_and_repeats():
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    a, b = (fit_basis(x, "ICA", max_iter=1) for _ in range(2))
    assert not a.converged
    assert torch.equal(a.forward, b.forward)


@pytest.mark.parametrize("kind", ["PCA", "whitened", "ICA"])
def test_rows_in_a_plane_keep_its_directions_alone(kind):
    x = correlated(rank=3)
    basis = fit_basis(x, kind)
    assert basis.forward.shape[1] == (6 if kind == "whitened" else 3)
    torch.testing.assert_close(basis.invert(basis(x)), x, rtol=1e-4, atol=1e-3)
    fewer = fit_basis(x, kind, components=2)
    lost = (x - fewer.invert(fewer(x))).double().square().sum()
    variance = torch.linalg.eigvalsh(x.double().T.cov(correction=0))
    torch.testing.assert_close(lost, variance[:-2].sum() * len(x), rtol=1e-4, atol=0)


def test_a_constant_dimension_is_left_as_it_is():
    x = correlated()
    x[:, 2] = 7.0
    basis = fit_basis(x, "standardised")
    assert basis.forward[2, 2] == 1 and basis(x)[:, 2].abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        dict(architecture="topk", k=3),
        dict(architecture="batchtopk", k=3),
        dict(architecture="l1", l1_coefficient=0.1),
        dict(architecture="gated", l1_coefficient=0.1),
        dict(architecture="l1", l1_coefficient=0.1, pre_encoder_bias=False),
        dict(architecture="gated", l1_coefficient=0.1, pre_encoder_bias=False),
    ],
    ids=lambda o: o["architecture"] + ("" if o.get("pre_encoder_bias", True) else "-x"),
)
def test_folding_is_exact(kind, options):
    x = correlated(rank=4)
    basis = fit_basis(x, kind)
    config = TrainConfig(d_sae=16, steps=60, batch_size=64, lr=1e-2, **options)
    inner = train(basis(x), config, progress=False).sae
    if "r_mag" in inner.state_dict():
        inner.r_mag += 0.3  # else it would hardly have moved from 0
    inner, x = inner.double(), x.double()
    sae = fold(inner, basis)
    z = inner.encode(basis(x))
    assert z.dtype == torch.float64 and (z > 0).any()
    torch.testing.assert_close(sae.encode(x), z)
    torch.testing.assert_close(sae.decode(z), basis.invert(inner.decode(z)))


def test_folded_sae_is_scored_in_the_original_space():
    x = correlated()
    basis = fit_basis(x, "whitened")
    config = TrainConfig("topk", 16, 3, steps=60, batch_size=64, lr=1e-2)
    inner = train(basis(x), config, progress=False).sae
    card = metrics.scorecard(fold(inner, basis), x, eval_set="rows")
    x_hat = basis.invert(inner.decode(inner.encode(basis(x))))
    fvu = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert card.fvu == pytest.approx(fvu.item(), rel=1e-3)
    of_y = metrics.scorecard(inner, basis(x), eval_set="rows")
    assert card.l0 == of_y.l0 and abs(card.fvu - of_y.fvu) > 1e-3


@pytest.fixture
def unchecked():
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_what_is_refused(unchecked):
    x = correlated()
    with pytest.raises(ValueError, match="'wavelet' is none of identity, "):
        fit_basis(x, "wavelet")
    for n in (0, 7):
        with pytest.raises(ValueError, match=rf"1\.\.6 \(d_in\), got {n}"):
            fit_basis(x, "PCA", components=n)
    with pytest.raises(ValueError, match="never vary"):
        fit_basis(torch.ones(5, 3), "whitened")
    x[4, 1] = float("nan")
    with pytest.raises(ValueError, match="row 4 contains NaN"):
        fit_basis(x, "PCA")
    sae = train(
        torch.randn(64, 3), TrainConfig("topk", 4, 1, steps=1), progress=False
    ).sae
    with pytest.raises(ValueError, match="takes rows of 3 dimensions, the basis"):
        fold(sae, fit_basis(correlated(), "PCA"))

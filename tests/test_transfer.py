"""Moving an SAE to other rows: exact where it must be, best where it says so."""

import pytest
import torch

from saeutils import metrics
from saeutils.training import TrainConfig, train
from saeutils.transfer import moved, refit_decoder


def rows(n=600, shift=0.0, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    sources = torch.rand(n, 5, generator=g).pow(4)
    mix = torch.randn(5, 6, generator=torch.Generator().manual_seed(9))
    return shift + scale * (sources @ mix)


OPTIONS = [
    dict(architecture="batchtopk", k=2),
    dict(architecture="topk", k=2),
    dict(architecture="gated", l1_coefficient=0.1),
    dict(architecture="l1", l1_coefficient=0.1, pre_encoder_bias=False),
]


@pytest.fixture(scope="module", params=OPTIONS, ids=lambda o: o["architecture"])
def sae(request):
    config = TrainConfig(d_sae=12, steps=300, batch_size=64, lr=1e-2, **request.param)
    return train(rows(), config, progress=False).sae


def fvu(sae, x):
    return metrics.scorecard(sae, x, eval_set="rows").fvu


def test_a_shift_and_a_scale_are_undone_exactly(sae):
    x = rows()
    want = fvu(sae, x)
    for shift, scale in ((3.0, 1.0), (-2.0, 0.2), (1.0, 7.0)):
        other = rows(shift=shift, scale=scale)
        ready = moved(sae, x, other, rescale=True)
        assert fvu(ready, other) == pytest.approx(want, rel=5e-3)
        torch.testing.assert_close(
            ready.encode(other).norm(), sae.encode(x).norm(), rtol=1e-2, atol=0
        )
    shifted = rows(shift=3.0)
    assert fvu(moved(sae, x, shifted), shifted) == pytest.approx(want, rel=5e-3)
    assert fvu(sae, shifted) > 2 * want


def test_a_refitted_decoder_keeps_the_code_and_beats_any_other(sae):
    x = rows(shift=0.5, seed=1)
    fitted = refit_decoder(sae, x, ridge=1e-9)
    z = sae.encode(x)
    torch.testing.assert_close(fitted.encode(x), z, rtol=1e-3, atol=1e-3)
    best = fvu(fitted, x)
    assert best < fvu(sae, x)
    design = torch.cat([z, torch.ones(len(z), 1)], 1).double()
    residual = x - design @ torch.linalg.lstsq(design, x.double(), driver="gelsd")[0]
    exact = residual.square().sum() / (x - x.mean(0)).double().square().sum()
    assert best == pytest.approx(exact.item(), rel=1e-3)


def test_latents_that_never_fire_keep_their_rows(sae):
    x = rows(seed=2)[:20]
    z = sae.encode(x)
    silent = ~(z != 0).any(0)
    fitted = refit_decoder(sae, x)
    torch.testing.assert_close(fitted.W_dec[silent], sae.W_dec[silent])
    assert not torch.equal(fitted.W_dec, sae.W_dec)


def test_what_is_refused(sae):
    with pytest.raises(ValueError, match="never vary"):
        moved(sae, rows(), torch.ones(5, 6), rescale=True)
    with pytest.raises(ValueError, match="6 dimensions, given 4"):
        moved(sae, rows(), torch.randn(9, 4))
    with pytest.raises(ValueError, match="another hook point"):
        refit_decoder(sae, torch.randn(9, 4))

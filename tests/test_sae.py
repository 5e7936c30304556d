"""Export, save and load: what stock sae_lens reads is what was trained."""

import json

import pytest
import torch

from saeutils import sae as sae_format
from saeutils.objectives import Penalty, _dense_loss, dense_step
from saeutils.sae import (
    export,
    fold_decoder_norm,
    initial_params,
    unfold_gradients,
)

ARCHITECTURES = ["topk", "l1", "jumprelu", "gated"]


def trained_like(architecture: str) -> dict:
    generator = torch.Generator().manual_seed(0)
    params = initial_params(
        architecture, 40, torch.randn(12, generator=generator), threshold=0.7
    )
    return {
        n: p + 0.1 * torch.randn(p.shape, generator=generator)
        for n, p in params.items()
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pre_encoder_bias", [True, False])
def test_the_exported_sae_takes_raw_rows(architecture, pre_encoder_bias):
    params, scale = trained_like(architecture), 3.7
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    penalty = Penalty(
        architecture, k=5, coefficient=0.1, pre_encoder_bias=pre_encoder_bias
    )
    inner = _dense_loss(params, x * scale, penalty)
    sae = export(
        params, architecture, k=5, input_scale=scale, pre_encoder_bias=pre_encoder_bias
    )
    assert torch.allclose(sae.encode(x) * scale, inner.latents, atol=1e-5)
    assert torch.allclose(sae(x) * scale, inner.reconstruction, atol=1e-5)
    assert torch.equal(sae.W_dec, params["W_dec"])


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "batchtopk"])
def test_stock_sae_lens_opens_what_was_saved(architecture, tmp_path):
    from sae_lens import SAE

    sae = export(
        trained_like(architecture),
        architecture,
        k=5,
        threshold=0.9,
        metadata={"hook_name": "fc1"},
    )
    path = sae_format.save(sae, tmp_path / "deep" / "folder with space")
    stock = SAE.load_from_disk(str(path))
    x = torch.randn(30, 12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(stock.encode(x), sae.encode(x))
    assert torch.equal(stock(x), sae(x))
    assert stock.cfg.metadata.hook_name == "fc1"
    assert torch.equal(sae_format.load(path)(x), sae(x))
    assert {f.name for f in path.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    assert json.loads((path / "cfg.json").read_text())["d_sae"] == 40


def test_saving_never_overwrites_and_leaves_nothing_behind(tmp_path, monkeypatch):
    sae = export(trained_like("topk"), "topk", k=5)
    sae_format.save(sae, tmp_path / "a")
    with pytest.raises(FileExistsError, match="never overwritten"):
        sae_format.save(sae, tmp_path / "a")

    def full_disk(path):
        (path / "cfg.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sae, "save_model", full_disk)
    with pytest.raises(OSError, match="No space"):
        sae_format.save(sae, tmp_path / "b")
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


def test_loading_what_is_not_an_sae(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cfg\.json"):
        sae_format.load(tmp_path)


def test_start_values_do_not_depend_on_anything_but_the_seed():
    a = initial_params("topk", 30, torch.zeros(8), seed=5)
    b = initial_params("batchtopk", 30, torch.ones(8), seed=5, encoder_scale=0.5)
    assert torch.equal(a["W_dec"], b["W_dec"])
    assert torch.equal(a["W_enc_T"] * 0.5, b["W_enc_T"])
    assert torch.allclose(a["W_dec"].norm(dim=1), torch.ones(30))
    c = initial_params("topk", 30, torch.zeros(8), seed=6)
    assert float((a["W_dec"] * c["W_dec"]).sum(1).abs().max()) < 0.99
    rows = torch.randn(4, 8)
    d = initial_params("topk", 30, torch.zeros(8), seed=5, directions=rows)
    assert torch.allclose(d["W_dec"][:4], torch.nn.functional.normalize(rows, dim=1))


def test_an_encoder_that_is_not_tied_leaves_the_decoder_as_it_was():
    zeros = torch.zeros(64)
    tied = initial_params("topk", 200, zeros, seed=5, encoder_scale=0.5)
    own = initial_params("topk", 200, zeros, seed=5, encoder_scale=0.5, tied=False)
    assert torch.equal(tied["W_dec"], own["W_dec"])
    assert torch.allclose(own["W_enc_T"].norm(dim=1), torch.full((200,), 0.5))
    cosine = torch.cosine_similarity(own["W_enc_T"], own["W_dec"])
    assert abs(float(cosine.mean())) < 5 / (64 * 200) ** 0.5  # of random vectors
    assert float(cosine.std()) < 2 / 64**0.5


@pytest.mark.parametrize("architecture", ["l1", "gated"])
def test_folding_the_decoder_norm_changes_nothing_that_a_free_norm_has(architecture):
    params = {n: p.double() for n, p in trained_like(architecture).items()}
    params["W_dec"] *= torch.linspace(0.3, 2, 40).unsqueeze(1)
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(1)).double()
    penalty = Penalty(architecture, coefficient=0.3)
    folded = fold_decoder_norm(params)
    assert torch.allclose(folded["W_dec"].norm(dim=1), torch.ones(40).double())
    free, inner = dense_step(params, x, penalty), dense_step(folded, x, penalty)
    # a ReLU is homogeneous: the same function of x, so the same loss and gradients
    assert inner.loss == pytest.approx(free.loss)
    grads = inner.grads
    unfold_gradients(params, folded, grads)
    for name in params:
        assert torch.allclose(grads[name], free.grads[name], atol=1e-9), name

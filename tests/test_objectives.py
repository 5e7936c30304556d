"""Sparse gradients against autograd, and TopK with AuxK against stock sae_lens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saeutils import kernels, revival
from saeutils.kernels import Weights
from saeutils.objectives import Penalty, dense_step, sparse_step
from saeutils.sae import initial_params

SPARSE = ["topk", "batchtopk", "matryoshka", "l1", "jumprelu"]


def problem(architecture, seed, batch, d_in, d_sae, dtype=torch.float64, bias=0.0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    params = initial_params(
        architecture, d_sae, 0.1 * draw(d_in), seed=seed, threshold=0.6
    )
    params = {n: p + 0.1 * draw(*p.shape) for n, p in params.items()}
    params["b_enc"] += bias
    return params, 2 * draw(batch, d_in)


def relative(fast: torch.Tensor, slow: torch.Tensor) -> float:
    return float((fast - slow).norm() / slow.norm().clamp_min(1e-12))


@given(
    architecture=st.sampled_from(SPARSE),
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 30),
    d_in=st.integers(2, 16),
    d_sae=st.integers(6, 60),
    k=st.integers(1, 6),
    bias=st.sampled_from([0.0, -1.0, -100.0]),
    pre_encoder_bias=st.booleans(),
)
def test_sparse_gradients_equal_autograd(
    architecture, seed, batch, d_in, d_sae, k, bias, pre_encoder_bias
):
    params, x = problem(architecture, seed, batch, d_in, d_sae, bias=bias)
    penalty = Penalty(
        architecture,
        k=k,
        coefficient=0.3,
        widths=(2, 5, d_sae),
        bandwidth=0.4,
        pre_encoder_bias=pre_encoder_bias,
    )
    fast = sparse_step(params, x, penalty, guess=0.5)
    slow = dense_step(params, x, penalty)
    for name in params:
        assert relative(fast.grads[name], slow.grads[name]) < 1e-6, name
    assert fast.loss == pytest.approx(slow.loss, rel=1e-9)
    assert fast.mse == pytest.approx(slow.mse, rel=1e-9)
    assert torch.equal(fast.counts, slow.counts)
    assert torch.allclose(fast.error, slow.error)
    if bias == -100:  # nothing fires: only b_dec has a gradient
        assert int(fast.counts.sum()) == 0
        assert float(fast.grads["W_dec"].abs().max()) == 0


@pytest.mark.parametrize("architecture", SPARSE)
@pytest.mark.parametrize("reference", [False, True])
def test_float32_gradients_of_a_larger_batch(architecture, reference, monkeypatch):
    monkeypatch.setattr(kernels, "_REFERENCE", reference)
    params, x = problem(architecture, 0, 300, 24, 200, torch.float32)
    penalty = Penalty(architecture, 8, 0.3, (20, 77, 200), 0.4)
    fast = sparse_step(params, x, penalty, guess=1.0)
    exact = dense_step({n: p.double() for n, p in params.items()}, x.double(), penalty)
    for name in params:
        assert relative(fast.grads[name].double(), exact.grads[name]) < 1e-6, name


@given(seed=st.integers(0, 2**16), k=st.integers(1, 8))
def test_ties_give_the_gradients_of_the_latents_that_were_chosen(seed, k):
    params, x = problem("topk", seed, 6, 4, 12)
    half = slice(6, 12)  # every latent has a twin: each row is full of ties
    for name in ("W_enc_T", "b_enc"):
        params[name][half] = params[name][:6]
    codes = kernels.select_topk(
        kernels.encode_chunks(x - params["b_dec"], params["W_enc_T"], params["b_enc"]),
        k,
    )
    fast = sparse_step(params, x, Penalty("topk", k))
    mask = codes.dense(12) != 0
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    c = x - leaves["b_dec"]
    z = (c @ leaves["W_enc_T"].T + leaves["b_enc"]) * mask
    (x - z @ leaves["W_dec"] - leaves["b_dec"]).square().sum(1).mean().backward()
    for name, leaf in leaves.items():
        assert relative(fast.grads[name], leaf.grad) < 1e-6, name


def test_gated_has_no_gradient_into_the_gate_from_the_magnitudes():
    params, x = problem("gated", 0, 20, 6, 15)
    params |= {"r_mag": params["r_mag"] * 0, "b_mag": params["b_enc"].clone()}
    step = dense_step(params, x, Penalty("gated", coefficient=0.2))
    assert set(step.grads) == set(params)
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in step.grads.values())
    # without its own two terms the gate learns nothing: W_enc's gradient is the
    # magnitude path's alone, which moves b_mag and not b_gate
    active = (x - params["b_dec"]) @ params["W_enc_T"].T + params["b_enc"] > 0
    assert torch.equal(step.counts, active.sum(0))
    with pytest.raises(ValueError, match="no sparse step"):
        sparse_step(params, x, Penalty("gated", coefficient=0.2))


@pytest.mark.parametrize("n_dead", [3, 40])
def test_topk_with_auxk_equals_the_stock_sae_lens_training_step(n_dead):
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    params, x = problem("topk", 3, 32, 16, 80)
    stock = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=16,
            d_sae=80,
            k=6,
            dtype="float64",
            aux_loss_coefficient=0.7,
            rescale_acts_by_decoder_norm=False,
        )
    )
    stock.load_state_dict(
        {
            "W_enc": params["W_enc_T"].T.contiguous(),
            "b_enc": params["b_enc"],
            "W_dec": params["W_dec"],
            "b_dec": params["b_dec"],
        }
    )
    dead = torch.randperm(80, generator=torch.Generator().manual_seed(1))[:n_dead]
    mask = torch.zeros(80, dtype=torch.bool)
    mask[dead] = True
    output = stock.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients={},
            dead_neuron_mask=mask,
            n_training_steps=0,
            is_logging_step=False,
        )
    )
    output.loss.backward()
    ours = sparse_step(params, x, Penalty("topk", 6))
    grads = Weights(*(ours.grads[n] for n in Weights._fields))
    aux = revival.add_auxk(
        grads,
        params,
        dead,
        x - params["b_dec"],
        ours.error,
        k_aux=8,
        coefficient=0.7,
        batch=len(x),
    )
    assert ours.loss + aux == pytest.approx(float(output.loss.detach()), rel=1e-9)
    assert relative(grads.W_enc_T, stock.W_enc.grad.T) < 1e-6
    for name in ("b_enc", "W_dec", "b_dec"):
        assert relative(getattr(grads, name), getattr(stock, name).grad) < 1e-6, name


def test_ghost_gradients_reach_dead_latents_only():
    params, x = problem("l1", 0, 40, 8, 20)
    step = sparse_step(params, x, Penalty("l1", coefficient=0.1))
    grads = Weights(*(step.grads[n].clone() for n in Weights._fields))
    dead = torch.tensor([2, 5, 11])
    loss = revival.add_ghost(
        grads, params, dead, x - params["b_dec"], step.error, batch=len(x)
    )
    changed = (grads.W_dec - step.grads["W_dec"]).abs().sum(1) > 0
    assert changed.nonzero().squeeze(1).tolist() == dead.tolist()
    # rescaled to the size of the main loss
    assert loss == pytest.approx(step.mse, rel=1e-6)


def test_resampling_follows_the_recipe():
    params, x = problem("l1", 0, 30, 8, 20)
    moments = [{n: torch.ones_like(p) for n, p in params.items()} for _ in range(2)]
    before = {n: p.clone() for n, p in params.items()}
    dead = torch.tensor([4, 7])
    losses = torch.zeros(30, dtype=torch.float64)
    losses[[3, 9]] = 5.0  # the only rows that can be drawn
    generator = torch.Generator().manual_seed(0)
    revival.resample(params, moments, dead, x, losses, generator, length=0.3)
    directions = torch.nn.functional.normalize(x[[3, 9]], dim=1)
    unit = torch.nn.functional.normalize(params["W_dec"][dead], dim=1)
    cosine = unit @ directions.T
    assert torch.allclose(cosine.max(1).values, torch.ones(2, dtype=torch.float64))
    alive = torch.ones(20, dtype=torch.bool)
    alive[dead] = False
    length = 0.3 * before["W_enc_T"][alive].norm(dim=1).mean()
    assert torch.allclose(params["W_enc_T"][dead].norm(dim=1), length)
    assert params["b_enc"][dead].tolist() == [0, 0]
    for moment in moments:
        assert float(moment["W_dec"][dead].abs().max()) == 0
        assert float(moment["W_dec"][alive].min()) == 1
    assert torch.equal(params["W_dec"][alive], before["W_dec"][alive])

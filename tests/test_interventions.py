"""Edits of hook points: exact where they must be, refused where they make no sense."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_story_models import make_tokenizer
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from saeutils import baselines, patching
from saeutils import interventions as iv
from saeutils.models import MLP
from saeutils.sae import export, initial_params
from saeutils.splicing import edited
from saeutils.story_models import continued, generate, story_model

D, LATENTS, CONTEXT = 24, 60, 32


def make_sae(architecture, d=D, seed=0, **options):
    """A stock sae_lens SAE with random weights that reconstructs badly, on purpose."""
    torch.manual_seed(seed)
    params = initial_params(architecture, LATENTS, torch.randn(d), seed=seed)
    params["b_enc"] = 0.3 * torch.randn(LATENTS)
    return export(params, architecture, **options).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["topk", "l1", "batchtopk", "dictionary"])
def sae(request):
    if request.param == "dictionary":
        return baselines.untrained(torch.randn(400, D), LATENTS, 6)
    options = {"topk": dict(k=6), "l1": {}, "batchtopk": dict(threshold=0.8)}
    return make_sae(request.param, **options[request.param])


@pytest.fixture(scope="module")
def neo(tmp_path_factory):
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=300,
        hidden_size=D,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        intermediate_size=48,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    folder = tmp_path_factory.mktemp("neo")
    GPTNeoForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(str(folder))
    return story_model(folder)


@pytest.fixture(scope="module")
def mlp():
    torch.manual_seed(0)
    return MLP((D, 12)).eval()


def acts(*shape, seed=0):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed)) * 2


HOOKS = ["blocks.0.hook_mlp_out", "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]
IDS = torch.randint(1, 300, (5, 9), generator=torch.Generator().manual_seed(3))
OTHER = torch.randint(1, 300, (5, 9), generator=torch.Generator().manual_seed(4))


# --- known answers --------------------------------------------------------


def test_ablating_what_does_not_fire_changes_nothing(sae):
    x = acts(7, 5)
    z = sae.encode(x.flatten(0, 1))
    silent = (z == 0).all(0).nonzero().flatten().tolist()
    if not silent:  # a dense SAE: one row and the latents silent there
        x = x[:1, :1]
        silent = (z[0] == 0).nonzero().flatten().tolist()
    assert silent
    assert torch.equal(iv.ablate(sae, silent)(x), x)


def test_clamping_to_its_own_code_is_the_identity(sae):
    x = acts(1, 1)
    z = sae.encode(x.flatten(0, 1))[0]
    own = {j: z[j].item() for j in range(LATENTS)}
    assert (iv.clamp(sae, own)(x) - x).abs().max() < 1e-6
    assert (iv.scale(sae, dict.fromkeys(range(LATENTS), 1))(x) - x).abs().max() < 1e-6


def test_the_error_of_the_sae_is_kept(sae):
    """x' − decode(z') = x − decode(z), though the reconstruction is poor."""
    x = acts(3, 4)
    rows = x.flatten(0, 1)
    z = sae.encode(rows)
    error = rows - sae.decode(z)
    assert error.norm() > 0.1 * rows.norm()
    j = int((z > 0).sum(0).argmax())
    new = z.clone()
    new[:, j] = 0
    changed = iv.ablate(sae, [j])(x).flatten(0, 1)
    assert torch.allclose(changed - sae.decode(new), error, atol=1e-4)
    assert not torch.equal(changed, rows)


def test_ablating_takes_away_what_the_latent_wrote(sae):
    x = acts(6)
    z = sae.encode(x)
    j = int(z.sum(0).argmax())
    expected = x - z[:, j : j + 1] * sae.W_dec[j]
    assert torch.allclose(iv.ablate(sae, [j])(x), expected, atol=1e-5)
    assert torch.allclose(iv.scale(sae, {j: 0})(x), expected, atol=1e-5)
    doubled = x + z[:, j : j + 1] * sae.W_dec[j]
    assert torch.allclose(iv.scale(sae, {j: 2})(x), doubled, atol=1e-5)


@given(
    st.dictionaries(
        st.integers(0, LATENTS - 1), st.floats(-9, 9, width=32), min_size=1, max_size=4
    )
)
def test_steering_adds_exactly_the_directions(strengths):
    sae, x = make_sae("topk", k=6), acts(4, 3)
    step = sum(s * sae.W_dec[j] for j, s in strengths.items())
    assert torch.allclose(iv.steer(sae, strengths)(x), x + step, atol=1e-5)


@given(st.lists(st.integers(0, LATENTS - 1), min_size=1, max_size=5, unique=True))
def test_ablating_is_clamping_to_nothing_and_stays(latents):
    sae, x = make_sae("l1"), acts(4, 3, seed=2)
    out = iv.ablate(sae, latents)(x)
    assert torch.equal(out, iv.clamp(sae, dict.fromkeys(latents, 0))(x))
    one_by_one = x
    old = sae.encode(x)
    for j in latents:  # linear in the codes as long as they are those of x
        one_by_one = one_by_one - old[..., j : j + 1] * sae.W_dec[j]
    assert torch.allclose(out, one_by_one, atol=1e-4)


def test_push_adds_a_length_whatever_the_direction():
    x, direction = acts(4, 3), torch.randn(D)
    step = iv.push(100 * direction, 2.5)(x) - x
    assert torch.allclose(step.norm(dim=-1), torch.tensor(2.5), atol=1e-4)
    assert torch.allclose(step, iv.push(direction, 2.5)(x) - x, atol=1e-5)


# --- positions ------------------------------------------------------------


@given(
    st.one_of(
        st.integers(-6, 5),
        st.lists(st.integers(-6, 5), min_size=1, max_size=4),
        st.tuples(st.integers(-7, 7), st.integers(-7, 7)).map(lambda p: slice(*p)),
    )
)
def test_only_the_positions_meant_are_touched(positions):
    x, direction = acts(3, 6), torch.ones(D)
    moved = (iv.add(direction, positions=positions)(x) != x).all(-1)
    assert torch.equal(moved, (iv.add(direction)(x) != x).all(-1) & moved)
    where = torch.zeros(6, dtype=torch.bool)
    where[positions] = True
    assert torch.equal(moved, where.expand(3, 6))


def test_a_mask_chooses_rows_of_texts_and_of_images():
    for shape in ((3, 6), (4,)):
        x = acts(*shape)
        mask = torch.rand(*shape) > 0.5
        mask.view(-1)[0] = True
        moved = iv.add(torch.ones(D), positions=mask)(x) != x
        assert torch.equal(moved.all(-1), mask) and torch.equal(moved.any(-1), mask)


def test_bad_positions_are_refused():
    edit = iv.add(torch.ones(D), positions=[2, 9])
    with pytest.raises(ValueError, match=r"\[9\] of a text of 6"):
        edit(acts(3, 6))
    with pytest.raises(ValueError, match="choose rows by a mask"):
        edit(acts(3))
    mask = torch.ones(3, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"bool of shape \(3, 6\)"):
        iv.add(torch.ones(D), positions=mask)(acts(3, 6))


# --- patching -------------------------------------------------------------


@pytest.mark.parametrize("hook", HOOKS)
def test_replacing_everything_gives_the_other_prompts_output(neo, hook):
    source = iv.recorded(neo, OTHER, [hook])[hook]
    theirs = iv.recorded(neo, OTHER, ["blocks.0.hook_resid_pre"])
    rest = {h: iv.replace(v) for h, v in theirs.items()}
    out = iv.run(neo, IDS, rest | {hook: iv.replace(source)})
    assert torch.allclose(out, iv.run(neo, OTHER), atol=1e-4)
    alone = iv.run(neo, IDS, {hook: iv.replace(source)})
    assert not torch.allclose(alone, iv.run(neo, IDS), atol=1e-2)


def test_the_last_hook_alone_decides_the_output(neo):
    hook = "blocks.1.hook_resid_post"
    source = iv.recorded(neo, OTHER, [hook])[hook]
    out = iv.run(neo, IDS, {hook: iv.replace(source)})
    assert torch.allclose(out, iv.run(neo, OTHER), atol=1e-5)
    every = iv.replace(source, range(D))
    assert torch.allclose(iv.run(neo, IDS, {hook: every}), out, atol=1e-6)
    last = iv.run(neo, IDS, {hook: iv.replace(source, positions=-1)})
    assert torch.allclose(last[:, -1], out[:, -1], atol=1e-5)
    assert torch.allclose(last[:, :-1], iv.run(neo, IDS)[:, :-1], atol=1e-5)


def test_patching_all_latents_leaves_only_the_own_error(sae):
    x, source = acts(3, 4), acts(3, 4, seed=1)
    out = iv.patch(sae, source)(x)
    own_error = x - sae.decode(sae.encode(x.flatten(0, 1))).view_as(x)
    theirs = sae.decode(sae.encode(source.flatten(0, 1))).view_as(x)
    assert torch.allclose(out, own_error + theirs, atol=1e-4)
    assert torch.equal(iv.patch(sae, x)(x), x)  # from itself


def test_patching_some_latents_and_positions(sae):
    x, source, j = acts(2, 5), acts(2, 5, seed=1), 7
    out = iv.patch(sae, source, [j], positions=slice(3, None))(x)
    z, other = (sae.encode(a.flatten(0, 1)).view(2, 5, -1) for a in (x, source))
    expected = x.clone()
    change = (other - z)[:, 3:, j : j + 1] * sae.W_dec[j]
    expected[:, 3:] += change
    assert torch.allclose(out, expected, atol=1e-4)


def test_one_source_serves_a_whole_batch(sae):
    x, source = acts(4, 5), acts(1, 5, seed=1)
    wide = iv.patch(sae, source.expand(4, 5, D))(x)
    assert torch.equal(iv.patch(sae, source)(x), wide)
    assert torch.equal(iv.replace(source)(x), source.expand(4, 5, D))


def test_prompts_of_another_length_are_refused_before_the_model_runs(neo, sae):
    hook, calls = HOOKS[0], []
    source = iv.recorded(neo, OTHER, [hook])[hook]
    counter = neo.original_model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        for edit in (iv.replace(source), iv.patch(sae, source)):
            with pytest.raises(ValueError, match="as many tokens long"):
                iv.run(neo, IDS[:, :-1], {hook: edit})
        with pytest.raises(ValueError, match=r"blocks\.0\.hook_mlp_out"):
            iv.run(neo, IDS, {HOOKS[1]: iv.ablate(sae, [0]), "blocks.9": lambda a: a})
    finally:
        counter.remove()
    assert not calls


# --- models ---------------------------------------------------------------


@pytest.mark.parametrize("hook", HOOKS)
def test_an_edit_of_a_transformer_is_the_model_with_that_added(neo, hook):
    """Steering at a hook = adding to the stream there, by hand, for every hook."""
    sae = make_sae("topk", k=6)
    strengths = {3: 2.0, 11: -1.5}
    step = 2 * sae.W_dec[3] - 1.5 * sae.W_dec[11]
    with torch.no_grad(), edited(neo, hook, lambda a: a + step):
        expected = neo(IDS)
    out = iv.run(neo, IDS, {hook: iv.steer(sae, strengths)})
    assert torch.allclose(out, expected, atol=1e-4)
    assert not torch.allclose(out, iv.run(neo, IDS), atol=1e-2)
    # nothing stays behind
    assert torch.equal(iv.run(neo, IDS), iv.run(neo, IDS, {}))


def test_several_hooks_and_several_edits_at_once(neo):
    a, b = torch.randn(2, D)
    one, two = HOOKS[0], HOOKS[2]
    both = iv.run(neo, IDS, {one: [iv.add(a), iv.add(b)], two: iv.add(a, 2)})
    summed = iv.run(neo, IDS, {one: iv.add(a + b), two: iv.add(2 * a)})
    assert torch.allclose(both, summed, atol=1e-4)


def test_generation_with_edits_is_the_same_with_and_without_kept_keys(neo):
    sae = make_sae("batchtopk", threshold=0.8)
    for edit in (iv.steer(sae, {5: 8.0}), iv.ablate(sae, [1, 2])):
        assert edit.pointwise
        fast = continued(neo, IDS, 12, edits={HOOKS[0]: edit})
        slow = continued(neo, IDS, 12, edits={HOOKS[0]: lambda a, e=edit: e(a)})
        assert torch.equal(fast, slow)
    tail = iv.add(50 * torch.randn(D), positions=slice(9, None))
    assert not tail.pointwise
    late = continued(neo, IDS, 6, temperature=0, edits={HOOKS[0]: tail})
    plain = continued(neo, IDS, 6, temperature=0)
    assert torch.equal(late[:, :10], plain[:, :10])  # drawn before it touches anything
    assert not torch.equal(late, plain)


def test_several_prompts_at_once_are_those_one_by_one(neo):
    prompts = ["Tom went", "The dog was sad", "Tom"]
    together = generate(neo, prompts, n=2, length=8, temperature=0)
    alone = [t for p in prompts for t in generate(neo, p, n=2, length=8, temperature=0)]
    assert together == alone


@pytest.mark.parametrize("hook", ["fc1", "fc1.linear"])
def test_it_works_on_the_mnist_mlp(mlp, hook):
    sae, pixels = make_sae("topk", k=6), torch.rand(10, 784)
    source = iv.recorded(mlp, pixels.flip(0), [hook])[hook]
    out = iv.run(mlp, pixels, {hook: iv.replace(source)})
    assert torch.allclose(out, iv.run(mlp, pixels.flip(0)), atol=1e-6)
    x = iv.recorded(mlp, pixels, [hook])[hook]
    j = int(sae.encode(x).sum(0).argmax())
    after = x - sae.encode(x)[:, j : j + 1] * sae.W_dec[j]
    if hook == "fc1":
        with torch.no_grad():
            expected = mlp.head(mlp.fc2(after))
        out = iv.run(mlp, pixels, {hook: iv.ablate(sae, [j])})
        assert torch.allclose(out, expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"rows of shape \(4,\)"):
        iv.run(mlp, pixels, {hook: iv.replace(source[:4])})


def test_what_is_recorded_is_after_the_edits(mlp):
    pixels = torch.rand(4, 784)
    plain = iv.recorded(mlp, pixels, ["fc1", "fc2"])
    moved = iv.recorded(mlp, pixels, ["fc1"], {"fc1": iv.add(torch.ones(D))})["fc1"]
    assert torch.allclose(moved, plain["fc1"] + 1) and plain["fc2"].shape == (4, 12)


def test_gradients_flow_through_an_edit(sae):
    x = acts(2, 3).requires_grad_()
    iv.add(torch.ones(D), positions=0)(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


# --- what is refused ------------------------------------------------------


def test_latents_that_are_not_there_are_refused(sae):
    x = acts(2, 3)
    wrong = (
        lambda: iv.steer(sae, {LATENTS: 1.0}),
        lambda: iv.clamp(sae, {-1: 1.0}),
        lambda: iv.ablate(sae, [0, 99]),
        lambda: iv.scale(sae, {LATENTS: 1.0}),
        lambda: iv.patch(sae, x, [LATENTS]),
    )
    for make in wrong:
        with pytest.raises(ValueError, match=f"only 0 to {LATENTS - 1}"):
            make()
    with pytest.raises(ValueError, match=r"units \[30\]: there are only 0 to 23"):
        iv.replace(x, [30])


def test_values_that_are_no_numbers_are_refused(sae):
    for value in (float("nan"), float("inf")):
        for make in (iv.steer, iv.clamp, iv.scale):
            with pytest.raises(ValueError, match="NaN or Inf"):
                make(sae, {0: value})
        with pytest.raises(ValueError, match="NaN or Inf"):
            iv.add(torch.ones(D), value)
    with pytest.raises(ValueError, match="points nowhere"):
        iv.push(torch.zeros(D), 1.0)


def test_an_edit_at_another_width_is_refused(mlp, sae):
    for edit in (iv.ablate(sae, [0]), iv.add(torch.ones(D))):
        with pytest.raises(ValueError, match=f"last axis of d_in = {D}"):
            iv.run(mlp, torch.rand(2, 784), {"fc2": edit})
    with pytest.raises(ValueError, match="12 numbers a row"):
        iv.patch(sae, torch.rand(2, 12))
    with pytest.raises(ValueError, match="did you mean"):
        iv.run(mlp, torch.rand(2, 784), {"fc11": iv.ablate(sae, [0])})


# --- units of strength ----------------------------------------------------


def test_units_of_strength_by_hand(sae):
    rows = acts(500)
    assert iv.mean_norm(rows) == pytest.approx(rows.norm(dim=1).mean().item())
    expected = sae.encode(rows).amax(0).clamp(min=0)
    assert torch.allclose(iv.largest_codes(sae, rows), expected, atol=1e-5)


# --- patching between prompts ---------------------------------------------


def score(logits):
    return logits[:, 5] - logits[:, 9]


def test_everything_carries_all_and_nothing_carries_none(neo):
    pairs = patching.Pairs(IDS, OTHER, [])
    hook = "blocks.1.hook_resid_post"
    source = iv.recorded(neo, IDS, [hook])[hook]
    found = patching.carried(
        neo,
        pairs,
        score,
        [{}, {hook: iv.replace(source)}, {hook: iv.replace(source, [])}],
    )
    assert found.share == pytest.approx([0, 1, 0], abs=1e-4)
    a, b = (score(iv.run(neo, ids)[:, -1]).mean().item() for ids in (IDS, OTHER))
    assert found.difference == pytest.approx(a - b, abs=1e-4)
    with pytest.raises(ValueError, match="nothing to carry"):
        patching.carried(neo, patching.Pairs(IDS, IDS, []), score, [{}])


def test_the_gradient_is_that_of_finite_differences(neo):
    hook = HOOKS[0]
    acts, slope = patching.gradient(neo, hook, IDS, score)
    assert torch.allclose(acts, iv.recorded(neo, IDS, [hook])[hook])
    step = torch.randn(D, generator=torch.Generator().manual_seed(1))
    up, down = (
        score(iv.run(neo, IDS, {hook: iv.add(step, s, positions=4)})[:, -1]).sum()
        for s in (1e-2, -1e-2)
    )
    expected = ((up - down) / 2e-2).item()
    assert (slope[:, 4] @ step).sum().item() == pytest.approx(expected, rel=0.02)
    assert slope.abs().max() > 0
    with pytest.raises(ValueError, match="no hook point"):
        patching.gradient(neo, "blocks.7.hook_mlp_out", IDS, score)


def test_units_are_ranked_by_what_patching_them_does(neo):
    """At the last hook, with the norm taken out, first order is nearly all there is."""
    sae, hook = make_sae("l1"), "blocks.1.hook_resid_post"
    pairs = patching.Pairs(IDS, OTHER, [])
    order, differ = patching.by_effect(neo, hook, pairs, score, sae)
    assert sorted(order) == list(range(LATENTS)) and set(differ) <= set(order)
    source = iv.recorded(neo, IDS, [hook])[hook]
    ends = [{hook: iv.patch(sae, source, some)} for some in (order[:8], order[-8:])]
    best, worst = patching.carried(neo, pairs, score, ends).share
    assert best > worst
    unit, _ = patching.by_effect(neo, hook, pairs, score)
    assert sorted(unit) == list(range(D))


def test_matched_prompts_have_as_many_tokens():
    tokenizer = make_tokenizer()
    pairs = patching.matched_prompts(
        tokenizer, "{} was sad.", ["Tom", "Anna", "Constantinople"], ["Lily", "Ben"]
    )
    assert pairs.a.shape == pairs.b.shape and len(pairs.a) == len(pairs.words)
    for row, (word, _) in zip(pairs.a, pairs.words, strict=True):
        assert tokenizer.decode(row[1:]).strip() == f"{word} was sad."
    with pytest.raises(ValueError, match=r"no \{\}"):
        patching.matched_prompts(tokenizer, "was sad", ["a"], ["b"])
    with pytest.raises(ValueError, match="as many tokens"):
        patching.matched_prompts(tokenizer, "{}.", ["Tom" * 9], ["a"])


def test_what_sets_of_units_carry_grows_to_the_whole(neo):
    sae, hook, neurons = (
        make_sae("l1"),
        "blocks.1.hook_mlp_out",
        "blocks.1.mlp.hook_post",
    )
    pairs = patching.Pairs(IDS, OTHER, [])
    kinds = {"latents": (hook, sae), "neurons": (neurons, None)}
    found = patching.by_size(neo, pairs, score, kinds, [1, 4, 60], runs=2)
    share = found.frame.groupby(["name", "x"])["y"].mean()
    limits = found.limits
    assert share["best latents", 60] == pytest.approx(limits["all latents"], abs=1e-3)
    assert share["best neurons", 60] == pytest.approx(limits[f"whole {hook}"], abs=1e-3)
    assert limits[f"whole {neurons}"] == pytest.approx(
        limits[f"whole {hook}"], abs=1e-3
    )
    assert set(found.frame["name"]) == {
        f"{a} {b}" for a in ("best", "random") for b in kinds
    }
    assert found.n == 3
    again = patching.by_size(neo, pairs, score, kinds, [1, 4, 60], runs=2)
    assert again.frame.equals(found.frame)
    with pytest.raises(ValueError, match="one to choose"):
        patching.by_size(neo, patching.Pairs(IDS[:1], OTHER[:1], []), score, kinds, [1])

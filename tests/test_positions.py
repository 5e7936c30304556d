"""Which positions become rows: text without padding, CLS, patches, masks; resumed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from saeutils.activations import save_activations
from saeutils.store import ActivationStore
from saeutils.store_writer import StoreWriter


class Tokens(nn.Module):
    """Tokens (n, T) -> embeddings (n, T, 3), heads (n, T, 2, 3), a mean (n, 3)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(60, 3)
        self.heads = nn.Unflatten(-1, (2, 3))
        self.wide = nn.Linear(3, 6)
        self.mean = Mean()

    def forward(self, tokens):
        x = self.embed(tokens)
        self.heads(self.wide(x))
        return self.mean(x)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def save(model, inputs, hooks, path, **options):
    return save_activations(model, inputs, hooks, path, progress=False, **options)


def brute_force(model, x, mask):
    """Rows and records of the embedding, one position after another."""
    rows, records = [], []
    for i in range(len(x)):
        for p in range(x.shape[1]):
            if mask[i, p]:
                rows.append(model.embed(x[i, p]).detach())
                records.append((i, p, int(x[i, p])))
    return torch.stack(rows), records


@given(data=st.data())
def test_masks_equal_brute_force_at_any_size_and_resume(tmp_path_factory, data):
    n, length = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 6))
    batch = data.draw(st.integers(1, 15))
    dice = np.random.default_rng(data.draw(st.integers(0, 99)))
    mask = dice.random((n, length)) < data.draw(st.sampled_from([0.1, 0.5, 0.9]))
    mask[dice.integers(n), dice.integers(length)] = True
    x = torch.from_numpy(dice.integers(0, 60, (n, length)))
    model, path = Tokens(), tmp_path_factory.mktemp("mask")
    options = {"positions": mask, "batch_size": batch, "shard_bytes": 8 * 12}
    options["layout"] = {"heads": "batch position head d"}
    # Two stores, interrupted at different rows.
    for hook in ("embed", "heads"):
        dies_at = data.draw(st.integers(0, n * length))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StoreWriter, "append", dying(dies_at, StoreWriter.append))
            try:
                save(model, x, hook, path, **options)
            except KeyboardInterrupt:
                assert not ActivationStore.open(path / hook, partial=True).manifest[
                    "complete"
                ]
    stores = save(model, x, ["embed", "heads", "mean"], path, **options)
    rows, records = brute_force(model, x, mask)
    embed = stores["embed"]
    embed.verify()
    assert torch.equal(embed[:], rows)
    columns = embed.provenance[["id", "position", "token"]]
    assert [tuple(map(int, r)) for r in columns.to_numpy()] == records
    heads = stores["heads"]
    torch.testing.assert_close(heads[:], model.wide(rows).detach().reshape(-1, 3))
    assert heads.provenance["head"].tolist() == [0, 1] * len(rows)
    assert heads.provenance["id"].tolist() == [i for i, *_ in records for _ in "01"]
    assert len(stores["mean"]) == n  # has no positions to leave out


def dying(at, append):
    def wrapped(self, rows, provenance=None):
        if self.rows_done + self._shard_rows + len(rows) > at:
            raise KeyboardInterrupt
        append(self, rows, provenance)

    return wrapped


X = torch.arange(24).reshape(4, 6)


@pytest.mark.parametrize(
    ("positions", "kept"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        ("all", [0, 1, 2, 3, 4, 5]),
        ("first", [0]),
        ("not first", [1, 2, 3, 4, 5]),
        (slice(4, None), [4, 5]),
        ([5, 0], [0, 5]),
        ([-1], [5]),
    ],
)
def test_choices_of_positions(tmp_path, positions, kept):
    store = save(Tokens(), X, "embed", tmp_path, positions=positions)["embed"]
    assert store.provenance["position"].tolist() == kept * 4
    assert store.provenance["token"].tolist() == X[:, kept].flatten().tolist()


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ("cls", "'cls': expected 'all'"),
        ([6], r"\[6\] of 6"),
        ([], "no position"),
        (np.ones((4, 5), bool), r"\(4, 5\).*4 inputs × 6 positions"),
        (np.ones((4, 6)), "float64: expected one truth value"),
        (np.zeros((4, 6), bool), "no position"),
    ],
)
def test_wrong_choices_of_positions(tmp_path, positions, message):
    with pytest.raises(ValueError, match=message):
        save(Tokens(), X, "embed", tmp_path, positions=positions)
    with pytest.raises(ValueError, match="no output has positions"):
        save(Tokens(), X, "mean", tmp_path, positions="first")
    assert not list(tmp_path.iterdir())


def test_another_choice_of_positions_is_another_store(tmp_path):
    save(Tokens(), X, "embed", tmp_path, positions=[0, 1])
    with pytest.raises(ValueError, match="something else: the settings changed"):
        save(Tokens(), X, "embed", tmp_path, positions=[0, 2])


def test_padding_and_bos_make_no_rows_unless_asked(tmp_path):
    model = Tokens()
    model.config = type("Config", (), {"bos_token_id": 0, "pad_token_id": 7})()
    store = save(model, X, "embed", tmp_path / "a")["embed"]
    assert store.provenance["token"].tolist() == [
        i for i in range(24) if i not in (0, 7)
    ]
    assert len(save(model, X, "embed", tmp_path / "b", positions="all")["embed"]) == 24


def test_tokens_on_disk_as_small_integers(tmp_path):
    np.save(tmp_path / "tokens.npy", X.numpy().astype(np.uint16))
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    store = save(Tokens(), mapped, "embed", tmp_path / "s")["embed"]
    assert store.provenance["token"].tolist() == list(range(24))


# Real libraries, small random models ---------------------------------------------


def test_transformer_lens(tmp_path):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=6, d_head=8, n_heads=2, d_mlp=8, act_fn="gelu",
        d_vocab=24, device="cpu", seed=0,
    )  # fmt: skip
    model = HookedTransformer(config)
    names = ["blocks.0.hook_resid_post", "blocks.1.mlp.hook_post"]
    z = "blocks.1.attn.hook_z"
    stores = save(
        model,
        X,
        [*names, z],
        tmp_path,
        batch_size=3,
        positions="not first",
        layout={z: "batch position (head d)"},
    )
    _, cache = model.run_with_cache(X)
    for name in names:
        wanted = cache[name][:, 1:].flatten(0, 1)
        torch.testing.assert_close(stores[name][:], wanted)
    wanted = cache[z][:, 1:].flatten(2).flatten(0, 1)
    torch.testing.assert_close(stores[z][:], wanted)
    with pytest.raises(ValueError, match=r"did you mean 'blocks\.0\.hook_resid_post'"):
        save(model, X, "blocks.0.hook_resid_pots", tmp_path)


def test_transformers_text_with_attention_mask(tmp_path):
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, bos_token_id=6, pad_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaModel(config)
    attention = torch.ones_like(X)
    attention[2, 4:] = 0
    batch = {"input_ids": X, "attention_mask": attention}
    hooks = ["layers.0", "layers.1.mlp"]
    stores = save(model, batch, hooks, tmp_path, batch_size=4)
    kept = attention.bool() & (X != 6)
    assert len(stores["layers.0"]) == kept.sum() == 21
    model.eval()
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    torch.testing.assert_close(stores["layers.0"][:], states[1][kept])
    assert stores["layers.1.mlp"].provenance["token"].tolist() == X[kept].tolist()


def test_transformers_vision_patches_know_their_place(tmp_path):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=8, image_size=12, patch_size=4, num_channels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ViTModel(config)
    pixels = torch.randn(5, 1, 12, 12)
    inputs = {"pixel_values": pixels}
    store = save(model, inputs, "layers.1", tmp_path / "all", batch_size=2)["layers.1"]
    records = store.provenance
    assert records["position"].tolist() == list(range(10)) * 5
    assert records["row"].tolist() == [-1, 0, 0, 0, 1, 1, 1, 2, 2, 2] * 5
    assert records["column"].tolist() == [-1, 0, 1, 2, 0, 1, 2, 0, 1, 2] * 5
    first = save(model, inputs, "layers.1", tmp_path / "cls", positions="first")
    cls = records.query("position == 0").index.to_numpy()
    torch.testing.assert_close(first["layers.1"][:], store.gather(cls))
    # The patch embedding has no CLS: its layout is that of a convolution.
    layout = {"embeddings.patch_embeddings.projection": "batch d row column"}
    hook = next(iter(layout))
    store = save(model, inputs, hook, tmp_path / "conv", layout=layout)[hook]
    assert len(store) == 45 and [*store.provenance] == ["id", "row", "column"]

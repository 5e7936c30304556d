"""Story models from folders in the hub's layout, made here with random weights."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from saeutils import language
from saeutils import story_models as sm
from saeutils.activations import save_activations
from saeutils.datasets import data_folder
from saeutils.metrics import scorecard
from saeutils.models import evaluate, story_model
from saeutils.splicing import edited, in_model
from saeutils.stories import StoryData, stories, tokens
from saeutils.training import TrainConfig, train

END = "<|endoftext|>"
WINDOW, CONTEXT = 8, 64
DATA = stories("train", "grammar", n=24)


def make_tokenizer(vocabulary=300):
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    own.train_from_iterator(DATA.texts, trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END)
    return PreTrainedTokenizerFast(tokenizer_object=own, **special)


def neo(kinds):
    torch.manual_seed(0)
    return GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=300,
            hidden_size=32,
            num_layers=len(kinds),
            num_heads=4,
            attention_types=[[[kind], 1] for kind in kinds],
            window_size=WINDOW,
            intermediate_size=64,
            max_position_embeddings=CONTEXT,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def llama():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=3, intermediate_size=48)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            initializer_range=0.3,
            tie_word_embeddings=True,
            **sizes,
        )
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {"1L": neo(["global"]), "2L": neo(["global", "local"]), "llama": llama()}
    root = tmp_path_factory.mktemp("models")
    for name, model in made.items():
        model.save_pretrained(root / name)
        make_tokenizer().save_pretrained(str(root / name))
    return root


@pytest.fixture(scope="module")
def two(folders):
    return story_model(folders / "2L")


@pytest.fixture(scope="module")
def pair(two):
    return language.next_tokens(two, tokens(DATA, two.tokenizer, CONTEXT))


@pytest.mark.parametrize("name", ["1L", "2L", "llama"])
def test_logits_are_those_of_transformers(folders, name):
    model = story_model(str(folders / name))
    kind = LlamaForCausalLM if name == "llama" else GPTNeoForCausalLM
    reference = kind.from_pretrained(folders / name, attn_implementation="eager")
    ids = torch.from_numpy(tokens(DATA, model.tokenizer, CONTEXT).ids)
    with torch.no_grad():
        ours, theirs = model(ids), reference.eval()(ids).logits
    assert theirs.std() > 0.5  # the comparison is of something
    assert (ours - theirs).abs().max() < 1e-5 * max(1, theirs.abs().max().item())
    coded = model.tokenizer.encode(DATA[0], add_special_tokens=False)
    assert model.tokenizer.decode(coded) == DATA[0]
    assert not model.training


def test_hook_points_have_the_names_of_transformer_lens(two):
    for layer in (0, 1):
        for name in ("hook_resid_pre", "hook_resid_mid", "hook_mlp_out"):
            assert f"blocks.{layer}.{name}" in two.hook_dict
    wrong = edited(two, "blocks.7.hook_mlp_out", torch.zeros_like)
    with (
        pytest.raises(ValueError, match=r"did you mean.*blocks\.1\.hook_mlp_out"),
        wrong,
    ):
        pass


def test_one_folder_after_another_works_from_anywhere(folders, monkeypatch):
    monkeypatch.chdir(folders)
    assert story_model("1L").cfg.n_layers == 1
    assert story_model("./2L").cfg.n_layers == 2


def test_labels_are_the_next_tokens_up_to_the_end_of_the_story(two):
    text = ["Tom sat.", "She saw a cat and " * 40]
    coded = tokens(StoryData(text, np.arange(2), "train", "own"), two.tokenizer, 32)
    ids, labels = language.next_tokens(two, coded)
    n = len(two.tokenizer.encode(text[0], add_special_tokens=False))
    assert labels[0, :n].tolist() == ids[0, 1 : n + 1].tolist()
    assert labels[0, n] == 0  # the story ends
    assert (labels[0, n + 1 :] == language.IGNORED).all()
    assert labels[1].tolist() == [*ids[1, 1:].tolist(), language.IGNORED]


def test_packed_rows_ask_for_every_token_but_after_the_last(two):
    coded = tokens(DATA, two.tokenizer, 32, packed=True)
    ids, labels = language.next_tokens(two, coded)
    assert torch.equal(labels[:, :-1], ids[:, 1:])
    assert (labels[:, -1] == language.IGNORED).all()


def test_loss_is_the_mean_over_what_is_asked_for(two, pair):
    by_token = language.loss_by_token(two, pair, batch_size=7)
    ids, labels = pair
    with torch.no_grad():
        p = two(ids).double().softmax(-1)
    for row, place in ((0, 0), (3, 17)):
        expected = -math.log(p[row, place, labels[row, place]])
        assert by_token[row, place].item() == pytest.approx(expected, abs=1e-4)
    asked = labels != language.IGNORED
    assert torch.equal(by_token.isnan(), ~asked)
    found = evaluate(two, pair, batch_size=5 * CONTEXT)
    assert found.cross_entropy == pytest.approx(by_token[asked].mean().item(), rel=1e-5)
    right = (p.argmax(-1) == labels)[asked].double().mean().item()
    assert found.accuracy == pytest.approx(right)


def test_loss_by_position_by_hand():
    nats = torch.tensor(
        [[1.0, 2.0, 3.0, torch.nan, torch.nan], [3.0, 4.0, 5.0, 8.0, 1]]
    )
    starts, means = language.by_position(nats)
    assert starts.tolist() == [1, 2, 4, 5]
    assert means.tolist() == [2.0, pytest.approx(3.5), 8.0, 1.0]
    empty = torch.full((2, 4), torch.nan)
    empty[:, 0] = 1.0
    assert language.by_position(empty)[0].tolist() == [1]


def test_ablations_against_the_model_with_the_weights_taken_out(folders, two, pair):
    hook = "blocks.1.hook_mlp_out"
    table = language.ablations(two, pair, [hook, "blocks.0.hook_attn_out"]).set_index(
        "hook"
    )
    without = GPTNeoForCausalLM.from_pretrained(folders / "2L").eval()
    torch.nn.init.zeros_(without.transformer.h[1].mlp.c_proj.weight)
    bias = without.transformer.h[1].mlp.c_proj.bias.data
    _, cache = two.run_with_cache(pair[0], names_filter=[hook])
    values = {"zero": torch.zeros(32), "mean": cache[hook].flatten(0, 1).mean(0)}
    for name, value in values.items():
        bias.copy_(value)
        with torch.no_grad():
            logits = without(pair[0]).logits
        expected = F.cross_entropy(logits.mT, pair[1]).item()
        assert table[name][hook] == pytest.approx(expected, abs=1e-4)
        assert table[f"Δ {name}"][hook] == pytest.approx(
            expected - evaluate(two, pair).cross_entropy, abs=1e-4
        )
    assert table["uniform"].iloc[0] == pytest.approx(math.log(300))
    # nothing stays behind
    assert evaluate(two, pair).cross_entropy == pytest.approx(table.clean[hook])


def test_attention_shows_the_window_of_the_local_layer(two, pair):
    globally, locally = language.attention(two, pair[0][:4], [0, 1])
    assert locally.reach == WINDOW - 1 and globally.reach == CONTEXT - 1
    for layer in (globally, locally):
        assert torch.allclose(layer.pattern.sum(-1), torch.ones(4, CONTEXT), atol=1e-5)
        assert layer.pattern.triu(1).abs().max() == 0
        assert (layer.distance < layer.reach).all()
    with pytest.raises(ValueError, match="no hook point"):
        language.attention(two, pair[0], [5])


def test_the_logit_lens_ends_at_the_loss_of_the_model(two, pair):
    lens = language.logit_lens(two, pair, batch_size=9)
    assert list(lens.index) == [
        "embedding",
        "attention 0",
        "MLP 0",
        "attention 1",
        "MLP 1",
    ]
    assert lens.iloc[-1] == pytest.approx(evaluate(two, pair).cross_entropy, rel=1e-5)
    assert lens.nunique() == 5


def test_generated_stories(two):
    drawn = sm.generate(two, "Tom", n=3, length=10, seed=1)
    assert drawn == sm.generate(two, "Tom", n=3, length=10, seed=1)
    assert drawn != sm.generate(two, "Tom", n=3, length=10, seed=2)
    assert len(set(drawn)) == 3 and all(text.startswith("Tom") for text in drawn)
    greedy = sm.generate(two, "Tom", n=2, length=10, temperature=0)
    assert greedy[0] == greedy[1]
    edit = {"blocks.1.hook_resid_post": torch.zeros_like}
    assert sm.generate(two, "Tom", n=1, length=10, temperature=0, edits=edit) != [
        greedy[0]
    ]
    with pytest.raises(ValueError, match=f"the model sees {CONTEXT}"):
        sm.generate(two, "Tom", length=CONTEXT)


def test_the_whole_pipeline_runs_on_a_local_folder(two, tmp_path, pair):
    """Activations with provenance, an SAE on them, and its scorecard in the model."""
    coded = tokens(DATA, two.tokenizer, CONTEXT)
    hook = "blocks.1.hook_mlp_out"
    store = save_activations(
        two, coded.ids, hook, tmp_path, provenance={"id": coded.documents}, batch_size=5
    )[hook]
    kept = coded.ids != 0  # neither BOS nor padding
    assert len(store) == kept.sum() and store.d_in == 32
    records = store.provenance
    records = records if hasattr(records, "columns") else store.records(0, len(store))
    assert records["token"].tolist() == coded.ids[kept].tolist()
    assert records["id"].tolist() == np.repeat(coded.documents, kept.sum(1)).tolist()
    with torch.no_grad():
        _, cache = two.run_with_cache(pair[0], names_filter=[hook])
    assert torch.allclose(
        store.gather(range(len(store))), cache[hook][torch.from_numpy(kept)], atol=1e-5
    )
    config = TrainConfig("topk", 64, 8, steps=20, batch_size=64)
    result = train(store, config, progress=False)
    card = scorecard(result.sae, store, eval_set="own", model=two, data=pair)
    assert 0 < card.fvu < 1.5
    same = in_model(two, hook, lambda rows: rows, pair)
    assert same.spliced == pytest.approx(same.clean)
    table = language.ablations(two, pair, [hook]).iloc[0]
    assert same.zero_ablated.cross_entropy == pytest.approx(table["zero"])
    assert same.mean_ablated.cross_entropy == pytest.approx(table["mean"])


def test_without_a_hub_the_error_names_the_embedded_models():
    for name in ("roneneldan/TinyStories-1M", "tiny-stories-1L-21M"):
        with pytest.raises(
            ConnectionError, match=r"roneneldan/Tiny.*story-1L or story-2L"
        ):
            story_model(name)


def test_bad_folders_are_refused_in_words(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="story-1L or story-2L"):
        story_model(tmp_path / "absent")
    shutil.copytree(folders / "1L", tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer\.json.*save_pretrained"):
        story_model(tmp_path / "bare")
    shutil.copytree(folders / "1L", tmp_path / "other")
    make_tokenizer(400).save_pretrained(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="belongs to another model"):
        story_model(tmp_path / "other")
    shutil.copytree(folders / "1L", tmp_path / "damaged")
    config = json.loads((tmp_path / "damaged" / "config.json").read_text())
    config["model_type"] = "no-such-type"
    (tmp_path / "damaged" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="cannot be loaded as a model"):
        story_model(tmp_path / "damaged")


def test_tokens_of_another_model_are_refused(two):
    with pytest.raises(ValueError, match="tokenizer of another model"):
        sm.check_tokens(two, torch.tensor([[0, 300]]))
    with pytest.raises(ValueError, match=f"the model sees {CONTEXT}"):
        sm.check_tokens(two, torch.zeros(1, CONTEXT + 1, dtype=torch.int64))


def test_forced_choice_by_hand(two):
    words = ("was", "to")
    texts = ["He was sad. She went to bed. It was so.", "She was here."]
    coded = tokens(StoryData(texts, np.arange(2), "train", "own"), two.tokenizer, 32)
    pair = language.next_tokens(two, coded)
    with torch.no_grad():
        logits = two(pair[0])
    a, b = (two.tokenizer.encode(f" {w}", add_special_tokens=False) for w in words)
    assert len(a) == len(b) == 1
    right = 0
    for row, place in (pair[1] == a[0]).nonzero().tolist():
        right += bool(logits[row, place, a[0]] > logits[row, place, b[0]])
    for row, place in (pair[1] == b[0]).nonzero().tolist():
        right += bool(logits[row, place, b[0]] >= logits[row, place, a[0]])
    assert language.forced_choices(two, pair, [words]) == [(words, right / 4, 3 / 4, 4)]
    with pytest.raises(ValueError, match="'octopus' is not a single token"):
        language.forced_choices(two, pair, [("was", "octopus")])
    with pytest.raises(ValueError, match="occurs in the text"):
        language.forced_choices(two, (pair[0], pair[1] * 0 + 5), [words])


def test_the_bigram_model_is_a_distribution_and_knows_what_it_saw():
    row = torch.tensor([[0, 5, 6, 5, 7, 0, 5, 6]])
    labels = torch.cat([row[:, 1:], torch.tensor([[language.IGNORED]])], 1)
    model = language.Bigram((row, labels), 10)
    for a in (5, 9):  # seen, and never seen
        pairs = [(torch.tensor([[a]]), torch.tensor([[b]])) for b in range(10)]
        total = sum(math.exp(-model.loss(pair)) for pair in pairs)
        assert total == pytest.approx(1)
    q = model.below
    expected = (2 - 0.75 + 0.75 * 2 * q[6]) / 3  # 6 and 7 follow 5, three times
    found = model.loss((torch.tensor([[5]]), torch.tensor([[6]])))
    assert found == pytest.approx(-math.log(expected))


@pytest.mark.parametrize("name", sm.EMBEDDED)
def test_the_embedded_models_tell_stories(name):
    """Small enough to carry, and as good as their cards say, on new stories."""
    folder = data_folder() / name
    assert (folder / "model.safetensors").stat().st_size <= 6_000_000
    model = story_model(name)
    assert model.cfg.d_vocab <= 4096 and model.cfg.n_layers == int(name[-2])
    data = stories("test", n=12)
    coded = tokens(data, model.tokenizer, model.cfg.n_ctx)
    loss = evaluate(model, language.next_tokens(model, coded)).cross_entropy
    scores = json.loads((folder / "scores.json").read_text())
    assert loss == pytest.approx(scores[name]["sampled"]["per token"], rel=0.15)
    for corpus in ("sampled", "grammar"):
        two, one, null = (
            scores[n][corpus]["per token"] for n in ("story-2L", "story-1L", "bigram")
        )
        assert two < one < null
    assert "Once upon a time" in sm.generate(model, "Once upon", n=1, length=3)[0]

"""What atoms respond to: planted answers, and the streamed sums against the same by plain NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from pellucid.data import IGNORED, Tokens
from pellucid.errors import ConfigError, DataError
from pellucid.measure import run_with_cache
from pellucid.measure.atoms import AFTER, BEFORE, DIFFERENT, NO_WORD, pushed_words, read_atoms
from pellucid.models import create_model
from pellucid.models.language import LanguageModel, TextEmbedding
from pellucid.steps import ISTA, MLP, Layer, OvercompleteISTA, SoftISTA


def text(ids, skipped=0, length=None):
    """As the loader gives it: the next word is the target, of the first ``skipped`` none counts."""
    targets = ids[:, 1:].clone()
    targets[:, :skipped] = IGNORED
    real = torch.ones_like(targets, dtype=torch.bool)
    if length is not None:
        real[-1, length:] = False
        targets[-1, length:] = IGNORED
    return Tokens(ids[:, :-1], targets, real, torch.ones(len(ids)))


def planted(words=6, context=12, step=None):
    """A model whose token is the word itself, a dimension each, and one that says where places are odd."""
    embed = TextEmbedding(words, context, words + 1)
    with torch.no_grad():
        embed.words.weight.copy_(torch.eye(words, words + 1))
        embed.places.weight.zero_()[1::2, words] = 1.0
    step = ISTA(words + 1, step_size=0.0) if step is None else step
    return LanguageModel(embed, [Layer({"sparsify": step})], nn.Identity(), causal=True).eval()


def draw(rows, length, words, seed=0):
    return torch.randint(words, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_an_atom_that_is_a_word_is_found_out():
    ids = draw(40, 13, 6)
    (found,) = read_atoms(planted(), [text(ids)])
    assert (found.layer, found.step, found.kind, found.positions) == (1, "sparsify", "atoms", 480)
    for word in range(6):
        told = found.describe(word)
        share = (ids[:, :-1] == word).double().mean().item()
        assert told["fires"] == pytest.approx(share) == pytest.approx(told["common"])
        assert (told["score"], told["told_by"]) == (pytest.approx(1, abs=1e-5), "word")
        assert (told["word"], told["purity"], told["mean"]) == (word, 1.0, 1.0)
        assert len(told["contexts"]) == 10
        assert all(c["words"][c["at"]] == word and c["value"] == 1 for c in told["contexts"])
        assert len({c["window"] for c in told["contexts"]}) == 10
    # The last one fires at odd places, which no list of words can say.
    assert found.fires[6] == 0.5
    assert abs(found.score[6]) < 0.15
    assert set(found.ranked()[:6]) == set(range(6))
    assert found.summary() | {"score": 0, "quartiles": 0, "fires": 0} == {
        "layer": 1, "step": "sparsify", "kind": "atoms", "count": 7, "dead": 0, "positions": 480,
        "fires": 0, "score": 0, "quartiles": 0, "clear": 6 / 7,
    }  # fmt: skip
    assert found.summary()["fires"] == pytest.approx(1.5 / 7)


def test_an_atom_that_knows_what_comes_next_is_found_out():
    ids = draw(60, 13, 5)
    ids[:, 2::2] = 5  # behind every odd place stands one word, and only there
    told = read_atoms(planted(), [text(ids)])[0].describe(6)
    assert (told["told_by"], told["word"], told["purity"]) == ("next", 5, 1.0)
    assert told["score"] == pytest.approx(1, abs=1e-5)
    assert told["common"] == pytest.approx(5 / 12)


def test_a_dead_atom_has_no_score_and_no_contexts():
    model = planted()
    with torch.no_grad():
        model.embed.words.weight[2, 2] = -1.0
    (found,) = read_atoms(model, [text(draw(20, 13, 6))])
    told = found.describe(2)
    assert (told["fires"], told["score"], told["contexts"], told["word"]) == (0, None, [], None)
    assert found.summary()["dead"] == 1
    assert 2 not in found.ranked()


def test_a_code_of_either_sign_counts_by_its_size():
    step = SoftISTA(7, step_size=0.0)
    model = planted(step=step)
    with torch.no_grad():
        model.embed.words.weight[2, 2] = -3.0
    told = read_atoms(model, [text(draw(20, 13, 6))])[0].describe(2)
    assert (told["mean"], told["score"], told["word"]) == (3.0, pytest.approx(1, abs=1e-5), 2)


def by_hand(model, batches, layer):
    """Fires, strongest values and score of every atom by plain loops over the texts."""
    responses, words, nexts, halves, strongest = [], [], [], [], []
    number = 0
    for batch in batches:
        _, cache = run_with_cache(model, batch)
        for row in range(len(batch.ids)):
            counts = batch.targets[row] >= 0
            own = cache[f"blocks.{layer - 1}.mlp.hook_post"][row][counts].double().numpy()
            responses.append(own)
            strongest.append(own.max(0))
            words.append(batch.ids[row][counts].numpy())
            nexts.append(batch.targets[row][counts].numpy())
            halves.append(np.full(len(own), number % 2))
            number += 1
    a, half = np.concatenate(responses), np.concatenate(halves)
    top = -np.sort(-np.clip(np.stack(strongest), 0, None), 0)[:10]
    scores = np.empty((2, a.shape[1]))
    for by, seen in enumerate((np.concatenate(words), np.concatenate(nexts))):
        for unit in range(a.shape[1]):
            both = []
            for made in (0, 1):
                known = {w: a[(half == made) & (seen == w), unit].mean() for w in set(seen[half == made])}
                mean = a[half == made, unit].mean()
                told = [known.get(w, mean) for w in seen[half != made]]
                both.append(np.corrcoef(told, a[half != made, unit])[0, 1])
            scores[by, unit] = np.mean(both)
    return (a > 0).mean(0), top, scores


@pytest.mark.parametrize("name", ["crate_gpt_bytes", "crate_overcomplete_gpt_bytes", "gpt2_bytes"])
def test_the_streamed_sums_are_those_of_plain_loops(name):
    torch.manual_seed(1)
    model = create_model(name, depth=2, embed_dim=16, num_heads=2, vocab_size=12, context=20).eval()
    with torch.no_grad():
        model.embed.words.weight.mul_(40)
    ids = draw(30, 21, 12)
    batches = [text(ids[:8]), text(ids[8:19], skipped=5, length=14), text(ids[19:])]
    found = read_atoms(model, batches, layers=[2])
    assert [(part.layer, part.kind) for part in found] == [(2, "units" if name == "gpt2_bytes" else "atoms")]
    fires, top, scores = by_hand(model, batches, 2)
    np.testing.assert_allclose(found[0].fires, fires, atol=1e-12)
    np.testing.assert_allclose(found[0].values, top, rtol=1e-4, atol=1e-5)
    alive = np.isfinite(scores).all(0)
    assert alive.sum() >= 8
    np.testing.assert_allclose(found[0].score[alive], scores.max(0)[alive], atol=1e-4)
    apart = alive & (abs(scores[0] - scores[1]) > 1e-3)
    np.testing.assert_array_equal(found[0].told_by[apart], scores.argmax(0)[apart])
    # However the text is cut into batches; and every context is of a place with just that response.
    (again,) = read_atoms(model, [text(ids[:3]), text(ids[3:8]), *batches[1:]], layers=[2])
    torch.testing.assert_close(again.values, found[0].values)
    torch.testing.assert_close(again.score, found[0].score, equal_nan=True, rtol=1e-3, atol=1e-4)
    hold_contexts(model, found[0], batches)


def hold_contexts(model, found, batches):
    rows = {}
    for batch in batches:
        _, cache = run_with_cache(model, batch)
        for row, responses in enumerate(cache["blocks.1.mlp.hook_post"]):
            rows[len(rows)] = (batch.ids[row][batch.real[row]].tolist(), responses)
    shown = [(k, unit) for k in range(10) for unit in range(len(found)) if found.windows[k, unit] >= 0]
    assert len(shown) > 50
    for k, unit in shown:
        ids, responses = rows[int(found.windows[k, unit])]
        place = (responses[: len(ids), unit] - found.values[k, unit]).abs().argmin().item()
        assert responses[place, unit] == pytest.approx(found.values[k, unit].item(), abs=1e-5)
        around = [NO_WORD] * BEFORE + ids + [NO_WORD] * AFTER
        assert found.contexts[k, unit].tolist() == around[place : place + BEFORE + 1 + AFTER]


def test_a_context_is_what_stood_around():
    ids = torch.arange(80)[None].repeat(2, 1) % 70
    embed_at = 40
    model = planted(words=70, context=79)
    (found,) = read_atoms(model, [text(ids)])
    words = found.contexts[0, embed_at].tolist()
    assert words == list(range(embed_at - BEFORE, embed_at + AFTER + 1))
    early = found.contexts[0, 3].tolist()
    assert early[: BEFORE - 3] == [NO_WORD] * (BEFORE - 3)
    assert early[BEFORE - 3 :] == list(range(3 + AFTER + 1))


def test_rare_words_share_a_class_and_take_no_room():
    words = DIFFERENT + 40
    model = planted(words=words, context=120)
    first = torch.arange(words + 37).remainder(words)[: 9 * 120].reshape(9, 120)
    ids = torch.cat([first, first])
    (found,) = read_atoms(model, [Tokens(ids, ids, torch.ones_like(ids, dtype=torch.bool), torch.ones(18))])
    assert found.score[:DIFFERENT].min() > 0.99
    late = found.score[DIFFERENT + 16 : words]
    assert late.isfinite().all()
    assert late.max() < 0.5
    assert found.common[words - 1] > 0


@pytest.mark.parametrize("name", ["crate_bert_bytes", "bert_bytes"])
def test_a_masked_model_counts_all_that_is_no_padding(name):
    model = create_model(name, depth=1, embed_dim=16, num_heads=2).eval()
    ids = draw(4, 11, 256)
    batch = text(ids, length=4)
    (found,) = read_atoms(model, [batch])
    assert found.positions == 34
    _, cache = run_with_cache(model, batch)
    responses = cache["blocks.0.mlp.hook_post"][batch.real]
    np.testing.assert_allclose(found.fires, (responses > 0).double().mean(0))
    with pytest.raises(ConfigError, match="behind one layer more"):
        pushed_words(model, 1, "sparsify", [0])


def test_pushed_words_are_those_whose_scores_rise():
    """Adding the atom to a token raises its words above the mean, and lowers the others below."""
    torch.manual_seed(0)
    for step in (
        ISTA(16),
        OvercompleteISTA(16, 40),
        OvercompleteISTA(16, 40, decoupled=False),
        MLP(16, layer_scale=0.5),
    ):
        embed = TextEmbedding(30, 8, 16)
        model = LanguageModel(embed, [Layer({"sparsify": step})], nn.LayerNorm(16), causal=True).eval()
        nn.init.uniform_(model.norm.weight, 0.5, 1.5)
        m = step.fc1.out_features if isinstance(step, MLP) else step.dictionary.shape[1]
        code = torch.zeros(1, 1, m)
        code[..., 5] = 1.0
        with torch.no_grad():
            if isinstance(step, ISTA):
                spoken = code
            elif isinstance(step, MLP):
                spoken = 0.5 * torch.nn.functional.linear(code, step.fc2.weight)
            else:
                spoken = step.decode(code)
            scores = model.forward_head(model.norm(1000 * spoken))[0, 0]
            scores = scores - scores.mean()
        (told,) = pushed_words(model, 1, "sparsify", [5], count=3)
        for side, order in (("for", scores.argsort(descending=True)), ("against", scores.argsort())):
            assert [word for word, _ in told[side]] == order[:3].tolist()
            for word, score in told[side]:
                assert score == pytest.approx(scores[word].item(), rel=1e-3)


def test_what_cannot_be_read_is_refused():
    model = planted()
    with pytest.raises(DataError, match="one window of text - give at least two"):
        read_atoms(model, [text(draw(1, 13, 6))])
    with pytest.raises(ConfigError, match=r"no atoms and no hidden units in layers \[4\] - .* layers 1 to 1"):
        read_atoms(model, [text(draw(4, 13, 6))], layers=[4])
    with pytest.raises(ConfigError, match="top is 0"):
        read_atoms(model, [text(draw(4, 13, 6))], top=0)
    aot = create_model("crate_aot_gpt_bytes", depth=1).eval()
    with pytest.raises(ConfigError, match="no atoms and no hidden units - "):
        read_atoms(aot, [text(draw(4, 13, 6))])
    with pytest.raises(ConfigError, match="MSSA has no atoms"):
        pushed_words(aot, 1, "compress", [0])


def test_limit_and_progress():
    seen = []
    batches = [text(draw(6, 13, 6, seed)) for seed in range(3)]
    (found,) = read_atoms(planted(), batches, limit=9, top=3, progress=seen.append)
    assert seen == [6, 3]
    assert found.positions == 9 * 12
    assert found.values.shape == (3, 7)

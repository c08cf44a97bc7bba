"""Scores of text against cross-entropy by hand, and intervals against draws whose truth is known."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from pellucid.data import IGNORED, Tokens
from pellucid.errors import ConfigError, DataError, NumericsError
from pellucid.measure import language, score_text
from pellucid.measure.language import difference, nats_alone, tell
from pellucid.models import create_model


def made(name="crate_gpt_bytes", **options):
    torch.manual_seed(3)
    model = create_model(name, depth=1, embed_dim=16, num_heads=2, vocab_size=30, context=24, **options)
    with torch.no_grad():
        model.embed.words.weight.mul_(30)
    return model.eval()


def batch(rows=6, length=20, seed=0, hidden=0.3):
    """Rows that are padded here and there, with some targets that do not count."""
    draws = torch.Generator().manual_seed(seed)
    ids = torch.randint(30, (rows, length), generator=draws)
    targets = torch.randint(30, (rows, length), generator=draws)
    lengths = torch.randint(length // 2, length + 1, (rows,), generator=draws)
    lengths[0] = length
    real = torch.arange(length) < lengths[:, None]
    left_out = torch.rand(rows, length, generator=draws) < hidden
    return Tokens(ids, targets.masked_fill(left_out | ~real, IGNORED), real, torch.ones(rows))


def by_hand(model, text):
    with torch.no_grad():
        scores = model(text.ids, text.real)
    nats = F.cross_entropy(scores.mT, text.targets, ignore_index=IGNORED, reduction="none").double()
    return nats, (scores.argmax(-1) == text.targets) & (text.targets >= 0)


@pytest.mark.parametrize("name", ["crate_gpt_bytes", "tost_gpt_bytes", "gpt2_bytes", "crate_bert_bytes"])
def test_scores_are_cross_entropy(name, monkeypatch):
    model, texts = made(name), [batch(), batch(4, 24, seed=1)]
    monkeypatch.setattr(language, "SCORES_AT_ONCE", 30 * 7)  # seven words at a time
    result = score_text(model, [(text, None, torch.arange(len(text.ids))) for text in texts], text_bytes=1000)
    found = [by_hand(model, text) for text in texts]
    words = sum(int((text.targets >= 0).sum()) for text in texts)
    nats = sum(float(each.sum()) for each, _ in found) / words
    assert result.words == words
    assert result.nats == pytest.approx(nats, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats), rel=1e-5)
    assert result.accuracy == pytest.approx(sum(int(right.sum()) for _, right in found) / words)
    assert result.windows == 10
    if name == "crate_bert_bytes":
        assert (result.task, result.bits_per_byte, result.bytes) == ("masked", None, None)
    else:
        assert (result.task, result.bytes) == ("next", pytest.approx(1000))
        assert result.bits_per_byte == pytest.approx(nats * words / math.log(2) / 1000, rel=1e-5)
    # By position: the ranges have no gap, and their words and nats are all there are.
    ranges = [(part["first"], part["last"]) for part in result.by_position]
    assert ranges == [(1, 1), (2, 2), (3, 3), (4, 5), (6, 8), (9, 12), (13, 18), (19, 24)]
    assert sum(part["words"] for part in result.by_position) == words
    first = sum(float(each[:, 3:5].sum()) for each, _ in found)
    assert result.by_position[3]["nats"] * result.by_position[3]["words"] == pytest.approx(first, rel=1e-5)


def test_padding_changes_nothing():
    model = made("crate_bert_bytes")
    text = batch(2, 10)
    wide = Tokens(
        F.pad(text.ids, (0, 9), value=7), F.pad(text.targets, (0, 9), value=IGNORED),
        F.pad(text.real, (0, 9)), text.scale,
    )  # fmt: skip
    assert score_text(model, [wide]).nats == pytest.approx(score_text(model, [text]).nats, rel=1e-5)


def test_what_is_told_of_each_word():
    model, text = made(), batch()
    told = tell(model, text, likeliest=4)
    nats, right = by_hand(model, text)
    torch.testing.assert_close(told.nats.double(), nats, rtol=1e-5, atol=1e-5)
    assert torch.equal(told.rank[text.targets >= 0] == 0, right[text.targets >= 0])
    with torch.no_grad():
        chances = model(text.ids, text.real).softmax(-1)
    best = chances.topk(4, -1)
    counted = text.targets >= 0
    assert torch.equal(told.likeliest[counted], best.indices[counted])
    torch.testing.assert_close(told.chances[counted], best.values[counted])
    assert not told.chances[~counted].any()


def test_bytes_are_those_of_the_words_of_each_document():
    model, text = made(), batch(6, 20)
    each = torch.arange(30).float()
    documents = torch.tensor([0, 0, 0, 1, 1, 1])
    result = score_text(model, [(text, None, torch.arange(6))], word_bytes=each, documents=documents)
    counted = text.targets >= 0
    total = float((each[text.targets.clamp_min(0)] * counted).sum())
    assert (result.documents, result.windows, result.bytes) == (2, 6, total)
    nats, _ = by_hand(model, text)
    assert result.bits_per_byte == pytest.approx(float(nats.sum()) / math.log(2) / total, rel=1e-5)
    # A tokenizer may lose bytes that no word stands for: the total is then what is said.
    again = score_text(model, [(text, None, torch.arange(6))], word_bytes=each, text_bytes=2 * total)
    assert again.bits_per_byte == pytest.approx(result.bits_per_byte / 2, rel=1e-6)
    nothing = score_text(model, [text])
    assert nothing.bits_per_byte is None
    assert "bits per byte" not in nothing.table()


def test_the_order_of_windows_and_their_batches_do_not_matter():
    model, text = made(), batch(6, 20)
    documents = torch.tensor([0, 1, 1, 2, 2, 0])
    index = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = Tokens(*(part[index] for part in text))
    whole = score_text(model, [(text, None, torch.arange(6))], documents=documents, text_bytes=100)
    parts = [
        (Tokens(*(part[a:b] for part in shuffled)), None, index[a:b]) for a, b in ((0, 1), (1, 4), (4, 6))
    ]
    again = score_text(model, parts, documents=documents, text_bytes=100)
    for key in ("nats", "interval", "bits_per_byte", "bits_interval", "accuracy", "accuracy_interval"):
        assert getattr(again, key) == pytest.approx(getattr(whole, key), rel=1e-5), key
    assert whole.documents == 3
    assert whole.interval != pytest.approx(score_text(model, [text]).interval)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Documents of very different lengths, each with a nats-per-word of its own: the truth is their ratio."""
    draws = torch.Generator().manual_seed(0)
    hits, trials, truth = 0, 800, 1.5
    for _ in range(trials):
        words = torch.randint(20, 400, (25,), generator=draws).double()
        own = truth + 0.4 * torch.randn(25, generator=draws, dtype=torch.float64)
        low, high = language._ratio_interval(own * words, words, 0.95)
        hits += low <= truth <= high
    assert 0.92 <= hits / trials <= 0.97


def test_one_document_has_no_interval():
    result = score_text(
        made(), [(batch(), None, torch.arange(6))], documents=torch.zeros(6, dtype=torch.long)
    )
    assert (result.documents, result.interval, result.accuracy_interval) == (1, None, None)
    assert result.perplexity_interval is None
    assert "95%" not in result.table()


def test_two_models_differ_document_by_document():
    texts, documents = [batch(12, 20), batch(12, 20, seed=5)], torch.arange(24) // 2
    index = [torch.arange(12), torch.arange(12, 24)]
    batches = [(text, None, rows) for text, rows in zip(texts, index, strict=True)]
    one, two = (
        score_text(made(name), batches, documents=documents, text_bytes=480)
        for name in ("crate_gpt_bytes", "gpt2_bytes")
    )
    more, (low, high) = difference(one, two)
    assert more == pytest.approx(one.bits_per_byte - two.bits_per_byte, rel=1e-6)
    assert low < more < high
    same = difference(one, one)
    assert same == (0.0, (0.0, 0.0))
    # Without bytes, in nats for a word.
    bare = [score_text(made(name), batches) for name in ("crate_gpt_bytes", "gpt2_bytes")]
    assert difference(*bare)[0] == pytest.approx(one.nats - two.nats, rel=1e-6)
    with pytest.raises(ConfigError, match="scores of other words - nothing to pair"):
        difference(one, score_text(made(), batches[:1], text_bytes=200))


def test_a_table_and_a_dict_say_it_all():
    result = score_text(made(), [batch()], text_bytes=300)
    told = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert told["perplexity"] == result.perplexity
    assert told["perplexity_interval"][0] < result.perplexity < told["perplexity_interval"][1]
    table = result.table()
    assert f"{result.bits_per_byte:.4f}  (95% {result.bits_interval[0]:.4f} to" in table
    assert f"{result.words} of 6 documents" in table
    assert "hidden words told" in score_text(made("crate_bert_bytes"), [batch()]).table()


def test_words_alone():
    counts = torch.tensor([6, 0, 2])
    nats = nats_alone(counts)
    assert nats.tolist() == pytest.approx([math.log(11 / 7), math.log(11), math.log(11 / 3)])
    assert float((-nats).exp().sum()) == pytest.approx(1)


def test_nothing_to_tell_and_broken_weights():
    model, text = made(), batch()
    silent = text._replace(targets=torch.full_like(text.targets, IGNORED))
    with pytest.raises(DataError, match="no words to tell - give at least one batch"):
        score_text(model, [silent])
    with pytest.raises(DataError, match="no words to tell"):
        score_text(model, [])
    with pytest.raises(ConfigError, match="scores of classes, not of words"):
        score_text(made(num_labels=2), [text])
    with torch.no_grad():
        model.norm.bias[0] = math.nan
    with pytest.raises(NumericsError, match="look at the model's weights"):
        score_text(model, [text])

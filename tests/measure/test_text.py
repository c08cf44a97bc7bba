"""The audit, the cache and attention on batches of text: padding is left out, and the unit is a text."""

import pytest
import torch
from torch.nn import functional as F

from pellucid.data import IGNORED, Tokens
from pellucid.errors import DataError
from pellucid.measure import attention_maps, audit, evaluate, run_with_cache
from pellucid.measure.audit import ROW_KEYS
from pellucid.models import create_model
from pellucid.objectives import coding_rate, nonzero_fraction
from pellucid.steps import OvercompleteISTA

CAUSAL = ["crate_gpt_bytes", "crate_overcomplete_gpt_bytes", "crate_alpha_gpt_bytes", "tost_gpt_bytes"]
MASKED = ["crate_bert_bytes", "crate_alpha_bert_bytes"]
BLACK = ["gpt2_bytes", "bert_bytes"]


def made(name, **options):
    torch.manual_seed(0)
    model = create_model(name, depth=2, embed_dim=16, num_heads=2, **options).eval()
    with torch.no_grad():
        model.embed.words.weight.mul_(20)
    return model


def padded(lengths=(9, 5, 9, 7), seed=0):
    ids = torch.randint(256, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Tokens(ids, ids.masked_fill(~real, IGNORED), real, torch.ones(len(lengths)))


def alone(text):
    """Each text as a batch of its own, without padding."""
    return [ids[real][None] for ids, real in zip(text.ids, text.real, strict=True)]


@pytest.mark.parametrize("name", [*CAUSAL, *MASKED, *BLACK])
def test_a_padded_batch_is_audited_as_its_texts_alone(name):
    model, text = made(name), padded()
    whole = audit(model, [(text, None, None)], data="words")
    each = audit(model, alone(text))
    assert (whole.samples, whole.unit, whole.data) == (4, "texts", "words")
    for row, other in zip(whole.rows, each.rows, strict=True):
        assert tuple(row) == ROW_KEYS
        for key in ROW_KEYS:
            approx = isinstance(row[key], float)
            assert row[key] == (pytest.approx(other[key], rel=2e-3, abs=1e-5) if approx else other[key]), key
    for spectrum, other in zip(whole.spectra, each.spectra, strict=True):
        assert spectrum["singular_values"] == pytest.approx(other["singular_values"], rel=2e-3, abs=2e-3)
    for histogram in whole.norms:
        assert sum(histogram["counts"]) == 30  # every word once, none of them padding


@pytest.mark.parametrize("name", ["crate_gpt_bytes", "crate_overcomplete_gpt_bytes", "tost_gpt_bytes"])
def test_rows_are_what_the_records_give_by_hand(name):
    model, text = made(name), padded((8, 8, 8))
    rows = audit(model, [text]).rows
    records = []
    with torch.no_grad():
        model.forward_features(text.ids, on_step=records.append)
    for row, record in zip(rows, records, strict=True):
        step, after = record.step, record.z_next
        if step.objective_name:
            before_value, after_value = step.before_and_after(record.z, after, record.x)
            assert row["before"] == pytest.approx(before_value.mean().item(), rel=1e-5)
            assert row["after"] == pytest.approx(after_value.mean().item(), rel=1e-5)
            assert row["descended"] == (after_value < before_value).double().mean().item()
        rate = coding_rate(F.normalize(after, dim=-1), 0.1).mean().item()
        assert row["coding_rate"] == pytest.approx(rate, rel=1e-5)
        seen = step.code(record.z) if isinstance(step, OvercompleteISTA) else after
        assert row["nonzero"] == pytest.approx(nonzero_fraction(seen).mean().item())


def test_the_verdict_speaks_of_texts():
    model = made("crate_gpt_bytes", compress_step_size=0.0)
    result = audit(model, [padded()])
    assert "of the texts." in result.verdict["text"]
    assert "does not change R^c(Z_<=t | U) on average" in result.verdict["details"][0]
    assert result.verdict["details"][0].endswith("falls on 0.0% of texts")
    assert audit(made("gpt2_bytes"), [padded()]).verdict["descends"] is None
    with pytest.raises(DataError, match="no texts to audit"):
        audit(model, [])


def test_words_by_their_numbers_will_do_and_a_limit_holds():
    model, text = made("crate_gpt_bytes"), padded((8,) * 6)
    seen = []
    by_numbers = audit(model, [text.ids[:4], text.ids[4:]], limit=5, progress=seen.append)
    assert (by_numbers.samples, seen) == (5, [4, 1])
    first = audit(model, [(Tokens(*(part[:3] for part in text)), 1), text.ids[3:5]])
    assert [row["after"] for row in first.rows] == pytest.approx([row["after"] for row in by_numbers.rows])


@pytest.mark.parametrize("name", [*CAUSAL, *MASKED, *BLACK])
def test_the_cache_of_a_padded_text_is_that_of_the_text_alone(name):
    model, text = made(name), padded()
    scores, cache = run_with_cache(model, text)
    with torch.no_grad():
        torch.testing.assert_close(scores, model(text.ids, text.real))
    for row, ids in enumerate(alone(text)):
        _, own = run_with_cache(model, ids)
        assert own.keys() == cache.keys()
        n = ids.shape[1]
        for key, value in own.items():
            shown = cache[key][row : row + 1]
            shown = shown[:, :, :n, :n] if key.endswith("pattern") else shown[:, :n]
            torch.testing.assert_close(
                shown, value, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}"
            )
        if "tost" not in name:
            hidden = cache["blocks.0.attn.hook_pattern"][row, :, :n, n:]
            assert not hidden.any(), "weight on padding"


def test_a_word_is_asked_where_it_looks():
    model, text = made("crate_gpt_bytes"), padded()
    maps = attention_maps(model, text, reader=3)
    _, cache = run_with_cache(model, text)
    assert maps.keys() == {1, 2}
    for layer, weights in maps.items():
        assert weights.shape == (4, 2, 9)
        torch.testing.assert_close(weights, cache[f"blocks.{layer - 1}.attn.hook_pattern"][:, :, 3])
        assert not weights[..., 4:].any(), "a causal word looks ahead"
    shares = attention_maps(made("tost_gpt_bytes"), text.ids)
    torch.testing.assert_close(shares[1].sum(1), torch.ones(4, 9))


def test_texts_are_classified_and_counted():
    model, text = made("crate_bert_bytes", num_labels=3), padded()
    with torch.no_grad():
        guessed = model(text.ids, text.real).argmax(-1)
    labels = guessed.clone()
    labels[0] = (labels[0] + 1) % 3
    scores = evaluate(model, [(text, labels, torch.arange(4))], ["a", "b", "c"])
    assert (scores.accuracy, scores.count) == (0.75, 4)
    output, cache = run_with_cache(model, text, "blocks.1.hook_resid_post")
    assert list(cache) == ["blocks.1.hook_resid_post"]
    with torch.no_grad():
        torch.testing.assert_close(output, model(text.ids, text.real))

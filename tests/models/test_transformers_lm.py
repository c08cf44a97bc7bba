"""Language models in transformers: the same scores; its ways to pad, keep, write, train and save."""

import copy
import inspect
import json

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DynamicCache,
)

import pellucid
from pellucid.errors import ConfigError
from pellucid.hf import (
    CrateConfig,
    CrateForCausalLM,
    CrateForMaskedLM,
    CrateForSequenceClassification,
    CrateModel,
    TextCache,
    TostConfig,
    TostForCausalLM,
    TostForSequenceClassification,
    TostModel,
    to_pellucid,
    to_transformers,
)
from pellucid.hf.modeling import CACHE
from pellucid.models import create_model, from_published
from pellucid.models.language import CRATELM, KINDS, ToSTLM

SMALL = {"vocab_size": 31, "context": 24, "embed_dim": 24, "depth": 2, "num_heads": 3}
CAUSAL = [kind for kind, (_, _, options) in KINDS.items() if options.get("causal", True)]
MASKED = [kind for kind in KINDS if kind not in CAUSAL]
causal = pytest.mark.parametrize("kind", CAUSAL)
masked = pytest.mark.parametrize("kind", MASKED)
every = pytest.mark.parametrize("kind", list(KINDS))
two = pytest.mark.parametrize("kind", ["crate_gpt", "tost_gpt"])


def small(kind, dtype=torch.float64, **options):
    """A tiny model of this library, away from where it began so that every weight is heard."""
    if kind == "tost_gpt":
        options = {"offset": True, **options}
    model = create_model(f"{kind}_bytes", **{**SMALL, **options})
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter.copy_(parameter + 0.2 * noise)
    return model.to(dtype).eval()


def ids(*shape, seed=0):
    return torch.randint(0, 31, shape, generator=torch.Generator().manual_seed(seed))


def close(ours, theirs, tolerance=1e-10):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def rows_of(*lengths):
    return [ids(length, seed=i + 3) for i, length in enumerate(lengths)]


def padded(rows, side, room=None, word=30):
    """Rows beside each other, and the mask of their tokens; ``both``: some on either side."""
    width = room or max(map(len, rows)) + (1 if side == "both" else 0)
    text = torch.full((len(rows), width), word)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        spare = width - len(row)
        start = {"left": spare, "right": 0, "both": spare // 2}[side]
        text[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = 1
    return text, mask


# --- the same model ---------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@torch.no_grad()
def test_scores_are_the_models_to_the_last_bit(kind, dtype):
    model, text = small(kind, dtype), ids(2, 9)
    made = to_transformers(model)
    assert made.dtype is dtype
    assert not made.training
    for options in ({"use_cache": False}, {}):
        assert torch.equal(made(text, **(options if kind in CAUSAL else {})).logits, model(text))
    assert torch.equal(made.network(text), model(text))


@every
@torch.no_grad()
def test_there_and_back(kind):
    model = small(kind)
    back = to_pellucid(to_transformers(model))
    assert type(back) is type(model)
    assert back.architecture == model.architecture
    assert {k: v for k, v in back.model_args.items() if k in model.model_args} == model.model_args
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))
    assert torch.equal(back(ids(2, 5)), model(ids(2, 5)))


@pytest.mark.parametrize("kind", ["crate_gpt", "tost_gpt", "crate_bert"])
@torch.no_grad()
def test_classes_of_texts(kind):
    model, names = small(kind, num_labels=3), ["fire", "water", "earth"]
    model.label_names = names
    made = to_transformers(model)
    assert type(made) is (TostForSequenceClassification if "tost" in kind else CrateForSequenceClassification)
    assert made.config.id2label == dict(enumerate(names))
    text = ids(2, 9)
    assert torch.equal(made(text).logits, model(text))
    rows = rows_of(9, 4)
    for side in ("left", "right", "both"):
        given, mask = padded(rows, side)
        scores = made(given, attention_mask=mask).logits
        close(scores, torch.cat([model(row[None]) for row in rows]))
    back = to_pellucid(made)
    assert back.label_names == names
    assert torch.equal(back(text), model(text))


def test_only_what_create_model_made_can_be_given():
    for model in (CRATELM(**SMALL), pellucid.create_model("crate_digits"), torch.nn.Linear(2, 2)):
        with pytest.raises(ConfigError, match=r"take a language model that pellucid\.create_model"):
            to_transformers(model)


@torch.no_grad()
def test_published_tost_gives_its_recorded_scores(recorded):
    record = recorded("tost_lang")
    state = {k.removeprefix("state/"): v for k, v in record.items() if k.startswith("state/")}
    model = from_published(state).eval()
    made = to_transformers(model)
    assert type(made) is TostForCausalLM
    found = made(record["ids"], labels=torch.zeros_like(record["ids"]))
    assert torch.equal(found.logits, model(record["ids"]))
    assert (found.logits - record["logits"]).norm() <= 1e-5 * record["logits"].norm()
    shifted = F.pad(record["targets"], (1, 0))[:, :-1]  # theirs are of the words that follow already
    loss = made(record["ids"], labels=shifted).loss
    expected = F.cross_entropy(record["logits"][:, :-1].flatten(0, 1), record["targets"][:, :-1].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("atoms", [1, 4])
@torch.no_grad()
def test_published_crate_lm_gives_the_same_scores(atoms):
    generator = torch.Generator().manual_seed(0)
    dim = 12

    def normal(*shape):
        return torch.randn(*shape, generator=generator) / 3

    state = {"transformer.wte.weight": normal(17, dim), "transformer.wpe.weight": normal(8, dim)}
    for i in range(2):
        at = f"transformer.h.{i}."
        state |= {f"{at}attn.c_attn.weight": normal(dim, dim), f"{at}ista.weight": normal(atoms * dim, dim)}
        state |= {f"{at}attn.c_proj.weight": normal(dim, dim), f"{at}attn.c_proj.bias": normal(dim)}
        for norm in ("prenorm_1", "prenorm_2"):
            state |= {f"{at}{norm}.weight": 1 + normal(dim), f"{at}{norm}.bias": normal(dim)}
    if atoms > 1:
        state |= {"transformer.ln_f.weight": 1 + normal(dim), "transformer.ln_f.bias": normal(dim)}
    model = from_published(state, num_heads=3).eval()
    made = to_transformers(model)
    assert made.config.pellucid_model == ("crate_gpt_small" if atoms == 1 else "crate_overcomplete_gpt_small")
    text = torch.randint(0, 17, (2, 8), generator=generator)
    assert torch.equal(made(text).logits, model(text))
    assert made.config.final_norm == (atoms > 1)


# --- padding ----------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_a_row_does_not_know_its_padding(kind, side):
    """Also: places are counted from the first real token."""
    model, rows = small(kind), rows_of(9, 4, 1)
    made = to_transformers(model)
    text, mask = padded(rows, side)
    found = made(text, attention_mask=mask, output_hidden_states=True)
    for i, row in enumerate(rows):
        real = mask[i].bool()
        close(found.logits[i, real], model(row[None])[0])
        alone = made(row[None], output_hidden_states=True).hidden_states
        for ours, theirs in zip(found.hidden_states, alone, strict=True):
            close(ours[i, real], theirs[0])
            assert not ours[i, ~real].any()
    other = text.masked_fill(mask == 0, 7)
    assert torch.equal(made(other, attention_mask=mask).logits, found.logits)


@causal
@torch.no_grad()
def test_padding_between_words_is_left_out_too(kind):
    model, row = small(kind), ids(7)
    text, mask = torch.full((2, 11), 5), torch.zeros(2, 11, dtype=torch.long)
    places = torch.tensor([1, 2, 4, 5, 7, 8, 10])
    text[0, places], mask[0, places] = row, 1
    text[1], mask[1] = ids(11, seed=9), 1
    scores = to_transformers(model)(text, attention_mask=mask).logits
    close(scores[0, places], model(row[None])[0])
    close(scores[1], model(text[1:])[0])


# --- the cache --------------------------------------------------------------------------------------------


@causal
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@torch.no_grad()
def test_in_parts_as_in_one(kind, dtype, tolerance):
    model, text = small(kind, dtype), ids(3, 24)
    made = to_transformers(model)
    whole = model(text)
    for parts in ([24], [1] * 24, [7, 1, 1, 10, 5]):
        cache, found = None, []
        for part in text.split(parts, 1):
            given = made(part, cache=cache)
            cache = given[CACHE]
            found.append(given.logits)
        close(torch.cat(found, 1), whole, tolerance)
        assert cache.get_seq_length() == 24
        assert len(cache) == 2


@causal
@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_padded_rows_go_on_from_a_cache(kind, side):
    model, rows = small(kind), rows_of(9, 4, 1)
    made, new = to_transformers(model), ids(3, 5, seed=11)
    text, mask = padded(rows, side)
    cache = made(text, attention_mask=mask, use_cache=True)[CACHE]
    found = []
    for word in new.split(1, 1):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        found.append(made(word, attention_mask=mask, cache=cache).logits)
    for i, row in enumerate(rows):
        close(torch.cat(found, 1)[i], model(torch.cat([row, new[i]])[None])[0, len(row) :])
    assert cache.get_seq_length() == text.shape[1] + 5


@causal
@torch.no_grad()
def test_a_prompt_in_pieces_of_which_some_are_padding_alone(kind):
    model, rows = small(kind), rows_of(9, 2)
    made = to_transformers(model)
    text, mask = padded(rows, "left", room=12)
    whole, cache, found = made(text, attention_mask=mask).logits, TextCache(made.config), []
    for start in range(0, 12, 3):
        part = slice(start, start + 3)
        found.append(made(text[:, part], attention_mask=mask[:, : start + 3], cache=cache).logits)
    close(torch.cat(found, 1), whole)


@pytest.mark.parametrize(("kind", "tensors"), [("crate_gpt", 1), ("crate_alpha_gpt", 1), ("gpt2", 2)])
@pytest.mark.parametrize(("recency", "more"), [(False, 0), (True, 3)])
@torch.no_grad()
def test_what_is_kept_of_tokens(kind, tensors, recency, more):
    options = {"recency": recency} if kind == "gpt2" else {"recency": recency, "own": True}
    cache = to_transformers(small(kind, **options))(ids(2, 12))[CACHE]
    assert cache.numel() == 2 * 2 * tensors * 12 * (24 + 3 * more)  # rows, layers, tensors, tokens, width


@torch.no_grad()
def test_of_tost_as_much_is_kept_of_one_token_as_of_many():
    made = to_transformers(small("tost_gpt"))
    for length in (1, 12, 24):
        assert made(ids(2, length))[CACHE].numel() == 2 * 2 * (2 * 24 + 3)  # 2 C + h for each row and layer


@causal
@torch.no_grad()
def test_rows_of_a_cache_are_taken_repeated_and_dropped(kind):
    model, rows = small(kind), rows_of(6, 3)
    made, new = to_transformers(model), ids(4, 3, seed=12)
    text, mask = padded(rows, "left")

    def go_on(change, order):
        cache = made(text, attention_mask=mask)[CACHE]
        change(cache)
        wide = torch.cat([mask[order], torch.ones(len(order), 3, dtype=torch.long)], 1)
        scores = made(new[: len(order)], attention_mask=wide, cache=cache).logits
        for i, row in enumerate(order):
            close(scores[i], model(torch.cat([rows[row], new[i]])[None])[0, len(rows[row]) :])
        assert cache.batch_size == len(order)

    go_on(lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0])
    go_on(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1])
    go_on(lambda cache: cache.batch_select_indices(torch.tensor([False, True])), [1])
    cache = made(text, attention_mask=mask)[CACHE]
    kept = copy.deepcopy(cache)
    cache.reset()
    assert cache.get_seq_length() == cache.numel() == 0
    assert torch.equal(
        made(text, attention_mask=mask, cache=cache).logits, made(text, attention_mask=mask).logits
    )
    assert kept.get_seq_length() == 6


@pytest.mark.parametrize("kind", [kind for kind in CAUSAL if kind != "tost_gpt"])
@torch.no_grad()
def test_places_of_a_cache_are_taken_back(kind):
    model, rows = small(kind), rows_of(6, 3)
    made, new = to_transformers(model), ids(2, 2, seed=12)
    for side, back, left in (("left", 2, (4, 1)), ("right", 2, (4, 3)), ("right", 4, (2, 2))):
        text, mask = padded(rows, side)
        cache = made(text, attention_mask=mask)[CACHE]
        cache.crop(-back)
        assert cache.get_seq_length() == 6 - back
        wide = torch.cat([mask[:, : 6 - back], torch.ones(2, 2, dtype=torch.long)], 1)
        scores = made(new, attention_mask=wide, cache=cache).logits
        for i, count in enumerate(left):
            close(scores[i], model(torch.cat([rows[i][:count], new[i]])[None])[0, count:])
    assert cache.is_croppable
    with pytest.raises(ValueError, match=r"crop\(-5\) of 4 places"):
        cache.crop(-5)
    for length in (7, 4, 3, 0):
        cache.crop(length)
        assert cache.get_seq_length() == (min(length, 4) or 3)


def test_a_sum_takes_nothing_back():
    cache = to_transformers(small("tost_gpt"))(ids(1, 4))[CACHE]
    cache.crop(0)
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="sums of tokens take none of them back"):
        cache.crop(-1)


# --- writing ----------------------------------------------------------------------------------------------


def without_end(made):
    made.generation_config.pad_token_id = 30
    return made


@causal
@torch.no_grad()
def test_greedy_writing_beside_padding_is_this_librarys(kind):
    model, rows = small(kind), rows_of(9, 4, 1)
    made = without_end(to_transformers(model))
    text, mask = padded(rows, "left")
    for cache in (True, False):
        found = made.generate(text, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=cache)
        ours = pellucid.generate(model, rows, 12, temperature=0)
        for row, wrote, expected in zip(rows, found, ours, strict=True):
            assert torch.equal(wrote[text.shape[1] :], expected[len(row) :])


@causal
@torch.no_grad()
def test_sampling_and_beams_are_the_same_with_a_cache_as_without(kind):
    made = without_end(to_transformers(small(kind)))
    text, mask = padded(rows_of(5, 3), "left")
    for options in (
        {"do_sample": True, "top_k": 12, "temperature": 0.9, "num_return_sequences": 2},
        {"num_beams": 3, "do_sample": False, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True, "repetition_penalty": 1.2},
    ):
        found = []
        for cache in (True, False):
            torch.manual_seed(1)
            found.append(
                made.generate(text, attention_mask=mask, max_new_tokens=9, use_cache=cache, **options)
            )
        assert torch.equal(*found)
        assert found[0].shape == (4 if "num_return_sequences" in options else 2, 14)


@two
@torch.no_grad()
def test_beams_find_what_trying_all_finds(kind):
    """With as many beams as there are words, two words deep: the likeliest pair of all."""
    model = small(kind)
    made, prompt = without_end(to_transformers(model)), ids(1, 4)
    options = {"num_beams": 31, "do_sample": False, "length_penalty": 0.0}
    found = made.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, **options)
    first = model(prompt)[0, -1].log_softmax(-1)
    pairs = torch.cat([prompt.expand(31, -1), torch.arange(31)[:, None]], 1)
    second = model(pairs)[:, -1].log_softmax(-1)
    best = (first[:, None] + second).flatten().argmax().item()
    assert found[0, 4:].tolist() == [best // 31, best % 31]


@causal
@torch.no_grad()
def test_writing_goes_on_where_it_stopped(kind):
    made = without_end(to_transformers(small(kind)))
    text, mask = padded(rows_of(5, 3), "left")
    options = {"do_sample": False, "return_dict_in_generate": True}
    once = made.generate(text, attention_mask=mask, max_new_tokens=10, **options)
    first = made.generate(text, attention_mask=mask, max_new_tokens=4, **options)
    longer = torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], 1)
    kept = copy.deepcopy(first[CACHE])
    for cache in (first[CACHE], kept):
        options[CACHE] = cache
        then = made.generate(first.sequences, attention_mask=longer, max_new_tokens=6, **options)
        assert torch.equal(then.sequences, once.sequences)


@two
@torch.no_grad()
def test_a_prompt_may_be_read_in_chunks(kind):
    made = without_end(to_transformers(small(kind)))
    text, mask = padded(rows_of(9, 2), "left")
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = made.generate(text, **options)
    assert torch.equal(made.generate(text, prefill_chunk_size=4, **options), expected)
    options[CACHE] = TextCache(made.config)
    chunked = made.generate(text, prefill_chunk_size=4, **options)
    assert torch.equal(chunked, expected)


@two
@torch.no_grad()
def test_writing_gives_back_scores_and_hidden_states(kind):
    made = without_end(to_transformers(small(kind)))
    text, mask = padded(rows_of(5, 3), "left")
    for cache in (True, False):
        for options in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 2, "do_sample": False}):
            found = made.generate(
                text,
                attention_mask=mask,
                max_new_tokens=4,
                use_cache=cache,
                return_dict_in_generate=True,
                output_scores=True,
                output_logits=True,
                output_hidden_states=True,
                **options,
            )
            rows = 2 * options.get("num_beams", 1)
            assert [scores.shape for scores in found.scores] == [(rows, 31)] * 4
            assert [scores.shape for scores in found.logits] == [(rows, 31)] * 4
            for step, hidden in enumerate(found.hidden_states):
                width = 1 if cache and step else 5 + step
                assert [tokens.shape for tokens in hidden] == [(rows, width, 24)] * 3
            assert isinstance(found.get(CACHE), TextCache if cache else type(None))


@torch.no_grad()
def test_writing_may_begin_with_the_word_that_ends_a_text():
    model = small("crate_gpt")
    made = without_end(to_transformers(model))
    made.generation_config.bos_token_id = 3
    found = made.generate(max_new_tokens=6, do_sample=False)
    assert torch.equal(found[0], pellucid.generate(model, [torch.tensor([3])], 6, temperature=0)[0])


@two
@torch.no_grad()
def test_vectors_in_place_of_words(kind):
    made = without_end(to_transformers(small(kind)))
    text, mask = padded(rows_of(5, 3), "left")
    vectors = made.get_input_embeddings()(text)
    given = {"attention_mask": mask}
    assert torch.equal(made(inputs_embeds=vectors, **given).logits, made(text, **given).logits)
    for beams in (1, 2):
        options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, **given}
        expected = made.generate(text, **options)[:, 5:]
        assert torch.equal(made.generate(inputs_embeds=vectors, **options), expected)


@torch.no_grad()
def test_another_model_may_propose_words_where_they_can_be_taken_back():
    made = without_end(to_transformers(small("crate_gpt")))
    helper = without_end(to_transformers(small("gpt2")))
    options = {"max_new_tokens": 10, "do_sample": False}
    expected = made.generate(ids(1, 6), **options)
    assert torch.equal(made.generate(ids(1, 6), assistant_model=helper, **options), expected)
    sampled = made.generate(ids(1, 6), assistant_model=helper, do_sample=True, max_new_tokens=10)
    assert sampled.shape == (1, 16)
    assert torch.equal(made.generate(ids(1, 6), assistant_model=made, **options), expected)
    made.generation_config.eos_token_id = 30  # 5.0 asks for one where words are looked up, and writes on
    repeated = ids(1, 4).repeat(1, 2)
    expected = made.generate(repeated, **options)
    looked_up = made.generate(repeated, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(looked_up[:, : expected.shape[1]], expected)
    sums = without_end(to_transformers(small("tost_gpt")))
    with pytest.raises(ValueError, match=r"requires a cache that can be cropped|take none of them back"):
        sums.generate(ids(1, 6), assistant_model=helper, **options)


@two
@torch.no_grad()
def test_scores_of_some_places_alone(kind):
    made, text = to_transformers(small(kind)), ids(2, 7)
    scores = made(text).logits
    close(made(text, logits_to_keep=1).logits, scores[:, -1:])
    close(made(text, logits_to_keep=torch.tensor([0, 3])).logits, scores[:, [0, 3]])


def test_a_text_ends_at_the_context():
    made = without_end(to_transformers(small("crate_gpt")))
    options = {"attention_mask": torch.ones(1, 20, dtype=torch.long), "do_sample": False}
    assert made.generate(ids(1, 20), max_new_tokens=5, **options).shape == (1, 25)
    with pytest.raises(ConfigError, match="25 tokens, and the model was built for a context of 24"):
        made.generate(ids(1, 20), max_new_tokens=6, **options)


# --- training ---------------------------------------------------------------------------------------------


@two
def test_the_loss_is_of_the_words_that_follow(kind):
    model, text = small(kind), ids(2, 9)
    made = to_transformers(model)
    labels = text.clone()
    labels[1, 5:] = -100
    found = made(text, labels=labels)
    expected = F.cross_entropy(model(text)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    close(found.loss, expected.float(), 1e-5)
    whole = made(text, labels=text, num_items_in_batch=4).loss  # as Trainer asks where a batch is cut
    close(whole * 4, made(text, labels=text).loss * 16, 1e-5)


@masked
def test_the_loss_of_a_masked_model_is_of_the_words_that_stand_there(kind):
    model, text = small(kind), ids(2, 9)
    labels = torch.full_like(text, -100)
    labels[0, 2], labels[1, 7] = 4, 9
    expected = F.cross_entropy(model(text)[[0, 1], [2, 7]], torch.tensor([4, 9]))
    close(to_transformers(model)(text, labels=labels).loss, expected.float(), 1e-5)


def test_the_loss_of_classes_and_of_numbers():
    model, text = small("crate_bert", torch.float32, num_labels=3), ids(2, 9)
    scores = model(text)
    for kind, labels, expected in (
        ("single_label_classification", torch.tensor([2, 0]), F.cross_entropy(scores, torch.tensor([2, 0]))),
        ("regression", torch.ones(2, 3), F.mse_loss(scores, torch.ones(2, 3))),
        (
            "multi_label_classification",
            torch.ones(2, 3),
            F.binary_cross_entropy_with_logits(scores, torch.ones(2, 3)),
        ),
    ):
        made = to_transformers(model)
        made.config.problem_type = kind
        close(made(text, labels=labels).loss, expected, 1e-6)


def recompute(made):
    """By the name that this version has for it."""
    return getattr(made, "activation_checkpointing_enable", made.gradient_checkpointing_enable)


@every
def test_every_weight_is_trained_and_recomputing_changes_no_gradient(kind):
    made = to_transformers(small(kind)).train()
    text, mask = padded(rows_of(9, 4), "right")
    labels = text.masked_fill(mask == 0, -100)

    def gradients():
        made.zero_grad()
        found = made(text, attention_mask=mask, labels=labels)
        assert CACHE not in found
        found.loss.backward()
        return {name: parameter.grad for name, parameter in made.named_parameters()}

    plain = gradients()
    assert all(grad is not None for grad in plain.values())
    calls = []
    made.network.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for reentrant in (False, True):
        recompute(made)({"use_reentrant": reentrant})
        calls.clear()
        again = gradients()
        assert len(calls) == 2  # forward, and once more on the way back
        for name, grad in plain.items():
            close(again[name], grad)
        made.base_model.gradient_checkpointing = False
    calls.clear()
    gradients()
    assert len(calls) == 1


def test_layers_are_recomputed_all_or_none():
    made = to_transformers(small("crate_gpt"))
    if "every_n_layers" in inspect.signature(recompute(made)).parameters:
        with pytest.raises(ValueError, match="leave out every_n_layers"):
            recompute(made)(every_n_layers=2)


@two
@torch.no_grad()
def test_hidden_states_are_what_the_steps_of_each_layer_begin_from(kind):
    model, text = small(kind), ids(2, 6)
    records = []
    tokens = model.forward_features(text, on_step=records.append)
    for options in ({}, {"use_cache": False}):
        found = to_transformers(model)(text, output_hidden_states=True, **options).hidden_states
        assert len(found) == 3
        starts = [record.z for record in records if record.name == "compress"]
        assert all(torch.equal(*pair) for pair in zip(found, [*starts, tokens], strict=True))
    made = to_transformers(model)
    assert made(text).hidden_states is None
    made.config.output_hidden_states = True
    assert len(made(text).hidden_states) == 3


# --- words --------------------------------------------------------------------------------------------------


@every
@torch.no_grad()
def test_words_are_added_and_taken_away(kind, tmp_path):
    model, text = small(kind, torch.float32), ids(2, 7)
    made = to_transformers(model)
    before = made(text).logits
    made.resize_token_embeddings(40)
    assert made.config.vocab_size == 40
    after = made(text).logits
    assert after.shape == (2, 7, 40)
    close(after[..., :31], before, 1e-5)
    made(torch.full((1, 3), 39))
    assert made.lm_head.weight is made.get_input_embeddings().weight
    made.save_pretrained(tmp_path)
    assert torch.equal(type(made).from_pretrained(tmp_path)(text).logits, after)
    back = to_pellucid(made)
    assert back.vocab_size == back.model_args["vocab_size"] == 40
    assert torch.equal(back(text), after)
    made.resize_token_embeddings(20)
    close(made(text % 20).logits, model(text % 20)[..., :20], 1e-5)
    with pytest.raises(ConfigError, match="the vocabulary has 20"):
        made(torch.full((1, 3), 20))


def test_scores_may_be_untied_from_the_words_here_alone(tmp_path):
    made = CrateForCausalLM(CrateConfig(**SMALL, tie_word_embeddings=False)).eval()
    assert made.lm_head.weight is not made.get_input_embeddings().weight
    torch.nn.init.normal_(made.lm_head.weight)
    made.save_pretrained(tmp_path)
    again = CrateForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, made.lm_head.weight)
    with pytest.raises(ConfigError, match="tie_word_embeddings=False"):
        to_pellucid(made)


# --- saving -------------------------------------------------------------------------------------------------


@every
@torch.no_grad()
def test_saved_and_loaded_by_the_auto_classes(kind, tmp_path):
    model, text = small(kind, torch.float32), ids(2, 9)
    made = to_transformers(model)
    made.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if model.causal else AutoModelForMaskedLM
    again = auto.from_pretrained(tmp_path)
    assert type(again) is type(made)
    assert torch.equal(again(text).logits, model(text))
    assert again.config.network_options() == made.config.network_options()
    tokens = AutoModel.from_pretrained(tmp_path)
    assert type(tokens) is (TostModel if "tost" in kind else CrateModel)
    assert torch.equal(tokens(text).last_hidden_state, model.forward_features(text))


@torch.no_grad()
def test_a_language_model_becomes_a_classifier_with_a_fresh_map(tmp_path):
    for kind, cls in (
        ("crate_bert", CrateForSequenceClassification),
        ("tost_gpt", TostForSequenceClassification),
    ):
        folder = tmp_path / kind
        model = small(kind, torch.float32)
        to_transformers(model).save_pretrained(folder)
        torch.manual_seed(3)
        made = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=4)
        assert type(made) is cls
        shared = dict(model.named_parameters())
        for name, parameter in made.network.named_parameters():
            assert name.startswith("classifier") or torch.equal(parameter, shared[name])
        assert made.network.classifier.weight.std() == pytest.approx(0.02, rel=0.3)
        assert not made.network.classifier.bias.any()
        made.save_pretrained(folder / "again")
        loaded = cls.from_pretrained(folder / "again")
        assert torch.equal(loaded(ids(2, 5)).logits, made(ids(2, 5)).logits)
        other = cls.from_pretrained(folder / "again", num_labels=2, ignore_mismatched_sizes=True)
        assert other(ids(2, 5)).logits.shape == (2, 2)


@pytest.mark.parametrize("cls", [CrateForCausalLM, CrateForMaskedLM, TostForCausalLM])
def test_what_no_file_gives_begins_as_a_fresh_model(cls):
    config = cls.config_class(**SMALL, **({"causal": False} if cls is CrateForMaskedLM else {}))
    torch.manual_seed(5)
    fresh = cls(copy.deepcopy(config))
    torch.manual_seed(5)
    given = cls.from_pretrained(None, config=copy.deepcopy(config), state_dict={})
    torch.manual_seed(5)
    ours = config.network_class(**config.network_options())
    for (name, a), b in zip(fresh.network.named_parameters(), given.network.parameters(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(fresh.network.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)
    assert given.lm_head.weight is given.get_input_embeddings().weight


@torch.no_grad()
def test_half_precision_and_orthonormal_bases(tmp_path):
    config = CrateConfig(**SMALL, compression="tied", orthonormal=True)
    made = CrateForCausalLM(config)
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.eval()(ids(2, 5)).logits, made.eval()(ids(2, 5)).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(ids(2, 5)).logits.dtype is torch.bfloat16
    fresh = AutoModelForCausalLM.from_config(TostConfig(**SMALL), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in fresh.parameters()} == {torch.bfloat16}
    assert fresh.eval()(ids(2, 5)).logits.isfinite().all()


@pytest.mark.parametrize(("config", "network"), [(CrateConfig, CRATELM), (TostConfig, ToSTLM)])
def test_a_config_has_the_words_of_both(config, network, tmp_path):
    made = config(hidden_size=48, num_hidden_layers=3, num_attention_heads=6, max_position_embeddings=12)
    assert (made.embed_dim, made.depth, made.num_heads, made.context) == (48, 3, 6, 12)
    assert (made.hidden_size, made.num_hidden_layers) == (48, 3)
    parameters = inspect.signature(network).parameters
    defaults = {name: p.default for name, p in parameters.items() if name != "num_labels"}
    assert config().network_options() == defaults
    made.step_size = 0.2
    made.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is config
    assert again.network_options() == made.network_options()
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["embed_dim"] == 48
    assert {name: stored[name] for name in defaults} == made.network_options()
    assert "hidden_size" not in stored
    assert config(num_labels=5).num_labels == 5
    assert config(use_cache=False, vocab_size=7).use_cache is False


# --- what is refused ----------------------------------------------------------------------------------------


def test_masked_and_causal_are_not_mixed_up():
    with pytest.raises(ValueError, match=r"of a masked model .* take CrateForMaskedLM"):
        CrateForCausalLM(CrateConfig(**SMALL, causal=False))
    with pytest.raises(ValueError, match="of a causal model - take CrateForCausalLM"):
        CrateForMaskedLM(CrateConfig(**SMALL))
    made = to_transformers(small("crate_bert"))
    with pytest.raises(ValueError, match="goes on from no cache"):
        made.model(ids(1, 3), cache=TextCache(made.config))


@pytest.mark.parametrize(("given", "message"), [
    ({"position_ids": torch.arange(5)[None]}, "takes no position_ids - leave it out; places are counted"),
    ({"token_type_ids": torch.zeros(1, 5, dtype=torch.long)}, "takes no token_type_ids"),
    ({"attention_msk": torch.ones(1, 5)}, "takes no attention_msk"),
    ({"output_attentions": True}, "never formed in a forward pass"),
    ({"cache": DynamicCache()}, "a DynamicCache cannot hold what these steps keep"),
    ({"attention_mask": torch.ones(1, 4)}, r"shape \(1, 4\); expected \(1, 5\)"),
    ({"attention_mask": torch.ones(1, 1, 5, 5)}, "a row for each text"),
    ({"inputs_embeds": torch.zeros(1, 5, 24)}, "give either input_ids or inputs_embeds"),
    ({"input_ids": None}, "give either input_ids or inputs_embeds"),
    ({"input_ids": torch.zeros(1, 25, dtype=torch.long)}, "25 tokens, and the model was built for"),
    ({"input_ids": torch.full((1, 5), 31)}, "the vocabulary has 31"),
])  # fmt: skip
def test_what_would_be_lost_without_a_word_is_refused(given, message):
    made = to_transformers(small("crate_gpt"))
    with pytest.raises((ValueError, TypeError), match=message):
        made(**{"input_ids": ids(1, 5), **given})


def test_a_cache_of_other_rows_is_refused_and_left_as_it_was():
    made = to_transformers(small("crate_gpt"))
    cache = made(ids(2, 5))[CACHE]
    with pytest.raises(ValueError, match="holds 2 rows, and 3 arrive"):
        made(ids(3, 1), cache=cache)
    with pytest.raises(ValueError, match=r"shape \(2, 1\); expected \(2, 6\)"):
        made(ids(2, 1), attention_mask=torch.ones(2, 1), cache=cache)
    with pytest.raises(ConfigError, match="25 tokens"):
        made(ids(2, 20), cache=cache)
    assert cache.get_seq_length() == 5
    with torch.no_grad():
        new = made(ids(2, 1), cache=cache).logits
        close(new, made(torch.cat([ids(2, 5), ids(2, 1)], 1)).logits[:, -1:])

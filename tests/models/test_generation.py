"""Generation: the same scores with a memory as without, and what sampling leaves to choose from."""

import pytest
import torch

from pellucid.errors import ConfigError, NumericsError
from pellucid.models import Sampling, create_model, generate, generation, stream
from pellucid.models.generation import ENDED
from pellucid.models.language import KINDS
from pellucid.steps import Memory

SMALL = {"vocab_size": 31, "context": 24, "embed_dim": 24, "depth": 2, "num_heads": 3}
CAUSAL = [kind for kind, (_, _, options) in KINDS.items() if options.get("causal", True)]
every = pytest.mark.parametrize("kind", CAUSAL)


def small(kind, dtype=torch.float64, **options):
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


# --- a memory changes nothing -----------------------------------------------------------------------------


@every
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@torch.no_grad()
def test_in_parts_as_in_one(kind, dtype, tolerance):
    model, text = small(kind, dtype), ids(3, 24)
    whole = model.forward_features(text)
    for parts in ([24], [1] * 24, [7, 1, 1, 10, 5]):
        memory = Memory(3)
        out = torch.cat([model.resume(part, memory) for part in text.split(parts, 1)], 1)
        torch.testing.assert_close(out, whole, rtol=tolerance, atol=tolerance)


@every
@pytest.mark.parametrize("options", [
    {"temperature": 0.0}, {"seed": 3},
    {"top_k": 5, "top_p": 0.9, "temperature": 0.7, "repetition_penalty": 1.3},
])  # fmt: skip
def test_with_a_memory_as_by_computing_all_again(kind, options):
    model, prompts = small(kind), [ids(5), ids(2, seed=1), ids(9, seed=2)]
    fast = generate(model, prompts, 10, **options)
    slow = generate(model, prompts, 10, cache=False, **options)
    for prompt, row, again in zip(prompts, fast, slow, strict=True):
        assert torch.equal(row, again)
        assert torch.equal(row[: len(prompt)], prompt)
        assert len(row) == len(prompt) + 10


@every
@pytest.mark.parametrize("lengths", [(14,), (9, 2, 14), (5, 5), (4, 8)])
def test_a_prompt_is_read_in_parts(kind, lengths, monkeypatch):
    model = small(kind)
    prompts = [ids(n, seed=n) for n in lengths]
    whole = generate(model, prompts, 6, seed=1, cache=False)
    monkeypatch.setattr(generation, "PART", 4)
    sizes, resume = [], model.resume
    monkeypatch.setattr(model, "resume", lambda ids, *rest: sizes.append(ids.shape[1]) or resume(ids, *rest))
    for row, expected in zip(generate(model, prompts, 6, seed=1), whole, strict=True):
        assert torch.equal(row, expected)
    assert sizes[:-5] == [4] * (max(lengths) // 4) + [max(lengths) % 4] * (max(lengths) % 4 > 0)
    assert sizes[-5:] == [1] * 5


@every
def test_the_memory_is_as_large_as_the_text_will_be(kind, monkeypatch):
    made = []
    monkeypatch.setattr(generation, "Memory", lambda *a, **o: made.append(Memory(*a, **o)) or made[-1])
    generate(small(kind), [ids(5), ids(2)], 6)
    (memory,) = made
    full = Memory(2)
    with torch.no_grad():
        small(kind).resume(ids(2, 10), full)
    assert memory.nbytes() == full.nbytes()


def test_what_is_given_may_be_changed():
    """The network runs in inference mode; its tokens come out of it."""
    model = small("crate_gpt")
    new = next(stream(model, ids(3), 2))
    new += 1
    assert not new.is_inference()
    assert not generate(model, ids(3), 2)[0].is_inference()


@every
def test_a_prompt_does_not_depend_on_those_beside_it(kind):
    model, prompts = small(kind), [ids(5), ids(2, seed=1), ids(9, seed=2)]
    for options in ({"temperature": 0.0}, {"top_p": 0.95}):
        together = generate(model, prompts, 8, seed=5, **options)
        for i, prompt in enumerate(prompts):
            assert torch.equal(generate(model, [prompt], 8, seed=5 + i, **options)[0], together[i])


@every
def test_greedy_takes_the_likeliest_of_the_full_forward_pass(kind):
    model = small(kind)
    row = generate(model, ids(4), 12, temperature=0.0)[0]
    with torch.no_grad():
        scores = model(row[None, :-1])[0]
    assert torch.equal(scores[3:].argmax(-1), row[4:])


@every
def test_up_to_the_end_of_the_context_and_no_further(kind):
    model = small(kind)
    assert len(generate(model, ids(4), 21, temperature=0.0)[0]) == 25  # the last is written and not read
    with pytest.raises(ConfigError, match=r"4 tokens and 22 to come.* context of 24 - ask for at most 21"):
        generate(model, ids(4), 22)
    memory = Memory(1)
    with torch.no_grad():
        model.resume(ids(1, 24), memory)
        with pytest.raises(ConfigError, match="25 tokens, and the model was built for a context of 24"):
            model.resume(ids(1, 1), memory)


def test_what_is_kept_of_a_text():
    """Of attention one tensor in CRATE and two in GPT-2, for each layer, with where each token stands in each
    head; of ToST the same at any length."""
    kept = {}
    for kind in ("crate_gpt", "gpt2", "tost_gpt"):
        for n in (6, 24):
            memory = Memory(1)
            with torch.no_grad():
                small(kind).resume(ids(1, n), memory)
            kept[kind, n] = memory.numel()
    assert [kept["crate_gpt", n] for n in (6, 24)] == [2 * n * (24 + 3 * 3) for n in (6, 24)]
    assert [kept["gpt2", n] for n in (6, 24)] == [4 * n * (24 + 3 * 3) for n in (6, 24)]
    assert kept["tost_gpt", 6] == kept["tost_gpt", 24] == 2 * (2 * 24 + 3)


# --- sampling ---------------------------------------------------------------------------------------------

SCORES = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
NONE = torch.zeros(2, 4, dtype=torch.bool)


def chances(**options):
    return Sampling(**options).distribution(SCORES, NONE)


def test_temperature():
    torch.testing.assert_close(chances(), SCORES.softmax(-1))
    torch.testing.assert_close(chances(temperature=0.5), (2 * SCORES).softmax(-1))
    assert chances(temperature=0.0).tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]
    torch.testing.assert_close(chances(temperature=1e-30)[0], torch.tensor([1.0, 0, 0, 0]))


def test_top_k():
    found = chances(top_k=2)
    torch.testing.assert_close(found[0, :2], SCORES[0, :2].softmax(-1))
    assert not found[0, 2:].any()
    torch.testing.assert_close(found[1], torch.full((4,), 0.25))  # ties are all left
    torch.testing.assert_close(chances(top_k=9), SCORES.softmax(-1))


def test_top_p():
    p = SCORES[0].softmax(-1)  # 0.64, 0.24, 0.09, 0.03
    for top_p, left in ((0.01, 1), (p[0].item() - 1e-3, 1), (p[0].item() + 1e-3, 2), (0.9, 3), (0.999, 4)):
        found = chances(top_p=top_p)[0]
        assert (found > 0).sum() == left
        torch.testing.assert_close(found[:left], p[:left] / p[:left].sum())
    assert (chances(top_p=0.5)[1] > 0).sum() == 2


def test_repetition_penalty():
    used = torch.tensor([[True, False, False, True], [False] * 4])
    found = Sampling(repetition_penalty=2.0).distribution(SCORES, used)
    torch.testing.assert_close(found[0], torch.tensor([1.0, 1.0, 0.0, -2.0]).softmax(-1))
    torch.testing.assert_close(found[1], torch.full((4,), 0.25))


def test_a_strong_penalty_repeats_nothing():
    model, prompt = small("crate_gpt"), ids(3)
    row = generate(model, prompt, 15, temperature=0.0, repetition_penalty=1e6)[0]
    assert len(set(row.tolist())) == len(set(prompt.tolist())) + 15
    assert len(set(generate(model, prompt, 15, temperature=0.0)[0].tolist())) < len(row)


def test_seeds():
    model = small("crate_gpt")
    first, same, other = (generate(model, [ids(3)] * 2, 12, seed=seed) for seed in (0, 0, 7))
    assert torch.equal(torch.stack(first), torch.stack(same))
    assert not torch.equal(torch.stack(first), torch.stack(other))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(generate(model, [ids(3)], 12, seed=1)[0], first[1])


def test_draws_follow_the_chances():
    model = small("crate_gpt", depth=1)
    prompt = ids(1, 3)
    with torch.no_grad():
        expected = model(prompt)[0, -1].softmax(-1)
    drawn = next(stream(model, prompt.expand(4000, -1), 1))
    shares = torch.bincount(drawn, minlength=31) / 4000
    assert (shares - expected).abs().max() < 0.03
    assert expected.max() > 0.1


# --- streaming, stopping, refusing ------------------------------------------------------------------------


def test_streams_what_it_will_have_written():
    model, prompts = small("tost_gpt"), [ids(3), ids(5, seed=1)]
    rows = generate(model, prompts, 6, seed=2)
    tokens = stream(model, prompts, 6, Sampling(seed=2))
    for t in range(6):
        assert next(tokens).tolist() == [rows[0][3 + t], rows[1][5 + t]]
    with pytest.raises(StopIteration):
        next(tokens)


@pytest.mark.parametrize("cache", [True, False])
def test_a_row_ends_at_the_stop(cache):
    model, prompts = small("crate_gpt"), [ids(3), ids(5, seed=1)]
    free = generate(model, prompts, 10, temperature=0.0)
    stop = int(free[0][5])
    expected = [row[: int(at[0]) + 1] if len(at := [i for i in range(n, len(row)) if row[i] == stop]) else row
                for row, n in zip(free, (3, 5), strict=True)]  # fmt: skip
    rows = generate(model, prompts, 10, temperature=0.0, stop=stop, cache=cache)
    assert [row.tolist() for row in rows] == [row.tolist() for row in expected]
    assert len(rows[0]) <= 6
    if len(rows[1]) > 8:
        written = torch.stack(list(stream(model, prompts, 10, Sampling(0.0), stop=stop, cache=cache)))
        assert (written[len(rows[0]) - 3 :, 0] == ENDED).all()


def test_nothing_to_write():
    prompts = [ids(3), ids(5)]
    assert [row.tolist() for row in generate(small("crate_gpt"), prompts, 0)] == [p.tolist() for p in prompts]


def test_prompts_in_any_form():
    model = small("crate_gpt")
    expected = generate(model, [[1, 2, 3]], 4)[0]
    for prompts in ([1, 2, 3],):
        assert torch.equal(generate(model, torch.tensor(prompts), 4)[0], expected)
        assert torch.equal(generate(model, torch.tensor([prompts], dtype=torch.int32), 4)[0], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"prompts": []}, "no prompts"),
        ({"prompts": [[1], []]}, "prompt 1 has shape"),
        ({"prompts": torch.tensor([[0.5]])}, "prompt 0 has shape .*float"),
        ({"prompts": [[99]]}, "tokens from 99 to 99"),
    ],
)
def test_what_cannot_be(options, message):
    given = {"prompts": [[1]], "max_new_tokens": 2, **options}
    with pytest.raises(ConfigError, match=message):
        generate(small("crate_gpt"), **given)


def test_a_masked_model_writes_nothing():
    model = create_model("crate_bert_bytes", **SMALL)
    with pytest.raises(ConfigError, match="masked model"):
        stream(model, [[1]], 2)
    with pytest.raises(ConfigError, match="masked model"):
        model.resume(ids(1, 2), Memory(1))


def test_scores_that_are_no_numbers():
    model = small("crate_gpt")
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with pytest.raises(NumericsError, match="scores hold NaN"):
        generate(model, [[1]], 2)

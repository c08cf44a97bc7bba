"""What causal steps keep of the tokens so far: rows that wait, rows that are taken, tokens taken back."""

import pytest
import torch

from pellucid.models import create_model
from pellucid.steps import Memory

SMALL = {"vocab_size": 31, "context": 24, "embed_dim": 24, "depth": 2, "num_heads": 3}
KEEPING = ["crate_gpt", "crate_overcomplete_gpt", "gpt2"]
every = pytest.mark.parametrize("kind", [*KEEPING, "tost_gpt"])


def small(kind):
    model = create_model(f"{kind}_bytes", **SMALL).double().eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter.copy_(parameter + 0.2 * noise)
    return model


def ids(*shape, seed=0):
    return torch.randint(0, 31, shape, generator=torch.Generator().manual_seed(seed))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@every
@torch.no_grad()
def test_a_row_may_wait_while_another_goes_on(kind):
    """Rows of 8 and 3 words, of which the second begins, or goes on, only later."""
    model, text = small(kind), ids(2, 8)
    whole = model.forward_features(text[:1]), model.forward_features(text[1:, :3])
    for cuts in (((0, 4, 8), (0, 0, 3)), ((0, 3, 5, 8), (0, 2, 2, 3)), ((0, 5, 5, 8), (0, 0, 1, 3))):
        memory, parts = Memory(2), ([], [])
        for start, stop in zip(range(len(cuts[0])), range(1, len(cuts[0])), strict=False):
            taken = [row[cut[start] : cut[stop]] for row, cut in zip(text, cuts, strict=True)]
            counts = torch.tensor([len(row) for row in taken])
            moved = model.resume(torch.nn.utils.rnn.pad_sequence(taken, batch_first=True), memory, counts)
            for part, row, count in zip(parts, moved, counts, strict=True):
                part.append(row[:count])
        for part, expected in zip(parts, whole, strict=True):
            close(torch.cat(part)[None], expected)
        assert memory.lengths.tolist() == [8, 3]
        assert memory.longest == 8


@every
@torch.no_grad()
def test_the_longest_row_is_what_counts_against_the_context(kind):
    model, text = small(kind), ids(2, 24)
    memory = Memory(2)
    model.resume(text[:, :12], memory, torch.tensor([12, 0]))
    model.resume(text[:, :12], memory, torch.tensor([0, 12]))
    assert memory.longest == 12
    last = model.resume(text[:, 12:], memory)
    close(last[:1], model.forward_features(text[:1])[:, 12:])


@every
@torch.no_grad()
def test_rows_are_taken_in_any_order_and_more_than_once(kind):
    model, text = small(kind), ids(3, 12)
    for counts in (None, torch.tensor([6, 2, 4])):
        lengths = [6, 6, 6] if counts is None else counts.tolist()
        memory, rows = Memory(3), torch.tensor([2, 0, 0, 1])
        model.resume(text[:, :6], memory, counts)
        memory.take(rows)
        new = ids(4, 3, seed=1)
        moved = model.resume(new[:, :1], memory), model.resume(new[:, 1:], memory)
        for i, row in enumerate(rows):
            full = torch.cat([text[row, : lengths[row]], new[i]])[None]
            close(torch.cat(moved, 1)[i : i + 1], model.forward_features(full)[:, lengths[row] :])


@pytest.mark.parametrize("kind", KEEPING)
@torch.no_grad()
def test_what_was_taken_back_was_never_said(kind):
    model, text = small(kind), ids(2, 10)
    for back in (torch.tensor([3, 3]), torch.tensor([0, 4])):
        memory = Memory(2)
        model.resume(text, memory)
        memory.forget(back)
        new = ids(2, 2, seed=1)
        moved = torch.cat([model.resume(new[:, :1], memory), model.resume(new[:, 1:], memory)], 1)
        for i, count in enumerate((10 - back).tolist()):
            full = torch.cat([text[i, :count], new[i]])[None]
            close(moved[i : i + 1], model.forward_features(full)[:, count:])

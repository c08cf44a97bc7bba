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


# --- what is held -----------------------------------------------------------------------------------------

LAYER = {"crate_gpt": 24 + 3 * 3, "gpt2": 2 * (24 + 3 * 3)}  # numbers of a token, its places among them


@pytest.mark.parametrize("kind", LAYER)
@pytest.mark.parametrize("counts", [None, torch.tensor([4, 6])])
@torch.no_grad()
def test_room_that_is_asked_for_is_all_that_is_taken(kind, counts):
    model, text, memory = small(kind), ids(2, 17), Memory(2, room=17)
    for start, stop in ((0, 6), *((i, i + 1) for i in range(6, 17))):
        model.resume(text[:, start:stop], memory, counts if start == 0 else None)
        assert memory.numel() == 2 * 2 * LAYER[kind] * 17
        assert memory.nbytes() == 8 * memory.numel()


@pytest.mark.parametrize("kind", LAYER)
@torch.no_grad()
def test_a_full_cache_doubles(kind):
    model, text, memory, rooms = small(kind), ids(1, 24), Memory(1, room=3), []
    for start, stop in ((0, 2), (2, 4), (4, 6), (6, 7), (7, 24)):
        model.resume(text[:, start:stop], memory)
        rooms.append(memory.nbytes() / (8 * 2 * LAYER[kind]))
    assert rooms == [3, 6, 6, 12, 24]


@every
@torch.no_grad()
def test_nothing_is_held_beside_what_is_kept(kind):
    """A view of a projection would hold all of it: of GPT-2 the queries too, of sums those of every token."""
    model, text, memory = small(kind), ids(1, 13), Memory(1)
    for part in (text[:, :9], text[:, 9:12], text[:, 12:]):
        model.resume(part, memory)
        assert memory.nbytes() == 8 * memory.numel()


@pytest.mark.parametrize("kind", LAYER)
@torch.no_grad()
def test_room_is_not_read_before_it_is_written(kind, monkeypatch):
    """Whatever stands in fresh memory: here it is NaN."""
    model, text = small(kind), ids(2, 12)
    inner = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **o: inner(*a, **o).fill_(torch.nan))
    for room in (0, 12):
        memory = Memory(2, room=room)
        model.resume(text[:, :4], memory, torch.tensor([4, 1]))
        moved = model.resume(text[:, 4:7], memory, torch.tensor([1, 3]))
        moved = model.resume(text[:, 7:8], memory)
        for i, seen in enumerate(([0, 1, 2, 3, 4, 7], [0, 4, 5, 6, 7])):
            close(moved[i : i + 1, 0], model.forward_features(text[i : i + 1, seen])[:, -1])


def test_a_mask_is_made_once_for_all_layers():
    memory = Memory(2)
    memory.expect(3)
    assert memory.visible is memory.visible
    assert memory.visible.tolist() == [[[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]]  # of even rows one for all
    memory.arrive()
    memory.expect(2, torch.tensor([1, 2]))
    assert memory.visible.tolist() == [[[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]]
    memory.arrive()
    memory.expect(1)
    assert memory.visible.tolist() == [[[[1, 1, 1, 1, 1, 0]]], [[[1, 1, 1, 1, 1, 1]]]]
    memory.arrive()
    assert memory._visible is None  # as large as the arriving tokens times all: nobody asks for it again

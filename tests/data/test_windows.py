"""Rows of words: that each word is told once, and that what is hidden depends on nothing but its place."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pellucid.data import (
    IGNORED,
    ByteTokenizer,
    StepSampler,
    TextSet,
    Windows,
    eval_token_loader,
    token_loader,
)
from pellucid.errors import ConfigError, DataError

BYTES = ByteTokenizer()
END = BYTES.end

lengths = st.lists(st.integers(0, 40), min_size=1, max_size=8)
contexts = st.integers(1, 15)


def texts(sizes, dtype=np.uint16, seed=0):
    """Documents of so many bytes; no two words of them are told apart by chance."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 256, sum(sizes)).astype(dtype)
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    names = [f"{i}.txt" for i in range(len(sizes))]
    return TextSet(ids, starts, np.array(sizes, dtype=np.int64), torch.arange(len(sizes)) % 3, names)


def lines(documents):
    """Each document with an end on either side, by hand."""
    return [[END, *documents.document(i).tolist(), END] for i in range(len(documents))]


def all_of(windows, epoch=0):
    return windows.__getitems__([(i, epoch) for i in range(len(windows))])


def counted_places(windows, line_of):
    """(line, place in it) of every counted target, checked to be the word that stands there."""
    found = []
    tokens, _, _ = all_of(windows)
    for i in range(len(windows)):
        line, begin = line_of(i)
        ids, targets = tokens.ids[i][tokens.real[i]].tolist(), tokens.targets[i].tolist()
        assert ids == line[begin : begin + len(ids)]
        for k, target in enumerate(targets):
            if target != IGNORED:
                assert target == line[begin + k + 1]
                found.append((id(line), begin + k + 1))
    return found


# --- the next word ------------------------------------------------------------------------------------


@given(lengths, contexts)
def test_every_word_is_told_once_and_no_row_leaves_its_document(sizes, context):
    documents = texts(sizes)
    windows = Windows(documents, BYTES, context)
    line = lines(documents)
    ends = documents.starts + np.arange(len(sizes) + 1)
    places = counted_places(
        windows, lambda i: (line[windows.document[i]], windows._first[i] - ends[windows.document[i]])
    )
    expected = [(id(part), place) for part in line for place in range(1, len(part))]
    assert sorted(places) == sorted(expected)
    assert windows.words == len(expected)
    assert windows.text_bytes == sum(sizes)


@given(lengths, contexts)
def test_rows_are_full_where_the_document_is_long_enough(sizes, context):
    windows = Windows(texts(sizes), BYTES, context)
    tokens, labels, index = all_of(windows)
    size = np.array(sizes)[windows.document] + 1
    assert tokens.real.sum(1).tolist() == np.minimum(context, size).tolist()
    assert tokens.ids.shape[1] == min(context, size.max())  # padded to the longest only
    assert (tokens.ids[~tokens.real] == END).all()
    assert (tokens.targets[~tokens.real] == IGNORED).all()
    assert labels.tolist() == (windows.document % 3).tolist()
    assert index.tolist() == list(range(len(windows)))


@given(lengths, contexts)
def test_packed_documents_are_one(sizes, context):
    documents = texts(sizes)
    windows = Windows(documents, BYTES, context, cross_documents=True)
    whole = [END] + [word for part in lines(documents) for word in part[1:]]
    places = counted_places(windows, lambda i: (whole, windows._first[i]))
    assert sorted(place for _, place in places) == list(range(1, len(whole)))
    assert windows.text_bytes == sum(sizes)
    assert (windows.labels == -1).all()
    assert len(windows) == -(-(len(whole) - 1) // context)


@given(lengths, contexts, st.sampled_from(["next", "masked"]))
def test_the_loss_of_a_batch_is_the_mean_of_its_parts(sizes, context, task):
    assume(task == "next" or any(sizes))
    windows = Windows(texts(sizes), BYTES, context, task=task)
    nats = torch.rand(300, dtype=torch.float64)

    def loss(batch):
        tokens, _, _ = batch
        counted = tokens.targets != IGNORED
        of_word = torch.where(counted, nats[tokens.targets.clamp_min(0)], 0.0)
        return (of_word.sum(1) * tokens.scale).mean()

    (whole,) = StepSampler(len(windows), 8, seed=1, steps=1)
    parts = list(StepSampler(len(windows), 8, seed=1, steps=1, accumulate=4))
    torch.testing.assert_close(
        loss(windows.__getitems__(whole)), torch.stack([loss(windows.__getitems__(p)) for p in parts]).mean()
    )
    tokens, _, _ = every = all_of(windows)  # an epoch's is the mean over its words, whatever the rows
    targets = tokens.targets[tokens.targets != IGNORED]
    assert len(targets) == windows.words
    torch.testing.assert_close(loss(every), nats[targets].mean(), rtol=1e-6, atol=1e-6)


# --- hidden words -------------------------------------------------------------------------------------


@given(lengths.filter(any), contexts, st.floats(0.01, 1), st.booleans())
def test_the_share_of_ordinary_words_that_is_hidden(sizes, context, share, packed):
    documents = texts(sizes)
    windows = Windows(
        documents, BYTES, context, task="masked", mask_share=share, seed=3, cross_documents=packed
    )
    tokens, _, _ = all_of(windows)
    hidden = tokens.targets != IGNORED
    whole = np.array([END] + [word for part in lines(documents) for word in part[1:]])
    shown = 0
    for i in range(len(windows)):
        row = whole[windows._first[i] :][: int(tokens.real[i].sum())]
        ordinary = row != END
        assert hidden[i].sum() == max(1, round(share * int(ordinary.sum())))
        assert not hidden[i][: len(row)][torch.from_numpy(~ordinary)].any()
        assert torch.equal(tokens.targets[i][hidden[i]], torch.from_numpy(row)[hidden[i][: len(row)]])
        seen = torch.where(hidden[i], tokens.targets[i], tokens.ids[i])[: len(row)]
        assert seen.tolist() == row.tolist()  # where nothing is hidden, what is read is what stands there
        shown += ordinary.sum()
    assert shown >= sum(sizes)  # every ordinary word is in some window
    assert windows.words == hidden.sum()


@settings(max_examples=20)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=4), st.integers(4, 15), st.integers(0, 2**40))
def test_a_row_depends_on_seed_epoch_and_index_alone(sizes, context, seed):
    windows = Windows(texts(sizes), BYTES, context, task="masked", seed=seed)
    tokens, _, _ = all_of(windows, epoch=5)
    for i in range(len(windows)):
        alone, _, _ = windows[i, 5]
        n = alone.ids.shape[1]
        assert torch.equal(alone.ids[0], tokens.ids[i, :n])
        assert torch.equal(alone.targets[0], tokens.targets[i, :n])
        assert (tokens.targets[i, n:] == IGNORED).all()


def test_other_seeds_and_epochs_hide_other_words():
    documents = texts([300] * 5)
    base = Windows(documents, BYTES, 50, task="masked", seed=1)
    same, other = all_of(base), all_of(Windows(documents, BYTES, 50, task="masked", seed=2))
    assert torch.equal(all_of(base)[0].targets, same[0].targets)
    assert not torch.equal(other[0].targets, same[0].targets)
    assert not torch.equal(all_of(base, epoch=1)[0].targets, same[0].targets)


def test_what_stands_for_hidden_words():
    documents = texts([4000] * 10)
    windows = Windows(documents, BYTES, 200, task="masked")
    tokens, _, _ = all_of(windows)
    hidden = tokens.targets != IGNORED
    read, told = tokens.ids[hidden], tokens.targets[hidden]
    n = len(told)
    assert n == windows.words == 30 * len(windows)  # 15 % of 200, of which an end may be one
    masked, same = read == BYTES.mask, read == told
    tolerance = 4 * 0.5 / n**0.5
    assert masked.sum() / n == pytest.approx(0.8, abs=tolerance)
    assert same.sum() / n == pytest.approx(0.1 + 0.1 / 256, abs=tolerance)
    random = read[~masked & ~same]
    counts = torch.bincount(random, minlength=256)
    assert len(counts) == 256  # never the end
    expected = len(random) / 256
    assert ((counts - expected) ** 2 / expected).sum() < 256 + 4 * (2 * 256) ** 0.5
    # each place of a row is hidden as often as another
    by_place = hidden.sum(0)[1:-1].float()
    expected = len(windows) * 0.15
    assert ((by_place - expected) ** 2 / (expected * 0.85)).sum() < 198 + 4 * (2 * 198) ** 0.5


def test_windows_with_nothing_to_hide_are_left_out():
    windows = Windows(texts([0, 5, 0, 3]), BYTES, 4, task="masked")
    assert windows.document.tolist() == [1, 1, 3]
    assert windows.labels.tolist() == [1, 1, 0]
    with pytest.raises(DataError, match="no window of 4 words holds a word to hide"):
        Windows(texts([0, 0]), BYTES, 4, task="masked")


# --- whole documents ----------------------------------------------------------------------------------


@given(lengths, contexts)
def test_the_beginning_of_each_document(sizes, context):
    documents = texts(sizes)
    windows = Windows(documents, BYTES, context, task="whole")
    tokens, labels, _ = all_of(windows)
    assert [row[real].tolist() for row, real in zip(tokens.ids, tokens.real, strict=True)] == [
        line[:context] for line in lines(documents)
    ]
    assert (tokens.targets == IGNORED).all()
    assert torch.equal(labels, documents.labels)
    assert (windows.words, windows.text_bytes) == (0, 0)


# --- batches ------------------------------------------------------------------------------------------


def same_batches(one, other):
    one, other = list(one), list(other)
    assert len(one) == len(other) > 0
    for (x, y, i), (x2, y2, i2) in zip(one, other, strict=True):
        assert torch.equal(y, y2)
        assert torch.equal(i, i2)
        assert all(torch.equal(a, b) for a, b in zip(x, x2, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("task", ["next", "masked"])
def test_going_on_at_a_step_gives_the_same_batches(task, workers):
    windows = Windows(texts([30, 7, 90, 1]), BYTES, 16, task=task, seed=4)
    whole = list(token_loader(windows, StepSampler(len(windows), 4, seed=2, steps=9, accumulate=2)))
    for start in (0, 5, 8):
        sampler = StepSampler(len(windows), 4, seed=2, steps=9, start=start, accumulate=2)
        same_batches(whole[2 * start :], token_loader(windows, sampler, workers=workers))


def test_evaluation_sees_every_window_once_in_order():
    windows = Windows(texts([30, 7, 90, 1]), BYTES, 16)
    batches = list(eval_token_loader(windows, batch_size=4))
    assert torch.cat([index for _, _, index in batches]).tolist() == list(range(len(windows)))
    assert (
        sum(int((x.targets != IGNORED).sum()) for x, _, _ in batches) == windows.words == 30 + 7 + 90 + 1 + 4
    )
    some = torch.cat([index for _, _, index in eval_token_loader(windows, batch_size=2, limit=3)])
    assert some.tolist() == [k * len(windows) // 3 for k in range(3)]
    with pytest.raises(ConfigError, match="batch size 0"):
        eval_token_loader(windows, batch_size=0)


def test_types():
    for dtype in (np.uint16, np.int32):
        ((tokens, labels, index),) = [all_of(Windows(texts([9, 5], dtype), BYTES, 4, task="masked"))]
        assert (tokens.ids.dtype, tokens.targets.dtype) == (torch.int64, torch.int64)
        assert (tokens.real.dtype, tokens.scale.dtype) == (torch.bool, torch.float32)
        assert (labels.dtype, index.dtype) == (torch.int64, torch.int64)


def test_names():
    documents = texts([10, 2])
    windows = Windows(documents, BYTES, 4)
    assert [windows.name(i) for i in range(len(windows))] == [
        "0.txt, words 0 to 4",
        "0.txt, words 4 to 8",
        "0.txt, words 7 to 11",
        "1.txt, words 0 to 3",
    ]
    assert Windows(documents, BYTES, 4, task="whole").name(1) == "1.txt"
    packed = Windows(documents, BYTES, 4, cross_documents=True)
    assert [packed.name(i) for i in range(len(packed))] == [
        "0.txt, words 0 to 4",
        "0.txt, words 4 to 8",
        "0.txt, words 8 to 12",
        "0.txt, from word 10 on",
    ]


def test_bytes_that_hidden_words_stand_for():
    documents = texts([100, 50])
    documents.sizes = np.array([300, 50])  # as if three bytes were a word in the first
    windows = Windows(documents, BYTES, 1000, task="masked", mask_share=0.5)
    assert (windows.words, windows.text_bytes) == (75, 50 * 3 + 25)


def test_what_cannot_be():
    documents = texts([5])
    with pytest.raises(ConfigError, match="context 0"):
        Windows(documents, BYTES, 0)
    with pytest.raises(ConfigError, match="task is 'nxt' - give next, masked, whole"):
        Windows(documents, BYTES, 4, task="nxt")
    with pytest.raises(ConfigError, match="leave out cross_documents"):
        Windows(documents, BYTES, 4, task="whole", cross_documents=True)
    for share in (0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="mask share"):
            Windows(documents, BYTES, 4, task="masked", mask_share=share)
    with pytest.raises(DataError, match="0 documents"):
        Windows(texts([]), BYTES, 4)


@settings(max_examples=10)
@given(st.integers(0, 2**32))
def test_many_documents_at_once_are_found_as_one_by_one(seed):
    sizes = np.random.default_rng(seed).integers(0, 30, 200).tolist()
    documents = texts(sizes, seed=seed)
    windows = Windows(documents, BYTES, 8)
    tokens, _, _ = all_of(windows)
    told = tokens.targets[tokens.targets != IGNORED].tolist()
    assert told == [word for line in lines(documents) for word in line[1:]]

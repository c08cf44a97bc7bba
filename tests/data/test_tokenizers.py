"""Words and back: nothing is lost, nothing depends on the run, and other libraries read the same."""

import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.data import BPETokenizer, ByteTokenizer, find_tokenizer, read_tokenizer, train_bpe
from pellucid.data.words import LETTERS
from pellucid.errors import ConfigError, DataError

library = pytest.importorskip("tokenizers")

TEXTS = [
    "It was the best of times, it was the worst of times;\n\n  it was the age of wisdom, it's 1859!\n",
    "def rate(z, eps=0.1):\n    return logdet(eye + z @ z.T / eps)  # naïve façade, ½ π ≈ 1.57\n",
    "Es war einmal mitten im Winter, und die Schneeflocken fielen wie Federn. 雪が降る。 \N{SNOWFLAKE}\r\n",
] * 4

# What a rule about letters, numbers and space may be wrong about.
SPACES = [" ", "  ", "\n", "\r", "\t", "\x0b", "\x1c", "\x85", "\xa0", "\u180e", "\u2003", "\u200b", "\0"]
PIECES = ["a", "B", "é", "é", "漢", "\N{SNOWFLAKE}", "1", "²", "Ⅳ", "'s", "'", "!", "_", "<|endoftext|>"]
awkward = st.lists(
    st.sampled_from(SPACES) | st.sampled_from(PIECES) | st.characters(exclude_categories=["Cs"]), max_size=14
).map("".join)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([text.encode() for text in TEXTS], 400)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return ByteTokenizer() if request.param == "bytes" else bpe


# --- every tokenizer ----------------------------------------------------------------------------------


@given(data=st.binary(max_size=40))
def test_any_bytes_come_back(tokenizer, data):
    ids = tokenizer.encode(data)
    assert ids.dtype == np.int32
    assert not set(ids.tolist()) & tokenizer.special
    assert tokenizer.decode(ids) == data


@given(text=awkward)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text.encode())) == text.encode()


@given(text=awkward)
def test_the_library_reads_the_same_words(tokenizer, text):
    text = text.replace("<|endoftext|>", "")
    theirs = library.Tokenizer.from_str(tokenizer.to_json())
    assert theirs.encode(text).ids == tokenizer.encode(text.encode()).tolist()
    assert theirs.decode(theirs.encode(text).ids) == text


def test_transformers_reads_the_same_words(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in TEXTS[:3]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text.encode()).tolist()
        assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs("<|endoftext|>")["input_ids"] == [tokenizer.end]
    assert len(theirs) == tokenizer.vocab_size
    theirs.save_pretrained(tmp_path / "again")  # as that library writes it
    again = read_tokenizer(tmp_path / "again")
    assert type(again) is type(tokenizer)
    assert again.fingerprint == tokenizer.fingerprint


def test_a_file_gives_the_same_tokenizer(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        again = read_tokenizer(path)
        assert again.fingerprint == tokenizer.fingerprint
        assert (again.end, again.mask, again.special) == (tokenizer.end, tokenizer.mask, tokenizer.special)
        assert again.encode(TEXTS[1].encode()).tolist() == tokenizer.encode(TEXTS[1].encode()).tolist()


def test_special_words(tokenizer):
    assert {tokenizer.end, tokenizer.mask} <= tokenizer.special
    assert tokenizer.special <= set(range(tokenizer.vocab_size))
    spelt = f"a{tokenizer.piece(tokenizer.end)}b{tokenizer.piece(tokenizer.mask)}".encode()
    assert not set(tokenizer.encode(spelt).tolist()) & tokenizer.special  # a text may speak of them
    assert tokenizer.decode([tokenizer.end, *tokenizer.encode(b"hi"), tokenizer.mask]) == b"hi"


def test_what_is_no_word(tokenizer):
    for word in (tokenizer.vocab_size, -1):
        with pytest.raises(ConfigError, match=rf"word {word}, .* use the tokenizer that the model"):
            tokenizer.decode([0, word])
        with pytest.raises(ConfigError, match=f"word {word}"):
            tokenizer.piece(word)


def test_every_piece_can_be_shown(tokenizer):
    assert all(tokenizer.piece(word).isprintable() for word in range(tokenizer.vocab_size))


def test_processes_are_told_what_it_is(tokenizer):
    again = copy.deepcopy(tokenizer)  # by what is sent to a spawned worker
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode(b"the age").tolist() == tokenizer.encode(b"the age").tolist()


@pytest.mark.parametrize("block", [1, 200, 2**20])
def test_each_of_many(tokenizer, block, monkeypatch):
    """Short ones together, long ones alone, among them what is no text."""
    encoded = [b"", *(text.encode() for text in TEXTS), b"\xff in \xc3", b"", b"the last"]
    one_by_one = [tokenizer.encode(text).tolist() for text in encoded]
    monkeypatch.setattr("pellucid.data.bpe._BLOCK", block)
    together = list(tokenizer.encode_each(iter(encoded)))
    assert [ids.tolist() for ids in together] == one_by_one


# --- bytes --------------------------------------------------------------------------------------------


def test_bytes():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(bytes(range(256))).tolist() == list(range(256))
    assert (tokenizer.vocab_size, tokenizer.end, tokenizer.mask) == (257, 256, 256)
    assert [tokenizer.piece(word) for word in (10, 65, 92, 195, 256)] == [
        "\\n",
        "A",
        "\\",
        "\\xc3",
        "<|endoftext|>",
    ]
    assert tokenizer.encode(b"x").flags.writeable


def test_the_letters_are_those_of_the_library():
    letters = library.pre_tokenizers.ByteLevel.alphabet()
    assert set(letters) == set(LETTERS)
    assert list(LETTERS.values()) == list(range(256))


def test_bytes_need_no_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text(ByteTokenizer().to_json(), encoding="utf-8")
    assert read_tokenizer(tmp_path).name == find_tokenizer("bytes").name == "bytes"


def test_nothing_else_is_taken_for_bytes(bpe, tmp_path):
    found = json.loads(ByteTokenizer().to_json())
    changes = [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": found["pre_tokenizer"] | {"add_prefix_space": True}},
        {"model": found["model"] | {"merges": [["t", "h"]], "vocab": found["model"]["vocab"] | {"th": 257}}},
    ]
    for change in changes:
        (tmp_path / "tokenizer.json").write_text(json.dumps(found | change), encoding="utf-8")
        other = read_tokenizer(tmp_path)
        assert isinstance(other, BPETokenizer)
        assert other.fingerprint != ByteTokenizer().fingerprint


# --- BPE ----------------------------------------------------------------------------------------------


def test_training_is_a_function_of_the_texts(bpe):
    for _ in range(5):
        assert train_bpe([text.encode() for text in TEXTS], 400).to_json() == bpe.to_json()
    assert train_bpe([b"another text, another text"], 400).fingerprint != bpe.fingerprint


@pytest.mark.slow
def test_training_is_the_same_in_other_processes(bpe):
    code = (
        "from pellucid.data import train_bpe\n"
        f"print(train_bpe([text.encode() for text in {TEXTS!a}], 400).fingerprint)"
    )
    for hashes in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": hashes, "RAYON_NUM_THREADS": hashes},
        )
        assert done.stdout.strip() == bpe.fingerprint


def test_words_of_a_trained_one(bpe):
    assert (bpe.name, bpe.vocab_size, bpe.end, bpe.mask, bpe.special) == ("bpe", 400, 0, 1, {0, 1})
    assert len(bpe.encode(TEXTS[0].encode())) < len(TEXTS[0]) / 2
    assert " was" in {bpe.piece(word) for word in range(400)}
    small = train_bpe([b"ab"], 8192)
    assert small.vocab_size == 258  # nothing occurs twice
    assert train_bpe([], 258).decode([*small.encode("né".encode())]) == "né".encode()


@settings(max_examples=30)
@given(text=awkward, again=st.integers(1, 3))
def test_long_texts_are_cut_where_nothing_changes(bpe, text, again):
    """Blocks of a few characters, and a small memory, give the words that the library finds in the whole."""
    whole = text * again
    cut = copy.deepcopy(bpe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pellucid.data.bpe._BLOCK", 3)
        patch.setattr("pellucid.data.bpe._KNOWN", 5)
        ids = cut.encode(whole.encode()).tolist()
    assert len(cut._known) <= 5
    assert ids == bpe._inner.encode(whole, add_special_tokens=False).ids


def test_others_tokenizers(tmp_path):
    """One that lower-cases, ends texts by another name, and knows no mask."""
    inner = library.Tokenizer(
        library.models.WordLevel({"[UNK]": 0, "the": 1, "end": 2, "</s>": 3}, unk_token="[UNK]")
    )
    inner.normalizer = library.normalizers.Lowercase()
    inner.pre_tokenizer = library.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["</s>"])
    inner.enable_truncation(2)
    inner.enable_padding(length=9)
    inner.save(str(tmp_path / "tokenizer.json"))
    other = read_tokenizer(tmp_path)
    assert (other.end, other.mask, other.vocab_size) == (3, 4, 5)
    assert other.piece(4) == "<|mask|>"
    assert other.encode(b"The END the the \xff x").tolist() == [1, 2, 1, 1, 0, 0]
    assert other.decode([1, 2, 3, 1]) == b"the end the"


def test_a_tokenizer_with_other_rules_reads_whole_texts():
    """Llama's kind: byte-level, but pieces go across the borders at which GPT-2's end."""
    inner = library.Tokenizer.from_str(train_bpe([text.encode() for text in TEXTS], 300).to_json())
    split = library.pre_tokenizers.Split(library.Regex(r" ?[^\s]+[\r\n]*|\s+"), "isolated")
    inner.pre_tokenizer = library.pre_tokenizers.Sequence(
        [split, library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    other = BPETokenizer(inner.to_str(), "other")
    text = "one\n\ntwo\r\n three"
    assert other.encode(text.encode()).tolist() == inner.encode(text).ids
    assert other.decode(other.encode(b"one\xff\n")) == b"one\xff\n"
    each = other.encode_each([text.encode(), b"two"])
    assert [ids.tolist() for ids in each] == [inner.encode(text).ids, inner.encode("two").ids]


# --- by name ------------------------------------------------------------------------------------------


def test_names(tmp_path, monkeypatch):
    assert isinstance(find_tokenizer("bytes"), ByteTokenizer)
    with pytest.raises(ConfigError, match="'byts' - did you mean 'bytes'"):
        find_tokenizer("byts")
    with pytest.raises(
        ConfigError, match=r"called 'zzzz' - known: bytes, bpe, gpt2, the path of a tokenizer.json"
    ):
        find_tokenizer("zzzz")
    with pytest.raises(DataError, match=r"cannot read .*tokenizer.json: No such file or directory"):
        find_tokenizer(str(tmp_path))
    for text in ("", "{", "[]", "{}", '{"model": {"type": "BPE"}}', '{"model": {"vocab": 3}}', "\udcff"):
        (tmp_path / "tokenizer.json").write_text(text, errors="surrogateescape", encoding="utf-8")
        with pytest.raises(DataError, match=r"is no tokenizer.json"):
            find_tokenizer(str(tmp_path))


def test_too_few_words():
    with pytest.raises(ConfigError, match="vocab_size 257 - give at least 258"):
        train_bpe([b"x"], 257)


def test_the_extra_is_named_when_it_is_missing(monkeypatch, bpe):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install 'pellucid\[lm\]'"):
        train_bpe([b"x"], 300)
    with pytest.raises(DataError, match=r"pip install 'pellucid\[lm\]'"):
        BPETokenizer(bpe.to_json(), "x")


def test_gpt2_from_what_is_kept_or_from_the_hub(monkeypatch, tmp_path, bpe):
    hub = pytest.importorskip("huggingface_hub")
    kept = tmp_path / "kept.json"
    asked = []

    def download(repository, file, local_files_only=False):
        asked.append((repository, local_files_only))
        if repository == "gpt2" and local_files_only and kept.exists():
            return str(kept)
        raise FileNotFoundError("no connection\nand more")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    with pytest.raises(DataError, match=r"gpt2 from the hub - check the connection.*\n.*no connection\)$"):
        find_tokenizer("gpt2")
    assert asked == [("openai-community/gpt2", True), ("gpt2", True), ("openai-community/gpt2", False)]
    kept.write_text(bpe.to_json().replace("<|mask|>", "Ġmask"), encoding="utf-8")  # as GPT-2, without one
    gpt2 = find_tokenizer("gpt2")
    assert (gpt2.name, gpt2.end, gpt2.mask, gpt2.vocab_size) == ("gpt2", 0, 400, 401)

"""From a name to documents: what is read, what is named and left out, and which side it is on."""

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid.data import ByteTokenizer, TextSet, Windows, load_text
from pellucid.data.corpora import holds_text, is_text
from pellucid.data.readings import read_corpus
from pellucid.errors import ConfigError, DataError

pytest.importorskip("tokenizers")


def write(root, files):
    """Files of text, bytes or rows, by their paths."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "\n".join(map(json.dumps, content))
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def several(count, folder="", suffix=".txt"):
    return {f"{folder}{i:02}{suffix}": f"text {i} of {folder or 'all'}\n" * (i + 1) for i in range(count)}


def texts_of(part, tokenizer=None):
    tokenizer = tokenizer or ByteTokenizer()
    return [tokenizer.decode(part.document(i)).decode() for i in range(len(part))]


def names_of(part):
    return [part.name(i) for i in range(len(part))]


# --- folders ------------------------------------------------------------------------------------------


def test_a_folder_of_texts_at_any_depth(tmp_path):
    files = (
        several(10) | several(10, "sub/deeper/", ".md") | {"README": "no extension\n", "code.py": "x = 1\n"}
    )
    write(tmp_path, files | {"cover.png": b"\x89PNG", ".hidden.txt": "x", "table.csv": "1,2"})
    data = load_text(tmp_path)
    assert data.name == tmp_path.name
    assert (len(data.train), len(data.test)) == (20, 2)
    found = dict(
        zip(
            names_of(data.train) + names_of(data.test),
            texts_of(data.train) + texts_of(data.test),
            strict=True,
        )
    )
    assert found == files
    assert names_of(data.train) == sorted(names_of(data.train))
    assert data.train.ids.dtype == np.uint16
    assert data.train.sizes.tolist() == [len(text) for text in texts_of(data.train)]
    assert data.train.starts.dtype == data.train.sizes.dtype == np.int64
    assert (data.train.labels == -1).all()
    assert data.class_names == []
    assert data.rejects == ()
    assert load_text(data) is data


def test_the_split_is_a_function_of_the_texts_and_the_seed(tmp_path):
    write(tmp_path, several(40))
    first, again = load_text(tmp_path), load_text(str(tmp_path))
    assert names_of(first.test) == names_of(again.test)
    assert first.fingerprint == again.fingerprint
    assert np.array_equal(first.train.ids, again.train.ids)
    other = load_text(tmp_path, split_seed=1)
    assert names_of(other.test) != names_of(first.test)
    assert other.fingerprint != first.fingerprint
    assert len(load_text(tmp_path, test_fraction=0.5).test) == 20
    with pytest.raises(ConfigError, match="test fraction 1"):
        load_text(tmp_path, test_fraction=1)


@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=40).filter(lambda n: len(set(n)) > 1), st.integers(0, 99)
)
def test_equal_texts_are_on_one_side(numbers, seed):
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), {"x.jsonl": [{"text": f"text {n}"} for n in numbers]}) / "x.jsonl"
        data = load_text(path, split_seed=seed, test_fraction=0.3)
    train, test = texts_of(data.train), texts_of(data.test)
    assert sorted(train + test) == sorted(f"text {n}" for n in numbers)
    assert train
    assert test
    assert not set(train) & set(test)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test", "Test"])
def test_a_split_is_taken_as_it_is(tmp_path, name):
    write(tmp_path, several(5, "train/") | several(3, f"{name}/") | {"elsewhere/x.txt": "x"})
    data = load_text(tmp_path)
    assert names_of(data.train) == [f"train/{i:02}.txt" for i in range(5)]
    assert names_of(data.test) == [f"{name}/{i:02}.txt" for i in range(3)]
    with pytest.raises(ConfigError, match="brings its own split"):
        load_text(tmp_path, test_fraction=0.1)


def test_a_split_by_the_names_of_files(tmp_path):
    write(
        tmp_path, {"wiki.train.txt": "a b", "wiki.valid.txt": "a b", "wiki.test.txt": "c", "README.md": "d"}
    )
    data = load_text(tmp_path)
    assert (texts_of(data.train), texts_of(data.test)) == (["a b"], ["a b"])
    assert data.notes == (
        "2 files that are neither train nor valid are ignored",
        "1 test texts are also in train, so scores will be too good",
    )
    whole = load_text(tmp_path, test_only=True)
    assert whole.train is whole.test
    assert texts_of(whole.test) == ["a b"]


def test_classes_are_folders(tmp_path):
    write(tmp_path, several(10, "cat/") | several(20, "ape/deeper/"))
    for labels in ("required", "optional"):
        data = load_text(tmp_path, labels=labels)
        assert data.class_names == ["ape", "cat"]
        assert (data.train.labels.bincount().tolist(), data.test.labels.bincount().tolist()) == (
            [18, 9],
            [2, 1],
        )
        assert [name.startswith("cat/") for name in names_of(data.train)] == (data.train.labels == 1).tolist()


def test_labels_that_cannot_be_used_are_put_aside(tmp_path):
    write(tmp_path, several(10, "cat/") | {"ape/only.txt": "one"})
    data = load_text(tmp_path)
    assert data.class_names == []
    assert (data.train.labels == -1).all()
    assert data.notes == (
        'taken without labels: class "ape" has 1 text and cannot be split into train and test',
    )
    with pytest.raises(DataError, match=r'class "ape" has 1 text and cannot be split .* - add texts'):
        load_text(tmp_path, labels="required")
    write(tmp_path, {"ape/other.txt": "two", "loose.txt": "three"})
    assert load_text(tmp_path).notes == ("taken without labels: 1 of 13 texts have no label",)
    assert load_text(tmp_path, labels="required").notes[0].endswith("are in no class and ignored")
    write(tmp_path, {"figures/x.png": b"x"})
    assert load_text(tmp_path, labels="required").notes[0].endswith("are no classes: figures")


def test_no_labels_where_they_are_required(tmp_path):
    write(tmp_path, several(10))
    with pytest.raises(DataError, match=r"no labels - .* - give each class a folder of its own"):
        load_text(tmp_path, labels="required")
    with pytest.raises(DataError, match="only one class"):
        load_text(write(tmp_path / "one", several(10, "cat/")), labels="required")
    write(tmp_path / "two", several(4, "train/a/") | several(4, "train/b/") | several(4, "test/c/"))
    with pytest.raises(DataError, match='classes without training texts: "c"'):
        load_text(tmp_path / "two", labels="required")


# --- what is bad --------------------------------------------------------------------------------------


def test_bad_files_are_named_and_left_out(tmp_path):
    write(tmp_path, several(20) | {"bad.txt": b"\xff\xfe\xff", "empty.txt": b"", "blank.txt": b" \n\t"})
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "loop").symlink_to(tmp_path / "sub")
    with pytest.raises(
        DataError, match=r"4 of 24 texts rejected \(16.67%, limit 1.00%\).*raise --max-bad"
    ) as caught:
        load_text(tmp_path)
    assert "pipe.txt: not a regular file (named pipe)" in str(caught.value)
    data = load_text(tmp_path, max_bad=0.2)
    assert {os.path.basename(path): reason for path, reason in data.rejects} == {
        "bad.txt": "not UTF-16: byte 0xff at 2",
        "blank.txt": "nothing but space",
        "empty.txt": "empty file",
        "pipe.txt": "not a regular file (named pipe)",
    }
    assert len(data.train) + len(data.test) == 20
    assert any("sub/loop is a link to a folder, not followed" in note for note in data.notes)


def test_marks_and_line_ends_do_not_make_other_texts(tmp_path):
    write(
        tmp_path,
        several(10)
        | {"a.txt": "one\ntwo", "b.txt": b"\xef\xbb\xbfone\r\ntwo", "c.txt": "one\ntwo".encode("utf-16")},
    )
    data = load_text(tmp_path)
    sides = [texts_of(part).count("one\ntwo") for part in (data.train, data.test)]
    assert sorted(sides) == [0, 3]


def test_hostile_names(tmp_path):
    write(tmp_path, several(10))
    raw = os.fsencode(tmp_path)
    for name in (b"new\nline.txt", b"esc\x1b[31m.txt", b"\xff\xfe.txt"):
        with open(os.path.join(raw, name), "wb") as file:
            file.write(b"text of " + name.replace(b"\xff\xfe", b"?"))
    with open(os.path.join(raw, b"bad\n.txt"), "wb") as file:
        file.write(b"\xff")
    data = load_text(tmp_path, max_bad=0.1)
    assert all(name.isprintable() for name in names_of(data.train) + names_of(data.test))
    assert data.rejects[0].path.endswith("bad\n.txt")  # as the file system has it
    with pytest.raises(DataError) as caught:
        load_text(tmp_path)
    assert str(caught.value).count("\n") == 1


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match="no folder and no file is called"):
        load_text(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no text found under .*empty - put .txt files there"):
        load_text(tmp_path / "empty")
    write(tmp_path / "pictures", {"a.png": "x", "sub/b.png": "x", "c.jpg": "x"})
    with pytest.raises(DataError, match=r"no text found under .*pictures \(it holds 2 .png, 1 .jpg\)"):
        load_text(tmp_path / "pictures")
    write(tmp_path / "deep" / "inside", several(3, "train/") | several(3, "val/"))
    (tmp_path / "half" / "val").mkdir(parents=True)
    write(tmp_path / "half", several(3, "train/"))
    with pytest.raises(DataError, match=r"no text found under .*half/val"):
        load_text(tmp_path / "half")


def test_one_text_alone(tmp_path):
    write(tmp_path, {"a.txt": "some words"})
    with pytest.raises(
        DataError, match=r"1 text cannot be split .* - add texts, or name the file itself, which is cut"
    ):
        load_text(tmp_path)
    with pytest.raises(DataError, match=r"1 text cannot be split .* - it is too short to be cut"):
        load_text(tmp_path / "a.txt")
    write(tmp_path, {"b.txt": "some words"})
    with pytest.raises(DataError, match="1 text 2 times cannot be split"):
        load_text(tmp_path)
    assert texts_of(load_text(tmp_path, test_only=True).test) == ["some words"] * 2


# --- one file, and lines of JSON ----------------------------------------------------------------------


def test_a_file_alone_is_cut_into_parts(tmp_path):
    text = "\n\n".join(f"{i}: " + "some words " * 20 for i in range(200))
    write(tmp_path, {"book.txt": text})
    data = load_text(tmp_path / "book.txt")
    assert data.name == "book.txt"
    found = sorted(
        zip(
            names_of(data.train) + names_of(data.test),
            texts_of(data.train) + texts_of(data.test),
            strict=True,
        ),
        key=lambda item: int(item[0].split()[-1]),
    )
    assert [name for name, _ in found] == [f"book.txt, part {i}" for i in range(1, len(found) + 1)]
    assert "".join(part for _, part in found) == text
    assert len(data.test) == round(0.1 * len(found))


def test_lines_of_json(tmp_path):
    rows = [{"text": f"text {i}\r\n", "label": ["no", "yes"][i % 2], "more": [1]} for i in range(20)]
    write(tmp_path, {"x.jsonl": b"\xef\xbb\xbf" + "\n".join(map(json.dumps, rows)).encode() + b"\n\n  \n"})
    data = load_text(tmp_path / "x.jsonl", labels="required")
    assert data.class_names == ["no", "yes"]
    assert (len(data.train), len(data.test)) == (18, 2)
    number = [int(text.split()[1]) for text in texts_of(data.train)]
    assert names_of(data.train) == [f"x.jsonl, line {i + 1}" for i in number]
    assert data.train.labels.tolist() == [i % 2 for i in number]
    assert all(text.endswith("\n") and "\r" not in text for text in texts_of(data.train))


def test_folders_of_lines(tmp_path):
    train = [{"text": f"train {i}", "label": i % 10} for i in range(30)]
    test = [{"text": f"test {i}", "label": i % 10} for i in range(10)]
    write(
        tmp_path / "a",
        {"train-0.jsonl": train[:15], "train-1.jsonl": train[15:], "test.jsonl": test, "README.md": "x"},
    )
    write(tmp_path / "b", {"train/0.jsonl": train, "val/0.jsonl": test})
    for folder in "ab":
        data = load_text(tmp_path / folder)
        assert (texts_of(data.train), texts_of(data.test)) == (
            [f"train {i}" for i in range(30)],
            [f"test {i}" for i in range(10)],
        )
        assert data.class_names == [str(i) for i in range(10)]  # as numbers, not "1", "10", "2"
        assert data.test.labels.tolist() == list(range(10))
    assert load_text(tmp_path / "a").notes == ("1 texts beside the .jsonl are ignored",)
    write(tmp_path / "c", {"0.jsonl": train, "deeper/1.jsonl": test})
    assert len(load_text(tmp_path / "c").train) == 30  # of each of ten classes one of four is held back


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "no JSON"),
        ('{"text": "a"', "no JSON"),
        ("[1, 2]", "no object, but a list"),
        ('"text"', "no object, but text"),
        ('{"content": "a", "id": 1}', "no field 'text', but content, id"),
        ("{}", "no field 'text', but none at all"),
        ('{"text": 3}', "'text' is a number"),
        ('{"text": ["a"]}', "'text' is a list"),
        ('{"text": "a", "label": 0.5}', "'label' is a number, not text or a whole number"),
        ('{"text": "a", "label": true}', "'label' is true or false"),
        ('{"text": "\\ud800"}', "surrogate"),
        ('{"text": "\udcff"}', "not UTF-8: byte 0xff"),
        ("[" * 100_000, "no JSON"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "no JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, reason):
    good = [json.dumps({"text": f"text {i}"}) for i in range(20)]
    content = "\n".join([*good[:3], line, *good[3:]]).encode("utf-8", "surrogateescape")
    path = write(tmp_path, {"x.jsonl": content}) / "x.jsonl"
    data = load_text(path, max_bad=0.1)
    assert len(data.train) + len(data.test) == 20
    ((where, why),) = data.rejects
    assert where == f"{path}, line 4"
    assert reason in why
    with pytest.raises(DataError, match=r"x\.jsonl, line 4: "):
        load_text(path)


def test_lines_without_text_are_passed_over(tmp_path):
    rows = [{"text": f"text {i}"} for i in range(20)] + [{"text": ""}, {"text": None}, {"text": " \n"}]
    data = load_text(write(tmp_path, {"x.jsonl": rows}) / "x.jsonl")
    assert len(data.train) + len(data.test) == 20
    assert data.notes == ("3 rows without text are passed over",)
    with pytest.raises(DataError, match=r"no text found in .* - add lines"):
        load_text(write(tmp_path, {"y.jsonl": rows[20:]}) / "y.jsonl")


# --- tables -------------------------------------------------------------------------------------------


@pytest.fixture
def tables(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def save(features=None, **splits):
        made = {name: datasets.Dataset.from_dict(rows) for name, rows in splits.items()}
        if features:
            made = {
                name: rows.cast(datasets.Features(features(datasets, rows))) for name, rows in made.items()
            }
        datasets.DatasetDict(made).save_to_disk(tmp_path / "set")
        return f"hf:{tmp_path / 'set'}"

    return save


def test_a_table(tables):
    rows = {"text": [f"text {i}" if i % 4 else "" for i in range(40)], "label": [i % 2 for i in range(40)]}
    spec = tables(
        lambda datasets, rows: rows.features | {"label": datasets.ClassLabel(names=["neg", "pos"])},
        train=rows,
        test={"text": ["one", "two"], "label": [0, 1]},
    )
    data = load_text(spec)
    assert (data.name, data.class_names) == ("set", ["neg", "pos"])
    assert texts_of(data.train) == [text for text in rows["text"] if text]
    assert data.train.labels.tolist() == [i % 2 for i in range(40) if i % 4]
    assert data.train.name(0) == f"{spec.removeprefix('hf:')}/train[1]"
    assert data.notes == ("10 rows without text are passed over",)
    held_back = load_text(f"{spec}?split=train&label=label")
    assert len(held_back.train) + len(held_back.test) == 30


def test_a_label_that_is_unknown(tables):
    spec = tables(
        lambda datasets, rows: rows.features | {"label": datasets.ClassLabel(names=["neg", "pos"])},
        train={"text": [f"text {i}" for i in range(20)], "label": [i % 3 - 1 for i in range(20)]},
    )
    assert load_text(spec).notes == ("taken without labels: 7 of 20 texts have no label",)


def test_columns_of_a_table(tables):
    rows = {"body": [f"text {i}" for i in range(20)], "stars": [i % 3 - 1 for i in range(20)]}
    spec = tables(train=rows)
    data = load_text(f"{spec}?label=stars", labels="required")
    assert data.class_names == ["-1", "0", "1"]  # a number like any other
    assert load_text(spec).class_names == []
    for query, message in {
        "?text=stars": "no column of text 'stars'",
        "?label=nothing": "no column 'nothing'",
        "?image=body": "has the option 'image'",
    }.items():
        with pytest.raises((DataError, ConfigError), match=message):
            load_text(spec + query)


def test_which_column_is_text(tables):
    rows = {"title": [f"title {i}" for i in range(20)], "body": [f"text {i}" for i in range(20)]}
    spec = tables(train=rows)
    with pytest.raises(
        DataError, match=r"has the columns of text title, body - choose one: hf:.*\?text=title"
    ):
        load_text(spec)
    assert texts_of(load_text(f"{spec}?text=body").train)[0].startswith("text")


def test_the_extra_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the package 'datasets' - pip install 'pellucid\[lm\]'"):
        load_text("hf:owner/name")


# --- words --------------------------------------------------------------------------------------------


def test_a_tokenizer_is_trained_on_the_training_texts_alone(tmp_path):
    write(tmp_path, several(5, "train/") | {"val/x.txt": "zyzzyva " * 50})
    data = load_text(tmp_path, tokenizer="bpe", vocab_size=300)
    assert data.tokenizer.name == "bpe"
    assert texts_of(data.train, data.tokenizer) == list(several(5, "train/").values())
    assert texts_of(data.test, data.tokenizer) == ["zyzzyva " * 50]
    assert len(data.test.document(0)) >= 7 * 50  # none of it was seen
    (tmp_path / "tokenizer.json").write_text(data.tokenizer.to_json(), encoding="utf-8")
    again = load_text(tmp_path, tokenizer=tmp_path / "tokenizer.json")
    assert np.array_equal(again.train.ids, data.train.ids)
    assert again.fingerprint == data.fingerprint == load_text(tmp_path).fingerprint


def test_a_large_corpus_trains_a_tokenizer_on_every_kth_text(tmp_path, monkeypatch):
    write(tmp_path, several(20, "train/") | several(2, "val/"))
    seen = []
    monkeypatch.setattr("pellucid.data.documents.TRAIN_BYTES", 1000)
    monkeypatch.setattr(
        "pellucid.data.documents.train_bpe", lambda texts, vocab_size: seen.extend(texts) or ByteTokenizer()
    )
    load_text(tmp_path, tokenizer="bpe")
    texts = [text.encode() for text in several(20, "train/").values()]
    k = -(-sum(map(len, texts)) // 1000)
    assert k > 1
    assert seen == texts[::k]


def test_what_cannot_be_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("pellucid.data.documents.find_corpus", None)
    with pytest.raises(ConfigError, match="vocab_size 100 - give at least 258"):
        load_text(tmp_path, tokenizer="bpe", vocab_size=100)
    with pytest.raises(ConfigError, match="no tokenizer and no file is called 'wrods'"):
        load_text(tmp_path, tokenizer="wrods")
    with pytest.raises(ConfigError, match="cannot be trained with test_only"):
        load_text(tmp_path, tokenizer="bpe", test_only=True)
    with pytest.raises(ConfigError, match="labels is 'some'"):
        load_text(tmp_path, labels="some")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install 'pellucid\[lm\]'"):
        load_text(tmp_path, tokenizer="bpe")


def test_more_words_than_two_bytes_number(tmp_path, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 2**16 + 1)
    assert load_text(write(tmp_path, several(5))).train.ids.dtype == np.int32


def test_texts_that_change_while_they_are_read(tmp_path, monkeypatch):
    write(tmp_path, several(10))

    def read_and_change(*args):
        reading = read_corpus(*args)
        (tmp_path / "03.txt").write_text("something else")
        return reading

    monkeypatch.setattr("pellucid.data.documents.read_corpus", read_and_change)
    with pytest.raises(DataError, match=r"03.txt has changed while it was read"):
        load_text(tmp_path)
    write(tmp_path, several(10))
    monkeypatch.setattr(
        "pellucid.data.documents.read_corpus",
        lambda *args: (read_corpus(*args), (tmp_path / "09.txt").unlink())[0],
    )
    with pytest.raises(DataError, match=r"09.txt has changed while it was read"):
        load_text(tmp_path)


def test_windows_of_a_folder(tmp_path):
    data = load_text(write(tmp_path, several(10)))
    windows = Windows(data.train, data.tokenizer, 64)
    assert windows.text_bytes == data.train.sizes.sum()
    assert windows.words == windows.text_bytes + len(data.train)
    assert windows.name(0) == f"{data.train.name(0)}, words 0 to {len(data.train.document(0)) + 1}"


def test_a_set_is_what_it_says():
    with pytest.raises(DataError, match="2 documents of 5 words with 1 sizes"):
        TextSet(np.zeros(5, np.uint16), np.array([0, 2, 5]), np.array([2]), np.zeros(2), ["a", "b"])


# --- what is taken for text ---------------------------------------------------------------------------


def test_names_of_texts():
    for name in ("a.txt", "A.TXT", "a.md", "49960", "Makefile", "x.py", "1."):
        assert is_text(name)
    for name in (".txt", ".hidden", "a.png", "a.jsonl", "a.csv", "__MACOSX"):
        assert not is_text(name)


def test_what_holds_text(tmp_path):
    write(tmp_path, {"a/b/x.txt": "x", "j/x.jsonl": "{}", "p/x.png": "x", "p/LICENSE": "x"})
    assert holds_text(str(tmp_path / "a"))
    assert holds_text(str(tmp_path / "a/b/x.txt"))
    assert holds_text(str(tmp_path / "j"))
    assert holds_text(str(tmp_path / "j/x.jsonl"))
    assert not holds_text(str(tmp_path / "p"))
    assert not holds_text(str(tmp_path / "p/x.png"))
    assert not holds_text(str(tmp_path / "nothing"))

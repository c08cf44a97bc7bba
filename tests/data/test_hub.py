"""Data sets of the hub, from tables on this machine: there is no network here."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pellucid.data import StepSampler, View, check, hub, load_data, pack, tables, train_loader
from pellucid.errors import ConfigError, DataError

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encoded(seed, size=(9, 8)):
    file = io.BytesIO()
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def table(count, first=0, **more):
    """Columns photo (Image), kind (ClassLabel), caption (text), number (integers), and ``more``."""
    features = {
        "photo": datasets.Image(),
        "kind": datasets.ClassLabel(names=["cat", "dog"]),
        "caption": datasets.Value("string"),
        "number": datasets.Value("int16"),
    }
    rows = {
        "photo": [{"bytes": encoded(first + i), "path": f"{i}.png"} for i in range(count)],
        "kind": [i % 2 for i in range(count)],
        "caption": ["zebra" if i % 3 else "ape" for i in range(count)],
        "number": [10 - i % 4 for i in range(count)],
    }
    rows |= {name: column for name, (column, _) in more.items()}
    features |= {name: feature for name, (_, feature) in more.items()}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def save(path, **splits):
    datasets.DatasetDict(splits).save_to_disk(path)
    return f"hf:{path}"


def parquet(path, **splits):
    (path / "data").mkdir(parents=True)
    for name, rows in splits.items():
        rows.to_parquet(path / "data" / f"{name}-00000-of-00001.parquet")
    return f"hf:{path}"


@pytest.mark.parametrize("write", [save, parquet])
def test_columns_are_found_by_their_types(tmp_path, write):
    spec = write(tmp_path / "pets", train=table(20), test=table(6, first=100))
    data = load_data(spec)
    assert (data.name, data.class_names) == ("pets", ["cat", "dog"])
    assert (len(data.train), len(data.test), data.in_chans, data.img_size) == (20, 6, 3, (9, 8))
    assert [data.train.encoded(i) for i in range(20)] == [encoded(i) for i in range(20)]
    assert [data.test.encoded(i) for i in range(6)] == [encoded(100 + i) for i in range(6)]
    assert data.train.labels.tolist() == [i % 2 for i in range(20)]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(encoded(i)))) for i in range(20)]) / 255
    assert data.mean == pytest.approx(pixels.mean((0, 1, 2)))
    assert load_data(spec).fingerprint == data.fingerprint
    assert data.train.name(3) == f"{tmp_path}/pets/train[3]"
    report = check(spec)
    assert report.ok
    assert report.class_counts == {"cat": (10, 3), "dog": (10, 3)}


def test_options(tmp_path):
    spec = save(tmp_path / "x", train=table(20), validation=table(6, first=50), test=table(8, first=100))
    assert load_data(spec).test.encoded(0) == encoded(50)  # validation goes before test
    assert load_data(f"{spec}?test=test").test.encoded(0) == encoded(100)
    held_back = load_data(f"{spec}?split=train")
    assert (len(held_back.train), len(held_back.test)) == (16, 4)
    with pytest.raises(ConfigError, match="brings its own split"):
        load_data(spec, test_fraction=0.5)
    pair = load_data(f"{spec}?split=test&test=validation")
    assert (len(pair.train), len(pair.test)) == (8, 6)
    assert load_data(f"{spec}?label=caption").class_names == ["ape", "zebra"]
    numbers = load_data(f"{spec}?label=number&image=photo")
    assert numbers.class_names == ["7", "8", "9", "10"]
    assert numbers.train.labels.tolist() == [3 - i % 4 for i in range(20)]
    whole = load_data(spec, test_only=True)
    assert len(whole.test) == 6


@pytest.mark.parametrize(
    ("query", "error", "text"),
    [
        ("?lable=kind", ConfigError, "did you mean 'label'"),
        ("?label=", ConfigError, "nothing behind 'label='"),
        ("?nonsense", ConfigError, "nothing behind|names no data set|has the option"),
        ("?split=trian", DataError, "no split 'trian' - did you mean 'train'"),
        ("?test=x", DataError, "no split 'x'"),
        ("?split=test&test=test", ConfigError, "split and test are both 'test'"),
        ("?image=caption", DataError, "no column of images 'caption'"),
        ("?label=photo", DataError, "column photo is Image - name one of classes"),
        ("?label=nothing", DataError, "no column 'nothing'"),
    ],
)
def test_wrong_options(tmp_path, query, error, text):
    spec = save(tmp_path / "x", train=table(20), test=table(6))
    with pytest.raises(error, match=text):
        load_data(spec + query)
    assert not check(spec + query).ok


def test_several_candidates_are_for_the_user_to_choose(tmp_path):
    coarse = ([i % 5 for i in range(20)], datasets.ClassLabel(names=list("abcde")))
    mask = ([{"bytes": encoded(900 + i), "path": None} for i in range(20)], datasets.Image())
    two = save(tmp_path / "two", train=table(20, coarse=coarse))
    with pytest.raises(DataError, match=r"columns of classes: kind, coarse - choose one: hf:.*\?label=kind"):
        load_data(two)
    assert load_data(f"{two}?label=coarse").class_names == list("abcde")
    masked = save(tmp_path / "masked", train=table(20, mask=mask))
    with pytest.raises(DataError, match=r"columns of images photo, mask - choose one: hf:.*\?image=photo"):
        load_data(masked)
    assert load_data(f"{masked}?image=mask", test_only=True).train.encoded(0) == encoded(900)
    with pytest.raises(DataError, match="no column of images - it has kind, caption, number"):
        load_data(save(tmp_path / "none", train=table(20).remove_columns("photo")))
    other = save(tmp_path / "other", train=table(20), test=table(6).rename_column("kind", "sort"))
    with pytest.raises(DataError, match="split test has no column kind"):
        load_data(other)


def test_without_labels(tmp_path):
    spec = save(tmp_path / "x", train=table(20).remove_columns("kind"))
    with pytest.raises(DataError, match=r"no labels - .*--objective simdino"):
        load_data(spec)
    data = load_data(spec, labels="optional")
    assert (data.class_names, len(data.train), len(data.test)) == ([], 18, 2)
    hidden = ([-1] * 6, datasets.ClassLabel(names=["cat", "dog"]))
    secret = save(tmp_path / "y", train=table(20), test=table(6, kind=hidden))
    with pytest.raises(DataError, match="6 of 26 images have no label"):
        load_data(secret)
    assert load_data(secret, labels="optional").class_names == []
    assert len(load_data(f"{secret}?split=train").train) == 16


def test_rows_that_cannot_be_read(tmp_path):
    photos = [{"bytes": encoded(i), "path": None} for i in range(20)]
    photos[3], photos[4] = None, {"bytes": b"<html>", "path": None}
    rows = table(20, photo=(photos, datasets.Image()))
    spec = save(tmp_path / "x", train=rows)
    with pytest.raises(DataError, match="2 of 20 images rejected"):
        load_data(spec)
    data = load_data(spec, max_bad=0.2, test_only=True)
    assert [(name.split("[")[1], reason) for name, reason in data.rejects] == [
        ("3]", "no image in this row"),
        ("4]", "an HTML page, not an image"),
    ]
    assert torch.equal(data.train.image(3), data.train.image(5))  # the next of its class


def test_a_table_of_paths(tmp_path):
    for split, first, count in (("train", 0, 20), ("test", 100, 6)):
        for i in range(count):
            path = tmp_path / "pets" / split / ("cat", "dog")[i % 2] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(first + i))
    data = load_data(f"hf:{tmp_path}/pets")
    assert (data.class_names, len(data.train), len(data.test)) == (["cat", "dog"], 20, 6)
    assert {data.test.encoded(i) for i in range(6)} == {encoded(100 + i) for i in range(6)}
    (tmp_path / "pets" / "test" / "cat" / "00.png").unlink()
    assert check(f"hf:{tmp_path}/pets").rejects == ()  # datasets reads the folder anew
    gone = load_data(f"hf:{tmp_path}/pets").train
    (tmp_path / "pets" / "train" / "cat" / "00.png").unlink()
    assert torch.equal(gone.image(0), gone.image(1))


def test_batches_are_the_same_with_workers(tmp_path):
    data = load_data(save(tmp_path / "x", train=table(20)))
    view = View((8, 8), 3, data.mean, data.std, augment="small", seed=1)

    def batches(workers):
        return list(train_loader(data.train, view, StepSampler(16, 8, 0, 3), workers=workers))

    for one, other in zip(batches(0), batches(2), strict=True):
        assert all(map(torch.equal, one, other))


def test_a_table_whose_rows_were_chosen(tmp_path):
    rows = table(40).shuffle(seed=0).select(range(20))
    data = load_data(save(tmp_path / "x", train=rows), test_only=True)
    assert data.train.labels.tolist() == rows["kind"][:]
    assert data.train.byte_sizes().tolist() == [len(data.train.encoded(i)) for i in range(20)]


def test_packing_keeps_the_bytes(tmp_path):
    data = load_data(save(tmp_path / "x", train=table(20), test=table(6, first=100)))
    pack(data, tmp_path / "shards")
    shards = load_data(tmp_path / "shards")
    assert [shards.train.encoded(i) for i in range(20)] == [encoded(i) for i in range(20)]
    assert shards.class_names == ["cat", "dog"]


def test_what_cannot_be_had(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="name a folder of Parquet files"):
        load_data(f"hf:{tmp_path}/empty")
    for spec in ("hf:", "hf:?split=train"):
        with pytest.raises(ConfigError, match="names no data set"):
            load_data(spec)

    def offline(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        DataError, match=r"cannot get owner/name from the hub - check the connection"
    ) as caught:
        load_data("hf:owner/name")
    assert "no route to host" in str(caught.value)

    def unknown(*arguments, **options):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unknown)
    with pytest.raises(DataError, match="no data set of the hub is called owner/name"):
        load_data("hf:owner/name")


def test_what_is_asked_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(path, config, revision):
        asked.append((path, config, revision))
        return datasets.DatasetDict(train=table(20))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_data("hf:owner/name?config=small&revision=v1").train) == 16
    assert asked == [("owner/name", "small", "v1")]


def test_the_extra_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the package 'datasets' - pip install 'pellucid\[hub\]'"):
        load_data("hf:owner/name")


def test_optional_libraries_are_imported_only_when_used():
    late = {"datasets", "huggingface_hub", "pyarrow", "tokenizers", "transformers"}
    code = f"import sys, pellucid.data; print({late} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_docstring_names_every_option():
    assert all(f"``{option}``" in tables.__doc__ for option in tables.OPTIONS)
    assert all(f"``{option}``" in hub.__doc__ for option in hub.COLUMNS)

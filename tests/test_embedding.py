"""Features in files, read back by each format's own reader, and the nearest pictures."""

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch.nn import functional as F

from pellucid import embedding
from pellucid.analytic import NearestNeighbours
from pellucid.data import ArrayImages, load_data
from pellucid.data.dataset import from_arrays
from pellucid.embedding import embed, neighbours
from pellucid.errors import ConfigError, DataError, ResourceError
from pellucid.glass.feed import batches
from pellucid.measure.features import features
from pellucid.models import create_model

FORMATS = pytest.mark.parametrize("suffix", ["npz", "safetensors", "parquet"])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("crate_digits", embed_dim=16, depth=1, num_heads=2, num_classes=0, reg_tokens=2)


@pytest.fixture(scope="module")
def some():
    """Small gray pictures of three classes, one test picture without a label."""
    random = torch.Generator().manual_seed(0)

    def part(name, labels):
        pictures = torch.randint(0, 256, (len(labels), 1, 8, 8), generator=random, dtype=torch.uint8)
        return ArrayImages(pictures, torch.tensor(labels), name)

    return from_arrays("some", part("a", [0, 1, 2, 0, 1]), part("b", [2, 1, -1]), ["cat", "dog", "owl"])


@pytest.fixture
def photos(tmp_path):
    """Twelve colour pictures in two class folders, and one file that is none."""
    random = np.random.default_rng(0)
    for kind in ("ant", "bee"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for i in range(6):
            pixels = random.integers(0, 256, (12, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / kind / f"{i}.png")
    (tmp_path / "photos" / "bee" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    return tmp_path / "photos"


def expected(model, images, tokens):
    parts = [features(model, batches(model, part), tokens).values for part in (images.train, images.test)]
    return torch.cat(parts).numpy()


def read(path):
    """What a file holds, with its own library: features, and a list of dicts of what is said of each row."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        each = {name: arrays[name].tolist() for name in ("label", "class_name", "path", "split")}
    elif path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = {name: json.loads(text) for name, text in file.metadata().items() if name != "tokens"}
        labels = arrays["label"].tolist()
        names = [about["class_names"][i] if i >= 0 else "" for i in labels]
        split = [about["splits"][i] for i in arrays["split"]]
        each = {"label": labels, "class_name": names, "path": about["paths"], "split": split}
    else:
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path)
        arrays = {"features": np.stack(table["features"].to_numpy())}
        each = {name: table[name].to_pylist() for name in table.column_names if name != "features"}
        each["class_name"] = [name or "" for name in each["class_name"]]
    return arrays, [dict(zip(each, values, strict=True)) for values in zip(*each.values(), strict=True)]


@FORMATS
@pytest.mark.parametrize("tokens", ["pooled", "cls", "avg"])
def test_one_feature_of_each_image(model, some, tmp_path, suffix, tokens):
    path = tmp_path / f"features.{suffix}"
    told = []
    written = embed(model, some, path, tokens, progress=told.append)
    assert (written.images, written.shape, written.left_out) == (8, (16,), 0)
    assert sum(told) == 8
    arrays, rows = read(path)
    np.testing.assert_allclose(arrays["features"], expected(model, some, tokens), atol=1e-6)
    assert arrays["features"].dtype == np.float32
    assert [row["label"] for row in rows] == [0, 1, 2, 0, 1, 2, 1, -1]
    assert [row["class_name"] for row in rows] == ["cat", "dog", "owl", "cat", "dog", "owl", "dog", ""]
    assert [row["split"] for row in rows] == ["train"] * 5 + ["test"] * 3
    assert [row["path"] for row in rows] == [f"a[{i}]" for i in range(5)] + [f"b[{i}]" for i in range(3)]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@FORMATS
@pytest.mark.parametrize(("tokens", "before"), [("patch", 0), ("all", 3)])
def test_several_features_of_each_image_with_their_place(model, some, tmp_path, suffix, tokens, before):
    path = tmp_path / f"features.{suffix}"
    written = embed(model, some, path, tokens)
    assert written.shape == (before + 16, 16)
    arrays, rows = read(path)
    found = arrays["features"].reshape(8, before + 16, 16)
    np.testing.assert_allclose(found, expected(model, some, tokens), atol=1e-6)
    row = [-1] * before + [i // 4 for i in range(16)]
    column = [-1] * before + [i % 4 for i in range(16)]
    if suffix == "parquet":
        assert [r["row"] for r in rows] == row * 8
        assert [r["column"] for r in rows] == column * 8
        assert [r["path"] for r in rows[:: before + 16]] == [f"a[{i}]" for i in range(5)] + [
            f"b[{i}]" for i in range(3)
        ]
    else:
        assert arrays["row"].tolist() == row
        assert arrays["column"].tolist() == column
        assert len(rows) == 8


@FORMATS
def test_a_picture_that_cannot_be_read_is_left_out_with_its_name(model, photos, tmp_path, suffix):
    images = load_data(photos, max_bad=0.5)
    path = tmp_path / f"features.{suffix}"
    written = embed(model, images, path)
    assert (written.images, written.left_out) == (12, 1)
    arrays, rows = read(path)
    assert len(arrays["features"]) == 12
    assert sorted(row["path"] for row in rows) == [str(f) for f in sorted(photos.rglob("?.png"))]
    for row in rows:
        assert row["class_name"] in row["path"]
        one = neighbours(model, images, [row["path"]], k=1)[0]
        assert one.path == row["path"]


def test_a_picture_that_breaks_on_the_way_ends_it(model, photos, tmp_path):
    """Another would stand in for it, under its name."""
    images = load_data(photos, max_bad=0.5)
    broken = Path(images.train.paths[0])
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(DataError, match=rf"{broken.name} cannot be read, though .*nothing was written"):
        embed(model, images, tmp_path / "f.npz")
    assert not (tmp_path / "f.npz").exists()


@FORMATS
def test_whole_or_not_at_all(model, some, tmp_path, suffix, monkeypatch):
    path = tmp_path / f"features.{suffix}"
    path.write_text("kept")
    with pytest.raises(ConfigError, match="stands there already - give --overwrite"):
        embed(model, some, path)
    full = OSError(28, "No space left on device")

    def breaks(*args, **kwargs):
        yield from embedding_batches(*args, **kwargs)
        raise full

    embedding_batches = embedding.feature_batches
    monkeypatch.setattr(embedding, "feature_batches", breaks)
    with pytest.raises(ResourceError, match="No space left on device - make room"):
        embed(model, some, path, overwrite=True)
    assert path.read_text() == "kept"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    monkeypatch.undo()
    embed(model, some, path, overwrite=True)
    assert len(read(path)[1]) == 8


def test_formats_that_cannot_be(model, some, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"ends in \.parquet, \.npz, \.safetensors"):
        embed(model, some, tmp_path / "features.csv")
    plain = builtins.__import__
    monkeypatch.setattr(
        embedding, "import_module", lambda name: plain(name if "arrow" not in name else "no_such_module")
    )
    with pytest.raises(ConfigError, match=r"needs the package pyarrow - pip install 'pellucid\[parquet\]'"):
        embed(model, some, tmp_path / "features.parquet")
    assert list(tmp_path.iterdir()) == []


def test_tokens_that_are_not_there_are_told_before_a_file_is_made(some, tmp_path):
    sizes = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    model = create_model("crate_digits", **sizes, class_token=False, global_pool="avg")
    with pytest.raises(ConfigError, match="no class token - take avg"):
        embed(model, some, tmp_path / "f.npz", "cls")
    assert list(tmp_path.iterdir()) == []


# --- neighbours ---------------------------------------------------------------------------------------------


def test_neighbours_are_those_of_the_estimator(model, tmp_path):
    images = load_data("digits")
    picks = [3, 700, 1000]
    for i in picks:
        Image.fromarray(images.train.image(i)[0].numpy()).save(tmp_path / f"{i}.png")
    found = neighbours(model, images, [tmp_path / f"{i}.png" for i in picks], k=5)
    rows = torch.from_numpy(expected(model, images, "pooled"))
    estimator = NearestNeighbours(5).fit(rows, torch.cat([images.train.labels, images.test.labels]))
    cosines, index = estimator.kneighbors(rows[picks])
    names = images.train.paths + images.test.paths
    for query, c, which in zip(found, cosines, index, strict=True):
        assert [hit.cosine for hit in query.hits] == pytest.approx(c.tolist(), abs=1e-5)
        assert query.hits[0].path == names[which[0]]  # the picture itself, in memory and not that file
        assert query.hits[0].cosine == pytest.approx(1, abs=1e-5)
        assert torch.equal(query.hits[0].image, query.image)
        assert {hit.path for hit in query.hits} == {names[i] for i in which}


def test_a_file_of_the_data_is_not_its_own_neighbour(model, photos):
    images = load_data(photos, max_bad=0.5)
    query = photos / "ant" / "3.png"
    [found] = neighbours(model, images, [query], k=50)
    assert len(found.hits) == 11
    assert str(query) not in [hit.path for hit in found.hits]
    cosines = [hit.cosine for hit in found.hits]
    assert cosines == sorted(cosines, reverse=True)
    assert {hit.class_name for hit in found.hits} == {"ant", "bee"}
    for hit in found.hits:
        assert hit.class_name in hit.path
        view = F.normalize(features(model, batches(model, images.train)).values, dim=-1)
        assert view.isfinite().all()


def test_neighbours_refuses(model, some, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "q.png")
    with pytest.raises(ConfigError, match="k is 0"):
        neighbours(model, some, [tmp_path / "q.png"], k=0)
    with pytest.raises(ConfigError, match="several features of an image"):
        neighbours(model, some, [tmp_path / "q.png"], tokens="patch")
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"bad\.png cannot be read: empty file .* - name another picture"):
        neighbours(model, some, [tmp_path / "q.png", tmp_path / "bad.png"])

"""Shards: what was packed comes back to the bit, what is damaged is named, what is hostile does nothing."""

import copy
import errno
import fcntl
import hashlib
import io
import itertools
import json
import os
import pickle  # noqa: TID251 - as spawned workers are started
import shutil
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from pellucid.data import (
    ImageData,
    StepSampler,
    View,
    check,
    eval_loader,
    load_data,
    pack,
    packing,
    train_loader,
)
from pellucid.data import shards as reading
from pellucid.data.loaders import ViewedSet
from pellucid.data.shards import INDEX, INFO, ShardImages, read_index, write_index
from pellucid.data.tars import read_archive
from pellucid.errors import ConfigError, DataError, ResourceError

SMALL = 0.02  # MB: a few pictures in each archive


def picture(seed, size=(12, 10), fmt="PNG"):
    file = io.BytesIO()
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, fmt)
    return file.getvalue()


def write_classes(root, count=12, names=("cat", "dog")):
    for k, name in enumerate(names):
        for i in range(count):
            path = root / name / f"{i:02}.{'png' if i % 3 else 'JPG'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(100 * k + i, (12 + i, 10), "PNG" if i % 3 else "JPEG"))
    return root


@pytest.fixture
def pets(tmp_path):
    return write_classes(tmp_path / "pets")


@pytest.fixture
def packed(pets, tmp_path):
    pack(load_data(pets), tmp_path / "shards", max_shard_mb=SMALL)
    return tmp_path / "shards"


def tars(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".tar")


def same_images(one, other):
    return all(torch.equal(one.image(i), other.image(i)) for i in range(len(one))) and len(one) == len(other)


# --- packed and read ----------------------------------------------------------------------------------


def test_shards_are_the_folder_again(pets, packed):
    files, shards = load_data(pets), load_data(packed)
    assert len([name for name in tars(packed) if name.startswith("train-")]) > 2
    for part in ("train", "test"):
        one, other = getattr(files, part), getattr(shards, part)
        assert isinstance(other, ShardImages)
        assert torch.equal(one.labels, other.labels)
        assert same_images(one, other)
        assert [one.encoded(i) for i in range(len(one))] == [other.encoded(i) for i in range(len(one))]
        assert [one.relative(i) for i in range(len(one))] == [other.relative(i) for i in range(len(one))]
    for field in ("class_names", "in_chans", "img_size", "mean", "std", "rejects"):
        assert getattr(files, field) == getattr(shards, field)
    assert shards.name == "shards"
    archive, name = shards.train.name(0).split(": ")
    assert (os.path.dirname(archive), name) == (str(packed), "cat/00.JPG")
    assert os.path.basename(archive) in tars(packed)
    with pytest.raises(ConfigError, match="brings its own split"):
        load_data(packed, test_fraction=0.3)
    only = load_data(packed, test_only=True)
    assert same_images(only.train, shards.test)


def test_batches_are_the_same_with_workers(pets, packed):
    files, shards = load_data(pets), load_data(packed)
    view = View((8, 8), 3, files.mean, files.std, augment="photo", flip=True, seed=3)

    def batches(data, workers=0, start=0):
        sampler = StepSampler(len(data.train), 8, seed=1, steps=5, start=start)
        return list(train_loader(data.train, view, sampler, workers=workers))

    expected = batches(files)
    assert all(map(torch.equal, itertools.chain(*expected), itertools.chain(*batches(shards))))
    assert all(map(torch.equal, itertools.chain(*expected), itertools.chain(*batches(shards, workers=2))))
    assert all(
        map(torch.equal, itertools.chain(*expected[3:]), itertools.chain(*batches(shards, 1, start=3)))
    )


def test_spawned_workers_read_them(packed):
    data = load_data(packed)
    data.train.image(0)  # opens an archive, which must not travel
    again = pickle.loads(pickle.dumps(data.train))  # noqa: S301
    assert same_images(again, data.train)
    view = View((8, 8), 3, data.mean, data.std)
    keys = [[(i, 0) for i in range(10)], [(i, 0) for i in range(10, 20)]]
    spawned = DataLoader(
        ViewedSet(data.train, view),
        batch_sampler=keys,
        collate_fn=copy.copy,  # found by name in the spawned process, as nothing of this file is
        num_workers=1,
        multiprocessing_context="spawn",
    )
    here = eval_loader(data.train, view, batch_size=10)
    assert all(torch.equal(x, y) for (x, *_), (y, *_) in zip(spawned, here, strict=True))


def test_many_archives_with_few_open(packed, monkeypatch):
    monkeypatch.setattr(reading, "OPEN_AT_ONCE", 2)
    data = load_data(packed)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    again = load_data(packed)
    for i in (*range(20), *range(19, -1, -1)):
        assert torch.equal(data.train.image(i), again.train.image(i))
    assert len(data.train._open) == 2
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_same_pictures_same_bytes(pets, packed, tmp_path):
    pack(load_data(pets), tmp_path / "again", max_shard_mb=SMALL)
    for name in tars(packed):
        assert (packed / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert load_data(packed).fingerprint == load_data(tmp_path / "again").fingerprint
    (pets / "cat" / "01.png").write_bytes(picture(999, (13, 10)))
    pack(load_data(pets), tmp_path / "other", max_shard_mb=SMALL)
    assert load_data(packed).fingerprint != load_data(tmp_path / "other").fingerprint


def test_archives_keep_to_their_size_and_mix_the_classes(packed):
    info = json.loads((packed / INFO).read_text())
    assert all(shard["bytes"] <= SMALL * 1e6 for shard in info["shards"])
    for shard in info["shards"]:
        content = (packed / shard["file"]).read_bytes()
        assert len(content) == shard["bytes"]
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
    labels = []
    for name in (name for name in tars(packed) if name.startswith("train")):
        with tarfile.open(packed / name) as archive:
            assert all(m.isreg() and m.mtime == 0 and m.uid == 0 for m in archive)
            labels += [archive.extractfile(m).read() for m in archive if m.name.endswith(".cls")]
    assert len(labels) == 20
    assert sorted(labels) != labels  # the folder's order has all cats first


def test_a_picture_larger_than_an_archive_has_one_of_its_own(pets, tmp_path):
    result = pack(load_data(pets), tmp_path / "out", max_shard_mb=1e-6)
    assert result.shards == result.train + result.test == 24
    assert same_images(load_data(tmp_path / "out").train, load_data(pets).train)
    for size in (0, -1, float("nan")):
        with pytest.raises(ConfigError, match="--max-shard-mb"):
            pack(load_data(pets), tmp_path / "x", max_shard_mb=size)


def test_pictures_without_labels(tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(20):
        (flat / f"{i}.png").write_bytes(picture(i))
    data = load_data(flat, labels="optional")
    pack(data, tmp_path / "out")
    shards = load_data(tmp_path / "out", labels="optional")
    assert (shards.class_names, len(shards.train), len(shards.test)) == ([], 18, 2)
    assert (shards.train.labels == -1).all()
    assert same_images(data.train, shards.train)
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as archive:
        assert {os.path.splitext(name)[1] for name in archive.getnames()} == {".png"}
    with pytest.raises(DataError, match=r"no labels - .* - train without labels: --objective simdino"):
        load_data(tmp_path / "out")
    report = check(tmp_path / "out")
    assert (report.ok, report.without_labels) == (False, True)
    assert report.notes == ("20 images without labels, usable with --objective simdino, dino or mae",)


def test_arrays_become_png(tmp_path):
    digits = load_data("digits")
    pack(digits, tmp_path / "digits")
    shards = load_data(tmp_path / "digits")
    assert (shards.in_chans, shards.img_size, shards.class_names) == (1, (8, 8), digits.class_names)
    assert (shards.mean, shards.std) == (pytest.approx(digits.mean), pytest.approx(digits.std))
    assert torch.equal(torch.stack(shards.train.batch(range(1347))), digits.train.images)
    np.savez(tmp_path / "four.npz", x=np.zeros((9, 4, 4, 4), np.uint8), y=np.arange(9) % 2)
    with pytest.raises(DataError, match="4 channels - shards hold pictures of 1 or 3"):
        pack(load_data(tmp_path / "four.npz"), tmp_path / "four")
    assert not (tmp_path / "four").exists()


def test_shards_of_shards(packed, tmp_path):
    one = load_data(packed)
    pack(one, tmp_path / "again", max_shard_mb=1)
    two = load_data(tmp_path / "again")
    assert (tars(tmp_path / "again"), len(two.test)) == (["test-000000.tar", "train-000000.tar"], 4)
    assert same_images(one.train, two.train)
    assert two.train.relative(5) == one.train.relative(5)


@given(st.lists(st.integers(1, 3000), min_size=2, max_size=25), st.floats(0.001, 0.05), st.booleans())
@settings(deadline=None, max_examples=25)
def test_any_files_come_back(tmp_path_factory, sizes, max_shard_mb, labelled):
    """Files of any size, padded with what decoders pass over, in archives of any size."""
    root = tmp_path_factory.mktemp("any")
    contents = [picture(i, (2, 2)) + bytes(size) for i, size in enumerate(sizes)]
    for i, content in enumerate(contents * 2):
        path = root / "in" / ("ab"[i % 2] if labelled else "") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    data = load_data(root / "in", labels="optional")
    pack(data, root / "out", max_shard_mb=max_shard_mb)
    shards = load_data(root / "out", labels="optional")
    for one, other in ((data.train, shards.train), (data.test, shards.test)):
        assert [one.encoded(i) for i in range(len(one))] == [other.encoded(i) for i in range(len(other))]
        assert torch.equal(one.labels, other.labels)
    shutil.rmtree(root)


# --- rejects and names --------------------------------------------------------------------------------


def test_bad_files_are_left_out_and_named(pets, tmp_path):
    (pets / "cat" / "01.png").write_bytes(b"<html>")
    whole = (pets / "dog" / "02.png").read_bytes()
    (pets / "dog" / "02.png").write_bytes(whole[: len(whole) // 2])
    data = load_data(pets, max_bad=0.1)
    with pytest.raises(DataError, match="images rejected"):
        pack(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = pack(data, tmp_path / "out", max_bad=0.1)
    assert (result.train + result.test, len(result.rejects)) == (22, 2)
    shards = load_data(tmp_path / "out")
    assert {reject.path: reject.reason for reject in shards.rejects} == {
        "cat/01.png": "an HTML page, not an image",
        "dog/02.png": "truncated",
    }
    assert len(shards.train) + len(shards.test) == 22
    kept = [images.relative(i) for images in (shards.train, shards.test) for i in range(len(images))]
    assert not {"cat/01.png", "dog/02.png"} & set(kept)
    report = check(tmp_path / "out")
    assert report.ok
    assert "2 rejected" in report.lines()
    pack(shards, tmp_path / "second")
    assert load_data(tmp_path / "second").rejects == shards.rejects


def test_what_a_header_does_not_show_is_seen_in_packing(pets, tmp_path, monkeypatch):
    from pellucid.data import verify

    monkeypatch.setattr(verify, "DECODE_LIMIT", 0)
    whole = (pets / "dog" / "02.png").read_bytes()
    (pets / "dog" / "02.png").write_bytes(whole[: len(whole) // 2])
    data = load_data(pets)
    assert data.rejects == ()
    with pytest.raises(DataError, match=r"1 of 24 images rejected .*\n  dog/02.png: truncated"):
        pack(data, tmp_path / "out")
    assert len(pack(data, tmp_path / "out", max_bad=0.1).rejects) == 1


def test_a_smaller_limit_than_at_packing(packed):
    with pytest.raises(DataError, match=r"4 of 24 images rejected[^\n]*\n.*limit 0.00021 MP"):
        load_data(packed, max_pixels=210)
    data = load_data(packed, max_pixels=210, max_bad=0.2)
    assert len(data.rejects) == 4
    assert all(image[0].numel() <= 210 for image in data.train)
    assert len(data.train) == 20


def test_hostile_names_are_kept_and_shown_safely(tmp_path):
    root = write_classes(tmp_path / "pets")
    names = [b"caf\xe9\xff.png", b"new\nline\x1b[31m.png", "🐈.png".encode(), b"dots.in.it.png"]
    for k, raw in enumerate(names):
        with open(os.path.join(os.fsencode(root / "cat"), raw), "wb") as file:
            file.write(picture(500 + k))
    os.rename(root / "dog", os.path.join(os.fsencode(root), b"d\xf6g\x1b"))
    pack(load_data(root), tmp_path / "out")
    data = load_data(tmp_path / "out")
    stored = {os.fsencode(part.relative(i)) for part in (data.train, data.test) for i in range(len(part))}
    assert {b"cat/" + name for name in names} <= stored
    assert data.class_names == load_data(root).class_names
    shown = [data.train.name(i) for i in range(len(data.train))] + check(tmp_path / "out").lines()
    assert all(name.isprintable() and name.encode("utf-8") for name in shown)


# --- the place ----------------------------------------------------------------------------------------


def test_what_stands_there_is_left_alone(pets, packed, tmp_path):
    data = load_data(pets)
    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    with pytest.raises(ConfigError, match="holds shards already - give --overwrite"):
        pack(data, packed)
    assert {path.name: path.read_bytes() for path in packed.iterdir()} == before
    assert pack(data, packed, overwrite=True).shards == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pets", "shards"]
    for name in ("folder", "file"):
        place = tmp_path / name
        (place.mkdir() or (place / "precious").write_text("x")) if name == "folder" else place.write_text("x")
        with pytest.raises(ConfigError, match="exists and holds no shards"):
            pack(data, place, overwrite=True)
    assert (tmp_path / "folder" / "precious").read_text() == "x"
    (tmp_path / "empty").mkdir()
    assert pack(data, tmp_path / "empty").train == 20
    for inside in (pets, pets / "cat" / "shards"):
        with pytest.raises(ConfigError, match="lies in the folder that is packed"):
            pack(data, inside)


def test_a_full_disk_leaves_nothing(pets, tmp_path, monkeypatch):
    data = load_data(pets)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packing, "flush", full)
    with pytest.raises(ResourceError, match="No space left on device - make room"):
        pack(data, tmp_path / "out")
    assert os.listdir(tmp_path) == ["pets"]
    monkeypatch.undo()
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 100))
    with pytest.raises(ResourceError, match=r"needs 0\.0 GB, 0\.0 GB are free"):
        pack(data, tmp_path / "deep" / "er" / "out")
    assert os.listdir(tmp_path) == ["pets"]


def test_ctrl_c_leaves_nothing(pets, tmp_path):
    def interrupt(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(load_data(pets), tmp_path / "out", progress=interrupt)
    assert os.listdir(tmp_path) == ["pets"]


KILLED = """
import os, sys, signal
from pellucid.data import load_data, packing
left = [int(sys.argv[3])]
def step(done):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
if left[0] < 0:
    packing.write_index = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
packing.pack(load_data(sys.argv[1]), sys.argv[2], max_shard_mb=0.02, progress=step)
"""


@pytest.mark.parametrize("after", [15, pytest.param(24, marks=pytest.mark.slow), -1])
def test_a_killed_packer_leaves_nothing_that_looks_whole(pets, tmp_path, after):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(pets), str(out), str(after)]
    done = subprocess.run(command, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    (scratch,) = (path for path in tmp_path.iterdir() if path != pets)
    assert scratch.name.startswith(".tmp-out-")
    assert tars(scratch) == []
    with pytest.raises(DataError):
        load_data(scratch, labels="optional", root=tmp_path / "cache")
    assert pack(load_data(pets), out).train == 20
    assert not scratch.exists()
    assert len(load_data(out).train) == 20


def test_two_packers_to_one_place(pets, tmp_path):
    other = tmp_path / ".tmp-out-1"
    other.mkdir()
    with open(other / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is being packed by another process"):
            pack(load_data(pets), tmp_path / "out")
        assert other.exists()
    assert pack(load_data(pets), tmp_path / "out").train == 20
    assert not other.exists()


# --- damage -------------------------------------------------------------------------------------------


def said(folder, **options):
    with pytest.raises(DataError) as caught:
        load_data(folder, **options)
    text = str(caught.value)
    assert 1 <= len(text.splitlines()) <= 5
    return text


def test_a_missing_or_cut_archive_is_named(packed):
    whole = (packed / "train-000001.tar").read_bytes()
    (packed / "train-000001.tar").write_bytes(whole[:-512])
    text = said(packed)
    assert f"{packed}/train-000001.tar has {len(whole) - 512:,} bytes, not the {len(whole):,}" in text
    assert text in check(packed).problems
    (packed / "train-000001.tar").unlink()
    assert "train-000001.tar: No such file" in said(packed)


def test_a_flipped_bit_is_named(packed):
    data = load_data(packed)
    i = 7
    shard, offset = (int(data.train.columns[key][i]) for key in ("shard", "offset"))
    path = packed / os.path.basename(data.train.files[shard])
    content = bytearray(path.read_bytes())
    content[offset + 60] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path.name} is damaged at .*copy it again"):
        data.train.image(i)
    assert path.name in said(packed)  # met while measuring
    (problem,) = check(packed).problems
    assert problem.startswith(f"{path} is damaged (SHA-256 differs)")


def test_an_archive_that_goes_away_while_reading(packed):
    data = load_data(packed)
    first, fresh = data.test.image(0), load_data(packed)
    (packed / os.path.basename(data.test.files[data.test.columns["shard"][0]])).unlink()
    with pytest.raises(DataError, match=r"cannot read .*test-00000\d.tar: No such file"):
        fresh.test.image(0)
    assert torch.equal(data.test.image(0), first)  # still open


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda f: (f / INDEX).unlink(), f"{INDEX} is missing"),
        (lambda f: (f / INFO).unlink(), f"{INFO} is missing"),
        (lambda f: (f / INDEX).write_bytes((f / INDEX).read_bytes()[:-3]), "SHA-256 differs"),
        (lambda f: (f / INDEX).write_bytes(b""), "SHA-256 differs"),
        (lambda f: (f / INFO).write_text((f / INFO).read_text()[:-30]), "is damaged"),
        (lambda f: (f / INFO).write_text("[]"), "is damaged"),
        (lambda f: (f / INFO).write_text('{"format": "pellucid shards"}'), "is damaged"),
        (
            lambda f: (f / INFO).write_text((f / INFO).read_text().replace('"version": 1', '"version": 2')),
            "is of version 2, this reads 1",
        ),
        (
            lambda f: (f / INFO).write_text((f / INFO).read_text().replace('"test-0', '"../test-0')),
            "names an archive elsewhere",
        ),
    ],
)
def test_a_damaged_index(packed, change, text):
    change(packed)
    assert text in said(packed)
    assert not check(packed).ok


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shard", 99),
        ("shard", -1),
        ("shard", 0),
        ("offset", -1),
        ("offset", 10**12),
        ("size", -5),
        ("label", 2),
        ("label", -2),
        ("kind", 200),
    ],
)
def test_an_index_that_lies(packed, key, value):
    index = read_index(packed)
    index.columns[key][-1] = value
    write_index(packed, index)
    assert "the index" in said(packed)


def test_an_index_that_cannot_be_unpickled(packed):
    index = read_index(packed)
    bomb = np.empty(len(index.columns["kind"]), dtype=object)
    write_index(packed, index._replace(columns=index.columns | {"kind": bomb}))
    assert "damaged" in said(packed)


# --- WebDataset archives of other makers --------------------------------------------------------------


def write_tar(path, members):
    """``members``: (name, content), or a TarInfo that stands for itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return path


def samples(first, count, label=lambda i: str(i % 2)):
    for i in range(first, first + count):
        yield f"{i:04}.png", picture(i)
        if label is not None:
            yield f"{i:04}.cls", label(i).encode()


def load(spec, tmp_path, **options):
    return load_data(spec, root=tmp_path / "cache", **options)


def test_a_folder_of_archives(tmp_path):
    for k in range(3):
        write_tar(tmp_path / "wds" / f"part-{k}.tar", samples(10 * k, 10))
    whole = load(tmp_path / "wds", tmp_path)
    assert (whole.name, whole.class_names, len(whole.train), len(whole.test)) == ("wds", ["0", "1"], 24, 6)
    pattern = load(str(tmp_path / "wds" / "part-[01].tar"), tmp_path)
    assert (pattern.name, len(pattern.train)) == ("wds", 16)
    one = load(tmp_path / "wds" / "part-0.tar", tmp_path, test_only=True)
    assert [one.test.encoded(i) for i in range(10)] == [picture(i) for i in range(10)]
    assert one.test.labels.tolist() == [i % 2 for i in range(10)]
    assert one.test.path(3) == f"{tmp_path}/wds/part-0.tar: 0003.png"
    assert check(tmp_path / "wds", root=tmp_path / "cache").ok
    with pytest.raises(DataError, match="no archive matches"):
        load(str(tmp_path / "wds" / "x*.tar"), tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("train-0.tar", "val-0.tar", "test-0.tar"),
        ("x-train-000.tar", "x-validation-000.tar", "x-test-000.tar"),
        ("train/0.tar", "valid/0.tar", "test/0.tar"),
        ("my_train_0.tar", "MY_VAL_0.tar", "extra.tar"),
    ],
)
def test_archives_named_for_train_and_test(tmp_path, names):
    for k, name in enumerate(names):
        write_tar(tmp_path / "wds" / name, samples(100 * k, 10 - 2 * k))
    data = load(tmp_path / "wds", tmp_path)
    assert (len(data.train), len(data.test)) == (10, 8)
    assert data.test.encoded(0) == picture(100)
    with pytest.raises(ConfigError, match="brings its own split"):
        load(tmp_path / "wds", tmp_path, test_fraction=0.5)
    notes = check(tmp_path / "wds", root=tmp_path / "cache").notes
    assert any("6 images of archives that are neither train nor" in note for note in notes)


@pytest.mark.parametrize(
    ("label", "names"),
    [
        (lambda i: str(i % 12), [str(k) for k in range(12)]),
        (lambda i: f" {i % 2 * 7} \n", ["0", "7"]),
        (lambda i: ("n02", "n01", "é")[i % 3], ["n01", "n02", "é"]),
        (lambda i: ("3", "x")[i % 2], ["3", "x"]),
    ],
)
def test_labels_are_numbers_or_names(tmp_path, label, names):
    path = write_tar(tmp_path / "a.tar", samples(0, 36, label))
    data = load(path, tmp_path, test_only=True)
    assert data.class_names == names
    assert [names[k] for k in data.train.labels] == [label(i).strip() for i in range(36)]


def test_labels_that_are_missing(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*samples(0, 10), *samples(10, 10, None)])
    with pytest.raises(DataError, match=r"10 of 20 images have no label.*--objective simdino"):
        load(path, tmp_path)
    data = load(path, tmp_path, labels="optional")
    assert (data.class_names, len(data.train)) == ([], 18)
    report = check(path, root=tmp_path / "cache", labels="optional")
    assert report.notes == ("taken without labels: 10 of 20 images have no label",)
    none = write_tar(tmp_path / "b.tar", samples(0, 10, None))
    with pytest.raises(DataError, match=r"no labels - .*--objective simdino"):
        load(none, tmp_path)
    assert load(none, tmp_path, labels="optional").class_names == []
    one = write_tar(tmp_path / "c.tar", samples(0, 10, lambda i: "0"))
    with pytest.raises(DataError, match="only one class"):
        load(one, tmp_path)
    assert load(one, tmp_path, labels="optional").class_names == []
    write_tar(tmp_path / "d" / "train.tar", samples(0, 10))
    write_tar(tmp_path / "d" / "val.tar", samples(0, 4, lambda i: "5"))
    with pytest.raises(DataError, match='classes without training images: "5"'):
        load(tmp_path / "d", tmp_path)


def test_members_in_any_order_and_form(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("./d.ot/one.cls", b"0"),
            ("./d.ot/one.JPEG", picture(1, fmt="JPEG")),
            ("two.seg.png", picture(99)),
            ("two.png", picture(2)),
            ("three.cls", b"0"),
            ("two.cls", b"1"),
            ("three.json", b"{}"),
            ("three.jpg", picture(3, fmt="JPEG")),
            ("three.png", picture(98)),
            ("four.input.webp", picture(4, fmt="WEBP")),
            ("four.cls", b"1"),
            ("no_picture.txt", b"x"),
            ("no_extension", b"x"),
            (".hidden.png", picture(97)),
            ("x" * 300 + "/long.png", picture(5)),
            ("x" * 300 + "/long.cls", b"1"),
        ],
    )
    data = load(path, tmp_path, test_only=True)
    assert [data.train.relative(i)[-11:] for i in range(5)] == [
        "ot/one.JPEG",
        "two.png",
        "three.jpg",
        "r.input.webp"[-11:],
        "xx/long.png",
    ]
    assert data.train.labels.tolist() == [0, 1, 0, 1, 1]
    assert data.train.encoded(1) == picture(2)
    assert data.train.encoded(2) == picture(3, fmt="JPEG")
    assert set(check(path, root=tmp_path / "cache").notes) == {
        "2 files without a key and an extension in the archives are passed over",
        "1 samples without an image in the archives are passed over",
    }


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_nothing_is_written_and_no_link_followed(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture(666))
    path = write_tar(
        tmp_path / "wds" / "a.tar",
        [
            *samples(0, 4),
            ("../../escape.png", picture(50)),
            ("../../escape.cls", b"0"),
            (f"{tmp_path}/absolute.png", picture(51)),
            (f"{tmp_path}/absolute.cls", b"1"),
            special("link.png", tarfile.SYMTYPE, str(secret)),
            ("link.cls", b"0"),
            special("hard.png", tarfile.LNKTYPE, "0000.png"),
            special("pipe.png", tarfile.FIFOTYPE),
            special("device.png", tarfile.CHRTYPE),
            special("folder.png", tarfile.DIRTYPE),
        ],
    )
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    data = load(path, tmp_path, test_only=True)
    assert [data.train.encoded(i) for i in range(6)] == [picture(i) for i in (0, 1, 2, 3, 50, 51)]
    assert data.train.relative(4) == "../../escape.png"
    after = sorted(str(p) for p in tmp_path.rglob("*") if tmp_path / "cache" not in (p, *p.parents))
    assert after == before
    assert set(check(path, root=tmp_path / "cache").notes) == {
        "4 links and special files in the archives are passed over",
        "1 folders in the archives are passed over",
        "1 samples without an image in the archives are passed over",
    }


def test_the_same_name_twice(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*samples(0, 4), ("0001.PNG", picture(9))])
    with pytest.raises(DataError, match=r"a\.tar has 0001\.PNG twice"):
        load(path, tmp_path)
    write_tar(tmp_path / "b" / "0.tar", samples(0, 6))
    write_tar(tmp_path / "b" / "1.tar", samples(0, 6))  # each archive may count from 0
    assert len(load(tmp_path / "b", tmp_path, test_only=True).train) == 12


def negative_size(content):
    """The second header with a size of -512, in base 256, its checksum made right."""
    header = bytearray(content[:512])
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:1024] + bytes(header) + content[1024 + 512 :]


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda c: c[: len(c) // 2 // 512 * 512], "cut off"),
        (lambda c: c[:-10240], "damaged or cut off at byte"),
        (lambda c: c[: c.rindex(b"0009.cls") + 512], "cut off"),
        (lambda c: c[: c.rindex(b"0005.png")], "damaged or cut off at byte"),
        (lambda c: c[:1000], "unexpected end of data"),
        (lambda c: c.replace(b"0005.png", b"\xff005.png", 1), "damaged or cut off at byte"),
        (lambda c: c + c, "goes on after its end"),
        (lambda c: b"", "cannot read"),
        (lambda c: b"hello", "cannot read"),
        (lambda c: c[512:], "cannot read"),
        (negative_size, "negative size"),
    ],
)
def test_damaged_archives_are_named(tmp_path, damage, text):
    path = write_tar(tmp_path / "a.tar", samples(0, 10))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=text) as caught:
        load(path, tmp_path)
    assert str(path) in str(caught.value)
    assert str(caught.value) in check(path, root=tmp_path / "cache").problems


def test_compressed_archives_are_refused(tmp_path):
    for suffix in ("gz", "bz2", "xz"):
        path = tmp_path / f"{suffix}" / f"a.tar.{suffix}"
        path.parent.mkdir()
        with tarfile.open(path, f"w:{suffix}") as archive:
            archive.addfile(tarfile.TarInfo("x.png"))
        for spec in (path, path.parent):
            with pytest.raises(DataError, match=r"is compressed .* decompress it"):
                load(spec, tmp_path)


def test_any_damage_is_read_or_refused(tmp_path):
    """Bytes of an archive set at random end in samples or in a DataError, never in anything else."""
    path = write_tar(tmp_path / "a.tar", samples(0, 6))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(150):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read_archive(str(path))
            outcomes["read"] += 1
        except DataError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10


def test_bad_pictures_in_archives(tmp_path):
    bad = [("0100.png", b"<html>"), ("0100.cls", b"0"), ("0101.png", b""), ("0101.cls", b"1")]
    path = write_tar(tmp_path / "a.tar", [*samples(0, 20), *bad])
    with pytest.raises(DataError, match=r"2 of 22 images rejected.*\n  .*0100.png: an HTML page"):
        load(path, tmp_path)
    data = load(path, tmp_path, max_bad=0.1)
    assert {(os.path.basename(p), reason) for p, reason in data.rejects} == {
        ("a.tar: 0100.png", "an HTML page, not an image"),
        ("a.tar: 0101.png", "empty file (0 bytes)"),
    }
    assert len(data.train) + len(data.test) == 22  # another picture of the class stands in
    whole = load(path, tmp_path, max_bad=0.1, test_only=True).train
    assert torch.equal(whole.image(20), whole.image(0))
    assert torch.equal(whole.image(21), whole.image(1))


def test_an_index_is_made_once(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", samples(0, 20))
    made = []
    real = reading._make_index
    monkeypatch.setattr(reading, "_make_index", lambda *a: made.append(1) or real(*a))
    first = load(path, tmp_path)
    assert load(path, tmp_path).fingerprint == first.fingerprint
    assert len(made) == 1
    write_tar(path, samples(5, 20))
    os.utime(path, ns=(1, 1))
    assert load(path, tmp_path).fingerprint != first.fingerprint
    assert len(made) == 2
    for kept in (tmp_path / "cache" / "shards").iterdir():
        (kept / INDEX).write_bytes(b"damaged")
    load(path, tmp_path)
    load(path, tmp_path)
    assert len(made) == 3
    (tmp_path / "file").write_text("")
    assert len(load_data(path, root=tmp_path / "file").train) == 16  # cannot be kept, is read all the same
    assert len(made) == 4


def test_an_archive_that_changes_under_us(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(0, 20))
    data = load(path, tmp_path)
    write_tar(path, samples(100, 20))
    with pytest.raises(DataError, match=r"a\.tar is damaged at .*not those that were indexed"):
        data.train.image(0)


def test_folders_of_pictures_go_before_archives(tmp_path):
    root = write_classes(tmp_path / "pets")
    write_tar(root / "backup.tar", samples(0, 5))
    assert load(root, tmp_path).class_names == ["cat", "dog"]


# --- beside other readers -----------------------------------------------------------------------------


def test_webdataset_reads_what_we_write(packed):
    wds = pytest.importorskip("webdataset")
    data = load_data(packed)
    for split, images in (("train", data.train), ("test", data.test)):
        files = [str(packed / name) for name in tars(packed) if name.startswith(split)]
        read = {
            sample["__key__"]: (sample.get("png") or sample["jpg"], int(sample["cls"]))
            for sample in wds.WebDataset(files, shardshuffle=False)
        }
        assert [read[key] for key in sorted(read)] == [
            (images.encoded(i), int(images.labels[i])) for i in range(len(images))
        ]


def test_we_read_what_webdataset_writes(tmp_path):
    wds = pytest.importorskip("webdataset")
    (tmp_path / "wds").mkdir()
    with wds.ShardWriter(str(tmp_path / "wds" / "x-%06d.tar"), maxcount=7, verbose=0) as writer:
        for i in range(20):
            writer.write({"__key__": f"s{i:03}", "png": picture(i), "cls": i % 3, "json": {"i": i}})
    data = load(tmp_path / "wds", tmp_path, test_only=True)
    assert [data.train.encoded(i) for i in range(20)] == [picture(i) for i in range(20)]
    assert data.train.labels.tolist() == [i % 3 for i in range(20)]


def test_timm_reads_what_we_write(packed):
    pytest.importorskip("webdataset")
    from timm.data import create_dataset

    data = load_data(packed)
    theirs = create_dataset("wds/shards", root=str(packed), split="train", is_training=False, batch_size=4)
    assert len(theirs) == len(data.train)
    assert sorted(label for _, label in theirs) == data.train.labels.tolist()


def test_the_data_are_what_everything_takes(packed):
    assert isinstance(load_data(packed), ImageData)
    assert load_data(load_data(packed)).train is not None

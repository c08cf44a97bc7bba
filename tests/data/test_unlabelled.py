"""Pictures without labels: which they are, what is held back, what supervised training is told."""

import numpy as np
import pytest
import torch
from PIL import Image

from pellucid.cli import main
from pellucid.data import View, check, load_data, train_loader
from pellucid.data.images import to_channels
from pellucid.data.loaders import StepSampler
from pellucid.data.split import hold_out
from pellucid.errors import ConfigError, DataError


def write(path, value=0, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], (value,) * 3).save(path)
    return path


def values(images):
    return [int(images.image(i)[0, 0, 0]) for i in range(len(images))]


def flat(root, count=20):
    for i in range(count):
        write(root / f"{i:02}.png", i)
    return root


def loose(root):
    return flat(root)


def nested(root):
    for i in range(20):
        write(root.joinpath("trip", *("x" * (i % 5)), f"{i}.png"), i)
    return root


def mixed(root):
    for i in range(20):
        write(root.joinpath(*([], ["a"], ["b"], ["b", "c"])[i % 4], f"{i}.png"), i)
    return root


def one_class(root):
    flat(root / "cat")
    return root


def lonely_albums(root):
    for i in range(20):
        write(root / f"album {i}" / "only.png", i)
    return root


def with_an_empty_folder(root):
    flat(root / "a", 10)
    for i in range(10, 20):
        write(root / "b" / f"{i}.png", i)
    (root / "empty").mkdir()
    return root


@pytest.mark.parametrize("make", [loose, nested, mixed, one_class, lonely_albums, with_an_empty_folder])
def test_every_picture_counts(tmp_path, make):
    root = make(tmp_path / "photos")
    data = load_data(root, labels="optional")
    assert data.class_names == []
    assert (len(data.train), len(data.test)) == (18, 2)
    assert sorted(values(data.train) + values(data.test)) == list(range(20))
    assert (torch.cat([data.train.labels, data.test.labels]) == -1).all()
    again = load_data(root, labels="optional")
    assert again.test.paths == data.test.paths
    assert again.fingerprint == data.fingerprint
    assert load_data(root, labels="optional", split_seed=1).test.paths != data.test.paths
    assert len(load_data(root, labels="optional", test_fraction=0.5).test) == 10
    assert len(load_data(root, labels="optional", test_only=True).test) == 20
    report = check(root, labels="optional")
    assert report.ok
    assert (report.count, report.class_counts) == ((18, 2), {})
    assert report.lines()[0] == "photos: 20 images without labels, 18 + 2"
    if make is not mixed:  # which has class folders too: what lies beside them is ignored
        with pytest.raises(DataError):
            load_data(root)


def test_what_is_labelled_stays_so(tmp_path):
    for i in range(20):
        write(tmp_path / "classes" / "ab"[i % 2] / f"{i}.png", i)
        write(tmp_path / "pair" / ("train" if i < 14 else "val") / "ab"[i % 2] / f"{i}.png", i)
    for root in (tmp_path / "classes", tmp_path / "pair"):
        required, optional = load_data(root), load_data(root, labels="optional")
        assert optional.class_names == ["a", "b"]
        assert optional.fingerprint == required.fingerprint
        assert optional.train.paths == required.train.paths
        assert torch.equal(optional.train.labels, required.train.labels)


def test_train_and_val_without_classes_are_taken_as_they_are(tmp_path):
    flat(tmp_path / "train", 7)
    for i in range(3):
        write(tmp_path / "val" / "deep" / f"{i}.png", 100 + i)
    data = load_data(tmp_path, labels="optional")
    assert (values(data.train), values(data.test)) == (list(range(7)), [100, 101, 102])
    with pytest.raises(ConfigError, match="brings its own split"):
        load_data(tmp_path, labels="optional", test_fraction=0.5)
    assert values(load_data(tmp_path, labels="optional", test_only=True).train) == [100, 101, 102]


def test_a_tenth_is_held_back_but_no_more_than_5000():
    for count, held in ((2, 1), (10, 1), (200, 20), (49_999, 5000), (80_000, 5000)):
        train, test = hold_out(np.full(count, -1), None, 0)
        assert len(test) == held
        assert sorted([*train, *test]) == list(range(count))
    assert len(hold_out(np.full(80_000, -1), 0.5, 0)[1]) == 40_000  # whoever names a share gets it
    assert len(hold_out(np.zeros(80_000), None, 0)[1]) == 16_000


def test_what_supervised_training_is_told(tmp_path):
    for root, said in (
        (flat(tmp_path / "flat"), "put each class in a folder of its own"),
        (one_class(tmp_path / "one"), "give every class a folder of its own, at least two"),
        (nested(tmp_path / "nested"), "give every class a folder of its own, at least two"),
    ):
        with pytest.raises(DataError, match=said) as caught:
            load_data(root)
        assert "--objective simdino" in str(caught.value)
        report = check(root)
        assert not report.ok
        assert report.without_labels
        assert str(caught.value) in report.problems
        assert report.notes[0] == (
            "no class folders: 20 images without labels, usable with --objective simdino, dino or mae"
        )
        assert report.lines()[0].endswith("20 images without labels, 20 + 0")
        assert report.sizes == ((8, 8),) * 3
        assert report.lines()[-1] == "not ok; ok without labels"


def test_check_on_the_command_line(tmp_path, capsys):
    root = flat(tmp_path / "photos")
    assert main(["check", str(root)]) == 3
    out, err = capsys.readouterr()
    assert "no class folders: 20 images without labels" in out
    assert "--labels optional" in err
    assert main(["check", str(root), "--labels", "optional"]) == 0
    (root / "00.png").write_bytes(b"")
    assert main(["check", str(root), "--labels", "optional"]) == 3
    assert "1 of 20 images rejected" in capsys.readouterr().out


def test_notes_say_why_there_are_no_labels(tmp_path):
    note = check(mixed(tmp_path / "mixed"), labels="optional").notes[0]
    assert note == "taken without labels: images lie outside the class folders"
    for part in ("train", "val"):
        for name in "ab":
            flat(tmp_path / "outer" / "inner" / part / name, 3)
    note = check(tmp_path / "outer", labels="optional").notes[0]
    assert note.endswith(f"did you mean {tmp_path}/outer/inner?")


def test_nothing_to_load(tmp_path):
    with pytest.raises(DataError, match="no images under"):
        load_data(tmp_path, labels="optional")
    write(tmp_path / "only.png")
    with pytest.raises(DataError, match="1 image cannot be split"):
        load_data(tmp_path, labels="optional")
    assert len(load_data(tmp_path, labels="optional", test_only=True).test) == 1
    flat(tmp_path / "train", 3)
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match=f"no images under {tmp_path}/val"):
        load_data(tmp_path, labels="optional")
    with pytest.raises(ConfigError, match="labels is 'maybe'"):
        load_data(tmp_path, labels="maybe")


def test_any_readable_picture_stands_in_for_a_bad_one(tmp_path):
    flat(tmp_path / "train", 6)
    flat(tmp_path / "val", 3)
    for name in ("train/02.png", "train/05.png", "val/00.png"):
        (tmp_path / name).write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"3 of 9 images rejected"):
        load_data(tmp_path, labels="optional")
    data = load_data(tmp_path, labels="optional", max_bad=0.5)
    assert (values(data.train), values(data.test)) == ([0, 1, 3, 3, 4, 0], [1, 1, 2])
    assert len(data.rejects) == 3
    for i in range(3):
        (tmp_path / "val" / f"{i:02}.png").write_bytes(b"")
    with pytest.raises(DataError, match="no test image can be read"):
        load_data(tmp_path, labels="optional", max_bad=1)
    for i in range(6):
        (tmp_path / "train" / f"{i:02}.png").write_bytes(b"")
    with pytest.raises(DataError, match="no training image can be read"):
        load_data(tmp_path, labels="optional", max_bad=1)


# --- arrays -------------------------------------------------------------------------------------------


def pixels(n=20, shape=(6, 5), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def save(path, **named):
    np.savez(path, **named)
    return path


def test_npz_with_pictures_only(tmp_path):
    x = pixels()
    path = save(tmp_path / "a.npz", x=x)
    data = load_data(path, labels="optional")
    assert (len(data.train), len(data.test), data.class_names) == (18, 2, [])
    assert (data.train.labels == -1).all()
    parts = torch.cat([data.train.images, data.test.images])
    assert sorted(p.numpy().tobytes() for p in parts) == sorted(p.tobytes() for p in x)
    with pytest.raises(DataError, match=r"there is no array 'y'.*--objective simdino"):
        load_data(path)
    report = check(path)
    assert (report.ok, report.without_labels) == (False, True)
    assert "20 images without labels, usable with --objective" in report.notes[0]
    assert check(path, labels="optional").ok


def test_npz_whose_labels_are_of_no_use(tmp_path):
    x = pixels()
    for named in (
        {"y": np.zeros(20, int)},
        {"y": np.arange(20) // 19},
        {"y": np.arange(20) % 2, "x_test": pixels(4)},
        {"class_names": np.array(["a", "b"])},
    ):
        data = load_data(save(tmp_path / "a.npz", x=x, **named), labels="optional")
        assert data.class_names == []
        assert (data.test.labels == -1).all()
    kept = load_data(save(tmp_path / "b.npz", x=x, y=np.arange(20) % 2), labels="optional")
    assert kept.class_names == ["0", "1"]
    for wrong in ({"y": np.arange(19)}, {"y": np.zeros(20)}, {"x": np.zeros((0, 2, 2), np.uint8)}):
        with pytest.raises(DataError):
            load_data(save(tmp_path / "c.npz", **({"x": x} | wrong)), labels="optional")


@pytest.mark.parametrize("channels", [1, 2, 4, 12, 64])
def test_arrays_of_any_number_of_channels(tmp_path, channels):
    x = pixels(20, (6, 5, channels))
    path = save(tmp_path / "a.npz", x=x, y=np.arange(20) % 2, x_test=x[:4], y_test=np.arange(4) % 2)
    data = load_data(path)
    assert (data.in_chans, data.train.images.shape) == (channels, (20, channels, 6, 5))
    exact = x.astype(np.float64) / 255
    assert data.mean == pytest.approx(exact.mean((0, 1, 2)), abs=1e-12)
    assert data.std == pytest.approx(exact.std((0, 1, 2)), abs=1e-12)
    kind = {1: "gray"}.get(channels, f"of {channels} channels")
    assert check(path).kinds == {kind: 24}
    view = View((6, 5), channels, data.mean, data.std)
    batch, _, index = next(iter(train_loader(data.train, view, StepSampler(20, 8, 0, 1))))
    shown = (torch.from_numpy(x).permute(0, 3, 1, 2)[index].float() / 255).double()
    mean, std = (torch.tensor(v).double().view(-1, 1, 1) for v in (data.mean, data.std))
    assert torch.allclose(batch.double(), (shown - mean) / std, atol=1e-5)


def test_only_gray_and_colour_become_each_other():
    four = torch.zeros(4, 2, 2, dtype=torch.uint8)
    assert to_channels(four, 4) is four
    for image, wanted in ((four, 3), (four, 1), (four[:1], 4), (four[:3], 4)):
        with pytest.raises(ConfigError, match=f"{len(image)} channels cannot become {wanted}"):
            to_channels(image, wanted)

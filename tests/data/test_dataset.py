"""From folders, files and names to data, and every way in which they can be wrong."""

import logging
import os
import pickle  # noqa: TID251 - to write what must be refused, and torchvision's own files
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pellucid.data import ArrayImages, FileImages, builtin, check, load_data, verify
from pellucid.data.dataset import channel_statistics, natural_size
from pellucid.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def _few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write(path, value=0, size=(8, 8), mode="RGB"):
    """A picture whose pixels say which one it is: constant ``value``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size[::-1], (value,) * 3 if mode == "RGB" else value).save(path)
    return path


def write_classes(root, count=10, names=("cat", "dog"), **options):
    for offset, name in enumerate(names):
        for i in range(count):
            write(root / name / f"{i:02}.png", value=100 * offset + i, **options)
    return root


def values(images):
    return [int(images.image(i)[0, 0, 0]) for i in range(len(images))]


def message(spec, **options):
    """What load_data says; check must list the same and not raise."""
    with pytest.raises(DataError) as caught:
        load_data(spec, **options)
    text = str(caught.value)
    assert 1 <= len(text.splitlines()) <= 5
    if not options.keys() & {"test_only"}:
        report = check(spec, **options)
        assert not report.ok
        assert text in report.problems
    return text


# --- folders ------------------------------------------------------------------------------------------


def test_a_folder_of_class_folders(tmp_path):
    data = load_data(write_classes(tmp_path / "pets", count=10))
    assert (data.name, data.class_names) == ("pets", ["cat", "dog"])
    assert (len(data.train), len(data.test)) == (16, 4)
    assert sorted(values(data.train) + values(data.test)) == [*range(10), *range(100, 110)]
    for images in (data.train, data.test):
        assert [value >= 100 for value in values(images)] == (images.labels == 1).tolist()
        assert images.labels.dtype == torch.int64
    assert torch.bincount(data.test.labels).tolist() == [2, 2]
    assert (data.in_chans, data.img_size, data.small, data.rejects) == (3, (8, 8), True, ())
    assert load_data(data) is data


def test_the_hold_out_is_a_function_of_seed_and_fraction(tmp_path):
    root = write_classes(tmp_path, count=20)
    first = load_data(root)
    assert first.test.paths == load_data(root).test.paths
    assert first.test.paths != load_data(root, split_seed=1).test.paths
    assert first.fingerprint == load_data(root, split_seed=1).fingerprint
    assert len(load_data(root, test_fraction=0.5).test) == 20
    assert len(load_data(root, test_fraction=0.001).test) == 2  # one of each class
    assert len(load_data(root, test_fraction=0.999).train) == 2
    for fraction in (0, 1, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            load_data(root, test_fraction=fraction)


@pytest.mark.parametrize(
    ("train", "test"), [("train", "val"), ("train", "test"), ("Train", "valid"), ("train", "validation")]
)
def test_a_train_and_val_pair(tmp_path, train, test):
    write_classes(tmp_path / train, count=3)
    write_classes(tmp_path / test, count=2, names=("dog",))
    write_classes(tmp_path / "extra", count=1)
    data = load_data(tmp_path)
    assert (len(data.train), len(data.test)) == (6, 2)
    assert data.test.labels.tolist() == [1, 1]
    with pytest.raises(ConfigError, match="brings its own split"):
        load_data(tmp_path, test_fraction=0.3)
    assert "brings its own split" in check(tmp_path, test_fraction=0.3).problems[0]
    assert len(load_data(tmp_path / train, test_fraction=0.4).train) == 4


def test_only_the_test_set(tmp_path):
    whole = load_data(write_classes(tmp_path / "one", names=("cat",), count=1), test_only=True)
    assert (len(whole.test), whole.class_names) == (1, ["cat"])
    write_classes(tmp_path / "pair" / "train", count=3)
    write_classes(tmp_path / "pair" / "val", count=2, names=("dog",))
    pair = load_data(tmp_path / "pair", test_only=True)
    assert pair.test.labels.tolist() == [1, 1]
    assert pair.class_names == ["cat", "dog"]


def test_what_is_passed_over(tmp_path):
    write_classes(tmp_path, count=5)
    write(tmp_path / "cat" / "deep" / "er" / "x.PNG", value=50)
    write(tmp_path / "cat" / ".hidden.png", value=60)
    write(tmp_path / "cat" / ".git" / "x.png", value=60)
    write(tmp_path / "__MACOSX" / "x.png", value=60)
    write(tmp_path / "loose.png", value=60)
    (tmp_path / "cat" / "notes.txt").write_text("hello")
    data = load_data(tmp_path)
    assert sorted(values(data.train) + values(data.test)) == [*range(5), 50, *range(100, 105)]
    assert check(tmp_path).notes == (f"1 images directly in {tmp_path} are in no class and ignored",)


def test_every_real_file_counts_once(tmp_path):
    root = write_classes(tmp_path / "pets", count=3)
    (root / "cat" / "loop").symlink_to(root)
    (root / "cat" / "self").symlink_to(root / "cat")
    (root / "again").symlink_to(root)
    (root / "up").symlink_to(tmp_path)
    os.link(root / "cat" / "00.png", root / "cat" / "copy.png")
    (root / "cat" / "link.png").symlink_to(root / "cat" / "01.png")
    (root / "dog" / "outside.png").symlink_to(write(tmp_path / "elsewhere.png", value=77))
    write(tmp_path / "birds" / "b0.png", value=201)
    write(tmp_path / "birds" / "b1.png", value=202)
    (root / "bird").symlink_to(tmp_path / "birds")
    data = load_data(root)
    assert data.class_names == ["bird", "cat", "dog"]
    assert sorted(values(data.train) + values(data.test)) == [0, 1, 2, 77, 100, 101, 102, 201, 202]
    assert [note.split("/")[-1] for note in check(root).notes] == [
        "loop is a link to a folder, not followed",
        "self is a link to a folder, not followed",
    ]


def test_hostile_names(tmp_path):
    write_classes(tmp_path, count=3)
    for raw in (b"caf\xe9\xff.png", b"new\nline\x1b[31m.png", "🐈.png".encode()):
        picture = write(tmp_path / "plain.png", value=9)
        os.rename(picture, os.path.join(os.fsencode(tmp_path / "cat"), raw))
    os.rename(tmp_path / "dog", os.path.join(os.fsencode(tmp_path), b"d\xf6g\x1b"))
    (tmp_path / "cat" / "bad\x1b[31m.png").write_bytes(b"")
    data = load_data(tmp_path, max_bad=0.2)
    assert len(data.train) + len(data.test) == 10
    shown = [images.name(i) for images in (data.train, data.test) for i in range(len(images))]
    shown += check(tmp_path).lines()
    assert all(name.isprintable() and name.encode("utf-8") for name in shown)


def test_a_change_of_the_files_changes_the_fingerprint(tmp_path):
    root = write_classes(tmp_path / "a", count=3)
    seen = [load_data(root).fingerprint]
    os.utime(root / "cat" / "00.png", (0, 0))
    assert load_data(root).fingerprint == seen[0]
    os.rename(tmp_path / "a", tmp_path / "b")
    root = tmp_path / "b"
    assert load_data(root).fingerprint == seen[0]
    write(root / "cat" / "new.png")
    seen.append(load_data(root).fingerprint)
    os.rename(root / "cat" / "new.png", root / "cat" / "newer.png")
    seen.append(load_data(root).fingerprint)
    write(root / "cat" / "newer.png", size=(30, 31))
    seen.append(load_data(root).fingerprint)
    os.rename(root / "cat", root / "car")
    seen.append(load_data(root).fingerprint)
    assert len(set(seen)) == 5


# --- folders that cannot be used ----------------------------------------------------------------------


def test_missing(tmp_path):
    assert message("digit") == "no folder and no data set is called 'digit' - did you mean 'digits'?"
    assert "check the path" in message(str(tmp_path / "nothing"))
    assert "known: cifar10" in message("zzzzzz")
    file = tmp_path / "file.bin"
    file.write_text("x")
    assert "neither a folder nor a .npz file" in message(file)


def test_empty(tmp_path):
    assert message(tmp_path).startswith(f"no images under {tmp_path} - put each class in a folder")
    write(tmp_path / "a.png")
    assert "its 1 images lie side by side" in message(tmp_path)


def test_the_wrong_level(tmp_path):
    write_classes(tmp_path / "zip" / "pets" / "train", count=2)
    write_classes(tmp_path / "zip" / "pets" / "val", count=2)
    assert message(tmp_path / "zip").endswith(f"did you mean {tmp_path}/zip/pets?")
    assert message(tmp_path).endswith(f"did you mean {tmp_path}/zip/pets?")
    write_classes(tmp_path / "alone" / "train", count=2)
    assert message(tmp_path / "alone").endswith(f"did you mean {tmp_path}/alone/train?")


def test_an_empty_class(tmp_path):
    write_classes(tmp_path, count=3)
    (tmp_path / "bird").mkdir()
    assert (
        message(tmp_path)
        == f'class "bird" has no images - {tmp_path} - add images to that folder or remove it'
    )


def test_one_class(tmp_path):
    write_classes(tmp_path, names=("cat",), count=3)
    assert message(tmp_path).startswith(f'only one class, "cat" - {tmp_path} - give every class a folder')


def test_a_class_with_one_image(tmp_path):
    write_classes(tmp_path, count=3)
    write(tmp_path / "bird" / "a.png")
    text = message(tmp_path)
    assert text.startswith('class "bird" has 1 image and cannot be split')
    assert text.endswith("add images or remove the folder")


def test_a_val_class_without_training_images(tmp_path):
    write_classes(tmp_path / "train", count=2)
    write_classes(tmp_path / "val", count=1, names=("cat", "newt", "owl"))
    assert 'without training images: "newt", "owl"' in message(tmp_path)


def test_an_empty_val(tmp_path):
    write_classes(tmp_path / "train", count=2)
    (tmp_path / "val").mkdir()
    assert message(tmp_path).startswith(f"no images under {tmp_path}/val")


def test_check_lists_every_problem_at_once(tmp_path):
    write_classes(tmp_path, count=3)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "lonely" / "a.png")
    (tmp_path / "cat" / "00.png").write_bytes(b"")
    problems = "\n".join(check(tmp_path).problems)
    for part in (
        '"empty" has no images',
        '"lonely" has 1 image',
        "1 of 7 images rejected",
        "cat/00.png: empty file",
    ):
        assert part in problems
    assert check(tmp_path).lines()[-1] == "not ok"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_listed(tmp_path):
    write_classes(tmp_path, count=3)
    (tmp_path / "cat" / "locked").mkdir(mode=0)
    assert load_data(tmp_path).rejects[0].reason == "cannot be listed: permission denied"


# --- bad files ----------------------------------------------------------------------------------------


def damage(root, *names):
    for name in names:
        (root / name).write_bytes(b"<html>404</html>")


def test_too_many_bad_files(tmp_path):
    root = write_classes(tmp_path, count=10)
    damage(root, *(f"cat/{i:02}.png" for i in range(7)))
    text = message(root)
    assert text.startswith(f"7 of 20 images rejected (35.00%, limit 1.00%) - {root}")
    assert "--max-bad" in text
    assert text.count("an HTML page, not an image") == 5
    assert "cat/04.png" in text
    assert "cat/05.png" not in text
    assert text.endswith("and 2 more")
    assert len(load_data(root, max_bad=0.35).rejects) == 7
    message(root, max_bad=0.34)


def test_a_substitute_stands_in_for_a_bad_file(tmp_path):
    write_classes(tmp_path / "train", count=4)
    write_classes(tmp_path / "val", count=2)
    whole = load_data(tmp_path)
    damage(tmp_path / "train", "cat/01.png", "cat/02.png", "dog/03.png")
    data = load_data(tmp_path, max_bad=0.5)
    assert values(data.train) == [0, 3, 3, 3, 100, 101, 102, 100]  # the next of the class, round the end
    assert torch.equal(data.train.labels, whole.train.labels)
    assert data.train.paths == whole.train.paths
    assert [os.path.relpath(reject.path, tmp_path) for reject in data.rejects] == [
        "train/cat/01.png",
        "train/cat/02.png",
        "train/dog/03.png",
    ]


def test_a_file_that_goes_bad_later_is_substituted_alike_in_any_order(tmp_path, caplog):
    write_classes(tmp_path, names=("cat",), count=5)
    paths = [str(tmp_path / "cat" / f"{i:02}.png") for i in range(5)]
    images = FileImages(paths, torch.zeros(5))
    assert values(images) == [0, 1, 2, 3, 4]
    damage(tmp_path, "cat/03.png", "cat/04.png")
    for order in ([4, 3, 0], [0, 3, 4]):
        images = FileImages(paths, torch.zeros(5))
        with caplog.at_level(logging.WARNING):
            assert {i: int(images.image(i)[0, 0, 0]) for i in order} == {0: 0, 3: 0, 4: 0}
    assert "03.png; the next picture of its class stands in" in caplog.text
    assert [int(image[0, 0, 0]) for image in images.batch([4, 1])] == [0, 1]


def test_a_class_without_a_readable_file(tmp_path):
    write_classes(tmp_path, count=3)
    damage(tmp_path, "cat/00.png", "cat/01.png", "cat/02.png")
    assert 'no training image of class "cat" can be read' in message(tmp_path, max_bad=1.0)
    images = FileImages([str(tmp_path / "cat" / "00.png")], torch.zeros(1))
    with pytest.raises(DataError, match="no readable image is left"):
        images.image(0)


def test_a_test_class_that_cannot_be_read_is_left_out_of_test(tmp_path):
    write_classes(tmp_path / "train", count=2)
    write_classes(tmp_path / "val", count=2)
    damage(tmp_path / "val", "cat/00.png", "cat/01.png")
    data = load_data(tmp_path, max_bad=0.5)
    assert data.test.labels.tolist() == [1, 1]
    assert len(data.rejects) == 2
    damage(tmp_path / "val", "dog/00.png", "dog/01.png")
    assert "no test image can be read" in message(tmp_path, max_bad=0.5)


def test_special_files_in_a_folder(tmp_path):
    write_classes(tmp_path, count=5)
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    (tmp_path / "cat" / "nowhere.png").symlink_to(tmp_path / "missing")
    reasons = {os.path.basename(path): reason for path, reason in load_data(tmp_path, max_bad=0.5).rejects}
    assert reasons == {"pipe.png": "not a regular file (named pipe)", "nowhere.png": "no such file"}


def test_a_big_folder_is_looked_at_by_header(tmp_path, monkeypatch):
    write_classes(tmp_path, count=5)
    bad = tmp_path / "cat" / "00.png"
    Image.effect_noise((8, 8), 100).save(bad)
    bad.write_bytes(bad.read_bytes()[:70])  # the header is whole, the pixels are not
    assert len(load_data(tmp_path, max_bad=0.5).rejects) == 1
    monkeypatch.setattr(verify, "DECODE_LIMIT", 9)
    data = load_data(tmp_path)
    assert data.rejects == ()
    assert data.img_size == (8, 8)
    assert bad.name in "".join(data.train.paths + data.test.paths)
    assert sorted(values(data.train) + values(data.test)).count(0) == 0  # another stands in


def test_max_pixels(tmp_path):
    write_classes(tmp_path, count=5)
    assert "limit 6.3e-05 MP" in message(tmp_path, max_pixels=63)
    assert load_data(tmp_path, max_pixels=64).rejects == ()


# --- what is measured ---------------------------------------------------------------------------------


def test_statistics_are_of_training_images_only(tmp_path):
    for value in (0, 51, 204, 255):
        write(tmp_path / "train" / ("dark" if value < 100 else "light") / f"{value}.png", value=value)
    write_classes(tmp_path / "val", names=("dark",), count=3)
    data = load_data(tmp_path)
    assert data.mean == pytest.approx((0.5,) * 3)
    assert data.std == pytest.approx((np.sqrt((0.25 + 0.09 + 0.09 + 0.25) / 4),) * 3)


def test_every_picture_weighs_the_same(tmp_path):
    write(tmp_path / "train" / "a" / "big.png", value=255, size=(90, 90))
    write(tmp_path / "train" / "b" / "little.png", value=0, size=(5, 5))
    write_classes(tmp_path / "val", names=("a",), count=1)
    assert load_data(tmp_path).mean == pytest.approx((0.5,) * 3)


def test_the_standard_deviation_is_never_zero():
    constant = ArrayImages(torch.full((4, 1, 3, 3), 7, dtype=torch.uint8), torch.zeros(4), "constant")
    assert channel_statistics(constant, 1) == (pytest.approx((7 / 255,)), pytest.approx((1 / 255,)))


def test_statistics_against_numpy():
    x = torch.randint(0, 256, (50, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = channel_statistics(ArrayImages(x, torch.zeros(50), "noise"), 3)
    exact = x.numpy().astype(np.float64) / 255
    assert mean == pytest.approx(exact.mean((0, 2, 3)), abs=1e-12)
    assert std == pytest.approx(exact.std((0, 2, 3)), abs=1e-12)


def test_gray_and_colour_and_sizes(tmp_path):
    gray = load_data(write_classes(tmp_path / "gray", count=3, mode="L"))
    assert (gray.in_chans, len(gray.mean)) == (1, 1)
    write(tmp_path / "gray" / "cat" / "colour.png", size=(9, 8))
    mixed = load_data(tmp_path / "gray", split_seed=2)
    assert mixed.train.paths[-1] != "colour.png"
    assert load_data(tmp_path / "gray", test_only=True).in_chans == 3
    assert load_data(tmp_path / "gray", test_only=True).img_size is None
    assert load_data(write_classes(tmp_path / "large", count=2, size=(65, 65))).small is False
    assert natural_size([(64, 32), (64, 32)]) == (64, 32)
    assert natural_size([(64, 32), (32, 64)]) is None
    assert natural_size([(64, 65)]) is None


def test_check_counts(tmp_path):
    for i in range(4):
        write(tmp_path / "train" / "cat" / f"{i}.png", value=i, mode="L", size=(4, 4))
        write(tmp_path / "train" / "dog" / f"{i}.png", value=i, size=(9, 5))
    write(tmp_path / "val" / "cat" / "x.png", value=9, mode="L", size=(20, 30))
    Image.new("RGBA", (5, 9)).save(tmp_path / "val" / "cat" / "y.png")
    report = check(tmp_path)
    assert report.ok
    assert report.class_counts == {"cat": (4, 2), "dog": (4, 0)}
    assert report.sizes == ((4, 4), (9, 5), (20, 30))
    assert report.kinds == {"alpha": 1, "colour": 4, "gray": 5}
    lines = report.lines()
    assert lines[0].endswith("10 images in 2 classes, 8 + 2")
    assert "height x width: 4x4 smallest, 9x5 median, 20x30 largest" in lines
    assert lines[-1] == "ok"


def test_check_finds_leakage(tmp_path):
    write_classes(tmp_path / "train", count=3)
    write_classes(tmp_path / "val", count=1, names=("cat",), size=(7, 7))
    assert check(tmp_path).ok
    leaked = tmp_path / "val" / "cat" / "leaked.png"
    leaked.write_bytes((tmp_path / "train" / "dog" / "02.png").read_bytes())
    report = check(tmp_path)
    assert report.duplicates == ((str(tmp_path / "train" / "dog" / "02.png"), str(leaked)),)
    assert not report.ok
    assert any("1 test images are also in train" in line for line in report.lines())


def test_a_long_list_is_cut(tmp_path):
    write_classes(tmp_path, names=tuple(f"class{i:02}" for i in range(30)), count=2)
    assert "  ... and 10 more" in check(tmp_path).lines()


# --- arrays and names ---------------------------------------------------------------------------------


def test_digits():
    data = load_data("digits")
    assert (len(data.train), len(data.test), data.in_chans, data.img_size) == (1347, 450, 1, (8, 8))
    assert data.class_names == list("0123456789")
    assert data.train.images.max() == 255
    assert (data.train.name(12), data.test.paths[0]) == ("digits[12]", "digits/test[0]")
    assert load_data("digits", split_seed=5).fingerprint == data.fingerprint
    assert check("digits").ok
    with pytest.raises(ConfigError, match="brings its own split"):
        load_data("digits", test_fraction=0.5)


def arrays(n=20, classes=2, shape=(6, 5), seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *shape), dtype=np.uint8), np.arange(n) % classes


def save(path, **named):
    np.savez(path, **named)
    return path


def test_npz(tmp_path):
    x, y = arrays()
    data = load_data(save(tmp_path / "a.npz", x=x, y=y + 5))
    assert data.class_names == ["5", "6"]
    assert (len(data.train), len(data.test), data.in_chans, data.img_size) == (16, 4, 1, (6, 5))
    parts = [
        (images.image(i).numpy()[0], images.labels[i])
        for images in (data.train, data.test)
        for i in range(len(images))
    ]
    where = {picture.tobytes(): int(label) for picture, label in parts}
    assert where == {picture.tobytes(): int(label) for picture, label in zip(x, y, strict=True)}
    assert len(load_data(tmp_path / "a.npz", test_only=True).test) == 20


def test_npz_with_test_set_and_names(tmp_path):
    (x, y), (x_test, y_test) = arrays(shape=(4, 4, 3)), arrays(n=6, shape=(4, 4, 3), seed=1)
    path = save(
        tmp_path / "b.npz", x=x, y=y, x_test=x_test, y_test=y_test, class_names=np.array(["no", "yes"])
    )
    data = load_data(path)
    assert data.class_names == ["no", "yes"]
    assert np.array_equal(data.test.images.permute(0, 2, 3, 1).numpy(), x_test)
    assert data.test.labels.tolist() == y_test.tolist()
    assert check(path).ok
    leaking = save(tmp_path / "c.npz", x=x, y=y, x_test=x[3:5], y_test=y[3:5])
    assert [train for train, _ in check(leaking).duplicates] == [f"{leaking}[3]", f"{leaking}[4]"]


class Bomb:
    exploded = False

    def __reduce__(self):
        return setattr, (Bomb, "exploded", True)


def test_npz_with_pickled_objects_is_refused(tmp_path):
    x, _ = arrays()
    objects = np.empty(20, dtype=object)
    objects[:] = [Bomb() for _ in range(20)]
    assert "it holds pickled objects" in message(save(tmp_path / "bomb.npz", x=x, y=objects))
    (tmp_path / "raw.npz").write_bytes(pickle.dumps(Bomb()))
    assert "cannot read" in message(tmp_path / "raw.npz")
    assert not Bomb.exploded


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": None}, "there is no array 'x', only y"),
        ({"y": None}, "there is no array 'y', only x"),
        ({"x": np.zeros((20, 6, 5))}, "x is float64 (20, 6, 5)"),
        ({"x": np.zeros((20, 6, 5, 65), np.uint8)}, "give uint8"),
        ({"x": np.zeros((20, 0, 5), np.uint8)}, "give uint8"),
        ({"y": np.zeros(20)}, "y is float64 (20,)"),
        ({"y": np.arange(19)}, "x has 20 images and y 19 labels"),
        ({"y": np.zeros(20, int)}, "only one class in y"),
        ({"y": np.arange(20) // 19}, 'class "1" has 1 image and cannot be split'),
        ({"class_names": np.array(["only"])}, "y has the label 1, which is none of the 1 classes"),
        ({"y": np.arange(20) % 2 - 1, "class_names": np.array(["a", "b"])}, "y has the label -1"),
        ({"x_test": np.zeros((2, 6, 5), np.uint8)}, "there is no array 'y_test'"),
        ({"x_test": np.zeros((2, 6, 5), np.uint8), "y_test": np.array([0, 7])}, "y_test has the label 7"),
        ({"x_test": np.zeros((2, 6, 5, 3), np.uint8), "y_test": np.array([0, 1])}, "1 channels and x_test 3"),
    ],
)
def test_npz_that_cannot_be_used(tmp_path, change, text):
    x, y = arrays()
    named = {name: array for name, array in ({"x": x, "y": y} | change).items() if array is not None}
    assert text in message(save(tmp_path / "a.npz", **named))


def test_damaged_npz(tmp_path):
    x, y = arrays()
    path = save(tmp_path / "a.npz", x=x, y=y)
    whole = path.read_bytes()
    for damaged in (b"", b"not a zip", whole[: len(whole) // 2], whole[:200] + b"\xff" * 200 + whole[400:]):
        path.write_bytes(damaged)
        assert "cannot read" in message(path)


def write_cifar10(root, per_batch=20):
    """The files of CIFAR-10's python version, with ``per_batch`` random pictures in each."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    every = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        rows = rng.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        labels = [i % 10 for i in range(per_batch)]
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": labels}))
        every[name] = rows
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()  # noqa: SIM905
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return every


def test_cifar10_from_its_files(tmp_path, monkeypatch):
    import torchvision.datasets.cifar

    rows = write_cifar10(tmp_path)
    text = message(
        "cifar10", root=tmp_path
    )  # torchvision checks the MD5 of each file: these are not the real ones
    assert "missing or damaged" in text
    monkeypatch.setattr(
        torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: os.path.isfile(path)
    )
    data = load_data("cifar10", root=tmp_path)
    assert (len(data.train), len(data.test), data.in_chans, data.img_size) == (100, 20, 3, (32, 32))
    assert data.class_names[3] == "cat"
    assert np.array_equal(data.train.image(21).numpy(), rows["data_batch_2"][1].reshape(3, 32, 32))
    assert data.test.labels[:11].tolist() == [*range(10), 0]


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(side.to_bytes(4, "big") for side in array.shape)
    path.write_bytes(header + array.tobytes())


def test_mnist_from_its_files(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    x, y = arrays(n=30, classes=10, shape=(28, 28))
    for part, count in (("train", 30), ("t10k", 10)):
        write_idx(raw / f"{part}-images-idx3-ubyte", x[:count])
        write_idx(raw / f"{part}-labels-idx1-ubyte", y[:count].astype(np.uint8))
    data = load_data("mnist", root=tmp_path)
    assert (len(data.train), len(data.test), data.in_chans, data.img_size) == (30, 10, 1, (28, 28))
    assert np.array_equal(data.train.images[:, 0].numpy(), x)
    assert len(check("mnist", root=tmp_path).duplicates) == 10


def test_svhn_labels_are_an_array(tmp_path, monkeypatch):
    class Svhn:
        def __init__(self, root, split, download):
            self.data, self.labels = np.zeros((6, 3, 32, 32), np.uint8), np.array([0, 1, 2, 0, 1, 2])

    monkeypatch.setattr(builtin, "_torchvision_class", {"SVHN": Svhn}.__getitem__)
    data = load_data("svhn", root=tmp_path)
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.class_names == list("0123456789")


@pytest.mark.parametrize("name", sorted(builtin.PUBLISHED))
def test_what_is_not_there_says_download(tmp_path, name):
    text = message(name, root=tmp_path)
    assert f"{name} is missing or damaged in {tmp_path}" in text
    assert "--download" in text


def test_a_failed_download(tmp_path, monkeypatch):
    class Offline:
        def __init__(self, root, train, download):
            raise OSError("no route to host")

    monkeypatch.setattr(builtin, "_torchvision_class", {"MNIST": Offline}.__getitem__)
    assert "check the connection" in message("mnist", root=tmp_path / "new", download=True)
    (tmp_path / "file").write_text("")
    assert "cannot make" in message("mnist", root=tmp_path / "file" / "x", download=True)


def test_imagenet(tmp_path):
    text = message("imagenet", root=tmp_path)
    assert "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, ILSVRC2012_devkit_t12.tar.gz" in text
    for part in ("train", "val"):
        write_classes(tmp_path / part, names=("n01440764", "n01443537"), count=2)
    data = load_data("imagenet", root=tmp_path)
    assert (data.name, data.class_names, len(data.test)) == ("imagenet", ["n01440764", "n01443537"], 4)


def test_torchvision_datasets_is_imported_only_when_used():
    import subprocess

    code = "import sys, pellucid.data as d; d.load_data; print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

"""One call from what the user names - a folder, a file, a known name - to data ready to train on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import torch

from pellucid.data import arrays, builtin
from pellucid.data.dataset import FileImages, ImageData, channel_statistics, natural_size
from pellucid.data.folders import ImageFile, Layout, Split, find_layout, problems, split
from pellucid.data.images import MAX_PIXELS, show_name
from pellucid.data.split import refuse_fraction
from pellucid.data.verify import Look, look_at, rejected, too_many_rejects
from pellucid.errors import DataError, suggest

MAX_BAD = 0.01

Spec = str | os.PathLike[str] | ImageData


def load_data(
    spec: Spec,
    *,
    download: bool = False,
    root: str | os.PathLike[str] | None = None,
    split_seed: int = 0,
    test_fraction: float | None = None,
    max_pixels: int = MAX_PIXELS,
    max_bad: float = MAX_BAD,
    test_only: bool = False,
) -> ImageData:
    """Read a data set and look at every file of it.

    ``spec`` is a folder of class folders, a folder with ``train/`` and ``val/`` (or ``valid/``,
    ``validation/``, ``test/``) of class folders, a ``.npz`` file, one of ``builtin.NAMES``, or ImageData,
    which comes back as it is. A known name goes before a folder of that name; say ``./digits`` for it.

    ``root`` is where the named data sets are kept (``~/.cache/pellucid/data``). A folder without a split
    holds back ``test_fraction`` (0.2) of each class, by ``split_seed``. With ``test_only`` nothing is held
    back: train and test are both the set to evaluate on, and one class is enough.

    Raises DataError for data that cannot be used, also when more than the share ``max_bad`` of the files
    is rejected (up to that share, the next picture of the class stands in); ConfigError for options that
    contradict the data.
    """
    if isinstance(spec, ImageData):
        return spec
    path = os.fspath(spec)
    if is_in_memory(path):
        return load_in_memory(path, root, download, test_fraction, split_seed, test_only)
    layout = find_layout(folder_of(path, root))
    for problem in problems(layout, test_only=test_only):
        raise DataError(problem)
    files = split(layout, test_fraction=test_fraction, seed=split_seed, test_only=test_only)
    looks = look_at(distinct(files), max_pixels=max_pixels)
    if message := too_many_rejects(looks, max_bad=max_bad, where=layout.root):
        raise DataError(message)
    return _image_data(title(path), layout, files, looks, max_pixels)


def is_in_memory(path: str) -> bool:
    """Whether ``path`` names a data set that is read whole, not file by file."""
    if path in builtin.NAMES:
        return path != builtin.IMAGENET
    return path.lower().endswith(".npz") and os.path.isfile(path)


def load_in_memory(
    path: str,
    root: str | os.PathLike[str] | None,
    download: bool,
    test_fraction: float | None,
    split_seed: int,
    test_only: bool,
) -> ImageData:
    """A known data set or a ``.npz`` file."""
    if path not in builtin.NAMES:
        return arrays.load_npz(path, test_fraction=test_fraction, seed=split_seed, test_only=test_only)
    refuse_fraction(test_fraction, path)
    if path == builtin.DIGITS:
        return builtin.load_digits()
    return builtin.load_published(path, _data_root(root), download=download)


def folder_of(path: str, root: str | os.PathLike[str] | None) -> str:
    """The folder of images that ``path`` names. Raises DataError when it names none."""
    if path == builtin.IMAGENET:
        return builtin.imagenet_folder(_data_root(root))
    if os.path.isdir(path):
        return path
    shown = show_name(path)
    if os.path.lexists(path):
        raise DataError(f"{shown} is neither a folder nor a .npz file - name the folder of class folders")
    hint = suggest(path, builtin.NAMES) if os.path.basename(path) == path else " - check the path"
    raise DataError(f"no folder and no data set is called '{shown}'{hint}")


def title(path: str) -> str:
    """What to call the data set at ``path``; safe to print."""
    return show_name(path if path in builtin.NAMES else os.path.basename(os.path.abspath(path)))


def distinct(files: Split) -> list[ImageFile]:
    """Each file once, though it be in train and in test."""
    return list({file.path: file for part in files for file, _ in part}.values())


def file_images(files: Split, looks: Sequence[Look], layout: Layout, max_pixels: int) -> list[FileImages]:
    """Train and test as sets that know their rejects.

    A test class of which nothing can be read is left out of test, for nothing can stand in. Raises
    DataError when that is so of a class in train, or of the whole test set.
    """
    reasons = {look.file.path: look.reason for look in looks}
    alive = [{label for file, label in part if reasons[file.path] is None} for part in files]
    for file, label in files.train:
        if label not in alive[0]:
            raise DataError(
                f'no training image of class "{show_name(layout.class_names[label])}" can be read'
                f" ({show_name(file.relative)}: {reasons[file.path]}) - {show_name(layout.root)}"
                " - replace its images or remove the folder"
            )
    test = [item for item in files.test if item[1] in alive[1]]
    if not test:
        raise DataError(f"no test image can be read - {show_name(layout.root)} - replace the images")
    sets = []
    for part in (files.train, test):
        labels = torch.tensor([label for _, label in part], dtype=torch.int64)
        bad = [i for i, (file, _) in enumerate(part) if reasons[file.path] is not None]
        sets.append(FileImages([file.path for file, _ in part], labels, bad=bad, max_pixels=max_pixels))
    return sets


def _image_data(name: str, layout: Layout, files: Split, looks: Sequence[Look], max_pixels: int) -> ImageData:
    train, test = file_images(files, looks, layout, max_pixels)
    in_train = {file.path for file, _ in files.train}
    headers = [look.header for look in looks if look.header is not None and look.file.path in in_train]
    in_chans = max(header.channels for header in headers)
    mean, std = channel_statistics(train, in_chans)
    return ImageData(
        name=name,
        train=train,
        test=test,
        class_names=layout.class_names,
        in_chans=in_chans,
        img_size=natural_size((header.height, header.width) for header in headers),
        mean=mean,
        std=std,
        rejects=rejected(looks) + layout.unlisted,
        fingerprint=_fingerprint([look.file for look in looks], layout.class_names),
    )


def _data_root(root: str | os.PathLike[str] | None) -> str:
    return os.path.expanduser(builtin.DEFAULT_ROOT if root is None else os.fspath(root))


def _fingerprint(files: Sequence[ImageFile], class_names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in class_names:
        digest.update(os.fsencode(name) + b"\0")
    for relative, size in sorted((os.fsencode(file.relative), file.size) for file in files):
        digest.update(b"%s\0%d\0" % (relative, size))
    return digest.hexdigest()

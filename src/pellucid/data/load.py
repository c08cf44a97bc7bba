"""One call from what the user names - a folder, a file, shards, a known name - to data ready to train on."""

from __future__ import annotations

import glob
import os
from typing import get_args

import numpy as np

from pellucid.data import arrays, builtin, hub, shards, tables
from pellucid.data.dataset import ImageData, describe, natural_size
from pellucid.data.folders import find_folder
from pellucid.data.found import Asked, Found, Labels, Looks
from pellucid.data.images import MAX_PIXELS, show_name
from pellucid.data.split import refuse_fraction
from pellucid.data.verify import look, readable_test, refuse_dead_classes, rejected, too_many_rejects
from pellucid.errors import ConfigError, DataError, suggest

MAX_BAD = 0.01

Spec = str | os.PathLike[str] | ImageData


def load_data(
    spec: Spec,
    *,
    labels: Labels = "required",
    download: bool = False,
    root: str | os.PathLike[str] | None = None,
    split_seed: int = 0,
    test_fraction: float | None = None,
    max_pixels: int = MAX_PIXELS,
    max_bad: float = MAX_BAD,
    test_only: bool = False,
) -> ImageData:
    """Read a data set and look at every picture of it.

    ``spec`` is a folder of class folders, a folder with ``train/`` and ``val/`` (or ``valid/``,
    ``validation/``, ``test/``) of class folders, a ``.npz`` file, a folder that ``pack`` wrote, WebDataset
    shards (a folder of ``.tar`` files, one of them, or a pattern such as ``"shards/*.tar"``), a data set of
    the Hugging Face hub as ``hf:OWNER/NAME`` (see ``hub``), one of ``builtin.NAMES``, or ImageData, which
    comes back as it is. A known name goes before a folder of that name; say ``./digits`` for it.

    With ``labels="optional"`` data without labels load too: folders of pictures in whatever order, shards
    without ``.cls``, a ``.npz`` without ``y``. Their ``class_names`` are [] and every label is -1. What has
    labels that supervised training could use keeps them; partial labels are put aside.

    ``root`` is where the named data sets are kept (``~/.cache/pellucid/data``). Data without a split hold
    back ``test_fraction`` of each class (0.2; without labels 0.1, at most 5,000), by ``split_seed``. With
    ``test_only`` nothing is held back: train and test are both the set to evaluate on, and one class is
    enough.

    Raises DataError for data that cannot be used, also when more than the share ``max_bad`` of the pictures
    is rejected (up to that share, the next picture of the class stands in); ConfigError for options that
    contradict the data.
    """
    if isinstance(spec, ImageData):
        return spec
    path = os.fspath(spec)
    asked = ask(labels, test_fraction, split_seed, test_only, max_pixels)
    if is_in_memory(path):
        return load_in_memory(path, root, download, asked)
    found = find(path, root, asked)
    for problem in found.problems:
        raise problem
    looks = look(found)
    if message := too_many_rejects(found, looks, max_bad):
        raise DataError(message)
    return _image_data(found, looks)


def ask(
    labels: Labels,
    test_fraction: float | None,
    split_seed: int,
    test_only: bool,
    max_pixels: int = MAX_PIXELS,
) -> Asked:
    """What is wanted. Raises ConfigError."""
    if labels not in get_args(Labels):
        raise ConfigError(f"labels is '{labels}' - give {' or '.join(get_args(Labels))}")
    return Asked(labels, test_fraction, split_seed, test_only, max_pixels)


def is_in_memory(path: str) -> bool:
    """Whether ``path`` names a data set that is read whole, not file by file."""
    if path in builtin.NAMES:
        return path != builtin.IMAGENET
    return path.lower().endswith(".npz") and os.path.isfile(path)


def load_in_memory(path: str, root: str | os.PathLike[str] | None, download: bool, asked: Asked) -> ImageData:
    """A known data set or a ``.npz`` file."""
    if path not in builtin.NAMES:
        return arrays.load_npz(path, asked)
    refuse_fraction(asked.test_fraction, path)
    if path == builtin.DIGITS:
        return builtin.load_digits()
    return builtin.load_published(path, _data_root(root), download=download)


def find(path: str, root: str | os.PathLike[str] | None, asked: Asked) -> Found:
    """The pictures that ``path`` names, not yet looked at. Raises DataError when it names none."""
    if path == builtin.IMAGENET:
        return find_folder(builtin.imagenet_folder(_data_root(root)), title(path), asked)
    if path.startswith(tables.PREFIX):
        return hub.find_hub(path, asked)
    if shards.is_packed(path):
        return shards.find_packed(path, title(path), asked)
    if tars := shards.tar_files(path):
        return shards.find_tars(tars, show_name(path), title(path), _data_root(root), asked)
    if os.path.isdir(path):
        return find_folder(path, title(path), asked)
    shown = show_name(path)
    if os.path.lexists(path):
        raise DataError(
            f"{shown} is neither a folder nor a .npz file nor a .tar - name the folder of class folders"
        )
    hint = suggest(path, builtin.NAMES) if os.path.basename(path) == path else " - check the path"
    raise DataError(f"no folder and no data set is called '{shown}'{hint}")


def title(path: str) -> str:
    """What to call the data set at ``path``; safe to print."""
    if path in builtin.NAMES:
        return path
    folder, name = os.path.split(os.path.abspath(path))
    return show_name(os.path.basename(folder) if glob.has_magic(name) and not os.path.lexists(path) else name)


def _image_data(found: Found, looks: tuple[Looks, Looks]) -> ImageData:
    refuse_dead_classes(found, looks)
    rejects = rejected(found, looks)
    test, seen = readable_test(found, looks)
    for images, part in ((found.train, looks[0]), (test, seen)):
        images.reject(part.reasons)
    train = looks[0]
    sizes = np.unique(np.stack([train.height, train.width], axis=1)[train.good], axis=0)
    return describe(
        found.name,
        found.train,
        test,
        found.class_names,
        in_chans=int(train.channels.max()),
        img_size=natural_size((height, width) for height, width in sizes.tolist()),
        rejects=rejects,
        fingerprint=found.fingerprint,
    )


def _data_root(root: str | os.PathLike[str] | None) -> str:
    return os.path.expanduser(builtin.DEFAULT_ROOT if root is None else os.fspath(root))

"""The data sets known by name: digits from scikit-learn, the others from torchvision."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from pellucid.data.dataset import ArrayImages, ImageData, from_arrays
from pellucid.data.images import show_name
from pellucid.errors import DataError

DIGITS = "digits"
IMAGENET = "imagenet"
DEFAULT_ROOT = os.path.join("~", ".cache", "pellucid", "data")

_IMAGENET_ARCHIVES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz")


@dataclass(frozen=True)
class Published:
    """A data set that torchvision reads whole into memory."""

    torchvision_name: str
    size: str  # of the download
    train: dict[str, Any]
    test: dict[str, Any]


_BY_FLAG = ({"train": True}, {"train": False})
_BY_SPLIT = ({"split": "train"}, {"split": "test"})

PUBLISHED = {
    "cifar10": Published("CIFAR10", "170 MB", *_BY_FLAG),
    "cifar100": Published("CIFAR100", "169 MB", *_BY_FLAG),
    "mnist": Published("MNIST", "12 MB", *_BY_FLAG),
    "fashion-mnist": Published("FashionMNIST", "31 MB", *_BY_FLAG),
    "svhn": Published("SVHN", "246 MB", *_BY_SPLIT),
    "stl10": Published("STL10", "2.6 GB", *_BY_SPLIT),
}
NAMES = (DIGITS, *PUBLISHED, IMAGENET)


def load_digits() -> ImageData:
    """scikit-learn's 1,797 handwritten digits, 8x8: 1,347 to train on and 450 to test on, always the same."""
    from sklearn.datasets import load_digits as read_digits
    from sklearn.model_selection import train_test_split

    digits = read_digits()
    levels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    parts = train_test_split(levels, digits.target, test_size=0.25, stratify=digits.target, random_state=0)
    x_train, x_test, y_train, y_test = map(torch.from_numpy, parts)
    return from_arrays(
        DIGITS,
        ArrayImages(x_train, y_train, DIGITS),
        ArrayImages(x_test, y_test, f"{DIGITS}/test"),
        [str(digit) for digit in range(10)],
    )


def load_published(name: str, root: str, *, download: bool) -> ImageData:
    """One of ``PUBLISHED``, from ``root``. Raises DataError when its files are not there and whole."""
    source = PUBLISHED[name]
    if download:
        _make_folder(root)
    train = _from_torchvision(name, root, download, source.train)
    test = _from_torchvision(name, root, download, source.test)
    return from_arrays(
        name,
        ArrayImages(*_tensors(train), name),
        ArrayImages(*_tensors(test), f"{name}/test"),
        [str(word) for word in getattr(train, "classes", range(10))],
    )


def imagenet_folder(root: str) -> str:
    """The folder with ImageNet's ``train`` and ``val``, unpacked from the archives if need be."""
    folders = [os.path.join(root, part) for part in ("train", "val")]
    if not all(map(os.path.isdir, folders)):
        missing = [name for name in _IMAGENET_ARCHIVES if not os.path.isfile(os.path.join(root, name))]
        if missing:
            raise DataError(
                f"imagenet is not in {show_name(root)}, and it cannot be downloaded for you\n"
                f"register at image-net.org, put {', '.join(missing)} there and run the same command,\n"
                "or name the folder that has train/ and val/"
            )
        for split in ("train", "val"):
            _read(IMAGENET, root, partial(_torchvision_class("ImageNet"), root, split=split))
    return root


def _from_torchvision(name: str, root: str, download: bool, arguments: dict[str, Any]) -> Any:
    read = _torchvision_class(PUBLISHED[name].torchvision_name)
    return _read(name, root, partial(read, root, download=download, **arguments), download=download)


def _torchvision_class(name: str) -> Callable[..., Any]:
    import torchvision.datasets  # slow, and needed by no folder of images

    return getattr(torchvision.datasets, name)


def _read(name: str, root: str, read: Callable[[], Any], download: bool = False) -> Any:
    """torchvision says 'not found or corrupted' with a RuntimeError, and a failed download with many."""
    try:
        return read()
    except (RuntimeError, OSError, ValueError, EOFError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        if download:
            remedy = f"check the connection, or put the files into {show_name(root)} by hand"
        elif name == IMAGENET:
            remedy = f"put the archives into {show_name(root)} again"
        else:
            remedy = f"add --download to fetch it ({PUBLISHED[name].size}), or --data-root for where it is"
        raise DataError(
            f"{name} is missing or damaged in {show_name(root)} - {remedy}\n  ({first_line})"
        ) from error


def _tensors(dataset: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 (n, c, h, w) and labels (n,), from torchvision's several layouts."""
    images = torch.as_tensor(dataset.data)
    labels = torch.as_tensor(dataset.labels if hasattr(dataset, "labels") else dataset.targets)
    if images.ndim == 3:  # MNIST: (n, h, w)
        images = images[:, None]
    elif images.shape[-1] == 3:  # CIFAR: (n, h, w, c)
        images = images.permute(0, 3, 1, 2)
    return images.contiguous(), labels


def _make_folder(root: str) -> None:
    try:
        os.makedirs(root, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot make {show_name(root)}: {error.strerror} - choose another with --data-root"
        ) from None

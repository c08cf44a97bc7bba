"""A data set in one ``.npz`` file: ``x`` uint8 (n, h, w) or (n, h, w, c), c up to 64, ``y`` integers (n,).

``x_test`` and ``y_test`` may be there too, and ``class_names``, as text: then y counts from 0 into it.
Where labels are optional, ``x`` alone will do. Nothing in it is unpickled.
"""

from __future__ import annotations

import zipfile
import zlib

import numpy as np
import numpy.typing as npt
import torch

from pellucid.data.dataset import ArrayImages, ImageData, from_arrays
from pellucid.data.found import UNLABELLED, Asked
from pellucid.data.images import show_name
from pellucid.data.split import hold_out, refuse_fraction
from pellucid.errors import DataError

Arrays = dict[str, npt.NDArray]

_KNOWN = ("x", "y", "x_test", "y_test", "class_names")


MAX_CHANNELS = 64


def load_npz(path: str, asked: Asked) -> ImageData:
    """ImageData of a ``.npz`` file. Raises DataError naming the array that is wrong."""
    where = show_name(path)
    found = _read(path, where)
    has_test = "x_test" in found or "y_test" in found
    classes = None if _without_labels(found, asked) else _classes(found, where)
    train = _image_set(found, "", classes, where)
    test = _image_set(found, "_test", classes, where) if has_test else None
    if test is not None:
        refuse_fraction(asked.test_fraction, where)
        _refuse_other_channels(train, test, where)
    if asked.test_only:
        whole = train if test is None else test
        return from_arrays(where, whole, whole, classes or [])
    if classes and (problem := _problem(train, classes, where, needs_split=test is None)):
        if asked.labels == "required":
            raise DataError(problem)
        classes = None
        for part in (train, test):
            if part is not None:
                part.labels = torch.full_like(part.labels, -1)
    if test is None:
        if len(train) == 1:
            raise DataError(
                f"x has 1 image, which cannot be split into train and test - {where} - add images"
            )
        kept, held_out = map(
            torch.from_numpy, hold_out(train.labels.numpy(), asked.test_fraction, asked.split_seed)
        )
        test = ArrayImages(train.images[held_out], train.labels[held_out], f"{where}/test")
        train = ArrayImages(train.images[kept], train.labels[kept], where)
    return from_arrays(where, train, test, classes or [])


def _without_labels(found: Arrays, asked: Asked) -> bool:
    """Whether labels are missing where they may be."""
    complete = "y" in found and ("x_test" not in found or "y_test" in found)
    return asked.labels == "optional" and "x" in found and not complete


def _read(path: str, where: str) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in _KNOWN if name in archive.files}
    except (
        OSError,
        ValueError,
        EOFError,
        AttributeError,
        TypeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        reason = str(error) if "allow_pickle" not in str(error) else "it holds pickled objects"
        raise DataError(
            f"cannot read {where}: {show_name(reason)[:120]}"
            " - write it with numpy.savez(path, x=..., y=...), plain arrays only"
        ) from error
    except MemoryError:
        raise DataError(f"{where} does not fit into memory - use a folder of images") from None


def _classes(found: Arrays, where: str) -> list[str]:
    """The names in ``class_names``, or else the distinct values of ``y`` as text, ascending."""
    if "class_names" in found:
        return [str(name) for name in found["class_names"].reshape(-1)]
    return [str(value) for value in np.unique(_labels(found, "y", where))]


def _image_set(found: Arrays, suffix: str, classes: list[str] | None, where: str) -> ArrayImages:
    """One part; without ``classes`` it has no labels."""
    x, name = _pixels(found, f"x{suffix}", where), f"{where}/test" if suffix else where
    if classes is None:
        if not len(x):
            raise DataError(f"x{suffix} has 0 images - {where} - give some")
        return ArrayImages(torch.from_numpy(x), torch.full((len(x),), -1), name)
    y = _labels(found, f"y{suffix}", where)
    if len(x) != len(y) or not len(x):
        raise DataError(
            f"x{suffix} has {len(x)} images and y{suffix} {len(y)} labels - {where} - give as many, not 0"
        )
    labels = y if "class_names" in found else _ranks(found["y"], y)
    outside = y[(labels < 0) | (labels >= len(classes))]
    if len(outside):
        raise DataError(
            f"y{suffix} has the label {outside[0]}, which is none of the {len(classes)} classes - {where}"
            " - correct it, or class_names"
        )
    return ArrayImages(torch.from_numpy(x), torch.from_numpy(labels.astype(np.int64)), name)


def _ranks(known: npt.NDArray, y: npt.NDArray) -> npt.NDArray:
    """The position of each label among the distinct known ones; -1 for a label that is not known."""
    values = np.unique(known)
    rank = np.searchsorted(values, y).clip(max=len(values) - 1)
    return np.where(values[rank] == y, rank, -1)


def _pixels(found: Arrays, name: str, where: str) -> npt.NDArray[np.uint8]:
    """uint8 (n, c, h, w)"""
    x = _array(found, name, where)
    pixels = x[..., None] if x.ndim == 3 else x
    if x.dtype != np.uint8 or pixels.ndim != 4 or 0 in pixels.shape[1:] or pixels.shape[-1] > MAX_CHANNELS:
        raise DataError(
            f"{name} is {x.dtype} {x.shape} - {where}"
            f" - give uint8, 0..255, of shape (n, h, w) or (n, h, w, c) with c up to {MAX_CHANNELS}"
        )
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _labels(found: Arrays, name: str, where: str) -> npt.NDArray:
    y = _array(found, name, where)
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise DataError(f"{name} is {y.dtype} {y.shape} - {where} - give integers (n,)")
    return y


def _array(found: Arrays, name: str, where: str) -> npt.NDArray:
    if name not in found:
        without = f", or {UNLABELLED}" if name.startswith("y") and "x" in found else ""
        raise DataError(
            f"there is no array '{name}', only {', '.join(found) or 'others'} - {where} - add it{without}"
        )
    return found[name]


def _refuse_other_channels(train: ArrayImages, test: ArrayImages, where: str) -> None:
    channels = train.images.shape[1], test.images.shape[1]
    if channels[0] != channels[1]:
        raise DataError(f"x has {channels[0]} channels and x_test {channels[1]} - {where} - give as many")


def _problem(train: ArrayImages, classes: list[str], where: str, *, needs_split: bool) -> str | None:
    """Why supervised training cannot use the labels, or None."""
    counts = torch.bincount(train.labels, minlength=len(classes))
    if int((counts > 0).sum()) < 2:
        return f"only one class in y - {where} - give at least two, or {UNLABELLED}"
    lonely = [classes[i] for i in torch.nonzero(counts == 1).flatten().tolist()]
    if needs_split and lonely:
        return (
            f'class "{show_name(lonely[0])}" has 1 image and cannot be split into train and test'
            f" - {where} - add images, or give x_test and y_test"
        )
    return None

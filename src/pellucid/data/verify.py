"""A look at every picture before the first step, so that a bad one is named and not met at night."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from pellucid.data.dataset import EncodedImages, Reject
from pellucid.data.found import Found, Looks
from pellucid.data.images import Header, ImageRejected, read_header, read_image, show_name
from pellucid.errors import DataError

DECODE_LIMIT = 20_000  # pictures; up to here each is decoded whole once, above only its header is read
SHOWN = 20  # lines of one kind at most
PATIENCE = 5  # seconds; what takes longer shows a bar

T = TypeVar("T")


def look(found: Found) -> tuple[Looks, Looks]:
    """What the pictures of train and test are, from what is kept, or by looking at each."""
    if found.looks is not None:
        return found.looks
    both = [found.train] if found.test is found.train else [found.train, found.test]
    decode = sum(map(len, both)) <= DECODE_LIMIT
    looks = [look_at(images, decode=decode) for images in both]
    return looks[0], looks[-1]


def look_at(images: EncodedImages, *, decode: bool) -> Looks:
    """Look at each picture, in order: decoded whole, or by its header."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        headers = pool.map(lambda i: examine(images, i, decode=decode), range(len(images)))
        return Looks.of(list(watched(headers, "looking", len(images))))


def watched(things: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """The same, with a bar on a terminal when it takes longer than ``PATIENCE``."""
    from tqdm import tqdm

    return tqdm(things, what, total, leave=False, delay=PATIENCE, disable=not sys.stderr.isatty())


def examine(images: EncodedImages, i: int, *, decode: bool) -> Header | str:
    """What picture i is, or why it is rejected."""
    try:
        return header_of(images.source(i), images.max_pixels, decode=decode)
    except ImageRejected as error:
        return error.reason


def header_of(source: str | bytes, max_pixels: int, *, decode: bool) -> Header:
    """A picture's header; with ``decode`` its size as shown, with the orientation applied, and no damage."""
    header = read_header(source, max_pixels=max_pixels)
    if decode:
        height, width = read_image(source, max_pixels=max_pixels).shape[-2:]
        header = header._replace(height=height, width=width)
    return header


def rejected(found: Found, looks: tuple[Looks, Looks]) -> tuple[Reject, ...]:
    """The pictures that cannot be used, each once, and the folders that could not be listed."""
    return tuple(Reject(images.path(i), reason) for images, i, reason in _bad(found, looks)) + found.unread


def too_many_rejects(found: Found, looks: tuple[Looks, Looks], max_bad: float) -> str | None:
    """The message when more than the share ``max_bad`` is rejected, else None. Two lines."""
    named = [(show_name(images.relative(i)), reason) for images, i, reason in _bad(found, looks)]
    count = len(found.train) + (0 if found.test is found.train else len(found.test))
    return refusal(named, count, max_bad, found.where)


def refusal(
    named: list[tuple[str, str]], count: int, max_bad: float, where: str, things: str = "images"
) -> str | None:
    """The message when these (name, reason) are more than the share ``max_bad`` of ``count`` things."""
    if len(named) <= max_bad * count:
        return None
    shown = "; ".join(f"{name}: {reason}" for name, reason in named[:5])
    more = f"; and {len(named) - 5} more" if len(named) > 5 else ""
    return (
        f"{len(named):,} of {count:,} {things} rejected ({len(named) / count:.2%}, limit {max_bad:.2%})"
        f" - {where} - replace them, or raise --max-bad\n  {shown}{more}"
    )


def refuse_dead_classes(found: Found, looks: tuple[Looks, Looks]) -> None:
    """Raises DataError when of a class in train nothing can be read, or nothing of the test set."""
    good = looks[0].good
    labels = found.train.labels.numpy()
    alive = np.isin(labels, np.unique(labels[good]))
    if not alive.all():
        i = int(np.argmin(alive))
        of = f' of class "{show_name(found.class_names[labels[i]])}"' if found.class_names else ""
        raise DataError(
            f"no training image{of} can be read ({show_name(found.train.relative(i))}: {looks[0].reasons[i]})"
            f" - {found.where} - replace {'its images or remove it' if of else 'the images'}"
        )
    if not looks[1].good.any():
        raise DataError(f"no test image can be read - {found.where} - replace the images")


def readable_test(found: Found, looks: tuple[Looks, Looks]) -> tuple[EncodedImages, Looks]:
    """The test set without the classes of which nothing can be read, for nothing can stand in for them."""
    labels = found.test.labels.numpy()
    alive = np.isin(labels, np.unique(labels[looks[1].good]))
    if alive.all():
        return found.test, looks[1]
    rows = np.flatnonzero(alive)
    return found.test.taken(rows), looks[1].taken(rows)


def _bad(found: Found, looks: tuple[Looks, Looks]) -> Iterator[tuple[EncodedImages, int, str]]:
    parts = list(zip((found.train, found.test), looks, strict=True))
    for images, seen in parts[:1] if found.test is found.train else parts:
        for i, reason in seen.reasons.items():
            yield images, i, reason


def listed(lines: Iterator[str] | list[str]) -> list[str]:
    """The first ``SHOWN`` lines, and how many more there are."""
    every = list(lines)
    rest = len(every) - SHOWN
    return every if rest <= 1 else [*every[:SHOWN], f"  ... and {rest:,} more"]

"""A look at every file of a folder before the first step, so that a bad one is named and not met at night."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from pellucid.data.dataset import Reject
from pellucid.data.folders import ImageFile
from pellucid.data.images import Header, ImageRejected, read_header, read_image, show_name

DECODE_LIMIT = 20_000  # files; up to here each is decoded whole once, above only its header is read


class Look(NamedTuple):
    """What one file turned out to be. ``header`` is None exactly when ``reason`` says why."""

    file: ImageFile
    header: Header | None
    reason: str | None

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width)"""
        return None if self.header is None else (self.header.height, self.header.width)


def look_at(files: Sequence[ImageFile], *, max_pixels: int) -> list[Look]:
    """Look at each file, in order: decoded whole for at most ``DECODE_LIMIT`` files, else by header."""
    decode = len(files) <= DECODE_LIMIT

    def look(file: ImageFile) -> Look:
        try:
            header = read_header(file.path, max_pixels=max_pixels)
            if decode:  # only now is the size known as shown, with the orientation applied
                height, width = read_image(file.path, max_pixels=max_pixels).shape[-2:]
                header = header._replace(height=height, width=width)
            return Look(file, header, None)
        except ImageRejected as error:
            return Look(file, None, error.reason)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(look, files))


def rejected(looks: Sequence[Look]) -> tuple[Reject, ...]:
    """The files that cannot be used."""
    return tuple(Reject(look.file.path, look.reason) for look in looks if look.reason is not None)


def too_many_rejects(looks: Sequence[Look], *, max_bad: float, where: str) -> str | None:
    """The message when more than the share ``max_bad`` is rejected, else None. Two lines."""
    bad = [look for look in looks if look.reason is not None]
    if len(bad) <= max_bad * len(looks):
        return None
    named = "; ".join(f"{show_name(look.file.relative)}: {look.reason}" for look in bad[:5])
    more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
    return (
        f"{len(bad):,} of {len(looks):,} images rejected ({len(bad) / len(looks):.2%}, limit {max_bad:.2%})"
        f" - {show_name(where)} - replace them, or raise --max-bad\n  {named}{more}"
    )

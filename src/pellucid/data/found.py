"""A data set between being found and being used: which pictures, which labels, which are held back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from pellucid.data.dataset import EncodedImages, Reject
from pellucid.data.images import KINDS, MAX_PIXELS, Header, show_name
from pellucid.data.split import hold_out, refuse_fraction
from pellucid.errors import DataError, PellucidError

Labels = Literal["required", "optional"]

UNLABELLED = "train without labels: --objective simdino"
"""The remedy for pictures that have none."""

Integers = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Asked:
    """What load_data was asked for, besides the place."""

    labels: Labels = "required"
    test_fraction: float | None = None
    split_seed: int = 0
    test_only: bool = False
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True)
class Looks:
    """What each of n pictures turned out to be, in columns (n,); all 0 for those that ``reasons`` rejects."""

    kind: Integers  # index into KINDS
    channels: Integers
    height: Integers
    width: Integers
    reasons: dict[int, str]

    @staticmethod
    def of(headers: Sequence[Header | str]) -> Looks:
        """From one header, or reason for its rejection, for each picture."""
        rows = [(KINDS.index(h.kind), *h[1:]) if isinstance(h, Header) else (0, 0, 0, 0) for h in headers]
        columns = np.array(rows, dtype=np.int32).reshape(-1, 4).T
        reasons = {i: h for i, h in enumerate(headers) if isinstance(h, str)}
        return Looks(columns[0], columns[1], columns[2], columns[3], reasons)

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def good(self) -> npt.NDArray[np.bool_]:
        """(n,): whether a picture can be used."""
        return self.channels > 0

    def taken(self, rows: npt.NDArray[np.int64]) -> Looks:
        """Of these pictures, in this order."""
        reasons = taken_reasons(self.reasons, rows)
        return Looks(self.kind[rows], self.channels[rows], self.height[rows], self.width[rows], reasons)


def taken_reasons(reasons: dict[int, str], rows: npt.NDArray[np.int64]) -> dict[int, str]:
    """The reasons for those pictures among ``rows`` that are rejected, by their place there."""
    bad = np.flatnonzero(np.isin(rows, list(reasons)))
    return {int(k): reasons[int(rows[k])] for k in bad}


@dataclass
class Found:
    """What a folder, a set of shards or a hub's table offers.

    ``test`` is ``train`` itself where everything is to be looked at, and empty where nothing could be held
    back. ``problems``: why it cannot be used; the first is raised. ``notes``: what is passed over.
    ``unread``: folders that could not be listed. ``looks``: of train and test, where they are known already.
    ``without_labels``: how many pictures would load with ``labels="optional"`` in spite of the problems.
    ``inspect``: what is damaged, by reading everything.
    """

    name: str
    where: str
    train: EncodedImages
    test: EncodedImages
    class_names: list[str]
    fingerprint: str
    problems: list[PellucidError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unread: tuple[Reject, ...] = ()
    looks: tuple[Looks, Looks] | None = None
    without_labels: int = 0
    inspect: Callable[[], list[str]] = list


def divide(
    train: EncodedImages, test: EncodedImages | None, asked: Asked, where: str
) -> tuple[EncodedImages, EncodedImages]:
    """(train, test): the split that the data bring, or else a hold-out; with ``test_only`` one set twice."""
    if test is not None:
        refuse_fraction(asked.test_fraction, where)
    if asked.test_only:
        whole = train if test is None else test
        return whole, whole
    if test is not None:
        return train, test
    if len(train) == 1:
        raise DataError(f"1 image cannot be split into train and test - {where} - add images")
    kept, held_out = hold_out(train.labels.numpy(), asked.test_fraction, asked.split_seed)
    return train.taken(kept), train.taken(held_out)


def settle(
    train: EncodedImages, test: EncodedImages | None, class_names: list[str], asked: Asked, found: Found
) -> None:
    """Fill in ``found`` for pictures that carry their labels with them, as shards and tables do.

    Without ``class_names`` they have none. Labels that supervised training could not use are put aside,
    and noted, where labels are optional.
    """
    parts = [train] if test is None else [train, test]
    problems = [] if all(map(len, parts)) else [f"no images - {found.where} - add some"]
    if not problems and not class_names:
        problems = [] if asked.labels == "optional" else [f"no labels - {found.where} - {UNLABELLED}"]
    elif not problems:
        problems = [
            f"{what} - {found.where} - {remedy}"
            for what, remedy in label_problems(
                train.labels, None if test is None else test.labels, class_names, asked
            )
        ]
        if problems and asked.labels == "optional":
            found.notes.append(f"taken without labels: {problems[0].split(' - ')[0]}")
            class_names, problems = [], []
    if not class_names:
        for part in parts:
            part.labels = torch.full_like(part.labels, -1)
    found.class_names = class_names
    found.train, found.test = train, train.taken([]) if test is None else test
    found.problems += map(DataError, problems)
    if not problems:
        try:
            found.train, found.test = divide(train, test, asked, found.where)
        except PellucidError as error:
            found.problems.append(error)
    elif all(map(len, parts)):
        found.without_labels = sum(map(len, parts))


def label_problems(
    train: torch.Tensor,
    test: torch.Tensor | None,
    class_names: list[str],
    asked: Asked,
    thing: str = "image",
    unlabelled: str = UNLABELLED,
) -> list[tuple[str, str]]:
    """Why supervised training cannot use these labels: (what is wrong, what to do) for each reason."""
    counts = torch.bincount(train[train >= 0], minlength=len(class_names))
    unknown = int((train < 0).sum()) + (0 if test is None else int((test < 0).sum()))
    if unknown:
        whole = len(train) + (0 if test is None else len(test))
        return [(f"{unknown:,} of {whole:,} {thing}s have no label", f"add them, or {unlabelled}")]
    found = []
    if int((counts > 0).sum()) < 2 and not asked.test_only:
        found.append(("only one class", f"give at least two, or {unlabelled}"))
    if test is not None:
        missing = [class_names[i] for i in torch.unique(test).tolist() if not counts[i]]
        if missing:
            names = ", ".join(f'"{show_name(name)}"' for name in missing[:5])
            found.append((f"classes without training {thing}s: {names}", "leave them out of test"))
    elif not asked.test_only:
        lonely = [class_names[i] for i in torch.nonzero(counts == 1).flatten().tolist()]
        if lonely:
            what = f'class "{show_name(lonely[0])}" has 1 {thing} and cannot be split into train and test'
            found.append((what, f"add {thing}s, or give a test set"))
    return found

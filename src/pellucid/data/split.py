"""The hold-out: which items are kept back for testing when a data set brings no split of its own."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pellucid.data.randomness import order
from pellucid.errors import ConfigError

TEST_FRACTION = 0.2
UNLABELLED_FRACTION = 0.1  # only losses and features are looked at on them
UNLABELLED_LIMIT = 5000

Indices = npt.NDArray[np.int64]


def hold_out(labels: npt.ArrayLike, fraction: float | None, seed: int) -> tuple[Indices, Indices]:
    """(train, test): ascending indices, stratified. A function of the labels, the fraction and the seed.

    Of every class at least one item stays in train, and at least one goes to test if it has two. Without
    labels (all -1) a tenth is held back, though never more than 5,000 unless ``fraction`` is given.
    """
    labels = np.asarray(labels)
    unlabelled = bool((labels < 0).all())
    limit = UNLABELLED_LIMIT if unlabelled and fraction is None else len(labels)
    if fraction is None:
        fraction = UNLABELLED_FRACTION if unlabelled else TEST_FRACTION
    if not 0 < fraction < 1:
        raise ConfigError(
            f"test fraction {fraction} - give a number between 0 and 1, such as {TEST_FRACTION}"
        )
    is_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(fraction * len(members)), 1), len(members) - 1, limit)
        is_test[members[order(seed, max(int(label), 0), len(members))[:count]]] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def refuse_fraction(fraction: float | None, where: str) -> None:
    """Raises ConfigError when a test fraction is given for a data set that brings its own split."""
    if fraction is not None:
        raise ConfigError(f"{where} brings its own split - leave out the test fraction ({fraction})")

"""What went wrong, in words a user can act on. Imports nothing of ours; every module may import it.

A message says WHAT - WHERE - DO THIS in at most five lines. The command line prints it without a
traceback and leaves with ``exit_code``; in Python it is an ordinary ``ValueError``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PellucidError(ValueError):
    """A wrong input or a refused operation. Its message names what was wrong and what to do."""

    exit_code = 2


class DataError(PellucidError):
    """The data cannot be used: missing, empty, unreadable, too few images."""


class ConfigError(PellucidError):
    """An option or a combination of options that cannot be."""


class CheckpointError(PellucidError):
    """A saved model or run that cannot be used as asked, or could not be saved."""


class NumericsError(PellucidError):
    """A loss, gradient or tensor that is not finite. Raised before anything was changed by it."""


class Collapsed(PellucidError):
    """Features that tell images apart no more, in a run that was asked to stop there. All is saved."""


class Stopped(PellucidError):
    """Stopped on purpose by a signal, with everything saved. Not a failure."""

    exit_code = 75


class ProcessLost(PellucidError):
    """One of several processes that trained together is gone, and the others had to stop."""

    exit_code = 70


def suggest(given: str, known: Iterable[str], listed: Iterable[str] | None = None) -> str:
    """``" - did you mean 'x'?"`` for the nearest known name; if none is near, ``listed`` or all of them."""
    known = sorted(known)
    listed = known if listed is None else list(listed)
    best = max(known, key=lambda name: _likeness(given, name), default="")
    if best and _likeness(given, best) >= 0.6:
        return f" - did you mean '{best}'?"
    return f" - known: {', '.join(listed)}" if listed else ""


def _likeness(given: str, name: str) -> float:
    """0..1; a name that begins like what was given is like it, however it goes on."""
    whole = difflib.SequenceMatcher(None, given, name).ratio()
    beginning = difflib.SequenceMatcher(None, given, name[: len(given)]).ratio()
    return max(whole, 0.95 * beginning)

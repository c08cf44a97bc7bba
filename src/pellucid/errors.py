"""What went wrong, in words a user can act on. Imports nothing of ours; every module may import it.

A message says WHAT - WHERE - DO THIS in at most five lines. The command line prints it without a
traceback and leaves with ``exit_code``; in Python it is an ordinary ``ValueError``.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

EXIT_CODES = {
    0: "done",
    1: "whoever read the output stopped reading, as head does",
    2: "an option, or options together, that cannot be; nothing was done",
    3: "data that cannot be used",
    4: "a checkpoint or a saved model that cannot be used",
    5: "numbers: a loss or gradient that is not finite, features that collapsed, a step past its bound",
    6: "resources: disk full, no memory, a folder gone; what was saved stands",
    70: "one of several processes is gone",
    75: "stopped on purpose, all saved; go on with the same command and --resume",
    130: "interrupted (Ctrl-C) where there was nothing to save",
    143: "ended by SIGTERM where there was nothing to save",
}
"""What the command line leaves with. The kernel's own are 128 and the number of the signal, as 137."""


class PellucidError(ValueError):
    """A wrong input or a refused operation. Its message names what was wrong and what to do."""

    exit_code = 2


class ConfigError(PellucidError):
    """An option or a combination of options that cannot be, or a place that is taken."""


class DataError(PellucidError):
    """The data cannot be used: missing, empty, unreadable, too few images."""

    exit_code = 3


class CheckpointError(PellucidError):
    """A saved model or run that cannot be used as asked."""

    exit_code = 4


class NumericsError(PellucidError):
    """A loss, gradient or tensor that is not finite. Raised before anything was changed by it."""

    exit_code = 5


class Collapsed(PellucidError):
    """Features that tell images apart no more, in a run that was asked to stop there. All is saved."""

    exit_code = 5


class StepTooLong(PellucidError):
    """A layer's step is so long that nothing says it lowers its objective. All is saved."""

    exit_code = 5


class ResourceError(PellucidError):
    """The machine gives out: a full disk, no memory, a folder that is gone. What was saved before stands."""

    exit_code = 6


class Stopped(PellucidError):
    """Stopped on purpose by a signal, with everything saved. Not a failure."""

    exit_code = 75


class ProcessLost(PellucidError):
    """One of several processes that trained together is gone, and the others had to stop."""

    exit_code = 70


_GIVES_OUT = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM, errno.EIO,
    errno.EMFILE, errno.ENFILE, errno.ESTALE,
}  # fmt: skip


def gives_out(error: BaseException) -> bool:
    """Whether the machine has given out, rather than been asked for what cannot be."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _GIVES_OUT)


def unwritten(message: str, error: OSError) -> ConfigError | ResourceError:
    """The error for a file that could not be written: of the place that was named, or of the machine."""
    return ResourceError(message) if gives_out(error) else ConfigError(message)


def exit_code(error: BaseException) -> int:
    """What a program leaves with that ends with this error: a key of :data:`EXIT_CODES`."""
    if isinstance(error, PellucidError):
        return error.exit_code
    return ResourceError.exit_code if gives_out(error) else PellucidError.exit_code


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

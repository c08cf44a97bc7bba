"""Reading a bundle without trusting it: a missing, empty or wrong field is ``None`` or empty, never an error.

A bundle is a plain dict, as it comes from JSON. The report must survive every hole in it, so no other
module of the report touches the raw dict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Literal

DESCENDS_FROM = 0.99
"""A step descends when its objective fell on at least this share of the images or texts."""

State = Literal["falls", "partly", "rises"]


def finite(value: object) -> float | None:
    """``value`` as a float; ``None`` if it is no number, not finite or beyond 1e30; below 1e-30 it is zero.

    The bounds keep every sum, ratio and axis of the report finite; nothing measured lies outside them.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    if not math.isfinite(number) or abs(number) > 1e30:
        return None
    return number if abs(number) >= 1e-30 else 0.0


def sequence(value: object) -> list[object]:
    """``value`` as a list; empty if it is not a list or a tuple."""
    return list(value) if isinstance(value, (list, tuple)) else []


def words(value: object, default: str = "") -> str:
    """``value`` as text of at most 4,000 characters; ``default`` for ``None``."""
    return default if value is None else str(value)[:4000]


class Fields:
    """A dict from outside, read by the type that the reader expects of each field."""

    def __init__(self, raw: object) -> None:
        self._raw: Mapping[object, object] = raw if isinstance(raw, Mapping) else {}

    def __bool__(self) -> bool:
        return bool(self._raw)

    def raw(self, key: str) -> object:
        """The field as it is, ``None`` if missing."""
        return self._raw.get(key)

    def items(self) -> list[tuple[str, object]]:
        """All fields in their order."""
        return [(words(key), value) for key, value in self._raw.items()]

    def number(self, key: str) -> float | None:
        """The field as a finite float."""
        return finite(self.raw(key))

    def integer(self, key: str) -> int | None:
        """The field rounded to an integer."""
        value = self.number(key)
        return None if value is None else round(value)

    def text(self, key: str, default: str = "") -> str:
        """The field as text; ``default`` if missing or empty."""
        return words(self.raw(key)) or default

    def flag(self, key: str) -> bool | None:
        """The field as true, false or (anything else) not known."""
        value = self.raw(key)
        return value if isinstance(value, bool) else None

    def values(self, key: str) -> list[object]:
        """The field as a list of anything."""
        return sequence(self.raw(key))

    def numbers(self, key: str) -> list[float | None]:
        """The field as a list of finite floats, ``None`` where one is missing."""
        return [finite(value) for value in self.values(key)]

    def ends(self, key: str) -> tuple[float, float] | None:
        """The field as the two ends of an interval, the lower one first."""
        ends = self.numbers(key)
        if len(ends) != 2 or ends[0] is None or ends[1] is None:
            return None
        return min(ends[0], ends[1]), max(ends[0], ends[1])

    def texts(self, key: str) -> list[str]:
        """The field as a list of text, empty where one is missing."""
        return [words(value) for value in self.values(key)]

    def one(self, key: str) -> Fields:
        """The field as a nested dict."""
        return Fields(self.raw(key))

    def many(self, key: str) -> list[Fields]:
        """The field as a list of nested dicts; whatever is no dict is left out."""
        return [Fields(value) for value in self.values(key) if isinstance(value, Mapping)]


@dataclass(frozen=True)
class AuditRow:
    """One step of one layer: its objective before and after, and what the tokens look like after it."""

    fields: Fields
    layer: int | None
    step: str
    before: float | None
    after: float | None
    descended: float | None

    @classmethod
    def read(cls, fields: Fields) -> AuditRow:
        return cls(
            fields=fields,
            layer=fields.integer("layer"),
            step=fields.text("step", "step"),
            before=fields.number("before"),
            after=fields.number("after"),
            descended=fields.number("descended"),
        )

    @property
    def name(self) -> str:
        """``layer 3 compress``."""
        return f"layer {'?' if self.layer is None else self.layer} {self.step}"

    @property
    def ratio(self) -> float | None:
        """Objective after / before, the quantity that must be below one."""
        if self.before is None or self.after is None or self.before <= 0 or self.after < 0:
            return None
        return self.after / self.before

    @property
    def change(self) -> float | None:
        """Relative change of the objective; negative when it falls."""
        return None if self.ratio is None else self.ratio - 1

    @property
    def state(self) -> State | None:
        """``rises`` if the mean rose or most images did; ``partly`` if it fell on too few; else ``falls``."""
        rose = None if self.before is None or self.after is None else self.after > self.before
        if rose is None and self.descended is None:
            return None
        if rose or (self.descended is not None and self.descended < 0.5):
            return "rises"
        if self.descended is not None and self.descended < DESCENDS_FROM:
            return "partly"
        return "falls"

    @property
    def past_bound(self) -> bool:
        """Whether the step is longer than descent is guaranteed for."""
        size, bound = self.fields.number("step_size"), self.fields.number("max_step_size")
        return size is not None and bound is not None and size > bound


@dataclass(frozen=True)
class Model:
    """One model of the bundle; ``index`` 0 is the subject, the others stand beside it."""

    index: int
    fields: Fields

    @cached_property
    def label(self) -> str:
        return self.fields.text("label") or self.fields.text("name") or f"model {self.index + 1}"

    @cached_property
    def audit(self) -> Fields:
        return self.fields.one("audit")

    @cached_property
    def scores(self) -> Fields:
        return self.fields.one("scores")

    @cached_property
    def rows(self) -> list[AuditRow]:
        return [AuditRow.read(row) for row in self.audit.many("rows")]

    @property
    def steps(self) -> list[str]:
        """The names of the steps in the order in which they first appear."""
        return list(dict.fromkeys(row.step for row in self.rows))

    @property
    def measured(self) -> list[AuditRow]:
        """The rows whose objective can be judged."""
        return [row for row in self.rows if row.state is not None]

    @property
    def descends(self) -> bool | None:
        """The verdict of the audit; ``None`` where there is no objective to hold the layers to."""
        return self.audit.one("verdict").flag("descends")

    @cached_property
    def learnt(self) -> Fields:
        return self.fields.one("learnt")

    @property
    def unlabelled(self) -> bool:
        """Whether it learnt without labels: its features stand where others have a classifier."""
        return self.learnt.flag("labels") is False

    @cached_property
    def features(self) -> Fields:
        return self.fields.one("features")

    @cached_property
    def health(self) -> Fields:
        return self.fields.one("health")

    @cached_property
    def text(self) -> Fields:
        """What is shown of a language model; empty of others."""
        return self.fields.one("text")

    @property
    def sample(self) -> str:
        """What it looks at: an image, or a text."""
        return "text" if self.text or self.audit.text("unit") == "texts" else "image"

    @property
    def interval(self) -> tuple[float, float] | None:
        """The confidence interval of the accuracy."""
        return self.scores.ends("interval")


@dataclass(frozen=True)
class Bundle:
    """The whole bundle: its models in order and everything else by field."""

    fields: Fields
    models: list[Model]

    @classmethod
    def read(cls, raw: object) -> Bundle:
        fields = Fields(raw)
        return cls(fields, [Model(index, model) for index, model in enumerate(fields.many("models"))])

    @property
    def subject(self) -> Model:
        """The first model; an empty one if the bundle has none."""
        return self.models[0] if self.models else Model(0, Fields(None))

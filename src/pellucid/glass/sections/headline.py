"""The answer in one sentence, and the models beside each other."""

from __future__ import annotations

from pellucid.glass import charts
from pellucid.glass.markup import (
    NBSP,
    NONE,
    Cell,
    Html,
    count,
    duration,
    listed,
    number,
    paragraph,
    percent,
    plural,
    table,
    tag,
)
from pellucid.glass.reading import Bundle, Model

OVERLAP = "; the intervals overlap, so these images alone do not settle which is better"


def headline(bundle: Bundle) -> Html:
    """Title line, the answer, what stands behind it, and the comparison."""
    fields = bundle.fields
    title = fields.text("title", "report")
    version = fields.text("version")
    about = [title, fields.text("created"), f"pellucid {version}" if version else ""]
    return tag(
        "header",
        tag("p", *(tag("span", part) for part in about if part), class_="kicker"),
        tag("h1", answer(bundle)),
        paragraph(*_behind(bundle.subject), _beside(bundle), class_="lead"),
        comparison(bundle.models),
    )


def answer(bundle: Bundle) -> str:
    """The one sentence: how often it is right, and whether every layer does its step."""
    subject = bundle.subject
    if not bundle.models:
        return f"{bundle.fields.text('title', 'This bundle')} holds no model."
    accuracy, images = subject.scores.number("accuracy"), subject.scores.integer("count")
    work = {None: "", True: "every layer does its step", False: "not every layer does its step"}[
        subject.descends
    ]
    if accuracy is None:
        return f"{subject.label}: {work}." if work else f"{subject.label}, looked at layer by layer."
    among = f"of {plural(images, 'test image')}" if images else "of the test images"
    rest = f", {'and' if subject.descends else 'but'} {work}" if work else ""
    return f"{subject.label} recognises {percent(accuracy, 1)} {among}{rest}."


def _behind(subject: Model) -> list[str]:
    """Interval, verdict, size and time in sentences; an empty string where there is nothing to say."""
    interval = subject.interval
    share = percent(subject.scores.number("confidence") or 0.95)
    chance = ""
    if interval:
        chance = f"With {share} confidence its accuracy lies between {between(*interval, 'and')}."
    elif subject.fields and subject.scores.number("accuracy") is None:
        chance = "No accuracy was measured."
    verdict = subject.audit.one("verdict").text("text")
    size, seconds = subject.fields.number("parameters"), subject.fields.number("seconds")
    has = f"has {count(size)} parameters" if size is not None else ""
    learned = f"trained in {duration(seconds)}" if seconds is not None else ""
    both = listed([part for part in (has, learned) if part])
    return [chance, verdict, f"It {both}." if both else ""]


def between(low: float, high: float, word: str = "to") -> str:
    """``96.6 to 99.1 %``."""
    return f"{percent(low, 1).removesuffix(f'{NBSP}%')} {word} {percent(high, 1)}"


def _beside(bundle: Bundle) -> str:
    """The others in words, and whether the test set separates them from the subject."""
    sentences = []
    for other in bundle.models[1:]:
        accuracy = other.scores.number("accuracy")
        if accuracy is None:
            continue
        mine, theirs = bundle.subject.interval, other.interval
        settled = ""
        if mine and theirs:
            apart = mine[1] < theirs[0] or theirs[1] < mine[0]
            settled = "; the intervals do not overlap" if apart else OVERLAP
        sentences.append(f"{other.label}, beside it, reaches {percent(accuracy, 1)}{settled}.")
    return " ".join(sentences)


def comparison(models: list[Model]) -> Html:
    """Accuracy, interval, parameters and seconds of every model."""
    if not models:
        return Html("")
    ends = _ends(models)
    heads = ["model", "accuracy", "interval", "", "parameters", "training time", "audit"]
    rows = [_row(model, ends) for model in models]
    if ends is None:
        heads, rows = heads[:2] + heads[4:], [row[:2] + row[4:] for row in rows]
    return tag("div", table("The models side by side", heads, rows), class_="headtable")


def _row(model: Model, ends: tuple[float, float] | None) -> list[Cell]:
    accuracy, interval = model.scores.number("accuracy"), model.interval
    low, high = interval or (None, None)
    drawn = (
        ""
        if accuracy is None or ends is None
        else charts.interval_bar(low, accuracy, high, ends, model.index)
    )
    size, seconds = model.fields.number("parameters"), model.fields.number("seconds")
    return [
        Cell(model.label),
        Cell(percent(accuracy, 1), accuracy, "n"),
        Cell(between(*interval) if interval else NONE, low, "n"),
        Cell(drawn, class_="picture"),
        Cell(count(size) if size is None or size < 1e7 else f"{number(size / 1e6)} million", size, "n"),
        Cell(duration(seconds), seconds, "n"),
        _verdict(model),
    ]


def _verdict(model: Model) -> Cell:
    if model.descends is None:
        return Cell("no stated objective" if model.rows and not model.measured else NONE)
    if model.descends:
        return Cell(tag("span", "● every layer descends", class_="good"))
    return Cell(tag("span", "▲ not every layer descends", class_="warn"))


def _ends(models: list[Model]) -> tuple[float, float] | None:
    """A common axis for all accuracies and their intervals."""
    values = [end for model in models for end in (model.interval or ())]
    values += [a for model in models if (a := model.scores.number("accuracy")) is not None]
    if not values:
        return None
    pad = max(0.1 * (max(values) - min(values)), 0.005 * max(1.0, abs(max(values))))
    return min(values) - pad, max(values) + pad

"""The answer in one sentence, and the models beside each other."""

from __future__ import annotations

from typing import Any

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
from pellucid.glass.sections.health import STATES, verdict
from pellucid.glass.sections.views import learnt_from

ILL = {
    "idle": "has learnt nothing: views of one image are no closer to each other than different images",
    "collapsing": "is collapsing: its features tell images apart less and less",
    "collapsed": "has collapsed: its features are all but the same for every image",
}
"""The answer where the features of a run without labels are not well."""

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
        paragraph(*_behind(bundle), _beside(bundle), class_="lead"),
        verdict(bundle.subject),
        comparison(bundle.models),
    )


def answer(bundle: Bundle) -> str:
    """The one sentence: how often it is right, and whether every layer does its step."""
    subject = bundle.subject
    if not bundle.models:
        return f"{bundle.fields.text('title', 'This bundle')} holds no model."
    if (state := subject.health.text("state")) in ILL:
        return f"{subject.label} {ILL[state]}."
    accuracy, images = subject.scores.number("accuracy"), subject.scores.integer("count")
    work = {None: "", True: "every layer does its step", False: "not every layer does its step"}[
        subject.descends
    ]
    rank, width = subject.features.number("effective_rank"), subject.features.integer("width")
    if accuracy is None and subject.unlabelled and rank is not None and width is not None:
        rest = f", {'and' if subject.descends else 'but'} {work}" if work else ""
        told = f"tells images apart in {directions(rank, width)} directions"
        return f"{subject.label}, trained without labels, {told}{rest}."
    if accuracy is None:
        return f"{subject.label}: {work}." if work else f"{subject.label}, looked at layer by layer."
    among = f"of {plural(images, 'test image')}" if images else "of the test images"
    rest = f", {'and' if subject.descends else 'but'} {work}" if work else ""
    if subject.unlabelled:
        how = f"recognises {percent(accuracy, 1)} {among} by their nearest neighbours"
        return f"{subject.label}, trained without labels, {how}{rest}."
    return f"{subject.label} recognises {percent(accuracy, 1)} {among}{rest}."


def _behind(bundle: Bundle) -> list[str]:
    """Interval, verdict, size and time in sentences; an empty string where there is nothing to say."""
    subject = bundle.subject
    interval = subject.interval
    share = percent(subject.scores.number("confidence") or 0.95)
    chance = ""
    if interval:
        chance = f"With {share} confidence its accuracy lies between {between(*interval, 'and')}."
    elif subject.fields and subject.scores.number("accuracy") is None and not subject.unlabelled:
        chance = "No accuracy was measured."
    verdict = subject.audit.one("verdict").text("text")
    size, seconds = subject.fields.number("parameters"), subject.fields.number("seconds")
    has = f"has {count(size)} parameters" if size is not None else ""
    learned = f"trained in {duration(seconds)}" if seconds is not None else ""
    both = listed([part for part in (has, learned) if part])
    return [*_without_labels(bundle), chance, verdict, f"It {both}." if both else ""]


def _without_labels(bundle: Bundle) -> list[str]:
    """From what it learnt, who votes, and what the same gave untrained."""
    subject = bundle.subject
    if not subject.unlabelled:
        return []
    voters, of = subject.scores.integer("neighbours"), subject.scores.integer("train")
    votes = f"The {voters} nearest of {count(of)} training images vote for a class." if voters and of else ""
    curve = subject.fields.one("curves").one("test")
    measured = list(zip(curve.numbers("epoch"), curve.numbers("knn accuracy"), strict=False))
    before = measured[0][1] if measured and measured[0][0] == 0 else None
    untrained = f"Untrained it reached {percent(before, 1)}." if before is not None else ""
    return [learnt_from(subject, bundle.fields.one("data").integer("train")), votes, untrained]


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
        how = {True: " by nearest neighbours", False: " by its classifier"}[other.unlabelled]
        how = "" if other.unlabelled == bundle.subject.unlabelled else how
        sentences.append(f"{other.label}, beside it, reaches {percent(accuracy, 1)}{how}{settled}.")
    return " ".join(sentences)


def comparison(models: list[Model]) -> Html:
    """Accuracy, interval, parameters and seconds of every model; effective rank and health of features."""
    if not models:
        return Html("")
    ends = _ends(models)
    heads, *rows = zip(*_columns(models, ends), strict=True)
    return tag("div", table("The models side by side", heads, rows), class_="headtable")


def _columns(models: list[Model], ends: tuple[float, float] | None) -> list[list[Any]]:
    """Each with its heading on top; those that say something of at least one model."""
    found: list[list[Any]] = [["model", *(Cell(model.label) for model in models)]]
    if ends is not None or not any(model.unlabelled for model in models):
        found.append(["accuracy", *(_accuracy(model) for model in models)])
    if ends is not None:
        found.append(["interval", *(_interval(model) for model in models)])
    if not any(model.unlabelled for model in models):
        if ends is not None:
            found.append(["", *(_drawn(model, ends) for model in models)])
    else:
        found.append(["effective rank", *(_rank(model) for model in models)])
        found.append(["health", *(_health(model) for model in models)])
    found.append(["parameters", *(_size(model) for model in models)])
    seconds = [model.fields.number("seconds") for model in models]
    found.append(["training time", *(Cell(duration(value), value, "n") for value in seconds)])
    found.append(["audit", *(_verdict(model) for model in models)])
    return found


def _accuracy(model: Model) -> Cell:
    accuracy = model.scores.number("accuracy")
    return Cell(percent(accuracy, 1), accuracy, "n")


def _interval(model: Model) -> Cell:
    interval = model.interval
    return Cell(between(*interval) if interval else NONE, interval[0] if interval else None, "n")


def _drawn(model: Model, ends: tuple[float, float]) -> Cell:
    accuracy, (low, high) = model.scores.number("accuracy"), model.interval or (None, None)
    if accuracy is None:
        return Cell("", class_="picture")
    return Cell(charts.interval_bar(low, accuracy, high, ends, model.index), class_="picture")


def _rank(model: Model) -> Cell:
    rank, width = model.features.number("effective_rank"), model.features.integer("width")
    return Cell(directions(rank, width) if rank is not None and width else NONE, rank, "n")


def directions(rank: float, width: int) -> str:
    """``44.7 of 64``, as the verdict has it."""
    return f"{rank:.1f} of {width}"


def _health(model: Model) -> Cell:
    sign, word, class_ = STATES.get(model.health.text("state"), ("", "", None))
    return Cell(tag("span", f"{sign} {word}", class_=class_) if word else NONE)


def _size(model: Model) -> Cell:
    size = model.fields.number("parameters")
    return Cell(count(size) if size is None or size < 1e7 else f"{number(size / 1e6)} million", size, "n")


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

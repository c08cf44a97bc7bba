"""What a run without labels learnt from: its objective in words, and pictures as the model saw them."""

from __future__ import annotations

import json

from pellucid.glass.markup import (
    Html,
    count,
    folded,
    number,
    paragraph,
    percent,
    section,
    shot,
    strip,
    table,
    tag,
)
from pellucid.glass.reading import Bundle, Fields, Model, finite

NAMES = {
    "simdino": "SimDINO",
    "simdinov2": "SimDINOv2",
    "dino": "DINO",
    "mcr2-views": "maximal coding rate reduction of views",
    "mae": "masked autoencoding",
}
"""What objectives are called in print."""

DOES = {
    "simdino": "views of one image must agree with what the model’s moving average makes of its other views, "
    "while the features of different images spread",
    "simdinov2": "views of one image must agree with what the model’s moving average makes of its other "
    "views, hidden patches with what it makes of them in sight, while features of different images spread",
    "dino": "views of one image must fall to the same of many prototypes as the model’s moving average lets "
    "its other views fall",
    "mcr2-views": "views of one image must be cheap to code together, and all images’ features expensive",
    "mae": "the pixels of hidden patches must be told from the patches in sight",
}

MEANS = {
    "eps": "distortion of the coding rate",
    "gamma": "weight of the coding rate, for each nat",
    "group_size": "images that are coded together",
    "head_dim": "dimension in which views are compared",
    "head_hidden": "width of the projector, which is thrown away in the end",
    "momentum": "of the moving average at the start; it rises to 1",
    "expand_teacher": "whether the moving average’s features are made to spread too",
    "patches": "weight of the agreement on hidden patches",
    "stop_gradient": "whether the moving average is held fixed in a step",
    "prototypes": "how many of them",
    "centre_momentum": "of the running mean of scores",
    "student_temperature": "of the model’s scores",
    "teacher_temperature": "of the moving average’s scores, at the start and later",
    "gain": "of the coding rate of all features: it divides the squared distortion",
    "weight": "of the coding rate of all features",
    "mask_ratio": "share of the patches that is hidden",
}
"""Numbers of the objectives in words."""


def objective_name(model: Model) -> str:
    """``SimDINO``; as the user typed it where it is not known."""
    raw = model.learnt.text("objective")
    return NAMES.get(raw, raw)


def learnt_from(model: Model, images: int | None) -> str:
    """``It learnt from 1 347 images without their labels, by SimDINO: views of one image must ...``"""
    name, does = objective_name(model), DOES.get(model.learnt.text("objective"), "")
    many = f"{count(images)} images" if images else "images"
    if not name:
        return f"It learnt from {many} without labels."
    return f"It learnt from {many} without labels, by {name}: {does}." if does else f"By {name}."


def views(bundle: Bundle) -> Html:
    """The subject's numbers, and its pictures as they went in."""
    model = bundle.subject
    if not model.unlabelled:
        return Html("")
    shown, settings = _pictures(model.fields.one("views")), _settings(model.learnt.one("settings"))
    if not shown and not settings:
        return Html("")
    lead = "Look at what is left of a picture: from this the model must tell what belongs together."
    if model.fields.one("views").text("kind") == "hidden":
        lead = "Look at the right of each three: what stands there was told from the middle one alone."
    return section("views", "What it learnt from", lead, shown, settings)


def _settings(settings: Fields) -> Html:
    rows = [[name, _value(value), MEANS.get(name, "")] for name, value in settings.items()]
    if not rows:
        return Html("")
    return folded(
        "The numbers that define the objective",
        table("Numbers of the objective", ["name", "value", "is"], rows, sort=False),
    )


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(finite(value))
    return json.dumps(value, ensure_ascii=False, default=str)[:200]


def _pictures(fields: Fields) -> Html:
    rows = [row for image in fields.many("images") if (row := _row(image, fields))]
    if not rows:
        return Html("")
    said = _said_of_hidden if fields.text("kind") == "hidden" else _said_of_crops
    return tag("div", paragraph(*said(fields)), tag("div", *rows, class_="strips"))


def _said_of_hidden(fields: Fields) -> list[str]:
    return [
        f"{percent(fields.number('share'))} of the patches are hidden.",
        "These are test images; where patches are in sight, they are shown as they are.",
    ]


def _said_of_crops(fields: Fields) -> list[str]:
    first = next(iter(fields.many("images")))
    large, small = len(first.values("large")), len(first.values("small"))
    split = percent(fields.number("split"))
    sides = [" × ".join(count(side) for side in fields.numbers(key)) for key in ("size", "small_size")]
    parts = [f"{large} large views of each image, of more than {split} of its area, {sides[0]} pixels"]
    if small:
        parts.append(f"{small} small ones of less, {sides[1]} pixels")
    return [f"In every step {' and '.join(parts)}.", "These are of the first epoch; later ones differ."]


def _row(image: Fields, fields: Fields) -> Html:
    name, label = image.text("name"), image.text("label")
    shots = [shot(image.raw("png"), name or "image", "original", label, class_="lead")]
    if fields.text("kind") == "hidden":
        shots += [
            shot(image.raw("masked"), f"{name}, hidden patches gray", "in sight"),
            shot(image.raw("filled"), f"{name}, hidden patches filled in", "filled in"),
        ]
    for kind, class_ in (("large", ""), ("small", "part")):
        many = image.values(kind)
        shots += [shot(uri, f"{name}, {kind} view {i}", class_=class_) for i, uri in enumerate(many, 1)]
    return strip(f"Views of {name or 'an image'}", shots)

"""Where each head looks: attention maps beside the picture, for every layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pellucid.glass import charts
from pellucid.glass.markup import (
    Html,
    folded,
    is_coarse,
    is_picture,
    paragraph,
    percent,
    plural,
    section,
    tag,
)
from pellucid.glass.reading import Bundle, Fields, Model, finite, sequence

MAX_MAPS = 1500
"""Maps in one report, about 0.8 MB of them at 14 x 14 patches."""

MAX_PICTURES = 400_000
"""Characters of sample pictures in one report."""


@dataclass
class Budget:
    """What may still be drawn, and the pictures that are in the file already (each is stored once)."""

    maps: int = MAX_MAPS
    characters: int = MAX_PICTURES
    pictures: dict[str, str] = field(default_factory=dict)

    def picture(self, png: str) -> str | None:
        """An id for the picture; ``None`` if it is none or the file would become too large."""
        if png in self.pictures:
            return self.pictures[png]
        if not is_picture(png, self.characters):
            return None
        self.characters -= len(png)
        self.pictures[png] = f"picture-{len(self.pictures)}"
        return self.pictures[png]


@dataclass(frozen=True)
class Sample:
    """One image with its maps: ``layers[layer][head]`` is a grid of ``columns`` wide rows, or empty."""

    fields: Fields
    columns: int
    layers: dict[int, list[list[float]]]

    @classmethod
    def read(cls, fields: Fields) -> Sample:
        grid = [int(side) for side in fields.numbers("grid") if side is not None and side >= 1]
        size = grid[0] * grid[1] if len(grid) == 2 else 0
        layers = {}
        for i, layer in enumerate(fields.many("layers")):
            number = layer.integer("layer")
            heads = [_grid(head, size) for head in layer.values("heads")]
            if any(heads):
                layers[i + 1 if number is None else number] = heads
        return cls(fields, grid[1] if size else 1, layers)

    @property
    def maps(self) -> int:
        return sum(len(heads) for heads in self.layers.values())


def _grid(head: object, size: int) -> list[float]:
    """The map's values with holes as zero; empty if they do not fill the grid."""
    values = sequence(head)
    return [max(finite(v) or 0.0, 0.0) for v in values] if values and len(values) == size else []


def attention(bundle: Bundle) -> Html:
    """The subject's maps, then those of the others folded away."""
    budget = Budget()
    shown = [(model, block) for model in bundle.models if (block := _block(model, budget))]
    if not shown:
        return Html("")
    lead = (
        "Look down a column: a head that means something picks the same kind of thing in every image, "
        "and different heads pick different things."
    )
    key = paragraph(
        "Each map shows how strongly the class token (or, without one, the average token) attends to every "
        "patch, scaled to its own maximum: the colour of the page is nothing, the farthest from it is most.",
    )
    first, *rest = shown
    body = [first[1] if first[0].index == 0 else folded(first[0].label, first[1], open_=True)]
    body += [folded(f"The same for {model.label}", block) for model, block in rest]
    return section("attention", "Where each head looks", lead, key, _store(budget), *body)


def _store(budget: Budget) -> Html:
    """The pictures, once, to be shown by reference in every layer."""
    box = {"viewBox": "0 0 64 64"}
    images = [
        tag(
            "symbol",
            tag("image", href=png, width=64, height=64, class_="coarse" if is_coarse(png) else None),
            id=name,
            **box,
        )
        for png, name in budget.pictures.items()
    ]
    return tag("svg", *images, width=0, height=0, class_="store", aria_hidden="true")


def _affordable(samples: list[Sample], budget: Budget) -> list[Sample]:
    """The first samples whose maps still fit."""
    kept = []
    for sample in samples:
        if sample.maps <= budget.maps:
            budget.maps -= sample.maps
            kept.append(sample)
    return kept


def _block(model: Model, budget: Budget) -> Html:
    """One foldable table per layer, the last one open: rows are images, columns are heads."""
    samples = [Sample.read(image) for image in model.fields.one("attention").many("images")]
    samples = [sample for sample in samples if sample.layers]
    kept = _affordable(samples, budget)
    numbers = sorted({layer for sample in kept for layer in sample.layers})
    if not numbers:
        return Html("")
    layers = [_layer(layer, kept, budget, open_=layer == numbers[-1]) for layer in numbers]
    left = len(samples) - len(kept)
    note = paragraph(f"{plural(left, 'image')} left out to keep this file small.") if left else ""
    widest = max(len(heads) for sample in kept for heads in sample.layers.values())
    return tag("div", *layers, note, class_="attention narrow" if widest <= 4 else "attention")


def _layer(layer: int, samples: list[Sample], budget: Budget, *, open_: bool) -> Html:
    shown = [sample for sample in samples if layer in sample.layers]
    heads = max(len(sample.layers[layer]) for sample in shown)
    head = tag(
        "tr",
        tag("th", "image", scope="col"),
        *(tag("th", f"head {k}", scope="col") for k in range(1, heads + 1)),
    )
    rows = [tag("tr", _label(sample, budget), *_cells(sample, layer, heads)) for sample in shown]
    grid = tag("table", tag("thead", head), tag("tbody", *rows), class_="maps few" if heads <= 8 else "maps")
    name = f"Layer {layer}"
    box = tag(
        "div", grid, class_="scroll", role="region", tabindex=0, aria_label=f"Attention maps, {name.lower()}"
    )
    return tag("details", tag("summary", name), box, class_="layer", open=open_, data_layer=layer)


def _label(sample: Sample, budget: Budget) -> Html:
    """The picture with its name, its class, and the prediction where it is wrong."""
    fields = sample.fields
    name, label, predicted = fields.text("name"), fields.text("label"), fields.text("predicted")
    png = fields.raw("png")
    picture = budget.picture(png) if isinstance(png, str) else None
    drawn = _thumbnail(picture, name or "sample image") if picture else ""
    said = [tag("span", charts.clip(name, 40), class_="name", title=name)] if name else []
    said += [tag("span", charts.clip(label, 30), title=label)] if label else []
    if predicted and label:
        right = predicted == label
        said.append(
            tag(
                "span",
                "recognised" if right else f"▲ taken for {charts.clip(predicted, 30)}",
                class_=None if right else "warn",
            )
        )
    elif predicted:
        said.append(tag("span", f"predicted {charts.clip(predicted, 30)}"))
    return tag("th", tag("div", drawn, tag("div", *said, class_="what"), class_="sample"), scope="row")


def _thumbnail(picture: str, name: str) -> Html:
    use = tag("use", href=f"#{picture}")
    return tag(
        "svg", tag("title", name), use, width=56, height=56, role="img", aria_label=name, class_="thumb"
    )


def _cells(sample: Sample, layer: int, heads: int) -> Iterator[Html]:
    maps = sample.layers[layer]
    for k in range(heads):
        values = maps[k] if k < len(maps) else []
        yield tag(
            "td",
            charts.pixel_map(values, sample.columns, _said(values, sample.columns, k + 1)) if values else "–",
        )


def _said(values: list[float], columns: int, head: int) -> str:
    """The map in words: where it is strongest, and how much of it lies there."""
    total, top = sum(values), max(values)
    if total <= 0:
        return f"head {head}: empty"
    row, column = divmod(values.index(top), columns)
    return f"head {head}: {percent(top / total)} on row {row + 1}, column {column + 1}"

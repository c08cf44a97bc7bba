"""What the features take for alike: nearest neighbours, and a map of the test images."""

from __future__ import annotations

from pellucid.glass import charts
from pellucid.glass.markup import (
    Html,
    count,
    figure,
    folded,
    is_coarse,
    is_picture,
    join,
    number,
    panels,
    paragraph,
    percent,
    section,
    shot,
    strip,
    tag,
)
from pellucid.glass.reading import Bundle, Fields, Model, finite, sequence, words

MAX_TILE = 20_000
"""Characters of a picture on the map."""


def neighbours(bundle: Bundle) -> Html:
    """The subject's neighbours, then those of the others folded away."""
    shown = [(model, block) for model in bundle.models if (block := _rows(model))]
    if not shown:
        return Html("")
    lead = (
        "Look along a row: to the right of each test image are the training images whose features "
        "point most nearly the same way."
    )
    (first, block), *rest = shown
    body = [block if first.index == 0 else folded(first.label, block, open_=True)]
    body += [folded(f"The same for {model.label}", other) for model, other in rest]
    return section("neighbours", "What it takes for alike", lead, paragraph(*_said(first)), *body)


def _said(model: Model) -> list[str]:
    """What the numbers are, and how many of the neighbours shown are of the image's class."""
    pairs = [
        (query.text("label"), hit.text("label"))
        for query in model.features.many("neighbours")
        for hit in query.many("near")
    ]
    known = [(a, b) for a, b in pairs if a and b]
    right = sum(a == b for a, b in known)
    numbers = "Below each stands the cosine of the angle between the two: 1 is the same direction."
    share = f"Of the {count(len(known))} shown, {count(right)} are of the image’s own class." if known else ""
    return [numbers, share]


def _rows(model: Model) -> Html:
    rows = []
    for query in model.features.many("neighbours"):
        name, label = query.text("name"), query.text("label")
        shots = [shot(query.raw("png"), name or "test image", "test image", label, class_="lead")]
        shots += [_hit(hit, label) for hit in query.many("near")]
        rows.append(strip(f"Nearest to {name or 'a test image'}", shots))
    return join(rows)


def _hit(hit: Fields, wanted: str) -> Html:
    label = hit.text("label")
    shown = charts.clip(label, 24)
    said: str = tag("span", f"▲ {shown}", class_="warn") if label and wanted and label != wanted else shown
    return shot(hit.raw("png"), hit.text("name") or "training image", number(hit.number("cosine")), said)


def feature_map(bundle: Bundle) -> Html:
    """The test images in the plane in which their features differ most."""
    model = bundle.subject
    fields = model.features.one("map")
    clouds = _clouds(fields)
    drawn = [_points(fields, clouds), _tiles(fields)]
    if not any(drawn):
        return Html("")
    known = any(cloud.number is not None for cloud in clouds)
    lead = (
        "Look for images of one kind that lie together."
        if not known
        else "Look for classes that lie apart: no label had a part in where they lie."
    )
    shares = [share for share in fields.numbers("shares") if share is not None]
    said = (
        f"The plane is that of the two directions in which the test images’ features differ most, of unit "
        f"length as cosines see them; it shows {percent(sum(shares))} of their variance, so what overlaps "
        f"here may lie apart in the other directions."
        if shares
        else ""
    )
    legend = charts.class_legend(clouds) if known else ""
    return section(
        "map", "A map of the features", lead, paragraph(said), panels(*(d for d in drawn if d)), legend
    )


def _clouds(fields: Fields) -> list[charts.Cloud]:
    """Points by class, in the order of the names; more than can be told apart, or none known, as one."""
    found: dict[str, list[tuple[float, float]]] = {}
    for point in fields.values("points"):
        x, y, label = (*sequence(point)[:3], None, None, None)[:3]
        if (a := finite(x)) is not None and (b := finite(y)) is not None:
            found.setdefault(words(label), []).append((a, b))
    rest = found.pop("", [])
    named = (
        sorted(found, key=lambda name: (len(name), name)) if all(map(str.isdigit, found)) else sorted(found)
    )
    clouds = [charts.Cloud(name, found[name], i) for i, name in enumerate(named[: charts.CLASSES])]
    for name in named[charts.CLASSES :]:
        rest += found[name]
    if rest:
        clouds.insert(0, charts.Cloud("other classes" if clouds else "test images", rest, None))
    return clouds


def _points(fields: Fields, clouds: list[charts.Cloud]) -> Html:
    many = sum(len(cloud.points) for cloud in clouds)
    title = f"Features of {count(many)} test images in their first two principal directions"
    drawn = charts.point_map(title, clouds)
    named = any(cloud.number is not None for cloud in clouds)
    said = "A name stands in the middle of its class." if named else ""
    return figure(f"{count(many)} test images", drawn, said) if drawn else Html("")


def _tiles(fields: Fields) -> Html:
    grid = [int(side) for side in fields.numbers("grid") if side is not None and 1 <= side <= 100]
    if len(grid) != 2:
        return Html("")
    tiles = []
    for each in fields.many("pictures"):
        column, row, uri = each.integer("column"), each.integer("row"), each.raw("png")
        inside = column is not None and row is not None and 0 <= column < grid[0] and 0 <= row < grid[1]
        if inside and is_picture(uri, MAX_TILE):
            name = ", ".join(part for part in (each.text("name"), each.text("label")) if part)
            tiles.append(charts.Tile(name or "test image", column or 0, row or 0, uri, is_coarse(uri)))
    drawn = charts.tile_map("Test images where their features lie", tiles, *grid)
    said = "The same plane, stretched to the frame; of the images that fall into a cell, one."
    return figure("The images themselves", drawn, said, wide=True) if drawn else Html("")

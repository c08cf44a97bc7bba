"""What a model sees as things, drawn: masks over the picture, colours of features, the maps of the heads."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from pellucid.glass.markup import Html, figure, folded, join, paragraph, plural, section, tag
from pellucid.glass.report import render_page
from pellucid.glass.sheets import PAGE, RISE
from pellucid.measure.segmentation import Colours, Segment, enlarged

KINDS = ((31, 95, 153), (184, 86, 10), (53, 122, 56), (179, 49, 44), (122, 79, 163), (125, 90, 60))
"""One colour for each mask of a picture, in turns: those of the report's classes."""

BOX, SMALL, LARGEST = 320, 132, 2048
"""Pixels: longer side of a picture on the sheet, of a head's map, and of an overlay."""


@dataclass
class Shown:
    """One picture and what was found in it.

    Attributes:
        name: as the user gave it, safe to print.
        size: height and width of the file, in pixels.
        picture: uint8 ``(3, h, w)``, small.
        grid: rows and columns of patches.
        segments: ``maskcut`` and ``tokencut``, where they were made.
        heads: ``(K, rows, columns)``, how much each head reads each patch.
        head_masks: the patches it reads most.
        colours: PCA's.
    """

    name: str
    size: tuple[int, int]
    picture: Tensor
    grid: tuple[int, int]
    segments: Mapping[str, Sequence[Segment]] = field(default_factory=dict)
    heads: Tensor | None = None
    head_masks: Tensor | None = None
    colours: Colours | None = None


def png(pixels: Tensor) -> bytes:
    """uint8 ``(h, w)`` or ``(3, h, w)`` as a PNG file."""
    return _encoded(_image(pixels), "PNG", optimize=True)


def reduced(picture: Tensor, side: int = BOX, *, grow: bool = True) -> Tensor:
    """uint8 ``(3, h, w)`` with a longer side of at most ``side``; small ones may grow, by whole pixels."""
    image = _image(picture)
    longest = max(image.size)
    if grow and 2 * longest <= side:
        zoom = side // longest
        image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    elif longest > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


def overlay(picture: Tensor, masks: Sequence[Bool[Tensor, "r c"]]) -> bytes:
    """A PNG: the picture in pale gray, and what each mask covers in its own light, tinted and outlined.

    As large as the picture, with a longer side of at most 2,048 pixels.
    """
    return png(_overlaid(reduced(picture, LARGEST, grow=False), masks))


def colour_picture(colours: Float[Tensor, "r c 3"], size: tuple[int, int]) -> bytes:
    """A PNG in the colours of the patches, at this height and width; at most as large as above."""
    shrink = min(1, LARGEST / max(size))
    height, width = (max(1, round(side * shrink)) for side in size)
    return png(_colour_pixels(colours, (height, width)))


def segment_page(
    title: str, shown: Sequence[Shown], *, model: str, layer: int, share: float, by: str, pictures: int
) -> str:
    """All of it as one HTML file, pictures inside; of more pictures than are ``shown`` it says so."""
    some = f"The first {len(shown)} of {pictures} pictures; the files are there for all."
    lead = paragraph(
        f"What {model} sees as one thing, read from layer {layer}. It was shown no mask, and nothing "
        f"smooths its masks afterwards: they are as fine as its patches.",
        some if len(shown) < pictures else "",
        class_="lead",
    )
    most = "the patches that it reads most" if by == "count" else "its attention"
    kept = f"{share:.0%} of {most}"
    legend = tag(
        "ul",
        tag("li", "MaskCut cuts the graph of like patches in two, takes the thing out, and cuts again: "
            "the first mask is blue, the second orange, the third green. The score is 1 minus NCut."),
        tag("li", "TokenCut makes one cut, of a graph without weights."),
        tag("li", "PCA: the first direction of the features of all pictures parts foreground from "
            "background, the first three of the foreground are red, green and blue."),
        tag("li", "Heads: how much the class token reads each patch (in ToST, how much of the patch is the "
            f"head's), dark is much; outlined are {kept}."),
    )  # fmt: skip
    body = join([_section(i, each) for i, each in enumerate(shown)])
    return render_page(title, tag("header", tag("h1", title), lead), legend, body)


def _section(number: int, shown: Shown) -> Html:
    size = (shown.picture.shape[-2], shown.picture.shape[-1])
    figures = [figure("picture", _img(shown.picture, shown.name))]
    titles = {"maskcut": "MaskCut", "tokencut": "TokenCut"}
    for method, found in shown.segments.items():
        masks = [segment.mask for segment in found]
        said = ", ".join(f"{segment.score:.2f}" for segment in found)
        nothing = "nothing to cut: all patches are alike"
        note = f"{plural(len(found), 'mask')}, score {said}" if found else nothing
        drawn = _img(_overlaid(shown.picture, masks), f"{titles[method]} of {shown.name}")
        figures.append(figure(titles[method], drawn, note))
    if shown.colours is not None:
        drawn = _img(_colour_pixels(shown.colours.colours, size), f"PCA of {shown.name}")
        covered = f"{shown.colours.foreground.float().mean():.0%} foreground"
        figures.append(figure("PCA", drawn, covered))
    heads = _heads(shown)
    (height, width), (rows, columns) = shown.size, shown.grid
    lead = f"{width} x {height} pixels, seen as {columns} x {rows} patches: {shown.name}"
    drawn = tag("div", *figures, class_="panels four")
    return section(f"picture-{number}", os.path.basename(shown.name), lead, drawn, heads)


def _heads(shown: Shown) -> Html:
    if shown.heads is None or shown.head_masks is None:
        return Html("")
    drawn = []
    for i, (map_, mask) in enumerate(zip(shown.heads, shown.head_masks, strict=True), start=1):
        pixels = _map_pixels(map_, mask, reduced(shown.picture, SMALL).shape[-2:])
        drawn.append(figure(f"head {i}", _img(pixels, f"head {i} on {shown.name}")))
    return folded(plural(len(drawn), "head"), tag("div", *drawn, class_="panels small"), open_=True)


def _overlaid(picture: Tensor, masks: Sequence[Tensor]) -> Tensor:
    light = picture.float()
    gray = light.mean(0, keepdim=True).expand(3, -1, -1)
    pixels = 0.45 * gray + 0.55 * 255
    thick = max(1, min(picture.shape[-2:]) // 160)
    for i, patches in enumerate(masks):
        mask = enlarged(patches, (picture.shape[-2], picture.shape[-1]))
        colour = torch.tensor(KINDS[i % len(KINDS)]).view(3, 1, 1).float()
        pixels = torch.where(mask, 0.65 * light + 0.35 * colour, pixels)
        pixels = torch.where(_outline(mask, thick), colour, pixels)
    return pixels.round().clamp(0, 255).to(torch.uint8)


def _outline(mask: Bool[Tensor, "h w"], thick: int) -> Bool[Tensor, "h w"]:
    """The pixels of a mask that lie so near its edge, the picture's own edge left out."""
    inner = mask.clone()
    for step in range(1, thick + 1):
        inner[step:] &= mask[:-step]
        inner[:-step] &= mask[step:]
        inner[:, step:] &= mask[:, :-step]
        inner[:, :-step] &= mask[:, step:]
    return mask & ~inner


def _map_pixels(values: Float[Tensor, "r c"], mask: Bool[Tensor, "r c"], size: Sequence[int]) -> Tensor:
    """A head's map from the page's colour (nothing) to blue (its largest), its mask outlined."""
    height, width = size
    share = enlarged(values / values.max().clamp_min(1e-12), (height, width)).clamp(0, 1)
    page, rise = (torch.tensor(colour).view(3, 1, 1).float() for colour in (PAGE, RISE))
    pixels = page + share * (rise - page)
    edge = _outline(enlarged(mask, (height, width)), 1)
    return torch.where(edge, torch.tensor(KINDS[1]).view(3, 1, 1).float(), pixels).round().to(torch.uint8)


def _colour_pixels(colours: Float[Tensor, "r c 3"], size: tuple[int, int]) -> Tensor:
    return (enlarged(colours, size) * 255).round().to(torch.uint8).permute(2, 0, 1)


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray((pixels if pixels.dim() == 2 else pixels.permute(1, 2, 0)).contiguous().numpy())


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _img(pixels: Tensor, name: str) -> Html:
    data = base64.b64encode(_encoded(_image(pixels), "JPEG", quality=86)).decode("ascii")
    return tag("img", src=f"data:image/jpeg;base64,{data}", alt=name, title=name)


__all__ = ["Shown", "colour_picture", "overlay", "png", "reduced", "segment_page"]

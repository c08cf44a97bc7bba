"""Overlays pixel by pixel, and a sheet on which every name is text."""

import io

import numpy as np
import torch
from PIL import Image

from pellucid.glass.segments import KINDS, Shown, colour_picture, overlay, reduced, segment_page
from pellucid.measure.segmentation import Colours, Segment


def opened(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_an_overlay_pixel_by_pixel():
    picture = torch.full((3, 40, 60), 100, dtype=torch.uint8)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[0, 1] = True
    pixels = opened(overlay(picture, [mask]))
    assert pixels.shape == (40, 60, 3)
    assert (pixels[30, 50] == round(0.45 * 100 + 0.55 * 255)).all()
    inside = [round(0.65 * 100 + 0.35 * c) for c in KINDS[0]]
    assert pixels[10, 30].tolist() == inside
    assert pixels[10, 20].tolist() == list(KINDS[0])  # its left edge
    assert pixels[19, 30].tolist() == list(KINDS[0])  # its lower edge
    assert pixels[0, 30].tolist() == inside  # the picture ends here, the thing may not
    assert (opened(overlay(picture, [])) == round(0.45 * 100 + 0.55 * 255)).all()


def test_pictures_are_no_larger_than_said():
    assert reduced(torch.zeros(3, 1000, 4000, dtype=torch.uint8)).shape == (3, 80, 320)
    assert reduced(torch.zeros(3, 8, 10, dtype=torch.uint8)).shape == (3, 256, 320)
    assert reduced(torch.zeros(3, 8, 10, dtype=torch.uint8), grow=False).shape == (3, 8, 10)
    large = torch.zeros(3, 10, 5000, dtype=torch.uint8)
    assert opened(overlay(large, [torch.ones(1, 4, dtype=torch.bool)])).shape == (4, 2048, 3)
    assert opened(colour_picture(torch.rand(2, 2, 3), (10, 5000))).shape == (4, 2048, 3)


def test_colours_are_those_of_the_patches():
    colours = torch.zeros(1, 2, 3)
    colours[0, 1, 0] = 1
    pixels = opened(colour_picture(colours, (3, 4)))
    assert pixels[:, :2].max() == 0
    assert (pixels[:, 2:] == [255, 0, 0]).all()


def test_a_sheet_without_anything_found_and_with_a_hostile_name():
    name = "</section><script>alert(1)</script>"
    shown = Shown(
        name, (9, 9), torch.zeros(3, 9, 9, dtype=torch.uint8), (3, 3), {"maskcut": [], "tokencut": []}
    )
    everything = Shown(
        "b", (9, 9), torch.zeros(3, 9, 9, dtype=torch.uint8), (3, 3),
        {"maskcut": [Segment(torch.eye(3, dtype=torch.bool), 0.25)]},
        torch.rand(2, 3, 3), torch.eye(3, dtype=torch.bool).expand(2, 3, 3),
        Colours(torch.eye(3, dtype=torch.bool), torch.rand(3, 3, 3)),
    )  # fmt: skip
    page = segment_page("t", [shown, everything], model=name, layer=2, share=0.6, by="mass", pictures=2)
    assert "<script>alert" not in page
    assert page.count("<script>") == 1
    assert "nothing to cut" in page
    assert "1 mask, score 0.25" in page
    assert "33% foreground" in page
    assert "60% of its attention" in page
    assert "head 2" in page
    assert "The first" not in page

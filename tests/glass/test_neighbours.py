"""The sheet of nearest pictures: every picture is on it, at its place."""

import io
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from pellucid.glass.neighbours import BOX, CAPTION, GAP, MARGIN, neighbour_page, neighbour_sheet


def flat(level, size=(8, 8), channels=3):
    return torch.full((channels, *size), level, dtype=torch.uint8)


def query(path, image, hits):
    made = [SimpleNamespace(path=p, class_name=c, cosine=s, image=i) for p, c, s, i in hits]
    return SimpleNamespace(path=path, image=image, hits=made)


def two():
    return [
        query("in/a.png", flat(10), [("x/b.png", "cat", 0.91, flat(60)), ("x/c.png", None, 0.5, flat(110))]),
        query("in/q.png", flat(160, (400, 200)), [("x/d.png", "dog", -0.2, flat(210, (30, 90), 1))]),
    ]


def test_every_picture_is_at_its_place():
    sheet = np.asarray(Image.open(io.BytesIO(neighbour_sheet(two()))).convert("RGB")).astype(int)
    down = BOX + CAPTION + GAP
    assert sheet.shape == (2 * MARGIN + 2 * down - GAP, 2 * MARGIN + 3 * (BOX + GAP), 3)
    for row, levels in enumerate([(10, 60, 110), (160, 210)]):
        for column, level in enumerate(levels):
            left = MARGIN + column * (BOX + GAP) + (GAP if column else 0)
            middle = sheet[MARGIN + row * down + BOX // 2, left + BOX // 2]
            assert abs(middle - level).max() <= 2, (row, column, middle)
    caption = sheet[MARGIN + BOX + 2 : MARGIN + BOX + 36]
    assert (caption.min(axis=(0, 2)) < 120).any(), "there is writing below the pictures"


def test_small_pictures_keep_their_pixels():
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    image[0, ::2] = 255
    sheet = np.asarray(Image.open(io.BytesIO(neighbour_sheet([query("q", image, [("p", "c", 1.0, image)])]))))
    strip = sheet[MARGIN : MARGIN + BOX, MARGIN + BOX // 2, 0]
    assert set(np.unique(strip)) == {0, 255}
    assert (np.diff(strip.astype(int)) != 0).sum() == 7


def test_the_page_holds_names_safely():
    page = neighbour_page(
        [query("in/<b>.png", flat(10), [("x/\u8a9e.png", "<script>", 0.9, flat(60))])], "Nearest in <x>"
    )
    assert page.count("data:image/png;base64,") == 2
    assert "<script>" not in page.replace("<script>" + page.rpartition("<script>")[2], "")
    assert "&lt;script&gt;, \u8a9e.png" in page
    assert "&lt;b&gt;.png" in page
    assert "http" not in page.split("</head>")[1].split("<script>")[0]
    assert neighbour_page([query("q", flat(1), [])], "t").count("<img") == 1

"""Run lengths against a decoder written here from the format's description, and against recorded ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pellucid.errors import DataError
from pellucid.measure import coco

RECORDED = json.loads((Path(__file__).parents[1] / "fixtures" / "coco_rle.json").read_text())["cases"]


def independent_decoder(text, size):
    """Character by character, pixel by pixel, with no arrays: another way to the same mask."""
    numbers, position = [], 0
    while position < len(text):
        digits = []
        while True:
            code = ord(text[position]) - 48
            position += 1
            digits.append(code % 32)
            if code < 32:
                break
        number = sum(digit * 32**i for i, digit in enumerate(digits))
        if digits[-1] >= 16:
            number -= 32 ** len(digits)
        if len(numbers) > 2:
            number += numbers[-2]
        numbers.append(number)
    height, width = size
    pixels = [value % 2 for value, count in enumerate(numbers) for _ in range(count)]
    assert len(pixels) == height * width
    return [[bool(pixels[column * height + row]) for column in range(width)] for row in range(height)]


def of_ones(size, ones):
    flat = torch.zeros(size[0] * size[1], dtype=torch.bool)
    flat[ones] = True
    return flat.view(*size)


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case["name"])
def test_the_text_is_pycocotools(case):
    mask = of_ones(case["size"], case["ones"])
    assert coco.encode(mask) == {"size": case["size"], "counts": case["counts"]}
    assert torch.equal(coco.decode(case), mask)
    assert independent_decoder(case["counts"], case["size"]) == mask.tolist()


@given(height=st.integers(1, 40), width=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_round_trip(height, width, share, seed):
    mask = torch.from_numpy(np.random.default_rng(seed).random((height, width)) < share)
    packed = coco.encode(mask)
    assert packed["counts"].isascii()
    assert json.loads(json.dumps(packed)) == packed
    assert torch.equal(coco.decode(packed), mask)
    assert independent_decoder(packed["counts"], packed["size"]) == mask.tolist()


def test_long_runs():
    mask = torch.zeros(700, 900, dtype=torch.bool)
    mask[3, 1] = mask[699, 899] = True
    assert coco.run_lengths(mask) == [703, 1, 629295, 1]
    assert torch.equal(coco.decode(coco.encode(mask)), mask)


def test_run_lengths_begin_with_zeros():
    assert coco.run_lengths(torch.tensor([[True, False], [True, True]])) == [0, 2, 1, 1]


@pytest.mark.parametrize("text", ["o", "0\x7f", "00é", "52", "0N"])
def test_text_that_is_none_is_refused(text):
    with pytest.raises(DataError):
        coco.decode({"size": [2, 2], "counts": text})


def test_an_annotation_by_hand():
    mask = of_ones((5, 7), [9, 10, 17, 24])
    made = coco.annotation(3, 2, 1, mask, 0.5)
    assert made["bbox"] == [2, 1, 2, 3]
    assert made["area"] == 4
    assert (made["id"], made["image_id"], made["category_id"], made["iscrowd"]) == (3, 2, 1, 0)
    assert made["score"] == 0.5
    assert coco.annotation(1, 1, 1, torch.zeros(2, 2, dtype=torch.bool))["bbox"] == [0, 0, 0, 0]

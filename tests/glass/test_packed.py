"""JSON with arrays in it, there and back, and what is refused on the way."""

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pellucid.errors import DataError
from pellucid.glass.packed import DTYPES, pack, unpack

ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda name: arrays.arrays(
        np.dtype(name), arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    )
)
NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
TREES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | ARRAYS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def same(a, b) -> bool:
    if isinstance(a, np.ndarray):
        return (
            isinstance(b, np.ndarray)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and a.tobytes() == b.tobytes()
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@settings(derandomize=True, max_examples=150, deadline=None)
@given(TREES)
def test_there_and_back(tree):
    assert same(tree, unpack(pack(tree)))


def test_a_dict_that_would_read_as_an_array_is_refused():
    with pytest.raises(DataError, match="rename"):
        pack({"a": [{"array": 3}]})


def test_the_layout_is_as_documented():
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    data = pack({"a": [values], "b": "x"})
    magic, version, length = struct.unpack_from("<8sII", data)
    assert (magic, version) == (b"pellucid", 1)
    assert (16 + length) % 8 == 0
    header = json.loads(data[16 : 16 + length])
    assert header["content"] == {"a": [{"array": 0}], "b": "x"}
    entry = header["arrays"][0]
    assert entry == {"dtype": "float32", "shape": [2, 3], "offset": 0}
    assert struct.unpack_from("<6f", data, 16 + length) == (0, 1, 2, 3, 4, 5)


def test_tensors_and_wider_numbers_are_narrowed():
    back = unpack(
        pack(
            {
                "half": torch.ones(2, dtype=torch.bfloat16),
                "double": np.array([1 / 3]),
                "long": torch.tensor([7]),
                "flags": np.array([True, False]),
                "nan": float("nan"),
                "holes": np.array([np.nan], np.float32),
            }
        )
    )
    kinds = {key: str(value.dtype) for key, value in back.items() if key != "nan"}
    expected = {"half": "float32", "double": "float32", "long": "int32", "flags": "uint8", "holes": "float32"}
    assert kinds == expected
    assert back["nan"] is None
    assert np.isnan(back["holes"][0])
    with pytest.raises(DataError, match="32 bits"):
        pack({"large": np.array([2**40])})


def test_file_names_that_are_no_text():
    assert unpack(pack({"name": "caf\udce9"}))["name"] == "caf\udce9"


def test_other_files_and_versions_are_refused():
    with pytest.raises(DataError, match="not a bundle"):
        unpack(b"PK\x03\x04 and so on")
    later = bytearray(pack({"a": 1}))
    later[8] = 9
    with pytest.raises(DataError, match="version 9"):
        unpack(bytes(later))


def test_a_cut_or_changed_file_never_surprises():
    data = pack({"a": np.arange(8, dtype=np.int32), "b": [np.zeros((2, 2), np.uint8)]})
    for end in range(len(data)):
        with pytest.raises(DataError):
            unpack(data[: min(end, len(data) - 5)])
    for at in range(len(data)):
        for value in (0, 255, ord("9"), ord("}")):
            changed = bytearray(data)
            changed[at] = value
            try:
                unpack(bytes(changed))
            except DataError:
                continue


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "object", "shape": [1], "offset": 0},
        {"dtype": "float32", "shape": [-1], "offset": 0},
        {"dtype": "float32", "shape": [2**40], "offset": 0},
        {"dtype": "float32", "shape": [1], "offset": -8},
        {"dtype": "float32", "shape": [True], "offset": 0},
        {"dtype": "float32", "shape": ["1"], "offset": 0},
    ],
)
def test_arrays_that_lie_are_refused(entry):
    header = json.dumps({"arrays": [entry], "content": {"array": 0}}).encode()
    header += b" " * (-len(header) % 8)
    with pytest.raises(DataError, match="damaged"):
        unpack(struct.pack("<8sII", b"pellucid", 1, len(header)) + header + bytes(8))

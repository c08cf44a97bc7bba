"""Randomness as a function: which seed, which epoch, which item, never "which call came before".

Everything is Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the
counter-based generator behind ``numpy.random.Philox``. It is written out here over whole arrays, because
constructing NumPy's generator once per item costs several times what the numbers cost; a test holds the
two equal, word for word. NumPy's ``Generator`` methods are not used: their streams may change between
versions, the raw words may not.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

# The second key word separates uses, so that an order and a draw of the same seed are independent.
_DRAWS = 1
_ORDER = 2

_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10
_WORD = 2**64
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def draws(seed: int, epoch: int | npt.ArrayLike, index: npt.ArrayLike, count: int) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), shape (len(index), count): row r belongs to item ``index[r]`` alone.

    ``epoch`` is one number or one per item. A pure function of (seed, epoch, index, column): neither the
    other items nor ``count`` change a number.
    """
    item = np.asarray(index, dtype=np.uint64).reshape(-1, 1)
    epochs = np.broadcast_to(np.asarray(epoch, dtype=np.uint64).reshape(-1, 1), item.shape)
    block = np.arange(1, -(-count // 4) + 1, dtype=np.uint64)
    shape = (len(item), len(block))
    counter = [np.broadcast_to(word, shape) for word in (block, item, epochs, np.uint64(0))]
    words = _philox(counter, key=(seed % _WORD, _DRAWS))
    uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform.reshape(len(item), 4 * len(block))[:, :count]


def order(seed: int, epoch: int, n: int) -> npt.NDArray[np.int64]:
    """A permutation of 0..n-1: in which order epoch ``epoch`` visits n items. A pure function."""
    key = np.array([seed % _WORD, _ORDER], dtype=np.uint64)
    counter = np.array([0, 0, epoch, 0], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64)


def _philox(counter: list[Words], key: tuple[int, int]) -> Words:
    """The four words of each 256-bit counter; arrays of shape s in, one of shape (*s, 4) out."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    with np.errstate(over="ignore"):
        for _ in range(_ROUNDS):
            high0, low0 = _multiply(np.uint64(_MULTIPLIERS[0]), c0)
            high1, low1 = _multiply(np.uint64(_MULTIPLIERS[1]), c2)
            c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), low1, high0 ^ c3 ^ np.uint64(k1), low0
            k0, k1 = (k0 + _WEYL[0]) % _WORD, (k1 + _WEYL[1]) % _WORD
    return np.stack([c0, c1, c2, c3], axis=-1)


def _multiply(a: np.uint64, b: Words) -> tuple[Words, Words]:
    """High and low word of the 128-bit product, by schoolbook multiplication of 32-bit halves."""
    a_low, a_high = a & _LOW, a >> _HALF
    b_low, b_high = b & _LOW, b >> _HALF
    low, cross = a_low * b_low, a_high * b_low
    middle = (low >> _HALF) + (cross & _LOW) + a_low * b_high  # < 2^64: cannot overflow
    return a_high * b_high + (cross >> _HALF) + (middle >> _HALF), a * b

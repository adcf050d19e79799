"""How often each of many things is drawn, without a list of the draws."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from ..arrays import Array

_WORDS, _AHEAD = 624, 397  # of the generator's state


def count_draws(rng: np.random.RandomState, size: int, samples: int) -> Array:
    """Return how often each of 0..size-1 is among `samples` draws with replacement, those of `rng.randint(0, size, samples)`.

    The generator is left as after that call. NumPy promises RandomState's draws to be the same for good.

    Parameters
    ----------
    size : at least 1, at most 2^32 - 1

    Returns
    -------
    (size,) int64

    References
    ----------
    Matsumoto & Nishimura 1998, Mersenne Twister, doi:10.1145/272991.272995; numbers above the range are drawn again, masked to its bits.
    """
    times = np.zeros(size, np.int64)
    if size == 1:
        times[0] = samples  # which takes nothing from the generator
        return times
    state: dict[str, Any] = rng.get_state(legacy=False)
    twister = state["state"]
    twister["pos"] = _count(twister["key"], twister["pos"], np.uint32(size - 1), samples, times)
    rng.set_state(state)
    return times


@njit(cache=True, nogil=True)
def _count(words, place, largest, samples, times):  # type: ignore[no-untyped-def]
    """Draw; give the place in the state after the last draw."""
    mask = np.uint32(largest)
    for shift in (1, 2, 4, 8, 16):
        mask |= mask >> np.uint32(shift)
    drawn = np.empty(_WORDS, np.uint32)
    left = samples
    while left:
        if place == _WORDS:
            _renew(words)
            place = 0
        kept = 0
        if left >= _WORDS:
            # without a branch, which would be guessed wrong at every other word
            for i in range(place, _WORDS):
                word = _tempered(words[i]) & mask
                drawn[kept] = word
                kept += word <= largest
            place = _WORDS
        while left < _WORDS and place < _WORDS and kept < left:
            word = _tempered(words[place]) & mask
            place += 1
            if word <= largest:
                drawn[kept] = word
                kept += 1
        for i in range(kept):
            times[drawn[i]] += 1
        left -= kept
    return place


@njit(cache=True, nogil=True)
def _tempered(word):  # type: ignore[no-untyped-def]
    """What a word of the state gives."""
    word ^= word >> np.uint32(11)
    word ^= (word << np.uint32(7)) & np.uint32(0x9D2C5680)
    word ^= (word << np.uint32(15)) & np.uint32(0xEFC60000)
    return word ^ (word >> np.uint32(18))


@njit(cache=True, nogil=True)
def _renew(words):  # type: ignore[no-untyped-def]
    """The next 624 words of the state."""
    for i in range(_WORDS - _AHEAD):
        words[i] = words[i + _AHEAD] ^ _mixed(words[i], words[i + 1])
    for i in range(_WORDS - _AHEAD, _WORDS - 1):
        words[i] = words[i + _AHEAD - _WORDS] ^ _mixed(words[i], words[i + 1])
    words[_WORDS - 1] = words[_AHEAD - 1] ^ _mixed(words[_WORDS - 1], words[0])


@njit(cache=True, nogil=True)
def _mixed(word, following):  # type: ignore[no-untyped-def]
    both = (word & np.uint32(0x80000000)) | (following & np.uint32(0x7FFFFFFF))
    return (both >> np.uint32(1)) ^ ((np.uint32(0) - (both & np.uint32(1))) & np.uint32(0x9908B0DF))

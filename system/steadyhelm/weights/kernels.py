"""The inner loops of the delta codec, compiled by numba: which elements changed, and by how much, as a few bits each.

Words are the elements' bit patterns (uint16 or uint32). On the *ordered line* patterns stand in the order of the
numbers that they mean, negative ones mirrored, so that neighbours differ by one unit in the last place; the mapping is
one to one on all patterns, NaNs included, and differences wrap around.

An element's *class* is its old exponent. Each class has a weight, −log2(1 − p) of its probability p to change, in
units of 2^-16. Walking over the elements and adding up weights turns time into *hazard*: the hazard between two changes
is exponentially distributed whatever the classes on the way, with half-lives of 2^16 units. So one code does for the
position of every change: an interval of the cumulative distribution, which ``_below`` makes piecewise linear, one piece
per half-life. That costs 0.03 bits a change more than the entropy of the mask under its classes.

Both streams are range asymmetric numeral systems (Duda, arXiv 1311.2540): states of 63 bits in words of 32, encoded
backwards and decoded forwards. All functions that call each other are in this one file, since numba's cache looks at no
other file to see whether it is out of date. States and hazards are uint64; mixed with int64 they would become floats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np

F = TypeVar("F", bound=Callable[..., Any])

HALF_LIFE_BITS = 16
"""Hazard units of a half-life, as a power of two."""
HALF_LIVES = 12
"""A change that lies further away than this is coded by an escape and the rest."""
MAX_WEIGHT = 8 << HALF_LIFE_BITS
"""The weight of a class whose elements all change."""
TOKENS = 128
"""Kinds of signed difference: sign, and magnitude exactly up to 3, then its highest two bits; the last one is an escape
to any token by its number."""
TOKEN_BITS = 11
"""Precision of the tokens' probabilities."""
TILE = 4096
"""Elements whose hazard is added up at a time: 16 KiB of sums, and no sum above 2^31."""
REACH = 146
"""Sums beyond a tile's elements: one in front of them, and those behind that the search for a change may look at."""
PADDING = 8
"""Words that a stream needs behind its end; a decoder may look at them."""

Scalar = Any
"""A number in compiled code: int64 or uint64, as its use shows."""
U: Any = np.uint64
S: Any = np.int64
W: Any = np.uint32
_ONE = U(1)
_RUN = 256
_GROUP = U(16)
_ESCAPE = TOKENS - 1
_LOW = U(1 << 31)
_SLOT = U((1 << 31) - 1)
_LIMIT = U(HALF_LIVES << HALF_LIFE_BITS)
_FAR_FREQUENCY = U(1 << (31 - HALF_LIVES))
_FAR = _LOW - _FAR_FREQUENCY
_BIT_LENGTHS = np.array([number.bit_length() for number in range(1 << HALF_LIVES)], np.uint64)


def kernel(function: F) -> F:
    """``function`` compiled at its first call, without the interpreter lock; kept on disk where there is a place."""
    try:
        return cast(F, numba.njit(cache=True, nogil=True, error_model="numpy")(function))
    except RuntimeError:  # neither beside this file nor in the user's folder may anything be written
        return cast(F, numba.njit(nogil=True, error_model="numpy")(function))


def part(function: F) -> F:
    """``function`` as a part of every kernel that calls it."""
    return cast(F, numba.njit(nogil=True, error_model="numpy", forceinline=True)(function))


@part
def _ordered(word: Scalar, half: Scalar) -> Scalar:
    """The place of a bit pattern, an int64, on the ordered line; ``half`` is its sign bit's value.

    Signs are as good as random. So here and below there are no branches on them for the processor to guess wrong.
    """
    return word ^ (half | ((half - 1) & -S((word & half) != 0)))


@part
def _pattern(place: Scalar, half: Scalar) -> Scalar:
    """The bit pattern of a place on the ordered line."""
    return place ^ (half | ((half - 1) & -S((place & half) == 0)))


@part
def _step(old: Scalar, new: Scalar, half: Scalar) -> Scalar:
    """The signed difference on the ordered line, in [−half, half)."""
    distance = (_ordered(new, half) - _ordered(old, half)) & (2 * half - 1)
    return distance - 2 * half if distance & half else distance


@part
def _token(step: Scalar) -> tuple[Scalar, Scalar]:
    """The token of a signed difference and how many low bits of its magnitude follow."""
    sign = S(step < 0)
    size = abs(step)
    if size < 4:
        return 2 * (size - 1) + sign, 0
    bits = 1
    while size >> (bits + 2):
        bits += 1
    return 2 * (2 * bits + 1 + ((size >> bits) & 1)) + sign, bits


@part
def _magnitude(token: Scalar) -> tuple[Scalar, Scalar]:
    """The smallest magnitude of a token above 5 and how many low bits follow."""
    kind = (token >> 1) - 3
    bits = (kind >> 1) + 1
    return (2 + (kind & 1)) << bits, bits


@part
def _below(hazard: Scalar) -> Scalar:
    """2^31 times the probability of a change within ``hazard``; constant from 12 half-lives on."""
    hazard = min(hazard, _LIMIT)
    pieces = hazard >> U(HALF_LIFE_BITS)
    rest = hazard & U((1 << HALF_LIFE_BITS) - 1)
    return _LOW - (_LOW >> pieces) + ((rest << U(30 - HALF_LIFE_BITS)) >> pieces)


@kernel
def census(old: Any, new: Any, shift: Scalar, half: Scalar, stride: Scalar, counts: Any) -> None:
    """Adds to ``counts`` [256, 129], per class, how often each token is, and in the last column unchanged elements.

    Of ``stride`` runs of 256 elements one is looked at. ``old`` and ``new`` are words [n] of one type; for ``shift``
    and ``half`` see ``coder``.
    """
    for start in range(0, old.shape[0], _RUN * stride):
        for index in range(start, min(start + _RUN, old.shape[0])):
            before = S(old[index])
            after = S(new[index])
            kind = (before >> shift) & 255
            if before == after:
                counts[kind, TOKENS] += 1
            else:
                token, _ = _token(_step(before, after, half))
                counts[kind, token] += 1


@part
def _push(
    state: Scalar, start: Scalar, frequency: Scalar, bits: Scalar, words: Any, end: Scalar
) -> tuple[Scalar, Scalar]:
    """Encodes an interval of [0, 2^bits): the new state, and where ``words``, filled from behind, now begin."""
    full = U((state >> U(32)) >= frequency << (U(31) - bits))
    words[end - _ONE] = W(state)
    end -= full
    state >>= full << U(5)
    whole = state // frequency
    return (whole << bits) + (state - whole * frequency) + start, end


@kernel
def encode(
    changes: Scalar,
    places: Any,
    kinds: Any,
    steps: Any,
    weights: Any,
    contexts: Any,
    frequencies: Any,
    starts: Any,
    words: Any,
) -> Scalar:
    """Codes a block's changes, as ``compare`` lists them, into ``words`` uint32, from behind.

    ``contexts`` [256] uint8 is the row of ``frequencies`` and ``starts`` [rows, 128] uint16 that a class uses.
    Positions and differences have a state each, so that the processor works on both at a time, and share the words.

    Returns:
        Where the words begin.
    """
    end = U(words.shape[0])
    place = _LOW
    size = _LOW
    change = U(changes)
    while change:
        change -= _ONE
        kind = kinds[change]
        row = contexts[kind]
        step = S(steps[change])
        token, bits = _token(step)
        if bits:
            free = U(31 - bits)
            size, end = _push(size, U(abs(step) & ((1 << bits) - 1)) << free, _ONE << free, U(31), words, end)
        if not frequencies[row, U(token)]:
            size, end = _push(size, U(token), _ONE, U(7), words, end)
            token = _ESCAPE
        start = U(starts[row, U(token)])
        size, end = _push(size, start, U(frequencies[row, U(token)]), U(TOKEN_BITS), words, end)
        near = U(places[change])
        if change:
            near -= U(places[change - _ONE]) + U(weights[kinds[change - _ONE]])
        escapes = U(0)
        while near >= _LIMIT:
            near -= _LIMIT
            escapes += _ONE
        start = _below(near)
        place, end = _push(place, start, _below(near + U(weights[kind])) - start, U(31), words, end)
        while escapes:
            place, end = _push(place, _FAR, _FAR_FREQUENCY, U(31), words, end)
            escapes -= _ONE
    for state in (size, place):
        words[end - _ONE] = W(state)
        words[end - U(2)] = W(state >> U(32))
        end -= U(2)
    return end


@part
def _refilled(state: Scalar, position: Scalar, words: Any) -> tuple[Scalar, Scalar]:
    """The state with another word where it is low, and the position behind."""
    low = U(state < _LOW)
    return (state << (low << U(5))) | (U(words[position]) * low), position + low


@part
def _aim(
    place: Scalar, position: Scalar, origin: Scalar, words: Any, limit: Scalar
) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """State, position and origin behind the escapes, and the goal.

    The next change is the first element whose hazard, it included, is above the goal.
    """
    slot = place & _SLOT
    while slot >= _FAR and position <= limit:
        place, position = _refilled((place >> U(31)) * _FAR_FREQUENCY + slot - _FAR, position, words)
        origin += _LIMIT
        slot = place & _SLOT
    pieces = U(HALF_LIVES) - _BIT_LENGTHS[(_SLOT - slot) >> U(31 - HALF_LIVES)]
    rest = (slot - (_LOW - (_LOW >> pieces))) >> (U(30 - HALF_LIFE_BITS) - pieces)
    return place, position, origin, origin + (pieces << U(HALF_LIFE_BITS)) + rest


@kernel
def start(words: Any, changes: Scalar, state: Any) -> None:
    """Readies ``state`` uint64 [6] for ``Coder.decode`` of a block.

    It has the states of positions and of differences, the place in ``words``, the changes left, and goal and origin in
    hazard from the segment's beginning.
    """
    first = U(words[0]) << U(32) | U(words[1])
    place, position, origin, goal = _aim(first, U(4), U(0), words, U(words.shape[0] - PADDING))
    state[0] = place
    state[1] = U(words[2]) << U(32) | U(words[3])
    state[2] = position
    state[3] = changes
    state[4] = goal
    state[5] = origin


@part
def _add_up(words: Any, weights: Any, shift: Scalar, sums: Any) -> Scalar:
    """Fills ``sums`` with the hazard in front of each of a tile's elements and behind the last, which is returned."""
    size = U(words.shape[0])
    total = U(0)
    sums[U(0)] = W(0)
    for index in range(size):
        total += U(weights[(words[index] >> shift) & 255])
        sums[index + _ONE] = W(total)
    for index in range(size + _ONE, size + U(REACH)):
        sums[index] = W(0xFFFFFFFF)
    return total


@part
def _passed(sums: Any, at: Scalar, stride: Scalar, goal: Scalar) -> Scalar:
    """How many of eight sums the goal is not below; added up in a tree, so that all are compared at a time."""
    low = U(sums[at] <= goal) + U(sums[at + stride] <= goal)
    low += U(sums[at + U(2) * stride] <= goal) + U(sums[at + U(3) * stride] <= goal)
    high = U(sums[at + U(4) * stride] <= goal) + U(sums[at + U(5) * stride] <= goal)
    high += U(sums[at + U(6) * stride] <= goal) + U(sums[at + U(7) * stride] <= goal)
    return low + high


@part
def _find(sums: Any, here: Scalar, goal: Scalar) -> tuple[Scalar, Scalar]:
    """The index of the first element whose hazard is above the goal, and a multiple of 16 that is not behind it.

    ``here`` is such a multiple to start from.
    """
    passed = _passed(sums, here + _GROUP, _GROUP, goal)
    here += passed * _GROUP
    while passed == U(8):
        passed = _passed(sums, here + _GROUP, _GROUP, goal)
        here += passed * _GROUP
    return here + _passed(sums, here + _ONE, _ONE, goal) + _passed(sums, here + U(9), _ONE, goal), here


@part
def _next_step(size: Scalar, position: Scalar, row: Scalar, table: Any, words: Any) -> tuple[Scalar, Scalar, Scalar]:
    """The signed difference that comes next, the state behind it and the place in ``words``."""
    entry = table[U(row) | (size & U((1 << TOKEN_BITS) - 1))]
    token = S(entry & W(TOKENS - 1))
    frequency = U((entry >> W(7)) & W((1 << TOKEN_BITS) - 1)) + _ONE
    size = frequency * (size >> U(TOKEN_BITS)) + U(entry >> W(7 + TOKEN_BITS))
    size, position = _refilled(size, position, words)
    magnitude = (token >> 1) + 1
    if token > 5:
        if token == _ESCAPE:
            token = S(size & U(TOKENS - 1))
            size, position = _refilled(size >> U(7), position, words)
        if token > 5:
            magnitude, bits = _magnitude(token)
            free = U(31 - bits)
            magnitude += S((size & _SLOT) >> free)
            size = ((size >> U(31)) << free) + (size & ((_ONE << free) - _ONE))
            size, position = _refilled(size, position, words)
        else:
            magnitude = (token >> 1) + 1
    sign = token & 1
    return (magnitude ^ -sign) + sign, size, position


class Coder(NamedTuple):
    """The kernels of one type of words: uint16 or uint32.

    ``compare(old, new, weights, state, places, kinds, steps)`` lists the changes of a segment, and makes ``old`` equal
    to ``new``:

    - old, new: words [n] before and after;
    - weights: [256] uint32;
    - state: uint64 [2], number of changes and hazard of the segments so far; updated;
    - places: int64, the hazard in front of each change; kinds: uint8, its class; steps: int32, its signed difference.

    ``decode(old, weights, rows, table, words, state, sums)`` makes a segment's ``old`` words the new ones:

    - rows: [256] uint32, where the 2^11 entries of ``table`` begin that a class uses;
    - table: uint32, for each row and slot the token (7 bits), its frequency less one (11 bits) and the slot's distance
      from its start (11 bits);
    - words: uint32, the stream with ``PADDING`` behind it;
    - state: see ``start``; sums: scratch, uint32 [TILE + REACH].
    """

    shift: int
    half: int
    compare: Callable[..., None]
    decode: Callable[..., None]


def coder(shift: int, half: int) -> Coder:
    """The kernels for words whose class is the 8 bits above ``shift`` and whose sign bit has the value ``half``.

    Both are constants in what is compiled, which makes it a quarter faster.
    """
    kind = np.uint16 if half == 1 << 15 else np.uint32
    low, byte = kind(shift), kind(255)

    @kernel
    def compare(old: Any, new: Any, weights: Any, state: Any, places: Any, kinds: Any, steps: Any) -> None:
        changes = state[0]
        hazard = state[1]
        for index in range(old.shape[0]):
            word = old[index]
            after = new[index]
            of = (word >> low) & byte
            if word != after:
                places[changes] = hazard
                kinds[changes] = of
                steps[changes] = _step(S(word), S(after), half)
                changes += _ONE
                old[index] = after
            hazard += U(weights[of])
        state[0] = changes
        state[1] = hazard

    @kernel
    def decode(old: Any, weights: Any, rows: Any, table: Any, words: Any, state: Any, sums: Any) -> None:
        place = state[0]
        size = state[1]
        position = state[2]
        left = state[3]
        goal = state[4]
        origin = state[5]
        limit = U(words.shape[0] - PADDING)
        for begin in range(0, old.shape[0], TILE):
            tile = old[begin : begin + TILE]
            total = _add_up(tile, weights, low, sums)
            here = U(0)
            while left and goal < total and position <= limit:
                index, here = _find(sums, here, W(goal))
                behind = U(sums[index + _ONE])
                start = _below(U(sums[index]) - origin)
                place = (place >> U(31)) * (_below(behind - origin) - start) + (place & _SLOT) - start
                place, position = _refilled(place, position, words)
                origin = behind
                row = rows[(tile[index] >> low) & 255]
                step, size, position = _next_step(size, position, row, table, words)
                word = S(tile[index])
                tile[index] = _pattern((_ordered(word, half) + step) & (2 * half - 1), half)
                left -= _ONE
                if left:
                    place, position, origin, goal = _aim(place, position, origin, words, limit)
            goal -= total  # these two may wrap around below 0: only their distances count
            origin -= total
        state[0] = place
        state[1] = size
        state[2] = position
        state[3] = left
        state[4] = goal
        state[5] = origin

    return Coder(shift=shift, half=half, compare=compare, decode=decode)


HALVES = coder(7, 1 << 15)
"""For bfloat16, whose exponent those 8 bits are, and float16, where they are the exponent and three bits more."""
WHOLES = coder(23, 1 << 31)
"""For float32."""

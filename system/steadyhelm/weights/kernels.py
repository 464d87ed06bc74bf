"""The inner loops of the delta codec, compiled by numba: which elements changed, and by how much, as a few bits each.

Words are the elements' bit patterns (uint16 or uint32). On the *ordered line* patterns stand in the order of the
numbers that they mean, negative ones mirrored, so that neighbours differ by one unit in the last place; the mapping is
one to one on all patterns, NaNs included, and differences wrap around.

An element's *class* is its old exponent; 64 neighbouring ones are told apart, and what is below or above them counts to
the first or last. Each class has a weight, −log2(1 − p) of its probability p to change, in units of 2^-16. Walking over
the elements and adding up weights turns time into *hazard*: the hazard between two changes is exponentially distributed
whatever the classes on the way, with half-lives of 2^16 units. So one code does for the position of every change: an
interval of the cumulative distribution, which ``_below`` makes piecewise linear, one piece per half-life. That costs
0.03 bits a change more than the entropy of the mask under its classes.

The walk goes through *groups* of 64 elements, and in each down one column after the other of a matrix with 4 rows, so
that one instruction adds up 16 columns. A quarter of each tile's groups is on one of four *tracks*. Tracks have hazards
and words of their own: while one waits for what its last change was, the processor works on the others'.

Positions and differences are range asymmetric numeral systems (Duda, arXiv 1311.2540): states of 63 bits in words of
32, encoded backwards and decoded forwards. All functions that call each other are in this one file, since numba's cache
looks at no other file to see whether it is out of date. States and hazards are uint64; mixed with int64 they would
become floats.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as tools
from numba.core.registry import cpu_target
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])

HALF_LIFE_BITS = 16
"""Hazard units of a half-life, as a power of two."""
HALF_LIVES = 12
"""A change that lies further away than this is coded by an escape and the rest."""
MAX_WEIGHT = 8 << HALF_LIFE_BITS
"""The weight of a class whose elements all change."""
CLASSES = 64
"""Exponents that are told apart."""
TOKENS = 128
"""Kinds of signed difference: sign, and magnitude exactly up to 3, then its highest two bits; the last one is an escape
to any token by its number."""
TOKEN_BITS = 11
"""Precision of the tokens' probabilities."""
LANES = 16
"""Columns of a group."""
GROUP = 4 * LANES
"""Elements of a group."""
TILE = 4096
"""Elements whose hazard is added up at a time: 16 KiB of sums, and no sum above 2^31."""
TRACKS = 4
"""Streams of a block, which a decoder works on at a time."""
PADDING = 8
"""Words that a stream needs behind its end; a decoder may look at them."""

Scalar = Any
"""A number in compiled code: int64 or uint64, as its use shows."""
U: Any = np.uint64
S: Any = np.int64
W: Any = np.uint32
_OPTIONS: Any = {"nogil": True, "error_model": "numpy", "_nrt": False}  # no kernel makes arrays: none is counted
_ONE = U(1)
_RUN = 256
_SPREAD = 0x9E3779B1
_AHEAD = 2 * TILE
_ESCAPE = TOKENS - 1
_LOW = U(1 << 31)
_SLOT = U((1 << 31) - 1)
_LIMIT = U(HALF_LIVES << HALF_LIFE_BITS)
_FAR_FREQUENCY = U(1 << (31 - HALF_LIVES))
_FAR = _LOW - _FAR_FREQUENCY
_BIT_LENGTHS = np.array([number.bit_length() for number in range(1 << HALF_LIVES)], np.uint64)
_WALK = np.array([*(row * LANES + lane for lane in range(LANES) for row in range(GROUP // LANES)), GROUP], np.uint8)
_tools: Any = tools  # which has no types
_BUILT = Path(__file__).with_name("__pycache__")
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_SUMS = ir.VectorType(_I32, LANES)


class Coder(NamedTuple):
    """What kernels know of a type: its exponent is the 8 bits above ``shift``, its sign bit's value ``half``."""

    shift: int
    half: int


def kernel(function: F) -> F:
    """``function`` compiled at its first call, without the interpreter lock; kept on disk where there is a place.

    That is the folder ``NUMBA_CACHE_DIR``, or beside this file where one may write there, or in the user's folder.
    Another one than beside this file is given what ``compiled`` has left there; numba takes of it what was made for
    this processor.
    """
    try:
        made = numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # neither beside this file nor in the user's folder may anything be written
        return cast(F, numba.njit(**_OPTIONS)(function))
    kept, name = Path(made.stats.cache_path), f"{Path(__file__).stem}.{function.__name__}-*"
    if kept != _BUILT and not any(kept.glob(f"{name}.nbi")):
        with suppress(OSError):  # it is compiled anew
            for file in sorted(_BUILT.glob(f"{name}.nb?")):  # code before its index
                with tempfile.NamedTemporaryFile(dir=kept, delete=False) as copy:
                    copy.write(file.read_bytes())
                Path(copy.name).replace(kept / file.name)
    return cast(F, made)


def part(function: F) -> F:
    """``function`` as a part of every kernel that calls it."""
    return cast(F, numba.njit(forceinline=True, **_OPTIONS)(function))


def instruction(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which answers with a signature and writes LLVM's code, as a part of the kernels that call it."""
    made: Callable[..., Any] = intrinsic(function)
    return made


class _Vectors:
    """Writes LLVM's code for many elements at a time: the processor's own vectors, whichever it has, do the work."""

    def __init__(self, context: Any, builder: Any) -> None:
        self._context = context
        self.builder = builder

    def address(self, kind: Any, array: Any, index: Any) -> Any:
        """Of an element of a numba array of the type ``kind``."""
        data = self._context.make_array(kind)(self._context, self.builder, array).data
        return self.builder.gep(data, [index])

    def load(self, kind: Any, array: Any, index: Any, lanes: int) -> Any:
        """So many elements from ``index`` on."""
        bits = kind.dtype.bitwidth
        where = self.address(kind, array, index)
        target = ir.VectorType(ir.IntType(bits), lanes).as_pointer()
        return self.builder.load(self.builder.bitcast(where, target), align=bits // 8)

    def store(self, kind: Any, array: Any, index: Any, vector: Any) -> None:
        """The reverse."""
        where = self.builder.bitcast(self.address(kind, array, index), vector.type.as_pointer())
        self.builder.store(vector, where, align=kind.dtype.bitwidth // 8)

    def fetch_ahead(self, kind: Any, array: Any, index: Any) -> None:
        """Has memory bring the group ``_AHEAD`` elements further on; nothing happens where there is none."""
        byte = ir.IntType(8).as_pointer()
        fetch = self._foreign("llvm.prefetch.p0", ir.VoidType(), [byte, _I32, _I32, _I32])
        for offset in range(0, GROUP, 64 * 8 // kind.dtype.bitwidth):
            where = self.address(kind, array, self.builder.add(index, _I64(_AHEAD + offset)))
            self.builder.call(fetch, [self.builder.bitcast(where, byte), _I32(0), _I32(3), _I32(1)])

    def splat(self, value: Any, lanes: int) -> Any:
        """``value`` in all lanes."""
        one = self.builder.insert_element(ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, _I32(0))
        return self.builder.shuffle_vector(one, one, constants([0] * lanes))

    def call(self, name: str, *vectors: Any) -> Any:
        """An instruction of LLVM's over vectors of one type."""
        function = self._foreign(name, vectors[0].type, [vector.type for vector in vectors])
        return self.builder.call(function, vectors)

    def add_lanes(self, vector: Any) -> Any:
        """Each lane plus all lanes before it."""
        nothing = constants([0] * LANES)
        for distance in (1, 2, 4, 8):
            places = [LANES + lane - distance if lane >= distance else 0 for lane in range(LANES)]
            vector = self.builder.add(vector, self.builder.shuffle_vector(nothing, vector, constants(places)))
        return vector

    def look_up(self, kind: Any, table: Any, places: Any) -> Any:
        """The elements of ``table`` uint32 [64] at ``places``; two instructions where the processor has them."""
        if "+avx512f" in cpu_target.target_context.codegen().magic_tuple()[2]:
            parts = [self.load(kind, table, _I64(LANES * number), LANES) for number in range(4)]
            permute = "llvm.x86.avx512.vpermi2var.d.512"
            low, high = (self.call(permute, parts[half], places, parts[half + 1]) for half in (0, 2))
            return self.builder.select(self.builder.icmp_unsigned("<", places, constants([32] * LANES)), low, high)
        found = ir.Constant(_SUMS, ir.Undefined)
        for lane in range(LANES):
            place = self.builder.zext(self.builder.extract_element(places, _I32(lane)), _I64)
            value = self.builder.load(self.address(kind, table, place))
            found = self.builder.insert_element(found, value, _I32(lane))
        return found

    def _foreign(self, name: str, result: Any, arguments: list[Any]) -> Any:
        return _tools.get_or_insert_function(self.builder.module, ir.FunctionType(result, arguments), name)


def constants(values: Iterable[int], bits: int = 32) -> Any:
    """A vector of LLVM's."""
    listed = list(values)
    return ir.Constant(ir.VectorType(ir.IntType(bits), len(listed)), listed)


@instruction
def _add_up(
    typing: Any, words: Any, begin: Any, groups: Any, shift: Any, first: Any, weights: Any, fronts: Any, ends: Any
) -> Any:
    """Fills ``fronts`` and ``ends`` for whole groups, see ``_walk``; returns all their hazard."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        of_words, *_, of_weights, of_fronts, of_ends = signature.args
        array, start, count, low, least, table, sums, behind = arguments
        vectors, bits = _Vectors(context, builder), of_words.dtype.bitwidth
        low, least = (vectors.splat(builder.trunc(value, ir.IntType(bits)), GROUP) for value in (low, least))
        total = _tools.alloca_once_value(builder, constants([0] * LANES))
        with _tools.for_range(builder, count) as loop:
            at = builder.mul(loop.index, _I64(GROUP))
            vectors.fetch_ahead(of_words, array, builder.add(start, at))
            group = vectors.load(of_words, array, builder.add(start, at), GROUP)
            kinds = builder.and_(builder.lshr(group, low), constants([255] * GROUP, bits))
            kinds = vectors.call(f"llvm.usub.sat.v{GROUP}i{bits}", kinds, least)
            kinds = vectors.call(f"llvm.umin.v{GROUP}i{bits}", kinds, constants([CLASSES - 1] * GROUP, bits))
            rows = [constants([0] * LANES)]
            for begins in range(0, GROUP, LANES):
                row = builder.shuffle_vector(kinds, kinds, constants(range(begins, begins + LANES)))
                row = builder.zext(row, _SUMS) if bits < 32 else row
                rows.append(builder.add(rows[-1], vectors.look_up(of_weights, table, row)))
            columns = vectors.add_lanes(rows.pop())
            former = builder.load(total)
            front = builder.add(former, builder.shuffle_vector(rows[0], columns, constants([0, *range(16, 31)])))
            for number, row in enumerate(rows):
                where = builder.add(at, _I64(number * LANES))
                vectors.store(of_fronts, sums, where, builder.add(front, row))
            end = builder.add(former, builder.shuffle_vector(columns, columns, constants([LANES - 1] * LANES)))
            builder.store(end, total)
            builder.store(builder.extract_element(end, _I32(0)), vectors.address(of_ends, behind, loop.index))
        return builder.zext(builder.extract_element(builder.load(total), _I32(0)), _I64)

    size = types.int64
    return types.uint64(words, size, size, size, size, weights, fronts, ends), emit


@instruction
def _changed(typing: Any, old: Any, new: Any, at: Any) -> Any:
    """The bits of a group's elements that differ, in the walk's order."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vectors = _Vectors(context, builder)
        before, after, begin = arguments
        vectors.fetch_ahead(signature.args[1], after, begin)
        pair = [
            vectors.load(kind, array, begin, GROUP)
            for kind, array in zip(signature.args, (before, after), strict=False)
        ]
        bits = builder.icmp_unsigned("!=", *pair)
        order = constants(_WALK[:GROUP].tolist())
        return builder.bitcast(builder.shuffle_vector(bits, bits, order), _I64)

    return types.uint64(old, new, types.int64), emit


def _counter(lanes: int) -> Callable[..., Any]:
    """An instruction that says how many of so many sums, from ``at`` on, are not above ``goal``."""

    def passed(typing: Any, sums: Any, at: Any, goal: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            vectors = _Vectors(context, builder)
            found = vectors.load(signature.args[0], arguments[0], arguments[1], lanes)
            bits = builder.icmp_unsigned("<=", found, vectors.splat(arguments[2], lanes))
            count = builder.ctpop(builder.bitcast(bits, ir.IntType(lanes)))
            return count if lanes == 64 else builder.zext(count, _I64)

        return types.uint64(sums, types.uint64, types.uint32), emit

    return instruction(passed)


_passed_ends = _counter(LANES)
_passed_fronts = _counter(GROUP)


@instruction
def _num_ones(typing: Any, bits: Any) -> Any:
    """How many bits of a uint64 are set."""
    return types.uint64(types.uint64), lambda context, builder, signature, arguments: builder.ctpop(arguments[0])


@instruction
def _lowest_one(typing: Any, bits: Any) -> Any:
    """The place of a uint64's lowest bit that is set; 64 where there is none."""
    no = ir.IntType(1)(0)
    return types.uint64(types.uint64), lambda context, builder, signature, arguments: builder.cttz(arguments[0], no)


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
def census(old: Any, new: Any, coder: Any, stride: Scalar, counts: Any) -> None:
    """Adds to ``counts`` [256, 129], per exponent, how often each token is, and in the last column unchanged elements.

    Of ``stride`` runs of 256 elements one is looked at, another one each time: always the same would be the same
    columns of a matrix. ``old`` and ``new`` are words [n] of one type, ``coder`` is its ``Coder``.
    """
    shift, half = coder
    for number in range((old.shape[0] + _RUN * stride - 1) // (_RUN * stride)):
        chosen = (((number * _SPREAD) & 0xFFFFFFFF) * stride) >> 32
        start = (number * stride + chosen) * _RUN
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
def _kind(word: Scalar, shift: Scalar, first: Scalar) -> Scalar:
    """The class of a bit pattern, an int64."""
    return min(max(((word >> shift) & 255) - first, 0), CLASSES - 1)


@part
def _element(place: Scalar) -> Scalar:
    """The element of a group at a place of the walk; 64, the next group's first, at 64."""
    return U(_WALK[place])


@part
def _walk(
    words: Any, begin: Scalar, size: Scalar, shift: Scalar, first: Scalar, weights: Any, fronts: Any, ends: Any
) -> Scalar:
    """Adds up the hazard of a tile, the ``size`` elements from ``begin`` on, and returns all of it.

    ``fronts`` gets the hazard in front of each element and behind the last group, ``ends`` that behind each group. What
    a group lacks at the end has no hazard, and none is ever beyond.
    """
    whole = size // GROUP
    total = U(_add_up(words, begin, whole, shift, first, weights, fronts, ends))
    groups = whole
    if size % GROUP:
        for place in range(U(GROUP)):
            index = S(_element(U(place)))
            fronts[whole * GROUP + index] = W(total)
            if whole * GROUP + index < size:
                total += U(weights[_kind(S(words[begin + whole * GROUP + index]), shift, first)])
        ends[whole] = W(total)
        groups += 1
    fronts[groups * GROUP] = W(total)
    for group in range(groups, groups + LANES):
        ends[group] = W(0xFFFFFFFF)
    return total


@part
def _rest_changed(old: Any, new: Any, at: Scalar) -> Scalar:
    """As ``_changed`` for what is left behind the last whole group."""
    bits = U(0)
    for place in range(U(GROUP)):
        index = at + S(_element(U(place)))
        if index < old.shape[0] and old[index] != new[index]:
            bits |= _ONE << U(place)
    return bits


@part
def _list_changes(old: Any, new: Any, begin: Scalar, groups: Scalar, found: Any) -> Scalar:
    """Lists where in the walk through groups, the first at ``begin``, elements differ, and returns how many do."""
    count = U(0)
    for group in range(groups):
        at = begin + group * GROUP
        bits = U(_changed(old, new, at)) if at + GROUP <= old.shape[0] else _rest_changed(old, new, at)
        behind = count + U(_num_ones(bits))
        place = U(group * GROUP)
        for number in range(4):  # in most groups there are fewer, and writing too many is cheaper than guessing
            found[count + U(number)] = W(place + U(_lowest_one(bits)))
            bits &= bits - _ONE
        count += U(4)
        while bits:
            found[count] = W(place + U(_lowest_one(bits)))
            bits &= bits - _ONE
            count += _ONE
        count = behind
    return count


@kernel
def compare(
    old: Any,
    new: Any,
    coder: Any,
    first: Scalar,
    weights: Any,
    state: Any,
    places: Any,
    kinds: Any,
    steps: Any,
    fronts: Any,
    ends: Any,
    found: Any,
) -> None:
    """Lists the changes of a segment, by tracks, and makes ``old`` equal to ``new``.

    Args:
        old: words [n] before.
        new: words [n] after.
        coder: their type's ``Coder``.
        first: the exponent of class 0.
        weights: [64] uint32.
        state: uint64 [tracks, 2], per track the changes and the hazard of the segments so far; updated.
        places: int64 [tracks, elements], the hazard in front of each change.
        kinds: uint8 [tracks, elements], its class.
        steps: int32 [tracks, elements], its signed difference.
        fronts: scratch, uint32 [``TILE`` + ``GROUP``].
        ends: scratch, uint32 [``TILE`` / ``GROUP`` + ``LANES``].
        found: scratch, uint32 [``TILE`` + ``GROUP``].
    """
    shift, half = coder
    for begin in range(0, old.shape[0], TILE):
        size = min(TILE, old.shape[0] - begin)
        groups = (size + GROUP - 1) // GROUP
        _walk(old, begin, size, shift, first, weights, fronts, ends)
        edge = 0
        origin = U(0)
        for track in range(TRACKS):
            last = groups * (track + 1) // TRACKS
            count = state[track, 0]
            hazard = state[track, 1] - origin
            changes = S(_list_changes(old, new, begin + edge * GROUP, last - edge, found))
            for number in range(changes):
                listed = U(found[number])
                at = U(edge * GROUP) + (listed & ~U(GROUP - 1)) + _element(listed & U(GROUP - 1))
                index = U(begin) + at
                word = S(old[index])
                places[track, count] = hazard + U(fronts[at])
                kinds[track, count] = _kind(word, shift, first)
                steps[track, count] = _step(word, S(new[index]), half)
                old[index] = new[index]
                count += _ONE
            edge = last
            origin = U(fronts[last * GROUP])
            state[track, 0] = count
            state[track, 1] = hazard + origin


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
    behind: Scalar,
) -> Scalar:
    """Codes a track's changes, as ``compare`` lists them, into ``words`` uint32 in front of ``behind``.

    ``contexts`` [64] uint8 is the row of ``frequencies`` and ``starts`` [rows, 128] uint16 that a class uses.
    Positions and differences have a state each, so that the processor works on both at a time, and share the words.

    Returns:
        Where the words begin; ``behind`` where there is no change.
    """
    end = U(behind)
    place = _LOW
    size = _LOW
    change = U(changes)
    if not change:
        return end
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
def start(words: Any, begin: Scalar, changes: Scalar, state: Any) -> None:
    """Readies ``state`` uint64 [8] for ``decode`` of a track whose words begin at ``begin``.

    It has the states of positions and of differences, the place in ``words``, the changes left, goal and origin in
    hazard from the segment's beginning, and room for the group and the end in a tile.
    """
    state[2] = begin
    state[3] = changes
    if changes:
        at = U(begin)
        first = U(words[at]) << U(32) | U(words[at + _ONE])
        place, position, origin, goal = _aim(first, at + U(4), U(0), words, U(words.shape[0] - PADDING))
        state[0] = place
        state[1] = U(words[at + U(2)]) << U(32) | U(words[at + U(3)])
        state[2] = position
        state[4] = goal
        state[5] = origin


@part
def _find(fronts: Any, ends: Any, group: Scalar, goal: Scalar) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """The element of a tile in which the hazard passes the goal, the hazard in front of it and behind, and its group.

    ``group`` is one not behind it, to start from.
    """
    ahead = _passed_ends(ends, group, W(goal))
    group += ahead
    while ahead == U(LANES):
        ahead = _passed_ends(ends, group, W(goal))
        group += ahead
    at = group * U(GROUP)
    place = _passed_fronts(fronts, at, W(goal))
    element = at + _element(place - _ONE)
    return element, U(fronts[element]), U(fronts[at + _element(place)]), group


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


@part
def _change(
    state: Any,
    old: Any,
    begin: Scalar,
    coder: Any,
    rows: Any,
    table: Any,
    words: Any,
    fronts: Any,
    ends: Any,
) -> None:
    """Makes the next change of a track, whose ``state`` is a row, in the tile that begins at ``begin``."""
    shift, half = coder
    origin = state[5]
    element, front, behind, group = _find(fronts, ends, state[6], state[4])
    index = begin + element
    low = _below(front - origin)
    slot = state[0] & _SLOT
    place = (state[0] >> U(31)) * (_below(behind - origin) - low) + slot - low
    place, position = _refilled(place, state[2], words)
    word = S(old[index])
    row = rows[(word >> shift) & 255]
    step, size, position = _next_step(state[1], position, row, table, words)
    old[index] = _pattern((_ordered(word, half) + step) & (2 * half - 1), half)
    left = state[3] - _ONE
    if left:
        place, position, behind, goal = _aim(place, position, behind, words, U(words.shape[0] - PADDING))
        state[4] = goal
    state[0] = place
    state[1] = size
    state[2] = position
    state[3] = left
    state[5] = behind
    state[6] = group


@kernel
def decode(
    old: Any,
    coder: Any,
    first: Scalar,
    weights: Any,
    rows: Any,
    table: Any,
    words: Any,
    states: Any,
    fronts: Any,
    ends: Any,
) -> None:
    """Makes a segment's ``old`` words the new ones.

    Args:
        old: words [n].
        coder: their type's ``Coder``.
        first: the exponent of class 0.
        weights: [64] uint32.
        rows: [256] uint32, where the 2^11 entries of ``table`` begin that an exponent's class uses.
        table: uint32, for each row and slot the token (7 bits), its frequency less one (11 bits) and the slot's
            distance from its start (11 bits).
        words: uint32, the tracks' streams with ``PADDING`` behind them.
        states: uint64 [tracks, 8], see ``start``; updated.
        fronts: scratch, as for ``compare``.
        ends: scratch, as for ``compare``.
    """
    shift, _ = coder
    limit = U(words.shape[0] - PADDING)
    for begin in range(0, old.shape[0], TILE):
        size = min(TILE, old.shape[0] - begin)
        groups = (size + GROUP - 1) // GROUP
        _walk(old, begin, size, shift, first, weights, fronts, ends)
        for track in range(TRACKS):
            group = groups * track // TRACKS
            hazard = U(fronts[group * GROUP])
            states[track, 4] += hazard
            states[track, 5] += hazard
            states[track, 6] = U(group)
            states[track, 7] = U(fronts[groups * (track + 1) // TRACKS * GROUP])
        busy = True
        while busy:
            busy = False
            for track in range(TRACKS):
                state = states[track]
                if state[3] > U(0) and state[4] < state[7] and state[2] <= limit:
                    _change(state, old, U(begin), coder, rows, table, words, fronts, ends)
                    busy = True
        for track in range(TRACKS):  # these may wrap around below 0: only their distances count
            states[track, 4] -= states[track, 7]
            states[track, 5] -= states[track, 7]

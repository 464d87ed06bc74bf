"""Whatever the tensors, their bits, the way through the versions and the damage: what arrives is what was published."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from steadyhelm.errors import CorruptObjectError
from steadyhelm.testing.memory_store import MemoryStore
from steadyhelm.weights.store import StoreWeights

from tests.unit.weights.test_blocks import DTYPES, elements, kind
from tests.unit.weights.versions import copied, key, same_bits, small_set, stepped, version, words

SHAPES = array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=25)
SPECS = st.dictionaries(st.text("abc.", min_size=1, max_size=4), st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=5)


def drawn(data, specs, before=None):
    """The bits of a set of tensors, of which any share is as before."""
    found = {}
    for name, (dtype, shape) in specs.items():
        found[name] = data.draw(arrays(kind(dtype), shape, elements=elements(dtype)))
        if before is not None:
            how = data.draw(st.sampled_from(["nothing", "some", "everything"]))
            changes = {"nothing": False, "everything": True}.get(how, data.draw(arrays(np.bool_, shape)))
            found[name] = np.where(changes, found[name], before[name])
    return found


def typed(patterns, specs):
    return {name: words(np.asarray(array), *specs[name]) for name, array in patterns.items()}


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(), specs=SPECS, anchor_every=st.integers(1, 4), hold=st.lists(st.booleans(), min_size=9, max_size=9)
)
def test_any_set_by_any_way_through_its_versions_held_or_not(data, specs, anchor_every, hold):
    store = MemoryStore()
    publisher, reader = StoreWeights(store, anchor_every=anchor_every), StoreWeights(store)
    patterns = drawn(data, specs)
    sets, records = [], []
    for iteration in range(5):
        sets.append(typed(patterns, specs))
        records.append(publisher.publish(version(iteration), key(version(iteration)), copied(sets[-1])))
        patterns = drawn(data, specs, patterns)
    held = []
    for iteration, holds in zip(data.draw(st.lists(st.integers(0, 4), max_size=9)), hold, strict=False):
        found = reader.fetch(records[iteration])
        same_bits(found, sets[iteration])
        held = [*held, (found, sets[iteration])] if holds else []
        for earlier, expected in held:
            same_bits(earlier, expected)


TENSORS = [small_set()]
TENSORS += [stepped(TENSORS[0], 1)]
TENSORS += [stepped(TENSORS[1], 2)]


@settings(max_examples=80, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(0, 255), cut=st.booleans())
def test_a_delta_that_lacks_its_end_or_has_any_byte_changed_is_refused_and_changes_nothing(where, flip, cut):
    store = MemoryStore()
    publisher, reader = StoreWeights(store), StoreWeights(store)
    records = [publisher.publish(version(n), key(version(n)), tensors) for n, tensors in enumerate(TENSORS)]
    served = reader.fetch(records[1])
    ref = records[2].objects[0]
    data = bytearray(store.get(ref.key))
    at = int(where * len(data))
    if cut:
        del data[at:]
    else:
        data[at] ^= flip or 1
    bad = store.put(ref.key, bytes(data))
    with pytest.raises(CorruptObjectError):
        reader.fetch(replace(records[2], objects=(bad,)))
    same_bits(served, TENSORS[1])
    same_bits(reader.fetch(records[1]), TENSORS[1])

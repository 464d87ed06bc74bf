"""What changes on a device arrives on the host bit for bit; a CPU stands for the device, by the same operations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from steadyhelm.testing.memory_store import MemoryStore
from steadyhelm.weights import blocks, kernels, mirror
from steadyhelm.weights.layout import flat_words
from steadyhelm.weights.mirror import Mirror, changes
from steadyhelm.weights.mirror import words as device_words
from steadyhelm.weights.store import StoreWeights

from tests.unit.weights.test_blocks import DTYPES, elements, kind
from tests.unit.weights.versions import copied, key, same_bits, small_set, stepped, version, words


def versions(data, dtype, count):
    shape = data.draw(array_shapes(min_dims=0, max_dims=3, min_side=1, max_side=30))
    found = [data.draw(arrays(kind(dtype), shape, elements=elements(dtype)))]
    for _ in range(count - 1):
        stays = data.draw(arrays(np.bool_, shape))
        found.append(np.where(stays, found[-1], data.draw(arrays(kind(dtype), shape, elements=elements(dtype)))))
    return [words(array, dtype, shape) for array in found]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_patterns_of_any_shape_are_mirrored_bit_for_bit(dtype, data):
    made = Mirror()
    for tensor in versions(data, dtype, 4):
        shown = tensor.clone()
        same_bits({"x": made.host("x", shown)}, {"x": tensor})
        same_bits({"x": shown}, {"x": tensor})


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_changes_are_those_that_the_coder_finds(dtype, data):
    old, new = versions(data, dtype, 2)
    places, values = changes(device_words(old), device_words(new))
    before, after = flat_words(old.clone()), flat_words(new)
    assert places.tolist() == np.flatnonzero(before != after).tolist()
    np.testing.assert_array_equal(values.numpy().view(after.dtype), after[places.numpy()])
    size, scratch = max(1, len(before)), blocks._scratch
    state = np.zeros((kernels.TRACKS, 2), np.uint64)
    listed = [np.zeros((kernels.TRACKS, size), kind) for kind in (np.int64, np.uint8, np.int32)]
    weights, coder = np.ones(kernels.CLASSES, np.uint32), blocks.CODERS[dtype]
    kernels.compare(before, after, coder, 0, weights, state, *listed, scratch.fronts, scratch.ends, scratch.found)
    assert int(state[:, 0].sum()) == len(places)
    np.testing.assert_array_equal(before, after)


def test_chunks_types_and_strides_of_every_kind_are_mirrored(monkeypatch):
    monkeypatch.setattr(mirror, "CHUNK", 100)
    made, tensors = Mirror(), small_set()
    for seed in range(3):
        same_bits({name: made.host(name, tensor) for name, tensor in tensors.items()}, tensors)
        tensors = stepped(tensors, seed)
    tensors["embed"] = tensors["embed"][:5]  # of another shape, and then another type
    same_bits({"embed": made.host("embed", tensors["embed"])}, {"embed": tensors["embed"]})
    same_bits({"embed": made.host("embed", tensors["embed"].float())}, {"embed": tensors["embed"].float()})


def test_what_was_mirrored_does_not_follow_its_tensor_by_itself():
    made, tensor = Mirror(), torch.randn(1000)
    expected = tensor.clone()
    found = made.host("x", tensor)
    tensor.zero_()
    assert torch.equal(found, expected)
    assert not made.host("x", tensor).any()


def test_a_publisher_of_mirrored_tensors_makes_the_deltas_of_the_tensors_themselves():
    made, tensors = Mirror(), small_set()
    stores = MemoryStore(), MemoryStore()
    publishers = [StoreWeights(store) for store in stores]
    for iteration in range(4):
        of = version(iteration)
        hosted = {name: made.host(name, tensor) for name, tensor in copied(tensors).items()}
        records = [
            publisher.publish(of, key(of), given)
            for publisher, given in zip(publishers, (tensors, hosted), strict=True)
        ]
        assert records[0] == records[1]
        same_bits(StoreWeights(stores[1]).fetch(records[1]), tensors)
        tensors = stepped(tensors, iteration)

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steadyhelm.errors import ModelError
from steadyhelm.weights.layout import BLOCK, Layout, Segment

DTYPES = [torch.bfloat16, torch.float32, torch.int64]
SIZES = st.sampled_from([0, 1, 5, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
SPECS = st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(SIZES, max_size=1).map(tuple)), max_size=12)


def layout(specs):
    return Layout.from_specs((f"t{number:02d}", dtype, shape) for number, (dtype, shape) in enumerate(specs))


@settings(deadline=None)
@given(SPECS)
def test_blocks_hold_every_element_once_in_order_and_never_two_types(specs):
    made = layout(specs)
    at: dict[str, int] = {}
    for block in made.blocks:
        size = sum(segment.stop - segment.start for segment in block.segments)
        assert 0 < size <= BLOCK
        assert block.num_bytes == size * block.dtype.itemsize
        for name, start, stop in block.segments:
            assert start == at.get(name, 0) < stop
            assert block.dtype == next(spec.dtype for spec in made.specs if spec.name == name)
            at[name] = stop
    assert at == {spec.name: math.prod(spec.shape) for spec in made.specs if math.prod(spec.shape)}
    assert list(at) == sorted(at)


@settings(deadline=None)
@given(SPECS, st.integers(1, 9))
def test_parts_are_neighbours_that_cover_all_blocks_and_differ_by_two_blocks_at_most(specs, count):
    made = layout(specs)
    parts = [made.part(index, count) for index in range(count)]
    assert [index for part in parts for index in part] == list(range(len(made.blocks)))
    sizes = [sum(made.blocks[index].num_bytes for index in part) for part in parts]
    assert max(sizes) - min(sizes) <= 2 * max((block.num_bytes for block in made.blocks), default=0)


def test_a_layout_depends_on_names_types_and_shapes_but_not_on_their_order():
    one = [("a", torch.bfloat16, (2, 3)), ("b", torch.float32, ())]
    assert Layout.from_specs(one) == Layout.from_specs(one[::-1])
    others = [
        [("a", torch.bfloat16, (3, 2)), one[1]],
        [("a", torch.float16, (2, 3)), one[1]],
        [("c", torch.bfloat16, (2, 3)), one[1]],
        one[:1],
    ]
    assert len({Layout.from_specs(specs).checksum for specs in (one, *others)}) == 5


def test_small_tensors_share_a_block_and_large_ones_are_cut():
    made = Layout.from_specs([("a", torch.float32, (3,)), ("b", torch.float32, (BLOCK, 2)), ("c", torch.bool, (4,))])
    assert [block.segments for block in made.blocks] == [
        (Segment("a", 0, 3), Segment("b", 0, BLOCK - 3)),
        (Segment("b", BLOCK - 3, 2 * BLOCK - 3),),
        (Segment("b", 2 * BLOCK - 3, 2 * BLOCK),),
        (Segment("c", 0, 4),),
    ]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.complex64, torch.float8_e4m3fn])
def test_a_type_that_is_not_published_is_told_with_its_tensor_and_the_known_ones(dtype):
    tensors = {"plain": torch.zeros(1), "scale": torch.zeros(1, dtype=dtype)}
    with pytest.raises(ModelError, match=rf"'scale' is {dtype}, which .* torch\.float32, torch\.bfloat16"):
        Layout.of(tensors)

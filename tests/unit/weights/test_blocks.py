import hashlib
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from steadyhelm.errors import CorruptObjectError
from steadyhelm.weights import blocks, compiled
from steadyhelm.weights.entropy import ChangeModel
from steadyhelm.weights.layout import BLOCK, Layout, flat_words

from tests.unit.weights.versions import FLOATS, adam_like, bits, words

SPECIAL = {
    torch.bfloat16: [0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF, 0x7FFF],
    torch.float16: [0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF, 0x7FFF, 0x3C00],
    torch.float32: [0x0, 0x80000000, 0x1, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7FC00001, 0x7F800001, 0xFFFFFFFF],
}
"""Zeros, subnormals, infinities, quiet and signalling NaNs."""
DTYPES = list(FLOATS)


def kind(dtype):
    return np.uint16 if dtype.itemsize == 2 else np.uint32


def elements(dtype):
    anything = st.integers(0, 2 ** (8 * dtype.itemsize) - 1)
    return st.sampled_from(SPECIAL[dtype]) | anything


def coded(old, new):
    """The codes from one set of tensors to another and what came of decoding them, after a check of both."""
    layout = Layout.of(old)
    base = {name: flat_words(tensor.clone()) for name, tensor in old.items()}
    target = {name: flat_words(tensor) for name, tensor in new.items()}
    models = blocks.models_of(layout.blocks, base, target)
    codes = [blocks.encode(block, base, target, models) for block in layout.blocks]
    for name, tensor in target.items():
        np.testing.assert_array_equal(base[name], tensor)
    models = {dtype: ChangeModel.from_bytes(model.to_bytes(), "here") for dtype, model in models.items()}
    found = {name: flat_words(tensor.clone()) for name, tensor in old.items()}
    for block, code in zip(layout.blocks, codes, strict=True):
        blocks.decode(found, block, memoryview(code), models, "here")
    for name, tensor in target.items():
        np.testing.assert_array_equal(found[name], tensor)
    return codes


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bit_pattern_of_any_shape_becomes_any_other(dtype, data):
    shape = data.draw(array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40))
    old, new = (data.draw(arrays(kind(dtype), shape, elements=elements(dtype))) for _ in range(2))
    coded({"x": words(old, dtype, shape)}, {"x": words(new, dtype, shape)})


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 20_000),
    share=st.sampled_from([0.0, 1e-4, 0.02, 0.5, 1.0]),
    reach=st.sampled_from([1, 3, 40, 30_000]),
    seed=st.integers(0, 2**32 - 1),
)
def test_small_differences_at_any_density_come_back(dtype, size, share, reach, seed):
    rng = np.random.default_rng(seed)
    old = rng.integers(0, 2 ** (8 * dtype.itemsize), size, dtype=kind(dtype))
    step = rng.integers(-reach, reach + 1, size).astype(kind(dtype))
    new = np.where(rng.random(size) < share, old + step, old)
    coded({"x": words(old, dtype)}, {"x": words(new, dtype)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_patterns_of_sixteen_bits_change_into_all_kinds_of_others(dtype):
    old = np.arange(1 << 16, dtype=np.uint16)
    for new in (old[::-1], np.roll(old, 1), np.random.default_rng(0).permutation(old), old ^ 0x8000):
        coded({"x": words(old, dtype)}, {"x": words(new, dtype)})


def test_a_set_of_several_types_and_blocks_comes_back():
    generator = torch.Generator().manual_seed(1)
    old = {f"t{n}": torch.randn(size, generator=generator) for n, size in enumerate((5, BLOCK + 3, 1, 77, 4096))}
    old |= {f"u{n}": torch.randn(size, generator=generator).bfloat16() for n, size in enumerate((3, 2 * BLOCK, 17))}
    old |= {"v": torch.arange(100), "w": torch.ones(3, dtype=torch.bool), "x": torch.randn(9).double()}
    new = {name: tensor.clone() for name, tensor in old.items()}
    for name in ("t0", "t1", "u1", "v", "x"):
        new[name].view(-1)[::7] += 1
    codes = coded(old, new)
    assert [bool(code) for code in codes] == [True, True, True, True, True, True, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_does_not_change_takes_no_bytes(dtype):
    same = {"x": torch.randn(3000).to(dtype)}
    assert coded(same, same) == [b""]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_changes_beyond_recognition_takes_no_more_than_its_own_bytes(dtype):
    rng = np.random.default_rng(3)
    old, new = (rng.integers(0, 2 ** (8 * dtype.itemsize), 50_000, dtype=kind(dtype)) for _ in range(2))
    (code,) = coded({"x": words(old, dtype)}, {"x": words(new, dtype)})
    assert len(code) <= 1 + old.nbytes


def entropy(counts):
    counts = np.asarray(counts, float)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def test_a_step_of_the_optimiser_takes_two_thirds_of_what_a_code_without_memory_needs():
    old, new = adam_like(BLOCK)
    (code,) = coded({"x": old}, {"x": new})
    xor = (bits(old) ^ bits(new)).numpy().view(np.uint16)
    changed = np.count_nonzero(xor)
    memoryless = entropy([changed, BLOCK - changed]) + entropy(np.bincount(xor[xor > 0]))
    assert 0.01 < changed / BLOCK < 0.05
    assert 8 * len(code) / memoryless < 0.67


@settings(max_examples=150, deadline=None)
@given(code=st.binary(max_size=400), dtype=st.sampled_from(DTYPES))
def test_a_code_of_random_bytes_is_refused_or_decoded_but_harms_nothing_else(code, dtype):
    old = {"a": torch.randn(3000).to(dtype), "b": torch.randn(500).to(dtype), "c": torch.arange(50)}
    layout = Layout.of(old)
    flat = {name: flat_words(tensor) for name, tensor in old.items()}
    models = blocks.models_of(layout.blocks, flat, {name: array ^ 3 for name, array in flat.items()})
    for start in (b"\1\0\0\0\0", b"\1\xff\xff\0\0", b"\2", b""):
        data = start + code + bytes(-(len(code) % -4) if start[:1] == b"\1" else 0)
        before = flat["c"].copy()
        with suppress(CorruptObjectError):
            blocks.decode(flat, layout.blocks[0], memoryview(data), models, "part 0")
        np.testing.assert_array_equal(flat["c"], before)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_model_of_changes_comes_back_from_its_bytes_and_damaged_ones_are_refused(data):
    counts = np.zeros((256, 129), np.int64)
    for row in data.draw(st.lists(st.integers(0, 255), max_size=20)):
        for column in data.draw(st.lists(st.integers(0, 128), max_size=6)):
            counts[row, column] = data.draw(st.integers(0, 10**6))
    model = ChangeModel.of(counts)
    stored = model.to_bytes()
    found = ChangeModel.from_bytes(stored, "here")
    for field in ("weights", "contexts", "frequencies"):
        np.testing.assert_array_equal(getattr(found, field), getattr(model, field))
    for damaged in (stored[:-1], stored + b"\0", b"", stored[:-2] + b"\xff\xff"):
        with pytest.raises(CorruptObjectError, match="here has a damaged model"):
            ChangeModel.from_bytes(damaged, "here")


CODES = """
from tests.unit.weights.test_blocks import digest_of_codes
print(digest_of_codes())
"""


def digest_of_codes():
    """Of the codes of a step, checked on the way, over odd sizes."""
    pairs = {str(size): adam_like(size, lr=1e-3) for size in (1, 63, 64, 65, 4095, 5000, 70_001)}
    old, new = ({name: pair[side] for name, pair in pairs.items()} for side in (0, 1))
    return hashlib.sha256(b"".join(coded(old, new))).hexdigest()


def test_a_processor_without_wide_vectors_makes_the_same_codes_and_reads_them(tmp_path):
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).resolve().parents[3]
    other = subprocess.run(
        [sys.executable, "-c", CODES], env=os.environ | plain, cwd=root, capture_output=True, text=True, timeout=280
    )
    assert other.stdout.strip() == digest_of_codes(), other.stderr


MISSES = """
import torch
from steadyhelm.weights import blocks, kernels

blocks.compile_for(torch.bfloat16)
print([sum(it.stats.cache_misses.values()) for it in (kernels.compare, kernels.encode, kernels.decode)])
"""


def test_a_process_that_may_not_write_beside_the_kernels_takes_what_was_compiled_there(tmp_path):
    compiled.main()
    found = [
        subprocess.run(
            [sys.executable, "-c", MISSES],
            env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / name), **other},
            capture_output=True,
            text=True,
            timeout=280,
        )
        for name, other in (("same", {}), ("other", {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}))
    ]
    assert found[0].stdout.strip() == "[0, 0, 0]", found[0].stderr
    assert "0" not in found[1].stdout, "what was made for another processor is not taken"
    assert found[1].stdout.startswith("["), found[1].stderr

import ast
from pathlib import Path

import numpy as np
import steadyhelm
from hypothesis import given
from hypothesis import strategies as st
from steadyhelm.data.permutation import permutation

PACKAGE = Path(steadyhelm.__file__).parent
# NumPy's first block of Philox-4x64 for key (0, 0): that of counter 1.
RAW_0_0 = [213000021201967259, 4455796210202625458, 2055444239878205049, 10411612076246414556]


def philox_4x64(counter: int, key: tuple[int, int]) -> list[int]:
    """Ten rounds of Philox-4x64 (Salmon et al., 2011), written from the definition."""
    mask = 2**64 - 1
    x, k = [counter, 0, 0, 0], list(key)
    for _ in range(10):
        low, high = x[0] * 0xD2E7470EE14C6C93, x[2] * 0xCA5A826395121157
        x = [(high >> 64) ^ x[1] ^ k[0], high & mask, (low >> 64) ^ x[3] ^ k[1], low & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return x


def test_the_order_is_that_of_the_raw_bits_of_philox():
    assert philox_4x64(1, (0, 0)) == RAW_0_0
    raw = [bits for counter in range(1, 6) for bits in philox_4x64(counter, (7, 3 << 32))]
    assert permutation(20, (7, 3 << 32)).tolist() == sorted(range(20), key=raw.__getitem__)


@given(n=st.integers(0, 200), seed=st.integers(0, 2**64 - 1), counter=st.integers(0, 2**64 - 1))
def test_every_number_comes_once(n, seed, counter):
    order = permutation(n, (seed, counter))
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))


def test_no_module_draws_from_a_stream_that_numpy_may_change():
    """NumPy promises the bits of its bit generators across releases, but no method of Generator (NEP 19)."""
    unpromised = {"default_rng", "Generator", "RandomState"}
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.attr}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr in unpromised
        and ast.unparse(node.value) in ("np.random", "numpy.random")
    ]
    assert found == []

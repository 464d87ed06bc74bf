"""Compiles the delta codec ahead of its first use, which saves every new process some seconds of a core.

``python -m steadyhelm.weights.compiled`` leaves the code beside the kernels: for an image, whose processes may not
write there later.
"""

from __future__ import annotations

from steadyhelm.weights.blocks import CODERS, compile_for


def main() -> None:
    """Compiles for every type that has deltas."""
    for dtype in CODERS:
        compile_for(dtype)


if __name__ == "__main__":
    main()

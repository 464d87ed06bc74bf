"""What we use of Transformers, imported without what nobody here asks it for.

Where scikit-learn and SciPy are installed (data sets need them), Transformers' generation and losses import both, and
Pandas with them: 100 MB and seconds in each process, for an assisted decoding and object detection.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import transformers.utils


@contextmanager
def _seem_missing(*packages: str) -> Iterator[None]:
    """Transformers' modules that are imported meanwhile find that ``packages`` are not installed."""
    checks = {f"is_{package}_available": getattr(transformers.utils, f"is_{package}_available") for package in packages}
    for name in checks:
        setattr(transformers.utils, name, lambda: False)
    try:
        yield
    finally:
        for name, check in checks.items():
            setattr(transformers.utils, name, check)


with _seem_missing("sklearn", "scipy"):
    import_module("transformers.loss.loss_utils")
    import_module("transformers.generation.candidate_generator")

from transformers import (  # noqa: E402  # behind the imports that decide what it brings
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.cache_utils import Cache, DynamicLayer  # noqa: E402
from transformers.core_model_loading import revert_weight_conversion  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

__all__ = [
    "AutoConfig",
    "AutoImageProcessor",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoTokenizer",
    "Cache",
    "DynamicLayer",
    "disable_progress_bar",
    "revert_weight_conversion",
]

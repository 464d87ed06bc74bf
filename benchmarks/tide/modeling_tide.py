"""A language model that takes the time of an accelerator: it sleeps for as long as one would compute.

A machine with few cores so shows what engines on machines of their own do: three of them sample three times as much as
one.
"""

from __future__ import annotations

import time
from typing import Any

from transformers import Qwen2Config, Qwen2ForCausalLM

TOKEN_S = 0.0016
"""Seconds for each place of an engine's pass; the sequences of a batch are computed side by side."""
LEARNER_S = 1.6
"""Seconds for each of the learner's passes over a micro-batch."""


class TideForCausalLM(Qwen2ForCausalLM):  # type: ignore[misc]  # Transformers is untyped here
    """Sleeps before each pass of its decoder."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)
        self.model.register_forward_pre_hook(_sleep, with_kwargs=True)


def _sleep(_: Any, __: Any, given: dict[str, Any]) -> None:
    tokens = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
    time.sleep(TOKEN_S * tokens.shape[1] if given["use_cache"] else LEARNER_S)

"""The inference engines that a run file may name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from steadyhelm.config.base import Count, Part, Seconds


class TransformersEngine(Part):
    """Generation by Transformers inside the rollout actor."""

    type: Literal["transformers"] = "transformers"
    """Discriminator."""
    batch: Count = 64
    """Sequences generated together; also the number of trajectories in a shard."""


class VllmEngine(Part):
    """Generation by a vLLM server, a process that each rollout actor starts, watches and ends."""

    type: Literal["vllm"] = "vllm"
    """Discriminator."""
    batch: Count = 64
    """Trajectories in a shard; how many sequences are generated together is the server's own choice."""
    python: str = ""
    """Interpreter of the environment that vLLM and ``engines/vllm_plugin`` are installed in. Empty takes the one that
    the variable ``STEADYHELM_VLLM_PYTHON`` names, or the one that ``make engines`` made."""
    args: tuple[str, ...] = ()
    """Further command-line arguments of the server, behind ours."""
    environment: Mapping[str, str] = {}
    """Further environment variables of the server, over ours."""
    start_deadline_s: Seconds = 240.0
    """Longest time for the server to start; below ``runtime.start_deadline_s``, so that its log is in the error."""


Engine = Annotated[TransformersEngine | VllmEngine, Field(discriminator="type")]
"""The engine of the rollout service; ``type`` says which."""

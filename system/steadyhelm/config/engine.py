"""The inference engines that a run file may name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from steadyhelm.config.base import Count, Part, Seconds


class TransformersEngine(Part):
    """Generation by Transformers inside the rollout actor."""

    type: Literal["transformers"] = "transformers"
    """Discriminator."""
    batch: Count = 64
    """Sequences generated together; also the number of trajectories in a shard."""


class _ServerEngine(Part):
    """What the engines have in common whose server each rollout actor starts, watches and ends."""

    batch: Count = 64
    """Trajectories in a shard; how many sequences are generated together is the server's own choice."""
    python: str = ""
    """Interpreter of the environment that the server and ``engines/plugin`` are installed in. Empty takes the one that
    the variable ``STEADYHELM_VLLM_PYTHON`` or ``STEADYHELM_SGLANG_PYTHON`` names, or that ``make engines`` made."""
    tensor_parallel_size: Count = 1
    """GPUs that each server cuts the model over; set ``runtime.gpus_per_engine`` to as many."""
    args: tuple[str, ...] = ()
    """Further command-line arguments of the server, behind ours."""
    environment: Mapping[str, str] = {}
    """Further environment variables of the server, over ours."""
    start_deadline_s: Seconds = 240.0
    """Longest time for the server to start; below ``runtime.start_deadline_s``, so that its log is in the error."""


class VllmEngine(_ServerEngine):
    """Generation by a vLLM server, a process that each rollout actor starts, watches and ends."""

    type: Literal["vllm"] = "vllm"
    """Discriminator."""


class SglangEngine(_ServerEngine):
    """Generation by an SGLang server, a process that each rollout actor starts, watches and ends."""

    type: Literal["sglang"] = "sglang"
    """Discriminator."""


class ExternalEngine(Part):
    """Generation by servers that somebody else runs, one for each rollout actor and for no other run."""

    type: Literal["external"] = "external"
    """Discriminator."""
    server: Literal["vllm", "sglang"]
    """What the servers are. They have ``engines/plugin`` in their environment and the arguments that
    ``docs/howto/engines.md`` lists."""
    urls: Annotated[tuple[str, ...], Field(min_length=1)]
    """``http://host:port`` of each server; rollout actor n uses the n-th, so ``rollout.replicas`` is their number."""
    weights_folder: str
    """A folder that actors and servers see under this path, with room for one copy of the weights for each server."""
    key_variable: str = ""
    """Environment variable of the rollout actors with the servers' API key; empty for servers without one."""
    batch: Count = 64
    """Trajectories in a shard; how many sequences are generated together is the server's own choice."""

    @field_validator("urls")
    @classmethod
    def _addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for number, url in enumerate(urls):
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
                raise ValueError(  # without the URL, which may hold a secret
                    f"rollout.engine.urls[{number}] is no address of a server: write http://host:port or "
                    "https://host:port, and the variable with the key in rollout.engine.key_variable"
                )
        twice = sorted({url for url in urls if urls.count(url) > 1})
        if twice:
            raise ValueError(
                f"rollout.engine.urls has {twice[0]!r} twice: each rollout actor needs a server of its own"
            )
        return urls


Engine = Annotated[TransformersEngine | VllmEngine | SglangEngine | ExternalEngine, Field(discriminator="type")]
"""The engine of the rollout service; ``type`` says which."""

"""SGLang: how its server is started and spoken to."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from steadyhelm.data.types import FinishReason
from steadyhelm.engines.http import EngineServer, understood
from steadyhelm.engines.process import HOST, Launch, Plan
from steadyhelm.errors import ConfigError, DataError, DeadlineError, EngineLostError
from steadyhelm.services.rollout.served import EXCLUDED, FINISH, Answer, Ask, ServerSpec
from steadyhelm.services.rollout.staging import CONTROL_S, STAGE_S, until_staged, worker_answers

NAME = "SGLang"
CPU_CACHE_TOKENS = 1 << 16
"""Tokens in the cache of keys and values on a CPU, where SGLang would else take most of the machine's memory."""


def sglang_plan(spec: ServerSpec) -> Plan:
    """How SGLang's server is started for ``spec``."""

    def plan(port: int, key: str) -> Launch:
        limits = {"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels}
        options: dict[str, str] = {
            "--model-path": spec.folder,
            "--served-model-name": key,
            "--api-key": key,
            "--host": HOST,
            "--port": str(port),
            "--dtype": spec.dtype,
            "--tp-size": str(spec.parts),
            "--context-length": str(spec.max_tokens),
            "--sampling-defaults": "openai",  # not the folder's: it may bring top_k and penalties
            "--log-level": "warning",
        }
        if spec.sees_images:
            options["--mm-process-config"] = json.dumps({"image": {"size": limits}})
        if spec.device == "cpu":
            options |= {"--device": "cpu", "--attention-backend": "torch_native"}
            options["--max-total-tokens"] = str(CPU_CACHE_TOKENS)
        pairs = [part for option in options.items() for part in option]
        flags = ["--skip-server-warmup", "--sleep-on-idle"]  # else an idle scheduler takes a whole core
        flags += ["--enable-multimodal"] * spec.sees_images
        flags += ["--trust-remote-code"] * spec.trust_remote_code
        flags += ["--disable-cuda-graph"] * (spec.device == "cpu")
        return Launch(
            command=(spec.python, "-m", "sglang.launch_server", *pairs, *flags, *spec.args),
            environment={**_ENVIRONMENT, **(_CPU if spec.device == "cpu" else {}), **spec.environment},
            port=port,
            key=key,
            ready="/v1/models",
        )

    return plan


_ENVIRONMENT: Mapping[str, str] = {
    "SGLANG_VLM_CACHE_SIZE_MB": "0",  # embeddings of images, which outlive the weights that made them
    "SGLANG_MM_AVOID_RETOKENIZE": "1",
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",  # else health waits for a token, a second at least
    "HF_HUB_OFFLINE": "1",
}
_CPU: Mapping[str, str] = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
}


class SglangDialect:
    """A ``Dialect`` over ``/generate`` and the routes for reinforcement learning, with ``engines/plugin`` behind."""

    def __init__(self) -> None:
        self._aborts: set[asyncio.Task[Any]] = set()

    async def name_weights(self, server: EngineServer, label: str) -> None:
        """See ``Dialect``."""
        try:
            await self._on_workers(server, "steadyhelm_staged")
        except DataError as error:
            raise ConfigError(
                f"the SGLang server at {server.url} does not have Steadyhelm's plug-in ({error}): install "
                "engines/plugin into its environment"
            ) from error
        await self._control(server, "/update_weight_version", {"new_version": label, "abort_all_requests": False})

    async def complete(self, server: EngineServer, ask: Ask, deadline_s: float) -> Answer:
        """See ``Dialect``."""
        sampling = {
            "max_new_tokens": ask.sampling.max_new_tokens,
            "temperature": 0.0 if ask.sampling.greedy else ask.sampling.temperature,
            "sampling_seed": ask.seed,
            "stop_token_ids": ask.eos_ids,  # ``ignore_eos`` would ignore these too
            "logit_bias": {str(token): EXCLUDED for token in ask.banned_ids},
        }
        name = uuid.uuid4().hex
        body: dict[str, Any] = {
            "rid": name,
            "input_ids": ask.tokens,
            "sampling_params": sampling,
            "return_logprob": True,
        }
        if ask.images:
            body |= {"image_data": [url for _, url in ask.images], "return_prompt_token_ids": True}
        try:
            found = await server.post("/generate", body, deadline_s=deadline_s)
        except (asyncio.CancelledError, DeadlineError):
            self._abort(server, name)
            raise
        with understood(server, NAME):
            return _answer(found, ask)

    async def stage(self, server: EngineServer, file: Path, digest: str) -> None:
        """See ``Dialect``."""
        first = await self._on_workers(server, "steadyhelm_stage", str(file), digest)
        await until_staged(first, lambda: self._on_workers(server, "steadyhelm_staged"), file, digest)

    async def swap(self, server: EngineServer, file: Path, digest: str, label: str, *, abort: bool) -> None:
        """See ``Dialect``.

        Requests that are to be aborted have been cancelled, and are aborted one by one: SGLang's own pause that aborts
        would end everybody's.
        """
        # Requests in flight give up their keys and values and compute them anew behind the pause.
        await self._control(server, "/pause_generation", {"mode": "retract"})
        await self._control(
            server,
            "/update_weights_from_disk",
            {"model_path": digest, "load_format": "steadyhelm", "weight_version": label, "flush_cache": True},
            deadline_s=STAGE_S,
        )
        await self._control(server, "/continue_generation", {"torch_empty_cache": False})

    async def _on_workers(self, server: EngineServer, action: str, *args: str) -> list[dict[str, str]]:
        """The plug-in's answer to an action, of every scheduler."""
        found = await self._control(server, "/weights_checker", {"action": action, "skip_tensor_list": args})
        with understood(server, NAME):
            return worker_answers([json.loads(answer) for answer in found["message"].split(" | ")])

    async def _control(
        self, server: EngineServer, path: str, body: Mapping[str, Any], *, deadline_s: float = CONTROL_S
    ) -> dict[str, Any]:
        found = await server.post(path, body, deadline_s=deadline_s)
        with understood(server, NAME):
            answer = dict(found)
        if not answer.get("success", True):
            raise EngineLostError(f"{path} answered {answer}")
        return answer

    def _abort(self, server: EngineServer, name: str) -> None:
        """Has the server drop a request; by itself it would notice only seconds later that nobody waits for it."""
        task = asyncio.create_task(server.post("/abort_request", {"rid": name}, deadline_s=CONTROL_S))
        self._aborts.add(task)
        task.add_done_callback(self._aborted)

    def _aborted(self, task: asyncio.Task[Any]) -> None:
        self._aborts.discard(task)
        if not task.cancelled():
            task.exception()  # a server that is gone has dropped it


def _answer(found: Mapping[str, Any], ask: Ask) -> Answer:
    """Raises DataError where the server saw another prompt, or ended at a token that ends nothing here."""
    about = found["meta_info"]
    seen = found.get("prompt_token_ids") or ask.tokens
    if _without_repeats(seen) != _without_repeats(ask.tokens):
        raise DataError(f"the SGLang server made other tokens of prompt {ask.name!r}: set SGLANG_MM_AVOID_RETOKENIZE=1")
    end = about["finish_reason"]
    if end["type"] == "stop" and end["matched"] not in ask.eos_ids:
        raise DataError(
            f"the SGLang server ended prompt {ask.name!r} at {end['matched']!r}, but only {ask.eos_ids} end a "
            "completion: the model folder's config.json and tokenizer name others than its generation_config.json"
        )
    drawn = about.get("output_token_logprobs") or ()
    return Answer(
        tokens=[token for _, token, _ in drawn],
        logprobs=[float("nan") if logprob is None else logprob for logprob, _, _ in drawn],
        spans=tuple((span["version"], span["start"], span["end"]) for span in about.get("weight_versions") or ()),
        finish=FINISH.get(end["type"], FinishReason.ABORT),
        prompt_length=about["prompt_tokens"],
    )


def _without_repeats(tokens: list[int]) -> list[int]:
    """Each run of one token once: an image's placeholder is repeated as often as the image takes tokens."""
    return [token for token, _ in groupby(tokens)]

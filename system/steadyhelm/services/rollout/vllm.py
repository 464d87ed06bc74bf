"""vLLM: how its server is started and spoken to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steadyhelm.data.types import FinishReason
from steadyhelm.engines.http import EngineServer, understood
from steadyhelm.engines.process import HOST, Launch, Plan
from steadyhelm.errors import EngineLostError
from steadyhelm.services.rollout.served import EXCLUDED, FINISH, Answer, Ask, ServerSpec
from steadyhelm.services.rollout.staging import CONTROL_S, STAGE_S, until_staged, worker_answers

NAME = "vLLM"


def vllm_plan(spec: ServerSpec) -> Plan:
    """How vLLM's server is started for ``spec``."""

    def plan(port: int, key: str) -> Launch:
        limits = {"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels}
        options: dict[str, str] = {
            "--model": spec.folder,
            "--served-model-name": key,
            "--host": HOST,
            "--port": str(port),
            "--dtype": spec.dtype,
            "--tensor-parallel-size": str(spec.parts),
            "--max-model-len": str(spec.max_tokens),
            "--generation-config": "vllm",  # not the folder's: it may bring top_k and penalties
            "--logprobs-mode": "processed_logprobs",  # of the distribution that is sampled
            "--worker-extension-cls": "steadyhelm_engine.vllm.WeightSwap",
        }
        if spec.sees_images:
            options["--mm-processor-kwargs"] = json.dumps({"size": limits})
        pairs = [part for option in options.items() for part in option]
        flags = ["--enable-scale-out", "--enable-prefix-caching", "--disable-uvicorn-access-log"]
        flags += ["--trust-remote-code"] * spec.trust_remote_code
        if spec.device == "cpu":
            # A prompt in parts ends the server: each part draws a token in vain, and vLLM takes that draw back from the
            # request's generator, which generators on CPUs refuse.
            flags += ["--enforce-eager", "--no-enable-chunked-prefill"]
        return Launch(
            command=(spec.python, "-m", "vllm.entrypoints.openai.api_server", *pairs, *flags, *spec.args),
            environment={
                **_ENVIRONMENT,
                **(_CPU if spec.device == "cpu" else {}),
                "VLLM_API_KEY": key,
                **spec.environment,
            },
            port=port,
            key=key,
            ready="/v1/models",
        )

    return plan


_ENVIRONMENT: Mapping[str, str] = {
    "VLLM_SERVER_DEV_MODE": "1",  # pause, resume, weight versions; on the loopback address only
    "VLLM_HOST_IP": HOST,
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
_CPU: Mapping[str, str] = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",  # else the first request waits half a minute for a compiler
}


class VllmDialect:
    """A ``Dialect`` over ``/inference/v1/generate`` and the routes for reinforcement learning."""

    async def name_weights(self, server: EngineServer, label: str) -> None:
        """See ``Dialect``."""
        await server.post("/update_weight_version", {"new_version": label}, deadline_s=CONTROL_S)

    async def complete(self, server: EngineServer, ask: Ask, deadline_s: float) -> Answer:
        """See ``Dialect``."""
        sampling = {
            "max_tokens": ask.sampling.max_new_tokens,
            "temperature": 0.0 if ask.sampling.greedy else ask.sampling.temperature,
            "seed": ask.seed,
            "logprobs": 0,  # of the sampled token alone
            "stop_token_ids": ask.eos_ids,
            "ignore_eos": True,  # the ids above are the run's own
            "logit_bias": {str(token): EXCLUDED for token in ask.banned_ids},
            "detokenize": False,
        }
        body: dict[str, Any] = {"token_ids": ask.tokens, "sampling_params": sampling}
        if ask.images:
            body["content_parts"] = [{"type": "image_url", "url": url, "uuid": key} for key, url in ask.images]
        found = await server.post("/inference/v1/generate", body, deadline_s=deadline_s)
        with understood(server, NAME):
            choice = found["choices"][0]
            return Answer(
                tokens=choice["token_ids"] or [],
                logprobs=[item["logprob"] for item in (choice["logprobs"] or {}).get("content") or ()],
                spans=tuple((span["version"], span["start"], span["end"]) for span in choice["weight_versions"] or ()),
                finish=FINISH.get(choice["finish_reason"], FinishReason.ABORT),
                prompt_length=found["usage"]["prompt_tokens"],
            )

    async def stage(self, server: EngineServer, file: Path, digest: str) -> None:
        """See ``Dialect``."""
        first = await self._on_workers(server, "steadyhelm_stage", str(file), digest)
        await until_staged(first, lambda: self._on_workers(server, "steadyhelm_staged"), file, digest)

    async def swap(self, server: EngineServer, file: Path, digest: str, label: str, *, abort: bool) -> None:
        """See ``Dialect``."""
        # The sleep of level 0 is what ``/pause`` is, and answers 20 ms sooner: it does not wait for former answers.
        mode = "abort" if abort else "keep"
        await server.post(f"/sleep?level=0&mode={mode}", deadline_s=CONTROL_S)
        # These are under way together: most of each is the way there and back. Requests in flight give up their keys
        # and values too: the reset fails while anybody holds some.
        swapped, cache, _ = await asyncio.gather(
            self._on_workers(server, "steadyhelm_swap", digest),
            server.post("/reset_prefix_cache?reset_running_requests=true", deadline_s=CONTROL_S),
            server.post("/reset_encoder_cache", deadline_s=CONTROL_S),
        )
        for answer in swapped:
            if (answer["state"], answer["digest"]) != ("swapped", digest):
                raise EngineLostError(f"the workers answered {answer}")
        with understood(server, NAME):
            is_empty = cache["success"]
        if not is_empty:
            raise EngineLostError("the cache of keys and values still has some of the old weights")
        await server.post("/update_weight_version", {"new_version": label}, deadline_s=CONTROL_S)
        await server.post("/wake_up?tags=scheduling", deadline_s=CONTROL_S)

    async def _on_workers(self, server: EngineServer, method: str, *args: str) -> list[dict[str, str]]:
        """The answers of all workers to a method of the plug-in."""
        found = await server.post("/collective_rpc", {"method": method, "args": args}, deadline_s=STAGE_S)
        with understood(server, NAME):
            return worker_answers(found["results"])

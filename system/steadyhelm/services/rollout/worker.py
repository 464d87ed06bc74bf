"""The rollout service: prompts in, a trajectory shard in the object store out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from steadyhelm import telemetry
from steadyhelm.config.engine import ExternalEngine, SglangEngine, VllmEngine
from steadyhelm.config.run import Data, Model, RunFile
from steadyhelm.config.run import Rollout as RolloutPart
from steadyhelm.config.weights import StoreTransport, Weights
from steadyhelm.data.types import (
    Completion,
    EngineRequest,
    FinishReason,
    PolicyVersion,
    Prompt,
    PromptId,
    ShardRecord,
    Trajectory,
    WeightsRecord,
)
from steadyhelm.engines.environment import engine_python
from steadyhelm.engines.process import EngineProcess, Plan
from steadyhelm.errors import ConfigError, DataError, RetryableError
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.models.layout import ModelLayout
from steadyhelm.models.load import DTYPES, load_model
from steadyhelm.services import RolloutEngine, Served, ShardOrder
from steadyhelm.services.rollout.served import Dialect, Guest, ServedEngine, ServerSpec, WeightsFetch
from steadyhelm.services.rollout.sglang import SglangDialect, sglang_plan
from steadyhelm.services.rollout.shards import adopt_shard, put_shard
from steadyhelm.services.rollout.transformers import TransformersEngine
from steadyhelm.services.rollout.vllm import VllmDialect, vllm_plan
from steadyhelm.store import ObjectStore, open_store
from steadyhelm.store.images import get_image
from steadyhelm.telemetry import metrics as names
from steadyhelm.weights.transports import make_sync


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSpec:
    """What a rollout worker is built from, in whatever process.

    ``folder`` is the model folder of the run's starting point, ``version`` the policy version that its weights are;
    ``device`` a torch device name, ``threads`` how many work on new weights, which come by ``weights``; ``slot`` is the
    worker's place among those that serve at one time, from 0.

    Example: ``RolloutSpec(model=run.model, data=run.data, rollout=run.rollout, folder="runs/x/model",
    store_uri="runs", version=PolicyVersion(iteration=0, attempt=1))``
    """

    model: Model
    data: Data
    rollout: RolloutPart
    folder: str
    store_uri: str
    version: PolicyVersion
    device: str = "cpu"
    threads: int = 1
    weights: Weights = field(default_factory=StoreTransport)
    slot: int = 0

    @classmethod
    def of(
        cls, run: RunFile, *, folder: str, store_uri: str, version: PolicyVersion, device: str = "cpu", slot: int = 0
    ) -> RolloutSpec:
        """The parts of a run file that a rollout worker needs."""
        return cls(
            model=run.model,
            data=run.data,
            rollout=run.rollout,
            folder=folder,
            store_uri=store_uri,
            version=version,
            device=device,
            threads=run.runtime.threads,
            weights=run.weights,
            slot=slot,
        )


def make_encoder(folder: str, model: Model, data: Data, store: ObjectStore) -> PromptEncoder:
    """The encoder of a model folder with the run file's limits; images come from ``store``. Raises ModelError."""
    return PromptEncoder(
        folder,
        min_pixels=data.min_pixels,
        max_pixels=data.max_pixels,
        trust_remote_code=model.trust_remote_code,
        fetch=partial(get_image, store),
    )


SERVERS: Mapping[str, tuple[Callable[[], Dialect], Callable[[ServerSpec], Plan]]] = {
    "vllm": (VllmDialect, vllm_plan),
    "sglang": (SglangDialect, sglang_plan),
}
"""How each kind of engine server is spoken to and started."""


def make_engine(spec: RolloutSpec, encoder: PromptEncoder, store: ObjectStore) -> RolloutEngine:
    """The engine that the run file names. Raises ModelError, ConfigError, EngineLostError, DeadlineError."""
    fetch = make_sync(spec.weights, store, dtype=DTYPES[spec.model.dtype], threads=spec.threads).fetch
    engine = spec.rollout.engine
    match engine.type:
        case "transformers":
            model = load_model(
                spec.folder,
                dtype=spec.model.dtype,
                trust_remote_code=spec.model.trust_remote_code,
                device=spec.device,
            )
            return TransformersEngine(model, encoder, batch=engine.batch, version=spec.version, fetch=fetch)
        case "vllm" | "sglang" | "external":
            return _served(spec, engine, encoder, fetch)


def _served(
    spec: RolloutSpec, engine: VllmEngine | SglangEngine | ExternalEngine, encoder: PromptEncoder, fetch: WeightsFetch
) -> ServedEngine:
    """The engine over the run file's server, which is started first where it is ours."""
    layout = ModelLayout(spec.folder, dtype=spec.model.dtype, trust_remote_code=spec.model.trust_remote_code)
    process: EngineProcess | Guest
    if isinstance(engine, ExternalEngine):
        dialect, _ = SERVERS[engine.server]
        url, process = engine.urls[spec.slot], _guest(spec, engine)
    else:
        dialect, plan = SERVERS[engine.type]
        process = EngineProcess.start(
            plan(_server_spec(spec, engine, encoder)),
            deadline_s=engine.start_deadline_s,
            scratch_bytes=layout.num_bytes,
        )
        url = process.url
    return ServedEngine(
        url,
        process=process,
        dialect=dialect(),
        encoder=encoder,
        layout=layout,
        version=spec.version,
        fetch=fetch,
        deadline_s=spec.rollout.deadline_s,
    )


def _guest(spec: RolloutSpec, engine: ExternalEngine) -> Guest:
    """Raises ConfigError where the key or the folder is missing in this process."""
    key = os.environ.get(engine.key_variable, "") if engine.key_variable else ""
    if engine.key_variable and not key:
        raise ConfigError(
            f"rollout.engine.key_variable is {engine.key_variable!r}, but the rollout actors have no such variable: "
            "set it where Ray's nodes are started"
        )
    folder = Path(engine.weights_folder)
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ConfigError(
            f"rollout.engine.weights_folder is {engine.weights_folder!r}, which is no folder that the rollout actors "
            "can write to: mount one there that they and the servers share"
        )

    def first() -> Mapping[str, torch.Tensor]:
        model = load_model(spec.folder, dtype=spec.model.dtype, trust_remote_code=spec.model.trust_remote_code)
        found: Mapping[str, torch.Tensor] = model.state_dict()
        return found

    return Guest(key=key, folder=folder.absolute(), first=first)


def _server_spec(spec: RolloutSpec, engine: VllmEngine | SglangEngine, encoder: PromptEncoder) -> ServerSpec:
    """What the run file's engine server is started with. Raises ConfigError where its environment is missing."""
    return ServerSpec(
        python=engine_python(engine.type, engine.python),
        folder=spec.folder,
        dtype=spec.model.dtype,
        device=spec.device,
        max_tokens=spec.data.max_prompt_tokens + spec.rollout.max_new_tokens,
        min_pixels=spec.data.min_pixels,
        max_pixels=spec.data.max_pixels,
        sees_images=encoder.image_id is not None,
        trust_remote_code=spec.model.trust_remote_code,
        parts=engine.tensor_parallel_size,
        args=engine.args,
        environment=engine.environment,
    )


class RolloutWorker:
    """A ``Rollout``: encodes prompts, runs the engine, puts the shard.

    Orders overlap: while the engine samples one, the next one's prompts are encoded and the last one's shard is put.

    Args:
        engine: samples the completions.
        encoder: of the engine's model.
        store: where shards go.
        max_prompt_tokens: longest prompt.
        drop_overlong: whether a longer one is left out of the shard instead of ending the run.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        encoder: PromptEncoder,
        store: ObjectStore,
        *,
        max_prompt_tokens: int,
        drop_overlong: bool,
    ) -> None:
        self._engine = engine
        self._encoder = encoder
        self._store = store
        self._max_prompt_tokens = max_prompt_tokens
        self._drop_overlong = drop_overlong

    @classmethod
    def build(cls, spec: RolloutSpec) -> RolloutWorker:
        """The worker with its engine, model loaded. Raises ModelError, StoreError."""
        store = open_store(spec.store_uri)
        encoder = make_encoder(spec.folder, spec.model, spec.data, store)
        return cls(
            make_engine(spec, encoder, store),
            encoder,
            store,
            max_prompt_tokens=spec.data.max_prompt_tokens,
            drop_overlong=spec.data.overlong == "drop",
        )

    async def rollout(self, order: ShardOrder) -> Served[ShardRecord]:
        """Samples the order's completions and puts the shard; an order whose shard exists already is not sampled again.

        Its metrics are then the first call's, read off the shard, without the speed, which only sampling has.
        Prompts above ``data.max_prompt_tokens`` are missing from the record where ``data.overlong`` is ``drop``.

        Raises:
            RetryableError: the engine's weights are older than the order allows.
            DataError: a prompt is too long or has a corrupt image.
            CorruptObjectError: an object under the order's key is not its shard.
        """
        with telemetry.collect() as spans:
            put = await asyncio.to_thread(adopt_shard, self._store, order)
            if put is not None:
                return Served(value=put.record, spans=tuple(spans), metrics=put.metrics)
            requests = await asyncio.to_thread(self._encode, order.prompts)
            self._require(order.min_version)
            completions = await self._generate(requests, order)
            trajectories = await asyncio.to_thread(self._trajectories, order.prompts, requests, completions)
            put = await asyncio.to_thread(put_shard, self._store, order, trajectories)
        sampled = sum(len(trajectory.tokens) for trajectory in trajectories)
        generated_s = telemetry.phase_seconds(spans).get("seconds/rollout.generate", 0.0)
        speed = {names.ROLLOUT_TOKENS_PER_S: sampled / generated_s} if sampled and generated_s else {}
        return Served(value=put.record, spans=tuple(spans), metrics={**put.metrics, **speed})

    async def apply_weights(self, weights: WeightsRecord) -> Served[None]:
        """Returns once the engine serves ``weights``. Raises CorruptObjectError, ModelError."""
        with telemetry.collect() as spans, telemetry.span("rollout", "apply weights"):
            await self._engine.apply_weights(weights)
        paused = sum(span.end_s - span.start_s for span in spans if span.name == "swap weights")
        return Served(value=None, spans=tuple(spans), metrics={names.WEIGHTS_PAUSE_SECONDS: paused})

    async def close(self) -> None:
        """Ends the engine. A worker is of no use afterwards."""
        await self._engine.close()

    def _require(self, min_version: int) -> None:
        if self._engine.version.iteration < min_version:
            raise RetryableError(
                f"the rollout engine serves policy {self._engine.version} but the order wants iteration {min_version} "
                "or newer: it is tried again once the weights are there",
                delay_s=0.5,
            )

    def _encode(self, prompts: Sequence[Prompt]) -> dict[PromptId, EngineRequest]:
        """The engine's requests for the prompts that are not dropped. Raises DataError."""
        requests = {}
        with telemetry.span("rollout", "encode"):
            for prompt in prompts:
                try:
                    tokens = self._encoder.encode(prompt.text, prompt.images)
                except DataError as error:
                    raise DataError(f"prompt {prompt.prompt_id!r} (pair {prompt.pair_id!r}): {error}") from error
                if self._fits(prompt, tokens):
                    requests[prompt.prompt_id] = EngineRequest(
                        prompt_id=prompt.prompt_id, prompt_tokens=tokens, images=prompt.images, seed=prompt.seed
                    )
        return requests

    def _fits(self, prompt: Prompt, tokens: NDArray[np.int32]) -> bool:
        if len(tokens) <= self._max_prompt_tokens:
            return True
        if self._drop_overlong:
            return False
        raise DataError(
            f"prompt {prompt.prompt_id!r} (pair {prompt.pair_id!r}) has {len(tokens)} tokens but "
            f"data.max_prompt_tokens is {self._max_prompt_tokens}: raise it, lower data.max_pixels, or set "
            "data.overlong to 'drop'"
        )

    async def _generate(
        self, requests: Mapping[PromptId, EngineRequest], order: ShardOrder
    ) -> dict[PromptId, Completion]:
        completions: dict[PromptId, Completion] = {}
        async with aclosing(self._engine.generate(list(requests.values()), order.sampling)) as stream:
            async for completion in stream:
                completions[completion.prompt_id] = completion
        lost = [prompt_id for prompt_id in requests if prompt_id not in completions]
        aborted = [done.prompt_id for done in completions.values() if done.finish is FinishReason.ABORT]
        if lost or aborted:
            raise RetryableError(
                f"the engine left {len(lost)} of {len(requests)} requests unanswered and aborted {len(aborted)} "
                f"(first: {(lost + aborted)[0]!r}): the shard is sampled again"
            )
        return completions

    def _trajectories(
        self,
        prompts: Sequence[Prompt],
        requests: Mapping[PromptId, EngineRequest],
        completions: Mapping[PromptId, Completion],
    ) -> list[Trajectory]:
        """The shard's elements in the order's order, without the dropped ones."""
        with telemetry.span("rollout", "decode text"):
            return [
                Trajectory(
                    prompt=prompt,
                    prompt_tokens=requests[prompt.prompt_id].prompt_tokens,
                    tokens=done.tokens,
                    logprobs=done.logprobs,
                    versions=done.versions,
                    attempt=done.attempt,
                    finish=done.finish,
                    completion_text=self._encoder.decode(done.tokens),
                )
                for prompt in prompts
                if (done := completions.get(prompt.prompt_id)) is not None
            ]

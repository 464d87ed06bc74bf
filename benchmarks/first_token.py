"""From the end of an optimiser step to the first token of its weights: the Transformers engine behind each transport.

Learner and engine are one process here, so a publisher and an engine do not share cores with each other's other work.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import policies
import torch
from steadyhelm import telemetry
from steadyhelm.config.weights import BroadcastTransport, LocalTransport, StoreTransport, Weights
from steadyhelm.data.types import EngineRequest, PolicyVersion, PromptId, Sampling, WeightsRecord
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.models.load import load_model
from steadyhelm.services.rollout.transformers import TransformersEngine
from steadyhelm.store import LocalStore
from steadyhelm.weights.mirror import Mirror
from steadyhelm.weights.transports import make_sync
from transformers import PreTrainedModel

DELTA = "delta, store in a folder"
TRANSPORTS: Mapping[str, Weights] = {
    DELTA: StoreTransport(anchor_every=10_000),
    "safetensors, store in a folder": StoreTransport(anchor_every=1),
    "shared memory": LocalTransport(),
    "broadcast, gloo on loopback": BroadcastTransport(),
}
SEQUENCES, TOKENS = 8, 32
"""A batch that an iteration samples at least, which a pause is compared with."""
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """Median seconds of a sync and of the pause in one, and those of sampling a batch."""

    sync: float
    pause: float
    batch: float


def model_folder(model: PreTrainedModel, folder: Path) -> None:
    """Saves a text model with the tokenizer of the digits task."""
    tiny = folder.with_name("tiny")
    policies.build(tiny)
    model.save_pretrained(folder)
    for file in (*tiny.glob("*token*"), *tiny.glob("chat_template*")):
        shutil.copy(file, folder)


def on_host(tensors: Tensors, mirror: Mirror) -> Tensors:
    """What a learner publishes of ``tensors``: they themselves, or the mirror's copies of a device's."""
    return {name: tensor if tensor.is_cpu else mirror.host(name, tensor) for name, tensor in tensors.items()}


def swaps(model: PreTrainedModel, before: Tensors, after: Tensors, turns: int) -> dict[str, Swap]:
    """What each transport takes to move an engine to and fro between the two versions."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        model_folder(model, folder)
        return {
            label: asyncio.run(_swap(folder, Path(scratch) / "store", transport, (before, after), turns))
            for label, transport in TRANSPORTS.items()
        }


async def _swap(folder: Path, root: Path, transport: Weights, versions: tuple[Tensors, Tensors], turns: int) -> Swap:
    store = LocalStore(root)
    mirror, device = Mirror(), next(iter(versions[0].values())).device.type
    publisher, reader = (make_sync(transport, store, dtype=torch.bfloat16, threads=1) for _ in range(2))
    encoder = PromptEncoder(folder, min_pixels=3136, max_pixels=100352)
    engine = TransformersEngine(
        load_model(folder, dtype="bfloat16", device=device),
        encoder,
        batch=SEQUENCES,
        version=PolicyVersion(iteration=0, attempt=1),
        fetch=reader.fetch,
    )
    syncs, pauses = [], []
    for turn in range(1, turns + 3):
        version = PolicyVersion(iteration=turn, attempt=1)
        started = time.perf_counter()
        weights = await asyncio.to_thread(on_host, versions[turn % 2], mirror)
        record = await asyncio.to_thread(publisher.publish, version, f"run/weights/{turn}", weights)
        with telemetry.collect() as spans:
            await engine.apply_weights(record)
        assert await _sample(engine, encoder, 1, 1) == {turn}
        if turn > 2:
            syncs.append(time.perf_counter() - started)
            pauses.append(sum(span.end_s - span.start_s for span in spans if span.name == "swap weights"))
        _forget(store, record)
    started = time.perf_counter()
    await _sample(engine, encoder, SEQUENCES, TOKENS)
    batch = time.perf_counter() - started
    await engine.close()
    publisher.close()
    return Swap(sync=statistics.median(syncs), pause=statistics.median(pauses), batch=batch)


async def _sample(engine: TransformersEngine, encoder: PromptEncoder, number: int, tokens: int) -> set[int]:
    """The versions that completions were sampled from."""
    prompt = encoder.encode("Which digit is it?", ())
    requests = [
        EngineRequest(prompt_id=PromptId(f"0:{n}"), prompt_tokens=prompt, images=(), seed=n) for n in range(number)
    ]
    found = [done async for done in engine.generate(requests, Sampling(max_new_tokens=tokens))]
    return {int(version) for done in found for version in done.versions}


def _forget(store: LocalStore, record: WeightsRecord) -> None:
    """What has been taken need not fill the disk."""
    for ref in record.objects:
        store.delete(ref.key)

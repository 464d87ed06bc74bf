"""How long real vLLM and SGLang servers pause for new weights, as a share of an iteration, on CPUs.

The tiny Qwen2.5-VL of the digits task, and an iteration as its recipe has it, one part behind the other: 256
completions with an image each sampled by the server, the trainer's optimiser steps on them, 128 at a time, a lossless
delta through a store in a folder to the server, which goes on with requests in flight. The pause is what the engine
reports: from the request to pause until the server goes on.

Servers need their environments (``make engines``).
"""

from __future__ import annotations

import asyncio
import io
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import policies
import torch
from PIL import Image
from steadyhelm import telemetry
from steadyhelm.data.types import Completion, EngineRequest, PolicyVersion, PromptId, Sampling
from steadyhelm.engines.process import EngineProcess, Plan
from steadyhelm.models.batch import TokenSequence, collate
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.models.layout import ModelLayout
from steadyhelm.models.load import load_model
from steadyhelm.models.logprobs import completion_logprobs
from steadyhelm.services.rollout.served import Dialect, ServedEngine, ServerSpec
from steadyhelm.services.rollout.sglang import SglangDialect, sglang_plan
from steadyhelm.services.rollout.vllm import VllmDialect, vllm_plan
from steadyhelm.store import LocalStore, ObjectStore
from steadyhelm.store.images import get_image, put_image
from steadyhelm.weights.named import named_weights
from steadyhelm.weights.store import StoreWeights
from table import Row, main

ROOT = Path(__file__).resolve().parents[1]
SERVERS: Mapping[str, tuple[Callable[[], Dialect], Callable[[ServerSpec], Plan]]] = {
    "vllm": (VllmDialect, vllm_plan),
    "sglang": (SglangDialect, sglang_plan),
}
TOKENS = 38
"""Of a completion at most, as in the digits task."""
PROMPTS, TRAIN_BATCH, MICRO_BATCH = 256, 128, 32
MIN_PIXELS, MAX_PIXELS = 3136, 100352
IN_FLIGHT = 4
"""Requests that the server has while the weights come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """Seconds of the parts of one."""

    sampling: float
    step: float
    sync: float
    pause: float

    @property
    def share(self) -> float:
        """Of the pause in the whole."""
        return self.pause / (self.sampling + self.step + self.sync)


class Learner:
    """A trainer of the policy, AdamW in fp32, on what the server sampled."""

    def __init__(self, folder: Path, encoder: PromptEncoder) -> None:
        self.model = load_model(folder, dtype="float32")
        self._encoder = encoder
        self._optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-6)

    def step(self, requests: Sequence[EngineRequest], completions: Mapping[PromptId, Completion]) -> None:
        """The optimiser steps of an iteration."""
        for start in range(0, len(requests), MICRO_BATCH):
            rows = [
                TokenSequence(
                    prompt_tokens=request.prompt_tokens,
                    tokens=completions[request.prompt_id].tokens,
                    images=request.images,
                )
                for request in requests[start : start + MICRO_BATCH]
            ]
            batch = collate(rows, self._encoder)
            logprobs, _, _ = completion_logprobs(
                self.model, batch, temperature=1.0, banned_ids=self._encoder.banned_ids
            )
            (-logprobs.mean()).backward()  # type: ignore[no-untyped-call]
            if not (start + MICRO_BATCH) % TRAIN_BATCH:
                self._optimiser.step()
                self._optimiser.zero_grad()


def engine_python(name: str) -> str:
    """The interpreter of a server's environment."""
    found = subprocess.run([ROOT / ".ci" / "engines", name], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def requests_of(store: ObjectStore, encoder: PromptEncoder, number: int) -> list[EngineRequest]:
    """Prompts with an image each."""
    found = []
    for n in range(number):
        noise = np.random.default_rng(n).integers(0, 255, (56, 56, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "PNG")
        images = (put_image(store, buffer.getvalue()),)
        prompt = encoder.encode("Which digit is it?", images)
        found.append(EngineRequest(prompt_id=PromptId(f"0:{n}"), prompt_tokens=prompt, images=images, seed=n))
    return found


async def sampled(engine: ServedEngine, requests: Sequence[EngineRequest]) -> dict[PromptId, Completion]:
    """The completions of ``requests``."""
    done = [item async for item in engine.generate(requests, Sampling(max_new_tokens=TOKENS))]
    return {completion.prompt_id: completion for completion in done}


async def iterations(name: str, folder: Path, scratch: Path, number: int, turns: int) -> list[Iteration]:
    """The parts of each of ``turns`` iterations with ``number`` completions, behind one that warms up."""
    store = LocalStore(scratch / f"store-{name}")
    encoder = PromptEncoder(folder, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS, fetch=partial(get_image, store))
    dialect, plan = SERVERS[name]
    spec = ServerSpec(
        python=engine_python(name),
        folder=str(folder),
        dtype="float32",
        device="cpu",
        max_tokens=1024,
        min_pixels=MIN_PIXELS,
        max_pixels=MAX_PIXELS,
        sees_images=True,
    )
    process = EngineProcess.start(plan(spec), deadline_s=600.0, scratch_bytes=64 << 20)
    publisher, reader = StoreWeights(store), StoreWeights(store)
    engine = ServedEngine(
        process.url,
        process=process,
        dialect=dialect(),
        encoder=encoder,
        layout=ModelLayout(folder, dtype="float32"),
        version=PolicyVersion(iteration=0, attempt=1),
        fetch=reader.fetch,
        deadline_s=300.0,
    )
    learner, requests = Learner(folder, encoder), requests_of(store, encoder, number)
    found = []
    for turn in range(1, turns + 2):
        marks = [time.perf_counter()]
        completions = await sampled(engine, requests)
        marks.append(time.perf_counter())
        await asyncio.to_thread(learner.step, requests, completions)
        marks.append(time.perf_counter())
        under_way = asyncio.create_task(sampled(engine, requests[:IN_FLIGHT]))
        version = PolicyVersion(iteration=turn, attempt=1)
        weights = named_weights(learner.model)
        record = await asyncio.to_thread(publisher.publish, version, f"run/weights/{turn}", weights)
        with telemetry.collect() as spans:
            await engine.apply_weights(record)
        marks.append(time.perf_counter())
        await under_way
        pause = sum(span.end_s - span.start_s for span in spans if span.name == "swap weights")
        sampling, step, sync = np.diff(marks).tolist()
        found.append(Iteration(sampling=sampling, step=step, sync=sync, pause=pause))
    await engine.close()
    return found[1:]


def measure(quick: bool) -> list[Row]:
    """The rows of both servers; of vLLM's alone for a quick look."""
    torch.set_num_threads(1)
    number, turns, names = (TRAIN_BATCH, 3, ["vllm"]) if quick else (PROMPTS, 7, list(SERVERS))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        policies.build(folder)
        for name in names:
            found = asyncio.run(iterations(name, folder, Path(scratch), number, turns))
            share = 100 * statistics.median(item.share for item in found)
            rows.append(Row(name=f"{name}: pause / an iteration", value=share, unit="%", goal=1.0, better="lower"))
            for part in ("pause", "sync", "sampling", "step"):
                value = 1e3 * statistics.median(getattr(item, part) for item in found)
                rows.append(Row(name=f"{name}: {part}", value=value, unit="ms", goal=None, better="lower"))
    return rows


if __name__ == "__main__":
    main("The pause of vLLM and SGLang servers for new weights, as a share of an iteration.", measure)

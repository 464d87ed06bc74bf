"""Tokens per second of the rollout service against Transformers' own ``generate`` on the same requests.

The service is what runs inside a rollout actor, in this process: prompts, images from the store, generation, shard put.
The hop through Ray's pool, a few small records per shard, is not in it; ``overhead.py`` bounds it, together with all
else in a real run's iteration that does not compute.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import policies
import table
import torch
from PIL import Image
from steadyhelm.config.engine import TransformersEngine
from steadyhelm.config.run import Data, Model, Rollout
from steadyhelm.data.types import PolicyVersion, Prompt, PromptId, Sampling
from steadyhelm.models.batch import TokenSequence, collate
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.models.load import load_model
from steadyhelm.services import ShardOrder
from steadyhelm.services.rollout.worker import RolloutSpec, RolloutWorker
from steadyhelm.store import open_store
from steadyhelm.store.images import put_image
from table import Row

MAX_NEW_TOKENS = 48
TEXTS = ("Which digit is it?", "Is the digit odd or even? Say why.", "Is it larger than 4? Compare both answers.")


def measure(device: str, chosen: str, quick: bool) -> Sequence[Row]:
    """Both ways on one model and one set of requests, rounds taking turns; medians over the rounds."""
    torch.set_num_threads(1)
    number, rounds, sizes = (64, 3, (32, 64)) if quick else (256, 5, (32, 64, 128, 256))
    with tempfile.TemporaryDirectory() as scratch:
        folder, uri = Path(scratch) / "model", str(Path(scratch) / "store")
        policies.build(folder, chosen)
        prompts, place = _prompts(uri, number), (device, "bfloat16" if chosen else "float32")
        bare, service = _Bare(folder, uri, prompts, *place), _Service(folder, uri, prompts, *place)
        speeds: dict[tuple[str, int], list[float]] = {(way, size): [] for way in ("bare", "service") for size in sizes}
        for _ in range(rounds + 1):
            for size in sizes:
                speeds["bare", size].append(_speed(partial(bare.run, size)))
                speeds["service", size].append(_speed(partial(service.run, size)))
        service.close()
    middle = {way: median(found[1:]) for way, found in speeds.items()}  # the first round warms up
    best = max(sizes, key=lambda size: middle["bare", size])
    ours = max(sizes, key=lambda size: middle["service", size])
    ratios = [ours_ / bare_ for ours_, bare_ in zip(speeds["service", ours][1:], speeds["bare", best][1:], strict=True)]
    shown = [
        Row(name=f"{way}, batch {size}", value=middle[way, size], unit="tokens/s", goal=None, better="higher")
        for way, size in middle
    ]
    name = f"service (batch {ours}) / bare generate at its best batch ({best})"
    return [Row(name=name, value=median(ratios), unit="ratio", goal=0.97, better="higher"), *shown]


def _prompts(uri: str, number: int) -> list[Prompt]:
    store = open_store(uri)
    prompts = []
    for n in range(number):
        noise = np.random.default_rng(n).integers(0, 255, (56, 56, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "PNG")
        key = put_image(store, buffer.getvalue())
        prompts.append(
            Prompt(
                prompt_id=PromptId(f"0:{n}"),
                group_id=f"0:{n}",
                text=TEXTS[n % len(TEXTS)],
                images=(key,),
                label=1,
                swapped=False,
                seed=7919 * n + 1,
            )
        )
    return prompts


def _speed(run: Callable[[], int]) -> float:
    started = time.perf_counter()
    tokens = run()
    return tokens / (time.perf_counter() - started)


class _Bare:
    """``model.generate`` on batches that are ready: tokens encoded, images prepared, nothing stored."""

    def __init__(self, folder: Path, uri: str, prompts: Sequence[Prompt], device: str, dtype: str) -> None:
        store = open_store(uri)
        self._device = device
        self._model: Any = load_model(folder, dtype=dtype, device=device)
        self._encoder = PromptEncoder(
            folder, min_pixels=3136, max_pixels=100352, fetch=lambda key: bytes(store.get(key))
        )
        self._rows = [
            TokenSequence(
                prompt_tokens=self._encoder.encode(prompt.text, prompt.images),
                tokens=np.zeros(0, np.int32),
                images=prompt.images,
            )
            for prompt in prompts
        ]
        self._batches: dict[int, list[dict[str, Any]]] = {}

    def run(self, size: int) -> int:
        """Completion tokens sampled in batches of ``size``, up to and with each row's end token."""
        torch.manual_seed(0)
        return sum(self._tokens(batch) for batch in self._prepared(size))

    def _prepared(self, size: int) -> list[dict[str, Any]]:
        if size not in self._batches:
            parts = [self._rows[start : start + size] for start in range(0, len(self._rows), size)]
            batches = [collate(part, self._encoder, pad_side="left").to(self._device) for part in parts]
            self._batches[size] = [
                {
                    "input_ids": batch.input_ids,
                    "attention_mask": batch.attention_mask,
                    "pixel_values": batch.pixel_values,
                    "image_grid_thw": batch.image_grid_thw,
                    "mm_token_type_ids": batch.input_ids.eq(self._encoder.image_id or 0).int(),
                }
                for batch in batches
            ]
        return self._batches[size]

    def _tokens(self, batch: dict[str, Any]) -> int:
        made = self._model.generate(
            **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS
        )
        found = 0
        for row in made[:, batch["input_ids"].shape[1] :].tolist():
            ends = [place + 1 for place, token in enumerate(row) if token in self._encoder.eos_ids]
            found += ends[0] if ends else len(row)
        return found


class _Service:
    """The whole path of the rollout service: prompts, images from the store, tokens, generation, text, shard put."""

    def __init__(self, folder: Path, uri: str, prompts: Sequence[Prompt], device: str, dtype: str) -> None:
        self._prompts = tuple(prompts)
        self._device, self._dtype = device, dtype
        self._folder, self._uri = str(folder), uri
        self._loop = asyncio.new_event_loop()
        self._workers: dict[int, RolloutWorker] = {}
        self._orders = 0

    def run(self, size: int) -> int:
        """Completion tokens sampled in shards of ``size``; ``RolloutWorker`` is called directly."""
        return self._loop.run_until_complete(self._shards(self._worker(size), size))

    def close(self) -> None:
        """Ends the engines."""
        for worker in self._workers.values():
            self._loop.run_until_complete(worker.close())
        self._loop.close()

    def _worker(self, size: int) -> RolloutWorker:
        if size not in self._workers:
            self._workers[size] = RolloutWorker.build(
                RolloutSpec(
                    model=Model.model_validate({"path": self._folder, "dtype": self._dtype}),
                    data=Data(train="digits.py:train", max_pixels=100352),
                    rollout=Rollout(engine=TransformersEngine(batch=size), max_new_tokens=MAX_NEW_TOKENS),
                    folder=self._folder,
                    store_uri=self._uri,
                    version=PolicyVersion(iteration=0, attempt=1),
                    device=self._device,
                )
            )
        return self._workers[size]

    async def _shards(self, worker: RolloutWorker, size: int) -> int:
        parts = [self._prompts[start : start + size] for start in range(0, len(self._prompts), size)]
        self._orders += 1
        orders = [
            ShardOrder(
                key=f"bench/batches/{self._orders:06d}/1-{shard:04d}.rollout",
                shard=shard,
                prompts=part,
                sampling=Sampling(max_new_tokens=MAX_NEW_TOKENS),
                min_version=0,
            )
            for shard, part in enumerate(parts)
        ]
        served = await asyncio.gather(*(worker.rollout(order) for order in orders))
        return sum(entry.value.num_tokens for entry in served)


def main() -> None:
    """The command line; ``table.main`` takes the flags that all benchmarks have."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=policies.SHAPES, default="")
    given, _ = parser.parse_known_args()
    table.main(__doc__ or "", partial(measure, given.device, given.size), own=parser)


if __name__ == "__main__":
    main()

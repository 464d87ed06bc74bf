"""One rank of the learner: the methods of ``services.Learner``, called on all ranks in lock-step."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from steadyhelm.config import RunFile
from steadyhelm.data.types import (
    BatchManifest,
    CheckpointRecord,
    ImageKey,
    ObjectRef,
    PolicyVersion,
    WeightsRecord,
)
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.models.load import DTYPES, load_model
from steadyhelm.models.logprobs import LOGIT_BYTES, CompletionScorer
from steadyhelm.services import Coming, Served
from steadyhelm.services.learner import checkpoint, collectives
from steadyhelm.services.learner.ahead import BatchesAhead
from steadyhelm.services.learner.batch import read_batch
from steadyhelm.services.learner.engine import TrainEngine
from steadyhelm.services.learner.training import Training
from steadyhelm.store import open_store
from steadyhelm.store.folders import put_folder
from steadyhelm.store.images import get_image
from steadyhelm.store.records import from_json, to_json
from steadyhelm.telemetry import collect, span
from steadyhelm.telemetry import metrics as names
from steadyhelm.weights.broadcast import LOOPBACK
from steadyhelm.weights.mirror import Mirror
from steadyhelm.weights.named import named_weights
from steadyhelm.weights.share import Share
from steadyhelm.weights.transports import make_sync

T = TypeVar("T")

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".h5", ".msgpack")


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSpec:
    """What every rank is built from.

    ``exact_stage`` keeps the run file's ZeRO stage where one rank in fp32 would do without (tests compare the stages).

    Example: ``LearnerSpec(run=run, model_folder="runs/digits-sft/model", store_uri="file:///home/me/runs")``
    """

    run: RunFile
    model_folder: str
    store_uri: str
    exact_stage: bool = False


class LearnerRank:
    """One rank. ``torch.distributed`` must be initialised with this rank and number of ranks.

    All ranks make the same calls in the same order; all answer alike, rank 0's spans are the ones to keep.

    Args:
        spec: what every rank is built from.
        rank: this rank's number.
        world_size: how many there are.
        host: the address under which engines reach this rank.

    Raises:
        ConfigError: the run file asks for what the learner cannot do.
        ModelError: the model folder cannot be used.
    """

    def __init__(self, spec: LearnerSpec, rank: int, world_size: int, *, host: str = LOOPBACK) -> None:
        run = spec.run
        self._spec = spec
        self._rank = rank
        self._store = open_store(spec.store_uri)
        torch.manual_seed(run.seed + rank)
        self._encoder = PromptEncoder(
            spec.model_folder,
            min_pixels=run.data.min_pixels,
            max_pixels=run.data.max_pixels,
            trust_remote_code=run.model.trust_remote_code,
            fetch=self._image,
        )
        model = self._load()
        if run.learner.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        scorer = CompletionScorer(
            model,
            temperature=run.rollout.temperature,
            banned_ids=self._encoder.banned_ids,
            chunks=self._logit_chunks(world_size),
        )
        self._engine = TrainEngine(scorer, model, run.learner, run.model.dtype, exact_stage=spec.exact_stage)
        self._training = Training(self._engine, self._encoder, run)
        on_cpu = collectives.device().type == "cpu"
        self._ahead = BatchesAhead(self._store, self._encoder, gives_way=on_cpu, wait_s=run.runtime.step_deadline_s)
        dtype = DTYPES[run.model.dtype]
        self._share = Share(layout=self._engine.layout(dtype), index=rank, count=world_size, exchange=_exchange)
        self._weights = make_sync(
            run.weights, self._store, dtype=dtype, threads=run.runtime.threads, share=self._share, host=host
        )
        self._mirror = Mirror()
        self._pristine = True

    def expect(self, coming: Coming) -> None:
        """Begins to read and prepare what a batch to come will need; beside the other calls and not in lock-step.

        That is done by threads that are scheduled as the caller's is.
        """
        self._ahead.expect(coming)

    def restore(self, record: CheckpointRecord | None) -> Served[None]:
        """Takes the state of ``record``, or exactly that of the model folder. Raises CorruptObjectError."""
        with collect() as spans, span("learner", "restore"):
            if record is not None:
                self._pristine = False
                checkpoint.restore(self._store, record, self._engine, self._spec.run.seed)
            elif not self._pristine:
                checkpoint.reset(self._engine, named_weights(self._load()), self._spec.run.seed)
        return Served(value=None, spans=tuple(spans))

    def step(self, manifest: BatchManifest) -> Served[None]:
        """Trains on the batch, all its optimiser steps. Raises NonFiniteError, CorruptObjectError, DataError."""
        run = self._spec.run
        self._pristine = False
        with collect() as spans, self._ahead.training(manifest.iteration):
            with span("learner", "read"):
                batch = collectives.together(
                    lambda: read_batch(
                        self._ahead, manifest, with_rewards=not run.is_sft, with_reference=run.uses_reference
                    )
                )
            metrics = self._training.iteration(batch)
        return Served(value=None, spans=tuple(spans), metrics={**metrics, names.PREFETCHED: self._ahead.share})

    def publish(self, version: PolicyVersion, key: str, known: WeightsRecord | None = None) -> Served[WeightsRecord]:
        """Puts the weights in ``model.dtype`` under ``key``, unless ``known`` has their checksum. Raises StoreError.

        Every rank puts its share.
        """
        with collect() as spans, span("learner", "publish"):
            record = self._weights.publish(version, key, self._published(), known)
        stored = self._spec.run.weights.type == "store"
        parts = record.objects if stored else self._share.layout.blocks  # in the store is only a notice of them
        size = float(sum(part.num_bytes for part in parts))
        return Served(value=record, spans=tuple(spans), metrics={names.WEIGHTS_BYTES: size})

    def save(self, version: PolicyVersion, key: str) -> Served[CheckpointRecord]:
        """Puts fp32 weights and optimiser state under ``key``. Raises StoreError."""
        with collect() as spans, span("learner", "save"):
            record = checkpoint.save(self._store, key, version, self._engine)
        return Served(value=record, spans=tuple(spans))

    def export(self, key: str) -> Served[tuple[ObjectRef, ...]]:
        """Puts a Hugging Face model folder in ``model.dtype`` under ``key``. Raises StoreError."""
        with collect() as spans, span("learner", "export"):
            every = {spec.name for spec in self._share.layout.specs}
            tensors = self._whole_weights(every if self._rank == 0 else ())
            refs = self._from_rank_0(
                lambda: [to_json(ref) for ref in self._put_model(key, tensors)],
                lambda found: tuple(from_json(ObjectRef, ref, "rank 0's model") for ref in found),
            )
        return Served(value=refs, spans=tuple(spans))

    def close(self) -> None:
        """Gives up what it holds outside of its process. It is of no use afterwards."""
        self._ahead.close()
        self._weights.close()

    def _load(self) -> Any:
        run = self._spec.run
        model = load_model(
            self._spec.model_folder, dtype=run.model.dtype, trust_remote_code=run.model.trust_remote_code
        )
        _switch_dropout_off(model)
        return model

    def _image(self, key: ImageKey) -> bytes:
        return get_image(self._store, key)

    def _logit_chunks(self, world_size: int) -> int | None:
        """Under ZeRO-3 a number of chunks that is the same on all ranks, since each gathers the output layer."""
        run = self._spec.run
        if run.learner.zero_stage < 3 or world_size == 1:
            return None
        logits = run.learner.micro_batch * run.rollout.max_new_tokens * self._encoder.vocab_size * 4
        return max(1, -(-logits // LOGIT_BYTES))

    def _published(self) -> dict[str, torch.Tensor]:
        """This rank's part of the weights, on the host until the next call; of a device's only what changed moves."""
        weights = self._engine.weights(DTYPES[self._spec.run.model.dtype], self._share.names)
        return {
            name: self._kept(tensor) if tensor.is_cpu else self._mirror.host(name, tensor) for name, tensor in weights
        }

    def _whole_weights(self, names: Container[str]) -> dict[str, torch.Tensor]:
        """Those of the policy's weights, by the model's names; all ranks call it together."""
        weights = self._engine.weights(DTYPES[self._spec.run.model.dtype], names)
        return {name: self._kept(tensor) if tensor.is_cpu else tensor.cpu() for name, tensor in weights}

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on the host that stays until the next step: under ZeRO-3 a gathered one is only lent."""
        return tensor.clone() if self._engine.stage == 3 else tensor

    def _from_rank_0(self, work: Callable[[], Any], read: Callable[[Any], T]) -> T:
        """What ``read`` makes of rank 0's JSON-able answer; all ranks return it, or raise what it raises."""
        mine = collectives.together(lambda: work() if self._rank == 0 else None)
        return read(json.loads(collectives.texts(json.dumps(mine))[0]))

    def _put_model(self, key: str, tensors: dict[str, torch.Tensor]) -> tuple[ObjectRef, ...]:
        source = Path(self._spec.model_folder)
        with tempfile.TemporaryDirectory(prefix="steadyhelm-export-") as scratch:
            model = self._load()
            model.load_state_dict(tensors, strict=False)  # tied names are left out; named_parameters has all others
            model.save_pretrained(scratch)
            for file in sorted(source.iterdir()):
                target = Path(scratch) / file.name
                if file.is_file() and not target.exists() and not file.name.endswith(_WEIGHT_SUFFIXES):
                    shutil.copyfile(file, target)
            return put_folder(self._store, key, Path(scratch))


def _exchange(work: Callable[[], str]) -> list[str]:
    return collectives.texts(collectives.together(work))


def _switch_dropout_off(model: torch.nn.Module) -> None:
    """Current, proximal and behaviour policy must be one function of the weights."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 - nn.Module's attributes are typed as modules

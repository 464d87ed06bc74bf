"""What runs in the services' processes before anything else: builds each service from the run file.

The driver sends these functions with small arguments; what they import, torch above all, is imported there only.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray

from steadyhelm.config import RunFile
from steadyhelm.data.code_ref import call_code
from steadyhelm.data.types import ObjectRef, PolicyVersion
from steadyhelm.errors import ModelError
from steadyhelm.models.folder import require_model_folder
from steadyhelm.runtime.placement import HEAD, SMALL, place
from steadyhelm.store import ObjectStore, open_store
from steadyhelm.store.folders import fetch_folder, put_folder
from steadyhelm.store.layout import RunLayout

T = TypeVar("T")
GIVE_WAY = 10
"""How much nicer than the learner an engine on CPUs is that runs ahead: in lock-step a learner rank that waits for a
core holds all ranks up, while an engine has time until the next batch is due."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlace:
    """Where a run is: what every service's process has to know.

    ``base`` is the run file's folder; ``store_uri`` opens the run's store from anywhere; ``model`` is a model folder's
    path, or empty where the run's factory made one, which ``model_refs`` then name. ``scratch`` is a folder of the
    driver's machine that goes away with the run.
    """

    run: RunFile
    run_id: str
    attempt: int
    base: str
    store_uri: str
    model: str = ""
    model_refs: tuple[ObjectRef, ...] = ()
    scratch: str = ""

    @property
    def layout(self) -> RunLayout:
        """Names of the run's objects."""
        return RunLayout(self.run_id)

    @property
    def store(self) -> ObjectStore:
        """The run's store."""
        return open_store(self.store_uri)

    def folder(self) -> str:
        """The starting point's model folder on this machine; fetched from the store where the factory made it."""
        if self.model:
            return self.model
        name = f"steadyhelm-{self.model_refs[0].xxh3[:16]}-"
        here = self.scratch if self.scratch and Path(self.scratch).is_dir() else None
        folder = tempfile.mkdtemp(prefix=name, dir=here)
        fetch_folder(self.store, self.model_refs, self.layout.start, Path(folder))
        return folder


def model(place: RunPlace) -> tuple[ObjectRef, ...]:
    """Has the run file's factory write the starting point, and puts it to the store.

    Raises ConfigError where the factory fails, ModelError where it writes nothing that is a model.
    """
    import steadyhelm.models.pretrained  # noqa: F401 - before the factory imports more of Transformers than we do

    assert place.run.model.factory is not None
    with tempfile.TemporaryDirectory(prefix="steadyhelm-model-") as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        call_code(Path(place.base), place.run.model.factory, folder, place.run.seed)
        try:
            require_model_folder(folder, trust_remote_code=place.run.model.trust_remote_code)
        except ModelError as error:
            raise ModelError(
                f"model.factory {place.run.model.factory}: {error}; it must save a Hugging Face model folder (model, "
                "tokenizer, chat template, image processor) where its first argument says"
            ) from error
        return put_folder(place.store, place.layout.start, folder)


def in_a_process(function: Callable[[RunPlace], T], run: RunPlace) -> Awaitable[T]:
    """``function(run)`` in a process of its own, which ends with it; on the head of a cluster with pools."""
    remote = ray.remote(num_cpus=0, max_retries=0, max_calls=1, resources=place(HEAD, SMALL))(function)
    call: Awaitable[T] = remote.remote(run)
    return call


def prompts(place: RunPlace) -> Any:
    """The PromptSource."""
    from steadyhelm.services.prompts import DatasetPrompts

    return DatasetPrompts(place.run, base=Path(place.base), store=place.store)


def rollout(place: RunPlace, slot: int = 0) -> Any:
    """A rollout worker: with the run file's engine, or with the data set's traces in supervised fine-tuning.

    ``slot`` is its place among those that there are at one time.
    """
    from steadyhelm.services.rollout.traces import TraceRollout
    from steadyhelm.services.rollout.worker import RolloutSpec, RolloutWorker

    _threads(place.run)
    if place.run.schedule.max_staleness and _device(place.run) == "cpu":
        os.nice(GIVE_WAY)
    version = PolicyVersion(iteration=0, attempt=place.attempt)
    spec = RolloutSpec.of(
        place.run,
        folder=place.folder(),
        store_uri=place.store_uri,
        version=version,
        device=_device(place.run),
        slot=slot,
    )
    return TraceRollout.build(spec) if place.run.is_sft else RolloutWorker.build(spec)


def reward(place: RunPlace) -> Any:
    """A Reward."""
    from steadyhelm.services.reward import RewardScorer

    size = place.run.rollout.samples_per_prompt
    return RewardScorer(place.run.reward, base=Path(place.base), store=place.store, group_size=size)


def reference(place: RunPlace) -> Any:
    """A Reference."""
    from steadyhelm.services.reference import ReferenceScorer, ReferenceSpec

    _threads(place.run)
    return ReferenceScorer.build(
        ReferenceSpec.of(place.run, folder=place.folder(), store_uri=place.store_uri, device=_device(place.run))
    )


def learner(place: RunPlace, rank: int, world_size: int) -> Any:
    """One rank of the learner, inside an initialised process group."""
    from steadyhelm.services.learner import LearnerRank, LearnerSpec

    _threads(place.run)
    spec = LearnerSpec(run=place.run, model_folder=place.folder(), store_uri=place.store_uri)
    return LearnerRank(spec, rank, world_size, host=ray.util.get_node_ip_address())


def _device(run: RunFile) -> str:
    return "cuda" if run.runtime.gpus_per_engine else "cpu"


def _threads(run: RunFile) -> None:
    """Torch's own thread count: it reads OMP_NUM_THREADS at import, which Ray may set otherwise."""
    import torch

    if not run.runtime.gpus_per_engine:
        torch.set_num_threads(run.runtime.threads)

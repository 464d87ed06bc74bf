"""The run file: one frozen tree of everything that a run depends on."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from steadyhelm.config.algorithm import GROUPED, Algorithm, PolicyGradient, Sft, StableReinforce
from steadyhelm.config.base import CodeRef, Count, Part, Seconds
from steadyhelm.config.engine import Engine, ExternalEngine, SglangEngine, TransformersEngine, VllmEngine
from steadyhelm.config.place import parse_place
from steadyhelm.config.reward import Reward
from steadyhelm.config.scaling import Scaling
from steadyhelm.config.weights import StoreTransport, Weights
from steadyhelm.errors import ConfigError


class Model(Part):
    """The policy's starting point: exactly one of ``path`` and ``factory``."""

    path: str = ""
    """A Hugging Face model folder; relative paths start at the working directory. Empty where ``factory`` is set."""
    factory: CodeRef | None = None
    """``file.py:name`` of a function ``(folder: Path, seed: int) -> None`` that writes such a folder."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights that engines and reference hold; the learner keeps fp32 masters beside bfloat16 ones."""
    trust_remote_code: bool = False
    """Whether Python code inside the model folder may run."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.path) == (self.factory is not None):
            given = "neither is given" if self.factory is None else "both are given"
            raise ValueError(f"model.path or model.factory: {given}, give exactly one of the two")
        return self


class Data(Part):
    """Where preference pairs come from and how they become prompts."""

    train: CodeRef
    """``file.py:name`` of a function ``() -> Sequence[PreferencePair]``."""
    eval: CodeRef | None = None
    """The same for held-out pairs; None turns evaluation off."""
    template: CodeRef | None = None
    """``file.py:name`` of ``(question, response_1, response_2) -> str``, the user message; None uses the built-in
    pairwise judge prompt."""
    swap: Literal["random", "none"] = "random"
    """``random``: the two responses change places with probability ½, by a counter seed. For training only."""
    eval_order: Literal["both", "fixed"] = "both"
    """``both``: each held-out pair is asked in both orders, and results are averaged. ``fixed``: in the data set's own
    order only, to compare with figures that were made so; a bias towards one place then goes unseen."""
    shuffle: bool = True
    """Whether each epoch has its own order."""
    max_prompt_tokens: Count = 2048
    """Longest prompt in tokens, image tokens included."""
    overlong: Literal["stop", "drop"] = "stop"
    """A prompt above the limit ends the run, or is dropped with a record in the ledger."""
    min_pixels: Count = 3136
    """Smallest image area after resizing, in pixels."""
    max_pixels: Count = 501760
    """Largest image area after resizing, in pixels."""

    @model_validator(mode="after")
    def _pixel_range(self) -> Self:
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"data.min_pixels is {self.min_pixels}, but data.max_pixels is {self.max_pixels}: lower the former or "
                "raise the latter"
            )
        return self


class Rollout(Part):
    """The rollout service."""

    engine: Engine = TransformersEngine()
    """The inference engine."""
    replicas: Count = 1
    """Rollout actors, each with an engine of its own. Where ``scaling`` is given, how many the run begins with."""
    scaling: Scaling | None = None
    """Bounds between which the number of rollout actors follows the load; without it there are ``replicas``."""
    samples_per_prompt: Count = 1
    """Completions sampled for each prompt (the group size of GRPO and RLOO)."""
    max_new_tokens: Count = 1024
    """Longest completion in tokens; a longer one is truncated and marked so."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature; trainer, proximal and reference log-probs use the same."""
    deadline_s: Seconds = 600.0
    """Longest time for one shard's generation before it goes to another engine; an engine that has two has both's."""
    drain_deadline_s: Seconds = 120.0
    """How long an engine that leaves may take for the shards that it has; then they go to others."""

    @model_validator(mode="after")
    def _one_server_each(self) -> Self:
        if not isinstance(self.engine, ExternalEngine):
            return self
        servers = len(self.engine.urls)
        if self.replicas != servers:
            raise ValueError(
                f"rollout.replicas is {self.replicas}, but rollout.engine.urls has {servers} servers, one for each "
                f"rollout actor: set rollout.replicas to {servers}"
            )
        if self.scaling is not None:
            raise ValueError(
                "rollout.scaling is given, but rollout.engine.type is 'external': the number of servers is fixed, so "
                "leave out rollout.scaling"
            )
        return self


class Reference(Part):
    """The reference service, built only where ``algorithm.beta`` is above 0."""

    replicas: Count = 1
    """Reference actors."""
    batch: Count = 16
    """Sequences scored together."""


Decay = Annotated[float, Field(ge=0, lt=1)]
"""How much of a running mean stays at each step."""


class Learner(Part):
    """The learner: DeepSpeed ranks under Ray Train."""

    replicas: Count = 1
    """Ranks."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """DeepSpeed ZeRO stage; changes memory, never numbers beyond float order. So float32 on one rank without
    ``offload_optimizer`` does without ZeRO (stage 0), and bfloat16 takes at least stage 2, which sums gradients in
    float32."""
    train_batch: Count = 128
    """Sequences per optimiser step, over all ranks."""
    micro_batch: Count = 2
    """Sequences per forward and backward pass of one rank."""
    lr: Annotated[float, Field(gt=0)] = 1.0e-6
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up, over the run's optimiser steps."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Where ``cosine`` and ``linear`` end, as a share of ``lr``."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps of linear warm-up."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's decay rates."""
    eps: Annotated[float, Field(gt=0)] = 1.0e-8
    """AdamW's ε."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    max_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global L2 norm."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    offload_optimizer: bool = False
    """Keep optimiser state in host memory (DeepSpeedCPUAdam)."""
    freeze: tuple[str, ...] = ()
    """Parameters whose name starts with one of these prefixes are not trained."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often a lost rank may restart the group from the last checkpoint."""


class Schedule(Part):
    """How long the run is and what happens when."""

    iterations: Count
    """Iterations of the run."""
    prompts_per_iteration: Count = 256
    """Prompts rolled out in each iteration."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """How many policy versions rollouts may run ahead; 0 is strictly on-policy."""
    drop_staler_than: Annotated[int, Field(ge=0)] | None = None
    """Where it is given, the samples of a prompt are dropped, and recorded as ``dropped:stale``, if a token of them was
    sampled more than this many versions before the one that their batch is trained from. None keeps them all, and
    ``algorithm.correction`` weighs them."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Iterations between evaluations; 0 evaluates only at the start and the end where ``data.eval`` is set."""
    eval_pairs: Annotated[int, Field(ge=0)] = 0
    """Held-out pairs of an evaluation during the run; 0 takes all."""
    checkpoint_every: Count = 10
    """Iterations between checkpoints: the most that a restart steps again."""
    keep_checkpoints: Annotated[int, Field(ge=0)] = 2
    """Checkpoints that stay, the newest ones. Behind each checkpoint the run deletes older ones and the weights that no
    engine can need any more; 0 deletes nothing."""


class Store(Part):
    """The object store."""

    uri: str = "runs"
    """A folder (or ``file://`` URI), or ``s3://bucket/prefix``. Relative folders start at the working directory.

    Behind a ``?`` an S3 URI may say ``endpoint``, ``region``, ``path_style`` (0 or 1), ``timeout_s`` (silence after
    which a request is made again) and ``deadline_s`` (a request with its retries):
    ``s3://bucket/runs?endpoint=https://host:9000&region=eu``. Credentials come from boto3's standard chain only."""

    @field_validator("uri")
    @classmethod
    def _readable(cls, uri: str) -> str:
        try:
            parse_place(uri)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return uri


class Runtime(Part):
    """Processes, deadlines and the Ray cluster."""

    address: str = ""
    """Address of a Ray cluster to join; empty starts one of the run's own on this machine."""
    start_deadline_s: Seconds = 300.0
    """Longest time for a service to start."""
    step_deadline_s: Seconds = 1800.0
    """Longest time for one learner step, publish or checkpoint."""
    wait_notice_s: Seconds = 30.0
    """A wait that lasts longer says in the log what it waits for, and says so again after each such period."""
    cpus_per_actor: Annotated[float, Field(ge=0)] = 0.0
    """CPUs that each actor reserves in Ray; 0 lets a laptop share its cores."""
    threads: Count = 1
    """Threads of each process on a CPU. Two processes that share cores run slower with more."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port on this machine where Prometheus reads the latest metrics; 0 opens none."""
    gpus_per_learner: Annotated[float, Field(ge=0)] = 0.0
    """GPUs per learner rank; 0 trains on the CPU."""
    gpus_per_engine: Annotated[float, Field(ge=0)] = 0.0
    """GPUs per rollout or reference actor."""


class RunFile(Part):
    """A run: everything that decides its numbers, and where it runs."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")]
    """Name of the run: lower-case letters, digits and dashes, at most 40."""
    version: Literal[1] = 1
    """Format version of this file."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of every random choice."""
    model: Model
    """The policy's starting point."""
    data: Data
    """Preference pairs."""
    algorithm: Algorithm = StableReinforce()
    """The objective."""
    rollout: Rollout = Rollout()
    """Generation of completions."""
    reference: Reference = Reference()
    """Log-probs of the frozen starting policy."""
    reward: Reward = Reward()
    """Scores of completions."""
    learner: Learner = Learner()
    """Optimisation."""
    weights: Weights = StoreTransport()
    """How published weights reach the engines."""
    schedule: Schedule
    """Length and rhythm."""
    store: Store = Store()
    """Where batches, weights, checkpoints and metrics are kept."""
    runtime: Runtime = Runtime()
    """Processes and deadlines."""

    @property
    def is_sft(self) -> bool:
        """Whether this run imitates traces and samples nothing."""
        return isinstance(self.algorithm, Sft)

    @property
    def default_id(self) -> str:
        """Id of the run where none is given: its name, with the engine's type where there is one."""
        return self.name if self.is_sft else f"{self.name}-{self.rollout.engine.type}"

    @property
    def objective(self) -> PolicyGradient:
        """The policy-gradient objective, ``algorithm.correction.mode`` without ``auto``.

        Raises TypeError in supervised fine-tuning.
        """
        if isinstance(self.algorithm, Sft):
            raise TypeError("supervised fine-tuning has no policy-gradient objective")
        given = self.algorithm.correction
        mode = given.weighs(ahead=self.schedule.max_staleness > 0)
        return self.algorithm.model_copy(update={"correction": given.model_copy(update={"mode": mode})})

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is allowed but seldom meant, in sentences."""
        if self.is_sft or self.schedule.max_staleness == 0 or self.objective.correction.mode != "off":
            return ()
        return (
            f"schedule.max_staleness is {self.schedule.max_staleness} and algorithm.correction.mode is 'off': rollouts "
            "of older policies are trained on as if they were the newest's.",
        )

    @property
    def uses_reference(self) -> bool:
        """Whether the reference service is built."""
        return not isinstance(self.algorithm, Sft) and self.algorithm.beta > 0

    @property
    def engines(self) -> int:
        """Rollout actors that the run begins with."""
        scaling = self.rollout.scaling
        if self.is_sft:
            return 1
        return self.rollout.replicas if scaling is None else min(max(self.rollout.replicas, scaling.min), scaling.max)

    @property
    def rollouts_per_iteration(self) -> int:
        """Completions in each iteration's batch."""
        return self.schedule.prompts_per_iteration * (1 if self.is_sft else self.rollout.samples_per_prompt)

    @property
    def rollouts_per_shard(self) -> int:
        """Completions in a shard: an engine's batch, cut so that no prompt's samples are in two."""
        batch = self.rollout.engine.batch
        return batch if self.is_sft else batch - batch % self.rollout.samples_per_prompt

    @property
    def steps_per_iteration(self) -> int:
        """Optimiser steps in each iteration."""
        epochs = 1 if isinstance(self.algorithm, Sft) else self.algorithm.epochs
        return -(-self.rollouts_per_iteration // self.learner.train_batch) * epochs

    @model_validator(mode="after")
    def _imitates_as_written(self) -> Self:
        if self.is_sft and self.data.swap != "none":
            raise ValueError(
                f"data.swap is {self.data.swap!r}, but algorithm.type 'sft' imitates traces, which name the responses "
                "by their place: set data.swap to 'none'"
            )
        return self

    @model_validator(mode="after")
    def _in_time(self) -> Self:
        steps = self.schedule.iterations * self.steps_per_iteration
        if self.learner.warmup_steps > steps:
            raise ValueError(
                f"learner.warmup_steps is {self.learner.warmup_steps}, but the run has only {steps} optimiser steps, "
                "so the rate would never reach learner.lr: lower it, or raise schedule.iterations"
            )
        if self.schedule.eval_every and self.data.eval is None:
            raise ValueError(
                f"schedule.eval_every is {self.schedule.eval_every}, but there are no held-out pairs: name them in "
                "data.eval, or set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _gpus_for_each_part(self) -> Self:
        engine, gpus = self.rollout.engine, self.runtime.gpus_per_engine
        parts = engine.tensor_parallel_size if isinstance(engine, VllmEngine | SglangEngine) else 1
        if parts > 1 and 0 < gpus < parts:  # a model in one piece may have a part of a GPU
            raise ValueError(
                f"rollout.engine.tensor_parallel_size is {parts}, but a rollout actor has "
                f"{gpus:g} GPUs (runtime.gpus_per_engine): set both to the same number"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if isinstance(self.algorithm, GROUPED) and self.rollout.samples_per_prompt < 2:
            raise ValueError(
                f"rollout.samples_per_prompt is {self.rollout.samples_per_prompt}, but algorithm.type "
                f"{self.algorithm.type!r} compares samples of one prompt: set it to 2 or more"
            )
        if not self.is_sft and self.rollout.engine.batch < self.rollout.samples_per_prompt:
            raise ValueError(
                f"rollout.engine.batch is {self.rollout.engine.batch}, but a shard holds all "
                f"{self.rollout.samples_per_prompt} samples of a prompt (rollout.samples_per_prompt): raise the former "
                "or lower the latter"
            )
        if self.learner.train_batch > self.rollouts_per_iteration:
            raise ValueError(
                f"learner.train_batch is {self.learner.train_batch}, but an iteration has only "
                f"{self.rollouts_per_iteration} rollouts: lower it, or raise schedule.prompts_per_iteration"
            )
        ahead, drop = self.schedule.max_staleness, self.schedule.drop_staler_than
        if drop is not None and drop >= ahead:
            raise ValueError(
                f"schedule.drop_staler_than is {drop}, but no token is more than schedule.max_staleness ({ahead}) "
                "versions old, so it would drop nothing: lower it, or leave it out"
            )
        return self

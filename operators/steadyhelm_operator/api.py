"""What a ``TrainingRun`` is: its spec and its status, as pydantic models that the CRD is made from.

Kubernetes' names are in camelCase; below ``spec.run`` stands the run file with names of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic.alias_generators import to_camel
from steadyhelm.config import RunFile

GROUP, VERSION, PLURAL, KIND = "steadyhelm.dev", "v1alpha1", "trainingruns", "TrainingRun"
API_VERSION = f"{GROUP}/{VERSION}"
FINALIZER = f"{GROUP}/stop-the-driver"
"""Keeps a deleted TrainingRun until its driver has been stopped."""
PAYLOAD_BYTES = 900_000
"""Most bytes of run file and code together; an object of Kubernetes has to stay below about 1.5 MB."""


class Resource(BaseModel):
    """A part of the resource: frozen, documented by the docstrings under its fields, camelCase outside."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        populate_by_name=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


class Template(Resource):
    """The RayCluster that a TrainingRun owns."""

    labels: Mapping[str, str] = {}
    """Labels of the RayCluster, such as Kueue's `kueue.x-k8s.io/queue-name`."""
    annotations: Mapping[str, str] = {}
    """Annotations of the RayCluster."""
    spec: dict[str, Any]
    """The RayCluster's spec, as the chart steadyhelm-cluster renders it. It is used when the cluster is made; a change
    takes effect with the next cluster, so after a suspension."""


class Cluster(Resource):
    """Where the run runs: an existing RayCluster, or one of its own."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=53)] | None = None
    """Name of a RayCluster in this namespace that somebody else made, such as a release of steadyhelm-cluster."""
    template: Template | None = None
    """A RayCluster that is made for this run, has its name, and goes with it."""

    @model_validator(mode="after")
    def _one_of_the_two(self) -> Self:
        if (self.name is None) == (self.template is None):
            raise ValueError("spec.cluster: give exactly one of name and template")
        return self


class FailurePolicy(Resource):
    """What failures cost. A lost node, head or cluster is no failure of the run and never counts."""

    max_attempts: Annotated[int, Field(ge=1, le=100)] = 4
    """Failed attempts in a row, none of which got the run further, after which it is given up."""
    backoff_seconds: Annotated[float, Field(ge=0, le=3600)] = 10.0
    """Wait before the second attempt; doubled for each further one without progress, and spread by up to a half."""
    max_backoff_seconds: Annotated[float, Field(ge=0, le=86400)] = 600.0
    """Longest wait between two attempts."""


class Cleanup(Resource):
    """What goes when the run has ended. What is in the store always stays."""

    cluster: Literal["Delete", "DeleteOnSuccess", "Keep"] = "Delete"
    """Whether the run's own RayCluster goes when the run has ended: always, when it succeeded, or never."""
    after_seconds: Annotated[int, Field(ge=0, le=2_592_000)] = 300
    """How long it stays first, for a look at it."""
    stop_grace_seconds: Annotated[int, Field(ge=0, le=3600)] = 180
    """How long a driver that is stopped may take for its checkpoint. Past it, a run that is deleted or suspended no
    longer waits for a head that does not answer."""


class Frame(Resource):
    """What a spec says beside the run. It holds where the run file is wrong, too."""

    id: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?$", max_length=63)] | None = None
    """Id of the run in the store; the TrainingRun's name if it is left out. A run that is there already goes on."""
    cluster: Cluster
    """Where it runs."""
    suspend: bool = False
    """Whether the run rests: the driver is stopped at a checkpoint, a RayCluster of its own gives its nodes back."""
    failure_policy: FailurePolicy = FailurePolicy()
    """What failures cost."""
    cleanup: Cleanup = Cleanup()
    """What goes when the run has ended."""


class Spec(Frame):
    """What should run, where, and what happens when it fails."""

    run: RunFile
    """The run file. A change stops the driver at a checkpoint and goes on under the new one."""
    files: Annotated[Mapping[str, str], Field(max_length=64)] = {}
    """Text files beside the run file, by name: the task's code that the run file names as `file.py:name`."""


Phase = Literal[
    "Pending",
    "Queued",
    "Provisioning",
    "Starting",
    "Running",
    "Recovering",
    "Suspending",
    "Suspended",
    "Succeeded",
    "Failed",
    "Terminating",
]
"""Where a TrainingRun stands. Queued: Kueue has not admitted its cluster. Recovering: between two attempts."""
Outcome = Literal["Succeeded", "Failed", "Lost", "Stopped"]
"""How an attempt ended. Failed counts; Lost (infrastructure) and Stopped (by the operator, on purpose) do not."""


class Condition(Resource):
    """A statement about the run, and why it holds or does not."""

    type: Literal["Accepted", "ClusterReady", "Progressing", "Complete"]
    """Accepted: the spec describes a run. ClusterReady: its head takes jobs. Progressing: a driver works or is about
    to. Complete: the run reached its last iteration."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: str
    """Why, as one CamelCase word."""
    message: str = ""
    """Why, in a sentence, with what to do."""
    last_transition_time: Annotated[str, Field(json_schema_extra={"format": "date-time"})]
    """When `status` last changed."""
    observed_generation: int = 0
    """The generation of the spec that it is about."""


class Attempt(Resource):
    """A submission of the run's driver."""

    number: int
    """From 1; part of the submission's id."""
    submission_id: str
    """Id of the job in the Ray Jobs API."""
    payload: str
    """Checksum of the run file and code that it was given."""
    from_iteration: int = 0
    """Committed iteration when it was begun."""
    started_at: str
    """When it was decided on."""
    submitted: bool = False
    """Whether the Jobs API has taken it."""
    losses: int = 0
    """Actors and learner groups that it has lost and replaced by itself."""
    lost: str = ""
    """What it lost last, in words."""
    stopping: str = ""
    """Why the operator stops it; empty where it does not."""
    stopping_since: str = ""
    """When the operator first asked it to stop."""
    ended_at: str = ""
    """When it was seen to have ended; empty while it may live."""
    outcome: Outcome | Literal[""] = ""
    """How it ended: Succeeded, Failed, Lost to the infrastructure, or Stopped on purpose; empty while it may live."""
    reason: str = ""
    """Why it ended, as one CamelCase word."""
    message: str = ""
    """Why it ended, in words."""

    @property
    def alive(self) -> bool:
        """Whether a driver of this attempt may still run."""
        return not self.ended_at


class Rollouts(Resource):
    """Engines."""

    ready: int = 0
    """Engines that serve."""
    desired: int = 0
    """Engines that the run wants."""


class Checkpoint(Resource):
    """A checkpoint in the store."""

    iteration: int
    """The iteration behind which it was made."""
    key: str = ""
    """Its key."""


class Status(Resource):
    """How the run is going, and why not."""

    phase: Phase = "Pending"
    """Where the run stands."""
    reason: str = ""
    """Why, as one CamelCase word."""
    message: str = ""
    """Why, in a sentence, with what to do."""
    observed_generation: int = 0
    """The generation of the spec that this status is about."""
    progress: str = ""
    """Committed iteration of all, like 12/60."""
    iteration: int = 0
    """Last committed iteration."""
    iterations: int = 0
    """Iterations of the run."""
    policy_version: str = ""
    """The policy's version in the engines: iteration and attempt of the store's log, like 12.1."""
    reward: float | None = None
    """Mean reward of the last iteration."""
    accuracy: float | None = None
    """Accuracy on held-out pairs at the last evaluation."""
    staleness: float | None = None
    """Mean age of the last batch's tokens, in policy versions."""
    engines: str = ""
    """Engines that serve of those wanted, like 3/4."""
    rollouts: Rollouts = Rollouts()
    """Engines."""
    checkpoint: Checkpoint | None = None
    """The last checkpoint."""
    waiting: tuple[str, ...] = ()
    """What the driver waits for."""
    cluster: str = ""
    """Name of the RayCluster."""
    cluster_uid: str = ""
    """Its identity; another one means that the cluster was replaced."""
    attempt: int = 0
    """Number of the newest attempt."""
    failures: int = 0
    """Failed attempts in a row that did not get the run further; `failurePolicy.maxAttempts` ends it."""
    restarts: int = 0
    """Attempts in a row without progress that ended without success, counted or not; the wait grows with them."""
    gave_up: bool = False
    """Whether no further attempt is made; a changed run file, or suspending and resuming, allows new ones."""
    changes: int = 0
    """How often the run file or its code changed after the first attempt."""
    retry_at: str = ""
    """When the next attempt may begin."""
    attempts: tuple[Attempt, ...] = ()
    """The newest attempts, newest last."""
    conditions: tuple[Condition, ...] = ()
    """Statements about the run with their reasons."""
    started_at: str = ""
    """When the first attempt began."""
    finished_at: str = ""
    """When the run succeeded or was given up."""
    cluster_deleted: bool = False
    """Whether the run's own cluster was cleaned up after the end."""

    @property
    def last(self) -> Attempt | None:
        """The newest attempt."""
        return self.attempts[-1] if self.attempts else None


class TrainingRun(Resource):
    """A training run on Kubernetes: the run file as its spec, its progress as its status."""

    spec: Spec
    """What should run, where, and what happens when it fails."""
    status: Status = Status()
    """How the run is going, and why not."""


def parse_status(raw: Any) -> Status:
    """The status of an object as the API server holds it; an empty one where an older version wrote another form."""
    try:
        return Status.model_validate(raw or {})
    except ValidationError:
        return Status()

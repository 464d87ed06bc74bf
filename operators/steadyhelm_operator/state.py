"""What the operator wants, what it sees, and what it may do: plain values, between which ``reconcile`` decides."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from steadyhelm.jobs import ENDED, JobState
from steadyhelm.telemetry.status import RunStatus

from steadyhelm_operator.api import Frame, Spec, Status

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
"""Where it is set, Kueue decides on ``spec.suspend`` of the RayCluster, and nobody else may write it."""
TEMPLATE_ANNOTATION = "steadyhelm.dev/template"
"""On a RayCluster that a TrainingRun made: checksum of the template that it was made from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """A TrainingRun as its user left it.

    Attributes:
        name, namespace, uid, generation, version: of its metadata; ``version`` is the resourceVersion.
        spec: None where it describes no run; ``problem`` then says why.
        frame: what it says beside the run; None where that cannot be read either.
        status: what was last written.
        held: whether the finalizer is there.
        deleting_since: when its deletion was asked for; None while it is wanted.
        payload: checksum of run file and code.
    """

    name: str
    namespace: str
    uid: str
    generation: int
    version: str
    spec: Spec | None
    frame: Frame | None
    problem: str = ""
    status: Status
    held: bool
    deleting_since: datetime | None = None
    payload: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """Namespace and name."""
        return self.namespace, self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """What matters of a RayCluster.

    Attributes:
        uid: another one means another cluster.
        version: its resourceVersion, for patches under a condition.
        created: when it was made; None where that is not known.
        owner: uid of the TrainingRun that owns it; empty where none does.
        deleting: whether its deletion was asked for.
        suspend: whether it is to have no pods.
        suspended: whether it has none by that.
        queue: its Kueue queue; empty without Kueue.
        provisioned: whether all of its pods have been ready once.
        head_ready: whether its head is ready now.
        host: DNS name of the head's service.
        secret: Secret with the Ray API's token; empty where it asks for none.
        template: checksum of the template that it was made from; empty where the operator did not make it.
        message: what KubeRay says is wrong.
    """

    name: str
    namespace: str
    uid: str
    version: str = ""
    created: datetime | None = None
    owner: str = ""
    deleting: bool = False
    suspend: bool = False
    suspended: bool = False
    queue: str = ""
    provisioned: bool = False
    head_ready: bool = False
    host: str = ""
    secret: str = ""
    template: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """A job of the Ray Jobs API; ``exit_code`` is None where its driver left none."""

    status: JobState
    message: str = ""
    exit_code: int | None = None

    @property
    def ended(self) -> bool:
        """Whether its driver is gone."""
        return self.status in ENDED


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadView:
    """What the head answers.

    Attributes:
        reachable: whether the Jobs API answered; ``problem`` says why not.
        refused: whether that is for want of the right token.
        job: the newest attempt's; None where the Jobs API knows none of that id.
        document: what that attempt's driver says, or said last.
    """

    reachable: bool
    problem: str = ""
    refused: bool = False
    job: JobView | None = None
    document: RunStatus | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What keeps pods from running, as one CamelCase word and a sentence."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What there is: the cluster (None: there is none), its head (None: not asked), what is wrong with its pods."""

    cluster: ClusterView | None = None
    head: HeadView | None = None
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Puts the finalizer on the TrainingRun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Takes the finalizer off: nothing keeps the TrainingRun any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateCluster:
    """Makes the run's own RayCluster."""

    manifest: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspendCluster:
    """Has KubeRay take away, or bring back, the pods of the run's own cluster."""

    cluster: ClusterView
    suspend: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteCluster:
    """Deletes the run's own cluster."""

    cluster: ClusterView


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Submits the driver of an attempt; the same id again changes nothing."""

    submission_id: str
    entrypoint: str
    files: dict[str, bytes]
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class StopJob:
    """Has the driver of an attempt save a checkpoint and end."""

    submission_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetJob:
    """Takes the record of an ended attempt out of the Jobs API."""

    submission_id: str


Action = Hold | Release | CreateCluster | SuspendCluster | DeleteCluster | Submit | StopJob | ForgetJob


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """An event of Kubernetes on the TrainingRun."""

    warning: bool
    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What is to be done: the status is written first, then the actions are taken in order.

    Attributes:
        status: the whole status.
        actions: what to do.
        notices: events about what changed.
        again_s: seconds after which to look again; None where only a change calls for it.
    """

    status: Status
    actions: tuple[Action, ...] = ()
    notices: tuple[Notice, ...] = ()
    again_s: float | None = None


def stamp(when: datetime) -> str:
    """A time as Kubernetes writes it."""
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def instant(text: str) -> datetime | None:
    """The time that ``stamp`` wrote; None for any other text."""
    try:
        found = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
    return found if found.tzinfo is not None else None

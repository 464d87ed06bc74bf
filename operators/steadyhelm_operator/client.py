"""All that the operator says to servers: to the Kubernetes API, and to the heads of Ray clusters.

Every call has a deadline.
"""

from __future__ import annotations

import base64
import binascii
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import kopf
import urllib3
from steadyhelm.errors import FatalError, RequestRefusedError, SteadyhelmError, TokenRefusedError, UnreachableError
from steadyhelm.jobs import API_PORT, STATUS_PORT, TOKEN_KEY, Job, JobRequest, Jobs, read_status
from steadyhelm.telemetry.status import RunStatus

from steadyhelm_operator.api import GROUP, PLURAL, VERSION, Attempt
from steadyhelm_operator.state import ClusterView, HeadView, JobView, Submit

TIMEOUT_S = 10.0
"""Deadline of a request to the Kubernetes API."""
HEAD_S = 5.0
"""Deadline of a request to a head; many wait for their turn behind one that does not answer."""
LOGIN_S = 60.0
"""How long credentials are used before they are read again: tokens of a pod are replaced while it runs."""
RUNS = f"/apis/{GROUP}/{VERSION}/namespaces/{{}}/{PLURAL}/{{}}"
CLUSTERS = "/apis/ray.io/v1/namespaces/{}/rayclusters"
MERGE, PATCH = "application/merge-patch+json", "application/json-patch+json"
LIVING = ("starting", "running")
"""Phases of a document that only a driver that goes on serves."""
JOBS_URL, STATUS_URL = f"http://{{host}}:{API_PORT}", f"http://{{host}}:{STATUS_PORT}"
"""Where heads answer; ``{host}``, ``{name}`` and ``{namespace}`` are the cluster's."""
Counter = Callable[[str, str, int, float], None]
"""Is told each request: verb, resource, HTTP status (0: no answer), and how many seconds it took."""


class ConflictError(SteadyhelmError):
    """Somebody else has written in between, or an object of that name is there: look again."""


class MissingError(SteadyhelmError):
    """There is no such object."""


def login() -> kopf.ConnectionInfo:
    """The pod's service account, or the current context of ``KUBECONFIG``. Raises UnreachableError without either."""
    settings = kopf.OperatorSettings()
    found = kopf.login_with_service_account(settings=settings) or kopf.login_with_kubeconfig(settings=settings)
    if found is None:
        raise UnreachableError("there is neither a service account nor a kubeconfig: set KUBECONFIG")
    return found


class Kubernetes:
    """The Kubernetes API, object by object.

    All methods raise UnreachableError where it does not answer, ConflictError, MissingError, and RequestRefusedError
    with the server's words.
    """

    def __init__(
        self, access: Callable[[], kopf.ConnectionInfo] = login, count: Counter | None = None, connections: int = 32
    ) -> None:
        self._access, self._count, self._connections = access, count or _uncounted, connections
        self._lock = threading.Lock()
        self._until = 0.0
        self._server = ""
        self._headers: dict[str, str] = {}
        self._pool: urllib3.PoolManager | None = None

    def run(self, namespace: str, name: str) -> dict[str, Any]:
        """A TrainingRun."""
        return self._ask("GET", RUNS.format(namespace, name))

    def write_status(self, namespace: str, name: str, version: str, patch: Mapping[str, Any]) -> dict[str, Any]:
        """Changes a TrainingRun's status where it still has that version; returns the new object."""
        body = {"metadata": {"resourceVersion": version}, "status": patch}
        return self._ask("PATCH", RUNS.format(namespace, name) + "/status", body, MERGE)

    def write_finalizers(self, namespace: str, name: str, version: str, finalizers: list[str]) -> dict[str, Any]:
        """Replaces a TrainingRun's finalizers where it still has that version; returns the new object."""
        body = {"metadata": {"resourceVersion": version, "finalizers": finalizers}}
        return self._ask("PATCH", RUNS.format(namespace, name), body, MERGE)

    def cluster(self, namespace: str, name: str) -> dict[str, Any] | None:
        """A RayCluster; None where there is none."""
        try:
            return self._ask("GET", f"{CLUSTERS.format(namespace)}/{name}")
        except MissingError:
            return None

    def knows_clusters(self, namespace: str) -> bool:
        """Whether Kubernetes knows RayClusters, as it does once KubeRay is installed."""
        try:
            self._ask("GET", f"{CLUSTERS.format(namespace)}?limit=1")
        except MissingError:
            return False
        return True

    def create_cluster(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Makes a RayCluster; returns it. Raises MissingError where Kubernetes knows no RayClusters."""
        return self._ask("POST", CLUSTERS.format(manifest["metadata"]["namespace"]), manifest)

    def patch_cluster(self, cluster: ClusterView, patch: list[dict[str, Any]]) -> dict[str, Any]:
        """Applies a JSON patch to a RayCluster; returns it."""
        return self._ask("PATCH", f"{CLUSTERS.format(cluster.namespace)}/{cluster.name}", patch, PATCH)

    def delete_cluster(self, cluster: ClusterView) -> None:
        """Deletes this very RayCluster, whatever its version; one that is gone, or another by now, is left alone.

        It is gone once its pods are: they go first, within their grace.
        """
        body = {"preconditions": {"uid": cluster.uid}, "propagationPolicy": "Foreground"}
        try:
            self._ask("DELETE", f"{CLUSTERS.format(cluster.namespace)}/{cluster.name}", body)
        except (MissingError, ConflictError):
            return

    def pods(self, cluster: ClusterView) -> list[dict[str, Any]]:
        """The pods of a RayCluster, the first 500."""
        place = f"/api/v1/namespaces/{cluster.namespace}/pods?labelSelector=ray.io%2Fcluster%3D{cluster.name}&limit=500"
        return list(self._ask("GET", place).get("items") or ())

    def secret(self, namespace: str, name: str, key: str) -> str:
        """A value of a Secret. Raises MissingError where there is no such key."""
        data = self._ask("GET", f"/api/v1/namespaces/{namespace}/secrets/{name}").get("data") or {}
        if key not in data:
            raise MissingError(f"Secret {name!r} in {namespace} has no {key!r}")
        try:
            return base64.b64decode(data[key]).decode().strip()
        except (binascii.Error, UnicodeDecodeError):
            raise MissingError(f"{key!r} of Secret {name!r} in {namespace} is no text") from None

    def post_event(self, event: Mapping[str, Any]) -> None:
        """Makes an event."""
        self._ask("POST", f"/apis/events.k8s.io/v1/namespaces/{event['metadata']['namespace']}/events", event)

    def _ask(self, verb: str, place: str, body: Any = None, kind: str = "application/json") -> dict[str, Any]:
        pool, server, headers = self._connection()
        sent = None if body is None else json.dumps(body).encode()
        resource, began = _resource(place), time.perf_counter()
        try:
            answer = pool.request(
                verb, server + place, body=sent, headers={**headers, "Content-Type": kind, "Accept": "application/json"}
            )
        except urllib3.exceptions.HTTPError as error:
            self._count(verb, resource, 0, time.perf_counter() - began)
            raise UnreachableError(f"the Kubernetes API does not answer: {error}") from error
        self._count(verb, resource, answer.status, time.perf_counter() - began)
        if answer.status < 400:
            found: dict[str, Any] = json.loads(answer.data)
            return found
        said = _said(answer.data)
        if answer.status == 404:
            raise MissingError(f"{verb} {place}: {said}")
        if answer.status == 409 or (answer.status == 422 and kind == PATCH):  # a test of the patch did not hold
            raise ConflictError(f"{verb} {place}: {said}")
        if answer.status == 401:
            self._until = 0.0
        if answer.status in (401, 429) or answer.status >= 500:
            raise UnreachableError(f"{verb} {place}: HTTP {answer.status}: {said}")
        raise RequestRefusedError(f"{verb} {place}: HTTP {answer.status}: {said}")

    def _connection(self) -> tuple[urllib3.PoolManager, str, dict[str, str]]:
        with self._lock:
            if self._pool is None or time.monotonic() > self._until:
                info = self._access()
                fresh = self._pool is None
                self._server, self._headers = info.server.rstrip("/"), dict(info.as_http_headers())
                if fresh:
                    timeout = urllib3.Timeout(connect=TIMEOUT_S / 2, read=TIMEOUT_S)
                    self._pool = urllib3.PoolManager(
                        maxsize=self._connections,
                        ssl_context=info.as_ssl_context() if info.server.startswith("https") else None,
                        timeout=timeout,
                        retries=False,
                    )
                self._until = time.monotonic() + LOGIN_S
            assert self._pool is not None
            return self._pool, self._server, self._headers


class Heads:
    """The heads of all clusters: their Jobs APIs and their drivers' status.

    Args:
        kubernetes: for the Secrets with the tokens.
        jobs_url, status_url: forms like ``JOBS_URL``; tests put servers of their own there.
        count: is told what is asked of heads, with 400 for any answer that refuses it.
    """

    def __init__(
        self,
        kubernetes: Kubernetes,
        jobs_url: str = JOBS_URL,
        status_url: str = STATUS_URL,
        count: Counter | None = None,
    ) -> None:
        self._kubernetes, self._jobs_url, self._status_url = kubernetes, jobs_url, status_url
        self._count = count or _uncounted
        self._tokens: dict[tuple[str, str], str] = {}

    def view(self, cluster: ClusterView, attempt: Attempt, run: str) -> HeadView:
        """What a head says about an attempt of the run with that id. Says it, too, where the head does not answer."""
        try:
            if attempt.submitted and not attempt.stopping:
                document = self._document(cluster, run)
                if (
                    document is not None
                    and document.submission_id == attempt.submission_id
                    and document.phase in LIVING
                ):
                    return HeadView(reachable=True, job=JobView(status="RUNNING"), document=document)
            head = self._head(cluster)
            with self._asked("GET", "jobs"):
                job = head.get(attempt.submission_id)
            if job is None:
                return HeadView(reachable=True)
            return HeadView(reachable=True, job=_view(job), document=self._last_words(cluster, job, run))
        except SteadyhelmError as error:
            refused = isinstance(error, TokenRefusedError)
            if refused:
                self._tokens.pop((cluster.namespace, cluster.secret), None)  # it may have been replaced
            return HeadView(reachable=False, refused=refused, problem=str(error).rstrip("."))

    def submit(self, cluster: ClusterView, request: Submit) -> None:
        """Ships the files and submits the job, unless one of that id is there."""
        head = self._head(cluster)
        with self._asked("POST", "packages"):
            folder = head.upload(request.files)
        with self._asked("POST", "jobs"):
            head.submit(
                JobRequest(
                    submission_id=request.submission_id,
                    entrypoint=request.entrypoint,
                    working_dir=folder,
                    metadata=request.metadata,
                )
            )

    def stop(self, cluster: ClusterView, submission_id: str) -> None:
        """Has a job's driver end."""
        head = self._head(cluster)
        with self._asked("POST", "jobs"):
            head.stop(submission_id)

    def forget(self, cluster: ClusterView, submission_id: str) -> None:
        """Takes the record of a job that has ended out of the Jobs API."""
        head = self._head(cluster)
        with self._asked("DELETE", "jobs"):
            head.delete(submission_id)

    def _head(self, cluster: ClusterView) -> Jobs:
        return Jobs(self._url(self._jobs_url, cluster), self._token(cluster), HEAD_S)

    def _url(self, form: str, cluster: ClusterView) -> str:
        return form.format(host=cluster.host, name=cluster.name, namespace=cluster.namespace)

    def _token(self, cluster: ClusterView) -> str:
        if not cluster.secret:
            return ""
        key = cluster.namespace, cluster.secret
        if key not in self._tokens:
            try:
                self._tokens[key] = self._kubernetes.secret(*key, TOKEN_KEY)
            except (MissingError, RequestRefusedError) as error:
                raise TokenRefusedError(f"the token cannot be read: {error}") from error
        return self._tokens[key]

    def _last_words(self, cluster: ClusterView, job: Job, run: str) -> RunStatus | None:
        """What a job's driver says, or the last that it said; Ray has the end of a failed one's log in the message."""
        if job.status == "RUNNING":
            return self._document(cluster, run)
        found = RunStatus.from_log(job.message) if job.status == "FAILED" else None
        return found if found is not None and found.run == run else None

    def _document(self, cluster: ClusterView, run: str) -> RunStatus | None:
        """The document that the head serves; None where none is served, or another run's."""
        token = self._token(cluster)
        try:
            with self._asked("GET", "status"):
                found = read_status(self._url(self._status_url, cluster), token, HEAD_S)
        except SteadyhelmError:  # the Jobs API is asked next, and says whether the head answers at all
            return None
        return found if found.run == run else None

    @contextmanager
    def _asked(self, verb: str, resource: str) -> Iterator[None]:
        """Counts what a head is asked in the block, which may take more than one request."""
        began, code = time.perf_counter(), 0
        try:
            yield
            code = 200
        except FatalError:
            code = 400
            raise
        finally:
            self._count(verb, resource, code, time.perf_counter() - began)


def _uncounted(verb: str, resource: str, code: int, seconds: float) -> None:
    """Where nobody counts."""


def _view(job: Job) -> JobView:
    return JobView(status=job.status, message=job.message[-4000:], exit_code=job.driver_exit_code)


def _resource(place: str) -> str:
    """The kind of thing that a path of the API is about: ``rayclusters``."""
    words = place.partition("?")[0].split("/")
    return words[words.index("namespaces") + 2]


def _said(data: bytes) -> str:
    try:
        return str(json.loads(data).get("message") or "no more is known")
    except (ValueError, AttributeError):
        return data[:200].decode("utf-8", "replace")

"""Commands for runs on a Ray cluster elsewhere: ``submit``, ``status``, ``logs``, ``stop`` and ``list``."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steadyhelm.cli_options import AcceptChanges, Debug, LogFormat, Logs, Quiet, RunId, RunPath, Sets, TakeOver

if TYPE_CHECKING:
    from steadyhelm.config import RunFile
    from steadyhelm.display import Display
    from steadyhelm.jobs import Job, Jobs
    from steadyhelm.telemetry.status import RunStatus

EXIT_DETACHED = 130
"""Exit code where the user left while the run goes on."""
STOP_S = 600.0
"""How long ``stop`` waits for a run that saves a checkpoint, unless it is told otherwise."""
POLL_S = 0.5
"""Seconds between two looks at a job that is to stop."""
ANSWER_S = 30.0
"""How long a cluster may take to answer, of which a busy head needs some."""

Address = Annotated[
    str,
    typer.Option(help="The cluster's Ray API, http://host:port.", envvar="RAY_API_SERVER_ADDRESS", show_envvar=True),
]
Release = Annotated[
    str, typer.Option(help="Release of the cluster chart, reached by kubectl's port-forward; instead of --address.")
]
Namespace = Annotated[str, typer.Option("--namespace", "-n", help="Namespace of the release; default: the context's.")]
TokenFile = Annotated[
    Path | None, typer.Option(help="File with the Ray API's token; default: RAY_AUTH_TOKEN, or as Ray has it.")
]
StatusAddress = Annotated[
    str, typer.Option(help="Where the driver serves its status; default: port 8266 of the API's host.")
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Id of a run on the cluster, or a submission id of one's job.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A cluster that commands talk to; ``again`` are the options by which the user finds it."""

    jobs: Jobs
    token: str
    status_address: str
    again: tuple[str, ...]


def submit(
    file: RunPath,
    address: Address = "",
    release: Release = "",
    namespace: Namespace = "",
    token_file: TokenFile = None,
    sets: Sets = None,
    run_id: RunId = "",
    take_over: TakeOver = False,
    accept_changes: AcceptChanges = False,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return as soon as the run is sent.")] = False,
    quiet: Quiet = False,
    log_format: Logs = LogFormat.HUMAN,
    debug: Debug = False,
) -> None:
    """Sends FILE and the code beside it to a Ray cluster and follows the run; Ctrl-C leaves it running.

    The same command again goes on with the run, or follows it where it runs already. The exit code is the run's.
    """
    from steadyhelm.config.place import check_run_id
    from steadyhelm.config.run import Store
    from steadyhelm.jobs import entrypoint, patiently, runs
    from steadyhelm.jobs.folder import folder_files

    run_file = _checked(file, sets or ())
    run = run_id or run_file.default_id
    check_run_id(run)  # rather here than by the driver there
    folder = file.resolve().parent
    files = folder_files(folder, leave_out=[folder / Store().uri, Path(run_file.store.uri)])
    command = entrypoint(file.name, run, sets=sets or (), take_over=take_over, accept_changes=accept_changes)
    with _cluster(address, release, namespace, token_file) as cluster:
        jobs, about, say = cluster.jobs, {"file": file.name}, partial(typer.echo, err=True)
        known = patiently(jobs.list, say, ANSWER_S)  # a wrong token is said at once, a wrong address soon
        _warn_of_training_run(runs.newest(known, run), run)
        job, adopted = patiently(lambda: runs.send(jobs, run, command, jobs.upload(files), about), say)
        what = "runs already as" if adopted else "is sent as"
        typer.echo(f"run {run} {what} job {job.submission_id} at {jobs.address}", err=True)
        if detach:
            _say_how_to_come_back(cluster, run)
            return
        code = _follow(cluster, run, job.submission_id, quiet=quiet, log_format=log_format)
    raise typer.Exit(code)


def status(
    run: Run,
    address: Address = "",
    release: Release = "",
    namespace: Namespace = "",
    token_file: TokenFile = None,
    status_address: StatusAddress = "",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Says where RUN stands: what its driver says of itself, or said at its end."""
    import json
    from dataclasses import asdict

    from steadyhelm.jobs import runs

    with _cluster(address, release, namespace, token_file, status_address) as cluster:
        job = runs.named(cluster.jobs, run)
        found, why = _status_of(cluster, job)
    if as_json:
        document = None if found is None else json.loads(found.line())
        typer.echo(json.dumps({"job": asdict(job), "status": document}, indent=1))
        return
    typer.echo(_job_line(job))
    typer.echo("\n".join(_status_lines(found)) if found is not None else f"  its driver says nothing: {why}")


def logs(
    run: Run,
    address: Address = "",
    release: Release = "",
    namespace: Namespace = "",
    token_file: TokenFile = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    quiet: Quiet = False,
    log_format: Logs = LogFormat.HUMAN,
    debug: Debug = False,
) -> None:
    """Shows what RUN's newest job wrote; with --follow to its end, with its exit code."""
    from steadyhelm.display import Display
    from steadyhelm.jobs import runs

    with _cluster(address, release, namespace, token_file) as cluster:
        job = runs.named(cluster.jobs, run)
        if follow:
            code = _follow(cluster, run, job.submission_id, quiet=quiet, log_format=log_format)
            raise typer.Exit(code)
        with Display(live=False, quiet=quiet) as display:
            _show([cluster.jobs.logs(job.submission_id)], display, log_format)


def stop(
    run: Run,
    address: Address = "",
    release: Release = "",
    namespace: Namespace = "",
    token_file: TokenFile = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for its end; 0 does not wait.")] = STOP_S,
    debug: Debug = False,
) -> None:
    """Stops RUN behind the step in progress, with a checkpoint: 'steadyhelm submit' goes on with it."""
    from steadyhelm.errors import DeadlineError
    from steadyhelm.jobs import runs

    with _cluster(address, release, namespace, token_file) as cluster:
        job = runs.named(cluster.jobs, run)
        if not cluster.jobs.stop(job.submission_id):
            typer.echo(_job_line(cluster.jobs.get(job.submission_id) or job))
            return
        ends = time.monotonic() + wait
        while wait and not job.ended:
            if time.monotonic() > ends:
                raise DeadlineError(f"Job {job.submission_id} was told to stop and has not ended within {wait:g} s.")
            time.sleep(POLL_S)
            found = cluster.jobs.get(job.submission_id)
            if found is None:
                typer.echo(f"job {job.submission_id} is gone, and its driver with it")
                return
            job = found
    typer.echo(_job_line(job) if wait else f"job {job.submission_id} was told to stop")


def list_runs(
    address: Address = "",
    release: Release = "",
    namespace: Namespace = "",
    token_file: TokenFile = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Lists the cluster's runs, each with its newest job."""
    import json
    from dataclasses import asdict

    from steadyhelm.jobs import runs

    with _cluster(address, release, namespace, token_file) as cluster:
        known = cluster.jobs.list()
    names = dict.fromkeys(job.metadata[runs.RUN] for job in known if runs.RUN in job.metadata)
    found = [job for name in names if (job := runs.newest(known, name)) is not None]
    if as_json:
        typer.echo(json.dumps([asdict(job) for job in found], indent=1))
        return
    for job in found:
        typer.echo(_job_line(job))


def add_to(app: typer.Typer) -> None:
    """Makes the commands ones of ``app``."""
    for command in (submit, status, logs, stop):
        app.command()(command)
    app.command(name="list")(list_runs)


def _checked(file: Path, sets: Sequence[str]) -> RunFile:
    """The run file, where a cluster can run it. Raises ConfigError."""
    from steadyhelm.config.load import code_references, load_run_file
    from steadyhelm.config.place import check_lasting
    from steadyhelm.config.source import dotted
    from steadyhelm.errors import ConfigError

    run_file = load_run_file(file, sets)
    folder = file.resolve().parent
    for place, reference in code_references(run_file):
        code = Path(reference.rpartition(":")[0])
        if not code.is_absolute() and not (folder / code).resolve().is_relative_to(folder):
            raise ConfigError(
                f"{file}: {dotted(place)} is {reference!r}, but only {folder} is sent: move the code there"
            )
    try:
        check_lasting(run_file.store.uri)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error} (--set store.uri=…)") from None
    return run_file


@contextmanager
def _cluster(
    address: str, release: str, namespace: str, token_file: Path | None, status_address: str = ""
) -> Iterator[Cluster]:
    """The cluster that the options name. Raises ConfigError where they name none, UnreachableError."""
    from urllib.parse import urlsplit

    from steadyhelm.errors import ConfigError
    from steadyhelm.jobs import API_PORT, STATUS_PORT, Jobs, api_token
    from steadyhelm.jobs.forward import PortForward, find

    try:
        token = api_token(os.environ, token_file)
    except OSError as error:
        raise ConfigError(f"the token's file {error.filename} cannot be read ({error.strerror})") from None
    file = ("--token-file", str(token_file)) if token_file else ()
    if release:
        again = ("--release", release, *(("--namespace", namespace) if namespace else ()), *file)
        named = find(release, namespace)
        token = token if token_file else _secret_token(named.secret, namespace, token)
        with PortForward(named.cluster, namespace) as forward:
            api, served = (f"http://127.0.0.1:{forward.local[port]}" for port in (API_PORT, STATUS_PORT))
            yield Cluster(
                jobs=Jobs(api, token, ANSWER_S), token=token, status_address=status_address or served, again=again
            )
        return
    if not address:
        raise ConfigError(
            f"no cluster is named: give --address http://host:{API_PORT}, or --release NAME of the cluster chart"
        )
    jobs = Jobs(address, token, ANSWER_S)
    parts = urlsplit(address)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    served = status_address or f"{parts.scheme}://{host}:{STATUS_PORT}"
    yield Cluster(jobs=jobs, token=token, status_address=served, again=("--address", address, *file))


def _secret_token(secret: str, namespace: str, otherwise: str) -> str:
    """The Secret's token; ``otherwise`` where it has none, or where the user has that but may not read the Secret."""
    from steadyhelm.errors import UnreachableError
    from steadyhelm.jobs.forward import secret_token

    try:
        return secret_token(secret, namespace) or otherwise
    except UnreachableError:
        if not otherwise:
            raise
        return otherwise


def _follow(cluster: Cluster, run: str, submission_id: str, *, quiet: bool, log_format: LogFormat) -> int:
    """Shows what the job writes until it ends, or the user leaves; returns the exit code."""
    from steadyhelm.display import Display

    try:
        with Display(live=False if log_format is LogFormat.JSON else None, quiet=quiet) as display:
            _show(cluster.jobs.follow(submission_id), display, log_format)
        job = cluster.jobs.get(submission_id)
    except KeyboardInterrupt:
        typer.echo(f"\nrun {run} goes on without you", err=True)
        _say_how_to_come_back(cluster, run)
        return EXIT_DETACHED
    if job is None or job.status == "SUCCEEDED":
        return 0
    if job.driver_exit_code is None:
        typer.echo(f"job {submission_id}: {job.status}: {job.message}", err=True)
    return _exit_code(job)


def _exit_code(job: Job) -> int:
    """The exit code of the run's driver; 143 for one that was stopped, 1 for one that never began."""
    code = job.driver_exit_code
    if code is None:
        return 143 if job.status == "STOPPED" else 1
    return 128 - code if code < 0 else code


def _warn_of_training_run(last: Job | None, run: str) -> None:
    """Says that a TrainingRun, if it is still there, may send the run that ``last`` drove once more."""
    from steadyhelm.jobs import runs

    if last is not None and last.ended and (owner := last.metadata.get(runs.TRAINING_RUN)):
        typer.echo(f"run {run} was TrainingRun {owner}'s: suspend or delete that, or it sends the run too", err=True)


def _say_how_to_come_back(cluster: Cluster, run: str) -> None:
    where = shlex.join(cluster.again)
    for command, what in (("logs --follow", "listen"), ("status", "see"), ("stop", "stop")):
        typer.echo(f"  to {what}: steadyhelm {command} {shlex.quote(run)} {where}", err=True)


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    """The lines of a text that comes in pieces."""
    rest = ""
    for piece in pieces:
        *whole, rest = (rest + piece).split("\n")
        yield from whole
    if rest:
        yield rest


def _show(pieces: Iterable[str], display: Display, log_format: LogFormat) -> None:
    """Shows a job's log: as it is in JSON, else what the same run here would show."""
    import json
    from dataclasses import replace

    from steadyhelm.telemetry import ServiceState, event_of

    for line in _lines(pieces):
        if log_format is LogFormat.JSON:
            typer.echo(line)
            continue
        try:
            found = json.loads(line) if line.startswith("{") else None
        except ValueError:
            found = None
        event = event_of(found) if isinstance(found, dict) else None
        if isinstance(event, ServiceState):
            event = replace(event, since_s=time.monotonic())  # the cluster's clock is another one
        if event is not None:
            display.update(event)
        elif not isinstance(found, dict):
            typer.echo(line)
        elif "source" in found:
            typer.echo(f"{found.get('source')}: {found.get('message')}")


def _status_of(cluster: Cluster, job: Job) -> tuple[RunStatus | None, str]:
    """The status of the job's run, and why there is none."""
    from steadyhelm.errors import SteadyhelmError
    from steadyhelm.jobs import read_status
    from steadyhelm.telemetry.status import RunStatus

    if job.ended:
        return RunStatus.from_log(cluster.jobs.logs(job.submission_id)), "its log has no status"
    try:
        found = read_status(cluster.status_address, cluster.token)
    except SteadyhelmError as error:
        return None, str(error)
    if found.submission_id not in ("", job.submission_id):
        return None, f"the driver at {cluster.status_address} is {found.submission_id}'s"
    return found, ""


def _job_line(job: Job) -> str:
    began = f", since {datetime.fromtimestamp(job.start_time, UTC):%Y-%m-%d %H:%M:%S} UTC" if job.start_time else ""
    code = f", exit code {_exit_code(job)}" if job.ended and job.driver_exit_code is not None else ""
    owner = f" of TrainingRun {job.metadata['trainingrun']}" if "trainingrun" in job.metadata else ""
    name = job.metadata.get("run", job.submission_id)
    return f"{name}  {job.status.lower()}{code}  job {job.submission_id}{owner}{began}"


def _status_lines(found: RunStatus) -> list[str]:
    facts = [f"{found.phase}, iteration {found.iteration} of {found.iterations}", f"attempt {found.attempt}"]
    if found.version is not None:
        facts.append(f"version {found.version.iteration}.{found.version.attempt}")
    facts += [
        f"{name} {value:.3f}"
        for name, value in (("reward", found.reward), ("accuracy", found.accuracy), ("staleness", found.staleness))
        if value is not None
    ]
    facts.append(f"{found.rollouts.ready} of {found.rollouts.desired} rollouts")
    if found.checkpoint is not None:
        facts.append(f"checkpoint of iteration {found.checkpoint.iteration}")
    lines = [f"  {' · '.join(facts)}", f"  store {found.store}"]
    lines += [f"  waits: {text}" for text in found.waiting]
    lines += [f"  losses: {found.losses}, the last: {found.lost}"] * bool(found.losses)
    lines += [f"  {found.reason}: {found.message}"] if found.reason else [f"  {found.message}"] * bool(found.message)
    return lines

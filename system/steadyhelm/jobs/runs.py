"""Runs as jobs: which job is a run's newest, and how a run is sent once however often it is asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from steadyhelm.errors import ConfigError
from steadyhelm.jobs.client import Job, JobRequest, Jobs, submission_id

RUN, REQUEST, TRAINING_RUN = "run", "request", "trainingrun"
"""Keys of a job's metadata: the run's id, a digest of all that was asked for, and the TrainingRun, as namespace/name,
whose operator sent it and names its jobs in its own way."""


def attempt_of(job: Job, run: str) -> int:
    """Which job of the run it is, from 1, by its submission id; 0 for another run's, and for a TrainingRun's."""
    beginning, _, number = job.submission_id.rpartition(".")
    return int(number) if f"{beginning}.1" == submission_id(run, 1) and number.isdecimal() else 0


def newest(known: Sequence[Job], run: str) -> Job | None:
    """The run's newest job among ``known``, one that has not ended before any that has; None where it has none."""
    own = [job for job in known if attempt_of(job, run) or job.metadata.get(RUN) == run]
    return max(own, key=lambda job: (not job.ended, job.start_time or 0.0, attempt_of(job, run)), default=None)


def named(jobs: Jobs, run: str) -> Job:
    """The newest job of the run with that id, or the job with that submission id. Raises ConfigError for neither."""
    known = jobs.list()
    found = newest(known, run) or next((job for job in known if job.submission_id == run), None)
    if found is None:
        runs = sorted({job.metadata[RUN] for job in known if RUN in job.metadata})
        listed = f"it has {', '.join(runs)}" if runs else "it has none"
        raise ConfigError(
            f"{jobs.address} knows no run {run!r}: {listed}; its finished ones are forgotten with its head"
        )
    return found


def send(jobs: Jobs, run: str, command: str, working_dir: str, metadata: dict[str, str]) -> tuple[Job, bool]:
    """The job that drives the run, and whether it was there already: one that has not ended, or the next attempt.

    Args:
        jobs: the cluster.
        run: the run's id.
        command: what ``entrypoint`` returned.
        working_dir: what ``Jobs.upload`` returned.
        metadata: more about the job, for people.

    Raises ConfigError where the run is being driven by a job that was asked for something else, or by a TrainingRun.
    """
    digest = hashlib.sha256(json.dumps([command, working_dir]).encode()).hexdigest()[:32]
    known = jobs.list()
    there = newest(known, run)
    if there is None or there.ended:
        attempt = max((attempt_of(job, run) for job in known), default=0) + 1
        request = JobRequest(
            submission_id=submission_id(run, attempt),
            entrypoint=command,
            working_dir=working_dir,
            metadata={**metadata, RUN: run, "attempt": str(attempt), REQUEST: digest},
        )
        job, adopted = jobs.submit(request), False
    else:
        job, adopted = there, True
    if TRAINING_RUN in job.metadata:
        raise ConfigError(
            f"run {run!r} is being driven by TrainingRun {job.metadata[TRAINING_RUN]} (job {job.submission_id!r}): "
            "change, suspend or delete that, or give this run an id of its own with --id"
        )
    if job.metadata.get(REQUEST, digest) != digest:
        raise ConfigError(
            f"run {run!r} is being driven by job {job.submission_id!r}, which was sent with another run file, other "
            "code or other options: stop it first, or give this run an id of its own with --id"
        )
    return job, adopted

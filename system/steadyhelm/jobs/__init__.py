"""Runs on a Ray cluster, over its Jobs API: what to send, how to ask, how to listen. Needs no Ray on this machine.

A run is a job for each of its attempts: ``submission_id``. Whoever asks for the same attempt again gets the job that is
there, so every call may be repeated.
"""

from steadyhelm.jobs.client import (
    ENDED,
    Job,
    JobRequest,
    Jobs,
    JobState,
    doubling,
    entrypoint,
    patiently,
    submission_id,
)
from steadyhelm.jobs.head import API_PORT, STATUS_PORT, TOKEN_KEY, token_secret
from steadyhelm.jobs.status import read_status
from steadyhelm.jobs.token import api_token

__all__ = [
    "API_PORT", "ENDED", "STATUS_PORT", "TOKEN_KEY", "Job", "JobRequest", "JobState", "Jobs", "api_token", "doubling",
    "entrypoint", "patiently", "read_status", "submission_id", "token_secret",
]  # fmt: skip

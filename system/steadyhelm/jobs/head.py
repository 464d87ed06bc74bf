"""What stands on a Ray cluster's head for whoever asks it about runs: its ports, and where KubeRay keeps its token."""

from __future__ import annotations

API_PORT = 8265
"""Port of Ray's dashboard, which has the Jobs API."""
STATUS_PORT = 8266
"""Port at which the driver of a run serves its status; the charts open it."""
TOKEN_KEY = "auth_token"  # noqa: S105 - the key's name, not a token
"""Where the Secret that KubeRay makes for a cluster has the token of both."""
_LONGEST_NAME = 50


def token_secret(cluster: str) -> str:
    """Name of the Secret that KubeRay makes for the RayCluster ``cluster``: of a long name it takes the end."""
    end = cluster[-_LONGEST_NAME:]
    return end if end[0].isalpha() else f"r{end[1:]}"

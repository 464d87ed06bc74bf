"""The Ray cluster of a run: one of its own on this machine, or one that somebody else runs."""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import ray

from steadyhelm.config import RunFile
from steadyhelm.errors import ResourceError
from steadyhelm.runtime.folder import session_folder

OBJECT_STORE_BYTES = 100 * 2**20
"""Ray's shared memory. Only keys and small records pass through Ray, so its smallest useful size is plenty."""


START_TRIES = 3
"""How often Ray may try to start here."""
LISTEN_S = 10.0
"""How long the address of a cluster to join may take to accept a connection."""


def environment(run: RunFile, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment of every process of the run: offline, silent about itself, one thread per process on a CPU.

    What ``given``, the user's own environment, says of the former stands; threads are the run file's.
    """
    gpus = run.runtime.gpus_per_learner or run.runtime.gpus_per_engine
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_ARENA_MAX": "2",
    }
    return {name: given.get(name, value) for name, value in defaults.items()} | (
        {} if gpus else {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(run.runtime.threads)}
    )


@contextmanager
def cluster(run: RunFile, address: str = "") -> Iterator[str]:
    """A Ray session for the run; a cluster that it starts itself is gone when the context ends.

    Args:
        run: the run file.
        address: of a cluster to join; empty starts one on this machine, whatever else runs here.

    Yields:
        A folder for the session's own files.

    Raises:
        ResourceError: no room in shared memory, Ray does not start, or no cluster answers at ``address``.
    """
    variables = environment(run)
    os.environ.update(variables)
    # It only writes log lines, from an actor that may sit on a rollout's node and keep that from going.
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    logging.getLogger("ray").setLevel(logging.ERROR)
    if address:
        _require_listener(address)
        # One try: Ray's own default asks a port that answers something else for a quarter of an hour.
        os.environ["RAY_gcs_server_port_wait_time_s"] = "1"  # noqa: SIM112 - Ray's own spelling
        try:
            # No namespace: Ray takes one of its own for each driver, so that two runs of one name do not meet.
            ray.init(address=address, runtime_env={"env_vars": variables}, log_to_driver=False)
        except (ConnectionError, RuntimeError) as error:
            raise _no_cluster(address, error) from error
        try:
            with session_folder() as folder:
                yield folder
        finally:
            ray.shutdown()
        return
    _require_shared_memory()
    with session_folder() as folder:
        try:
            _start_ray(run, folder)
            yield folder
        finally:
            ray.shutdown()


def _start_ray(run: RunFile, folder: str) -> None:
    """Starts Ray here, its processes in this one's environment.

    Tries again where a busy machine took longer than Ray waits for its own processes (30 s, fixed).
    """
    for left in reversed(range(START_TRIES)):
        try:
            ray.init(
                address="local",
                namespace=run.name,
                include_dashboard=False,
                num_cpus=os.cpu_count(),
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level="error",
                _temp_dir=folder,
            )
            return
        except Exception as error:  # Ray raises plain Exception for this
            ray.shutdown()
            if not left:
                raise ResourceError(
                    f"Ray did not start on this machine in {START_TRIES} tries ({error}): try again when it is less "
                    "busy, or join a cluster with --address"
                ) from error


def _require_listener(address: str) -> None:
    """Raises ResourceError where nothing listens at ``host:port``; Ray itself would try for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # "auto": Ray looks for the cluster itself
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=LISTEN_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> ResourceError:
    return ResourceError(
        f"No Ray cluster answers at runtime.address {address!r} ({error}). Start it, or leave the address "
        "empty to run on this machine."
    )


def _require_shared_memory(folder: Path = Path("/dev/shm")) -> None:  # noqa: S108 - the kernel's shared memory
    """Raises ResourceError where Ray's object store does not fit: it would fall back to a disk, or die later."""
    if not folder.is_dir():
        return
    free = shutil.disk_usage(folder).free
    if free < OBJECT_STORE_BYTES:
        raise ResourceError(
            f"{folder} has {free >> 20} MiB free but Ray's object store takes {OBJECT_STORE_BYTES >> 20} MiB: "
            "free some, or start the container with a larger --shm-size."
        )

"""Runs of the digits workload by the command line, and what they cost: for the benchmarks that need whole runs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from steadyhelm.store import open_store
from steadyhelm.telemetry import metrics as names
from steadyhelm.telemetry.metrics_log import MetricsLine, join_segments

WORKLOAD = Path(__file__).resolve().parents[1] / "workloads" / "r1_reward"
SAMPLE_S = 2.0
"""Seconds between two looks at the memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Wall time, and the peak of the memory of the whole tree of processes, shared pages counted once (PSS)."""

    seconds: float
    peak_bytes: int


def steadyhelm(
    command: str, run_file: str, settings: Mapping[str, object], watch: Callable[[int], None] | None = None
) -> Cost:
    """Runs ``steadyhelm <command>`` on a run file of the workload. Raises RuntimeError where it fails.

    ``watch`` is called with the process's id every ``SAMPLE_S`` while it runs.
    """
    words = [sys.executable, "-m", "steadyhelm.cli", command, str(WORKLOAD / run_file), "--quiet"]
    words += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    started, peak = time.perf_counter(), 0
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while process.poll() is None:
            peak = max(peak, tree_bytes(process.pid))
            if watch is not None:
                watch(process.pid)
            try:
                process.wait(SAMPLE_S)
            except subprocess.TimeoutExpired:
                continue
        said = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise RuntimeError(f"steadyhelm {command} failed:\n{said}")
    return Cost(seconds=time.perf_counter() - started, peak_bytes=peak)


def lines_of(folder: Path | str, run: str) -> list[MetricsLine]:
    """The metrics of a run in the store ``folder``, or of that URI, in order."""
    store = open_store(str(folder))
    return join_segments({key: bytes(store.get(key)) for key in store.list(f"{run}/metrics/")})


def evaluations(folder: Path, run: str) -> dict[int, dict[str, float]]:
    """The metrics of a run's evaluations by iteration."""
    return {
        line.iteration: {name: value for name, value in line.metrics.items() if name.startswith("eval/")}
        for line in lines_of(folder, run)
        if names.EVAL_ACCURACY in line.metrics
    }


def tree_bytes(pid: int) -> int:
    """Memory of the process and of all below it, shared pages counted once (PSS); 0 once it has ended."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue  # it has ended meanwhile
    return total

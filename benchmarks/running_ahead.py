"""Running ahead: what an iteration gains where rollouts run one policy version ahead, against its bound.

Real runs of the digits workload by the command line, with one engine and one learner rank, pinned to a core each;
``max_staleness`` 0 and 1 alternate. They begin with a random model, or with ``--model FOLDER``. A side is busy while it
computes (generation; forward, backward and optimiser). Where cores are independent no schedule can be faster than the
slower side:

    bound = iteration(k = 0) / max(busy engine, busy learner)

Cores that share a physical core slow each other down. How much is measured in the same run, with two processes of one
thread each; overlapped work then takes that much longer, which gives the bound of these cores:

    bound = iteration(k = 0) / (slower side + faster side · (slow-down − 1))

The first iterations of each run warm caches and fill the pipeline; they do not count. ``--quick`` makes one short run
of each kind.

``--curves`` trains instead, with k = 0, 1 and 4, with and without the correction, from one cold start, and prints the
held-out accuracy at each evaluation. ``--model FOLDER`` is that cold start (made first where it is not given);
``--store FOLDER`` is where the runs are kept, so that an interrupted measurement goes on; ``--iterations N`` is how
long they are.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import table
import whole_runs
from steadyhelm.config.load import load_run_file
from steadyhelm.telemetry import metrics as names

GOAL = 0.8
WARM = 3
"""Iterations of each run that do not count."""
ENGINE = ("rollout.generate",)
LEARNER = ("learner.proximal", "learner.forward", "learner.backward", "learner.optimizer")
SIDES = {"ray::RolloutActor": 0, "ray::RayTrainWorker": 1}
"""Beginnings of the titles of the processes that compute, and the place of their core among those that we may use."""
SPIN_S = 3.0
"""Seconds that a busy process works for."""
CURVES = ((0, "auto"), (1, "auto"), (4, "auto"), (4, "off"), (1, "off"))
"""``max_staleness`` and ``correction.mode`` of each curve."""
EVAL_EVERY = 10


def pin(pid: int) -> None:
    """Binds the engine and the learner rank among the children of ``pid`` to a core each, all threads of them."""
    cores = sorted(os.sched_getaffinity(0))
    for process in psutil.Process(pid).children(recursive=True):
        try:
            title = " ".join(process.cmdline()[:1])
            places = [place for start, place in SIDES.items() if title.startswith(start)]
            for thread in process.threads() if places else ():
                os.sched_setaffinity(thread.id, {cores[places[0] % len(cores)]})
        except (psutil.Error, ProcessLookupError):
            continue  # it has ended meanwhile


def iterations(folder: Path, model: Path | None, ahead: int, number: int, count: int) -> list[dict[str, float]]:
    """Metrics of the iterations of a run that count. Raises RuntimeError where it fails."""
    settings: dict[str, object] = {
        "name": f"k{ahead}-{number}",
        "model.path": model.absolute() if model else "",
        "model.factory": "null" if model else "tiny_model.py:build",
        "data.eval": "null",
        "rollout.replicas": 1,
        "learner.replicas": 1,
        "schedule.max_staleness": ahead,
        "schedule.eval_every": 0,
        "schedule.iterations": count,
        "store.uri": folder,
    }
    whole_runs.steadyhelm("run", "digits.yaml", settings, watch=pin)
    lines = whole_runs.lines_of(folder, f"k{ahead}-{number}-transformers")
    return [dict(line.metrics) for line in lines if line.iteration > WARM]


def busy_s(lines: Sequence[dict[str, float]], phases: Sequence[str]) -> float:
    """Median over the iterations of the seconds in which one of a side's phases was under way; they do not overlap."""
    return statistics.median(sum(line.get(names.seconds(phase), 0.0) for phase in phases) for line in lines)


def _spin(core: int, barrier: Barrier, answer: SimpleQueue[float]) -> None:
    """Multiplies small matrices on one core, as the tiny model does; answers with the seconds of one round."""
    import torch

    torch.set_num_threads(1)
    os.sched_setaffinity(0, {core})
    left, right = torch.randn(64, 256), torch.randn(256, 256)
    barrier.wait()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < SPIN_S:
        torch.tanh(left @ right)
        done += 1
    answer.put((time.perf_counter() - start) / done)


def _spun(cores: Sequence[int]) -> float:
    """Mean seconds of a round where one busy process runs on each of ``cores``."""
    context = multiprocessing.get_context("spawn")
    barrier, answer = context.Barrier(len(cores)), context.SimpleQueue()
    workers = [context.Process(target=_spin, args=(core, barrier, answer)) for core in cores]
    for worker in workers:
        worker.start()
    found = [answer.get() for _ in workers]
    for worker in workers:
        worker.join()
    return statistics.fmean(found)


def slow_down() -> float:
    """How many times longer the work of one thread takes while another core is as busy; 1 with a single core."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        return 1.0
    alone = statistics.fmean([_spun([core]) for core in cores])
    return max(1.0, _spun(cores) / alone)


def measure(model: Path | None, quick: bool) -> list[table.Row]:
    """Iteration, sides, both bounds, and what of them is reached. Raises RuntimeError where a run fails."""
    rounds, count = (1, WARM + 3) if quick else (3, WARM + 15)
    lines: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    spins = [] if quick else [slow_down()]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for ahead in lines:
                lines[ahead] += iterations(Path(folder), model, ahead, number, count)
    spins.append(slow_down())
    before, after = (statistics.median(line[names.ITERATION_SECONDS] for line in lines[ahead]) for ahead in (0, 1))
    engine, learner = busy_s(lines[0], ENGINE), busy_s(lines[0], LEARNER)
    slower, faster, slow = max(engine, learner), min(engine, learner), statistics.fmean(spins)
    bound, shared = before / slower, before / (slower + faster * (slow - 1))
    speed_up = before / after
    waits = statistics.median(line[names.LEARNER_WAIT] for line in lines[1])
    behind = statistics.fmean(line[names.STALENESS_MEAN] for line in lines[1])

    def shown(name: str, value: float, unit: str) -> table.Row:
        return table.Row(name=name, value=value, unit=unit, goal=None, better="lower" if unit == "s" else "higher")

    return [
        shown("iteration, k = 0", before, "s"),
        shown("iteration, k = 1", after, "s"),
        shown("engine busy, k = 0", engine, "s"),
        shown("learner busy, k = 0", learner, "s"),
        shown("engine busy, k = 1", busy_s(lines[1], ENGINE), "s"),
        shown("learner busy, k = 1", busy_s(lines[1], LEARNER), "s"),
        shown("learner waits for its batch, k = 1", waits, "ratio"),
        shown("age of the tokens, k = 1", behind, "versions"),
        shown("speed-up", speed_up, "ratio"),
        shown("bound of independent cores", bound, "ratio"),
        table.Row(name="share of that bound", value=speed_up / bound, unit="ratio", goal=GOAL, better="higher"),
        shown("slow-down of one busy core by the other", slow, "ratio"),
        shown("bound of these cores", shared, "ratio"),
        table.Row(
            name="share of the bound of these cores", value=speed_up / shared, unit="ratio", goal=GOAL, better="higher"
        ),
    ]


def curves(model: Path | None, store: Path | None, length: int, quick: bool) -> list[table.Row]:
    """Held-out accuracy at each evaluation of the runs of ``CURVES``; the cold start is at 0."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = store or Path(scratch)
        if model is None:
            whole_runs.steadyhelm("sft", "digits_sft.yaml", {"store.uri": folder})
            model = folder / "digits-sft" / "model"
        rows = []
        for ahead, mode in CURVES[: 2 if quick else None]:
            label = f"k{ahead}-{mode}"
            settings = {
                "name": label,
                "model.path": model.absolute(),
                "rollout.replicas": 1,
                "learner.replicas": 1,
                "algorithm.correction.mode": mode,
                "schedule.max_staleness": ahead,
                "schedule.iterations": length,
                "schedule.eval_every": EVAL_EVERY,
                "store.uri": folder,
            }
            whole_runs.steadyhelm("run", "digits.yaml", settings)
            found = whole_runs.evaluations(folder, f"{label}-transformers")
            accuracies = {iteration: metrics[names.EVAL_ACCURACY] for iteration, metrics in sorted(found.items())}
            ages = [
                line.metrics.get(names.STALENESS_MEAN) for line in whole_runs.lines_of(folder, f"{label}-transformers")
            ]
            age = statistics.fmean(age for age in ages if age is not None)
            print(f"{label}: age {age:.2f}, {accuracies}", file=sys.stderr, flush=True)
            title = f"k = {ahead}, correction {'on' if ahead and mode == 'auto' else 'off'}: accuracy after"
            rows += [
                table.Row(name=f"{title} {iteration}", value=value, unit="ratio", goal=None, better="higher")
                for iteration, value in accuracies.items()
            ]
    return rows


def main() -> None:
    """The command line; ``table.main`` takes the flags that all benchmarks have."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--iterations", type=int)
    given, _ = parser.parse_known_args()
    length = given.iterations or load_run_file(whole_runs.WORKLOAD / "digits.yaml", []).schedule.iterations
    what = partial(curves, given.model, given.store, length) if given.curves else partial(measure, given.model)
    table.main(__doc__ or "", what, own=parser)


if __name__ == "__main__":
    main()

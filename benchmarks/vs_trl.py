"""Steadyhelm against TRL's GRPO trainer: tokens trained per second, and peak memory of the whole tree of processes.

Both train the same tiny Qwen2.5-VL (``tiny_model.py``, random weights, float32) on the same prompts of the digits task
in the same order, images included, on the same two cores. An iteration is 32 prompts, 8 completions of each, 40 tokens
a completion, and two optimiser steps of AdamW over 128 completions each: GRPO with rewards scaled by group, β 0, clip
0.2, mean over a sequence's tokens; the reward is ``peers/letters.py``. So that every completion has its 40 tokens, the
end token of the model's folder is one that neither side may sample (Steadyhelm never samples vision tokens; TRL's
``suppress_tokens`` names the same).

TRL (``peers/trl_grpo.py``, versions in ``peers/trl.txt``) runs in the environment that ``.ci/trl`` makes, or by the
interpreter that STEADYHELM_TRL_PYTHON names, and generates by Transformers, as it does without a GPU. It gets no
gradient checkpointing, no evaluation, checkpoints, logs or progress bar, and what is fastest of ``VARIANTS``: one
process with one or two threads, or two processes under ``torch.distributed.run``, with smaller or larger micro-batches;
each is tried first.

Steadyhelm runs ``vs_trl.yaml`` by the command line, with everything that a run always does (batches, commit log and
weights in the store) but for checkpoints on the way, which TRL does not write either. It has what a user would give it
on two cores: two engines and two ranks of one thread each, and micro-batches of 64; at k = 0 generation and learning
take turns, at k = 1 they overlap, with the correction by token.

The three take turns. Tokens per second are the completion tokens over the wall time of the iterations behind ``WARM``;
ratios are of runs of the same round, and all figures medians over the rounds. ``--quick`` makes one short round with
the first variant and without k = 0; where TRL's environment is missing, it says so and measures nothing.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import table
import whole_runs
from steadyhelm.config.load import load_run_file
from steadyhelm.config.run import RunFile
from steadyhelm.data.code_ref import load_code
from steadyhelm.telemetry import metrics as names

HERE = Path(__file__).resolve().parent
RUN_FILE = HERE / "vs_trl.yaml"
END = "<|vision_pad|>"
"""The end token of the model: a vision token, so it is never sampled."""
WARM = 2
"""Iterations of each run that do not count."""
CORES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A way to run TRL on two cores. ``micro_batch`` is of one process."""

    processes: int
    threads: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.processes} × {self.threads} threads, micro-batch {self.micro_batch}"


VARIANTS = (
    Variant(processes=1, threads=1, micro_batch=16),
    Variant(processes=1, threads=2, micro_batch=16),
    Variant(processes=1, threads=2, micro_batch=64),
    Variant(processes=2, threads=1, micro_batch=16),
    Variant(processes=2, threads=1, micro_batch=64),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrlSettings:
    """What TRL's side reads; the sizes are those of the run file."""

    model: str
    iterations: int
    threads: int
    micro_batch: int
    completions: int
    train_batch: int
    samples_per_prompt: int
    max_new_tokens: int
    suppress_tokens: tuple[int, ...]
    lr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Completion tokens trained per second of wall time, and the peak memory of the tree in bytes."""

    tokens_per_s: float
    peak_bytes: int


def trl_python() -> Path | None:
    """The interpreter of TRL's environment; None where it is not made."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steadyhelm" / "trl" / "trl"
    python = Path(os.environ.get("STEADYHELM_TRL_PYTHON") or cache / "bin" / "python")
    return python if python.exists() else None


def prepare(folder: Path, run: RunFile, iterations: int) -> tuple[int, ...]:
    """Writes the model and TRL's prompts, in the order in which Steadyhelm takes them, into ``folder``.

    Returns:
        The tokens that neither side samples.
    """
    from steadyhelm.models.encoder import PromptEncoder

    model = folder / "model"
    assert run.model.factory is not None
    assert run.data.template is not None
    load_code(HERE, run.model.factory)(model, run.seed)
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    generation = json.loads((model / "generation_config.json").read_text())
    encoder = PromptEncoder(model, min_pixels=run.data.min_pixels, max_pixels=run.data.max_pixels)
    end = next(token for token in encoder.banned_ids if encoder.decode([token]) == END)
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"eos_token": END}))
    (model / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": end}))

    template = load_code(HERE, run.data.template)
    rows = []
    pairs = load_code(HERE, run.data.train)()
    for number, pair in enumerate(pairs[: iterations * run.schedule.prompts_per_iteration]):
        (folder / f"{number}.png").write_bytes(pair.images[0])
        rows.append({"text": template(pair.question, *pair.responses), "image": f"{number}.png"})
    (folder / "prompts.json").write_text(json.dumps(rows))
    return encoder.banned_ids


def trl(python: Path, folder: Path, variant: Variant, settings: TrlSettings, warm: int) -> Speed:
    """Runs TRL's side on the prompts in ``folder``. Raises RuntimeError where it fails."""
    (folder / "settings.json").write_text(json.dumps(asdict(settings)))
    words = [str(python)]
    if variant.processes > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={variant.processes}"]
    words += [str(HERE / "peers" / "trl_grpo.py"), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(variant.threads), "HF_HUB_OFFLINE": "1"}
    peak = 0
    with (folder / "trl.out").open("w+") as out, (folder / "trl.err").open("w+") as err:
        with subprocess.Popen(words, stdout=out, stderr=err, env=environment) as process:
            while process.poll() is None:
                peak = max(peak, whole_runs.tree_bytes(process.pid))
                try:
                    process.wait(whole_runs.SAMPLE_S)
                except subprocess.TimeoutExpired:
                    continue
        out.seek(0), err.seek(0)
        said, complaint = out.read(), err.read()
    if process.returncode:
        raise RuntimeError(f"TRL failed with {variant}:\n{said}\n{complaint}")
    lines = [json.loads(line) for line in said.splitlines() if line.startswith('{"')]
    counted = [line for line in lines if line.get("iteration", 0) > warm]
    return _told(f"TRL, {variant}", Speed(tokens_per_s=_speed(counted), peak_bytes=peak))


def _told(name: str, speed: Speed) -> Speed:
    """The same speed, said on stderr: a measurement takes long."""
    print(f"{name}: {speed}", file=sys.stderr, flush=True)
    return speed


def _speed(lines: Sequence[Mapping[str, Any]]) -> float:
    """Tokens of all processes over the seconds of the first."""
    seconds = sum(float(line["seconds"]) for line in lines if line["rank"] == 0)
    return sum(int(line["tokens"]) for line in lines) / seconds


def ours(folder: Path, ahead: int, number: int, iterations: int, warm: int) -> Speed:
    """Runs Steadyhelm's side, ``ahead`` versions ahead. Raises RuntimeError where it fails."""
    name = f"k{ahead}-{number}"
    settings: dict[str, object] = {
        "name": name,
        "model.path": folder / "model",
        "model.factory": "null",
        "schedule.max_staleness": ahead,
        "schedule.iterations": iterations,
        "algorithm.correction.mode": "token" if ahead else "off",
        "store.uri": folder / "store",
    }
    cost = whole_runs.steadyhelm("run", str(RUN_FILE), settings)
    lines = [line for line in whole_runs.lines_of(folder / "store", f"{name}-transformers") if line.iteration > warm]
    tokens = sum(line.metrics[names.LEARNER_TOKENS] for line in lines)
    seconds = sum(line.metrics[names.ITERATION_SECONDS] for line in lines)
    return _told(f"k = {ahead}", Speed(tokens_per_s=tokens / seconds, peak_bytes=cost.peak_bytes))


def measure(quick: bool) -> list[table.Row]:
    """Tokens per second and peak memory of TRL and of Steadyhelm at k = 0 and 1, and their ratios."""
    python = trl_python()
    if python is None:
        remedy = "make it by .ci/trl, or name its interpreter in STEADYHELM_TRL_PYTHON"
        if not quick:
            raise RuntimeError(f"TRL's environment is missing: {remedy}")
        print(f"vs_trl measures nothing, since TRL's environment is missing: {remedy}", file=sys.stderr)
        return []
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    run = load_run_file(RUN_FILE, [])
    rounds, warm, iterations = (1, 1, 3) if quick else (3, WARM, run.schedule.iterations)
    rows: list[table.Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        banned = prepare(folder, run, iterations)

        def peer(variant: Variant, count: int, behind: int) -> Speed:
            settings = TrlSettings(
                model=str(folder / "model"),
                iterations=count,
                threads=variant.threads,
                micro_batch=variant.micro_batch,
                completions=run.rollouts_per_iteration,
                train_batch=run.learner.train_batch,
                samples_per_prompt=run.rollout.samples_per_prompt,
                max_new_tokens=run.rollout.max_new_tokens,
                suppress_tokens=banned,
                lr=run.learner.lr,
            )
            return trl(python, folder, variant, settings, behind)

        best = VARIANTS[0]
        if not quick:
            tried = {variant: peer(variant, 5, 2).tokens_per_s for variant in VARIANTS}
            best = max(tried, key=tried.__getitem__)
            rows += [_shown(f"tried: TRL, {variant}", value, "tokens/s") for variant, value in tried.items()]
        speeds: dict[str, list[Speed]] = {
            side: [] for side in (("TRL", "k = 1") if quick else ("TRL", "k = 0", "k = 1"))
        }
        for number in range(rounds):
            speeds["TRL"].append(peer(best, iterations, warm))
            for side in list(speeds)[1:]:
                speeds[side].append(ours(folder, int(side[-1]), number, iterations, warm))
    return rows + figures(speeds)


def figures(speeds: Mapping[str, Sequence[Speed]]) -> list[table.Row]:
    """The table's rows: each side's medians, and Steadyhelm's over TRL's of the same round."""
    goals = {"k = 0": 1.0, "k = 1": 1.3}
    rows = [
        _shown(f"{side}: tokens trained", statistics.median(speed.tokens_per_s for speed in found), "tokens/s")
        for side, found in speeds.items()
    ]
    for side, found in speeds.items():
        if side in goals:
            ratio = statistics.median(
                mine.tokens_per_s / theirs.tokens_per_s for mine, theirs in zip(found, speeds["TRL"], strict=True)
            )
            rows.append(table.Row(name=f"{side} / TRL", value=ratio, unit="ratio", goal=goals[side], better="higher"))
    for side, found in speeds.items():
        memory = statistics.median(speed.peak_bytes for speed in found) / 1e9
        rows.append(table.Row(name=f"{side}: peak memory", value=memory, unit="GB", goal=None, better="lower"))
    return rows


def _shown(name: str, value: float, unit: str) -> table.Row:
    return table.Row(name=name, value=value, unit=unit, goal=None, better="higher")


if __name__ == "__main__":
    table.main("Steadyhelm against TRL's GRPO trainer on the same two cores.", measure)

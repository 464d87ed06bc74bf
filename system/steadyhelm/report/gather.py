"""The report's records out of a run's store: what the commit log names, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from steadyhelm.config import RunFile
from steadyhelm.data.types import BatchManifest, FinishReason, Rewards, Trajectory
from steadyhelm.report.advantages import batch_advantages
from steadyhelm.report.records import Comparison, Evaluation, ReportData, Sample, Token
from steadyhelm.rewards.response import strict_choice
from steadyhelm.store import ObjectStore
from steadyhelm.store.codec import decode_rewards, decode_rollout
from steadyhelm.store.images import get_image
from steadyhelm.store.layout import RunLayout
from steadyhelm.store.log import LogView
from steadyhelm.telemetry import MetricsLine, join_segments

ITERATIONS_SHOWN = 6
COMPARISONS_SHOWN = 8
Decode = Callable[[Sequence[int]], str]


def read_metrics(store: ObjectStore, run: str) -> list[MetricsLine]:
    """The run's metrics, one line per iteration; of several attempts at an iteration the last one counts."""
    return join_segments({key: bytes(store.get(key)) for key in store.list(RunLayout(run).metrics_prefix)})


def gather(store: ObjectStore, run: str) -> ReportData:
    """Everything that the report of ``run`` shows. Raises ConfigError where there is no such run."""
    layout = RunLayout(run)
    log = LogView(store, run)
    record = log.run_record()
    run_file = RunFile.model_validate(record["run"])
    decode = _decoder(store, layout, run_file)
    evaluations = {int(entry.payload["iteration"]): entry.payload for entry in log.entries if entry.kind == "eval"}
    comparisons, changes = _comparisons(store, layout, evaluations, decode)
    return ReportData(
        run=run,
        config=record["run"],
        versions={"steadyhelm": str(record["steadyhelm"])},
        attempts=log.attempt,
        metrics=tuple(read_metrics(store, run)),
        evaluations=tuple(
            Evaluation(iteration=iteration, metrics=evaluations[iteration]["metrics"])
            for iteration in sorted(evaluations)
        ),
        samples=tuple(
            sample for batch in _spread(log.batches()) for sample in batch_samples(store, run_file, batch, decode)
        ),
        comparisons=tuple(comparisons),
        changes=changes,
        notes=_notes(run_file, decode),
    )


def _notes(run_file: RunFile, decode: Decode | None) -> tuple[str, ...]:
    notes = []
    if not run_file.is_sft:
        notes.append("Advantages are worked out again from each committed batch's rewards and lengths.")
        if run_file.objective.beta > 0:
            notes.append("They leave out the divergence from the reference policy.")
    if decode is None:
        notes.append("The tokenizer was not found, so completions are not split into tokens.")
    return tuple(notes)


def _spread(batches: Sequence[BatchManifest]) -> list[BatchManifest]:
    """At most ``ITERATIONS_SHOWN`` batches, evenly from the first to the last."""
    places = np.linspace(0, len(batches) - 1, min(ITERATIONS_SHOWN, len(batches))).round().astype(int)
    return [batches[place] for place in places]


def batch_samples(store: ObjectStore, run_file: RunFile, batch: BatchManifest, decode: Decode | None) -> list[Sample]:
    """A few trajectories of a batch: the best and the worst, one in the middle, one filtered, one unscored."""
    trajectories: list[Trajectory] = []
    rewards: list[Rewards] = []
    for shard in batch.shards:
        trajectories += decode_rollout(store.read(shard.rollout))
        if shard.reward is not None:
            rewards.append(decode_rewards(store.read(shard.reward)))
    if not rewards:
        return [_sample(store, batch.iteration, trajectories[0], decode, why="the first trace")] if trajectories else []
    total = np.concatenate([part.total for part in rewards])
    scored = np.concatenate([part.valid for part in rewards])
    valid = scored & np.array([ok for shard in batch.shards for ok in shard.kept])
    names = list(rewards[0].components)
    parts = {name: np.concatenate([part.components[name] for part in rewards]) for name in names}
    details = [detail for part in rewards for detail in part.detail]
    lengths, groups = [len(t.tokens) for t in trajectories], [t.prompt.group_id for t in trajectories]
    advantages, filtered = batch_advantages(run_file.objective, total, valid, lengths, groups)
    samples = []
    for index, why in picks(total, valid, filtered, scored & ~valid).items():
        sample = _sample(
            store, batch.iteration, trajectories[index], decode, why, advantages[index] if valid[index] else None
        )
        shown = {name: float(values[index]) for name, values in parts.items() if np.isfinite(values[index])}
        reward = float(total[index]) if valid[index] else None
        samples.append(replace(sample, reward=reward, parts=shown, detail=details[index], filtered=filtered[index]))
    return samples


def picks(
    total: np.ndarray[Any, Any],
    valid: np.ndarray[Any, Any],
    filtered: Sequence[bool],
    dropped: np.ndarray[Any, Any] | None = None,
) -> dict[int, str]:
    """Indices of the samples to show, with the reason; each once, the first reason counts.

    ``dropped`` [N] are those that are not valid although they were scored.
    """
    scored = [int(i) for i in np.argsort(np.where(valid, total, np.inf), kind="stable") if valid[i]]
    chosen: dict[int, str] = {}
    if scored:
        chosen[scored[-1]] = "highest reward"
        chosen.setdefault(scored[0], "lowest reward")
        chosen.setdefault(scored[len(scored) // 2], "median reward")
    zeroed = [i for i, was in enumerate(filtered) if was]
    if zeroed:
        chosen.setdefault(zeroed[0], "filtered")
    stale = np.zeros(len(valid), np.bool_) if dropped is None else dropped
    if stale.any():
        chosen.setdefault(int(np.flatnonzero(stale)[0]), "dropped: too old")
    unscored = np.flatnonzero(~valid & ~stale)
    if len(unscored):
        chosen.setdefault(int(unscored[0]), "unscored")
    return chosen


def _sample(
    store: ObjectStore,
    iteration: int,
    trajectory: Trajectory,
    decode: Decode | None,
    why: str = "",
    advantages: np.ndarray[Any, Any] | None = None,
) -> Sample:
    prompt = trajectory.prompt
    choice = strict_choice(trajectory.completion_text)
    return Sample(
        iteration=iteration,
        prompt_id=prompt.prompt_id,
        prompt=prompt.text,
        label=prompt.label,
        tokens=tokens(trajectory, decode, advantages),
        images=tuple(get_image(store, key) for key in prompt.images),
        finish=trajectory.finish.value,
        meta=prompt.meta,
        correct=choice == prompt.label,
        advantage=None if advantages is None or not len(advantages) else float(advantages[-1]),
        why=why,
    )


def tokens(trajectory: Trajectory, decode: Decode | None, advantages: np.ndarray[Any, Any] | None) -> tuple[Token, ...]:
    """The completion as pieces of text; as one piece where no tokenizer is at hand."""
    ids = [int(token) for token in trajectory.tokens]
    if decode is None:
        whole = None if advantages is None or not len(advantages) else float(advantages[-1])
        return (Token(text=trajectory.completion_text, advantage=whole),)
    traced = trajectory.prompt.trace is not None
    found = []
    for i, text in enumerate(pieces(ids, decode)):
        if i == len(ids) - 1 and trajectory.finish is FinishReason.STOP:
            text = "⏎"  # the end-of-sequence token, which completion_text leaves out
        found.append(
            Token(
                text=text,
                advantage=None if advantages is None else float(advantages[i]),
                probability=None if traced else float(np.exp(trajectory.logprobs[i])),
            )
        )
    return tuple(found)


def pieces(ids: Sequence[int], decode: Decode) -> list[str]:
    """The text that each token adds; a character of several tokens goes to the last of them."""
    found: list[str] = []
    start, shown = 0, ""
    for end in range(1, len(ids) + 1):
        text = decode(ids[start:end])
        if text.endswith("\ufffd") and end < len(ids):
            found.append("")
            continue
        found.append(text[len(shown) :])
        # The last token stays in the window, since a token's text may depend on the one before it.
        start = end - 1
        shown = decode(ids[start:end])
    return found


def _decoder(store: ObjectStore, layout: RunLayout, run_file: RunFile) -> Decode | None:
    """Text of tokens by the run's tokenizer, out of its final model or of the folder that it started from."""
    key, path = f"{layout.model}/tokenizer.json", Path(run_file.model.path or ".") / "tokenizer.json"
    if store.exists(key):
        text = bytes(store.get(key)).decode()
    elif path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))


def _comparisons(
    store: ObjectStore, layout: RunLayout, evaluations: dict[int, dict[str, Any]], decode: Decode | None
) -> tuple[list[Comparison], dict[tuple[bool, bool], int]]:
    """Held-out prompts that the first and the last evaluation both asked."""
    if len(evaluations) < 2:
        return [], {}
    first, last = min(evaluations), max(evaluations)
    before, after = (_answers(store, layout, evaluations[iteration]) for iteration in (first, last))
    changes: dict[tuple[bool, bool], int] = {}
    ranked: dict[tuple[bool, bool], list[tuple[str, bool]]] = {}
    for asked in before:
        if asked in after:
            kind = (_right(before[asked]), _right(after[asked]))
            changes[kind] = changes.get(kind, 0) + 1
            ranked.setdefault(kind, []).append(asked)
    chosen = _round_robin(
        [ranked.get(kind, []) for kind in ((False, True), (True, True), (True, False), (False, False))]
    )
    shown = [
        Comparison(
            before=_sample(store, first, before[asked], decode), after=_sample(store, last, after[asked], decode)
        )
        for asked in chosen[:COMPARISONS_SHOWN]
    ]
    return shown, changes


def _round_robin(queues: Sequence[Sequence[tuple[str, bool]]]) -> list[tuple[str, bool]]:
    """The queues' items, one of each in turn."""
    longest = max((len(queue) for queue in queues), default=0)
    return [queue[i] for i in range(longest) for queue in queues if i < len(queue)]


def _answers(store: ObjectStore, layout: RunLayout, evaluation: dict[str, Any]) -> dict[tuple[str, bool], Trajectory]:
    """The evaluation's trajectories by pair and order; of several samples the first."""
    some = layout.eval_shard(int(evaluation["iteration"]), int(evaluation["attempt"]), 0)
    found: dict[tuple[str, bool], Trajectory] = {}
    for key in store.list(some.rpartition("-")[0] + "-"):
        for trajectory in decode_rollout(store.get(key)):
            found.setdefault((trajectory.prompt.pair_id, trajectory.prompt.swapped), trajectory)
    return found


def _right(trajectory: Trajectory) -> bool:
    return strict_choice(trajectory.completion_text) == trajectory.prompt.label

"""The ledger: what became of every prompt that was issued, derived from the committed batches.

A prompt ends in exactly one record: ``trained``, ``dropped:<reason>``, ``replaced:<id>`` or ``unscored:<policy>``.
A replacement is a prompt of its own, which has to end in a record too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from steadyhelm.data.types import BatchManifest, PromptId
from steadyhelm.errors import FatalError

TRAINED = "trained"
OUTCOMES = frozenset({TRAINED, "dropped", "replaced", "unscored"})
"""What can become of a prompt; all but ``trained`` say more behind a colon."""
NAMED = 10
"""How many ids a message names."""
_REMEDY = (
    "start a new run with --new; if the data set is what it was when this one began, report it as a fault of Steadyhelm"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The end of one prompt: in which iteration, and how. Example: ``Record(iteration=3, outcome="trained")``."""

    iteration: int
    outcome: str


@dataclass(frozen=True, slots=True)
class Ledger:
    """All records by prompt id, in the order of the batches.

    Example: ``Ledger.of(log.batches()).counts() == {"trained": 510, "unscored": 2}``
    """

    records: Mapping[PromptId, Record]

    @classmethod
    def of(cls, batches: Iterable[BatchManifest]) -> Ledger:
        """The ledger of these batches.

        Raises FatalError where a prompt id has two records, where a trained id is in no shard or in two, where a
        sample that a shard holds as valid has another record, or where a replacement or a sample of a shard has none.
        """
        records: dict[PromptId, Record] = {}
        for manifest in batches:
            for prompt_id, outcome in manifest.outcomes.items():
                kind, colon, rest = outcome.partition(":")
                if kind not in OUTCOMES or (kind != TRAINED) != bool(colon and rest):
                    raise _broken(manifest, prompt_id, f"ends as {outcome!r}, which is no outcome")
                if prompt_id in records:
                    raise _broken(manifest, prompt_id, f"ended in iteration {records[prompt_id].iteration} already")
                if kind == "replaced" and PromptId(rest) not in manifest.outcomes:
                    raise _broken(manifest, prompt_id, f"was replaced by {rest!r}, which has no record")
                records[prompt_id] = Record(iteration=manifest.iteration, outcome=outcome)
            _check_shards(manifest)
        return cls(records)

    def check_issued(self, issued: Iterable[PromptId]) -> None:
        """Raises FatalError unless exactly these prompts, and replacements of them, have a record."""
        wanted = set(issued)
        lost = [prompt_id for prompt_id in wanted if prompt_id not in self.records]
        replacements = {
            PromptId(record.outcome.partition(":")[2])
            for record in self.records.values()
            if record.outcome.startswith("replaced:")
        }
        extra = [prompt_id for prompt_id in self.records if prompt_id not in wanted | replacements]
        if lost or extra:
            raise FatalError(
                f"the ledger has no record of {len(lost)} issued prompts ({_named(lost)}) and records of {len(extra)} "
                f"that were not issued ({_named(extra)}): {_REMEDY}"
            )

    def counts(self) -> dict[str, int]:
        """How many prompts ended in each way, by the word before the colon."""
        return dict(Counter(record.outcome.partition(":")[0] for record in self.records.values()))

    def trained(self) -> tuple[PromptId, ...]:
        """The prompts that were trained on, in order."""
        return tuple(prompt_id for prompt_id, record in self.records.items() if record.outcome == TRAINED)


def _check_shards(manifest: BatchManifest) -> None:
    """Compares the outcomes with what the learner is going to train on: the valid samples of the shards."""
    held: set[PromptId] = set()
    valid: set[PromptId] = set()
    for shard in manifest.shards:
        for number, prompt_id in enumerate(shard.prompt_ids):
            if prompt_id in held:
                raise _broken(manifest, prompt_id, "is in its shards twice")
            held.add(prompt_id)
            if shard.kept[number]:
                valid.add(prompt_id)
    trained = {prompt_id for prompt_id, outcome in manifest.outcomes.items() if outcome == TRAINED}
    for prompt_id in sorted(trained - valid):
        raise _broken(manifest, prompt_id, "is recorded as trained, but is no valid sample of its shards")
    for prompt_id in sorted(valid - trained):
        raise _broken(manifest, prompt_id, "is a valid sample of its shards, but is not recorded as trained")
    for prompt_id in sorted(held - manifest.outcomes.keys()):
        raise _broken(manifest, prompt_id, "is in its shards, but has no record")


def _named(prompt_ids: Sequence[PromptId]) -> str:
    """The ids for a message, ``NAMED`` of them at most."""
    more = ", …" if len(prompt_ids) > NAMED else ""
    return ", ".join(sorted(prompt_ids)[:NAMED]) + more or "none"


def _broken(manifest: BatchManifest, prompt_id: PromptId, what: str) -> FatalError:
    return FatalError(f"batch {manifest.iteration}: prompt {prompt_id!r} {what}: {_REMEDY}")

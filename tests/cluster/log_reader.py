"""Reads a run's commit log and says as JSON what is in it: ``python log_reader.py STORE RUN RECORDS``, in a pod.

The log is read by the product's own reader, which verifies each entry's checksum and place; what is counted is counted
here. RECORDS is the size of the training data.
"""

import json
import sys

from steadyhelm.config import RunFile
from steadyhelm.data.cursor import Place, iteration_places
from steadyhelm.report.gather import read_metrics
from steadyhelm.store import open_store
from steadyhelm.store.log import LogView


def told(uri: str, run: str, records: int) -> dict[str, object]:
    """The fields of ``lineage.Lineage``."""
    store = open_store(uri)
    log = LogView(store, run)
    file = RunFile.model_validate(log.run_record()["run"])
    trained: dict[str, int] = {}
    other: dict[str, str] = {}
    for batch in log.batches():
        for name, outcome in batch.outcomes.items():
            if outcome == "trained":
                trained[name] = trained.get(name, 0) + 1
            else:
                other[name] = outcome
    count = file.rollout.samples_per_prompt
    samples = range(count) if count > 1 else (None,)
    places = [
        Place(epoch=place.epoch, index=place.index, sample=sample).prompt_id
        for iteration in range(1, log.last_iteration + 1)
        for place in iteration_places(
            iteration, file.schedule.prompts_per_iteration, records, file.seed, shuffle=file.data.shuffle
        )
        for sample in samples
    ]
    return {
        "attempts": [entry.payload["reason"] for entry in log.entries if entry.kind == "attempt"],
        "iterations": log.last_iteration,
        "trained": trained,
        "issued": places,
        "other": other,
        "metrics": sorted({line.iteration for line in read_metrics(store, run) if line.metrics}),
        "finished": log.finished() is not None,
    }


if __name__ == "__main__":
    print(json.dumps(told(sys.argv[1], sys.argv[2], int(sys.argv[3]))))

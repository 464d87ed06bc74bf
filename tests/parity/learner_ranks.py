"""One rank of a learner group under test: does what a script in a JSON file says and writes down what came of it.

    python learner_ranks.py FOLDER RANK WORLD_SIZE

``FOLDER/script.json`` has the store, the model folder and cases: a run file and operations on one ``LearnerRank``.
Answers go to ``FOLDER/answers-<world size>.json``: per case one answer per operation.
"""

import json
import math
import os
import sys
from pathlib import Path

folder, rank, world_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_SIZE": str(world_size)}

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from steadyhelm.cli import end_at_once  # noqa: E402
from steadyhelm.config import RunFile  # noqa: E402
from steadyhelm.data.types import BatchManifest, CheckpointRecord, ObjectRef, PolicyVersion, WeightsRecord  # noqa: E402
from steadyhelm.errors import SteadyhelmError  # noqa: E402
from steadyhelm.services.learner import LearnerRank, LearnerSpec  # noqa: E402
from steadyhelm.store import open_store  # noqa: E402
from steadyhelm.store.records import from_json, to_json  # noqa: E402
from steadyhelm.weights.codec import decode, encode  # noqa: E402

torch.set_num_threads(1)
script = json.loads((folder / "script.json").read_text())
dist.init_process_group(
    "gloo", init_method=f"file://{folder}/rendezvous-{world_size}", rank=rank, world_size=world_size
)


def answer(learner, operation, argument, place):
    """What the operation answers, as JSON; ``place`` is a key prefix of its own."""
    if operation == "restore":
        record = argument and from_json(CheckpointRecord, argument, "script")
        learner.restore(record)
        return None
    if operation == "step":
        served = learner.step(from_json(BatchManifest, script["manifests"][argument], "script"))
        return {"metrics": dict(served.metrics), "spans": [[s.name, s.computes] for s in served.spans]}
    if operation == "overflow":
        parameters = learner._training._engine.names  # a gradient of the first rank alone
        hook = next(iter(parameters)).register_hook(lambda gradient: gradient * (math.inf if rank == 0 else 1.0))
        try:
            return answer(learner, "step", argument, place)
        finally:
            hook.remove()
    if operation == "publish":
        known = argument and from_json(WeightsRecord, argument, "script")
        served = learner.publish(PolicyVersion(iteration=1, attempt=1), place, known)
        return {"record": to_json(served.value), "metrics": dict(served.metrics)}
    if operation == "save":
        return to_json(learner.save(PolicyVersion(iteration=1, attempt=1), place).value)
    if operation == "export":
        return [to_json(ref) for ref in learner.export(place).value]
    if operation == "poison":
        return to_json(poisoned(from_json(CheckpointRecord, argument, "script"), place))
    if operation == "damage":
        if rank == 0:
            store, key = open_store(script["store"]), argument["objects"][-1]["key"]
            data = bytearray(store.get(key))
            data[-5] ^= 1
            store.put(key, bytes(data))
        dist.barrier()
        return None
    raise ValueError(operation)


def poisoned(record, place):
    """The same checkpoint with a weight that is not a number in it, its checksums right."""
    store = open_store(script["store"])
    state = json.loads(bytes(store.read(record.objects[0])))
    for entry in state["objects"]:
        tensors, _ = decode(store.read(from_json(ObjectRef, entry["ref"], "state")), "checkpoint")
        for name in tensors:
            if name == "master/model.language_model.norm.weight":
                tensors[name][:] = float("nan")
        entry["ref"] = to_json(store.put(f"{place}/{rank}/{entry['rank']}", encode(tensors)))
    refs = tuple(from_json(ObjectRef, entry["ref"], "state") for entry in state["objects"])
    first = store.put(f"{place}/{rank}/state.json", json.dumps(state).encode())
    return CheckpointRecord(version=record.version, objects=(first, *refs))


answers = {}
for name, case in script["cases"].items():
    if world_size not in case["worlds"]:
        continue
    found = answers[name] = []
    try:
        spec = LearnerSpec(
            run=RunFile.model_validate(case["run"]),
            model_folder=script["model"],
            store_uri=script["store"],
            exact_stage=case["exact_stage"],
        )
        learner = LearnerRank(spec, rank, world_size)
        for number, (operation, argument) in enumerate(case["operations"]):
            if (
                isinstance(argument, str) and argument[0] in "$@"
            ):  # "$case/number": this group's answer; "@": one rank's
                one_rank = argument[0] == "@" and world_size > 1
                earlier, _, index = argument[1:].partition("/")
                known = json.loads((folder / "answers-1.json").read_text()) if one_rank else answers
                argument = known[earlier][int(index)]
                argument = argument.get("record", argument)
            try:
                found.append(answer(learner, operation, argument, f"{name}-{world_size}/{number}"))
            except SteadyhelmError as error:
                found.append({"error": type(error).__name__, "message": str(error)})
    except SteadyhelmError as error:
        found.append({"error": type(error).__name__, "message": str(error)})
if rank == 0:
    (folder / f"answers-{world_size}.json").write_text(json.dumps(answers))
elif answers:
    (folder / f"answers-{world_size}-rank{rank}.json").write_text(json.dumps(answers))
dist.destroy_process_group()
end_at_once(0)  # gloo's threads may still hold tensors

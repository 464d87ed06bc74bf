import asyncio
import io
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from steadyhelm.config.run import Data, Model, RunFile, Schedule, TransformersEngine
from steadyhelm.config.run import Rollout as RolloutPart
from steadyhelm.config.weights import LocalTransport, StoreTransport
from steadyhelm.data.types import FinishReason, PolicyVersion, Prompt, PromptId, Sampling, ShardRecord
from steadyhelm.errors import CorruptObjectError, DataError, ModelError, ObjectMissingError, RetryableError
from steadyhelm.models.batch import TokenSequence, collate
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.models.load import load_model
from steadyhelm.models.logprobs import completion_logprobs
from steadyhelm.services import ShardOrder
from steadyhelm.services.reference import ReferenceScorer, ReferenceSpec
from steadyhelm.services.rollout.shards import put_shard
from steadyhelm.services.rollout.traces import TraceRollout
from steadyhelm.services.rollout.worker import RolloutSpec, RolloutWorker, make_encoder
from steadyhelm.store import ObjectStore, open_store
from steadyhelm.store.codec import decode_reference, decode_rollout
from steadyhelm.store.images import put_image
from steadyhelm.telemetry import metrics as names
from steadyhelm.weights.named import named_weights
from steadyhelm.weights.transports import make_sync

VERSION = PolicyVersion(iteration=0, attempt=1)
TRACE = "<think>It is 3.</think><answer>1</answer>"


def picture(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "store"))


def run_file(folder: Path, **data: object) -> RunFile:
    return RunFile(
        name="t",
        model=Model(path=str(folder), dtype="float32"),
        data=Data(train="digits.py:train", max_prompt_tokens=60, **data),
        rollout=RolloutPart(engine=TransformersEngine(batch=4), max_new_tokens=12, temperature=0.9),
        schedule=Schedule(iterations=1),
    )


def spec_of(folder: Path, store: ObjectStore, **data: object) -> RolloutSpec:
    return RolloutSpec.of(run_file(folder, **data), folder=str(folder), store_uri=store.uri, version=VERSION)


@pytest.mark.parametrize("transport", [StoreTransport(), LocalTransport()], ids=["store", "local"])
async def test_published_weights_reach_the_engine_by_the_run_files_transport(
    tiny_model: Path, store: ObjectStore, transport: StoreTransport | LocalTransport
) -> None:
    worker = RolloutWorker.build(replace(spec_of(tiny_model, store), weights=transport))
    publisher = make_sync(transport, store, dtype=torch.float32, threads=1)
    model = load_model(tiny_model, dtype="float32")
    for iteration in (1, 2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        version = PolicyVersion(iteration=iteration, attempt=1)
        applied = await worker.apply_weights(publisher.publish(version, f"t/weights/{version}", named_weights(model)))
        swap = [span.end_s - span.start_s for span in applied.spans if span.name == "swap weights"]
        assert applied.metrics == {names.WEIGHTS_PAUSE_SECONDS: sum(swap)}
        assert len(swap) == 1
    shard = await worker.rollout(order_of(prompts(store, 1), min_version=2))
    assert shard.value.min_version == 2
    await worker.close()
    publisher.close()


@pytest.fixture
async def worker(tiny_model: Path, store: ObjectStore) -> AsyncIterator[RolloutWorker]:
    made = RolloutWorker.build(spec_of(tiny_model, store))
    yield made
    await made.close()


def prompts(store: ObjectStore, number: int = 6, text: str = "Which digit is it?") -> tuple[Prompt, ...]:
    return tuple(
        Prompt(
            prompt_id=PromptId(f"0:{n}"),
            group_id=f"0:{n}",
            pair_id=f"train-{n}",
            text=text,
            images=(put_image(store, picture(n)),),
            label=1,
            swapped=False,
            seed=100 + n,
            trace=TRACE,
        )
        for n in range(number)
    )


def order_of(prompts: tuple[Prompt, ...], **changes: object) -> ShardOrder:
    order = ShardOrder(
        key="t/batches/000001/1-0000.rollout",
        shard=0,
        prompts=prompts,
        sampling=Sampling(max_new_tokens=12, temperature=0.9),
        min_version=0,
    )
    return replace(order, **changes)


async def test_an_order_becomes_a_shard_in_its_own_order_with_spans_and_metrics(
    worker: RolloutWorker, store: ObjectStore
) -> None:
    wanted = prompts(store)
    served = await worker.rollout(order_of(wanted))
    record = served.value
    trajectories = list(decode_rollout(store.read(record.rollout)))
    assert [trajectory.prompt for trajectory in trajectories] == list(wanted)
    assert record.prompt_ids == tuple(prompt.prompt_id for prompt in wanted)
    assert record.num_tokens == sum(len(trajectory.tokens) for trajectory in trajectories) > 6
    assert (record.min_version, record.max_version, record.shard) == (0, 0, 0)
    assert {trajectory.attempt for trajectory in trajectories} == {1}
    assert served.metrics[names.ROLLOUT_SAMPLES] == 6
    assert served.metrics[names.ROLLOUT_TOKENS] == record.num_tokens
    assert served.metrics[names.LENGTH_MAX] == 12
    cut = sum(trajectory.finish is FinishReason.LENGTH for trajectory in trajectories)
    assert served.metrics[names.TRUNCATED_RATE] == pytest.approx(cut / 6)
    assert served.metrics[names.ROLLOUT_TOKENS_PER_S] > 0
    computing = {span.name for span in served.spans if span.computes}
    assert computing == {"generate"}
    assert {"encode", "collate", "decode text", "put shard"} <= {span.name for span in served.spans}
    assert {span.service for span in served.spans} == {"rollout"}


async def test_completion_texts_keep_special_tokens_and_lose_the_end_token(
    worker: RolloutWorker, store: ObjectStore, tiny_model: Path
) -> None:
    record = (await worker.rollout(order_of(prompts(store)))).value
    encoder = PromptEncoder(tiny_model, min_pixels=3136, max_pixels=100352)
    for trajectory in decode_rollout(store.read(record.rollout)):
        assert trajectory.completion_text == encoder.decode(trajectory.tokens)
        assert "<|im_end|>" not in trajectory.completion_text


async def test_the_same_order_again_adopts_its_shard_without_sampling(
    worker: RolloutWorker, store: ObjectStore
) -> None:
    order = order_of(prompts(store))
    first = await worker.rollout(order)
    again = await worker.rollout(order)
    assert again.value == first.value
    assert again.metrics == names.exact(first.metrics)
    assert set(again.metrics) == {
        names.ROLLOUT_SAMPLES,
        names.ROLLOUT_TOKENS,
        names.LENGTH_MEAN,
        names.LENGTH_MAX,
        names.TRUNCATED_RATE,
    }
    assert not [span for span in again.spans if span.computes]


async def test_two_tries_of_one_order_at_the_same_time_agree_on_one_shard(tiny_model: Path, store: ObjectStore) -> None:
    workers = [RolloutWorker.build(spec_of(tiny_model, store)) for _ in range(2)]
    order = order_of(prompts(store))
    first, second = await asyncio.gather(*(worker.rollout(order) for worker in workers))
    assert first.value == second.value
    assert names.exact(first.metrics) == names.exact(second.metrics)
    await asyncio.gather(*(worker.close() for worker in workers))


async def test_a_try_that_comes_second_has_the_metrics_of_the_shard_that_stands(
    worker: RolloutWorker, store: ObjectStore
) -> None:
    order = order_of(prompts(store, 3))
    first = await worker.rollout(order)
    shorter = [
        replace(item, tokens=item.tokens[:2], logprobs=item.logprobs[:2], versions=item.versions[:2])
        for item in decode_rollout(store.read(first.value.rollout))
    ]
    assert put_shard(store, order, shorter).metrics == names.exact(first.metrics)


async def test_another_orders_shard_under_the_key_is_refused(worker: RolloutWorker, store: ObjectStore) -> None:
    six = prompts(store)
    await worker.rollout(order_of(six[:3]))
    with pytest.raises(CorruptObjectError, match="trajectories of other prompts"):
        await worker.rollout(order_of(six[3:]))


async def test_an_overlong_prompt_stops_with_its_id_and_the_remedy(worker: RolloutWorker, store: ObjectStore) -> None:
    long = prompts(store, 1, text="Which digit? " * 30)
    with pytest.raises(
        DataError, match=r"prompt '0:0' \(pair 'train-0'\) has \d+ tokens but data.max_prompt_tokens is 60"
    ):
        await worker.rollout(order_of(long))


async def test_an_overlong_prompt_is_left_out_where_the_run_file_says_drop(
    tiny_model: Path, store: ObjectStore
) -> None:
    worker = RolloutWorker.build(spec_of(tiny_model, store, overlong="drop"))
    wanted = list(prompts(store, 3))
    wanted[1] = replace(wanted[1], text="Which digit? " * 30)
    record = (await worker.rollout(order_of(tuple(wanted)))).value
    assert record.prompt_ids == ("0:0", "0:2")
    all_dropped = order_of((wanted[1],), key="t/batches/000001/1-0001.rollout")
    empty = (await worker.rollout(all_dropped)).value
    assert (empty.prompt_ids, empty.num_tokens) == ((), 0)
    again = await worker.rollout(all_dropped)
    assert again.value == empty
    assert again.metrics == {names.ROLLOUT_SAMPLES: 0.0, names.ROLLOUT_TOKENS: 0.0}
    await worker.close()


async def test_a_newer_policy_than_the_engines_is_waited_for(worker: RolloutWorker, store: ObjectStore) -> None:
    with pytest.raises(RetryableError, match=r"serves policy 0\.1 but the order wants iteration 2"):
        await worker.rollout(order_of(prompts(store), min_version=2))


async def test_a_missing_or_corrupt_image_is_named(worker: RolloutWorker, store: ObjectStore) -> None:
    (good,) = prompts(store, 1)
    corrupt = replace(good, images=(put_image(store, b"\x89PNG no more"),))
    with pytest.raises(DataError, match=r"prompt '0:0' \(pair 'train-0'\): image images/.* cannot be used"):
        await worker.rollout(order_of((corrupt,)))
    missing = replace(good, images=(type(good.images[0])("images/" + "0" * 64),))
    with pytest.raises(ObjectMissingError):
        await worker.rollout(order_of((missing,)))


async def test_orders_that_come_together_are_all_served(worker: RolloutWorker, store: ObjectStore) -> None:
    six = prompts(store)
    orders = [order_of(six[2 * n : 2 * n + 2], key=f"t/batches/000001/1-{n:04d}.rollout", shard=n) for n in range(3)]
    served = await asyncio.gather(*(worker.rollout(order) for order in orders))
    assert [entry.value.shard for entry in served] == [0, 1, 2]
    assert all(sum(span.name == "put shard" for span in entry.spans) == 1 for entry in served)


def test_a_missing_model_folder_is_named(tmp_path: Path, store: ObjectStore) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        RolloutWorker.build(spec_of(tmp_path / "nowhere", store))


async def test_traces_become_trajectories_with_logprobs_of_zero(tiny_model: Path, store: ObjectStore) -> None:
    worker = TraceRollout.build(spec_of(tiny_model, store))
    wanted = prompts(store, 3)
    sampling = Sampling(max_new_tokens=64)
    served = await worker.rollout(order_of(wanted, sampling=sampling))
    trajectories = list(decode_rollout(store.read(served.value.rollout)))
    assert [trajectory.prompt for trajectory in trajectories] == list(wanted)
    for trajectory in trajectories:
        assert trajectory.completion_text == TRACE
        assert trajectory.finish is FinishReason.STOP
        assert not trajectory.logprobs.any()
        assert len(trajectory.logprobs) == len(trajectory.versions) == len(trajectory.tokens)
    assert not [span for span in served.spans if span.computes]
    again = await worker.rollout(order_of(wanted, sampling=sampling))
    assert (again.value, again.metrics) == (served.value, served.metrics)
    assert again.metrics[names.ROLLOUT_TOKENS] == served.value.num_tokens


async def test_a_long_trace_is_cut_and_marked_and_a_missing_one_is_an_error(
    tiny_model: Path, store: ObjectStore
) -> None:
    worker = TraceRollout.build(spec_of(tiny_model, store))
    wanted = prompts(store, 2)
    served = await worker.rollout(order_of(wanted[:1], sampling=Sampling(max_new_tokens=5)))
    (trajectory,) = decode_rollout(store.read(served.value.rollout))
    assert trajectory.finish is FinishReason.LENGTH
    assert len(trajectory.tokens) == 5
    assert served.metrics[names.TRUNCATED_RATE] == 1.0
    bare = (replace(wanted[1], trace=None),)
    with pytest.raises(DataError, match=r"prompt '0:1' \(pair 'train-1'\) has no trace"):
        await worker.rollout(order_of(bare, key="t/batches/000001/1-0001.rollout"))


async def scored(tiny_model: Path, store: ObjectStore, record: ShardRecord) -> list[np.ndarray]:
    spec = ReferenceSpec.of(run_file(tiny_model), folder=str(tiny_model), store_uri=store.uri)
    scorer = ReferenceScorer.build(replace(spec, batch=4))
    served = await scorer.score(record)
    assert served.value.key == record.rollout.key.removesuffix("rollout") + "reference"
    assert {span.name for span in served.spans if span.computes} == {"forward"}
    assert (await scorer.score(record)).value == served.value
    return decode_reference(store.read(served.value))


async def test_the_reference_scores_a_shard_of_its_own_weights_as_the_engine_did(
    worker: RolloutWorker, tiny_model: Path, store: ObjectStore
) -> None:
    record = (await worker.rollout(order_of(prompts(store)))).value
    found = await scored(tiny_model, store, record)
    trajectories = list(decode_rollout(store.read(record.rollout)))
    assert len(found) == len(trajectories)
    for row, trajectory in zip(found, trajectories, strict=True):
        np.testing.assert_allclose(row, trajectory.logprobs, rtol=0, atol=1e-4)


async def test_the_reference_refuses_a_shard_that_was_damaged(
    worker: RolloutWorker, tiny_model: Path, store: ObjectStore
) -> None:
    record = (await worker.rollout(order_of(prompts(store, 2)))).value
    data = bytearray(store.get(record.rollout.key))
    data[len(data) // 2] ^= 1
    store.put(record.rollout.key, bytes(data))
    with pytest.raises(CorruptObjectError):
        await scored(tiny_model, store, record)


async def test_each_token_of_a_shard_was_sampled_by_the_version_that_it_names_also_where_weights_came_in_flight(
    tiny_model: Path, store: ObjectStore
) -> None:
    """The versions differ in the last norm alone, so that keys and values of all of them are the same."""
    spec = spec_of(tiny_model, store)
    worker, publisher = RolloutWorker.build(spec), make_sync(StoreTransport(), store, dtype=torch.float32, threads=1)
    models = [load_model(tiny_model, dtype="float32")]
    records = []
    for iteration in range(1, 9):
        model = load_model(tiny_model, dtype="float32")
        model.load_state_dict(models[-1].state_dict())
        last_norm = [parameter for name, parameter in model.named_parameters() if name.endswith(".norm.weight")][-1]
        with torch.no_grad():
            last_norm.mul_(1.1)
        models.append(model)
        version = PolicyVersion(iteration=iteration, attempt=1)
        records.append(publisher.publish(version, f"t/weights/{version}", named_weights(model)))
    sampling = Sampling(max_new_tokens=200, temperature=0.9)
    order = order_of(prompts(store, 4), sampling=sampling)
    rolling = asyncio.create_task(worker.rollout(order))
    for record in records:
        await asyncio.sleep(0.03)
        await worker.apply_weights(record)
    shard = (await rolling).value
    rows = decode_rollout(store.read(shard.rollout))
    assert len({int(version) for row in rows for version in row.versions}) > 1
    encoder = make_encoder(str(tiny_model), spec.model, spec.data, store)
    for row, oldest in zip(rows, shard.oldest or (shard.min_version,) * len(rows), strict=True):
        assert oldest == int(row.versions.min())
        batch = collate([TokenSequence.of(row)], encoder)
        for version in set(row.versions.tolist()):
            with torch.no_grad():
                found, _, _ = completion_logprobs(
                    models[version], batch, temperature=0.9, banned_ids=encoder.banned_ids
                )
            own = row.versions == version
            np.testing.assert_allclose(row.logprobs[own], found[0].numpy()[own], rtol=0, atol=2e-4)
    assert (shard.min_version, shard.max_version) == (
        min(int(row.versions.min()) for row in rows),
        max(int(row.versions.max()) for row in rows),
    )
    await worker.close()
    publisher.close()

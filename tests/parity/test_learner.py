"""The learner against itself in other layouts, and against the one-process oracle."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from steadyhelm.config import RunFile
from steadyhelm.data.types import CheckpointRecord, FinishReason, ObjectRef, WeightsRecord
from steadyhelm.models.load import load_model
from steadyhelm.store.folders import fetch_folder
from steadyhelm.store.records import from_json
from steadyhelm.telemetry import metrics as names
from steadyhelm.testing.oracle import Oracle, unpadded_logprobs
from steadyhelm.weights.checksum import set_checksum
from steadyhelm.weights.codec import decode
from steadyhelm.weights.local import LocalWeights, sweep
from steadyhelm.weights.named import named_weights
from steadyhelm.weights.store import StoreWeights

pytestmark = pytest.mark.timeout(600)
LAYOUTS = [(ranks, stage) for ranks in (1, 2) for stage in (0, 1, 2, 3)]


def weights(group, record):
    return StoreWeights(group.inputs.store).fetch(from_json(WeightsRecord, record, "answer"))


def checkpoint(group, record):
    """Whole masters and moments of a checkpoint by ``kind/name``, put together from all ranks' fragments."""
    found, objects = {}, from_json(CheckpointRecord, record, "answer").objects
    state = json.loads(bytes(group.inputs.store.read(objects[0])))
    for entry in state["objects"]:
        tensors, _ = decode(group.inputs.store.read(ObjectRef(**entry["ref"])), entry["ref"]["key"])
        for name, start, numel in entry["fragments"]:
            for kind in ("master", "exp_avg", "exp_avg_sq"):
                if f"{kind}/{name}" in tensors:
                    part = tensors[f"{kind}/{name}"]
                    assert part.shape == (numel,)
                    found.setdefault(f"{kind}/{name}", {})[start] = part
    return {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in found.items()}


def stage_of(group, record):
    """The ZeRO stage of the engine that saved a checkpoint."""
    first = from_json(CheckpointRecord, record, "answer").objects[0]
    return json.loads(bytes(group.inputs.store.read(first)))["zero_stage"]


def distance(found, expected):
    """Relative L2 distance of two sets of tensors."""
    assert found.keys() == expected.keys()
    off = sum(float((found[name].double() - expected[name].double()).norm() ** 2) for name in found)
    return (off / sum(float(expected[name].double().norm() ** 2) for name in found)) ** 0.5


def start_weights(group):
    return named_weights(load_model(group.inputs.model, dtype="float32"))


def moved(group, found):
    """How far the weights went from where they started."""
    return {name: found[name] - tensor for name, tensor in start_weights(group).items()}


@pytest.fixture(scope="session")
def oracle(inputs):
    """``oracle(case)``: weights and results after two iterations of the case, in one process."""
    from learner_cases import cases

    def run(name):
        settings = RunFile.model_validate(cases()[name]["run"])
        model = load_model(inputs.model, dtype="float32")
        judge = Oracle(model, settings, unpadded_logprobs(inputs.encoder, settings.rollout.temperature))
        results = []
        for number, batch in inputs.iterations.items():
            usable = np.array([row.finish != FinishReason.ABORT for row in batch.trajectories])
            rows, rewards, reference = batch.trajectories, batch.rewards, batch.reference
            usable &= rewards.valid  # as the manifest says, in supervised fine-tuning too
            rewards = dataclasses.replace(rewards, valid=usable)
            results.append(judge.iterate(number, rows, rewards, reference if settings.uses_reference else None))
        return named_weights(model), results

    return run


@pytest.mark.parametrize(("ranks", "stage"), LAYOUTS)
def test_loss_and_gradient_do_not_depend_on_ranks_stage_and_micro_batches(group, ranks, stage):
    step, saved = group.answers[ranks][f"gradient-{stage}"]
    reference_step, reference_saved = group.answers[1]["gradient-0"]
    assert (stage_of(group, saved), stage_of(group, reference_saved)) == (stage, 0)
    assert step["metrics"][names.LOSS] == pytest.approx(reference_step["metrics"][names.LOSS], rel=1e-5)
    assert step["metrics"][names.GRAD_NORM] == pytest.approx(reference_step["metrics"][names.GRAD_NORM], rel=1e-5)
    # after one step exp_avg is (1 - β₁) times the gradient
    found, expected = checkpoint(group, saved), checkpoint(group, reference_saved)
    gradients = [{n: t for n, t in state.items() if n.startswith("exp_avg/")} for state in (found, expected)]
    assert distance(*gradients) < 1e-5


def test_a_run_on_one_rank_in_fp32_does_without_zero(group):
    for ranks, stage in ((1, 0), (2, 2)):
        step, saved = group.answers[ranks]["as-in-a-run"]
        exact_step, exact_saved = group.answers[ranks][f"gradient-{stage}"]
        assert stage_of(group, saved) == stage_of(group, exact_saved) == stage
        assert step["metrics"][names.LOSS] == pytest.approx(exact_step["metrics"][names.LOSS], rel=1e-5)
        assert distance(checkpoint(group, saved), checkpoint(group, exact_saved)) < 1e-5


@pytest.mark.parametrize(("ranks", "stage"), LAYOUTS)
def test_the_update_is_adamws_of_the_very_gradient(group, ranks, stage):
    _, saved = group.answers[ranks][f"gradient-{stage}"]
    state = checkpoint(group, saved)
    settings = group_run("gradient-0").learner
    begin = {name: tensor.flatten() for name, tensor in start_weights(group).items()}
    updates, expected = {}, {}
    for name, tensor in begin.items():
        parameter = torch.nn.Parameter(tensor.double())
        parameter.grad = state[f"exp_avg/{name}"].double() / (1 - settings.betas[0])
        torch.optim.AdamW(
            [parameter], lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        ).step()
        expected[name] = parameter.detach()
        updates[name] = state[f"master/{name}"]
    assert distance(updates, expected) < 1e-6
    # What they moved by: a master of size 1 is rounded by 6e-8, and moves by lr
    moved, wanted = ({n: t.double() - begin[n] for n, t in state.items()} for state in (updates, expected))
    assert distance(moved, wanted) < 3e-5


def group_run(name):
    from learner_cases import cases

    return RunFile.model_validate(cases()[name]["run"])


@pytest.mark.parametrize("name", ["stable-0", "stable-1", "stable-2", "stable-3", "grpo", "release", "sft"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_two_iterations_are_those_of_the_one_process_oracle(group, oracle, name, ranks):
    expected, results = oracle(name)
    *steps, published = group.answers[ranks][name]
    for step, result in zip(steps, results, strict=True):
        found = step["metrics"]
        assert found[names.LOSS] == pytest.approx(np.mean(result.losses), rel=1e-4, abs=1e-6)
        assert found[names.GRAD_NORM] == pytest.approx(np.mean(result.grad_norms), rel=1e-4)
        if name != "sft":
            tokens = found[names.LEARNER_TOKENS]
            epochs = group_run(name).algorithm.epochs
            assert found[names.ADVANTAGE_MEAN] == pytest.approx(result.mean, rel=1e-5)
            assert found[names.ADVANTAGE_STD] == pytest.approx(result.std, rel=1e-5)
            assert found[names.FILTER_LOW] * tokens / epochs == pytest.approx(result.filtered_low)
            assert found[names.FILTER_HIGH] * tokens / epochs == pytest.approx(result.filtered_high)
            assert found[names.CLIP_FRACTION] * tokens == pytest.approx(result.clip_hits)
            assert found[names.PRE_CLIP_HITS] * tokens == pytest.approx(result.pre_clip_hits)
    found = weights(group, published["record"])
    assert distance(moved(group, found), moved(group, expected)) < 1e-4


def test_ranks_write_the_weights_into_one_file_in_shared_memory(group):
    expected = start_weights(group)
    for ranks in (1, 2):
        (published,) = group.answers[ranks]["local"]
        assert len(published["record"]["objects"]) == 1
        found = LocalWeights(group.inputs.store).fetch(from_json(WeightsRecord, published["record"], "answer"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    sweep()  # the ranks have ended without a word


def test_recomputed_activations_change_nothing(group):
    plain = weights(group, group.answers[1]["stable-2"][2]["record"])
    recomputed = weights(group, group.answers[1]["recomputed"][2]["record"])
    assert distance(moved(group, recomputed), moved(group, plain)) < 1e-4


def test_frozen_parameters_stay_and_take_no_part_in_checkpoints(group):
    begin, _, _, end, saved = group.answers[1]["frozen"]
    before, after = weights(group, begin["record"]), weights(group, end["record"])
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith("model.visual")}
    assert len(same) > 0
    assert not any("model.visual" in name for name in checkpoint(group, saved))


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (1, 2), (1, 3), (2, 0), (2, 2), (2, 3)])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(group, ranks, stage):
    answers = group.answers[ranks][f"resume-{stage}"]
    first, _, second, published, _, resumed, republished, _, again_first, again_second, again = answers
    for here, there in ((second, resumed), (first, again_first), (second, again_second)):
        exact = {name for name in here["metrics"] if names.describe(name).exact}
        assert {name: here["metrics"][name] for name in exact} == {name: there["metrics"][name] for name in exact}
    assert republished["record"]["checksum"] == published["record"]["checksum"]
    assert again["record"]["checksum"] == published["record"]["checksum"]


@pytest.mark.parametrize(("name", "ranks"), [("moved", 1), ("moved", 2), ("moved-back", 1), ("moved-back", 2)])
def test_a_checkpoint_is_taken_up_by_other_ranks_and_stages(group, name, ranks):
    _, _, published = group.answers[ranks][name]
    expected = weights(group, group.answers[1]["resume-2"][3]["record"])
    found = weights(group, published["record"])
    assert distance(moved(group, found), moved(group, expected)) < 1e-4


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_damaged_checkpoint_is_refused_and_the_learner_starts_over(group, ranks):
    _, _, refused, restored, *steps, published = group.answers[ranks]["damaged"]
    assert refused["error"] == "CorruptObjectError"
    assert restored is None
    stable = group.answers[ranks]["resume-2"]
    assert [step["metrics"][names.LOSS] for step in steps] == [stable[n]["metrics"][names.LOSS] for n in (0, 2)]
    assert published["record"]["checksum"] == stable[3]["record"]["checksum"]


def test_a_damaged_checkpoint_is_refused_on_every_rank(group):
    assert group.other_rank["damaged"][2]["error"] == "CorruptObjectError"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_reward_that_is_no_number_stops_before_anything_is_applied(group, ranks):
    before, failed, after, *_ = group.answers[ranks]["nan-reward"]
    assert failed["error"] == "NonFiniteError"
    assert "prompts 1:2 " in failed["message"]
    assert after == {**before, "metrics": after["metrics"]}


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_engines_log_prob_that_is_no_number_stops_before_anything_is_applied(group, ranks):
    (failed,) = group.answers[ranks]["nan-logprobs"]
    assert failed["error"] == "NonFiniteError"
    assert "log-probs of prompts 1:2 " in failed["message"]


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_is_no_number_stops_all_ranks_and_leaves_nothing_behind(group, ranks, stage):
    _, _, _, before, failed, after, _, *steps, published = group.answers[ranks][f"nan-weights-{stage}"]
    assert failed["error"] == "NonFiniteError"
    assert "iteration 1: the loss of the optimiser step on prompts 1:0, " in failed["message"]
    assert after["record"] == before["record"]
    if ranks == 2:
        assert group.other_rank[f"nan-weights-{stage}"][4] == failed
    assert_clean(group, ranks, stage, steps, published)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_gradient_that_is_not_finite_on_one_rank_stops_all_and_leaves_nothing_behind(group, ranks, stage):
    before, failed, after, *steps, published = group.answers[ranks][f"inf-gradient-{stage}"]
    assert failed["error"] == "NonFiniteError"
    assert "iteration 1: the gradient of the optimiser step on prompts 1:" in failed["message"]
    assert after["record"] == before["record"]
    if ranks == 2:
        assert group.other_rank[f"inf-gradient-{stage}"][1] == failed
    assert_clean(group, ranks, stage, steps, published)


def assert_clean(group, ranks, stage, steps, published):
    """The two steps are those of a learner to which nothing ever happened."""
    clean = group.answers[ranks][f"resume-{stage}"]
    assert [step["metrics"][names.LOSS] for step in steps] == [clean[n]["metrics"][names.LOSS] for n in (0, 2)]
    assert published["record"]["checksum"] == clean[3]["record"]["checksum"]


@pytest.mark.parametrize("stage", [2, 3])
def test_bfloat16_steps_fp32_masters_close_to_the_fp32_run(group, stage):
    for ranks in (1, 2):
        *steps, published, saved = group.answers[ranks][f"bf16-{stage}"]
        exact = group.answers[1]["stable-2"]
        for step, other in zip(steps, exact[:2], strict=True):
            assert step["metrics"][names.GRAD_NORM] == pytest.approx(other["metrics"][names.GRAD_NORM], rel=0.1)
        found, masters = weights(group, published["record"]), checkpoint(group, saved)
        assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
        for name, tensor in found.items():
            master = masters[f"master/{name}"]
            assert master.dtype == torch.float32
            assert torch.equal(master.bfloat16(), tensor.flatten())
        assert any(not torch.equal(m, m.bfloat16().float()) for n, m in masters.items() if n.startswith("master/"))


def test_a_freeze_prefix_of_no_parameter_is_refused(group):
    (answer,) = group.answers[1]["strange-prefix"]
    assert answer["error"] == "ConfigError"
    assert "'visual'" in answer["message"]


@pytest.mark.parametrize(("name", "ranks"), [("export", 1), ("export-3", 2)])
def test_an_exported_model_is_a_folder_like_the_one_it_came_from(group, name, ranks, tmp_path):
    _, published, refs = group.answers[ranks][name]
    fetch_folder(group.inputs.store, [ObjectRef(**ref) for ref in refs], f"{name}-{ranks}/2", tmp_path)
    files = {file.name for file in tmp_path.iterdir()}
    assert {file.name for file in group.inputs.model.iterdir()} <= files
    exported = named_weights(load_model(tmp_path, dtype="float32"))
    assert set_checksum(exported) == published["record"]["checksum"]
    assert "model.safetensors" in files
    assert load_file(tmp_path / "model.safetensors")


def test_spans_count_forward_backward_and_optimiser_as_computing_and_nothing_else(group):
    step = group.answers[1]["stable-2"][0]
    spans = dict(step["spans"])
    assert spans == {
        "read": False,
        "images": False,
        "input": False,
        "collate": False,
        "proximal": True,
        "forward": True,
        "backward": True,
        "optimizer": True,
    }


def test_metrics_speak_of_the_whole_batch(group):
    for ranks in (1, 2):
        found = group.answers[ranks]["stable-2"][0]["metrics"]
        rows = group.inputs.iterations[1].trajectories
        lengths = [len(row.tokens) for row in rows]
        counted = [n for i, n in enumerate(lengths) if i not in (4, 9)]
        assert found[names.LEARNER_TOKENS] == sum(counted)
        assert found[names.LEARNER_STEPS] == 2
        assert found[names.LENGTH_MEAN] == pytest.approx(np.mean(lengths))
        assert found[names.TRUNCATED_RATE] == 0.5
        assert found[names.STALENESS_MAX] == 0
        assert found[names.LR] == pytest.approx(2e-3)
        assert 0.5 < found[names.LOGPROB_GAP_MEAN] < found[names.LOGPROB_GAP_MAX]
        assert found[names.CORRECTION_MEAN] == 1.0

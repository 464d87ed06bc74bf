import numpy as np
import pytest
import torch
from steadyhelm.algorithms.objective import advantages
from steadyhelm.config.algorithm import DrGrpo, Filter, Grpo, ReinforcePP, Rloo, StableReinforce
from steadyhelm.report.advantages import batch_advantages

ALGORITHMS = {
    "stable_reinforce": StableReinforce(),
    "release": StableReinforce(normalization="release", filter=Filter(mode="release")),
    "narrow filter": StableReinforce(filter=Filter(k=0.7)),
    "by sequence, discounted": StableReinforce(weighting="sequence", gamma=0.9),
    "reinforce_pp": ReinforcePP(reward_clip=1.0),
    "grpo": Grpo(),
    "dr_grpo": DrGrpo(),
    "rloo": Rloo(),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_reports_advantages_are_the_learners(name: str):
    objective = ALGORITHMS[name]
    random = np.random.default_rng(3)
    rewards = random.choice([0.0, 0.5, 1.5, 2.0], 24).astype(np.float32)
    rewards[:4] = 1.5  # a group that compares nothing
    valid = random.random(24) < 0.85
    rewards[~valid] = np.nan
    lengths = random.integers(1, 9, 24)
    groups = np.repeat(np.arange(6), 4)
    mask = torch.arange(8)[None] < torch.tensor(lengths)[:, None]
    exact = advantages(objective, torch.tensor(rewards), None, torch.tensor(groups), mask, torch.tensor(valid))
    values, filtered = batch_advantages(objective, rewards, valid, lengths.tolist(), [str(g) for g in groups])
    for i, length in enumerate(lengths):
        np.testing.assert_allclose(values[i], exact.values[i, :length].numpy(), rtol=1e-5, atol=1e-6)
        assert filtered[i] == (bool(valid[i]) and not bool(exact.keep[i, :length].all()))
    assert any(np.abs(v).max() > 0.1 for v in values)


def test_the_papers_example_of_the_filter():
    rewards = np.array([1.0] * 255 + [0.0], dtype=np.float32)
    values, filtered = batch_advantages(
        StableReinforce(), rewards, np.ones(256, dtype=bool), [1] * 256, [str(i) for i in range(256)]
    )
    assert values[0][0] == pytest.approx(0.06262243, abs=1e-6)
    assert values[255][0] == 0.0
    assert filtered == [False] * 255 + [True]


def test_a_batch_of_equal_rewards_or_without_a_valid_sample_moves_nothing():
    rewards = np.array([1.5, 1.5, np.nan], dtype=np.float32)
    values, filtered = batch_advantages(
        StableReinforce(), rewards, np.array([True, True, False]), [2, 3, 1], ["a", "b", "c"]
    )
    assert [v.tolist() for v in values] == [[0.0, 0.0], [0.0, 0.0, 0.0], [0.0]]
    assert filtered == [False, False, False]
    values, _ = batch_advantages(StableReinforce(), rewards, np.zeros(3, dtype=bool), [1, 1, 1], ["a", "b", "c"])
    assert [v.tolist() for v in values] == [[0.0], [0.0], [0.0]]

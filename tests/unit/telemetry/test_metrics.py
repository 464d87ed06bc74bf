import pytest
from steadyhelm.telemetry import metrics


def test_every_metric_has_a_meaning_and_a_prometheus_name_of_its_own():
    names = [metrics.prometheus_name(name)[0] for name in metrics.METRICS]
    assert len(set(names)) == len(names)
    for name, metric in metrics.METRICS.items():
        assert metric.name == name
        assert metric.help


@pytest.mark.parametrize(
    ("name", "exposed", "labels"),
    [
        ("reward/mean", "steadyhelm_reward_mean", {}),
        ("learner/kl", "steadyhelm_learner_kl_nats", {}),
        ("rollout/tokens", "steadyhelm_rollout_tokens", {}),
        ("rollout/tokens_per_s", "steadyhelm_rollout_tokens_per_s", {}),
        ("learner/clip_fraction", "steadyhelm_learner_clip_fraction_ratio", {}),
        ("reward/politeness", "steadyhelm_reward_part", {"part": "politeness"}),
        ("seconds/learner.backward", "steadyhelm_phase_seconds", {"phase": "learner.backward"}),
        ("seconds/iteration", "steadyhelm_phase_seconds", {"phase": "iteration"}),
    ],
)
def test_prometheus_names_follow_from_the_metric(name: str, exposed: str, labels: dict[str, str]):
    assert metrics.prometheus_name(name) == (exposed, labels)


def test_a_name_of_no_group_is_refused():
    with pytest.raises(KeyError):
        metrics.describe("nonsense/x")
    with pytest.raises(KeyError):
        metrics.describe("learner/losss")


def test_what_a_resumed_run_repeats_has_no_clock_in_it():
    values = {
        metrics.REWARD_MEAN: 1.0,
        metrics.reward_part("custom"): 0.5,
        metrics.seconds("rollout"): 2.0,
        metrics.OVERHEAD_SHARE: 0.1,
        metrics.LEARNER_TOKENS_PER_S: 9.0,
        metrics.REPLAYED: 1.0,
    }
    assert metrics.exact(values) == {"reward/mean": 1.0, "reward/custom": 0.5}

import pytest
from steadyhelm.data.types import PolicyVersion
from steadyhelm.errors import ConfigError, StoreError
from steadyhelm.store.layout import RunLayout, ShardName, image_key

DIGITS = RunLayout("digits")
VERSION = PolicyVersion(iteration=12, attempt=3)


def test_names_are_those_of_the_architecture():
    assert DIGITS.run_file == "digits/run.json"
    assert DIGITS.log_entry(7) == "digits/log/00000007"
    assert DIGITS.shard(12, 1, 0, "rollout") == "digits/batches/000012/1-0000.rollout"
    assert DIGITS.eval_shard(12, 1, 3) == "digits/eval/000012/1-0003.rollout"
    assert DIGITS.weights(VERSION) == "digits/weights/000012.3"
    assert DIGITS.checkpoint(VERSION) == "digits/checkpoints/000012.3"
    assert DIGITS.metrics(2, 5) == "digits/metrics/2-5.jsonl"
    assert (DIGITS.report, DIGITS.model) == ("digits/report", "digits/model")
    assert image_key("9f" * 32) == "images/" + "9f" * 32


def test_names_are_read_back():
    for kind in ("rollout", "reference", "reward"):
        name = ShardName(iteration=1_234_567, attempt=12, shard=12_345, kind=kind)
        assert DIGITS.parse_shard(DIGITS.shard(1_234_567, 12, 12_345, kind)) == name
    assert DIGITS.parse_shard(DIGITS.eval_shard(1, 2, 3)).evaluation
    assert DIGITS.parse_version(DIGITS.weights(VERSION) + "/anchor-0000.safetensors") == VERSION
    assert DIGITS.parse_version(DIGITS.checkpoint(VERSION)) == VERSION


@pytest.mark.parametrize("key", ["other/batches/000001/1-0000.rollout", "digits/batches/1/1-0000.rollout", "digits"])
def test_other_names_are_refused(key):
    with pytest.raises(StoreError, match="is not the key of a shard of run 'digits'"):
        DIGITS.parse_shard(key)


@pytest.mark.parametrize("run", ["", "images", "a/b", "..", ".a", "a b", "x" * 101])
def test_a_run_is_one_part_of_a_key_and_not_the_images(run):
    with pytest.raises(ConfigError, match="a run cannot be called"):
        RunLayout(run)

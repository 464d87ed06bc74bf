from pathlib import Path
from typing import get_args

import pytest
from steadyhelm.config.algorithm import Algorithm, Filter, Kl, PreClip
from steadyhelm.config.load import diff_run_files, load_run_file
from steadyhelm.errors import ConfigError

GOOD = """\
name: digits
version: 1
seed: 0
model: {path: runs/model, dtype: float32}
data: {train: task.py:train_pairs, eval: task.py:eval_pairs}
algorithm: {type: stable_reinforce, beta: 0.0, filter: {k: 3.0}, clip: 0.2}
rollout: {engine: {type: transformers}, replicas: 1}
reward:
  terms:
    - {type: format, weight: 0.5}
    - {type: choice, weight: 1.0}
learner: {train_batch: 64, micro_batch: 16, lr: 1e-4, max_norm: 1}
schedule: {prompts_per_iteration: 128, iterations: 60}
"""
TASK = """\
def train_pairs():
    hidden = 1
    return []
if True:
    eval_pairs = train_pairs
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(TASK)
    return tmp_path


def load(folder: Path, *edits: tuple[str, str], sets: tuple[str, ...] = ()):
    text = GOOD
    for old, new in edits:
        assert old in text
        text = text.replace(old, new, 1)
    path = folder / "run.yaml"
    path.write_text(text)
    return load_run_file(path, sets)


def errors(folder: Path, *edits: tuple[str, str], sets: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(folder, *edits, sets=sets)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def test_a_good_file_loads_with_numbers_of_either_notation(folder: Path):
    run_file = load(folder)
    assert run_file.learner.lr == 0.0001
    assert run_file.learner.max_norm == 1.0
    assert [term.type for term in run_file.reward.terms] == ["format", "choice"]


CASES = {
    "an unknown key proposes the near one": (
        [("micro_batch: 16", "micro_bach: 16")],
        "run.yaml:12: learner.micro_bach is not a known key: did you mean 'micro_batch'?",
    ),
    "a key in the wrong part proposes where it belongs": (
        [("seed: 0", "zero_stage: 1")],
        "run.yaml:3: zero_stage is not a known key: did you mean 'learner.zero_stage'?",
    ),
    "a key like no other lists those that exist": (
        [("replicas: 1", "qqq: 1")],
        "run.yaml:7: rollout.qqq is not a known key: remove it; rollout has deadline_s, drain_deadline_s, engine, "
        "max_new_tokens, replicas, samples_per_prompt, scaling, temperature",
    ),
    "bounds of the engines' number that have changed places": (
        [("replicas: 1", "scaling: {min: 3, max: 2}")],
        "run.yaml:7: rollout.scaling.min is 3, but rollout.scaling.max is 2: lower the former or raise the latter",
    ),
    "a key of other variants names them": (
        [("{type: stable_reinforce, beta: 0.0, filter: {k: 3.0}, clip: 0.2}", "{type: rloo, gamma: 0.5}")],
        "run.yaml:6: algorithm.gamma is not a known key: remove it, or set algorithm.type to 'stable_reinforce' or "
        "'reinforce_pp', which has it",
    ),
    "a key of another variant in a list names that one, and the list is not called empty": (
        [("    - {type: choice, weight: 1.0}\n", ""), ("type: format", "lines: 3, type: format")],
        "run.yaml:10: reward.terms.0.lines is not a known key: remove it, or set reward.terms.0.type to "
        "'consistency', which has it",
    ),
    "an empty list": (
        [("\n    - {type: format, weight: 0.5}\n    - {type: choice, weight: 1.0}", " []")],
        "run.yaml:9: reward.terms is []: give at least 1 element(s), not 0",
    ),
    "a quoted number is text": (
        [("micro_batch: 16", 'micro_batch: "16"')],
        "run.yaml:12: learner.micro_batch is '16': give a whole number",
    ),
    "a truth value is no count": (
        [("replicas: 1", "replicas: true")],
        "run.yaml:7: rollout.replicas is true: give a whole number",
    ),
    "half a sequence is no batch": (
        [("train_batch: 64", "train_batch: 6.5")],
        "run.yaml:12: learner.train_batch is 6.5: give a whole number",
    ),
    "text is no number": ([("lr: 1e-4", "lr: fast")], "run.yaml:12: learner.lr is 'fast': give a number"),
    "infinity is no number": ([("k: 3.0", "k: .inf")], "run.yaml:6: algorithm.filter.k is inf: give a finite number"),
    "a bound is named": ([("seed: 0", "seed: -1")], "run.yaml:3: seed is -1: give a number of at least 0"),
    "a word out of a set": (
        [("dtype: float32", "dtype: float23")],
        "run.yaml:4: model.dtype is 'float23': give 'float32' or 'bfloat16'; did you mean 'float32'?",
    ),
    "an unknown variant lists the variants": (
        [("type: stable_reinforce", "type: stable_reenforce")],
        "run.yaml:6: algorithm.type is 'stable_reenforce': its values are 'stable_reinforce', 'reinforce_pp', 'grpo', "
        "'dr_grpo', 'rloo', 'sft'; did you mean 'stable_reinforce'?",
    ),
    "a variant in a list is named by its index": (
        [("type: choice", "type: chioce")],
        "run.yaml:11: reward.terms.1.type is 'chioce': its values are 'format', 'choice', 'consistency', 'custom'; "
        "did you mean 'choice'?",
    ),
    "a variant without its type": (
        [("type: choice, ", "")],
        "run.yaml:11: reward.terms.1.type is missing: add it; its values are 'format', 'choice', 'consistency', "
        "'custom'",
    ),
    "a missing field says what it is": (
        [(", iterations: 60", "")],
        "run.yaml:13: schedule.iterations is missing: add 'iterations:' to schedule (Iterations of the run)",
    ),
    "a missing field of a variant": (
        [("type: choice, weight: 1.0", "type: custom, code: task.py:train_pairs")],
        "run.yaml:11: reward.terms.1.name is missing: add 'name:' to reward.terms.1 "
        "(Name of the component in metrics and reports)",
    ),
    "a part that is a number": (
        [("{k: 3.0}", "3")],
        "run.yaml:6: algorithm.filter is 3: give a mapping, as {key: value}",
    ),
    "a part that is empty": (
        [("schedule: {prompts_per_iteration: 128, iterations: 60}", "schedule:")],
        "run.yaml:13: schedule is empty: give a mapping, as {key: value}",
    ),
    "a list that is a number": (
        [("train_batch: 64", "betas: 0.9")],
        "run.yaml:12: learner.betas is 0.9: give a list, as [a, b]",
    ),
    "a list that is too short": (
        [("train_batch: 64", "betas: [0.9]")],
        "run.yaml:12: learner.betas.1 is missing: the list learner.betas needs at least 2 elements",
    ),
    "text of the wrong form says what it means": (
        [("name: digits", "name: My Run")],
        "run.yaml:1: name is 'My Run': give text of the form ^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$ "
        "(Name of the run: lower-case letters, digits and dashes, at most 40)",
    ),
    "a code file that is not there": (
        [("task.py:train_pairs", "tsk.py:train_pairs")],
        "run.yaml:5: data.train is 'tsk.py:train_pairs': there is no file tsk.py: paths start at the run file's folder",
    ),
    "a name that the code file lacks": (
        [("task.py:train_pairs", "task.py:hidden")],
        "run.yaml:5: data.train is 'task.py:hidden': task.py defines no 'hidden' at its top level: define it, "
        "or name another",
    ),
    "a key given twice": (
        [("beta: 0.0", "beta: 0.0, beta: 1.0")],
        "run.yaml:6: algorithm.beta is given twice, first in line 6: keep one of the two",
    ),
    "a key that is no text": ([("seed: 0", "3: 0")], "run.yaml:3: the key 3 is not text: put it in quotes"),
    "an alias": (
        [("seed: 0", "seed: &a 0"), ("beta: 0.0", "beta: *a")],
        "run.yaml:6: column 43: not YAML: a run file has no aliases: write the value out",
    ),
    "a tag that would run code": (
        [("seed: 0", "seed: !!python/object/apply:os.system [ls]")],
        "run.yaml:3: the tag 'tag:yaml.org,2002:python/object/apply:os.system' is not read: remove it",
    ),
    "broken YAML": ([("seed: 0", "seed: [0")], "run.yaml:4: column 6: not YAML: expected ',' or ']', but got ':'"),
    "a batch larger than an iteration": (
        [("train_batch: 64", "train_batch: 640")],
        "run.yaml:12: learner.train_batch is 640, but an iteration has only 128 rollouts: lower it, "
        "or raise schedule.prompts_per_iteration",
    ),
    "groups of one": (
        [("type: stable_reinforce", "type: grpo")],
        "run.yaml:7: rollout.samples_per_prompt is 1, but algorithm.type 'grpo' compares samples of one prompt: "
        "set it to 2 or more",
    ),
    "a shard smaller than a group": (
        [("{type: transformers}, replicas: 1", "{type: transformers, batch: 4}, samples_per_prompt: 6")],
        "run.yaml:7: rollout.engine.batch is 4, but a shard holds all 6 samples of a prompt "
        "(rollout.samples_per_prompt): raise the former or lower the latter",
    ),
    "a bound on age that nothing reaches": (
        [("iterations: 60", "iterations: 60, max_staleness: 1, drop_staler_than: 1")],
        "run.yaml:13: schedule.drop_staler_than is 1, but no token is more than schedule.max_staleness (1) versions "
        "old, so it would drop nothing: lower it, or leave it out",
    ),
    "no model at all": (
        [("path: runs/model, ", "")],
        "run.yaml:4: model.path or model.factory: neither is given, give exactly one of the two",
    ),
    "pixels upside down": (
        [("data: {", "data: {min_pixels: 100, max_pixels: 50, ")],
        "run.yaml:5: data.min_pixels is 100, but data.max_pixels is 50: lower the former or raise the latter",
    ),
    "a type that the learner does not train in": (
        [("dtype: float32", "dtype: float16")],
        "run.yaml:4: model.dtype is 'float16': give 'float32' or 'bfloat16'; did you mean 'bfloat16'?",
    ),
    "a decay rate of an optimiser that would diverge": (
        [("train_batch: 64", "betas: [2, 0.9]")],
        "run.yaml:12: learner.betas.0 is 2: give a number below 1.0",
    ),
    "clip-higher that is lower": (
        [("clip: 0.2", "clip: 0.2, clip_high: 0.1")],
        "run.yaml:6: algorithm.clip_high is 0.1, below algorithm.clip, which is 0.2: raise the former or lower the "
        "latter",
    ),
    "a warm-up longer than the run": (
        [("lr: 1e-4", "warmup_steps: 121")],
        "run.yaml:12: learner.warmup_steps is 121, but the run has only 120 optimiser steps, so the rate would never "
        "reach learner.lr: lower it, or raise schedule.iterations",
    ),
    "evaluations of nothing": (
        [(", eval: task.py:eval_pairs", ""), ("iterations: 60", "iterations: 60, eval_every: 5")],
        "run.yaml:13: schedule.eval_every is 5, but there are no held-out pairs: name them in data.eval, or set it "
        "to 0",
    ),
    "traces whose responses change places": (
        [("{type: stable_reinforce, beta: 0.0, filter: {k: 3.0}, clip: 0.2}", "{type: sft}")],
        "run.yaml:5: data.swap is 'random', but algorithm.type 'sft' imitates traces, which name the responses by "
        "their place: set data.swap to 'none'",
    ),
    "consistency with nothing that it could be multiplied by": (
        [("type: choice, weight: 1.0", "type: consistency")],
        "run.yaml:8: reward.combine is 'r1_reward', which multiplies consistency by choice, but reward.terms has no "
        "choice term: add one, or set reward.combine to 'sum'",
    ),
    "two terms of one name": (
        [("type: choice", "type: format")],
        "run.yaml:11: reward.terms.1 is a second 'format' beside reward.terms.0: remove one, or give a custom term "
        "another name",
    ),
    "a term named like one of ours": (
        [("type: choice, weight: 1.0", "type: custom, name: mean, code: task.py:train_pairs")],
        "run.yaml:11: reward.terms.1.name is 'mean', which Steadyhelm uses itself: choose another",
    ),
    "a format that does not exist yet": ([("version: 1", "version: 2")], "run.yaml:2: version is 2: give 1"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_file_is_answered_with_place_value_and_remedy(folder: Path, case: str):
    edits, message = CASES[case]
    assert errors(folder, *edits) == [message]


def test_all_errors_are_listed_in_the_order_of_the_file(folder: Path):
    found = errors(folder, ("micro_batch: 16", "micro_bach: 16"), ("seed: 0", "seed: x"), ("clip: 0.2", "clip: 2"))
    assert [line.split(": ")[0] for line in found] == ["run.yaml:3", "run.yaml:6", "run.yaml:12"]


def test_a_file_that_is_not_there_or_not_text_or_not_a_mapping(tmp_path: Path):
    path = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match=r"run.yaml: there is no such file: give the path of a run file"):
        load_run_file(path)
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        load_run_file(tmp_path)
    path.write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match="byte 6 is not UTF-8"):
        load_run_file(path)
    path.write_text("- 1")
    with pytest.raises(ConfigError, match=r":1: the document is a list, not a mapping"):
        load_run_file(path)
    path.write_text("")
    with pytest.raises(ConfigError, match="name is missing: add 'name:' to the run file"):
        load_run_file(path)


def test_overrides_replace_values_of_the_file_and_of_defaults_and_list_elements(folder: Path):
    sets = (
        "learner.lr=1e-5",
        "reward.terms.1.weight=2",
        "rollout.engine.batch=8",
        "learner.betas.0=0.8",
        "algorithm={type: reinforce_pp, gamma: 0.5}",
        "store.uri=a=b",
    )
    run_file = load(folder, sets=sets)
    assert run_file.learner.lr == 1e-5
    assert run_file.reward.terms[1].weight == 2.0
    assert run_file.rollout.engine.batch == 8
    assert run_file.learner.betas == (0.8, 0.95)
    assert run_file.algorithm.type == "reinforce_pp"
    assert run_file.algorithm.gamma == 0.5
    assert run_file.store.uri == "a=b"


def test_an_override_opens_the_default_of_a_variant_that_the_file_leaves_out(folder: Path):
    line = "algorithm: {type: stable_reinforce, beta: 0.0, filter: {k: 3.0}, clip: 0.2}\n"
    assert load(folder, (line, ""), sets=("algorithm.beta=0.1",)).algorithm.type == "stable_reinforce"


@pytest.mark.parametrize("variant", get_args(get_args(Algorithm)[0]))
def test_setting_the_type_of_a_union_that_the_file_leaves_out_gives_that_variants_own_defaults(folder: Path, variant):
    line = "algorithm: {type: stable_reinforce, beta: 0.0, filter: {k: 3.0}, clip: 0.2}\n"
    kind = variant.model_fields["type"].default
    sets = (f"algorithm.type={kind}", "rollout.samples_per_prompt=2", "data.swap=none")
    assert load(folder, (line, ""), sets=sets).algorithm == variant()


def test_setting_the_type_of_a_default_list_element_gives_that_variants_own_defaults(folder: Path):
    terms = GOOD[GOOD.index("reward:") : GOOD.index("learner:")]
    run_file = load(folder, (terms, ""), sets=("reward.terms.2={type: custom, name: a, code: task.py:train_pairs}",))
    assert [term.type for term in run_file.reward.terms] == ["format", "choice", "custom"]
    run_file = load(folder, (terms, ""), sets=("reward.combine=sum", "reward.terms.1.mode=release"))
    assert run_file.reward.terms[1].mode == "release"
    sets = ("reward.terms.1={type: format}", "reward.terms.0.type=choice", "reward.terms.2.weight=1")
    assert [term.weight for term in load(folder, (terms, ""), sets=sets).reward.terms] == [1.0, 0.5, 1.0]


def test_a_part_given_in_part_keeps_the_defaults_of_where_it_stands(folder: Path):
    samples = ("replicas: 1}", "replicas: 1, samples_per_prompt: 2}")
    edit = ("{type: stable_reinforce, beta: 0.0, filter: {k: 3.0}, clip: 0.2}", "{type: grpo, kl: {estimator: k1}}")
    assert load(folder, edit, samples).algorithm.kl == Kl(estimator="k1", placement="loss")
    edit = (edit[0], "{type: reinforce_pp, pre_clip: {max: 9}, filter: {mode: paper}}")
    algorithm = load(folder, edit).algorithm
    assert (algorithm.pre_clip, algorithm.filter) == (PreClip(enabled=False, max=9), Filter())


def test_opening_a_part_whose_default_is_not_its_classs_keeps_what_the_override_does_not_name(folder: Path):
    edit = ("{type: stable_reinforce, beta: 0.0, filter: {k: 3.0}, clip: 0.2}", "{type: reinforce_pp}")
    algorithm = load(folder, edit, sets=("algorithm.filter.k=2", "algorithm.pre_clip.max=9")).algorithm
    assert algorithm.filter == Filter(mode="none", k=2)
    assert algorithm.pre_clip == PreClip(enabled=False, max=9)


OVERRIDES = {
    "learner.lr": "not an override: write --set path.to.key=value",
    "learner..lr=1": "not an override: write --set path.to.key=value",
    "lerner.lr=3": "lerner is not a known key: did you mean 'learner'?",
    "learner.lrr=3": "learner.lrr is not a known key: did you mean 'lr'?",
    "learner.lr=x": "learner.lr is 'x': give a number",
    "learner.lr=": "learner.lr is '': give a number",
    "learner=3": "learner is 3: give a mapping, as {key: value}",
    "learner={lrr: 3}": "learner.lrr is not a known key: did you mean 'lr'?",
    "seed.a=1": "seed is 0 and has no 'a': set seed itself",
    "algorithm.0=1": "algorithm is not a list: give one of its keys in place of 0",
    "reward.terms.9.weight=2": "reward.terms is a list of 2: give an index below 2",
    "reward.terms.x=2": "reward.terms is a list of 2: give an index below 2",
    "schedule.iterations=[1": "not YAML: expected ',' or ']', but got '<stream end>'",
    "store.uri=": "store.uri is empty: give a folder, like 'runs'",
    "store.uri=ftp://a/b": "store.uri 'ftp://a/b' has the unknown scheme 'ftp': give a folder, 'file:///…' or 's3://…'",
    "store.uri=file://host/a": "store.uri 'file://host/a' names a host: write 'file:///' and an absolute path",
    "store.uri=s3://[": "store.uri is no URI: write it as s3://bucket/prefix?endpoint=https://host:port&region=name",
    "data.train=gone.py:f": "data.train is 'gone.py:f': there is no file gone.py: paths start at the run file's folder",
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_wrong_override_is_named_instead_of_a_line(folder: Path, override: str):
    assert errors(folder, sets=(override,)) == [f"--set {override}: {OVERRIDES[override]}"]


def test_the_difference_of_two_run_files_is_one_line_per_value(folder: Path):
    old = load(folder)
    new = load(folder, sets=("learner.lr=2e-4", "reward.terms=[{type: format, weight: 0.5}]", "store.uri=other"))
    assert diff_run_files(old, new) == [
        "learner.lr: 0.0001 → 0.0002",
        'reward.terms.1.mode: "strict" → (absent)',
        'reward.terms.1.type: "choice" → (absent)',
        "reward.terms.1.weight: 1.0 → (absent)",
        'store.uri: "runs" → "other"',
    ]
    assert diff_run_files(old, load(folder)) == []


def test_a_run_that_runs_ahead_is_corrected_unless_it_says_otherwise(folder: Path):
    ahead = ("iterations: 60", "iterations: 60, max_staleness: 1")
    assert load(folder).objective.correction.mode == "off"
    assert load(folder, ahead).objective.correction.mode == "token"
    assert load(folder, ahead).warnings == load(folder).warnings == ()
    off = load(folder, ahead, sets=("algorithm.correction.mode=off",))
    assert off.objective.correction.mode == "off"
    (warning,) = off.warnings
    assert warning.startswith("schedule.max_staleness is 1 and algorithm.correction.mode is 'off'")


def test_a_mode_that_auto_stands_for_is_no_change_and_another_one_is(folder: Path):
    ahead = ("iterations: 60", "iterations: 60, max_staleness: 1")
    written = load(folder, sets=("algorithm.correction.mode=off",))
    assert diff_run_files(written, load(folder)) == []
    assert diff_run_files(load(folder, ahead, sets=("algorithm.correction.mode=token",)), load(folder, ahead)) == []
    assert diff_run_files(load(folder), load(folder, ahead)) == [
        'algorithm.correction.mode: "off" → "token"',
        "schedule.max_staleness: 0 → 1",
    ]

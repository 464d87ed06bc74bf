import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """\
name: digits
model: {path: nowhere/model}
data: {train: task.py:train_pairs}
algorithm: {type: stable_reinforce}
schedule: {prompts_per_iteration: 128, iterations: 60}
learner: {train_batch: 64}
"""
TASK = """\
from steadyhelm.data.types import PreferencePair

def train_pairs():
    yield PreferencePair(pair_id="a-1", question="Which digit?", responses=("It is 3.", "It is 5."), label=2,
                         images=(b"12345",), trace="<think>I see 5.</think><answer>2</answer>")
    yield PreferencePair(pair_id="a-2", question="Odd?", responses=("yes", "no"), label=3)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(TASK)
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def steadyhelm(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "steadyhelm.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_validate_says_what_the_file_describes(file: Path):
    done = steadyhelm("validate", file)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"{file} is valid: digits, stable_reinforce, 60 iterations of 128 rollouts, 120 optimiser steps",
        "note: model.path 'nowhere/model' is no folder yet; it must exist when the run starts",
    ]


def test_a_wrong_file_is_one_line_per_error_on_stderr_and_exit_code_2(file: Path):
    done = steadyhelm("validate", file, "--set", "learner.lrr=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("steadyhelm: --set learner.lrr=1: learner.lrr is not a known key: did you mean 'lr'?\n")


def test_debug_shows_the_traceback_too(file: Path):
    done = steadyhelm("validate", file, "--set", "learner.lrr=1", "--debug")
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1].startswith("steadyhelm: --set")


def test_sft_refuses_another_algorithm(file: Path):
    done = steadyhelm("sft", file)
    assert done.returncode == 2
    assert "algorithm.type is 'stable_reinforce': 'steadyhelm sft' takes 'sft'" in done.stderr


def test_data_shows_prompts_and_stops_at_a_wrong_record(file: Path):
    done = steadyhelm("data", file)
    assert done.returncode == 2
    assert "── a-1 · better: 2 · images: 5 bytes" in done.stdout
    assert "[Response 2]\nIt is 5." in done.stdout
    assert "── trace\n<think>I see 5.</think><answer>2</answer>" in done.stdout
    assert "record 1 (pair_id 'a-2'): label is 3; label must be 1 or 2" in done.stderr


def test_data_without_held_out_pairs_says_what_to_add(file: Path):
    done = steadyhelm("data", file, "--eval")
    assert done.returncode == 2
    assert "data.eval is not given" in done.stderr


@pytest.mark.parametrize("command", [["report"], ["gc"], ["gc", "--dry-run"]])
def test_a_run_that_does_not_exist_is_exit_code_2_and_nothing_is_made(tmp_path: Path, command: list[str]):
    done = steadyhelm(*command, tmp_path / "runs" / "digits")
    assert done.returncode == 2
    assert done.stderr.startswith("steadyhelm: there is no run 'digits' in file:///")
    assert list(tmp_path.iterdir()) == []


def test_schema_prints_json_and_version_a_version():
    assert json.loads(steadyhelm("schema").stdout)["properties"]["learner"]["$ref"].endswith("/Learner")
    assert steadyhelm("version").stdout == "0.1.0\n"


def test_an_unknown_option_is_exit_code_2(file: Path):
    assert steadyhelm("validate", file, "--nonsense").returncode == 2


WATCH = """
import sys
from steadyhelm.cli import main
sys.argv = ["steadyhelm", *sys.argv[1:]]
try:
    main()
finally:
    heavy = {"torch", "ray", "transformers", "deepspeed", "sklearn", "prometheus_client", "rich", "boto3"}
    print("HEAVY", sorted(heavy & set(sys.modules)))
"""


LIGHT = [["--help"], ["run", "--help"], ["validate", "FILE"], ["schema"], ["data", "FILE"], ["report", "FILE"]]


@pytest.mark.parametrize("arguments", LIGHT)
def test_light_commands_import_no_heavy_module(file: Path, arguments: list[str]):
    command = [sys.executable, "-c", WATCH, *(str(file) if word == "FILE" else word for word in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


RAY = """
import atexit, sys, threading, time, types
from steadyhelm.cli import main
sys.modules["ray"] = types.ModuleType("ray")
threading.Thread(target=time.sleep, args=(600,)).start()
atexit.register(print, "exit functions")
sys.argv = ["steadyhelm", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize(("sets", "code"), [((), 0), (("--set", "learner.lrr=1"), 2)])
def test_a_process_that_had_ray_in_it_runs_its_exit_functions_and_waits_for_no_thread(
    file: Path, sets: tuple[str, ...], code: int
):
    command = [sys.executable, "-c", RAY, "validate", str(file), *sets]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (code, "exit functions")
    assert ("lrr is not a known key" in done.stderr) == bool(code)

"""The command lines and environments that engine servers are started with."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from steadyhelm.config import RunFile
from steadyhelm.data.types import PolicyVersion
from steadyhelm.engines.process import Launch
from steadyhelm.services.rollout.worker import SERVERS, RolloutSpec, _server_spec, make_encoder
from steadyhelm.store import open_store

SIZE = {"vllm": "--tensor-parallel-size", "sglang": "--tp-size"}


def run_file(gpus: float = 0.0, **engine: Any) -> RunFile:
    return RunFile.model_validate(
        {
            "name": "fake",
            "model": {"path": "unused", "dtype": "bfloat16"},
            "data": {"train": "unused.py:pairs", "max_prompt_tokens": 100},
            "rollout": {"engine": {"python": "python3", **engine}, "max_new_tokens": 28},
            "schedule": {"iterations": 1},
            "runtime": {"gpus_per_engine": gpus},
        }
    )


def launch(model: Path, run: RunFile, device: str = "cuda") -> Launch:
    engine = run.rollout.engine
    spec = RolloutSpec.of(
        run,
        folder=str(model),
        store_uri=str(model.parent / "store"),
        version=PolicyVersion(iteration=0, attempt=1),
        device=device,
    )
    encoder = make_encoder(spec.folder, spec.model, spec.data, open_store(spec.store_uri))
    _, plan = SERVERS[engine.type]
    return plan(_server_spec(spec, engine, encoder))(30000, "key")


def after(launch: Launch, flag: str) -> list[str]:
    """What stands behind each occurrence of the flag."""
    words = launch.command
    return [words[place + 1] for place, word in enumerate(words) if word == flag]


@pytest.mark.parametrize("server", sorted(SIZE))
def test_a_model_is_cut_over_as_many_gpus_as_the_run_file_says(tiny_model: Path, server: str) -> None:
    four = launch(tiny_model, run_file(gpus=4, type=server, tensor_parallel_size=4))
    assert after(four, SIZE[server]) == ["4"]
    one = launch(tiny_model, run_file(gpus=1, type=server))
    assert after(one, SIZE[server]) == ["1"]


@pytest.mark.parametrize("server", sorted(SIZE))
def test_a_model_in_one_piece_may_have_a_part_of_a_gpu(tiny_model: Path, server: str) -> None:
    assert after(launch(tiny_model, run_file(gpus=0.5, type=server)), SIZE[server]) == ["1"]


@pytest.mark.parametrize("server", sorted(SIZE))
def test_the_run_files_own_arguments_and_variables_come_last(tiny_model: Path, server: str) -> None:
    given = ("--pipeline-parallel-size", "2", "--dtype", "float16")
    made = launch(tiny_model, run_file(type=server, args=given, environment={"HF_HUB_OFFLINE": "0"}))
    assert made.command[-4:] == given
    assert after(made, "--dtype") == ["bfloat16", "float16"]
    assert made.environment["HF_HUB_OFFLINE"] == "0"


@pytest.mark.parametrize(("server", "length"), [("vllm", "--max-model-len"), ("sglang", "--context-length")])
def test_a_server_has_room_for_the_longest_prompt_with_its_completion(
    tiny_model: Path, server: str, length: str
) -> None:
    assert after(launch(tiny_model, run_file(type=server)), length) == ["128"]


@pytest.mark.parametrize(("server", "only_on_a_cpu"), [("vllm", "--enforce-eager"), ("sglang", "--disable-cuda-graph")])
def test_what_makes_a_server_run_without_a_gpu_stays_away_from_gpus(
    tiny_model: Path, server: str, only_on_a_cpu: str
) -> None:
    assert only_on_a_cpu in launch(tiny_model, run_file(type=server), "cpu").command
    on_a_gpu = launch(tiny_model, run_file(gpus=1, type=server))
    assert only_on_a_cpu not in on_a_gpu.command
    assert "--attention-backend" not in on_a_gpu.command
    assert "VLLM_CPU_KVCACHE_SPACE" not in on_a_gpu.environment


@pytest.mark.parametrize("server", sorted(SIZE))
def test_a_model_cut_over_more_gpus_than_its_actor_has_is_refused(server: str) -> None:
    with pytest.raises(ValidationError, match=r"tensor_parallel_size is 4, but a rollout actor has 2 GPUs"):
        run_file(gpus=2, type=server, tensor_parallel_size=4)

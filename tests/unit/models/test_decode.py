from pathlib import Path

import numpy as np
import pytest
import torch
from steadyhelm.data.types import Completion, EngineRequest, PolicyVersion, PromptId, Sampling
from steadyhelm.errors import NonFiniteError
from steadyhelm.models.decode import Decoding
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.models.load import load_model

from .pictures import picture

VERSION = PolicyVersion(iteration=3, attempt=1)


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> PromptEncoder:
    return PromptEncoder(tiny_model, min_pixels=3136, max_pixels=100352)


def requests_of(encoder: PromptEncoder, number: int) -> list[EngineRequest]:
    image = picture(1, 56, 56)
    return [
        EngineRequest(
            prompt_id=PromptId(str(n)),
            prompt_tokens=encoder.encode("Which digit? " * (1 + n % 3), [image]),
            images=(image,),  # type: ignore[arg-type]  # bytes stand for a key here
            seed=n,
        )
        for n in range(number)
    ]


def run(decoding: Decoding) -> dict[str, Completion]:
    done: list[Completion] = []
    while not decoding.finished:
        done += decoding.advance(VERSION)
    return {completion.prompt_id: completion for completion in done}


def test_rows_that_finished_leave_the_cache_and_the_others_go_on_as_if_alone(
    tiny_model: Path, encoder: PromptEncoder
) -> None:
    model = load_model(tiny_model, dtype="float32")
    sampling = Sampling(max_new_tokens=180)  # longer than a cache buffer grows at once
    requests = requests_of(encoder, 16)
    decoding = Decoding(model, encoder, requests, sampling)
    found = run(decoding)
    assert len(decoding._rows) < 16
    longest = sorted(requests, key=lambda request: len(found[request.prompt_id].tokens))[-4:]
    for request in longest:
        alone = run(Decoding(model, encoder, [request], sampling))[request.prompt_id]
        np.testing.assert_array_equal(found[request.prompt_id].tokens, alone.tokens)
        np.testing.assert_allclose(found[request.prompt_id].logprobs, alone.logprobs, rtol=0, atol=1e-5)


def test_one_prompt_is_computed_once_however_many_samples_it_has(tiny_model: Path, encoder: PromptEncoder) -> None:
    model = load_model(tiny_model, dtype="float32")
    rows: list[int] = []
    model.model.register_forward_hook(lambda _module, _args, output: rows.append(len(output.last_hidden_state)))
    decoding = Decoding(model, encoder, requests_of(encoder, 12), Sampling(max_new_tokens=2))
    run(decoding)
    assert rows == [3]


def test_weights_that_are_not_finite_end_the_run_instead_of_sampling_noise(
    tiny_model: Path, encoder: PromptEncoder
) -> None:
    model = load_model(tiny_model, dtype="float32")
    with torch.no_grad():
        model.model.language_model.norm.weight[0] = float("nan")
    for greedy in (False, True):
        decoding = Decoding(model, encoder, requests_of(encoder, 2), Sampling(max_new_tokens=2, greedy=greedy))
        with pytest.raises(NonFiniteError, match=r"policy 3\.1 gives prompt '0' a log-prob of nan at token 0"):
            decoding.advance(VERSION)

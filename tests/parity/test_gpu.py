"""On a CUDA device the policy has the numbers that it has on the CPU, in trainer and engine."""

import numpy as np
import pytest
import torch
from steadyhelm.data.types import EngineRequest, PolicyVersion, PromptId, Sampling, WeightsRecord
from steadyhelm.models.batch import TokenSequence, collate
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.models.load import load_model
from steadyhelm.models.logprobs import completion_logprobs
from steadyhelm.services.rollout.transformers import TransformersEngine
from steadyhelm.weights.mirror import Mirror
from steadyhelm.weights.named import named_weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def encoder(tiny_model):
    return PromptEncoder(tiny_model, min_pixels=3136, max_pixels=100352)


def rows_of(encoder):
    rng = np.random.default_rng(0)
    legal = np.setdiff1d(np.arange(encoder.vocab_size), encoder.banned_ids)
    return [
        TokenSequence(
            prompt_tokens=encoder.encode("Which digit? " * n, ()),
            tokens=rng.choice(legal, 5 * n).astype(np.int32),
            images=(),
            name=str(n),
        )
        for n in range(1, 5)
    ]


def test_log_probs_and_gradients_are_those_of_the_cpu(tiny_model, encoder):
    found = []
    for device in ("cpu", "cuda"):
        model = load_model(tiny_model, dtype="float32", device=device)
        batch = collate(rows_of(encoder), encoder).to(device)
        logprobs, _, _ = completion_logprobs(model, batch, temperature=0.8, banned_ids=encoder.banned_ids)
        logprobs.sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((logprobs.detach().cpu(), gradient.cpu()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-3)
    assert (found[1][1] - found[0][1]).norm() / found[0][1].norm() < 1e-3


async def test_the_engine_samples_from_the_trainers_distribution(tiny_model, encoder):
    version = PolicyVersion(iteration=1, attempt=1)
    engine = TransformersEngine(
        load_model(tiny_model, dtype="float32", device="cuda"), encoder, batch=4, version=version, fetch=lambda _: {}
    )
    requests = [
        EngineRequest(prompt_id=PromptId(f"0:{n}"), prompt_tokens=row.prompt_tokens, images=(), seed=n)
        for n, row in enumerate(rows_of(encoder))
    ]
    completions = {c.prompt_id: c async for c in engine.generate(requests, Sampling(max_new_tokens=40))}
    model = load_model(tiny_model, dtype="float32", device="cuda")
    for request in requests:
        completion = completions[request.prompt_id]
        row = TokenSequence(prompt_tokens=request.prompt_tokens, tokens=completion.tokens, images=(), name="row")
        with torch.no_grad():
            expected, _, _ = completion_logprobs(
                model, collate([row], encoder).to("cuda"), temperature=1.0, banned_ids=encoder.banned_ids
            )
        np.testing.assert_allclose(completion.logprobs, expected[0].cpu().numpy(), rtol=0, atol=1e-3)
    await engine.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_changes_on_the_device_arrives_on_the_host_bit_for_bit(dtype):
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    limits = torch.iinfo(bits)
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(limits.min, limits.max + 1, (300_001,), generator=generator).to(bits)  # NaNs included
    mirror = Mirror()
    for _ in range(3):
        found = mirror.host("x", patterns.view(dtype).cuda())
        assert found.is_cpu
        assert torch.equal(found.view(bits), patterns)
        patterns = torch.where(torch.rand(300_001, generator=generator) < 0.02, patterns + 1, patterns)


async def test_a_swap_gives_the_engine_on_the_device_all_new_weights(tiny_model, encoder):
    model = load_model(tiny_model, dtype="float32", device="cuda")
    new = {name: torch.randn_like(tensor, device="cpu") for name, tensor in named_weights(model).items()}
    version = PolicyVersion(iteration=1, attempt=1)
    engine = TransformersEngine(model, encoder, batch=4, version=version, fetch=lambda _: new)
    record = WeightsRecord(version=PolicyVersion(iteration=2, attempt=1), objects=(), checksum="")
    await engine.apply_weights(record)
    assert engine.version == record.version
    for name, tensor in named_weights(model).items():
        assert tensor.is_cuda
        assert torch.equal(tensor.cpu(), new[name])
    await engine.close()

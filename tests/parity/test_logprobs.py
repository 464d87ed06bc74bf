"""One policy, one number: trainer (any padding, any micro-batch), reference and engine give the same log-probs."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from steadyhelm.data.types import EngineRequest, PolicyVersion, PromptId, Sampling
from steadyhelm.models.batch import TokenSequence, collate, pack
from steadyhelm.models.decode import Decoding
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.models.load import load_model
from steadyhelm.models.logprobs import CompletionScorer, completion_logprobs
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

VERSION = PolicyVersion(iteration=1, attempt=1)


def picture(seed: int, height: int, width: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = (picture(1, 56, 56), picture(2, 84, 140), picture(3, 56, 56), picture(4, 28, 112))


def encoder_of(folder: Path) -> PromptEncoder:
    return PromptEncoder(folder, min_pixels=3136, max_pixels=100352)


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> PromptEncoder:
    return encoder_of(tiny_model)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> torch.nn.Module:
    return load_model(tiny_model, dtype="float32")


def rows_of(encoder: PromptEncoder, with_images: bool = True) -> list[TokenSequence]:
    """Sequences with no, one, two and three images of unequal sizes and completions of unequal lengths."""
    rng = np.random.default_rng(0)
    legal = np.setdiff1d(np.arange(encoder.vocab_size), encoder.banned_ids)
    rows = []
    for n, (images, length) in enumerate([((), 5), ((0,), 1), ((1, 0), 9), ((0, 1, 3), 12), ((3,), 30)]):
        pictures = tuple(IMAGES[i] for i in images) if with_images else ()
        tokens = rng.choice(legal, length).astype(np.int32)
        rows.append(
            TokenSequence(
                prompt_tokens=encoder.encode("Which digit? " * (3 * n + 1), pictures),
                tokens=tokens,
                images=pictures,
                name=str(n),
            )
        )
    return rows


def scores(
    model: torch.nn.Module, encoder: PromptEncoder, rows: list[TokenSequence], *, side: str = "right", micro: int = 8
) -> np.ndarray:
    found = []
    for start in range(0, len(rows), micro):
        batch = collate(rows[start : start + micro], encoder, pad_side=side)
        with torch.no_grad():
            logprobs, _, mask = completion_logprobs(model, batch, temperature=0.8, banned_ids=encoder.banned_ids)
        found += [row[keep] for row, keep in zip(logprobs, mask, strict=True)]
    return torch.cat(found).numpy()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("micro", [1, 2, 5])
def test_logprobs_do_not_depend_on_padding_side_or_micro_batch(
    model: torch.nn.Module, encoder: PromptEncoder, side: str, micro: int
) -> None:
    rows = rows_of(encoder)
    np.testing.assert_allclose(
        scores(model, encoder, rows, side=side, micro=micro), scores(model, encoder, rows), rtol=0, atol=1e-5
    )


def test_logprobs_are_those_of_transformers_own_forward_with_its_own_positions(
    model: torch.nn.Module, encoder: PromptEncoder
) -> None:
    for row in rows_of(encoder):
        batch = collate([row], encoder)
        kinds = (batch.input_ids == encoder.image_id).int()
        with torch.no_grad():
            model.model.rope_deltas = None
            logits = model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                pixel_values=batch.pixel_values,
                image_grid_thw=batch.image_grid_thw,
                mm_token_type_ids=kinds,
            ).logits
        logits[..., list(encoder.banned_ids)] = float("-inf")
        expected = (logits[0] / 0.8).log_softmax(-1)[len(row.prompt_tokens) - 1 : -1]
        picked = expected[range(len(row.tokens)), row.tokens.astype(int)]
        np.testing.assert_allclose(scores(model, encoder, [row]), picked, rtol=0, atol=1e-5)


def test_the_engines_cached_logprobs_are_the_trainers(model: torch.nn.Module, encoder: PromptEncoder) -> None:
    requests = [
        EngineRequest(prompt_id=PromptId(str(n)), prompt_tokens=row.prompt_tokens, images=row.images, seed=n)
        for n, row in enumerate(rows_of(encoder) * 3)
    ]
    decoding = Decoding(model, encoder, requests, Sampling(max_new_tokens=150, temperature=0.8))
    done = []
    while not decoding.finished:
        done += decoding.advance(VERSION)
    done.sort(key=lambda completion: int(completion.prompt_id))
    rows = [
        TokenSequence(prompt_tokens=request.prompt_tokens, tokens=completion.tokens, images=request.images)
        for request, completion in zip(requests, done, strict=True)
    ]
    found = np.concatenate([completion.logprobs for completion in done])
    assert len(found) > 300
    np.testing.assert_allclose(found, scores(model, encoder, rows), rtol=0, atol=1e-4)


def test_swapping_two_images_of_one_size_changes_the_logprobs(model: torch.nn.Module, encoder: PromptEncoder) -> None:
    tokens = np.asarray([20, 30, 40], np.int32)
    one, two = (IMAGES[0], IMAGES[2]), (IMAGES[2], IMAGES[0])
    rows = [
        TokenSequence(prompt_tokens=encoder.encode("Which?", pair), tokens=tokens, images=pair) for pair in (one, two)
    ]
    np.testing.assert_array_equal(rows[0].prompt_tokens, rows[1].prompt_tokens)
    assert np.abs(scores(model, encoder, rows[:1]) - scores(model, encoder, rows[1:])).max() > 1e-3


def test_moving_an_image_in_the_grid_changes_the_logprobs(model: torch.nn.Module, encoder: PromptEncoder) -> None:
    """The same image tokens in a grid of another shape: one-dimensional positions could not tell them apart."""
    wide, high = (
        collate(
            [
                TokenSequence(
                    prompt_tokens=encoder.encode("Which?", (image,)),
                    tokens=np.arange(20, 30, dtype=np.int32),
                    images=(image,),
                )
            ],
            encoder,
        )
        for image in (picture(5, 56, 112), picture(5, 112, 56))
    )
    assert torch.equal(wide.input_ids, high.input_ids)
    moved = dataclasses.replace(wide, position_ids=high.position_ids)  # the features of one, in the places of the other
    with torch.no_grad():
        here, there, other = (
            completion_logprobs(model, batch, temperature=0.8, banned_ids=encoder.banned_ids)[0]
            for batch in (wide, moved, high)
        )
    assert (here - there).abs().max() > 1e-4
    assert (there - other).abs().max() > 1e-4


def test_chunks_of_the_output_layer_change_neither_numbers_nor_gradient(
    tiny_model: Path, encoder: PromptEncoder
) -> None:
    batch = collate(rows_of(encoder), encoder)
    found = []
    for chunks in (1, 4, 100):
        model = load_model(tiny_model, dtype="float32")
        logprobs, entropy, mask = CompletionScorer(
            model, temperature=1.0, banned_ids=encoder.banned_ids, chunks=chunks
        )(batch)
        (logprobs * torch.arange(logprobs.shape[1])).sum().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        found.append((logprobs.detach(), entropy, gradient))
        assert int(mask.sum()) == 57
        assert not entropy.requires_grad
        assert logprobs.detach()[~mask].abs().sum() == 0
    for logprobs, entropy, gradient in found[1:]:
        torch.testing.assert_close(logprobs, found[0][0], rtol=0, atol=1e-6)
        torch.testing.assert_close(entropy, found[0][1], rtol=0, atol=1e-5)
        assert (gradient - found[0][2]).norm() / found[0][2].norm() < 1e-6


@pytest.mark.parametrize("with_images", [True, False])
def test_packing_and_the_side_of_padding_change_neither_numbers_nor_gradient(
    tiny_model: Path, encoder: PromptEncoder, with_images: bool
) -> None:
    left, right = (collate(rows_of(encoder, with_images), encoder, pad_side=side) for side in ("left", "right"))
    packed = pack(left)
    assert not torch.equal(left.attention_mask, right.attention_mask)
    assert packed.input_ids.shape == (1, int(left.attention_mask.sum()))
    found = []
    for form in (left, right, packed):
        model = load_model(tiny_model, dtype="float32")
        logprobs, entropy, mask = completion_logprobs(model, form, temperature=1.0, banned_ids=encoder.banned_ids)
        (logprobs * torch.arange(logprobs.shape[1])).sum().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        found.append((logprobs.detach(), entropy, mask, gradient))
    for other in found[1:]:
        torch.testing.assert_close(found[0][0], other[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(found[0][1], other[1], rtol=0, atol=1e-5)
        assert torch.equal(found[0][2], other[2])
        assert (found[0][3] - other[3]).norm() / found[0][3].norm() < 1e-5


def test_gradient_checkpointing_changes_no_gradient(tiny_model: Path, encoder: PromptEncoder) -> None:
    batch = collate(rows_of(encoder), encoder)
    gradients = []
    for on in (False, True):
        model = load_model(tiny_model, dtype="float32").train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        logprobs, _, _ = completion_logprobs(model, batch, temperature=1.0, banned_ids=encoder.banned_ids)
        logprobs.sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 1e-6


def test_entropy_is_that_of_the_masked_distribution(model: torch.nn.Module, encoder: PromptEncoder) -> None:
    row = rows_of(encoder)[0]
    batch = collate([row], encoder)
    with torch.no_grad():
        _, entropy, _ = completion_logprobs(model, batch, temperature=0.8, banned_ids=encoder.banned_ids)
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits[0]
    legal = np.setdiff1d(np.arange(encoder.vocab_size), encoder.banned_ids)
    p = (logits[len(row.prompt_tokens) - 1 : -1, legal] / 0.8).double().softmax(-1)
    torch.testing.assert_close(entropy[0].double(), -(p * p.log()).sum(-1), rtol=0, atol=1e-5)


def test_a_batch_without_images_gives_the_vision_tower_a_gradient_of_zero(
    tiny_model: Path, encoder: PromptEncoder
) -> None:
    """Ranks that shard the tower's weights gather them together, so no micro-batch may leave it out."""
    model = load_model(tiny_model, dtype="float32")
    rows = rows_of(encoder, with_images=False)
    logprobs, _, mask = completion_logprobs(
        model, collate(rows, encoder), temperature=0.8, banned_ids=encoder.banned_ids
    )
    logprobs.sum().backward()
    for parameter in model.model.visual.parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) == 0.0
    np.testing.assert_array_equal(logprobs.detach()[mask].numpy(), scores(model, encoder, rows))


@pytest.fixture(scope="module")
def text_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-only causal model, its output layer not tied, with the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("text") / "model"
    tokenizer = encoder_of(tiny_model)._tokenizer
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_text_only_model_goes_through_the_same_functions(text_model: Path) -> None:
    model, encoder = load_model(text_model, dtype="float32"), encoder_of(text_model)
    rows = rows_of(encoder, with_images=False)
    batch = collate(rows, encoder)
    assert batch.position_ids.shape == batch.input_ids.shape
    assert batch.pixel_values is None
    expected = scores(model, encoder, rows)
    np.testing.assert_allclose(scores(model, encoder, rows, side="left", micro=2), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        logprobs, _, mask = completion_logprobs(model, pack(batch), temperature=0.8, banned_ids=encoder.banned_ids)
    np.testing.assert_allclose(logprobs[mask], expected, rtol=0, atol=1e-5)
    requests = [
        EngineRequest(prompt_id=PromptId(str(n)), prompt_tokens=row.prompt_tokens, images=(), seed=n)
        for n, row in enumerate(rows)
    ]
    decoding = Decoding(model, encoder, requests, Sampling(max_new_tokens=30, temperature=0.8))
    done = []
    while not decoding.finished:
        done += decoding.advance(VERSION)
    done.sort(key=lambda completion: int(completion.prompt_id))
    sampled = [
        TokenSequence(prompt_tokens=row.prompt_tokens, tokens=completion.tokens)
        for row, completion in zip(rows, done, strict=True)
    ]
    found = np.concatenate([completion.logprobs for completion in done])
    np.testing.assert_allclose(found, scores(model, encoder, sampled), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_models_load_and_agree_roughly(tiny_model: Path, encoder: PromptEncoder, dtype: str) -> None:
    half = load_model(tiny_model, dtype=dtype)
    assert next(half.parameters()).dtype == getattr(torch, dtype)
    full = load_model(tiny_model, dtype="float32")
    rows = rows_of(encoder)
    np.testing.assert_allclose(scores(half, encoder, rows), scores(full, encoder, rows), rtol=0, atol=0.2)


def test_a_folder_saved_with_an_untied_output_layer_loads_with_it(tiny_model: Path, tmp_path: Path) -> None:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_model, tie_word_embeddings=False)
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(tmp_path / "untied")
    loaded = load_model(tmp_path / "untied", dtype="float32")
    torch.testing.assert_close(loaded.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.language_model.embed_tokens.weight)

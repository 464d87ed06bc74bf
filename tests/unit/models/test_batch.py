from pathlib import Path

import numpy as np
import pytest
import torch
from steadyhelm.data.types import ImageKey
from steadyhelm.errors import DataError
from steadyhelm.models.batch import TokenSequence, collate, rope_positions
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.models.load import load_model

from .pictures import picture


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> PromptEncoder:
    return PromptEncoder(tiny_model, min_pixels=3136, max_pixels=100352)


def row(encoder: PromptEncoder, text: str, *images: bytes, tokens: tuple[int, ...] = (20, 30, 2)) -> TokenSequence:
    return TokenSequence(
        prompt_tokens=encoder.encode(text, images), tokens=np.asarray(tokens, np.int32), images=images, name="0:7"
    )


def test_text_counts_on_and_an_image_stands_in_its_grid() -> None:
    tokens = np.asarray([1, 9, 9, 9, 9, 9, 9, 2, 3], np.int32)  # one image of 2 rows of 3 tokens
    positions = rope_positions(tokens, [(1, 4, 6)], image_id=9, merge=2)
    assert positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5],
        [0, 1, 1, 1, 2, 2, 2, 4, 5],
        [0, 1, 2, 3, 1, 2, 3, 4, 5],
    ]


def test_text_alone_counts_on_in_all_three_parts() -> None:
    tokens = np.asarray([4, 5, 6], np.int32)
    assert rope_positions(tokens, [], image_id=9, merge=2).tolist() == [[0, 1, 2]] * 3


def test_image_tokens_that_do_not_match_the_images_are_refused(encoder: PromptEncoder) -> None:
    with pytest.raises(DataError, match="3 image tokens for 1 images that take 4"):
        rope_positions(np.asarray([9, 9, 9], np.int32), [(1, 4, 4)], image_id=9, merge=2)
    small, large = picture(1, 56, 56), picture(2, 56, 112)
    mixed = TokenSequence(
        prompt_tokens=encoder.encode("x", [small]), tokens=np.zeros(0, np.int32), images=(large,), name="0:7"
    )
    with pytest.raises(DataError, match="prompt '0:7': 4 image tokens for 1 images that take 8"):
        collate([mixed], encoder)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_are_those_of_transformers_own_function(tiny_model: Path, encoder: PromptEncoder, side: str) -> None:
    pictures = [picture(1, 56, 56), picture(2, 84, 140), picture(3, 224, 28), picture(4, 56, 56)]
    rows = [
        row(encoder, "no image"),
        row(encoder, "Which digit is it?", pictures[1]),
        row(encoder, "x" * 40, *pictures, tokens=tuple(range(20, 60))),
        row(encoder, "", pictures[2], pictures[2]),
    ]
    batch = collate(rows, encoder, pad_side=side)
    model = load_model(tiny_model, dtype="float32").model
    expected, _ = model.get_rope_index(
        batch.input_ids,
        mm_token_type_ids=(batch.input_ids == encoder.image_id).int(),
        image_grid_thw=batch.image_grid_thw,
        attention_mask=batch.attention_mask,
    )
    assert torch.equal(batch.position_ids, expected)
    assert (
        batch.image_grid_thw.tolist() == [encoder.image(image).grid for r in rows for image in r.images]
        or [list(encoder.image(image).grid) for r in rows for image in r.images] == batch.image_grid_thw.tolist()
    )


def test_rows_are_padded_on_the_asked_side_and_masks_say_where(encoder: PromptEncoder) -> None:
    rows = [row(encoder, "a"), row(encoder, "Which digit is it?", tokens=(40,))]
    for side in ("left", "right"):
        batch = collate(rows, encoder, pad_side=side, pad_to_multiple=8)
        assert batch.input_ids.shape[1] % 8 == 0
        for n, item in enumerate(rows):
            length = len(item.prompt_tokens) + len(item.tokens)
            kept = batch.attention_mask[n].bool()
            assert int(kept.sum()) == length
            assert bool(kept[-1]) == (side == "left")
            assert batch.input_ids[n][kept].tolist() == [*item.prompt_tokens, *item.tokens]
            assert batch.input_ids[n][batch.completion_mask[n]].tolist() == item.tokens.tolist()
            assert set(batch.input_ids[n][~kept].tolist()) <= {encoder.pad_id}


def test_a_completion_with_a_vision_token_is_refused_by_name(encoder: PromptEncoder) -> None:
    for token in encoder.banned_ids:
        with pytest.raises(DataError, match=f"prompt '0:7' has the vision token {token} at place 1"):
            collate([row(encoder, "x", tokens=(20, token, 2))], encoder)


def test_a_completion_with_a_token_outside_the_vocabulary_is_refused(encoder: PromptEncoder) -> None:
    with pytest.raises(DataError, match="vocabulary ends at"):
        collate([row(encoder, "x", tokens=(20, encoder.vocab_size))], encoder)


def test_images_by_key_are_fetched_once_and_kept_within_the_bound(tiny_model: Path) -> None:
    pictures = {ImageKey(f"images/{n}"): picture(n, 56, 56) for n in range(5)}
    fetched: list[str] = []

    def fetch(key: ImageKey) -> bytes:
        fetched.append(key)
        return pictures[key]

    one = 16 * 1176 * 4  # half of it is the same frame once more, which is not kept
    encoder = PromptEncoder(tiny_model, min_pixels=3136, max_pixels=100352, fetch=fetch, cache_bytes=3 * one // 2)
    keys = list(pictures)
    for key in [*keys[:3], *keys[:3], keys[0]]:
        assert encoder.image(key).pixels.nbytes == one
    assert fetched == keys[:3]
    encoder.image(keys[3])  # drops keys[1], the least recently used
    encoder.image(keys[0])
    encoder.image(keys[1])
    assert fetched == [*keys[:4], keys[1]]
    assert encoder._images.num_bytes == 3 * one // 2


def test_a_kept_image_is_bit_for_bit_the_one_that_was_prepared(encoder: PromptEncoder) -> None:
    data = picture(7, 56, 84)
    first, again = encoder.image(data), encoder.image(data)
    assert again.pixels is not first.pixels
    assert again.pixels.tobytes() == first.pixels.tobytes()
    assert (again.grid, again.pixels.shape) == (first.grid, first.pixels.shape)


def test_an_image_larger_than_the_bound_is_prepared_but_not_kept(tiny_model: Path) -> None:
    encoder = PromptEncoder(tiny_model, min_pixels=3136, max_pixels=100352, cache_bytes=1000)
    assert encoder.image(picture(1, 56, 56)).grid == (1, 4, 4)
    assert encoder._images.num_bytes == 0


def test_a_key_without_a_store_to_read_it_from_is_an_error(encoder: PromptEncoder) -> None:
    with pytest.raises(DataError, match="images/9f is given by its key but no store"):
        encoder.image(ImageKey("images/9f"))

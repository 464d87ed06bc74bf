"""From token sequences with images to the tensors of one forward pass.

Shape legend: N sequences, L tokens of the padded row, P prompt and T completion tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from steadyhelm.data.types import EngineRequest, ImageKey, Trajectory
from steadyhelm.errors import DataError
from steadyhelm.models.encoder import PromptEncoder


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """A prompt with its completion (possibly empty): one row of a batch.

    ``prompt_tokens`` [P] int32 with image placeholders expanded, ``tokens`` [T] int32, ``images`` as encoded bytes or
    by key, in the prompt's order. ``name`` is for error messages.

    Example: ``TokenSequence(prompt_tokens=array([5, 9]), tokens=array([7, 2]), images=(), name="0:17")``
    """

    prompt_tokens: NDArray[np.int32]
    tokens: NDArray[np.int32]
    images: tuple[bytes | ImageKey, ...] = ()
    name: str = ""

    @classmethod
    def of(cls, source: Trajectory | EngineRequest) -> TokenSequence:
        """The row of a trajectory, or of a request that has no completion yet."""
        if isinstance(source, Trajectory):
            return cls(
                prompt_tokens=source.prompt_tokens,
                tokens=source.tokens,
                images=source.prompt.images,
                name=source.prompt.prompt_id,
            )
        return cls(
            prompt_tokens=source.prompt_tokens,
            tokens=np.zeros(0, np.int32),
            images=source.images,
            name=source.prompt_id,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBatch:
    """The tensors of one forward pass.

    ``input_ids`` [N, L] int64; ``attention_mask`` [N, L] int64, 0 at padding; ``position_ids`` int64, [3, N, L] (time,
    height, width) for a multimodal model and [N, L] for a text-only one, 0 at padding; ``completion_mask`` [N, L] bool,
    True at the completion's tokens; ``pixel_values`` [patches, dim] float32 and ``image_grid_thw`` [images, 3] int64 of
    all rows' images in order, None where no row has an image. ``lengths`` [N] int64: completion tokens of each.

    A packed batch holds its N sequences one behind the other in a single row: the first sizes above are then 1 instead
    of N, except that of ``lengths``; ``starts`` [L] int64 counts up from 0 in each sequence. It is None otherwise.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    completion_mask: torch.Tensor
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None
    lengths: torch.Tensor
    starts: torch.Tensor | None = None

    def to(self, device: str | torch.device) -> ModelBatch:
        """The same batch on ``device``."""
        return ModelBatch(
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            position_ids=self.position_ids.to(device),
            completion_mask=self.completion_mask.to(device),
            pixel_values=None if self.pixel_values is None else self.pixel_values.to(device),
            image_grid_thw=None if self.image_grid_thw is None else self.image_grid_thw.to(device),
            lengths=self.lengths.to(device),
            starts=None if self.starts is None else self.starts.to(device),
        )


def rope_positions(
    tokens: NDArray[np.int32], grids: Sequence[tuple[int, int, int]], *, image_id: int, merge: int
) -> NDArray[np.int64]:
    """Multimodal rotary positions [3, L] (time, height, width) of one unpadded sequence.

    A text token takes the next whole number in all three parts. An image of t × h × w patches takes t · h/m · w/m
    tokens, which share the start position s and stand at s plus their place in the grid; behind it text goes on at
    s + max(h, w)/m. These are the positions of Qwen2-VL (arXiv 2409.12191 §2.1) as Qwen2.5-VL gives them to images.

    Args:
        tokens: token ids [L] without padding.
        grids: patches (time, height, width) of each image in order.
        image_id: id of the image placeholder token.
        merge: m, patches along each side that become one token.

    Raises:
        DataError: the number of image tokens is not what the grids take.
    """
    places = np.flatnonzero(tokens == image_id)
    sizes = [(time, height // merge, width // merge) for time, height, width in grids]
    counts = np.asarray([time * height * width for time, height, width in sizes], np.int64)
    if len(places) != counts.sum():
        raise DataError(
            f"{len(places)} image tokens for {len(grids)} images that take {counts.sum()}: encode the prompt with the "
            "same min_pixels, max_pixels and model folder as it is read with"
        )
    advance = np.ones(len(tokens), np.int64)
    advance[places] = 0
    advance[places[np.cumsum(counts) - 1]] = [max(height, width) for _, height, width in sizes]
    positions = np.empty((3, len(tokens)), np.int64)
    positions[:] = np.cumsum(advance) - advance
    if sizes:
        positions[:, places] += np.concatenate([_offsets(size) for size in sizes], axis=1)
    return positions


@lru_cache(128)
def _offsets(size: tuple[int, int, int]) -> NDArray[np.int64]:
    """Time, row and column of each token [3, time · height · width] of an image of so many."""
    found: NDArray[np.int64] = np.indices(size, np.int64).reshape(3, -1)
    found.setflags(write=False)
    return found


def collate(
    sequences: Sequence[TokenSequence],
    encoder: PromptEncoder,
    *,
    pad_side: Literal["left", "right"] = "right",
    pad_to_multiple: int = 1,
) -> ModelBatch:
    """The batch of these sequences, in their order, on the CPU.

    Args:
        sequences: at least one row.
        encoder: of the model that the batch is for; gives pad token, banned tokens and prepared images.
        pad_side: where rows shorter than the longest are padded; log-probs do not depend on it.
        pad_to_multiple: the row length is rounded up to a multiple of this.

    Raises:
        DataError: a completion has a banned or unknown token, a prompt's image tokens do not match its images, or an
            image is corrupt.
    """
    if not sequences:
        raise ValueError("collate got no sequences")
    lengths = [len(row.prompt_tokens) + len(row.tokens) for row in sequences]
    width = -(-max(lengths) // pad_to_multiple) * pad_to_multiple
    shape = (len(sequences), width)
    input_ids = np.full(shape, encoder.pad_id, np.int64)
    attention_mask = np.zeros(shape, np.int64)
    completion_mask = np.zeros(shape, np.bool_)
    planes = 1 if encoder.image_id is None else 3
    positions = np.zeros((planes, *shape), np.int64)
    banned = np.asarray(encoder.banned_ids, np.int32)
    images: list[bytes | ImageKey] = []
    _refuse_foreign(sequences, banned, encoder.vocab_size)
    for n, (row, length) in enumerate(zip(sequences, lengths, strict=True)):
        start = width - length if pad_side == "left" else 0
        tokens = np.concatenate([row.prompt_tokens, row.tokens])
        input_ids[n, start : start + length] = tokens
        attention_mask[n, start : start + length] = 1
        completion_mask[n, start + len(row.prompt_tokens) : start + length] = True
        positions[:, n, start : start + length] = _positions(row, tokens, encoder)
        images += row.images
    pixels, grids = encoder.pixels(images) if images else (None, None)
    return ModelBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        position_ids=torch.from_numpy(positions if planes == 3 else positions[0]),
        completion_mask=torch.from_numpy(completion_mask),
        pixel_values=None if pixels is None else torch.from_numpy(pixels),
        image_grid_thw=None if grids is None else torch.from_numpy(grids),
        lengths=torch.tensor([len(row.tokens) for row in sequences]),
    )


def pack(batch: ModelBatch) -> ModelBatch:
    """The same sequences one behind the other in a single row, without padding; log-probs do not depend on it.

    Tokens of a sequence attend to that sequence only. Worth it where the attention kernel skips what is masked.
    """
    kept = batch.attention_mask.bool()
    widths = kept.sum(1)
    starts = torch.cat([torch.arange(int(width)) for width in widths]).to(kept.device)
    return ModelBatch(
        input_ids=batch.input_ids[kept][None],
        attention_mask=batch.attention_mask[kept][None],
        position_ids=batch.position_ids[..., kept].unsqueeze(-2),
        completion_mask=batch.completion_mask[kept][None],
        pixel_values=batch.pixel_values,
        image_grid_thw=batch.image_grid_thw,
        lengths=batch.lengths,
        starts=starts,
    )


def _positions(row: TokenSequence, tokens: NDArray[np.int32], encoder: PromptEncoder) -> NDArray[np.int64]:
    if encoder.image_id is None:
        if row.images:
            raise DataError(f"prompt {row.name!r} has {len(row.images)} images but the model is text-only")
        return np.arange(len(tokens), dtype=np.int64)[None]
    grids = [encoder.grid(image) for image in row.images]
    try:
        return rope_positions(tokens, grids, image_id=encoder.image_id, merge=encoder.merge)
    except DataError as error:
        raise DataError(f"prompt {row.name!r}: {error}") from error


def _refuse_foreign(sequences: Sequence[TokenSequence], banned: NDArray[np.int32], vocab_size: int) -> None:
    drawn = np.concatenate([row.tokens for row in sequences])
    is_foreign = (drawn < 0) | (drawn >= vocab_size)
    for token in banned:
        is_foreign |= drawn == token
    if not is_foreign.any():
        return
    ends = np.cumsum([len(row.tokens) for row in sequences])
    first = int(np.flatnonzero(is_foreign)[0])
    row = sequences[int(np.searchsorted(ends, first, side="right"))]
    if not 0 <= int(row.tokens.min()) <= int(row.tokens.max()) < vocab_size:
        raise DataError(
            f"the completion of prompt {row.name!r} has tokens from {int(row.tokens.min())} to {int(row.tokens.max())} "
            f"but the model's vocabulary ends at {vocab_size - 1}: engine and learner need the same model"
        )
    place = int(np.flatnonzero(np.isin(row.tokens, banned))[0])
    raise DataError(
        f"the completion of prompt {row.name!r} has the vision token {int(row.tokens[place])} at place {place}, which "
        "no policy may sample: let its engine exclude the tokens of banned_ids"
    )

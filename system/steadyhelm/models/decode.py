"""Token by token generation with a key-value cache, for one batch of prompts.

The loop calls the language model below Transformers' ``generate``: prompts are left-padded and, where several requests
ask for the same one, computed once; keys and values go to preallocated buffers; rows that have finished leave the batch
once an eighth of it has. What a request gets depends on its prompt and seed only, up to float order.

Shape legend: N requests, A rows still active, L tokens of the padded prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from steadyhelm.data.types import Completion, EngineRequest, FinishReason, PolicyVersion, Sampling
from steadyhelm.errors import NonFiniteError
from steadyhelm.models.batch import ModelBatch, TokenSequence, collate
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.models.load import decoder_of, output_layer_of
from steadyhelm.models.logprobs import policy_logits
from steadyhelm.models.pretrained import Cache, DynamicLayer
from steadyhelm.models.sampling import draw, uniforms

_GROWTH = 128
"""Token places by which a full cache buffer grows at least."""

_COMPACT_SHARE = 8
"""Finished rows leave the cache once they are one in so many."""


class _BufferedLayer(DynamicLayer):  # type: ignore[misc]  # Transformers is untyped here
    """Keys and values [A, heads, places, head size] of one layer in buffers that are written in place.

    Transformers' own layer copies the whole cache at each token; its static one attends to all places of its buffer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.keys: Any = None
        self.values: Any = None
        self.is_initialized: bool = False
        self.num_tokens = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Appends keys and values; returns all of them as views."""
        end = self.num_tokens + key_states.shape[2]
        if self.keys is None or end > self.keys.shape[2]:
            self._grow(key_states, end)
        self.keys[:, :, self.num_tokens : end] = key_states
        self.values[:, :, self.num_tokens : end] = value_states
        self.num_tokens = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _grow(self, like: torch.Tensor, end: int) -> None:
        rows, heads, _, size = like.shape
        places = max(end + _GROWTH, end * 5 // 4)
        grown = [torch.zeros(rows, heads, places, size, dtype=like.dtype, device=like.device) for _ in range(2)]
        if self.is_initialized:
            grown[0][:, :, : self.num_tokens] = self.keys[:, :, : self.num_tokens]
            grown[1][:, :, : self.num_tokens] = self.values[:, :, : self.num_tokens]
        self.keys, self.values = grown
        self.dtype, self.device, self.is_initialized = like.dtype, like.device, True

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.num_tokens

    def select(self, rows: torch.Tensor) -> None:
        """Keeps these rows, in this order; a row may be named more than once."""
        self.keys = self.keys.index_select(0, rows)
        self.values = self.values.index_select(0, rows)


@dataclass(slots=True)
class _Record:
    """What one request has got so far."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


class Decoding:
    """The state of one batch's generation; ``advance`` samples one token for each active row.

    Args:
        model: from ``load_model``.
        encoder: of the same folder.
        requests: at least one.
        sampling: length, temperature, greedy.

    Raises:
        DataError: a request's image is corrupt or its image tokens do not match.
    """

    def __init__(
        self, model: torch.nn.Module, encoder: PromptEncoder, requests: Sequence[EngineRequest], sampling: Sampling
    ) -> None:
        self._model = model
        self._head = output_layer_of(model)
        base = decoder_of(model)
        self._language: torch.nn.Module = getattr(base, "language_model", base)  # the VLM's text half, or all of it
        self._multimodal = encoder.image_id is not None
        self._device = next(model.parameters()).device
        self._requests = tuple(requests)
        self._sampling = sampling
        self._temperature = 1.0 if sampling.greedy else sampling.temperature
        self._eos = frozenset(encoder.eos_ids)
        self._banned = torch.as_tensor(encoder.banned_ids, dtype=torch.long, device=self._device)
        self._records = [_Record() for _ in requests]
        self._rows = list(range(len(requests)))  # request of each row of the cache
        self._done: set[int] = set()
        seeds = np.asarray([request.seed for request in requests], dtype=np.uint64)
        drawn = np.zeros((len(requests), 0)) if sampling.greedy else uniforms(seeds, sampling.max_new_tokens)
        self._uniforms = torch.from_numpy(drawn).to(self._device)
        self._batch, self._copies = _unique_batch(requests, encoder)
        self._cache: Cache | None = None
        self._logits = torch.empty(0)
        self._last = torch.empty(0)  # the tokens sampled last, which the model has not seen
        self._positions = torch.empty(0)
        self._mask = torch.empty(0)
        self._padded = True
        self._step = 0

    @property
    def finished(self) -> bool:
        """Whether every request has its completion."""
        return len(self._done) == len(self._requests)

    @torch.inference_mode()
    def advance(self, version: PolicyVersion) -> list[Completion]:
        """Samples one more token for each active row from weights ``version``; returns what finished with it.

        The forward pass that the token is drawn from is part of this call, not of the one before: weights may change
        between two calls, and the token belongs to the new ones.

        Raises NonFiniteError where the model's logits are not finite.
        """
        if self._cache is None:
            self._prefill()
        else:
            self._forward(self._last)
        scaled = policy_logits(self._logits, temperature=self._temperature, banned=self._banned)
        logprobs = scaled.log_softmax(-1)
        if self._sampling.greedy:
            tokens = logprobs.argmax(-1)
        else:
            rows = torch.as_tensor(self._rows, device=self._device)
            tokens = draw(logprobs, self._uniforms[rows, self._step])
        chosen = logprobs.gather(-1, tokens.clamp(max=logprobs.shape[-1] - 1)[:, None]).squeeze(-1)
        completions = self._record(tokens.tolist(), chosen.tolist(), version)
        self._step += 1
        if not self.finished:
            self._last = self._compact(tokens)
        return completions

    def _prefill(self) -> None:
        batch = self._batch.to(self._device)
        layers = self._language.config.num_hidden_layers  # type: ignore[union-attr]  # nn.Module's attributes have no types
        self._cache = Cache(layers=[_BufferedLayer() for _ in range(int(layers))])  # type: ignore[arg-type]
        vision = {}
        if batch.pixel_values is not None:
            vision = {"pixel_values": batch.pixel_values, "image_grid_thw": batch.image_grid_thw}
        output = decoder_of(self._model)(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            past_key_values=self._cache,
            use_cache=True,
            **vision,
        )
        copies = torch.as_tensor(self._copies, device=self._device)
        self._logits = self._head(output.last_hidden_state[:, -1])[copies]
        last = batch.position_ids.amax(dim=(0, 2)) if self._multimodal else batch.position_ids.amax(dim=1)
        self._positions = last[copies] + 1
        self._mask = batch.attention_mask[copies].bool()
        self._padded = not bool(self._mask.all())
        if self._copies != list(range(len(batch.input_ids))):
            self._select(copies)

    def _record(self, tokens: list[int], logprobs: list[float], version: PolicyVersion) -> list[Completion]:
        completions = []
        for row, token, logprob in zip(self._rows, tokens, logprobs, strict=True):
            if row in self._done:
                continue
            if not np.isfinite(logprob):
                raise NonFiniteError(
                    f"policy {version} gives prompt {self._requests[row].prompt_id!r} a log-prob of {logprob} at token "
                    f"{self._step}: its weights have diverged; lower learner.lr or go back to a checkpoint"
                )
            record = self._records[row]
            record.tokens.append(token)
            record.logprobs.append(logprob)
            record.versions.append(version.iteration)
            if token in self._eos or len(record.tokens) == self._sampling.max_new_tokens:
                self._done.add(row)
                completions.append(self._completion(row, version.attempt))
        return completions

    def _completion(self, row: int, attempt: int) -> Completion:
        record = self._records[row]
        return Completion(
            prompt_id=self._requests[row].prompt_id,
            tokens=np.asarray(record.tokens, np.int32),
            logprobs=np.asarray(record.logprobs, np.float32),
            versions=np.asarray(record.versions, np.int32),
            attempt=attempt,
            finish=FinishReason.STOP if record.tokens[-1] in self._eos else FinishReason.LENGTH,
        )

    def _compact(self, tokens: torch.Tensor) -> torch.Tensor:
        """Takes finished rows out of the batch where it is worth the copy; returns the tokens of the rows kept."""
        kept = [place for place, row in enumerate(self._rows) if row not in self._done]
        if (len(self._rows) - len(kept)) * _COMPACT_SHARE < len(self._rows):
            return tokens
        places = torch.as_tensor(kept, device=self._device)
        self._rows = [self._rows[place] for place in kept]
        self._positions = self._positions[places]
        self._mask = self._mask[places]
        self._select(places)
        return tokens[places]

    def _select(self, places: torch.Tensor) -> None:
        assert self._cache is not None
        for layer in self._cache.layers:
            layer.select(places)

    def _forward(self, tokens: torch.Tensor) -> None:
        """Feeds the sampled tokens [A]; leaves the next logits [A, V]."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        positions = self._positions[:, None]
        output = self._language(
            inputs_embeds=self._language.get_input_embeddings()(tokens[:, None]),  # type: ignore[operator]
            attention_mask=self._mask[:, None, None] if self._padded else None,
            position_ids=positions.expand(3, -1, -1) if self._multimodal else positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._positions = self._positions + 1
        self._logits = self._head(output.last_hidden_state[:, -1])


def _unique_batch(requests: Sequence[EngineRequest], encoder: PromptEncoder) -> tuple[ModelBatch, list[int]]:
    """The left-padded batch of the distinct prompts, and the row of it that each request continues."""
    places: dict[tuple[bytes, tuple[str, ...]], int] = {}
    rows: list[TokenSequence] = []
    copies: list[int] = []
    for request in requests:
        key = (request.prompt_tokens.tobytes(), request.images)
        if key not in places:
            places[key] = len(rows)
            rows.append(TokenSequence.of(request))
        copies.append(places[key])
    return collate(rows, encoder, pad_side="left"), copies

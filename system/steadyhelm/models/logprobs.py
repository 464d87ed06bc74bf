"""Log-probs of completion tokens: the one definition for engine, reference and learner.

The policy's distribution over the next token is ``softmax(logits / temperature)`` in float32 with the banned (vision)
tokens left out: their logits are -∞ before the softmax.

Shape legend: N sequences, L tokens of a padded row, T completion tokens of the longest row, M completion tokens of all
rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.checkpoint import checkpoint

from steadyhelm.errors import DataError
from steadyhelm.models.batch import ModelBatch
from steadyhelm.models.load import decoder_of, output_layer_of

LOGIT_BYTES = 256 << 20
"""Float32 logits that are held at once where the caller does not fix the number of chunks."""


def policy_logits(logits: torch.Tensor, *, temperature: float, banned: torch.Tensor) -> torch.Tensor:
    """Logits of the policy's distribution in float32: divided by ``temperature``, banned tokens at -∞.

    Args:
        logits: output of the model's last layer [..., V], any float type.
        temperature: sampling temperature, above 0.
        banned: token ids [B] int64 that the policy cannot sample.
    """
    scaled = logits.float() / temperature
    return scaled.index_fill(-1, banned, float("-inf")) if len(banned) else scaled


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, *, temperature: float, banned: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each token and entropy (nats, without gradient) of each distribution.

    ``log p(a) = x_a − log Σ exp x``, ``H = log Σ exp x − Σ p·x`` with x = ``policy_logits``.

    Args:
        logits: [M, V], any float type.
        tokens: [M] int64, none of them banned.
        temperature: sampling temperature, above 0.
        banned: token ids [B] int64.

    Returns:
        log-probs [M] float32 and entropies [M] float32.
    """
    scaled = policy_logits(logits, temperature=temperature, banned=banned)
    total = scaled.logsumexp(-1)
    logprobs = scaled.gather(-1, tokens[:, None]).squeeze(-1) - total
    with torch.no_grad():
        expected = (scaled - total[:, None]).exp() * scaled.masked_fill(torch.isneginf(scaled), 0.0)
        entropy = total - expected.sum(-1)
    return logprobs, entropy


def completion_logprobs(
    model: torch.nn.Module,
    batch: ModelBatch,
    *,
    temperature: float,
    banned_ids: Sequence[int],
    chunks: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs of the batch's completion tokens; differentiable in the log-probs.

    Logits exist for completion positions only. With more than one chunk they are recomputed in the backward pass, so
    that one chunk's logits are held at a time; numbers do not depend on it.

    Args:
        model: a Transformers model from ``load_model``.
        batch: on the model's device; completions are not banned tokens (``collate`` sees to it).
        temperature: sampling temperature, above 0.
        banned_ids: tokens that are left out of the distribution.
        chunks: how many parts the output layer works in; None takes as few as fit ``LOGIT_BYTES``. Ranks that shard the
            output layer's weight (ZeRO-3) must fix it, since each part gathers the weight anew on all ranks at once.

    Returns:
        log-probs [N, T] float32, entropies [N, T] float32 and mask [N, T] bool; 0 where the mask is False.

    Raises:
        DataError: a row's completion starts at its first token, so nothing predicts it.
    """
    hidden = _hidden_states(model, batch)
    first = batch.completion_mask[:, 0] if batch.starts is None else batch.completion_mask[0, batch.starts == 0]
    if bool(first.any()):
        raise DataError("a sequence has a completion but no prompt: nothing predicts its first token")
    states = hidden[:, :-1][batch.completion_mask[:, 1:]]  # [M, H]: the state one place before each completion token
    tokens = batch.input_ids[batch.completion_mask]  # [M]
    banned = torch.as_tensor(list(banned_ids), dtype=torch.long, device=tokens.device)
    logprobs, entropy = _in_chunks(output_layer_of(model), states, tokens, temperature, banned, chunks)
    mask = torch.arange(int(batch.lengths.max()), device=tokens.device)[None] < batch.lengths[:, None]
    blank = torch.zeros(mask.shape, dtype=torch.float32, device=tokens.device)
    return blank.masked_scatter(mask, logprobs), blank.masked_scatter(mask, entropy), mask


class CompletionScorer(torch.nn.Module):
    """``completion_logprobs`` as a module, for wrappers (DeepSpeed) that must see the whole forward pass.

    Parameters keep their names under the prefix ``model.``.
    """

    def __init__(
        self, model: torch.nn.Module, *, temperature: float, banned_ids: Sequence[int], chunks: int | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.banned_ids = tuple(banned_ids)
        self.chunks = chunks

    def forward(self, batch: ModelBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probs, entropies and mask, each [N, T]."""
        return completion_logprobs(
            self.model, batch, temperature=self.temperature, banned_ids=self.banned_ids, chunks=self.chunks
        )


def _hidden_states(model: torch.nn.Module, batch: ModelBatch) -> torch.Tensor:
    """Last hidden states [N, L, H], image features included."""
    vision = {}
    if batch.pixel_values is not None:
        vision = {"pixel_values": batch.pixel_values, "image_grid_thw": batch.image_grid_thw}
    output = decoder_of(model)(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask if batch.starts is None else None,
        position_ids=_packed_positions(batch) if batch.starts is not None else batch.position_ids,
        use_cache=False,
        **vision,
    )
    hidden: torch.Tensor = output.last_hidden_state
    tower = getattr(decoder_of(model), "visual", None)
    if tower is not None and batch.pixel_values is None and (torch.is_grad_enabled() or _is_sharded(tower)):
        hidden = hidden + 0.0 * _blank_features(tower, hidden.device).sum()
    return hidden


def _packed_positions(batch: ModelBatch) -> torch.Tensor:
    """Positions from which Transformers sees where each packed sequence starts.

    For a multimodal model that is [4, 1, L]: the places in the sequence first, then time, height and width.
    """
    assert batch.starts is not None
    if batch.position_ids.ndim == 2:
        return batch.position_ids
    return torch.cat([batch.starts[None, None], batch.position_ids])


def _is_sharded(module: torch.nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 holds the module's weights in parts that all ranks gather together."""
    return hasattr(next(module.parameters()), "ds_id")


def _blank_features(tower: torch.nn.Module, device: torch.device) -> torch.Tensor:
    """Features of one blank image of a single token.

    A micro-batch without images runs the vision tower too, times zero: ranks that shard its weights gather them
    together, and one rank without images would leave the others waiting for ever.
    """
    config = tower.config
    side = int(config.spatial_merge_size)  # type: ignore[union-attr,arg-type]  # nn.Module's attributes have no types
    dim = int(config.in_channels * config.temporal_patch_size * config.patch_size**2)  # type: ignore[union-attr,operator]
    blank = torch.zeros(side * side, dim, dtype=next(tower.parameters()).dtype, device=device)
    features: torch.Tensor = tower(blank, grid_thw=torch.tensor([[1, side, side]], device=device)).pooler_output
    return features


def _in_chunks(
    layer: torch.nn.Module,
    states: torch.Tensor,
    tokens: torch.Tensor,
    temperature: float,
    banned: torch.Tensor,
    chunks: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    def score(part: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return token_logprobs(layer(part), wanted, temperature=temperature, banned=banned)

    if chunks is None:
        vocabulary = int(layer.weight.shape[0])  # type: ignore[index]  # an untyped nn.Module attribute
        chunks = max(1, -(-len(tokens) * vocabulary * 4 // LOGIT_BYTES))
    if chunks == 1:
        return score(states, tokens)
    parts = zip(states.tensor_split(chunks), tokens.tensor_split(chunks), strict=True)
    keep = torch.is_grad_enabled()
    scored = [
        checkpoint(score, part, wanted, use_reentrant=False) if keep else score(part, wanted) for part, wanted in parts
    ]
    return torch.cat([pair[0] for pair in scored]), torch.cat([pair[1] for pair in scored])

"""Hooks into SGLang's scheduler, which loads them by the entry point ``sglang.srt.plugins``.

*Weights*: ``/weights_checker`` takes two more actions, which begin to read a file and say how far that is, and
``/update_weights_from_disk`` takes the load format ``steadyhelm``, which puts the file's tensors into the model by
SGLang's own loader; its caches and version labels are SGLang's work as ever. An error in there ends the server.

*Seeds*: a request's ``sampling_seed`` counts under any flags and beside any other request. SGLang by itself honours
seeds only in its slow deterministic mode, and there another way as soon as a request with top-k shares the batch. A
request without a seed draws by its id.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch
from sglang.srt.managers.io_struct import CheckWeightsReqOutput
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from steadyhelm_engine.staged import Staged

STAGE, STAGED, LOAD_FORMAT = "steadyhelm_stage", "steadyhelm_staged", "steadyhelm"
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""The constants of SplitMix64."""
WORD = (1 << 64) - 1

_staged = Staged()


def register() -> None:
    """Names the hooks; SGLang applies them in every one of its processes."""
    for target, hook, kind in _HOOKS:
        HookRegistry.register(target, hook, kind)


def check_weights(original: Callable[..., Any], manager: Any, asked: Any) -> Any:
    """Stages weights; ``skip_tensor_list`` is then the file and its digest. The message is ``Staged.answer``."""
    global _staged  # one model in a scheduler's process
    if asked.action == STAGE:
        missing = {target for target, _, _ in _HOOKS} - HookRegistry._patched
        if missing:
            return CheckWeightsReqOutput(success=False, message=f"SGLang did not take the hooks {sorted(missing)}")
        _staged = Staged.reading(*asked.skip_tensor_list)
    elif asked.action != STAGED:
        return original(manager, asked)
    return CheckWeightsReqOutput(success=True, message=json.dumps(_staged.answer()))


def update_weights(
    original: Callable[..., Any], updater: Any, model_path: str, load_format: str, *args: Any, **kwargs: Any
) -> tuple[bool, str]:
    """Puts the staged weights into the model, of which ``model_path`` is the digest.

    Raises ValueError where other weights are staged. What it raises ends the scheduler, and that the server.
    """
    if load_format != LOAD_FORMAT:
        found: tuple[bool, str] = original(updater, model_path, load_format, *args, **kwargs)
        return found
    if (_staged.digest, _staged.state) != (model_path, "ready"):
        raise ValueError(f"weights {model_path} are to be swapped in, but {_staged.answer()} are staged")
    device = torch.device(updater.device)

    def load(tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        DefaultModelLoader.restore_weights_before_loading(updater.get_model(), device)
        DefaultModelLoader.load_weights_and_postprocess(updater.get_model(), tensors, device)

    _staged.put(load)
    return True, json.dumps(_staged.answer())


def add_seeds(info: Any, _: type, batch: Any, vocab_size: int) -> None:
    """Gives each request of a new batch its counter: the uniform of token t is ``uniforms(counter, position of t)``.

    A completion's first token is drawn at the position of the prompt's last one. Taking that off here makes the
    uniforms those of Steadyhelm's own engine: mix(mix(seed) + γ · (t + 1)).
    """
    counters = []
    for request in batch.reqs:
        seed = request.sampling_params.sampling_seed
        seed = zlib.crc32(request.rid.encode()) if seed is None else seed
        counters.append(_signed(_mix(seed & WORD) - GOLDEN * (len(request.origin_input_ids) - 1)))
    info.sampling_seed = torch.tensor(counters, dtype=torch.int64, device=info.device)


def sample(
    original: Callable[..., Any], sampler: Any, probs: torch.Tensor, info: Any, positions: torch.Tensor, simple: bool
) -> tuple[torch.Tensor, None]:
    """Where the CDF of the distribution, cut to top-k and so on, first exceeds the uniform; never where it is 0."""
    if info.sampling_seed is None or info.sampling_mask_batch_indices is not None:
        theirs: tuple[torch.Tensor, None] = original(sampler, probs, info, positions, simple)
        return theirs
    weights = probs
    if not simple:
        _, kept, order, _ = top_k_top_p_min_p_sampling_from_probs_torch(
            probs, info.top_ks, info.top_ps, info.min_ps, info.need_min_p_sampling, None, positions,
            return_filtered_probs=True,
        )  # fmt: skip
        weights = torch.zeros_like(probs).scatter_(-1, order.long(), kept)
    cdf = weights.cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1]
    wanted = torch.minimum(
        uniforms(info.sampling_seed, positions) * total, torch.nextafter(total, torch.zeros_like(total))
    )
    drawn = torch.searchsorted(cdf, wanted[:, None], right=True).squeeze(-1)
    return drawn.clamp(max=probs.shape[-1] - 1).to(torch.int32), None  # beyond it where the numbers are not finite


def uniforms(counters: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """⌊mix(counter + γ · (position + 1)) / 2¹¹⌋ / 2⁵³ with SplitMix64's mix, [N] float64 in [0, 1)."""
    word = counters + _signed(GOLDEN) * (positions.to(torch.int64) + 1)
    for shift, factor in ((30, FIRST), (27, SECOND)):
        word = (word ^ _shifted(word, shift)) * _signed(factor)
    return _shifted(word ^ _shifted(word, 31), 11).to(torch.float64) * 2.0**-53


def _mix(word: int) -> int:
    word = (word ^ (word >> 30)) * FIRST & WORD
    word = (word ^ (word >> 27)) * SECOND & WORD
    return word ^ (word >> 31)


def _signed(word: int) -> int:
    """The number in [−2⁶³, 2⁶³) that is ``word`` modulo 2⁶⁴; torch multiplies and adds these modulo 2⁶⁴ too."""
    return (word + (1 << 63) & WORD) - (1 << 63)


def _shifted(word: torch.Tensor, bits: int) -> torch.Tensor:
    """``word`` as 64 unsigned bits, shifted right."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


_HOOKS: tuple[tuple[str, Callable[..., Any], HookType], ...] = (
    (
        "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.check_weights",
        check_weights,
        HookType.AROUND,
    ),
    (
        "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.update_weights_from_disk",
        update_weights,
        HookType.AROUND,
    ),
    ("sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch", add_seeds, HookType.AFTER),
    ("sglang.srt.layers.sampler.Sampler._sample_from_probs", sample, HookType.AROUND),
)

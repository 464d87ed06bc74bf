"""A DeepSpeed engine that only does what the learner needs: gradients summed over micro-batches and ranks, one step.

DeepSpeed's own batch arithmetic is switched off: losses arrive with their global denominators, gradients are summed
over micro-batches and ranks, and nothing else is scaled but by the norm's bound.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import warnings
from collections.abc import Container, Iterator
from typing import Any

import torch
import torch.distributed as dist

from steadyhelm.config.run import Learner
from steadyhelm.errors import ConfigError
from steadyhelm.weights.layout import Layout

GATHER_NUMEL = 1 << 28
"""Elements of ZeRO-3 parameters that are gathered at once for publishing."""


def deepspeed_config(
    learner: Learner, dtype: str, world_size: int, numel: int, *, exact_stage: bool = False
) -> dict[str, Any]:
    """DeepSpeed's configuration for ``numel`` trained elements; ``train_batch`` there has no meaning here."""
    stage = _stage(learner, dtype, world_size, exact_stage)
    bucket = max(2, min(500_000_000, numel + numel % 2))  # buffers of this size are allocated
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "memory_efficient_linear": False,  # it replaces torch.nn.functional.linear for the whole process
    }
    if learner.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "gradient_clipping": learner.max_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }


def _stage(learner: Learner, dtype: str, world_size: int, exact: bool) -> int:
    """DeepSpeed's ZeRO stage: the run file's, but where another one has the same numbers and is cheaper or exacter.

    - bf16: of the stages below 3 only the second sums gradients in fp32 and has partitioned fp32 masters.
    - fp32 on one rank, unless ``exact``: there is nothing to partition, and the bookkeeping takes up to a third of a
      small model's step.
    """
    if dtype == "bfloat16":
        return max(2, learner.zero_stage)
    idle = world_size == 1 and not learner.offload_optimizer and not exact
    return 0 if idle else learner.zero_stage


class TrainEngine:
    """One rank's DeepSpeed engine. All methods are called by all ranks together.

    ``torch.distributed`` must be initialised.

    Args:
        module: whose ``forward`` is called; it holds ``policy``.
        policy: whose parameters are trained and published, under its names.
        learner: the run file's part.
        dtype: of the parameters, ``"float32"`` or ``"bfloat16"``.
        exact_stage: whether fp32 on one rank keeps the run file's ZeRO stage, which partitions nothing there.

    Raises:
        ConfigError: ``learner.freeze`` fits no parameter or all of them.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        policy: torch.nn.Module,
        learner: Learner,
        dtype: str,
        *,
        exact_stage: bool = False,
    ) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._policy = policy
        _freeze(policy, learner.freeze)
        self.names = {p: name for name, p in policy.named_parameters() if p.requires_grad}
        trained = list(self.names)
        numel = sum(parameter.numel() for parameter in trained)
        config = deepspeed_config(learner, dtype, self.world_size, numel, exact_stage=exact_stage)
        self._deepspeed = _import_deepspeed()
        self.engine, *_ = self._deepspeed.initialize(
            model=module,
            model_parameters=trained,
            optimizer=_adam(trained, learner),
            config=config,
            dist_init_required=False,
        )
        self.stage: int = self.engine.zero_optimization_stage()
        if self.stage == 0 and self.world_size == 1:
            self.engine.enable_backward_allreduce = False  # it would copy all gradients to reduce them with nobody
        self.engine.train()

    def forward(self, *inputs: Any) -> Any:
        """The module's answer, with gradients where they are enabled.

        What DeepSpeed does around it serves ZeRO alone, and costs a small model three percent of its step.
        """
        return self.engine(*inputs) if self.stage else self.engine.module(*inputs)

    def accumulate(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds the gradient of ``loss``, a rank's summand of the global loss; ``last``: of this optimiser step.

        DeepSpeed averages gradients over ranks; the factor makes a sum of it.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def apply(self, lr: float) -> float:
        """Clips, steps, clears the gradients; returns the gradient's global norm before clipping.

        A gradient that is not finite is cleared, nothing is applied, and the answer is not finite.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        if self.stage == 0:
            norm = self._norm_without_zero()
            if math.isfinite(norm):
                self.engine.step()
            else:
                self.engine.zero_grad()
            return norm
        self.engine.step()
        if self.engine.optimizer.overflow:
            return math.nan
        return float(self.engine.get_global_grad_norm())

    def _norm_without_zero(self) -> float:
        gradients = [parameter.grad for parameter in self.names if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def layout(self, dtype: torch.dtype) -> Layout:
        """Names and shapes of what ``weights`` yields, the same on all ranks."""
        parameters = self._policy.named_parameters()
        return Layout.from_specs((name, dtype, tuple(getattr(p, "ds_shape", p.shape))) for name, p in parameters)

    def weights(self, dtype: torch.dtype, names: Container[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters in ``names``, which need not be the same on all ranks: each whole and in ``dtype``.

        Tied parameters come once, under their first name. Under ZeRO-3 a tensor is valid until the next is asked for.
        """
        parameters = list(self._policy.named_parameters())
        for part in _parts(parameters) if self.stage == 3 else [parameters]:
            tensors = [parameter for _, parameter in part]
            gathered = self._deepspeed.zero.GatheredParameters(tensors, enabled=self.stage == 3)
            with gathered, torch.no_grad():
                for name, parameter in part:
                    if name in names:
                        yield name, parameter.detach().to(dtype)


def _parts(
    parameters: list[tuple[str, torch.nn.Parameter]],
) -> Iterator[list[tuple[str, torch.nn.Parameter]]]:
    part: list[tuple[str, torch.nn.Parameter]] = []
    size = 0
    for name, parameter in parameters:
        numel = int(getattr(parameter, "ds_numel", parameter.numel()))
        if part and size + numel > GATHER_NUMEL:
            yield part
            part, size = [], 0
        part.append((name, parameter))
        size += numel
    yield part


def _adam(trained: list[torch.nn.Parameter], learner: Learner) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {
        "lr": learner.lr,
        "betas": learner.betas,
        "eps": learner.eps,
        "weight_decay": learner.weight_decay,
    }
    if learner.offload_optimizer:
        # Compiled at its first use, which needs a C++ compiler and most of a minute
        offloaded = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
        optimizer: torch.optim.Optimizer = offloaded(trained, adamw_mode=True, **settings)
        return optimizer
    return torch.optim.AdamW(trained, fused=True, **settings)


def _freeze(module: torch.nn.Module, prefixes: tuple[str, ...]) -> None:
    """Switches gradients off for the parameters whose names start with one of ``prefixes``."""
    for prefix in prefixes:
        found = [p for name, p in module.named_parameters() if name.startswith(prefix)]
        if not found:
            first = next(name for name, _ in module.named_parameters())
            raise ConfigError(
                f"learner.freeze has {prefix!r}, but no parameter's name starts so (the first one is {first!r}): "
                "correct the prefix"
            )
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in module.parameters()):
        raise ConfigError(f"learner.freeze {list(prefixes)} leaves nothing to train: remove a prefix")


def _import_deepspeed() -> Any:
    """DeepSpeed, silent, and without what only other uses of it need.

    - On a CPU its set-up builds ``deepspeed_shm_comm`` with g++ for ``inference_all_reduce``, which training never
      calls. ``__compatible_ops__`` is a module attribute made on first access, by probing compilers: an empty one says
      that nothing is to be built.
    - Its Muon optimiser decorates a function with ``torch.compile`` when it is imported, which imports the whole
      compiler: two seconds and a hundred MB for nothing.
    """
    deepspeed = importlib.import_module("deepspeed")
    ops = importlib.import_module("deepspeed.ops")
    if deepspeed.accelerator.get_accelerator().device_name() == "cpu":
        vars(ops).setdefault("__compatible_ops__", {})
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # torch reads it at each torch.compile
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed 0.19.8 calls collectives by the names that torch 2.13 deprecates
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed

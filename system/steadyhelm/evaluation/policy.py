"""Evaluating a policy through the rollout service: greedy answers to held-out pairs, in both orders by default."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from steadyhelm.config import RunFile
from steadyhelm.config.reward import ConsistencyTerm
from steadyhelm.data.types import Sampling, Trajectory
from steadyhelm.errors import DataError
from steadyhelm.evaluation.metrics import EvalResult, evaluate
from steadyhelm.services import PromptSource, Rollout, ShardOrder
from steadyhelm.services.concurrency import together
from steadyhelm.store import ObjectStore
from steadyhelm.store.codec import decode_rollout


async def evaluate_policy(
    prompts: PromptSource,
    rollout: Rollout,
    store: ObjectStore,
    key: Callable[[int], str],
    run: RunFile,
    *,
    iteration: int,
    limit: int,
) -> EvalResult:
    """Metrics of the policy that the engines serve.

    Args:
        prompts: the held-out pairs.
        rollout: answers them, greedily.
        store: where the completions go.
        key: the key of the n-th shard of completions.
        run: the run file.
        iteration: the policy version that must answer.
        limit: pairs to take, 0 for all.

    A pair of which one order is above ``data.max_prompt_tokens``, and was dropped, counts in neither.

    Raises DataError where ``data.eval`` has no pairs that fit, and the services' errors.
    """
    held_out = (await prompts.held_out(limit)).value
    size = run.rollout.engine.batch
    orders = [
        ShardOrder(
            key=key(number),
            shard=number,
            prompts=held_out[start : start + size],
            sampling=Sampling(max_new_tokens=run.rollout.max_new_tokens, greedy=True),
            min_version=iteration,
        )
        for number, start in enumerate(range(0, len(held_out), size))
    ]
    served = await together([rollout.rollout(order) for order in orders])

    def measure() -> EvalResult:
        trajectories: list[Trajectory] = []
        for answer in served:
            trajectories += decode_rollout(store.read(answer.value.rollout)).trajectories
        answered = {trajectory.prompt.prompt_id for trajectory in trajectories}
        halved = {prompt.pair_id for prompt in held_out if prompt.prompt_id not in answered}
        kept = [prompt for prompt in held_out if prompt.pair_id not in halved]
        trajectories = [trajectory for trajectory in trajectories if trajectory.prompt.pair_id not in halved]
        if not kept:
            raise DataError(
                f"each of the {len(halved)} held-out pairs is longer than data.max_prompt_tokens "
                f"({run.data.max_prompt_tokens}) in one order at least, and was dropped: raise the limit, or lower "
                "data.max_pixels"
            )
        lines = next((term.lines for term in run.reward.terms if isinstance(term, ConsistencyTerm)), 0)
        return evaluate(kept, trajectories, lines=lines, orders=1 if run.data.eval_order == "fixed" else 2)

    return await asyncio.to_thread(measure)

"""The oracle against the learner's functions, over a toy policy: two independent writings of one algorithm."""

import numpy as np
import pytest
import torch
from steadyhelm.algorithms import objective as composed
from steadyhelm.algorithms.minibatches import minibatches
from steadyhelm.config.algorithm import Correction, DrGrpo, Filter, Grpo, Kl, PreClip, ReinforcePP, Rloo, Sft
from steadyhelm.config.algorithm import StableReinforce as Stable
from steadyhelm.config.run import RunFile
from steadyhelm.data.types import FinishReason, Prompt, PromptId, Rewards, Trajectory
from steadyhelm.testing.oracle import Oracle

VOCABULARY = 7
N = 12


class Bigram(torch.nn.Module):
    """Logits of the next token from the one before."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator))
        self.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))

    def logprobs(self, previous, tokens):
        distribution = (self.table[previous] + self.bias).log_softmax(-1)
        return distribution.gather(-1, tokens[..., None])[..., 0]


def toy_logprobs(model, trajectory):
    tokens = torch.from_numpy(trajectory.tokens).long()
    previous = torch.cat([torch.from_numpy(trajectory.prompt_tokens[-1:]).long(), tokens[:-1]])
    return model.logprobs(previous, tokens)


def make_batch(seed):
    random = np.random.default_rng(seed)
    trajectories, reference = [], []
    for i in range(N):
        length = int(random.integers(1, 6))
        prompt = Prompt(
            prompt_id=PromptId(f"0:{i}"), group_id=f"0:{i // 4}", text="", images=(), label=1, swapped=False, seed=i
        )
        trajectories.append(
            Trajectory(
                prompt=prompt,
                prompt_tokens=random.integers(0, VOCABULARY, 2).astype(np.int32),
                tokens=random.integers(0, VOCABULARY, length).astype(np.int32),
                logprobs=(random.normal(size=length) * 0.3 - 2).astype(np.float32),
                versions=np.zeros(length, np.int32),
                attempt=1,
                finish=FinishReason.STOP,
                completion_text="",
            )
        )
        reference.append((random.normal(size=length) * 0.3 - 2).astype(np.float32))
    valid = random.random(N) < 0.8
    total = np.where(valid, random.integers(0, 5, N) * 0.5, np.nan).astype(np.float32)
    rewards = Rewards(total=total, valid=valid, components={}, detail=tuple({} for _ in range(N)))
    return trajectories, rewards, reference


def run_file(algorithm, **learner):
    return RunFile.model_validate(
        {
            "name": "toy",
            "seed": 3,
            "model": {"path": "unused", "dtype": "float32"},
            "data": {"train": "toy.py:pairs", "swap": "none"},
            "algorithm": algorithm.model_dump(),
            "rollout": {"samples_per_prompt": 4, "max_new_tokens": 8},
            "learner": {"train_batch": 5, "lr": 0.05, "max_norm": 0.3, **learner},
            "schedule": {
                "iterations": 2,
                "prompts_per_iteration": N if isinstance(algorithm, Sft) else N // 4,
            },
        }
    )


def padded(rows, filling=0.0):
    width = max(len(row) for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=filling) for row in rows])


class Composed:
    """The learner's way: padded tensors, micro-batches of two, ``algorithms``."""

    def __init__(self, model, run, rates):
        self.model, self.run, self.rates = model, run, iter(rates)
        learner = run.learner
        self.optimizer = torch.optim.AdamW(
            model.parameters(), betas=learner.betas, eps=learner.eps, weight_decay=learner.weight_decay
        )

    def iterate(self, iteration, trajectories, rewards, reference):
        algorithm = self.run.algorithm
        mask = padded([torch.ones(len(t.tokens), dtype=torch.bool) for t in trajectories], False)
        tokens = padded([torch.from_numpy(t.tokens).long() for t in trajectories], 0)
        previous = padded(
            [torch.from_numpy(np.append(t.prompt_tokens[-1:], t.tokens[:-1])).long() for t in trajectories], 0
        )
        behaviour = padded([torch.from_numpy(t.logprobs) for t in trajectories])
        frozen = padded([torch.from_numpy(r) for r in reference])
        valid = torch.ones(N, dtype=torch.bool) if rewards is None else torch.from_numpy(rewards.valid)
        made = None
        if not isinstance(algorithm, Sft):
            with torch.no_grad():
                proximal = self.model.logprobs(previous, tokens)
            frozen = frozen if self.run.uses_reference else None
            kl = composed.reward_divergence(algorithm, proximal, frozen)
            groups = torch.arange(N) // 4
            made = composed.advantages(algorithm, torch.from_numpy(rewards.total), kl, groups, mask, valid)
        losses, norms = [], []
        for epoch in range(getattr(algorithm, "epochs", 1)):
            for chosen in minibatches(N, self.run.learner.train_batch, self.run.seed, iteration, epoch):
                share = composed.denominator(algorithm, mask[chosen], valid[chosen], 8).item()
                self.optimizer.zero_grad()
                total = 0.0
                for rows in np.array_split(chosen, 2):
                    current = self.model.logprobs(previous[rows], tokens[rows])
                    if made is None:
                        parts = composed.sft_loss(algorithm, current, mask[rows], valid[rows], share)
                    else:
                        parts = composed.policy_loss(
                            algorithm,
                            current,
                            proximal[rows],
                            behaviour[rows],
                            None if frozen is None else frozen[rows],
                            made.values[rows],
                            mask[rows],
                            valid[rows],
                            share,
                        )
                    parts.loss.backward()
                    total += parts.loss.item()
                norms.append(float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.run.learner.max_norm)))
                self.optimizer.param_groups[0]["lr"] = next(self.rates)
                self.optimizer.step()
                losses.append(total)
        return losses, norms, made


@pytest.mark.parametrize(
    "algorithm",
    [
        Stable(),
        Stable(beta=0.2, gamma=0.8, kl=Kl(estimator="k3"), weighting="sequence", epochs=2),
        Stable(
            beta=0.1,
            normalization="release",
            filter=Filter(mode="release", k=1.2),
            correction=Correction(mode="token", cap=1.5),
            pre_clip=PreClip(min=0.9, max=1.1),
        ),
        Stable(filter=Filter(k=1.0), correction=Correction(mode="sequence"), aggregation="constant", clip_high=0.3),
        Stable(correction=Correction(mode="token", cap=1.3, beyond="mask"), epochs=2),
        Grpo(correction=Correction(mode="sequence", cap=1.6, beyond="mask")),
        ReinforcePP(aggregation="token", epochs=2),
        Grpo(beta=0.3, epochs=2),
        DrGrpo(filter=Filter(mode="paper", k=1.0)),
        Rloo(beta=0.1),
        Sft(),
        Sft(aggregation="sequence"),
    ],
    ids=lambda algorithm: algorithm.type,
)
@pytest.mark.parametrize(
    "learner", [{}, {"schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.1}], ids=["plain", "scheduled"]
)
def test_two_iterations_of_the_oracle_and_of_the_learners_functions_agree(algorithm, learner):
    run = run_file(algorithm, **learner)
    judge, model = Bigram(), Bigram()
    oracle = Oracle(judge, run, toy_logprobs)
    batches = [make_batch(seed) for seed in (1, 2)]
    if run.is_sft:  # all traces count
        batches = [(trajectories, None, reference) for trajectories, _, reference in batches]
    truths = [oracle.iterate(k + 1, *batch) for k, batch in enumerate(batches)]
    learned = Composed(model, run, [rate for truth in truths for rate in truth.rates])
    for iteration, (truth, batch) in enumerate(zip(truths, batches, strict=True), start=1):
        losses, norms, made = learned.iterate(iteration, *batch)
        assert losses == pytest.approx(truth.losses, abs=2e-6)
        assert norms == pytest.approx(truth.grad_norms, rel=2e-5)
        if made is not None:
            assert (made.mean, made.std) == pytest.approx((truth.mean, truth.std), abs=1e-6)
            expected = [torch.tensor(row) for row in truth.advantages if row]
            rows = made.values[torch.from_numpy(batch[1].valid)]
            assert torch.allclose(rows, padded(expected), atol=1e-5)
            assert made.sums["filter_low"].item() == truth.filtered_low
            assert made.sums["filter_high"].item() == truth.filtered_high
    assert not torch.allclose(judge.table, Bigram().table, atol=0.05)
    for ours, theirs in zip(model.parameters(), judge.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5)


def test_the_oracles_rates_warm_up_to_the_peak_and_end_near_the_floor():
    run = run_file(Stable(), schedule="linear", warmup_steps=2, min_lr_ratio=0.5)
    oracle = Oracle(Bigram(), run, toy_logprobs)
    rates = [rate for k in (1, 2) for rate in oracle.iterate(k, *make_batch(k)).rates]
    assert rates == pytest.approx([0.025, 0.05, 0.05, 0.04375, 0.0375, 0.03125])


def test_frozen_parameters_stay_as_they_are():
    model = Bigram()
    before = model.table.clone()
    Oracle(model, run_file(Stable(), freeze=["table"]), toy_logprobs).iterate(1, *make_batch(1))
    assert torch.equal(model.table, before)
    assert not torch.equal(model.bias, torch.zeros(VOCABULARY))

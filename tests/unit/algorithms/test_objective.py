import math
from dataclasses import dataclass, fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steadyhelm.algorithms import objective as composed
from steadyhelm.config.algorithm import (
    Correction,
    DrGrpo,
    Filter,
    Grpo,
    Kl,
    PreClip,
    ReinforcePP,
    Rloo,
    Sft,
    StableReinforce,
)
from steadyhelm.errors import NonFiniteError

NAN = math.nan


@dataclass(frozen=True)
class Case:
    """A batch of N sequences of up to T tokens."""

    current: torch.Tensor
    proximal: torch.Tensor
    behaviour: torch.Tensor
    reference: torch.Tensor
    mask: torch.Tensor
    valid: torch.Tensor
    rewards: torch.Tensor
    groups: torch.Tensor

    def rows(self, index):
        return Case(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def padded(self, left, right, junk):
        """The same batch with so many columns of padding more, which hold ``junk``."""

        def pad(values, filling):
            return torch.nn.functional.pad(values, (left, right), value=filling)

        tokens = {name: pad(getattr(self, name), junk) for name in ("current", "proximal", "behaviour", "reference")}
        return replace(self, **tokens, mask=pad(self.mask, False))

    def right_aligned(self):
        """The same batch with the padding on the left."""
        lengths = self.mask.sum(-1).tolist()
        moved = {
            name: torch.stack([row.roll(len(row) - n) for row, n in zip(getattr(self, name), lengths, strict=True)])
            for name in ("current", "proximal", "behaviour", "reference", "mask")
        }
        return replace(self, **moved)


def case(seed=0, n=8, t=5, drift=0.3):
    generator = torch.Generator().manual_seed(seed)

    def noise(scale):
        return scale * torch.randn(n, t, generator=generator)

    proximal = -2.0 + noise(0.5)
    lengths = torch.randint(0 if seed % 2 else 1, t + 1, (n, 1), generator=generator)
    valid = torch.rand(n, generator=generator) < 0.8
    valid[0] = valid[1] = True
    rewards = torch.randint(0, 5, (n,), generator=generator) * 0.5
    return Case(
        current=proximal + noise(drift),
        proximal=proximal,
        behaviour=proximal + noise(0.2),
        reference=proximal + noise(0.5),
        mask=torch.arange(t)[None] < lengths,
        valid=valid,
        rewards=torch.where(valid, rewards, NAN),
        groups=torch.arange(n) // 4,
    )


OBJECTIVES = {
    "stable": StableReinforce(),
    "stable_kl": StableReinforce(beta=0.1, gamma=0.9, kl=Kl(estimator="k3"), weighting="sequence"),
    "release": StableReinforce(
        beta=0.1, normalization="release", filter=Filter(mode="release", k=0.5), correction=Correction(mode="token")
    ),
    "narrow": StableReinforce(
        pre_clip=PreClip(min=0.8, max=1.25), filter=Filter(k=1.0), correction=Correction(mode="sequence", cap=1.2)
    ),
    "token": ReinforcePP(aggregation="token", clip=0.1, clip_high=0.3),
    "grpo": Grpo(beta=0.2),
    "grpo_filtered": Grpo(beta=0.2, kl=Kl(placement="reward"), filter=Filter(k=0.8)),
    "dr_grpo": DrGrpo(),
    "rloo": Rloo(beta=0.1),
}


def advantages(objective, batch, reduce=lambda sums: sums):
    kl = composed.reward_divergence(objective, batch.proximal, batch.reference)
    return composed.advantages(objective, batch.rewards, kl, batch.groups, batch.mask, batch.valid, reduce)


def loss(objective, batch, values, denominator):
    return composed.policy_loss(
        objective,
        batch.current,
        batch.proximal,
        batch.behaviour,
        batch.reference,
        values,
        batch.mask,
        batch.valid,
        denominator,
    )


def whole(objective, batch):
    """Loss, gradient [N, T] and sums of the batch as one micro-batch."""
    batch = replace(batch, current=batch.current.clone().requires_grad_())
    values = advantages(objective, batch).values
    denominator = composed.denominator(objective, batch.mask, batch.valid, 16).item()
    parts = loss(objective, batch, values, denominator)
    parts.loss.backward()
    return parts.loss.item(), batch.current.grad, parts.sums


def test_stable_reinforce_end_to_end_by_hand():
    # three one-token samples with rewards 2, 0, 1 → mean 1, deviation √(2/3), z = ±1.2247449 and 0
    mask, valid = torch.ones(3, 1, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    made = composed.advantages(StableReinforce(), torch.tensor([2.0, 0.0, 1.0]), None, torch.arange(3), mask, valid)
    assert made.values.flatten().tolist() == pytest.approx([1.2247449, -1.2247449, 0.0], abs=1e-6)
    assert made.raw.flatten().tolist() == [2.0, 0.0, 1.0]
    assert (made.mean, made.std) == pytest.approx((1.0, 0.81649658), abs=1e-8)
    current = torch.tensor([[math.log(1.5)], [math.log(0.9)], [9.0]], requires_grad=True)
    zeros = torch.zeros(3, 1)
    parts = composed.policy_loss(StableReinforce(), current, zeros, zeros, None, made.values, mask, valid, 3.0)
    parts.loss.backward()
    # ratios 1.5 (clipped to 1.2), 0.9, 1000 (pre-clipped, but its advantage is 0)
    assert parts.loss.item() == pytest.approx((-1.2 * 1.2247449 + 0.9 * 1.2247449) / 3, abs=1e-6)
    assert current.grad.flatten().tolist() == pytest.approx([0.0, 0.9 * 1.2247449 / 3, 0.0], abs=1e-6)
    assert {name: value.item() for name, value in parts.sums.items()} == pytest.approx(
        {
            "tokens": 3,
            "sequences": 3,
            "loss": -0.3 * 1.2247449,
            "pre_clip_hits": 1,
            "clip_hits": 1,
            "nonfinite": 0,
            "ratio": 1.5 + 0.9 + 1000,
            "approx_kl": (1.5 - 1 - math.log(1.5)) + (0.9 - 1 - math.log(0.9)) + (math.exp(9) - 1 - 9),
            "kl": 0,
            "weight": 3,
            "weight_capped": 0,
            "gap": 0,
        },
        rel=1e-5,
    )


def test_the_correction_weighs_the_loss_outside_the_clip_and_pre_clip_does_not_see_it():
    objective = StableReinforce(correction=Correction(mode="token", cap=2.0))
    mask, valid, one = torch.ones(1, 2, dtype=torch.bool), torch.tensor([True]), torch.ones(1, 2)
    current = torch.tensor([[math.log(1.1), math.log(1.1)]], requires_grad=True)
    behaviour = torch.tensor([[-math.log(1.5), -20.0]])  # weights 1.5, and exp(20) held at 2
    parts = composed.policy_loss(objective, current, torch.zeros(1, 2), behaviour, None, one, mask, valid, 1.0)
    parts.loss.backward()
    assert parts.loss.item() == pytest.approx(-(1.5 * 1.1 + 2.0 * 1.1) / 2, abs=1e-6)
    assert current.grad[0].tolist() == pytest.approx([-1.5 * 1.1 / 2, -2.0 * 1.1 / 2], abs=1e-6)
    assert parts.sums["pre_clip_hits"].item() == 0
    assert parts.sums["weight"].item() == pytest.approx(3.5, abs=1e-6)
    assert parts.sums["weight_capped"].item() == 1
    assert parts.sums["gap"].item() == pytest.approx(20.405465, abs=1e-5)


def test_the_rewards_bound_and_the_upper_clip_come_from_the_run_file():
    mask, valid = torch.ones(2, 1, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    objective = ReinforcePP(reward_clip=3.0, clip=0.1, clip_high=0.3)
    made = composed.advantages(objective, torch.tensor([50.0, -4.0]), None, torch.arange(2), mask, valid)
    assert made.raw.flatten().tolist() == [3.0, -3.0]
    current, zeros = torch.tensor([[math.log(1.25)], [math.log(0.5)]]), torch.zeros(2, 1)
    parts = composed.policy_loss(objective, current, zeros, zeros, None, made.values, mask, valid, 1.0)
    assert parts.loss.item() == pytest.approx(-1.25 + 0.9, abs=1e-6)


def test_grpos_divergence_is_in_the_loss_and_pulls_towards_the_reference():
    mask, valid, zeros = torch.ones(1, 1, dtype=torch.bool), torch.tensor([True]), torch.zeros(1, 1)
    current = torch.tensor([[-1.0]], requires_grad=True)
    reference = torch.tensor([[-1.5]])
    parts = composed.policy_loss(Grpo(beta=0.5), current, current.detach(), zeros, reference, zeros, mask, valid, 1.0)
    parts.loss.backward()
    assert parts.loss.item() == pytest.approx(0.5 * 0.10653066, abs=1e-6)
    assert current.grad.item() == pytest.approx(0.5 * 0.39346934, abs=1e-6)
    assert parts.sums["kl"].item() == pytest.approx(0.5, abs=1e-6)


def test_the_divergence_in_the_reward_comes_behind_a_groups_baseline():
    # two samples of two tokens, rewards 1 and 0: baseline-free part ±1; beta·kl = 0.1 per token
    mask, valid = torch.ones(2, 2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    made = composed.advantages(
        Rloo(beta=0.1), torch.tensor([1.0, 0.0]), torch.ones(2, 2), torch.zeros(2, dtype=torch.long), mask, valid
    )
    assert made.values.flatten().tolist() == pytest.approx([0.8, 0.9, -1.2, -1.1], abs=1e-6)


def test_a_filter_on_grouped_advantages_judges_their_global_z_and_keeps_their_scale():
    # Dr.GRPO advantages of one group of 12 with a single 1.0: 11/12 and −1/12, z of the first √11 = 3.3166
    rewards = torch.tensor([1.0] + [0.0] * 11)
    mask, valid = torch.ones(12, 1, dtype=torch.bool), torch.ones(12, dtype=torch.bool)
    made = composed.advantages(
        DrGrpo(filter=Filter(mode="paper")), rewards, None, torch.zeros(12, dtype=torch.long), mask, valid
    )
    assert made.values.flatten().tolist() == pytest.approx([0.0] + [-1 / 12] * 11, abs=1e-7)
    assert made.sums["filter_high"].item() == 1


@pytest.mark.parametrize("name", OBJECTIVES)
@given(seed=st.integers(0, 500), data=st.data())
@settings(max_examples=20, deadline=None)
def test_loss_and_gradient_do_not_depend_on_padding_order_or_micro_batches(name, seed, data):
    objective, batch = OBJECTIVES[name], case(seed)
    n = len(batch.valid)
    expected, gradient, sums = whole(objective, batch)
    assert math.isfinite(expected)

    left, right = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    padded, padded_gradient, padded_sums = whole(objective, batch.padded(left, right, junk=NAN))
    assert padded == pytest.approx(expected, abs=1e-7)
    assert torch.allclose(padded_gradient[:, left : left + batch.mask.shape[1]], gradient, atol=1e-7)

    moved, moved_gradient, _ = whole(objective, batch.right_aligned())
    assert moved == pytest.approx(expected, abs=1e-7)
    assert torch.allclose(moved_gradient[batch.right_aligned().mask], gradient[batch.mask], atol=1e-7)

    order = torch.tensor(data.draw(st.permutations(range(n))))
    shuffled, shuffled_gradient, _ = whole(objective, batch.rows(order))
    assert shuffled == pytest.approx(expected, abs=1e-7)
    assert torch.allclose(shuffled_gradient, gradient[order], atol=1e-7)

    values = advantages(objective, batch).values
    denominator = composed.denominator(objective, batch.mask, batch.valid, 16).item()
    size = data.draw(st.integers(1, n))
    micro = [
        loss(objective, batch.rows(slice(at, at + size)), values[at : at + size], denominator)
        for at in range(0, n, size)
    ]
    assert sum(parts.loss.item() for parts in micro) == pytest.approx(expected, abs=1e-6)
    for key, total in sums.items():
        assert sum(parts.sums[key].item() for parts in micro) == pytest.approx(total.item(), rel=1e-6, abs=1e-6)
        assert padded_sums[key].item() == pytest.approx(total.item(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_ranks_with_unequal_shares_get_the_advantages_of_one_rank(on_ranks, name):
    objective, batch = OBJECTIVES[name], case(seed=11, n=12)
    batch = replace(batch, valid=batch.valid & (torch.arange(12) < 9))  # the last rank has nothing valid
    shares = [slice(0, 3), slice(3, 9), slice(9, 12)]
    alone = advantages(objective, batch)
    scores = composed.scores(objective, batch.rewards, batch.groups, batch.valid)

    def work(rank, reduce):
        own = batch.rows(shares[rank])
        kl = composed.reward_divergence(objective, own.proximal, own.reference)
        return composed.token_advantages(objective, scores[shares[rank]], kl, own.mask, own.valid, reduce)

    spread = on_ranks(3, work)
    assert torch.allclose(torch.cat([part.values for part in spread]), alone.values, atol=1e-7)
    assert torch.equal(torch.cat([part.keep for part in spread]), alone.keep)
    for key, total in alone.sums.items():
        assert sum(part.sums[key].item() for part in spread) == total.item()
    for part in spread:
        assert (part.mean, part.std) == pytest.approx((alone.mean, alone.std), abs=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_unscored_sequences_hold_changes_neither_loss_nor_gradient(name):
    objective, batch = OBJECTIVES[name], case(seed=4)
    batch.valid[[2, 5]] = False
    expected, gradient, _ = whole(objective, batch)
    assert batch.mask[2].any()
    spoiled = {
        field: torch.where(batch.valid[:, None], getattr(batch, field), NAN)
        for field in ("current", "proximal", "behaviour", "reference")
    }
    result, spoiled_gradient, sums = whole(objective, replace(batch, **spoiled))
    assert result == expected
    assert torch.equal(spoiled_gradient, gradient)
    assert sums["nonfinite"].item() == 0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, NAN])
@pytest.mark.parametrize("where", ["current", "proximal"])
@pytest.mark.parametrize("name", ["stable", "token", "grpo"])
def test_a_log_ratio_that_is_not_finite_is_seen_in_the_loss(name, where, bad):
    objective, batch = OBJECTIVES[name], case(seed=2)
    values = advantages(objective, batch).values
    spoiled = getattr(batch, where).clone()
    spoiled[0, 0] = bad
    parts = loss(objective, replace(batch, **{where: spoiled}), values, 8.0)
    assert not math.isfinite(parts.loss.item())
    assert parts.sums["nonfinite"].item() == 1


def test_a_behaviour_log_prob_that_is_not_finite_is_seen_where_it_counts():
    batch = case(seed=2)
    batch.behaviour[0, 0] = -math.inf
    values = torch.ones_like(batch.current)
    corrected = StableReinforce(correction=Correction(mode="token"))
    assert math.isnan(loss(corrected, batch, values, 8.0).loss.item())
    assert loss(StableReinforce(), batch, values, 8.0).sums["gap"].item() == math.inf


def test_a_scored_reward_that_is_not_finite_stops_every_rank(on_ranks):
    batch = case(seed=2)
    rewards = batch.rewards.clone()
    rewards[0] = NAN

    def work(rank, reduce):
        own = replace(batch, rewards=rewards).rows(slice(4 * rank, 4 * rank + 4))
        with pytest.raises(NonFiniteError, match="not finite"):
            advantages(StableReinforce(), own, reduce)
        return True

    assert on_ranks(2, work) == [True, True]


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("objective", [StableReinforce(), ReinforcePP(), Grpo(), DrGrpo(), Rloo()])
def test_a_reward_that_is_not_finite_is_not_clamped_into_one_that_is(objective, value):
    batch = case(seed=1)
    rewards = batch.rewards.clone()
    rewards[batch.valid.nonzero()[0, 0]] = value
    with pytest.raises(NonFiniteError, match="not finite"):
        advantages(objective, replace(batch, rewards=rewards))


def test_a_batch_with_nothing_valid_has_advantages_of_zero():
    batch = replace(case(seed=2), valid=torch.zeros(8, dtype=torch.bool))
    for objective in OBJECTIVES.values():
        made = advantages(objective, batch)
        assert made.values.abs().max().item() == 0.0
        assert (made.mean, made.std) == (0.0, 0.0)


@pytest.mark.parametrize("denominator", [0.0, -1.0, NAN, math.inf])
def test_a_mini_batch_without_a_denominator_is_refused(denominator):
    batch = case()
    with pytest.raises(ValueError, match="denominator"):
        loss(StableReinforce(), batch, torch.zeros_like(batch.current), denominator)
    with pytest.raises(ValueError, match="denominator"):
        composed.sft_loss(Sft(), batch.current, batch.mask, batch.valid, denominator)


def test_a_divergence_without_reference_log_probs_is_refused():
    batch = case()
    with pytest.raises(ValueError, match="reference"):
        composed.reward_divergence(StableReinforce(beta=0.1), batch.proximal, None)
    with pytest.raises(ValueError, match="kl is None"):
        composed.token_advantages(StableReinforce(beta=0.1), batch.rewards, None, batch.mask, batch.valid)
    zeros = torch.zeros_like(batch.current)
    with pytest.raises(ValueError, match="reference"):
        composed.policy_loss(Grpo(beta=0.1), zeros, zeros, zeros, None, zeros, batch.mask, batch.valid, 8.0)


def test_beta_zero_reads_no_reference():
    batch = case()
    assert composed.reward_divergence(StableReinforce(), batch.proximal, None) is None
    assert composed.reward_divergence(Grpo(beta=0.1), batch.proximal, None) is None  # its divergence is in the loss


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_those_of_finite_differences(name):
    objective, batch = OBJECTIVES[name], case(seed=6, n=4, t=3)
    batch = replace(batch, **{f: getattr(batch, f).double() for f in ("current", "proximal", "behaviour", "reference")})
    values = advantages(objective, batch).values.double()

    def numerator(current):
        log = replace(batch, current=current)
        parts = loss(objective, log, values, 1.0)
        return parts.sums["loss"].item()

    current = batch.current.clone().requires_grad_()
    loss(objective, replace(batch, current=current), values, 1.0).loss.backward()
    step = 1e-6
    for i in range(4):
        for t in range(3):
            up, down = batch.current.clone(), batch.current.clone()
            up[i, t] += step
            down[i, t] -= step
            slope = (numerator(up) - numerator(down)) / (2 * step)
            assert current.grad[i, t].item() == pytest.approx(slope, abs=1e-5)


def test_supervised_loss_by_token_and_by_sequence():
    current = torch.tensor([[-1.0, -2.0, -3.0], [-5.0, NAN, NAN], [NAN, NAN, NAN]], requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    valid = torch.tensor([True, True, False])
    for algorithm, expected, gradient in (
        (Sft(), 11 / 4, -1 / 4),
        (Sft(aggregation="sequence"), 7 / 2, -1 / 6),
    ):
        denominator = composed.denominator(algorithm, mask, valid, 16).item()
        parts = composed.sft_loss(algorithm, current, mask, valid, denominator)
        current.grad = None
        parts.loss.backward()
        assert parts.loss.item() == pytest.approx(expected, abs=1e-6)
        assert current.grad[0].tolist() == pytest.approx([gradient] * 3, abs=1e-6)
        assert current.grad[2].tolist() == [0.0, 0.0, 0.0]
        assert (parts.sums["tokens"].item(), parts.sums["sequences"].item()) == (4, 2)

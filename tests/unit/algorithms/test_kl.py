import pytest
import torch
from steadyhelm.algorithms.kl import k1, k3


def test_k1_is_the_difference_and_keeps_its_sign():
    assert torch.allclose(
        k1(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])), torch.tensor([[0.5, -1.0]]), atol=1e-7
    )


def test_k3_of_half_a_nat_either_way():
    result = k3(torch.tensor([[-1.0, -1.5, -1.0]]), torch.tensor([[-1.5, -1.0, -1.0]]))
    assert torch.allclose(result, torch.tensor([[0.10653066, 0.14872127, 0.0]]), atol=1e-6)


def test_k3_of_tiny_differences_is_half_their_square():
    tiny = torch.tensor([[1e-4]], dtype=torch.float64)
    assert k3(tiny, torch.zeros_like(tiny)).item() == pytest.approx(5e-9, rel=1e-3)


def test_gradients_flow_through_the_policy_only():
    policy = torch.tensor([[-1.0, -1.5]], requires_grad=True)
    k3(policy, torch.tensor([[-1.5, -1.0]])).sum().backward()
    assert torch.allclose(policy.grad, torch.tensor([[0.39346934, -0.64872127]]), atol=1e-6)


def test_shapes_that_differ_are_refused():
    with pytest.raises(AssertionError, match="differ"):
        k1(torch.zeros(1, 2), torch.zeros(1, 3))

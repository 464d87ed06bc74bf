"""New weights in a model's hands: exchanged where a tensor is alone in its memory, copied where it is not."""

import weakref

import pytest
import torch
from steadyhelm.errors import ModelError
from steadyhelm.services.rollout.swap import Swap

from tests.unit.weights.versions import version


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(6, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.head = torch.nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.norm(self.embed(tokens)))


class Fused(torch.nn.Module):
    """The parts of a fused matrix are parameters of their own that share its memory."""

    def __init__(self):
        super().__init__()
        self.fused = torch.nn.Parameter(torch.randn(6, 4))
        self.query = torch.nn.Parameter(self.fused.data[:4])
        self.value = torch.nn.Parameter(self.fused.data[4:])
        self.turned = torch.nn.Parameter(torch.randn(4, 4).t())
        self.alone = torch.nn.Parameter(torch.randn(3))


def given(model, names=None):
    own = model.state_dict()
    return {
        name: torch.randn(tensor.shape) if tensor.is_floating_point() else tensor + 1
        for name, tensor in own.items()
        if names is None or name in names
    }


def test_a_tensor_under_two_names_is_one_tensor_after_the_swap_too():
    model = Tied().eval()
    tensors = given(model)
    tensors["head.weight"] = tensors["embed.weight"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    swap = Swap(model, tensors, version(1))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    swap.put()
    assert model.head.weight is model.embed.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name])


def test_the_model_serves_the_fetched_tensors_themselves():
    model = Tied().eval()
    tensors = given(model, {"embed.weight", *(f"norm.{name}" for name in model.norm.state_dict())})
    tensors["norm.running_var"].abs_()
    Swap(model, tensors, version(1)).put()
    own = model.state_dict()
    assert all(own[name].data_ptr() == tensor.data_ptr() for name, tensor in tensors.items())
    expected = torch.nn.functional.batch_norm(
        tensors["embed.weight"],
        tensors["norm.running_mean"],
        tensors["norm.running_var"],
        tensors["norm.weight"],
        tensors["norm.bias"],
    )
    found = model(torch.arange(6))
    torch.testing.assert_close(found, expected @ tensors["embed.weight"].T)


def test_parts_of_a_fused_tensor_go_on_sharing_its_memory():
    model = Fused()
    tensors = given(model)
    tensors["query"], tensors["value"] = tensors["fused"][:4].clone(), tensors["fused"][4:].clone()
    address = model.fused.data_ptr()
    Swap(model, tensors, version(1)).put()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    assert model.fused.data_ptr() == model.query.data_ptr() == address
    assert model.value.data_ptr() == address + 4 * 4 * 4
    assert model.alone.data_ptr() == tensors["alone"].data_ptr()
    with torch.no_grad():
        model.query.zero_()
    assert not model.fused[:4].any()


def test_swaps_follow_one_another():
    model = Fused()
    for _ in range(3):
        tensors = given(model)
        tensors["query"], tensors["value"] = tensors["fused"][:4], tensors["fused"][4:]
        swap = Swap(model, tensors, version(1))
        swap.put()
        swap.forget_former()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


class Fetched(dict[str, torch.Tensor]):
    """Tensors of which a test sees whether somebody still has them."""


def test_fetched_tensors_are_kept_only_as_long_as_the_model_serves_them():
    for model, are_served in ((Fused(), True), (torch.nn.Linear(3, 2).double(), False)):
        tensors = Fetched(given(model))
        if are_served:
            tensors["query"], tensors["value"] = tensors["fused"][:4], tensors["fused"][4:]
        else:  # all of the model's memory is shared, as a device's is another than the host's
            model.register_buffer("first", model.weight.data[:1], persistent=False)
            model.bias = torch.nn.Parameter(model.weight.data.view(-1)[:2])
            tensors = Fetched({name: tensor.double() for name, tensor in tensors.items()})
        swap, lent = Swap(model, tensors, version(1)), weakref.ref(tensors)
        swap.put()
        del tensors
        swap.forget_former()
        assert (lent() is not None) == are_served


def test_a_tensor_under_two_names_may_hold_what_equals_nothing():
    model = Tied()
    tensors = given(model)
    tensors["embed.weight"][0, 0] = float("nan")
    tensors["head.weight"] = tensors["embed.weight"].clone()
    Swap(model, tensors, version(1)).put()
    assert model.head.weight.isnan().sum() == 1


def test_a_buffer_without_a_name_that_is_a_parameters_memory_stays_so():
    model = torch.nn.Linear(3, 2)
    model.register_buffer("view", model.weight.data, persistent=False)
    tensors = given(model)
    Swap(model, tensors, version(1)).put()
    assert torch.equal(model.view, tensors["weight"])
    assert model.view.data_ptr() == model.weight.data_ptr()


def test_unequal_values_of_one_tensor_and_strange_ones_are_refused_and_nothing_is_put():
    model = Tied()
    whole = given(model)
    cases = {
        "come with unequal values": whole,
        "it has no tensor 'more'": {**whole, "head.weight": whole["embed.weight"], "more": torch.ones(1)},
        "must be torch.float32": {**whole, "norm.bias": torch.ones(4, dtype=torch.bfloat16)},
        r"'norm.bias' is torch.float32 \(5,\)": {**whole, "norm.bias": torch.ones(5)},
        "is missing": {name: tensor for name, tensor in whole.items() if not name.endswith(".weight")},
    }
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for message, tensors in cases.items():
        with pytest.raises(ModelError, match=message):
            Swap(model, tensors, version(1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

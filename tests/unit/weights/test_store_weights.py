import pytest
import torch
from safetensors.torch import load, save
from steadyhelm.data.types import PolicyVersion, WeightsRecord
from steadyhelm.errors import CorruptObjectError, ModelError, ObjectMissingError
from steadyhelm.store import open_store
from steadyhelm.weights.checksum import set_checksum
from steadyhelm.weights.codec import decode, encode
from steadyhelm.weights.named import apply_weights, named_weights
from steadyhelm.weights.store import StoreWeights

VERSION = PolicyVersion(iteration=3, attempt=1)


def tensors():
    torch.manual_seed(0)
    return {
        "b.weight": torch.randn(5, 3).bfloat16(),
        "a": torch.tensor(2.5),
        "c.bias": torch.tensor([-0.0, float("nan"), float("inf")]),
        "d.empty": torch.zeros(0, 4),
        "e.strided": torch.arange(6, dtype=torch.int64).reshape(2, 3).t(),
    }


def same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


def test_the_codec_writes_what_the_safetensors_library_reads_and_the_other_way_round():
    written = b"".join(encode(tensors(), {"format": "pt"}))
    same_bits(load(written), tensors())
    contiguous = {name: tensor.contiguous() for name, tensor in tensors().items()}
    found, metadata = decode(save(contiguous, {"format": "pt"}), "x")
    same_bits(found, tensors())
    assert metadata == {"format": "pt"}


def test_a_type_that_weights_are_not_kept_in_is_refused_by_name():
    with pytest.raises(ModelError, match=r"tensor 'b' is torch\.complex64, and weights are kept as float32"):
        encode({"a": torch.ones(1), "b": torch.ones(1, dtype=torch.complex64)})


def test_decoded_tensors_have_memory_of_their_own():
    buffer = bytearray(b"".join(encode({"a": torch.ones(4)})))
    found, _ = decode(memoryview(buffer), "x")
    buffer[-16:] = b"\0" * 16
    assert found["a"].tolist() == [1.0, 1.0, 1.0, 1.0]
    found["a"].add_(1.0)
    assert found["a"].tolist() == [2.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b[:6], lambda b: b"", lambda b: b[8:]]
)
def test_bytes_that_are_no_complete_safetensors_file_are_refused_by_name(damage):
    with pytest.raises(CorruptObjectError, match="anchor-7 is not a complete safetensors file"):
        decode(damage(b"".join(encode({"a": torch.ones(4)}))), "anchor-7")


def test_an_anchor_comes_back_bit_for_bit_in_several_objects(store):
    weights = StoreWeights(store, max_object_bytes=40)
    record = weights.publish(VERSION, "run/weights/000003.1", tensors())
    assert [ref.key for ref in record.objects] == [
        "run/weights/000003.1/anchor-0000-0000.safetensors",
        "run/weights/000003.1/anchor-0000-0001.safetensors",
        "run/weights/000003.1/anchor-0000-0002.safetensors",
    ]
    assert record.version == VERSION
    assert record.base is None
    same_bits(weights.fetch(record), tensors())


def test_the_checksum_covers_names_types_shapes_and_bytes():
    one = {"a": torch.zeros(2, 3), "b": torch.zeros(1)}
    others = [
        {"a": torch.zeros(3, 2), "b": torch.zeros(1)},
        {"a": torch.zeros(2, 3), "c": torch.zeros(1)},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.zeros(1)},
        {"a": torch.zeros(2, 3), "b": -torch.zeros(1)},
        {"a": torch.zeros(2, 3)},
    ]
    checksums = {set_checksum(one), *map(set_checksum, others)}
    assert len(checksums) == 6
    assert set_checksum(dict(reversed(one.items()))) == set_checksum(one)
    assert set_checksum({"a": torch.tensor([1.0])}) == "d6429a4eaabc2c046e822bad09edefea"


def test_known_weights_are_not_put_again(store):
    weights = StoreWeights(store)
    first = weights.publish(VERSION, "run/weights/000003.1", tensors())
    again = weights.publish(PolicyVersion(iteration=3, attempt=2), "run/weights/000003.2", tensors(), first)
    assert again == first
    assert list(store.list("run/weights/000003.2")) == []
    changed = {**tensors(), "a": torch.tensor(2.25)}
    other = weights.publish(PolicyVersion(iteration=3, attempt=2), "run/weights/000003.2", changed, first)
    assert other.version == PolicyVersion(iteration=3, attempt=2)


def test_a_flipped_bit_a_lost_object_and_a_wrong_record_are_refused(store):
    weights = StoreWeights(store)
    record = weights.publish(VERSION, "run/weights/a", tensors())
    wrong = WeightsRecord(version=VERSION, objects=record.objects, checksum="0" * 32)
    with pytest.raises(CorruptObjectError, match="their record says 0000"):
        weights.fetch(wrong)
    delta = WeightsRecord(version=VERSION, objects=record.objects, checksum=record.checksum, base=VERSION)
    with pytest.raises(CorruptObjectError, match=r"anchor-0000-0000\.safetensors is not a weight delta"):
        weights.fetch(delta)
    data = bytearray(store.get(record.objects[0].key))
    data[-1] ^= 1
    store.put(record.objects[0].key, bytes(data))
    with pytest.raises(CorruptObjectError):
        weights.fetch(record)
    store.delete(record.objects[0].key)
    with pytest.raises(ObjectMissingError):
        weights.fetch(record)


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(4, 3)
        self.head = torch.nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight


def test_tied_parameters_travel_once_and_stay_tied():
    model = Tied()
    assert list(named_weights(model)) == ["embed.weight"]
    apply_weights(model, {"embed.weight": torch.full((4, 3), 2.0)})
    assert model.head.weight is model.embed.weight
    assert model.head.weight.unique().tolist() == [2.0]


@pytest.mark.parametrize(
    "strange",
    [{}, {"embed.weight": torch.zeros(3, 4)}, {"embed.weight": torch.zeros(4, 3), "more": torch.zeros(1)}],
)
def test_weights_of_another_model_leave_the_serving_model_as_it_was(strange):
    model = Tied()
    before = model.embed.weight.detach().clone()
    with pytest.raises(CorruptObjectError, match="learner and engine need the same model folder"):
        apply_weights(model, strange)
    assert torch.equal(model.embed.weight, before)

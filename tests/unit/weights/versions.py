"""Sets of tensors that change from version to version, and how to compare them bit by bit."""

import threading

import numpy as np
import torch
from steadyhelm.data.types import PolicyVersion
from steadyhelm.errors import SteadyhelmError, StoreError
from steadyhelm.weights.layout import BLOCK
from steadyhelm.weights.share import Share

FLOATS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def version(iteration, attempt=1):
    return PolicyVersion(iteration=iteration, attempt=attempt)


def key(of):
    return f"run/weights/{of.iteration:06d}.{of.attempt}"


def bits(tensor):
    whole = tensor.contiguous()
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)  # of none or one element any stride is contiguous


def same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(bits(found[name]), bits(tensor)), name


def copied(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def words(array, dtype, shape=None):
    """The tensor of that type whose bit patterns are ``array``."""
    signed = np.ascontiguousarray(array).view(np.int16 if array.itemsize == 2 else np.int32)
    tensor = torch.from_numpy(signed.copy()).view(dtype)
    return tensor if shape is None else tensor.reshape(shape)


def small_set(seed=0):
    """Every type and odd shapes, a few thousand elements."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed": torch.randn(97, 31, generator=generator).bfloat16(),
        "layer.bias": torch.randn(31, generator=generator) * 1e-3,
        "layer.half": torch.randn(64, 17, generator=generator).half(),
        "layer.scale": torch.tensor(1.5),
        "layer.strided": torch.randn(12, 20, generator=generator).bfloat16().t(),
        "none": torch.zeros(0, 5),
        "steps": torch.arange(40),
    }


def stepped(tensors, seed, size=1e-3):
    """The next version: floats move by about ``size``, integers by one here and there."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point():
            moved[name] = (tensor.float() + size * noise).to(tensor.dtype)
        else:
            moved[name] = tensor + (noise > 1.5)
    return moved


def adam_like(count, seed=0, dtype=torch.bfloat16, deviation=0.02, lr=1e-6):
    """Before and after a step of about ``lr`` on fp32 masters of normal weights, both rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    master = torch.randn(count, generator=generator) * deviation
    update = (torch.randn(count, generator=generator) * 0.5).clamp(-1, 1) * lr
    return master.to(dtype), (master + update).to(dtype)


def large_set():
    generator = torch.Generator().manual_seed(5)
    return {
        "a": torch.randn(70, 10, generator=generator).bfloat16(),
        "b": torch.randn(2 * BLOCK + 11, generator=generator).bfloat16(),
        "c": torch.zeros(0),
        "d": torch.randn(BLOCK // 2, generator=generator),
        "e": torch.arange(9),
    }


class Ranks:
    """Publishers that ``make`` makes of shares, at work together in threads like the ranks of a learner."""

    def __init__(self, layout, count, make):
        self._barrier = threading.Barrier(count, timeout=60)
        self._told = [""] * count
        self._failed = [False] * count
        self.shares = [
            Share(layout=layout, index=index, count=count, exchange=lambda work, index=index: self._tell(work, index))
            for index in range(count)
        ]
        self.publishers = [make(share) for share in self.shares]

    def _tell(self, work, index):
        self._failed[index] = True
        try:
            self._told[index] = work()
            self._failed[index] = False
        finally:
            self._barrier.wait()
            told, failed = list(self._told), any(self._failed)
            self._barrier.wait()
        if failed:
            raise StoreError("another rank failed")
        return told

    def publish(self, of, tensors):
        answers = [None] * len(self.publishers)

        def one(index):
            own = {name: tensors[name] for name in self.shares[index].names}
            try:
                answers[index] = self.publishers[index].publish(of, key(of), own)
            except SteadyhelmError as error:
                answers[index] = error

        threads = [threading.Thread(target=one, args=(index,)) for index in range(len(answers))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers

"""Weights from learner to engine: lossless deltas against whole uploads and the schemes that others use.

The versions come from real optimiser steps: AdamW at a learning rate of 1e-6 on fp32 masters, the policy in bfloat16,
gradients of a policy-gradient loss on random tokens. The masters are drawn in fp32, so their distances from the
bfloat16 grid are spread as they are late in a run; a run that starts from bfloat16 weights has every master on the
grid, where far fewer elements change and a delta is smaller still (``fresh``).

The memoryless bound is the least that a code without context can take: the entropy of an independent change mask and of
the changed elements' XOR. Seconds are of the whole path on one thread unless a row says otherwise: ``publish`` makes
checksums and codes and puts the object, ``fetch`` reads and verifies it, applies it and checksums the result: in place,
as for an engine server, or ``beside a served version``, as for a Transformers engine on a CPU. Each is measured beside
a copy of the same tensors (``memcpy``), several times in turns; the fastest of each counts. What runs on one thread is
measured in seconds of its processor, so that others on the machine do not count.

``--device cuda`` has the learner and the engine on a GPU: ``publish`` then begins with the comparison on the device,
and seconds are the clock's. ``--size`` takes a larger model.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import table
import torch
import zstandard
from first_token import DELTA, SEQUENCES, TOKENS, Swap, on_host, swaps
from numpy.typing import NDArray
from policies import SHAPES, Shape
from steadyhelm.data.types import PolicyVersion
from steadyhelm.store import ObjectStore
from steadyhelm.testing.memory_store import MemoryStore
from steadyhelm.weights.checksum import set_checksum
from steadyhelm.weights.mirror import Mirror
from steadyhelm.weights.named import named_weights
from steadyhelm.weights.store import StoreWeights
from table import Row
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

LR = 1e-6
STEP = (2, 32)
"""Sequences and tokens of an optimiser step: fewer than an iteration has."""
SYNCS = 4
"""How often an engine is brought to and fro, by each transport."""
BESIDE = "fetch beside a served version"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Size(Shape):
    """A model, and the optimiser steps behind which its weights are taken."""

    name: str
    steps: int = 8


TINY = Size(name="tiny", vocabulary=512, hidden=128, feed_forward=512, layers=3, heads=4, key_value_heads=2)
QUICK = Size(
    name="30M", vocabulary=32_000, hidden=512, feed_forward=1408, layers=4, heads=8, key_value_heads=2, steps=4
)
LARGE = {"30M": QUICK, **{name: Size(name=name, **asdict(shape)) for name, shape in SHAPES.items()}}


def steps(size: Size, device: str, *, fresh: bool) -> tuple[Tensors, Tensors, PreTrainedModel, float]:
    """The weights before and after the last of ``size.steps`` optimiser steps, the model, and a step's least seconds.

    ``fresh`` begins with masters on the bfloat16 grid.
    """
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        tie_word_embeddings=size.tied,
    )
    model = Qwen2ForCausalLM(config).to(device)
    if fresh:
        model = model.bfloat16().float()
    masters = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in named_weights(model).items()}
    model = model.bfloat16()
    optimiser = torch.optim.AdamW(masters.values(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    weights = dict(model.named_parameters())
    before: Tensors = {}
    step_s = math.inf
    for step in range(size.steps):
        settle(device)
        started = time.perf_counter()
        tokens = torch.randint(size.vocabulary, STEP).to(device)
        logits = model(input_ids=tokens).logits[:, :-1].float()
        chosen = torch.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None])[..., 0]
        loss: Any = -(torch.randn(2, 1).to(device) * chosen).mean()
        loss.backward()
        for name, parameter in weights.items():
            assert parameter.grad is not None
            masters[name].grad, parameter.grad = parameter.grad.float(), None
        optimiser.step()
        optimiser.zero_grad()
        if step == size.steps - 1:
            before = {name: tensor.clone() for name, tensor in named_weights(model).items()}
        with torch.no_grad():
            for name, parameter in weights.items():
                parameter.copy_(masters[name])
        settle(device)
        step_s = min(step_s, time.perf_counter() - started)
    return before, named_weights(model), model, step_s


def settle(device: str) -> None:
    """Waits until a GPU has done what it was told to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def entropy(counts: NDArray[Any]) -> float:
    """Bits of all symbols together."""
    seen = counts[counts > 0].astype(np.float64)
    return float((seen * np.log2(seen.sum() / seen)).sum())


def bits(tensor: torch.Tensor) -> NDArray[np.uint16]:
    """The elements' bit patterns."""
    return tensor.reshape(-1).view(torch.uint16).numpy()


def memoryless_bytes(before: Tensors, after: Tensors) -> tuple[float, float]:
    """The bound, and the share of elements that changed."""
    counts = np.zeros(1 << 16, np.int64)
    for name in before:
        counts += np.bincount(bits(before[name]) ^ bits(after[name]), minlength=1 << 16)
    changed, total = counts[1:].sum(), counts.sum()
    return (entropy(np.array([changed, total - changed])) + entropy(counts[1:])) / 8, float(changed / total)


class Side:
    """The fastest of several turns, by what is done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str, clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
        """Keeps the seconds that the body takes where no other turn took fewer."""
        started = clock()
        yield
        took = clock() - started
        self.seconds[name] = min(took, self.seconds.get(name, took))


def in_turns(before: Tensors, after: Tensors, turns: int, threads: Sequence[int]) -> tuple[dict[str, float], int]:
    """Seconds of memcpy, publish and fetch by so many threads, and the bytes of a delta.

    The weights go back and forth between two versions: a step back changes the same elements by as much.
    """
    side, size = Side(), 0
    mirror, on_cpu = Mirror(), all(tensor.is_cpu for tensor in after.values())
    target = {name: torch.empty_like(tensor, device="cpu") for name, tensor in after.items()}
    for number in threads:
        store: ObjectStore = MemoryStore()
        publisher, reader, beside = (StoreWeights(store, anchor_every=10_000, threads=number) for _ in range(3))
        served: Mapping[str, torch.Tensor] = {}
        clock = time.process_time if number == 1 and on_cpu else time.perf_counter
        for turn in range(turns + 2):
            tensors = (before, after)[turn % 2]
            version = PolicyVersion(iteration=turn, attempt=1)
            with side.timed(f"publish {number}" if turn > 1 else "start", clock):
                tensors = dict(on_host(tensors, mirror))
                record = publisher.publish(version, f"run/weights/{turn}", tensors)
            with side.timed(f"memcpy {number}", clock):
                for name, tensor in tensors.items():
                    target[name].copy_(tensor)
            with side.timed(f"fetch {number}" if turn > 1 else "start", clock):
                found = reader.fetch(record)
            assert set_checksum(found) == record.checksum
            assert all(torch.equal(found[name], tensors[name]) for name in (min(tensors), max(tensors)))
            del found
            with side.timed(f"{BESIDE} {number}" if turn > 1 else "start", clock):
                served = beside.fetch(record)
            if record.base is not None:
                size = sum(ref.num_bytes for ref in record.objects)
        assert served.keys() == after.keys()
    return side.seconds, size


def zstd_of_xor(before: Tensors, after: Tensors) -> tuple[float, float]:
    """Bytes of the XOR of all bit patterns under zstd's third level, and the seconds that making them takes."""
    started, size = time.process_time(), 0
    compressor = zstandard.ZstdCompressor(level=3)
    for name in before:
        size += len(compressor.compress((bits(before[name]) ^ bits(after[name])).tobytes()))
    return float(size), time.process_time() - started


def positions_and_values(before: Tensors, after: Tensors) -> tuple[float, float]:
    """Bytes of changed positions in 32 bits and new values in 16, and the seconds that making them takes."""
    started, size = time.process_time(), 0
    for name in before:
        new = bits(after[name])
        positions = np.flatnonzero(bits(before[name]) != new).astype(np.uint32)
        size += len(positions.tobytes()) + len(new[positions].tobytes())
    return float(size), time.process_time() - started


Scheme = Callable[[Tensors, Tensors], tuple[float, float]]
OTHERS: Mapping[str, Scheme] = {"zstd of the XOR": zstd_of_xor, "positions and values": positions_and_values}


def size_rows(name: str, before: Tensors, after: Tensors, delta: float) -> list[Row]:
    """Bytes of a delta and of other schemes, over the full size and over the memoryless bound."""
    full = float(sum(tensor.nbytes for tensor in after.values()))
    bound, changed = memoryless_bytes(before, after)
    sizes = {"delta": delta, **{label: scheme(before, after)[0] for label, scheme in OTHERS.items()}}
    rows = [Row(name=f"{name}: elements that change", value=100 * changed, unit="%", goal=None, better="lower")]
    for label, size in {**sizes, "safetensors": full}.items():
        rows.append(
            Row(name=f"{name}: {label} / full size", value=100 * size / full, unit="%", goal=None, better="lower")
        )
        goal = 0.75 if label == "delta" else None
        rows.append(
            Row(name=f"{name}: {label} / memoryless bound", value=size / bound, unit="ratio", goal=goal, better="lower")
        )
    return rows


def speed_rows(
    name: str, seconds: Mapping[str, float], others: Mapping[str, float], threads: Sequence[int]
) -> list[Row]:
    """Speeds in full tensor bytes per second over memcpy's on one core."""
    rows = []
    for label in ("publish", "fetch", BESIDE):
        for number in threads:
            ratio = seconds[f"memcpy {number}"] / seconds[f"{label} {number}"]
            on = f"{number} core{'s' if number > 1 else ''}"
            goal = 0.15 if number == 1 and label != BESIDE else None
            rows.append(
                Row(name=f"{name}: {label} on {on} / memcpy", value=ratio, unit="ratio", goal=goal, better="higher")
            )
    for label, took in others.items():
        rows.append(
            Row(
                name=f"{name}: {label}, encoding alone / memcpy",
                value=seconds["memcpy 1"] / took,
                unit="ratio",
                goal=None,
                better="higher",
            )
        )
    return rows


def first_token_rows(name: str, found: Mapping[str, Swap], step_s: float) -> list[Row]:
    """Seconds from the end of a step to a token of its weights, and the engine's pause as share of an iteration."""
    rows = []
    for label, swap in found.items():
        of = f"{name}: step's end to first token, {label}"
        rows.append(Row(name=of, value=swap.sync, unit="s", goal=None, better="lower"))
    swap = found[DELTA]
    iteration = swap.batch + step_s + swap.sync
    of = f"{name}: pause / an iteration (samples {SEQUENCES} x {TOKENS} tokens, steps on {STEP[0]} x {STEP[1]}, syncs)"
    rows.append(Row(name=of, value=100 * swap.pause / iteration, unit="%", goal=1.0, better="lower"))
    rows.append(Row(name=f"{name}: pause", value=1e3 * swap.pause, unit="ms", goal=None, better="lower"))
    return rows


def compare(size: Size, turns: int, threads: Sequence[int], device: str) -> list[Row]:
    """All rows of one model."""
    older, newer, model, step_s = steps(size, device, fresh=False)
    seconds, delta = in_turns(older, newer, turns, threads)
    first = first_token_rows(size.name, swaps(model, older, newer, min(turns, SYNCS)), step_s)
    before, after = ({name: tensor.cpu() for name, tensor in tensors.items()} for tensors in (older, newer))
    full = sum(tensor.nbytes for tensor in after.values())
    rows = [
        Row(name=f"{size.name}: full size", value=full / 1e6, unit="MB", goal=None, better="lower"),
        *size_rows(size.name, before, after, delta),
    ]
    if size is not TINY:  # of a MB or two the speeds say nothing
        others = {label: min(scheme(before, after)[1] for _ in range(2)) for label, scheme in OTHERS.items()}
        rows += speed_rows(size.name, seconds, others, threads)
        speed = full / seconds["memcpy 1"] / 1e9
        rows.append(Row(name=f"{size.name}: memcpy", value=speed, unit="GB/s", goal=None, better="higher"))
    return rows + first


def fresh_row(size: Size) -> Row:
    """A delta over its bound at the beginning of a run from bfloat16 weights."""
    before, after, *_ = steps(size, "cpu", fresh=True)
    _, delta = in_turns(before, after, 1, (1,))
    value = delta / memoryless_bytes(before, after)[0]
    name = f"{size.name}, fresh: delta / memoryless bound"
    return Row(name=name, value=value, unit="ratio", goal=0.75, better="lower")


def measure(device: str, chosen: str, quick: bool) -> list[Row]:
    """The rows of the tiny model and of a large one."""
    torch.set_num_threads(1)
    disable_progress_bar()
    large = LARGE[chosen or ("30M" if quick else "0.5B")]
    turns, threads = 4 if quick else 10, (1, 2)
    return [*compare(TINY, turns, (1,), device), *compare(large, turns, threads, device), fresh_row(QUICK)]


def main() -> None:
    """The command line; ``table.main`` takes the flags that all benchmarks have."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=LARGE, default="")
    given, _ = parser.parse_known_args()
    table.main(__doc__ or "", partial(measure, given.device, given.size), own=parser)


if __name__ == "__main__":
    main()

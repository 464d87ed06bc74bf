"""Weights on their way into a server's model."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open


@dataclass
class Staged:
    """One version's tensors. ``state`` is none, loading, ready, failed, half or swapped."""

    digest: str = ""
    state: str = "none"
    error: str = ""
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def reading(cls, path: str, digest: str) -> Staged:
        """Begins to read a safetensors file whose xxh3-128 must be ``digest``, beside the model's work."""
        made = cls(digest=digest, state="loading")
        threading.Thread(target=made._read, args=(Path(path),), daemon=True).start()
        return made

    def _read(self, path: Path) -> None:
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                found = xxhash.xxh3_128_hexdigest(view)
            if found != self.digest:
                raise ValueError(f"{path} has digest {found} instead of {self.digest}")
            with safe_open(path, framework="pt") as opened:
                self.tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            self.state = "ready"
        except Exception as error:  # whatever it is: the old weights go on serving, and the actor hears of it
            self.state, self.error = "failed", f"{type(error).__name__}: {error}"

    def put(self, load: Callable[[Iterator[tuple[str, torch.Tensor]]], object]) -> None:
        """Has ``load`` take every tensor into the model, which must be paused; the state is ``half`` meanwhile.

        Raises whatever ``load`` raises, and ValueError where it leaves a tensor; the model must not answer then.
        """
        taken: set[str] = set()

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in self.tensors.items():
                yield name, tensor
                taken.add(name)

        self.state = "half"
        load(tensors())
        left = sorted(set(self.tensors) - taken)
        if left:
            raise ValueError(f"{len(left)} tensors were not taken, the first is {left[0]}")
        self.state, self.tensors = "swapped", {}

    def answer(self) -> dict[str, str]:
        """What the actor is told."""
        return {"digest": self.digest, "state": self.state, "error": self.error}

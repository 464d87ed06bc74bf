"""Methods that a Steadyhelm rollout actor calls on vLLM's workers, through ``--worker-extension-cls``.

New weights are read and verified while the server goes on serving, and put into the model by vLLM's own reload, which
knows packed, fused and sharded layers, while it is paused. This package runs in vLLM's environment and knows nothing of
Steadyhelm; the two sides agree on three method names and their answers.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open


@dataclass
class Staged:
    """Weights on their way into the model. ``state`` is none, loading, ready, failed, swapped or half."""

    digest: str = ""
    state: str = "none"
    error: str = ""
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def read(self, path: Path) -> None:
        """Takes the tensors of a safetensors file whose xxh3-128 is ``digest``."""
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

    def put(self, runner: Any) -> None:
        """Loads the tensors into the model of vLLM's model runner. Raises what vLLM raises, in state ``half``."""
        taken: set[str] = set()

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in self.tensors.items():
                yield name, tensor
                taken.add(name)

        self.state = "half"
        runner.reload_weights(weights_iterator=tensors())
        left = sorted(set(self.tensors) - taken)
        if left:
            raise ValueError(f"{len(left)} tensors were not taken, the first is {left[0]}")
        _pack_output_layers(runner.get_model())
        self.state, self.tensors = "swapped", {}

    def answer(self) -> dict[str, str]:
        """What the actor is told."""
        return {"digest": self.digest, "state": self.state, "error": self.error}


def _pack_output_layers(model: torch.nn.Module) -> None:
    """Packs output layers anew, of which vLLM keeps a packed copy on CPUs.

    One that shares its weight with the embedding is given no weight of its own, so vLLM's reload leaves the copy as it
    was, and the model answers with new hidden states and old logits.
    """
    for module in model.modules():
        if hasattr(module, "cpu_linear") and hasattr(module, "tie_weights"):
            module.quant_method.process_weights_after_loading(module)


class WeightSwap:
    """Mixed into each worker by vLLM; every method answers with a JSON object, see ``Staged``."""

    _steadyhelm = Staged()

    def steadyhelm_stage(self, path: str, digest: str) -> dict[str, str]:
        """Begins to read a safetensors file beside the model's work."""
        self._steadyhelm = Staged(digest=digest, state="loading")
        threading.Thread(target=self._steadyhelm.read, args=(Path(path),), daemon=True).start()
        return self._steadyhelm.answer()

    def steadyhelm_staged(self) -> dict[str, str]:
        """How far that is."""
        return self._steadyhelm.answer()

    def steadyhelm_swap(self, digest: str) -> dict[str, str]:
        """Puts the staged weights into the model; to be called while the scheduler is paused.

        After any other answer than state ``swapped``, and after an error, the model must not answer any more.
        """
        if self._steadyhelm.digest == digest and self._steadyhelm.state == "ready":
            self._steadyhelm.put(self.model_runner)  # type: ignore[attr-defined]  # the worker's own
        return self._steadyhelm.answer()

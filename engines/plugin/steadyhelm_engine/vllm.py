"""Methods that a Steadyhelm rollout actor calls on vLLM's workers, through ``--worker-extension-cls``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from steadyhelm_engine.staged import Staged


class WeightSwap:
    """Mixed into each worker by vLLM; every method answers with a JSON object, see ``Staged``."""

    _steadyhelm = Staged()

    def steadyhelm_stage(self, path: str, digest: str) -> dict[str, str]:
        """Begins to read a safetensors file beside the model's work."""
        self._steadyhelm = Staged.reading(path, digest)
        return self._steadyhelm.answer()

    def steadyhelm_staged(self) -> dict[str, str]:
        """How far that is."""
        return self._steadyhelm.answer()

    def steadyhelm_swap(self, digest: str) -> dict[str, str]:
        """Puts the staged weights into the model; to be called while the scheduler is paused.

        vLLM's own reload does it, which knows packed, fused and sharded layers. After any other answer than state
        ``swapped``, and after an error, the model must not answer any more.
        """
        if self._steadyhelm.digest == digest and self._steadyhelm.state == "ready":
            self._steadyhelm.put(self._reload)
        return self._steadyhelm.answer()

    def _reload(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        runner = self.model_runner  # type: ignore[attr-defined]  # the worker's own
        runner.reload_weights(weights_iterator=tensors)
        _pack_output_layers(runner.get_model())


def _pack_output_layers(model: torch.nn.Module) -> None:
    """Packs output layers anew, of which vLLM keeps a packed copy on CPUs.

    One that shares its weight with the embedding is given no weight of its own, so vLLM's reload leaves the copy as it
    was, and the model answers with new hidden states and old logits.
    """
    for module in model.modules():
        if hasattr(module, "cpu_linear") and hasattr(module, "tie_weights"):
            module.quant_method.process_weights_after_loading(module)

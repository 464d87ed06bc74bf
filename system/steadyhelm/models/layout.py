"""Names, shapes and types that a policy's weights must have, without the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from steadyhelm.data.types import PolicyVersion
from steadyhelm.errors import ModelError
from steadyhelm.models.load import DTYPES, is_multimodal, load_config
from steadyhelm.models.pretrained import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    revert_weight_conversion,
)


class ModelLayout:
    """What the trainer's ``state_dict`` of a model folder looks like, and what the folder calls its tensors.

    Args:
        folder: Hugging Face model folder.
        dtype: of the weights, as in ``load_model``.
        trust_remote_code: whether Python code inside the folder may run.

    Raises:
        ModelError: the folder holds no usable model.
    """

    def __init__(self, folder: str | Path, *, dtype: str, trust_remote_code: bool = False) -> None:
        config = load_config(folder, trust_remote_code=trust_remote_code)
        factory: Any = AutoModelForImageTextToText if is_multimodal(config) else AutoModelForCausalLM
        with torch.device("meta"):
            model = factory.from_config(config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)
        model.tie_weights()
        self._tensors: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
        self._groups: dict[int, list[str]] = {}
        for name, tensor in self._tensors.items():
            self._groups.setdefault(id(tensor), []).append(name)
        self._saved = _saved_names(model, {names[0]: self._tensors[names[0]] for names in self._groups.values()})
        missing = sorted(set(self._saved.values()) - _names_in(Path(folder)))
        if missing:
            raise ModelError(
                f"model folder {folder} has no tensor {missing[0]!r} ({len(missing)} are missing), so engine servers "
                "would not know new weights by their names: save it with save_pretrained"
            )

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, each once."""
        return sum(self._tensors[names[0]].nbytes for names in self._groups.values())

    def distinct(self, tensors: Mapping[str, torch.Tensor], version: PolicyVersion) -> dict[str, torch.Tensor]:
        """The tensors, each once, under the name that the model folder has it by. Raises ModelError unless they fit.

        Names that share memory in the model (a tied output layer) may come under one of them or under several with
        equal values.
        """
        for name in (*tensors, *self._tensors):
            wanted, given = self._tensors.get(name), tensors.get(name)
            if wanted is None:
                raise _misfit(version, f"it has no tensor {name!r}")
            if given is not None and (given.shape, given.dtype) != (wanted.shape, wanted.dtype):
                raise _misfit(version, f"{name!r} is {_kind(given)} but must be {_kind(wanted)}")
        found = {}
        for names in self._groups.values():
            values = [tensors[name] for name in names if name in tensors]
            if not values:
                raise _misfit(version, f"the tensor {names[0]!r} is missing")
            if not all(torch.equal(values[0], other) for other in values[1:]):
                raise _misfit(version, f"{', '.join(names)} are one tensor in it, but come with unequal values")
            found[self._saved[names[0]]] = values[0]
        return found


def _saved_names(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """What ``save_pretrained`` calls each tensor: many architectures keep the names of their first checkpoints.

    Engine servers skip tensors of other names without a word. Raises ModelError where saving does more than rename.
    """
    own = {id(tensor): name for name, tensor in tensors.items()}
    saved = {own.get(id(tensor), ""): name for name, tensor in revert_weight_conversion(model, dict(tensors)).items()}
    if saved.keys() != tensors.keys():
        raise ModelError(
            f"weights of {type(model).__name__} are not saved as they are trained, so engine servers cannot take them: "
            "use rollout.engine.type 'transformers'"
        )
    return saved


def _names_in(folder: Path) -> set[str]:
    """The names of the tensors in a folder's safetensors files. Raises ModelError where one cannot be read."""
    names: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as opened:
                names |= set(opened.keys())
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read ({error}): save the model again") from error
    return names


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _misfit(version: PolicyVersion, why: str) -> ModelError:
    return ModelError(
        f"weights {version} do not fit the engine's model: {why}; engine and learner need the same model.path and "
        "model.dtype"
    )

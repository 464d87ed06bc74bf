"""What a model folder calls the tensors that engine servers are given."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from steadyhelm.data.types import PolicyVersion
from steadyhelm.errors import ModelError
from steadyhelm.models.layout import ModelLayout
from steadyhelm.models.load import load_model

VERSION = PolicyVersion(iteration=1, attempt=1)


def test_weights_get_the_names_that_their_folder_has_them_by(tiny_model: Path) -> None:
    trained = load_model(tiny_model, dtype="float32").state_dict()
    found = ModelLayout(tiny_model, dtype="float32").distinct(trained, VERSION)
    saved = load_file(tiny_model / "model.safetensors")
    assert found.keys() == saved.keys() != trained.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, saved[name]), name


def test_a_folder_with_other_names_is_refused_since_servers_would_skip_them(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    tensors = load_file(tiny_model / "model.safetensors")
    renamed = {name.replace("visual.", "eyes."): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="has no tensor 'visual"):
        ModelLayout(tmp_path, dtype="float32")

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from steadyhelm.errors import ModelError
from steadyhelm.models.folder import require_model_folder
from steadyhelm.models.load import load_model


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere does not exist: set model\.path"):
        load_model(tmp_path / "nowhere", dtype="float32")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_model(tmp_path, dtype="float32")


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "no-such-model"}'])
def test_a_config_that_cannot_be_read_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        load_model(folder, dtype="float32")


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no weights \(\*\.safetensors\): save the whole model there"):
        load_model(folder, dtype="float32")


@pytest.fixture
def pickled(folder: Path) -> Path:
    """The same model with its weights as a pickle, which Transformers would load by itself."""
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()
    return folder


def test_pickled_weights_are_refused_and_the_remedy_is_named(pickled: Path) -> None:
    remedy = r"pickled weights only \(pytorch_model\.bin\).*save_pretrained\(safe_serialization=True\)"
    with pytest.raises(ModelError, match=remedy):
        load_model(pickled, dtype="float32")
    with pytest.raises(ModelError, match=remedy):
        require_model_folder(pickled)


def test_a_stray_safetensors_file_does_not_let_pickled_weights_in(pickled: Path) -> None:
    save_file({"stray": torch.zeros(1)}, pickled / "stray.safetensors")
    with pytest.raises(ModelError, match=r"weights in model folder .* cannot be loaded"):
        load_model(pickled, dtype="float32")


def test_weights_cut_short_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder, dtype="float32")


def test_a_missing_tensor_is_an_error_instead_of_random_numbers(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if "down_proj" in name)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the model's tensors .*down_proj"):
        load_model(folder, dtype="float32")


def test_models_whose_numbers_would_differ_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["logits_scaling"] = 2.0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="sets logits_scaling"):
        load_model(folder, dtype="float32")


def test_sliding_window_attention_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"layer_types": ["sliding_attention"] * 3, "use_sliding_window": True, "sliding_window": 8}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="sliding-window"):
        load_model(folder, dtype="float32")


def test_an_unknown_dtype_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.dtype is 'int8': use one of float32, bfloat16, float16"):
        load_model(folder, dtype="int8")


def test_loading_prints_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(folder, dtype="float32")
    assert capfd.readouterr() == ("", "")

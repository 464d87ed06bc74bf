"""What a model folder must hold, looked up without loading anything: no torch, no Transformers."""

from __future__ import annotations

import json
from pathlib import Path

from steadyhelm.errors import ModelError

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Files of which a tokenizer is made; one of them is there."""
_PICKLED = ("*.bin", "*.pt", "*.pth")


def require_config(folder: Path) -> None:
    """Raises ModelError unless ``folder`` is a folder with a model's configuration."""
    if not folder.is_dir():
        raise ModelError(f"model folder {folder} does not exist: set model.path to a Hugging Face model folder")
    if not (folder / "config.json").is_file():
        raise ModelError(f"model folder {folder} has no config.json: save the model with save_pretrained first")


def require_weights(folder: Path) -> None:
    """Raises ModelError unless ``folder`` has safetensors weights: pickled ones are not read, reading executes them."""
    if next(folder.glob("*.safetensors"), None):
        return
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"model folder {folder} has pickled weights only ({pickled[0]}), which are not read because that executes "
            "what is in them: convert the model where you trust it, with save_pretrained(safe_serialization=True)"
        )
    raise ModelError(f"model folder {folder} has no weights (*.safetensors): save the whole model there")


def require_model_folder(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Raises ModelError where a file is missing that every service would miss: told before anything is started.

    Args:
        folder: a Hugging Face model folder.
        trust_remote_code: whether code in the folder may bring its own tokenizer, which is then not looked for.
    """
    require_config(folder)
    require_weights(folder)
    if trust_remote_code:
        return
    if not any((folder / name).is_file() for name in VOCABULARIES):
        # Transformers would build a tokenizer of special tokens alone.
        raise ModelError(f"model folder {folder} has no tokenizer ({VOCABULARIES[0]}): save it with the model")
    if not _has_chat_template(folder):
        raise ModelError(
            f"the tokenizer in {folder} has no chat template: add chat_template.jinja or use an instruction-tuned model"
        )


def _has_chat_template(folder: Path) -> bool:
    """Whether a file is there that Transformers takes the tokenizer's chat template from."""
    if (folder / "chat_template.jinja").is_file() or next(folder.glob("additional_chat_templates/*.jinja"), None):
        return True
    path = folder / "tokenizer_config.json"
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get("chat_template")) if path.is_file() else False
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path} cannot be read ({error}): save the tokenizer again") from error

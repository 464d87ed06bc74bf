"""Loading of a policy from a Hugging Face model folder.

Supported are causal language models and the Qwen2-VL family. A folder is refused where its numbers could silently be
others than the engine's: weights that are missing (Transformers would fill them with random numbers), logits that the
model scales behind its output layer, sliding-window attention, and multimodal models whose positions we do not compute.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from steadyhelm.errors import ModelError
from steadyhelm.models.folder import require_config, require_weights
from steadyhelm.models.pretrained import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    disable_progress_bar,
)

MROPE_MODELS = ("qwen2_vl", "qwen2_5_vl")
"""Multimodal model types whose three-part rotary positions ``models.batch`` computes."""

_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Config fields of models that change logits behind the output layer, which ``models.logprobs`` does not do."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_config(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The model folder's Transformers configuration. Raises ModelError where the folder holds no usable model."""
    path = Path(folder)
    require_config(path)
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path / 'config.json'} cannot be read ({error}): save the model again") from error
    if is_multimodal(config) and config.model_type not in MROPE_MODELS:
        raise ModelError(
            f"model folder {path} is a multimodal {config.model_type!r}, whose positions are not supported: use a "
            f"model of type {' or '.join(MROPE_MODELS)}, or a text-only one"
        )
    text = config.get_text_config()
    for name in _LOGIT_CHANGES:
        if getattr(text, name, None) not in (None, 1.0):
            raise ModelError(
                f"{path / 'config.json'} sets {name}, which changes logits behind the output layer and is not "
                "supported: use another model"
            )
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise ModelError(
            f"{path / 'config.json'} asks for sliding-window attention, which is not supported: set "
            "use_sliding_window to false where the context allows it"
        )
    return config


def is_multimodal(config: Any) -> bool:
    """Whether the model of this Transformers configuration sees images."""
    return getattr(config, "vision_config", None) is not None


def load_model(
    folder: str | Path, *, dtype: str, trust_remote_code: bool = False, device: str = "cpu"
) -> torch.nn.Module:
    """A Transformers causal or vision-language model in evaluation mode on ``device``, weights in ``dtype``.

    Args:
        folder: Hugging Face model folder; nothing is looked up elsewhere.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; the folder's own type may be another.
        trust_remote_code: whether Python code inside the folder may run.
        device: torch device name.

    Raises:
        ModelError: the folder, its config or its weights are missing, incomplete, pickled or unsupported.
    """
    path = Path(folder)
    config = load_config(path, trust_remote_code=trust_remote_code)
    if dtype not in DTYPES:
        raise ModelError(f"model.dtype is {dtype!r}: use one of {', '.join(DTYPES)}")
    require_weights(path)
    disable_progress_bar()  # the run's own display shows what a service is doing
    factory = AutoModelForImageTextToText if is_multimodal(config) else AutoModelForCausalLM
    try:
        model, info = factory.from_pretrained(
            str(path),
            config=config,
            dtype=DTYPES[dtype],
            attn_implementation="sdpa",
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            use_safetensors=True,  # a folder with both kinds has its pickles ignored
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"the weights in model folder {path} cannot be loaded ({error}): save the whole model again as safetensors"
        ) from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ModelError(
            f"model folder {path} lacks {len(missing)} of the model's tensors or has them in another shape (the first "
            f"is {missing[0]}): save the whole model again"
        )
    loaded: torch.nn.Module = model.to(device).eval()
    return loaded


def decoder_of(model: torch.nn.Module) -> torch.nn.Module:
    """The model without its output layer: tokens (and pixels) to hidden states [N, L, H]."""
    base: torch.nn.Module = model.base_model  # type: ignore[assignment]  # nn.Module's attributes have no types
    return base


def output_layer_of(model: torch.nn.Module) -> torch.nn.Module:
    """The layer from hidden states [..., H] to logits [..., V]."""
    layer: torch.nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    return layer

"""Policies to measure with: the digits task's tiny Qwen2.5-VL, or one of a real size, with random weights."""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig, Qwen2_5_VLForConditionalGeneration

MODULE = Path(__file__).resolve().parents[1] / "workloads" / "r1_reward" / "tiny_model.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of Qwen2.5's text part; the published models' figures."""

    vocabulary: int
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    key_value_heads: int
    tied: bool = True


SHAPES: Mapping[str, Shape] = {
    "0.5B": Shape(vocabulary=151_936, hidden=896, feed_forward=4864, layers=24, heads=14, key_value_heads=2),
    "3B": Shape(vocabulary=151_936, hidden=2048, feed_forward=11_008, layers=36, heads=16, key_value_heads=2),
    "7B": Shape(
        vocabulary=152_064, hidden=3584, feed_forward=18_944, layers=28, heads=28, key_value_heads=4, tied=False
    ),
}


def build(folder: Path, size: str = "", constants: Mapping[str, int] | None = None) -> None:
    """Writes a Qwen2.5-VL with the digits task's tokenizer into ``folder``.

    Args:
        folder: is made where it does not exist.
        size: a name of ``SHAPES``, in bfloat16 and with Qwen2.5-VL's vision tower; none for the tiny one.
        constants: of ``tiny_model.py``, those that are to be others.
    """
    make = runpy.run_path(str(MODULE))["build"]
    unknown = (constants or {}).keys() - make.__globals__.keys()
    if unknown:
        raise ValueError(f"{MODULE.name} has no constants {sorted(unknown)}")
    make.__globals__.update(constants or {})
    make(folder, 0)
    if size:
        _enlarge(folder, SHAPES[size])


def _enlarge(folder: Path, shape: Shape) -> None:
    config = AutoConfig.from_pretrained(folder)
    pairs = shape.hidden // shape.heads // 2
    config.text_config.update(
        {
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.feed_forward,
            "num_hidden_layers": shape.layers,
            "layer_types": ["full_attention"] * shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.key_value_heads,
            "initializer_range": 0.02,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [pairs // 4, 3 * pairs // 8, 3 * pairs // 8],
                "rope_theta": 1e6,
            },
        }
    )
    config.vision_config.update(
        {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "out_hidden_size": shape.hidden,
            "initializer_range": 0.02,
        }
    )
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = shape.tied
    config.dtype = torch.bfloat16
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    model.save_pretrained(folder)

"""The task of the smoke run: a Qwen2.5-VL of some ten thousand parameters, and pairs about coloured squares."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from steadyhelm.data.types import PreferencePair
from steadyhelm.rewards.interface import Sample

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def pairs() -> Sequence[PreferencePair]:
    """A square of each of four colours, and a right and a wrong name for it."""
    from PIL import Image

    colours = ("red", "green", "blue", "black")
    found = []
    for number, colour in enumerate(colours):
        png = io.BytesIO()
        Image.new("RGB", (56, 56), colour).save(png, "PNG")
        found.append(
            PreferencePair(
                pair_id=colour,
                question="Which colour is it?",
                responses=(colour, colours[number - 1]),
                images=(png.getvalue(),),
                label=1,
            )
        )
    return found


def vowels(sample: Sample) -> float:
    """A reward that random bytes earn some of."""
    return sum(letter in "aeiou" for letter in sample.completion_text) / max(1, len(sample.completion_text))


def model(folder: Path, seed: int) -> None:
    """Writes the model, whose tokens are bytes, with random weights into ``folder``."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLImageProcessor,
    )

    vocabulary = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0], chat_template=TEMPLATE
    )
    ids = dict(zip(SPECIAL, fast.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "depth": 1, "out_hidden_size": 16}
    text = {
        "vocab_size": len(fast),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "bos_token_id": ids["<|endoftext|>"],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=shape | {"window_size": 56, "fullatt_block_indexes": [0]},
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        dtype="float32",
    )
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 56 * 56}).save_pretrained(folder)

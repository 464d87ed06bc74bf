"""A Qwen2.5-VL of under a million parameters, in a folder like any checkpoint's.

The architecture, the tokenizer's kind, the chat template's form and the image processor are Qwen2.5-VL's; only the
sizes are those of the digits task. ``build`` is a run file's ``model.factory``.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, START, END, VISION_START, VISION_END, "<|vision_pad|>", IMAGE_PAD, VIDEO_PAD)
MAX_VOCAB = 512
HIDDEN, LAYERS, HEADS, KEY_VALUE_HEADS, VISION_HEADS = 128, 3, 4, 2, 8
ROPE_THETA = 30.0
"""So low because prompts are short: more of the few frequencies then tell neighbouring positions apart."""
INITIALIZER_RANGE = 0.1
"""About 1/√HIDDEN; the 0.02 of large models is learned from much more slowly at this width."""
MIN_PIXELS, MAX_PIXELS = 56 * 56, 640 * 28 * 28

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'video' or 'video' in part -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif 'text' in part -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def build(folder: Path, seed: int) -> None:
    """Writes the model with fresh weights into ``folder``; the same seed gives the same weights.

    Args:
        folder: is made where it does not exist.
        seed: of the weights; the tokenizer does not depend on it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(_config(tokenizer))
    ends = tokenizer.convert_tokens_to_ids([END, END_OF_TEXT])
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=ends, pad_token_id=ends[1], bos_token_id=ends[1]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    for processor in (Qwen2VLImageProcessor(size=size), Qwen2VLVideoProcessor(size=size)):
        processor.save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's special tokens, trained on every text of the task: any text can be encoded."""
    texts = runpy.run_path(str(Path(__file__).with_name("digits.py")))["texts"]()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [*texts, "user\nassistant\nsystem\n"],
        trainers.BpeTrainer(
            vocab_size=MAX_VOCAB,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in (END, END_OF_TEXT)],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def _config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KEY_VALUE_HEADS,
            "max_position_embeddings": 1024,
            "initializer_range": INITIALIZER_RANGE,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": ROPE_THETA},
            "bos_token_id": ids[END_OF_TEXT],
            "eos_token_id": ids[END],
            "pad_token_id": ids[END_OF_TEXT],
        },
        vision_config={
            "depth": 2,
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_heads": VISION_HEADS,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "out_hidden_size": HIDDEN,
            "initializer_range": INITIALIZER_RANGE,
        },
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        eos_token_id=ids[END],
        pad_token_id=ids[END_OF_TEXT],
        bos_token_id=ids[END_OF_TEXT],
        tie_word_embeddings=True,
        dtype="float32",
    )

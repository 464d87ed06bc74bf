"""The task of ``tide.yaml``: prompts that are short, then long, then short again, and a model of 6,000 parameters."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from steadyhelm.data.types import PreferencePair
from steadyhelm.rewards.interface import Sample

PROMPTS = 24
"""Prompts of an iteration, as in the run file."""
ITERATIONS = {"short": 8, "long": 16, "short again": 40}
QUICK = {"short": 2, "long": 4, "short again": 1}
SHORT, LONG = 60, 900
"""Tokens of a question; each is a letter."""
END = "<|im_end|>"
SPECIAL = ("<|endoftext|>", "<|im_start|>", END)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pairs() -> Sequence[PreferencePair]:
    """Questions in the order in which iterations take them."""
    return _pairs(ITERATIONS)


def quick_pairs() -> Sequence[PreferencePair]:
    """The same for a few iterations."""
    return _pairs(QUICK)


def _pairs(iterations: Mapping[str, int]) -> Sequence[PreferencePair]:
    lengths = [LONG if name == "long" else SHORT for name, count in iterations.items() for _ in range(PROMPTS * count)]
    return [
        PreferencePair(
            pair_id=f"{number:05d}", question=f"{number:05d}".ljust(length, "?"), responses=("yes", "no"), label=1
        )
        for number, length in enumerate(lengths)
    ]


def template(question: str, first: str, second: str) -> str:
    """The question alone."""
    return question


def vowels(sample: Sample) -> float:
    """A reward that random letters earn some of."""
    return sum(letter in "aeiou" for letter in sample.completion_text) / max(1, len(sample.completion_text))


def model(folder: Path, seed: int) -> None:
    """Writes the model, whose tokens are bytes, with random weights and its code into ``folder``."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    vocabulary = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=SPECIAL[0], chat_template=TEMPLATE
    )
    ids = dict(zip(SPECIAL, fast.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    config = Qwen2Config(
        vocab_size=len(fast),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=ids[END],
        pad_token_id=ids[SPECIAL[0]],
        bos_token_id=ids[SPECIAL[0]],
        tie_word_embeddings=True,
        dtype="float32",
        auto_map={"AutoModelForCausalLM": "modeling_tide.TideForCausalLM"},
    )
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    shutil.copy(Path(__file__).with_name("modeling_tide.py"), folder)

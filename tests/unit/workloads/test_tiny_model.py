import hashlib
import io
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from steadyhelm.config.load import load_run_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
)

from tests.conftest import WORKLOAD

QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path):
    return AutoTokenizer.from_pretrained(tiny_model)


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_the_same_seed_writes_the_same_files_and_another_seed_other_weights_only(tiny_model, tmp_path):
    import tiny_model as factory

    factory.build(tmp_path / "again", 0)
    factory.build(tmp_path / "other", 1)

    names = sorted(path.name for path in tiny_model.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (tiny_model / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    differing = [n for n in names if (tiny_model / n).read_bytes() != (tmp_path / "other" / n).read_bytes()]
    assert differing == ["model.safetensors"]


def test_building_leaves_the_callers_random_state_alone(tmp_path):
    import tiny_model as factory

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    factory.build(tmp_path / "model", 3)
    assert torch.equal(torch.rand(3), expected)


def test_every_text_of_the_task_is_encoded_without_loss(tokenizer, digits):
    for text in digits.texts():
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_any_other_text_is_encoded_without_loss_too(tokenizer):
    text = "Ünïcode 数字 \t\x07 <think>\r\n 42 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_trace_is_25_to_36_tokens_long(tokenizer, digits):
    lengths = [len(tokenizer.encode(pair.trace)) + 1 for pair in digits.sft_pairs()]
    assert min(lengths) >= 25
    assert max(lengths) <= 36


def test_qwens_special_tokens_are_single_tokens_and_the_vocabulary_is_small(tokenizer):
    assert [len(tokenizer.encode(token)) for token in QWEN_TOKENS] == [1] * 6
    assert len(tokenizer) <= 512
    assert tokenizer.eos_token == "<|im_end|>"


def test_the_folder_loads_by_the_auto_classes_and_an_image_is_four_tokens(tiny_model, digits):
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    processor = AutoProcessor.from_pretrained(tiny_model)
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    assert model.config.text_config.vocab_size == len(processor.tokenizer)

    pair = digits.eval_pairs()[0]
    content = [{"type": "image"}, {"type": "text", "text": digits.template(pair.question, *pair.responses)}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text.startswith("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")

    batch = processor(text=[text], images=[Image.open(io.BytesIO(pair.images[0]))], return_tensors="pt")
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert int((batch["input_ids"] == model.config.image_token_id).sum()) == 4
    assert batch["input_ids"].shape[1] <= load_run_file(WORKLOAD / "digits.yaml").data.max_prompt_tokens
    tokens = model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert tokens.shape[0] == 1
    assert batch["input_ids"].shape[1] < tokens.shape[1] <= batch["input_ids"].shape[1] + 6


def test_the_picture_reaches_the_logits(tiny_model, digits):
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    processor = AutoProcessor.from_pretrained(tiny_model)
    text = "<|vision_start|><|image_pad|><|vision_end|>Which digit is it?"
    pictures = [Image.open(io.BytesIO(digits._images()[0][index])) for index in (0, 1)]
    with torch.no_grad():
        first, second = (
            model(**processor(text=[text], images=[picture], return_tensors="pt")).logits[0, -1] for picture in pictures
        )
    assert float((first - second).abs().max()) > 1e-3


def test_generation_stops_at_the_end_of_the_turn(tiny_model, tokenizer):
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == ends


@pytest.mark.parametrize("name", ["digits.yaml", "digits_sft.yaml"])
def test_the_run_files_are_valid_and_every_name_in_them_exists(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(WORKLOAD), *sys.path])
    run = load_run_file(WORKLOAD / name)
    assert run.steps_per_iteration >= 2
    assert run.model.dtype == "float32"


def test_reinforcement_learning_starts_where_the_cold_start_ends():
    cold, rl = load_run_file(WORKLOAD / "digits_sft.yaml"), load_run_file(WORKLOAD / "digits.yaml")
    assert rl.model.path == f"{cold.store.uri}/{cold.name}/model"
    assert rl.rollouts_per_iteration >= 128
    assert rl.steps_per_iteration == 2

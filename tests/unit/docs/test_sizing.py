"""The sizing page's arithmetic, held to Transformers' own models and to sizes worked out by hand."""

import runpy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.unit.docs.markdown import DOCS

SIZING = runpy.run_path(str(DOCS / "reference" / "sizing.py"))
MODELS = SIZING["MODELS"]


@pytest.mark.parametrize("name", MODELS)
def test_a_models_parameters_are_those_that_transformers_makes_of_its_configuration(name: str):
    shape = MODELS[name]
    text = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.ffn,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
    }
    with torch.device("meta"):
        if not shape.vision_ffn:
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **text))
        else:
            vision = {"hidden_size": 1280, "intermediate_size": shape.vision_ffn, "out_hidden_size": shape.hidden}
            config = AutoConfig.for_model(
                "qwen2_5_vl", text_config=text, vision_config=vision, tie_word_embeddings=shape.tied
            )
            model = AutoModelForImageTextToText.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters


def test_a_rank_holds_what_zero_leaves_it():
    shape = MODELS["Qwen2.5-VL-7B"]
    p = 8_292_166_656
    assert SIZING["state"](shape, 2, 4) == 2 * p + 16 * p / 4
    assert SIZING["state"](shape, 3, 4) == 18 * p / 4
    assert SIZING["state"](shape, 2, 1) == SIZING["state"](shape, 3, 1) == 18 * p
    assert shape.kv_token == 2 * 2 * 28 * 4 * 128 == 57_344


def test_the_fewest_gpus_are_enough_and_half_of_them_are_not():
    room = 0.9 * 80e9
    for shape in MODELS.values():
        for stage in (2, 3):
            ranks = SIZING["least_ranks"](shape, stage)
            if ranks is None:
                assert stage == 2
                assert shape.weights > 0.8 * room  # a copy on each rank leaves nothing
                continue
            assert SIZING["sequences_trained"](shape, stage, ranks) >= 1
            assert ranks == 1 or SIZING["sequences_trained"](shape, stage, ranks // 2) < 1
        gpus = SIZING["engine_gpus"](shape)
        assert shape.weights <= gpus * room * 2 / 3
        assert gpus == 1 or shape.weights > gpus / 2 * room * 2 / 3
        assert SIZING["sequences_sampled"](shape, gpus) >= 32

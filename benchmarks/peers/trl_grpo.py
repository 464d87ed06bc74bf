"""TRL's side of vs_trl: trains ``GRPOTrainer`` on the prompts of a folder and prints what each iteration took.

Runs in TRL's own environment: ``python trl_grpo.py FOLDER``, or under ``torch.distributed.run`` with several processes.
``FOLDER/settings.json`` holds a ``vs_trl.TrlSettings``; ``FOLDER/prompts.json`` is a list of ``{"text", "image"}``, the
image a PNG in the folder. Every process prints JSON lines: first ``{"versions": …}``, then for each iteration
``{"rank", "iteration", "seconds", "tokens"}``, where the tokens are those of the process's own completions.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import letters
import torch
from datasets import Dataset, Features, Image, List, Value
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

RANK = int(os.environ.get("RANK", "0"))
RANKS = int(os.environ.get("WORLD_SIZE", "1"))


class Clock(TrainerCallback):  # type: ignore[misc]  # TRL's environment is not the one that types are checked in
    """Prints a line behind the last optimiser step of each iteration. The time is that since the line before."""

    def __init__(self, steps: int) -> None:
        self.tokens = 0
        """Completion tokens that were sampled since the last line."""
        self._steps = steps
        self._since = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The first iteration begins."""
        self._since = time.perf_counter()

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """An optimiser step is done."""
        if state.global_step % self._steps:
            return
        now = time.perf_counter()
        iteration = state.global_step // self._steps
        say({"rank": RANK, "iteration": iteration, "seconds": now - self._since, "tokens": self.tokens})
        self._since, self.tokens = now, 0


def say(line: dict[str, Any]) -> None:
    """Prints a JSON line."""
    print(json.dumps(line) + "\n", end="", flush=True)  # in one piece: other processes print beside this one


def prompts(folder: Path) -> Dataset:
    """The prompts in the form that TRL takes: a conversation and its image."""
    rows = [
        {"prompt": [{"role": "user", "content": row["text"]}], "image": str(folder / row["image"])}
        for row in json.loads((folder / "prompts.json").read_text())
    ]
    message = {"role": Value("string"), "content": Value("string")}
    return Dataset.from_list(rows, features=Features({"prompt": List(message), "image": Image()}))


def main(folder: Path) -> None:
    """Trains as ``FOLDER/settings.json`` says."""
    settings = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(settings["threads"])
    steps = settings["completions"] // settings["train_batch"]
    clock = Clock(steps)

    def reward(completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        clock.tokens += sum(map(len, completion_ids))
        texts = [message[0]["content"] for message in completions]
        return [letters.share(text if isinstance(text, str) else text[0]["text"]) for text in texts]

    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch,
            use_cpu=True,
            bf16=False,
            model_init_kwargs={"dtype": "float32"},
            gradient_checkpointing=False,
            beta=0.0,
            loss_type="grpo",
            epsilon=0.2,
            temperature=1.0,
            num_generations=settings["samples_per_prompt"],
            max_completion_length=settings["max_new_tokens"],
            generation_kwargs={"suppress_tokens": settings["suppress_tokens"]},
            per_device_train_batch_size=settings["micro_batch"],
            gradient_accumulation_steps=settings["train_batch"] // (RANKS * settings["micro_batch"]),
            steps_per_generation=settings["completions"] // (RANKS * settings["micro_batch"]),
            max_steps=settings["iterations"] * steps,
            learning_rate=settings["lr"],
            lr_scheduler_type="constant",
            adam_beta1=0.9,
            adam_beta2=0.99,
            weight_decay=0.0,
            max_grad_norm=1.0,
            shuffle_dataset=False,
            ddp_find_unused_parameters=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            seed=0,
        )
        trainer = GRPOTrainer(
            model=settings["model"], reward_funcs=reward, args=config, train_dataset=prompts(folder), callbacks=[clock]
        )
        say({"versions": {name: importlib.metadata.version(name) for name in ("trl", "torch", "transformers")}})
        trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

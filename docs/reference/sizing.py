"""What a model takes, by arithmetic: the numbers of the page ``sizing.md``.

P are a model's parameters, and N the ranks of the learner. All sizes are bytes, in decimal units; weights are bfloat16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GPU = 80e9
"""Memory of the GPU that the page counts in."""
USABLE = 0.9
"""Share of it that is planned with: the rest is CUDA's, fragmentation, and what is forgotten here."""
BUFFERS = 4e9
"""Of a rank: DeepSpeed's two buckets of at most 500 million bfloat16 gradients, and one of them in float32."""
GATHERED = 2e9
"""Of a rank under ZeRO-3: the billion parameters that it gathers ahead."""
LOGITS = 4 * (256 << 20)
"""Of a rank: a chunk of float32 logits (``models.logprobs``), its probabilities, and their gradients."""
SEQUENCE = 4096
"""Tokens of a sequence: prompt, images and completion."""
RANKS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What decides a Qwen2.5 or Qwen2.5-VL model's size: the words of its ``config.json``."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    tied: bool
    vision_ffn: int = 0
    """Of the vision tower's layers; 0 without one."""

    @property
    def head(self) -> int:
        """Width of an attention head."""
        return self.hidden // self.heads

    @property
    def text(self) -> int:
        """Parameters without the vision tower."""
        kv = self.kv_heads * self.head
        attention = 2 * self.hidden * self.hidden + self.hidden + 2 * (self.hidden * kv + kv)
        layer = attention + 3 * self.hidden * self.ffn + 2 * self.hidden
        return self.layers * layer + self.hidden + self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def vision(self) -> int:
        """Parameters of the vision tower: 32 layers of width 1280, patches of 2 x 14 x 14, four of them a token."""
        if not self.vision_ffn:
            return 0
        width, merged = 1280, 4 * 1280
        attention = 4 * (width * width + width)
        layer = attention + 3 * width * self.vision_ffn + 2 * self.vision_ffn + width + 2 * width
        merger = width + merged * merged + merged + merged * self.hidden + self.hidden
        return 32 * layer + 3 * 2 * 14 * 14 * width + merger

    @property
    def parameters(self) -> int:
        """All of them: P."""
        return self.text + self.vision

    @property
    def weights(self) -> int:
        """A copy of the weights: 2 P."""
        return 2 * self.parameters

    @property
    def kv_token(self) -> int:
        """The KV cache of one token: key and value, of each layer and key-value head."""
        return 2 * 2 * self.layers * self.kv_heads * self.head

    @property
    def activation_token(self) -> int:
        """What the learner keeps for one token with gradient checkpointing.

        Each layer's input, and of the one layer that is computed again some six vectors of the hidden size and three of
        the feed-forward's, with their gradients.
        """
        return 2 * self.layers * self.hidden + 2 * 2 * (6 * self.hidden + 3 * self.ffn)


MODELS = {
    "Qwen2.5-0.5B": Shape(layers=24, hidden=896, heads=14, kv_heads=2, ffn=4864, vocab=151936, tied=True),
    "Qwen2.5-1.5B": Shape(layers=28, hidden=1536, heads=12, kv_heads=2, ffn=8960, vocab=151936, tied=True),
    "Qwen2.5-VL-3B": Shape(
        layers=36, hidden=2048, heads=16, kv_heads=2, ffn=11008, vocab=151936, tied=True, vision_ffn=3420
    ),
    "Qwen2.5-VL-7B": Shape(
        layers=28, hidden=3584, heads=28, kv_heads=4, ffn=18944, vocab=152064, tied=False, vision_ffn=3420
    ),
    "Qwen2.5-14B": Shape(layers=48, hidden=5120, heads=40, kv_heads=8, ffn=13824, vocab=152064, tied=False),
    "Qwen2.5-VL-32B": Shape(
        layers=64, hidden=5120, heads=40, kv_heads=8, ffn=27648, vocab=152064, tied=False, vision_ffn=3456
    ),
    "Qwen2.5-VL-72B": Shape(
        layers=80, hidden=8192, heads=64, kv_heads=8, ffn=29568, vocab=152064, tied=False, vision_ffn=3456
    ),
}


def state(model: Shape, stage: int, ranks: int) -> float:
    """Of a rank: weights, gradients and optimiser state.

    Weights 2 P, float32 gradients 4 P, float32 masters and Adam's two moments 12 P. ZeRO-2 keeps a whole copy of the
    weights on each rank and parts the rest; ZeRO-3 parts all of it.
    """
    whole = model.weights if stage == 2 else model.weights / ranks
    return whole + 16 * model.parameters / ranks


def rank(model: Shape, stage: int, ranks: int) -> float:
    """Of a rank: all but activations."""
    bucket = BUFFERS * min(1.0, model.parameters / 500e6)
    return state(model, stage, ranks) + bucket + LOGITS + (GATHERED if stage == 3 else 0)


def least_ranks(model: Shape, stage: int) -> int | None:
    """The fewest GPUs that train the model with one sequence at a time; None where no number of them is enough."""
    one = SEQUENCE * model.activation_token
    return next((n for n in RANKS if rank(model, stage, n) + one <= USABLE * GPU), None)


def sequences_trained(model: Shape, stage: int, ranks: int) -> int:
    """Sequences of a micro-batch that fit beside the rest."""
    return int((USABLE * GPU - rank(model, stage, ranks)) // (SEQUENCE * model.activation_token))


def engine_gpus(model: Shape) -> int:
    """GPUs of an engine, a power of two: so many that a third of their memory is left for the KV cache."""
    return 2 ** max(0, math.ceil(math.log2(model.weights / (USABLE * GPU * 2 / 3))))


def sequences_sampled(model: Shape, gpus: int) -> int:
    """Whole sequences whose KV cache fits beside an engine's weights, and 4 GB of its own on each GPU."""
    return int((gpus * (USABLE * GPU - 4e9) - model.weights) // (SEQUENCE * model.kv_token))


def learner_host(model: Shape, slots: int) -> float:
    """Memory of a learner's pod of ``slots`` ranks.

    Each rank reads the whole model when it starts, and the first one once more when it exports the final model beside a
    copy of all weights; each holds its share of the new weights and of those before it.
    """
    return slots * model.weights + 2 * model.weights + 4e9 * slots


def reference_fits(model: Shape) -> bool:
    """Whether one GPU holds a reference, which is never parted."""
    return model.weights + LOGITS + SEQUENCE * model.activation_token <= USABLE * GPU


def engine_shm(model: Shape) -> float:
    """``/dev/shm`` of a rollout's pod, an engine: new weights are laid there where there is room twice over."""
    return 2 * model.weights + 1e9


def checkpoint(model: Shape) -> float:
    """Bytes of a checkpoint: float32 masters and Adam's moments."""
    return 12 * model.parameters


def gigabytes(size: float) -> str:
    """A size in GB, as the page has it."""
    amount = size / 1e9
    return f"{amount:,.1f}" if amount < 10 else f"{amount:,.0f}"


def summary() -> str:
    """The table of ``docs/kubernetes.md``: what to give each pool."""
    lines = [
        f"GPUs of {GPU / 1e9:.0f} GB, weights in bfloat16, sequences of {SEQUENCE:,} tokens,",
        "`learner.gradient_checkpointing`.",
        "",
        "| model | parameters | learner: GPUs, at least |"
        " an engine: GPUs | its sequences at a time | a reference | a checkpoint |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, model in MODELS.items():
        stage = 3 if least_ranks(model, 2) is None else 2
        gpus = engine_gpus(model)
        row = (
            f"{model.parameters / 1e9:.1f} B",
            f"{least_ranks(model, stage)} (ZeRO-{stage})",
            str(gpus),
            f"{sequences_sampled(model, gpus):,}",
            "1 GPU" if reference_fits(model) else "too large for one",
            f"{gigabytes(checkpoint(model))} GB",
        )
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def page(notice: str) -> str:
    """The page ``sizing.md``."""
    lines = [
        "# How much a model takes",
        "",
        notice,
        "",
        "By arithmetic, not measured: `docs/reference/sizing.py` has each formula. P are the parameters, N the",
        f"learner's ranks, a rank is a GPU of {GPU / 1e9:.0f} GB of which {USABLE:.0%} are planned with, a",
        f"sequence has {SEQUENCE:,} tokens, weights are bfloat16. GB are 10⁹ bytes. Plan with one more of whatever",
        "is near its limit, and let a first run tell.",
        "",
        "## One copy of it",
        "",
        "| model | parameters | weights (2 P) | KV cache of a sequence | checkpoint in the store (12 P) |",
        "|---|---|---|---|---|",
    ]
    for name, model in MODELS.items():
        sizes = (model.weights, SEQUENCE * model.kv_token, checkpoint(model))
        lines.append(
            f"| {name} | {model.parameters / 1e9:.2f} B | " + " | ".join(f"{gigabytes(s)} GB" for s in sizes) + " |"
        )
    lines += ["", *_learner(), "", *_others()]
    return "\n".join(lines) + "\n"


def _learner() -> list[str]:
    lines = [
        "## The pool learner",
        "",
        "bfloat16 weights 2 P, float32 gradients 4 P, float32 masters and Adam's moments 12 P: a rank has 2 P +",
        "16 P / N under ZeRO-2 (`learner.zero_stage: 2`), 18 P / N under ZeRO-3. Beside them stand up to 4 GB of",
        "buffers and 1 GB of logits, under ZeRO-3 another 2 GB, and the activations of the micro-batch, here with",
        "`learner.gradient_checkpointing`. Of each stage: the fewest GPUs that train at all, what a rank has",
        "then, and how many sequences `learner.micro_batch` may be.",
        "",
        "| model | ZeRO-2: GPUs | of a rank | micro-batch |"
        " ZeRO-3: GPUs | of a rank | micro-batch | memory of a pod with 8 ranks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, model in MODELS.items():
        cells = []
        for stage in (2, 3):
            ranks = least_ranks(model, stage)
            if ranks is None:
                cells += ["none do", "–", "–"]
            else:
                size = rank(model, stage, ranks)
                cells += [str(ranks), f"{gigabytes(size)} GB", str(sequences_trained(model, stage, ranks))]
        cells.append(f"{gigabytes(learner_host(model, 8))} GB")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        "A pod's memory (`pools.learner.memory`) is more than one expects: each rank reads the whole model when",
        "it starts. Pods of fewer ranks (`pools.learner.slots`) take less each. `learner.offload_optimizer` moves",
        "12 P / N of a rank to the pod's memory, and compiles a kernel at its first use: the images have no",
        "compiler, so it takes an image of yours that has one.",
    ]


def _others() -> list[str]:
    lines = [
        "## The pools rollout and reference",
        "",
        "An engine has a copy of the weights; the rest is its KV cache, which decides how many sequences it works",
        "on at a time. `pools.rollout.shm` has room for new weights twice over, or they are laid on disk",
        "(`pools.rollout.scratch`) and an update takes longer. A reference has a copy on one GPU, and computes a",
        "micro-batch at a time without gradients.",
        "",
        "| model | GPUs of an engine | sequences at a time | `pools.rollout.shm` | GPU memory of a reference |",
        "|---|---|---|---|---|",
    ]
    for name, model in MODELS.items():
        gpus = engine_gpus(model)
        size = f"{gigabytes(model.weights + LOGITS)} GB"
        reference = size if reference_fits(model) else "more than one has: `algorithm.beta: 0`"
        row = (str(gpus), f"{sequences_sampled(model, gpus):,}", f"{gigabytes(engine_shm(model))} GB", reference)
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return [
        *lines,
        "",
        "An engine of several GPUs takes `rollout.engine.tensor_parallel_size` and as many",
        "`runtime.gpus_per_engine`, with vLLM and SGLang alike. Nobody",
        "has run that with our weight updates yet: try it with a short run first. A reference is never parted,",
        "but its actor reserves `runtime.gpus_per_engine` too.",
        "",
        "## The pools head and reward, and the store",
        "",
        "Neither grows with the model. The head's 8 GB hold Ray and the drivers of some runs; a reward pod's",
        "memory is that of its terms' code. In the store stand `schedule.keep_checkpoints` + 1 checkpoints, an",
        "anchor of 2 P with each `weights.anchor_every` versions and between them deltas of one to two percent of",
        "that, the batches since the last checkpoint (some 20 bytes a token), and each image once.",
    ]

"""A real preference task for a laptop: which of two descriptions of a handwritten digit is right?

The images are the 1,797 digits of the UCI data set that scikit-learn ships, 8×8 grey values enlarged to 56×56 PNGs.
Every text (a question and two responses, in that order) is paired with as many images that make response 1 right as
with images that make response 2 right, in training and in evaluation alike. So the text alone says nothing about the
label: a judge that does not look scores exactly one half. No image is in both splits.

The cold start's traces are about which digit it is and whether it is odd or even; what "larger than k" means is left
for reinforcement learning to find from the labels (under one in a hundred traces asks it). All but the first are
answered with "true" and "false", so that the cold start does teach to match those words with a response: else a word
and its match would have to be right by chance together before the reward teaches anything.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray
from steadyhelm.data.types import PreferencePair

IMAGE_SIDE = 56
"""Side of an image in pixels: four image tokens at a patch of 14 and a merge of 2×2."""
EVAL_SHARE = 0.2
"""Share of each digit's images that is held out."""
TRAIN_COPIES = {"which": 8, "size": 580, "parity": 135}
"""Training pairs per form, ordered text and label."""
EVAL_COPIES = {"which": 3, "size": 170, "parity": 41}
"""Held-out pairs per form, ordered text and label."""
SFT_COPIES = {"which": 30, "size": 4, "parity": 310}
"""Traces per form, ordered text and label."""
SPLIT_SEED = 1797
"""Fixes the split, the pairing and the order of the pairs; not a setting of a run."""

DIGITS = range(10)
BOUNDS = (4, 5)
"""What a digit is compared with in the questions of the form ``size``."""


@dataclass(frozen=True)
class Claim:
    """A text of the task: a question, two responses, and for each response the digits that make it right.

    Example: ``Claim("parity", "Is it odd, true or false?", ("true", "false"), ((1, 3, 5, 7, 9), (0, 2, 4, 6, 8)))``
    """

    form: str
    question: str
    words: tuple[str, str]
    digits: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def responses(self) -> tuple[str, str]:
        """The two responses in the order in which the prompt shows them."""
        return f"It is {self.words[0]}.", f"It is {self.words[1]}."

    def reversed(self) -> Claim:
        """The same question with the responses in the other order."""
        return Claim(self.form, self.question, self.words[::-1], self.digits[::-1])


def claims() -> list[Claim]:
    """Every text of the task, both orders of its responses: 90 of ``which``, 4 of ``size``, 4 of ``parity``."""
    which = [
        Claim("which", "Which digit is it?", (str(first), str(second)), ((first,), (second,)))
        for first in DIGITS
        for second in range(first)
    ]
    size = [
        Claim(
            "size",
            f"Is it larger than {bound}, true or false?",
            ("true", "false"),
            (tuple(range(bound + 1, 10)), tuple(range(bound + 1))),
        )
        for bound in BOUNDS
    ]
    odd, even = (1, 3, 5, 7, 9), (0, 2, 4, 6, 8)
    parity = [
        Claim("parity", "Is it odd, true or false?", ("true", "false"), (odd, even)),
        Claim("parity", "Is it even, true or false?", ("true", "false"), (even, odd)),
    ]
    return [ordered for claim in (*which, *size, *parity) for ordered in (claim, claim.reversed())]


def template(question: str, response_1: str, response_2: str) -> str:
    """The user message: the question and the two responses."""
    return f"{question}\nResponse 1: {response_1}\nResponse 2: {response_2}"


def trace(claim: Claim, label: int, digit: int) -> str:
    """A completion to imitate: what is seen, what each response says, which is better, the answer.

    There is one wording: words picked at random would be noise that the policy gradient has to average out.

    Args:
        claim: the text that is judged.
        label: 1 or 2, the right response.
        digit: what the image shows.
    """
    seen = f"{digit}" if claim.form == "which" else f"{digit}, {claim.words[label - 1]}"
    said = f"Response 1 says {claim.words[0]}. Response 2 says {claim.words[1]}."
    return f"<think>The image shows {seen}. {said} Response {label} is better.</think><answer>{label}</answer>"


def texts() -> list[str]:
    """Every user message and every trace of the task: what the tokenizer is trained on."""
    every = claims()
    return [template(claim.question, *claim.responses) for claim in every] + [
        trace(claim, label, digit) for claim in every for label in (1, 2) for digit in claim.digits[label - 1]
    ]


def split() -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Indices of the images of each digit, for training and for evaluation; no index is in both."""
    _, digits = _images()
    rng = np.random.default_rng(SPLIT_SEED)
    train, held_out = {}, {}
    for digit in DIGITS:
        indices = rng.permutation(np.flatnonzero(digits == digit)).tolist()
        num_held_out = round(EVAL_SHARE * len(indices))
        held_out[digit], train[digit] = indices[:num_held_out], indices[num_held_out:]
    return train, held_out


def train_pairs() -> Sequence[PreferencePair]:
    """The pairs for reinforcement learning."""
    return _pairs("train", split()[0], TRAIN_COPIES, SPLIT_SEED + 1)


def sft_pairs() -> Sequence[PreferencePair]:
    """The cold start's pairs, on training images; each trace fits the order in which its responses stand."""
    return _pairs("sft", split()[0], SFT_COPIES, SPLIT_SEED + 2)


def eval_pairs() -> Sequence[PreferencePair]:
    """The held-out pairs: images that no training pair shows."""
    return _pairs("eval", split()[1], EVAL_COPIES, SPLIT_SEED + 3)


def blank_train_pairs() -> Sequence[PreferencePair]:
    """``train_pairs`` with every image black: what the text-only baseline learns from."""
    return _blanked(train_pairs())


def blank_sft_pairs() -> Sequence[PreferencePair]:
    """``sft_pairs`` with every image black; the traces still name the digit, which can only be guessed."""
    return _blanked(sft_pairs())


def blank_eval_pairs() -> Sequence[PreferencePair]:
    """``eval_pairs`` with every image black."""
    return _blanked(eval_pairs())


def _blanked(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    black = _png(np.zeros((IMAGE_SIDE, IMAGE_SIDE), np.uint8))
    return [replace(pair, images=(black,)) for pair in pairs]


@cache
def _images() -> tuple[tuple[bytes, ...], NDArray[np.int64]]:
    """PNG bytes and digit of all 1,797 images."""
    from sklearn.datasets import load_digits

    grey, digits = load_digits(return_X_y=True)
    levels = np.rint(grey.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    pixels = levels.repeat(IMAGE_SIDE // 8, axis=1).repeat(IMAGE_SIDE // 8, axis=2)
    return tuple(_png(picture) for picture in pixels), np.asarray(digits, dtype=np.int64)


def _png(picture: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def _drawn(
    images: dict[int, list[int]], copies: dict[str, int], rng: np.random.Generator
) -> Iterable[tuple[Claim, int, int, int]]:
    """(claim, label, digit, image), each label of each text equally often; a digit's images take turns."""
    turns: dict[int, int] = defaultdict(int)
    for claim in claims():
        for label in (1, 2):
            right = rng.permutation(claim.digits[label - 1]).tolist()
            for copy in range(copies[claim.form]):
                digit = right[copy % len(right)]
                yield claim, label, digit, images[digit][turns[digit] % len(images[digit])]
                turns[digit] += 1


def _pairs(name: str, images: dict[int, list[int]], copies: dict[str, int], seed: int) -> list[PreferencePair]:
    encoded, _ = _images()
    rng = np.random.default_rng(seed)
    drawn = list(_drawn(images, copies, rng))
    pairs = []
    for number, position in enumerate(rng.permutation(len(drawn)).tolist()):
        claim, label, digit, image = drawn[position]
        pairs.append(
            PreferencePair(
                pair_id=f"{name}-{number}",
                question=claim.question,
                responses=claim.responses,
                label=label,
                images=(encoded[image],),
                trace=trace(claim, label, digit) if name == "sft" else None,
                meta={"form": claim.form, "digit": str(digit), "image": str(image)},
            )
        )
    return pairs

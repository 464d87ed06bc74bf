"""A real preference task for a laptop: which of two descriptions of a handwritten digit is right?

The images are the 1,797 digits of the UCI data set that scikit-learn ships, 8×8 grey values enlarged to 56×56 PNGs.
Every text (a question and two responses, in that order) is paired with as many images that make response 1 right as
with images that make response 2 right, in training and in evaluation alike. So the text alone says nothing about the
label: a judge that does not look scores exactly one half. No image is in both splits.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from steadyhelm.data.types import PreferencePair

IMAGE_SIDE = 56
"""Side of an image in pixels: four image tokens at a patch of 14 and a merge of 2×2."""
EVAL_SHARE = 0.2
"""Share of each digit's images that is held out."""
TRAIN_COPIES = {"which": 24, "size": 60, "parity": 240}
"""Training pairs per form, ordered text and label."""
EVAL_COPIES = {"which": 8, "size": 20, "parity": 80}
"""Held-out pairs per form, ordered text and label."""
SPLIT_SEED = 1797
"""Fixes the split, the pairing and the order of the pairs; not a setting of a run."""

DIGITS = range(10)
OPENINGS = ("The image shows {digit}{remark}.", "I see {digit}{remark}.", "This is {digit}{remark}.")
MIDDLES = ("Response {right} says {word}.", "Response {wrong} is wrong.")
CLOSINGS = ("Response {right} is better.", "So Response {right} is better.")


@dataclass(frozen=True)
class Claim:
    """A text of the task: a question, two responses, and for each response the digits that make it right.

    Example: ``Claim("which", "Which digit is it?", ("It is 3.", "It is 5."), ("3", "5"), ((3,), (5,)))``
    """

    form: str
    question: str
    responses: tuple[str, str]
    words: tuple[str, str]
    digits: tuple[tuple[int, ...], tuple[int, ...]]

    def remark(self, digit: int) -> str:
        """What a trace says of the digit beyond its name."""
        word = self.words[0] if digit in self.digits[0] else self.words[1]
        if self.form == "size":
            return f", {word} than {self.question[:-1].split()[-1]}"
        return f", {word}" if self.form == "parity" else ""


def claims() -> list[Claim]:
    """Every text of the task, both orders of each two responses included (90 + 16 + 2)."""
    which = [
        Claim("which", "Which digit is it?", (f"It is {a}.", f"It is {b}."), (str(a), str(b)), ((a,), (b,)))
        for a in DIGITS
        for b in DIGITS
        if a != b
    ]
    sides = {k: (("larger", tuple(range(k + 1, 10))), ("smaller", tuple(range(k)))) for k in range(1, 9)}
    halves = (("odd", (1, 3, 5, 7, 9)), ("even", (0, 2, 4, 6, 8)))
    return [
        *which,
        *(
            claim
            for k, pair in sides.items()
            for claim in _both_orders("size", f"Is it larger or smaller than {k}?", pair)
        ),
        *_both_orders("parity", "Is it odd or even?", halves),
    ]


def _both_orders(
    form: str, question: str, pair: tuple[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]]
) -> Iterator[Claim]:
    for first, second in (pair, pair[::-1]):
        words = (first[0], second[0])
        yield Claim(form, question, (f"It is {words[0]}.", f"It is {words[1]}."), words, (first[1], second[1]))


def template(question: str, response_1: str, response_2: str) -> str:
    """The user message: the question, the two responses and what is asked of the judge."""
    return f"{question}\nResponse 1: {response_1}\nResponse 2: {response_2}\nWhich is better?"


def trace(claim: Claim, label: int, digit: int, variant: int) -> str:
    """A completion to imitate, in the format that the format reward asks for.

    Args:
        claim: the text that is judged.
        label: 1 or 2, the right response.
        digit: what the image shows.
        variant: which of the twelve wordings.
    """
    slots = {
        "digit": digit,
        "remark": claim.remark(digit),
        "right": label,
        "wrong": 3 - label,
        "word": claim.words[label - 1],
    }
    opening = OPENINGS[variant % 3]
    middle = MIDDLES[variant // 3 % 2]
    closing = CLOSINGS[variant // 6 % 2]
    thought = f"{opening} {middle} {closing}".format(**slots)
    return f"<think>{thought}</think><answer>{label}</answer>"


def texts() -> list[str]:
    """Every user message and every trace of the task, for the tokenizer's training and its test."""
    messages = [template(claim.question, *claim.responses) for claim in claims()]
    traces = [
        trace(claim, label, digit, variant)
        for claim in claims()
        for label in (1, 2)
        for digit in claim.digits[label - 1]
        for variant in range(12)
    ]
    return [*messages, *traces]


@cache
def _images() -> tuple[tuple[bytes, ...], NDArray[np.int64]]:
    """PNG bytes and digit of all 1,797 images."""
    from PIL import Image
    from sklearn.datasets import load_digits

    grey, digits = load_digits(return_X_y=True)
    levels = np.rint(grey.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    pixels = levels.repeat(IMAGE_SIDE // 8, axis=1).repeat(IMAGE_SIDE // 8, axis=2)
    encoded = []
    for picture in pixels:
        buffer = io.BytesIO()
        Image.fromarray(picture).convert("RGB").save(buffer, format="PNG")
        encoded.append(buffer.getvalue())
    return tuple(encoded), np.asarray(digits, dtype=np.int64)


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
    """The training pairs, each with a trace for the order in which its responses stand."""
    return _pairs("train", split()[0], TRAIN_COPIES, SPLIT_SEED + 1)


def eval_pairs() -> Sequence[PreferencePair]:
    """The held-out pairs: images that no training pair shows."""
    return _pairs("eval", split()[1], EVAL_COPIES, SPLIT_SEED + 2)


def _pairs(name: str, images: dict[int, list[int]], copies: dict[str, int], seed: int) -> list[PreferencePair]:
    encoded, digits = _images()
    rng = np.random.default_rng(seed)
    turns: dict[int, int] = defaultdict(int)
    drawn: list[tuple[Claim, int, int]] = []
    for claim in claims():
        for label in (1, 2):
            right = claim.digits[label - 1]
            for copy in range(copies[claim.form]):
                digit = right[copy % len(right)]
                drawn.append((claim, label, images[digit][turns[digit] % len(images[digit])]))
                turns[digit] += 1
    pairs = []
    for number, position in enumerate(rng.permutation(len(drawn)).tolist()):
        claim, label, image = drawn[position]
        digit = int(digits[image])
        pairs.append(
            PreferencePair(
                pair_id=f"{name}-{number}",
                question=claim.question,
                responses=claim.responses,
                label=label,
                images=(encoded[image],),
                trace=trace(claim, label, digit, int(rng.integers(12))),
                meta={"form": claim.form, "digit": str(digit), "image": str(image)},
            )
        )
    return pairs

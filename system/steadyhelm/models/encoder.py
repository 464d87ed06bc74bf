"""From a user message and images to prompt tokens, and from completion tokens back to text.

Only the chat template writes special tokens. Text of a data set or of a model that merely spells one (a question with
``<|im_end|>`` or ``<|image_pad|>`` in it) is encoded as plain characters, so it can neither end a turn nor stand for an
image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steadyhelm.data.types import ImageKey
from steadyhelm.errors import DataError, ModelError
from steadyhelm.models.folder import VOCABULARIES
from steadyhelm.models.images import CACHE_BYTES, ImageArrays, ImageCache, ImageFetch
from steadyhelm.models.load import is_multimodal, load_config
from steadyhelm.models.pretrained import AutoTokenizer

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
"""Tokens that stand for pictures: legal in a prompt, never in a completion."""

_VISION_FIELDS = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
)
_USER_TEXT = "\ue000user text\ue001"
"""Stands for the user's text while the chat template is rendered; private-use characters, so no template has it."""


class PromptEncoder:
    """Tokenizer, chat template and image processor of one model folder.

    Args:
        folder: Hugging Face model folder.
        min_pixels: smallest image area after resizing, in pixels.
        max_pixels: largest image area after resizing, in pixels.
        trust_remote_code: whether Python code inside the folder may run.
        fetch: reads an image by its key, for callers that name images by key.
        cache_bytes: bound on the prepared images that are kept.

    Raises:
        ModelError: the folder lacks a tokenizer, a chat template, an end-of-sequence token or an image processor, or
            has one that cannot be used.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        min_pixels: int,
        max_pixels: int,
        trust_remote_code: bool = False,
        fetch: ImageFetch | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._folder = Path(folder)
        config = load_config(self._folder, trust_remote_code=trust_remote_code)
        self._tokenizer: Any = _load_tokenizer(self._folder, trust_remote_code)
        self.vocab_size = int(config.get_text_config().vocab_size)
        self.eos_ids = self._find_eos()
        self.pad_id = self.eos_ids[0] if self._tokenizer.pad_token_id is None else int(self._tokenizer.pad_token_id)
        self.banned_ids = self._find_banned(config)
        self.image_id: int | None = None
        self._images: ImageCache | None = None
        if is_multimodal(config):
            self.image_id = int(config.image_token_id)
            self._images = ImageCache(
                self._folder,
                min_pixels=min_pixels,
                max_pixels=max_pixels,
                trust_remote_code=trust_remote_code,
                fetch=fetch,
                max_bytes=cache_bytes,
            )
        self._frames: dict[int, tuple[int | str, ...]] = {}
        specials = sorted((token.content for token in self._special_tokens()), key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, specials)) + ")") if specials else None
        self._frame(int(self._images is not None))  # a template that cannot be used is told of now

    @property
    def merge(self) -> int:
        """Patches along each side of an image that become one token; 1 for a text-only model."""
        return 1 if self._images is None else self._images.merge

    def image(self, image: bytes | ImageKey) -> ImageArrays:
        """The prepared image of encoded bytes or of a key. Raises DataError for a corrupt one or a text-only model."""
        return self._vision().get(image)

    def grid(self, image: bytes | ImageKey) -> tuple[int, int, int]:
        """The prepared image's patches (time, height, width). Raises DataError as ``image`` does."""
        return self._vision().grid(image)

    def keeps(self, images: Iterable[ImageKey]) -> bool:
        """Whether all of them are prepared already."""
        return self._images is None or self._images.keeps(images)

    def keep(self, images: Iterable[ImageKey]) -> int:
        """Prepares images ahead of their use, where the model has any; returns the bytes that new ones take.

        Raises DataError as ``image`` does.
        """
        return 0 if self._images is None else sum(map(self._images.keep, images))

    def picture(self, image: ImageKey) -> bytes:
        """The image as a PNG that engines need not resize, see ``ImageCache.picture``. Raises DataError."""
        return self._vision().picture(image)

    def pixels(self, images: Sequence[bytes | ImageKey]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Pixel values [patches of all images, dim] and grids [images, 3] in the order given. Raises DataError."""
        if not images:
            return np.zeros((0, 0), np.float32), np.zeros((0, 3), np.int64)
        return self._vision().pixels(images)

    def _vision(self) -> ImageCache:
        """Raises DataError for a text-only model."""
        if self._images is None:
            raise DataError(f"model folder {self._folder} is text-only but a prompt has an image: use a vision model")
        return self._images

    def image_tokens(self, image: bytes | ImageKey) -> int:
        """How many prompt tokens the image takes."""
        time, height, width = self.grid(image)
        return time * height * width // self.merge**2

    def encode(self, text: str, images: Sequence[bytes | ImageKey] = ()) -> NDArray[np.int32]:
        """Prompt tokens [P] of one user message: images first, then ``text``, then the assistant's opening.

        Special-token strings inside ``text`` are encoded as plain text.

        Raises:
            DataError: an image is corrupt, or ``text`` spells an added token that stands for a picture.
        """
        counts = [self.image_tokens(image) for image in images]
        tokens: list[int] = []
        image = 0
        for piece in self._frame(len(images)):
            if isinstance(piece, str):
                tokens += self._encode_plain(piece.replace(_USER_TEXT, text))
            elif piece == self.image_id:
                tokens += [piece] * counts[image]
                image += 1
            else:
                tokens.append(piece)
        return np.asarray(tokens, np.int32)

    def encode_completion(self, text: str) -> NDArray[np.int32]:
        """Tokens [T] of a completion to imitate, with the end-of-sequence token appended. Raises DataError."""
        return np.asarray([*self._encode_plain(text), self.eos_ids[0]], np.int32)

    def decode(self, tokens: Sequence[int] | NDArray[np.int32]) -> str:
        """Text of completion tokens: special tokens kept, a final end-of-sequence token removed."""
        ids = [int(token) for token in tokens]
        if ids and ids[-1] in self.eos_ids:
            ids.pop()
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if not self._banned.isdisjoint(ids):
            word = self._tokenizer.convert_ids_to_tokens(next(token for token in ids if token in self._banned))
            raise DataError(
                f"the text {text[:60]!r} spells the vision token {word!r}, which the tokenizer in {self._folder} does "
                "not mark as special: remove it from the data or mark it special in tokenizer.json"
            )
        return ids

    def _frame(self, num_images: int) -> tuple[int | str, ...]:
        """The rendered chat template around the user's text: special tokens as ids, plain stretches as text."""
        if num_images not in self._frames:
            self._frames[num_images] = self._render(num_images)
        return self._frames[num_images]

    def _render(self, num_images: int) -> tuple[int | str, ...]:
        parts: list[dict[str, str]] = [{"type": "image"} for _ in range(num_images)]
        content: Any = [*parts, {"type": "text", "text": _USER_TEXT}] if self._images is not None else _USER_TEXT
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program, and may fail in any way
            raise ModelError(
                f"the chat template in {self._folder} cannot be rendered ({type(error).__name__}: {error}): correct it "
                "in chat_template.jinja, or in tokenizer_config.json where there is no such file"
            ) from error
        if rendered.count(_USER_TEXT) != 1:
            raise ModelError(
                f"the chat template in {self._folder} prints the user's text {rendered.count(_USER_TEXT)} times: it "
                "must print it once"
            )
        pieces = self._special_pattern.split(rendered) if self._special_pattern else [rendered]
        specials = {token.content for token in self._special_tokens()}
        frame = tuple(
            int(self._tokenizer.convert_tokens_to_ids(piece)) if piece in specials else piece
            for piece in pieces
            if piece
        )
        if self._images is not None and frame.count(self.image_id or 0) != num_images:
            raise ModelError(
                f"the chat template in {self._folder} prints {frame.count(self.image_id or 0)} image tokens for "
                f"{num_images} images: it must print one for each"
            )
        return frame

    def _special_tokens(self) -> list[Any]:
        return [token for token in self._tokenizer.added_tokens_decoder.values() if token.special]

    def _find_eos(self) -> tuple[int, ...]:
        found = [] if self._tokenizer.eos_token_id is None else [int(self._tokenizer.eos_token_id)]
        path = self._folder / "generation_config.json"
        if path.is_file():
            found += _end_ids(path)
        if not found:
            raise ModelError(
                f"model folder {self._folder} names no end-of-sequence token: set eos_token in tokenizer_config.json"
            )
        return tuple(dict.fromkeys(found))

    def _find_banned(self, config: Any) -> tuple[int, ...]:
        vocabulary = self._tokenizer.get_vocab()
        found = {int(vocabulary[token]) for token in VISION_TOKENS if token in vocabulary}
        if is_multimodal(config):
            named = (getattr(config, name, None) for name in _VISION_FIELDS)
            found |= {token for token in named if isinstance(token, int) and 0 <= token < self.vocab_size}
        self._banned = frozenset(found)
        return tuple(sorted(found))


def _end_ids(path: Path) -> list[int]:
    """The ``eos_token_id`` of a generation_config.json. Raises ModelError where it cannot be read."""
    remedy = "save the model again, or remove the file where tokenizer_config.json names the end-of-sequence token"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}): {remedy}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not an object: {remedy}")
    found = value.get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if any(type(token) is not int for token in ids):
        raise ModelError(
            f"{path} has the eos_token_id {found!r}, which is neither a number nor a list of them: {remedy}"
        )
    return ids


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    if not trust_remote_code and not any((folder / name).is_file() for name in VOCABULARIES):
        # Transformers would build a tokenizer of special tokens alone.
        raise ModelError(f"model folder {folder} has no tokenizer ({VOCABULARIES[0]}): save it with the model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"model folder {folder} has no usable tokenizer ({error}): save it with the model") from error
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer in {folder} has no chat template: add chat_template.jinja or use an instruction-tuned model"
        )
    return tokenizer

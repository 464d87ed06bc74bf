"""The prompt service: the data set as prompts, by counters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

from steadyhelm import telemetry
from steadyhelm.config import RunFile
from steadyhelm.data import cursor
from steadyhelm.data.code_ref import call_code, code_function, iterate_result, wrong_result
from steadyhelm.data.cursor import Place
from steadyhelm.data.pairs import checked_pairs
from steadyhelm.data.template import pairwise_prompt
from steadyhelm.data.types import ImageKey, PreferencePair, Prompt, PromptId
from steadyhelm.errors import ConfigError, DataError
from steadyhelm.services import Served
from steadyhelm.store import ObjectStore
from steadyhelm.store.images import putting_images


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """A checked pair as the service keeps it: both prompts ready, images by key."""

    pair: PreferencePair  # without its images' bytes
    texts: tuple[str, str]  # the user message in the record's order, and swapped
    images: tuple[ImageKey, ...]


class DatasetPrompts:
    """Serves a run's data sets as prompts; the answer depends on the run file and the call's arguments only.

    At the start every record is checked and every image is decoded once and put to the store under its SHA-256, so a
    wrong record ends the run before its first iteration.

    Args:
        run: the run file.
        base: its folder.
        store: where images go.

    Raises ConfigError for task code that cannot be used, DataError for a wrong record.
    """

    def __init__(self, run: RunFile, *, base: Path, store: ObjectStore) -> None:
        self._run = run
        self._base = base
        self._store = store
        self._images: dict[bytes, ImageKey] = {}
        self._template = code_function(base, run.data.template) if run.data.template else pairwise_prompt
        self._train = self._load(run.data.train)
        self._eval = self._load(run.data.eval) if run.data.eval else None
        if run.is_sft:
            for index, record in enumerate(self._train):
                if record.pair.trace is None:
                    raise DataError(
                        f"{run.data.train}: record {index} (pair_id {record.pair.pair_id!r}): trace is None; "
                        "algorithm.type 'sft' needs a trace in every record"
                    )

    async def prompts(self, iteration: int) -> Served[tuple[Prompt, ...]]:
        """The prompts of ``iteration`` (from 1), the same at every call; samples of one prompt stand together."""
        with telemetry.collect() as spans, telemetry.span("prompts", "prompts"):
            places = cursor.iteration_places(
                iteration,
                self._run.schedule.prompts_per_iteration,
                len(self._train),
                self._run.seed,
                shuffle=self._run.data.shuffle,
            )
            count = 1 if self._run.is_sft else self._run.rollout.samples_per_prompt
            found = tuple(
                self._prompt(Place(epoch=place.epoch, index=place.index, sample=sample if count > 1 else None))
                for place in places
                for sample in range(count)
            )
        return Served(value=found, spans=tuple(spans))

    async def replacement(self, prompt_id: PromptId) -> Served[Prompt]:
        """Another sample of the same prompt: ``"0:17"`` gives ``"0:17r1"``, which gives ``"0:17r2"``.

        Order of the responses and group stay; the sampling seed is a new one. Raises ValueError for an id that is no
        training prompt's.
        """
        return Served(value=self._prompt(cursor.parse_prompt_id(prompt_id).next_try))

    async def held_out(self, limit: int) -> Served[tuple[Prompt, ...]]:
        """The first ``limit`` (0: all) evaluation pairs, each in its orders side by side (``data.eval_order``).

        Ids are ``"eval:<index>"`` and, swapped, ``"eval:<index>x"``. Raises ConfigError where the run file names no
        evaluation data.
        """
        if self._eval is None:
            raise ConfigError("data.eval is not set, so there is nothing to evaluate on: name a data set there")
        orders = (False,) if self._run.data.eval_order == "fixed" else (False, True)
        with telemetry.collect() as spans, telemetry.span("prompts", "held_out"):
            found = tuple(
                self._held_out_prompt(index, swapped)
                for index in range(min(limit or len(self._eval), len(self._eval)))
                for swapped in orders
            )
        return Served(value=found, spans=tuple(spans))

    def _load(self, ref: str) -> tuple[_Record, ...]:
        records = iterate_result(self._base, ref, call_code(self._base, ref))
        with putting_images(self._store) as put:
            return tuple(self._record(pair, index, ref, put) for index, pair in enumerate(checked_pairs(records, ref)))

    def _record(self, pair: PreferencePair, index: int, source: str, put: Callable[[bytes], ImageKey]) -> _Record:
        first, second = pair.responses
        images = tuple(
            self._image_key(data, put, f"{source}: record {index} (pair_id {pair.pair_id!r}): image {number}")
            for number, data in enumerate(pair.images)
        )
        texts = (self._text(pair.question, first, second), self._text(pair.question, second, first))
        return _Record(pair=replace(pair, images=()), texts=texts, images=images)

    def _text(self, question: str, response_1: str, response_2: str) -> str:
        text: object = self._template(question, response_1, response_2)
        if not isinstance(text, str) or not text.strip():
            raise wrong_result(self._run.data.template or "template", "a non-empty string, the user message", text)
        return text

    def _image_key(self, data: bytes, put: Callable[[bytes], ImageKey], place: str) -> ImageKey:
        """The key of an image, checked and put once."""
        digest = hashlib.sha256(data).digest()
        if digest not in self._images:
            _check_image(data, place)
            self._images[digest] = put(data)
        return self._images[digest]

    def _prompt(self, place: Place) -> Prompt:
        record = self._train[place.index]
        swapped = self._run.data.swap == "random" and cursor.is_swapped(self._run.seed, place.epoch, place.index)
        return _prompt(
            record,
            place.prompt_id,
            place.group_id,
            swapped=swapped,
            seed=cursor.sampling_seed(self._run.seed, place),
            trace=record.pair.trace if self._run.is_sft else None,
        )

    def _held_out_prompt(self, index: int, swapped: bool) -> Prompt:
        assert self._eval is not None
        prompt_id = PromptId(f"eval:{index}{'x' if swapped else ''}")
        seed = cursor.held_out_seed(self._run.seed, index, swapped)
        return _prompt(self._eval[index], prompt_id, prompt_id, swapped=swapped, seed=seed, trace=None)


def _prompt(
    record: _Record, prompt_id: PromptId, group_id: str, *, swapped: bool, seed: int, trace: str | None
) -> Prompt:
    return Prompt(
        prompt_id=prompt_id,
        group_id=group_id,
        text=record.texts[swapped],
        images=record.images,
        label=3 - record.pair.label if swapped else record.pair.label,
        swapped=swapped,
        seed=seed,
        pair_id=record.pair.pair_id,
        trace=trace,
        meta=record.pair.meta,
    )


def _check_image(data: bytes, place: str) -> None:
    """Decodes an image wholly: a header says nothing about truncated pixels. Raises DataError naming ``place``."""
    from PIL import Image

    try:
        with Image.open(BytesIO(data)) as image:
            image.load()
    except Exception as error:
        # Pillow answers broken files with a dozen unrelated exception types, struct.error and IndexError among them.
        raise DataError(
            f"{place} ({len(data)} bytes) cannot be decoded ({error}); give the bytes of a whole PNG or JPEG file"
        ) from error

"""Images as the vision tower takes them, each prepared once per process."""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from steadyhelm.data.types import ImageKey
from steadyhelm.errors import DataError, ModelError
from steadyhelm.models.pretrained import AutoImageProcessor

ImageFetch = Callable[[ImageKey], bytes]
"""Encoded bytes of an image by its key."""

CACHE_BYTES = 1 << 30
"""Default bound on the pixel arrays that one process keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageArrays:
    """One prepared image: ``pixels`` [patches, dim] float32 and its ``grid`` of patches (time, height, width).

    Example: a 56 × 56 image in patches of 14: pixels [16, 1176], grid (1, 4, 4)
    """

    pixels: NDArray[np.float32]
    grid: tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """A prepared image without its repetition: processors make films of images by showing each twice."""

    pixels: NDArray[np.float32]  # [patches, channels, 1 or frames, height · width]
    frames: int
    grid: tuple[int, int, int]

    @classmethod
    def of(cls, arrays: ImageArrays, channels: int, frames: int) -> _Kept:
        """Keeps one frame where all are alike."""
        split = arrays.pixels.reshape(len(arrays.pixels), channels, frames, -1)
        alike = bool((split == split[:, :, :1]).all())
        return cls(pixels=split[:, :, :1].copy() if alike else split, frames=frames, grid=arrays.grid)

    def arrays(self) -> ImageArrays:
        """The image as it was."""
        patches, channels, _, area = self.pixels.shape
        pixels = np.broadcast_to(self.pixels, (patches, channels, self.frames, area)).reshape(patches, -1)
        return ImageArrays(pixels=pixels, grid=self.grid)


class ImageCache:
    """Prepared images by key, least recently used out first, within a bound of bytes; safe to call from threads.

    Args:
        folder: model folder that holds the image processor's configuration.
        min_pixels: smallest image area after resizing.
        max_pixels: largest image area after resizing.
        trust_remote_code: whether Python code inside the folder may run.
        fetch: how an image that is named by its key is read; None where images always come as bytes.
        max_bytes: bound on the arrays kept; a single larger image is prepared each time it is asked for.

    Raises:
        ModelError: the folder has no usable image processor.
    """

    def __init__(
        self,
        folder: Path,
        *,
        min_pixels: int,
        max_pixels: int,
        trust_remote_code: bool,
        fetch: ImageFetch | None,
        max_bytes: int = CACHE_BYTES,
    ) -> None:
        try:
            self._processor: Any = AutoImageProcessor.from_pretrained(
                str(folder), trust_remote_code=trust_remote_code, local_files_only=True, backend="pil"
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(
                f"model folder {folder} has no usable image processor ({error}): save it with the model "
                "(preprocessor_config.json)"
            ) from error
        self._size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
        self._fetch = fetch
        self._max_bytes = max_bytes
        self._kept: OrderedDict[ImageKey, _Kept] = OrderedDict()
        self._num_bytes = 0
        self._lock = Lock()

    @property
    def merge(self) -> int:
        """Patches along each side that become one image token."""
        return int(self._processor.merge_size)

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays kept."""
        return self._num_bytes

    def get(self, image: bytes | ImageKey) -> ImageArrays:
        """The prepared image of these encoded bytes, or of this key. Raises DataError, and what ``fetch`` raises."""
        return self._found(image).arrays()

    def pixels(self, images: Sequence[bytes | ImageKey]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Pixels [patches of all images, dim] and grids [images, 3], in the order given; errors are ``get``'s."""
        found = [self._found(image) for image in images]
        ends = np.cumsum([len(kept.pixels) for kept in found])
        _, channels, _, area = found[0].pixels.shape
        pixels = np.empty((ends[-1], channels, found[0].frames, area), np.float32)
        for kept, end in zip(found, ends, strict=True):
            pixels[end - len(kept.pixels) : end] = kept.pixels  # the only copy
        return pixels.reshape(len(pixels), -1), np.asarray([kept.grid for kept in found], np.int64)

    def _found(self, image: bytes | ImageKey) -> _Kept:
        data = None if isinstance(image, str) else bytes(image)
        key = image if isinstance(image, str) else ImageKey(f"images/{hashlib.sha256(image).hexdigest()}")
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
                return kept
        if data is None:
            if self._fetch is None:
                raise DataError(f"image {key} is given by its key but no store to read it from: pass fetch=")
            data = self._fetch(key)
        arrays = self._prepare(key, data)
        kept = _Kept.of(arrays, len(self._processor.image_mean), int(self._processor.temporal_patch_size))
        with self._lock:
            if key not in self._kept and kept.pixels.nbytes <= self._max_bytes:
                self._kept[key] = kept
                self._num_bytes += kept.pixels.nbytes
            while self._num_bytes > self._max_bytes:
                self._num_bytes -= self._kept.popitem(last=False)[1].pixels.nbytes
        return kept

    def grid(self, image: bytes | ImageKey) -> tuple[int, int, int]:
        """The grid of ``get``'s answer."""
        return self._found(image).grid

    def keeps(self, images: Iterable[ImageKey]) -> bool:
        """Whether all of them are prepared already."""
        with self._lock:
            return all(image in self._kept for image in images)

    def keep(self, image: ImageKey) -> int:
        """Prepares the image so that the next ``get`` finds it. Raises DataError, and what ``fetch`` raises.

        Returns the bytes that it takes; 0 where it was prepared before, or is too large to be kept.
        """
        if self.keeps((image,)):
            return 0
        self._found(image)
        with self._lock:
            kept = self._kept.get(image)
        return 0 if kept is None else kept.pixels.nbytes

    def picture(self, image: ImageKey) -> bytes:
        """The image as the vision tower sees it, before it is cut into patches: a PNG in RGB of the prepared size.

        An engine that prepares its own images has nothing left to resize, turn or blend then, which each does in its
        own way. Raises DataError, and what ``fetch`` raises.
        """
        _, rows, columns = self.grid(image)
        side = int(self._processor.patch_size)
        assert self._fetch is not None
        with Image.open(io.BytesIO(self._fetch(image))) as opened:
            made = opened.convert("RGB").resize((columns * side, rows * side), self._processor.resample)
        encoded = io.BytesIO()
        made.save(encoded, "PNG", compress_level=1)
        return encoded.getvalue()

    def _prepare(self, key: ImageKey, data: bytes) -> ImageArrays:
        try:
            with Image.open(io.BytesIO(data)) as opened:
                picture = opened.convert("RGB")
            made = self._processor(images=[picture], size=self._size, return_tensors="np")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(
                f"image {key} ({len(data)} bytes) cannot be used ({error}): replace or remove it in the data set"
            ) from error
        pixels = np.ascontiguousarray(made["pixel_values"], dtype=np.float32)
        time, height, width = (int(side) for side in made["image_grid_thw"][0])
        pixels.flags.writeable = False
        return ImageArrays(pixels=pixels, grid=(time, height, width))

"""Noise as encoded images."""

import io

import numpy as np
from PIL import Image


def picture(seed: int, height: int, width: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()

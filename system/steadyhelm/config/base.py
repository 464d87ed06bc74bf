"""The one base class of the run file's parts."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints


class Part(BaseModel):
    """A part of the run file: frozen, strict about unknown keys, documented by the docstrings under its fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )


CodeRef = Annotated[str, StringConstraints(pattern=r"^[\w./-]+\.py:[A-Za-z_]\w*$")]
"""A name in a Python file beside the run file, as ``file.py:name``."""

Seconds = Annotated[float, Field(gt=0)]
"""A duration or a deadline in seconds."""

Count = Annotated[int, Field(ge=1)]
"""A whole number of at least one."""

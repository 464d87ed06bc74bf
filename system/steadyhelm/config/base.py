"""The one base class of the run file's parts."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator


class Part(BaseModel):
    """A part of the run file: frozen, strict about unknown keys, documented by the docstrings under its fields.

    A nested part that is given only in part keeps the defaults of where it stands: ``algorithm: {type: grpo, kl:
    {estimator: k1}}`` leaves the divergence in the loss, as GRPO has it.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    @model_validator(mode="after")
    def _defaults_of_this_place(self) -> Self:
        for name, field in type(self).model_fields.items():
            value, default = self.__dict__[name], field.default
            if isinstance(default, Part) and type(value) is type(default):
                left_out = default.model_fields_set - value.model_fields_set
                if left_out:  # not by assignment, which a frozen part refuses
                    own = {key: getattr(default, key) for key in left_out}
                    self.__dict__[name] = value.model_copy(update=own)
        return self


CodeRef = Annotated[str, StringConstraints(pattern=r"^[\w./-]+\.py:[A-Za-z_]\w*$")]
"""A name in a Python file beside the run file, as ``file.py:name``."""

Seconds = Annotated[float, Field(gt=0)]
"""A duration or a deadline in seconds."""

Count = Annotated[int, Field(ge=1)]
"""A whole number of at least one."""

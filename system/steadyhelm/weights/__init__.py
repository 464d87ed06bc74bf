"""How a policy's weights get from the learner to everything that serves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from steadyhelm.data.types import PolicyVersion, WeightsRecord


class WeightSync(Protocol):
    """Moves versions of a set of named tensors.

    ``publish`` may store the difference to a version that it published before; the record then has that version as
    its ``base``, and ``fetch`` needs the base's tensors to apply it to.
    """

    def publish(
        self,
        version: PolicyVersion,
        key: str,
        tensors: Mapping[str, torch.Tensor],
        known: WeightsRecord | None = None,
    ) -> WeightsRecord:
        """Puts ``tensors`` under the prefix ``key``. Raises StoreError.

        Where ``known`` has their checksum, nothing is put and ``known`` is the answer.
        """
        ...

    def fetch(self, record: WeightsRecord, base: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """The tensors of ``record``, verified against its checksum, on the CPU and in memory of their own.

        Raises ObjectMissingError, CorruptObjectError.
        """
        ...

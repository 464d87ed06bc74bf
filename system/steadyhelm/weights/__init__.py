"""How a policy's weights get from the learner to everything that serves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from steadyhelm.data.types import PolicyVersion, WeightsRecord


class WeightSync(Protocol):
    """Moves versions of a set of named tensors.

    ``publish`` may store the difference to a version that it published before; the record then has that version as
    its ``base``, and ``fetch`` finds the way from whatever it fetched before, or from nothing.
    """

    def publish(
        self,
        version: PolicyVersion,
        key: str,
        tensors: Mapping[str, torch.Tensor],
        known: WeightsRecord | None = None,
    ) -> WeightsRecord:
        """Puts ``tensors`` under the prefix ``key``. Raises StoreError.

        Where ``known`` has their checksum and can still be fetched, it may be the answer, and nothing is put.
        """
        ...

    def fetch(self, record: WeightsRecord) -> Mapping[str, torch.Tensor]:
        """The tensors of ``record``, verified against its checksum, on the CPU, unchanged while the mapping lives.

        Raises ObjectMissingError, CorruptObjectError; LearnerLostError where a rank has to send them and does not.
        """
        ...

    def close(self) -> None:
        """Gives up what it holds outside of its process."""
        ...

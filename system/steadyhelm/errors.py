"""The exceptions that Steadyhelm raises, in one tree.

::

    SteadyhelmError
    ├── RetryableError           the same call may succeed later; ``delay_s`` says how long to wait at least
    │   ├── DeadlineError        a remote call or a wait passed its deadline
    │   ├── EngineLostError      a rollout engine or its process is gone; its requests may go elsewhere
    │   ├── LearnerLostError     a learner rank is gone; the group restarts from the last checkpoint
    │   └── UnreachableError     a cluster's API does not answer
    └── FatalError               no retry helps; the message names the place and the remedy
        ├── ConfigError          the run file is wrong
        ├── DataError            a record, an image or a label of the data set is wrong
        ├── ModelError           a model folder cannot be used
        ├── StoreError           the object store cannot be used (full, read-only, unreachable)
        │   ├── ObjectMissingError    no object of that key
        │   ├── ObjectExistsError     a conditional create met an existing object
        │   └── CorruptObjectError    an object's bytes do not match their checksum or format
        ├── FencedError          another attempt has taken the run over
        ├── HeldError            another driver is at the run, and this one was not told to take over
        ├── NonFiniteError       a loss or a gradient is NaN or infinite
        ├── StoppedError         a signal ended the command; ``signal`` says which
        ├── UnscoredError        a sample could not be scored and the run file says ``stop``
        ├── TokenRefusedError    a cluster's API asks for a token, or refuses the one it got
        ├── RequestRefusedError  a cluster's API refuses a request
        └── ResourceError        the machine lacks a port, shared memory or a device

Every message is one sentence that names the place, the value and the remedy. ``reason`` is the error's class for
machines, which decide by it whether another try may help: a word of its type, or one that an error itself was given.
"""

from __future__ import annotations

import errno


class SteadyhelmError(Exception):
    """Base of all errors that Steadyhelm raises on purpose."""

    reason: str = "Failed"


class RetryableError(SteadyhelmError):
    """The same call may succeed later.

    Args:
        message: what happened, where, and what is retried.
        delay_s: seconds to wait at least before the next try.
    """

    def __init__(self, message: str, delay_s: float = 0.0) -> None:
        super().__init__(message)
        self.delay_s = delay_s


class DeadlineError(RetryableError):
    """A remote call or a wait passed its deadline."""

    reason = "DeadlinePassed"


class EngineLostError(RetryableError):
    """A rollout engine, or the process that holds it, is gone."""

    reason = "EngineFailed"


class LearnerLostError(RetryableError):
    """A learner rank is gone; the group has to restart from the last checkpoint."""

    reason = "LearnerFailed"


class FatalError(SteadyhelmError):
    """No retry helps."""


class ConfigError(FatalError):
    """The run file is wrong; the message names the path, the value and the remedy."""

    reason = "BadRunFile"


class DataError(FatalError):
    """A record, an image or a label of the data set is wrong."""

    reason = "BadData"


class ModelError(FatalError):
    """A model folder cannot be used."""

    reason = "BadModel"


class StoreError(FatalError):
    """The object store cannot be used.

    Args:
        message: what could not be done, where, and the remedy.
        reason: ``StoreRefused``, ``StoreUnreachable`` or ``DiskFull`` where it is one of these.
    """

    reason = "StoreFailed"

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or type(self).reason


class ObjectMissingError(StoreError):
    """There is no object of that key."""


class ObjectExistsError(StoreError):
    """A conditional create met an object that exists already."""


class CorruptObjectError(StoreError):
    """An object's bytes do not match their checksum or their format."""

    reason = "StoreDamaged"


class FencedError(FatalError):
    """Another attempt has taken the run over; this one must stop writing."""

    reason = "TakenOver"


class HeldError(FatalError):
    """Another driver is at the run, and this one was not told to take it over."""

    reason = "RunHeld"


class NonFiniteError(FatalError):
    """A loss, a gradient or a weight is NaN or infinite."""

    reason = "NonFinite"


class UnscoredError(FatalError):
    """A sample could not be scored and the run file says ``on_unscored: stop``."""

    reason = "Unscored"


class StoppedError(FatalError):
    """A signal ended the command.

    Args:
        message: what was ended.
        signal: the signal's number.
    """

    reason = "Stopped"

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class ResourceError(FatalError):
    """The machine lacks something that the run needs: a port, shared memory, a device."""

    reason = "NoResource"


class UnreachableError(RetryableError):
    """A cluster's API does not answer, or answers that it cannot now."""

    reason = "ClusterUnreachable"


class TokenRefusedError(FatalError):
    """A cluster's API asks for a token, or refuses the one it got."""

    reason = "TokenRefused"


class RequestRefusedError(FatalError):
    """A cluster's API refuses a request: what is asked for is not there, or cannot be."""

    reason = "RequestRefused"


def reason_of(error: BaseException) -> str:
    """The class of ``error`` for machines: its own, ``DiskFull`` where that is behind it, ``Bug`` for any other.

    Example: ``reason_of(ConfigError("…")) == "BadRunFile"``
    """
    cause: BaseException | None = error
    for _ in range(8):  # causes of causes; Ray's errors name theirs by ``cause``
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return "DiskFull"
        cause = getattr(cause, "cause", None) or getattr(cause, "__cause__", None)
    return error.reason if isinstance(error, SteadyhelmError) else "Bug"


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type's name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

"""The exceptions that Steadyhelm raises, in one tree.

::

    SteadyhelmError
    ├── RetryableError           the same call may succeed later; ``delay_s`` says how long to wait at least
    │   ├── DeadlineError        a remote call or a wait passed its deadline
    │   ├── EngineLostError      a rollout engine or its process is gone; its requests may go elsewhere
    │   └── LearnerLostError     a learner rank is gone; the group restarts from the last checkpoint
    └── FatalError               no retry helps; the message names the place and the remedy
        ├── ConfigError          the run file is wrong
        ├── DataError            a record, an image or a label of the data set is wrong
        ├── ModelError           a model folder cannot be used
        ├── StoreError           the object store cannot be used (full, read-only, unreachable)
        │   ├── ObjectMissingError    no object of that key
        │   ├── ObjectExistsError     a conditional create met an existing object
        │   └── CorruptObjectError    an object's bytes do not match their checksum or format
        ├── FencedError          another attempt has taken the run over
        ├── NonFiniteError       a loss or a gradient is NaN or infinite
        ├── StoppedError         a signal ended the command; ``signal`` says which
        ├── UnscoredError        a sample could not be scored and the run file says ``stop``
        └── ResourceError        the machine lacks a port, shared memory or a device

Every message is one sentence that names the place, the value and the remedy.
"""

from __future__ import annotations


class SteadyhelmError(Exception):
    """Base of all errors that Steadyhelm raises on purpose."""


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


class EngineLostError(RetryableError):
    """A rollout engine, or the process that holds it, is gone."""


class LearnerLostError(RetryableError):
    """A learner rank is gone; the group has to restart from the last checkpoint."""


class FatalError(SteadyhelmError):
    """No retry helps."""


class ConfigError(FatalError):
    """The run file is wrong; the message names the path, the value and the remedy."""


class DataError(FatalError):
    """A record, an image or a label of the data set is wrong."""


class ModelError(FatalError):
    """A model folder cannot be used."""


class StoreError(FatalError):
    """The object store cannot be used."""


class ObjectMissingError(StoreError):
    """There is no object of that key."""


class ObjectExistsError(StoreError):
    """A conditional create met an object that exists already."""


class CorruptObjectError(StoreError):
    """An object's bytes do not match their checksum or their format."""


class FencedError(FatalError):
    """Another attempt has taken the run over; this one must stop writing."""


class NonFiniteError(FatalError):
    """A loss, a gradient or a weight is NaN or infinite."""


class UnscoredError(FatalError):
    """A sample could not be scored and the run file says ``on_unscored: stop``."""


class StoppedError(FatalError):
    """A signal ended the command.

    Args:
        message: what was ended.
        signal: the signal's number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class ResourceError(FatalError):
    """The machine lacks something that the run needs: a port, shared memory, a device."""

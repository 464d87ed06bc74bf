"""The run file: one frozen tree of typed parts. Imports neither torch nor ray."""

from steadyhelm.config.run import RunFile

__all__ = ["RunFile"]

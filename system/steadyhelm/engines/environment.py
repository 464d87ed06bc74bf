"""Where an engine server's own Python environment is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from steadyhelm.errors import ConfigError


def engine_python(engine: str, given: str) -> str:
    """The interpreter of the environment in which ``engine`` is installed.

    Args:
        engine: ``"vllm"``.
        given: what the run file says; empty for the one that ``STEADYHELM_<ENGINE>_PYTHON`` names, or that
            ``make engines`` made.

    Raises:
        ConfigError: there is none.
    """
    variable = f"STEADYHELM_{engine.upper()}_PYTHON"
    named = given or os.environ.get(variable, "")
    if named:
        found = shutil.which(named)
        if found is None:
            place = "rollout.engine.python" if given else variable
            raise ConfigError(f"{place} is {named!r}, which is no program here: name the interpreter of {engine}")
        return found
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    made = cache / "steadyhelm" / "engines" / engine / "bin" / "python"
    if not made.exists():
        raise ConfigError(
            f"rollout.engine.type is {engine!r}, but there is no environment for it: run 'make engines', or set "
            f"rollout.engine.python or {variable} to the interpreter that {engine} is installed for"
        )
    return str(made)

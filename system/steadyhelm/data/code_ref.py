"""Task code beside the run file: the one door for data sets, templates, reward terms and model factories.

A reference ``file.py:name`` names a Python file relative to the run file's folder and a name in it. The file's module
is loaded once per process, under a name made from its path, so that two runs with equally named files never meet. The
file's folder goes to the front of ``sys.path``, as it does for a script, so task files import each other plainly
(``import digits``) and get the very module that a reference loads. Other processes load the same path again; task
objects themselves are never sent.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from steadyhelm.errors import ConfigError, SteadyhelmError

_PREFIX = "steadyhelm_task_"


def load_code(base: Path, ref: str) -> Any:
    """The object that ``ref`` (``file.py:name``) names, its file taken relative to the folder ``base``.

    Raises ConfigError for a missing file, a missing name, or an error while the file is imported.
    """
    file, _, name = ref.rpartition(":")
    path = (base / file).resolve()
    if not path.is_file():
        raise ConfigError(f"{ref}: there is no file {path}; give the file's path relative to the run file's folder")
    module = _module(path, ref)
    if not hasattr(module, name):
        known = ", ".join(sorted(key for key in vars(module) if not key.startswith("_"))) or "nothing"
        raise ConfigError(f"{ref}: {path.name} has no name {name!r}; it defines {known}")
    return getattr(module, name)


def code_function(base: Path, ref: str) -> Callable[..., Any]:
    """The function that ``ref`` names, with its errors turned into ConfigErrors that name the line.

    Errors of ``steadyhelm.errors`` pass through. Raises ConfigError where ``ref`` cannot be loaded or called.
    """
    function = load_code(base, ref)
    if not callable(function):
        raise ConfigError(f"{ref}: {function!r:.60} is not a function; name one that can be called")

    def guarded(*args: object) -> Any:
        with _errors_named(base, ref, "the call"):
            return function(*args)

    return guarded


def call_code(base: Path, ref: str, *args: object) -> Any:
    """What the function ``ref`` returns for ``args``; errors as ``code_function``'s."""
    return code_function(base, ref)(*args)


def iterate_result(base: Path, ref: str, result: object) -> Iterator[object]:
    """Yields the items of what ``ref`` returned; errors of its code on the way become ConfigErrors that name the line.

    Raises ConfigError where ``result`` cannot be iterated over.
    """
    if not isinstance(result, Iterable) or isinstance(result, str | bytes | Mapping):
        raise wrong_result(ref, "a sequence", result)
    items = iter(result)
    while True:
        with _errors_named(base, ref, "reading its records"):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


@contextmanager
def _errors_named(base: Path, ref: str, what: str) -> Iterator[None]:
    try:
        yield
    except SteadyhelmError:
        raise
    except (Exception, SystemExit) as error:  # task code may raise anything
        folder = (base / ref.rpartition(":")[0]).resolve().parent
        raise ConfigError(f"{ref}: {what} failed{failed_at(error, folder)}; fix the file") from error


def wrong_result(ref: str, expected: str, got: object) -> ConfigError:
    """The error for a task function that returned ``got`` where the system needs ``expected``."""
    text = repr(got)
    return ConfigError(
        f"{ref}: it returned {text if len(text) <= 80 else text[:77] + '...'} ({type(got).__name__}); "
        f"it must return {expected}"
    )


def failed_at(error: BaseException, folder: Path) -> str:
    """Where in the task's own code ``error`` arose, to stand behind "failed": `` at digits.py line 3: KeyError: 'k'``.

    The innermost frame of a file inside ``folder`` counts; without one (a call that does not fit) only the error is
    told: ``: TypeError: ...``.
    """
    folder = folder.resolve()
    what = f": {type(error).__name__}: {error}"
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_relative_to(folder):
        return f" at {Path(error.filename).name} line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(folder)]
    return f" at {Path(own[-1].filename).name} line {own[-1].lineno}{what}" if own else what


def _module(path: Path, ref: str) -> ModuleType:
    name = f"{_PREFIX}{hashlib.sha256(str(path).encode()).hexdigest()[:16]}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    _lead_with(path.parent)
    plain = sys.modules.get(path.stem)
    if plain is not None and _file_of(plain) == path:
        sys.modules[name] = plain
        return plain
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # A sibling's plain import must find this module, not a second copy; a name that is taken (``types``) stays so.
    alias = path.stem not in sys.modules
    if alias:
        sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # task code may raise anything
        sys.modules.pop(name, None)
        if alias:
            sys.modules.pop(path.stem, None)
        if isinstance(error, SteadyhelmError):
            raise
        raise ConfigError(
            f"{ref}: importing it failed{failed_at(error, path.parent)}; fix the file, or install what it needs"
        ) from error
    return module


def _lead_with(folder: Path) -> None:
    """Puts ``folder`` first on ``sys.path`` and forgets equally named plain imports from another task's folder."""
    entry = str(folder)
    if entry in sys.path:
        sys.path.remove(entry)
    sys.path.insert(0, entry)
    task_folders = {
        file.parent for key, module in sys.modules.items() if key.startswith(_PREFIX) and (file := _file_of(module))
    }
    for sibling in folder.glob("*.py"):
        loaded = sys.modules.get(sibling.stem)
        file = None if loaded is None else _file_of(loaded)
        if file is not None and file.parent != folder and file.parent in task_folders:
            del sys.modules[sibling.stem]


def _file_of(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if file else None

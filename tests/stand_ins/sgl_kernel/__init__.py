"""A stand-in, not kernels: what SGLang has to import where there is no GPU.

SGLang imports its kernel package ``sgl_kernel`` wherever it runs. The one on PyPI loads CUDA's driver library and has
no operators for CPUs, so it cannot be imported on a machine without a GPU. This package takes its place there: every
name can be imported, and calling any raises. SGLang then computes with plain PyTorch, which is enough to test
Steadyhelm against the real server, its scheduler and its model code; its speed says nothing about SGLang. Modules
without compiled code come from the installed package. ``.ci/engines sglang`` puts this one in front of that.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch


def raising(name: str) -> Callable[..., Any]:
    """A function that says that there is no such kernel."""

    def call(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"{name} is a kernel, of which this machine has only a stand-in")

    call.__name__ = name
    return call


class Operators(ModuleType):
    """``torch.ops.sgl_kernel``: the operators for CPUs, each raising; of others it has none."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__") or not name.endswith("_cpu"):
            raise AttributeError(name)
        return raising(name)


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)
    return raising(name)


torch.ops.sgl_kernel = Operators("torch.ops.sgl_kernel")
own = Path(__file__).parent
__path__ += [str(other) for folder in sys.path if (other := Path(folder) / own.name) != own and other.is_dir()]

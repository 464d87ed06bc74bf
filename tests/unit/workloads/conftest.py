"""The digits workload's modules, and its pairs made once."""

import importlib
import sys
from types import ModuleType

import pytest

from tests.conftest import WORKLOAD


@pytest.fixture(scope="session")
def digits() -> ModuleType:
    sys.path.insert(0, str(WORKLOAD))
    return importlib.import_module("digits")


@pytest.fixture(scope="session", params=["train", "sft", "eval"])
def pairs(request, digits):
    return getattr(digits, f"{request.param}_pairs")()

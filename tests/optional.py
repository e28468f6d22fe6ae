"""Libraries that a test may need and an environment may lack."""

import importlib

import pytest


class _Missing:
    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        if attribute.startswith("_"):  # pytest looks at what a module has
            raise AttributeError(attribute)
        pytest.skip(f"{self._name} is not installed", allow_module_level=True)


def optional(name):
    """The module; or, where there is none, a stand-in that skips the test which first uses it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return _Missing(name)

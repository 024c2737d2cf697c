"""Errors that say in one line what is wrong and what would be right."""

from collections.abc import Iterator
from contextlib import contextmanager


class ParamError(ValueError):
    """A parameter that cannot be: the message names it, what is wrong and what would be right."""


class DataError(RuntimeError):
    """Data that is missing or damaged: the message names the folder or file and what helps."""


@contextmanager
def extra(name: str = "study") -> Iterator[None]:
    """Import packages that only an extra of this one brings: `with extra(): import pandas`.

    Where one is missing: ModuleNotFoundError, in one line that says what to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        message = f'{error.name} is not installed; pip install "explib[{name}]"'
        raise ModuleNotFoundError(message, name=error.name) from None

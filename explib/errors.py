"""Errors that say in one line what is wrong and what would be right."""


class ParamError(ValueError):
    """A parameter that cannot be: the message names it, what is wrong and what would be right."""


class DataError(RuntimeError):
    """Data that is missing or damaged: the message names the folder or file and what helps."""

"""EXP pruning: score, prune, fine-tune and count convolutional networks, kernel by kernel."""

import ast
from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"


def _table() -> dict[str, str]:
    """Read where each public name is defined from the stub that editors and type checkers read."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text("utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module or "" for node in imports for alias in node.names}


# Names come on first use (PEP 562): torch takes seconds to import, and whoever only reads
# parameters (Snakemake, at every job) does not need it.
_HOMES = _table()
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'explib' has no attribute {name!r}")
    if _HOMES[name] == "explib":  # a room of its own
        return import_module(f"explib.{name}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__():
    return __all__

"""EXP pruning: score, prune, fine-tune and count convolutional networks, kernel by kernel."""

from importlib import import_module

__version__ = "0.1.0"

# Names come on first use (PEP 562): torch takes seconds to import, and whoever only reads
# parameters (Snakemake, at every job) does not need it.
_MODULE_OF = {
    "ParamError": "params",
    "Params": "params",
    "from_notebook": "params",
    "from_yaml": "params",
    "build": "models",
    "find_convs": "models",
    "load_data": "data",
    "delta_e": "expectation",
    "levels": "expectation",
    "prune": "pruners",
    "prune_layer": "pruners",
    "apply": "masks",
    "hold": "masks",
    "load_compact": "masks",
    "load_network": "study",
    "save_compact": "masks",
    "sparsity": "masks",
    "macs": "flops",
    "weights": "flops",
    "evaluate": "evaluation",
    "reestimate_bn": "evaluation",
    "train": "finetune",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name in _MODULE_OF:
        return getattr(import_module(f"explib.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'explib' has no attribute {name!r}")


def __dir__():
    return __all__

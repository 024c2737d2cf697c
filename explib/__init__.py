"""EXP pruning: score, prune, fine-tune and count convolutional networks, kernel by kernel."""

from importlib import import_module

__version__ = "0.1.0"

# Names come on first use (PEP 562): torch takes seconds to import, and whoever only reads
# parameters (Snakemake, at every job) does not need it.
_MODULE_OF = {
    "ParamError": "errors",
    "Params": "params",
    "from_notebook": "params",
    "from_yaml": "params",
    "build": "models",
    "find_convs": "pruning.layers",
    "load_data": "data",
    "delta_e": "pruning.scores",
    "levels": "pruning.scores",
    "prune": "pruning.criteria",
    "Layer": "pruning.criteria",
    "register_criterion": "registry",
    "register_dataset": "registry",
    "register_network": "registry",
    "apply": "pruning.masks",
    "hold": "pruning.holding",
    "release": "pruning.holding",
    "masks_of": "pruning.masks",
    "load_compact": "pruning.checkpoints",
    "load_network": "pruning.checkpoints",
    "save_compact": "pruning.checkpoints",
    "sparsity": "pruning.masks",
    "macs": "pruning.counting",
    "weights": "pruning.counting",
    "evaluate": "training.evaluation",
    "reestimate_bn": "training.evaluation",
    "train": "training.loop",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name in _MODULE_OF:
        return getattr(import_module(f"explib.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'explib' has no attribute {name!r}")


def __dir__():
    return __all__

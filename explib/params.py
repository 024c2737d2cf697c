"""One validated configuration: every choice of a run, from YAML, a notebook or Python."""

import ast
import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from explib.checks import CHOICES, checked, together
from explib.errors import ParamError
from explib.rates import parse_rates
from explib.registry import file_name, nearest

# What may differ between two runs that compute the same
PLACES = ("data_dir", "data_url", "job_dir", "results_dir", "threads", "workers")


@dataclass(frozen=True)
class Params:
    """Everything a run depends on. YAML files, papermill and Python use the same names.

    Raises ParamError for an unknown value, a wrong type or a number out of range.
    """

    # What is pruned, and on which images
    name: str = ""  # of the configuration, in records and tables; empty: arch-way
    arch: str = "resnet_56"  # a known network, or package.module:function that builds one
    dataset: str = (
        "digits"  # digits (embedded), cifar10, imagenet (any class folders), or a module:function
    )
    data_dir: str = ""  # folder of the data; empty: $EXPLIB_DATA, else data/
    image_size: int = 0  # side of the inputs made of class folders; 0: 224
    data_url: str = ""  # mirror of cifar-10-python.tar.gz; empty: the original server
    normalization: str = ""  # mean and std of the inputs; empty: the data set's own
    resume: str = ""  # checkpoint of the dense network; empty: the one 00_baseline made
    resume_mask: str = ""  # file of masks to use instead of computing them
    job_dir: str = ""  # where the run keeps its files; empty: below results_dir/runs
    results_dir: str = "results"  # records, tables and figures go below it

    # How kernels are chosen (method: score, levels, way)
    # A, B; for comparison random, l1, global_l1, taylor, bn, matched, filters; or a module:function
    pruning_way: str = "B"
    compress_rate: str = "[0.5]"  # one rate per conv, or a single one for all
    survivors: str = "random"  # who stays in a redundant set: random (published) or l1
    groups: int = 13  # number of level groups
    keep_floor: float | None = (
        None  # share of each redundant set that stays; null: 1-max(rates)-0.1
    )
    binary_floor: bool = False  # round what stays of a set up in binary, as the published code does
    start_cov: int = 0  # convs before this index stay dense
    strict_rate: bool = False  # go below keep_floor where a rate is not met otherwise
    bias_in_score: bool = (
        False  # add the conv bias to the score, as the reference does for VGG-16, A
    )

    # How the network is trained
    schedule: str = "oneshot"  # mask all convs and train once, or layerwise: one conv at a time
    # The published schedule is layerwise, 30 epochs, batch 256, lr 0.01, step, without Nesterov and
    # distillation; the defaults are ours, for a few epochs in one go.
    epochs: float | int = (
        10  # of fine-tuning (layerwise: per conv) or of the baseline; 0.1: a tenth
    )
    batch_size: int = 128  # images per step, over all devices
    micro_batch: int = 0  # images at a time on one device, gradients added up; 0: all of its share
    lr: float = 0.04  # the peak
    lr_schedule: str = "onecycle"  # step (published), cosine or onecycle
    lr_decay_step: str = "15,25"  # epochs after which step divides lr by 10
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    distill: float = 0.9  # weight of the dense network's soft labels in the loss
    fade_epochs: int = 0  # pruned weights shrink to zero over these epochs; 0: at once
    bn_images: int = 2048  # training images that re-estimate BatchNorm after masking; 0: none
    freeze_bn: bool = False  # train with BatchNorm's statistics as they are
    validation: int = 0  # training images held out to evaluate on instead of the test set
    limit_train: int = 0  # use only the first images; 0: all
    limit_test: int = 0
    seed: int = 0  # initialisation, order, augmentation
    mask_seed: int | None = None  # random choices inside redundant sets; null: seed

    # The machine
    device: str = "auto"
    precision: str = "auto"  # auto: bf16 where the hardware has it
    compile: str = "auto"  # on: torch.compile; sparse: surviving kernels only; auto: what pays
    threads: int = 0  # CPU threads; 0: all
    workers: int = 0  # processes that decode images of class folders; 0: one per core

    def __post_init__(self):
        for field, kind in get_type_hints(type(self)).items():
            object.__setattr__(self, field, checked(field, getattr(self, field), kind))
        together(self)
        for field, default in _DERIVED.items():
            if getattr(self, field) in ("", None):
                object.__setattr__(self, field, default(self))

    @property
    def rates(self) -> list[float]:
        """The pruning rates in order, one per conv (or a single one for all)."""
        return parse_rates(self.compress_rate)

    @property
    def digest(self) -> str:
        """Six hexadecimal digits, equal for runs that compute the same wherever their files are.

        Of what differs from the defaults, so that a parameter added later changes no name.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        chosen = {k: v for k, v in self.asdict().items() if k not in PLACES and v != defaults[k]}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:6]

    def replace(self, **changes) -> "Params":
        """A copy with other values, validated anew; what was a default follows them."""
        follow = {
            field: Params.__dataclass_fields__[field].default
            for field, default in _DERIVED.items()
            if getattr(self, field) == default(self)
        }
        return dataclasses.replace(self, **{**follow, **changes})

    def asdict(self) -> dict:
        """All fields as a plain dict."""
        return dataclasses.asdict(self)


def _own_folder(params: Params) -> str:
    folder = f"{params.name}-s{params.seed}-{params.digest}"
    return f"{params.results_dir}/runs/{file_name(params.dataset)}/{folder}"


# What is filled in where it was left empty, from what stands above it
_DERIVED: dict[str, Callable[[Params], Any]] = {
    "normalization": lambda p: p.dataset if p.dataset in CHOICES["normalization"] else "",
    "name": lambda p: file_name(f"{p.arch}-{p.pruning_way}"),
    "mask_seed": lambda p: p.seed,
    "job_dir": _own_folder,
}


def from_mapping(mapping: dict, source: str = "parameters") -> Params:
    """Params from a dict; an unknown key is a ParamError that names the nearest known one."""
    known = [field.name for field in dataclasses.fields(Params)]
    for key in mapping:
        if key not in known:
            near = nearest(key, known)
            hint = f"; did you mean {near!r}?" if near else f"; known: {', '.join(known)}"
            raise ParamError(f"{source}: unknown parameter {key!r}{hint}")
    return Params(**mapping)


class _NoDuplicates(yaml.SafeLoader):
    """YAML without code, in which a key given twice is an error and not silently the last one."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"{twice[0]!r} is given twice")
        return super().construct_mapping(node, deep)


def from_yaml(path: str | Path, **changes) -> Params:
    """Params from a YAML file of params/, with changes on top. ParamError names file and line."""
    path = Path(path)
    try:
        mapping = yaml.load(path.read_text(), _NoDuplicates)
    except OSError as error:
        raise ParamError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ParamError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    mapping = {} if mapping is None else mapping
    if not isinstance(mapping, dict):
        raise ParamError(f"{path}: holds a {type(mapping).__name__}; give `name: value` lines")
    return from_mapping({**mapping, **changes}, source=str(path))


def from_notebook(namespace: dict) -> Params:
    """Params from a notebook's variables: call it as `from_notebook(globals())`.

    Takes the variables that are named like a field. What papermill injected must all be such:
    a parameter that the notebook does not have is a ParamError, not silently nothing.
    """
    known = {field.name for field in dataclasses.fields(Params)}
    chosen = {key: namespace[key] for key in known if key in namespace}
    for source in namespace.get("In", []):
        if source.startswith("# Parameters\n"):
            for node in ast.parse(source).body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    chosen[node.targets[0].id] = namespace[node.targets[0].id]
    return from_mapping(chosen, source="notebook")

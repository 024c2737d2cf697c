"""One validated configuration: every choice of a run, and the grammar of its pruning rates."""

import ast
import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import types
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import yaml

from explib.errors import ParamError
from explib.rates import parse_rates

ARCHS = ("vgg_16_bn", "resnet_56", "resnet_110", "googlenet", "resnet_50")
WAYS = ("A", "B", "random", "l1", "bn", "matched")
CHOICES = {
    "arch": ARCHS,
    "dataset": ("digits", "cifar10", "imagenet"),
    "normalization": ("", "cifar10", "imagenet"),
    "pruning_way": (*WAYS, "filters"),
    "survivors": ("random", "l1"),
    "schedule": ("oneshot", "layerwise"),
    "lr_schedule": ("step", "cosine", "onecycle"),
    "device": ("auto", "cpu", "cuda"),
    "precision": ("auto", "fp32", "bf16"),
    "compile": ("auto", "on", "off", "sparse"),
}
# field: (lowest, highest, whether the lowest itself is allowed)
RANGES = {
    "groups": (1, 10_000, True),
    "keep_floor": (0, 1, True),
    "start_cov": (0, 10_000, True),
    "epochs": (0, 100_000, False),
    "batch_size": (1, 1_000_000, True),
    "micro_batch": (0, 1_000_000, True),
    "image_size": (0, 4096, True),
    "lr": (0, 100, False),
    "momentum": (0, 1, True),
    "weight_decay": (0, 1, True),
    "label_smoothing": (0, 1, True),
    "distill": (0, 1, True),
    "fade_epochs": (0, 100_000, True),
    "bn_images": (0, 100_000_000, True),
    "validation": (0, 100_000_000, True),
    "limit_train": (0, 100_000_000, True),
    "limit_test": (0, 100_000_000, True),
    "seed": (0, 2**31 - 1, True),
    "mask_seed": (0, 2**31 - 1, True),
    "threads": (0, 4096, True),
    "workers": (0, 4096, True),
}
# What may differ between two runs that compute the same
PLACES = ("data_dir", "data_url", "job_dir", "results_dir", "threads", "workers")


@dataclass(frozen=True)
class Params:
    """Everything a run depends on. YAML files, papermill and Python use the same names.

    Raises ParamError for an unknown value, a wrong type or a number out of range.
    """

    # What is pruned, and on which images
    name: str = ""  # of the configuration, in records and tables; empty: arch-way
    arch: str = "resnet_56"
    dataset: str = "digits"  # digits (embedded), cifar10, or imagenet (any class folders)
    data_dir: str = ""  # folder of the data; empty: $EXPLIB_DATA, else data/
    image_size: int = 0  # side of the inputs made of class folders; 0: 224
    data_url: str = ""  # mirror of cifar-10-python.tar.gz; empty: the original server
    normalization: str = ""  # mean and std of the inputs; empty: the data set's own
    resume: str = ""  # checkpoint of the dense network; empty: the one 00_baseline made
    resume_mask: str = ""  # file of masks to use instead of computing them
    job_dir: str = ""  # where the run keeps its files; empty: below results_dir/runs
    results_dir: str = "results"  # records, tables and figures go below it

    # How kernels are chosen (method: score, levels, way)
    pruning_way: str = "B"  # A, B; for comparison random, l1, bn, matched, filters
    compress_rate: str = "[0.5]"  # one rate per conv, or a single one for all
    survivors: str = "random"  # who stays in a redundant set: random (published) or l1
    groups: int = 13  # number of level groups
    keep_floor: float | None = (
        None  # share of each redundant set that stays; null: 1-max(rates)-0.1
    )
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
            object.__setattr__(self, field, _checked(field, getattr(self, field), kind))
        for field in ("job_dir", "results_dir", "data_dir", "resume", "resume_mask"):
            if "\0" in getattr(self, field):
                raise ParamError(f"{field}: has a NUL byte; give a path")
        for field in ("job_dir", "results_dir"):
            # written to: an absolute path says that it is meant
            if os.path.normpath(getattr(self, field)).split(os.sep)[0] == "..":
                raise ParamError(
                    f"{field}: {getattr(self, field)!r} leaves the project; give an absolute path"
                )
        if not re.fullmatch(r"[A-Za-z0-9._+-]*", self.name) or set(self.name) == {"."}:
            raise ParamError(f"name: {self.name!r}; give letters, digits and . _ + - only")
        if not re.fullmatch(r"(https?://\S+)?", self.data_url):
            raise ParamError(
                f"data_url: {self.data_url!r}; give an address that begins with https://"
            )
        parse_rates(self.compress_rate)
        parse_steps(self.lr_decay_step)
        if self.normalization == "" and self.dataset != "digits":
            object.__setattr__(self, "normalization", self.dataset)
        if self.image_size and self.dataset != "imagenet":
            raise ParamError(
                f"image_size: {self.image_size}, but images of {self.dataset!r} have 32; leave it 0"
            )
        if self.normalization and self.dataset == "digits":
            raise ParamError(
                f"normalization: {self.normalization!r} is not for dataset 'digits'; leave it empty"
            )
        if self.pruning_way == "filters" and self.schedule == "layerwise":
            raise ParamError(
                "schedule: 'layerwise' is not for filters, which span convs; 'oneshot' is"
            )
        if self.compile == "sparse" and self.device == "cuda":
            raise ParamError("compile: 'sparse' is for a CPU; use 'auto', or device 'cpu'")
        if self.compile == "sparse" and self.fade_epochs:
            raise ParamError(
                f"compile: 'sparse', but pruned kernels fade for {self.fade_epochs} epochs, and so "
                "have to be computed; use 'auto', or fade_epochs 0"
            )
        if self.fade_epochs > self.epochs:
            raise ParamError(
                f"fade_epochs: {self.fade_epochs}, but there are {self.epochs} epochs, and what is "
                f"left of a kernel then is not zero; give at most {math.floor(self.epochs)}"
            )
        if self.pruning_way == "filters" and self.start_cov:
            raise ParamError(
                f"start_cov: {self.start_cov} is not for filters, which span convs; leave it 0"
            )
        if not self.name:
            object.__setattr__(self, "name", f"{self.arch}-{self.pruning_way}")
        if self.mask_seed is None:
            object.__setattr__(self, "mask_seed", self.seed)
        if not self.job_dir:
            folder = f"{self.name}-s{self.seed}-{self.digest}"
            object.__setattr__(self, "job_dir", f"{self.results_dir}/runs/{self.dataset}/{folder}")

    @property
    def rates(self) -> list[float]:
        """The pruning rates in order, one per conv (or a single one for all)."""
        return parse_rates(self.compress_rate)

    @property
    def side(self) -> int:
        """Height and width of the inputs in pixels."""
        return (self.image_size or 224) if self.dataset == "imagenet" else 32

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
        derived = {}
        if self.job_dir.endswith(f"-{self.digest}"):
            derived["job_dir"] = ""
        if self.name == f"{self.arch}-{self.pruning_way}":
            derived["name"] = ""
        if self.mask_seed == self.seed:
            derived["mask_seed"] = None
        if self.normalization == ("" if self.dataset == "digits" else self.dataset):
            derived["normalization"] = ""
        return dataclasses.replace(self, **{**derived, **changes})

    def asdict(self) -> dict:
        """All fields as a plain dict."""
        return dataclasses.asdict(self)


_EXPONENT = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?[eE][+-]?[0-9]+")
_EXAMPLES = {"compress_rate": "[0.5]", "compile": "on", "lr_decay_step": "15,25"}


def _checked(field: str, value, kind):
    """`value` as a `kind`, within its choices and range, else ParamError."""
    kinds = get_args(kind) if get_origin(kind) is types.UnionType else (kind,)
    if value is None and type(None) in kinds:
        return None
    if float in kinds and isinstance(value, str) and _EXPONENT.fullmatch(value):
        value = float(value)  # YAML takes 5e-4 for a word
    if int in kinds and float in kinds:
        if type(value) is float and value.is_integer():
            value = int(value)  # however it was written, it is the same run
    elif float in kinds and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) not in kinds:
        names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        quoted = f', in quotes, like "{_EXAMPLES.get(field, value)}"' if kinds == (str,) else ""
        raise ParamError(f"{field}: {value!r} is a {type(value).__name__}; give {names}{quoted}")
    if field in CHOICES and value not in CHOICES[field]:
        close = difflib.get_close_matches(str(value), CHOICES[field], n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        known = ", ".join(repr(choice) for choice in CHOICES[field])
        raise ParamError(f"{field}: {value!r} is unknown; {hint}known: {known}")
    if field in RANGES:
        low, high, closed = RANGES[field]
        if not (low <= value <= high) or (value == low and not closed):
            above = "" if closed else "above "
            raise ParamError(f"{field}: {value!r} is out of range; give {above}{low} to {high}")
    return value


def from_mapping(mapping: dict, source: str = "parameters") -> Params:
    """Params from a dict; an unknown key is a ParamError that names the nearest known one."""
    known = [field.name for field in dataclasses.fields(Params)]
    for key in mapping:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
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
                if isinstance(node, ast.Assign):
                    chosen[node.targets[0].id] = namespace[node.targets[0].id]
    return from_mapping(chosen, source="notebook")


def parse_steps(text: str) -> list[int]:
    """Epochs from `15,25`, ascending; the empty text is no step. ParamError otherwise."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(re.fullmatch(r"[0-9]{1,6}", part) for part in parts):
        raise ParamError(f"lr_decay_step: cannot read {text!r}; give epochs like 15,25")
    steps = [int(part) for part in parts]
    if steps != sorted(set(steps)):
        raise ParamError(f"lr_decay_step: {text!r} is not ascending; give epochs like 15,25")
    return steps

"""What each field of Params may be: its type, choices and range, and what excludes what."""

import math
import os
import re
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args, get_origin

from explib import registry
from explib.errors import ParamError
from explib.rates import parse_rates

if TYPE_CHECKING:
    from explib.params import Params

CHOICES = {
    **registry.BY_FIELD,  # live: what is registered later is a choice, too
    "normalization": ("", "cifar10", "imagenet"),
    "survivors": tuple(registry.SURVIVORS),
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
_EXPONENT = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?[eE][+-]?[0-9]+")
_EXAMPLES = {"compress_rate": "[0.5]", "compile": "on", "lr_decay_step": "15,25"}


def checked(field: str, value: Any, kind: Any) -> Any:
    """`value` as a `kind`, within its choices, range and form, else ParamError."""
    value = _typed(field, value, kind)
    if value is None:
        return None
    if field in CHOICES and value not in CHOICES[field]:
        named = field in registry.BY_FIELD and registry.is_path(value)
        if not named:
            raise registry.unknown(field, value, CHOICES[field])
    if field in RANGES:
        low, high, closed = RANGES[field]
        if not (low <= value <= high) or (value == low and not closed):
            above = "" if closed else "above "
            raise ParamError(f"{field}: {value!r} is out of range; give {above}{low} to {high}")
    if field in _FORMS:
        _FORMS[field](field, value)
    return value


def _typed(field: str, value: Any, kind: Any) -> Any:
    """`value` as a `kind`: whole floats are ints where both are allowed, ints floats elsewhere."""
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
    return value


def parse_steps(text: str) -> list[int]:
    """Epochs from `15,25`, ascending; the empty text is no step. ParamError otherwise."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(re.fullmatch(r"[0-9]{1,6}", part) for part in parts):
        raise ParamError(f"lr_decay_step: cannot read {text!r}; give epochs like 15,25")
    steps = [int(part) for part in parts]
    if steps != sorted(set(steps)):
        raise ParamError(f"lr_decay_step: {text!r} is not ascending; give epochs like 15,25")
    return steps


def _path(field: str, value: str) -> None:
    if "\0" in value:
        raise ParamError(f"{field}: has a NUL byte; give a path")


def _written(field: str, value: str) -> None:
    """A folder that is written to: an absolute path says that it is meant."""
    _path(field, value)
    if os.path.normpath(value).split(os.sep)[0] == "..":
        raise ParamError(f"{field}: {value!r} leaves the project; give an absolute path")


def _name(field: str, value: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9._+-]*", value) or set(value) == {"."}:
        raise ParamError(f"{field}: {value!r}; give letters, digits and . _ + - only")


def _address(field: str, value: str) -> None:
    if not re.fullmatch(r"(https?://\S+)?", value):
        raise ParamError(f"{field}: {value!r}; give an address that begins with https://")


# field: what raises ParamError unless a text of it can be read
_FORMS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("data_dir", "resume", "resume_mask"), _path),
    **dict.fromkeys(("job_dir", "results_dir"), _written),
    "name": _name,
    "data_url": _address,
    "compress_rate": lambda _, value: parse_rates(value),
    "lr_decay_step": lambda _, value: parse_steps(value),
}


def _spans_convs(params: "Params") -> bool:
    return registry.criterion(params.pruning_way).whole_network


# (when it is wrong, the message)
_RULES: list[tuple[Callable[["Params"], Any], Callable[["Params"], str]]] = [
    (
        lambda p: p.image_size and p.dataset != "imagenet",
        lambda p: (
            f"image_size: {p.image_size}, but images of {p.dataset!r} have "
            + ("32; leave it 0" if p.dataset in registry.DATASETS else "their own; leave it 0")
        ),
    ),
    (
        lambda p: p.normalization and p.dataset == "digits",
        lambda p: f"normalization: {p.normalization!r} is not for dataset 'digits'; leave it empty",
    ),
    (
        lambda p: p.schedule == "layerwise" and _spans_convs(p),
        lambda p: (
            f"schedule: 'layerwise' is not for {p.pruning_way}, which span convs; 'oneshot' is"
        ),
    ),
    (
        lambda p: p.compile == "sparse" and p.device == "cuda",
        lambda p: "compile: 'sparse' is for a CPU; use 'auto', or device 'cpu'",
    ),
    (
        lambda p: p.compile == "sparse" and p.fade_epochs,
        lambda p: (
            f"compile: 'sparse', but pruned kernels fade for {p.fade_epochs} epochs, and so "
            "have to be computed; use 'auto', or fade_epochs 0"
        ),
    ),
    (
        lambda p: p.fade_epochs > p.epochs,
        lambda p: (
            f"fade_epochs: {p.fade_epochs}, but there are {p.epochs} epochs, and what is "
            f"left of a kernel then is not zero; give at most {math.floor(p.epochs)}"
        ),
    ),
    (
        lambda p: p.start_cov and _spans_convs(p),
        lambda p: (
            f"start_cov: {p.start_cov} is not for {p.pruning_way}, which span convs; leave it 0"
        ),
    ),
]


def together(params: "Params") -> None:
    """ParamError for the first thing that excludes another."""
    for wrong, message in _RULES:
        if wrong(params):
            raise ParamError(message(params))

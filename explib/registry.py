"""Criteria, networks and data sets by name: the study's own, and those that users add.

An entry holds the function of a name, its label and what else has to be known of it; whatever runs,
lists, tabulates or draws one reads it here. Functions of the study are given as text,
`module:function`, and imported on first use, so that reading parameters stays quick.

Wherever a name is accepted, `package.module:function` is, too: a function of the user's own, which
is imported when it is called for. What a file names (a checkpoint, a record) is never imported: see
`stored`.
"""

import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from explib.errors import ParamError

Function = Callable[..., Any] | str
_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
SURVIVORS = {"random": "random", "l1": "L1"}
"""Who stays in a redundant set, and the label of that."""


@dataclass(frozen=True)
class Criterion:
    """How kernels are chosen, by a function that `explib.pruning.criteria` describes."""

    function: Function
    label: str
    colour: str
    redundant_sets: bool = False  # whose survivors are chosen: by chance, or by their L1 norm
    whole_network: bool = False  # a function of all convs at once, not of one after another
    score: Function | None = None  # of a layer; where `function` returns masks made of scores

    def named(self, survivors: str = "") -> str:
        """The label, with who survives where the criterion has redundant sets."""
        known = self.redundant_sets and survivors
        return f"{self.label}, {SURVIVORS[survivors]} survivors" if known else self.label


@dataclass(frozen=True)
class Network:
    """How a network is built, its usual inputs and outputs, and which convs each rate is for."""

    function: Function  # num_classes -> nn.Module
    label: str
    image_size: int = 32
    num_classes: int = 10
    # names of convs in forward order -> groups of names, one group a rate; None: one rate a conv
    rate_groups: Function | None = None


@dataclass(frozen=True)
class Dataset:
    """How a data set is loaded, and what is known of it before."""

    function: Function  # Params -> explib.data.Data
    label: str
    # (number of classes, (C, H, W) of its images), or a function Params -> these; None: look
    size: tuple[int | None, tuple[int, int, int]] | Function | None = None
    fixed: bool = False  # the same images wherever it is


# Okabe and Ito's palette: told apart by colour-blind readers and in grey print
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#8A8A8A",
)  # fmt: skip
_OTHERS = (SKY, "#332288", "#882255", "#999933", "#44AA99", "#B8860B")  # of what users add

_WAYS = "explib.pruning.ways"
_DELTA_E = f"{_WAYS}:scaling_factors"
CRITERIA: dict[str, Criterion] = {
    "A": Criterion(f"{_WAYS}:way_a", "A", BLUE, redundant_sets=True, score=_DELTA_E),
    "B": Criterion(f"{_WAYS}:way_b", "B", RED, redundant_sets=True, score=_DELTA_E),
    "random": Criterion(f"{_WAYS}:random", "random kernels", GREY),
    "l1": Criterion(f"{_WAYS}:l1", "L1 kernels", GREEN),
    "bn": Criterion(f"{_WAYS}:bn", "lowest-γ filters", ORANGE),
    "matched": Criterion(f"{_WAYS}:matched", "random, B's norms", BLACK),
    "global_l1": Criterion(
        f"{_WAYS}:global_l1", "global L1 kernels", "#B2DF8A", whole_network=True
    ),
    "taylor": Criterion(
        "explib.training.taylor:taylor", "Taylor kernels", "#6A3D9A", whole_network=True
    ),
    "filters": Criterion(
        "explib.pruning.filters:group_l1", "filters, group L1", PINK, whole_network=True
    ),
}
NETWORKS: dict[str, Network] = {
    "vgg_16_bn": Network("explib.models.vgg:build", "VGG-16"),
    "resnet_56": Network("explib.models.resnet:build_56", "ResNet-56"),
    "resnet_110": Network("explib.models.resnet:build_110", "ResNet-110"),
    "googlenet": Network(
        "explib.models.googlenet:build", "GoogLeNet",
        rate_groups="explib.models.googlenet:rate_groups",
    ),
    "resnet_50": Network(
        "explib.models.resnet:build_50", "ResNet-50", 224, 1000,
        rate_groups="explib.models.resnet:rate_groups_50",
    ),
}  # fmt: skip
DATASETS: dict[str, Dataset] = {
    "digits": Dataset("explib.data:digits", "digits", (10, (3, 32, 32)), fixed=True),
    "cifar10": Dataset("explib.data:cifar10", "CIFAR-10", (10, (3, 32, 32)), fixed=True),
    "imagenet": Dataset("explib.data:imagenet", "class folders", "explib.data:imagenet_size"),
}
BY_FIELD: dict[str, dict] = {"pruning_way": CRITERIA, "arch": NETWORKS, "dataset": DATASETS}
"""The entries that each field of Params takes the names of."""
_ORDER = ("random", "bn", "A", "B", "matched", "l1", "global_l1", "taylor", "filters")
"""From chance to structure."""


def criterion(name: str, field: str = "pruning_way") -> Criterion:
    """Look up a criterion; ParamError for a name that is neither known nor a module:function."""
    return _entry(CRITERIA, name, field) or Criterion(name, name, _colour(name))


def network(name: str, field: str = "arch") -> Network:
    """Look up a network; ParamError for a name that is neither known nor a module:function."""
    return _entry(NETWORKS, name, field) or Network(name, name)


def dataset(name: str, field: str = "dataset") -> Dataset:
    """Look up a data set; ParamError for a name that is neither known nor a module:function."""
    return _entry(DATASETS, name, field) or Dataset(name, name)


def stored(field: str, name: Any, source: str) -> None:
    """ValueError unless a name that the file `source` holds is registered.

    A module:function that a file names is not imported: files come from anywhere.
    """
    if not isinstance(name, str) or name not in BY_FIELD[field]:
        known = ", ".join(BY_FIELD[field])
        raise ValueError(
            f"{source}: its {field} is {name!r}; known: {known}; what a file names is not "
            "imported: register another one under its name first, or write the network by "
            "engine.save, which needs none"
        )


def is_path(name: str) -> bool:
    """Whether a name has the form package.module:function."""
    return bool(_PATH.fullmatch(name))


def file_name(name: str) -> str:
    """A name as part of a file's name: a colon is none everywhere."""
    return name.replace(":", ".")


def load(function: Function, field: str) -> Callable[..., Any]:
    """The function itself, imported where it is text. ParamError, in one line, where it cannot be.

    field: what it was given as, for the message.
    """
    if callable(function):
        return function
    module, _, name = function.partition(":")
    try:
        holder = import_module(module)
    except Exception as error:  # whatever a module of the user's raises
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ParamError(
            f"{field}: {function!r}: module {module} cannot be imported ({why}); give "
            "package.module:function of a module that Python finds (its folder in PYTHONPATH)"
        ) from error
    if not hasattr(holder, name):
        near = nearest(name, vars(holder))
        raise ParamError(
            f"{field}: {function!r}: module {module} has no {name}"
            + (f"; did you mean {near!r}?" if near else "; give the name of a function in it")
        )
    found = getattr(holder, name)
    if not callable(found):
        raise ParamError(f"{field}: {function!r} is a {type(found).__name__}; give a function")
    return found


def register_criterion(
    name: str, function: Function, *, label: str = "", colour: str = "", **facts: Any
) -> None:
    """Add a criterion under a name, which may then stand wherever `B` may.

    function: as `explib.pruning.criteria` describes, or package.module:function, imported on first
    use. label, colour: in tables and figures; by default the name, and a colour of the palette that
    follows from it. facts: redundant_sets, whole_network, score, see Criterion. ParamError if
    the name or the label stands for another function.
    """
    _add(CRITERIA, name, Criterion(function, label or name, colour or _colour(name), **facts))


def register_network(
    name: str,
    function: Function,
    *,
    label: str = "",
    image_size: int = 32,
    num_classes: int = 10,
    rate_groups: Function | None = None,
) -> None:
    """Add a network under a name, which may then stand wherever `resnet_56` may.

    function: takes num_classes, returns an nn.Module with fresh weights from torch's random state.
    rate_groups: names of the convs in forward order -> groups of names, one group for each rate, if
    there is not one for each conv. ParamError if the name or label stands for another function.
    """
    entry = Network(function, label or name, image_size, num_classes, rate_groups)
    _add(NETWORKS, name, entry)


def register_dataset(
    name: str,
    function: Function,
    *,
    label: str = "",
    size: tuple[int | None, tuple[int, int, int]] | None = None,
) -> None:
    """Add a data set under a name, which may then stand wherever `cifar10` may.

    function: takes Params, returns `explib.data.Data`. size: (number of classes, (C, H, W) of its
    images); without it, the data are loaded to see. ParamError if the name or label stands for
    another function.
    """
    _add(DATASETS, name, Dataset(function, label or name, size))


def variants() -> list[tuple[str, str]]:
    """Every criterion with each kind of survivors ("" without redundant sets), in reports' order.

    From chance to structure; what users add comes last.
    """
    names = sorted(CRITERIA, key=lambda n: _ORDER.index(n) if n in _ORDER else len(_ORDER))
    plain = [(n, "random" if CRITERIA[n].redundant_sets else "") for n in names]
    by_norm = [(n, "l1") for n in names if CRITERIA[n].redundant_sets]
    place = names.index("l1")  # which they are most like
    return plain[:place] + by_norm + plain[place:]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a mistyped one is most like, if there is one."""
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1)), None)


def unknown(field: str, name: Any, known: Iterable[str]) -> ParamError:
    """The error for a value that is not a known one: it names the nearest, and all."""
    near, choices = nearest(name, known), ", ".join(repr(choice) for choice in known)
    other = ", or a package.module:function" if field in BY_FIELD or field == "criterion" else ""
    hint = f"did you mean {near!r}? " if near else ""
    return ParamError(f"{field}: {name!r} is unknown; {hint}known: {choices}{other}")


def _entry(entries: Mapping[str, Any], name: str, field: str) -> Any:
    if name not in entries and not is_path(name):
        raise unknown(field, name, entries)
    return entries.get(name)


def _add(entries: dict[str, Any], name: str, entry: Any) -> None:
    if not re.fullmatch(r"[A-Za-z0-9._+-]+", name) and not is_path(name):
        raise ParamError(f"{name!r} cannot be registered; give letters, digits and . _ + - only")
    if isinstance(entry.function, str) and not is_path(entry.function):
        raise ParamError(
            f"{name}: {entry.function!r} is no function; give one, or package.module:function"
        )
    known = entries.get(name)
    if known and _identity(known.function) != _identity(entry.function):
        raise ParamError(f"{name!r} is registered with another function; give another name")
    for other, taken in entries.items():
        if other != name and taken.label == entry.label:
            raise ParamError(f"{name}: {other!r} has the label {entry.label!r}; give another one")
    entries[name] = entry


def _identity(function: Function) -> Any:
    """Equal for a function and its redefinition, as when a notebook's cell runs again."""
    if isinstance(function, str):
        return function
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    return f"{module}:{name}" if name and "<" not in name else function


def _colour(name: str) -> str:
    """A colour that follows from the name, so that it is the same in every process."""
    return _OTHERS[hashlib.sha256(name.encode()).digest()[0] % len(_OTHERS)]

"""A network of any architecture as one safetensors file: its ops as data beside its weights.

Nothing of it is executed: reading makes ops, tensors and numbers, each of which is checked. The
file holds

- tensors: `OP.weight` and so on, of a pruned conv its surviving kernels (n, KH, KW) and
  `OP.weight.positions`, as explib.save has them; `answers.N`, what the N-th result has to be of
  made-up inputs, in part;
- in the metadata, as JSON: `ops`, the fields of each graph.Op that are not its defaults; `inputs`,
  `example`, `results` and `form`, how the network is called and what it returns; `images` and
  `classes`, what whoever runs it has to know; and a SHA-256 of all of this.
"""

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from explib.engine import checking, reference
from explib.engine.graph import Graph, Op, Other
from explib.engine.tracing import close, line
from explib.engine.views import View
from explib.files import load_meta, load_tensors, save_tensors
from explib.pruning.checkpoints import dense, pack
from explib.pruning.layers import Inputs, call

KIND, VERSION = "graph", 2
SAMPLED = 256
"""Of each image's result so many numbers are kept, at most, to compare with."""


class Stored(NamedTuple):
    """What a file holds. about: what it says of itself, `images`, `classes` and more."""

    graph: Graph
    example: Inputs
    about: dict
    answers: list[torch.Tensor]


def write(
    path: str | Path,
    graph: Graph,
    example: Inputs,
    about: dict,
    dtype: torch.dtype,
    like: tuple[Callable[..., Any], float],
) -> Path:
    """Write a graph whose ops are all the engine's; returns the path.

    example: inputs of any batch. about: JSON values. dtype: of weights of more than one dimension;
    everything else stays as it is. like: the network itself, and by how much, of the largest value,
    the answers of what is written may differ. ValueError or NotImplementedError, in one line and
    before anything is written, for what a file cannot hold.
    """
    left = [op.label for op in graph.ops if op.kind == "torch" and op.label]
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise NotImplementedError(
            f"{', '.join(left[:3])}{more}: no op of the engine; a file holds only those, no code"
        )
    leaves, form = tree_flatten(example)
    kept, shapes, same = _tensors(graph.ops, dtype)
    nested = tree_unflatten(list(range(len(graph.results))), graph.form)
    meta = {
        "kind": KIND,
        "version": VERSION,
        "ops": [_encoded(op) for op in graph.ops],
        "inputs": graph.inputs,
        "example": [_input(leaf) for leaf in leaves],
        "takes": _form(tree_unflatten(list(range(len(leaves))), form)),
        "results": [_result(value) for value in graph.results],
        "returns": _form(nested),
        "about": about,
        "shapes": shapes,
        "same": same,
    }
    # as it will be read: with weights of that dtype
    stored = _read("the network", kept, json.loads(json.dumps(meta)))
    stored = stored._replace(answers=answers_of(run(stored), stored))
    if not holds(like[0], stored, like[1]):
        raise ValueError(f"in {dtype} its ops make something else of it; nothing is written")
    tensors = kept | {f"answers.{i}": found for i, found in enumerate(stored.answers)}
    return save_tensors(path, tensors, {**meta, "sha256": _digest(tensors, meta)})


def opened(path: str | Path) -> Stored | None:
    """What a file of `write` holds; None for a compact one of explib.save. Errors as of `read`."""
    return None if load_meta(path).get("kind") == "compact" else read(path)


def read(path: str | Path) -> Stored:
    """Read a file of `write`; ValueError, in one line, unless all of it is sound."""
    tensors, meta = load_tensors(path)
    if meta.get("kind") != KIND:
        raise ValueError(f"{path}: holds no network; give a file of engine.save")
    if meta.get("version") != VERSION:
        raise ValueError(f"{path}: version {meta.get('version')!r}; this explib reads {VERSION}")
    if meta.pop("sha256", None) != _digest(tensors, meta):
        raise ValueError(f"{path}: is damaged, its SHA-256 is another; get or save it anew")
    names = [name for name in tensors if name.startswith("answers.")]
    answers = [tensors.pop(name) for name in sorted(names, key=lambda name: (len(name), name))]
    stored = _read(str(path), tensors, meta)
    wanted = answers_of(lambda *args, **kwargs: _like(stored.graph), stored)
    if [a.shape for a in answers] != [a.shape for a in wanted]:
        raise ValueError(f"{path}: has no answers of all its results; save it anew")
    return stored._replace(answers=[answer.float() for answer in answers])


def holds(network: Callable[..., Any], stored: Stored, tolerance: float) -> bool:
    """Whether a network gives the answers that are stored, of two images and of one.

    tolerance: of the largest value.
    """
    return all(
        close(found, wanted[:count], tolerance)
        for count in (2, 1)
        for found, wanted in zip(answers_of(network, stored, count), stored.answers, strict=True)
    )


def run(stored: Stored) -> Callable[..., Any]:
    """The network in torch, op by op, dense: called as with its example, for any batch.

    In float32, of int8 too: with its weights, its values not rounded to codes.
    """
    graph = stored.graph

    def network(*args, **kwargs) -> Any:
        values = dict(zip(graph.inputs, tree_flatten((args, kwargs))[0], strict=True))
        batch = len(values[next(iter(graph.shapes))])
        for op in graph.ops:
            values[op.name] = reference.run(replace(op, scales=()), values, batch)
        found = reference.resolved(graph.results, values, batch)
        return tree_unflatten(found, graph.form)

    return network


def answers_of(network: Callable[..., Any], stored: Stored, count: int = 2) -> list[torch.Tensor]:
    """At most SAMPLED numbers (count, ...) of each result for made-up inputs, the same everywhere.

    They are uniform, from -1.7 to 1.7 or of int8 in the range that an input's codes stand for, and
    computed with whole numbers: no generator of a library, which may change.
    """
    position, ranges = 0, iter(_ranges(stored))

    def noise(leaf: torch.Tensor) -> torch.Tensor:
        nonlocal position
        low, high = next(ranges)
        shape = (2, *leaf.shape[1:])
        at = torch.arange(position, position + math.prod(shape))
        position += len(at)
        mixed = at * 2654435761 % 2**32
        mixed = (mixed ^ (mixed >> 15)) * 2246822519 % 2**32
        share = (mixed ^ (mixed >> 13)).double() / 2**32
        return (low + (high - low) * share).float().view(shape)[:count]

    with torch.no_grad():
        results = tree_flatten(call(network, tree_map_only(torch.Tensor, noise, stored.example)))[0]
    flat = [value.reshape(count, -1) for value in results if isinstance(value, torch.Tensor)]
    return [rows[:, :: -(-rows.shape[1] // SAMPLED)] for rows in flat]


def _ranges(stored: Stored) -> Iterator[tuple[float, float]]:
    """Of each input that is a tensor, between what values the made-up ones lie."""
    for name, leaf in zip(stored.graph.inputs, tree_flatten(stored.example)[0], strict=True):
        if isinstance(leaf, torch.Tensor):
            takers = [op for op in stored.graph.ops if name in op.inputs and op.scales]
            if takers:
                place = takers[0].inputs.index(name)
                scale, zero = takers[0].scales[place], takers[0].zeros[place]
                yield -zero * scale, (255 - zero) * scale
            else:
                yield -1.7, 1.7


def _like(graph: Graph) -> list[torch.Tensor]:
    """Results of the right shapes, without computing them."""
    views = [value for value in graph.results if isinstance(value, View)]
    return [torch.empty(2, *view.sizes, device="meta") for view in views]


def _digest(tensors: dict[str, torch.Tensor], meta: dict) -> str:
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# Ops


def _encoded(op: Op) -> dict:
    own = {f.name: getattr(op, f.name) for f in fields(op) if f.name not in ("call", "why")}
    defaults = {f.name: f.default for f in fields(op)}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in own.items()
        if not isinstance(value, torch.Tensor) and value != defaults[name]
    }


def _tensors(ops: list[Op], dtype: torch.dtype) -> tuple[dict, dict, dict]:
    """The tensors of all ops, the shapes of their masks, and which are others again."""
    tensors, shapes, same, first = {}, {}, {}, {}
    for op in ops:
        for name, tensor in vars(op).items():
            if not isinstance(tensor, torch.Tensor):
                continue
            tensor, key = tensor.detach(), f"{op.name}.{name}"
            memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if (original := first.setdefault(memory, key)) != key:
                same[key] = original
                continue
            wide = tensor.is_floating_point() and tensor.ndim > 1
            kept = tensor.to(dtype) if wide else tensor
            if op.kind == "conv" and name == "weight":
                mask = kept.flatten(2).any(2)
                if not mask.all():
                    tensors[f"{key}.positions"], shapes[op.name] = pack(mask), list(mask.shape)
                    kept = kept[mask]
            tensors[key] = kept.clone()
    return tensors, shapes, same


def _typed(kind: Any, value: Any) -> Any:
    """A JSON value as that of a field; ValueError for another type."""
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind in (int, str) and type(value) is kind:
        return value
    if get_origin(kind) is tuple and isinstance(value, list):
        kinds = get_args(kind)
        kinds = (kinds[0],) * len(value) if kinds[-1] is ... else kinds
        if len(kinds) == len(value):
            return tuple(map(_typed, kinds, value))
    raise ValueError(f"is {value!r:.80}")


def _decoded(number: int, given: Any, tensors: dict[str, torch.Tensor]) -> Op:
    """An op of its JSON value, with its tensors."""
    if not isinstance(given, dict):
        raise ValueError(f"op {number} is a {type(given).__name__}")
    kinds, known = get_type_hints(Op), {f.name: f for f in fields(Op)}
    values = {}
    for name, value in given.items():
        if name not in known or name in ("call", "why"):
            raise ValueError(f"op {number} has a field {name!r:.40}, which this explib lacks")
        try:
            values[name] = _typed(kinds[name], value)
        except ValueError as error:
            raise ValueError(f"op {number}: its {name} {error}") from None
    needed = [name for name, field in known.items() if field.default is MISSING]
    if lost := [name for name in needed if name not in values]:
        raise ValueError(f"op {number} lacks its {lost[0]}")
    for name in known:
        if f"{values['name']}.{name}" in tensors:
            if torch.Tensor not in get_args(kinds[name]):
                raise ValueError(f"op {number}: its {name} is a tensor")
            values[name] = tensors[f"{values['name']}.{name}"]
    return Op(**values)


# How it is called, and what it returns


def _form(nested: Any) -> Any:
    """Tuples, lists and dicts of the numbers of leaves as JSON: {"tuple": [0, {"list": [1]}]}."""
    if type(nested) is int:
        return nested
    if type(nested) in (dict, OrderedDict) and all(type(key) in (str, int) for key in nested):
        return {type(nested).__name__: [[key, _form(value)] for key, value in nested.items()]}
    if type(nested) in (tuple, list):
        return {type(nested).__name__: [_form(value) for value in nested]}
    raise ValueError(
        f"it takes or returns a {type(nested).__name__}; a file holds tuples, lists and dicts"
    )


def _nested(form: Any) -> Any:
    """What `_form` made JSON of."""
    if type(form) is int:
        return form
    if not isinstance(form, dict) or len(form) != 1:
        raise ValueError(f"its form is {form!r:.80}")
    ((kind, values),) = form.items()
    if kind in ("tuple", "list") and isinstance(values, list):
        return (tuple if kind == "tuple" else list)(_nested(value) for value in values)
    pairs = isinstance(values, list) and all(isinstance(v, list) and len(v) == 2 for v in values)
    if kind in ("dict", "OrderedDict") and pairs and all(type(k) in (str, int) for k, _ in values):
        made = (dict if kind == "dict" else OrderedDict)((k, _nested(v)) for k, v in values)
        if len(made) == len(values):
            return made
    raise ValueError(f"its form is {form!r:.80}")


def _input(leaf: Any) -> dict:
    if not isinstance(leaf, torch.Tensor):
        return _constant(leaf, "takes")
    if leaf.dtype != torch.float32 or leaf.ndim < 2:
        raise ValueError(
            f"it takes a tensor of {leaf.dtype} with {leaf.ndim} dimensions; a file holds networks "
            "of float32 batches only"
        )
    return {"shape": list(leaf.shape[1:])}


def _result(value: Any) -> dict:
    if isinstance(value, View):
        return {"value": value.base, "dims": [list(map(list, dim)) for dim in value.dims]}
    return _constant(value, "returns")


def _constant(value: Any, does: str) -> dict:
    if value is None or type(value) in (bool, int, float, str):
        return {"constant": value}
    what = "a value that is no batch of floats" if isinstance(value, Other) else ""
    raise ValueError(
        f"it {does} {what or f'a {type(value).__name__}'}; a file holds float32 batches, numbers, "
        "texts and None"
    )


def _leaf(given: Any) -> Any:
    """One example input of its JSON value, of a batch of one."""
    if isinstance(given, dict) and [*given] == ["shape"]:
        shape = _typed(tuple[int, ...], given["shape"])
        if min(shape, default=0) < 1 or math.prod(shape) > checking.LARGEST_VALUE:
            raise ValueError(f"an input has shape {shape}")
        return torch.zeros(1, *shape)
    return _known(given)


def _known(given: Any) -> Any:
    value = given.get("constant", ...) if isinstance(given, dict) and len(given) == 1 else ...
    if value is not None and type(value) not in (bool, int, float, str):
        raise ValueError(f"it takes or returns {given!r:.80}")
    return value


def _returned(given: Any, shapes: dict[str, tuple[int, ...]]) -> Any:
    if not isinstance(given, dict) or {*given} != {"value", "dims"}:
        return _known(given)
    base, dims = given["value"], _typed(tuple[tuple[tuple[int, int], ...], ...], given["dims"])
    if not isinstance(base, str) or base not in shapes:
        raise ValueError(f"it returns {base!r:.80}, which nothing makes")
    return View(base, shapes[base], dims)


def _unflattened(form: Any, leaves: list) -> tuple[Any, Any]:
    """Leaves put together, and how; ValueError unless the form has just as many, in order."""
    numbers, spec = tree_flatten(_nested(form))
    if numbers != [*range(len(leaves))]:
        raise ValueError(f"it takes or returns {len(leaves)} values, but as {numbers[:20]}")
    return tree_unflatten(leaves, spec), spec


def _read(source: str, tensors: dict[str, torch.Tensor], meta: dict) -> Stored:
    """What `write` put into tensors and meta. ValueError unless it is sound."""
    whole, _ = dense(source, tensors, meta)
    try:
        inputs, about = meta.get("inputs"), meta.get("about")
        listed: list[Any] = [meta.get(name) for name in ("ops", "example", "results")]
        if not all(isinstance(value, list) for value in listed) or not isinstance(about, dict):
            raise ValueError("it lacks its ops, example, results or what it is about")
        names = _typed(tuple[str, ...], inputs)
        leaves = [_leaf(given) for given in listed[1]]
        if len(names) != len(leaves):
            raise ValueError(f"it has {len(names)} inputs, but an example of {len(leaves)}")
        example, _ = _unflattened(meta.get("takes"), leaves)
        ops = [_decoded(number, given, whole) for number, given in enumerate(listed[0])]
        lost = {*whole} - {f"{op.name}.{f.name}" for op in ops for f in fields(op)}
        if lost:
            raise ValueError(f"no op has its tensor {min(lost)!r:.80}")
        batches = zip(names, leaves, strict=True)
        shapes = {n: tuple(v.shape[1:]) for n, v in batches if isinstance(v, torch.Tensor)}
        values = shapes | {op.name: op.shape for op in ops}
        results = [_returned(given, values) for given in listed[2]]
        graph = Graph(ops, list(names), shapes, results, _unflattened(meta["returns"], results)[1])
        checking.check(graph)
    except (ValueError, RecursionError, KeyError) as error:
        raise ValueError(f"{source}: {line(error)}") from None
    return Stored(graph, example, about, [])

"""Choose how a network that is not trained is computed here: by the engine or by torch."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from explib import engine
from explib.data import Data, eval_batches, example_of
from explib.data.splits import Folders, Split
from explib.engine import build
from explib.engine.fused import fuse
from explib.params import Params
from explib.training import backend, timing
from explib.training.backend import Backend
from explib.training.timing import Speeds

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

PLANNED = 1000
"""Images that could be computed while the engine plans a network, about (a second)."""

ENGINE_FROM = 2000
"""Images from which evaluating in the engine repays the second it takes to plan a network."""


def teacher_of(
    model: nn.Module,
    params: Params,
    device: str,
    images: int,
    exact: bool = True,
    kept: str = "",
) -> Backend:
    """The unpruned network for distillation: images in, fp32 logits out, in evaluation mode.

    On a CPU by the engine or by torch, whichever is faster; by the engine where `images`, how many
    it will see, are too few to measure that. exact: in the precision of `params`, else in any.
    kept: its `name` in an interrupted run, to go on so.
    """
    if device != "cpu" or params.compile not in ("auto", "sparse"):
        return backend.choose(model, params, device)
    if exact:
        ways = [f"{how}, {params.precision}" for how in ("engine", "fused passes")]
    else:
        short = ["bf16", "fp16"] if params.precision == "bf16" else ["fp16", "bf16"]
        last = short.pop() if params.precision == "fp32" else None
        ways = [f"engine, {precision}" for precision in (*short, "fp32", *filter(None, [last]))]
        free = params.replace(precision="auto")
        ways += [f"fused passes, {precision}" for precision in backend.precisions(free, device)]
    count = 16 * torch.get_num_threads()
    cost = len(ways) * ((1 + timing.ROUNDS) * count + PLANNED)
    worth = images >= backend.SHARE * cost
    return _fastest("soft labels", model, example_of(params), ways, count, worth, kept)


def in_fp32(model: nn.Module, split: Split | Folders, data: Data) -> Callable:
    """The model in fp32 and evaluation mode, by the engine where that is possible and faster."""
    parameter = next(model.parameters(), None)
    if parameter is None or not parameter.is_cpu or len(split) < ENGINE_FROM:
        return model
    image, _ = next(eval_batches(split.first(1), data))
    count, ways = 16 * torch.get_num_threads(), ("engine, fp32", "eager, fp32")
    return _fastest("evaluation", model, image, ways, count, worth=True).network


def _fastest(
    what: str,
    model: nn.Module,
    image: torch.Tensor,
    ways: Sequence[str],
    count: int,
    worth: bool,
    kept: str = "",
) -> Backend:
    """The model computed in one of these ways: the fastest where that is `worth` measuring on
    `count` images, else the first that is possible, as the last has to be.
    """
    made = functools.cache(functools.partial(_made, model, image))
    if kept in ways and (way := made(kept)):
        return way

    def measure() -> Speeds:
        possible = {name: way for name in ways if (way := made(name))}
        images = backend.noise(image, count)
        with torch.no_grad(), backend.untouched(model.eval()):
            calls = {name: functools.partial(way, images) for name, way in possible.items()}
            return timing.speeds(calls, count)

    measured: Speeds = {}
    if worth:
        library = _library()
        measured = timing.remembered(
            backend.question_of(what, model, count, ways, library) | {"shape": list(image.shape)},
            measure,
        )
    order = dict.fromkeys([*timing.ranking(measured), *ways])
    way = next(filter(None, map(made, order)))
    return Backend(way.network, way.how, way.precision, measured=measured)


def _made(model: nn.Module, image: torch.Tensor, name: str) -> Backend | None:
    """The model computed so; None where that is not possible."""
    how, precision = name.split(", ")
    if how == "engine":
        compiled = _engine(model, image, TYPES[precision])
        return Backend(compiled, how, precision) if compiled else None
    network = model if how == "eager" else fuse(model, image)
    return Backend(network, "eager" if network is model else how, precision)


def _library():
    """The engine's C++; None where it cannot be compiled."""
    try:
        return build.library()
    except engine.NoCompiler:
        return None


def _engine(model: nn.Module, image: torch.Tensor, dtype: torch.dtype) -> Callable | None:
    """The model in the engine, all of it and in this type; None where that is not possible."""
    library = _library()
    if library and build.computes(library, dtype):
        try:
            return engine.compile(model, image, dtype=dtype, fallback=False)
        except NotImplementedError:
            pass
    return None

"""Networks to hand over: files that need no code of theirs, and ONNX."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from explib import registry
from explib.engine import export, graph, plan, stored, to_onnx
from explib.engine.compiling import Compiled, check_type, coded, compile, listed, ready
from explib.engine.images import MODES, reading
from explib.engine.views import View
from explib.pruning.checkpoints import load_network
from explib.pruning.layers import Inputs, call


def save(
    path: str | Path,
    model: nn.Module,
    example_inputs: Inputs,
    *,
    dtype: torch.dtype = torch.float16,
    calibration: Inputs | Sequence[Inputs] | None = None,
    classes: Sequence[str] = (),
    mean: float | Sequence[float] = (0.0,),
    std: float | Sequence[float] = (1.0,),
    resize: int = 0,
) -> Path:
    """Write a network with its graph, so that `load` needs no code of it; returns the path.

    Of any architecture whose ops all are the engine's, in evaluation mode, as its surviving kernels
    (those not all zeros); see `engine.stored` for the format. example_inputs: as of `compile`.
    dtype: of weights of more than one dimension, torch.float16 or torch.float32. calibration: as of
    `compile`; with it the file is of int8, which `load` then computes in.
    For `explib run`: classes, their names in the order of the scores; mean and std of inputs in 0
    to 1, of each channel or one for all; resize, the shorter side to which an image is brought
    before the network's size is cut out of its middle, 0: as little as covers that.
    The model is not changed. NotImplementedError, naming the ops, for those that only torch runs;
    ValueError for what a file cannot hold, or holds with other answers than the network's.
    """
    if dtype not in (torch.float16, torch.float32):
        raise ValueError(f"dtype: {dtype}; give torch.float16 or torch.float32")
    mean, std = ([n] if isinstance(n, int | float) else [*n] for n in (mean, std))
    images = {"mean": mean, "std": std, "resize": resize}
    about = {"classes": [*classes], "images": images}
    shape = tuple(getattr(example_inputs, "shape", ()))[1:]
    if len(shape) == 3 and shape[0] in MODES:
        reading(about, shape)
    with torch.autocast("cpu", enabled=False):
        found, plain = export.trace(model, example_inputs)
        scores = [value.sizes for value in found.results if isinstance(value, View)]
        if classes and [(len(classes),)] != scores:
            made = " and ".join(map(str, scores)) or "no tensor"
            raise ValueError(f"classes: {len(classes)} names; the network returns {made} an image")
        if batches := listed(calibration):
            results = graph.names(found.results)
            ops = graph.fuse(found.ops, results, found.shapes, plan.native)
            found = replace(found, ops=coded(found, ops, batches))
        exact = dtype == torch.float32 and not batches
        tolerance = 0.01 if exact else 0.5  # as of what is compiled
        return stored.write(path, found, example_inputs, about, dtype, (plain, tolerance))


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    calibration: Inputs | Sequence[Inputs] | None = None,
    recheck: float = 0.0,
    threads: int | None = None,
    fallback: bool = True,
) -> Compiled:
    """A file of `engine.save`, or a compact one of `explib.save`, ready for inference.

    dtype: int8 by default where the file was saved so, else float32. Other options as of
    `compile`; `about` of what is returned is what the file says of itself. Nothing in
    a file is executed. A file of `engine.save` holds answers of its network: what was made has to
    give them, within the tolerance of `compile`, else it runs dense in torch with a warning.
    ValueError or FileNotFoundError, in one line, for a file that is missing or damaged, a compact
    one that is not of one of the study's networks, and where torch does not give the answers.
    """
    file = stored.opened(path)
    if file is None:
        model, image, about = _compact(path)
        made = compile(
            model, image, dtype=dtype or torch.float32, calibration=calibration, recheck=recheck,
            threads=threads, fallback=fallback,
        )  # fmt: skip
    else:
        in_codes = any(op.scales for op in file.graph.ops)
        dtype = dtype or (torch.int8 if in_codes else torch.float32)
        check_type(dtype)
        if dtype == torch.int8 and not in_codes and calibration is None:
            raise ValueError(
                f"dtype: {path} holds no codes of 8 bits; give calibration, or write it anew by "
                "engine.save(..., calibration=...)"
            )

        def dense() -> Callable[[Inputs], Any]:
            network = stored.run(file)
            if not stored.holds(network, file, 0.01):
                raise ValueError(f"{path}: torch does not give the answers that it holds")
            return lambda inputs: call(network, inputs)

        made = ready(
            lambda: (file.graph, lambda made, tolerance: stored.holds(made, file, tolerance)),
            dense,
            *(file.example, dtype, listed(calibration), recheck, threads, fallback),
        )
        about = file.about
    made.about = about
    return made


def save_onnx(
    path: str | Path,
    network: nn.Module | str | Path,
    example_inputs: Inputs | None = None,
    *,
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
) -> Path:
    """Write a network as ONNX for other runtimes, dense, its pruned kernels as zeros.

    network: a module, with its example_inputs as of `compile`; or a file as of `load`. inputs,
    outputs: names in place of those of the module's arguments, and of `output`, `output.1` ...
    It takes any batch. Where a network does not fit: NotImplementedError and ValueError as of
    `save`. ModuleNotFoundError, in one line, where onnx is not installed.
    """
    if isinstance(network, nn.Module):
        if example_inputs is None:
            raise ValueError("example_inputs: give those of the network")
        found = export.trace(network, example_inputs)[0]
    elif (file := stored.opened(network)) is not None:
        found = file.graph
    else:
        found = export.trace(*_compact(network)[:2])[0]
    ops = graph.fuse(found.ops, graph.names(found.results), found.shapes, plan.native)
    return to_onnx.write(path, replace(found, ops=ops), inputs, outputs)


def _compact(path: str | Path) -> tuple[nn.Module, torch.Tensor, dict]:
    """A network of the study, an image of zeros for it, and what its file says."""
    model, _, about = load_network(path)
    side = about.get("image_size", registry.network(about["arch"]).image_size)
    return model, torch.zeros(1, 3, side, side), about

"""Files of masks and of pruned networks, and state dicts as found in the wild."""

import contextlib
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from explib import models, registry
from explib.files import load_meta, load_tensors, save_tensors, sha256
from explib.pruning import masks as masking
from explib.pruning.masks import Masks


def save_masks(path: str | Path, masks: Masks, meta: dict | None = None) -> Path:
    """Write masks, one bit a kernel."""
    masks = {name: masking.as_tensor(mask) for name, mask in masks.items()}
    tensors = {name: pack(mask) for name, mask in masks.items()}
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    return save_tensors(path, tensors, {"kind": "masks", "shapes": shapes, **(meta or {})})


def load_masks(path: str | Path) -> tuple[Masks, dict]:
    """Masks of `save_masks`, and their meta data. ValueError for any other file."""
    tensors, meta = load_tensors(path)
    if meta.get("kind") != "masks":
        raise ValueError(f"{path}: holds no masks; give a file of save_masks")
    shapes = _shapes(path, meta, tensors)
    return {name: _bits(tensors[name], shape) for name, shape in shapes.items()}, meta


def _shapes(path, meta: dict, tensors: dict, suffix: str = "") -> dict[str, list[int]]:
    """The shapes (F, C) that a file states for its masks; ValueError unless it holds their bits."""
    shapes = meta.get("shapes")
    if not isinstance(shapes, dict):
        raise ValueError(f"{path}: lacks the shapes of its masks; save it anew")
    for name, shape in shapes.items():
        sizes = shape if isinstance(shape, list) else []
        if len(sizes) != 2 or any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError(f"{path}: {name} has a mask of shape {shape!r}; give [F, C]")
        bits = tensors.get(name + suffix)
        wanted = (math.ceil(math.prod(sizes) / 8),)
        if bits is None or bits.dtype != torch.uint8 or tuple(bits.shape) != wanted:
            raise ValueError(f"{path}: lacks the {math.prod(sizes)} bits of {name}; save it anew")
    return shapes


def pack(mask: torch.Tensor) -> torch.Tensor:
    """A mask as its bits, eight in a byte."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().ravel()))


def _bits(bits: torch.Tensor, shape: list[int]) -> torch.Tensor:
    flat = np.unpackbits(bits.numpy(), count=int(np.prod(shape)))
    return torch.from_numpy(flat.astype(bool)).reshape(shape)


def save(
    path: str | Path,
    model: nn.Module,
    masks: Masks,
    meta: dict | None = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write a network as its surviving kernels and their positions only.

    meta: JSON values that the file says of itself; `load_network` needs `arch`, a registered one,
    and `num_classes`. Parameters of more than one dimension are stored as
    `dtype`, everything else (BatchNorm, biases, buffers) as it is, and what the network has under
    two names once. ValueError, naming the layer, for masks that do not fit or whose pruned kernels
    are not zero, for a state that is no tensor, and for another dtype than one of floats.
    """
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"dtype: {dtype!r}; give torch.float16, torch.bfloat16 or torch.float32")
    masks = masking.check(model, masks)
    for name, count in masking.leaks(model, masks).items():
        raise ValueError(
            f"masks: {name} has {count} pruned kernels that are not zero and would be lost; hold "
            "or apply the masks before saving"
        )
    state, tensors, shapes, first, same = model.state_dict(keep_vars=True), {}, {}, {}, {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    everywhere = masking.spread(model, masks)
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name}: is a {type(tensor).__name__}; a file holds tensors only")
        original = first.setdefault(id(tensor), name)
        if original != name:
            same[name] = original
            continue
        layer, mask = name.removesuffix(".weight"), None
        if name.endswith(".weight"):
            mask = everywhere.get(layer)
        if mask is not None:
            tensors[f"{name}.positions"], shapes[layer] = pack(mask), list(mask.shape)
            tensor = tensor[mask.to(tensor.device)]
        wide = name in parameters and tensor.is_floating_point() and tensor.ndim > 1
        tensors[name] = tensor.detach().to(dtype if wide else tensor.dtype).clone()
    more = {"same": same} if same else {}
    return save_tensors(
        path, tensors, {**(meta or {}), "kind": "compact", "shapes": shapes, **more}
    )


def origin(path: str | Path) -> str:
    """The SHA-256 by which a network is known: of the file, or of the one that it is a copy of.

    A copy in 16 bits may say so in its meta, under `copy_of`: runs that start from either start
    from the same network.
    """
    meta: dict = {}
    if Path(path).suffix == ".safetensors":
        with contextlib.suppress(ValueError):  # of a file that is not of ours
            meta = load_meta(path)
    return str(meta.get("copy_of") or sha256(path))


def load(path: str | Path) -> tuple[dict[str, torch.Tensor], Masks, dict]:
    """Read a file of `save`: (dense state dict, 16 bits as fp32; masks; meta)."""
    tensors, meta = load_tensors(path)
    if meta.get("kind") != "compact":
        other = "it is of engine.save: engine.load reads it" if meta.get("kind") == "graph" else ""
        raise ValueError(f"{path}: no compact network; {other or 'give a file of explib.save'}")
    return *dense(path, tensors, meta), meta


def dense(
    path: str | Path, tensors: dict[str, torch.Tensor], meta: dict
) -> tuple[dict[str, torch.Tensor], Masks]:
    """What a compact file stores as (dense tensors, 16 bits as fp32; masks); ValueError if damaged.

    Of a layer it holds the surviving kernels (n, KH, KW) as `weight`, and the bits of the mask (F,
    C) as `weight.positions`; `meta` has the mask's shape under `shapes`, and under `same` which
    tensors are others by another name.
    """
    shapes = _shapes(path, meta, tensors, ".weight.positions")
    for name in shapes:
        if f"{name}.weight" not in tensors or tensors[f"{name}.weight"].ndim == 0:
            raise ValueError(f"{path}: lacks the kernels of {name}; save it anew")
    kernels = {name: tensors[f"{name}.weight"] for name in shapes}
    sizes = {n: math.prod(shape) * math.prod(kernels[n].shape[1:]) for n, shape in shapes.items()}
    if sum(sizes.values()) > LARGEST:
        raise ValueError(f"{path}: {max(sizes, key=sizes.__getitem__)} would be too large to load")
    state, masks = dict(tensors), {}
    for name, shape in shapes.items():
        mask, found = _bits(state.pop(f"{name}.weight.positions"), shape), kernels[name]
        if int(mask.sum()) != len(found):
            raise ValueError(
                f"{path}: {name} has {len(found)} kernels for {int(mask.sum())} places"
            )
        weight = found.new_zeros(*shape, *found.shape[1:])
        weight[mask] = found
        state[f"{name}.weight"], masks[name] = weight, mask
    short = (torch.float16, torch.bfloat16)
    state = {name: t.float() if t.dtype in short else t for name, t in state.items()}
    same = meta.get("same", {})
    for name, original in same.items() if isinstance(same, dict) else ():
        if not isinstance(original, str) or original not in state:
            raise ValueError(f"{path}: {name} is to be {original}, which it lacks; save it anew")
        state[name] = state[original]
    return state, masks


LARGEST = 2**30
"""Weights, of all pruned layers together, zeros included: what a file of few bytes may ask for."""


def load_state(path: str | Path) -> tuple[dict, dict]:
    """Read the state dict of any checkpoint, and what it says of itself: (state, meta).

    A file of `save`, another safetensors file, or one of torch.save, nested or not.
    FileNotFoundError, or ValueError in one line, for what is none.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        state, meta = load_tensors(path)
        if meta.get("kind") == "compact":
            state, _, meta = load(path)
        elif meta.get("kind") == "masks":
            raise ValueError(f"{path}: holds masks; give the file of a network")
        return state, meta
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{path} is no readable checkpoint ({why})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state, {}


# where checkpoints have their weights, the first that is there; and what wrappers put before names
_NESTS: tuple[str, ...] = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "module",
    "network",
    "model_state",
)
_NESTS += ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "ema_model.")
_COUNTERS = {"n_averaged"}  # of torch.optim.swa_utils


def _plain_name(name: str, own: dict) -> str:
    """A name without the prefixes of wrappers, as far as the network has it without them."""
    short = name
    while short not in own:
        prefix = next((p for p in _PREFIXES if short.startswith(p)), None)
        if prefix is None:
            return short
        short = short.removeprefix(prefix)
    return short


def load_weights(model: nn.Module, state: dict, source: str) -> nn.Module:
    """Load a state dict as found in the wild: nested, with wrappers' prefixes, `fc` or `linear`.

    Raises ValueError, listing what does not match, before anything is changed; so too for
    weights that are not finite.
    """
    while key := next((key for key in _NESTS if isinstance(state.get(key), dict)), None):
        state = state[key]
    own = model.state_dict()
    found = {}
    for name, value in state.items():
        if name in _COUNTERS and name not in own:
            continue
        name = _plain_name(str(name), own)
        for old, new in (("fc.", "linear."), ("linear.", "fc.")):
            if name not in own and name.startswith(old) and new + name.removeprefix(old) in own:
                name = new + name.removeprefix(old)
        found[name] = value
    optional = {name for name in own if name.endswith("num_batches_tracked")}
    problems = [f"lacks {name}" for name in own if name not in found and name not in optional]
    problems += [f"has unknown {name}" for name in found if name not in own]
    for name, value in found.items():
        if name not in own:
            continue
        if not isinstance(value, torch.Tensor):
            problems.append(f"{name} is a {type(value).__name__}, not a tensor")
        elif value.shape != own[name].shape:
            problems.append(f"{name} is {tuple(value.shape)}, not {tuple(own[name].shape)}")
        elif value.is_floating_point() and not torch.isfinite(value).all():
            problems.append(f"{name} has NaN or infinite values")
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(f"{source}: does not fit the network: {'; '.join(problems[:6])}{more}")
    model.load_state_dict({**{name: own[name] for name in optional}, **found})
    return model


def load_network(path: str | Path) -> tuple[nn.Module, Masks, dict]:
    """A network of a compact file, ready to evaluate: (model, its masks, what the file says of it).

    ValueError, in one line, for a file that is no such network, and for one of a network that is
    not registered: what a file names is not imported.
    """
    state, masks, meta = load(path)
    registry.stored("arch", meta.get("arch"), str(path))
    classes = meta.get("num_classes")
    if type(classes) is not int or not 1 <= classes <= 1_000_000:
        raise ValueError(
            f"{path}: num_classes is {classes!r}; give how many classes it tells apart"
        )
    model = models.build(meta["arch"], meta.get("num_classes"))
    masking.check(model, masks, str(path))
    return load_weights(model, state, str(path)).eval(), masks, meta

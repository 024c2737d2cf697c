"""Filter pruning, the structured alternative, by torch-pruning: what kernel pruning has to beat.

A filter that goes takes its row of kernels in its own conv and its column in every conv that reads
it. As masks that is exactly the smaller dense network, so that fine-tuning, counting and records
need nothing else.
"""

import copy

import torch
from torch import nn

from explib.errors import extra
from explib.pruning import counting
from explib.pruning.layers import Conv, Inputs, modes_kept, on_device_of
from explib.pruning.masks import Masks
from explib.rates import number_to_prune


def group_l1(
    model: nn.Module, example_inputs: Inputs, convs: list[Conv], rates: dict[str, float]
) -> Masks:
    """Masks of `filter_masks` that leave as many MACs as pruning kernels at these rates would."""
    going = sum(
        number_to_prune(rates.get(conv.name, 0.0), conv.kernels) * conv.kernel_macs
        for conv in convs
    )
    left = counting.macs(model, example_inputs)["dense"] - going
    return filter_masks(model, example_inputs, left, convs)


def filter_masks(
    model: nn.Module, example_inputs: Inputs, macs_left: int, convs: list[Conv]
) -> Masks:
    """Masks that remove the filters of least group-L1 norm, the same share in every conv.

    The share is the smallest that leaves at most `macs_left` multiply-adds of an image; then convs
    in turn get one filter back while that holds, since a share of 16 filters is a coarse measure.
    Scores and groups are torch-pruning's (GroupMagnitudeImportance, p = 1). Filters whose maps a
    shortcut adds to others stay, as is usual. Raises ValueError if that many cannot be saved, and
    ModuleNotFoundError without torch-pruning.
    """
    groups = _groups(model, example_inputs)
    dense = counting.macs(model, example_inputs)["dense"]
    if not groups:
        raise ValueError("filters: no conv of this network can lose filters by itself")

    def masked(going: dict[str, int]) -> Masks:
        masks = {
            conv.name: torch.ones(conv.filters, conv.channels, dtype=torch.bool)
            for conv in convs
            if conv.groups == 1
        }
        for name, (scores, readers) in groups.items():
            lost = scores.argsort(stable=True)[: going[name]]
            masks[name][lost] = False
            for reader in readers:
                masks[reader][:, lost] = False
        return masks

    def shared(share: float) -> dict[str, int]:
        return {
            name: min(int(share * len(scores)), len(scores) - 1)
            for name, (scores, _) in groups.items()
        }

    def left(going: dict[str, int]) -> int:
        return dense - counting.macs_pruned(convs, masked(going))

    low, high = 0.0, 1.0
    if left(shared(high)) > macs_left:
        raise ValueError(
            f"filters: {macs_left} MACs are to be left, but the inner filters alone leave at least "
            f"{left(shared(high))}; use lower rates"
        )
    for _ in range(12):  # to a filter in 4,096
        middle = (low + high) / 2
        low, high = (low, middle) if left(shared(middle)) <= macs_left else (middle, high)
    going = shared(high)
    for name in groups:
        fewer = going | {name: max(going[name] - 1, 0)}
        going = fewer if left(fewer) <= macs_left else going
    return masked(going)


def whole_filters(masks: Masks) -> bool:
    """Whether masks remove whole filters, and what reads them, and nothing else."""
    lines = [mask.any(1, keepdim=True) & mask.any(0, keepdim=True) for mask in masks.values()]
    return bool(masks) and all(map(torch.equal, lines, masks.values()))


def narrowed(model: nn.Module, masks: Masks, example_inputs: Inputs) -> nn.Module:
    """The smaller dense network that masks of `filter_masks` stand for, in evaluation mode.

    Its outputs are those of the masked network. A copy: the model stays as it is. Filters that a
    linear layer reads stay in their places, empty.
    """
    with extra():
        import torch_pruning as tp

    small = copy.deepcopy(model).eval()
    given = on_device_of(small, example_inputs)
    graph = tp.DependencyGraph().build_dependency(small, example_inputs=given)
    for name, mask in masks.items():
        gone = (~mask.any(1)).nonzero().flatten().tolist()
        if gone:
            conv = small.get_submodule(name)
            group = graph.get_pruning_group(conv, tp.prune_conv_out_channels, idxs=gone)
            # a linear layer still reads what BatchNorm makes of an empty filter: a constant
            if not any(isinstance(dep.target.module, nn.Linear) for dep, _ in group):
                group.prune()
    return small


def _groups(model: nn.Module, example_inputs: Inputs) -> dict[str, tuple[torch.Tensor, list[str]]]:
    """Convs whose filters can go alone: name -> (group-L1 scores (F,), convs that read them)."""
    with extra():
        import torch_pruning as tp

    given = on_device_of(model, example_inputs)
    with modes_kept(model):
        graph = tp.DependencyGraph().build_dependency(model.eval(), example_inputs=given)
    score = tp.importance.GroupMagnitudeImportance(p=1)
    names = {id(module): name for name, module in model.named_modules()}
    groups = {}
    for name, conv in model.named_modules():
        if not isinstance(conv, nn.Conv2d) or conv.groups != 1:
            continue
        every = list(range(conv.out_channels))
        group = graph.get_pruning_group(conv, tp.prune_conv_out_channels, idxs=every)
        parts = [(dep.target.module, dep.handler, list(idxs)) for dep, idxs in group]
        losing = [m for m, handler, _ in parts if handler == tp.prune_conv_out_channels]
        reading = [
            (m, idxs)
            for m, handler, idxs in parts
            if handler == tp.prune_conv_in_channels and isinstance(m, nn.Conv2d)
        ]
        # maps that are added to, or laid beside, others do not keep their places
        if len(losing) == 1 and all(idxs == every for _, idxs in reading):
            groups[name] = score(group).detach().cpu(), [names[id(m)] for m, _ in reading]
    return groups

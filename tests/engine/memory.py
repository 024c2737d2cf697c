"""Networks with strided 1x1 convs trained through us, run as a program under a memory checker.

python -m tests.engine.memory [unguarded]: with the word, what `explib.engine.strided` does is left
out, so that a test can tell a checker that finds nothing from one that does not look.
"""

import contextlib
import sys

import torch
import torchvision
from torch import nn

import explib
from explib.engine import strided
from explib.params import Params
from explib.training import backend, loop
from tests.conftest import make_data

SIDE = 32  # of images; the strided conv then takes maps of 8 x 8


def bottlenecks() -> nn.Module:
    """ResNet-50's first two stages, a block each, narrowed by torch-pruning to 5 to 6 channels."""
    import torch_pruning as tp

    torch.manual_seed(0)
    model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], 10)
    model.layer3, model.layer4 = nn.Identity(), nn.Identity()
    model.fc = nn.Linear(512, 10)
    example = torch.zeros(1, 3, SIDE, SIDE)
    graph = tp.DependencyGraph().build_dependency(model.eval(), example_inputs=example)
    for conv in [m for m in model.modules() if isinstance(m, nn.Conv2d)]:
        gone = list(range(5 + conv.out_channels % 7 % 2, conv.out_channels))
        if gone:
            graph.get_pruning_group(conv, tp.prune_conv_out_channels, idxs=gone).prune()
    return model.train()


def train(model: nn.Module, compile: str, precision: str) -> None:
    """An epoch of the loop, as a user would call it."""
    data = make_data(train=100, test=8, size=SIDE)
    # the batch fills no block of the engine, which leaves it to torch
    params = Params(compile=compile, precision=precision, batch_size=20, epochs=1, distill=0.0)
    masks = (
        explib.prune(model, torch.zeros(1, 3, SIDE, SIDE), 0.5, "B") if compile == "sparse" else {}
    )
    explib.apply(model, masks)  # convs that are not 3x3 or 1x1 stay with torch, zeros included
    forward = backend.choose(model, params, "cpu", 0, masks)
    ((entry, _),) = loop.train(model, data, params, masks, forward=forward)
    print(f"\n{forward.how}, {precision}: loss {entry['train_loss']:.3f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["unguarded"]:
        strided.Guard = contextlib.nullcontext  # in Strided, the loop and its backends alike
    model = bottlenecks()
    print([conv.in_channels for conv in filter(strided.affected, model.modules())], "channels")
    for precision in ("fp32", "bf16"):
        for compile in ("off", "auto", "sparse"):
            train(model, compile, precision)

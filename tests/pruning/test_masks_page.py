"""docs/masks.md says what is tried and what is said, in these very words."""

import re
import warnings

import pytest
import torch
import torchvision
from torch import nn

from explib.pruning import counting, holding
from explib.pruning import masks as masking
from explib.pruning.checkpoints import save
from explib.pruning.criteria import prune
from explib.pruning.layers import find_convs
from tests.conftest import ROOT, image, make_net
from tests.pruning import test_holding as tried

PAGE = (ROOT / "docs/masks.md").read_text()


def table(heading: str) -> list[list[str]]:
    """The rows of the table below a heading."""
    part = PAGE.split(f"## {heading}")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def names(row: str) -> list[str]:
    return dict(table("What was tried"))[row].split(", ")


def test_what_was_tried_is_what_is_tested():
    own = names("optimizers of torch") + names("optimizers of one's own")
    assert own == list(tried.OPTIMIZERS)
    assert names("loops") == [loop.__name__ for loop in tried.LOOPS]
    assert names("what becomes of the model") == [change.__name__ for change in tried.CHANGES]
    assert names("order") == tried.ORDERS


ONE = {"0": torch.eye(6, 3, dtype=torch.bool)}


def one(kind=nn.Conv2d, **arguments):
    return nn.Sequential(kind(3, 6, 3, padding=1, **arguments))


def grouped():
    return nn.Sequential(nn.Conv2d(3, 3, 3, groups=3))


def later():
    model = one()
    holding.hold(model, ONE)
    nn.utils.parametrizations.weight_norm(model[0])
    model(image(8))


def again():
    model = make_net()
    masks = prune(model, image(8), 0.5, "random")
    holding.hold(model, masks)
    holding.hold(model, {"6": ~masks["6"]})


def known():
    model = make_net()
    masks = prune(model, image(8), 0.5, "random")
    masks["3"][:] = True
    masks["3"].view(-1)[:12] = False
    masking.apply(model, {"0": masks["0"], "3": masks["3"]})
    nn.init.ones_(model[6].weight)
    prune(model, image(8), 0.5, "l1")


def without_scale():
    model = make_net()
    model[1] = nn.BatchNorm2d(8, affine=False)
    prune(model, image(8), 0.5, "A")


def deformed():
    model = one()
    model[0].forward = lambda x: torchvision.ops.deform_conv2d(
        x, torch.zeros(1, 18, 8, 8), torch.ones(2, 3, 3, 3), padding=1
    )
    counting.macs(model, image(8), {})


def spare():
    model = nn.Module()
    model.used, model.spare = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3)
    model.forward = model.used.forward
    counting.macs(model, image(8), {"spare": ONE["0"]})


def with_state():
    model = make_net()
    extra = type("Extra", (nn.Module,), {"get_extra_state": lambda self: {}})
    model.append(extra())
    return model


def of_another_model():
    holding.hold(one(), ONE, torch.optim.SGD(one().parameters(), 0.1))


def two_masks():
    holding.hold(tried.Residual(), {"a": torch.eye(6).bool(), "b": torch.ones(6, 6).bool()})


WIDER, WRAPPED = {"0": torch.ones(16, 3).bool()}, {"module.0": torch.ones(8, 3).bool()}
SITUATIONS = {
    "weight_norm, spectral_norm": [
        lambda _: holding.hold(nn.Sequential(nn.utils.spectral_norm(one()[0])), ONE)
    ],
    "one is added": [lambda _: later()],
    "a conv that standardizes": [lambda _: holding.hold(one(tried.Standardizing), ONE)],
    "a conv that needs more": [lambda _: holding.hold(one(tried.Modulated), ONE)],
    "masks of a wrapper": [
        lambda _: holding.hold(make_net(), WRAPPED),
        lambda _: counting.macs(make_net(), image(8), WRAPPED),
        lambda path: save(path, make_net(), WRAPPED, {}),
    ],
    "masks of another width": [
        lambda _: holding.hold(make_net(), WIDER),
        lambda _: counting.macs(make_net(), image(8), WIDER),
        lambda path: save(path, make_net(), WIDER, {}),
    ],
    "two masks for one": [lambda _: two_masks()],
    "an optimizer of another": [lambda _: of_another_model()],
    "other masks than": [lambda _: again()],
    "a network that is pruned": [lambda _: known()],
    "grouped convs only": [lambda _: prune(grouped(), image(8))],
    "no Conv2d": [
        lambda _: prune(torch.jit.script(one()), image(8)),
        lambda _: find_convs(torch.jit.script(one()), image(8)),
    ],
    "inputs that the": [
        lambda _: prune(make_net(), image(8, 2)),
        lambda _: find_convs(make_net(), image(8, 2)),
        lambda _: counting.macs(make_net(), image(8, 2)),
    ],
    "a BatchNorm without": [lambda _: without_scale()],
    "products that": [lambda _: deformed()],
    "a mask of a conv": [lambda _: spare()],
    "pruned kernels that": [lambda path: save(path, make_net(), {"0": torch.eye(8, 3).bool()}, {})],
    "a state that": [lambda path: save(path, with_state(), {}, {})],
}
REFUSED = table("What is refused, and in which words")[1:]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row[0][:25])
def test_what_is_said(row, tmp_path):
    (calls,) = [calls for start, calls in SITUATIONS.items() if row[0].startswith(start)]
    assert len(calls) == len(row[1].split(", ")) or len(calls) == 1
    warned, words = re.fullmatch(r"(warning )?`(.*)`", row[2]).groups()
    pattern = re.escape(words).replace("…", ".*")
    for call in calls:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                call(tmp_path / "file.safetensors")
                said = [str(w.message) for w in caught]
            except (ValueError, RuntimeError) as error:
                said = [] if warned else [str(error)]
        assert any(re.fullmatch(pattern, text) for text in said), said


def test_every_situation_is_on_the_page():
    assert len(REFUSED) == len(SITUATIONS)

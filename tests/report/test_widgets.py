"""The interactive parts: what the controls change, and the still picture beside them."""

import base64

import pytest
import torch

from explib.params import Params
from explib.report import widgets
from explib.study import runs
from tests.conftest import PUBLIC


@pytest.fixture
def shown(monkeypatch):
    """What a cell displays, as mime bundles."""
    bundles = []
    monkeypatch.setattr(widgets, "display", lambda bundle, raw: bundles.append(bundle))
    return bundles


@pytest.fixture
def params(tmp_path, resnet_8):
    small = Params(
        epochs=1, batch_size=32, limit_train=64, limit_test=40, results_dir=str(tmp_path)
    )
    runs.baseline(small)
    return small


@pytest.fixture
def controls(monkeypatch):
    """The controls by name, and the picture, of what is shown."""
    found = {}
    box = widgets.widgets.VBox

    def caught(children, **options):
        row, found["picture"] = children
        found.update({control.description: control for control in row.children})
        return box(children, **options)

    monkeypatch.setattr(widgets.widgets, "VBox", caught)
    return found


def test_a_picture_stands_in_where_there_is_no_kernel(params, shown, controls):
    widgets.scores(params)
    assert "application/vnd.jupyter.widget-view+json" in shown[0]
    still = base64.b64decode(shown[0]["image/png"])
    assert still.startswith(b"\x89PNG") and still == controls["picture"].value


@pytest.mark.parametrize("name, value", [("rate", 0.8), ("seed", 3), ("way", "bn")])
def test_a_control_changes_the_picture(params, shown, controls, name, value):
    widgets.masks(params)
    before = controls["picture"].value
    controls[name].value = value
    assert controls["picture"].value != before


def test_survivors_are_chosen_too(params, shown, controls):
    widgets.masks(params)
    before = controls["picture"].value
    controls["survivors"].value = "l1"
    assert controls["picture"].value != before


def test_another_network_brings_its_own_layers(params, shown, controls):
    widgets.scores(params)
    assert controls["network"].value == "ResNet-56"
    controls["network"].value = "VGG-16 (untrained)"
    assert len(controls["layer"].options) == 13
    assert controls["layer"].value in controls["layer"].options


def test_another_network_has_its_own_normalization(params, shown, controls):
    cifar10 = params.replace(
        dataset="cifar10", normalization="imagenet", results_dir="results", resume_mask="m",
        arch="resnet_110", resume=str(PUBLIC),
    )  # fmt: skip
    networks = widgets._networks(cifar10)
    assert networks["VGG-16"]().checkpoint == "vgg_16_bn.safetensors"


@pytest.mark.parametrize("groups", [1, 100])
def test_the_number_of_groups_is_the_configurations_own(params, shown, controls, groups):
    widgets.scores(params.replace(groups=groups))
    assert controls["groups"].value == groups


def test_the_mask_is_drawn_as_it_is():
    keep = torch.tensor([[True, False], [False, True]])
    rows = [{"name": "conv", "macs": 50, "macs_dense": 100}]
    figure = widgets.layer_mask(
        torch.ones(2, 2), torch.tensor([[0, 1], [1, 1]]), keep, rows, "conv", "net"
    )
    drawn = next(axes for axes in figure.axes if axes.get_title("left").startswith("Mask"))
    assert torch.equal(torch.as_tensor(drawn.images[0].get_array().data).bool(), keep)
    assert drawn.get_title("left") == "Mask: 2 of 4 kernels stay"
    bars = next(axes for axes in figure.axes if axes.get_title("left").startswith("Levels"))
    assert [bar.get_height() for bar in bars.patches] == [1, 3, 1, 1]  # before, then who stays

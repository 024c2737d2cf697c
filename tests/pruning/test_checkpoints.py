"""Files of networks: what is refused when saving, and checkpoints as found in the wild."""

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from explib import models
from explib.pruning import checkpoints, holding
from explib.pruning import masks as masking
from explib.pruning.checkpoints import load, load_state, load_weights, save
from explib.pruning.criteria import prune
from tests.conftest import ROOT, image, make_net


@pytest.fixture
def masks(net):
    chosen = prune(net, image(8), 0.5)
    masking.apply(net, chosen)
    return chosen


def saved(tmp_path, model, masks):
    return load(save(tmp_path / "m.safetensors", model, masks, {}, torch.float32))


class TestSaving:
    def test_masks_that_do_not_fit_are_refused_before_anything_is_written(self, net, tmp_path):
        path = tmp_path / "m.safetensors"
        for given, message in (
            ({"module.0": torch.ones(8, 3).bool()}, "'module.0' is no conv of this network"),
            ({"0": torch.ones(8, 4).bool()}, r"0 has a torch.bool mask \(8, 4\); give bool"),
            ({"0": torch.eye(8, 3).bool()}, "0 has 21 pruned kernels that are not zero"),
        ):
            with pytest.raises(ValueError, match=message):
                save(path, net, given, {})
        for dtype in (torch.int8, torch.bool, "fp16"):
            with pytest.raises(ValueError, match=f"dtype: {dtype!r}; give torch.float16"):
                save(path, net, {}, {}, dtype)
        with pytest.raises(ValueError, match=r"model: a dict; give an nn\.Module, then its masks"):
            save(path, {}, net, {})
        assert not path.exists()

    def test_a_module_in_two_places_is_saved_once(self, tmp_path):
        twice, other = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        other.weight = twice.weight  # and a weight in two modules
        model = nn.ModuleList([twice, nn.ReLU(), twice, other])
        chosen = {"3": torch.eye(4, dtype=torch.bool)}
        holding.hold(model, chosen)
        state, found, _ = saved(tmp_path, model, chosen)
        assert list(found) == ["0"] and torch.equal(found["0"], chosen["3"])
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
        tensors = safetensors.torch.load_file(tmp_path / "m.safetensors")
        assert sorted(tensors) == ["0.bias", "0.weight", "0.weight.positions", "3.bias"]

    def test_buffers_are_not_rounded(self, net, masks, tmp_path):
        table = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
        net.register_buffer("table", table)
        net.register_buffer("fine", table.double() / 3)
        path = save(tmp_path / "m.safetensors", net, masks, {})
        state, _, _ = load(path)
        assert torch.equal(state["table"], net.table) and torch.equal(state["fine"], net.fine)
        weight = net[10].weight
        assert torch.equal(state["10.weight"], weight.half().float())
        assert not torch.equal(state["10.weight"], weight)

    def test_a_state_that_is_no_tensor_is_named(self, net, masks, tmp_path):
        class Counting(nn.Module):
            def get_extra_state(self):
                return {"steps": 3}

            def set_extra_state(self, state):
                pass

        net.append(Counting())
        with pytest.raises(ValueError, match=r"^11._extra_state: is a dict; a file holds tensors"):
            save(tmp_path / "m.safetensors", net, masks, {})

    def test_an_alias_of_what_is_not_there_is_one_line(self, net, masks, tmp_path):
        from explib.files import load_tensors, save_tensors

        path = save(tmp_path / "m.safetensors", net, masks, {})
        tensors, meta = load_tensors(path)
        for same in ({"a": "b"}, {"a": 3}):
            save_tensors(path, tensors, meta | {"same": same})
            with pytest.raises(ValueError, match=r"m\.safetensors: a is to be"):
                load(path)

    def test_the_shipped_files_load_as_they_did(self):
        path = ROOT / "results/checkpoints/cifar10/resnet_56-B-71-e50.safetensors"
        model, found, meta = checkpoints.load_network(path)
        assert meta["arch"] == "resnet_56" and masking.held(model, found)
        assert {k: v.shape for k, v in masking.masks_of(model).items()} == {
            k: v.shape for k, v in found.items()
        }


WILD = {
    "torch.compile": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "compiled, then parallel": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "lightning": lambda s: {
        "state_dict": {f"model.{k}": v for k, v in s.items()},
        "epoch": 3,
        "pytorch-lightning_version": "2.5",
    },
    "lightning, net": lambda s: {"state_dict": {f"net.{k}": v for k, v in s.items()}},
    "tutorials": lambda s: {"model_state_dict": s, "optimizer_state_dict": {}, "loss": 0.1},
    "ema alone": lambda s: {"state_dict_ema": s, "args": {}},
    "ema": lambda s: {"ema": {"module": s}},
    "both": lambda s: {
        "state_dict_ema": {k: v + 1 if v.is_floating_point() else v for k, v in s.items()},
        "state_dict": s,
    },
    "averaged": lambda s: {f"module.{k}": v for k, v in s.items()} | {"n_averaged": 7},
}


class TestFoundInTheWild:
    @pytest.fixture
    def state(self):
        torch.manual_seed(1)
        return models.resnet.build(depth=8).state_dict()

    @pytest.fixture
    def model(self):
        torch.manual_seed(2)
        return models.resnet.build(depth=8)

    @pytest.mark.parametrize("name", WILD)
    def test_is_loaded(self, model, state, name, tmp_path):
        torch.save(WILD[name](state), tmp_path / "c.pth")
        found, meta = load_state(tmp_path / "c.pth")
        load_weights(model, found, "c.pth")
        assert meta == {}
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())

    def test_plain_safetensors(self, model, state, tmp_path):
        path = tmp_path / "c.safetensors"
        safetensors.torch.save_file({f"model.{k}": v for k, v in state.items()}, path)
        load_weights(model, load_state(path)[0], "c")
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())

    def test_a_network_with_a_part_called_model_keeps_its_names(self):
        model = nn.ModuleDict({"model": nn.ModuleDict({"net": nn.Linear(2, 2)})})
        state = {k: v + 1 for k, v in model.state_dict().items()}
        load_weights(model, dict(state), "x")
        assert torch.equal(model["model"]["net"].bias, state["model.net.bias"])

    def test_what_is_unknown_is_said_with_its_own_name(self, model, state):
        with pytest.raises(ValueError, match=r"has unknown metric\.total"):
            load_weights(model, state | {"metric.total": torch.ones(1)}, "x")

    def test_masks_are_no_network(self, net, masks, tmp_path):
        path = checkpoints.save_masks(tmp_path / "m.safetensors", masks)
        with pytest.raises(ValueError, match=r"m.safetensors: holds masks; give the file of a net"):
            load_state(path)

    def test_why_torch_cannot_load_it_is_said_in_full(self, tmp_path):
        torch.save({"model": torchvision.models.resnet18()}, tmp_path / "whole.pth")
        with pytest.raises(ValueError, match=r"whole\.pth is no readable checkpoint") as caught:
            load_state(tmp_path / "whole.pth")
        assert "torchvision.models.resnet.ResNet" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"c\.pth: no such file"):
            load_state(tmp_path / "c.pth")


def test_a_network_goes_through_a_file_and_is_held_again(tmp_path, net, masks):
    state, found, _ = saved(tmp_path, net, masks)
    again = make_net(1)
    again.load_state_dict(state)
    holding.hold(again, found)
    assert masking.held(again, masks)
    assert masking.masks_of(again).keys() == masks.keys()

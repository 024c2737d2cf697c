"""The masks of the study's configurations are, bit for bit, those that its records come from."""

import hashlib
import json
from pathlib import Path

import pytest

from explib.params import from_yaml
from explib.study import networks
from tests.conftest import PUBLIC, ROOT

KNOWN = json.loads(Path(__file__).with_name("masks_sha256.json").read_text())
"""SHA-256 of the masks of every configuration in params/."""
NAMES = ["A-71", "B-71", "B-71-l1", "A-53-l1", "B-71-groups25", "B-71-floor20", "B-53-published"]
NAMES += ["random-71", "l1-71", "bn-71", "matched-71", "global-71"]
"""Of the public ResNet-56, whose weights are the same on every machine, as are sums in float64."""


@pytest.mark.parametrize("name", NAMES)
def test_the_public_resnet_56(name, public):
    params = from_yaml(ROOT / f"params/cifar10/resnet_56-{name}.yaml")
    assert networks.dense_path(params) == PUBLIC
    dense = networks.Dense(public.model, public.convs, networks.fresh(params).rates)
    digest = hashlib.sha256()
    for layer, mask in sorted(networks.choose_masks(params, dense).items()):
        digest.update(layer.encode() + mask.numpy().tobytes())
    assert digest.hexdigest() == KNOWN[f"cifar10/resnet_56-{name}"]


def test_every_configuration_is_known():
    files = ROOT.glob("params/*/*.yaml")
    found = {f"{f.parent.name}/{f.stem}" for f in files if not f.stem.endswith("-baseline")}
    assert found == set(KNOWN)

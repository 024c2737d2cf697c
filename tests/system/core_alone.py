"""The whole way with the core and its five packages alone; run by test_install.py, in a process.

Arguments: packages that must not be there.
"""

import importlib
import importlib.util
import pkgutil
import sys

import torch

import explib

for package in sys.argv[1:]:
    assert importlib.util.find_spec(package) is None, f"{package} is here"
for room in ("pruning", "models", "data", "engine", "training"):
    importlib.import_module(f"explib.{room}")
    for module in pkgutil.iter_modules([f"{explib.__path__[0]}/{room}"]):
        importlib.import_module(f"explib.{room}.{module.name}")
for name in explib.__all__:
    getattr(explib, name)

torch.manual_seed(0)
torch.set_num_threads(1)
model = explib.build("vgg_16_bn")
x = torch.randn(2, 3, 32, 32)
masks = explib.prune(model, x, rate=0.5, criterion="B", seed=0)
explib.hold(model, masks)
assert abs(explib.sparsity(masks) - 0.5) < 0.01
count = explib.macs(model, x, masks)
assert 0.4 < count["left"] / count["dense"] < 0.6, count

torch.manual_seed(1)
batches = [(torch.randn(8, 3, 32, 32), torch.arange(8) % 10) for _ in range(2)]
assert explib.score(model, x)["features.conv0"].shape == (64, 3)
before = model.features.conv0.weight.detach().clone()
explib.recalibrate_bn(model, batches)
(entry,) = explib.finetune(model, masks, batches, epochs=1, validation=batches)
after = model.features.conv0.weight
assert torch.isfinite(after).all() and not torch.equal(before, after)
for name, mask in masks.items():
    assert not model.get_submodule(name).weight[~mask].any(), f"{name} has grown back"
assert 0 <= entry["top1"] <= 100 and entry["epoch"] == 1
assert explib.evaluate(model, batches) == entry["top1"]

meta = {"arch": "vgg_16_bn", "num_classes": 10}
explib.save("pruned.safetensors", model, masks, meta, torch.float32)
again, same, _ = explib.load_network("pruned.safetensors")
with torch.no_grad():
    wanted = model.eval()(x)
    assert torch.equal(again(x), wanted)
assert all(torch.equal(same[name], mask) for name, mask in masks.items())
fast = explib.engine.compile(again, x)
assert torch.allclose(fast(x), wanted, atol=1e-3, rtol=1e-3), (fast(x) - wanted).abs().max()
print(fast.report["engine"])

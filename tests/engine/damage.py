"""A network's file changed at random, as JSON and as bytes: refused in one line, or run safely.

python -m tests.engine.damage FOLDER COUNT [SEED]: in a process of its own, that a crash is one.
"""

import copy
import json
import random
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from explib import engine
from explib.engine import stored
from explib.files import load_tensors, save_tensors

SIZE = (3, 12, 10)


class Everything(nn.Module):
    """A network with every kind of op, and outputs in a dict, a tuple and another order of axes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.PReLU(8), nn.BatchNorm2d(8), nn.Hardtanh(-3, 2)
        )
        self.up, self.by_depth = nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(8, 8, 5, 2, 2, groups=8)
        self.norm, self.mixed = nn.LayerNorm(8), nn.Linear(8, 8)
        self.grouped = nn.GroupNorm(2, 8)
        self.excite, self.last = nn.Linear(8, 8), nn.Linear(18 * 4, 5)
        self.strided = nn.Conv2d(18, 18, 3, 2)
        with torch.no_grad():
            for conv in (self.first[0], self.strided, self.up):
                conv.weight *= (torch.rand(*conv.weight.shape[:2]) < 0.5)[:, :, None, None]

    def forward(self, x):
        y = self.first(x)
        y = y * self.excite(y.mean((2, 3))).sigmoid()[:, :, None, None]
        z = F.silu(self.grouped(F.max_pool2d(y, 3, 2, 1)).flip(1)) * 0.5 + 1
        y = y + self.mixed(self.norm(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        wide = F.interpolate(F.interpolate(z, scale_factor=1.7), SIZE[1:], mode="bilinear")
        joined = torch.cat([self.up(z), F.elu(wide), y[:, 1:7]], 1)
        small = F.leaky_relu(self.strided(joined), 0.1)
        small = F.adaptive_avg_pool2d(F.pad(small, (1, 0, 0, 1), value=0.5), (3, 2))
        scores = self.last(F.adaptive_max_pool2d(small, 2).flatten(1))
        parts = F.gelu(y[:, :, 2:, ::3]) - y[:, :, 2:, ::3].mean((2, 3), True)
        mirrored = F.pad(y, (1, 2, 0, 1), mode="reflect")
        pooled = F.avg_pool2d(self.by_depth(mirrored), 3, 2, 1)
        larger = torch.maximum(pooled * pooled, pooled)
        return {
            "scores": scores,
            "more": (
                parts.permute(0, 2, 3, 1),
                pooled / (larger + 1),
            ),
        }


def places(value, path=()):
    """Every place in a JSON value, as keys."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


ODD = (None, True, 0, 1, -1, 2, 3, 7, 1.5, float("nan"), float("inf"), 2**15, 2**31, 2**33, 2**62)
ODD += ("", "x", [], {}, [1, 2], [0, 0, 0], [2**20] * 3, [[[1, 0]]])


def changed(meta: dict, chance: random.Random) -> None:
    """Change one thing of a JSON value."""
    everywhere = [path for path in places(meta) if path and path[0] != "sha256"]
    path = chance.choice(everywhere)
    parent, key, value = at(meta, path[:-1]), path[-1], at(meta, path)
    how = chance.randrange(4)
    if how == 0 and isinstance(parent, list):  # twice, or gone
        parent.insert(key, value) if chance.random() < 0.5 else parent.pop(key)
    elif how == 0:
        parent["odd" if chance.random() < 0.2 else key + "s"] = parent.pop(key)
    elif how == 1 and type(value) in (int, float):
        parent[key] = value + chance.choice((-1, 1, value, -2 * value, 1000))
    elif how == 2:  # something that stands elsewhere, of the same type
        others = [v for v in (at(meta, p) for p in everywhere) if type(v) is type(value)]
        parent[key] = copy.deepcopy(chance.choice(others))
    else:
        parent[key] = chance.choice(ODD)


def cut(tensors: dict, chance: random.Random) -> None:
    """Change one tensor's shape, type, or numbers."""
    name = chance.choice([*tensors])
    tensor = tensors[name]
    how = chance.randrange(4)
    if how == 0:
        del tensors[name]
    elif how == 1:
        tensors[name] = tensor[:-1] if tensor.ndim else tensor[None]
    elif how == 2:
        tensors[name] = tensor.to(chance.choice((torch.int64, torch.float64, torch.uint8)))
    elif tensor.numel():
        tensors[name] = tensor.clone()
        tensors[name].view(-1)[0] = chance.choice(
            (0, 1, 255 if tensor.dtype == torch.uint8 else 1e30)
        )


def outcome(path: Path, check: bool) -> str:
    """What comes of loading and running: `refused`, with one line, or `ran`."""
    try:
        fast = engine.load(path)
    except ValueError as error:
        assert "\n" not in str(error) and str(error).startswith(str(path)), error
        return "refused"
    assert not check, "what is damaged was taken for whole"
    for count in (1, 17) if fast.shape else ():
        fast(torch.randn(count, *fast.shape))
    return "ran"


def main(folder: str, count: str, seed: str = "0") -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    whole, path = Path(folder) / "whole.safetensors", Path(folder) / "changed.safetensors"
    engine.save(whole, Everything().eval(), torch.zeros(1, *SIZE))
    tensors, meta = load_tensors(whole)
    content, chance, seen = whole.read_bytes(), random.Random(int(seed)), Counter()
    for number in range(int(count)):
        print(number, end=" ", flush=True)
        broken = bytearray(content)
        broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
        path.write_bytes(broken)
        seen["bytes " + outcome(path, check=True)] += 1
        path.write_bytes(content[: chance.randrange(len(content))])
        seen["cut " + outcome(path, check=True)] += 1
    # whoever changes a file on purpose writes its checksum anew, and answers that fit
    stored.holds = lambda *_: True
    for number in range(int(count)):
        print(number, end=" ", flush=True)
        other, own = dict(tensors), json.loads(json.dumps(meta))
        own.pop("sha256")
        (cut(other, chance) if chance.random() < 0.2 else changed(own, chance))
        save_tensors(path, other, own | {"sha256": stored._digest(other, own)})
        seen["fields " + outcome(path, check=False)] += 1
    print(f"\n{json.dumps(seen)}")


if __name__ == "__main__":
    main(*sys.argv[1:])

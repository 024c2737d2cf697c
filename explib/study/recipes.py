"""Which recipe gives the most accuracy per epoch under masks? `explib recipes` compares them.

Every recipe of params/recipes.yaml starts from one dense network, and all are judged on the same
validation images, which neither the dense network nor the recipes were trained on.
"""

from collections.abc import Iterator
from pathlib import Path

import yaml

from explib.errors import ParamError
from explib.files import resolve
from explib.params import from_mapping
from explib.study import runs
from explib.study.records import write_bench

SOURCE = "params/recipes.yaml"


def compare(
    source: str | Path | None = None, results_dir: str | Path = "results"
) -> Iterator[dict]:
    """Yield one row a recipe: its name, what it changes, top-1 in per cent before and after.

    source: a YAML file like params/recipes.yaml, the default. Runs lie in
    results_dir/runs/recipes, and what is done there is not done again; the rows so far are in
    results_dir/bench/recipes.json.
    """
    source = resolve(SOURCE) if source is None else Path(source)
    setup, folder = _read(source), {"results_dir": str(Path(results_dir) / "runs/recipes")}
    dense = runs.baseline(from_mapping({**setup["dense"], **folder}, str(source)))
    rows = []
    for number, (name, changes) in enumerate(setup["recipes"].items()):
        chosen = {**setup["pruned"], **changes, "name": f"recipe-{number}", **folder}
        record = runs.finetune(from_mapping(chosen, f"{source}: {name}"))
        accuracy = {k: record["accuracy"][k] for k in ("before", "last")}
        rows.append({"recipe": name, "changes": changes, **accuracy})
        found = {"dense": dense["accuracy"]["last"], "pruned": setup["pruned"], "rows": rows}
        write_bench("recipes", found, results_dir)
        yield rows[-1]


def _read(source: Path) -> dict:
    """The file's three parts, each a mapping. ParamError names the file."""
    try:
        setup = yaml.safe_load(source.read_text())
    except OSError as error:
        raise ParamError(f"{source}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ParamError(f"{source}: not YAML: {' '.join(str(error).split())}") from None
    for part in ("dense", "pruned", "recipes"):
        if not isinstance(setup, dict) or not isinstance(setup.get(part), dict):
            raise ParamError(f"{source}: has no mapping {part!r}; give dense, pruned and recipes")
    return setup

"""Which recipe gives the most accuracy per epoch under masks: `python -m explib.study.recipes`.

Runs every recipe of params/recipes.yaml from one dense network, all judged on the same validation
images, which neither the dense network nor the recipes were trained on. Interrupt it at will.
"""

import yaml

from explib.files import ROOT, write_json
from explib.params import from_mapping
from explib.study import runs
from explib.study.records import provenance

SOURCE = ROOT / "params/recipes.yaml"
RESULT = ROOT / "results/bench/recipes.json"
RUNS = "results/runs/recipes"


def compare() -> list[dict]:
    """One row a recipe: its name, what it changes, top-1 in per cent before and after."""
    setup = yaml.safe_load(SOURCE.read_text())
    dense = runs.baseline(from_mapping({**setup["dense"], "results_dir": RUNS}, str(SOURCE)))
    rows = []
    for number, (name, changes) in enumerate(setup["recipes"].items()):
        chosen = {**setup["pruned"], **changes, "name": f"recipe-{number}", "results_dir": RUNS}
        record = runs.finetune(from_mapping(chosen, f"{SOURCE}: {name}"))
        accuracy = {k: record["accuracy"][k] for k in ("before", "last")}
        rows.append({"recipe": name, "changes": changes, **accuracy})
        found = {"dense": dense["accuracy"]["last"], "pruned": setup["pruned"], "rows": rows}
        write_json(RESULT, {**found, "provenance": provenance()})
        print(f"{name:40s} {accuracy['before']:6.2f} → {accuracy['last']:.2f} %", flush=True)
    return rows


if __name__ == "__main__":
    compare()

# Configurations (params/DATASET/*.yaml) -> papermill runs -> tables and figures.
#
# Any field of Params can be set for all runs at once:
#   snakemake study --cores all --config epochs=1 results_dir=/tmp/elsewhere
import os

import papermill
import yaml

from explib.params import from_yaml

RESULTS = config.get("results_dir", "results")
FILES = {
    dataset: {file.stem: file for file in sorted(Path("params", dataset).glob("*.yaml"))}
    for dataset in ("digits", "cifar10")
}
# Read before anything runs, so that a wrong parameter stops the workflow here
RUNS = {
    dataset: {name: from_yaml(file.resolve(), **config) for name, file in files.items()}
    for dataset, files in FILES.items()
}
DIGITS = [name for name in RUNS["digits"] if not name.endswith("-baseline")]
# By the parts of their names: network, way and cut; with `l1` our survivors, else one change more
PARTS = {n: n.split("-")[1:] for n in RUNS["cifar10"] if not n.endswith(("-baseline", "-published"))}
TWELVE = [n for n, parts in PARTS.items() if parts[0] in "AB" and len(parts) == 2]
OURS = [n for n, parts in PARTS.items() if parts[-1] == "l1"]


def execute(notebook, output, dataset, name, threads):
    """Run a notebook with one configuration, in a kernel of its own, on so many threads."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    parameters = yaml.safe_load(FILES[dataset][name].read_text()) | config
    papermill.execute_notebook(notebook, output, parameters, progress_bar=False)


def threads_for(wildcards):
    """Small runs go side by side, one thread each; a long training has the machine to itself."""
    return 1 if wildcards.dataset == "digits" else workflow.cores


def dense_of(wildcards):
    """The checkpoint a configuration starts from: its own, or the baseline trained here."""
    params = RUNS[wildcards.dataset][wildcards.name]
    baseline = f"{RESULTS}/checkpoints/{wildcards.dataset}/{params.arch}.safetensors"
    return params.resume or baseline


def executed(dataset, names):
    """The notebooks of some configurations; the scores of a network are looked at once."""
    seen = {RUNS[dataset][name].arch: name for name in reversed(names)}
    notebooks = [("01_score_analysis", name) for name in seen.values()]
    notebooks += [(step, name) for name in names for step in ("02_pruning", "03_finetune")]
    return [f"{RESULTS}/notebooks/{dataset}/{step}-{name}.ipynb" for step, name in notebooks]


rule study:
    input:
        f"{RESULTS}/notebooks/digits/04_tables.ipynb",
        f"{RESULTS}/notebooks/digits/05_speed.ipynb",


rule reproduce:
    input:
        f"{RESULTS}/notebooks/cifar10/04_tables.ipynb",


rule ours:
    input:
        executed("cifar10", OURS),


rule compare:
    input:
        executed("cifar10", list(PARTS)),


rule data:
    output:
        touch(f"{RESULTS}/runs/{{dataset}}/data.ok"),
    run:
        from explib import Params, load_data

        places = {key: config[key] for key in ("data_dir", "data_url") if key in config}
        load_data(Params(dataset=wildcards.dataset, **places))


rule baseline:
    input:
        data=f"{RESULTS}/runs/{{dataset}}/data.ok",
        notebook="notebooks/00_baseline.ipynb",
        params="params/{dataset}/{arch}-baseline.yaml",
    output:
        checkpoint=f"{RESULTS}/checkpoints/{{dataset}}/{{arch}}.safetensors",
        notebook=f"{RESULTS}/notebooks/{{dataset}}/00_baseline-{{arch}}.ipynb",
    threads: threads_for
    run:
        name = f"{wildcards.arch}-baseline"
        execute(input.notebook, output.notebook, wildcards.dataset, name, threads)


rule notebook:
    input:
        data=f"{RESULTS}/runs/{{dataset}}/data.ok",
        dense=dense_of,
        notebook="notebooks/{step}.ipynb",
        params="params/{dataset}/{name}.yaml",
    output:
        f"{RESULTS}/notebooks/{{dataset}}/{{step}}-{{name}}.ipynb",
    wildcard_constraints:
        step="01_score_analysis|02_pruning|03_finetune",
    threads: threads_for
    run:
        execute(input.notebook, output[0], wildcards.dataset, wildcards.name, threads)


rule tables:
    input:
        lambda wildcards: executed(
            wildcards.dataset, DIGITS if wildcards.dataset == "digits" else TWELVE
        ),
        notebook="notebooks/04_tables.ipynb",
    output:
        f"{RESULTS}/notebooks/{{dataset}}/04_tables.ipynb",
    run:
        papermill.execute_notebook(
            input.notebook,
            output[0],
            {"results_dir": str(RESULTS), "dataset": wildcards.dataset},
            progress_bar=False,
        )


rule speed:  # alone on the machine, and without the minutes that torch takes to compile
    input:
        "notebooks/05_speed.ipynb",
    output:
        f"{RESULTS}/notebooks/{{dataset}}/05_speed.ipynb",
    threads: workflow.cores
    run:
        quick = {"dense": ["eager fp32"], "densities": [0.1, 0.3, 1.0], "seconds": 0.3}
        papermill.execute_notebook(input[0], output[0], quick, progress_bar=False)

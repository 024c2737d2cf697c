# Configurations (params/DATASET/*.yaml) -> papermill runs -> tables and figures.
#
# Any field of Params can be set for all runs at once:
#   snakemake --profile params/profiles/local study --config epochs=1 results_dir=/tmp/elsewhere
import contextlib
import json
import os
import shlex
import sys

import yaml

from explib.study import gpus
from explib.files import locked
from explib.params import from_yaml

workdir: workflow.basedir  # wherever it is started


RESULTS = os.path.expanduser(config.get("results_dir", "results"))
FILES = {
    dataset: {file.stem: file for file in sorted(Path("params", dataset).glob("*.yaml"))}
    for dataset in ("digits", "cifar10", "imagenet")
}
# Read before anything runs, so that a wrong parameter stops the workflow here
RUNS = {
    dataset: {name: from_yaml(file.resolve(), **config) for name, file in files.items()}
    for dataset, files in FILES.items()
}
# By the parts of their names: network, way and cut; with `l1` our survivors, else one change more
PARTS = {
    dataset: {n: n.split("-")[1:] for n in names if not n.endswith(("-baseline", "-published"))}
    for dataset, names in RUNS.items()
}
DIGITS = list(PARTS["digits"])
IMAGENET = [n for n, parts in PARTS["imagenet"].items() if len(parts) == 2]
MAIN = {
    n: parts
    for n, parts in PARTS["cifar10"].items()
    if RUNS["cifar10"][n].arch in ("vgg_16_bn", "resnet_56")
}
TWELVE = [n for n, parts in MAIN.items() if parts[0] in "AB" and len(parts) == 2]
OURS = [n for n, parts in MAIN.items() if parts[-1] == "l1"]
OTHERS = [n for n, parts in PARTS["cifar10"].items() if n not in MAIN and len(parts) == 2]

GPUS = gpus.visible()
MEMORY_MB = {"digits": 3_000, "cifar10": 8_000, "imagenet": 32_000}  # of a run, generously
ALONE = contextlib.ExitStack()


onstart:
    # Two workflows would take each other's files away: one at a time for a data set. The operating
    # system lets go of these locks when a workflow is killed, which Snakemake's own would outlive.
    work = {job.wildcards.dataset for job in workflow.dag.needrun_jobs() if job.wildcards}
    folders = [f"{RESULTS}/runs/{dataset}" for dataset in sorted(work)]
    if any([ALONE.enter_context(locked(f"{folder}/.lock")) for folder in folders]):
        workflow.tear_down()  # what the other one has made is not made again: look anew
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


RUN = f"exec {shlex.quote(sys.executable)} -m explib notebook"
RUN += " {input.notebook:q} {output.notebook:q} --parameters {params.given:q}"


def given(wildcards):
    """The parameters of a configuration's notebooks, as JSON: its file's, then --config's."""
    name = wildcards.get("name", f"{wildcards.get('arch')}-baseline")
    return json.dumps(yaml.safe_load(FILES[wildcards.dataset][name].read_text()) | config)


def threads_for(wildcards):
    """Small runs go side by side, one thread each; long ones share the machine, one to a GPU."""
    return 1 if wildcards.dataset == "digits" else max(1, workflow.cores // max(1, len(GPUS)))


def memory_for(wildcards):
    return MEMORY_MB.get(wildcards.dataset, max(MEMORY_MB.values()))


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


localrules:  # where a cluster submits: compute nodes may be without a network
    data,
    tables,


rule study:
    input:
        f"{RESULTS}/notebooks/digits/04_tables.ipynb",
        f"{RESULTS}/notebooks/digits/05_speed.ipynb",
        f"{RESULTS}/notebooks/digits/07_your_network.ipynb",


rule reproduce:
    input:
        f"{RESULTS}/notebooks/cifar10/04_tables.ipynb",


rule ours:
    input:
        executed("cifar10", OURS),


rule compare:
    input:
        executed("cifar10", list(MAIN)),


rule others:  # ResNet-110 and GoogLeNet
    input:
        executed("cifar10", OTHERS),


rule imagenet:
    input:
        executed("imagenet", IMAGENET),


def data_of(wildcards):
    """The mark that a data set is there; the embedded one always is."""
    return [] if wildcards.dataset == "digits" else f"{RESULTS}/runs/{wildcards.dataset}/data.ok"


rule data:
    output:
        touch(f"{RESULTS}/runs/{{dataset}}/data.ok"),
    run:
        from explib import Params, load_data

        places = {key: config[key] for key in ("data_dir", "data_url") if key in config}
        load_data(Params(dataset=wildcards.dataset, **places))


rule baseline:
    input:
        data=data_of,
        notebook="notebooks/00_baseline.ipynb",
        params="params/{dataset}/{arch}-baseline.yaml",
    output:
        checkpoint=f"{RESULTS}/checkpoints/{{dataset}}/{{arch}}.safetensors",
        notebook=f"{RESULTS}/notebooks/{{dataset}}/00_baseline-{{arch}}.ipynb",
    threads: threads_for
    resources:
        gpu=1,
        mem_mb=memory_for,
    params:
        given=given,
    shell:
        RUN + " --threads {threads} --gpu"


rule notebook:
    input:
        data=data_of,
        dense=dense_of,
        notebook="notebooks/{step}.ipynb",
        params="params/{dataset}/{name}.yaml",
    output:
        notebook=f"{RESULTS}/notebooks/{{dataset}}/{{step}}-{{name}}.ipynb",
    wildcard_constraints:
        step="01_score_analysis|02_pruning|03_finetune",
    threads: threads_for
    resources:
        gpu=1,
        mem_mb=memory_for,
    params:
        given=given,
    shell:
        RUN + " --threads {threads} --gpu"


rule tables:
    input:
        lambda wildcards: executed(
            wildcards.dataset, DIGITS if wildcards.dataset == "digits" else TWELVE
        ),
        notebook="notebooks/04_tables.ipynb",
    output:
        notebook=f"{RESULTS}/notebooks/{{dataset}}/04_tables.ipynb",
    params:
        given=lambda wildcards: json.dumps({"results_dir": RESULTS, "dataset": wildcards.dataset}),
    shell:
        RUN


rule speed:  # alone on the machine, and without the minutes that all of it would take
    input:
        notebook="notebooks/05_speed.ipynb",
    output:
        notebook=f"{RESULTS}/notebooks/{{dataset}}/05_speed.ipynb",
    threads: lambda wildcards: workflow.cores
    params:
        given=json.dumps({"dense": ["eager fp32"], "densities": [0.1, 0.3, 1.0]}),
    shell:
        RUN


rule yours:  # a network and a criterion from outside the study
    input:
        notebook="notebooks/07_your_network.ipynb",
    output:
        notebook=f"{RESULTS}/notebooks/{{dataset}}/07_your_network.ipynb",
        network=f"{RESULTS}/runs/{{dataset}}/resnet18-pruned.safetensors",
    threads: 1
    params:
        given=lambda wildcards, output: json.dumps({"file": output.network}),
    shell:
        RUN + " --threads {threads}"

"""The command line: `python -m explib COMMAND --help`. Thin doors to what the notebooks call."""

import contextlib
import dataclasses
import inspect
import json
import os
import re
import sys
import time
import types
from typing import get_args, get_origin, get_type_hints

import click

from explib.errors import ParamError
from explib.params import CHOICES, Params, from_mapping, from_yaml

# Everything that needs torch is imported where it is used: --help and completion are to be quick.


class _Group(click.Group):
    """Errors of the study as one line and an exit status instead of a traceback."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except click.exceptions.Exit:  # a RuntimeError, too
            raise
        except ParamError as error:
            raise click.UsageError(str(error)) from None
        except (ValueError, OSError, RuntimeError) as error:
            raise click.ClickException(" ".join(str(error).split())) from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="explib")
def cli():
    """EXP pruning: score, prune, fine-tune, evaluate and count convolutional networks.

    Parameters have the names they have in YAML files and notebooks. Exit status: 0 done, 1 failed,
    2 a parameter is wrong. Tab completion in bash: eval "$(_EXPLIB_COMPLETE=bash_source explib)"
    (zsh_source, fish_source in those shells).
    """


def _comments() -> dict[str, str]:
    """What Params says of each of its fields, from the comments beside them."""
    known, found, field = {f.name for f in dataclasses.fields(Params)}, {}, None
    for line in inspect.getsource(Params).splitlines():
        if line.strip() == "" or line.startswith("    #"):
            field = None
        name = re.match(r"    (\w+): ", line)
        field = name[1] if name and name[1] in known else field
        if field and (comment := re.search(r"  # (.*)", line)):
            found[field] = comment[1]
    return found


def _parameters(command):
    """Options for a YAML file, for every field of Params and for JSON."""
    comments, hints = _comments(), get_type_hints(Params)
    for field in reversed(dataclasses.fields(Params)):
        kind = hints[field.name]
        kinds = get_args(kind) if get_origin(kind) is types.UnionType else (kind,)
        names = dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"])
        choices = [choice for choice in CHOICES.get(field.name, ()) if choice]
        option = click.option(
            *names,
            field.name,
            type=click.Choice(choices) if choices else kinds[0],
            help=f"{comments.get(field.name, '')}  [default: {field.default!r}]",
        )
        command = option(command)
    command = click.option("--json", "as_json", is_flag=True, help="for programs")(command)
    return click.option("-f", "--file", type=click.Path(), help="YAML file of params/")(command)


def _params(options: dict) -> Params:
    """The file's parameters with the options on top."""
    file = options.pop("file")
    given = {name: value for name, value in options.items() if value is not None}
    return from_yaml(file, **given) if file else from_mapping(given)


def _run(work, as_json: bool, show) -> None:
    """Do the work, then print it; as JSON alone on standard output where that is wanted."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = work()
    if os.environ.get("RANK", "0") == "0":  # under torchrun one process speaks for all
        click.echo(json.dumps(result, indent=1) if as_json else show(result))


def _columns(rows: list[dict]) -> str:
    """Rows as aligned text."""
    import pandas as pd

    return pd.DataFrame(rows).to_string(index=False, float_format=lambda value: f"{value:.4g}")


@cli.command()
@_parameters
def score(as_json, **options):
    """Expectation scaling factors and levels of every conv that a configuration prunes."""
    params = _params(options)

    def work():
        from explib.pruning import scores as scoring
        from explib.study import networks

        found = networks.scores(params, networks.load_dense(params))
        table = scoring.redundancy(found, params.groups)
        for row in table:
            delta = found[row["layer"]]
            levels = scoring.levels(delta, params.groups)
            row |= {
                "delta_e_min": float(delta.min()),
                "delta_e_max": float(delta.max()),
                "level_min": int(levels.min()),
                "level_max": int(levels.max()),
            }
        return table

    _run(work, as_json, _columns)


@cli.command()
@_parameters
def prune(as_json, **options):
    """Choose the masks of a configuration, count, and write them to job_dir."""
    params = _params(options)

    def work():
        from explib.study import networks

        dense = networks.load_dense(params)
        masks = networks.choose_masks(params, dense)
        return {
            "masks": str(networks.save_masks(params, masks)),
            **networks.counts(params, dense, masks),
        }

    _run(work, as_json, _left)


@cli.command()
@_parameters
def flops(as_json, **options):
    """Multiply-adds of a configuration: the published convention and the true count."""
    params = _params(options)

    def work():
        from explib.study import networks

        trained = params.resume or networks.dense_path(params).is_file()
        if not trained:
            click.echo(f"{params.arch}: not trained yet, so masks of fresh weights", err=True)
        dense = networks.load_dense(params) if trained else networks.fresh(params)
        return networks.counts(params, dense, networks.choose_masks(params, dense))

    _run(work, as_json, _left)


def _left(found: dict) -> str:
    """What pruning leaves, by layer and in all."""
    keys = ("name", "kernels", "nominal", "pruned", "macs_dense", "macs")
    lines = [_columns([{key: row[key] for key in keys} for row in found["layers"]])]
    macs, weights = found["macs"], found["weights"]
    cut = 100 * (1 - macs["left"] / macs["dense"])
    published = 100 * (1 - macs["published_m"] / (macs["dense"] / 1e6))
    lines += [
        "",
        f"kernels pruned      {100 * found['sparsity']:.2f} %"
        f" (asked for: {100 * found['nominal_sparsity']:.2f} %)",
        f"multiply-adds left  {macs['left'] / 1e6:.2f} of {macs['dense'] / 1e6:.2f} M",
        f"true cut            {cut:.2f} %",
        f"published cut       {published:.2f} % (its convention mixes units)",
        f"weights left        {weights['left'] / 1e6:.3f} of {weights['dense'] / 1e6:.3f} M",
    ]
    return "\n".join([*lines, f"masks in {found['masks']}"] if "masks" in found else lines)


def _trained(record: dict) -> str:
    """A record in a few lines."""
    top1 = {k: v for k, v in record["accuracy"].items() if v is not None}
    lines = [f"{record['kind']} {record['params']['name']}: {record['status']}"]
    lines += [f"{name:12s} {value:.2f} %" for name, value in top1.items() if name != "best_epoch"]
    return "\n".join([*lines, f"files in {record['params']['job_dir']}"])


@cli.command()
@_parameters
def baseline(as_json, **options):
    """Train the dense network of a configuration, or with resume load and evaluate one."""
    params = _params(options)

    def work():
        from explib.study import runs

        return runs.baseline(params)

    _run(work, as_json, _trained)


@cli.command()
@_parameters
def finetune(as_json, **options):
    """Prune and fine-tune a configuration; goes on where it was interrupted."""
    params = _params(options)

    def work():
        from explib.study import runs

        return runs.finetune(params)

    _run(work, as_json, _trained)


@cli.command()
@click.argument("files", nargs=-1, required=True, type=click.Path())
@click.option("--seeds", default=1, show_default=True, help="so many of each, from 0")
@click.option("--seconds", default=0.0, help="begin no run that may end later than this; 0: no end")
@click.option("--results_dir", "--results-dir", "results_dir", default="results", show_default=True)
def batch(files, seeds, seconds, results_dir):
    """Run the configurations of several YAML FILES one after another, in one process.

    Baselines (NAME-baseline.yaml) come first, with their own seed only: all runs of a network start
    from the same one. What is done is not done again, what was interrupted
    goes on; a run that fails is reported, and the others go on.
    """
    dense = [file for file in files if file.endswith("-baseline.yaml")]
    pruned = [file for file in files if file not in dense]
    chosen = [(file, from_yaml(file, results_dir=results_dir)) for file in dense] + [
        (file, from_yaml(file, seed=seed, results_dir=results_dir))
        for seed in range(seeds)
        for file in pruned
    ]
    from explib.study import runs

    started, longest, failed = time.monotonic(), 0.0, 0
    for file, params in chosen:
        began = time.monotonic()
        if seconds and began - started + longest > seconds:
            click.echo(f"{params.name}, seed {params.seed}: not begun, the time is over")
            continue
        run = runs.baseline if file in dense else runs.finetune
        try:
            with contextlib.redirect_stdout(sys.stderr):
                record = run(params)
        except (ValueError, OSError, RuntimeError) as error:
            failed += 1
            click.echo(f"{params.name}, seed {params.seed}: {' '.join(str(error).split())}")
            continue
        took = time.monotonic() - began
        longest = max(longest, took)
        top1, speed = record["accuracy"], record["images_per_s"] or 0
        click.echo(
            f"{params.name:28s} seed {params.seed}  last {top1['last']:.2f}  best "
            f"{top1['best']:.2f}  {speed:8,.0f} images/s  {took:6.0f} s"
        )
    sys.exit(1 if failed else 0)


@cli.command()
@click.argument("network", type=click.Path())
@click.option("--data_dir", "--data-dir", "data_dir", default="", help="folder of the data")
@click.option("--json", "as_json", is_flag=True, help="for programs")
def evaluate(network, data_dir, as_json):
    """Top-1 accuracy of a NETWORK of the study (a compact safetensors file) on its test images.

    A row for each way to run it: in fp32 in torch, then in the engine in each type that this
    processor computes in, those of 16 bits also with the undecided images computed again.
    """

    def work():
        from explib.study.verify import verify

        return [{"network": network, **row} for row in verify(network, data_dir)]

    _run(work, as_json, _columns)


@cli.command()
@click.option("--results_dir", "--results-dir", "results_dir", default="results", show_default=True)
@click.option("--dataset", type=click.Choice(CHOICES["dataset"]), default="cifar10")
@click.option("--json", "as_json", is_flag=True, help="for programs")
def tables(results_dir, dataset, as_json):
    """Write every table and figure that the records allow; prints the tables' paths."""

    def work():
        from explib.report import figures
        from explib.report import tables as making

        written = making.build(results_dir, dataset) + figures.build(results_dir, dataset)
        return [str(path) for path in written]

    _run(work, as_json, "\n".join)


if __name__ == "__main__":
    cli(prog_name="explib")

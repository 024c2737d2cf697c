"""The command line: `explib COMMAND --help`. Thin doors to what the notebooks call.

Whatever needs torch or pandas is imported where it is used: --help and completion are to be quick.
"""

import json
import sys
import warnings
from pathlib import Path

try:
    import click
except ModuleNotFoundError:
    sys.exit('explib: click is not installed; pip install "explib[study]"')

from explib.cli import Group, Sections, answer, data_dir, each, parameters, results_dir
from explib.errors import ParamError
from explib.files import resolve
from explib.params import Params

SECTIONS = {
    "One configuration": ("score", "prune", "flops", "baseline", "finetune", "notebook"),
    "Several configurations": ("batch", "controls", "recipes"),
    "Pruned networks": ("run", "export", "evaluate", "verify"),
    "Results": ("tables", "report"),
    "This machine": ("bench",),
}


@click.group(
    cls=Sections, sections=SECTIONS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="explib")
def cli():
    """EXP pruning: score, prune, fine-tune, evaluate and count convolutional networks.

    Parameters have the names they have in YAML files and notebooks. Exit status: 0 done, 1 failed,
    2 a parameter is wrong. Tab completion in bash: eval "$(_EXPLIB_COMPLETE=bash_source explib)"
    (zsh_source, fish_source in those shells).
    """


@cli.command()
@parameters("score")
@answer("columns")
def score(params):
    """Expectation scaling factors and levels of every conv."""
    from explib.study import networks

    return networks.score_table(params, networks.load_dense(params))


@cli.command()
@click.argument("notebook", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--parameters", "given", default="{}", help="as JSON, instead of the notebook's")
@click.option("--threads", type=click.IntRange(0), default=0, help="CPU threads; 0: all")
@click.option("--gpu", is_flag=True, help="take one that no other job has, if there are any")
def notebook(notebook, output, given, threads, gpu):
    """Run NOTEBOOK through papermill into OUTPUT, its progress on stderr."""
    from explib.study import notebooks

    notebooks.run(notebook, output, json.loads(given), threads, gpu)


@cli.command()
@parameters("prune")
@answer("left")
def prune(params):
    """Choose masks, count what they leave, write them to job_dir."""
    from explib.study import networks

    dense = networks.load_dense(params)
    masks = networks.choose_masks(params, dense)
    path = networks.save_masks(params, masks)
    return {"masks": str(path), **networks.counts(params, dense, masks)}


@cli.command()
@parameters("flops")
@answer("left")
def flops(params):
    """Multiply-adds, by the published convention and counted."""
    from explib.study import networks

    trained = params.resume or networks.dense_path(params).is_file()
    if not trained:
        click.echo(f"{params.arch}: not trained yet, so masks of fresh weights", err=True)
    dense = networks.load_dense(params) if trained else networks.fresh(params)
    return networks.counts(params, dense, networks.choose_masks(params, dense))


@cli.command()
@parameters("baseline")
@answer("run")
def baseline(params):
    """Train the dense network, or with resume load and evaluate one."""
    from explib.study import runs

    return runs.baseline(params)


@cli.command()
@parameters("finetune")
@answer("run")
def finetune(params):
    """Prune and fine-tune; goes on where it was interrupted."""
    from explib.study import runs

    return runs.finetune(params)


@cli.command()
@click.argument("files", nargs=-1, required=True, type=click.Path())
@click.option("--seeds", default=1, show_default=True, help="seeds of each run, from 0")
@click.option("--seconds", default=0.0, help="begin no run that may end later than this; 0: no end")
@click.option("--epochs", type=float, help="of every run, instead of what its file says")
@click.option(
    "--at-once", type=click.IntRange(1), default=1, show_default=True, help="runs that share a GPU"
)
@results_dir
def batch(files, seeds, seconds, epochs, at_once, results_dir):
    """Run several YAML FILES in one process.

    One after another, or several at once on one GPU. Baselines (NAME-baseline.yaml) come first,
    with their own seed only: all runs of a network start from the same one. What is done is not
    done again, what was interrupted goes on; a run that fails is reported, and the others go on.
    """
    from explib.study import batch as batches

    failed, changes = 0, {} if epochs is None else {"epochs": epochs}
    for lost, line in batches.run(files, seeds, seconds, results_dir, at_once=at_once, **changes):
        failed += lost
        click.echo(line)
    sys.exit(1 if failed else 0)


@cli.command()
@click.argument("archs", metavar="[ARCH]...", nargs=-1)
@click.option("--seeds", default=3, show_default=True, help="mask seeds where chance has a say")
@click.option("--criterion", multiple=True, help="another one, package.module:function")
@results_dir
@answer("done")
def controls(archs, seeds, criterion, results_dir):
    """Top-1 of every criterion before fine-tuning, on CIFAR-10.

    ARCH: resnet_56 (default) or vgg_16_bn, each with a record of its own in results_dir/bench; what
    that has already is not measured again. Minutes each.
    """
    from explib.study import controls as measuring

    starts = [measuring.start_of(arch) for arch in archs or ["resnet_56"]]
    rows = (
        row for start in starts for row in measuring.measure(start, results_dir, seeds, criterion)
    )
    return each(rows, "control")


@cli.command()
@click.option("-f", "--file", type=click.Path(), help="recipes  [default: params/recipes.yaml]")
@results_dir
@answer("done")
def recipes(file, results_dir):
    """Compare training recipes after equal epochs, on a validation split.

    What is done is not done again, and what was interrupted goes on. Writes
    results_dir/bench/recipes.json. Hours without a GPU.
    """
    from explib.study import recipes as comparing

    return each(comparing.compare(file, results_dir), "recipe")


@cli.command()
@click.argument("network", type=click.Path())
@click.argument("images", nargs=-1, required=True, type=click.Path())
@click.option(
    "--top", default=1, show_default=True, type=click.IntRange(1), help="classes of an image"
)
@click.option(
    "--batch-size", default=64, show_default=True, type=click.IntRange(1), help="images at once"
)
@click.option(
    "--threads", type=click.IntRange(0), default=0, help="CPU threads; 0: as many as torch takes"
)
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16", "fp16", "int8"]),
    help="default: int8 of a file saved so, else fp32",
)
@answer("ran", passed=lambda found: not found["unreadable"])
def run(network, images, top, batch_size, threads, dtype):
    """Class and score of each of the IMAGES by a NETWORK.

    NETWORK: a file of engine.save, of any architecture, or a compact one of the study. IMAGES:
    files, or folders of them. Scores are softmax; the last line says how fast it was, and with
    what. What is no readable image is said, and exit status 1 at the end.
    """
    import torch

    from explib import engine
    from explib.engine import images as reading
    from explib.training.inference import TYPES

    types = TYPES | {"int8": torch.int8}
    files = reading.found(images)
    with warnings.catch_warnings(record=True) as told:
        fast = engine.load(network, dtype=dtype and types[dtype], threads=threads or None)
    for warning in told:
        click.echo(f"{network}: {warning.message}", err=True)
    how = reading.reading(fast.about, fast.shape)
    unreadable = []

    def classified():
        for row in reading.classify(fast, how, files, batch_size, top):
            if "error" in row:
                click.echo(f"Error: {row['error']}", err=True)
                unreadable.append(row)
            else:
                yield row

    rows = each(classified(), "classified")
    return {"images": rows, "unreadable": unreadable, "ran": fast.report}


@cli.command()
@click.argument("network", type=click.Path())
@click.argument("output", type=click.Path())
@answer("paths")
def export(network, output):
    """Write a NETWORK as ONNX, its pruned kernels as zeros.

    NETWORK: a file as of `run`. OUTPUT: such as network.onnx. Needs onnx (pip install
    "explib[peers]").
    """
    from explib import engine

    return [str(engine.save_onnx(output, network))]


@cli.command()
@click.argument("network", type=click.Path())
@data_dir
@answer("evaluated")
def evaluate(network, data_dir):
    """Top-1 of a NETWORK of the study on its test images.

    NETWORK: a compact safetensors file. A row for fp32 in torch, then one for the engine in each
    type that this processor computes in, those of 16 bits also with the undecided images computed
    again.
    """
    from explib.study.verify import verify

    return [{"network": network, **row} for row in verify(network, data_dir)]


@cli.command()
@click.argument("files", metavar="[FILE]...", nargs=-1, type=click.Path())
@data_dir
@results_dir
@answer("verified", passed=lambda found: all(row["passed"] for row in found["worst"]))
def verify(files, data_dir, results_dir):
    """Measure networks anew, beside the accuracy that they claim.

    Without a FILE all of results_dir/checkpoints/cifar10, whose rows go to results_dir/bench. Exit
    status 1 where one is off by more than rounding explains.
    """
    from explib.report import text
    from explib.study import verify as verifying

    paths = files or verifying.shipped(results_dir)
    click.echo(text.ACCURACY)
    rows = each(verifying.verify_all(paths, data_dir), "accuracy")
    path = "" if files else str(verifying.write(rows, results_dir))
    return {"rows": rows, "worst": verifying.worst(rows), "file": path}


@cli.command()
@results_dir
@click.option("--dataset", default="cifar10", show_default=True, help="whose records")
@click.option("--figures/--no-figures", default=True, show_default=True, help="figures, too")
@click.option("--readme", is_flag=True, help="fill README.md, results/README.md, docs/*.md, too")
@answer("paths")
def tables(results_dir, dataset, figures, readme):
    """Write every table and figure that the records allow."""
    Params(dataset=dataset)  # is there such a one?
    if readme and dataset != "cifar10":
        raise ParamError(f"dataset: {dataset!r}, but README.md has the tables of 'cifar10'")
    from explib.report import tables as making

    written = making.build(results_dir, dataset, resolve(".") if readme else "")
    if figures:
        from explib.report import figures as drawing

        written += drawing.build(results_dir, dataset)
    return [str(path) for path in written]


@cli.command()
@click.argument("page", default="", type=click.Path())
@results_dir
@click.option("--dataset", default="cifar10", show_default=True, help="whose records")
def report(page, results_dir, dataset):
    """Write the findings, figures and tables as one HTML PAGE.

    By default results_dir/report.html. Pictures are inside the page, nothing is fetched when it is
    read; its numbers lead to their records in results_dir.
    """
    from explib.report import page as pages

    click.echo(pages.build(results_dir, dataset, page))


@cli.group(cls=Group)
def bench():
    """Measure speed: scoring, training, processes, inference, runtime.

    Each writes what it measures to results_dir/bench.
    """


@bench.command()
@results_dir
@answer("values")
def scoring(results_dir):
    """Scores and masks on one core, beside a plain loop."""
    from explib.study.bench import scoring as measuring
    from explib.study.records import write_bench

    found = measuring.measure()
    write_bench("scoring", found, results_dir)
    return found


@bench.command()
@data_dir
@results_dir
@answer("ratios")
def training(data_dir, results_dir):
    """Training and evaluation, beside a plain loop.

    On CIFAR-10: about seven minutes on two cores.
    """
    from explib.study.bench import training as measuring

    params = measuring.usual(data_dir=data_dir)
    rows = each(measuring.record(params, results_dir), "training")
    return {"rows": rows, "ratios": measuring.ratios(rows)}


@bench.command()
@data_dir
@results_dir
@answer("done")
def gpu(data_dir, results_dir):
    """Whether a GPU trains right, and how many runs at once it trains fastest.

    On CIFAR-10, about three minutes. An interrupted measurement goes on where it was.
    """
    from explib.study.bench import gpu as measuring

    return each(measuring.measure(measuring.usual(data_dir=data_dir), results_dir), "gpu")


@bench.command()
@click.argument("counts", metavar="[COUNT]...", nargs=-1, type=click.IntRange(1))
@results_dir
@answer("done")
def processes(counts, results_dir):
    """One fine-tuning in COUNT processes, by default 1, 2 and 4."""
    from explib.study.bench import processes as measuring

    return each(measuring.measure(counts or (1, 2, 4), results_dir), "growth")


@bench.command()
@click.argument("networks", metavar="[NETWORK]...", nargs=-1)
@click.option(
    "--threads", type=click.IntRange(0), default=0, help="CPU threads; 0: as many as torch takes"
)
@click.option("--seconds", default=0.5, show_default=True, help="of calls for each figure")
@click.option("--way", "ways", multiple=True, help="only this one, by its name; several times")
@click.option("--sweep", is_flag=True, help="the engine at five densities, too")
@click.option("--quick", is_flag=True, help="the smallest batch only; nothing is written")
@click.option("--again", is_flag=True, help="also what is measured already")
@results_dir
@answer("done")
def inference(networks, results_dir, sweep, ways, **options):
    """Images per second of pruned NETWORKs beside the best alternatives.

    The engine, and the dense network in torch.compile, OpenVINO and ONNX Runtime (pip install
    "explib[peers]"), by turns: resnet_56, vgg_16_bn, resnet18, resnet50, mobilenet_v2. An
    interrupted measurement goes on with the next network.
    """
    from explib.study.bench import comparison

    rows = comparison.measure(
        networks or tuple(comparison.CASES),
        names=ways or comparison.USUAL,
        densities=comparison.DENSITIES if sweep else (),
        results_dir=results_dir,
        **options,
    )
    return each(rows, "compared")


@bench.command()
@click.option(
    "--threads", type=click.IntRange(0), default=0, help="CPU threads; 0: as many as torch takes"
)
@results_dir
@answer("speeds")
def runtime(threads, results_dir):
    """Images per second of the study's networks, by density and accuracy.

    Dense in torch and in the engine; also draws its figures. Minutes, most of them in
    torch.compile.
    """
    from explib.report import inference_plots, plots
    from explib.study.bench import inference as measuring
    from explib.study.records import write_bench

    found = measuring.measure(threads=threads, results_dir=results_dir)
    write_bench("runtime-MACHINE", found, results_dir)
    for name, figure in inference_plots.figures(found).items():
        plots.save(figure, resolve(results_dir) / "figures/cifar10" / name)
    return found


if __name__ == "__main__":
    cli(prog_name="explib")

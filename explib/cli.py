"""What the commands of `explib.__main__` are made of: options, answers, one-line errors."""

import contextlib
import dataclasses
import functools
import inspect
import json
import os
import re
import sys
import types
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import get_args, get_origin, get_type_hints

import click
from click.shell_completion import CompletionItem

from explib.errors import ParamError
from explib.params import CHOICES, Params, from_mapping, from_yaml

_NETWORK = (
    "arch", "dataset", "data_dir", "image_size", "normalization", "resume", "results_dir",
    "threads",
)  # fmt: skip
_MASKS = (
    "compress_rate", "start_cov", "pruning_way", "survivors", "groups", "keep_floor",
    "binary_floor", "strict_rate", "bias_in_score", "resume_mask", "seed", "mask_seed",
)  # fmt: skip
_TRAINING = (
    "data_url", "epochs", "batch_size", "micro_batch", "lr", "lr_schedule", "lr_decay_step",
    "momentum", "nesterov", "weight_decay", "label_smoothing", "freeze_bn", "validation",
    "limit_train", "limit_test", "seed", "device", "precision", "compile", "workers",
)  # fmt: skip
FIELDS = {
    "score": (*_NETWORK, "start_cov", "groups", "bias_in_score"),
    "prune": (*_NETWORK, *_MASKS, "name", "job_dir"),
    "flops": (*_NETWORK, *_MASKS),
    "baseline": (*_NETWORK, *_TRAINING, "name", "job_dir"),
    "finetune": tuple(field.name for field in dataclasses.fields(Params)),
}
"""The fields that change what a command computes, or where it looks and writes.

A YAML file may hold all the others, too: it describes a whole configuration.
"""


class Command(click.Command):
    """A command whose help lists its options by section."""

    def format_options(self, ctx, formatter):
        sections: dict[str, list] = {}
        for option in self.get_params(ctx):
            if isinstance(option, click.Option) and (line := option.get_help_record(ctx)):
                sections.setdefault(getattr(option, "section", "Options"), []).append(line)
        for title, lines in sections.items():
            with formatter.section(title):
                formatter.write_dl(lines)


class Group(click.Group):
    """Commands; errors are one line and an exit status instead of a traceback."""

    command_class = Command

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except click.exceptions.Exit:  # a RuntimeError, too
            raise
        except ParamError as error:
            raise click.UsageError(str(error)) from None
        except ModuleNotFoundError as error:
            text = f'{error.name} is not installed; pip install "explib[study]"'
            told = str(error) if "pip install" in str(error) else text  # which extra brings it
            raise click.ClickException(told) from None
        except (ValueError, OSError, RuntimeError) as error:
            raise click.ClickException(" ".join(str(error).split())) from None


class Sections(Group):
    """Commands listed by section: {title: names of commands}."""

    def __init__(self, *args, sections: dict[str, tuple[str, ...]], **settings):
        super().__init__(*args, **settings)
        self.sections = sections

    def format_commands(self, ctx, formatter):
        for title, names in self.sections.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(name, self.commands[name].get_short_help_str(70)) for name in names]
                )


def answer(show: str, passed: Callable = lambda result: True):
    """The decorator that prints what a command returns: as --json, else by a function of text.

    show: its name in explib.report.text. With --json standard output is JSON alone, and what the
    command itself prints goes to standard error. Exit status 1 where `passed` says no.
    """

    def wrap(function):
        @functools.wraps(function)
        def command(as_json, **options):
            with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
                result = function(**options)
            if os.environ.get("RANK", "0") == "0":  # under torchrun one process speaks for all
                click.echo(json.dumps(result, indent=1) if as_json else _text(show)(result))
            if not passed(result):
                sys.exit(1)

        return click.option("--json", "as_json", is_flag=True, help="print JSON alone")(command)

    return wrap


def each(rows: Iterable[dict], show: str) -> list[dict]:
    """All rows, each printed as it comes, by a function of explib.report.text."""
    found, text = [], _text(show)
    for row in rows:
        click.echo(text(row))
        found.append(row)
    return found


def _text(name: str) -> Callable:
    return getattr(import_module("explib.report.text"), name)


class _Option(click.Option):
    def __init__(self, *args, section: str, **settings):
        super().__init__(*args, **settings)
        self.section = section


class _Known(click.ParamType):
    """Text with known values, for completion; Params says which others are right."""

    name = "text"

    def __init__(self, values: list[str]):
        self.values = values

    def shell_complete(self, ctx, param, incomplete):
        return [CompletionItem(value) for value in self.values if value.startswith(incomplete)]


@functools.cache
def _documented() -> dict[str, tuple[str, str]]:
    """The section and the comment of every field, from the source of Params."""
    known = {field.name for field in dataclasses.fields(Params)}
    found, section, field, blank = {}, "", None, False
    for line in inspect.getsource(Params).splitlines():
        if blank and line.startswith("    # "):
            section = line.removeprefix("    # ")
        blank = line.strip() == ""
        if blank or line.startswith("    #"):
            field = None
        name = re.match(r"    (\w+): ", line)
        if name and name[1] in known:
            field = name[1]
            found[field] = section, ""
        if field and (comment := re.search(r"  # (.*)", line)):
            found[field] = section, comment[1]
    return found


def _option(field: dataclasses.Field):
    """The decorator that adds the option of one field."""
    kind = get_type_hints(Params)[field.name]
    kinds = get_args(kind) if get_origin(kind) is types.UnionType else (kind,)
    values = [value for value in CHOICES.get(field.name, ()) if value]
    section, comment = _documented()[field.name]
    return click.option(
        *named(field.name),
        cls=_Option,
        section=section,
        type=_Known(values) if values else kinds[0],
        metavar="|".join(values) or None,
        help=f"{comment}  [default: {field.default!r}]".strip(),
    )


def named(field: str) -> tuple[str, ...]:
    """The spellings of an option, and the name of its value: `--data_dir` is `--data-dir`, too."""
    return (*dict.fromkeys([f"--{field}", f"--{field.replace('_', '-')}"]), field)


def parameters(command: str):
    """The decorator that adds the options of FIELDS[command] and a YAML file, read as `params`."""

    def add(function):
        @functools.wraps(function)
        def read(file, **options):
            fields = {name: options.pop(name) for name in FIELDS[command]}
            given = {name: value for name, value in fields.items() if value is not None}
            params = from_yaml(file, **given) if file else from_mapping(given)
            return function(params=params, **options)

        for field in reversed(dataclasses.fields(Params)):
            if field.name in FIELDS[command]:
                read = _option(field)(read)
        text = "YAML file like those in params/, with any of their fields"
        return click.option("-f", "--file", type=click.Path(), help=text)(read)

    return add


data_dir = click.option(
    *named("data_dir"), default="", help="folder of the data; empty: $EXPLIB_DATA, else data/"
)
results_dir = click.option(
    *named("results_dir"),
    default=Params.results_dir,
    show_default=True,
    help="folder of the results: what is read and written lies below it",
)

"""The command line of reproduction: which table and rows, whether to print, to run or to collect, and at what rate."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_robust.evaluation.environment import REDACTED, command_line, holds_secret
from hf_robust.flags import ShortErrors
from hf_robust.reproduction.hours import Rate
from hf_robust.reproduction.stages import Plan
from hf_robust.reproduction.tables import Dataset, Row, Table, choose_rows, load_dataset, load_table, table_names

__all__ = ["ReproduceRun", "parse_reproduce"]

_FOLDER = "outputs/reproduction"
_EPILOG = """\
in order:
  hf-robust reproduce                                   which tables there are
  hf-robust reproduce cifar10                           rows, published figures, predicted hours, all commands
  hf-robust reproduce cifar10 --only dynacl/slf         one row; dynacl is all its modes, "*/slf" all methods
  hf-robust reproduce cifar10 --only dynacl/slf --smoke --run
                                                        every stage in seconds on the digits: do they work?
  hf-robust reproduce cifar10 --only dynacl/slf --run   the row in full; stopped, the same command goes on
  hf-robust reproduce cifar10 --collect                 published, ours, gap and budget, as far as rows are finished

A row is pre-training, post-processing where the method has it, fine-tuning, evaluation. Rows that stand on the same
encoder, also of other tables, share it when they share --output_dir. Predicted hours are predictions: forward passes
counted, over an assumed rate, until --seconds_per_epoch or --benchmark says a measured one.
"""


@dataclass
class ReproduceRun:
    """Everything a reproduction needs, parsed and checked.

    Args:
        table ([`Table`], *optional*): `None`: list the tables.
        rows (`tuple[Row, ...]`): chosen ones.
        plan ([`Plan`]): where and how.
        given ([`Rate`]): assumed, or of a number on the command line.
        run (`bool`): run the commands.
        collect (`bool`): read the reports.
        benchmark (`Path`, *optional*): file of the benchmarks that says the rate instead.
    """

    table: Table | None
    rows: tuple[Row, ...]
    plan: Plan
    given: Rate
    run: bool = False
    collect: bool = False
    benchmark: Path | None = None

    @property
    def rate(self) -> Rate:
        """For the predicted hours; raises `ValueError` or `OSError` for a file that is none of the benchmarks."""
        return self.given if self.benchmark is None else Rate.of_benchmark(self.benchmark)


def parse_reproduce(
    argv: Sequence[str] | None = None, *, description: str | None = None, prog: str | None = None
) -> ReproduceRun:
    """Parse the flags of `hf-robust reproduce`.

    Args:
        argv (`Sequence[str]`, *optional*): arguments; default: those of the process.
        description (`str`, *optional*): first lines of `--help`.
        prog (`str`, *optional*): name of the command in messages; default: that of the script.

    Returns:
        [`ReproduceRun`]: the run. Errors print one line to stderr and exit with status 2.
    """
    parser = _parser(description, prog)
    options = parser.parse_args(argv)
    try:
        return _build(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _parser(description: str | None, prog: str | None) -> ShortErrors:
    parser = ShortErrors(
        prog=prog,
        description=description,
        epilog=_EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [TABLE] [--only ROW ...] [--run | --collect] [--FLAG VALUE]",
    )
    add = parser.add_argument
    add("table", nargs="?", metavar="TABLE", help=f"{', '.join(table_names())}; without one they are listed.")
    add("--only", nargs="+", default=[], metavar="ROW", help="Rows by name, beginning or pattern.")
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--run", action="store_true", help="Run the commands, then collect; again: go on after a stop."
    )
    either.add_argument("--collect", action="store_true", help="Write TABLE.md and TABLE.json from finished rows.")
    add("--smoke", action="store_true", help="Every stage in seconds: 200 digits, a thin network; tests the commands.")
    add(
        "--output_dir",
        "--output-dir",
        help=f"Holds encoders/, classifiers/, state/ and tables; default: {_FOLDER}, of a smoke test {_FOLDER}_smoke.",
    )
    add(
        "--data",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="Where your data sets are: stl10=PATH imagenet32=PATH, or cifar10=PATH with columns found by type, or "
        "cifar10=PATH:IMAGE_COLUMN:LABEL_COLUMN.",
    )
    add("--precision", default="bf16", help="Of trainings: bf16, or fp32 as published; evaluations are in float32.")
    add("--n_examples", "--n-examples", type=int, help="Judge so many test images; default: all, as published.")
    add("--pretrain_args", "--pretrain-args", default="", help="Further flags of pre-training in quotes.")
    add("--finetune_args", "--finetune-args", default="", help="Further flags of fine-tuning in quotes.")
    add(
        "--seconds_per_epoch",
        "--seconds-per-epoch",
        type=float,
        help="Predict hours from this: seconds of an ACL epoch of ResNet-18 on CIFAR-10 in bf16 on your GPU.",
    )
    add("--benchmark", type=Path, help="Likewise, from a file of python -m benchmarks --preset gpu_short --json FILE.")
    return parser


def _build(options: argparse.Namespace) -> ReproduceRun:
    for flag in ("run", "collect", "only", "smoke"):
        if getattr(options, flag) and options.table is None:
            raise ValueError(f"--{flag} is for one table, and none is named: known are {', '.join(table_names())}")
    if options.seconds_per_epoch is not None and options.benchmark is not None:
        raise ValueError("--seconds_per_epoch and --benchmark say the same thing: give one of them")
    rate = Rate.assumed()
    if options.seconds_per_epoch is not None:
        rate = Rate.of_epoch(options.seconds_per_epoch)
    if options.n_examples is not None and options.n_examples < 1:
        raise ValueError(f"n_examples must be 1 or more, got {options.n_examples}: leave it out for all images")
    plan = Plan(
        output_dir=os.path.normpath(options.output_dir or (f"{_FOLDER}_smoke" if options.smoke else _FOLDER)),
        data=dict(_dataset(text) for text in options.data),
        precision=options.precision,
        smoke=options.smoke,
        n_examples=options.n_examples,
        pretrain_args=_flags("pretrain_args", options.pretrain_args),
        finetune_args=_flags("finetune_args", options.finetune_args),
    )
    table = load_table(options.table) if options.table is not None else None
    rows = choose_rows(table, options.only) if table else ()
    return ReproduceRun(table, rows, plan, rate, options.run, options.collect, options.benchmark)


def _dataset(text: str) -> tuple[str, Dataset]:
    key, equals, where = text.partition("=")
    if not equals or not where:
        raise ValueError(f"--data says NAME=PATH, got {text!r}: write for example stl10=data/stl10")
    path, *columns = where.rsplit(":", 2)
    if len(columns) != 2:
        path, columns = where, []
    image, label = columns or (None, None)
    if holds_secret(where):
        raise ValueError(f"--data of {key} holds a login, which reports and state/ would keep: log in beforehand")
    path = os.path.expanduser(path)
    return key, dataclasses.replace(load_dataset(key), name=path, image_column=image, label_column=label)


def _flags(name: str, text: str) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"cannot read --{name} {text!r}: {error}; check the quotes") from None
    if REDACTED in command_line(["hf-robust", *words]):
        raise ValueError(
            f"--{name} holds an access token or password, which state/ would keep: leave it out, and log in by "
            "HF_TOKEN or hf auth login"
        )
    own = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("--")}
    taken = sorted(own & {"config", "output_dir", "dataset_name", "encoder", "mode", "resume_from_checkpoint"})
    if taken:
        raise ValueError(f"--{name} must leave --{taken[0]} out: it follows from the row")
    return words

"""The command line of model cards: which folders, and whether to write or to compare."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hf_robust.flags import ShortErrors

__all__ = ["parse_card"]


def parse_card(
    argv: Sequence[str] | None = None, *, description: str | None = None, prog: str | None = None
) -> argparse.Namespace:
    """Parse the flags of `hf-robust card`.

    Args:
        argv (`Sequence[str]`, *optional*): arguments; default: those of the process.
        description (`str`, *optional*): first lines of `--help`.
        prog (`str`, *optional*): name of the command in messages; default: that of the script.

    Returns:
        `argparse.Namespace`: `folders`, `check`, `license` and `hub_id`. Errors print one line to stderr and exit with
        status 2.
    """
    parser = ShortErrors(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="Folder of an encoder, classifier or adapter.")
    parser.add_argument(
        "--check", action="store_true", help="Change nothing; exit with status 1 when a card is stale."
    )
    parser.add_argument("--license", help="Licence identifier of the weights, such as apache-2.0; kept in the report.")
    parser.add_argument("--hub_id", "--hub-id", help="Repository that the loading example names; kept in the report.")
    options = parser.parse_args(argv)
    if options.check and (options.license or options.hub_id):
        flag = "--license" if options.license else "--hub_id"
        parser.error(f"--check changes nothing, got {flag} beside it: leave one of them out")
    return options

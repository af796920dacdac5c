"""The command line of publishing: which folder, to which repository."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hf_robust.flags import ShortErrors
from hf_robust.hub_folders import check_repo_id

__all__ = ["PushRun", "parse_push"]

_SWITCHES = ("--private", "--create_revision", "--dry_run")


@dataclass
class PushRun:
    """Everything a push needs, parsed and checked.

    Args:
        folder (`str`): of an encoder, a classifier, an adapter, a run, or coresets.
        repo_id (`str`): `"user/name"`.
        private (`bool`, *optional*): whether a new repository is private.
        revision (`str`, *optional*): branch.
        create_revision (`bool`): make the branch when it is missing.
        commit_message (`str`, *optional*): first line of the commit.
        base_model (`str`, *optional*): repository of the encoder of an adapter.
        dry_run (`bool`): check the folder and list its files, nothing else.
    """

    folder: str
    repo_id: str
    private: bool | None = None
    revision: str | None = None
    create_revision: bool = False
    commit_message: str | None = None
    base_model: str | None = None
    dry_run: bool = False


def parse_push(
    argv: Sequence[str] | None = None, *, description: str | None = None, prog: str | None = None
) -> PushRun:
    """Parse `hf-robust push DIR REPO`.

    Args:
        argv (`Sequence[str]`, *optional*): arguments; default: those of the process.
        description (`str`, *optional*): first lines of `--help`.
        prog (`str`, *optional*): name of the command in messages; default: that of the script.

    Returns:
        [`PushRun`]: the run. Errors print one line to stderr and exit with status 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(description, prog)
    values = vars(parser.parse_args(list(_spelled_out(argv))))
    try:
        check_repo_id(values["repo_id"])
    except ValueError as error:
        parser.error(str(error))
    return PushRun(**values)


def _parser(description: str | None, prog: str | None) -> ShortErrors:
    parser = ShortErrors(
        prog=prog,
        description=description,
        allow_abbrev=False,
        epilog="The login is that of `hf auth login`, or the token in HF_TOKEN; HF_ENDPOINT names another Hub.",
    )
    parser.add_argument(
        "folder", metavar="DIR", help="Folder of an encoder, classifier or adapter, output folder of a run, coresets."
    )
    parser.add_argument("repo_id", metavar="REPO", help="Repository user/name; it is made when missing.")
    parser.add_argument(
        "--private",
        **_switch(default=None),
        help="A new repository is private (false: public); default: the account's habit.",
    )
    parser.add_argument("--revision", help="Branch to push to; default: the main one.")
    parser.add_argument("--create_revision", **_switch(), help="Make the branch when it is missing.")
    parser.add_argument("--commit_message", help="First line of the commit.")
    parser.add_argument("--base_model", help="Of an adapter: the repository of its encoder, pushed before.")
    parser.add_argument("--dry_run", **_switch(), help="Check the folder and list its files, without any network.")
    return parser


def _switch(default: bool | None = False) -> dict[str, Any]:
    return {"nargs": "?", "const": True, "default": default, "type": _truth, "metavar": "true|false"}


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"write true or false, got {text!r}")
    return text.lower() == "true"


def _spelled_out(argv: Sequence[str]) -> Iterator[str]:
    """`--dry-run` as `--dry_run`, like the other commands; `--private DIR` as `--private true DIR`."""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            word = "--" + name[2:].replace("-", "_") + equals + value
        yield word
        if word in _SWITCHES and following.lower() not in ("true", "false", "") and not following.startswith("-"):
            yield "true"

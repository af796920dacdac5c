"""The command `hf-robust`: thin doors to the runs that `examples/` shows."""

from __future__ import annotations

import difflib
import importlib
import sys

import hf_robust

__all__ = ["main"]

# Command -> module under hf_robust.runs and what `--help` says first.
COMMANDS: dict[str, tuple[str, str]] = {
    "pretrain": ("pretrain", "Pre-train a robust encoder on any images, with or without labels."),
    "finetune": ("finetune", "Fine-tune an encoder into a robust classifier; held-out training images decide."),
    "evaluate": ("evaluate", "Measure a classifier, or an encoder by protocols: PGD, AutoAttack, corruptions."),
    "push": ("push", "Publish an encoder, classifier, adapter or coreset on the Hub, with its card."),
    "convert": ("convert", "Convert a published checkpoint (RobustSSL, robustness, RobustBench) to a folder."),
    "card": ("card", "Write model cards anew from their reports, or check them."),
    "reproduce": ("reproduce", "Print or run the commands behind the published tables; collect what they gave."),
    "demo": ("demo", "Attack an image in the browser: robust and plain model side by side."),
}
_PRETRAIN_WANTS = ("--config", "--dataset_name", "--dataset-name", "-h", "--help")


def main(argv: list[str] | None = None) -> None:
    """Run a command; mistakes end in one message and exit status 1 or 2.

    Args:
        argv (`list[str]`, *optional*): command and flags; default: those of the process.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(_help())
        sys.exit(0 if argv else 2)
    if argv[0] in ("--version", "version"):
        sys.stdout.write(f"hf_robust {hf_robust.__version__}\n")
        return
    command, *rest = argv
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        sys.stderr.write(f"hf-robust: error: unknown command {command!r}: {hint}known are {', '.join(COMMANDS)}\n")
        sys.exit(2)
    if command == "pretrain" and not any(word.partition("=")[0] in _PRETRAIN_WANTS for word in rest):
        sys.stderr.write(
            "hf-robust pretrain: error: nothing to train on: name images with --dataset_name (digits needs no "
            "download), or a file of flags with --config\nhf-robust pretrain: --help lists all flags\n"
        )
        sys.exit(2)
    module, description = COMMANDS[command]
    console = importlib.import_module("hf_robust.runs.console")
    run = importlib.import_module(f"hf_robust.runs.{module}")
    console.run_or_exit(run.main, rest, prog=f"hf-robust {command}", description=description)


def _help() -> str:
    lines = [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hf-robust COMMAND [--FLAG VALUE ...]",
            "",
            *lines,
            "",
            "hf-robust COMMAND --help lists the flags of a command. With several GPUs:",
            "accelerate launch -m hf_robust.commands COMMAND ...",
            "",
        ]
    )


if __name__ == "__main__":
    main()

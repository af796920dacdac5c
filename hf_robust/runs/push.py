"""The run behind `hf-robust push`: a folder is checked, listed and published; and how a training ends its own push."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_robust.publishing import Pushed, check_base, push_folder
from hf_robust.push_cli import PushRun, parse_push
from hf_robust.release_folder import Release, find_release
from hf_robust.runs.console import tell

__all__ = ["main", "push_result"]


def list_files(release: Release) -> None:
    """What goes along, and what stays."""
    tell(f"{release.kind} in {release.folder}: {len(release.files)} files, {release.size / 1e6:.1f} MB")
    for name, path in sorted(release.files.items()):
        tell(f"  {path.stat().st_size:>12,}  {name}")
    if release.left_out:
        shown = ", ".join(release.left_out[:8]) + (" ..." if len(release.left_out) > 8 else "")
        tell(f"  stays here: {shown}")


def report(pushed: Pushed) -> None:
    """Where it is now."""
    if not pushed.changed:
        tell(f"Everything was there already: {pushed.url} ({pushed.commit[:12]})")
        return
    gone = f", {len(pushed.removed)} older ones removed" if pushed.removed else ""
    tell(f"Published: {pushed.url} ({len(pushed.files)} files{gone}; commit {pushed.commit[:12]})")


def push(run: PushRun) -> Pushed | None:
    """Check, list, and unless it is a rehearsal publish."""
    release = find_release(run.folder)
    check_base(release, run.base_model)
    list_files(release)
    if run.dry_run:
        tell(f"Dry run: nothing was sent to {run.repo_id}.")
        return None
    return push_folder(
        run.folder,
        run.repo_id,
        private=run.private,
        revision=run.revision,
        create_revision=run.create_revision,
        commit_message=run.commit_message,
        base_model=run.base_model,
    )


def push_result(args: Any, folder: Path) -> None:
    """Publish what a training with `--push_to_hub` has left; a failure is told and stops nothing.

    Args:
        args ([`~hf_robust.training_args.RobustTrainingArguments`]): of the training.
        folder (`Path`): with the weights, the card and the pictures.
    """
    if not args.push_to_hub:
        return
    try:
        report(
            push_folder(
                folder,
                args.hub_model_id,
                private=args.hub_private_repo,
                revision=args.hub_revision,
                token=args.hub_token,
                commit_message="Training finished: report, card and pictures",
            )
        )
    except (OSError, ValueError) as error:
        tell(f"Not published: {error}")
        tell(f"Everything is in {folder}; publish it with: hf-robust push {folder} {args.hub_model_id}")


def main(argv: list[str] | None = None, **parsing: Any) -> None:
    """Publish a folder.

    Args:
        argv (`list[str]`, *optional*): flags; default: those of the process.
        parsing (`Any`): passed on to [`parse_push`].
    """
    pushed = push(parse_push(argv, **parsing))
    if pushed is not None:
        report(pushed)

"""A folder goes to the Hub: checked first, in one commit, again where the network fails; the folder stays as it is."""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from hf_robust.coresets.base import Coreset
from hf_robust.evaluation.report import EncoderReport
from hf_robust.hub_failures import Connection, PushError, not_logged_in
from hf_robust.hub_folders import check_repo_id, is_path
from hf_robust.model_card import model_card_text
from hf_robust.release_folder import CARD, Release, find_release, is_replaced

__all__ = ["Pushed", "prepare_repository", "push_folder"]

logger = logging.getLogger(__name__)

_MAIN = "main"
_REPORT, _CONFIG, _ADAPTER = "report.json", "config.json", "adapter_config.json"


@dataclass(frozen=True)
class Pushed:
    """What a push has done.

    Args:
        repo_id (`str`): `"user/name"`.
        kind (`str`): `"encoder"`, `"classifier"`, `"adapter"` or `"coreset"`.
        url (`str`): of the repository.
        commit (`str`): full hash; pass it as `revision` to load exactly this state.
        files (`tuple[str, ...]`): that are there now, of this push.
        removed (`tuple[str, ...]`): that an earlier push had left and this one replaced by nothing.
        changed (`bool`): `False` when everything was there already.
    """

    repo_id: str
    kind: str
    url: str
    commit: str
    files: tuple[str, ...]
    removed: tuple[str, ...]
    changed: bool


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    create_revision: bool = False,
    base_model: str | None = None,
    attempts: int = 3,
    timeout: float = 120.0,
) -> Pushed:
    """Publish an encoder, a classifier, an adapter or coresets: all files in one commit, or nothing.

    The folder is checked before any request and never written to. What the repository has already is not sent again,
    so that a second call finishes a push that was cut off. Files that an earlier push left there and that do not
    belong to this one (an older `native/`) go. Where the card is the one that the report gives, its loading example
    gets the name of the repository. Works against any Hub, see `HF_ENDPOINT`.

    Args:
        folder (`str` or `Path`): see [`~hf_robust.release_folder.find_release`].
        repo_id (`str`): `"user/name"`, or `"name"` for a repository of one's own; made when missing.
        private (`bool`, *optional*): for a new repository; default: the account's habit, mostly public. A repository
            that exists must be as asked.
        revision (`str`, *optional*): branch to push to. Defaults to the main one.
        commit_message (`str`, *optional*): first line of the commit. Defaults to `"Push <kind> with hf_robust"`.
        token (`str`, *optional*): default: `HF_TOKEN`, or that of `hf auth login`.
        create_revision (`bool`, defaults to `False`): make the branch, from the main one, when it is missing.
        base_model (`str`, *optional*): of an adapter: the repository of its encoder, when it names a folder.
        attempts (`int`, defaults to 3): tries per request.
        timeout (`float`, defaults to 120): seconds without a sign of life after which a request has failed.

    Returns:
        [`Pushed`]: where it is now.

    Raises:
        FileNotFoundError: When there is no such folder.
        ValueError: When the folder may not be published as it is, or `repo_id` cannot be a name.
        PushError: (an `OSError`) when the Hub refuses, or does not answer, in one sentence without any token.
    """
    check_repo_id(repo_id)
    release = find_release(folder)
    check_base(release, base_model)
    token = token or huggingface_hub.get_token()
    connection = Connection(repo_id, revision, token, attempts=attempts, timeout=timeout)
    connection = prepare_repository(
        connection, private=private, repo_type=release.repo_type, create_revision=create_revision
    )
    message = commit_message or f"Push {release.kind} with hf_robust"
    with tempfile.TemporaryDirectory(prefix="hf_robust-") as stage:
        files: dict[str, Path] = {**release.files, **_rewritten(release, connection.repo_id, base_model, Path(stage))}
        pushed = _commit(connection, release, files, message)
    logger.info("pushed %s %s to %s", release.kind, release.folder, pushed.url)
    return pushed


def check_base(release: Release, base_model: str | None) -> None:
    """Refuse an adapter whose encoder nobody else could load.

    Args:
        release ([`Release`]): what is to be published.
        base_model (`str`, *optional*): the name that its encoder shall get.

    Raises:
        ValueError: when the encoder is a folder of this machine, or `base_model` has no meaning.
    """
    if release.kind != "adapter":
        if base_model is not None:
            raise ValueError(f"base_model={base_model!r} is for an adapter, this is a {release.kind}: leave it out")
        return
    if base_model is not None:
        check_repo_id(base_model)
        return
    base = json.loads((release.folder / _ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base or is_path(str(base)):
        raise ValueError(
            f"the adapter belongs to the encoder {base!r}, a folder that nobody else has: push the encoder first, "
            "then the adapter with --base_model user/encoder (base_model=...)"
        )


def prepare_repository(
    connection: Connection,
    *,
    private: bool | None = None,
    repo_type: str = "model",
    create_revision: bool = False,
) -> Connection:
    """Make sure that there is a repository, and the branch, to push to.

    Args:
        connection ([`Connection`]): with the name as the user wrote it.
        private (`bool`, *optional*): see [`push_folder`].
        repo_type (`str`): `"model"` or `"dataset"`.
        create_revision (`bool`): make the branch when it is missing.

    Returns:
        [`Connection`]: with the full name.

    Raises:
        PushError: when there is no login, or the repository cannot be had as asked.
    """
    if not connection.token:
        raise not_logged_in()
    api, branch = connection.api, connection.revision
    if "/" not in connection.repo_id:
        owner = connection.ask(lambda: api.whoami()["name"])
        connection = dataclasses.replace(connection, repo_id=f"{owner}/{connection.repo_id}")
    of_it: dict[str, Any] = {"repo_id": connection.repo_id, "repo_type": repo_type}
    try:
        found = connection.ask(lambda: api.repo_info(**of_it), keep=(RepositoryNotFoundError,))
    except RepositoryNotFoundError:
        if branch not in (None, _MAIN) and not create_revision:
            raise PushError(
                f"there is no repository {connection.repo_id!r} yet, and a new one has no branch {branch!r}: leave "
                "the revision out, or have the branch made with --create_revision (create_revision=True)"
            ) from None
        connection.ask(lambda: api.create_repo(**of_it, private=private, exist_ok=True))
        found = None
    if found is not None and private is not None and bool(found.private) != private:
        now, asked = ("private", "public") if found.private else ("public", "private")
        raise PushError(
            f"the repository {connection.repo_id!r} is {now} and {asked} was asked for: change it in its settings on "
            "the Hub, or do not say which"
        )
    if branch not in (None, _MAIN) and create_revision:
        try:
            connection.ask(lambda: api.repo_info(**of_it, revision=branch), keep=(RevisionNotFoundError,))
        except RevisionNotFoundError:
            connection.ask(lambda: api.create_branch(**of_it, branch=str(branch), exist_ok=True))
    return connection


def _check_kind(repo_id: str, release: Release, there: set[str]) -> None:
    """An adapter in the place of a network, its own encoder even, or the other way round, is a slip of the name."""
    other, what = (_CONFIG, "a network") if release.kind == "adapter" else (_ADAPTER, "an adapter")
    if release.repo_type == "model" and other in there:
        raise PushError(
            f"the repository {repo_id!r} holds {what} ({other}), which this {release.kind} would replace: push it to "
            "a repository of its own, or delete that file on the Hub first"
        )


def _commit(connection: Connection, release: Release, files: dict[str, Path], message: str) -> Pushed:
    api = connection.api
    of_it: dict[str, Any] = {"repo_id": connection.repo_id, "repo_type": release.repo_type}
    here: dict[str, Any] = {**of_it, "revision": connection.revision or _MAIN}
    before: Any = connection.ask(lambda: api.repo_info(**here))
    there = {file.rfilename for file in before.siblings or ()}
    _check_kind(connection.repo_id, release, there)
    stale = sorted(name for name in there - set(files) if is_replaced(name)) if release.kind != "coreset" else []

    def commit() -> Any:
        adding = [CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())]
        removing = [CommitOperationDelete(name) for name in stale]
        return api.create_commit(**here, operations=[*adding, *removing], commit_message=message)

    made = connection.ask(commit)
    now: Any = connection.ask(lambda: api.repo_info(**of_it, revision=made.oid))
    absent = sorted(set(files) - {file.rfilename for file in now.siblings or ()})
    if absent:
        raise PushError(
            f"{', '.join(absent[:3])} did not arrive in {connection.repo_id!r}: does a .gitignore there leave such "
            "files out? Remove it and push again"
        )
    url = f"{api.endpoint}/{'datasets/' if release.repo_type == 'dataset' else ''}{connection.repo_id}"
    return Pushed(
        connection.repo_id, release.kind, url, made.oid, tuple(sorted(files)), tuple(stale), made.oid != before.sha
    )


# ---------------------------------------------------------------------- what is written anew for the repository
def _rewritten(release: Release, repo_id: str, base_model: str | None, stage: Path) -> dict[str, Path]:
    """Files that differ from those in the folder: they name the repository, or the encoder of an adapter."""
    if release.kind == "coreset":
        return {} if CARD in release.files else {CARD: _coreset_card(release, repo_id, stage)}
    out = _card(release, repo_id, base_model, stage)
    if base_model is not None:
        values = json.loads(release.files[_ADAPTER].read_text(encoding="utf-8"))
        values["base_model_name_or_path"] = base_model
        out[_ADAPTER] = stage / _ADAPTER
        out[_ADAPTER].write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return out


def _card(release: Release, repo_id: str, base_model: str | None, stage: Path) -> dict[str, Path]:
    """The card with the name of the repository, where nobody has written into it since it was made."""
    if _REPORT not in release.files:
        return {}
    try:
        report = EncoderReport.load(release.files[_REPORT])
    except ValueError as error:
        logger.warning("the card is pushed as it is: %s", error)
        return {}
    if model_card_text(report, release.folder) != release.files[CARD].read_text(encoding="utf-8"):
        return {}
    encoder = report.encoder | ({"name": base_model, "hub_id": base_model} if base_model else {})
    report = dataclasses.replace(report, hub_id=repo_id, encoder=encoder)
    (stage / CARD).write_text(model_card_text(report, release.folder), encoding="utf-8", newline="\n")
    return {_REPORT: report.save(stage), CARD: stage / CARD}


def _coreset_card(release: Release, repo_id: str, stage: Path) -> Path:
    names = sorted(name for name in release.files if name.endswith(".json"))
    lines = ["---", "tags:", "- hf_robust", "- coreset", "---", "", f"# {repo_id}", ""]
    lines += ["Images chosen for robust training with hf_robust: `indices` are positions in the data set named.", ""]
    lines += ["| file | data set | images | method | epoch |", "| --- | --- | --- | --- | --- |"]
    for name in names:
        chosen = Coreset.load(release.files[name])
        images, method = f"{len(chosen.indices)} of {chosen.dataset_size}", chosen.method.replace("|", "\\|")
        lines.append(f"| {name} | {chosen.dataset} | {images} | `{method}` | {chosen.epoch:g} |")
    lines += ["", f"Train on them again: download a file, then `hf-robust pretrain --coreset file:{names[0]}`.", ""]
    path = stage / CARD
    path.write_text("\n".join(lines), encoding="utf-8")
    return path

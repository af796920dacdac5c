"""Pushes from a training: what would leave now goes to the Hub at every save and at the end, and never stops it."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy

from hf_robust.evaluation.environment import collect_environment, redact
from hf_robust.hub_failures import Connection, PushError
from hf_robust.model_card import write_model_card
from hf_robust.publishing import Pushed, prepare_repository, push_folder
from hf_robust.run_facts import release_report

__all__ = ["HubCallback", "HubTrainer"]

logger = logging.getLogger(__name__)


class HubTrainer(Trainer):
    """A `transformers.Trainer` whose pushes publish a release: weights of one branch as safetensors, and their card.

    The stock pushes would upload the training model, pickled arguments and logs instead.
    """

    args: Any
    hub_model_id: Any
    adapter_base: str | None = None
    """Of an adapter: the repository of the encoder it was trained on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._background = _Background()
        self._environment: dict[str, Any] = {}
        super().__init__(*args, **kwargs)
        if self.args.push_to_hub:
            self._environment = collect_environment()  # now: the source tree may have moved on at the end
            self.add_callback(HubCallback(self))

    def save_release(self, directory: Path) -> Path:
        """Write what the training would leave if it ended now; subclasses know what that is.

        Args:
            directory (`Path`): target folder.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it releases: write save_release")

    def write_release(self, directory: Path, repo_id: str) -> Path:
        """Write what would leave now as a folder that can be pushed: weights, coreset, report and card.

        Args:
            directory (`Path`): target folder.
            repo_id (`str`): the repository that the card shall name.

        Returns:
            `Path`: the folder.
        """
        folder = self.save_release(directory)
        phases: Any = getattr(self, "phases", None)
        if phases is not None and phases.current is not None and phases.method.chooses:
            last = phases.current
            dataclasses.replace(last, method=redact(last.method)).save(folder / "coreset.json")
        self._environment = self._environment or collect_environment()
        report = release_report(self, folder, repo_id, self._environment)
        report.save(folder)
        write_model_card(report, folder)
        return folder

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, before training: a wrong name or a missing login ends the run now, not after hours.

        Args:
            token (`str`, *optional*): default: `args.hub_token`, or the login of this machine.
            private (`bool`, *optional*): default: `args.hub_private_repo`.

        Raises:
            PushError: when the Hub refuses; when it only does not answer, training goes on and pushes later.
        """
        if not self.is_world_process_zero():
            return
        args = self.args
        login = token or args.hub_token or huggingface_hub.get_token()
        connection = Connection(self._repo_id(None), args.hub_revision, login, attempts=1)
        try:
            private = args.hub_private_repo if private is None else private
            self.hub_model_id = prepare_repository(connection, private=private).repo_id
        except PushError as error:
            if not error.passing:
                raise
            logger.warning("training starts although %s", error)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        repo_id: str | None = None,
        attempts: int = 3,
        **kwargs: Any,
    ) -> Any:
        """Publish the encoder, classifier or adapter as it is now, with a card from what the trainer knows.

        Args:
            commit_message (`str`, *optional*): first line of the commit.
            blocking (`bool`, defaults to `True`): return after the push; else it goes on beside the training, and a
                failure is logged.
            token (`str`, *optional*): default: `args.hub_token`, or the login of this machine.
            revision (`str`, *optional*): branch. Defaults to `args.hub_revision`, or the main one.
            private (`bool`, *optional*): default: `args.hub_private_repo`.
            repo_id (`str`, *optional*): default: `args.hub_model_id`.
            attempts (`int`, defaults to 3): tries per request.
            kwargs (`Any`): further ones of [`~hf_robust.publishing.push_folder`].

        Returns:
            [`~hf_robust.publishing.Pushed`], or `None` when not blocking and on other processes than the first.

        Raises:
            ValueError: when there is no name, or the release cannot be published.
            PushError: when the Hub refuses or does not answer; nothing is lost here.
        """
        if not self.is_world_process_zero():
            return None
        name, args = self._repo_id(repo_id), self.args
        self._background.wait()
        place = tempfile.TemporaryDirectory(prefix="hf_robust-")
        try:
            folder = self.write_release(Path(place.name) / "above" / "release", name)
        except BaseException:
            place.cleanup()
            raise

        def push() -> Pushed:
            with place:
                return push_folder(
                    folder,
                    name,
                    private=args.hub_private_repo if private is None else private,
                    revision=revision or args.hub_revision,
                    commit_message=commit_message,
                    token=token or args.hub_token,
                    attempts=attempts,
                    **kwargs,
                )

        return push() if blocking else self._background.start(push)

    def _repo_id(self, asked: str | None) -> str:
        name = asked or self.hub_model_id or self.args.hub_model_id
        if not name:
            raise ValueError("push_to_hub needs the name of a repository: write push_to_hub(repo_id='user/name')")
        return str(name)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: [`HubCallback`] pushes, once the checkpoint is complete."""

    def _finish_current_push(self) -> None:
        self._background.wait()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the card is written from a report, see `model_card.write_model_card`."""


class HubCallback(TrainerCallback):
    """Pushes at every save (`hub_strategy="every_save"`) beside the training, and at its end.

    A push that fails is one warning, and the training goes on; the next one brings what it could not. While one is
    under way, saves are not pushed unless `hub_always_push`.

    Args:
        trainer ([`HubTrainer`]): has `push_to_hub`.
    """

    def __init__(self, trainer: HubTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After a checkpoint."""
        busy = self.trainer._background.busy and not args.hub_always_push
        if args.hub_strategy == HubStrategy.END or busy or state.global_step >= state.max_steps:
            return  # the end has its own
        self._push(f"Training in progress, step {state.global_step}", blocking=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After the last step; what failed on the way is brought now."""
        self._push(f"End of training, step {state.global_step}", blocking=True)

    def _push(self, message: str, *, blocking: bool) -> None:
        try:
            # one try on the way, since the next save is another one
            self.trainer.push_to_hub(message, blocking, attempts=3 if blocking else 1)
        except Exception as error:  # noqa: BLE001 - nothing that happens here may stop a training
            self.trainer._background.warn(error)


class _Background:
    """At most one push beside the training, and what is said about those that fail."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._told = ""

    @property
    def busy(self) -> bool:
        """Whether a push is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, push: Callable[[], Any]) -> None:
        """Push in a thread that ends with the process."""

        def run() -> None:
            try:
                push()
                self._told = ""
            except Exception as error:  # noqa: BLE001 - nothing that happens here may stop a training
                self.warn(error)

        self._thread = threading.Thread(target=run, name="hf_robust push", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the push under way is over."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def warn(self, error: Exception) -> None:
        """Say it once, until it is another failure."""
        text = redact(str(error) or type(error).__name__)
        logger.log(logging.DEBUG if text == self._told else logging.WARNING, "not pushed to the Hub: %s", text)
        self._told = text

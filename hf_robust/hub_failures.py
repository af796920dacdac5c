"""What can go wrong between here and the Hub, in one sentence each; and trying again where that may help.

Nothing said here holds an access token, whatever the server answered.
"""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_robust.evaluation.environment import REDACTED, holds_secret, redact

__all__ = ["Connection", "PushError", "not_logged_in"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_PASSING = (408, 412, 429, 500, 502, 503, 504)  # of HTTP: worth another try

# What the client raises where an answer is JSON, but of another kind: a proxy between here and the Hub, say.
_UNREADABLE = (LookupError, TypeError, AttributeError)


class PushError(OSError):
    """A push that did not happen, in one sentence; `passing` says whether another try may succeed."""

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


@dataclass(frozen=True)
class Connection:
    """One repository of one Hub, talked to patiently.

    Args:
        repo_id (`str`): `"user/name"`.
        revision (`str`, *optional*): branch; `None` is the main one.
        token (`str`, *optional*): never shown.
        attempts (`int`): tries per request, 1 or more, beyond those of `huggingface_hub` itself.
        timeout (`float`): seconds without a sign of life after which a request has failed.
        wait (`float`): seconds before the second try; doubled before each further one.
    """

    repo_id: str
    revision: str | None
    token: str | None
    attempts: int = 3
    timeout: float = 120.0
    wait: float = 1.0

    def __repr__(self) -> str:
        return f"Connection({self.repo_id!r})"

    @property
    def api(self) -> huggingface_hub.HfApi:
        """The client, with the token inside."""
        return huggingface_hub.HfApi(token=self.token)

    def ask(self, request: Callable[[], Result], keep: tuple[type[Exception], ...] = ()) -> Result:
        """Make a request, again after a pause where the failure may pass.

        Args:
            request (`Callable`): called without arguments, once per try.
            keep (`tuple`): exceptions that the caller wants as they are.

        Returns:
            What the request returns.

        Raises:
            PushError: After the last try, or at once for a failure that stays.
        """
        for attempt in range(1, self.attempts + 1):
            try:
                with _deadline(self.timeout):
                    return request()
            except keep:
                raise
            except Exception as error:
                if not _of_the_network(_first_cause(error)):
                    raise
                failure = self.explain(error)
                told = "".join(traceback.format_exception(error))
                secret = holds_secret(told) or bool(self.token and self.token in told)
                if not failure.passing or attempt == self.attempts:
                    raise failure from (None if secret else error)
            pause = self.wait * 2 ** (attempt - 1)
            logger.info("%s; try %d of %d in %g s", failure, attempt + 1, self.attempts, pause)
            time.sleep(pause)
        raise AssertionError("unreachable")

    def explain(self, error: Exception) -> PushError:
        """The failure in one sentence, with the way out.

        Args:
            error (`Exception`): of a request.

        Returns:
            `PushError`: without any token.
        """
        error, where = _first_cause(error), huggingface_hub.constants.ENDPOINT
        status = getattr(getattr(error, "response", None), "status_code", 0)
        repo = f"{self.repo_id!r}"
        if isinstance(error, OfflineModeIsEnabled):
            return PushError("nothing can be pushed in offline mode: unset HF_HUB_OFFLINE and push again")
        if isinstance(error, RevisionNotFoundError):
            return PushError(
                f"the repository {repo} has no branch {self.revision!r}: leave the revision out for its main branch, "
                "or have the branch made with --create_revision (create_revision=True)"
            )
        if status == 401:
            return PushError(
                f"the Hub at {where} does not accept this login for {repo} (401): log in again with `hf auth login`, "
                "or put a token with write permission into HF_TOKEN"
            )
        if status == 403:
            return PushError(
                f"this login may not write to {repo} (403): use a token with write permission, join the organisation, "
                "or name a repository of your own"
            )
        if isinstance(error, RepositoryNotFoundError):
            return PushError(
                f"there is no repository {repo} that this login can see (404): check the name, or use a token that "
                "may read it"
            )
        again = "nothing was changed there and the folder here is as it was; push again later, it goes on from there"
        if status in _PASSING:
            what = {412: "somebody else wrote to it meanwhile", 429: "too many requests"}.get(status, "it failed")
            return PushError(f"the Hub at {where} did not take {repo} ({status}, {what}): {again}", passing=True)
        if status:
            return PushError(f"the Hub refused {repo} ({status}: {self._first_line(error)}): correct this, push again")
        if isinstance(error, (json.JSONDecodeError, *_UNREADABLE)):
            return PushError(f"the Hub at {where} gave no readable answer: {again}", passing=True)
        if isinstance(error, ValueError):
            return PushError(f"{repo} cannot be pushed ({self._first_line(error)}): correct this, push again")
        kind = f"{type(error).__name__}: {self._first_line(error)}".rstrip(": ")
        return PushError(f"no answer from the Hub at {where} ({kind}): {again}", passing=True)

    def _first_line(self, error: Exception) -> str:
        text = " ".join(str(getattr(error, "server_message", None) or error).split())[:200]
        return redact(text.replace(self.token, REDACTED) if self.token else text)


def not_logged_in() -> PushError:
    """The error where there is no token at all.

    Returns:
        `PushError`: to be raised.
    """
    return PushError(
        "not logged in: publishing needs a token with write permission; log in with `hf auth login`, or put one into "
        "HF_TOKEN"
    )


def _first_cause(error: Exception) -> Exception:
    """What happened to an upload; the client wraps it."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _of_the_network(error: Exception) -> bool:
    """Whether the Hub or the way to it failed, rather than this program."""
    # The client's HTTP library changed its name between versions, so its errors are known by theirs.
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, (HfHubHTTPError, OSError, ValueError, *_UNREADABLE)) or bool(
        names & {"TransportError", "RequestError", "RuntimeError"}  # RuntimeError: of hf_xet
    )


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """The client itself would wait for ever."""
    client: Any = huggingface_hub.get_session()
    before, client.timeout = client.timeout, seconds
    try:
        yield
    finally:
        client.timeout = before

"""Where a number comes from: versions, hardware, commit and the command line, without secrets."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hf_robust

__all__ = ["collect_environment", "command_line", "holds_secret", "redact"]

REDACTED = "REDACTED"
_PACKAGES = ("torch", "torchvision", "transformers", "timm", "huggingface_hub", "accelerate", "datasets", "numpy")
# Hub tokens are "hf_" and 34 letters or digits; half of that is caught too, our own name is not.
_TOKEN = re.compile(r"\b(?:hf_(?!robust)[A-Za-z0-9]{10,}|api_org_[A-Za-z0-9]{10,})")
_URL_LOGIN = re.compile(r"(?<=://)[^/\s@]+@")
_HOME = re.compile(r"(?<![\w.~])/(?:home|Users)/[^/\s'\"]+")
_SECRET_WORDS = {"token", "password", "passwd", "secret", "credential", "credentials", "apikey"}


def redact(text: str) -> str:
    """Remove access tokens, logins inside addresses and home folders from a text.

    Args:
        text (`str`): any text that is going to be published.

    Returns:
        `str`: the text with tokens replaced by `REDACTED` and home folders by `~`.
    """
    text = _URL_LOGIN.sub(f"{REDACTED}@", _TOKEN.sub(REDACTED, text))
    home = os.path.expanduser("~").rstrip("/")
    if len(home) > 1:
        text = re.sub(rf"(?<![\w.~]){re.escape(home)}(?![\w.-])", "~", text)
    return _HOME.sub("~", text)


def holds_secret(text: str) -> bool:
    """Whether a text holds what looks like an access token, or a login inside an address.

    Args:
        text (`str`): any text.
    """
    return bool(_TOKEN.search(text) or _URL_LOGIN.search(text.replace(f"{REDACTED}@", "")))


def command_line(argv: Sequence[str] | None = None) -> str:
    """Write the command line as typed, without its secrets.

    The value after a flag whose name speaks of a token, password or secret is replaced whatever it looks like;
    the rest goes through `redact`.

    Args:
        argv (`Sequence[str]`, *optional*): program and arguments; default: those of this process.

    Returns:
        `str`: one line that a shell reads back.
    """
    program, *arguments = sys.argv if argv is None else argv
    words: list[str] = _program(program)
    hide_next = False
    for word in arguments:
        flag, equals, value = word.partition("=")
        secret = _names_secret(flag)
        if hide_next and not word.startswith("--"):
            word = REDACTED
        elif secret and value:
            word = f"{flag}={REDACTED}"
        hide_next = secret and not equals and flag.startswith("-")
        words.append(word)
    return redact(shlex.join(words))


def collect_environment() -> dict[str, Any]:
    """Collect what a published number needs to be repeated; never raises.

    Returns:
        `dict`: `versions` (package to version), `hardware` (`cpu`, `cores`, `gpu`, `gpus`; what is unknown is
        left out), `commit` (of the hf_robust source tree, `-dirty` when modified, `None` outside a git checkout) and
        `library_version`.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except Exception:  # noqa: BLE001 - not installed, or its metadata is damaged: unknown either way
            continue
    package_folder = Path(hf_robust.__file__).resolve().parent
    return {
        "versions": versions,
        "hardware": _hardware(),
        "commit": _commit(package_folder),
        "library_version": hf_robust.__version__,
    }


def _program(program: str) -> list[str]:
    path = Path(program)
    if path.name == "__main__.py":
        return ["python", "-m", path.parent.name]
    package = Path(hf_robust.__file__).parent
    if path.is_relative_to(package):  # started by python -m, or by a launcher
        return ["python", "-m", ".".join([package.name, *path.relative_to(package).with_suffix("").parts])]
    if path.is_absolute():
        path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else Path(path.name)
    return ["python", str(path)] if path.suffix == ".py" else [str(path)]


def _names_secret(flag: str) -> bool:
    words = re.split(r"[-_.]+", flag.lower().strip("-"))
    return not _SECRET_WORDS.isdisjoint(words) or ("key" in words and not {"api", "access"}.isdisjoint(words))


def _hardware() -> dict[str, Any]:
    hardware: dict[str, Any] = {"cpu": _cpu_name(), "cores": os.cpu_count()}
    try:
        import torch

        if torch.cuda.is_available():
            hardware |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    except Exception:  # noqa: BLE001 - a broken driver must not cost the report of a finished run
        hardware["gpu"] = "unknown (the driver did not answer)"
    return {key: value for key, value in hardware.items() if value}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit(folder: Path) -> str | None:
    # A package installed below somebody else's checkout must not borrow that checkout's commit: it is not tracked.
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if not commit:
        return None
    tracked = _git(folder, "status", "--porcelain", "--untracked-files=no")
    untracked = _git(folder, "status", "--porcelain", "--", ".")
    return f"{commit}-dirty" if tracked or untracked else commit


def _git(folder: Path, *arguments: str) -> str | None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, env=environment)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

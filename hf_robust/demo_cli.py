"""The command line of the demo: which models, which images, where it is served or written."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_robust.flags import FlagParser, take

__all__ = ["DemoArguments", "DemoDataArguments", "ServingArguments", "parse_demo"]


@dataclass
class DemoArguments:
    """Which models are compared."""

    model: None | str = field(
        default=None,
        metadata={"help": "Robust classifier or encoder: folder or Hub repository; default: that in outputs/digits."},
    )
    plain: None | str = field(default=None, metadata={"help": "Likewise of the model it is compared with."})
    titles: list[str] | None = field(
        default=None, metadata={"help": "What the page calls each model; default: the name in its report."}
    )
    image_size: None | int = field(
        default=None, metadata={"help": "Side of the attacked images in pixels; default: each model's own."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Leave a GPU alone."})


@dataclass
class DemoDataArguments:
    """Images to pick from, and those that teach an encoder its classes."""

    images: list[str] | None = field(
        default=None, metadata={"help": "Pictures to pick from: files and folders; default: of the data set."}
    )
    dataset_name: None | str = field(
        default=None,
        metadata={"help": "Labelled images of an encoder's linear probe; default: digits, where reports name them."},
    )
    split: str = field(default="train", metadata={"help": "Split the probe is fitted on."})
    eval_split: str = field(default="test", metadata={"help": "Split the examples are taken from."})
    image_column: None | str = field(default=None, metadata={"help": "Image column; found by type when unset."})
    label_column: None | str = field(default=None, metadata={"help": "Label column; found by type when unset."})
    probe_images: int = field(default=5000, metadata={"help": "At most so many images for the probe, stratified."})


@dataclass
class ServingArguments:
    """Where the demo goes."""

    port: None | int = field(
        default=None, metadata={"help": "Port on this machine; default: the first free from 7860."}
    )
    share: bool = field(
        default=False, metadata={"help": "Also make a public link through Gradio's servers, for a week."}
    )
    space_dir: None | str = field(
        default=None, metadata={"help": "Write a folder to upload as a Space instead of serving."}
    )


@dataclass
class DemoRun:
    """Everything the demo needs, parsed and checked.

    Args:
        models ([`DemoArguments`]): models.
        data ([`DemoDataArguments`]): images.
        serving ([`ServingArguments`]): where it goes.
    """

    models: DemoArguments
    data: DemoDataArguments
    serving: ServingArguments


def parse_demo(
    argv: Sequence[str] | None = None, *, description: str | None = None, prog: str | None = None
) -> DemoRun:
    """Parse the flags of `hf-robust demo`.

    Args:
        argv (`Sequence[str]`, *optional*): arguments; default: those of the process.
        description (`str`, *optional*): first lines of `--help`.
        prog (`str`, *optional*): name of the command in messages; default: that of the script.

    Returns:
        [`DemoRun`]: the run. Errors print one line to stderr and exit with status 2.
    """
    groups: list[tuple[str, Any]] = [
        ("models", DemoArguments),
        ("images", DemoDataArguments),
        ("where it goes", ServingArguments),
    ]
    parser = FlagParser(groups, _owner, prog=prog, description=description)
    values = vars(parser.parse_args(list(sys.argv[1:] if argv is None else argv)))
    try:
        return _build(values)
    except ValueError as error:
        parser.error(str(error))


def _owner(key: str) -> str:
    """Where a flag belongs that the demo does not have."""
    if key in ("eps", "steps", "norm", "step_size", "attack"):
        return "attack and budget are chosen on the page"
    return "write --model ENCODER" if key == "encoder" else ""


def _build(values: dict[str, Any]) -> DemoRun:
    run = DemoRun(take(DemoArguments, values), take(DemoDataArguments, values), take(ServingArguments, values))
    if run.models.plain and not run.models.model:
        raise ValueError("--plain is compared with --model, which is not given: name the robust model, too")
    models = 1 if run.models.model and not run.models.plain else 2
    if run.models.titles and len(run.models.titles) != models:
        raise ValueError(
            f"titles must be one per model, got {len(run.models.titles)} for {models}: quote each of them"
        )
    if run.serving.port is not None and not 0 < run.serving.port < 65536:
        raise ValueError(f"port must be from 1 to 65535, got {run.serving.port}: leave it out for the first free one")
    if run.data.probe_images < 2:
        raise ValueError(f"probe_images must be 2 or more, got {run.data.probe_images}: 5000 is the default")
    if run.models.image_size is not None and run.models.image_size < 1:
        raise ValueError(
            f"image_size must be 1 or more, got {run.models.image_size}: leave it out for the model's own"
        )
    if run.serving.space_dir and (run.serving.share or run.serving.port):
        raise ValueError("--space_dir writes a folder and serves nothing: leave --port and --share out")
    return run

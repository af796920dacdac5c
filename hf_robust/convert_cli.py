"""The command line of converting: which file, of which format, into which folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_robust.converters import format_names, load_converter
from hf_robust.flags import FlagParser, take

__all__ = ["ConvertArguments", "ConvertRun", "parse_convert"]


@dataclass
class ConvertArguments:
    """What is read of the file, and where it goes."""

    format: str = field(default="auto", metadata={"help": f"auto (by the keys), {', '.join(format_names())}."})
    branch: None | str = field(
        default=None,
        metadata={"help": "Norm branch by name: adv (default where there is one), clean, adv_ce (AdvCL)."},
    )
    output_dir: None | str = field(
        default=None, metadata={"help": "Folder to write; default: outputs/converted/ and the name of the file."}
    )
    classifier: bool = field(default=False, metadata={"help": "Take the linear classifier of the file along."})
    label_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the classes in the order of the outputs, with --classifier."}
    )
    image_size: None | int = field(
        default=None, metadata={"help": "Side of the images in pixels; default: the format's own."}
    )
    mean: list[float] | None = field(
        default=None, metadata={"help": "Input normalisation, where the file holds none: three numbers."}
    )
    std: list[float] | None = field(default=None, metadata={"help": "Likewise."})
    name: None | str = field(default=None, metadata={"help": "Title of the card; default: the name of the file."})
    native: bool = field(
        default=True, metadata={"help": "Also write native/, the same network on stock timm, for CIFAR ResNets."}
    )


@dataclass
class ConvertRun:
    """Everything a conversion needs, parsed and checked.

    Args:
        file (`str`): the file of the authors.
        settings ([`ConvertArguments`]): the flags.
    """

    file: str
    settings: ConvertArguments

    @property
    def folder(self) -> Path:
        """Where the result goes."""
        if self.settings.output_dir:
            return Path(self.settings.output_dir)
        ending = f"-{self.settings.branch}" if self.settings.branch else ""
        return Path("outputs", "converted", f"{Path(self.file).stem}{ending}")


def parse_convert(
    argv: Sequence[str] | None = None, *, description: str | None = None, prog: str | None = None
) -> ConvertRun:
    """Parse the flags of `hf-robust convert`.

    Args:
        argv (`Sequence[str]`, *optional*): arguments; default: those of the process.
        description (`str`, *optional*): first lines of `--help`.
        prog (`str`, *optional*): name of the command in messages; default: that of the script.

    Returns:
        [`ConvertRun`]: the run. Errors print one line to stderr and exit with status 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = FlagParser(
        [("conversion", ConvertArguments)],
        _owner,
        prog=prog,
        description=description,
        usage="%(prog)s FILE [--format FORMAT] [--branch NAME] [--output_dir DIR] [--FLAG VALUE]",
    )
    parser.add_argument("file", nargs="?", help="File of the authors: .pt, .pth, .ckpt or .safetensors.")
    values: dict[str, Any] = vars(parser.parse_args(argv))
    settings = take(ConvertArguments, values)
    if not values["file"]:
        parser.error("no file: name the checkpoint that the authors published")
    if settings.format != "auto":
        try:
            load_converter(settings.format)
        except ValueError as error:
            parser.error(str(error))
    return ConvertRun(file=str(values["file"]), settings=settings)


def _owner(key: str) -> str:
    """Where a flag belongs that converting does not have."""
    if key in ("model", "dataset_name", "metrics"):
        return "measure the converted folder with hf-robust evaluate"
    return "write the file without a flag" if key == "file" else ""

"""Classifiers small enough to follow by hand, and a run on the digits as pre-training leaves it.

    python tests/demo/exhibits.py

serves two of the classifiers, for the test that drives a browser: Gradio's servers do not tidy up behind themselves.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from released import trained_model  # noqa: E402

from hf_robust.checkpoints import write_manifest  # noqa: E402
from hf_robust.demo.sources import Exhibit, Picked  # noqa: E402
from hf_robust.evaluation.pixel_classifier import PixelClassifier  # noqa: E402
from hf_robust.hub import save_encoder  # noqa: E402

TINY = {"architecture": "resnet10_cifar", "model_args": {"channels": (8, 8, 8, 16)}, "image_size": 32}


class Brightness(torch.nn.Module):
    """Dark is class 0, bright class 1; `slope` says how sure it is, `at` where it changes its mind."""

    def __init__(self, slope: float = 50.0, at: float = 0.5) -> None:
        super().__init__()
        self.slope, self.at = torch.nn.Parameter(torch.tensor(slope)), at

    def forward(self, x):
        z = self.slope * (x.mean((1, 2, 3)) - self.at)
        return torch.stack([-z, z], 1)


def brightness(at: float = 0.5, names: tuple[str, ...] | None = ("dark", "bright"), size: int = 8) -> PixelClassifier:
    """A classifier whose answer an attack of `eps` changes where the brightness is nearer than `eps` to `at`."""
    return PixelClassifier(Brightness(at=at), label_names=names, image_size=size, num_classes=2)


def digits_run(folder: Path) -> Path:
    """An output folder as the first command of the README leaves it, with networks that have learned nothing."""
    model = trained_model(**TINY)
    save_encoder(model, folder / "encoder", native=False)
    told = {"name": "ACL resnet10_cifar digits", "task": "encoder", "dataset": {"name": "digits"}}
    for place in (folder, folder / "encoder"):
        (place / "report.json").write_text(json.dumps(told))
    checkpoint = folder / "contrast_simclr" / "checkpoint-4"
    trained_model(**TINY).save_pretrained(checkpoint)
    (checkpoint / "optimizer.pt").write_bytes(b"never read")
    write_manifest(checkpoint)
    return folder


def dark_and_bright() -> Exhibit:
    """A robust model that is far from changing its mind about the first example, and a plain one that is near."""
    grey = torch.full((3, 8, 8), 125, dtype=torch.uint8)
    return Exhibit(
        {"robust": brightness(at=0.7), "plain": brightness(at=0.5)},
        {"robust": "ACL <1>", "plain": "SimCLR"},
        (Picked(grey, "dark"), Picked(grey + 60, "bright")),
    )


if __name__ == "__main__":
    from hf_robust.runs import demo

    demo.serve(demo.parse_demo(sys.argv[1:]), dark_and_bright()).block_thread()

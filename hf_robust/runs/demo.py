"""The run behind `hf-robust demo`: models are read, encoders probed, and the page is served or written as a Space."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from hf_robust.data import ImageDataset
from hf_robust.demo.page import build_page, import_gradio, launch_settings
from hf_robust.demo.sources import (
    Exhibit,
    Picked,
    default_models,
    examples_of,
    find_model,
    known_dataset,
    labelled_images,
    load_model,
    pictures_in,
    title_of,
)
from hf_robust.demo.space import write_space
from hf_robust.demo_cli import DemoRun, parse_demo
from hf_robust.runs.console import tell

__all__ = ["main", "make_exhibit", "serve"]


def chosen_models(run: DemoRun) -> dict[str, str]:
    """Where the models are, by the names that sentences use."""
    if run.models.model is None:
        return dict(zip(("robust", "plain"), default_models(), strict=True))
    models = {"robust": run.models.model}
    return models | {"plain": run.models.plain} if run.models.plain else models


def make_exhibit(run: DemoRun, sources: dict[str, str]) -> Exhibit:
    """Read the models, fit the probes of encoders, and choose the examples.

    Args:
        run ([`DemoRun`]): settings.
        sources (`dict[str, str]`): where the models are, `"robust"` first.

    Returns:
        [`Exhibit`]: what the page shows.
    """
    data = run.data
    columns = {"image_column": data.image_column, "label_column": data.label_column}
    dataset = data.dataset_name or known_dataset(list(sources.values()))
    encoders = {name for name, source in sources.items() if find_model(source)[1]}
    train: ImageDataset | None = None
    if dataset and encoders:
        train = labelled_images(dataset, data.split, data.probe_images, **columns)
        tell(f"Fitting a linear probe on {len(train)} images of {train.name} ({', '.join(sorted(encoders))} model).")
    device = torch.device("cuda" if torch.cuda.is_available() and not run.models.use_cpu else "cpu")
    models = {
        name: load_model(source, train, image_size=run.models.image_size, device=device)
        for name, source in sources.items()
    }
    titles = dict(zip(sources, run.models.titles or map(title_of, sources.values()), strict=True))
    if train is not None:
        titles |= {name: f"{titles[name]}, linear probe on {train.name}" for name in encoders}
    examples: tuple[Picked, ...] = ()
    if data.images:
        examples = pictures_in(data.images)
    elif dataset:
        examples = examples_of(labelled_images(dataset, data.eval_split, None, **columns))
    return Exhibit(models, titles, examples, None if train is None else train.label_names)


def serve(run: DemoRun, exhibit: Exhibit) -> Any:
    """Serve the page in the background, and say where.

    Args:
        run ([`DemoRun`]): port, and whether a public link is made.
        exhibit ([`Exhibit`]): what the page shows.

    Returns:
        `gradio.Blocks`: being served; `block_thread()` waits for Ctrl+C, `close()` ends it.

    Raises:
        OSError: if the port is taken.
    """
    gradio = import_gradio()
    page = build_page(exhibit)
    _, local, public = page.launch(
        server_port=run.serving.port, share=run.serving.share, prevent_thread_lock=True, **launch_settings(gradio)
    )
    tell(f"The demo is at {local}" + (f" and, for everyone, at {public}" if public else "") + "; Ctrl+C ends it.")
    return page


def main(argv: list[str] | None = None, **parsing: Any) -> None:
    """Serve the demo, or write it as a Space.

    Args:
        argv (`list[str]`, *optional*): flags; default: those of the process.
        parsing (`Any`): passed on to [`parse_demo`].
    """
    run = parse_demo(argv, **parsing)
    sources = chosen_models(run)
    space = run.serving.space_dir
    if space is not None:
        dataset = run.data.dataset_name or known_dataset(list(sources.values()))
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, dataset_name=dataset))
        folder = write_space(Path(space), run, sources)
        tell(f"The Space is in {folder}: 'hf upload USER/NAME {folder} . --repo-type space' puts it on the Hub.")
        return
    import_gradio()  # now: a probe may take minutes
    serve(run, make_exhibit(run, sources)).block_thread()

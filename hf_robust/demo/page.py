"""The page: what is picked and moved in the browser goes to the functions of the demo; what they say comes back."""

from __future__ import annotations

import html
import os
from typing import Any

from PIL import Image

from hf_robust.demo.comparison import LEVELS, Disturbance, compare, sentence
from hf_robust.demo.rendering import STYLE, amplification, bars, figures, read_picture, to_picture
from hf_robust.demo.sources import Exhibit

__all__ = ["answer", "build_page", "import_gradio", "launch_settings"]

KINDS = [("PGD attack", "pgd"), ("random noise of the same size", "noise"), ("none", "none")]
NORMS = [("L-inf: every pixel", "linf"), ("L2: the whole image", "l2")]
SUGGESTED = {"linf": 8, "l2": 255}  # levels of 1/255
_THUMBNAIL = 96
# Captions of the third picture and of the second column.
_CAPTIONS = {
    "pgd": ("attacked", "after the attack"),
    "noise": ("with noise", "with noise"),
    "none": ("the same", "the same"),
}


def import_gradio() -> Any:
    """Gradio, with everything off that would call out.

    Raises:
        ImportError: if it is not installed; the message says how.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f"the demo needs gradio ({error}): pip install 'hf_robust[demo]'") from error
    return gradio


def answer(
    exhibit: Exhibit, picture: Image.Image | None, kind: str, norm: str, levels: float | None, steps: float | None
) -> tuple[str, ...]:
    """What the page shows for one press of the button.

    Args:
        exhibit ([`Exhibit`]): models and examples.
        picture (`PIL.Image.Image`, *optional*): what was uploaded or picked.
        kind (`str`), norm (`str`), levels (`float`), steps (`float`): of [`Disturbance`].

    Returns:
        `tuple[str, ...]`: HTML: a message, then pictures and probabilities of every model. Of a mistake the message
        tells, and the others are empty.
    """
    try:
        if levels is None or steps is None:  # a field that was emptied
            raise ValueError("eps and steps must be numbers, and a field is empty: fill in both.")
        disturbance = Disturbance(kind, norm, float(levels), int(steps))  # type: ignore[arg-type]
        read = {name: read_picture(picture, exhibit.size_of(name)) for name in exhibit.models}
        truth = exhibit.truth_of(picture) if picture is not None else None
    except (ValueError, OSError) as error:
        return _message(str(error), "", alert=True), *("" for _ in exhibit.models)
    images = {name: image for name, (image, _) in read.items()}
    outcomes = compare(exhibit.models, images, disturbance, label_names=exhibit.label_names)
    factor, (caption, heading) = amplification(outcomes.values()), _CAPTIONS[disturbance.kind]
    notes = [f"{disturbance}.", *dict.fromkeys(note for _, note in read.values() if note)]
    shown = (
        _heading(exhibit, name) + figures(outcome, factor, caption) + bars(outcome, heading)
        for name, outcome in outcomes.items()
    )
    return _message(sentence(outcomes, disturbance, truth), " ".join(notes)), *shown


def _message(text: str, note: str, alert: bool = False) -> str:
    role = "alert" if alert else "status"
    shown = f"<p class='hfr-sentence' role='{role}'>{html.escape(text)}</p>"
    return shown + (f"<p class='hfr-note'>{html.escape(note)}</p>" if note else "")


def _heading(exhibit: Exhibit, name: str) -> str:
    title = f"{name.capitalize()} model" if len(exhibit.models) > 1 else "Model"
    return f"<p class='hfr-model'>{title}<span>{html.escape(exhibit.titles[name])}</span></p>"


def build_page(exhibit: Exhibit) -> Any:
    """The page as a Gradio application, not yet served.

    Args:
        exhibit ([`Exhibit`]): models and examples.

    Returns:
        `gradio.Blocks`: to be launched with [`launch_settings`].
    """
    gradio = import_gradio()
    with gradio.Blocks(title="hf_robust demo", analytics_enabled=False) as page:
        gradio.Markdown(
            "# One image, one attack, two models" if len(exhibit.models) > 1 else "# One image, one attack"
        )
        with gradio.Row():
            with gradio.Column(scale=4, min_width=300):
                image, controls, gallery, button = _controls(gradio, exhibit)
            with gradio.Column(scale=7, min_width=320):
                message = gradio.HTML(
                    _message("Upload an image and choose what is done to it.", ""), elem_id="message"
                )
                panels = [gradio.HTML(elem_id=name) for name in exhibit.models]
        kind, norm, levels, steps = controls

        def attack(picture: Any, *values: Any) -> list[str]:
            return list(answer(exhibit, picture, *values))

        asked = {"fn": attack, "inputs": [image, *controls], "outputs": [message, *panels], "show_progress": "minimal"}
        norm.input(lambda name: gradio.update(**_slider(name)), norm, levels, show_progress="hidden").then(**asked)
        if gallery is not None:
            gallery.select(_picker(gradio, exhibit), None, image, show_progress="hidden").then(**asked)
        gradio.on([button.click, kind.input, levels.release, steps.release], **asked, trigger_mode="always_last")
        if exhibit.examples:
            page.load(**asked)
    return page


def _slider(norm: str) -> dict[str, Any]:
    return {"maximum": LEVELS[norm], "value": SUGGESTED[norm], "step": 1 if norm == "linf" else 5}


def _controls(gradio: Any, exhibit: Exhibit) -> tuple[Any, list[Any], Any, Any]:
    """Image, [attack, norm, eps, steps], gallery, button."""
    examples = exhibit.examples
    image = gradio.Image(
        value=to_picture(examples[0].image.float() / 255, 1) if examples else None,
        label="Image: upload one" + (", or pick an example below" if examples else ""),
        type="pil",
        image_mode=None,
        format="png",
        sources=["upload", "clipboard"],
        buttons=[],
        height=230,
        elem_id="picture",
    )
    gallery = None
    if examples:
        gallery = gradio.Gallery(
            value=[to_picture(example.image.float() / 255, _THUMBNAIL) for example in examples],
            label="Examples",
            columns=6,
            height="auto",
            object_fit="contain",
            allow_preview=False,
            interactive=False,
            buttons=[],
            format="png",
            elem_id="examples",
        )
    kind = gradio.Radio(KINDS, value="pgd", label="Disturbance", elem_id="kind")
    norm = gradio.Radio(NORMS, value="linf", label="Size is measured in", elem_id="norm")
    levels = gradio.Slider(minimum=1, label="eps, in units of 1/255", elem_id="eps", **_slider("linf"))
    steps = gradio.Slider(minimum=1, maximum=100, step=1, value=20, label="Steps of PGD", elem_id="steps")
    button = gradio.Button("Attack", variant="primary", elem_id="attack")
    return image, [kind, norm, levels, steps], gallery, button


def _picker(gradio: Any, exhibit: Exhibit) -> Any:
    def pick(event: Any) -> Image.Image:
        return to_picture(exhibit.examples[event.index].image.float() / 255, 1)

    # Gradio reads from the annotation that the event is wanted.
    pick.__annotations__ = {"event": gradio.SelectData}
    return pick


def launch_settings(gradio: Any) -> dict[str, Any]:
    """Look and behaviour of the served page: fonts of the reader's machine, nothing from elsewhere.

    Args:
        gradio (`Any`): the module.

    Returns:
        `dict[str, Any]`: arguments of `launch`.
    """
    theme = gradio.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="blue"
    )
    return {"theme": theme, "css": STYLE, "ssr_mode": False, "quiet": True, "footer_links": [], "show_error": False}

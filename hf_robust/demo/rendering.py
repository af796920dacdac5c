"""What the demo shows, made of tensors: pictures large enough to see, probabilities as bars; no user interface."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hf_robust.demo.comparison import Outcome

__all__ = ["STYLE", "amplification", "bars", "figures", "read_picture", "to_picture"]

SHOWN_CLASSES = 4
SIDE = 320  # pixels; small images are enlarged to about this, pixel by pixel

STYLE = """
.hfr-sentence {font-size: 1.2rem; line-height: 1.4; font-weight: 600; margin: 0; color: var(--body-text-color)}
.hfr-note {color: var(--body-text-color); opacity: .75; font-size: .92rem; margin: 0}
.hfr-model {font-size: 1.05rem; font-weight: 600; margin: .5rem 0 .5rem; color: var(--body-text-color)}
.hfr-model span {font-weight: 400; opacity: .75; font-size: .92rem; margin-left: .4rem}
.hfr-pictures {display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .6rem; margin: 0 0 .5rem}
.hfr-pictures figure {margin: 0}
.hfr-pictures img {width: 100%; margin: 0; border-radius: .25rem; image-rendering: pixelated}
.hfr-pictures figcaption {color: var(--body-text-color); font-size: .9rem; margin: 0 0 .2rem}
.hfr-bars {width: 100%; border-collapse: collapse; table-layout: fixed; margin: 0 !important; font-size: .92rem}
.hfr-bars, .hfr-bars tr, .hfr-bars td, .hfr-bars th {border: 0 !important; color: var(--body-text-color)}
.hfr-bars td, .hfr-bars th {padding: .15rem .3rem !important; text-align: left}
.hfr-bars th {font-weight: 600; overflow: hidden; text-overflow: ellipsis; white-space: nowrap}
.hfr-bars .cell {display: flex; align-items: center; gap: .4rem}
.hfr-bars .track {flex: 1; height: .7rem; border-radius: .2rem; background: var(--border-color-primary)}
.hfr-bars .fill {display: block; height: 100%; border-radius: .2rem}
.hfr-bars .number {width: 3.1rem; text-align: right; font-variant-numeric: tabular-nums}
.hfr-bars .head td {font-weight: 400; font-size: .9rem}
#picture img {image-rendering: pixelated; object-fit: contain; width: 100%; height: 100%}
#picture .image-container {padding-top: 1.6rem}
#examples .grid-container {grid-template-columns: repeat(6, minmax(0, 1fr)) !important; padding-top: 1.8rem;
  grid-template-rows: auto !important; grid-auto-rows: auto !important}
#examples .thumbnail-item {aspect-ratio: 1; height: auto}
#examples .grid-wrap, #examples .gallery-container {height: auto !important; min-height: 0 !important}
"""
_BLUE, _RED = "#0072b2", "#d55e00"  # Okabe and Ito: also told apart by colour-blind readers


def read_picture(picture: Image.Image | None, size: int | None) -> tuple[Tensor, str]:
    """An uploaded picture as the models take it.

    Args:
        picture (`PIL.Image.Image`, *optional*): any mode and size; what is transparent becomes white.
        size (`int`, *optional*): side in pixels of the models' images; default: the picture keeps its size and shape.

    Returns:
        `tuple[torch.Tensor, str]`: the image `(3, size, size)`, float32 in [0, 1], and a sentence that says how the
        picture was changed, empty if it was not.

    Raises:
        ValueError: without a picture.
    """
    if picture is None:
        raise ValueError("There is no image yet: upload one, or pick one of the examples.")
    upright = ImageOps.exif_transpose(picture)
    layer = upright.convert("RGBA")
    rgb = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    note = ""
    if size is not None and rgb.size != (size, size):
        how = "it was" if rgb.width == rgb.height else "its middle was cut out and"
        note = (
            f"The picture has {rgb.width} \u00d7 {rgb.height} pixels; {how} resized to {size} \u00d7 {size}, the size "
            "the model takes."
        )
        rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()
    return pixels.float() / 255, note


def to_picture(pixels: Tensor, side: int = SIDE) -> Image.Image:
    """Pixels as a picture that can be seen: small ones enlarged by a whole factor, without blurring.

    Args:
        pixels (`torch.Tensor` of shape `(3, H, W)`): in [0, 1]; what exceeds is cut off.
        side (`int`, defaults to 320): about the longer side of the picture, in pixels; 1 leaves it as it is.

    Returns:
        `PIL.Image.Image`: RGB.
    """
    values = (pixels.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    picture = Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())
    factor = max(1, round(side / max(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def amplification(outcomes: Iterable[Outcome]) -> float:
    """The whole number that brings the largest change close to a third of the grey range, one for all pictures.

    Args:
        outcomes (`Iterable[Outcome]`): whose changes are shown side by side.

    Returns:
        `float`: 1 or more; 10 for an eps of 8/255.
    """
    largest = max((float((o.disturbed - o.image).abs().max()) for o in outcomes), default=0.0)
    return max(1.0, float(round(0.32 / largest))) if largest > 0 else 1.0


def figures(outcome: Outcome, factor: float, disturbed: str = "attacked") -> str:
    """Clean image, amplified change and disturbed image side by side; grey stands for no change.

    Args:
        outcome ([`Outcome`]): of one classifier.
        factor (`float`): what the change is multiplied by; the caption says so.
        disturbed (`str`): caption of the third.

    Returns:
        `str`: HTML with the pictures in it, to be shown with [`STYLE`].
    """
    change = 0.5 + factor * (outcome.disturbed - outcome.image)
    parts = (("image", outcome.image), (f"change \u00d7 {factor:g}", change), (disturbed, outcome.disturbed))
    return "<div class='hfr-pictures'>" + "".join(_figure(caption, pixels) for caption, pixels in parts) + "</div>"


def _figure(caption: str, pixels: Tensor) -> str:
    file = io.BytesIO()
    to_picture(pixels).save(file, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    text = html.escape(caption)
    return f"<figure><figcaption>{text}</figcaption><img alt='{text}' src='{source}'></figure>"


def bars(outcome: Outcome, disturbed: str = "after the attack") -> str:
    """Class probabilities before and after as a table with bars.

    Args:
        outcome ([`Outcome`]): of one classifier; the likeliest classes are shown, four at most.
        disturbed (`str`): heading of the second column.

    Returns:
        `str`: HTML, to be shown with [`STYLE`]; names of classes are escaped.
    """
    height = torch.maximum(outcome.before, outcome.after)
    shown = sorted(height.topk(min(SHOWN_CLASSES, len(height))).indices.tolist(), key=lambda k: -float(height[k]))
    first = int(outcome.before.argmax())
    rows = [
        f'<tr><th title="{html.escape(outcome.name_of(k))}">{html.escape(outcome.name_of(k))}</th>'
        + "".join(_cell(float(p[k]), _BLUE if k == first else _RED) for p in (outcome.before, outcome.after))
        + "</tr>"
        for k in shown
    ]
    head = f"<tr class='head'><td>class</td><td>clean image</td><td>{html.escape(disturbed)}</td></tr>"
    columns = "<colgroup><col style='width:20%'><col style='width:40%'><col style='width:40%'></colgroup>"
    return f"<table class='hfr-bars'>{columns}{head}{''.join(rows)}</table>"


def _cell(probability: float, colour: str) -> str:
    percent = 100 * probability
    return (
        "<td><div class='cell'><span class='track'>"
        f"<span class='fill' style='width:{percent:.1f}%;background:{colour}'></span></span>"
        f"<span class='number'>{percent:.0f} %</span></div></td>"
    )

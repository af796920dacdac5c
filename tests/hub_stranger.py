"""What a stranger does with published repositories, in a process of its own that cannot import hf_robust.

    python tests/hub_stranger.py WISHES.json ANSWERS.safetensors

Afterwards the package is let in, and its own doors are tried in the same process.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from safetensors.torch import save_file

sys.modules["hf_robust"] = None  # type: ignore[assignment]  # every import of it fails from here on


def main() -> None:
    """Load everything, and write what came out."""
    import timm
    from datasets import load_dataset
    from huggingface_hub import HfApi, snapshot_download
    from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

    with open(sys.argv[1]) as file:
        wish: dict[str, Any] = json.load(file)
    try:
        import hf_robust  # noqa: F401
    except ImportError:
        pass
    else:
        raise AssertionError("the stranger has the package")
    answers: dict[str, torch.Tensor] = {}
    x = torch.tensor(wish["pixels"])

    def image(repo: str, **more: Any) -> torch.Tensor:
        """Pixels as the repository's own processor gives them."""
        from PIL import Image

        pictures = [Image.fromarray((p.permute(1, 2, 0) * 255).round().byte().numpy()) for p in x]
        return AutoImageProcessor.from_pretrained(repo, **more)(pictures, return_tensors="pt")["pixel_values"]

    def features(repo: str, pixels: torch.Tensor, **more: Any) -> torch.Tensor:
        model = AutoModel.from_pretrained(repo, **more).eval()
        return model(pixel_values=pixels).pooler_output.flatten(1)

    with torch.no_grad():
        stock, own, classifier = wish["stock"], wish["own"], wish["classifier"]
        answers["stock"] = features(stock, image(stock))
        answers["stock_timm"] = timm.create_model(f"hf-hub:{stock}", pretrained=True).eval()(image(stock))
        answers["own_code"] = features(own, image(own), trust_remote_code=True)
        answers["own_native"] = features(own, image(own, subfolder="native"), subfolder="native")
        logits = AutoModelForImageClassification.from_pretrained(classifier).eval()
        answers["classifier"] = logits(pixel_values=image(classifier)).logits
        answers["at_first"] = features(stock, image(stock), revision=wish["first_commit"])
        if "adapter" in wish:
            from peft import PeftModel

            base = AutoModelForImageClassification.from_pretrained(stock, num_labels=3)
            adapted = PeftModel.from_pretrained(base, wish["adapter"]).eval()
            answers["adapter"] = adapted(pixel_values=image(stock)).logits
        try:
            AutoModel.from_pretrained(own)
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
        else:
            raise AssertionError("code of the repository ran without being trusted")
    rows = load_dataset(wish["data"], split="train")
    answers["data"] = torch.tensor(rows["label"])
    answers["data_pixels"] = torch.tensor([sum(picture.getpixel((0, 0))) for picture in rows["image"]])
    listed = HfApi().list_repo_files(own)
    local = snapshot_download(own)
    there = {os.path.relpath(os.path.join(at, name), local) for at, _, names in os.walk(local) for name in names}
    assert set(listed) == there, (listed, there)

    del sys.modules["hf_robust"]
    sys.path.insert(0, wish["package"])
    from hf_robust import load_classifier, load_encoder
    from hf_robust.hub import encoder_features

    with torch.no_grad():
        answers["load_encoder"] = encoder_features(load_encoder(own))(x)
        answers["load_classifier"] = load_classifier(classifier)(x)
    save_file({name: value.contiguous() for name, value in answers.items()}, sys.argv[2])


if __name__ == "__main__":
    main()

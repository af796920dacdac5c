"""Pre-train a robust encoder and show what it withstands.

Without arguments: scikit-learn's digits, a thin network, a few minutes on two CPU cores, and a SimCLR encoder of the
same budget for contrast. With --dataset_name and --config: any image data set, any timm backbone, any method.

    accelerate launch examples/pretrain.py
    accelerate launch examples/pretrain.py --config examples/configs/acl_cifar10.yaml --objective air --base dynacl
    accelerate launch examples/pretrain.py --dataset_name path/to/images --backbone resnet50 --image_size 64
    accelerate launch examples/pretrain.py --dataset_name path/to/images --coreset rcs --coreset_fraction 0.1

The output folder receives encoder/ (load it with AutoModel.from_pretrained), README.md (model card), report.json,
curves.png, examples.png, trainer_state.json, runs/ (TensorBoard) and checkpoints; with a coreset also coreset.png and
a coreset-NNNN.json per selection, the last one as encoder/coreset.json. --resume_from_checkpoint true goes on after a
kill.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from hf_robust.runs import console, pretrain

DIGITS = Path(__file__).parent / "configs" / "digits_cpu.yaml"
main = partial(pretrain.main, default_config=DIGITS, description=__doc__)
run_or_exit = partial(console.run_or_exit, main)

if __name__ == "__main__":
    run_or_exit()

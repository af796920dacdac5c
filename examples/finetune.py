"""Fine-tune a robust encoder into a robust classifier, with held-out training images to decide, never the test images.

Without arguments: the encoder that examples/pretrain.py leaves, scikit-learn's digits, AutoLoRa; a minute or two on
two CPU cores.

    accelerate launch examples/finetune.py
    accelerate launch examples/finetune.py --encoder DIR_OR_REPO --dataset_name path/to/images --mode autolora
    accelerate launch examples/finetune.py --encoder DIR --dataset_name uoft-cs/cifar10 --mode aff --preset NAME
    accelerate launch examples/finetune.py --encoder outputs/pretrain/checkpoint-N --mode lp_aff --output_dir DIR

A preset is a published run, such as rssl-vanilla/DynACL/cifar10.

The output folder receives classifier/ (load it with AutoModelForImageClassification.from_pretrained; mode lora writes
adapter/ for PeftModel.from_pretrained, mode lp_aff encoder/), README.md (model card), report.json, curves.png,
examples.png, runs/ (TensorBoard) and checkpoints. --resume_from_checkpoint true goes on after a kill.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from hf_robust.runs import console, finetune

DIGITS = Path(__file__).parent / "configs" / "finetune" / "digits_cpu.yaml"
main = partial(finetune.main, default_config=DIGITS, description=__doc__)
run_or_exit = partial(console.run_or_exit, main)

if __name__ == "__main__":
    run_or_exit()

"""Measure how robust a classifier is, as the RobustSSL benchmark does, and show it in one page.

Without arguments: the classifier that examples/finetune.py leaves, scikit-learn's digits, some minutes on two CPU
cores.

    accelerate launch examples/evaluate.py
    accelerate launch examples/evaluate.py --model DIR_OR_REPO --dataset_name X --metrics accuracy pgd20 autoattack
    accelerate launch examples/evaluate.py --model DIR --dataset_name uoft-cs/cifar10 --corruptions path/to/CIFAR-10-C
    accelerate launch examples/evaluate.py --model ENCODER --dataset_name X --protocol slf alf aff

AutoAttack needs pip install "hf_robust[eval]". The folder evaluation/ beside the model receives report.html (one file,
opens offline), report.json, flags.npz (every image) and pictures. Run the same command again after a kill: finished
batches are kept.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from hf_robust.runs import console, evaluate

DIGITS = Path(__file__).parent / "configs" / "evaluate" / "digits_cpu.yaml"
main = partial(evaluate.main, default_config=DIGITS, description=__doc__)
run_or_exit = partial(console.run_or_exit, main)

if __name__ == "__main__":
    run_or_exit()

"""Compare pre-training runs: one table of their probes, one picture of their curves.

    python examples/compare.py outputs/acl outputs/acl_air outputs/simclr --output outputs/compared.png

Each folder is the output folder of a run of examples/pretrain.py (report.json and trainer_state.json).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hf_robust.evaluation.pictures import plot_curves
from hf_robust.evaluation.report import EncoderReport, binomial_interval


def rows(folder: Path) -> list[str]:
    """One Markdown row per metric of the encoder that the run trained."""
    report = EncoderReport.load(folder)
    training = report.training
    lines = []
    for result in (r for r in report.results if r["model"] == report.name):
        for metric, value in result["metrics"].items():
            low, high = binomial_interval(value, result["n_eval"])
            lines.append(
                f"| {report.objective['name']} | `{metric}` | {value:.1%} | {low:.1%} to {high:.1%} "
                f"| {result['n_eval']} | {training['seed']} | {training['seconds'] / 60:.0f} |"
            )
    return lines


def main() -> None:
    """Print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="Output folders of examples/pretrain.py.")
    parser.add_argument("--output", type=Path, default=Path("compared.png"), help="Picture to write.")
    options = parser.parse_args()
    try:
        table = [line for folder in options.folders for line in rows(folder)]
        histories = {
            EncoderReport.load(folder).objective["name"]: json.loads((folder / "trainer_state.json").read_text())
            for folder in options.folders
        }
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print("| method | metric | accuracy | 95 % interval | n | seed | training minutes |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(table))
    plot_curves({name: state["log_history"] for name, state in histories.items()}, options.output)
    print(f"\nCurves: {options.output}")


if __name__ == "__main__":
    main()

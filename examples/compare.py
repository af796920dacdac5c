"""Compare pre-training runs: one table of their probes, one picture of their curves.

    python examples/compare.py outputs/acl outputs/acl_air outputs/simclr --output outputs/compared.png

Each folder is the output folder of a run of examples/pretrain.py (report.json and trainer_state.json).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hf_robust.evaluation.curves import plot_curves
from hf_robust.evaluation.report import EncoderReport, binomial_interval


def method(report: EncoderReport) -> str:
    """Name of the method, and of the coreset it was trained on."""
    name, coreset = report.objective["name"], report.coreset
    return f"{name}, {coreset['name']} {100 * coreset['fraction']:.3g} %" if coreset else name


def rows(label: str, report: EncoderReport) -> list[str]:
    """One Markdown row per metric of the encoder that the run trained."""
    training = report.training
    lines = []
    for result in (r for r in report.results if r["model"] == report.name):
        for metric, value in result["metrics"].items():
            low, high = binomial_interval(value, result["n_eval"])
            lines.append(
                f"| {label} | `{metric}` | {value:.1%} | {low:.1%} to {high:.1%} "
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
        reports = [EncoderReport.load(folder) for folder in options.folders]
        names = [method(report) for report in reports]
        labels = [  # two runs of one method are told apart by their folders
            name if names.count(name) == 1 else f"{name} ({folder.name})"
            for name, folder in zip(names, options.folders, strict=True)
        ]
        table = [line for label, report in zip(labels, reports, strict=True) for line in rows(label, report)]
        states = [json.loads((folder / "trainer_state.json").read_text()) for folder in options.folders]
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyError as error:
        sys.exit(f"error: a report lacks {error}: compare output folders of examples/pretrain.py")
    print("| method | metric | accuracy | 95 % interval | n | seed | training minutes |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(table))
    histories = {label: state["log_history"] for label, state in zip(labels, states, strict=True)}
    plot_curves(histories, options.output)
    print(f"\nCurves: {options.output}")


if __name__ == "__main__":
    main()

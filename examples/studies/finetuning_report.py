"""Table and picture of the fine-tuning study."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from cells import load_records, mean_and_spread

__all__ = ["load_groups", "plot", "print_report"]

STANDARD, ROBUST = "standard_accuracy", "pgd20_linf_8_255_accuracy"
COLORS = {  # in this order
    **{"slf": "tab:gray", "alf": "tab:green", "aff": "tab:blue", "autolora": "tab:red"},
    "autolora_milestones": "tab:orange",
}
Group = list[dict[str, Any]]


def load_groups(folder: Path) -> dict[tuple[str, str, str], Group]:
    """Finished cells with an accuracy, grouped over seeds: data set, encoder, mode."""
    groups: dict[tuple[str, str, str], Group] = {}
    for record in load_records(folder):
        if STANDARD in record:
            groups.setdefault((record["dataset"], record["encoder"], record["mode"]), []).append(record)
    modes = list(COLORS)
    return dict(
        sorted(groups.items(), key=lambda item: (item[0][0] == "digits", *item[0][:2], modes.index(item[0][2])))
    )


def print_report(folder: Path) -> None:
    """Print the table and draw the picture."""
    groups = load_groups(folder)
    print(
        "| data | encoder | mode | seeds | training images | epochs | standard, % | PGD-20, % | kept epochs "
        "| last rate | lambda_1 | CPU s |"
    )
    print("| --- " * 12 + "|")
    for (dataset, encoder, mode), group in groups.items():
        kept = ", ".join(f"{record['kept_epoch']:g}" for record in group)
        rates = ", ".join(f"{record['learning_rate_last']:.2g}" for record in group)
        weights = f"{mean_and_spread(group, 'lambda_1_last', 1, 2)}" if "lambda_1_last" in group[0] else ""
        print(
            f"| {dataset} | {encoder} | {mode} | {len(group)} | {group[0]['n_train']} | {group[0]['epochs']:g} "
            f"| {mean_and_spread(group, STANDARD, 100)} | {mean_and_spread(group, ROBUST, 100)} | {kept} | {rates} "
            f"| {weights} | {statistics.mean(r['cpu_seconds'] for r in group):.0f} |"
        )
    path = folder / "standard_against_robust.png"
    plot(groups, path)
    print(f"Picture: {path}")


def plot(groups: dict[tuple[str, str, str], Group], path: Path) -> None:
    """Standard against PGD-20 accuracy, one panel per data set and encoder; `++` in the panel of its start encoder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys((dataset, encoder.removesuffix("++")) for dataset, encoder, _ in groups))
    figure, grid = plt.subplots(
        1, len(panels), figsize=(max(5, 4 * len(panels)), 4), layout="constrained", squeeze=False
    )
    for axis, (dataset, encoder) in zip(grid[0], panels, strict=True):
        for (where, start, mode), group in groups.items():
            if (where, start.removesuffix("++")) != (dataset, encoder):
                continue
            x, y = ([100 * record[key] for record in group] for key in (STANDARD, ROBUST))
            spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in (x, y)]
            axis.errorbar(
                statistics.mean(x),
                statistics.mean(y),
                xerr=spread[0],
                yerr=spread[1],
                marker="^" if start.endswith("++") else "o",
                markerfacecolor="white" if start.endswith("++") else None,
                linestyle="none",
                capsize=3,
                color=COLORS[mode],
                label=f"{mode} on {start}" if start.endswith("++") else mode,
            )
        axis.set_title(f"{encoder}, {dataset}")
        axis.set_xlabel("standard accuracy, %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    grid[0][0].set_ylabel("PGD-20 accuracy, %")
    seeds = max(len(group) for group in groups.values())
    figure.suptitle(f"Test images; mean and standard deviation over {seeds} seed{'s' if seeds > 1 else ''}")
    figure.savefig(path, dpi=120)
    plt.close(figure)

"""Table and pictures of the study of coresets."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from cells import load_records, mean_and_spread

# name in the picture, colour, place of the fraction beside its point
PLOTTED = {
    "full": ("full data", "black", (6, 6)),
    "full_short": ("full data, fewer epochs", "tab:green", (6, 6)),
    "random_fixed": ("Random, fixed", "tab:gray", (-12, 10)),
    "random_refresh": ("Random, refreshed", "tab:blue", (-26, -12)),
    "rcs": ("RCS", "tab:red", (6, -12)),
}


def load_cells(folder: Path) -> dict[tuple[str, str, float], list[dict[str, Any]]]:
    """Finished cells, grouped over seeds."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for record in load_records(folder):
        groups.setdefault((record["objective"], record["method"], record["fraction"]), []).append(record)
    return groups


def split(group: list[dict[str, Any]], clock: str) -> tuple[float, float]:
    """Mean seconds of training and of selection, by the wall or by the processor (`"cpu_"`)."""
    selection = statistics.mean(r[f"selection_{clock}seconds"] for r in group)
    return statistics.mean(r[f"{clock}seconds"] for r in group) - selection, selection


def report(options: argparse.Namespace) -> None:
    """Print the table and draw the picture."""
    folder = Path(options.output_dir)
    groups = load_cells(folder)
    robust = next(k for k in next(iter(groups.values()))[0] if k.startswith("pgd20_"))
    print(
        "| trains | method | share | images per epoch | seeds | standard, % | PGD-20, % "
        "| wall s: training + selection | CPU s: training + selection | speed-up |"
    )
    print("| --- " * 10 + "|")
    for (objective, method, fraction), group in sorted(groups.items()):
        wall, cpu = split(group, ""), split(group, "cpu_")
        full = groups.get((objective, "full", 1.0))
        speed = f"{sum(split(full, 'cpu_')) / sum(cpu):.2f} x" if full else ""
        print(
            f"| {objective.upper()} | {method} | {fraction:g} | {group[0]['images_per_round']} | {len(group)} "
            f"| {mean_and_spread(group, 'standard_accuracy', 100)} | {mean_and_spread(group, robust, 100)} "
            f"| {wall[0]:.0f} + {wall[1]:.0f} | {cpu[0]:.0f} + {cpu[1]:.0f} | {speed} |"
        )
    for objective in sorted({key[0] for key in groups}):
        path = folder / f"time_against_accuracy_{objective}.png"
        chosen = {k[1:]: g for k, g in groups.items() if k[0] == objective}
        plot(chosen, robust, objective.upper(), path)
        print(f"Picture: {path}")
        if any(record.get("curve") for group in chosen.values() for record in group):
            path = folder / f"learning_curves_{objective}.png"
            plot_curves(chosen, robust, objective.upper(), path)
            print(f"Picture: {path}")


def plot(groups: dict[tuple[str, float], list[dict[str, Any]]], robust: str, title: str, path: Path) -> None:
    """Time of the training against accuracy, one line per method, one point per fraction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    labels = {robust: "PGD-20 accuracy of the linear probe, %", "standard_accuracy": "standard accuracy, %"}
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for method, (name, color, offset) in PLOTTED.items():
            points = sorted((fraction, group) for (m, fraction), group in groups.items() if m == method)
            if not points:
                continue
            x = [statistics.mean(r["cpu_seconds"] for r in g) for _, g in points]
            y = [100 * statistics.mean(r[key] for r in g) for _, g in points]
            spread = [100 * statistics.stdev(r[key] for r in g) if len(g) > 1 else 0.0 for _, g in points]
            axis.errorbar(x, y, spread, marker="o", capsize=3, label=name, color=color)
            for (fraction, _), a, b in zip(points, x, y, strict=True):
                axis.annotate(f"{fraction:g}", (a, b), textcoords="offset points", xytext=offset, fontsize=8)
        axis.set_xlabel("training and selection, processor seconds")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    seeds = max(len(g) for g in groups.values())
    figure.suptitle(f"{title}: time against accuracy; mean and standard deviation over {seeds} seeds")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_curves(groups: dict[tuple[str, float], list[dict[str, Any]]], robust: str, title: str, path: Path) -> None:
    """Accuracy over the time of the training, one line per method and share: the mean over seeds, and the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    labels = {robust: "PGD-20 accuracy of the linear probe, %", "standard_accuracy": "standard accuracy, %"}
    seeds = 0
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for (method, fraction), group in groups.items():
            curves = [record["curve"] for record in group if record.get("curve")]
            if method not in PLOTTED or not curves:
                continue
            seeds = max(seeds, len(curves))
            name, color, _ = PLOTTED[method]
            name = name if fraction == 1 else f"{name}, {fraction:g}"
            points = [([p["cpu_seconds"] for p in curve], [100 * p[key] for p in curve]) for curve in curves]
            for x, y in points:
                axis.plot(x, y, color=color, alpha=0.25, linewidth=1)
            mean = [
                [statistics.mean(values) for values in zip(*column, strict=True)]
                for column in zip(*points, strict=True)
            ]
            axis.plot(*mean, marker="o", markersize=4, color=color, label=name)
        axis.set_xlabel("training and selection, processor seconds")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"{title}: accuracy after each epoch over time; mean of {seeds} seeds, and each of them")
    figure.savefig(path, dpi=120)
    plt.close(figure)

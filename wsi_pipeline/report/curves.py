"""The report's curves, each an SVG picture that stays sharp at every size.

Figures are made without pyplot: no state is shared between threads or with the caller.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter
from sklearn.metrics import roc_curve

from wsi_pipeline.evaluation.binary import call_counts, evaluated, is_called
from wsi_pipeline.evaluation.froc import FrocCurve, sensitivity_at, vertices
from wsi_pipeline.evaluation.uncertainty import LEVEL

# Okabe and Ito's palette, which colour-blind readers can tell apart.
TUMOUR, NORMAL, THIRD, GREY = "#D55E00", "#0072B2", "#009E73", "#6B7280"
COLORS = (NORMAL, TUMOUR, THIRD, "#CC79A7", "#56B4E9", "#E69F00")
FROC_LINES = {
    "lecture": (THIRD, ":", "^"),
    "official": (NORMAL, "--", "s"),
    "corrected": (TUMOUR, "-", "o"),
}
"""Colour, line and marker of each definition, which black-and-white print keeps apart."""
FEW_PATCHES = 50
"""A share of fewer patches is uncertain."""
STYLE: dict[Any, object] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9CA3AF",
    "axes.labelcolor": "#1F2937",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E7EB",
    "grid.linewidth": 0.7,
    "xtick.color": "#4B5563",
    "ytick.color": "#4B5563",
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "svg.hashsalt": "wsi_pipeline",
}
SIZE_INCHES = (5.0, 3.7)


@dataclass(frozen=True)
class Picture:
    """An SVG image and what it says to those who cannot see it."""

    svg: bytes
    alt: str


def froc_figure(
    curves: Mapping[str, FrocCurve], bands: Mapping[str, pd.DataFrame], average_fps: Sequence[float]
) -> Picture:
    """Sensitivity against average false positives, the points of the score marked.

    The false-positive axis is linear from 0 to the first point and logarithmic from there. The
    band is that of one curve, the last of "lecture", "official", "corrected" drawn: three overlap
    beyond recognition. In the SVG the ids are ``froc-MODE``, ``points-MODE`` and ``band-MODE``.

    Parameters
    ----------
    curves : mapping
        The curve of each of "lecture", "official", "corrected" that is to be drawn; undefined ones
        are left out.
    bands : mapping
        `wsi_pipeline.evaluation.uncertainty.froc_band` of each; drawn where it is defined.
    average_fps : sequence of float
    """
    shown = {mode: curves[mode] for mode in FROC_LINES if mode in curves}
    shown = {mode: curve for mode, curve in shown.items() if not curve.undefined}

    def draw(axes):
        for mode, curve in shown.items():
            _draw_froc_curve(axes, mode, curve, average_fps)
        last = list(shown)[-1]
        if bands[last]["low"].notna().any():
            _draw_froc_band(axes, last, shown[last], bands[last])
        axes.set_xscale("symlog", base=2, linthresh=min(average_fps), linscale=1)
        axes.xaxis.set_major_locator(FixedLocator([0, *average_fps]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set(xlim=(0, 2 * max(average_fps)), ylim=(0, 1.02))
        axes.set(xlabel="average false positives per slide")
        axes.set(ylabel="sensitivity (share of lesions found)")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        _legend_above(axes, columns=len(shown) + 1)

    return Picture(_svg(draw), _froc_alt(shown, average_fps))


def _draw_froc_band(axes, mode: str, curve: FrocCurve, band: pd.DataFrame):
    axes.fill_between(
        band["average_fps"], band["low"], band["high"],
        step="post" if curve.interpolation == "step" else None,
        color=FROC_LINES[mode][0], alpha=0.15, lw=0, zorder=1, gid=f"band-{mode}",
        label=f"{mode}, {100 * LEVEL:g}% interval",
    )  # fmt: skip


def _draw_froc_curve(axes, mode: str, curve: FrocCurve, average_fps: Sequence[float]):
    color, line, marker = FROC_LINES[mode]
    table = vertices(curve)
    # Past its last threshold the curve goes on: no false positive is left to add.
    fps = np.append(table["average_fps"], max(2 * max(average_fps), table["average_fps"].iloc[-1]))
    sensitivity = np.append(table["sensitivity"], table["sensitivity"].iloc[-1])
    drawstyle = "steps-post" if curve.interpolation == "step" else "default"
    axes.plot(fps, sensitivity, color=color, ls=line, drawstyle=drawstyle, gid=f"froc-{mode}")
    marked = [sensitivity_at(curve, point) for point in average_fps]
    axes.plot(
        average_fps, marked, marker, color=color, markersize=5, clip_on=False, zorder=3,
        gid=f"points-{mode}",
    )  # fmt: skip
    axes.plot([], [], color=color, ls=line, marker=marker, markersize=5, label=mode)


def _froc_alt(curves: Mapping[str, FrocCurve], average_fps: Sequence[float]) -> str:
    first, last = min(average_fps), max(average_fps)
    reached = [
        f"{mode} from {sensitivity_at(curve, first):.0%} at {first:g}"
        f" to {sensitivity_at(curve, last):.0%} at {last:g}"
        for mode, curve in curves.items()
    ]
    return (
        "FROC curves: share of lesions found against average false positives per slide; "
        + ", ".join(reached)
    )


def slide_accuracy_figure(curves: dict[str, pd.DataFrame], threshold: float) -> Picture:
    """Accuracy over the threshold t, a curve for each split, the chosen t marked."""
    styles = {"validation": (GREY, (0, (4, 2))), "test": (NORMAL, "-")}

    def draw(axes):
        for split, curve in curves.items():
            color, line = styles[split]
            steps = np.clip(np.concatenate([[0], curve["threshold"]]), 0, 1)
            # A row holds from the threshold before it up to its own.
            accuracy = curve["accuracy"].to_numpy()[[0, *range(len(curve))]]
            axes.plot(
                steps, accuracy, color=color, ls=line, drawstyle="steps-pre", label=f"{split} split"
            )
        axes.axvline(threshold, color=TUMOUR, lw=1.3, label=f"t = {threshold:.3g}")
        axes.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="slides called correctly")
        axes.set(xlabel="threshold t: positive if one patch has a probability of t or more")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        _legend_above(axes, columns=len(curves) + 1)

    return Picture(_svg(draw), f"Slide accuracy over the threshold; t = {threshold:.3g} marked")


def roc_figure(labels, scores, threshold: float) -> Picture:
    """ROC of patches with both classes; the point of the threshold marked."""
    truth, score = evaluated(labels, scores)

    def draw(axes):
        curve = call_counts(labels, scores)
        axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":", label="guessing")
        axes.plot(
            curve["fp"] / (~truth).sum(), curve["tp"] / truth.sum(), color=NORMAL, label="model"
        )
        called = is_called(score, threshold)
        axes.plot(
            *(called[~truth].mean(), called[truth].mean()), "o", color=TUMOUR, clip_on=False,
            zorder=3, label=f"threshold {threshold:g}",
        )  # fmt: skip
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        axes.set(xlabel="false-positive rate (1 - specificity)", ylabel="sensitivity")
        axes.legend(loc="lower right")

    return Picture(_svg(draw), "ROC curve of patches")


def slide_roc_figure(curves: Mapping[str, tuple]) -> Picture:
    """ROC of slides by several scores; the point of each one's threshold marked.

    Parameters
    ----------
    curves : mapping
        For each name the labels, the scores and their `slide_metrics` with ``intervals``; of
        slides with both classes.
    """

    def draw(axes):
        axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":")
        for number, (name, (labels, scores, found)) in enumerate(curves.items()):
            truth, score = evaluated(labels, scores)
            score = np.nan_to_num(score)  # scikit-learn refuses -inf; the order is the same
            ends = found["intervals"]["roc_auc"]
            label = f"{name}: AUC {found['roc_auc']:.3f}"
            if ends["low"] is not None:
                label += f" ({ends['low']:.3f} to {ends['high']:.3f})"
            color = COLORS[number % len(COLORS)]
            line = ("-", "--", "-.", ":")[number // len(COLORS) % 4]
            axes.plot(*roc_curve(truth, score)[:2], color=color, ls=line, label=label)
            point = 1 - found["specificity"], found["sensitivity"]
            axes.plot(*point, "o", color=color, markersize=5, clip_on=False, zorder=3)
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        axes.set(xlabel="false-positive rate (1 - specificity)", ylabel="sensitivity")
        axes.legend(loc="lower right", fontsize=8)

    return Picture(_svg(draw), f"ROC curves of slides by {', '.join(curves)}")


def precision_recall_figure(labels, scores, threshold: float) -> Picture:
    """Precision against recall of patches with both classes; the point of the threshold marked."""
    truth, score = evaluated(labels, scores)

    def draw(axes):
        curve = call_counts(labels, scores)
        precision = (curve["tp"] / (curve["tp"] + curve["fp"])).bfill()  # at inf none is called
        recall = curve["tp"] / truth.sum()
        axes.axhline(truth.mean(), color=GREY, lw=1, ls=":", label="guessing")
        axes.plot(recall, precision, color=NORMAL, drawstyle="steps-pre", label="model")
        called = is_called(score, threshold)
        if called.any():
            axes.plot(
                *(called[truth].mean(), truth[called].mean()), "o", color=TUMOUR, clip_on=False,
                zorder=3, label=f"threshold {threshold:g}",
            )  # fmt: skip
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall (sensitivity)")
        axes.set(ylabel="precision (called tumour and is tumour)")
        _legend_above(axes, columns=3)

    return Picture(_svg(draw), "Precision-recall curve of patches")


def score_histogram_figure(labels, scores, threshold: float) -> Picture:
    """How the probabilities of tumour and of normal patches are spread; log scale."""
    truth, score = evaluated(labels, scores)

    def draw(axes):
        bins = np.linspace(0, 1, 41)
        groups = ((score[~truth], NORMAL, "without tumour"), (score[truth], TUMOUR, "with tumour"))
        for values, color, label in groups:
            if len(values):
                share = np.histogram(values, bins)[0] / len(values)
                label = f"{label} ({len(values):,})"
                axes.stairs(share, bins, color=color, fill=True, alpha=0.2)
                axes.stairs(share, bins, color=color, lw=1.5, label=label)
        axes.axvline(threshold, color=GREY, lw=1.2, ls="--", label=f"threshold {threshold:g}")
        axes.set_yscale("log")
        axes.set(xlim=(0, 1), xlabel="probability of tumour, F(I)", ylabel="share of patches")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
        axes.yaxis.set_minor_locator(NullLocator())
        _legend_above(axes, columns=2)

    return Picture(_svg(draw), "Spread of the probabilities of patches with and without tumour")


def reliability_figure(table: pd.DataFrame) -> Picture:
    """How often patches of each predicted probability are tumour.

    Parameters
    ----------
    table : DataFrame
        `reliability_table`, with one patch or more. A bin of fewer than `FEW_PATCHES` patches
        gets a hollow point.
    """
    filled = table[table["n"] > 0]
    few = filled["n"] < FEW_PATCHES

    def draw(axes):
        axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":", label="taken at its word")
        points = filled[["mean_probability", "share_positive"]]
        axes.plot(*points.to_numpy().T, color=NORMAL, lw=1)
        groups = (
            (points[~few], NORMAL, f"{FEW_PATCHES} patches or more"),
            (points[few], "white", f"fewer than {FEW_PATCHES} patches"),
        )
        for group, face, label in groups:
            if len(group):
                axes.plot(
                    *group.to_numpy().T, "o", color=NORMAL, markerfacecolor=face, clip_on=False,
                    label=label, gid=label.replace(" ", "-"),
                )  # fmt: skip
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="probability of tumour, mean of the bin")
        axes.set(ylabel="share of the bin's patches with tumour")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(loc="upper left")

    return Picture(
        _svg(draw),
        "Reliability diagram: share of tumour patches against their predicted probability, in"
        f" {len(filled)} of {len(table)} bins",
    )


def similarity_figure(table: pd.DataFrame, names: Mapping[str, str]) -> Picture:
    """How alike explanations stay while a model's weights become random, layer by layer.

    Parameters
    ----------
    table : DataFrame
        ``method, depth, layer, similarity``, see `explanations_page.MethodChecks`; the depths of
        all methods are the same.
    names : mapping
        What to call each method.
    """
    layers = table.drop_duplicates("depth").sort_values("depth")

    def draw(axes):
        for number, (method, of_method) in enumerate(table.groupby("method", sort=False)):
            color = COLORS[number % len(COLORS)]
            line = ("-", "--", "-.", ":")[number // len(COLORS) % 4]
            axes.plot(
                of_method["depth"], of_method["similarity"], color=color, ls=line, marker="o",
                markersize=3, lw=1.3, label=names[method],
            )  # fmt: skip
        axes.axhline(0, color=GREY, lw=1, ls=":")
        axes.set_xticks(layers["depth"], layers["layer"], rotation=20, ha="right", fontsize=8)
        axes.set(ylim=(min(-0.1, table["similarity"].min() - 0.05), 1.02))
        axes.set(xlabel="weights random from the head down to", ylabel="rank correlation")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)

    return Picture(_svg(draw), "Similarity of each method's maps while weights become random")


def _legend_above(axes, columns: int):
    """Over the axes, where it hides nothing that is drawn."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns, fontsize=8)


def _svg(draw) -> bytes:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        draw(figure.subplots())
        picture = io.BytesIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()

"""The figure of `duqpp inspect --plot`."""

import os
from itertools import cycle
from pathlib import Path
from typing import Any

from duqpp.errors import InputError
from duqpp.files import check_writable
from duqpp.methods.reports import GroupReport
from duqpp.tools.inspection import Inspection, layer_and_kind

_INK, _GRID = "#22303c", "#e3e7eb"
_BEFORE, _AFTER = "#d1495b", "#1f6fb2"
_COLOURS = ("#1f6fb2", "#e08e0b", "#2a9d5c", "#8e44ad")  # of the kinds of groups, in turn
_LINE = {"linewidth": 1.7, "markersize": 3.2}
_HEADING = {"fontsize": 13, "fontweight": "bold", "color": _INK, "x": 0.01, "ha": "left"}


def plot(inspection: Inspection, file: str | Path) -> None:
    """Write `draw`'s figure to a .png, .pdf or .svg file, which is replaced whole or not at all.

    Raises: InputError without matplotlib, for a report without activations, for an unwritable file.
    """
    check_plot_file(file)
    figure = draw(inspection)
    path = Path(file)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        figure.savefig(partial, dpi=120)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def draw(inspection: Inspection) -> Any:
    """A matplotlib figure of an inspection.

    From top to bottom: the largest input magnitude of each layer before and after, one panel per
    linear group; block amax of every layer of the group with the largest outlier, and of its worst
    layer; errors per layer.

    Raises: InputError for a report without activations.
    """
    from matplotlib.figure import Figure

    groups = [g for g in inspection.groups if g.block_amax and g.block_amax_before]
    if not groups:
        raise InputError(
            "nothing to plot: this quantization read no activations; inspect the float model, "
            "with the same options, instead"
        )
    figure: Any = Figure(figsize=(14, 13), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(1, 1.05, 1))
    figure.suptitle(
        f"{inspection.model}   {inspection.method}", fontsize=16, fontweight="bold", color=_INK
    )
    _draw_outliers(top, groups, inspection.kinds)
    _draw_blocks(middle, groups, inspection.kinds)
    _draw_errors(bottom, groups, inspection.kinds)
    return figure


def check_plot_file(file: str | Path) -> None:
    """Raise InputError if no plot can be written there, before time is spent on its data."""
    try:
        import matplotlib  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install matplotlib") from error
    path = Path(file)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"cannot plot to {path}: its name must end in .png, .pdf or .svg")
    check_writable(path, "plot to")


def _members(groups: list[GroupReport], kind: str) -> tuple[list[int], list[GroupReport]]:
    """Layers, ascending, and their reports, of one kind of linear group."""
    by_layer = {layer_and_kind(g)[0]: g for g in groups if layer_and_kind(g)[1] == kind}
    layers = sorted(by_layer)
    return layers, [by_layer[layer] for layer in layers]


def _draw_outliers(figure: Any, groups: list[GroupReport], labels: dict[str, str]) -> None:
    """One panel per kind of group: the largest block amax against the layer."""
    figure.suptitle(
        "Outliers: largest input magnitude of each layer, before and after the method's transform",
        **_HEADING,
    )
    kinds = [kind for kind in labels if _members(groups, kind)[0]]
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        layers, members = _members(groups, kind)
        before = [max(g.block_amax_before) for g in members]
        after = [max(g.block_amax) for g in members]
        axes.fill_between(layers, before, after, color=_BEFORE, alpha=0.10, linewidth=0)
        axes.plot(layers, before, "o-", color=_BEFORE, label="before", **_LINE)
        axes.plot(layers, after, "o-", color=_AFTER, label="after", **_LINE)
        axes.set_yscale("log")
        _style(axes, f"input of {labels[kind]}", "layer", "largest |x|  (log scale)")
        _whole_ticks(axes)
        axes.label_outer()
    panels[0].legend(frameon=False, fontsize=10)


def _draw_blocks(figure: Any, groups: list[GroupReport], labels: dict[str, str]) -> None:
    """Two heat-maps, layers by blocks, for the kind with the largest outlier; its worst layer."""
    from matplotlib.colors import LogNorm

    worst = max(groups, key=lambda g: max(g.block_amax_before))
    worst_layer, kind = layer_and_kind(worst)
    layers, members = _members(groups, kind)
    name = f"input of {labels[kind]}"
    figure.suptitle(
        f"Block amax of the {name}, the group with the largest outlier "
        "(a block is 32 channels that share one scale)",
        **_HEADING,
    )
    before = [g.block_amax_before for g in members]
    after = [g.block_amax for g in members]
    positive = [value for row in before + after for value in row if value > 0] or [1.0]
    norm = LogNorm(min(positive), max(positive))
    *maps, curves = figure.subplots(1, 3, width_ratios=(1, 1, 1.15))
    extent = (-0.5, len(before[0]) - 0.5, len(layers) - 0.5, -0.5)
    for axes, values, title in zip(maps, (before, after), ("before", "after"), strict=True):
        image = axes.imshow(
            values, aspect="auto", norm=norm, cmap="magma", interpolation="nearest", extent=extent
        )
        _style(axes, f"{name}, {title}", "block", "layer")
        axes.grid(False)
        step = max(1, len(layers) // 8)
        axes.set_yticks(range(0, len(layers), step), labels=layers[::step])
    maps[1].set_ylabel("")
    bar = figure.colorbar(image, ax=maps, pad=0.015, aspect=28)
    bar.set_label("largest |x| in the block", color=_INK)
    bar.outline.set_visible(False)

    blocks = range(len(worst.block_amax))
    curves.step(blocks, worst.block_amax_before, where="mid", color=_BEFORE, label="before")
    curves.step(blocks, worst.block_amax, where="mid", color=_AFTER, label="after")
    curves.set_yscale("log")
    _style(curves, f"layer {worst_layer}, the worst", "block", "largest |x| in the block")
    _whole_ticks(curves)
    curves.legend(frameon=False, fontsize=10)


def _draw_errors(figure: Any, groups: list[GroupReport], labels: dict[str, str]) -> None:
    """Relative errors against the layer, a colour for each kind of group."""
    figure.suptitle("Error per layer, relative to the norm of the exact values", **_HEADING)
    activation, weight, output = figure.subplots(1, 3)
    for (kind, label), colour in zip(labels.items(), cycle(_COLOURS), strict=False):
        layers, members = _members(groups, kind)
        if not layers:
            continue
        line = {"color": colour, **_LINE}
        activation.plot(
            layers, [100 * g.activation_error_before for g in members], ":", **line, alpha=0.75
        )
        for axes, name in ((activation, "activation"), (weight, "weight"), (output, "output")):
            values = [100 * getattr(g, f"{name}_error") for g in members]
            axes.plot(layers, values, "o-", label=label, **line)
    _style(activation, "activations  (dotted: before)", "layer", "relative error, %")
    _style(weight, "weights", "layer", "relative error, %")
    _style(output, "outputs of the linears", "layer", "relative error, %")
    for axes in (activation, weight, output):
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
        _whole_ticks(axes)
    output.legend(title="linears", frameon=False, fontsize=10, ncols=2)


def _style(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11.5, color=_INK)
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=9.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#9aa5b1")


def _whole_ticks(axes: Any) -> None:
    """Layers and blocks are whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))

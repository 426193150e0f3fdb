"""Figure helpers: each takes arrays and tables and returns a matplotlib Figure.

Nothing is shown here: a notebook displays the figure that a cell returns. Colours are
those of Okabe & Ito, told apart in any colour vision; markers and lines differ as well.
"""

import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from astropy.table import Table
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, ConnectionPatch, Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from .files import write_whole
from .measurement import binned, binned_half_width

# A label takes the first colour whose key it contains; without one, a spare colour.
COLOURS = {
    "transfer": "#E69F00",
    "real": "#7f7f7f",
    "peak": "#CC79A7",
    "pixel": "#009E73",
    "euclid": "#D55E00",
    "parametric": "#D55E00",
    "lsst": "#0072B2",
}
SPARE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, LINES = "osD^v<>P", ("-", "--", "-.", ":")
GREY, SKY_BLUE, VERMILLION = "#7f7f7f", "#56B4E9", "#D55E00"
KINDS = {  # what a layer is drawn as in `architecture`, and its colour
    "image": "#BBBBBB",
    "convolution": "#56B4E9",
    "transposed convolution": "#E69F00",
    "dense": "#009E73",
    "latent": "#CC79A7",
}
LAYERS = {
    "InputLayer": "image",
    "Conv2D": "convolution",
    "Conv2DTranspose": "transposed convolution",
    "Dense": "dense",
}
ARROW = {"arrowstyle": "-|>", "color": GREY, "shrinkA": 0, "shrinkB": 0}
WIDTH = 7.0  # inches, at which this text can still be read on a phone
STYLE = {"font.size": 11, "legend.fontsize": 10.5, "axes.titlesize": 11}
TICK_SIZE = 10
MIDDLE, REACH = (10, 90), 1.5  # percentiles of a loss; how far beyond them it is rare

_recorded: dict[str, dict[str, Any]] = {}  # by this process: file stem to numbers


def _figure(rows: int, columns: int, height: float, **kwargs) -> tuple[Figure, Any]:
    kwargs |= {"figsize": (WIDTH, height), "layout": "constrained", "dpi": 144}
    fig, axes = plt.subplots(rows, columns, squeeze=False, **kwargs)
    # Jupyter would display an open figure a second time, and pyplot never free it.
    plt.close(fig)
    for ax in axes.flat:
        ax.tick_params(which="both", direction="in", labelsize=TICK_SIZE)
    return fig, axes


def _styles(labels: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour, marker and line style of each label."""
    keyed = [
        next((COLOURS[key] for key in COLOURS if key in label.lower()), None)
        for label in labels
    ]
    spare = iter([c for c in SPARE if c not in keyed] + list(SPARE) * len(keyed))
    return {
        label: {
            "color": colour or next(spare),
            "marker": MARKERS[i % len(MARKERS)],
            "ls": LINES[i % len(LINES)],
        }
        for i, (label, colour) in enumerate(zip(labels, keyed, strict=True))
    }


def _legend(
    fig: Figure, labels: Sequence[str], handles: Sequence | None = None
) -> None:
    """Legend above the axes; without handles, a patch in the colour of each label."""
    if handles is None:
        colours = [style["color"] for style in _styles(labels).values()]
        handles = [Patch(color=colour, alpha=0.6) for colour in colours]
    columns = len(labels)
    if sum(len(label) + 6 for label in labels) > 72:
        columns = 2 if columns < 5 else 3
    place = {"loc": "outside upper center", "ncols": columns, "frameon": False}
    fig.legend(handles, labels, **place)


def _log_axis(ax: Axes, low: float, high: float) -> None:
    """A logarithmic x axis with as many plain numbers as fit."""
    decades = math.log10(high / low)
    subs = (1, 2, 5) if decades < 1.9 else (1, 3) if decades < 2.7 else (1,)
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    _plain_numbers(ax.xaxis, subs)


def _plain_numbers(axis: Axis, subs: tuple[int, ...]) -> None:
    """Label a logarithmic axis at these multiples of powers of ten, and only there."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def rgb(
    images: np.ndarray,
    bands: tuple[int, int, int] = (3, 2, 1),
    scale: np.ndarray | None = None,
) -> np.ndarray:
    """Colour composite of stamps, stretched by arcsinh.

    `images` (..., y, x, band) in electrons; `bands` become red, green and blue (by
    default LSST's i, r and g). `scale` (band,) in electrons is the brightness that is
    white when tripled: the constants of a normalisation, or each band's maximum.
    Returns (..., y, x, 3) in [0, 1]. After Lupton et al. 2004.
    """
    images, bands = np.asarray(images, dtype=float), list(bands)
    if scale is None:
        scale = images.max(axis=tuple(range(images.ndim - 1)))
    scale = np.maximum(np.asarray(scale, dtype=float)[bands], 1e-9)
    colour = np.clip(images[..., bands] / scale, 0, None)  # (..., y, x, 3)
    intensity = np.maximum(colour.mean(axis=-1, keepdims=True), 1e-9)
    colour *= np.arcsinh(20 * intensity) / np.arcsinh(60) / intensity
    return colour / np.maximum(colour.max(axis=-1, keepdims=True), 1)


def _crosses(
    ax: Axes, target: np.ndarray | None, neighbours: np.ndarray | None
) -> list:
    """Cross the target and its neighbours, x and y in arcsec; return the handles."""
    handles = []
    for label, points, colour, marker in (
        ("target", target, SKY_BLUE, "+"),
        ("neighbours", neighbours, VERMILLION, "x"),
    ):
        if points is not None:
            x, y = np.reshape(points, (-1, 2)).T
            style = {"color": colour, "marker": marker, "ms": 6.5, "mew": 1.5, "ls": ""}
            handles += ax.plot(x, y, label=label, **style)
            handles[-1].set_path_effects([withStroke(linewidth=2.7, foreground="k")])
    return handles


def _stamp(
    ax: Axes, image: np.ndarray, pixel_scale: float, field: float | None
) -> None:
    """One stamp in arcsec from its centre; a single band is stretched by itself."""
    image = np.asarray(image, dtype=float)
    low = None
    if image.ndim == 2:
        softening = max(np.median(np.abs(image)), 3e-3 * np.abs(image).max()) or 1.0
        image, low = np.arcsinh(image / softening), -1.0
    half = len(image) * pixel_scale / 2
    extent = (-half, half, -half, half)
    ax.imshow(image, origin="lower", extent=extent, cmap="gray", vmin=low)
    limit = min(half, field / 2 if field else half)
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[])


def _scale_bar(ax: Axes) -> None:
    side = ax.get_xlim()[1] - ax.get_xlim()[0]
    length = 5 if side > 15 else 2 if side > 5 else 1  # arcsec
    x = y = -0.45 * side
    pixels = ax.images[0].get_array()
    light = pixels.ndim == 3 and pixels.mean() > 0.5  # in colours, and not dark
    look = {"color": "black" if light else "white"}
    ax.plot([x, x + length], [y, y], lw=2, solid_capstyle="butt", **look)
    ax.text(x, y + 0.03 * side, f'{length}"', size=TICK_SIZE, **look)


@plt.rc_context(STYLE)
def stamps(
    images: np.ndarray | Sequence,
    pixel_scale: float | Sequence[float] = 0.2,
    titles: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    targets: np.ndarray | None = None,
    neighbours: np.ndarray | None = None,
    field: float | None = None,
) -> Figure:
    """Grid of stamps with scale bars, and crosses on the galaxies (Figs A1 and B1).

    `images` (row, column, y, x), or (row, column, y, x, 3) from `rgb`; `pixel_scale` in
    arcsec, one for all or one a column; `targets` (row, column, 2) and `neighbours`
    (row, column, galaxy, 2): x and y from the stamp centre in arcsec, NaN where there
    is none, an axis of length 1 serving all; `field`: side shown, in arcsec.
    """
    grid = (len(images), len(images[0]))
    scales = np.broadcast_to(pixel_scale, grid[1])
    above = 0.3 * bool(len(titles)) + 0.35 * (targets is not None)
    fig, axes = _figure(*grid, height=WIDTH * grid[0] / grid[1] + above)
    fig.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    if targets is not None:
        targets = np.broadcast_to(targets, (*grid, 2))
    if neighbours is not None:
        neighbours = np.broadcast_to(neighbours, (*grid, *np.shape(neighbours)[2:]))
    for (row, column), ax in np.ndenumerate(axes):
        _stamp(ax, images[row][column], scales[column], field)
        points = [a if a is None else a[row, column] for a in (targets, neighbours)]
        crosses = _crosses(ax, *points)
        if column == 0 or len(set(scales)) > 1:
            _scale_bar(ax)
    for ax, title in zip(axes[0], titles, strict=False):
        ax.set_title(title)
    for ax, label in zip(axes[:, 0], row_labels, strict=False):
        ax.set_ylabel(label)
    if crosses:
        _legend(fig, [cross.get_label() for cross in crosses], crosses)
    return fig


@plt.rc_context(STYLE)
def distributions(truth: Mapping[str, Table], bins: int = 40) -> Figure:
    """Observed ellipticity, r magnitude and redshift of samples, as in Fig. 1.

    `truth`: label to a table with `e1`, `e2`, `r_mag` and `z`. Failed shapes (NaN) are
    left out of the first panel.
    """
    fig, axes = _figure(1, 3, 2.9)
    quantities = {
        "ellipticity $|e|$": lambda table: np.hypot(table["e1"], table["e2"]),
        "$r$ (AB mag)": lambda table: table["r_mag"],
        "redshift $z$": lambda table: table["z"],
    }
    for ax, (xlabel, quantity) in zip(axes[0], quantities.items(), strict=True):
        values = {k: np.asarray(quantity(t), dtype=float) for k, t in truth.items()}
        values = {k: v[np.isfinite(v)] for k, v in values.items()}
        edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins)
        for label, style in _styles(list(truth)).items():
            style = {"color": style["color"], "ls": style["ls"], "lw": 1.6}
            ax.hist(values[label], edges, density=True, histtype="step", **style)
        ax.set(xlabel=xlabel)
    axes[0, 0].set_ylabel("probability density")
    handles = [
        Line2D([], [], color=style["color"], ls=style["ls"], lw=1.6)
        for style in _styles(list(truth)).values()
    ]
    _legend(fig, list(truth), handles)
    return fig


def _slots(model: Any) -> list[list[tuple[str, Any]]]:
    """Layers to draw, as (kind, layer), in order; those fed alike share a slot."""
    slots: dict[int, list] = {}
    outputs = [id(tensor) for tensor in model.outputs]
    for layer in model.layers:
        kind = LAYERS.get(layer.__class__.__name__)
        if kind is None:
            continue
        flat = len(layer.output.shape) == 2
        if flat and (kind == "image" or id(layer.output) in outputs):
            kind = "latent"
        slots.setdefault(id(layer.input), []).append((kind, layer))
    return list(slots.values())


def _block(ax: Axes, x: float, y: float, kind: str, layer: Any, hatch: str) -> float:
    """Draw a layer about (x, y), write its size, and return half its width."""
    *pixels, channels = layer.output.shape[1:]
    width, height = 0.22, 0.3 * math.log2(channels)
    if pixels:
        width, height = 0.09 * math.log2(2 * channels), 0.6 * math.log2(pixels[0])
        ax.text(x, y + height / 2 + 0.12, f"{pixels[0]}²", ha="center")
    if kind == "latent":
        ax.text(x + 0.2, y, layer.name, va="center")
    ax.add_patch(
        Rectangle(
            (x - width / 2, y - height / 2),
            width,
            height,
            facecolor=KINDS[kind],
            edgecolor="black",
            lw=0.8,
            hatch=hatch,
        )
    )
    ax.text(x, y - height / 2 - 0.12, f"{channels}", ha="center", va="top")
    return width / 2


def _network(ax: Axes, model: Any, n_slots: int, towards: int, hatch: str) -> None:
    """A network in a row, running towards the latent space on the right (1) or away."""
    slots = _slots(model)
    start = n_slots - len(slots) if towards == 1 else n_slots - 1
    last = None
    for i, slot in enumerate(slots):
        x = start + towards * i
        for j, (kind, layer) in enumerate(slot):
            y = 2.8 * ((len(slot) - 1) / 2 - j)
            half = towards * _block(ax, x, y, kind, layer, hatch)
            if last is not None:
                ax.annotate("", (x - half, y), (last, 0), arrowprops=ARROW)
        last = x + half
    names = Counter(layer.__class__.__name__ for layer in model.layers)
    others = ", ".join(f"{n} {name}" for name, n in names.items() if name not in LAYERS)
    title = f"{model.name}: {model.count_params():,} parameters"
    ax.set_title(f"{title}\n(not drawn: {others})" if others else title)
    ax.set(xlim=(-0.5, n_slots + 0.4), ylim=(-3.1, 2.6))
    ax.axis("off")


@plt.rc_context(STYLE)
def architecture(encoder: Any, decoder: Any, frozen: bool = False) -> Figure:
    """Two Keras models drawn layer by layer, as in Fig. 2.

    Heights follow the logarithm of the pixels, widths that of the channels; above each
    layer its pixels, below it its channels, both read from the model. `frozen` hatches
    the decoder, whose weights the deblender does not train.
    """
    fig, axes = _figure(2, 1, 6.6)
    n_slots = max(len(_slots(encoder)), len(_slots(decoder)))
    _network(axes[0, 0], encoder, n_slots, 1, "")
    _network(axes[1, 0], decoder, n_slots, -1, "//" if frozen else "")
    x = n_slots - 1
    draw = ConnectionPatch(
        (x, -2.9), (x, 1.3), coordsA="data", axesA=axes[0, 0], axesB=axes[1, 0], **ARROW
    )
    fig.add_artist(draw).set_in_layout(False)
    axes[1, 0].text(x + 0.2, 1.8, "draw")
    drawn = {kind for m in (encoder, decoder) for slot in _slots(m) for kind, _ in slot}
    kinds = {kind: colour for kind, colour in KINDS.items() if kind in drawn}
    handles = [Patch(facecolor=c, edgecolor="black") for c in kinds.values()]
    if frozen:
        handles.append(Patch(facecolor="white", edgecolor="black", hatch="//"))
    _legend(fig, [*kinds, "frozen"][: len(handles)], handles)
    return fig


@plt.rc_context(STYLE)
def training_curve(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Training and validation loss against images seen, a panel a network.

    `curves`: label to the `curve` of a `fitting.History`. Each has its own axis, for
    a loss sums over the pixels of all its bands, and what is far from most is not
    shown.
    """
    fig, axes = _figure(1, len(curves), 3.0)
    look = {"color": "black", "mfc": "white"}
    for ax, (label, style) in zip(axes[0], _styles(list(curves)).items(), strict=True):
        curve, color = curves[label], style["color"]
        ax.plot(curve["images"], curve["loss"], "-", color=color)
        ax.plot(curve["val_images"], curve["val_loss"], "s", **look)
        ax.set(title=label, xlabel="images seen", xlim=(0, None))
        ax.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))  # 600k
        # A rare batch of huge loss leaves the panel, and does not flatten the rest;
        # nor does what rounding left of the mean after it.
        losses = np.concatenate([curve["loss"], curve["val_loss"]])
        losses = losses[np.isfinite(losses)]
        if not len(losses):
            continue
        low, high = np.percentile(losses, MIDDLE)
        far = REACH * (high - low)
        usual = losses[(losses >= low - far) & (losses <= high + far)]
        margin = 0.05 * np.ptp(usual) or 1.0
        ax.set_ylim(usual.min() - margin, usual.max() + margin)
    axes[0, 0].set_ylabel("loss (nats a stamp)")
    handles = [Line2D([], [], color="grey"), Line2D([], [], marker="s", ls="", **look)]
    _legend(fig, ["training", "validation"], handles)
    return fig


@plt.rc_context(STYLE)
def corner(latent: np.ndarray, n_dims: int = 5, limit: float = 4.0) -> Figure:
    """Corner plot of the first latent dimensions over their N(0, 1) prior (Fig. 3).

    `latent` (galaxy, dimension): a draw of the latent vector of each galaxy.
    """
    fig, axes = _figure(n_dims, n_dims, WIDTH, sharex=True)
    fig.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    edges = np.linspace(-limit, limit, 41)
    normal = np.exp(-(edges**2) / 2) / np.sqrt(2 * np.pi)
    for (row, column), ax in np.ndenumerate(axes):
        if column > row:
            ax.axis("off")
        elif column == row:
            ax.hist(latent[:, row], edges, density=True, color=SKY_BLUE)
            ax.plot(edges, normal, color=VERMILLION)
            ax.set(yticks=[])
        else:
            ax.hist2d(latent[:, column], latent[:, row], edges, cmap="Blues", cmin=1)
            for radius in (1, 2):
                ring = {"fill": False, "color": VERMILLION, "ls": "--"}
                ax.add_patch(Circle((0, 0), radius, **ring))
            ax.set(ylim=(-limit, limit), yticks=[-2, 0, 2])
            ax.tick_params(labelleft=column == 0)
        ax.set(xlim=(-limit, limit), xticks=[-2, 0, 2])
        ax.set_xlabel(f"$z_{{{column + 1}}}$" if row == n_dims - 1 else "")
        ax.set_ylabel(f"$z_{{{row + 1}}}$" if column == 0 < row else "")
    handles = [Patch(color=SKY_BLUE)]
    handles += [Line2D([], [], color=VERMILLION, ls=ls) for ls in ("-", "--")]
    labels = ["encoded galaxies", "prior N(0, 1)", r"prior, 1 and 2 $\sigma$"]
    fig.legend(handles, labels, loc="upper right", frameon=False)
    return fig


def _within(low: np.ndarray, high: np.ndarray, share: Any, log: bool) -> np.ndarray:
    """Points at a share of the way through bins, as an axis shows them."""
    low, high = (np.log(low), np.log(high)) if log else (low, high)
    points = low + (high - low) * share
    return np.exp(points) if log else points


def _boxes(
    ax: Axes, table: Table, colour: str, place: int, places: int, log: bool = False
) -> np.ndarray:
    """Boxes (16 to 84 %), medians and whiskers (2.3 to 97.7 %) of a table of `binned`.

    They stand in one of the `places` of each bin, whose middles are returned.
    """
    low, high = (np.asarray(table[name], dtype=float) for name in ("low", "high"))
    shares = 0.1 + 0.8 * (place + np.array([[0.06], [0.5], [0.94]])) / places
    left, middle, right = _within(low, high, shares, log)
    box = {"color": colour, "alpha": 0.45, "align": "edge"}
    ax.bar(left, table["p84"] - table["p16"], right - left, table["p16"], **box)
    ax.hlines(table["median"], left, right, color=colour, lw=2)
    ax.vlines(middle, table["p2.3"], table["p16"], color=colour, lw=1)
    ax.vlines(middle, table["p84"], table["p97.7"], color=colour, lw=1)
    return middle


def _zero_line(ax: Axes) -> None:
    ax.axhline(0, color="black", lw=0.8, zorder=0)


def _error_column(
    axes: Sequence[Axes],
    x: np.ndarray | Mapping[str, np.ndarray],
    errors: Mapping[str, np.ndarray],
    edges: np.ndarray,
    xlabel: str,
    ylabel: str,
    log: bool = False,
    ylim: tuple[float, float] | None = None,
    median_ylim: tuple[float, float] | None = None,
) -> None:
    top, middle, bottom = axes
    xs = x if isinstance(x, Mapping) else {"": x}
    space = np.geomspace if log else np.linspace
    fine = space(edges[0], edges[-1], 4 * (len(edges) - 1) + 1)
    for i, (label, style) in enumerate(_styles(list(errors)).items()):
        table = binned(xs.get(label, xs.get("")), errors[label], edges)
        at = _boxes(middle, table, style["color"], i, len(errors), log)
        style |= {"ls": "", "ms": 4, "capsize": 2}
        bottom.errorbar(at, table["median"], table["error"], **style)
    for label, style in _styles(list(xs)).items():
        line = {
            "color": style["color"] if label else GREY,
            "ls": style["ls"],
            "lw": 1.4,
        }
        top.hist(xs[label], fine, histtype="step", **line)
    _zero_line(middle)
    _zero_line(bottom)
    bottom.set_xlim(edges[0], edges[-1])
    if log:
        _log_axis(bottom, edges[0], edges[-1])
    top.set(ylabel="galaxies")
    middle.set(ylabel=ylabel, ylim=ylim)
    bottom.set(ylabel="median", xlabel=xlabel, ylim=median_ylim)


@plt.rc_context(STYLE)
def error_columns(columns: Sequence[Mapping[str, Any]]) -> Figure:
    """Histogram of x, errors in bins of x, and their medians: Figs 5 to 7.

    Each column is a dictionary: `errors`, label to (scene,), the same labels in all;
    `x` (scene,) for all, or by label; `edges` (bin + 1,); `xlabel`, `ylabel`; `log` for
    a logarithmic x; limits `ylim` of the boxes and `median_ylim`. Boxes show the median
    and the 16th and 84th percentiles, whiskers the 2.3rd and the 97.7th, bars on the
    medians bootstrap errors; NaN is left out (`binned` counts it).
    """
    rows = {"sharex": "col", "height_ratios": (1, 2.2, 1.4)}
    fig, axes = _figure(3, len(columns), 6.2, **rows)
    for column_axes, column in zip(axes.T, columns, strict=True):
        _error_column(column_axes, **column)
    fig.align_ylabels(axes)
    _legend(fig, list(columns[0]["errors"]))
    return fig


def errors_against(
    tables: Mapping[str, Table], x: str, edges: np.ndarray, xlabel: str, **options: Any
) -> Figure:
    """Errors on ellipticity and r magnitude of tables of `evaluate`, in bins of `x`.

    `x` names one of their columns. Tables of the same scenes share one histogram.
    `options` as in `error_columns`.
    """
    xs = {label: np.asarray(table[x]) for label, table in tables.items()}
    first, *others = xs.values()
    shared = all(np.array_equal(first, other, equal_nan=True) for other in others)
    column = {"x": first if shared else xs, "edges": edges, "xlabel": xlabel} | options
    names = {"de": r"$\Delta|e|$", "dr": r"$\Delta r$ (mag)"}
    return error_columns(
        [
            column
            | {"errors": {k: t[error] for k, t in tables.items()}, "ylabel": ylabel}
            for error, ylabel in names.items()
        ]
    )


def _arrows(
    ax: Axes, e: np.ndarray, edges: np.ndarray, colour: str, fewest: int
) -> None:
    """Mean input to mean output of the cells of the (e1, e2) plane, to scale."""
    e = e[np.isfinite(e).all(axis=(1, 2))]  # (galaxy, in/out, component)
    cell = np.digitize(e[:, 0], edges) - 1  # (galaxy, component)
    ends = []
    for index in np.ndindex(len(edges) - 1, len(edges) - 1):
        inside = (cell == index).all(axis=1)
        if inside.sum() >= fewest:
            ends.append(e[inside].mean(axis=0))
    start, end = np.moveaxis(np.reshape(ends, (-1, 2, 2)), 1, 0)
    to_scale = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.006}
    ax.quiver(*start.T, *(end - start).T, color=colour, **to_scale)
    ax.plot(*start.T, ".", color=colour, ms=3)


@plt.rc_context(STYLE)
def ellipticity_components(
    ellipticities: Mapping[str, tuple[np.ndarray, np.ndarray]],
    limit: float = 0.6,
    n_bins: int = 8,
    min_galaxies: int = 5,
) -> Figure:
    """Errors on e1, e2 and the modulus in bins of each, and mean offsets (Fig. 4).

    `ellipticities`: label to input and output, each (galaxy, component). Arrows go from
    the mean input to the mean output of the galaxies of a cell, on the scale of the
    axes; cells of fewer than `min_galaxies` have none.
    """
    fig, axes = _figure(2, 2, 6.4)
    panels = {"$e_1$": axes[0, 0], "$e_2$": axes[0, 1], "$|e|$": axes[1, 0]}
    axes[0, 1].sharey(axes[0, 0])
    edges = np.linspace(-limit, limit, n_bins + 1)
    for i, (label, style) in enumerate(_styles(list(ellipticities)).items()):
        e = np.stack(ellipticities[label], axis=1).astype(float)  # (galaxy, in/out, 2)
        every = np.concatenate([e, np.hypot(*e.T).T[..., None]], axis=2)  # and |e|
        for k, ax in enumerate(panels.values()):
            bins = edges if k < 2 else np.linspace(0, 1.25 * limit, n_bins + 1)
            table = binned(every[:, 0, k], every[:, 1, k] - every[:, 0, k], bins)
            _boxes(ax, table, style["color"], i, len(ellipticities))
        _arrows(axes[1, 1], e, edges, style["color"], min_galaxies)
    for name, ax in panels.items():
        _zero_line(ax)
        ax.set(xlabel=f"{name} of the target", ylabel=f"error on {name}")
    square = {"xlim": (-limit, limit), "ylim": (-limit, limit), "aspect": "equal"}
    axes[1, 1].set(xlabel="$e_1$", ylabel="$e_2$", **square)
    axes[1, 1].locator_params(nbins=5)
    _legend(fig, list(ellipticities))
    return fig


@plt.rc_context(STYLE)
def bias_against_snr(
    biases: Mapping[str, Table], xlabel: str = "S/N of the target in the $r$ band"
) -> Figure:
    """Mean multiplicative ellipticity bias against signal-to-noise ratio (Figs 8, 9).

    `biases`: label to a table of `binned_ellipticity_bias`; bars are bootstrap errors.
    """
    fig, axes = _figure(1, 1, 4.2)
    ax = axes[0, 0]
    for i, (label, style) in enumerate(_styles(list(biases)).items()):
        table = biases[label]
        side_by_side = 1.015 ** (i - (len(biases) - 1) / 2)
        style |= {"ms": 5, "lw": 1.4, "capsize": 2}
        ax.errorbar(table["x"] * side_by_side, table["alpha"], table["error"], **style)
    _zero_line(ax)
    _log_axis(ax, table["low"][0], table["high"][-1])
    ylabel = r"ellipticity bias $(\alpha_1 + \alpha_2)\,/\,2$"
    ax.set(xlabel=xlabel, ylabel=ylabel)
    _legend(fig, list(biases), ax.containers)
    return fig


@plt.rc_context(STYLE)
def half_widths(
    errors: Sequence[Mapping[str, np.ndarray]],
    xs: Sequence[tuple[str, np.ndarray, np.ndarray]],
    ylabels: Sequence[str],
) -> Figure:
    """Half the 16-to-84 % range of errors in bins; a row an error, a column an x.

    `errors`: a mapping of label to (scene,) for each row, the same labels in all, named
    by `ylabels`. `xs`: label, values (scene,) and edges of each column; edges above
    zero that span more than a decade make it logarithmic. Bins of fewer than ten
    galaxies have no point.
    """

    def widths(error: np.ndarray) -> list[np.ndarray]:
        """Of the bins of each x."""
        tables = [binned_half_width(x, error, edges) for _, x, edges in xs]
        return [np.array([table["half_width"], table["error"]]) for table in tables]

    rows = [{label: widths(e) for label, e in each.items()} for each in errors]
    fig = lines_in_bins(rows, [(label, edges) for label, _, edges in xs], ylabels)
    for ax in fig.axes:
        ax.set_yscale("log")
        _plain_numbers(ax.yaxis, (1, 2, 5))
    return fig


@plt.rc_context(STYLE)
def lines_in_bins(
    rows: Sequence[Mapping[str, Sequence[np.ndarray]]],
    xs: Sequence[tuple[str, np.ndarray]],
    ylabels: Sequence[str],
) -> Figure:
    """Numbers of bins as lines with error bars; a row a number, a column an x.

    `rows`: for each number, named by `ylabels`, a mapping of label to what it is in the
    bins of each x, and its error, (value/error, bin); the same labels in all. `xs`:
    label and edges (bin + 1,); edges above zero that span more than a decade make its
    axis logarithmic.
    """
    fig, axes = _figure(len(rows), len(xs), 1 + 2.4 * len(rows), sharex="col")
    styles = _styles(list(rows[0]))
    for j, (xlabel, edges) in enumerate(xs):
        log = edges[0] > 0 and edges[-1] > 10 * edges[0]
        for ax, lines in zip(axes[:, j], rows, strict=True):
            for i, (label, of_x) in enumerate(lines.items()):
                share = 0.35 + 0.3 * (i + 0.5) / len(lines)
                middle = _within(edges[:-1], edges[1:], share, log)
                value, error = of_x[j]
                style = styles[label] | {"ms": 4, "lw": 1.4, "elinewidth": 0.8}
                ax.errorbar(middle, value, error, label=label, **style)
            if log:
                _log_axis(ax, edges[0], edges[-1])
        axes[-1, j].set(xlabel=xlabel)
    for ax, ylabel in zip(axes[:, 0], ylabels, strict=True):
        ax.set(ylabel=ylabel)
    _legend(fig, *reversed(axes[0, 0].get_legend_handles_labels()))
    return fig


def _three_digits(number: float) -> str:
    """A number of about three digits, without an exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


@plt.rc_context(STYLE)
def rates(tasks: Mapping[str, Mapping[str, float]], ours: Sequence[str]) -> Figure:
    """Things done in a second, a panel a task and a bar a method, on one log axis.

    Methods in `ours` have the colour of this book, the others are grey.
    """
    heights = [len(methods) for methods in tasks.values()]
    ratios = {"height_ratios": heights}
    fig, axes = _figure(
        len(tasks), 1, 1.2 + 0.55 * sum(heights), sharex=True, gridspec_kw=ratios
    )
    for ax, (task, methods) in zip(axes[:, 0], tasks.items(), strict=True):
        colours = [SKY_BLUE if name in ours else "#BBBBBB" for name in methods]
        bars = ax.barh(list(methods), list(methods.values()), color=colours)
        ax.bar_label(bars, fmt=_three_digits, padding=3, fontsize=TICK_SIZE)
        ax.set_title(task, loc="left")
        ax.invert_yaxis()
    values = [rate for methods in tasks.values() for rate in methods.values()]
    _log_axis(axes[-1, 0], min(values) / 2, max(values) * 4)
    axes[-1, 0].set_xlabel("per second")
    handles = [Patch(color=SKY_BLUE), Patch(color="#BBBBBB")]
    _legend(fig, ["this book", "peers"], handles)
    return fig


@plt.rc_context(STYLE)
def scaling(
    workers: Sequence[int],
    speeds: Mapping[str, Sequence[float]],
    scenes: Sequence[int],
    memory: Sequence[float],
) -> Figure:
    """Speed against the number of processes, and memory (GB) against that of scenes.

    `speeds` are things done a second, one value for each number of `workers`; they are
    shown in units of the first. Dotted, each worker as fast as one alone.
    """
    fig, ((left, right),) = _figure(1, 2, 3.4)
    for label, style in _styles(list(speeds)).items():
        gain = np.asarray(speeds[label]) / speeds[label][0]
        left.plot(workers, gain, label=label, **style)
    left.plot(workers, np.asarray(workers) / workers[0], ":", color="black")
    left.set(xlabel="processes", ylabel="speed relative to one process")
    left.set(xticks=list(workers))
    right.plot(scenes, memory, "o-", color=SPARE[0])
    _log_axis(right, min(scenes) / 1.5, max(scenes) * 1.5)
    right.set(xlabel="scenes", ylabel="memory (GB)", ylim=(0, 1.2 * max(memory)))
    _legend(fig, list(speeds), left.get_legend_handles_labels()[0])
    return fig


@plt.rc_context(STYLE)
def shear_bias(biases: Mapping[str, Table]) -> Figure:
    """Multiplicative and additive shear biases with bootstrap errors (section 4.3).

    `biases`: label to a table of `shear_biases`; a label that says "target" is hollow.
    """
    fig, axes = _figure(1, 2, 1.3 + 0.5 * len(biases), sharey=True)
    panels = {"m": (100, "multiplicative bias $m$ (%)")}
    panels["c"] = (1000, "additive bias $c$ ($10^{-3}$)")
    for ax, (name, (unit, xlabel)) in zip(axes[0], panels.items(), strict=True):
        for y, (label, style) in enumerate(_styles(list(biases)).items()):
            fill = "white" if "target" in label.lower() else style["color"]
            for row, marker in zip(biases[label], "os", strict=True):
                look = {"color": style["color"], "mfc": fill, "marker": marker}
                at = y + 0.3 * (row["component"] - 1.5)
                error = unit * row[f"{name}_error"]
                ax.errorbar(unit * row[name], at, xerr=error, capsize=3, **look)
        ax.axvline(0, color="black", lw=0.8, zorder=0)
        ax.set(xlabel=xlabel)
    axes[0, 0].set(yticks=range(len(biases)), yticklabels=list(biases))
    axes[0, 0].set_ylim(len(biases) - 0.5, -0.5)
    handles = [Line2D([], [], color="black", marker=marker, ls="") for marker in "os"]
    _legend(fig, ["component 1", "component 2"], handles)
    return fig


@plt.rc_context(STYLE)
def posterior(
    images: np.ndarray,
    de: Mapping[str, np.ndarray],
    dr: Mapping[str, np.ndarray],
    pixel_scale: float = 0.2,
    targets: np.ndarray | None = None,
    neighbours: np.ndarray | None = None,
    field: float | None = None,
    bins: int = 40,
) -> Figure:
    """Errors on ``|e|`` and r over posterior draws, a row a scene, as in Fig. C1.

    `images` (scene, y, x), or (scene, y, x, 3) from `rgb`; `de` and `dr`: label to
    (scene, draw); `targets` (scene, 2) and `neighbours` (scene, galaxy, 2) in arcsec.
    Failed measurements (NaN) are left out.
    """
    fig, axes = _figure(len(images), 3, 0.7 + 1.9 * len(images))
    for i, row in enumerate(axes):
        _stamp(row[0], images[i], pixel_scale, field)
        _scale_bar(row[0])
        _crosses(row[0], *(a if a is None else a[i] for a in (targets, neighbours)))
        for ax, draws in zip(row[1:], (de, dr), strict=True):
            values = {k: np.asarray(v[i], dtype=float) for k, v in draws.items()}
            values = {k: v[np.isfinite(v)] for k, v in values.items()}
            edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins)
            for label, style in _styles(list(draws)).items():
                if not values[label].size:
                    continue
                look = {"color": style["color"], "density": True}
                ax.hist(values[label], edges, alpha=0.45, **look)
                ax.hist(values[label], edges, histtype="step", ls=style["ls"], **look)
            ax.axvline(0, color="black", lw=1, ls=":")
            ax.set(yticks=[])
            ax.locator_params(axis="x", nbins=3)
        row[1].set_ylabel("density")
    axes[-1, 1].set_xlabel("error on $|e|$")
    axes[-1, 2].set_xlabel("error on $r$ (mag)")
    _legend(fig, list(de))
    return fig


def _write(folder: str, name: str, content: bytes) -> None:
    path = Path(os.environ["DEBLENDER_BUILD"]) / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)


def publish(fig: Figure, label: str) -> Figure:
    """Keep a figure as figures/<label>.png and .pdf under $DEBLENDER_BUILD; return it.

    Writes nothing where that variable is not set. Same data, same bytes.
    Raises ValueError for a label that would not do as a file name.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", label):
        raise ValueError(
            f"figure label {label!r}; accepted: lower-case letters, digits, '-' and '_'"
        )
    if os.environ.get("DEBLENDER_BUILD"):
        for suffix, metadata in {"png": {}, "pdf": {"CreationDate": None}}.items():
            content = io.BytesIO()
            fig.savefig(content, format=suffix, dpi=200, metadata=metadata)
            _write("figures", f"{label}.{suffix}", content.getvalue())
    return fig


def _plain(value: Any) -> Any:
    """What JSON can hold: NumPy unwrapped, NaN and infinity as null."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(columns: Mapping[str, Sequence]) -> Any:
    """Columns by title, as a table of a notebook; whole numbers as 1,000."""
    from IPython.display import HTML  # there in every notebook, not in every script

    table = Table(columns)
    for column in table.itercols():
        if column.dtype.kind == "i":
            column.format = "{:,}"
    return HTML("".join(table.pformat(html=True, show_dtype=False)))


def _glue(name: str, value: int | float | str) -> None:
    try:
        from myst_nb import glue
    except ModuleNotFoundError:  # on Colab: the text is read in the book
        return
    glue(name, value, display=False)


def record(stem: str, **numbers: Any) -> dict[str, Any]:
    """Keep results of a chapter, for metrics/<stem>.json and for its prose.

    Adds to what this process has recorded under `stem`, and returns all of it; NaN
    becomes null. The file goes under $DEBLENDER_BUILD, if that is set; where the book
    is built, single numbers are also glued, for the text to quote by name.
    """
    for name, value in numbers.items():
        value = value.item() if isinstance(value, np.generic) else value
        if isinstance(value, int | float | str):
            # NaN stays a number here, or the text could not format it.
            _glue(name, float(value) if isinstance(value, float) else value)
    kept = _recorded.setdefault(stem, {})
    kept |= {name: _plain(value) for name, value in numbers.items()}
    if os.environ.get("DEBLENDER_BUILD"):
        text = json.dumps(kept, indent=2, sort_keys=True, allow_nan=False)
        _write("metrics", f"{stem}.json", f"{text}\n".encode())
    return dict(kept)

"""The figures of the report on a prepared set: O/report/sources.png and so on.

The same statistics give the same bytes with the same matplotlib.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dct_qwen2vl.common.files import replacing
from dct_qwen2vl.preparation.data_splits import SPLITS
from dct_qwen2vl.preparation.report.statistics import Statistics
from dct_qwen2vl.preparation.report.tokens import Lengths

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

WIDTH, HEIGHT = 4.8, 3.1  # inches; a page shows an inch as 100 CSS px
DPI = 200
LEAST_ROOM = 3  # bars: fewer are not drawn thicker
MOST_BARS = 12  # sources or reasons; the rest is one bar
LONGEST_NAME = 24  # characters
BINS, FEW_BINS = 60, 30  # of a histogram, of each side of a map and of a narrow histogram

INK, FAINT, GRID = "#1a1a1a", "#5f5f5f", "#e4e4e4"
# The sources with most entries have a colour each, the others share one.
SERIES = ("#2f6db5", "#d98c2b", "#3f8f6b", "#b8473a", "#7b63a8", "#4aa0b5", "#8c7a4f")
OTHER = "#a6a6a6"
FEW, MANY = "#d9e5f3", "#16365c"  # the ends of a scale, SERIES[0] in its middle
SETTINGS = {  # matplotlib's
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "text.parse_math": False,  # names of sources may hold a $
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 1,
}


@dataclass(frozen=True)
class Data:
    """What the figures show."""

    statistics: Statistics
    lengths: Lengths
    seq_lengths: list[int]


@dataclass(frozen=True)
class Figure:
    """One figure.

    name: of the file, without ending.
    caption: what is on the axes.
    draw: puts it on a matplotlib figure.
    """

    name: str
    caption: str
    draw: Callable[["Drawing", Data], None]


def draw_figures(data: Data, folder: Path) -> list[Figure]:
    """Draws the figures that the set has data for, and removes the files of the others. Returns those drawn.

    data: What the figures show.
    folder: Gets the figures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [figure for figure in FIGURES if has_data(figure, data.statistics)]
    for figure in FIGURES:
        if figure in drawn:
            save_figure(figure, data, figure_path(folder, figure))
        else:
            figure_path(folder, figure).unlink(missing_ok=True)
    return drawn


def has_data(figure: Figure, statistics: Statistics) -> bool:
    if figure.name == "skips":
        return sum(statistics.stats["skipped"].values()) > 0
    if figure.name == "videos":
        return bool(statistics.is_video.any())
    if figure.name in ("sizes", "aspect_ratios", "visual_tokens"):
        return bool(statistics.media.any())
    return len(statistics) > 0


def figure_path(folder: Path, figure: Figure) -> Path:
    """The file of a figure.

    folder: Of the figures.
    figure: The figure.
    """
    return folder / f"{figure.name}.png"


def save_figure(figure: Figure, data: Data, path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure as Drawing

    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings(), replacing(path) as stream:
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # names in scripts that the font lacks
        drawing = Drawing(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
        figure.draw(drawing, data)
        drawing.savefig(stream, format="png", metadata={"Software": None})


# Bars


def shorten(name: str) -> str:
    """A name that fits beside a bar: one line of characters that are printed."""
    printed = "".join(character if character.isprintable() else "\ufffd" for character in name)
    return printed if len(printed) <= LONGEST_NAME else printed[: LONGEST_NAME - 1] + "…"


def sum_up(names: list[str], table: np.ndarray, most: int, rest: str) -> tuple[list[str], np.ndarray]:
    """At most `most` rows of a table, with their names. The last is the sum of the others, named "5 `rest`"."""
    if len(names) <= most:
        return [shorten(name) for name in names], table
    kept = most - 1
    summed = np.concatenate([table[:kept], table[kept:].sum(axis=0, keepdims=True)])
    return [*(shorten(name) for name in names[:kept]), f"{len(names) - kept} {rest}"], summed


def stack_bars(drawing: "Drawing", labels: list[str], parts: list[tuple[str, str, np.ndarray]], xlabel: str):
    """Draws a horizontal bar for each label, the first on top. Returns the axes.

    parts: of the bars, as (name, colour, length for each label).
    """
    axes = drawing.subplots()
    rows, left = np.arange(len(labels)), np.zeros(len(labels))
    for name, colour, widths in parts:
        axes.barh(rows, widths, left=left, height=0.72, color=colour, label=name)
        left = left + widths
    axes.set_yticks(rows, labels)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(max(len(labels), LEAST_ROOM) - 0.5, -0.5)
    axes.set_xlabel(xlabel)
    axes.grid(axis="x")
    columns = 2 if max(len(name) for name, _, _ in parts) > 0.75 * LONGEST_NAME else 4
    drawing.legend(loc="outside lower center", ncols=min(columns, len(parts)), columnspacing=1.2)
    return axes


def parts_by_source(statistics: Statistics, table: np.ndarray) -> list[tuple[str, str, np.ndarray]]:
    """A table [sources, bars] as parts of `stack_bars`. A source has one colour in all figures."""
    names, table = sum_up(list(statistics.sources), table, len(SERIES) + 1, "other sources")
    parts = zip(names, [*SERIES, OTHER], table)
    return [(name, colour, widths) for name, colour, widths in parts if widths.any()]


def draw_sources(drawing: "Drawing", data: Data) -> None:
    statistics = data.statistics
    of, sources = statistics.stats["sources"], list(statistics.sources)
    table = np.array([[of[name]["written"], *statistics.left_out_of(name)] for name in sources])
    labels, table = sum_up(sources, table, MOST_BARS, "other sources")
    kinds = ("samples written", SERIES[0]), ("entries skipped", SERIES[3]), ("left out by weight", OTHER)
    parts = [(name, colour, column) for (name, colour), column in zip(kinds, table.T) if column.any()]
    count_ticks(stack_bars(drawing, labels, parts, "samples and entries").xaxis)


def draw_skips(drawing: "Drawing", data: Data) -> None:
    statistics = data.statistics
    skipped = {reason: count for reason, count in statistics.stats["skipped"].items() if count}
    reasons = sorted(skipped, key=lambda reason: (-skipped[reason], reason))
    table = np.array(
        [[statistics.skipped_of(name).get(reason, 0) for name in statistics.sources] for reason in reasons]
    )
    labels, table = sum_up([reason.replace("_", " ") for reason in reasons], table, MOST_BARS, "other reasons")
    parts = parts_by_source(statistics, table.T)
    count_ticks(stack_bars(drawing, labels, parts, "skipped entries").xaxis)


def draw_splits(drawing: "Drawing", data: Data) -> None:
    counts = data.statistics.source_by_split()
    present = np.flatnonzero(counts.sum(axis=0))
    shares = 100 * counts[:, present] / counts[:, present].sum(axis=0)
    parts = parts_by_source(data.statistics, shares)
    axes = stack_bars(drawing, [SPLITS[split] for split in present], parts, "share of the split's samples, %")
    axes.set_xlim(0, 100)


# Histograms


def short_number(value: float, _position: int = 0) -> str:
    """A tick's label: 0.5, 20, 15k, 2M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def count_ticks(axis) -> None:
    """Whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set_major_formatter(short_number)


def edges_of(values: np.ndarray, least_ratio: float = 8, bins: int = BINS) -> tuple[np.ndarray, bool]:
    """Edges of bins for values above 0, and whether they are logarithmic: where the values span `least_ratio`.

    No bin is narrower than a step of whole numbers, which would leave gaps between bins.
    """
    low, high = float(values.min()), float(values.max())
    is_logarithmic = high >= low * least_ratio
    if is_logarithmic:
        edges = np.geomspace(low / 1.05, high * 1.05, bins + 1)
    else:
        margin = max(0.05 * (high - low), 0.1 * low)
        edges = np.linspace(low - margin, high + margin, bins + 1)
    if values.dtype.kind == "i":
        edges = np.unique(np.concatenate([[low - 1], edges, [high]]).round().clip(0, None)) + 0.5
    return edges, is_logarithmic


def log_ticks(axis, most: int = 8) -> None:
    """Plain numbers, at most `most`: at 1, 2, 5, 10, ..., or at more or fewer steps, as there is room."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axis.get_view_interval()
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        locator = LogLocator(subs=steps, numticks=most + 2)
        if np.count_nonzero((ticks := locator.tick_values(low, high)) * (ticks >= low) * (ticks <= high)) <= most:
            break
    axis.set_major_locator(locator)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(short_number)


def scale_axis(axes, name: str, is_logarithmic: bool, is_whole: bool = False) -> None:
    """name: "x" or "y"."""
    axis = axes.xaxis if name == "x" else axes.yaxis
    if is_logarithmic:
        low = axis.get_view_interval()[0]
        axes.set(**{f"{name}scale": "log", f"{name}lim": (1.01 * low, None)})  # no tick at 0.5 for whole numbers
        log_ticks(axis)
    elif is_whole:
        count_ticks(axis)


def draw_histogram(axes, values: np.ndarray, xlabel: str, ylabel: str, bins: int = BINS) -> None:
    edges, is_logarithmic = edges_of(values, bins=bins)
    axes.stairs(np.histogram(values, edges)[0], edges, fill=True, color=SERIES[0])
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(edges[0], edges[-1]))
    axes.grid(axis="y")
    count_ticks(axes.yaxis)
    scale_axis(axes, "x", is_logarithmic, values.dtype.kind == "i")


def draw_sizes(drawing: "Drawing", data: Data) -> None:
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.ticker import LogLocator

    statistics, axes = data.statistics, drawing.subplots()
    height, width = statistics.height, statistics.width
    (x, log_x), (y, log_y) = edges_of(width, 4, FEW_BINS), edges_of(height, 4, FEW_BINS)
    counts, _, _ = np.histogram2d(height, width, (y, x))
    colours = LinearSegmentedColormap.from_list("counts", [FEW, SERIES[0], MANY])
    scale = LogNorm(1, max(2, counts.max()))
    mesh = axes.pcolormesh(x, y, np.ma.masked_equal(counts, 0), cmap=colours, norm=scale, rasterized=True)
    scale_axis(axes, "x", log_x, is_whole=True)
    scale_axis(axes, "y", log_y, is_whole=True)
    axes.set(xlabel="width, px", ylabel="height, px")
    axes.grid()
    bar = drawing.colorbar(mesh, label="images and videos", ticks=LogLocator(), format=short_number)
    bar.outline.set_visible(False)
    bar.minorticks_off()


def draw_aspect_ratios(drawing: "Drawing", data: Data) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    statistics, axes = data.statistics, drawing.subplots()
    ratios = np.log2(statistics.width / statistics.height)
    end = max(1.25, float(np.abs(ratios).max()) * 1.02)
    edges = 2 ** np.linspace(-end, end, BINS + 2)  # an odd number of bins: one is around 1:1
    axes.stairs(np.histogram(2**ratios, edges)[0], edges, fill=True, color=SERIES[0])
    axes.set(xlabel="width : height", ylabel="images and videos", xscale="log", xlim=(edges[0], edges[-1]))
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}:1" if x >= 1 else f"1:{1 / x:.0f}"))
    axes.grid(axis="y")
    count_ticks(axes.yaxis)


def draw_videos(drawing: "Drawing", data: Data) -> None:
    statistics, (left, right) = data.statistics, drawing.subplots(1, 2, sharey=False)
    seconds = statistics.seconds[statistics.is_video & (statistics.seconds > 0)]
    if seconds.size:
        draw_histogram(left, seconds, "duration, s", "videos", FEW_BINS)
    draw_histogram(right, statistics.frames[statistics.is_video], "frames", "videos", FEW_BINS)


def draw_text_lengths(drawing: "Drawing", data: Data) -> None:
    text = np.maximum(1, data.statistics.text)
    draw_histogram(drawing.subplots(), text, "characters of all turns", "samples")


def draw_visual_tokens(drawing: "Drawing", data: Data) -> None:
    axes = drawing.subplots()
    tokens = {name: counts[data.statistics.media > 0] for name, counts in data.lengths.visual.items()}
    tokens = {name: np.maximum(1, counts) for name, counts in tokens.items()}
    edges, is_logarithmic = edges_of(np.concatenate(list(tokens.values())))
    for colour, (name, counts) in zip(SERIES, tokens.items()):
        heights, _ = np.histogram(counts, edges)
        axes.stairs(heights, edges, fill=True, color=colour, alpha=0.2)
        axes.stairs(heights, edges, color=colour, label=name)
    axes.set(xlabel="visual tokens of a sample", ylabel="samples with media", xlim=(edges[0], edges[-1]))
    axes.grid(axis="y")
    count_ticks(axes.yaxis)
    scale_axis(axes, "x", is_logarithmic, is_whole=True)
    drawing.legend(loc="outside lower center", ncols=3)


def draw_sequence_lengths(drawing: "Drawing", data: Data) -> None:
    axes = drawing.subplots()
    shares = np.concatenate([np.linspace(100, 1, 200), np.geomspace(1, 0.01, 100)])
    ends = [*data.seq_lengths]
    for colour, name in zip(SERIES, data.lengths.visual):
        lengths = np.quantile(data.lengths.total(name), 1 - shares / 100)
        axes.plot(lengths, shares, color=colour, linewidth=1.4, label=name)
        ends += [float(lengths[0]), float(lengths[-1])]
    for seq_length in data.seq_lengths:
        axes.axvline(seq_length, color=FAINT, linewidth=0.6, linestyle=(0, (4, 3)), zorder=0)
        axes.text(seq_length, 101, f"{seq_length:,}", fontsize=8, color=FAINT, ha="center", va="bottom")
    low, high = max(1, min(ends)) / 1.15, max(ends) * 1.3
    axes.set(xlabel="tokens, text and visual", ylabel="samples that are longer, %", xscale="log")
    axes.set(xlim=(low, high), ylim=(0, 100))
    log_ticks(axes.xaxis)
    axes.grid(axis="y")
    drawing.legend(loc="outside lower center", ncols=3)


FIGURES = (
    Figure("sources", "Samples written and entries skipped of each source.", draw_sources),
    Figure("skips", "Skipped entries by reason; colours are sources.", draw_skips),
    Figure("splits", "Sources in each split, in percent of its samples.", draw_splits),
    Figure("sizes", "Images and videos by width and height; darker: more of them (logarithmic scale).", draw_sizes),
    Figure("aspect_ratios", "Images and videos by width to height; 2:1 is twice as wide as high.", draw_aspect_ratios),
    Figure("videos", "Videos by duration in seconds (left) and by number of frames (right).", draw_videos),
    Figure("text_lengths", "Samples by characters of all turns.", draw_text_lengths),
    Figure("visual_tokens", "Samples by visual tokens; a colour for each token format.", draw_visual_tokens),
    Figure(
        "sequence_lengths",
        "Percent of samples longer than a number of tokens, for each token format. Dashed: usual sequence lengths.",
        draw_sequence_lengths,
    ),
)

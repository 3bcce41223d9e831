"""A figure of measured coefficient statistics and of the table that was fitted to them."""

from pathlib import Path
from typing import TYPE_CHECKING

from dct_qwen2vl.analysis.coefficient_moments import PLANES, SUMMARY_BLOCK, Measurement

if TYPE_CHECKING:
    import numpy as np

    from dct_qwen2vl.dct.configuration_dct import CoefficientTable


def plot(found: Measurement, table: "CoefficientTable", path: Path) -> None:
    """Draws log variance over frequencies, measured and from the table, by plane, for the frames' mean and their
    difference.

    found: What was measured.
    table: Made from it.
    path: Figure to write, .png.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    measured, tabled = found.summary_videos.square, table.variance(SUMMARY_BLOCK)
    figure, axes = plt.subplots(3, 3, figsize=(12, 10.5), layout="constrained")
    for plane, name in enumerate(PLANES):
        plot_over_radius(axes[0, plane], measured[plane], tabled[plane], 2 * found.summary_stills.square[plane, 0])
        axes[0, plane].set_title(f"{name}: mean over directions")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    ac = np.log10(np.where(np.arange(measured[0].size).reshape(measured[0].shape) == 0, np.nan, measured))
    for frequency, label in enumerate(("mean of two frames", "difference of two frames")):
        for plane, name in enumerate(PLANES):
            axis = axes[1 + frequency, plane]
            image = axis.imshow(ac[plane, frequency], vmin=np.nanmin(ac[plane]), vmax=np.nanmax(ac[plane]))
            axis.set(title=f"{name}: {label}", xlabel="column frequency", ylabel="row frequency")
            figure.colorbar(image, ax=axis, label="log10 variance")
    figure.suptitle(
        f"Variance of the DCT coefficients of {SUMMARY_BLOCK[0]} x {SUMMARY_BLOCK[1]} x {SUMMARY_BLOCK[2]} blocks, "
        f"values 0..1 about the CLIP mean ({found.summary_videos.blocks} blocks; DC blank in the maps)"
    )
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def plot_over_radius(axis, measured: "np.ndarray", tabled: "np.ndarray", still: "np.ndarray") -> None:
    """Draws means over rings of one frequency step.

    measured, tabled: [2, side, side]. One plane.
    still: [side, side].
    """
    import numpy as np

    side = len(still)
    radius = np.hypot(*np.indices(still.shape)).round().astype(int)
    members = np.bincount(radius.ravel())[1:side]
    cycles = np.arange(1, side) / (2 * side)

    def rings(square: "np.ndarray") -> "np.ndarray":
        return np.bincount(radius.ravel(), square.ravel())[1:side] / members

    for frequency, label in enumerate(("mean of two frames", "difference of two frames")):
        colour = f"C{frequency}"
        axis.plot(cycles, rings(measured[frequency]), "o", ms=3, color=colour, label=f"{label}, measured")
        axis.plot(cycles, rings(tabled[frequency]), color=colour, label=f"{label}, table")
        axis.plot(cycles[0] / 2, measured[frequency, 0, 0], "D", color=colour, mfc="none")
        axis.plot(cycles[0] / 2, tabled[frequency, 0, 0], "_", ms=12, color=colour)
    axis.plot(cycles, rings(still), ".", ms=3, color="0.4", label="stills (one frame, twice), measured")
    axis.plot([], [], "D", color="0.4", mfc="none", label="frequency 0 in rows and columns")
    axis.set(xscale="log", yscale="log", xlabel="cycles per pixel", ylabel="variance")
    axis.grid(alpha=0.3)

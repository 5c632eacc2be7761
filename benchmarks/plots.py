"""The plots of bench.py and gpu.py: a line for each contestant, with its name at its end."""

from matplotlib.figure import Figure

COLORS = "#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"  # Okabe and Ito's: for all eyes
MARKERS = "osD^v<>P*X"  # for print, too
APART = 0.055  # of the height of the plot: between two names


def draw_lines(path, lines, **axes_options):
    """lines: {name: {x: y}}. Lines of gpt2.py are thick, limits dotted. axes_options: those of Axes.set()."""
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    axes.set(**axes_options)
    names = [name for name in lines if lines[name]]
    contestants = [name for name in names if not name.startswith("limit")]
    for i, name in enumerate(names):
        style = {"color": "0.45", "linestyle": ":"}
        if name in contestants:
            style = {"color": COLORS[contestants.index(name) % len(COLORS)]}
        width = 3 if name.startswith("gpt2.py") else 1.5
        axes.plot([*lines[name]], [*lines[name].values()], marker=MARKERS[i % len(MARKERS)], linewidth=width, **style)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    name_lines(axes, names)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def name_lines(axes, names):
    """Writes the name of every line right of the plot, as high as its end, but apart from the others'."""
    axes.autoscale_view()  # else the edges would be known later
    inside = axes.transData + axes.transAxes.inverted()  # where 0 and 1 are the edges of the plot
    ends = [inside.transform((line.get_xdata()[-1], line.get_ydata()[-1])) for line in axes.lines]
    lowest = -1
    for (x, y), line, name in sorted(zip(ends, axes.lines, names, strict=True), key=lambda end: end[0][1]):
        lowest = max(y, lowest + APART)
        color, place = line.get_color(), {"xycoords": "axes fraction", "textcoords": "axes fraction", "va": "center"}
        arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.8, "relpos": (0, 0.5), "shrinkA": 1}
        axes.annotate(name, (x, y), (1.04, lowest), color=color, annotation_clip=False, arrowprops=arrow, **place)

"""The report's figures. One drawing serves both outputs: inline SVG, whose colours are the page's, and PNG.

Coordinates are CSS pixels from the top left corner: a canvas is one matplotlib axes without a frame, so each figure is
laid out for the page and a narrow screen shows it at its own size. No pyplot: a `Figure` has no global state, and its
PNG is drawn by Agg whatever backend the user has chosen.
"""

import io
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flexpert.monitor.findings import signed

#: Role → colour on a light and on a dark page. Roles `d0`… are the experts', in order; grey is the public model's.
COLORS = {
    "surface": ("#ffffff", "#161618"),
    "ink": ("#1a1a1c", "#ececee"),
    "muted": ("#66666c", "#a2a2a9"),
    "rule": ("#e2e2e5", "#323237"),
    "tint": ("#f1f5fb", "#1d2633"),
    "accent": ("#2568c4", "#5a9bf0"),
    "heat": ("#2f74d0", "#2f6fc4"),
    "cool": ("#c8503c", "#b04a38"),
    "good": ("#1c7a3d", "#4fbf78"),
    "bad": ("#b3311f", "#f07f6c"),
    "bar": ("#b9bac0", "#5c5d64"),
    "public": ("#85868d", "#8e8f97"),
    "d0": ("#d9622b", "#e2733d"),
    "d1": ("#189a6c", "#26a97b"),
    "d2": ("#5a49b8", "#9a8cf0"),
    "d3": ("#d48f00", "#d69a1e"),
    "d4": ("#d4558c", "#dd6a9b"),
    "d5": ("#137a8a", "#35a2b3"),
    "d6": ("#7a8b1c", "#9aad3a"),
    "d7": ("#8c5a3c", "#b98362"),
}
NUM_DOMAIN_COLORS = sum(bool(re.fullmatch(r"d\d", role)) for role in COLORS)
# In SVG a role is drawn in a colour that stands for its place in COLORS, and becomes a CSS variable afterwards.
MARKED = {role: f"#fe00{place:02x}" for place, role in enumerate(COLORS)}
LIGHT = {role: light for role, (light, _) in COLORS.items()}
#: Width of a character relative to the font's size, a little more than the average.
CHARACTER = 0.58


def domain_role(name: str, owners: Sequence[str]) -> str:
    """The colour of a domain and its expert; beyond the last colour they repeat, so labels name everything."""
    return f"d{owners.index(name) % NUM_DOMAIN_COLORS}" if name in owners else "public"


class Canvas:
    """An empty drawing of `width` × `height` pixels in the colours `theme`."""

    def __init__(self, width: float, height: float, theme: dict[str, str] = MARKED) -> None:
        from matplotlib.figure import Figure

        self.width, self.height, self.theme = width, height, theme
        self.figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # matplotlib's point is our pixel
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.set_axis_off()

    def text(self, x: float, y: float, text: str, size: float = 12, role: str = "ink", **style: Any) -> None:
        """`y` is the middle of the lower-case letters; style: align (left, center, right), bold, rotation."""
        self.axes.text(
            x,
            y if style.get("rotation") else y + 0.36 * size,
            text,
            fontsize=size,
            color=self.theme[role],
            ha=style.get("align", "left"),
            va="baseline",
            rotation=style.get("rotation", 0),
            rotation_mode="anchor",
            fontweight="bold" if style.get("bold") else "normal",
            parse_math=False,
        )

    def rect(self, x: float, y: float, width: float, height: float, role: str, alpha: float = 1.0) -> None:
        from matplotlib.patches import Rectangle

        color = self.theme[role]
        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="none", alpha=alpha))

    def outline(self, x: float, y: float, width: float, height: float, role: str) -> None:
        from matplotlib.patches import Rectangle

        color = self.theme[role]
        self.axes.add_patch(Rectangle((x, y), width, height, facecolor="none", edgecolor=color, linewidth=1.5))

    def line(self, xs: Sequence[float], ys: Sequence[float], role: str, **style: Any) -> None:
        """style: width, dashed, dots."""
        self.axes.plot(
            xs,
            ys,
            color=self.theme[role],
            linewidth=style.get("width", 1.5),
            linestyle=(0, (3, 2.5)) if style.get("dashed") else "-",
            marker="o" if style.get("dots") else "",
            markersize=3.5,
            markeredgewidth=0,
            solid_joinstyle="round",
        )

    def band(self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], role: str) -> None:
        self.axes.fill_between(xs, low, high, color=self.theme[role], alpha=0.18, linewidth=0)

    def svg(self, salt: str, label: str) -> str:
        """An `<svg>` element for a page that defines `--role` for every role.

        Args:
            salt: makes the element's ids its own; unique in the page.
            label: what the figure shows, for those who cannot see it. It must be escaped for HTML.
        """
        import matplotlib

        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}), io.StringIO() as file:
            self.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
            text = file.getvalue()
        text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
        text = re.sub(r'(<g|<path) id="(?:figure|axes|patch|text|line2d|FillBetween\w*)_\d+"', r"\1", text)
        text = re.sub(r"font-family: [^;]*; ", "", text)
        for role, mark in MARKED.items():
            text = text.replace(f": {mark}", f": var(--{role})")
        # Labels shrink with the picture: below this width it scrolls in its frame.
        style = f"width:{self.width:.0f}px;max-width:100%;min-width:{0.7 * self.width:.0f}px"
        box = f'viewBox="0 0 {self.width:g} {self.height:g}"'
        head = f'<svg {box} style="{style}" role="img" aria-label="{label}" xmlns:xlink="http://www.w3.org/1999/xlink">'
        return re.sub(r"\s*\n\s*", "\n", head + text[text.index(">") + 1 :]).strip()

    def png(self, scale: float) -> bytes:
        import matplotlib

        with matplotlib.rc_context({"font.family": ["DejaVu Sans"]}), io.BytesIO() as file:
            self.figure.savefig(
                file, format="png", dpi=72 * scale, facecolor=self.theme["surface"], metadata={"Software": None}
            )
            return file.getvalue()


@dataclass(frozen=True)
class Matrix:
    """A heat map of domains × experts.

    Attributes:
        rows, columns: names.
        values: one list a row; None where there is no number.
        digits: of the number in each cell; None: no numbers.
        label_length: characters after which a name is cut.
        signed: values are changes around 0 (blue above, red below); otherwise shares of 1.
        roles: name → colour.
    """

    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]
    roles: dict[str, str]
    digits: int | None
    label_length: int = 16
    signed: bool = False

    def label(self, name: str) -> str:
        return name if len(name) <= self.label_length else name[: self.label_length - 1] + "…"

    def cell_text(self, value: float) -> str:
        if not self.signed:
            return f"{value:.{self.digits}f}"
        return signed(value, self.digits or 0)

    def label_width(self, size: float) -> float:
        return max(len(self.label(name)) for name in self.rows) * CHARACTER * size + 14

    def head_height(self, cell: float, size: float) -> float:
        longest = max(len(self.label(name)) for name in self.columns) * CHARACTER * size
        return size + 12 if longest <= cell else 0.72 * longest + size + 8


def draw_matrix(canvas: Canvas, matrix: Matrix, x: float, y: float, cell: tuple[float, float], size: float) -> None:
    """Draw a heat map with its top left corner at (x, y): a bar of its colour marks each name, an outline the own cell.

    Shade is opacity, so a small value has the page's own colour in light and dark, and the ink is legible on the
    strongest.
    """
    wide, high = cell
    left, top = x + matrix.label_width(size), y + matrix.head_height(wide, size)
    numbers = [abs(v) for row in matrix.values for v in row if v is not None]
    scale = max(numbers, default=0.0) if matrix.signed else 1.0
    texts = [matrix.cell_text(v) for row in matrix.values for v in row if v is not None and matrix.digits is not None]
    cell_size = min(size, (wide - 6) / (0.66 * max(map(len, texts)))) if texts else size
    slanted = matrix.head_height(wide, size) > size + 12
    for column, name in enumerate(matrix.columns):
        middle = left + (column + 0.5) * wide
        place = {"rotation": 45, "align": "left"} if slanted else {"align": "center"}
        canvas.text(middle, top - 10 if slanted else top - 7 - size / 2, matrix.label(name), size, "muted", **place)
        canvas.rect(left + column * wide + 1, top - 5, wide - 2, 3, matrix.roles[name])
    for row, name in enumerate(matrix.rows):
        middle = top + (row + 0.5) * high
        canvas.text(left - 10, middle, matrix.label(name), size, "ink", align="right")
        canvas.rect(left - 5, top + row * high + 1, 3, high - 2, matrix.roles[name])
        for column, value in enumerate(matrix.values[row]):
            at = left + column * wide, top + row * high
            canvas.rect(at[0] + 1, at[1] + 1, wide - 2, high - 2, "rule", 0.45)
            if value is None:
                continue
            strength = 0.85 * min(1.0, abs(value) / scale) if scale else 0.0
            canvas.rect(at[0] + 1, at[1] + 1, wide - 2, high - 2, "cool" if value < 0 else "heat", strength)
            if matrix.digits is not None:
                own = name == matrix.columns[column]
                canvas.text(at[0] + wide / 2, middle, matrix.cell_text(value), cell_size, bold=own, align="center")
    for row, name in enumerate(matrix.rows):
        if name in matrix.columns:
            at = left + matrix.columns.index(name) * wide, top + row * high
            canvas.outline(at[0] + 1, at[1] + 1, wide - 2, high - 2, "ink")


def matrix_canvas(matrix: Matrix, cell: tuple[float, float], size: float, theme: dict[str, str] = MARKED) -> Canvas:
    width = matrix.label_width(size) + len(matrix.columns) * cell[0] + 2
    head = matrix.head_height(cell[0], size)
    if head > size + 12:  # the last slanted name leans out
        width += head - 20
    canvas = Canvas(math.ceil(width), math.ceil(head + len(matrix.rows) * cell[1] + 2), theme)
    draw_matrix(canvas, matrix, 0, 0, cell, size)
    return canvas


def matrix_figure(matrix: Matrix, salt: str, label: str, cell: tuple[float, float], size: float) -> str:
    return matrix_canvas(matrix, cell, size).svg(salt, label)


def matrix_png(matrix: Matrix, cell: tuple[float, float], size: float) -> bytes:
    return matrix_canvas(matrix, cell, size, LIGHT).png(2)


@dataclass(frozen=True)
class Bar:
    """Attributes: label; value; role (colour)."""

    label: str
    value: float
    role: str


def draw_bars(
    canvas: Canvas, bars: list[Bar], x: float, y: float, width: float, pitch: float, size: float, top: float
) -> None:
    """Horizontal bars from 0 to `top` (the value that fills the width), each with its label and number above it."""
    for place, bar in enumerate(bars):
        at = y + place * pitch
        strong = bar.role != "bar"
        canvas.text(x, at + size / 2, bar.label, size, "ink" if strong else "muted", bold=strong)
        canvas.text(x + width, at + size / 2, f"{bar.value:.3f}", size, "ink", bold=strong, align="right")
        canvas.rect(x, at + size + 4, max(1.0, width * bar.value / top), min(18.0, pitch - size - 12), bar.role)


def bars_figure(bars: list[Bar], salt: str, label: str) -> str:
    canvas = Canvas(200, 32 * len(bars))
    draw_bars(canvas, bars, 0, 0, 200, 32, 11.5, max(bar.value for bar in bars))
    return canvas.svg(salt, label)


@dataclass(frozen=True)
class Curve:
    """A line of a loss panel.

    Attributes:
        label: stands at its right end, before the last value.
        steps, losses: its points.
        band: lowest and highest loss behind each point, where a point stands for several steps.
        role: colour.
        style: of `Canvas.line`.
    """

    label: str
    steps: list[float]
    losses: list[float]
    role: str
    style: dict[str, Any]
    band: tuple[list[float], list[float]] | None = None


def train_curve(rows: list[dict[str, Any]], role: str, num_points: int = 80) -> Curve | None:
    """Training loss as means of equal runs of steps: one point each, with the range behind it."""
    points = [(row["step"], row["loss"]) for row in rows if row["loss"] is not None]
    size = max(1, math.ceil(len(points) / num_points))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    if not groups:
        return None
    losses = [[loss for _, loss in group] for group in groups]
    return Curve(
        "train",
        [sum(step for step, _ in group) / len(group) for group in groups],
        [sum(group) / len(group) for group in losses],
        role,
        {"width": 1},
        ([min(group) for group in losses], [max(group) for group in losses]),
    )


def valid_curve(rows: list[dict[str, Any]], label: str, role: str, **style: Any) -> Curve | None:
    points = [(row["step"], row["valid_loss"]) for row in rows if row.get("valid_loss") is not None]
    return Curve(label, [s for s, _ in points], [v for _, v in points], role, style) if points else None


def loss_figure(curves: list[Curve], salt: str, label: str, label_width: float = 78) -> str:
    """Loss over steps, each line labelled at its end."""
    from matplotlib.ticker import MaxNLocator

    width, height = 222 + label_width, max(180.0, 14 * len(curves) + 36)
    left, right, top, bottom = 30.0, width - label_width, 8.0, height - 20
    losses: list[float] = [loss for curve in curves for edge in (curve.losses, *(curve.band or ())) for loss in edge]
    margin = 0.05 * (max(losses) - min(losses)) or 0.1
    low, high = min(losses) - margin, max(losses) + margin
    ticks = [float(tick) for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    last_step = max(curve.steps[-1] for curve in curves)

    def x_of(step: float) -> float:
        return left + (right - left) * step / last_step

    def y_of(loss: float) -> float:
        return bottom - (bottom - top) * (loss - low) / (high - low)

    canvas = Canvas(width, height)
    for tick in ticks:
        canvas.line([left, right], [y_of(tick)] * 2, "rule", width=1)
        canvas.text(left - 6, y_of(tick), f"{tick:g}", 10, "muted", align="right")
    canvas.text(left, bottom + 12, "0", 10, "muted", align="center")
    canvas.text(right, bottom + 12, f"{last_step:,.0f} steps", 10, "muted", align="right")
    for curve in curves:
        xs = [x_of(step) for step in curve.steps]
        if curve.band is not None:
            low_ys, high_ys = ([y_of(loss) for loss in edge] for edge in curve.band)
            canvas.band(xs, low_ys, high_ys, curve.role)
        canvas.line(xs, [y_of(loss) for loss in curve.losses], curve.role, **curve.style)
    places = apart([y_of(curve.losses[-1]) for curve in curves], 14, top + 4, bottom - 4)
    for curve, place in zip(curves, places, strict=True):
        canvas.rect(right + 5, place - 1, 7, 2, curve.role)
        canvas.text(right + 16, place, f"{curve.label} {curve.losses[-1]:.2f}", 10.5, "ink")
    return canvas.svg(salt, label)


def apart(places: list[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels so that no two are nearer than `gap`, in the same order, within [low, high]."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = list(places)
    for rank, index in enumerate(order):
        least = low + rank * gap if rank == 0 else moved[order[rank - 1]] + gap
        moved[index] = max(moved[index], least)
    for rank, index in enumerate(reversed(order)):
        most = high if rank == 0 else moved[order[len(order) - rank]] - gap
        moved[index] = min(moved[index], most)
    return moved


def summary_png(title: str, bars: list[Bar], unit: str, routing: Matrix | None, removal: Matrix | None) -> bytes:
    """The run in one picture of 1600 × 900 pixels: methods, routing, removal."""
    canvas, top, bottom = Canvas(800, 450, LIGHT), 116.0, 426.0
    for place, line in enumerate(textwrap.wrap(title, 96)[:3]):
        canvas.text(28, 36 + 20 * place, line, 13.5)
    canvas.text(28, top, "Bits per byte", 12.5, bold=True)
    canvas.text(28, top + 17, unit, 9.5, "muted")
    pitch = min(56.0, (bottom - top - 32) / len(bars))
    draw_bars(canvas, bars, 28, top + 40, 150, pitch, 10.5, max(bar.value for bar in bars))
    panels = [("Which expert works on which text", "share of the router’s weight; row: text, column: expert", routing)]
    panels.append(("What removing an expert changes", "bits per byte; row: removed, column: text", removal))
    widths, heights = [60.0], [46.0]
    for part in (routing, removal):
        if part is not None:
            widths.append((272 - part.label_width(9.5)) / len(part.columns))
            heights.append((bottom - top - 30 - part.head_height(widths[-1], 9.5)) / len(part.rows))
    wide, high = min(widths), min(heights)
    for place, (name, note, matrix) in enumerate(panels):
        x = 206.0 + 288 * place
        canvas.text(x, top, name, 12.5, bold=True)
        canvas.text(x, top + 17, note, 9.5, "muted")
        if matrix is None:
            canvas.text(x, top + 48, "not evaluated", 11, "muted")
            continue
        draw_matrix(canvas, matrix if wide >= 30 else replace(matrix, digits=None), x, top + 30, (wide, high), 9.5)
    return canvas.png(2)

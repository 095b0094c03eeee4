"""What all pictures share: one palette, one font, and a small writer of SVG, which needs no package.

The colors are Okabe and Ito's, which can be told apart with any kind of color vision.  An SVG
follows the reader's light or dark mode by CSS variables.
"""
import html
import re

COLORS = {
    "wsa": "#56B4E9",       # sky blue
    "lem": "#009E73",       # bluish green
    "iwsa": "#0072B2",      # blue
    "swsa": "#CC79A7",      # reddish purple
    "ssa": "#D55E00",       # vermilion
    "lim": "#E69F00",       # orange
    "peg": "#F0E442",       # yellow
}
TEXT = {                    # the same for words on white paper: darkened to a contrast of 4.5 : 1
    "wsa": "#2B7A9F",
    "lem": "#00805D",
    "iwsa": "#0072B2",
    "swsa": "#AF4F85",
    "ssa": "#BD5300",
}
NAMES = {"wsa": "WSA", "lem": "LEM", "iwsa": "IWSA", "swsa": "SWSA", "ssa": "SSA"}
FONT = "Helvetica, Arial, Liberation Sans, sans-serif"
SIZE = 18                   # pixels of text at a width of 1000, so that the last row can read it

DARK = """
@media (prefers-color-scheme: dark) {
  .drawing { --paper: #14181d; --ink: #ececec; --line: #8f969e; --box: #2a3038; }
}"""
STYLE = f"""
.drawing {{ --paper: #ffffff; --ink: #1b1b1b; --line: #8a8a8a; --box: #f0f0f0; }}{DARK}
.drawing text {{ font-family: {FONT}; fill: var(--ink); }}
.drawing .arrow {{ fill: none; stroke: var(--ink); stroke-width: 1.5; }}
.drawing .tip {{ fill: var(--ink); }}
"""
MARKER = """
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8"
orient="auto"><path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>
"""


def light(svg):
    """The picture on white paper in any mode: for slides, which stay white."""
    return svg.replace(DARK, "")


def subscripts(string, size):
    """SVG text in which r_{c} has a subscript."""
    drop = 0.25 * size
    small = f'<tspan dy="{drop:g}" font-size="{0.72 * size:g}">'
    back = f'</tspan><tspan dy="{-drop:g}">​</tspan>'        # a zero-width space carries the way back
    escaped = html.escape(string, quote=False)
    return re.sub(r"_\{(\w+)\}", lambda match: small + match[1] + back, escaped)


class Drawing:
    """An SVG picture; coordinates are pixels from the top left, fills are colors of the palette."""

    def __init__(self, width, height, title, style=""):
        self.lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="drawing" role="img" '
            f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{STYLE}{style}</style>{MARKER}",
        ]
        self.rect(0, 0, width, height, "var(--paper)", line="none")

    def rect(self, x, y, width, height, fill="none", line="var(--line)", radius=0, tint=1, more=""):
        """tint: the opacity of the fill; more: further SVG attributes."""
        self.lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" '
            f'fill="{fill}" fill-opacity="{tint:g}" stroke="{line}" {more}/>')

    def text(self, x, y, string, anchor="middle", weight="normal", size=SIZE, turned=False):
        """The string with its middle at height y."""
        turn = f' transform="rotate(-90 {x:g} {y:g})"' if turned else ""
        baseline = f"{y + 0.35 * size:g}"
        self.lines.append(
            f'<text x="{x:g}" y="{baseline}" text-anchor="{anchor}" font-weight="{weight}" '
            f'font-size="{size}"{turn}>{subscripts(string, size)}</text>')

    def texts(self, x, y, strings, leading=24, **options):
        """Lines of text, the first at height y."""
        for i, string in enumerate(strings):
            self.text(x, y + leading * i, string, **options)

    def box(self, x, y, width, height, fill, *strings, tint=0.35, **options):
        """A box with lines of text in its middle."""
        line = "var(--line)" if fill.startswith("var") else fill
        opacity = 1 if fill.startswith("var") else tint
        self.rect(x, y, width, height, fill, line, radius=5, tint=opacity)
        first = y + height / 2 - 12 * (len(strings) - 1)
        self.texts(x + width / 2, first, strings, **options)

    def arrow(self, *points, tip=True):
        """A line through points (x, y)."""
        path = "L".join(f"{x:g} {y:g}" for x, y in points)
        end = ' marker-end="url(#tip)"' if tip else ""
        self.lines.append(f'<path class="arrow" d="M{path}"{end}/>')

    def triangle(self, points, fill, tint):
        path = "L".join(f"{x:g} {y:g}" for x, y in points)
        self.lines.append(f'<path d="M{path}z" fill="{fill}" fill-opacity="{tint:g}"/>')

    def sign(self, x, y, symbol):
        """A symbol in a circle: a sum or a product."""
        self.lines.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="13" fill="var(--paper)" stroke="var(--ink)"/>')
        self.text(x, y, symbol, size=20)

    def grid(self, x, y, rows, columns, side, height=None, fill="var(--paper)", tint=1):
        """rows x columns tokens."""
        height = height or side
        self.rect(x, y, columns * side, rows * height, fill, tint=tint)
        across = "".join(f"M{x:g} {y + i * height:g}h{columns * side:g}" for i in range(1, rows))
        down = "".join(f"M{x + i * side:g} {y:g}v{rows * height:g}" for i in range(1, columns))
        self.lines.append(
            f'<path d="{across}{down}" stroke="var(--line)" stroke-opacity="0.5" fill="none"/>')

    def begin(self, name):
        """Open a group of the class `name`, which a style can animate."""
        self.lines.append(f'<g class="{name}">')

    def end(self):
        self.lines.append("</g>")

    def svg(self):
        return "\n".join([*self.lines, "</svg>"]) + "\n"

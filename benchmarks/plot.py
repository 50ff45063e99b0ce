"""Draw horizontal bars on a logarithmic axis, as SVG that is readable on light and on dark pages."""

from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10

__all__ = ["bars"]

WIDTH, LABELS, ROW = 720, 250, 26

STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f }
.grid { stroke: #8c959f; stroke-width: .5 }
.ours { fill: #0969da } .other { fill: #8c959f }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .ours { fill: #4493f8 } }
"""


def bars(title: str, rows: Sequence[tuple[str, float, bool]], unit: str) -> str:
    """
    Return an SVG with one bar per row.

    Args:
        title: what is compared; shorter is better.
        rows: label, value above zero, and whether it is ours.
        unit: written after each value.
    """
    low = floor(log10(min(value for _, value, _ in rows)))
    high = ceil(log10(max(value for _, value, _ in rows)) + 0.05)

    def x(value: float) -> float:
        return LABELS + (WIDTH - LABELS - 70) * (log10(value) - low) / (high - low)

    bottom = 40 + ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 26}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<text x="0" y="18" font-weight="600">{escape(title)}</text>',
    ]
    for power in range(low, high + 1):
        at = x(10**power)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="32" y2="{bottom}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{10.0**power:g}</text>')
    for number, (label, value, ours) in enumerate(rows):
        top = 36 + ROW * number
        parts.append(f'<text x="{LABELS - 8}" y="{top + 15}" text-anchor="end">{escape(label)}</text>')
        kind = "ours" if ours else "other"
        parts.append(f'<rect class="{kind}" x="{LABELS}" y="{top}" height="20" width="{x(value) - LABELS:.1f}"/>')
        parts.append(f'<text x="{x(value) + 6:.1f}" y="{top + 15}">{value:g}{escape(unit)}</text>')
    return "\n".join([*parts, "</svg>\n"])

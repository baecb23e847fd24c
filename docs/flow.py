"""Draws docs/flow.svg, the way of a model through the package: python docs/flow.py"""

from pathlib import Path

STEPS = (
    ("your model", "an nn.Module,", "trained", ""),
    ("capture", "a graph of", "standard modules", "passes/capture"),
    ("dims", "every tensor dim", "gets a type", "passes/dims"),
    ("pass", "shrink, exits,", "gates, rewrites", "passes/*"),
    ("train", "fine-tune, distil,", "choose thresholds", "compress/"),
    ("run", "stage by stage,", "sample by sample", "runtime/predict"),
    ("file", "safetensors,", "ONNX", "runtime/files, onnx"),
)
WIDTH, HEIGHT, GAP, MARGIN = 124, 92, 22, 12


def box(x: int, name: str, first: str, second: str, room: str) -> list[str]:
    """One step: its name, what it does, and under it the folder it lives in."""
    middle = x + WIDTH // 2
    return [
        f'<rect x="{x}" y="{MARGIN}" width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#eef3fa" stroke="#35618e"/>',
        f'<text x="{middle}" y="{MARGIN + 30}" font-weight="bold" font-size="16">{name}</text>',
        f'<text x="{middle}" y="{MARGIN + 56}">{first}</text>',
        f'<text x="{middle}" y="{MARGIN + 74}">{second}</text>',
        f'<text x="{middle}" y="{MARGIN + HEIGHT + 20}" fill="#555" font-size="11">{room}</text>',
    ]


def picture() -> str:
    """The whole drawing as SVG text."""
    width = 2 * MARGIN + len(STEPS) * WIDTH + (len(STEPS) - 1) * GAP
    height = 2 * MARGIN + HEIGHT + 22
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13" text-anchor="middle" role="img">',
        "<title>model, capture, dims, pass, train, run, file</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for k, step in enumerate(STEPS):
        x = MARGIN + k * (WIDTH + GAP)
        lines += box(x, *step)
        if k:
            y = MARGIN + HEIGHT // 2
            lines.append(f'<path d="M{x - GAP} {y}H{x - 8}" stroke="#35618e" stroke-width="2"/>')
            lines.append(f'<path d="M{x - 9} {y - 5}L{x - 1} {y}L{x - 9} {y + 5}z" fill="#35618e"/>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture(), encoding="utf-8")

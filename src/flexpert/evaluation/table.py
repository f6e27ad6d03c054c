"""The content of evaluation.json as a terminal shows it."""

import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def row_label(method: str, entry: dict[str, Any], exclude: list[str]) -> str:
    """The method's name, with the experts that the evaluation left out of every mixture."""
    if not exclude or not entry["experts"]:  # a baseline has no experts
        return method
    left_out = ", ".join(exclude)
    if method.startswith("without "):
        return f"without {left_out}, {method.removeprefix('without ')}"
    return f"{method} without {left_out}"


def bits_table(content: dict[str, Any]) -> Table:
    """Bits per byte by method and domain."""
    domains = list(content["domains"])
    table = Table(title="held-out bits per byte")
    for column in ("", *domains, "mean"):
        table.add_column(escape(column), justify="right" if column else "left")
    for name, method in content["methods"].items():
        bits = [method["domains"][domain]["bits_per_byte"] for domain in domains]
        label = row_label(name, method, content["exclude"])
        table.add_row(escape(label), *(f"{value:.3f}" for value in bits), f"{sum(bits) / len(bits):.3f}")
    return table


def print_bits(content: dict[str, Any]) -> None:
    # Where there is no terminal, rich takes 80 columns and breaks what is wider.
    Console(width=None if sys.stdout.isatty() else 1000).print(bits_table(content))

"""Turn ``pytest benchmarks --benchmark-json FILE`` into tables: ``python benchmarks/table.py FILE``.

Times are medians. Each row also says how many times as fast kvnumba's cpu backend is: in the same format, and
also int8 and int4 against a peer of 8 or 4 bits. Below 1.00 it loses.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

OURS = "kvnumba cpu"
COMPARED = {"fp8_e4m3": ("fp8_e4m3", "int8", "int4"), "4 bits": ("int4",)}
"""Formats of peers that are compared with more than their like, or with another."""


def table(benchmarks: list[dict]) -> str:
    """Markdown: a table for each group."""
    groups = defaultdict(list)
    for entry in benchmarks:
        groups[entry["group"]].append(entry)
    parts = []
    for group, entries in sorted(groups.items()):
        medians = {
            (e["extra_info"]["implementation"], e["extra_info"]["format"]): e["stats"]["median"]
            for e in entries
        }
        rows = [row(e, medians) for e in sorted(entries, key=lambda e: e["stats"]["median"])]
        parts.append(
            f"**{group}**\n\n| | | ms | GB/s | kvnumba is |\n|---|---|---|---|---|\n" + "\n".join(rows)
        )
    return "\n\n".join(parts)


def row(entry: dict, medians: dict[tuple[str, str], float]) -> str:
    """One line of a table."""
    info, median = entry["extra_info"], entry["stats"]["median"]
    name, fmt = info["implementation"], info["format"]
    amount = info.get("bytes", info.get("amount"))
    rate = f"{amount / median / 1e9:.1f}" if amount else ""
    ratios = [
        f"{median / medians[OURS, ours]:.2f}x in {ours}"
        for ours in COMPARED.get(fmt, (fmt,))
        if name != OURS and (OURS, ours) in medians
    ]
    return f"| {name} | {fmt} | {1e3 * median:.3g} | {rate} | {', '.join(ratios)} |"


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())["benchmarks"]))

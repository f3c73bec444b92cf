"""The README's benchmark table, generated: python -m bench.table RESULTS.json [--update README.md]."""

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

START, END = "<!-- bench:start -->", "<!-- bench:end -->"


def table(results: dict[str, Any]) -> str:
    """Markdown of a pytest-benchmark file: a row per model and provider, compared with the published way."""
    machine, rows = results["machine_info"], {}
    for bench in results["benchmarks"]:
        info = bench["extra_info"]
        if "peak_bytes" in info:
            rows.setdefault(info["model"], {})[info["provider"]] = (bench["stats"], info)
    lines = [
        f"{machine['cpu']['brand_raw']}, {machine['threads']} threads, torch {machine['torch']}, commit "
        f"{machine['commit']}; median of 10 runs, one picture a run.",
        "",
        "| model | picture, classes | provider | images/s | speed | peak memory | memory | same labels |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, providers in rows.items():
        base_stats, base_info = providers["published"]
        for provider, (stats, info) in providers.items():
            h, w = info["size"]
            lines.append(
                f"| {model} | {w}x{h}, {info['n_cls']} | {provider} | {1 / stats['median']:.2f} "
                f"| {base_stats['median'] / stats['median']:.2f}x | {info['peak_bytes'] / 2**20:.0f} MiB "
                f"| {info['peak_bytes'] / base_info['peak_bytes']:.2f}x | {100 * info['agreement']:.2f} % |"
            )
    return "\n".join(lines)


def replaced(text: str, block: str) -> str:
    """`text` with what stands between the two markers replaced by `block`.

    Raises:
        ValueError: the markers are missing.
    """
    pattern = re.compile(re.escape(START) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the file has no {START} ... {END}")
    return pattern.sub(lambda _: f"{START}\n{block}\n{END}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--update", type=Path, help="file whose marked block is replaced; default: print")
    args = parser.parse_args()
    block = table(json.loads(args.results.read_text()))
    if args.update is None:
        print(block)
        return
    temporary = args.update.with_name(args.update.name + ".tmp")
    temporary.write_text(replaced(args.update.read_text(), block))
    os.replace(temporary, args.update)


if __name__ == "__main__":
    main()

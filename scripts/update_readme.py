#!/usr/bin/env python
"""Write the tables of README.md anew from results/. With --check only say whether they are up to date."""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def read(name: str) -> dict:
    return json.loads((ROOT / "results" / name).read_text())


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def machine_of(environment: dict) -> str:
    packages = environment["packages"]
    return (
        f"{environment['cores']} cores ({environment['processor']}), {environment['memory_bytes'] / 2**30:.0f} GiB, "
        f"Python {environment['python']}, torch {packages['torch']}, Ray {packages['ray']}"
    )


def step_table() -> str:
    report = read("step-16x4x1.json")
    ours = report["step_ms"]["ray"]
    rows = [["`ray`, 21 tiles in 21 processes", f"{ours['median']:.1f} ({ours['q25']:.1f} to {ours['q75']:.1f})", ""]]
    for name, ratio in report["ray_over"].items():
        times = report["step_ms"][name]
        plain = f"PyTorch, {name.removeprefix('plain, ')}"
        label = "`serial`, the same tiles in one process" if name == "serial" else plain
        spread = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        rows.append([label, f"{times['median']:.1f} ({times['q25']:.1f} to {times['q75']:.1f})", spread])
    empty = report["empty_round"]
    steps = report["turns"] * report["steps_per_turn"]
    return (
        table(["training step, mini-batch of 10", "ms, median (quartiles)", "`ray` over it, median (min to max)"], rows)
        + f"\n\nn = {steps} steps each, in {report['turns']} turns; {machine_of(report['environment'])}. "
        f"An empty round over {empty['tiles']} tiles takes {empty['us_per_tile']['median']:.0f} µs per tile "
        f"(median of {empty['rounds']})."
    )


def first_results_table() -> str:
    rows = []
    for name, reference in (("none", 35.9), ("random", 38.1)):
        result = read(f"cifar10-jpeg-10000-{name}.json")
        config = result["config"]
        rows.append(
            [
                f"`{name}` {','.join(map(str, config['tiles']))}",
                f"{config['lr']:g}",
                f"{result['test_error_percent']:.2f}",
                f"{result['best_test_error_percent']:.2f}",
                f"{result['train_error_percent']:.2f}",
                f"{reference:.1f}",
                f"{result['train_s'] + result['test_s']:,.0f}",
            ]
        )
    head = ["scheme", "λ", "test error %", "best %", "train error %", "independent implementation, test %", "seconds"]
    config = result["config"]
    return (
        table(head, rows)
        + f"\n\nCIFAR-10 (JPEG), {config['limit_train']:,} training and 10,000 test images, {config['epochs']} epochs, "
        f"fabric `ray`, seed {config['seed']}, n = 1; {machine_of(result['environment'])}, shared with other work."
    )


TABLES = {"step": step_table, "first-results": first_results_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    path = ROOT / "README.md"
    before = after = path.read_text()
    for name, make in TABLES.items():
        begin, end = f"<!-- table {name} -->\n", f"<!-- end of table {name} -->"
        head, _, rest = after.partition(begin)
        after = f"{head}{begin}{make()}\n{end}{rest.partition(end)[2]}"
    if check:
        sys.exit("README.md is not what results/ say: run scripts/update_readme.py" if after != before else 0)
    path.write_text(after)


if __name__ == "__main__":
    main()

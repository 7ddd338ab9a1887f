#!/usr/bin/env python
"""Write the tables of README.md and results/scaling.svg anew from results/.

With --check only say whether they are up to date. With --scaling DIR first keep the scaling.json that
`rapa-dist scale` has written there.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from rapa_dist.experiments import tables
from rapa_dist.experiments.cells import Cell, Protocol
from rapa_dist.experiments.claims import HEAD, claims, rows_of
from rapa_dist.scaling.plot import block_title, digest, draw, first_layer, name_of_first

ROOT = Path(__file__).resolve().parent.parent
REPRODUCED = "reproduce-cifar10-jpeg-10000.json"
MORE_IMAGES = "reproduce-cifar10-jpeg-50000.json"
FIGURE = ROOT / "results" / "scaling.svg"


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


def interval(found: dict[str, float], digits: int) -> str:
    return f"{found['median']:.{digits}f} ({found['q25']:.{digits}f} to {found['q75']:.{digits}f})"


def peers_table(name: str) -> str:
    report = read(name)
    tiles = ",".join(map(str, report["tiles"]))
    rows = []
    for contender, label in report["contenders"].items():
        times, ratio = report["step_ms"][contender], report["ray_over"].get(contender)
        if contender == "ray":
            count = sum(report["tiles"])
            label += f" {tiles}: {count} tiles in {count} processes"
        rows.append([label, interval(times, 1), interval(ratio, 2) if ratio else ""])
    steps, empty = report["turns"] * report["steps_per_turn"], report["empty_round"]
    return (
        table(["training step, mini-batch of 10", "ms, median (quartiles)", "`ray` over it, median (quartiles)"], rows)
        + f"\n\nn = {report['turns']} turns of {report['steps_per_turn']} steps each, {steps} in all; "
        f"{machine_of(report['environment'])}, OpenBLAS kernels for {report['environment']['blas']}; mini-batches cut "
        f"into {report['micro_batches']}. An empty round over the tiles of conv0 takes {empty['us_per_tile']:.0f} µs "
        f"per tile (median of {empty['rounds']})."
    )


def watch_line() -> str:
    report = read("watch.json")
    ratio = report["watched_over_alone"]
    return (
        f"A training watched by `stats --watch` takes {ratio['median']:.3f} times as long per step as alone (median of "
        f"{report['pairs_of_epochs']} pairs of epochs of {report['steps_per_epoch']} steps each, by turns; quartiles "
        f"{ratio['q25']:.3f} to {ratio['q75']:.3f}; `scripts/bench_watch.py`)."
    )


def price_line() -> str:
    one, several = read("price.json"), read("snapshots.json")
    ratio = "{median:.3f} times as long as {{}} (median of {{}}; quartiles {q25:.3f} to {q75:.3f}; `scripts/{{}}`)"
    before = ratio.format(**one["here_over_there"]).format(
        "before the program knew of failures and of several nodes",
        f"{one['turns']} turns of {one['steps_per_turn']} steps",
        "bench_against.py",
    )
    without = ratio.format(**several["with_over_without"]).format(
        "without them", f"{several['pairs_of_epochs']} pairs of epochs, by turns", "bench_snapshots.py"
    )
    return (
        f"Ready for all of this, a step of 16,4,1 tiles takes {before}; and on {several['nodes']} nodes, with the "
        f"snapshots, {without}."
    )


def first_results_table() -> str:
    rows = []
    for name in ("none", "random"):
        result = read(f"cifar10-jpeg-10000-{name}.json")
        config = result["config"]
        rows.append(
            [
                f"`{name}` {','.join(map(str, config['tiles']))}",
                f"{config['lr']:g}",
                f"{result['test_error_percent']:.2f}",
                f"{result['best_test_error_percent']:.2f}",
                f"{result['train_error_percent']:.2f}",
                f"{result['train_s'] + result['test_s']:,.0f}",
            ]
        )
    head = ["scheme", "λ", "test error %", "best %", "train error %", "seconds"]
    config = result["config"]
    return (
        table(head, rows)
        + f"\n\n{tables.RUNNING} CIFAR-10 (JPEG), {config['limit_train']:,} training and 10,000 test images, "
        f"{config['epochs']} epochs, "
        f"fabric `{result['metrics'][-1]['wall']['fabric']}`, seed {config['seed']}, n = 1; "
        f"{machine_of(result['environment'])}, shared with other work."
    )


def scaling_table() -> str:
    if not (ROOT / "results" / "scaling.json").exists():
        return "Not measured yet."
    report = read("scaling.json")
    blocks, start, first = report["blocks"], report["start"], name_of_first(report)
    factors = {tuple(factor["tiles"]): factor["first_layer"]["time_dilation"] for factor in report["real_time_factors"]}
    head = ["tiles", "actors", "step, compute, ms"]
    head += [f"{first}’s cycles, {block_title(block['time_dilation'])}" for block in blocks]
    rows = []
    for configuration in blocks[0]["configurations"]:
        tiles = configuration["tiles"]
        row = [",".join(map(str, tiles)), str(configuration["actors"])]
        row.append(f"{configuration['step']['wall_ms']['median']:.1f}")
        for block in blocks:
            ours = next(first_layer(other) for other in block["configurations"] if other["tiles"] == tiles)
            low, high = ours["speed_up_range"]
            row.append(f"{ours['speed_up']:.2f} × ({low:.2f} to {high:.2f})")
        found = factors.get(tuple(tiles), 0)
        row += [f"{found:,g}" if found else "not reached"] if factors else []
        rows.append(row)
    steps = [c["step"]["wall_ms"]["n"] for block in blocks for c in block["configurations"]]
    own = start["own_memory_per_actor_mb"]
    return (
        f"![Speed-up of {first} over its tiles, and where a step’s time goes](results/scaling.svg)\n\n"
        + table([*head, *([f"F for an efficiency of 0.9, {first}"] if factors else [])], rows)
        + f"\n\nSpeed-up over one tile (smallest to largest of {blocks[0]['turns']} turns; n = {min(steps)} to "
        f"{max(steps)} steps), mini-batches of {report['batch_size']}; cycle times of "
        f"{report['cycle_times']['forward_ns']:g} ns. {machine_of(report['environment'])}. {start['actors']} actors up "
        f"after {start['actors_up_s']:.0f} s, with {own['median']:.1f} MB of memory of their own each "
        f"(at most {own['max']:.1f})."
    )


def keep_scaling(folder: Path) -> None:
    report = json.loads((folder / "scaling.json").read_text())
    del report["environment"]["argv"]  # paths are nobody's concern
    (ROOT / "results" / "scaling.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def update_figure(*, check: bool) -> bool:
    """Draw the figure unless it is of these numbers already; return whether it was not."""
    if not (ROOT / "results" / "scaling.json").exists():
        return False
    report = read("scaling.json")
    if FIGURE.exists() and digest(report) in FIGURE.read_text():  # its curves may differ with matplotlib's version
        return False
    if not check:
        FIGURE.write_bytes(draw(report))
    return True


class Recorded:
    """What scripts/record_experiment.py has kept, in place of a `Store`."""

    def __init__(self, name: str) -> None:
        kept = read(name)
        self.protocol, self._results = Protocol(**kept["protocol"]), kept["results"]
        self.seeds = 1 + max(int(key.partition(".")[0].rpartition("-")[2]) for key in self._results)

    def result(self, cell: Cell, seed: int, what: str) -> dict | None:
        return self._results.get(f"{cell.name}-{seed}.{what}")

    def runs(self) -> list[dict]:
        return [result for key, result in self._results.items() if key.endswith(".train")]


def reproduced(make: Callable[[tables.Results], str]) -> str:
    return make(tables.Results(Recorded(REPRODUCED))).rstrip("\n")


def more_images_table() -> str:
    """Return the claims that more images were trained for, beside what fewer say of them."""
    fewer, more = (tables.Results(Recorded(name)) for name in (REPRODUCED, MORE_IMAGES))
    of_fewer = {row.claim: row for row in rows_of(fewer)}
    rows = [
        [row.claim, *row.cells(), before.numbers, before.verdict.value]
        for row in rows_of(more)
        if row.measured and (before := of_fewer[row.claim])
    ]
    ours, above = (f"{kept.protocol.limit_train:,} images, {kept.protocol.epochs} epochs" for kept in (more, fewer))
    head = ["claim", ours, *HEAD[1:], f"{above}, as above", ""]
    return f"{table(head, rows)}\n\nProtocol: {more.protocol.describe()}.\n\n{where_reproduced(MORE_IMAGES)}"


def average_line() -> str:
    report = read("similarity-average.json")
    config, found = report["config"], report["similarities"]
    tiles, commit = ",".join(map(str, config["tiles"])), report["environment"]["git"]["commit"][:7]
    return (
        f"With average pooling and {tiles} tiles, S of what conv0 has learnt beside its start is "
        f"{found['similarity_of_rest'][0]:.2f} after {report['steps']:,} steps on {config['limit_train']:,} images "
        f"(the paper: about 1). S itself is {found['similarity'][0]:.2f} there, as weight decay leaves "
        f"{100 * found['decay_leaves'][0]:.0f} % of the start (n = 1, seed {config['seed']}, λ = {config['lr']:g}, "
        f"commit {commit})."
    )


def where_reproduced(name: str) -> str:
    runs = Recorded(name).runs()
    commits = sorted({run["environment"]["git"]["commit"][:7] for run in runs})
    hours = sum(run["wall_s"] for run in runs) / 3600
    return (
        f"{len(runs)} runs, {hours:.1f} hours of one core in all, on a machine "
        f"shared with other work: {machine_of(runs[0]['environment'])}; commits {', '.join(commits)}."
    )


def batched_line() -> str:
    lines = []
    for tiles in ("16x4x1", "1x1x1"):
        report = read(f"batched-{tiles}.json")
        step = report["step_ms"]
        for threads in (1, 2):
            ours, theirs = step[f"batched-{threads}"]["median"], step[f"plain-{threads}"]["median"]
            last = step[f"plain-{threads}-last"]["median"]
            lines.append(
                [
                    f"{','.join(map(str, report['tiles']))}, {threads} thread{'s' if threads > 1 else ''}",
                    *(f"{value:.1f}" for value in (ours, theirs, last)),
                    f"{theirs / ours:.2f}",
                    f"{last / ours:.2f}",
                ]
            )
    head = [
        "`batched`",
        "ms per step",
        "`nn.Conv2d`, ms",
        "channels last, ms",
        "images/s over `nn.Conv2d`’s",
        "over channels last’s",
    ]
    return (
        table(head, lines)
        + f"\n\nMedians of {report['turns']} turns of {report['steps_per_turn']} steps, alternately, mini-batch of 10; "
        f"{machine_of(report['environment'])}."
    )


DONE = {
    "tile-kill": "one tile’s process killed",
    "tile-stop": "one tile’s process stopped, so that it hangs",
    "all-tiles": "all tiles killed at once",
    "node-kill": "a node killed, with all that is on it",
    "node-cut": "a node cut from the network for ten seconds",
    "chip-kill": "the process of another node’s chip killed",
    "coordinator-kill": "coordinator killed, run resumed",
    "coordinator-term": "coordinator ended by SIGTERM, run resumed",
}


def chaos_table() -> str:
    campaigns = read("chaos.json")["campaigns"]
    rows, faults = [], sum(len(campaign["wrong"]) for campaign in campaigns)
    for kind, label in DONE.items():
        deeds = [deed for campaign in campaigns for deed in campaign["deeds"] if deed["kind"] == kind]
        seconds = [deed["seconds"] for deed in deeds if deed["seconds"] is not None]
        lost = [f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"] if seconds else ["–", "–"]
        if deeds:
            rows.append([label, str(len(deeds)), *lost])
    runs, first = sum(campaign["runs"] for campaign in campaigns), campaigns[0]
    tiles = ",".join(map(str, first["tiles"]))
    seeds = ", ".join(str(campaign["seed"]) for campaign in campaigns)
    return (
        table(["done", "times", "seconds until the run was a step further, median", "longest"], rows)
        + f"\n\n{runs} runs of {first['steps_per_run']} steps with {tiles} tiles, seeds {seeds}; {faults} faults: "
        "weights or metrics unlike those of the undisturbed run, something left behind, a run that did not end. "
        f"{machine_of(first['environment'])}, otherwise idle."
    )


def networks_table() -> str:
    if not (ROOT / "results" / "networks.json").exists():
        return "Not measured yet."
    report = read("networks.json")
    rows = []
    for name, found in report["networks"].items():
        step, ratio = found["step_ms"], found["ray_over_plain"]
        rows.append(
            [
                name,
                str(found["actors"]),
                interval(step["ray"], 0 if step["ray"]["median"] >= 100 else 1),
                interval(step["plain"], 0 if step["plain"]["median"] >= 100 else 1),
                interval(ratio, 2),
                f"{found['shared_mb']:,.0f}",
                f"{found['memory_mb']['ray']:,}; {found['memory_mb']['plain']:,}",
            ]
        )
    head = ["network", "tiles", "step on `ray`, ms", "PyTorch, ms", "ratio", "shared memory, MB", "memory in all, MB"]
    return (
        table(head, rows)
        + f"\n\nMini-batches of {report['batch_size']}, balanced tiles; medians (quartiles) of {report['turns']} "
        f"turns; memory of all processes on `ray`, and of PyTorch's; {machine_of(report['environment'])} "
        "(`scripts/bench_networks.py`)."
    )


def fashion_table() -> str:
    rows = []
    for name in ("none", "random"):
        if not (ROOT / "results" / f"fashion-mnist-lenet-{name}.json").exists():
            return "Not measured yet."
        result = read(f"fashion-mnist-lenet-{name}.json")
        config = result["config"]
        rows.append(
            [
                f"`{name}` {','.join(map(str, config['tiles']))}",
                f"{config['lr']:g}",
                str(config["epochs"]),
                f"{100 - result['test_error_percent']:.2f}",
                f"{100 - result['best_test_error_percent']:.2f}",
            ]
        )
    head = ["LeNet on Fashion-MNIST", "λ", "epochs", "right in the test, %", "at best, %"]
    return table(head, rows) + "\n\n60,000 training and 10,000 test images, seed 0, n = 1."


TABLES = {
    "networks": networks_table,
    "fashion-mnist": fashion_table,
    "chaos": chaos_table,
    "batched": batched_line,
    "reproduced-table1": lambda: reproduced(tables.table1) + "\n\n" + where_reproduced(REPRODUCED),
    "reproduced-table2": lambda: reproduced(tables.table2),
    "reproduced-figure3": lambda: reproduced(tables.figure3),
    "similarity-average": average_line,
    "reproduced-figure4": lambda: reproduced(tables.figure4),
    "reproduced-claims": lambda: reproduced(claims),
    "more-images": more_images_table,
    "step": lambda: peers_table("peers-16x4x1.json"),
    "step-128": lambda: peers_table("peers-128x32x8.json"),
    "watch": watch_line,
    "price": price_line,
    "scaling": scaling_table,
    "first-results": first_results_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--scaling", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    if arguments.scaling and not arguments.check:
        keep_scaling(arguments.scaling)
    changed = update_figure(check=arguments.check)
    path = ROOT / "README.md"
    before = after = path.read_text()
    for name, make in TABLES.items():
        begin, end = f"<!-- table {name} -->\n", f"<!-- end of table {name} -->"
        head, found, rest = after.partition(begin)
        if not found or end not in rest:
            sys.exit(f"README.md has no place for the table {name}: add {begin.strip()} and {end}")
        after = f"{head}{begin}{make()}\n{end}{rest.partition(end)[2]}"
    if arguments.check:
        stale = changed or after != before
        sys.exit("README.md is not what results/ say: run scripts/update_readme.py" if stale else 0)
    path.write_text(after)


if __name__ == "__main__":
    main()

"""Results as Markdown: ours beside the paper's. The same results give the same bytes."""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import mean, stdev
from typing import Any

from rapa_dist.experiments import paper
from rapa_dist.experiments.cells import LARGE, POOLINGS, Cell, Protocol, cells_of
from rapa_dist.experiments.jobs import ANALYSES, TRAIN
from rapa_dist.experiments.store import Store
from rapa_dist.experiments.verdicts import is_at_chance

Result = dict[str, Any]
_NONE = "–"
NOT_KEPT = (None, None)
"""In place of what results of earlier versions lack, by layer."""


RUNNING = "Train errors are running ones: of augmented images, each as it was when it was trained on."


class Results:
    """All results of a store, by cell and kind."""

    def __init__(self, store: Store) -> None:
        """Read them, of all seeds that are there; what is missing is missing in the tables."""
        self.protocol: Protocol = store.protocol
        self._store, self._seeds = store, range(store.seeds)

    def of(self, cell: Cell, what: str = TRAIN) -> list[Result]:
        """Return a cell's results of one kind, a seed each; none that is void."""
        return [result for result in self._found(cell, what) if "void" not in result]

    def void(self, cell: Cell, what: str = TRAIN) -> list[Result]:
        """Return a cell's void results, where there are none that hold."""
        found = self._found(cell, what)
        return found if all("void" in result for result in found) else []

    def _found(self, cell: Cell, what: str) -> list[Result]:
        found = (self._store.result(cell, seed, what) for seed in self._seeds)
        return [result for result in found if result is not None]

    def marked(self, cell: Cell, what: str, show: Callable[[list[Result]], str]) -> str:
        """Show a cell's results; those that are void are shown as such."""
        void = self.void(cell, what)
        return f"void: {show(void)}" if void else show(self.of(cell, what))

    def why_void(self, cells: Sequence[Cell]) -> str:
        """Return a sentence that says why results of these cells are void, if some are."""
        reasons = {result["void"] for cell in cells for what in (TRAIN, *ANALYSES) for result in self.void(cell, what)}
        return "".join(f"{reason[0].upper()}{reason[1:]}. " for reason in sorted(reasons))

    def images(self, cell: Cell, part: str) -> int | None:
        """Return of how many images a cell's errors are shares, "test_images" or "train_images"; None: not known."""
        return min((result.get(part) or 0 for result in self.of(cell)), default=0) or None

    def at_chance(self, cell: Cell) -> bool:
        """Return whether a network of a cell hardly does better than guessing, so that it supports no claim."""
        return any(
            is_at_chance(100 - result["test_error_percent"], result.get("chance_percent", 0))
            for result in self.of(cell)
        )

    def values(self, cell: Cell, key: str, what: str = TRAIN) -> list[float]:
        """Return one number of every result."""
        return [result[key] for result in self.of(cell, what)]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean, and ± the standard deviation where there are several."""
    if not values:
        return _NONE
    text = f"{mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {stdev(values):.{digits}f}"


def table1(results: Results) -> str:
    """Return Table 1: best test and train error by tiling scheme."""
    rows = []
    for cell in cells_of("table1"):
        trained = results.of(cell)
        reference = paper.TABLE_1.get(cell.name)
        if not trained and reference is None:
            continue
        rows.append(
            [
                f"`{cell.name}`" + (f" (λ = {cell.lr:g}, γ = {cell.lr_decay:g})" if cell.lr else ""),
                spread([result["best_test_error_percent"] for result in trained]),
                spread([result["best_train_error_percent"] for result in trained]),
                spread([result["test_error_percent"] for result in trained]),
                str(len(trained)),
                f"{reference[0]:.2f}" if reference else _NONE,
                f"{reference[1]:.2f}" if reference else _NONE,
            ]
        )
    head = [
        "scheme",
        "best test error %",
        "best train error %",
        "last test error %",
        "n",
        "paper, test",
        "paper, train",
    ]
    return f"{markdown(head, rows)}\n{RUNNING} {_protocol(results)}\n"


def table2(results: Results) -> str:
    """Return Table 2: best test (train) error by pooling, 5 votes, and reduction to one kernel matrix."""
    cells = {cell.name: cell for cell in cells_of("table2")}
    rows = []
    for pooling in POOLINGS:
        row, count = [f"`{pooling}`"], []
        for scheme in ("none", "enlarged", "random"):
            cell = cells[scheme if pooling == "max" else f"{scheme}-{pooling}"]
            test_paper, train_paper = paper.TABLE_2[pooling][scheme]
            row.append(f"{results.marked(cell, TRAIN, _test_and_train)}; {test_paper:.2f} ({train_paper:.2f})")
            count.append(str(len(results.of(cell))))
        row += [f"{results.marked(cell, 'votes5', _votes)}; {paper.VOTES_5[pooling]:.2f}"]
        row += [f"{results.marked(cell, 'reduced', _reduced)}; {paper.REDUCED[pooling]:.2f}", ", ".join(count)]
        rows.append(row)
    head = ["pooling", "none", "enlarged", "random", "random, 5 votes", "random, reduced to one kernel", "n"]
    return (
        f"{markdown(head, rows)}\n{results.why_void(list(cells.values()))}Best test (train) error in %, ours; the "
        f"paper’s. {RUNNING} Votes and reduction at the end of training. {_protocol(results)}\n"
    )


def _test_and_train(trained: list[Result]) -> str:
    test, train = ([result[f"best_{kind}_error_percent"] for result in trained] for kind in ("test", "train"))
    return f"{spread(test)} ({spread(train)})"


def _votes(voted: list[Result]) -> str:
    return spread([result["test_error_percent"][-1] for result in voted])


def _reduced(reduced: list[Result]) -> str:
    return spread([result["by_norm"]["test_error_percent"] for result in reduced])


def figure3(results: Results) -> str:
    """Return the numbers of Fig. 3: similarity of the filters of a layer's tiles."""
    rows = []
    cells = cells_of("figure3")
    for cell in cells:
        shown = [
            results.marked(cell, "similarity", partial(_by_layer, key=key, layer=layer))
            for key in ("similarity", "start_projection", "similarity_of_rest")
            for layer in (0, 1)
        ]
        shown.insert(4, results.marked(cell, "similarity", partial(_by_layer, key="decay_leaves", layer=0)))
        rows.append([f"`{cell.scheme}`", cell.pooling, *shown, str(len(results.of(cell, "similarity")))])
    head = [f"{what}, conv{layer}" for what in ("S", "along start", "S of the rest") for layer in (0, 1)]
    head.insert(4, "decay leaves")
    return (
        f"{markdown(['scheme', 'pooling', *head, 'n'], rows)}\n{results.why_void(cells)}The paper: S > 0.1 for random, "
        "about 1 with average pooling, < 0.01 for the other schemes. Along start: the projection of the tiles on their "
        "own random starts (1 before training), in which what they have learnt along it counts in; decay leaves: what "
        "weight decay alone would have left of the start; S of the rest: of what they have learnt beside that "
        "projection. "
        f"{_protocol(results)}\n"
    )


def _by_layer(found: list[Result], key: str, layer: int) -> str:
    values = [value for result in found if (value := result.get(key, NOT_KEPT)[layer]) is not None]
    return spread(values, 3) + (f" (n = {len(values)})" if 0 < len(values) < len(found) else "")


def figure4(results: Results) -> str:
    """Return the numbers of Fig. 4: accuracy under attack, and the share of the gap to the untiled network closed."""
    from rapa_dist.analysis.attack import gap_closed

    cells = cells_of("figure4")
    found = {cell.name: results.of(cell, "attack") for cell in cells}
    known: list[float] = next((of_cell[0]["snr_db"] for of_cell in found.values() if of_cell), [])
    mean_of = {
        name: [mean(column) for column in zip(*(result["accuracy_percent"] for result in of_cell), strict=True)]
        for name, of_cell in found.items()
        if of_cell
    }
    rows = []
    for row, ratio in enumerate(known):
        line = [f"{ratio:g}"]
        line += [spread([result["accuracy_percent"][row] for result in found[cell.name]]) for cell in cells]
        for cell in cells[1:]:
            both = cell.name in mean_of and "none" in mean_of
            share = gap_closed([mean_of[cell.name][row]], [mean_of["none"][row]])[0] if both else None
            line.append(_NONE if share is None else f"{share:.1f}")
        rows.append(line)
    tiled = [f"{cell.name}: gap closed %" for cell in cells[1:]]
    head = ["SNR, dB", *(f"{cell.name}: accuracy %" for cell in cells), *tiled]
    counts = ", ".join(f"{cell.name} {len(found[cell.name])}" for cell in cells)
    large = results.values(LARGE, "test_error_percent")
    voted = [result["test_error_percent"][-1] for result in results.of(LARGE, "votes9")]
    guessing = [f"`{name}`" for name, of_cell in found.items() if any(map(guesses, of_cell))]
    warning = f"What hardly does better than guessing, so that it says nothing: {', '.join(guessing)}. "
    votes = f"Test error of 128,32,8: {spread(large)} %, {spread(voted)} % by 9 votes (the paper: {paper.VOTES_9:g}). "
    return (
        f"{markdown(head, rows)}\nFast gradient sign method, on the images classified correctly before. The paper at "
        f"33: {paper.GAP_CLOSED['random']:g} % of the gap closed with 16,4,1 and "
        f"{paper.GAP_CLOSED['random-128x32x8']:g} % with 128,32,8 tiles. "
        f"{votes if large else ''}{warning if guessing else ''}n: {counts}. {_protocol(results)}\n"
    )


def guesses(attack: Result) -> bool:
    """Whether a network that was attacked hardly does better than guessing, so that the attack says nothing of it."""
    return is_at_chance(attack["clean_accuracy_percent"], attack.get("chance_percent", 0))


def regularizer(result: Result) -> str:
    """Return the regulariser along a training run."""
    rows = [
        [str(epoch), *(f"{result[name][row]:.4f}" for name in ("loss", "loss_of_mean", "regularizer", "taylor"))]
        for row, epoch in enumerate(result["epochs"])
    ]
    return (
        f"{markdown(['epoch', '⟨L⟩', 'L(θ̄)', 'R', 'R to second order'], rows)}\n"
        f"Logistic regression, {result['n_tiles']} tiles of {result['parameters']} parameters, all "
        f"{result['choices']:,} choices enumerated, {result['images']} images; sums over them.\n"
    )


def _protocol(results: Results) -> str:
    return f"Protocol: {results.protocol.describe()}."

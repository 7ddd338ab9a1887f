"""The paper's claims, held against our numbers: holds, does not hold, or not measured."""

from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

from rapa_dist.experiments import paper
from rapa_dist.experiments.cells import Cell, cells_of
from rapa_dist.experiments.tables import NOT_KEPT, Result, Results, guesses, markdown, spread

_WORSE = ("image-overlap", "image-pad", "random-fixed", "alternate", "perforated")
_REDUCED_WITHIN = 0.75
_AVERAGE_IS_ONE = 0.95
_ALIKE, _UNLIKE = 0.1, 0.01


class Row(NamedTuple):
    """A claim."""

    claim: str
    numbers: str
    """Ours; empty if something is not measured."""
    holds: bool | None
    """None: not measured."""
    n: Sequence[int]
    """Seeds behind every number."""
    void: bool = False
    """Whether all there are are void results, which decide nothing."""

    @property
    def verdict(self) -> str:
        """What is to be said of it."""
        return "void" if self.void else {True: "holds", False: "does not hold", None: "not measured"}[self.holds]


def claims(results: Results) -> str:
    """Return the table of claims as Markdown."""
    rows = [[row.claim, row.numbers or "–", row.verdict, ", ".join(map(str, row.n))] for row in rows_of(results)]
    why = results.why_void([cell for name in ("table1", "table2", "figure3", "figure4") for cell in cells_of(name)])
    return (
        f"{markdown(['claim', 'our numbers', '', 'n'], rows)}\n{why}Best test errors in %, as in the paper; of votes "
        "and reduction those at the end of training. n: seeds; mean ± standard deviation where there are several. "
        f"Protocol: {results.protocol.describe()}.\n"
    )


def rows_of(results: Results) -> list[Row]:
    """Return the claims as data."""
    cells = {cell.name: cell for name in ("table1", "table2", "figure4") for cell in cells_of(name)}
    return [
        *_random_beats_others(results, cells),
        *_random_against_none(results, cells),
        *_voting(results, cells),
        *_similarity(results),
        _reduction(results, cells),
        *_robustness(results),
    ]


def _test(results: Results, cell: Cell) -> list[float]:
    return results.values(cell, "best_test_error_percent")


def _random_beats_others(results: Results, cells: dict[str, Cell]) -> list[Row]:
    random = _test(results, cells["random"])
    rows: list[Row] = []
    for name in _WORSE:
        other = _test(results, cells[name])
        measured = bool(random and other)
        numbers = f"{spread(random)} against {spread(other)}" if measured else ""
        holds = mean(random) < mean(other) if measured else None
        rows.append(Row(f"random beats {name}", numbers, holds, (len(random), len(other))))
    return rows


def _random_against_none(results: Results, cells: dict[str, Cell]) -> list[Row]:
    rows: list[Row] = []
    random = cells["random"]
    for name, words in (("none", "none"), ("none-quick", "none with λ = 0.01, γ = 0.9")):
        none = cells[name]
        test = _test(results, random), _test(results, none)
        train = (results.values(cell, "best_train_error_percent") for cell in (random, none))
        if name != "none" and not test[1]:
            continue
        measured = all(test)
        n = len(test[0]), len(test[1])
        rows.append(
            Row(
                f"random is at or below {words}",
                f"{spread(test[0])} against {spread(test[1])}" if measured else "",
                mean(test[0]) <= mean(test[1]) if measured else None,
                n,
            )
        )
        mine, theirs = train
        rows.append(
            Row(
                f"random’s train error is higher than that of {words}",
                f"{spread(mine)} against {spread(theirs)}" if measured else "",
                mean(mine) > mean(theirs) if measured else None,
                n,
            )
        )
    return rows


def _voting(results: Results, cells: dict[str, Cell]) -> list[Row]:
    rows: list[Row] = []
    for name, words in (
        ("random", "voting helps random with max pooling"),
        ("random-average", "voting does nothing with average pooling"),
    ):
        found, void = results.of(cells[name], "votes5"), results.void(cells[name], "votes5")
        if void:
            rows.append(Row(f"{words} (a quarter of a point counts)", f"void: {_voted(void)}", None, [len(void)], True))
            continue
        gain = [result["mean_single_test_error_percent"] - result["test_error_percent"][-1] for result in found]
        helps = name == "random"
        verdict = None if not gain else (mean(gain) > 0.25) if helps else (abs(mean(gain)) <= 0.25)
        numbers = _voted(found) if gain else ""
        rows.append(Row(f"{words} (a quarter of a point counts)", numbers, verdict, [len(gain)]))
    return rows


def _voted(found: list[Result]) -> str:
    single = [result["mean_single_test_error_percent"] for result in found]
    voted = [result["test_error_percent"][-1] for result in found]
    return f"{spread(single)} with 1 vote, {spread(voted)} with 5"


def _similarity(results: Results) -> list[Row]:
    """Return the claims of S, and the same of what the tiles have learnt, without the start that is left in them."""
    rest = _similarity_claims(results, "similarity_of_rest", " of what the tiles have learnt")
    measured = (row for row in rest if row.holds is not None or row.void)
    return [*_similarity_claims(results, "similarity", ""), *measured]


def _similarity_claims(results: Results, key: str, words: str) -> list[Row]:
    cells = {cell.name: cell for cell in cells_of("figure3")}

    def first_layer(found: list[Result]) -> list[float]:
        return [value for result in found if (value := result.get(key, NOT_KEPT)[0]) is not None]

    def above(claim: str, name: str, least: float) -> Row:
        values, void = (first_layer(found(cells[name], "similarity")) for found in (results.of, results.void))
        if void:
            return Row(claim, f"void: {spread(void, 3)}", None, [len(void)], True)
        numbers, holds = (spread(values, 3), mean(values) > least) if values else ("", None)
        return Row(claim, numbers, holds, [len(values)])

    schemes = ("random-fixed", "image-overlap", "image-pad", "alternate")
    others = {name: first_layer(results.of(cells[name], "similarity")) for name in schemes}
    known = {name: values for name, values in others.items() if values}
    numbers = ", ".join(f"{name} {spread(values, 4)}" for name, values in known.items())
    return [
        above(
            f"S ≈ 1{words} with average pooling (layer 1, above {_AVERAGE_IS_ONE})", "random-average", _AVERAGE_IS_ONE
        ),
        *(
            above(
                f"S > {_ALIKE}{words} with {pooling} pooling (layer 1)",
                "random" if pooling == "max" else f"random-{pooling}",
                _ALIKE,
            )
            for pooling in ("max", "mixed", "stochastic")
        ),
        Row(
            f"S < {_UNLIKE}{words} for other schemes (layer 1)",
            numbers,
            all(mean(values) < _UNLIKE for values in known.values()) if len(known) == len(others) else None,
            [len(values) for values in others.values()],
        ),
    ]


def _reduction(results: Results, cells: dict[str, Cell]) -> Row:
    reduced = [result["by_norm"]["test_error_percent"] for result in results.of(cells["random"], "reduced")]
    none = results.values(cells["none"], "test_error_percent")
    measured = bool(reduced and none)
    return Row(
        f"the reduced network is within {_REDUCED_WITHIN} points of the untiled one",
        f"{spread(reduced)} against {spread(none)}" if measured else "",
        mean(reduced) <= mean(none) + _REDUCED_WITHIN if measured else None,
        (len(reduced), len(none)),
    )


def _robustness(results: Results) -> list[Row]:
    from rapa_dist.analysis.attack import gap_closed

    at: dict[str, float] = {}
    n: dict[str, int] = {}
    for cell in cells_of("figure4"):
        found = [result for result in results.of(cell, "attack") if not guesses(result)]
        n[cell.name] = len(found)
        if found:
            row = found[0]["snr_db"].index(paper.GAP_CLOSED_AT_DB)
            at[cell.name] = mean(result["accuracy_percent"][row] for result in found)
    share = {name: gap_closed([at[name]], [at["none"]])[0] for name in paper.GAP_CLOSED if name in at and "none" in at}
    small, large = share.get("random"), share.get("random-128x32x8")
    where = f"at {paper.GAP_CLOSED_AT_DB:g} dB"
    return [
        Row(
            f"tiling closes part of the robustness gap ({where}; the paper: 41 %)",
            "" if small is None else f"{small:.1f} % closed",
            None if small is None else small > 0,
            (n["random"], n["none"]),
        ),
        Row(
            f"128,32,8 closes more than 16,4,1 ({where}; the paper: 64 %)",
            "" if small is None or large is None else f"{large:.1f} % against {small:.1f} %",
            None if small is None or large is None else large > small,
            (n["random-128x32x8"], n["random"], n["none"]),
        ),
    ]

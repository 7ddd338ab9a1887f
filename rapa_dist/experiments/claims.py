"""The paper's claims, held against our numbers: holds, does not hold, or not measured."""

from collections.abc import Sequence
from statistics import mean

from rapa_dist.experiments import paper
from rapa_dist.experiments.cells import Cell, cells_of
from rapa_dist.experiments.tables import Results, markdown, spread

_WORSE = ("image-overlap", "image-pad", "random-fixed", "alternate", "perforated")
_REDUCED_WITHIN = 0.75
_AVERAGE_IS_ONE = 0.95
_ALIKE, _UNLIKE = 0.1, 0.01

Row = tuple[str, str, bool | None]


def claims(results: Results) -> str:
    """Return the table of claims as Markdown."""
    held = {True: "holds", False: "does not hold", None: "not measured"}
    rows = [[claim, numbers or "–", held[verdict]] for claim, numbers, verdict in _rows(results)]
    counts = _counts(results)
    return (
        f"{markdown(['claim', 'our numbers', ''], rows)}\nBest test errors in %, as in the paper; mean ± standard "
        f"deviation over seeds where there are several. n: {counts or 'none'}. "
        f"Protocol: {results.protocol.describe()}.\n"
    )


def _rows(results: Results) -> list[Row]:
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
        rows.append((f"random beats {name}", numbers, mean(random) < mean(other) if measured else None))
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
        rows.append(
            (
                f"random is at or below {words}",
                f"{spread(test[0])} against {spread(test[1])}" if measured else "",
                mean(test[0]) <= mean(test[1]) if measured else None,
            )
        )
        mine, theirs = train
        rows.append(
            (
                f"random’s train error is higher than that of {words}",
                f"{spread(mine)} against {spread(theirs)}" if measured else "",
                mean(mine) > mean(theirs) if measured else None,
            )
        )
    return rows


def _voting(results: Results, cells: dict[str, Cell]) -> list[Row]:
    rows: list[Row] = []
    for name, words in (
        ("random", "voting helps random with max pooling"),
        ("random-average", "voting does nothing with average pooling"),
    ):
        found = results.of(cells[name], "votes5")
        gain = [result["mean_single_test_error_percent"] - result["test_error_percent"][-1] for result in found]
        single = [result["mean_single_test_error_percent"] for result in found]
        voted = [result["test_error_percent"][-1] for result in found]
        helps = name == "random"
        verdict = None if not gain else (mean(gain) > 0.25) if helps else (abs(mean(gain)) <= 0.25)
        numbers = f"{spread(single)} with 1 vote, {spread(voted)} with 5" if gain else ""
        rows.append((f"{words} (a quarter of a point counts)", numbers, verdict))
    return rows


def _similarity(results: Results) -> list[Row]:
    cells = {cell.name: cell for cell in cells_of("figure3")}

    def first_layer(names: Sequence[str]) -> list[float]:
        found = (result["similarity"][0] for name in names for result in results.of(cells[name], "similarity"))
        return [value for value in found if value is not None]

    average, largest = first_layer(["random-average"]), first_layer(["random"])
    others = {name: first_layer([name]) for name in ("random-fixed", "image-overlap", "image-pad", "alternate")}
    known = {name: values for name, values in others.items() if values}
    numbers = ", ".join(f"{name} {spread(values, 4)}" for name, values in known.items())
    return [
        (
            f"S ≈ 1 with average pooling (layer 1, above {_AVERAGE_IS_ONE})",
            spread(average, 3) if average else "",
            mean(average) > _AVERAGE_IS_ONE if average else None,
        ),
        (
            "S > 0.1 with max pooling (layer 1)",
            spread(largest, 3) if largest else "",
            mean(largest) > _ALIKE if largest else None,
        ),
        (
            "S < 0.01 for other schemes (layer 1)",
            numbers,
            all(mean(values) < _UNLIKE for values in known.values()) if len(known) == len(others) else None,
        ),
    ]


def _reduction(results: Results, cells: dict[str, Cell]) -> Row:
    reduced = [result["by_norm"]["test_error_percent"] for result in results.of(cells["random"], "reduced")]
    none = _test(results, cells["none"])
    measured = bool(reduced and none)
    return (
        f"the reduced network is within {_REDUCED_WITHIN} points of the untiled one",
        f"{spread(reduced)} against {spread(none)}" if measured else "",
        mean(reduced) <= mean(none) + _REDUCED_WITHIN if measured else None,
    )


def _robustness(results: Results) -> list[Row]:
    from rapa_dist.analysis.attack import gap_closed

    at: dict[str, float] = {}
    for cell in cells_of("figure4"):
        found = results.of(cell, "attack")
        if found:
            row = found[0]["snr_db"].index(paper.GAP_CLOSED_AT_DB)
            at[cell.name] = mean(result["accuracy_percent"][row] for result in found)
    share = {name: gap_closed([at[name]], [at["none"]])[0] for name in paper.GAP_CLOSED if name in at and "none" in at}
    small, large = share.get("random"), share.get("random-128x32x8")
    where = f"at {paper.GAP_CLOSED_AT_DB:g} dB"
    return [
        (
            f"tiling closes part of the robustness gap ({where}; the paper: 41 %)",
            "" if small is None else f"{small:.1f} % closed",
            None if small is None else small > 0,
        ),
        (
            f"128,32,8 closes more than 16,4,1 ({where}; the paper: 64 %)",
            "" if small is None or large is None else f"{large:.1f} % against {small:.1f} %",
            None if small is None or large is None else large > small,
        ),
    ]


def _counts(results: Results) -> str:
    cells = {cell.name: cell for name in ("table1", "table2", "figure4") for cell in cells_of(name)}
    counted = ((name, len(results.of(cell))) for name, cell in cells.items())
    return ", ".join(f"{name} {count}" for name, count in counted if count)

"""The paper's claims, held against our numbers; `verdicts` has how they are judged."""

from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

from rapa_dist.experiments import paper
from rapa_dist.experiments.cells import Cell, cells_of
from rapa_dist.experiments.tables import NOT_KEPT, Result, Results, guesses, markdown, spread
from rapa_dist.experiments.verdicts import (
    UNMEASURED,
    VOID,
    Judgement,
    Sample,
    Verdict,
    above,
    all_of,
    at_most,
    below,
    within,
)

_WORSE = ("image-overlap", "image-pad", "random-fixed", "alternate", "perforated")
_REDUCED_WITHIN = 0.75
_VOTES_GAIN = 0.25
_AVERAGE_IS_ONE = 0.95
_ALIKE, _UNLIKE = 0.1, 0.01


class Row(NamedTuple):
    """A claim."""

    claim: str
    numbers: str
    """Ours; empty if something is not measured."""
    judgement: Judgement
    n: Sequence[int]
    """Seeds behind every number."""
    digits: int = 2
    """Of the difference, behind the point."""

    @property
    def verdict(self) -> Verdict:
        """What is to be said of it."""
        return self.judgement.verdict

    @property
    def measured(self) -> bool:
        """Whether there are numbers, void ones included."""
        return self.verdict != Verdict.UNMEASURED

    def cells(self) -> list[str]:
        """Return the row of its table, but for the claim."""
        numbers, difference = self.numbers or "–", self.judgement.describe(self.digits)
        return [numbers, difference, self.verdict.value, ", ".join(map(str, self.n))]

    def as_dict(self) -> dict[str, object]:
        """Return it as plain values."""
        return {
            "claim": self.claim,
            "numbers": self.numbers,
            "verdict": self.verdict.value,
            "difference": self.judgement.difference,
            "margin": self.judgement.margin,
            "reason": self.judgement.reason,
            "n": list(self.n),
        }


HEAD = ("our numbers", "difference (margin)", "", "n")
"""Of `Row.cells`."""
JUDGED = (
    "Difference: positive where the claim is right. Margin: two standard errors of it, over the seeds where there are "
    "several and over the images that were classified (as if each network had images of its own; votes by how many "
    "they change, where that is recorded). Within it, with no margin known, or with a network that hardly does better "
    "than guessing, a claim is undecided."
)


def claims(results: Results) -> str:
    """Return the table of claims as Markdown."""
    rows = [[row.claim, *row.cells()] for row in rows_of(results)]
    why = results.why_void([cell for name in ("table1", "table2", "figure3", "figure4") for cell in cells_of(name)])
    return (
        f"{markdown(['claim', *HEAD], rows)}\n{why}{JUDGED} Best test errors in %, as in the paper; of votes and "
        "reduction those at the end of training. n: seeds; mean ± standard deviation where there are several. "
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


def _errors(results: Results, cell: Cell, key: str, part: str = "test") -> Sample:
    """Return errors of a cell's runs, in percent of training or test images."""
    images = results.images(cell, f"{part}_images")
    return Sample.share(results.values(cell, key), images, at_chance=results.at_chance(cell))


def _pair(sample: Sample, other: Sample) -> str:
    return f"{spread(sample.values)} against {spread(other.values)}" if sample.values and other.values else ""


def _random_beats_others(results: Results, cells: dict[str, Cell]) -> list[Row]:
    random = _errors(results, cells["random"], "best_test_error_percent")
    rows: list[Row] = []
    for name in _WORSE:
        other = _errors(results, cells[name], "best_test_error_percent")
        n = len(random.values), len(other.values)
        rows.append(Row(f"random beats {name}", _pair(random, other), at_most(random, other), n))
    return rows


def _random_against_none(results: Results, cells: dict[str, Cell]) -> list[Row]:
    rows: list[Row] = []
    random = cells["random"]
    for name, words in (("none", "none"), ("none-quick", "none with λ = 0.01, γ = 0.9")):
        none = cells[name]
        mine, theirs = (_errors(results, cell, "best_test_error_percent") for cell in (random, none))
        if name != "none" and not theirs.values:
            continue
        n = len(mine.values), len(theirs.values)
        rows.append(Row(f"random is at or below {words}", _pair(mine, theirs), at_most(mine, theirs), n))
        mine, theirs = (_errors(results, cell, "best_train_error_percent", "train") for cell in (random, none))
        claim = f"random’s train error is higher than that of {words}"
        rows.append(Row(claim, _pair(mine, theirs), at_most(theirs, mine), n))
    return rows


def _voting(results: Results, cells: dict[str, Cell]) -> list[Row]:
    rows: list[Row] = []
    for name, words in (
        ("random", "voting helps random with max pooling"),
        ("random-average", "voting does nothing with average pooling"),
    ):
        found, void = results.of(cells[name], "votes5"), results.void(cells[name], "votes5")
        claim = f"{words} (a quarter of a point counts)"
        if void:
            rows.append(Row(claim, f"void: {_voted(void)}", VOID, [len(void)]))
            continue
        judge = above if name == "random" else within
        judgement = judge(_gain(results, cells[name], found), _VOTES_GAIN)
        rows.append(Row(claim, _voted(found) if found else "", judgement, [len(found)]))
    return rows


def _gain(results: Results, cell: Cell, found: list[Result]) -> Sample:
    """Return by how many points voting lowers the error of a cell's networks."""
    gain, changed = [], []
    for result in found:
        single, voted = result["mean_single_test_error_percent"], result["test_error_percent"][-1]
        gain.append(single - voted)
        # of two tests that have nothing to do with each other so many images would change
        independent = single * (100 - single) / 100 + voted * (100 - voted) / 100
        changed.append(result.get("changed_percent", independent))
    images = min((result.get("images") or 0 for result in found), default=0)
    return Sample.gain(gain, images, mean(changed or [0.0]), at_chance=results.at_chance(cell))


def _voted(found: list[Result]) -> str:
    single = [result["mean_single_test_error_percent"] for result in found]
    voted = [result["test_error_percent"][-1] for result in found]
    return f"{spread(single)} with 1 vote, {spread(voted)} with 5"


def _similarity(results: Results) -> list[Row]:
    """Return the claims of S, and the same of what the tiles have learnt, without the start that is left in them."""
    rest = _similarity_claims(results, "similarity_of_rest", " of what the tiles have learnt")
    return [*_similarity_claims(results, "similarity", ""), *(row for row in rest if row.measured)]


def _similarity_claims(results: Results, key: str, words: str) -> list[Row]:
    cells = {cell.name: cell for cell in cells_of("figure3")}

    def first_layer(found: list[Result]) -> list[float]:
        return [value for result in found if (value := result.get(key, NOT_KEPT)[0]) is not None]

    def sample(name: str) -> Sample:
        values = first_layer(results.of(cells[name], "similarity"))
        return Sample(values, at_chance=results.at_chance(cells[name]))

    def high(claim: str, name: str, least: float) -> Row:
        if void := first_layer(results.void(cells[name], "similarity")):
            return Row(claim, f"void: {spread(void, 3)}", VOID, [len(void)], 3)
        found = sample(name)
        numbers = spread(found.values, 3) if found.values else ""
        return Row(claim, numbers, above(found, least), [len(found.values)], 3)

    others = {name: sample(name) for name in ("random-fixed", "image-overlap", "image-pad", "alternate")}
    numbers = ", ".join(f"{name} {spread(found.values, 4)}" for name, found in others.items() if found.values)
    return [
        high(f"S ≈ 1{words} with average pooling (conv0, above {_AVERAGE_IS_ONE})", "random-average", _AVERAGE_IS_ONE),
        *(
            high(
                f"S > {_ALIKE}{words} with {pooling} pooling (conv0)",
                "random" if pooling == "max" else f"random-{pooling}",
                _ALIKE,
            )
            for pooling in ("max", "mixed", "stochastic")
        ),
        Row(
            f"S < {_UNLIKE}{words} for other schemes (conv0)",
            numbers,
            all_of([below(found, _UNLIKE) for found in others.values()]),
            [len(found.values) for found in others.values()],
            4,
        ),
    ]


def _reduction(results: Results, cells: dict[str, Cell]) -> Row:
    values = [result["by_norm"]["test_error_percent"] for result in results.of(cells["random"], "reduced")]
    none = _errors(results, cells["none"], "test_error_percent")
    images = results.images(cells["random"], "test_images")
    reduced = Sample.share(values, images, at_chance=results.at_chance(cells["random"]))
    return Row(
        f"the reduced network is within {_REDUCED_WITHIN} points of the untiled one",
        _pair(reduced, none),
        at_most(reduced, none, _REDUCED_WITHIN),
        (len(reduced.values), len(none.values)),
    )


def _robustness(results: Results) -> list[Row]:
    """Return the claims on attacks: a larger share of the gap is closed where more images are still right."""
    from rapa_dist.analysis.attack import gap_closed

    found = {cell.name: _attacked(results, cell) for cell in cells_of("figure4")}
    none, small, large = found["none"], found["random"], found["random-128x32x8"]
    closed = {
        name: gap_closed([mean(found[name].values)], [mean(none.values)])[0]
        for name in paper.GAP_CLOSED
        if found[name].values and none.values
    }
    share = {name: f"{percent:.1f} %" for name, percent in closed.items() if percent is not None}
    both = len(share) == len(paper.GAP_CLOSED)
    where = f"at {paper.GAP_CLOSED_AT_DB:g} dB"
    return [
        Row(
            f"tiling closes part of the robustness gap ({where}; the paper: 41 %)",
            f"{share['random']} closed" if "random" in share else "",
            at_most(none, small) if "random" in share else UNMEASURED,
            (len(small.values), len(none.values)),
        ),
        Row(
            f"128,32,8 closes more than 16,4,1 ({where}; the paper: 64 %)",
            f"{share['random-128x32x8']} against {share['random']}" if both else "",
            at_most(small, large) if both else UNMEASURED,
            (len(large.values), len(small.values), len(none.values)),
        ),
    ]


def _attacked(results: Results, cell: Cell) -> Sample:
    """Return the accuracy under attack, in percent of the images that were right before."""
    found = [result for result in results.of(cell, "attack") if not guesses(result)]
    values = [result["accuracy_percent"][result["snr_db"].index(paper.GAP_CLOSED_AT_DB)] for result in found]
    right = [(result.get("images") or 0) * result["clean_accuracy_percent"] / 100 for result in found]
    return Sample.share(values, round(min(right, default=0)), at_chance=False)

"""A claim holds, does not hold or is undecided, by a margin that is stated; networks at chance support none."""

from typing import Any

import numpy as np
import pytest

from rapa_dist.experiments import tables
from rapa_dist.experiments.cells import Protocol
from rapa_dist.experiments.claims import claims
from rapa_dist.experiments.verdicts import Sample, Verdict, above, all_of, at_most, is_at_chance


def errors(*values: float, images: int | None = 10_000, at_chance: bool = False) -> Sample:
    return Sample.share(values, images, at_chance=at_chance)


@pytest.mark.parametrize(
    ("mine", "theirs", "verdict", "margin"),
    [
        (errors(20.0), errors(21.5), Verdict.HOLDS, 1.15),
        (errors(21.5), errors(20.0), Verdict.FAILS, 1.15),
        (errors(20.0), errors(21.0), Verdict.UNDECIDED, 1.14),
        (errors(20.0), errors(20.0), Verdict.UNDECIDED, 1.13),
        (errors(19.0, 23.0), errors(22.0, 26.0), Verdict.UNDECIDED, 5.78),  # the seeds overlap
        (errors(19.9, 20.1), errors(22.0, 22.2), Verdict.HOLDS, 1.187),
        (errors(19.0, 23.0), errors(25.0), Verdict.UNDECIDED, 7.03),  # a single seed scatters as the others do
        (errors(20.0, images=None), errors(30.0, images=None), Verdict.UNDECIDED, None),
        (errors(20.0, 20.2, images=None), errors(30.0, images=None), Verdict.HOLDS, 0.35),
        (errors(89.0, at_chance=True), errors(95.0), Verdict.UNDECIDED, 0.76),
        (errors(), errors(20.0), Verdict.UNMEASURED, None),
    ],
)
def test_a_claim_has_three_answers(mine, theirs, verdict, margin):
    judgement = at_most(mine, theirs)
    assert judgement.verdict == verdict
    assert judgement.margin == (None if margin is None else pytest.approx(margin, abs=0.005))


def test_networks_that_do_not_differ_are_seldom_said_to_and_others_mostly_are():
    """Against the truth: networks with a given error each, on images and with seeds drawn at random."""
    rng = np.random.default_rng(0)

    def network(error: float) -> Sample:
        shares = rng.normal(error, 0.5, 3).clip(0, 100) / 100
        return errors(*(100 * rng.binomial(2_000, shares) / 2_000), images=2_000)

    alike = [at_most(network(20), network(20)).verdict for _ in range(1_000)]
    apart = [at_most(network(20), network(25)).verdict for _ in range(500)]
    assert alike.count(Verdict.UNDECIDED) > 0.95 * len(alike)
    assert apart.count(Verdict.HOLDS) > 0.9 * len(apart)
    assert Verdict.FAILS not in apart


@pytest.mark.parametrize(
    ("accuracy", "classes", "guesses"),
    [(10, 10, True), (18, 10, True), (20, 10, False), (52, 2, True), (60, 2, False), (1.5, 100, True), (3, 100, False)],
)
def test_a_network_at_chance_is_known_with_any_number_of_classes(accuracy, classes, guesses):
    assert is_at_chance(accuracy, 100 / classes) == guesses


class Kept:
    """Results of `table1` by cell and seed, in place of a `Store`."""

    protocol = Protocol(dataset="builtin", epochs=4, lr_decay_every=1)

    def __init__(self, **errors_of: tuple[float, ...]) -> None:
        self.errors_of = {name.replace("_", "-"): values for name, values in errors_of.items()}
        self.seeds = max(map(len, errors_of.values()))

    def result(self, cell: Any, seed: int, what: str) -> dict[str, Any] | None:
        values = self.errors_of.get(cell.name, ())
        if what != "train" or seed >= len(values):
            return None
        shares = dict.fromkeys(
            (f"{kind}_error_percent" for kind in ("best_test", "best_train", "test", "train")), values[seed]
        )
        return shares | {"train_images": 500, "test_images": 1_000, "chance_percent": 10.0}


@pytest.mark.parametrize(
    ("kept", "row"),
    [
        (
            Kept(random=(88.7, 89.0), alternate=(89.5, 89.7)),
            "88.85 ± 0.21 against 89.60 ± 0.14 | +0.75 (2.81); at chance | undecided | 2, 2 |",
        ),
        (Kept(random=(30.0,), alternate=(32.0,)), "30.00 against 32.00 | +2.00 (4.14) | undecided | 1, 1 |"),
        (Kept(random=(30.0,), alternate=(36.0,)), "30.00 against 36.00 | +6.00 (4.20) | holds | 1, 1 |"),
        (Kept(random=(30.0,), alternate=(24.0,)), "30.00 against 24.00 | -6.00 (3.96) | does not hold | 1, 1 |"),
    ],
)
def test_the_table_of_claims_has_n_spread_and_margin(kept, row):
    text = claims(tables.Results(kept))
    assert f"| random beats alternate | {row}" in text
    assert "Margin: two standard errors" in text


def test_a_claim_on_several_schemes_is_as_good_as_the_worst_of_them():
    held, open_, failed = above(Sample([1.0, 1.1]), 0.5), above(Sample([1.0]), 0.5), above(Sample([0.1, 0.2]), 0.5)
    assert all_of([held, held]).verdict == Verdict.HOLDS
    assert all_of([held, open_]).verdict == Verdict.UNDECIDED
    assert all_of([held, open_, failed]).verdict == Verdict.FAILS
    assert all_of([held, above(Sample([]), 0.5)]).verdict == Verdict.UNMEASURED

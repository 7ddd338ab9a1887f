"""Whether numbers support a claim: it holds, it does not hold, or it is undecided.

Every claim comes down to a difference that is positive where it holds. The margin is two standard errors of that
difference: of the seeds, where there are several, and of the images that were classified, as errors are shares of
them. A difference within the margin decides nothing; nor does a network that hardly does better than guessing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import sqrt
from statistics import mean, variance
from typing import Self

_STANDARD_ERRORS = 2
_ABOVE_CHANCE = 0.1


class Verdict(StrEnum):
    """What is to be said of a claim."""

    HOLDS = "holds"
    FAILS = "does not hold"
    UNDECIDED = "undecided"
    UNMEASURED = "not measured"
    VOID = "void"


@dataclass(frozen=True, slots=True)
class Judgement:
    """A claim, judged."""

    verdict: Verdict
    difference: float | None = None
    """Positive where the claim holds."""
    margin: float | None = None
    """Two standard errors of the difference; None where nothing is known of its spread."""
    reason: str = ""
    """Why it is undecided, if not for the margin."""

    def describe(self, digits: int = 2) -> str:
        """Return the difference with its margin."""
        if self.difference is None:
            return self.reason or "–"
        margin = "not known" if self.margin is None else f"{self.margin:.{digits}f}"
        return f"{self.difference:+.{digits}f} ({margin}){f'; {self.reason}' if self.reason else ''}"


UNMEASURED = Judgement(Verdict.UNMEASURED)
VOID = Judgement(Verdict.VOID)


@dataclass(frozen=True, slots=True)
class Sample:
    """One quantity, measured with some seeds."""

    values: Sequence[float]
    """A number for every seed."""
    of_images: float | None = None
    """The square of its standard error by which images were classified; None: not known, or no matter of images."""
    at_chance: bool = False
    """Whether a network behind it hardly does better than guessing."""

    @classmethod
    def share(cls, values: Sequence[float], images: int | None, *, at_chance: bool = False) -> Self:
        """Return a percentage of images; None: of an unknown number of them."""
        if not (values and images):
            return cls(values, None, at_chance)
        share = (images * mean(values) / 100 + 1) / (images + 2)  # not 0 where no image was wrong
        return cls(values, 1e4 * share * (1 - share) / images, at_chance)

    @classmethod
    def gain(cls, values: Sequence[float], images: int | None, changed: float, *, at_chance: bool = False) -> Self:
        """Return the difference of two percentages of the same images, of which `changed` percent are in one only."""
        return cls(values, 100 * changed / images if images else None, at_chance)

    def squared_error(self, like: float | None = None) -> float | None:
        """Return the square of the mean's standard error; None where nothing is known of it.

        Args:
            like: the variance of a seed, for a single one, if it is known from others.
        """
        of_seeds = variance(self.values) if len(self.values) > 1 else like
        parts = [] if of_seeds is None else [of_seeds / len(self.values)]
        parts += [] if self.of_images is None else [self.of_images]
        return sum(parts) if parts else None


def at_most(sample: Sample, other: Sample, slack: float = 0.0) -> Judgement:
    """Judge whether a quantity is at most another one, or not more than `slack` above it."""
    if not (sample.values and other.values):
        return UNMEASURED
    scatter = [variance(one.values) for one in (sample, other) if len(one.values) > 1]
    like = max(scatter, default=None)
    errors = (sample.squared_error(like), other.squared_error(like))
    known = [error for error in errors if error is not None]
    margin = _STANDARD_ERRORS * sqrt(sum(known)) if len(known) == len(errors) else None
    return _judge(mean(other.values) + slack - mean(sample.values), margin, sample, other)


def above(sample: Sample, bound: float) -> Judgement:
    """Judge whether a quantity is above a number."""
    return _against(sample, bound, 1)


def below(sample: Sample, bound: float) -> Judgement:
    """Judge whether a quantity is below a number."""
    return _against(sample, bound, -1)


def within(sample: Sample, bound: float) -> Judgement:
    """Judge whether a quantity is from −bound to bound."""
    if not sample.values:
        return UNMEASURED
    return _judge(bound - abs(mean(sample.values)), _margin(sample), sample)


def all_of(judgements: Sequence[Judgement]) -> Judgement:
    """Return the judgement on several claims at once: the one that is least in favour, if all are measured."""
    if not judgements or Verdict.UNMEASURED in [one.verdict for one in judgements]:
        return UNMEASURED
    order = (Verdict.FAILS, Verdict.VOID, Verdict.UNDECIDED, Verdict.HOLDS)
    return min(judgements, key=lambda one: (order.index(one.verdict), one.difference or 0.0))


def is_at_chance(accuracy_percent: float, chance_percent: float) -> bool:
    """Return whether a network hardly does better than guessing: neither twice as well, nor by a tenth of the rest."""
    return accuracy_percent < min(2 * chance_percent, chance_percent + _ABOVE_CHANCE * (100 - chance_percent))


def _against(sample: Sample, bound: float, sign: int) -> Judgement:
    if not sample.values:
        return UNMEASURED
    return _judge(sign * (mean(sample.values) - bound), _margin(sample), sample)


def _margin(sample: Sample) -> float | None:
    error = sample.squared_error()
    return None if error is None else _STANDARD_ERRORS * sqrt(error)


def _judge(difference: float, margin: float | None, *samples: Sample) -> Judgement:
    if any(sample.at_chance for sample in samples):
        return Judgement(Verdict.UNDECIDED, difference, margin, "at chance")
    if margin is None or abs(difference) <= margin:
        return Judgement(Verdict.UNDECIDED, difference, margin)
    return Judgement(Verdict.HOLDS if difference > 0 else Verdict.FAILS, difference, margin)

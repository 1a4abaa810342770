"""Mergeable metrics; numpy and hotcoco only."""

from typing import Protocol, Self

from xseg.types import Prediction, Sample, Score


class Metric(Protocol):
    """What every metric offers: samples go in one by one, parts that saw different samples are added up.

    One that leaves something out may say what and why in ``notes() -> list[str]``.
    """

    def update(self, prediction: Prediction, sample: Sample) -> dict[str, float]:
        """Count one sample; return its own scores by name, in percent, empty where it has none."""

    def __iadd__(self, other: Self) -> Self: ...

    def compute(self) -> list[Score]:
        """The scores over all samples counted, each with its n, protocol and interval."""

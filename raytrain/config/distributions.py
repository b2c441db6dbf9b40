"""What a swept key may be drawn from: a range, equal steps, or a list."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

LARGEST = 1e300  # number of a range: with larger ones its width could be more than a float
MOST = 2**53  # steps of a range: floats count no further
FORMS = {
    "loguniform": "[low, high]",
    "uniform": "[low, high]",
    "quniform": "[low, high, step]",
    "randint": "[low, end]",  # the end is not drawn
    "choice": "[value, ...]",
    "grid": "[value, ...]",
}


@dataclasses.dataclass(frozen=True)
class Range:
    """Every float from `low` to `high`; with `log`, each factor of the range is as likely as any other."""

    low: float
    high: float
    log: bool = False

    def sample(self, rng: np.random.Generator) -> float:
        if not self.log:
            return float(rng.uniform(self.low, self.high))
        drawn = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        return min(max(drawn, self.low), self.high)

    def examples(self) -> list[Any]:
        """Values that a key must bear to be drawn from this: both ends, and one that is no whole number."""
        return [self.low, self.high, self.low + (self.high - self.low) / math.pi]


@dataclasses.dataclass(frozen=True)
class Steps:
    """low, low + step, ... up to `high`, each as likely; whole numbers if all three are ints."""

    low: int | float
    high: int | float
    step: int | float = 1

    @property
    def size(self) -> int:
        return round((self.high - self.low) / self.step) + 1

    def at(self, index: int) -> int | float:
        if all(isinstance(part, int) for part in (self.low, self.high, self.step)):
            return self.low + index * self.step
        # In decimals: 0.1 + 2 * 0.1 is 0.3 here, and 0.30000000000000004 in floats.
        return float(Decimal(str(self.low)) + index * Decimal(str(self.step)))

    def index(self, value: int | float) -> int:
        """The index of the step nearest to `value`."""
        return min(max(round((value - self.low) / self.step), 0), self.size - 1)

    def sample(self, rng: np.random.Generator) -> int | float:
        return self.at(int(rng.integers(self.size)))

    def examples(self) -> list[Any]:
        return [self.at(index) for index in dict.fromkeys((0, self.size - 1, min(1, self.size - 1)))]


@dataclasses.dataclass(frozen=True)
class Choices:
    """Some values, each as likely; with `crossed`, a sweep takes each of them with each of the other grids'."""

    values: tuple[Any, ...]
    crossed: bool = False

    @property
    def size(self) -> int:
        return len(self.values)

    def at(self, index: int) -> Any:
        return self.values[index]

    def index(self, value: Any) -> int:
        """Where `value` stands; ValueError if it is none of them. 1, 1.0 and true are three values."""
        try:
            return self._places[json.dumps(value)]
        except KeyError:
            raise ValueError(f"{value!r} is none of them") from None

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {json.dumps(value): place for place, value in enumerate(self.values)}

    def sample(self, rng: np.random.Generator) -> Any:
        return self.at(int(rng.integers(self.size)))

    def examples(self) -> list[Any]:
        return list(self.values)


Distribution = Range | Steps | Choices


def distribution(entry: Any) -> Distribution:
    """The distribution that a config's {kind: arguments} means; ValueError: what is wrong, to stand after `but`."""
    if not isinstance(entry, dict) or len(entry) != 1 or next(iter(entry)) not in FORMS:
        legal = ", ".join(f"{{{kind}: {form}}}" for kind, form in FORMS.items())
        raise ValueError(f"it must be one of {legal}")
    [(kind, values)] = entry.items()
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{kind} takes a list: {kind}: {FORMS[kind]}")
    return _MAKERS[kind](kind, values)


def _range(kind: str, values: Sequence[Any]) -> Range:
    low, high = _numbers(kind, values)
    _not_empty(low, high)
    if kind == "loguniform" and low <= 0:
        raise ValueError("loguniform needs low > 0; raise it, or write uniform")
    return Range(float(low), float(high), log=kind == "loguniform")


def _quniform(kind: str, values: Sequence[Any]) -> Steps:
    low, high, step = _numbers(kind, values)
    _not_empty(low, high)
    if step <= 0:
        raise ValueError(f"its step is {step}; it must be > 0")
    _countable(low, high, step)
    if (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step)):
        raise ValueError(f"steps of {step} from {low} do not end at {high}; choose a step that divides the range")
    return Steps(low, high, step)


def _randint(kind: str, values: Sequence[Any]) -> Steps:
    low, high = _numbers(kind, values)
    if not (isinstance(low, int) and isinstance(high, int)):
        raise ValueError("randint takes whole numbers; write uniform or quniform for others")
    _not_empty(low, high)
    _countable(low, high)
    return Steps(low, high - 1)


def _choices(kind: str, values: Sequence[Any]) -> Choices:
    if not values:
        raise ValueError(f"{kind} names no value; it needs at least one")
    known: set[str] = set()
    for value in values:
        word = json.dumps(value)
        if word in known:
            raise ValueError(f"{word} stands twice; keep one of them")
        known.add(word)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("a number must be finite")
    return Choices(tuple(values), crossed=kind == "grid")


_MAKERS: dict[str, Callable[[str, Sequence[Any]], Distribution]] = {
    "loguniform": _range,
    "uniform": _range,
    "quniform": _quniform,
    "randint": _randint,
    "choice": _choices,
    "grid": _choices,
}


def _numbers(kind: str, values: Sequence[Any]) -> Sequence[Any]:
    """`values`, if they are as many numbers as `kind` takes."""
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(values) != FORMS[kind].count(",") + 1 or len(numbers) != len(values):
        raise ValueError(f"{kind} takes numbers: {kind}: {FORMS[kind]}")
    if not all(abs(number) <= LARGEST for number in numbers):  # whole numbers too, which know no infinity
        raise ValueError(f"a number must be finite, and none is larger than {LARGEST:g}")
    return values


def _not_empty(low: float, high: float) -> None:
    if low >= high:
        raise ValueError(f"that range is empty: low must be below high (found {low} and {high})")


def _countable(low: float, high: float, step: float = 1) -> None:
    if (high - low) / step > MOST:
        raise ValueError(f"it has more than {MOST:,} values; narrow it, widen its steps, or write uniform")

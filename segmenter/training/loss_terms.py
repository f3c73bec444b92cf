"""Which losses there are, and how a recipe names them: "cross_entropy + 0.5 dice(smooth=1)".

A loss is a sum of terms, each a name with a weight before it and arguments behind it, both optional.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from segmenter.errors import InputError

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_TERM = re.compile(
    rf"\s*(?:(?P<weight>{_NUMBER})\s*(?:\*|\s)\s*)?(?P<name>[a-z_]\w*)\s*(?:\((?P<arguments>[^()]*)\))?\s*",
    re.IGNORECASE,
)
_MAX_LENGTH = 1000


class LossError(InputError):
    """A loss that cannot be used; the message names it and what is allowed."""


class Argument(NamedTuple):
    """An argument of a loss: its default (a bool: true or false), and the numbers from `low` to `high` it may be."""

    default: float | bool | None
    low: float = 0.0
    high: float = math.inf


_SMOOTH, _LOG = Argument(0.0), Argument(False)
LOSSES = {  # name -> its arguments; `segmenter.training.losses` has the formulas and their sources
    "cross_entropy": {"label_smoothing": Argument(0.0, 0, 1)},
    "ohem": {"threshold": Argument(0.7, 0, 1), "min_share": Argument(1 / 16, 0, 1)},
    "dice": {"smooth": _SMOOTH, "log_loss": _LOG},
    "jaccard": {"smooth": _SMOOTH, "log_loss": _LOG},
    "tversky": {
        "alpha": Argument(0.5),
        "beta": Argument(0.5),
        "gamma": Argument(1.0, 1e-6),
        "smooth": _SMOOTH,
        "log_loss": _LOG,
    },
    "focal": {"gamma": Argument(2.0), "alpha": Argument(None, 0, 1)},
    "lovasz": {},
}
CROSS_ENTROPY = "cross_entropy"


@dataclass(frozen=True)
class LossTerm:
    """One term of a loss: `weight` times the loss called `name`, with those of its arguments that were given."""

    name: str
    weight: float = 1.0
    arguments: dict[str, Any] = field(default_factory=dict)

    def argument(self, name: str) -> Any:
        """What was given, or the default."""
        return self.arguments.get(name, LOSSES[self.name][name].default)

    def __str__(self) -> str:
        weight = "" if self.weight == 1 else f"{self.weight:.15g} "
        given = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        return f"{weight}{self.name}" + (f"({given})" if given else "")


def parse_loss(text: str) -> tuple[LossTerm, ...]:
    """The terms of a loss: names of LOSSES joined by "+", such as "cross_entropy + 0.5 dice(smooth=1)".

    Raises:
        LossError: an unknown name or argument, a value that is not allowed, a name that stands twice, or no such sum.
    """
    if len(text) > _MAX_LENGTH:
        raise LossError(f"loss is longer than {_MAX_LENGTH} characters")
    terms, at = [], 0
    while True:
        match = _TERM.match(text, at)
        if match is None or (match.end() < len(text) and text[match.end()] != "+"):
            raise LossError(
                f"loss {text!r} cannot be read at {text[at:].strip()!r:.40}; write a name or a sum such as "
                f'"cross_entropy + 0.5 dice(smooth=1)", of {", ".join(LOSSES)}'
            )
        terms.append(_term(match))
        if match.end() == len(text):
            break
        at = match.end() + 1
    names = [term.name for term in terms]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise LossError(f"loss {text!r} has {twice} twice; give it one weight")
    return tuple(terms)


def _term(match: re.Match) -> LossTerm:
    name, weight = match["name"].lower(), float(match["weight"] or 1)
    if name not in LOSSES:
        raise LossError(f"loss {match['name']!r} is unknown; choose of {', '.join(LOSSES)}")
    if not 0 < weight < math.inf:
        raise LossError(f"the weight of {name} must be above 0, found {weight:g}")
    arguments: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in (match["arguments"] or "").split(","))):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in LOSSES[name]:
            allowed = ", ".join(f"{known}={_shown(a.default)}" for known, a in LOSSES[name].items()) or "none"
            raise LossError(f"{name} has no argument {key!r}; allowed are, with their defaults: {allowed}")
        if key in arguments:
            raise LossError(f"{name}: {key} is given twice")
        arguments[key] = _value(f"{key} of {name}", value, LOSSES[name][key])
    return LossTerm(name, weight, arguments)


def _value(what: str, text: str, argument: Argument) -> float | bool:
    if isinstance(argument.default, bool):
        if text.lower() not in ("true", "false"):
            raise LossError(f"{what} must be true or false, found {text!r}")
        return text.lower() == "true"
    try:
        value = float(text)
    except ValueError:
        raise LossError(f"{what} must be a number, found {text!r}") from None
    if not (math.isfinite(value) and argument.low <= value <= argument.high):
        raise LossError(f"{what} must lie in {argument.low:g}..{argument.high:g}, found {text}")
    return value


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool | None) else f"{value:g}"

"""What a planted bug is."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str  # occurs exactly once in the file
    new: str
    tests: tuple[str, ...]
    reason: str | None = None  # why it may survive


def planted_in(file: str, tests: tuple[str, ...], edits: dict[str, tuple[str, ...]]) -> list[Mutant]:
    """The bugs of one file, by name: (old, new) or (old, new, reason)."""
    return [Mutant(name, file, edit[0], edit[1], tests, *edit[2:]) for name, edit in edits.items()]

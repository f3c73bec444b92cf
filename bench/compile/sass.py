"""What a Hopper kernel's machine code (SASS, as nvdisasm prints it) tells that registers and spills do not.

- Serialised tensor cores: ptxas gives up keeping several wgmma in flight and waits for each one. Nothing fails, the
  kernel is just slow. Its log says so (C7510 to C7519), and the waits stand in the code. One alone inside a loop is no
  fault: a product that is a single instruction deep and is needed at once.
- Register hazards: a register that a wgmma in flight still reads (its A operand) or writes (its accumulator) is
  touched before a wait that covers it (triton-lang/triton#9433: some releases of ptxas do that). Every path through
  the code is followed, with the list of products in flight along it.
"""

import collections
import dataclasses
import functools
import itertools
import re
from typing import NamedTuple

import networkx

_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+((@!?U?P[T0-9]+\s+)?(\S+)\s*(.*?))\s*;")  # text, guard, name, rest
_LABEL = re.compile(r"^(\.L_x?_?\d+):")
_TARGET = re.compile(r"`\((\.L_x?_?\d+)\)")
_SERIALISED = re.compile(r"\(C751\d\).*serialized")
_IN_FLIGHT = 16  # groups kept apart on one path; older ones are taken together
# Registers of the wgmma in flight, (accumulators, A operands) a group, the oldest first. The last group is of those
# that no wait can count yet, often none.
_InFlight = tuple[tuple[frozenset[int], frozenset[int]], ...]
_NOTHING = frozenset(), frozenset()
_WGMMA = ("HGMMA", "QGMMA", "IGMMA", "BGMMA")
# What writes no general register, by the beginning of its name: stores, control flow, barriers, uniform registers and
# predicates. Anything else is taken to write its first operand.
_NO_RESULT = (
    "ST", "RED", "BAR", "BRA", "BRX", "EXIT", "RET", "CALL", "NOP", "UTMA", "SYNCS", "DEPBAR", "WARP", "LDGSTS",
    "LDGDEPBAR", "R2U", "R2P", "U", "ISETP", "FSETP", "DSETP", "HSETP", "FCHK", "PLOP3", "BSSY", "BSYNC", "VOTEU",
    "CCTL", "MEMBAR", "FENCE", "ERRBAR", "ELECT", "END", "ACQ", "BREAK", "YIELD", "NANOSLEEP", "BMOV", "ARRIVES",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `@P0 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR24], RZ`."""

    text: str
    guarded: bool  # runs on a condition
    name: str  # "HGMMA.64x64x16.F32.BF16"
    operands: tuple[str, ...]
    target: int | None = None  # index of the instruction that it branches to

    @functools.cached_property
    def is_wgmma(self) -> bool:
        return self.name.split(".")[0] in _WGMMA

    @functools.cached_property
    def ends_group(self) -> bool:
        """Whether a later wait can count this wgmma and those before it."""
        return "gsb0" in self.operands

    @functools.cached_property
    def waits_for(self) -> int | None:
        """How many of the newest groups this wait lets go on; None if it is no such wait."""
        return int(self.operands[-1], 16) if self.name.startswith("WARPGROUP.DEPBAR") else None

    @functools.cached_property
    def writes(self) -> frozenset[int]:
        """General registers that it writes (of a wgmma see `accumulator`)."""
        if self.is_wgmma or self.name.startswith(_NO_RESULT):
            return frozenset()
        for operand in self.operands[:2]:  # SHFL and some others name a predicate first
            if found := re.fullmatch(r"R(\d+)(\.reuse)?", operand):
                return _span(int(found[1]), _result_width(self.name))
            if not re.fullmatch(r"!?U?P[T0-9]+", operand):
                break
        return frozenset()

    @functools.cached_property
    def reads(self) -> frozenset[int]:
        """General registers that it reads, of wide operands at least the first one."""
        stores = self.name.startswith(("ST", "RED", "ATOM"))
        found = set()
        for operand in self.operands if stores or not self.writes else self.operands[1:]:
            width = _result_width(self.name) if stores and operand.startswith("R") else 1
            for register, wide in re.findall(r"\bR(\d+)(\.64)?", operand):
                found |= _span(int(register), 2 if wide else width)
        return frozenset(found)

    @functools.cached_property
    def accumulator(self) -> frozenset[int]:
        """Registers that a wgmma adds to: 64 x N results over 128 threads, two a register if they are 16 bits wide."""
        columns, kind = re.search(r"\.\d+x(\d+)x\d+\.(\w+)", self.name).groups()
        return _span(int(self.operands[0][1:]), int(columns) // (4 if kind == "F16" else 2))

    @functools.cached_property
    def fragment(self) -> frozenset[int]:
        """Registers of a wgmma's A operand, empty if it comes from shared memory."""
        found = re.match(r"R(\d+)", self.operands[1])
        return _span(int(found.group(1)), 4) if found else frozenset()


def _span(first: int, count: int) -> frozenset[int]:
    return frozenset(range(first, first + count))


def _result_width(name: str) -> int:
    """Registers of a result or of stored data."""
    parts = name.split(".")
    if parts[0] in ("LDSM", "STSM"):
        return int(parts[-1]) if parts[-1] in ("2", "4") else 1
    if parts[0] in ("HMMA", "IMMA") or "128" in parts:
        return 4
    if "64" in parts or "WIDE" in parts or parts[0] in ("DADD", "DFMA", "DMUL"):
        return 2
    return 2 if parts[0] == "CS2R" and "32" not in parts else 1


class Hazard(NamedTuple):
    index: int
    text: str
    reason: str


class Program:
    """One kernel's instructions and how control flows through them: a graph of basic blocks (ranges of indices)."""

    def __init__(self, sass: str):
        self.instructions = _parse(sass)
        ends = len(self.instructions)
        starts = {0} | {instruction.target for instruction in self.instructions} - {None}
        for i, instruction in enumerate(self.instructions):
            if instruction.target is not None or instruction.name.startswith(("EXIT", "RET", "BRX")):
                starts.add(i + 1)
        bounds = [*sorted(start for start in starts if start < ends), ends]
        self._flow = networkx.DiGraph()
        blocks = {start: range(start, end) for start, end in itertools.pairwise(bounds)}
        self._flow.add_nodes_from(blocks.values())
        for block in blocks.values():
            last = self.instructions[block[-1]]
            if last.target is not None:
                self._flow.add_edge(block, blocks[last.target])
            # A call's target counts as one way and the line after it as another; a return ends the path.
            goes_on = last.guarded or not last.name.startswith(("BRA", "EXIT", "RET", "BRX"))
            if goes_on and block.stop < ends:
                self._flow.add_edge(block, blocks[block.stop])
        self._first = blocks[0]

    @functools.cached_property
    def loops(self) -> list[tuple[int, ...]]:
        """Natural loops, except those that only poll a barrier: indices of instructions, loops inside included."""
        reachable = networkx.descendants(self._flow, self._first) | {self._first}
        found = []
        for header in sorted(reachable, key=lambda block: block.start):
            rest = self._flow.subgraph(reachable - {header})
            past = networkx.descendants(rest, self._first) | {self._first} if header != self._first else set()
            ends = reachable.intersection(self._flow.pred[header]) - past  # no path to them avoids the header
            body = {header}.union(*(networkx.ancestors(rest, end) | {end} for end in ends - {header}))
            indices = tuple(i for block in sorted(body, key=lambda block: block.start) for i in block)
            if ends and not self._is_polling(indices):
                found.append(indices)
        return found

    def _is_polling(self, indices: tuple[int, ...]) -> bool:
        names = [self.instructions[i].name for i in indices]
        return len(names) < 8 and (any(n.startswith("SYNCS") for n in names) or names == ["BRA"])

    @property
    def innermost_loops(self) -> list[tuple[int, ...]]:
        return [loop for loop in self.loops if not any(set(other) < set(loop) for other in self.loops)]

    def mix(self, loop: tuple[int, ...] | None = None) -> collections.Counter:
        """Number of instructions by name, without modifiers but those that tell a MUFU or a wgmma apart."""
        chosen = self.instructions if loop is None else [self.instructions[i] for i in loop]
        parts = [instruction.name.split(".") for instruction in chosen]
        return collections.Counter(".".join(p[:2]) if p[0] in ("MUFU", *_WGMMA) else p[0] for p in parts)

    def serialised(self, log: str = "") -> list[int]:
        """Indices of the wgmma inside loops that are waited for one by one.

        Args:
            log: of ptxas. If it warns, every wgmma waited for at once counts. Without a warning only those that go on
                adding to what the one before them, waited for as well, has added to: one product cut in pieces.
        """
        inside = sorted({i for loop in self.loops for i in loop if self.instructions[i].is_wgmma})
        alone = [i for i in inside if self._is_alone(i)]
        if _SERIALISED.search(log):
            return alone
        accumulators = {i: self.instructions[i].accumulator for i in alone}
        pairs = [pair for pair in itertools.pairwise(inside) if accumulators.keys() >= {*pair}]
        return sorted({i for a, b in pairs if accumulators[a] == accumulators[b] for i in (a, b)})

    def _is_alone(self, index: int) -> bool:
        """Whether this wgmma is a group of its own, and the next thing that happens to it is a wait for all."""
        earlier, later = reversed(self.instructions[:index]), self.instructions[index + 1 :]
        before = next((x for x in earlier if x.is_wgmma or x.name.startswith("WARPGROUP.ARRIVE")), None)
        after = next((x for x in later if x.is_wgmma or x.name.startswith(("WARPGROUP", "BRA", "EXIT"))), None)
        starts_group = before is None or before.ends_group or not before.is_wgmma
        waited_for = after is not None and after.waits_for == 0
        return self.instructions[index].ends_group and starts_group and waited_for

    def hazards(self) -> list[Hazard]:
        """Registers of a wgmma in flight that something touches before a wait that covers it."""
        found = set()
        todo = [(self._first, (_NOTHING,))]
        seen = set(todo)
        while todo:
            block, state = todo.pop()
            for i in block:
                instruction = self.instructions[i]
                found |= {Hazard(i, instruction.text, reason) for reason in _conflicts(state, instruction)}
                state = _after(state, instruction)
            steps = {(successor, state) for successor in self._flow.successors(block)} - seen
            seen |= steps
            todo += steps
        return sorted(found)


def _conflicts(in_flight: _InFlight, instruction: Instruction) -> list[str]:
    """What is wrong with this instruction while those wgmma are in flight."""
    accumulators, operands = (frozenset().union(*registers) for registers in zip(*in_flight, strict=True))
    if instruction.is_wgmma:  # products run in order, so they may share accumulators, but not take one as operand
        found = {"reads the accumulator of a wgmma in flight": instruction.fragment & accumulators}
    else:
        found = {
            "overwrites the operand of a wgmma in flight": instruction.writes & operands,
            "touches the accumulator of a wgmma in flight": (instruction.writes | instruction.reads) & accumulators,
        }
    return [reason for reason, registers in found.items() if registers]


def _after(in_flight: _InFlight, instruction: Instruction) -> _InFlight:
    """What is in flight once this instruction is issued."""
    *groups, (accumulators, operands) = in_flight
    if instruction.is_wgmma:
        groups.append((accumulators | instruction.accumulator, operands | instruction.fragment))
        if len(groups) > _IN_FLIGHT:
            groups[:2] = [tuple(a | b for a, b in zip(*groups[:2], strict=True))]
        return (*groups, _NOTHING) if instruction.ends_group else tuple(groups)
    if instruction.waits_for is not None:
        return (*groups[max(0, len(groups) - instruction.waits_for) :], in_flight[-1])
    return in_flight


def _parse(sass: str) -> list[Instruction]:
    lines, labels = [], {}
    for line in sass.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(lines)
        elif found := _LINE.match(line):
            lines.append(found.groups())
    instructions = []
    for text, guard, name, rest in lines:
        jump = _TARGET.search(rest) if name.startswith(("BRA", "CALL", "WARPSYNC")) else None
        operands = tuple(part.strip() for part in rest.split(",")) if rest else ()
        instructions.append(Instruction(text, guard is not None, name, operands, labels.get(jump[1]) if jump else None))
    return instructions

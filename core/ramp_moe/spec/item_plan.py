"""Plans for a launch that works off a list of items: each expert's token block and width, from its tokens alone.

An item is one CTA's work: up to `block` tokens of an expert by `width` columns. A column is the least share of the
weights that a CTA can take. An expert with h tokens gets ceil(h / block) tiles of one block. Each tile has
ceil(columns / width) items, of which the last may be narrower.

A plan follows from a limit on an item's time. Of the blocks, and of widths whose items stay within the limit, each
expert gets those of the least total time. A PlanTable has ROWS limits. The plan is that of the limit with the least

    score = max(longest item, ceil(items / slots) * work / items)          work: the times of all items, added up

which is about the time of the launch: rounds of CTAs, of average items. Experts with the longest items are listed first.

`plan` is the rule in numpy. A kernel that plans on the device computes the same integers, so that its lists are equal
to these, item by item. Times are integers in a unit of the table, since only their ratios matter. The score is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import KernelError
from .routing import IntArray

ROWS = 16
"""Limits that are compared."""
UNITS = 8191
"""The longest tile's time in units of a table."""
FORBIDDEN = 1 << 18
"""The time of a tile whose items would exceed the limit. It loses against 16 tiles of UNITS."""
MAX_TOKENS = 4096
"""Tokens of an expert from which on its block does not change."""
Durations = Callable[[int, int], float | None]
"""The time of an item by its block and width, in any unit; None if no item is like that."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A batch's plan: the limit's index `row`, and its list.

    choice, tiles: `[experts]`, the index of each expert's block, and its tiles.
    items: int64 `[items, 5]`: expert, index of the block, first token among the expert's, first column, width.
    work, longest: of all items, in the table's unit.
    """

    row: int
    choice: IntArray
    tiles: IntArray
    items: IntArray
    work: int
    longest: int


@dataclass(frozen=True, eq=False)
class PlanTable:
    """What plans are made from, for weights of `columns` and a GPU that runs `slots` items at a time.

    Each is int64 `[ROWS, blocks]`, by limit in ascending order. Of a forbidden block all but the first are 0.

    cost: of a tile. width: of its items but the last. parts: its number of items. longest: the time of one that wide.
    """

    blocks: tuple[int, ...]
    columns: int
    slots: int
    cost: IntArray
    width: IntArray
    parts: IntArray
    longest: IntArray

    def capacity(self, num_ids: int, num_experts: int) -> int:
        """The most items of a plan for `num_ids` routed ids. Limits whose plan has more are not taken.

        The last limit's plan has at most this number for any histogram. Two rounds of CTAs are always allowed, if there
        can be as many items.
        """
        bounds = [self._bound(row, num_ids, num_experts) for row in range(ROWS)]
        return max(bounds[-1], min(max(bounds), 2 * self.slots))

    def _bound(self, row: int, num_ids: int, num_experts: int) -> int:
        """Items of the worst histogram, or a few more: by the lowest of lines above what an expert's tokens need."""
        active = min(num_experts, num_ids)
        return min((active * above + num_ids * parts) // block for above, parts, block in self._lines[row])

    @cached_property
    def _lines(self) -> list[list[tuple[int, int, int]]]:
        """For each row, lines (above + parts * tokens) / block above the items of one expert."""
        tokens = np.arange(1, MAX_TOKENS + 1)
        found = []
        for row in range(ROWS):
            choice, tiles = self._tiles(row, tokens)
            items, last = self.parts[row, choice] * tiles, int(choice[-1])
            steepest = [
                (int(parts), block)
                for parts, block in zip(self.parts[row], self.blocks, strict=True)
                if parts * self.blocks[last] >= self.parts[row, last] * block  # or it would not hold past MAX_TOKENS
            ]
            lines = [(int((items * block - parts * tokens).max()), parts, block) for parts, block in steepest]
            found.append([(max(above, int(self.parts[row, last]) * block), parts, block) for above, parts, block in lines])
        return found

    def _tiles(self, row: int, tokens: IntArray) -> tuple[IntArray, IntArray]:
        """The index of the block, and the tiles, of experts with these tokens."""
        few = np.minimum(tokens, MAX_TOKENS)
        cost = [-(-few // block) * self.cost[row, i] for i, block in enumerate(self.blocks)]
        choice: IntArray = np.argmin(cost, axis=0)
        return choice, -(-tokens // np.array(self.blocks)[choice])

    def plan(self, histogram: IntArray, capacity: int) -> Plan:
        """The plan of a histogram int64 `[experts]`, with at most `capacity` items (of `capacity`)."""
        scores = []
        for row in range(ROWS):
            choice, tiles = self._tiles(row, histogram)
            items, work = int((tiles * self.parts[row, choice]).sum()), int((tiles * self.cost[row, choice]).sum())
            longest = int(np.where(tiles > 0, self.longest[row, choice], 0).max(initial=0))
            rounds = np.float32(-(-items // self.slots))
            mean = rounds * np.float32(work) / np.float32(max(items, 1))
            scores.append(max(np.float32(longest), mean) if items <= capacity else np.float32(np.inf))
        row = int(np.argmin(scores))
        choice, tiles = self._tiles(row, histogram)
        longest = int(np.where(tiles > 0, self.longest[row, choice], 0).max(initial=0))
        work = int((tiles * self.cost[row, choice]).sum())
        return Plan(row, choice, tiles, self._items(row, choice, tiles), work, longest)

    def _items(self, row: int, choice: IntArray, tiles: IntArray) -> IntArray:
        items = []
        for expert in sorted(range(len(tiles)), key=lambda e: (-self.longest[row, choice[e]], e)):
            code = int(choice[expert])
            width = int(self.width[row, code])
            items += [
                (expert, code, tile * self.blocks[code], first, min(width, self.columns - first))
                for tile in range(int(tiles[expert]))
                for first in range(0, self.columns, width)
            ]
        return np.array(items, np.int64).reshape(-1, 5)


def plan_table(blocks: Sequence[int], widths: Sequence[int], columns: int, slots: int, time: Durations) -> PlanTable:
    """The table for weights of `columns`, from the times of items.

    blocks: ascending; there are at most 16, and the largest is at most 16 times the smallest. widths: of items.
    Raises KernelError if no block can have any item.
    """
    times = {(b, w): t for b in blocks for w in widths if w <= columns and (t := time(b, w)) is not None}
    if not times:
        raise KernelError(f"no item of {list(blocks)} tokens and {list(widths)} of {columns} columns is possible")
    first = {block: [t for (b, _), t in times.items() if b == block] for block in blocks}
    limits = np.geomspace(1.05 * min(t for ts in first.values() for t in ts), 1.01 * max(times.values()), ROWS)

    def tile(block: int, width: int) -> float:
        """The time of a tile, or of the next wider one if its last item's width is not possible."""
        parts = -(-columns // width)
        last = columns - (parts - 1) * width
        return (parts - 1) * times[block, width] + times.get((block, last), times[block, width])

    unit = UNITS / max(tile(*key) for key in times)
    cost = np.full((ROWS, len(blocks)), FORBIDDEN, np.int64)
    width, parts, longest = (np.zeros_like(cost) for _ in range(3))
    for row, limit in enumerate(limits):
        for i, block in enumerate(blocks):
            within = [key for key, t in times.items() if key[0] == block and t <= limit]
            if not within:
                continue
            best = min(within, key=lambda key: tile(*key))
            cost[row, i] = max(1, round(unit * tile(*best)))
            width[row, i], parts[row, i] = best[1], -(-columns // best[1])
            longest[row, i] = max(1, round(unit * times[best]))
    return PlanTable(tuple(blocks), columns, slots, cost, width, parts, longest)

"""Random changes of a placement, from which a local search chooses.

Ends of spans are snapped to those of other servers: chains change servers only at ends, so blocks of a server before
the first end of another are of no use.
"""

import random

from geopetals.placement.search.instance import Instance
from geopetals.placement.search.spans import Change


class Moves:
    """Changes of the servers whose blocks may move."""

    def __init__(self, instance: Instance, rng: random.Random) -> None:
        self.servers = instance.movable
        self.most = instance.most
        self.blocks = instance.num_blocks
        self.random = rng.random

    def propose(self, starts: list[int], ends: list[int]) -> Change:
        """New spans of some servers; empty if the draw changes nothing."""
        draw = self.random()
        if draw < 0.5:
            return self._reseat(starts, ends)
        if draw < 0.65:
            return self._shift_cut(starts, ends)
        if draw < 0.75:
            return self._shift_pair(starts, ends)
        if draw < 0.88:
            return self._swap(starts, ends)
        if draw < 0.92:
            return self._swap_segments(starts, ends)
        return self._nudge(starts, ends)

    def _below(self, count: int) -> int:
        return int(self.random() * count)

    def _reseat(self, starts: list[int], ends: list[int]) -> Change:
        """One server from or to a cut of another, with any size or up to another cut."""
        j = self.servers[self._below(len(self.servers))]
        other = self.servers[self._below(len(self.servers))]
        most = self.most[j]
        cut = starts[other] if self.random() < 0.5 else ends[other]
        draw = self.random()
        if draw < 0.04:
            return [(j, 0, 0)] if ends[j] else []
        if draw < 0.5:
            third = self.servers[self._below(len(self.servers))]
            far = starts[third] if self.random() < 0.5 else ends[third]
            start, end = min(cut, far), max(cut, far)
            if not 0 < end - start <= most:
                return []
        elif draw < 0.75:
            start, end = cut, min(cut + 1 + self._below(most), self.blocks)
        else:
            start, end = max(cut - 1 - self._below(most), 0), cut
        if start >= end or (start == starts[j] and end == ends[j]):
            return []
        return [(j, start, end)]

    def _shift_cut(self, starts: list[int], ends: list[int]) -> Change:
        """All servers that touch a cut, with it by some blocks."""
        other = self.servers[self._below(len(self.servers))]
        cut = starts[other] if self.random() < 0.5 else ends[other]
        by = 1 + int(self.random() ** 2 * 4)
        to = cut + by if self.random() < 0.5 else cut - by
        if not 0 < cut < self.blocks or not 0 < to < self.blocks:
            return []
        change = []
        for j in self.servers:
            start, end = starts[j], ends[j]
            if start == cut:
                start = to
            elif end == cut:
                end = to
            else:
                continue
            if start >= end:
                change.append((j, 0, 0))
                continue
            if end - start > self.most[j]:
                if start == to:
                    end = start + self.most[j]
                else:
                    start = end - self.most[j]
            change.append((j, start, end))
        return change

    def _shift_pair(self, starts: list[int], ends: list[int]) -> Change:
        """The cut between one server and one that follows it, other servers staying."""
        i = self.servers[self._below(len(self.servers))]
        cut = ends[i]
        following = [j for j in self.servers if starts[j] == cut and ends[j] > cut]
        if not cut or not following:
            return []
        j = following[self._below(len(following))]
        by = 1 + int(self.random() ** 2 * 4)
        to = cut + by if self.random() < 0.5 else cut - by
        if not starts[i] < to < ends[j] or to - starts[i] > self.most[i] or ends[j] - to > self.most[j]:
            return []
        return [(i, starts[i], to), (j, to, ends[j])]

    def _swap_segments(self, starts: list[int], ends: list[int]) -> Change:
        """All servers inside one stretch of blocks change places with those inside the next; others stay.

        With relay the order of servers in a chain is free, but which servers may reach over which cuts depends on it.
        """
        cuts = sorted({0, *(ends[self.servers[self._below(len(self.servers))]] for _ in range(3))})
        if len(cuts) < 3:
            return []
        place = self._below(len(cuts) - 2)
        low, middle, high = cuts[place : place + 3]
        change = []
        for j in self.servers:
            start, end = starts[j], ends[j]
            if low <= start < end <= middle:
                change.append((j, start + high - middle, end + high - middle))
            elif middle <= start < end <= high:
                change.append((j, start + low - middle, end + low - middle))
        return change

    def _swap(self, starts: list[int], ends: list[int]) -> Change:
        i = self.servers[self._below(len(self.servers))]
        j = self.servers[self._below(len(self.servers))]
        if starts[i] == starts[j] and ends[i] == ends[j]:
            return []
        return [self._clipped(i, starts[j], ends[j]), self._clipped(j, starts[i], ends[i])]

    def _clipped(self, j: int, start: int, end: int) -> tuple[int, int, int]:
        most = self.most[j]
        if end - start > most:
            if self.random() < 0.5:
                end = start + most
            else:
                start = end - most
        return j, start, end

    def _nudge(self, starts: list[int], ends: list[int]) -> Change:
        j = self.servers[self._below(len(self.servers))]
        start, end = starts[j], ends[j]
        if not end:
            return []
        by = 1 if self.random() < 0.5 else -1
        if self.random() < 0.5:
            start += by
        else:
            end += by
        if not 0 <= start < end <= self.blocks or end - start > self.most[j]:
            return []
        return [(j, start, end)]

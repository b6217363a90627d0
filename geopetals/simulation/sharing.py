"""How long a unit of a session takes on a server that others use as well: its response R.

* **One after another** (stock PETALS), steps and whole prompts alike; a unit works w there:
  R = w + sum over others of w (r R - r w (1 - U) / 2), U = sum of r w. The first product is how many of them are
  there; of one in service, half is left while the server is mostly idle.
* **Batched** (GeoPETALS): steps that come while one is computed go into the next one together. With the others'
  arrivals a = sum of r and the mean step S = k (floor + session_s b) of b sessions: the server is at work with
  probability u = min(a S / b, 1); a step that finds it so waits S / 2 and shares the next one with the a S that come
  meanwhile, but not with more than there are: R = u S / 2 + k (floor + session_s (1 + min(u a S, others))).
  A prompt is computed in chunks between steps, and no side takes more than half of the server from the other: steps are
  slower by 1 / (1 - min(share of prompts, 1/2)), prompts by 1 / (1 - min(share of steps, 1/2)) and by each other.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from geopetals.problem import Contention, Floats
from geopetals.simulation.fluid_table import Table

_HALF = 0.5
_TINY = 1e-300


class Sharing(Protocol):
    """Remembers what it last found on the servers, for estimates and as the start of the next iteration."""

    work_columns: int
    use: Floats
    """(J + 1,): the share of time at work."""

    def work(self, servers: Sequence[int], work: Sequence[float], *, decode: bool) -> list[list[float]]:
        """(work_columns, hops): a session's part of Table.work."""
        ...

    def responses_s(self, table: Table) -> Floats:
        """(places,): from the table's present rates and responses."""
        ...

    def estimate_s(self, server: int, work: float, *, decode: bool) -> float:
        """The response that a newcomer may expect."""
        ...

    def rest(self) -> None:
        """Nobody is in service."""
        ...


class OneByOne:
    """Steps and prompts of sessions, one after another. Columns: w, w for the queue, w^2."""

    work_columns = 3

    def __init__(self, servers: int) -> None:
        self._servers = servers
        self.rest()

    def rest(self) -> None:
        self.use = np.zeros(self._servers + 1)
        self._wait_s = np.zeros(self._servers + 1)

    def work(self, servers: Sequence[int], work: Sequence[float], *, decode: bool) -> list[list[float]]:
        del servers, decode
        each = list(work)
        return [each, each, [work_s * work_s for work_s in each]]

    def responses_s(self, table: Table) -> Floats:
        hops = table.hops
        work_s = table.work[0, :hops]
        parts = table.work[:, :hops] * table.rate[table.session[:hops]]
        parts[1] *= table.response_s[:hops]
        use, all_queue_s, all_squares_s = table.by_server(parts)
        self.use = np.minimum(use, 1.0)
        residual = (1 - self.use) * _HALF
        self._wait_s = all_queue_s - residual * all_squares_s
        wait_s, own = np.stack((self._wait_s, residual)).take(table.server, axis=1)
        others_s = wait_s - parts[1] + own * parts[2]
        return np.asarray((work_s + np.maximum(others_s, 0.0)) * (work_s > 0))

    def estimate_s(self, server: int, work: float, *, decode: bool) -> float:
        del decode
        return work + max(self._wait_s.item(server), 0.0) if work > 0 else 0.0


class Batched:
    """Steps that wait are computed together; prompts in chunks between them.

    Columns: 1 for places that decode, their blocks, seconds of a prompt, 1 for places of prompts; then for those that
    decode the part of a step without sessions, and that of each session.
    """

    work_columns = 6

    def __init__(self, contention: Contention) -> None:
        # One more, where places without work are.
        self._floor_s = np.append(contention.floor_s, 0.0)
        self._session_s = np.append(contention.session_s, 0.0)
        self._floors, self._sessions = self._floor_s.tolist(), self._session_s.tolist()
        self.rest()

    def rest(self) -> None:
        size = self._floor_s.size
        self.use, self._batch = np.zeros(size), np.ones(size)
        self._found = np.zeros((9, size))
        self._found[5:7] = 1.0
        self._decoding = np.zeros(size)

    def work(self, servers: Sequence[int], work: Sequence[float], *, decode: bool) -> list[list[float]]:
        none = [0.0] * len(servers)
        if not decode:
            return [none, none, list(work), [float(w > 0) for w in work], none, none]
        floors_s = [w * self._floors[j] for j, w in zip(servers, work, strict=True)]
        sessions_s = [w * self._sessions[j] for j, w in zip(servers, work, strict=True)]
        return [[1.0] * len(servers), list(work), none, none, floors_s, sessions_s]

    def responses_s(self, table: Table) -> Floats:
        hops = table.hops
        work = table.work[:, :hops]
        parts = np.empty((5, hops))
        np.multiply(work[:4], table.rate[table.session[:hops]], out=parts[:4])
        rates, present = parts[0], parts[3]
        present *= table.response_s[:hops]
        parts[4] = work[0]
        arrivals = self._on_servers(table.by_server(parts))
        all_arrivals, all_present, step_s, batch_s, mates, slower, prompts_slower = self._found[:7].take(
            table.server, axis=1
        )
        others = np.maximum(all_arrivals - rates, 0.0)
        busy = np.minimum(others * batch_s, 1.0)
        others *= step_s
        others *= busy
        joined = np.minimum(others, mates)
        joined += 1
        step_s *= busy
        step_s *= _HALF * work[0]
        step_s += work[4]
        step_s += work[5] * joined
        step_s *= slower
        prompt_s = np.maximum(all_present - present, 0.0)
        prompt_s += 1
        prompt_s *= prompts_slower
        prompt_s *= work[2]
        step_s += prompt_s
        joined *= rates
        self._batch = np.ones_like(arrivals)
        np.divide(table.by_server(joined[None])[0], arrivals, out=self._batch, where=arrivals > 0)
        return np.asarray(step_s)

    def _on_servers(self, sums: Floats) -> Floats:
        """Fills `found`, rows of (J + 1,): arrivals, presence of prompts, mean step, that per session of a batch,
        sessions that decode but one, by what steps and prompts are slower, shares of time of prompts and of steps.
        Gives the arrivals.
        """
        arrivals, all_blocks, prompt_use, all_present, decoding = sums
        found = self._found = np.empty((9, arrivals.size))
        found[0], found[1], found[7] = arrivals, all_present, prompt_use
        step_s = np.divide(all_blocks, np.maximum(arrivals, _TINY), out=found[2])
        step_s *= self._floor_s + self._session_s * self._batch
        np.divide(step_s, self._batch, out=found[3])
        np.subtract(decoding, 1.0, out=found[4])
        np.maximum(found[4], 0.0, out=found[4])
        np.minimum(arrivals * found[3], 1.0, out=found[8])
        slower = np.minimum(found[7:9], _HALF, out=found[5:7])
        np.subtract(1.0, slower, out=slower)
        np.reciprocal(slower, out=slower)
        self.use = np.minimum(found[7] + found[8], 1.0)
        self._decoding = decoding
        return np.asarray(arrivals)

    def estimate_s(self, server: int, work: float, *, decode: bool) -> float:
        arrivals, present, step_s, _, _, slower, prompts_slower, _, use = self._found[:, server].tolist()
        if not decode:
            return float(work * (1 + present) * prompts_slower)
        joined = min(1 + use * arrivals * step_s, 1 + self._decoding.item(server))
        wait_s = use * step_s * _HALF
        return float((wait_s + work * (self._floors[server] + self._sessions[server] * joined)) * slower)

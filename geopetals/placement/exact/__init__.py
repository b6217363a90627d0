"""Exact placement: the placement and the chains of all sessions whose sum of costs is the least, with the proof.

The problem: R sessions at once, given per client. Choose a span for every server, of at most max_blocks, pins kept, and
a chain for every session that leaves each server at the end of its span, such that block_bytes for each block held and
kv_bytes for each block of each session fit in the server's memory. Minimise the sum of session_costs (timing.py), by
relay or by push. A server computes for one session as for many: compute contention is not part of this.

The bound of the decomposition says which sizes and hops a solution cheaper than some cutoff may have; the rest is left
out of the arc-flow program (arc_flow.py). If its optimum costs no more than the cutoff it is the optimum of all; if
not, nothing is cheaper than the cutoff, and it is widened. reference.py has the paper's own program.
"""

from geopetals.placement.exact.solving import ExactResult, exact_placement

__all__ = ["ExactResult", "exact_placement"]

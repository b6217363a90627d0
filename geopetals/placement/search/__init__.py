"""Placement that beats CG-BP under load: a portfolio of candidates, improved by local search."""

from geopetals.placement.search.search import SearchResult, placement_cost, search_placement
from geopetals.placement.search.sessions import sessions_by_client

__all__ = ["SearchResult", "placement_cost", "search_placement", "sessions_by_client"]

"""A plan for a cluster and what to expect from it: placement and routing applied to a Cluster, for people to read."""

from geopetals.planning.report import ClientReport, HopReport, PetalsReport, PlanReport, ServerReport, plan, report_json

__all__ = ["ClientReport", "HopReport", "PetalsReport", "PlanReport", "ServerReport", "plan", "report_json"]

"""The coordinator of a live swarm: registry, planner and admission desk."""

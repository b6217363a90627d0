"""Load on a swarm, ours or stock PETALS', and what came of it."""

"""The OpenAI-compatible HTTP API over the client library: a swarm's model for programs that know nothing of swarms."""

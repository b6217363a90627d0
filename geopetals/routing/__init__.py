"""Which servers a session goes through, and when it may start."""

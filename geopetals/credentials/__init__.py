"""Who may do what in a swarm: keys, join tokens' ledger, certificates, tickets and the list of what is trusted.

Pure data and Ed25519: no network, no torch, no clock of its own. What is read may come from anybody.
"""

"""How p2pd is started for each place in the network: on this machine alone, public, behind NAT, a relay, a client."""

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geopetals.swarm.network import NetworkConfig

STARTUP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayLimits:
    """What a relay grants: bytes in each direction and seconds of one circuit, open circuits of each peer, and how many
    peers can be reached through it at a time. The first four are p2pd's defaults.
    """

    data_bytes: int = 1 << 32
    seconds: int = 1800
    circuits_per_peer: int = 16
    peers: int = 128
    buffer_bytes: int = 1 << 16
    """Of each direction of a circuit; p2pd's default of 16 MiB is 32 MiB for each circuit."""

    def flags(self) -> list[str]:
        return [
            f"-relayDataLimit={self.data_bytes}",
            f"-relayTimeLimit={self.seconds}s",
            f"-relayMaxCircuits={self.circuits_per_peer}",
            f"-relayMaxReservations={self.peers}",
            f"-relayBufferSize={self.buffer_bytes}",
        ]


def p2p_options(config: "NetworkConfig") -> dict[str, Any]:
    """Arguments of `P2P.create`."""
    options: dict[str, Any] = {
        "use_relay": True,  # who may not use relays cannot dial servers behind NAT
        "use_auto_relay": False,
        "auto_nat": False,
        "nat_port_map": False,
        "check_if_identity_free": False,
        "startup_timeout": STARTUP_TIMEOUT_S,
    }
    if config.client_only:
        return options | {"dht_mode": "client", "no_listen": True, "host_maddrs": None}
    options["host_maddrs"] = [maddr(config.host, config.port)]
    options["auto_nat"] = not is_loopback(config.host)  # tell others whether they can be dialled; punch holes
    if config.public_ip is not None:
        options["announce_maddrs"] = [maddr(config.public_ip, config.port)]
    if config.relay_limits is not None:
        options["force_reachability"] = "public"
    if config.relays:
        options |= {
            "use_auto_relay": True,
            "trusted_relays": list(config.relays),
            "force_reachability": "private",
            "dht_mode": "client",
        }
    return options


def p2pd_flags(config: "NetworkConfig") -> list[str]:
    """Of p2pd, beside those that `P2P.create` knows."""
    flags = config.relay_limits.flags() if config.relay_limits is not None else ["-relayService=0"]
    if config.relays:
        flags.append("-relayDiscovery=0")  # a relay address after 0.5 s instead of 180
    if config.metrics_port is not None:
        flags.append(f"-metricsAddr=127.0.0.1:{config.metrics_port}")
    return flags


def maddr(host: str, port: int) -> str:
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return f"/dns/{host}/tcp/{port}"
    return f"/ip{version if version == 6 else 4}/{host}/tcp/{port}"


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

"""Emulated devices as people write them: a server of a cluster file, or its figures."""

from collections.abc import Mapping
from pathlib import Path

from geopetals.cluster import DecodeTime, PrefillTime
from geopetals.cluster.errors import ClusterError
from geopetals.cluster.quantities import DURATION, MEMORY
from geopetals.cluster.to_problem import decode_time, prefill_time
from geopetals.cluster_io import load_cluster
from geopetals.errors import UnsupportedInput
from geopetals.swarm.emulation import DeviceSpec

_KEYS = {
    "weights": ("weights_s", DURATION),
    "per_session": ("session_s", DURATION),
    "fixed": ("fixed_s", DURATION),
    "per_token": ("token_s", DURATION),
    "memory": ("memory_bytes", MEMORY),
}


def read_device(text: str, *, dilation: float = 1.0) -> DeviceSpec:
    """`FILE:SERVER`, a server of a cluster file, or `weights=2ms,per_session=0.1ms,...`. Raises UnsupportedInput."""
    try:
        if "=" in text:
            return DeviceSpec(**_figures(text), dilation=dilation)  # type: ignore[arg-type]
        file, _, server = text.rpartition(":")
        if not file:
            raise UnsupportedInput(
                f"{text!r} is no device: write CLUSTER_FILE:SERVER or weights=2ms,per_session=0.1ms."
            )
        return devices_of_cluster(file, dilation=dilation)[server]
    except ValueError as error:
        raise UnsupportedInput(f"--emulate: {error}.") from error
    except KeyError as error:
        raise UnsupportedInput(
            f"{text!r}: the cluster has no server {error}: give the name of one that it has."
        ) from error


def devices_of_cluster(file: str | Path, *, dilation: float = 1.0) -> dict[str, DeviceSpec]:
    """The device of each server of a cluster file, measured or estimated from its type of GPU."""
    cluster = load_cluster(file)
    return {
        str(server.id): _device(
            decode_time(cluster, server), prefill_time(cluster, server), server.memory_bytes, dilation=dilation
        )
        for server in cluster.servers
    }


def describe_device(spec: DeviceSpec) -> str:
    """One line for the operator of a server."""
    ms = [
        f"{1000 * spec.dilation * value:.3g}" for value in (spec.weights_s, spec.session_s, spec.fixed_s, spec.token_s)
    ]
    slowed = f", slowed down {spec.dilation:g} times" if spec.dilation != 1 else ""
    decode, prefill = f"{ms[0]} ms + {ms[1]} ms per session", f"{ms[2]} ms + {ms[3]} ms per token"
    return f"a block takes {decode} to decode, {prefill} to prefill{slowed}"


def _device(decode: DecodeTime, prefill: PrefillTime, memory_bytes: int, *, dilation: float) -> DeviceSpec:
    return DeviceSpec(
        weights_s=decode.weights_s,
        session_s=decode.session_s,
        fixed_s=prefill.fixed_s,
        token_s=prefill.token_s,
        memory_bytes=memory_bytes,
        dilation=dilation,
    )


def _figures(text: str) -> Mapping[str, float | int]:
    figures: dict[str, float | int] = {}
    for part in text.split(","):
        key, _, value = (word.strip() for word in part.partition("="))
        if key not in _KEYS:
            raise ValueError(f"{key!r} is none of {', '.join(_KEYS)}")
        name, unit = _KEYS[key]
        try:
            figures[name] = int(unit.parse(value)) if unit.whole else unit.parse(value)
        except ClusterError as error:
            raise ValueError(f"{key}: {error}") from error
    if "weights_s" not in figures:
        raise ValueError("weights is missing, the time in which one block's weights are read: weights=2ms")
    return figures


def device_text(spec: DeviceSpec) -> str:
    """What `read_device` reads as this device, without its dilation."""
    figures = {key: getattr(spec, name) for key, (name, _) in _KEYS.items()}
    return ",".join(
        f"{key}={unit.format(figures[key])}" for key, (_, unit) in _KEYS.items() if figures[key] is not None
    )

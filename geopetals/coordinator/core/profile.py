"""What a server measured of itself, as the planner wants it: two lines through the measurements."""

import math
from collections.abc import Sequence

from geopetals.cluster import ClusterError, DecodeTime, PrefillTime, ServerId, ServerSpec
from geopetals.coordinator.core.settings import ModelFacts
from geopetals.coordinator.messages import Limits, Profile

_LEAST_S = 1e-9
"""A step that takes no time at all is not believed."""
_SLOWEST_S = 3600.0
_MOST_TOKENS = 2**24
_LEAST_BIT_PER_S = 1000.0


def decode_time(profile: Profile) -> DecodeTime:
    """The line through seconds per block against sessions in a step; contexts are averaged over."""
    fixed_s, each_s = _line([(sample.batch, sample.seconds_per_block) for sample in profile.decode])
    return DecodeTime(weights_s=fixed_s, session_s=each_s)


def prefill_time(profile: Profile) -> PrefillTime:
    """The line through seconds per block against tokens of a prompt."""
    fixed_s, each_s = _line([(sample.tokens, sample.seconds_per_block) for sample in profile.prefill])
    return PrefillTime(fixed_s=fixed_s, token_s=each_s)


def server_spec(peer: str, profile: Profile, limits: Limits, model: ModelFacts) -> ServerSpec:
    """Raises ClusterError for what cannot be planned with.

    A server whose blocks are larger than the model's (other weights) counts with less memory in proportion.
    """
    memory = min(profile.memory_bytes, limits.memory_bytes or profile.memory_bytes)
    usable = int(memory * min(model.block_bytes / profile.block_bytes, 1.0))
    most = min(int(memory // profile.block_bytes), model.num_blocks)
    if limits.max_blocks is not None:
        most = min(most, limits.max_blocks)
    pin = None if limits.pin is None else (limits.pin.start, limits.pin.end)
    if pin is not None and not (0 <= pin[0] < pin[1] <= model.num_blocks and pin[1] - pin[0] <= most):
        raise ClusterError(
            ("blocks",),
            f"{pin[0]}:{pin[1]} are no blocks that it could hold: the model has {model.num_blocks}, and its memory is "
            f"for {most}.",
        )
    rate = profile.bandwidth_bytes_s
    return ServerSpec(
        id=ServerId(peer),
        memory_bytes=max(usable, 1),
        decode_block=decode_time(profile),
        prefill_block=prefill_time(profile),
        overhead_s=min(profile.overhead_s, _SLOWEST_S),
        max_blocks=max(most, 1),
        blocks=pin,
        bandwidth_bit_per_s=None if rate is None else max(8 * rate, _LEAST_BIT_PER_S),
    )


def _line(measured: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Least squares with neither part below 0. From one abscissa alone nothing is known of the slope: it is 0.

    What no machine can have measured is cut, or sums would overflow.
    """
    points = [(min(x, _MOST_TOKENS), min(y, _SLOWEST_S)) for x, y in measured]
    count = len(points)
    mean_x = math.fsum(x for x, _ in points) / count
    mean_y = max(math.fsum(y for _, y in points) / count, _LEAST_S)
    spread = math.fsum((x - mean_x) ** 2 for x, _ in points)
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    slope = min(max(slope, 0.0), mean_y / mean_x if mean_x else 0.0, _SLOWEST_S)
    return min(max(mean_y - slope * mean_x, 0.0), _SLOWEST_S), slope

"""A server of a swarm that has no coordinator: it chooses its blocks itself, once, by stock PETALS' rule."""

from geopetals.join_token import JoinToken
from geopetals.swarm import devices, profile
from geopetals.swarm.blocks import choose_blocks, default_kv_tokens, measured_block_bytes
from geopetals.swarm.holding import Holding
from geopetals.swarm.records import check_same_model, read_servers, require_same_weights
from geopetals.swarm.server_parts import ServerParts

_MOST_PEERS = 8


async def serve_alone(parts: ServerParts) -> None:
    """Until cancelled. Raises what keeps the server from starting, as SwarmMismatch and MemoryShortage."""
    holding = await _load_what_is_needed(parts)
    speed = await parts.loader.compute.run(lambda: profile.measure(holding.stage))
    await parts.serve(holding, speed)

    async def tell_ready() -> None:
        parts.tell_ready(holding, await _join_token(parts))

    await tell_ready()
    await parts.keep_place(tell_ready)


async def _load_what_is_needed(parts: ServerParts) -> Holding:
    loader, network, identity = parts.loader, parts.place.network, parts.identity
    checkpoint = loader.checkpoint
    servers = check_same_model(identity, await read_servers(network.node, parts.swarm, checkpoint.num_blocks))
    kv_tokens = loader.kv_tokens or default_kv_tokens(checkpoint.config)
    block_bytes = await loader.compute.run(
        lambda: measured_block_bytes(
            checkpoint, dtype=loader.dtype, device=loader.device, quantization=loader.quantization
        )
    )
    start, end = choose_blocks(
        checkpoint,
        servers,
        block_bytes=block_bytes,
        wanted=parts.config.blocks,
        count=parts.config.count,
        dtype=loader.dtype,
        memory_bytes=loader.memory_bytes,
        kv_tokens=kv_tokens,
    )
    await parts.listing.joining(start, end)
    holding = await loader.load(start, end)
    servers = await read_servers(network.node, parts.swarm, checkpoint.num_blocks)
    others = [server for server in servers if server.peer_id != network.peer_id]
    check_same_model(identity, others)
    require_same_weights(others, holding.block_hashes)
    devices.check_fit(
        memory_bytes=loader.memory_bytes,
        num_blocks=holding.num_blocks,
        block_bytes=holding.stage.memory_bytes // holding.num_blocks,
        kv_bytes_per_block=kv_tokens * holding.stage.kv_bytes_per_token(),
    )
    return holding


async def _join_token(parts: ServerParts) -> str:
    """Names this server first, and those that introduced it."""
    addresses, network = await parts.place.network.addresses(), parts.place.network
    peers = tuple(dict.fromkeys((*addresses, *network.config.initial_peers)))[:_MOST_PEERS]
    config = parts.config
    model = config.token.model if config.token is not None else config.model
    return JoinToken(swarm=parts.swarm, model=model, identity=parts.identity, peers=peers).encode()

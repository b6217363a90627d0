"""`geopetals model`: how much memory a model's blocks and its attention cache take, and how many blocks fit."""

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from geopetals.units import in_units

if TYPE_CHECKING:
    from geopetals.models import ModelCard

HELP = "show a model's memory per block and per token, and how many blocks fit in a GPU"
_GPU_GB = (8, 16, 24, 80)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `geopetals model`."""
    parser.add_argument(
        "model", metavar="MODEL", help="a built-in name, a config.json or its directory, or OWNER/NAME on the Hub"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--json", action="store_true", help="print one JSON object, in bytes")


def run(args: argparse.Namespace) -> int:
    """Print what is known of the model."""
    from geopetals.models import find_card

    card = find_card(args.model, revision=args.revision)
    print(json.dumps(_as_json(card), indent=2) if args.json else "\n".join(_lines(card)))
    return 0


def _as_json(card: "ModelCard") -> dict[str, object]:
    from geopetals.models import DTYPES, WEIGHT_FORMATS

    return {
        "name": card.name,
        "family": card.family,
        "blocks": card.num_blocks,
        "hidden_size": card.hidden_size,
        "heads": card.heads,
        "kv_heads": card.kv_heads,
        "head_dim": card.head_dim,
        "max_tokens": card.max_tokens,
        "stored_dtype": card.stored_dtype,
        "parameters": {
            "total": card.total_parameters,
            "block": card.block_parameters,
            "block_active": card.active_parameters,
            "outside_blocks": card.outside_parameters,
        },
        "kv_bytes_per_token_per_block": {dtype: card.kv_bytes_per_token(dtype) for dtype in DTYPES},
        "hidden_bytes_per_token": {dtype: card.hidden_bytes_per_token(dtype) for dtype in DTYPES},
        "weights": {
            weights: {
                "block_bytes": card.block_bytes(weights),
                "all_blocks_bytes": card.num_blocks * card.block_bytes(weights),
                "blocks_in_gb": {str(size): card.blocks_that_fit(size * 1e9, weights) for size in _GPU_GB},
            }
            for weights in WEIGHT_FORMATS
        },
    }


def _lines(card: "ModelCard") -> Iterator[str]:
    from geopetals.models import WEIGHT_FORMATS

    yield (
        f"{card.name} ({card.family}): {card.num_blocks} blocks, {card.total_parameters / 1e9:.3f} billion parameters, "
        f"{card.block_parameters / 1e6:.1f} million per block"
    )
    if card.active_parameters < card.block_parameters:
        yield f"mixture of experts: a token uses {card.active_parameters / 1e6:.1f} million of a block's parameters"
    on_the_wire = in_units(card.hidden_bytes_per_token())
    yield f"hidden size {card.hidden_size}: {on_the_wire} per token between servers (bfloat16)"
    yield (
        f"attention cache: {card.kv_heads} key-value heads of {card.head_dim}, "
        f"{in_units(card.kv_bytes_per_token())} per token and block (bfloat16), "
        f"{in_units(card.num_blocks * card.kv_bytes_per_token())} per token in all"
    )
    yield ""
    heads = "".join(f"{f'in {size} GB':>10}" for size in _GPU_GB)
    yield f"{'weights':10}{'a block':>11}{'all blocks':>12}   blocks{heads}"
    for weights in WEIGHT_FORMATS:
        block = card.block_bytes(weights)
        fits = "".join(f"{card.blocks_that_fit(size * 1e9, weights):>10}" for size in _GPU_GB)
        yield f"{weights:10}{in_units(block):>11}{in_units(card.num_blocks * block):>12}         {fits}"
    yield ""
    yield "Blocks that fit are counted without attention cache and without what the GPU's driver and PyTorch need."
    if card.active_parameters < card.block_parameters:
        yield "int8 and nf4 leave experts as they are: bitsandbytes quantizes linear layers only."

"""Every causal language model of Transformers, made tiny, and whether it can be split over servers.

`python -m tests.families` prints what it finds; with `--write docs/models.md` it writes the table there.
"""

import argparse
import contextlib
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as hf_logging

from geopetals.errors import CheckpointError, GeoPetalsError
from geopetals.swarm.architecture import find_layers, native_class
from geopetals.swarm.batched_attention import Layout
from tests.batches import decode_error
from tests.in_process import InProcess
from tests.models import VOCABULARY, save_model

Status = Literal["works", "refused", "not tried", "WRONG"]
BLOCKS, WINDOW = 6, 8
PIECES = (5, 12, 1, 3)  # one longer than the window, together longer than what is kept for it
MOST_PARAMETERS = 20_000_000
EXACT = 1e-5
MOST_ROUNDING = 2e-5  # some families scale their logits up

# Fields of configs, under all the names that families give them. Only those that a config has are set.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), BLOCKS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "ffn_hidden_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k", "moe_k"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "ssm_state_size", "mamba_d_state"), 32),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "kv_lora_rank", "kv_channels", "index_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size"), WINDOW),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "dropout", "resid_pdrop", "embd_pdrop"), 0.0),
    "vocab_size": VOCABULARY,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
}
# Where one set of sizes does not fit, one of these is left as the family has it.
_LEFT_OUT: tuple[tuple[str, ...], ...] = ((), ("head_dim",), ("num_key_value_heads",), ("head_dim", "v_head_dim"))
# What a family needs besides.
_SETTINGS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], BLOCKS // 2]]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * (BLOCKS // 2)},
    "gemma4_text": {
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCABULARY,
        "global_head_dim": 16,
        "num_experts": None,
        "moe_intermediate_size": None,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (BLOCKS // 2)},
    "longcat_flash": {"head_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "reformer": {"axial_pos_embds": False},
    "xlstm": {"hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """`reason` says why it is refused, was not tried, or what was wrong.

    `batching` is how decode steps of several sessions become one forward pass; None if they do not on some server.
    """

    family: str
    status: Status
    reason: str = ""
    batching: Layout | None = None


def tiny_config(family: str, **settings: Any) -> PretrainedConfig:
    """A config of the family with every size that it has shrunk. Raises what its class raises if they do not fit."""
    return _fitting_configs(family, settings)[0]


def _fitting_configs(family: str, settings: dict[str, Any]) -> list[PretrainedConfig]:
    kind = CONFIG_MAPPING[family]
    known = {name for name in _SIZES if _has(kind, name)}
    fitting, error = [], ValueError("no sizes were tried")
    for left_out in _LEFT_OUT:
        names = known - set(left_out)
        try:
            fitting.append(kind(**{name: _SIZES[name] for name in names} | _SETTINGS.get(family, {}) | settings))
        except Exception as caught:  # noqa: BLE001 - a config's own checks raise anything
            error = caught if isinstance(caught, ValueError) else ValueError(f"{type(caught).__name__}: {caught}")
    if not fitting:
        raise error
    return fitting


def _has(kind: Any, name: str) -> bool:
    fields = getattr(kind, "__dataclass_fields__", {})
    return name in fields or name in getattr(kind, "attribute_map", {})


def save_tiny(directory: Path, config: PretrainedConfig, *, sharded: bool = False) -> PreTrainedModel:
    """Save a model with lively random weights, and give it back as a user would load it."""
    save_model(directory, config, sharded=sharded, spread=1.5)
    local: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return local


def prompt(batch: int, tokens: int = sum(PIECES)) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(batch))


def differences(remote: InProcess, local: Any, batch: int, *, new_tokens: int = 12, beams: bool = False) -> list[str]:
    """What is not as the local model has it: hidden states of a prompt in pieces, logits, tokens."""
    ids, found = prompt(batch), []
    for what, ours, expected, rounding in _forward(remote, local, ids):
        error = relative_error(ours, expected)
        if not error < max(EXACT, 2 * min(rounding, MOST_ROUNDING)):
            found.append(f"{what} differ by {error:.1e}, where the local model itself differs by {rounding:.1e}")
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    ways: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"do_sample": True, "temperature": 2.0}}
    if beams:
        ways["beam"] = {"num_beams": 3}
    for way, extra in ways.items():
        torch.manual_seed(7)
        tokens = remote.generate(ids, rows=extra.get("num_beams", 1), **options | extra)
        torch.manual_seed(7)
        if not torch.equal(tokens, local.generate(ids, **options | extra)):
            found.append(f"{way} tokens differ")
    return found


def _forward(remote: InProcess, local: Any, ids: Tensor) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """A prompt in pieces, compared with the local model that gets it at once, and the local model's own rounding."""
    pieces, model = ids.split(PIECES, dim=1), cast(Any, remote.model)
    _, layers = find_layers(local, remote.num_blocks)
    outputs: list[Tensor] = []
    handle = layers[-1].register_forward_hook(
        lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    with handle, torch.no_grad():
        expected = local(ids, use_cache=False).logits
        own_cache = DynamicCache(config=local.config)
        own = torch.cat([local(piece, past_key_values=own_cache, use_cache=True).logits for piece in pieces], dim=1)
        cache = remote.cache(len(ids))
        ours = torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1)
    own_hidden = torch.cat(outputs[1:], dim=1)
    yield "hidden states", torch.cat(remote.outputs, dim=1), outputs[0], relative_error(own_hidden, outputs[0])
    yield "logits", ours, expected, relative_error(own, expected)


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).abs().max() / reference.abs().max())


def judge(family: str, directory: Path) -> Verdict:
    """Make the family tiny, split it, and compare it with the model in one piece."""
    try:
        native_class(CONFIG_MAPPING[family](**_SETTINGS.get(family, {}) if _has_settings(family) else {}))
    except CheckpointError as refusal:
        return Verdict(family=family, status="refused", reason=str(refusal))
    except Exception:  # noqa: BLE001 - the default config is not valid: a tiny one may be
        pass
    try:
        local = _build(family, directory)
    except Exception as error:  # noqa: BLE001 - whatever a family does not like about its sizes
        refusal_alone = _refusal(directory)
        if refusal_alone is not None:
            return Verdict(family=family, status="refused", reason=refusal_alone)
        return Verdict(family=family, status="not tried", reason=_one_line(error))
    try:
        remote = InProcess(directory)
        found = differences(remote, local, 2)
        batch_error = max(decode_error(stage) for stage in remote.stages)
    except GeoPetalsError as refusal:
        return Verdict(family=family, status="refused", reason=str(refusal).replace(str(directory), "it"))
    except Exception as error:  # noqa: BLE001 - a family that is neither served nor refused
        return Verdict(family=family, status="WRONG", reason=_one_line(error))
    if not batch_error < MOST_ROUNDING:
        found.append(f"decode steps in a batch differ by {batch_error:.1e}")
    layouts = {stage.batching.layout for stage in remote.stages}
    batching: Layout | None = None if None in layouts else "padded" if "padded" in layouts else "rows"
    return Verdict(family=family, status="WRONG" if found else "works", reason="; ".join(found), batching=batching)


def _refusal(directory: Path) -> str | None:
    """Why a model that was saved but does not run is refused as well; None if it is not, or was not saved."""
    try:
        InProcess(directory)
    except GeoPetalsError as refusal:
        return str(refusal).replace(str(directory), "it") if (directory / "config.json").exists() else None
    return None


def _has_settings(family: str) -> bool:
    return all(name in _SIZES or _has(CONFIG_MAPPING[family], name) for name in _SETTINGS.get(family, {}))


def _build(family: str, directory: Path) -> PreTrainedModel:
    """The first config of the family that gives a tiny model that runs."""
    error: Exception = ValueError("it has no config of its own")
    for config in _fitting_configs(family, {}):
        try:
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
            if size > MOST_PARAMETERS:
                raise ValueError(f"its smallest config here has {size / 1e6:.0f} million parameters")
            local = save_tiny(directory, config)
            with torch.no_grad():
                local(prompt(2))
            return local
        except Exception as caught:  # noqa: BLE001 - whatever a family does not like about its sizes
            error = caught
    raise error


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def walk(families: Iterable[str]) -> Iterator[Verdict]:
    for family in families:
        with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings(), _quiet_transformers():
            warnings.simplefilter("ignore")
            yield judge(family, Path(directory))


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


HEADER = """# Models

Which families of causal language models GeoPETALS splits over servers, as found with Transformers {version} by
`python -m tests.families --write docs/models.md`: each family is made tiny with random weights, loaded as three block
servers (one entered and left in the middle of its blocks) and a client, and compared with the unmodified model in one
piece: hidden states and logits of a prompt in pieces, longer than any sliding window, and greedy and sampled tokens.

There is no list of families in the code. Whatever Transformers can load is tried, and refused with a reason when it is
loaded: from its config, if its layers keep anything but keys and values; then by running it, if its layers get more
than hidden states and positions, or do not compute the same in pieces and block by block as all at once.

* Models that also see or hear are refused; checkpoints of their language model alone work if its family does.
* Encoder families (BERT and its kin) work as decoders: with `is_decoder: true` in their config.
* Rotary embeddings whose angles depend on the length of the text are exact or refused: `dynamic` ones work up to the
  length the model was trained on, `longrope` ones up to the original length. A longer prompt is refused: it goes in
  pieces of at most 512 tokens, the first of which get the angles of short texts. Passes without a cache may be longer.
* With a sliding window of `w` tokens a session keeps at most `1.5 w` tokens and those of the last step.
"""


def document(verdicts: Sequence[Verdict]) -> str:
    working = [verdict.family for verdict in verdicts if verdict.status == "works"]
    lines = [HEADER.format(version=transformers.__version__)]
    lines += [f"## Works ({len(working)})", "", ", ".join(f"`{family}`" for family in working), ""]
    lines += [batching_paragraph(verdicts), ""]
    for status, title in (("refused", "Refused"), ("not tried", "Not tried: no tiny model of it runs")):
        rows = [verdict for verdict in verdicts if verdict.status == status]
        lines += [f"## {title} ({len(rows)})", "", "| family | reason |", "| --- | --- |"]
        lines += [f"| `{row.family}` | {row.reason.replace('|', '/')} |" for row in rows]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def batching_paragraph(verdicts: Sequence[Verdict]) -> str:
    def named(batching: Layout | None) -> str:
        working = [verdict for verdict in verdicts if verdict.status == "works"]
        return ", ".join(f"`{verdict.family}`" for verdict in working if verdict.batching == batching) or "none"

    return (
        "Decode steps of several sessions are one forward pass for nearly all of them. Keys and values are copied side "
        f"by side for it in: {named('padded')}. One session at a time, as a batch would not be exact: {named(None)}."
    )


def read_document(path: Path) -> tuple[str, dict[str, Status]]:
    """The version of Transformers that a document is about, and the status of each family in it."""
    text = path.read_text(encoding="utf-8")
    version = re.search(r"with Transformers (\S+) by", text)
    statuses: dict[str, Status] = {}
    status: Status = "works"
    for line in text[text.index("## ") :].splitlines():
        if line.startswith("## "):
            status = "works" if "Works" in line else "refused" if "Refused" in line else "not tried"
        elif line.startswith("`"):
            statuses |= dict.fromkeys(re.findall(r"`([^`]+)`", line), status)
        elif line.startswith("| `"):
            statuses[line.split("`")[1]] = status
    return version.group(1) if version else "", statuses


def main() -> None:
    parser = argparse.ArgumentParser(description="Which families of causal language models can be split over servers.")
    parser.add_argument("families", nargs="*", help="default: all that Transformers knows")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table as Markdown")
    args = parser.parse_args()
    verdicts = []
    for verdict in walk(args.families or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        print(f"{verdict.family:26} {verdict.status:10} {verdict.reason}", flush=True)
        verdicts.append(verdict)
    wrong = [verdict.family for verdict in verdicts if verdict.status == "WRONG"]
    if wrong:
        raise SystemExit(f"neither right nor refused: {', '.join(wrong)}")
    if args.write is not None:
        args.write.write_text(document(verdicts), encoding="utf-8")


if __name__ == "__main__":
    main()

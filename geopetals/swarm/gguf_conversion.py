"""Converts a GGUF file to safetensors, tokenizer and config: `python gguf_conversion.py GGUF DIRECTORY`.

A program of its own, because dequantizing takes 1.2 GB and starts OpenMP threads, which a process that forks later must
not have. It prints the name of each of STEPS when it starts it, and ends when its standard input ends: its parent is
gone then.
"""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

STEPS = ("importing transformers", "dequantizing the weights", "reading the tokenizer", "writing safetensors")


def convert(gguf_file: Path, directory: Path) -> None:
    """Write the model in float32, so that its weights are exactly what the quantized ones stand for."""
    print(STEPS[0], flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    print(STEPS[1], flush=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, output_loading_info=True)
    model, loading = loaded
    if loading["missing_keys"] or loading["mismatched_keys"]:
        raise ValueError(f"{gguf_file.name} lacks weights: {sorted(loading['missing_keys'])[:3]}")
    print(STEPS[2], flush=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(**source)
    tokenizer.model_max_length = model.config.max_position_embeddings
    print(STEPS[3], flush=True)
    model.hf_quantizer = None  # save_pretrained would otherwise ask for the GGUF quantizer, which cannot save
    del model.config.quantization_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    add_legacy_keys(directory / "config.json")


def add_legacy_keys(config_file: Path) -> None:
    """Add what transformers before 5 reads: it would take rope_theta = 10000 and give plausible wrong tokens."""
    config: dict[str, Any] = json.loads(config_file.read_text())
    rope = config["rope_parameters"]
    if rope["rope_type"] != "default":
        raise ValueError(f"rope type {rope['rope_type']!r} has no legacy form here")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": config["dtype"]}
    config.pop("_model_name_or_path", None)
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _leave_with_parent() -> None:
    os.read(0, 1)  # sys.stdin holds a lock that the interpreter wants back when it ends
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    convert(Path(sys.argv[1]), Path(sys.argv[2]))

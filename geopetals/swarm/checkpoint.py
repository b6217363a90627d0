"""A model's files: opened by header, hashed, and shown to from_pretrained as only those shards that are needed."""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from geopetals.errors import BlocksError, CheckpointError
from geopetals.progress import Reporter, Silent
from geopetals.swarm.architecture import MODEL_ERRORS, block_of, find_layers, native_class
from geopetals.swarm.identity import ModelIdentity
from geopetals.swarm.model_files import ModelFiles, find_model, is_full
from geopetals.swarm.shards import TensorEntry, hash_tensors, read_header, sample_tensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_NOT_ARCHITECTURE = {"transformers_version", "dtype", "torch_dtype", "use_cache", "bos_token_id", "eos_token_id",
                     "pad_token_id", "attn_implementation", "quantization_config"}  # fmt: skip


class Checkpoint:
    """One model at one revision. Opening it reads the config and the index, never weights."""

    def __init__(self, name: str, files: ModelFiles, raw_config: dict[str, Any], config: PretrainedConfig) -> None:
        self.name = name
        self.config = config
        self.revision = files.revision
        self.num_blocks = int(config.num_hidden_layers)
        self._files = files
        self._raw_config = raw_config
        self._weight_map = _read_index(files)
        self._headers: dict[str, dict[str, TensorEntry]] = {}

    @classmethod
    def open(cls, model: str, *, revision: str | None = None, reporter: Reporter = Silent()) -> "Checkpoint":  # noqa: B008
        """`model` is a directory or a name on the Hub. Raises CheckpointError if it cannot be found or split."""
        files = find_model(model, revision=revision, reporter=reporter)
        if "config.json" not in files.names:
            raise CheckpointError(f"{model} has no config.json; give a model saved with save_pretrained.")
        path = files.fetch("config.json")
        raw = _read_json(path)
        return cls(model, files, raw, _native_config(model, path, raw))

    @property
    def directory(self) -> Path:
        """Where the files are on this machine; of a model from the Hub, those that have been needed so far."""
        return self._files.fetch("config.json").parent

    def identity(self) -> ModelIdentity:
        config_hash = hashlib.sha256(json.dumps(_architecture(self._raw_config), sort_keys=True).encode()).hexdigest()
        return ModelIdentity(
            model=self._files.short_name,
            config_hash=config_hash,
            revision=self.revision,
            fingerprint=self._fingerprint(),
        )

    def block_bytes(self, dtype: torch.dtype) -> int:
        """Memory of the largest block when its floating-point weights are held in `dtype`."""
        shards = self._shards(lambda key: block_of(key) is not None)
        if any(self._files.present(shard) is None for shard in shards):
            return self._block_bytes_by_config(dtype)
        sizes = [0] * self.num_blocks
        try:
            for _, entry in self._locate(lambda key: block_of(key) is not None):
                block = block_of(entry.name)
                if block is not None and block < self.num_blocks:
                    sizes[block] += entry.elements * dtype.itemsize if entry.is_float else entry.end - entry.begin
        except CheckpointError:  # a damaged shard concerns only those who need its weights
            return self._block_bytes_by_config(dtype)
        return max(sizes)

    def block_hash(self, block: int) -> str:
        """sha256 in hex of the block's tensors as they are stored; the same however the checkpoint is sharded."""
        self.check_span(block, block + 1)
        located = list(self._locate(lambda key: block_of(key) == block))
        if not located:
            raise CheckpointError(f"the weights of {self.name} hold nothing for block {block}; download them again.")
        return hash_tensors(located)

    def check_span(self, start: int, end: int) -> None:
        """Raises BlocksError unless [start, end) is a span of this model's blocks."""
        if not 0 <= start < end <= self.num_blocks:
            raise BlocksError(
                f"blocks {start}:{end} are no span of {self.name}, which has the blocks 0:{self.num_blocks}; "
                "give START:END within them."
            )

    @contextlib.contextmanager
    def view(self, wanted: Callable[[str], bool]) -> Iterator[Path]:
        """A directory that from_pretrained can read, with only the shards that hold wanted keys; gone afterwards."""
        shards = {shard: self._files.fetch(shard).absolute() for shard in self._shards(wanted)}
        if not shards:
            raise CheckpointError(
                f"the index of {self.name} names no tensor of the blocks asked for; download it again."
            )
        with contextlib.ExitStack() as stack:
            try:
                name = stack.enter_context(tempfile.TemporaryDirectory(prefix="geopetals-view-"))
                view = self._fill_view(Path(name), shards)
            except OSError as error:
                what = "the disk is full" if is_full(error) else f"no temporary directory can be made ({error})"
                raise CheckpointError(f"{what} in {tempfile.gettempdir()}; free some space, or set TMPDIR.") from error
            yield view

    def _fill_view(self, view: Path, shards: dict[str, Path]) -> Path:
        weight_map: dict[str, str] = {}
        for number, (shard, path) in enumerate(sorted(shards.items())):
            target = f"shard-{number}.safetensors"
            (view / target).symlink_to(path)
            weight_map |= dict.fromkeys(self._header(shard), target)
        (view / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        for name in ("config.json", "generation_config.json"):
            if name in self._files.names:
                (view / name).symlink_to(self._files.fetch(name).absolute())
        return view

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer. Raises CheckpointError if there is none."""
        names = [name for name in self._files.names if _is_tokenizer_file(name)]
        if not names:
            raise CheckpointError(f"{self.name} has no tokenizer files; copy tokenizer.json beside its config.json.")
        for name in names:
            self._files.fetch(name)
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.directory, trust_remote_code=False)
        except MODEL_ERRORS as error:
            raise CheckpointError(f"the tokenizer of {self.name} cannot be read: {_one_line(error)}") from error
        return tokenizer

    def tensor(self, name: str) -> Tensor | None:
        """One tensor by its name in the checkpoint; None if there is none of that name."""
        for path, entry in self._locate(lambda key: key == name):
            with safe_open(path, framework="pt") as shard:
                tensor: Tensor = shard.get_tensor(entry.name)
                return tensor
        return None

    def _shards(self, wanted: Callable[[str], bool]) -> list[str]:
        if self._weight_map is None:
            return [SINGLE]
        return sorted({shard for key, shard in self._weight_map.items() if wanted(key)})

    def _header(self, shard: str) -> dict[str, TensorEntry]:
        if shard not in self._headers:
            self._headers[shard] = read_header(self._files.fetch(shard))
        return self._headers[shard]

    def _locate(self, wanted: Callable[[str], bool]) -> Iterator[tuple[Path, TensorEntry]]:
        for shard in self._shards(wanted):
            path = self._files.fetch(shard)
            yield from ((path, entry) for key, entry in self._header(shard).items() if wanted(key))

    def _fingerprint(self) -> str | None:
        shards = self._shards(lambda key: True)
        if any(self._files.present(shard) is None for shard in shards):
            return None
        try:
            return sample_tensors(self._locate(lambda key: True))
        except (CheckpointError, OSError, ValueError):
            return None

    def _block_bytes_by_config(self, dtype: torch.dtype) -> int:
        with torch.device("meta"):
            model = native_class(self.config)(self.config)
        _, layers = find_layers(model.base_model, self.num_blocks)
        return max(sum(p.numel() for p in layer.parameters()) for layer in layers) * dtype.itemsize


def _architecture(value: Any) -> Any:
    """A config without what does not change the computation, or differs from release to release of Transformers."""
    if not isinstance(value, dict):
        return value
    kept = {key: item for key, item in value.items() if key not in _NOT_ARCHITECTURE and not key.startswith("_")}
    return {key: _architecture(item) for key, item in kept.items() if item is not None}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON; download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object; download it again.")
    return value


def _read_index(files: ModelFiles) -> dict[str, str] | None:
    """Tensor -> shard; None for a single file. Raises CheckpointError if there are no safetensors."""
    if INDEX in files.names:
        path = files.fetch(INDEX)
        weight_map = _read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(_is_file_name(shard) for shard in weight_map.values()):
            raise CheckpointError(f"{path} has no valid weight_map; download it again.")
        return weight_map
    if SINGLE in files.names:
        return None
    pickles = [name for name in files.names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        raise CheckpointError(
            f"{files.short_name} has only pickled weights ({min(pickles)}), which can run code when they are loaded; "
            "where you trust them, load them with Transformers and write safetensors with save_pretrained."
        )
    raise CheckpointError(f"{files.short_name} has no weights ({SINGLE} or {INDEX}); download the model again.")


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value.endswith(".safetensors") and Path(value).name == value


def _is_tokenizer_file(name: str) -> bool:
    stems = ("tokenizer", "special_tokens_map", "added_tokens", "vocab.", "merges.", "spiece", "chat_template")
    return name.startswith(stems) and not name.endswith((".py", ".safetensors"))


def _native_config(model: str, path: Path, raw: dict[str, Any]) -> PretrainedConfig:
    """The config as a class of Transformers itself. Raises CheckpointError for what cannot be split."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    except MODEL_ERRORS as error:
        if "auto_map" in raw:
            message = f"{model} needs code of its own (auto_map), which is never run; use a model Transformers knows."
            raise CheckpointError(message) from error
        raise CheckpointError(f"the config.json of {model} is not understood: {_one_line(error)}") from error
    native_class(config)
    return config


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

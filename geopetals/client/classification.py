"""`AutoDistributedModelForSequenceClassification`: a classifier whose blocks run in a swarm.

Transformers' own class for the family, put together from the base model of the language model and a new head.
"""

import os
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from geopetals.client.model import DistributedModel, connect_model
from geopetals.client.opening import open_hollow_model
from geopetals.client.ptune import add_prompts, check_tuning
from geopetals.errors import CheckpointError, UnsupportedInput
from geopetals.join_token import JoinToken
from geopetals.progress import Reporter
from geopetals.swarm.checkpoint import Checkpoint


class AutoDistributedModelForSequenceClassification:
    """Opens a model that gives each sequence a label: its head and embeddings are here, its blocks in a swarm."""

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        num_labels: int | None = None,
        problem_type: str | None = None,
        join: str | JoinToken | None = None,
        initial_peers: Sequence[str] = (),
        dht_prefix: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype | str = torch.float32,
        device: str = "cpu",
        tuning_mode: str | None = None,
        pre_seq_len: int = 0,
        reporter: Reporter | None = None,
        **options: Any,
    ) -> "DistributedClassifier":
        """As for AutoDistributedModelForCausalLM; `num_labels` and `problem_type` as in Transformers (default: what
        the model's config says, which is two labels for a language model).

        The head is the checkpoint's, or else initialised at random; it is trainable, and so are the prompts of
        `tuning_mode`; the rest is frozen. The label is read off the last token that is not `config.pad_token_id`.
        Raises GeoPetalsError.
        """
        check_tuning(tuning_mode, pre_seq_len)
        opened = open_hollow_model(
            model,
            join=join,
            initial_peers=initial_peers,
            dht_prefix=dht_prefix,
            revision=revision,
            dtype=dtype,
            device=device,
            reporter=reporter,
            options=options,
        )
        try:
            classifier = with_classifier_head(opened.model, num_labels=num_labels, problem_type=problem_type)
            load_trained_head(classifier, opened.checkpoint)
        except BaseException:
            opened.swarm.close()
            raise
        add_prompts(classifier, tuning_mode, pre_seq_len)
        return connect_model(classifier, opened.swarm, opened.stack, DistributedClassifier)


class DistributedClassifier(DistributedModel):
    """What `from_pretrained` returns: the family's *ForSequenceClassification with the methods of DistributedModel."""

    def generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedInput("a classifier does not generate text: open it with AutoDistributedModelForCausalLM.")


def with_classifier_head(
    language_model: PreTrainedModel, *, num_labels: int | None = None, problem_type: str | None = None
) -> PreTrainedModel:
    """The family's *ForSequenceClassification around the base model of `language_model`, with a new head."""
    config: Any = language_model.config
    cls: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if cls is None:
        raise CheckpointError(f"Transformers has no sequence classifier for {config.model_type}: use another model.")
    if num_labels is not None:
        config.num_labels = num_labels
    config.problem_type = problem_type or getattr(config, "problem_type", None)
    with torch.device("meta"):
        classifier: PreTrainedModel = cls(config)
    setattr(classifier, classifier.base_model_prefix, language_model.base_model)
    for module in classifier.modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            _initialise(module, config, language_model)
    classifier.eval()
    return classifier


def load_trained_head(classifier: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Take over the head of a checkpoint that has one. Raises CheckpointError if it is for other labels."""
    for name, parameter in classifier.named_parameters():
        if name.startswith(f"{classifier.base_model_prefix}."):
            continue
        trained = checkpoint.tensor(name)
        if trained is None:
            continue
        if trained.shape != parameter.shape:
            raise CheckpointError(
                f"{name} of {checkpoint.name} is {list(trained.shape)}: pass num_labels={trained.shape[0]}."
            )
        with torch.no_grad():
            parameter.copy_(trained)


def _initialise(module: nn.Module, config: Any, language_model: PreTrainedModel) -> None:
    if not isinstance(module, nn.Linear):
        name = type(module).__name__
        raise CheckpointError(f"the classifier of {config.model_type} has a {name}, which is not known here.")
    module.to_empty(device=language_model.device).to(language_model.dtype)
    nn.init.normal_(module.weight, std=float(getattr(config, "initializer_range", 0.02)))
    if module.bias is not None:
        nn.init.zeros_(module.bias)

"""What a model does: go on with a text, answer one with another, or choose a class for it."""

from typing import Any

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from qlora_lab.config.schema import CAUSAL, CLASSIFICATION, SEQ2SEQ
from qlora_lab.errors import ModelError
from qlora_lab.models.architecture import tied_embeddings

AUTO_CLASSES: dict[str, Any] = {
    CAUSAL: AutoModelForCausalLM,
    SEQ2SEQ: AutoModelForSeq2SeqLM,
    CLASSIFICATION: AutoModelForSequenceClassification,
}


def task_of(model: PreTrainedModel) -> str:
    """Return the task that a loaded model does."""
    if model.get_output_embeddings() is None:
        return CLASSIFICATION
    return SEQ2SEQ if model.config.is_encoder_decoder else CAUSAL


def class_names(config: PreTrainedConfig) -> list[str]:
    """Return the names of a classifier's classes, in their order."""
    names: dict[Any, str] = config.id2label or {}
    return [names[number] for number in sorted(names)]


def name_classes(config: PreTrainedConfig, labels: list[str]) -> None:
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}


def check_own_head(model: PreTrainedModel, name: str) -> None:
    """Make sure that an encoder-decoder whose head is apart from its embeddings has kept it.

    transformers 5 ties the head of every T5 that does not bring two different matrices.

    Raises:
        ModelError: the head was not in the checkpoint.
    """
    if task_of(model) != SEQ2SEQ or tied_embeddings(model.config):
        return
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        raise ModelError(
            f"{name} lacks lm_head.weight, though its config says that the head is not tied to the embeddings; "
            "copy or download it again"
        )
    model.config.tie_word_embeddings = False  # or whatever ties weights next would undo it


def give_own_head(model: PreTrainedModel) -> None:
    """Draw a head of its own for an encoder-decoder with random weights that transformers has tied."""
    if task_of(model) != SEQ2SEQ or tied_embeddings(model.config):
        return
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.new_empty(head.weight.shape).normal_(std=head.weight.shape[1] ** -0.5))
    model.all_tied_weights_keys.pop("lm_head.weight", None)
    model.config.tie_word_embeddings = False

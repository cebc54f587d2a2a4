"""Rows that hold several sequences: what a model is given so that none sees another.

Since transformers 5 a causal model that gets positions and no mask takes every place where they do not go on by 1 for
the beginning of another sequence, and masks accordingly, sliding windows included. OPT reads positions, but makes its
mask without them, so it gets the mask too. Models that place tokens by a bias of the scores (ALiBi: BLOOM, MPT) read no
positions and are refused.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from qlora_lab.config.schema import CAUSAL
from qlora_lab.errors import ModelError
from qlora_lab.models.tasks import task_of

MASK_WITHOUT_POSITIONS = ("opt",)  # model types whose mask does not follow the positions
WITHOUT_POSITIONS = ("bloom", "mpt")
CHECKED_LENGTHS = (5, 3, 7)  # of the sequences that `check_packing` lays apart and in one row
TOLERANCE = 0.02  # of the largest hidden state: bfloat16 carries 8 bits, a sequence that leaks changes far more


def packed_inputs(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> dict[str, Any]:
    """Return the arguments of a decoder for packed rows.

    Args:
        input_ids, position_ids: (rows, tokens) int64, as `data.packing.collate_packed` gives them.
    """
    mask = None
    if model.config.model_type in MASK_WITHOUT_POSITIONS:
        like_embeddings = torch.empty((*input_ids.shape, 0), dtype=model.dtype, device=input_ids.device)
        mask = create_causal_mask(
            model.config, like_embeddings, attention_mask=None, past_key_values=None, position_ids=position_ids
        )
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Make sure that sequences in one row come out as they do in rows of their own.

    Raises:
        ModelError: the model cannot tell them apart, or is no causal one.
    """
    name = type(model).__name__
    if task_of(model) != CAUSAL:
        raise ModelError(f"data.packing needs a causal language model; got {name}; set data.packing=false")
    if model.config.model_type in WITHOUT_POSITIONS:
        raise ModelError(
            f"data.packing=true cannot be right for {name}: it places tokens by a bias of the attention scores and "
            "reads no positions, so packed rows would see each other; set data.packing=false"
        )
    generator = torch.Generator().manual_seed(0)
    most = model.config.get_text_config().vocab_size
    apart = [torch.randint(most, (length,), generator=generator).to(model.device) for length in CHECKED_LENGTHS]
    positions = torch.cat([torch.arange(length, device=model.device) for length in CHECKED_LENGTHS])
    body = model.get_decoder()
    expected = torch.cat([body(input_ids=ids[None], use_cache=False).last_hidden_state[0] for ids in apart])
    inputs = packed_inputs(model, torch.cat(apart)[None], positions[None])
    difference = (body(**inputs, use_cache=False).last_hidden_state[0] - expected).abs().max().item()
    if difference > TOLERANCE * expected.abs().max().item():  # not so where both are NaN, as in check_output_head
        raise ModelError(
            f"data.packing=true cannot be right for {name}: rows that are packed see each other (hidden states differ "
            f"by {difference:.3g}); set data.packing=false"
        )

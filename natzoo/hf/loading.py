"""Load state dicts with Hugging Face's names into the modules of natzoo.hf.modeling.

transformers converts names in `from_pretrained`, but its Trainer and other code call `load_state_dict` with the content
of a saved file.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from natzoo.checkpoints.keys import BLOCK, HF_SCALES, QKV

_OURS = {theirs: ours for ours, theirs in BLOCK.items()}


def rename_hub_weights(state_dict: dict[str, Any], prefix: str) -> None:
    """Rename the weights of a Nat or Dinat in a state dict in place; names that are not Hugging Face's are kept.

    Args:
        state_dict: the weights of the module, or of a larger one that holds it.
        prefix: where the names of the module begin, as in `torch.nn.Module._load_from_state_dict`.
    """
    for name in [name for name in state_dict if name.startswith(prefix)]:
        if name in state_dict:  # a weight may be merged with another one
            _rename(state_dict, name)


def _rename(state_dict: dict[str, Any], name: str) -> None:
    block = re.fullmatch(r"(.*encoder\.levels\.\d+\.)layers(\.\d+\.)(.+)", name)
    if block is None:
        ours = name.replace("embeddings.patch_embeddings.projection", "embeddings.proj")
        state_dict[ours] = state_dict.pop(name)
        return
    start, rest = f"{block[1]}blocks{block[2]}", block[3]
    part, kind = rest.rpartition(".")[::2]
    if rest == HF_SCALES:
        scales = state_dict[name]
        if isinstance(scales, Tensor) and scales.dim() == 2 and len(scales) == 2:
            del state_dict[name]
            state_dict[f"{start}gamma1"], state_dict[f"{start}gamma2"] = scales.unbind()
    elif part.removeprefix("attention.self.") in QKV:
        parts = [f"{block[1]}layers{block[2]}attention.self.{name}.{kind}" for name in QKV]
        if all(name in state_dict for name in parts):
            state_dict[f"{start}attn.qkv.{kind}"] = torch.cat([state_dict.pop(name) for name in parts])
    else:
        known = next((theirs for theirs in _OURS if rest == theirs or rest.startswith(f"{theirs}.")), None)
        if known is not None:
            state_dict[start + _OURS[known] + rest.removeprefix(known)] = state_dict.pop(name)

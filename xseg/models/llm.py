"""The language model: any causal LM of transformers, fed with rows instead of ids, read after its final norm."""

from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig


def build_llm(config: PreTrainedConfig) -> nn.Module:
    """Random weights in the shape of ``config``; attention through sdpa unless the config says otherwise."""
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


def hidden_states(llm: Any, rows: Tensor, mask: Tensor, *, places: Tensor | None = None, cache: Any = None) -> Tensor:
    """Rows (B, n, D) with mask (B, seen + n) bool -> states (B, n, D) after the final norm.

    ``cache`` is filled in place. ``places`` (B, n) are needed with a cache: rows of a padded batch differ.
    """
    decoder = llm.get_decoder()
    out = decoder(
        inputs_embeds=rows,
        attention_mask=mask.long(),
        position_ids=places,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return out.last_hidden_state  # type: ignore[no-any-return]

"""The language model: any causal LM of transformers, fed with rows instead of ids, read after its final norm."""

from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig


def build_llm(config: PreTrainedConfig) -> nn.Module:
    """Random weights in the shape of ``config``; attention through sdpa unless the config says otherwise."""
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


def hidden_states(
    llm: Any, rows: Tensor, *, mask: Tensor | None = None, places: Tensor | None = None, cache: Any = None
) -> Tensor:
    """Rows (B, n, D) -> states (B, n, D) after the final norm; what stands behind a sample's last row is no matter.

    ``cache`` is filled in place. With it go ``mask`` (B, seen + n) bool, True on rows, and, once it holds something,
    ``places`` (B, n): padding then lies before rows. Else it lies behind all of them, where causal attention does not
    look, and kernels that need no mask do half the work.
    """
    decoder = llm.get_decoder()
    out = decoder(
        inputs_embeds=rows,
        attention_mask=None if mask is None else mask.long(),
        position_ids=places,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return out.last_hidden_state  # type: ignore[no-any-return]

"""The special tokens of xseg and how they are found in a row of ids (X-SAM spec: paper section 3.2).

``<SEG>``, ``<p>`` and ``</p>`` are one vocabulary id each. ``<image>`` and ``<region>`` are sentinels: they are cut
out of the text before tokenising, stand as negative ids, and are replaced by feature rows; they never enter the
vocabulary.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from xseg.errors import UserError

SEG, P_OPEN, P_CLOSE = "<SEG>", "<p>", "</p>"
SPECIAL_TOKENS = (SEG, P_OPEN, P_CLOSE)
IMAGE, REGION = "<image>", "<region>"
SENTINELS = {IMAGE: -200, REGION: -300}
IGNORE_LABEL = -100
SENTINEL_PATTERN = re.compile("(" + "|".join(map(re.escape, SENTINELS)) + ")")


@dataclass(frozen=True)
class SpecialIds:
    """Vocabulary ids of the special tokens in one tokenizer."""

    seg: int
    p_open: int
    p_close: int


def add_special_tokens(tokenizer: Any) -> SpecialIds:
    """Add the special tokens where missing and return their ids."""
    missing = [t for t in SPECIAL_TOKENS if t not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    return special_ids(tokenizer)


def special_ids(tokenizer: Any) -> SpecialIds:
    """Look the ids up by ``convert_tokens_to_ids`` (never by encoding, which may yield a leading space piece).

    Raises UserError when a token is missing or does not survive encoding as exactly one id.
    """
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    for token, token_id in zip(SPECIAL_TOKENS, ids, strict=True):
        if token_id is None or token_id == tokenizer.unk_token_id:
            raise UserError(
                f"tokenizer has no id for {token}: every xseg tokenizer holds {', '.join(SPECIAL_TOKENS)} as one id "
                f"each; add them with xseg.tokens.add_special_tokens ({getattr(tokenizer, 'name_or_path', '?')})"
            )
        if token_id not in tokenizer.encode(f"a{token}b", add_special_tokens=False):
            raise UserError(f"tokenizer splits {token} into pieces: it must be a special token of one id")
    return SpecialIds(*ids)


def find_spans(input_ids: np.ndarray, special: SpecialIds) -> np.ndarray:
    """Return the (n, 2) half-open spans from the i-th ``<p>`` to the i-th ``</p>``, markers inside.

    Raises UserError when markers do not pair up in order.
    """
    starts = np.flatnonzero(input_ids == special.p_open)
    ends = np.flatnonzero(input_ids == special.p_close)
    if len(starts) != len(ends) or (starts >= ends).any() or (starts[1:] < ends[:-1]).any():
        raise UserError(f"{len(starts)} <p> and {len(ends)} </p> do not pair up: every <p> needs one </p> after it")
    return np.stack([starts, ends + 1], axis=1).astype(np.int64).reshape(-1, 2)

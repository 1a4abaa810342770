"""What an object query is: a linear layer over fixed labels, or the cosine to concept vectors (X-SAM section 3.3)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xseg.models.configuration import SegmentorConfig

START_TEMPERATURE = 1 / 0.07


class LabelHead(nn.Module):
    """A linear layer over ``num_labels`` classes and background (stage 1)."""

    def __init__(self, config: SegmentorConfig) -> None:
        super().__init__()
        self.predictor = nn.Linear(config.width, config.num_labels + 1)

    def forward(self, queries: Tensor, concepts: Tensor | None, real: Tensor | None) -> Tensor:
        """(L, Q, N, D) normed queries -> (L, Q, N, labels + 1) float32; the other arguments are not read."""
        return self.predictor(queries).float()


class ConceptHead(nn.Module):
    """``exp(logit_scale) * cos(query, concept)``, clamped; padding gets ``pad_logit``."""

    def __init__(self, config: SegmentorConfig) -> None:
        super().__init__()
        self.clamp, self.pad = config.logit_clamp, config.pad_logit
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(START_TEMPERATURE)))

    def forward(self, queries: Tensor, concepts: Tensor, real: Tensor) -> Tensor:
        """Normed queries (L, Q, N, D), concepts (Q, K + 1, D), real (Q, K + 1) -> (L, Q, N, K + 1) float32."""
        with torch.autocast(queries.device.type, enabled=False):
            cosine = F.normalize(queries.float(), dim=-1) @ F.normalize(concepts.float(), dim=-1).transpose(-1, -2)
            logits = (self.logit_scale.float().exp() * cosine).clamp(-self.clamp, self.clamp)
        return logits.masked_fill(~real[:, None], self.pad)

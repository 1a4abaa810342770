"""SAM encoder, connector, pixel decoder, mask decoder and class head: what stage 1 trains."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from xseg.errors import UserError
from xseg.models.class_head import ConceptHead, LabelHead
from xseg.models.configuration import SamConfig, SegmentorConfig
from xseg.models.connector import SINGLE, Connector, SingleScale
from xseg.models.mask_decoder import Groups, MaskDecoder
from xseg.models.pixel_decoder import DeformablePixelDecoder, FpnPixelDecoder
from xseg.models.sam import SamEncoder
from xseg.models.two_way_decoder import Neck, TwoWayMaskDecoder

PIXEL_DECODERS = {"deformable": DeformablePixelDecoder, "fpn": FpnPixelDecoder}
MASK_DECODERS: dict[str, Any] = {"mask2former": MaskDecoder, "sam": TwoWayMaskDecoder}
CONNECTORS = ("multiscale", *SINGLE)
HEADS = {"concepts": ConceptHead, "labels": LabelHead}


class Segmentor(nn.Module):
    """``config=None`` builds the SAM encoder alone (stage 2)."""

    def __init__(self, sam: SamConfig, config: SegmentorConfig | None) -> None:
        super().__init__()
        self.sam = SamEncoder(sam)
        self.config = config
        self.layers: list[int] = []
        if config is None:
            return
        check(config)
        depth = sam.num_hidden_layers
        self.layers = config.connector_layers or [depth // 2, depth * 3 // 4, depth]
        one_map = config.mask_decoder == "sam"
        scales = [1.0] if one_map else config.connector_scales
        if config.connector == "multiscale":
            self.connector: Any = Connector(sam.hidden_size, config.connector_width, scales)
        else:
            self.layers = self.layers[-1:]
            self.connector = SingleScale(sam.hidden_size, config.connector_width, scales, config.connector)
        pixel_decoder: Any = Neck if one_map else PIXEL_DECODERS[config.pixel_decoder]
        self.pixel_decoder = pixel_decoder(config, self.connector.channels)
        self.mask_decoder = MASK_DECODERS[config.mask_decoder](config)
        self.class_head = HEADS[config.head](config)
        if config.pixel_classifier:
            self.pixel_classifier = nn.Conv2d(config.width, config.num_labels + 1, 1)

    def maps(self, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """SAM hidden states of ``layers`` -> mask features (I, D, h, w), maps for the mask decoder."""
        return self.pixel_decoder(self.connector(states))  # type: ignore[no-any-return]

    def decode(
        self, maps: tuple[Tensor, list[Tensor]], seg: Tensor | None, concepts: Any, real: Any, groups: Groups
    ) -> tuple[Tensor, Tensor]:
        """Q queries with ``<SEG>`` (Q, D) and concepts (Q, K + 1, D), of which ``real`` (Q, K + 1) count.

        The linear head reads no concepts: they are None with it.

        Returns mask logits (L, Q, N, h, w) and class logits (L, Q, N, K + 1), float32.
        """
        states, masks = self.mask_decoder(maps[0], maps[1], seg, groups)
        return masks, self.class_head(states, concepts, real)


def check(config: SegmentorConfig) -> None:
    """Raises UserError for a choice that does not exist, and for two that exclude each other."""
    choices = {
        "connector": CONNECTORS, "pixel_decoder": PIXEL_DECODERS, "mask_decoder": MASK_DECODERS, "head": HEADS
    }  # fmt: skip
    for field, known in choices.items():
        if getattr(config, field) not in known:
            raise UserError(f"segmentor.{field} = {getattr(config, field)!r}: write one of {', '.join(known)}")
    if config.mask_decoder == "sam" and config.connector == "multiscale":
        raise UserError(
            "segmentor.mask_decoder = 'sam' reads one map, and segmentor.connector = 'multiscale' makes several: set "
            f"segmentor.connector to one of {', '.join(SINGLE)}"
        )

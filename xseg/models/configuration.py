"""Sizes and choices of a model, in transformers' form: one XSegConfig with a sub-config for each part that is built."""

from collections.abc import Callable
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, SamVisionConfig, SiglipVisionConfig

from xseg.errors import UserError, did_you_mean

ENCODERS = ("siglip", "sam")
"""Image encoders that the language model can read, in the order of their rows."""
ROW_ORDERS = ("concatenated", "interleaved")


STEMS = {"patch": None, "residual": (8, 16)}
"""What cuts a picture into patches: one convolution, as SAM's and SigLIP's, or several (``ResidualStem``), for models
from scratch; and the patch sizes that it can make."""


class SamConfig(SamVisionConfig):
    """SAM's image encoder. ``stem``: see ``STEMS``."""

    model_type = "xseg_sam"
    base_config_key = "sam_config"

    stem: str = "patch"
    # The library's own default (1e-10) is for loading only: a model trained from scratch would start at zero.
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _check_stem("sam", self)


class SiglipConfig(SiglipVisionConfig):
    """SigLIP's image encoder. ``stem``: see ``STEMS``."""

    model_type = "xseg_siglip"
    base_config_key = "siglip_config"

    stem: str = "patch"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _check_stem("siglip", self)


def _check_stem(part: str, config: Any) -> None:
    if config.stem not in STEMS:
        raise UserError(f"{part}.stem = {config.stem!r}: write {' or '.join(map(repr, STEMS))}")
    sizes = STEMS[config.stem]
    if sizes and config.patch_size not in sizes:
        known = " or ".join(map(str, sizes))
        raise UserError(f"{part}.stem = {config.stem!r} needs {part}.patch_size = {known}, not {config.patch_size}")


class SegmentorConfig(PreTrainedConfig):
    """Connector, pixel decoder, mask decoder and class head (X-SAM sections 3.2 and 3.3)."""

    model_type = "xseg_segmentor"
    base_config_key = "segmentor_config"

    width: int = 256
    """Channels of pixel decoder, mask features, queries and concept vectors."""
    connector_layers: list[int] | None = None
    """SAM hidden states that are read, one per level (0 = patch embedding); None = at a half, three quarters, end."""
    connector_scales: Any = None
    """Size of each level relative to SAM's grid, high resolution first; None = 2, 1, 0.5."""
    connector_width: int = 512
    connector: str = "multiscale"
    """"multiscale" (convolutions and a pixel shuffle on every level), or, from the last of the layers alone and resized
    plainly: "conv" (the same convolutions once), "linear" (one 1x1 projection), "none" (SAM's hidden state itself)."""
    pixel_decoder: str = "deformable"
    """"deformable" (Mask2Former) or "fpn" (top-down convolutions, for small models on CPU)."""
    mask_decoder: str = "mask2former"
    """"mask2former" (masked attention over three maps) or "sam" (two-way attention on one map at SAM's grid, which
    SAM's neck makes in place of the pixel decoder; needs a connector other than "multiscale")."""
    pixel_layers: int = 6
    pixel_ffn: int = 1024
    num_queries: int = 200
    decoder_layers: int = 9
    heads: int = 8
    ffn: int = 2048
    seg_gain: float = 1.0
    """Factor on the ``<SEG>`` vector before it is added to the object queries; X-SAM has none. Learnt queries are a few
    times as long as the vectors of a new projector, which a small decoder then takes long to hear."""
    head: str = "concepts"
    """"concepts" (cosine to concept vectors and a background vector) or "labels" (linear, stage 1)."""
    num_labels: int = 0
    """Classes of the linear head and of the pixel classifier, background not counted."""
    logit_clamp: float = 500.0
    """Class logits are clamped to plus and minus this."""
    pad_logit: float = -1e9
    """Class logit of a column that is padding."""
    pixel_classifier: bool = False
    """A 1x1 convolution on the mask features that names every pixel, for the dense class loss."""

    def __post_init__(self, **kwargs: Any) -> None:
        self.connector_scales = self.connector_scales or [2.0, 1.0, 0.5]
        if self.width % self.heads:
            raise UserError(f"segmentor: width = {self.width} must be a multiple of heads = {self.heads}")
        # The base class derives ``num_labels`` from a label table; here it is a plain number.
        kwargs["num_labels"] = self.num_labels
        super().__post_init__(**kwargs)


class XSegConfig(PreTrainedConfig):
    """A whole model. A sub-config that is None means that the part is not built."""

    model_type = "xseg"
    sub_configs = {  # noqa: RUF012 (transformers declares it so)
        "sam_config": SamConfig,
        "siglip_config": SiglipConfig,
        "text_config": AutoConfig,
        "segmentor_config": SegmentorConfig,
    }

    # Dicts are turned into configs below; the base class would check a narrower annotation before that.
    sam_config: Any = None
    siglip_config: Any = None
    text_config: Any = None
    segmentor_config: Any = None
    llm_sees: Any = None
    """Image encoders whose rows the language model reads; None = both, ["siglip", "sam"], as far as they are built."""
    llm_rows: str = "concatenated"
    """"concatenated" (SigLIP's rows, then SAM's: X-SAM) or "interleaved" (both rows of a square together; grids must
    agree). A small language model pairs neighbours long before it pairs rows that stand far apart."""
    llm_normed_rows: bool = False
    """Normalise the encoders' rows before their projectors; X-SAM does not. Hidden states from before a last norm
    may be 20 times as long as words; a projector that learns from few pictures then spends them on the size."""
    sam_layer: int = -2
    """SAM hidden state that the language model reads."""
    siglip_layer: int = -2
    """SigLIP hidden state that the language model reads."""
    sam_shuffle: int = 2
    """Side of the block of SAM cells that become one row of the language model."""
    region_points: int = 256
    """Points sampled inside a visual prompt."""
    region_encoder: str = "sam"
    """Image encoder whose rows a visual prompt is read from: "sam" (X-SAM) or "siglip". A SAM that knows no classes may
    tell neither colours nor where a cell lies, and then no prompt that is read from it does."""
    region_rows: int = 1
    """Rows of the language model for a visual prompt: 1 = the maximum over its points (the paper and the published
    weights), more = means of ``region_points / region_rows`` points each (64 on X-SAM's branch main)."""
    seg_token_id: int = -1
    p_open_token_id: int = -1
    p_close_token_id: int = -1

    def __post_init__(self, **kwargs: Any) -> None:
        self.sam_config = _sub(SamConfig, self.sam_config)
        self.siglip_config = _sub(SiglipConfig, self.siglip_config)
        self.segmentor_config = _sub(SegmentorConfig, self.segmentor_config)
        self.llm_sees = list(ENCODERS) if self.llm_sees is None else list(self.llm_sees)
        for name in self.llm_sees:
            if name not in ENCODERS:
                raise UserError(f"llm_sees: {name!r} is no image encoder{did_you_mean(name, ENCODERS)}")
        if isinstance(self.text_config, dict):
            kind = self.text_config.get("model_type", "phi3")
            if kind not in CONFIG_MAPPING:
                raise UserError(f"llm.model_type = {kind!r}: transformers has none{did_you_mean(kind, CONFIG_MAPPING)}")
            given = {"model_type": kind, **self.text_config}
            self.text_config = _made("llm", lambda: AutoConfig.for_model(**given))
        super().__post_init__(**kwargs)
        self._check_rows()

    def _check_rows(self) -> None:
        if self.region_encoder not in ENCODERS:
            hint = did_you_mean(self.region_encoder, ENCODERS)
            raise UserError(f"region_encoder: {self.region_encoder!r} is no image encoder{hint}")
        if self.region_rows < 1 or self.region_points % self.region_rows:
            raise UserError(
                f"region_rows = {self.region_rows}: the {self.region_points} points of a prompt must divide into as "
                "many rows: write a divisor of it, such as 1 (the paper) or 64 (branch main)"
            )
        if self.llm_rows not in ROW_ORDERS:
            raise UserError(f"llm_rows = {self.llm_rows!r}: write one of {', '.join(ROW_ORDERS)}")
        if self.llm_rows == "interleaved" and self.sees("siglip") and self.sees("sam"):
            sides = [c.image_size // c.patch_size for c in (self.siglip_config, self.sam_config)]
            if sides[0] * self.sam_shuffle != sides[1]:
                raise UserError(
                    f"llm_rows = 'interleaved': SigLIP has {sides[0]} rows a side, SAM's grid of {sides[1]} gives "
                    f"{sides[1] // self.sam_shuffle}; make both equal, or write 'concatenated'"
                )

    def sees(self, encoder: str) -> bool:
        """Whether the language model reads rows of ``encoder`` ("siglip" or "sam")."""
        built = self.siglip_config if encoder == "siglip" else self.sam_config
        return built is not None and self.text_config is not None and encoder in self.llm_sees

    @property
    def width(self) -> int:
        """Columns of a row of the language model."""
        return int(self.text_config.hidden_size)


def _sub(kind: type[PreTrainedConfig], value: dict | PreTrainedConfig | None) -> PreTrainedConfig | None:
    if not isinstance(value, dict):
        return value
    known = set(kind().to_dict()) | {"model_type", "attn_implementation"}
    for key in value:
        # Private and library-wide keys come with every saved config.
        if key not in known and not key.startswith("_"):
            raise UserError(f"{kind.base_config_key}: unknown key '{key}'{did_you_mean(key, known)}")
    return _made(kind.base_config_key, lambda: kind(**value))


def _made(part: str, make: Callable[[], PreTrainedConfig]) -> PreTrainedConfig:
    """A configuration whose values transformers accepts; what it says of a wrong one is one message."""
    try:
        return make()
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UserError(f"{part}: {' '.join(str(error).split())}; correct it in the model recipe") from error

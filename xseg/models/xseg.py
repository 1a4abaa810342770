"""The composite model."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from xseg.errors import UserError
from xseg.models import generation, llm, touch
from xseg.models.configuration import XSegConfig
from xseg.models.features import ImageFeatures
from xseg.models.initialise import initialise
from xseg.models.mask_decoder import Groups
from xseg.models.projector import Projector, unshuffle
from xseg.models.region_sampler import sample_regions
from xseg.models.segmentor import Segmentor
from xseg.models.siglip import SiglipEncoder
from xseg.models.splice import Layout
from xseg.types import Batch, ModelOutput


class XSegModel(PreTrainedModel):
    """Text and images in, text and masks out (X-SAM section 3).

    Steps of ``forward``:

    1. ``encode_images``: SigLIP and SAM once per image; projectors make rows for the language model; connector and
       pixel decoder make maps, if anything is asked.
    2. ``read``: image and region rows take the places of their sentinels; the language model reads everything.
    3. ``segment``: states at ``<SEG>`` and at spans are projected; the mask decoder and the class head answer all
       queries of all images together.
    4. Language logits, only where a label is.
    5. In training, parts that a batch does not use run on something tiny at their place in this order, and ``touch``, a
       zero, keeps their gradients alive.
    """

    config_class = XSegConfig
    base_model_prefix = "xseg"
    main_input_name = "batch"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _no_split_modules = ["SamVisionLayer", "SiglipEncoderLayer", "DecoderLayer"]  # noqa: RUF012

    config: XSegConfig
    segmentor: Segmentor
    llm: Any
    seg_share: float = 1.0
    """Factor on ``<SEG>`` vectors: less than 1 only while a stage's ``seg_warmup`` lasts, and never saved."""

    def __init__(self, config: XSegConfig) -> None:
        super().__init__(config)
        if config.sam_config is not None:
            self.segmentor = Segmentor(config.sam_config, config.segmentor_config)
        if config.siglip_config is not None:
            self.siglip = SiglipEncoder(config.siglip_config, config.siglip_layer)
        if config.text_config is not None:
            self.llm = llm.build_llm(config.text_config)
            if config.sees("siglip"):
                self.siglip_projector = Projector(
                    config.siglip_config.hidden_size, config.width, config.llm_normed_rows
                )
            if config.sees("sam"):
                cell = config.sam_config.hidden_size * config.sam_shuffle**2
                self.sam_projector = Projector(cell, config.width, config.llm_normed_rows)
        decoder = config.segmentor_config
        if decoder is not None and decoder.head == "concepts":
            self.background = nn.Parameter(torch.zeros(1, decoder.width))
            if config.text_config is not None:
                self.llm_projector = Projector(config.width, decoder.width)
        self.post_init()
        self.freeze_unread()

    def freeze_unread(self) -> None:
        """Freeze what exists only so that files of the encoders load whole. ``from_pretrained`` forgets it."""
        config = self.config
        if hasattr(self, "siglip"):
            self.siglip.freeze_unread()
        if hasattr(self, "segmentor"):
            sam = self.segmentor.sam
            last = [config.sam_layer % (len(sam.layers) + 1)] if config.sees("sam") else []
            sam.freeze_unread(max([*self.segmentor.layers, *last], default=0))
        read = {"siglip": config.sees("siglip"), "segmentor": config.sees("sam") or config.segmentor_config}
        for part in (p for p in read if hasattr(self, "llm") and hasattr(self, p) and not read[p]):
            getattr(self, part).requires_grad_(False)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For classes outside of transformers the library passes over modules without parameters of their own.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        initialise(module)
        if module is self and hasattr(self, "background"):
            init.normal_(self.background)

    def forward(self, batch: Batch) -> ModelOutput:
        """Answer a batch; any part may be missing: text, images, queries."""
        text, masks = batch.input_ids.shape[1] > 0, batch.max_queries > 0
        pixels = batch.llm_pixels, batch.mask_pixels
        features = self.encode_images(*pixels, text=text, masks=masks, spare=self.training)
        layout, hidden = self.read(batch, features) if text else (None, None)
        if self.training and not text and hasattr(self, "llm"):
            hidden = touch.words(self)
        output = self.segment(batch, features, layout, hidden)
        return touch.touched(self, output, features, hidden) if self.training else output

    def encode_images(
        self, llm_pixels: Tensor, mask_pixels: Tensor, *, text: bool = True, masks: bool = True, spare: bool = False
    ) -> ImageFeatures:
        """(I, 3, s, s) and (I, 3, S, S) pixels -> features; ``text`` and ``masks`` say what they are for.

        ``spare``: what they are not for is made too, of a corner of one picture (``touch``).
        """
        rows, cells, maps = [], None, None
        if len(mask_pixels) == 0 and spare:
            llm_pixels, mask_pixels = touch.black(self)
        if len(mask_pixels) == 0 or not (text or masks or spare):
            return ImageFeatures(None, None, None)
        reads, segments = (text or spare) and hasattr(self, "llm"), masks or spare
        segments = segments and self.config.segmentor_config is not None
        read = slice(None if text else 1)
        if reads and hasattr(self, "siglip_projector"):
            rows.append(self.siglip_projector(self.siglip(llm_pixels[read].to(self.dtype))))
            if self.config.region_encoder == "siglip":
                cells = rows[0].unflatten(1, (math.isqrt(rows[0].shape[1]), -1))
        reads_sam = reads and hasattr(self, "sam_projector")
        if hasattr(self, "segmentor") and (reads_sam or segments):
            wanted = [self.config.sam_layer] * reads_sam + self.segmentor.layers * segments
            states = self.segmentor.sam(mask_pixels.to(self.dtype), wanted)
            if reads_sam:
                found = self.sam_projector(unshuffle(states.pop(0)[read], self.config.sam_shuffle))
                rows.append(found.flatten(1, 2))
                if self.config.region_encoder == "sam":
                    cells = found
            if segments:
                maps = self.segmentor.maps(states if masks else touch.corners(states))
        return ImageFeatures(self._rows(rows) if rows else None, cells, maps)

    def _rows(self, encoders: Sequence[Tensor]) -> Tensor:
        """Rows (I, n, D) of each encoder -> all that the language model reads of an image."""
        rows = [r.to(encoders[-1].dtype) for r in encoders]
        # the black pictures that only keep gradients alive have grids that differ
        if self.config.llm_rows == "interleaved" and len(rows) == 2 and rows[0].shape == rows[1].shape:
            return torch.stack(rows, 2).flatten(1, 2)
        return torch.cat(rows, 1)

    def read(self, batch: Batch, features: ImageFeatures, ranks: Tensor | None = None) -> tuple[Layout, Tensor]:
        """Splice and run the language model: where the tokens stand, and states (B, n, D) after its final norm."""
        layout, rows = self.embed(batch, features, ranks)
        return layout, llm.hidden_states(self.llm, rows)

    def layout(self, batch: Batch, features: ImageFeatures) -> Layout:
        """Where the tokens of ``batch`` stand once images and regions are spliced in."""
        return Layout.of(batch, 0 if features.rows is None else features.rows.shape[1], self.config.region_rows)

    def embed(self, batch: Batch, features: ImageFeatures, ranks: Tensor | None = None) -> tuple[Layout, Tensor]:
        """What the language model reads: (B, n, D). ``ranks`` are the points of ``sample_regions``."""
        if not hasattr(self, "llm"):
            raise UserError("this model has no language part but the batch has text: load a later stage, or drop it")
        layout = self.layout(batch, features)
        words = self.llm.get_input_embeddings()(batch.input_ids.clamp(min=0))
        regions = self._regions(batch, features, ranks) if len(batch.prompt_image) else None
        return layout, layout.splice(batch, words, features.rows, regions)

    def _regions(self, batch: Batch, features: ImageFeatures, ranks: Tensor | None) -> Tensor:
        encoder = self.config.region_encoder
        if features.cells is None:
            raise UserError(
                f"{batch.keys}: <region> is read from {encoder}'s rows: build {encoder}, with '{encoder}' in llm_sees"
            )
        if batch.prompt_mask.shape[-1] == 0:
            raise UserError(f"{batch.keys}: prompts are drawn on SAM's canvas: build SAM too")
        points, rows = self.config.region_points, self.config.region_rows
        prompts = batch.prompt_image, batch.prompt_mask, points, ranks
        if encoder == "sam":
            return sample_regions(features.cells, *prompts, rows=rows)
        sizes = self.config.siglip_config
        covered = features.cells.shape[1] * sizes.patch_size / sizes.image_size
        return sample_regions(features.cells, *prompts, rows=rows, views=batch.geometry, covered=covered)

    def segment(
        self, batch: Batch, features: ImageFeatures, layout: Layout | None, hidden: Tensor | None
    ) -> ModelOutput:
        """Decode all queries and, where a label is, all tokens. Without queries the mask fields have length 0."""
        lm_logits, lm_labels = self._language(batch, layout, hidden)
        decoder = self.config.segmentor_config
        if batch.max_queries == 0 or decoder is None:
            masks, classes = lm_logits.new_zeros(1, 0, 1, 1, 1), lm_logits.new_zeros(1, 0, 1, 1)
            return ModelOutput(masks, classes, lm_logits, lm_labels)
        assert features.maps is not None, f"{batch.keys}: queries without an image"
        row = batch.query_image * batch.max_queries + batch.query_slot
        groups = Groups(row, len(features.maps[0]), batch.max_queries)
        masks, classes = self.segmentor.decode(features.maps, *self.vectors(batch, layout, hidden), groups)
        pixels = self.segmentor.pixel_classifier(features.maps[0]).float() if decoder.pixel_classifier else None
        return ModelOutput(masks, classes, lm_logits, lm_labels, pixels)

    def vectors(
        self, batch: Batch, layout: Layout | None, hidden: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """``<SEG>`` vectors (Q, d), concepts with background last (Q, K + 1, d), and which are real (Q, K + 1)."""
        if self.config.segmentor_config.head == "labels":
            return None, None, None
        seg, own = None, self.background.new_zeros(*batch.query_concepts.shape, self.background.shape[1])
        if layout is not None and hidden is not None:
            sample, token = batch.seg_position.clamp(min=0).unbind(1)
            rows = [hidden[sample, layout.start[sample, token]]]
            if len(batch.concept_span):
                place, real = layout.spans(batch.concept_span)
                rows.append(hidden[batch.concept_span[:, :1], place].flatten(0, 1))
            projected = self.llm_projector(torch.cat(rows))
            gain = self.config.segmentor_config.seg_gain * self.seg_share
            seg = projected[: len(sample)] * (batch.seg_position[:, :1] >= 0) * gain
            if len(batch.concept_span):
                states = projected[len(sample) :].float().unflatten(0, real.shape) * real[..., None]
                concepts = states.sum(1) / real.sum(1, keepdim=True)
                own = concepts[batch.query_concepts.clamp(min=0)]
        elif hidden is not None:
            own = own + touch.corner(self.llm_projector(hidden[:, 0]))
        background = self.background[None].expand(len(own), -1, -1).to(own.dtype)
        real = batch.query_concepts >= 0
        return seg, torch.cat((own, background), 1), torch.cat((real, real.new_ones(len(real), 1)), 1)

    def _language(self, batch: Batch, layout: Layout | None, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        if hidden is None:
            return batch.mask_pixels.new_zeros(0, 1), batch.labels.new_zeros(0)
        if layout is None:
            return self.llm.get_output_embeddings()(hidden[:0, 0]), batch.labels.new_zeros(0)
        sample, row, labels = layout.supervised(batch)
        return self.llm.get_output_embeddings()(hidden[sample, row]), labels

    def generate(  # type: ignore[override]
        self,
        batch: Batch,
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        features: ImageFeatures | None = None,
        processors: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
    ) -> Any:
        """Answer greedily and segment what the answer asks for; see ``generation.generate``."""
        return generation.generate(self, batch, (max_new_tokens, tuple(stop_ids)), features, processors)

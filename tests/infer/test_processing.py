import json
from pathlib import Path

import numpy as np
import pytest
from oracle import encoder
from PIL import Image

from xseg.errors import UserError
from xseg.geometry.masks import encode
from xseg.geometry.views import ViewSizes
from xseg.infer.processing import XSegProcessor, stated
from xseg.types import Formatted, Query, Turn, VisualPrompt

TURNS = (Turn("user", "<image>\nPlease segment <p>the circle</p>."), Turn("assistant", "It is <SEG>."))


def test_saved_and_loaded_processor_makes_the_same_batch(tmp_path: Path) -> None:
    processor = XSegProcessor(
        encoder(), ViewSizes(64, 32, "pad_square"), speaks_first=["refer_seg"], learnt=["refer_seg"], categories=["bar"]
    )
    processor.save_pretrained(tmp_path)
    again = XSegProcessor.from_pretrained(tmp_path)
    assert again.categories == stated(tmp_path, "categories") == ["bar"] and again.names is None
    assert again.sizes == processor.sizes and again.learnt == stated(tmp_path, "learnt") == ["refer_seg"]
    assert stated(tmp_path / "weights alone", "learnt") is None
    assert [again.own_options(t)["answer"] for t in ("refer_seg", "reason_seg")] == ["generated", "given"]
    assert again.encoder is not None and again.encoder.max_tokens == 512
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8))
    batches = [
        p.batch([p.encode([p.sizes.views(image)], Formatted(TURNS, (Query(0, (0,)),)))]) for p in (processor, again)
    ]
    for name in ("input_ids", "llm_pixels", "mask_pixels", "seg_position", "concept_span", "query_concepts"):
        assert np.array_equal(getattr(batches[0], name).numpy(), getattr(batches[1], name).numpy()), name
    assert batches[0].seg_position.tolist()[0][0] == 0
    assert batches[0].input_ids[0, batches[0].seg_position[0, 1]] == processor.encoder.special.seg


def test_generation_ends_with_the_header_and_leaves_the_query_waiting() -> None:
    processor = XSegProcessor(encoder(), ViewSizes(64, 32))
    views = processor.sizes.views(Image.new("RGB", (20, 10)))
    batch = processor.batch([processor.encode([views], Formatted(TURNS[:1], (Query(0, (0,)),)), generation=True)])
    assert batch.seg_position.tolist() == [[-1, -1]]
    assert processor.encoder.decode(batch.input_ids[0].tolist()).strip().endswith("<|assistant|>")


@pytest.mark.parametrize("text", ["Sure, it is <SEG>.", "a <p>red circle</p>, a <p>star</p> <SEG>.", "Two.", ""])
def test_a_generated_answer_reads_back_as_the_same_ids(text: str) -> None:
    processor = XSegProcessor(encoder(), ViewSizes(64, 32))
    tokenizer = processor.encoder.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    said = processor.decode([*ids, processor.encoder.stop_ids[0], 3, 3])
    assert tokenizer(said, add_special_tokens=False)["input_ids"] == ids
    assert said == text


def test_prompts_are_placed_on_the_canvas() -> None:
    processor = XSegProcessor(encoder(), ViewSizes(64, 32))
    mask = np.zeros((10, 20), np.uint8)
    mask[:, :10] = 1
    views = processor.sizes.views(Image.new("RGB", (20, 10)))
    turns = (Turn("user", "<image>\nPlease segment <p><region></p>."), TURNS[1])
    formatted = Formatted(turns, (Query(0, (0,)),), (VisualPrompt(encode(mask)),))
    batch = processor.batch([processor.encode([views], formatted)])
    assert batch.prompt_mask.shape == (1, 64, 64)
    assert batch.prompt_mask[0, :32, :32].all() and not batch.prompt_mask[0, :, 32:].any()


def test_stage_one_has_no_text(tmp_path: Path) -> None:
    processor = XSegProcessor(None, ViewSizes(64, 0))
    processor.save_pretrained(tmp_path)
    again = XSegProcessor.from_pretrained(tmp_path)
    assert again.encoder is None
    views = again.sizes.views(Image.new("RGB", (20, 10)))
    with pytest.raises(UserError, match="stage-1"):
        again.encode([views], Formatted(TURNS, ()))
    batch = again.batch([again.encode([views], Formatted(queries=(Query(None),)))])
    assert batch.input_ids.shape == (1, 0) and len(batch.query_image) == 1


def test_a_foreign_or_damaged_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"xseg_processor\.json"):
        XSegProcessor.from_pretrained(tmp_path)
    (tmp_path / "xseg_processor.json").write_text(json.dumps({"mask_size": 3}))
    with pytest.raises(UserError, match="damaged"):
        XSegProcessor.from_pretrained(tmp_path)

"""A data root for `make photos`: questions and grounded captions over COCO masks become xseg's JSONL.

    python examples/photos.py DATA --out DIR

DATA holds coco_mini/{val2017, annotations/instances_val2017.json}, coco_refexp/, and in coco_text_ours/ reasoning.json
and gcg.json: lists of {image_id, text, is_sentence, ann_ids} and of {image_id, tagged, groups: [{phrase, ann_ids}]},
whose ann_ids are annotations of that COCO file. DIR gets links to the first two folders, and photos/reason.jsonl and
photos/gcg.jsonl of the first eight pictures each.
"""

import argparse
import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

from xseg.data.records import field, read_records
from xseg.data.sources.coco import Source
from xseg.data.sources.jsonl import to_line
from xseg.errors import UserError
from xseg.types import Instance, Phrase, Sample, Turn

PICTURES = 8
SPAN = re.compile("<p>(.*?)</p>")


def named(sample: Sample, wanted: list[list[int]], where: str) -> tuple[Sample, list[tuple[int, ...]]]:
    """A sample with the annotations of some phrases alone, and the places of each phrase's annotations in it."""
    by_id = {instance.id: instance for instance in sample.instances}
    listed = list(dict.fromkeys(i for ids in wanted for i in ids))
    lost = [i for i in listed if i not in by_id]
    if lost:
        raise UserError(f"{where}: annotation {lost[0]} is not one of {sample.key}; take both from the same release")
    instances = tuple(Instance(by_id[i].mask, -1, id=i) for i in listed)
    bare = dataclasses.replace(sample, instances=instances, categories=None)
    return bare, [tuple(listed.index(i) for i in ids) for ids in wanted]


def question_samples(rows: list[Any], pictures: dict[Any, Sample], where: str) -> list[Sample]:
    """One sample per picture, with all its questions."""
    by_image: dict[Any, list[Any]] = {}
    for row in rows:
        by_image.setdefault(field(row, "image_id", where), []).append(row)
    out = []
    for image, asked in list(by_image.items())[:PICTURES]:
        sample, places = named(pictures[image], [row["ann_ids"] for row in asked], where)
        kinds = ["long" if row["is_sentence"] else "short" for row in asked]
        texts = zip(asked, places, kinds, strict=True)
        phrases = tuple(Phrase(row["text"], place, str(k), kind) for k, (row, place, kind) in enumerate(texts))
        out.append(dataclasses.replace(sample, phrases=phrases, turns=()))
    return out


def caption_samples(rows: list[Any], pictures: dict[Any, Sample], where: str) -> list[Sample]:
    """One sample per caption; its k-th span is phrase k."""
    out = []
    for row in rows[:PICTURES]:
        groups = {group["phrase"]: group["ann_ids"] for group in row["groups"]}
        spans = SPAN.findall(field(row, "tagged", where))
        unknown = [span for span in spans if span not in groups]
        if unknown:
            raise UserError(f"{where}: image {row['image_id']}: no masks for {unknown[0]!r}; name them under 'groups'")
        sample, places = named(pictures[row["image_id"]], [groups[span] for span in spans], where)
        phrases = tuple(Phrase(span, place, str(k)) for k, (span, place) in enumerate(zip(spans, places, strict=True)))
        out.append(dataclasses.replace(sample, phrases=phrases, turns=(Turn("assistant", row["tagged"]),)))
    return out


def build(data: Path, out: Path) -> None:
    """Write the data root ``out``; raises UserError for records that do not fit together."""
    options = {"images": "coco_mini/val2017", "instances": "coco_mini/annotations/instances_val2017.json"}
    pictures = {sample.image_id: sample for sample in Source(data, "val", **options)}  # type: ignore[attr-defined]
    (out / "photos").mkdir(parents=True, exist_ok=True)
    for name, file, make in (("reason", "reasoning", question_samples), ("gcg", "gcg", caption_samples)):
        path = data / f"coco_text_ours/{file}.json"
        lines = [to_line(sample, out.resolve() / "photos") for sample in make(read_records(path), pictures, str(path))]
        (out / f"photos/{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf8")
    for name in ("coco_mini", "coco_refexp"):
        if not (out / name).exists():
            (out / name).symlink_to((data / name).resolve())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        build(args.data, args.out)
    except UserError as error:
        print(f"photos: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Shards: a data set that was prepared in several parts, each by a process of its own, and put together in place.

`OUTPUT/shards/i-of-n` is the data set of the i-th part of the files. `merge_shards` makes `OUTPUT` the data set of all
of them: its manifest lists their token files, and nothing is copied but the tokenizer.
"""

import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from flexpert.data.hashes import num_in_several, open_hashes
from flexpert.errors import UserError
from flexpert.records import read_record, write_atomic, write_record
from flexpert.stage import comparable, said

SHARD = re.compile(r"(\d+)-of-(\d+)")
SPLITS = ("train", "valid")
COUNTS = ("documents", "tokens", "bytes")


def shard_directory(output: Path, part: int, num_parts: int) -> Path:
    return output / "shards" / f"{part}-of-{num_parts}"


def merge_shards(output: Path) -> None:
    """Write `output/manifest.json`, last of all, so that an interrupted merge is none.

    Raises:
        UserError: a shard is missing, or shards were prepared with other settings or another tokenizer than the rest.
    """
    if (output / "manifest.json").is_file():
        if not (output / "shards").is_dir():
            raise UserError(f"{output} was not prepared in shards: there is nothing to merge")
        print(f"{output} is complete")
        return
    shards = find_shards(output)
    records = [read_record(shard / "manifest.json", "flexpert.data") for shard in shards]
    recipe = check_recipes(shards, records)
    common = {key: records[0][key] for key in ("tokenizer_digest", "vocab_size", "eos_id", "license", "answer_marker")}
    dropped = {key: sum(record["dropped"][key] for record in records) for key in records[0]["dropped"]}
    splits = {split: merged_split(output, shards, [r["splits"][split] for r in records], split) for split in SPLITS}
    if splits["train"]["documents"] == 0:
        raise UserError(f"the shards in {output} hold no training document")
    try:
        shutil.copytree(shards[0] / "tokenizer", output / "tokenizer", dirs_exist_ok=True)
        write_atomic(output / "resolved.yaml", recipe)
        content = {**common, "dropped": dropped, "splits": splits}
        write_record(output / "manifest.json", "flexpert.data", content)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from None
    counts = ", ".join(f"{name}: {s['documents']:,} documents {s['tokens']:,} tokens" for name, s in splits.items())
    print(f"{output}: {counts} in {len(shards)} shards")
    if comparable(recipe)["data.deduplicate"]:
        tell_duplicates(output)


def tell_duplicates(output: Path) -> None:
    """`data.deduplicate` works inside a shard; what is in several is counted, at the cost of reading all hashes."""
    found = [open_hashes(output, split) for split in SPLITS]  # copies are in the same split of every shard
    count = sum(num_in_several(parts) for parts in found if parts is not None)
    if count:
        print(
            f"note: {count:,} texts are in more than one shard, apart from case and blanks, and stay: "
            "data.deduplicate compares the texts of a shard"
        )


def merged_split(output: Path, shards: list[Path], entries: list[dict[str, Any]], split: str) -> dict[str, Any]:
    """The entry of a split of all shards in the manifest."""
    names = [shard.relative_to(output).as_posix() for shard in shards]
    named = zip(names, entries, strict=True)
    return {
        **{key: sum(entry[key] for entry in entries) for key in COUNTS},
        "files": {f"{name}/{file}": sha256 for name, entry in named for file, sha256 in entry["files"].items()},
        "parts": [{"prefix": f"{name}/{split}"} for name in names],
    }


def find_shards(output: Path) -> list[Path]:
    """The complete shards of `output`, in order.

    Raises:
        UserError: there is none, one is missing, or there are those of two divisions.
    """
    found = [match for path in output.glob("shards/*") if (match := SHARD.fullmatch(path.name))]
    numbers = sorted({int(match[2]) for match in found})
    if not numbers:
        raise UserError(f"{output}/shards holds no shard: run `flexpert prepare shard=i/n …` for each i below n first")
    if len(numbers) > 1:
        divisions = " and of ".join(map(str, numbers))
        raise UserError(f"{output}/shards holds parts of {divisions}: remove those of all divisions but one")
    shards = [shard_directory(output, part, numbers[0]) for part in range(numbers[0])]
    for part, shard in enumerate(shards):
        if not (shard / "manifest.json").is_file():
            raise UserError(f"{shard} is missing: run `flexpert prepare shard={part}/{numbers[0]}` like the others")
    return shards


def check_recipes(shards: list[Path], records: list[dict[str, Any]]) -> str:
    """The configuration that the shards have in common, as one of the whole data set.

    Raises:
        UserError: a shard was prepared with other settings, or its tokenizer or the input files were other ones.
    """
    texts = [(shard / "resolved.yaml").read_text(encoding="utf-8") for shard in shards]
    recipes = [{key: value for key, value in comparable(text).items() if key != "shard"} for text in texts]
    for shard, recipe, record in zip(shards, recipes, records, strict=True):
        for key, value in recipe.items():
            if value != recipes[0].get(key):
                raise UserError(
                    f"{key} of {shard} was {said(recipe, key)}, and of {shards[0].name} {said(recipes[0], key)}: "
                    "remove one of them and prepare it again"
                )
        if any(record[key] != records[0][key] for key in ("tokenizer_digest", "eos_id")):
            raise UserError(f"{shard} has another tokenizer than {shards[0].name}: remove one and prepare it again")
    check_inputs(shards, records)
    return yaml.safe_dump({**yaml.safe_load(texts[0]), "shard": None}, sort_keys=False)


def check_inputs(shards: list[Path], records: list[dict[str, Any]]) -> None:
    """Raises `UserError` where a shard was dealt from other files than most: some are in two shards, some in none."""
    found = [record.get("inputs") or {"count": "unknown", "sha256": None} for record in records]
    usual, _ = Counter(inputs["sha256"] for inputs in found).most_common(1)[0]
    most = next(number for number, inputs in enumerate(found) if inputs["sha256"] == usual)
    for shard, inputs in zip(shards, found, strict=True):
        if inputs["sha256"] != usual:
            raise UserError(
                f"{shard} was dealt from other files than {shards[most].name} ({inputs['count']} files matched "
                f"data.documents then, and {found[most]['count']}; else names or sizes differ): put back the files as "
                f"they were for {shards[most].name}, remove {shard.name} and prepare it again"
            )

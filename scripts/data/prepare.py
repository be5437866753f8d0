"""Makes the parquet files that verl trains on and validates on of a dataset as it is published (`published.py`):

    .venv/bin/python scripts/data/prepare.py gsm8k          train.parquet and test.parquet in ~/data/gsm8k
    .venv/bin/python scripts/data/prepare.py gsm8k --help   what is in them, how verl scores it, and the options

Contract, for every dataset:

1. `--source` is a hub name, a parquet, json or jsonl file, a folder of such files, or one made by `save_to_disk`.
2. A row is `data_source`, `prompt`, `ability`, `reward_model` {style, ground_truth}, `extra_info` {split, index,
   source} and, for vision, `images`: one schema for all datasets. Files can be mixed in `data.train_files` if one
   scorer of verl's serves them: scorers answer with keys of their own, and verl takes the first row's for all.
   `index` is the row in the source. `data_source` is the key by which verl's `default_compute_score` finds the scorer;
   the dataset's own name is `extra_info.source`.
3. A prompt stands in a file once (DARTS knows prompts by their content) and never in both files. Two prompts are the
   same if their questions, without instructions, agree up to white space and Unicode form, and their images in every
   byte. Copies whose answers differ are all dropped: nobody knows which is right. Of code the first is kept, since
   tests of one problem may differ and agree. What is dropped is counted by reason.
4. The same source gives the same rows in the same order. `--limit` cuts each file to its first rows.
5. Files are written beside their place and renamed when all of them are complete.
6. What is wrong with the input is one line on stderr and exit code 2.
"""

import argparse
import hashlib
import io
import logging
import os
import sys
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import datasets
import huggingface_hub
import pyarrow as pa
from datasets.utils import tqdm
from PIL import Image
from published import DATASETS, IMAGE, Example, Part, PreparedRow, UnusableRow

BATCH = 500  # rows in memory at a time: the tests of a single programming problem may take megabytes
SHOWN = 200  # characters of a text in the summary and in errors
FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
KINDS: dict[str, tuple[str, set[str]]] = {
    "text": ("text", set()),
    "messages": ("a list of {role, content}", {"role", "content"}),
    "images": ("a list of images", {"bytes", "path"}),
}
"""What a column may be, in words, and the members of the records that it is a list of."""
TEXT = datasets.Value("string")
FEATURES = datasets.Features(
    data_source=TEXT,
    prompt=datasets.List({"role": TEXT, "content": TEXT}),
    ability=TEXT,
    reward_model={"style": TEXT, "ground_truth": TEXT},
    extra_info={"split": TEXT, "index": datasets.Value("int64"), "source": TEXT},
)


class InputError(Exception):
    """Input that cannot be used: one line with the value, the rule and the fix."""


@dataclass(slots=True, kw_only=True)
class Source:
    """What a part is made of."""

    part: Part
    option: str  # by which it was named, with the value
    rows: datasets.Dataset  # the needed columns of the needed split, images as bytes; memory-mapped
    chosen: list[int] = field(default_factory=list)  # the rows that are to be written, in the order of the source
    seen: dict[bytes, int] = field(default_factory=dict)  # all readable prompts, by digest, with their first row
    dropped: Counter[str] = field(default_factory=Counter)  # rows by reason

    def report(self) -> str:
        """``; dropped: 3 repeated, 1 with an empty answer``, or nothing."""
        reason_counts = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common() if count)
        return f"; dropped: {reason_counts}" if reason_counts else ""


# --- the command -----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the options.\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the dataset that is named."""
    parser = _Parser(prog="prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    source_help = "name on the hub, file (parquet, json, jsonl) or folder (default: %(default)s)"
    for name, (description, train_part, val_part) in DATASETS.items():
        add = names.add_parser(name, description=description, help=description.split(".")[0]).add_argument
        add("--source", default=train_part.hub, metavar="NAME_OR_PATH", help=source_help)
        if val_part.hub != train_part.hub:
            add("--val-source", default=val_part.hub, metavar="NAME_OR_PATH", help=f"of validation: {source_help}")
        default_folder = Path(os.environ.get("DATA_DIR") or "~/data") / name
        add("--out", type=Path, default=default_folder, metavar="DIR", help=f"default: $DATA_DIR/{name}")
        add("--limit", type=int, metavar="N", help="at most N rows in each file")
        if name == "eurus2":
            add("--ability", choices=["code", "math", "all"], default="code", help="default: %(default)s")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes both files; returns the exit code."""
    options = parse(arguments)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it logs is in its exceptions too
    huggingface_hub.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        prepare(options)
    except InputError as error:
        print(f"prepare.py {options.name}: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(options: argparse.Namespace) -> None:
    """Reads, chooses, writes, and prints what came of it.

    Raises:
        InputError: something that was asked for cannot be had.
    """
    _, train_part, val_part = DATASETS[options.name]
    if "ability" in options:
        read_row = partial(train_part.read, wanted=options.ability)
        train_part, val_part = (replace(part, read=read_row) for part in (train_part, val_part))
    if options.limit is not None and options.limit < 1:
        raise InputError(f"--limit={options.limit}: must be at least 1; leave it out for all rows.")
    output_folder = options.out.expanduser()
    try:
        output_folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_folder).close()
    except OSError as error:
        problem = f"cannot be written to ({error.strerror})"
        raise InputError(f"--out={output_folder}: {problem}; name another folder.") from error

    # 1. Both sources are there, with what they must have.
    train = pick(train_part, "--source", options.source)
    val_option = "--val-source" if "val_source" in options else "--source"
    validation = pick(val_part, val_option, vars(options).get("val_source", options.source))
    # 2. What is validated on is not trained on.
    choose(validation)
    choose(train, validation)
    # 3. Both files are written, or none.
    try:
        with tempfile.TemporaryDirectory(dir=output_folder, prefix=".incomplete-") as new_folder:
            written_rows = [write(source, options.limit, Path(new_folder)) for source in (train, validation)]
            for parquet_path in Path(new_folder).glob("*.parquet"):
                parquet_path.replace(output_folder / parquet_path.name)
    except OSError as error:
        raise InputError(f"--out={output_folder}: {error}; make room, or name another folder.") from error

    for source, rows in zip((train, validation), written_rows, strict=True):
        cut_words = f" of {len(source.chosen):,}, --limit" if len(rows) < len(source.chosen) else ""
        file_words = f"{source.part.name}.parquet: {len(source.rows):,} read, {len(rows):,} written"
        print(file_words + cut_words + source.report())
    print(f"in {output_folder}; the first row of {train.part.name}.parquet:")
    for column_name, value in written_rows[0][0].items():
        print(f"  {column_name:<13} {_short(value)}")


def _short(shown_value: object) -> str:
    one_line = " ".join(str(shown_value).split())
    return one_line if len(one_line) <= SHOWN else f"{one_line[: SHOWN - 4]} ..."


# --- reading ---------------------------------------------------------------------------------------------------------


def load(part: Part, source_option: str, source_name: str) -> Mapping[str, datasets.Dataset]:
    """The splits of a source, by name.

    Raises:
        InputError: there is no such source, or it cannot be read.
    """
    local_path, option_words = Path(source_name).expanduser(), f"{source_option}={source_name}"
    local_copy = f"pass a local copy of {part.hub} with {source_option}"
    is_path = source_name.startswith((".", "/", "~")) or source_name.count("/") > 1 or local_path.suffix in FORMATS
    if not source_name.strip() or (is_path and not local_path.exists()):
        raise InputError(f"{option_words}: no such file or folder; {local_copy}, or leave it out to read the hub.")
    if local_path.is_file() and local_path.suffix not in FORMATS:
        raise InputError(f"{option_words}: must be one of {', '.join(FORMATS)}; {local_copy}.")
    try:
        if local_path.is_file():
            loaded_data = datasets.load_dataset(FORMATS[local_path.suffix], data_files={"train": str(local_path)})
        elif any((local_path / mark).exists() for mark in ("dataset_dict.json", "state.json")):
            loaded_data = datasets.load_from_disk(local_path)
        elif local_path.is_dir():
            config_name = part.config if part.config in datasets.get_dataset_config_names(str(local_path)) else None
            loaded_data = datasets.load_dataset(str(local_path), config_name)
        else:
            loaded_data = datasets.load_dataset(source_name, part.config)
    except Exception as error:  # of the reader of each format; all mean that the data cannot be read
        raise InputError(f"{option_words}: {_problem(error, local_path.is_file())}; {local_copy}.") from error
    return loaded_data if isinstance(loaded_data, dict) else {"train": loaded_data}


def _problem(error: BaseException, is_file: bool) -> str:
    """Why a source cannot be read, in words."""
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return "no such file or folder, and the hub has no such dataset, or a private one"
    if isinstance(error, ConnectionError):
        return f"no such file or folder, and the hub cannot be reached ({_short(error)})"
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, StopIteration) or "corresponds to no data" in str(error):  # how datasets says so
        return "has no rows" if is_file else "a file in it has no rows"
    return f"cannot be read ({type(error).__name__}: {_short(error)})"


def pick(file_part: Part, source_option: str, source_name: str) -> Source:
    """What `file_part` needs of a source.

    Raises:
        InputError: the source, a split or a column is not there, or of another type.
    """
    splits, option_words = load(file_part, source_option, source_name), f"{source_option}={source_name}"
    split_name = file_part.split or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
    a_copy = f"a copy of {file_part.hub}."
    if split_name not in splits:
        wanted_files = " and ".join(f"{file_stem}.*" for file_stem in (*splits, split_name))
        problem = f"no split {split_name!r} among {', '.join(splits)}; a file is one split"
        raise InputError(f"{option_words}: {problem}: pass a folder with {wanted_files}, or {a_copy}")
    split_rows = splits[split_name]
    flat_schema = split_rows.features.flatten().arrow_schema
    for column_path, column_kind in file_part.columns.items():
        column_words, (kind_words, member_names) = f"split {split_name!r}: column {column_path!r}", KINDS[column_kind]
        if column_path not in flat_schema.names:
            column_names = ", ".join(split_rows.column_names) or "no columns"
            raise InputError(f"{option_words}, {column_words} is missing among {column_names}; pass {a_copy}")
        column_type = flat_schema.field(column_path).type
        if not _has(column_type, member_names):
            shown_type = _short(column_type)
            raise InputError(f"{option_words}, {column_words} is {shown_type}, must be {kind_words}; pass {a_copy}")
    needed_columns = list(dict.fromkeys(column_path.split(".")[0] for column_path in file_part.columns))
    split_rows = split_rows.select_columns(needed_columns)
    if "images" in needed_columns:
        split_rows = split_rows.cast_column("images", datasets.List(datasets.Image(decode=False)))
    return Source(part=file_part, option=option_words, rows=split_rows)


def _has(column_type: pa.DataType, member_names: set[str]) -> bool:
    """Whether it is a list of records with these members; without any, text."""
    if not member_names:
        return pa.types.is_string(column_type) or pa.types.is_large_string(column_type)
    record_type = getattr(column_type, "value_type", None)  # of a list
    return isinstance(record_type, pa.StructType) and member_names <= {member.name for member in record_type}


# --- choosing --------------------------------------------------------------------------------------------------------


def choose(source: Source, held_out: Source | None = None) -> None:
    """Finds unusable rows, copies, and what is held out. Reads everything once.

    Raises:
        InputError: no row is left.
    """
    answers: dict[bytes, set[bytes]] = defaultdict(set)
    copies: Counter[bytes] = Counter()
    num_batches = -(-len(source.rows) // BATCH)
    batches = source.rows.iter(BATCH)
    batches = tqdm(batches, desc=f"Reading {source.part.name}", total=num_batches, unit=" rows", unit_scale=BATCH)
    examples = (dict(zip(batch, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True))
    for row_index, example in enumerate(examples):
        try:
            prepared_row = read(source.part, example)
        except UnusableRow as drop_reason:
            source.dropped[str(drop_reason)] += 1
            continue
        prompt_key = _digest(prepared_row.question, example.get("images") or ())
        source.seen.setdefault(prompt_key, row_index)
        copies[prompt_key] += 1
        if prepared_row.ability != "code":
            answers[prompt_key].add(_digest(prepared_row.answer))
    for prompt_key, row_index in source.seen.items():
        if len(answers[prompt_key]) > 1:
            source.dropped["repeated with different answers"] += copies[prompt_key]
        elif held_out and prompt_key in held_out.seen:
            source.dropped[f"also in {held_out.part.name}.parquet"] += copies[prompt_key]
        else:
            source.dropped["repeated"] += copies[prompt_key] - 1
            source.chosen.append(row_index)
    if not source.chosen:
        none_left = f"none of the {len(source.rows):,} rows is left{source.report()}"
        raise InputError(f"{source.option}: {none_left}; pass a copy of {source.part.hub}.")


def read(file_part: Part, example: Example) -> PreparedRow:
    """A row of the source as `file_part` reads it, if it can be used."""
    prepared_row = file_part.read(example)
    if not prepared_row.question or not all(message["content"] for message in prepared_row.prompt):
        raise UnusableRow("with an empty prompt")
    if not prepared_row.answer.strip():
        raise UnusableRow("with an empty answer")
    if "images" in file_part.columns:
        images = example["images"] or ()
        if sum(message["content"].count(IMAGE) for message in prepared_row.prompt) != len(images):
            raise UnusableRow(f"with another number of images than of {IMAGE}")
        try:
            for image in images:
                Image.open(io.BytesIO(_content(image))).verify()
        except (OSError, SyntaxError, ValueError, TypeError):  # a missing file, and what Pillow raises
            raise UnusableRow("with an image that cannot be read") from None
    return prepared_row


def _content(image: Mapping[str, Any]) -> bytes:
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def _digest(text_content: str, images: Any = ()) -> bytes:
    hashed = hashlib.sha256(" ".join(unicodedata.normalize("NFC", text_content).split()).encode(errors="surrogatepass"))
    for image in images:
        hashed.update(hashlib.sha256(_content(image)).digest())
    return hashed.digest()[:16]


# --- writing ---------------------------------------------------------------------------------------------------------


def write(source: Source, limit: int | None, output_folder: Path) -> datasets.Dataset:
    """Writes the chosen rows; returns them without images."""
    file_part, written_indices = source.part, source.chosen[:limit]
    image_feature = {"images": datasets.List(datasets.Image())} if "images" in file_part.columns else {}

    def convert(example: Example, place: int) -> dict[str, Any]:
        prepared_row = read(file_part, example)
        return {name: example[name] for name in image_feature} | {
            "data_source": prepared_row.data_source,
            "prompt": prepared_row.prompt,
            "ability": prepared_row.ability,
            "reward_model": {"style": "rule", "ground_truth": prepared_row.answer},
            "extra_info": {"split": file_part.name, "index": written_indices[place], "source": file_part.hub},
        }

    rows = source.rows.select(written_indices).map(
        convert,
        with_indices=True,
        writer_batch_size=BATCH,
        remove_columns=source.rows.column_names,
        features=datasets.Features(FEATURES | image_feature),
        cache_file_name=str(output_folder / f"{file_part.name}.arrow"),
        new_fingerprint=file_part.name,
        desc=f"Converting {file_part.name}",
    )
    rows.to_parquet(output_folder / f"{file_part.name}.parquet")
    return rows.select_columns(list(FEATURES))


if __name__ == "__main__":
    sys.exit(main())

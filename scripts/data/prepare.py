"""What the scripts of this folder share: from a dataset as it is published to the parquet files that verl trains on.

Contract, for every script:

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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import datasets
import huggingface_hub
import pyarrow as pa
from datasets.utils import tqdm
from PIL import Image

Example = Mapping[str, Any]
Messages = list[dict[str, str]]
Command = Callable[[Sequence[str] | None], int]

BATCH = 500
"""Rows in memory at a time: the tests of a single programming problem may take megabytes."""
SHOWN = 200
"""Characters of a text in the summary and in errors."""
FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
IMAGE = "<image>"
"""What stands for an image in a prompt of verl."""
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


class UnusableRow(Exception):
    """A row to be dropped, with the reason by which it is counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRow:
    """A prompt: ``PreparedRow(question="1 + 1?", prompt=user("1 + 1?"), answer="2", data_source="math_dapo")``."""

    question: str
    """The prompt without instructions: by it copies are found."""
    prompt: Messages
    answer: str
    """The ground truth, as the scorer of `data_source` wants it."""
    data_source: str
    ability: str = "math"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A file to be written, and what it is read from."""

    name: str
    """The file's name without ``.parquet``."""
    hub: str
    """The canonical dataset."""
    columns: Mapping[str, str]
    """What is needed, by kind (see `KINDS`), e.g. ``{"problem": "text", "reward_model.ground_truth": "text"}``."""
    read: Callable[[Example], PreparedRow]
    """Reads a row of the source, or raises `UnusableRow`."""
    split: str | None = None
    """Which of the source. None: ``train``, or the only one."""
    config: str | None = None
    """Which of the dataset, where it has several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A loaded part."""

    part: Part
    option: str
    """By which it was named, with the value."""
    rows: datasets.Dataset
    """The needed columns of the needed split, images as bytes; memory-mapped."""


def parts(*names: str, **fields: Any) -> list[Part]:
    """Files that are called like the splits they are read from; the other fields of `Part` are those of all."""
    return [Part(name=name, split=name, **fields) for name in names]


def user(text_content: str) -> Messages:
    """A prompt of one message."""
    return [{"role": "user", "content": text_content}]


def text(example: Example, column_path: str) -> str:
    """The text at a dotted path, without surrounding white space; empty where there is none."""
    field_value: Any = example
    for name in column_path.split("."):
        field_value = None if field_value is None else field_value[name]
    return (field_value or "").strip()


# --- the command -----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the options.\n")


def command(name: str, description: str, train: Part, val: Part) -> Command:
    """What a script runs: it takes the arguments and returns the exit code."""

    def main(arguments: Sequence[str] | None = None) -> int:
        return run(make_parser(name, description, train.hub, val.hub).parse_args(arguments), train, val)

    return main


def make_parser(name: str, description: str, train_hub: str, val_hub: str) -> argparse.ArgumentParser:
    """The options that all scripts have; `train_hub` and `val_hub` are names on the hub."""
    parser = _Parser(prog=f"{name}.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    source_help = "name on the hub, file (parquet, json, jsonl) or folder (default: %(default)s)"
    parser.add_argument("--source", default=train_hub, metavar="NAME_OR_PATH", help=source_help)
    if val_hub != train_hub:
        val_help = f"of validation: {source_help}"
        parser.add_argument("--val-source", default=val_hub, metavar="NAME_OR_PATH", help=val_help)
    default_folder = Path(os.environ.get("DATA_DIR") or "~/data") / name
    parser.add_argument("--out", type=Path, default=default_folder, metavar="DIR", help="default: $DATA_DIR/" + name)
    parser.add_argument("--limit", type=int, metavar="N", help="at most N rows in each file")
    parser.set_defaults(name=name)
    return parser


def run(options: argparse.Namespace, train: Part, val: Part) -> int:
    """Writes both files; returns the exit code."""
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it logs is in its exceptions too
    huggingface_hub.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        _run(options, train, val)
    except InputError as error:
        print(f"{options.name}: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace, train_part: Part, val_part: Part) -> None:
    if options.limit is not None and options.limit < 1:
        raise InputError(f"--limit={options.limit}: must be at least 1; leave it out for all rows.")
    output_folder = _make_folder(options.out)
    source_splits = load(train_part, "--source", options.source)
    train_source = pick(source_splits, train_part, "--source", options.source)
    val_option, val_source = "--source", options.source
    if "val_source" in options:
        val_option, val_source = "--val-source", options.val_source
        source_splits = load(val_part, val_option, val_source)
    validated = pick(source_splits, val_part, val_option, val_source)

    held_out = choose(validated)
    train_choice = choose(train_source, held_out.seen, val_part.name)
    try:
        with tempfile.TemporaryDirectory(dir=output_folder, prefix=".incomplete-") as new_folder:
            written_files = [write(choice, options.limit, Path(new_folder)) for choice in (train_choice, held_out)]
            for parquet_path, _ in written_files:
                parquet_path.replace(output_folder / parquet_path.name)
    except OSError as error:
        raise InputError(f"--out={output_folder}: {error}; make room, or name another folder.") from error

    for choice, (parquet_path, rows) in zip((train_choice, held_out), written_files, strict=True):
        cut_words = f" of {len(choice.indices):,}, --limit" if len(rows) < len(choice.indices) else ""
        print(f"{parquet_path.name}: {choice.num_read:,} read, {len(rows):,} written{cut_words}{choice.report()}")
    print(f"in {output_folder}; the first row of {written_files[0][0].name}:")
    for column_name, value in written_files[0][1][0].items():
        print(f"  {column_name:<13} {_short(value)}")


def _make_folder(out: Path) -> Path:
    out = out.expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except OSError as error:
        raise InputError(f"--out={out}: cannot be written to ({error.strerror}); name another folder.") from error


def _short(shown_value: object) -> str:
    one_line = " ".join(str(shown_value).split())
    return one_line if len(one_line) <= SHOWN else f"{one_line[: SHOWN - 4]} ..."


# --- reading ---------------------------------------------------------------------------------------------------------


KINDS: dict[str, tuple[str, set[str]]] = {
    "text": ("text", set()),
    "messages": ("a list of {role, content}", {"role", "content"}),
    "images": ("a list of images", {"bytes", "path"}),
}
"""What a column may be, in words, and the members of the records that it is a list of."""


def _is_of_kind(column_type: pa.DataType, member_names: set[str]) -> bool:
    if not member_names:
        return pa.types.is_string(column_type) or pa.types.is_large_string(column_type)
    is_list = pa.types.is_list(column_type) or pa.types.is_large_list(column_type)
    return (
        is_list
        and pa.types.is_struct(column_type.value_type)
        and member_names <= {member.name for member in column_type.value_type}
    )


def pick(splits: Mapping[str, datasets.Dataset], file_part: Part, option: str, source_name: str) -> Source:
    """What `file_part` needs of a source.

    Raises:
        InputError: a split or a column is not there, or of another type.
    """
    split_name = file_part.split or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
    option = f"{option}={source_name}"
    if split_name not in splits:
        wanted_files = " and ".join(f"{file_stem}.*" for file_stem in (*splits, split_name))
        problem = f"no split {split_name!r} among {', '.join(splits)}; a file is one split"
        raise InputError(f"{option}: {problem}: pass a folder with {wanted_files}, or a copy of {file_part.hub}.")
    split_rows = splits[split_name]
    for column_path, column_kind in file_part.columns.items():
        _check_column(split_rows, column_path, column_kind, f"{option}, split {split_name!r}", file_part)
    needed_columns = list(dict.fromkeys(column_path.split(".")[0] for column_path in file_part.columns))
    split_rows = split_rows.select_columns(needed_columns)
    if "images" in needed_columns:
        split_rows = split_rows.cast_column("images", datasets.List(datasets.Image(decode=False)))
    return Source(part=file_part, option=option, rows=split_rows)


def _check_column(split_rows: datasets.Dataset, path: str, column_kind: str, place_words: str, file_part: Part) -> None:
    kind_words, member_names = KINDS[column_kind]
    arrow_schema = split_rows.features.arrow_schema
    column_type: pa.DataType = pa.struct(list(arrow_schema))
    for name in path.split("."):
        if not pa.types.is_struct(column_type) or column_type.get_field_index(name) < 0:
            column_names = ", ".join(arrow_schema.names) or "no columns"
            raise InputError(
                f"{place_words}: column {path!r} is missing among {column_names}; pass a copy of {file_part.hub}."
            )
        column_type = column_type.field(name).type
    if not _is_of_kind(column_type, member_names):
        shown_type = _short(column_type)
        raise InputError(
            f"{place_words}: column {path!r} is {shown_type}, must be {kind_words}; pass a copy of {file_part.hub}."
        )


def load(part: Part, source_option: str, source_name: str) -> Mapping[str, datasets.Dataset]:
    """The splits of a source, by name.

    Raises:
        InputError: there is no such source, or it cannot be read.
    """
    local_path, option_words = Path(source_name).expanduser(), f"{source_option}={source_name}"
    local_copy = f"pass a local copy of {part.hub} with {source_option}"
    if not source_name.strip() or (not local_path.exists() and _is_path(source_name)):
        raise InputError(f"{option_words}: no such file or folder; {local_copy}, or leave it out to read the hub.")
    if local_path.is_file() and local_path.suffix not in FORMATS:
        raise InputError(f"{option_words}: must be one of {', '.join(FORMATS)}; {local_copy}.")
    try:
        if local_path.is_file():
            loaded_data = datasets.load_dataset(FORMATS[local_path.suffix], data_files={"train": str(local_path)})
        elif local_path.is_dir() and any((local_path / mark).exists() for mark in ("dataset_dict.json", "state.json")):
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


def _is_path(source_name: str) -> bool:
    return source_name.startswith((".", "/", "~")) or source_name.count("/") > 1 or Path(source_name).suffix in FORMATS


# --- choosing --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Copies:
    """Rows with the same prompt."""

    first: int
    answer: bytes
    count: int = 1
    agree: bool = True


@dataclass(slots=True, kw_only=True)
class Choice:
    """The rows of a source that are to be written."""

    source: Source
    num_read: int
    indices: list[int] = field(default_factory=list)
    """In the order of the source."""
    seen: set[bytes] = field(default_factory=set)
    """Digests of all readable prompts, kept or not."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows by reason."""

    def report(self) -> str:
        """``; dropped: 3 repeated, 1 with an empty answer``, or nothing."""
        reason_counts = ", ".join(f"{count:,} {drop_reason}" for drop_reason, count in self.dropped.most_common())
        return f"; dropped: {reason_counts}" if reason_counts else ""


def choose(source: Source, held_out: set[bytes] = frozenset(), held_out_in: str = "") -> Choice:
    """Finds unusable rows, copies, and what is held out for the file `held_out_in`. Reads everything once."""
    file_choice = Choice(source=source, num_read=len(source.rows))
    prompts: dict[bytes, _Copies] = {}
    for row_index, example in enumerate(_examples(source)):
        try:
            prepared_row = read(source.part, example)
        except UnusableRow as drop_reason:
            file_choice.dropped[str(drop_reason)] += 1
            continue
        prompt_key, answer = _digest(prepared_row.question, example.get("images") or ()), _digest(prepared_row.answer)
        prompt_copies = prompts.setdefault(prompt_key, _Copies(row_index, answer, count=0))
        prompt_copies.count += 1
        prompt_copies.agree &= answer == prompt_copies.answer or prepared_row.ability == "code"
    for prompt_key, prompt_copies in prompts.items():
        if not prompt_copies.agree:
            file_choice.dropped["repeated with different answers"] += prompt_copies.count
        elif prompt_key in held_out:
            file_choice.dropped[f"also in {held_out_in}.parquet"] += prompt_copies.count
        else:
            file_choice.dropped["repeated"] += prompt_copies.count - 1
            file_choice.indices.append(prompt_copies.first)
    file_choice.seen = set(prompts)
    file_choice.dropped = +file_choice.dropped
    if not file_choice.indices:
        none_left = f"none of the {file_choice.num_read:,} rows is left{file_choice.report()}"
        raise InputError(f"{source.option}: {none_left}; pass a copy of {source.part.hub}.")
    return file_choice


def _examples(source: Source) -> Iterator[Example]:
    with tqdm(total=len(source.rows), desc=f"Reading {source.part.name}", unit=" rows") as progress_bar:
        for column_batch in source.rows.iter(BATCH):
            batch_columns = list(column_batch.values())
            progress_bar.update(len(batch_columns[0]))
            for column_values in zip(*batch_columns, strict=True):
                yield dict(zip(column_batch, column_values, strict=True))


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
        if not all(map(_is_readable, images)):
            raise UnusableRow("with an image that cannot be read")
    return prepared_row


def _is_readable(image: Mapping[str, Any]) -> bool:
    try:
        Image.open(io.BytesIO(_content(image))).verify()
    except (OSError, SyntaxError, ValueError, TypeError):  # a missing file, and what Pillow raises
        return False
    return True


def _content(image: Mapping[str, Any]) -> bytes:
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def _digest(text_content: str, images: Any = ()) -> bytes:
    hashed = hashlib.sha256(" ".join(unicodedata.normalize("NFC", text_content).split()).encode(errors="surrogatepass"))
    for image in images:
        hashed.update(hashlib.sha256(_content(image)).digest())
    return hashed.digest()[:16]


# --- writing ---------------------------------------------------------------------------------------------------------


def write(file_choice: Choice, limit: int | None, output_folder: Path) -> tuple[Path, datasets.Dataset]:
    """Writes the chosen rows; returns the file and its rows, without images."""
    file_part = file_choice.source.part
    kept_indices = file_choice.indices[:limit]
    has_images = "images" in file_part.columns
    features = datasets.Features(FEATURES | ({"images": datasets.List(datasets.Image())} if has_images else {}))
    rows = file_choice.source.rows.select(kept_indices).map(
        partial(_convert, part=file_part, indices=kept_indices),
        with_indices=True,
        writer_batch_size=BATCH,
        remove_columns=file_choice.source.rows.column_names,
        features=features,
        cache_file_name=str(output_folder / f"{file_part.name}.arrow"),
        load_from_cache_file=False,
        new_fingerprint=file_part.name,
        desc=f"Converting {file_part.name}",
    )
    parquet_path = output_folder / f"{file_part.name}.parquet"
    rows.to_parquet(parquet_path)
    return parquet_path, rows.select_columns(list(FEATURES))


def _convert(example: Example, place: int, *, part: Part, indices: list[int]) -> dict[str, Any]:
    prepared_row = read(part, example)
    return {name: images for name, images in example.items() if name == "images"} | {
        "data_source": prepared_row.data_source,
        "prompt": prepared_row.prompt,
        "ability": prepared_row.ability,
        "reward_model": {"style": "rule", "ground_truth": prepared_row.answer},
        "extra_info": {"split": part.name, "index": indices[place], "source": part.hub},
    }

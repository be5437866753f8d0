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

    def error(self, what: str) -> InputError:
        return InputError(f"{self.option}: {what}; pass a copy of {self.part.hub}.")


def parts(*names: str, **fields: Any) -> list[Part]:
    """Files that are called like the splits they are read from; the other fields of `Part` are those of all."""
    return [Part(name=name, split=name, **fields) for name in names]


def user(content: str) -> Messages:
    """A prompt of one message."""
    return [{"role": "user", "content": content}]


def text(example: Example, path: str) -> str:
    """The text at a dotted path, without surrounding white space; empty where there is none."""
    value: Any = example
    for name in path.split("."):
        value = None if value is None else value[name]
    return (value or "").strip()


# --- the command -----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the options.\n")


def command(name: str, description: str, train: Part, val: Part) -> Command:
    """What a script runs: it takes the arguments and returns the exit code."""
    return lambda arguments=None: run(
        make_parser(name, description, train.hub, val.hub).parse_args(arguments), train, val
    )


def make_parser(name: str, description: str, train: str, val: str) -> argparse.ArgumentParser:
    """The options that all scripts have; `train` and `val` are hub names."""
    parser = _Parser(prog=f"{name}.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    source_help = "name on the hub, file (parquet, json, jsonl) or folder (default: %(default)s)"
    parser.add_argument("--source", default=train, metavar="NAME_OR_PATH", help=source_help)
    if val != train:
        parser.add_argument("--val-source", default=val, metavar="NAME_OR_PATH", help=f"of validation: {source_help}")
    folder = Path(os.environ.get("DATA_DIR") or "~/data") / name
    parser.add_argument("--out", type=Path, default=folder, metavar="DIR", help="default: $DATA_DIR/" + name)
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


def _run(options: argparse.Namespace, train: Part, val: Part) -> None:
    if options.limit is not None and options.limit < 1:
        raise InputError(f"--limit={options.limit}: must be at least 1; leave it out for all rows.")
    out = _make_folder(options.out)
    splits = load(train, "--source", options.source)
    trained = pick(splits, train, "--source", options.source)
    val_option, val_source = "--source", options.source
    if "val_source" in options:
        val_option, val_source = "--val-source", options.val_source
        splits = load(val, val_option, val_source)
    validated = pick(splits, val, val_option, val_source)

    held_out = choose(validated)
    kept = choose(trained, held_out.seen, val.name)
    try:
        with tempfile.TemporaryDirectory(dir=out, prefix=".incomplete-") as folder:
            files = [write(choice, options.limit, Path(folder)) for choice in (kept, held_out)]
            for path, _ in files:
                path.replace(out / path.name)
    except OSError as error:
        raise InputError(f"--out={out}: {error}; make room, or name another folder.") from error

    for choice, (path, rows) in zip((kept, held_out), files, strict=True):
        cut = f" of {len(choice.indices):,}, --limit" if len(rows) < len(choice.indices) else ""
        print(f"{path.name}: {choice.num_read:,} read, {len(rows):,} written{cut}{choice.report()}")
    print(f"in {out}; the first row of {files[0][0].name}:")
    for name, value in files[0][1][0].items():
        print(f"  {name:<13} {_short(value)}")


def _make_folder(out: Path) -> Path:
    out = out.expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except OSError as error:
        raise InputError(f"--out={out}: cannot be written to ({error.strerror}); name another folder.") from error


def _short(value: object) -> str:
    line = " ".join(str(value).split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 4]} ..."


# --- reading ---------------------------------------------------------------------------------------------------------


def _is_text(found: pa.DataType) -> bool:
    return pa.types.is_string(found) or pa.types.is_large_string(found)


def _is_list_of(found: pa.DataType, names: set[str]) -> bool:
    if not (pa.types.is_list(found) or pa.types.is_large_list(found)) or not pa.types.is_struct(found.value_type):
        return False
    return names <= {member.name for member in found.value_type}


KINDS: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
    "text": ("text", _is_text),
    "messages": ("a list of {role, content}", lambda found: _is_list_of(found, {"role", "content"})),
    "images": ("a list of images", lambda found: _is_list_of(found, {"bytes", "path"})),
}


def pick(splits: Mapping[str, datasets.Dataset], part: Part, option: str, name: str) -> Source:
    """What `part` needs of a source.

    Raises:
        InputError: a split or a column is not there, or of another type.
    """
    split = part.split or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
    option = f"{option}={name}"
    if split not in splits:
        files = " and ".join(f"{name}.*" for name in (*splits, split))
        problem = f"no split {split!r} among {', '.join(splits)}; a file is one split"
        raise InputError(f"{option}: {problem}: pass a folder with {files}, or a copy of {part.hub}.")
    rows = splits[split]
    for path, kind in part.columns.items():
        _check_column(rows, path, kind, f"{option}, split {split!r}", part)
    names = list(dict.fromkeys(path.split(".")[0] for path in part.columns))
    rows = rows.select_columns(names)
    if "images" in names:
        rows = rows.cast_column("images", datasets.List(datasets.Image(decode=False)))
    return Source(part=part, option=option, rows=rows)


def _check_column(rows: datasets.Dataset, path: str, kind: str, where: str, part: Part) -> None:
    wanted, fits = KINDS[kind]
    schema = rows.features.arrow_schema
    found: pa.DataType = pa.struct(list(schema))
    for name in path.split("."):
        if not pa.types.is_struct(found) or found.get_field_index(name) < 0:
            has = ", ".join(schema.names) or "no columns"
            raise InputError(f"{where}: column {path!r} is missing among {has}; pass a copy of {part.hub}.")
        found = found.field(name).type
    if not fits(found):
        shown = _short(found)
        raise InputError(f"{where}: column {path!r} is {shown}, must be {wanted}; pass a copy of {part.hub}.")


def load(part: Part, option: str, name: str) -> Mapping[str, datasets.Dataset]:
    """The splits of a source, by name.

    Raises:
        InputError: there is no such source, or it cannot be read.
    """
    path, where = Path(name).expanduser(), f"{option}={name}"
    local_copy = f"pass a local copy of {part.hub} with {option}"
    if not name.strip() or (not path.exists() and _is_path(name)):
        raise InputError(f"{where}: no such file or folder; {local_copy}, or leave it out to read the hub.")
    if path.is_file() and path.suffix not in FORMATS:
        raise InputError(f"{where}: must be one of {', '.join(FORMATS)}; {local_copy}.")
    try:
        if path.is_file():
            loaded = datasets.load_dataset(FORMATS[path.suffix], data_files={"train": str(path)})
        elif path.is_dir() and any((path / mark).exists() for mark in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(path)
        elif path.is_dir():
            config = part.config if part.config in datasets.get_dataset_config_names(str(path)) else None
            loaded = datasets.load_dataset(str(path), config)
        else:
            loaded = datasets.load_dataset(name, part.config)
    except datasets.exceptions.DatasetNotFoundError as error:
        problem = "no such file or folder, and the hub has no such dataset, or a private one"
        raise InputError(f"{where}: {problem}; {local_copy}.") from error
    except ConnectionError as error:
        problem = f"no such file or folder, and the hub cannot be reached ({_short(error)})"
        raise InputError(f"{where}: {problem}; {local_copy}.") from error
    except Exception as error:  # of the reader of each format; all mean that the data cannot be read
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        problem = f"cannot be read ({type(cause).__name__}: {_short(cause)})"
        if isinstance(cause, StopIteration) or "corresponds to no data" in str(cause):  # how datasets says so
            problem = "has no rows" if path.is_file() else "a file in it has no rows"
        raise InputError(f"{where}: {problem}; {local_copy}.") from error
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in FORMATS


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
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common())
        return f"; dropped: {reasons}" if reasons else ""


def choose(source: Source, held_out: set[bytes] = frozenset(), held_out_in: str = "") -> Choice:
    """Finds unusable rows, copies, and what is held out for the file `held_out_in`. Reads everything once."""
    choice = Choice(source=source, num_read=len(source.rows))
    prompts: dict[bytes, _Copies] = {}
    for index, example in enumerate(_examples(source)):
        try:
            row = read(source.part, example)
        except UnusableRow as reason:
            choice.dropped[str(reason)] += 1
            continue
        key, answer = _digest(row.question, example.get("images") or ()), _digest(row.answer)
        copies = prompts.setdefault(key, _Copies(index, answer, count=0))
        copies.count += 1
        copies.agree &= answer == copies.answer or row.ability == "code"
    for key, copies in prompts.items():
        if not copies.agree:
            choice.dropped["repeated with different answers"] += copies.count
        elif key in held_out:
            choice.dropped[f"also in {held_out_in}.parquet"] += copies.count
        else:
            choice.dropped["repeated"] += copies.count - 1
            choice.indices.append(copies.first)
    choice.seen = set(prompts)
    choice.dropped = +choice.dropped
    if not choice.indices:
        raise source.error(f"none of the {choice.num_read:,} rows is left{choice.report()}")
    return choice


def _examples(source: Source) -> Iterator[Example]:
    with tqdm(total=len(source.rows), desc=f"Reading {source.part.name}", unit=" rows") as bar:
        for batch in source.rows.iter(BATCH):
            columns = list(batch.values())
            bar.update(len(columns[0]))
            for values in zip(*columns, strict=True):
                yield dict(zip(batch, values, strict=True))


def read(part: Part, example: Example) -> PreparedRow:
    """A row of the source as `part` reads it, if it can be used."""
    row = part.read(example)
    if not row.question or not all(message["content"] for message in row.prompt):
        raise UnusableRow("with an empty prompt")
    if not row.answer.strip():
        raise UnusableRow("with an empty answer")
    if "images" in part.columns:
        images = example["images"] or ()
        if sum(message["content"].count(IMAGE) for message in row.prompt) != len(images):
            raise UnusableRow(f"with another number of images than of {IMAGE}")
        if not all(map(_is_readable, images)):
            raise UnusableRow("with an image that cannot be read")
    return row


def _is_readable(image: Mapping[str, Any]) -> bool:
    try:
        Image.open(io.BytesIO(_content(image))).verify()
    except (OSError, SyntaxError, ValueError, TypeError):  # a missing file, and what Pillow raises
        return False
    return True


def _content(image: Mapping[str, Any]) -> bytes:
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def _digest(content: str, images: Any = ()) -> bytes:
    hashed = hashlib.sha256(" ".join(unicodedata.normalize("NFC", content).split()).encode(errors="surrogatepass"))
    for image in images:
        hashed.update(hashlib.sha256(_content(image)).digest())
    return hashed.digest()[:16]


# --- writing ---------------------------------------------------------------------------------------------------------


def write(choice: Choice, limit: int | None, folder: Path) -> tuple[Path, datasets.Dataset]:
    """Writes the chosen rows; returns the file and its rows, without images."""
    part = choice.source.part
    indices = choice.indices[:limit]
    vision = "images" in part.columns
    features = datasets.Features(FEATURES | ({"images": datasets.List(datasets.Image())} if vision else {}))
    rows = choice.source.rows.select(indices).map(
        partial(_convert, part=part, indices=indices),
        with_indices=True,
        batched=True,
        batch_size=BATCH,
        writer_batch_size=BATCH,
        remove_columns=choice.source.rows.column_names,
        features=features,
        cache_file_name=str(folder / f"{part.name}.arrow"),
        load_from_cache_file=False,
        new_fingerprint=part.name,
        desc=f"Converting {part.name}",
    )
    path = folder / f"{part.name}.parquet"
    rows.to_parquet(path)
    return path, rows.select_columns(list(FEATURES))


def _convert(batch: Mapping[str, list], places: list[int], *, part: Part, indices: list[int]) -> dict[str, list]:
    made: dict[str, list] = {name: [] for name in FEATURES}
    for place, values in zip(places, zip(*batch.values(), strict=True), strict=True):
        row = read(part, dict(zip(batch, values, strict=True)))
        made["data_source"].append(row.data_source)
        made["prompt"].append(row.prompt)
        made["ability"].append(row.ability)
        made["reward_model"].append({"style": "rule", "ground_truth": row.answer})
        made["extra_info"].append({"split": part.name, "index": indices[place], "source": part.hub})
    if "images" in part.columns:
        made["images"] = batch["images"]
    return made

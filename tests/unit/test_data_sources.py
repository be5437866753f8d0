"""What the commands of scripts/data read and where they write; what they refuse, in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from data_sources import (
    AIME,
    SCRIPTS,
    SMALL,
    dapo,
    deepscaler,
    geo3k,
    go_offline,
    gsm8k,
    hub,
    prepare,
    rows_of,
    run,
    save,
)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    go_offline(monkeypatch, tmp_path)


def refusal(capsys: pytest.CaptureFixture, name: str, *arguments: object) -> str:
    """The one line that a script says before it ends with code 2."""
    capsys.readouterr()  # the progress bars of what made the source
    try:
        code = run(name, *arguments)
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr()
    assert code == 2
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith(f"prepare.py {name}: ")
    assert said.out == ""
    return said.err


def write_json(path: Path, rows: list[dict], lines: bool) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return path


def sources(tmp_path: Path, rows: list[dict]) -> dict[str, Path]:
    made = datasets.Dataset.from_list(rows)
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=made).save_to_disk(tmp_path / "several")
    folder = save(tmp_path / "folder", {"train": rows})
    (tmp_path / "loose").mkdir()
    write_json(tmp_path / "loose" / "train.jsonl", rows, lines=True)
    return {
        "folder": folder,
        "file": folder / "data" / "train-00000-of-00001.parquet",
        "json": write_json(tmp_path / "a.json", rows, lines=False),
        "jsonl": write_json(tmp_path / "a.jsonl", rows, lines=True),
        "folder of jsonl": tmp_path / "loose",
        "save_to_disk": tmp_path / "one",
        "save_to_disk, splits": tmp_path / "several",
    }


@pytest.mark.parametrize("name", ["dapo_math", "deepscaler"])
def test_every_kind_of_source_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    row = dapo if name == "dapo_math" else deepscaler
    aime, found = save(tmp_path / "aime", {"train": AIME}), set()
    for kind, path in sources(tmp_path, [row("a", "1"), row("b", "2"), row("a", "1")]).items():
        out = tmp_path / "out" / kind
        assert run(name, "--source", str(path), "--val-source", str(aime), "--out", str(out)) == 0
        found.add((out / "train.parquet").read_bytes())
        assert len(rows_of(out / "train.parquet")) == 2
    assert len(found) == 1


def test_gsm8k_reads_the_configuration_main_of_a_clone(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    for config, answer in (("main", "#### 1"), ("socratic", "#### 2")):
        (clone / config).mkdir(parents=True)
        for split in ("train", "test"):
            rows = datasets.Dataset.from_list([gsm8k(f"{split}?", answer)])
            rows.to_parquet(clone / config / f"{split}-00000-of-00001.parquet")
    configs = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in ("train", "test"))
        for config in ("main", "socratic")
    )
    (clone / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert run("gsm8k", "--source", str(clone), "--out", str(tmp_path / "out")) == 0
    assert [row["reward_model"]["ground_truth"] for row in rows_of(tmp_path / "out" / "train.parquet")] == ["1"]


def test_the_default_folder_is_in_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "all"))
    assert run("gsm8k", "--source", str(save(tmp_path / "source", SMALL["gsm8k"][0]))) == 0
    assert sorted(path.name for path in (tmp_path / "all" / "gsm8k").iterdir()) == ["test.parquet", "train.parquet"]


def test_a_failure_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    out = prepare("gsm8k", tmp_path)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    new = save(tmp_path / "new", {"train": [gsm8k("other", "#### 9")], "test": [gsm8k("p", "#### 1")]})
    written = []

    def full(self, path, *_args, **_kwargs):
        Path(path).write_bytes(b"half")
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.Dataset, "to_parquet", full)
    capsys.readouterr()
    assert "No space left on device" in refusal(capsys, "gsm8k", "--source", new, "--out", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_command_runs_from_anywhere_and_says_what_it_did(tmp_path: Path) -> None:
    source = save(tmp_path / "source", SMALL["gsm8k"][0])
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "DATA_DIR": str(tmp_path / "d"),
    }
    command = [sys.executable, str(SCRIPTS / "prepare.py"), "gsm8k", "--source", source.name]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert lines[:2] == ["train.parquet: 1 read, 1 written", "test.parquet: 1 read, 1 written"]
    assert str(tmp_path / "d" / "gsm8k") in lines[2]
    assert "Two and two?" in ended.stdout
    assert len(rows_of(tmp_path / "d" / "gsm8k" / "train.parquet")) == 1


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_a_missing_column_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = save(tmp_path / "source", {split: [{"text": "a"}] for split in ("train", "test", "validation")})
    said = refusal(capsys, name, "--source", source, "--out", tmp_path / "out")
    assert "is missing among text" in said
    assert f"pass a copy of {hub(name)}" in said
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("deepmath", {"final_answer": 3}, "column 'final_answer' is int64, must be text"),
        ("deepscaler", {"answer": ["3"]}, "column 'answer' is list<"),
        ("dapo_math", {"prompt": "What?"}, "column 'prompt' is string, must be a list of {role, content}"),
        ("dapo_math", {"prompt": [{"text": "a"}]}, "must be a list of {role, content}"),
        ("dapo_math", {"reward_model": {"style": "rule"}}, "column 'reward_model.ground_truth' is missing"),
        ("dapo_math", {"reward_model": "3"}, "column 'reward_model.ground_truth' is missing"),
        (
            "dapo_math",
            {"reward_model": {"ground_truth": 3}},
            "column 'reward_model.ground_truth' is int64, must be text",
        ),
    ],
)
def test_a_column_of_another_type_is_named(name: str, change: dict, complaint: str, tmp_path: Path, capsys) -> None:
    source = save(tmp_path / "source", {"train": [SMALL[name][0]["train"][0] | change]})
    said = refusal(capsys, name, "--source", source, "--val-source", source, "--out", tmp_path / "out")
    assert complaint in said
    assert f"--source={source}, split 'train'" in said
    assert f"pass a copy of {hub(name)}" in said


def test_images_must_be_images(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [geo3k("<image>a", "1") | {"images": ["a.png"]}]
    path = write_json(tmp_path / "a.json", rows, lines=False)
    said = refusal(capsys, "geo3k", "--source", path, "--out", tmp_path / "out")
    assert "column 'images' is list<" in said
    assert "must be a list of images" in said


def test_the_validation_source_is_checked_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = save(tmp_path / "source", SMALL["deepmath"][0])
    said = refusal(capsys, "deepmath", "--source", source, "--val-source", source, "--out", tmp_path / "out")
    assert f"--val-source={source}, split 'train': column 'prompt' is missing" in said
    assert "pass a copy of BytedTsinghua-SIA/AIME-2024" in said


def test_a_missing_split_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = write_json(tmp_path / "train.jsonl", SMALL["gsm8k"][0]["train"], lines=True)
    for source in (save(tmp_path / "source", {"train": SMALL["gsm8k"][0]["train"]}), file):
        said = refusal(capsys, "gsm8k", "--source", source, "--out", tmp_path / "out")
        assert f"--source={source}: no split 'test' among train; a file is one split" in said
        assert "pass a folder with train.* and test.*, or a copy of openai/gsm8k." in said


def test_a_folder_with_a_file_for_each_split_is_enough(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for split, rows in SMALL["gsm8k"][0].items():
        write_json(tmp_path / "source" / f"{split}.jsonl", rows, lines=True)
    assert run("gsm8k", "--source", str(tmp_path / "source"), "--out", str(tmp_path / "out")) == 0


@pytest.mark.parametrize(("file", "content"), [("train.jsonl", ""), ("train.jsonl", "\n\n"), ("train.json", "[]")])
def test_a_file_without_rows_is_said_to_have_none(file: str, content: str, tmp_path: Path, capsys) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / file).write_text(content)
    out = ["--out", tmp_path / "out"]
    assert f"{source / file}: has no rows; pass a local" in refusal(capsys, "gsm8k", "--source", source / file, *out)
    assert f"{source}: a file in it has no rows; pass" in refusal(capsys, "gsm8k", "--source", source, *out)


@pytest.mark.parametrize("given", ["./nothing", "nothing.parquet", "a/b/c", "~/no such folder", ""])
def test_a_missing_path_is_named(given: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    said = refusal(capsys, "gsm8k", "--source", given, "--out", tmp_path / "out")
    assert f"--source={given}: no such file or folder" in said
    assert "pass a local copy of openai/gsm8k with --source" in said


@pytest.mark.parametrize("name", SMALL)
def test_without_network_a_local_copy_is_asked_for(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    said = refusal(capsys, name, "--out", tmp_path / "out")
    assert f"--source={hub(name)}: no such file or folder, and the hub cannot be reached" in said
    assert f"pass a local copy of {hub(name)} with --source" in said


def test_without_network_a_local_copy_of_validation_is_asked_for(tmp_path: Path, capsys) -> None:
    source = save(tmp_path / "source", SMALL["dapo_math"][0])
    said = refusal(capsys, "dapo_math", "--source", source, "--out", tmp_path / "out")
    assert "pass a local copy of BytedTsinghua-SIA/AIME-2024 with --val-source" in said


def test_an_unknown_name_is_said_to_be_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def unknown(name, *_args, **_kwargs):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset {name!r} doesn't exist on the Hub.\nOr is gated.")

    monkeypatch.setattr(datasets, "load_dataset", unknown)
    said = refusal(capsys, "gsm8k", "--source", "openai/gsm9k", "--out", tmp_path / "out")
    assert "--source=openai/gsm9k: no such file or folder, and the hub has no such dataset" in said


@pytest.mark.parametrize("file", ["train.json", "train.jsonl", "train.parquet"])
@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_broken_file_is_named(file: str, whole_folder: bool, tmp_path: Path, capsys) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / file).write_text('{"question": "a", "answer"')
    source = tmp_path / "source" if whole_folder else tmp_path / "source" / file
    assert "cannot be read (" in refusal(capsys, "gsm8k", "--source", source, "--out", tmp_path / "out")


def test_an_empty_folder_and_another_format_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("a")
    assert "cannot be read (" in refusal(capsys, "gsm8k", "--source", tmp_path / "empty", "--out", tmp_path / "out")
    said = refusal(capsys, "gsm8k", "--source", tmp_path / "a.txt", "--out", tmp_path / "out")
    assert "must be one of .parquet, .json, .jsonl" in said


@pytest.mark.parametrize("limit", ["0", "-3", "many"])
def test_a_limit_is_a_number_of_rows(limit: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "--limit" in refusal(capsys, "gsm8k", "--limit", limit, "--out", tmp_path / "out")


def test_an_unwritable_folder_is_named_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").touch()
    said = refusal(capsys, "gsm8k", "--source", "./nothing", "--out", tmp_path / "file" / "out")
    assert f"--out={tmp_path / 'file' / 'out'}: cannot be written to (Not a directory)" in said


def test_nothing_left_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = {"train": [gsm8k("Two?", "none")] * 2 + [gsm8k("p", "#### 1")], "test": [gsm8k("p", "#### 1")]}
    said = refusal(capsys, "gsm8k", "--source", save(tmp_path / "source", rows), "--out", tmp_path / "out")
    assert "none of the 3 rows is left; dropped: 2 without a number after ####, 1 also in test.parquet" in said
    assert not list((tmp_path / "out").iterdir())

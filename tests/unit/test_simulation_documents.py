"""What `python -m darts.simulation --json` writes is what its tables are made of."""

import json

import pytest

from darts.evidence.documents import DocumentError
from darts.simulation import comparison, documents, validation
from darts.simulation.command import main


@pytest.fixture
def trace(tmp_path):
    rows = [f"{step},{prompt},{n},{10 * prompt + n + 1}" for step in (1, 2) for prompt in range(4) for n in range(8)]
    path = tmp_path / "lengths.csv"
    path.write_text("\n".join(["step,prompt,candidate,response_length", *rows]) + "\n")
    return path


def ran(capsys, *words: object) -> str:
    assert main(list(map(str, words))) == 0
    return capsys.readouterr().out


def test_a_replay_can_be_told_again(trace, tmp_path, capsys):
    path = tmp_path / "replay.json"
    words = ["replay", trace, "--gpus", 2, 4, "--steps", 3, "--group-size", 4, "--strategy", "darts", "--json", path]
    printed = ran(capsys, *words)
    opened, rows = documents.load(path)
    assert comparison.markdown(rows) in printed
    assert opened["settings"]["command"] == ["python", "-m", "darts.simulation", *map(str, words)]
    assert opened["machine"]["cores"] >= 1
    assert all(line in printed for line in opened["about"])


def test_a_validation_can_be_told_again(trace, tmp_path, capsys):
    path, bench = tmp_path / "validation.json", tmp_path / "bench.json"
    bench.write_text(json.dumps({"steps": {"arm": ["none", "bypass"], "step_s": [4.0, 4.0]}}))
    words = ["validate", trace, "--bench", bench, "--gpus", 2, "--steps", 2, "--group-size", 4, "--json", path]
    printed = ran(capsys, *words)
    opened, rows = documents.load(path)
    assert validation.markdown(rows) in printed, "rollouts that were not measured stay unknown"
    assert opened["verdict"] == validation.verdict(rows)


def test_tables_of_a_document_are_told_as_markdown(trace, tmp_path, capsys):
    path = tmp_path / "replay.json"
    words = ["replay", trace, "--gpus", 2, 4, "--steps", 3, "--group-size", 4, "--strategy", "darts", "--json", path]
    printed = ran(capsys, *words)
    assert ran(capsys, "table", path) in printed
    one = ran(capsys, "table", path, "--gpus", 4)
    assert ("| 4 | darts |" in one, "| 2 | darts |" in one) == (True, False)
    speed_ups = ran(capsys, "table", path, "--name", "speed-ups").splitlines()
    assert speed_ups[0] == "| strategy | 2 GPUs | 4 GPUs |"
    assert speed_ups[2] == "| none | 1 | 1 |"
    assert [row.split(" | ")[0] for row in speed_ups[3:]] == ["| darts", "| oracle", "| oracle, own batches"]
    assert "| oracle | 100% | 100% |" in ran(capsys, "table", path, "--name", "gaps")
    for wrong in (["--name", "verdict"], ["--gpus", 8], ["--fast"]):
        with pytest.raises(SystemExit, match="2"):
            main(["table", str(path), *map(str, wrong)])
        assert capsys.readouterr().err.startswith("[darts] ")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "is no document of python -m darts.simulation"),
        (
            '{"format": "darts.simulation", "version": 2, "kind": "plan"}',
            "is no document of python -m darts.simulation",
        ),
        ('{"format": "darts.simulation", "version": 1, "kind": "plot"}', "is no document of one of replay, plan"),
        ('{"format": "darts.simulation", "version": 1, "kind": "plan", "rows": [{}]}', "not those of a plan"),
    ],
)
def test_what_is_no_document_is_named(tmp_path, text, told):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DocumentError, match=told) as error:
        documents.load(path)
    assert str(path) in str(error.value)

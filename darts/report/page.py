"""What a run did, as one page: `python -m darts.report RUN [--step N]` reads `darts.jsonl`, draws and explains.

Contract.
1. The input is the only `darts.jsonl` in or below RUN, or the file RUN itself; one JSON object per training step,
   `VERSION` 1. A step that is written again (a resume) replaces the one before, and all that came after that one: they
   are of weights that no longer exist. A last line that was cut off is left out with a note; any other is an error.
2. The file is read once, line by line, and of a step only what the page needs is held: some kilobytes. The page shows
   the timeline of one step, `--step` or one that is chosen at the end: of the others only the place of their line is
   held, and that step's line is read again.
3. The output is PNG figures and one `index.html` that needs nothing else. A figure without data is left out, and the
   page says why. "First" and "last" are means over the first and last tenth of the steps that have the value.
4. Time is the sum of the steps' own times, without validation: what lies between a kill and a resume does not count.
5. Errors are one line on stderr (name, value, rule, fix) and exit code 2.
"""

import argparse
import base64
import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from darts.evidence.trace import FATES, FILE, TraceError, find_file
from darts.report.run import Run, first_and_last, mean_of, read_run

if TYPE_CHECKING:
    from darts.evidence.figures import Drawn


def summary(run: Run) -> list[tuple[str, str]]:
    """The table that opens the page; what the run has not got is not a row."""

    def change(key: str, number_form: str) -> str:
        first_mean, last_mean = first_and_last(run.series(key))
        if np.isfinite(run.series(key)).sum() == 1:
            return f"{last_mean:{number_form}}, once"
        return "" if math.isnan(first_mean) else f"{first_mean:{number_form}} -> {last_mean:{number_form}}"

    def per_cent(part: float, whole: float) -> str:
        return f"{part / whole:.1%}" if whole else ""

    rollout_digests, (reward_key, _) = [step.rollout for step in run.rolled], run.reward()
    prompts = sum(sum(digest.budgets.values()) for digest in rollout_digests)
    fate_counts = sum((digest.fates for digest in rollout_digests), np.zeros(len(FATES), dtype=int))
    launched, aborted = int(fate_counts.sum()), int(fate_counts[FATES.index("a")])
    generated, kept = (int(np.nansum(run.series(f"tokens/{name}"))) for name in ("generated", "kept"))
    timed_values = [step.values for step in run.steps if {"timing_s/step", "timing_s/gen"} <= step.values.keys()]
    rollout_s, step_s = (sum(values[f"timing_s/{name}"] for values in timed_values) for name in ("gen", "step"))
    saturated_share = mean_of([share for share in run.series("darts/group/saturated_share") if math.isfinite(share)])
    step_span = f"{run.steps[0].number} to {run.steps[-1].number}"
    rows = [
        ("steps", f"{len(run.steps)} ({step_span}), {len(rollout_digests)} of them with a DARTS rollout"),
        ("prompts a step", rollout_digests and f"{prompts / len(rollout_digests):.4g}"),
        ("M' (candidates a prompt), mean", rollout_digests and f"{launched / prompts:.2f}"),
        ("tokens generated", rollout_digests and f"{generated:,}"),
        ("tokens kept", rollout_digests and f"{kept:,}"),
        ("tokens dropped", rollout_digests and f"{generated - kept:,} ({per_cent(generated - kept, generated)})"),
        ("candidates aborted", rollout_digests and f"{aborted:,} of {launched:,} ({per_cent(aborted, launched)})"),
        ("saturated groups", "" if math.isnan(saturated_share) else f"{saturated_share:.1%}"),
        ("mean length, pool", change("length/pool", ",.1f")),
        ("mean length, kept", change("length/kept", ",.1f")),
        (f"reward ({reward_key})", change(reward_key, ".3f")),
        *((key, change(key, ".3f")) for key in run.validations()[:3]),
        ("seconds a step", change("timing_s/step", ".1f")),
        ("rollout's share of the step", per_cent(rollout_s, step_s)),
        ("log-prob seconds under the rollout", change("darts/overlap/hidden_share", ".1%")),
    ]
    return [(label, value) for label, value in rows if value]


CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h2 { font-size: 1.2em; margin: 2em 0 .3em; border-top: 1px solid #ddd; padding-top: .8em }
table { border-collapse: collapse } th { text-align: left; font-weight: normal; color: #555 }
th, td { padding: .15em 1.5em .15em 0; border-bottom: 1px solid #eee }
figure { margin: 0 } img { width: 100%; height: auto } figcaption, .small { color: #444; font-size: .95em }
"""
LEGEND = (
    "Arrows go from the mean over the first to that over the last tenth of the steps. The pool is all candidates that "
    "were generated, aborted ones with the tokens they had; the kept are trained on."
)


def page(run: Run, figures: Sequence["Drawn"]) -> str:
    """One HTML document with the figures inside."""
    page_title = f"DARTS run {escape(run.name)}"
    body_lines = [f"<h1>{page_title}</h1>", "<table>"]
    body_lines += [f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in summary(run)]
    body_lines += ["</table>", *(f'<p class="small">{escape(note)}</p>' for note in (LEGEND, *run.notes))]
    for figure in figures:
        body_lines.append(f'<h2 id="{figure.name}">{escape(figure.title)}</h2>')
        if figure.png is None:
            body_lines.append(f'<p class="small">Left out: {escape(figure.caption)}</p>')
            continue
        image_source = f"data:image/png;base64,{base64.b64encode(figure.png).decode()}"
        caption_tag = f"<figcaption>{escape(figure.caption)}</figcaption>"
        body_lines.append(f'<figure><img src="{image_source}" alt="{escape(figure.title)}">{caption_tag}</figure>')
    head = ["<head>", '<meta charset="utf-8">', f"<title>{page_title}</title>", f"<style>{CSS}</style>", "</head>"]
    return "\n".join(["<!DOCTYPE html>", '<html lang="en">', *head, "<body>", *body_lines, "</body>", "</html>", ""])


def write_report(run: Run, folder: Path) -> Path:
    """Draws all figures into a folder, also as one page; returns the page. Figures of a report before are replaced."""
    from darts.evidence.figures import draw_all  # needs matplotlib
    from darts.report import figures as report_figures
    from darts.report import timeline as report_timeline

    drawn_figures = draw_all(report_figures.FIGURES | report_timeline.FIGURES, run)
    folder.mkdir(parents=True, exist_ok=True)
    for figure in drawn_figures:
        png_path = folder / f"{figure.name}.png"
        png_path.unlink(missing_ok=True)
        if figure.png is not None:
            png_path.write_bytes(figure.png)
    index_page = folder / "index.html"
    index_page.write_text(page(run, drawn_figures), encoding="utf-8")
    return index_page


def main(arguments: list[str] | None = None) -> int:
    """Writes the report and says where it is."""
    parser = argparse.ArgumentParser(prog="python -m darts.report", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help=f"folder of a run, or its {FILE}")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"where to write (default: report/ beside {FILE})")
    parser.add_argument("--step", type=int, metavar="N", help="whose timeline is drawn (default: a typical late one)")
    options = parser.parse_args(arguments)
    try:
        import matplotlib  # noqa: F401

        trace_path = find_file(options.run)
        run = read_run(trace_path, options.step)
        run.name = (trace_path.parent if options.run.is_file() else options.run).resolve().name
        index_page = write_report(run, options.out or trace_path.parent / "report")
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("no report: matplotlib must be installed, but is missing; install verl-darts[report]", file=sys.stderr)
        return 2
    except (TraceError, OSError) as error:
        print(f"no report: {error}", file=sys.stderr)
        return 2
    for name, value in summary(run):
        print(f"  {name:<38}{value}")
    print(*(f"  {note}\n" for note in run.notes), sep="", end="")
    print(f"report: {index_page}")
    return 0

"""The page of a run: a table, and PNG figures in one `index.html` that needs nothing else.

Contract: a figure without data is left out, and the page says why. "First" and "last" are means over the first and last
tenth of the steps that have the value. Time is the sum of the steps' own times, without validation: what lies between a
kill and a resume does not count.
"""

import math
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from darts.evidence.figures import Drawn, draw_all
from darts.evidence.trace import FATES
from darts.report import figures, timeline
from darts.report.run import Run, first_and_last, mean_of


def summary(run: Run) -> list[tuple[str, str]]:
    """The table that opens the page; what the run has not got is not a row."""

    def change(key: str, number_form: str) -> str:
        first_mean, last_mean = first_and_last(run.series(key))
        if np.isfinite(run.series(key)).sum() == 1:
            return f"{last_mean:{number_form}}, once"
        return "" if math.isnan(first_mean) else f"{first_mean:{number_form}} -> {last_mean:{number_form}}"

    def per_cent(part: float, whole: float) -> str:
        return f"{part / whole:.1%}" if whole else ""

    rolled, reward_key = run.rolled, run.reward()
    prompts = sum(step.rollout.budgets.total() for step in rolled)
    fate_counts = sum((step.rollout.fates for step in rolled), np.zeros(len(FATES), dtype=int))
    launched, aborted, cut = int(fate_counts.sum()), *(int(fate_counts[FATES.index(letter)]) for letter in "ac")
    trained = int(sum(fate_counts[FATES.index(letter)] for letter in "kfc"))
    generated, kept = (int(np.nansum(run.series(f"tokens/{name}"))) for name in ("generated", "kept"))
    rollout_s, step_s = (run.series(f"timing_s/{name}") for name in ("gen", "step"))
    is_timed = np.isfinite(rollout_s + step_s)
    saturated_share = mean_of([share for share in run.series("darts/group/saturated_share") if math.isfinite(share)])
    step_span = f"{run.steps[0].number} to {run.steps[-1].number}"
    rows = {"steps": f"{len(run.steps)} ({step_span}), {len(rolled)} of them with a DARTS rollout"}
    if rolled:
        rows |= {
            "prompts a step": f"{prompts / len(rolled):.4g}",
            "M' (candidates a prompt), mean": f"{launched / prompts:.2f}",
            "tokens generated": f"{generated:,}",
            "tokens kept": f"{kept:,}",
            "tokens dropped": f"{generated - kept:,} ({per_cent(generated - kept, generated)})",
            "candidates aborted": f"{aborted:,} of {launched:,} ({per_cent(aborted, launched)})",
        }
    if cut:
        rows["rows cut (trained on with a part)"] = f"{cut:,} of {trained:,} ({per_cent(cut, trained)})"
    rows |= {
        "saturated groups": "" if math.isnan(saturated_share) else f"{saturated_share:.1%}",
        "mean length, pool": change("length/pool", ",.1f"),
        "mean length, kept": change("length/kept", ",.1f"),
        f"reward ({reward_key})": change(reward_key, ".3f"),
        **{key: change(key, ".3f") for key in run.validations()[:3]},
        "seconds a step": change("timing_s/step", ".1f"),
        "rollout's share of the step": per_cent(rollout_s[is_timed].sum(), step_s[is_timed].sum()),
        "log-prob seconds under the rollout": change("darts/overlap/hidden_share", ".1%"),
    }
    return [(label, value) for label, value in rows.items() if value]


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


def page(run: Run, drawn_figures: Sequence[Drawn]) -> str:
    """One HTML document with the figures inside."""
    page_title, sections = f"DARTS run {escape(run.name)}", []
    for figure in drawn_figures:
        content = f'<p class="small">Left out: {escape(figure.caption)}</p>'
        if figure.png is not None:
            image = f'<img src="data:image/png;base64,{b64encode(figure.png).decode()}" alt="{escape(figure.title)}">'
            content = f"<figure>{image}<figcaption>{escape(figure.caption)}</figcaption></figure>"
        sections += [f'<h2 id="{figure.name}">{escape(figure.title)}</h2>', content]
    rows = [f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in summary(run)]
    notes = [f'<p class="small">{escape(note)}</p>' for note in (LEGEND, *run.notes)]
    head = ["<head>", '<meta charset="utf-8">', f"<title>{page_title}</title>", f"<style>{CSS}</style>", "</head>"]
    body = ["<body>", f"<h1>{page_title}</h1>", "<table>", *rows, "</table>", *notes, *sections, "</body>"]
    return "\n".join(["<!DOCTYPE html>", '<html lang="en">', *head, *body, "</html>", ""])


def write_report(run: Run, folder: Path) -> Path:
    """Draws all figures into a folder, also as one page; returns the page. Figures of a report before are replaced."""
    drawn_figures = draw_all(figures.FIGURES | timeline.FIGURES, run)
    folder.mkdir(parents=True, exist_ok=True)
    for figure in drawn_figures:
        (folder / f"{figure.name}.png").unlink(missing_ok=True)
        if figure.png is not None:
            (folder / f"{figure.name}.png").write_bytes(figure.png)
    index_page = folder / "index.html"
    index_page.write_text(page(run, drawn_figures), encoding="utf-8")
    return index_page

"""What a run did, as one page: `python -m darts.report RUN [--step N]` reads `darts.jsonl`, draws and explains.

Contract: the trace is read once, line by line, as `darts.evidence.trace` says, and of a step only some kilobytes are
held, which the page needs; the line of the step whose timeline is shown is read again. Errors are one line on stderr
(name, value, rule, fix) and exit code 2.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from darts.evidence.trace import FILE, TraceError, find_file
from darts.report.run import read_run


def main(arguments: list[str] | None = None) -> int:
    """Writes the report and says where it is."""
    parser = argparse.ArgumentParser(prog="python -m darts.report", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help=f"folder of a run, or its {FILE}")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"where to write (default: report/ beside {FILE})")
    parser.add_argument("--step", type=int, metavar="N", help="whose timeline is drawn (default: a typical late one)")
    options = parser.parse_args(arguments)
    try:
        if find_spec("matplotlib") is None:
            raise TraceError("matplotlib must be installed, but is missing; install verl-darts[report]")
        from darts.report.page import summary, write_report

        trace_path = find_file(options.run)
        run = read_run(trace_path, options.step)
        run.name = (trace_path.parent if options.run.is_file() else options.run).resolve().name
        index_page = write_report(run, options.out or trace_path.parent / "report")
    except (TraceError, OSError) as error:
        print(f"no report: {error}", file=sys.stderr)
        return 2
    for name, value in summary(run):
        print(f"  {name:<38}{value}")
    print(*(f"  {note}\n" for note in run.notes), sep="", end="")
    print(f"report: {index_page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write docs/benchmarks.md: every table and figure of it from the JSON files in benchmarks/results.

The page's text is ``report.md.jinja`` beside this script. It contains no measured figure: it reads them from the files
that the benchmark scripts write, and from files transcribed from earlier documentation, which state that. Run this
script after a benchmark has written new figures (``make bench`` does); a test compares the page with the files.

    python benchmarks/report.py [--check] [--results DIR] [--page FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from decimal import Decimal
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError

HERE = Path(__file__).parent
TEMPLATE = "report.md.jinja"
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "benchmarks.md"


class ReportError(Exception):
    """The page cannot be rendered; the message names the file and the fix."""


def fixed(value: Decimal | int, places: int) -> str:
    """A fixed number of decimal places: 0.859."""
    return f"{float(value):.{places}f}"


def percent(share: Decimal | int, places: int = 0) -> str:
    """A share as a percentage: 0.9975 → "99.8 %" with one place."""
    return f"{100 * float(share):.{places}f} %"


def scientific(value: Decimal | int) -> str:
    """A small figure with the digits it has in the file: "4.0e-2"; from 0.1 up as a plain decimal."""
    number = Decimal(value)
    if abs(number) >= Decimal("0.1"):
        return f"{number:f}"
    exponent = number.adjusted()
    return f"{number.scaleb(-exponent):f}e{exponent}"


def read_results(path: Path) -> dict:
    """One file of figures. Fractions become ``Decimal``, which keeps their digits as written (4.0e-2).

    Raises:
        ReportError: the file does not exist or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
    except FileNotFoundError as error:
        raise ReportError(
            f"{path} does not exist: run the benchmark that writes it, or restore the file."
        ) from error
    except ValueError as error:
        raise ReportError(f"{path} is not JSON ({error}): restore the file or run its benchmark.") from error


def render(results: Path = RESULTS) -> str:
    """The page as Markdown, from the files in the folder ``results``.

    Raises:
        ReportError: a file is missing or not JSON, or lacks a figure that the page shows.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(fixed=fixed, percent=percent, scientific=scientific)
    environment.globals["results"] = lambda name: read_results(results / name)
    try:
        return environment.get_template(TEMPLATE).render()
    except UndefinedError as error:
        raise ReportError(
            f"{TEMPLATE} names a figure that the files in {results} lack ({error}): "
            "run the benchmark again or correct the template."
        ) from error


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail when the page is not current"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--page", type=Path, default=PAGE, help="Markdown file to write or to check")
    options = parser.parse_args()
    try:
        page = render(options.results)
    except ReportError as error:
        sys.exit(f"report.py: {error}")
    if not options.check:
        options.page.write_text(page, encoding="utf-8")
        print(f"written to {options.page}")
    elif not options.page.exists() or options.page.read_text(encoding="utf-8") != page:
        sys.exit(
            f"report.py: {options.page} does not match the figures in {options.results}: "
            "run `python benchmarks/report.py` and commit the page."
        )


if __name__ == "__main__":
    main()

"""Whether results, sources and report still belong together: everything that can be computed again is."""

import html.parser
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pandas as pd

from skipfold.errors import DataError, SkipfoldError, StoreError, VerificationError, first_line
from skipfold.replication import claims, config, experiments, provenance, statistics
from skipfold.replication.store import read_archive
from skipfold.replication.tables import read_table
from skipfold.replication.trial import Trial

PUBLISHED_SHA256 = Path("results") / "published" / "SHA256SUMS"
"""Checksums of the published tables, beside them, from the repository's root."""


def verify(results: str | Path, settings: config.Config | None = None) -> None:
    """Print a line a problem of `check`, and raise VerificationError if there is one."""
    problems = check(results, settings)
    for problem in problems:
        print(f"verify: {problem}")
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise VerificationError(
            f"verify: {count} in {results}; delete what was changed by hand, `snakemake reproduce` makes it anew"
        )
    print(f"verify: {results}: results, sources and report belong together")


def check(results: str | Path, settings: config.Config | None = None) -> list[str]:
    """Every way in which the results of a tier do not fit together, one line each; empty where all is well.

    Trials are compared with the configuration `settings` (None: that of the tier that the folder is named after),
    tables with the records in trials.jsonl.gz, verdicts with the tables and claims, the page with its files. Dates,
    commits and timings are not computed again, nor is any trial trained again.
    """
    results = Path(results)
    if not (results / "report.html").is_file():
        return [f"{results}: report.html is missing"]
    problems = list(_told(str(PUBLISHED_SHA256), _published()))
    try:
        settings = settings or config.load(results.name)
    except SkipfoldError as error:
        problems.append(str(error))
    records, found = _records(results)
    problems += found
    if settings is not None:
        problems += _told("provenance.json", _tier(results, settings))
    for path in sorted((results / "tables").glob("*_trials.csv")):
        problems += _told(f"tables/{path.name}", _experiment(path, records, settings))
    problems += _told("tables/timing.csv", _savings(results / "tables" / "timing.csv"))
    problems += _told("verdicts.csv", _verdicts(results))
    problems += _told("report.html", _page(results))
    return problems


def _told(name: str, problems: Iterable[str]) -> Iterator[str]:
    """`problems`, and as one more that they cannot be found because of what the file `name` holds."""
    try:
        yield from problems
    except (SkipfoldError, OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        yield f"{name}: cannot be checked ({type(error).__name__}: {first_line(error)})"


def _published() -> Iterator[str]:
    """The published tables are those that were read from the paper's figures."""
    sums = config.root() / PUBLISHED_SHA256
    for line in sums.read_text().splitlines():
        digest, name = line.split()
        path = sums.with_name(name)
        if not path.is_file():
            yield f"published/{name} is missing"
        elif provenance.sha256(path) != digest:
            yield f"published/{name} is not what was read from the paper: see {PUBLISHED_SHA256}"


def _records(results: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The packed records by digest; a digest must be that of the description beside it."""
    try:
        records = read_archive(results / "trials.jsonl.gz")
    except StoreError as error:
        return {}, [str(error)]
    try:
        wrong = [r["digest"] for r in records if Trial.from_description(r["trial"]).digest != r["digest"]]
    except (KeyError, TypeError, SkipfoldError) as error:
        return {}, [f"trials.jsonl.gz: a line is not the record of a trial ({error})"]
    problems = [f"trials.jsonl.gz: record {digest} does not fit its description" for digest in wrong]
    return {record["digest"]: record for record in records}, problems


def _tier(results: Path, settings: config.Config) -> Iterator[str]:
    path = results / "provenance.json"
    tier = json.loads(path.read_text()).get("tier") if path.is_file() else None
    if tier != settings["tier"]:
        yield f"provenance.json: tier is {tier}, the configuration says {settings['tier']}"
    for name in settings["experiments"]:
        if not (results / "tables" / f"{name}_trials.csv").is_file():
            yield f"tables/{name}_trials.csv is missing; the configuration has this experiment"


def _experiment(path: Path, records: dict[str, dict[str, Any]], settings: config.Config | None) -> Iterator[str]:
    """A table of trials is that of its records and of the configuration; the tables made from it follow from it."""
    name = path.stem.removesuffix("_trials")
    table = read_table(path)
    held = list(dict.fromkeys(table["digest"]))
    if settings is not None and name in settings["experiments"]:
        wanted = {trial.digest for trial in experiments.trials(settings, name)}
        if wanted != set(held):
            yield (
                f"tables/{path.name}: not the trials of the configuration ({len(wanted - set(held))} missing, "
                f"{len(set(held) - wanted)} others)"
            )
    if missing := [digest for digest in held if digest not in records]:
        yield f"tables/{path.name}: {len(missing)} of {len(held)} trials are not in trials.jsonl.gz"
        return
    tier = table["tier"].iloc[0]
    trials = statistics.tidy([records[digest] for digest in held], "" if pd.isna(tier) else tier)
    yield from _differences(path, trials, "the records in trials.jsonl.gz")
    yield from _differences(path.with_name(f"{name}.csv"), statistics.aggregate(trials), f"{name}_trials.csv")
    if name == "linear_comparison":
        certificates = path.with_name("certificates.csv")
        yield from _differences(certificates, statistics.certificates(trials), f"{name}_trials.csv")


def _savings(timing: Path) -> Iterator[str]:
    if timing.is_file():
        savings = statistics.savings(read_table(timing))
        yield from _differences(timing.with_name("savings.csv"), savings, "timing.csv")


def _verdicts(results: Path) -> Iterator[str]:
    yield from _differences(results / "verdicts.csv", claims.judge(results), "the tables and config/claims.yaml")


def _differences(path: Path, wanted: pd.DataFrame, source: str) -> Iterator[str]:
    """At most one line: whether the table at `path` is `wanted`, to a rounding error."""
    name = path.name if path.name == "verdicts.csv" else f"tables/{path.name}"
    if not path.is_file():
        yield f"{name} is missing"
        return
    try:
        held = read_table(path)
    except DataError as error:
        yield f"{name}: cannot be read ({error})"
        return
    if list(held.columns) != list(wanted.columns):
        yield f"{name}: its columns are not those computed from {source}"
    elif len(held) != len(wanted):
        yield f"{name}: {len(held)} rows, {len(wanted)} computed from {source}"
    else:
        wrong = [column for column in held if not _equal(held[column], wanted[column])]
        if wrong:
            yield f"{name}: {', '.join(wrong)} differ from what {source} gives"


def _equal(held: pd.Series, wanted: pd.Series) -> bool:
    """Numbers to 1e-9, everything else as text; what is empty on one side is empty on the other."""
    texts = [*_texts(held)], [*_texts(wanted)]
    try:
        numbers = [[float(text or "nan") for text in column] for column in texts]
    except ValueError:
        return texts[0] == texts[1]
    return bool(np.allclose(*numbers, rtol=1e-9, atol=1e-12, equal_nan=True))


def _texts(column: pd.Series) -> Iterable[str]:
    return ("" if pd.isna(value) else str(value) for value in column)


class _Page(html.parser.HTMLParser):
    """Links, ids and stamped checksums of a page, and what it would fetch from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.checksums: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("id"):
            self.ids.add(given["id"])
        for key in ("href", "src"):
            if given.get(key):
                self.links.append(given[key])
        if given.get("data-file"):
            self.checksums[given["data-file"]] = given.get("data-sha256") or ""


def _page(results: Path) -> Iterator[str]:
    """Every link of the page resolves, and every file behind it is the one that it was built from."""
    page = _Page()
    page.feed((results / "report.html").read_text(encoding="utf-8"))
    for link in dict.fromkeys(page.links):
        parts = urlsplit(link)
        if parts.scheme == "data":
            continue
        if parts.scheme or parts.netloc:
            yield f"report.html: {link} leaves the results"
        elif not parts.path:
            if parts.fragment not in page.ids:
                yield f"report.html: link #{parts.fragment} leads nowhere"
        elif not (results / unquote(parts.path)).exists():
            yield f"report.html: link {link} leads nowhere"
    present = provenance.checksums(results)
    for name in dict.fromkeys([*page.checksums, *present]):
        if name not in page.checksums:
            yield f"report.html: {name} was not there when it was built"
        elif name not in present:
            yield f"report.html: {name} is missing"
        elif page.checksums[name] != present[name]:
            yield f"report.html: {name} has changed since it was built"

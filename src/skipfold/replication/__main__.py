"""The command line of the workflow: what its rules run, and what carries records from one machine to another."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from skipfold.commands import run
from skipfold.errors import ConfigError
from skipfold.keys import parse

# torch takes seconds to import: each command imports what it needs.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives its exit status, see `skipfold.commands.run`."""
    return run(_parser(), arguments, "stopped; finished trials are stored, the next run goes on from there")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m skipfold.replication", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(run, name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    def configured(run, name: str, text: str) -> argparse.ArgumentParser:
        added = command(run, name, text)
        added.add_argument("--tier", help="a file in config/, or auto; default: as config/config.yaml says")
        added.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE", help="other values of keys")
        return added

    train = configured(_train, "train", "train the trials of an experiment that are not stored yet")
    train.add_argument("experiment")
    train.add_argument("--shard", default="1/1", metavar="I/N", help="only the I-th of N parts")
    times = configured(_time, "time", "time prediction, and count what it computes and moves")
    times.add_argument("tables", type=Path, help="folder for timing.csv, runtimes.csv and roofline.csv")
    notebook = command(_notebook, "notebook", "run a notebook through papermill")
    notebook.add_argument("notebook", type=Path)
    notebook.add_argument("output", type=Path)
    notebook.add_argument("--log", type=Path, default=Path("logs"), help="where it runs; a failed one stays there")
    notebook.add_argument("-p", nargs="+", default=[], metavar="KEY=VALUE", dest="parameters", help="its parameters")
    configured(_check, "check", "check data, device and folders")
    configured(_where, "where", "the place of a tier's report")
    configured(_quote, "quote", "trials still to run, with their time and disk")
    judge = command(_judge, "judge", "write verdicts.csv from a tier's tables")
    page = command(_report, "report", "write report.html from a tier's results")
    for each in (judge, page):
        each.add_argument("results", type=Path, help="for example results/smoke")
    verify = configured(_verify, "verify", "fail if results, sources and report do not belong together")
    verify.add_argument("results", type=Path)
    pack = configured(_pack, "pack", "write the stored records of a tier as one file")
    pack.add_argument("archive", type=Path)
    unpack = configured(_unpack, "unpack", "put the records of such a file into the store")
    unpack.add_argument("archive", type=Path)
    return parser


def _settings(given: argparse.Namespace) -> dict:
    from skipfold.replication import config

    return config.load(given.tier, parse(given.config))


def _train(given: argparse.Namespace) -> None:
    from skipfold.replication.records import records

    first, slash, parts = given.shard.partition("/")
    if not (slash and first.isdecimal() and parts.isdecimal() and 1 <= int(first) <= int(parts)):
        raise ConfigError(f"shard: {given.shard!r} given; i/n with 1 <= i <= n is allowed")
    records(_settings(given), given.experiment, (int(first), int(parts)))


def _time(given: argparse.Namespace) -> None:
    from skipfold import files
    from skipfold.replication import study
    from skipfold.replication.tables import write_table

    settings = _settings(given)
    files.writable(given.tables)
    measured = study.times(settings)
    given.tables.mkdir(parents=True, exist_ok=True)
    for name, table in measured.items():
        write_table(table, given.tables / f"{name}.csv")


def _notebook(given: argparse.Namespace) -> None:
    from skipfold.replication.execute import execute

    execute(given.notebook, given.output, parse(given.parameters), given.log)


def _check(given: argparse.Namespace) -> None:
    from skipfold.replication.records import check

    check(_settings(given))


def _where(given: argparse.Namespace) -> None:
    from skipfold.replication import config

    settings = config.read(given.tier, parse(given.config))
    page = config.folder(settings) / settings["tier"] / "report.html"
    if not page.is_file():
        raise ConfigError(f"{page} is not there; make reproduce TIER={settings['tier']} makes it")
    print(f"The report is in {page.absolute()}")


def _quote(given: argparse.Namespace) -> None:
    from skipfold.replication.quote import quote

    print(quote(_settings(given)))


def _pack(given: argparse.Namespace) -> None:
    from skipfold.replication import experiments

    settings = _settings(given)
    trials = [trial for name in experiments.names(settings) for trial in experiments.trials(settings, name)]
    packed = _store(settings).pack(given.archive, dict.fromkeys(trials))
    print(f"{packed} records in {given.archive}")


def _unpack(given: argparse.Namespace) -> None:
    added = _store(_settings(given)).unpack(given.archive)
    print(f"{added} records added")


def _store(settings: dict):
    from skipfold.replication import config
    from skipfold.replication.store import Store

    return Store(config.folder(settings, "store"))


def _judge(given: argparse.Namespace) -> None:
    from skipfold.replication import claims
    from skipfold.replication.tables import write_table

    if not (given.results / "tables").is_dir():
        raise ConfigError(f"results: {given.results} has no tables; run `snakemake reproduce` first")
    write_table(claims.judge(given.results), given.results / "verdicts.csv")


def _report(given: argparse.Namespace) -> None:
    from skipfold.replication import report

    print(report.build(given.results))


def _verify(given: argparse.Namespace) -> None:
    from skipfold.replication import verify

    verify.verify(given.results, _settings(given) if given.tier or given.config else None)


if __name__ == "__main__":
    sys.exit(main())

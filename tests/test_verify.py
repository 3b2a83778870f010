"""verify finds each way in which results, sources and report can come apart, and nothing where they fit."""

import gzip
import json
import shutil

import pytest
from small_results import settings

from skipfold.errors import VerificationError
from skipfold.replication import report, verify
from skipfold.replication.config import published_folder
from skipfold.replication.tables import read_table, write_table


def problems(results):
    return verify.check(results, settings())


def change(path, column, value):
    table = read_table(path)
    table.loc[table.index[0], column] = value
    write_table(table, path)


def test_untouched_results_belong_together(results, capsys):
    assert problems(results) == []
    verify.verify(results, settings())
    assert "belong together" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "column", "said"),
    [
        ("linear_comparison_trials", "val_accuracy", "trials.jsonl.gz"),
        ("linear_comparison", "mean", "linear_comparison_trials.csv"),
        ("linear_comparison", "low", "linear_comparison_trials.csv"),
        ("certificates", "residual", "linear_comparison_trials.csv"),
    ],
)
def test_a_changed_number_is_found(results, name, column, said):
    change(results / "tables" / f"{name}.csv", column, 0.123)
    report.build(results)  # so that the checksums on the page are the new ones
    found = [line for line in problems(results) if line.startswith(f"tables/{name}.csv")]
    assert len(found) == 1 and column in found[0] and said in found[0]


def test_a_changed_verdict_is_found(results):
    change(results / "verdicts.csv", "verdict", "reproduced")
    report.build(results)
    assert problems(results) == ["verdicts.csv: verdict differ from what the tables and config/claims.yaml gives"]


def test_an_emptied_text_is_found(results):
    table = read_table(results / "verdicts.csv")
    table["remark"] = None
    write_table(table, results / "verdicts.csv")
    report.build(results)
    assert any(line.startswith("verdicts.csv: remark differ") for line in problems(results))


@pytest.mark.parametrize("name", ["figures/linear_comparison.svg", "figures/linear_comparison.png"])
def test_a_changed_figure_is_found(results, name):
    with (results / name).open("ab") as file:
        file.write(b" ")
    assert problems(results) == [f"report.html: {name} has changed since it was built"]


def test_a_removed_file_is_found(results):
    (results / "figures" / "linear_comparison.svg").unlink()
    (results / "notebooks" / "accuracy_vs_t_cnn3.ipynb").unlink()
    found = "\n".join(problems(results))
    assert "figures/linear_comparison.svg is missing" in found
    assert "link notebooks/accuracy_vs_t_cnn3.ipynb leads nowhere" in found


def test_a_changed_record_is_found(results):
    archive = results / "trials.jsonl.gz"
    records = [json.loads(line) for line in gzip.decompress(archive.read_bytes()).splitlines()]
    records[0]["trial"]["epochs"] = 3
    archive.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    assert f"trials.jsonl.gz: record {records[0]['digest']} does not fit its description" in problems(results)


def test_missing_records_are_found(results):
    archive = results / "trials.jsonl.gz"
    lines = gzip.decompress(archive.read_bytes()).splitlines(keepends=True)
    archive.write_bytes(gzip.compress(b"".join(lines[1:])))
    assert any("1 of" in line and "not in trials.jsonl.gz" in line for line in problems(results))
    archive.unlink()
    assert any("not a readable archive" in line for line in problems(results))


def test_another_configuration_is_found(results):
    other = settings()
    other["experiments"]["accuracy_vs_t_cnn3"]["t"] = [0.0, 0.5]
    found = verify.check(results, other)
    assert found == ["tables/accuracy_vs_t_cnn3_trials.csv: not the trials of the configuration (0 missing, 2 others)"]
    other["tier"] = "quick"
    assert any("tier is smoke, the configuration says quick" in line for line in verify.check(results, other))


def test_another_configuration_is_found_where_records_are_missing_too(results):
    other = settings()
    other["experiments"]["accuracy_vs_t_cnn3"]["t"] = [0.0, 0.5]
    path = results / "tables" / "accuracy_vs_t_cnn3_trials.csv"
    configured, missing = verify._experiment(path, {}, other)
    assert "0 missing, 2 others" in configured and "6 of 6 trials are not in trials.jsonl.gz" in missing


def test_published_points_are_guarded(results, monkeypatch, tmp_path):
    copy = shutil.copytree(published_folder(), tmp_path / "published")
    monkeypatch.setattr(verify, "PUBLISHED_SHA256", copy / "SHA256SUMS")
    assert list(verify._published()) == []
    change(copy / "linear_comparison.csv", "val_accuracy", 0.99)
    (copy / "schedule_comparison.csv").unlink()
    found = "\n".join(verify._published())
    assert "linear_comparison.csv is not what was read" in found and "schedule_comparison.csv is missing" in found


def test_damaged_files_are_found_and_hide_no_other(results):
    damaged = {
        "provenance.json": "{",
        "tables/linear_comparison.csv": "",
        "tables/accuracy_vs_t_cnn3_trials.csv": "a,b\n1,2\n",
        "tables/timing.csv": "a\n1\n",
        "verdicts.csv": "",
    }
    for name, text in damaged.items():
        (results / name).write_text(text)
    found = problems(results)
    assert all("\n" not in line for line in found)
    told = [line.partition(": ")[0] for line in found if ": cannot be " in line]
    assert sorted(told) == sorted(damaged) and any("has changed since it was built" in line for line in found)


def test_a_removed_table_of_verdicts_is_found_and_hides_no_other(results):
    (results / "verdicts.csv").unlink()
    (results / "figures" / "linear_comparison.svg").unlink()
    found = problems(results)
    assert "verdicts.csv is missing" in found and "report.html: figures/linear_comparison.svg is missing" in found


def test_no_page_is_said(tmp_path):
    assert verify.check(tmp_path) == [f"{tmp_path}: report.html is missing"]


def test_verify_ends_in_an_error_after_a_line_a_problem(results, capsys):
    (results / "figures" / "linear_comparison.svg").unlink()
    with pytest.raises(VerificationError, match="snakemake reproduce"):
        verify.verify(results, settings())
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(line.startswith("verify: ") for line in lines)

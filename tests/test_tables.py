"""tables: read as they were written, whole or not there, and what is wrong with a damaged one."""

from types import SimpleNamespace

import pandas as pd
import pytest

from skipfold.errors import DataError
from skipfold.replication import tables
from skipfold.replication.tables import read_table, write_table

MEANS = pd.DataFrame(
    {"experiment": ["any"] * 2, "arm": "a", "network": "cnn3", "t": [0.1, None], "split": "val", "epoch": [1, 2]}
    | {"mean": [1 / 3, 0.25], "low": [0.1, None], "high": [0.5, None], "n": [3, 1], "tier": "smoke"}
)


def test_a_table_is_read_as_it_was_written(tmp_path):
    write_table(MEANS, tmp_path / "linear_comparison.csv")
    again = read_table(tmp_path / "linear_comparison.csv")
    pd.testing.assert_frame_equal(again, MEANS, check_exact=True, check_dtype=False)


@pytest.mark.parametrize("text", ["None", "nan", "NA", "1.0"])
def test_a_text_is_read_as_it_is(tmp_path, text):
    """An alternative of train_images may be None, which is all of them."""
    row = dict.fromkeys([name.strip("*") for name in tables.NEEDED["sensitivity"].split()], 1) | {"alternative": text}
    write_table(pd.DataFrame([row]), tmp_path / "sensitivity.csv")
    assert read_table(tmp_path / "sensitivity.csv")["alternative"].tolist() == [text]


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("linear_comparison", lambda text: b"", "cannot be read (No columns to parse from file); delete it"),
        ("linear_comparison", lambda text: b"\xff\xfe\x00\n", "cannot be read ('utf-8' codec"),
        ("linear_comparison", lambda text: text[:-20], "its last line is cut off"),
        ("linear_comparison", lambda text: text[: text.index(b"\n") + 1], "no rows; delete it"),
        ("linear_comparison", lambda text: text.replace(b",mean,", b",meen,"), "column mean is missing"),
        ("linear_comparison", lambda text: text.replace(b",t,", b",s,"), "column t is missing"),
        ("linear_comparison", lambda text: text.replace(b",0.25,", b",o.25,"), "column mean holds 'o.25', which is no"),
        ("linear_comparison", lambda text: text.replace(b",0.25,", b",,"), "column mean has an empty cell"),
        ("accuracy_vs_t_cnn3_trials", lambda text: b"a\n1\n", "(rule accuracy_vs_t)"),
        ("savings", lambda text: b"", "(rule timing)"),
        ("verdicts", lambda text: b"", "(rule judge_claims)"),
    ],
)
def test_a_damaged_table_is_one_line_that_says_what_makes_it_again(tmp_path, name, damage, said):
    path = tmp_path / f"{name}.csv"
    write_table(MEANS, path)
    assert name != "linear_comparison" or len(read_table(path))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError) as error:
        read_table(path)
    assert str(error.value).startswith(f"{path}: ") and said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("samples", "said"), [("1.5 2 3e-05", None), ("1.5 x", "holds '1.5 x'"), ("", "empty cell")])
def test_samples_of_a_timing_are_numbers(tmp_path, samples, said):
    columns = [name.strip("*") for name in tables.NEEDED["timing"].split()]
    row = dict.fromkeys(columns, 1) | {"samples_us": samples}
    write_table(pd.DataFrame([row]), tmp_path / "timing.csv")
    if said is None:
        assert read_table(tmp_path / "timing.csv")["samples_us"].tolist() == [samples]
    else:
        with pytest.raises(DataError, match=said):
            read_table(tmp_path / "timing.csv")


def test_a_table_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("before")
    with pytest.raises(RuntimeError):
        write_table(SimpleNamespace(to_csv=_half), path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def _half(path, index):
    path.write_text("ha")
    raise RuntimeError

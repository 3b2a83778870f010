"""The page: valid enough, self-contained, linked, and true to its tables; also where results are partial."""

import base64
import gzip
import html.parser
from urllib.parse import unquote, urlsplit

import pandas as pd
import pytest

from skipfold.errors import ConfigError, SkipfoldError
from skipfold.replication import claims, experiments, figures, report
from skipfold.replication.tables import read_table, write_table

VOID = {"meta", "img", "br", "link", "hr", "input"}
STAMP = {"tier": "smoke", "device": "CPU (any, 1 thread)", "torch": "2", "date": "2026-01-01"}


class Page(html.parser.HTMLParser):
    """Elements, balanced; texts; ids."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.ids, self.texts = [], [], [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> where another is open"

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def read(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_every_link_resolves_and_none_leaves(made):
    page = read(made)
    links = [attrs["href"] for attrs in page.all("a")]
    assert len(links) > 30
    for link in links:
        parts = urlsplit(link)
        assert not parts.scheme and not parts.netloc, link
        assert (made / unquote(parts.path)).is_file() if parts.path else parts.fragment in page.ids, link


def test_nothing_is_fetched(made):
    page = read(made)
    assert not {"script", "link", "iframe", "object", "source"} & {tag for tag, _ in page.elements}
    assert all(attrs["src"].startswith("data:image/svg+xml;base64,") for attrs in page.all("img"))
    text = (made / "report.html").read_text()
    assert "@import" not in text and "url(" not in text


def test_figures_are_whole_and_described(made):
    images = read(made).all("img")
    assert len(images) == 2
    for image, name in zip(images, ("linear_comparison", "accuracy_vs_t_cnn3"), strict=True):
        held = base64.b64decode(image["src"].split(",")[1])
        assert held == (made / "figures" / f"{name}.svg").read_bytes()
        assert len(image["alt"]) > 40
    last = read_table(made / "tables" / "linear_comparison.csv")
    last = last[(last["split"] == "val") & (last["epoch"] == 2) & (last["arm"] == "cnn3")]["mean"].iloc[0]
    assert f"cnn3 {last:.4f}" in images[0]["alt"]


def test_ids_are_unique_and_tables_are_labelled(made):
    page = read(made)
    assert len(set(page.ids)) == len(page.ids)
    assert len(page.all("table")) == len(page.all("caption"))
    assert all("scope" in attrs for attrs in page.all("th"))


def test_every_check_is_on_the_page_with_its_verdict(made):
    page = read(made)
    verdicts = read_table(made / "verdicts.csv")
    assert set(verdicts["id"]) <= set(page.ids)
    for verdict, count in verdicts["verdict"].value_counts().items():
        assert f"{count} {report.LOOKS[verdict].sign} {verdict}" in page.text


def test_the_stamp_and_the_absent_are_named(made):
    page = read(made)
    for part in ("tier smoke", "say nothing about the paper", "10 trials"):
        assert part in page.text, part
    assert "Prediction was not timed" in page.text
    assert "Not among these results: Static and scheduled skip strength" in page.text


def test_numbers_come_from_the_tables(results):
    table = read_table(results / "tables" / "linear_comparison.csv")
    table.loc[table["arm"] == "perceptron", "mean"] = 0.12345
    write_table(table, results / "tables" / "linear_comparison.csv")
    report.build(results)
    assert "0.1235 (epoch 2)" in read(results).text


def test_verdicts_are_shown_with_interval_and_overall(results):
    assert "No claim is judged at this tier" in read(results).text
    verdicts = read_table(results / "verdicts.csv").astype({"remark": object, "interval": object})
    rows = verdicts["claim"] == "linear_networks"
    verdicts.loc[rows, ["verdict", "ours", "low", "high", "n", "interval"]] = [
        claims.INCONCLUSIVE, 0.91, 0.905, 0.9151, 5, claims.BOOTSTRAP,
    ]  # fmt: skip
    verdicts.loc[verdicts["id"] == "perceptron_accuracy", "verdict"] = claims.REPRODUCED
    verdicts.loc[verdicts["id"] == "skips_removed_exact", ["verdict", "ours"]] = [claims.REPRODUCED, 0.0]
    write_table(verdicts, results / "verdicts.csv")
    report.build(results)
    text = read(results).text
    assert "1 of the 7 claims are judged" in text
    # The central check's, with the others beside it.
    assert "± inconclusive 1 of 4 checks reproduced, 3 inconclusive The 3-layer linear CNN" in text
    assert "ours 0.91000 (95 % interval 0.9050 to 0.9151), published 0.915; counts as reproduced: 0.91 to 0.92." in text
    assert (
        "Of the 2 checks that are reproduced, 1 is of what no fit decides" in text and "or times; 1 are fitted" in text
    )


def timings():
    rows = [("resnet18", "skips", 100.0), ("resnet18", "skips_removed", 70.0), ("perceptron", "perceptron", 2.0)]
    frame = pd.DataFrame(rows, columns=["network", "variant", "median_us"])
    return frame.assign(runtime="eager", precision="float32", batch=64, measure="host", max_difference=1e-6, **STAMP,
                        q1_us=frame["median_us"] - 1, q3_us=frame["median_us"] + 1,
                        samples_us=[5 * "100 " + "100", 5 * "70 " + "77", 5 * "2 " + "2"])  # fmt: skip


def test_times_of_a_cpu_are_said_to_be_so(results):
    write_table(timings(), results / "tables" / "timing.csv")
    figures.save(figures.timing(timings()), results / "figures" / "timing")
    report.build(results)
    text = read(results).text
    assert "Timed on a CPU" in text and "ResNet18: skips removed 70.0 69.0–71.0 saves 30.0 %" in text
    with_and_without = "100 skips with t; eager 70.0 skips removed; eager"
    assert f"skips removed 64 float32 30.0 % 23.0 % to 30.0 % {with_and_without} 30.0 % 23.0 % to 30.0 %" in text
    unlike = timings().replace({"variant": {"skips_removed": "cropped"}})
    write_table(unlike, results / "tables" / "timing.csv")
    report.build(results)
    assert "30.0 % 23.0 % to 30.0 % – 70.0 removed, folded, cropped; eager –" in read(results).text
    write_table(timings().assign(device="GPU"), results / "tables" / "timing.csv")
    report.build(results)
    assert "Timed on a CPU" not in read(results).text


def test_times_of_a_gpu_have_a_table_each_way_and_say_what_is_missing(results):
    device = timings().assign(measure="device", precision="tf32", median_us=[90.0, 60.0, 1.0])
    table = pd.concat([timings().assign(precision="tf32"), device])
    absent = pd.DataFrame([("eager", "tf32", None), ("onnxruntime", "tf32", "no provider")])
    write_table(table.assign(device="GPU"), results / "tables" / "timing.csv")
    write_table(
        absent.set_axis(["runtime", "precision", "remark"], axis=1).assign(**STAMP), results / "tables" / "runtimes.csv"
    )
    report.build(results)
    text = read(results).text
    assert "Batch 64, wall-clock time, as published Network eager ResNet18: skips with t 100" in text
    assert "Batch 64, device time, as published Network eager ResNet18: skips with t 90.0" in text
    assert "Runtime Precision Why onnxruntime TF32 no provider" in text


def test_roofline_is_shown(results):
    shared = {"network": "resnet34_linear_avgpool", "runtime": "eager", "kernels": None, "flops": 15680,
              "bytes": 7000.0, "peak_flops_per_s": 5e10, "convolution_flops_per_s": 6e10, "matrix_side": 1024,
              "copy_bytes_per_s": 1.2e10,
              "gpu_state": None, **STAMP}  # fmt: skip
    rows = [
        {"variant": "skips", "batch": 64, "median_us": 9, "operators": 91, "roof_share": 0.25, "input_share": 0},
        {"variant": "collapsed_pixels", "batch": 1, "median_us": 53.5, "operators": 2, "roof_share": 0.05,
         "input_share": 0.002},
    ]  # fmt: skip
    frame = pd.DataFrame([shared | row for row in rows]).assign(intensity=2.2, flops_per_s=2e9, launch_us=None)
    write_table(timings(), results / "tables" / "timing.csv")
    write_table(frame, results / "tables" / "roofline.csv")
    report.build(results)
    text = read(results).text
    assert "50 GFLOP/s in a matrix product of 1024 × 1024 matrices, 12 GB/s read and written by a large copy." in text
    assert "convolutions may beat that product, a large one reached 60 GFLOP/s, and caches that copy. Kernels" in text
    assert "linear ResNet34, average-pool: skips with t eager 91 – 0.02 7.0 2.2 2.0 25.0 %" in text
    assert "1 eager 53.5 – 0.2 %" in text
    write_table(frame.assign(gpu_state="pstate P0", kernels=120), results / "tables" / "roofline.csv")
    report.build(results)
    assert "The GPU then: pstate P0." in read(results).text and "eager 91 120" in read(results).text
    old = frame.drop(columns=["convolution_flops_per_s", "matrix_side"])
    write_table(old, results / "tables" / "roofline.csv")
    report.build(results)
    assert "50 GFLOP/s in a matrix product, 12 GB/s" in read(results).text
    assert "convolutions may beat that product, and caches" in read(results).text


def test_removal_is_told_in_operators_or_kernels():
    index = pd.MultiIndex.from_product([["resnet18"], ["skips", "skips_literal", "skips_removed"]])
    work = pd.DataFrame({"operators": [80, 100, 60], "kernels": None, "flops": [200, 200, 198]}, index=index)
    (text,) = report._removal(work)
    assert text == (
        "of ResNet18 25.0 % of the operators (40.0 % where the weighted sum is written out) and 1.0 % of the FLOPs"
    )
    assert report._removal(work.assign(kernels=[100, 100, 50]))[0].startswith("of ResNet18 50.0 % of the kernels")
    assert report._removal(work.iloc[:2]) == []


def test_sensitivity_is_shown(results):
    rows = [("networks.cnn3", "defaults", True, 0.002, ""), ("networks.cnn3", "padding=0", False, 0.05, "cnn3_curve")]
    frame = pd.DataFrame(rows, columns=["assumption", "alternative", "chosen", "rmse", "verdicts_flipped"])
    frame["rmse_by_batch"] = float("nan")
    frame["images"] = [None, 8192]
    write_table(
        frame.assign(figure="accuracy_vs_t_cnn3", n=3, trials=1, **STAMP), results / "tables" / "sensitivity.csv"
    )
    report.build(results)
    text = read(results).text
    assert (
        "3-layer linear CNN, by Accuracy against t, 3-layer linear CNN" in text and "(in use) none 0.0020 – 1" in text
    )
    assert "cnn3_curve 0.0500 – 1 on 8192 images" in text


def test_texts_are_escaped(results):
    verdicts = read_table(results / "verdicts.csv")
    verdicts["remark"] = "<script>alert(1)</script> & more"
    write_table(verdicts, results / "verdicts.csv")
    report.build(results)
    assert not read(results).all("script")


def test_without_tables_there_is_no_page(tmp_path):
    with pytest.raises(ConfigError, match="no tables"):
        report.build(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table[table["id"] != "cnn3_curve"], r"config/claims\.yaml \(cnn3_curve\)"),
        (lambda table: table.drop(columns="fitted"), r"columns are not those of a verdict \(fitted\)"),
        (lambda table: table[::-1], r"\(their order\)"),
    ],
)
def test_verdicts_of_other_claims_give_no_page(results, change, said):
    write_table(change(read_table(results / "verdicts.csv")), results / "verdicts.csv")
    with pytest.raises(ConfigError, match=rf"{said}; run `python -m skipfold\.replication judge"):
        report.build(results)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("tables/linear_comparison.csv", lambda held: held[:-9], "last line is cut off; .*rule linear_comparison"),
        ("figures/accuracy_vs_t_cnn3.svg", lambda held: held[:-99], "no whole figure; .*rule accuracy_vs_t"),
        ("figures/accuracy_vs_t_cnn3.svg", lambda held: b"", "no whole figure"),
        ("trials.jsonl.gz", lambda held: held[:-9], "not a readable archive"),
        ("trials.jsonl.gz", lambda held: gzip.compress(b"{}\n"), "not the record of a trial"),
        ("verdicts.csv", lambda held: held.replace(b"not testable", b"perhaps"), "'perhaps' is no verdict; run"),
    ],
)
def test_a_damaged_file_is_one_line_and_leaves_the_page_as_it_was(results, name, change, said):
    before = {path: path.read_bytes() for path in results.glob("*.*")}
    (results / name).write_bytes(change((results / name).read_bytes()))
    with pytest.raises(SkipfoldError, match=rf"^[^\n]*{name}: [^\n]*{said}[^\n]*$"):
        report.build(results)
    assert all((results / name).read_bytes() == before[results / name] for name in ("report.html", "provenance.json"))


def test_a_page_that_cannot_be_written_leaves_the_old_one(results, monkeypatch):
    page = (results / "report.html").read_bytes()
    monkeypatch.setattr(report.Path, "write_text", lambda path, text, **_: path.write_bytes(b"ha") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.build(results)
    assert (results / "report.html").read_bytes() == page and not list(results.glob("*.part"))


def test_without_verdicts_there_is_no_page(results):
    (results / "verdicts.csv").unlink()
    with pytest.raises(ConfigError, match=r"verdicts\.csv is not there; run"):
        report.build(results)


def test_a_residual_is_a_range_in_both_places(results):
    table = read_table(results / "tables" / "certificates.csv")
    table.loc[table["arm"] == "cnn3", "residual"] = [0.78568, 1.498]
    write_table(table, results / "tables" / "certificates.csv")
    report.build(results)
    assert read(results).text.count("0.7857 to 1.4980") == 2


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        ([claims.REPRODUCED] * 2, "2 of 2 checks reproduced"),
        ([claims.NOT_REPRODUCED, claims.NOT_JUDGED], "0 of 1 check reproduced, 1 more not judged"),
        ([claims.REPRODUCED, claims.INCONCLUSIVE], "1 of 2 checks reproduced, 1 inconclusive"),
        ([claims.NOT_JUDGED, claims.NOT_TESTABLE], ""),
    ],
)
def test_how_the_checks_of_a_claim_were_judged(verdicts, said):
    assert report.detail(verdicts) == said


@pytest.mark.parametrize("name", [*experiments.TRAINED, *report.MEASURED])
def test_captions_are_filled_in_and_short(name):
    text = report.caption(name)
    assert "{" not in text and 1 <= text.count(". ") + 1 <= 4


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.0, "1.0000"), (0.98682, "0.9868"), (1e-5, "1.0e-05"), (104.91, "104.9100"), (None, "–")],
)
def test_numbers(value, text):
    assert report.number(value) == text

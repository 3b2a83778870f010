# Table of contents: configuration, stages, targets. Run `snakemake reproduce`, or `snakemake quote` to ask first.

from snakemake.utils import min_version

min_version("9.0")


configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/trials.smk"
include: "workflow/rules/figures.smk"
include: "workflow/rules/tables.smk"
include: "workflow/rules/report.smk"


localrules:
    reproduce,
    figures,
    tables,
    report,


rule reproduce:
    """Everything: trials, figures, tables, verdicts, report."""
    default_target: True
    input:
        rules.build_report.output,
        rules.pack_records.output,
        FIGURES,
        TABLES,
        NOTEBOOKS,
    message:
        "{RESULTS} is complete; the page to read is {RESULTS}/report.html"


rule figures:
    """Every figure."""
    input:
        FIGURES,
    message:
        "The figures are in {RESULTS}/figures"


rule tables:
    """Every table."""
    input:
        TABLES,
    message:
        "The tables are in {RESULTS}/tables"


rule report:
    """The page that a reviewer reads, and what it shows."""
    input:
        rules.build_report.output,
    message:
        "The page to read is {RESULTS}/report.html"


onstart:
    print(NOTE, flush=True)
    check_before_training(workflow)


onsuccess:
    print(NOTE, flush=True)


onerror:
    if trains(workflow):
        print("Finished trials are stored; the same command goes on from there.", flush=True)

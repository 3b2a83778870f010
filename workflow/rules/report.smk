# Judges the paper's claims, writes the report, and checks that all of it belongs together.


rule judge_claims:
    """Give every claim its verdict."""
    input:
        tables=TABLES,
        claims="config/claims.yaml",
        published=published(*EXPERIMENTS),
        sources=sources("claims", "statistics"),
    output:
        report(
            f"{RESULTS}/verdicts.csv",
            caption="../report/verdicts.rst",
            category="Verdicts",
            labels={"table": "verdicts"},
        ),
    log:
        f"{LOGS}/judge_claims.log",
    conda:
        "../../environment.yml"
    params:
        results=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Judging the claims"
    shell:
        "python -m skipfold.replication judge {params.results:q} 2>&1 | tee {log}"


rule build_report:
    """Write the page that a reviewer reads."""
    input:
        verdicts=rules.judge_claims.output,
        records=rules.pack_records.output,
        figures=FIGURES,
        tables=TABLES,
        claims="config/claims.yaml",
        page=PAGE,
        sources=sources("report", "provenance"),
    output:
        f"{RESULTS}/report.html",
        f"{RESULTS}/provenance.json",
    log:
        f"{LOGS}/build_report.log",
    conda:
        "../../environment.yml"
    params:
        results=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Writing {output}"
    shell:
        "python -m skipfold.replication report {params.results:q} 2>&1 | tee {log}"


rule verify:
    """Fail if results, sources and report no longer belong together; makes nothing anew."""
    input:
        # Asked for beside what makes results, it waits for them.
        lambda wildcards: rules.build_report.output if trains(workflow) else [],
    log:
        f"{LOGS}/verify.log",
    conda:
        "../../environment.yml"
    params:
        results=RESULTS,
        configured=configured(*EXPERIMENTS),
    message:
        "Verifying {RESULTS}"
    shell:
        "python -m skipfold.replication verify {params.results:q} {params.configured} 2>&1 | tee {log}"

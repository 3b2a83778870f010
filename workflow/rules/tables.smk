# Measures what is shown as tables: prediction times, and the misfit of each unpublished choice.


rule time_prediction:
    """Prediction time per image of every network; alone on the machine, so that nothing else is timed."""
    input:
        with_imports("timing", "roofline"),
    output:
        timing=f"{RESULTS}/tables/timing.csv",
        runtimes=f"{RESULTS}/tables/runtimes.csv",
        roofline=f"{RESULTS}/tables/roofline.csv",
    log:
        f"{LOGS}/time_prediction.log",
    conda:
        "../../environment.yml"
    threads: workflow.cores
    resources:
        gpu=int(ON_CUDA),
    params:
        tables=lambda wildcards, output: Path(output.timing).parent,
        # What times hang on, and not the tier's whole file: with more trials nothing is timed again.
        configured=with_keys({key: SETTINGS[key] for key in ("timing", "device", "threads", "store")}),
    message:
        "Timing prediction"
    shell:
        "python -m skipfold.replication time {params.tables:q} {params.configured} 2>&1 | tee {log}"


rule timing:
    """Prediction time per image, what collapse and skip removal save of it, and the roofline."""
    input:
        notebook="notebooks/timing.ipynb",
        measured=rules.time_prediction.output,
        claims="config/claims.yaml",
        sources=SHOWING,
    output:
        notebook=f"{RESULTS}/notebooks/timing.ipynb",
        savings=f"{RESULTS}/tables/savings.csv",
        svg=report(
            f"{RESULTS}/figures/timing.svg",
            caption="../report/timing.rst",
            category="Timing",
            labels={"figure": "timing"},
        ),
        png=f"{RESULTS}/figures/timing.png",
        roofline_svg=report(
            f"{RESULTS}/figures/roofline.svg",
            caption="../report/roofline.rst",
            category="Timing",
            labels={"figure": "roofline"},
        ),
        roofline_png=f"{RESULTS}/figures/roofline.png",
    log:
        f"{LOGS}/timing.log",
    conda:
        "../../environment.yml"
    threads: SETTINGS["threads"]
    params:
        notebook=lambda wildcards, input: parameters(measured=str(Path(input.measured[0]).parent)),
    message:
        "Drawing timing and roofline"
    shell:
        "python -m skipfold.replication notebook {input.notebook} {output.notebook:q}"
        " -p {params.notebook} 2>&1 | tee {log}"


rule sensitivity:
    """Misfit of each alternative to the published curves, and the verdicts that hang on it."""
    input:
        notebook="notebooks/sensitivity.ipynb",
        trained=trained("sensitivity"),
        trials=expand(f"{RESULTS}/tables/{{name}}_trials.csv", name=EXPERIMENTS),
        claims="config/claims.yaml",
        sources=SHOWING + sources("sensitivity", "claims"),
    output:
        notebook=f"{RESULTS}/notebooks/sensitivity.ipynb",
        table=f"{RESULTS}/tables/sensitivity.csv",
        svg=report(
            f"{RESULTS}/figures/sensitivity.svg",
            caption="../report/sensitivity.rst",
            category="Sensitivity",
            labels={"figure": "sensitivity"},
        ),
        png=f"{RESULTS}/figures/sensitivity.png",
    log:
        f"{LOGS}/sensitivity.log",
    conda:
        "../../environment.yml"
    threads: SETTINGS["threads"]
    params:
        notebook=parameters("sensitivity"),
    message:
        "Scoring the assumptions"
    shell:
        "python -m skipfold.replication notebook {input.notebook} {output.notebook:q}"
        " -p {params.notebook} 2>&1 | tee {log}"

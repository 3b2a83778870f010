# Measures what is shown as tables: prediction times, and the misfit of each unpublished choice.


rule timing:
    """Prediction time per image of every network; alone on the machine, so that nothing else is timed."""
    input:
        notebook="notebooks/timing.ipynb",
        claims="config/claims.yaml",
        sources=SHOWING
        + sources("collapse", "cropping", "folding", "homotopy", "pixels", "removal", "resnet", "roofline", "timing"),
    output:
        notebook=f"{RESULTS}/notebooks/timing.ipynb",
        table=f"{RESULTS}/tables/timing.csv",
        savings=f"{RESULTS}/tables/savings.csv",
        runtimes=f"{RESULTS}/tables/runtimes.csv",
        svg=report(
            f"{RESULTS}/figures/timing.svg",
            caption="../report/timing.rst",
            category="Timing",
            labels={"figure": "timing"},
        ),
        png=f"{RESULTS}/figures/timing.png",
        roofline=f"{RESULTS}/tables/roofline.csv",
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
    threads: workflow.cores
    resources:
        gpu=int(ON_CUDA),
    params:
        notebook=parameters(),
    message:
        "Timing prediction"
    shell:
        "python -m skipfold notebook {input.notebook} {output.notebook}" " -p {params.notebook} 2>&1 | tee {log}"


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
        notebook=parameters(),
    message:
        "Scoring the assumptions"
    shell:
        "python -m skipfold notebook {input.notebook} {output.notebook}" " -p {params.notebook} 2>&1 | tee {log}"

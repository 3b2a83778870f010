# Draws the figures: each runs its notebook, which reads the stored trials, beside what trains; only the ceiling of
# linear_comparison is computed in its notebook.


rule linear_comparison:
    """Accuracy per epoch of the linear networks, their certificates, and the best affine classifier."""
    input:
        notebook="notebooks/linear_comparison.ipynb",
        trained=trained("linear_comparison"),
        published="results/published/linear_comparison.csv",
        sources=SHOWING + sources("ceiling"),
    output:
        notebook=f"{RESULTS}/notebooks/linear_comparison.ipynb",
        trials=f"{RESULTS}/tables/linear_comparison_trials.csv",
        table=f"{RESULTS}/tables/linear_comparison.csv",
        certificates=f"{RESULTS}/tables/certificates.csv",
        ceiling=f"{RESULTS}/tables/ceiling.csv",
        svg=report(
            f"{RESULTS}/figures/linear_comparison.svg",
            caption="../report/linear_comparison.rst",
            category="Linear networks",
            labels={"figure": "linear comparison"},
        ),
        png=f"{RESULTS}/figures/linear_comparison.png",
    log:
        f"{LOGS}/linear_comparison.log",
    conda:
        "../../environment.yml"
    threads: SETTINGS["threads"]
    resources:
        gpu=int(ON_CUDA),
    params:
        notebook=parameters("linear_comparison"),
    message:
        "Drawing linear_comparison"
    shell:
        "python -m skipfold.replication notebook {input.notebook} {output.notebook:q}"
        " -p {params.notebook} 2>&1 | tee {log}"


rule schedule_comparison:
    """Accuracy per epoch with static and with scheduled skip strength."""
    input:
        notebook="notebooks/schedule_comparison.ipynb",
        trained=trained("schedule_comparison"),
        published="results/published/schedule_comparison.csv",
        sources=SHOWING,
    output:
        notebook=f"{RESULTS}/notebooks/schedule_comparison.ipynb",
        trials=f"{RESULTS}/tables/schedule_comparison_trials.csv",
        table=f"{RESULTS}/tables/schedule_comparison.csv",
        svg=report(
            f"{RESULTS}/figures/schedule_comparison.svg",
            caption="../report/schedule_comparison.rst",
            category="Schedules",
            labels={"figure": "schedule comparison"},
        ),
        png=f"{RESULTS}/figures/schedule_comparison.png",
    log:
        f"{LOGS}/schedule_comparison.log",
    conda:
        "../../environment.yml"
    threads: SETTINGS["threads"]
    params:
        notebook=parameters("schedule_comparison"),
    message:
        "Drawing schedule_comparison"
    shell:
        "python -m skipfold.replication notebook {input.notebook} {output.notebook:q}"
        " -p {params.notebook} 2>&1 | tee {log}"


rule accuracy_vs_t:
    """Accuracy against skip strength of one network."""
    input:
        notebook="notebooks/accuracy_vs_t.ipynb",
        trained=lambda wildcards: trained(f"accuracy_vs_t_{wildcards.model}"),
        published=lambda wildcards: published(f"accuracy_vs_t_{wildcards.model}"),
        sources=SHOWING,
    output:
        notebook=f"{RESULTS}/notebooks/accuracy_vs_t_{{model}}.ipynb",
        trials=f"{RESULTS}/tables/accuracy_vs_t_{{model}}_trials.csv",
        table=f"{RESULTS}/tables/accuracy_vs_t_{{model}}.csv",
        svg=report(
            f"{RESULTS}/figures/accuracy_vs_t_{{model}}.svg",
            caption="../report/accuracy_vs_t.rst",
            category="Accuracy against t",
            labels={"figure": "{model}"},
        ),
        png=f"{RESULTS}/figures/accuracy_vs_t_{{model}}.png",
    log:
        f"{LOGS}/accuracy_vs_t_{{model}}.log",
    conda:
        "../../environment.yml"
    threads: SETTINGS["threads"]
    params:
        notebook=lambda wildcards: parameters(f"accuracy_vs_t_{wildcards.model}", model=wildcards.model),
    message:
        "Drawing accuracy_vs_t of {wildcards.model}"
    shell:
        "python -m skipfold.replication notebook {input.notebook} {output.notebook:q}"
        " -p {params.notebook} 2>&1 | tee {log}"

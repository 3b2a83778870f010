# Trains the trials of each experiment, in as many parts as config says; records go to the store.


rule train:
    """Train what is not stored yet of one part of an experiment's trials."""
    input:
        TRAINING,
    output:
        touch(f"{LOGS}/trained/{{experiment}}_{{part}}_of_{{parts}}"),
    log:
        f"{LOGS}/train_{{experiment}}_{{part}}_of_{{parts}}.log",
    conda:
        "../../environment.yml"
    threads: SETTINGS["threads"]
    resources:
        gpu=int(ON_CUDA),
    params:
        configured=lambda wildcards: configured(wildcards.experiment),
    message:
        "Training {wildcards.experiment}, part {wildcards.part} of {wildcards.parts}"
    shell:
        "python -m skipfold.replication train {wildcards.experiment} --shard {wildcards.part}/{wildcards.parts}"
        " {params.configured} 2>&1 | tee {log}"


rule pack_records:
    """Write the records behind the results as one file, so that they can be handed on."""
    input:
        TABLES,
    output:
        f"{RESULTS}/trials.jsonl.gz",
    log:
        f"{LOGS}/pack_records.log",
    conda:
        "../../environment.yml"
    params:
        configured=configured(*EXPERIMENTS),
    message:
        "Packing the records of tier {TIER}"
    shell:
        "python -m skipfold.replication pack {output:q} {params.configured} 2>&1 | tee {log}"


rule quote:
    """Say what is still to run, and what it costs; runs nothing."""
    log:
        f"{LOGS}/quote.log",
    conda:
        "../../environment.yml"
    threads: SETTINGS["threads"]
    params:
        configured=configured(*EXPERIMENTS),
    message:
        "Measuring a few training steps of each network"
    shell:
        "python -m skipfold.replication quote {params.configured} 2>&1 | tee {log}"

"""The replication of Joyce and Verschelde (CASC 2024): configuration, training, figures, verdicts and report.

Notebooks call `skipfold.replication.study`, Snakemake's rules `python -m skipfold.replication`. The library, which is
everything in `skipfold` outside of this package, knows nothing of it. See docs/design.md.
"""

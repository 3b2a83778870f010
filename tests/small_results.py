"""The results of a very small tier, made by the real engine on the digits, for the tests of report and verify."""

import torch

from skipfold.replication import claims, config, data, experiments, figures, report, statistics
from skipfold.replication.store import Store
from skipfold.replication.sweep import run
from skipfold.replication.tables import write_table


def settings():
    """Smoke, with two experiments of linear networks only."""
    held = config.load("smoke", {"trials": 2, "train_images": 64, "val_images": 40})
    held["experiments"] = {
        "linear_comparison": {"epochs": 2, "t": 0.5, "arms": ["cnn3", "perceptron"]},
        "accuracy_vs_t_cnn3": {"epochs": 2, "t": [0.0, 0.5, 1.0]},
    }
    held["sensitivity"] = {**held["sensitivity"], "assumptions": []}
    return held


def make(folder):
    """Train, and write tables, figures, records, verdicts and the page under `folder`, named smoke; gives it."""
    for name in ("tables", "figures", "notebooks"):
        (folder / name).mkdir(parents=True)
    store, held = Store(folder.parent / "trials"), settings()
    images, packed = data.load("digits"), []
    for name in held["experiments"]:
        wanted = experiments.trials(held, name)
        records = run(
            wanted, store, lambda trial: images.first(trial.train_images, trial.val_images), torch.device("cpu")
        )
        packed += wanted
        trials = statistics.tidy(records, "smoke")
        table = statistics.aggregate(trials)
        write_table(trials, folder / "tables" / f"{name}_trials.csv")
        write_table(table, folder / "tables" / f"{name}.csv")
        draw = figures.linear_comparison if name == "linear_comparison" else figures.accuracy_vs_t
        figures.save(draw(table, statistics.published(name)), folder / "figures" / name)
        (folder / "notebooks" / f"{name}.ipynb").write_text("{}")
        if name == "linear_comparison":
            write_table(statistics.certificates(trials), folder / "tables" / "certificates.csv")
    store.pack(folder / "trials.jsonl.gz", packed)
    write_table(claims.judge(folder), folder / "verdicts.csv")
    report.build(folder)
    return folder

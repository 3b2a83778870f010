"""quote: what is still to run, counted once, and nothing left behind."""

import torch

from skipfold import config, experiments, quote
from skipfold.keys import parse
from skipfold.store import Store
from skipfold.trial import Trial

OTHERS = [name for name in experiments.TRAINED if name not in ("accuracy_vs_t_cnn3", "accuracy_vs_t_shallow_linear")]


def settings(tmp_path):
    loaded = config.load("smoke", parse([f"store={tmp_path / 'trials'}"]))
    for name in OTHERS:
        del loaded["experiments"][name]
    loaded["sensitivity"]["assumptions"] = [
        held for held in loaded["sensitivity"]["assumptions"] if held["key"] == "networks.cnn3"
    ]
    return loaded


def test_stored_and_shared_trials_are_not_counted(tmp_path):
    loaded = settings(tmp_path)
    store = Store(tmp_path / "trials")
    wanted = experiments.trials(loaded, "accuracy_vs_t_cnn3")
    store.put(wanted[0], {"epochs": [{}, {}], "final": {}})
    rows = {row.experiment: row for row in quote.estimate(loaded, torch.device("cpu"), store)}
    assert rows["accuracy_vs_t_cnn3"].trials == len(wanted) - 1
    assert rows["accuracy_vs_t_cnn3"].stored == 1
    # The chosen option's trial is one of the figure's.
    assert rows["sensitivity"].trials == 1
    assert all(row.seconds > 0 and row.disk > 0 for row in rows.values())
    assert len(list(store.folder.iterdir())) == 1


def test_a_batch_larger_than_the_digits_is_quoted_too():
    trial = Trial("test", "any", 0, "perceptron", batch_size=2000)
    (cost,) = quote.measure([trial], torch.device("cpu"), None).values()
    assert cost.image > 0


def test_the_text_names_trials_time_and_disk(tmp_path):
    text = quote.quote(settings(tmp_path))
    assert "13 trials to run" in text and "MB" in text and "tier smoke" in text

"""quote: what is still to run, counted once, and nothing left behind."""

import pytest
import torch

from skipfold.keys import parse
from skipfold.replication import config, experiments, quote
from skipfold.replication.store import Store
from skipfold.replication.trial import Trial

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
    (cost,) = quote.measure([quote.Bench(trial, 5, 1)], torch.device("cpu")).values()
    assert cost.image > 0 and cost.trial > 0 and cost.setup >= 0


@pytest.mark.parametrize(("network", "passes"), [("perceptron", 1), ("resnet18", 2)])
def test_with_batchnorm_validation_images_count_twice(network, passes):
    (cost,) = quote.measure([quote.Bench(Trial("test", "any", 0, network), 1, 1)], torch.device("cpu")).values()
    assert cost.passes == passes


def test_trials_that_train_side_by_side_are_measured_so(tmp_path):
    """As the sweep does it: 17 of at most 16 are two groups of 9, of at most 8 three of 6; few are beside others."""
    loaded = settings(tmp_path)
    alike = [Trial("test", "any", index, "perceptron") for index in range(17)]

    def benches(trials, device, settings=loaded):
        return [(bench.trials, bench.size) for bench in quote._benches(trials, torch.device(device), settings)]

    assert benches(alike, "cuda") == [(17, 9)] and benches(alike, "cpu") == [(17, 6)]
    assert benches([Trial("test", "any", 0, "resnet18")] * 17, "cpu") == [(17, 1)]
    assert benches(alike, "cpu", loaded | {"side_by_side": 4}) == [(17, 4)]
    few = [*alike[:3], *(Trial("test", "any", index, "cnn3") for index in range(2))]
    assert benches(few, "cuda") == [(3, 5), (2, 5)] and benches(few, "cpu") == [(3, 3), (2, 2)]
    assert quote.Bench(alike[0], 17, 9).key != quote.Bench(alike[0], 17, 6).key


@pytest.mark.parametrize("passes", [1, 2])
def test_what_a_bench_costs_is_added_up(passes, tmp_path, monkeypatch):
    """By hand: a bench of 13 trials, then the notebook."""
    loaded = settings(tmp_path)
    del loaded["experiments"]["accuracy_vs_t_shallow_linear"]
    loaded["sensitivity"]["assumptions"] = []
    monkeypatch.setattr(
        quote, "measure", lambda benches, device: {bench.key: quote.Cost(100, 10, 1, passes, 7, 3) for bench in benches}
    )
    rows = quote.estimate(loaded, torch.device("cpu"), Store(tmp_path / "trials"))
    row = next(row for row in rows if row.experiment == "accuracy_vs_t_cnn3")
    (trial, *_) = trials = experiments.trials(loaded, "accuracy_vs_t_cnn3")
    images = (trial.train_images or 1497) + passes * (trial.val_images or 300) / 3
    assert row.seconds == pytest.approx(quote.NOTEBOOK_SECONDS + 100 + len(trials) * (10 + trial.epochs * images))
    assert row.disk == quote.NOTEBOOK_BYTES + len(trials) * (7 + 3 * trial.epochs)


def test_the_text_names_trials_time_and_disk(tmp_path):
    text = quote.quote(settings(tmp_path))
    assert "13 trials to run" in text and "MB" in text and "tier smoke" in text

"""progress: one line an epoch where there is no terminal."""

from skipfold.replication.progress import Progress
from skipfold.replication.trial import Trial


def test_lines_say_how_far_it_is(capsys):
    progress = Progress("figure")
    trial = Trial(experiment="figure", arm="t=0.5", index=1, network="cnn3", epochs=2)
    progress.begin(3, 2, 2)
    for number in (1, 2):
        progress.epoch(trial, {"epoch": number, "val_accuracy": 0.25})
    progress.trial(trial, {})
    progress.end()
    first, *epochs, last = capsys.readouterr().out.splitlines()
    assert first == "figure: 3 trials, 2 stored, 1 to train"
    assert len(epochs) == 2
    assert epochs[0].startswith("figure: 2/3 trials; cnn3 t=0.5 trial 2 epoch 1/2, accuracy 0.2500, ")
    assert epochs[1].endswith("0:00:00 left")
    assert last.startswith("figure: 3/3 trials, trained in ")


def test_nothing_to_train_is_said(capsys):
    progress = Progress("figure")
    progress.begin(3, 3, 0)
    progress.end()
    assert capsys.readouterr().out.splitlines() == ["figure: 3 trials, all stored", "figure: 3/3 trials"]

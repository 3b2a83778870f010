"""What the smaller last batch of an epoch does to a ResNet: validation accuracy before and after that one step.

    python benchmarks/last_batch.py schedule_comparison static 3 --epochs 3
    python benchmarks/last_batch.py accuracy_vs_t_resnet34 t=0.995 3

60,000 images are 937 batches of 64 and one of 32. A trial of the paper tier, named by its experiment, arm and index, is
trained on all of them on the CPU, by one thread.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from skipfold import config, experiments
from skipfold.data import load
from skipfold.training import Learner
from skipfold.trial import Trial


def trial_of(experiment: str, arm: str, index: int) -> Trial:
    """The paper tier's trial of that name, its smaller last batches kept."""
    found = [t for t in experiments.trials(config.load("paper"), experiment) if (t.arm, t.index) == (arm, index)]
    if not found:
        raise SystemExit(f"error: {experiment} has no trial {arm} {index}")
    return replace(found[0], drop_last=False)


def validate(learner: Learner) -> tuple[float, float]:
    """Validation accuracy by batch statistics and in eval mode; the epoch goes on where it was."""
    cursor, totals, images = learner.cursor.clone(), learner.totals.clone(), len(learner.dataset.val_images)
    learner.measure_by_batch()
    ((_, by_batch),) = learner.means(images)
    learner.model.eval()
    learner.measure()
    ((_, in_eval),) = learner.means(images)
    learner.model.train()
    learner.cursor.copy_(cursor)
    learner.totals.copy_(totals)
    return by_batch, in_eval


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment")
    parser.add_argument("arm")
    parser.add_argument("index", type=int)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--data", type=Path, help="folder with the MNIST idx files; default: as in make reproduce")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trial = trial_of(arguments.experiment, arguments.arm, arguments.index)
    dataset = load("mnist", arguments.data)
    learner, order = Learner(trial, dataset), trial.generator("order")
    print("epoch  training  validation by batch, in eval mode: before the last step, after it")
    for number, t in enumerate(trial.strengths[: arguments.epochs], start=1):
        learner.begin([t], [torch.randperm(len(dataset.train_images), generator=order)])
        for _ in range(learner.full):
            learner.step(trial.batch_size)
        before = validate(learner)
        learner.step(learner.rest)
        ((_, trained),) = learner.means(learner.trained_images)
        after = validate(learner)
        told = "  ".join(f"{by_batch:.4f}, {in_eval:.4f}" for by_batch, in_eval in (before, after))
        print(f"{number:5d}  {trained:8.4f}  {told}", flush=True)


if __name__ == "__main__":
    main()

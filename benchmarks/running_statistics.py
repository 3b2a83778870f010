"""What single steps do to the accuracy and the running statistics of a ResNet, and what estimating them anew gives.

    python benchmarks/running_statistics.py schedule_comparison scheduled_from_0.5 3 --epochs 10
    python benchmarks/running_statistics.py schedule_comparison scheduled_from_0.9 1 --epochs 10 --every 40
    python benchmarks/running_statistics.py accuracy_vs_t_resnet34 t=0.995 3 --keep-last-batch

A trial of the paper tier, named by its experiment, arm and index, is trained on all 60,000 images on the CPU, by one
thread. They are 937 batches of 64 and one of 32, which that tier leaves out.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

import torch

from skipfold.keys import parse
from skipfold.replication import config, experiments
from skipfold.replication.data import load
from skipfold.replication.evaluation import reestimated
from skipfold.replication.training import Learner
from skipfold.replication.trial import Trial


def trial_of(experiment: str, arm: str, index: int, overrides: dict[str, Any]) -> Trial:
    """The paper tier's trial of that name."""
    settings = config.load("paper", overrides)
    found = [trial for trial in experiments.trials(settings, experiment) if (trial.arm, trial.index) == (arm, index)]
    if not found:
        raise SystemExit(f"error: {experiment} has no trial {arm} {index}")
    return found[0]


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


def shown(validated: tuple[float, float]) -> str:
    """Both accuracies in four digits."""
    return ", ".join(f"{accuracy:.4f}" for accuracy in validated)


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment")
    parser.add_argument("arm")
    parser.add_argument("index", type=int)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--every", type=int, metavar="STEPS", help="between validations within the last epoch")
    parser.add_argument("--keep-last-batch", action="store_true", help="of 32 images, which the paper tier leaves out")
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE", help="other values of keys")
    parser.add_argument("--data", type=Path, help="folder with the MNIST idx files; default: as in make reproduce")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trial = trial_of(arguments.experiment, arguments.arm, arguments.index, parse(arguments.config))
    trial = replace(trial, drop_last=not arguments.keep_last_batch)
    dataset = load("mnist", arguments.data)
    learner, order = Learner(trial, dataset), trial.generator("order")
    print("epoch  training  validation by batch, in eval mode: before the last step, after it")
    sizes = [trial.batch_size] * learner.full + [learner.rest] * (learner.rest > 0)
    within = []
    for number, t in enumerate(trial.strengths[: arguments.epochs], start=1):
        learner.begin([t], [torch.randperm(len(dataset.train_images), generator=order)])
        for step, size in enumerate(sizes[:-1], start=1):
            learner.step(size)
            if arguments.every and number == arguments.epochs and step % arguments.every == 0:
                within.append(validate(learner))
                print(f"after {step} steps  {shown(within[-1])}", flush=True)
        before = validate(learner)
        learner.step(sizes[-1])
        ((_, trained),) = learner.means(learner.trained_images)
        print(f"{number:5d}  {trained:8.4f}  {shown(before)}  {shown(validate(learner))}", flush=True)
    for name, values in zip(("by batch", "in eval mode"), zip(*within, strict=True), strict=False):
        low, middle, high = quantiles(values, n=4)
        spread = f"quartiles {low:.4f}, {middle:.4f}, {high:.4f}, lowest {min(values):.4f}"
        print(f"within the last epoch {name}, {len(values)} values: mean {mean(values):.4f}, {spread}")
    print(f"in eval mode with statistics estimated anew: {reestimated(learner.network(0), dataset):.4f}")


if __name__ == "__main__":
    main()

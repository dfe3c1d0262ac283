"""Numbers and random draws beside independent computations, without a run."""
import random
from argparse import Namespace

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from deit_plugin import evaluation, loaders, weights


def test_an_evaluation_over_unequal_classes():
    """Against NumPy's: 61 images, of which most are of class 0, and none of class 8."""
    rng = numpy.random.RandomState(0)
    labels = rng.choice(8, 61, p=[0.51, *[0.07] * 7])
    logits = rng.randn(61, 9).astype("float32")
    logits[labels == 0, 0] += 2
    ranks = (logits > logits[range(61), labels][:, None]).sum(axis=1)
    batches = [(torch.from_numpy(logits[i:i + 8]), torch.from_numpy(labels[i:i + 8]))
               for i in range(0, 61, 8)]
    found = evaluation.evaluate(torch.nn.Dropout(), batches, "cpu", 9)
    wide = logits.astype(float)
    loss = (numpy.log(numpy.exp(wide).sum(axis=1)) - wide[range(61), labels]).mean()
    per_class = [(ranks[labels == label] == 0).mean() for label in range(8)]
    assert found.stats == pytest.approx({
        "acc1": 100 * (ranks == 0).mean(), "acc5": 100 * (ranks < 5).mean(), "loss": loss,
        "acc_per_class": 100 * numpy.mean(per_class)})
    assert found.images == numpy.bincount(labels, minlength=9).tolist()
    assert found.correct == numpy.bincount(labels[ranks == 0], minlength=9).tolist()


def test_position_embeddings_are_resampled_by_row_and_column():
    """Channel 0 tells a token's row and channel 1 its column; the class token has 7 in both."""
    ramp = torch.arange(4.0)
    tokens = torch.stack([ramp.repeat_interleave(4), ramp.repeat(4)], dim=1)
    found = torch.cat([torch.full((1, 2), 7.0), tokens])[None]
    resampled = weights.resample_position_embedding(
        {"pos_embed": found}, {"pos_embed": torch.zeros(1, 1 + 64, 2)})["pos_embed"]
    finer = torch.nn.functional.interpolate(ramp.expand(1, 1, 4, 4), size=(8, 8), mode="bicubic",
                                            align_corners=False)[0, 0, 0]
    expected = torch.stack([finer.repeat_interleave(8), finer.repeat(8)], dim=1)
    assert torch.equal(resampled[0, 0], torch.tensor([7.0, 7.0]))
    assert torch.allclose(resampled[0, 1:], expected, atol=1e-6)


class Noise(torch.utils.data.Dataset):
    """8 images that are random numbers, drawn as augmentation draws them."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.rand(1).item(), random.random(), numpy.random.rand()


def batches_of(args, epoch):
    """The batches of 2 indices that a process takes in an epoch."""
    loader = DataLoader(Noise(), 2, sampler=DistributedSampler(Noise(), 2, 0))
    batches = loaders.Batches(loader, args)
    batches.set_epoch(epoch)
    return list(batches)


@pytest.mark.parametrize("accum_iter, ranks", [(1, [0]), (1, [1]), (2, [0, 1])])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_process_takes_the_images_that_deit_s_processes_take(accum_iter, ranks, epoch):
    """In the order of steps if it stands for two of them."""
    args = Namespace(seed=0, rank=ranks[0], world_size=2 // accum_iter, accum_iter=accum_iter)
    samplers = [DistributedSampler(Noise(), 2, rank) for rank in ranks]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    expected = [list(sampler)[step:step + 2] for step in (0, 2) for sampler in samplers]
    assert [[getattr(item, "index", item) for item in batch]
            for batch in batches_of(args, epoch)] == expected


@pytest.mark.parametrize("accum_iter", [1, 2])
def test_every_seed_rank_epoch_and_image_draws_other_numbers(accum_iter):
    def draws(seed, rank, epoch):
        args = Namespace(seed=seed, rank=rank, world_size=2 // accum_iter, device="cpu",
                         accum_iter=accum_iter)
        augmented = loaders.Augmented(Noise())
        images = [augmented[item] for batch in batches_of(args, epoch) for item in batch]
        loaders.seed_process(args, epoch)
        return [*images, Noise()[0]]

    keys = [(seed, rank, epoch) for seed in (0, 1) for rank in range(2 // accum_iter)
            for epoch in (1, 2)]
    numbers = numpy.array([draw for key in keys for draw in draws(*key)])
    for column in numbers.T:  # torch's, Python's, NumPy's
        assert len(set(column)) == len(numbers)
    assert draws(1, 0, 2) == draws(1, 0, 2)

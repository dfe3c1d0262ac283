"""Loaders that last, and evaluation shared out, against torch's own ways to do the same."""
import multiprocessing
import os

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import schedule


class Drawing(torch.utils.data.Dataset):
    """Of each index: the index, the worker's process id, and a random number drawn there."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return index, os.getpid(), torch.rand(()).item()


def loader_of_deit(workers=2):
    """A training loader as DeiT makes it for one process of two."""
    sampler = DistributedSampler(Drawing(), num_replicas=2, rank=1, shuffle=True)
    return DataLoader(Drawing(), sampler=sampler, batch_size=4, num_workers=workers,
                      drop_last=True)


def epoch_of(loader, sampler, number):
    """Indices, process ids and random numbers of an epoch."""
    sampler.set_epoch(number)
    return [torch.cat(parts).tolist() for parts in zip(*loader)]


def test_training_keeps_its_workers_and_their_order_and_draws_anew():
    lasting, fresh = schedule.LastingLoaders(), loader_of_deit()
    seen = []
    for number in range(3):
        loader = lasting.training(fresh)
        order, workers, draws = epoch_of(loader, fresh.sampler, number)
        assert order == epoch_of(fresh, fresh.sampler, number)[0]
        seen.append((set(workers), draws))
    (first, draws), *others = seen
    assert len(first) == 2 and os.getpid() not in first
    assert all(workers == first for workers, _ in others)
    assert len({tuple(drawn) for _, drawn in seen}) == 3 and len(set(draws)) == len(draws)
    del loader
    lasting.close()
    assert not multiprocessing.active_children()


def test_without_workers_this_process_loads():
    lasting, fresh = schedule.LastingLoaders(), loader_of_deit(workers=0)
    _, workers, _ = epoch_of(lasting.training(fresh), fresh.sampler, 0)
    assert set(workers) == {os.getpid()}


@pytest.mark.parametrize("images", [1, 3, 21, 22])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_each_image_is_evaluated_in_one_process(images, processes):
    logits = torch.randn(images, 7, generator=torch.Generator().manual_seed(images))
    labels = torch.arange(images) % 7
    loader = DataLoader(TensorDataset(logits, labels), batch_size=4)
    shares = [list(schedule.LastingLoaders().evaluation(loader, rank, processes))
              for rank in range(processes)]
    rows = torch.cat([batch for share in shares for batch, _ in share])
    assert sorted(rows.tolist()) == sorted(logits.tolist())
    stats = schedule.evaluate(torch.nn.Identity(), [batch for share in shares for batch in share],
                              torch.device("cpu"))
    ranks = (logits > logits.gather(1, labels[:, None])).sum(dim=1)
    for name, within in (("acc1", 1), ("acc5", 5)):
        assert stats[name] == 100 * int((ranks < within).sum()) / images
    loss = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    assert stats["loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("every, epochs, due", [(1, 3, [0, 1, 2]), (10, 25, [9, 19, 24]),
                                                (10, 20, [9, 19]), (7, 3, [2])])
def test_what_is_done_every_nth_epoch_is_done_after_the_last(every, epochs, due):
    assert [epoch for epoch in range(epochs) if schedule.is_due(epoch, every, epochs)] == due


def test_an_epoch_without_evaluation_adds_nothing_and_beats_nothing():
    stats = schedule.NotEvaluated()
    assert dict(stats.items()) == {} and max(0.0, stats["acc1"]) == 0.0

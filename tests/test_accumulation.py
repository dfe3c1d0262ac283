"""--accum-iter N trains what N times as many processes train.

The pictures are of one colour each, so that augmentation cannot change them: 43, for 5 steps of 8
and 3 that fill no step. The optimizer is SGD: AdamW would hide a wrong scale of the gradient.
"""
import functools

import pytest

from conftest import ERAS, log_of, rates_of, saved, train
from launches import after_saving, fork, kill_itself

CLIPPING = {"2021": ["--clip-grad", "0.5"]}  # in one era; it would hide a wrong scale elsewhere


@pytest.fixture(scope="module")
def tuned(data, checkpoint, tmp_path_factory):
    """tuned(era, processes, accum_iter): the folder of a run that makes steps of 8 images."""
    @functools.lru_cache(maxsize=None)
    def tune(era, processes, accum_iter, folder=None, train=train, **options):
        folder = folder or tmp_path_factory.mktemp("run")
        train("pets", "--data-set", "folder", "--data-path", data / "folder",
              "--resume", checkpoint, "--output_dir", folder, "--batch-size", "2",
              "--accum-iter", accum_iter, "--opt", "sgd", "--lr", "3", "--warmup-epochs", "0",
              "--mixup", "0", "--model-ema-decay", "0.8", *CLIPPING.get(era, []),
              processes=processes, era=era, **options)
        return folder

    return tune


def assert_same(run, other):
    states = [saved(folder / "checkpoint.pth") for folder in (run, other)]
    for part in ("model", "model_ema"):
        for name, tensor in states[0][part].items():
            assert (tensor - states[1][part][name]).abs().max() < 1e-5
    assert rates_of(run) == rates_of(other)
    losses = [[row[name] for row in log_of(folder) for name in ("train_loss", "test_loss")]
              for folder in (run, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("era", ERAS)
def test_one_process_trains_what_four_train(era, tuned):
    """Also with a variable of something else."""
    assert_same(tuned(era, 1, 4, WORLD_SIZE="8"), tuned(era, 4, 1))


@pytest.mark.parametrize("first, then", [((4, 1), (1, 4)), ((1, 4), (2, 2))])
def test_continuing_with_another_number_of_processes(first, then, tuned, tmp_path):
    tuned(ERAS[-1], *first, folder=tmp_path, train=fork, before=after_saving(kill_itself))
    assert len(log_of(tmp_path)) == 1
    tuned(ERAS[-1], *then, folder=tmp_path)
    assert_same(tmp_path, tuned(ERAS[-1], 4, 1))

"""Batches from reusable shared memory, compared with the same batches stacked in one process."""

import multiprocessing

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from amp.data.shared_images import SharedImages


class Numbers(Dataset):
    """Image i consists of 2 x 3 numbers, all equal to i."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((2, 3), index, dtype=torch.int32)

    def __len__(self) -> int:
        return 96


class Collate:
    """Collates like the stream, and counts the batches that found no free buffer."""

    def __init__(self, shared: SharedImages):
        self.shared = shared

    def __call__(self, images: list) -> tuple:
        put = self.shared.put(images)
        return put, get_worker_info().id, torch.is_tensor(put)


def loader(workers: int, places: int, ahead: int) -> DataLoader:
    shared = SharedImages((4, 2, 3), torch.int32, workers, places, pin=False)
    return DataLoader(
        Numbers(),
        batch_size=4,
        num_workers=workers,
        collate_fn=Collate(shared),
        prefetch_factor=ahead,
        persistent_workers=True,
    )


def assert_are_all(batches: list) -> None:
    expected = torch.arange(96, dtype=torch.int32).view(24, 4, 1, 1).expand(-1, -1, 2, 3)
    assert torch.equal(torch.stack([images for images, *_ in batches]), expected)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_that_are_kept_are_not_written_over(workers):
    batches = list(loader(workers, places=5, ahead=4))
    assert_are_all(batches)
    assert {worker for _, worker, _ in batches} == set(range(workers)) and not any(alone for *_, alone in batches)


def test_batches_without_a_place_go_the_loaders_own_way():
    taken = loader(2, places=5, ahead=4)
    for _ in range(5):
        taken.collate_fn.shared._free[0].acquire()
    batches = list(taken)
    assert_are_all(batches)
    assert all(alone == (worker == 0) for _, worker, alone in batches)


def test_an_iteration_that_is_left_holds_no_places():
    batches = loader(2, places=5, ahead=4)
    for _ in range(12):
        kept = next(iter(batches))[0]
        assert torch.equal(kept, torch.arange(4, dtype=torch.int32).view(4, 1, 1).expand(4, 2, 3))
    again = list(batches)
    assert_are_all(again)
    assert not any(alone for *_, alone in again)


def test_workers_that_are_not_forked():
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)  # the default of Python 3.14
    try:
        batches = list(loader(1, places=5, ahead=4))
    finally:
        multiprocessing.set_start_method(usual, force=True)
    assert_are_all(batches)
    assert not any(alone for *_, alone in batches)

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from efficientdnns.data import DatasetSplit, LoaderSplit, Split, TensorSplit, WindowSplit, as_split, carve
from efficientdnns.errors import ConfigurationError, DataError

N = 103


class Numbers(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([float(index)]), index % 3


def numbers() -> TensorSplit:
    return TensorSplit(torch.arange(float(N))[:, None], torch.arange(N) % 3)


def order(split: Split, **options: object) -> list[int]:
    return [int(x) for batch in split.batches(10, **options) for x in batch.inputs.flatten()]  # type: ignore[arg-type]


@pytest.mark.parametrize("split", [numbers(), DatasetSplit(Numbers())], ids=["tensors", "dataset"])
def test_batches_give_every_sample_once_with_its_target_and_index(split: Split) -> None:
    batches = list(split.batches(10, shuffle=True))
    assert [len(batch.inputs) for batch in batches] == [10] * 10 + [3]
    assert split.number_of_batches(10) == 11
    assert sorted(order(split, shuffle=True)) == list(range(N))
    for inputs, targets, indices in batches:
        assert indices is not None
        assert torch.equal(inputs.flatten().long(), indices)
        assert torch.equal(targets, indices % 3)


def test_order_depends_on_seed_and_epoch_only() -> None:
    split = numbers()
    assert order(split) == list(range(N))
    first = order(split, shuffle=True, seed=3, epoch=5)
    torch.manual_seed(99)
    torch.rand(7)
    assert order(split, shuffle=True, seed=3, epoch=5) == first
    assert order(DatasetSplit(Numbers()), shuffle=True, seed=3, epoch=5) == first
    assert order(split, shuffle=True, seed=3, epoch=6) != first
    assert order(split, shuffle=True, seed=4, epoch=5) != first


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("drop_last", [False, True])
def test_processes_share_each_batch(world_size: int, drop_last: bool) -> None:
    split = numbers()
    options = {"shuffle": True, "seed": 1, "drop_last": drop_last}
    whole = [set(batch.inputs.flatten().tolist()) for batch in split.batches(10, **options)]  # type: ignore[arg-type]
    shares = [
        [
            batch.inputs.flatten().tolist()
            for batch in split.batches(10, rank=rank, world_size=world_size, **options)  # type: ignore[arg-type]
        ]
        for rank in range(world_size)
    ]
    counts = {len(share) for share in shares}
    assert counts == {split.number_of_batches(10, world_size=world_size, drop_last=drop_last)}
    for number in range(counts.pop()):
        parts = [share[number] for share in shares]
        assert all(parts), "a process without samples in a step would leave the others waiting"
        assert set().union(*parts) == whole[number]
        assert sum(map(len, parts)) == len(whole[number])


def test_a_last_batch_smaller_than_the_processes_is_left_out() -> None:
    split = numbers()
    assert split.number_of_batches(10, world_size=4) == 10
    assert len(list(split.batches(10, world_size=4, rank=3))) == 10
    with pytest.raises(ConfigurationError, match="batch_size is 2, expected at least 4"):
        list(split.batches(2, world_size=4))


def test_augment_comes_before_prepare_and_only_when_asked() -> None:
    pixels = torch.zeros(8, 1, dtype=torch.uint8)

    def noise(x: Tensor, generator: torch.Generator) -> Tensor:
        assert x.dtype == torch.uint8
        return x + torch.randint(0, 200, x.shape, generator=generator).byte()

    split = TensorSplit(pixels, prepare=lambda x: x.float() / 2, augment=noise)
    plain = torch.cat([batch.inputs for batch in split.batches(4)])
    assert plain.dtype == torch.float32
    assert plain.eq(0).all()

    def augmented(**options: int) -> Tensor:
        return torch.cat([batch.inputs for batch in split.batches(4, augment=True, **options)])  # type: ignore[arg-type]

    assert augmented(seed=1).ne(0).any()
    assert torch.equal(augmented(seed=1), augmented(seed=1))
    assert not torch.equal(augmented(seed=1), augmented(seed=1, epoch=1))
    assert not torch.equal(augmented(seed=1)[:4], augmented(seed=1)[4:])
    assert torch.equal(split.take([3, 1]).inputs, torch.zeros(2, 1))


def test_batches_are_copies() -> None:
    split = numbers()
    next(split.batches(10)).inputs.zero_()
    assert order(split) == list(range(N))


@pytest.mark.parametrize("split", [numbers(), DatasetSplit(Numbers())], ids=["tensors", "dataset"])
def test_subset_and_take(split: Split) -> None:
    part = split.subset([7, 3, 5])
    assert len(part) == 3
    batch = next(part.batches(8))
    assert batch.inputs.flatten().tolist() == [7, 3, 5]
    assert batch.indices is not None
    assert batch.indices.tolist() == [0, 1, 2]
    assert split.take([7, 3]).targets.tolist() == [1, 0]  # type: ignore[union-attr]


def test_carved_parts_are_disjoint_and_repeatable() -> None:
    split = numbers()
    kept, cut = carve(split, 0.1, seed=2)
    assert (kept.name, cut.name, len(cut)) == ("train", "calibration", 10)
    assert sorted(order(kept) + order(cut)) == list(range(N))
    assert order(kept) == sorted(order(kept))
    assert order(carve(split, 0.1, seed=2)[1]) == order(cut)
    assert order(carve(split, 0.1, seed=3)[1]) != order(cut)
    assert len(carve(split, 0.5, most=4)[1]) == 4


def test_several_inputs_and_integer_targets() -> None:
    split = TensorSplit((torch.rand(5, 2), torch.rand(5, 3)), torch.arange(5, dtype=torch.uint8))
    batch = next(split.batches(2))
    assert [tuple(part.shape) for part in batch.inputs] == [(2, 2), (2, 3)]
    assert batch.targets is not None
    assert batch.targets.dtype == torch.int64
    with pytest.raises(DataError, match=r"shapes \(5, 2\), \(4,\)"):
        TensorSplit(torch.rand(5, 2), torch.arange(4))


def test_hidden_labels() -> None:
    split = numbers().without_labels()
    assert not split.has_labels
    assert next(split.batches(4)).targets is None
    assert not split.subset([1, 2]).has_labels
    assert not TensorSplit(torch.rand(3, 2)).has_labels


def test_items_of_a_dataset() -> None:
    class Items(Dataset[object]):
        def __init__(self, item: object) -> None:
            self.item = item

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> object:
            return self.item

    x, y = torch.rand(2), torch.rand(3)
    assert not DatasetSplit(Items(x)).has_labels
    assert not DatasetSplit(Items((x,))).has_labels
    assert [tuple(part.shape) for part in next(DatasetSplit(Items((x, y, 1))).batches(4)).inputs] == [(4, 2), (4, 3)]
    batch = next(DatasetSplit(Items({"pixels": x, "label": 1})).batches(4))
    assert set(batch.inputs) == {"pixels"}
    assert batch.targets.tolist() == [1] * 4  # type: ignore[union-attr]


def test_loader_split_keeps_the_loader() -> None:
    data = TensorDataset(torch.arange(20.0)[:, None], torch.arange(20) % 4)
    split = LoaderSplit(DataLoader(data, batch_size=6, shuffle=True))
    batches = list(split.batches(999, shuffle=True, seed=1))
    assert [len(batch.inputs) for batch in batches] == [6, 6, 6, 2]
    assert (len(split), split.number_of_batches(999), split.classes()) == (20, 4, 4)
    again = list(split.batches(999, seed=1))
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(batches, again))
    assert order(split, seed=1, epoch=1) != order(split, seed=1)
    halves = [order(split, seed=1, rank=rank, world_size=2) for rank in range(2)]
    assert sorted(halves[0] + halves[1]) == list(range(20))
    with pytest.raises(DataError, match="cannot pick samples"):
        split.subset([1])


def test_loader_shuffling_leaves_the_global_generator_alone() -> None:
    split = LoaderSplit(DataLoader(TensorDataset(torch.rand(8, 1)), batch_size=4, shuffle=True))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    iterator = split.batches(4)
    next(iterator)
    assert torch.equal(torch.rand(1), expected)


def test_as_split() -> None:
    pair = (torch.rand(4, 2), torch.arange(4))
    assert isinstance(as_split(TensorDataset(*pair), "train"), TensorSplit)
    assert isinstance(as_split(pair, "train"), TensorSplit)
    assert as_split(pair[0].double().numpy(), "train").take([0]).inputs.dtype == torch.float32
    assert isinstance(as_split(Numbers(), "train"), DatasetSplit)
    assert isinstance(as_split(DataLoader(Numbers()), "train"), LoaderSplit)
    with pytest.raises(DataError, match="the train split is a str; expected"):
        as_split("mnist", "train")

    with pytest.raises(DataError, match="give a DataLoader"):
        as_split(Stream(), "train")


class Stream(IterableDataset[tuple[Tensor, int]]):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return ((torch.tensor([float(i)]), i) for i in range(11))


@pytest.mark.parametrize("loader", [DataLoader(Stream(), batch_size=4), [(torch.rand(4, 1), torch.zeros(4))] * 2])
def test_loaders_that_tell_no_length_are_counted(loader: object) -> None:
    split = LoaderSplit(loader)
    batches = list(split.batches(1))
    assert split.number_of_batches(1) == len(batches)
    assert len(split) == sum(len(batch.inputs) for batch in batches) > 0


def test_windows() -> None:
    split = WindowSplit(torch.arange(11), length=5)
    assert len(split) == 2
    batch = next(split.batches(8))
    assert batch.inputs.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert batch.targets is not None
    assert batch.targets.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert split.subset([1]).take([0]).inputs.tolist() == [[5, 6, 7, 8, 9]]
    assert len(WindowSplit(torch.arange(10), length=5)) == 1
    assert len(WindowSplit(torch.arange(11), length=5, stride=1)) == 6
    with pytest.raises(DataError, match="more than one window of 5"):
        WindowSplit(torch.arange(5), length=5)

from __future__ import annotations

import torch
from torch.nn import functional as F

from efficientdnns.data import compose, random_crop, random_flip


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_crop_equals_cropping_image_by_image() -> None:
    images = torch.randint(0, 256, (40, 3, 12, 9), dtype=torch.uint8)
    dy, dx = torch.randint(0, 7, (2, 40), generator=generator(4)).tolist()
    padded = F.pad(images, (3, 3, 3, 3))
    expected = torch.stack([padded[i, :, dy[i] : dy[i] + 12, dx[i] : dx[i] + 9] for i in range(40)])
    cropped = random_crop(3)(images, generator(4))
    assert torch.equal(cropped, expected)
    assert cropped.is_contiguous()
    assert len(set(dy)) > 3
    assert dy != dx


def test_flip_equals_flipping_image_by_image() -> None:
    images = torch.rand(40, 3, 5, 4)
    chosen = (torch.rand(40, generator=generator(4)) < 0.5).tolist()
    expected = torch.stack([image.flip(-1) if flip else image for image, flip in zip(images, chosen)])
    assert torch.equal(random_flip()(images, generator(4)), expected)
    assert 5 < sum(chosen) < 35


def test_compose_shares_the_generator_in_order() -> None:
    images = torch.rand(10, 3, 8, 8)
    shared = generator(1)
    expected = random_flip()(random_crop(2)(images, shared), shared)
    assert torch.equal(compose(random_crop(2), random_flip())(images, generator(1)), expected)

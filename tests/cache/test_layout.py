"""Bytes per token, the capacity plan, and the tensors that follow the layout."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from cierzo.cache.layout import CacheLayout, plan_capacity
from cierzo.cache.pool import HUGE_PAGE_BYTES, GqaPages, KVPool, MlaPages

SMALL4 = CacheLayout(kind="mla", num_layers=36, block_tokens=32, latent_values=320, dtype="bfloat16")
SMALL3 = CacheLayout(kind="gqa", num_layers=40, block_tokens=16, num_kv_heads=8, head_dim=128, dtype="bfloat16")


def test_the_published_sizes() -> None:
    """Mistral Small 4: 36 layers of 256 + 64 values; 262,144 tokens take 6,039,797,760 bytes."""
    assert SMALL4.bytes_per_token == 23_040
    assert plan_capacity(SMALL4, 262_144 // 32).total_bytes == 6_039_797_760
    assert SMALL3.bytes_per_token == 40 * 2 * 8 * 128 * 2
    assert SMALL3.bytes_per_block == 16 * SMALL3.bytes_per_token


def test_requests_are_counted_in_whole_blocks() -> None:
    plan = plan_capacity(SMALL4, 2 * 128 + 127)
    assert [plan.requests(4096), plan.requests(4097), plan.requests(262_144)] == [2, 2, 0]
    assert plan_capacity(SMALL4, 2 * 129 - 1).requests(4097) == 1


def test_the_plan_as_printed() -> None:
    text = str(plan_capacity(SMALL4, 8192))
    assert "5.625 GiB: 8,192 blocks of 32 tokens, 262,144 tokens at 23,040 bytes each" in text
    assert "64 of 4k, 8 of 32k, 1 of 256k" in text


def test_int8_rows_carry_their_scales() -> None:
    """Small 4: 36 layers of 256 + 64 bytes and two floats; Small 3: a float for each key and each value."""
    assert msgspec.structs.replace(SMALL4, dtype="int8").bytes_per_token == 36 * 328
    assert msgspec.structs.replace(SMALL3, dtype="int8").bytes_per_token == 40 * 2 * 8 * 132


@pytest.mark.parametrize(
    ("dtype", "torch_dtype", "mla_width", "gqa_width"),
    [
        ("bfloat16", torch.bfloat16, 6, 8),
        ("float32", torch.float32, 6, 8),
        ("fp8", torch.float8_e4m3fn, 6, 8),
        ("int8", torch.uint8, 14, 12),
    ],
)
def test_pages_have_the_layouts_shape_and_weight(
    dtype: str, torch_dtype: torch.dtype, mla_width: int, gqa_width: int
) -> None:
    mla = CacheLayout(kind="mla", num_layers=2, block_tokens=4, latent_values=6, dtype=dtype)  # type: ignore[arg-type]
    pool = KVPool(mla, 3, "cpu")
    assert len(pool.layers) == 2
    for pages in pool.layers:
        assert isinstance(pages, MlaPages)
        assert (pages.latents.shape, pages.latents.dtype) == ((3, 4, mla_width), torch_dtype)
    assert sum(p.latents.nbytes for p in pool.layers if isinstance(p, MlaPages)) == 3 * mla.bytes_per_block
    gqa = CacheLayout(kind="gqa", num_layers=2, block_tokens=4, num_kv_heads=2, head_dim=8, dtype=dtype)  # type: ignore[arg-type]
    num_bytes = 0
    for pages in KVPool(gqa, 3, "cpu").layers:
        assert isinstance(pages, GqaPages)
        assert pages.keys.shape == pages.values.shape == (3, 4, 2, gqa_width)
        assert pages.keys.data_ptr() != pages.values.data_ptr()
        num_bytes += pages.keys.nbytes + pages.values.nbytes
    assert num_bytes == 3 * gqa.bytes_per_block


def test_large_pools_ask_for_huge_memory_pages() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("this system has no transparent huge pages")
    pool = KVPool(msgspec.structs.replace(SMALL4, num_layers=1), 1024, "cpu")
    pages = pool.layers[0]
    assert isinstance(pages, MlaPages)
    assert "hg" in memory_flags(pages.latents.data_ptr() + HUGE_PAGE_BYTES)


def memory_flags(address: int) -> list[str]:
    """What the kernel keeps about the mapping of this process that holds `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        name, _, rest = line.partition(":" if line[0].isupper() else " ")
        if not line[0].isupper():
            first, last = (int(end, 16) for end in name.split("-"))
            inside = first <= address < last
        elif inside and name == "VmFlags":
            return rest.split()
    return []


@pytest.mark.parametrize(
    ("max_model_len", "told"),
    [(8192, "64 of 4k, 32 of 8k"), (3000, "87 of 3,000"), (262_144, "64 of 4k, 8 of 32k, 1 of 256k")],
)
def test_the_text_names_no_request_that_is_too_long(max_model_len: int, told: str) -> None:
    assert str(plan_capacity(SMALL4, 8192, max_model_len)).endswith(f"fits requests  {told} tokens")

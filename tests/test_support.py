"""What tests use to run other processes: how it fails is what is read first when a test fails."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from support.children import ChildError, join_group, run_python, run_ranks


def summed(number: int) -> tuple[int, float, str]:
    total = torch.tensor(float(dist.get_rank() + number))
    dist.all_reduce(total)
    return dist.get_rank(), total.item(), os.environ["LOCAL_RANK"]


def joined_later() -> int:
    assert not dist.is_initialized()
    join_group()
    return dist.get_world_size()


def one_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the reason")
    dist.barrier()


def one_is_killed() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)


def test_ranks_are_a_group_and_return_what_the_function_returns() -> None:
    assert run_ranks(2, summed, 3) == [(0, 7.0, "0"), (1, 7.0, "1")]
    assert run_ranks(3, summed, 1, nodes=True) == [(rank, 6.0, "0") for rank in range(3)]
    assert run_ranks(2, joined_later, join=False) == [2, 2]


def test_the_first_line_of_a_failure_is_what_the_rank_raised() -> None:
    with pytest.raises(ChildError, match=r"\AValueError: the reason \[one_raises on rank 1 ended with 1\]\n"):
        run_ranks(2, one_raises)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_rank_can_be_killed_and_the_others_do_not_outlive_it() -> None:
    assert run_ranks(2, one_is_killed, killed=1) == []
    with pytest.raises(ChildError, match="was not killed"):
        run_ranks(2, summed, 1, killed=1)


def test_the_first_line_of_a_failure_is_what_the_program_printed_last() -> None:
    assert run_python("-c", "print(1)").stdout == "1\n"
    with pytest.raises(ChildError, match=r"\AZeroDivisionError: division by zero \["):
        run_python("-c", "1 / 0")

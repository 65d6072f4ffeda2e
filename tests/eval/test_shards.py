"""Shards: which there are, who makes which, and who waits for whom."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from diffaccel.eval.runs import shards
from diffaccel.eval.runs.shards import run_shards, shard_ranges


@pytest.fixture
def as_process(monkeypatch: pytest.MonkeyPatch):
    def set_process(index: int, count: int) -> None:
        state = SimpleNamespace(process_index=index, num_processes=count, is_main_process=index == 0, device="cuda:1")
        monkeypatch.setattr(shards, "PartialState", lambda cpu: state)

    return set_process


@pytest.mark.parametrize(("total", "lengths"), [(1, [1]), (64, [64]), (65, [64, 1]), (130, [64, 64, 2])])
def test_ranges_cover_everything_once(total: int, lengths: list[int]) -> None:
    ranges = shard_ranges(total)
    assert [len(indices) for indices in ranges] == lengths
    assert [i for indices in ranges for i in indices] == list(range(total))


def test_finished_shards_are_not_made_again() -> None:
    made: list[int] = []
    run_shards(shard_ranges(200), lambda k: k in (0, 2), made.append, label="", progress=False)
    assert made == [1, 3]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_processes_part_the_shards_among_them(as_process, count: int) -> None:
    made: list[int] = []
    for index in range(count):
        as_process(index, count)
        own: list[int] = []
        # to this process, the shards of all others look finished after the first look
        looks: dict[int, int] = {}

        def is_done(k: int, looks: dict[int, int] = looks) -> bool:
            looks[k] = looks.get(k, 0) + 1
            return looks[k] > 1

        run_shards(shard_ranges(5, 1), is_done, own.append, label="", progress=False, poll_seconds=0)
        made += own
    assert sorted(made) == [0, 1, 2, 3, 4]


def test_a_process_waits_for_the_shards_of_others(as_process) -> None:
    as_process(0, 2)
    looks = 0

    def is_done(k: int) -> bool:
        nonlocal looks
        looks += k == 1
        return k == 1 and looks > 3

    made: list[int] = []
    run_shards(shard_ranges(2, 1), is_done, made.append, label="", progress=False, poll_seconds=0)
    assert made == [0]
    assert looks == 4


def test_the_bar_counts_pictures_and_only_the_first_process_shows_it(as_process, capsys) -> None:
    as_process(0, 1)
    run_shards(shard_ranges(65), lambda k: False, lambda k: None, label="pictures")
    assert "65/65" in capsys.readouterr().err
    as_process(1, 2)
    run_shards(shard_ranges(65), lambda k: k == 0, lambda k: None, label="pictures")
    assert capsys.readouterr().err == ""


def test_the_device_is_the_process_s_own_only_where_there_are_several(as_process) -> None:
    as_process(1, 2)
    assert shards.process_device() == "cuda:1"
    assert not shards.is_first_process()
    as_process(0, 1)
    assert shards.process_device() is None
    assert shards.is_first_process()

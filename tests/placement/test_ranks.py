"""Ranks: what they tell each other, and how they end together."""

import os
import signal
import time

import pytest
import torch

from duqpp.errors import InputError
from duqpp.placement import HOST
from duqpp.placement import ranks as module
from duqpp.placement.ranks import ALONE, Ranks, device_of_rank, joined
from tests.ranks import ForkedRanks, together

BFLOAT16 = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
SUMMANDS = torch.randn(3, 1000, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("items", [0, 1, 7, 8, 100])
def test_shares_are_runs_of_all_items_as_equal_as_can_be(count, items):
    shares = [list(range(items))[Ranks(rank, count).share(items)] for rank in range(count)]
    assert [item for share in shares for item in share] == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def _everything(ranks: Ranks) -> dict[str, object]:
    """Each operation once, of values that differ by rank: some have no rows."""
    own = {0: slice(0, 4), 1: slice(4, 4), 2: slice(4, 7)}[ranks.index]
    return {
        "all": ranks.all({"rank": ranks.index}),
        "first": ranks.first(lambda: f"of {ranks.index}"),
        "place": ranks.place(10 * (ranks.index + 1)),
        "gather": ranks.gather(BFLOAT16[own]),
        "of one dimension": ranks.gather(torch.arange(7)[own]),
        "of none": ranks.gather(torch.empty(0, 5)),
        "sum": ranks.sum_(SUMMANDS[ranks.index].clone()),
        "max": ranks.max_(SUMMANDS[ranks.index].float()),
        "broadcast": ranks.broadcast_(SUMMANDS[ranks.index].clone(), 1),
        "identity": (ranks.index, ranks.count, ranks.local, ranks.is_first),
    }


def test_what_three_ranks_tell_each_other(tmp_path):
    found = together(3, _everything, tmp_path)
    for rank, own in enumerate(found):
        assert own["all"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert own["first"] == "of 0"
        assert own["place"] == ((0, 10, 30)[rank], 60)
        assert torch.equal(own["gather"], BFLOAT16)
        assert own["of one dimension"].tolist() == list(range(7))
        assert own["of none"].shape == (0, 5)
        assert torch.equal(own["sum"], found[0]["sum"]), "the same bits on all"
        assert torch.equal(own["sum"].float(), SUMMANDS.sum(0).float())
        assert torch.equal(own["max"], SUMMANDS.float().amax(0))
        assert torch.equal(own["broadcast"], SUMMANDS[1])
        assert own["identity"] == (rank, 3, rank, rank == 0)


def test_alone_every_operation_gives_back_what_it_is_given():
    x = torch.randn(4, 3)
    with joined(HOST) as ranks:
        assert ranks is ALONE
        assert ranks.all(1) == [1] and ranks.first(lambda: 2) == 2 and ranks.place(3) == (0, 3)
        made = [ranks.sum_(x), ranks.max_(x), ranks.gather(x), ranks.broadcast_(x, 0)]
        assert all(same is x for same in made)


def _fail(ranks: Ranks, how: str) -> None:
    """Rank 1 of three ends as `how` says, while the others wait for it."""
    if ranks.index == 1:
        if how == "error":
            raise InputError("something is wrong")
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    ranks.all(None)


@pytest.mark.parametrize("how", ["error", "killed"])
def test_the_end_of_a_rank_is_the_end_of_all_and_the_first_alone_says_why(how, tmp_path):
    def run(rank: int) -> None:
        said = tmp_path / f"{rank}.txt"
        try:
            with joined(HOST) as ranks:
                _fail(ranks, how)
        except Exception as error:
            said.write_text(f"{type(error).__name__}: {error}")
            raise SystemExit(2) from error

    codes = ForkedRanks(3, run).wait(20)
    said = [path.read_text() for path in tmp_path.glob("*.txt")]
    assert len(said) == 1, said
    if how == "error":
        assert said == ["InputError: something is wrong"]
        assert codes == [1, 2, 1]
    else:
        assert said[0].startswith("RankLostError: another rank has ended: ")
        assert codes[1] == -signal.SIGKILL and sorted((codes[0], codes[2])) == [1, 2]


def test_sigterm_ends_a_rank_that_waits_for_another_which_does_not_answer(
    tmp_path, monkeypatch, capfd
):
    """As with NCCL, whose operations wait for ever for a rank that is gone."""
    monkeypatch.setattr(module, "_GRACE", 0.2)
    waits = tmp_path / "waits"

    def run(rank: int) -> None:
        with joined(HOST) as ranks:
            if ranks.is_first:
                waits.write_text(str(os.getpid()))
            _fail(ranks, "stopped")

    forked = ForkedRanks(2, run)
    while not waits.exists() or not waits.read_text():
        time.sleep(0.01)
    time.sleep(0.3)  # until it waits
    os.kill(int(waits.read_text()), signal.SIGTERM)
    assert forked.wait_for(0) == 128 + signal.SIGTERM
    forked.kill(1)
    assert capfd.readouterr().err == (
        "error: the job was told to end, as it is when one of its ranks ends; its finished blocks "
        "are kept\n"
    )


def test_every_rank_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_of_rank(torch.device("cuda")) == torch.device("cuda:3")
    assert device_of_rank(HOST) == HOST
    with pytest.raises(InputError, match="`device` cuda:1 is one GPU"):
        device_of_rank(torch.device("cuda:1"))
    monkeypatch.delenv("WORLD_SIZE")
    assert device_of_rank(torch.device("cuda:1")) == torch.device("cuda:1")


def test_gpus_without_nccl_are_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with (
        pytest.raises(InputError, match=r"several GPUs need NCCL, which torch .* is built without"),
        joined(torch.device("cuda:0")),
    ):
        pass

"""The scheduler alone, without a clock: who computes what, and whose blocks are whose."""

import pytest

from planner.errors import BadInput
from planner.simulator.scheduler import Batching, KVRoom, Scheduler, Sequence
from planner.simulator.workload import HASHED_TOKENS

H = HASHED_TOKENS


def make(blocks=10_000, block_tokens=16, tokens=2048, seqs=256, caching=True, own=0) -> Scheduler:
    room = KVRoom(blocks=blocks, block_tokens=block_tokens, blocks_per_request=own)
    return Scheduler(room, Batching(max_num_batched_tokens=tokens, max_num_seqs=seqs, prefix_caching=caching))


def queue(scheduler: Scheduler, *requests: tuple) -> list[Sequence]:
    sequences = [Sequence(i, *request) for i, request in enumerate(requests)]
    for sequence in sequences:
        scheduler.add(sequence)
    return sequences


def step(scheduler: Scheduler, draft_len: int = 0, gained: int = 1) -> list[tuple[int, int, int]]:
    """One step in which each request that decodes gains so many tokens; returns (request, tokens, before) of the chunks."""
    plan = scheduler.schedule(draft_len)
    decoding = scheduler.decoding
    n = plan.num_decoding
    decoding.length[:n] = (decoding.length[:n] + gained).clip(max=decoding.goal[:n])
    chunks = [(chunk.sequence.index, chunk.tokens, chunk.before) for chunk in plan.chunks]
    scheduler.finish()
    scheduler.complete(plan)
    return chunks


def test_prompts_share_the_budget_in_the_order_they_came():
    scheduler = make(tokens=1000)
    queue(scheduler, (600, 5), (700, 5), (100, 5))
    assert step(scheduler) == [(0, 600, 0), (1, 400, 0)]
    assert step(scheduler) == [(1, 300, 400), (2, 100, 0)]
    assert step(scheduler) == [] and len(scheduler.decoding.sequences) == 3


def test_decodes_come_before_prompts():
    scheduler = make(tokens=100)
    queue(scheduler, (50, 20), (50, 20), (500, 5))
    step(scheduler)
    assert step(scheduler, draft_len=3) == [(2, 92, 0)]


def test_decodes_that_exceed_the_budget_wait_their_turn():
    scheduler = make(tokens=10)
    queue(scheduler, (2, 20), (2, 20), (2, 20), (2, 20))
    step(scheduler)
    assert scheduler.schedule(draft_len=3).num_decoding == 2


def test_no_more_requests_run_than_allowed():
    scheduler = make(seqs=2)
    queue(scheduler, (10, 3), (10, 2), (10, 3))
    step(scheduler)
    assert scheduler.num_running == 2
    step(scheduler)  # the second one is done
    assert step(scheduler) == [(2, 10, 0)]


def test_a_prompt_waits_until_all_of_it_has_room_and_nobody_overtakes_it():
    scheduler = make(blocks=10, caching=False)
    queue(scheduler, (100, 2), (100, 2), (10, 2))
    assert step(scheduler) == [(0, 100, 0)]  # 7 of 10 blocks
    assert step(scheduler) == []
    assert step(scheduler) == [(1, 100, 0), (2, 10, 0)]


def test_blocks_are_those_of_the_tokens_and_of_the_request():
    scheduler = make(blocks=100, own=3)
    queue(scheduler, (33, 9))
    step(scheduler)
    assert scheduler.used_blocks == 3 + 3  # 33 tokens, and the request's own
    step(scheduler, draft_len=15)  # 34 known tokens, one of which has no KV yet, and slots for 15 drafts
    assert scheduler.used_blocks == 4 + 3
    for _ in range(9):
        step(scheduler)
    assert scheduler.used_blocks == 0 and scheduler.num_running == 0


def test_bytes_of_target_and_drafter_become_blocks():
    room = KVRoom.of_bytes(10_000, bytes_per_token=30, bytes_per_request=500, block_tokens=16)
    assert room == KVRoom(blocks=20, block_tokens=16, blocks_per_request=2)
    with pytest.raises(BadInput, match="must hold a block"):
        KVRoom.of_bytes(100, bytes_per_token=30)


def test_a_decode_without_a_block_takes_the_youngest_requests_and_that_one_is_computed_again():
    scheduler = make(blocks=4, caching=False)
    old, young = queue(scheduler, (31, 40), (31, 40))
    step(scheduler)
    step(scheduler)  # both have 32 tokens with KV: two blocks each, all of them
    plan = scheduler.schedule(0)
    assert plan.preempted and plan.num_decoding == 1 and not plan.chunks
    assert young.preemptions == 1 and old.preemptions == 0 and scheduler.waiting[0] is young and young.length == 33
    assert scheduler.used_blocks == 3


def test_a_partly_computed_prompt_is_the_youngest():
    scheduler = make(blocks=12, tokens=70, caching=False)
    _, young = queue(scheduler, (63, 40), (120, 5))
    step(scheduler)
    step(scheduler)
    assert scheduler.partial is young and young.computed == 76
    step(scheduler)  # the older one needs a fifth block
    assert scheduler.partial is None and scheduler.waiting[0] is young and young.preemptions == 1


def test_a_prefix_is_computed_once():
    scheduler = make(tokens=4096)
    first, second = queue(scheduler, (3 * H + 5, 2, (1, 2, 3, 9)), (3 * H + 7, 2, (1, 2, 4, 8)))
    assert step(scheduler) == [(0, 3 * H + 5, 0), (1, H + 7, 2 * H)]
    assert (first.reused, second.reused) == (0, 2 * H)
    blocks = H // 16
    assert scheduler.used_blocks == 3 * blocks + 1 + blocks + 1  # the shared ones count once


def test_one_token_of_a_prompt_is_always_computed():
    scheduler = make(tokens=4096)
    queue(scheduler, (2 * H, 2, (1, 2)), (2 * H, 2, (1, 2)))
    assert step(scheduler) == [(0, 2 * H, 0), (1, H, H)]


def test_the_prefix_used_least_recently_goes_first():
    blocks = H // 16
    scheduler = make(blocks=4 * blocks, tokens=4 * H)
    for number, key in enumerate([1, 2, 1, 3, 4]):  # one after the other, each with a block of its own for the rest
        scheduler.add(Sequence(number, H + 1, 1, (key, 100 + number)))
        step(scheduler)
    found = []
    for number, key in enumerate([1, 4, 3, 2]):
        sequence = Sequence(10 + number, H + 1, 1, (key, 200 + number))
        scheduler.add(sequence)
        step(scheduler)
        found.append(sequence.reused)
    assert found == [H, H, H, 0]  # key 2 was the one to go


def test_nothing_is_shared_without_prefix_caching():
    scheduler = make(caching=False, tokens=4096)
    queue(scheduler, (2 * H + 1, 2, (1, 2)), (2 * H + 1, 2, (1, 2)))
    assert step(scheduler) == [(0, 2 * H + 1, 0), (1, 2 * H + 1, 0)]
    assert all(sequence.reused == 0 for sequence in scheduler.decoding.sequences)


def test_a_preempted_request_finds_what_nobody_took_meanwhile():
    scheduler = make(blocks=8)
    _, young = queue(scheduler, (63, 3), (63, 40))
    step(scheduler)
    step(scheduler)
    step(scheduler)  # the older one needs a fifth block, takes one of the younger's four, and is done
    assert young.preemptions == 1 and not scheduler.decoding.sequences
    assert step(scheduler) == [(1, 65 - 48, 48)]
    assert young.reused == 48


def test_a_request_fits_if_it_could_end_alone():
    scheduler = make(blocks=4, own=1)
    assert scheduler.fits(40, 8, 0) and not scheduler.fits(40, 9, 0) and not scheduler.fits(40, 8, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: KVRoom(blocks=0),
        lambda: Batching(max_num_batched_tokens=0),
        lambda: make(block_tokens=100),
        lambda: KVRoom.of_bytes(1e9, bytes_per_token=0),
    ],
)
def test_what_no_engine_has_is_refused(wrong):
    with pytest.raises(BadInput):
        wrong()

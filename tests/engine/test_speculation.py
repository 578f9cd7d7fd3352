"""When to draft: the policy on a synthetic clock, and the backlog of positions the draft layer has not read."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilery.engine.config import MAX_SPECULATIVE_TOKENS
from tilery.engine.speculation import BACKLOG_TOKENS, DraftPolicy, MtpBacklog
from tilery.models.step import DECODE_TOKENS

CYCLE = DraftPolicy.PERIOD + DraftPolicy.TRIAL


def drive(policy, steps, seconds, requests=1):
    """Takes the policy's decisions for `steps` steps that cost seconds[used] per token; the decisions."""
    made = []
    for _ in range(steps):
        used = policy.use_drafts(requests)
        policy.record(requests, used, seconds[used] * requests, requests)
        made.append(used)
    return made


def test_a_verification_fits_into_a_decode_chunk():
    assert MAX_SPECULATIVE_TOKENS == DECODE_TOKENS - 1


def test_starts_with_drafts_and_keeps_them_while_they_win():
    policy = DraftPolicy(auto_off=True)
    first = DraftPolicy.WARMUP + DraftPolicy.TRIAL
    made = drive(policy, first + 3 * CYCLE, {True: 0.5, False: 1.0})
    assert made[:first] == [True] * DraftPolicy.WARMUP + [False] * DraftPolicy.TRIAL
    assert made[first:] == ([True] * DraftPolicy.PERIOD + [False] * DraftPolicy.TRIAL) * 3
    assert not policy.disabled


def test_switches_off_when_losing_and_tries_again():
    policy = DraftPolicy(auto_off=True)
    first = DraftPolicy.WARMUP + DraftPolicy.TRIAL
    drive(policy, first, {True: 1.5, False: 1.0})
    assert drive(policy, CYCLE, {True: 1.5, False: 1.0}) == [False] * DraftPolicy.PERIOD + [True] * DraftPolicy.TRIAL
    assert policy.disabled
    # Drafts become good: the next trials show it.
    made = drive(policy, 40 * CYCLE, {True: 0.2, False: 1.0})
    assert made[-CYCLE:].count(True) == DraftPolicy.PERIOD
    assert not policy.disabled


def test_each_batch_size_has_its_own_measurements():
    policy = DraftPolicy(auto_off=True)
    for _ in range(2 * CYCLE):
        drive(policy, 1, {True: 0.5, False: 1.0}, requests=1)
        drive(policy, 1, {True: 2.0, False: 1.0}, requests=16)
    assert drive(policy, CYCLE, {True: 0.5, False: 1.0}, requests=1).count(True) == DraftPolicy.PERIOD
    assert drive(policy, CYCLE, {True: 2.0, False: 1.0}, requests=16).count(True) == DraftPolicy.TRIAL
    assert drive(policy, CYCLE, {True: 2.0, False: 1.0}, requests=31).count(True) == DraftPolicy.TRIAL, "same bucket"


def test_tokens_count_not_steps():
    """A step with drafts takes longer, but puts out more tokens."""
    policy = DraftPolicy(auto_off=True)
    for _ in range(DraftPolicy.WARMUP + DraftPolicy.TRIAL):
        used = policy.use_drafts(1)
        policy.record(1, used, 1.5 if used else 1.0, 2 if used else 1)
    assert policy.use_drafts(1)
    assert not policy.disabled


@given(st.lists(st.floats(0, 10), max_size=400))
def test_never_off_without_auto_off(times):
    policy = DraftPolicy(auto_off=False)
    for seconds in times:
        assert policy.use_drafts(3)
        policy.record(3, True, seconds, 1)
    assert not policy.disabled


def test_nothing_changes_while_one_way_is_unmeasured():
    """Requests that cannot be drafted for put out tokens without drafts whatever was decided."""
    policy = DraftPolicy(auto_off=True)
    for _ in range(3 * CYCLE):
        policy.use_drafts(1)
        policy.record(1, False, 1.0, 1)
    assert not policy.disabled


# ---- the backlog -------------------------------------------------------------------------------------------------


def rows(start, stop):
    """Hidden states that name their positions."""
    return torch.arange(start, stop, dtype=torch.float32)[:, None]


def holds(backlog):
    return [int(value) for part in backlog.hidden for value in part[:, 0]]


def test_positions_follow_on():
    backlog = MtpBacklog()
    backlog.add(0, rows(0, 5))
    backlog.add(5, rows(5, 6))
    assert (backlog.start, backlog.stop, holds(backlog)) == (0, 6, list(range(6)))
    backlog.clear()
    assert (backlog.start, backlog.stop, holds(backlog)) == (6, 6, [])
    backlog.add(6, rows(6, 9))
    assert (backlog.start, holds(backlog)) == (6, [6, 7, 8])


@pytest.mark.parametrize("jump", [0, 64, 640])
def test_a_jump_starts_anew(jump):
    backlog = MtpBacklog()
    backlog.add(0, rows(0, 100))
    backlog.add(jump, rows(jump, jump + 3))
    assert (backlog.start, holds(backlog), backlog.lost) == (jump, list(range(jump, jump + 3)), False)


def test_trim_gives_up_until_the_next_jump():
    backlog = MtpBacklog()
    backlog.add(0, rows(0, BACKLOG_TOKENS))
    backlog.trim()
    assert not backlog.lost
    backlog.add(BACKLOG_TOKENS, rows(0, 1))
    backlog.trim()
    assert (backlog.lost, backlog.hidden, backlog.start) == (True, [], BACKLOG_TOKENS + 1)
    backlog.add(BACKLOG_TOKENS + 1, rows(0, 1))
    assert (backlog.lost, backlog.hidden, backlog.stop) == (True, [], BACKLOG_TOKENS + 2)
    backlog.add(64, rows(64, 70))  # preempted and computed again
    assert (backlog.lost, backlog.start, backlog.stop) == (False, 64, 70)


@given(st.lists(st.tuples(st.sampled_from(["next", "jump", "clear", "trim"]), st.integers(1, 400)), max_size=40))
def test_what_is_held_is_what_was_added_since_start(events):
    backlog, position = MtpBacklog(), 0
    for event, n in events:
        if event == "clear":
            backlog.clear()
        elif event == "trim":
            backlog.trim()
        else:
            position = n if event == "jump" else position
            backlog.add(position, rows(position, position + n))
            position += n
        assert backlog.stop == position
        assert holds(backlog) == list(range(backlog.start, backlog.stop))
        assert not (backlog.lost and backlog.hidden)

"""What a saved data position means for a job that is built otherwise."""

from __future__ import annotations

import json

import pytest

from dcp_resume.data import Order, ResumableLoader, ResumableSampler, Tail
from dcp_resume.data.order import shuffled
from dcp_resume.errors import ConfigurationError
from dcp_resume.manifest.report import Severity, overridden

REFUSE, WARN, OK = Severity.REFUSE, Severity.WARN, Severity.OK


def loader_of(num_samples=100, **options):
    options = {"global_batch": 8, "micro_batch": 4, "num_ranks": 1, **options}
    sampler = ResumableSampler(num_samples, **options)
    return ResumableLoader(range(num_samples), sampler, collate_fn=list)


def saved_after(num_steps, **options):
    loader = loader_of(**options)
    for batches, _ in enumerate(loader, 1):
        if batches == 2 * num_steps:
            break
    return json.loads(json.dumps(loader.state_dict()))


SAVED = saved_after(3)


def differences(saved, **options):
    return [
        (item.severity, item.kind, item.where) for item in loader_of(**options).differences(saved)
    ]


def message(saved, **options):
    return "\n".join(str(item) for item in loader_of(**options).differences(saved))


def test_the_state_is_plain_and_equal_on_all_ranks():
    states = []
    for rank in range(4):
        loader = loader_of(rank=rank, num_ranks=4, micro_batch=1, fingerprint="v1")
        batches = iter(loader)
        next(batches), next(batches)
        states.append(loader.state_dict())
    assert states == [states[0]] * 4
    assert states[0] == {
        "version": 1,
        "epoch": 0,
        "epoch_samples": 8,
        "consumed_samples": 8,
        "received_micro_batches": 0,
        "next_sample": shuffled(100, 0, 0)[8].item(),
        "num_samples": 100,
        "seed": 0,
        "order": "shuffled",
        "tail": "carry",
        "global_batch": 8,
        "micro_batch": 1,
        "num_ranks": 4,
        "fingerprint": "v1",
    }


def test_nothing_differs_from_itself():
    assert differences(SAVED) == []


# What goes on.


@pytest.mark.parametrize(
    ("severity", "where", "options"),
    [
        (OK, "num_ranks", {"num_ranks": 2}),
        (OK, "num_ranks", {"num_ranks": 8, "micro_batch": 1}),
        (OK, "micro_batch", {"micro_batch": 2}),
        (WARN, "global_batch", {"global_batch": 12}),
        (WARN, "global_batch", {"global_batch": 15, "micro_batch": 5, "num_ranks": 3}),
        (WARN, "tail", {"tail": Tail.DROP}),
    ],
)
def test_another_split_goes_on_and_says_the_arithmetic(severity, where, options):
    assert differences(SAVED, **options) == [(severity, "data", where)]
    loader = loader_of(**options)
    loader.load_state_dict(SAVED)
    assert loader.consumed_samples == 24
    if where != "tail":
        text = message(SAVED, **options)
        assert "saved global batch 8 = micro batch 4 * 1 ranks * accumulation 2, now" in text
        assert "at sample 24 of epoch 0" in text


def test_a_dropped_tail_goes_on_with_a_batch_that_divides_what_was_consumed():
    saved = saved_after(3, tail=Tail.DROP)
    assert differences(saved, tail=Tail.DROP, global_batch=12) == [(WARN, "data", "global_batch")]
    loader = loader_of(tail=Tail.DROP, global_batch=12)
    loader.load_state_dict(saved)
    assert (loader.consumed_samples, len(loader)) == (24, 3 * (76 // 12))


def test_a_dropped_tail_that_no_batch_fits_into_any_more_ends_the_epoch():
    next_sample = shuffled(100, 0, 0)[96].item()
    saved = SAVED | {"epoch_samples": 96, "consumed_samples": 96, "next_sample": next_sample}
    loader = loader_of(tail=Tail.DROP, global_batch=32)
    loader.load_state_dict(saved)
    assert (loader.epoch, loader.consumed_samples, len(loader)) == (1, 96, 3 * 8)


def test_an_unnamed_dataset_is_a_warning_only():
    assert differences(SAVED, fingerprint="v1") == [(WARN, "data", "fingerprint")]


# What is refused.


@pytest.mark.parametrize(
    ("where", "options", "says"),
    [
        ("num_samples", {"num_samples": 120}, "saved 100, now 120"),
        ("seed", {"seed": 7}, "saved 0, now 7"),
        ("order", {"order": Order.SEQUENTIAL}, "saved 'shuffled', now 'sequential'"),
    ],
)
def test_another_order_is_refused_with_both_values(where, options, says):
    assert differences(SAVED, **options) == [(REFUSE, "data", where)]
    assert f"{says}: the order of epoch 0 is another one, and 24 of its 100" in message(
        SAVED, **options
    )
    with pytest.raises(ConfigurationError, match=says):
        loader_of(**options).load_state_dict(SAVED)


def test_another_dataset_is_refused_with_both_names():
    saved = saved_after(1, fingerprint="v1")
    assert differences(saved, fingerprint="v2") == [(REFUSE, "data", "fingerprint")]
    assert "saved 'v1', now 'v2'" in message(saved, fingerprint="v2")


def test_another_permutation_from_the_same_seed_is_noticed():
    saved = SAVED | {"next_sample": (SAVED["next_sample"] + 1) % 100}
    assert differences(saved) == [(REFUSE, "data", "next_sample")]
    assert f"now {SAVED['next_sample']}, with equal seed" in message(saved)


def test_a_batch_that_does_not_divide_is_refused_with_the_arithmetic_if_the_tail_is_dropped():
    saved = saved_after(6, tail=Tail.DROP)
    options = {"tail": Tail.DROP, "global_batch": 20}
    assert differences(saved, **options) == [(REFUSE, "data", "global_batch")]
    text = message(saved, **options)
    assert "48 consumed samples of the epoch / global batch 20 leaves a remainder of 8" in text
    assert "the nearest that divide are 16 and 24" in text
    options["micro_batch"] = 10
    assert "no multiple of 10 * 1 ranks divides it" in message(saved, **options)


def test_a_tail_is_dropped_only_from_a_whole_batch_on():
    saved = saved_after(13)
    assert (saved["epoch"], saved["epoch_samples"]) == (1, 4)
    assert (REFUSE, "data", "tail") in differences(saved, tail=Tail.DROP)


@pytest.mark.parametrize("past", [100, 101, 10**15])
def test_a_position_past_the_end_is_refused_and_never_clamped(past):
    saved = SAVED | {"epoch_samples": past, "consumed_samples": past}
    assert differences(saved) == [(REFUSE, "position", "epoch_samples")]
    loader = loader_of()
    with pytest.raises(ConfigurationError, match=f"{past} samples of epoch 0.*past the end"):
        loader.load_state_dict(saved)
    assert loader.consumed_samples == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "version 2 with unknown fields"),
        ({"version": None}, "version None"),
        ({"curriculum": 1}, r"unknown fields \['curriculum'\]"),
        ({"epoch": "0"}, "epoch = '0'"),
        ({"seed": True}, "seed = True"),
        ({"order": None}, "order = None"),
        ({"epoch": -1}, "negative"),
        ({"received_micro_batches": 2}, "micro batch 2 of 2"),
        ({"global_batch": 9}, "remainder of 1"),
        ({"num_ranks": 0}, "num_ranks must be"),
    ],
)
def test_a_state_that_cannot_be_read_is_refused_whatever_is_overridden(change, says):
    saved, loader = SAVED | change, loader_of()
    items = list(loader.differences(saved))
    assert [(item.severity, item.kind) for item in items] == [(REFUSE, "position")]
    assert overridden(items, {"*": OK}) == tuple(items)
    with pytest.raises(ConfigurationError, match=says):
        loader.load_state_dict(saved)


def test_a_field_that_is_missing_is_refused_by_name():
    saved = {name: value for name, value in SAVED.items() if name != "tail"}
    with pytest.raises(ConfigurationError, match="tail = None"):
        loader_of().load_state_dict(saved)


# Who decides.


def test_what_was_shown_and_decided_on_is_loaded():
    loader = loader_of(num_samples=120, global_batch=10, micro_batch=5)
    assert [item.severity for item in loader.differences(SAVED)] == [REFUSE, WARN]
    loader.load_state_dict(SAVED)
    assert (loader.epoch, loader.consumed_samples) == (0, 24)
    assert sum(map(len, loader)) == 100  # the last batch is filled from the next epoch
    with pytest.raises(ConfigurationError):  # it was decided once
        loader.load_state_dict(SAVED)


def test_a_decision_holds_for_the_state_that_was_shown_only():
    loader = loader_of(seed=1)
    list(loader.differences(SAVED))
    with pytest.raises(ConfigurationError, match="seed"):
        loader.load_state_dict(saved_after(4))


def test_no_decision_makes_a_position_past_the_end_possible():
    loader = loader_of(num_samples=20)
    list(loader.differences(SAVED))
    with pytest.raises(ConfigurationError, match="past the end") as caught:
        loader.load_state_dict(SAVED)
    assert "num_samples" not in str(caught.value)

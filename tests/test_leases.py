"""How long silence is allowed, and which job is to blame for a death."""

from __future__ import annotations

from hpsearch.leases import (
    FIRST_LEASE_OWN_LOOP_S,
    FIRST_LEASE_S,
    INHERIT_S,
    SHORTEST_FIRST_LEASE_S,
    SHORTEST_LEASE_OWN_LOOP_S,
    SHORTEST_LEASE_S,
    SILENCES,
    LeaseBook,
)


def test_job_may_be_silent_long_before_anything_was_measured() -> None:
    book = LeaseBook()
    book.begin("a", now=0.0)
    assert book.overdue(FIRST_LEASE_S) == []
    assert book.overdue(FIRST_LEASE_S + 1) == [("a", FIRST_LEASE_S)]
    assert book.overdue(FIRST_LEASE_S + 1, own_loop=True) == []
    assert book.overdue(FIRST_LEASE_OWN_LOOP_S + 1, own_loop=True) == [("a", FIRST_LEASE_OWN_LOOP_S)]


def test_job_that_was_heard_from_may_be_silent_for_the_shortest_lease_at_least() -> None:
    book = LeaseBook()
    book.begin("a", now=0.0)
    book.heard("a", now=0.5)
    book.heard("a", now=1.0)
    assert book.overdue(1.0 + SHORTEST_LEASE_S) == []
    assert book.overdue(1.5 + SHORTEST_LEASE_S) == [("a", SHORTEST_LEASE_S)]


def test_job_that_waits_for_another_of_its_worker_is_kept_and_may_still_be_silent_long_when_it_begins() -> None:
    book = LeaseBook()
    book.begin("a", now=0.0)
    book.heard("a", now=20.0)
    limit = book.first_lease_s()
    book.begin("b", now=20.0)
    book.heard("b", now=1000.0, waiting=True)
    assert (book.lease_s, book.first_lease_s()) == (SHORTEST_LEASE_S, limit)  # nothing was learned
    assert ("b", limit) not in book.overdue(1000.0 + limit)
    assert ("b", limit) in book.overdue(1001.0 + limit)


def test_slow_batches_make_leases_longer_and_first_batches_do_not() -> None:
    book = LeaseBook()
    book.begin("a", now=0.0)
    book.heard("a", now=100.0)
    assert (book.lease_s, book.first_lease_s()) == (SHORTEST_LEASE_S, SILENCES * 100.0)
    book.heard("a", now=130.0)
    assert (book.lease_s, book.first_lease_s()) == (SILENCES * 30.0, SILENCES * 100.0)


def test_first_lease_is_never_shorter_than_a_compilation() -> None:
    book = LeaseBook()
    book.begin("a", now=0.0)
    book.heard("a", now=0.01)
    assert book.first_lease_s() == SHORTEST_FIRST_LEASE_S


def test_every_epoch_of_a_users_fit_may_take_as_long_as_a_first_one() -> None:
    book = LeaseBook()
    book.begin("a", now=0.0)
    book.heard("a", now=400.0)
    limit = SILENCES * 400.0
    assert book.first_lease_s(own_loop=True) == limit > SHORTEST_LEASE_OWN_LOOP_S
    assert book.overdue(400.0 + limit, own_loop=True) == []
    assert book.overdue(401.0 + limit, own_loop=True) == [("a", limit)]


def test_short_epochs_of_a_users_fit_are_no_measure_for_another_config() -> None:
    book = LeaseBook()
    book.begin("a", now=0.0)
    book.heard("a", now=2.0)
    assert book.overdue(2.0 + SHORTEST_LEASE_OWN_LOOP_S, own_loop=True) == []


def test_inherited_job_has_a_short_time_to_be_announced_and_then_an_ordinary_lease() -> None:
    book = LeaseBook()
    book.inherit(["a", "b"], now=0.0)
    book.heard("a", now=1.0)
    assert book.overdue(INHERIT_S) == []
    assert book.overdue(INHERIT_S + 1) == [("b", INHERIT_S)]
    assert book.lease_s == SHORTEST_LEASE_S  # silence before the restart is nobody's measurement
    book.end("b")
    assert book.overdue(FIRST_LEASE_S) == []  # it may be compiling
    book.heard("a", now=2.0)
    assert book.overdue(FIRST_LEASE_S + 3) == [("a", SHORTEST_LEASE_S)]


def test_job_that_ended_is_forgotten() -> None:
    book = LeaseBook()
    book.begin("a", now=0.0)
    book.end("a")
    book.heard("a", now=9.0)
    assert book.overdue(1e9) == []

"""Thought counts by the SEAL taxonomy, phrase by phrase."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulligan.tasks import TASKS
from mulligan.thoughts import Thoughts, thought_counts

PLAIN, REFLECTION, TRANSITION = Thoughts(1, 0, 0), Thoughts(1, 1, 0), Thoughts(1, 0, 1)


@pytest.mark.parametrize(
    ("thought", "kind"),
    [
        ("Wait, that is 7.", REFLECTION),
        ("wait", REFLECTION),
        ("  Wait, indented", REFLECTION),
        ("Waiting helps", REFLECTION),  # a start is a start of letters, not of words
        ("So we wait.", PLAIN),  # it only counts at the start
        ("Let us verify it", REFLECTION),
        ("After VERIFYING this", REFLECTION),  # a phrase within a word
        ("I make sure of it", REFLECTION),
        ("Now hold on", REFLECTION),
        ("I think again", REFLECTION),
        ("That's correct", REFLECTION),
        ("It's incorrect", REFLECTION),
        ("This is correct", PLAIN),
        ("Let me check", REFLECTION),
        ("let me check", REFLECTION),
        ("Let us check", PLAIN),
        ("This seems right", REFLECTION),
        ("Alternatively, factor", TRANSITION),
        ("ALTERNATIVELY", TRANSITION),
        ("Or alternatively factor", PLAIN),  # it only counts at the start
        ("Let us think differently", TRANSITION),
        *((f"There is another {noun} here", TRANSITION) for noun in ("way", "approach", "method", "solution")),
        *((f"There is Another {noun} here", TRANSITION) for noun in ("strategy", "technique")),
        ("There is another number", PLAIN),
        ("Another\nway", PLAIN),  # a phrase on one line
        ("Alternatively, let me check", REFLECTION),  # reflection is tested first
        ("Wait, there is another way", REFLECTION),
        ("x = 3", PLAIN),
    ],
)
def test_a_thought(thought, kind):
    assert thought_counts(thought) == kind


@pytest.mark.parametrize(
    ("text", "total"),
    [
        ("", 0),
        ("\n\n \n\n", 0),
        ("one\nthought", 1),
        ("two\n\nthoughts", 2),
        ("two\n \t\nthoughts", 2),  # a line of blanks is blank
        ("two\r\n\r\nthoughts", 2),
        ("two\n\n\n\n\nthoughts", 2),
        ("\n\ntwo\n\nthoughts\n\n", 2),
    ],
)
def test_blank_lines_part_thoughts(text, total):
    assert thought_counts(text) == Thoughts(total, 0, 0)


def test_a_thought_counts_once_however_many_phrases_it_holds():
    assert thought_counts("Wait, hold on, let me check.\n\nAlternatively another way.") == Thoughts(2, 1, 1)


pieces = st.sampled_from(["Wait", "so", "verify", "Alternatively", "another way", "x", "\n", " "])
responses = st.lists(st.lists(pieces, max_size=6).map("".join), max_size=5).map("\n\n".join)


@given(responses, responses)
def test_counts_add_up(left, right):
    one, other, both = map(thought_counts, (left, right, f"{left}\n\n{right}"))
    assert both == Thoughts(
        one.total + other.total, one.reflection + other.reflection, one.transition + other.transition
    )
    assert both.reflection + both.transition <= both.total
    assert thought_counts(left.upper()) == one


def test_which_tasks_are_english():
    assert [name for name, task in TASKS.items() if task.english] == [
        "jsonl",
        "dataset",
        "gsm8k",
        "math",
        "reasoning-gym",
    ]

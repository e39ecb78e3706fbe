"""What every method must keep, as tests that anyone can run on a method of their own (needs pytest)::

    pytest --pyargs mulligan.conformance --method ./mine.py:my_method --method 'srpo(chains=2)+rltt'

Without ``--method`` it runs over every method that Mulligan ships. Each phase of a method that changes over time is a
method of its own here. The models are tiny and made on the spot, in float64, one with loops and one without, as far as
the method permits (``-k looped`` and ``-k qwen3`` choose one); the forest comes from the method's own passes, answered
by a script that holds groups of every kind: none passes, some pass, all pass, truncated ones among them.
"""

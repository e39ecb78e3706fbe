"""Which data sets of reasoning-gym are offered, and why the others are not.

``benchmarks/gym_audit.py`` makes this table and fails where the installed library differs from it.
"""

from __future__ import annotations

AUDITED = "0.1.25"  # of the library; the table says nothing of another version

# One right answer: compared as a text (`gym_score.same`). Most have the library's default scorer, which pays for the
# gold within a longer text; the others have one in one stated form, and scorers of their own that pay for errors.
EXACT = frozenset(
    {
        "acre", "aiw", "arc_1d", "base_conversion", "basic_arithmetic", "bf", "binary_alternation", "caesar_cipher",
        "calendar_arithmetic", "chain_sum", "coin_flip", "count_bits", "count_primes", "course_schedule",
        "emoji_mystery", "game_of_life", "gcd", "gsm_symbolic", "knights_knaves", "largest_island", "lcm",
        "leg_counting", "letter_counting", "mahjong_puzzle", "manipulate_matrix", "maze", "mini_sudoku",
        "modulo_grid", "number_filtering", "number_sequence", "products", "rearc", "rectangle_count", "rotate_matrix",
        "rotten_oranges", "simple_equations", "simple_geometry", "spell_backward", "string_manipulation",
        "string_splitting", "string_synthesis", "sudoku", "syllogism", "word_sequence_reversal", "word_sorting",
    }
)  # fmt: skip

# Scored by the data set itself, in the verifier's worker: its scorer paid nothing for any junk.
OWN_SCORER = frozenset(
    {
        "ab", "circuit_logic", "color_cube_rotation", "cryptarithm", "decimal_chain_sum", "dice",
        "family_relationships", "jugs", "needle_haystack", "palindrome_generation", "palindrome_partitioning",
        "path_star", "power_function", "self_reference", "shortest_path", "tower_of_hanoi", "zebra_puzzles",
    }
)  # fmt: skip

_EVALUATES = "its scorer evaluates text as code"
_CHANGES = "its items change from process to process, so that a seed names no problem"
_NO_GOLD = "it has no gold answers, so that its scorer cannot be checked"
_SLOW = "it takes more than 0.1 s to make a problem"

EXCLUDED: dict[str, str] = {
    **dict.fromkeys(
        (
            *("binary_matrix", "bitwise_arithmetic", "countdown", "intermediate_integration", "n_queens"),
            *("number_sorting", "polynomial_multiplication", "puzzle24", "simple_integration", "spiral_matrix"),
            "string_insertion",
        ),
        _EVALUATES,
    ),
    **dict.fromkeys(
        ("codeio", "isomorphic_strings", "knight_swap", "list_functions", "ransom_note", "word_ladder"), _CHANGES
    ),
    **dict.fromkeys(("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"), _NO_GOLD),
    **dict.fromkeys(("arc_agi", "figlet_font", "futoshiki", "group_anagrams"), _SLOW),
    "advanced_geometry": "its scorer gives 1 to the right answer followed by anything",
    "complex_arithmetic": "its scorer gives 1 to 'nan'",
    "composite": "it is made of other data sets; task 'mixture' does that",
    "decimal_arithmetic": "its scorer gives 1 to digits that are wrong",
    "fraction_simplification": "its scorer gives 1 to the right answer followed by anything",
    "game_of_life_halting": "its scorer gives 1 to any text",
    "kakurasu": "its scorer gives 1 to an answer within any text",
    "letter_jumble": "its scorer gives 1 to the right answer followed by anything",
    "number_format": "its scorer gives 1 to digits that are wrong",
    "polynomial_equations": "its scorer gives 1 to the right answer followed by others",
    "pool_matrix": "its scorer gives 1 to digits that are wrong, and 0.1 to NaN",
    "prime_factorization": "its scorer gives 0.5 to the number of the question",
    "quantum_lock": "its scorer reads the letters of any text as moves",
    "sentence_reordering": "its scorer pays for any order of the words",
    "sokoban": "its scorer reads the letters of any text as moves",
    "survo": "its scorer gives 1 to an answer within any text",
    "time_intervals": "its scorer gives 1 to the right answer followed by others",
    "tsumego": "its scorer pays for the right move within any text",
}

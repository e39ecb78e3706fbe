"""How the shipped pico bases were made: the corpus, the recipe, and the pre-training loop."""

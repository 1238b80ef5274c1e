"""How good a model is: perplexity, divergence, tasks, and methods side by side."""

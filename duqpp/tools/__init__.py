"""What else a user asks for: inspection, plots, generation, doctor, selfcheck."""

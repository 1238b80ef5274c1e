"""Float models: where they come from, their families, and their decoder blocks one at a time."""

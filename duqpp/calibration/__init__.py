"""From calibration text to what the method needs to know of a linear group's input."""

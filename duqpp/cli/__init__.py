"""The duqpp command."""

"""The registry's families, for tests that run on each; and the one of the tiny Llama."""

from types import SimpleNamespace

from duqpp.models import family

FAMILIES = tuple(family.FAMILIES)
# As in the tiny models of `make_tiny`: two query heads read one value head.
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
LLAMA = family.family_of(SimpleNamespace(model_type="llama", **_HEADS))
GROUPS = LLAMA.groups(0)

"""The methods: how a decoder block is quantized. A new one is a module here, and a line below."""

from duqpp.methods.base import Method
from duqpp.methods.fixed import Hadamard, Random, RoundToNearest
from duqpp.methods.learned import Learned
from duqpp.methods.outlier_aware import DuQuant, DuQuantPlusPlus
from duqpp.methods.sequential import Sequential

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        RoundToNearest,
        Hadamard,
        Random,
        Learned,
        DuQuant,
        DuQuantPlusPlus,
        Sequential,
    )
}

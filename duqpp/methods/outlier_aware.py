"""The methods duquant and duquant++: rotations built greedily around outliers."""

from torch import Tensor

from duqpp.methods.independent import GroupByGroup, GroupInput, OneMatrix, scale_rows
from duqpp.methods.options import SearchOptions
from duqpp.rotation import BlockRotation, InputTransform
from duqpp.rotation.construct import duquant_transform, outlier_aware


class DuQuant(GroupByGroup):
    """DuQuant (arXiv 2406.01721) at block size 32: rotation, zigzag permutation, rotation."""

    name = "duquant"
    summary = (
        "the original DuQuant at block size 32: rotation, zigzag channel permutation, rotation"
    )
    Options = SearchOptions
    options: SearchOptions
    fitted = True
    permuted = True

    @property
    def search_steps(self) -> int:
        return 2 * self.options.max_steps

    def transform(self, group: GroupInput) -> InputTransform:
        transform = duquant_transform(
            group.x(), group.generator, per_block=self.per_block, max_steps=self.options.max_steps
        )
        if group.folded_scales is None or transform.pre_rotation is None:
            return transform
        first = scale_rows(transform.pre_rotation.matrix.double(), group.folded_scales)
        return InputTransform(
            transform.rotation, BlockRotation.rounded(first), transform.permutation
        )


class DuQuantPlusPlus(OneMatrix):
    """DuQuant++ (arXiv 2604.17789): one outlier-aware rotation."""

    name = "duquant++"
    summary = "one outlier-aware rotation, built greedily from calibration activations"
    Options = SearchOptions
    options: SearchOptions
    fitted = True

    @property
    def search_steps(self) -> int:
        return self.options.max_steps

    def matrix(self, group: GroupInput) -> Tensor | None:
        return outlier_aware(
            group.x(), group.generator, per_block=self.per_block, max_steps=self.options.max_steps
        )

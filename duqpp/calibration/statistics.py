"""What calibration keeps of one linear group's input, streamed batch by batch."""

import torch
from torch import Tensor

from duqpp.calibration.hessian import ProductSum
from duqpp.errors import InputError
from duqpp.placement import HOST, host_generator
from duqpp.placement.ranks import ALONE, Ranks
from duqpp.placement.stages import stage


class InputStatistics:
    """Channel amax, second moments and samples of an activation x [tokens, K].

    The samples are rows drawn at random, and besides them every row that holds the largest
    magnitude of some channel: outliers belong to single tokens, and under any rescaling of the
    channels the largest value of all is then among the samples.

    Args:
        name: of the linear group, for errors.
        channels: K.
        sample: int64 [S], ascending: which of all tokens to keep.
        second_moment: whether to accumulate x.T x.
        before: how many tokens other ranks have before this one's.
        device: where x will be.
    """

    def __init__(
        self,
        name: str,
        channels: int,
        sample: Tensor,
        *,
        second_moment: bool,
        before: int = 0,
        device: torch.device = HOST,
    ) -> None:
        self.name, self.tokens = name, 0
        self.amax = torch.zeros(channels, dtype=torch.float32, device=device)
        self._gram = ProductSum(channels, device, symmetric=True) if second_moment else None
        self._sample = sample.to(device) - before
        self._sampled: list[Tensor] = []
        self._peaks = torch.zeros(1, channels, dtype=torch.float32, device=device)
        self._peak_row = torch.zeros(channels, dtype=torch.int64, device=device)  # into _peaks

    @stage("statistics")
    def update(self, x: Tensor) -> None:
        """Take in the next tokens: x floating point [..., K].

        Raises: InputError when x has a NaN or an infinity.
        """
        dtype, x = x.dtype, x.flatten(0, -2).float()
        amax = x.abs().amax(0)  # NaN wins over any number
        if not torch.isfinite(amax).all():
            raise overflow_of_input(self.name, dtype)
        if self._gram is not None:
            self._gram.update(x, x)
        local = self._sample[(self._sample >= self.tokens) & (self._sample < self.tokens + len(x))]
        self._sampled.append(x[local - self.tokens].clone())
        kept, holder = len(self._peaks), self._peak_row
        raised = (amax > self.amax).nonzero().flatten()  # few, after the first batches
        holder[raised] = x[:, raised].abs().argmax(0) + kept
        holders, self._peak_row = holder.unique(return_inverse=True)
        old, new = holders[holders < kept], holders[holders >= kept] - kept
        self._peaks = torch.cat((self._peaks[old], x[new]))
        self.amax = torch.maximum(self.amax, amax)
        self.tokens += len(x)

    def merge(self, ranks: Ranks) -> None:
        """Be what one process would have seen, which takes in the tokens of all ranks in order."""
        own = ranks.gather(self.amax[None]).argmax(0) == ranks.index  # the first that has the peak
        peaks = ranks.gather(self._peaks[self._peak_row[own].unique()])
        self._sampled = [torch.cat((ranks.gather(torch.cat(self._sampled)), peaks))]
        self._peaks = peaks[:0].clone()
        self.tokens = sum(ranks.all(self.tokens))
        ranks.max_(self.amax)

    def take_gram(self, ranks: Ranks = ALONE) -> Tensor:
        """x.T x of all ranks, float32 [K, K], which is let go of here: it is read once."""
        if self._gram is None:
            raise ValueError(f"{self.name}: second moments are not kept, or were taken")
        gram, self._gram = self._gram, None
        return gram.take(ranks)

    def samples(self) -> Tensor:
        """The sampled rows and the rows of channel peaks: float32 [n, K]; once merged, no copy."""
        parts = [rows for rows in (*self._sampled, self._peaks) if len(rows)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def overflow_of_input(name: str, dtype: torch.dtype) -> InputError:
    """The error of a linear whose input, of that dtype, is not finite."""
    hint = ": float16 ends at 65504; compute in `dtype=float32`" if dtype == torch.float16 else ""
    return InputError(f"the input of {name} has NaN or infinite values in calibration{hint}")


def draw_sample(tokens: int, count: int, seed: int) -> Tensor:
    """Which of `tokens` tokens to keep: int64 [min(count, tokens)], ascending, seeded."""
    generator = host_generator(seed)
    order = torch.randperm(tokens, generator=generator, device=generator.device)
    return order[:count].sort().values

"""MXFP4Linear: a linear with a quantized weight that quantizes its input."""

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from duqpp.format import BLOCK_SIZE, MXFP4Tensor, ScaleRule, dequantize
from duqpp.nn.prepared import Prepared
from duqpp.nn.shared_input import SharedInput
from duqpp.ops import (
    mxfp4_gemm,
    mxfp4_linear,
    prepare_weight,
    restore_weight,
    rotate_quantize,
)
from duqpp.ops.backend import DirectOps
from duqpp.ops.dispatch import select
from duqpp.ops.library import runs_directly
from duqpp.ops.reference import rotate_blocks

_MATRICES = ("rotation", "pre_rotation")
_PARAMETERS = itemgetter("weight_packed", "weight_scale", "bias")
_BUFFERS = itemgetter("rotation", "pre_rotation", "permutation")


class MXFP4Linear(nn.Module):
    """A linear whose weight is MXFP4 and whose input is rotated and quantized to MXFP4.

    ``y = dequantize(quantize(x R)) @ dequantize(weight).T + bias`` with weight = quantized W R^-T.

    Gradients reach x and the bias: rounding counts as the identity (straight-through). Under
    autocast, as with `nn.Linear`, x is taken in autocast's dtype, and so is what is returned.

    Parameters, none of them trained:
        weight_packed: uint8 [N, K/2]; weight_scale: uint8 [N, K/32]. Row-major until `prepare`, and
            always in a state dict; `weight` reads them in either state.
        bias: [N] or None.
    Buffers, in the state dict too: the weight is folded with them, so that what casts all
    parameters must not reach them, while offloading must reach the weight.
        rotation: bfloat16 [32, 32] or [K/32, 32, 32]; None is the identity.
        pre_rotation, permutation: DuQuant's first rotation, and its channel order int32 [K]; they
            act on x before `rotation` does. None in every other method.
    Attributes:
        shared_input: of the linears that read one input, `duqpp.nn.share_input`; None without.

    Args:
        in_features, out_features: K, a multiple of 32, and N.
        rotation, pre_rotation: shape of the matrix, or None.
        permutation: whether there is one.
        rule: scale rule of the activations.
        dtype: of the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        rule: ScaleRule,
        rotation: tuple[int, ...] | None,
        pre_rotation: tuple[int, ...] | None = None,
        permutation: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if in_features % BLOCK_SIZE:
            raise ValueError(
                f"MXFP4Linear: in_features must be a multiple of 32, got {in_features}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.rule, self.backend = ScaleRule(rule), backend
        self._prepared: Prepared | None = None
        self.shared_input: SharedInput | None = None

        def zeros(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        def parameter(shape: tuple[int, ...], kind: torch.dtype) -> nn.Parameter:
            return nn.Parameter(zeros(shape, kind), requires_grad=False)

        def buffer(name: str, shape: tuple[int, ...] | None, kind: torch.dtype) -> None:
            self.register_buffer(name, None if shape is None else zeros(shape, kind))

        self.weight_packed = parameter((out_features, in_features // 2), torch.uint8)
        self.weight_scale = parameter((out_features, in_features // BLOCK_SIZE), torch.uint8)
        self.register_parameter("bias", parameter((out_features,), dtype) if bias else None)
        buffer("rotation", rotation, torch.bfloat16)
        buffer("pre_rotation", pre_rotation, torch.bfloat16)
        buffer("permutation", (in_features,) if permutation else None, torch.int32)

    @property
    def weight(self) -> MXFP4Tensor:
        """The quantized, rotated weight [N, K], row-major."""
        stored = MXFP4Tensor(self.weight_packed.data, self.weight_scale.data)
        prepared = self._layout()
        if prepared is None:
            return stored
        device = prepared.device
        moved = MXFP4Tensor(stored.codes.to(device), stored.scales.to(device))
        weight = restore_weight(moved, backend=prepared.backend)
        return MXFP4Tensor(
            weight.codes.to(stored.codes.device), weight.scales.to(stored.codes.device)
        )

    def prepare(self) -> None:
        """Bring the weight, in place, into the layout that this device's backend reads.

        Called once the values are loaded; the backend is chosen here and stays. A linear that was
        not prepared computes the same, but orders its weight anew in every call.
        """
        device = self.weight_packed.device
        if device.type == "meta" or self._layout() is not None:
            return
        chosen = select("mxfp4_gemm", device, self.backend)
        before = self.weight
        after = chosen.prepare_weight(before)
        self.weight_packed.data, self.weight_scale.data = after.codes, after.scales
        self._prepared = Prepared(chosen.name, device.type, before, after, self.weight_packed)
        if self.shared_input is not None:
            self.shared_input.join()

    def joinable(self) -> MXFP4Tensor | None:
        """The prepared weight, where that may stand behind another one in memory; else None."""
        prepared, codes, scales = self._prepared, self.weight_packed.data, self.weight_scale.data
        if prepared is None or self.bias is not None or not self._layout():
            return None
        ops = prepared.direct_ops(self.weight_packed, self.weight_scale)
        if ops is None or not ops.whole_rows or self.out_features % ops.whole_rows:
            return None
        return MXFP4Tensor(codes, scales)

    def adopt(self, weight: MXFP4Tensor) -> None:
        """Take the same prepared weight in other memory."""
        self.weight_packed.data, self.weight_scale.data = weight.codes, weight.scales
        if self._prepared is not None:
            self._prepared.remember(self.weight_packed)

    def _separate(self) -> None:
        if self.shared_input is not None:
            self.shared_input.separate()

    def _layout(self) -> Prepared | None:
        """The layout that the weight is in; None for the row-major one."""
        prepared = self._prepared
        if prepared is not None and prepared.holds(self.weight_packed, self.weight_scale):
            return prepared
        return None

    def _restore(self) -> None:
        """Undo `prepare`."""
        weight = self.weight
        self._separate()
        self.weight_packed.data, self.weight_scale.data = weight.codes, weight.scales
        self._prepared = None

    def replace_weight(self, weight: MXFP4Tensor) -> None:
        """Take other codes and scales, row-major, of the same shape."""
        prepared, self._prepared = self._prepared, None
        self._separate()
        self.weight_packed.data, self.weight_scale.data = weight.codes, weight.scales
        if prepared is not None:
            self.prepare()

    def float_weight(self) -> Tensor:
        """The weight of the linear that this one approximates: float32 [N, K], the rotation undone.

        ``y`` is ``x @ float_weight().T + bias`` but for the rounding of the rotated input.
        """
        weight = dequantize(self.weight)
        if self.rotation is not None:
            weight = rotate_blocks(weight, self.rotation.float().mT)
        if self.permutation is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.permutation.long(), weight)
        if self.pre_rotation is not None:
            weight = rotate_blocks(weight, self.pre_rotation.float().mT)
        return weight

    def dequantized(self, dtype: torch.dtype) -> nn.Linear:
        """A float linear with `float_weight` and the bias, on this one's device."""
        device = self.weight_packed.device
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=dtype
        )
        linear.weight = nn.Parameter(self.float_weight().to(device, dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(device, dtype))
        return linear

    def _operand(self) -> tuple[MXFP4Tensor, str]:
        """The weight as a backend's GEMM reads it, and that backend."""
        codes, scales, prepared = self.weight_packed, self.weight_scale, self._prepared
        if prepared is not None and prepared.is_read_from(codes, scales):
            return MXFP4Tensor(codes, scales), prepared.backend
        return prepare_weight(self.weight, backend=self.backend), self.backend

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N] in the dtype of x."""
        y = self._call_directly(x)
        if y is not None:
            return y
        kind = x.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return self._forward(x, x)
        with torch.autocast(kind, enabled=False):  # what is below chooses its own dtypes
            return self._forward(x.to(torch.get_autocast_dtype(kind)), x)

    def _call_directly(self, x: Tensor) -> Tensor | None:
        """`forward` by the ops of its backend, which check no more than what they read.

        Returns: None where the weight is not as it was prepared, where more than values is asked
            for, and where an op refuses: `_forward` converts what can be, or says what cannot.
        """
        prepared = self._prepared
        if prepared is None or torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
            return None
        try:
            codes, scales, bias = _PARAMETERS(self._parameters)  # as attributes: 2 microseconds
            if not runs_directly(x, bias):
                return None
            ops, shared = prepared.direct_ops(codes, scales), self.shared_input
            if ops is None or x.numel() > ops.most_values:
                return None
            y = None
            if shared is not None:
                y = self._call_shared(x, shared, prepared.backend, ops)
            if y is None:
                y = ops.linear(*self._to_quantize(x, ops), codes, scales, bias)
        except (KeyError, RuntimeError):  # KeyError: another library keeps the parameters
            return None
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def _call_shared(
        self, x: Tensor, shared: SharedInput, backend: str, ops: DirectOps
    ) -> Tensor | None:
        """`_call_directly` with what another linear has made of x; None where nothing is shared."""
        codes, scales, bias = _PARAMETERS(self._parameters)
        # Where gradients are recorded, changing a view in place would be an error.
        joined = shared.joined if bias is None and not torch.is_grad_enabled() else None
        if joined is not None and (first := joined.first_of(codes, scales)) is not None:
            weight = joined.weight
            return shared.product(
                x,
                joined,
                first,
                lambda: ops.linear(*self._to_quantize(x, ops), weight.codes, weight.scales, None),
            )
        a = shared.read(x, backend, partial(self._quantize_directly, ops), x)
        if a is None:
            return None
        y = ops.gemm(a.codes, a.scales, codes, scales, bias, x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _quantize_directly(self, ops: DirectOps, x: Tensor, _: str) -> MXFP4Tensor:
        return MXFP4Tensor(*ops.quantize(*self._to_quantize(x, ops)))

    def _to_quantize(self, x: Tensor, ops: DirectOps) -> tuple[Tensor, Tensor | None, int]:
        """What `ops` are given to quantize x."""
        rotation, pre_rotation, permutation = _BUFFERS(self._buffers)
        if pre_rotation is not None or permutation is not None:
            x = self._transform(x)
        return x.contiguous(), rotation, ops.rules[self.rule]

    def _forward(self, x: Tensor, source: Tensor) -> Tensor:
        """`forward` of x; source: the tensor that it was made of, which others may share."""
        weight, backend = self._operand()
        shared = self.shared_input
        a = None if shared is None else shared.read(source, backend, self._quantize, x)
        if a is not None:
            y = mxfp4_gemm(a, weight, self.bias, out_dtype=x.dtype, backend=backend)
            return y.view(*x.shape[:-1], self.out_features)
        return mxfp4_linear(
            self._transform(x),
            self.rotation,
            weight,
            self.bias,
            rule=self.rule,
            backend=backend,
        ).to(x.dtype)

    def _quantize(self, x: Tensor, backend: str) -> MXFP4Tensor:
        return rotate_quantize(self._transform(x), self.rotation, rule=self.rule, backend=backend)

    def _transform(self, x: Tensor) -> Tensor:
        """What DuQuant does before the aligned rotation, in float32: rotate, then permute."""
        if self.pre_rotation is not None:
            x = rotate_blocks(x.float(), self.pre_rotation.float())
        if self.permutation is not None:
            x = x.index_select(-1, self.permutation)
        return x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves between devices, but keeps rotations as they are: weights are folded with those."""
        was_prepared = self._prepared is not None
        if was_prepared:  # another device may have another backend
            self._restore()
        stored = {n: m.data for n in _MATRICES if (m := getattr(self, n)) is not None}
        super()._apply(fn, recurse)
        for name, values in stored.items():
            matrix = getattr(self, name)
            if matrix.dtype != torch.bfloat16:  # rounded to another dtype: take the original back
                matrix.data = values.to(matrix.device)
        if was_prepared:
            self.prepare()
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # accelerate offloads: its hook has put the weight on the meta device, and gives that of the
        # state dict for each call. Backends pad scales: it would find them of another shape.
        if name == "_hf_hook" and self.weight_packed.is_meta:
            rows, columns = self.out_features, self.in_features
            self.weight_packed.data = self.weight_packed.new_empty((rows, columns // 2))
            self.weight_scale.data = self.weight_scale.new_empty((rows, columns // BLOCK_SIZE))
            self._prepared = None
            self._separate()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._layout() is not None:
            weight = self.weight
            destination[prefix + "weight_packed"] = weight.codes
            destination[prefix + "weight_scale"] = weight.scales

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        was_prepared = self._prepared is not None
        if was_prepared:
            self._restore()
        super()._load_from_state_dict(*args, **kwargs)
        if was_prepared:
            self.prepare()

    def extra_repr(self) -> str:
        rotation = "none" if self.rotation is None else list(self.rotation.shape)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, rule={self.rule}, rotation={rotation}"
        )

"""MXFP4Linear, and the input that several of them share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from duqpp.format import BLOCK_SIZE, MXFP4Tensor, ScaleRule, dequantize
from duqpp.ops import (
    mxfp4_gemm,
    mxfp4_linear,
    prepare_weight,
    restore_weight,
    rotate_quantize,
)
from duqpp.ops.dispatch import select
from duqpp.ops.reference import rotate_blocks

_MATRICES = ("rotation", "pre_rotation")


@dataclass(frozen=True)
class SharedInput:
    """An activation that is already rotated and quantized, in the place of the tensor it came from.

    quantized: MXFP4Tensor [M, K] from `rotate_quantize`.
    shape, dtype: of the tensor it stands for, [..., K]; M is the product of the leading ones.
    """

    quantized: MXFP4Tensor
    shape: torch.Size
    dtype: torch.dtype


class MXFP4Linear(nn.Module):
    """A linear whose weight is MXFP4 and whose input is rotated and quantized to MXFP4.

    ``y = dequantize(quantize(x R)) @ dequantize(weight).T + bias`` with weight = quantized W R^-T.

    Parameters, none of them trained:
        weight_packed: uint8 [N, K/2]; weight_scale: uint8 [N, K/32]. Row-major until `prepare`, and
            always in a state dict; `weight` reads them in either state.
        rotation: bfloat16 [32, 32] or [K/32, 32, 32]; None is the identity.
        pre_rotation, permutation: DuQuant's first rotation, and its channel order int32 [K]; they
            act on x before `rotation` does. None in every other method.
        bias: [N] or None.

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
        self._prepared_for: tuple[str, str] | None = None  # backend and device type

        def parameter(shape: tuple[int, ...], kind: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=kind, device=device), requires_grad=False)

        def optional(shape: tuple[int, ...] | None, kind: torch.dtype) -> nn.Parameter | None:
            return None if shape is None else parameter(shape, kind)

        self.weight_packed = parameter((out_features, in_features // 2), torch.uint8)
        self.weight_scale = parameter((out_features, in_features // BLOCK_SIZE), torch.uint8)
        self.rotation = optional(rotation, torch.bfloat16)
        self.pre_rotation = optional(pre_rotation, torch.bfloat16)
        self.permutation = optional((in_features,) if permutation else None, torch.int32)
        self.bias = optional((out_features,) if bias else None, dtype)

    @property
    def weight(self) -> MXFP4Tensor:
        """The quantized, rotated weight [N, K], row-major."""
        stored = MXFP4Tensor(self.weight_packed.data, self.weight_scale.data)
        if self._prepared_for is None:
            return stored
        backend, device = self._prepared_for
        moved = MXFP4Tensor(stored.codes.to(device), stored.scales.to(device))
        weight = restore_weight(moved, backend=backend)
        return MXFP4Tensor(
            weight.codes.to(stored.codes.device), weight.scales.to(stored.codes.device)
        )

    def prepare(self) -> None:
        """Bring the weight, in place, into the layout that this device's backend reads.

        Called once the values are loaded; the backend is chosen here and stays. A linear that was
        not prepared computes the same, but orders its weight anew in every call.
        """
        device = self.weight_packed.device
        if device.type == "meta" or self._prepared_for is not None:
            return
        chosen = select("mxfp4_gemm", device, self.backend)
        prepared = chosen.prepare_weight(self.weight)
        self.weight_packed.data, self.weight_scale.data = prepared.codes, prepared.scales
        self._prepared_for = (chosen.name, device.type)

    def _restore(self) -> None:
        """Undo `prepare`."""
        weight = self.weight
        self.weight_packed.data, self.weight_scale.data = weight.codes, weight.scales
        self._prepared_for = None

    def replace_weight(self, weight: MXFP4Tensor) -> None:
        """Take other codes and scales, row-major, of the same shape."""
        prepared, self._prepared_for = self._prepared_for, None
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
        stored = MXFP4Tensor(self.weight_packed, self.weight_scale)
        if self._prepared_for is not None and self._prepared_for[1] == stored.codes.device.type:
            return stored, self._prepared_for[0]
        return prepare_weight(self.weight, backend=self.backend), self.backend

    def quantize_input(self, x: Tensor) -> SharedInput:
        """Rotate and quantize x [..., K] once, for this linear and those that share its input."""
        backend = self.backend if self._prepared_for is None else self._prepared_for[0]
        quantized = rotate_quantize(
            self._transform(x), self.rotation, rule=self.rule, backend=backend
        )
        return SharedInput(quantized, x.shape, x.dtype)

    def forward(self, x: Tensor | SharedInput) -> Tensor:
        """x [..., K], or an input that is quantized already, to [..., N] in the dtype of x."""
        weight, backend = self._operand()
        if isinstance(x, SharedInput):
            y = mxfp4_gemm(x.quantized, weight, self.bias, out_dtype=x.dtype, backend=backend)
            return y.view(*x.shape[:-1], self.out_features)
        return mxfp4_linear(
            self._transform(x),
            self.rotation,
            weight,
            self.bias,
            rule=self.rule,
            backend=backend,
        ).to(x.dtype)

    def _transform(self, x: Tensor) -> Tensor:
        """What DuQuant does before the aligned rotation, in float32: rotate, then permute."""
        if self.pre_rotation is not None:
            x = rotate_blocks(x.float(), self.pre_rotation.float())
        if self.permutation is not None:
            x = x.index_select(-1, self.permutation)
        return x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves between devices, but keeps rotations as they are: weights are folded with those."""
        was_prepared = self._prepared_for is not None
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

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._prepared_for is not None:
            weight = self.weight
            destination[prefix + "weight_packed"] = weight.codes
            destination[prefix + "weight_scale"] = weight.scales

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self._prepared_for is not None:
            self._restore()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        rotation = "none" if self.rotation is None else list(self.rotation.shape)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, rule={self.rule}, rotation={rotation}"
        )


class _QuantizeOnce:
    """The hook of `share_input`.

    An object, not a function that remembers a linear: copied or pickled with its module, it goes
    with the linear of the copy.
    """

    def __init__(self, linear: MXFP4Linear) -> None:
        self._linear = linear

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = args[0] if args else kwargs["hidden_states"]
        if isinstance(x, SharedInput) or (torch.is_grad_enabled() and x.requires_grad):
            return args, kwargs
        shared = self._linear.quantize_input(x)
        if args:
            return (shared, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": shared}


def share_input(owner: nn.Module, linears: list[MXFP4Linear]) -> None:
    """Quantize the input of `owner` once for all linears that read it.

    Args:
        owner: a module whose forward hands its hidden states, and uses them for nothing else, to
            each of `linears`; they arrive as the first argument or as `hidden_states`.
        linears: members of one linear group: equal rotation and scale rule.

    When gradients are asked for, the tensor passes untouched and each linear quantizes it for
    itself, with the same result, because integer codes carry no gradient.
    """

    unshare_input(owner)
    hook = _QuantizeOnce(linears[0])
    owner.shared_input_hook = owner.register_forward_pre_hook(hook, with_kwargs=True)


def unshare_input(owner: nn.Module) -> None:
    """Undo `share_input`, if it was called."""
    if (hook := getattr(owner, "shared_input_hook", None)) is not None:
        hook.remove()
        owner.shared_input_hook = None

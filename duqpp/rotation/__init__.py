"""Block rotations: what they are, and how they are built from calibration activations."""

from duqpp.rotation.block_rotation import BlockRotation, InputTransform

__all__ = ["BlockRotation", "InputTransform"]

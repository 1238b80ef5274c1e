"""peft: LoRA around quantized linears."""

from typing import Any

from duqpp.errors import InputError
from duqpp.nn import MXFP4Linear


def lora_on_quantized(config: Any) -> Any:
    """Let a `peft.LoraConfig` reach quantized linears, which peft does not know by itself.

    The config is changed, and returned. It is needed again to load the adapter: peft does not store
    which modules it was told of::

        config = lora_on_quantized(LoraConfig(target_modules=["q_proj", "v_proj"]))
        model = get_peft_model(duqpp.from_pretrained(CHECKPOINT), config)
        model = PeftModel.from_pretrained(duqpp.from_pretrained(CHECKPOINT), ADAPTER, config=config)

    The quantized weights stay as they are: merging the adapter into them raises InputError.
    """
    from peft.tuners.lora import Linear

    class LoraMXFP4Linear(Linear):  # type: ignore[misc, unused-ignore]
        """LoRA around an MXFP4Linear."""

        def merge(self, *_: Any, **__: Any) -> None:
            raise InputError(
                "an adapter cannot be merged into MXFP4 weights; use it beside them, or call "
                "model.dequantize() before the adapter is loaded, and merge it there"
            )

    config._register_custom_module({MXFP4Linear: LoraMXFP4Linear})
    return config

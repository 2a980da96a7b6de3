"""Why a method of PEFT is not served now. Every `peft.PeftType` is here or has a checker.

The reason ends up in the reply to an upload, so it says what stands in the way, for its author.
"""

from __future__ import annotations

from collections.abc import Mapping

_PREFIX = "virtual tokens need key/value blocks of their own, which adapters cannot bring yet"
_ROTATION = "it rotates the base's weights, and no operator or private matrix for that exists yet"
_DENSE = "its update has full rank, and no operator or private matrix for that exists yet"
_FROM_BASE = "it starts from a decomposition of the base's weights, which NF4 has rounded"
_UNCHECKED = "its conversion has not been checked against PEFT yet"
_ROUTED = "its weights depend on the input through a router, which the operator does not run"

REFUSED_METHODS: Mapping[str, str] = {
    "PROMPT_TUNING": _PREFIX,
    "MULTITASK_PROMPT_TUNING": _PREFIX,
    "P_TUNING": _PREFIX,
    "PREFIX_TUNING": _PREFIX,
    "CPT": _PREFIX,
    "CARTRIDGE": _PREFIX,
    "ADAPTION_PROMPT": "it adds gated attention to whole layers, which the operator does not run",
    "OFT": _ROTATION,
    "BOFT": _ROTATION,
    "HRA": _ROTATION,
    "ROAD": _ROTATION,
    "PSOFT": _FROM_BASE,
    "LOKR": _DENSE,
    "FOURIERFT": _DENSE,
    "WAVEFT": _DENSE,
    "C3A": _DENSE,
    "SHIRA": _DENSE,
    "GRALORA": _DENSE,
    "HIRA": _DENSE,
    "RANDLORA": _UNCHECKED,
    "DELORA": _UNCHECKED,
    "TINYLORA": _FROM_BASE,
    "UNILORA": _UNCHECKED,
    "LILY": _ROUTED,
    "FROD": _FROM_BASE,
    "GLORA": _DENSE,
    "ADAMSS": _FROM_BASE,
    "PEANUT": "it is not linear: it puts small networks over the weights",
    "SHADOW": "it runs a network of its own beside the decoder's layers",
    "SUPERTUNING": _DENSE,
    "DEFT": _DENSE,
    "PVERA": _UNCHECKED,
    "XLORA": _ROUTED,
    "POLY": _ROUTED,
    "TRAINABLE_TOKENS": "rows of the embedding table cannot be replaced one by one yet; "
    "use modules_to_save for the whole table",
    "OSF": "it trains the base's weights themselves, so it is no adapter of a shared base",
}

"""Which layers have a rotary embedding and which a sliding window, as config.json and the family say (architecture.py)."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lora.huggingface.rope_config import Reader


def layers_with_rope(reader: Reader) -> list[bool]:
    """Return which layers have a rotary embedding."""
    layers = range(reader.count("num_hidden_layers"))
    if "no_rope_layers" not in reader.family.keys:
        return [True for _ in layers]
    given = reader.get("no_rope_layers")
    if given is None:
        interval = reader.count("no_rope_layer_interval")
        return [(layer + 1) % interval != 0 for layer in layers]
    if not isinstance(given, list) or len(given) < len(layers) or not all(one in (0, 1) for one in given):
        raise reader.error("no_rope_layers", given, f"{len(layers)} entries are needed: 1 for a layer with a rotary embedding, else 0")
    return [bool(given[layer]) for layer in layers]


def sliding_windows(reader: Reader, layers_with_rope: Sequence[bool]) -> tuple[int | None, ...]:
    """Return each layer's window, as transformers does: a mistral with layer_types is a Ministral there."""
    num_layers, kinds, window = len(layers_with_rope), reader.get("layer_types"), reader.get("sliding_window")
    if window is not None and (not isinstance(window, int) or isinstance(window, bool)):
        raise reader.error("sliding_window", window, "a whole number of at least 1, or null, is needed")
    known = isinstance(kinds, list) and all(kind in ("full_attention", "sliding_attention") for kind in kinds)
    if kinds is not None and not (known and len(kinds) == num_layers):
        raise reader.error("layer_types", kinds, f"{num_layers} entries, each full_attention or sliding_attention, are needed")
    if reader.family.windows == "none":
        if window is not None and window < reader.count("max_position_embeddings"):
            hint = f"a {reader.model_type} has no sliding window; remove the key, or use model_type mistral"
            raise reader.error("sliding_window", window, hint)
        window = None
    elif reader.family.windows in ("all", "always"):
        if "use_sliding_window" in reader.family.defaults and not reader.flag("use_sliding_window"):
            window = None
        if window is not None and kinds is None:
            _refuse_window_keys_of_qwen(reader, window)
        if reader.family.windows == "always" and len({*(kinds or ()), "full_attention" if window is None else "sliding_attention"}) > 1:
            raise reader.error("layer_types", kinds, f"the layers of a {reader.model_type} do not differ; remove the key")
    elif reader.family.windows != "pattern":
        window = window if reader.flag("use_sliding_window") else None
        if reader.family.windows == "flag":
            _first_sliding_layer(reader)
    if window is not None:
        window = reader.count("sliding_window")
    if kinds is None and reader.family.windows == "without rope":
        return tuple(None if has_rope else window for has_rope in layers_with_rope)
    if kinds is None and reader.family.windows == "pattern":
        key = "sliding_window_pattern"
        every = reader.count(key) if key in reader.family.keys else reader.family.defaults[key]
        kinds = ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(num_layers)]
    if kinds is None:
        first = _first_sliding_layer(reader) if window is not None else 0
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if window is None and "sliding_attention" in kinds:
        raise reader.error("layer_types", kinds, f"this {reader.model_type} has no window for its sliding layers; correct sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _first_sliding_layer(reader: Reader) -> int:
    return 0 if reader.family.windows in ("all", "always") else reader.count("max_window_layers", least=0)


def _refuse_window_keys_of_qwen(reader: Reader, window: object) -> None:
    hint = f"every layer of a {reader.model_type} has the window of sliding_window {window!r}"
    hint += "; remove this key, or set sliding_window: null"
    for key, harmless in (("use_sliding_window", True), ("max_window_layers", 0)):
        if reader.get(key, harmless) != harmless:
            raise reader.error(key, reader.get(key), hint)

"""Knows by its configuration whether a model can be trained on text.

Decoders and encoder-decoders can. An encoder sees the tokens that it would have to predict, and a
model that Transformers has a class for only with images or speech has no loss on text. Both are
refused before weights are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune_trainer import model_config, refusals
from finetune_trainer.errors import RunError

_AS_PUBLISHED = "use the config.json that was published with the model"
_POSITIONS = "max_position_embeddings"


def read_config(folder: Path) -> Any:
    """Returns Transformers' configuration of a model. Raises RunError(ModelInvalid)."""
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    body = model_config.read(model_config.CONFIG, (folder / model_config.CONFIG).read_bytes(), "the folder")
    model_config.check(body, "the folder")
    kind = body["model_type"]
    if kind not in CONFIG_MAPPING:
        if "auto_map" in body:
            raise RunError(
                "ModelInvalid",
                f"model.uri: the model type {kind[:80]!r} needs the code that comes with the model (auto_map in "
                f"config.json), which is never run; use a model of a family that Transformers {__version__} has",
            )
        raise RunError(
            "ModelInvalid",
            f"model.uri: config.json has the model_type {kind[:80]!r}, which Transformers {__version__} doesn't know; "
            "correct it, or use a model of another family",
        )
    with refusals.raising("ModelInvalid", "model.uri: Transformers can't read config.json", _AS_PUBLISHED):
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        config.get_text_config()
    return config


def auto_class(config: Any) -> tuple[Any, Any]:
    """Returns (Transformers' auto class, the class of the model) for a configuration.

    Raises RunError(ModelInvalid) for an encoder, and for a model that has no class for text alone.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    kind = str(config.model_type)
    if type(config) not in auto._model_mapping:
        raise RunError("ModelInvalid", f"model.uri: {_without_class(config, kind)}")
    if _sees_what_follows(config):
        raise RunError(
            "ModelInvalid",
            f"model.uri: a {kind} model is an encoder: its tokens see those that follow, so it can't learn to predict "
            "them; use a model that generates text",
        )
    return auto, auto._model_mapping[type(config)]


def position_limits(config: Any) -> tuple[int | None, int | None]:
    """Returns how many tokens (a source, anything else) may have; None means any number. Only an
    encoder-decoder has sources."""
    if not config.is_encoder_decoder:
        return None, _limit(config.get_text_config(), _POSITIONS)
    both = _limit(config, _POSITIONS)
    return (
        _limit(config, "max_encoder_position_embeddings") or both,
        _limit(config, "max_decoder_position_embeddings") or both,
    )


def layer_kinds(config: Any) -> frozenset[str]:
    """Returns the kinds of the layers that read text, as Transformers names them; none if the
    configuration doesn't list them."""
    return frozenset(getattr(config.get_text_config(), "layer_types", None) or ())


def short_window(config: Any, longest: int) -> int:
    """Returns the attention window of the layers that read text if rows of `longest` tokens exceed
    it, and otherwise 0."""
    window, kinds = getattr(config.get_text_config(), "sliding_window", None), layer_kinds(config)
    if not isinstance(window, int) or (kinds and kinds <= {"full_attention"}):
        return 0
    return window if 0 < window < longest else 0


def parts_without_text(base: Any) -> tuple[str, ...]:
    """Returns the names of a model's modules that no text passes through, such as a vision tower.

    None of them contains the decoder, and none is inside of it.
    """
    config = base.config
    if config.is_encoder_decoder or config.get_text_config() is config:
        return ()
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    names = {id(module): name for name, module in base.named_modules()}
    path = names.get(id(decoder), "")
    above = {path[:index] for index, character in enumerate(path) if character == "."} | {""}
    return tuple(
        name
        for name, module in base.named_modules()
        if path and name not in (*above, path) and module is not head and name.rpartition(".")[0] in above
    )


def _limit(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else None


def _sees_what_follows(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    text = config.get_text_config()
    if config.is_encoder_decoder:
        return False
    if getattr(text, "use_bidirectional_attention", False) is True or getattr(text, "is_causal", True) is False:
        return True
    kind = str(config.model_type)
    if kind not in MASKED and kind != "bert-generation":
        return False
    return not (getattr(config, "is_decoder", False) or getattr(config, "causal", False))


def _without_class(config: Any, kind: str) -> str:
    from transformers.models.auto import modeling_auto

    if kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return f"a {kind} model is an encoder, which predicts no next token; use a model that generates text"
    if hasattr(config, "vision_config") or kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return (
            f"a {kind} model reads images too, and Transformers has no class that loads its text part alone; use a "
            "model of its family that only reads text"
        )
    if config.is_encoder_decoder:
        return f"Transformers has no class that trains a {kind} encoder-decoder on text; use another model"
    return f"Transformers has no class with which a {kind} model generates text; use one that does"

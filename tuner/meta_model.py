"""Transformers' own class for a config, built on the meta device.

The class knows the sizes that a config leaves out, which layers have a bias and which parts have other widths. Nothing
is loaded or computed. Code that comes with a model is never executed and nothing is downloaded: doratune runs this
module in a process of its own, see :mod:`.class_process`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .projections import MOST, ModelConfigError

AGAIN = "correct it or download the model's config.json again"

_SET_ASIDE = {
    "auto_map",
    "quantization_config",
    "compression_config",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_flash_attn_2_enabled",
    "experts_implementation",
    "_experts_implementation",
    "torch_dtype",
    "dtype",
}
"""Fields, at any depth, that say how weights are stored or run. They do not change the layers; some of them make
transformers import, download or quantise something."""

_COUNT = re.compile(r"(^|_)(n_)?(layers?|depths?|blocks|experts|heads|stages|codebooks)$")
_MOST_LABELS = 1_000_000

_GENERATING = (
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_VISION_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
)
"""Tables of transformers, in the order in which the class of a file that names none is looked up. The whole model of a
multimodal config goes before its language part."""

_SIZE = re.compile(
    r"(?!.*(?:window|chunk|image|kernel|block|type_vocab)_(?:size|layers)$)(?:.*_)?(?:size|dim|rank|width|depth|layers?|"
    r"heads?|experts|embd|inner|channels|groups|state|ratio|expand|d_model|d_ff|d_kv)"
)
"""Names of the fields that decide the shapes and the number of linear layers."""


@dataclass(frozen=True)
class MetaModel:
    """A model whose parameters have shapes and no memory.

    ``cls`` is the name of its class; ``how`` says how that was found where the file does not name it, else it is empty.
    ``decoder_layers`` is None where the model has no one such number; ``notes`` say what was assumed about the file.
    """

    model: Any
    cls: str
    how: str
    decoder_layers: int | None
    notes: tuple[str, ...]


def build_model(config: Mapping[str, Any]) -> MetaModel:
    """Build the class that transformers has for ``config``, the content of a ``config.json``, on the meta device.

    Raises:
        ModelConfigError: transformers has no class for it, or cannot build the class; the message is one sentence that
            does not yet name the file.
    """
    _refuse_absurd(config, "")
    kind = config.get("model_type")
    if not isinstance(kind, str):
        problem = "is missing" if kind is None else f"is {kind!r}, not a name"
        raise ModelConfigError(f"field model_type {problem}, and it names the model's class; {AGAIN}")
    try:
        cls, how, built, model = _built(config, kind)
    except ModelConfigError:
        # Earlier versions of transformers wrote null for a field that was not set, where others want a number.
        lenient = _without_null(config, _unset_flags(kind, {key for key, value in _fields(config) if value is None}))
        if lenient == config:
            raise
        cls, how, built, model = _built(lenient, kind)
    return MetaModel(model, cls.__name__, how, _decoder_layers(built), tuple(_assumed(built, config)))


def _built(config: Mapping[str, Any], kind: str) -> tuple[type, str, Any, Any]:
    """The model's class, how it was found, its config object, and the model on the meta device."""
    built = _read(config, kind)
    cls, how = _find_class(built, config, kind)
    return cls, how, built, _build(cls, built, config)


def version() -> str:
    """The version of transformers."""
    import transformers

    return str(transformers.__version__)


def _refuse_absurd(value: object, path: str) -> None:
    """Refuse a count that no model has, before a class makes that many modules."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_absurd(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for inner in value:
            _refuse_absurd(inner, path)
    elif isinstance(value, int):
        field = path.rpartition(".")[2]
        most = MOST if _COUNT.search(field) else _MOST_LABELS if field == "num_labels" else None
        if most is not None and value > most:
            raise ModelConfigError(f"field {path} is {value}, more than any model has (at most {most}); {AGAIN}")


def _without(value: Any, names: set[str]) -> Any:
    """A copy of a JSON value without the fields of these names, at any depth."""
    if isinstance(value, Mapping):
        return {key: _without(inner, names) for key, inner in value.items() if key not in names}
    return [_without(inner, names) for inner in value] if isinstance(value, list) else value


def _read(config: Mapping[str, Any], kind: str) -> Any:
    """Transformers' config object, as its AutoConfig reads the file."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if kind not in CONFIG_MAPPING_NAMES:
        raise ModelConfigError(f"transformers {version()} has no class for model_type {kind!r}{_why_unknown(config)}")
    try:
        return _from_folder(AutoConfig, _without(config, _SET_ASIDE))
    except Exception as error:
        raise _refusal(f"cannot read it as model_type {kind!r}", error, config) from error


def _from_folder(auto: Any, config: Mapping[str, Any]) -> Any:
    with tempfile.TemporaryDirectory(prefix="doratune-") as folder:
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        built = auto.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    for part in _parts(built):
        if getattr(part, "use_pretrained_backbone", False):
            part.use_pretrained_backbone = False  # its layers are the same, and nothing is downloaded
    return built


def _why_unknown(config: Mapping[str, Any]) -> str:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if config.get("auto_map"):
        return ": its code comes with the model, and doratune executes none of it"
    near = difflib.get_close_matches(str(config.get("model_type")), list(CONFIG_MAPPING_NAMES), n=3, cutoff=0.8)
    written = (
        f" (the file was written by {config['transformers_version']})" if config.get("transformers_version") else ""
    )
    meant = f"; did you mean {', '.join(near)}?" if near else ""
    return f"{meant}; a newer transformers may have one{written}: pip install -U transformers"


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key, inner
            yield from _fields(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _fields(inner)


def _unset_flags(kind: str, unset: set[str]) -> set[str]:
    """The unset fields that are no sizes: for these null can only mean the default."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not unset:
        return set()
    try:
        defaults = {key: value for part in _parts(CONFIG_MAPPING[kind]()) for key, value in vars(part).items()}
    except Exception:
        return set()
    flags = {key for key in unset if isinstance(defaults.get(key), bool | float | str | dict)}
    others = {key for key in unset if key not in defaults or isinstance(defaults[key], int)}
    return flags | {key for key in others if not _SIZE.fullmatch(key)}


def _without_null(value: Any, names: set[str]) -> Any:
    if isinstance(value, Mapping):
        kept = ((key, inner) for key, inner in value.items() if inner is not None or key not in names)
        return {key: _without_null(inner, names) for key, inner in kept}
    return [_without_null(inner, names) for inner in value] if isinstance(value, list) else value


def _refusal(problem: str, error: Exception, config: Mapping[str, Any]) -> ModelConfigError:
    """One sentence from whatever transformers raised."""
    said = " ".join(str(error).split()) or type(error).__name__
    said = said if len(said) <= 300 else f"{said[:300]} …"
    if isinstance(error, ImportError):
        return ModelConfigError(f"transformers {version()} {problem} without an optional package: {said}")
    if "offline" in said.lower():
        return ModelConfigError(
            f"transformers {version()} {problem}: it names another model, whose config would have to be downloaded"
        )
    written = config.get("transformers_version")
    other = f" (the file was written by {written})" if isinstance(written, str) and written != version() else ""
    return ModelConfigError(f"transformers {version()} {problem}: {type(error).__name__}: {said}; {AGAIN}{other}")


def _parts(config: Any) -> Iterator[Any]:
    """The config object and every config inside it."""
    from transformers import PretrainedConfig

    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


def _find_class(built: Any, config: Mapping[str, Any], kind: str) -> tuple[type, str]:
    """The model's class, and how it was found where the file does not name it."""
    named = config.get("architectures") or []
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ModelConfigError(f"field architectures is {named!r}, not a list of class names; {AGAIN}")
    if named:
        return _named_class(named, built, config, kind), ""
    tables = _class_tables()
    encoder = kind in tables.get("MODEL_FOR_MASKED_LM_MAPPING_NAMES", {}) and not getattr(built, "is_decoder", False)
    first = [table for table in _GENERATING if not (encoder and table == "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")]
    inner = tuple(type(part) for part in _parts(built))[1:]
    for table in (*first, "MODEL_MAPPING_NAMES", *tables):
        for name in _names(tables.get(table, {}).get(kind)):
            cls = _class_of(name)
            wanted = getattr(cls, "config_class", None)
            if cls is not None and (wanted is None or isinstance(built, wanted) or wanted not in inner):
                return cls, f", its class for model_type {kind!r}: the file names none in `architectures`"
    raise ModelConfigError(
        f"transformers {version()} has no one class for model_type {kind!r}; name the model's class in the field "
        "architectures"
    )


def _class_tables() -> dict[str, Mapping[str, Any]]:
    from transformers.models.auto import modeling_auto

    return {name: t for name, t in vars(modeling_auto).items() if re.fullmatch(r"MODEL_(\w+_)?MAPPING_NAMES", name)}


def _names(entry: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _class_of(name: str) -> type | None:
    import transformers
    from transformers import PreTrainedModel

    try:
        cls = getattr(transformers, name, None)
    except Exception:  # a module of transformers that does not import without an optional package
        return None
    return cls if isinstance(cls, type) and issubclass(cls, PreTrainedModel) else None


def _named_class(named: list[str], built: Any, config: Mapping[str, Any], kind: str) -> type:
    """The class that the file names, if it is one of transformers' and takes a config of this type."""
    cls = next((found for found in map(_class_of, named) if found is not None), None)
    if cls is None:
        code = (
            "it is code that comes with the model, and doratune executes none of it"
            if config.get("auto_map")
            else (f"take the field out of a copy of the file to read it as model_type {kind!r}")
        )
        raise ModelConfigError(
            f"field architectures names {named[0]}, which transformers {version()} does not have; {code}"
        )
    wanted = getattr(cls, "config_class", None)
    known = {name for table in _class_tables().values() for name in _names(table.get(kind))}
    if wanted is not None and not isinstance(built, wanted) and cls.__name__ not in known:
        raise ModelConfigError(
            f"field architectures names {cls.__name__}, which is no class of model_type {kind!r}; {AGAIN}"
        )
    return cls


def _build(cls: type, built: Any, config: Mapping[str, Any]) -> Any:
    import torch
    from torch.overrides import TorchFunctionMode

    class SchedulesOnCpu(TorchFunctionMode):
        """Classes of transformers 4 read numbers of ``torch.linspace`` while they build: rates of dropped paths."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **{**({"device": "cpu"} if func is torch.linspace else {}), **(kwargs or {})})

    try:
        with torch.device("meta"), SchedulesOnCpu():
            return cls(built)
    except Exception as error:
        raise _refusal(f"cannot build {cls.__name__} from it", error, config) from error


def _decoder_layers(built: Any) -> int | None:
    try:
        return _whole_number(built.get_text_config(), "num_hidden_layers")
    except Exception:  # a config with several text parts
        return None


def _whole_number(config: Any, name: str) -> int | None:
    try:
        value = getattr(config, name, None)
    except Exception:  # a size that differs from layer to layer
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _assumed(built: Any, config: Mapping[str, Any]) -> list[str]:
    """Notes on what was ignored in the file and what was filled in."""
    notes = []
    if config.get("quantization_config"):
        notes.append("quantization_config is ignored: the layers have their unquantised shapes")
    taken = list(_filled_in(built, config, ""))
    if taken:
        notes.append(f"not in the file, so as {type(built).__name__} has it: {', '.join(taken)}")
    return notes


def _filled_in(built: Any, given: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """The sizes, by their path, that a config class filled in with its defaults because the file lacks them.

    A size that the class derives from others is not one of them.
    """
    from transformers import PretrainedConfig

    aliases = {own: name for name, own in type(built).attribute_map.items()}
    for own, declared in inspect.signature(type(built)).parameters.items():
        value = _whole_number(built, own)
        absent = own not in given and aliases.get(own) not in given
        if absent and _SIZE.fullmatch(own) and value is not None and value > 0 and declared.default == value:
            yield f"{prefix}{own}={value}"
    for name, part in vars(built).items():
        if not isinstance(part, PretrainedConfig):
            continue
        if isinstance(given.get(name), Mapping):
            yield from _filled_in(part, given[name], f"{prefix}{name}.")
        elif "text" in name:  # earlier files of some models have the text part's fields at the top
            yield from _filled_in(part, given, f"{prefix}{name}.")
        else:
            yield f"all of {prefix}{name}"


def load_transformers() -> None:
    """Import what every class needs, so that the time it takes does not count as building."""
    for name in ("torch", "transformers", "transformers.modeling_utils", "transformers.models.auto.modeling_auto"):
        importlib.import_module(name)

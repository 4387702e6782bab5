"""What can be wrong with an adapter or a checkpoint: why each kind matters, what to do, and where it was found.

``docs/how-to/check-an-adapter.md`` lists the kinds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

WRONG, LOSSY, NOTE = "wrong", "lossy", "note"
"""Verdicts. ``wrong``: training or serving gives something else than the adapter means. ``lossy``: it runs, less well.
``note``: worth knowing."""

_NAMED = 3
"""Tensors and rows that a fault names; the others are counted."""


@dataclass(frozen=True)
class Kind:
    """One kind of fault."""

    name: str
    verdict: str
    what: str
    why: str
    remedy: str


@dataclass(frozen=True)
class Place:
    """Where a fault is: a tensor or a layer, what was seen there, and in how many of its rows; the first of them."""

    name: str
    detail: str = ""
    row_count: int = 0
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Fault:
    """A kind of fault and all its places."""

    kind: Kind
    places: tuple[Place, ...]

    def values(self) -> dict[str, Any]:
        """The fault as JSON: at most three places are listed."""
        return {
            "kind": self.kind.name,
            "verdict": self.kind.verdict,
            "what": self.kind.what,
            "count": len(self.places),
            "row_count": sum(place.row_count for place in self.places),
            "where": [
                {
                    "name": place.name,
                    "detail": place.detail,
                    "row_count": place.row_count,
                    "rows": list(place.rows),
                }
                for place in self.places[:_NAMED]
            ],
            "why": self.kind.why,
            "remedy": self.kind.remedy,
        }

    def lines(self) -> list[str]:
        """The places as text, at most three."""
        lines = []
        for place in self.places[:_NAMED]:
            rows = ""
            if place.row_count:
                more = ", …" if place.row_count > len(place.rows) else ""
                rows = f"row{'' if place.row_count == 1 else 's'} {', '.join(map(str, place.rows))}{more}"
                rows += f" ({place.row_count} in all)" if more else ""
            lines.append(": ".join(filter(None, (place.name, "; ".join(filter(None, (place.detail, rows)))))))
        if len(self.places) > _NAMED:
            lines.append(f"and {len(self.places) - _NAMED} more")
        return lines


@dataclass
class Places:
    """Collects places by kind; ``faults()`` gives those that were found, the worst first."""

    _found: dict[Kind, list[Place]] = field(default_factory=dict)

    def add(self, kind: Kind, name: str, detail: str = "", rows: Sequence[int] = ()) -> None:
        """Note that ``kind`` is at ``name``; ``rows`` are all the rows that have it."""
        self._found.setdefault(kind, []).append(Place(name, detail, len(rows), tuple(rows[:_NAMED])))

    def has(self, kind: Kind) -> bool:
        return kind in self._found

    def faults(self) -> list[Fault]:
        order = (WRONG, LOSSY, NOTE)
        found = [Fault(kind, tuple(places)) for kind, places in self._found.items()]
        return sorted(found, key=lambda fault: order.index(fault.kind.verdict))


def goes_wrong(faults: Iterable[Fault]) -> bool:
    """Whether training or serving would go wrong."""
    return any(fault.kind.verdict == WRONG for fault in faults)


_LOAD = "PEFT cannot load the adapter, or loads another one than was trained"
_AGAIN = "save the adapter again from the trained model"

FOREIGN_KEYS = Kind(
    "foreign_keys",
    WRONG,
    "tensors are named as another trainer than PEFT names them",
    "PEFT leaves them out without an error, so that the model runs as if they were not there",
    "`doratune convert SRC DST --to peft`",
)
OTHER_METHOD = Kind(
    "other_method",
    WRONG,
    "tensors of another method than LoRA and DoRA",
    "they are no A and B, so neither PEFT's LoRA nor doratune can run them",
    "serve the adapter with the package that trained it",
)
INPUT_AXIS = Kind(
    "input_axis",
    WRONG,
    "m is for inputs (LyCORIS, wd_on_output=False)",
    "the paper and PEFT have one m for each output; no PEFT adapter computes the same",
    "`doratune convert SRC DST --merge CHECKPOINT`, or train with wd_on_output=True",
)
UNKNOWN_KEYS = Kind(
    "unknown_keys",
    NOTE,
    "tensors that are no part of a LoRA layer",
    "PEFT loads them only as modules_to_save or biases that the config names",
    "compare them with modules_to_save and bias in adapter_config.json",
)
BEYOND_DORA = Kind(
    "beyond_dora",
    NOTE,
    "the config asks for more than A, B and m on the checkpoint's W",
    "PEFT changes W, the layers or their calls by it; what ignores the field gives something else, without an error",
    "serve the adapter with PEFT; of one that began with PiSSA or the like, let PEFT save its form for the original W: "
    "save_pretrained(…, path_initial_model_for_weight_conversion=…)",
)
INCOMPLETE = Kind("incomplete", WRONG, "layers without A or without B", _LOAD, _AGAIN)
EMPTY = Kind(
    "empty",
    WRONG,
    "tensors without values",
    "they were saved while the parameters were sharded (DeepSpeed ZeRO-3, FSDP)",
    "gather the parameters before saving: accelerator.get_state_dict(model), or zero_to_fp32.py",
)
NOT_FINITE = Kind(
    "not_finite",
    WRONG,
    "NaN or infinite values",
    "they spread to every output of the layer, and to the loss",
    "go back to an earlier checkpoint; train with a lower learning rate or with fp32 adapters",
)
SHAPES = Kind("shapes", WRONG, "A and B do not fit together", _LOAD, _AGAIN)
RANK = Kind(
    "rank",
    WRONG,
    "the rank of the tensors is not the config's",
    "PEFT refuses the sizes; another loader scales BA by the wrong factor",
    "correct r or rank_pattern in adapter_config.json, together with lora_alpha",
)
MAGNITUDE_MISSING = Kind(
    "magnitude_missing",
    WRONG,
    "layers without m, although the config says use_dora",
    "PEFT starts their m at ||W|| and drops what was trained, without an error",
    "save m too, or set use_dora to false if the layers were trained without",
)
MAGNITUDE_UNUSED = Kind(
    "magnitude_unused",
    WRONG,
    "layers with m, although the config does not say use_dora",
    "PEFT runs them as plain LoRA and drops m, without an error",
    'set "use_dora": true in adapter_config.json',
)
MAGNITUDE_AXIS = Kind(
    "magnitude_axis",
    WRONG,
    "m lies along the wrong axis of W",
    "m must have one value for each output; this one was taken over the inputs",
    "train again with the norm of rows (dim=1 of W [d_out, d_in]); no conversion mends it",
)
MAGNITUDE_SHAPE = Kind(
    "magnitude_shape",
    WRONG,
    "m has the right number of values in another shape than [d_out]",
    "PEFT refuses the size of the tensor",
    "flatten m and save it again",
)
MAGNITUDE_ROUNDED = Kind(
    "magnitude_rounded",
    LOSSY,
    "all values of m are bf16 numbers",
    "bf16 loses every change of m under 0.4 %, in training above all",
    "keep adapters in fp32 (PEFT's autocast_adapter_dtype=True, which is its default) and train again",
)
UNTRAINED = Kind(
    "untrained",
    NOTE,
    "B is zero",
    "these layers change nothing but by m: they were never trained, or were saved too early",
    "look whether the layers were frozen in training",
)
LAYER_MISSING = Kind(
    "layer_missing",
    WRONG,
    "layers that the checkpoint does not have",
    "the adapter is for another model, or for another class of it",
    "give the checkpoint that the adapter was trained on",
)
BASE_SHAPE = Kind(
    "base_shape",
    WRONG,
    "A and B do not fit the checkpoint's W",
    "the adapter is for a model of another size",
    "give the checkpoint that the adapter was trained on",
)
BASE_NAME = Kind(
    "base_name",
    NOTE,
    "the adapter names another base model",
    "m is made from the norms of one model's W; on another model it rescales every output",
    "check that it is the same model under another name",
)
MAGNITUDE_FROZEN = Kind(
    "magnitude_frozen",
    WRONG,
    "m is ||W|| still, although B moved",
    "m was never trained, or its steps were rounded away: only the direction of W was adapted",
    "train m too: keep it in the optimizer, in fp32 (autocast_adapter_dtype=True)",
)
MAGNITUDE_RECOMPUTED = Kind(
    "magnitude_recomputed",
    WRONG,
    "m is ||W + sBA||",
    "the gain is 1 in every row, so that DoRA is plain LoRA: what was trained in m is lost",
    "take the m that was trained; do not initialise DoRA layers again after loading A and B",
)
COMBINED = Kind(
    "combined",
    WRONG,
    "combined by PEFT's add_weighted_adapter, which leaves m at ||W||",
    "the magnitudes of the adapters are dropped without an error (huggingface/peft issue 3761)",
    "merge each adapter into W by itself (`doratune convert --merge`) and combine the weights",
)
MAGNITUDE_SCALE = Kind(
    "magnitude_scale",
    WRONG,
    "m is far from the norms of W + sBA",
    "outputs are scaled by m / ||W + sBA||: the adapter is for another checkpoint, or m is normalised for TensorRT-LLM",
    "give the checkpoint that it was trained on; `doratune convert --from trtllm --to peft` if m is normalised",
)
ZERO_ROWS = Kind(
    "zero_rows",
    WRONG,
    "zero rows of W",
    "PEFT divides by their norm: DoRA on these layers gives NaN in training, serving and merging; doratune computes 0",
    "doratune.accelerate(model) in training and serving, `doratune convert --merge` to merge; or leave the layers out "
    "of target_modules",
)
NEAR_ZERO_ROWS = Kind(
    "near_zero_rows",
    LOSSY,
    "rows of W whose norm is under a ten-thousandth of the median",
    "BA turns such a row at once and cannot lengthen it: only m can, from near zero, in small steps",
    "leave the layers out of target_modules, or use plain LoRA for them",
)
QUANTISED = Kind(
    "quantised",
    NOTE,
    "the checkpoint is quantised",
    "the rows of packed weights are not examined",
    "examine the checkpoint that it was quantised from",
)
TENSOR_MISSING = Kind(
    "tensor_missing",
    WRONG,
    "tensors of the index that no file has",
    "the model cannot be loaded, or loads with random values there",
    "download the checkpoint again",
)

KINDS = {kind.name: kind for kind in list(globals().values()) if isinstance(kind, Kind)}
"""Every kind by its name."""

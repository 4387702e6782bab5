"""Run an MLP of the form ``down(act(gate(x)) * up(x))`` with the activation inside DoRA's composition.

The form is read from the source of the MLP's forward pass, and the activation is recognised by its values. So no
architecture is named here, and an MLP that computes anything else keeps its own forward pass.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ...internals.torch import is_recording
from ...nn.autocast import autocast_dtype
from ...nn.compiled import composed_gated
from ...nn.group import project_gated, project_mlp
from ...nn.group_plan import ACTIVATIONS, Plan, Projection, are_alike
from ...nn.watching import is_untouched
from .projections import Place, product_dtype
from .swapped import plain_class, run_plain, state_of
from .traced import traced_projection


class Form(NamedTuple):
    """The attributes of an MLP whose forward pass is ``down(act(gate(x)) * up(x))``."""

    gate: str
    up: str
    down: str
    act: str


class GatedMlp:
    """What a swapped MLP knows: its form, its activation, and that one's name in ``nn.group_plan.ACTIVATIONS``."""

    def __init__(self, form: Form, activation: str, act: nn.Module) -> None:
        self.form = form
        self.activation = activation
        self.act_class = type(act)
        self._act = act
        self._settings = _settings(act)
        self._seen: tuple[dict[str, Any], object] | None = None
        self._plan: Plan | None = None

    def __reduce__(self) -> tuple[type[GatedMlp], tuple[Form, str, nn.Module]]:
        return GatedMlp, (self.form, self.activation, self._act)

    def fits(self, module: nn.Module, act: nn.Module) -> bool:
        """Whether the MLP's forward pass and its activation are those that were recognised."""
        forward = plain_class(module).forward  # other code may have replaced it
        if act is not self._act:
            return False
        if self._seen is None or self._seen[1] is not forward or self._seen[0] != act.__dict__:
            if _settings(act) != self._settings or _form(forward) != self.form:
                return False
            self._seen = {**act.__dict__}, forward
        return True

    def serves(self, module: nn.Module) -> bool:
        """Whether a call of the MLP runs :func:`forward`, and nothing in it is another than was recognised."""
        act = module._modules.get(self.form.act)
        return "forward" not in vars(module) and act is not None and self.fits(module, act)

    def plan(self, gate: Projection, up: Projection) -> Plan | None:
        """How the two run together; None if they cannot."""
        plan = self._plan
        if plan is None or plan.projections[0] is not gate or plan.projections[1] is not up:
            if gate.lora_B.shape != up.lora_B.shape or not are_alike((gate, up)):
                return None
            self._plan = plan = Plan((gate, up), self.activation)
        return plan


def read_gated(module: nn.Module) -> GatedMlp | None:
    """Recognise a gated MLP whose gate and up are PEFT LoRA layers; None for any other module."""
    form = _form(plain_class(module).forward)
    if form is None:
        return None
    gate, up, down, act = (module._modules.get(name) for name in form)
    if not isinstance(gate, LoraLayer) or not isinstance(up, LoraLayer) or down is None or act is None:
        return None
    activation = _activation(act)
    return None if activation is None else GatedMlp(form, activation, act)


def forward(module: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The forward pass of a gated MLP, for x [..., d_in]."""
    if args or kwargs:
        return run_plain(module, x, *args, **kwargs)  # type: ignore[no-any-return]
    mlp = state_of(module, GatedMlp)
    run = _trace if torch.compiler.is_compiling() else _run
    y = None if mlp is None else run(module, mlp, x)
    return run_plain(module, x) if y is None else y


def _run(module: nn.Module, mlp: GatedMlp, x: torch.Tensor) -> torch.Tensor | None:
    find, form = module._modules.get, mlp.form
    gate, up, down, act = find(form.gate), find(form.up), find(form.down), find(form.act)
    if gate is None or up is None or down is None or act is None or not mlp.fits(module, act):
        return None
    if not (is_untouched(gate) and is_untouched(up) and is_untouched(act)):
        return None  # their hooks run only if they are called
    gate_place, up_place = state_of(gate, Place), state_of(up, Place)
    dtype = product_dtype(x)
    if dtype is None or gate_place is None or up_place is None:
        return None
    own = gate_place.projection(gate, dtype, x.device)
    other = up_place.projection(up, dtype, x.device)
    plan = None if own is None or other is None else mlp.plan(own, other)
    if plan is None:
        return None
    down_place = state_of(down, Place)
    if down_place is not None and is_untouched(down):
        last = down_place.projection(down, dtype, x.device)
        if last is not None:
            return project_mlp(x, plan, down_place.plan(last), dtype)
    y: torch.Tensor = down(project_gated(x, plan, dtype))
    return y


def _trace(module: nn.Module, mlp: GatedMlp, x: torch.Tensor) -> torch.Tensor | None:
    """:func:`_run` for a compiler, which traces it: nothing is kept from one call to the next."""
    modules = module._modules
    gate, up, down, act = (modules.get(name) for name in mlp.form)
    if gate is None or up is None or down is None or act is None or type(act) is not mlp.act_class or is_recording():
        return None
    if not (is_untouched(gate) and is_untouched(up) and is_untouched(act)):
        return None
    dtype = autocast_dtype(x.device) or x.dtype
    own, other = traced_projection(gate, dtype, x.device), traced_projection(up, dtype, x.device)
    if own is None or other is None or own.lora_B.shape != other.lora_B.shape or not are_alike((own, other)):
        return None
    y: torch.Tensor = down(composed_gated(x, own, other, mlp.activation, dtype))
    return y


@functools.cache
def _form(forward: Callable[..., Any]) -> Form | None:
    """The form of a class's forward pass, from its source; None if it is another one or there is no source."""
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        return None  # what it does is not all in its source
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        return None
    arguments = function.args
    if len(arguments.args) != 2 or arguments.vararg or arguments.kwonlyargs or arguments.kwarg or arguments.defaults:
        return None
    own, x = (argument.arg for argument in arguments.args)
    known: dict[str, ast.expr] = {}
    for statement in function.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target = statement.targets[0]
            if not isinstance(target, ast.Name) or target.id in (own, x) or target.id in known:
                return None
            known[target.id] = statement.value
        elif isinstance(statement, ast.Return) and statement is function.body[-1] and statement.value is not None:
            return _match(statement.value, own, x, known)
        else:
            return None
    return None


def _match(expression: ast.expr, own: str, x: str, known: dict[str, ast.expr]) -> Form | None:
    """The form if ``expression`` is ``own.down(own.act(own.gate(x)) * own.up(x))``, the factors in any order."""

    def resolved(node: ast.expr) -> ast.expr:
        while isinstance(node, ast.Name) and node.id in known:
            node = known[node.id]
        return node

    def call(node: ast.expr) -> tuple[str, ast.expr] | None:
        """The attribute of ``own`` that is called, and its only argument."""
        node = resolved(node)
        if not isinstance(node, ast.Call) or node.keywords or len(node.args) != 1:
            return None
        called = node.func
        if not isinstance(called, ast.Attribute) or not isinstance(called.value, ast.Name) or called.value.id != own:
            return None
        return called.attr, resolved(node.args[0])

    outer = call(expression)
    if outer is None or not isinstance(outer[1], ast.BinOp) or not isinstance(outer[1].op, ast.Mult):
        return None
    left, right = call(outer[1].left), call(outer[1].right)
    for activated, plain in ((left, right), (right, left)):
        inner = None if activated is None else call(activated[1])
        if activated is None or inner is None or plain is None:
            continue
        if all(isinstance(node, ast.Name) and node.id == x for node in (inner[1], plain[1])):
            form = Form(gate=inner[0], up=plain[0], down=outer[0], act=activated[0])
            return form if len(set(form)) == len(form) else None
    return None


_OF_FSDP2 = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")
"""What ``fully_shard`` sets on every module below the one that it shards."""

_INTERNAL = frozenset((*nn.Module().__dict__, *_OF_FSDP2))
_SIMPLE = (str, int, float, bool)


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a module without parameters depends on: its own attributes."""
    return {name: value for name, value in module.__dict__.items() if name not in _INTERNAL}


def _activation(module: nn.Module) -> str | None:
    """The name of the activation that ``module`` computes, found by its values; None if it is unknown."""
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()) or not is_untouched(module):
        return None
    if not all(value is None or callable(value) or type(value) in _SIMPLE for value in _settings(module).values()):
        return None
    x = torch.cat([torch.linspace(-12.0, 12.0, 481, dtype=torch.float64), torch.tensor([-1e3, 1e3]).double()])
    try:
        results = [_with_gradient(copy.deepcopy(module).train(training), x) for training in (True, False)]
    except Exception:  # whatever it needs, it is no differentiable function of one tensor
        return None
    if not torch.equal(*results):
        return None
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": nn.functional.silu,
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda t: nn.functional.gelu(t, approximate="tanh"),
    }
    assert set(functions) == set(ACTIVATIONS)
    return next(
        (name for name in ACTIVATIONS if torch.allclose(results[0], _with_gradient(functions[name], x), atol=1e-5)),
        None,
    )


def _with_gradient(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """[2, n]: the function's values at x [n] and its derivatives, which may be other than those of its values."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone().requires_grad_()
        y = function(x)
        (derivatives,) = torch.autograd.grad(y.sum(), x)
    return torch.stack((y.detach().to(x.dtype).view(x.shape), derivatives))

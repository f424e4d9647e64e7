"""The transformers backend: executes any decoder of transformers, adapted from outside.

A skipped sublayer contributes zero to the residual stream, which is right for pre-norm, post-norm and parallel
residuals alike. Its module's `forward` is replaced on the instance for one forward pass and restored in `finally`.
Plan, KV cache and cursor belong to the session, so sessions of one model never see each other, and an abandoned one
leaves nothing behind. A lock keeps forward passes of one model apart.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from knn_ssd.backends.admission import MemoryAdmission
from knn_ssd.backends.base import Exactness, Forward, ForwardOutput, ForwardRequest, Session
from knn_ssd.backends.cursor import Cursor
from knn_ssd.backends.exactness import probe
from knn_ssd.backends.native.prefix_cache import PrefixCache
from knn_ssd.backends.structure import Structure, context_length, declared, find_structure
from knn_ssd.backends.transformers.kv_cache import StaticCache
from knn_ssd.backends.transformers.replacement import Replacement, forward_of, replaced
from knn_ssd.backends.transformers.session import TransformersSession
from knn_ssd.errors import UnsupportedModelError, UsageError
from knn_ssd.kernels.gguf_rows import QuantisedLinear
from knn_ssd.plan import Mode, Plan
from knn_ssd.progress import Progress

# Shared by all backends of one model: a forward pass of one must not see what another has skipped.
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


class TransformersBackend:
    """Executes a decoder of transformers.

    Args:
        model: a causal language model; it is put into eval mode and otherwise left as it is.
        refused: why the kernels do not run more of it, for reports.

    Attributes:
        kernels_run: what of a model the kernels run.

    Raises:
        UnsupportedModelError: the model cannot draft for itself; the message says what was looked for.
    """

    modes = frozenset({Mode.KEEP, Mode.SKIP})
    kernels_run = "nothing"

    def __init__(self, model: PreTrainedModel, refused: str | None = None) -> None:
        self.refused = refused
        self.model: PreTrainedModel = model.eval()  # type: ignore[no-untyped-call]
        self.structure = find_structure(model)
        self.lock = _LOCKS.setdefault(model, threading.RLock())
        config = model.config.get_text_config()
        self.num_layers = len(self.structure.layers)
        self.hidden_size = int(config.hidden_size)
        self.vocab_size = int(config.vocab_size)
        self.device: torch.device = next(model.parameters()).device
        self._options = frozenset(inspect.signature(model.forward).parameters)
        self._cache_option = "cache" if "cache" in self._options else "past_key_values"  # before transformers 5.24
        self._exactness: Exactness | None = None
        self._activation_dtype: torch.dtype = model.dtype
        cache = StaticCache(self.num_layers, Cursor(2))
        self._silent = _zero_forwards(self, cache)
        on_cpu = self.device.type == "cpu"  # torch reports itself that an accelerator's memory is full
        self._admission = MemoryAdmission(self.weight_bytes, cache.token_bytes) if on_cpu else None
        self.context_length = context_length(config)

    @property
    def exactness(self) -> Exactness:
        """What was found on the loaded weights; never `bitwise` in 16 bits, where rounding hides most differences."""
        if self._exactness is None:
            half = self._activation_dtype.itemsize < torch.float32.itemsize
            self._exactness = Exactness.NUMERICAL if half else probe(self)
        return self._exactness

    @property
    def weight_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.model.parameters())

    @property
    def low_bit_bytes(self) -> int:
        """Memory of the 4-bit copies: 0 without the kernels."""
        return 0

    def prepare(self, plan: Plan, progress: Progress | None = None) -> None:
        """Checks that this backend can run a plan, which needs nothing."""
        self._check_plan(plan)

    def prepare_later(self, plan: Plan, progress: Progress | None = None) -> bool:
        self.prepare(plan, progress)
        return True

    @property
    def is_preparing(self) -> bool:
        return False

    def open(self, capacity: int, prefix_cache: PrefixCache | None = None, forward: Forward | None = None) -> Session:
        """Opens a session without the prefix cache: a row's bits may depend here on where its block begins."""
        return TransformersSession(self.num_layers, Cursor(capacity, self._admission), forward or self.forward)

    def most_tokens(self) -> int:
        limit = self.context_length
        return self._admission.most_tokens(limit) if self._admission is not None else limit

    def forward(self, request: ForwardRequest) -> ForwardOutput:
        cache: StaticCache = request.cache
        mask = None
        if request.run_length:
            mask = self._teacher_forcing_mask(request.position, len(request.token_ids), request.run_length)
        with self.skipping(request.plan), last_hidden_state(self.model) as captured, cache.scoring(mask is not None):
            logits = self._run(request.token_ids, cache, request.num_logits, mask)
        if self.device.type != "cpu":  # the time of a pass is that of its work
            torch.get_device_module(self.device).synchronize()
        return ForwardOutput(captured[0][0], logits)

    @contextmanager
    def skipping(self, plan: Plan | None) -> Iterator[None]:
        """Runs the model under a plan for the length of a `with` block."""
        with self.lock, replaced(self._replacements(plan)):
            yield

    def _run(
        self,
        token_ids: Sequence[int],
        cache: StaticCache,
        logits_to_keep: int,
        mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Logits (n, V) of tokens at the cache's cursor, or only those of the last `logits_to_keep` rows."""
        start = cache.cursor.length
        positions = range(start, start + len(token_ids))
        return self._call(token_ids, positions, cache, logits_to_keep, mask)[-logits_to_keep:]

    def _call(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        cache: Cache,
        logits_to_keep: int | torch.Tensor,
        mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Logits (…, V) of one forward pass: of the rows to keep, or of all where the model cannot choose."""
        if mask is None and hasattr(self.model.base_model, "_update_causal_mask"):
            # as `generate` gives it: StableLM of transformers 5.0 makes one that is too long of none
            mask = torch.ones(1, positions[-1] + 1, dtype=torch.long, device=self.device)
        options: dict[str, Any] = {
            "position_ids": torch.tensor([list(positions)], device=self.device),  # (1, n)
            "attention_mask": mask,
            "logits_to_keep": logits_to_keep,
        }
        with torch.no_grad():
            output = self.model(
                input_ids=torch.tensor([list(token_ids)], device=self.device),  # (1, n)
                use_cache=True,
                **{self._cache_option: cache},
                **{name: value for name, value in options.items() if name in self._options},
            )
        return output.logits[0]  # type: ignore[no-any-return]

    def _teacher_forcing_mask(self, length: int, count: int, run_length: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """The attention mask of teacher-forced scoring; one for each kind of attention layer if there are several."""
        config = self.model.config.get_text_config()
        window = declared(config, "sliding_window") if getattr(config, "use_sliding_window", True) else None
        chunk = declared(config, "attention_chunk_size")

        def mask(window: int | None = None, chunk: int | None = None) -> torch.Tensor:
            return _scoring_mask(length, count, run_length, window, chunk).to(self.device, self._activation_dtype)

        if declared(config, "layer_types") and (window or chunk):
            return {
                "full_attention": mask(),
                "sliding_attention": mask(window=window),
                "chunked_attention": mask(chunk=chunk),
            }
        return mask(window=window)

    def _replacements(self, plan: Plan | None) -> list[Replacement]:
        """What is replaced in the model for a forward pass under a plan."""
        if plan is None:
            return []
        self._check_plan(plan)
        attention, mlp = self._silent
        return [attention[i] for i in plan.skipped_attention] + [mlp[i] for i in plan.skipped_mlp]

    def _check_plan(self, plan: Plan) -> None:
        if plan.num_layers != self.num_layers:
            raise UsageError(f"a plan for {plan.num_layers} layers was given to a model of {self.num_layers}")
        if plan.uses_low and Mode.LOW not in self.modes:
            raise UsageError("this backend has no 4-bit weights, and the plan asks for the mode low")


def _scoring_mask(length: int, count: int, run_length: int, window: int | None, chunk: int | None) -> torch.Tensor:
    """Additive attention mask (1, 1, n, length + 2n): the full model's keys first, then the draft's own."""
    row = torch.arange(count)[:, None]
    run_start = row - row % run_length
    full = torch.arange(length + count)[None]  # the key's position in the text
    own = torch.arange(count)[None]
    visible = torch.cat([full < length + run_start, (own >= run_start) & (own <= row)], dim=1)
    position = torch.cat([full, length + own], dim=1)
    if window is not None:
        visible &= position > length + row - window
    if chunk is not None:
        visible &= position // chunk == (length + row) // chunk
    return torch.where(visible, 0.0, -torch.inf)[None, None]


@contextmanager
def last_hidden_state(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collects the hidden states (1, n, D) after the final norm of each forward pass in a `with` block."""
    captured: list[torch.Tensor] = []
    with model.base_model.register_forward_hook(lambda _module, _inputs, output: captured.append(output[0])):
        yield captured


def _zero_forwards(backend: TransformersBackend, cache: StaticCache) -> Any:
    """For each sublayer, a `forward` whose output is zero in the right shape; checked by running the model with it.

    The cache, which has room for two tokens, is written to.
    """
    structure = backend.structure
    head: Any = backend.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    with backend.lock:
        with replaced(_without_products(backend.model.modules())):  # whose shapes matter, not their values
            shapes = _output_shapes(backend, cache)
        attention, mlp = (
            [forward_of(m, _zero_forward(shapes[m])) for m in modules]
            for modules in (structure.attention, structure.mlp)
        )
        with replaced(_without_products([head])):  # which comes after the layers
            _check_identity(backend, structure, attention + mlp)
    return attention, mlp


def _without_products(modules: Iterable[nn.Module | None]) -> list[Replacement]:
    """Has those modules that are layers of quantised rows give zeros: to de-quantise them takes long."""

    def zeros(size: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda inputs: inputs.new_zeros(*inputs.shape[:-1], size)

    quantised = (module for module in modules if isinstance(module, QuantisedLinear))
    return [forward_of(module, zeros(module.out_features)) for module in quantised]


def _zero_forward(shape: int | None) -> Callable[..., Any]:
    """A `forward` that returns zeros: a tuple of `shape` items, the hidden states first, or a tensor if it is None."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        zeros = torch.zeros_like(hidden)
        return zeros if shape is None else (zeros,) + (None,) * (shape - 1)

    return forward


def _output_shapes(backend: TransformersBackend, cache: StaticCache) -> dict[nn.Module, int | None]:
    """The length of each sublayer's output tuple, None for a tensor, found in one forward pass over two tokens."""
    shapes: dict[nn.Module, int | None] = {}
    modules = backend.structure.attention + backend.structure.mlp

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        shapes[module] = len(output) if isinstance(output, tuple) else None

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(note))
        _try_forward(backend, cache)
    for index, module in enumerate(modules):
        if module not in shapes:
            raise UnsupportedModelError(
                f"{type(module).__name__} of layer {index % backend.num_layers} in {type(backend.model).__name__} "
                "does not run on its own, so it cannot be skipped"
            )
    return shapes


def _check_identity(backend: TransformersBackend, structure: Structure, silent: list[Replacement]) -> None:
    """Checks that each layer returns its input unchanged while both its sublayers are skipped."""
    changed: list[int] = []

    def compare(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            if not torch.equal(before, after):
                changed.append(index)

        return hook

    with ExitStack() as hooks, replaced(silent):
        for index, layer in enumerate(structure.layers):
            hooks.enter_context(layer.register_forward_hook(compare(index), with_kwargs=True))
        _try_forward(backend, StaticCache(backend.num_layers, Cursor(2)))
    if changed:
        raise UnsupportedModelError(
            f"layer {changed[0]} ({type(structure.layers[changed[0]]).__name__}) of {type(backend.model).__name__} "
            "changes its input even when its attention and its MLP contribute nothing; "
            "layers that only add both to a residual stream were looked for"
        )


def _try_forward(backend: TransformersBackend, cache: StaticCache) -> None:
    try:
        backend._run([0, 0], cache, logits_to_keep=1)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(backend.model).__name__} did not run with a static KV cache ({type(error).__name__}: {error})"
        ) from error
